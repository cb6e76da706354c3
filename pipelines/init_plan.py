"""
Which quants of a model to begin with, at which context, on which host: rules over estimates.

The context is the largest one up to `MOST_TOKENS` at which the usual 4-bit quant fits; of the usual
quants those are taken that fit at it. What was said explicitly counts, and is only warned about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, get_args

from pipelines import init_sizes, params, tables, wording
from pipelines.errors import ParamsError, UpstreamError
from pipelines.init_sizes import MIB
from pipelines.serving.server import CONTEXT_STEP
from pipelines.tables import Column

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.init_answers import Answers
    from pipelines.init_sizes import Estimate
    from pipelines.init_source import Subject

MOST_TOKENS: Final = 16_384
# Ollama embeds no longer text in one piece (serving.ollama.ENCODER_BATCH_TOKENS).
_MOST_TOKENS_OF_ENCODER: Final = 2048
_LEAST_TOKENS: Final = 2048
_UNKNOWN_TOKENS: Final = 4096
USUAL: Final = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
SMALLER: Final = ("IQ4_XS", "Q3_K_M", "Q2_K")
# Of fewer the chain has nothing to choose from.
_ENOUGH: Final = 2
# From about five bits on a matrix changes little, and computing it takes a pass over the text.
_WITHOUT_MATRIX: Final = frozenset({
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "MXFP4_MOE",
})  # fmt: skip
_TYPES: tuple[str, ...] = get_args(params.QuantType)
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TABLE_WIDTH: Final = 96


@dataclass(frozen=True, kw_only=True)
class Room:
    """
    What a host has for a model.

    Attributes:
        host: Its name.
        total_mib: Memory of its cards, or main memory for a model.
        margin_mib: Of it, what has to stay free.
        has_cards: Whether it is memory of cards.
    """

    host: str
    total_mib: int
    margin_mib: int
    has_cards: bool

    @property
    def free_bytes(self) -> int:
        """What a model may take."""
        return (self.total_mib - self.margin_mib) * MIB


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quant: its estimate, whether it fits, whether it will be declared."""

    estimate: Estimate
    fits: bool
    is_chosen: bool


@dataclass(frozen=True, kw_only=True)
class QuantLine:
    """One quant as it will be declared."""

    type: str
    imatrix: bool
    max_fallbacks: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    What to begin with.

    Attributes:
        context_tokens: At which the model will be served.
        slots: Requests at the same time.
        quants: To be declared, from large to small.
        rows: All that were looked at.
        room: Of the host.
        notes: What the operator should know.
    """

    context_tokens: int
    slots: int
    quants: tuple[QuantLine, ...]
    rows: tuple[Row, ...]
    room: Room
    notes: tuple[str, ...]

    @property
    def uses_matrix(self) -> bool:
        """Whether a quant needs the importance matrix."""
        return any(quant.imatrix for quant in self.quants)


def make(
    subject: Subject, answers: Answers, room: Room, *, slots: int, has_calibration: bool
) -> Plan:
    """
    Choose context and quants.

    Args:
        subject: The model.
        answers: What was said explicitly.
        room: Of the host.
        slots: `serving.parallel`.
        has_calibration: Whether there is a text for importance matrices.

    Raises:
        ParamsError: A type is unknown, needs a matrix that cannot be had, a context is impossible,
            or nothing fits on the host.
        UpstreamError: The model's context is shorter than what the chain serves.
    """
    asked = tuple(map(_type, answers.quants))
    types = tuple(sorted({*USUAL, *SMALLER, *asked}, key=_TYPES.index))
    context = _context(subject, answers, room, asked, slots)
    by_type = {
        type_: init_sizes.estimate(subject.shape, type_, context_tokens=context, slots=slots)
        for type_ in types
    }
    fitting = {type_ for type_, each in by_type.items() if each.memory_bytes <= room.free_bytes}
    chosen = asked or _usual(fitting)
    if not chosen:
        raise _nothing_fits(subject, by_type[SMALLER[-1]], room, context, slots)
    can_calibrate = has_calibration and not subject.is_encoder
    rows = sorted(by_type.values(), key=lambda each: -each.size_bytes)
    return Plan(
        context_tokens=context,
        slots=slots,
        quants=tuple(
            _line(each, subject, can_calibrate=can_calibrate)
            for each in rows
            if each.type in chosen
        ),
        rows=tuple(
            Row(estimate=each, fits=each.type in fitting, is_chosen=each.type in chosen)
            for each in rows
        ),
        room=room,
        notes=tuple(_too_large(chosen, fitting, room)),
    )


def table(plan: Plan) -> str:
    """Set the quants as text; those that will be declared are marked."""
    context = f"{plan.slots} x {wording.tokens(plan.context_tokens)} tokens"
    columns: tuple[Column[Row], ...] = (
        Column(head="quant", unit="", text=lambda r: r.estimate.type,
               sort=lambda r: r.estimate.type, is_number=False),
        Column(head="size", unit="MiB", text=lambda r: _mib(r.estimate.size_bytes),
               sort=lambda r: r.estimate.size_bytes),
        Column(head="bits/weight", unit="",
               text=lambda r: wording.number(r.estimate.bits_per_weight),
               sort=lambda r: r.estimate.bits_per_weight),
        Column(head=f"memory, {context}", unit="MiB",
               text=lambda r: _mib(r.estimate.memory_bytes),
               sort=lambda r: r.estimate.memory_bytes),
        Column(head=f"on {plan.room.host}", unit="",
               text=lambda r: "fits" if r.fits else "too large",
               sort=lambda r: r.fits, is_number=False),
    )  # fmt: skip
    lines = tables.lines(columns, plan.rows, _TABLE_WIDTH, is_marked=lambda row: row.is_chosen)
    return "\n".join([*(line.text for line in lines if line.text.strip()), "", *_legend(plan)])


def _legend(plan: Plan) -> list[str]:
    room = plan.room
    total = f"{wording.mib(room.total_mib)} {'on its cards' if room.has_cards else 'for models'}"
    return [
        f"Estimates: {room.host} has {total}; {wording.mib(room.margin_mib)} of it stay free.",
        "The shapes of the weights are known, the rest is arithmetic; `fleet repro` measures.",
        "▸ will be declared.",
    ]


def _mib(size_bytes: int) -> str:
    mib = size_bytes / MIB
    return f"{mib:,.0f}" if mib >= 100 else f"{mib:.1f}"  # noqa: PLR2004 - three digits


# --- context ----------------------------------------------------------------------------------


def _context(
    subject: Subject, answers: Answers, room: Room, asked: Sequence[str], slots: int
) -> int:
    trained = subject.trained_tokens or _UNKNOWN_TOKENS
    if trained < CONTEXT_STEP:
        raise UpstreamError(
            f"{subject.source} was trained with a context of {trained:,} tokens; the least that is "
            f"served is {CONTEXT_STEP}.",
            hint="Take another model.",
        )
    if answers.context_tokens is not None:
        return _asked_context(answers.context_tokens, subject)
    most = min(trained, _MOST_TOKENS_OF_ENCODER if subject.is_encoder else MOST_TOKENS)
    context = most - most % CONTEXT_STEP
    anchor = max(asked, key=_TYPES.index) if asked else USUAL[-1]
    while context // 2 >= _LEAST_TOKENS:
        found = init_sizes.estimate(subject.shape, anchor, context_tokens=context, slots=slots)
        if found.memory_bytes <= room.free_bytes:
            break
        context = context // 2 - context // 2 % CONTEXT_STEP
    return context


def _asked_context(context: int, subject: Subject) -> int:
    trained = subject.trained_tokens
    # Before the step: its nearest multiple would be refused next.
    if trained is not None and context > trained:
        raise ParamsError(
            f"--context {context}: {subject.source} was trained with {trained:,} tokens.",
            hint=f"--context {trained - trained % CONTEXT_STEP}, or less",
        )
    if context < CONTEXT_STEP or context % CONTEXT_STEP:
        nearest = max(context // CONTEXT_STEP, 1) * CONTEXT_STEP
        raise ParamsError(
            f"--context {context}: llama.cpp serves multiples of {CONTEXT_STEP} tokens.",
            hint=f"--context {nearest}",
        )
    return context


# --- quants -----------------------------------------------------------------------------------


def _type(typed: str) -> str:
    """Read a type in letters of any case."""
    type_ = typed.upper()
    if type_ not in _TYPES:
        raise ParamsError(
            f"--quants: {wording.quoted(typed)} is no type of llama-quantize"
            f"{wording.did_you_mean(typed, _TYPES) or '.'}",
            hint=f"Types: {', '.join(_TYPES)}.",
        )
    return type_


def _usual(fitting: set[str]) -> tuple[str, ...]:
    """Return the usual types that fit, and smaller ones where these are few."""
    chosen: list[str] = [type_ for type_ in USUAL if type_ in fitting]
    for type_ in SMALLER:
        if len(chosen) < _ENOUGH and type_ in fitting:
            chosen.append(type_)
    return tuple(chosen)


def _line(each: Estimate, subject: Subject, *, can_calibrate: bool) -> QuantLine:
    if each.type in params.NEEDS_IMATRIX and not can_calibrate:
        why = "an encoder has none" if subject.is_encoder else "no corpus `calibration` is declared"
        raise ParamsError(
            f"--quants {each.type}: llama-quantize makes none without an importance matrix, and "
            f"{why}.",
            hint="Take Q4_K_M or larger.",
        )
    if each.type == "MXFP4_MOE" and not any(subject.shape.config.get(key) for key in _EXPERTS):
        raise ParamsError(
            f"--quants MXFP4_MOE: {subject.source} has no experts.", hint="Take Q8_0 or Q4_K_M."
        )
    return QuantLine(
        type=each.type,
        imatrix=can_calibrate and each.type not in _WITHOUT_MATRIX,
        max_fallbacks=each.fallbacks_count,
    )


def _too_large(chosen: Sequence[str], fitting: set[str], room: Room) -> list[str]:
    odd = [type_ for type_ in chosen if type_ not in fitting]
    if not odd:
        return []
    return [
        f"{wording.listed(odd)} will probably not fit on {room.host}: measured there, and then out."
    ]


def _nothing_fits(
    subject: Subject, least: Estimate, room: Room, context: int, slots: int
) -> ParamsError:
    return ParamsError(
        f"{subject.source} does not fit on {room.host}: {least.type} takes about "
        f"{wording.mib(least.memory_bytes / MIB)} with {slots} x {context:,} tokens, and "
        f"{wording.mib(max(room.free_bytes, 0) / MIB)} may be taken of "
        f"{wording.mib(room.total_mib)}.",
        hint="Take a smaller model, less --context, another --host with --vram, or say --quants.",
    )
