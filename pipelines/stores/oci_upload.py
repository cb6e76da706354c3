"""
One upload to a registry of OCI: how far it is, what is read for it, and what survives a kill.

The source is read and hashed once, from its beginning, wherever sending begins; the address of the
upload lies in the user's cache, so that the next run goes on after the last part.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self

import filelock

from pipelines import atomic, hashing, toolchain
from pipelines.errors import DigestError
from pipelines.stores.oci_login import origin_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.stores.base import Blob, OnBytes

_REPAIR: Final = "Run `fleet repro`: it makes a file again that is not what its record says."


class UploadLostError(Exception):
    """The registry does not know an upload any more, or got other bytes: it begins anew."""


@dataclass
class Upload:
    """
    One upload as it stands.

    Attributes:
        url: Where the next part goes; None before it has begun.
        offset: Bytes that the registry has.
        sent_bytes: That this process has sent, all attempts together.
        best: Highest `offset` that was seen; more of it means that waiting is worth it.
        in_parts: False once the registry refused parts.
        in_one_request: True once it refused PATCH as well.
        beginnings: How often it was begun anew.
        is_named: Whether the registry was asked to give it its name.
    """

    url: str | None = None
    offset: int = 0
    sent_bytes: int = 0
    best: int = 0
    in_parts: bool = True
    in_one_request: bool = False
    beginnings: int = 0
    is_named: bool = False


class Source:
    """A blob that is read and hashed once, from its beginning, wherever sending begins."""

    def __init__(self, blob: Blob) -> None:
        """Know the source; the block opens it."""
        self.blob = blob
        self.size_bytes = blob.size_bytes
        self.refusals = 0
        self._hash = hashlib.sha256()
        self._hashed_bytes = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        if isinstance(self.blob.source, bytes):
            self._file = io.BytesIO(self.blob.source)
            size = len(self.blob.source)
        else:
            self._file = self.blob.source.open("rb", buffering=0)
            size = os.fstat(self._file.fileno()).st_size
        if size != self.size_bytes:
            self._file.close()
            raise DigestError(
                f"{self.blob.name} is not the file of the release: it has {size} bytes, not "
                f"{self.size_bytes}. Nothing was sent.",
                hint=_REPAIR,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Return at most `size` bytes at an offset; what was not hashed before is."""
        assert self._file is not None, "it is open"
        while self._hashed_bytes < offset:
            self._read(self._hashed_bytes, min(hashing.CHUNK_BYTES, offset - self._hashed_bytes))
        return self._read(offset, size)

    def _read(self, offset: int, size: int) -> bytes:
        assert self._file is not None, "it is open"
        self._file.seek(offset)
        data = self._file.read(size)
        if not data and size:
            raise DigestError(
                f"{self.blob.name} became shorter while it was sent.",
                hint=_REPAIR,
            )
        end = offset + len(data)
        if offset <= self._hashed_bytes < end:
            self._hash.update(memoryview(data)[self._hashed_bytes - offset :])
            self._hashed_bytes = end
        return data

    def require_right(self) -> None:
        """
        Hold the source against its digest, reading what a resumed upload did not have to send.

        Raises:
            DigestError: It is another file.
        """
        while self._hashed_bytes < self.size_bytes:
            self._read(self._hashed_bytes, hashing.CHUNK_BYTES)
        if self._hash.hexdigest() != self.blob.sha256:
            raise DigestError(
                f"{self.blob.name} is not the file of the release: sha256 {self.blob.sha256} was "
                f"wanted, sha256 {self._hash.hexdigest()} is there. Nothing of it was stored.",
                hint=_REPAIR,
            )


class Body:
    """A part of a source as requests sends it: with its length, in pieces, counted."""

    def __init__(self, source: Source, start: int, length: int, on_bytes: OnBytes) -> None:
        """Send `length` bytes of `source` from `start` on."""
        self.source = source
        self.refusals = source.refusals
        self.sent_bytes = 0
        self._start = start
        self._length = length
        self._on_bytes = on_bytes

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        while piece := self.read(hashing.CHUNK_BYTES):
            yield piece

    def read(self, size: int = -1) -> bytes:
        """Return the next piece; urllib3 asks for 16 KiB at a time, which is too little."""
        left = self._length - self.sent_bytes
        wanted = left if size < 0 else min(left, max(size, hashing.CHUNK_BYTES))
        if not wanted:
            return b""
        data = self.source.read(self._start + self.sent_bytes, wanted)
        self.sent_bytes += len(data)
        self._on_bytes(self._start + self.sent_bytes)
        return data


class Memory:
    """The address of an unfinished upload, on this machine's disk, as long as we hold its lock."""

    def __init__(self, path: Path | None) -> None:
        """Remember in `path`; None remembers nothing."""
        self._path = path

    def read(self, origin: str) -> str | None:
        """Return what was remembered, if it is an address of that registry."""
        if self._path is None:
            return None
        try:
            url = json.loads(self._path.read_text(encoding="utf-8"))["url"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return url if isinstance(url, str) and origin_of(url) == origin else None

    def write(self, url: str | None) -> None:
        """Remember; a disk that is full must not stop the upload."""
        if self._path is not None and url is not None:
            with contextlib.suppress(OSError):
                atomic.write_json(self._path, {"url": url})
                self._path.chmod(0o600)

    def forget(self) -> None:
        """Forget."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


@contextmanager
def remembered(key: str) -> Iterator[Memory]:
    """Hold the memory of one upload; a second publisher of the same file has none of its own."""
    folder = toolchain.default_cache_root() / "uploads"
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_suffix(".lock"))
        lock.acquire(timeout=0)
    except (OSError, filelock.Timeout):
        yield Memory(None)
        return
    try:
        yield Memory(path)
    finally:
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
