"""
Files of a stranger's in words: bounded JSON, values, differences by key and by line.

Whatever two revisions hold, what comes out is short, printable and of one line, or a diff of a
bounded number of lines. A file that cannot be read says why (`NotToldError`) and is never guessed.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import TYPE_CHECKING, Any, Final

from pipelines import console, strict_json, wording
from pipelines.errors import FleetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_MAX_VALUE: Final = 60
# More are not told in one sentence.
MAX_CLAUSES: Final = 12
# Values below that are told as one.
_MAX_DEPTH: Final = 4
# A configuration has some hundred keys, one with many added tokens some thousand.
_MAX_LEAVES: Final = 20_000
_MAX_NESTING: Final = 64

# difflib takes the product of both lengths. The longest template in use has some 400 lines, the
# longest licence some 700.
_MAX_LINES: Final = 1500
_MAX_COMPARED: Final = 1 << 20
_MAX_LINE: Final = 300
_LONG_LINE: Final = 160
_MAX_DIFF: Final = 12_000

# What a reader of a diff does not see, or sees elsewhere than it is: controls, formats that turn
# the direction of text or have no width, tags, halves of a surrogate pair.
_UNSEEN: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    r"\U000e0000-\U000e0fff]"
)
_AT_TAGS: Final = re.compile(r"(?<=%\})|(?<=\}\})|(?=\{%)|(?=\{\{)|(?<=\\n)")


class NotToldError(FleetError):
    """A file cannot be told in words; the message is a clause that says why."""


class NotJsonError(NotToldError):
    """It cannot be, since nobody can read it: no UTF-8, no JSON."""


def shown(text: str, characters: int = 200) -> str:
    """Make one short line of a text from outside; what nobody would see in it is spelled out."""
    line = visible(text[: characters * 4].replace("\n", "\\n").replace("\t", "\\t"))
    return wording.shortened(console.clean(line), characters)


def visible(text: str) -> str:
    """Spell out characters that do not show by their number, U+202E as a backslash and u202e."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def several(clauses: Sequence[str], at_most: int = MAX_CLAUSES) -> str:
    """Join the first clauses of a list and count the rest."""
    more = len(clauses) - at_most
    return "; ".join(clauses[:at_most]) + (f"; and {more:,} more" if more > 0 else "")


# --- JSON -------------------------------------------------------------------------------------


def load(raw: bytes) -> Any:  # noqa: ANN401 - any JSON value
    """
    Read JSON as the converter will: UTF-8 without a mark of byte order.

    Raises:
        NotJsonError: It is none, or nested beyond Python's patience.
        NotToldError: It is nested beyond ours, has a key twice or a number that is none.
    """
    try:
        found = strict_json.parse(raw)
    except strict_json.NotStrictError as error:
        raise NotToldError(error.message) from None
    except strict_json.NotJsonError as error:
        raise NotJsonError(error.message) from None
    _require_shallow(found)
    return found


def _require_shallow(found: object) -> None:
    """Refuse what would be read and then not be written: both use up the same stack."""
    level: list[object] = [found]
    for _ in range(_MAX_NESTING):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise NotToldError(f"it is nested deeper than {_MAX_NESTING} levels")


def load_object(raw: bytes) -> dict[str, Any]:
    """
    Read a JSON object.

    Raises:
        NotToldError: See `load`; or it is a list or a single value.
    """
    found = load(raw)
    if not isinstance(found, dict):
        raise NotToldError("it is no JSON object")
    return found


def written(value: object) -> str:
    """Write a value so that equal ones are written equally, and `1`, `1.0` and `true` are not."""
    return json.dumps(value, sort_keys=True)


def value(told: object) -> str:
    """Write a value for people: `4096`, `true`, `none`, `"<|im_end|>"`, long ones cut."""
    if told is None:
        return "none"
    if isinstance(told, str):
        return quoted(told)
    return shown(json.dumps(told, ensure_ascii=False), _MAX_VALUE)


def quoted(text: str) -> str:
    """Write a text for people, in quotes, cut, with what does not show spelled out."""
    return f'"{shown(text, _MAX_VALUE)}"'


# --- by key -----------------------------------------------------------------------------------


def leaves(told: Mapping[str, Any]) -> dict[str, object]:
    """Flatten an object: `{"a": {"b": 1}}` becomes `{"a.b": 1}`; lists are values."""
    found: dict[str, object] = {}
    rest: list[tuple[str, object, int]] = [
        (key, each, 1) for key, each in reversed(list(told.items()))
    ]
    while rest:
        name, each, depth = rest.pop()
        if isinstance(each, dict) and each and depth < _MAX_DEPTH:
            rest += [(f"{name}.{key}", inner, depth + 1) for key, inner in reversed(each.items())]
            continue
        found[name] = each
        if len(found) > _MAX_LEAVES:
            raise NotToldError(f"it has more than {_MAX_LEAVES:,} values")
    return found


def changed(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Return the keys whose values differ, those of the old one first."""
    keys = [*old, *(key for key in new if key not in old)]
    return [
        key
        for key in keys
        if (key in old) != (key in new) or written(old[key]) != written(new[key])
    ]


def clause(key: str, old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """Say what became of one key: `rope_theta 10000 -> 1000000`."""
    name = shown(key, 100)
    if key not in old:
        return f"{name} is new: {value(new[key])}"
    if key not in new:
        return f"{name} is gone (was {value(old[key])})"
    was, now = value(old[key]), value(new[key])
    if was == now:
        return f"{name} changed"
    return f"{name} {was} -> {now}"


# --- by line ----------------------------------------------------------------------------------


def text_of(raw: bytes) -> str:
    """
    Read a text as UTF-8.

    Raises:
        NotToldError: It is none.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotToldError(f"byte {error.start:,} is not UTF-8") from None


def beginning(text: str) -> str:
    """Return the first line of a text that says something, in quotes."""
    return quoted(next((line.strip() for line in text[:4000].split("\n") if line.strip()), ""))


def diff(old: str, new: str) -> tuple[str, str]:
    """
    Compare two texts by line; a line of more than 160 characters is broken at its Jinja tags.

    Returns:
        A unified diff of at most 12,000 characters, and its sum: `12 lines new, 3 gone`.

    Raises:
        NotToldError: They are too long to be compared.
    """
    if len(old) + len(new) > _MAX_COMPARED:
        raise NotToldError(f"{len(old) + len(new):,} characters are too many to compare by line")
    # What is not there has no lines, rather than an empty one.
    before, after = _lines(old) if old else [], _lines(new) if new else []
    start = _shared(before, after)
    end = _shared(before[start:][::-1], after[start:][::-1])
    if max(len(before), len(after)) - start - end > _MAX_LINES:
        raise NotToldError(f"more than {_MAX_LINES:,} lines differ")
    around = (max(0, start - 3), max(0, end - 3))
    is_broken = [len(before), len(after)] != [text.count("\n") + bool(text) for text in (old, new)]
    lines = list(_unified(before, after, *around, numbered=not is_broken))
    gone = sum(line.startswith("-") for line in lines)
    come = sum(line.startswith("+") for line in lines)
    return bounded(map(_safe, lines)), f"{wording.counted(come, 'line')} new, {gone:,} gone"


def _safe(line: str) -> str:
    return wording.shortened(console.clean(visible(line[: _MAX_LINE * 2])), _MAX_LINE)


def _lines(text: str) -> list[str]:
    """Split a text into lines that a person can compare."""
    lines: list[str] = []
    for line in text.split("\n"):
        parts = _AT_TAGS.split(line) if len(line) > _LONG_LINE else [line]
        lines += [part for part in parts if part] or [""]
    return lines


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many lines two texts share from their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _unified(
    before: list[str], after: list[str], start: int, end: int, *, numbered: bool
) -> Iterator[str]:
    """Compare what lies between; numbers of lines count from the beginning all the same."""
    middle = before[start : len(before) - end], after[start : len(after) - end]
    matcher = difflib.SequenceMatcher(None, *middle, autojunk=True)
    for group in matcher.get_grouped_opcodes(3):
        _, i, _, j, _ = group[0]
        yield f"@@ line {i + start + 1:,} -> line {j + start + 1:,} @@" if numbered else "@@"
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                yield from (f" {line}" for line in middle[0][i1:i2])
                continue
            yield from (f"-{line}" for line in middle[0][i1:i2])
            yield from (f"+{line}" for line in middle[1][j1:j2])


def bounded(lines: Iterable[str]) -> str:
    """Join the lines that fit into 12,000 characters, and count the rest."""
    found: list[str] = []
    size = 0
    rest = 0
    for line in lines:
        if rest or size + len(line) + 1 > _MAX_DIFF:
            rest += 1
            continue
        found.append(line)
        size += len(line) + 1
    return "\n".join([*found, *([f"… and {rest:,} more lines"] if rest else [])])
