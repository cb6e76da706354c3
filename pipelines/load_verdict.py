"""
What a load test means for each host, in one sentence: doubt first, then failures, then questions.

Nothing here reads a file or looks at the choice beyond its winner; `pipelines.verdict` joins this
with what `choose` said and refuses what does not belong together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import golden, wording
from pipelines.load_records import LoadVerdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.load_records import EngineId, Smoke, WinnerTest
    from pipelines.records import HostChoice
    from pipelines.verdict import Verdict


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
    findings: tuple[tuple[Verdict, list[str]], ...] = (
        ("INVALID", list(test.invalid)),
        ("REJECT", _failures(host.host, test)),
        ("HOLD", _open_questions(host.host, test, smokes, engine)),
    )
    for verdict, sentences in findings:
        if sentences:
            return _said(host, verdict, sentences)
    gates = (gate for gate in test.gates if (gate.host, gate.name) == (host.host, "goodput"))
    goodput = next(gates, None)
    if goodput is None:
        return _said(host, "INVALID", [f"no level of host {host.host} was judged"])
    return _said(host, "PROMOTE", [goodput.sentence])


def _said(host: HostChoice, verdict: Verdict, sentences: list[str]) -> LoadVerdict:
    words = "; ".join(wording.clause(sentence) for sentence in sentences)
    return LoadVerdict(host=host.host, winner=host.winner, verdict=verdict, sentence=words)


def _failures(host: str, test: WinnerTest) -> list[str]:
    failed = list(test.failures)
    objection = golden.objection(test.golden) if test.golden is not None else None
    if objection is not None:
        failed.append(objection)
    if test.degenerate is not None and test.degenerate.outcome == "FAIL":
        failed.append(test.degenerate.sentence)
    failed += _regressions(test, "FAIL")
    return failed + _gates(host, test, "FAIL")


def _open_questions(
    host: str, test: WinnerTest, smokes: Sequence[Smoke], engine: EngineId | None
) -> list[str]:
    questions = _gates(host, test, "INCONCLUSIVE")
    if test.degenerate is not None and test.degenerate.outcome == "INCONCLUSIVE":
        questions.append(test.degenerate.sentence)
    questions += _regressions(test, "INCONCLUSIVE")
    questions += [f"{one.type}: {one.sentence}" for one in smokes if one.outcome == "FAIL"]
    if engine is None or not engine.declared:
        questions.append(
            "llama-server stood in for Ollama; declare `serving.engine: llama-server` if that is "
            "what will serve"
        )
    return questions


def _regressions(test: WinnerTest, outcome: str) -> list[str]:
    return [
        f"prompt regression {one.id}: {one.sentence}"
        for one in test.regressions
        if one.outcome == outcome
    ]


def _gates(host: str, test: WinnerTest, outcome: str) -> list[str]:
    return [gate.sentence for gate in test.gates if gate.host == host and gate.outcome == outcome]
