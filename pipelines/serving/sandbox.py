"""
A private place for one server: folder, home, port, environment; nothing of it outlives us.

The folder lies below work/serving, on the file system of the GGUFs, so that a model is linked into
it and not copied. Its name carries our process number and start, and we hold a lock in it as long
as we live. Programs in it carry its path in their environment, and so does all that they start:
Ollama's llama-server runs on when Ollama is killed. Whichever way we end, a watchdog
(`pipelines.orphans`) ends what carries the mark and removes the folder; what is left when the
watchdog was killed as well, or the machine lost power, is swept when the next server starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import socket
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import console, disk, llamacpp, orphans, proc, wording

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.layout import Layout
    from pipelines.toolchain import Toolchain

HOST: Final = "127.0.0.1"
# Where drivers keep kernels that they compiled: a private home would have them compiled each time.
_CUDA_CACHE: Final = ".nv/ComputeCache"
_CACHES: Final = frozenset({"XDG_CACHE_HOME", "CUDA_CACHE_PATH"})
# Over NFS a file can be locked and a directory cannot.
_LOCK: Final = "lock"
_numbers = itertools.count()


@dataclass(frozen=True)
class Sandbox:
    """The private folder of one server; absolute, since it is also the mark of what runs in it."""

    folder: Path

    @property
    def home(self) -> Path:
        """HOME of the server."""
        return self.folder / "home"

    @property
    def temporary(self) -> Path:
        """TMPDIR of the server."""
        return self.folder / "tmp"

    @contextmanager
    def store(self) -> Iterator[Path]:
        """Hold a new folder to be OLLAMA_MODELS until the block is left."""
        folder = self.folder / f"models-{next(_numbers)}"
        with disk.explained(folder):
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def environment(self, tools: Toolchain) -> dict[str, str]:
        """
        Return what every server in here sees besides PATH and its own settings.

        That is what llama.cpp's tools see when they are timed, with a home and a directory for
        temporary files of its own. On a GPU the drivers keep their caches of compiled kernels.
        """
        seen = llamacpp.environment(tools, timed=True)
        if tools.backend == "cpu":
            seen = {name: value for name, value in seen.items() if name not in _CACHES}
        elif tools.backend == "cuda":
            seen.setdefault("CUDA_CACHE_PATH", str(Path.home() / _CUDA_CACHE))
        return seen | {
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            orphans.SANDBOX_ENV: str(self.folder),
        }


@contextmanager
def opened(at: Layout) -> Iterator[Sandbox]:
    """
    Sweep what earlier servers left, and hold a new folder, watched, until the block is left.

    Everything that runs in it then is ended and the folder is gone: by us if we can, by the
    watchdog if we are killed.

    Raises:
        MachineError: The folder cannot be made.
    """
    for line in sweep(at):
        console.info(f"repaired: {line}")
    folder = at.serving.resolve() / f"{os.getpid()}-{_started(os.getpid()):.0f}-{next(_numbers)}"
    watchdog = [
        *(sys.executable, "-I", str(Path(orphans.__file__).resolve()), str(folder)),
        "--folder",
    ]
    # Without the mark of `fleet repro`, which would have it killed before it has swept.
    env = {name: value for name, value in os.environ.items() if name != orphans.MARK_ENV}
    # No word at the end: it looks once more in every case, also if a second Ctrl-C comes while
    # the server is being stopped.
    with proc.watched_by(watchdog, word=b"", env=env), _locked(folder):
        sandbox = Sandbox(folder)
        with disk.explained(folder):
            for directory in (sandbox.home, sandbox.temporary):
                directory.mkdir()
        yield sandbox


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold a lock in it, which ends with us however we end; then remove it."""
    with disk.explained(folder):
        folder.mkdir(parents=True)
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def sweep(at: Layout) -> list[str]:
    """
    End and remove what servers left whose owner is dead; say what it was.

    A folder whose owner lives is not touched: neither one whose lock is held, also in another
    container, nor one whose process still runs. What is not named as ours is not touched either.
    """
    said = []
    for folder in sorted(_folders(at.serving.resolve())):
        if _is_abandoned(folder):
            killed = orphans.end_sandbox(folder)
            programs = wording.counted(killed, "program") if killed else "nothing"
            said.append(f"removed {at.serving / folder.name} of a killed run; {programs} ran in it")
    return said


def _folders(parent: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return [path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()]
    return []


def _is_abandoned(folder: Path) -> bool:
    pid, _, rest = folder.name.partition("-")
    started = rest.partition("-")[0]
    # An owner that has just made its folder may not hold the lock yet.
    if not (pid.isdigit() and started.isdigit()) or orphans.owner_lives(f":{pid}:{started}"):
        return False
    try:
        handle = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        return folder.exists()  # killed before it had one
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _started(pid: int) -> float:
    import psutil  # noqa: PLC0415 - not at CLI start

    return psutil.Process(pid).create_time()


def free_port() -> int:
    """
    Return a port of the loopback interface that nobody listens on at this moment.

    Somebody may take it before the server does: who starts the server tries again with another.
    """
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def listens(pid: int, port: int) -> bool:
    """
    Tell whether it is process `pid` that listens on a port, and not somebody who was faster.

    An answer on the port alone proves nothing: our server may just be failing to bind it.
    """
    import psutil  # noqa: PLC0415 - not at CLI start

    try:
        connections = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.Error:
        return False
    return any(
        item.status == psutil.CONN_LISTEN and item.laddr and item.laddr.port == port
        for item in connections
    )
