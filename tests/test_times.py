"""How long stages took, kept from run to run for the next plan, and what failed, for the gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipelines import live, times
from pipelines.layout import Layout

if TYPE_CHECKING:
    from pathlib import Path


def _run(at: Layout, *lines: str, wall_s: float = 2.0) -> None:
    """Let DVC say some lines, `wall_s` apart."""
    board = live.Board(["fetch@m", "convert@m", "verify@m"])
    now = 0.0
    for line in lines:
        board.read(line, now)
        now += wall_s
    board.end(now)
    times.note(at, board.stages.values())


RUNS = ("Running stage 'fetch@m':", "Updating lock file 'dvc.lock'")


def test_what_ran_is_kept_and_what_did_not_keeps_its_older_time(tmp_path: Path) -> None:
    """A stage that was cached took no time that a plan could count on."""
    at = Layout(tmp_path)
    _run(at, *RUNS)
    _run(at, "Stage 'fetch@m' didn't change, skipping", "Running stage 'convert@m':", wall_s=3.0)

    assert times.read(at).wall_s == {"fetch@m": pytest.approx(2.0), "convert@m": pytest.approx(3.0)}
    assert times.read(at).failed == {}


def test_a_failure_is_kept_until_the_stage_succeeds(tmp_path: Path) -> None:
    """The cause is the stage's own word, without anything that a log would obey."""
    at = Layout(tmp_path)
    _run(
        at,
        "Running stage 'fetch@m':",
        "error: ::error::no room",
        "WARNING: failed to run: python -m pipelines fetch m, exited with 7",
        "ERROR: failed to reproduce 'fetch@m'",
    )

    told = times.read(at).failed["fetch@m"]
    assert "no room" in told
    assert "::error::" not in told
    assert "fetch@m" not in times.read(at).wall_s
    assert times.read(at).codes == {"fetch@m": 7}

    _run(at, *RUNS)

    assert (times.read(at).failed, times.read(at).codes) == ({}, {})


def test_a_file_that_is_none_is_begun_anew(tmp_path: Path) -> None:
    """Times are worth nothing that would stop a run."""
    at = Layout(tmp_path)
    times.path(at).parent.mkdir()
    times.path(at).write_text("{")

    _run(at, *RUNS)

    assert list(times.read(at).wall_s) == ["fetch@m"]
