"""Runs a plan in a process of its own and returns every answer: `run(plan, target, log=...)`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines import atomic, proc
from pipelines.errors import FleetError
from pipelines.load import plan as plans
from pipelines.load.dialects import Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipelines.console import Progress
    from pipelines.load.plan import Plan, Target

_FOLDER_SUFFIX = ".load"


class GeneratorError(FleetError):
    """The generator's process ended without a result that can be read."""


@dataclass(frozen=True, kw_only=True)
class Raw:
    """
    Everything that came of a run.

    Attributes:
        answers: Of the requests that count, in the order of the prompts.
        warm_up: Of those before.
        gaps_us: How often a pause of so many microseconds lay between two chunks of one answer.
        started_ns: Start of the run, on the monotonic clock.
        cpu_s: Processor time of the generator while it ran.
        after_cpu_s: The same after the run, until every answer was understood.
        unsent_count: Requests of the plan that were not sent within `max_run_s`.
        threads_count: Most threads that there were.
        late_threads_count: Arrivals that found all threads busy and waited for one.
    """

    answers: tuple[Answer, ...]
    warm_up: tuple[Answer, ...]
    gaps_us: dict[int, int]
    started_ns: int
    cpu_s: float
    after_cpu_s: float
    unsent_count: int
    threads_count: int
    late_threads_count: int


def run(plan: Plan, target: Target, *, log: Path, progress: Progress | None = None) -> Raw:
    """
    Send a plan and return what came of it; no answer is an exception.

    The plan and the result lie beside the log while it lasts, readable by nobody else.

    Raises:
        ToolError: The process died.
        GeneratorError: Its result cannot be read.
    """
    with _folder(log) as folder:
        plan_file, out = folder / "plan.json", folder / "answers.jsonl"
        plans.dump(plan, target, plan_file)
        proc.run(
            [sys.executable, "-m", "pipelines.load.worker", plan_file, out],
            log=log,
            on_line=_counter(progress.update) if progress else None,
        )
        return _result(out, plan)


@contextmanager
def _folder(log: Path) -> Iterator[Path]:
    """Make a folder for one run; what a killed run left is removed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    for old in log.parent.glob(f".{log.stem}-*{_FOLDER_SUFFIX}{atomic.PART_SUFFIX}"):
        pid = old.name.removesuffix(_FOLDER_SUFFIX + atomic.PART_SUFFIX).rpartition("-")[2]
        if pid.isdigit() and not _lives(int(pid)):
            with contextlib.suppress(OSError):
                atomic.remove(old)
    folder = log.with_name(f".{log.stem}-{os.getpid()}{_FOLDER_SUFFIX}{atomic.PART_SUFFIX}")
    atomic.remove(folder)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            atomic.remove(folder)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _counter(update: Callable[[float], None]) -> Callable[[str], None]:
    """Pass on the number of requests that have ended."""

    def on_line(line: str) -> None:
        if line.isdigit():
            update(int(line))

    return on_line


def _result(out: Path, plan: Plan) -> Raw:
    answers: list[Answer] = []
    last: dict[str, Any] = {}
    try:
        with out.open(encoding="utf-8") as file:
            for line in file:
                value = json.loads(line)
                if "run" in value:
                    last = value
                    continue
                for name in ("stamps_ns", "texts"):
                    value[name] = tuple(value[name])
                value["calls"] = tuple((name, text) for name, text in value["calls"])
                answers.append(Answer(**value))
        facts = last["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GeneratorError(f"The load generator left no result: {error}.") from error
    answers.sort(key=lambda answer: answer.index)
    warm_up = plan.warm_up_requests
    return Raw(
        answers=tuple(each for each in answers if each.index >= warm_up),
        warm_up=tuple(each for each in answers if each.index < warm_up),
        gaps_us={int(length): count for length, count in last["gaps_us"].items()},
        started_ns=facts["started_ns"],
        cpu_s=facts["cpu_s"],
        after_cpu_s=facts["after_cpu_s"],
        unsent_count=facts["unsent_count"],
        threads_count=facts["threads_count"],
        late_threads_count=facts["late_threads_count"],
    )
