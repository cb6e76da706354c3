"""
Processes that must not outlive the run that started them.

`fleet repro` puts a mark into the environment of everything below it. The mark finds every
descendant again, also those that changed their process group or lost their parent: a stage below
a shell below DVC. Run as a program (`python -I orphans.py MARK`) this file is the watchdog of one
run: it reads its standard input, which only `fleet repro` holds open, and when that closes without
a word it kills what carries the mark. So even `kill -9` of `fleet repro` leaves nothing behind.

A server of ours has a mark of its own (`SANDBOX_ENV`), which is its private folder; with
`python -I orphans.py FOLDER --folder` the watchdog ends what carries it and removes the folder.

Only the standard library and psutil are imported, so that the watchdog needs nothing of ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

MARK_ENV = "GGUF_FLEET_REPRO"
SANDBOX_ENV = "GGUF_FLEET_SANDBOX"
# What the run tells its watchdog when it ends by itself.
WORD = b"done"
_KILL_WITHIN_S = 4.0
_LOOK_EVERY_S = 0.01
# psutil derives the start of a process from the boot time, which a clock step may move.
_CLOCK_STEP_S = 10.0


def mark(root: Path) -> str:
    """Name this process as the owner of a run in the checkout at `root`: checkout:pid:start."""
    return f"{_checkout(root)}:{os.getpid()}:{psutil.Process().create_time():.0f}"


def _checkout(root: Path) -> str:
    return hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]


def owner_lives(mark_: str) -> bool:
    """Tell whether the process that made a mark still runs; its number alone may be another's."""
    try:
        _, pid, started = mark_.split(":")
        return abs(psutil.Process(int(pid)).create_time() - float(started)) < _CLOCK_STEP_S
    except (ValueError, psutil.Error):
        return False


def marked(mark_: str, *, env: str = MARK_ENV) -> list[psutil.Process]:
    """Return the living processes, other than this one, that carry exactly this mark."""
    return [process for process, theirs in _all_marked(env) if theirs == mark_]


def left_over(root: Path) -> list[psutil.Process]:
    """Return the processes of runs in this checkout whose owner is dead."""
    prefix = _checkout(root) + ":"
    return [
        process
        for process, theirs in _all_marked(MARK_ENV)
        if theirs.startswith(prefix) and not owner_lives(theirs)
    ]


def _all_marked(env: str) -> list[tuple[psutil.Process, str]]:
    found = []
    for process in psutil.process_iter():
        # Other users' processes cannot be read, and any may end while we look.
        with contextlib.suppress(psutil.Error, OSError):
            theirs = process.environ().get(env)
            if theirs and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process, theirs))
    return found


def end(processes: list[psutil.Process]) -> None:
    """Kill processes at once and wait until they have ended; one whose number was reused is not."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + _KILL_WITHIN_S
    while any(map(_runs, processes)) and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
    # Our own children are collected; nobody else's can be.
    psutil.wait_procs(processes, timeout=0)


def _runs(process: psutil.Process) -> bool:
    """Tell whether a process runs; one that has ended and that nobody collects does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_marked(mark_: str, *, env: str = MARK_ENV) -> int:
    """Kill what carries the mark until two looks in a row find nothing; return how many it was."""
    killed = 0
    deadline = time.monotonic() + _KILL_WITHIN_S
    clean_looks = 0
    while clean_looks < 2 and time.monotonic() < deadline:  # noqa: PLR2004 - a fork may race one
        found = marked(mark_, env=env)
        clean_looks = 0 if found else clean_looks + 1
        killed += len(found)
        end(found)
    return killed


def end_sandbox(folder: Path) -> int:
    """
    End what runs in a server's private folder and remove it; return how many programs it was.

    Args:
        folder: Absolute, as the mark of its programs spells it.
    """
    killed = end_marked(str(folder), env=SANDBOX_ENV)
    shutil.rmtree(folder, ignore_errors=True)
    return killed


def _watch(mark_: str, *, is_folder: bool) -> None:
    """Wait for the end of the run; kill what it left if it did not end by itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    said = b""
    while chunk := os.read(sys.stdin.fileno(), 64):
        said += chunk
    if said == WORD:
        return
    if is_folder:
        end_sandbox(Path(mark_))
    else:
        end_marked(mark_)


if __name__ == "__main__":
    _watch(sys.argv[1], is_folder="--folder" in sys.argv[2:])
