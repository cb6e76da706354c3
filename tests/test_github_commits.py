"""Files to a branch as one commit: what lands there, and what somebody else pushed stays."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from github_api import Fault, GitHubApi, Seen
from github_fixtures import NEW_PARAMS, PARAMS, client, serving

from pipelines.github import commits
from pipelines.github.errors import GitHubError, MovedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def api(tmp_path: Path) -> Iterator[GitHubApi]:
    """A stand-in with a repository."""
    with serving(tmp_path) as running:
        yield running


def head_of(api: GitHubApi, branch: str = "feature") -> str:
    """Return the commit of a branch."""
    found = api.git.head(branch)
    assert found is not None
    return found


def at(api: GitHubApi, pattern: str, act: Callable[[], object]) -> None:
    """Do something once, as the first request that fits arrives."""
    arrived, done = api.arrived, list[Seen]()

    def watching(seen: Seen) -> Fault | None:
        if not done and re.match(pattern, str(seen)):
            done.append(seen)
            act()
        return arrived(seen)

    api.arrived = watching  # type: ignore[method-assign]


def test_records_become_one_commit_on_top_of_what_was_measured(api: GitHubApi) -> None:
    """Added, changed, removed, binary, with any name and byte for byte; the rest stays."""
    parent = head_of(api)
    files = {
        "results/m/new.json": b'{"a": 1}\r\n',
        "results/m/old.json": None,
        "results/m/gone-already.json": None,
        "results/m/empty": b"",
        "results/m/bin": b"\xff\x00\x01",
        "results/m/control": b"a\x00b\x1b",
        "results/\u00fc mit Leerzeichen/#?%.json": "\u2713".encode(),
        "dvc.lock": b"schema: '2.0'\n",
    }

    made = commits.commit_files(client(api), "feature", files, "Evidence\n\nof m", parent=parent)

    assert head_of(api) == made
    assert api.git.files("feature") == {
        "params.yaml": NEW_PARAMS.encode(),
        **{path: content for path, content in files.items() if content is not None},
    }
    assert api.git.text("show", "-s", "--format=%P", made) == parent
    assert api.git.text("show", "-s", "--format=%B", made) == "Evidence\n\nof m"


def test_hundreds_of_records_are_a_handful_of_requests(api: GitHubApi) -> None:
    """GitHub gives a job's token a thousand requests an hour."""
    files: dict[str, bytes | None] = {f"results/m/{at}.json": b"{}" for at in range(700)}

    commits.commit_files(client(api), "feature", files, "Evidence", parent=head_of(api))

    assert len(api.git.files("feature")) == 702
    assert len(api.requests) < 10


def test_what_is_there_already_makes_no_commit(api: GitHubApi) -> None:
    """The job that is run again changes nothing."""
    parent = head_of(api)

    same = commits.commit_files(
        client(api), "feature", {"params.yaml": NEW_PARAMS.encode()}, "x", parent=parent
    )

    assert same == parent == head_of(api)


def test_a_branch_that_moved_before_is_left_as_it_is(api: GitHubApi) -> None:
    """The typed error says where it is now."""
    parent = head_of(api)
    pushed = api.git.commit("feature", {"a": "b"})

    with pytest.raises(MovedError, match="somebody changed it") as caught:
        commits.commit_files(client(api), "feature", {"x": b"y"}, "x", parent=parent)

    assert caught.value.found == pushed == head_of(api)
    assert not [seen for seen in api.requests if seen.is_write]


@pytest.mark.parametrize("when", ["POST git/trees", "POST git/commits", "PATCH"])
def test_a_push_in_between_stays(api: GitHubApi, when: str) -> None:
    """At whichever of our requests it comes."""
    parent = head_of(api)
    pushed: list[str] = []
    at(api, when, lambda: pushed.append(api.git.commit("feature", {"theirs": "b"})))

    with pytest.raises(MovedError) as caught:
        commits.commit_files(client(api), "feature", {"ours": b"y"}, "x", parent=parent)

    assert [caught.value.found] == pushed == [head_of(api)]
    assert "ours" not in api.git.files("feature")


def test_a_branch_that_was_forced_elsewhere_stays_there(api: GitHubApi) -> None:
    """Rebased while it was measured."""
    parent = head_of(api)
    other = api.git.commit_tree(
        api.git.text("rev-parse", "main^{tree}"), [head_of(api, "main")], "o"
    )
    at(api, "POST git/commits", lambda: api.git.git("update-ref", "refs/heads/feature", other))

    with pytest.raises(MovedError):
        commits.commit_files(client(api), "feature", {"ours": b"y"}, "x", parent=parent)

    assert head_of(api) == other


def test_a_branch_that_is_gone_is_not_made_anew(api: GitHubApi) -> None:
    """Merged and deleted while it was measured."""
    parent = head_of(api)
    at(api, "PATCH", lambda: api.git.git("update-ref", "-d", "refs/heads/feature"))

    with pytest.raises(MovedError, match="is gone") as caught:
        commits.commit_files(client(api), "feature", {"ours": b"y"}, "x", parent=parent)

    assert caught.value.found is None
    assert api.git.head("feature") is None


def test_a_move_whose_answer_was_lost_is_a_success(api: GitHubApi) -> None:
    """Moving a branch twice to one commit is moving it once."""
    api.strike(Fault(kind="lose"), matches="PATCH")

    made = commits.commit_files(client(api), "feature", {"a": b"b"}, "x", parent=head_of(api))

    assert head_of(api) == made


@pytest.mark.parametrize("name", ["bump/m", "wip#1", "x;rm-rf$HOME", "\u00fc%2Fx", "`id`"])
def test_branches_with_any_name_are_made_and_moved(api: GitHubApi, name: str) -> None:
    """Names of branches are text of strangers; git itself refuses the worst."""
    gh, sha = client(api), head_of(api, "main")

    commits.create_branch(gh, name, sha)
    commits.create_branch(gh, name, sha)
    made = commits.commit_files(gh, name, {"a": b"b"}, "x", parent=sha)
    assert commits.branch_head(gh, name) == made == head_of(api, name)
    with pytest.raises(MovedError):
        commits.create_branch(gh, name, sha)


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../b", "a//b", ".git/config", "a/"])
def test_a_path_that_leads_out_of_the_repository_is_refused(api: GitHubApi, path: str) -> None:
    """Before anything is sent that changes something."""
    with pytest.raises(GitHubError, match="no path of a file"):
        commits.commit_files(client(api), "feature", {path: b"x"}, "x", parent=head_of(api))

    assert not [seen for seen in api.requests if seen.is_write]


def test_a_file_is_read_at_a_commit(api: GitHubApi) -> None:
    """By git's own name of it; within a limit."""
    gh, main = client(api), head_of(api, "main")

    assert commits.read_file(gh, "params.yaml", main) == PARAMS.encode()
    assert commits.read_file(gh, "params.yaml", head_of(api)) == NEW_PARAMS.encode()
    assert commits.read_file(gh, "no-such-file", main) is None
    assert commits.blob_sha(gh, "results", main) is None
    assert commits.blob_sha(gh, "params.yaml", main) == api.git.text(
        "rev-parse", "main:params.yaml"
    )
    with pytest.raises(GitHubError, match="more than 5"):
        commits.read_file(gh, "params.yaml", main, limit_bytes=5)
