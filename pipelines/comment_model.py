"""
What a comment says of one model: verdict, gates, changes, cost, the way back.

Two trees are read, and git where older records are asked for. Nothing is judged here: verdicts and
reasons are those of `pipelines.verdict`, limits those of `pipelines.limits`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from pipelines import (
    comment_table,
    gate,
    limits,
    records,
    report,
    verdict_engine,
    verdict_words,
    wording,
)
from pipelines.ci_records import TimesRecord
from pipelines.comment_table import Then
from pipelines.comment_tree import (
    Change,
    GateLine,
    History,
    HostLine,
    HostTable,
    ModelComment,
    Point,
)
from pipelines.compare_engine_records import EngineRecord
from pipelines.compare_records import CompareRecord
from pipelines.console import clean
from pipelines.errors import StoreError
from pipelines.evidence import Readings, Trusted
from pipelines.ledger import Ledger
from pipelines.publishing_words import shown_size
from pipelines.records import (
    BenchmarkRecord,
    ChoiceRecord,
    ConvertRecord,
    FetchRecord,
    QuantizeRecord,
)
from pipelines.release_records import STABLE, short
from pipelines.report_tree import VERDICTS
from pipelines.tables import at as at_tokens
from pipelines.verdict_rules import binding_outcome
from pipelines.verify_records import VerifyRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pipelines.ci_records import GateModel, ModelPlan
    from pipelines.comment_tree import Cell, Outcome
    from pipelines.layout import Layout
    from pipelines.params import JudgeSlice
    from pipelines.report import Told
    from pipelines.trees import Git
    from pipelines.verdict_words import Reason

MOST_POINTS: Final = 20
_MOST_NAMES: Final = 6
# By which two sentences about the same limit are known as such.
_SAME_CHARACTERS: Final = 40
_TEXT_CHARACTERS: Final = 300
_WHY_CHARACTERS: Final = 160
_VERBS: Final = {
    "PROMOTE": "promote", "HOLD": "hold", "REJECT": "reject", "INVALID": "measure again",
}  # fmt: skip
_OUTCOMES: Final[dict[str, Outcome]] = {
    "PROMOTE": "PASS", "HOLD": "HOLD", "REJECT": "FAIL", "INVALID": "INVALID",
    "PASS": "PASS", "FAIL": "FAIL", "INCONCLUSIVE": "HOLD", "SKIP": "PASS",
}  # fmt: skip
# Rules of a verdict that are gates although no number is declared for them.
_OTHER_GATES: Final = {
    "verify": "conversion", "evaluate": "task evals", "compare": "against the champion",
    "engine": "engine on the same GGUF",
    "license": "licence", "gated": "terms of upstream",
}  # fmt: skip
# The same of what stops everything: records that are missing or do not fit together.
_CHAIN_GATES: Final = {
    "records": "records", "numbers": "numbers", "chain": "chain of digests", "choose": "choice",
    "gates": "limits", "load-test": "load test",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A second machine that measured: its host, and its records as if they were the model's."""

    host: str
    at: Layout
    declared: JudgeSlice


@dataclass(frozen=True, kw_only=True)
class Sources:
    """
    What is known of one model.

    Attributes:
        declared: What it is judged by at the head.
        now: The tree of the head.
        before: The tree of the base; None if there is none.
        day: In UTC, by which waivers count.
        plan: What the plan says of it; None if nobody planned.
        what: The difference in the declaration, as sentences.
        primary: Host whose machine measured `now`; the first one if empty.
        others: What second machines measured.
        git: Where older records are; None if they are not asked for.
        base: Commit from which older records are counted back.
        times_s: How long each stage ran, of what was measured now.
        is_uncovered: Whether something that is declared was never measured.
    """

    declared: JudgeSlice
    now: Layout
    before: Layout | None
    day: str
    plan: ModelPlan | None = None
    what: tuple[str, ...] = ()
    primary: str = ""
    others: tuple[Measured, ...] = ()
    git: Git | None = None
    base: str = ""
    times_s: Mapping[str, float] | None = None
    is_uncovered: bool = False


# --- the model --------------------------------------------------------------------------------


def comment(given: Sources, mark_of: Mapping[str, str]) -> ModelComment:
    """Compose what is said of a model; `mark_of` are the marks of the verdicts."""
    name = given.declared.model
    told = report.tell(given.declared, given.now, given.day)
    others = [(one, report.tell(one.declared, one.at, given.day)) for one in given.others]
    then = _then(told, given)
    hosts, verdict, step = _verdict(told, others, given)
    winner = told.report.winner
    gates = tuple(_gates_of_all(told, others, given)) if told.report.is_measured else ()
    # Of several hosts the winner of one is not what is wrong with another.
    is_elsewhere = verdict != "PROMOTE" and len(hosts) > 1
    has_why = winner is None or verdict == "INVALID" or is_elsewhere
    why = _why(verdict, hosts) if has_why else ""
    if verdict == "UNMEASURED" and hosts:
        why = "the records are not those of what is declared here"
    found = ModelComment(
        name=name,
        verdict=verdict,
        verb=_VERBS.get(verdict, "not measured yet"),
        winner=winner.type if winner and not why else "",
        was=_was(told, then, given) if not why else "",
        why=why,
        hosts=hosts,
        next_step=step,
        against=_against(told, then),
        table=comment_table.of_model(told.report, told.evidence, then),
        gates=gates,
        changes=tuple(_changes(name, given)),
        declared=tuple(map(_tidy, given.what)),
        covered=bool(given.plan and given.plan.covered),
        cost=tuple(_cost(told, given)),
        history=_history(told, given),
        others=tuple(
            HostTable(
                host=one.host,
                table=table,
                report=each.report,
            )
            for one, each in others
            if (table := comment_table.of_model(each.report, each.evidence, None))
        ),
        report=told.report,
    )
    way, note = rollback(name, given.before or given.now)
    row = _row(told, then, mark_of[verdict], found)
    return replace(found, rollback=way, rollback_note=note, row=row)


def _why(verdict: str, hosts: Sequence[HostLine]) -> str:
    """Say in a clause why nothing is chosen, or why what was measured is not to be believed."""
    one = next((host for host in hosts if host.verdict == verdict), None)
    if one is None:
        return ""
    where = f"on {one.where}, " if one.where else ""
    said = verdict_words.without_verb(one.sentence, one.verdict)  # type: ignore[arg-type]
    return f"{where}{wording.shortened(said, _WHY_CHARACTERS)}"


def removed(name: str, before: Layout) -> ModelComment:
    """Say what becomes of a model that is declared no more."""
    way, _ = rollback(name, before)
    return ModelComment(
        name=name,
        verdict="REMOVED",
        verb="declared no more",
        rollback_note="What was released of it stays in its registries until `fleet retire` takes "
        "it away."
        if way
        else "Nothing of it was ever released.",
    )


def _row(told: Told, then: Then | None, mark: str, found: ModelComment) -> tuple[Cell, ...]:
    passed = len(found.gates) - len(found.against_promotion)
    gates = f"{passed} of {len(found.gates)}" if found.gates else ""
    return comment_table.winner_row(told.report, told.evidence, then, mark, gates)


# --- the base ---------------------------------------------------------------------------------


def _then(told: Told, given: Sources) -> Then | None:
    """Read what the base holds of the quants that there are now."""
    if given.before is None:
        return None
    name, before = given.declared.model, given.before
    built: dict[str, QuantizeRecord] = {}
    read: dict[str, Readings] = {}
    chosen = records.read_or_reason(before.model_record("choose", name), ChoiceRecord)
    host = _first_host(told)
    winner = ""
    if isinstance(chosen, ChoiceRecord) and chosen.model == name:
        found = {one.host: one.winner or "" for one in chosen.hosts}
        winner = found.get(host) or next(filter(None, found.values()), "")
    for type_ in dict.fromkeys((*given.declared.quants.values(), winner)):
        if not type_ or "/" in type_:
            continue
        one = records.read_or_reason(before.quant_record("quantize", name, type_), QuantizeRecord)
        measured = records.read_or_reason(
            before.quant_record("benchmark", name, type_), BenchmarkRecord
        )
        if isinstance(one, QuantizeRecord):
            built[type_] = one
        if (both := comment_table.sound(one, measured)) is not None:
            read[type_] = both
    compared = told.evidence.compared
    return Then(
        read=read,
        built=built,
        winner=winner,
        compared=compared if isinstance(compared, CompareRecord) else None,
    )


def _first_host(told: Told) -> str:
    choice = told.evidence.choice
    hosts = choice.hosts if isinstance(choice, ChoiceRecord) else ()
    return next((one.host for one in hosts if one.winner), "")


def _was(told: Told, then: Then | None, given: Sources) -> str:
    """Say what the base chose: `was Q8_0`, `as before`, `new`."""
    winner = told.report.winner
    if winner is None:
        return f"was {then.winner}" if then and then.winner else ""
    if then is None or not then.built:
        return "new"
    if not then.winner:
        return "nothing was chosen before"
    if then.winner != winner.type:
        return f"was {_tidy(then.winner)}"
    return _was_same_type(winner.type, told, then, given)


def _was_same_type(type_: str, told: Told, then: Then, given: Sources) -> str:
    """Say how the file of a type that was chosen before differs from the one of then."""
    now, before = told.evidence.quantized.get(type_), then.built.get(type_)
    if before is None or not isinstance(now, QuantizeRecord):
        return f"was {type_}"
    if now.gguf.sha256 == before.gguf.sha256:
        return "as before"
    name = given.declared.model
    then_revision, revision = _revision(given.before, name), _revision(given.now, name)
    if then_revision == revision:
        return f"was {type_}, another file"
    return f"was {type_} at {_short(then_revision)}"


def _revision(at: Layout | None, name: str) -> str:
    found = records.read_or_reason(at.model_record("fetch", name), FetchRecord) if at else "no base"
    return found.revision if isinstance(found, FetchRecord) else "another revision"


def _short(text: str) -> str:
    is_hex = len(text) == 40 and set(text) <= set("0123456789abcdef")  # noqa: PLR2004 - a commit
    return text[:12] if is_hex else _tidy(text)


def _against(told: Told, then: Then | None) -> str:
    """Say in one sentence how the winner differs from what the base chose."""
    winner = told.report.winner
    if winner is None or then is None or not then.winner:
        return ""
    now = comment_table.readings(told.evidence, winner.type) if winner.decode_tok_s else None
    now = now or (comment_table.readings(told.evidence, winner.type) if winner.prefill_tok_s else
                  None)  # fmt: skip
    champion = then.built.get(then.winner)
    compared = comment_table.speaks_of(
        then.compared, champion, told.evidence.quantized.get(winner.type)
    )
    found = comment_table.changes(now, then.read.get(then.winner), compared)
    speeds = [
        f"{name} {delta.text}"
        for name, delta in (("decode", found.decode), ("prefill", found.prefill))
        if delta is not None
    ]
    how = "both in turns in one run" if found.is_in_turns else "from separate runs"
    parts = [f"{', '.join(speeds)}, {how}"] if speeds else []
    if found.divergence:
        noise = f" {comment_table.NOISE}" if found.divergence.is_noise else ""
        first, second = wording.pair(*_divergences(now, then.read.get(then.winner), compared))
        parts.append(f"divergence {first} → {second} nats{noise}")
    elif found.is_same_divergence and speeds:
        parts.append("the same quality")
    return f"Against {_tidy(then.winner)} of the base: {'; '.join(parts)}." if parts else ""


def _divergences(
    now: Readings | None, before: Readings | None, compared: CompareRecord | None
) -> tuple[float, float]:
    """Return the mean divergences that a change was computed from, in nats."""
    if compared is not None and compared.quality is not None:
        quality = compared.quality
        return quality.champion_kld_mean_nats, quality.challenger_kld_mean_nats
    assert now is not None, "the change was computed"
    assert before is not None, "the change was computed"
    return before.divergence.value, now.divergence.value


# --- the verdict ------------------------------------------------------------------------------


def _verdict(
    told: Told, others: Sequence[tuple[Measured, Told]], given: Sources
) -> tuple[tuple[HostLine, ...], str, str]:
    """Put the verdicts of all machines together, as the gate does."""
    name = told.report.name
    if not told.report.is_measured and not others:
        return (), "UNMEASURED", f"`fleet repro {name}` measures it."
    hosts = tuple(given.declared.hosts)
    primary = given.primary or next(iter(hosts))
    judged = {primary: told.judged} | {one.host: each.judged for one, each in others}
    found = tuple(gate.of_hosts(name, hosts, primary, judged))
    verdict = verdict_words.worst(*(one.verdict for one in found))
    if verdict == "INVALID" and given.is_uncovered:
        # Nothing was disturbed: the records are of what was declared before.
        return tuple(_host_lines(found)), "UNMEASURED", f"`fleet repro {name}` measures it."
    step = next((one.next_step for one in found if one.verdict == verdict), "")
    return tuple(_host_lines(found)), verdict, step if verdict != "PROMOTE" else ""


def _host_lines(found: Sequence[GateModel]) -> Iterator[HostLine]:
    """Yield a line for each host, or one for several of which the same is to be said."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for one in found:
        step = one.next_step if one.verdict != "PROMOTE" else ""
        together.setdefault((one.verdict, one.sentence, step), []).append(one.host)
    for (verdict, sentence, step), hosts in together.items():
        many = f"{len(hosts)} hosts" if len(hosts) > _MOST_NAMES else wording.listed(hosts)
        yield HostLine(
            where=_tidy(many) if len(found) > 1 else "",
            verdict=verdict,
            sentence=sentence,
            next_step=step,
        )


# --- the gates of the winner ------------------------------------------------------------------


def _gates_of_all(
    told: Told, others: Sequence[tuple[Measured, Told]], given: Sources
) -> Iterator[GateLine]:
    """Yield the gates of every machine, each for the hosts that are judged by it."""
    elsewhere = {one.host for one, _ in others}
    yield from _gates(told, frozenset(given.declared.hosts) - elsewhere)
    for one, each in others:
        for line in _gates(each, frozenset({one.host})):
            yield replace(line, host=one.host)


def _gates(told: Told, hosts: frozenset[str]) -> Iterator[GateLine]:
    """Yield every gate of the winner: declared limits, levels of the load test, proofs."""
    on_limits, on_levels = tuple(_of_limits(told)), tuple(_of_levels(told, hosts))
    yield from on_limits
    yield from on_levels
    counting = [each for each in told.judged.reasons
                if each.counts and (not each.host or each.host in hosts)]  # fmt: skip
    for rule, name in _OTHER_GATES.items():
        against = [each for each in counting if each.rule == rule]
        value = _proven(told, rule)
        if against:
            yield from (_of_reason(each, name) for each in against)
        elif value:
            yield GateLine(name=name, outcome="PASS", value=value[0], limit=value[1])
    missed = [one.sentence.rstrip(".") for one in (*on_limits, *on_levels) if one.sentence]
    for each in counting:
        # Of a limit or level there is a line already.
        is_told = any(each.clause.startswith(text[:_SAME_CHARACTERS]) for text in missed)
        if each.rule in _CHAIN_GATES and not is_told:
            yield _of_reason(each, _CHAIN_GATES[each.rule])


def _of_reason(each: Reason, name: str) -> GateLine:
    return GateLine(
        name=name,
        outcome=_OUTCOMES[each.verdict],
        value=each.value,
        limit=each.limit,
        host=each.host,
        # The sentence of the verdict says why nothing was chosen.
        sentence="" if each.rule == "choose" else wording.sentence(each.clause),
    )


def _of_limits(told: Told) -> Iterator[GateLine]:
    """Yield the declared limits that the winner keeps or misses, by its own benchmark."""
    winner = told.report.winner
    read = comment_table.readings(told.evidence, winner.type) if winner else None
    if read is None:
        return
    quant = Trusted(read.key, read.type, read.quantized, read.benchmark)
    declared = told.evidence.declared
    missed, unjudged = limits.misses(quant, declared.gates)
    for name, limit in limits.applying(declared.gates, to_encoder=quant.is_encoder).items():
        gate = limits.GATES[name]
        value = gate.read(quant)
        miss = next((one.text for one in missed if one.text.endswith(f"({name})")), "")
        open_ = next((text for text in unjudged if text.startswith(f"{name} ")), "")
        outcome: Outcome = "FAIL" if miss else "HOLD" if open_ else "PASS"
        yield GateLine(
            name=name,
            outcome=outcome,
            value=f"{wording.beyond(value, limit)}{gate.unit}" if value is not None else "—",
            limit=f"{wording.declared(limit)}{gate.unit}",
            sentence=wording.sentence(miss or open_) if miss or open_ else "",
        )


def _of_levels(told: Told, hosts: frozenset[str]) -> Iterator[GateLine]:
    """Yield what the load test judged, for each host that is served."""
    finals = [one for one in told.judged.hosts if one.test is not None and one.host in hosts]
    many = len(finals) > 1
    if told.judged.is_stale:
        return
    for final in finals:
        if final.test is None or final.test.invalid:
            continue
        for level in final.test.gates:
            if level.host != final.host:
                continue
            outcome = _OUTCOMES.get(level.outcome, "HOLD")
            share = level.limit <= 1
            yield GateLine(
                name=f"load test: {_tidy(level.name)}",
                outcome=outcome,
                value=_level(level.value, share=share),
                limit=_level(level.limit, share=share),
                host=_tidy(final.host) if many else "",
                sentence="" if outcome == "PASS" else wording.sentence(_tidy(level.sentence)),
            )


def _level(value: float, *, share: bool) -> str:
    return wording.percent(value, 3) if share else wording.mib(value)


def _proven(told: Told, rule: str) -> tuple[str, str] | None:
    """Say what was proven where nothing stands against it; None where nothing was asked."""
    known = told.evidence
    let_pass = [each for each in told.judged.reasons if each.rule == rule and each.let_pass]
    if let_pass:
        return _tidy(f"let pass by {let_pass[0].let_pass}"), let_pass[0].limit
    if rule == "verify" and isinstance(known.verified, VerifyRecord):
        checks = known.verified.checks
        passed = sum(one.outcome == "PASS" for one in checks)
        return f"{passed} of {wording.counted(len(checks), 'layer')}", "no layer fails"
    if rule == "evaluate" and known.declared.evals and not isinstance(known.evaluated, str):
        return wording.counted(len(known.declared.evals), "set"), "no proven harm"
    if rule == "compare" and isinstance(known.compared, CompareRecord):
        winner = told.report.winner
        built = known.quantized.get(winner.type) if winner else None
        if isinstance(built, QuantizeRecord) and (
            known.compared.challenger.gguf_sha256 == built.gguf.sha256
        ):
            return binding_outcome(known.compared, known.declared) or "nothing", "not worse"
    if rule == "engine" and isinstance(known.engine, EngineRecord):
        winner = told.report.winner
        built = known.quantized.get(winner.type) if winner else None
        if isinstance(built, QuantizeRecord) and not verdict_engine.why_stale(
            known, known.engine, built
        ):
            return verdict_engine.outcome(known, known.engine), "not worse"
    return None


# --- what changed -----------------------------------------------------------------------------


def _changes(name: str, given: Sources) -> Iterator[Change]:
    """Yield what differs of upstream and of what was made of it."""
    if given.before is None:
        return

    def both(stage: str, kind: type[records.R]) -> tuple[records.R, records.R] | None:
        found = [
            records.read_or_reason(at.model_record(stage, name), kind)
            for at in (given.before, given.now)
            if at is not None
        ]
        first, second = found
        return None if isinstance(first, str) or isinstance(second, str) else (first, second)

    if (fetched := both("fetch", FetchRecord)) is not None:
        yield from _upstream(*fetched)
    if (converted := both("convert", ConvertRecord)) is not None:
        yield from _conversion(*converted)


def _upstream(then: FetchRecord, now: FetchRecord) -> Iterator[Change]:
    plain = (
        ("source", then.source, now.source),
        ("revision", _short(then.revision), _short(now.revision)),
        ("architecture", then.architecture, now.architecture),
        ("licence", then.license or "not stated", now.license or "not stated"),
        ("parameters", *wording.pair(then.parameters_count, now.parameters_count)),
        ("dtypes", _counts(then.dtypes), _counts(now.dtypes)),
    )
    yield from _differing(plain)
    old = {one.name: one.sha256 for one in then.files}
    new = {one.name: one.sha256 for one in now.files}
    for word, names in (
        ("added", new.keys() - old.keys()),
        ("removed", old.keys() - new.keys()),
        ("changed", {one for one in new.keys() & old.keys() if new[one] != old[one]}),
    ):
        if names:
            yield Change(
                what=f"files {word}",
                before="",
                after=_tidy(wording.first_few(sorted(names))),
            )
    if then.revision != now.revision and old == new:
        yield Change(what="files", before="", after="the same bytes")


def _conversion(then: ConvertRecord, now: ConvertRecord) -> Iterator[Change]:
    yield from _differing((
        ("llama.cpp", _short(then.llama_cpp_commit), _short(now.llama_cpp_commit)),
        ("recipe", str(then.recipe), str(now.recipe)),
        ("tensors", f"{then.tensors_count:,}", f"{now.tensors_count:,}"),
        ("tensor types", _counts(then.tensor_types), _counts(now.tensor_types)),
        ("trained context", wording.tokens(then.context_train_tokens),
         wording.tokens(now.context_train_tokens)),
    ))  # fmt: skip


def _differing(pairs: Sequence[tuple[str, str, str]]) -> Iterator[Change]:
    for what, before, after in pairs:
        if before != after:
            yield Change(what=what, before=_tidy(before), after=_tidy(after))


def _counts(found: Mapping[str, int]) -> str:
    items = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {name}" for name, count in items[:_MOST_NAMES]]
    return ", ".join(shown)


# --- cost, and the way back -------------------------------------------------------------------


def _cost(told: Told, given: Sources) -> Iterator[str]:
    """Yield what measuring took, as clauses: minutes, disk, network."""
    name = given.declared.model
    took = given.times_s or _times_of(given.now, name)
    total_s = sum(took.values())
    if total_s and given.plan and given.plan.covered:
        yield f"nothing now, {minutes(total_s)} when it was measured"
    elif total_s:
        yield f"{minutes(total_s)} on the runner"
    elif given.plan and given.plan.covered:
        yield "nothing now"
    elif given.plan and given.plan.budget.gpu_minutes is not None:
        yield f"about {minutes(given.plan.budget.gpu_minutes * 60)} on the runner"
    for one in given.plan.left_out if given.plan else ():
        yield f"nothing on {one.host}: {_tidy(one.why)}"
    made = (told.evidence.converted, *told.evidence.quantized.values())
    size_bytes = sum(
        one.gguf.size_bytes for one in made if isinstance(one, (ConvertRecord, QuantizeRecord))
    )
    if size_bytes:
        yield f"{shown_size(size_bytes)} of GGUFs"
    fetched = told.evidence.fetched
    if isinstance(fetched, FetchRecord) and fetched.source.startswith("hf:"):
        yield f"{shown_size(fetched.size_bytes)} from the Hub"


def _times_of(at: Layout, name: str) -> Mapping[str, float]:
    path = at.model_record("times", name)
    found = records.read_or_reason(path, TimesRecord)
    return {} if isinstance(found, str) else found.wall_s


def minutes(seconds: float) -> str:
    """Write a time as people plan it: `42 s`, `3.5 min`, `2.1 h`."""
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{max(seconds, 1):.0f} s"
    if seconds < 2 * 3600:
        return f"{wording.number(seconds / 60, 2)} min"
    return f"{wording.number(seconds / 3600, 2)} h"


def rollback(name: str, at: Layout) -> tuple[tuple[str, ...], str]:
    """Return the commands that bring back what is stable now, and what they do."""
    try:
        ledger = Ledger.load(at.ledger(name), name)
    except StoreError:
        return (), "The ledger cannot be read, so nobody can say what is stable now: `fleet audit`."
    stable = {
        registry: move.release
        for registry in ledger.registries
        if (move := ledger.last(registry, STABLE)) is not None
    }
    if not stable:
        return (), (
            "Nothing of it was released yet, so there is nothing to go back to: until this is "
            "merged and published, nobody is served by it."
        )
    releases = list(dict.fromkeys(stable.values()))
    if len(releases) == 1:
        where = wording.listed([_tidy(one) for one in stable])
        return (
            (f'fleet rollback {name} --to {short(releases[0])} --reason "..."',),
            f"what is stable now in {where}; nothing is made again.",
        )
    return (
        tuple(
            f'fleet rollback {name} --to {short(release)} --registry {registry} --reason "..."'
            for registry, release in stable.items()
        ),
        "what is stable now in each registry; nothing is made again.",
    )


# --- records of before ------------------------------------------------------------------------


def _history(told: Told, given: Sources) -> History | None:
    """Return the speed of the winner over the records of the base's history, on this hardware."""
    winner = told.report.winner
    now = comment_table.readings(told.evidence, winner.type) if winner else None
    if winner is None or now is None or given.git is None or not given.base:
        return None
    path = given.now.quant_record("benchmark", given.declared.model, winner.type)
    name = path.relative_to(given.now.root).as_posix()
    points = [
        point
        for commit, data in given.git.history(given.base, name, 3 * MOST_POINTS)
        if (point := _point(commit, data, now)) is not None
    ][:MOST_POINTS]
    speed = now.speed_tok_s
    newest = _as_point("this", now)
    if not points or (points[0].day, points[0].value_tok_s) != (newest.day, speed.value):
        points.insert(0, newest)
    if len(points) < 2:  # noqa: PLR2004 - one point is no history
        return None
    depth = now.deepest_decode.depth_tokens if now.deepest_decode else None
    what = "prefill" if now.is_encoder else f"decode{at_tokens(depth)}"
    return History(type=winner.type, what=what, points=tuple(reversed(points)))


def _point(commit: str, data: bytes, now: Readings) -> Point | None:
    """Read an old record; None if it is of other hardware, of another test, or not to be read."""
    try:
        old = BenchmarkRecord.model_validate_json(data)
    except ValidationError:
        return None
    read = Readings(old.key, old.type, now.quantized, old)
    comparable = (
        old.validity.verdict == "VALID"
        and old.machine.hw_id == now.benchmark.machine.hw_id
        and read.is_encoder == now.is_encoder
        and (read.deepest_decode is None) == (now.deepest_decode is None)
    )
    if not comparable:
        return None
    if read.deepest_decode and now.deepest_decode:
        there, here = read.deepest_decode, now.deepest_decode
        if (there.depth_tokens, there.tokens) != (here.depth_tokens, here.tokens):
            return None
    return _as_point(commit[:12], read)


def _as_point(commit: str, read: Readings) -> Point:
    speed = read.speed_tok_s
    return Point(
        commit=commit,
        day=_tidy(read.benchmark.measured_at)[:10],
        value_tok_s=speed.value,
        low_tok_s=speed.low,
        high_tok_s=speed.high,
    )


# --- text from elsewhere ----------------------------------------------------------------------


def _tidy(text: str, characters: int = _TEXT_CHARACTERS) -> str:
    """Make text of a record one short harmless line."""
    return wording.shortened(" ".join(clean(text).split()), characters)


assert set(_VERBS) == set(VERDICTS)
