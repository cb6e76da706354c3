"""What every measurement starts with: whose numbers, of which bytes, and nobody beside it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from pipelines import console, machine, records
from pipelines.errors import DigestError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import filelock

    from pipelines.layout import Layout
    from pipelines.records import FileDigest
    from pipelines.toolchain import Toolchain

_LOCK_POLL_S: Final = 0.5


def this_machine(at: Layout) -> dict[str, Any]:
    """
    Probe the hardware, and make sure that DVC compared with the same.

    Raises:
        MachineError: work/machine.json describes another machine than the one we run on.
    """
    found = machine.probe()
    with contextlib.suppress(FileNotFoundError, ValueError):
        known = json.loads(at.machine.read_text())
        if known.get("hw_id") != found["hw_id"]:
            raise MachineError(
                f"{at.machine} describes other hardware than this process may use (cores, memory, "
                "visible cards): its numbers would go under a wrong name.",
                hint="Run `fleet machine`, or start again without taskset or CUDA_VISIBLE_DEVICES.",
            )
    return found


def machine_id(hardware: dict[str, Any], tools: Toolchain) -> records.MachineId:
    """Name the hardware and the tools without a serial number or a host name."""
    return records.MachineId(
        hw_id=hardware["hw_id"],
        env_id=machine.facts_id(machine.environment(tools)),
        backend=tools.backend,
        cpu=hardware["cpu"]["model"],
        cores_count=hardware["cpu"]["cores_count"],
        memory_gib=hardware["memory_gib"],
        gpus=tuple(card["name"] for card in hardware["gpus"]),
    )


def prove(path: Path, recorded: FileDigest) -> None:
    """
    Make sure that a model is the one that its record names, by reading all of it.

    Every number measured from here on is bound to that digest. Nothing else notices a bit that
    flipped in a cache or a file that was put there by hand, neither DVC nor llama.cpp. The pass
    costs a second for each GB, a few percent of what is measured afterwards, and it is the read
    that brings the file into memory for the first tool.

    Raises:
        DigestError: It is missing or has other bytes.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file, console.Progress(f"read {path.name}"):
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DigestError(f"{path} does not exist.", hint="fleet repro") from None
    if (size_bytes, found) != (recorded.size_bytes, recorded.sha256):
        raise DigestError(
            f"{path} is not the file of its record: {size_bytes:,} bytes with sha256 {found}, "
            f"recorded are {recorded.size_bytes:,} bytes with {recorded.sha256}.",
            hint="Remove it and run `fleet repro`: it is made or fetched again.",
        )


class Lease:
    """The lock of a machine, as long as it is ours."""

    def __init__(self, lock: filelock.BaseFileLock) -> None:
        """Take note of the file that is locked."""
        self._lock = lock
        self._inode = self._inode_now()

    def _inode_now(self) -> int | None:
        try:
            return os.stat(self._lock.lock_file).st_ino  # noqa: PTH116 - a path of filelock's
        except OSError:
            return None

    def held(self) -> bool:
        """
        Tell whether nobody else can have taken the lock.

        A lock file that was removed while it was locked protects nothing: the next one makes a new
        file, and locks that.
        """
        return self._lock.is_locked and self._inode is not None and self._inode == self._inode_now()


_leases: list[Lease] = []


def leases() -> tuple[Lease, ...]:
    """Return the machines that this process holds now: none, or this one."""
    return tuple(_leases)


@contextmanager
def one_at_a_time(directory: Path, key: str) -> Iterator[Lease]:
    """
    Hold this machine for one measurement; wait for the one that holds it, and say which that is.

    The lock is the kernel's, on a file: it ends with the process that holds it, however it ends.
    """
    import filelock  # noqa: PLC0415 - not for those who only import the parts

    directory.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(directory / "benchmark.lock")
    owner = directory / "benchmark.owner"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        with contextlib.suppress(OSError):
            console.info(f"waiting for the measurement of {console.clean(owner.read_text())}")
        lock.acquire(poll_interval=_LOCK_POLL_S)
    try:
        owner.write_text(f"{key} (process {os.getpid()})", encoding="utf-8")
        lease = Lease(lock)
        _leases.append(lease)
        try:
            yield lease
        finally:
            _leases.remove(lease)
    finally:
        lock.release()
