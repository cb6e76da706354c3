"""The report as a tree of words and numbers: `pipelines.report` fills it, renderers show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines import wording

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.evidence import Measured

# From good to bad.
VERDICTS = ("PROMOTE", "HOLD", "REJECT", "INVALID")
# To whoever reads, a model that nobody has measured yet is not one whose measurement is wrong.
UNMEASURED = "UNMEASURED"
STANDINGS = (*VERDICTS, UNMEASURED)
_STANDING_WORDS = {
    "PROMOTE": "promoted", "HOLD": "on hold", "REJECT": "rejected", "INVALID": "invalid",
    UNMEASURED: "not measured yet",
}  # fmt: skip
# What the report says of upstream, worst first, and the tone of the style sheet that it has.
NOTICES = {"alarm": "reject", "asks": "hold", "newer": "pass"}


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a quant was not chosen; `hosts` is empty if that holds for all of them."""

    hosts: tuple[str, ...]
    text: str

    @property
    def where(self) -> str:
        """The hosts in words, with a blank in front: ` on workstation and laptop`."""
        return f" on {wording.listed(list(self.hosts))}" if self.hosts else ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One declared quant in the table of its model. Absent numbers are not known or not sound."""

    type: str
    verdict: str
    verdict_words: str
    is_winner: bool
    on_frontier: bool
    reasons: tuple[Reason, ...]
    size_mib: float | None = None
    bits_per_weight: float | None = None
    memory_mib: float | None = None
    decode_tok_s: Measured | None = None
    prefill_tok_s: Measured | None = None
    kld_mean_nats: float | None = None
    same_top: float | None = None
    ppl_ratio: float | None = None
    # Of an encoder, in the place of the three before.
    cosine_mean: float | None = None
    same_nearest: float | None = None

    @property
    def sentences(self) -> tuple[str, ...]:
        """Each reason as a sentence of its own: `Q8_0 on laptop: 412 MiB over ...`."""
        return tuple(f"{self.type}{one.where}: {one.text}" for one in self.reasons)


@dataclass(frozen=True, kw_only=True)
class HostVerdict:
    """What was decided for one host, or for several of which the same is to be said."""

    hosts: tuple[str, ...]
    verdict: str
    sentence: str
    details: tuple[str, ...]

    @property
    def where(self) -> str:
        """The hosts in words: `workstation and laptop`."""
        return wording.listed(list(self.hosts))


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of the lineage."""

    name: str
    made: str
    size_mib: float
    sha256: str


@dataclass(frozen=True, kw_only=True)
class LoadRow:
    """
    One run of a load test. Absent numbers are those that its sample does not carry.

    `good` is the share of requests that kept every level, in words: by host where it differs, else
    under an empty name.
    """

    name: str
    concurrency: int | None
    requests_count: int
    ok_count: int
    failed_count: int
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    ttft_max_ms: float | None
    tpot_p50_ms: float | None
    e2e_p50_ms: float | None
    output_tok_s: float
    requests_s: float
    good: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a load test looked at: what came of it, and the lines that show it."""

    outcome: str
    text: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table of texts; `numbers` are the columns that stand to the right, from 0."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One kind of evidence: what was found, its table if it has one, and how it was looked at."""

    title: str
    findings: tuple[Finding, ...] = ()
    table: TextTable | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoadBlock:
    """
    The load test of one winner.

    `doubts` say why its numbers cannot be trusted; then there are no rows. `levels` are the service
    levels, the share of good requests first; `capacity` says up to which concurrency they hold.
    """

    type: str
    hosts: tuple[str, ...]
    title: str
    doubts: tuple[str, ...]
    rows: tuple[LoadRow, ...]
    slos: tuple[Mapping[str, float], ...]
    levels: tuple[Finding, ...]
    capacity: tuple[str, ...]
    checks: tuple[Finding, ...]
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """Everything that is told about one model."""

    name: str
    verdict: str
    is_measured: bool
    hosts: tuple[HostVerdict, ...]
    rows: tuple[Row, ...]
    objective: str
    context_tokens: int | None
    depth_tokens: int | None
    limits: Mapping[str, float]
    memory_limit_mib: float | None
    method: tuple[str, ...]
    lineage: tuple[tuple[str, str], ...]
    files: tuple[File, ...]
    notes: tuple[str, ...]
    commands: tuple[str, ...]
    tests: tuple[LoadBlock, ...] = ()
    smokes: tuple[Finding, ...] = ()
    # What became of it as a release, and what somebody let pass for that; sentences.
    released: tuple[str, ...] = ()
    # What to do now, as a sentence; empty where nothing is.
    next_step: str = ""
    # Proof of the conversion, task evals, comparison.
    sections: tuple[Section, ...] = ()

    @property
    def standing(self) -> str:
        """The verdict, or that there is nothing yet to judge."""
        return self.verdict if self.is_measured else UNMEASURED

    @property
    def verdict_words(self) -> str:
        """The verdict as its badge says it."""
        return self.verdict.lower() if self.is_measured else _STANDING_WORDS[UNMEASURED]

    @property
    def headlines(self) -> tuple[str, ...]:
        """The verdict in words, for each host: `tiny-llama: promote Q4_K_M: the fastest ...`."""
        if len(self.hosts) == 1:
            return (wording.sentence(f"{self.name}: {self.hosts[0].sentence}"),)
        return tuple(
            wording.sentence(f"{self.name} on {one.where}: {one.sentence}") for one in self.hosts
        )

    @property
    def winner(self) -> Row | None:
        """The quant that is shown first: that of the first host with a winner."""
        return next((row for row in self.rows if row.is_winner), None)

    @property
    def others(self) -> tuple[Row, ...]:
        """The quants that were not chosen, or not on every host."""
        return tuple(row for row in self.rows if row.reasons)

    @property
    def losers(self) -> tuple[str, ...]:
        """One sentence for each quant that was not chosen, and for each host where that differs."""
        return tuple(sentence for row in self.others for sentence in row.sentences)


@dataclass(frozen=True, kw_only=True)
class Notice:
    """One sentence about upstream; `kind` is one of `NOTICES`."""

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole fleet, in the order of the declaration; `upstream` is empty on a quiet day."""

    models: tuple[ModelReport, ...]
    counts: tuple[tuple[str, int], ...] = field(default=())
    upstream: tuple[Notice, ...] = ()

    @property
    def summary(self) -> str:
        """Return `4 models: 2 promoted, 1 on hold, 1 invalid`."""
        if not self.models:
            return "No model is declared"
        return f"{wording.counted(len(self.models), 'model')}: {', '.join(self.shares)}"

    @property
    def shares(self) -> tuple[str, ...]:
        """How many models got which verdict, from good to bad."""
        return tuple(f"{count} {_STANDING_WORDS[standing]}" for standing, count in self.counts)
