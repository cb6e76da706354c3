"""
Workflows and actions run by `act` on this machine, without containers and without GitHub.

    fork = act.fork(tmp_path)                    a checkout of the template, as a fork has it
    run = act.act(tmp_path, fork, "pull_request", "model-pr.yml", payload)
    run.rc, run.jobs, run.steps("plan"), run.outputs("plan", "plan"), run.summaries("plan"),
    run.annotations(), run.calls("actions/upload-artifact"), run.errors, run.artifact("plan")

Each job runs in an empty folder into which the stand-in for actions/checkout fetches what the real
one would: a commit of `origin`, as deep as the workflow asks. Actions of others are the stand-ins
of tests/act_stubs, with the inputs and outputs of .github/pins.yaml; one that has none fails the
run. What `act` does not enforce (permissions, environments, concurrency, filters, time-outs of
jobs) is held by other tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import lowering
import pytest
import sample
from ruamel.yaml import YAML

from checks import installed
from pipelines import owners, toolchain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT: Final = Path(__file__).resolve().parent.parent
STUB: Final = ROOT / "tests/act_stubs/stub.py"
REPOSITORY: Final = "o/r"
TOKEN: Final = "token-of-the-test"
HOSTED: Final = "ubuntu-24.04"
_AUTHOR = ("-c", "user.name=Test", "-c", "user.email=test@example.invalid")
_USES = re.compile(r"\buses\"?: \"?([\w.-]+/[\w.-]+)@([\w.-]+)")
_WITHIN_S: Final = 900.0


def git(root: Path, *argv: str) -> str:
    """Run git, and return what it prints."""
    done = subprocess.run(
        ["git", *_AUTHOR, *argv], cwd=root, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit(root: Path, message: str = "change") -> str:
    """Commit everything; return the commit."""
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", message)
    return git(root, "rev-parse", "HEAD")


def fork(place: Path, *, leave_out: Sequence[str] = ("bench/", "docs/", "tests/")) -> Path:
    """
    Return a git repository with one commit on `main`: this checkout, the operator's paths sampled.

    Args:
        place: An empty folder.
        leave_out: Beginnings of paths. Without `results/` there are no records and no locks, and
            llama.cpp and Ollama are those that this repository pins.
    """
    root = place / "fork"
    listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in listed:
        source = ROOT / name
        left = owners.is_operators(name) or name.startswith(tuple(leave_out))
        if name and source.is_file() and not left:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, root / name)
    sample.lay(root, records="results/" not in leave_out)
    git(root, "init", "-q", "-b", "main")
    # So that a job can fetch any commit by its name, as from GitHub.
    git(root, "config", "uploadpack.allowAnySHA1InWant", "true")
    commit(root, "template")
    return root


# --- what a run was ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Step:
    """
    A step that ran.

    Attributes:
        id: Its id; its number, as text, if it has none. Inside an action `outer/inner`.
        result: success or failure, before `continue-on-error`.
        matrix: That of its job.
    """

    id: str
    result: str
    matrix: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What shows up in the list of a run, and in a diff where it has a place."""

    kind: str
    text: str
    place: dict[str, str]


@dataclass(frozen=True)
class Run:
    """
    A run of one workflow.

    Attributes:
        rc: Exit code of act: 1 if a job failed.
        log: Its entries.
        stub_dir: Where the stand-ins keep artifacts and calls.
        text: Everything as text, for people.
    """

    rc: int
    log: tuple[dict[str, Any], ...]
    stub_dir: Path
    text: str

    @cached_property
    def jobs(self) -> dict[str, str]:
        """Result of each job that ran, by its id; of several legs the worst."""
        found: dict[str, str] = {}
        for entry in self.log:
            if "jobResult" in entry and found.get(entry["jobID"]) != "failure":
                found[entry["jobID"]] = entry["jobResult"]
        return found

    def legs(self, job: str) -> list[dict[str, Any]]:
        """Return the matrix of each leg of a job, in the order in which they ran."""
        return [e["matrix"] for e in self.log if "jobResult" in e and e["jobID"] == job]

    def steps(self, job: str, **matrix: Any) -> list[Step]:
        """Return the steps of a job that ran, those inside actions too."""
        return [
            Step(id="/".join(entry["stepID"]), result=entry["stepResult"], matrix=entry["matrix"])
            for entry in self._of(job, matrix)
            if "stepResult" in entry and entry.get("stage") == "Main"
        ]

    def outputs(self, job: str, step: str, **matrix: Any) -> dict[str, str]:
        """Return the outputs that a step set; `outer/inner` are those of a step of an action."""
        return {
            entry["name"]: entry["arg"]
            for entry in self._of(job, matrix)
            if entry.get("command") == "set-output" and "/".join(entry["stepID"]) == step
        }

    def summaries(self, job: str, **matrix: Any) -> list[str]:
        """Return what each step put into the summary of the job; act tells of actions twice."""
        found = [e["content"] for e in self._of(job, matrix) if e.get("command") == "summary"]
        return list(dict.fromkeys(found))

    def annotations(self, kind: str | None = None) -> list[Annotation]:
        """Return errors, warnings and notices."""
        return [
            Annotation(kind=entry["command"], text=entry["arg"], place=entry.get("kvPairs") or {})
            for entry in self.log
            if entry.get("command") in ({"error", "warning", "notice"} if kind is None else {kind})
        ]

    @property
    def errors(self) -> list[str]:
        """Return what act could not do, such as an expression; the step succeeds all the same."""
        return [
            entry["msg"]
            for entry in self.log
            if entry.get("level") == "error"
            and "command" not in entry
            and not _OF_A_FAILURE.match(entry["msg"])
        ]

    def calls(self, action: str | None = None) -> list[dict[str, Any]]:
        """Return what the stand-ins were asked for."""
        path = self.stub_dir / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        told = [json.loads(line) for line in lines]
        return [call for call in told if action is None or call["action"] == action]

    def artifact(self, name: str) -> Path:
        """Return the folder of an artifact."""
        return self.stub_dir / "artifacts" / name

    def artifact_files(self, name: str) -> dict[str, bytes]:
        """Return what an artifact holds, as GitHub would zip it."""
        root = self.artifact(name)
        return {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    def said(self, job: str) -> str:
        """Return what the steps of a job printed."""
        return "".join(e.get("raw_output", "") for e in self._of(job, {}))

    def _of(self, job: str, matrix: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [
            entry
            for entry in self.log
            if entry.get("jobID") == job
            and all((entry.get("matrix") or {}).get(key) == value for key, value in matrix.items())
        ]


# A step or job failed: that is what `rc`, `jobs` and `steps` are for.
_OF_A_FAILURE = re.compile(r"exit status \d+$|Error: Job '[^']*' failed$")


# --- a run ------------------------------------------------------------------------------------


def act(  # noqa: PLR0913 - each option is one independent fact about a run
    place: Path,
    root: Path,
    event: str,
    workflow: str,
    payload: Mapping[str, Any] | None = None,
    *,
    origin: Path | None = None,
    api: str = "http://127.0.0.1:9",
    secrets: Mapping[str, str] | None = None,
    variables: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    actions: Mapping[str, Path] | None = None,
    labels: Sequence[str] = (HOSTED, "self-hosted"),
    run_id: int = 77,
    flags: Sequence[str] = (),
) -> Run:
    """
    Run one workflow of a checkout.

    Args:
        place: A folder for everything else; that of an earlier run of the same workflow keeps its
            artifacts, as a re-run of failed jobs does.
        root: The checkout; its HEAD is `github.sha`.
        event: What happens: `pull_request`.
        workflow: Name of the file in .github/workflows.
        payload: The event as GitHub sends it; its repository is filled in.
        origin: The repository that jobs check out; `root` if None.
        api: Address of GitHub's API.
        secrets: Beside GITHUB_TOKEN.
        variables: `vars`.
        env: Of every step.
        actions: Folder of other actions by `owner/name@ref`.
        labels: Labels for which there is a runner; a job that wants another one does not run.
        run_id: Number of the run.
        flags: Options of act.
    """
    program = _program()
    stub_dir, home = place / "stub", place / "home"
    for folder in (stub_dir, home):
        folder.mkdir(parents=True, exist_ok=True)
    (stub_dir / "calls.jsonl").unlink(missing_ok=True)
    work = place / "lowered"
    shutil.rmtree(work, ignore_errors=True)
    git(place, "clone", "-q", "--shared", str(root), str(work))
    lowering.lower(work)
    event_file = place / "event.json"
    event_file.write_text(json.dumps({"repository": _repository(), **(payload or {})}))
    stubs = _stubs(place / "stubs", work) | dict(actions or {})
    given = {
        "GITHUB_REPOSITORY": REPOSITORY,
        "GITHUB_REPOSITORY_OWNER": REPOSITORY.split("/")[0],
        "GITHUB_RUN_ID": str(run_id),
        "GITHUB_API_URL": api,
        "STUB_DIR": str(stub_dir),
        "STUB_ORIGIN": str(origin or root),
        "STUB_PYTHON": sys.executable,
        # The environment and the toolchain of the tests: a job installs and builds nothing.
        "GGUF_FLEET_VENV": sys.prefix,
        "GGUF_FLEET_CACHE": str(toolchain.default_cache_root()),
        "HF_HUB_OFFLINE": "1",
        **(env or {}),
    }
    argv = [
        str(program), event, "-C", str(work), "-W", f".github/workflows/{workflow}",
        "-e", str(event_file), "--json", "--rm", "--concurrent-jobs", "1", "--no-skip-checkout",
        "--no-cache-server", "--artifact-server-addr", "127.0.0.1", "--cache-server-addr",
        "127.0.0.1", "--defaultbranch", "main", "--action-cache-path", str(place / "act"),
        *(f"--{kind}-file={os.devnull}" for kind in ("env", "secret", "var", "input")),
        *(f"-P={label}=-self-hosted" for label in labels),
        *(f"--local-repository={name}={folder}" for name, folder in stubs.items()),
        *(f"-s={k}={v}" for k, v in {"GITHUB_TOKEN": TOKEN, **(secrets or {})}.items()),
        *(f"--var={k}={v}" for k, v in (variables or {}).items()),
        *(f"--env={k}={v}" for k, v in given.items()),
        *flags,
    ]  # fmt: skip
    # act hands its whole environment to every step.
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "LANG": "C.UTF-8",
    }
    done = subprocess.run(
        argv, cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=_WITHIN_S, check=False,
    )  # fmt: skip
    entries = tuple(_entries(done.stdout))
    text = "\n".join(_line(entry) for entry in entries)
    return Run(done.returncode, entries, stub_dir, text)


def _program() -> Path:
    try:
        return installed.go_program(*installed.ACT)
    except installed.MissingError as error:
        pytest.skip(error.message)


def _repository() -> dict[str, Any]:
    owner, name = REPOSITORY.split("/")
    return {
        "full_name": REPOSITORY,
        "name": name,
        "owner": {"login": owner},
        "default_branch": "main",
        "private": False,
    }


def _entries(stdout: str) -> list[dict[str, Any]]:
    """Read the lines of the log; one that is no JSON is a fault of act, told as an error."""
    found = []
    for line in stdout.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = {"level": "error", "msg": line}
        if "stepid" in entry:
            entry.setdefault("stepID", entry["stepid"])
        found.append(entry)
    return found


def _line(entry: Mapping[str, Any]) -> str:
    job = str(entry.get("job", "")).strip()
    return f"{entry.get('level', '')} [{job}] {entry.get('msg', '').rstrip()}"


def _stubs(place: Path, work: Path) -> dict[str, Path]:
    """Lay out a stand-in for every action of others that the workflows name, at that very ref."""
    named: set[tuple[str, str]] = set()
    for path in (work / ".github/workflows").glob("*.yml"):
        named |= set(_USES.findall(path.read_text(encoding="utf-8")))
    pins = YAML(typ="safe").load(ROOT / ".github/pins.yaml")
    found = {}
    for name, ref in sorted(named):
        if name in pins:
            folder = place / name.replace("/", "-")
            _lay_out(folder, name, pins[name])
            found[f"{name}@{ref}"] = folder
    return found


def _lay_out(folder: Path, name: str, pin: Mapping[str, Any]) -> None:
    """Write the action.yml of a stand-in: the names of the real one, and one step."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(STUB, folder / "stub.py")
    action = {
        "name": name,
        "description": f"Stand-in for {name}",
        "inputs": {each: {"description": each} for each in pin["inputs"]},
        "outputs": {
            each: {"description": each, "value": f"${{{{ steps.stub.outputs.{each} }}}}"}
            for each in pin["outputs"]
        },
        "runs": {
            "using": "composite",
            "steps": [
                {
                    "id": "stub",
                    "shell": "bash",
                    "env": {"INPUTS": "${{ toJSON(inputs) }}"},
                    "run": f'"$STUB_PYTHON" -I "$GITHUB_ACTION_PATH/stub.py" {name}',
                }
            ],
        },
    }
    (folder / "action.yml").write_text(json.dumps(action))
