"""
What `fleet repro` shows: the output of DVC and of the stages below it, read into one line a stage.

`Board` is the state; each line of output changes it, and nothing else does. `Plain` and `Terminal`
show it. DVC prints its own messages and the output of its stages into one stream; the messages
read here are those of dvc 3.67 (dvc/stage/run.py, dvc/stage/cache.py, dvc/repo/reproduce.py).
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, Self

from pipelines import console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from types import TracebackType

    from rich.console import Group
    from rich.live import Live

State = Literal["waiting", "running", "unchanged", "cached", "done", "failed", "skipped"]

_RUNNING = re.compile(r"^Running stage '(.+)':$")
_UNCHANGED = re.compile(r"^(?:Stage )?'(.+)' didn't change, skipping$")
_CACHED = re.compile(r"^Stage '(.+)' is cached - skipping run, checking out outputs$")
_LOCKED = re.compile(r"^(?:Generating|Updating) lock file '")
_EXITED = re.compile(r"^WARNING: failed to run: .*, exited with (-?\d+)$")
_NO_OUTPUT = re.compile(r"^WARNING: (outputs? '.+' (?:does|do) not exist)$")
_SKIPPED = re.compile(r"^WARNING: Stages? ('.+') will be skipped due to this failure$")
_FAILED = re.compile(r"^ERROR: failed to reproduce(?: stages:)? ('.+')$")
_QUOTED = re.compile(r"'([^']+)'")

_KEPT_LINES = 12
_HEARTBEAT_S = 30.0
_FRAMES_PER_S = 4
_RECENT = 3
_SYMBOLS: dict[State, str] = {
    "waiting": "·",
    "running": "▸",
    "unchanged": "=",
    "cached": "=",
    "done": "✓",
    "failed": "✗",
    "skipped": "-",
}
_STYLES: dict[State, str] = {
    "waiting": "dim",
    "running": "bold",
    "unchanged": "dim",
    "cached": "dim",
    "done": "green",
    "failed": "red",
    "skipped": "yellow",
}


@dataclass(eq=False)
class StageLine:
    """One stage: where it is, since when, and what it said."""

    name: str
    state: State = "waiting"
    began_s: float = 0.0
    wall_s: float = 0.0
    progress: str = ""
    cause: str = ""
    # The last complaint of DVC about it; a failure only if DVC says so at its end.
    warning: str = ""
    code: int | None = None
    log: Path | None = None
    errors: list[str] = field(default_factory=list)
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))

    def text(self, now: float) -> str:
        """Say the state in a few words."""
        match self.state:
            case "running":
                return f"running for {duration(now - self.began_s)}  {self.progress}".rstrip()
            case "done" | "cached":
                return f"{self.state} in {duration(self.wall_s)}"
            case "failed":
                return f"failed after {duration(self.wall_s)}: {self.cause}"
            case "skipped":
                return f"skipped: {self.cause}"
            case "waiting" | "unchanged":
                return self.state


@dataclass(frozen=True)
class Event:
    """Something that a plain log says at once: a stage changed its state, or warned."""

    stage: StageLine
    warning: str = ""


def duration(seconds: float) -> str:
    """Write a duration as people say it: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 9.95:  # noqa: PLR2004 - from here on it would read "10.0 s"
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004 - seconds in a minute
        return f"{whole} s"
    if whole < 3600:  # noqa: PLR2004 - seconds in an hour
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Board:
    """All stages of one run in the order in which they are expected, updated line by line."""

    def __init__(
        self, names: Iterable[str], *, log_of: Callable[[str], Path | None] = lambda _: None
    ) -> None:
        """
        Begin with every stage waiting.

        Args:
            names: Stages as DVC names them, e.g. `quantize@tiny-llama-Q4_K_M`.
            log_of: Finds the log of a stage, for the line about its failure.
        """
        self.stages = {name: StageLine(name) for name in names}
        # What DVC says while no stage runs: the reason if it cannot start at all.
        self.outside: deque[str] = deque(maxlen=_KEPT_LINES)
        self._log_of = log_of
        self._current: StageLine | None = None
        self._warning = ""
        # Failures of stages that DVC has not named yet: it names them in its last line.
        self._unplaced: list[str] = []
        self.lock = threading.RLock()
        self._messages: tuple[tuple[re.Pattern[str], Callable[[str, float], list[Event]]], ...] = (
            (_RUNNING, self._on_running),
            (_CACHED, self._on_cached),
            (_UNCHANGED, self._on_unchanged),
            (_LOCKED, self._on_locked),
            (_EXITED, self._on_exited),
            (_NO_OUTPUT, self._on_no_output),
            (_SKIPPED, self._on_skipped),
            (_FAILED, self._on_failed),
        )

    def read(self, line: str, now: float) -> list[Event]:
        """Take one line of output; return what changed."""
        with self.lock:
            for pattern, take in self._messages:
                if match := pattern.match(line):
                    return take(match[1] if match.re.groups else "", now)
            return self._note(line)

    def show_progress(self, text: str) -> None:
        """Take the progress of the stage that is running."""
        with self.lock:
            if self._current is not None and text:
                self._current.progress = text

    def end(self, now: float) -> list[Event]:
        """Take the end of DVC."""
        with self.lock:
            return self._close(now)

    def cancel(self, now: float) -> None:
        """Take the news that the run was stopped: what ran did not finish."""
        with self.lock:
            if self._current is not None and self._current.state == "running":
                self._current.state = "failed"
                self._current.cause = "stopped"
                self._current.wall_s = now - self._current.began_s
            self._current = None

    def running(self) -> StageLine | None:
        """Return the stage that runs now."""
        current = self._current
        return current if current is not None and current.state == "running" else None

    def of(self, *states: State) -> list[StageLine]:
        """Return the stages in one of these states."""
        return [stage for stage in self.stages.values() if stage.state in states]

    # --- what DVC says

    def _on_running(self, address: str, now: float) -> list[Event]:
        return [*self._close(now), self._open(address, "running", now)]

    def _on_cached(self, address: str, now: float) -> list[Event]:
        return [*self._close(now), self._open(address, "cached", now)]

    def _on_unchanged(self, address: str, now: float) -> list[Event]:
        events = [*self._close(now), self._open(address, "unchanged", now)]
        self._current = None
        return events

    def _on_locked(self, _: str, now: float) -> list[Event]:
        """DVC writes the lock when a stage succeeded, if its entry changed."""
        return self._close(now)

    def _on_exited(self, code: str, now: float) -> list[Event]:
        cause = _cause(self._current, int(code)) if self._current else f"exit code {code}"
        return self._fail_current(cause, now, int(code))

    def _on_no_output(self, complaint: str, now: float) -> list[Event]:
        return self._fail_current(complaint, now)

    def _on_skipped(self, quoted: str, now: float) -> list[Event]:
        """DVC skips what depends on a failure; a complaint just before this line is its cause."""
        events = []
        if self._warning and self._current is not None:
            events = self._fail_current(self._warning, now)
        failed = self.of("failed")
        cause = f"needs {failed[-1].name}" if failed else "needs a stage that failed"
        for skipped in (self._named(address) for address in _QUOTED.findall(quoted)):
            if skipped.state == "waiting":
                skipped.state = "skipped"
                skipped.cause = cause
                events.append(Event(skipped))
        return events

    def _on_failed(self, quoted: str, now: float) -> list[Event]:
        """DVC's last word on which stages failed; it beats what the lines before seemed to say."""
        events = self._close(now)
        failed = [self._named(address) for address in _QUOTED.findall(quoted)]
        for stage in self.of("failed"):
            if stage not in failed:
                self._unplaced.append(stage.cause)
                stage.state = "done"
        for stage in failed:
            if stage.state != "failed":
                events.append(self._fail(stage, stage.warning or self._unplaced_cause()))
        return events

    # --- transitions

    def _named(self, address: str) -> StageLine:
        # A stage of another file is named `pipelines/dvc.yaml:machine`.
        name = address.rpartition(":")[2]
        return self.stages.setdefault(name, StageLine(name))

    def _unplaced_cause(self) -> str:
        if self._unplaced:
            return self._unplaced.pop(0)
        said = [stage.warning for stage in self.of("done", "cached") if stage.warning]
        return said[0] if said else "DVC could not run it"

    def _open(self, address: str, state: State, now: float) -> Event:
        stage = self._named(address)
        stage.state = state
        stage.began_s = now
        self._current = stage
        self._warning = ""
        return Event(stage)

    def _close(self, now: float) -> list[Event]:
        """End the current stage as DVC does when it goes on without a complaint."""
        stage, self._current = self._current, None
        warning, self._warning = self._warning, ""
        if stage is None:
            if warning:
                self._unplaced.append(warning)
            return []
        stage.warning = warning
        stage.wall_s = now - stage.began_s
        if stage.state == "running":
            stage.state = "done"
        return [Event(stage)]

    def _fail_current(self, cause: str, now: float, code: int | None = None) -> list[Event]:
        stage, self._current = self._current, None
        if stage is None:
            self._unplaced.append(cause)
            return []
        stage.wall_s = now - stage.began_s
        return [self._fail(stage, cause, code)]

    def _fail(self, stage: StageLine, cause: str, code: int | None = None) -> Event:
        stage.state = "failed"
        stage.cause = cause
        stage.code = code
        stage.log = self._log_of(stage.name)
        self._warning = ""
        return Event(stage)

    def _note(self, line: str) -> list[Event]:
        """Keep a line of a stage, or of DVC outside of stages."""
        stage = self._current
        if line.startswith("WARNING: "):
            # The first complaint is about the stage that ran last, a second about the next one,
            # which DVC could not even start.
            if self._warning:
                self._unplaced.append(line.removeprefix("WARNING: "))
            else:
                self._warning = line.removeprefix("WARNING: ")
        if stage is None:
            self.outside.append(line)
            return []
        if line.startswith("> ") and not stage.last_lines:
            return []
        stage.last_lines.append(line)
        if line.startswith("warning: "):
            return [Event(stage, warning=line.removeprefix("warning: "))]
        if line.startswith("error: "):
            stage.errors = [line.removeprefix("error: ")]
        elif stage.errors and len(stage.errors) < _KEPT_LINES:
            stage.errors.append(line)
        return []


def _cause(stage: StageLine, code: int) -> str:
    """Return the stage's own word for its failure, else the last line that it printed."""
    if stage.errors:
        return stage.errors[0]
    if stage.last_lines:
        return f"{stage.last_lines[-1]} (exit code {code})"
    return f"exit code {code}"


class Tail:
    """The newest line of a growing file of JSON lines that stages append their progress to."""

    def __init__(self, path: Path) -> None:
        """Begin at the start of a file, which may not exist yet."""
        self._path = path
        self._offset = 0

    def newest(self) -> str:
        """Return the text of the last whole line that was added since the last call, or nothing."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return ""
        whole, _, _ = data.rpartition(b"\n")
        if not whole:
            return ""
        self._offset += len(whole) + 1
        try:
            return console.clean(str(json.loads(whole.rpartition(b"\n")[2])["text"]))
        except (ValueError, KeyError, TypeError):
            return ""


# --- what people see --------------------------------------------------------------------------


class View(Protocol):
    """A way of showing a board, alive between `__enter__` and `__exit__`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...

    def tell(self, events: list[Event]) -> None:
        """Take what changed."""


def view(board: Board, progress: Tail) -> View:
    """Return the view that fits whoever reads stderr."""
    return Terminal(board, progress) if console.is_terminal() else Plain(board, progress)


class Plain:
    """Lines for a log: the start and the end of each stage, and a heartbeat every 30 s."""

    def __init__(self, board: Board, progress: Tail, *, heartbeat_s: float = _HEARTBEAT_S) -> None:
        """Show `board`; `progress` adds what the running stage says about itself."""
        self._board = board
        self._progress = progress
        self._heartbeat_s = heartbeat_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        """Start the heartbeat."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the heartbeat."""
        self._ended.set()
        self._thread.join()

    def tell(self, events: list[Event]) -> None:
        """Print what changed; unchanged stages are only counted, in the table at the end."""
        for event in events:
            stage = event.stage
            if event.warning:
                console.warn(f"{stage.name}: {event.warning}")
            elif stage.state == "running":
                self._progress.newest()  # the last words of the stage before
                console.step(stage.name)
            elif stage.state == "failed":
                console.error(f"{stage.name} {stage.text(0.0)}")
            elif stage.state in {"done", "skipped"} or (stage.state == "cached" and stage.wall_s):
                console.info(f"  {stage.name} {stage.text(0.0)}")

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat_s):
            self._board.show_progress(self._progress.newest())
            stage = self._board.running()
            if stage is not None:
                console.info(f"  {stage.name} {stage.text(time.monotonic())}")


class Terminal:
    """A line for each stage, redrawn in place; what a person must not miss scrolls above it."""

    def __init__(self, board: Board, progress: Tail) -> None:
        """Show `board`; `progress` adds what the running stage says about itself."""
        self._board = board
        self._progress = progress
        self._live: Live | None = None

    def __enter__(self) -> Self:
        """Take the bottom of the terminal."""
        from rich.console import Console  # noqa: PLC0415 - 60 ms that only a person waits for
        from rich.live import Live  # noqa: PLC0415 - the same

        self._live = Live(
            console=Console(stderr=True, highlight=False),
            get_renderable=self._render,
            refresh_per_second=_FRAMES_PER_S,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the terminal back; the table at the end says the same for good."""
        if self._live is not None:
            self._live.stop()

    def tell(self, events: list[Event]) -> None:
        """Print warnings and failures above the lines."""
        from rich.text import Text  # noqa: PLC0415 - loaded already

        for event in events:
            if event.stage.state == "running" and not event.warning:
                self._progress.newest()  # the last words of the stage before
            if self._live is None:
                continue
            if event.warning:
                above = Text(f"warning: {event.stage.name}: {event.warning}", style="yellow")
                self._live.console.print(above)
            elif event.stage.state == "failed":
                above = Text(f"error: {event.stage.name} {event.stage.text(0.0)}", style="red")
                self._live.console.print(above)

    def _render(self) -> Group:
        from rich.console import Group  # noqa: PLC0415 - loaded already
        from rich.text import Text  # noqa: PLC0415 - the same

        self._board.show_progress(self._progress.newest())
        height = self._live.console.size.height if self._live is not None else _KEPT_LINES
        lines = rows(self._board, height=height - 1, now=time.monotonic())
        return Group(
            *(Text(text, style=style, no_wrap=True, overflow="ellipsis") for text, style in lines)
        )


def rows(board: Board, *, height: int, now: float) -> list[tuple[str, str]]:
    """
    Return (text, style) of the lines of a terminal, at most `height` of them.

    When there are more stages than lines: what runs and what failed, the last that ended, the
    next that wait, and a count of the others.
    """
    with board.lock:
        stages = list(board.stages.values())
        shown = stages if len(stages) <= height else _window(board, stages, height - 1)
        width = max((len(stage.name) for stage in shown), default=0)
        lines = [
            (
                f"{_SYMBOLS[stage.state]} {stage.name:<{width}}  {stage.text(now)}",
                _STYLES[stage.state],
            )
            for stage in shown
        ]
        if len(shown) < len(stages):
            rest = [stage for stage in stages if stage not in shown]
            lines.append((f"  and {counts(rest)}", "dim"))
        return lines


def _window(board: Board, stages: list[StageLine], height: int) -> list[StageLine]:
    wanted = [*board.of("running"), *board.of("failed")][:height]
    ended = sorted(board.of("done", "cached"), key=lambda stage: stage.began_s + stage.wall_s)
    for stage in [*ended[-_RECENT:], *board.of("waiting"), *board.of("unchanged", "skipped")]:
        if len(wanted) < height:
            wanted.append(stage)
    return [stage for stage in stages if stage in wanted]


def counts(stages: list[StageLine]) -> str:
    """Count stages by state: `3 done, 12 unchanged, 1 failed`."""
    order: tuple[State, ...] = (
        "running", "done", "cached", "unchanged", "failed", "skipped", "waiting",
    )  # fmt: skip
    tally = [(sum(stage.state == state for stage in stages), state) for state in order]
    return ", ".join(f"{count} {state}" for count, state in tally if count) or "no stages"


def table(board: Board, wall_s: float) -> list[str]:
    """Return the lines that close a run: what ran or failed, one a stage, then the counts."""
    told = [
        stage for stage in board.stages.values() if stage.state in {"done", "failed", "skipped"}
    ]
    width = max((len(stage.name) for stage in told), default=0)
    lines = []
    for stage in told:
        symbol = console.paint(_SYMBOLS[stage.state], _STYLES[stage.state])
        lines.append(f"{symbol} {stage.name:<{width}}  {stage.text(0.0)}")
        if stage.state == "failed":
            lines += [f"    {line}" for line in stage.errors[1:]]
            if stage.log is not None and not any(str(stage.log) in line for line in stage.errors):
                lines.append(f"    log:  {stage.log}")
    return [*lines, f"{counts(list(board.stages.values()))} in {duration(wall_s)}"]
