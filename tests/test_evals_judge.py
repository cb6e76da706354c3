"""A quant is judged by the items that only it or only f16 gets right, never by a score."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import evals_judge
from pipelines.evals import EvalSet, ExactMatch, MultipleChoice
from pipelines.params import Eval, Evaluate
from pipelines.stats_paired import mcnemar_p

if TYPE_CHECKING:
    from pipelines.evaluate_records import EvalResult, QuantEval


def a_set(count: int, *, choices: int = 4, chance: float | None = None) -> EvalSet:
    """Make a set of so many items; with a declared `chance` of another kind."""
    declared = Eval(
        kind="multiple-choice" if chance is None else "exact-match",
        path="corpora/evals/x.jsonl",
        sha256="a" * 64,
        license="apache-2.0",
        chance=chance,
    )
    if chance is None:
        texts = tuple(f" {letter}" for letter in "abcdefgh"[:choices])
        items = [
            MultipleChoice(id=f"i{i}", prompt="A", choices=texts, answer=0) for i in range(count)
        ]
        return EvalSet(name="x", declared=declared, items=tuple(items), chance=1 / choices)
    asked = [ExactMatch(id=f"i{i}", prompt="A", answers=("b",)) for i in range(count)]
    return EvalSet(name="x", declared=declared, items=tuple(asked), chance=chance)


def judged(
    f16: str, own: str, *, by: Evaluate | None = None, chance: float | None = None
) -> EvalResult:
    """Judge one quant."""
    set_ = a_set(len(f16), chance=chance)
    return evals_judge.of_set(set_, f16, [("tiny-Q2_K", "Q2_K", "b" * 64, own)], by or Evaluate())


def the_quant(f16: str, own: str) -> QuantEval:
    """Judge one quant and return what is said of it."""
    return judged(f16, own).quants[0]


def outcomes(both: int, harmed: int, helped: int, neither: int) -> tuple[str, str]:
    """Spell the outcomes of f16 and of a quant."""
    return (
        "1" * both + "1" * harmed + "0" * helped + "0" * neither,
        "1" * both + "0" * harmed + "1" * helped + "0" * neither,
    )


def test_more_losses_than_chance_explains_are_harm_and_the_sentence_says_why() -> None:
    """12 items lost and 2 won of 100: p is that of 12 or more heads in 14 throws."""
    found = the_quant(*outcomes(60, 12, 2, 26))

    assert (found.outcome, found.harmed_count, found.helped_count) == ("HARM", 12, 2)
    assert found.p_value == pytest.approx((91 + 14 + 1) / 2**14)
    assert found.correct_count == 62
    assert found.sentence == (
        "12 harmed and 2 helped of 100 items: so many more losses than gains by chance have a "
        "probability of 0.00647, below 0.05."
    )


def test_a_lower_score_alone_is_no_harm() -> None:
    """Four items fewer of 100 are what chance makes of ten flips; the sentence has the limit."""
    found = the_quant(*outcomes(60, 7, 3, 30))

    assert found.outcome == "PASS"
    assert found.sentence == (
        "7 harmed and 3 helped of 100 items (p = 0.172, limit 0.05); 10 harmed would have proven "
        "harm."
    )


def test_a_quant_that_is_better_is_never_harmed() -> None:
    """The test is one-sided: gains are no harm, however many."""
    assert the_quant(*outcomes(60, 1, 30, 9)).outcome == "PASS"


def test_a_set_on_which_f16_is_near_chance_judges_nobody() -> None:
    """30 of 100 where guessing gets 25: all flips are noise, and even many of them are VOID."""
    found = judged(*outcomes(0, 30, 0, 70))

    assert found.is_void
    assert found.quants[0].outcome == "VOID"
    assert found.sentence == (
        "f16 got 30 of 100 items right (0.300); 0.35 is required, 0.1 above chance, and all of the "
        "interval, which begins at 0.219, above 0.250: so the set says nothing about quants of "
        "this model."
    )
    assert "f16 itself is not clearly above chance" in found.quants[0].sentence


def test_a_small_set_must_be_above_chance_with_its_whole_interval() -> None:
    """11 of 30 are 12 points above a chance of 0.25, and may still be guesses."""
    assert judged(*outcomes(11, 0, 0, 19)).is_void
    assert not judged(*outcomes(110, 0, 0, 190)).is_void


def test_the_margin_is_the_declared_one() -> None:
    """A set that passes with 10 points is void where 50 are asked for."""
    strict = Evaluate(canary_margin=0.5)

    assert not judged(*outcomes(70, 0, 0, 30)).is_void
    assert judged(*outcomes(70, 0, 0, 30), by=strict).is_void


def test_a_task_that_cannot_be_guessed_is_void_if_f16_does_none_of_it() -> None:
    """Conformance of a model that cannot write JSON: 0 of 40, and no quant is blamed."""
    assert judged("0" * 40, "0" * 40, chance=0.0).is_void
    assert not judged("1" * 40, "1" * 40, chance=0.0).is_void


def test_a_set_that_cannot_show_harm_says_so() -> None:
    """Where f16 has fewer right answers than harm takes, losing all of them proves nothing."""
    by = Evaluate(alpha=0.0001)
    found = judged(*outcomes(0, 12, 0, 8), by=by, chance=0.0)

    assert found.sentence.endswith("14 harmed items or more would prove harm: the set is too small "
                                   "to show any.")  # fmt: skip
    assert found.quants[0].outcome == "PASS"
    assert "no harm could be proven beside 0 helped" in found.quants[0].sentence


def test_outcomes_of_another_set_are_refused() -> None:
    """Too few items, or a letter that is no outcome, are a fault of ours and never a result."""
    with pytest.raises(ValueError, match="are no outcomes of 30 items"):
        evals_judge.of_set(a_set(30), "1" * 29, [], Evaluate())
    with pytest.raises(ValueError, match="are no outcomes of 30 items"):
        evals_judge.of_set(a_set(30), "1" * 30, [("k", "Q2_K", "b" * 64, "x" * 30)], Evaluate())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 120), st.floats(1e-6, 0.5))
def test_the_harm_that_is_named_is_the_least_that_would_be_proven(
    helped: int, alpha: float
) -> None:
    """With one harmed item less it would not have been."""
    least = evals_judge.least_harmed(helped, alpha)

    assert mcnemar_p(least, helped) < alpha
    assert least == helped + 1 or mcnemar_p(least - 1, helped) >= alpha


@settings(deadline=None)
@given(st.text("01", min_size=20, max_size=60), st.data())
def test_losing_one_more_item_never_improves_the_outcome(f16: str, data: st.DataObject) -> None:
    """HARM stays HARM when a right answer becomes wrong."""
    own = data.draw(st.text("01", min_size=len(f16), max_size=len(f16)))
    at = data.draw(st.integers(0, len(f16) - 1))
    worse = own[:at] + "0" + own[at + 1 :]
    rank = ["VOID", "PASS", "HARM"]

    before, after = the_quant(f16, own), the_quant(f16, worse)

    assert rank.index(after.outcome) >= rank.index(before.outcome)
    assert after.p_value <= before.p_value or f16[at] == "0"


def test_a_quant_as_good_as_f16_is_called_harmed_no_more_often_than_declared() -> None:
    """10,000 quants whose flips fall to either side by chance: at most alpha of them are HARM."""
    rng = random.Random(3)
    harms = 0
    for _ in range(10_000):
        flips = rng.randint(0, 40)
        harmed = sum(rng.random() < 0.5 for _ in range(flips))
        harms += mcnemar_p(harmed, flips - harmed) < 0.05

    assert harms / 10_000 <= 0.05


def test_every_sentence_names_numbers_and_limit() -> None:
    """Whoever reads a PASS learns what would have been a HARM."""
    for flips in ((60, 0, 0, 40), (60, 5, 5, 30), (60, 30, 0, 10)):
        sentence = the_quant(*outcomes(*flips)).sentence
        assert re.search(r"of 100 items", sentence)
        assert "0.05" in sentence
