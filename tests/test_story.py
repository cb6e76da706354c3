"""
The whole story on a fork: a pull request is measured, judged, reported, merged, published, undone.

Every workflow is run by act; every verb, llama.cpp, Ollama, DVC's remote and the registry are real.
GitHub is the stand-in that refuses what GitHub's own description does not know, with real branches
behind it. The machine with the GPU label is this one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import act
import comment_page
import pytest
from github_api import GitHubApi
from operator_fork import MODEL, QUANTS, Fork, calm, ran, require_published
from test_chain import quick

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipelines.toolchain import Toolchain

pytestmark = [pytest.mark.toolchain, pytest.mark.alone, pytest.mark.timeout(1800)]

# Made by this very test: numbers are `#`.
GOLDEN: Final = act.ROOT / "tests/data/story/comment.txt"


def add(type_: str) -> Callable[[str], str]:
    """Return the edit that declares a quant."""
    line = f"  {MODEL}-{type_}: {{model: {MODEL}, type: {type_}}}\n"
    return lambda text: text.replace("quants:\n", f"quants:\n{line}", 1)


def only(type_: str) -> Callable[[str], str]:
    """Return the edit after which a quant is the only one: what wins is what it measures."""
    quants = re.compile(rf"^  {MODEL}-\S+: .*\n", re.MULTILINE)
    return lambda text: add(type_)(quants.sub("", text))


def skeleton(body: str) -> list[str]:
    """Return what a comment says whatever was measured: sentences, tables, what is folded."""
    kept = re.findall(
        r"^(?:### .*|\*\*[^*]+\*\*|\| (?:quant|gate|set) .*|<details>.*)", body, re.MULTILINE
    )
    return [re.sub(r"\b[0-9a-f]{7,}|\d[\d,.]*", "#", line) for line in kept]


def require_readable(body: str, place: Path) -> None:
    """Assert that a browser shows it at two widths, charts and all; leave pictures of it."""
    (place / "comment.md").write_text(body, encoding="utf-8")
    if comment_page.BROWSER is None:
        return
    for width in (900, 390):
        seen = comment_page.browse(body, place, width)
        assert not [chart for chart in seen["charts"] if "Syntax error" in chart]
        assert (seen["wider"], seen["scroll"] <= seen["width"]) == ([], True)
        comment_page.browse(body, place, width, png=place / f"comment-{width}.png")


@pytest.fixture(scope="module", name="fork")
def _fork(tmp_path_factory: pytest.TempPathFactory, tools: Toolchain) -> Iterator[Fork]:
    """A fork whose first pull request was measured, merged and published."""
    assert tools.tool("llama-quantize").exists()
    place = tmp_path_factory.mktemp("story")
    with GitHubApi(place / "github.git", repository=act.REPOSITORY) as api:
        # By size the choice does not hang on how fast this machine is today.
        fork = Fork(place, api, lambda text: calm(QUANTS.sub("", quick(text))))
        fork.begin()
        yield fork


@contextmanager
def busy() -> Iterator[None]:
    """Keep both cores busy with something else."""
    loop = [sys.executable, "-c", "while True: pass"]
    children = [subprocess.Popen(loop) for _ in range(os.cpu_count() or 2)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_a_new_quant_is_measured_reported_merged_published_and_rolled_back(fork: Fork) -> None:
    """One line in params.yaml, one comment, one required check, one line to go back."""
    before = fork.stable()
    number = fork.propose("add-q4", add("Q4_K_M"), "Add Q4_K_M")
    asked = fork.api.head_of(number)

    run = fork.measured(number)

    # Measured once, on the machine with the label, and judged elsewhere.
    assert (run.rc, run.errors) == (0, []), run.text
    assert run.jobs == dict.fromkeys(("plan", "gpu", "gate", "adopt"), "success")
    (leg,) = run.legs("gpu")
    assert (leg["host"], leg["models"]) == ("local", MODEL)
    assert f"benchmark@{MODEL}-Q4_K_M" in ran(run)
    assert f"benchmark@{MODEL}-Q8_0" not in ran(run)
    bundles = list(run.artifact("bundle-local-1").iterdir())
    assert sum(path.stat().st_size for path in bundles) < 1 << 20
    # The evidence is one commit of records on top of what was asked for.
    head = fork.api.head_of(number)
    assert fork.api.git.text("rev-parse", f"{head}^") == asked
    changed = fork.api.git.text("diff", "--name-only", asked, head).splitlines()
    assert "dvc.lock" in changed
    assert all(name == "dvc.lock" or name.startswith(f"results/{MODEL}/") for name in changed)
    assert f"results/{MODEL}/benchmark/Q4_K_M.json" in changed
    # One comment; the check on the measured commit is green.
    body = fork.comment(number)
    require_readable(body, fork.place)
    assert skeleton(body) == GOLDEN.read_text(encoding="utf-8").splitlines()
    assert fork.checks(asked)[-1] == "success"

    # The new head needs no second measurement.
    again = fork.measure(number)

    assert (again.rc, again.errors) == (0, []), again.text
    assert again.jobs == dict.fromkeys(("plan", "gate"), "success")
    assert fork.api.head_of(number) == head
    assert fork.checks(head)[-1] == "success"
    assert "Q4_K_M" in fork.comment(number)

    published = fork.merge(number)

    assert fork.stable() != before
    require_published(fork, published)
    # The ledger waits in a pull request; nothing is lost if another run comes first.
    assert fork.publish().jobs == {"plan": "success"}
    fork.merge_ledger()
    # A second run finds nothing to do: no approval is asked for.
    assert fork.publish().jobs == {"plan": "success"}

    fork.roll_back("previous", "answers `@all` in <b>French</b>\n$(touch /tmp/x)")

    assert fork.stable() == before
    (proposed,) = [n for n, p in fork.api.pulls.items() if p["head"].startswith("fleet/rollback")]
    text = fork.api.git.files(fork.api.head_of(proposed))["params.yaml"].decode()
    assert f"stable: {before}" in text
    assert fork.checks(head)[-1] == "success"
    fork.api.close_pull(proposed, merge=True)
    fork.pull()
    assert fork.publish().jobs == {"plan": "success"}
    assert fork.stable() == before


def test_what_fails_its_gate_is_rejected_and_nothing_is_published(fork: Fork) -> None:
    """The check is red, the comment says which limit, the registry stays as it is."""
    before = fork.stable()

    number = fork.propose("only-q2", only("Q2_K"), "Serve Q2_K alone")
    asked = fork.api.head_of(number)

    run = fork.measured(number)

    assert run.rc == 1
    assert run.jobs["gate"] == "failure", run.text
    assert run.errors == []
    assert run.outputs("gate", "gate/fleet")["verdict"] == "REJECT"
    assert fork.checks(asked)[-1] == "failure"
    body = fork.comment(number)
    assert "max_kld_mean_nats" in body or "divergence" in body
    assert "0.005" in body
    again = fork.measure(number)
    assert again.jobs == {"plan": "success", "gate": "failure"}
    assert fork.publish().jobs == {"plan": "success"}
    assert fork.stable() == before
    fork.api.close_pull(number)


def test_what_a_busy_machine_measured_is_invalid_and_the_comment_says_measure_again(
    fork: Fork,
) -> None:
    """Neutral in the list of checks, red at the gate, no commit, nothing published."""
    before = fork.stable()
    number = fork.propose(
        "only-q6",
        # What comes to nothing may as well do so soon.
        lambda text: only("Q6_K")(text).replace("max_minutes: 3", "max_minutes: 1"),
        "Serve Q6_K alone",
    )
    asked = fork.api.head_of(number)

    with busy():
        run = fork.measure(number)

    assert (run.rc, run.outputs("gate", "gate/fleet")["verdict"]) == (1, "INVALID"), run.text
    assert run.errors == []
    assert "adopt" not in run.jobs
    assert fork.api.head_of(number) == asked
    assert fork.checks(asked)[-1] == "neutral"
    assert re.search(r"(?i)measure|re-run", fork.comment(number).splitlines()[1])
    assert fork.publish().jobs == {"plan": "success"}
    assert fork.stable() == before
    fork.api.close_pull(number)
