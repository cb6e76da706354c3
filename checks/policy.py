"""
Rules for workflows and actions that no tool knows, each with a name.

A rule is a function from a repository to findings, registered under the name that a finding shows.
What is right for each single workflow and job stands in `checks.tables`; a rule holds the files
against it, in both directions, so that neither can change alone.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from checks.files import Finding, Repository

    Judge = Callable[[Repository], Iterable[Finding]]

# Where the rules are; importing one registers its rules.
_MODULES: Final = ("rules_jobs", "rules_steps", "rules_actions", "rules_repository")


@dataclass(frozen=True)
class Rule:
    """
    One rule.

    Attributes:
        name: As it is printed and tested.
        why: What goes wrong without it, as a sentence.
        judge: Yields what is wrong.
    """

    name: str
    why: str
    judge: Judge


_RULES: Final[dict[str, Rule]] = {}


def rule(name: str) -> Callable[[Judge], Judge]:
    """Register a function as the rule of that name; its docstring says why there is one."""

    def register(judge: Judge) -> Judge:
        if name in _RULES:
            raise ValueError(f"two rules are called {name}")
        _RULES[name] = Rule(name, " ".join((judge.__doc__ or "").split()), judge)
        return judge

    return register


def rules() -> dict[str, Rule]:
    """Return every rule by its name, sorted."""
    for module in _MODULES:
        importlib.import_module(f"checks.{module}")
    return dict(sorted(_RULES.items()))


def judge(repository: Repository) -> list[Finding]:
    """Return what the rules find in a repository, by file and line."""
    found: list[Finding] = [*repository.broken]
    for each in rules().values():
        found += each.judge(repository)
    return sorted(set(found), key=lambda finding: (finding.file, finding.line, finding.rule))


def names() -> Iterator[str]:
    """Yield the name of every rule."""
    yield from rules()
