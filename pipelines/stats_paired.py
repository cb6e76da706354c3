"""
The statistics of a comparison: pairs of neighbouring measurements, and nothing that assumes more.

Two programs that run one after the other share the state of the machine; two that run an hour apart
do not. So what is compared is each pair by itself, d = ln(challenger / champion), and the order
within the pairs alternates (AB, BA, AB, ...): a machine that steadily becomes slower adds the same
to one half of the differences as it takes from the other.

The difference is estimated by Hodges and Lehmann's median of the pairwise means, its interval is
that of Wilcoxon's signed-rank test. Both need only that d lies symmetrically around the truth,
which pairs of exchangeable processes give whatever the shape of the noise, and the interval is
exact for any number of pairs. Against Student's t it costs 4 % of power where noise is normal and
wins where a neighbour takes the machine now and then: with a tenth of the processes up to 25 %
slower, a true loss of 5 % is called in 70 % of 16 pairs instead of 36 % (simulated in
tests/test_stats_paired.py).

Source: Hollander, Wolfe and Chicken, Nonparametric Statistical Methods, 3rd edition, 3.1-3.3;
Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979), 65-70.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal

from pipelines import stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.compare_records import Outcome

ALPHA: Final = 0.05
Order = Literal["AB", "BA"]

# Resamples of the bootstrap: the ends of its interval are then exact to a tenth of its width.
RESAMPLES: Final = 2000
SEED: Final = 1
# Logits are stored in 16 bits: an f16 differs from itself by up to 0.0006 nats (Llama-3-8B, in
# llama.cpp's tools/perplexity/README). Two models below this are as good as their f16.
NEGLIGIBLE_NATS: Final = 1e-3
# Rounding of what was printed can make a mean divergence of nearly nothing zero or negative.
_NOTHING: Final = 1e-6


def order_of(index: int) -> Order:
    """Say which side of a pair runs first: AB, BA, AB, ... so that steady drift cancels."""
    return "BA" if index % 2 else "AB"


def log_ratio(champion: float, challenger: float) -> float:
    """
    Return ln(challenger / champion).

    Raises:
        ValueError: One is not a positive finite number.
    """
    if not (0 < champion < math.inf and 0 < challenger < math.inf):
        raise ValueError(f"{champion} and {challenger} are no two speeds")
    return math.log(challenger / champion)


# --- the difference and its interval ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PairedInterval:
    """
    The difference and the interval [low, high] that covers the true one with `coverage`.

    `coverage` is exact: 0.961 of eight pairs, 0.955 of sixteen; of fewer than six it stays below
    0.95 and the interval is the whole range.
    """

    estimate: float
    low: float
    high: float
    coverage: float

    @property
    def half_width(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2


def paired_interval(differences: Sequence[float], alpha: float = ALPHA) -> PairedInterval:
    """
    Return Hodges and Lehmann's estimate and the interval of the signed-rank test.

    Of the n (n + 1) / 2 means of two differences (each with itself, too) the estimate is the
    median; the interval leaves out the k smallest and the k largest, where k is the largest with
    2 P(W < k) <= alpha, and W is the signed-rank statistic of n pairs.

    Raises:
        ValueError: There are no differences, or one is not finite.
    """
    if not differences or not all(math.isfinite(each) for each in differences):
        raise ValueError(f"these are no differences: {list(differences)}")
    count = len(differences)
    means = sorted(
        (differences[i] + differences[j]) / 2 for i in range(count) for j in range(i, count)
    )
    below = _cumulative(count)
    cut = 0
    while 2 * (cut + 1) < len(means) and 2 * below[cut] <= alpha:
        cut += 1
    missed = 2 * below[cut - 1] if cut else 2 * below[0]
    # With nothing left out the interval is [smallest, largest]: it misses if W is 0.
    cut = max(cut, 1)
    return PairedInterval(
        estimate=stats.median(means),
        low=means[cut - 1],
        high=means[len(means) - cut],
        coverage=1 - missed,
    )


def p_below(differences: Sequence[float], limit: float) -> float:
    """Probability of differences so far below `limit` if the true one were not below it."""
    return _tail([each - limit for each in differences])


def p_above(differences: Sequence[float], limit: float) -> float:
    """Probability of differences so far above `limit` if the true one were not above it."""
    return _tail([limit - each for each in differences])


def _tail(shifted: Sequence[float]) -> float:
    """P(W <= w), where w is the sum of the ranks of those that are above zero."""
    # Of equal ones those above zero get the higher ranks: a tie never makes a claim easier.
    ranked = sorted(shifted, key=lambda each: (abs(each), each >= 0))
    above = sum(rank for rank, each in enumerate(ranked, 1) if each >= 0)
    return _cumulative(len(shifted))[above]


@lru_cache(maxsize=256)
def _cumulative(count: int) -> tuple[float, ...]:
    """
    P(W <= w) of the signed-rank statistic of `count` pairs, for every w.

    Each of the ranks 1 to n is in the sum or not, with probability 1/2: ways by generating
    function, in whole numbers, so exact.
    """
    ways = [1]
    for rank in range(1, count + 1):
        longer = ways + [0] * rank
        for value, number in enumerate(ways):
            longer[value + rank] += number
        ways = longer
    total, found = 0, []
    for number in ways:
        total += number
        found.append(total / (1 << count))
    return tuple(found)


# --- the outcome ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Metric:
    """
    One test of a comparison.

    Attributes:
        differences: ln(challenger / champion) of each pair; more is better.
        effect: Relative difference that matters, such as 0.03.
        is_gated: Whether the outcome of the comparison depends on it.
    """

    differences: tuple[float, ...]
    effect: float
    is_gated: bool = True

    @property
    def worst(self) -> float:
        """Log-ratio below which the challenger is worse: ln(1 - effect)."""
        return math.log1p(-self.effect)

    @property
    def best(self) -> float:
        """Log-ratio above which it is better: ln(1 + effect)."""
        return math.log1p(self.effect)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The interval of one metric and what follows; `is_held` tells that Holm kept it back."""

    interval: PairedInterval
    outcome: Outcome
    is_held: bool = False


def judge(metrics: Sequence[Metric]) -> tuple[Judgement, ...]:
    """
    Give each metric one of four outcomes; the gated ones are corrected for their number (Holm).

    worse: the interval lies below -effect. better: above +effect. equal: above -effect, so that
    the challenger is as good or better. undecided: anything else, that is, a loss that matters is
    neither shown nor excluded.

    `worse` and `better` are claims of a difference, of which each further metric offers another
    chance to be wrong; so they hold only if they survive Holm's procedure over the gated metrics.
    `equal` of the whole needs it of every metric, which is no chance but a condition more.

    Raises:
        ValueError: A metric has no differences.
    """
    intervals = [paired_interval(each.differences) for each in metrics]
    p_values = [
        2 * min(p_below(each.differences, each.worst), p_above(each.differences, each.best))
        for each in metrics
    ]
    gated = [number for number, each in enumerate(metrics) if each.is_gated]
    shown = _holm({number: p_values[number] for number in gated})
    found = []
    for number, (metric, interval) in enumerate(zip(metrics, intervals, strict=True)):
        outcome = outcome_of(interval.low, interval.high, metric.worst, metric.best)
        held = metric.is_gated and outcome in {"worse", "better"} and number not in shown
        if held:
            # What is above -effect stays as good: only that it is better is not shown.
            outcome = "equal" if outcome == "better" else "undecided"
        if outcome == "equal" and 2 * p_above(metric.differences, metric.worst) > ALPHA:
            outcome = "undecided"  # fewer than six pairs exclude nothing
        found.append(Judgement(interval=interval, outcome=outcome, is_held=held))
    return tuple(found)


def outcome_of(low: float, high: float, worst: float, best: float) -> Outcome:
    """Place an interval of log-ratios, of which more is better, between the two limits."""
    if high < worst:
        return "worse"
    if low > best:
        return "better"
    return "equal" if low > worst else "undecided"


def outcome_of_rise(low: float, high: float, effect: float) -> Outcome:
    """Place an interval of log-ratios of which less is better: the limits change places."""
    return outcome_of(-high, -low, -math.log1p(effect), -math.log1p(-min(effect, 0.99)))


def _holm(p_values: dict[int, float], alpha: float = ALPHA) -> frozenset[int]:
    """Return what is shown: the smallest p at alpha / m, the next at alpha / (m - 1), ..."""
    shown: set[int] = set()
    for left, number in zip(
        range(len(p_values), 0, -1), sorted(p_values, key=lambda n: p_values[n]), strict=True
    ):
        if p_values[number] > alpha / left:
            break
        shown.add(number)
    return frozenset(shown)


_WORST_FIRST: Final[tuple[Outcome, ...]] = ("worse", "undecided", "equal", "better")


def worst_of(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the worst of several outcomes; of none nothing can be said."""
    return min(outcomes, key=_WORST_FIRST.index, default="undecided")


# --- what the machine can tell ----------------------------------------------------------------

# Half of a 95 % interval of n pairs of scatter s is about 2.3 s / sqrt(n): Student's 2.13 to 2.36
# for 8 to 16 pairs, and the 2 % that the signed-rank interval is wider.
_HALF_WIDTH: Final = 2.3
# The median deviation of a normal scatter is 0.6745 of it; of so few values it comes out too small.
# Source: Croux and Rousseeuw, Time-efficient algorithms for two highly robust estimators of scale,
# Computational Statistics 1 (1992), 411-428.
_MEDIAN_DEVIATION: Final = 1.4826
_SMALL_SAMPLE: Final = {2: 1.196, 3: 1.495, 4: 1.363, 5: 1.206, 6: 1.200, 7: 1.140, 8: 1.129}


def reachable_half_width(control: Sequence[float], pairs: int) -> float:
    """
    Return about half of the interval that so many pairs reach where the control scatters so.

    The scatter is the median deviation from the median, so that one disturbed pair of four does
    not condemn the machine.

    Raises:
        ValueError: There are fewer than two differences.
    """
    if len(control) < 2:  # noqa: PLR2004 - one has no scatter
        raise ValueError("one pair has no scatter")
    middle = stats.median(control)
    deviation = stats.median([abs(each - middle) for each in control])
    scatter = _MEDIAN_DEVIATION * _SMALL_SAMPLE.get(len(control), 1.1) * deviation
    return _HALF_WIDTH * scatter / math.sqrt(pairs)


def finds_itself_different(control: Sequence[float], effect: float) -> bool:
    """Tell whether every pair of the champion with itself differs by more than what matters."""
    return max(control) < math.log1p(-effect) or min(control) > math.log1p(effect)


def drift(series: Sequence[float]) -> float:
    """
    Return the relative change of one program over its runs: -0.04 means 4 % slower at the end.

    Theil and Sen's slope of the logarithm, the median of all slopes between two runs, times the
    number of steps: a single disturbed run does not move it.

    Raises:
        ValueError: There are fewer than two, or one is not positive.
    """
    count = len(series)
    if count < 2 or min(series) <= 0:  # noqa: PLR2004 - one has no slope
        raise ValueError("a drift needs two positive speeds")
    logs = [math.log(each) for each in series]
    slopes = [(logs[j] - logs[i]) / (j - i) for i in range(count) for j in range(i + 1, count)]
    return math.expm1(stats.median(slopes) * (count - 1))


# --- divergence -------------------------------------------------------------------------------


def bootstrap_log_ratio(
    champion: Sequence[float],
    challenger: Sequence[float],
    *,
    paired: bool,
    alpha: float = ALPHA,
    seed: int = SEED,
) -> PairedInterval:
    """
    Return ln(mean challenger / mean champion) and its percentile interval by resampling blocks.

    Tokens of one window depend on each other, blocks of windows hardly do: whole blocks are drawn,
    of both at the same places where both read the same text against the same reference (`paired`).

    Args:
        champion: Mean divergence of each block.
        challenger: The same; of the same blocks if `paired`.
        paired: Whether the blocks belong together.
        alpha: One less the coverage.
        seed: Of the draws: equal input gives an equal interval.

    Raises:
        ValueError: There are fewer than two blocks, or paired ones of another number.
    """
    if min(len(champion), len(challenger)) < 2:  # noqa: PLR2004 - one has no scatter
        raise ValueError("a bootstrap needs two blocks")
    if paired and len(champion) != len(challenger):
        raise ValueError("paired blocks are of one number")

    def ratio(first: Sequence[int], second: Sequence[int]) -> float:
        below = sum(champion[i] for i in first) / len(first)
        above = sum(challenger[i] for i in second) / len(second)
        return math.log(max(above, _NOTHING) / max(below, _NOTHING))

    draw = random.Random(seed)  # noqa: S311 - no secret; it has to be the same every time
    old, new = range(len(champion)), range(len(challenger))
    found = []
    for _ in range(RESAMPLES):
        first = draw.choices(old, k=len(old))
        found.append(ratio(first, first if paired else draw.choices(new, k=len(new))))
    found.sort()
    cut = math.floor(RESAMPLES * alpha / 2)
    return PairedInterval(
        estimate=ratio(old, new), low=found[cut], high=found[-1 - cut], coverage=1 - alpha
    )


# --- items ------------------------------------------------------------------------------------


def mcnemar_p(lost: int, won: int) -> float:
    """
    Return the probability of so many losses or more among lost + won items by chance (one-sided).

    McNemar's exact test: of the items that only one of two got right, each goes to either with
    probability 1/2. 1.0 if there are none.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions or
    percentages, Psychometrika 12 (1947), 153-157.

    Raises:
        ValueError: A number is negative.
    """
    if min(lost, won) < 0:
        raise ValueError(f"{lost} and {won} are no numbers of items")
    count = lost + won
    return sum(math.comb(count, k) for k in range(lost, count + 1)) / (1 << count)
