"""A load test of a running server, a sweep and prompt regressions, as text for a terminal."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines import report_load, tables, wording
from pipelines.console import clean
from pipelines.tables import Column

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TypeVar

    from pipelines.load_records import RegressionResult, SweepPoint, SweepRecord
    from pipelines.load_remote import RemoteTest

    R = TypeVar("R")

_MIB = 1 << 20


def remote(tested: RemoteTest) -> str:
    """Show the runs, the levels, the client's own share, and why any of it is in doubt."""
    return "\n".join(_remote_lines(tested))


def _remote_lines(tested: RemoteTest) -> Iterator[str]:
    yield f"{clean(tested.name)} on {clean(tested.engine.version)} at {clean(tested.url)}"
    rows = [report_load.run_row(run, _good(tested, run.good_count)) for run in tested.runs]
    yield from _table(tables.of_runs(rows), rows)
    several = len(tested.slos) > 1
    for gate in tested.gates:
        where = f" on {gate.host}" if several else ""
        yield f"  {gate.outcome}{where}: {gate.sentence}"
    for run in tested.runs:
        yield from (f"  {run.name}: {clean(note)}" for note in run.notes)
    if tested.calibration is not None:
        one = tested.calibration
        yield (
            f"  client: adds {wording.number(one.delay_p99_ms)} ms at p99, measured against a null "
            "server at the same pace"
        )
    yield from (f"  INVALID: {clean(reason)}" for reason in tested.invalid)
    yield "  Which file that server has, and who else uses it, nobody here can know."


def _good(tested: RemoteTest, counts: dict[str, int]) -> str:
    """Write how many requests kept every level, for the first host; levels tell the others."""
    host = next(iter(tested.slos), None)
    return f"{counts[host]:,}" if host in counts else wording.ABSENT


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A point of a sweep, for its table."""

    point: SweepPoint
    of: int


def sweep(record: SweepRecord) -> str:
    """Show speed over the layers on the GPU."""
    rows = [_Point(point=point, of=record.layers_count) for point in record.points]
    columns: tuple[Column[_Point], ...] = (
        Column(head="on the GPU", unit="layers", text=lambda r: f"{r.point.gpu_layers} of {r.of}",
               sort=lambda r: r.point.gpu_layers),
        Column(head="its memory", unit="MiB", text=lambda r: _mib(r.point.size_vram_bytes),
               sort=lambda r: r.point.size_vram_bytes),
        Column(head="TTFT p50", unit="ms", text=lambda r: wording.number(r.point.ttft_p50_ms),
               sort=lambda r: r.point.ttft_p50_ms),
        Column(head="output", unit="tok/s", text=lambda r: wording.number(r.point.output_tok_s),
               sort=lambda r: r.point.output_tok_s),
        Column(head="", unit="", text=lambda r: r.point.sentence, sort=lambda r: r.point.sentence,
               is_number=False, priority=1),
    )  # fmt: skip
    title = f"{record.type}, {wording.tokens(record.context_tokens)} tokens, {record.engine}"
    return "\n".join([title, *_table(columns, rows)])


def regressions(results: Sequence[RegressionResult]) -> str:
    """Show each question with its share, and the first answers that were not as expected."""
    return "\n".join(
        line
        for one in results
        for line in (
            f"{one.outcome:12} {one.id}: {clean(one.sentence)}",
            *(f"{'':13}{clean(miss)}" for miss in one.misses),
        )
    )


def _mib(size_bytes: int | None) -> str:
    return wording.number(None if size_bytes is None else size_bytes / _MIB)


def _table(columns: Sequence[Column[R]], rows: Sequence[R]) -> list[str]:
    width = shutil.get_terminal_size((100, 24)).columns
    set_ = tables.lines(columns, rows, width, is_marked=lambda _: False)
    return [line.text for line in set_]
