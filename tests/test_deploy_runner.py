"""What deploy/runner promises: which jobs a machine takes, and what is left of one afterwards."""

from __future__ import annotations

import base64
import copy
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import github_openapi
import node_tools
import pytest
import yaml

from checks import installed
from pipelines import health_probe, orphans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
DEPLOYED = ROOT / "deploy/runner"

_spec = importlib.util.spec_from_file_location("runner_hooks", DEPLOYED / "runner_hooks.py")
assert _spec is not None
assert _spec.loader is not None
hooks: Any = importlib.util.module_from_spec(_spec)
sys.modules["runner_hooks"] = hooks
_spec.loader.exec_module(hooks)

REPOSITORY, NUMBER = "Codertocat/Hello-World", 186853002
WORKFLOWS = {
    "model-pr.yml": ["pull_request", "workflow_dispatch"],
    "runner-health.yml": ["schedule", "workflow_dispatch"],
}


@pytest.fixture(scope="session")
def kinds() -> dict[str, list[dict[str, Any]]]:
    """Every kind of webhook and GitHub's own examples of it."""
    try:
        packages = installed.node_packages()
    except installed.MissingError as error:
        pytest.skip(str(error))
    index = packages / "node_modules/@octokit/webhooks-examples/api.github.com/index.json"
    return {each["name"]: each["examples"] for each in json.loads(index.read_text())}


@pytest.fixture
def pull(kinds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A pull request of a branch of the repository itself, as GitHub sends it."""
    return copy.deepcopy(next(e for e in kinds["pull_request"] if e["action"] == "synchronize"))


def config(**changes: object) -> Any:
    """What a machine allows that is for one repository."""
    values: dict[str, Any] = {
        "repositories": {REPOSITORY: NUMBER},
        "workflows": WORKFLOWS,
        "branches": ["master", "main"],
        "work": "/srv/runner/_work",
    }
    return hooks.Config(**{**values, **changes})


def variables(payload: dict[str, Any], event: str, file: str = "model-pr.yml") -> dict[str, str]:
    """What the runner sets for a job of this event."""
    repository = (payload.get("repository") or {}).get("full_name", REPOSITORY)
    number = payload.get("number")
    ref = f"refs/pull/{number}/merge" if event == "pull_request" else "refs/heads/main"
    return {
        "GITHUB_REPOSITORY": repository,
        "GITHUB_EVENT_NAME": event,
        "GITHUB_REF": ref,
        "GITHUB_WORKFLOW_REF": f"{repository}/.github/workflows/{file}@{ref}",
        "GITHUB_ACTOR": (payload.get("sender") or {}).get("login", "octocat"),
    }


def reason(payload: dict[str, Any], env: dict[str, str], **changes: object) -> str | None:
    """Why a job is refused; None if it is not."""
    try:
        hooks.decide(config(**changes), env, payload)
    except hooks.RefusedError as error:
        return str(error)
    return None


# --- which jobs -------------------------------------------------------------------------------


def test_of_all_kinds_of_events_only_those_that_may_measure_pass(
    kinds: dict[str, list[dict[str, Any]]],
) -> None:
    """Every example of GitHub's, as if it came from our repository and our workflow."""
    assert len(kinds) == 58
    taken = set()
    for event, examples in kinds.items():
        for example in examples:
            for file in WORKFLOWS:
                env = variables(example, event, file)
                known = {env["GITHUB_REPOSITORY"]: None}
                if reason(example, env, repositories=known) is None:
                    taken.add((event, example.get("action"), file))
    activities = ("labeled", "opened", "reopened", "synchronize")
    assert taken == {
        *(("pull_request", each, "model-pr.yml") for each in activities),
        ("workflow_dispatch", None, "model-pr.yml"),
        ("workflow_dispatch", None, "runner-health.yml"),
    }


def test_no_event_that_runs_with_secrets_beside_a_strangers_text_can_be_allowed() -> None:
    """A slip in runner.json cannot let them in."""
    for event in ("pull_request_target", "workflow_run", "merge_group", "push", "issue_comment"):
        wrong = hooks._wrong(config(workflows={"model-pr.yml": [event]}))
        assert wrong == f"workflows: {event} is none of pull_request, workflow_dispatch, schedule"


def test_a_schedule_of_the_default_branch_passes_without_a_sender() -> None:
    """Nobody sends what a clock does; GitHub still names an actor."""
    payload = {"schedule": "7 */6 * * *", "repository": {"full_name": REPOSITORY, "id": NUMBER}}
    env = variables(payload, "schedule", "runner-health.yml")
    assert reason(payload, env) is None
    assert "branches" in str(reason(payload, {**env, **moved(env, "refs/heads/feature")}))
    assert "sender" in str(reason(payload, variables(payload, "workflow_dispatch")))


def moved(env: dict[str, str], ref: str) -> dict[str, str]:
    """Say that the job is of another ref."""
    workflow = env["GITHUB_WORKFLOW_REF"].partition("@")[0]
    return {"GITHUB_REF": ref, "GITHUB_WORKFLOW_REF": f"{workflow}@{ref}"}


def of_fork(payload: dict[str, Any]) -> None:
    """Let the branch be in a fork."""
    payload["pull_request"]["head"]["repo"] |= {"id": 7, "full_name": "mallory/Hello-World"}


def renamed_fork(payload: dict[str, Any]) -> None:
    """Let the branch be in a fork that has our name."""
    payload["pull_request"]["head"]["repo"]["id"] = 7


def put(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Replace one value."""

    def edit(payload: dict[str, Any]) -> None:
        for key in path[:-1]:
            payload = payload[key]
        payload[path[-1]] = value

    return edit


def gone(*path: str) -> Callable[[dict[str, Any]], None]:
    """Remove one value."""

    def edit(payload: dict[str, Any]) -> None:
        for key in path[:-1]:
            payload = payload[key]
        del payload[path[-1]]

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (of_fork, "comes from a fork: its head is in mallory/Hello-World"),
        (renamed_fork, "comes from a fork"),
        (put("pull_request", "head", "repo", value=None), "comes from a fork that is gone"),
        (gone("pull_request", "head", "repo"), "comes from a fork that is gone"),
        (gone("pull_request", "head"), "has no head"),
        (gone("pull_request", "base", "repo"), "has no repo"),
        (put("pull_request", "base", "repo", "id", value=7), "another repository"),
        (put("pull_request", "head", "repo", value=[]), "has no repo"),
        (put("pull_request", value=None), "has no pull_request"),
        (gone("repository"), "has no repository"),
        (put("repository", value=None), "has no repository"),
        (put("repository", "id", value=7), "another one has its name"),
        (put("repository", "id", value=True), "the event's repository is"),
        (put("repository", "full_name", value="Codertocat/other"), "the event's repository is"),
        (put("pull_request", "state", value="closed"), "is not open"),
        (put("pull_request", "head", "sha", value="HEAD"), "has no head commit"),
        (put("pull_request", "base", "ref", value="release"), "wants to change release"),
        (put("number", value=99), "another pull request"),
        (put("number", value="2"), "another pull request"),
        (put("pull_request", "number", value=2.0), "another pull request"),
        (put("action", value="closed"), "activity closed"),
        (put("action", value=["opened"]), "activity"),
        (put("sender", value=None), "has no sender"),
        (put("sender", "type", value="Organization"), "neither a user nor an app"),
        (put("sender", "login", value=None), "None may not start jobs here"),
        (put("sender", "login", value="::error::"), "is no login"),
    ],
)
def test_an_edited_payload_is_refused_with_its_reason(
    pull: dict[str, Any], edit: Callable[[dict[str, Any]], None], words: str
) -> None:
    """Each field that decides, one by one."""
    env = variables(pull, "pull_request")
    allowed = {"actors": ["Codertocat"]}
    assert reason(pull, env, **allowed) is None
    edit(pull)
    assert words in str(reason(pull, env, **allowed))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"GITHUB_REPOSITORY": "mallory/Hello-World"}, "repository mallory/Hello-World"),
        ({"GITHUB_REPOSITORY": ""}, "repository nothing"),
        ({"GITHUB_EVENT_NAME": "pull_request_target"}, "pull_request_target never run here"),
        ({"GITHUB_EVENT_NAME": "workflow_dispatch"}, "none of the allowed branches"),
        ({"GITHUB_REF": "refs/heads/main"}, "the job is of refs/heads/main"),
        ({"GITHUB_WORKFLOW_REF": ""}, "workflow nothing"),
        ({"GITHUB_ACTOR": ""}, "nobody is said"),
        ({"GITHUB_ACTOR": "mallory"}, "mallory may not start jobs here"),
        ({"GITHUB_TRIGGERING_ACTOR": "mallory"}, "mallory may not start jobs here"),
    ],
)
def test_a_job_of_other_variables_is_refused(
    pull: dict[str, Any], changes: dict[str, str], words: str
) -> None:
    """What GitHub says of the job counts as much as the payload."""
    env = {**variables(pull, "pull_request"), **changes}
    assert words in str(reason(pull, env, actors=["codertocat"]))


@pytest.mark.parametrize(
    "path",
    [
        f"{REPOSITORY}/.github/workflows/ci.yml",
        f"{REPOSITORY}/.github/workflows/runner-health.yml",
        f"{REPOSITORY}/.github/workflows/sub/model-pr.yml",
        f"{REPOSITORY}/.github/workflows/../workflows/model-pr.yml",
        f"{REPOSITORY}/other/workflows/model-pr.yml",
        "mallory/Hello-World/.github/workflows/model-pr.yml",
        "model-pr.yml",
    ],
)
def test_another_workflow_of_the_same_repository_is_refused(
    pull: dict[str, Any], path: str
) -> None:
    """A branch may add any file; only the listed ones reach the card, each by its own events."""
    env = variables(pull, "pull_request")
    env["GITHUB_WORKFLOW_REF"] = f"{path}@{env['GITHUB_REF']}"
    assert "is not allowed here for pull_request" in str(reason(pull, env))


def test_a_repository_is_named_as_github_does_whatever_the_case(pull: dict[str, Any]) -> None:
    """The operator's spelling in runner.json is not held against him."""
    env = variables(pull, "pull_request")
    assert reason(pull, env, repositories={REPOSITORY.upper(): NUMBER}) is None


# --- the hook as the runner starts it ---------------------------------------------------------


class Machine:
    """A folder of root's with the hooks, and a runner's user with its `_work`."""

    _users = itertools.count(54_000 + os.getpid() % 5_000)

    def __init__(self, root: Path) -> None:
        """Set it up; nothing of it is a folder of the system."""
        self.root = root
        self.user = next(self._users)
        self.other = next(self._users)
        self.home = root / "runner"
        self.work = self.home / "_work"
        self.workspace = self.work / "Hello-World/Hello-World"
        self.cache = root / "cache"
        root.chmod(0o755)
        for name in ("job-started.sh", "job-completed.sh", "runner_hooks.py"):
            shutil.copy(DEPLOYED / name, root / name)
        for each in (self.home, self.cache):
            each.mkdir()
            os.chown(each, self.user, self.user)
        self.event = self.work / "_temp/_github_workflow/event.json"
        self.as_user(
            f"mkdir -p {self.workspace} {self.event.parent} {self.work}/_actions/a/b "
            f"{self.work}/_temp/_runner_file_commands"
        )
        self.settings: dict[str, Any] = {
            "schema_version": 1,
            "repositories": {REPOSITORY: NUMBER},
            "workflows": WORKFLOWS,
            "branches": ["master"],
            "work": str(self.work),
            "keep": [str(self.cache)],
        }
        self.started: list[subprocess.Popen[bytes]] = []

    def write(self, **changes: object) -> None:
        """Write runner.json."""
        self.settings |= changes
        (self.root / "runner.json").write_text(json.dumps(self.settings))

    def as_user(self, script: str) -> None:
        """Do something as the runner's user."""
        subprocess.run(
            ["/bin/bash", "-ec", script],
            check=True,
            cwd="/",
            user=self.user,
            group=self.user,
            extra_groups=[],
        )

    def leave(self, *argv: str, user: int | None = None, **options: Any) -> int:
        """Start a program that outlives its job; returns its number when it runs."""
        child = subprocess.Popen(
            argv,
            user=user or self.user,
            group=user or self.user,
            extra_groups=[],
            **{"env": {"PATH": "/usr/bin:/bin"}, "cwd": "/", **options},
        )
        self.started.append(child)
        wanted = Path(argv[0]).name
        deadline = time.monotonic() + 10
        while wanted not in Path(f"/proc/{child.pid}/cmdline").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return child.pid

    def hook(
        self,
        name: str,
        payload: object = None,
        env: dict[str, str] | None = None,
        *,
        user: int | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a hook as the runner does: as its user, in the workspace, by bash."""
        if payload is not None:
            self.event.write_text(payload if isinstance(payload, str) else json.dumps(payload))
        told = {
            "PATH": "/nowhere",
            "GITHUB_EVENT_PATH": str(self.event),
            "GITHUB_WORKSPACE": str(self.workspace),
            "RUNNER_TRACKING_ID": f"github_{self.user}",
        }
        for each in self.started:  # the kernel keeps what nobody collects
            each.poll()
        user = self.user if user is None else user
        return subprocess.run(
            ["/bin/bash", "-e", str(self.root / name)],
            env={**told, **(env or {})},
            cwd=self.workspace if self.workspace.is_dir() else "/",
            user=user,
            group=user,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def started_by(self, pull: dict[str, Any], **env: str) -> subprocess.CompletedProcess[str]:
        """Run the first hook for a pull request."""
        return self.hook("job-started.sh", pull, {**variables(pull, "pull_request"), **env})

    def completed(self) -> subprocess.CompletedProcess[str]:
        """Run the last hook."""
        return self.hook("job-completed.sh")

    def lives(self, pid: int) -> bool:
        """Tell whether a program that was left runs; the test is its parent and collects it."""
        child = next(each for each in self.started if each.pid == pid)
        return child.poll() is None


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine of its own; it ends with everything that was left on it."""
    if os.getuid() != 0:
        pytest.skip("a file of root's and a second user are needed: run the tests as root")
    # Not below pytest's folder, which nobody else may enter.
    root = Path(tempfile.mkdtemp(prefix="fleet-runner-"))
    made = Machine(root)
    made.write()
    try:
        yield made
    finally:
        for child in made.started:
            child.kill()
            child.wait()
        shutil.rmtree(root)


def annotation(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused job shows."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    commands = [line for line in done.stdout.splitlines() if "::" in line or "##[" in line]
    assert len(commands) == 1, done.stdout
    found = re.fullmatch(r"::error title=[A-Za-z ]+::(.+)", commands[0])
    assert found, commands[0]
    assert "::" not in found[1]
    return found[1]


def test_a_job_of_the_repository_itself_is_taken(machine: Machine, pull: dict[str, Any]) -> None:
    """The way it goes on a good day."""
    done = machine.started_by(pull)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "This machine takes the job.\n"


def test_a_fork_is_refused_before_its_first_step(machine: Machine, pull: dict[str, Any]) -> None:
    """Whatever its workflow file says."""
    of_fork(pull)
    done = machine.started_by(pull)
    assert "comes from a fork: its head is in mallory/Hello-World" in annotation(done)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "is no object"),
        ("\x00\xff", "is not JSON"),
        ('{"action": "opened", "action": "closed"}', "has a key twice"),
        ('{"number": NaN}', "has NaN"),
        ("[" * 200_000, "is not JSON"),
        ('{"a": "' + "x" * (9 << 20) + '"}', "is larger than 8 MiB"),
    ],
)
def test_a_payload_that_is_none_is_refused(
    machine: Machine, pull: dict[str, Any], text: str, words: str
) -> None:
    """Refused with the reason, never a traceback."""
    done = machine.hook("job-started.sh", text, variables(pull, "pull_request"))
    assert words in annotation(done)


def test_a_payload_that_is_no_file_is_refused(machine: Machine, pull: dict[str, Any]) -> None:
    """A link, a pipe that nobody writes to, a folder, nothing."""
    env = variables(pull, "pull_request")
    good = machine.root / "good.json"
    good.write_text(json.dumps(pull))
    for make, words in (
        (f"ln -s {good}", "cannot be read"),
        ("mkfifo", "is no regular file"),
        ("mkdir", "is no regular file"),
        ("true", "cannot be read"),
    ):
        machine.as_user(f"rm -rf {machine.event} && {make} {machine.event}")
        assert words in annotation(machine.hook("job-started.sh", env=env))
    unnamed = machine.hook("job-started.sh", env={**env, "GITHUB_EVENT_PATH": ""})
    assert "the runner names no event" in annotation(unnamed)


@pytest.mark.parametrize(
    "name",
    [
        "x\n::set-output name=a::b",
        "x\r::add-mask::y",
        "##[error]x",
        "::stop-commands::z",
        "%0A::warning::x",
        "@everyone <img src=x> [a](b) `c`",
        "\x1b[2J\u202e\u2028::debug::x",
        "A" * 100_000,
    ],
)
def test_a_hostile_name_becomes_no_command(
    machine: Machine, pull: dict[str, Any], name: str
) -> None:
    """It is shown in one line, cut, without what the runner or Markdown would obey."""
    pull["pull_request"]["head"]["repo"] |= {"full_name": name, "id": 7}
    text = annotation(machine.started_by(pull))
    assert "comes from a fork" in text
    assert len(text) < 250
    assert not set(text) & set("\r\n\x1b\u202e\u2028%<>[]`*#")


def test_nothing_of_the_job_decides_about_the_job(machine: Machine, pull: dict[str, Any]) -> None:
    """Neither modules in its folder, nor its HOME, nor variables that Python or bash obey."""
    evil = "import os, pathlib; pathlib.Path('/proc/self/fd/1').write_text('EVIL'); os._exit(0)"
    for name in ("json.py", "sitecustomize.py", "usercustomize.py", "runner_hooks.py"):
        (machine.workspace / name).write_text(evil)
    (machine.workspace / "runner.json").write_text('{"repositories": {"mallory/x": null}}')
    of_fork(pull)
    here = str(machine.workspace)
    done = machine.started_by(
        pull, PYTHONPATH=here, PYTHONSTARTUP=f"{here}/json.py", HOME=here, PYTHONHOME=""
    )
    assert "EVIL" not in done.stdout
    assert "comes from a fork" in annotation(done)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"repositories": {}}, "has to name at least one"),
        ({"repositories": {"no-owner": None}}, "is no owner/name"),
        ({"repositories": {REPOSITORY: "186853002"}}, "is no owner/name"),
        ({"branches": "master"}, "branches has to be a list"),
        ({"branches": []}, "branches has to name"),
        ({"workflows": {"../x.yml": []}}, "is no file"),
        ({"actors": ["a b"]}, "actors"),
        ({"work": "/"}, "work has to be"),
        ({"work": "/home"}, "work has to be"),
        ({"work": "relative/_work"}, "work has to be"),
        ({"work": "/srv/x/../.."}, "work has to be"),
        ({"temp": ["/tmp"]}, "temp needs dedicated_user"),
        ({"dedicated_user": "yes"}, "dedicated_user has to be"),
        ({"lock_clocks_mhz": [2000, 1000]}, "lock_clocks_mhz"),
        ({"nvidia_smi": "nvidia-smi"}, "absolute paths"),
        ({"unit": "../x"}, "unit has to be"),
        ({"schema_version": 2}, "schema_version 1"),
        ({"repositorys": {}}, "unknown key"),
        ({"repositories": 7}, "has to name at least one"),
    ],
)
def test_a_configuration_that_is_wrong_lets_nothing_in(
    machine: Machine, changes: dict[str, object], words: str
) -> None:
    """A typing error closes the machine; it never opens it."""
    machine.write(**changes)
    with pytest.raises(hooks.RefusedError, match=words):
        hooks.read_config(machine.root / "runner.json")


def test_a_wrong_configuration_is_said_in_the_log_of_the_job(
    machine: Machine, pull: dict[str, Any]
) -> None:
    """In the one line that a refusal has; also where it is no JSON at all."""
    machine.write(repositorys={})
    assert "runner.json has an unknown key: repositorys" in annotation(machine.started_by(pull))
    (machine.root / "runner.json").write_text("{")
    assert "runner.json is not JSON" in annotation(machine.started_by(pull))


def test_a_configuration_that_a_job_could_have_written_counts_for_nothing(
    machine: Machine, pull: dict[str, Any]
) -> None:
    """Its owner, its mode, its folder, and a link in its place."""
    path = machine.root / "runner.json"
    os.chown(path, machine.user, machine.user)
    assert "has to belong to root" in annotation(machine.started_by(pull))
    os.chown(path, 0, 0)
    path.chmod(0o664)
    assert "has to belong to root" in annotation(machine.started_by(pull))
    path.chmod(0o644)
    os.chown(machine.root, machine.user, machine.user)
    assert "has to belong to root" in annotation(machine.started_by(pull))
    os.chown(machine.root, 0, 0)
    assert machine.started_by(pull).returncode == 0
    path.rename(machine.root / "elsewhere.json")
    path.symlink_to(machine.root / "elsewhere.json")
    assert "be no link" in annotation(machine.started_by(pull))
    path.unlink()
    assert "cannot be read" in annotation(machine.started_by(pull))


def test_a_runner_that_is_root_gets_no_job(machine: Machine, pull: dict[str, Any]) -> None:
    """And nothing is cleaned up as root: a slip would empty the machine."""
    for name in ("job-started.sh", "job-completed.sh"):
        done = machine.hook(name, pull, variables(pull, "pull_request"), user=0)
        assert "the runner runs as root" in annotation(done)


# --- what a job leaves: programs --------------------------------------------------------------


def test_what_a_job_left_running_ends_and_nothing_else(machine: Machine) -> None:
    """Without a user of its own: by the runner's mark, the fleet's mark, its folder, its parent."""
    mark = {"PATH": "/usr/bin:/bin", "RUNNER_TRACKING_ID": f"github_{machine.user}"}
    run = orphans.mark(machine.workspace).rsplit(":", 2)[0] + ":1:1"
    sleep = shutil.which("sleep") or "/bin/sleep"
    ends = {
        "a child": machine.leave(sleep, "300", env=mark),
        "with a session of its own": machine.leave(sleep, "301", env=mark, start_new_session=True),
        "without the mark, in the workspace": machine.leave(
            sleep, "302", env={}, cwd=machine.workspace, start_new_session=True
        ),
        "a stage of fleet": machine.leave(sleep, "303", env={"GGUF_FLEET_REPRO": run}),
        "a server of fleet": machine.leave(
            sleep, "304", env={"GGUF_FLEET_SANDBOX": f"{machine.workspace}/work/serving/x"}
        ),
        "one that is deaf": machine.leave(
            "/bin/bash", "-c", "trap '' TERM; while :; do sleep 1; done", env=mark
        ),
    }
    os.kill(ends["a child"], signal.SIGSTOP)
    stays = {
        "of another user": machine.leave(sleep, "305", user=machine.other, env=mark),
        "of the operator": machine.leave(sleep, "306", env={}),
        "of another job": machine.leave(sleep, "307", env={"RUNNER_TRACKING_ID": "github_other"}),
        "of another fleet": machine.leave(
            sleep, "308", env={"GGUF_FLEET_REPRO": "0" * 16 + ":1:1"}
        ),
    }
    done = machine.completed()
    assert (done.returncode, done.stderr) == (0, "")
    assert {name for name, pid in ends.items() if machine.lives(pid)} == set()
    assert {name for name, pid in stays.items() if not machine.lives(pid)} == set()
    told = re.search(r"ended (\d+) programs of the job: (.*)\.", done.stdout)
    assert told
    assert int(told[1]) >= len(ends)
    assert all(str(pid) in told[2] for pid in ends.values())


def test_of_a_user_of_its_own_everything_ends_but_the_runner(machine: Machine) -> None:
    """The hook's parents live on, or the job would never be reported; others' programs, too."""
    machine.write(dedicated_user=True)
    sleep = shutil.which("sleep") or "/bin/sleep"
    left = machine.leave(sleep, "300", env={}, start_new_session=True)
    other = machine.leave(sleep, "301", user=machine.other)
    runner = (
        f"bash -e {machine.root}/job-completed.sh; echo code $?; "
        f"bash -e {machine.root}/job-completed.sh; echo code $?"
    )
    told = subprocess.run(
        ["/bin/bash", "-c", runner],
        user=machine.user,
        group=machine.user,
        extra_groups=[],
        env={"PATH": "/usr/bin:/bin", "GITHUB_WORKSPACE": str(machine.workspace)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd="/",
    ).stdout
    assert not machine.lives(left)
    assert machine.lives(other)
    assert f"ended 1 programs of the job: sleep ({left})" in told
    # The second time nothing is left to do, and it says so.
    assert told.count("code 0") == 2
    assert "The job left nothing." in told


def test_programs_on_the_card_end_if_they_are_ours_and_what_the_driver_calls_them(
    machine: Machine,
) -> None:
    """A stand-in for nvidia-smi: no card here that a test could fill."""
    sleep = shutil.which("sleep") or "/bin/sleep"
    ours = machine.leave(sleep, "300", env={})
    other_name = machine.leave(sleep, "301", env={})
    theirs = machine.leave(sleep, "302", user=machine.other)
    smi = program(
        machine,
        "nvidia-smi",
        f"[ \"$*\" = '--query-compute-apps=pid,process_name --format=csv,noheader' ] || exit 3\n"
        f"echo '{ours}, /usr/bin/sleep'; echo '{other_name}, /usr/bin/ollama'\n"
        f"echo '{theirs}, /usr/bin/sleep'; echo '1, [Not Found]'; echo 'No devices were found'\n",
    )
    machine.write(nvidia_smi=str(smi))
    done = machine.completed()
    assert (done.returncode, done.stderr) == (0, "")
    assert not machine.lives(ours)
    assert machine.lives(other_name)
    assert machine.lives(theirs)
    smi.write_text("#!/bin/sh\nexit 9\n")
    again = machine.completed()
    assert again.returncode == 0
    assert again.stdout.count("::warning title=gguf-fleet::nvidia-smi") == 1


def program(machine: Machine, name: str, script: str) -> Path:
    """Put a program of root's onto the machine."""
    path = machine.root / name
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)
    return path


def test_clocks_are_given_back_once_if_the_hook_locked_them(
    machine: Machine, pull: dict[str, Any]
) -> None:
    """And are left alone if it did not: they may be the operator's setting."""
    log = machine.root / "sudo.log"
    log.touch()
    log.chmod(0o666)
    machine.write(
        nvidia_smi=str(program(machine, "nvidia-smi", "exit 0\n")),
        sudo=str(program(machine, "sudo", f'echo "$*" >> {log}\n')),
    )
    machine.completed()
    assert log.read_text() == ""
    machine.write(lock_clocks_mhz=[1395, 1395])
    assert "locked the SM clock to 1395-1395 MHz" in machine.started_by(pull).stdout
    assert "gave the clocks back" in machine.completed().stdout
    machine.completed()
    smi = machine.root / "nvidia-smi"
    assert log.read_text().splitlines() == [
        f"-n {smi} --lock-gpu-clocks=1395,1395",
        f"-n {smi} --reset-gpu-clocks",
    ]


# --- what a job leaves: files -----------------------------------------------------------------


def test_the_workspace_is_emptied_whatever_is_in_it(machine: Machine) -> None:
    """Read-only and unreadable folders, links out of it, pipes, names of cached files."""
    outside = machine.root / "outside"
    outside.mkdir()
    (outside / "precious").write_text("here")
    os.chown(outside, machine.user, machine.user)
    os.chown(outside / "precious", machine.user, machine.user)
    machine.as_user(
        f"""
        echo weights > {machine.cache}/object; chmod 444 {machine.cache}/object
        cd {machine.workspace}
        ln {machine.cache}/object model.gguf
        ln -s {outside} out; ln -s {outside}/precious link; ln -s /nowhere broken
        mkdir -p a/b/c d/e/f; echo 1 > a/b/c/x; ln -s ../../.. a/b/up
        mkfifo pipe; echo 2 > $'name\\nwith\\x1blines'; echo 3 > -rf
        chmod 500 a/b/c a/b; chmod 000 d/e/f d/e
        cd {machine.work}; echo 4 > _temp/left; mkdir _temp/dir; touch loose
        ln -s {outside} {machine.work}/_temp/out
        """
    )
    done = machine.completed()
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "removed" in done.stdout
    assert list(machine.workspace.iterdir()) == []
    assert {each.name for each in machine.work.iterdir()} == {"_actions", "_temp", "Hello-World"}
    assert {each.name for each in (machine.work / "_temp").iterdir()} == {
        "_github_workflow",
        "_runner_file_commands",
    }
    assert (outside / "precious").read_text() == "here"
    kept = machine.cache / "object"
    assert (kept.read_text(), kept.stat().st_mode & 0o777) == ("weights\n", 0o444)
    assert f"Kept for the next job: {machine.cache}." in done.stdout
    assert "The job left nothing." in machine.completed().stdout


def test_a_tree_deeper_than_any_path_is_removed(machine: Machine) -> None:
    """Deeper than recursion and than PATH_MAX; beside it a trash that a job prepared."""
    depth = 1_500
    (machine.root / "dig.py").write_text(
        f"import os\nfor _ in range({depth}):\n    os.mkdir('d' * 50)\n    os.chdir('d' * 50)\n"
    )
    machine.as_user(
        f"ln -s /etc {machine.work}/.fleet-trash; cd {machine.workspace}; "
        f"/usr/bin/python3 {machine.root}/dig.py"
    )
    done = machine.completed()
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert f"removed {depth} files and folders" in done.stdout
    assert list(machine.workspace.iterdir()) == []
    assert not os.path.lexists(machine.work / ".fleet-trash")


def test_what_cannot_be_removed_is_said_and_no_job_begins_beside_it(
    machine: Machine, pull: dict[str, Any]
) -> None:
    """A file that root made immutable; when that is over, the next job cleans up by itself."""
    stuck = machine.workspace / "deep/stuck"
    machine.as_user(f"mkdir {stuck.parent} && touch {stuck} {machine.workspace}/other")
    if subprocess.run(["chattr", "+i", stuck], capture_output=True, check=False).returncode != 0:
        stuck.parent.chmod(0o755)
        os.chown(stuck.parent, 0, 0)  # no such attribute on this file system: a folder of root's
    try:
        done = machine.completed()
        assert "things in" in annotation(done)
        assert "cannot be removed" in annotation(done)
        assert not (machine.workspace / "other").exists()
        assert "an earlier job could not be cleaned up" in annotation(machine.started_by(pull))
    finally:
        for folder, _, names in os.walk(machine.work):
            for name in names:
                subprocess.run(
                    ["chattr", "-i", Path(folder) / name], capture_output=True, check=False
                )
            if Path(folder).stat().st_uid == 0:
                os.chown(folder, machine.user, machine.user)
    again = machine.started_by(pull)
    assert again.returncode == 0, again.stdout
    assert "Left by an earlier job: removed" in again.stdout
    assert list(machine.workspace.iterdir()) == []


def test_a_job_that_begins_keeps_what_the_runner_has_just_put_there(
    machine: Machine, pull: dict[str, Any]
) -> None:
    """Its actions and its temporary files; tools of setup actions only if the operator says so."""
    machine.as_user(
        f"cd {machine.work}; touch _temp/script.sh _actions/a/b/action.yml; mkdir -p _tool/python"
    )
    machine.write(keep_tools=True)
    assert machine.started_by(pull).returncode == 0
    assert (machine.work / "_temp/script.sh").exists()
    assert (machine.work / "_actions/a/b/action.yml").exists()
    assert (machine.work / "_tool/python").is_dir()
    machine.write(keep_tools=False)
    assert machine.started_by(pull).returncode == 0
    assert not (machine.work / "_tool").exists()


def test_a_slip_in_the_configuration_empties_no_folder_of_somebody_else(machine: Machine) -> None:
    """`work` has to be the runner's user's own, and a link to it is none."""
    precious = machine.root / "precious"
    precious.mkdir()
    (precious / "file").touch()
    machine.write(work=str(precious))
    assert "is no folder of the runner" in annotation(machine.completed())
    (machine.home / "link").symlink_to(precious)
    machine.write(work=str(machine.home / "link"))
    assert "is no folder of the runner" in annotation(machine.completed())
    assert (precious / "file").exists()


def test_temporary_files_of_the_users_own_are_removed_and_no_others(machine: Machine) -> None:
    """As in /tmp: sticky, with files of several users."""
    shared = machine.root / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    machine.as_user(f"mkdir {shared}/ours; touch {shared}/ours/x {shared}/dotnet-diagnostic-7")
    (shared / "roots").touch()
    machine.write(dedicated_user=True, temp=[str(shared)])
    assert machine.completed().returncode == 0
    assert {each.name for each in shared.iterdir()} == {"roots", "dotnet-diagnostic-7"}


# --- what else goes onto the machine ----------------------------------------------------------


def test_the_example_lets_in_what_the_workflows_send_there_and_nothing_else() -> None:
    """Files, events, activities and branches of runner.json are those of .github/workflows."""
    told = json.loads((DEPLOYED / "runner.json").read_text())
    assert (
        hooks._wrong(hooks.Config(**{k: v for k, v in told.items() if k != "schema_version"}))
        is None
    )
    wanted = {}
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        on = workflow[True]  # YAML 1.1 reads `on` so
        if any("matrix.runs_on" in str(job["runs-on"]) for job in workflow["jobs"].values()):
            wanted[path.name] = sorted(set(on) & set(hooks.EVENTS))
            activities = (on.get("pull_request") or {}).get("types", hooks.ACTIVITIES)
            assert sorted(activities) == sorted(hooks.ACTIVITIES)
    assert {name: sorted(events) for name, events in told["workflows"].items()} == wanted
    environment = dict(
        line.split("=", 1) for line in (DEPLOYED / "runner.env").read_text().splitlines()
    )
    readme = (DEPLOYED / "README.md").read_text()
    for variable, name in health_probe.HOOKS.items():
        assert environment[variable] == f"/etc/gguf-fleet/{name}"
    for each in DEPLOYED.rglob("*"):
        if each.is_file() and each.name != "README.md" and "__pycache__" not in each.parts:
            assert each.name in readme, each
    assert any(Path(each) == Path(environment["GGUF_FLEET_CACHE"]) for each in told["keep"])


@pytest.mark.parametrize("name", ["gguf-fleet-runner", "gguf-fleet-runner-jit", "gguf-fleet-gpu"])
def test_a_unit_is_one_that_systemd_takes(name: str, tmp_path: Path) -> None:
    """Every key is known; a program that is not on this machine is all that it may miss."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / f"{name}.service"
    shutil.copy(DEPLOYED / "systemd" / unit.name, unit)
    done = subprocess.run(
        [analyze, "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if unit.name in line]
    assert all("is not executable" in line for line in said), said


def test_the_two_units_give_a_job_the_same_rights() -> None:
    """They differ in how a runner is registered; never root, never a new privilege."""
    rights = []
    for name in ("gguf-fleet-runner", "gguf-fleet-runner-jit"):
        text = (DEPLOYED / f"systemd/{name}.service").read_text()
        rights.append(text[text.index("# A job that is stopped") :])
        assert "\nUser=gguf-runner\n" in text
    assert rights[0] == rights[1]
    for line in ("NoNewPrivileges=yes", "CapabilityBoundingSet=", "ProtectSystem=strict"):
        assert f"\n{line}\n" in rights[0]
    # Either would make this another machine to every record that is compared.
    assert not re.search(r"^(MemoryMax|CPUQuota|AllowedCPUs)=", rights[0], re.MULTILINE)


class Registrar(BaseHTTPRequestHandler):
    """GitHub, as far as a registration asks it."""

    seen: ClassVar[list[tuple[str, str, Any]]] = []
    answers: ClassVar[dict[str, tuple[int, Any]]] = {}

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.seen.append((f"{self.command} {self.path}", self.headers["Authorization"], body))
        status, answer = self.answers.get(self.path, (404, {}))
        data = json.dumps(answer).encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _answer  # noqa: N815 - http.server's names

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_registration_is_for_one_job_of_one_repository(tmp_path: Path) -> None:
    """Signed by the App's key, asked for with one right, left where only root reads it."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, public = tmp_path / "app.pem", tmp_path / "public.pem"
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    subprocess.run(
        ["openssl", "rsa", "-in", key, "-pubout", "-out", public], check=True, capture_output=True
    )
    repo = "/repos/octo/fleet"
    Registrar.seen.clear()
    Registrar.answers = {
        f"{repo}/installation": (200, {"id": 7}),
        "/app/installations/7/access_tokens": (201, {"token": "ghs_one-hour"}),
        f"{repo}/actions/runners/generate-jitconfig": (201, {"encoded_jit_config": "abc="}),
    }
    server = HTTPServer(("127.0.0.1", 0), Registrar)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "api_url": f"http://127.0.0.1:{server.server_port}",
        "repository": "octo/fleet",
        "client_id": "Iv23test",
        "key": str(key),
        "labels": ["self-hosted", "gpu", "desk"],
        "name": "desk",
    }
    config, out = tmp_path / "jit.json", tmp_path / "jit.env"

    def run(**changes: object) -> subprocess.CompletedProcess[str]:
        config.write_text(json.dumps({**settings, **changes}))
        argv = ["/usr/bin/python3", "-I", str(DEPLOYED / "jit_register.py"), str(config), str(out)]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)

    try:
        done = run()
        assert (done.returncode, done.stderr) == (0, "")
        assert out.read_text() == "ACTIONS_RUNNER_INPUT_JITCONFIG=abc=\n"
        assert out.stat().st_mode & 0o777 == 0o600
        found, minted, made = Registrar.seen
        head, claims, signature = found[1].removeprefix("Bearer ").split(".")
        (tmp_path / "signature").write_bytes(base64.urlsafe_b64decode(signature + "=="))
        subprocess.run(
            ["openssl", "dgst", "-sha256", "-verify", public, "-signature", tmp_path / "signature"],
            input=f"{head}.{claims}".encode(), check=True, capture_output=True,
        )  # fmt: skip
        told = json.loads(base64.urlsafe_b64decode(claims + "=="))
        assert told["iss"] == "Iv23test"
        assert told["exp"] - told["iat"] <= 600
        assert minted[2] == {"repositories": ["fleet"], "permissions": {"administration": "write"}}
        assert made[1] == "Bearer ghs_one-hour"
        assert made[2]["labels"] == settings["labels"]
        assert re.fullmatch(r"desk-[0-9a-f]{8}", made[2]["name"])
        for broken, words in (
            ({"repository": "octo"}, "jit.json"),
            ({"api_url": "http://example.org"}, "jit.json"),
            ({"labels": []}, "jit.json"),
            ({"key": str(tmp_path / "none.pem")}, "openssl cannot sign"),
        ):
            refused = run(**broken)
            assert refused.returncode == 1
            assert words in refused.stderr
        Registrar.answers["/app/installations/7/access_tokens"] = (422, {})
        assert "access_tokens: 422" in run().stderr
        Registrar.answers = {f"{repo}/installation": (200, [])}
        assert "no object" in run().stderr
    finally:
        server.shutdown()
        server.server_close()
    assert "ghs_" not in done.stdout + done.stderr


def test_a_fresh_runner_has_nothing_of_the_one_before_and_cannot_change_its_template(
    machine: Machine,
) -> None:
    """jit-prepare.sh itself, with other folders, and a registration that is a stand-in."""
    template = machine.root / "template"
    (template / "bin").mkdir(parents=True)
    (template / "bin/Runner.Listener").write_text("runner")
    script = (DEPLOYED / "jit-prepare.sh").read_text()
    script = script.replace("user=gguf-runner", f"user={machine.user}")
    script = script.replace("/srv/gguf-fleet/template", str(template))
    script = script.replace("/srv/gguf-fleet/runner", str(machine.root / "runner"))
    script = script.replace("/run/gguf-fleet", str(machine.root / "run"))
    path = program(machine, "jit-prepare.sh", "")
    path.write_text(script)
    (machine.root / "jit_register.py").write_text(
        "import sys, pathlib; pathlib.Path(sys.argv[2]).write_text('A=1')"
    )
    outside = machine.root / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    for _ in range(2):
        subprocess.run([path], check=True, timeout=60, cwd="/")
        fresh = machine.root / "runner"
        assert {each.name for each in fresh.iterdir()} == {"bin"}
        assert fresh.stat().st_uid == (fresh / "bin").stat().st_uid == machine.user
        assert (fresh / "bin/Runner.Listener").stat().st_ino == (
            template / "bin/Runner.Listener"
        ).stat().st_ino
        machine.as_user(
            f"cd {fresh}; echo evil 2>/dev/null > bin/Runner.Listener || true; "
            f"rm -f bin/Runner.Listener; echo evil > bin/Runner.Listener; "
            f"mkdir -p _work/x; ln -s {outside} _work/x/out; ln -s {outside} link"
        )
        assert (template / "bin/Runner.Listener").read_text() == "runner"
        assert template.stat().st_uid == 0
    assert (outside / "precious").exists()
    assert (machine.root / "run/jit.env").read_text() == "A=1"


def test_the_scripts_are_clean() -> None:
    """By bash itself, and by shellcheck where it is."""
    beside = Path(sys.executable).with_name("shellcheck")
    checker = str(beside) if beside.exists() else shutil.which("shellcheck")
    for script in DEPLOYED.glob("*.sh"):
        subprocess.run(["/bin/bash", "-n", script], check=True)
        assert os.access(script, os.X_OK), script
        if checker is not None:
            done = subprocess.run([checker, script], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout


def test_the_settings_of_the_page_are_calls_that_github_knows() -> None:
    """Path, method and body of each `gh api` of docs/security.md, against GitHub's description."""
    contract = github_openapi.load(node_tools.openapi())
    page = (ROOT / "docs/security.md").read_text()
    calls = re.findall(
        r"gh api --method (\w+) (repos/\S+)(?: --input - <<'JSON'\n(.*?)\n\s*JSON)?",
        page,
        re.DOTALL,
    )
    assert len(calls) == page.count("gh api --method") > 8
    for method, path, body in calls:
        operation = contract.operation(method, "/" + path.format(owner="octo", repo="fleet"))
        assert operation is not None, path
        assert list(operation.problems_of("", body.encode())) == [], path
