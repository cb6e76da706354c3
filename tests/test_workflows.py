"""Every workflow, run by act with the real verbs; GitHub is the stand-in that knows its API."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import act
import github_events
import pytest
from github_api import GitHubApi
from test_actions import unexplained_outputs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipelines.toolchain import Toolchain

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
    with GitHubApi(tmp_path / "github.git") as api:
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
