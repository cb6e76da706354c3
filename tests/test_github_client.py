"""The client of GitHub's API: limits, deadlines, pages, redirects, dry runs, and its token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from github_api import Fault, GitHubApi, Token
from github_fixtures import Clock, client, serving
from github_git import BareRepository
from node_tools import openapi

from pipelines.errors import FleetError, ParamsError, RetryLaterError
from pipelines.github.client import GitHub
from pipelines.github.errors import BusyError, GitHubError, UnknownOutcomeError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def api(tmp_path: Path) -> Iterator[GitHubApi]:
    """A stand-in with a repository."""
    with serving(tmp_path) as running:
        yield running


def test_a_list_of_250_comments_is_read_to_its_end(api: GitHubApi) -> None:
    """Pages are followed by GitHub's own links."""
    number = api.add_pull("feature")
    for at in range(250):
        api.add_comment(number, f"comment {at}")

    found = [each["body"] for each in client(api).paged(f"issues/{number}/comments")]

    assert found == [f"comment {at}" for at in range(250)]
    assert [seen.query.get("page") for seen in api.requests] == [None, "2", "3"]


def test_a_list_inside_an_object_is_read_to_its_end(api: GitHubApi) -> None:
    """Artifacts are listed beside their count."""
    for _ in range(120):
        api.add_artifact(7, "gate", b"")

    found = list(client(api).paged("actions/runs/7/artifacts", "artifacts"))

    assert len({each["id"] for each in found}) == 120


def test_a_page_on_another_host_is_not_fetched(api: GitHubApi, tmp_path: Path) -> None:
    """The token would go with it."""
    with serving(tmp_path / "other") as other:
        link = {"Link": f'<{other.url}/repos/octo/fleet/pulls?page=2>; rel="next"'}
        api.strike(Fault(kind="status", status=200, body=[], headers=link))

        with pytest.raises(GitHubError, match="another host"):
            list(client(api).paged("pulls"))

        assert other.requests == []


def test_pages_in_a_circle_end(api: GitHubApi) -> None:
    """A list whose next page is itself is refused."""
    link = {"Link": f'<{api.url}/repos/octo/fleet/pulls?per_page=100>; rel="next"'}
    api.strike(Fault(kind="status", status=200, body=[], headers=link))

    with pytest.raises(GitHubError, match="does not end"):
        list(client(api).paged("pulls"))


def test_what_did_not_change_is_not_sent_again(api: GitHubApi) -> None:
    """The second look costs a 304, which GitHub does not count."""
    gh = client(api)
    number = api.add_pull("feature")

    first, second = gh.get(f"pulls/{number}"), gh.get(f"pulls/{number}")
    api.pulls[number]["title"] = "Another one"
    third = gh.get(f"pulls/{number}")

    assert first == second
    assert third["title"] == "Another one"
    assert [seen.status for seen in api.requests] == [200, 304, 200]


def test_an_enterprise_server_is_spoken_to_below_its_own_path(tmp_path: Path) -> None:
    """https://HOST/api/v3 is the base there, for every page too."""
    with serving(tmp_path, base_path="/api/v3") as api:
        number = api.add_pull("feature")
        for at in range(150):
            api.add_comment(number, f"{at}")

        assert len(list(client(api).paged(f"issues/{number}/comments"))) == 150
        assert client(api).get("git/ref/heads/feature")["object"]["sha"]


@pytest.mark.parametrize(
    ("headers", "status", "at_least_s"),
    [
        ({"Retry-After": "7"}, 429, 7),
        ({"Retry-After": "7"}, 403, 7),
        ({}, 429, 60),
        ({"Retry-After": "3"}, 503, 3),
    ],
)
def test_a_limit_is_waited_for_as_long_as_github_asks(
    api: GitHubApi, headers: dict[str, str], status: int, at_least_s: float
) -> None:
    """Retry-After counts; a 429 without one is a minute."""
    clock = Clock()
    api.strike(Fault(kind="status", status=status, headers=headers))

    client(api, clock).get("git/ref/heads/main")

    assert len(clock.waited) == 1
    assert at_least_s <= clock.waited[0] < at_least_s + 1.5


def test_a_secondary_limit_without_a_time_is_waited_for_a_minute(api: GitHubApi) -> None:
    """GitHub says so in words alone."""
    clock = Clock()
    body = {"message": "You have exceeded a secondary rate limit. Please wait a few minutes."}
    api.strike(Fault(kind="status", status=403, body=body))
    number = api.add_pull("feature")

    client(api, clock).post(f"issues/{number}/comments", {"body": "once"})

    assert clock.waited == [60]
    assert len(api.comments_of(number)) == 1


def test_a_used_up_hour_is_not_waited_for_beyond_the_deadline(api: GitHubApi) -> None:
    """The error says how long GitHub asks to wait."""
    clock = Clock()
    reset = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(time.time()) + 1800)}
    api.strike(Fault(kind="status", status=403, headers=reset), times=-1)

    with pytest.raises(RetryLaterError, match=r"asks to wait 1[78]\d\d s"):
        client(api, clock).get("pulls")

    assert clock.waited == []


def test_a_refusal_names_the_permission_that_is_missing(api: GitHubApi) -> None:
    """403 and 404 of a token that may not; GitHub itself does not say which."""
    api.tokens[api.token] = Token("github-actions[bot]", {"contents": "read"})
    number = api.add_pull("feature")
    gh = client(api)

    with pytest.raises(GitHubError, match="not accessible") as comment:
        gh.post(f"issues/{number}/comments", {"body": "x"})
    with pytest.raises(GitHubError) as check:
        gh.post("check-runs", {"name": "fleet", "head_sha": api.head_of(number)})
    with pytest.raises(GitHubError) as ref:
        gh.post("git/refs", {"ref": "refs/heads/x", "sha": api.head_of(number)})
    with pytest.raises(GitHubError) as runners:
        gh.get("actions/runners")

    assert "`pull-requests (or issues): write`" in comment.value.hint
    assert "`checks: write`" in check.value.hint
    assert "`contents: write`" in ref.value.hint
    assert "`administration: read`" in runners.value.hint
    assert "App" in runners.value.hint


def test_a_wrong_token_is_said_to_be_wrong(api: GitHubApi) -> None:
    """And it is not repeated."""
    with pytest.raises(GitHubError, match="401") as caught:
        client(api, token="ghs_expired").get("pulls")

    assert "expired" in caught.value.hint
    assert len(api.requests) == 1


@pytest.mark.parametrize("kind", ["refuse", "hang", "cut", "status", "lose"])
def test_a_read_survives_a_fault_that_passes(api: GitHubApi, kind: str) -> None:
    """Broken, silent, half and 500: asked again."""
    api.strike(Fault(kind=kind, status=502), times=2)  # type: ignore[arg-type]

    gh = client(api, answer_within_s=1 if kind == "hang" else 20)
    assert gh.get("git/ref/heads/main")["ref"] == "refs/heads/main"
    assert len(api.requests) == 3


def test_what_never_answers_is_given_up_at_the_deadline(
    api: GitHubApi, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the number of attempts and the last reason; that there is a wait is said, once."""
    clock = Clock()
    api.strike(Fault(kind="status", status=500, body={"message": "Server Error"}), times=-1)

    with pytest.raises(RetryLaterError, match=r"500 \(Server Error\), after \d+ attempts in 180 s"):
        client(api, clock).get("pulls")

    assert clock.now_s <= 180
    assert len(clock.waited) > 5
    assert capsys.readouterr().err.count("500 (Server Error); going on for 1") == 1


def test_a_comment_whose_answer_was_lost_is_not_written_twice(api: GitHubApi) -> None:
    """The caller hears that nobody knows, and looks."""
    number = api.add_pull("feature")
    api.strike(Fault(kind="lose"))

    with pytest.raises(UnknownOutcomeError, match="nobody knows"):
        client(api).post(f"issues/{number}/comments", {"body": "x"})

    assert len(api.comments_of(number)) == 1


def test_an_impatient_change_says_how_long_to_wait(api: GitHubApi) -> None:
    """Its caller looks again before it writes."""
    number = api.add_pull("feature")
    comment = api.add_comment(number, "x")
    api.strike(Fault(kind="status", status=429, headers={"Retry-After": "9"}))

    with pytest.raises(BusyError) as caught:
        client(api).patch(f"issues/comments/{comment}", {"body": "y"}, patient=False)

    assert 9 <= caught.value.pause_s < 10


def test_a_dry_run_prints_every_change_and_makes_none(
    api: GitHubApi, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method, path and JSON; reading goes on."""
    gh = client(api, dry_run=True)
    before = api.state()

    made = gh.post("git/refs", {"ref": "refs/heads/x", "sha": "1" * 40})
    gh.patch(f"pulls/{made['number']}", {"t": "a\n::error::b"})
    gh.put("x", {})
    gh.delete("git/refs/heads/main")

    assert api.state() == before
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f'POST /repos/octo/fleet/git/refs {{"ref": "refs/heads/x", "sha": "{"1" * 40}"}}',
        'PATCH /repos/octo/fleet/pulls/(number of a dry run) {"t": "a\\n:\u200b:error:\u200b:b"}',
        "PUT /repos/octo/fleet/x {}",
        "DELETE /repos/octo/fleet/git/refs/heads/main",
    ]
    assert gh.get("git/ref/heads/main")["ref"] == "refs/heads/main"


def test_an_artifact_comes_from_another_host_without_the_token(api: GitHubApi) -> None:
    """The storage refuses a request that has one; so does the stand-in's."""
    made = api.add_artifact(7, "gate", {"gate.json": "{}"})

    data = client(api).download(f"actions/artifacts/{made}/zip", 1000)

    assert data == api.artifacts[made].data
    storage = api.requests[-1]
    assert storage.path.startswith("/storage/")
    assert "authorization" not in storage.headers
    assert "cookie" not in storage.headers


def test_an_artifact_beyond_its_limit_is_not_read(api: GitHubApi) -> None:
    """However much there is."""
    made = api.add_artifact(7, "gate", b"x" * 100_000)

    with pytest.raises(GitHubError, match="more than 1000 bytes"):
        client(api).download(f"actions/artifacts/{made}/zip", 1000)


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "//", "http://169.254.169.254/x"]
)
def test_a_storage_that_is_none_is_not_asked(location: str) -> None:
    """Only https, and never this machine or its cloud's own address."""
    from pipelines.github import client as module  # noqa: PLC0415 - a part of it alone

    with pytest.raises(GitHubError, match="nothing is read"):
        module._require_secure(location, "https://api.github.com", "x")


def test_an_answer_without_an_end_is_cut_off(api: GitHubApi) -> None:
    """At the size that makes sense."""
    api.strike(Fault(kind="status", status=200, body="x" * 5000))
    gh = client(api)

    with pytest.raises(GitHubError, match="more than 4000 bytes"):
        gh._asked(gh._request("GET", "pulls"), limit_bytes=4000)


def test_a_login_page_is_no_answer(api: GitHubApi) -> None:
    """A proxy shows it with 200."""
    api.strike(Fault(kind="html"))

    with pytest.raises(GitHubError, match="is no JSON") as caught:
        client(api).get("pulls")

    assert "proxy" in caught.value.hint


def test_a_renamed_repository_is_found_and_another_host_is_not(
    api: GitHubApi, tmp_path: Path
) -> None:
    """A redirect on the same host is followed, for what only reads."""
    moved = {"Location": f"{api.url}/repos/octo/fleet/git/ref/heads/main"}
    api.strike(Fault(kind="status", status=301, headers=moved))
    assert client(api).get("git/ref/heads/old")["ref"] == "refs/heads/main"

    with serving(tmp_path / "other") as other:
        api.forget()
        elsewhere = {"Location": f"{other.url}/repos/octo/fleet/git/ref/heads/main"}
        api.strike(Fault(kind="status", status=301, headers=elsewhere))
        with pytest.raises(GitHubError, match="redirect elsewhere"):
            client(api).get("git/ref/heads/main")
        assert other.requests == []


def test_the_token_is_in_no_error_no_log_and_no_dry_run(
    api: GitHubApi, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even where GitHub, or something in its place, says it back."""
    secret = api.token
    echo = {"message": f"Bad: {secret}", "errors": [{"message": secret}]}
    texts = [repr(client(api))]
    for status in (401, 403, 422, 500):
        api.strike(Fault(kind="status", status=status, body=echo), times=-1)
        with pytest.raises(FleetError) as caught:
            client(api).get("pulls")
        texts += [caught.value.message, caught.value.hint]
        api.forget()
    with pytest.raises(FleetError) as caught:
        _closed(api)
    texts.append(caught.value.message)
    client(api, dry_run=True).post("issues", {"title": "x"})
    shown = capsys.readouterr()

    assert not [text for text in [*texts, shown.out, shown.err] if secret in text]


def _closed(api: GitHubApi) -> None:
    """Ask where nobody listens."""
    clock = Clock()
    gh = GitHub(
        api.repository, api.token, api_url="http://127.0.0.1:9", sleep=clock.sleep, clock=clock
    )
    gh.get("pulls")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("GITHUB_REPOSITORY", "fleet", "OWNER/NAME"),
        ("GITHUB_REPOSITORY", "octo/..", "OWNER/NAME"),
        ("GITHUB_REPOSITORY", "octo/fleet/pulls", "OWNER/NAME"),
        ("GITHUB_TOKEN", "", "empty"),
        ("GITHUB_TOKEN", "a\nb", "line end"),
        ("GITHUB_API_URL", "http://github.example/api/v3", "in clear"),
        ("GITHUB_API_URL", "https://user:pass@github.example", "no address"),
        ("GITHUB_API_URL", "file:///etc", "no address"),
    ],
)
def test_an_environment_that_cannot_be_is_refused_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, match: str
) -> None:
    """Each with the variable's name; never with the token."""
    for key, good in (
        ("GITHUB_REPOSITORY", "octo/fleet"),
        ("GITHUB_TOKEN", "ghs_x"),
        ("GITHUB_API_URL", "https://api.github.com"),
    ):
        monkeypatch.setenv(key, good)
    monkeypatch.setenv(name, value)

    with pytest.raises(ParamsError, match=match) as caught:
        GitHub.from_environment()

    assert name in caught.value.message


def test_the_environment_of_a_job_is_enough(
    api: GitHubApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GITHUB_API_URL, GITHUB_REPOSITORY, GITHUB_TOKEN; a line end after the token is no harm."""
    for name, value in api.environment(f"{api.token}\n").items():
        monkeypatch.setenv(name, value)

    assert GitHub.from_environment().get("git/ref/heads/main")["object"]["type"] == "commit"


def test_a_path_that_leads_elsewhere_is_refused(api: GitHubApi) -> None:
    """Text of strangers becomes part of paths."""
    with pytest.raises(GitHubError, match="is no path"):
        client(api).get("contents/../../../user")

    assert api.requests == []


def test_the_stand_in_refuses_what_github_does_not_know(tmp_path: Path) -> None:
    """An unknown path, parameter or property fails the test that sent it."""
    with serving(tmp_path) as api:
        gh = client(api, deadline_s=0.0)
        for path, body in (
            ("pulls", {"title": "x", "head": "feature", "base": "main", "colour": "red"}),
            ("no-such-thing", {}),
            ("check-runs", {"name": "x"}),
            ("issues", {"title": ["x"]} | {"labels": 7}),
        ):
            with pytest.raises(FleetError):
                gh.post(path, body)
        with pytest.raises(FleetError):
            gh.get("pulls", colour="red")
        found = list(api.violations)
        api.violations.clear()

    assert len(found) >= 5
    assert "'colour'" in found[0]
    assert "does not know" in found[1]
    assert "head_sha" in found[2]
    assert json.dumps(found)


def test_the_stand_in_runs_as_a_process_of_its_own(tmp_path: Path) -> None:
    """For workflows that are run by another program: state in a file, artifacts by PUT."""
    openapi()
    git, state = tmp_path / "o.git", tmp_path / "state.json"
    repository = BareRepository.create(git)
    repository.commit("main", {"params.yaml": "a: 1\n"})
    repository.commit("feature", {"params.yaml": "a: 2\n"})
    root = Path(__file__).resolve().parent.parent
    argv = [sys.executable, "tests/github_api.py", "--git", str(git), "--state", str(state)]
    with subprocess.Popen(
        [*argv, "--pulls", '[{"branch": "feature"}]'],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            gh = GitHub("octo/fleet", "ghs_of-a-job", api_url=url)
            gh.post("issues/1/comments", {"body": "hello"})
            with urllib.request.urlopen(
                urllib.request.Request(f"{url}/_stand-in/artifacts/gate?run=7", b"PK", method="PUT")
            ) as answer:
                made = json.loads(answer.read())["id"]
            assert gh.download(f"actions/artifacts/{made}/zip", 10) == b"PK"
        finally:
            process.terminate()

    left = json.loads(state.read_text())
    assert [each["body"] for each in left["comments"]] == ["hello"]
    assert left["violations"] == []
