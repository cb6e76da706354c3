"""The bench of comparisons counts what it claims."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench import compare, compare_docs


def one(kind: str, outcome: str, loss: float = 0.0) -> dict[str, Any]:
    """A comparison as the bench writes it down."""
    test = {"log_ratio": -loss}
    return {
        "kind": kind, "outcome": outcome, "reasons": ["The machine is too noisy: x"],
        "doubled": False, "void_pairs_count": 2, "wall_s": 10.0, "load": 1.0,
        "tests": {"prefill": test, "decode": test},
    }  # fmt: skip


def test_invalid_comparisons_are_counted_and_prove_nothing() -> None:
    """Shares are of valid ones, with Wilson's interval."""
    known = [one("same", "equal"), one("same", "INVALID", 9.0), one("same", "worse")]
    known += [one("slower", "worse", 0.1)] * 3 + [one("slower", "undecided", 0.1)]
    found = compare.summary(known)

    assert found["same"]["outcomes"] == {"INVALID": 1, "equal": 1, "worse": 1}
    assert found["same"]["worse_share_of_valid"] == 0.5
    assert found["slower"]["worse_share_of_valid"] == 0.75
    assert found["slower"]["worse_share_low"] == pytest.approx(0.30, abs=0.01)
    assert found["slower"]["measured_difference"]["decode"] == pytest.approx(-0.095, abs=0.001)
    assert found["slower"]["void_pairs_count"] == 8


def test_both_kinds_see_the_same_hours() -> None:
    """The slower ones are spread over the run, not put at its end."""
    order = compare._order({"same": 50, "slower": 20})

    assert len(order) == len(set(order)) == 70
    for part in (order[:35], order[35:]):
        assert 8 <= sum(kind == "slower" for kind, _ in part) <= 12


def test_the_page_holds_the_figures_of_the_record_and_of_the_simulation() -> None:
    """docs/compare.md cannot drift from the record of the bench, nor from the statistics."""
    page = compare_docs.PAGE.read_text(encoding="utf-8")
    figures = json.loads(compare.RECORD.read_text(encoding="utf-8"))

    assert compare_docs.placed(page, "proof", compare_docs.proven(figures)) == page, (
        "Run `python -m bench.compare_docs`."
    )
    for losses, noise in (compare_docs.ROWS[0], compare_docs.ROWS[4]):
        assert compare_docs.row(losses, noise) in page


def test_a_page_without_marks_is_refused() -> None:
    """Nothing is put where nobody can say where it ends."""
    with pytest.raises(ValueError, match="the page needs one"):
        compare_docs.placed("# A page", "proof", "text")


def test_other_figures_make_another_page() -> None:
    """What was counted is what is told; of none valid nothing is."""
    figures = {
        "stopped_share": 0.08, "niceness": 0, "machine": {"cores_count": 4},
        **compare.summary([one("same", "worse"), one("slower", "INVALID", 0.1)]),
    }  # fmt: skip
    text = " ".join(compare_docs.proven({**figures, "niceness": 0}).split(" "))

    assert "| the same file | 1 | 0 | 1 | 0 | 0 |" in text
    assert "Worse than itself: 1 of 1 valid" in text
    assert "The slowed one found: none was valid" in " ".join(text.split())
    assert "had no priority" in text
