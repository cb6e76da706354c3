"""The check run on a commit: one word, the newest, with annotations within GitHub's limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from github_fixtures import client, serving

from pipelines.github.checks import Annotation, CheckRun, upsert_check
from pipelines.github.comments import Order

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from github_api import GitHubApi

    from pipelines.github.checks import Conclusion


@pytest.fixture
def api(tmp_path: Path) -> Iterator[GitHubApi]:
    """A stand-in with a repository."""
    with serving(tmp_path) as running:
        yield running


def say(
    api: GitHubApi,
    conclusion: Conclusion | None,
    order: Order,
    annotations: int = 0,
    token: str = "ghs_of-a-job",
) -> bool:
    """Say something about `feature`."""
    head = api.git.head("feature")
    assert head is not None
    notes = [Annotation(path="params.yaml", line=at + 1, message="m") for at in range(annotations)]
    check = CheckRun(
        title="t" * 400, summary="s" * 70_000, conclusion=conclusion, annotations=notes
    )
    return upsert_check(client(api, token=token), head, "fleet", check, order)


def test_measuring_becomes_the_verdict(api: GitHubApi) -> None:
    """One check run; its words are cut to GitHub's limits, and say so."""
    say(api, None, Order(5, 1, 0))
    say(api, "failure", Order(5, 1, 1), annotations=120)

    (check,) = api.check_runs.values()
    assert (check["status"], check["conclusion"]) == ("completed", "failure")
    assert [each["start_line"] for each in check["annotations"]] == list(range(1, 121))
    assert len(check["output"]["summary"]) <= 65_535
    assert "cut" in check["output"]["summary"][-100:]
    assert max(len(seen.body["output"].get("annotations", ())) for seen in api.requests
               if seen.is_write) == 50  # fmt: skip


def test_an_older_run_says_nothing(api: GitHubApi) -> None:
    """Whichever ends last."""
    assert say(api, "success", Order(6, 1, 1))
    assert not say(api, "failure", Order(5, 1, 1))

    assert [each["conclusion"] for each in api.check_runs.values()] == ["success"]


def test_annotations_of_an_older_run_do_not_stay_on_the_new_one(api: GitHubApi) -> None:
    """None can be taken back, so a new check run is made; GitHub shows the latest."""
    say(api, "failure", Order(5, 1, 1), annotations=2)
    say(api, "success", Order(5, 2, 1))

    newest = max(api.check_runs.values(), key=lambda each: each["id"])
    assert (newest["conclusion"], newest["annotations"]) == ("success", [])


def test_a_run_that_starts_again_is_shown_as_running(api: GitHubApi) -> None:
    """The verdict of the attempt before is not what counts now."""
    say(api, "success", Order(5, 1, 1))
    say(api, None, Order(5, 2, 0))

    newest = max(api.check_runs.values(), key=lambda each: each["id"])
    assert newest["status"] == "in_progress"


def test_a_check_run_of_another_app_is_not_changed(api: GitHubApi) -> None:
    """GitHub allows it to its App alone; ours is made beside it."""
    say(api, None, Order(5, 1, 0), token="ghs_of-an-app")
    say(api, "success", Order(5, 1, 1))

    assert [each["login"] for each in api.check_runs.values()] == [
        "fleet-of-octo[bot]",
        "github-actions[bot]",
    ]
