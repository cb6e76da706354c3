"""
The only place that talks to people: a terminal, a plain log, or GitHub Actions.

stderr narrates, stdout carries results. Text that comes from a tool or a model is `clean`ed before
it is shown: the Actions runner obeys `::command::` at the start of a line and `##[command]`
anywhere in it, on both streams, and llama.cpp prints strings of the model that it loads.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pipelines.errors import Problem

# Colour codes, cursor moves, and everything else that a terminal would act on.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)
_COMMANDS = re.compile(r":(?=:)|#(?=#\[)")
_COLOURS = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "dim": "2", "bold": "1"}
_SECONDS_BETWEEN_UPDATES = 0.2
_SECONDS_BETWEEN_PLAIN_LINES = 15.0

PROGRESS_FILE_ENV = "GGUF_FLEET_PROGRESS"


def in_actions() -> bool:
    """Tell whether a GitHub Actions runner reads our output."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def is_terminal() -> bool:
    """Tell whether a person watches stderr live."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not in_actions()


def clean(text: str) -> str:
    """
    Make text from outside safe to show: no escapes, no control characters, no runner command.

    A zero-width space is put into `::` and `##[`, so that the runner's parser, which looks for
    exactly these, finds nothing while people read the same text.
    """
    text = _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\t", " ")))
    return _COMMANDS.sub(lambda found: f"{found[0]}\u200b", text)


def paint(text: str, colour: str) -> str:
    """Colour `text` where a terminal shows it and the user did not set NO_COLOR."""
    if not is_terminal() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def info(text: str) -> None:
    """Tell something that a reader of the log wants to know."""
    _say(text)


def step(title: str) -> None:
    """Announce what begins now."""
    _say(paint(f"▸ {title}", "bold"))


def _annotate(kind: str, text: str, where: Problem | None) -> None:
    """Write an Actions annotation; its own syntax wants % and line ends encoded."""
    escaped = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    place = f" file={where.file},line={where.line},col={where.column}" if where else ""
    _say(f"::{kind}{place}::{escaped}")


def notice(text: str) -> None:
    """Tell something that belongs to the result of a job and asks for nothing."""
    if in_actions():
        _annotate("notice", text, None)
    else:
        _say(text)


def warn(text: str) -> None:
    """Tell something that the operator should look at; the work goes on."""
    if in_actions():
        _annotate("warning", text, None)
    else:
        _say(paint("warning: ", "yellow") + text)


def error(text: str, *, where: Problem | None = None) -> None:
    """Tell why the work stops; under Actions as an annotation, on its line if it has one."""
    if in_actions():
        _annotate("error", text, where)
        # The annotation is encoded; this line, or one inside it, could still be a command.
        text = clean(text)
    _say(paint("error: ", "red") + text if where is None else str(where))


def can_ask() -> bool:
    """Tell whether a person sits at both ends: sees what is asked, and types the answer."""
    return is_terminal() and sys.stdin.isatty()


def ask(question: str, default: str = "") -> str:
    """
    Ask one line of whoever sits at the terminal; see `can_ask`.

    Args:
        question: Without a mark at its end.
        default: What an empty line means.

    Raises:
        KeyboardInterrupt: The input was closed (Ctrl-D).
    """
    sys.stderr.write(f"{paint(question, 'bold')}{f' [{default}]' if default else ''}: ")
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise KeyboardInterrupt
    return line.strip() or default


class Progress:
    """
    One line about work that takes more than two seconds.

    In a terminal it is redrawn in place; in a plain log it is repeated every 15 s. When
    `GGUF_FLEET_PROGRESS` names a file, each update is appended there as a line of JSON, which is
    how `fleet repro` shows what the stages below DVC are doing.
    """

    def __init__(self, label: str, *, total: float | None = None, unit: str = "") -> None:
        """Begin; `total` in `unit`s makes it a percentage, without it only elapsed time shows."""
        self.label = label
        self.total = total
        self.unit = unit
        self._started = time.monotonic()
        self._last_shown = self._started if not is_terminal() else 0.0
        self._line_open = False

    def __enter__(self) -> Self:
        """Start."""
        self.update(0)
        return self

    def __exit__(self, *_: object) -> None:
        """End the line, so that what follows starts on its own."""
        if self._line_open:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def update(self, done: float, detail: str = "") -> None:
        """Show that `done` of `total` is reached; cheap enough to be called for every chunk."""
        now = time.monotonic()
        sink = os.environ.get(PROGRESS_FILE_ENV)
        pause = _SECONDS_BETWEEN_UPDATES if sink or is_terminal() else _SECONDS_BETWEEN_PLAIN_LINES
        if now - self._last_shown < pause:
            return
        self._last_shown = now
        text = self._text(done, now - self._started, detail)
        if sink:
            # A sink that is gone or full must not cost an hour of work.
            with (
                contextlib.suppress(OSError),
                open(sink, "a", encoding="utf-8") as file,  # noqa: PTH123 - hot path, no Path
            ):
                file.write(json.dumps({"text": text, "pid": os.getpid()}) + "\n")
        elif is_terminal():
            sys.stderr.write(f"\r\x1b[K{paint(text, 'dim')}")
            sys.stderr.flush()
            self._line_open = True
        else:
            _say(text)

    def _text(self, done: float, elapsed_s: float, detail: str) -> str:
        """Compose `label 42 % (3 of 7 files), 12 s so far, about 16 s left, detail`."""
        label = clean(self.label)
        times = [f"{elapsed_s:.0f} s so far"]
        if self.total:
            share = min(done / self.total, 1.0)
            label += f" {share * 100:.0f} %"
            if self.unit:
                label += f" ({done:,.0f} of {self.total:,.0f} {self.unit})"
            if 0.02 < share < 1 and elapsed_s > 2:  # noqa: PLR2004 - a guess from less is noise
                times.append(f"about {elapsed_s * (1 - share) / share:.0f} s left")
        return ", ".join([label, *times, *([clean(detail)] if detail else [])])


def out(text: str) -> None:
    """Write a result to stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
