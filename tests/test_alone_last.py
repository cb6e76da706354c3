"""Tests that a busy neighbour can make fail run after all others, one by one, in one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent

CONFTEST = """\
import json, os, time
from pathlib import Path

import alone_last
import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "alone: runs after all others")


def pytest_collection_modifyitems(config, items):
    alone_last.sort(config, items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return alone_last.AloneLast(config, log)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    began = time.monotonic()
    yield
    line = {"name": item.name, "pid": os.getpid(), "began": began, "ended": time.monotonic()}
    with Path("ran").open("a") as file:  # one write below a page: whole, whoever else writes
        file.write(json.dumps(line) + "\\n")
"""
SUITE = """\
import os, time

import pytest


@pytest.mark.alone
@pytest.mark.parametrize("number", range(3))
def test_alone(number):
    time.sleep(0.1)


@pytest.mark.parametrize("number", range(12))
def test_beside(number):
    time.sleep(0.6 if number == 5 else 0.02)
"""


@dataclass(frozen=True)
class Ran:
    """A test that ended: its name, its process, and when it began and ended, in seconds."""

    name: str
    pid: int
    began: float
    ended: float


class Suite:
    """A suite of its own, run over two processes."""

    def __init__(self, root: Path) -> None:
        """Lay it out in `root`."""
        self.root = root
        shutil.copy(HERE / "alone_last.py", root)
        (root / "conftest.py").write_text(CONFTEST)
        (root / "pytest.ini").write_text("[pytest]\n")
        self.write(SUITE)

    def write(self, text: str) -> None:
        """Put these tests into it."""
        (self.root / "test_suite.py").write_text(text)

    def run(self, *argv: str) -> tuple[int, str]:
        """Run it; return the exit status and what was printed. One that hangs fails the test."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(
            [*(sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-n", "2"),
             *("-p", "no:cacheprovider"), *argv],
            cwd=self.root,
            env={**kept, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TMPDIR": str(self.root)},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def ran(self) -> list[Ran]:
        """List the tests that ended, in the order of their beginnings."""
        lines = (self.root / "ran").read_text().splitlines()
        return sorted((Ran(**json.loads(line)) for line in lines), key=lambda one: one.began)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """Three tests that have to be alone, written before twelve others."""
    return Suite(tmp_path)


def closing_lines(text: str) -> list[str]:
    """List the lines that count tests."""
    return re.findall(r"^.*\b(?:passed|failed|error|no tests ran)\b.* in .*$", text, re.MULTILINE)


def test_what_has_to_be_alone_begins_after_all_others_in_one_process(suite: Suite) -> None:
    """Also when one of the others is slow; one run counts them all in one line."""
    code, text = suite.run()

    assert code == 0, text
    ran = suite.ran()
    alone = [one for one in ran if one.name.startswith("test_alone")]
    beside = [one for one in ran if one.name.startswith("test_beside")]
    assert (len(alone), len(beside)) == (3, 12)
    assert len({one.pid for one in beside}) == 2
    assert len({one.pid for one in alone}) == 1
    assert min(one.began for one in alone) >= max(one.ended for one in beside)
    assert all(one.ended <= then.began for one, then in pairwise(alone))
    (line,) = closing_lines(text)
    assert line.startswith("15 passed")


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("test_alone and 1", ["test_alone[1]"]),
        ("test_beside and 3", ["test_beside[3]"]),
        ("test_alone", ["test_alone[0]", "test_alone[1]", "test_alone[2]"]),
        ("test_alone and 1 or test_beside and 3", ["test_beside[3]", "test_alone[1]"]),
    ],
)
def test_a_choice_of_tests_runs_these_and_ends(suite: Suite, wanted: str, names: list[str]) -> None:
    """One of a kind, none of a kind: fewer tests than processes wait for nobody."""
    code, text = suite.run("-k", wanted)

    assert code == 0, text
    assert [one.name for one in suite.ran()] == names
    assert len(closing_lines(text)) == 1


def test_files_that_share_something_come_first(suite: Suite) -> None:
    """In the beginning a process gets many tests in a row, and makes what they share once."""
    shared = "import pytest\n\n@pytest.fixture(scope='module')\ndef made():\n    return 1\n\n"
    (suite.root / "test_z.py").write_text(f"{shared}def test_z(made):\n    pass\n")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"],
        cwd=suite.root, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip

    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert names[0] == "test_z"
    assert names[1].startswith("test_beside")
    assert names[-1] == "test_alone[2]"


def test_where_nothing_is_chosen_the_run_ends(suite: Suite) -> None:
    """A selection that fits no test is told as such, at once."""
    code, text = suite.run("-k", "nothing_of_this_name")

    assert code == pytest.ExitCode.NO_TESTS_COLLECTED, text


def _dies(text: str) -> str:
    return text.replace("time.sleep(0.6 if number == 5 else 0.02)",
                        "os._exit(3) if number == 5 else time.sleep(0.02)")  # fmt: skip


def _dies_alone(text: str) -> str:
    return text.replace("time.sleep(0.1)", "os._exit(3) if number == 1 else time.sleep(0.1)")


@pytest.mark.parametrize(
    ("change", "name"), [(_dies, "test_beside[5]"), (_dies_alone, "test_alone[1]")]
)
def test_a_process_that_dies_fails_its_test_and_the_others_go_on(
    suite: Suite, change: Callable[[str], str], name: str
) -> None:
    """Beside others or alone: the run ends, and says which test took its process along."""
    suite.write(change(SUITE))

    code, text = suite.run()

    assert code == pytest.ExitCode.TESTS_FAILED, text
    assert f"crashed while running 'test_suite.py::{name}'" in text
    ran = suite.ran()
    every = {f"test_alone[{i}]" for i in range(3)} | {f"test_beside[{i}]" for i in range(12)}
    assert sorted(one.name for one in ran) == sorted(every - {name})
    alone = [one for one in ran if one.name.startswith("test_alone")]
    beside = [one for one in ran if one.name.startswith("test_beside")]
    assert min(one.began for one in alone) >= max(one.ended for one in beside)
    assert len(closing_lines(text)) == 1
