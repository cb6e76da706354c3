"""What people and runners see."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from pipelines import console
from pipelines.errors import Problem

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

# Port of what actions/runner looks for (src/Runner.Common/ActionCommand.cs): `::name ...::` at the
# start of a line, after white space, and `##[name ...]` anywhere.
_COMMAND_V2 = re.compile(r"^\s*::[^:]*::", re.MULTILINE)
_COMMAND_V1 = re.compile(r"##\[[^\]]*\]")
_PIECES = st.sampled_from(
    ["::", "##[", "]", "set-output", "error", " name=x", ":", "#", "[", "\x1b[31m", "\x1b", "\n",
     "\r", "\t", "\u200b", "\x00", "a", "\u2028", "\x9b"]
)  # fmt: skip


@given(st.lists(st.one_of(_PIECES, st.text(max_size=3)), max_size=30).map("".join))
def test_no_text_from_outside_is_a_runner_command(text: str) -> None:
    """Whatever a tool or a model says, the Actions runner finds no command in it."""
    shown = console.clean(text)

    assert not _COMMAND_V2.search(shown)
    assert not _COMMAND_V1.search(shown)
    assert "\x1b" not in shown


def test_ordinary_text_is_left_alone() -> None:
    """Text without anything dangerous is shown as it is."""
    text = "llama_model_loader: - kv 3: general.name str = Qwen3 8B – ü 漢字"

    assert console.clean(text) == text


def test_a_problem_is_an_annotation_on_its_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under GitHub Actions an error names file, line and column, so that it shows in the diff."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")

    console.error("bad", where=Problem("params.yaml", 3, 7, "bad"))

    lines = capsys.readouterr().err.splitlines()
    assert lines == ["::error file=params.yaml,line=3,col=7::bad", "params.yaml:3:7: bad"]


def test_an_annotation_cannot_be_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line end inside a message does not start a second command."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")

    console.warn("first\n::set-output name=x::y")

    assert capsys.readouterr().err == "::warning::first%0A::set-output name=x::y\n"


def test_an_error_is_no_command_below_its_annotation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The readable copy of an error does not run what its annotation has encoded."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")

    console.error("first\n::set-output name=x::y")

    annotation, *copy = capsys.readouterr().err.splitlines()
    assert annotation.startswith("::error::first%0A")
    assert not any(_COMMAND_V2.search(line) for line in copy)


def test_progress_below_repro_is_a_line_of_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage tells `fleet repro` how far it is by appending JSON to the file that it names."""
    sink = tmp_path / "progress.jsonl"
    monkeypatch.setenv(console.PROGRESS_FILE_ENV, str(sink))
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_UPDATES", 0)

    with console.Progress("convert", total=4, unit="files") as progress:
        progress.update(1)

    texts = [json.loads(line)["text"] for line in sink.read_text().splitlines()]
    assert texts[-1] == "convert 25 % (1 of 4 files), 0 s so far"


def test_progress_tells_the_time_that_passed_from_the_time_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both times stand beside each other in words, so that nobody adds them or mixes them up."""
    sink = tmp_path / "progress.jsonl"
    monkeypatch.setenv(console.PROGRESS_FILE_ENV, str(sink))
    clock = iter([100.0, 100.0, 115.0])
    monkeypatch.setattr("pipelines.console.time.monotonic", lambda: next(clock, 115.0))

    with console.Progress("quantize", total=200) as progress:
        progress.update(50, "blk.3")

    texts = [json.loads(line)["text"] for line in sink.read_text().splitlines()]
    assert texts == ["quantize 25 %, 15 s so far, about 45 s left, blk.3"]


def test_a_plain_log_is_not_flooded(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal a progress line is repeated every 15 s, not for every chunk."""
    with console.Progress("hash", total=1000) as progress:
        for done in range(1000):
            progress.update(done)

    assert capsys.readouterr().err == ""
