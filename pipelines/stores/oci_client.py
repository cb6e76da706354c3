"""
The distribution API of OCI, as much of it as releases need; no answer is believed.

Every manifest that arrives is hashed and held against the digest that was asked for and the one
that the registry names; a blob is cut off at its size; a web page, a login page of a proxy for
instance, is never taken for an answer. Where bytes are retried, only those that are missing are
sent again.

How a registry is reached and who one is there: `oci_http`. What an answer is worth: `oci_answers`.
How a large file goes up: `oci_upload`.

Source: opencontainers/distribution-spec 1.1.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pipelines import console
from pipelines.errors import StoreError
from pipelines.release_records import short
from pipelines.stores import oci_upload, transfer
from pipelines.stores.base import NotThereError
from pipelines.stores.oci_answers import (
    MAX_LIST_BYTES,
    MAX_MANIFEST_BYTES,
    address_of,
    body_of,
    first_of,
    is_page,
    number_of,
    object_of,
    require_digest,
    size_of,
)
from pipelines.stores.oci_http import SUCCESSES, Http
from pipelines.stores.oci_login import origin_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from pipelines.params import Registry
    from pipelines.stores.base import Blob, OnBytes

DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_ACCEPT: Final = f"{OCI_MANIFEST}, {DOCKER_MANIFEST}"

# A list that is longer than that is none: 10,000 pages, a million names.
_MAX_PAGES: Final = 10_000
_MAX_NAMES: Final = 1_000_000

_OK: Final = 200
_PARTIAL: Final = 206
_NOT_FOUND: Final = 404
_BEYOND: Final = 416

_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_REPOSITORY: Final = re.compile(r"[a-z0-9]+(?:[._/-]+[a-z0-9]+)*")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_NEXT_PAGE: Final = re.compile(r"<([^<>]+)>\s*;\s*rel=\"?next\"?")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest as the registry gave it, hashed: bytes, media type, sha256 in hex."""

    data: bytes
    media_type: str
    sha256: str

    def value(self, where: str) -> dict[str, Any]:
        """Return it as JSON; `where` is for the error."""
        return object_of(self.data, where)


class OciClient:
    """One registry at one host; see the module."""

    def __init__(
        self,
        name: str,
        registry: Registry,
        *,
        deadline_s: float = transfer.DEADLINE_S,
        part_bytes: int = oci_upload.PART_BYTES,
    ) -> None:
        """
        Know the registry `name`; nothing is asked of it yet.

        Args:
            name: Its key in params.yaml, from which the names of its credentials come.
            registry: Its declaration, `oci://host[:port]/namespace`.
            deadline_s: Seconds for which a request that fails is repeated.
            part_bytes: Size of the parts of a large file.
        """
        self._http = Http(name, registry, deadline_s=deadline_s)
        self._name = name
        self._part_bytes = part_bytes

    @property
    def shown(self) -> str:
        """Its address; a login never is part of it."""
        return self._http.shown

    @property
    def host(self) -> str:
        """Where it is, as docker names it: host[:port]."""
        return self._http.host

    @property
    def namespace(self) -> str:
        """What its repositories begin with."""
        return self._http.namespace

    def connect(self) -> None:
        """
        Find out whether a registry answers there.

        Raises:
            StoreError: Something else does, or the login is refused.
        """
        what = f"{self.shown}: connecting"

        def ask() -> None:
            with self._http.asked("GET", "/v2/", "", {}) as answer:
                self._http.require(answer, {_OK}, what)

        self._http.retried(what, ask)

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
            with self._http.asked(
                "GET", path, repository, {"Accept": _ACCEPT}, stream=True
            ) as answer:
                if answer.status_code == _NOT_FOUND and not is_page(answer):
                    return None
                self._http.require(answer, {_OK}, what)
                data = body_of(answer, MAX_MANIFEST_BYTES, what)
                found = hashlib.sha256(data).hexdigest()
                told = answer.headers.get("Docker-Content-Digest", f"sha256:{found}")
                media_type = answer.headers.get("Content-Type", "").partition(";")[0].strip()
            object_of(data, what)
            for named in {told, reference} if reference.startswith("sha256:") else {told}:
                if named != f"sha256:{found}":
                    raise StoreError(
                        f"{what}: the registry calls it {console.clean(named)[:80]}, and its bytes "
                        f"have sha256:{found}.",
                        hint="Something between it and here changed them, or its disk did. "
                        f"`fleet verify-registry {self._name}` reads everything again.",
                    )
            return Manifest(data=data, media_type=media_type, sha256=found)

        return self._http.retried(what, ask)

    def manifest_sha256(self, repository: str, reference: str) -> str | None:
        """Return what a tag means now, as the registry says; None if it means nothing."""
        what = f"{self.shown}: looking for {repository}:{reference[:19]}"

        def ask() -> str | None:
            path = f"/v2/{repository}/manifests/{reference}"
            with self._http.asked("HEAD", path, repository, {"Accept": _ACCEPT}) as answer:
                if answer.status_code == _NOT_FOUND:
                    return None
                self._http.require(answer, {_OK}, what)
                return answer.headers.get("Docker-Content-Digest", "")

        told = self._http.retried(what, ask)
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
            with self._http.asked(
                "PUT", path, repository, {"Content-Type": media_type}, data=data
            ) as answer:
                self._http.require(answer, SUCCESSES, what)
                told = answer.headers.get("Docker-Content-Digest", found)
            if told != found:
                raise StoreError(
                    f"{what}: the registry answers with the digest {console.clean(told)[:80]}; the "
                    f"bytes that were sent have {found}.",
                    hint="It stores other bytes than it gets: publish to another one.",
                )

        self._http.retried(what, ask)

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
            with self._http.asked("DELETE", path, repository, {}) as answer:
                if answer.status_code in {400, 403, 405, 501}:
                    return False
                self._http.require(answer, {*SUCCESSES, _NOT_FOUND}, what)
                return True

        return self._http.retried(what, ask)

    def _delete(self, path: str, repository: str, sha256: str) -> None:
        what = f"{self.shown}: removing sha256:{short(sha256)} of {repository}"

        def ask() -> None:
            with self._http.asked("DELETE", path, repository, {}) as answer:
                if answer.status_code in {405, 501}:
                    raise StoreError(
                        f"{what}: the registry does not allow it ({answer.status_code}).",
                        hint="docker-registry: `storage: delete: enabled: true`, as in "
                        "deploy/registry/registry.yml. A hosted one has a page or a policy for it.",
                    )
                self._http.require(answer, {*SUCCESSES, _NOT_FOUND}, what)

        self._http.retried(what, ask)

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
                with self._http.asked("GET", path, repository, {}, stream=True) as answer:
                    if answer.status_code in absent and not is_page(answer):
                        return None
                    self._http.require(answer, {_OK}, what)
                    value = object_of(body_of(answer, MAX_LIST_BYTES, what), what)
                    following = _NEXT_PAGE.search(answer.headers.get("Link", ""))
                page = value.get(key) or []
                if not isinstance(page, list) or not all(isinstance(each, str) for each in page):
                    raise StoreError(f"{what}: the registry answers with no list.")
                return page, following[1] if following else None

            answered = self._http.retried(what, ask)
            if answered is None:
                return tuple(found) if found else None
            found += answered[0]
            if len(found) > _MAX_NAMES:
                break
            if answered[1] is None:
                return tuple(dict.fromkeys(found))
            address = address_of(f"{self._http.origin()}{path}", answered[1], what)
            if origin_of(address) != origin_of(self._http.origin()):
                raise StoreError(f"{what}: the registry sends to another host for the next page.")
            path = address
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
            with self._http.asked(
                "HEAD", f"/v2/{repository}/blobs/sha256:{sha256}", repository, {}, follow=True
            ) as answer:
                if answer.status_code == _NOT_FOUND:
                    return None
                self._http.require(answer, {_OK}, what)
                require_digest(answer, sha256, what)
                size_bytes = number_of(answer.headers.get("Content-Length", ""))
            if size_bytes is None:
                raise StoreError(f"{what}: the registry does not say how large it is.")
            return size_bytes

        return self._http.retried(what, ask)

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
            reader, size = self._http.retried(what, opened)
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
        asked = self._http.asked("GET", path, repository, headers, stream=True, follow=True)
        # Open until the last byte was read, beyond this call.
        answer = asked.__enter__()
        chunks: Iterator[bytes] = iter(())
        try:
            if answer.status_code in {_NOT_FOUND, _BEYOND} and not is_page(answer):
                size = self._size_below(repository, sha256, offset)
                first = b""
            else:
                self._http.require(answer, {_OK, _PARTIAL} if offset else {_OK}, what)
                require_digest(answer, sha256, what)
                size = size_of(answer, offset, what) or self.blob_size(repository, sha256) or 0
                first, chunks = first_of(answer, offset, size, what)
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
        oci_upload.require_writable(self._http, repository)

    def upload(self, repository: str, blob: Blob, on_bytes: OnBytes) -> int:
        """Send a blob; see `oci_upload.send`, whose errors these are."""
        return oci_upload.send(
            self._http,
            repository,
            blob,
            on_bytes,
            part_bytes=self._part_bytes,
            stored_bytes=functools.partial(self.blob_size, repository, blob.sha256),
        )
