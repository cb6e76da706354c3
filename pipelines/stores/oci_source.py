"""What is read for an upload: a blob, once and from its beginning, wherever sending begins."""

from __future__ import annotations

import hashlib
import io
import os
from typing import IO, TYPE_CHECKING, Final, Self

from pipelines import hashing
from pipelines.errors import DigestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.stores.base import Blob, OnBytes

_REPAIR: Final = "Run `fleet repro`: it makes a file again that is not what its record says."


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
