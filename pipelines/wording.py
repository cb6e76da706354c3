"""
Numbers as people read them: three significant digits, thousands separators, units beside them.

And sentences as they are put together from the parts of others.

Two numbers that decide something are never shown as equal when they are not: `beyond`
and `pair` add digits until a reader sees the difference that the code saw.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from pipelines import console

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ABSENT = "—"
_DIGITS = 3
# Where a double has no more digits to tell two numbers apart.
_MAX_DIGITS = 17
_LARGEST_WRITTEN_OUT = 1e12
_SMALLEST_WRITTEN_OUT = 1e-6
_MAX_QUOTED_CHARACTERS = 60
_MAX_NAMES = 6
_MAX_NAME = 120
# A longer word is no slip of the finger, and difflib takes quadratic time.
_LONGEST_SLIP = 100


def number(value: float | None, digits: int = _DIGITS) -> str:
    """Write 1234.5 as `1,230`, 0.031234 as `0.0312`, an absent value as a dash."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if value == 0:
        return "0"
    if not _SMALLEST_WRITTEN_OUT <= abs(value) < _LARGEST_WRITTEN_OUT:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def declared(limit: float) -> str:
    """Write a number of the declaration as it was declared, with separators: `0.06`, `24,576`."""
    return f"{limit:,.12g}"


def beyond(value: float, limit: float) -> str:
    """Write a measured number with as many digits as show on which side of `limit` it lies."""
    digits = _DIGITS
    while digits < _MAX_DIGITS and not _same_side(number(value, digits), value, limit):
        digits += 1
    return number(value, digits)


def _same_side(shown: str, value: float, limit: float) -> bool:
    read = float(shown.replace(",", ""))
    return (read > limit) == (value > limit) and (read < limit) == (value < limit)


def pair(first: float, second: float) -> tuple[str, str]:
    """Write two measured numbers so that unequal ones look unequal."""
    digits = _DIGITS
    while (
        first != second and digits < _MAX_DIGITS and number(first, digits) == number(second, digits)
    ):
        digits += 1
    return number(first, digits), number(second, digits)


def percent(share: float | None, digits: int = 2) -> str:
    """Write a relative difference: 0.311 as `31 %`."""
    return ABSENT if share is None else f"{number(share * 100, digits)} %"


def mib(value: float) -> str:
    """Write a limit in whole MiB: `24,576 MiB`."""
    return f"{value:,.0f} MiB"


def tokens(count: int) -> str:
    """Write a number of tokens in full: `16,384`."""
    return f"{count:,}"


def listed(words: list[str]) -> str:
    """Join words as a sentence does: `a, b and c`."""
    if len(words) < 2:  # noqa: PLR2004 - nothing to join
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def first_few(names: Sequence[str]) -> str:
    """Join the first names of a list from outside, cleaned, and count the rest: `a and 3 more`."""
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    return (
        ", ".join(shortened(console.clean(name), _MAX_NAME) for name in names[:_MAX_NAMES]) + more
    )


def counted(count: int, noun: str) -> str:
    """Write `1 quant`, `3 quants`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


_NAMES = frozenset({"Ollama"})


def clause(sentence: str) -> str:
    """Make a sentence a part of another one: `The card was hot.` becomes `the card was hot`."""
    text = sentence.strip().rstrip(".")
    word = text.split(" ", 1)[0]
    # Names such as NVIDIA, Q4_K_M and Ollama keep their letters.
    common = (word[1:].islower() or word == "A") and word.removesuffix("'s") not in _NAMES
    return text[:1].lower() + text[1:] if common else text


def sentence(text: str) -> str:
    """End a text with a full stop unless it has an end."""
    return text if text.endswith((".", "…", "!", "?")) else f"{text}."


def shortened(text: str, characters: int) -> str:
    """Cut a text that is longer than `characters`, so that the cut is seen."""
    return text if len(text) <= characters else text[: characters - 1].rstrip() + "…"


def quoted(text: str) -> str:
    """Show text from outside: ASCII, escaped, short, and without a command for the CI runner."""
    if len(text) > _MAX_QUOTED_CHARACTERS:
        text = text[: _MAX_QUOTED_CHARACTERS - 3] + "..."
    return console.clean(json.dumps(text))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean "X"?` if one of the known words is close, else nothing."""
    from difflib import get_close_matches  # noqa: PLC0415 - only for a mistake

    if len(word) > _LONGEST_SLIP:
        return ""
    by_lower = {each.lower(): each for each in known}
    close = get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {quoted(by_lower[close[0]])}?" if close else ""
