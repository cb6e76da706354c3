"""
How a file goes up to a registry of OCI: in parts, resumed after a cut or a kill, hashed on the way.

Large files go up in parts of 64 MiB. distribution (docker-registry) signs the place at which an
upload stands into its address, and takes up no upload again of which it got half a part; behind
the nginx of deploy/registry a part arrives whole or not at all. The address is kept in the user's
cache, so that a publisher that was killed goes on after the last part. A registry that refuses
parts gets the file in one piece, and one that refuses PATCH in one request.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import filelock
import requests

from pipelines import atomic, console, toolchain
from pipelines.errors import DigestError, StoreError
from pipelines.release_records import short
from pipelines.stores import transfer
from pipelines.stores.oci_answers import (
    address_of,
    detail_of,
    is_page,
    require_digest,
)
from pipelines.stores.oci_http import ANSWER_WITHIN_S, SUCCESSES
from pipelines.stores.oci_login import origin_of
from pipelines.stores.oci_source import Body, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from pipelines.stores.base import Blob, OnBytes
    from pipelines.stores.oci_http import Http

PART_BYTES: Final = 64 << 20
# Up to this a file goes with the request that names it.
_SMALL_BYTES: Final = 1 << 16
# distribution hashes an upload that it resumed once more, from its disk, before it says 201.
_FINISH_WITHIN_S: Final = 900.0
# An upload that was resumed and came out wrong is begun anew, so often at most.
_MOST_BEGINNINGS: Final = 20

_CREATED: Final = 201
_ACCEPTED: Final = 202
_NO_CONTENT: Final = 204
# An upload is not known any more, or not at the place that was meant.
_LOST: Final = frozenset({400, 404, 409, 410, 416})
_NO_PARTS: Final = frozenset({400, 404, 405, 411, 413, 416, 501})
_NO_PATCH: Final = frozenset({400, 404, 405, 411, 501})
_OCTETS: Final = "application/octet-stream"


class UploadLostError(Exception):
    """The registry does not know an upload any more, or got other bytes: it begins anew."""


def require_writable(http: Http, repository: str) -> None:
    """
    Begin an upload and give it up: whether the login may write shows before any byte is sent.

    Raises:
        StoreError: It may not, or only reading is possible at this address.
    """
    what = f"{http.shown}: asking to write to {repository}"

    def ask() -> None:
        place = _Place(http, repository, what)
        place.begin()
        place.give_up()

    http.retried(what, ask)


def send(  # noqa: PLR0913 - each is one independent fact
    http: Http,
    repository: str,
    blob: Blob,
    on_bytes: OnBytes,
    *,
    part_bytes: int,
    stored_bytes: Callable[[], int | None],
) -> int:
    """
    Send a blob: in parts, resumed after a cut or a kill, hashed while it is read, once.

    Args:
        http: The registry.
        repository: Where in it.
        blob: What is sent.
        on_bytes: Called with the bytes that are sent.
        part_bytes: Size of the parts of a large file.
        stored_bytes: Asks for the size in bytes of that blob in the repository; None if it is not
            there.

    Returns:
        Bytes that were sent, those of repeated parts included.

    Raises:
        DigestError: The source is not the bytes that its name says. The upload is given up.
        StoreError: The registry refuses it.
        RetryLaterError: It could not be sent within the deadline; the next call goes on there.
    """
    what = f"{http.shown}: sending {blob.name} (sha256:{short(blob.sha256)}) to {repository}"
    key = f"{http.shown} {repository} {blob.sha256}"
    with remembered(key) as memory, Source(blob) as source:
        place = _Place(http, repository, what, url=memory.read(http.origin()))
        sending = _Sending(place, source, memory, on_bytes, part_bytes, stored_bytes)
        while not http.retried(what, sending.attempt):
            pass
        memory.forget()
    return sending.sent_bytes


class _Place:
    """Where an upload stands at the registry: its next address, and how much is there."""

    def __init__(self, http: Http, repository: str, what: str, url: str | None = None) -> None:
        """Know an upload by its address; None before it has begun."""
        self._http = http
        self._repository = repository
        self.what = what
        self.url = url
        self.offset = 0

    @contextmanager
    def asked(
        self,
        method: str,
        *,
        url: str | None = None,
        headers: dict[str, str] | None = None,
        data: bytes | Body | None = None,
        within_s: float = ANSWER_WITHIN_S,
    ) -> Iterator[requests.Response]:
        """Make a request at the upload's address, or at another one of it."""
        address = url or self.url
        assert address is not None, "the upload has begun"
        with self._http.asked(
            method, address, self._repository, headers or {}, data=data, within_s=within_s
        ) as answer:
            yield answer

    def require(self, answer: requests.Response, statuses: Collection[int] = SUCCESSES) -> None:
        """Raise what an answer means, unless its status is one of those."""
        self._http.require(answer, statuses, self.what)

    def take_up(self, size_bytes: int) -> None:
        """Ask where the upload stands, or begin one."""
        if self.url is not None:
            with self.asked("GET") as answer:
                if answer.status_code in SUCCESSES and not is_page(answer):
                    self.note(answer, default=0)
                    if self.offset <= size_bytes:
                        return
                elif answer.status_code not in _LOST:
                    self.require(answer)
            self.url = None
        self.begin()

    def begin(self) -> None:
        """
        Begin it.

        Raises:
            StoreError: Nobody may write there.
        """
        with self.asked("POST", url=f"/v2/{self._repository}/blobs/uploads/", data=b"") as answer:
            # A registry says no in JSON; a page is nginx's own, which lets nobody write there.
            if answer.status_code in {403, 405} and is_page(answer):
                raise StoreError(
                    f"{self.what}: only reading is possible there ({answer.status_code}).",
                    hint=f"registries.{self._http.name}.url in params.yaml is to name the port for "
                    "publishers (5010 in deploy/registry), not the one that everybody reads from.",
                )
            self.require(answer, {_ACCEPTED})
            self.note(answer, default=0)

    def note(self, answer: requests.Response, *, default: int) -> None:
        """Take over what an answer says; `default` is the offset if it says none."""
        location = answer.headers.get("Location")
        if location:
            self.url = address_of(answer.url, location, self.what)
        if self.url is None:
            raise StoreError(f"{self._http.shown} does not say where an upload goes.")
        self._http.require_secure(self.url)
        told = re.fullmatch(r"(?:bytes=)?0-([0-9]{1,18})", answer.headers.get("Range", ""))
        # `0-0` is how distribution says that there is nothing yet.
        self.offset = default if told is None else int(told[1]) + 1 if int(told[1]) else 0

    def give_up(self) -> None:
        """Remove what was sent; a registry that cannot sweeps it later."""
        if self.url is not None:
            with (
                contextlib.suppress(requests.RequestException, StoreError),
                self.asked("DELETE"),
            ):
                self.url = None


class _Sending:
    """One blob on its way, over all attempts."""

    def __init__(  # noqa: PLR0913, PLR0917 - what an attempt works on
        self,
        place: _Place,
        source: Source,
        memory: Memory,
        on_bytes: OnBytes,
        part_bytes: int,
        stored_bytes: Callable[[], int | None],
    ) -> None:
        """Send nothing yet."""
        # Of this process, all attempts together.
        self.sent_bytes = 0
        self._place = place
        self._source = source
        self._memory = memory
        self._on_bytes = on_bytes
        self._part_bytes = part_bytes
        self._stored_bytes = stored_bytes
        # The highest offset that was seen; more of it means that waiting is worth it.
        self._best = 0
        # How it is sent: the registry may refuse parts, and then PATCH as well.
        self._in_parts = True
        self._in_one_request = source.size_bytes <= _SMALL_BYTES
        self._beginnings = 0
        # Whether the registry was asked to give it its name.
        self._is_named = False

    def attempt(self) -> bool:
        """
        Go on until it is whole.

        Returns:
            Whether it is. If not, some of it was sent since the last time: the next attempt has its
            own deadline.
        """
        best_before = self._best
        try:
            self._go_on()
        except DigestError:
            self._memory.forget()
            self._place.give_up()
            raise
        except UploadLostError as error:
            self._begin_anew(error)
            return False
        except Exception as error:
            found = transfer.failure_of(error)
            self._best = max(self._best, self._place.offset)
            if found is None or not found.passing or self._best <= best_before:
                raise
            return False
        return True

    def _go_on(self) -> None:
        if self._is_named and self._stored_bytes() is not None:
            return  # the answer got lost
        size_bytes = self._source.size_bytes
        self._place.take_up(size_bytes)
        while self._place.offset < size_bytes and not self._in_one_request:
            self._memory.write(self._place.url)
            self._send_part()
        self._source.require_right()
        if not self._in_one_request:
            self._memory.write(self._place.url)
        self._is_named = True
        self._finish()

    def _begin_anew(self, error: UploadLostError) -> None:
        self._memory.forget()
        self._place.url = None
        self._beginnings += 1
        if self._beginnings >= _MOST_BEGINNINGS:
            raise StoreError(
                f"{self._place.what}: the registry lost the upload {self._beginnings} times: "
                f"{console.clean(str(error))[:200]}.",
                hint="Look at its log and its disk.",
            ) from error

    def _send_part(self) -> None:
        """Send the next part."""
        start = self._place.offset
        left_bytes = self._source.size_bytes - start
        length_bytes = min(left_bytes, self._part_bytes) if self._in_parts else left_bytes
        body = Body(self._source, start, length_bytes, self._on_bytes)
        headers = {"Content-Type": _OCTETS}
        # Clients of old send the whole file without it: what everybody understands.
        if (start, length_bytes) != (0, self._source.size_bytes):
            headers["Content-Range"] = f"{start}-{start + length_bytes - 1}"
        try:
            with self._place.asked("PATCH", headers=headers, data=body) as answer:
                if answer.status_code not in SUCCESSES:
                    whole = (start, length_bytes) == (0, self._source.size_bytes)
                    raise self._refused_part(answer, whole=whole)
                self._place.note(answer, default=start + length_bytes)
        finally:
            self.sent_bytes += body.sent_bytes
        if self._place.offset != start + length_bytes:
            raise ConnectionError(f"{self._place.offset} bytes arrived of {start + length_bytes}")
        self._best = max(self._best, self._place.offset)

    def _refused_part(self, answer: requests.Response, *, whole: bool) -> UploadLostError:
        """Sort a refusal of a part: another way of sending it, another beginning, or the end."""
        if answer.status_code not in _NO_PARTS:
            self._place.require(answer)
        if self._in_parts and not whole:
            self._in_parts = False
        elif not self._in_one_request and answer.status_code in _NO_PATCH:
            self._in_one_request = True
        else:
            self._place.require(answer)
        return UploadLostError(detail_of(answer))

    def _finish(self) -> None:
        """Give the upload its name; the registry hashes it."""
        assert self._place.url is not None, "the upload has begun"
        blob = self._source.blob
        mark = "&" if urlsplit(self._place.url).query else "?"
        url = f"{self._place.url}{mark}digest=sha256:{blob.sha256}"
        body: bytes | Body = b""
        if self._in_one_request:
            body = Body(self._source, 0, self._source.size_bytes, self._on_bytes)
        try:
            with self._place.asked(
                "PUT",
                url=url,
                headers={"Content-Type": _OCTETS},
                data=body,
                within_s=_FINISH_WITHIN_S,
            ) as answer:
                if answer.status_code in _LOST:
                    if self._stored_bytes() == self._source.size_bytes:
                        return  # an answer got lost: it was there already
                    if self._in_one_request:
                        self._place.require(answer)
                    raise UploadLostError(detail_of(answer))
                self._place.require(answer, {_CREATED, _ACCEPTED, _NO_CONTENT})
                require_digest(answer, blob.sha256, self._place.what)
        finally:
            if isinstance(body, Body):
                self.sent_bytes += body.sent_bytes


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
