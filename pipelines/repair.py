"""
What a kill leaves behind, put right before the next run: DVC alone would refuse for ever.

    processes of a dead run           killed: they would write beside the new run
    .dvc/tmp/rwlock                   cut in the middle of a write, or naming owners that are dead
    dvc.lock                          cut in the middle of a write: the newest whole one, or none
    .NAME.part, .TOKEN.tmp            half-written files of ours and of DVC that nobody has open
    work/serving/PID-...              the folder of a server whose owner is dead, with its programs

DVC writes its lock files in place (treeverse/dvc: dvc/rwlock.py `_edit_rwlock`,
dvc/utils/serialize/_common.py `_dump_data`), so a kill between open and write leaves an empty one.
A dvc.lock that lost entries is safe, since DVC compares digests, but it costs hours of work again:
so `keep` saves a copy whenever a stage starts, when DVC is not writing.

Nothing here runs while another `fleet repro` works in the same checkout: the caller holds its lock.
"""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import json
import os
import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipelines import atomic, orphans, proc
from pipelines.errors import MachineError, ToolError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.layout import Layout

# Younger files may belong to a program that closed them for a moment; a re-run replaces its own.
_LEFT_OVER_AFTER_S = 60.0
# dvc_objects/fs/utils.py tmp_fname: secrets.token_urlsafe(16) between a dot and ".tmp".
_DVC_PARTIAL = re.compile(r"\.[A-Za-z0-9_-]{22}\.tmp$")
_RWLOCK_WITHIN_S = 3.0


def repair(
    at: Layout, *, died: bool = False, left_over_after_s: float = _LEFT_OVER_AFTER_S
) -> list[str]:
    """
    Put right what a killed run left in this checkout.

    Args:
        at: The checkout.
        died: The last run was killed, so a dvc.lock that is readable may still have lost its end.
        left_over_after_s: Age from which an unfinished file that nobody has open is removed.

    Returns:
        One line for each thing that was put right; nothing on a clean checkout.

    Raises:
        MachineError: DVC's own lock is held by a program that never lets go.
    """
    return [
        *_end_left_over(at.root),
        *_repair_rwlock(at.root / ".dvc/tmp"),
        *_repair_lock_files(at, died=died),
        *_sweep(at.root, left_over_after_s),
        *_sweep_servers(at),
    ]


# --- processes --------------------------------------------------------------------------------


def _end_left_over(root: Path) -> list[str]:
    processes = orphans.left_over(root)
    told = []
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it may have ended by itself
            told.append(f"ended process {process.pid} ({process.name()}) of a run that was killed")
    orphans.end(processes)
    return told


def _sweep_servers(at: Layout) -> list[str]:
    if not at.serving.is_dir():
        return []
    from pipelines.serving import sandbox  # noqa: PLC0415 - pydantic, not for every run

    return sandbox.sweep(at)


# --- DVC's table of readers and writers -------------------------------------------------------


def _repair_rwlock(tmp: Path) -> list[str]:
    path = tmp / "rwlock"
    if not path.exists():
        return []
    with _rwlock_guard(tmp):
        # Whoever writes the table holds the guard, so what is unreadable now has no writer.
        try:
            table = _readable_table(path.read_bytes())
        except FileNotFoundError:
            return []
        if table is None:
            path.unlink()
            return ["removed DVC's table of readers and writers: a kill had cut it"]
        kept = _living_entries(table)
        if kept == table:
            return []
        atomic.write_bytes(path, json.dumps(kept).encode())
        return ["removed the entries of dead processes from DVC's table of readers and writers"]


@contextmanager
def _rwlock_guard(tmp: Path) -> Iterator[None]:
    """
    Hold the lock under which DVC edits the table (zc.lockfile: flock on rwlock.lock).

    Raises:
        MachineError: Somebody holds it for longer than any edit takes.
    """
    path = tmp / "rwlock.lock"
    deadline = time.monotonic() + _RWLOCK_WITHIN_S
    with path.open("a+b") as guard:
        while True:
            try:
                fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise MachineError(
                        f"{path} is held by another program.",
                        hint=f"See who it is: fuser {path}",
                    ) from None
                time.sleep(0.05)
        yield


def _readable_table(data: bytes) -> dict[str, Any] | None:
    """Return the table if DVC can read it (dvc/rwlock.py SCHEMA), None if it is damaged."""
    try:
        table = json.loads(data)
    except ValueError:
        return None
    if not isinstance(table, dict) or not set(table) <= {"read", "write"}:
        return None
    writers, readers = table.get("write", {}), table.get("read", {})
    if not isinstance(writers, dict) or not isinstance(readers, dict):
        return None
    if not all(isinstance(infos, list) for infos in readers.values()):
        return None
    infos = [*writers.values(), *(info for infos in readers.values() for info in infos)]
    return table if all(_is_info(info) for info in infos) else None


def _is_info(info: object) -> bool:
    return (
        isinstance(info, dict)
        and set(info) == {"pid", "cmd"}
        and isinstance(info["pid"], int)
        and isinstance(info["cmd"], str)
    )


def _living_entries(table: dict[str, Any]) -> dict[str, Any]:
    """Drop what dead processes hold; DVC does so only for numbers that nobody reuses."""
    kept = dict(table)
    if "write" in kept:
        kept["write"] = {path: info for path, info in kept["write"].items() if _holds(info)}
    if "read" in kept:
        readers = {
            path: [info for info in infos if _holds(info)] for path, infos in kept["read"].items()
        }
        kept["read"] = {path: infos for path, infos in readers.items() if infos}
    return kept


def _holds(info: dict[str, Any]) -> bool:
    """Tell whether the process of an entry lives and is the one that made it."""
    try:
        words = psutil.Process(info["pid"]).cmdline()
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
    # The entry holds " ".join(sys.argv); the kernel knows the same words behind the interpreter.
    _, _, arguments = info["cmd"].partition(" ")
    return " ".join(words).endswith(arguments or info["cmd"])


# --- dvc.lock ---------------------------------------------------------------------------------


def keep(at: Layout) -> None:
    """Save copies of DVC's lock files; to be called while DVC runs a stage and so writes none."""
    for path in _lock_files(at):
        if path.exists():
            atomic.write_bytes(_copy_of(path, at), path.read_bytes())


def _lock_files(at: Layout) -> tuple[Path, Path]:
    return at.root / "dvc.lock", at.root / "pipelines/dvc.lock"


def _copy_of(path: Path, at: Layout) -> Path:
    return at.root / ".dvc/tmp/fleet" / path.relative_to(at.root)


def _repair_lock_files(at: Layout, *, died: bool) -> list[str]:
    told = []
    for path in _lock_files(at):
        if not path.exists():
            continue
        stages = _stages_in(path.read_bytes())
        copy = _copy_of(path, at)
        kept = copy.read_bytes() if copy.exists() else b""
        if stages is not None and not (died and (_stages_in(kept) or set()) - stages):
            continue
        if stages is None:
            kept = _newest(path, copy, kept, at)
        if kept:
            atomic.write_bytes(path, kept)
            told.append(f"restored {path}: a kill had cut it")
        else:
            path.unlink()
            told.append(f"removed {path}: a kill had cut it, and there is no copy")
    return told


def _newest(path: Path, copy: Path, kept: bytes, at: Layout) -> bytes:
    """Return the newer of our copy and the committed file, of those that are whole; or nothing."""
    candidates = []
    if _stages_in(kept) is not None:
        candidates.append((copy.stat().st_mtime, kept))
    try:
        git = ("git", "-C", str(path.parent))
        log = at.log("repair", "fleet")
        committed = proc.run([*git, "show", f"HEAD:./{path.name}"], log=log).stdout.encode()
        committed_at = float(proc.run([*git, "log", "-1", "--format=%ct"], log=log).stdout)
    except (ToolError, MachineError):
        committed, committed_at = b"", 0.0
    if _stages_in(committed) is not None:
        candidates.append((committed_at, committed))
    return max(candidates, default=(0.0, b""))[1]


def _stages_in(data: bytes) -> set[str] | None:
    """Return the stages of a lock file that DVC accepts (dvc/schema.py), None of another file."""
    import yaml  # noqa: PLC0415 - not at CLI start

    try:
        lock = yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - safe
    except (yaml.YAMLError, ValueError):
        return None
    if not isinstance(lock, dict) or lock.get("schema") != "2.0":
        return None
    stages = lock.get("stages", {})
    if not set(lock) <= {"schema", "stages", "datasets"} or not isinstance(stages, dict):
        return None
    return set(stages) if all(_is_locked_stage(stage) for stage in stages.values()) else None


def _is_locked_stage(stage: object) -> bool:
    if not isinstance(stage, dict) or not isinstance(stage.get("cmd"), str | list):
        return False
    if not set(stage) <= {"cmd", "deps", "params", "outs"}:
        return False
    files = [stage.get("deps", []), stage.get("outs", [])]
    params = stage.get("params", {})
    return (
        all(isinstance(entries, list) for entries in files)
        and all(_is_locked_file(entry) for entries in files for entry in entries)
        and isinstance(params, dict)
        and all(isinstance(values, dict) for values in params.values())
    )


def _is_locked_file(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("path"), str)
        and isinstance(entry.get("size", 0), int)
        and isinstance(entry.get("md5", ""), str)
    )


# --- unfinished files -------------------------------------------------------------------------


def _sweep(root: Path, left_over_after_s: float) -> list[str]:
    """Remove unfinished files whose writer is gone: nobody has them open and they are not new."""
    limit = time.time() - left_over_after_s
    old = [path for path in _unfinished(root) if _last_change(path) <= limit]
    if not old:
        return []
    busy = _open_files()
    told = []
    for path in old:
        if any(name == str(path) or name.startswith(f"{path}/") for name in busy):
            continue
        size_mib = sum(file.lstat().st_size for file in _files_below(path)) / 2**20
        with contextlib.suppress(FileNotFoundError):
            atomic.remove(path)
            told.append(f"removed the unfinished {path} ({size_mib:,.1f} MiB)")
    return told


def _unfinished(root: Path) -> list[Path]:
    """List our `.part`s below work/ and results/, and DVC's partial copies there and in caches."""
    found = []
    for top in (root / "work", root / "results", *_caches(root)):
        for directory, directories, files in os.walk(top.resolve()):
            # Reversed: a `.part` directory is taken whole and not entered.
            for name in reversed(directories):
                if _is_part(name):
                    directories.remove(name)
                    found.append(Path(directory, name))
            found += [
                Path(directory, name)
                for name in files
                if _is_part(name) or _DVC_PARTIAL.search(name)
            ]
    return found


def _is_part(name: str) -> bool:
    return name.startswith(".") and name.endswith(atomic.PART_SUFFIX)


def _caches(root: Path) -> list[Path]:
    """Find DVC's cache: beside its configuration unless that names another directory."""
    chosen = Path(".dvc/cache")
    for name in ("config", "config.local"):
        parser = configparser.ConfigParser(interpolation=None)
        with contextlib.suppress(configparser.Error, OSError):
            parser.read(root / ".dvc" / name, encoding="utf-8")
            declared = parser.get("cache", "dir", fallback="")
            chosen = Path(".dvc", declared) if declared else chosen
    return [root / chosen / "files", root / chosen / "runs"]


def _last_change(path: Path) -> float:
    """
    Time of the last change of a file or of anything below a directory; now if it just went.

    The inode's own time: a link into the cache keeps the time stamp of the file's content.
    """
    try:
        return max((file.lstat().st_ctime for file in _files_below(path)), default=time.time())
    except FileNotFoundError:
        return time.time()


def _files_below(path: Path) -> list[Path]:
    return [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]


def _open_files() -> set[str]:
    """Paths that a process of this user has open."""
    found: set[str] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            found.update(file.path for file in process.open_files())
    return found
