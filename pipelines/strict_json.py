"""
JSON of a stranger: bounded in size and depth, each key once, every number finite, text that is one.

Python's own reader takes NaN, lets the last of two equal keys win, and ends the process's patience
with a file of nothing but brackets. Whoever reads an artifact looks at none of that.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

from pipelines import console
from pipelines.errors import FleetError
from pipelines.wording import quoted

# Records have five levels; those of load tests the most.
MAX_DEPTH: Final = 24
# 2**53 has sixteen digits; a digest in decimal none would want.
_MAX_DIGITS: Final = 40
_NO_LINES: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NO_TEXT: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class NotJsonError(FleetError):
    """Bytes are not JSON that we read; the message is a clause about the place."""


class NotStrictError(NotJsonError):
    """JSON as others read it: with a key twice, or a number that is none."""


def loads(data: bytes, *, limit_bytes: int, lines_in: frozenset[str] = frozenset()) -> Any:  # noqa: ANN401 - any JSON value
    """
    Read JSON.

    Args:
        data: The bytes.
        limit_bytes: More of them are not looked at.
        lines_in: Top-level keys below which texts may have line ends and tabs; `*` stands for all.

    Returns:
        Objects as dict in their order, arrays as list.

    Raises:
        NotJsonError: It is too large, no UTF-8, no JSON, too deep, has a key twice, a number that
            is none or text with control characters; says which, as a clause.
    """
    if len(data) > limit_bytes:
        raise NotJsonError(f"it has {len(data):,} bytes; {limit_bytes:,} are allowed")
    value = parse(data)
    _look(value, lines_in)
    return value


def parse(data: bytes) -> Any:  # noqa: ANN401 - any JSON value
    """
    Read JSON whose size somebody has looked at, and whose texts and depth somebody will.

    Raises:
        NotStrictError: It has a key twice, or a number that is none.
        NotJsonError: It is no UTF-8, no JSON, or nested beyond Python's patience.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_short,
        )
    except UnicodeDecodeError as error:
        raise NotJsonError(f"byte {error.start:,} is not UTF-8") from None
    except RecursionError:
        raise NotJsonError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise NotJsonError(f"line {error.lineno:,} is not JSON: {error.msg}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise NotStrictError(f"the key {quoted(key)} is there twice")
            seen.add(key)
    return found


def _no_constant(text: str) -> float:
    raise NotStrictError(f"{text} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise NotStrictError(f"{console.clean(text[:_MAX_DIGITS])} is not a finite number")
    return number


def _short(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise NotStrictError(f"a number has {len(text):,} digits")
    return int(text)


def _look(value: object, lines_in: frozenset[str]) -> None:
    """Look at every text and every depth, without recursion."""
    every = "*" in lines_in
    rest: list[tuple[object, int, bool]] = [(value, 1, every)]
    while rest:
        each, depth, lines = rest.pop()
        if depth > MAX_DEPTH:
            raise NotJsonError(f"it is nested deeper than {MAX_DEPTH} levels")
        if isinstance(each, str):
            _look_at_text(each, lines=lines)
        elif isinstance(each, dict):
            for key, inside in each.items():
                _look_at_text(key, lines=False)
                rest.append((inside, depth + 1, lines or (depth == 1 and key in lines_in)))
        elif isinstance(each, list):
            rest += [(inside, depth + 1, lines) for inside in each]


def _look_at_text(text: str, *, lines: bool) -> None:
    bad = (_NO_LINES if not lines else _NO_TEXT).search(text)
    if bad is None:
        return
    if "\ud800" <= bad[0] <= "\udfff":
        raise NotJsonError(f"{quoted(text)} is no text: half of a surrogate pair")
    raise NotJsonError(f"{quoted(text)} holds the control character {ord(bad[0]):#04x}")
