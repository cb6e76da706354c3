"""What is newer upstream becomes one pull request that a person decides, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import bump_factory as factory
import comment_page as page
import pytest
from bump_factory import MODEL, NEW, NEWER, OLD, OTHER, PARAMS, look_of, moved
from github_api import ACTIONS, Fault, GitHubApi, Token
from test_comment_render import HOSTILE, objections

from pipelines import (
    __main__,
    bump,
    bump_body,
    bump_pull,
    bump_view,
    check_upstream,
    declaration,
    pin_lines,
    records,
)
from pipelines.bump_body import FileLine, Link, Risk, View
from pipelines.bump_change import BODY_LIMIT, CLASS_LABEL, LABEL, marker_of
from pipelines.bump_engine import ENGINE_LABEL
from pipelines.github import commits, pulls
from pipelines.github.client import GitHub
from pipelines.layout import Layout
from pipelines.upstream_records import CLASSES, EngineUpstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipelines.upstream_records import ModelUpstream

BRANCH = f"bump/{MODEL}"
APP = "ghs_of-an-app"
RECORDS = "results/tiny-llama/choice.json"


@dataclass
class Ran:
    """What one command came to."""

    code: int
    out: str
    err: str
    writes: list[str] = field(default_factory=list)


class Fleet:
    """A checkout, and the GitHub that it is on."""

    def __init__(
        self,
        root: Path,
        api: GitHubApi,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Write the fleet, commit it to main, stand in it."""
        self.api, self.monkeypatch, self.capsys = api, monkeypatch, capsys
        self.at = factory.checkout(root)
        api.git.commit("main", {"params.yaml": PARAMS, "README.md": "A fleet.\n"}, author="mona")
        monkeypatch.chdir(root)
        self.token(api.token)

    def token(self, token: str, slug: str = "") -> None:
        """Use another token."""
        for name, value in self.api.environment(token).items():
            self.monkeypatch.setenv(name, value)
        self.monkeypatch.setenv("FLEET_APP_SLUG", slug)

    def merged(self, text: str) -> None:
        """Change params.yaml on main, and here."""
        self.api.git.commit("main", {"params.yaml": text}, author="mona")
        self.at.params.write_text(text)

    def bump(self, *found: ModelUpstream, words: tuple[str, ...] = ("--all",)) -> Ran:
        """Type `fleet bump` after a look that found something."""
        others = () if any(one.model == OTHER for one in found) else (current(OTHER),)
        declared = declaration.load(self.at.params).models
        records.write(
            self.at.upstream, look_of(*(one for one in (*found, *others) if one.model in declared))
        )
        seen = len(self.api.requests)
        code = __main__.main(["bump", *words])
        told = self.capsys.readouterr()
        writes = [str(one) for one in self.api.requests[seen:] if one.is_write]
        return Ran(code, told.out, told.err, writes)

    @property
    def pull(self) -> dict[str, Any]:
        """The one pull request that is open."""
        (found,) = [one for one in self.api.pulls.values() if one["state"] == "open"]
        return found

    def line(self, branch: str = BRANCH) -> str:
        """What differs between main and a branch."""
        told = self.api.git.text("diff", "-U0", "main", branch, "--", ".")
        return "\n".join(line for line in told.splitlines() if re.match(r"[+-](?![+-]{2} )", line))


def current(model: str = MODEL, **changes: Any) -> ModelUpstream:
    """Return what a look says of a model of which nothing is newer."""
    pinned = OLD if model == MODEL else "d" * 40
    fields_ = {"state": "current", "newest": pinned, "difference": None, "reason": "It is newest."}
    return moved(model, **({"pinned": pinned} | fields_ | changes))


@pytest.fixture
def fleet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Fleet]:
    """A fleet on GitHub."""
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    with GitHubApi(tmp_path / "origin.git") as api:
        yield Fleet(tmp_path / "fleet", api, monkeypatch, capsys)


# --- one pull request -------------------------------------------------------------------------


def test_a_moved_model_becomes_one_commit_one_line_one_pull_request(fleet: Fleet) -> None:
    """On top of main, with labels; the same look again changes nothing at all."""
    ran = fleet.bump(moved())

    assert ran.code == 0
    git = fleet.api.git
    assert git.text("rev-parse", f"{BRANCH}^") == git.head("main")
    assert fleet.line() == f"-    revision: {OLD}  # pinned\n+    revision: {NEW}  # pinned"
    pull = fleet.pull
    assert (pull["head"], pull["base"]) == (BRANCH, "main")
    assert pull["title"] == f"{MODEL}: {OLD[:7]} → {NEW[:7]} (weights)"
    assert pull["labels"] == ["bump", "bump: weights"]
    assert f"<!-- fleet:bump {MODEL} {OLD}..{NEW} -->" in pull["body"]

    again = fleet.bump(moved())

    assert (again.code, again.writes) == (0, [])


def test_two_models_are_two_pull_requests_and_a_named_one_is_one(fleet: Fleet) -> None:
    """Each on a branch of its own, both on top of main."""
    other = moved(OTHER, "d" * 40, NEW)

    fleet.bump(moved(), other, words=(MODEL,))
    assert [one["head"] for one in fleet.api.pulls.values()] == [BRANCH]

    fleet.bump(moved(), other)
    heads = {one["head"] for one in fleet.api.pulls.values()}
    assert heads == {BRANCH, f"bump/{OTHER}"}


def test_what_nobody_wants_is_not_proposed_again(fleet: Fleet) -> None:
    """Closed without a merge means that; what is newer than it is proposed."""
    fleet.bump(moved())
    number = fleet.pull["number"]
    fleet.api.close_pull(number)

    ran = fleet.bump(moved())
    dry = fleet.bump(moved(), words=(MODEL, "--dry-run"))
    assert ran.writes == dry.writes == []
    assert f"#{number} was closed" in ran.err
    assert f"#{number} was closed" in dry.err

    fleet.bump(moved(new=NEWER))
    assert NEWER in fleet.pull["body"]
    assert fleet.line() == f"-    revision: {OLD}  # pinned\n+    revision: {NEWER}  # pinned"
    assert int(fleet.api.git.text("rev-list", "--count", f"main..{BRANCH}")) == 1


def test_a_merged_one_is_done(fleet: Fleet) -> None:
    """Its branch may stay: the next change begins at main."""
    fleet.bump(moved())
    fleet.api.close_pull(fleet.pull["number"], merge=True)
    fleet.at.params.write_text(PARAMS.replace(OLD, NEW))

    assert fleet.bump(current(pinned=NEW, newest=NEW)).writes == []

    fleet.bump(moved(old=NEW, new=NEWER))
    assert fleet.line() == f"-    revision: {NEW}  # pinned\n+    revision: {NEWER}  # pinned"


def test_what_moved_on_replaces_what_was_measured_of_the_older_one(fleet: Fleet) -> None:
    """Adopted records stay as long as they are of what is proposed, and go with it."""
    fleet.bump(moved())
    number = fleet.pull["number"]
    fleet.api.git.commit(BRANCH, {RECORDS: "{}\n"}, f"Records: promote\n\nat {NEW}.")
    fleet.pull["body"] = f"Ada: I look at it.\n\n{fleet.pull['body']}\n\nBen: so do I."
    fleet.pull["labels"].append("urgent")
    fleet.api.git.commit("main", {"README.md": "Another word.\n"}, author="mona")

    assert fleet.bump(moved()).writes == []
    assert RECORDS in fleet.api.git.files(BRANCH)

    template = moved(new=NEWER).difference
    assert template is not None
    changed = template.model_copy(update={"classes": ("template",)})
    fleet.bump(moved(new=NEWER, difference=changed))

    pull = fleet.pull
    assert pull["number"] == number
    assert RECORDS not in fleet.api.git.files(BRANCH)
    assert fleet.api.git.text("rev-parse", f"{BRANCH}^") == fleet.api.git.head("main")
    assert pull["title"].endswith("(template)")
    assert pull["labels"] == ["bump", "urgent", "bump: template"]
    assert pull["body"].startswith("Ada: I look at it.\n")
    assert pull["body"].endswith("\nBen: so do I.")
    assert NEW not in pull["body"]


def _pushed(fleet: Fleet) -> None:
    fleet.api.git.commit(BRANCH, {"notes.md": "mine\n"}, "Look at it", author="mona")


def _amended(fleet: Fleet) -> None:
    """Author and message stay ours, as `git commit --amend` leaves them."""
    git = fleet.api.git
    tree = git.tree(f"{BRANCH}^{{tree}}", {"notes.md": git.blob(b"mine\n")})
    told = git.text("show", "-s", "--format=%B", BRANCH)
    made = git.commit_tree(tree, [str(git.head("main"))], told, committer="mona")
    git.git("update-ref", f"refs/heads/{BRANCH}", made)


def _other_bot(fleet: Fleet) -> None:
    fleet.api.git.commit(BRANCH, {"notes.md": "fixed\n"}, "Autofix", author="style-ci[bot]")


def _updated(fleet: Fleet) -> None:
    """The button "Update branch": GitHub merges, in the name of who pressed it."""
    git = fleet.api.git
    main = git.commit("main", {"README.md": "Another word.\n"}, author="mona")
    tree = git.tree(f"{BRANCH}^{{tree}}", {"README.md": git.blob(b"Another word.\n")})
    told = f"Merge branch 'main' into {BRANCH}"
    made = git.commit_tree(
        tree, [str(git.head(BRANCH)), main], told, author="mona", committer="GitHub"
    )
    git.git("update-ref", f"refs/heads/{BRANCH}", made)


@pytest.mark.parametrize("pushed", [_pushed, _amended, _other_bot, _updated])
def test_a_commit_of_somebody_else_is_never_overwritten(
    fleet: Fleet, pushed: Callable[[Fleet], None]
) -> None:
    """What is newer waits; the branch stays, and the pull request says once what is to be done."""
    fleet.bump(moved())
    pushed(fleet)
    before, proposed = fleet.api.git.head(BRANCH), fleet.pull["body"]

    assert fleet.bump(moved()).writes == []  # nothing is to be changed anyway
    ran = fleet.bump(moved(new=NEWER))
    again = fleet.bump(moved(new=NEWER))

    number = fleet.pull["number"]
    assert (ran.code, ran.writes, again.writes) == (0, [f"PATCH pulls/{number}"], [])
    assert "is left as it is" in ran.err
    assert f"{NEWER[:7]} is there" in fleet.pull["body"]
    assert NEW in fleet.pull["title"] + fleet.pull["body"]

    gone = fleet.bump(current())
    assert gone.writes == []
    assert "left open" in gone.err
    assert fleet.api.git.head(BRANCH) == before

    fleet.bump(moved())
    assert fleet.pull["body"] == proposed


def test_a_push_in_the_very_moment_is_not_lost(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody pushes between our look and our move: the branch is his."""
    fleet.bump(moved())
    real = commits.move_branch
    pushed: list[str] = []

    def moving(*args: Any, **options: Any) -> None:
        if not pushed:
            pushed.append(fleet.api.git.commit(BRANCH, {"mine.md": "x\n"}, "Mine", author="mona"))
        real(*args, **options)

    monkeypatch.setattr(commits, "move_branch", moving)
    ran = fleet.bump(moved(new=NEWER))

    assert [fleet.api.git.head(BRANCH)] == pushed
    assert "mona committed there" in ran.err


def test_what_is_closed_in_the_very_moment_is_not_opened_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody refuses it between our look and our words."""
    fleet.bump(moved())
    number = fleet.pull["number"]
    real = pulls.upsert_pull

    def closing(*args: Any, **options: Any) -> Any:
        if fleet.api.pulls[number]["state"] == "open":
            fleet.api.close_pull(number)
        return real(*args, **options)

    monkeypatch.setattr(pulls, "upsert_pull", closing)
    ran = fleet.bump(moved())

    assert ran.writes == []
    assert [one["state"] for one in fleet.api.pulls.values()] == ["closed"]
    assert f"#{number} was closed" in ran.err


def test_another_line_on_main_means_another_look(fleet: Fleet) -> None:
    """What main pins by now was not looked at; other lines of it do not matter."""
    fleet.bump(moved())
    edited = PARAMS.replace("memory_mib: 4096", "memory_mib: 8192")
    fleet.merged(edited)

    assert fleet.bump(moved()).writes == []

    fleet.merged(edited.replace(OLD, "e" * 40))
    fleet.at.params.write_text(edited)
    ran = fleet.bump(moved())
    assert ran.writes == []
    assert "look again" in ran.err

    # By that look, the branch begins anew at the line that main has.
    fleet.at.params.write_text(edited.replace(OLD, "e" * 40))
    fleet.bump(moved(old="e" * 40))
    assert fleet.line().startswith(f"-    revision: {'e' * 40}")


def test_whose_branch_it_is_merges_main_where_only_main_has_another_line(fleet: Fleet) -> None:
    """To delete the branch would close the pull request: that this very change is not wanted."""
    fleet.bump(moved())
    _pushed(fleet)
    fleet.merged(PARAMS.replace(OLD, "e" * 40))

    ran = fleet.bump(moved(old="e" * 40))

    assert "Merge main into it, and keep 9f3c4e5 there." in ran.err
    assert "main has another line by now" in fleet.pull["body"]
    assert "Delete" not in ran.err

    # Somebody does.
    git = fleet.api.git
    text = fleet.at.params.read_text().replace("e" * 40, NEW)
    tree = git.tree("main^{tree}", {"params.yaml": git.blob(text.encode())})
    heads = [str(git.head(one)) for one in (BRANCH, "main")]
    made = git.commit_tree(tree, heads, "Merge main", author="mona", committer="mona")
    git.git("update-ref", f"refs/heads/{BRANCH}", made)
    fleet.bump(moved(old="e" * 40))
    assert "another line" not in fleet.pull["body"]
    assert f"{MODEL} {'e' * 40}..{NEW}" in fleet.pull["body"]


@pytest.mark.parametrize("measured", [False, True])
def test_a_line_beside_ours_on_main_leaves_no_proposal_that_cannot_be_merged(
    fleet: Fleet, *, measured: bool
) -> None:
    """Such as that of a rollback; what was measured on the branch is not thrown away for it."""
    fleet.bump(moved())
    before, number = fleet.api.git.head(BRANCH), fleet.pull["number"]
    if measured:
        before = fleet.api.git.commit(BRANCH, {RECORDS: "{}\n"}, f"Records: hold\n\nat {NEW}.")
    fleet.merged(PARAMS.replace("  # pinned", "  # pinned\n    stable: e9edfb8e46f8" + "0" * 52))

    fleet.bump(moved())

    assert fleet.pull["number"] == number
    assert (fleet.api.git.head(BRANCH) == before) is measured
    if not measured:
        assert fleet.line() == f"-    revision: {OLD}  # pinned\n+    revision: {NEW}  # pinned"
        assert fleet.bump(moved()).writes == []


# --- out of date ------------------------------------------------------------------------------


def _undeclared(fleet: Fleet) -> ModelUpstream:
    begin, end = PARAMS.index(f"  {MODEL}:   #"), PARAMS.index(f"  {OTHER}:")
    text = re.sub(rf"  {MODEL}-\S+: .*\n", "", PARAMS[:begin] + PARAMS[end:])
    fleet.merged(text)
    return current(OTHER)


def _pinned(fleet: Fleet) -> ModelUpstream:
    fleet.merged(PARAMS.replace(OLD, NEW))
    return current(pinned=NEW, newest=NEW)


def _ignored(fleet: Fleet) -> ModelUpstream:
    fleet.merged(PARAMS.replace("  # pinned", f"\n    ignore: [{NEW}]"))
    return moved(state="ignored", difference=None)


@pytest.mark.parametrize(
    ("happens", "why"),
    [
        (_undeclared, "not declared"),
        (_pinned, "pins 9f3c4e5 already"),
        (_ignored, "passes over"),
        (lambda _: current(), "taken back"),
        (lambda _: moved(new=NEWER, state="card"), "differs in nothing"),
    ],
)
def test_what_is_out_of_date_is_closed_with_a_word(
    fleet: Fleet, happens: Callable[[Fleet], ModelUpstream], why: str
) -> None:
    """One comment, no branch; and that we closed it says nothing of what people want."""
    fleet.bump(moved())
    number = fleet.pull["number"]

    ran = fleet.bump(happens(fleet))

    assert ran.code == 0
    assert fleet.api.pulls[number]["state"] == "closed"
    (comment,) = fleet.api.comments_of(number)
    assert why in comment["body"]
    assert fleet.api.git.head(BRANCH) is None
    marker = marker_of(fleet.api.pulls[number]["body"])
    assert marker is not None
    assert marker.withdrawn

    fleet.merged(PARAMS)
    fleet.bump(moved())
    assert fleet.pull["number"] != number


def test_a_doubt_stands_above_the_proposal_until_it_is_gone(fleet: Fleet) -> None:
    """Another owner: no commit, no closing; whoever opens the pull request reads it first."""
    fleet.bump(moved())
    before = fleet.pull["body"]
    head = fleet.api.git.head(BRANCH)
    asks = moved(
        state="asks", doubt="owner", difference=None, newest=NEWER,
        reason="It belongs to @evil now.", next_step="Look at its page.",
    )  # fmt: skip

    ran = fleet.bump(asks)
    body = fleet.pull["body"]

    assert ran.code == 0
    assert "It belongs to @evil now." in ran.err
    assert "Do not merge before somebody looked" in body.splitlines()[4]
    assert "@evil" not in body
    assert fleet.api.git.head(BRANCH) == head
    assert fleet.bump(asks).writes == []

    unknown = fleet.bump(moved(state="unknown", difference=None, newest=None))
    assert (unknown.code, unknown.writes) == (0, [])

    fleet.bump(moved())
    assert fleet.pull["body"] == before


def test_nothing_is_opened_for_what_may_not_be_proposed(fleet: Fleet) -> None:
    """Doubted, young, unknown, a card alone: said, exit 0, not a single write."""
    for state in ("asks", "waiting", "unknown", "card", "current"):
        ran = fleet.bump(moved(state=state, reason=f"so it is: {state}"))

        assert (ran.code, ran.writes) == (0, [])
        assert f"so it is: {state}" in ran.err


def test_an_engine_is_a_pull_request_of_its_own(fleet: Fleet) -> None:
    """Version and digest together, in one commit; once main has them it is closed."""
    engine = EngineUpstream(
        engine="llama.cpp", pinned="0.3.36", newest="0.3.37", sha256="c" * 64, state="moved",
        size_bytes=70 << 20, newest_at=factory.AT, reason="It is newer.",
    )  # fmt: skip
    branch = "bump/llama.cpp"

    def look(found: EngineUpstream) -> None:
        digest = hashlib.sha256(fleet.at.params.read_bytes()).hexdigest()
        record = look_of(current(), current(OTHER))
        update = {"engines": (found,), "params_sha256": digest}
        records.write(fleet.at.upstream, record.model_copy(update=update))

    look(engine)
    assert __main__.main(["bump", "--engine", "llama.cpp"]) == 0
    before, after = fleet.line(branch).splitlines()
    assert after == before.replace("-t", "+t").replace("0.3.36", "0.3.37").replace(
        "a" * 64, "c" * 64
    )
    assert fleet.pull["head"] == branch
    number = fleet.pull["number"]

    # A look at models alone says nothing of it.
    fleet.bump(current(), words=(MODEL,))
    assert fleet.pull["number"] == number

    fleet.merged(fleet.api.git.files(branch)["params.yaml"].decode())
    look(engine.model_copy(update={"pinned": "0.3.37", "state": "current"}))
    assert __main__.main(["bump", "--engine", "llama.cpp"]) == 0
    assert fleet.api.pulls[number]["state"] == "closed"
    assert fleet.api.git.head(branch) is None


# --- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [Fault(kind="status", status=403, body={"message": "no"}), Fault(kind="lose")]
)
def test_a_fault_at_any_call_is_mended_by_the_next_run(
    fleet: Fleet, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal or a lost answer at each write that shows: never two, never half."""
    monkeypatch.setattr("pipelines.github.client._FIRST_PAUSE_S", 0.0)
    fleet.bump(moved())
    start, number = fleet.api.git.head(BRANCH), fleet.pull["number"]
    body, labels = fleet.pull["body"], list(fleet.pull["labels"])
    fleet.api.forget()
    fleet.bump(moved(new=NEWER))
    places = [index for index, seen in enumerate(fleet.api.requests) if seen.is_write]
    assert len(places) == 6

    # Before them only objects were made that nobody sees.
    for index in places[-3:]:
        fleet.api.git.git("update-ref", f"refs/heads/{BRANCH}", str(start))
        fleet.api.pulls[number].update(body=body, labels=list(labels))
        fleet.api.forget()
        fleet.api.strike(fault, at=index)
        first = fleet.bump(moved(new=NEWER))
        assert first.code in {0, 8, 75}

        fleet.bump(moved(new=NEWER))

        assert fleet.pull["number"] == number
        assert NEWER in fleet.pull["body"]
        assert fleet.line() == f"-    revision: {OLD}  # pinned\n+    revision: {NEWER}  # pinned"


def test_a_model_that_fails_keeps_nobody_from_the_others(fleet: Fleet) -> None:
    """GitHub refuses one pull request: the other is there, the code is that of the refusal."""
    refused = Fault(kind="status", status=403, body={"message": "not permitted to create"})
    fleet.api.strike(refused, matches="POST pulls$")

    ran = fleet.bump(moved(), moved(OTHER, "d" * 40, NEW))

    assert ran.code == 8
    assert "allow GitHub Actions to create pull requests" in ran.err
    assert fleet.pull["head"] == f"bump/{OTHER}"


def test_a_token_that_may_make_no_labels_gives_those_that_are_there(fleet: Fleet) -> None:
    """GitHub makes a new label only for who may write issues: said, with what to type."""
    fleet.api.labels = {"bump"}
    rights = {"contents": "write", "pull_requests": "write"}
    fleet.api.tokens[fleet.api.token] = Token(ACTIONS, rights)

    ran = fleet.bump(moved())

    assert ran.code == 0
    assert fleet.pull["head"] == BRANCH
    assert fleet.pull["labels"] == ["bump"]
    assert 'Make them once in the repository: gh label create "bump: weights"' in ran.err


def test_the_labels_to_be_made_once_are_all_that_a_bump_has() -> None:
    """As an operator types them, by the page on settings."""
    page_ = (factory.ROOT / "docs/security.md").read_text()
    (told,) = re.findall(r"for label in (.+); do\n    gh label create", page_)
    every = {CLASS_LABEL.format(name=name) for name in CLASSES} | {LABEL, ENGINE_LABEL}
    assert set(shlex.split(told)) == every


def test_racing_runs_leave_one_branch_and_one_pull_request(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run is faster, just before we make the branch."""
    gh = GitHub(fleet.api.repository, fleet.api.token, api_url=fleet.api.url, sleep=lambda _: None)
    declared = declaration.load(fleet.at.params)
    (ours,) = bump.plan(fleet.at, declared, look_of(moved()))
    seen = pin_lines.values(fleet.at.params, ours.edits)
    real = commits.create_branch

    def late(*args: Any) -> None:
        monkeypatch.setattr(commits, "create_branch", real)
        bump_pull.bring(gh, ours, seen)
        real(*args)

    monkeypatch.setattr(commits, "create_branch", late)
    outcome = bump_pull.bring(gh, ours, seen)

    assert outcome.number == fleet.pull["number"]
    assert int(fleet.api.git.text("rev-list", "--count", f"main..{BRANCH}")) == 1


# --- who starts the checks --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "slug", "waits"),
    [("ghs_of-a-job", "", True), (APP, "fleet-of-octo", False), ("ghp_of-a-person", "", False)],
)
def test_somebody_is_told_to_click_only_where_checks_wait(
    fleet: Fleet, tmp_path: Path, *, token: str, slug: str, waits: bool
) -> None:
    """A job's own token: in the body and in the summary of the job; an App's starts them."""
    fleet.token(token, slug)
    summary, outputs = tmp_path / "summary.md", tmp_path / "outputs"
    event = tmp_path / "event.json"
    event.write_text("{}")
    for name, value in {
        "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": str(summary),
        "GITHUB_OUTPUT": str(outputs),
        "GITHUB_EVENT_PATH": str(event),
    }.items():
        fleet.monkeypatch.setenv(name, value)

    fleet.bump(moved())

    assert ("Approve workflows to run" in fleet.pull["body"]) == waits
    assert ("Approve workflows to run" in summary.read_text()) == waits
    assert f"#{fleet.pull['number']}" in summary.read_text()
    assert "any<<" in outputs.read_text()
    assert fleet.bump(moved()).writes == []


# --- words ------------------------------------------------------------------------------------


def test_the_body_of_a_real_look_is_the_one_in_git(tmp_path: Path) -> None:
    """Files, notes, commits and differences come from a Hub; see tests/bump_factory.py."""
    found, names = factory.story(tmp_path)

    text = factory.golden(found.text(), names)

    assert text == (factory.DATA / "body.md").read_text(encoding="utf-8")
    assert found.labels == ("bump", "bump: weights", "bump: template", "bump: generation")
    assert strange(text) == []


def view() -> View:
    """Return a view with everything in it."""
    return View(
        lead="It moved.",
        notice=bump_view.NOTICE,
        risks=tuple(Risk(f"Risk {n}", "Look.") for n in range(9)),
        facts=(("Revision", "a → b"), ("Changed", "weights")),
        links=(Link(text="Commits", url=f"{bump_view.HUB}/octo/model/commits/main"),),
        files=tuple(
            FileLine(name=f"f{n}", kind="weights", before="1", after="2", change="+1")
            for n in range(9)
        ),
        files_count=100,
        notes=tuple(f"Note {n}." for n in range(9)),
        commits=tuple(f"Commit {n}" for n in range(9)),
        commits_count=9,
        details=(("A diff", "-a\n+b\n"), ("A longer diff", "+x\n" * 900)),
        ignore="close this.",
        rollback=("fleet rollback m",),
        rollback_note="what was.",
    )


def poisoned(value: Any, texts: list[str], seen: list[int]) -> Any:
    """Put a stranger's text behind every text that is not ours, each in turn."""
    if isinstance(value, str):
        seen[0] += 1
        return f"{value} {texts[seen[0] % len(texts)]}"
    if isinstance(value, Risk):
        return Risk(value.label, poisoned(value.text, texts, seen))
    if isinstance(value, tuple):
        return tuple(poisoned(one, texts, seen) for one in value)
    if is_dataclass(value) and not isinstance(value, Link):
        kept = {"notice", "rollback", "files_count", "commits_count", "truncated"}
        return replace(
            cast("Any", value),
            **{
                one.name: poisoned(getattr(value, one.name), texts, seen)
                for one in fields(value)
                if one.name not in kept
            },
        )
    return value


def strange(text: str) -> list[str]:
    """Return what a reader of GitHub's Markdown would do with a body beside showing it."""
    body = text.partition("\n")[2] if text.startswith("<!-- fleet:bump ") else text
    ours = re.compile(rf"{re.escape(bump_view.HUB)}/[\w./-]+")
    found = [
        one
        for one in objections(re.sub(r"(?m)^(`{3,})diff$", r"\1sh", body))
        if not one.startswith("details ")
    ]
    # What is fenced or code is shown as it is, and ends where we say; so folds are counted of HTML.
    tokens = page.tokens(body)
    shown = "".join(one.content for one in tokens if one.type in {"fence", "code_inline"})
    tags = "".join(one.content for one in tokens if one.type.startswith("html_"))
    depth = tags.count("<details>") - tags.count("</details>")
    return [
        *(one for one in found if not ours.fullmatch(one) and one not in shown),
        *([f"{depth} folds too many"] if depth else []),
    ]


@pytest.mark.parametrize("shift", range(0, len(HOSTILE), 6))
def test_a_strangers_text_is_shown_and_does_nothing(shift: int) -> None:
    """No image, mention, link, HTML, issue or emoji of theirs; no fence, row or fold ends early."""
    texts = [*HOSTILE[shift:], *HOSTILE[:shift]]

    text = bump_body.render(poisoned(view(), texts, [0]), BODY_LIMIT)

    assert strange(text) == []
    kinds = [one.type for one in page.parser().parse(text)]
    plain = [one.type for one in page.parser().parse(bump_body.render(view(), BODY_LIMIT))]
    assert kinds.count("tr_open") == plain.count("tr_open")
    assert kinds.count("fence") == 2
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200f\x1b]", text)


def test_where_a_mirror_was_asked_nothing_leads_to_the_hub(fleet: Fleet) -> None:
    """Another place was looked at, and its address, which may hold a secret, is not told."""
    assert f"(https://huggingface.co/{factory.REPOSITORY}/commits/" in _body(fleet)
    fleet.monkeypatch.setenv("HF_ENDPOINT", "https://mirror.invalid/s3cret")
    text = _body(fleet)
    assert "https://" not in text
    assert "mirror.invalid" not in text


def _body(fleet: Fleet) -> str:
    (found,) = bump.plan(fleet.at, declaration.load(fleet.at.params), look_of(moved()))
    return found.text()


def test_what_is_left_out_goes_in_the_stated_order() -> None:
    """Differences, the longest first; commits; notes; files; ends of sentences; each is said."""
    whole = bump_body.render(view(), BODY_LIMIT)
    signs = ["A longer diff", "A diff", "Commit 3", "Note 5", "| f5 |", "Risk 5"]
    assert all(sign in whole for sign in signs)
    assert "Left out" not in whole

    limit, seen = len(whole), []
    while limit > 1200:
        text = bump_body.render(view(), limit - 1)
        assert len(text) < limit
        assert "Left out here for length: differences" in text
        gone = [sign not in text for sign in signs]
        assert gone == sorted(gone, reverse=True), gone
        seen.append(sum(gone))
        limit = len(text)
    assert seen[:6] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("end", [pulls.END, "<!-- fleet:above -->"])
def test_a_title_like_our_own_marks_ends_nothing(fleet: Fleet, end: str) -> None:
    """Not even one within another: what stands behind it would be taken for a person's words."""
    nested = f"{end[:11]}{end}{end[11:]} {end}"
    change = moved().difference
    assert change is not None
    change = change.model_copy(update={"details": {"README": f"+{nested}"}})
    hostile = moved(commits=(nested,), difference=change)

    fleet.bump(hostile)

    body = fleet.pull["body"]
    assert pulls.ours(body).rstrip().endswith("nothing is made again.")
    assert "<!-- fleet:above" not in body
    assert fleet.bump(hostile).writes == []
    assert fleet.pull["body"] == body


def test_the_longest_difference_fits_beside_what_people_wrote(fleet: Fleet) -> None:
    """Ours gives way: not a character of theirs is cut off."""
    fleet.bump(moved())
    theirs = "\n\n" + "Ada: measured by hand. " * 2000
    fleet.pull["body"] += theirs
    long = moved().difference
    assert long is not None
    change = long.files[0].model_copy(update={"name": "<" * 200})
    long = long.model_copy(
        update={
            "notes": ("&" * 2000,) * 50,
            "details": {f"{n}{'`' * 150}": "<&>\n" * 5000 for n in range(12)},
            "files": (change,) * 100,
            "files_count": 100,
        }
    )

    fleet.bump(moved(difference=long))

    body = fleet.pull["body"]
    assert body.endswith(theirs)
    assert len(body) <= pulls.BODY_CHARACTERS
    assert "Left out here for length: differences" in pulls.ours(body).splitlines()[-1]
    assert fleet.bump(moved(difference=long)).writes == []


# --- without GitHub ---------------------------------------------------------------------------


def test_a_dry_run_prints_the_pull_request_without_a_token(fleet: Fleet) -> None:
    """Title, branch, the one line, the body; as JSON, too. Nothing is asked of GitHub."""
    fleet.monkeypatch.delenv("GITHUB_TOKEN")
    fleet.api.forget()

    ran = fleet.bump(moved(), words=("--dry-run", MODEL))
    told = json.loads(fleet.bump(moved(), words=("--all", "--dry-run", "--json")).out)

    assert ran.code == 0
    assert ran.out.startswith(f"{MODEL}: {OLD[:7]} → {NEW[:7]} (weights)\n")
    assert f"+    revision: {NEW}  # pinned\n" in ran.out
    assert "**Not wanted**" in ran.out
    (one,) = told["bumps"]
    assert one["edits"] == {f"models.{MODEL}.revision": NEW}
    assert one["branch"] == BRANCH
    assert fleet.api.requests == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tiny-lama",), 'did you mean "tiny-llama"'),
        ((), "fleet bump MODEL"),
        (("--engine", "vllm"), "llama.cpp or ollama"),
        (("--all", "--upstream", "params.yaml"), "is no record of a look"),
        ((MODEL,), "--local makes the branch in this clone"),
    ],
)
def test_a_command_that_means_nothing_says_what_to_type(
    fleet: Fleet, words: tuple[str, ...], said: str
) -> None:
    """Exit 2 and the next step; nothing is asked."""
    fleet.monkeypatch.delenv("GITHUB_TOKEN")

    ran = fleet.bump(moved(), words=words)

    assert ran.code == 2
    assert said in ran.err


def test_another_declaration_is_looked_at_anew(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last look was of another revision: the Hub is asked, and the record is new."""
    with factory.upstream() as (hub, repo, pinned):
        text = PARAMS.replace(OLD, pinned)
        fleet.at.params.write_text(text)
        hub.use(monkeypatch)
        monkeypatch.setenv("GITHUB_TOKEN", "")

        ran = fleet.bump(current(OTHER), words=(MODEL, "--dry-run"))
        requests = len(hub.requests)
        again = __main__.main(["bump", MODEL, "--dry-run"])

    assert (ran.code, again) == (0, 0)
    assert f"+    revision: {repo.head}  # pinned" in ran.out
    assert requests > 0
    assert len(hub.requests) == requests  # the record of that look fits


@pytest.mark.parametrize("carried", [False, True])
def test_what_was_the_newest_last_week_takes_nobodys_place(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, *, carried: bool
) -> None:
    """A record left here, or a model that it only carries along: it is looked at again."""
    old = factory.NOW - timedelta(days=7)
    fleet.bump(moved(new=NEWER))
    asked: list[Any] = []

    def look(*_: Any, models: Any, **__: Any) -> Any:
        asked.append(models)
        return look_of(moved(new=NEWER), current(OTHER))

    monkeypatch.setattr(check_upstream, "look", look)
    stale = look_of(
        moved(last_success_at=old), current(OTHER), checked_at=factory.NOW if carried else old
    )
    for words in ((MODEL,), ("--all",)):
        records.write(fleet.at.upstream, stale)
        fleet.api.forget()
        assert __main__.main(["bump", *words]) == 0
        assert [one for one in fleet.api.requests if one.is_write] == []
    assert asked == [(MODEL,), None]


def test_an_engine_of_which_a_look_says_nothing_new_is_asked_for(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage of `fleet repro` asks no index: it has none, or carries along an old answer."""
    fleet.merged(PARAMS.replace("engines: false", "engines: true"))
    asked: list[Any] = []

    def look(*_: Any, models: Any, **__: Any) -> Any:
        asked.append(models)
        return look_of(current(), current(OTHER))

    monkeypatch.setattr(check_upstream, "look", look)
    digest = hashlib.sha256(fleet.at.params.read_bytes()).hexdigest()
    old = EngineUpstream(
        engine="llama.cpp", pinned="0.3.36", newest="0.3.37", sha256="c" * 64, state="moved",
        reason="It is newer.", last_success_at=factory.NOW - timedelta(days=7),
    )  # fmt: skip
    for engines in ((), (old,)):
        found = look_of(current(), current(OTHER), engines=engines, params_sha256=digest)
        records.write(fleet.at.upstream, found)
        assert __main__.main(["bump", "--engine", "llama.cpp"]) == 0

    assert asked == [None, None]
    assert fleet.api.pulls == {}


def test_a_record_that_is_named_and_old_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    """A job that is run again days later has it: nothing is written, and what to do is said."""
    path = tmp_path / "upstream.json"
    records.write(path, look_of(moved(), checked_at=factory.NOW - timedelta(days=2)))

    ran = fleet.bump(moved(), words=("--all", "--upstream", str(path)))

    assert (ran.code, ran.writes) == (2, [])
    assert "run all of its jobs again" in ran.err


def test_a_record_that_was_cut_off_is_no_reason_to_trust_anybody(fleet: Fleet) -> None:
    """It alone knew whose repository each was, so it is left as it is, and nothing is proposed."""
    fleet.bump(moved(), words=("--all", "--dry-run"))
    half = fleet.at.upstream.read_bytes()[:900]
    fleet.at.upstream.write_bytes(half)

    code = __main__.main(["bump", "--all", "--dry-run"])

    told = fleet.capsys.readouterr()
    assert (code, told.out) == (2, "")
    assert "fleet check-upstream" in told.err
    assert fleet.at.upstream.read_bytes() == half


# --- in a clone -------------------------------------------------------------------------------


class Clone:
    """A clone of a fleet in a folder of a larger repository, with somebody's unfinished work."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make it, and stand in it."""
        self.root, self.fleet = root, root / "models/fleet"
        self.fleet.mkdir(parents=True)
        for name, value in {
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_SYSTEM": "/dev/null",
            "GIT_AUTHOR_NAME": "Ada",
            "GIT_AUTHOR_EMAIL": "ada@example.invalid",
            "GIT_COMMITTER_NAME": "Ada",
            "GIT_COMMITTER_EMAIL": "ada@example.invalid",
        }.items():
            monkeypatch.setenv(name, value)
        for name in ("GITHUB_TOKEN", "GITHUB_ACTIONS"):
            monkeypatch.delenv(name, raising=False)
        self.git("init", "-q", "-b", "main")
        factory.checkout(self.fleet)
        (self.root / ".gitignore").write_text("work/\nresults/upstream.json\n")
        self.git("add", ".")
        self.git("commit", "-qm", "A fleet")
        monkeypatch.chdir(self.fleet)

    def git(self, *argv: str) -> str:
        """Run git; return what it prints."""
        from plan_factory import git  # noqa: PLC0415 - of DVC

        return git(self.root, *argv)

    def state(self) -> tuple[str, ...]:
        """Everything that a user would miss: files, index, branch."""
        files = sorted(
            f"{path} {path.read_bytes().hex()[:200]}"
            for path in self.root.rglob("*")
            if path.is_file() and ".git" not in path.parts and "work" not in path.parts
            and path.name != "upstream.json"
        )  # fmt: skip
        index = (self.root / ".git/index").read_bytes().hex()
        return (*files, index, self.git("symbolic-ref", "HEAD"), self.git("rev-parse", "main"))


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    """A clone."""
    return Clone(tmp_path / "mono", monkeypatch)


def test_a_branch_is_made_beside_unfinished_work(
    clone: Clone, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files, index and the branch that is checked out stay; the same command again does nothing."""
    (clone.fleet / "half.txt").write_text("half\n")
    clone.git("add", "models/fleet/half.txt")
    (clone.fleet / "half.txt").write_text("half of it\n")
    records.write(Layout(clone.fleet).upstream, look_of(moved(), current(OTHER)))
    before = clone.state()

    assert __main__.main(["bump", "--all", "--local"]) == 0
    made = clone.git("rev-parse", BRANCH).strip()
    assert __main__.main(["bump", "--all", "--local"]) == 0

    assert clone.state() == before
    assert clone.git("rev-parse", BRANCH).strip() == made
    assert clone.git("rev-parse", f"{BRANCH}^") == clone.git("rev-parse", "main")
    told = clone.git("diff", "--stat", "main", BRANCH)
    assert "models/fleet/params.yaml | 2 +-" in told
    assert clone.git("show", "-s", "--format=%s|%an", BRANCH).strip() == (
        f"{MODEL}: {OLD[:7]} → {NEW[:7]} (weights)|Ada"
    )
    assert f"git switch {BRANCH}" in capsys.readouterr().err

    # What is newer moves it; a commit of the user's keeps it.
    records.write(Layout(clone.fleet).upstream, look_of(moved(new=NEWER), current(OTHER)))
    assert __main__.main(["bump", MODEL, "--local"]) == 0
    assert NEWER in clone.git("show", f"{BRANCH}:models/fleet/params.yaml")
    clone.git("worktree", "add", "-q", "../there", BRANCH)
    there = clone.root.parent / "there"
    records.write(Layout(clone.fleet).upstream, look_of(moved(), current(OTHER)))
    __main__.main(["bump", MODEL, "--local"])
    assert "is checked out in" in capsys.readouterr().err
    (there / "mine.txt").write_text("mine\n")
    from plan_factory import git  # noqa: PLC0415 - of DVC

    git(there, "add", ".")
    git(there, "commit", "-qm", "Mine")
    kept = clone.git("rev-parse", BRANCH)
    __main__.main(["bump", MODEL, "--local"])
    assert "is a commit of yours" in capsys.readouterr().err
    assert clone.git("rev-parse", BRANCH) == kept


def test_what_somebody_amended_in_the_same_file_is_kept(
    clone: Clone, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message is still ours, and so is the only file; the other line is not."""
    records.write(Layout(clone.fleet).upstream, look_of(moved(), current(OTHER)))
    assert __main__.main(["bump", MODEL, "--local"]) == 0
    clone.git("switch", "-q", BRANCH)
    path = clone.fleet / "params.yaml"
    path.write_text(path.read_text().replace("context_tokens:   512", "context_tokens:   256"))
    clone.git("commit", "-q", "--amend", "--no-edit", "models/fleet/params.yaml")
    clone.git("switch", "-q", "main")
    amended = clone.git("rev-parse", BRANCH)

    records.write(Layout(clone.fleet).upstream, look_of(moved(new=NEWER), current(OTHER)))
    assert __main__.main(["bump", MODEL, "--local"]) == 0

    assert clone.git("rev-parse", BRANCH) == amended
    assert "is a commit of yours" in capsys.readouterr().err


def test_a_directory_that_changed_is_pinned_offline(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A `path:` source is looked at without a network, and becomes a branch of this clone."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    from pipelines import fetch  # noqa: PLC0415 - heavy

    source = clone.fleet / "model"
    source.mkdir()
    for name, data in factory.embedded().items():
        (source / name).write_bytes(data)
    digest = fetch.content_digest(source)
    text = PARAMS.replace(f'"hf:{factory.REPOSITORY}"', "path:model").replace(OLD, digest)
    (clone.fleet / "params.yaml").write_text(text)
    clone.git("add", ".")
    clone.git("commit", "-qm", "A model of our own")
    card = (source / "generation_config.json").read_bytes()
    (source / "generation_config.json").write_bytes(factory.edited(card, temperature=0.5))

    code = __main__.main(["bump", MODEL, "--local"])

    assert code == 0
    now = fetch.content_digest(source)
    assert now != digest
    assert (
        f"model are not committed: the digest is that of the files here. Commit them on {BRANCH}"
        in (capsys.readouterr().err)
    )
    told = clone.git("show", f"{BRANCH}:models/fleet/params.yaml")
    assert told.strip() == text.replace(digest, now).strip()

    # The record of that look fits, and the files are others again.
    (source / "generation_config.json").write_bytes(factory.edited(card, temperature=0.25))
    assert __main__.main(["bump", MODEL, "--local"]) == 0
    assert fetch.content_digest(source) in clone.git("show", f"{BRANCH}:models/fleet/params.yaml")


def test_a_clone_without_a_name_is_told_how_to_get_one(
    clone: Clone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Git refuses to commit for nobody: the next step, and no branch."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.delenv(f"GIT_{role}_NAME")
        monkeypatch.delenv(f"GIT_{role}_EMAIL")
    clone.git("config", "user.useConfigOnly", "true")
    records.write(Layout(clone.fleet).upstream, look_of(moved()))

    assert __main__.main(["bump", MODEL, "--local"]) == 7
    assert "git config user.name" in capsys.readouterr().err
    assert BRANCH not in clone.git("branch", "--list")


def test_an_app_and_a_job_know_each_others_commits(fleet: Fleet) -> None:
    """Records that a job's token put on an App's branch are ours, too."""
    fleet.token(APP, "fleet-of-octo")
    fleet.api.tokens["ghs_of-a-job"] = Token(ACTIONS)
    fleet.bump(moved())
    fleet.api.git.commit(BRANCH, {RECORDS: "{}\n"}, f"Records: hold\n\nat {NEW}.", author=ACTIONS)

    fleet.bump(moved(new=NEWER))

    assert RECORDS not in fleet.api.git.files(BRANCH)
    assert fleet.line() == f"-    revision: {OLD}  # pinned\n+    revision: {NEWER}  # pinned"
