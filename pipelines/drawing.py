"""
What the charts of the report share: boxes, texts that know how much room they take, scales, ticks.

Colours come from the style sheet by class, so that one drawing serves light, dark and print. Every
text is escaped where it is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

FONT_PX = 12
# All monospaced faces of the style sheet advance by 0.55 to 0.61 em.
CHARACTER_PX = 0.61 * FONT_PX
LINE_PX = 15
WANTED_TICKS = 5


@dataclass(frozen=True)
class Box:
    """A rectangle in the units of the drawing."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Tell whether two boxes share more than an edge."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def distance(self, x: float, y: float) -> float:
        """Return how far a point is from the nearest edge; 0 inside."""
        return math.hypot(
            max(self.left - x, 0, x - self.right), max(self.top - y, 0, y - self.bottom)
        )

    def holds(self, other: Box) -> bool:
        """Tell whether `other` lies inside."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )


@dataclass(frozen=True, kw_only=True)
class Text:
    """A line of text and the box that it fills at most."""

    text: str
    x: float
    y: float
    anchor: str
    kind: str
    box: Box


@dataclass(frozen=True)
class Scale:
    """A straight map from values to the drawing, after `log10` if the axis is logarithmic."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return where a value lies; what is beyond an end lies at it."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def padded(values: Sequence[float], least: float) -> tuple[float, float]:
    """Return an interval around the values with some air; never empty."""
    low, high = min(values), max(values)
    air = max((high - low) * 0.12, least)
    return low - air, high + air


def linear_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers between two values."""
    raw = (high - low) / WANTED_TICKS
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step)
    ticks = (index * step for index in range(first, first + 2 * WANTED_TICKS + 2))
    return [tick for tick in ticks if tick <= high]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two powers, given as their logarithms."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1.0,) if high - low > 2.5 else (1.0, 2.0, 5.0)  # noqa: PLR2004 - decades
    ticks = (factor * 10.0**decade for decade in decades for factor in factors)
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def text_at(text: str, x: float, y: float, anchor: str, kind: str = "tick") -> Text:
    """Place a line of text; `y` is its base line."""
    width = len(text) * CHARACTER_PX
    left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    box = Box(left, y - LINE_PX + 4, left + width, y + 4)
    return Text(text=text, x=x, y=y, anchor=anchor, kind=kind, box=box)


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """Draw a straight line of a class of the style sheet."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def draw_text(text: Text) -> str:
    """Draw a text where it was placed."""
    return (
        f'<text class="{text.kind}" x="{text.x:.1f}" y="{text.y:.1f}" '
        f'text-anchor="{text.anchor}">{escape(text.text)}</text>'
    )
