"""
What a publisher and its readers are promised, tried out -> bench/results/release-proofs.json.

On each kind of registry, with its real server:

    kills   a publisher, a process of its own, gets SIGKILL at a random moment; `stable` is read,
            every byte of it, and the next run has to finish what was begun
    reads   meanwhile other processes resolve `stable` and read a file of it, again and again
    large   a publisher of a file of 3 GiB: its peak memory, and how often it read the file
    back    a rollback between two releases: bytes of files that were sent or read

A moment is random over the time that a publication takes, so kills lie in all of its steps; how
many in which is told. Nothing here is a speed: a busy machine gives the same figures.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import mmap
import os
import random
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, cast

from bench.fork import ROOT
from bench.overhead import machine_class
from pipelines import atomic, console, params, publishing
from pipelines.errors import FleetError
from pipelines.release_records import STABLE
from pipelines.stores.base import Blob, hash_blob

sys.path.insert(0, str(ROOT / "tests"))

import release_factory as factory
from store_contract import Wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.release import Composed
    from pipelines.stores.base import Store

MODEL: Final = factory.MODEL
READERS_COUNT: Final = 2
GGUF_BYTES: Final = 300_000
LARGE_MIB: Final = 3 << 10
MAX_RSS_MIB: Final = 200
_CLEAN_RUNS: Final = 5
# Not asked for by each publisher: kills would fall into the git that is asked.
_BY: Final = factory.by("a proof")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of registry: what serves it, and how to open one, also in a process that starts."""

    server: str
    registry: params.Registry
    root: Path
    environment: dict[str, str]

    def open(self) -> Store:
        """Open a handle."""
        os.environ.update(self.environment)
        return open_registry(self.registry, self.root)


def open_registry(registry: params.Registry, root: Path) -> Store:
    """Open a declared registry as `open_store` does."""
    kind = registry.url.partition(":")[0]
    if kind == "s3":
        from pipelines.stores.s3 import S3Store  # noqa: PLC0415 - only for this kind

        return S3Store("proofs", registry)
    if kind == "oci":
        from pipelines.stores.oci import OciStore  # noqa: PLC0415 - only for this kind

        return OciStore("proofs", registry)
    from pipelines.stores.local import LocalStore  # noqa: PLC0415 - only for this kind

    return LocalStore("proofs", root / "registry")


@contextmanager
def local(scratch: Path) -> Iterator[Kind]:
    """A directory."""
    yield Kind(
        server="a directory on ext4, files linked",
        registry=params.Registry(url="file:registry"),
        root=scratch,
        environment={},
    )


@contextmanager
def s3(scratch: Path) -> Iterator[Kind]:
    """The versitygw of the tests."""
    import registry_servers as servers  # noqa: PLC0415 - only for this kind

    with servers.versitygw_server(scratch / "server") as server:
        yield Kind(
            server=server.kind,
            registry=server.registry(prefix="proofs"),
            root=scratch,
            environment=server.environment,
        )


@contextmanager
def oci(scratch: Path) -> Iterator[Kind]:
    """docker-registry behind nginx, both with the files of deploy/registry."""
    import registry_servers as servers  # noqa: PLC0415 - only for this kind

    with servers.oci_server(scratch / "server") as server:
        yield Kind(
            server=server.kind,
            registry=server.registry(),
            root=scratch,
            environment=server.environment("proofs"),
        )


KINDS: Final[dict[str, Callable[[Path], contextlib.AbstractContextManager[Kind]]]] = {
    "local": local,
    "s3": s3,
    "oci": oci,
}


def main() -> None:
    """Prove, print, and write the record, after each kind what is known so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--only", choices=KINDS, action="append", help="one kind of registry")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--reads", type=int, default=100_000, help="of all kinds together")
    parser.add_argument("--large-mib", type=int, default=LARGE_MIB)
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/release-proofs.json")
    parser.add_argument("--publish-large", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.publish_large:
        _publish_large(json.loads(args.publish_large))
        return
    found: dict[str, Any] = {"schema_version": 1, "machine": machine_class(), "stores": {}}
    (ROOT / "work").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fleet-proofs-", dir=ROOT / "work") as scratch:
        os.environ["XDG_STATE_HOME"] = f"{scratch}/state"
        large = _large_file(Path(scratch) / "large.gguf", args.large_mib)
        kinds = args.only or list(KINDS)
        for number, name in enumerate(kinds):
            left = args.reads - sum(each["reads"]["count"] for each in found["stores"].values())
            # Each kind is read in proportion; the last one makes up the sum.
            reads = max(0, left) // (len(kinds) - number)
            with KINDS[name](Path(scratch) / name) as kind:
                found["stores"][name] = prove(kind, large, kills=args.kills, reads=reads)
            console.out(json.dumps({name: found["stores"][name]}, indent=2))
            atomic.write_json(args.output, found)
            shutil.rmtree(Path(scratch) / name, ignore_errors=True)
    require_kept(found)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Show the module's docstring as it is."""


def require_kept(found: dict[str, Any]) -> None:
    """
    Fail if a promise was broken.

    Raises:
        SystemExit: One was; the record says which.
    """
    for name, each in found["stores"].items():
        broken = (
            each["kills"]["half_releases"]
            or each["kills"]["next_run_failed"]
            or each["reads"]["wrong"]
            or each["large"]["peak_rss_mib"] > MAX_RSS_MIB
            or each["rollback"]["files_sent"]
            or each["rollback"]["blob_bytes_read"]
        )
        if broken:
            raise SystemExit(f"{name}: a promise was broken; see the record.")


def prove(kind: Kind, large: Blob, *, kills: int, reads: int) -> dict[str, Any]:
    """Try out one kind of registry."""
    kind.root.mkdir(parents=True, exist_ok=True)
    first = _made(kind, 0)
    _publish(kind, first)
    with _Readers(kind) as readers:
        killed = _kills(kind, kills)
        seed = 1_000_000
        while readers.count < reads:
            # Whoever reads now meets releases that come and go.
            _publish(kind, _made(kind, seed))
            _point(kind, kind.open())
            seed += 1
        told = readers.stop()
    return {
        "server": kind.server,
        "kills": killed,
        "reads": told,
        "rollback": _rollback(kind),
        "large": _large(kind, large),
    }


# --- kills ------------------------------------------------------------------------------------


def _made(kind: Kind, seed: int) -> Composed:
    return factory.composed(kind.root / "files", seed, types=("Q8_0",), size_bytes=GGUF_BYTES)


def _publish(kind: Kind, made: Composed, store: Store | None = None) -> publishing.Outcome:
    return publishing.publish(
        made,
        store or kind.open(),
        factory.ledger(kind.root),
        stable="latest",
        by=_BY,
    )


def _point(kind: Kind, store: Store) -> publishing.Outcome:
    return publishing.point(
        MODEL,
        "previous",
        store,
        factory.ledger(kind.root),
        by=_BY,
    )


def _started(kind: Kind, made: Composed) -> int:
    """Start a publisher; return its id when it has a connection and begins."""
    began, begin = os.pipe()

    def work() -> None:
        store = kind.open()
        store.prepare(MODEL)
        os.write(begin, b"!")
        _publish(kind, made, store)

    child = _forked(work)
    os.close(begin)
    assert os.read(began, 1) == b"!", "a publisher failed before it began"
    os.close(began)
    return child


def _forked(work: Callable[[], object]) -> int:
    """Do something in a process of its own; return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def _kills(kind: Kind, count: int) -> dict[str, Any]:
    """Kill publishers, and see what each left behind."""
    takes_s = statistics.median(
        _clean_run_s(kind, 10_000 + number) for number in range(_CLEAN_RUNS)
    )
    half, failed, late, killed = 0, 0, 0, 0
    where: Counter[str] = Counter()
    chance = random.Random(1)  # noqa: S311 - no secret
    for number in itertools.count():
        if killed == count:
            break
        made = _made(kind, 20_000 + number)
        before = _stable(kind.open())
        child = _started(kind, made)
        time.sleep(chance.uniform(0, takes_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            late += 1
            continue
        killed += 1
        where[_state(kind, made)] += 1
        try:
            assert _stable(kind.open()) in {before, made.id}
        except (AssertionError, FleetError) as error:
            console.error(f"kill {number}: {error}")
            half += 1
        try:
            _publish(kind, made)
            assert _stable(kind.open()) == made.id
            moves = factory.ledger(kind.root).moves("proofs", STABLE)
            assert [move.sequence for move in moves] == list(range(1, len(moves) + 1))
        except (AssertionError, FleetError) as error:
            console.error(f"after kill {number}: {error}")
            failed += 1
    return {
        "count": killed,
        "publication_s": round(takes_s, 3),
        "not_counted_ended_before": late,
        "left_behind": dict(sorted(where.items())),
        "half_releases": half,
        "next_run_failed": failed,
    }


def _clean_run_s(kind: Kind, seed: int) -> float:
    """Time a publisher that nobody kills, as it is started for a kill."""
    made = _made(kind, seed)
    child = _started(kind, made)
    began = time.monotonic()
    _, status = os.waitpid(child, 0)
    assert status == 0, "a publisher failed that nobody killed"
    return time.monotonic() - began


def _stable(store: Store) -> str:
    """Read the stable release, every byte of it; return its id."""
    id_, release, _ = publishing.resolve(store, MODEL, STABLE)
    for file in release.files:
        found = hash_blob(store.read_blob(MODEL, file.sha256), lambda _: None)
        assert found == (file.sha256, file.size_bytes), file.name
    return id_


def _state(kind: Kind, made: Composed) -> str:
    """Say how far a publisher came."""
    store = kind.open()
    alias, _ = store.read_alias(MODEL, STABLE)
    if alias is not None and alias.release == made.id:
        last = factory.ledger(kind.root).last("proofs", STABLE)
        written = last is not None and last.sequence == alias.sequence
        return "5 all of it" if written else "4 alias moved, no line in the ledger"
    if made.id in store.list_releases(MODEL):
        return "3 release stored, alias not moved"
    gguf = made.release.of("gguf")[0].sha256
    there = sum(store.blob_size(MODEL, blob.sha256) is not None for blob in made.blobs)
    if there == len(made.blobs):
        return "2 all files, no release"
    return "1 some files" if store.blob_size(MODEL, gguf) is not None else "0 not the GGUF"


# --- readers ----------------------------------------------------------------------------------


class _Readers:
    """Processes that read all the time; their counts lie in memory that all share."""

    _SLOT: Final = struct.Struct("qqq")  # reads, wrong ones, whether to stop

    def __init__(self, kind: Kind) -> None:
        """Prepare; the block starts them."""
        self._kind = kind
        self._shared = mmap.mmap(-1, self._SLOT.size * READERS_COUNT)
        self._children: list[int] = []

    def __enter__(self) -> Self:
        """Start them."""
        for number in range(READERS_COUNT):
            self._children.append(_forked(lambda number=number: self._read(number)))  # type: ignore[misc]
        return self

    def __exit__(self, *_: object) -> None:
        """End them, however the block ended."""
        for child in self._children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    @property
    def count(self) -> int:
        """Reads so far."""
        return sum(self._slot(number)[0] for number in range(READERS_COUNT))

    def stop(self) -> dict[str, Any]:
        """Let each finish its read; return the counts."""
        for number in range(READERS_COUNT):
            offset = number * self._SLOT.size + 16
            self._shared[offset : offset + 8] = struct.pack("q", 1)
        for child in self._children:
            _, status = os.waitpid(child, 0)
            assert status == 0, "a reader failed"
        self._children = []
        wrong = sum(self._slot(number)[1] for number in range(READERS_COUNT))
        return {"count": self.count, "wrong": wrong, "processes": READERS_COUNT}

    def _slot(self, number: int) -> tuple[int, int, int]:
        reads, wrong, stop = self._SLOT.unpack_from(self._shared, number * self._SLOT.size)
        return reads, wrong, stop

    def _read(self, number: int) -> None:
        """Read until told to stop; whatever is not whole and right counts as wrong."""
        store, reads, wrong = self._kind.open(), 0, 0
        chance = random.Random(number)  # noqa: S311 - no secret
        while not self._slot(number)[2]:
            try:
                _, release, _ = publishing.resolve(store, MODEL, STABLE)
                file = chance.choice(release.files)
                found = hash_blob(store.read_blob(MODEL, file.sha256), lambda _: None)
                wrong += found != (file.sha256, file.size_bytes)
            except FleetError as error:
                console.error(f"reader {number}: {error}")
                wrong += 1
            reads += 1
            offset = number * self._SLOT.size
            self._shared[offset : offset + 16] = struct.pack("qq", reads, wrong)


# --- rollback and a large file ----------------------------------------------------------------


def _rollback(kind: Kind) -> dict[str, int]:
    """Roll back and forth; count what went over the store's border."""
    store = Wrapped(kind.open())
    moves = 2
    for _ in range(moves):
        outcome = _point(kind, cast("Store", store))
        assert outcome.moved is not None
        assert outcome.moved.action == "rollback"
    return {
        "moves": moves,
        "files_sent": store.calls.count("put_blob"),
        "blob_bytes_read": store.read_bytes,
    }


def _large_file(path: Path, size_mib: int) -> Blob:
    """Write a file that no file system can leave out: noise with a counter in each MiB."""
    noise = bytearray(random.Random(3).randbytes(1 << 20))  # noqa: S311 - no secret
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for number in range(size_mib):
            noise[:8] = struct.pack("<q", number)
            file.write(noise)
            digest.update(noise)
    return Blob(
        name=path.name,
        sha256=digest.hexdigest(),
        size_bytes=size_mib << 20,
        media_type="application/vnd.ollama.image.model",
        source=path,
    )


def _large(kind: Kind, blob: Blob) -> dict[str, Any]:
    """Store and prove a large file in a process of its own, which tells what it took."""
    task = {
        "registry": json.loads(kind.registry.model_dump_json()),
        "root": str(kind.root),
        "source": str(blob.source),
        "sha256": blob.sha256,
        "size_bytes": blob.size_bytes,
    }
    done = subprocess.run(  # noqa: S603 - ourselves
        [sys.executable, "-m", "bench.release", "--publish-large", json.dumps(task)],
        cwd=ROOT,
        env={**os.environ, **kind.environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _publish_large(task: dict[str, Any]) -> None:
    """Do it; what this process reads from files is counted by the kernel, sockets are not in it."""
    store = open_registry(params.Registry(**task["registry"]), Path(task["root"]))
    blob = Blob(
        name="large.gguf",
        sha256=task["sha256"],
        size_bytes=task["size_bytes"],
        media_type="application/vnd.ollama.image.model",
        source=Path(task["source"]),
    )
    store.prepare(MODEL)
    before = _read_bytes()
    began = time.monotonic()
    sent_bytes = store.put_blob(MODEL, blob, lambda _: None)
    put_s, put_read = time.monotonic() - began, _read_bytes() - before
    store.prove_blob(MODEL, blob, lambda _: None)
    console.out(
        json.dumps(
            {
                "file_bytes": blob.size_bytes,
                "sent_bytes": sent_bytes,
                "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
                "file_reads_put": round(put_read / blob.size_bytes, 4),
                "file_reads_put_and_proof": round((_read_bytes() - before) / blob.size_bytes, 4),
                "put_s": round(put_s, 1),
                "proof_s": round(time.monotonic() - began - put_s, 1),
            }
        )
    )


def _read_bytes() -> int:
    """Bytes that this process has read from files so far, from the page cache or not."""
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return int(text.split("rchar:")[1].split()[0])


if __name__ == "__main__":
    main()
