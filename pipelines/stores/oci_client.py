"""
The distribution API of OCI, as much of it as releases need, on requests; no answer is believed.

Every manifest that arrives is hashed and held against the digest that was asked for and the one
that the registry names; a blob is cut off at its size; a web page, a login page of a proxy for
instance, is never taken for an answer. Where bytes are retried, only those that are missing are
sent again.

Large files go up in parts of 64 MiB. distribution (docker-registry) signs the place at which an
upload stands into its address, and takes up no upload again of which it got half a part; behind
the nginx of deploy/registry a part arrives whole or not at all. The address is kept in the user's
cache, so that a publisher that was killed goes on after the last part. A registry that refuses
parts gets the file in one piece.

Logins: GGUF_FLEET_<NAME>_USERNAME and _PASSWORD, else what `docker login` wrote into config.json
(credential helpers are not run). They go to the registry by Basic, or to the token service that it
names, if that is on the registry's own host or declared; never to any other, never over plain HTTP
to another machine unless `insecure: true` says so, and never along with a redirect.

Source: opencontainers/distribution-spec 1.1; distribution 2.8, docs/spec/auth/token.md.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import ssl
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urljoin, urlsplit

import requests

from pipelines import __version__, console, hashing
from pipelines.errors import DigestError, StoreError
from pipelines.release_records import short
from pipelines.stores import transfer
from pipelines.stores.base import NotThereError
from pipelines.stores.oci_login import (
    authorities,
    basic,
    credentials,
    is_loopback,
    no_auth,
    origin_of,
    variables,
)
from pipelines.stores.oci_upload import Body, Memory, Source, Upload, UploadLostError, remembered

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterator

    from pipelines.params import Registry
    from pipelines.stores.base import Blob, OnBytes

T = TypeVar("T")

DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_ACCEPT: Final = f"{OCI_MANIFEST}, {DOCKER_MANIFEST}"
_OCTETS: Final = "application/octet-stream"

PART_BYTES: Final = 64 << 20
# Up to this a file goes with the request that names it.
_SMALL_BYTES: Final = 1 << 16
# What distribution itself refuses beyond (4 MiB), with room for a registry that does not.
_MAX_MANIFEST_BYTES: Final = 16 << 20
_MAX_ANSWER_BYTES: Final = 16 << 20
_MAX_TOKEN_BYTES: Final = 1 << 16
_MAX_PAGES: Final = 10_000
_MAX_REDIRECTS: Final = 5
_CONNECT_WITHIN_S: Final = 10.0
_ANSWER_WITHIN_S: Final = 60.0
# distribution hashes an upload that it resumed once more, from its disk, before it says 201.
_FINISH_WITHIN_S: Final = 900.0
# An upload that was resumed and came out wrong is begun anew, once.
_MOST_BEGINNINGS: Final = 20

_OK: Final = 200
_CREATED: Final = 201
_ACCEPTED: Final = 202
_PARTIAL: Final = 206
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_UNAUTHORIZED: Final = 401
_NOT_FOUND: Final = 404
_BEYOND: Final = 416
_SUCCESSES: Final = frozenset({200, 201, 202, 204})
# An upload is not known any more, or not at the place that was meant.
_LOST: Final = frozenset({400, 404, 409, 410, 416})
_NO_PARTS: Final = frozenset({400, 404, 405, 411, 413, 416, 501})

_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_REPOSITORY: Final = re.compile(r"[a-z0-9]+(?:[._/-]+[a-z0-9]+)*")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_NEXT_PAGE: Final = re.compile(r"<([^<>]+)>\s*;\s*rel=\"?next\"?")
_CHALLENGE: Final = re.compile(r"([a-z_]+)=\"([^\"]*)\"", re.IGNORECASE)


class _AnswerError(Exception):
    """An answer that is not what was asked for; `transfer` reads its status and headers."""

    def __init__(self, response: requests.Response, detail: str) -> None:
        super().__init__(detail)
        self.response = response


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest as the registry gave it, hashed: bytes, media type, sha256 in hex."""

    data: bytes
    media_type: str
    sha256: str

    def value(self, where: str) -> dict[str, Any]:
        """Return it as JSON; `where` is for the error."""
        return _object(self.data, where)


class OciClient:
    """One registry at one host; see the module."""

    def __init__(
        self,
        name: str,
        registry: Registry,
        *,
        deadline_s: float = transfer.DEADLINE_S,
        part_bytes: int = PART_BYTES,
    ) -> None:
        """
        Know the registry `name`; nothing is asked of it yet.

        Args:
            name: Its key in params.yaml, from which the names of its credentials come.
            registry: Its declaration, `oci://host[:port]/namespace`.
            deadline_s: Seconds for which a request that fails is repeated.
            part_bytes: Size of the parts of a large file.
        """
        self.host, _, self.namespace = registry.url.removeprefix("oci://").partition("/")
        self.shown = registry.url
        self._name = name
        self._is_local = is_loopback(urlsplit(f"//{self.host}").hostname or "")
        self._insecure = registry.insecure
        self._token_host = urlsplit(registry.endpoint).hostname if registry.endpoint else None
        self._deadline_s = deadline_s
        self._part_bytes = part_bytes
        self._session = requests.Session()
        # Neither .netrc nor what the environment says of proxies for a server on this machine.
        self._session.trust_env = False
        self._session.headers["User-Agent"] = f"gguf-fleet/{__version__}"
        # As it is: a blob that was unpacked on the way has another digest.
        self._session.headers["Accept-Encoding"] = "identity"
        self._origin: str | None = None
        self._basic: str | None = None
        self._tokens: dict[str, str] = {}
        self._scopes: dict[str, list[str]] = {}

    # --- manifests

    def manifest(self, repository: str, reference: str) -> Manifest | None:
        """
        Return a manifest by tag or `sha256:` digest; None if there is none.

        Raises:
            StoreError: It is not what its digest says, larger than any manifest, or no JSON.
        """
        what = f"{self.shown}: reading {repository}:{reference[:19]}"

        def ask() -> Manifest | None:
            path = f"/v2/{repository}/manifests/{reference}"
            with self._asked("GET", path, repository, {"Accept": _ACCEPT}, stream=True) as answer:
                if answer.status_code == _NOT_FOUND and not _is_page(answer):
                    return None
                self._require(answer, {_OK}, what)
                data = _body(answer, _MAX_MANIFEST_BYTES, what)
                found = hashlib.sha256(data).hexdigest()
                told = answer.headers.get("Docker-Content-Digest", f"sha256:{found}")
                media_type = answer.headers.get("Content-Type", "").partition(";")[0].strip()
            _object(data, what)
            for named in {told, reference} if reference.startswith("sha256:") else {told}:
                if named != f"sha256:{found}":
                    raise StoreError(
                        f"{what}: the registry calls it {console.clean(named)[:80]}, and its bytes "
                        f"have sha256:{found}.",
                        hint="Something between it and here changed them, or its disk did. "
                        f"`fleet verify-registry {self._name}` reads everything again.",
                    )
            return Manifest(data=data, media_type=media_type, sha256=found)

        return self._retried(what, ask)

    def manifest_sha256(self, repository: str, reference: str) -> str | None:
        """Return what a tag means now, as the registry says; None if it means nothing."""
        what = f"{self.shown}: looking for {repository}:{reference[:19]}"

        def ask() -> str | None:
            path = f"/v2/{repository}/manifests/{reference}"
            with self._asked("HEAD", path, repository, {"Accept": _ACCEPT}) as answer:
                if answer.status_code == _NOT_FOUND:
                    return None
                self._require(answer, {_OK}, what)
                return answer.headers.get("Docker-Content-Digest", "")

        told = self._retried(what, ask)
        if told is None:
            return None
        if _DIGEST.fullmatch(told):
            return told.removeprefix("sha256:")
        found = self.manifest(repository, reference)  # a registry need not name it for HEAD
        return found.sha256 if found else None

    def put_manifest(self, repository: str, reference: str, data: bytes, media_type: str) -> None:
        """
        Store a manifest, byte for byte, under a tag or its digest; what the tag meant is replaced.

        Raises:
            StoreError: The registry refuses it, or names another digest than its own.
        """
        what = f"{self.shown}: writing {repository}:{reference[:19]}"
        found = f"sha256:{hashlib.sha256(data).hexdigest()}"

        def ask() -> None:
            path = f"/v2/{repository}/manifests/{reference}"
            with self._asked(
                "PUT", path, repository, {"Content-Type": media_type}, data=data
            ) as answer:
                self._require(answer, _SUCCESSES, what)
                told = answer.headers.get("Docker-Content-Digest", found)
            if told != found:
                raise StoreError(
                    f"{what}: the registry answers with the digest {console.clean(told)[:80]}; the "
                    f"bytes that were sent have {found}.",
                    hint="It stores other bytes than it gets: publish to another one.",
                )

        self._retried(what, ask)

    def delete_manifest(self, repository: str, sha256: str) -> None:
        """
        Remove a manifest, and every tag that means it, if it is there.

        Raises:
            StoreError: The registry does not allow it; says how it would.
        """
        self._delete(f"/v2/{repository}/manifests/sha256:{sha256}", repository, sha256)

    def delete_tag(self, repository: str, tag: str) -> bool:
        """Remove a tag alone; False where the registry cannot, as distribution 2.8 cannot."""
        what = f"{self.shown}: removing the tag {repository}:{tag}"

        def ask() -> bool:
            path = f"/v2/{repository}/manifests/{tag}"
            with self._asked("DELETE", path, repository, {}) as answer:
                if answer.status_code in {400, 403, 405, 501}:
                    return False
                self._require(answer, {*_SUCCESSES, _NOT_FOUND}, what)
                return True

        return self._retried(what, ask)

    def _delete(self, path: str, repository: str, sha256: str) -> None:
        what = f"{self.shown}: removing sha256:{short(sha256)} of {repository}"

        def ask() -> None:
            with self._asked("DELETE", path, repository, {}) as answer:
                if answer.status_code in {405, 501}:
                    raise StoreError(
                        f"{what}: the registry does not allow it ({answer.status_code}).",
                        hint="docker-registry: `storage: delete: enabled: true`, as in "
                        "deploy/registry/registry.yml. A hosted one has a page or a policy for it.",
                    )
                self._require(answer, {*_SUCCESSES, _NOT_FOUND}, what)

        self._retried(what, ask)

    # --- lists

    def tags(self, repository: str) -> tuple[str, ...]:
        """Return every tag of a repository; none if there is no such repository."""
        listed = self._listed(f"/v2/{repository}/tags/list?n=1000", repository, "tags")
        return tuple(tag for tag in listed or () if _TAG.fullmatch(tag))

    def repositories(self) -> tuple[str, ...]:
        """
        Return the repositories of the registry's namespace.

        Raises:
            StoreError: It does not list them, as some hosted registries do not.
        """
        listed = self._listed("/v2/_catalog?n=1000", "", "repositories")
        if listed is None:
            raise StoreError(
                f"{self.shown} does not list its repositories.",
                hint="Name the model: what concerns one model works without that list.",
            )
        own = f"{self.namespace}/"
        return tuple(
            each for each in listed if each.startswith(own) and _REPOSITORY.fullmatch(each)
        )

    def _listed(self, path: str, repository: str, key: str) -> tuple[str, ...] | None:
        """Return a list, page after page; None if there is none."""
        what = f"{self.shown}: listing {key} of {repository or self.namespace}"
        absent = {_NOT_FOUND} if repository else {403, _NOT_FOUND, 405}
        found: list[str] = []
        seen: set[str] = set()
        while path not in seen and len(seen) < _MAX_PAGES:
            seen.add(path)

            def ask(path: str = path) -> tuple[list[str], str | None] | None:
                with self._asked("GET", path, repository, {}, stream=True) as answer:
                    if answer.status_code in absent and not _is_page(answer):
                        return None
                    self._require(answer, {_OK}, what)
                    value = _object(_body(answer, _MAX_ANSWER_BYTES, what), what)
                    following = _NEXT_PAGE.search(answer.headers.get("Link", ""))
                page = value.get(key) or []
                if not isinstance(page, list) or not all(isinstance(each, str) for each in page):
                    raise StoreError(f"{what}: the registry answers with no list.")
                return page, following[1] if following else None

            answered = self._retried(what, ask)
            if answered is None:
                return tuple(found) if found else None
            found += answered[0]
            if answered[1] is None:
                return tuple(dict.fromkeys(found))
            address = urljoin(f"{self._connected()}{path}", answered[1])
            if origin_of(address) != self._connected():
                raise StoreError(f"{what}: the registry sends to another host for the next page.")
            path = address.removeprefix(self._connected())
        raise StoreError(f"{what}: the registry's list does not end.")

    # --- blobs

    def blob_size(self, repository: str, sha256: str) -> int | None:
        """
        Return the size in bytes of a blob; None if the repository has none of that digest.

        Raises:
            StoreError: The registry names another digest or no size.
        """
        what = f"{self.shown}: looking for sha256:{short(sha256)} in {repository}"

        def ask() -> int | None:
            with self._asked(
                "HEAD", f"/v2/{repository}/blobs/sha256:{sha256}", repository, {}, follow=True
            ) as answer:
                if answer.status_code == _NOT_FOUND:
                    return None
                self._require(answer, {_OK}, what)
                _require_digest(answer, sha256, what)
                size = answer.headers.get("Content-Length", "")
            if not size.isdigit():
                raise StoreError(f"{what}: the registry does not say how large it is.")
            return int(size)

        return self._retried(what, ask)

    def read_blob(self, repository: str, sha256: str, *, offset: int = 0) -> Iterator[bytes]:
        """
        Yield a blob from an offset on; never more bytes than it has, and not fewer.

        Cut connections are taken up again where they broke. The caller hashes.

        Raises:
            NotThereError: There is no such blob.
            StoreError: The registry gives another number of bytes than it said.
        """
        what = f"{self.shown}: reading sha256:{short(sha256)} of {repository}"
        position, size = offset, offset + 1
        while position < size:
            opened = functools.partial(self._opened, repository, sha256, position)
            reader, size = self._retried(what, opened)
            with contextlib.closing(reader):
                while True:
                    try:
                        chunk = next(reader, b"")
                    except Exception as error:
                        found = transfer.failure_of(error)
                        if found is None or not found.passing:
                            raise
                        break  # what is missing is asked for anew
                    if not chunk:
                        break
                    position += len(chunk)
                    yield chunk

    def _opened(
        self, repository: str, sha256: str, offset: int
    ) -> tuple[Generator[bytes, None, None], int]:
        """Ask for a blob from an offset on; return its bytes, the first being there, its size."""
        what = f"{self.shown}: reading sha256:{short(sha256)} of {repository}"
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        path = f"/v2/{repository}/blobs/sha256:{sha256}"
        asked = self._asked("GET", path, repository, headers, stream=True, follow=True)
        # Open until the last byte was read, beyond this call.
        answer = asked.__enter__()
        try:
            if answer.status_code in {_NOT_FOUND, _BEYOND} and not _is_page(answer):
                size = self._size_below(repository, sha256, offset)
                first, chunks = b"", iter(())
            else:
                self._require(answer, {_OK, _PARTIAL} if offset else {_OK}, what)
                _require_digest(answer, sha256, what)
                size = _size_of(answer, offset, what) or self.blob_size(repository, sha256) or 0
                first, chunks = _first_of(answer, offset, size, what)
        except BaseException:
            asked.__exit__(None, None, None)
            raise

        def rest() -> Generator[bytes, None, None]:
            try:
                if first:
                    yield first
                yield from chunks
            finally:
                asked.__exit__(None, None, None)

        return rest(), size

    def _size_below(self, repository: str, sha256: str, offset: int) -> int:
        """Return the size of a blob that ends before an offset; there is none of another size."""
        size = self.blob_size(repository, sha256)
        if size is None or size > offset:
            raise NotThereError(
                f"{self.shown} has no blob sha256:{sha256} in {repository}.",
                hint=f"`fleet verify-registry {self._name}` names everything that is missing.",
            )
        return size

    def delete_blob(self, repository: str, sha256: str) -> None:
        """
        Take a blob out of a repository, if it is there.

        Raises:
            StoreError: The registry does not allow it; says how it would.
        """
        self._delete(f"/v2/{repository}/blobs/sha256:{sha256}", repository, sha256)

    # --- upload

    def require_writable(self, repository: str) -> None:
        """
        Begin an upload and give it up: whether the login may write shows before any byte is sent.

        Raises:
            StoreError: It may not, or only reading is possible at this address.
        """
        what = f"{self.shown}: asking to write to {repository}"

        def ask() -> None:
            upload = Upload()
            self._begin(repository, upload, what)
            self._give_up(repository, upload)

        self._retried(what, ask)

    def upload(self, repository: str, blob: Blob, on_bytes: OnBytes) -> int:
        """
        Send a blob: in parts, resumed after a cut or a kill, hashed while it is read, once.

        Returns:
            Bytes that were sent, those of repeated parts included.

        Raises:
            DigestError: The source is not the bytes that its name says. The upload is given up.
            StoreError: The registry refuses it.
            RetryLaterError: It could not be sent within the deadline; the next call goes on there.
        """
        what = f"{self.shown}: sending {blob.name} (sha256:{short(blob.sha256)}) to {repository}"
        key = f"{self.shown} {repository} {blob.sha256}"
        with remembered(key) as memory, Source(blob) as source:
            upload = Upload(
                url=memory.read(self._connected()),
                in_one_request=blob.size_bytes <= _SMALL_BYTES,
            )
            while not self._retried(
                what, lambda: self._attempt(repository, upload, source, memory, on_bytes, what)
            ):
                pass
            memory.forget()
        return upload.sent_bytes

    def _attempt(  # noqa: PLR0913, PLR0917 - what one attempt works on
        self,
        repository: str,
        upload: Upload,
        source: Source,
        memory: Memory,
        on_bytes: OnBytes,
        what: str,
    ) -> bool:
        """
        Go on with an upload until it is whole.

        Returns:
            Whether it is. If not, some of it was sent since the last time: the next attempt has its
            own deadline.
        """
        before = upload.best
        try:
            if upload.is_named and self.blob_size(repository, source.blob.sha256) is not None:
                return True  # the answer got lost
            self._take_up(repository, upload, source.size_bytes, what)
            while upload.offset < source.size_bytes and not upload.in_one_request:
                memory.write(upload.url)
                self._send_part(repository, upload, source, on_bytes, what)
            source.require_right()
            if not upload.in_one_request:
                memory.write(upload.url)
            upload.is_named = True
            self._finish(repository, upload, source, on_bytes, what)
        except DigestError:
            memory.forget()
            self._give_up(repository, upload)
            raise
        except UploadLostError as error:
            memory.forget()
            upload.url = None
            upload.beginnings += 1
            if upload.beginnings >= _MOST_BEGINNINGS:
                raise StoreError(
                    f"{what}: the registry lost the upload {upload.beginnings} times: {error}.",
                    hint="Look at its log and its disk.",
                ) from error
            return False
        except Exception as error:
            found = transfer.failure_of(error)
            upload.best = max(upload.best, upload.offset)
            if found is None or not found.passing or upload.best <= before:
                raise
            return False
        return True

    def _take_up(self, repository: str, upload: Upload, size_bytes: int, what: str) -> None:
        """Ask where an upload stands, or begin one."""
        if upload.url is not None:
            with self._asked("GET", upload.url, repository, {}) as answer:
                if answer.status_code in _SUCCESSES and not _is_page(answer):
                    self._note(upload, answer, default=0)
                    if upload.offset <= size_bytes:
                        return
                elif answer.status_code not in _LOST:
                    self._require(answer, _SUCCESSES, what)
            upload.url = None
        self._begin(repository, upload, what)

    def _begin(self, repository: str, upload: Upload, what: str) -> None:
        path = f"/v2/{repository}/blobs/uploads/"
        with self._asked("POST", path, repository, {}, data=b"") as answer:
            # A registry says no in JSON; a page is nginx's own, which lets nobody write there.
            if answer.status_code in {403, 405} and _is_page(answer):
                raise StoreError(
                    f"{what}: only reading is possible there ({answer.status_code}).",
                    hint=f"registries.{self._name}.url in params.yaml is to name the port for "
                    "publishers (5010 in deploy/registry), not the one that everybody reads from.",
                )
            self._require(answer, {_ACCEPTED}, what)
            upload.offset = 0
            self._note(upload, answer, default=0)

    def _note(self, upload: Upload, answer: requests.Response, *, default: int) -> None:
        """Take over where an upload stands: its next address, and how much is there."""
        location = answer.headers.get("Location")
        if location:
            upload.url = urljoin(answer.url, location)
        if upload.url is None:
            raise StoreError(f"{self.shown} does not say where an upload goes.")
        self._require_secure(upload.url)
        told = re.fullmatch(r"(?:bytes=)?0-([0-9]+)", answer.headers.get("Range", ""))
        # `0-0` is how distribution says that there is nothing yet.
        upload.offset = default if told is None else int(told[1]) + 1 if int(told[1]) else 0

    def _send_part(
        self, repository: str, upload: Upload, source: Source, on_bytes: OnBytes, what: str
    ) -> None:
        """Send the next part."""
        assert upload.url is not None, "the upload has begun"
        start = upload.offset
        left = source.size_bytes - start
        length = min(left, self._part_bytes) if upload.in_parts else left
        body = Body(source, start, length, on_bytes)
        headers = {"Content-Type": _OCTETS}
        # Clients of old send the whole file without it: what everybody understands.
        if (start, length) != (0, source.size_bytes):
            headers["Content-Range"] = f"{start}-{start + length - 1}"
        try:
            with self._asked("PATCH", upload.url, repository, headers, data=body) as answer:
                if answer.status_code not in _SUCCESSES:
                    self._refused_part(upload, answer, start, length == left, what)
                    return
                self._note(upload, answer, default=start + length)
        finally:
            upload.sent_bytes += body.sent_bytes
        if upload.offset != start + length:
            raise ConnectionError(f"{upload.offset} bytes arrived of {start + length}")
        upload.best = max(upload.best, upload.offset)

    def _refused_part(
        self,
        upload: Upload,
        answer: requests.Response,
        start: int,
        whole: bool,  # noqa: FBT001 - what was sent
        what: str,
    ) -> None:
        """Sort a refusal of a part: another way of sending it, another beginning, or the end."""
        if answer.status_code not in _NO_PARTS:
            self._require(answer, _SUCCESSES, what)
        if upload.in_parts and not (whole and start == 0):
            upload.in_parts = False
        elif not upload.in_one_request and answer.status_code in {400, 404, 405, 411, 501}:
            upload.in_one_request = True
        else:
            self._require(answer, _SUCCESSES, what)
        raise UploadLostError(_detail(answer))

    def _finish(
        self, repository: str, upload: Upload, source: Source, on_bytes: OnBytes, what: str
    ) -> None:
        """Give an upload its name; the registry hashes it."""
        assert upload.url is not None, "the upload has begun"
        digest = f"sha256:{source.blob.sha256}"
        url = f"{upload.url}{'&' if urlsplit(upload.url).query else '?'}digest={digest}"
        body: bytes | Body = b""
        if upload.in_one_request:
            body = Body(source, 0, source.size_bytes, on_bytes)
        headers = {"Content-Type": _OCTETS}
        try:
            with self._asked(
                "PUT", url, repository, headers, data=body, within_s=_FINISH_WITHIN_S
            ) as answer:
                if answer.status_code in _LOST and self.blob_size(
                    repository, source.blob.sha256
                ) == (source.size_bytes):
                    return  # an answer got lost: it was there already
                if answer.status_code in _LOST:
                    if upload.in_one_request:
                        source.require_right()
                        self._require(answer, _SUCCESSES, what)
                    raise UploadLostError(_detail(answer))
                self._require(answer, {_CREATED, _ACCEPTED, 204}, what)
                _require_digest(answer, source.blob.sha256, what)
        finally:
            if isinstance(body, Body):
                upload.sent_bytes += body.sent_bytes
        if upload.in_one_request:
            source.require_right()

    def _give_up(self, repository: str, upload: Upload) -> None:
        """Remove what was sent; a registry that cannot sweeps it later."""
        if upload.url is not None:
            with (
                contextlib.suppress(requests.RequestException, StoreError),
                self._asked("DELETE", upload.url, repository, {}),
            ):
                upload.url = None

    # --- requests

    def connect(self) -> None:
        """
        Find out whether a registry answers there.

        Raises:
            StoreError: Something else does, or the login is refused.
        """
        what = f"{self.shown}: connecting"

        def ask() -> None:
            with self._asked("GET", "/v2/", "", {}) as answer:
                self._require(answer, {_OK}, what)

        self._retried(what, ask)

    def _retried(self, what: str, call: Callable[[], T]) -> T:
        return transfer.retrying(
            what, call, deadline_s=self._deadline_s, credentials=self._credential_names()
        )

    @contextmanager
    def _asked(  # noqa: PLR0913 - each is one independent fact about a request
        self,
        method: str,
        address: str,
        repository: str,
        headers: dict[str, str],
        *,
        data: bytes | Body | None = None,
        stream: bool = False,
        follow: bool = False,
        within_s: float = _ANSWER_WITHIN_S,
    ) -> Iterator[requests.Response]:
        """
        Make one request and give its answer, whatever its status; log in if that is asked for.

        Args:
            method: Of HTTP.
            address: Path on the registry, or a whole address that the registry gave.
            repository: Whose token is shown; "" for what belongs to none.
            headers: Further ones.
            data: Body; a `Body` is sent once, another attempt begins where the registry stands.
            stream: Leave the body of the answer to the caller.
            follow: Follow redirects, without the login.
            within_s: Seconds without a byte after which it has failed.
        """
        origin = self._connected()
        url = urljoin(origin, address)
        own = origin_of(url) == origin
        answer = self._once(
            method, url, repository if own else None, headers, data, stream, within_s
        )
        if answer.status_code == _UNAUTHORIZED and own and self._logged_in(answer, repository):
            answer.close()
            if isinstance(data, Body):
                # Half of the body may be gone: the next attempt asks where the upload stands.
                if data.refusals >= 1:
                    raise _AnswerError(answer, _detail(answer))
                data.source.refusals += 1
                raise ConnectionError("the login expired while it was sent")
            answer = self._once(method, url, repository, headers, data, stream, within_s)
        elif isinstance(data, Body) and answer.status_code < 400:  # noqa: PLR2004 - HTTP's
            data.source.refusals = 0
        try:
            for _ in range(_MAX_REDIRECTS if follow else 0):
                if answer.status_code not in _REDIRECTS:
                    break
                target = urljoin(answer.url, answer.headers.get("Location", ""))
                self._require_secure(target)
                answer.close()
                answer = self._once(method, target, None, headers, None, stream, within_s)
            yield answer
        finally:
            answer.close()

    def _once(  # noqa: PLR0913, PLR0917 - what a request is made of
        self,
        method: str,
        url: str,
        repository: str | None,
        headers: dict[str, str],
        data: bytes | Body | None,
        stream: bool,  # noqa: FBT001 - handed on
        within_s: float,
    ) -> requests.Response:
        """Make one request; `repository` None means without any login."""
        shown = dict(headers)
        if repository is not None:
            login = f"Bearer {self._tokens[repository]}" if repository in self._tokens else None
            login = login or self._basic
            if login:
                shown["Authorization"] = login
        return self._session.request(
            method,
            url,
            headers=shown,
            data=data,
            stream=stream,
            allow_redirects=False,
            timeout=(_CONNECT_WITHIN_S, within_s),
            verify=authorities(),
            proxies=self._proxies(url),
            auth=no_auth,
        )

    def _proxies(self, url: str) -> dict[str, str]:
        """Return the proxies of the environment, but for this machine."""
        if is_loopback(urlsplit(url).hostname or ""):
            return {}
        return dict(requests.utils.get_environ_proxies(url))

    def _connected(self) -> str:
        """Return `scheme://host:port`, after finding out once whether it speaks TLS."""
        if self._origin is None:
            self._origin = self._retried(f"{self.shown}: connecting", self._find_origin)
        return self._origin

    def _find_origin(self) -> str:
        """
        Try TLS first; plain HTTP only where that is allowed and the server does not speak TLS.

        A certificate that is not trusted is an error everywhere: nothing falls back from it.
        """
        try:
            self._once("GET", f"https://{self.host}/v2/", None, {}, None, False, 30).close()  # noqa: FBT003
        except requests.exceptions.SSLError as error:
            if any(
                isinstance(step, ssl.SSLCertVerificationError)
                for step in transfer._chain(error)  # noqa: SLF001
            ):
                raise StoreError(
                    f"{self.shown}: its certificate is not trusted: "
                    f"{console.clean(str(error.args[0]))[-200:]}.",
                    hint="A private authority: SSL_CERT_FILE=ca.crt. There is no way to skip this.",
                ) from error
            if not (self._is_local or self._insecure):
                raise StoreError(
                    f"{self.shown} does not speak TLS, and is not on this machine.",
                    hint="Serve it over TLS (deploy/registry/nginx-tls.conf), or, on a network "
                    f"that you trust, declare `insecure: true` for registries.{self._name}.",
                ) from error
        except requests.exceptions.ConnectionError:
            if not (self._is_local or self._insecure):
                raise
        else:
            return f"https://{self.host}"
        self._once("GET", f"http://{self.host}/v2/", None, {}, None, False, 30).close()  # noqa: FBT003
        return f"http://{self.host}"

    def _require_secure(self, url: str) -> None:
        """Refuse to go where the registry sends us, if that is plain HTTP to another machine."""
        parts = urlsplit(url)
        plain = self._insecure or is_loopback(parts.hostname or "")
        if parts.scheme == "https" or (parts.scheme == "http" and plain):
            return
        raise StoreError(
            f"{self.shown} sends to {console.clean(parts.scheme)}://"
            f"{console.clean(parts.hostname or '')[:100]}, over which nothing is sent or read.",
            hint="The registry is to give out https addresses; on a network that you trust declare "
            f"`insecure: true` for registries.{self._name}.",
        )

    def _require(self, answer: requests.Response, statuses: Collection[int], what: str) -> None:
        """Raise what an answer means unless its status is one of those and it is no web page."""
        if _is_page(answer) and (
            answer.status_code in _SUCCESSES or answer.status_code in statuses
        ):
            raise StoreError(
                f"{what}: a web page came instead of an answer: the login page of a proxy, or no "
                "registry at all.",
                hint=f"Check registries.{self._name}.url in params.yaml, and the proxy.",
            )
        if answer.status_code in statuses:
            return
        if answer.status_code in _REDIRECTS:
            raise StoreError(
                f"{what}: the registry answers {answer.status_code} and sends elsewhere.",
                hint=f"Declare the address that it sends to in registries.{self._name}.url.",
            )
        raise _AnswerError(answer, _detail(answer))

    # --- login

    def _credential_names(self) -> str:
        user, password = variables(self._name)
        return f"{user} and {password}"

    def _logged_in(self, answer: requests.Response, repository: str) -> bool:
        """Do what a 401 asks for; False if there is nothing that was not tried."""
        told = answer.headers.get("WWW-Authenticate", "")
        bearer = re.search(r"(?:^|,\s*)bearer\s+(.*)", told, re.IGNORECASE | re.DOTALL)
        if bearer:
            asked = {key.lower(): value for key, value in _CHALLENGE.findall(bearer[1])}
            self._tokens.pop(repository, None)
            self._tokens[repository] = self._token(asked, repository)
            return True
        if re.match(r"\s*basic\b", told, re.IGNORECASE) and self._basic is None:
            login = credentials(self._name, self.host)
            if login is not None:
                self._basic = basic(login)
                return True
        return False

    def _token(self, asked: dict[str, str], repository: str) -> str:
        """Fetch a token from the service that the registry names."""
        realm = asked.get("realm", "")
        parts = urlsplit(realm)
        where = f"{console.clean(parts.scheme)}://{console.clean(parts.netloc)[:100]}"
        local = is_loopback(parts.hostname or "")
        if not parts.hostname or not (
            parts.scheme == "https" or (parts.scheme == "http" and (local or self._insecure))
        ):
            raise StoreError(
                f"{self.shown} asks to log in at {where}, which is no https address.",
                hint="The registry's operator has to configure its token service with https.",
            )
        login = credentials(self._name, self.host)
        own = {urlsplit(f"//{self.host}").hostname, self._token_host}
        if login is not None and parts.hostname not in own:
            raise StoreError(
                f"{self.shown} asks to send the login to another host: {where}. It was not sent.",
                hint=f"If that is its token service, declare `endpoint: {where}` for "
                f"registries.{self._name} in params.yaml.",
            )
        scopes = self._scopes.setdefault(repository, [])
        scope = asked.get("scope", f"repository:{repository}:pull,push" if repository else "")
        if scope and scope not in scopes:
            scopes.append(scope)
        query = [("scope", each) for each in scopes]
        if "service" in asked:
            query.append(("service", asked["service"]))
        answer = self._session.get(
            realm,
            params=query,
            headers={"Authorization": basic(login)} if login else {},
            allow_redirects=False,
            timeout=(_CONNECT_WITHIN_S, _ANSWER_WITHIN_S),
            verify=authorities(),
            proxies=self._proxies(realm),
            auth=no_auth,
            stream=True,
        )
        what = f"{self.shown}: logging in at {where}"
        with contextlib.closing(answer):
            self._require(answer, {_OK}, what)
            value = _object(_body(answer, _MAX_TOKEN_BYTES, what), what)
        token = value.get("token") or value.get("access_token")
        if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
            raise StoreError(f"{what}: it gives no token.")
        return token


# --- answers ----------------------------------------------------------------------------------


def _is_page(answer: requests.Response) -> bool:
    return "html" in answer.headers.get("Content-Type", "").lower()


def _bytes_of(answer: requests.Response, size: int, what: str) -> Iterator[bytes]:
    """
    Yield exactly `size` bytes of a body as they were sent.

    Raises:
        ConnectionError: It ended before; transfer tries again.
        StoreError: It does not end there.
    """
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise StoreError(f"{what}: it comes packed, which nobody asked for.")
    left = size
    while left:
        # decode_content only concerns packing; chunks of the transfer are put together.
        chunk = answer.raw.read(min(left, hashing.CHUNK_BYTES), decode_content=False)
        if not chunk:
            raise ConnectionError(f"the body ended {left} bytes too early")
        left -= len(chunk)
        yield chunk
    if answer.raw.read(1, decode_content=False):
        raise StoreError(
            f"{what}: more bytes came than the {size} that it has. What came was not used.",
            hint="Something between the registry and here answers in its place.",
        )


def _size_of(answer: requests.Response, offset: int, what: str) -> int | None:
    """Return the size of the whole blob by the answer to a GET; None if it does not say."""
    if answer.status_code == _PARTIAL:
        told = re.fullmatch(
            r"bytes ([0-9]+)-[0-9]+/([0-9]+)", answer.headers.get("Content-Range", "")
        )
        if told is None or int(told[1]) != offset:
            raise StoreError(f"{what}: other bytes came than were asked for.")
        return int(told[2])
    told_length = answer.headers.get("Content-Length", "")
    return int(told_length) if told_length.isdigit() else None


def _first_of(
    answer: requests.Response, offset: int, size: int, what: str
) -> tuple[bytes, Iterator[bytes]]:
    """Return the first bytes of a blob from an offset on, and the rest."""
    skip = offset if answer.status_code == _OK else 0
    _require_length(answer, size - offset + skip, what)
    chunks = _bytes_of(answer, size - offset + skip, what)
    first = b""
    while not first:
        first = next(chunks, b"")
        if not first:
            break  # nothing is left from there on
        first, skip = first[skip:], max(0, skip - len(first))
    return first, chunks


def _require_length(answer: requests.Response, size: int, what: str) -> None:
    """Refuse a body that declares another length, before a byte of it is read."""
    told = answer.headers.get("Content-Length")
    if told is not None and told != str(size):
        raise StoreError(
            f"{what}: {console.clean(told)[:40]} bytes are announced, {size} are wanted.",
            hint="The registry holds other bytes than it lists, or a proxy answers in its place.",
        )


def _body(answer: requests.Response, limit: int, what: str) -> bytes:
    """Read a small body, to its end; `limit` bytes at most."""
    data = b""
    while chunk := answer.raw.read(hashing.CHUNK_BYTES, decode_content=False):
        data += chunk
        if len(data) > limit:
            raise StoreError(f"{what}: the answer is larger than any that makes sense.")
    told = answer.headers.get("Content-Length", "")
    if told.isdigit() and int(told) != len(data):
        raise ConnectionError("the body ended too early")
    return data


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{what}: the answer is no JSON.") from error
    if not isinstance(value, dict):
        raise StoreError(f"{what}: the answer is no JSON object.")
    return value


def _detail(answer: requests.Response) -> str:
    """Return what a registry says of an error, in its own words."""
    try:
        data = answer.raw.read(4096, decode_content=False) if answer.raw else b""
        data = data or answer.content[:4096]
    except Exception:  # noqa: BLE001 - the status says enough
        data = b""
    try:
        errors = json.loads(data)["errors"]
        return ", ".join(f"{each['code']}: {each['message']}" for each in errors[:3])
    except (ValueError, KeyError, TypeError):
        return "" if _is_page(answer) else data.decode(errors="replace").strip()


def _require_digest(answer: requests.Response, sha256: str, what: str) -> None:
    told = answer.headers.get("Docker-Content-Digest")
    if told is not None and told != f"sha256:{sha256}":
        raise StoreError(
            f"{what}: the registry calls it {console.clean(told)[:80]}, not sha256:{sha256}.",
            hint="A proxy answers in its place, or its disk is damaged.",
        )
