"""What DVC and the stages print, read into one line a stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines import live

FAILING = """\
Running stage 'pipelines/dvc.yaml:machine':
> python -m pipelines machine
Stage 'fetch@m' didn't change, skipping
Stage 'convert@m' is cached - skipping run, checking out outputs
Updating lock file 'dvc.lock'
Running stage 'quantize@m-Q4_0':
> python -m pipelines quantize m-Q4_0
warning: two tensors fall back
error: llama-quantize died of SIGSEGV.
    the last line of the tool
  log:  work/logs/quantize-m-Q4_0.log
  next: look at it
WARNING: failed to run: python -m pipelines quantize m-Q4_0, exited with 4
WARNING: Stages 'benchmark@m-Q4_0' and 'choose@m' will be skipped due to this failure
Running stage 'quantize@m-Q8_0':
> python -m pipelines quantize m-Q8_0
Updating lock file 'dvc.lock'
ERROR: failed to reproduce 'quantize@m-Q4_0'
"""
NAMES = (
    "machine", "fetch@m", "convert@m", "quantize@m-Q4_0", "benchmark@m-Q4_0", "quantize@m-Q8_0",
    "benchmark@m-Q8_0", "choose@m",
)  # fmt: skip


def played(text: str, names: tuple[str, ...] = NAMES) -> tuple[live.Board, list[live.Event]]:
    """Feed a board with output, a line a second."""
    board = live.Board(names, log_of=lambda name: Path("logs", f"{name}.log"))
    events = []
    for now, line in enumerate(text.splitlines()):
        events += board.read(line, now)
    events += board.end(len(text.splitlines()))
    return board, events


def states(board: live.Board) -> dict[str, str]:
    """State of every stage."""
    return {stage.name: stage.state for stage in board.stages.values()}


def test_every_stage_gets_the_state_that_dvc_gave_it() -> None:
    """Done, unchanged, cached, failed, skipped and waiting are told apart."""
    board, _ = played(FAILING)

    assert states(board) == {
        "machine": "done",
        "fetch@m": "unchanged",
        "convert@m": "cached",
        "quantize@m-Q4_0": "failed",
        "benchmark@m-Q4_0": "skipped",
        "quantize@m-Q8_0": "done",
        "benchmark@m-Q8_0": "waiting",
        "choose@m": "skipped",
    }
    assert board.stages["quantize@m-Q8_0"].wall_s == 2


def test_failure_carries_the_words_the_code_and_the_log_of_the_stage() -> None:
    """The stage's own error is the cause; what follows it is kept for the end."""
    board, events = played(FAILING)
    failed = board.stages["quantize@m-Q4_0"]

    assert failed.cause == "llama-quantize died of SIGSEGV."
    assert failed.code == 4
    assert failed.errors[-1] == "  next: look at it"
    assert board.stages["choose@m"].cause == "needs quantize@m-Q4_0"
    assert [event.warning for event in events if event.warning] == ["two tensors fall back"]


def test_table_names_the_log_once_and_counts_everything() -> None:
    """The last table shows what ran or failed, the log, and the counts."""
    board, _ = played(FAILING)

    lines = live.table(board, 61)

    assert sum("work/logs/quantize-m-Q4_0.log" in line for line in lines) == 1
    assert not any("fetch@m" in line for line in lines)
    assert (
        lines[-1] == "2 done, 1 cached, 1 unchanged, 1 failed, 2 skipped, 1 waiting in 1 min 01 s"
    )


def test_crash_without_a_word_is_shown_by_its_last_line() -> None:
    """A traceback ends with the line that says what happened; that line is the cause."""
    board, _ = played(
        "Running stage 'a':\n> x\nTraceback (most recent call last):\nValueError: bad\n"
        "WARNING: failed to run: x, exited with 1\nERROR: failed to reproduce 'a'\n",
        ("a",),
    )

    assert board.stages["a"].cause == "ValueError: bad (exit code 1)"


def test_last_word_of_dvc_beats_what_the_lines_seemed_to_say() -> None:
    """A complaint of a stage that DVC does not call failed is no failure, and the reverse."""
    board, _ = played(
        "Running stage 'a':\n> x\nWARNING: a library talks\nRunning stage 'b':\n> y\n"
        "WARNING: output 'o' does not exist\nWARNING: [Errno 2] No such file: 'i'\n"
        "WARNING: Stage 'd' will be skipped due to this failure\n"
        "ERROR: failed to reproduce stages: 'b' and 'c'\n",
        ("a", "b", "c", "d"),
    )

    assert states(board) == {"a": "done", "b": "failed", "c": "failed", "d": "skipped"}
    assert board.stages["b"].cause == "output 'o' does not exist"
    assert "No such file" in board.stages["c"].cause


def test_stopped_stage_is_not_shown_as_done() -> None:
    """A run that was stopped leaves its stage as failed, not as done."""
    board = live.Board(("a",))
    board.read("Running stage 'a':", 0)

    board.cancel(5)

    assert board.stages["a"].text(9) == "failed after 5.0 s: stopped"


def test_progress_belongs_to_the_stage_that_runs() -> None:
    """Progress is shown beside the running stage, and nowhere when none runs."""
    board = live.Board(("a", "b"))
    board.show_progress("too early")
    board.read("Running stage 'a':", 0)
    board.show_progress("tensor 7 of 9")

    assert board.stages["a"].text(12) == "running for 12 s  tensor 7 of 9"
    assert board.stages["b"].text(12) == "waiting"


@pytest.mark.parametrize("height", [6, 12, 50])
def test_large_fleet_fits_the_terminal(height: int) -> None:
    """However many stages there are, the lines fit; what runs and what failed is among them."""
    names = tuple(f"quantize@m-{number}" for number in range(100))
    board = live.Board(names)
    for number in range(40):
        board.read(f"Running stage '{names[number]}':", number)
    board.read("WARNING: failed to run: x, exited with 4", 40)
    board.read(f"Running stage '{names[40]}':", 41)

    lines = [text for text, _ in live.rows(board, height=height, now=42)]

    assert len(lines) <= height
    assert any(line.startswith(f"✗ {names[39]}") for line in lines)
    assert any(line.startswith(f"▸ {names[40]}") for line in lines)
    assert lines[-1].startswith("  and ")


def test_progress_file_is_read_by_whole_lines(tmp_path: Path) -> None:
    """Only whole lines count, the newest wins, and what a tool put in is made harmless."""
    path = tmp_path / "progress.jsonl"
    tail = live.Tail(path)

    assert tail.newest() == ""
    path.write_text('{"text": "1 of 9"}\n{"text": "2 of 9"}\n{"text": "3 o')
    assert tail.newest() == "2 of 9"
    with path.open("a") as file:
        file.write('f 9"}\n')
    assert tail.newest() == "3 of 9"
    assert tail.newest() == ""
    with path.open("a") as file:
        file.write(json.dumps({"text": "##[set-output name=x]\x1b[2J"}) + "\nnot json\n")
    assert tail.newest() == ""
    with path.open("a") as file:
        file.write(json.dumps({"text": "##[set-output name=x]\x1b[2J"}) + "\n")
    assert "##[" not in tail.newest()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.949, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    """Seconds, minutes and hours, with as many digits as matter."""
    assert live.duration(seconds) == text


def test_plain_log_has_a_heartbeat(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A log that nobody redraws still says that a long stage is alive, and how far it is."""
    progress = tmp_path / "progress.jsonl"
    progress.write_text('{"text": "the last words of another stage"}\n')
    board = live.Board(("a",))
    text = ""
    with live.Plain(board, live.Tail(progress), heartbeat_s=0.01) as view:
        view.tell(board.read("Running stage 'a':", 0))
        with progress.open("a") as file:
            file.write('{"text": "chunk 3 of 8"}\n')
        while "chunk 3 of 8" not in text:
            text += capsys.readouterr().err

    assert "▸ a" in text
    assert "another stage" not in text
    assert "a running for" in text
