"""
What every registry can do: the one Protocol behind `publish`, `rollback`, `pull` and `gc`.

    blobs      bytes by their sha256, written once
    releases   release.json by its sha256, written once, after every blob that it names
    aliases    pointers with a history, moved last

A reader goes alias -> release -> blob and finds all of it, or the alias still means the release
before. Who calls these in that order is `pipelines.publishing`; a store only keeps its promises.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from pipelines.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipelines.release_records import Alias, Release

# Called with the number of bytes of the present blob that are done.
OnBytes: TypeAlias = "Callable[[int], None]"
# What a store knows an alias by when it was read: an ETag, a commit, a digest. Nobody else looks
# into it.
Token: TypeAlias = Any


class AliasMovedError(StoreError):
    """Somebody else moved the alias since it was read; nothing was written."""


class NotThereError(StoreError):
    """The store does not have what was asked for."""


@dataclass(frozen=True, kw_only=True)
class Guarantees:
    """
    What a store can promise, as the README's table says it.

    Attributes:
        compare_and_set: An alias is moved only if it is still what was read. Without it moves are
            serialised by the caller and read back.
        immutable: The store itself refuses other bytes under a blob's or a release's name.
        proves: Re-reading gives the stored bytes; without it a statement of the store is trusted.
        max_file_bytes: Largest file; None if there is no limit.
        sentence: What else a user has to know, in one sentence.
    """

    compare_and_set: bool
    immutable: bool
    proves: bool
    max_file_bytes: int | None
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Blob:
    """Bytes to publish: where they lie, and the name and size that they must have."""

    name: str
    sha256: str
    size_bytes: int
    media_type: str
    source: Path | bytes


@dataclass(frozen=True, kw_only=True)
class StoredBlob:
    """A blob as a store lists it; `age_s` since it was written, None if unknown."""

    sha256: str
    size_bytes: int
    age_s: float | None


class Store(Protocol):
    """
    One registry.

    Every method may raise StoreError (the store refused, lost or garbled something; it says what
    and the next step) or RetryLaterError (it could not be reached within the deadline). No method
    leaves anything half-written under a final name.
    """

    name: str
    """Its key in params.yaml."""

    @property
    def shown(self) -> str:
        """Its address as people may see it: without credentials."""
        ...

    @property
    def guarantees(self) -> Guarantees:
        """What it promises."""
        ...

    def prepare(self, model: str) -> None:
        """Find out, before any byte is sent, whether it can be reached and written to."""
        ...

    # blobs

    def blob_size(self, model: str, sha256: str) -> int | None:
        """Return the size in bytes of a stored blob; None if it is not there."""
        ...

    def put_blob(self, model: str, blob: Blob, on_bytes: OnBytes) -> int:
        """
        Store a blob under its sha256, unless it is there.

        The source is read once, in bounded memory, and hashed while it is sent. Resumes what a kill
        left where the store can.

        Returns:
            Bytes that were sent; 0 if it was there or was linked.

        Raises:
            DigestError: The source is not the bytes that its name says. Nothing has that name.
        """
        ...

    def read_blob(self, model: str, sha256: str, *, offset: int = 0) -> Iterator[bytes]:
        """
        Yield the stored bytes from an offset on, as the store gives them: the caller hashes.

        Raises:
            NotThereError: There is no such blob.
        """
        ...

    def prove_blob(self, model: str, blob: Blob, on_bytes: OnBytes) -> None:
        """
        Re-read a blob from the store and hash it.

        Raises:
            DigestError: The store has other bytes under that name.
            NotThereError: It has none.
        """
        ...

    def list_blobs(self) -> Iterator[StoredBlob]:
        """Yield every blob of the registry, of all models."""
        ...

    def delete_blob(self, sha256: str) -> None:
        """Remove a blob, if it is there."""
        ...

    # releases

    def put_release(self, release: Release, data: bytes) -> None:
        """
        Store a release under its id; equal bytes that are there stay.

        Raises:
            StoreError: Other bytes are there under that id.
        """
        ...

    def read_release(self, model: str, id_: str) -> bytes:
        """
        Return the stored bytes of a release; the caller compares them with the id.

        Raises:
            NotThereError: There is no such release.
        """
        ...

    def list_releases(self, model: str) -> tuple[str, ...]:
        """Return the ids of the stored releases of a model, in any order."""
        ...

    def list_models(self) -> tuple[str, ...]:
        """Return the models of which it holds releases."""
        ...

    def delete_release(self, model: str, id_: str) -> None:
        """Remove a release, if it is there."""
        ...

    # aliases

    def read_alias(self, model: str, alias: str) -> tuple[Alias | None, Token]:
        """Return an alias and what has to be shown to move it; (None, token) if there is none."""
        ...

    def write_alias(self, alias: Alias, release: Release, expected: Token) -> None:
        """
        Move an alias to a release, and with it all that readers of this kind of store look at.

        Args:
            alias: As it shall be.
            release: The release that it means.
            expected: What `read_alias` gave.

        Raises:
            AliasMovedError: It is no longer what was read.
        """
        ...


@runtime_checkable
class Repairs(Protocol):
    """
    A store with pointers of its own beside an alias, which no single step moves with it.

    A publisher that was killed between them leaves some on the wrong release.
    """

    def repair(self, alias: Alias, release: Release) -> tuple[str, ...]:
        """Make them mean the release that the alias means; return those that were wrong."""
        ...


def hash_blob(
    chunks: Iterator[bytes], on_bytes: OnBytes, *, most_bytes: int | None = None
) -> tuple[str, int]:
    """
    Return sha256 and size of what an iterator yields.

    Args:
        chunks: Bytes; who lies may have no end of them.
        on_bytes: Called with the number of bytes so far.
        most_bytes: Of more than these only the first are hashed: it is another file.
    """
    found = hashlib.sha256()
    size_bytes = 0
    for chunk in chunks:
        found.update(chunk)
        size_bytes += len(chunk)
        on_bytes(size_bytes)
        if most_bytes is not None and size_bytes > most_bytes:
            break
    return found.hexdigest(), size_bytes
