"""What one rule of validity says: its name, what was seen, where the limit lies, and a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from pipelines import wording

# Share of the moments at which a card or a core was slowed down by heat or lack of power. One
# moment can be the end of what ran before.
MAX_SLOWDOWN_SHARE: Final = 0.02


@dataclass(frozen=True)
class Finding:
    """
    What one rule says.

    Attributes:
        rule: Its name; the end of it is the unit of value and limit.
        outcome: `void` makes the measurement INVALID, `unknown` could not be read.
        value: What was seen; None where it is no number, or was not told.
        limit: Where the worst outcome of this rule begins.
        sentence: For `void` what was seen, the limit and what to do; for `note` what to know.
    """

    rule: str
    outcome: Literal["ok", "note", "void", "unknown"]
    value: float | None = None
    limit: float | None = None
    sentence: str = ""


def ok(rule: str, value: float | None, limit: float | None) -> Finding:
    """Say that all is well."""
    return Finding(rule, "ok", value, limit)


def note(rule: str, value: float, limit: float, sentence: str) -> Finding:
    """Say what a reader should know."""
    return Finding(rule, "note", value, limit, sentence)


def void(rule: str, value: float, limit: float, sentence: str) -> Finding:
    """Say what makes the measurement INVALID."""
    return Finding(rule, "void", value, limit, sentence)


def unknown(rule: str, limit: float, sentence: str) -> Finding:
    """Say that nobody could tell."""
    return Finding(rule, "unknown", None, limit, sentence)


def over(share: float, limit: float) -> str:
    """Write a share with as many digits as show on which side of its limit it lies."""
    return f"{wording.beyond(share * 100, limit * 100)} %"


def limit_of(share: float) -> str:
    """Write the limit of a share as it was declared."""
    return f"{wording.declared(share * 100)} %"
