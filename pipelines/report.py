"""
What the records say, as one tree of words and numbers that three renderers show.

`build` reads and never judges: verdicts are those of `choose`. It is fail-closed in the same way,
though. A choice that is missing, unreadable or older than the files that it speaks of counts as
INVALID, and a number whose record is missing is shown as not measured, with the reason. Nothing
here depends on the clock: equal records give equal bytes.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines import atomic, records, wording
from pipelines.console import clean
from pipelines.errors import GateError
from pipelines.evidence import MIB
from pipelines.records import (
    BenchmarkRecord,
    CalibrateRecord,
    Candidate,
    ChoiceRecord,
    ConvertRecord,
    FetchRecord,
    QuantizeRecord,
    RecordError,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.params import ReportSlice
    from pipelines.records import HostChoice, Speed

# From good to bad.
VERDICTS = ("PROMOTE", "HOLD", "REJECT", "INVALID")
_VERDICT_WORDS = {
    "PROMOTE": "promoted", "HOLD": "on hold", "REJECT": "rejected", "INVALID": "invalid",
}  # fmt: skip
_TEXT_CHARACTERS = 400
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STALE = "the choice is older than the files that it speaks of"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A measured value with its 95 % interval."""

    value: float
    low: float
    high: float


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
    """One declared quant in the table of its model. Absent numbers were not measured."""

    type: str
    verdict: str
    verdict_words: str
    is_winner: bool
    on_frontier: bool
    reasons: tuple[Reason, ...]
    size_mib: float | None = None
    bits_per_weight: float | None = None
    memory_mib: float | None = None
    decode_tok_s: Interval | None = None
    prefill_tok_s: Interval | None = None
    kld_mean_nats: float | None = None
    same_top: float | None = None
    ppl_ratio: float | None = None

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
class ModelReport:
    """Everything that is told about one model."""

    name: str
    verdict: str
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

    @property
    def headlines(self) -> tuple[str, ...]:
        """The verdict in words, for each host: `tiny-llama: promote Q4_K_M: the fastest ...`."""
        if len(self.hosts) == 1:
            return (f"{self.name}: {self.hosts[0].sentence}.",)
        return tuple(f"{self.name} on {one.where}: {one.sentence}." for one in self.hosts)

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
class Report:
    """The whole fleet, in the order of the declaration."""

    models: tuple[ModelReport, ...]
    counts: tuple[tuple[str, int], ...] = field(default=())

    @property
    def summary(self) -> str:
        """Return `4 models: 2 promoted, 1 on hold, 1 invalid`."""
        if not self.models:
            return "No model is declared"
        return f"{wording.counted(len(self.models), 'model')}: {', '.join(self.shares)}"

    @property
    def shares(self) -> tuple[str, ...]:
        """How many models got which verdict, from good to bad."""
        return tuple(f"{count} {_VERDICT_WORDS[verdict]}" for verdict, count in self.counts)


# --- entry points -----------------------------------------------------------------------------


def run(slice_: ReportSlice, at: Layout) -> str:
    """Write results/report.md and results/report.html; return the same for the terminal."""
    from pipelines import render  # noqa: PLC0415 - jinja2

    report = build(slice_, at)
    atomic.write_text(at.report_markdown, render.markdown(report))
    atomic.write_text(at.report_html, render.html(report))
    width = shutil.get_terminal_size((100, 24)).columns
    return render.terminal(report, width, colour=sys.stdout.isatty())


def worst_verdict(report: Report) -> str:
    """Return the worst verdict of any model on any host; INVALID if there is none at all."""
    return max((model.verdict for model in report.models), key=VERDICTS.index, default="INVALID")


def require_promote(slice_: ReportSlice, at: Layout) -> None:
    """
    Turn verdicts into an exit code.

    Raises:
        GateError: A model is not PROMOTE on every host.
    """
    report = build(slice_, at)
    if worst_verdict(report) == "PROMOTE":
        return
    lines = [line for model in report.models if model.verdict != "PROMOTE" for line in
             model.headlines]  # fmt: skip
    raise GateError(
        "\n".join([f"not every model is promoted ({report.summary}).", *lines]),
        hint=f"Read {at.report_markdown}.",
    )


def build(slice_: ReportSlice, at: Layout) -> Report:
    """Read every record of the declared fleet, missing ones included."""
    models = tuple(_Reader(at, model, quants).model() for model, quants in slice_.models.items())
    counts = Counter(model.verdict for model in models)
    return Report(
        models=models,
        counts=tuple((verdict, counts[verdict]) for verdict in VERDICTS if counts[verdict]),
    )


# --- one model --------------------------------------------------------------------------------


class _Reader:
    """Reads the records of one model and composes its part of the report."""

    def __init__(self, at: Layout, model: str, quants: Mapping[str, str]) -> None:
        self.at = at
        self.name = model
        self.quants = quants
        self.fetched = _read(at.model_record("fetch", model), FetchRecord)
        self.converted = _read(at.model_record("convert", model), ConvertRecord)
        self.calibrated = _read(at.model_record("calibrate", model), CalibrateRecord)
        self.choice = _read(at.model_record("choose", model), ChoiceRecord)
        self.built = {
            type_: _read(at.quant_record("quantize", model, type_), QuantizeRecord)
            for type_ in quants.values()
        }
        self.measured = {
            type_: _read(at.quant_record("benchmark", model, type_), BenchmarkRecord)
            for type_ in quants.values()
        }

    def model(self) -> ModelReport:
        hosts = self._hosts()
        choice = self.choice if isinstance(self.choice, ChoiceRecord) else None
        limits = [one.limit_mib - one.margin_mib for one in (choice.hosts if choice else ())
                  if one.limit_mib is not None]  # fmt: skip
        return ModelReport(
            name=self.name,
            verdict=max((one.verdict for one in hosts), key=VERDICTS.index, default="INVALID"),
            hosts=hosts,
            rows=tuple(self._row(type_) for type_ in self.quants.values()),
            objective=choice.objective if choice else "",
            context_tokens=choice.context_tokens if choice else None,
            depth_tokens=choice.decode_depth_tokens if choice else None,
            limits=choice.gates if choice else {},
            memory_limit_mib=max(limits, default=None),
            method=self._method(),
            lineage=self._lineage(),
            files=self._files(),
            notes=tuple(_tidy(note) for note in choice.notes) if choice else (),
            commands=self._commands(),
        )

    # --- verdicts ---

    def _hosts(self) -> tuple[HostVerdict, ...]:
        doubt = self._doubt()
        if isinstance(self.choice, str) or doubt or not self.choice.hosts:
            reason = self.choice if isinstance(self.choice, str) else doubt or "no host is declared"
            sentence = f"invalid: nothing is chosen ({_tidy(reason)})"
            return (HostVerdict(hosts=(), verdict="INVALID", sentence=sentence, details=()),)
        return _host_verdicts(self.choice.hosts)

    def _doubt(self) -> str:
        """Say why the choice on disk does not speak of the files on disk, if so."""
        if isinstance(self.choice, str):
            return ""
        for host in self.choice.hosts:
            chosen = {one.type: one.gguf_sha256 for one in host.candidates}
            if set(chosen) != set(self.quants.values()) or self.choice.model != self.name:
                return _STALE
            for type_, digest in chosen.items():
                built = self.built[type_]
                if digest and (isinstance(built, str) or built.gguf.sha256 != digest):
                    return _STALE
        return ""

    def _candidates(self, type_: str) -> list[tuple[str, Candidate]]:
        if isinstance(self.choice, str) or self._doubt():
            return []
        return [(host.host, one) for host in self.choice.hosts for one in host.candidates
                if one.type == type_]  # fmt: skip

    # --- the table ---

    def _row(self, type_: str) -> Row:
        candidates = self._candidates(type_)
        verdicts = {one.verdict for _, one in candidates}
        row = Row(
            type=type_,
            verdict=_best_verdict(verdicts),
            verdict_words=_verdict_words(candidates),
            is_winner="CHOSEN" in verdicts,
            on_frontier=any(one.on_frontier for _, one in candidates),
            reasons=(
                _reasons(type_, candidates)
                if candidates
                else (Reason(hosts=(), text=f"{self._why_absent(type_)}."),)
            ),
        )
        built, measured = self.built[type_], self.measured[type_]
        if isinstance(built, str):
            return row
        row = _with(row, size_mib=built.gguf.size_bytes / MIB,
                    bits_per_weight=built.bits_per_weight)  # fmt: skip
        if isinstance(measured, str) or measured.gguf_sha256 != built.gguf.sha256:
            return row
        if verdicts == {"INVALID"} or measured.validity.verdict == "INVALID":
            # A number that is not to be trusted is not shown: somebody would compare it.
            return row
        return _with_measured(row, measured)

    def _why_absent(self, type_: str) -> str:
        built, measured = self.built[type_], self.measured[type_]
        if isinstance(built, str):
            return f"not built: {_tidy(built)}"
        if isinstance(measured, str):
            return f"not measured: {_tidy(measured)}"
        return "measured, but nothing is chosen yet"

    # --- how, from what ---

    def _method(self) -> tuple[str, ...]:
        """Say how the numbers were measured; one line for each way that occurs."""
        lines = dict.fromkeys(
            _method_line(one) for one in self.measured.values() if isinstance(one, BenchmarkRecord)
        )
        days = sorted(_tidy(one.measured_at)[:10] for one in self.measured.values()
                      if isinstance(one, BenchmarkRecord))  # fmt: skip
        if not days:
            return ("Nothing is measured yet.",)
        when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
        heads = "memory at the declared context, decode at the deepest measured one"
        return (*lines, f"Measured {when}: {heads}. Brackets hold 95 % intervals.")

    def _lineage(self) -> tuple[tuple[str, str], ...]:
        lines: list[tuple[str, str]] = []
        if isinstance(self.fetched, FetchRecord):
            one = self.fetched
            lines += [
                ("upstream", f"{one.source} at {one.revision}"),
                ("model", f"{one.architecture}, {wording.number(one.parameters_count)} parameters"),
                ("licence", one.license or "not stated"),
            ]
        else:
            lines.append(("upstream", f"not fetched: {self.fetched}"))
        if isinstance(self.converted, ConvertRecord):
            made = self.converted
            lines.append(("llama.cpp", f"{made.llama_cpp_commit}, recipe {made.recipe}"))
        if isinstance(self.calibrated, CalibrateRecord) and self.calibrated.corpus:
            read = self.calibrated
            chunks = wording.counted(read.chunks_count, "chunk")
            told = f"{chunks} of {read.corpus}, sha256 {read.corpus_sha256}"
            lines.append(("importance matrix", told))
        return tuple((label, _tidy(text)) for label, text in lines)

    def _files(self) -> tuple[File, ...]:
        files: list[File] = []
        if isinstance(self.converted, ConvertRecord):
            files.append(_file(self.converted.gguf, _mix(self.converted.tensor_types)))
        for built in self.built.values():
            if isinstance(built, QuantizeRecord):
                made = _mix(built.tensor_types)
                if built.fallbacks:
                    made += f"; {wording.counted(len(built.fallbacks), 'fallback')}"
                if built.imatrix_sha256:
                    made += "; with importance matrix"
                files.append(_file(built.gguf, made))
        return tuple(files)

    def _commands(self) -> tuple[str, ...]:
        """Return what makes all of this again, and what proves the file that was chosen."""
        commands = [f"fleet repro {self.name}"]
        for key, type_ in self.quants.items():
            built = self.built[type_]
            winner = any(one.verdict == "CHOSEN" for _, one in self._candidates(type_))
            # Only a digest goes into a line that somebody pastes into a shell.
            if winner and isinstance(built, QuantizeRecord) and _SHA256.fullmatch(
                built.gguf.sha256
            ):  # fmt: skip
                path = self.at.gguf(self.name, key).relative_to(self.at.root).as_posix()
                commands.append(f"echo '{built.gguf.sha256}  {path}' | sha256sum --check")
        return tuple(commands)


# --- parts ------------------------------------------------------------------------------------


def _read(path: Path, kind: type[records.R]) -> records.R | str:
    """Return a record, or why there is none."""
    try:
        return records.read(path, kind)
    except RecordError as error:
        return error.message.replace(str(path), path.name).rstrip(".")
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


def _tidy(text: str) -> str:
    """Make text of a record, which may come from a stranger, one short harmless line."""
    line = " ".join(clean(text).split())
    return line if len(line) <= _TEXT_CHARACTERS else line[: _TEXT_CHARACTERS - 1] + "…"


def _host_verdicts(hosts: Sequence[HostChoice]) -> tuple[HostVerdict, ...]:
    """Say what was decided; hosts of which the same is to be said are named together."""
    together: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for one in hosts:
        said = (one.verdict, _tidy(one.sentence).rstrip("."), _details(one))
        together.setdefault(said, []).append(one.host)
    return tuple(
        HostVerdict(hosts=tuple(names), verdict=verdict, sentence=sentence, details=details)
        for (verdict, sentence, details), names in together.items()
    )


def _details(one: HostChoice) -> tuple[str, ...]:
    details = [one.binding] if one.binding else []
    if one.runner_up:
        details.append(f"Runner-up: {one.runner_up}.")
    if one.winner and one.incumbent:
        same = one.incumbent == one.winner
        details.append("Nothing changes in service." if same else f"In service: {one.incumbent}.")
    return tuple(_tidy(text) for text in details)


def _best_verdict(verdicts: Collection[str]) -> str:
    """Return the verdict that a row is coloured by: the best that it gets on any host."""
    order = ("CHOSEN", "PASS", "REJECT", "INVALID")
    return next((verdict for verdict in order if verdict in verdicts), "INVALID")


def _verdict_words(candidates: Sequence[tuple[str, Candidate]]) -> str:
    """Write `chosen`, or where that is so if not everywhere: `chosen on laptop`."""
    if not candidates:
        return "not chosen from"
    best = _best_verdict({one.verdict for _, one in candidates})
    where = [host for host, one in candidates if one.verdict == best]
    if len(where) == len(candidates):
        return best.lower()
    place = where[0] if len(where) == 1 else f"{len(where)} of {len(candidates)} hosts"
    return f"{best.lower()} on {place}"


def _reasons(type_: str, candidates: Sequence[tuple[str, Candidate]]) -> tuple[Reason, ...]:
    """Return what keeps a quant out, naming hosts where that is not the same for all of them."""
    said: dict[str, list[str]] = {}
    for host, one in candidates:
        if one.verdict != "CHOSEN":
            said.setdefault(_tidy(one.sentence).removeprefix(f"{type_}: "), []).append(host)
    return tuple(
        Reason(hosts=() if len(hosts) == len(candidates) else tuple(hosts), text=text)
        for text, hosts in said.items()
    )


def _with(row: Row, **numbers: float | Interval | None) -> Row:
    return Row(**{**row.__dict__, **numbers})


def _with_measured(row: Row, measured: BenchmarkRecord) -> Row:
    decode = [one for one in measured.speed if one.test == "decode"]
    prefill = [one for one in measured.speed if one.test == "prefill" and one.depth_tokens == 0]
    return _with(
        row,
        memory_mib=max(measured.memory.measured_mib, measured.memory.estimate_mib),
        decode_tok_s=_interval(max(decode, key=lambda one: one.depth_tokens, default=None)),
        prefill_tok_s=_interval(prefill[0] if prefill else None),
        kld_mean_nats=max(measured.quality.kld_mean_nats, 0.0),
        same_top=measured.quality.same_top,
        ppl_ratio=measured.quality.ppl_ratio,
    )


def _interval(test: Speed | None) -> Interval | None:
    if test is None:
        return None
    return Interval(value=test.median_tok_s, low=test.low_tok_s, high=test.high_tok_s)


def _method_line(one: BenchmarkRecord) -> str:
    machine, quality = one.machine, one.quality
    kept = {len(test.samples_tok_s) for test in one.speed}
    dropped = {len(test.dropped_tok_s) for test in one.speed}
    devices = ", ".join(machine.gpus) or machine.cpu
    repetitions = "/".join(map(str, sorted(kept))) or "no"
    first = "/".join(map(str, sorted(dropped))) or "none"
    return _tidy(
        f"{devices}, {wording.counted(machine.cores_count, 'core')}, {machine.memory_gib:,} GiB, "
        f"backend {machine.backend}, {wording.counted(one.threads, 'thread')}; "
        f"llama.cpp {one.llama_cpp_commit[:12]}; "
        f"{repetitions} repetitions of each speed test after {first} that warm up; "
        f"divergence from f16 over {wording.counted(quality.chunks_count, 'chunk')} of "
        f"{wording.tokens(quality.context_tokens)} tokens of corpus "
        f"{quality.corpus_sha256[:12]} ({wording.tokens(quality.scored_tokens)} scored); "
        f"memory by {one.memory.method.upper()}."
    )


def _mix(tensor_types: Mapping[str, int]) -> str:
    """Write `24 Q4_K, 9 F32, 6 Q6_K`."""
    mix = sorted(tensor_types.items(), key=lambda item: (-item[1], item[0]))
    return _tidy(", ".join(f"{count:,} {type_}" for type_, count in mix))


def _file(digest: records.FileDigest, made: str) -> File:
    return File(
        name=_tidy(digest.name),
        made=made,
        size_mib=digest.size_bytes / MIB,
        sha256=_tidy(digest.sha256),
    )
