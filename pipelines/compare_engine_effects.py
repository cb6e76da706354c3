"""
Which of the two made a difference: the engine, the GGUF, both, or only the two together.

Four combinations of old and new GGUF with old and new engine; ln of a speed of each is
c(gguf, engine). Measured in turns, as log-ratios d of pairs of neighbouring processes, are

    engine         e = c(old, new) - c(old, old)      the champion's GGUF on both engines
    engine_of_new  x = c(new, new) - c(new, old)      the challenger's GGUF on both engines
    both           t = c(new, new) - c(old, old)      the comparison of champion and challenger

and from these follow, without a process more,

    model          m = t - e = c(new, new) - c(old, new)     on the engine that will run it
    interaction    i = x - e     what the engine does to the one file more than to the other

A difference of two independent log-ratios that lie symmetrically around their truths lies so, too,
whichever pair of the one is taken with whichever of the other; so its interval is that of the same
signed-rank test (`pipelines.stats_paired`), of as many as the shorter of the two has. It is wider
by about the square root of two, which the numbers show. Pairs of one number ran in one order (AB or
BA), so that a steady drift goes out as well.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from pipelines import stats, stats_paired
from pipelines.compare_engine_records import Departure, Effect, EngineSpeed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.compare_engine_records import Cause
    from pipelines.compare_records import Outcome, SpeedComparison

# What the same file on another engine may answer otherwise, as mean divergence. It is what the
# gates of an 8-bit quant allow it to lose to f16: an engine that reads the same bytes has no reason
# to cost as much as a quantization. Kernels that only add up in another order stay below 0.001,
# which is as near as logits stored in 16 bits can tell (`stats_paired.NEGLIGIBLE_NATS`).
MAX_ENGINE_KLD_NATS: Final = 0.005
# The same of perplexities, where nothing else can be compared: the ratio allowed to an 8-bit quant.
MAX_ENGINE_PPL_RATIO: Final = 1.002
# Six decimals are printed: what is not above the last of them is nothing.
_ROUNDING_NATS: Final = 1.5e-6
# Standard errors are over tokens, which depend on each other: the true ones are twice as large.
_ERRORS: Final = 2 * 1.96


# --- speed ------------------------------------------------------------------------------------


def speeds(
    engine: Sequence[SpeedComparison],
    engine_of_new: Sequence[SpeedComparison] = (),
    both: Sequence[SpeedComparison] = (),
) -> tuple[EngineSpeed, ...]:
    """
    Put the measured pairs together, test by test.

    Args:
        engine: The champion's GGUF on the old (champion) and on the new engine (challenger).
        engine_of_new: The same of the challenger's GGUF; empty if not measured.
        both: The comparison of champion and challenger; empty if it is not to be believed, or if
            both are one file, so that it is `engine` itself.

    Returns:
        Each test of which `engine` has pairs.
    """
    tests = [one for one in engine if one.pairs]
    e = [_ratios(one) for one in tests]
    x = [_ratios(_same(one, engine_of_new)) for one in tests]
    t = [_ratios(_same(one, both)) for one in tests]
    judged = {
        "engine": _judged(tests, e),
        "engine_of_new": _judged(tests, x),
        "both": _judged(tests, t),
        "model": _judged(tests, [_less(*each) for each in zip(t, e, strict=True)]),
        "interaction": _judged(tests, [_less(*each) for each in zip(x, e, strict=True)]),
    }
    found = []
    for number, one in enumerate(tests):
        effects = {name: each[number] for name, each in judged.items()}
        own = effects["engine"]
        assert own is not None, "it has pairs"
        new, whole = _same(one, engine_of_new), _same(one, both)
        found.append(
            EngineSpeed(
                test=one.test,
                depth_tokens=one.depth_tokens,
                tokens=one.tokens,
                is_gated=one.is_gated,
                effect=one.effect,
                old_old_tok_s=stats.median([pair.champion_tok_s for pair in one.pairs]),
                old_new_tok_s=stats.median([pair.challenger_tok_s for pair in one.pairs]),
                new_old_tok_s=_middle(new, champion=True),
                new_new_tok_s=_middle(new, champion=False) or _middle(whole, champion=False),
                engine=own,
                engine_of_new=effects["engine_of_new"],
                model=effects["model"],
                both=effects["both"],
                interaction=effects["interaction"],
                cause=cause(
                    own.outcome,
                    _outcome(effects["model"]),
                    _outcome(effects["interaction"]),
                    is_one_file=not both and not engine_of_new,
                ),
            )
        )
    return tuple(found)


def _same(one: SpeedComparison, others: Sequence[SpeedComparison]) -> SpeedComparison | None:
    """Return the comparison of the same test, if it has pairs."""
    wanted = (one.test, one.depth_tokens, one.tokens)
    return next(
        (each for each in others if (each.test, each.depth_tokens, each.tokens) == wanted
         and each.pairs),
        None,
    )  # fmt: skip


def _ratios(one: SpeedComparison | None) -> tuple[float, ...]:
    return tuple(pair.log_ratio for pair in one.pairs) if one else ()


def _less(first: Sequence[float], second: Sequence[float]) -> tuple[float, ...]:
    """Return the differences of pairs of one number; of none if one was not measured."""
    return tuple(one - other for one, other in zip(first, second, strict=False))


def _middle(one: SpeedComparison | None, *, champion: bool) -> float | None:
    if one is None:
        return None
    return stats.median(
        [pair.champion_tok_s if champion else pair.challenger_tok_s for pair in one.pairs]
    )


def _judged(
    tests: Sequence[SpeedComparison], differences: Sequence[tuple[float, ...]]
) -> list[Effect | None]:
    """Judge one effect over all tests, the deciding ones corrected for their number."""
    metrics = {
        number: stats_paired.Metric(differences=each, effect=one.effect, is_gated=one.is_gated)
        for number, (one, each) in enumerate(zip(tests, differences, strict=True))
        if each
    }
    judged = dict(zip(metrics, stats_paired.judge(tuple(metrics.values())), strict=True))
    return [
        Effect(
            log_ratio=judged[number].interval.estimate,
            low=judged[number].interval.low,
            high=judged[number].interval.high,
            coverage=judged[number].interval.coverage,
            outcome=judged[number].outcome,
            pairs=tuple(differences[number]),
        )
        if number in judged
        else None
        for number in range(len(tests))
    ]


def _outcome(one: Effect | None) -> Outcome | None:
    return one.outcome if one else None


def cause(
    engine: Outcome | None,
    model: Outcome | None,
    interaction: Outcome | None = None,
    *,
    is_one_file: bool = False,
) -> Cause:
    """
    Say which of the two made a difference that matters.

    What is as good or better made no loss; only a loss or a gain beyond what matters is a cause.
    Nothing is concluded from what is undecided or was not measured: a cause that is shown beside
    one that is not stays `cannot tell`, since that may be both.

    Args:
        engine: Outcome of the engine on the champion's GGUF.
        model: That of the GGUF, on the new engine; None if not measured.
        interaction: That of both together beyond each by itself.
        is_one_file: Whether there is one GGUF alone, so that the engine is all that can be.
    """
    shown: frozenset[Outcome | None] = frozenset({"worse", "better"})
    unknown = {"undecided", None}.intersection({engine} if is_one_file else {engine, model})
    by_engine, by_model = engine in shown, model in shown and not is_one_file
    if by_engine and by_model:
        return "both"
    if unknown:
        return "cannot tell"
    if by_engine or by_model:
        return "engine" if by_engine else "model"
    return "interaction" if interaction in shown else "neither"


def overall(found: Sequence[EngineSpeed]) -> Cause:
    """Return the cause over the deciding tests: of several the one of the largest loss."""
    gated = [one for one in found if one.is_gated]
    causes = {one.cause for one in gated}
    if not causes:
        return "cannot tell"
    if len(causes) == 1:
        return causes.pop()
    telling = [one for one in gated if one.cause not in {"neither", "cannot tell"}]
    if not telling:
        return "cannot tell"
    return min(telling, key=lambda one: (one.both or one.engine).log_ratio).cause


def engine_outcome(
    found: Sequence[EngineSpeed], effects: Mapping[str, float] | None = None
) -> Outcome | None:
    """
    Return what the engine does to the speed of the same GGUF; None if no deciding test ran.

    Nothing is taken for better than its own numbers, held against what matters now.

    Args:
        found: The tests.
        effects: Differences that matter now, of `decode` and `prefill`; those of the record if
            None.
    """
    parts: list[Outcome] = []
    for one in found:
        if one.is_gated:
            effect = (effects or {}).get(one.test, one.effect)
            by_numbers = stats_paired.outcome_of(
                one.engine.low, one.engine.high, math.log1p(-effect), math.log1p(effect)
            )
            parts.append(worse_of(one.engine.outcome, by_numbers))
    return stats_paired.worst_of(parts) if parts else None


def worse_of(recorded: Outcome, by_numbers: Outcome) -> Outcome:
    """Return what is recorded, or what the numbers say where that is worse."""
    if recorded in {"undecided", "worse"}:
        return recorded
    return stats_paired.worst_of((recorded, by_numbers))


# --- answers ----------------------------------------------------------------------------------


def departure_interval(blocks_nats: Sequence[float]) -> tuple[float, float]:
    """
    Return the interval of a mean divergence over blocks of windows, in nats.

    The bootstrap of `stats_paired` against a reference of one nat everywhere: the ratio to one is
    the mean itself.
    """
    found = stats_paired.bootstrap_log_ratio([1.0] * len(blocks_nats), blocks_nats, paired=False)
    low, high = (math.exp(each) for each in (found.low, found.high))
    return (low if low > _ROUNDING_NATS else 0.0, high if high > _ROUNDING_NATS else 0.0)


def answers_outcome(found: Departure, limit_nats: float = MAX_ENGINE_KLD_NATS) -> Outcome:
    """
    Say whether an engine answers as the other one did with the same file.

    Divergence knows no direction: an engine that was corrected departs, too. So it is `worse` only
    if it departs by more than the limit beyond doubt and its perplexity is larger beyond doubt; a
    departure alone, or one around the limit, is `undecided`, which a person has to look at.
    Where the logits cannot be read, two perplexities decide, and can show no more than a rise.
    """
    if not found.ppl_ratio > 0:
        return "undecided"
    loss = math.log(found.ppl_ratio)
    if found.kld_high_nats is None or found.kld_low_nats is None or found.ppl_ratio_error is None:
        return "equal" if abs(loss) <= math.log(MAX_ENGINE_PPL_RATIO) else "undecided"
    if max(found.kld_high_nats, found.kld_mean_nats or 0.0) <= limit_nats:
        return "equal"
    lost = loss - _ERRORS * found.ppl_ratio_error / found.ppl_ratio > 0
    return "worse" if found.kld_low_nats > limit_nats and lost else "undecided"
