"""Paired statistics: exact intervals, four outcomes, and a known rate of false alarms."""

from __future__ import annotations

import itertools
import math
import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.compare_docs import DRIFT, EFFECTS, NOISE, PAIRS, compare, differences
from pipelines import stats_paired
from pipelines.stats_paired import Metric

if TYPE_CHECKING:
    from collections.abc import Callable

finite = st.floats(-0.5, 0.5, allow_nan=False)


# --- a machine, simulated (bench/compare_docs.py, which makes the table of docs) ----------------


def share(trials: int, holds: Callable[[random.Random], bool]) -> float:
    """Share of seeded trials in which something holds."""
    draw = random.Random(20261121)
    return sum(holds(draw) for _ in range(trials)) / trials


def test_equal_models_on_a_drifting_machine_are_hardly_ever_called_worse() -> None:
    """At 1 % noise and 0.5 % drift a process: false alarms of the whole comparison below 5 %."""
    assert share(1500, lambda draw: compare(draw, loss=0.0) == "worse") <= 0.005


def test_a_difference_of_exactly_what_matters_is_called_in_less_than_five_percent() -> None:
    """The hardest case: both metrics lose just what does not yet matter."""

    def alarmed(draw: random.Random) -> bool:
        drawn = {
            name: differences(draw, 2 * PAIRS, loss=effect) for name, effect in EFFECTS.items()
        }
        for count in (PAIRS, 2 * PAIRS):
            judged = stats_paired.judge(
                [
                    Metric(differences=tuple(drawn[name][:count]), effect=EFFECTS[name])
                    for name in EFFECTS
                ]
            )
            if "worse" in {one.outcome for one in judged}:
                return True
        return False

    assert share(1500, alarmed) <= 0.05


def test_an_interval_holds_the_truth_in_ninety_five_percent_whatever_the_drift() -> None:
    """The interval of pairs in ABBA order misses no difference in at most 5 % of the machines."""

    def missed(draw: random.Random) -> bool:
        found = stats_paired.paired_interval(differences(draw, PAIRS))
        return not found.low <= 0 <= found.high

    assert share(4000, missed) <= 0.05


def test_a_loss_of_five_percent_is_found() -> None:
    """Of real losses of 5 %, where 3 % matter, at least 85 % are called worse."""
    assert share(600, lambda draw: compare(draw, loss=0.05) == "worse") >= 0.85


def test_a_noisy_machine_is_undecided_sooner_than_wrong() -> None:
    """With 6 % noise equals are called undecided or equal, and worse in less than 1 %."""
    draw = random.Random(7)
    outcomes = [compare(draw, loss=0.0, noise=0.06) for _ in range(400)]

    assert outcomes.count("worse") <= 4
    assert outcomes.count("undecided") > 100


def test_all_of_one_side_first_takes_drift_for_a_difference() -> None:
    """The order that is not used: with the same drift it finds a difference in every trial."""

    def found_one(draw: random.Random) -> bool:
        champion = [-DRIFT * slot + draw.gauss(0, NOISE) for slot in range(PAIRS)]
        challenger = [-DRIFT * (PAIRS + slot) + draw.gauss(0, NOISE) for slot in range(PAIRS)]
        pairs = [new - old for old, new in zip(champion, challenger, strict=True)]
        return stats_paired.paired_interval(pairs).high < 0

    assert share(300, found_one) >= 0.95


def test_a_neighbour_now_and_then_costs_less_than_with_students_t() -> None:
    """Where a tenth of the processes is slowed by up to a quarter, losses are found more often."""

    def draws(draw: random.Random) -> list[float]:
        def disturbed() -> float:
            return draw.uniform(0, 0.25) if draw.random() < 0.1 else 0.0

        clean = differences(draw, 2 * PAIRS, loss=0.05)
        return [each + disturbed() - disturbed() for each in clean]

    def by_rank(draw: random.Random) -> bool:
        return stats_paired.paired_interval(draws(draw)).high < math.log(0.97)

    def by_t(draw: random.Random) -> bool:
        drawn = draws(draw)
        mean = sum(drawn) / len(drawn)
        deviation = math.sqrt(sum((each - mean) ** 2 for each in drawn) / (len(drawn) - 1))
        return mean + 2.131 * deviation / math.sqrt(len(drawn)) < math.log(0.97)

    assert share(500, by_rank) > share(500, by_t) + 0.1


# --- the pieces -------------------------------------------------------------------------------


def test_the_coverage_is_that_of_all_signs() -> None:
    """For eight pairs, counted over all 256 signs of fixed magnitudes, the interval misses 10."""
    magnitudes = (0.01, 0.021, 0.033, 0.047, 0.059, 0.071, 0.083, 0.097)
    missed = 0
    for signs in itertools.product((-1, 1), repeat=8):
        drawn = [sign * size for sign, size in zip(signs, magnitudes, strict=True)]
        found = stats_paired.paired_interval(drawn)
        missed += not found.low <= 0 <= found.high
    assert missed == 10
    assert stats_paired.paired_interval(magnitudes).coverage == 1 - 10 / 256


@given(st.lists(finite, min_size=2, max_size=20), st.floats(-0.2, 0.2))
def test_an_interval_moves_with_the_differences(drawn: list[float], shift: float) -> None:
    """The same added to every pair is added to the estimate and to both ends."""
    before = stats_paired.paired_interval(drawn)
    after = stats_paired.paired_interval([each + shift for each in drawn])

    assert before.low <= before.estimate <= before.high
    for name in ("low", "estimate", "high"):
        assert math.isclose(getattr(after, name), getattr(before, name) + shift, abs_tol=1e-9)


@given(st.lists(finite, min_size=8, max_size=12), st.floats(0, 0.2))
def test_a_slower_challenger_is_never_called_better_than_a_faster_one(
    drawn: list[float], loss: float
) -> None:
    """Taking speed away from every pair never improves the outcome."""
    order = ["worse", "undecided", "equal", "better"]

    def outcome(values: list[float]) -> str:
        (judged,) = stats_paired.judge([Metric(differences=tuple(values), effect=0.03)])
        return judged.outcome

    assert order.index(outcome([each - loss for each in drawn])) <= order.index(outcome(drawn))


def test_four_pairs_prove_nothing() -> None:
    """However clear four pairs look, chance alone does that once in sixteen times."""
    (lost,) = stats_paired.judge([Metric(differences=(-0.5, -0.5, -0.5, -0.5), effect=0.03)])
    (kept,) = stats_paired.judge([Metric(differences=(0.0, 0.0, 0.0, 0.0), effect=0.03)])

    assert lost.outcome == kept.outcome == "undecided"


def test_several_tests_are_corrected_for_their_number() -> None:
    """A loss that one test alone would show is held back where ten others show none."""
    loss = (-0.09, -0.05, -0.06, -0.07, -0.055, -0.065, -0.029, -0.028)
    alone = stats_paired.judge([Metric(differences=loss, effect=0.03)])
    none = Metric(
        differences=(0.001, -0.001, 0.002, -0.002, 0.003, 0.0, 0.001, -0.001), effect=0.03
    )
    among = stats_paired.judge([Metric(differences=loss, effect=0.03), *[none] * 10])
    free = stats_paired.judge([Metric(differences=loss, effect=0.03, is_gated=False), *[none] * 10])

    assert alone[0].outcome == "worse"
    assert (among[0].outcome, among[0].is_held) == ("undecided", True)
    assert free[0].outcome == "worse"


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.09, -0.04, "worse"),
        (-0.04, -0.01, "undecided"),
        (-0.02, 0.02, "equal"),
        (-0.02, 0.09, "equal"),
        (0.04, 0.09, "better"),
        (-0.09, 0.09, "undecided"),
    ],
)
def test_an_interval_decides_by_where_it_lies(low: float, high: float, outcome: str) -> None:
    """Worse below what matters, better above, as good where a loss that matters is excluded."""
    worst, best = math.log1p(-0.03), math.log1p(0.03)

    assert stats_paired.outcome_of(low, high, worst, best) == outcome


def test_drift_is_seen_through_a_disturbed_run() -> None:
    """A machine that loses 0.5 % a run loses 9.5 % over 21, one run at half speed or not."""
    series = [100 * math.exp(-DRIFT * slot) for slot in range(21)]
    disturbed = [*series[:5], series[5] / 2, *series[6:]]

    assert stats_paired.drift(series) == pytest.approx(math.expm1(-0.1), abs=1e-9)
    assert stats_paired.drift(disturbed) == pytest.approx(math.expm1(-0.1), abs=0.01)


def test_the_control_knows_what_a_machine_can_tell() -> None:
    """1 % of noise can tell 3 % in sixteen pairs, 20 % cannot; one bad pair of four is forgiven."""
    draw = random.Random(3)

    def median_of(noise: float) -> float:
        halves = sorted(
            stats_paired.reachable_half_width(differences(draw, 4, noise=noise), 16)
            for _ in range(200)
        )
        return halves[100]

    assert median_of(0.01) < 0.015
    assert median_of(0.20) > 0.10
    assert stats_paired.reachable_half_width([0.01, -0.01, 0.01, -0.6], 16) < 0.03
    assert stats_paired.finds_itself_different([-0.05, -0.06, -0.04], 0.03)
    assert not stats_paired.finds_itself_different([-0.05, 0.06, -0.04], 0.03)


def test_the_bootstrap_gives_the_same_every_time_and_pairs_help() -> None:
    """Equal blocks give one interval; drawn in pairs it is narrower than drawn apart."""
    draw = random.Random(5)
    champion = [draw.uniform(0.02, 0.06) for _ in range(20)]
    challenger = [each * draw.uniform(1.08, 1.12) for each in champion]
    paired = stats_paired.bootstrap_log_ratio(champion, challenger, paired=True)
    apart = stats_paired.bootstrap_log_ratio(champion, challenger, paired=False)

    assert paired == stats_paired.bootstrap_log_ratio(champion, challenger, paired=True)
    assert paired.low <= math.log(1.1) <= paired.high
    assert paired.half_width < apart.half_width / 3


def test_mcnemar_counts_coins() -> None:
    """Five losses without a gain are one of 32; losses and gains alike are chance."""
    assert stats_paired.mcnemar_p(5, 0) == 1 / 32
    assert stats_paired.mcnemar_p(0, 0) == 1.0
    assert stats_paired.mcnemar_p(3, 3) > 0.5


@pytest.mark.parametrize("bad", [[], [math.nan], [0.1, math.inf]])
def test_what_is_no_difference_is_refused(bad: list[float]) -> None:
    """Nothing, NaN and infinity are no measurements."""
    with pytest.raises(ValueError, match="no differences"):
        stats_paired.paired_interval(bad)
