"""A look at upstream in a workflow: the record of the last run, the next jobs, the one issue."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from github_fixtures import client, serving

from pipelines import check_upstream, records, upstream_github, upstream_issues
from pipelines.github.artifacts import MAX_ZIP_BYTES
from pipelines.layout import Layout
from pipelines.upstream_records import EngineUpstream, ModelUpstream, UpstreamRecord

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from github_api import GitHubApi

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
RUN = {
    "path": ".github/workflows/check-upstream.yml",
    "event": "schedule",
    "head_branch": "main",
    "head_repository": {"full_name": "octo/fleet"},
}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[GitHubApi]:
    """A stand-in with a repository whose runs are those of a test."""
    with serving(tmp_path) as running:
        yield running


def model(name: str, state: Any = "current", **fields: Any) -> ModelUpstream:
    """What a look found of a model."""
    return ModelUpstream(
        model=name, source=f"hf:acme/{name}", track="main", pinned="1" * 40, state=state,
        **{"reason": "nothing moved", **fields},
    )  # fmt: skip


def record(*models: ModelUpstream, **fields: Any) -> UpstreamRecord:
    """What a look found."""
    return UpstreamRecord(checked_at=NOW, requests_count=len(models), models=models, **fields)


def left(api: GitHubApi, number: int, found: UpstreamRecord | str, **fields: Any) -> int:
    """Let a run leave a record behind; fields are those of the run."""
    api.runs[number] = RUN | fields
    text = found if isinstance(found, str) else found.model_dump_json()
    return api.add_artifact(number, "upstream", {"upstream.json": text})


# --- the record of the last run ---------------------------------------------------------------


def test_a_look_goes_on_from_the_newest_record_of_the_default_branch(api: GitHubApi) -> None:
    """A run that left none, as one that failed early, hides no older one."""
    left(api, 5, record(model("old")))
    left(api, 6, record(model("tiny")), path=f"{RUN['path']}@main")
    api.runs[7] = dict(RUN)

    found = upstream_github.previous(client(api))

    assert found == record(model("tiny"))


def test_without_an_earlier_run_there_is_no_record(api: GitHubApi) -> None:
    """The first look of a fork: the workflow may not even have a name on GitHub yet."""
    assert upstream_github.previous(client(api)) is None
    api.runs[5] = dict(RUN)
    assert upstream_github.previous(client(api)) is None


@pytest.mark.parametrize(
    "run",
    [
        {"head_repository": {"full_name": "stranger/fleet"}},
        {"head_branch": "feature"},
        {"event": "pull_request"},
        {"event": "push"},
        {"path": ".github/workflows/check-upstream.yml@refs/heads/feature"},
    ],
    ids=["a fork's branch main", "another branch", "a pull request", "a push", "a branch's"],
)
def test_a_record_that_a_stranger_could_have_written_is_not_looked_at(
    api: GitHubApi, run: dict[str, Any]
) -> None:
    """It could say that a repository was always the one that it is now."""
    left(api, 5, record(model("tiny")))
    left(api, 6, record(model("forged")), **run)

    found = upstream_github.previous(client(api))

    assert found == record(model("tiny"))
    assert not any("artifacts/" in str(each) and "/6/" in each.path for each in api.requests)


@pytest.mark.parametrize(
    "text",
    ['{"checked_at": 5}', "no JSON", "{}", '{"a": 1, "a": 2}', "[]"],
)
def test_a_record_that_is_none_is_passed_over_with_a_word(
    api: GitHubApi, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The look goes on from the one before it."""
    left(api, 5, record(model("tiny")))
    left(api, 6, text)

    assert upstream_github.previous(client(api)) == record(model("tiny"))
    assert "The record of run 6 is passed over" in capfd.readouterr().err


def test_an_artifact_that_is_too_large_or_was_changed_is_passed_over(api: GitHubApi) -> None:
    """Size and digest are those that GitHub recorded."""
    made = left(api, 5, record(model("tiny")))
    api.artifacts[made].size_bytes = MAX_ZIP_BYTES + 1
    assert upstream_github.previous(client(api)) is None
    api.artifacts[made].size_bytes = None
    api.artifacts[made].digest = f"sha256:{'0' * 64}"
    assert upstream_github.previous(client(api)) is None
    api.artifacts[made].digest = None
    api.artifacts[made].expired = True
    assert upstream_github.previous(client(api)) is None


# --- which jobs have something to do ----------------------------------------------------------


def engine(state: Any) -> EngineUpstream:
    """What a look found of an engine."""
    return EngineUpstream(engine="ollama", pinned="0.33.0", state=state, reason="newer")


@pytest.mark.parametrize(
    ("found", "work"),
    [
        (record(model("tiny")), (False, False)),
        (record(model("tiny", "waiting"), model("b", "ignored")), (False, False)),
        (record(model("tiny", "unknown")), (False, False)),
        (record(model("tiny", "moved")), (True, False)),
        (record(model("tiny"), engines=(engine("moved"),)), (True, False)),
        (record(model("tiny", "asks", doubt="renamed")), (False, True)),
        (record(model("tiny"), alarms=("tiny was not seen since March.",)), (False, True)),
    ],
)  # fmt: skip
def test_a_job_starts_only_where_it_has_something_to_do(
    api: GitHubApi, found: UpstreamRecord, work: tuple[bool, bool]
) -> None:
    """Most days nothing moved, and no job that may write starts."""
    assert upstream_github.work(client(api), found) == work


def test_a_proposal_or_an_issue_that_is_open_is_looked_after(api: GitHubApi) -> None:
    """It may be out of date; one of a fork, and one of another branch, are not ours."""
    api.add_pull("bump/tiny", head_repository="stranger/fleet", sha="2" * 40)
    api.add_pull("feature")
    assert upstream_github.work(client(api), record(model("tiny"))) == (False, False)
    api.git.commit("bump/tiny", {"params.yaml": "x"})
    api.add_pull("bump/tiny")
    upstream_issues.settle(client(api), record(model("tiny", "asks", doubt="gone")), run_url=None)

    assert upstream_github.work(client(api), record(model("tiny"))) == (True, True)


@pytest.mark.parametrize("known", [False, True])
def test_some_alone_are_looked_at_where_the_others_are_known(
    api: GitHubApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    """A look that knows nothing of the others would close the issue on them."""
    at, asked = Layout(tmp_path), []
    for name, value in api.environment(api.token).items():
        monkeypatch.setenv(name, value)
    if known:
        left(api, 5, record(model("tiny"), model("other", "asks", doubt="gone")))

    def main(_: Layout, models: Any, **__: Any) -> int:
        asked.append(tuple(models))
        at.upstream.parent.mkdir(exist_ok=True)
        records.write(at.upstream, record(model("tiny")))
        return 0

    monkeypatch.setattr(check_upstream, "main", main)
    upstream_github.look(at, ("tiny",), out=None, as_json=False)

    assert asked == [("tiny",) if known else ()]


# --- the issue --------------------------------------------------------------------------------


def settled(api: GitHubApi, found: UpstreamRecord) -> str:
    """Keep the issue; say what was done."""
    return upstream_issues.settle(client(api), found, run_url="https://x.invalid/7")


def test_what_asks_for_a_person_is_one_issue_that_closes_itself(api: GitHubApi) -> None:
    """Opened once, renewed as it is, closed with a word."""
    asks = model(
        "tiny", "asks", doubt="renamed", reason="it is called @evil/<b>x</b> ![](http://x) now",
        next_step="write hf:evil/x",
    )  # fmt: skip

    assert settled(api, record(asks, model("other"))) == "opened 1"
    body = api.issues[1]["body"]
    assert (api.issues[1]["title"], api.issues[1]["labels"]) == (
        "Upstream asks for a person: tiny", ["upstream"],
    )  # fmt: skip
    assert "| tiny | hf:acme/tiny | it is called @\u200bevil/&#60;b&#62;x" in body
    assert "![](" not in body
    assert "write hf:evil/x" in body
    more = record(asks, model("other"), alarms=("other was not seen since 2026-11-19.",))
    assert settled(api, more) == "renewed 1"
    assert "- other was not seen since 2026-11-19." in api.issues[1]["body"]
    assert settled(api, record(model("tiny"), model("other"))) == "closed"
    assert api.issues[1]["state"] == "closed"
    assert settled(api, record(model("tiny"), model("other"))) == "none"
    assert len(api.issues) == 1


def test_what_cannot_be_asked_now_keeps_its_line_and_closes_nothing(api: GitHubApi) -> None:
    """A Hub that is down is no answer; nor is one that was never asked before."""
    settled(api, record(model("tiny", "asks", doubt="owner", reason="other hands")))
    silent = model("tiny", "unknown", last_state="asks", last_reason="other hands")

    assert settled(api, record(silent)) == "renewed 1"
    assert "| tiny | hf:acme/tiny | other hands | It cannot be asked now" in api.issues[1]["body"]
    assert settled(api, record(model("tiny", "unknown"))) == "left"
    assert settled(api, record(model("tiny"), engines=(engine("unknown"),))) == "left"
    assert settled(api, record(model("tiny"), engines=(engine("asks"),))) == "renewed 1"
    assert api.issues[1]["title"] == "Upstream asks for a person: ollama"
    known = model("tiny", "unknown", last_state="current", last_reason="nothing moved")
    assert settled(api, record(known)) == "closed"


def test_a_hundred_models_that_ask_fit_into_the_issue(api: GitHubApi) -> None:
    """What does not is counted; the end of the issue is there."""
    many = [model(f"m{n}", "asks", doubt="gone", reason="&" * 2000) for n in range(100)]
    alarms = tuple("<" * 2000 for _ in range(100))

    settled(api, record(*many, alarms=alarms))

    body = api.issues[1]["body"]
    assert len(body) < 65_536
    assert body.count("more rows left out.") == 2
    assert body.endswith("closes itself when nothing is left.")
