"""
What stands against a release: one sentence for each thing, with what to do about it.

Fail closed: every declared quant has all its records, each speaks of the same bytes as the one
before it, every host was judged and none is INVALID, somebody was promoted, the licence is known
and the one that was accepted, and upstream lets everybody have its files. What a person may let
pass (`waivers` of the model: a HOLD, a licence, a gate of upstream's) is named in the release.

Nothing here reads a file or a clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines import golden, verdict, wording
from pipelines.console import clean
from pipelines.evidence import Readings
from pipelines.release_records import ReleaseWaiver

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pipelines.load_records import LoadTestRecord, Served, WinnerTest
    from pipelines.params import PublishSlice, Waivable
    from pipelines.records import (
        BenchmarkRecord,
        CalibrateRecord,
        Candidate,
        ChoiceRecord,
        ConvertRecord,
        FetchRecord,
        QuantizeRecord,
    )
    from pipelines.release_records import Release
    from pipelines.verdict import HostFinal

_SHORT_CHARACTERS = 12
_CLAUSE_CHARACTERS = 400
# By which the Hub says that it does not say.
_UNKNOWN_LICENSES = frozenset({"", "other", "unknown"})
# Texts that a licence may consist of; the name alone decides, as upstream spells it.
_LICENSE_WORDS = ("LICENSE", "LICENCE", "NOTICE", "COPYING")


@dataclass(frozen=True, kw_only=True)
class Papers:
    """Every record of a model, and the release before; quants by their type."""

    fetched: FetchRecord
    converted: ConvertRecord
    calibrated: CalibrateRecord
    quantized: Mapping[str, QuantizeRecord]
    measured: Mapping[str, BenchmarkRecord]
    choice: ChoiceRecord
    tested: LoadTestRecord
    previous: Release | None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """
    What follows from the papers.

    Attributes:
        reasons: Why there is no release; empty if there may be one.
        waivers: Those without which there would be more reasons.
        hosts: The final verdict for each host.
        released: Hosts that are served by the release.
        types: Quants that it holds, in the order of the declaration.
        license: The Hub's word for the licence.
    """

    reasons: tuple[str, ...]
    waivers: tuple[ReleaseWaiver, ...]
    hosts: tuple[HostFinal, ...]
    released: tuple[str, ...]
    types: tuple[str, ...]
    license: str


@dataclass
class _Findings:
    """Reasons as they are found, and the waivers that took some of them away."""

    slice_: PublishSlice
    today: str
    reasons: list[str] = field(default_factory=list)
    waivers: list[ReleaseWaiver] = field(default_factory=list)

    def waivable(self, gate: Waivable, problem: str, remedy: str) -> bool:
        """Note something that a waiver lets pass; return whether one does."""
        mine = [each for each in self.slice_.waivers if each.gate == gate]
        counting = [each for each in mine if each.until >= self.today]
        if counting:
            one = counting[0]
            self.waivers.append(
                ReleaseWaiver(gate=one.gate, who=one.who, why=one.why, until=one.until)
            )
            return True
        over = f" The waiver of {mine[0].who} ended on {mine[0].until}." if mine else ""
        self.reasons.append(
            f"{wording.sentence(problem)}{over} {remedy}, or let it pass with a waiver of gate "
            f"`{gate}` in models.{self.slice_.model}.waivers."
        )
        return False


def judge(slice_: PublishSlice, papers: Papers, *, today: str) -> Judgement:
    """
    Decide whether there may be a release, and of what.

    Args:
        slice_: What is declared.
        papers: All records.
        today: The day in UTC, as 2027-01-31; a waiver counts on its last day, too.
    """
    found = _Findings(slice_, today)
    again = f"Run `fleet repro {slice_.model}`."
    found.reasons += [f"{wording.sentence(text)} {again}" for text in _doubts(slice_, papers)]
    hosts = verdict.final(papers.choice, papers.tested)
    released = _released(found, hosts, papers.choice)
    types = _types(slice_, papers, released)
    if released and not types and not found.reasons:
        found.reasons.append(f"No quant that passed its gates was served. {again}")
    license_ = _license(found, papers)
    if papers.fetched.gated is not None:
        found.waivable(
            "gated",
            f"{_shown(papers.fetched.source)} is gated ({papers.fetched.gated}): upstream gives "
            "its files only to those who agreed to its terms",
            "Keep it out of registries that others read",
        )
    return Judgement(
        reasons=tuple(found.reasons),
        waivers=tuple(found.waivers),
        hosts=hosts,
        released=released,
        types=types,
        license=license_,
    )


def missing(model: str, why: Sequence[str]) -> tuple[str, ...]:
    """
    Say that records are not there.

    Args:
        model: Whose.
        why: A clause for each.
    """
    return tuple(
        f"Nothing is released without every record: {_shown(each)}. Run `fleet repro {model}`."
        for each in why
    )


def license_files(fetched: FetchRecord) -> dict[str, str]:
    """Return the sha256 of each licence text that upstream ships, by name."""
    return {
        file.name: file.sha256
        for file in fetched.files
        if file.name.upper().split(".")[0] in _LICENSE_WORDS
    }


def served_of(tested: LoadTestRecord, type_: str) -> Served | None:
    """Return how a quant was served: as a winner, or in a smoke that it passed; None if not."""
    for test in tested.winners:
        if test.type == type_:
            return test.served
    passed = (one for one in tested.smokes if one.type == type_ and one.outcome == "PASS")
    return next((one.served for one in passed), None)


# --- the same bytes everywhere ----------------------------------------------------------------


def _doubts(slice_: PublishSlice, papers: Papers) -> Iterator[str]:
    """Yield as a clause what does not belong together, the most basic first."""
    fetched, converted, choice, tested = (
        papers.fetched, papers.converted, papers.choice, papers.tested,
    )  # fmt: skip
    yield from _unequal(
        ("fetch.json", "model", fetched.model, slice_.model),
        ("fetch.json", "source", fetched.source, slice_.source),
        ("fetch.json", "revision", fetched.revision, slice_.revision),
        ("convert.json", "model", converted.model, slice_.model),
        ("convert.json", "revision", converted.revision, fetched.revision),
        ("calibrate.json", "model", papers.calibrated.model, slice_.model),
        ("calibrate.json", "f16 sha256", papers.calibrated.f16_sha256, converted.gguf.sha256),
        (
            "calibrate.json",
            "llama.cpp commit",
            papers.calibrated.llama_cpp_commit,
            converted.llama_cpp_commit,
        ),
        ("choice.json", "model", choice.model, slice_.model),
        ("choice.json", "context", choice.context_tokens, slice_.context_tokens),
        ("load-test.json", "model", tested.model, slice_.model),
        ("load-test.json", "context", tested.context_tokens, slice_.context_tokens),
        ("load-test.json", "Modelfile", tested.modelfile, slice_.modelfile),
    )
    for type_ in slice_.quants.values():
        yield from _quant_doubts(slice_, type_, papers)
    for host in choice.hosts:
        yield from _choice_doubts(slice_, host.host, papers)


def _quant_doubts(slice_: PublishSlice, type_: str, papers: Papers) -> Iterator[str]:
    built, measured = papers.quantized[type_], papers.measured[type_]
    key = next(key for key, each in slice_.quants.items() if each == type_)
    converted, matrix = papers.converted, papers.calibrated
    q, b = f"quantize/{type_}.json", f"benchmark/{type_}.json"
    yield from _unequal(
        (q, "model", built.model, slice_.model),
        (q, "key", built.key, key),
        (q, "type", built.type, type_),
        (q, "f16 sha256", built.f16_sha256, converted.gguf.sha256),
        (q, "llama.cpp commit", built.llama_cpp_commit, converted.llama_cpp_commit),
        (q, "recipe", built.recipe, converted.recipe),
        (b, "model", measured.model, slice_.model),
        (b, "type", measured.type, type_),
        (b, "sha256", measured.gguf_sha256, built.gguf.sha256),
        (b, "size", measured.size_bytes, built.gguf.size_bytes),
        (b, "f16 sha256", measured.f16_sha256, built.f16_sha256),
        (b, "llama.cpp commit", measured.llama_cpp_commit, built.llama_cpp_commit),
    )
    if built.imatrix_sha256 is not None:
        of_matrix = matrix.imatrix.sha256 if matrix.imatrix else "none"
        yield from _unequal(
            (q, "importance matrix", built.imatrix_sha256, of_matrix),
            (q, "calibration corpus", built.imatrix_corpus_sha256, matrix.corpus_sha256),
        )
    served = served_of(papers.tested, type_)
    if served is not None:
        yield from _served_doubts(slice_, served, built, papers.tested)


def _served_doubts(
    slice_: PublishSlice, served: Served, built: QuantizeRecord, tested: LoadTestRecord
) -> Iterator[str]:
    declared = slice_.serving
    layers = "0" if tested.machine.backend == "cpu" else str(declared.gpu_layers)
    what = f"load-test.json, {built.type}"
    yield from _unequal(
        (what, "sha256", served.gguf_sha256, built.gguf.sha256),
        (what, "context", served.context_tokens, slice_.context_tokens),
        (what, "number of slots", served.parallel, declared.parallel),
        (what, "type of the key-value cache", served.kv_type, declared.kv_type),
        (what, "number of layers on the GPU", served.gpu_layers, layers),
    )


def _choice_doubts(slice_: PublishSlice, host: str, papers: Papers) -> Iterator[str]:
    one = next(each for each in papers.choice.hosts if each.host == host)
    spoken_of = {each.type for each in one.candidates}
    if spoken_of != set(slice_.quants.values()):
        yield f"choice.json speaks of other quants than are declared, on host {host}"
    for each in one.candidates:
        built = papers.quantized.get(each.type)
        if built is None or each.gguf_sha256 is None:
            continue  # another set of quants, or INVALID and never chosen
        yield from _unequal(
            (f"choice.json, {each.type}", "sha256", each.gguf_sha256, built.gguf.sha256)
        )
    passing = [each for each in one.candidates if each.verdict in {"CHOSEN", "PASS"}]
    for each in passing:
        if each.gguf_sha256 is None:
            yield f"choice.json lets {each.type} pass without saying which file that is"
        measured, built = papers.measured.get(each.type), papers.quantized.get(each.type)
        if measured is not None and built is not None:
            yield from _measurement_doubts(each, built, measured, papers.choice)
    corpora = {papers.measured[each.type].quality.corpus_sha256
               for each in passing if each.type in papers.measured}  # fmt: skip
    if len(corpora) > 1:
        yield f"the quants that pass on host {host} were measured on {len(corpora)} corpora"
    # `choose` may have recorded a winner that the candidates do not bear out.
    if one.winner is not None and one.winner not in {each.type for each in passing}:
        yield f"choice.json names {_shown(one.winner)} as winner, which did not pass its gates"


def _measurement_doubts(
    candidate: Candidate, built: QuantizeRecord, measured: BenchmarkRecord, choice: ChoiceRecord
) -> Iterator[str]:
    """Yield why a candidate that passed does not speak of its measurement."""
    name = f"benchmark/{candidate.type}.json"
    if measured.validity.verdict != "VALID":
        yield f"choice.json lets {candidate.type} pass, whose measurement is INVALID"
        return
    yield from _unequal((name, "machine", measured.machine.hw_id, choice.hw_id))
    if not any(test.test == "decode" for test in measured.speed):
        yield f"{name} holds no speed"
        return
    numbers = Readings(candidate.key, candidate.type, built, measured).numbers()
    if any(getattr(candidate, field_) != value for field_, value in numbers.items()):
        yield f"choice.json is older than {name}: the numbers of {candidate.type} are others"


def _unequal(*claims: tuple[str, str, object, object]) -> Iterator[str]:
    """Yield a clause for each (record, what, found, wanted) that differs."""
    for record, what, found, wanted in claims:
        if found != wanted:
            had, due = _differing(str(found), str(wanted))
            yield f"{record} is of another {what} ({had}, not {due})"


def _differing(found: str, wanted: str) -> tuple[str, str]:
    """Shorten two digests or words to what shows that they differ."""
    if found[:_SHORT_CHARACTERS] != wanted[:_SHORT_CHARACTERS]:
        return _shown(found)[:_SHORT_CHARACTERS], _shown(wanted)[:_SHORT_CHARACTERS]
    return _shown(found), _shown(wanted)


# --- verdicts ---------------------------------------------------------------------------------


def _released(
    found: _Findings, hosts: Sequence[HostFinal], choice: ChoiceRecord
) -> tuple[str, ...]:
    """
    Return the hosts that the release serves: PROMOTE, or HOLD that somebody let pass.

    A host for which nothing was chosen is served by nothing, whatever was let pass.
    """
    held = [one for one in hosts if one.verdict == "HOLD"]
    for one in hosts:
        if one.verdict == "INVALID":
            found.reasons.append(
                f"Host {one.host} is INVALID: {wording.sentence(_without_verb(one))} "
                f"`fleet repro {found.slice_.model}` measures again what is not to be trusted."
            )
    let_pass = False
    if held:
        names = wording.listed([one.host for one in held])
        let_pass = found.waivable(
            "hold",
            f"{names}: HOLD: {_without_verb(held[0])}",
            "Settle it (`fleet report` says what is open)",
        )
    good = {"PROMOTE", "HOLD"} if let_pass else {"PROMOTE"}
    served = {one.host for one in choice.hosts if one.winner is not None}
    released = tuple(one.host for one in hosts if one.verdict in good and one.host in served)
    if not released and not found.reasons:
        why = next((f": {_shown(one.sentence)}" for one in hosts), "")
        found.reasons.append(
            f"No host is PROMOTE{wording.sentence(why)} Declare a quant, a gate or a host that "
            "fits; `fleet report` says what kept each quant out."
        )
    return released


def _without_verb(one: HostFinal) -> str:
    """Return the sentence of a verdict that is named before it."""
    return _shown(one.sentence).removeprefix(f"{one.verdict.lower()}: ")


def _types(slice_: PublishSlice, papers: Papers, released: Sequence[str]) -> tuple[str, ...]:
    """
    Return what passed its gates on a released host and was served, in the order of declaration.

    A quant that failed its smoke makes its host HOLD; a waiver of that does not bring it in. One
    that won for another host and failed there at more than that host's levels stays out as well.
    """
    passed = {
        each.type
        for host in papers.choice.hosts
        for each in host.candidates
        if host.host in released and each.verdict in {"CHOSEN", "PASS"}
    }
    return tuple(
        type_
        for type_ in slice_.quants.values()
        if type_ in passed
        and served_of(papers.tested, type_) is not None
        and all(_is_sound(test) for test in papers.tested.winners if test.type == type_)
    )


def _is_sound(test: WinnerTest) -> bool:
    """Tell whether a test found nothing wrong with the quant itself, whatever its host asks for."""
    return (
        not test.failures
        and not test.invalid
        and (test.golden is None or golden.objection(test.golden) is None)
        and (test.degenerate is None or test.degenerate.outcome != "FAIL")
        and all(one.outcome != "FAIL" for one in test.regressions)
    )


# --- licence ----------------------------------------------------------------------------------


def _license(found: _Findings, papers: Papers) -> str:
    """Return the licence of the release; note it where nobody has accepted it."""
    declared, stated = found.slice_.license, papers.fetched.license or ""
    key = f"models.{found.slice_.model}.license"
    known = stated.lower() not in _UNKNOWN_LICENSES
    license_ = (declared or "other") if not known else stated
    remedy = f"Read it and declare what you accept as {key}"
    if not known and declared is None:
        found.waivable("license", "Upstream states no licence", remedy)
        return license_
    if known and declared is not None and declared != stated:
        found.waivable(
            "license",
            f"{key} accepts {declared}, but upstream states {_shown(stated)}",
            remedy,
        )
        return license_
    change = _license_change(papers, license_)
    # A declared name that upstream confirms says that somebody has read this one. Where upstream
    # has none, the declared one says nothing about a text that changed.
    if change is not None and not (declared is not None and (known or change.is_of_name)):
        found.waivable("license", change.clause, remedy)
    return license_


@dataclass(frozen=True)
class _LicenseChange:
    """How the licence is another one than was accepted: as a clause, and whether by its name."""

    clause: str
    is_of_name: bool


def _license_change(papers: Papers, license_: str) -> _LicenseChange | None:
    """
    Compare the licence with that of the release before; None if it is the accepted one.

    What was let pass was not accepted: the waiver of the release before does not end by being used,
    or equal records would give another release the second time, without a word of a waiver.
    """
    previous = papers.previous
    if previous is None:
        return None
    if previous.license.id != license_:
        was, now = _shown(previous.license.id), _shown(license_)
        clause = f"The licence has changed from {was} to {now} since the release before"
        return _LicenseChange(clause, is_of_name=True)
    if previous.license.files != license_files(papers.fetched):
        clause = "The text of the licence has changed since the release before"
        return _LicenseChange(clause, is_of_name=False)
    waived = next((each for each in previous.waivers if each.gate == "license"), None)
    if waived is not None:
        clause = f"The licence was let pass by {_shown(waived.who)} for the release before"
        return _LicenseChange(f"{clause}, and nobody has accepted it since", is_of_name=False)
    return None


def _shown(text: str) -> str:
    """Make text of a record one short harmless clause."""
    return wording.shortened(" ".join(clean(text).split()), _CLAUSE_CHARACTERS).rstrip(".")
