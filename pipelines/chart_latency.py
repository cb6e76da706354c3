"""
Latency and throughput over concurrency, as two drawings of inline SVG.

The x axis counts steps of the ladder, not requests: 1, 2, 4, 8 lie equally far apart. Latency is
logarithmic, since a first token and the next ones differ by orders of magnitude; throughput begins
at zero. Each line is named at its end, and names that would touch are pushed apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from itertools import pairwise
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
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

WIDTH = 384
HEIGHT = 296
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 76, 26, 46
PLOT = Box(_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM)
_POINT_PX = 4
# A declared level farther away than this, as a power of ten, would only flatten the lines.
_NEAR_DECADES = 1.0
_LEVEL_NAMES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT"}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One closed run; None is what its sample does not carry. Milliseconds and tokens a second."""

    concurrency: int
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    ttft_max_ms: float | None
    tpot_p50_ms: float | None
    output_tok_s: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One measure over the ladder, placed: points, whiskers up to the slowest, name at the end."""

    kind: str
    name: str
    values: tuple[tuple[int, float], ...]
    points: tuple[tuple[float, float], ...]
    whiskers: tuple[tuple[float, float, float], ...]
    label: Text


@dataclass(frozen=True, kw_only=True)
class Level:
    """A declared level, placed."""

    y: float
    label: Text | None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One drawing, placed."""

    title: str
    counts: tuple[int, ...]
    y_title: Text
    lines: tuple[Line, ...]
    levels: tuple[Level, ...]
    x_ticks: tuple[tuple[float, Text], ...]
    y_ticks: tuple[tuple[float, Text], ...]

    def texts(self) -> list[Text]:
        """Return all texts that must not overlap."""
        named = [one.label for one in self.lines]
        levels = [one.label for one in self.levels if one.label is not None]
        ticks = [text for _, text in (*self.x_ticks, *self.y_ticks)]
        return [self.y_title, *named, *levels, *ticks]


@dataclass(frozen=True, kw_only=True)
class _Series:
    kind: str
    name: str
    values: tuple[tuple[int, float], ...]
    tops: tuple[tuple[int, float], ...] = ()


# --- placing ----------------------------------------------------------------------------------


def plan(
    steps: Iterable[Step], *, title: str, levels: Iterable[Mapping[str, float]] = ()
) -> tuple[Panel, Panel] | None:
    """
    Place latency and throughput; None if there are fewer than two steps with a latency.

    Args:
        steps: The closed runs, in any order.
        title: Of what, for those who cannot see it.
        levels: The declared levels of each host, by their names in `params.Slo`.
    """
    shown = (step for step in steps if _is_positive(step.ttft_p50_ms))
    ladder = sorted(shown, key=lambda step: step.concurrency)
    if len({step.concurrency for step in ladder}) < 2:  # noqa: PLR2004 - one step shows no course
        return None
    latency = _latency_series(ladder)
    throughput = (
        _Series(
            kind="ttft",
            name="tok/s",
            values=tuple((i, step.output_tok_s) for i, step in enumerate(ladder)),
        ),
    )
    counts = [step.concurrency for step in ladder]
    wanted = sorted({(name, value) for host in levels for name, value in host.items()})
    return (
        _latency_panel(latency, counts, f"{title}: latency over concurrency", wanted),
        _throughput_panel(throughput, counts, f"{title}: throughput over concurrency"),
    )


def _is_positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _latency_series(ladder: Sequence[Step]) -> tuple[_Series, ...]:
    tops = _values(ladder, "ttft_max_ms")
    drawn = (
        _Series(kind="ttft", name="TTFT p50", values=_values(ladder, "ttft_p50_ms"), tops=tops),
        _Series(kind="tail", name="TTFT p95", values=_values(ladder, "ttft_p95_ms")),
        _Series(kind="tpot", name="TPOT p50", values=_values(ladder, "tpot_p50_ms")),
    )
    return tuple(one for one in drawn if one.values)


def _values(ladder: Sequence[Step], name: str) -> tuple[tuple[int, float], ...]:
    """Return (place on the ladder, value) of what is known."""
    found = ((i, getattr(step, name)) for i, step in enumerate(ladder))
    return tuple((i, value) for i, value in found if _is_positive(value))


def _latency_panel(
    series: Sequence[_Series],
    counts: Sequence[int],
    title: str,
    wanted: Sequence[tuple[str, float]],
) -> Panel:
    logs = [math.log10(value) for one in series for _, value in (*one.values, *one.tops)]
    near = [
        (name, value)
        for name, value in wanted
        if name in _LEVEL_NAMES
        and min(logs) - _NEAR_DECADES < math.log10(value) < max(logs) + _NEAR_DECADES
    ]
    low, high = padded([*logs, *(math.log10(value) for _, value in near)], 0.15)
    y = Scale(low, high, PLOT.bottom, PLOT.top)
    lines = _lines(series, len(counts), lambda value: y.at(math.log10(value)))
    return Panel(
        title=title,
        counts=tuple(counts),
        y_title=text_at("milliseconds", 0, PLOT.top - 12, "start", "tick"),
        lines=lines,
        levels=_levels(near, y, lines),
        x_ticks=tuple(_x_ticks(counts)),
        y_ticks=_y_ticks((value, y.at(math.log10(value))) for value in log_ticks(low, high)),
    )


def _throughput_panel(series: Sequence[_Series], counts: Sequence[int], title: str) -> Panel:
    most = max((value for one in series for _, value in one.values), default=0.0)
    y = Scale(0.0, max(most, 1e-3) * 1.1, PLOT.bottom, PLOT.top)
    return Panel(
        title=title,
        counts=tuple(counts),
        y_title=text_at("tokens a second, all together", 0, PLOT.top - 12, "start", "tick"),
        lines=_lines(series, len(counts), y.at),
        levels=(),
        x_ticks=tuple(_x_ticks(counts)),
        y_ticks=_y_ticks((value, y.at(value)) for value in linear_ticks(y.low, y.high)),
    )


def _x_at(place: int, count: int) -> float:
    """Return where a step lies, with air at both ends."""
    return PLOT.left + (place + 0.5) / count * (PLOT.right - PLOT.left)


def _lines(series: Sequence[_Series], count: int, at: Callable[[float], float]) -> tuple[Line, ...]:
    ends = [at(one.values[-1][1]) for one in series]
    return tuple(
        Line(
            kind=one.kind,
            name=one.name,
            values=one.values,
            points=tuple((_x_at(i, count), at(value)) for i, value in one.values),
            whiskers=tuple(_whiskers(one, count, at)),
            label=text_at(one.name, PLOT.right + 5, y + 4, "start", "label"),
        )
        for one, y in zip(series, _apart(ends), strict=True)
    )


def _whiskers(
    one: _Series, count: int, at: Callable[[float], float]
) -> Iterator[tuple[float, float, float]]:
    tops = dict(one.tops)
    for i, value in one.values:
        if i in tops and tops[i] > value:
            yield _x_at(i, count), at(value), at(tops[i])


def _apart(wanted: Sequence[float]) -> list[float]:
    """Push heights apart until a line of text fits between any two, inside the drawing."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: dict[int, float] = {}
    previous = -math.inf
    for i in order:
        placed[i] = previous = max(wanted[i], previous + LINE_PX)
    beyond = max(0.0, previous - PLOT.bottom) if order else 0.0
    limit = PLOT.bottom if beyond else math.inf
    for i in reversed(order):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - LINE_PX
    return [placed[i] for i in range(len(wanted))]


def _levels(
    near: Sequence[tuple[str, float]], y: Scale, lines: Sequence[Line]
) -> tuple[Level, ...]:
    """Place declared levels; a name that has no room beside points and other names is left out."""
    taken = [
        Box(x - _POINT_PX - 2, top - _POINT_PX - 2, x + _POINT_PX + 2, top + _POINT_PX + 2)
        for one in lines
        for x, top in one.points
    ]
    taken += [Box(x - 2, high, x + 2, low) for one in lines for x, low, high in one.whiskers]
    for one in lines:
        taken += [_span(a, b) for a, b in pairwise(one.points)]
    found: list[Level] = []
    for name, value in near:
        height = y.at(math.log10(value))
        text = f"{_LEVEL_NAMES[name]} level {wording.declared(value)}"
        label = _free_label(text, height, taken)
        if label is not None:
            taken.append(label.box)
        found.append(Level(y=height, label=label))
    return tuple(found)


def _span(one: tuple[float, float], other: tuple[float, float]) -> Box:
    """Return the box of a piece of a line."""
    (x1, y1), (x2, y2) = one, other
    return Box(min(x1, x2), min(y1, y2) - 1, max(x1, x2), max(y1, y2) + 1)


def _free_label(text: str, height: float, taken: Sequence[Box]) -> Text | None:
    """Put the name of a level on its line or under it, at the left, at the right, or nowhere."""
    room = Box(PLOT.left, PLOT.top - 2, PLOT.right, PLOT.bottom)
    for x, anchor in ((PLOT.left + 3, "start"), (PLOT.right - 3, "end")):
        for base in (height - 4, height + LINE_PX - 2):
            label = text_at(text, x, base, anchor, "level")
            if room.holds(label.box) and not any(label.box.overlaps(box) for box in taken):
                return label
    return None


def _x_ticks(counts: Sequence[int]) -> Iterator[tuple[float, Text]]:
    previous = -math.inf
    for place, value in enumerate(counts):
        x = _x_at(place, len(counts))
        text = text_at(f"{value:,}", x, PLOT.bottom + 17, "middle")
        if text.box.left > previous + CHARACTER_PX:
            previous = text.box.right
            yield x, text


def _y_ticks(ticks: Iterable[tuple[float, float]]) -> tuple[tuple[float, Text], ...]:
    found: list[tuple[float, Text]] = []
    previous = math.inf
    for value, y in ticks:
        text = text_at(f"{value:,.6g}", PLOT.left - 7, y + 4, "end")
        if text.box.bottom <= previous and text.box.top >= PLOT.top - 8:
            previous = text.box.top
            found.append((y, text))
    return tuple(found)


# --- drawing ----------------------------------------------------------------------------------


def svg(panel: Panel, *, name: str) -> str:
    """
    Draw; every text is escaped.

    Args:
        panel: What to draw.
        name: Prefix of the ids inside, unique in the page.
    """
    parts = [
        (
            f'<svg class="chart latency" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-labelledby="{escape(name)}-title {escape(name)}-desc">'
        ),
        f'<title id="{escape(name)}-title">{escape(panel.title)}</title>',
        f'<desc id="{escape(name)}-desc">{escape(describe(panel))}</desc>',
        *_draw_axes(panel),
        *_draw_levels(panel),
        *(part for one in panel.lines for part in _draw_line(one)),
        "</svg>",
    ]
    return "\n".join(parts)


def describe(panel: Panel) -> str:
    """Say in words what the drawing shows."""
    counts = [f"{count:,}" for count in panel.counts]
    lines = (
        f"{one.name} {', '.join(wording.number(value) for _, value in one.values)}"
        for one in panel.lines
    )
    where = f"{wording.listed(counts)} requests at a time"
    return f"{panel.y_title.text} at {where}: {'; '.join(lines)}."


def _draw_axes(panel: Panel) -> Iterator[str]:
    for x, text in panel.x_ticks:
        yield line("tick", x, PLOT.bottom, x, PLOT.bottom + 4)
        yield draw_text(text)
    for y, text in panel.y_ticks:
        yield line("grid", PLOT.left, y, PLOT.right, y)
        yield draw_text(text)
    yield line("axis", PLOT.left, PLOT.bottom, PLOT.right, PLOT.bottom)
    yield draw_text(panel.y_title)
    middle = (PLOT.left + PLOT.right) / 2
    yield (
        f'<text class="title" x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">'
        "requests at a time</text>"
    )


def _draw_levels(panel: Panel) -> Iterator[str]:
    for one in panel.levels:
        yield line("level", PLOT.left, one.y, PLOT.right, one.y)
        if one.label is not None:
            yield draw_text(one.label)


def _draw_line(one: Line) -> Iterator[str]:
    for x, low, high in one.whiskers:
        yield line("whisker", x, low, x, high)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in one.points)
    yield f'<polyline class="course {one.kind}" points="{points}"/>'
    for (x, y), (_, value) in zip(one.points, one.values, strict=True):
        yield (
            f'<g class="step {one.kind}"><title>{escape(one.name)}: {wording.number(value)}</title>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_POINT_PX}"/></g>'
        )
    yield draw_text(one.label)
