"""
Writes `stable:` of one model into params.yaml, and not a byte beside it.

The parser says where the value stands; only those characters are exchanged, so that comments,
order, quotes, indentation and line ends stay as the operator wrote them and a review shows one
line. The result is read back before it gets the file's name: it must be the same declaration but
for this value.
"""

from __future__ import annotations

import io
import re
import shutil
from typing import TYPE_CHECKING, Any

from pipelines import atomic, declaration, marked_yaml
from pipelines.errors import MachineError, ParamsError

if TYPE_CHECKING:
    from pathlib import Path

_LINE_END = re.compile(r"\r\n|\r|\n")


def write(path: Path, model: str, value: str) -> bool:
    """
    Make `value` the release that params.yaml wants for a model.

    Args:
        path: params.yaml.
        model: Key of a declared model.
        value: `latest` or a release id.

    Returns:
        Whether the file was changed; it is left untouched where it already says so.

    Raises:
        ParamsError: The file is wrong, or is written in a way in which one line cannot be changed.
        MachineError: Somebody else saved it in the meantime. Nothing was written.
    """
    path = path.resolve()  # a link stays one
    before = path.read_bytes()
    declared = declaration.load(path)
    if declared.models[model].stable == value:
        return False
    text = _spliced(before.decode(), model, value)
    with atomic.replacing(path) as part:
        part.write_bytes(text.encode())
        shutil.copymode(path, part)
        _require_one_change(path, part, model, value)
        if path.read_bytes() != before:
            raise MachineError(
                f"{marked_yaml.shown_name(path)} was saved by somebody else in this very moment; "
                "it was left as it is.",
                hint="Run the same command again.",
            )
    return True


def _spliced(text: str, model: str, value: str) -> str:
    """Exchange the value of `stable`, or add it below `revision`, which every model has."""
    spec = _child(_child(_root(text), "models"), model)
    found = _child(spec, "stable")
    if found is not None:
        quote = found.style if found.style in {"'", '"'} else ""
        start, end = found.start_mark.index, found.end_mark.index
        return f"{text[:start]}{quote}{value}{quote}{text[end:]}"
    end = _child(spec, "revision").end_mark.index
    if spec.flow_style:
        return f"{text[:end]}, stable: {value}{text[end:]}"
    indent = " " * spec.value[0][0].start_mark.column
    line_end = _LINE_END.search(text, end)
    if line_end is None:  # the last line, without an end
        return f"{text}\n{indent}stable: {value}\n"
    place = line_end.end()
    return f"{text[:place]}{indent}stable: {value}{line_end[0]}{text[place:]}"


def _root(text: str) -> Any:  # noqa: ANN401 - a node of ruamel, which has no types
    """Return the tree of the file with the place of each node; its reading was checked before."""
    from ruamel.yaml import YAML  # noqa: PLC0415 - not for --help

    # The C parser counts bytes, this one characters.
    return YAML(typ="safe", pure=True).compose(io.StringIO(text, newline=""))


def _child(node: Any, key: str) -> Any:  # noqa: ANN401 - the same
    """Return the value of a key; None if it is not there."""
    return next((value for name, value in node.value if name.value == key), None)


def _require_one_change(path: Path, part: Path, model: str, value: str) -> None:
    """
    Read what would become params.yaml and compare it with what it is.

    Raises:
        ParamsError: Something else changed with it.
    """
    wanted = declaration.load(path).model_dump()
    wanted["models"][model]["stable"] = value
    try:
        same = declaration.load(part).model_dump() == wanted
    except ParamsError:
        same = False
    if not same:
        raise ParamsError(
            f"`stable` of {model} cannot be changed without touching the rest of "
            f"{marked_yaml.shown_name(path)}; it was left as it is.",
            hint=f"Write it yourself, below models.{model}:  stable: {value}",
        )
