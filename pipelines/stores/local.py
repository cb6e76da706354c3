"""
`file:` a directory as a registry: on this machine's disk, or on a share.

    blobs/sha256/<hex>             every file of every release, once for all models
    releases/<model>/<id>.json     release.json, as it was composed
    aliases/<model>/<alias>.json   which release an alias means, and its moves
    parts/                         what is being written; swept by the next writer

A blob is a clone of its source where the file system can share blocks, else a hard link, else a
copy. Hashed is the very inode that gets the name, before it gets it, so a linked file is read once:
to prove it again right afterwards costs a look at the inode, since nothing has touched it.

Writers take turns by a lock that the kernel frees when its holder is killed. Readers take none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Final

from pipelines import atomic, console, disk, hashing, locks
from pipelines.errors import DigestError, MachineError, StoreError
from pipelines.release_records import Alias, Release, alias_bytes, parse_alias, release_id, short
from pipelines.stores.base import (
    AliasMovedError,
    Blob,
    Guarantees,
    NotThereError,
    OnBytes,
    StoredBlob,
    Token,
    hash_blob,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
# What a release and an alias hold at most: an endless file is refused, not read.
_MAX_DOCUMENT_BYTES: Final = 64 << 20
# How long a writer waits for another one; a copy of a large file is what may take long.
_LOCK_TIMEOUT_S: Final = 3600.0
_SILENT_S: Final = 2.0
_FICLONE: Final = 0x40049409
_READ_ONLY: Final = 0o444
# dev, inode, size, mtime and ctime in ns: unchanged means that nobody wrote to it.
_Identity = tuple[int, int, int, int, int]


class LocalStore:
    """A registry in a directory; see the module."""

    def __init__(
        self,
        name: str,
        root: Path,
        *,
        max_file_mib: int | None = None,
        lock_timeout_s: float = _LOCK_TIMEOUT_S,
    ) -> None:
        """
        Open a registry in a directory, which need not exist yet.

        Args:
            name: Its key in params.yaml.
            root: The directory.
            max_file_mib: Largest file that a declaration lets in; None if it states none.
            lock_timeout_s: How long a writer waits for another one.
        """
        self.name = name
        self.root = root
        self._max_file_bytes = max_file_mib << 20 if max_file_mib is not None else None
        self._lock_timeout_s = lock_timeout_s
        self._proven: dict[str, _Identity] = {}

    @property
    def shown(self) -> str:
        """Its address as people may see it."""
        return f"file:{self.root}"

    @property
    def place(self) -> str:
        """Its address on this machine, whatever the working directory is; for no record."""
        return f"file:{self.root.resolve()}"

    @property
    def guarantees(self) -> Guarantees:
        """What it promises."""
        return Guarantees(
            compare_and_set=True,
            immutable=True,
            proves=True,
            max_file_bytes=self._max_file_bytes,
            sentence="Clones or links files where the disk can, so it is no backup of them.",
        )

    def prepare(self, model: str) -> None:
        """
        Find out whether the directory can be written to; nothing is created.

        Raises:
            MachineError: It cannot, or something else is in its place.
        """
        for path in (self._release_path(model, "0" * 64).parent, self._alias_path(model, "x")):
            place = path
            while not os.path.lexists(place) and place != place.parent:
                place = place.parent
            if not place.is_dir() or not os.access(place, os.R_OK | os.W_OK | os.X_OK):
                raise MachineError(
                    f"{self.shown} cannot be written to: {place} is no directory, or not yours.",
                    hint=f"registries.{self.name}.url in params.yaml names the directory.",
                )

    # blobs

    def blob_size(self, model: str, sha256: str) -> int | None:  # noqa: ARG002 - for all models
        """Return the size in bytes of a stored blob; None if it is not there."""
        with disk.explained(self.root):
            try:
                return self._blob_path(sha256).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def put_blob(self, model: str, blob: Blob, on_bytes: OnBytes) -> int:
        """
        Link or copy a file to its name, unless it is there.

        Returns:
            Bytes that were copied; 0 if it was there, was cloned or was linked.

        Raises:
            DigestError: The source is not the bytes that its name says. Nothing has that name.
            MachineError: The disk is full, or the source cannot be read. Nothing is left.
        """
        path = self._blob_path(blob.sha256)
        with disk.explained(path), self._writing():
            there_bytes = self.blob_size(model, blob.sha256)
            if there_bytes is not None:
                _touch(path)  # young again: a collection that runs now leaves it alone
                on_bytes(there_bytes)
                return 0
            with self._part(path.name) as part:
                found, copied_bytes = _bring(blob, part, on_bytes)
                size_bytes = part.stat().st_size
                if (found, size_bytes) != (blob.sha256, blob.size_bytes):
                    raise DigestError(
                        f"{blob.name} is not the file of the release: sha256 {blob.sha256} "
                        f"({blob.size_bytes} bytes) was wanted, sha256 {found} ({size_bytes} "
                        "bytes) is there. Nothing of it was stored.",
                        hint="Run `fleet repro`: it makes a file again that is not what its record "
                        "says.",
                    )
                _name(part, path)
            if copied_bytes == 0:  # of a copy, what was written was hashed, not what is there
                self._proven[blob.sha256] = _identity(path)
        return copied_bytes

    def read_blob(self, model: str, sha256: str, *, offset: int = 0) -> Iterator[bytes]:  # noqa: ARG002
        """
        Yield the stored bytes from an offset on.

        Raises:
            NotThereError: There is no such blob.
        """
        with disk.explained(self.root):
            try:
                file = _opened(self._blob_path(sha256))
            except (FileNotFoundError, NotADirectoryError) as error:
                raise NotThereError(
                    f"{self.shown} has no blob sha256:{sha256}.",
                    hint=f"`fleet verify-registry {self.name}` names everything that is missing.",
                ) from error
            with file:
                file.seek(offset)
                while chunk := file.read(hashing.CHUNK_BYTES):
                    yield chunk

    def prove_blob(self, model: str, blob: Blob, on_bytes: OnBytes) -> None:
        """
        Re-read a blob and hash it; free where this process hashed that very inode.

        Raises:
            DigestError: Other bytes lie under that name.
            NotThereError: None do.
        """
        path = self._blob_path(blob.sha256)
        with contextlib.suppress(OSError):
            if self._proven.get(blob.sha256) == _identity(path):
                on_bytes(blob.size_bytes)
                return
        found, size_bytes = hash_blob(self.read_blob(model, blob.sha256), on_bytes)
        if (found, size_bytes) != (blob.sha256, blob.size_bytes):
            raise DigestError(
                f"{self.shown} holds other bytes under sha256:{blob.sha256}: they have {found} "
                f"({size_bytes} bytes; {blob.size_bytes} were stored).",
                hint=f"Its disk or somebody changed {path}. Remove that file and publish again.",
            )

    def list_blobs(self) -> Iterator[StoredBlob]:
        """Yield every blob, of all models."""
        now = time.time()
        with disk.explained(self.root):
            for path in _entries(self.root / "blobs/sha256"):
                if _SHA256.fullmatch(path.name):
                    with contextlib.suppress(FileNotFoundError):  # collected meanwhile
                        status = path.stat()
                        # The time of the inode: a linked file may have been made long ago.
                        age_s = max(0.0, now - status.st_ctime)
                        yield StoredBlob(sha256=path.name, size_bytes=status.st_size, age_s=age_s)

    def delete_blob(self, sha256: str) -> None:
        """Remove a blob, if it is there."""
        with disk.explained(self.root), self._writing():
            self._blob_path(sha256).unlink(missing_ok=True)
            self._proven.pop(sha256, None)

    # releases

    def put_release(self, release: Release, data: bytes) -> None:
        """
        Store a release under its id; equal bytes that are there stay.

        Raises:
            StoreError: Other bytes are there under that id.
        """
        id_ = release_id(data)
        path = self._release_path(release.model, id_)
        with disk.explained(path), self._writing():
            if not path.exists():
                with self._part(id_) as part:
                    part.write_bytes(data)
                    _name(part, path)
            elif _document(path) == data:
                _touch(path)
            else:
                raise StoreError(
                    f"{path} holds other bytes than release {short(id_)}; nothing was overwritten.",
                    hint=f"Its disk or somebody changed it. `fleet verify-registry {self.name}` "
                    "names everything else; remove that file and publish again.",
                )

    def read_release(self, model: str, id_: str) -> bytes:
        """
        Return the stored bytes of a release.

        Raises:
            NotThereError: There is no such release.
        """
        path = self._release_path(model, id_)
        with disk.explained(path):
            try:
                return _document(path)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise NotThereError(
                    f"{self.shown} has no release {short(id_)} of {model}.",
                    hint=f"`fleet releases {model} --registry {self.name}` lists those it has.",
                ) from error

    def list_releases(self, model: str) -> tuple[str, ...]:
        """Return the ids of the stored releases of a model."""
        with disk.explained(self.root):
            return tuple(
                path.stem
                for path in _entries(self._release_path(model, "0" * 64).parent)
                if path.suffix == ".json" and _SHA256.fullmatch(path.stem)
            )

    def list_models(self) -> tuple[str, ...]:
        """Return the models of which it holds releases."""
        with disk.explained(self.root):
            return tuple(
                path.name
                for path in _entries(self.root / "releases")
                if path.is_dir() and self.list_releases(path.name)
            )

    def delete_release(self, model: str, id_: str) -> None:
        """Remove a release, if it is there."""
        with disk.explained(self.root), self._writing():
            self._release_path(model, id_).unlink(missing_ok=True)

    def release_age_s(self, model: str, id_: str) -> float | None:
        """Seconds since a release was put last; None if it is not there."""
        try:
            return max(0.0, time.time() - self._release_path(model, id_).stat().st_ctime)
        except OSError:
            return None

    # aliases

    def read_alias(self, model: str, alias: str) -> tuple[Alias | None, Token]:
        """Return an alias and the digest of its bytes; (None, None) if there is none."""
        path = self._alias_path(model, alias)
        with disk.explained(path):
            try:
                data = _document(path)
            except (FileNotFoundError, NotADirectoryError):
                return None, None
        found = parse_alias(data, f"{self.shown}, alias {model}@{alias},")
        if (found.model, found.alias) != (model, alias):
            raise StoreError(
                f"{path} is the alias {console.clean(found.model)}@{console.clean(found.alias)}.",
                hint="Somebody copied it there. `fleet audit` compares it with the ledger in git.",
            )
        return found, hashlib.sha256(data).hexdigest()

    def write_alias(self, alias: Alias, release: Release, expected: Token) -> None:  # noqa: ARG002
        """
        Move an alias in one rename, if it is still what was read.

        Raises:
            AliasMovedError: It is not.
        """
        path = self._alias_path(alias.model, alias.alias)
        with disk.explained(path), self._writing():
            try:
                found = hashlib.sha256(_document(path)).hexdigest()
            except (FileNotFoundError, NotADirectoryError):
                found = None
            if found != expected:
                raise AliasMovedError(
                    f"{alias.model}@{alias.alias} of {self.shown} was moved by somebody else."
                )
            with self._part(f"{alias.model}-{alias.alias}") as part:
                part.write_bytes(alias_bytes(alias))
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic.sync(part)
                part.replace(path)
                atomic.sync(path.parent)

    # below

    def _blob_path(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise StoreError(f"{console.clean(sha256)[:100]!r} is no sha256.")
        return self.root / "blobs/sha256" / sha256

    def _release_path(self, model: str, id_: str) -> Path:
        if not _SHA256.fullmatch(id_):
            raise StoreError(f"{console.clean(id_)[:100]!r} is no release id.")
        return self.root / "releases" / _segment(model) / f"{id_}.json"

    def _alias_path(self, model: str, alias: str) -> Path:
        return self.root / "aliases" / _segment(model) / f"{_segment(alias)}.json"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Take turns with other writers, then remove what a killed one has left."""
        parts = self.root / "parts"
        with locks.exclusively(
            parts / ".lock",
            f"writing to {self.shown}",
            silent_s=_SILENT_S,
            timeout_s=self._lock_timeout_s,
        ):
            for left in _entries(parts):
                if left.suffix == atomic.PART_SUFFIX:
                    atomic.remove(left)
            yield

    @contextmanager
    def _part(self, name: str) -> Iterator[Path]:
        """Yield a name to write under; whatever has it at the end is removed."""
        part = self.root / "parts" / f"{name[:100]}-{secrets.token_hex(4)}{atomic.PART_SUFFIX}"
        try:
            yield part
        finally:
            with contextlib.suppress(OSError):
                atomic.remove(part)


def _segment(name: str) -> str:
    """Refuse what would be a path of its own."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise StoreError(f"{console.clean(name)[:100]!r} cannot be the name of a model or alias.")
    return name


def _entries(directory: Path) -> list[Path]:
    """Return what is in a directory, sorted; nothing if there is none."""
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _opened(path: Path) -> IO[bytes]:
    """
    Open a file of the registry to read it; whoever can write there may have put anything in place.

    Raises:
        StoreError: It is no file: a pipe would keep every reader waiting for ever.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise StoreError(
            f"{path} is no file.", hint="Somebody put something else there: remove it."
        )
    return os.fdopen(handle, "rb")


def _document(path: Path) -> bytes:
    """Read a release or an alias, which are small."""
    with _opened(path) as file:
        data = file.read(_MAX_DOCUMENT_BYTES + 1)
    if len(data) > _MAX_DOCUMENT_BYTES:
        raise StoreError(f"{path} is larger than any release: it was not read.")
    return data


def _identity(path: Path) -> _Identity:
    status = path.stat()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _touch(path: Path) -> None:
    """Renew the time of an inode alone: DVC looks at the other one of a file that we share."""
    with contextlib.suppress(PermissionError):
        path.chmod(path.stat().st_mode & 0o7777)


def _name(part: Path, path: Path) -> None:
    """Give a finished file its final name, which must not be taken; both are on the disk then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.sync(part)
    try:
        path.hardlink_to(part)
    except FileExistsError:
        raise
    except OSError:  # a share without hard links; nobody else writes as long as we have the lock
        part.rename(path)
    else:
        part.unlink()
    atomic.sync(path.parent)


def _bring(blob: Blob, part: Path, on_bytes: OnBytes) -> tuple[str, int]:
    """Put the bytes of a blob under `part`; return their sha256 and how many were copied."""
    if isinstance(blob.source, bytes):
        part.write_bytes(blob.source)
        part.chmod(_READ_ONLY)
        on_bytes(len(blob.source))
        return hashlib.sha256(blob.source).hexdigest(), len(blob.source)
    # DVC may have made a symbolic link of the file; its target is what counts.
    source = blob.source.resolve()
    with source.open("rb", buffering=0) as opened:
        if _clone(opened, part):
            part.chmod(_READ_ONLY)
            return _hash(part, on_bytes), 0
        try:
            part.hardlink_to(source)
        except OSError:  # another file system, or one without hard links
            disk.require(part.parent, blob.size_bytes, blob.name)
            found = _copy(opened, part, on_bytes)
            part.chmod(_READ_ONLY)
            return found, blob.size_bytes
    return _hash(part, on_bytes), 0


def _clone(source: IO[bytes], part: Path) -> bool:
    """Share the blocks of `source` (btrfs, xfs, bcachefs); False where that is not possible."""
    try:
        with part.open("xb") as file:
            fcntl.ioctl(file.fileno(), _FICLONE, source.fileno())
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        return False
    return True


def _copy(source: IO[bytes], part: Path, on_bytes: OnBytes) -> str:
    """Copy an open file; return the sha256 of the very bytes that are written."""
    found = hashlib.sha256()
    size_bytes = 0
    with part.open("xb", buffering=0) as file:
        while chunk := source.read(hashing.CHUNK_BYTES):
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
            found.update(chunk)
            size_bytes += len(chunk)
            on_bytes(size_bytes)
    return found.hexdigest()


def _hash(path: Path, on_bytes: OnBytes) -> str:
    """
    Hash a linked file.

    Raises:
        DigestError: Somebody wrote to it meanwhile.
    """
    with path.open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        found, _ = hash_blob(iter(lambda: file.read(hashing.CHUNK_BYTES), b""), on_bytes)
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DigestError(
            "a file was written to while it was published. Nothing of it was stored.",
            hint="Publish when nothing else works on the model.",
        )
    return found
