"""One issue for one subject, and the runners that most of them are about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from github_fixtures import client, serving

from pipelines.github import runners
from pipelines.github.errors import GitHubError
from pipelines.github.issues import close_issue, marker_line, open_issues, upsert_issue

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from github_api import GitHubApi

MARKER = "fleet:runner gpu-1"
APP = "ghs_of-an-app"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[GitHubApi]:
    """A stand-in with a repository."""
    with serving(tmp_path) as running:
        yield running


def say(api: GitHubApi, body: str, marker: str = MARKER) -> int:
    """Leave an issue."""
    return upsert_issue(client(api), marker=marker, label="runner", title="Sick", body=body)


def test_a_subject_has_one_issue_that_is_renewed(api: GitHubApi) -> None:
    """Another subject has its own; a second one of the same is closed."""
    first = say(api, "disk full")
    other = say(api, "offline", "fleet:runner gpu-2")
    twin = api.add_issue("Sick", f"{marker_line(MARKER)}\ntwin", ["runner"])

    assert say(api, "disk full, and hot") == first

    assert api.issues[first]["body"] == f"{marker_line(MARKER)}\ndisk full, and hot"
    assert api.issues[twin]["state"] == "closed"
    assert api.issues[other]["state"] == "open"


def test_an_issue_is_closed_with_the_reason_and_opened_anew_later(api: GitHubApi) -> None:
    """One that is closed stays as it is."""
    first = say(api, "disk full")

    closed = close_issue(client(api), marker=MARKER, label="runner", reason="It has room again.")
    again = close_issue(client(api), marker=MARKER, label="runner", reason="never said")

    assert (closed, again) == (1, 0)
    assert api.issues[first]["state"] == "closed"
    assert api.issues[first]["body"].endswith("It has room again.")
    assert say(api, "disk full again") != first


def test_an_issue_of_a_person_is_not_ours(api: GitHubApi) -> None:
    """Whatever it begins with; and a pull request is no issue."""
    api.add_issue("Sick", f"{marker_line(MARKER)}\nforged", ["runner"], login="mallory")
    api.pulls[api.add_pull("feature", body=marker_line(MARKER))]["labels"].append("runner")

    assert open_issues(client(api), "runner") == []


def test_runners_are_told_with_their_state(api: GitHubApi) -> None:
    """Labels are compared in lower case, as GitHub does."""
    api.add_runner("gpu-1", ["self-hosted", "GPU"], busy=True, version="2.336.0")
    api.add_runner("gpu-2", ["self-hosted"], status="offline")

    first, second = runners.runners(client(api, token=APP))

    assert (first.name, first.online, first.busy) == ("gpu-1", True, True)
    assert first.labels == {"self-hosted", "gpu"}
    assert first.version == "2.336.0"
    assert (second.online, second.version) == (False, None)


def test_the_token_of_a_job_may_not_ask_for_runners(api: GitHubApi) -> None:
    """The error says which token may."""
    with pytest.raises(GitHubError) as caught:
        runners.runners(client(api))

    assert "App" in caught.value.hint


def test_a_version_that_github_says_nothing_of_is_none(api: GitHubApi) -> None:
    """The call is newer than GitHub's description, and than many servers."""
    api.deprecations["2.329.0"] = {"deprecation_date": "2026-09-25"}
    gh = client(api, token=APP)

    assert runners.deprecation(gh, "2.329.0") == {"deprecation_date": "2026-09-25"}
    assert runners.deprecation(gh, "2.400.0") is None
