"""Every request of every operation, struck by every fault: done whole, or said and done later."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from github_api import Fault, GitHubApi, Seen
from github_fixtures import client, serving
from node_tools import payload

from pipelines import comment_post
from pipelines.ci_records import GateRecord
from pipelines.comment_post import Rendered
from pipelines.errors import FleetError
from pipelines.github import artifacts, checks, comments, commits, issues, pulls, runners
from pipelines.github.comments import Order

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.github.client import GitHub

RUN: Final = 7


@dataclass(frozen=True)
class Operation:
    """Something that a job does; `prepare` is what was there before."""

    prepare: Callable[[GitHubApi], object]
    run: Callable[[GitHub, GitHubApi], object]
    token: str = "ghs_of-a-job"


def _feature(api: GitHubApi) -> str:
    return api.git.text("rev-parse", "main^{commit}")


def _commit(gh: GitHub, api: GitHubApi) -> None:
    del api
    parent = commits.branch_head(gh, "main")
    assert parent is not None
    if gh.get("git/commits/" + parent)["message"].strip() == "Evidence":
        return
    files = {"results/m/new.json": b"{}", "results/m/old.json": None, "b": b"\xff"}
    commits.commit_files(gh, "main", files, "Evidence", parent=parent)


def _pull(gh: GitHub, api: GitHubApi) -> None:
    commits.create_branch(gh, "fleet/ledger", _feature(api))
    pulls.upsert_pull(
        gh, head="fleet/ledger", base="main", title="Ledger", body="ours", labels=["fleet"]
    )


def _comment(gh: GitHub, api: GitHubApi) -> None:
    del api
    comments.upsert_comment(gh, 1, "fleet:report", "PROMOTE", Order(5, 1, 1), settle_s=0.0)


def _check(gh: GitHub, api: GitHubApi) -> None:
    check = checks.CheckRun(title="t", summary="s", conclusion="success")
    checks.upsert_check(gh, _feature(api), "fleet", check, Order(5, 1, 1))


def _issue(gh: GitHub, api: GitHubApi) -> None:
    del api
    issues.upsert_issue(gh, marker="fleet:x", label="fleet", title="sick", body="b")


def _close(gh: GitHub, api: GitHubApi) -> None:
    del api
    issues.close_issue(gh, marker="fleet:x", label="fleet", reason="well again")


def _download(gh: GitHub, api: GitHubApi) -> None:
    del api
    found = artifacts.find_artifact(gh, RUN, "gate")
    assert found is not None
    assert artifacts.read_json(gh, found, "gate.json")["head"]


def _runners(gh: GitHub, api: GitHubApi) -> None:
    del api
    assert [each.name for each in runners.runners(gh)] == ["gpu-1"]


def _gate(api: GitHubApi) -> None:
    head = api.git.head("feature")
    assert head is not None
    record = GateRecord(
        base=None, head=head, verdict="PROMOTE", conclusion="success", sentence="yes"
    )
    api.add_artifact(RUN, "gate", {"gate.json": record.model_dump_json()})


def _report(gh: GitHub, api: GitHubApi) -> None:
    run = {
        "id": RUN,
        "run_attempt": 1,
        "event": "pull_request",
        "head_branch": "feature",
        "head_sha": api.git.head("feature"),
        "head_repository": {"full_name": api.repository},
        "conclusion": "success",
        "run_started_at": "2026-01-01T00:00:00Z",
    }
    told = payload("workflow_run", "completed", workflow_run=run)

    def render(situation: comment_post.Situation) -> Rendered:
        state = situation.state
        return Rendered(markdown=state, title=state, conclusion="success")

    comment_post.post(gh, told, render, settle_s=0.0)


def _reported(api: GitHubApi) -> None:
    api.add_pull("feature")
    _gate(api)


OPERATIONS: Final = {
    "commit": Operation(lambda _: None, _commit),
    "pull request": Operation(lambda _: None, _pull),
    "new comment": Operation(lambda api: api.add_pull("feature"), _comment),
    "changed comment": Operation(
        lambda api: api.add_comment(
            api.add_pull("feature"), "<!-- fleet:report run=4 attempt=1 phase=1 -->\nold"
        ),
        _comment,
    ),
    "check run": Operation(lambda _: None, _check),
    "new issue": Operation(lambda _: None, _issue),
    "closed issue": Operation(
        lambda api: api.add_issue("sick", "<!-- fleet:x -->\nb", ["fleet"]), _close
    ),
    "artifact": Operation(_gate, _download),
    "runners": Operation(lambda api: api.add_runner("gpu-1", ["gpu"]), _runners, "ghs_of-an-app"),
    "report": Operation(_reported, _report),
}
_SECONDARY: Final = {"message": "You have exceeded a secondary rate limit."}
PASSING: Final = {
    "500": Fault(kind="status", status=500),
    "429": Fault(kind="status", status=429, headers={"Retry-After": "2"}),
    "secondary limit": Fault(kind="status", status=403, body=_SECONDARY),
    "cut connection": Fault(kind="refuse"),
    "lost answer": Fault(kind="lose"),
    "hang": Fault(kind="hang"),
}
STAYING: Final = {
    "403": Fault(kind="status", status=403, body={"message": "Resource not accessible"}),
    "422": Fault(kind="status", status=422, body={"message": "Validation Failed"}),
    "a login page": Fault(kind="html"),
}


def ends(api: GitHubApi) -> str:
    """Return everything that is left in the end, without numbers that only count."""
    state = api.state()
    for counted in ("requests", "violations", "artifacts"):
        del state[counted]
    branches = api.git.text("for-each-ref", "--format=%(refname) %(tree) %(subject)")
    count = api.git.text("rev-list", "--count", "main")
    text = json.dumps([state, branches, count], sort_keys=True)
    return re.sub(r'"id": \d+', '"id": 0', text)


@functools.cache
def clean(name: str) -> tuple[list[Seen], str]:
    """Run an operation without a fault: its requests, and what is left."""
    operation = OPERATIONS[name]
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as api:
        operation.prepare(api)
        operation.run(client(api, token=operation.token, answer_within_s=20), api)
        return list(api.requests), ends(api)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_changes_nothing_in_the_end(
    tmp_path: Path, name: str, fault: str
) -> None:
    """Every call fails at first: in the end all is as if none had, done once and not twice."""
    operation = OPERATIONS[name]
    calls, wanted = clean(name)
    with serving(tmp_path) as api:
        operation.prepare(api)
        struck = strike_each(api, PASSING[fault])
        within_s = 0.2 if fault == "hang" else 20
        operation.run(client(api, token=operation.token, answer_within_s=within_s), api)

        assert set(struck) >= {str(seen) for seen in calls}
        assert ends(api) == wanted


def strike_each(api: GitHubApi, fault: Fault) -> list[str]:
    """Strike the first, the third, ... of equal requests; return which were struck."""
    arrived, times, struck = api.arrived, Counter[str](), list[str]()

    def striking(seen: Seen) -> Fault | None:
        arrived(seen)
        key = f"{seen} {seen.query} {seen.body}"
        times[key] += 1
        if times[key] % 2 == 0:
            return None
        struck.append(str(seen))
        return fault

    api.arrived = striking  # type: ignore[method-assign]
    return struck


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("fault", STAYING)
def test_after_a_refusal_the_job_that_is_run_again_ends_the_same(
    tmp_path: Path, name: str, fault: str
) -> None:
    """At each call: an error with words and without the token, and nothing half done."""
    operation = OPERATIONS[name]
    calls, wanted = clean(name)
    refused = 0

    for at, seen in enumerate(calls):
        if not seen.is_write and fault != "403":
            continue
        with serving(tmp_path / f"{at}") as api:
            operation.prepare(api)
            api.strike(STAYING[fault], at=at)
            refused += _refused(operation, api)
            operation.run(client(api, token=operation.token, answer_within_s=20), api)
            assert ends(api) == wanted, f"{fault} at request {at} of {name}"

    assert refused or fault != "403"


def _refused(operation: Operation, api: GitHubApi) -> bool:
    gh = client(api, token=operation.token, answer_within_s=20)
    try:
        operation.run(gh, api)
    except FleetError as error:
        told = error.message + error.hint
    else:
        return False
    assert told
    assert operation.token not in told
    return True
