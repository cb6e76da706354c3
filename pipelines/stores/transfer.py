"""
What the stores behind a network share: retries within a deadline, and one line of progress.

Retried is what may pass: a connection that breaks, 408, 425, 429 and every 5xx. Pauses grow and are
random over their whole length (full jitter), so that a fleet whose registry comes back does not
come back all at once. A server's Retry-After is obeyed, never past the deadline. What will not pass
by waiting (a refused login, a wrong address, a wrong digest) is said at once.
"""

from __future__ import annotations

import email.utils
import http.client
import random
import ssl
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from pipelines import console, wording
from pipelines.errors import FleetError, RetryLaterError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.stores.base import OnBytes

T = TypeVar("T")

# Seconds from the first failure of one request to the last attempt at it.
DEADLINE_S: Final = 120.0
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0
_PASSING: Final = frozenset({408, 425, 429})
_REFUSED: Final = frozenset({401, 403})
_SERVER_ERROR: Final = 500
# Over how long a rate is shown.
_WINDOW_S: Final = 10.0
_MIB: Final = 2**20


@dataclass(frozen=True, kw_only=True)
class Failure:
    """
    What went wrong with one request, whoever made it.

    Attributes:
        status: HTTP status; None if no server answered.
        passing: Whether it may be otherwise in a while.
        retry_after_s: How long the server asks to wait; None if it does not.
        detail: What it said, as it is: not cleaned.
    """

    status: int | None
    passing: bool
    retry_after_s: float | None
    detail: str


def retrying(  # noqa: PLR0913 - each is one independent fact, named at the call
    what: str,
    call: Callable[[], T],
    *,
    deadline_s: float = DEADLINE_S,
    credentials: str = "",
    failure: Callable[[Exception], Failure | None] | None = None,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """
    Make a request; make it again while its failure may pass and there is time.

    `call` has to be repeatable: it opens its source anew, or sends what is still missing.

    Args:
        what: The request, as the subject of a sentence: `s3://bucket: writing sha256:12ab...`.
        call: Makes one attempt. A FleetError of its own goes through at once.
        deadline_s: Seconds after the first failure in which attempts begin; each success of a part
            of a transfer is a call of its own, so a slow upload is not cut short.
        credentials: What holds the login, for the hint: `AWS_ACCESS_KEY_ID and ...`.
        failure: Reads an exception; None means that it is nobody's failure but ours, and it is
            raised as it is. `failure_of` if absent.
        sleep: For tests.
        clock: For tests.

    Raises:
        RetryLaterError: It failed until the deadline.
        StoreError: The server refused it: 401, 403, or any other answer that waiting cannot change.
    """
    read = failure or failure_of
    deadline: float | None = None
    attempts = 0
    while True:
        attempts += 1
        try:
            return call()
        except FleetError:
            raise
        except Exception as error:
            found = read(error)
            if found is None:
                raise
            if not found.passing:
                raise refused(what, found, credentials) from error
            now = clock()
            deadline = now + deadline_s if deadline is None else deadline
            left_s = deadline - now
            if left_s <= 0:
                raise _given_up(what, found, attempts, deadline_s) from error
            sleep(min(left_s, _pause_s(found, attempts)))


def _pause_s(found: Failure, attempts: int) -> float:
    if found.retry_after_s is not None:
        # Not all at that very second.
        return found.retry_after_s + random.uniform(0, _FIRST_PAUSE_S)  # noqa: S311 - no secret
    longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(attempts - 1, 30))
    return random.uniform(0, longest_s)  # noqa: S311 - no secret


def refused(what: str, found: Failure, credentials: str = "") -> StoreError:
    """Return the error of an answer that waiting cannot change."""
    status = f" answers {found.status}" if found.status else " failed"
    text = f"{what}{status}{_said(found)}."
    if found.status in _REFUSED:
        named = credentials or "the registry's credentials"
        return StoreError(
            text,
            hint=f"Check {named} in the environment: the login is missing, has expired, or may not "
            "do this.",
        )
    return StoreError(text, hint="Check the address of the registry in params.yaml.")


def _given_up(what: str, found: Failure, attempts: int, deadline_s: float) -> RetryLaterError:
    status = f"answers {found.status}" if found.status else "cannot be reached"
    tried = wording.counted(attempts, "attempt")
    return RetryLaterError(
        f"{what} {status}{_said(found)}, after {tried} in {deadline_s:.0f} s.",
        hint="Try again later: what was sent is not sent again.",
    )


def _said(found: Failure) -> str:
    detail = console.clean(" ".join(found.detail.split()))[:200].rstrip(".")
    return f" ({detail})" if detail else ""


def failure_of(error: Exception) -> Failure | None:
    """
    Read an exception of requests, urllib3, httpx, botocore or the standard library.

    Returns:
        The failure; None if it was no failure of a request.
    """
    for step in _chain(error):
        status, headers = _answer(step)
        if status is not None:
            return of_status(status, headers, str(step))
    chain = list(_chain(error))
    if any(isinstance(step, ssl.SSLCertVerificationError) for step in chain):
        return Failure(status=None, passing=False, retry_after_s=None, detail=str(chain[-1]))
    if any(_is_broken_connection(step) for step in chain):
        return Failure(status=None, passing=True, retry_after_s=None, detail=str(chain[-1]))
    return None


def of_status(status: int, headers: Mapping[str, str], detail: str) -> Failure:
    """Return the failure that an HTTP status is."""
    return Failure(
        status=status,
        passing=status in _PASSING or status >= _SERVER_ERROR,
        retry_after_s=retry_after_s(headers),
        detail=detail,
    )


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Read Retry-After: seconds, or a date (RFC 9110, 10.2.3); None if absent or unreadable."""
    value = next((text for key, text in headers.items() if key.lower() == "retry-after"), None)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def _answer(error: BaseException) -> tuple[int | None, Mapping[str, str]]:
    """Return status and headers of the answer behind an exception, by the library's own fields."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore's ClientError
        told = response.get("ResponseMetadata", {})
        status, headers = told.get("HTTPStatusCode"), told.get("HTTPHeaders", {})
    else:
        status, headers = getattr(response, "status_code", None), getattr(response, "headers", {})
    if not isinstance(status, int):
        return None, {}
    return status, headers if isinstance(headers, Mapping) else {}


# By name: none of these libraries is imported for a store that does not use it.
_BROKEN: Final = frozenset({
    # requests
    "ConnectionError", "ChunkedEncodingError", "ContentDecodingError", "Timeout", "ConnectTimeout",
    "ReadTimeout",
    # urllib3
    "ProtocolError", "IncompleteRead", "NewConnectionError", "MaxRetryError", "ReadTimeoutError",
    "ConnectTimeoutError",
    # httpx
    "TransportError", "RemoteProtocolError", "ReadError", "WriteError", "ConnectError",
    "PoolTimeout", "WriteTimeout", "LocalProtocolError",
    # botocore and aiohttp below it
    "EndpointConnectionError", "ConnectionClosedError", "ResponseStreamingError",
    "HTTPClientError", "ClientConnectionError", "ClientPayloadError", "ServerDisconnectedError",
    "IncompleteReadError",
})  # fmt: skip


def _is_broken_connection(error: BaseException) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError, http.client.HTTPException)):
        return True
    return any(each.__name__ in _BROKEN for each in type(error).__mro__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Walk an exception and what it was raised from."""
    seen: set[int] = set()
    step: BaseException | None = error
    while step is not None and id(step) not in seen:
        seen.add(id(step))
        yield step
        step = step.__cause__ or step.__context__


class Progress:
    """
    One line over all blobs of a transfer: share, rate, time left, and which file it is.

        with Progress("publish tiny-llama to production", total_bytes) as progress:
            store.put_blob(model, blob, progress.of(blob.name, blob.size_bytes))
    """

    def __init__(
        self, label: str, total_bytes: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin; `total_bytes` over everything that `of` will be asked for."""
        self._line = console.Progress(label, total=total_bytes / _MIB or None, unit="MiB")
        self._clock = clock
        self._done_bytes = 0
        self._recent: deque[tuple[float, int]] = deque([(clock(), 0)])

    def __enter__(self) -> Self:
        """Start."""
        self._line.__enter__()
        return self

    def __exit__(self, *why: object) -> None:
        """End the line."""
        self._line.__exit__(*why)

    def of(self, name: str, size_bytes: int) -> OnBytes:
        """Return what is called with the bytes of one blob that are done, up to `size_bytes`."""
        before_bytes = self._done_bytes
        self._done_bytes += size_bytes

        def show(done_bytes: int) -> None:
            self._show(before_bytes + min(done_bytes, size_bytes), name)

        show(0)
        return show

    @property
    def rate_bytes_s(self) -> float | None:
        """Bytes per second over the last ten; None before there are two moments."""
        (began_s, began_bytes), (now_s, now_bytes) = self._recent[0], self._recent[-1]
        return (now_bytes - began_bytes) / (now_s - began_s) if now_s > began_s else None

    def _show(self, done_bytes: int, name: str) -> None:
        now_s = self._clock()
        self._recent.append((now_s, done_bytes))
        while len(self._recent) > 2 and now_s - self._recent[0][0] > _WINDOW_S:  # noqa: PLR2004
            self._recent.popleft()
        rate = self.rate_bytes_s
        shown = f"{wording.number(rate / _MIB)} MiB/s, " if rate and rate > 0 else ""
        self._line.update(done_bytes / _MIB, f"{shown}{name}")
