"""
What stands behind a verdict beside benchmark and load test, as sections of the report.

The proof of the conversion, the task evals paired with f16, and the comparison with what is served:
each is told by its own record, and only if that speaks of the files that there are now
(`pipelines.verdict` says so). Text of a record may come from a stranger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import compare_engine_words, compare_words, harm, verdict_engine, wording
from pipelines.compare_engine_records import EngineRecord
from pipelines.compare_records import CompareRecord
from pipelines.console import clean
from pipelines.evaluate_records import EvaluateRecord
from pipelines.records import QuantizeRecord
from pipelines.report_tree import Finding, Section, TextTable
from pipelines.verdict_rules import binding_outcome, exchange_words, is_exchange
from pipelines.verify_records import VerifyRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.evaluate_records import EvalResult, QuantEval
    from pipelines.params import JudgeSlice
    from pipelines.verdict import ModelVerdict
    from pipelines.verdict_evidence import Evidence
    from pipelines.verify_records import Check

_TEXT_CHARACTERS = 400
_MAX_FINDINGS = 5
_OUTCOMES = {"better": "PASS", "equal": "PASS", "undecided": "INCONCLUSIVE", "worse": "FAIL"}
_EVAL_HEADS = ("set", "quant", "right", "f16 right", "lost", "won", "p", "outcome")
_EVAL_NUMBERS = frozenset({2, 3, 4, 5, 6})


def sections(evidence: Evidence, judged: ModelVerdict) -> tuple[Section, ...]:
    """
    Return the sections of a model.

    Args:
        evidence: What is known of it.
        judged: What follows from that: a record that it does not believe is not shown.
    """
    doubted = {each.rule for each in judged.reasons if each.verdict == "INVALID"}
    found = []
    if isinstance(evidence.verified, VerifyRecord) and "verify" not in doubted:
        found.append(_proof(evidence.verified))
    if isinstance(evidence.evaluated, EvaluateRecord) and "evaluate" not in doubted:
        found += _evals(evidence.evaluated)
    compared = evidence.compared
    if isinstance(compared, CompareRecord) and _speaks_of(compared, evidence):
        found.append(_comparison(compared, evidence.declared))
    engine = evidence.engine
    if isinstance(engine, EngineRecord) and _is_of_engine_here(engine, evidence):
        found.append(_engine(engine, evidence))
    return tuple(found)


# --- the conversion ---------------------------------------------------------------------------


def _proof(found: VerifyRecord) -> Section:
    return Section(title="Proof of the conversion", findings=tuple(_proof_findings(found)))


def _proof_findings(found: VerifyRecord) -> Iterator[Finding]:
    """Yield what failed and what was left out, then in one line what holds."""
    for check in found.checks:
        if check.outcome != "PASS":
            lines = tuple(_line(each) for each in check.findings[:_MAX_FINDINGS])
            yield Finding(outcome=check.outcome, text=_said(check), lines=lines)
    passed = [check for check in found.checks if check.outcome == "PASS"]
    if passed:
        names = wording.listed([check.layer for check in passed])
        last = next((check for check in passed if check.layer == "logits"), None)
        said = f"; {_said(last)}" if last else ""
        count = f"{len(passed)} of {wording.counted(len(found.checks), 'layer')}"
        yield Finding(outcome="PASS", text=f"{count} hold ({names}){said}")


def _said(check: Check) -> str:
    return f"{check.layer}: {wording.clause(_tidy(check.sentence))}"


# --- task evals -------------------------------------------------------------------------------


def _evals(found: EvaluateRecord) -> list[Section]:
    if not found.sets:
        return []
    alpha = wording.declared(found.alpha)
    method = (
        "Each quant is paired with f16, item by item: lost are items that only f16 gets right, won "
        f"those that only the quant does. Harmed is p under {alpha} (McNemar's exact test, "
        "one-sided). Scores of different models or sets are not to be compared."
    )
    rows = tuple(
        row for one in found.sets for quant in one.quants for row in [_eval_row(one, quant, found)]
    )
    void = tuple(
        Finding(outcome="SKIP", text=f"{_tidy(one.name)}: {wording.clause(_tidy(one.sentence))}")
        for one in found.sets
        if one.is_void
    )
    table = TextTable(heads=_EVAL_HEADS, rows=rows, numbers=_EVAL_NUMBERS)
    return [
        Section(title="Task evals, paired with f16", findings=void, table=table, notes=(method,))
    ]


def _eval_row(one: EvalResult, quant: QuantEval, found: EvaluateRecord) -> tuple[str, ...]:
    is_void = one.is_void or quant.outcome == "VOID"
    outcome = "harmed" if harm.is_harm(one, quant, found.alpha) else "void" if is_void else "pass"
    return (
        _tidy(one.name),
        _tidy(quant.type),
        f"{quant.correct_count:,} of {one.items_count:,}",
        f"{one.f16_correct_count:,}",
        f"{quant.harmed_count:,}",
        f"{quant.helped_count:,}",
        wording.number(quant.p_value),
        outcome,
    )


# --- champion and challenger ------------------------------------------------------------------


def _speaks_of(compared: CompareRecord, evidence: Evidence) -> bool:
    built = (one for one in evidence.quantized.values() if isinstance(one, QuantizeRecord))
    return compared.challenger.gguf_sha256 in {one.gguf.sha256 for one in built}


def _comparison(compared: CompareRecord, declared: JudgeSlice) -> Section:
    """Return what `fleet compare` prints: the outcome, the table, why it may be believed."""
    outcome = binding_outcome(compared, declared)
    is_valid = compared.validity.verdict == "VALID" and outcome is not None
    said, *rest = compare_words.sentences(compared)
    if is_valid and is_exchange(compared):
        said, rest = exchange_words(compared, declared.objective), [said, *rest]
    rows = tuple(tuple(_tidy(cell) for cell in row.cells) for row in compare_words.rows(compared))
    heads = tuple(head or "test" for head in compare_words.HEADS)
    return Section(
        title="Champion and challenger",
        findings=(
            Finding(
                outcome=_OUTCOMES[outcome] if is_valid and outcome is not None else "INVALID",
                text=_tidy(said).removeprefix("INVALID: "),
            ),
        ),
        table=TextTable(heads=heads, rows=rows, numbers=frozenset({1, 2, 3, 4})) if rows else None,
        notes=tuple(wording.sentence(_tidy(text)) for text in rest),
    )


def _is_of_engine_here(engine: EngineRecord, evidence: Evidence) -> bool:
    built = (one for one in evidence.quantized.values() if isinstance(one, QuantizeRecord))
    return any(not verdict_engine.why_stale(evidence, engine, one) for one in built)


def _engine(engine: EngineRecord, evidence: Evidence) -> Section:
    """Return the four combinations of GGUF and engine, and what was released on the new one."""
    is_valid = engine.validity.verdict == "VALID"
    outcome = verdict_engine.outcome(evidence, engine)
    said, *rest = compare_engine_words.sentences(engine)
    of_releases = {one.sentence for one in engine.releases}
    rows = tuple(tuple(_tidy(each) for each in row) for row in compare_engine_words.rows(engine))
    heads = tuple(head or "test" for head in compare_engine_words.HEADS)
    return Section(
        title="The engine alone, on the same GGUF",
        findings=(
            Finding(
                outcome=_OUTCOMES[outcome] if is_valid else "INVALID",
                text=_tidy(said).removeprefix("INVALID: "),
            ),
            *(
                Finding(outcome=_OUTCOMES[one.outcome], text=_tidy(one.sentence))
                for one in engine.releases
            ),
        ),
        table=TextTable(heads=heads, rows=rows, numbers=frozenset(range(1, 8))) if rows else None,
        notes=tuple(wording.sentence(_tidy(text)) for text in rest if text not in of_releases),
    )


# --- text from elsewhere ----------------------------------------------------------------------


def _tidy(text: str) -> str:
    """Make text of a record one short harmless line."""
    return wording.shortened(" ".join(clean(text).split()), _TEXT_CHARACTERS)


def _line(text: str) -> str:
    """Keep the blanks of a finding: they may be what differs."""
    return wording.shortened(clean(text.replace("\n", " ")), _TEXT_CHARACTERS)
