"""The pull request that brings ledger, releases and `stable:` to the default branch."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import release_factory as factory
from github_api import Fault, GitHubApi
from release_checkout import MODEL, OTHER, PARAMS

from pipelines import declaration, propose
from pipelines.errors import FleetError
from pipelines.github.client import GitHub
from pipelines.layout import Layout
from pipelines.ledger import Ledger
from pipelines.release_records import Move

if TYPE_CHECKING:
    from collections.abc import Iterator

BRANCH = "fleet/ledger"
LEDGER = f"results/{MODEL}/ledger.jsonl"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[GitHubApi]:
    """A repository whose default branch holds a declaration."""
    with GitHubApi(tmp_path / "origin.git") as served:
        served.git.commit("main", {"params.yaml": PARAMS, "README.md": "A fleet.\n"})
        yield served


def gh(api: GitHubApi) -> GitHub:
    """Return a client of it that does not wait."""
    return GitHub(api.repository, api.token, api_url=api.url, sleep=lambda _: None)


def move(sequence: int, release: int, **changes: Any) -> Move:
    """Build a move to a release that is called by a number."""
    fields = {
        "sequence": sequence,
        "action": "publish",
        "release": f"{release:064x}",
        "previous": None,
        "at": "2027-01-31T12:00:00Z",
        "who": "Ada",
        "why": "a better one",
        "run": None,
    }
    return Move.model_validate(fields | changes)


def checkout(root: Path, *moves: Move, registry: str = "production", model: str = MODEL) -> Layout:
    """Make a checkout whose ledger holds moves."""
    at = Layout(root)
    at.ledger(model).parent.mkdir(parents=True, exist_ok=True)
    Ledger.load(at.ledger(model), model).append(registry, "stable", *moves)
    return at


def proposed(api: GitHubApi, at: Layout, *models: str) -> propose.Proposed:
    """Propose the ledgers of a checkout."""
    changes = [propose.ledger_change(at, model) for model in models or (MODEL,)]
    return propose.propose(gh(api), changes, branch=BRANCH, title="Ledger", body="Moves.")


def moves_of(api: GitHubApi, tmp_path: Path, branch: str = BRANCH) -> dict[str, list[int]]:
    """Read the ledger of a branch: numbers of moves by registry."""
    path = tmp_path / f"read-{len(list(tmp_path.iterdir()))}.jsonl"
    path.write_bytes(api.git.files(branch)[LEDGER])
    ledger = Ledger.load(path, MODEL)
    return {
        name: [each.sequence for each in ledger.moves(name, "stable")] for name in ledger.registries
    }


def test_a_proposal_is_one_commit_with_the_files_alone(api: GitHubApi, tmp_path: Path) -> None:
    """Nothing else of the default branch changes; the commit is a child of it."""
    found = proposed(api, checkout(tmp_path / "a", move(1, 1)))

    assert found.commit == api.git.head(BRANCH)
    assert api.git.text("diff", "--name-only", "main", BRANCH) == LEDGER
    assert api.git.text("rev-parse", f"{BRANCH}^") == api.git.head("main")
    (pull,) = api.pulls.values()
    assert (pull["head"], pull["base"], pull["title"]) == (BRANCH, "main", "Ledger")


def test_what_the_default_branch_has_is_not_proposed(api: GitHubApi, tmp_path: Path) -> None:
    """No commit, no branch, no pull request."""
    at = checkout(tmp_path / "a", move(1, 1))
    api.git.commit("main", {LEDGER: at.ledger(MODEL).read_bytes()})

    assert proposed(api, at) == propose.Proposed()
    assert api.git.head(BRANCH) is None
    assert not [seen for seen in api.requests if seen.is_write]


def test_proposing_again_writes_nothing(api: GitHubApi, tmp_path: Path) -> None:
    """The same pull request, no commit."""
    at = checkout(tmp_path / "a", move(1, 1))
    first = proposed(api, at)
    api.forget()

    again = proposed(api, at)

    assert (again.commit, again.number) == (None, first.number)
    assert not [seen for seen in api.requests if seen.is_write]


def test_lines_that_wait_are_never_lost(api: GitHubApi, tmp_path: Path) -> None:
    """Two checkouts that know nothing of each other, and a default branch that moves on."""
    proposed(api, checkout(tmp_path / "a", move(1, 1)))
    proposed(api, checkout(tmp_path / "b", move(1, 7), registry="backup"))
    elsewhere = checkout(tmp_path / "c", move(1, 9), registry="local")
    api.git.commit(
        "main", {LEDGER: elsewhere.ledger(MODEL).read_bytes(), "README.md": "Another.\n"}
    )
    proposed(api, checkout(tmp_path / "d", move(1, 1), move(2, 2)))

    assert moves_of(api, tmp_path) == {"backup": [1], "local": [1], "production": [1, 2]}
    assert len(api.pulls) == 1
    assert api.git.files(BRANCH)["README.md"] == b"Another.\n"
    # It merges without a conflict, and the default branch then has all of it.
    api.close_pull(next(iter(api.pulls)), merge=True)
    assert moves_of(api, tmp_path, "main") == {
        "backup": [1], "local": [1], "production": [1, 2],
    }  # fmt: skip


def test_what_waits_of_other_models_stays(api: GitHubApi, tmp_path: Path) -> None:
    """Each run proposes its own models; the pull request keeps the rest."""
    proposed(api, checkout(tmp_path / "a", move(1, 1)))

    proposed(api, checkout(tmp_path / "b", move(1, 1), model=OTHER), OTHER)

    assert {LEDGER, f"results/{OTHER}/ledger.jsonl"} <= set(api.git.files(BRANCH))


def test_racing_runs_leave_one_pull_request_with_all_lines(api: GitHubApi, tmp_path: Path) -> None:
    """Six at once, each of another registry: who is too late reads again."""
    places = [
        checkout(tmp_path / name, move(1, number), registry=name)
        for number, name in enumerate("abcdef")
    ]
    with ThreadPoolExecutor(len(places)) as pool:
        found = list(pool.map(lambda at: proposed(api, at), places))

    assert len({each.number for each in found}) == 1
    assert len(api.pulls) == 1
    assert moves_of(api, tmp_path) == {name: [1] for name in "abcdef"}


@pytest.mark.parametrize("waits", [b"no ledger\n", b"\xff\xfe", b'{"kind": "move"}\n'])
def test_a_branch_with_something_else_in_the_ledger_is_not_believed(
    api: GitHubApi, tmp_path: Path, waits: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was pushed there by somebody is left out, and said."""
    api.git.commit("main", {})
    api.git.git("update-ref", f"refs/heads/{BRANCH}", str(api.git.head("main")))
    api.git.commit(BRANCH, {LEDGER: waits, "pipelines/evil.py": "import os\n"})

    proposed(api, checkout(tmp_path / "a", move(1, 1)))

    assert moves_of(api, tmp_path) == {"production": [1]}
    assert "pipelines/evil.py" not in api.git.files(BRANCH)
    assert "left out" in capsys.readouterr().err


def test_two_stories_of_the_default_branch_are_an_error(api: GitHubApi, tmp_path: Path) -> None:
    """Nobody guesses which is true; nothing is written."""
    there = checkout(tmp_path / "a", move(1, 1))
    api.git.commit("main", {LEDGER: there.ledger(MODEL).read_bytes()})

    with pytest.raises(FleetError, match="two branches moved"):
        proposed(api, checkout(tmp_path / "b", move(1, 2)))

    assert api.git.head(BRANCH) is None


def test_only_stable_changes_in_the_params_of_the_default_branch(
    api: GitHubApi, tmp_path: Path
) -> None:
    """What was merged since the checkout was made stays: one line of today's text."""
    today = PARAMS.replace("# The fleet of a test", "# A fleet that was edited since")
    api.git.commit("main", {"params.yaml": today})
    at = Layout(tmp_path / "a")
    change = propose.stable_change(at, MODEL, "e" * 64)

    propose.propose(gh(api), [change], branch="fleet/rollback-m", title="Back", body="Back.")

    text = api.git.files("fleet/rollback-m")["params.yaml"].decode()
    (tmp_path / "params.yaml").write_text(text)
    assert declaration.load(tmp_path / "params.yaml").models[MODEL].stable == "e" * 64
    assert set(text.splitlines()) - set(today.splitlines()) == {f"    stable: {'e' * 64}"}
    assert set(today.splitlines()) <= set(text.splitlines())


def test_a_model_that_is_gone_from_the_default_branch_is_said(api: GitHubApi) -> None:
    """Its `stable:` has no place any more."""
    change = propose.stable_change(Layout(Path()), "gone-model", "e" * 64)

    with pytest.raises(FleetError, match="not declared on the default branch"):
        propose.propose(gh(api), [change], branch="b", title="Back", body="Back.")


def test_a_release_that_follows_the_waiting_one_is_kept(api: GitHubApi, tmp_path: Path) -> None:
    """The default branch got a newer one meanwhile: what waits does not replace it."""
    old = factory.composed(tmp_path / "ggufs", 1)
    new = factory.composed(tmp_path / "ggufs", 2, previous=old.id)
    name = f"results/{MODEL}/release.json"
    at = Layout(tmp_path / "a")
    at.release(MODEL).parent.mkdir(parents=True)
    at.release(MODEL).write_bytes(old.data)
    propose.propose(
        gh(api), [propose.release_change(at, MODEL)], branch=BRANCH, title="Ledger", body="Moves."
    )
    api.git.commit("main", {name: new.data})

    proposed(api, checkout(tmp_path / "b", move(1, 1), model=OTHER), OTHER)

    assert api.git.files(BRANCH)[name] == new.data


def test_a_lost_answer_or_a_refusal_at_any_call_is_ended_by_the_next_run(
    api: GitHubApi, tmp_path: Path
) -> None:
    """403, 422, 500 and a broken connection at each write: never two pull requests."""
    at = checkout(tmp_path / "a", move(1, 1))
    proposed(api, at)
    places = [0, *(index for index, seen in enumerate(api.requests) if seen.is_write)]
    assert len(places) == 5
    faults = [
        *(
            Fault(kind="status", status=status, body={"message": "no"})
            for status in (403, 422, 500)
        ),
        Fault(kind="lose"),
    ]
    for fault in faults:
        for index in places:
            for number in [n for n, pull in api.pulls.items() if pull["state"] == "open"]:
                api.close_pull(number)
            api.git.git("update-ref", "-d", f"refs/heads/{BRANCH}")
            api.forget()
            api.strike(fault, at=index)
            try:
                proposed(api, at)
            except FleetError as error:
                assert error.message  # noqa: PT017 - either outcome is right

            api.forget()
            proposed(api, at)

            assert sum(pull["state"] == "open" for pull in api.pulls.values()) == 1
            assert moves_of(api, tmp_path) == {"production": [1]}


def test_words_of_a_person_stay_in_the_pull_request(api: GitHubApi, tmp_path: Path) -> None:
    """What somebody wrote below our part is still there after the next run."""
    proposed(api, checkout(tmp_path / "a", move(1, 1)))
    (pull,) = api.pulls.values()
    pull["body"] += "\n\nI looked at it. Ada"

    proposed(api, checkout(tmp_path / "b", move(1, 1), move(2, 2)))

    assert "I looked at it. Ada" in pull["body"]
    assert json.dumps(pull["body"]).count("fleet:begin") == 1
