"""A directory is a registry: it keeps what every store promises, whatever happens to the disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import pytest
import release_factory as factory
from small_disk import fill, small_disk
from store_contract import MODEL, StoreContract, World

from pipelines import publishing
from pipelines.errors import DigestError, MachineError, RetryLaterError, StoreError
from pipelines.release_records import STABLE
from pipelines.stores.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.release import Composed
    from pipelines.stores.base import Blob

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(tmp_path / "cache"))


class TestContract(StoreContract):
    """The promises of all stores."""

    @pytest.fixture
    def world(self, tmp_path: Path) -> World:
        """A directory that is not there yet."""
        root = tmp_path / "registry"

        def tamper(_: str, sha256: str) -> None:
            path = root / "blobs/sha256" / sha256
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.chmod(0o644)
            path.write_bytes(data)

        def garble(model: str, alias: str) -> None:
            (root / "aliases" / model / f"{alias}.json").write_text("<html>\n")

        return World(open=lambda: LocalStore("local", root), tamper=tamper, garble_alias=garble)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """An empty registry."""
    return LocalStore("local", tmp_path / "registry")


@pytest.fixture
def made(tmp_path: Path) -> Composed:
    """A release."""
    return factory.composed(tmp_path / "files")


def gguf_of(made: Composed) -> Blob:
    """Return its first large file."""
    return next(blob for blob in made.blobs if blob.name.endswith(".gguf"))


def put(store: LocalStore, blob: Blob) -> int:
    """Store a blob; nobody watches."""
    return store.put_blob(MODEL, blob, lambda _: None)


def parts(store: LocalStore) -> list[str]:
    """Return what is half-written."""
    return [path.name for path in (store.root / "parts").glob("*.part")]


# --- bytes ------------------------------------------------------------------------------------


def read_bytes() -> int:
    """Bytes that this process has read from files so far; the kernel counts."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel tells no counts here")
def test_a_linked_file_is_read_once_to_store_it_and_to_prove_it(
    store: LocalStore, tmp_path: Path
) -> None:
    """Hashed is the inode that got the name; nothing has touched it when it is proven."""
    blob = gguf_of(factory.composed(tmp_path / "files", size_bytes=32 << 20))
    before = read_bytes()

    sent_bytes = put(store, blob)
    store.prove_blob(MODEL, blob, lambda _: None)

    assert sent_bytes == 0
    assert blob.size_bytes <= read_bytes() - before < blob.size_bytes * 1.05


def test_another_process_proves_by_reading(store: LocalStore, made: Composed) -> None:
    """What was proven here is no statement about later: a fresh handle hashes."""
    blob = gguf_of(made)
    put(store, blob)
    done: list[int] = []

    LocalStore("local", store.root).prove_blob(MODEL, blob, done.append)

    assert done == [blob.size_bytes]


def test_a_file_on_another_disk_is_copied(tmp_path: Path, made: Composed) -> None:
    """The bytes that were copied are told; what is on that disk is read again to prove it."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        store = LocalStore("local", disk / "registry")
        blob = gguf_of(made)

        assert put(store, blob) == blob.size_bytes
        assert put(store, blob) == 0

        proven: list[int] = []
        store.prove_blob(MODEL, blob, proven.append)
        assert proven == [blob.size_bytes]
        path = store.root / "blobs/sha256" / blob.sha256
        path.chmod(0o600)
        with path.open("r+b") as file:
            file.write(b"rotten")
        with pytest.raises(DigestError):
            store.prove_blob(MODEL, blob, lambda _: None)


def test_a_copy_is_nobodys_to_change(tmp_path: Path, made: Composed) -> None:
    """It is no link to what a next build overwrites, and is not written to by accident."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        store = LocalStore("local", disk / "registry")
        blob = gguf_of(made)
        put(store, blob)

        path = store.root / "blobs/sha256" / blob.sha256
        assert path.stat().st_mode & 0o222 == 0
        assert path.stat().st_nlink == 1


def test_a_symbolic_link_of_dvc_is_followed(
    store: LocalStore, made: Composed, tmp_path: Path
) -> None:
    """The blob is the file, not a link that dangles when the cache is cleared."""
    blob = gguf_of(made)
    link = tmp_path / "link.gguf"
    assert isinstance(blob.source, Path)
    link.symlink_to(blob.source)

    put(store, replace(blob, source=link))

    path = store.root / "blobs/sha256" / blob.sha256
    assert not path.is_symlink()
    assert factory.sha256(path.read_bytes()) == blob.sha256


def test_a_file_that_changes_while_it_is_read_is_not_stored(
    store: LocalStore, tmp_path: Path
) -> None:
    """The name would be that of bytes which are there no more."""
    blob = gguf_of(factory.composed(tmp_path / "files", size_bytes=4 << 20))

    def changes(done_bytes: int) -> None:
        if done_bytes == blob.size_bytes:
            assert isinstance(blob.source, Path)
            with blob.source.open("r+b") as file:
                file.write(b"other")
            os.utime(blob.source, ns=(1, 1))

    with pytest.raises(DigestError, match="written to while"):
        store.put_blob(MODEL, blob, changes)

    assert store.blob_size(MODEL, blob.sha256) is None
    assert parts(store) == []


def test_a_blob_is_as_old_as_its_name_not_as_its_file(store: LocalStore, made: Composed) -> None:
    """A collection that spares what is young spares what was linked just now."""
    blob = gguf_of(made)
    assert isinstance(blob.source, Path)
    os.utime(blob.source, (1, 1))

    put(store, blob)

    (listed,) = list(store.list_blobs())
    assert listed.age_s is not None
    assert listed.age_s < 3600
    assert blob.source.stat().st_mtime == 1


# --- disks and kills --------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing_and_the_next_run_finishes(
    tmp_path: Path, made: Composed
) -> None:
    """The error says so, the room is given back, and no name is there that has no bytes."""
    with small_disk(tmp_path / "disk", 256 << 10) as disk:
        store = LocalStore("local", disk / "registry")
        ledger = factory.ledger(tmp_path)
        filler = fill(disk)
        with filler.open("r+b") as file:
            file.truncate(filler.stat().st_size - (48 << 10))
        free_bytes = shutil.disk_usage(disk).free

        with pytest.raises(MachineError, match="disk"):
            publishing.publish(made, store, ledger, stable="latest", by=factory.by())

        assert parts(store) == []
        assert store.list_releases(MODEL) == ()
        assert store.read_alias(MODEL, STABLE)[0] is None
        kept = sum(blob.size_bytes for blob in store.list_blobs())
        assert shutil.disk_usage(disk).free >= free_bytes - kept - (32 << 10)
        for blob in store.list_blobs():
            assert factory.sha256(b"".join(store.read_blob(MODEL, blob.sha256))) == blob.sha256
        filler.unlink()
        outcome = publishing.publish(made, store, ledger, stable="latest", by=factory.by())
        assert outcome.moved is not None


def test_a_limit_of_the_system_in_the_middle_of_a_file_leaves_nothing(
    tmp_path: Path, made: Composed
) -> None:
    """As a full disk does, and without root: no file of this process may grow beyond 16 KiB."""
    script = textwrap.dedent("""
        import resource, signal, sys
        from dataclasses import replace
        from pathlib import Path
        import release_factory as factory
        from pipelines.errors import MachineError
        from pipelines.stores import local

        made = factory.composed(Path(sys.argv[1]))
        store = local.LocalStore("local", Path(sys.argv[2]))
        blob = next(each for each in made.blobs if each.name.endswith(".gguf"))
        blob = replace(blob, source=blob.source.read_bytes())
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, 16 << 10))
        try:
            store.put_blob("tiny-llama", blob, lambda _: None)
        except MachineError as error:
            print(error.message)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "files"), str(tmp_path / "registry")],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert "File too large" in done.stdout
    store = LocalStore("local", tmp_path / "registry")
    assert list(store.list_blobs()) == []
    assert parts(store) == []
    assert put(store, gguf_of(made)) == 0


def test_what_a_killed_writer_left_is_swept_by_the_next_one(
    store: LocalStore, made: Composed
) -> None:
    """A part has no name that anybody reads, and does not stay."""
    (store.root / "parts").mkdir(parents=True)
    (store.root / "parts/abc-1234.part").write_bytes(b"x" * 1000)

    put(store, gguf_of(made))

    assert parts(store) == []


def test_whoever_waits_too_long_for_another_writer_is_told(
    store: LocalStore, made: Composed, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no error of the registry: try again later."""
    impatient = LocalStore("local", store.root, lock_timeout_s=0.05)
    (store.root / "parts").mkdir(parents=True)

    with filelock.FileLock(store.root / "parts/.lock"), pytest.raises(RetryLaterError):
        put(impatient, gguf_of(made))

    assert "Waiting for another process" in capsys.readouterr().err
    assert put(impatient, gguf_of(made)) == 0


def test_writers_of_the_same_blob_at_once_store_it_once(store: LocalStore, made: Composed) -> None:
    """Whoever comes second finds it."""
    blob = gguf_of(made)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: put(LocalStore("x", store.root), blob), range(32))) == {0}

    assert len(list(store.list_blobs())) == 1


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "", "a/b", ".hidden", "x" * 300])
def test_no_name_leads_out_of_the_registry(store: LocalStore, made: Composed, name: str) -> None:
    """Neither a model, an alias, a release nor a digest is a path."""
    asks: tuple[Callable[[], object], ...] = (
        lambda: store.read_alias(name, STABLE),
        lambda: store.read_alias(MODEL, name),
        lambda: store.list_releases(name),
        lambda: store.read_release(MODEL, name),
        lambda: store.blob_size(MODEL, name),
        lambda: store.delete_blob(name),
        lambda: store.put_release(made.release.model_copy(update={"model": name}), made.data),
    )
    for ask in asks:
        with pytest.raises(StoreError):
            ask()


def test_a_file_in_the_place_of_the_registry_is_said_before_anything_is_sent(
    store: LocalStore, made: Composed, tmp_path: Path
) -> None:
    """`prepare` looks and creates nothing."""
    store.prepare(MODEL)
    assert not store.root.exists()
    store.root.write_text("no directory")

    with pytest.raises(MachineError, match="cannot be written to"):
        publishing.publish(made, store, factory.ledger(tmp_path), stable="latest", by=factory.by())

    assert store.root.read_text() == "no directory"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ["pipe", "folder"])
def test_what_is_no_file_keeps_no_reader_waiting(
    store: LocalStore, made: Composed, tmp_path: Path, what: str
) -> None:
    """A pipe in the place of a blob, a release or an alias would be read for ever."""
    publishing.publish(made, store, factory.ledger(tmp_path), stable="latest", by=factory.by())
    blob = made.blobs[0]
    for path, read in (
        ("aliases/tiny-llama/stable.json", lambda: store.read_alias(MODEL, STABLE)),
        (f"releases/tiny-llama/{made.id}.json", lambda: store.read_release(MODEL, made.id)),
        (f"blobs/sha256/{blob.sha256}", lambda: list(store.read_blob(MODEL, blob.sha256))),
    ):
        place = store.root / path
        place.unlink()
        if what == "pipe":
            os.mkfifo(place)
        else:
            place.mkdir()

        with pytest.raises(StoreError, match="is no file"):
            read()


def test_the_alias_of_another_model_is_not_taken_for_ones_own(
    store: LocalStore, made: Composed, tmp_path: Path
) -> None:
    """Somebody copied a file: no reader follows it."""
    publishing.publish(made, store, factory.ledger(tmp_path), stable="latest", by=factory.by())
    other = store.root / "aliases/other"
    other.mkdir()
    shutil.copy(store.root / "aliases" / MODEL / "stable.json", other)

    with pytest.raises(StoreError, match="tiny-llama@stable"):
        store.read_alias("other", STABLE)
