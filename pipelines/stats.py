"""
The statistics of a few repeated measurements: median, its interval, spread; and of counted shares.

Nothing here assumes a distribution. Throughput samples are skewed (noise only ever slows down) and
there are three to twenty of them, too few to check any assumption and too few for a bootstrap: of
n = 5 samples a resampled median takes at most five values. Order statistics are exact instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class MedianInterval:
    """
    A median and the interval [low, high] that covers the true one with probability `coverage`.

    `coverage` is exact, not nominal. It reaches 0.95 from six samples on; for fewer the interval
    is the whole range and covers less: 0.9375 of five, 0.875 of four, 0.75 of three.
    """

    median: float
    low: float
    high: float
    coverage: float


def median(samples: Sequence[float]) -> float:
    """
    Return the middle sample, or the mean of the two in the middle.

    Raises:
        ValueError: There are no samples, or one is not finite.
    """
    ordered = _ordered(samples)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> MedianInterval:
    """
    Return the median with the narrowest symmetric interval of order statistics that covers it.

    The number of samples below the true median is Binomial(n, 1/2), whatever the (continuous)
    distribution of a sample. So the interval from the k-th smallest to the k-th largest sample
    misses the true median with probability 2 P(Binomial(n, 1/2) < k), and the largest k for which
    that is at most 1 - `confidence` gives the interval. n = 9: k = 2, coverage 1 - 20/512 = 0.961.

    It presumes that samples are exchangeable; a slow drift through the run makes it too narrow.

    Source: David and Nagaraja, Order Statistics, 3rd edition, section 7.1.

    Raises:
        ValueError: There are no samples, or one is not finite.
    """
    ordered = _ordered(samples)
    count = len(ordered)
    rank = 1
    while 2 * (rank + 1) <= count and _coverage(count, rank + 1) >= confidence:
        rank += 1
    return MedianInterval(
        median=median(ordered),
        low=ordered[rank - 1],
        high=ordered[count - rank],
        coverage=_coverage(count, rank),
    )


def _coverage(count: int, rank: int) -> float:
    """Probability that the true median lies between the rank-th smallest and largest samples."""
    missed = 2 * sum(math.comb(count, below) for below in range(rank))
    return max(0.0, 1 - missed / (1 << count))


def spread(samples: Sequence[float]) -> float:
    """
    Return (largest - smallest) / median of the samples, 0 if all are equal.

    Raises:
        ValueError: There are no samples, one is not finite, or the median is not positive.
    """
    ordered = _ordered(samples)
    middle = median(ordered)
    if middle <= 0:
        raise ValueError(f"the median of {list(samples)} is not positive")
    return (ordered[-1] - ordered[0]) / middle


def _ordered(samples: Sequence[float]) -> list[float]:
    if not samples:
        raise ValueError("there are no samples")
    if not all(math.isfinite(sample) for sample in samples):
        raise ValueError(f"a sample is not finite: {list(samples)}")
    return sorted(samples)


# --- shares -----------------------------------------------------------------------------------

# Standard normal quantile of 0.975.
_Z: Final = 1.959963984540054
# A share this close to its limit is not decided by measuring.
MOST_REQUESTS: Final = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A share and the two-sided interval [low, high] that covers the true one in 95 % of cases."""

    share: float
    low: float
    high: float


def wilson(successes: int, count: int) -> Interval:
    """
    Return the share of successes with Wilson's score interval.

    It holds for few requests and for shares near 0 and 1, where the common one (share plus and
    minus a multiple of its deviation) is empty or leaves [0, 1]. 73 of 73 give 0.950 to 1.

    Source: E. B. Wilson, Probable inference, JASA 22 (1927), 209-212.

    Raises:
        ValueError: There are no requests, or more successes than requests, or fewer than none.
    """
    _check_share(successes, count)
    share = successes / count
    square = _Z * _Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    half /= 1 + square / count
    # The ends of an interval around 0 or 1 are exactly those; floating point misses by 1e-17.
    return Interval(
        share=share,
        low=0.0 if successes == 0 else max(0.0, middle - half),
        high=1.0 if successes == count else min(1.0, middle + half),
    )


def requests_to_decide(successes: int, count: int, limit: float) -> int | None:
    """
    Return how many more requests with the same share of successes would decide about `limit`.

    Wilson's interval of a share p of n requests holds `limit` as long as
    |p - limit| <= z sqrt(limit (1 - limit) / n), so that n > z^2 limit (1 - limit) / (p - limit)^2
    decides. 0 if the interval excludes the limit already; at most `MOST_REQUESTS`, which then means
    "that many or more".

    Returns:
        The number, or None if the share equals the limit: then none would.

    Raises:
        ValueError: The share is none, or the limit lies not between 0 and 1.
    """
    _check_share(successes, count)
    if not 0 < limit < 1:
        raise ValueError(f"a limit of {limit} is no share between 0 and 1")
    distance = successes / count - limit
    if math.isclose(distance, 0, abs_tol=1e-12):
        return None
    needed = math.floor(_Z * _Z * limit * (1 - limit) / (distance * distance)) + 1
    return min(max(0, needed - count), MOST_REQUESTS)


def _check_share(successes: int, count: int) -> None:
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"{successes} of {count} is no share")
