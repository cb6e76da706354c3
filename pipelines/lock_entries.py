"""
Entries of dvc.lock, by the name of their stage: read, put in, taken out; never as text.

Two pull requests that measured two models, or a branch that is behind, differ in lines of dvc.lock
that mean nothing to git. So an entry is replaced as a whole, and the file is written by DVC's own
writer: the next `dvc repro` finds the bytes that it would have written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pipelines.ci_records import MEASURING
from pipelines.errors import FleetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pipelines.params import Declaration

NAME: Final = "dvc.lock"
BY_QUANT: Final = frozenset({"quantize", "benchmark"})
# Those of a model that a pull request does not measure, but that have entries too.
_LATER: Final = ("publish", "track")


def names_of(declared: Declaration, model: str) -> tuple[str, ...]:
    """Return the stages that measure a model, as dvc.lock spells them, in graph order."""
    keys = [key for key, quant in declared.quants.items() if quant.model == model]
    return tuple(
        f"{stage}@{key}" for stage in MEASURING for key in (keys if stage in BY_QUANT else [model])
    )


def undeclared(names: Iterable[str], declared: Declaration) -> tuple[str, ...]:
    """Return the stages whose model or quant is not declared any more."""
    gone = []
    for name in names:
        stage, _, key = name.partition("@")
        known = declared.quants if stage in BY_QUANT else declared.models
        if stage in (*MEASURING, *_LATER) and key not in known:
            gone.append(name)
    return tuple(gone)


def parsed(text: str, name: str = NAME) -> dict[str, Any]:
    """
    Read the entries of a dvc.lock.

    Args:
        text: Of the file; empty if there is none yet.
        name: What it is called in an error.

    Returns:
        By the name of the stage, in the order of the file.

    Raises:
        FleetError: It is not what DVC writes, for example since two branches were merged by text.
    """
    stages = _content(text, name)["stages"]
    assert isinstance(stages, dict), "looked at"
    return stages


def merged(text: str, entries: Mapping[str, Any], *, gone: Iterable[str] = ()) -> str:
    """
    Put entries into a dvc.lock.

    Args:
        text: Of the file; empty if there is none yet.
        entries: By the name of the stage. One that is there keeps its place, others follow in the
            order given.
        gone: Names of entries to take out.

    Returns:
        The text that DVC would write; empty, which means no file, if no entry is left.

    Raises:
        FleetError: `text` is not what DVC writes.
    """
    from dvc.utils.serialize import dumps_yaml  # noqa: PLC0415 - 0.3 s

    content = _content(text, NAME)
    for name in gone:
        content["stages"].pop(name, None)
    content["stages"].update(entries)
    if not content["stages"]:
        return ""
    written: str = dumps_yaml(content)
    return written


def _content(text: str, name: str) -> dict[str, Any]:
    from dvc.utils.serialize import YAMLError, parse_yaml  # noqa: PLC0415 - 0.3 s

    why = "no mapping with `schema` and `stages`"
    try:
        content = parse_yaml(text, name) if text.strip() else {"schema": "2.0", "stages": {}}
        if isinstance(content, dict) and isinstance(content.get("stages"), dict):
            return content
    except (YAMLError, ValueError, RecursionError) as error:
        why = str(error.__cause__ or error).splitlines()[0][:200]
    raise FleetError(
        f"{name} is not what DVC writes: {why}.",
        hint="Two branches were merged by text? `git checkout origin/main -- dvc.lock`, then "
        "`fleet repro` puts back what is missing.",
    )
