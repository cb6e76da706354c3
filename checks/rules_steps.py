"""Rules about steps: which actions they use, how they take the repository, what they type."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from checks import tables
from checks.policy import rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checks.files import Finding, Repository, Step

_PINNED: Final = re.compile(r"([\w.-]+/[\w./-]+)@([0-9a-f]{40})")
_CHECKOUT: Final = "actions/checkout"
_APP_TOKEN: Final = "actions/create-github-app-token"  # noqa: S105 - the name of an action
_UPLOAD: Final = "actions/upload-artifact"
_DOWNLOAD: Final = "actions/download-artifact"
_RUNNER_FILES: Final = re.compile(r"GITHUB_(ENV|PATH|OUTPUT|STEP_SUMMARY|STATE)\b")


@rule("pin-listed")
def pin_listed(repository: Repository) -> Iterator[Finding]:
    """A tag can be moved to other code; a commit that nobody looked at is no better."""
    pins = repository.pins.data if repository.pins else {}
    for _, step in repository.steps():
        if not step.uses or step.uses.startswith("./"):
            continue
        match = _PINNED.fullmatch(step.uses)
        pin = pins.get(match[1]) if match else None
        if match is None:
            text = f"{step.uses} is not pinned by the 40 characters of a commit."
        elif pin is None:
            text = f"{match[1]} is not in .github/pins.yaml."
        elif match[2] != pin["sha"]:
            text = f"{match[1]} is pinned at {match[2][:12]}; .github/pins.yaml says {pin['sha'][:12]}."  # noqa: E501 - one sentence
        elif not _comment(repository, step).startswith(pin["version"]):
            text = f"{match[1]} does not name the version {pin['version']} in a comment."
        else:
            continue
        fix = "Look at the difference, then write the same commit and version in both places."
        yield step.file.finding("pin-listed", (*step.loc, "uses"), text, fix)
    for job in repository.jobs():
        uses = str(job.data.get("uses", ""))
        if uses and not uses.startswith("./"):
            text = f"Job {job.name} calls a workflow of another repository: {uses}."
            fix = "Keep workflows in this repository."
            yield job.file.finding("pin-listed", (*job.loc, "uses"), text, fix)


@rule("pin-used")
def pin_used(repository: Repository) -> Iterator[Finding]:
    """What is allowed and used nowhere is a hole for later."""
    used = {step.action for _, step in repository.steps()}
    if repository.pins is not None and repository.workflows:
        for name in repository.pins.data.keys() - used:
            text = f"Nothing uses {name}."
            yield repository.pins.finding("pin-used", (name,), text, "Remove it.")


@rule("persist-credentials")
def persist_credentials(repository: Repository) -> Iterator[Finding]:
    """Checkout leaves the job's token in .git/config, where every later step finds it."""
    for step in _checkouts(repository):
        if step.given.get("persist-credentials") is not False:
            text = "A checkout leaves its token in .git/config."
            fix = "Add `persist-credentials: false`."
            yield step.file.finding("persist-credentials", (*step.loc, "with"), text, fix)


@rule("no-unsafe-pr-checkout")
def no_unsafe_pr_checkout(repository: Repository) -> Iterator[Finding]:
    """It would run a fork's code where this repository's secrets are."""
    for step in _checkouts(repository):
        if "allow-unsafe-pr-checkout" in step.given:
            text = "A checkout takes a fork's code in spite of its own refusal."
            fix = "Remove allow-unsafe-pr-checkout."
            yield step.file.finding("no-unsafe-pr-checkout", (*step.loc, "with"), text, fix)


@rule("workflow-run-no-ref-checkout")
def workflow_run_no_ref_checkout(repository: Repository) -> Iterator[Finding]:
    """A workflow_run has rights that write: it runs the code of the default branch alone."""
    for workflow in repository.workflows.values():
        on = workflow.data.get("on")
        if not isinstance(on, dict) or "workflow_run" not in on:
            continue
        for step in (step for job in workflow.jobs for step in job.steps):
            if step.action == _CHECKOUT and {"ref", "repository"} & step.given.keys():
                text = "A workflow that a pull request's run starts takes other code than main's."
                fix = "Remove ref: and repository:."
                yield workflow.finding(
                    "workflow-run-no-ref-checkout", (*step.loc, "with"), text, fix
                )


@rule("checkout-ref")
def checkout_ref(repository: Repository) -> Iterator[Finding]:
    """Which commit is taken decides what is measured; it is named once, in the table."""
    for job, step in repository.steps():
        if step.action != _CHECKOUT or job is None:
            continue
        place = (job.file.name, job.name)
        expected = tables.CHECKOUT_REFS.get(place)
        actual = step.given.get("ref")
        if actual != expected or "repository" in step.given:
            text = f"Job {job.name} takes {actual or 'the commit of the event'}; the tables say {expected or 'the commit of the event'}."  # noqa: E501 - one sentence
            fix = "Put back what the tables say, or change both with the reason."
            yield job.file.finding("checkout-ref", (*step.loc, "with"), text, fix)


@rule("no-expression-in-run")
def no_expression_in_run(repository: Repository) -> Iterator[Finding]:
    """GitHub pastes the value into the script before the shell sees it: a title becomes code."""
    for _, step in repository.steps():
        places = [(key, step.data.get(key, "")) for key in ("run", "shell", "working-directory")]
        places += [("with", step.given.get("script", ""))]
        for key, text in places:
            if "${{" in str(text):
                say = f"An expression stands in {key}: of a step."
                fix = 'Hand it over in env: and write "$NAME" in the script.'
                yield step.file.finding("no-expression-in-run", (*step.loc, key), say, fix)


@rule("runner-files-by-python")
def runner_files_by_python(repository: Repository) -> Iterator[Finding]:
    """A line end in a value written by a shell becomes an output, or a variable, of its own."""
    for _, step in repository.steps():
        if match := _RUNNER_FILES.search(step.run):
            text = f"A step writes to {match[0]} by itself."
            fix = "Let a fleet verb do it: pipelines/runner.py."
            yield step.file.finding("runner-files-by-python", (*step.loc, "run"), text, fix)


@rule("token-scope")
def token_scope(repository: Repository) -> Iterator[Finding]:
    """A token of the App has the rights that it is asked for; unasked, it has all of the App's."""
    for job, step in repository.steps():
        if step.action != _APP_TOKEN:
            continue
        place = (job.file.name, job.name) if job else ("", "")
        expected = {f"permission-{right}": level
                    for right, level in tables.APP_TOKENS.get(place, {}).items()}  # fmt: skip
        actual = {key: value for key, value in step.given.items() if key.startswith("permission-")}
        if not expected or actual != expected:
            text = f"The token has {actual or 'every right of the App'}; the tables say {expected or 'there is none here'}."  # noqa: E501 - one sentence
        elif {"owner", "repositories"} & step.given.keys():
            text = "The token reaches other repositories."
        elif "skip-token-revoke" in step.given:
            text = "The token outlives its job."
        else:
            continue
        fix = "Put back what the tables say, or change both with the reason."
        yield step.file.finding("token-scope", (*step.loc, "with"), text, fix)


@rule("no-cache-in-publish")
def no_cache_in_publish(repository: Repository) -> Iterator[Finding]:
    """A cache that a pull request can write to must not reach what publishes, nor a GPU host."""
    for name, workflow in repository.workflows.items():
        known = tables.WORKFLOWS.get(name)
        actual = workflow.data.get("cache-mode")
        if known is not None and actual != known.cache_mode:
            text = f"cache-mode is {actual}; the tables say {known.cache_mode}."
            fix = "Put back what the tables say, or change both with the reason."
            yield workflow.finding("no-cache-in-publish", ("cache-mode",), text, fix)
    for _, step in repository.steps():
        caches = step.action.startswith("actions/cache") or any(
            key in step.given and step.given[key] not in (False, "false", "")
            for key in ("cache", "enable-cache")
        )
        if caches:
            text = "A step takes files from the cache."
            fix = "Nothing here needs it: .venv is rebuilt, artifacts come by digest."
            yield step.file.finding("no-cache-in-publish", step.loc, text, fix)


@rule("artifact-bounded")
def artifact_bounded(repository: Repository) -> Iterator[Finding]:
    """Artifacts are the only thing that crosses from measuring to judging: few, small, named."""
    for _, step in repository.steps():
        given, fix = step.given, "Artifacts are plan, bundle-…, gate: reports, never models."
        if step.action == _UPLOAD:
            if given.get("if-no-files-found") != "error":
                text = "An artifact that is not there is no error."
                yield step.file.finding("artifact-bounded", step.loc, text,
                                        "Add `if-no-files-found: error`.")  # fmt: skip
            if not isinstance(given.get("retention-days"), int):
                text = "An artifact is kept as long as the repository's settings say."
                yield step.file.finding("artifact-bounded", step.loc, text,
                                        "Add retention-days.")  # fmt: skip
        if step.action in {_UPLOAD, _DOWNLOAD}:
            name = str(given.get("name", given.get("pattern", "")))
            path = next((p for n, p in tables.ARTIFACTS.items() if re.fullmatch(n, name)), None)
            if path is None:
                text = f"The artifact {name!r} is not one of those that jobs hand over."
                yield step.file.finding("artifact-bounded", (*step.loc, "with"), text, fix)
            elif step.action == _UPLOAD and given.get("path") != path:
                text = f"The artifact {name!r} holds {given.get('path')}; it is made of {path}."
                yield step.file.finding("artifact-bounded", (*step.loc, "with"), text, fix)
        if step.action == _DOWNLOAD and {"github-token", "run-id", "repository"} & given.keys():
            text = "An artifact of another run is taken as if it were this one's."
            fix = "Use fleet comment, which takes artifacts of strangers as hostile."
            yield step.file.finding("artifact-bounded", (*step.loc, "with"), text, fix)


def _checkouts(repository: Repository) -> Iterator[Step]:
    return (step for _, step in repository.steps() if step.action == _CHECKOUT)


def _comment(repository: Repository, step: Step) -> str:
    """Return the comment behind a `uses:`; parsers drop it, so it is read from the file's text."""
    lines = repository.text(step.file.path).splitlines()
    line = step.file.line(*step.loc, "uses")
    return lines[line - 1].partition(" # ")[2].strip() if line <= len(lines) else ""
