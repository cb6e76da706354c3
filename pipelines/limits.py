"""
What a quant has to keep: the declared gates, and the memory of a host.

A limit that cannot be judged is not kept, but it is no miss either: the quant is in doubt.

Some limits speak of models that go on with texts, some of encoders. A limit on the other kind is
none of a quant; what was left out is said in a note of the choice. No encoder is chosen without a
limit on its quality: where none is declared, `DEFAULT_MIN_COSINE_MEAN` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipelines import wording

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipelines.evidence import Measured, Trusted
    from pipelines.params import ChooseSlice, Gates, Host


# Fewer leave too few above a 99.9th percentile. 400 chunks of 512 tokens score 102,000 to 102,400.
P999_LEAST_TOKENS = 100_000


# A convention, not a measurement: the choice says so in a note where it holds.
DEFAULT_MIN_COSINE_MEAN = 0.99

Of = Literal["decoders", "encoders", "all"]


@dataclass(frozen=True)
class Gate:
    """One limit of the declaration: what it limits, in words and in numbers, of which models."""

    words: str
    unit: str
    read: Callable[[Trusted], float | None]
    is_floor: bool = False
    of: Of = "decoders"


def _tail(quant: Trusted) -> float | None:
    """Return the percentile if it rests on enough tokens."""
    quality = quant.logits
    enough = quality is not None and quality.scored_tokens >= P999_LEAST_TOKENS
    return quality.kld_p999_nats if quality is not None and enough else None


def _value(measured: Measured | None) -> float | None:
    return measured.value if measured else None


GATES: dict[str, Gate] = {
    "max_kld_mean_nats": Gate("mean divergence", " nats", lambda q: _value(q.kld_mean_nats)),
    "max_kld_p999_nats": Gate("99.9th percentile of the divergence", " nats", _tail),
    "min_same_top": Gate(
        "share of equal top tokens",
        "",
        lambda q: q.logits.same_top if q.logits else None,
        is_floor=True,
    ),
    "max_ppl_ratio": Gate(
        "perplexity ratio", "", lambda q: q.logits.ppl_ratio if q.logits else None
    ),
    "min_cosine_mean": Gate(
        "mean cosine of the embeddings",
        "",
        lambda q: q.embeddings.cosine_mean if q.embeddings else None,
        is_floor=True,
        of="encoders",
    ),
    "min_decode_tok_s": Gate(
        "decode speed", " tok/s", lambda q: _value(q.decode_tok_s), is_floor=True
    ),
    "min_prefill_tok_s": Gate(
        "prefill speed", " tok/s", lambda q: _value(q.prefill_tok_s), is_floor=True, of="all"
    ),
    "max_size_mib": Gate("file size", " MiB", lambda q: q.size_mib.value, of="all"),
}
_WHY_UNJUDGED = {
    "max_kld_p999_nats": f"fewer than {P999_LEAST_TOKENS:,} tokens were scored",
    "min_prefill_tok_s": "prefill was not measured at depth 0",
}


@dataclass(frozen=True)
class Miss:
    """A limit that is not kept, and by how much of itself."""

    text: str
    excess: float


def applying(gates: Gates, *, to_encoder: bool) -> dict[str, float]:
    """Return the limits that a model has to keep, by name, with what holds where none is stated."""
    kinds = {"all", "encoders" if to_encoder else "decoders"}
    declared = gates.model_dump(exclude_none=True)
    limits = {name: limit for name, limit in declared.items() if GATES[name].of in kinds}
    return {"min_cosine_mean": DEFAULT_MIN_COSINE_MEAN} | limits if to_encoder else limits


def gate_notes(gates: Gates, *, to_encoder: bool) -> tuple[str, ...]:
    """Say which declared limits are none of a model, and which holds although undeclared."""
    declared = gates.model_dump(exclude_none=True)
    other, does, why = (
        ("decoders", "makes embeddings", "go on with texts")
        if to_encoder
        else ("encoders", "goes on with texts", "make embeddings")
    )
    left_out = [name for name in declared if GATES[name].of == other]
    notes = []
    if left_out:
        verb = "speaks" if len(left_out) == 1 else "speak"
        notes.append(
            f"{wording.listed(left_out)} {verb} of models that {why}; this one {does} and was not "
            "judged by that."
        )
    if to_encoder and gates.min_cosine_mean is None:
        notes.append(
            f"No min_cosine_mean is declared, so {wording.declared(DEFAULT_MIN_COSINE_MEAN)} holds."
        )
    return tuple(notes)


def misses(quant: Trusted, gates: Gates) -> tuple[list[Miss], list[str]]:
    """Return the limits that a quant misses, and those that nobody can judge."""
    missed: list[Miss] = []
    unjudged: list[str] = []
    for name, limit in applying(gates, to_encoder=quant.is_encoder).items():
        gate = GATES[name]
        value = gate.read(quant)
        if value is None:
            unjudged.append(f"{name} cannot be judged: {_WHY_UNJUDGED[name]}")
        elif gate.is_floor and not value >= limit:
            missed.append(Miss(_say_miss(gate, name, value, limit), limit / max(value, 1e-9) - 1))
        elif not gate.is_floor and not value <= limit:
            missed.append(Miss(_say_miss(gate, name, value, limit), value / limit - 1))
    return missed, unjudged


def _say_miss(gate: Gate, name: str, value: float, limit: float) -> str:
    side = "under" if gate.is_floor else "over"
    return (
        f"{gate.words} {wording.beyond(value, limit)}{gate.unit} is {side} "
        f"the limit {wording.declared(limit)} ({name})"
    )


def memory_miss(quant: Trusted, slice_: ChooseSlice, host: str) -> list[Miss]:
    """Say by how many MiB a quant exceeds a host; a host without a limit takes everything."""
    spec = slice_.hosts[host]
    limit = memory_limit_mib(spec)
    if limit is None:
        return []
    needed = quant.memory_mib.value + spec.margin_mib
    if needed <= limit:
        return []
    # Rounded up, since "0 MiB over" would be no reason.
    text = (
        f"{wording.mib(math.ceil(needed - limit))} over the {wording.mib(limit)} of host {host} "
        f"at {wording.tokens(slice_.context_tokens)} tokens"
    )
    if spec.margin_mib:
        text += f", of which {wording.mib(spec.margin_mib)} stay free"
    return [Miss(text, needed / limit - 1)]


def memory_limit_mib(spec: Host) -> int | None:
    """Return the memory of a host that counts: that of its cards if it has some."""
    return spec.vram_mib if spec.vram_mib is not None else spec.memory_mib


def memory_notes(trusted: Sequence[Trusted], hosts: Mapping[str, Host]) -> tuple[str, ...]:
    """Say for which hosts memory was measured on hardware of the other kind."""
    methods = {one.benchmark.memory.method for one in trusted}
    with_cards = [host for host, spec in hosts.items() if spec.vram_mib is not None]
    without_cards = [host for host, spec in hosts.items() if spec.vram_mib is None]
    pairs = (("rss", "a CPU", with_cards), ("nvml", "a card", without_cards))
    return tuple(
        f"Memory was measured on {where}; on {wording.listed(others)} it differs by the "
        "buffers of the backend, for which the margin has to be enough."
        for method, where, others in pairs
        if method in methods and others
    )
