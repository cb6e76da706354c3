"""
Where the task evals prove that a quant is worse than f16: what `choose` and the verdict go by.

A record is never taken for better than its own numbers: a quant whose p-value lies under the level
counts as harmed, whatever the record calls it. A set at which f16 itself is not clearly above
chance proves nothing, neither way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import wording

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.evaluate_records import EvalResult, EvaluateRecord, QuantEval


def found(
    record: EvaluateRecord, type_: str, gguf_sha256: str
) -> Iterator[tuple[EvalResult, QuantEval]]:
    """Yield each set on which this very file of a quant is harmed, with what was counted."""
    for one in record.sets:
        for quant in one.quants:
            is_it = (quant.type, quant.gguf_sha256) == (type_, gguf_sha256)
            if is_it and is_harm(one, quant, record.alpha):
                yield one, quant


def is_harm(one: EvalResult, quant: QuantEval, alpha: float) -> bool:
    """Tell whether a quant lost more items of a set than chance explains."""
    if quant.outcome == "HARM":
        return True
    is_void = one.is_void or quant.outcome == "VOID"
    return not is_void and not quant.p_value >= alpha


def clause(one: EvalResult, quant: QuantEval, alpha: float) -> str:
    """Say it with value and limit, as a clause."""
    p, level = wording.beyond(quant.p_value, alpha), wording.declared(alpha)
    return (
        f"{quant.type} is harmed on eval {one.name}: of {one.items_count:,} items it lost "
        f"{quant.harmed_count:,} that f16 gets right and won {quant.helped_count:,}; "
        f"p = {p} is under the limit {level} (evaluate.alpha)"
    )
