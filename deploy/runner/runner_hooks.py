"""
What a machine with a GPU does itself before and after each job of its GitHub runner.

    job-started.sh      runs `runner_hooks.py started`: refuses a job before its first step, then
                        removes what a job left that could not be cleaned up after (a power cut)
    job-completed.sh    runs `runner_hooks.py completed`: ends what still runs, empties `_work`

A pull request of a fork brings workflow files of its own, so nothing in the repository can keep it
from this machine: neither an `if:` nor a label nor an environment. What is allowed is said by
`runner.json` beside this file, which belongs to root and which no job can name, move or write.

`started` is given to by the runner alone: the variables and the payload come from GitHub's message,
`env:` of the workflow does not reach a hook (actions/runner: src/Runner.Worker/JobHookProvider.cs
and Handlers/ScriptHandler.cs); only the working directory may be the job's, and is left at once.
`completed` is tidiness: a job that prepends to PATH chooses the bash that it runs in. What such a
job leaves is found by the next `started`, and a job that must leave nothing gets a machine of its
own (README.md, level 2).

Standard library only; Python 3.11 or newer, as everything here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# What a job may be started by. `pull_request_target` and `workflow_run` run beside secrets what a
# stranger may have written, a merge group holds commits of forks, `push` comes from any branch.
EVENTS: Final = ("pull_request", "workflow_dispatch", "schedule")
# Activities of a pull request after which there is something to measure, or leave to do so.
ACTIVITIES: Final = ("opened", "synchronize", "reopened", "labeled")
# GitHub sends no payload above 25 MB; that of a pull request has some 30 KB and its text.
PAYLOAD_LIMIT_BYTES: Final = 8 << 20
CONFIG_LIMIT_BYTES: Final = 1 << 20
# The runner's own: downloaded actions (renewed before each job), its map of folders, its update.
_RUNNERS_OWN: Final = frozenset({"_actions", "_PipelineMapping", "_update", "_update.sh"})
# Below _temp: what the runner reads after this hook, and empties itself.
_RUNNERS_TEMP: Final = frozenset({"_github_workflow", "_runner_file_commands"})
_DOTNET: Final = ("dotnet-diagnostic-", "clr-debug-pipe-")
_TRASH: Final = ".fleet-trash"
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TERMINATE_WITHIN_S: Final = 2.0
_END_WITHIN_S: Final = 15.0
_SMI_TIMEOUT_S: Final = 30.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}/[A-Za-z0-9._-]{1,100}")
_FILE = re.compile(r"[A-Za-z0-9._-]{1,100}\.ya?ml")
_BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,200}")
_LOGIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}(\[bot\])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNIT = re.compile(r"[A-Za-z0-9@._-]{1,200}\.service")
# /srv/x: nobody means / or /home.
_LEAST_PARTS: Final = 3


class RefusedError(Exception):
    """The job does not run here; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """
    What this machine allows, and what of it belongs to the jobs.

    Attributes:
        repositories: {"owner/name": number, or None if only the name counts}. With the number
            (`gh api repos/OWNER/NAME --jq .id`) a new repository under an old name is refused.
        workflows: {"model-pr.yml": ["pull_request", ...]}: files and what may start them.
        branches: Branches that a pull request may want to change, and from which the rest runs.
        actors: Logins that may start a job; empty: everybody who may push to the repository.
        work: The runner's folder `_work`, emptied after each job.
        temp: Folders of which everything that belongs to the runner's user is removed: /tmp of a
            service with PrivateTmp=, /dev/shm. Only with `dedicated_user`.
        keep: Folders that jobs share: DVC's cache, the toolchain, the venv. Outside of `work`.
        keep_tools: Whether `_work/_tool` stays, where actions/setup-* put their tools.
        unit: The systemd service of the runner; what is in its control group belongs to the job.
        dedicated_user: Whether nothing else runs as the runner's user; all of it ends then.
        nvidia_smi: The program; None on a machine without a card.
        sudo: The program, for clocks.
        lock_clocks_mhz: [lowest, highest] SM clock for the time of a job; None leaves them alone.
    """

    repositories: dict[str, int | None]
    workflows: dict[str, list[str]]
    branches: list[str]
    work: str
    actors: list[str] = field(default_factory=list)
    temp: list[str] = field(default_factory=list)
    keep: list[str] = field(default_factory=list)
    keep_tools: bool = False
    unit: str | None = None
    dedicated_user: bool = False
    nvidia_smi: str | None = None
    sudo: str = "/usr/bin/sudo"
    lock_clocks_mhz: list[int] | None = None


# --- the configuration ------------------------------------------------------------------------


def read_config(path: Path) -> Config:
    """
    Read what root allows.

    Raises:
        RefusedError: It is not root's alone, or not as it has to be.
    """
    _require_roots(path)
    value = _json(_read(path, CONFIG_LIMIT_BYTES), path.name)
    known = {each.name for each in fields(Config)}
    if unknown := sorted(value.keys() - known - {"schema_version"}):
        raise RefusedError(f"{path.name} has an unknown key: {shown(unknown[0])}")
    if value.pop("schema_version", None) != 1:
        raise RefusedError(f"{path.name} needs schema_version 1")
    if missing := sorted({"repositories", "workflows", "branches", "work"} - value.keys()):
        raise RefusedError(f"{path.name} lacks {missing[0]}")
    config = Config(**value)
    if wrong := _wrong(config):
        raise RefusedError(f"{path.name}: {wrong}")
    return config


def _require_roots(path: Path) -> None:
    """Refuse a file that somebody else than root may write, rename or replace."""
    for each in (path, *path.parents):
        try:
            found = each.lstat()
        except OSError as error:
            raise RefusedError(f"{each} cannot be read: {error.strerror}") from None
        loose = found.st_mode & 0o022 and not (
            stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        )
        if stat.S_ISLNK(found.st_mode) or found.st_uid != 0 or loose:
            raise RefusedError(
                f"{each} has to belong to root, be no link and writable by nobody else"
            )


def _wrong(config: Config) -> str | None:
    """Say what is wrong with a configuration; None if nothing is."""
    for rule in (_wrong_names, _wrong_lists, _wrong_places, _wrong_rest):
        if wrong := rule(config):
            return wrong
    return None


def _wrong_names(config: Config) -> str | None:
    """Look at what may run."""
    if not isinstance(config.repositories, dict) or not config.repositories:
        return "repositories has to name at least one"
    for name, number in config.repositories.items():
        if not _NAME.fullmatch(name) or not (number is None or _is_count(number)):
            return f"repositories: {shown(name)} is no owner/name with its number or null"
    if not isinstance(config.workflows, dict) or not config.workflows:
        return "workflows has to name at least one"
    for name, events in config.workflows.items():
        if not _FILE.fullmatch(name) or not isinstance(events, list):
            return f"workflows: {shown(name)} is no file with a list of events"
        if bad := [each for each in events if each not in EVENTS]:
            return f"workflows: {shown(bad[0])} is none of {', '.join(EVENTS)}"
    return None


def _wrong_lists(config: Config) -> str | None:
    """Look at branches, logins and folders; a text is no list, though it has letters."""
    for name, is_good in (
        ("branches", _BRANCH.fullmatch),
        ("actors", _LOGIN.fullmatch),
        ("temp", _is_place),
        ("keep", _is_place),
    ):
        value = getattr(config, name)
        if not isinstance(value, list):
            return f"{name} has to be a list"
        for each in value:
            if not isinstance(each, str) or not is_good(each):
                return f"{name}: {shown(each)} is not allowed"
    return None if config.branches else "branches has to name at least one"


def _wrong_places(config: Config) -> str | None:
    """Look at folders that are emptied and programs that are run."""
    if not _is_place(config.work) or len(Path(config.work).parts) < _LEAST_PARTS:
        return "work has to be an absolute folder that is no folder of the system"
    if any(Path(each).is_relative_to(config.work) for each in config.keep):
        return "keep names a folder in work, which is emptied"
    if config.temp and config.dedicated_user is not True:
        return "temp needs dedicated_user"
    if not all(map(_is_place, [config.nvidia_smi or config.sudo, config.sudo])):
        return "nvidia_smi and sudo have to be absolute paths"
    return None


def _wrong_rest(config: Config) -> str | None:
    """Look at the rest."""
    for name in ("keep_tools", "dedicated_user"):
        if not isinstance(getattr(config, name), bool):
            return f"{name} has to be true or false"
    if config.unit is not None and not _UNIT.fullmatch(str(config.unit)):
        return "unit has to be the name of a service"
    clocks = config.lock_clocks_mhz
    if clocks is not None and not (
        isinstance(clocks, list)
        and len(clocks) == 2  # noqa: PLR2004 - lowest and highest
        and all(map(_is_count, clocks))
        and clocks[0] <= clocks[1]
    ):
        return "lock_clocks_mhz has to be [lowest, highest]"
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 53


def _is_place(value: object) -> bool:
    """Tell whether this is an absolute path without detours."""
    return isinstance(value, str) and value.startswith("/") and os.path.normpath(value) == value


# --- may it run? ------------------------------------------------------------------------------


def shown(text: object) -> str:
    """Make a stranger's text harmless: no line, no command of the runner, no Markdown, 80 long."""
    return re.sub(r"[^A-Za-z0-9 ._/@-]", "?", str(text))[:80] or "nothing"


def _read(path: Path, limit_bytes: int) -> bytes:
    """Read a small regular file; a link, a pipe or a device is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise RefusedError(f"{path.name} cannot be read: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise RefusedError(f"{path.name} is no regular file")
        with open(handle, "rb", closefd=False) as file:
            data = file.read(limit_bytes + 1)
    finally:
        os.close(handle)
    if len(data) > limit_bytes:
        raise RefusedError(f"{path.name} is larger than {limit_bytes >> 20} MiB")
    return data


def _json(data: bytes, name: str) -> dict[str, Any]:
    """Read an object; a key that is there twice means something else to every reader."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise RefusedError(f"{name} has a key twice")
        return found

    def never(text: str) -> NoReturn:
        raise RefusedError(f"{name} has {shown(text)}, which is no JSON")

    try:
        value = json.loads(data, object_pairs_hook=once, parse_constant=never)
    except (ValueError, RecursionError):
        raise RefusedError(f"{name} is not JSON") from None
    if not isinstance(value, dict):
        raise RefusedError(f"{name} is no object")
    return value


def decide(config: Config, env: Mapping[str, str], payload: Mapping[str, Any]) -> None:
    """
    Let a job run, or not.

    Args:
        config: What root allows.
        env: Variables of the runner; `GITHUB_*` are told by GitHub.
        payload: Of the event, as GitHub sent it.

    Raises:
        RefusedError: It may not, for the first reason that was found.
    """
    repository = env.get("GITHUB_REPOSITORY", "")
    allowed = {name.lower(): number for name, number in config.repositories.items()}
    if repository.lower() not in allowed:
        raise RefusedError(f"repository {shown(repository)} is not allowed here")
    event, ref = env.get("GITHUB_EVENT_NAME", ""), env.get("GITHUB_REF", "")
    if event not in EVENTS:
        raise RefusedError(f"jobs of the event {shown(event)} never run here")
    path, at, its_ref = env.get("GITHUB_WORKFLOW_REF", "").partition("@")
    home, _, file = path.rpartition("/")
    if (
        home != f"{repository}/.github/workflows"
        or not at
        or event not in config.workflows.get(file, ())
    ):
        raise RefusedError(f"workflow {shown(path)} is not allowed here for {event}")
    if its_ref != ref:
        raise RefusedError(f"the workflow is that of {shown(its_ref)}, the job is of {shown(ref)}")
    owner = _object(payload, "repository")
    _same(owner, repository, allowed[repository.lower()], "the event's repository")
    if event == "pull_request":
        _decide_pull(config, ref, payload, owner)
    else:
        branch = ref.removeprefix("refs/heads/")
        if branch == ref or branch not in config.branches:
            raise RefusedError(f"{shown(ref)} is none of the allowed branches")
        if payload.get("ref", ref) != ref or "pull_request" in payload:
            raise RefusedError("the payload is of another event than the job")
    _decide_actor(config, env, payload, may_lack_sender=event == "schedule")


def _decide_pull(
    config: Config, ref: str, payload: Mapping[str, Any], owner: Mapping[str, Any]
) -> None:
    """Refuse a pull request unless its branch is in this very repository."""
    if (action := payload.get("action")) not in ACTIVITIES:
        raise RefusedError(f"the activity {shown(action)} of a pull request is not allowed here")
    pull = _object(payload, "pull_request")
    number = pull.get("number")
    if (
        not _is_count(number)
        or payload.get("number") != number
        or ref != f"refs/pull/{number}/merge"
    ):
        raise RefusedError("the payload is of another pull request than the job")
    if pull.get("state") != "open":
        raise RefusedError(f"pull request {number} is not open")
    head, base = _object(pull, "head"), _object(pull, "base")
    if head.get("repo") is None:
        raise RefusedError(f"pull request {number} comes from a fork that is gone")
    head_repo, base_repo = _object(head, "repo"), _object(base, "repo")
    for each, what in ((base_repo, "base"), (head_repo, "head")):
        if (each.get("id"), each.get("full_name")) != (owner.get("id"), owner.get("full_name")):
            raise RefusedError(
                f"pull request {number} comes from a fork: its {what} is in "
                f"{shown(each.get('full_name'))}"
                if what == "head"
                else f"pull request {number} wants to change another repository"
            )
    if base.get("ref") not in config.branches:
        raise RefusedError(f"pull request {number} wants to change {shown(base.get('ref'))}")
    if not _COMMIT.fullmatch(str(head.get("sha"))):
        raise RefusedError(f"pull request {number} has no head commit")


def _decide_actor(
    config: Config, env: Mapping[str, str], payload: Mapping[str, Any], *, may_lack_sender: bool
) -> None:
    """Refuse who is not listed, if there is a list, and who is nobody."""
    who = {env[name] for name in ("GITHUB_ACTOR", "GITHUB_TRIGGERING_ACTOR") if env.get(name)}
    if payload.get("sender") is not None or not may_lack_sender:
        sender = _object(payload, "sender")
        if sender.get("type") not in ("User", "Bot"):
            raise RefusedError("the sender is neither a user nor an app")
        who.add(str(sender.get("login")))
    listed = {each.lower() for each in config.actors}
    for each in sorted(who):
        if not _LOGIN.fullmatch(each):
            raise RefusedError(f"{shown(each)} is no login")
        if listed and each.lower() not in listed:
            raise RefusedError(f"{shown(each)} may not start jobs here")
    if not env.get("GITHUB_ACTOR"):
        raise RefusedError("nobody is said to have started the job")


def _object(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict):
        raise RefusedError(f"the payload has no {key}")
    return found


def _same(told: Mapping[str, Any], name: str, number: int | None, what: str) -> None:
    """Refuse a repository that is not the allowed one, by its name and, if known, its number."""
    if told.get("full_name") != name or not _is_count(told.get("id")):
        raise RefusedError(f"{what} is {shown(told.get('full_name'))}")
    if number is not None and told["id"] != number:
        raise RefusedError(f"{what} is not number {number}: another one has its name")


# --- what a job left: programs ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Program:
    """A living process of our user; `started` tells it from a later one of the same number."""

    pid: int
    parent: int
    started: int
    name: str
    has_terminal: bool


def _program(pid: int) -> Program | None:
    """Return a process if it is ours and lives (proc(5): fields of stat after the name)."""
    try:
        real_uid = re.search(
            r"^Uid:\s+(\d+)", _proc(pid, "status").decode(errors="replace"), re.MULTILINE
        )
        head, _, tail = _proc(pid, "stat").decode(errors="replace").rpartition(")")
    except OSError:
        return None
    rest = tail.split()
    if real_uid is None or int(real_uid[1]) != os.getuid() or not rest or rest[0] in "ZX":
        return None
    return Program(
        pid=pid,
        parent=int(rest[1]),
        started=int(rest[19]),
        name=head.partition("(")[2],
        has_terminal=rest[4] != "0",
    )


def _proc(pid: int | str, name: str) -> bytes:
    return Path("/proc", str(pid), name).read_bytes()


def _programs() -> dict[int, Program]:
    pids = [int(each) for each in os.listdir("/proc") if each.isdecimal()]  # noqa: PTH208 - names
    return {pid: found for pid in pids if (found := _program(pid)) is not None}


def _spared() -> set[int]:
    """Return this process and everything above it: the hook's shell, the runner, its service."""
    found, pid = {os.getpid()}, os.getppid()
    while pid > 0 and pid not in found:
        found.add(pid)
        try:
            pid = int(_proc(pid, "stat").decode(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            break
    return found


def left_running(config: Config, env: Mapping[str, str]) -> list[Program]:
    """
    Return the programs of our user that belong to the job.

    With a user of their own all do. Else those that carry the mark that the runner gives its jobs,
    the mark of a `fleet` of this workspace or a server of it, those in the control group of the
    runner's service, those without a terminal whose program or folder lies in `work`, and whatever
    descends from one of these.
    """
    every, spared = _programs(), _spared()
    mine = {
        pid: each
        for pid, each in every.items()
        if pid not in spared and (config.dedicated_user or _is_of_job(each, config, env))
    }
    grown = True
    while grown:
        more = {
            pid: each
            for pid, each in every.items()
            if pid not in mine and pid not in spared and each.parent in mine
        }
        mine |= more
        grown = bool(more)
    return list(mine.values())


def _is_of_job(each: Program, config: Config, env: Mapping[str, str]) -> bool:
    return (
        _carries_a_mark(each.pid, config, env)
        or (config.unit is not None and _is_in_unit(each.pid, config.unit))
        or (not each.has_terminal and _lies_in(each.pid, config.work))
    )


def _carries_a_mark(pid: int, config: Config, env: Mapping[str, str]) -> bool:
    try:
        words = _proc(pid, "environ").decode(errors="replace").split("\0")
    except OSError:
        return False
    carried = dict(word.split("=", 1) for word in words if "=" in word)
    mark = env.get("RUNNER_TRACKING_ID", "")
    # As pipelines/orphans.py spells them.
    root = str(Path(env.get("GITHUB_WORKSPACE") or config.work).resolve())
    run = f"{hashlib.sha256(root.encode()).hexdigest()[:16]}:"
    return (
        (mark.startswith("github_") and carried.get("RUNNER_TRACKING_ID") == mark)
        or carried.get("GGUF_FLEET_REPRO", "").startswith(run)
        or Path(carried.get("GGUF_FLEET_SANDBOX", "/")).is_relative_to(config.work)
    )


def _is_in_unit(pid: int, unit: str) -> bool:
    try:
        group = _proc(pid, "cgroup")
        return group == _proc("self", "cgroup") and group.decode().strip().endswith(f"/{unit}")
    except (OSError, ValueError):
        return False


def _lies_in(pid: int, work: str) -> bool:
    for link in ("cwd", "exe"):
        with contextlib.suppress(OSError):
            if Path("/proc", str(pid), link).readlink().is_relative_to(work):
                return True
    return False


def on_the_card(config: Config) -> list[Program]:
    """
    Return the programs of our user that compute on an NVIDIA card.

    In a container the driver tells the numbers of another name space, so the name has to be that
    of our process, too.

    Raises:
        OSError: nvidia-smi cannot be run, fails, or does not answer.
    """
    if config.nvidia_smi is None:
        return []
    told = _run(
        [config.nvidia_smi, "--query-compute-apps=pid,process_name", "--format=csv,noheader"]
    )
    spared, found = _spared(), []
    for line in told.splitlines():
        number, _, name = line.partition(",")
        if not number.strip().isdecimal() or (pid := int(number)) in spared:
            continue
        each = _program(pid)
        # The kernel cuts the name to 15 bytes (TASK_COMM_LEN).
        program = name.strip().rpartition("/")[2]
        if each is not None and (program[:15] == each.name or program == _exe_name(pid)):
            found.append(each)
    return found


def _exe_name(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "exe").readlink().name
    except OSError:
        return ""


def _run(argv: list[str]) -> str:
    """Run a program of the system with nothing of our environment; OSError is every failure."""
    try:
        done = subprocess.run(  # noqa: S603 - a list of words, from root's file
            argv,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SMI_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"{argv[0]} did not answer for {_SMI_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        raise OSError(f"{argv[0]} ended with exit code {done.returncode}")
    return done.stdout.decode(errors="replace")


def _signal(each: Program, number: int) -> None:
    """Signal a process, unless its number is another's by now."""
    try:
        handle = os.pidfd_open(each.pid)
    except OSError:
        return
    try:
        if _program(each.pid) == each or (
            (now := _program(each.pid)) is not None and now.started == each.started
        ):
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(handle, number)
    finally:
        os.close(handle)


def end_programs(config: Config, env: Mapping[str, str], said: Said) -> None:
    """End what belongs to the job: politely, then not, until two looks in a row find nothing."""
    began = time.monotonic()
    ended: dict[tuple[int, int], Program] = {}
    clean_looks = 0
    while clean_looks < 2 and time.monotonic() < began + _END_WITHIN_S:  # noqa: PLR2004 - a fork may race one
        found = left_running(config, env)
        try:
            found += [each for each in on_the_card(config) if each not in found]
        except OSError as error:
            said.warn_once(f"nvidia-smi: {shown(error)}; programs on the card are not known")
        clean_looks = 0 if found else clean_looks + 1
        polite = time.monotonic() < began + _TERMINATE_WITHIN_S
        for each in found:
            ended[each.pid, each.started] = each
            _signal(each, signal.SIGTERM if polite else signal.SIGKILL)
            _signal(each, signal.SIGCONT)
        time.sleep(0.1 if found else 0.02)
    if ended:
        names = ", ".join(f"{shown(each.name)} ({each.pid})" for each in list(ended.values())[:20])
        said.did(f"ended {len(ended)} programs of the job: {names}")
    if left := left_running(config, env):
        said.fail(f"{len(left)} programs do not end, {shown(left[0].name)} ({left[0].pid}) first")


# --- what a job left: files -------------------------------------------------------------------


def _listed(handle: int) -> list[str]:
    """Return the names in an open folder."""
    return os.listdir(handle)


class Emptying:
    """
    Removes trees below one folder without following a link, at any depth, whatever their modes.

    Each folder found is moved into one trash beside, so that no path is longer than two names: a
    tree of 100,000 levels needs neither recursion nor handles. Modes of files are never changed: a
    file may be a second name of one in DVC's cache.
    """

    def __init__(self, folder: Path) -> None:
        """Open `folder`; OSError if it is none, or is a link."""
        self._handle = os.open(folder, _FOLDER)
        self.removed_count = 0
        self.failures: list[str] = []
        self._next = 0

    def names(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield what lies in the folder."""
        for name in _listed(self._handle):
            with contextlib.suppress(FileNotFoundError):
                yield name, os.stat(name, dir_fd=self._handle, follow_symlinks=False)

    def inside(self, name: str, *, but: frozenset[str]) -> None:
        """Empty one folder of it, except for some names; what is no folder is removed."""
        with self._trash() as trash:
            try:
                if not stat.S_ISDIR(
                    os.stat(name, dir_fd=self._handle, follow_symlinks=False).st_mode
                ):
                    self._take(self._handle, name, trash)
                    return
                os.chmod(name, 0o700, dir_fd=self._handle)
                handle = os.open(name, _FOLDER, dir_fd=self._handle)
            except FileNotFoundError:
                return
            for each in _listed(handle):
                if each not in but:
                    self._take(handle, each, trash)
            os.close(handle)
            self._drain(trash)

    def remove(self, names: list[str]) -> None:
        """Remove these."""
        with self._trash() as trash:
            for name in names:
                if name != _TRASH:
                    self._take(self._handle, name, trash)
            self._drain(trash)

    def close(self) -> None:
        """Close the folder."""
        os.close(self._handle)

    @contextlib.contextmanager
    def _trash(self) -> Iterator[int]:
        """Yield the trash; one that a killed hook left is used on, one that a job made is none."""
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
            os.unlink(_TRASH, dir_fd=self._handle)
        with contextlib.suppress(FileExistsError):
            os.mkdir(_TRASH, 0o700, dir_fd=self._handle)
        os.chmod(_TRASH, 0o700, dir_fd=self._handle)
        trash = os.open(_TRASH, _FOLDER, dir_fd=self._handle)
        try:
            yield trash
        finally:
            os.close(trash)
            with contextlib.suppress(OSError):
                os.rmdir(_TRASH, dir_fd=self._handle)

    def _take(self, parent: int, name: str, trash: int) -> bool:
        """Remove a file, or move a folder into the trash; says whether it is gone from `parent`."""
        try:
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                os.unlink(name, dir_fd=parent)
                self.removed_count += 1
                return True
            # To move a folder one has to be allowed to write into it: its `..` changes.
            os.chmod(name, 0o700, dir_fd=parent)
            os.rename(name, self._free_name(trash), src_dir_fd=parent, dst_dir_fd=trash)
        except FileNotFoundError:
            return True
        except OSError as error:
            self.failures.append(f"{shown(name)}: {error.strerror}")
            return False
        return True

    def _free_name(self, trash: int) -> str:
        while True:
            self._next += 1
            try:
                os.stat(str(self._next), dir_fd=trash, follow_symlinks=False)
            except FileNotFoundError:
                return str(self._next)

    def _drain(self, trash: int) -> None:
        """Empty the trash; what resists is named once and left."""
        stuck: set[str] = set()
        while names := [each for each in _listed(trash) if each not in stuck]:
            for name in names:
                if not self._drain_one(name, trash):
                    stuck.add(name)

    def _drain_one(self, name: str, trash: int) -> bool:
        try:
            if not stat.S_ISDIR(os.stat(name, dir_fd=trash, follow_symlinks=False).st_mode):
                return self._take(trash, name, trash)
            os.chmod(name, 0o700, dir_fd=trash)
            handle = os.open(name, _FOLDER, dir_fd=trash)
        except OSError as error:
            self.failures.append(f"{shown(name)}: {error.strerror}")
            return False
        try:
            # Every one of them is tried, whatever became of the one before.
            if {self._take(handle, each, trash) for each in _listed(handle)} - {True}:
                return False
        finally:
            os.close(handle)
        try:
            os.rmdir(name, dir_fd=trash)
        except OSError as error:
            self.failures.append(f"{shown(name)}: {error.strerror}")
            return False
        self.removed_count += 1
        return True


def empty_folders(config: Config, env: Mapping[str, str], said: Said, *, temp: bool) -> None:
    """
    Empty the runner's `_work`, and what our user left in the folders for temporary files.

    Args:
        config: What root allows.
        env: Variables of the runner: the folder of its workspace stays, empty.
        said: What is told at the end.
        temp: Also `_work/_temp`; before a job that is the runner's own and holds the job's files.
    """
    work = Path(config.work)
    kept = _RUNNERS_OWN | {"_temp"} | ({"_tool"} if config.keep_tools else set())
    outer, inner = _workspace(work, env)
    with _emptying(work, said) as folder:
        if folder is not None:
            folder.remove([name for name, _ in folder.names() if name not in kept | {outer}])
            if outer:
                folder.inside(outer, but=frozenset({inner}))
            if temp:
                folder.inside("_temp", but=_RUNNERS_TEMP)
    if outer:
        with _emptying(work / outer, said) as folder:
            if folder is not None:
                folder.inside(inner, but=frozenset())
        (work / outer / inner).mkdir(parents=True, exist_ok=True)
    for each in config.temp if temp else []:
        with _emptying(Path(each), said) as folder:
            if folder is not None:
                folder.remove(
                    [
                        name
                        for name, found in folder.names()
                        if found.st_uid == os.getuid() and not name.startswith(_DOTNET)
                    ]
                )


def _workspace(work: Path, env: Mapping[str, str]) -> tuple[str, str]:
    """Return the two names below `work` that the runner makes for a job; empty if it made none."""
    with contextlib.suppress(ValueError):
        parts = Path(env.get("GITHUB_WORKSPACE", "/")).relative_to(work).parts
        if len(parts) == 2 and not parts[0].startswith(("_", ".")) and ".." not in parts:  # noqa: PLR2004 - _work/NAME/NAME
            return parts[0], parts[1]
    return "", ""


@contextlib.contextmanager
def _emptying(place: Path, said: Said) -> Iterator[Emptying | None]:
    try:
        folder = Emptying(place)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        said.fail(f"{place} cannot be emptied: {error.strerror}")
        yield None
        return
    try:
        yield folder
    except OSError as error:
        said.fail(f"{place} cannot be emptied: {error.strerror}")
    finally:
        folder.close()
    if folder.removed_count:
        said.did(f"removed {folder.removed_count} files and folders in {place}")
    if folder.failures:
        count = len(folder.failures)
        said.fail(f"{count} things in {place} cannot be removed; {folder.failures[0]}")


# --- clocks -----------------------------------------------------------------------------------


def _clock_note(config: Config) -> Path:
    """File that says that the clocks are ours to give back; beside `_work`, where no job is."""
    return Path(config.work).with_name(".fleet-clocks-locked")


def lock_clocks(config: Config, said: Said) -> None:
    """Hold the SM clock between the declared limits for the time of a job."""
    if config.lock_clocks_mhz is None or config.nvidia_smi is None:
        return
    low, high = config.lock_clocks_mhz
    try:
        _clock_note(config).touch()
        _run([config.sudo, "-n", config.nvidia_smi, f"--lock-gpu-clocks={low},{high}"])
    except OSError as error:
        said.warn_once(f"the clocks are not locked: {shown(error)}")
    else:
        said.did(f"locked the SM clock to {low}-{high} MHz")


def reset_clocks(config: Config, said: Said) -> None:
    """Give the clocks back if a hook of ours locked them; the next one tries again."""
    note = _clock_note(config)
    if config.nvidia_smi is None or not note.exists():
        return
    try:
        _run([config.sudo, "-n", config.nvidia_smi, "--reset-gpu-clocks"])
        note.unlink()
    except OSError as error:
        said.warn_once(f"the clocks are still locked: {shown(error)}")
    else:
        said.did("gave the clocks back")


# --- the two hooks ----------------------------------------------------------------------------


class Said:
    """What a hook tells: lines in the log, one annotation if it failed."""

    def __init__(self) -> None:
        """Begin with nothing done."""
        self.lines: list[str] = []
        self.failures: list[str] = []
        self._warned: set[str] = set()

    def did(self, text: str) -> None:
        """Tell what was done."""
        self.lines.append(text)

    def warn_once(self, text: str) -> None:
        """Tell what an operator should look at."""
        if text not in self._warned:
            self._warned.add(text)
            print(f"::warning title=gguf-fleet::{_escaped(text)}")

    def fail(self, text: str) -> None:
        """Remember why the machine is not clean."""
        self.failures.append(text)


def _escaped(text: str) -> str:
    """Spell a text as a workflow command wants it; a line end would begin another command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def clean(config: Config, env: Mapping[str, str], said: Said, *, temp: bool) -> None:
    """End programs, then remove files: a program that lives could write them again."""
    _refuse_what_is_not_ours(Path(config.work))
    end_programs(config, env, said)
    empty_folders(config, env, said, temp=temp)
    reset_clocks(config, said)


def _refuse_what_is_not_ours(work: Path) -> None:
    """Refuse to empty a folder that is not the runner's user's own: a slip in runner.json."""
    try:
        found = work.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RefusedError(f"{work} cannot be read: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RefusedError(f"{work} (work in runner.json) is no folder of the runner's user")


def started(config: Config, env: Mapping[str, str]) -> None:
    """
    Decide whether the job may run, and make the machine ready for it.

    Raises:
        RefusedError: It may not, or an earlier job left something that cannot be removed.
    """
    event = Path(env.get("GITHUB_EVENT_PATH", ""))
    if not event.is_absolute():
        raise RefusedError("the runner names no event")
    decide(config, env, _json(_read(event, PAYLOAD_LIMIT_BYTES), "the event"))
    said = Said()
    clean(config, env, said, temp=False)
    for line in said.lines:
        print(f"Left by an earlier job: {line}.")
    if said.failures:
        raise RefusedError(f"an earlier job could not be cleaned up: {said.failures[0]}")
    ready = Said()
    lock_clocks(config, ready)
    print("\n".join(["This machine takes the job.", *(f"{line}." for line in ready.lines)]))


def completed(config: Config, env: Mapping[str, str]) -> None:
    """
    Leave the machine as it was before the job; a second time there is nothing to do.

    Raises:
        RefusedError: Something cannot be removed or ended: the next job would find it.
    """
    said = Said()
    clean(config, env, said, temp=True)
    print("\n".join(f"{line}." for line in said.lines) or "The job left nothing.")
    kept = [each for each in config.keep if Path(each).exists()]
    if kept:
        print(f"Kept for the next job: {', '.join(kept)}.")
    if said.failures:
        raise RefusedError(f"this machine is not clean: {'; '.join(said.failures)}")


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """Run one hook; whatever goes wrong is a refusal, with one line that says why."""
    title = {"started": "Refused by this machine", "completed": "Not cleaned up"}.get(argv[1])
    hook = {"started": started, "completed": completed}[argv[1]]
    os.chdir("/")  # the working directory is a job's
    try:
        if os.getuid() == 0:
            raise RefusedError("the runner runs as root; give it a user of its own")  # noqa: TRY301 - the same line
        config = read_config(Path(__file__).absolute().with_name("runner.json"))
        hook(config, env)
    except RefusedError as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - a hook that breaks must not let a job in
        reason = f"the hook failed: {type(error).__name__}: {shown(error)}"
    else:
        return 0
    print(f"::error title={title}::{_escaped(reason)}. Its rules: deploy/runner/README.md.")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv, os.environ))
