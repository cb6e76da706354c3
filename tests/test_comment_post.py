"""A report finds its pull request by the commit, and believes nothing that a run left behind."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from github_api import Fault, GitHubApi, Seen, Token, zipped
from github_fixtures import client, serving
from node_tools import payload

from pipelines import comment, comment_post
from pipelines.ci_records import GateModel, GateRecord, PlanRecord
from pipelines.comment_post import Rendered, Situation
from pipelines.errors import FleetError, MachineError
from pipelines.github import checks
from pipelines.github.checks import Annotation
from pipelines.github.comments import Order
from pipelines.github.errors import GitHubError
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RUN = 4000


@pytest.fixture
def api(tmp_path: Path) -> Iterator[GitHubApi]:
    """A stand-in with one pull request, number 1, from `feature`."""
    with serving(tmp_path) as running:
        running.add_pull("feature")
        yield running


def event(api: GitHubApi, action: str = "completed", **fields: Any) -> dict[str, Any]:
    """Return what GitHub sends about a run of `feature`."""
    run = {
        "id": RUN,
        "run_attempt": 1,
        "event": "pull_request",
        "head_branch": "feature",
        "head_sha": api.git.head("feature"),
        "head_repository": {"full_name": api.repository},
        "conclusion": "success" if action == "completed" else None,
        "pull_requests": [],
        "run_started_at": "2026-01-01T00:00:00Z",
        "html_url": "https://github.com/octo/fleet/actions/runs/4000",
    }
    told: dict[str, Any] = run | fields
    known = api.runs.setdefault(told["id"], told)
    known["run_attempt"] = max(known["run_attempt"], told["run_attempt"])
    return payload("workflow_run", action, workflow_run=run | fields)


def gate(api: GitHubApi, **fields: Any) -> dict[str, Any]:
    """Return what the gate of `feature` leaves behind."""
    head = api.git.head("feature")
    assert head is not None
    plan = PlanRecord(
        base=api.git.head("main"),
        head=head,
        params_blob=api.git.text("rev-parse", f"{head}:params.yaml"),
    )
    record = GateRecord(
        base=plan.base,
        head=head,
        verdict="PROMOTE",
        conclusion="success",
        sentence="tiny-llama may be published.",
        plan=plan,
    )
    value: dict[str, Any] = record.model_dump(mode="json")
    return value | fields


def leave(api: GitHubApi, value: object, **fields: Any) -> int:
    """Leave a gate.json behind."""
    text = value if isinstance(value, str) else json.dumps(value)
    return api.add_artifact(RUN, "gate", {"gate.json": text}, **fields)


class Renderer:
    """Says what it was told, so that a test sees both."""

    def __init__(self, **fields: Any) -> None:
        """Say it with these fields of `Rendered`."""
        self.seen: list[Situation] = []
        self._fields = fields

    def __call__(self, situation: Situation) -> Rendered:
        """Render."""
        self.seen.append(situation)
        conclusions: Any = {
            "waiting": "action_required",
            "measuring": None,
            "judged": "success",
            "cancelled": "cancelled",
        }
        conclusion = conclusions.get(situation.state, "failure")
        text = f"{situation.state} {situation.problem}".strip()
        return Rendered(markdown=text, title=text, conclusion=conclusion, **self._fields)


def post(api: GitHubApi, told: dict[str, Any], render: Renderer | None = None) -> Renderer:
    """Report a run."""
    render = render or Renderer()
    comment_post.post(client(api), told, render, settle_s=0.0)
    return render


def said(api: GitHubApi, number: int = 1) -> list[str]:
    """Return what stands on the pull request."""
    return [each["body"].partition("-->\n")[2] for each in api.comments_of(number)]


def test_a_run_is_reported_in_a_comment_a_check_and_a_summary(
    api: GitHubApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same words in all three; annotations on the lines of params.yaml."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    post(api, event(api, "requested"))
    assert said(api) == ["measuring"]
    leave(api, gate(api))
    lines = [Annotation(path="params.yaml", line=at, message="m") for at in range(1, 121)]

    render = post(api, event(api), Renderer(annotations=tuple(lines)))

    assert said(api) == ["judged"]
    assert "judged" in (tmp_path / "summary").read_text()
    (check,) = api.check_runs.values()
    assert (check["name"], check["status"], check["conclusion"]) == (
        "fleet",
        "completed",
        "success",
    )
    assert check["head_sha"] == api.git.head("feature")
    assert [each["start_line"] for each in check["annotations"]] == list(range(1, 121))
    (situation,) = render.seen
    assert situation.gate is not None
    assert situation.gate.sentence == "tiny-llama may be published."
    assert situation.params == api.git.files("feature")["params.yaml"].decode()


@pytest.mark.parametrize(
    ("conclusion", "expected"),
    [
        ("cancelled", "cancelled"),
        ("failure", "failed The run ended before there was something to judge."),
        ("timed_out", "failed The run ended before there was something to judge."),
        ("startup_failure", "failed The run ended before there was something to judge."),
        (None, "failed The run ended before there was something to judge."),
    ],
)
def test_measuring_does_not_stay_when_a_run_ends_otherwise(
    api: GitHubApi, conclusion: str | None, expected: str
) -> None:
    """Cancelled, failed, out of time: the comment and the check run say so."""
    post(api, event(api, "requested"))
    post(api, event(api, conclusion=conclusion))

    assert said(api) == [expected]
    assert [each["status"] for each in api.check_runs.values()] == ["completed"]


def test_two_runs_that_end_in_the_wrong_order_leave_the_newer(api: GitHubApi) -> None:
    """By run and attempt, not by who comes last."""
    leave(api, gate(api))
    post(api, event(api, id=RUN + 1, conclusion="cancelled"))
    post(api, event(api))
    assert said(api) == ["cancelled"]

    post(api, event(api, "requested", id=RUN + 1, run_attempt=2))
    post(api, event(api, id=RUN + 1, conclusion="failure"))
    assert said(api) == ["measuring"]
    newest = max(api.check_runs.values(), key=lambda each: each["id"])
    assert newest["external_id"] == f"fleet/{RUN + 1}/2/0"
    assert newest["status"] == "in_progress"


def test_the_word_that_a_run_began_may_come_after_its_end(api: GitHubApi) -> None:
    """Two reports of one run are two runs of a workflow, in any order."""
    leave(api, gate(api))
    post(api, event(api))
    post(api, event(api, "requested"))

    assert said(api) == ["judged"]
    assert [each["status"] for each in api.check_runs.values()] == ["completed"]


@pytest.mark.parametrize("action", ["requested", "completed"])
def test_a_run_that_waits_for_approval_has_not_failed_and_its_numbers_stay(
    api: GitHubApi, action: str
) -> None:
    """A commit of a job's token: GitHub ends its run at once, and goes on with it when told so."""
    leave(api, gate(api))
    post(api, event(api))
    waits = event(api, action, id=RUN + 1, conclusion="action_required")

    post(api, waits)

    assert said(api) == ["judged"]
    newest = max(api.check_runs.values(), key=lambda each: each["id"])
    assert (newest["status"], newest["conclusion"]) == ("completed", "action_required")
    post(api, event(api, "requested", id=RUN + 1))
    assert said(api) == ["measuring"]
    newest = max(api.check_runs.values(), key=lambda each: each["id"])
    assert newest["status"] == "in_progress"
    post(api, event(api, id=RUN + 1, conclusion="cancelled"))
    assert said(api) == ["cancelled"]


def test_a_first_run_that_waits_for_approval_says_so(api: GitHubApi) -> None:
    """Where nothing was said yet, it is what there is to say."""
    post(api, event(api, conclusion="action_required"))

    assert said(api) == ["waiting"]


@pytest.mark.parametrize("forged", [(10**18, 1), (RUN, 999), (RUN + 7, 1)])
def test_a_report_that_claims_a_run_of_the_future_keeps_no_true_one_away(
    api: GitHubApi, forged: tuple[int, int]
) -> None:
    """Who may push can write under the name of our jobs, and edit what we wrote."""
    run_id, attempt = forged
    told = event(api)
    api.runs[RUN + 7] = {**told["workflow_run"], "id": RUN + 7, "head_branch": "elsewhere"}
    api.add_comment(1, f"<!-- fleet:report run={run_id} attempt={attempt} phase=1 -->\nPROMOTE")
    leave(api, gate(api))
    made = checks.CheckRun(title="PROMOTE", summary="forged", conclusion="success")
    head = str(api.git.head("feature"))
    checks.upsert_check(client(api), head, "fleet", made, Order(run_id, attempt, 1))

    post(api, told)

    assert said(api) == ["judged"]
    newest = max(api.check_runs.values(), key=lambda each: each["id"])
    assert newest["output"]["summary"] == "judged"


def test_a_number_in_the_event_or_the_artifact_is_not_believed(api: GitHubApi) -> None:
    """The pull request is the one whose branch is at the commit."""
    other = api.add_pull("main")
    forged = gate(api, number=other, pull_request=other)
    leave(api, forged)

    post(api, event(api, pull_requests=[{"number": other, "head": {"sha": "0" * 40}}]))

    assert said(api, other) == []
    assert said(api) == ["unusable gate.json is no record of the gate: 2 of its fields are wrong."]


def test_a_branch_of_a_fork_is_found_by_its_owner(api: GitHubApi) -> None:
    """GitHub names no pull request for a fork; one of the same name here is another one."""
    sha = api.git.commit("theirs", {"params.yaml": "models: {}\n"})
    api.git.git("update-ref", "-d", "refs/heads/theirs")
    number = api.add_pull("feature", sha=sha, head_repository="mallory/fleet")

    told = event(api, "requested", head_sha=sha, head_repository={"full_name": "mallory/fleet"})
    post(api, told)

    assert said(api, number) == ["measuring"]
    assert said(api) == []


def test_a_fork_of_the_same_owner_at_the_same_commit_is_another_one(api: GitHubApi) -> None:
    """GitHub calls both branches `octo:feature`."""
    sha = api.git.head("feature")
    number = api.add_pull("feature", sha=sha, head_repository="octo/other")

    post(api, event(api, "requested", head_repository={"full_name": "octo/other"}))

    assert said(api, number) == ["measuring"]
    assert said(api) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"head_repository": {"full_name": "mallory/fleet"}},
        {"head_repository": None},
        {"head_sha": "1" * 40},
        {"head_branch": None},
        {"head_branch": "no-such-branch"},
        {"event": "workflow_dispatch"},
        {"event": "merge_group"},
        {"event": "push"},
    ],
)
def test_a_run_of_no_pull_request_is_reported_nowhere(
    api: GitHubApi, fields: dict[str, Any]
) -> None:
    """Quietly: a word in the log, no error."""
    post(api, event(api, **fields))

    assert said(api) == []
    assert not [seen for seen in api.requests if seen.is_write]


def test_a_run_whose_records_are_on_the_branch_already_is_reported(api: GitHubApi) -> None:
    """`adopt` commits before the run is over; the check run stays with what was measured."""
    measured = event(api)
    leave(api, gate(api))
    asked = api.git.head("feature")
    message = f"Records: promote tiny\n\nMeasured tiny on local at {asked}.\n"
    api.git.commit("feature", {"results/tiny/choice.json": "{}"}, message)

    post(api, measured)

    assert len(said(api)) == 1
    assert [check["head_sha"] for check in api.check_runs.values()] == [asked]


def test_a_branch_that_was_forced_on_while_it_was_measured_is_left_to_its_new_run(
    api: GitHubApi,
) -> None:
    """Before the report, and while it is being made."""
    old = event(api)
    leave(api, gate(api))
    at(api, r"GET pulls/1$", lambda: api.git.commit("feature", {"a": "b"}))
    post(api, old)
    assert said(api) == []

    post(api, old)
    assert said(api) == []
    assert not [seen for seen in api.requests if seen.is_write]


def test_a_pull_request_that_was_closed_while_it_was_measured_does_not_say_measuring(
    api: GitHubApi,
) -> None:
    """What is there is ended; a new comment is not written."""
    silent = api.add_pull("main")
    post(api, event(api, "requested"))
    api.close_pull(1)
    api.close_pull(silent)
    leave(api, gate(api))

    post(api, event(api))
    post(api, event(api, head_branch="main", head_sha=api.git.head("main"), id=RUN + 9))

    assert said(api) == ["judged"]
    assert said(api, silent) == []


def test_records_of_another_head_are_not_shown(api: GitHubApi) -> None:
    """A sentence, and no number."""
    leave(api, gate(api, head="2" * 40))

    post(api, event(api))

    assert said(api)[0].startswith("unusable gate.json is of another commit than")


def test_records_of_another_params_yaml_are_not_shown(api: GitHubApi) -> None:
    """What was planned is what is in git at that commit."""
    value = gate(api)
    value["plan"]["params_blob"] = "3" * 40
    leave(api, value)

    post(api, event(api))

    assert "made with another params.yaml" in said(api)[0]


def test_what_an_earlier_attempt_left_behind_is_not_todays(api: GitHubApi) -> None:
    """A run that is run again and dies early has no gate.json of its own."""
    leave(api, gate(api), created_at="2026-01-01T00:00:00Z")

    again: dict[str, Any] = {"run_attempt": 2, "run_started_at": "2026-01-02T00:00:00Z"}
    post(api, event(api, conclusion="failure", **again))
    assert said(api)[0].startswith("failed")


def test_after_the_last_job_alone_was_run_again_the_numbers_are_still_there(api: GitHubApi) -> None:
    """`adopt` failed and was started again: the gate was not, and what it found holds."""
    leave(api, gate(api), created_at="2026-01-01T00:00:00Z")

    post(api, event(api, run_attempt=2, run_started_at="2026-01-02T00:00:00Z"))

    assert said(api) == ["judged"]


def bomb() -> bytes:
    """A zip of 100 MB of zeros that says so."""
    return zipped({"gate.json": "0" * 100_000_000})


def lying_bomb() -> bytes:
    """The same, that says it holds ten bytes."""
    data = bytearray(bomb())
    central = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, central + 24, 10)
    struct.pack_into("<I", data, 22, 10)
    return bytes(data)


def deep() -> str:
    """JSON that is nested as no record is."""
    return '{"a":' * 5000 + "1" + "}" * 5000


def encrypted() -> bytes:
    """A zip that wants a password."""
    data = bytearray(zipped({"gate.json": "{}"}))
    data[6] |= 1
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def linked() -> bytes:
    """A zip whose entry is a symbolic link."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        entry = zipfile.ZipInfo("gate.json")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bomb, "says 100000000 bytes"),
        (lying_bomb, "no zip that can be read"),
        (lambda: b"PK\x03\x04 not a zip", "no zip that can be read"),
        (lambda: b"", "no zip that can be read"),
        (lambda: zipped({}), "holds nothing"),
        (lambda: zipped({"../gate.json": "{}"}), "not gate.json alone"),
        (lambda: zipped({"/gate.json": "{}"}), "not gate.json alone"),
        (lambda: zipped({"a/gate.json": "{}"}), "not gate.json alone"),
        (lambda: zipped({"gate.json": "{}", "x": "y"}), "not gate.json alone"),
        (lambda: zipped({"gate.json/": ""}), "not gate.json alone"),
        (encrypted, "packed as none of ours"),
        (linked, "no JSON"),
        (lambda: zipped({"gate.json": b"\xff\xfe"}), "no JSON"),
        (lambda: zipped({"gate.json": "[1]"}), "no JSON object"),
        (lambda: zipped({"gate.json": deep()}), "no JSON|nested deeper"),
        (lambda: zipped({"gate.json": '{"a": NaN}'}), "NaN is not a number"),
        (lambda: zipped({"gate.json": '{"a": -Infinity}'}), "-Infinity is not a number"),
        (lambda: zipped({"gate.json": '{"a": 1e999}'}), "1e999 is not a finite number"),
        (lambda: zipped({"gate.json": '{"a": ' + "9" * 5000 + "}"}), "5,000 digits"),
        (lambda: zipped({"gate.json": '{"a": 1, "a": 2}'}), "twice"),
        (lambda: zipped({"gate.json": '{"a": "' + "x" * 40_000_000 + '"}'}), "says 40000009"),
    ],
)
def test_an_artifact_that_is_none_of_ours_is_a_sentence(
    api: GitHubApi, data: Callable[[], bytes], words: str
) -> None:
    """Bombs, paths, links, nesting, numbers that are none: nothing of it is used."""
    api.add_artifact(RUN, "gate", data())

    post(api, event(api))

    (text,) = said(api)
    assert text.startswith("unusable")
    assert any(word in text for word in words.split("|")), text


def test_an_artifact_that_says_it_is_huge_is_not_downloaded(api: GitHubApi) -> None:
    """Its size is looked at first, and again while it arrives."""
    made = leave(api, gate(api))
    api.artifacts[made].size_bytes = 1 << 40
    post(api, event(api))
    assert "bytes; ours have not so many" in said(api)[0]
    assert not [seen for seen in api.requests if "zip" in seen.path]

    api.artifacts[made].size_bytes = 10
    api.artifacts[made].data = b"x" * (5 << 20)
    post(api, event(api, run_attempt=2))
    assert "more than 4194304 bytes" in said(api)[0]

    api.artifacts[made].expired = True
    post(api, event(api, run_attempt=3))
    assert said(api)[0].startswith("failed")


def test_an_artifact_that_was_changed_on_the_way_is_not_used(api: GitHubApi) -> None:
    """GitHub recorded its digest."""
    made = leave(api, gate(api))
    api.artifacts[made].digest = f"sha256:{'0' * 64}"

    post(api, event(api))

    assert "changed on the way" in said(api)[0]


@pytest.mark.parametrize(
    "spoil",
    [
        {"verdict": "GREAT"},
        {"sentence": "@team " * 180_000},
        {"schema_version": 2},
        {"stage": "plan"},
        {"models": [{"model": "../x"}]},
        {"base": "main; rm -rf /"},
        {"@team": "x"},
    ],
)
def test_a_record_that_is_none_is_a_sentence_without_its_words(
    api: GitHubApi, spoil: dict[str, Any]
) -> None:
    """Neither names nor values of a stranger get into the text."""
    leave(api, gate(api, **spoil))

    post(api, event(api))

    (text,) = said(api)
    assert text.startswith("unusable gate.json is no record of the gate")
    assert "@" not in text
    assert len(text) < 200


@pytest.mark.parametrize(
    "text", ["@team " * 300, "![x](https://evil.example/i.png)", "<img src=x>"]
)
def test_words_of_a_stranger_in_a_valid_record_do_nothing_to_people(
    api: GitHubApi, tmp_path: Path, text: str
) -> None:
    """The real renderer: no mention, no image, no link."""
    model = GateModel(
        model="tiny-llama", host="local", verdict="PROMOTE", sentence=text, next_step=text
    )
    leave(
        api,
        gate(api, sentence=text, failures=[text], models=[model.model_dump(mode="json")]),
    )

    comment_post.post(
        client(api),
        event(api),
        lambda situation: comment.rendered(situation, Layout(tmp_path)),
        settle_s=0.0,
    )

    (body,) = said(api)
    assert "@team" not in body
    assert "![" not in body
    assert "<img" not in body
    assert len(body) < 60_000


def test_bundles_that_cannot_be_judged_are_a_sentence(api: GitHubApi) -> None:
    """Whoever renders refuses them; the comment says so instead of numbers."""
    leave(api, gate(api))

    class Refusing(Renderer):
        def __call__(self, situation: Situation) -> Rendered:
            if situation.gate is not None:
                raise FleetError("results/../x is no path of a record.")
            return super().__call__(situation)

    post(api, event(api), Refusing())

    assert said(api) == ["unusable results/../x is no path of a record."]


def test_a_failure_of_ours_is_told_and_still_ends_measuring(api: GitHubApi) -> None:
    """The job is red, and the comment does not say that something is being measured."""
    post(api, event(api, "requested"))
    leave(api, gate(api))

    class Failing(Renderer):
        def __call__(self, situation: Situation) -> Rendered:
            if situation.gate is not None:
                raise ZeroDivisionError
            return super().__call__(situation)

    with pytest.raises(ZeroDivisionError):
        post(api, event(api), Failing())

    assert said(api) == ["unusable ZeroDivisionError"]


def test_a_check_run_that_is_refused_does_not_keep_the_comment_away(api: GitHubApi) -> None:
    """And the error is raised all the same."""
    api.tokens[api.token] = Token(
        "github-actions[bot]",
        {"contents": "read", "actions": "read", "pull_requests": "write", "checks": "read"},
    )
    leave(api, gate(api))

    with pytest.raises(GitHubError, match="403") as caught:
        post(api, event(api))

    assert "`checks: write`" in caught.value.hint
    assert said(api) == ["judged"]


def test_an_event_of_another_kind_is_refused(api: GitHubApi) -> None:
    """`fleet comment` in the wrong workflow."""
    wrong: list[dict[str, Any]] = [{}, {"workflow_run": []}, payload("push")]
    for told in [*wrong, event(api, head_sha="main")]:
        with pytest.raises(MachineError, match="no workflow_run"):
            post(api, told)

    assert api.requests == []


def at(api: GitHubApi, pattern: str, act: Callable[[], object]) -> None:
    """Do something once, as the first request that fits arrives."""
    import re  # noqa: PLC0415 - here alone

    arrived, done = api.arrived, list[Seen]()

    def watching(seen: Seen) -> Fault | None:
        if not done and re.match(pattern, str(seen)):
            done.append(seen)
            act()
        return arrived(seen)

    api.arrived = watching  # type: ignore[method-assign]
