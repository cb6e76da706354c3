"""
How one object of a bucket goes up and comes down: in parts, and over breaks of the connection.

A large file goes in parts, a few at a time, so memory is bounded. It is read once and whole, hashed
as it is sent, and gets its name only if the hash is the right one. What a killed upload has left is
gone on with: parts that are there, by size and MD5, are not sent again; the file is hashed all the
same.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import threading
from collections import deque
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Final

from pipelines import console, disk
from pipelines.errors import DigestError, StoreError
from pipelines.stores import transfer
from pipelines.stores.s3_client import (
    AbsentError,
    Answer,
    Bucket,
    ConditionError,
    RangeError,
    UnknownRequestError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from pipelines.stores.base import Blob, OnBytes

# Large enough that a request costs little beside it, small enough to send again.
PART_BYTES: Final = 16 << 20
# S3's limits: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MOST_PARTS: Final = 10_000
_MIB: Final = 1 << 20
_IN_FLIGHT: Final = 3
_IN_FLIGHT_BYTES: Final = 64 << 20
_READ_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A part that is there: its ETag, in the quotes in which it came, and its size."""

    etag: str
    size_bytes: int


class Reading:
    """The body of one object, piece by piece; after a break, the rest of the very same object."""

    def __init__(self, bucket: Bucket, key: str, what: str, offset: int = 0) -> None:
        """Read `key` from an offset on; nothing is asked yet."""
        self._bucket = bucket
        self._key = key
        self._what = what
        self._place = offset
        self._body: Answer = None
        # Known once a piece of it was handed over.
        self.etag = ""

    def more(self) -> bytes:
        """
        Return the next piece, at most a mebibyte; empty at the end.

        Raises:
            AbsentError: There is no such object.
            StoreError: It was replaced meanwhile.
        """
        what = f"{self._bucket.shown}: {self._what}"
        piece: bytes = transfer.retrying(what, self._attempt, deadline_s=self._bucket.deadline_s)
        self._place += len(piece)
        if not piece:
            self.close()
        return piece

    def close(self) -> None:
        """Give the connection back."""
        body, self._body = self._body, None
        if body is not None:
            body.close()

    def _attempt(self) -> bytes:
        try:
            if self._body is None:
                self._open()
            piece: bytes = self._body.read(_READ_BYTES)
        except RangeError:
            return b""  # nothing is there from that offset on
        except BaseException:
            self.close()
            raise
        return piece

    def _open(self) -> None:
        request: dict[str, Answer] = {"Key": self._key}
        if self._place:
            request["Range"] = f"bytes={self._place}-"
        if self._place and self.etag:
            request["IfMatch"] = self.etag
        try:
            answer = self._bucket.ask("get_object", self._what, **request)
        except ConditionError as error:
            raise StoreError(
                f"{self._bucket.shown}: {self._what}: it was replaced meanwhile.",
                hint="Read it again.",
            ) from error
        self._body = answer["Body"]
        self.etag = str(answer["ETag"])
        covers = str(answer.get("ContentRange", ""))
        if self._place and not covers.startswith(f"bytes {self._place}-"):
            raise StoreError(
                f"{self._bucket.shown}: {self._what}: bytes from {self._place} on were asked for, "
                f"and {console.clean(covers)[:100] or 'the whole file'} came.",
                hint="Something in between drops the range from the request.",
            )


class Sending:
    """One upload of one file in parts."""

    def __init__(self, bucket: Bucket, key: str, blob: Blob, part_bytes_: int) -> None:
        """Go on with an upload of that file, or begin one."""
        self._bucket = bucket
        self._key = key
        self._blob = blob
        self._part_bytes = part_bytes_
        self._etags: dict[int, str] = {}
        self.upload, self._there = self._begun() or (self._begin(), {})
        self.sent_bytes = 0

    def send(self, source: Path, on_bytes: OnBytes) -> None:
        """
        Read the file once, from its beginning to its end, and send each part that is not there.

        Raises:
            DigestError: It is not the file that was meant. Every part may have been sent.
            AbsentError: The upload is gone.
        """
        found = hashlib.sha256()
        read_bytes = done_bytes = 0
        most = max(1, min(_IN_FLIGHT, _IN_FLIGHT_BYTES // self._part_bytes))
        flying: deque[_Flight] = deque()
        with disk.explained(source):
            opened = source.open("rb", buffering=0)
        with opened as file:
            for number in range(1, MOST_PARTS + 1):
                with disk.explained(source):
                    data = _read_exactly(file, self._part_bytes)
                if not data:
                    break
                found.update(data)
                read_bytes += len(data)
                if self._is_there(number, data):
                    done_bytes += len(data)
                else:
                    self.sent_bytes += len(data)
                    flying.append(
                        _Flight(functools.partial(self._send, number, data), number, data)
                    )
                    if len(flying) >= most:
                        done_bytes += self._landed(flying.popleft())
                on_bytes(done_bytes)
        while flying:
            done_bytes += self._landed(flying.popleft())
            on_bytes(done_bytes)
        if (found.hexdigest(), read_bytes) != (self._blob.sha256, self._blob.size_bytes):
            raise other_bytes(
                self._blob, f"sha256 {found.hexdigest()} ({read_bytes:,} bytes) is there"
            )

    def complete(self, condition: dict[str, str]) -> None:
        """
        Give the file its name, made of exactly these parts, unless something has it.

        Args:
            condition: Of a write that only creates; empty where the service knows none.

        Raises:
            ConditionError: Something has it.
            AbsentError: The upload is gone: completed before, or ended.
        """
        parts = [{"PartNumber": n, "ETag": etag} for n, etag in sorted(self._etags.items())]
        self._bucket.ask(
            "complete_multipart_upload",
            f"completing {self._blob.name}",
            patient=True,
            Key=self._key,
            UploadId=self.upload,
            MultipartUpload={"Parts": parts},
            **condition,
        )

    def _begin(self) -> str:
        answer = self._bucket.ask(
            "create_multipart_upload",
            f"beginning {self._blob.name}",
            Key=self._key,
            ContentType=self._blob.media_type,
        )
        return str(answer["UploadId"])

    def _begun(self) -> tuple[str, dict[int, _Part]] | None:
        """Find the newest upload that somebody began for this very file, and its parts."""
        marks = {"NextKeyMarker": "KeyMarker", "NextUploadIdMarker": "UploadIdMarker"}
        what = f"looking for an upload of {self._blob.name} to go on with"
        found: list[tuple[datetime, str]] = []
        try:
            for answer in self._bucket.pages(
                "list_multipart_uploads", what, marks, Prefix=self._key
            ):
                found += [
                    (each["Initiated"], each["UploadId"])
                    for each in answer.get("Uploads", ())
                    if each["Key"] == self._key
                ]
            if not found:
                return None
            upload = max(found)[1]
            return upload, self._parts(upload, what)
        except UnknownRequestError:
            return None  # some services cannot list them: every upload begins anew
        except AbsentError:
            return None  # completed or ended right now

    def _parts(self, upload: str, what: str) -> dict[int, _Part]:
        marks = {"NextPartNumberMarker": "PartNumberMarker"}
        return {
            each["PartNumber"]: _Part(etag=each["ETag"], size_bytes=each["Size"])
            for answer in self._bucket.pages(
                "list_parts", what, marks, Key=self._key, UploadId=upload
            )
            for each in answer.get("Parts", ())
        }

    def _is_there(self, number: int, data: bytes) -> bool:
        """
        Tell whether a part of an earlier attempt has these bytes, by size and MD5.

        With keys of KMS an ETag is no MD5: then every part is sent again.
        """
        part = self._there.get(number)
        if part is None or part.size_bytes != len(data):
            return False
        if part.etag.strip('"').lower() != hashlib.md5(data, usedforsecurity=False).hexdigest():
            return False
        self._etags[number] = part.etag
        return True

    def _send(self, number: int, data: bytes) -> str:
        answer = self._bucket.ask(
            "upload_part",
            f"writing part {number} of {self._blob.name}",
            Key=self._key,
            UploadId=self.upload,
            PartNumber=number,
            Body=data,
            ContentMD5=md5_of(data),
        )
        return str(answer["ETag"])

    def _landed(self, flight: _Flight) -> int:
        self._etags[flight.number] = flight.etag()
        return flight.size_bytes


class _Flight:
    """A part that is being sent, in a thread that keeps nobody from ending the program."""

    def __init__(self, send: Callable[[], str], number: int, data: bytes) -> None:
        self.number = number
        self.size_bytes = len(data)
        self._send = send
        self._etag = ""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"s3-part-{number}", daemon=True)
        self._thread.start()

    def etag(self) -> str:
        """Wait until it is there; raises what sending it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._etag

    def _run(self) -> None:
        try:
            self._etag = self._send()
        except BaseException as error:  # noqa: BLE001 - raised again by `etag`
            self._error = error


def part_bytes(size_bytes: int, least_bytes: int = PART_BYTES) -> int:
    """Return the size of the parts of a file: whole MiB, and no more than 10,000 parts."""
    needed_bytes = -(-size_bytes // MOST_PARTS)
    return max(least_bytes, -(-needed_bytes // _MIB) * _MIB)


def _read_exactly(file: IO[bytes], size_bytes: int) -> bytes:
    """Read so many bytes, or what is left; a part that is shorter would end the file."""
    pieces = []
    while size_bytes and (piece := file.read(size_bytes)):
        pieces.append(piece)
        size_bytes -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def md5_of(data: bytes) -> str:
    """Return the MD5 as Content-MD5 wants it: against garbling on the way, not against anybody."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def other_bytes(blob: Blob, detail: str) -> DigestError:
    """Return the error of a source that is not what its name says; `detail` is what is there."""
    return DigestError(
        f"{blob.name} is not the file of the release: sha256 {blob.sha256} "
        f"({blob.size_bytes:,} bytes) was wanted, {detail}. Nothing of it has a name in the store.",
        hint="Run `fleet repro`: it makes a file again that is not what its record says.",
    )
