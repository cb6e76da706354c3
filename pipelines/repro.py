"""
`fleet repro`: `dvc repro --keep-going`, with what an operator needs around it.

Before: the declaration is checked, what a kill left is repaired, what is no longer declared is
retired, the disk is measured, INVALID measurements are withdrawn, the toolchain is built. During:
one line for each stage. After: a table, and the report, also when a model failed, so that the
others are seen.

DVC and everything below it end with us: on Ctrl-C or SIGTERM within 5 s by their process group
and by the mark in their environment; on `kill -9` by PR_SET_PDEATHSIG and the watchdog of
`pipelines.orphans`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import atomic, console, live, orphans, proc, repair, runner, times, wording
from pipelines.ci_records import MEASURING
from pipelines.errors import FleetError, MachineError, ParamsError, ToolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import FrameType

    from pipelines.layout import Layout
    from pipelines.params import Declaration

# A shell tells by 128 + number that a signal ended a program.
_SIGNALLED = 128
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What a stage may exit with; anything else is a program that failed in a way of its own.
_EXIT_CODES = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 75})
_WAIT_STEP_S = 0.5


@dataclass(frozen=True)
class Plan:
    """
    What one run is asked for.

    Attributes:
        targets: Stages that DVC is given; none means all of dvc.yaml.
        stages: Every stage that is expected to appear, in that order.
        models: Models that are covered.
    """

    targets: tuple[str, ...]
    stages: tuple[str, ...]
    models: tuple[str, ...]


def main(  # noqa: PLR0913 - one for each option
    at: Layout,
    targets: Sequence[str],
    *,
    until: str | None = None,
    host: str | None = None,
    force: bool = False,
    wait: bool = False,
) -> int:
    """
    Bring the fleet, or the models and quants named, up to date.

    Args:
        at: The checkout.
        targets: Models or quants; all if empty.
        until: The last stage to run, one of `UNTIL`; all of them if None. There is no report then:
            a part of the chain is what the jobs of a pull request run, and they judge elsewhere.
        host: The measured host that this machine is; its own records are what the run goes on from.
            None for the first one of each model, with a warning where that is more than one
            machine. For another one, only what measures may run.
        force: Run the stages even if nothing changed.
        wait: Wait for another run in this checkout instead of refusing.

    Returns:
        0; the exit code of the first stage that failed; 128 + number of the signal that ended us.

    Raises:
        ParamsError: The declaration is wrong, or a target is not in it.
        MachineError: Too little disk, no compiler, or another run works here.
    """
    from pipelines import declaration, disk, retire, toolchain  # noqa: PLC0415 - pydantic
    from pipelines.serving import engine  # noqa: PLC0415 - the same

    declared = declaration.check(at)
    for line in declaration.over_waivers(declared, datetime.now(UTC).strftime("%Y-%m-%d")):
        console.warn(line)
    plan = plan_of(declared, targets or _of_host(declared, host), until=until)
    _require_may_measure(declared, plan.models, host, until)

    def prepare() -> None:
        _go_on_from(at, declared, host)
        # A run of named targets says nothing about the rest of the fleet. The records of a part
        # of the chain are judged elsewhere, so quants that their model no longer has must go first.
        named = None if not targets else [name for name in targets if name in declared.models]
        if named is None or until is not None:
            for line in retire.retire(at, declared, only=named):
                console.info(f"retired: {line}")
        disk.check_disk(declared, at)
        withdraw_invalid(at, declared, plan)
        tools = toolchain.ensure(toolchain.spec_of(declared))
        if any(stage.startswith("load-test@") for stage in plan.stages):
            # Installed now, with the rest of the set-up. Why it cannot be had, the stage will say.
            with contextlib.suppress(FleetError):
                engine.find(declared.serving, tools, log=at.log("load-test", "engine"))

    code = run(at, plan, force=force, wait=wait, prepare=prepare)
    if code > _SIGNALLED:
        return code
    name_tools(at, declared, plan.models)
    if until is None:
        _show_report(at, declared)
    # What saves the next stage its time stays until there is none.
    if code == 0 and until in {None, *UNTIL[UNTIL.index("load-test") :]}:
        for model in plan.models:
            atomic.remove(at.scratch(model))
    return code


# What follows the measurements of a model's quants.
_LAST_STAGES = ("choose", "load-test", "publish", "track")
# The stages of a model in the order of the graph: what `--until` takes.
UNTIL: Final = (*MEASURING, "publish", "track")
_OF_QUANTS = frozenset({"quantize", "benchmark"})
_ABOVE_QUANTS = frozenset({"fetch", "convert", "calibrate"})


def _of_host(declared: Declaration, host: str | None) -> list[str]:
    """Return the models that a host measures, where that is not all of them."""
    from pipelines import bundle  # noqa: PLC0415 - pydantic

    if host is None:
        return []
    found = [one for one in declared.models if host in bundle.measured_hosts(declared, one)]
    return [] if len(found) == len(declared.models) else found


def _of_several(declared: Declaration, models: Sequence[str]) -> str:
    """Say that what this machine measures counts as that of several ones; empty if it does not."""
    from pipelines import bundle  # noqa: PLC0415 - pydantic

    first: dict[str, list[str]] = {}
    for model in models:
        found = bundle.primary_host(declared, model)
        if declared.hosts[found].runs_on:
            first.setdefault(found, []).append(model)
    if len(first) < 2:  # noqa: PLR2004 - several
        return ""
    whose = "; ".join(f"{host}: {wording.first_few(names)}" for host, names in first.items())
    return (
        f"what is measured here counts as measured on {wording.listed(list(first))} ({whose}). "
        "`--host NAME` measures what that machine serves, and nothing else."
    )


def _require_may_measure(
    declared: Declaration, models: Sequence[str], host: str | None, until: str | None
) -> None:
    """
    See that a run for a host is of its models and ends where that host's part ends.

    Raises:
        ParamsError: The host is not measured, or serves a model not, or what follows would be a
            release of the numbers of one that releases nothing.
    """
    from pipelines import bundle  # noqa: PLC0415 - pydantic

    if host is None:
        if line := _of_several(declared, models):
            console.warn(line)
        return
    bundle.require_declared(declared, (), host)
    for model in models:
        known = bundle.measured_hosts(declared, model)
        if host not in known:
            raise ParamsError(
                f"{model} is not measured on {host}: it is on {wording.listed(list(known))}.",
                hint=f"models.{model}.hosts in params.yaml names the hosts that serve it.",
            )
    first = [bundle.primary_host(declared, model) for model in models]
    if until not in MEASURING and (others := [one for one in first if one != host]):
        raise ParamsError(
            f"a release is made of the records of {others[0]}, not of {host}.",
            hint=f"Measure alone: fleet repro --host {host} --until {MEASURING[-1]}",
        )


def _go_on_from(at: Layout, declared: Declaration, host: str | None) -> None:
    """Have the records in results/MODEL be those of the host that measures."""
    from pipelines import host_records  # noqa: PLC0415 - pydantic

    host_records.require(at, declared, host)
    if host is not None and (count := host_records.lay(at, declared, host)):
        console.info(f"{host} goes on from its own records: {wording.counted(count, 'file')}")


def withdraw_invalid(at: Layout, declared: Declaration, plan: Plan) -> None:
    """
    Remove measurements that were not to be trusted, so that DVC measures again.

    DVC alone would keep them: nothing that it compares has changed when a machine has become quiet.
    """
    from pipelines import coverage  # noqa: PLC0415 - pydantic

    found = [
        (f"benchmark@{key}", at.quant_record("benchmark", quant.model, quant.type))
        for key, quant in declared.quants.items()
    ]
    found += [
        (f"load-test@{model}", at.model_record("load-test", model)) for model in declared.models
    ]
    for name, path in found:
        if name in plan.stages and any(coverage.distrusted(name.partition("@")[0], path)):
            path.unlink()
            console.info(f"measuring again: {name} was not valid")


def name_tools(at: Layout, declared: Declaration, models: Sequence[str]) -> None:
    """
    Put what the tools are beside the records of models that they made, where git lacks it.

    A stage does so when it runs. Records that are older than that are up to date: no stage runs,
    and a hosted machine, which has no tools, could never tell by which they were made.

    Args:
        at: The checkout, in which a run has just ended.
        declared: Its declaration.
        models: That were looked at.
    """
    from pipelines import coverage, machine  # noqa: PLC0415 - pydantic

    if not at.toolchain.is_file():
        return
    md5 = coverage.file_md5(at.toolchain)
    known = coverage.Coverage(declared, at)
    for model in models:
        path = at.tools_record(model)
        is_named = path.is_file() and coverage.file_md5(path) == md5
        if not is_named and known.tools_md5s(model) == {md5}:
            machine.keep_tools(model, at)
            console.info(f"{path.relative_to(at.root)} says by which tools its records were made")


def plan_of(declared: Declaration, targets: Sequence[str], *, until: str | None = None) -> Plan:
    """
    Turn models and quants into DVC's targets and the stages that lead to them.

    Args:
        declared: The declaration.
        targets: Models or quants; all if empty.
        until: The last stage that is wanted of them, one of `UNTIL`; all stages if None.

    Raises:
        ParamsError: A target is neither; says which names come close.
    """
    quants = {key: quant.model for key, quant in declared.quants.items()}
    unknown = [name for name in targets if name not in declared.models and name not in quants]
    if unknown:
        known = [*declared.models, *quants]
        raise ParamsError(
            " ".join(
                f"{wording.quoted(name)} is neither a model nor a quant"
                f"{wording.did_you_mean(name, known) or '.'}"
                for name in unknown
            ),
            hint=f"Models: {', '.join(declared.models)}. Quants: {', '.join(quants) or 'none'}.",
        )
    whole = [name for name in declared.models if name in targets or not targets]
    keys = [key for key, model in quants.items() if key in targets or model in whole]
    touched = [name for name in declared.models if name in whole or name in map(quants.get, keys)]
    if until is not None:
        return _plan_until(until, quants, whole=whole, keys=keys, touched=touched)
    stages = ["machine"]
    for model in touched:
        own = [key for key in keys if quants[key] == model]
        stages += [f"{stage}@{model}" for stage in ("fetch", "convert", "calibrate")]
        stages += [f"{stage}@{key}" for key in own for stage in ("quantize", "benchmark")]
        stages += [f"{stage}@{model}" for stage in _LAST_STAGES if model in whole]
    named = [
        *(f"{stage}@{model}" for model in whole for stage in _LAST_STAGES),
        *(f"benchmark@{key}" for key in keys if quants[key] not in whole),
    ]
    return Plan(
        targets=tuple(named) if targets else (),
        stages=tuple(stages if targets else [*stages, "check-upstream", "report"]),
        models=tuple(touched),
    )


def _plan_until(
    until: str,
    quants: Mapping[str, str],
    *,
    whole: Sequence[str],
    keys: Sequence[str],
    touched: Sequence[str],
) -> Plan:
    """
    Name every stage up to one: what leads to it, and what stands before it and leads elsewhere.

    A quant alone has no stage after its benchmark, and none of those before that are its model's.
    """
    wanted = UNTIL[: UNTIL.index(until) + 1]
    named = []
    for model in touched:
        for stage in wanted:
            if stage in _OF_QUANTS:
                named += [f"{stage}@{key}" for key in keys if quants[key] == model]
            elif model in whole or stage in _ABOVE_QUANTS:
                named.append(f"{stage}@{model}")
    return Plan(targets=tuple(named), stages=("machine", *named), models=tuple(touched))


def run(
    at: Layout,
    plan: Plan,
    *,
    force: bool = False,
    wait: bool = False,
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """
    Run DVC on a plan: alone in the checkout, repaired, watched, and ended when we are told to.

    Args:
        at: The checkout.
        plan: What to run.
        force: Run the stages even if nothing changed.
        wait: Wait for another run in this checkout instead of refusing.
        prepare: What has to be there before DVC starts; called with the checkout locked.

    Returns:
        0; the exit code of the first stage that failed; 128 + number of the signal that ended us.

    Raises:
        MachineError: Another run works in this checkout.
        ToolError: DVC itself failed, not one of its stages.
    """
    mark = orphans.mark(at.root)
    with _stoppable() as stop:
        try:
            with alone(at, wait=wait) as died:
                for line in repair.repair(at, died=died):
                    console.info(f"repaired: {line}")
                prepare()
                return _follow(at, plan, stop, force=force, mark=mark)
        except KeyboardInterrupt:
            orphans.end_marked(mark)
            console.error("stopped. Nothing unfinished has a final name; the same command goes on.")
            return _SIGNALLED + (stop.number or signal.SIGINT)


# --- being stopped ----------------------------------------------------------------------------


class _Stop:
    """The first signal that asked us to end; the following ones must not disturb the ending."""

    number = 0

    def take(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        for other in _STOP_SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt


@contextmanager
def _stoppable() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop.take) for number in _STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- one run at a time ------------------------------------------------------------------------


@contextmanager
def alone(at: Layout, *, wait: bool) -> Iterator[bool]:
    """
    Hold the checkout for this run; the kernel lets go of it when we end, however that happens.

    Yields:
        Whether the run before this one was killed: one that ends by itself empties the file.

    Raises:
        MachineError: Another run holds it and `wait` is false; says which and since when.
    """
    path = at.root / ".dvc/tmp/fleet-repro.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        if not _lock(file.fileno()):
            holder = _holder(path)
            if not wait:
                raise MachineError(
                    f"another `fleet repro` works in this checkout: {holder}.",
                    hint="Wait for it: fleet repro --wait",
                )
            with console.Progress(f"waiting for another `fleet repro`: {holder}") as progress:
                while not _lock(file.fileno()):
                    progress.update(0)
                    time.sleep(_WAIT_STEP_S)
        died = path.stat().st_size > 0
        file.truncate(0)
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        file.write(json.dumps({"pid": os.getpid(), "since": since}))
        file.flush()
        yield died
        file.truncate(0)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> str:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return f"process {int(told['pid'])}, since {console.clean(str(told['since']))}"
    except (ValueError, KeyError, TypeError):
        return "it has just begun"


# --- DVC --------------------------------------------------------------------------------------


def _follow(at: Layout, plan: Plan, stop: _Stop, *, force: bool, mark: str) -> int:
    """Run DVC, show what it does, and close with the table."""
    log = at.log("repro", "fleet")
    progress = log.with_name("progress.jsonl")
    for old in (log, progress):
        old.unlink(missing_ok=True)
    progress.parent.mkdir(parents=True, exist_ok=True)
    board = live.Board(plan.stages, log_of=lambda name: _log_of(at, name))

    def on_line(line: str) -> None:
        if stop.number:
            return  # what DVC says while it is ended is no news: each stage of it as a failure
        events = board.read(line, time.monotonic())
        if any(event.stage.state == "running" for event in events):
            repair.keep(at)
        view.tell(events)

    began = time.monotonic()
    with ExitStack() as stack:
        watchdog = [sys.executable, "-I", str(Path(orphans.__file__).resolve()), mark]
        stack.enter_context(proc.watched_by(watchdog, word=orphans.WORD))
        view = stack.enter_context(live.view(board, live.Tail(progress)))
        try:
            done = proc.run(
                [
                    *(sys.executable, "-m", "pipelines.quick_dvc", "repro", "--keep-going"),
                    *(["--force"] if force else []),
                    *plan.targets,
                ],
                log=log,
                cwd=at.root,
                env=_environment(progress, mark),
                on_line=on_line,
                # DVC has one exit code for every failure; which it was is read from its output.
                ok_codes=range(256),
                one_stream=True,
            )
        except BaseException:
            board.cancel(time.monotonic())
            raise
        view.tell(board.end(time.monotonic()))
    times.note(at, board.stages.values())
    return _conclude(board, done.code, log, time.monotonic() - began)


def _environment(progress: Path, mark: str) -> dict[str, str]:
    """Variables for DVC and everything below it."""
    # Not resolved: the bin directory of a virtual environment, not the interpreter behind it.
    own_bin = str(Path(sys.executable).parent)
    return {
        "PATH": os.pathsep.join([own_bin, os.environ.get("PATH", os.defpath)]),
        # DVC runs commands in the user's shell; fish and csh would read ours differently.
        "SHELL": "/bin/sh",
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
        console.PROGRESS_FILE_ENV: str(progress.resolve()),
        orphans.MARK_ENV: mark,
        # Annotations are ours to write: a stage's are cleaned on the way and would be lost.
        "GITHUB_ACTIONS": "",
    }


def _log_of(at: Layout, name: str) -> Path | None:
    stage, _, key = name.partition("@")
    log = at.log(stage, key or "fleet")
    return log if log.exists() else None


def _conclude(board: live.Board, code: int, log: Path, wall_s: float) -> int:
    """
    Close with the table; return the exit code of the run.

    Raises:
        MachineError: Another DVC works in this checkout.
        ToolError: DVC failed, but no stage of it.
    """
    failed = sorted(board.of("failed"), key=lambda stage: stage.began_s or float("inf"))
    if code and not failed:
        raise _dvc_failure(board, log)
    for line in live.table(board, wall_s):
        console.info(line)
    _tell_runner(board, wall_s)
    if not failed:
        return 0
    console.info(f"whole output: {log}")
    first = failed[0].code
    return first if first in _EXIT_CODES else ToolError.exit_code


def _tell_runner(board: live.Board, wall_s: float) -> None:
    """Give the step its outputs and the job a short table, if a step of GitHub Actions runs us."""
    if not runner.in_actions():
        return
    from pipelines.render import escape_markdown  # noqa: PLC0415 - jinja2

    runner.outputs(
        ran=" ".join(stage.name for stage in board.of("done")),
        failed=" ".join(stage.name for stage in board.of("failed")),
    )
    told = board.of("done", "cached", "failed", "skipped")
    rows = [
        f"| {escape_markdown(stage.name)} | {escape_markdown(stage.text(0.0))} |" for stage in told
    ]
    head = ["", "| stage | outcome |", "|---|---|"] if rows else []
    counted = f"{live.counts(list(board.stages.values()))} in {live.duration(wall_s)}"
    runner.summary("\n".join([f"### fleet repro: {counted}", *head, *rows]))


def _dvc_failure(board: live.Board, log: Path) -> FleetError:
    said = "\n".join(f"    {line}" for line in board.outside)
    if "Unable to acquire lock" in said:
        return MachineError(
            "another DVC works in this checkout.",
            hint="Wait until it ends, then run `fleet repro` again.",
        )
    return ToolError(f"DVC failed before its stages did.\n{said}".rstrip(), log=log)


# --- afterwards -------------------------------------------------------------------------------


def _show_report(at: Layout, declared: Declaration) -> None:
    """Render and print the report from the records that there are, also after a failure."""
    from pipelines import params, report  # noqa: PLC0415 - jinja2

    try:
        console.out(report.run(params.report_slice(declared), at))
    except FleetError as error:
        console.warn(f"no report: {error.message}")
