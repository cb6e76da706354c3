"""
A scatter chart of quants as inline SVG: what is bought with memory or speed, and what it costs.

The y axis is the mean divergence from f16, logarithmic and turned over, so that up is better.
Labels never overlap: `plan` puts each into the free place that is nearest to its point and leaves
out what has no place (the table beside the chart has every number). Colours come from the style
sheet by class, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from pipelines import wording
from pipelines.drawing import (
    CHARACTER_PX,
    LINE_PX,
    Box,
    Scale,
    Text,
    draw_text,
    line,
    linear_ticks,
    log_ticks,
    padded,
    text_at,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

WIDTH = 384
HEIGHT = 296
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 16, 46
_POINT_PX = 5
_STEP_PX = 5
_NEAR_PX = 16
# A label belongs to the point that is nearer by this much; otherwise a line joins them.
_CLEARLY_PX = 3


_Spot = tuple["Mark", float, float]
PLOT = Box(_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One quant: its name, where it lies, how sure that is, and what became of it."""

    label: str
    x: float
    low: float
    high: float
    kld_mean_nats: float
    verdict: str
    on_frontier: bool


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A mark in the units of the drawing, with its label if there was room for one."""

    mark: Mark
    x: float
    y: float
    low: float
    high: float
    label: Text | None
    has_leader: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is drawn, placed."""

    title: str
    x_title: str
    placed: tuple[Placed, ...]
    x_ticks: tuple[tuple[float, Text], ...]
    y_ticks: tuple[tuple[float, Text], ...]
    front: tuple[tuple[float, float], ...]
    x_limit: float | None
    y_limit: float | None

    def texts(self) -> list[Text]:
        """Return all texts inside the drawing that must not overlap."""
        labels = [one.label for one in self.placed if one.label is not None]
        return [*labels, *(text for _, text in (*self.x_ticks, *self.y_ticks))]


# --- placing ----------------------------------------------------------------------------------


def plan(  # noqa: PLR0913 - each is one independent fact about the drawing
    marks: Iterable[Mark],
    *,
    title: str,
    x_title: str,
    less_x_is_better: bool,
    x_limit: float | None = None,
    kld_limit: float | None = None,
) -> Plan | None:
    """
    Place everything; None if there is nothing to show.

    Args:
        marks: Quants whose values can be trusted.
        title: What the chart shows, for those who cannot see it.
        x_title: What x is, with its unit.
        less_x_is_better: Whether the best corner is at the left, as for memory.
        x_limit: A declared limit of x; drawn if it lies near the points.
        kld_limit: The declared ceiling of the divergence.
    """
    shown = [mark for mark in marks if math.isfinite(mark.x) and mark.x > 0]
    if not shown:
        return None
    depth = _log_depths(shown)
    x_low, x_high = padded([v for m in shown for v in (m.low, m.high)], shown[0].x * 0.02)
    if x_limit is not None and x_high < x_limit <= x_high + (x_high - x_low) / 2:
        x_high = x_limit * 1.02
    ys = list(depth.values())
    if kld_limit is not None and min(ys) - 1 < math.log10(kld_limit) < max(ys) + 1:
        ys.append(math.log10(kld_limit))
    y_low, y_high = padded(ys, 0.15)
    x = Scale(x_low, x_high, PLOT.left, PLOT.right)
    y = Scale(y_low, y_high, PLOT.top, PLOT.bottom)
    spots = [(mark, x.at(mark.x), y.at(depth[mark.label])) for mark in shown]
    return Plan(
        title=title,
        x_title=x_title,
        placed=_place(spots, x),
        x_ticks=tuple(_x_ticks(x)),
        y_ticks=tuple(_y_ticks(y)),
        front=_front(spots, less_x_is_better=less_x_is_better),
        x_limit=x.at(x_limit) if x_limit is not None and x_low < x_limit < x_high else None,
        y_limit=(
            y.at(math.log10(kld_limit))
            if kld_limit is not None and y_low < math.log10(kld_limit) < y_high
            else None
        ),
    )


def _log_depths(marks: Sequence[Mark]) -> dict[str, float]:
    """Return the logarithm of each divergence; zero, which has none, goes beside the smallest."""
    positive = [mark.kld_mean_nats for mark in marks if mark.kld_mean_nats > 0]
    floor = min(positive, default=1e-3) / 2
    return {mark.label: math.log10(max(mark.kld_mean_nats, floor)) for mark in marks}


def _x_ticks(scale: Scale) -> Iterator[tuple[float, Text]]:
    previous = -math.inf
    for value in linear_ticks(scale.low, scale.high):
        text = text_at(
            wording.declared(round(value, 9)), scale.at(value), PLOT.bottom + 17, "middle"
        )
        if text.box.left > previous + CHARACTER_PX and text.box.right <= WIDTH:
            previous = text.box.right
            yield scale.at(value), text


def _y_ticks(scale: Scale) -> Iterator[tuple[float, Text]]:
    previous = -math.inf
    for value in log_ticks(scale.low, scale.high):
        y = scale.at(math.log10(value))
        text = text_at(f"{value:.6g}", PLOT.left - 7, y + 4, "end")
        if text.box.top > previous:
            previous = text.box.bottom
            yield y, text


def _place(spots: Sequence[_Spot], scale: Scale) -> tuple[Placed, ...]:
    """Give labels their places, the chosen quant first; a label may not cover any point."""
    taken = [
        Box(x - _POINT_PX - 2, y - _POINT_PX - 2, x + _POINT_PX + 2, y + _POINT_PX + 2)
        for _, x, y in spots
    ]
    taken += [Box(scale.at(m.low), y - 1, scale.at(m.high), y + 1) for m, _, y in spots]
    labels: dict[str, Text | None] = {}
    for spot in sorted(spots, key=lambda spot: spot[0].verdict != "CHOSEN"):
        label = labels[spot[0].label] = _free_place(spot, spots, taken)
        if label is not None:
            taken.append(label.box)
    return tuple(
        Placed(
            mark=mark, x=x, y=y, low=scale.at(mark.low), high=scale.at(mark.high),
            label=(label := labels[mark.label]),
            has_leader=label is not None and not _is_plain(label, (mark, x, y), spots),
        )
        for mark, x, y in spots
    )  # fmt: skip


def _free_place(spot: _Spot, spots: Sequence[_Spot], taken: Sequence[Box]) -> Text | None:
    """Return the nearest free place whose owner is plain, else the nearest one for a leader."""
    fallback = None
    for label in _places(*spot):
        if not PLOT.holds(label.box) or any(label.box.overlaps(box) for box in taken):
            continue
        if _is_plain(label, spot, spots):
            return label
        fallback = fallback or label
    return fallback


def _is_plain(label: Text, own: _Spot, spots: Sequence[_Spot]) -> bool:
    """Tell whether a label is so near to its point, and to no other, that nobody can err."""
    distance = label.box.distance(own[1], own[2])
    others = (label.box.distance(x, y) for mark, x, y in spots if mark is not own[0])
    return distance < _NEAR_PX and distance + _CLEARLY_PX < min(others, default=math.inf)


def _places(mark: Mark, x: float, y: float) -> Iterator[Text]:
    """Propose places for a label: beside its point, then ever farther away."""
    kind = "label chosen" if mark.verdict == "CHOSEN" else "label"
    gap = _POINT_PX + 4
    yield text_at(mark.label, x, y - gap - 2, "middle", kind)
    yield text_at(mark.label, x + gap, y + 4, "start", kind)
    yield text_at(mark.label, x - gap, y + 4, "end", kind)
    yield text_at(mark.label, x, y + gap + 10, "middle", kind)
    for anchor, side in (("start", gap - 2), ("end", 2 - gap)):
        yield text_at(mark.label, x + side, y - gap + 1, anchor, kind)
        yield text_at(mark.label, x + side, y + gap + 7, anchor, kind)
    columns = range(int(PLOT.left), int(PLOT.right), _STEP_PX * 2)
    rows = range(int(PLOT.top), int(PLOT.bottom) + LINE_PX, _STEP_PX)
    grid = ((column, row) for column in columns for row in rows)
    for column, row in sorted(grid, key=lambda at: math.hypot(at[0] - x, at[1] - 4 - y)):
        yield text_at(mark.label, column, row, "middle", kind)


def _front(spots: Sequence[_Spot], *, less_x_is_better: bool) -> tuple[tuple[float, float], ...]:
    """Return the points that no other one beats in both axes of this drawing, in order of x."""
    sign = 1 if less_x_is_better else -1
    best_y = math.inf
    front: list[tuple[float, float]] = []
    for _, x, y in sorted(spots, key=lambda spot: (sign * spot[1], spot[2])):
        if y < best_y:
            best_y = y
            front.append((x, y))
    return tuple(sorted(front))


# --- drawing ----------------------------------------------------------------------------------


def svg(drawn: Plan, *, name: str) -> str:
    """
    Draw; every text is escaped.

    Args:
        drawn: What to draw.
        name: Prefix of the ids inside, unique in the page.
    """
    parts = [
        (
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-labelledby="{escape(name)}-title {escape(name)}-desc">'
        ),
        f'<title id="{escape(name)}-title">{escape(drawn.title)}</title>',
        f'<desc id="{escape(name)}-desc">{escape(describe(drawn))}</desc>',
        *_draw_limits(drawn),
        *_draw_axes(drawn),
        *_draw_front(drawn),
        *(part for one in drawn.placed for part in _draw_mark(one)),
        "</svg>",
    ]
    return "\n".join(parts)


def describe(drawn: Plan) -> str:
    """Say in words what the chart shows."""
    points = (
        f"{one.mark.label} at {wording.number(one.mark.x)} with "
        f"{wording.number(one.mark.kld_mean_nats)} nats"
        for one in drawn.placed
    )
    return f"{drawn.x_title} against mean divergence: {'; '.join(points)}."


def _draw_limits(drawn: Plan) -> Iterator[str]:
    """Shade what the declaration forbids."""
    if drawn.y_limit is not None:
        yield (
            f'<rect class="forbidden" x="{PLOT.left}" y="{drawn.y_limit:.1f}" '
            f'width="{PLOT.right - PLOT.left}" height="{PLOT.bottom - drawn.y_limit:.1f}"/>'
        )
    if drawn.x_limit is not None:
        yield (
            f'<rect class="forbidden" x="{drawn.x_limit:.1f}" y="{PLOT.top}" '
            f'width="{PLOT.right - drawn.x_limit:.1f}" height="{PLOT.bottom - PLOT.top}"/>'
        )


def _draw_axes(drawn: Plan) -> Iterator[str]:
    for x, text in drawn.x_ticks:
        yield line("tick", x, PLOT.bottom, x, PLOT.bottom + 4)
        yield draw_text(text)
    for y, text in drawn.y_ticks:
        yield line("grid", PLOT.left, y, PLOT.right, y)
        yield draw_text(text)
    yield line("axis", PLOT.left, PLOT.bottom, PLOT.right, PLOT.bottom)
    middle = (PLOT.left + PLOT.right) / 2
    yield (
        f'<text class="title" x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(drawn.x_title)}</text>"
    )


def _draw_front(drawn: Plan) -> Iterator[str]:
    if len(drawn.front) > 1:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn.front)
        yield f'<polyline class="front" points="{points}"/>'


def _draw_mark(one: Placed) -> Iterator[str]:
    mark, x, y = one.mark, one.x, one.y
    kind = f"{mark.verdict.lower()}{'' if mark.on_frontier else ' dominated'}"
    if one.high - one.low > 1:
        yield line("whisker", one.low, y, one.high, y)
    if one.label is not None and one.has_leader:
        yield _draw_leader(one.label, x, y)
    yield f'<g class="mark {escape(kind)}"><title>{escape(_tooltip(mark))}</title>'
    if mark.verdict == "REJECT":
        arm = _POINT_PX - 1
        yield (
            f'<path d="M{x - arm:.1f} {y - arm:.1f}L{x + arm:.1f} {y + arm:.1f}'
            f'M{x - arm:.1f} {y + arm:.1f}L{x + arm:.1f} {y - arm:.1f}"/>'
        )
    else:
        radius = _POINT_PX + 1 if mark.verdict == "CHOSEN" else _POINT_PX - 1
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
    yield "</g>"
    if one.label is not None:
        yield draw_text(one.label)


def _draw_leader(label: Text, x: float, y: float) -> str:
    """Join a label to its point."""
    near_x = min(max(x, label.box.left), label.box.right)
    near_y = min(max(y, label.box.top), label.box.bottom)
    return line("leader", x, y, near_x, near_y)


def _tooltip(mark: Mark) -> str:
    return (
        f"{mark.label}: {wording.number(mark.x)}, {wording.number(mark.kld_mean_nats)} nats, "
        f"{mark.verdict.lower()}"
    )
