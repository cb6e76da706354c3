"""
What a load test means for each host, in one sentence: doubt first, then failures, then questions.

Nothing here reads a file or looks at the choice beyond its winner; `pipelines.verdict` joins this
with what `choose` said and refuses what does not belong together. A gate is never taken for better
than its own numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import golden, wording
from pipelines.load_records import LoadVerdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipelines.load_records import (
        Degenerate,
        EmbeddingCheck,
        EngineId,
        LoadGate,
        Outcome,
        Smoke,
        WinnerTest,
    )
    from pipelines.records import HostChoice
    from pipelines.verdict_words import Verdict

# Of an embedding that an engine serves with that of the toolchain's llama.cpp, of the same file:
# two builds differ in the last digits, far above this.
MIN_COSINE: Final = 0.9999
_OUTCOMES: tuple[Outcome, ...] = ("PASS", "INCONCLUSIVE", "FAIL")
_WORSE: tuple[Verdict, ...] = ("INVALID", "REJECT", "HOLD")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a load test found: what it forces, why, what was found and what was due."""

    verdict: Verdict
    sentence: str
    value: str
    limit: str


def of_host(
    host: HostChoice,
    winners: Sequence[WinnerTest],
    smokes: Sequence[Smoke],
    engine: EngineId | None,
) -> LoadVerdict:
    """
    Say what follows for one host.

    INVALID if the numbers are not to be trusted, REJECT if the quant failed at something, HOLD if
    something is open: an interval on both sides of its limit, another quant of the release that
    failed its smoke, an engine that only stands in. PROMOTE otherwise.
    """
    if host.winner is None:
        return _said(host, host.verdict, ["nothing was chosen, so nothing was served"])
    test = next(one for one in winners if one.type == host.winner)
    found = list(findings(host.host, test, smokes, engine))
    for verdict in _WORSE:
        sentences = [one.sentence for one in found if one.verdict == verdict]
        if sentences:
            return _said(host, verdict, sentences)
    praise = praise_of(host.host, test)
    if praise is None:
        return _said(host, "INVALID", [f"no level of host {host.host} was judged"])
    return _said(host, "PROMOTE", [praise])


def praise_of(host: str, test: WinnerTest) -> str | None:
    """Return what a host that is promoted is told: its share of good requests, if it was judged."""
    gates = (gate for gate in test.gates if (gate.host, gate.name) == (host, "goodput"))
    return next((gate.sentence for gate in gates), None)


def _said(host: HostChoice, verdict: Verdict, sentences: list[str]) -> LoadVerdict:
    words = "; ".join(wording.clause(sentence) for sentence in sentences)
    return LoadVerdict(host=host.host, winner=host.winner, verdict=verdict, sentence=words)


def findings(
    host: str, test: WinnerTest, smokes: Sequence[Smoke], engine: EngineId | None
) -> Iterator[Finding]:
    """
    Yield everything that stands against a promotion of a winner on one host.

    Args:
        host: Its name.
        test: The test of its winner.
        smokes: The short tests of the other quants.
        engine: What served.
    """
    yield from _failures(test)
    for gate in test.gates:
        outcome = outcome_of(gate)
        if gate.host == host and outcome != "PASS":
            yield _of_gate(gate, outcome)
    for smoke in smokes:
        if smoke.outcome == "FAIL":
            yield Finding(
                verdict="HOLD",
                sentence=f"{smoke.type}: {smoke.sentence}",
                value=f"{smoke.ok_count:,} of {smoke.requests_count:,} requests",
                limit="PASS",
            )
    if engine is None or not engine.declared:
        yield Finding(
            verdict="HOLD",
            sentence="llama-server stood in for Ollama; declare `serving.engine: llama-server` if "
            "that is what will serve",
            value="llama-server",
            limit="Ollama",
        )


def _failures(test: WinnerTest) -> Iterator[Finding]:
    """Yield what a quant failed at, or may have, on whatever host."""
    for text in test.invalid:
        yield Finding(verdict="INVALID", sentence=text, value="INVALID", limit="VALID")
    for text in test.failures:
        yield Finding(verdict="REJECT", sentence=text, value="failed", limit="served")
    # A test without any prompt is no failure of the quant: `verdict_served` misses them.
    compared = test.golden if test.golden is not None and test.golden.prompts else None
    objection = golden.objection(compared) if compared is not None else None
    if compared is not None and objection is not None:
        passed = sum(each.outcome == "PASS" for each in compared.prompts)
        all_ = len(compared.prompts)
        yield Finding(
            verdict="REJECT",
            sentence=objection,
            value=f"{passed:,} of {all_:,} prompts are equal",
            limit=f"{all_:,}",
        )
    vectors = test.embeddings
    is_told = vectors is not None and vectors.sentence in test.failures
    if vectors is not None and not is_told and not is_same_embedding(vectors):
        yield Finding(
            verdict="REJECT",
            sentence=vectors.sentence,
            value=f"cosine {wording.beyond(vectors.cosine_min, MIN_COSINE)}",
            limit=wording.declared(MIN_COSINE),
        )
    if test.degenerate is not None:
        yield from _degenerate(test.degenerate)
    for one in test.regressions:
        if one.outcome != "PASS":
            yield Finding(
                verdict=_verdict(one.outcome),
                sentence=f"prompt regression {one.id}: {one.sentence}",
                value=f"{one.pass_count:,} of {one.repeats_count:,}",
                limit=wording.percent(one.min_pass_share, 3),
            )


def is_same_embedding(one: EmbeddingCheck) -> bool:
    """Tell whether an engine serves the embeddings of the file, by the outcome and its numbers."""
    return one.outcome == "PASS" and one.texts_count > 0 and one.cosine_min >= MIN_COSINE


def _verdict(outcome: Outcome) -> Verdict:
    return "REJECT" if outcome == "FAIL" else "HOLD"


def _degenerate(one: Degenerate) -> Iterator[Finding]:
    is_over = one.excess is not None and not one.excess <= one.limit
    if one.outcome != "PASS" or is_over:
        yield Finding(
            verdict=_verdict(one.outcome),
            sentence=one.sentence,
            value=f"excess {wording.number(one.excess)}",
            limit=f"{wording.declared(one.limit)} at most",
        )


def outcome_of(gate: LoadGate) -> Outcome:
    """Return the outcome of a gate, or what its numbers say where that is worse."""
    low, high, limit = gate.low, gate.high, gate.limit
    if gate.name in {"error_rate", "memory"}:
        low, high, limit = -high, -low, -limit
    by_numbers: Outcome = "PASS" if low >= limit else "FAIL" if high < limit else "INCONCLUSIVE"
    return max(gate.outcome, by_numbers, key=_OUTCOMES.index)


def _of_gate(gate: LoadGate, outcome: Outcome) -> Finding:
    doubt = "" if outcome == gate.outcome else ", by its numbers, which call it PASS wrongly"
    return Finding(
        verdict=_verdict(outcome),
        sentence=f"{gate.sentence}{doubt}",
        value=f"{gate.name} {wording.number(gate.value, 4)} "
        f"[{wording.number(gate.low, 4)}, {wording.number(gate.high, 4)}]",
        limit=wording.declared(gate.limit),
    )
