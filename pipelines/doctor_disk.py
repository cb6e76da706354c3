"""What `fleet doctor` says of the disk: room, speed, whether work/ and DVC's cache share files."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import console, gpu, wording
from pipelines.doctor_lines import Line, fail, of_finding, ok, warn
from pipelines.errors import FleetError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.layout import Layout
    from pipelines.params import Declaration

_PROBE_BYTES: Final = 64 << 20
_PIECE_BYTES: Final = 8 << 20
_PROBE_WITHIN_S: Final = 0.75
# Below it a model of 8B takes ten minutes for each of its copies.
_SLOW_MIB_S: Final = 50.0
_FICLONE: Final = 0x40049409


def free(at: Layout) -> Iterator[Line]:
    """Hold the free disk of each place against what is wanted beside the artifacts."""
    from pipelines import health_probe  # noqa: PLC0415 - pydantic

    return map(of_finding, health_probe.free_room(at))


def fleet_room(declared: Declaration, at: Layout, *, offline: bool) -> Iterator[Line]:
    """Hold the disk against what is declared; offline without the models of unknown size."""
    from pipelines import health_probe, records  # noqa: PLC0415 - pydantic

    left = {}
    for name, model in declared.models.items() if offline else ():
        try:
            known = records.read(at.model_record("fetch", name), records.FetchRecord)
            is_known = (known.source, known.revision) == (model.source, model.revision)
        except FleetError:
            is_known = False
        if not is_known and not model.source.startswith("path:"):
            left[name] = model
    kept = {name: model for name, model in declared.models.items() if name not in left}
    quants = {key: quant for key, quant in declared.quants.items() if quant.model in kept}
    declared = declared.model_copy(update={"models": kept, "quants": quants})
    yield from map(of_finding, health_probe.fleet_room(declared, at))
    if left:
        yield warn(
            "machine",
            "disk-fleet",
            f"nobody was asked how large {wording.first_few(list(left))} would be",
            "fleet doctor, without --offline",
        )


def links(at: Layout) -> Iterator[Line]:
    """See whether DVC's cache is writable and shares files with work/."""
    from pipelines import health_probe  # noqa: PLC0415 - pydantic

    for finding in health_probe.dvc_cache(at):
        # Only the checkout of a job is removed after it.
        if finding.rule == "dvc-cache" and finding.status == "warn" and not console.in_actions():
            continue
        yield of_finding(finding)


def reflink(at: Layout) -> Iterator[Line]:
    """Say whether the file system can copy a file without its bytes; ext4 cannot."""
    if sys.platform != "linux":
        return
    with _in_work(at) as folder:
        one, other = folder / "one", folder / "other"
        one.write_bytes(b"x")
        with one.open("rb") as source, other.open("wb") as target:
            try:
                fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
            except OSError:
                text = "not on this file system; hardlinks do instead"
            else:
                text = "possible: a copy of a model takes no room"
    yield ok("machine", "reflink", text)


def speed(at: Layout) -> Iterator[Line]:
    """Time what a stage does most: write a file of its own, and read it."""
    with _in_work(at) as folder:
        if shutil.disk_usage(folder).free < 2 * _PROBE_BYTES:
            yield warn(
                "machine",
                "disk-speed",
                f"not measured: less than {2 * _PROBE_BYTES >> 20} MiB are free in work/",
                "Make room: `dvc gc --workspace` frees what this checkout does not need.",
            )
            return
        file = folder / "speed"
        written, write_s = _written(file)
        read, read_s = _read(file)
    write_mib_s = written / gpu.MIB / write_s
    text = (
        f"measured on {written >> 20} MiB in work/: writes {write_mib_s:,.0f} MiB/s to the disk, "
        f"reads {read / gpu.MIB / read_s:,.0f} MiB/s"
    )
    if write_mib_s < _SLOW_MIB_S:
        fix = "Put work/ and DVC's cache onto a local SSD: `findmnt --target work` says where it is"
        yield warn("machine", "disk-speed", text, fix)
    else:
        yield ok("machine", "disk-speed", text)


def _written(file: Path) -> tuple[int, float]:
    """Write until all is there or the time is over; return bytes and seconds."""
    # Not zeroes: some file systems keep no bytes of these.
    piece = os.urandom(1 << 20) * (_PIECE_BYTES >> 20)
    began = time.monotonic()
    written = 0
    with file.open("wb", buffering=0) as out:
        while written < _PROBE_BYTES and time.monotonic() - began < _PROBE_WITHIN_S:
            written += out.write(piece)
            os.fsync(out.fileno())
    return written, max(time.monotonic() - began, 1e-6)


def _read(file: Path) -> tuple[int, float]:
    """Read it from the disk, not from memory, where the kernel can be told to forget it."""
    read = 0
    with file.open("rb", buffering=0) as source:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.monotonic()
        while piece := source.read(_PIECE_BYTES):
            read += len(piece)
            if time.monotonic() - began > _PROBE_WITHIN_S:
                break
    return read, max(time.monotonic() - began, 1e-6)


@contextmanager
def _in_work(at: Layout) -> Iterator[Path]:
    """Hold a folder below work/ that is gone when the block is left."""
    work = at.root / "work"
    work.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".fleet-doctor-", dir=work)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def locks(at: Layout) -> Iterator[Line]:
    """See whether two programs of this checkout would hear of each other."""
    with _in_work(at) as folder, (folder / "lock").open("w") as one:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with (folder / "lock").open("w") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield ok("machine", "locks", "work/ keeps them")
                return
    yield fail(
        "machine",
        "locks",
        "the file system of work/ lets two programs hold one lock",
        "Mount it with locks (NFS: without `nolock`, `local_lock`), or use a local disk.",
    )
