"""
A report to a pull request: found by its commit, filled with what the gate left behind.

It runs after `workflow_run`, with code of the default branch and rights to write, about a run that
may have executed a stranger's code. So everything of that run is data: the pull request is the open
one whose branch is at the commit that was measured, never a number that somebody wrote; gate.json
is read within limits, has to be of that commit and of the params.yaml that is there, and is judged
again by whoever renders it.

The comment, the check run and the summary of the job are the same text. An older run never
overwrites a newer one; what says "measuring" is replaced when the run ends, however it does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import ValidationError

from pipelines import console, runner
from pipelines.ci_records import GateRecord, is_records_of
from pipelines.errors import FleetError, MachineError
from pipelines.github import artifacts, checks, comments, commits
from pipelines.github.comments import Order
from pipelines.github.errors import GitHubError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pipelines.github.checks import Annotation, Conclusion
    from pipelines.github.client import GitHub

CHECK_NAME: Final = "fleet"
MARKER: Final = "fleet:report"
ARTIFACT: Final = "gate"
MEMBER: Final = "gate.json"
PARAMS: Final = "params.yaml"
# How GitHub ends a run that it does not start before somebody approves it: one of a fork, and one
# on a commit that the token of a job made. It goes on under the same number.
_UNAPPROVED: Final = "action_required"

State = Literal[
    "measuring",  # the run was asked for, or is at work
    "waiting",  # GitHub starts it when somebody has approved that
    "judged",  # there is a gate.json of this commit
    "cancelled",
    "failed",  # it ended without one
    "unusable",  # there is one, and it cannot be used: `problem` says why
]


@dataclass(frozen=True, kw_only=True)
class Run:
    """
    The run that is reported, as GitHub's event says.

    Attributes:
        id: Of the run.
        attempt: 1, 2, ...
        head: Commit of the branch.
        branch: Its name, a stranger's text.
        head_repository: OWNER/NAME of the repository that the branch is in; None if it is gone.
        event: What started it.
        conclusion: None while it runs.
        started_at: When this attempt began, as GitHub writes times.
        url: Of its page.
    """

    id: int
    attempt: int
    head: str
    branch: str
    head_repository: str | None
    event: str
    conclusion: str | None
    started_at: str
    url: str

    @property
    def order(self) -> Order:
        """Where it stands among the reports on a pull request."""
        return Order(self.id, self.attempt, 1 if self.conclusion and not self.waits else 0)

    @property
    def waits(self) -> bool:
        """Whether it starts only when somebody has approved it."""
        return self.conclusion == _UNAPPROVED


@dataclass(frozen=True, kw_only=True)
class Situation:
    """
    Everything that a comment is made of.

    Attributes:
        state: What is known.
        run: That is reported.
        number: Of the pull request.
        gate: What the gate found, of this commit; only if `judged`. Not to be believed: its
            bundles are to be judged again.
        params: Text of params.yaml at that commit; None if there is none.
        problem: Why there are no numbers, as sentences; a stranger's words may be in it.
    """

    state: State
    run: Run
    number: int
    gate: GateRecord | None = None
    params: str | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """
    What people read.

    Attributes:
        markdown: The comment, without a marker; the summary of the job too.
        title: The verdict in one line, plain text.
        conclusion: Of the check run; None while it measures.
        annotations: On lines of params.yaml of that commit.
    """

    markdown: str
    title: str
    conclusion: Conclusion | None
    annotations: tuple[Annotation, ...] = ()


class _UnusableError(FleetError):
    """What the gate left behind cannot be shown."""


def post(
    gh: GitHub,
    event: Mapping[str, Any],
    render: Callable[[Situation], Rendered],
    *,
    settle_s: float = comments.SETTLE_S,
) -> Rendered | None:
    """
    Report a run to the pull request that it is of.

    Args:
        gh: The repository; its token may write comments and checks.
        event: Payload of `workflow_run`, `requested`, `in_progress` or `completed`.
        render: Makes the text. A FleetError of it about a gate.json is shown in place of numbers.
        settle_s: See `comments.upsert_comment`.

    Returns:
        What was said; None if there is no pull request to say it to, or a newer run spoke.

    Raises:
        MachineError: The event is none of `workflow_run`.
        GitHubError: GitHub refuses one of the requests; the others were made.
        RetryLaterError: GitHub cannot be asked now.
    """
    run = run_of(event)
    pull = _pull_of(gh, run) if run.event == "pull_request" else None
    if pull is None:
        console.info(
            f"No pull request is at {run.head[:12]}: it was changed or closed, or the run was not "
            "of one. Nothing is said."
        )
        return None
    number, is_open = int(pull["number"]), pull.get("state") == "open"
    situation = _situation(gh, run, number)
    rendered, broken = _rendered(render, situation)
    # Rendering and reading take time; what is said is said of this commit only.
    again = gh.get(f"pulls/{number}")
    if not _is_at(gh, {**again, "state": "open"}, run):
        console.info(f"#{number} was changed in the meantime: the run of its new commit reports.")
        return None
    runner.summary(rendered.markdown)
    said = _said(gh, situation, rendered, is_open=is_open, settle_s=settle_s)
    if broken is not None:
        raise broken
    return rendered if said else None


def _rendered(
    render: Callable[[Situation], Rendered], situation: Situation
) -> tuple[Rendered, Exception | None]:
    """
    Return the text, and what is wrong with us, not with the run, if something is.

    Whatever a gate.json does to who renders it, "measuring" is not what stays there.
    """
    try:
        return render(situation), None
    except Exception as error:
        if situation.gate is None:
            raise
        known = isinstance(error, FleetError)
        problem = error.message if isinstance(error, FleetError) else type(error).__name__
        situation = replace(situation, state="unusable", gate=None, problem=problem)
        return render(situation), None if known else error


def _said(
    gh: GitHub, situation: Situation, rendered: Rendered, *, is_open: bool, settle_s: float
) -> bool:
    """Write check run and comment; one that is refused does not keep the other from being made."""
    run, number = situation.run, situation.number
    check = checks.CheckRun(
        title=rendered.title,
        summary=rendered.markdown,
        conclusion=rendered.conclusion,
        annotations=rendered.annotations,
        details_url=run.url or None,
    )
    refused: FleetError | None = None
    try:
        checks.upsert_check(
            gh, run.head, CHECK_NAME, check, run.order, believed=lambda one: _is_run(gh, run, one)
        )
    except FleetError as error:
        refused = error
    said = comments.upsert_comment(
        gh, number, MARKER, rendered.markdown, run.order, create=is_open, settle_s=settle_s,
        # What waits has nothing to say yet: the numbers that somebody is to approve stay.
        keep_ended=situation.state == "waiting",
        believed=lambda one: _is_run(gh, run, one),
    )  # fmt: skip
    if refused is not None:
        raise refused
    if not said and is_open:
        console.info(f"A newer run has reported to #{number} already.")
    return said


def _is_run(gh: GitHub, run: Run, order: Order) -> bool:
    """
    Tell whether a report says which run it is of, and that one is of this branch.

    Whoever may push can write a comment or a check run under the name of our jobs, and edit ours:
    one that claims to be of a run in the far future would keep every true one away.
    """
    told = gh.find(f"actions/runs/{order.run_id}")
    if not isinstance(told, dict):
        return False
    repository = told.get("head_repository")
    name = repository.get("full_name") if isinstance(repository, dict) else None
    attempt = told.get("run_attempt")
    return (
        (told.get("event"), told.get("head_branch"), name)
        == (run.event, run.branch, run.head_repository)
        and isinstance(attempt, int)
        and order.attempt <= attempt
    )


# --- which run, which pull request


def run_of(event: Mapping[str, Any]) -> Run:
    """
    Read the event.

    Raises:
        MachineError: It is none of `workflow_run`.
    """
    try:
        told = event["workflow_run"]
        repository = told.get("head_repository")
        name = repository.get("full_name") if isinstance(repository, dict) else None
        conclusion = told.get("conclusion")
        done = event.get("action") == "completed" or conclusion == _UNAPPROVED
        return Run(
            id=_number(told["id"]),
            attempt=_number(told["run_attempt"]),
            head=_commit(told["head_sha"]),
            branch=str(told.get("head_branch") or ""),
            head_repository=str(name) if name else None,
            event=str(told["event"]),
            conclusion=str(conclusion or "failure") if done else None,
            started_at=str(told.get("run_started_at") or ""),
            url=str(told.get("html_url") or ""),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MachineError(
            f"The event is no workflow_run as GitHub sends them: {error}.",
            hint="`fleet comment` without --dry-run is for a workflow that runs on `workflow_run`.",
        ) from None


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 53:
        raise ValueError("a number is none")
    return value


def _commit(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{40}", value):
        raise ValueError("head_sha is none")
    return value


def _pull_of(gh: GitHub, run: Run) -> dict[str, Any] | None:
    """
    Return the pull request whose branch is at the commit of a run; None if there is none.

    The event names none for a fork. One that was closed while it was measured is found too: what
    says "measuring" there is not to stay.
    """
    if run.head_repository is None or not run.branch:
        return None
    owner = run.head_repository.partition("/")[0]
    found = [
        pull
        for pull in gh.paged("pulls", state="all", head=f"{owner}:{run.branch}")
        if _head_repository(pull) == run.head_repository and _is_at(gh, pull, run)
    ]
    # The open one; of several from one branch the oldest.
    found.sort(key=lambda pull: (pull.get("state") != "open", pull.get("number")))
    return found[0] if found else None


def _is_at(gh: GitHub, pull: dict[str, Any], run: Run) -> bool:
    """
    Tell whether a branch is at the commit of a run, or at that of its records.

    `fleet adopt` puts them onto the branch before the run is over. Where somebody else went on, the
    run of the new commit reports; whoever writes adopt's message himself gains nothing by it.
    """
    sha = _head_sha(pull)
    if sha is None or sha == run.head:
        return sha == run.head
    if pull.get("state") != "open":
        return False
    commit = gh.find(f"git/commits/{sha}")
    if not isinstance(commit, dict) or not is_records_of(str(commit.get("message")), run.head):
        return False
    return [one.get("sha") for one in commit.get("parents") or []] == [run.head]


def _head_sha(pull: dict[str, Any]) -> str | None:
    head = pull.get("head")
    return head.get("sha") if isinstance(head, dict) else None


def _head_repository(pull: dict[str, Any]) -> str | None:
    head = pull.get("head")
    repository = head.get("repo") if isinstance(head, dict) else None
    return repository.get("full_name") if isinstance(repository, dict) else None


# --- what is known


def _situation(gh: GitHub, run: Run, number: int) -> Situation:
    if run.conclusion is None:
        return Situation(state="measuring", run=run, number=number)
    if run.waits:
        return Situation(state="waiting", run=run, number=number)
    if run.conclusion == "cancelled":
        return Situation(state="cancelled", run=run, number=number)
    # Of a run that is green its gate is, too: "Re-run failed jobs" leaves that of before standing.
    since = "" if run.conclusion == "success" else run.started_at
    artifact = artifacts.find_artifact(gh, run.id, ARTIFACT, since=since)
    if artifact is None:
        return Situation(
            state="failed",
            run=run,
            number=number,
            problem="The run ended before there was something to judge.",
        )
    try:
        gate = gate_of(artifacts.read_json(gh, artifact, MEMBER), run.head)
        params = _params(gh, run.head, gate)
    except (artifacts.ArtifactError, _UnusableError) as error:
        return Situation(state="unusable", run=run, number=number, problem=error.message)
    return Situation(state="judged", run=run, number=number, gate=gate, params=params)


def gate_of(value: Mapping[str, Any], head: str) -> GateRecord:
    """
    Return what the gate found at a commit.

    Raises:
        FleetError: It is none, or of another commit.
    """
    try:
        gate = GateRecord.model_validate(value)
    except ValidationError as error:
        # Neither names nor values of it: they are a stranger's.
        raise _UnusableError(
            f"{MEMBER} is no record of the gate: {error.error_count()} of its fields are wrong."
        ) from None
    told = {gate.head, *([gate.plan.head] if gate.plan else [])}
    if told != {head}:
        raise _UnusableError(f"{MEMBER} is of another commit than {head[:12]}.")
    return gate


def _params(gh: GitHub, head: str, gate: GateRecord) -> str | None:
    """Return params.yaml of the commit, which has to be the one that was planned."""
    sha = commits.blob_sha(gh, PARAMS, head)
    planned = gate.plan.params_blob if gate.plan else sha
    if sha != planned:
        raise _UnusableError(f"{MEMBER} was made with another {PARAMS} than that of {head[:12]}.")
    if sha is None:
        return None
    try:
        data = commits.read_file(gh, PARAMS, head)
        return None if data is None else data.decode("utf-8")
    except (GitHubError, UnicodeDecodeError) as error:
        if isinstance(error, GitHubError) and error.status:
            raise
        raise _UnusableError(f"{PARAMS} of {head[:12]} cannot be read as text.") from error
