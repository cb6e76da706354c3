"""
What an answer of a registry of OCI is worth: nothing of it is believed, and none is without an end.

A body is read as it was sent, never unpacked, and never past the size that it has or that makes
sense; a document has to arrive within two minutes, however slowly its bytes drip. A number, an
address or a shape that cannot be is an error with words, like a refusal.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urljoin, urlsplit

from pipelines import console, hashing
from pipelines.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import requests

# What distribution itself refuses beyond (4 MiB), with room for a registry that does not.
MAX_MANIFEST_BYTES: Final = 16 << 20
MAX_LIST_BYTES: Final = 16 << 20
MAX_TOKEN_BYTES: Final = 1 << 16
# Of an answer that nobody reads: so much is taken off the wire, so that the connection serves the
# next request; a longer one costs its connection.
_MOST_IGNORED_BYTES: Final = 1 << 16
_MOST_SAID_BYTES: Final = 4096
_DOCUMENT_WITHIN_S: Final = 120.0
_IGNORED_WITHIN_S: Final = 5.0

_OK: Final = 200
_PARTIAL: Final = 206
# Sizes fit into 64 bits; `int` itself refuses thousands of digits, and isdigit() takes "²".
_NUMBER: Final = re.compile(r"[0-9]{1,18}", re.ASCII)


class AnswerError(Exception):
    """An answer that is not what was asked for; `transfer` reads its status and headers."""

    def __init__(self, response: requests.Response) -> None:
        """Say what the registry says of it."""
        super().__init__(detail_of(response))
        self.response = response


def is_page(answer: requests.Response) -> bool:
    """Tell whether it is a web page: of a proxy, or of nginx itself."""
    return "html" in answer.headers.get("Content-Type", "").lower()


def number_of(text: str) -> int | None:
    """Read a size in bytes, or an offset; None if it is none."""
    return int(text) if _NUMBER.fullmatch(text) else None


def address_of(base: str, told: str, what: str) -> str:
    """
    Return the whole address that a registry named, perhaps relative to one of its own.

    Raises:
        StoreError: It is none.
    """
    try:
        found = urljoin(base, told)
        parts = urlsplit(found)
        _ = parts.hostname, parts.port  # each is read, and can be wrong, only now
    except ValueError as error:
        raise StoreError(
            f"{what}: the registry sends to {console.clean(told)[:100]!r}, which is no address."
        ) from error
    return found


def bytes_of(answer: requests.Response, size_bytes: int, what: str) -> Iterator[bytes]:
    """
    Yield exactly `size_bytes` of a body as they were sent.

    Raises:
        ConnectionError: It ended before; transfer tries again.
        StoreError: It does not end there.
    """
    _require_plain(answer, what)
    left_bytes = size_bytes
    while left_bytes:
        # decode_content only concerns packing; chunks of the transfer are put together.
        chunk = answer.raw.read(min(left_bytes, hashing.CHUNK_BYTES), decode_content=False)
        if not chunk:
            raise ConnectionError(f"the body ended {left_bytes} bytes too early")
        left_bytes -= len(chunk)
        yield chunk
    if answer.raw.read(1, decode_content=False):
        raise StoreError(
            f"{what}: more bytes came than the {size_bytes} that it has. What came was not used.",
            hint="Something between the registry and here answers in its place.",
        )


def size_of(answer: requests.Response, offset: int, what: str) -> int | None:
    """Return the size of the whole blob by the answer to a GET; None if it does not say."""
    if answer.status_code == _PARTIAL:
        told = re.fullmatch(
            r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})",
            answer.headers.get("Content-Range", ""),
        )
        if told is None or int(told[1]) != offset:
            raise StoreError(f"{what}: other bytes came than were asked for.")
        return int(told[2])
    return number_of(answer.headers.get("Content-Length", ""))


def first_of(
    answer: requests.Response, offset: int, size_bytes: int, what: str
) -> tuple[bytes, Iterator[bytes]]:
    """Return the first bytes of a blob from an offset on, and the rest."""
    skip = offset if answer.status_code == _OK else 0
    _require_length(answer, size_bytes - offset + skip, what)
    chunks = bytes_of(answer, size_bytes - offset + skip, what)
    first = b""
    while not first:
        first = next(chunks, b"")
        if not first:
            break  # nothing is left from there on
        first, skip = first[skip:], max(0, skip - len(first))
    return first, chunks


def _require_length(answer: requests.Response, size_bytes: int, what: str) -> None:
    """Refuse a body that declares another length, before a byte of it is read."""
    told = answer.headers.get("Content-Length")
    if size_bytes < 0 or (told is not None and told != str(size_bytes)):
        raise StoreError(
            f"{what}: {console.clean(str(told))[:40]} bytes are announced, {size_bytes} are "
            "wanted.",
            hint="The registry holds other bytes than it lists, or a proxy answers in its place.",
        )


def body_of(answer: requests.Response, limit_bytes: int, what: str) -> bytes:
    """
    Read a document, to its end.

    Raises:
        ConnectionError: It ended early.
        TimeoutError: It drips.
        StoreError: It is longer than `limit_bytes`, or packed.
    """
    _require_plain(answer, what)
    data = _read(answer, limit_bytes + 1, _DOCUMENT_WITHIN_S)
    if len(data) > limit_bytes:
        raise StoreError(f"{what}: the answer is larger than any that makes sense.")
    told_bytes = number_of(answer.headers.get("Content-Length", ""))
    if told_bytes is not None and told_bytes != len(data):
        raise ConnectionError("the body ended too early")
    return data


def let_go(answer: requests.Response) -> None:
    """End an answer that says nothing more; one whose end is near leaves its connection open."""
    with contextlib.suppress(Exception):
        _read(answer, _MOST_IGNORED_BYTES, _IGNORED_WITHIN_S)
    answer.close()


def _read(answer: requests.Response, most_bytes: int, within_s: float) -> bytes:
    """
    Read a body to its end, or until there are so many bytes.

    Raises:
        TimeoutError: It drips.
    """
    data = bytearray()
    until_s = time.monotonic() + within_s
    # read1 gives what is there; read would wait for as much as was asked for.
    while len(data) < most_bytes and (
        chunk := answer.raw.read1(most_bytes - len(data), decode_content=False)
    ):
        data += chunk
        if time.monotonic() > until_s:
            raise TimeoutError(f"only {len(data)} bytes came in {within_s:.0f} s")
    return bytes(data)


def object_of(data: bytes, what: str) -> dict[str, Any]:
    """
    Return the JSON object that a document is.

    Raises:
        StoreError: It is none.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{what}: the answer is no JSON.") from error
    if not isinstance(value, dict):
        raise StoreError(f"{what}: the answer is no JSON object.")
    return value


def detail_of(answer: requests.Response) -> str:
    """Return what a registry says of an error, in its own words; not cleaned."""
    try:
        data = _read(answer, _MOST_SAID_BYTES, _IGNORED_WITHIN_S)
    except Exception:  # noqa: BLE001 - the status says enough
        return ""
    try:
        errors = json.loads(data)["errors"]
        return ", ".join(f"{each['code']}: {each['message']}" for each in errors[:3])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "" if is_page(answer) else data.decode(errors="replace").strip()


def require_digest(answer: requests.Response, sha256: str, what: str) -> None:
    """
    Hold the digest that an answer names, if it names one, against the one that is meant.

    Raises:
        StoreError: It is another one.
    """
    told = answer.headers.get("Docker-Content-Digest")
    if told is not None and told != f"sha256:{sha256}":
        raise StoreError(
            f"{what}: the registry calls it {console.clean(told)[:80]}, not sha256:{sha256}.",
            hint="A proxy answers in its place, or its disk is damaged.",
        )


def _require_plain(answer: requests.Response, what: str) -> None:
    """Refuse what is packed: of a few bytes it would make as many as somebody likes."""
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise StoreError(f"{what}: it comes packed, which nobody asked for.")
