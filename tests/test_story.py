"""
The whole story on a fork: a pull request is measured, judged, reported, merged, published, undone.

Every workflow is run by act; every verb, llama.cpp, Ollama, DVC's remote and the registry are real.
GitHub is the stand-in that refuses what GitHub's own description does not know, with real branches
behind it. The machine with the GPU label is this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import act
import comment_page
import github_events
import pytest
from github_api import GitHubApi
from test_chain import few_tasks, quick

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipelines.toolchain import Toolchain

pytestmark = [pytest.mark.toolchain, pytest.mark.alone, pytest.mark.timeout(1800)]

MODEL: Final = "tiny-llama"
_QUANTS = re.compile(rf"^  {MODEL}-(?!Q8_0)\S+: .*\n", re.MULTILINE)
_ATTEMPTS: Final = 3
# Eight tokens at a time are noisy; nothing here is about what a comparison can tell.
COMPARE: Final = "compare: {min_decode_effect: 0.45, min_prefill_effect: 0.45}\n"
# Made by this very test: numbers are `#`.
GOLDEN: Final = act.ROOT / "tests/data/story/comment.txt"


class Fork:
    """
    A fork on GitHub: its repository, its one runner, its registry `production`.

    Attributes:
        api: GitHub.
        root: A clone on the desk of the operator.
        production: The registry, a folder.
    """

    def __init__(self, place: Path, api: GitHubApi) -> None:
        """Lay the template out as the first commit of a fork, without a record."""
        self.place, self.api, self.production = place, api, place / "production"
        self.root = act.fork(place, leave_out=("results/", "dvc.lock"))
        remote = place / "dvc-remote"
        self.change(
            lambda text: (
                _QUANTS.sub("", quick(text))
                # By size the choice does not hang on how fast this machine is today.
                .replace("objective: speed", "objective: size", 1)
                # What 20 requests can show.
                .replace("slo: {ttft", "slo: {min_goodput: 0.8, ttft")
                # And what 8 answers of a model that never ends cannot.
                .replace("degenerate_prompts: 8", "degenerate_prompts: 24")
                .replace("registries:\n", f"{COMPARE}registries:\n")
                .replace(
                    "registries:\n",
                    "registries:\n"
                    f"  production: {{url: 'file:{self.production}', environment: production}}\n",
                )
            )
        )
        few_tasks(self.root)
        config = self.root / ".dvc/config"
        config.write_text(config.read_text().replace("url = remote", f"url = {remote}"))
        act.commit(self.root, "our fleet")
        act.git(self.root, "remote", "add", "origin", str(api.git.path))
        act.git(self.root, "push", "-q", "origin", "main")
        act.git(api.git.path, "config", "uploadpack.allowAnySHA1InWant", "true")
        api.tokens[act.TOKEN] = api.tokens[api.token]
        self.runs = 0

    def change(self, edit: Callable[[str], str]) -> None:
        """Edit params.yaml."""
        path = self.root / "params.yaml"
        before = path.read_text()
        path.write_text(edit(before))
        assert path.read_text() != before

    def propose(self, branch: str, edit: Callable[[str], str], title: str) -> int:
        """Open a pull request with an edited params.yaml."""
        self.pull()
        act.git(self.root, "checkout", "-q", "-b", branch)
        self.change(edit)
        act.commit(self.root, title)
        act.git(self.root, "push", "-q", "origin", branch)
        return self.api.add_pull(branch, title=title)

    def pull(self, branch: str = "main") -> str:
        """Take what GitHub has of a branch; return the commit."""
        act.git(self.root, "fetch", "-q", "origin")
        act.git(self.root, "checkout", "-q", "-B", branch, f"origin/{branch}")
        return act.git(self.root, "rev-parse", "HEAD")

    def run(self, event: str, workflow: str, payload: dict[str, Any], **more: Any) -> act.Run:
        """Run a workflow at the commit that the clone is at."""
        self.runs += 1
        place = self.place / f"run-{self.runs}"
        # What the runner keeps between jobs: DVC's cache. deploy/runner tells an operator to.
        config = place / "home/.config/dvc/config"
        config.parent.mkdir(parents=True)
        config.write_text(f"[cache]\n    dir = {self.place / 'dvc-cache'}\n")
        run = act.act(
            place, self.root, event, workflow, payload, origin=self.api.git.path,
            api=self.api.url, run_id=self.runs, labels=(act.HOSTED, "self-hosted", "gpu"),
            env={"GITHUB_ACTOR": "operator"}, **more,
        )  # fmt: skip
        (place / "log.txt").write_text(run.text, encoding="utf-8")
        return run

    def measure(self, number: int) -> act.Run:
        """Run model-pr.yml on a pull request, and report what came of it."""
        pull = self.api.pulls[number]
        head = self.pull(pull["head"])
        base = act.git(self.root, "rev-parse", f"origin/{pull['base']}")
        event = github_events.payload("pull_request", "synchronize")
        event["number"] = number
        event["pull_request"].update(number=number, title=pull["title"], labels=[])
        for side, ref, sha in (("head", pull["head"], head), ("base", pull["base"], base)):
            event["pull_request"][side].update(ref=ref, sha=sha)
            event["pull_request"][side]["repo"]["full_name"] = act.REPOSITORY
        run = self.run("pull_request", "model-pr.yml", event)
        self.report(run, number, head)
        return run

    def report(self, run: act.Run, number: int, head: str) -> act.Run:
        """Run report.yml on a run of model-pr.yml."""
        run_id = self.runs
        files = run.artifact("gate") / "gate.json"
        if files.exists():
            self.api.add_artifact(run_id, "gate", {"gate.json": files.read_bytes()})
        event = github_events.payload("workflow_run", "completed")
        told = event["workflow_run"]
        told.update(
            id=run_id, run_attempt=1, name="model PR", event="pull_request", head_sha=head,
            head_branch=self.api.pulls[number]["head"], status="completed",
            conclusion="success" if run.rc == 0 else "failure", pull_requests=[],
        )  # fmt: skip
        told["head_repository"]["full_name"] = act.REPOSITORY
        self.pull()
        reported = self.run("workflow_run", "report.yml", event)
        assert (reported.rc, reported.errors) == (0, []), reported.text
        return reported

    def measured(self, number: int) -> act.Run:
        """Measure; again, as the comment says, where something disturbed the machine."""
        for _ in range(_ATTEMPTS):
            run = self.measure(number)
            if run.outputs("gate", "gate/fleet").get("verdict") != "INVALID":
                return run
        pytest.fail(f"the machine was never quiet: {self.comment(number)}")

    def merge(self, number: int) -> act.Run:
        """Merge, and let publish.yml run."""
        self.api.close_pull(number, merge=True)
        return self.publish()

    def publish(self) -> act.Run:
        """Run publish.yml on main."""
        sha = self.pull()
        event = github_events.payload("push")
        event.update(ref="refs/heads/main", after=sha, deleted=False)
        run = self.run("push", "publish.yml", event)
        assert (run.rc, run.errors) == (0, []), run.text
        return run

    def roll_back(self, to: str, reason: str) -> act.Run:
        """Dispatch rollback.yml."""
        self.pull()
        inputs = {
            "model": MODEL, "to": to, "reason": reason, "registry": "production",
            "environment": "production",
        }  # fmt: skip
        event = {"inputs": inputs, "ref": "refs/heads/main"}
        run = self.run("workflow_dispatch", "rollback.yml", event)
        assert (run.rc, run.errors) == (0, []), run.text
        return run

    def comment(self, number: int) -> str:
        """Return the one comment on a pull request."""
        (one,) = self.api.comments_of(number)
        body: str = one["body"]
        return body

    def checks(self, sha: str) -> list[str]:
        """Return the conclusions of the check runs `fleet` on a commit."""
        return [
            check["conclusion"]
            for check in self.api.check_runs.values()
            if check["head_sha"] == sha and check["name"] == "fleet"
        ]

    def stable(self) -> str:
        """Return the release that `stable` means in the registry."""
        done = self.fleet("releases", MODEL, "--registry", "production", "--json")
        (registry,) = json.loads(done)["registries"]
        found: str = registry["stable"]
        return found

    def merge_ledger(self) -> None:
        """Merge the pull request by which the ledger of the last moves comes to main."""
        (number,) = (
            number
            for number, pull in self.api.pulls.items()
            if pull["head"] == "fleet/ledger" and pull["state"] == "open"
        )
        self.api.close_pull(number, merge=True)
        self.pull()

    def fleet(self, *argv: str) -> str:
        """Type a command at the desk."""
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", *argv], cwd=self.root, check=False,
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(act.ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


def add(type_: str) -> Callable[[str], str]:
    """Return the edit that declares a quant."""
    line = f"  {MODEL}-{type_}: {{model: {MODEL}, type: {type_}}}\n"
    return lambda text: text.replace("quants:\n", f"quants:\n{line}", 1)


def only(type_: str) -> Callable[[str], str]:
    """Return the edit after which a quant is the only one: what wins is what it measures."""
    quants = re.compile(rf"^  {MODEL}-\S+: .*\n", re.MULTILINE)
    return lambda text: add(type_)(quants.sub("", text))


def ran(run: act.Run) -> set[str]:
    """Return the stages that the machine with the label ran."""
    return {
        stage
        for entry in run.log
        if entry.get("command") == "set-output" and entry.get("name") == "ran"
        for stage in entry["arg"].split()
    }


def records(fork: Fork, revision: str) -> dict[str, bytes]:
    """Return what a commit holds of the model's records."""
    files = fork.api.git.files(revision)
    return {name: data for name, data in files.items() if name.startswith(f"results/{MODEL}/")}


def skeleton(body: str) -> list[str]:
    """Return what a comment says whatever was measured: sentences, tables, what is folded."""
    kept = re.findall(
        r"^(?:### .*|\*\*[^*]+\*\*|\| (?:quant|gate|set) .*|<details>.*)", body, re.MULTILINE
    )
    return [re.sub(r"\b[0-9a-f]{7,}|\d[\d,.]*", "#", line) for line in kept]


def require_readable(body: str, place: Path) -> None:
    """Assert that a browser shows it at two widths, charts and all; leave pictures of it."""
    (place / "comment.md").write_text(body, encoding="utf-8")
    if comment_page.BROWSER is None:
        return
    for width in (900, 390):
        seen = comment_page.browse(body, place, width)
        assert not [chart for chart in seen["charts"] if "Syntax error" in chart]
        assert (seen["wider"], seen["scroll"] <= seen["width"]) == ([], True)
        comment_page.browse(body, place, width, png=place / f"comment-{width}.png")


def require_published(fork: Fork, run: act.Run) -> None:
    """Assert that every GGUF of main is in the registry, byte for byte, and was attested."""
    digests = {
        json.loads(data)["gguf"]["sha256"]
        for name, data in records(fork, "main").items()
        if "/quantize/" in name
    }
    for digest in digests:
        data = (fork.production / "blobs/sha256" / digest).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
    told = [each for call in run.calls("actions/attest") for each in call["subjects"]]
    assert digests <= {each["sha256"] for each in told}


@pytest.fixture(scope="module", name="fork")
def _fork(tmp_path_factory: pytest.TempPathFactory, tools: Toolchain) -> Iterator[Fork]:
    """A fork whose first pull request was measured, merged and published."""
    assert tools.tool("llama-quantize").exists()
    place = tmp_path_factory.mktemp("story")
    with GitHubApi(place / "github.git", repository=act.REPOSITORY) as api:
        fork = Fork(place, api)
        number = fork.propose("first", lambda text: f"{text}# Ours.\n", "Measure what we have")
        run = fork.measured(number)
        assert (run.rc, run.errors) == (0, []), run.text
        fork.merge(number)
        fork.merge_ledger()
        yield fork


@contextmanager
def busy() -> Iterator[None]:
    """Keep both cores busy with something else."""
    loop = [sys.executable, "-c", "while True: pass"]
    children = [subprocess.Popen(loop) for _ in range(os.cpu_count() or 2)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_a_new_quant_is_measured_reported_merged_published_and_rolled_back(fork: Fork) -> None:
    """One line in params.yaml, one comment, one required check, one line to go back."""
    before = fork.stable()
    number = fork.propose("add-q4", add("Q4_K_M"), "Add Q4_K_M")
    asked = fork.api.head_of(number)

    run = fork.measured(number)

    # Measured once, on the machine with the label, and judged elsewhere.
    assert (run.rc, run.errors) == (0, []), run.text
    assert run.jobs == dict.fromkeys(("plan", "gpu", "gate", "adopt"), "success")
    (leg,) = run.legs("gpu")
    assert (leg["host"], leg["models"]) == ("local", MODEL)
    assert f"benchmark@{MODEL}-Q4_K_M" in ran(run)
    assert f"benchmark@{MODEL}-Q8_0" not in ran(run)
    bundles = list(run.artifact("bundle-local-1").iterdir())
    assert sum(path.stat().st_size for path in bundles) < 1 << 20
    # The evidence is one commit of records on top of what was asked for.
    head = fork.api.head_of(number)
    assert fork.api.git.text("rev-parse", f"{head}^") == asked
    changed = fork.api.git.text("diff", "--name-only", asked, head).splitlines()
    assert "dvc.lock" in changed
    assert all(name == "dvc.lock" or name.startswith(f"results/{MODEL}/") for name in changed)
    assert f"results/{MODEL}/benchmark/Q4_K_M.json" in changed
    # One comment; the check on the measured commit is green.
    body = fork.comment(number)
    require_readable(body, fork.place)
    assert skeleton(body) == GOLDEN.read_text(encoding="utf-8").splitlines()
    assert fork.checks(asked)[-1] == "success"

    # The new head needs no second measurement.
    again = fork.measure(number)

    assert (again.rc, again.errors) == (0, []), again.text
    assert again.jobs == dict.fromkeys(("plan", "gate"), "success")
    assert fork.api.head_of(number) == head
    assert fork.checks(head)[-1] == "success"
    assert "Q4_K_M" in fork.comment(number)

    published = fork.merge(number)

    assert fork.stable() != before
    require_published(fork, published)
    # The ledger waits in a pull request; nothing is lost if another run comes first.
    assert fork.publish().jobs == {"plan": "success"}
    fork.merge_ledger()
    # A second run finds nothing to do: no approval is asked for.
    assert fork.publish().jobs == {"plan": "success"}

    fork.roll_back("previous", "answers `@all` in <b>French</b>\n$(touch /tmp/x)")

    assert fork.stable() == before
    (proposed,) = [n for n, p in fork.api.pulls.items() if p["head"].startswith("fleet/rollback")]
    text = fork.api.git.files(fork.api.head_of(proposed))["params.yaml"].decode()
    assert f"stable: {before}" in text
    assert fork.checks(head)[-1] == "success"
    fork.api.close_pull(proposed, merge=True)
    fork.pull()
    assert fork.publish().jobs == {"plan": "success"}
    assert fork.stable() == before


def test_what_fails_its_gate_is_rejected_and_nothing_is_published(fork: Fork) -> None:
    """The check is red, the comment says which limit, the registry stays as it is."""
    before = fork.stable()

    number = fork.propose("only-q2", only("Q2_K"), "Serve Q2_K alone")
    asked = fork.api.head_of(number)

    run = fork.measured(number)

    assert run.rc == 1
    assert run.jobs["gate"] == "failure", run.text
    assert run.errors == []
    assert run.outputs("gate", "gate/fleet")["verdict"] == "REJECT"
    assert fork.checks(asked)[-1] == "failure"
    body = fork.comment(number)
    assert "max_kld_mean_nats" in body or "divergence" in body
    assert "0.005" in body
    again = fork.measure(number)
    assert again.jobs == {"plan": "success", "gate": "failure"}
    assert fork.publish().jobs == {"plan": "success"}
    assert fork.stable() == before
    fork.api.close_pull(number)


def test_what_a_busy_machine_measured_is_invalid_and_the_comment_says_measure_again(
    fork: Fork,
) -> None:
    """Neutral in the list of checks, red at the gate, no commit, nothing published."""
    before = fork.stable()
    number = fork.propose("only-q6", only("Q6_K"), "Serve Q6_K alone")
    asked = fork.api.head_of(number)

    with busy():
        run = fork.measure(number)

    assert (run.rc, run.outputs("gate", "gate/fleet")["verdict"]) == (1, "INVALID"), run.text
    assert run.errors == []
    assert "adopt" not in run.jobs
    assert fork.api.head_of(number) == asked
    assert fork.checks(asked)[-1] == "neutral"
    assert re.search(r"(?i)measure|re-run", fork.comment(number).splitlines()[1])
    assert fork.publish().jobs == {"plan": "success"}
    assert fork.stable() == before
    fork.api.close_pull(number)
