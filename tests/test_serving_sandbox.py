"""A server's private place is private, and nothing of it outlives us, however we end."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from serving_factory import left_in, programs_in

from pipelines import orphans, proc, repair
from pipelines.layout import Layout
from pipelines.serving import sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.toolchain import Toolchain

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def at(tmp_path: Path) -> Iterator[Layout]:
    """A checkout, in which nothing may be left of any server when the test ends."""
    layout = Layout(tmp_path / "fork")
    layout.root.mkdir()
    yield layout
    assert left_in(layout) == []


# --- a private place --------------------------------------------------------------------------


@pytest.mark.toolchain
def test_a_server_sees_a_home_of_its_own_and_no_secret(
    at: Layout, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, proxies and options of a profile stay outside."""
    for name in ("HF_TOKEN", "HTTP_PROXY", "OLLAMA_HOST", "LLAMA_ARG_THREADS", "LD_PRELOAD"):
        monkeypatch.setenv(name, "ours")

    with sandbox.opened(at) as place:
        seen = place.environment(tools)

        assert "ours" not in seen.values()
        assert Path(seen["HOME"]).is_dir()
        assert Path(seen["TMPDIR"]).is_dir()
        assert Path(seen["HOME"]).is_relative_to(at.serving.resolve())


def test_two_places_of_one_process_are_apart(at: Layout) -> None:
    """Two servers at once share nothing."""
    with sandbox.opened(at) as first, sandbox.opened(at) as second:
        assert first.folder != second.folder
        assert first.folder.is_dir()


def test_a_checkout_on_nfs_can_serve(at: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a lock is only to be had on a file that is open for writing."""
    flock = fcntl.flock

    def flock_of_nfs(handle: int, operation: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    monkeypatch.setattr(orphans, "owner_lives", lambda _: False)  # as in another container

    with sandbox.opened(at) as place:
        assert sandbox.sweep(at) == []
        assert place.home.is_dir()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_place_is_gone_when_its_block_is_left(
    at: Layout, error: type[BaseException] | None
) -> None:
    """Also when the block ends by an error or a Ctrl-C, and with files that cannot be written."""

    def use() -> Path:
        with sandbox.opened(at) as place, place.store() as store:
            (store / "blob").write_bytes(b"read-only")
            (store / "blob").chmod(0o444)
            if error is not None:
                raise error
            return place.folder

    if error is None:
        assert not use().exists()
    else:
        with pytest.raises(error):
            use()

    assert list(at.serving.iterdir()) == []


def test_what_a_server_left_running_is_ended_with_the_place(at: Layout, tmp_path: Path) -> None:
    """A process that changed its session and lost its parent is found by its environment."""
    with sandbox.opened(at) as place:
        env = {orphans.SANDBOX_ENV: str(place.folder)}
        proc.run([sys.executable, "-c", _DAEMON], log=tmp_path / "log", env=env, inherit_env=False)
        (left,) = programs_in(at)

    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE


_DAEMON = """
import os, subprocess
null = subprocess.DEVNULL
subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=null, stderr=null)
"""


# --- being killed -----------------------------------------------------------------------------

_OWNER = """
import sys, time
from pathlib import Path
from pipelines import orphans, proc, repair
from pipelines.layout import Layout
from pipelines.serving import sandbox
root = Path(sys.argv[1])
with sandbox.opened(Layout(root)) as place:
    env = {orphans.SANDBOX_ENV: str(place.folder)}
    # The inner shell is what Ollama's llama-server is: it outlives a SIGKILL of its parent.
    argv = ["sh", "-c", "sh -c 'sleep 600; true' & wait"]
    with proc.background(argv, log=root / "log", env=env):
        print(place.folder, flush=True)
        time.sleep(600)
"""


def _owner(at: Layout, **env: str) -> tuple[subprocess.Popen[str], Path]:
    """Start a process that holds a place in which programs run; return it and its folder."""
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(at.root)],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    deadline = time.monotonic() + 30
    while len(programs_in(at)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    return owner, folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_we_are_ended_by_a_signal(at: Layout, number: signal.Signals) -> None:
    """Neither the server, nor what it started, nor a file; SIGTERM finds no handler here."""
    owner, folder = _owner(at)
    assert folder.is_dir()

    owner.send_signal(number)
    owner.communicate()

    assert left_in(at) == []


def test_the_watchdog_outlives_the_end_of_the_run_around_it(at: Layout) -> None:
    """`fleet repro` kills what carries its mark; the watchdog has still to sweep then."""
    mark = "f00d:1:1"
    owner, _ = _owner(at, **{orphans.MARK_ENV: mark})

    orphans.end_marked(mark)
    owner.communicate()

    assert left_in(at) == []


def _killed_with_its_watchdog(at: Layout) -> Path:
    """Leave what a machine leaves that kills everything at once: a folder, and an orphan in it."""
    owner, folder = _owner(at)
    (watchdog,) = (
        child for child in psutil.Process(owner.pid).children() if "--folder" in child.cmdline()
    )
    watchdog.kill()
    owner.kill()
    owner.communicate()
    deadline = time.monotonic() + 30
    while len(programs_in(at)) > 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert folder.is_dir()
    assert programs_in(at)
    return folder


def test_the_next_server_sweeps_what_the_killed_ones_left(
    at: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a SIGKILL of the watchdog as well, nothing is left once the next server starts."""
    folder = _killed_with_its_watchdog(at)

    with sandbox.opened(at) as place:
        assert not folder.exists()
        assert programs_in(at) == []
        assert place.folder.is_dir()

    assert (
        f"removed {at.serving / folder.name} of a killed run; 2 programs" in capsys.readouterr().err
    )


def test_fleet_repro_sweeps_what_killed_servers_left(at: Layout) -> None:
    """A link to 20 GB does not wait for the next load test."""
    folder = _killed_with_its_watchdog(at)

    said = repair.repair(at)

    assert any(folder.name in line for line in said)
    assert not folder.exists()
    assert programs_in(at) == []


def test_the_place_of_one_who_lives_is_not_swept(at: Layout) -> None:
    """Another load test in the same checkout goes on."""
    owner, folder = _owner(at)
    try:
        assert sandbox.sweep(at) == []
        assert folder.is_dir()
        assert len(programs_in(at)) >= 2
    finally:
        owner.kill()
        owner.communicate()


def test_the_place_of_one_who_lives_elsewhere_is_not_swept(at: Layout) -> None:
    """In another container its process number means nothing here; its lock does."""
    folder = at.serving / "4194304-1-0"
    with sandbox._locked(folder):
        assert sandbox.sweep(at) == []
        assert folder.is_dir()


def test_what_is_not_named_as_ours_is_not_swept(at: Layout) -> None:
    """Neither somebody's notes, nor a link to elsewhere."""
    elsewhere = at.root / "elsewhere"
    elsewhere.mkdir()
    (at.serving / "notes").mkdir(parents=True)
    (at.serving / "4194304-1-1").symlink_to(elsewhere)

    assert sandbox.sweep(at) == []

    assert elsewhere.is_dir()
    (at.serving / "4194304-1-1").unlink()
    (at.serving / "notes").rmdir()


# --- ports ------------------------------------------------------------------------------------


def test_a_port_belongs_to_the_process_that_listens_on_it() -> None:
    """An answer of somebody else on our port is not our server."""
    port = sandbox.free_port()
    assert not sandbox.listens(os.getpid(), port)

    with socket.create_server((sandbox.HOST, port)):
        assert sandbox.listens(os.getpid(), port)
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        try:
            assert not sandbox.listens(other.pid, port)
        finally:
            other.kill()
            other.communicate()
