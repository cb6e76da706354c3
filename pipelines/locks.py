"""One process at a time in a part of the cache, and a word about whom one waits for."""

from __future__ import annotations

import contextlib
import os
import platform
from contextlib import contextmanager
from typing import TYPE_CHECKING

import filelock

from pipelines import console
from pipelines.errors import RetryLaterError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def exclusively(
    lock: Path, what: str, *, silent_s: float = 0.0, timeout_s: float | None = None
) -> Iterator[None]:
    """
    Hold `lock`, after saying whom one waits for.

    The kernel frees the lock of a process that is killed.

    Args:
        lock: A file that exists for nothing else; made if it is not there.
        what: What its holder is doing, as a clause: `writing FILE`.
        silent_s: Seconds of waiting that are not worth a word.
        timeout_s: Seconds after which one gives up; None waits as long as it takes.

    Raises:
        RetryLaterError: Another process had it all that time.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    owner = lock.with_suffix(".owner")
    holder = filelock.FileLock(lock)
    try:
        holder.acquire(timeout=silent_s if timeout_s is None else min(silent_s, timeout_s))
    except filelock.Timeout:
        console.info(f"Waiting for {_owner_text(owner)}, which is {what}.")
        _acquire(holder, owner, what, timeout_s)
    try:
        # Only a word for others: a full disk is for the work itself to find.
        with contextlib.suppress(OSError):
            owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
        owner.unlink(missing_ok=True)
    finally:
        holder.release()


def _acquire(
    holder: filelock.BaseFileLock, owner: Path, what: str, timeout_s: float | None
) -> None:
    try:
        holder.acquire(timeout=-1 if timeout_s is None else timeout_s)
    except filelock.Timeout as error:
        raise RetryLaterError(
            f"{_owner_text(owner)} has been {what} for {timeout_s:.0f} s.",
            hint="Try again when it has ended.",
        ) from error


def _owner_text(owner: Path) -> str:
    try:
        return console.clean(owner.read_text(encoding="utf-8")) or "another process"
    except OSError:
        return "another process"
