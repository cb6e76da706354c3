"""
What the outcomes of a set say: each quant paired with f16, item by item; pure.

An absolute score judges nothing. At 400 items its 95 % interval is 10 points wide, wider than all
but the worst damage, and it says as much about the set as about the quant. What is judged are the
items that only one of the two got right. If a quant is as good as f16, each of them fell to either
side by chance, and so many losses with so few gains have a probability that is known exactly
(McNemar). HARM: it is below `evaluate.alpha`. PASS is no proof of health: the sentence says how
much harm would have been proven.

A set on which f16 itself is not clearly above chance is VOID: guesses flip without any damage.
"Clearly" is the declared margin, and the lower end of Wilson's 95 % interval.

Source: "Accuracy is Not All You Need", arXiv 2407.09141 (flips); `stats_paired.mcnemar_p`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pipelines import stats
from pipelines.evaluate_records import EvalResult, QuantEval
from pipelines.stats_paired import mcnemar_p
from pipelines.wording import beyond, counted, declared, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.evals import EvalSet
    from pipelines.evaluate_records import Outcomes
    from pipelines.params import Evaluate

Outcome = Literal["PASS", "HARM", "VOID"]


def of_set(
    set_: EvalSet, f16: Outcomes, quants: Sequence[tuple[str, str, str, Outcomes]], by: Evaluate
) -> EvalResult:
    """
    Judge one set.

    Args:
        set_: What was asked.
        f16: What f16 got right.
        quants: Key, type, sha256 and outcomes of each quant.
        by: The declared margin and level.

    Raises:
        ValueError: Outcomes are not of the items of the set.
    """
    for outcomes in (f16, *(each[-1] for each in quants)):
        if len(outcomes) != len(set_.items) or not set(outcomes) <= {"0", "1"}:
            raise ValueError(f"{outcomes!r} are no outcomes of {len(set_.items)} items")
    is_void, sentence = canary(
        f16.count("1"), len(f16), chance=set_.chance, margin=by.canary_margin, alpha=by.alpha
    )
    return EvalResult(
        name=set_.name,
        kind=set_.declared.kind,
        set_sha256=set_.declared.sha256,
        license=set_.declared.license,
        items_count=len(set_.items),
        chance=set_.chance,
        f16_outcomes=f16,
        f16_correct_count=f16.count("1"),
        is_void=is_void,
        sentence=sentence,
        quants=tuple(
            _of_quant(key, type_, sha256, f16=f16, own=own, alpha=by.alpha, is_void=is_void)
            for key, type_, sha256, own in quants
        ),
    )


def canary(
    correct: int, count: int, *, chance: float, margin: float, alpha: float
) -> tuple[bool, str]:
    """
    Tell whether f16 is so near to chance that a set says nothing, with the sentence that says so.

    Args:
        correct: Items that f16 got right.
        count: Items of the set.
        chance: Share that guessing gets right.
        margin: What f16 has to be above that.
        alpha: Level at which quants are judged; decides what the set can show.
    """
    share = stats.wilson(correct, count)
    needed = chance + margin
    said = f"f16 got {correct:,} of {counted(count, 'item')} right ({beyond(share.share, needed)})"
    if share.share < needed or share.low <= chance:
        low = beyond(share.low, chance)
        return True, (
            f"{said}; {declared(round(needed, 12))} is required, {declared(margin)} above chance, "
            f"and all of the interval, which begins at {low}, above {number(chance)}: so the set "
            "says nothing about quants of this model."
        )
    least = least_harmed(0, alpha)
    if correct < least:
        return False, (
            f"{said}, and {counted(least, 'harmed item')} or more would prove harm: the set is too "
            "small to show any."
        )
    return False, (
        f"{said}, chance is {number(chance)}; {counted(least, 'harmed item')} without a helped one "
        "would prove harm."
    )


def least_harmed(helped: int, alpha: float) -> int:
    """Return how many harmed items prove harm beside so many helped ones: p below `alpha`."""
    # For as many helped ones p falls with each harmed one.
    low, step = helped, 1
    while mcnemar_p(low + step, helped) >= alpha:
        low, step = low + step, 2 * step
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if mcnemar_p(middle, helped) < alpha else (middle, high)
    return high


def _of_quant(  # noqa: PLR0913 - each is one independent fact
    key: str,
    type_: str,
    sha256: str,
    *,
    f16: Outcomes,
    own: Outcomes,
    alpha: float,
    is_void: bool,
) -> QuantEval:
    pairs = list(zip(f16, own, strict=True))
    harmed, helped = pairs.count(("1", "0")), pairs.count(("0", "1"))
    p_value = mcnemar_p(harmed, helped)
    outcome: Outcome = "VOID" if is_void else "HARM" if p_value < alpha else "PASS"
    return QuantEval(
        key=key,
        type=type_,
        gguf_sha256=sha256,
        outcomes=own,
        correct_count=own.count("1"),
        harmed_count=harmed,
        helped_count=helped,
        p_value=p_value,
        outcome=outcome,
        sentence=_sentence(
            outcome, harmed, helped, len(own), p_value=p_value, alpha=alpha, right=f16.count("1")
        ),
    )


def _sentence(  # noqa: PLR0913 - each is one independent fact
    outcome: Outcome,
    harmed: int,
    helped: int,
    count: int,
    *,
    p_value: float,
    alpha: float,
    right: int,
) -> str:
    flips = f"{harmed:,} harmed and {helped:,} helped of {counted(count, 'item')}"
    shown = beyond(p_value, alpha)
    if outcome == "VOID":
        return f"{flips}, which say nothing: f16 itself is not clearly above chance."
    if outcome == "HARM":
        return (
            f"{flips}: so many more losses than gains by chance have a probability of {shown}, "
            f"below {declared(alpha)}."
        )
    least = least_harmed(helped, alpha)
    power = (
        f"{least:,} harmed would have proven harm"
        if least <= right
        else f"no harm could be proven beside {helped:,} helped: f16 got only {right:,} right"
    )
    return f"{flips} (p = {shown}, limit {declared(alpha)}); {power}."
