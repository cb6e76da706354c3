"""
`s3://bucket/prefix`: AWS S3, and services that speak as it does.

    registry.json                  says whose prefix this is; by it conditional writes are tried out
    blobs/sha256/<hex>             every file of every release, once for all models
    releases/<model>/<id>.json     release.json, as it was composed
    aliases/<model>/<alias>.json   which release an alias means, and its moves
    used/sha256/<hex>              empty: an old blob was taken into use again then

What is written once is written with `If-None-Match: *`, an alias with the ETag that was read
(`If-Match`). A service that ignores these headers is found out at the first write; with it an alias
is read again before and after it is moved, and two publishers at once may lose a move.

How a large file goes up in parts, and goes on after a kill: `s3_objects`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import console, disk
from pipelines.errors import DigestError, StoreError
from pipelines.release_records import (
    Alias,
    Release,
    alias_bytes,
    canonical,
    parse_alias,
    release_id,
    short,
)
from pipelines.stores import transfer
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
from pipelines.stores.s3_client import (
    AbsentError,
    Answer,
    Bucket,
    ConditionError,
    UnknownRequestError,
    server_time,
)
from pipelines.stores.s3_objects import (
    PART_BYTES,
    Reading,
    Sending,
    md5_of,
    other_bytes,
    part_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from pathlib import Path

    from pipelines.params import Registry

# S3's limit: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MAX_FILE_BYTES: Final = 5 << 40
_MIB: Final = 1 << 20
# What a release and an alias hold at most: an endless body is refused, not read.
_MAX_DOCUMENT_BYTES: Final = 64 << 20
# A blob that is taken into use again is noted when it is older; `fleet gc` spares a day.
_NOTE_AFTER_S: Final = 6 * 3600.0
_ABANDONED_AFTER_S: Final = 24 * 3600.0
_UPLOADS_BEGUN: Final = 3
_MARKER: Final = canonical({"kind": "gguf-fleet registry", "schema_version": 1})
_JSON: Final = {"ContentType": "application/json"}
_UNCACHED: Final = {"CacheControl": "no-cache"}
_NO_ETAG: Final = f'"{"0" * 32}"'
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_SEGMENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, kw_only=True)
class _Object:
    """What the service says of an object: its ETag, and its age by the clock of the service."""

    size_bytes: int
    etag: str
    age_s: float


class S3Store:
    """A registry in a bucket; see the module."""

    def __init__(
        self,
        name: str,
        registry: Registry,
        *,
        part_bytes: int = PART_BYTES,
        deadline_s: float = transfer.DEADLINE_S,
    ) -> None:
        """
        Open a registry; nothing is asked of it yet.

        Args:
            name: Its key in params.yaml.
            registry: Its declaration.
            part_bytes: Size of the parts of a large file, as long as 10,000 are enough.
            deadline_s: How long a request that fails is made again.

        Raises:
            ParamsError: Plain HTTP to another machine, and `insecure` is not declared.
        """
        bucket, _, prefix = registry.url.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        self.name = name
        self._prefix = f"{prefix}/" if prefix else ""
        self._part_bytes = part_bytes
        declared_mib = registry.max_file_mib
        self._max_file_bytes = min(MAX_FILE_BYTES, (declared_mib or MAX_FILE_BYTES) * _MIB)
        self._bucket = Bucket(name, registry, bucket, deadline_s=deadline_s)
        # Whether the service keeps to conditions; None until it was tried.
        self._conditional: bool | None = None

    @property
    def shown(self) -> str:
        """Its address as people may see it; it never holds a login."""
        return self._bucket.shown

    @property
    def guarantees(self) -> Guarantees:
        """What it promises; without conditional writes, less, which the first write finds out."""
        if self._conditional is False:
            sentence = (
                "This service ignores conditional writes: two publishers at once may lose a move, "
                "and nothing but this template keeps what is written from being overwritten."
            )
        else:
            sentence = "Who may write to the bucket may overwrite: turn on its versioning."
        return Guarantees(
            compare_and_set=self._conditional is not False,
            immutable=self._conditional is not False,
            proves=True,
            max_file_bytes=self._max_file_bytes,
            sentence=sentence,
        )

    def prepare(self, model: str) -> None:  # noqa: ARG002 - one prefix for all models
        """
        Find out whether it can be written to and whether it keeps to conditions, by a tiny object.

        Raises:
            StoreError: There is no such bucket, or this login may not write to it.
        """
        self._find_out()

    # blobs

    def blob_size(self, model: str, sha256: str) -> int | None:  # noqa: ARG002 - for all models
        """Return the size in bytes of a stored blob; None if it is not there."""
        found = self._head(self._blob_key(sha256), f"looking for blob {short(sha256)}")
        return found.size_bytes if found else None

    def put_blob(self, model: str, blob: Blob, on_bytes: OnBytes) -> int:  # noqa: ARG002
        """
        Send a file, unless it is there; in parts if it is large.

        Returns:
            Bytes that were sent: 0 if it was there, less than its size if an upload was gone on
            with.

        Raises:
            DigestError: The source is not the bytes that its name says. Nothing has that name.
            StoreError: Something of another size has that name.
        """
        key = self._blob_key(blob.sha256)
        there = self._head(key, f"looking for {blob.name}")
        if there is not None:
            self._require_size(blob, there)
            self._note_use(blob, there)
            on_bytes(blob.size_bytes)
            return 0
        if isinstance(blob.source, bytes):
            return self._put_whole(key, blob, blob.source, on_bytes)
        with disk.explained(blob.source):
            size_bytes = blob.source.stat().st_size
        if size_bytes != blob.size_bytes:
            raise other_bytes(blob, f"{size_bytes:,} bytes are there")
        if blob.size_bytes <= self._part_bytes:
            with disk.explained(blob.source):
                data = blob.source.read_bytes()
            return self._put_whole(key, blob, data, on_bytes)
        return self._put_in_parts(key, blob, blob.source, on_bytes)

    def read_blob(self, model: str, sha256: str, *, offset: int = 0) -> Iterator[bytes]:  # noqa: ARG002
        """
        Yield the stored bytes from an offset on; goes on where a connection breaks.

        Raises:
            NotThereError: There is no such blob.
            StoreError: It was replaced while it was read, or the service does not know ranges.
        """
        key = self._blob_key(sha256)
        reading = Reading(self._bucket, key, f"reading blob {short(sha256)}", offset)
        try:
            while piece := reading.more():
                yield piece
        except AbsentError as error:
            raise NotThereError(
                f"{self.shown} has no blob sha256:{sha256}.",
                hint=f"`fleet verify-registry {self.name}` names everything that is missing.",
            ) from error
        finally:
            reading.close()

    def prove_blob(self, model: str, blob: Blob, on_bytes: OnBytes) -> None:
        """
        Read a blob back, all of it, and hash it.

        Raises:
            DigestError: The store has other bytes under that name.
            NotThereError: It has none.
        """
        found, size_bytes = hash_blob(
            self.read_blob(model, blob.sha256), on_bytes, most_bytes=blob.size_bytes
        )
        if (found, size_bytes) != (blob.sha256, blob.size_bytes):
            raise DigestError(
                f"{self.shown} gives other bytes for {blob.name} than were stored: sha256 "
                f"{blob.sha256} ({blob.size_bytes:,} bytes) was wanted, sha256 {found} "
                f"({size_bytes:,} bytes) came.",
                hint=f"Read it once more. If it stays so, delete {self._blob_key(blob.sha256)} in "
                f"the bucket {self._bucket.bucket} and publish again.",
            )

    def list_blobs(self) -> Iterator[StoredBlob]:
        """Yield every blob, of all models; its age is since it was stored or taken into use."""
        used_s = {name: found.age_s for name, found in self._listed("used/sha256/")}
        for name, found in self._listed("blobs/sha256/"):
            if _SHA256.fullmatch(name):
                age_s = min(found.age_s, used_s.get(name, found.age_s))
                yield StoredBlob(sha256=name, size_bytes=found.size_bytes, age_s=age_s)

    def delete_blob(self, sha256: str) -> None:
        """Remove a blob, if it is there."""
        self._delete(self._blob_key(sha256))
        self._delete(f"{self._prefix}used/sha256/{sha256}")

    def sweep(self, *, older_than_s: float = _ABANDONED_AFTER_S) -> int:
        """
        End uploads of blobs that nobody went on with for a day; their parts cost as files do.

        Returns:
            How many there were.
        """
        count = 0
        for key, upload, age_s in list(self._uploads(f"{self._prefix}blobs/sha256/")):
            if age_s >= older_than_s:
                self._abort(key, upload)
                count += 1
        return count

    # releases

    def put_release(self, release: Release, data: bytes) -> None:
        """
        Store a release under its id; equal bytes that are there stay.

        Raises:
            StoreError: Other bytes are there under that id.
        """
        id_ = release_id(data)
        key = self._release_key(release.model, id_)
        what = f"writing release {short(id_)}"
        condition = self._create_only()
        if not condition and self._head(key, what) is not None:
            self._keep_release(key, data, what)
            return
        try:
            self._put(key, data, what, **_JSON, **condition)
        except ConditionError:
            self._keep_release(key, data, what)

    def read_release(self, model: str, id_: str) -> bytes:
        """
        Return the stored bytes of a release.

        Raises:
            NotThereError: There is no such release.
        """
        try:
            return self._document(self._release_key(model, id_), f"reading release {short(id_)}")[0]
        except AbsentError as error:
            raise NotThereError(
                f"{self.shown} has no release {short(id_)} of {model}.",
                hint=f"`fleet releases {model} --registry {self.name}` lists those it has.",
            ) from error

    def list_releases(self, model: str) -> tuple[str, ...]:
        """Return the ids of the stored releases of a model."""
        names = (name for name, _ in self._listed(f"releases/{_segment(model)}/"))
        ids = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return tuple(id_ for id_ in ids if _SHA256.fullmatch(id_))

    def list_models(self) -> tuple[str, ...]:
        """Return the models of which it holds releases."""
        prefix = f"{self._prefix}releases/"
        found = self._pages("listing models", Prefix=prefix, Delimiter="/")
        names = {
            each["Prefix"].removeprefix(prefix).rstrip("/")
            for answer in found
            for each in answer.get("CommonPrefixes", ())
        }
        return tuple(
            name for name in sorted(names) if _SEGMENT.fullmatch(name) and self.list_releases(name)
        )

    def delete_release(self, model: str, id_: str) -> None:
        """Remove a release, if it is there."""
        self._delete(self._release_key(model, id_))

    def release_age_s(self, model: str, id_: str) -> float | None:
        """Seconds since a release was put last; None if it is not there."""
        found = self._head(self._release_key(model, id_), f"looking for release {short(id_)}")
        return found.age_s if found else None

    # aliases

    def read_alias(self, model: str, alias: str) -> tuple[Alias | None, Token]:
        """Return an alias and the ETag of its object; (None, None) if there is none."""
        key = self._alias_key(model, alias)
        try:
            data, etag = self._document(key, f"reading alias {model}@{alias}")
        except AbsentError:
            return None, None
        found = parse_alias(data, f"{self.shown}, alias {model}@{alias},")
        if (found.model, found.alias) != (model, alias):
            raise StoreError(
                f"{key} of {self.shown} is the alias {console.clean(found.model)}@"
                f"{console.clean(found.alias)}.",
                hint="Somebody copied it there. `fleet audit` compares it with the ledger in git.",
            )
        return found, etag

    def write_alias(self, alias: Alias, release: Release, expected: Token) -> None:  # noqa: ARG002
        """
        Move an alias by one conditional write.

        Raises:
            AliasMovedError: It is no longer what was read.
        """
        self._find_out()
        key = self._alias_key(alias.model, alias.alias)
        data = alias_bytes(alias)
        what = f"moving alias {alias.model}@{alias.alias}"
        if not self._conditional:
            self._move_without_condition(key, alias, data, expected, what)
            return
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        try:
            self._put(key, data, what, **_JSON, **_UNCACHED, **condition)
        except (ConditionError, AbsentError) as error:
            # The answer to an attempt of ours may have been lost after it had moved the alias.
            if not self._has_moved(alias):
                raise self._moved(alias) from error

    # below

    @property
    def _marker_key(self) -> str:
        return f"{self._prefix}registry.json"

    def _find_out(self) -> None:
        """
        Try once whether conditions are kept, on an object that never changes.

        That a service refuses one writer after another proves no order among writers at once; what
        is known of that is in the README's table.
        """
        if self._conditional is not None:
            return
        # The first writer creates it; from then on it is refused to everybody.
        creates = self._is_refused(IfNoneMatch="*") or self._is_refused(IfNoneMatch="*")
        self._conditional = creates and self._is_refused(IfMatch=_NO_ETAG)
        if not self._conditional:
            self._put(self._marker_key, _MARKER, "writing registry.json", **_JSON)
            console.warn(f"{self.shown}: {self.guarantees.sentence}")

    def _is_refused(self, **condition: str) -> bool:
        """Tell whether a write is refused for its condition; not, if it is done or not known."""
        try:
            self._put(self._marker_key, _MARKER, "writing registry.json", **_JSON, **condition)
        except (ConditionError, AbsentError):
            return True
        except UnknownRequestError:
            return False
        return False

    def _create_only(self) -> dict[str, str]:
        """Return the condition of what is written once."""
        self._find_out()
        return {"IfNoneMatch": "*"} if self._conditional else {}

    def _head(self, key: str, what: str) -> _Object | None:
        try:
            answer = self._bucket.ask("head_object", what, Key=key)
        except AbsentError:
            return None
        return _object(answer["ContentLength"], answer, server_time(answer))

    def _put(self, key: str, data: bytes, what: str, **more: Answer) -> None:
        self._bucket.ask("put_object", what, Key=key, Body=data, ContentMD5=md5_of(data), **more)

    def _delete(self, key: str) -> None:
        with contextlib.suppress(AbsentError):
            self._bucket.ask("delete_object", f"deleting {key}", Key=key)

    def _pages(self, what: str, **request: Answer) -> Iterator[Answer]:
        marks = {"NextContinuationToken": "ContinuationToken"}
        return self._bucket.pages("list_objects_v2", what, marks, **request)

    def _listed(self, below: str) -> Iterator[tuple[str, _Object]]:
        """Yield the names right below a prefix, and what the list says of each."""
        prefix = self._prefix + below
        for answer in self._pages(f"listing {below}", Prefix=prefix, Delimiter="/"):
            now = server_time(answer)
            for each in answer.get("Contents", ()):
                yield each["Key"].removeprefix(prefix), _object(each["Size"], each, now)

    def _document(self, key: str, what: str) -> tuple[bytes, str]:
        """Return a small object and its ETag, from one answer."""
        reading = Reading(self._bucket, key, what)
        data = bytearray()
        while piece := reading.more():
            data += piece
            if len(data) > _MAX_DOCUMENT_BYTES:
                reading.close()
                raise StoreError(f"{self.shown}: {key} is larger than any release can be.")
        return bytes(data), reading.etag

    def _require_size(self, blob: Blob, there: _Object) -> None:
        if there.size_bytes != blob.size_bytes:
            raise StoreError(
                f"{self.shown} holds {there.size_bytes:,} bytes as sha256:{blob.sha256}, and "
                f"{blob.name} has {blob.size_bytes:,}. Nothing was overwritten.",
                hint=f"Something else wrote there. Delete {self._blob_key(blob.sha256)} in the "
                f"bucket {self._bucket.bucket} and publish again.",
            )

    def _note_use(self, blob: Blob, there: _Object) -> None:
        """Make an old blob young again for a collection that runs now."""
        if there.age_s > _NOTE_AFTER_S:
            key = f"{self._prefix}used/sha256/{blob.sha256}"
            self._put(key, b"", f"noting the use of {blob.name}")

    def _keep_release(self, key: str, data: bytes, what: str) -> None:
        """See that the release that is there is the same, and make an old one young again."""
        found, etag = self._document(key, what)
        if found != data:
            raise StoreError(
                f"{self.shown}: {key} holds other bytes than its name says; nothing was "
                "overwritten.",
                hint=f"`fleet verify-registry {self.name}` names everything else that is wrong; "
                "delete that object and publish again.",
            )
        there = self._head(key, what)
        if there is not None and there.age_s > _NOTE_AFTER_S:
            condition = {"IfMatch": etag} if self._conditional else {}
            with contextlib.suppress(ConditionError, AbsentError):
                self._put(key, data, what, **_JSON, **condition)

    # sending

    def _put_whole(self, key: str, blob: Blob, data: bytes, on_bytes: OnBytes) -> int:
        found = hashlib.sha256(data).hexdigest()
        if (found, len(data)) != (blob.sha256, blob.size_bytes):
            raise other_bytes(blob, f"sha256 {found} ({len(data):,} bytes) is there")
        what = f"writing {blob.name}"
        try:
            self._put(key, data, what, ContentType=blob.media_type, **self._create_only())
        except ConditionError:
            # Somebody was faster, or the answer to our first attempt was lost.
            self._require_stored(key, blob)
        on_bytes(len(data))
        return len(data)

    def _put_in_parts(self, key: str, blob: Blob, source: Path, on_bytes: OnBytes) -> int:
        sent_bytes = 0
        for left in range(_UPLOADS_BEGUN - 1, -1, -1):
            sending = Sending(
                self._bucket, key, blob, part_bytes(blob.size_bytes, self._part_bytes)
            )
            try:
                sending.send(source, on_bytes)
                sending.complete(self._create_only())
            except ConditionError:
                self._abort(key, sending.upload)
            except AbsentError:
                # Another publisher of the same file completed or ended the upload, or the answer
                # to our completion was lost.
                if left and self._head(key, f"looking for {blob.name}") is None:
                    continue
            except DigestError:
                self._abort(key, sending.upload)
                raise
            finally:
                sent_bytes += sending.sent_bytes
            break
        self._require_stored(key, blob)
        on_bytes(blob.size_bytes)
        return sent_bytes

    def _require_stored(self, key: str, blob: Blob) -> None:
        """See that a blob is there, whoever wrote it."""
        there = self._head(key, f"looking for {blob.name}")
        if there is None:
            raise StoreError(
                f"{self.shown}: {blob.name} was written and is not there.",
                hint="Look at the log of the service, and at rules of the bucket that delete; then "
                "publish again.",
            )
        self._require_size(blob, there)

    def _uploads(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        """Yield key, id and age in seconds of every upload that was begun below a prefix."""
        marks = {"NextKeyMarker": "KeyMarker", "NextUploadIdMarker": "UploadIdMarker"}
        what = "listing uploads"
        for answer in self._bucket.pages("list_multipart_uploads", what, marks, Prefix=prefix):
            now = server_time(answer)
            for each in answer.get("Uploads", ()):
                age_s = max(0.0, (now - each["Initiated"]).total_seconds())
                yield each["Key"], each["UploadId"], age_s

    def _abort(self, key: str, upload: str) -> None:
        """End an upload; one that stays is swept a day later."""
        with contextlib.suppress(AbsentError):
            self._bucket.ask("abort_multipart_upload", "ending an upload", Key=key, UploadId=upload)

    # aliases

    def _has_moved(self, alias: Alias) -> bool:
        """Tell whether the alias has our very move, whatever came after it."""
        found, _etag = self.read_alias(alias.model, alias.alias)
        return found is not None and alias.moves[-1] in found.moves

    def _moved(self, alias: Alias) -> AliasMovedError:
        return AliasMovedError(
            f"{alias.model}@{alias.alias} of {self.shown} was moved by somebody else.",
            hint="Publish again: it goes on from there.",
        )

    def _move_without_condition(
        self, key: str, alias: Alias, data: bytes, expected: Token, what: str
    ) -> None:
        """Move an alias where the service keeps to no condition: look, write, look again."""
        if self.read_alias(alias.model, alias.alias)[1] != expected:
            raise self._moved(alias)
        self._put(key, data, what, **_JSON, **_UNCACHED)
        if not self._has_moved(alias):
            raise self._moved(alias)

    # names

    def _blob_key(self, sha256: str) -> str:
        if not _SHA256.fullmatch(sha256):
            raise StoreError(f"{console.clean(sha256)[:100]!r} is no sha256.")
        return f"{self._prefix}blobs/sha256/{sha256}"

    def _release_key(self, model: str, id_: str) -> str:
        if not _SHA256.fullmatch(id_):
            raise StoreError(f"{console.clean(id_)[:100]!r} is no release id.")
        return f"{self._prefix}releases/{_segment(model)}/{id_}.json"

    def _alias_key(self, model: str, alias: str) -> str:
        return f"{self._prefix}aliases/{_segment(model)}/{_segment(alias)}.json"


def _object(size_bytes: int, answer: Answer, now: datetime) -> _Object:
    age_s = max(0.0, (now - answer["LastModified"]).total_seconds())
    return _Object(size_bytes=size_bytes, etag=str(answer["ETag"]), age_s=age_s)


def _segment(name: str) -> str:
    """Refuse what would be a path of its own."""
    if not _SEGMENT.fullmatch(name):
        raise StoreError(f"{console.clean(name)[:100]!r} cannot be the name of a model or alias.")
    return name
