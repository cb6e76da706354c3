"""
Whether the records speak of the same bytes, and of what is declared now: the chain of a verdict.

Fail closed: a record that is missing, that holds a number which is none, or that is of another
file, revision, recipe, tool, machine or declaration than the one before it makes the model INVALID.
A choice is read against the numbers that it was made of, and its winners against the limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel

from pipelines import wording
from pipelines.evidence import Readings, Trusted
from pipelines.limits import GATES, applying, memory_limit_mib, misses
from pipelines.load_records import LoadTestRecord
from pipelines.records import (
    BenchmarkRecord,
    CalibrateRecord,
    ChoiceRecord,
    ConvertRecord,
    EmbeddingQuality,
    FetchRecord,
    QuantizeRecord,
)
from pipelines.verdict_words import Reason, differing, tidy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.load_records import Served
    from pipelines.params import Serving
    from pipelines.records import Candidate, HostChoice, Validity
    from pipelines.verdict_evidence import Evidence
    from pipelines.verdict_words import Rule, Verdict


class Chain:
    """The chain of one model; every method yields what is wrong with one link, the first first."""

    def __init__(self, evidence: Evidence) -> None:
        """Hold what is known."""
        self.evidence = evidence
        self.declared = evidence.declared
        self.again = f"Run `fleet repro {self.declared.model}`"

    def records(self) -> Iterator[Reason]:
        """Yield what is not there; of proof, evals and load test their own rules speak."""
        for file, why in self.evidence.missing().items():
            if file in {"verify.json", "evaluate.json", "load-test.json"}:
                continue
            undo = f"`git checkout -- results/{self.evidence.file(file)}` brings back the last one"
            step = undo if file == "release.json" else self.again
            value = ("no such record", "a record of this version", file)
            yield self._invalid("records", tidy(why), value, step)

    def numbers(self) -> Iterator[Reason]:
        """Yield each record with a number that is none."""
        for file, _, record in _all(self.evidence):
            place = _not_finite(record)
            if place:
                yield self._invalid(
                    "numbers",
                    f"{file} holds a number that is none ({place})",
                    ("not finite", "a finite number", file),
                )

    # --- the same bytes everywhere ---

    def links(self) -> Iterator[Reason]:
        """Yield what does not belong together."""
        known, declared = self.evidence, self.declared
        fetched, converted = known.fetched, known.converted
        if isinstance(fetched, FetchRecord):
            yield from self._unequal(
                ("fetch.json", "model", fetched.model, declared.model),
                ("fetch.json", "source", fetched.source, declared.source),
                ("fetch.json", "revision", fetched.revision, declared.revision),
            )
        if isinstance(converted, ConvertRecord):
            yield from self._unequal(
                ("convert.json", "model", converted.model, declared.model),
                ("convert.json", "revision", converted.revision, declared.revision),
                ("convert.json", "recipe", converted.recipe, declared.recipe),
            )
        if isinstance(known.calibrated, CalibrateRecord):
            yield from self._calibrated(known.calibrated)
        for key, type_ in declared.quants.items():
            yield from self._quant(key, type_)
        # Where nothing is chosen it has nothing to speak of.
        hosts = known.choice.hosts if isinstance(known.choice, ChoiceRecord) else ()
        if isinstance(known.tested, LoadTestRecord) and any(one.winner for one in hosts):
            yield from self._tested(known.tested)

    def _calibrated(self, matrix: CalibrateRecord) -> Iterator[Reason]:
        file, converted = "calibrate.json", self.evidence.converted
        yield from self._unequal((file, "model", matrix.model, self.declared.model))
        if isinstance(converted, ConvertRecord):
            yield from self._unequal(
                (file, "f16 sha256", matrix.f16_sha256, converted.gguf.sha256),
                (file, "llama.cpp commit", matrix.llama_cpp_commit, converted.llama_cpp_commit),
            )

    def _quant(self, key: str, type_: str) -> Iterator[Reason]:
        known, declared = self.evidence, self.declared
        built, measured = known.quantized.get(type_), known.measured.get(type_)
        converted, matrix = known.converted, known.calibrated
        q, b = f"quantize/{type_}.json", f"benchmark/{type_}.json"
        if not isinstance(built, QuantizeRecord):
            return
        yield from self._unequal(
            (q, "model", built.model, declared.model),
            (q, "key", built.key, key),
            (q, "type", built.type, type_),
            (q, "recipe", built.recipe, declared.recipe),
        )
        if isinstance(converted, ConvertRecord):
            yield from self._unequal(
                (q, "f16 sha256", built.f16_sha256, converted.gguf.sha256),
                (q, "llama.cpp commit", built.llama_cpp_commit, converted.llama_cpp_commit),
            )
        if isinstance(measured, BenchmarkRecord):
            corpus = measured.quality.corpus_sha256
            yield from self._unequal(
                (b, "model", measured.model, declared.model),
                (b, "evaluation corpus", corpus, declared.corpus_sha256),
                (b, "layers with experts in main memory", *experts(measured, declared.serving)),
                (b, "type", measured.type, type_),
                (b, "sha256", measured.gguf_sha256, built.gguf.sha256),
                (b, "size", measured.size_bytes, built.gguf.size_bytes),
                (b, "f16 sha256", measured.f16_sha256, built.f16_sha256),
                (b, "llama.cpp commit", measured.llama_cpp_commit, built.llama_cpp_commit),
            )
        if built.imatrix_sha256 is not None and isinstance(matrix, CalibrateRecord):
            of_matrix = matrix.imatrix.sha256 if matrix.imatrix else "none"
            yield from self._unequal(
                (q, "importance matrix", built.imatrix_sha256, of_matrix),
                (q, "calibration corpus", built.imatrix_corpus_sha256, matrix.corpus_sha256),
            )

    def _tested(self, tested: LoadTestRecord) -> Iterator[Reason]:
        declared, file = self.declared, "load-test.json"
        yield from self._unequal(
            (file, "model", tested.model, declared.model),
            (file, "context", tested.context_tokens, declared.context_tokens),
            (file, "Modelfile", tested.modelfile, declared.modelfile),
        )
        slos = {host: slo.model_dump(exclude_none=True) for host, slo in declared.slos.items()}
        yield from self._judged_by((file, "service levels", tested.slos, slos))
        for type_ in declared.quants.values():
            served, built = served_of(tested, type_), self.evidence.quantized.get(type_)
            if served is not None and isinstance(built, QuantizeRecord):
                yield from self._served(served, built, tested)

    def _served(
        self, served: Served, built: QuantizeRecord, tested: LoadTestRecord
    ) -> Iterator[Reason]:
        wanted = self.declared.serving
        layers = "0" if tested.machine.backend == "cpu" else str(wanted.gpu_layers)
        what = f"load-test.json, {built.type}"
        yield from self._unequal(
            (what, "sha256", served.gguf_sha256, built.gguf.sha256),
            (what, "context", served.context_tokens, self.declared.context_tokens),
            (what, "number of slots", served.parallel, wanted.parallel),
            (what, "type of the key-value cache", served.kv_type, wanted.kv_type),
            (what, "number of layers on the GPU", served.gpu_layers, layers),
            (what, "layers with experts in main memory", *experts(served, wanted)),
        )

    # --- the choice ---

    def choice(self) -> Iterator[Reason]:
        """Yield why the choice does not speak of the declaration and of the numbers there are."""
        choice, declared = self.evidence.choice, self.declared
        if not isinstance(choice, ChoiceRecord):
            return
        file = "choice.json"
        yield from self._unequal(
            (file, "model", choice.model, declared.model),
            (file, "context", choice.context_tokens, declared.context_tokens),
        )
        limits = {
            name: (memory_limit_mib(spec), spec.margin_mib) for name, spec in declared.hosts.items()
        }
        judged = {one.host: (one.limit_mib, one.margin_mib) for one in choice.hosts}
        gates = applying(declared.gates, to_encoder=self._embeds())
        yield from self._judged_by(
            (file, "gates", choice.gates, gates),
            (file, "objective", choice.objective, declared.objective),
            (file, "hosts", judged, limits),
        )
        for host in choice.hosts:
            yield from self._host(host, choice)

    def _embeds(self) -> bool:
        """Tell whether what was measured makes embeddings."""
        found = self.evidence.measured.values()
        qualities = [one.quality for one in found if isinstance(one, BenchmarkRecord)]
        return any(isinstance(one, EmbeddingQuality) for one in qualities)

    def _host(self, one: HostChoice, choice: ChoiceRecord) -> Iterator[Reason]:
        spoken_of = {each.type for each in one.candidates}
        wanted = set(self.declared.quants.values())
        if spoken_of != wanted:
            yield self._invalid(
                "chain",
                f"choice.json speaks of other quants than are declared, on host {one.host}",
                (_listed(spoken_of), _listed(wanted), "choice.json"),
            )
        for each in one.candidates:
            yield from self._candidate(each, choice)
        passing = [each for each in one.candidates if each.verdict in {"CHOSEN", "PASS"}]
        found = {each.type: self.evidence.measured.get(each.type) for each in passing}
        corpora = {
            measured.quality.corpus_sha256
            for measured in found.values()
            if isinstance(measured, BenchmarkRecord)
        }
        if len(corpora) > 1:
            yield self._invalid(
                "chain",
                f"the quants that pass on host {one.host} were measured on {len(corpora)} corpora",
                (f"{len(corpora)} corpora", "one corpus", "choice.json"),
            )
        # `choose` may have recorded a winner that the candidates do not bear out.
        if one.winner is not None and one.winner not in {each.type for each in passing}:
            yield self._invalid(
                "chain",
                f"choice.json names {tidy(one.winner)} as winner, which did not pass its gates",
                (one.winner, "a quant that passed", "choice.json"),
            )

    def _candidate(self, one: Candidate, choice: ChoiceRecord) -> Iterator[Reason]:
        """Yield why a candidate has not the numbers of the records that there are now."""
        built, measured = self.evidence.quantized.get(one.type), None
        name, passes = f"benchmark/{one.type}.json", one.verdict in {"CHOSEN", "PASS"}
        if one.gguf_sha256 is None:
            if one.verdict != "INVALID":
                yield self._invalid(
                    "chain",
                    f"choice.json lets {one.type} pass without saying which file that is",
                    ("no sha256", "a sha256", "choice.json"),
                )
            return
        measured = self.evidence.measured.get(one.type)
        if not isinstance(built, QuantizeRecord) or not isinstance(measured, BenchmarkRecord):
            return  # said by `records`, or of another set of quants
        yield from self._unequal(
            (f"choice.json, {one.type}", "sha256", one.gguf_sha256, built.gguf.sha256)
        )
        is_valid = is_trusted(measured.validity)
        if passes and not is_valid:
            yield self._invalid(
                "chain",
                f"choice.json lets {one.type} pass, whose measurement is INVALID",
                ("INVALID", "VALID", name),
            )
            return
        if passes:
            yield from self._unequal((name, "machine", measured.machine.hw_id, choice.hw_id))
        if passes and one.decode_tok_s is not None and not measured.speed:
            none = ("no speed", "a test of speed", name)
            yield self._invalid("chain", f"{name} holds no speed", none)
            return
        read = Readings(one.key, one.type, built, measured)
        no_speed = one.decode_tok_s is None and one.prefill_tok_s is None
        is_steady = one.verdict == "INVALID" and no_speed
        numbers = read.steady_numbers() if is_steady or not is_valid else read.numbers()
        for field, value in numbers.items():
            if getattr(one, field) != value:
                yield self._invalid(
                    "chain",
                    f"choice.json is older than {name}: the numbers of {one.type} are others "
                    f"({field})",
                    (str(getattr(one, field)), str(value), "choice.json"),
                )
                return

    def gates(self, one: HostChoice) -> Iterator[Reason]:
        """Yield each limit that the winner of a host misses by its own benchmark."""
        built = self.evidence.quantized.get(one.winner or "")
        measured = self.evidence.measured.get(one.winner or "")
        if not isinstance(built, QuantizeRecord) or not isinstance(measured, BenchmarkRecord):
            return
        quant = Trusted(built.key, built.type, built, measured)
        limits = applying(self.declared.gates, to_encoder=quant.is_encoder)
        missed, unjudged = misses(quant, self.declared.gates)
        for name, limit in limits.items():
            value = GATES[name].read(quant)
            due = f"{name} {wording.declared(limit)}"
            for miss in missed:
                if value is not None and miss.text.endswith(f"({name})"):
                    found = f"{wording.beyond(value, limit)}{GATES[name].unit}"
                    yield self._gate(one, "REJECT", miss.text, found, due)
            for text in unjudged:
                if text.startswith(f"{name} "):
                    yield self._gate(one, "HOLD", text, "not measured", due)

    def _gate(
        self, one: HostChoice, verdict: Verdict, clause: str, value: str, limit: str
    ) -> Reason:
        return Reason(
            rule="gates",
            verdict=verdict,
            clause=clause,
            value=value,
            limit=limit,
            file=self.evidence.file(f"benchmark/{one.winner}.json"),
            next_step=self.again,
            host=one.host,
        )

    # --- words ---

    def _invalid(
        self, rule: Rule, clause: str, found: tuple[str, str, str], next_step: str = ""
    ) -> Reason:
        """Compose a reason of what was found, what was due and where."""
        value, limit, file = found
        return Reason(
            rule=rule,
            verdict="INVALID",
            clause=clause,
            value=value,
            limit=limit,
            file=self.evidence.file(file.partition(",")[0]),
            next_step=next_step or self.again,
        )

    def _unequal(self, *claims: tuple[str, str, object, object]) -> Iterator[Reason]:
        """Yield a reason for each (record, what, found, wanted) that differs."""
        for record, what, found, wanted in claims:
            if found != wanted:
                had, due = differing(str(found), str(wanted))
                clause = f"{record} is of another {what} ({had}, not {due})"
                yield self._invalid("chain", clause, (f"{what} {had}", due, record))

    def _judged_by(self, *claims: tuple[str, str, object, object]) -> Iterator[Reason]:
        """Yield a reason for each (record, what, found, wanted) that the declaration changed."""
        for record, what, found, wanted in claims:
            if found != wanted:
                clause = f"{record} was made by other {what} than params.yaml declares now"
                yield self._invalid("chain", clause, (_listed(found), _listed(wanted), record))


def finite(evidence: Evidence) -> Evidence:
    """Return what is known without the records that hold a number which is none."""
    for file, field, record in _all(evidence):
        place = _not_finite(record)
        if place:
            why = f"{file} holds a number that is none ({place})"
            quants = getattr(evidence, field)
            type_ = file.rpartition("/")[2].removesuffix(".json")
            is_of_quants = isinstance(quants, Mapping)
            change: Any = {field: {**quants, type_: why} if is_of_quants else why}
            evidence = replace(evidence, **change)
    return evidence


def _all(known: Evidence) -> Iterator[tuple[str, str, Any]]:
    """Yield (file, field of `Evidence`, record) of all that may hold numbers."""
    yield "fetch.json", "fetched", known.fetched
    yield "convert.json", "converted", known.converted
    yield "verify.json", "verified", known.verified
    yield "calibrate.json", "calibrated", known.calibrated
    yield "evaluate.json", "evaluated", known.evaluated
    yield "choice.json", "choice", known.choice
    yield "load-test.json", "tested", known.tested
    yield "compare.json", "compared", known.compared
    yield "engine.json", "engine", known.engine
    for type_, built in known.quantized.items():
        yield f"quantize/{type_}.json", "quantized", built
    for type_, measured in known.measured.items():
        yield f"benchmark/{type_}.json", "measured", measured


def is_trusted(found: Validity) -> bool:
    """Tell whether a measurement calls itself valid, and nothing in it says otherwise."""
    is_void = any(each.outcome == "void" for each in found.conditions)
    return found.verdict == "VALID" and not found.reasons and not is_void


def experts(record: BenchmarkRecord | Served, serving: Serving) -> tuple[str, str]:
    """Spell how many layers had their experts in main memory, and how many were to."""
    found, wanted = (str(one.cpu_moe_layers or "none") for one in (record, serving))
    return found, wanted


def served_of(tested: LoadTestRecord, type_: str) -> Served | None:
    """Return how a quant was served: as a winner, or in a smoke that it passed; None if not."""
    for test in tested.winners:
        if test.type == type_:
            return test.served
    passed = (one for one in tested.smokes if one.type == type_ and one.outcome == "PASS")
    return next((one.served for one in passed), None)


def _listed(found: object) -> str:
    """Write names or numbers of the declaration in one line."""
    if isinstance(found, dict):
        return ", ".join(f"{key} {found[key]}" for key in sorted(found)) or "none"
    if isinstance(found, set):
        return ", ".join(sorted(found)) or "none"
    return str(found)


# What holds no number that could be none; asked for first, since most of a record is this.
_PLAIN: Final = frozenset({str, int, bool, type(None)})


def _not_finite(value: object, place: str = "") -> str:
    """Name the first number below a record that is no number; empty if all are finite."""
    kind = type(value)
    if kind in _PLAIN:
        return ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else place
    if isinstance(value, BaseModel):
        inside: Any = value.__dict__.items()
    elif kind is dict:
        inside = value.items()  # type: ignore[attr-defined]
    elif kind in {list, tuple}:
        inside = enumerate(value)  # type: ignore[arg-type]
    else:
        return ""
    for name, each in inside:
        if type(each) not in _PLAIN:
            found = _not_finite(each, f"{place}.{name}".lstrip("."))
            if found:
                return found
    return ""
