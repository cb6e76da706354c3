"""Rules about composite actions: described, flat, and joined to the verbs and to their callers."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, Final

from checks import tables
from checks.policy import rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checks.files import Finding, Repository, Yaml

_INPUT: Final = re.compile(r"\binputs\s*\.\s*([A-Za-z0-9_-]+)|\binputs\s*\[\s*'([^']*)'\s*\]")
_OUTPUT: Final = re.compile(r"\$\{\{\s*steps\.([A-Za-z0-9_-]+)\.outputs\.([A-Za-z0-9_-]+)\s*\}\}")
# `exec`: on a cancel the runner signals one process, which has to be the verb, not a shell.
_LINE: Final = re.compile(r'exec "\$GITHUB_ACTION_PATH/\.\./fleet" ([a-z-]+)\b[^;&|<>`]*')


@rule("described")
def described(repository: Repository) -> Iterator[Finding]:
    """Who reads an action's page, or a run's, has nothing else to go by."""
    for action in repository.actions.values():
        for loc in [("name",), ("description",), *_members(action, "inputs", "outputs")]:
            if not str(_at(action, loc) or "").strip():
                text = f"{'.'.join(loc)} is missing."
                yield action.finding("described", loc, text, "Say it in one sentence.")
    for workflow in repository.workflows.values():
        for loc in [("name",), *(("jobs", job.name, "name") for job in workflow.jobs)]:
            if not str(_at(workflow, loc) or "").strip():
                text = f"{'.'.join(loc)} is missing."
                yield workflow.finding("described", loc, text, "Name it as a person would.")


@rule("one-run-line")
def one_run_line(repository: Repository) -> Iterator[Finding]:
    """Logic in YAML is tested by nobody; a person must be able to type what CI types."""
    for action in repository.actions.values():
        runs = [step for step in action.runs if step.run]
        if len(runs) != 1:
            text = f"It has {len(runs)} steps that run something."
            fix = "An action is one line that types a verb."
            yield action.finding("one-run-line", ("runs", "steps"), text, fix)
        for step in runs:
            line = step.run.strip()
            if not _LINE.fullmatch(line):
                text = "Its line is not one call of a fleet verb."
                fix = 'Write `exec "$GITHUB_ACTION_PATH/../fleet" VERB …`, with values from env:.'
                yield action.finding("one-run-line", (*step.loc, "run"), text, fix)
    for job in repository.jobs():
        for step in job.steps:
            if "\n" in step.run.strip():
                text = f"A step of {job.name} runs more than one line."
                fix = "Move what it does into a verb, an action or a make target."
                yield job.file.finding("one-run-line", (*step.loc, "run"), text, fix)


@rule("setup-first")
def setup_first(repository: Repository) -> Iterator[Finding]:
    """An action of this repository lies in the checkout and runs in what setup made."""
    for job in repository.jobs():
        uses = [step.local or step.action for step in job.steps]
        local = [step for step in job.steps if step.local]
        if not local:
            continue
        begun = uses[: uses.index(local[0].local)]
        if local[0].local != "setup" or "actions/checkout" not in begun:
            text = f"Job {job.name} uses actions/{local[0].local} before checkout and setup."
            fix = "Begin with actions/checkout, then ./actions/setup."
            yield job.file.finding("setup-first", (*local[0].loc, "uses"), text, fix)


@rule("verb-exists")
def verb_exists(repository: Repository) -> Iterator[Finding]:
    """An action that types a verb that is gone fails on the operator's machine, not here."""
    for action in repository.actions.values():
        for step in action.runs:
            match = _LINE.fullmatch(step.run.strip())
            if match and match[1] not in {*_verbs(), tables.BOOTSTRAP}:
                text = f"There is no verb {match[1]}."
                fix = "fleet --help lists the verbs."
                yield action.finding("verb-exists", (*step.loc, "run"), text, fix)


@rule("composite-input-exists")
def composite_input_exists(repository: Repository) -> Iterator[Finding]:
    """An input that is spelled otherwise than it is declared is empty, and nothing says so."""
    for action in repository.actions.values():
        declared = set(action.data.get("inputs") or {})
        used = set()
        for loc, text in [*action.strings("runs"), *action.strings("outputs")]:
            for match in _INPUT.finditer(text):
                name = match[1] or match[2]
                used.add(name)
                if name not in declared:
                    say = f"It has no input {name}; it has {', '.join(sorted(declared)) or 'none'}."
                    fix = "Declare it, or spell it as it is declared."
                    yield action.finding("composite-input-exists", loc, say, fix)
        for name in declared - used:
            text = f"Its input {name} does nothing."
            yield action.finding("composite-input-exists", ("inputs", name), text, "Remove it.")


@rule("call-matches-action")
def call_matches_action(repository: Repository) -> Iterator[Finding]:
    """GitHub warns of an unknown input and goes on; a missing one is empty."""
    pins = repository.pins.data if repository.pins else {}
    for _, step in repository.steps():
        if step.local:
            action = repository.actions.get(step.local)
            if action is None:
                text = f"There is no actions/{step.local}/action.yml."
                yield step.file.finding("call-matches-action", (*step.loc, "uses"), text)
                continue
            inputs = action.data.get("inputs") or {}
            known = set(inputs)
            required = {n for n, i in inputs.items() if i.get("required") and "default" not in i}
        elif step.action in pins:
            pin = pins[step.action]
            known, required = set(pin["inputs"]), set(pin["required"])
        else:
            continue
        for name in step.given.keys() - known:
            text = f"{step.action} has no input {name}."
            fix = "Spell it as its action.yml does."
            yield step.file.finding("call-matches-action", (*step.loc, "with", name), text, fix)
        for name in required - step.given.keys():
            text = f"{step.action} needs its input {name}."
            yield step.file.finding("call-matches-action", step.loc, text, "Hand it over.")


@rule("composite-output-mapping")
def composite_output_mapping(repository: Repository) -> Iterator[Finding]:
    """An output that maps to no step, or to another name, is empty for every caller."""
    for action in repository.actions.values():
        ids = {step.data.get("id") for step in action.runs}
        for name, output in (action.data.get("outputs") or {}).items():
            match = _OUTPUT.fullmatch(str((output or {}).get("value", "")).strip())
            if match is None or match[1] not in ids or match[2] != name:
                text = f"Its output {name} is not the output {name} of one of its steps."
                fix = f"Write `value: ${{{{ steps.ID.outputs.{name} }}}}` with the id of a step."
                yield action.finding("composite-output-mapping", ("outputs", name), text, fix)


def _members(file: Yaml, *sections: str) -> Iterator[tuple[str, str, str]]:
    for section in sections:
        for name in file.data.get(section) or {}:
            yield section, name, "description"


def _at(file: Yaml, loc: tuple[str, ...]) -> Any:  # noqa: ANN401 - any YAML value
    value: Any = file.data
    for part in loc:
        value = value.get(part) if isinstance(value, dict) else None
    return value


@functools.cache
def _verbs() -> frozenset[str]:
    """Verbs of the command line, from its own parser."""
    from pipelines.__main__ import parser  # noqa: PLC0415 - what `fleet --help` prints

    actions = parser()._subparsers._group_actions  # type: ignore[union-attr]  # noqa: SLF001
    return frozenset(actions[0].choices)  # type: ignore[arg-type]
