"""A median is reported with an interval whose coverage is known, however few samples there are."""

from __future__ import annotations

import math
import random

import pytest

from pipelines import stats


def test_median_of_odd_and_even_counts() -> None:
    """The middle sample, or the mean of the two in the middle, whatever their order."""
    assert stats.median([3.0, 1.0, 2.0]) == 2.0
    assert stats.median([4.0, 1.0, 2.0, 3.0]) == 2.5
    assert stats.median([7.0]) == 7.0


@pytest.mark.parametrize(
    ("count", "rank", "coverage"),
    [
        # 1 - 2 * sum(C(n, i), i < rank) / 2^n, by hand
        (1, 1, 0.0),
        (3, 1, 0.75),
        (4, 1, 0.875),
        (5, 1, 0.9375),
        (6, 1, 0.96875),
        (8, 1, 0.9921875),
        (9, 2, 1 - 2 * (1 + 9) / 512),
        (12, 3, 1 - 2 * (1 + 12 + 66) / 4096),
        (20, 6, 1 - 2 * (1 + 20 + 190 + 1140 + 4845 + 15504) / 1048576),
    ],
)
def test_interval_is_the_narrowest_that_covers_95_percent(
    count: int, rank: int, coverage: float
) -> None:
    """The interval reaches from the rank-th smallest to the rank-th largest sample."""
    interval = stats.median_interval([float(number) for number in range(1, count + 1)])

    assert (interval.low, interval.high) == (rank, count + 1 - rank)
    assert interval.coverage == pytest.approx(coverage)


def test_interval_of_few_samples_is_their_whole_range() -> None:
    """Five samples carry 93.75 % and no more, so nothing of their range is cut away."""
    interval = stats.median_interval([10.0, 30.0, 20.0, 50.0, 40.0])

    assert (interval.low, interval.median, interval.high) == (10.0, 30.0, 50.0)
    assert interval.coverage < stats.CONFIDENCE


def test_interval_keeps_its_promise_on_skewed_samples() -> None:
    """Of 4,000 runs of 12 skewed samples the true median is missed in 3.9 % as computed."""
    source = random.Random(7)
    true_median = math.log(2)  # of the exponential distribution with mean 1
    covered = 0
    for _ in range(4000):
        interval = stats.median_interval([source.expovariate(1.0) for _ in range(12)])
        covered += interval.low <= true_median <= interval.high

    assert covered / 4000 == pytest.approx(1 - 2 * 79 / 4096, abs=0.01)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_no_statistic_of_nothing_or_of_what_is_no_number(bad: list[float]) -> None:
    """Absent and non-finite samples are refused by every function."""
    for function in (stats.median, stats.median_interval, stats.spread):
        with pytest.raises(ValueError, match=r"no samples|not finite"):
            function(bad)


def test_spread() -> None:
    """The whole range in units of the median; equal samples have none."""
    assert stats.spread([90.0, 100.0, 120.0]) == pytest.approx(0.3)
    assert stats.spread([5.0, 5.0]) == 0.0
    with pytest.raises(ValueError, match="not positive"):
        stats.spread([-1.0, 0.0, 1.0])
