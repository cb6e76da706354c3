"""
What a load test means for the file that is chosen for a host: the part of the verdict that serves.

Nothing is promoted that was not served. The rule fails closed: a load test that is missing, or of
another file, winner, context or machine than the choice, is INVALID, and so is one that calls
itself so. A verdict of the record is never taken for better than its own parts: they are judged
again (`pipelines.load_verdict`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines import load_verdict, wording
from pipelines.verdict_words import VERDICTS, Reason, differing, tidy, without_verb

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipelines.load_records import LoadTestRecord, LoadVerdict, WinnerTest
    from pipelines.records import ChoiceRecord, HostChoice
    from pipelines.verdict_words import Verdict


@dataclass(frozen=True, kw_only=True)
class Served:
    """
    What serving showed for one host.

    Attributes:
        reasons: What stands against it, from the load test alone.
        praise: What a promotion is told, as a clause; empty if there is none.
        test: The load test that speaks of the chosen file; None where there is none.
    """

    reasons: tuple[Reason, ...]
    praise: str
    test: WinnerTest | None


def of_host(
    one: HostChoice, choice: ChoiceRecord, tested: LoadTestRecord | str, *, embeds: bool = False
) -> Served:
    """
    Judge the file that is chosen for a host by how it was served.

    Args:
        one: The choice for the host; it has a winner.
        choice: The whole choice.
        tested: The load test, or as a clause why there is none.
        embeds: Whether it makes embeddings: then there is no prompt that could be rendered wrongly.
    """
    assert one.winner is not None, "by the caller"
    if isinstance(tested, str):
        clause = f"it was not served under load ({tidy(tested)})"
        why = _reason(one, choice, "INVALID", clause, "no record", "a load test")
        return Served(reasons=(why,), praise="", test=None)
    doubt = next(_doubts(one, choice, tested), None)
    if doubt is not None:
        return Served(reasons=(_reason(one, choice, "INVALID", *doubt),), praise="", test=None)
    test = _test_of(one, tested)
    assert test is not None, "a doubt otherwise"
    reasons = tuple(_reasons(one, choice, tested, test, embeds=embeds))
    said = load_verdict.praise_of(one.host, test)
    praise = f"on {engine_words(tested)}, {wording.clause(tidy(said))}" if said else ""
    return Served(reasons=reasons, praise="" if reasons else praise, test=test)


def _reason(  # noqa: PLR0913, PLR0917 - the fields of a reason
    one: HostChoice, choice: ChoiceRecord, verdict: Verdict, clause: str, value: str, limit: str
) -> Reason:
    again = f"`fleet repro {choice.model}`"
    repeat = (
        f"{again} repeats a load test that is INVALID" if value == "INVALID" else f"Run {again}"
    )
    steps: dict[Verdict, str] = {
        "PROMOTE": "",
        "HOLD": "Settle what is open (`fleet report` says what)",
        "REJECT": "Choose another quant, other levels or another host",
        "INVALID": repeat,
    }
    return Reason(
        rule="load-test",
        verdict=verdict,
        clause=clause,
        value=value,
        limit=limit,
        file=f"{choice.model}/load-test.json",
        next_step=steps[verdict],
        host=one.host,
    )


# --- a test that does not speak of the choice -------------------------------------------------


def _doubts(
    one: HostChoice, choice: ChoiceRecord, tested: LoadTestRecord
) -> Iterator[tuple[str, str, str]]:
    """Yield (clause, found, due) for each doubt, the most basic first."""
    stale = "the load test is older than the choice"
    winner = one.winner or ""
    if tested.model != choice.model:
        what = f"the load test is of another model ({tidy(tested.model)})"
        yield what, tested.model, choice.model
    if tested.context_tokens != choice.context_tokens:
        had, due = wording.tokens(tested.context_tokens), wording.tokens(choice.context_tokens)
        yield f"{stale}: it served {had} tokens of context, not {due}", had, due
    if tested.machine.hw_id != choice.hw_id:
        had, due = differing(tested.machine.hw_id, str(choice.hw_id))
        yield "the load test ran on other hardware than the benchmarks", had, due
    said = _verdict_of(one, tested)
    if said is None:
        yield f"{stale}: it says nothing of host {one.host}", "no verdict", one.host
    elif said.winner != one.winner:
        had = tidy(said.winner or "nothing")
        yield f"{stale}: it served {had}, not {one.winner}", had, winner
    elif (test := _test_of(one, tested)) is None:
        yield f"the load test holds no test of {one.winner}", "no test", winner
    elif not test.invalid and not (test.failures and test.served is None):
        # What could not be loaded at all has failed; there is no file to doubt.
        yield from _served_doubts(one, test, tested)


def _served_doubts(
    one: HostChoice, test: WinnerTest, tested: LoadTestRecord
) -> Iterator[tuple[str, str, str]]:
    """Yield why it is not proved that the chosen file was served as declared."""
    wanted = next((c.gguf_sha256 for c in one.candidates if c.type == one.winner), None)
    served = test.served
    if tested.engine is None or served is None:
        yield "no engine served it", "no engine", "an engine"
        return
    if tested.engine.kind == "remote":
        yield (
            "what served it is not ours, so that nobody knows which file that was",
            "remote",
            "a server of ours",
        )
    if wanted is None or served.gguf_sha256 != wanted:
        had, due = differing(served.gguf_sha256, wanted or "none")
        yield f"the load test served another file (sha256 {had}, chosen is {due})", had, due
    if served.context_tokens != tested.context_tokens:
        had, due = wording.tokens(served.context_tokens), wording.tokens(tested.context_tokens)
        yield f"it was served with {had} tokens of context, not {due}", had, due


def _verdict_of(one: HostChoice, tested: LoadTestRecord) -> LoadVerdict | None:
    return next((said for said in tested.verdicts if said.host == one.host), None)


def _test_of(one: HostChoice, tested: LoadTestRecord) -> WinnerTest | None:
    tests = (t for t in tested.winners if t.type == one.winner and one.host in t.hosts)
    return next(tests, None)


# --- a test that speaks of it -----------------------------------------------------------------


def _reasons(
    one: HostChoice,
    choice: ChoiceRecord,
    tested: LoadTestRecord,
    test: WinnerTest,
    *,
    embeds: bool,
) -> Iterator[Reason]:
    """Yield what the parts of the test say, and what the record says where that is worse."""
    levels = tested.slos.get(one.host, {})
    missing = next(_missing(one, test, levels, embeds=embeds), None)
    if missing is not None:
        yield _reason(one, choice, "INVALID", *missing)
    found = list(load_verdict.findings(one.host, test, tested.smokes, tested.engine))
    for each in found:
        clause = wording.clause(tidy(each.sentence))
        yield _reason(one, choice, each.verdict, clause, each.value, each.limit)
    said = _verdict_of(one, tested)
    assert said is not None, "a doubt otherwise"
    parts = [VERDICTS.index(each.verdict) for each in found]
    if VERDICTS.index(said.verdict) > max(parts, default=0):
        clause = without_verb(tidy(said.sentence), said.verdict)
        yield _reason(one, choice, said.verdict, clause, said.verdict, "PROMOTE")
    yield from _unserved(one, choice, tested)


def _unserved(one: HostChoice, choice: ChoiceRecord, tested: LoadTestRecord) -> Iterator[Reason]:
    """
    Name the first quant that a release would hold and that was never served.

    A release holds what passed its gates on some host. Winners have a test of their own.
    """
    winners = {test.type for test in tested.winners}
    smokes = {one.type: one for one in tested.smokes}
    for each in (each for host in choice.hosts for each in host.candidates):
        if each.verdict not in {"CHOSEN", "PASS"} or each.type in winners:
            continue
        smoke = smokes.get(each.type)
        if smoke is None:
            clause = f"{each.type} passed its gates and was not served"
            yield _reason(one, choice, "HOLD", clause, "no smoke", f"a smoke of {each.type}")
            return
        served = smoke.served.gguf_sha256 if smoke.served else None
        if smoke.outcome == "PASS" and served != each.gguf_sha256:
            had, due = differing(str(served), str(each.gguf_sha256))
            clause = f"{each.type} was served, but from another file"
            yield _reason(one, choice, "HOLD", clause, had, due)
            return


# What a declared level is called as a gate.
_GATES = {"ttft_ms": "ttft", "tpot_ms": "tpot", "e2e_ms": "e2e", "max_error_rate": "error_rate"}
_SHARES = frozenset({"ttft", "tpot", "e2e", "goodput"})


def _missing(
    one: HostChoice, test: WinnerTest, levels: Mapping[str, float], *, embeds: bool
) -> Iterator[tuple[str, str, str]]:
    """
    Yield which part is not there that a test which neither failed nor is in doubt must have.

    Args:
        one: The choice for the host.
        test: The test of its winner.
        levels: What is declared for it.
        embeds: Whether it makes embeddings.
    """
    if test.invalid or test.failures:
        return
    gates = [gate for gate in test.gates if gate.host == one.host]
    judged = {gate.name for gate in gates}
    if "goodput" not in judged:
        yield f"no level of host {one.host} was judged", "no level", "goodput"
        return
    # An embedding comes in one piece: nobody can judge its first token, or a further one.
    none_of = {"ttft", "tpot"} if embeds else set()
    wanted = [g for level, g in _GATES.items() if level in levels and g not in none_of]
    wanted += ["memory"] if one.limit_mib is not None else []
    unjudged = [name for name in wanted if name not in judged]
    if unjudged:
        names = wording.listed(unjudged)
        yield f"nobody judged {names} of host {one.host}", "not judged", names
    for gate in gates:
        name = "max_error_rate" if gate.name == "error_rate" else "min_goodput"
        is_level = gate.name in {*_SHARES, "error_rate"}
        due = levels.get(name) if is_level else one.limit_mib
        # Memory that fitted a smaller host fits this one.
        is_other = due is not None and (gate.limit != due if is_level else gate.limit > due)
        if due is not None and is_other:
            had, wanted_limit = wording.declared(gate.limit), wording.declared(due)
            what = f"{gate.name} of host {one.host} was judged by the limit {had}"
            named = name if is_level else "memory of the host, MiB,"
            yield f"{what}, declared is {wanted_limit}", had, f"{named} {wanted_limit}"
        elif not is_level and due is not None and gate.outcome == "PASS":
            left = due - gate.high
            if left < one.margin_mib:
                had, least = wording.beyond(left, one.margin_mib), str(one.margin_mib)
                what = f"memory of host {one.host} leaves {had} MiB free and was called PASS"
                yield f"{what}, {least} are declared", f"{had} MiB free", f"{least} MiB free"
    if embeds and test.embeddings is None:
        what = "its embeddings were not compared with the toolchain's"
        yield what, "no text", "a text"
    if not embeds and (test.golden is None or not test.golden.prompts):
        yield "its prompts were not compared with the upstream's", "no prompt", "a prompt"


def engine_words(tested: LoadTestRecord) -> str:
    """Name what served: `Ollama 0.33.0`, `llama-server b6500 (0c1e5709)`."""
    engine = tested.engine
    if engine is None:
        return "no engine"
    name = {"ollama": "Ollama", "llama-server": "llama-server", "remote": "a server of others"}
    return f"{name[engine.kind]} {tidy(engine.version)}".rstrip()
