"""
The words of a verdict: the four verdicts, and a reason with its value, its limit and its record.

Text of a record may come from a stranger. Every field of a `Reason` is made one short harmless line
when it is built, so that nothing else has to think of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from pipelines import wording
from pipelines.console import clean

if TYPE_CHECKING:
    from collections.abc import Iterable

Verdict = Literal["PROMOTE", "HOLD", "REJECT", "INVALID"]
# From good to bad.
VERDICTS: Final[tuple[Verdict, ...]] = ("PROMOTE", "HOLD", "REJECT", "INVALID")
# What the verdict looks at; a reason names the one that it comes from.
Rule = Literal[
    "records",  # all are there and can be read
    "numbers",  # each of them is finite
    "chain",  # each speaks of the same bytes, and of what is declared now
    "verify",
    "evaluate",
    "gates",  # the limits of the declaration, read from the benchmark itself
    "choose",
    "load-test",
    "compare",
    "engine",  # old llama.cpp against new one, on the same file
    "license",
    "gated",
]
# How a verdict begins; `choose` writes the same words.
WORDS: Final[dict[Verdict, str]] = {verdict: verdict.lower() for verdict in VERDICTS}
DIGEST_CHARACTERS: Final = 12
CLAUSE_CHARACTERS: Final = 300
FIELD_CHARACTERS: Final = 160
SENTENCE_CHARACTERS: Final = 600


def worst(*verdicts: Verdict) -> Verdict:
    """Return the worst of some verdicts; INVALID of none."""
    return max(verdicts, key=VERDICTS.index, default="INVALID")


def tidy(text: str, characters: int = CLAUSE_CHARACTERS) -> str:
    """Make text of a record one short harmless clause."""
    return wording.shortened(" ".join(clean(text).split()), characters).rstrip(".")


def without_verb(text: str, verdict: Verdict) -> str:
    """Take `promote ` or `hold: ` from the beginning of what was said."""
    word = WORDS[verdict]
    for start in (f"{word}: ", f"{word} "):
        if text.startswith(start):
            return text.removeprefix(start)
    return text


def capital(text: str) -> str:
    """Begin a clause as a sentence does, unless it begins with a name such as `verify.json`."""
    word = text.partition(" ")[0]
    return text[:1].upper() + text[1:] if word.rstrip(",:").isalpha() else text


@dataclass(frozen=True, kw_only=True)
class Reason:
    """
    One thing that stands against a promotion.

    Attributes:
        rule: What was looked at.
        verdict: The verdict that it forces, unless something is worse.
        clause: Why, as a clause without an end.
        value: What was found: a number with its unit, a digest, an outcome.
        limit: What was due.
        file: The record that says so, below results/.
        next_step: What to do, as a sentence.
        host: For which host it holds; empty if for all.
        let_pass: Who let it pass, until when and why; empty if nobody did.
    """

    rule: Rule
    verdict: Verdict
    clause: str
    value: str
    limit: str
    file: str
    next_step: str
    host: str = ""
    let_pass: str = ""

    def __post_init__(self) -> None:
        """Let no text of a record be more than a short line."""
        for name in ("value", "limit", "file"):
            object.__setattr__(self, name, tidy(getattr(self, name), FIELD_CHARACTERS) or "nothing")
        for name in ("host", "let_pass"):
            object.__setattr__(self, name, tidy(getattr(self, name)))
        object.__setattr__(self, "clause", tidy(self.clause, SENTENCE_CHARACTERS))
        step = tidy(self.next_step, SENTENCE_CHARACTERS)
        object.__setattr__(self, "next_step", wording.sentence(step) if step else "")

    @property
    def counts(self) -> bool:
        """Tell whether nobody let it pass."""
        return not self.let_pass

    @property
    def sentence(self) -> str:
        """The reason by itself: `Layer tokens fails (M/verify.json: FAIL; due: PASS).`."""
        return f"{capital(self.clause)} ({self.file}: {self.value}; due: {self.limit})."


def severest(reasons: Iterable[Reason]) -> list[Reason]:
    """Return the reasons from bad to good; equal ones in the order in which they were found."""
    return sorted(reasons, key=lambda one: -VERDICTS.index(one.verdict))


def differing(found: str, wanted: str) -> tuple[str, str]:
    """Shorten two digests or words to what shows that they differ."""
    if found[:DIGEST_CHARACTERS] != wanted[:DIGEST_CHARACTERS]:
        return tidy(found)[:DIGEST_CHARACTERS], tidy(wanted)[:DIGEST_CHARACTERS]
    return tidy(found), tidy(wanted)
