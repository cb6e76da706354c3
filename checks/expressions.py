"""
Expressions that decide something: whether a job or step runs, where, how often, beside what.

Each is named by its file and place, such as `model-pr jobs.gpu.if`, so that a table of expected
values can be held against all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from checks.files import bare
from pipelines.marked_yaml import spell

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checks.files import Repository, Yaml
    from pipelines.marked_yaml import Loc

_EXPRESSION: Final = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
# Keys whose values decide, wherever they stand; `with` and `env` only carry.
_DECIDING: Final = frozenset(
    {"if", "runs-on", "strategy", "concurrency", "timeout-minutes", "environment", "container",
     "continue-on-error", "max-parallel"}
)  # fmt: skip


@dataclass(frozen=True)
class Expression:
    """
    One expression.

    Attributes:
        name: File and place: `model-pr jobs.gpu.if`.
        text: What GitHub evaluates, without braces; text around braces is put into `format`.
        condition: It is an `if:`.
        file: Path of its file below the root.
        line: Line of its key.
    """

    name: str
    text: str
    condition: bool
    file: str
    line: int


def deciding(repository: Repository) -> Iterator[Expression]:
    """Yield each expression that decides something, and each that reads JSON, wherever it is."""
    for file in [*repository.workflows.values(), *repository.actions.values()]:
        for loc, text in file.strings():
            condition = loc[-1] == "if"
            expression = condition or "${{" in text
            carried = {"with", "env"} & set(loc)
            decides = _DECIDING & set(loc) and not carried
            if expression and (decides or "fromjson" in text.lower()):
                yield Expression(
                    name=f"{file.name} {spell(_named(file, loc))}",
                    text=bare(text) if condition else _whole(text),
                    condition=condition,
                    file=file.path,
                    line=file.line(*loc),
                )


def _whole(text: str) -> str:
    """Return one expression for text with expressions in it, as GitHub makes it."""
    found = list(_EXPRESSION.finditer(text))
    if len(found) == 1 and found[0].span() == (0, len(text)):
        return found[0][1].strip()
    pattern, end = "", 0
    for number, match in enumerate(found):
        pattern += _escaped(text[end : match.start()]) + f"{{{number}}}"
        end = match.end()
    pattern += _escaped(text[end:])
    return f"format('{pattern}', {', '.join(match[1].strip() for match in found)})"


def _escaped(text: str) -> str:
    return text.replace("'", "''").replace("{", "{{").replace("}", "}}")


def _named(file: Yaml, loc: Loc) -> Loc:
    """Name steps by their id or name instead of by their number, which every new step changes."""
    parts: list[str | int] = []
    value: object = file.data
    for part in loc:
        value = value[part] if isinstance(value, (dict, list)) else None  # type: ignore[index]
        title = isinstance(part, int) and isinstance(value, dict) and (
            value.get("id") or value.get("name"))  # fmt: skip
        parts.append(str(title) if title else part)
    return tuple(parts)
