"""The chart: every point is drawn where its numbers are, and no text covers another."""

from __future__ import annotations

import math
from itertools import combinations
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import chart
from pipelines.chart import Mark, Plan
from pipelines.drawing import Box


def mark(label: str, x: float, kld_mean_nats: float, verdict: str = "PASS") -> Mark:
    """Build a point with an interval of one percent."""
    return Mark(
        label=label, x=x, low=x * 0.99, high=x * 1.01, kld_mean_nats=kld_mean_nats,
        verdict=verdict, on_frontier=True,
    )  # fmt: skip


def drawn(marks: list[Mark], **limits: float | None) -> Plan:
    """Place points of a speed chart."""
    plan = chart.plan(
        marks, title="t", x_title="decode, tok/s", less_x_is_better=False,
        x_limit=limits.get("x_limit"), kld_limit=limits.get("kld_limit"),
    )  # fmt: skip
    assert plan is not None
    return plan


_points = st.lists(
    st.tuples(
        st.floats(90, 110) | st.floats(1e-3, 1e6),
        st.just(0.0) | st.floats(0.01, 0.02) | st.floats(1e-6, 10),
        st.sampled_from(["CHOSEN", "PASS", "REJECT"]),
    ),
    min_size=1,
    max_size=33,
)


@settings(max_examples=25, deadline=None)
@given(_points, st.none() | st.floats(1e-6, 10), st.none() | st.floats(1e-3, 1e6))
def test_texts_never_overlap_and_stay_inside(
    points: list[tuple[float, float, str]], kld_limit: float | None, x_limit: float | None
) -> None:
    """However crowded the points, labels and ticks keep apart, and everything is in the frame."""
    marks = [mark(f"IQ{i}_XXS", x, kld, verdict) for i, (x, kld, verdict) in enumerate(points)]

    plan = drawn(marks, kld_limit=kld_limit, x_limit=x_limit)

    frame = Box(0, 0, chart.WIDTH, chart.HEIGHT)
    boxes = [text.box for text in plan.texts()]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(frame.holds(text.box) for text in plan.texts() if text.kind != "tick")
    for one in plan.placed:
        assert chart.PLOT.left <= one.x <= chart.PLOT.right
        assert chart.PLOT.top <= one.y <= chart.PLOT.bottom
    for label in (one.label for one in plan.placed if one.label):
        assert all(label.box.distance(one.x, one.y) > 0 for one in plan.placed)


def test_every_quant_of_a_usual_fleet_gets_a_label() -> None:
    """A dozen quants along the usual curve are all named, with a line where it is needed."""
    marks = [mark(f"Q{i}_K_M", 80 + 4 * i, 0.001 * 1.6**i) for i in range(12)]

    assert all(one.label is not None for one in drawn(marks).placed)


def test_better_is_up_and_faster_is_right() -> None:
    """Less divergence lies higher, more speed farther right."""
    close, fast = drawn([mark("Q8_0", 100, 0.001), mark("Q2_K", 200, 0.4)]).placed

    assert close.y < fast.y
    assert close.x < fast.x


def test_a_divergence_of_zero_is_drawn() -> None:
    """Zero has no logarithm; it is put above the smallest other value, not left out."""
    same, other = drawn([mark("F16", 100, 0.0), mark("Q8_0", 200, 0.001)]).placed

    assert same.y < other.y


def test_what_cannot_be_drawn_is_left_out() -> None:
    """A value that is not finite has no place; without any point there is no chart."""
    marks = [mark("Q8_0", 100, 0.001), mark("Q2_K", math.nan, 0.4)]

    assert [one.mark.label for one in drawn(marks).placed] == ["Q8_0"]
    assert chart.plan([marks[1]], title="", x_title="", less_x_is_better=True) is None


def test_limits_are_shaded_where_they_are_near() -> None:
    """The declared ceiling is drawn at its value, between the quants that it separates."""
    plan = drawn([mark("Q8_0", 100, 0.001), mark("Q2_K", 200, 0.4)], kld_limit=0.06)

    assert plan.y_limit is not None
    assert plan.placed[0].y < plan.y_limit < plan.placed[1].y
    assert 'class="forbidden"' in chart.svg(plan, name="c")


def test_the_front_joins_what_nothing_beats_in_both_axes() -> None:
    """A point that is slower and more divergent than another one is not on the line."""
    plan = drawn([mark("A", 100, 0.001), mark("B", 150, 0.02), mark("C", 140, 0.03)])

    assert len(plan.front) == 2


@pytest.mark.parametrize("label", ["<script>alert(1)</script>", '"><a href=x>', "a&b"])
def test_drawing_is_well_formed_whatever_the_names(label: str) -> None:
    """Names from records cannot become elements, and the drawing is told in words as well."""
    text = chart.svg(drawn([mark(label, 1, 0.1), mark("B", 2, 0.2)]), name="c")

    root = ET.fromstring(text)
    assert {element.tag for element in root.iter()} <= {
        "svg", "title", "desc", "rect", "line", "text", "polyline", "g", "path", "circle",
    }  # fmt: skip
    assert root.find("desc") is not None
    assert label in (root.findtext("desc") or "")
