"""Setting up `.venv`: what is asked of the installer, and when nothing is."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import pytest
from test_runner import read_outputs

from pipelines import bootstrap
from pipelines.errors import MachineError, ToolError

if TYPE_CHECKING:
    from pathlib import Path

# An installer that writes down what it was asked, and makes the environment that it was asked for.
UV = """\
#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
case "$*" in *"$REFUSED"*) exit 1 ;; esac
if [ "$1" = venv ]; then
  for last; do :; done
  mkdir -p "$last/bin" && touch "$last/bin/python"
fi
"""


@pytest.fixture(name="home")
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of our own, and an installer that only takes notes."""
    uv = tmp_path / "tools/uv"
    uv.parent.mkdir()
    uv.write_text(UV)
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{uv.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("REFUSED", "nothing is refused")
    venv = tmp_path / ".venv"
    monkeypatch.setattr(bootstrap, "VENV", venv)
    monkeypatch.setattr(bootstrap, "LOG", tmp_path / "setup.log")
    return tmp_path


def asked(home: Path) -> list[str]:
    """Return what the installer was asked since the last time."""
    notes = home / "tools/asked"
    lines = notes.read_text().splitlines() if notes.exists() else []
    notes.unlink(missing_ok=True)
    return lines


def test_packages_come_from_the_lock_by_their_hashes(home: Path) -> None:
    """The first run makes the environment and installs nothing that has no declared hash."""
    bootstrap.set_up("base")

    made, packages, ourselves = asked(home)
    assert made.startswith("venv")
    assert "--require-hashes" in packages
    assert "--no-deps" in ourselves


def test_a_second_run_does_nothing(home: Path) -> None:
    """What is set up is not set up again, and the smaller profile is part of the larger one."""
    bootstrap.set_up("convert")
    asked(home)

    bootstrap.set_up("convert")
    bootstrap.set_up("base")

    assert asked(home) == []


def test_an_active_environment_does_not_remove_itself(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make` typed while `.venv` is active runs the Python inside it, which has to survive."""
    bootstrap.set_up("base")
    asked(home)
    mark = home / ".venv/mark"
    mark.touch()
    monkeypatch.setattr(sys, "prefix", str(home / ".venv"))
    monkeypatch.setattr(sys, "executable", str(home / ".venv/bin/python"))

    bootstrap.set_up("base")
    bootstrap.set_up("convert")

    assert mark.exists()
    assert not any(line.startswith("venv") for line in asked(home))


def test_a_new_lock_under_another_python_starts_afresh(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages of one interpreter are not mixed with those of another one."""
    bootstrap.set_up("base")
    mark = home / ".venv/mark"
    mark.touch()
    monkeypatch.setattr(sys, "base_prefix", "/opt/another-python")

    bootstrap.set_up("base")
    assert mark.exists()
    monkeypatch.setattr(bootstrap, "TORCH", "torch==99")
    bootstrap.set_up("base")

    assert not mark.exists()


def test_torch_comes_from_the_ordinary_index_if_its_own_is_out_of_reach(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch's index does not answer, the larger build is taken instead of none."""
    monkeypatch.setenv("REFUSED", "--torch-backend=cpu")

    bootstrap.set_up("convert")

    *_, refused, taken = asked(home)
    assert "--torch-backend=cpu" in refused
    assert taken.endswith(bootstrap.TORCH)
    assert "--torch-backend" not in taken


def test_a_cut_set_up_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed installation the next run installs again; it does not believe the first."""
    monkeypatch.setenv("REFUSED", "--require-hashes")
    with pytest.raises(ToolError, match="exit code 1"):
        bootstrap.set_up("base")
    monkeypatch.setenv("REFUSED", "nothing is refused")
    asked(home)

    bootstrap.set_up("base")

    assert any("--require-hashes" in line for line in asked(home))


# --- shared by the jobs of a runner -----------------------------------------------------------


@pytest.fixture(name="cache")
def _cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache."""
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(home / "cache"))
    monkeypatch.delenv("GGUF_FLEET_VENV", raising=False)
    return home / "cache/environments"


def test_the_jobs_of_a_runner_share_one_environment_without_code(home: Path, cache: Path) -> None:
    """The second job installs nothing; the code of neither checkout is in it."""
    first = bootstrap.set_up_shared("base")

    lines = asked(home)
    assert any("--require-hashes" in line for line in lines)
    assert not any(" -e " in line for line in lines)
    assert first.parent == cache
    assert bootstrap.set_up_shared("base") == first
    assert asked(home) == []


def test_another_lock_is_another_environment_and_an_unused_one_goes(
    home: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of an older branch keeps its own; what no job asked for in 30 days is removed."""
    first = bootstrap.set_up_shared("base")
    monkeypatch.setattr(bootstrap, "TORCH", "torch==99")
    second = bootstrap.set_up_shared("base")
    assert {path for path in cache.iterdir() if path.is_dir()} == {first, second}

    old = time.time() - 31 * 24 * 3600
    os.utime(first / bootstrap.STAMP_NAME, (old, old))
    bootstrap.set_up_shared("base")

    assert {path for path in cache.iterdir() if path.is_dir()} == {second}
    assert home.exists()


def test_an_environment_that_the_machine_was_given_is_taken_as_it_is(
    home: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is installed into it, one of another lock is told of, and a wrong path is refused."""
    given = home / "given"
    monkeypatch.setenv("GGUF_FLEET_VENV", str(given))
    with pytest.raises(MachineError, match="no virtual environment"):
        bootstrap.set_up_shared("base")
    (given / "bin").mkdir(parents=True)
    (given / "bin/python").touch()

    assert bootstrap.set_up_shared("base") == given

    assert asked(home) == []
    assert not cache.exists()
    assert "not set up for this lock" in capsys.readouterr().err


def test_a_job_gets_the_environment_for_its_later_steps(
    home: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step sets GGUF_FLEET_VENV, which actions/fleet reads, and an output of the same."""
    monkeypatch.setattr(sys, "argv", ["bootstrap", "base", "--shared"])
    for name, file in (("GITHUB_ENV", "env"), ("GITHUB_OUTPUT", "out")):
        monkeypatch.setenv(name, str(home / file))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")

    assert bootstrap.main() == 0

    (venv,) = (path for path in cache.iterdir() if path.is_dir())
    assert read_outputs((home / "env").read_text()) == {"GGUF_FLEET_VENV": str(venv)}
    assert read_outputs((home / "out").read_text()) == {"venv": str(venv)}
