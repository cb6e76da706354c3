"""Every workflow, run by act with the real verbs; GitHub is the stand-in that knows its API."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import act
import github_events
import pytest
from github_api import ACTIONS, GitHubApi, Token
from test_actions import unexplained_outputs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


GATE = "gates: {max_kld_mean_nats: 0.005,"


@pytest.fixture(scope="session", name="template")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as one commit: its records cover what it declares."""
    return act.fork(tmp_path_factory.mktemp("workflows"))


@pytest.fixture(name="root")
def _root(template: Path, tmp_path: Path) -> Path:
    """A fork of it, on the branch of a pull request."""
    root = tmp_path / "fork"
    act.git(tmp_path, "clone", "-q", "--shared", str(template), str(root))
    act.git(root, "config", "uploadpack.allowAnySHA1InWant", "true")
    act.git(root, "checkout", "-q", "-b", "bump")
    return root


@pytest.fixture(name="api")
def _api(tmp_path: Path) -> Iterator[GitHubApi]:
    """GitHub; what it does not know fails the test."""
    with GitHubApi(tmp_path / "github.git", repository=act.REPOSITORY) as api:
        api.tokens[act.TOKEN] = api.tokens[api.token]
        yield api


def edit(root: Path, before: str, after: str) -> str:
    """Change params.yaml and commit; return the commit."""
    path = root / "params.yaml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    return act.commit(root)


def opened(root: Path, *, fork: bool = False) -> dict[str, Any]:
    """Return the event of a pull request from this branch to main."""
    event = github_events.payload("pull_request", "opened")
    pull = event["pull_request"]
    pull.update(labels=[], number=7)
    pull["head"].update(ref="bump", sha=act.git(root, "rev-parse", "HEAD"))
    pull["head"]["repo"]["full_name"] = github_events.FORK if fork else act.REPOSITORY
    pull["base"].update(ref="main", sha=act.git(root, "rev-parse", "main"))
    pull["base"]["repo"]["full_name"] = act.REPOSITORY
    return {**event, "number": 7}


def pull_request(place: Path, root: Path, *, fork: bool = False) -> act.Run:
    """Run model-pr.yml."""
    return act.act(
        place / "run", root, "pull_request", "model-pr.yml", opened(root, fork=fork),
        labels=(act.HOSTED, "self-hosted", "gpu"),
    )  # fmt: skip


# --- model-pr.yml -----------------------------------------------------------------------------


def test_a_head_that_is_covered_is_measured_by_nobody_and_green(root: Path, tmp_path: Path) -> None:
    """Plan and gate run, on hosted runners; no machine of the operator is asked for."""
    act.commit(root, "a change of nothing that is measured")

    run = pull_request(tmp_path, root)

    assert (run.rc, run.errors) == (0, []), run.text
    assert run.jobs == {"plan": "success", "gate": "success"}
    told = run.outputs("plan", "plan/fleet")
    assert (told["any"], told["covered"], told["matrix"]) == ("false", "true", '{"include":[]}')
    for job in run.jobs:
        assert unexplained_outputs(run, job, job, job) == set()
    assert "Nothing has to be measured" in "\n".join(run.summaries("plan"))
    head = act.git(root, "rev-parse", "HEAD")
    for name in ("plan", "gate"):
        assert json.loads((run.artifact(name) / f"{name}.json").read_text())["head"] == head


def test_a_wrong_declaration_is_told_at_its_line_and_red(root: Path, tmp_path: Path) -> None:
    """Both jobs fail; the annotation names the line; plan and gate are handed over all the same."""
    edit(root, "context_tokens: 512", "context_tokens: many")

    run = pull_request(tmp_path, root)

    assert run.rc == 1
    assert run.jobs == {"plan": "failure", "gate": "failure"}, run.text
    (line,) = {a.place["line"] for a in run.annotations("error") if "line" in a.place}
    text = (root / "params.yaml").read_text().splitlines()[int(line) - 1]
    assert text.strip() == "context_tokens: many"
    gate = json.loads((run.artifact("gate") / "gate.json").read_text())
    assert gate["conclusion"] == "failure"
    assert gate["plan"]["problems"]


def test_a_fork_reaches_no_machine_of_the_operator(root: Path, tmp_path: Path) -> None:
    """There is something to measure, nobody measures it, and the required check is red."""
    edit(root, GATE, "gates: {max_kld_mean_nats: 0.004,")

    run = pull_request(tmp_path, root, fork=True)

    assert run.outputs("plan", "plan/fleet")["any"] == "true"
    assert run.jobs == {"plan": "success", "gate": "failure"}, run.text
    assert run.errors == []
    gate = json.loads((run.artifact("gate") / "gate.json").read_text())
    assert gate["conclusion"] != "success"


# --- report.yml -------------------------------------------------------------------------------


def reported(
    root: Path, action: str, conclusion: str | None, *, run_id: int = 77
) -> dict[str, Any]:
    """Return the event of a run of model-pr.yml that began or ended."""
    event: dict[str, Any] = github_events.workflow_run(action, conclusion=conclusion)["event"]
    event["workflow_run"].update(
        id=run_id, run_attempt=1, head_sha=act.git(root, "rev-parse", "bump"), head_branch="bump",
        display_title="Bump @team $(id)",
    )  # fmt: skip
    return event


def test_a_pull_request_has_one_comment_from_its_request_to_its_verdict(
    root: Path, tmp_path: Path, api: GitHubApi
) -> None:
    """`requested` says that it is measuring; `completed` replaces that by what the gate found."""
    edit(root, "context_tokens: 512", "context_tokens: many")
    measured = pull_request(tmp_path, root)
    act.git(root, "push", "-q", str(api.git.path), "main", "bump")
    number = api.add_pull("bump")
    api.runs[77] = {"id": 77, "head_sha": act.git(root, "rev-parse", "HEAD")}
    act.git(root, "checkout", "-q", "main")

    def report(action: str, conclusion: str | None) -> act.Run:
        return act.act(
            tmp_path / action, root, "workflow_run", "report.yml",
            reported(root, action, conclusion), api=api.url, origin=api.git.path,
        )  # fmt: skip

    asked = report("requested", None)
    before = [comment["body"] for comment in api.comments_of(number)]
    api.add_artifact(77, "gate", {**measured.artifact_files("gate")})
    ended = report("completed", "failure")
    after = [comment["body"] for comment in api.comments_of(number)]

    assert (asked.jobs, ended.jobs) == ({"comment": "success"},) * 2, asked.text + ended.text
    assert (len(before), len(after)) == (1, 1)
    assert "easuring" in before[0]
    assert "context_tokens" in after[0]
    (check,) = api.check_runs.values()
    assert check["conclusion"] == "failure"
    assert asked.errors == ended.errors == []


# --- check-upstream.yml -----------------------------------------------------------------------


def test_without_an_app_what_moved_is_proposed_and_says_that_its_checks_wait(
    root: Path, tmp_path: Path, api: GitHubApi
) -> None:
    """With the rights of the three jobs and no more; a directory asks no network."""
    act.git(root, "checkout", "-q", "main")
    edit(root, "\nhosts:\n", "\ncheck_upstream: {engines: false}\n\nhosts:\n")
    changed = root / "examples/tiny-llama/generation_config.json"
    changed.write_text(changed.read_text().replace("true", "false"))
    act.commit(root, "another default")
    act.git(root, "push", "-q", str(api.git.path), "main")
    rights = {"actions": "read", "contents": "write", "issues": "write", "pull_requests": "write"}
    api.tokens[api.token] = Token(ACTIONS, rights)

    run = act.act(
        tmp_path / "run", root, "schedule", "check-upstream.yml", api=api.url,
        origin=api.git.path, secrets={"GITHUB_TOKEN": api.token},
    )  # fmt: skip

    assert run.jobs == {"look": "success", "bump": "success"}, run.text
    assert run.errors == []
    for job, step, action in (("look", "look", "check-upstream"), ("bump", "propose", "bump")):
        assert unexplained_outputs(run, job, step, action) == set()
    (pull,) = api.pulls.values()
    assert (pull["head"], pull["login"]) == ("bump/tiny-llama", ACTIONS)
    assert "Approve workflows to run" in pull["body"]
    assert api.git.text("diff", "--name-only", "main", "bump/tiny-llama") == "params.yaml"


# --- runner-health.yml ------------------------------------------------------------------------


def test_a_runner_that_is_online_is_probed_and_one_that_is_not_gets_an_issue(
    root: Path, tmp_path: Path, api: GitHubApi
) -> None:
    """GitHub is asked first; a job for a machine that is off would wait for a day."""
    here = "    runs_on: [self-hosted, gpu]\n"
    edit(root, here, f"{here}  away: {{memory_mib: 4096, runs_on: [self-hosted, far]}}\n")
    act.git(root, "push", "-q", str(api.git.path), "bump:main")
    api.add_runner("here", ["self-hosted", "gpu"], status="online")
    api.add_runner("there", ["self-hosted", "far"], status="offline")

    run = act.act(
        tmp_path / "run", root, "schedule", "runner-health.yml", api=api.url, origin=api.git.path,
        variables={"FLEET_APP_CLIENT_ID": "Iv1.x"}, secrets={"FLEET_APP_KEY": "key-of-the-app"},
        env={"STUB_APP_TOKEN": "ghs_of-an-app"}, labels=(act.HOSTED, "self-hosted"),
    )  # fmt: skip

    assert run.jobs == {"ask": "success", "probe": "success", "issues": "success"}, run.text
    assert [leg["host"] for leg in run.legs("probe")] == ["local"]
    assert run.errors == []
    titles = [issue["title"] for issue in api.issues.values()]
    assert any("away" in title for title in titles)
    (token,) = run.calls("actions/create-github-app-token")
    assert token["inputs"]["permission-administration"] == "read"
    assert "permission-contents" not in token["inputs"] or (
        token["inputs"]["permission-contents"] == "read"
    )


# --- publish.yml, rollback.yml ----------------------------------------------------------------


def test_where_no_registry_has_an_environment_nothing_is_published(
    root: Path, tmp_path: Path, api: GitHubApi
) -> None:
    """Nobody is asked to approve a run that has nothing to do."""
    act.git(root, "checkout", "-q", "main")
    act.git(root, "push", "-q", str(api.git.path), "main")

    run = act.act(
        tmp_path / "run", root, "push", "publish.yml",
        {"ref": "refs/heads/main"}, api=api.url, origin=api.git.path,
    )  # fmt: skip

    assert run.jobs == {"plan": "success"}, run.text
    assert run.outputs("plan", "plan")["any"] == "false"
    assert run.errors == []


@pytest.mark.parametrize("branch", ["main", "bump"])
def test_a_rollback_of_a_model_that_is_not_there_changes_nothing(
    root: Path, tmp_path: Path, api: GitHubApi, branch: str
) -> None:
    """A wrong name is said, hostile as it may be; from another branch nothing runs at all."""
    act.git(root, "push", "-q", str(api.git.path), "main", "bump")
    act.git(root, "checkout", "-q", branch)
    hostile = "$(touch /tmp/fleet-hacked) `id` @team"
    inputs = {"model": hostile, "to": "previous", "reason": "::error::x", "environment": "x"}

    run = act.act(
        tmp_path / "run", root, "workflow_dispatch", "rollback.yml",
        {"inputs": inputs, "ref": f"refs/heads/{branch}"}, api=api.url, origin=api.git.path,
        env={"GITHUB_REF": f"refs/heads/{branch}"},
    )  # fmt: skip

    assert run.jobs == ({"rollback": "failure"} if branch == "main" else {}), run.text
    assert not [seen for seen in api.requests if seen.is_write]
    if branch == "main":
        assert any("is not declared" in each.text for each in run.annotations("error")), run.text
