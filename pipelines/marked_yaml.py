"""
YAML in which every value knows its line: what DVC would read, or a list of what is wrong.

DVC reads params.yaml with ruamel (YAML 1.2, C parser). So do we, since two parsers of one file
sooner or later act on two different values. Of YAML we take mappings, lists and plain values and
refuse, with the line, what a declaration does not need and an attack does: aliases (bombs), tags
(`!!python/object`), merge keys, directives, a second document, deep nesting (which overflows the
C stack of the parser, in DVC too), and every byte that is not visible text.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines import console
from pipelines.errors import ParamsError, Problem
from pipelines.wording import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Some 2,500 quants. A declaration is read at the start of every stage.
MAX_BYTES = 256 * 1024
# The deepest value of a declaration lies at 5: quants.KEY.tensor_types[0].match.
MAX_DEPTH = 16
# The longest number that means something: 1e12 as an integer, a float with all its digits.
_MAX_NUMBER_CHARACTERS = 40

_TAG = "tag:yaml.org,2002:"
_NUMBERS = frozenset({f"{_TAG}int", f"{_TAG}float"})
_PLAIN = _NUMBERS | {f"{_TAG}str", f"{_TAG}bool", f"{_TAG}null"}
_NOT_PLAIN = {
    f"{_TAG}timestamp": "reads as a date in YAML; put it in quotes",
    f"{_TAG}value": "has a meaning of its own in YAML; put it in quotes",
    f"{_TAG}merge": "is a merge key, which is not allowed here; write the values out",
}
# Not to be seen, or able to change what is seen: controls but tab and line ends, the separators
# that YAML 1.1 takes as line ends, marks that reorder text, the byte-order mark.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)
_LINE_END = re.compile(r"\r\n|\r|\n")

# Path to a value: ("quants", "tiny-llama-Q8_0", "tensor_types", 0, "match").
Loc = tuple[str | int, ...]


class Mark(NamedTuple):
    """A 1-based line and column (in characters)."""

    line: int
    column: int


class Finding(NamedTuple):
    """One thing that is wrong, before it is tied to a file; `loc` is empty for the whole file."""

    mark: Mark
    loc: Loc
    text: str

    def within(self, name: str) -> Problem:
        """Tie the finding to a file."""
        return Problem(name, *self.mark, f"{spell(self.loc)}: {self.text}")


@dataclass(frozen=True)
class Document:
    """
    Plain data, the place of each part of it, and what is wrong with it as YAML.

    Where `findings` refuse a value, `data` holds None; where they refuse a key, nothing.
    """

    name: str
    data: Any = None
    keys: dict[Loc, Mark] = field(default_factory=dict)
    values: dict[Loc, Mark] = field(default_factory=dict)
    written: dict[Loc, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def value_at(self, loc: Loc) -> Mark:
        """Place of a value; of the nearest thing around it if it is not there."""
        return self._nearest(self.values, loc)

    def key_at(self, loc: Loc) -> Mark:
        """Place of the key (or list item) that holds a value; else of the nearest around it."""
        return self._nearest(self.keys, loc)

    def shown(self, loc: Loc) -> str:
        """Return a value as the operator wrote it, short and safe to print."""
        return self.written.get(loc, "that")

    @staticmethod
    def _nearest(marks: dict[Loc, Mark], loc: Loc) -> Mark:
        while loc and loc not in marks:
            loc = loc[:-1]
        return marks.get(loc, Mark(1, 1))


def spell(loc: Loc) -> str:
    """Spell a path as people do: `quants.tiny-llama-Q4_K_M.tensor_types[0].match`."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            plain = re.fullmatch(r"[A-Za-z0-9_-]{1,80}", part)
            text += ("." if text else "") + (part if plain else quoted(part))
    return text or "the file"


def read(path: Path) -> Document:
    """
    Read one YAML file into plain data with places.

    Raises:
        ParamsError: It cannot be read, is no text, is no YAML, is empty, or uses YAML that is not
            allowed.
    """
    name = shown_name(path)
    try:
        text = _decode(_read_bytes(path))
        _raise_any(_refusals(text))
        return _build(name, text)
    except _UnreadableError as error:
        raise failure(
            (finding.within(name) for finding in error.findings), hint=_UNREADABLE_HINT
        ) from None


def failure(
    problems: Iterable[Problem], *, hint: str = "docs/params.md describes every key."
) -> ParamsError:
    """Make one error of many problems, in the order of the file."""
    ordered = sorted(problems, key=lambda problem: (problem.line, problem.column))
    name = ordered[0].file
    count = "1 problem" if len(ordered) == 1 else f"{len(ordered)} problems"
    return ParamsError(
        f"{name}: {count}.\n" + "\n".join(map(str, ordered)),
        hint=hint,
        problems=ordered,
    )


def shown_name(path: Path) -> str:
    """Name a file as the reader would: from where he stands, if it lies below."""
    try:
        return path.absolute().relative_to(Path.cwd()).as_posix()
    except (ValueError, OSError):
        return path.as_posix()


# No key is wrong in a file that cannot be read as YAML, so no list of keys helps.
_UNREADABLE_HINT = "Correct the place that is named, then run the same command again."


class _UnreadableError(Exception):
    """The file cannot be read any further."""

    def __init__(self, *findings: Finding) -> None:
        super().__init__()
        self.findings = findings


def _raise_any(findings: Iterable[Finding]) -> None:
    found = tuple(findings)
    if found:
        raise _UnreadableError(*found)


# --- bytes and text ---------------------------------------------------------------------------


def _read_bytes(path: Path) -> bytes:
    try:
        kind = path.lstat().st_mode
        if stat.S_ISREG(kind):
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) <= MAX_BYTES:
                return data
            text = f"is larger than {MAX_BYTES // 1024:,} KiB, which no declaration is"
        elif stat.S_ISLNK(kind):
            # Where it leads, private lines could lie, and error messages show lines.
            text = "is a symbolic link; it must be a file of its own"
        else:
            text = "is a directory, not a file" if stat.S_ISDIR(kind) else "is not a regular file"
    except OSError as error:
        text = f"cannot be read: {error.strerror or error}"
    raise _UnreadableError(Finding(Mark(1, 1), (), text))


def _decode(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        what = f"byte 0x{data[error.start]:02x} is no UTF-8"
        raise _UnreadableError(Finding(_mark(before), (), what)) from None
    if match := _INVISIBLE.search(text):
        what = f"character U+{ord(match[0]):04X} cannot be seen; remove it"
        # One is enough: a binary file has one at every second place.
        raise _UnreadableError(Finding(_mark(text[: match.start()]), (), what))
    return text


def _mark(before: str) -> Mark:
    """Place of what follows `before`."""
    lines = _LINE_END.split(before)
    return Mark(len(lines), len(lines[-1]) + 1)


# --- YAML -------------------------------------------------------------------------------------


def _of(node: Any) -> Mark:  # noqa: ANN401 - ruamel has no types
    return Mark(node.start_mark.line + 1, node.start_mark.column + 1)


def _refusals(text: str) -> Iterator[Finding]:
    """
    Yield the syntax errors and the YAML that is not allowed, from the stream of events.

    Events come one by one from a parser without recursion, so that nesting is seen before the
    composer, which is recursive C, could die of it.
    """
    from ruamel.yaml import YAML  # noqa: PLC0415 - 30 ms, not for `fleet --help`
    from ruamel.yaml.error import YAMLError  # noqa: PLC0415 - the same
    from ruamel.yaml.events import (  # noqa: PLC0415 - the same
        AliasEvent,
        CollectionEndEvent,
        CollectionStartEvent,
        DocumentStartEvent,
    )

    documents = depth = 0
    try:
        for event in YAML(typ="safe").parse(text):
            if isinstance(event, AliasEvent):
                yield Finding(_of(event), (), "an alias (`*`) is not allowed; write the value out")
                continue
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    yield Finding(_of(event), (), "a second document (`---`) is not allowed")
                    return
                if event.version or event.tags:
                    yield Finding(_of(event), (), "a directive (`%`) is not allowed")
            depth += isinstance(event, CollectionStartEvent)
            depth -= isinstance(event, CollectionEndEvent)
            if depth > MAX_DEPTH:
                yield Finding(_of(event), (), f"is nested more than {MAX_DEPTH} levels deep")
                return
            if getattr(event, "anchor", None) is not None:
                yield Finding(_of(event), (), "an anchor (`&`) is not allowed; write the value out")
            if getattr(event, "ctag", None) is not None:
                yield Finding(_of(event), (), "a tag (`!`) is not allowed; remove it")
    except YAMLError as error:
        yield _syntax(error)


def _syntax(error: Any) -> Finding:  # noqa: ANN401 - ruamel has no types
    """Say where and why a file is no YAML."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    context = getattr(error, "context", None)
    text = "is no YAML: " + (f"{context}, " if context else "") + what
    if "cannot start any token" in what:
        text += " (a tab? indent with spaces)"
    place = Mark(mark.line + 1, mark.column + 1) if mark else Mark(1, 1)
    return Finding(place, (), console.clean(text))


def _build(name: str, text: str) -> Document:
    """Compose nodes and turn them into plain data, with the place of each."""
    from ruamel.yaml import YAML  # noqa: PLC0415 - 30 ms, not for `fleet --help`

    yaml = YAML(typ="safe")
    node = yaml.compose(text)
    if node is None or not node.value:
        raise _UnreadableError(Finding(Mark(1, 1), (), "is empty; it declares the whole fleet"))
    builder = _Builder(yaml.constructor)
    data = builder.plain(node, ())
    return Document(
        name, data, builder.keys, builder.values, builder.written, tuple(builder.findings)
    )


class _Builder:
    """Plain data from nodes; collects places and findings on the way."""

    def __init__(self, constructor: Any) -> None:  # noqa: ANN401 - ruamel has no types
        self._constructor = constructor
        self.keys: dict[Loc, Mark] = {}
        self.values: dict[Loc, Mark] = {}
        self.written: dict[Loc, str] = {}
        self.findings: list[Finding] = []

    def plain(self, node: Any, loc: Loc) -> Any:  # noqa: ANN401 - any YAML value
        """Return the value of a node and note where it is."""
        self.values[loc] = _of(node)
        self.keys.setdefault(loc, _of(node))
        if node.id == "mapping":
            self.written[loc] = "a mapping" if node.value else "an empty mapping"
            return self._mapping(node, loc)
        if node.id == "sequence":
            self.written[loc] = "a list" if node.value else "an empty list"
            return [self.plain(item, (*loc, i)) for i, item in enumerate(node.value)]
        return self._scalar(node, loc)

    def _mapping(self, node: Any, loc: Loc) -> dict[str, Any]:  # noqa: ANN401 - a ruamel node
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, loc)
            if key is None:
                continue
            inner = (*loc, key)
            if key in data:
                first = self.keys[inner].line
                self._refuse(key_node, inner, f"is a duplicate key; it stands in line {first} too")
                continue
            self.keys[inner] = _of(key_node)
            data[key] = self.plain(value_node, inner)
        return data

    def _key(self, node: Any, loc: Loc) -> str | None:  # noqa: ANN401 - a ruamel node
        """Return a key that is text."""
        if node.id != "scalar":
            self._refuse(node, loc, "a key must be a word, not a list or a mapping")
        elif str(node.tag) in _NOT_PLAIN:
            self._refuse(node, (*loc, node.value), _NOT_PLAIN[str(node.tag)])
        elif str(node.tag) != f"{_TAG}str":
            self._refuse(
                node, (*loc, node.value), "is not text to YAML, as a key must be; put it in quotes"
            )
        else:
            return str(node.value)
        return None

    def _scalar(self, node: Any, loc: Loc) -> str | int | float | bool | None:  # noqa: ANN401 - a ruamel node
        tag = str(node.tag)
        plain = tag == f"{_TAG}str"
        self.written[loc] = quoted(node.value) if plain else _bare(node.value)
        if tag in _NOT_PLAIN:
            self._refuse(node, loc, f"{_bare(node.value)} {_NOT_PLAIN[tag]}")
        elif tag not in _PLAIN:  # pragma: no cover - no other implicit type is left
            self._refuse(node, loc, f"a {tag.removeprefix(_TAG)} is not allowed")
        elif tag in _NUMBERS and len(node.value) > _MAX_NUMBER_CHARACTERS:
            self._refuse(node, loc, f"a number of {len(node.value):,} characters is not allowed")
        else:
            try:
                value: str | int | float | bool | None = self._constructor.construct_object(node)
            except (ValueError, IndexError):
                # Such as `-_`, which the resolver takes for an integer.
                self._refuse(node, loc, f"{_bare(node.value)} is no number; put text in quotes")
            else:
                return value
        return None

    def _refuse(self, node: Any, loc: Loc, text: str) -> None:  # noqa: ANN401 - a ruamel node
        self.findings.append(Finding(_of(node), loc, text))


def _bare(text: str) -> str:
    """Show a value that is no text, as it is written."""
    return quoted(text).strip('"') or "nothing"
