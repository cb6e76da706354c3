"""
The program that transfers files of the Hub; `pipelines.hub_download` orders, watches and ends it.

    python -m pipelines.hub_worker      one order a line on stdin, lines about it on stdout

A process of its own, for what hangs inside a transfer, a name server, a proxy, the native code of
xet, can only be ended with its process. It ends by itself when its stdin does, that is, with
whoever ordered it. The token comes by the environment, as huggingface_hub reads it, and goes to the
origin of the endpoint alone; addresses of its storage are signed and need none.

An order is the JSON of `Order`. Each answer to it is one of

    {"at": n}          n bytes of the file are on the disk
    {"done": n}        all of them are, as far as their number tells
    {"failed": {...}}  the fields of `Failure`

Bytes are appended to the file as they arrive, past every buffer of ours, so that whoever is killed
finds them there. Never more than the declared size: a server that does not stop is left alone.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import re
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urljoin, urlsplit

from pipelines import __version__, proc

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

LIBRARY: Final = "gguf-fleet"
# What a worker says when it has read everything that it needs for its work.
READY: Final = '{"ready": true}'

_MOST_REDIRECTS: Final = 10
_SECONDS_BETWEEN_WORDS: Final = 0.1
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_OK, _PARTIAL, _UNSATISFIABLE, _TOO_MANY = 200, 206, 416, 429
_LONGEST_WAIT_S: Final = 366 * 86_400.0
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")

Kind = Literal[
    "status", "unreachable", "offline", "length", "broken", "disk", "xet", "stalled", "died"
]


@dataclass(frozen=True, kw_only=True)
class Order:
    """
    One file to bring.

    Attributes:
        endpoint: Address of the Hub, without a slash at its end.
        repo: owner/name.
        revision: Commit.
        name: Path in the repository.
        size_bytes: That the listing declares.
        large: Kept in LFS, so that xet may have it.
        part: Where its bytes go; those that are there already are its first ones.
        fresh: Ask caches on the way for nothing that they keep.
    """

    endpoint: str
    repo: str
    revision: str
    name: str
    size_bytes: int
    large: bool
    part: str
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class Failure:
    """
    Why a file is not there.

    Attributes:
        kind: status: a server refused, with `status`; unreachable: none answered; offline: the
            operator wants no network; length: the whole file has another size than was listed;
            broken: the transfer ended early, or was nonsense; disk: `errno` of writing; xet: of its
            native code. Said by those who watch: stalled: too slow; died: the worker.
        detail: In words of a server or a library.
        code: `X-Error-Code` of the Hub.
        retry_after_s: That the server asks for.
    """

    kind: Kind
    detail: str = ""
    status: int | None = None
    code: str = ""
    retry_after_s: float | None = None
    errno: int | None = None


class _Failed(Exception):  # noqa: N818 - carries a failure, is none
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


class _Part:
    """The file that grows, and the word about it now and then."""

    def __init__(self, file: IO[bytes], size_bytes: int) -> None:
        self._file = file
        self._told = 0.0
        self.size_bytes = size_bytes
        self.have_bytes = file.seek(0, os.SEEK_END)
        if self.have_bytes > size_bytes:
            self.begin_again()

    @property
    def is_whole(self) -> bool:
        return self.have_bytes == self.size_bytes

    def begin_again(self) -> None:
        with _written():
            self._file.truncate(0)
            self._file.seek(0)
        self.have_bytes = 0

    def take(self, chunks: Iterable[bytes]) -> bool:
        """Append chunks up to the declared size; tell whether there were more."""
        for chunk in chunks:
            rest = memoryview(chunk)[: self.size_bytes - self.have_bytes]
            is_more = len(rest) < len(chunk)
            while rest:
                with _written():
                    written = self._file.write(rest)
                rest = rest[written:]
                self.have_bytes += written
            if time.monotonic() - self._told > _SECONDS_BETWEEN_WORDS:
                self._told = time.monotonic()
                _say({"at": self.have_bytes})
            if is_more:
                return True
        return False


def main() -> None:
    """Bring what is ordered, one file after another, until nobody orders any more."""
    proc.die_with_parent()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    orders = _Orders()
    import huggingface_hub.file_download  # noqa: F401, PLC0415 - what takes long, before READY

    sys.stdout.write(READY + "\n")
    sys.stdout.flush()
    while (line := orders.next()) is not None:
        order = Order(**json.loads(line))
        try:
            answer: dict[str, Any] = {"done": _bring(order)}
        except _Failed as error:
            answer = {"failed": asdict(error.failure)}
        _say(answer)


class _Orders:
    """Lines of stdin, read by a thread: their end ends us in the middle of anything."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._came = threading.Semaphore(0)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._lines.append(line)
            self._came.release()
        os._exit(0)

    def next(self) -> str | None:
        self._came.acquire()
        return self._lines.pop(0)


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _bring(order: Order) -> int:
    """Append what is missing of one file."""
    with _written(), Path(order.part).open("ab", buffering=0) as file:
        part = _Part(file, order.size_bytes)
        if not part.is_whole:
            _transfer(order, part)
        return part.have_bytes


def _transfer(order: Order, part: _Part) -> None:
    from huggingface_hub import hf_hub_url  # noqa: PLC0415 - 0.2 s
    from huggingface_hub.utils._headers import build_hf_headers  # noqa: PLC0415 - the same

    headers = build_hf_headers(library_name=LIBRARY, library_version=__version__)
    # Sizes are those of the file, and ranges those of its bytes.
    headers["accept-encoding"] = "identity"
    if order.fresh:
        headers |= {"cache-control": "no-cache", "pragma": "no-cache"}
    with _explained():
        url = hf_hub_url(order.repo, order.name, revision=order.revision, endpoint=order.endpoint)
        if order.large and _by_xet(url, order, headers, part):
            return
        _by_http(url, order, headers, part)


# --- plain -------------------------------------------------------------------------------------


def _by_http(url: str, order: Order, headers: Mapping[str, str], part: _Part) -> None:
    """Append by one request; by a second one for all of it if the server gives another part."""
    for _ in range(2):
        wanted = {"range": f"bytes={part.have_bytes}-"} if part.have_bytes else {}
        with _opened("GET", url, order.endpoint, {**headers, **wanted}) as response:
            if response.status_code == _UNSATISFIABLE and part.have_bytes:
                part.begin_again()
                continue
            _require_answer(response)
            total_bytes = _total_bytes(response, part)
            if total_bytes is _OTHER_PART:
                part.begin_again()
                continue
            _receive(response, part, total_bytes)
            return
    raise _Failed(Failure(kind="broken", detail="the server answers with parts of the file"))


_OTHER_PART: Final = -1


def _total_bytes(response: Any, part: _Part) -> int | None:  # noqa: ANN401 - httpx2.Response
    """
    Return the size of the whole file by the head of an answer, if it says one.

    What is there of the file is dropped if the answer begins at its start.
    """
    told = response.headers.get("content-length", "")
    is_plain = response.headers.get("content-encoding", "identity").lower() == "identity"
    if response.status_code == _PARTIAL:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if not is_plain or found is None or int(found[1]) != part.have_bytes:
            return _OTHER_PART
        return None if found[3] == "*" else int(found[3])
    if part.have_bytes:
        part.begin_again()
    return int(told) if is_plain and told.isdecimal() else None


def _receive(response: Any, part: _Part, total_bytes: int | None) -> None:  # noqa: ANN401 - see above
    """Take the body of an answer that begins where the part ends."""
    if total_bytes is not None and total_bytes != part.size_bytes:
        raise _length(total_bytes)
    if part.take(response.iter_bytes()):
        return  # more than was declared: the digest will tell whether what we have is right
    if not part.is_whole:
        is_chunked = "chunked" in response.headers.get("transfer-encoding", "").lower()
        if is_chunked and total_bytes is None:
            raise _length(part.have_bytes)
        # Nothing said how much there would be: this may have been a cut.
        raise _Failed(
            Failure(kind="broken", detail=f"the connection ended after {part.have_bytes:,} bytes")
        )


def _length(found_bytes: int) -> _Failed:
    return _Failed(Failure(kind="length", detail=f"{found_bytes:,} bytes"))


@contextlib.contextmanager
def _opened(
    method: str, url: str, endpoint: str, headers: Mapping[str, str], *, follow_out: bool = True
) -> Iterator[Any]:
    """
    Send a request, and follow where it leads; the token stays with the origin of the endpoint.

    Args:
        method: GET or HEAD.
        url: On the endpoint.
        endpoint: Of the Hub.
        headers: With the token, if there is one.
        follow_out: Whether to follow to another origin; if not, that answer is yielded.
    """
    from huggingface_hub import constants  # noqa: PLC0415 - 0.2 s
    from huggingface_hub.utils._http import get_session  # noqa: PLC0415 - the same

    for _ in range(_MOST_REDIRECTS):
        own = _origin(url) == _origin(endpoint)
        sent = {k: v for k, v in headers.items() if own or k.lower() != "authorization"}
        with get_session().stream(
            method,
            url,
            headers=sent,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=False,
        ) as response:
            target = urljoin(url, response.headers.get("location", ""))
            is_end = not response.has_redirect_location
            if is_end or (not follow_out and _origin(target) != _origin(endpoint)):
                yield response
                return
        if urlsplit(url).scheme == "https" != urlsplit(target).scheme:
            raise _Failed(Failure(kind="broken", detail="it leads to an address without TLS"))
        url = target
    raise _Failed(Failure(kind="broken", detail="its address leads in a circle"))


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or _DEFAULT_PORTS.get(parts.scheme)


def _require_answer(response: Any) -> None:  # noqa: ANN401 - see above
    status = response.status_code
    if status in {_OK, _PARTIAL}:
        return
    headers = response.headers
    raise _Failed(
        Failure(
            kind="status",
            status=status,
            code=headers.get("x-error-code", ""),
            detail=headers.get("x-error-message", ""),
            retry_after_s=_retry_after_s(headers, status),
        )
    )


def _retry_after_s(headers: Mapping[str, str], status: int) -> float | None:
    """Read how long a server wants to be left alone: seconds, an HTTP date, or its allowance."""
    told = headers.get("retry-after", "").strip()
    waits = []
    if re.fullmatch(r"\d{1,12}(?:\.\d{1,9})?", told):
        waits.append(float(told))
    elif told:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            when = email.utils.parsedate_to_datetime(told)
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            waits.append(when.timestamp() - time.time())
    # `RateLimit: "api";r=0;t=55` (huggingface_hub/utils/_http.py, parse_ratelimit_headers)
    spent = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})", headers.get("ratelimit", ""))
    if status == _TOO_MANY and spent:
        waits.append(float(spent[1]))
    return min(max(0.0, *waits), _LONGEST_WAIT_S) if waits else None


# --- xet ---------------------------------------------------------------------------------------


def _by_xet(url: str, order: Order, headers: dict[str, str], part: _Part) -> bool:
    """
    Append from xet's storage if the file is there and xet may be used; tell whether it was.

    As an ordered stream, which begins where the part ends: huggingface_hub has xet write the file
    itself, in an order of its own, of which nothing can be kept.
    """
    from huggingface_hub.utils import _xet as xet  # noqa: PLC0415 - the same
    from huggingface_hub.utils._runtime import is_xet_available  # noqa: PLC0415 - the same

    if not is_xet_available():
        return False
    with _opened("HEAD", url, order.endpoint, headers, follow_out=False) as response:
        if response.status_code >= 400:  # noqa: PLR2004
            _require_answer(response)
        where = xet.parse_xet_file_data_from_response(response, endpoint=order.endpoint)
    if where is None or _origin(where.refresh_route) != _origin(order.endpoint):
        return False
    import hf_xet  # type: ignore[import-untyped]  # noqa: PLC0415 - native code, only here

    try:
        access = xet.refresh_xet_connection_info(file_data=where, headers=headers)
        session: Any = xet.get_xet_session()  # type: ignore[no-untyped-call]
        group = session.new_download_stream_group(
            endpoint=access.endpoint,
            token=access.access_token,
            token_expiry_unix_secs=access.expiration_unix_epoch,
            token_refresh_url=where.refresh_route,
            token_refresh_headers=headers,
            custom_headers=xet.xet_headers_without_auth(headers),
        )
        stream = group.download_stream(
            hf_xet.XetFileInfo(where.file_hash, order.size_bytes), start=part.have_bytes
        )
        part.take(stream)
    except _Failed:
        raise
    except Exception as error:
        raise _Failed(Failure(kind="xet", detail=_words(error))) from error
    if not part.is_whole:
        raise _Failed(Failure(kind="xet", detail=f"it ended after {part.have_bytes:,} bytes"))
    return True


# --- failures ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _written() -> Iterator[None]:
    """Tell a fault of the disk from one of the network, which is an OSError as well."""
    try:
        yield
    except OSError as error:
        detail = error.strerror or str(error)
        raise _Failed(Failure(kind="disk", errno=error.errno, detail=detail)) from error


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn what the network does into a failure."""
    import httpx2  # noqa: PLC0415 - 0.2 s
    from huggingface_hub.errors import OfflineModeIsEnabled  # noqa: PLC0415 - the same

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise _Failed(Failure(kind="offline")) from error
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, ImportError) as error:
        raise _Failed(Failure(kind="unreachable", detail=_words(error))) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        raise _Failed(Failure(kind="broken", detail=_words(error))) from error


def _words(error: BaseException) -> str:
    """Return the first line of the innermost cause, without what a signed address carries."""
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return re.sub(r"\?[^\s'\"]+", "?...", text)[:300]


if __name__ == "__main__":
    main()
