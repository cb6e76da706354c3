"""
The charts of a comment, as Mermaid, which GitHub draws itself: no image, no host of images.

Only what `_label` and `_value` let through gets into a chart, so that no text of a record can end
the block, open a directive or name a link. Every number of a chart stands in a table beside it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import wording

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.comment_tree import History, Point
    from pipelines.report_tree import ModelReport, Row

# Mermaid's own is next to white. This one is seen on light and on dark ground.
COLOUR: Final = '%%{init: {"themeVariables": {"xyChart": {"plotColorPalette": "#0969da"}}}}%%'
_FOREIGN: Final = re.compile(r"[^A-Za-z0-9 ._,/-]")
_LABEL_CHARACTERS: Final = 60
# Points at the very edge are cut in half.
_MARGIN: Final = 0.08
_LEAST_POINTS: Final = 2
# The least divergence that a logarithmic axis can show.
_LEAST_NATS: Final = 1e-7


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart and the table of its numbers; `title` is what the fold is called."""

    title: str
    mermaid: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def pareto(told: ModelReport) -> Chart | None:
    """Draw divergence over memory; None of fewer than two quants, or of an encoder."""
    shown = [
        row for row in told.rows
        if row.verdict != "INVALID" and row.kld_mean_nats is not None and row.memory_mib
    ]  # fmt: skip
    if len(shown) < _LEAST_POINTS:
        return None
    memories = [row.memory_mib or 0.0 for row in shown]
    nats = [math.log(max(row.kld_mean_nats or 0.0, _LEAST_NATS)) for row in shown]
    least, most = _ends(memories, "MiB")
    lines = [
        "quadrantChart",
        f"    title {_label(told.name)}: what memory buys",
        f'    x-axis "less memory ({least})" --> "more ({most})"',
        f'    y-axis "far from f16 ({_worst(shown)} nats)" --> "close ({_best(shown)} nats)"',
    ]
    for row, memory, logarithm in zip(shown, memories, nats, strict=True):
        x, y = _place(memory, memories), 1 - _place(logarithm, nats)
        lines.append(f'    "{_label(row.type)}": [{x:.2f}, {y:.2f}]')
    rows = tuple(
        (row.type, wording.number(row.memory_mib), wording.number(row.kld_mean_nats),
         "yes" if row.on_frontier else "no")
        for row in shown
    )  # fmt: skip
    return Chart(
        title="Pareto: memory against divergence",
        mermaid="\n".join(lines),
        heads=("quant", "memory, MiB", "divergence, nats (log scale, less is higher)",
               "on the frontier"),
        rows=rows,
    )  # fmt: skip


def history(past: History) -> Chart:
    """Draw the decode speed over the records of the default branch, and this one at the end."""
    values = [one.value_tok_s for one in past.points]
    low, high = min(values), max(values)
    numbers = ", ".join(str(index) for index in range(1, len(values) + 1))
    room = max((high - low) * 0.25, abs(high) * 0.01)
    lines = [
        COLOUR,
        "xychart-beta",
        f'    title "{_label(past.type)}, {_label(past.what)}"',
        f'    x-axis "record, the newest at the right" [{numbers}]',
        f'    y-axis "tok/s" {_value(low - room)} --> {_value(high + room)}',
        f"    line [{', '.join(_value(one) for one in values)}]",
    ]
    rows = tuple(
        (
            str(index), one.commit, one.day, _interval(one),
        )
        for index, one in enumerate(past.points, 1)
    )  # fmt: skip
    return Chart(
        title=f"Decode speed of {past.type} over {wording.counted(len(values), 'record')} "
        "on this hardware",
        mermaid="\n".join(lines),
        heads=("record", "commit", "day", f"{past.what}, tok/s"),
        rows=rows,
    )


# --- parts ------------------------------------------------------------------------------------


def _interval(one: Point) -> str:
    number = wording.number
    return f"{number(one.value_tok_s)} [{number(one.low_tok_s)}, {number(one.high_tok_s)}]"


def _label(text: str) -> str:
    """Leave of a text only what means nothing to Mermaid."""
    return _FOREIGN.sub("", text)[:_LABEL_CHARACTERS].strip() or "-"


def _value(value: float) -> str:
    return f"{value:.6g}" if 1e-3 < abs(value) < 1e6 else f"{value:.4f}"  # noqa: PLR2004 - plain


def _place(value: float, values: Sequence[float]) -> float:
    """Put a value between the margins of an axis that goes from the least to the largest one."""
    low, high = min(values), max(values)
    share = 0.5 if high == low else (value - low) / (high - low)
    return _MARGIN + share * (1 - 2 * _MARGIN)


def _ends(values: Sequence[float], unit: str) -> tuple[str, str]:
    least, most = wording.pair(min(values), max(values))
    return f"{least} {unit}", f"{most} {unit}"


def _best(rows: Sequence[Row]) -> str:
    return wording.number(min(row.kld_mean_nats or 0.0 for row in rows))


def _worst(rows: Sequence[Row]) -> str:
    return wording.number(max(row.kld_mean_nats or 0.0 for row in rows))
