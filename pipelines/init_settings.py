"""
Settings of benchmark and load test that a first model can keep: its context, its texts, its host.

They are the whole fleet's, so they are written when a fleet begins, and only looked at when a model
is added to one: whoever changes them measures everything again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import params, wording
from pipelines.errors import ParamsError

if TYPE_CHECKING:
    from pipelines.init_plan import Plan
    from pipelines.init_source import Subject
    from pipelines.params import Declaration

# Up to this size of vocabulary a token has so many bytes of English prose at most; rounded up, so
# that a text is never thought longer than it is. 1,024 tokens: 2.5 measured; 128,000: 4.3.
_TOKEN_BYTES: Final = ((2_048, 3.0), (40_000, 5.0), (10**9, 6.0))
_MOST_CHUNKS: Final = 100
_WINDOW_TOKENS: Final = 512
_SMALL_WINDOW_TOKENS: Final = 256
# Below, a CPU answers as fast as a card.
SMALL_PARAMETERS_COUNT: Final = 500_000_000
_LONG_CONTEXT_TOKENS: Final = 8192
_TINY_CONTEXT_TOKENS: Final = 512


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `benchmark`, `calibrate` and `load_test` of params.yaml begin with; tokens and ms."""

    prompt_tokens: int
    generate_tokens: int
    depths: tuple[int, ...]
    window_tokens: int
    chunks: int
    load_prompt_tokens: int
    load_generate_tokens: int
    ttft_ms: int
    tpot_ms: int
    e2e_ms: int


def corpus_tokens(size_bytes: int, vocabulary_tokens: int) -> int:
    """Return how many tokens a text has at least, by its size."""
    per_token = next(each for limit, each in _TOKEN_BYTES if vocabulary_tokens <= limit)
    return int(size_bytes / per_token)


def make(subject: Subject, plan: Plan, *, corpus_bytes: int) -> Settings:
    """
    Choose settings for the first model of a fleet.

    Args:
        subject: The model.
        plan: Its context and host.
        corpus_bytes: Size of the text on which divergence is measured.
    """
    context = plan.context_tokens
    is_slow = not plan.room.has_cards
    is_tiny = context <= _TINY_CONTEXT_TOKENS
    window = _SMALL_WINDOW_TOKENS if is_tiny or subject.is_encoder else _WINDOW_TOKENS
    found = corpus_tokens(corpus_bytes, subject.shape.vocabulary_tokens)
    prompt, generate = (context // 4, context // 16) if is_tiny else (512, 128)
    depth = context // 2 if is_tiny else min(1024 if is_slow else 4096, context // 2)
    load_prompt, load_generate = _load_tokens(context, is_slow=is_slow)
    small = subject.shape.parameters_count < SMALL_PARAMETERS_COUNT
    ttft, tpot = (2000, 200) if is_slow and not small else (1000, 50)
    return Settings(
        prompt_tokens=prompt,
        generate_tokens=generate,
        depths=(0, depth),
        window_tokens=window,
        chunks=max(2, min(_MOST_CHUNKS, found // window)),
        load_prompt_tokens=load_prompt,
        load_generate_tokens=load_generate,
        ttft_ms=ttft,
        tpot_ms=tpot,
        e2e_ms=ttft + tpot * load_generate,
    )


def _load_tokens(context: int, *, is_slow: bool) -> tuple[int, int]:
    """Return the length of prompts and answers, which fit the context with their template."""
    if context < _TINY_CONTEXT_TOKENS:
        return 96, 48
    if is_slow or context < _LONG_CONTEXT_TOKENS:
        return 128, 64
    return 512, 128


def require_fit(declared: Declaration, subject: Subject, plan: Plan) -> None:
    """
    See that what a fleet measures fits a model that is added to it.

    Raises:
        ParamsError: A test is longer than the context; says which setting.
    """
    benchmark, load = declared.benchmark, declared.load_test
    trained = subject.trained_tokens or plan.context_tokens
    long = max(benchmark.prompt_tokens, benchmark.generate_tokens)
    needs = {
        "benchmark.depths and prompt_tokens": (max(benchmark.depths) + long, trained),
        "benchmark.quality.context_tokens": (benchmark.quality.context_tokens, trained),
        "load_test.prompt_tokens, generate_tokens and the chat template": (
            load.prompt_tokens + load.generate_tokens + params.TEMPLATE_TOKENS,
            plan.context_tokens,
        ),
    }
    if plan.uses_matrix:
        needs["calibrate.context_tokens"] = (declared.calibrate.context_tokens, trained)
    if subject.is_encoder:
        del needs["benchmark.depths and prompt_tokens"]
    odd = [
        f"{name} take {needed:,} tokens of {room:,}"
        for name, (needed, room) in needs.items()
        if needed > room
    ]
    if odd:
        raise ParamsError(
            f"{subject.source} is too short for what this fleet measures: {wording.listed(odd)}.",
            hint="Lower these settings in params.yaml, which measures every model again, or take a "
            "model with a longer context.",
        )
