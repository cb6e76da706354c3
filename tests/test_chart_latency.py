"""Latency over concurrency: points where the numbers are, names that never touch, words for all."""

from __future__ import annotations

import math
from itertools import combinations
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import chart_latency
from pipelines.chart_latency import PLOT, Panel, Step
from pipelines.drawing import Box


def step(concurrency: int, ttft_ms: float | None = 20.0, **changes: float | None) -> Step:
    """Build one step of the ladder."""
    fields: dict[str, float | None] = {
        "ttft_p50_ms": ttft_ms, "ttft_p95_ms": None, "ttft_max_ms": None, "tpot_p50_ms": 2.0,
    }  # fmt: skip
    fields |= changes
    speed = fields.pop("output_tok_s", 500.0) or 0.0
    return Step(concurrency=concurrency, output_tok_s=speed, **fields)


def panels(steps: list[Step], *levels: dict[str, float]) -> tuple[Panel, Panel]:
    """Place a ladder that has something to show."""
    found = chart_latency.plan(steps, title="Q4_K_M", levels=levels)
    assert found is not None
    return found


_duration = st.none() | st.floats(1e-3, 1e7)


@st.composite
def _ladders(draw: st.DrawFn) -> list[Step]:
    counts = draw(st.lists(st.integers(1, 256), min_size=2, max_size=16, unique=True))
    return [
        Step(
            concurrency=count, ttft_p50_ms=draw(st.floats(1e-3, 1e7)),
            ttft_p95_ms=draw(_duration), ttft_max_ms=draw(_duration), tpot_p50_ms=draw(_duration),
            output_tok_s=draw(st.just(0.0) | st.floats(1e-3, 1e7)),
        )
        for count in counts
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(_ladders(), st.lists(st.floats(0.1, 1e6), max_size=6))
def test_texts_never_overlap_and_stay_inside(steps: list[Step], levels: list[float]) -> None:
    """Whatever was measured and declared, no text covers another and all is in the frame."""
    declared = [{"ttft_ms": value, "tpot_ms": value / 7} for value in levels]

    for panel in panels(steps, *declared):
        frame = Box(0, 0, chart_latency.WIDTH, chart_latency.HEIGHT)
        boxes = [text.box for text in panel.texts()]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        assert all(frame.holds(box) for box in boxes)
        for x, y in (point for one in panel.lines for point in one.points):
            assert PLOT.left <= x <= PLOT.right
            assert PLOT.top - 1e-6 <= y <= PLOT.bottom + 1e-6


def test_slower_is_higher_and_more_requests_are_to_the_right() -> None:
    """The course of a line is that of the numbers, whatever the order in which they came."""
    latency, _ = panels([step(4, 80.0), step(1, 20.0), step(2, 40.0)])

    ttft = latency.lines[0].points
    assert ttft == tuple(sorted(ttft))
    assert [y for _, y in ttft] == sorted((y for _, y in ttft), reverse=True)
    assert [text.text for _, text in latency.x_ticks] == ["1", "2", "4"]


def test_steps_of_the_ladder_are_equally_far_apart() -> None:
    """Doubling has the same width everywhere, so that 1 and 2 do not stick together below 64."""
    latency, _ = panels([step(count) for count in (1, 2, 64)])

    first, second, third = (x for x, _ in latency.lines[0].points)
    assert math.isclose(second - first, third - second)


def test_a_percentile_that_no_sample_carries_has_no_line() -> None:
    """Without p95 there are two lines; with it a third, and the slowest is a thin line up."""
    without, _ = panels([step(1), step(2)])
    tail = {"ttft_p95_ms": 60.0, "ttft_max_ms": 90.0}
    with_tail, _ = panels([step(1, **tail), step(2, **tail)])

    assert [one.name for one in without.lines] == ["TTFT p50", "TPOT p50"]
    assert [one.name for one in with_tail.lines] == ["TTFT p50", "TTFT p95", "TPOT p50"]
    assert without.lines[0].whiskers == ()
    assert len(with_tail.lines[0].whiskers) == 2


def test_a_declared_level_is_drawn_where_it_is_near() -> None:
    """A level lies above what keeps it; one that is far away would only flatten the lines."""
    steps = [step(1, 20.0), step(2, 40.0)]

    near, _ = panels(steps, {"ttft_ms": 100.0, "tpot_ms": 5.0, "min_goodput": 0.95})
    far, _ = panels(steps, {"ttft_ms": 60_000.0})

    assert len(near.levels) == 2
    assert {one.label.text for one in near.levels if one.label} == {
        "TTFT level 100", "TPOT level 5",
    }  # fmt: skip
    assert near.levels[1].y < min(y for _, y in near.lines[0].points)
    assert far.levels == ()


@pytest.mark.parametrize(
    "steps", [[], [step(1)], [step(1), step(1)], [step(1), step(2, None)], [step(1), step(2, 0.0)]]
)
def test_one_step_shows_no_course(steps: list[Step]) -> None:
    """Fewer than two concurrencies with a latency make no drawing."""
    assert chart_latency.plan(steps, title="t") is None


def test_the_drawing_is_well_formed_and_told_in_words() -> None:
    """Names from records cannot become elements, and a screen reader gets every number."""
    found = chart_latency.plan(
        [step(1, 20.0, output_tok_s=510.0), step(8, 170.0, output_tok_s=640.0)],
        title="<script>alert(1)</script>",
    )
    assert found is not None
    for panel, numbers in zip(found, (["20.0", "170"], ["510", "640"]), strict=True):
        root = ET.fromstring(chart_latency.svg(panel, name="c"))
        assert {element.tag for element in root.iter()} <= {
            "svg", "title", "desc", "line", "text", "polyline", "g", "circle",
        }  # fmt: skip
        assert "<script>" in (root.findtext("title") or "")
        words = root.findtext("desc") or ""
        assert "at 1 and 8 requests at a time" in words
        assert all(number in words for number in numbers)
