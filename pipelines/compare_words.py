"""
What a comparison says: sentences and the rows of its table, from its record alone.

Terminal, report and pull request show these very words; nothing here reads a file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import console, stats, wording

if TYPE_CHECKING:
    from pipelines.compare_records import (
        CompareRecord,
        FlipComparison,
        Outcome,
        QualityComparison,
        Side,
        SpeedComparison,
    )

SHORT_CHARACTERS: Final = 12
HEADS: Final = ("", "champion", "challenger", "difference", "matters from", "outcome")
_WORDS: Final[dict[Outcome, str]] = {
    "better": "better",
    "equal": "as good or better",
    "worse": "worse",
    "undecided": "undecided",
}


@dataclass(frozen=True, kw_only=True)
class CompareRow:
    """
    One line of the table, as text.

    Attributes:
        what: What was compared: `decode at 4,096, tok/s`.
        champion: Its value.
        challenger: Its value.
        difference: Relative difference with its interval: `-6.1 % [-7.0, -5.2]`.
        effect: Difference that matters: `3 %`.
        outcome: In words; empty where nothing may be concluded.
        is_bad: Whether it speaks against the challenger.
        is_gated: Whether the outcome of the whole depends on it.
    """

    what: str
    champion: str
    challenger: str
    difference: str
    effect: str
    outcome: str
    is_bad: bool
    is_gated: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts, in the order of `HEADS`."""
        return (
            self.what,
            self.champion,
            self.challenger,
            self.difference,
            self.effect,
            self.outcome,
        )


# --- numbers ----------------------------------------------------------------------------------


def change(log_ratio: float) -> str:
    """Write a log-ratio as a relative difference with its sign: `-6.1 %`, `+0.4 %`."""
    share = math.expm1(log_ratio) * 100
    return f"{share:+.1f} %"


def interval(mean: float, low: float, high: float) -> str:
    """Write a difference with its interval: `-6.1 % [-7.0, -5.2]`."""
    ends = (f"{math.expm1(each) * 100:+.1f}" for each in (low, high))
    return f"{change(mean)} [{', '.join(ends)}]"


def effect(share: float) -> str:
    """Write the difference that matters: `3 %`."""
    return f"{wording.declared(round(share * 100, 6))} %"


def side(one: Side) -> str:
    """Name a side: `Q4_K_M of HEAD~1 (0123456789ab)`."""
    return (
        f"{console.clean(one.type)} of {console.clean(one.source)} "
        f"({console.clean(one.gguf_sha256)[:SHORT_CHARACTERS]})"
    )


def test_name(one: SpeedComparison) -> str:
    """Name a test: `decode at 4,096`; a prefill of an empty context is just `prefill`."""
    if one.test == "prefill" and one.depth_tokens == 0:
        return "prefill"
    return f"{one.test} at {wording.tokens(one.depth_tokens)}"


# --- sentences --------------------------------------------------------------------------------


def speed_sentence(
    name: str, outcome: Outcome, difference: str, share: float, *, held: bool = False
) -> str:
    """Say what one test shows."""
    limit = effect(share)
    if outcome == "worse":
        return f"{name} is slower: {difference}, and {limit} matter."
    if outcome == "better":
        return f"{name} is faster: {difference}, and {limit} matter."
    if outcome == "equal":
        return f"{name} is as fast, or faster: {difference}; no loss of {limit}."
    if held:
        return (
            f"{name} is undecided: {difference} would be a loss of {limit} by itself, not with the "
            "correction for several tests."
        )
    return f"{name} is undecided: {difference}; a loss of {limit} is neither shown nor excluded."


def quality_sentence(outcome: Outcome, difference: str, share: float, *, same_f16: bool) -> str:
    """Say what the divergences show; more of it is worse."""
    limit = effect(share)
    said = {
        "worse": f"Divergence from f16 is larger: {difference}, and {limit} matter.",
        "better": f"Divergence from f16 is smaller: {difference}, and {limit} matter.",
        "equal": f"Divergence from f16 is as small, or smaller: {difference}; no rise of {limit}.",
        "undecided": f"Divergence from f16 is undecided: {difference}; a rise of {limit} is "
        "neither shown nor excluded.",
    }[outcome]
    if same_f16:
        return said
    return f"{said} Each from an f16 of its own, so this is information and decides nothing."


def flips_sentence(name: str, lost: int, won: int, p_value: float, outcome: Outcome) -> str:
    """Say what the items of one set show."""
    counts = f"{wording.counted(lost, 'item')} lost, {won:,} won"
    chance = f"p = {wording.number(p_value)}"
    if outcome == "worse":
        return f"{name}: {counts}; so many losses are no chance ({chance})."
    return f"{name}: {counts}; no proof of harm ({chance})."


def outcome_sentence(record: CompareRecord) -> str:
    """Say the result of the whole in one sentence."""
    new, old = side(record.challenger), side(record.champion)
    if record.validity.verdict == "INVALID":
        why = wording.clause(record.validity.reasons[0]) if record.validity.reasons else "no reason"
        return f"INVALID: {why}."
    parts = _parts(record, record.outcome)
    telling = f": {'; '.join(wording.clause(part) for part in parts)}" if parts else ""
    if _is_of_speed_alone(record) and record.outcome in {"better", "equal"}:
        how = f"as fast as {old}, or faster" if record.outcome == "equal" else f"faster than {old}"
        return f"{new} is {how}; nothing but speed was compared."
    return {
        "worse": f"{new} is worse than {old}{telling}.",
        "better": f"{new} is better than {old}{telling}.",
        "equal": f"{new} is as good as {old}, or better.",
        "undecided": f"Undecided whether {new} is worse than {old}{telling}.",
    }[record.outcome]


def _is_of_speed_alone(record: CompareRecord) -> bool:
    quality = record.quality
    return not record.flips and (quality is None or not quality.same_f16)


def _parts(record: CompareRecord, outcome: Outcome) -> list[str]:
    found = [one.sentence for one in record.speed if one.is_gated and one.outcome == outcome]
    quality = record.quality
    if quality is not None and quality.same_f16 and quality.outcome == outcome:
        found.append(quality.sentence)
    return [*found, *(one.sentence for one in record.flips if one.outcome == outcome)]


def sentences(record: CompareRecord) -> tuple[str, ...]:
    """Return what the record says, the result first, then why it may be believed, then notes."""
    return (
        outcome_sentence(record),
        *method(record),
        *record.validity.reasons[1:],
        *record.validity.notes,
        *record.notes,
    )


def method(record: CompareRecord) -> tuple[str, ...]:
    """Say how it was measured, and what the machine could tell."""
    gated = [one for one in record.speed if one.is_gated and one.pairs]
    if not gated:
        return ()
    pairs = len(gated[0].pairs)
    kept = len(gated[0].pairs[0].champion_samples_tok_s)
    control = ", ".join(
        f"±{one.control_half_width * 100:.1f} % in {test_name(one)}" for one in gated
    )
    drift = ", ".join(f"{one.drift * 100:+.1f} % in {test_name(one)}" for one in gated)
    said = [
        f"{wording.counted(pairs, 'pair')} of processes in turns (AB, BA, ...), "
        f"{wording.counted(kept, 'repetition')} each"
        + (", doubled once" if record.doubled else "")
        + f"; the champion with itself shows that {control} can be told, and changed by {drift} "
        "over the run.",
    ]
    if record.void_pairs:
        said.append(
            f"{wording.counted(len(record.void_pairs), 'pair')} that other programs disturbed "
            "were measured again."
        )
    return tuple(said)


# --- the table --------------------------------------------------------------------------------


def rows(record: CompareRecord) -> tuple[CompareRow, ...]:
    """Return the table: speed, divergence, items. INVALID: without outcomes."""
    valid = record.validity.verdict == "VALID"
    found = [_speed_row(one, valid=valid) for one in record.speed if one.pairs]
    if record.quality is not None:
        found.append(_quality_row(record.quality))
    return (*found, *(_flip_row(one) for one in record.flips))


def _speed_row(one: SpeedComparison, *, valid: bool) -> CompareRow:
    champion = stats.median([each.champion_tok_s for each in one.pairs])
    challenger = stats.median([each.challenger_tok_s for each in one.pairs])
    first, second = wording.pair(champion, challenger)
    return CompareRow(
        what=f"{test_name(one)}, tok/s",
        champion=first,
        challenger=second,
        difference=interval(one.log_ratio_mean, one.log_ratio_low, one.log_ratio_high),
        effect=effect(one.effect),
        outcome=_outcome(one.outcome, gated=one.is_gated) if valid else "",
        is_bad=valid and one.is_gated and one.outcome == "worse",
        is_gated=one.is_gated,
    )


def _quality_row(one: QualityComparison) -> CompareRow:
    first, second = wording.pair(one.champion_kld_mean_nats, one.challenger_kld_mean_nats)
    return CompareRow(
        what="divergence, nats",
        champion=first,
        challenger=second,
        difference=interval(one.log_ratio, one.log_ratio_low, one.log_ratio_high),
        effect=effect(one.effect),
        outcome=_outcome(one.outcome, gated=one.same_f16),
        is_bad=one.same_f16 and one.outcome == "worse",
        is_gated=one.same_f16,
    )


def _flip_row(one: FlipComparison) -> CompareRow:
    return CompareRow(
        what=f"{console.clean(one.name)}, {wording.counted(one.items_count, 'item')}",
        champion=f"{one.lost_count:,} only it",
        challenger=f"{one.won_count:,} only it",
        difference=f"p = {wording.number(one.p_value)}",
        effect="",
        # Of a few items no proof is all that can be said: never that it is as good.
        outcome="worse" if one.outcome == "worse" else "no proof of harm",
        is_bad=one.outcome == "worse",
        is_gated=True,
    )


def _outcome(outcome: Outcome, *, gated: bool) -> str:
    return _WORDS[outcome] if gated else f"{_WORDS[outcome]} (not judged)"


def table(record: CompareRecord) -> list[str]:
    """Set the table as lines of equal columns."""
    lines = [HEADS, *(row.cells for row in rows(record))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    return [
        "  ".join(
            cell.ljust(width) if i in {0, 5} else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
