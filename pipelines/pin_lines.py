"""
Writes single values into params.yaml, and not a byte beside them.

The parser says where a value stands; only those characters are exchanged, so that comments, order,
quotes, indentation and line ends stay as the operator wrote them and a review shows one line for
each value. The result is read back before it gets the file's name: it must be the same declaration
but for these values.

    pin_lines.write(at.params, {("models", "tiny-llama", "revision"): "9f3c..."})
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines import atomic, console, declaration, marked_yaml
from pipelines.errors import MachineError, ParamsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# Where a value stands: ("models", "tiny-llama", "revision").
Place = tuple[str, ...]
Value = str | int

_LINE_END = re.compile(r"\r\n|\r|\n")
_QUOTES = frozenset({"'", '"'})
# What a value that is not there yet is written below, if its mapping has it.
_NEIGHBOUR = "revision"
_STRING = "tag:yaml.org,2002:str"
_ABSENT = object()


class _Splice(NamedTuple):
    """Characters of a text that are exchanged."""

    start: int
    end: int
    text: str


def write(path: Path, edits: Mapping[Place, Value]) -> bool:
    """
    Make values those that params.yaml declares.

    Args:
        path: params.yaml.
        edits: Value by its place. One that is not written there yet gets a line of its own, below
            `revision` or else the first plain value of its mapping, which has to be there.

    Returns:
        Whether the file was changed; it is left untouched where it already says all of it.

    Raises:
        ParamsError: The file is wrong, has no such place, or is written in a way in which single
            lines cannot be changed.
        MachineError: Somebody else saved it in the meantime. Nothing was written.
    """
    path = path.resolve()  # a link stays one
    before = path.read_bytes()
    found = values(path, edits)
    missing = {place: value for place, value in edits.items() if found[place] != value}
    if not missing:
        return False
    text = _spliced(path, before.decode(), missing)
    with atomic.replacing(path) as part:
        part.write_bytes(text.encode())
        shutil.copymode(path, part)
        _require_only(path, part, missing)
        if path.read_bytes() != before:
            raise MachineError(
                f"{marked_yaml.shown_name(path)} was saved by somebody else in this very moment; "
                "it was left as it is.",
                hint="Run the same command again.",
            )
    return True


def changed(data: bytes, edits: Mapping[Place, Value]) -> bytes:
    """Return params.yaml of another place with these values. Raises: see `write`."""
    with _as_file(data) as path:
        write(path, edits)
        return path.read_bytes()


@contextmanager
def _as_file(data: bytes) -> Iterator[Path]:
    """Put a declaration of another place into a file, whose name no error shows."""
    with tempfile.TemporaryDirectory(prefix="fleet-params-") as folder:
        path = Path(folder).resolve() / "params.yaml"
        path.write_bytes(data)
        try:
            yield path
        except ParamsError as error:
            error.message = error.message.replace(str(path), path.name)
            error.args = (error.message,)
            raise


def values(source: Path | bytes, places: Iterable[Place]) -> dict[Place, Any]:
    """
    Return what a declaration says at some places, its defaults included.

    Args:
        source: params.yaml, or its bytes.
        places: Where to look.

    Raises:
        ParamsError: The file is wrong, or has no such place; a model that is not declared, say.
    """
    if isinstance(source, bytes):
        with _as_file(source) as path:
            return values(path, places)
    tree = declaration.load(source).model_dump()
    return {place: _value_at(tree, place, source) for place in places}


def _value_at(tree: Any, place: Place, path: Path) -> Any:  # noqa: ANN401 - plain data
    for key in place:
        tree = tree.get(key, _ABSENT) if isinstance(tree, dict) else _ABSENT
    if tree is _ABSENT:
        raise ParamsError(
            f"{marked_yaml.shown_name(path)} has no {console.clean(marked_yaml.spell(place))}.",
            hint="`fleet check` shows what is declared.",
        )
    return tree


# --- characters -------------------------------------------------------------------------------


def _spliced(path: Path, text: str, edits: Mapping[Place, Value]) -> str:
    """Exchange the values; from the end on, so that each finds its place where it was read."""
    from ruamel.yaml.error import YAMLError  # noqa: PLC0415 - not for --help

    try:
        root = _root(text)
    except YAMLError:  # such as a tab before a value, which the C parser takes
        raise _cannot(path, edits) from None
    splices = [_splice(path, text, root, place, value) for place, value in edits.items()]
    for start, end, new in sorted(splices, reverse=True):
        text = f"{text[:start]}{new}{text[end:]}"
    return text


def _splice(path: Path, text: str, root: Any, place: Place, value: Value) -> _Splice:  # noqa: ANN401 - a node of ruamel, which has no types
    """Exchange a value, or add it below its neighbour."""
    mapping = root
    for key in place[:-1]:
        mapping = _child(mapping, key)
        if mapping is None or not isinstance(mapping.value, list):
            raise _cannot(path, {place: value})
    found = _child(mapping, place[-1])
    if found is not None:
        quote = found.style if found.style in _QUOTES else ""
        return _Splice(found.start_mark.index, found.end_mark.index, _written(value, quote))
    neighbour = _child(mapping, _NEIGHBOUR) or next(
        (each for _, each in mapping.value if isinstance(each.value, str)), None
    )
    if neighbour is None:
        raise _cannot(path, {place: value})
    end, line = neighbour.end_mark.index, f"{place[-1]}: {_written(value, '')}"
    if mapping.flow_style:
        return _Splice(end, end, f", {line}")
    indent = " " * mapping.value[0][0].start_mark.column
    line_end = _LINE_END.search(text, end)
    if line_end is None:  # the last line, without an end
        return _Splice(len(text), len(text), f"\n{indent}{line}\n")
    return _Splice(line_end.end(), line_end.end(), f"{indent}{line}{line_end[0]}")


def _written(value: Value, quote: str) -> str:
    """Write a value as YAML; forty digits without a letter are a number unless quoted."""
    if isinstance(value, str) and not quote and _root(value).tag != _STRING:
        quote = '"'
    return f"{quote}{value}{quote}"


def _root(text: str) -> Any:  # noqa: ANN401 - the same
    """Return the tree of a text with the place of each node; its reading was checked before."""
    from ruamel.yaml import YAML  # noqa: PLC0415 - not for --help

    # The C parser counts bytes, this one characters.
    return YAML(typ="safe", pure=True).compose(io.StringIO(text, newline=""))


def _child(node: Any, key: str) -> Any:  # noqa: ANN401 - the same
    """Return the value of a key; None if it is not there."""
    return next((value for name, value in node.value if name.value == key), None)


# --- what came of it --------------------------------------------------------------------------


def _require_only(path: Path, part: Path, edits: Mapping[Place, Value]) -> None:
    """
    Read what would become params.yaml and compare it with what it is.

    Raises:
        ParamsError: Something else changed with it.
    """
    wanted = declaration.load(path).model_dump()
    for (*above, key), value in edits.items():
        mapping = wanted
        for name in above:
            mapping = mapping[name]
        mapping[key] = value
    try:
        same = declaration.load(part).model_dump() == wanted
    except ParamsError:
        same = False
    if not same:
        raise _cannot(path, edits)


def _cannot(path: Path, edits: Mapping[Place, Value]) -> ParamsError:
    names = ", ".join(f"`{marked_yaml.spell(place)}`" for place in edits)
    below = "; ".join(
        f"below {marked_yaml.spell(place[:-1])}:  {place[-1]}: {value}"
        for place, value in edits.items()
    )
    return ParamsError(
        f"{names} cannot be changed without touching the rest of {marked_yaml.shown_name(path)}; "
        "it was left as it is.",
        hint=f"Write it yourself, {below}",
    )
