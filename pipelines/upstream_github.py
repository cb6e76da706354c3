"""
A look at upstream in a workflow: where the last one is, and which jobs have something to do.

The record of a look is an artifact of its run. The next look takes it from there, so that what was
described once costs one request, and so that another repository under the name of the first is
noticed. Whoever could forge it could hide that: it counts only from a run of this very workflow, of
this repository, on its default branch.

Sources: docs.github.com, "REST API endpoints for workflow runs" and "... for GitHub Actions
artifacts".
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pydantic import ValidationError

from pipelines import check_upstream, console, mainline, records, runner
from pipelines.errors import ParamsError
from pipelines.github import artifacts
from pipelines.github.client import GitHub, taken
from pipelines.github.errors import GitHubError
from pipelines.upstream_records import UpstreamRecord

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipelines.layout import Layout

WORKFLOW: Final = "check-upstream.yml"
ARTIFACT: Final = "upstream"
MEMBER: Final = "upstream.json"
# Of the branches that carry a proposal.
BRANCHES: Final = "bump/"
_PATH: Final = f".github/workflows/{WORKFLOW}"
# What may start it; a pull request, whose code is its own, is not among them.
_EVENTS: Final = frozenset({"schedule", "workflow_dispatch", "repository_dispatch"})
# Runs that are looked through for a record; each costs one request.
_MOST_RUNS: Final = 10
_NOT_FOUND: Final = 404


class Work(NamedTuple):
    """
    What the jobs after a look have to do.

    Attributes:
        bump: There is something to propose, or a proposal is open that may be out of date.
        issue: A person has to look, or an issue that says so is open.
    """

    bump: bool
    issue: bool


def look(at: Layout, models: Sequence[str], *, out: Path | None, as_json: bool) -> int:
    """
    Do `fleet check-upstream --github look`: go on from the last run's record; name the next jobs.

    Outputs `bump` and `issue`, see `Work`, beside those of `check_upstream.main`.

    Args:
        at: The checkout.
        models: See `check_upstream.main`; all, where there is no record of an earlier look.
        out: File for the record.
        as_json: Print the record.

    Raises:
        ParamsError: See `check_upstream.main`; also if there is no token.
        GitHubError, RetryLaterError: GitHub does not say what there is.
    """
    gh = GitHub.from_environment()
    before = previous(gh)
    if before is not None:
        at.upstream.parent.mkdir(parents=True, exist_ok=True)
        records.write(at.upstream, before)
    elif models:
        # A look at some alone would close the issue on the others, of which it knows nothing.
        console.info("There is no record of an earlier look: every model is looked at.")
        models = ()
    code = check_upstream.main(at, models, out=out, as_json=as_json)
    there_is = work(gh, check_upstream.read(at))
    runner.outputs(bump=there_is.bump, issue=there_is.issue)
    return code


def issue(path: Path | None) -> int:
    """
    Do `fleet check-upstream --github issue`: keep the one issue as a record says.

    Args:
        path: Of the record.

    Raises:
        ParamsError: There is no record, or no token.
        GitHubError, RetryLaterError: See `upstream_issues.settle`.
    """
    from pipelines import upstream_issues  # noqa: PLC0415 - jinja2

    if path is None:
        raise ParamsError(
            "`fleet check-upstream --github issue` needs the record of a look.",
            hint="fleet check-upstream --out FILE, then --github issue --previous FILE",
        )
    record = check_upstream.read(path)
    gh = GitHub.from_environment()
    done = upstream_issues.settle(gh, record, run_url=runner.run_url())
    console.info(f"The issue on what asks for a person: {done}.")
    return 0


def previous(gh: GitHub) -> UpstreamRecord | None:
    """
    Return the newest record that a run of the workflow left behind.

    One that is not as ours are is passed over with a word.

    Args:
        gh: The repository; its token reads actions.

    Returns:
        None if no run left one: the first look, or none for longer than artifacts are kept.

    Raises:
        GitHubError, RetryLaterError: GitHub does not say which runs there were.
    """
    branch = mainline.default_branch(gh)
    listed = gh.paged(f"actions/workflows/{WORKFLOW}/runs", "workflow_runs", branch=branch)
    try:
        runs = [run for run in islice(listed, _MOST_RUNS) if _is_ours(gh, run, branch)]
    except GitHubError as error:
        # A workflow that never ran under this name.
        if error.status == _NOT_FOUND:
            return None
        raise
    for run in runs:
        number = int(taken(run, "id", int))
        artifact = artifacts.find_artifact(gh, number, ARTIFACT)
        if artifact is None:
            continue
        try:
            record = UpstreamRecord.model_validate(artifacts.read_json(gh, artifact, MEMBER))
        except (artifacts.ArtifactError, ValidationError) as error:
            reason = error.message if isinstance(error, artifacts.ArtifactError) else _first(error)
            console.warn(f"The record of run {number} is passed over: {reason}")
            continue
        console.info(f"The look before this one: run {number}, {record.checked_at:%Y-%m-%d %H:%M}.")
        return record
    return None


def work(gh: GitHub, record: UpstreamRecord) -> Work:
    """
    Say which jobs have something to do, by the record and by what is open on GitHub.

    Args:
        gh: The repository; its token reads issues and pull requests.
        record: Of the look.

    Raises:
        GitHubError, RetryLaterError: GitHub does not say what is open.
    """
    from pipelines import upstream_issues  # noqa: PLC0415 - jinja2

    states = {each.state for each in record.models} | {each.state for each in record.engines}
    return Work(
        bump="moved" in states or _has_proposal(gh),
        issue="asks" in states or bool(record.alarms) or upstream_issues.is_open(gh),
    )


def _is_ours(gh: GitHub, run: dict[str, Any], branch: str) -> bool:
    """Whether a run is one of the default branch of this repository, by what GitHub says of it."""
    head = run.get("head_repository")
    return (
        isinstance(head, dict)
        and head.get("full_name") == gh.repository
        and run.get("head_branch") == branch
        and run.get("event") in _EVENTS
        # GitHub adds the branch where the file was read elsewhere: `PATH@refs/heads/x`.
        and run.get("path") in {_PATH, f"{_PATH}@{branch}", f"{_PATH}@refs/heads/{branch}"}
    )


def _has_proposal(gh: GitHub) -> bool:
    for pull in gh.paged("pulls", state="open"):
        head = pull.get("head")
        repository = head.get("repo") if isinstance(head, dict) else None
        ours = isinstance(repository, dict) and repository.get("full_name") == gh.repository
        if isinstance(head, dict) and ours and str(head.get("ref")).startswith(BRANCHES):
            return True
    return False


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return console.clean(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.")[:200]
