"""
What another version of the template wrote, or calls otherwise.

params.yaml needs no version: it is the operator's, and what a later version renames is in a table
here. `fleet check` then names the new key beside the old one, and `fleet template migrate` rewrites
the file, with a diff, and not a byte beside the keys.

Records carry `schema_version`. One of a later version is refused in words: read as what it is not,
it would be a wrong number. One of an earlier version is read as it is for as long as the types can
say what it meant: a field that came later has a default that means "not known". Where that cannot
be, the record is refused, and the next `fleet repro` makes it again; releases and ledgers cannot be
made again, so their version does not change without a reader of the old one.
tests/data/state/ holds what each released version wrote: it stays readable for ever.
"""

from __future__ import annotations

import difflib
import io
import shutil
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pipelines import __version__, atomic, console, strict_json
from pipelines.errors import ParamsError
from pipelines.strict_json import NotJsonError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.layout import Layout
    from pipelines.marked_yaml import Loc

# The one that every record, ledger and release of this version has.
SCHEMA_VERSION: Final = 1


class Renamed(NamedTuple):
    """
    A key of params.yaml that has another name now, in the same mapping.

    Attributes:
        place: Where it was; `*` stands for any key, or any item of a list.
        name: What it is called now.
        since: First version that calls it so.
    """

    place: tuple[str, ...]
    name: str
    since: str


# Never shortened: a fork may come from any version. Oldest first; a key that was renamed twice has
# two lines.
RENAMED: Final[tuple[Renamed, ...]] = ()


# --- records ----------------------------------------------------------------------------------


def refusal(data: bytes) -> str | None:
    """
    Say that something was written by another version of the template, as the end of a sentence.

    Args:
        data: JSON of a record, a release, an alias or a line of a ledger.

    Returns:
        `was written by ...`; None if it is of this version, or says no version that can be read.
    """
    try:
        value = strict_json.parse(data)
    except NotJsonError:
        return None
    written = value.get("schema_version") if isinstance(value, dict) else None
    if not isinstance(written, int) or isinstance(written, bool) or written == SCHEMA_VERSION:
        return None
    when = "a later" if written > SCHEMA_VERSION else "an earlier"
    return (
        f"was written by {when} version of the template: it has schema_version "
        f"{console.clean(str(written))[:20]}, and {__version__} reads {SCHEMA_VERSION}"
    )


def advice(data: bytes, otherwise: str) -> str:
    """Return the next step for what was refused; another one if it is not for its version."""
    told = refusal(data)
    if told is None:
        return otherwise
    if "a later" in told:
        return "Take that version here, too: fleet template update"
    return otherwise


# --- params.yaml ------------------------------------------------------------------------------


def renamed(loc: Loc) -> Renamed | None:
    """Return what is known of a key that this version does not have; None if nothing is."""
    return next((each for each in RENAMED if _is_at(each.place, loc)), None)


def _is_at(place: tuple[str, ...], loc: Loc) -> bool:
    return len(place) == len(loc) and all(
        known in {"*", str(part)} for known, part in zip(place, loc, strict=True)
    )


def rewritten(text: str) -> str:
    """
    Give renamed keys of params.yaml their new names; comments, order and quotes stay.

    A key whose new name is there already is left: which of the two counts, a person has to say.
    """
    for step in RENAMED:
        # A place that an alias names is reached twice.
        splices = sorted(set(_splices(_root(text), step)), reverse=True)
        for start, end in splices:
            text = f"{text[:start]}{step.name}{text[end:]}"
    return text


def _root(text: str) -> Any:  # noqa: ANN401 - a node of ruamel, which has no types
    from ruamel.yaml import YAML  # noqa: PLC0415 - not for --help
    from ruamel.yaml.error import YAMLError  # noqa: PLC0415 - the same

    try:
        # The C parser counts bytes, this one characters.
        return YAML(typ="safe", pure=True).compose(io.StringIO(text, newline=""))
    except YAMLError:  # `fleet check` says what is wrong
        return None


def _splices(node: Any, step: Renamed, depth: int = 0) -> Iterator[tuple[int, int]]:  # noqa: ANN401 - the same
    """Yield where the characters of a key stand in the text."""
    items = getattr(node, "value", None)
    if not isinstance(items, list):
        return
    wanted = step.place[depth]
    is_last = depth == len(step.place) - 1
    for item in items:
        key, value = item if isinstance(item, tuple) else (None, item)
        if wanted not in {"*", getattr(key, "value", "*")}:
            continue
        if not is_last:
            yield from _splices(value, step, depth + 1)
        elif key is not None and step.name not in {other.value for other, _ in items}:
            quote = 1 if key.style in {"'", '"'} else 0
            yield key.start_mark.index + quote, key.end_mark.index - quote


def main(at: Layout, *, dry_run: bool) -> int:
    """
    Do `fleet template migrate`: rewrite params.yaml where this version has other names for keys.

    Args:
        at: The checkout.
        dry_run: Only print the diff.

    Returns:
        0.

    Raises:
        ParamsError: There is no params.yaml, or it is no text.
    """
    path = at.params.resolve()  # a link stays one
    try:
        before = path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise ParamsError(f"params.yaml cannot be read: {error}.", hint="fleet check") from error
    after = rewritten(before)
    if after == before:
        console.info("params.yaml: no key in it has another name by now")
        return 0
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), "a/params.yaml", "b/params.yaml", lineterm=""
    )
    console.out("\n".join(console.clean(line) for line in lines))
    if dry_run:
        console.info("  next: fleet template migrate")
        return 0
    with atomic.replacing(path) as part:
        part.write_bytes(after.encode())
        shutil.copymode(path, part)
    console.info("params.yaml was rewritten. Next: fleet check; git commit params.yaml")
    return 0
