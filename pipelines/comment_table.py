"""
The table of a comment: every quant of a model against the base, or the winners of several models.

A change is shown only where it means something: from one interleaved run of both files
(`fleet compare`), or from two records that were measured under the same conditions. Of two separate
runs the interval goes from one end of one to the other end of the other, so that it is too wide
rather than too narrow. `~` is a change whose interval holds zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import compare_words, evidence, limits, wording
from pipelines.comment_tree import Cell, Table, TableRow
from pipelines.console import clean
from pipelines.evidence import Readings, Trusted
from pipelines.records import BenchmarkRecord, QuantizeRecord
from pipelines.tables import at
from pipelines.verdict_rules import outcome_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.compare_records import CompareRecord
    from pipelines.evidence import Measured
    from pipelines.report_tree import ModelReport, Row
    from pipelines.verdict_evidence import Evidence

NOISE: Final = "~"
# The conditions of `evidence.differing` on which a speed, a divergence, a memory depends.
_OF_SPEED: Final = frozenset(
    {"hardware", "backend", "llama.cpp commit", "number of threads", "decode depth",
     "set of speed tests"}
)  # fmt: skip
_OF_QUALITY: Final = frozenset(
    {"kind of quality", "evaluation corpus", "evaluation window", "number of chunks"}
)
_MARKS: Final = {"CHOSEN": "✅", "PASS": "✅", "REJECT": "❌", "INVALID": "⚠️"}
_VERDICT_MARKS: Final = {"PROMOTE": "✅", "HOLD": "⏸️", "REJECT": "❌", "INVALID": "⚠️"}
# How a missed gate is told in a cell.
_SHORT: Final = {
    "max_kld_mean_nats": "divergence",
    "max_kld_p999_nats": "p99.9 divergence",
    "min_same_top": "same top",
    "max_ppl_ratio": "PPL ratio",
    "min_cosine_mean": "cosine",
    "min_decode_tok_s": "decode",
    "min_prefill_tok_s": "prefill",
    "max_size_mib": "size",
}


@dataclass(frozen=True, kw_only=True)
class Then:
    """
    What the base holds of a model.

    Attributes:
        read: Its quants by type, those whose two records are of one file and VALID.
        built: Its files by type.
        winner: Type of what it chose, for the host that is shown first; empty if nothing.
        compared: The comparison of the head, if it may be believed.
    """

    read: Mapping[str, Readings]
    built: Mapping[str, QuantizeRecord]
    winner: str = ""
    compared: CompareRecord | None = None


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A relative change as log-ratios, and whether both files ran in turns in one run."""

    mean: float
    low: float
    high: float
    in_turns: bool = False

    @property
    def is_noise(self) -> bool:
        """Whether there may be no change at all."""
        return self.low <= 0 <= self.high

    @property
    def text(self) -> str:
        """The change in words: `+0.4 % [-0.6, +1.4] ~`."""
        text = compare_words.interval(self.mean, self.low, self.high)
        return f"{text} {NOISE}" if self.is_noise else text

    @property
    def cell(self) -> tuple[str, str]:
        """The change and its interval, one above the other."""
        text = compare_words.interval(self.mean, self.low, self.high)
        change, _, ends = text.partition(" [")
        return f"{change} {NOISE}" if self.is_noise else change, f"[{ends}"


# --- one change -------------------------------------------------------------------------------


def separate(now: Measured | None, before: Measured | None) -> Delta | None:
    """Return the change between two records; None where an end of an interval is no number."""
    if now is None or before is None:
        return None
    ends = (now.low, now.value, now.high, before.low, before.value, before.high)
    if not all(math.isfinite(one) and one > 0 for one in ends):
        return None
    return Delta(
        mean=math.log(now.value / before.value),
        low=math.log(now.low / before.high),
        high=math.log(now.high / before.low),
    )


def in_turns(compared: CompareRecord | None, test: str, depth_tokens: int | None) -> Delta | None:
    """Return what an interleaved run says of one speed test; None if it did not run it."""
    for one in compared.speed if compared else ():
        if (one.test, one.depth_tokens) == (test, depth_tokens):
            return Delta(
                mean=one.log_ratio_mean, low=one.log_ratio_low, high=one.log_ratio_high,
                in_turns=True,
            )  # fmt: skip
    return None


def speaks_of(
    compared: CompareRecord | None,
    champion: QuantizeRecord | None,
    challenger: QuantizeRecord | str | None,
) -> CompareRecord | None:
    """Return the comparison if it is of these two files and may be believed."""
    if compared is None or champion is None or not isinstance(challenger, QuantizeRecord):
        return None
    files = (compared.champion.gguf_sha256, compared.challenger.gguf_sha256)
    is_sound = compared.validity.verdict == "VALID" and outcome_of(compared) is not None
    return compared if is_sound and files == (
        champion.gguf.sha256, challenger.gguf.sha256
    ) else None  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Changes:
    """
    The changes of one quant against another one of the base.

    Attributes:
        decode: Of decode at the deepest depth.
        prefill: Of prefill.
        divergence: Of the mean divergence.
        is_same_divergence: Whether that is equal to the last digit, since the file is.
        why_not: Conditions that two records do not share, because of which nothing is said.
    """

    decode: Delta | None = None
    prefill: Delta | None = None
    divergence: Delta | None = None
    is_same_divergence: bool = False
    why_not: tuple[str, ...] = ()

    @property
    def is_in_turns(self) -> bool:
        """Whether any of it comes from an interleaved run."""
        return any(one is not None and one.in_turns for one in (self.decode, self.prefill))

    @property
    def is_separate(self) -> bool:
        """Whether any speed comes from two separate runs."""
        return any(one is not None and not one.in_turns for one in (self.decode, self.prefill))


def changes(
    now: Readings | None, before: Readings | None, compared: CompareRecord | None
) -> Changes:
    """
    Return how a quant differs from one of the base.

    Args:
        now: Its records; None if nothing of it may be shown.
        before: Those of the base; None if it has none that may be believed.
        compared: The comparison of exactly these two files, if there is one.
    """
    depth = now.deepest_decode.depth_tokens if now and now.deepest_decode else None
    found = Changes(
        decode=in_turns(compared, "decode", depth), prefill=in_turns(compared, "prefill", 0)
    )
    quality = compared.quality if compared else None
    divergence = (
        Delta(mean=quality.log_ratio, low=quality.log_ratio_low, high=quality.log_ratio_high,
              in_turns=True)
        if quality
        else None
    )  # fmt: skip
    if now is None or before is None:
        return Changes(decode=found.decode, prefill=found.prefill, divergence=divergence)
    odd = evidence.differing(now.benchmark, before.benchmark)
    # The very same record says nothing new about a speed.
    is_same_run = now.benchmark == before.benchmark
    may_time = not is_same_run and not _OF_SPEED.intersection(odd)
    may_score = not _OF_QUALITY.intersection(odd)
    same_file = now.quantized.gguf.sha256 == before.quantized.gguf.sha256
    return Changes(
        decode=found.decode
        or (separate(now.decode_tok_s, before.decode_tok_s) if may_time else None),
        prefill=found.prefill
        or (separate(now.prefill_tok_s, before.prefill_tok_s) if may_time else None),
        divergence=divergence
        or (separate(now.kld_mean_nats, before.kld_mean_nats)
            if may_score and not same_file else None),
        is_same_divergence=may_score and same_file and now.divergence == before.divergence,
        why_not=tuple(one for one in odd if one in _OF_SPEED)
        if found.decode is None and not is_same_run else (),
    )  # fmt: skip


# --- the quants of one model ------------------------------------------------------------------


def of_model(told: ModelReport, known: Evidence, then: Then | None) -> Table | None:
    """Return all quants of a model against the base; None if nothing is built."""
    if all(row.size_mib is None for row in told.rows):
        return None
    of_rows = {row.type: _changes_of(row, known, then) for row in told.rows}
    embeds = _embeds(told)
    rows = tuple(
        TableRow(
            cells=(
                Cell(text=row.type, change=_standing(row, known, then)),
                *numbers(row, of_rows[row.type], embeds=embeds),
                gate_cell(row, told, known),
            ),
            is_strong=row.is_winner,
        )
        for row in told.rows
    )
    heads = ("quant", *_heads(told, embeds=embeds), "gates")
    return Table(
        heads=heads,
        numbers=frozenset(range(1, len(heads) - 1)),
        rows=rows,
        notes=tuple(notes(list(of_rows.values()))),
    )


def readings(known: Evidence, type_: str) -> Readings | None:
    """Return the records of a quant if they are of one file and nobody doubts the measurement."""
    return sound(known.quantized.get(type_), known.measured.get(type_))


def sound(built: object, measured: object) -> Readings | None:
    """Put two records together if they are of one file and the measurement may be believed."""
    if not isinstance(built, QuantizeRecord) or not isinstance(measured, BenchmarkRecord):
        return None
    if measured.gguf_sha256 != built.gguf.sha256 or measured.validity.verdict != "VALID":
        return None
    return Readings(built.key, built.type, built, measured)


def _changes_of(row: Row, known: Evidence, then: Then | None) -> Changes:
    if then is None:
        return Changes()
    now = readings(known, row.type) if row.verdict != "INVALID" else None
    compared = speaks_of(then.compared, then.built.get(row.type), known.quantized.get(row.type))
    return changes(now, then.read.get(row.type), compared)


def _standing(row: Row, known: Evidence, then: Then | None) -> str:
    """Say what a quant is beside the base: new, or made anew; nothing of the very same file."""
    built = known.quantized.get(row.type)
    if then is None or not isinstance(built, QuantizeRecord):
        return ""
    before = then.built.get(row.type)
    if before is None:
        return "new" if then.built else ""
    return "" if before.gguf.sha256 == built.gguf.sha256 else "new file"


def _embeds(told: ModelReport) -> bool:
    return any(row.cosine_mean is not None for row in told.rows)


def _heads(told: ModelReport, *, embeds: bool) -> tuple[str, ...]:
    memory = f"memory{at(told.context_tokens)}, MiB"
    if embeds:
        return ("size, MiB", memory, "prefill, tok/s", "cosine", "same nearest, %")
    decode = f"decode{at(told.depth_tokens)}, tok/s"
    return ("size, MiB", memory, decode, "prefill, tok/s", "divergence, nats", "same top, %")


def numbers(row: Row, found: Changes, *, embeds: bool) -> tuple[Cell, ...]:
    """Return size, memory, speeds and quality of a quant, with what changed."""
    number = wording.number
    sizes = (Cell(text=number(row.size_mib)), Cell(text=number(row.memory_mib)))
    prefill = _speed(row.prefill_tok_s, found.prefill)
    if embeds:
        return (
            *sizes,
            prefill,
            Cell(text=number(row.cosine_mean, 5)),
            Cell(text=number(_percent(row.same_nearest))),
        )
    return (
        *sizes,
        _speed(row.decode_tok_s, found.decode),
        prefill,
        _with(number(row.kld_mean_nats), found.divergence),
        Cell(text=number(_percent(row.same_top))),
    )


def _speed(measured: Measured | None, delta: Delta | None) -> Cell:
    if measured is None:
        return Cell(text=wording.ABSENT)
    return _with(wording.number(measured.value), delta)


def _with(text: str, delta: Delta | None) -> Cell:
    change, interval = delta.cell if delta else ("", "")
    return Cell(text=text, change=change, interval=interval)


def _percent(share: float | None) -> float | None:
    return None if share is None else share * 100


def gate_cell(row: Row, told: ModelReport, known: Evidence) -> Cell:
    """Say whether a quant keeps its gates, and of one that does not, which limit it misses."""
    if not any(host.hosts for host in told.hosts) and row.verdict == "INVALID":
        return Cell(text="not judged", mark=_MARKS["INVALID"])
    if row.verdict == "REJECT":
        return Cell(text=_missed(row, known), mark=_MARKS["REJECT"])
    if row.is_winner:
        return Cell(text=row.verdict_words, mark=_VERDICT_MARKS.get(told.verdict, "⚠️"))
    return Cell(text=row.verdict_words, mark=_MARKS[row.verdict])


def _missed(row: Row, known: Evidence) -> str:
    """Write the first limit that is missed, `divergence 0.0262 > 0.005`, and how many more."""
    built, measured = known.quantized.get(row.type), known.measured.get(row.type)
    if not isinstance(built, QuantizeRecord) or not isinstance(measured, BenchmarkRecord):
        return "rejected"
    quant = Trusted(built.key, built.type, built, measured)
    missed, _ = limits.misses(quant, known.declared.gates)
    found = []
    for name, limit in limits.applying(known.declared.gates, to_encoder=quant.is_encoder).items():
        value = limits.GATES[name].read(quant)
        if value is not None and any(one.text.endswith(f"({name})") for one in missed):
            sign = "<" if limits.GATES[name].is_floor else ">"
            due = wording.declared(limit)
            found.append(f"{_SHORT[name]} {wording.beyond(value, limit)} {sign} {due}")
    if not found:
        # The memory of a host: its sentence is among the reasons.
        return "too large for its host" if "MiB over" in " ".join(row.sentences) else "rejected"
    more = len(found) - 1
    return f"{found[0]}, and {more} more" if more else found[0]


def notes(found: Sequence[Changes]) -> list[str]:
    """Say where the changes come from, and why there are none."""
    said = []
    if any(one.is_in_turns for one in found):
        said.append("Small: change against the base, both files measured in turns in one run.")
    if any(one.is_separate for one in found):
        said.append(
            "Small: change against the base, from separate runs under the same conditions; the "
            "interval is from one end of one to the other end of the other."
        )
    if any(
        one is not None and one.is_noise
        for each in found
        for one in (each.decode, each.prefill, each.divergence)
    ):
        said.append(f"{NOISE} is inside the noise.")
    if found and all(one.is_same_divergence for one in found):
        said.append("Every file is that of the base, and so is its quality.")
    odd = list(dict.fromkeys(what for one in found for what in one.why_not))
    if odd:
        said.append(
            "No change of speed is shown where the base was measured under another "
            f"{wording.listed([clean(one) for one in odd])}."
        )
    return said


# --- the winners of several models ------------------------------------------------------------


FLEET_HEADS: Final = (
    "model", "quant", "size, MiB", "memory, MiB", "decode, tok/s", "prefill, tok/s",
    "divergence, nats", "same top, %", "gates",
)  # fmt: skip


def winner_row(
    told: ModelReport, known: Evidence, then: Then | None, mark: str, gates: str
) -> tuple[Cell, ...]:
    """Return the winner of a model as one line of the table of the fleet."""
    name = Cell(text=told.name)
    row = told.winner
    if row is None:
        dashes = (Cell(text=wording.ABSENT),) * (len(FLEET_HEADS) - 3)
        return (name, Cell(text="none"), *dashes, Cell(text=told.verdict_words, mark=mark))
    found = _changes_of(row, known, then)
    embeds = row.cosine_mean is not None
    shown = numbers(row, found, embeds=embeds)
    if embeds:
        size, memory, prefill, cosine, nearest = shown
        shown = (
            size, memory, Cell(text=wording.ABSENT), prefill,
            Cell(text=cosine.text, change="cosine"), Cell(text=nearest.text, change="nearest"),
        )  # fmt: skip
    quant = Cell(text=row.type, change=_standing(row, known, then))
    return (name, quant, *shown, Cell(text=gates or told.verdict_words, mark=mark))


def of_fleet(rows: Sequence[tuple[Cell, ...]]) -> Table:
    """Put the winners of several models into one table."""
    return Table(
        heads=FLEET_HEADS,
        numbers=frozenset(range(2, len(FLEET_HEADS) - 1)),
        rows=tuple(TableRow(cells=row) for row in rows),
        notes=(
            "Small: change against the base; how it was measured stands with each model.",
            f"{NOISE} is inside the noise.",
        )
        if any(cell.interval for row in rows for cell in row)
        else (),
    )
