"""Rules about workflows and jobs: what starts them, where they run, what they may do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from checks import tables
from checks.files import bare
from checks.policy import rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checks.files import Finding, Job, Repository, Yaml
    from pipelines.marked_yaml import Loc

# GitHub ends a hosted job after 6 h and one of ours after 5 days; nobody waits that long.
_LONGEST_MINUTES: Final = 360
_ACTOR: Final = re.compile(
    r"\bgithub\.(actor|triggering_actor|actor_id|event\.sender|event\.pull_request\.user)\b"
)
_MATRIX_OF: Final = re.compile(r"fromJSON\(needs\.([a-z-]+)\.outputs\.([a-z_-]+)\)", re.IGNORECASE)
# `secrets.NAME`; anything else that names them, as `toJSON(secrets)`, takes all.
_SECRET: Final = re.compile(r"\bsecrets\b(?:\s*\.\s*([A-Za-z0-9_-]+))?")
_EXPRESSION: Final = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)


def _known(repository: Repository) -> Iterator[tuple[Job, tables.Job]]:
    """Yield each job that the tables know; `tables-complete` speaks of the others."""
    for job in repository.jobs():
        workflow = tables.WORKFLOWS.get(job.file.name)
        if workflow is not None and job.name in workflow.jobs:
            yield job, workflow.jobs[job.name]


@rule("tables-complete")
def tables_complete(repository: Repository) -> Iterator[Finding]:
    """A workflow or job that no table knows would be held against nothing."""
    fix = "Describe it in checks/tables.py: rights, runner, environment, secrets, with reasons."
    for name, workflow in repository.workflows.items():
        known = tables.WORKFLOWS.get(name)
        if known is None:
            yield workflow.finding("tables-complete", (), "The tables do not know it.", fix)
            continue
        for job in workflow.jobs:
            if job.name not in known.jobs:
                text = f"The tables do not know the job {job.name}."
                yield workflow.finding("tables-complete", job.loc, text, fix)
        for gone in known.jobs.keys() - {job.name for job in workflow.jobs}:
            text = f"The tables expect a job {gone}, and there is none."
            yield workflow.finding("tables-complete", ("jobs",), text, "Remove it from the tables.")


@rule("trigger-table")
def trigger_table(repository: Repository) -> Iterator[Finding]:
    """What starts a workflow decides whose code runs with which rights."""
    for name, workflow in repository.workflows.items():
        known = tables.WORKFLOWS.get(name)
        actual = _undescribed(workflow.data.get("on"))
        if known is not None and actual != known.on:
            text = f"It starts on {_said(actual)}; the tables say {_said(known.on)}."
            fix = "Put back what the tables say, or change both with the reason."
            yield workflow.finding("trigger-table", ("on",), text, fix)
        if "pull_request_target" in str(actual):
            text = "pull_request_target gives a stranger's text the rights of this repository."
            yield workflow.finding("trigger-table", ("on",), text, "Use pull_request.")


@rule("workflow-run-names-a-workflow")
def workflow_run_names_a_workflow(repository: Repository) -> Iterator[Finding]:
    """A workflow_run that names no workflow never starts, and nothing says so."""
    titles = {str(w.data.get("name")) for w in repository.workflows.values()}
    for workflow in repository.workflows.values():
        on = workflow.data.get("on")
        heard = on.get("workflow_run") if isinstance(on, dict) else None
        for title in (heard or {}).get("workflows", ()):
            if title not in titles:
                loc = ("on", "workflow_run", "workflows")
                text = f"No workflow here is called {title!r}; there are {_said(sorted(titles))}."
                fix = "Write the name: of the workflow, not of its file."
                yield workflow.finding("workflow-run-names-a-workflow", loc, text, fix)


@rule("permissions-exact")
def permissions_exact(repository: Repository) -> Iterator[Finding]:
    """A right that a job does not need is what an attacker takes; a missing one fails at night."""
    for workflow in repository.workflows.values():
        if workflow.data.get("permissions") != {}:
            text = "A workflow has no rights of its own; each job names those it needs."
            fix = "Write `permissions: {}` above the jobs."
            yield workflow.finding("permissions-exact", ("permissions",), text, fix)
    for job, known in _known(repository):
        actual = job.data.get("permissions")
        expected = {right: level for right, (level, _) in known.permissions.items()}
        if actual != expected:
            text = f"Job {job.name} has the rights {_said(actual)}; it needs {_said(expected)}."
            fix = "Put back what the tables say, or change both with the reason."
            yield job.file.finding("permissions-exact", (*job.loc, "permissions"), text, fix)


@rule("id-token-only-in")
def id_token_only_in(repository: Repository) -> Iterator[Finding]:
    """With id-token: write a job can be anybody that trusts this repository."""
    for job in repository.jobs():
        permissions = job.data.get("permissions")
        allowed = job.name in tables.ID_TOKEN_IN.get(job.file.name, ())
        if isinstance(permissions, dict) and "id-token" in permissions and not allowed:
            text = f"Job {job.name} may not have an identity of its own."
            fix = "Only what publishes signs; see ID_TOKEN_IN in checks/tables.py."
            yield job.file.finding("id-token-only-in", (*job.loc, "permissions"), text, fix)


@rule("timeout")
def timeout(repository: Repository) -> Iterator[Finding]:
    """A job that hangs holds a card for six hours, or for five days on a machine of ours."""
    for job in repository.jobs():
        minutes = job.data.get("timeout-minutes")
        bounded = isinstance(minutes, int) and 0 < minutes <= _LONGEST_MINUTES
        if not bounded and minutes not in tables.DECLARED_TIMEOUTS:
            text = f"Job {job.name} has no timeout-minutes between 1 and {_LONGEST_MINUTES}."
            fix = "Say after how many minutes something must be wrong."
            yield job.file.finding("timeout", (*job.loc, "timeout-minutes"), text, fix)


@rule("self-hosted-only-in")
def self_hosted_only_in(repository: Repository) -> Iterator[Finding]:
    """What runs on the operator's own machine is named one by one; all else is GitHub's."""
    for job in repository.jobs():
        known = tables.SELF_HOSTED_IN.get((job.file.name, job.name))
        actual = job.data.get("runs-on")
        if actual != (known or tables.HOSTED):
            text = f"Job {job.name} runs on {_said(actual)}; it should be {known or tables.HOSTED}."
            fix = "Only the jobs of SELF_HOSTED_IN in checks/tables.py leave GitHub's machines."
            yield job.file.finding("self-hosted-only-in", (*job.loc, "runs-on"), text, fix)


@rule("fork-guard")
def fork_guard(repository: Repository) -> Iterator[Finding]:
    """A fork's pull request must reach neither the operator's machine nor a token that writes."""
    for job, known in _known(repository):
        parts = conjuncts(job.condition)
        for guard in known.guards:
            if guard not in parts:
                text = f"Job {job.name} runs without the condition `{guard}`."
                fix = "Join it to the job's if: with && at the outermost level."
                yield job.file.finding("fork-guard", (*job.loc, "if"), text, fix)


@rule("empty-matrix-guard")
def empty_matrix_guard(repository: Repository) -> Iterator[Finding]:
    """A matrix without entries fails the run; the output that says so must be asked first."""
    for job in repository.jobs():
        matrix = str((job.data.get("strategy") or {}).get("matrix", ""))
        for needed, _ in _MATRIX_OF.findall(matrix):
            guard = f"needs.{needed}.outputs.any == 'true'"
            if guard not in conjuncts(job.condition):
                text = f"Job {job.name} takes its matrix from {needed}, which may find nothing."
                fix = f"Join `{guard}` to the job's if: with &&."
                yield job.file.finding("empty-matrix-guard", (*job.loc, "if"), text, fix)


@rule("matrix-legs-independent")
def matrix_legs_independent(repository: Repository) -> Iterator[Finding]:
    """One leg that fails must not cancel what another has been measuring for an hour."""
    for job in repository.jobs():
        strategy = job.data.get("strategy")
        if strategy and strategy.get("fail-fast") is not False:
            text = f"The legs of {job.name} cancel each other."
            loc = (*job.loc, "strategy")
            yield job.file.finding("matrix-legs-independent", loc, text, "Add fail-fast: false.")


@rule("concurrency-group")
def concurrency_group(repository: Repository) -> Iterator[Finding]:
    """Runs that share a group by accident cancel each other; without one, two measure at once."""
    places: list[tuple[Yaml, Loc, Any, Any, str]] = []
    for name, workflow in repository.workflows.items():
        if table := tables.WORKFLOWS.get(name):
            shared = workflow.data.get("concurrency")
            places.append((workflow, (), table.concurrency, shared, "The workflow"))
    for job, known in _known(repository):
        own = job.data.get("concurrency")
        places.append((job.file, job.loc, known.concurrency, own, f"Job {job.name}"))
    for file, loc, expected, actual, what in places:
        if actual != expected:
            text = f"{what} has the concurrency {_said(actual)}; the tables say {_said(expected)}."
            fix = "Put back what the tables say, or change both with the reason."
            yield file.finding("concurrency-group", (*loc, "concurrency"), text, fix)


@rule("environment-of-job")
def environment_of_job(repository: Repository) -> Iterator[Finding]:
    """An environment holds the approval and the secrets; a job without it has neither."""
    for job, known in _known(repository):
        actual = job.data.get("environment")
        if actual != known.environment:
            text = f"Job {job.name} has the environment {_said(actual)}; it should be {_said(known.environment)}."  # noqa: E501 - one sentence
            fix = "Put back what the tables say, or change both with the reason."
            yield job.file.finding("environment-of-job", (*job.loc, "environment"), text, fix)


@rule("needs-exact")
def needs_exact(repository: Repository) -> Iterator[Finding]:
    """A verdict that does not wait for the measurement is green before there is one."""
    for job, known in _known(repository):
        if sorted(job.needs) != sorted(known.needs):
            text = f"Job {job.name} waits for {_said(job.needs)}; it must for {_said(known.needs)}."
            fix = "Put back what the tables say, or change both with the reason."
            yield job.file.finding("needs-exact", (*job.loc, "needs"), text, fix)


@rule("steps-exact")
def steps_exact(repository: Repository) -> Iterator[Finding]:
    """What a job with these rights does is part of why it has them; a step left out is missed."""
    for job, known in _known(repository):
        actual = tuple(step.action or step.run.strip() for step in job.steps)
        if actual != known.steps:
            text = f"Job {job.name} does {_said(actual)}; the tables say {_said(known.steps)}."
            fix = "Put back what the tables say, or change both with the reason."
            yield job.file.finding("steps-exact", (*job.loc, "steps"), text, fix)


@rule("no-container")
def no_container(repository: Repository) -> Iterator[Finding]:
    """An image is a program of others without a pin in the table, and may ask for the machine."""
    for job in repository.jobs():
        for key in job.data.keys() & {"container", "services"}:
            text = f"Job {job.name} has a {key}."
            fix = "Run on the machine itself; what it needs comes by setup."
            yield job.file.finding("no-container", (*job.loc, key), text, fix)


@rule("required-check-name")
def required_check_name(repository: Repository) -> Iterator[Finding]:
    """Branch protection waits for checks by name; one that was renamed stays pending for ever."""
    for job in repository.jobs():
        expected = tables.REQUIRED_CHECKS.get((job.file.name, job.name))
        if expected is not None and job.data.get("name", job.name) != expected:
            text = f"Branch protection asks for a check {expected!r}; this one has another name."
            fix = f"Call the job {expected!r}."
            yield job.file.finding("required-check-name", (*job.loc, "name"), text, fix)


@rule("no-actor-guard")
def no_actor_guard(repository: Repository) -> Iterator[Finding]:
    """Who started a run is not whose code runs: a robot's name is not a right."""
    for workflow in repository.workflows.values():
        for loc, text in workflow.strings("jobs"):
            if loc[-1] == "if" and (found := _ACTOR.search(text)):
                say = f"A condition trusts {found[0]}, which tells who acted and not whose code it is."  # noqa: E501 - one sentence
                fix = "Compare repositories: github.event.pull_request.head.repo.full_name."
                yield workflow.finding("no-actor-guard", loc, say, fix)


@rule("no-secrets-inherit")
def no_secrets_inherit(repository: Repository) -> Iterator[Finding]:
    """A called workflow gets the secrets that it needs by name, never all of them."""
    for job in repository.jobs():
        if job.data.get("secrets") == "inherit":
            text = f"Job {job.name} hands over every secret of the repository."
            fix = "Name those that the called workflow needs."
            yield job.file.finding("no-secrets-inherit", (*job.loc, "secrets"), text, fix)


@rule("secret-only-in")
def secret_only_in(repository: Repository) -> Iterator[Finding]:
    """Each secret is known to the jobs of the table alone, and to no workflow as a whole."""
    allowed = {(job.file.name, job.name): known.secrets for job, known in _known(repository)}
    for workflow in repository.workflows.values():
        for loc, text in workflow.strings():
            job = str(loc[1]) if loc[0] == "jobs" and len(loc) > 1 else ""
            parts = [text] if loc[-1] == "if" else _EXPRESSION.findall(text)
            for match in _SECRET.finditer(" ; ".join(parts)):
                name = match[1] or "all of them"
                if name not in allowed.get((workflow.name, job), ()):
                    say = f"The secret {name} is used by {f'job {job}' if job else 'every job'}, which the tables do not allow."  # noqa: E501 - one sentence
                    fix = "Do without it, or add it to checks/tables.py with the reason."
                    yield workflow.finding("secret-only-in", loc, say, fix)


@rule("no-error-swallowed")
def no_error_swallowed(repository: Repository) -> Iterator[Finding]:
    """What goes on after a failure reports success for what was not done."""
    for job in repository.jobs():
        if job.data.get("continue-on-error"):
            text = f"Job {job.name} goes on after an error."
            loc = (*job.loc, "continue-on-error")
            yield job.file.finding("no-error-swallowed", loc, text, "Remove continue-on-error.")
    for _, step in repository.steps():
        swallowed = step.data.get("continue-on-error") or re.search(r"\|\|\s*(true|:)", step.run)
        if swallowed:
            fix = "Let it fail, and say with if: what runs after a failure."
            text = "A step goes on after an error."
            yield step.file.finding("no-error-swallowed", step.loc, text, fix)


@rule("shell-bash")
def shell_bash(repository: Repository) -> Iterator[Finding]:
    """Without it a failing program in front of a pipe is a success (no pipefail)."""
    for workflow in repository.workflows.values():
        shell = ((workflow.data.get("defaults") or {}).get("run") or {}).get("shell")
        if shell != "bash":
            text = f"The shell of its steps is {_said(shell)}."
            fix = "Write `defaults: {run: {shell: bash}}` above the jobs."
            yield workflow.finding("shell-bash", ("defaults",), text, fix)
    for job, step in repository.steps():
        shell = step.data.get("shell", "bash" if job else None)
        if step.run and shell != "bash":
            text = f"The shell of a step is {_said(shell)}."
            yield step.file.finding("shell-bash", step.loc, text, "Write `shell: bash`.")


def conjuncts(condition: str) -> list[str]:
    """Split a condition at each `&&` outside parentheses and quotes; whole if it has an `||`."""
    parts, depth, quoted, start = [], 0, False, 0
    text = bare(condition)
    for at, letter in enumerate(text):
        quoted ^= letter == "'"
        if quoted:
            continue
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and text[at : at + 2] == "||":
            return [text]
        if depth == 0 and text[at : at + 2] == "&&":
            parts.append(text[start:at].strip())
            start = at + 2
    return [*parts, text[start:].strip()]


def _undescribed(value: Any) -> Any:  # noqa: ANN401 - any YAML value
    """Leave out what only people read."""
    if not isinstance(value, dict):
        return value
    return {key: _undescribed(each) for key, each in value.items() if key != "description"}


def _said(value: Any) -> str:  # noqa: ANN401 - any YAML value
    """Show a value on one line, short."""
    if value is None or value in ((), ""):
        return "nothing"
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 400 else f"{text[:399]}…"  # noqa: PLR2004 - about four lines
