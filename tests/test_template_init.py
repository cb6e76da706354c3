"""A repository that was made of the template begins by one pull request, by hand or by itself."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import act
import pytest
from github_api import ACTIONS, Fault, GitHubApi, Token
from test_actions import unexplained_outputs

from pipelines.__main__ import main
from pipelines.init_pull import BRANCH

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

JOB = {"contents": "write", "pull_requests": "write"}
OWN = "models/mine"


@pytest.fixture(scope="session", name="made")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What "Use this template" makes, with a model of one's own beside the example."""
    root = act.fork(tmp_path_factory.mktemp("made"))
    shutil.copytree(root / "examples/tiny-llama", root / OWN)
    act.commit(root, "a model")
    return root


@pytest.fixture(name="root")
def _root(made: Path, tmp_path: Path) -> Path:
    """A checkout of its default branch."""
    root = tmp_path / "fork"
    act.git(tmp_path, "clone", "-q", "--shared", str(made), str(root))
    act.git(root, "config", "uploadpack.allowAnySHA1InWant", "true")
    return root


@pytest.fixture(name="api")
def _api(tmp_path: Path, root: Path) -> Iterator[GitHubApi]:
    """GitHub, with that branch, and a token that may write contents and pull requests alone."""
    act.git(tmp_path, "clone", "-q", "--shared", "--bare", str(root), "github.git")
    with GitHubApi(tmp_path / "github.git", repository=act.REPOSITORY) as api:
        api.tokens[act.TOKEN] = Token(ACTIONS, JOB)
        api.tokens["ghs_job"] = Token(ACTIONS, JOB)
        yield api


@pytest.fixture(name="typed")
def _typed(tmp_path: Path, root: Path, api: GitHubApi, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what types the line of the action, as in a job; it returns exit code and outputs."""
    event = tmp_path / "event.json"
    event.write_text(json.dumps({"repository": {"default_branch": "main"}}))
    outputs, summary = tmp_path / "outputs", tmp_path / "summary"
    for name, value in {
        **api.environment("ghs_job"),
        "GITHUB_ACTIONS": "true",
        "GITHUB_EVENT_PATH": str(event),
        "GITHUB_OUTPUT": str(outputs),
        "GITHUB_STEP_SUMMARY": str(summary),
        "GITHUB_REPOSITORY_OWNER": "o",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(root)

    def run(*options: str, event: str = "workflow_dispatch", model: str = "") -> tuple[int, str]:
        monkeypatch.setenv("GITHUB_EVENT_NAME", event)
        for path in (outputs, summary):
            path.write_text("")
        code = main(["init", "--github", "--owner=@mona", *options, "--", model])
        return code, outputs.read_text() + summary.read_text()

    return run


def changed(api: GitHubApi) -> dict[str, str]:
    """Return how each path of the branch differs from the default one: A, M, D."""
    lines = api.git.text("diff", "--name-status", "--no-renames", "main", BRANCH).splitlines()
    return {path: how for how, path in (line.split("\t") for line in lines)}


def test_the_first_push_of_a_new_repository_opens_one_pull_request_with_what_to_do_next(
    root: Path, api: GitHubApi, tmp_path: Path
) -> None:
    """The workflow from end to end: its owner in CODEOWNERS, nothing else, and the list."""
    run = act.act(
        tmp_path / "run", root, "push", "template-init.yml",
        {"ref": "refs/heads/main"}, api=api.url, origin=api.git.path,
    )  # fmt: skip

    assert (run.rc, run.errors, run.jobs) == (0, [], {"init": "success"}), run.text
    (pull,) = api.pulls.values()
    assert (pull["head"], pull["base"]) == (BRANCH, "main")
    assert changed(api) == {".github/CODEOWNERS": "M"}
    owners = api.git.text("show", f"{BRANCH}:.github/CODEOWNERS")
    assert "@o\n" in owners
    assert "@OWNER" not in owners
    boxes = [line for line in pull["body"].splitlines() if line.startswith("- [ ] ")]
    assert len(boxes) == 6
    for words in ("fleet doctor", "template init", "deploy/runner/README.md", "o may write here"):
        assert words in pull["body"]
    assert unexplained_outputs(run, "init", "2", "init") == set()
    assert run.outputs("init", "2/fleet")["pull_request"].startswith("https://")
    assert any("- [ ] " in each for each in run.summaries("init"))


def test_a_dispatch_brings_model_host_and_registry_and_takes_the_example_away(
    api: GitHubApi, typed: Any
) -> None:
    """What `fleet init` would write, as one commit of the job's token; no workflow among it."""
    code, told = typed(
        "--host=desk", "--vram=24576", "--memory=", "--quants=Q8_0,Q4_K_M",
        "--registry=s3://bucket/models", model=f"path:{OWN}",
    )  # fmt: skip

    assert code == 0
    assert "any<<" in told
    paths = changed(api)
    assert paths["params.yaml"] == paths[".github/CODEOWNERS"] == "M"
    assert paths["dvc.lock"] == "D"
    assert not [path for path in paths if path.startswith((".github/workflows", "examples/"))]
    assert {how for path, how in paths.items() if path.startswith("results/")} == {"D"}
    params = api.git.text("show", f"{BRANCH}:params.yaml")
    for words in (f"source: path:{OWN}", "vram_mib: 24576", "mine-Q4_K_M:", "s3://bucket/models"):
        assert words in params
    assert api.git.text("rev-list", "--count", f"main..{BRANCH}") == "1"
    (pull,) = api.pulls.values()
    assert "| host | desk |" in pull["body"]
    assert "Name the first model" not in pull["body"]
    # What a job opens waits for a click.
    assert "- [ ] Click **Approve workflows to run**" in pull["body"]


def test_a_second_run_with_equal_answers_changes_nothing_and_others_renew_the_same_pull_request(
    api: GitHubApi, typed: Any
) -> None:
    """The branch is only ever moved forward."""
    assert typed()[0] == 0
    first = api.git.head(BRANCH)
    api.forget()

    assert typed()[0] == 0
    assert api.git.head(BRANCH) == first
    assert {str(each) for each in api.requests if each.is_write} <= {"POST git/trees"}

    assert typed("--registry=s3://bucket/models")[0] == 0
    assert len(api.pulls) == 1
    assert changed(api) == {".github/CODEOWNERS": "M", "params.yaml": "M"}
    assert api.git.is_forward(str(first), str(api.git.head(BRANCH)))


def test_a_push_proposes_nothing_where_somebody_has_begun_or_did_not_want_it(
    api: GitHubApi, root: Path, typed: Any
) -> None:
    """By hand it is proposed again."""
    assert typed(event="push")[0] == 0
    (number,) = api.pulls
    api.close_pull(number)
    act.git(root, "push", "-q", str(api.git.path), "--delete", BRANCH)
    code, told = typed(event="push")
    assert (code, "false" in told, api.git.head(BRANCH)) == (0, True, None)

    path = root / ".github/CODEOWNERS"
    path.write_text("* @mona\n")
    api.forget()
    code, told = typed("--registry=s3://bucket/models", event="push")
    assert (code, "false" in told, api.requests) == (0, True, [])

    act.git(root, "checkout", "-q", "--", ".github/CODEOWNERS")
    assert typed()[0] == 0
    assert sorted(pull["state"] for pull in api.pulls.values()) == ["closed", "open"]


def test_where_jobs_may_open_no_pull_request_the_branch_is_there_and_the_click_is_named(
    api: GitHubApi, typed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """GitHub's default for a new repository: its first run is not red for that."""
    refusal = {"message": "GitHub Actions is not permitted to create or approve pull requests."}
    api.strike(Fault(kind="status", status=403, body=refusal), matches="POST pulls")
    code, told = typed()
    assert code == 0
    address = f"https://github.com/o/r/compare/main...{BRANCH}?expand=1"
    assert address in told
    assert "- [ ] " in told
    assert address in capsys.readouterr().err
    assert changed(api) == {".github/CODEOWNERS": "M"}

    assert typed()[0] == 0
    assert len(api.pulls) == 1


def test_a_branch_on_which_somebody_committed_is_left_alone(
    api: GitHubApi, typed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their work is not to be lost for a list of answers."""
    assert typed()[0] == 0
    theirs = api.git.commit(BRANCH, {".github/CODEOWNERS": "* @o/team\n"}, author="mona")
    assert typed("--registry=s3://bucket/models")[0] == 0
    assert api.git.head(BRANCH) == theirs
    assert "left as it is" in capsys.readouterr().err


def test_a_default_branch_that_has_moved_on_is_not_overwritten_by_what_was_read_before(
    api: GitHubApi, typed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever pushed meanwhile may have answered already."""
    api.git.commit("main", {".github/CODEOWNERS": "* @o/team\n"}, author="mona")
    assert typed()[0] == 75
    assert "somebody changed it in between" in capsys.readouterr().err
    assert not [each for each in api.requests if each.is_write]


def test_a_host_without_its_memory_and_a_dry_run_ask_github_nothing(
    api: GitHubApi, typed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hosted runner's memory is nobody's; and what would be proposed can be looked at."""
    assert typed("--host=desk", model=f"path:{OWN}")[0] == 2
    assert "--vram" in capsys.readouterr().err
    assert typed("--dry-run")[0] == 0
    assert "+++ b/.github/CODEOWNERS" in capsys.readouterr().out
    assert api.requests == []
