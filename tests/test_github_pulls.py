"""Pull requests that we open: found again, renewed, and what people wrote in them stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from github_fixtures import client, serving

from pipelines.github import pulls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from github_api import GitHubApi


@pytest.fixture
def api(tmp_path: Path) -> Iterator[GitHubApi]:
    """A stand-in with a repository."""
    with serving(tmp_path) as running:
        yield running


def renewed(api: GitHubApi, body: str, title: str = "Ledger") -> int:
    """Open or renew the pull request from `feature`."""
    pull = pulls.upsert_pull(
        client(api), head="feature", base="main", title=title, body=body, labels=["fleet"]
    )
    return int(pull["number"])


def test_what_people_wrote_around_our_part_stays(api: GitHubApi) -> None:
    """Before and after it; also labels, and line ends as browsers send them."""
    number = renewed(api, "first")
    pull = api.pulls[number]
    pull["body"] = f"Please wait.\r\n\r\n{pull['body']}\r\n\r\n- [x] looked at it"
    pull["labels"].append("hold")

    assert renewed(api, "second <!-- fleet:end --> tricky") == number

    assert pull["body"] == (
        "Please wait.\n\n<!-- fleet:begin -->\nsecond  tricky\n<!-- fleet:end -->\n\n"
        "- [x] looked at it"
    )
    assert pull["labels"] == ["fleet", "hold"]


def test_a_pull_request_without_our_part_gets_it_on_top(api: GitHubApi) -> None:
    """Opened by a person from our branch, or emptied."""
    number = api.add_pull("feature", body="my own words", title="Ledger")

    assert renewed(api, "ours") == number
    assert api.pulls[number]["body"].endswith("<!-- fleet:end -->\n\nmy own words")


def test_what_is_so_already_is_not_written_again(api: GitHubApi) -> None:
    """The job that is run again changes nothing."""
    renewed(api, "same")
    api.forget()
    renewed(api, "same")

    assert not [seen for seen in api.requests if seen.is_write]


def test_a_closed_pull_request_is_left_closed(api: GitHubApi) -> None:
    """A new one is opened."""
    first = renewed(api, "first")
    api.close_pull(first)

    assert renewed(api, "second") != first
    assert api.pulls[first]["state"] == "closed"


def test_a_branch_of_a_fork_with_the_same_name_is_not_ours(api: GitHubApi) -> None:
    """It is another one, whatever it is called."""
    theirs = api.add_pull("feature", sha=api.git.head("main"), head_repository="mallory/fleet")

    assert pulls.find_by_head(client(api), "feature") is None
    found = pulls.find_by_head(client(api), "feature", repository="mallory/fleet")
    assert found is not None
    assert found["number"] == theirs
    assert (
        pulls.find_by_head(client(api), "feature", repository="mallory/fleet", sha="0" * 40) is None
    )


def test_a_fork_of_the_same_owner_with_the_same_branch_is_not_ours(api: GitHubApi) -> None:
    """GitHub calls both `octo:feature`; nothing is written into theirs."""
    sha = api.git.head("feature")
    theirs = api.add_pull("feature", sha=sha, head_repository="octo/other", body="theirs")

    assert pulls.find_by_head(client(api), "feature") is None
    assert pulls.find_by_head(client(api), "feature", repository="octo/other") is not None
    assert api.pulls[theirs]["body"] == "theirs"


def test_a_body_beyond_githubs_limit_is_cut(api: GitHubApi) -> None:
    """Not refused."""
    number = renewed(api, "x" * 100_000)

    assert len(api.pulls[number]["body"]) == 65_536
