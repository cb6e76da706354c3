"""The tables of the report: what stands in each column, and how one is set in a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from pipelines import wording
from pipelines.console import clean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipelines.evidence import Measured
    from pipelines.report_tree import LoadRow, ModelReport, Row, TextTable

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Column(Generic[R]):
    """
    One column: its head, its text, and the number by which it sorts.

    `priority` is that of leaving it out where there is no room, 0 for never.
    """

    head: str
    unit: str
    text: Callable[[R], str]
    sort: Callable[[R], float | str | None]
    is_number: bool = True
    priority: int = 0

    @property
    def title(self) -> str:
        """Head and unit in one line."""
        return f"{self.head}, {self.unit}" if self.unit else self.head


def of_quants(model: ModelReport) -> tuple[Column[Row], ...]:
    """Return the columns of the quants of a model; context and depth stand in their heads."""
    context = at(model.context_tokens)
    depth = at(model.depth_tokens)
    embeds = any(row.cosine_mean is not None for row in model.rows)
    return (
        Column(head="quant", unit="", text=lambda r: r.type, sort=lambda r: r.type,
               is_number=False),
        Column(head="size", unit="MiB", text=lambda r: wording.number(r.size_mib),
               sort=lambda r: r.size_mib, priority=2),
        Column(head="bits/weight", unit="", text=lambda r: wording.number(r.bits_per_weight),
               sort=lambda r: r.bits_per_weight, priority=5),
        Column(head=f"memory{context}", unit="MiB", text=lambda r: wording.number(r.memory_mib),
               sort=lambda r: r.memory_mib, priority=1),
        *(_of_encoder() if embeds else _of_decoder(depth)),
        Column(head="verdict", unit="", text=lambda r: r.verdict_words,
               sort=lambda r: r.verdict_words, is_number=False),
    )  # fmt: skip


def _of_decoder(depth: str) -> tuple[Column[Row], ...]:
    """Return speed and quality of a model that goes on with texts."""
    return (
        Column(head=f"decode{depth}", unit="tok/s", text=lambda r: _interval(r.decode_tok_s),
               sort=lambda r: _value(r.decode_tok_s)),
        Column(head="prefill", unit="tok/s", text=lambda r: _interval(r.prefill_tok_s),
               sort=lambda r: _value(r.prefill_tok_s), priority=4),
        Column(head="divergence", unit="nats", text=lambda r: wording.number(r.kld_mean_nats),
               sort=lambda r: r.kld_mean_nats),
        Column(head="same top", unit="%", text=lambda r: wording.number(_percent(r.same_top)),
               sort=lambda r: r.same_top, priority=3),
        Column(head="PPL ratio", unit="", text=lambda r: wording.number(r.ppl_ratio, 4),
               sort=lambda r: r.ppl_ratio, priority=6),
    )  # fmt: skip


def _of_encoder() -> tuple[Column[Row], ...]:
    """Return speed and quality of a model that makes embeddings."""
    return (
        Column(head="prefill", unit="tok/s", text=lambda r: _interval(r.prefill_tok_s),
               sort=lambda r: _value(r.prefill_tok_s)),
        Column(head="cosine", unit="", text=lambda r: wording.number(r.cosine_mean, 5),
               sort=lambda r: r.cosine_mean),
        Column(head="same nearest", unit="%",
               text=lambda r: wording.number(_percent(r.same_nearest)),
               sort=lambda r: r.same_nearest, priority=3),
    )  # fmt: skip


def of_runs(rows: Sequence[LoadRow]) -> tuple[Column[LoadRow], ...]:
    """Return the columns of the runs of a load test; failures only if there are any."""
    number = wording.number
    shown: list[Column[LoadRow]] = [
        Column(head="run", unit="", text=lambda r: r.name, sort=lambda r: r.name,
               is_number=False),
        Column(head="requests", unit="", text=lambda r: f"{r.requests_count:,}",
               sort=lambda r: r.requests_count, priority=3),
        Column(head="ok", unit="", text=lambda r: f"{r.ok_count:,}",
               sort=lambda r: r.ok_count),
        Column(head="TTFT p50", unit="ms", text=lambda r: number(r.ttft_p50_ms),
               sort=lambda r: r.ttft_p50_ms),
        Column(head="TTFT p95", unit="ms", text=lambda r: number(r.ttft_p95_ms),
               sort=lambda r: r.ttft_p95_ms, priority=5),
        Column(head="TPOT p50", unit="ms", text=lambda r: number(r.tpot_p50_ms),
               sort=lambda r: r.tpot_p50_ms),
        Column(head="e2e p50", unit="ms", text=lambda r: number(r.e2e_p50_ms),
               sort=lambda r: r.e2e_p50_ms, priority=4),
        Column(head="output", unit="tok/s", text=lambda r: number(r.output_tok_s),
               sort=lambda r: r.output_tok_s, priority=1),
        Column(head="requests", unit="1/s", text=lambda r: number(r.requests_s),
               sort=lambda r: r.requests_s, priority=2),
        *(_good_column(host) for host in dict.fromkeys(host for row in rows for host in row.good)),
    ]  # fmt: skip
    if any(row.failed_count for row in rows):
        failed: Column[LoadRow] = Column(
            head="failed", unit="", text=lambda r: f"{r.failed_count:,}",
            sort=lambda r: r.failed_count,
        )  # fmt: skip
        shown.insert(3, failed)
    return tuple(shown)


def _good_column(host: str) -> Column[LoadRow]:
    """Return the share of good requests, on one host if they differ."""

    def text(row: LoadRow) -> str:
        return row.good.get(host, wording.ABSENT)

    return Column(head="good", unit=f"on {host}" if host else "", text=text, sort=text)


def of_texts(table: TextTable) -> tuple[Column[tuple[str, ...]], ...]:
    """Return the columns of a table of texts; where there is no room, inner ones go first."""
    last = len(table.heads) - 1

    def column(index: int) -> Column[tuple[str, ...]]:
        return Column(
            head=table.heads[index], unit="", text=lambda row: row[index],
            sort=lambda row: row[index], is_number=index in table.numbers,
            priority=0 if index in {0, last} else last - index,
        )  # fmt: skip

    return tuple(column(index) for index in range(len(table.heads)))


def at(count: int | None) -> str:
    """Write ` at 4,096`; nothing if the count is not known."""
    return "" if count is None else f" at {wording.tokens(count)}"


def _percent(share: float | None) -> float | None:
    return None if share is None else share * 100


def _value(measured: Measured | None) -> float | None:
    return None if measured is None else measured.value


def _interval(value: Measured | None) -> str:
    if value is None:
        return wording.ABSENT
    low, high = wording.number(value.low), wording.number(value.high)
    return f"{wording.number(value.value)} [{low}, {high}]"


# --- in a terminal ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Line(Generic[R]):
    """One line of a table that was set; heads and units have no row."""

    text: str
    row: R | None


def lines(
    columns: Sequence[Column[R]],
    rows: Sequence[R],
    width: int,
    *,
    is_marked: Callable[[R], bool],
) -> list[Line[R]]:
    """Set a table in as many columns as fit, the least telling ones left out first."""
    shown = list(columns)
    while _table_width(shown, rows) > width and any(column.priority for column in shown):
        shown.remove(max(shown, key=lambda column: column.priority))
    widths = [_column_width(column, rows) for column in shown]
    heads = [_cell(column, column.head, w) for column, w in zip(shown, widths, strict=True)]
    units = [_cell(column, column.unit, w) for column, w in zip(shown, widths, strict=True)]
    found: list[Line[R]] = [
        Line(text=_cut(("  " + "  ".join(cells)).rstrip(), width), row=None)
        for cells in (heads, units)
    ]
    for row in rows:
        cells = [_cell(c, clean(c.text(row)), w) for c, w in zip(shown, widths, strict=True)]
        mark = "▸ " if is_marked(row) else "  "
        found.append(Line(text=_cut((mark + "  ".join(cells)).rstrip(), width), row=row))
    return found


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"


def _column_width(column: Column[R], rows: Sequence[R]) -> int:
    return max(
        len(column.head), len(column.unit), *(len(clean(column.text(row))) for row in rows), 0
    )


def _table_width(shown: Sequence[Column[R]], rows: Sequence[R]) -> int:
    return 2 * len(shown) + sum(_column_width(column, rows) for column in shown)


def _cell(column: Column[R], text: str, width: int) -> str:
    return text.rjust(width) if column.is_number else text.ljust(width)
