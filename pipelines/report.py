"""
What the records say, as one tree of words and numbers (`pipelines.report_tree`).

`build` reads and never judges: verdicts, reasons and next steps are those of `pipelines.verdict`. A
number whose record is missing is shown as not measured, with the reason. Of an INVALID quant only
those numbers are shown that the choice kept. Nothing here depends on the clock but whether a waiver
is over: equal records give equal bytes.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

from pipelines import (
    atomic,
    publish,
    records,
    report_evidence,
    report_load,
    validity,
    verdict,
    verdict_evidence,
    wording,
)
from pipelines.console import clean
from pipelines.errors import GateError
from pipelines.evidence import MIB, Readings
from pipelines.records import (
    BenchmarkRecord,
    CalibrateRecord,
    Candidate,
    ChoiceRecord,
    ConvertRecord,
    EmbeddingQuality,
    FetchRecord,
    QuantizeRecord,
)
from pipelines.release_records import PublishRecord, release_id, short
from pipelines.report_tree import (
    STANDINGS,
    VERDICTS,
    File,
    HostVerdict,
    ModelReport,
    Notice,
    Reason,
    Report,
    Row,
)
from pipelines.upstream_records import UpstreamNotices

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.params import JudgeSlice, ReportSlice
    from pipelines.records import AnyQuality, HostChoice
    from pipelines.report_tree import Finding, LoadBlock
    from pipelines.verdict import HostFinal, ModelVerdict
    from pipelines.verdict_evidence import Evidence

_TEXT_CHARACTERS = 600
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
    day = verdict_evidence.today()
    models = tuple(tell(declared, at, day).report for declared in slice_.models.values())
    counts = Counter(model.standing for model in models)
    return Report(
        models=models,
        counts=tuple((standing, counts[standing]) for standing in STANDINGS if counts[standing]),
        upstream=_upstream(at),
    )


def _upstream(at: Layout) -> tuple[Notice, ...]:
    """Say what the last look at upstream left to say; nothing where there was no look."""
    if not at.upstream_notices.exists():
        return ()
    found = records.read_or_reason(at.upstream_notices, UpstreamNotices)
    if isinstance(found, str):
        return (Notice(kind="alarm", text=_tidy(wording.sentence(found))),)
    told = (("alarm", found.alarms), ("asks", found.asks), ("newer", found.moved))
    return tuple(Notice(kind=kind, text=_tidy(text)) for kind, texts in told for text in texts)


# --- one model --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Told:
    """One model of the report, with what it was read from and the verdict on that."""

    report: ModelReport
    evidence: Evidence
    judged: ModelVerdict


def tell(declared: JudgeSlice, at: Layout, day: str) -> Told:
    """
    Read every record of one model.

    Args:
        declared: What params.yaml says now.
        at: The checkout.
        day: The day in UTC by which waivers count, as 2027-01-31.
    """
    reader = _Reader(at, declared, day)
    return Told(report=reader.model(), evidence=reader.evidence, judged=reader.judged)


class _LoadTests(TypedDict):
    """What a load test adds to the report of a model."""

    tests: tuple[LoadBlock, ...]
    smokes: tuple[Finding, ...]


class _Reader:
    """Reads the records of one model and composes its part of the report."""

    def __init__(self, at: Layout, declared: JudgeSlice, day: str) -> None:
        self.at = at
        self.name = declared.model
        self.quants: Mapping[str, str] = declared.quants
        self.evidence = verdict_evidence.collect(declared, at, day=day)
        self.judged = verdict.judge(self.evidence)
        self.fetched = self.evidence.fetched
        self.converted = self.evidence.converted
        self.calibrated = self.evidence.calibrated
        self.choice = self.evidence.choice
        self.tested = self.evidence.tested
        self.built = self.evidence.quantized
        self.measured = self.evidence.measured

    def model(self) -> ModelReport:
        judged, is_measured = self.judged, self._is_measured()
        choice = self.choice if isinstance(self.choice, ChoiceRecord) else None
        limits = [one.limit_mib - one.margin_mib for one in (choice.hosts if choice else ())
                  if one.limit_mib is not None]  # fmt: skip
        return ModelReport(
            name=self.name,
            verdict=judged.verdict if is_measured else "INVALID",
            is_measured=is_measured,
            hosts=self._hosts(),
            rows=tuple(self._row(type_) for type_ in self.quants.values()),
            objective=choice.objective if choice else "",
            context_tokens=choice.context_tokens if choice else None,
            depth_tokens=choice.decode_depth_tokens if choice else None,
            limits=choice.gates if choice else {},
            memory_limit_mib=max(limits, default=None),
            method=self._method(),
            lineage=self._lineage(),
            files=self._files(),
            notes=tuple(_tidy(note) for note in (*(choice.notes if choice else ()), *judged.notes)),
            commands=self._commands(),
            released=self._released(),
            next_step=_tidy(judged.next_step)
            if is_measured and judged.verdict != "PROMOTE"
            else "",
            sections=report_evidence.sections(self.evidence, judged),
            **self._load_tests(),
        )

    # --- verdicts ---

    def _hosts(self) -> tuple[HostVerdict, ...]:
        if not self._is_measured():
            sentence = "nothing is measured yet"
            return (HostVerdict(hosts=(), verdict="INVALID", sentence=sentence, details=()),)
        if isinstance(self.choice, str) or not self.judged.hosts:
            reason = self.choice if isinstance(self.choice, str) else "no host is declared"
            sentence = f"invalid: nothing is chosen ({_tidy(reason)})"
            return (HostVerdict(hosts=(), verdict="INVALID", sentence=sentence, details=()),)
        return _host_verdicts(self.choice.hosts, self.judged.hosts)

    def _load_tests(self) -> _LoadTests:
        """Tell what served the winners; nothing if no host has a test that speaks of its winner."""
        if isinstance(self.tested, str) or self.judged.is_stale:
            return {"tests": (), "smokes": ()}
        finals = self.judged.hosts
        blocks = report_load.blocks(self.tested, finals)
        built = {
            type_: one.gguf.sha256
            for type_, one in self.built.items()
            if isinstance(one, QuantizeRecord)
        }
        verdicts = {
            type_: {one.verdict for _, one in self._candidates(type_)}
            for type_ in self.quants.values()
        }
        passing = [type_ for type_, found in verdicts.items() if _best_verdict(found) == "PASS"]
        smokes = report_load.smokes(self.tested, passing, built) if blocks else ()
        return {"tests": blocks, "smokes": smokes}

    def _released(self) -> tuple[str, ...]:
        """Say what became of it as a release; nothing of a model that never came so far."""
        path = self.at.model_record("publish", self.name)
        record = records.read_or_reason(path, PublishRecord)
        if not path.exists():
            return ()
        if isinstance(record, str):
            return (wording.sentence(f"not released: {_tidy(record)}"),)
        doubt = self._release_doubt(record)
        if doubt:
            return (wording.sentence(f"not released: {doubt}"),)
        said = (publish.sentence(record), *map(publish.waiver_sentence, record.waivers))
        return tuple(wording.sentence(_tidy(text)) for text in said)

    def _release_doubt(self, record: PublishRecord) -> str:
        """Say why what was published does not speak of the records on disk, if so."""
        if record.status == "refused":
            return ""
        try:
            data = self.at.release(self.name).read_bytes()
            evidence = json.loads(data)["evidence"]
            told = {name: evidence[f"{name}.json"] for name in ("choice", "load-test")}
        except (OSError, ValueError, KeyError, TypeError):
            return "release.json cannot be read"
        if release_id(data) != record.release:
            return "release.json is another one than was published"
        now = {
            "choice": self.at.model_record("choose", self.name),
            "load-test": self.at.model_record("load-test", self.name),
        }
        if any(_sha256(now[name]) != digest for name, digest in told.items()):
            return (
                f"release {short(record.release)} is older than the choice and the load test; "
                f"`fleet repro {self.name}` publishes again"
            )
        return ""

    def _is_measured(self) -> bool:
        """Tell whether there is any measurement, good or bad, or a choice that spoke of one."""
        paths = (self.at.quant_record("benchmark", self.name, type_) for type_ in self.measured)
        return self.at.model_record("choose", self.name).exists() or any(p.exists() for p in paths)

    def _readings(self, type_: str) -> Readings | None:
        """Return the two records of a quant if they are there and of one file."""
        built, measured = self.built[type_], self.measured[type_]
        if isinstance(built, str) or isinstance(measured, str):
            return None
        counts = "prefill" if isinstance(measured.quality, EmbeddingQuality) else "decode"
        if measured.gguf_sha256 != built.gguf.sha256 or not any(
            test.test == counts for test in measured.speed
        ):
            return None
        return Readings(built.key, type_, built, measured)

    def _candidates(self, type_: str) -> list[tuple[str, Candidate]]:
        if isinstance(self.choice, str) or self.judged.is_stale:
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
                else (Reason(hosts=(), text=wording.sentence(self._why_absent(type_))),)
            ),
        )
        built, read = self.built[type_], self._readings(type_)
        if isinstance(built, str):
            return row
        row = replace(
            row, size_mib=built.gguf.size_bytes / MIB, bits_per_weight=built.bits_per_weight
        )
        if read is None:
            return row
        if verdicts == {"INVALID"} or read.benchmark.validity.verdict == "INVALID":
            return _with_kept(row, [one for _, one in candidates])
        return _with_measured(row, read)

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
        brackets = "Brackets hold 95 % intervals, of fewer than 6 samples all of their range"
        return (*lines, f"Measured {when}: {heads}. {brackets}.", *self._certificates())

    def _certificates(self) -> Iterator[str]:
        """
        Yield what a reader should know of the circumstances of a quant, in one line each.

        Of one that is INVALID the reasons stand at the top already.
        """
        for type_, one in self.measured.items():
            if isinstance(one, BenchmarkRecord) and one.validity.verdict == "VALID":
                said = validity.line(one.validity)
                if said:
                    yield _tidy(f"{type_}: {said}")

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


def _tidy(text: str) -> str:
    """Make text of a record, which may come from a stranger, one short harmless line."""
    line = " ".join(clean(text).split())
    return wording.shortened(line, _TEXT_CHARACTERS)


def _sha256(path: Path) -> str | None:
    return release_id(path.read_bytes()) if path.exists() else None


def _host_verdicts(
    hosts: Sequence[HostChoice], finals: Sequence[HostFinal]
) -> tuple[HostVerdict, ...]:
    """Say what was decided; hosts of which the same is to be said are named together."""
    together: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for one, final in zip(hosts, finals, strict=True):
        let_pass = (
            f"Let pass by {each.let_pass}: {each.sentence}" for each in final.reasons
            if each.let_pass
        )  # fmt: skip
        details = (*map(_tidy, (*final.details, *let_pass)), *_details(one))
        together.setdefault((final.verdict, final.sentence, details), []).append(one.host)
    return tuple(
        HostVerdict(hosts=tuple(names), verdict=judged, sentence=sentence, details=details)
        for (judged, sentence, details), names in together.items()
    )


def _details(one: HostChoice) -> tuple[str, ...]:
    details = [one.binding] if one.binding else []
    if one.runner_up:
        details.append(f"Runner-up: {one.runner_up}.")
    if one.winner and one.incumbent:
        same = one.incumbent == one.winner
        details.append(
            "The committed choice stays." if same else f"The committed choice: {one.incumbent}."
        )
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


def _with_measured(row: Row, read: Readings) -> Row:
    return replace(
        row,
        memory_mib=read.memory_mib.value,
        decode_tok_s=read.decode_tok_s,
        prefill_tok_s=read.prefill_tok_s,
        kld_mean_nats=read.kld_mean_nats.value if read.kld_mean_nats else None,
        same_top=read.logits.same_top if read.logits else None,
        ppl_ratio=read.logits.ppl_ratio if read.logits else None,
        cosine_mean=read.embeddings.cosine_mean if read.embeddings else None,
        same_nearest=read.embeddings.same_nearest if read.embeddings else None,
    )


def _with_kept(row: Row, candidates: Sequence[Candidate]) -> Row:
    """Show what the choice kept of a measurement that it does not trust; the rest stays absent."""
    kept = next((one for one in candidates if one.gguf_sha256 is not None), None)
    if kept is None:
        return row
    return replace(
        row,
        memory_mib=kept.memory_mib,
        kld_mean_nats=kept.kld_mean_nats,
        same_top=kept.same_top,
        ppl_ratio=kept.ppl_ratio,
        cosine_mean=kept.cosine_mean,
    )


def _method_line(one: BenchmarkRecord) -> str:
    machine = one.machine
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
        f"{_scored(one.quality)} of corpus {one.quality.corpus_sha256[:12]} "
        f"({wording.tokens(one.quality.scored_tokens)} scored); "
        f"memory by {one.memory.method.upper()}."
    )


def _scored(quality: AnyQuality) -> str:
    """Say of what quality is: a divergence, or cosines of embeddings."""
    tokens = wording.tokens(quality.context_tokens)
    if isinstance(quality, EmbeddingQuality):
        texts = wording.counted(quality.texts_count, "text")
        return f"cosine with the embeddings of f16 over {texts} of up to {tokens} tokens"
    chunks = wording.counted(quality.chunks_count, "chunk")
    return f"divergence from f16 over {chunks} of {tokens} tokens"


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
