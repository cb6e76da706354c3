"""
Upstream moves, and a fork follows: what was noticed, proposed, measured, merged, released, refused.

Every workflow is run by act and every verb is real; the Hub is the stand-in of tests/hub with real
commits, GitHub that of tests/github_api.py with real branches. The model is the embedded one, as if
`acme` had put it on the Hub.
"""

from __future__ import annotations

import copy
import json
import struct
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import act
import pytest
from github_api import ACTIONS, GitHubApi, Token
from hub import Hub
from operator_fork import MODEL, QUANTS, Fork, calm, ran, records, require_published
from test_chain import quick

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from hub import Repo

    from pipelines.toolchain import Toolchain

pytestmark = [pytest.mark.toolchain, pytest.mark.alone, pytest.mark.timeout(1800)]

NAME: Final = "acme/tiny"
WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "tokenizer_config.json"
CARD: Final = "README.md"
NOT_OF_THE_MODEL: Final = (".py", ".toml")
LONG_AGO: Final = datetime.now(UTC).replace(microsecond=0) - timedelta(days=60)
APP: Final = "ghs_of-an-app"


def embedded() -> dict[str, bytes]:
    """Return the files of the model that is in this repository."""
    return {
        path.name: path.read_bytes()
        for path in sorted((act.ROOT / "examples/tiny-llama").iterdir())
        if path.is_file() and not path.name.endswith(NOT_OF_THE_MODEL)
    }


def nudged(weights: bytes, tensor: str = "model.norm.weight") -> bytes:
    """Change the last bit of each value of one tensor of bf16: other weights, as good as before."""
    (length,) = struct.unpack_from("<Q", weights)
    header = json.loads(weights[8 : 8 + length])
    begin, end = (8 + length + offset for offset in header[tensor]["data_offsets"])
    part = bytes(value ^ (at % 2 == 0) for at, value in enumerate(weights[begin:end]))
    return weights[:begin] + part + weights[end:]


class Upstream(Fork):
    """A fork whose model is on the Hub."""

    def __init__(self, place: Path, api: GitHubApi, hub: Hub) -> None:
        """Let `acme` publish the model, and a fork declare it."""
        self.hub = hub
        self.repo: Repo = hub.create(NAME, files=embedded(), at=LONG_AGO)
        self.days = 0

        def ours(text: str) -> str:
            text = calm(QUANTS.sub("", quick(text)))
            source = text.index("source: path:examples/tiny-llama\n")
            end = text.index("    context_tokens:", source)
            text = f"{text[:source]}source: hf:{NAME}\n    revision: {self.repo.head}\n{text[end:]}"
            # A second core is for whatever else there is.
            text = text.replace("\nbenchmark:\n", "\nbenchmark:\n  threads: 1\n")
            # What a look saw come waits for days; the index of Python's packages is another story.
            watch = "check_upstream: {cooldown_days: 0, engines: false}\n"
            return text.replace("registries:\n", f"{watch}registries:\n")

        super().__init__(place, api, ours, env={**hub.env(), "STUB_APP_TOKEN": APP})
        self.job = api.tokens[act.TOKEN]

    def push(self, files: Mapping[str, bytes | None], title: str) -> str:
        """Let upstream move, a day later each time; all of it long enough ago."""
        self.days += 1
        return self.repo.commit(files, title, at=LONG_AGO + timedelta(days=self.days))

    def look(self, event: str = "schedule", **payload: Any) -> act.Run:
        """
        Run check-upstream.yml, with the tokens that its jobs have.

        That of GitHub is one for all jobs of act, so it has what they have together, and no right
        to write a branch: only the App has that, and only in the job that asks for it.
        """
        self.pull()
        self.api.tokens[act.TOKEN] = Token(
            ACTIONS, {"actions": "read", "contents": "read", "issues": "write",
                      "pull_requests": "read"},
        )  # fmt: skip
        self.api.tokens[APP] = Token(
            "fleet-app[bot]", {"contents": "write", "pull_requests": "write"}
        )
        run = self.run(
            event, "check-upstream.yml", payload, variables={"FLEET_APP_CLIENT_ID": "Iv1.x"},
            secrets={"FLEET_APP_KEY": "key-of-the-app"},
        )  # fmt: skip
        self.api.tokens[act.TOKEN] = self.job
        assert (run.rc, run.errors) == (0, []), run.text
        self.api.runs[self.runs] = {
            "path": ".github/workflows/check-upstream.yml", "event": event, "head_branch": "main",
            "head_repository": {"full_name": act.REPOSITORY},
        }  # fmt: skip
        self.api.add_artifact(self.runs, "upstream", {**run.artifact_files("upstream")})
        return run

    def found(self, run: act.Run) -> dict[str, Any]:
        """Return what a look says of the model."""
        record = json.loads((run.artifact("upstream") / "upstream.json").read_text())
        (model,) = record["models"]
        told: dict[str, Any] = model
        return told

    def bump(self) -> int | None:
        """Return the open pull request of the model."""
        open_ = [
            number
            for number, pull in self.api.pulls.items()
            if pull["head"] == f"bump/{MODEL}" and pull["state"] == "open"
        ]
        assert len(open_) <= 1
        return open_[0] if open_ else None

    def release(self) -> dict[str, Any]:
        """Return what the release says that main declares."""
        told: dict[str, Any] = json.loads(records(self, "main")[f"results/{MODEL}/release.json"])
        return told


@pytest.fixture(scope="module", name="fork")
def _fork(tmp_path_factory: pytest.TempPathFactory, tools: Toolchain) -> Iterator[Upstream]:
    """A fork whose model of the Hub was measured, merged and published as it is."""
    assert tools.tool("llama-quantize").exists()
    place = tmp_path_factory.mktemp("upstream")
    with Hub() as hub, GitHubApi(place / "github.git", repository=act.REPOSITORY) as api:
        fork = Upstream(place, api, hub)
        fork.begin()
        yield fork
        assert hub.unexpected == []


def test_what_did_not_move_costs_one_request(fork: Upstream) -> None:
    """Nothing is proposed, and no job that may write starts; a webhook looks at the same."""
    fork.look()
    for event, payload in (
        ("schedule", {}),
        ("repository_dispatch", {"action": "hub-webhook", "client_payload": {"x": "$(id)`id`"}}),
    ):
        fork.hub.forget()

        run = fork.look(event, **payload)

        assert run.jobs == {"look": "success"}
        assert [(each.method, each.path) for each in fork.hub.requests] == [
            ("GET", f"/api/models/{NAME}/revision/main")
        ]
        assert fork.found(run)["state"] == "current"
    assert fork.bump() is None


def test_new_weights_are_proposed_measured_merged_and_released(fork: Upstream) -> None:
    """One line of params.yaml; after the merge the release is made of the new revision."""
    before, pinned = fork.stable(), fork.repo.head
    weights = nudged(fork.repo.revision(pinned)[WEIGHTS])
    newest = fork.push({WEIGHTS: weights}, "Train on | @all <b>longer</b>")
    fork.hub.forget()

    run = fork.look()

    assert run.jobs == {"look": "success", "bump": "success"}
    told = fork.found(run)
    assert (told["state"], told["difference"]["classes"]) == ("moved", ["weights"])
    # The headers alone say what tensors there are; no weight was read.
    assert 0 < fork.hub.sent_bytes("*.safetensors") < len(weights) // 20
    number = fork.bump()
    assert number is not None
    pull = copy.deepcopy(fork.api.pulls[number])
    assert pull["title"] == f"{MODEL}: {pinned[:7]} → {newest[:7]} (weights)"
    assert pull["labels"] == ["bump", "bump: weights"]
    # As it is and inert: there is no mention and no HTML in code.
    assert "\n- `Train on | @all <b>longer</b>`\n" in pull["body"]
    changed = fork.api.git.text("diff", "-U0", "main", f"bump/{MODEL}").splitlines()[4:]
    assert changed[1:] == [f"-    revision: {pinned}", f"+    revision: {newest}"]

    measured = fork.measured(number)
    assert (measured.rc, measured.errors) == (0, []), measured.text
    assert f"benchmark@{MODEL}-Q8_0" in ran(measured)

    # It is proposed once: a later look costs one request, and leaves the records on the branch.
    head = fork.api.head_of(number)
    fork.hub.forget()
    again = fork.look()
    assert len(fork.hub.requests) == 1
    assert again.jobs == {"look": "success", "bump": "success"}
    assert (fork.bump(), fork.api.head_of(number), fork.api.pulls[number]) == (number, head, pull)

    published = fork.merge(number)
    require_published(fork, published)
    fork.merge_ledger()

    assert fork.stable() != before
    assert fork.release()["source"]["revision"] == newest
    assert fork.found(fork.look())["state"] == "current"


def test_a_new_template_is_measured_and_no_weight_is_asked_of_the_hub(fork: Upstream) -> None:
    """The weights of 20 GB models do not change with three lines of Jinja."""
    before, pinned = fork.stable(), fork.repo.head
    config = json.loads(fork.repo.revision(pinned)[CONFIG])
    config["chat_template"] = "{#- Said otherwise. -#}" + config["chat_template"]
    newest = fork.push({CONFIG: json.dumps(config, indent=2).encode()}, "Say it otherwise")
    fork.hub.forget()

    run = fork.look()

    number = fork.bump()
    assert number is not None, run.text
    pull = fork.api.pulls[number]
    assert pull["title"].endswith(f"→ {newest[:7]} (template)")
    assert "+{#- Said otherwise. -#}" in pull["body"]

    measured = fork.measured(number)

    assert (measured.rc, measured.errors) == (0, []), measured.text
    assert f"benchmark@{MODEL}-Q8_0" in ran(measured)
    assert fork.hub.sent_bytes("*.safetensors") == 0
    assert fork.hub.sent_bytes(f"*{CONFIG}") > 0
    require_published(fork, fork.merge(number))
    fork.merge_ledger()
    assert fork.stable() != before
    assert fork.release()["source"]["revision"] == newest


def test_a_new_card_is_no_pull_request(fork: Upstream) -> None:
    """Words for people change nothing that is built."""
    fork.push({CARD: fork.repo.revision(fork.repo.head)[CARD] + b"\nMore words.\n"}, "Words")

    run = fork.look()

    assert (fork.found(run)["state"], run.jobs) == ("card", {"look": "success"})
    assert fork.bump() is None


def test_a_new_licence_is_said_first_and_taken_back_when_upstream_does(fork: Upstream) -> None:
    """Somebody has to read it before anything else; a proposal that is over closes itself."""
    card = fork.repo.revision(fork.repo.head)[CARD]
    fork.push({CARD: card.replace(b"license: apache-2.0", b"license: cc-by-nc-4.0")}, "Relicense")

    run = fork.look()

    number = fork.bump()
    assert number is not None, run.text
    pull = fork.api.pulls[number]
    assert "bump: licence" in pull["labels"]
    first = pull["body"][pull["body"].index("Look at this first") :].splitlines()[2]
    assert first.startswith("> - **Licence**")
    assert "cc-by-nc-4.0" in pull["body"]

    fork.push({CARD: card}, "Back to what it was")
    taken_back = fork.look()

    assert taken_back.jobs == {"look": "success", "bump": "success"}
    assert fork.bump() is None
    assert len(fork.api.comments_of(number)) == 1
    assert fork.api.git.head(f"bump/{MODEL}") is None


def test_a_repository_of_another_name_is_an_issue_until_somebody_has_looked(
    fork: Upstream,
) -> None:
    """Whoever has the old name now, nothing of it is proposed."""
    fork.repo.rename("acme/tiny-2")
    fork.push({WEIGHTS: nudged(fork.repo.revision(fork.repo.head)[WEIGHTS])}, "From elsewhere")

    run = fork.look()

    assert (fork.found(run)["state"], fork.found(run)["doubt"]) == ("asks", "renamed")
    assert run.jobs == {"look": "success", "issue": "success"}
    assert fork.bump() is None
    ((number, issue),) = fork.api.issues.items()
    assert (issue["title"], issue["state"]) == (
        f"Upstream asks for a person: {MODEL}", "open",
    )  # fmt: skip
    assert "acme/tiny-2" in issue["body"]

    fork.repo.rename(NAME)
    assert fork.look().jobs["issue"] == "success"

    assert fork.api.issues[number]["state"] == "closed"
