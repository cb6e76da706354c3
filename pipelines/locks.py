"""One process at a time in a part of the cache, and a word about whom one waits for."""

from __future__ import annotations

import os
import platform
from contextlib import contextmanager
from typing import TYPE_CHECKING

import filelock

from pipelines import console

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def exclusively(lock: Path, what: str) -> Iterator[None]:
    """
    Hold `lock`, after saying whom one waits for; `what` is what its holder is doing.

    The kernel frees the lock of a process that is killed.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    owner = lock.with_suffix(".owner")
    holder = filelock.FileLock(lock)
    try:
        holder.acquire(timeout=0)
    except filelock.Timeout:
        console.info(f"Waiting for {_owner_text(owner)}, which is {what}.")
        holder.acquire()
    try:
        owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
        owner.unlink(missing_ok=True)
    finally:
        holder.release()


def _owner_text(owner: Path) -> str:
    try:
        return console.clean(owner.read_text(encoding="utf-8")) or "another process"
    except OSError:
        return "another process"
