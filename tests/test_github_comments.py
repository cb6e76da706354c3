"""One comment on a pull request: whoever races, whoever deletes, whichever run comes last."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from github_api import ACTIONS, Fault, GitHubApi, Seen
from github_fixtures import client, patient_client, serving

from pipelines.errors import RetryLaterError
from pipelines.github.comments import Order, marker_line, upsert_comment
from pipelines.github.errors import GitHubError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MARKER = "fleet:report"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[GitHubApi]:
    """A stand-in with one pull request, number 1."""
    with serving(tmp_path) as running:
        running.add_pull("feature")
        yield running


def say(api: GitHubApi, body: str, order: Order, **options: Any) -> bool:
    """Leave a comment, as a report does."""
    return upsert_comment(client(api, **options), 1, MARKER, body, order, settle_s=0.0)


def bodies(api: GitHubApi) -> list[str]:
    """Return the comments there are, without markers."""
    return [each["body"].partition("-->\n")[2] or each["body"] for each in api.comments_of(1)]


def test_a_second_report_changes_the_comment_of_the_first(api: GitHubApi) -> None:
    """No new comment, so nobody is told again."""
    assert say(api, "measuring", Order(5, 1, 0))
    first = api.comments_of(1)[0]["id"]
    assert say(api, "PROMOTE", Order(5, 1, 1))

    assert [(each["id"], each["body"]) for each in api.comments_of(1)] == [
        (first, f"{marker_line(MARKER, Order(5, 1, 1))}\nPROMOTE")
    ]


@pytest.mark.parametrize(
    ("newer", "older"),
    [
        (Order(6, 1, 0), Order(5, 1, 1)),
        (Order(5, 2, 0), Order(5, 1, 1)),
        (Order(5, 1, 1), Order(5, 1, 0)),
        (Order(10, 1, 0), Order(9, 9, 1)),
    ],
)
def test_an_older_run_that_ends_later_overwrites_nothing(
    api: GitHubApi, newer: Order, older: Order
) -> None:
    """Run, attempt and phase, compared as numbers."""
    say(api, "newer", newer)

    assert not say(api, "older", older)
    assert bodies(api) == ["newer"]


def test_the_same_report_twice_writes_nothing(api: GitHubApi) -> None:
    """A job that is run again finds its own words."""
    say(api, "PROMOTE", Order(5, 1, 1))
    api.forget()

    assert say(api, "PROMOTE", Order(5, 1, 1))
    assert not [seen for seen in api.requests if seen.is_write]


def test_a_comment_of_ours_among_250_is_found(api: GitHubApi) -> None:
    """On whichever page it is."""
    for at in range(140):
        api.add_comment(1, f"a word {at}", "mona")
    say(api, "measuring", Order(5, 1, 0))
    for at in range(110):
        api.add_comment(1, f"another word {at}", "mona")

    say(api, "PROMOTE", Order(5, 1, 1))

    assert len(api.comments_of(1)) == 251
    assert bodies(api).count("PROMOTE") == 1


def test_a_comment_that_quotes_ours_or_pretends_to_be_ours_stays(api: GitHubApi) -> None:
    """Ours begins with the marker and is by our login; a person can write anything."""
    forged = f"{marker_line(MARKER, Order(999999, 1, 1))}\nPROMOTE, believe me"
    quoted = f"> {marker_line(MARKER, Order(4, 1, 1))}\nwhat is this?"
    other = "<!-- fleet:other run=1 attempt=1 phase=1 -->\nanother comment of ours"
    api.add_comment(1, forged, "mallory")
    api.add_comment(1, forged, "reflector[bot]")
    api.add_comment(1, quoted, ACTIONS)
    api.add_comment(1, other, ACTIONS)

    say(api, "REJECT", Order(5, 1, 1))

    texts = [each["body"] for each in api.comments_of(1)]
    assert texts[:4] == [forged, forged, quoted, other]
    assert texts[4].endswith("REJECT")
    assert len(texts) == 5


def test_a_comment_that_a_person_deleted_in_between_is_written_anew(api: GitHubApi) -> None:
    """Between our look and our change: 404."""
    say(api, "measuring", Order(5, 1, 0))
    there = api.comments_of(1)[0]["id"]
    on(api, "PATCH", lambda: api.comments.pop(there, None))

    assert say(api, "PROMOTE", Order(5, 1, 1))
    assert bodies(api) == ["PROMOTE"]


def test_a_newer_report_while_github_makes_us_wait_is_not_overwritten(api: GitHubApi) -> None:
    """A change that was refused for a limit is not repeated blindly."""
    say(api, "measuring", Order(5, 1, 0))
    api.strike(Fault(kind="status", status=429, headers={"Retry-After": "5"}), matches="PATCH")
    newer = f"{marker_line(MARKER, Order(6, 1, 1))}\nof the newer run"
    on(api, "PATCH", lambda: api.comments_of(1)[0].update(body=newer))

    assert not say(api, "of the older run", Order(5, 1, 1))
    assert bodies(api) == ["of the newer run"]


def test_a_newer_report_that_an_older_one_overwrote_is_restored(api: GitHubApi) -> None:
    """GitHub cannot compare and set: after a write we look once more."""
    say(api, "measuring", Order(5, 1, 0))
    older = f"{marker_line(MARKER, Order(5, 1, 1))}\nolder, written after its look"
    overwritten: list[int] = []

    def pause(_: float) -> None:
        if not overwritten:
            overwritten.append(1)
            api.comments_of(1)[0].update(body=older)

    gh = client(api, sleep=pause)
    assert upsert_comment(gh, 1, MARKER, "of run 6", Order(6, 1, 1), settle_s=1.0)

    assert bodies(api) == ["of run 6"]


def test_of_100_racing_pairs_one_comment_is_left(tmp_path: Path) -> None:
    """An older and a newer report of the same moment, a hundred times; the newer one stays."""
    with serving(tmp_path) as api:
        numbers = [api.add_pull("feature") for _ in range(100)]

        def race(number: int) -> None:
            barrier = threading.Barrier(2)

            def one(order: Order) -> None:
                gh = patient_client(api)
                barrier.wait()
                time.sleep(random.uniform(0, 0.01))
                upsert_comment(gh, number, MARKER, f"{order.run_id}", order, settle_s=0.15)

            orders = [Order(5, 1, 1), Order(6, 1, 1)]
            with ThreadPoolExecutor(2) as both:
                list(both.map(one, orders))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(race, numbers))

        left = [[each["body"] for each in api.comments_of(number)] for number in numbers]
        assert [len(each) for each in left] == [1] * 100
        assert {each[0].partition("-->\n")[2] for each in left} == {"6"}


def test_twenty_reports_at_once_leave_the_newest(api: GitHubApi) -> None:
    """All of them find nothing, and all of them write."""
    barrier = threading.Barrier(20)

    def one(run_id: int) -> None:
        gh = patient_client(api)
        barrier.wait()
        upsert_comment(gh, 1, MARKER, f"{run_id}", Order(run_id, 1, 1), settle_s=1.0)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(one, range(20)))

    assert bodies(api) == ["19"]


def test_an_apps_token_without_a_name_finds_its_older_comment(
    api: GitHubApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is what GitHub answers to its first comment, or what the workflow tells."""
    token = "ghs_of-an-app"
    say(api, "measuring", Order(5, 1, 0), token=token)
    say(api, "PROMOTE", Order(5, 1, 1), token=token)
    assert bodies(api) == ["PROMOTE"]

    monkeypatch.setenv("FLEET_APP_SLUG", "fleet-of-octo")
    api.forget()
    say(api, "HOLD", Order(6, 1, 1), token=token)
    assert bodies(api) == ["HOLD"]
    assert not [seen for seen in api.requests if seen.method == "POST"]


def test_a_person_may_report_too(api: GitHubApi) -> None:
    """Whose login GitHub tells."""
    say(api, "a", Order(5, 1, 0), token="ghp_of-a-person")
    say(api, "b", Order(5, 1, 1), token="ghp_of-a-person")

    assert [each["login"] for each in api.comments_of(1)] == ["mona"]
    assert bodies(api) == ["b"]


def test_a_locked_conversation_is_said(api: GitHubApi) -> None:
    """Nothing else would tell why there is no comment."""
    body = {"message": "Unable to create comment because issue is locked."}
    api.strike(Fault(kind="status", status=403, body=body), matches="POST")

    with pytest.raises(GitHubError, match="locked"):
        say(api, "x", Order(5, 1, 1))


def test_something_that_writes_the_same_comment_for_ever_is_named(api: GitHubApi) -> None:
    """The report gives up; it does not fight without an end."""
    on(api, "GET .*comments", lambda: [each.update(body="<!-- x") for each in api.comments_of(1)])

    with pytest.raises(RetryLaterError, match="change as fast"):
        say(api, "x", Order(5, 1, 1))


def test_a_run_that_waits_stands_back_for_one_that_still_measures(api: GitHubApi) -> None:
    """Its commit is that of the records of the other one, whose numbers are still to come."""
    say(api, "measuring", Order(5, 1, 0))

    assert not upsert_comment(
        client(api), 1, MARKER, "waits", Order(6, 1, 0), keep_ended=True, settle_s=0.0
    )
    assert say(api, "PROMOTE", Order(5, 1, 1))
    assert bodies(api) == ["PROMOTE"]


def on(api: GitHubApi, pattern: str, act: Any) -> None:
    """Do something as each request that fits arrives, before it is answered."""
    import re  # noqa: PLC0415 - here alone

    arrived = api.arrived

    def watching(seen: Seen) -> Fault | None:
        if re.match(pattern, str(seen)):
            act()
        return arrived(seen)

    api.arrived = watching  # type: ignore[method-assign]
