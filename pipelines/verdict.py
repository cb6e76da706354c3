"""
The final verdict for each host: the worse of what `choose` and what the load test said.

Nothing is promoted that was not served. A host without a winner has no file that a load test could
speak of, so its verdict is that of `choose`, word for word. Everywhere else the rule fails closed:
a load test that is missing, or of another file, winner, context or machine than the choice, makes
the host INVALID, and so does a test that calls itself so. A verdict of the record is never taken
for better than its own parts: they are judged again (`pipelines.load_verdict`).

Nothing here reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipelines import load_verdict, wording
from pipelines.console import clean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipelines.load_records import LoadTestRecord, LoadVerdict, WinnerTest
    from pipelines.records import ChoiceRecord, HostChoice

Verdict = Literal["PROMOTE", "HOLD", "REJECT", "INVALID"]
# From good to bad.
VERDICTS: tuple[Verdict, ...] = ("PROMOTE", "HOLD", "REJECT", "INVALID")
_DIGEST_CHARACTERS = 12
_CLAUSE_CHARACTERS = 300
_CHOICE_CHARACTERS = 600
# How a worse verdict begins; `choose` writes the same words.
_WORDS: dict[Verdict, str] = {
    "PROMOTE": "promote", "HOLD": "hold", "REJECT": "reject", "INVALID": "invalid",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the load test means for one host, and why, as a clause without an end."""

    verdict: Verdict
    clause: str


@dataclass(frozen=True, kw_only=True)
class HostFinal:
    """
    The final verdict for one host.

    `sentence` has no full stop; `reasons` are the sentences that it replaces or shortens. `test` is
    the load test that speaks of the chosen file, None where there is none.
    """

    host: str
    verdict: Verdict
    sentence: str
    reasons: tuple[str, ...]
    test: WinnerTest | None


def final(choice: ChoiceRecord, tested: LoadTestRecord | str) -> tuple[HostFinal, ...]:
    """
    Judge every host of a choice.

    Args:
        choice: What was chosen. That it speaks of the files on disk is for the caller to know.
        tested: The load test, or as a clause why there is none.
    """
    return tuple(_host_final(one, choice, tested) for one in choice.hosts)


def worst(*verdicts: Verdict) -> Verdict:
    """Return the worst of some verdicts; INVALID of none."""
    return max(verdicts, key=VERDICTS.index, default="INVALID")


# --- one host ---------------------------------------------------------------------------------


def _host_final(one: HostChoice, choice: ChoiceRecord, tested: LoadTestRecord | str) -> HostFinal:
    chosen = _short(one.sentence, _CHOICE_CHARACTERS)
    if one.winner is None:
        return HostFinal(host=one.host, verdict=one.verdict, sentence=chosen, reasons=(), test=None)
    doubt = doubt_of(one, choice, tested)
    if doubt:
        found, test = Finding(verdict="INVALID", clause=doubt), None
    else:
        assert not isinstance(tested, str), "a doubt otherwise"
        test = _test_of(one, tested)
        assert test is not None, "a doubt otherwise"
        found = _finding(one, choice, tested, test)
    verdict = worst(one.verdict, found.verdict)
    sentence, reasons = chosen, [found.clause]
    if found.verdict in ("PROMOTE", one.verdict):
        sentence, reasons = f"{chosen}; {found.clause}", []
    elif verdict == found.verdict:
        # What stops it first, then why it was chosen.
        sentence = f"{_WORDS[verdict]}: {one.winner} is chosen, but {found.clause}"
        reasons = [_without_verb(chosen, one.verdict)]
    if test is not None and test.invalid:
        reasons.append("`fleet repro` repeats a load test that is INVALID")
    return HostFinal(
        host=one.host,
        verdict=verdict,
        sentence=sentence,
        reasons=tuple(wording.sentence(_upper(reason)) for reason in reasons),
        test=test,
    )


def doubt_of(one: HostChoice, choice: ChoiceRecord, tested: LoadTestRecord | str) -> str:
    """
    Say as a clause why a load test does not speak of what a host is to serve; empty if it does.

    Args:
        one: The choice for the host; it has a winner.
        choice: The whole choice.
        tested: The load test, or as a clause why there is none.
    """
    if isinstance(tested, str):
        return f"it was not served under load ({_short(tested)})"
    return next(_doubts(one, choice, tested), "")


def _doubts(one: HostChoice, choice: ChoiceRecord, tested: LoadTestRecord) -> Iterator[str]:
    """Yield the reasons, the most basic first."""
    stale = "the load test is older than the choice"
    if tested.model != choice.model:
        yield f"the load test is of another model ({_short(tested.model)})"
    if tested.context_tokens != choice.context_tokens:
        yield (
            f"{stale}: it served {wording.tokens(tested.context_tokens)} tokens of context, not "
            f"{wording.tokens(choice.context_tokens)}"
        )
    if tested.machine.hw_id != choice.hw_id:
        yield "the load test ran on other hardware than the benchmarks"
    said = _verdict_of(one, tested)
    if said is None:
        yield f"{stale}: it says nothing of host {one.host}"
    elif said.winner != one.winner:
        yield f"{stale}: it served {_short(said.winner or 'nothing')}, not {one.winner}"
    elif (test := _test_of(one, tested)) is None:
        yield f"the load test holds no test of {one.winner}"
    elif not test.invalid and not (test.failures and test.served is None):
        # What could not be loaded at all has failed; there is no file to doubt.
        yield from _served_doubts(one, test, tested)


def _served_doubts(one: HostChoice, test: WinnerTest, tested: LoadTestRecord) -> Iterator[str]:
    """Yield why it is not proved that the chosen file was served as declared."""
    wanted = next((c.gguf_sha256 for c in one.candidates if c.type == one.winner), None)
    served = test.served
    if tested.engine is None or served is None:
        yield "no engine served it"
        return
    if tested.engine.kind == "remote":
        yield "what served it is not ours, so that nobody knows which file that was"
    if wanted is None or served.gguf_sha256 != wanted:
        had = _short(served.gguf_sha256)[:_DIGEST_CHARACTERS]
        want = _short(wanted or "none")[:_DIGEST_CHARACTERS]
        yield f"the load test served another file (sha256 {had}, chosen is {want})"
    if served.context_tokens != tested.context_tokens:
        yield (
            f"it was served with {wording.tokens(served.context_tokens)} tokens of context, not "
            f"{wording.tokens(tested.context_tokens)}"
        )


def _verdict_of(one: HostChoice, tested: LoadTestRecord) -> LoadVerdict | None:
    return next((said for said in tested.verdicts if said.host == one.host), None)


def _test_of(one: HostChoice, tested: LoadTestRecord) -> WinnerTest | None:
    tests = (t for t in tested.winners if t.type == one.winner and one.host in t.hosts)
    return next(tests, None)


def _finding(
    one: HostChoice, choice: ChoiceRecord, tested: LoadTestRecord, test: WinnerTest
) -> Finding:
    """Return what the record says of a host, or what its parts say if that is worse."""
    said = _verdict_of(one, tested)
    assert said is not None, "a doubt otherwise"
    found = [_as_finding(said, tested)]
    missing = _missing(one, test, tested.slos.get(one.host, {}))
    if missing:
        found.append(Finding(verdict="INVALID", clause=missing))
    else:
        judged_again = load_verdict.of_host(one, tested.winners, tested.smokes, tested.engine)
        found.append(_as_finding(judged_again, tested))
    unserved = _unserved(choice, tested)
    if unserved:
        found.append(Finding(verdict="HOLD", clause=unserved))
    return max(found, key=lambda each: VERDICTS.index(each.verdict))


def _unserved(choice: ChoiceRecord, tested: LoadTestRecord) -> str:
    """
    Name the first quant that a release would hold and that was never served; empty if all were.

    A release holds what passed its gates on some host. Winners have a test of their own.
    """
    winners = {test.type for test in tested.winners}
    smokes = {one.type: one for one in tested.smokes}
    for host in choice.hosts:
        for each in host.candidates:
            if each.verdict not in {"CHOSEN", "PASS"} or each.type in winners:
                continue
            smoke = smokes.get(each.type)
            if smoke is None:
                return f"{each.type} passed its gates and was not served"
            served = smoke.served.gguf_sha256 if smoke.served else None
            if smoke.outcome == "PASS" and served != each.gguf_sha256:
                return f"{each.type} was served, but from another file"
    return ""


def _as_finding(said: LoadVerdict, tested: LoadTestRecord) -> Finding:
    clause = _without_verb(_short(said.sentence), said.verdict)
    if said.verdict == "PROMOTE":
        clause = f"on {engine_words(tested)}, {clause}"
    return Finding(verdict=said.verdict, clause=clause)


# What a declared level is called as a gate.
_GATES = {"ttft_ms": "ttft", "tpot_ms": "tpot", "e2e_ms": "e2e", "max_error_rate": "error_rate"}


def _missing(one: HostChoice, test: WinnerTest, levels: Mapping[str, float]) -> str:
    """
    Say which part is not there that a test which neither failed nor is in doubt must have.

    Args:
        one: The choice for the host.
        test: The test of its winner.
        levels: What is declared for it.
    """
    if test.invalid or test.failures:
        return ""
    judged = {gate.name for gate in test.gates if gate.host == one.host}
    if "goodput" not in judged:
        return f"no level of host {one.host} was judged"
    wanted = [gate for level, gate in _GATES.items() if level in levels]
    wanted += ["memory"] if one.limit_mib is not None else []
    unjudged = [name for name in wanted if name not in judged]
    if unjudged:
        return f"nobody judged {wording.listed(unjudged)} of host {one.host}"
    if test.golden is None or not test.golden.prompts:
        return "its prompts were not compared with the upstream's"
    return ""


def engine_words(tested: LoadTestRecord) -> str:
    """Name what served: `Ollama 0.33.0`, `llama-server b6500 (0c1e5709)`."""
    engine = tested.engine
    if engine is None:
        return "no engine"
    name = {"ollama": "Ollama", "llama-server": "llama-server", "remote": "a server of others"}
    return f"{name[engine.kind]} {_short(engine.version)}".rstrip()


# --- words ------------------------------------------------------------------------------------


def _short(text: str, characters: int = _CLAUSE_CHARACTERS) -> str:
    """Make text of a record, which may come from a stranger, one short harmless clause."""
    return wording.shortened(" ".join(clean(text).split()), characters).rstrip(".")


def _without_verb(text: str, verdict: Verdict) -> str:
    """Take `promote ` or `hold: ` from the beginning of what was said."""
    word = _WORDS[verdict]
    for start in (f"{word}: ", f"{word} "):
        if text.startswith(start):
            return text.removeprefix(start)
    return text


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
