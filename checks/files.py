"""
Workflows, actions and what stands beside them, as plain data in which every value knows its line.

Read by the parser that reads params.yaml: no anchors, no merge keys, no tags, so that a rule sees
what GitHub sees.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from pipelines import console, marked_yaml
from pipelines.errors import ParamsError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pipelines.marked_yaml import Document, Loc

_LOCAL: Final = re.compile(r"\./actions/([a-z0-9-]+)")


@dataclass(frozen=True)
class Finding:
    """
    One thing that is wrong.

    Attributes:
        file: Path below the root of the repository.
        line: Line in it, from 1.
        rule: Name of the rule, or of the program, that says so.
        text: What is wrong, as a sentence.
        fix: What to do, as a sentence; empty where the text says it.
        column: Column in that line, from 1, where it is known.
    """

    file: str
    line: int
    rule: str
    text: str
    fix: str = ""
    column: int = 1

    @property
    def problem(self) -> Problem:
        """The same as every other part of the fleet tells what is wrong in a file."""
        text = self.text if self.text.endswith((".", ")", "?", "!")) else f"{self.text}."
        then = f" Next: {self.fix}" if self.fix else ""
        said = console.clean(f"[{self.rule}] {text}{then}")
        return Problem(self.file, self.line, self.column, said)

    def __str__(self) -> str:
        """Render as compilers do, so that editors can jump to it."""
        return str(self.problem)


@dataclass(frozen=True)
class Step:
    """One step of a job or of a composite action."""

    file: Yaml
    loc: Loc
    data: Mapping[str, Any]

    @property
    def uses(self) -> str:
        """What action it uses; empty for a step that runs a program."""
        return str(self.data.get("uses", ""))

    @property
    def action(self) -> str:
        """Name of the action without its version: `actions/checkout`."""
        return self.uses.split("@")[0]

    @property
    def run(self) -> str:
        """What it runs; empty for a step that uses an action."""
        return str(self.data.get("run", ""))

    @property
    def given(self) -> Mapping[str, Any]:
        """Its inputs, as written."""
        return self.data.get("with") or {}

    @property
    def local(self) -> str:
        """Name of the folder below `actions/` that it uses; empty for any other step."""
        match = _LOCAL.fullmatch(self.uses)
        return match[1] if match else ""


@dataclass(frozen=True)
class Job:
    """One job of a workflow."""

    file: Yaml
    name: str
    data: Mapping[str, Any]

    @property
    def loc(self) -> Loc:
        """Path to it in its file."""
        return ("jobs", self.name)

    @property
    def steps(self) -> list[Step]:
        """Its steps, in order."""
        return _steps(self.file, (*self.loc, "steps"), self.data.get("steps"))

    @property
    def condition(self) -> str:
        """Its `if:` without the braces and on one line; empty if it has none."""
        return bare(self.data.get("if", ""))

    @property
    def needs(self) -> tuple[str, ...]:
        """Jobs that it waits for."""
        needs = self.data.get("needs") or ()
        return (needs,) if isinstance(needs, str) else tuple(needs)


@dataclass(frozen=True)
class Yaml:
    """One file: `path` is below the root, with forward slashes."""

    path: str
    document: Document

    @cached_property
    def data(self) -> Mapping[str, Any]:
        """What it says; empty if that is no mapping."""
        data = self.document.data
        return data if isinstance(data, dict) else {}

    @property
    def name(self) -> str:
        """Name of the workflow's file, or of the action's folder."""
        parts = self.path.split("/")
        return parts[-2] if parts[-1] == "action.yml" else parts[-1].rsplit(".", 1)[0]

    @property
    def jobs(self) -> list[Job]:
        """Jobs of a workflow."""
        return [Job(self, name, data or {}) for name, data in (self.data.get("jobs") or {}).items()]

    @property
    def runs(self) -> list[Step]:
        """Return the steps of a composite action."""
        return _steps(self, ("runs", "steps"), (self.data.get("runs") or {}).get("steps"))

    def line(self, *loc: str | int) -> int:
        """Line of a key; of the nearest around it if it is not there."""
        return self.document.key_at(loc).line

    def strings(self, *loc: str | int) -> Iterator[tuple[Loc, str]]:
        """Yield every text below a place, with its own place."""
        value: Any = self.data
        for part in loc:
            if not isinstance(value, (dict, list)):
                return
            value = value.get(part) if isinstance(value, dict) else value[int(part)]
        yield from _strings(loc, value)

    def finding(self, rule: str, loc: Loc, text: str, fix: str = "") -> Finding:
        """Say what is wrong at a place of this file."""
        return Finding(self.path, self.line(*loc), rule, text, fix)


@dataclass
class Repository:
    """
    What the rules look at.

    Attributes:
        root: The checkout.
        workflows: By the name of the file without `.yml`.
        actions: By the name of the folder below `actions/`.
        pins: Actions of others that may be used: .github/pins.yaml.
        broken: Files that are no YAML, or use what is not allowed in one.
    """

    root: Path
    workflows: dict[str, Yaml] = field(default_factory=dict)
    actions: dict[str, Yaml] = field(default_factory=dict)
    pins: Yaml | None = None
    broken: list[Finding] = field(default_factory=list)

    def steps(self) -> Iterator[tuple[Job | None, Step]]:
        """Yield every step, of jobs and of composite actions, with its job."""
        for workflow in self.workflows.values():
            for job in workflow.jobs:
                yield from ((job, step) for step in job.steps)
        for action in self.actions.values():
            yield from ((None, step) for step in action.runs)

    def jobs(self) -> Iterator[Job]:
        """Yield every job of every workflow."""
        for workflow in self.workflows.values():
            yield from workflow.jobs

    def text(self, path: str) -> str:
        """Return a text file of the checkout; empty if it is not there."""
        file = self.root / path
        return file.read_text(encoding="utf-8") if file.is_file() else ""


def read(root: Path) -> Repository:
    """Read the workflows and actions of a checkout; what cannot be read is in `broken`."""
    found = Repository(root)
    for path in sorted((root / ".github/workflows").glob("*.y*ml")):
        if file := _read(found, path):
            found.workflows[file.name] = file
    for path in sorted((root / "actions").glob("*/action.y*ml")):
        if file := _read(found, path):
            found.actions[file.name] = file
    found.pins = _read(found, root / ".github/pins.yaml")
    return found


def _read(found: Repository, path: Path) -> Yaml | None:
    name = path.relative_to(found.root).as_posix()
    try:
        document = _parsed(path)
    except ParamsError as error:
        problems = [(problem.line, problem.text) for problem in error.problems]
    else:
        if not document.findings:
            return Yaml(name, document)
        problems = [
            (f.mark.line, f"{marked_yaml.spell(f.loc)}: {f.text}") for f in document.findings
        ]
    fix = "Correct the place that is named."
    found.broken += [Finding(name, line, "plain-yaml", text, fix) for line, text in problems]
    return None


# Tests read a hundred copies that differ in one file.
_PARSED: Final[dict[bytes, Document]] = {}


def _parsed(path: Path) -> Document:
    """Parse a file, unless one with the same text was."""
    text = path.read_bytes() if path.is_file() and not path.is_symlink() else None
    if text is None:
        return marked_yaml.read(path)
    if text not in _PARSED:
        _PARSED[text] = marked_yaml.read(path)
    return _PARSED[text]


def bare(condition: object) -> str:
    """Return an expression without `${{ }}` around it, on one line."""
    text = " ".join(str(condition).split())
    whole = re.fullmatch(r"\$\{\{(.*)\}\}", text)
    return whole[1].strip() if whole and "${{" not in whole[1] else text


def _steps(file: Yaml, loc: Loc, steps: object) -> list[Step]:
    if not isinstance(steps, list):
        return []
    return [Step(file, (*loc, i), step) for i, step in enumerate(steps) if isinstance(step, dict)]


def _strings(loc: Loc, value: object) -> Iterator[tuple[Loc, str]]:
    if isinstance(value, str):
        yield loc, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings((*loc, key), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _strings((*loc, index), inner)
