"""The truth table in docs/verdict.md is what the function answers, for every combination."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from pipelines import verdict, verdict_table
from pipelines.verdict_words import VERDICTS

ROOT = Path(__file__).resolve().parent.parent
INPUTS = verdict_table.inputs()
ALONE = {
    (one.name, state.name): verdict_table.alone(one.name, state.name)
    for one in INPUTS
    for state in one.states
}
EXPECTED = {
    "verify": "PASS PROMOTE, SKIP PROMOTE, FAIL REJECT, missing INVALID, foreign INVALID",
    "choice": "winner PROMOTE, doubt HOLD, none REJECT",
    "evals": "ok PROMOTE, none PROMOTE, void PROMOTE, harm REJECT, missing INVALID",
    "load test": "good PROMOTE, open HOLD, stand-in HOLD, fails REJECT, in doubt INVALID, "
    "missing INVALID, foreign INVALID",
    "comparison": "better PROMOTE, equal PROMOTE, absent PROMOTE, stale PROMOTE, "
    "absent, required HOLD, stale, required HOLD, undecided HOLD, worse REJECT, INVALID INVALID",
    "licence": "ok PROMOTE, unknown HOLD, changed HOLD, gated HOLD, waived PROMOTE",
}


@pytest.mark.parametrize("one", INPUTS, ids=lambda one: one.name)
def test_each_state_alone_has_the_verdict_that_operators_rely_on(one: verdict_table.Input) -> None:
    """Stated here once by hand, so that a change of the function is a change of a promise."""
    found = ", ".join(f"{each.name} {ALONE[one.name, each.name].verdict}" for each in one.states)

    assert found == EXPECTED[one.name]


def test_every_combination_is_as_bad_as_its_worst_state() -> None:
    """All of them are judged; where nothing is chosen, no file was served, harmed or compared."""
    single = {key: found.verdict for key, found in ALONE.items()}
    good, count = verdict_table.good(), 0

    for combination in product(*(one.states for one in INPUTS)):
        known = good
        for state in combination:
            known = state.change(known)
        states = {one.name: state.name for one, state in zip(INPUTS, combination, strict=True)}
        assert verdict.judge(known).verdict == verdict_table.expected(single, states), states
        count += 1

    assert f"All {count:,} combinations" in verdict_table.page()


def test_every_state_that_does_not_promote_says_why_and_what_to_do() -> None:
    """A clause, the value, the limit, the record and a next step, for each of them."""
    for (input_, state), found in ALONE.items():
        if found.verdict == "PROMOTE":
            assert not [each for each in found.reasons if each.counts], (input_, state)
            continue
        worst = found.reasons[0]
        assert worst.verdict == found.verdict
        assert worst.next_step
        assert f"({worst.file}: {worst.value}; due: {worst.limit})" in worst.sentence
        assert found.sentence.startswith(found.verdict.lower())


def test_the_page_in_docs_is_the_one_that_the_function_makes() -> None:
    """`fleet schema --write` makes it, and nobody has to keep it by hand."""
    text = (ROOT / "docs/verdict.md").read_text(encoding="utf-8")

    assert text == verdict_table.page()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(ALONE) + len(INPUTS)
    assert {word for row in rows for word in VERDICTS if f"| {word} |" in row} == set(VERDICTS)
