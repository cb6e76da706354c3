"""What `fleet compare` leaves of a change of the engine: results/MODEL/engine.json."""

from __future__ import annotations

from typing import Literal

from pipelines.compare_records import Outcome, Side  # noqa: TC001 - pydantic reads them
from pipelines.records import Finite, MachineId, Part, Record, Validity

Cause = Literal["engine", "model", "both", "interaction", "neither", "cannot tell"]


class Effect(Part):
    """
    What one change does to a speed: the log-ratio after / before, its interval, what follows.

    `pairs` are the log-ratios that it was computed from, one of each pair of processes; `coverage`
    that of the interval. 0.05 means 5 % faster, nearly.
    """

    log_ratio: Finite
    low: Finite
    high: Finite
    coverage: Finite
    outcome: Outcome
    pairs: tuple[Finite, ...]


class EngineSpeed(Part):
    """
    One test of the four combinations of GGUF and engine, in tokens a second, and what did it.

    `old_old` is the champion: its GGUF on its engine, `old_new` its GGUF on the new engine,
    `new_new` the challenger; None of what was not measured. `engine` is measured in turns on the
    champion's GGUF, `engine_of_new` on the challenger's, `both` is the comparison itself (champion
    against challenger). Of these follow `model`, both without the engine (on the new engine), and
    `interaction`, how far the engine does another thing to the one file than to the other.
    `effect` is the relative difference that matters.
    """

    test: Literal["prefill", "decode"]
    depth_tokens: int
    tokens: int
    is_gated: bool
    effect: Finite
    old_old_tok_s: Finite
    old_new_tok_s: Finite
    new_old_tok_s: Finite | None
    new_new_tok_s: Finite | None
    engine: Effect
    engine_of_new: Effect | None
    model: Effect | None
    both: Effect | None
    interaction: Effect | None
    cause: Cause


class Departure(Part):
    """
    How far one combination answers otherwise than the one that it is held against, over one text.

    Mean KL divergence in nats for each token, with an interval by a bootstrap over blocks of
    windows; None where the logits of one could not be read by the other. `same_top` is the share
    of tokens with the same first choice; `ppl_ratio` is its perplexity over that of the other one,
    with its standard error over tokens, None where only two perplexities are known.
    """

    kld_mean_nats: Finite | None
    kld_low_nats: Finite | None
    kld_high_nats: Finite | None
    same_top: Finite | None
    ppl_ratio: Finite
    ppl_ratio_error: Finite | None


class EngineAnswers(Part):
    """
    The answers of the combinations, each held against those of the champion on its own engine.

    `engine` is the same file on the new engine; `model` the new file on the old engine, `both` the
    challenger, as far as the vocabulary is the same. `limit_nats` is what the engine may cost.
    `outcome` speaks of the engine alone. `why_not` says what could not be compared.
    """

    corpus_sha256: str
    chunks_count: int
    context_tokens: int
    limit_nats: Finite
    engine: Departure | None
    model: Departure | None
    both: Departure | None
    outcome: Outcome
    sentence: str
    why_not: tuple[str, ...] = ()


class ReleaseTest(Part):
    """
    A release on the new engine, held against the old engine with the same file.

    `loads` is None where nobody could try. `decode_ratio` is one process of each engine: it is
    information and decides nothing. `outcome`: `equal`, `worse` (it does not load, or answers
    otherwise and worse), `undecided`.
    """

    release: str
    is_stable: bool
    type: str
    gguf_sha256: str
    size_bytes: int
    made_with: str
    loads: bool | None
    answers: Departure | None
    decode_ratio: Finite | None
    outcome: Literal["equal", "worse", "undecided"]
    sentence: str


class EngineRecord(Record):
    """
    The engine as an axis of its own: what it does on the same GGUF, and to what was released.

    The old engine is that of `champion`, the new one that of `challenger`; both sides are those of
    compare.json, and the record counts only with that one. `validity` is that of the speeds alone:
    what was answered depends on no neighbour. `left_out` says what there was no time for.
    """

    stage: Literal["engine"] = "engine"
    model: str
    context_tokens: int
    champion: Side
    challenger: Side
    machine: MachineId
    validity: Validity
    speed: tuple[EngineSpeed, ...]
    answers: EngineAnswers | None
    releases: tuple[ReleaseTest, ...]
    releases_note: str
    releases_problem: str
    left_out: tuple[str, ...]
    outcome: Outcome
    cause: Cause
    sentence: str
    notes: tuple[str, ...] = ()
    budget_s: Finite
    wall_s: Finite
    measured_at: str
