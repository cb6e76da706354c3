"""What `evaluate` leaves behind: the declared tasks, item by item, paired with f16."""

from __future__ import annotations

from typing import Literal

from pipelines.records import Finite, Part, Record

# By whom an item was answered rightly, one character each, in the order of the set: `1` or `0`.
Outcomes = str


class QuantEval(Part):
    """
    One quant on one set, paired with f16.

    `harmed_count` items only f16 got right, `helped_count` only the quant. `p_value` is that of
    McNemar's exact test, one-sided: so many more losses than gains by chance.

    PASS: no proof of harm. HARM: `p_value` below `evaluate.alpha`. VOID: the set says nothing,
    since f16 itself is not clearly above chance.
    """

    key: str
    type: str
    gguf_sha256: str
    outcomes: Outcomes
    correct_count: int
    harmed_count: int
    helped_count: int
    p_value: Finite
    outcome: Literal["PASS", "HARM", "VOID"]
    sentence: str


class EvalResult(Part):
    """One set: what it is, what f16 made of it, and every quant."""

    name: str
    kind: str
    set_sha256: str
    license: str
    items_count: int
    chance: Finite
    f16_outcomes: Outcomes
    f16_correct_count: int
    is_void: bool
    sentence: str
    quants: tuple[QuantEval, ...]


class EvaluateRecord(Record):
    """All sets that a model declares; without one, `sets` is empty."""

    stage: Literal["evaluate"] = "evaluate"
    model: str
    f16_sha256: str
    llama_cpp_commit: str
    recipe: int
    alpha: Finite
    canary_margin: Finite
    sets: tuple[EvalResult, ...]
