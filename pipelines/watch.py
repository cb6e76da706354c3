"""
What the kernel counts for the programs below us while they run: memory and waiting for a core.

Read from /proc ten times a second, only for our own descendants, so that watching costs one or two
thousandths of a core. Not less often: of a run of a few seconds, one moment in which a card was
slowed down has to stay below the share that makes it INVALID. Systems without /proc (macOS) are
asked through psutil, which knows the memory of the moment but neither its peak nor the waiting.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLE_EVERY_S: Final = 0.1
_PROC = Path("/proc")
_READ_BYTES = 1 << 14
_PEAK = re.compile(rb"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """
    What the watched programs used.

    Attributes:
        peak_rss_bytes: Largest resident memory of one program, by the kernel's own high-water
            mark; 0 if nothing was seen.
        on_core_s: Time that their threads ran.
        waited_s: Time that their threads were ready to run and had no core, as the scheduler counts
            it (/proc/PID/task/TID/schedstat); None where the kernel does not tell.
        major_faults_count: Pages that they touched and that had to be read from a disk (majflt in
            /proc/PID/stat); None where the kernel does not tell.
    """

    peak_rss_bytes: int
    on_core_s: float
    waited_s: float | None
    major_faults_count: int | None = None


def descendants(of: int | None = None, proc: Path = _PROC) -> set[int]:
    """Return the numbers of all processes below one (ours, if none is named)."""
    root, below = os.getpid() if of is None else of, str(proc)
    # Not on macOS, and not in kernels without CONFIG_PROC_CHILDREN.
    if _read(f"{below}/{root}/task/{root}/children") is None:
        return _descendants_by_psutil(root)
    found: set[int] = set()
    waiting = [root]
    while waiting:
        for child in _children(f"{below}/{waiting.pop()}"):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found


def _children(process: str) -> Iterator[int]:
    """Yield the children of each thread of a process; it may end while we look."""
    for task in _numbers(f"{process}/task"):
        yield from map(int, (_read(f"{process}/task/{task}/children") or b"").split())


# Ten times a second while others are measured: plain calls of the system cost a third of pathlib's.


def _read(path: str) -> bytes | None:
    """Return what a file of /proc holds now; None if it is gone."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = b""
        # The kernel may hand over a long list page by page.
        while more := os.read(file, _READ_BYTES):
            data += more
    except OSError:
        return None
    else:
        return data
    finally:
        os.close(file)


def _numbers(directory: str) -> list[str]:
    """Return the names of a directory; none if it is gone."""
    try:
        return os.listdir(directory)  # noqa: PTH208 - as above
    except OSError:
        return []


def _descendants_by_psutil(root: int) -> set[int]:
    import psutil  # noqa: PLC0415 - only where there is no /proc

    try:
        return {child.pid for child in psutil.Process(root).children(recursive=True)}
    except psutil.Error:
        return set()


class Watch:
    """Watches the programs called `program` below us while the block runs."""

    def __init__(
        self, program: str, *, every_s: float | None = SAMPLE_EVERY_S, proc: Path = _PROC
    ) -> None:
        """
        Prepare to watch the processes whose program has this name, and no other of ours.

        Without `every_s` it reads when `sample` is called, and at no other time.
        """
        self._program = program
        self._every_s = every_s
        self._proc = proc
        self._peak_rss_bytes = 0
        # Threads end and come back under other numbers: the last reading of each is kept.
        self._tasks: dict[tuple[int, int], tuple[int, int]] = {}
        self._faults: dict[int, int] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Self:
        """Start reading."""
        if self._every_s is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while not self._stopped.wait(self._every_s):
            self.sample()

    def pids(self) -> set[int]:
        """Return the numbers of the watched processes that live now."""
        return {pid for pid in descendants(proc=self._proc) if self._is_watched(pid)}

    def _is_watched(self, pid: int) -> bool:
        line = _read(f"{self._proc}/{pid}/cmdline")
        if line is None:
            return self._name_by_psutil(pid) == self._program
        argv = line.split(b"\0", 1)
        return os.path.basename(argv[0]).decode(errors="replace") == self._program  # noqa: PTH119 - argv

    @staticmethod
    def _name_by_psutil(pid: int) -> str:
        import psutil  # noqa: PLC0415 - only where there is no /proc

        try:
            return psutil.Process(pid).name()
        except psutil.Error:
            return ""

    def sample(self) -> None:
        """Read once; also safe from another thread, at a moment that matters."""
        with self._lock:
            for pid in self.pids():
                self._sample_process(pid)

    def _sample_process(self, pid: int) -> None:
        self._peak_rss_bytes = max(self._peak_rss_bytes, self._rss_bytes(pid))
        process = f"{self._proc}/{pid}"
        # The name stands in parentheses and may hold anything, blanks too; majflt is field 12.
        with contextlib.suppress(ValueError, IndexError):
            after_name = (_read(f"{process}/stat") or b"").rpartition(b")")[2].split()
            self._faults[pid] = int(after_name[9])
        for task in _numbers(f"{process}/task"):
            with contextlib.suppress(ValueError):
                found = _read(f"{process}/task/{task}/schedstat") or b""
                ran_ns, waited_ns, _ = map(int, found.split())
                self._tasks[pid, int(task)] = (ran_ns, waited_ns)

    def _rss_bytes(self, pid: int) -> int:
        status = _read(f"{self._proc}/{pid}/status")
        if status is None:
            return 0 if self._proc.is_dir() else self._rss_by_psutil(pid)
        found = _PEAK.search(status)
        return int(found[1]) * 1024 if found else 0

    @staticmethod
    def _rss_by_psutil(pid: int) -> int:
        import psutil  # noqa: PLC0415 - only where there is no /proc

        try:
            return int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:
            return 0

    def usage(self) -> Usage:
        """Sum up what has been read."""
        with self._lock:
            return Usage(
                peak_rss_bytes=self._peak_rss_bytes,
                on_core_s=sum(ran for ran, _ in self._tasks.values()) / 1e9,
                waited_s=sum(waited for _, waited in self._tasks.values()) / 1e9
                if self._tasks
                else None,
                major_faults_count=sum(self._faults.values()) if self._faults else None,
            )
