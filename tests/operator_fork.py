"""
An operator's fork on GitHub, from end to end: workflows run by act, everything of ours real.

    fork = operator_fork.Fork(place, api, lambda text: ...)       its params.yaml, edited
    number = fork.propose("branch", edit, "title")                a pull request
    run = fork.measured(number)                                   model-pr.yml, then report.yml
    fork.merge(number)                                            publish.yml

GitHub is the stand-in of github_api.py with real branches behind it; the registry `production` and
DVC's remote are folders, the machine with the GPU label is this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import act
import github_events
import pytest
from test_chain import few_tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from github_api import GitHubApi

MODEL: Final = "tiny-llama"
QUANTS: Final = re.compile(rf"^  {MODEL}-(?!Q8_0)\S+: .*\n", re.MULTILINE)
_ATTEMPTS: Final = 3
# Eight tokens at a time are noisy; nothing here is about what a comparison can tell. On a machine
# that is made busy none comes to an end, however long it tries.
COMPARE: Final = "compare: {min_decode_effect: 0.45, min_prefill_effect: 0.45, max_minutes: 3}\n"


def calm(text: str) -> str:
    """Edit params.yaml so that nothing hangs on how fast this machine is today."""
    return (
        text.replace("objective: speed", "objective: size", 1)
        # What 20 requests can show.
        .replace("slo: {ttft", "slo: {min_goodput: 0.8, ttft")
        # And what 8 answers of a model that never ends cannot.
        .replace("degenerate_prompts: 8", "degenerate_prompts: 24")
        .replace("registries:\n", f"{COMPARE}registries:\n")
    )


class Fork:
    """
    A fork on GitHub: its repository, its one runner, its registry `production`.

    Attributes:
        api: GitHub.
        root: A clone on the desk of the operator.
        production: The registry, a folder.
    """

    def __init__(
        self,
        place: Path,
        api: GitHubApi,
        edit: Callable[[str], str],
        *,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """
        Lay the template out as the first commit of a fork, without a record.

        Args:
            place: An empty folder.
            api: GitHub.
            edit: Makes its params.yaml of the template's, but for the registry.
            env: Of every step of every job, and of the desk.
        """
        self.place, self.api, self.production = place, api, place / "production"
        self.env = dict(env or {})
        self.root = act.fork(place, leave_out=("results/",))
        remote = place / "dvc-remote"
        self.change(
            lambda text: edit(text).replace(
                "registries:\n",
                "registries:\n"
                f"  production: {{url: 'file:{self.production}', environment: production}}\n",
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

    def begin(self) -> None:
        """Have what is declared measured, merged and published for the first time."""
        number = self.propose("first", lambda text: f"{text}# Ours.\n", "Measure what we have")
        run = self.measured(number)
        assert (run.rc, run.errors) == (0, []), run.text
        self.merge(number)
        self.merge_ledger()

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
            env={"GITHUB_ACTOR": "operator", **self.env}, **more,
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
            capture_output=True, text=True,
            env={**os.environ, **self.env, "PYTHONPATH": str(act.ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


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
