"""What `fleet compare` leaves behind: champion against challenger, with every sample."""

from __future__ import annotations

from typing import Literal

from pipelines.records import Finite, MachineId, Part, Record, Validity

Outcome = Literal["better", "equal", "worse", "undecided"]


class Side(Part):
    """
    One of the two: which file, made and run by which llama.cpp.

    `source` says where it comes from in words (`HEAD~1`, `release 46b7d5b7b617`, `this checkout`).
    """

    source: str
    key: str
    type: str
    gguf_sha256: str
    f16_sha256: str
    size_bytes: int
    llama_cpp_commit: str
    toolchain_id: str


class PairSample(Part):
    """
    One pair of neighbouring processes of one test, in tokens a second.

    `order` tells which of them ran first. Medians of the repetitions that count; these are in
    `*_samples_tok_s`, without the first ones, which are dropped.
    """

    index: int
    order: Literal["AB", "BA"]
    champion_tok_s: Finite
    challenger_tok_s: Finite
    log_ratio: Finite
    champion_samples_tok_s: tuple[Finite, ...] = ()
    challenger_samples_tok_s: tuple[Finite, ...] = ()


class VoidPair(Part):
    """A pair that others disturbed, and so was measured again; never for a speed of its own."""

    phase: Literal["control", "pairs"]
    index: int
    reason: str


class SpeedComparison(Part):
    """
    One test: paired log-ratios ln(challenger / champion), their middle and its interval.

    `log_ratio_mean` is Hodges and Lehmann's estimate, the median of all means of two pairs;
    `coverage` that of the interval, 0.95 or more from six pairs on. `effect` is the relative
    difference that matters; `control_pairs` are of the champion with itself, `control_half_width`
    is half of the interval that the comparison can reach at their scatter, after a doubling;
    `drift` is the relative change of the champion over the run. Only a test that `is_gated` counts
    for the outcome of the whole.
    """

    test: Literal["prefill", "decode"]
    depth_tokens: int
    tokens: int
    effect: Finite
    pairs: tuple[PairSample, ...]
    control_pairs: tuple[PairSample, ...]
    log_ratio_mean: Finite
    log_ratio_low: Finite
    log_ratio_high: Finite
    control_half_width: Finite
    drift: Finite
    outcome: Outcome
    sentence: str
    is_gated: bool = True
    coverage: Finite = 0.95


class QualityComparison(Part):
    """
    Divergence of each from its own f16, and the difference by a bootstrap over chunks.

    `same_f16` tells whether both were made from one f16; if not, the difference is information.
    """

    same_f16: bool
    corpus_sha256: str
    chunks_count: int
    champion_kld_mean_nats: Finite
    challenger_kld_mean_nats: Finite
    log_ratio: Finite
    log_ratio_low: Finite
    log_ratio_high: Finite
    effect: Finite
    outcome: Outcome
    sentence: str


class FlipComparison(Part):
    """Items of one set that only one of the two answers rightly; McNemar's exact test."""

    name: str
    items_count: int
    lost_count: int
    won_count: int
    p_value: Finite
    outcome: Outcome
    sentence: str


class CompareRecord(Record):
    """
    Champion (A) against challenger (B) in one interleaved run on one machine.

    `outcome` is the worst of all parts: worse, undecided, equal, better. It means nothing where
    `validity` is INVALID.
    """

    stage: Literal["compare"] = "compare"
    model: str
    context_tokens: int
    champion: Side
    challenger: Side
    machine: MachineId
    validity: Validity
    speed: tuple[SpeedComparison, ...]
    quality: QualityComparison | None
    flips: tuple[FlipComparison, ...]
    outcome: Outcome
    sentence: str
    doubled: bool
    void_pairs: tuple[VoidPair, ...] = ()
    notes: tuple[str, ...] = ()
    budget_s: Finite
    wall_s: Finite
    measured_at: str
