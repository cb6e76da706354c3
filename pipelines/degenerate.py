"""
Degenerate answers: empty, one token, a loop, no end; counted against those of the f16 itself.

Perplexity looks at one token after a right text. A model that was quantized too far, or served with
a wrong template or stop, can look fine there and still repeat itself for ever. So the same greedy
prompts are answered by f16 and by the quant, and what counts is which of the two is worse where
they differ: a small model loops now and then in 16 bits, too, and an answer that is cut by the
limit of tokens may just be long. Being cut is the lesser fault, so that a loop is seen where f16
only has no end.

A text is a loop if one of two rules holds:
    its end is one period, four times or more in a row, and that is 30 % of the text and 24
    characters or more (four equal lines, `ha ha ha ha`, one character for ever);
    fewer than half of its four-word sequences are different ones, of 40 or more. That is seq-rep-4
    above 0.5 (Welleck et al., Neural Text Generation with Unlikelihood Training, 2019, section 5:
    0.006 for people, 0.44 for greedy GPT-2 on average), and finds loops with a counter in them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Final, Literal, Protocol

from pipelines.load_records import Degenerate
from pipelines.stats import CONFIDENCE
from pipelines.wording import counted, listed, number, percent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.load_records import ErrorClass, Outcome

Kind = Literal["empty", "one_token", "loop", "no_end"]

MIN_REPEATS: Final = 4
MIN_LOOP_SHARE: Final = 0.3
MIN_LOOP_CHARACTERS: Final = 24
MIN_UNIQUE_SHARE: Final = 0.5
MIN_SEQUENCES: Final = 40
_SEQUENCE_WORDS: Final = 4
# A loop that begins later than this shows in the end as well; the search takes quadratic time.
_MAX_CHARACTERS: Final = 8000
# Characters of the scripts that do without blanks, words, rows of one sign (people draw lines).
_WORD: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|([^\w\s])\1*")
# How bad an answer is, for the comparison.
_RANKS: Final[Mapping[Kind | None, int]] = {
    None: 0, "no_end": 1, "one_token": 2, "loop": 2, "empty": 2,
}  # fmt: skip
_KIND_WORDS: Final = {
    "empty": "empty",
    "one_token": "of one token",
    "loop": "in a loop",
    "no_end": "without an end",
}


class Answer(Protocol):
    """
    What is looked at of an answer of the load generator (`pipelines.load.measures.Answer`).

    `output_tokens` is the server's own count and includes the token that ends the answer; `error`
    is the class of the failure if there was one, and then nothing else counts.
    """

    @property
    def text(self) -> str:
        """The answer."""

    @property
    def done_reason(self) -> str:
        """Why the server ended it: `stop`, `length`; empty if it does not say."""

    @property
    def output_tokens(self) -> int | None:
        """Tokens; None where the server does not count."""

    @property
    def error(self) -> ErrorClass | None:
        """None of a success."""


# Failures of a request that are degenerate answers: Ollama's repeat guard, and `done` at once.
_DEGENERATE_ERRORS: Final[Mapping[str, Kind]] = {"loop": "loop", "empty_output": "empty"}


def is_degenerate(
    text: str, done_reason: str, tokens_count: int | None, limit_tokens: int | None = None
) -> Kind | None:
    """
    Tell what is wrong with an answer, the worst first, or None.

    Args:
        text: The answer.
        done_reason: Why the server ended it; `length` if it reached the limit, empty if unknown.
        tokens_count: Tokens generated, the end token included, as the server counts them.
        limit_tokens: The limit; decides about the end where the server gives no reason.
    """
    if not text.strip():
        return "empty"
    if done_reason == "stop" and tokens_count in {1, 2}:
        # The token, and the end if the server counts it.
        return "one_token"
    if is_loop(text):
        return "loop"
    cut = limit_tokens is not None and (tokens_count or 0) >= limit_tokens
    return "no_end" if done_reason == "length" or (not done_reason and cut) else None


def is_loop(text: str) -> bool:
    """Tell whether a text repeats itself, by the two rules above."""
    tail = text.strip()[-_MAX_CHARACTERS:]
    return _ends_in_a_period(tail) or unique_share(tail) < MIN_UNIQUE_SHARE


def _ends_in_a_period(text: str) -> bool:
    """Look for the period: a distance at which the end of the text equals itself."""
    least = max(MIN_LOOP_CHARACTERS, math.ceil(MIN_LOOP_SHARE * len(text)))
    for period in range(1, len(text) // MIN_REPEATS + 1):
        if _periodic_end(text, period) >= max(least, MIN_REPEATS * period):
            return True
    return False


def _periodic_end(text: str, period: int) -> int:
    """Return the length of the longest end of `text` that repeats with `period`."""
    length = len(text)
    at = length - 1
    while at >= period and text[at] == text[at - period]:
        at -= 1
    return length - 1 - at + period


def unique_share(text: str) -> float:
    """Return the share of different four-word sequences; 1 if there are too few to tell."""
    words = [found[0] for found in _WORD.finditer(text.lower())]
    count = len(words) - _SEQUENCE_WORDS + 1
    if count < MIN_SEQUENCES:
        return 1.0
    return len({tuple(words[i : i + _SEQUENCE_WORDS]) for i in range(count)}) / count


def sign_test(more: int, fewer: int) -> float:
    """
    Return the probability of `more` or more heads in `more + fewer` throws of a fair coin.

    That is the exact sign test, one-sided: pairs in which both are equally bad say nothing.
    """
    count = more + fewer
    return sum(math.comb(count, heads) for heads in range(more, count + 1)) / (1 << count)


def compare(
    answers: Sequence[Answer],
    f16_answers: Sequence[Answer] | None,
    limit: float,
    *,
    limit_tokens: int | None = None,
) -> Degenerate:
    """
    Judge the answers of a quant beside those of f16 to the same prompts.

    FAIL needs both: more excess than the limit, and so many prompts on which the quant is the worse
    one that chance would rarely give them (5 %). The first without the second is
    INCONCLUSIVE; so is a comparison of less than half of the prompts. PASS says that no breakage
    was seen, not that there is none: 24 prompts cannot show that.

    Args:
        answers: The quant's answers. A request that failed is left out, for other gates count it,
            unless it failed by a loop or by an empty answer.
        f16_answers: Those of f16 in the same order; None where this host cannot hold f16: then the
            quant's own share has to keep the limit, missing ends left out.
        limit: Largest excess, a share of the prompts.
        limit_tokens: Tokens that an answer could have.

    Raises:
        ValueError: The two do not have the same length.
    """
    kinds = [_kind(each, limit_tokens) for each in answers]
    counts = Counter(kind for kind in kinds if kind)
    judged: dict[str, object] = {
        "prompts_count": len(answers),
        "degenerate_count": sum(counts.values()),
        "limit": limit,
        "kinds": dict(sorted(counts.items())),
    }
    seen = f"{counted(len(answers), 'greedy answer')}: {_kinds_in_words(counts)}"
    if f16_answers is None:
        answered = sum(map(_answered, answers))
        outcome, because = _judged_alone(counts, answered, len(answers), limit)
        return Degenerate.model_validate(
            judged
            | {
                "f16_degenerate_count": None,
                "excess": None,
                "outcome": outcome,
                "sentence": f"{seen}; {because}.",
            }
        )
    f16_kinds = [_kind(each, limit_tokens) for each in f16_answers]
    pairs = [
        (_RANKS[kind], _RANKS[f16_kind])
        for kind, f16_kind, *both in zip(kinds, f16_kinds, answers, f16_answers, strict=True)
        if all(map(_answered, both))
    ]
    outcome, excess, because = _judged(pairs, len(answers), limit)
    return Degenerate.model_validate(
        judged
        | {
            "f16_degenerate_count": sum(kind is not None for kind in f16_kinds),
            "excess": excess,
            "outcome": outcome,
            "sentence": f"{seen}; {because}.",
        }
    )


def _answered(answer: Answer) -> bool:
    return answer.error is None or answer.error in _DEGENERATE_ERRORS


def _kind(answer: Answer, limit_tokens: int | None) -> Kind | None:
    if answer.error is not None:
        return _DEGENERATE_ERRORS.get(answer.error)
    return is_degenerate(answer.text, answer.done_reason, answer.output_tokens, limit_tokens)


def _kinds_in_words(counts: Counter[Kind]) -> str:
    words = [f"{count:,} {_KIND_WORDS[kind]}" for kind, count in sorted(counts.items())]
    return listed(words) or "none degenerate"


def _judged_alone(
    counts: Counter[Kind], answered: int, asked: int, limit: float
) -> tuple[Outcome, str]:
    """
    Judge without f16: the excess over it is at most the quant's own share, whatever f16 does.

    Missing ends are left out. Where answers may be short they are common in every model, and
    without f16 nobody knows how common.
    """
    bad = sum(count for kind, count in counts.items() if kind != "no_end")
    what = f"f16 could not be asked, and {bad:,} of {answered:,} are more than cut off"
    if 2 * answered >= asked and answered and bad / answered <= limit:
        return "PASS", f"{what}, within the {percent(limit)} that may exceed it"
    return "INCONCLUSIVE", f"{what}, so that nothing is judged"


def _judged(
    pairs: Sequence[tuple[int, int]], asked: int, limit: float
) -> tuple[Outcome, float | None, str]:
    """Return outcome, excess and the reason; a pair is how bad (the quant's, f16's) answer is."""
    count = len(pairs)
    if 2 * count < asked or not count:
        return "INCONCLUSIVE", None, f"only {count:,} of {asked:,} were answered by both"
    worse = sum(ours > f16 for ours, f16 in pairs)
    better = sum(ours < f16 for ours, f16 in pairs)
    excess = (worse - better) / count
    what = (
        f"{worse:,} worse than f16's and {better:,} better, an excess of {percent(excess)} with "
        f"{percent(limit)} allowed"
    )
    if excess <= limit:
        return "PASS", excess, what
    chance = sign_test(worse, better)
    if chance <= 1 - CONFIDENCE:
        return "FAIL", excess, f"{what} (chance would do that with {number(chance)})"
    return (
        "INCONCLUSIVE",
        excess,
        f"{what}, which chance could do ({number(chance)}): more degenerate_prompts would decide",
    )
