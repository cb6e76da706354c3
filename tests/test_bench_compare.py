"""The bench of comparisons counts what it claims."""

from __future__ import annotations

from typing import Any

import pytest

from bench import compare


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
