"""
How the Hub is spoken to: by huggingface_hub, under our deadline, with our token out of sight.

huggingface_hub waits as long as a Retry-After says, five times, and for ever where a server goes
silent; it repeats some requests and others not. Here every request has timeouts, an answer that may
pass is handed to `transfer.retrying` at once, and what is repeated is a whole step that can be:
each of them asks first what is there. Nothing else in this process is changed: outside of `ask` its
client behaves as it came.

Credentials are huggingface_hub's own: HF_TOKEN; or, with HF_OIDC_RESOURCE, the identity of a GitHub
job that the Hub exchanges for a token of an hour; or what `hf auth login` left.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import ssl
import time
import warnings
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar, cast
from urllib.parse import urlsplit

import httpx2
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub
from huggingface_hub.lfs import UploadInfo
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import (
    default_client_factory,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from pipelines import __version__, console
from pipelines.errors import (
    DigestError,
    FleetError,
    MachineError,
    ParamsError,
    RetryLaterError,
    StoreError,
)
from pipelines.stores import transfer
from pipelines.stores.addresses import is_link_local, is_loopback, is_private_way
from pipelines.stores.base import NotThereError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.params import Registry
    from pipelines.stores.base import Blob, OnBytes

T = TypeVar("T")

_LIBRARY: Final = "gguf-fleet"
_CREDENTIALS: Final = "HF_TOKEN"
# The Hub itself gives a commit 60 s.
_TIMEOUTS: Final = httpx2.Timeout(connect=10, read=120, write=60, pool=10)
# For one attempt at a step that sends no large file; the library repeats one call for ever.
_ATTEMPT_S: Final = 600.0
_CHUNK_BYTES: Final = 1 << 20
_SAMPLE_BYTES: Final = 512
_LONGEST_DETAIL: Final = 300
# Of an answer that is read whole; a listing of a thousand files has half a megabyte.
_MAX_ANSWER_BYTES: Final = 64 << 20
# Marks a request whose answer is read piece by piece, by a caller who knows its size.
_LARGE: Final = "gguf-fleet-large"

_NO_CONTENT_LEFT: Final = 416
_PARTIAL: Final = 206
_PASSING: Final = frozenset({408, 425, 429})
_SERVER_ERROR: Final = 500
_CONFLICTS: Final = frozenset({409, 412})
_REFUSED: Final = frozenset({401, 402, 403})

# How the library begins what the Hub has to say of a large file, and of a README.
_SAID_NO: Final = ("LFS batch API", "Invalid metadata in README")

_SECRETS: Final = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
)  # fmt: skip
# Tokens by their look, and the query of an address: where storage is, it is signed.
_LOOKS_SECRET: Final = re.compile(r"hf_[A-Za-z0-9_.-]{4,}|eyJ[A-Za-z0-9_.-]{8,}|(?<=\S)\?\S+")


class ConflictError(StoreError):
    """The Hub has it already, or has something else by now (409, 412)."""


class _PassingError(httpx2.HTTPError):
    """An answer, or none, that may be another one in a while; huggingface_hub lets it through."""

    def __init__(self, message: str, response: httpx2.Response | None = None) -> None:
        super().__init__(message)
        self.response = response


# Until when requests may begin; None outside of `ask`.
_until: ContextVar[float | None] = ContextVar("_until", default=None)
# Who is asked within `ask`.
_asked: ContextVar[Hub | None] = ContextVar("_asked", default=None)


class _Limited(httpx2.SyncByteStream):
    """The body of an answer that is read whole, which has to have an end."""

    def __init__(self, stream: httpx2.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        left_bytes = _MAX_ANSWER_BYTES
        for chunk in self._stream:
            left_bytes -= len(chunk)
            if left_bytes < 0:
                raise StoreError("the Hub's answer is larger than any that makes sense.")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _before(request: httpx2.Request) -> None:
    """See where a request goes, redirects and addresses of storage included."""
    hub_ = _asked.get()
    if hub_ is None:
        return
    if not hub_.may_be_asked(str(request.url)):
        raise StoreError(
            f"{_clean(hub_.endpoint)} sends to {_clean(request.url.scheme)}://"
            f"{_clean(request.url.host)}, over which nothing is sent or read.",
            hint="It is to give out https addresses of other machines than this one; on a network "
            f"that you trust declare registries.{hub_.registry}.insecure: true.",
        )
    if _LARGE not in request.extensions:
        request.headers["Accept-Encoding"] = "identity"


def _after(response: httpx2.Response) -> None:
    """Put an end to an answer that is read whole; one that unpacks has none."""
    if _asked.get() is None or _LARGE in response.request.extensions:
        return
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise StoreError("the Hub's answer comes packed, which nobody asked for.")
    if isinstance(response.stream, httpx2.SyncByteStream):
        response.stream = _Limited(response.stream)


class _Client(httpx2.Client):
    """huggingface_hub's client; within `ask` it leaves waiting and repeating to us."""

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:  # noqa: ANN401
        """Send a request, or say at once that it may work later."""
        until = _until.get()
        if until is None:
            return super().send(request, **options)
        if time.monotonic() > until:
            raise _PassingError("it took too long")
        # The library waits for ever wherever it says nothing else.
        if not any(request.extensions.get("timeout", {}).values()):
            request.extensions["timeout"] = _TIMEOUTS.as_dict()
        try:
            response = super().send(request, **options)
        except httpx2.TransportError as error:
            raise _PassingError(str(error) or type(error).__name__) from error
        if response.status_code in _PASSING or response.status_code >= _SERVER_ERROR:
            with suppress(httpx2.HTTPError):
                response.read()
            response.close()
            raise _PassingError(response.reason_phrase, response)
        return response


def _client() -> httpx2.Client:
    """Make a client like huggingface_hub's own (`default_client_factory`)."""
    made = default_client_factory()
    hooks = made.event_hooks
    ours = _Client(
        event_hooks={
            "request": [*hooks["request"], _before],
            "response": [*hooks["response"], _after],
        },
        follow_redirects=True,
        timeout=None,
    )
    made.close()
    return ours


@contextmanager
def _attempt(hub_: Hub, within_s: float | None) -> Iterator[None]:
    until = _until.set(time.monotonic() + within_s if within_s else float("inf"))
    asked = _asked.set(hub_)
    try:
        yield
    finally:
        _asked.reset(asked)
        _until.reset(until)


@dataclass(frozen=True)
class Hub:
    """The Hub at one address, for one registry."""

    registry: str
    endpoint: str
    deadline_s: float
    insecure: bool = False

    @classmethod
    def of(cls, name: str, registry: Registry, deadline_s: float) -> Hub:
        """
        Open the Hub of a declared registry; nothing is asked.

        Raises:
            ParamsError: It is spoken to by plain HTTP, which is not declared.
        """
        endpoint = (registry.endpoint or constants.ENDPOINT).rstrip("/")
        if not (registry.insecure or is_private_way(endpoint)):
            raise ParamsError(
                f"registry {name} is spoken to by plain HTTP: {_clean(endpoint)}. Whoever is "
                "between reads the token and may change every answer.",
                hint=f"Use https, or declare registries.{name}.insecure: true.",
            )
        # Its warnings speak of retries that we make, and its bars would draw over our line.
        hub_logging.set_verbosity(logging.ERROR)
        disable_progress_bars()
        if not isinstance(get_session(), _Client):
            huggingface_hub.set_client_factory(_client)
        return cls(name, endpoint, deadline_s, registry.insecure)

    @property
    def api(self) -> huggingface_hub.HfApi:
        """The library's client; the token is looked up for every request, since it may expire."""
        return huggingface_hub.HfApi(
            endpoint=self.endpoint, library_name=_LIBRARY, library_version=__version__
        )

    def may_be_asked(self, url: str) -> bool:
        """Tell whether a request may go there: of servers of this machine only if it is there."""
        host = urlsplit(url).hostname
        if is_loopback(host):
            return is_loopback(urlsplit(self.endpoint).hostname)
        return not is_link_local(host) and (self.insecure or is_private_way(url))

    @property
    def is_anonymous(self) -> bool:
        """Whether there is no token at all."""
        return not os.environ.get("HF_OIDC_RESOURCE") and huggingface_hub.get_token() is None

    def ask(self, what: str, call: Callable[[], T], *, large: bool = False) -> T:
        """
        Make a step that can be repeated; repeat it while its failure may pass.

        Args:
            what: The step, as the subject of a sentence.
            call: Speaks to the Hub.
            large: It sends or reads a large file, and takes as long as that takes.

        Raises:
            NotThereError: The repository, the revision or the file does not exist, or may not be
                seen.
            ConflictError: It is there already, or it is no longer what was read.
            StoreError: Refused: not logged in, not allowed, gated, disabled, no answer of the Hub.
            RetryLaterError: It could not be reached within the deadline.
        """

        def attempt() -> T:
            with _attempt(self, None if large else _ATTEMPT_S), warnings.catch_warnings():
                # Its remarks about a README's metadata and about files in general.
                warnings.simplefilter("ignore")
                try:
                    return call()
                except Exception as error:
                    translated = self._translated(what, error)
                    if translated is error:
                        raise
                    raise translated from error

        if os.environ.get("HF_OIDC_RESOURCE") and self.endpoint != constants.ENDPOINT.rstrip("/"):
            raise StoreError(
                f"HF_OIDC_RESOURCE is set: the job's identity would be exchanged for a token at "
                f"{_clean(constants.ENDPOINT)}, and registries.{self.registry}.endpoint is "
                f"{_clean(self.endpoint)}.",
                hint=f"Set HF_ENDPOINT={_clean(self.endpoint)}, or use HF_TOKEN.",
            )
        return transfer.retrying(
            what, attempt, deadline_s=self.deadline_s, credentials=_CREDENTIALS, failure=_failure
        )

    def _translated(self, what: str, error: Exception) -> Exception:
        """Return what to raise for an exception: one of ours, or one that `_failure` can read."""
        ours = _first(error, FleetError)
        if ours is not None:
            return ours
        if isinstance(error, hub.LocalTokenNotFoundError):
            return StoreError(f"{what}: there is no token.", hint=_LOGIN_HINT)
        if isinstance(error, OSError) and not isinstance(error, httpx2.HTTPError):
            return MachineError(f"{what}: {error.strerror or _detail(error)}.")
        passing = _first(error, _PassingError)
        if passing is not None:
            return passing
        return self._refusal(what, error)

    def _refusal(  # noqa: C901, PLR0911 - one for each way of the Hub to say no
        self, what: str, error: Exception
    ) -> Exception:
        detail = _detail(error)
        if _first(error, hub.OIDCError) or _is_exchange(_address(error)):
            return StoreError(
                f"{what}: the Hub gave no token for this job's identity: {detail}.",
                hint="The job needs `permissions: id-token: write`, and the repository a trusted "
                "publisher for this workflow (Settings of the repository on the Hub).",
            )
        if _first(error, hub.GatedRepoError):
            return StoreError(
                f"{what}: the repository is gated, and this token may not read it.",
                hint="Accept its conditions on its page, with the account of HF_TOKEN.",
            )
        if _first(error, hub.DisabledRepoError):
            return StoreError(
                f"{what}: the Hub has disabled this repository.",
                hint="Its page says why; publish to another registry until then.",
            )
        if _status(error) == 401 and "credentials" in detail.lower():  # noqa: PLR2004 - HTTP
            return StoreError(
                f"{what}: the Hub does not accept the token any more ({detail}).", hint=_LOGIN_HINT
            )
        if _first(error, hub.RepositoryNotFoundError):
            return NotThereError(
                f"{what}: the repository does not exist, or this token may not see it.",
                hint=_LOGIN_HINT,
            )
        if _first(error, hub.RevisionNotFoundError) or _first(error, hub.RemoteEntryNotFoundError):
            return NotThereError(f"{what}: it is not there.")
        if _status(error) in _CONFLICTS:
            return ConflictError(f"{what}: {detail}.")
        if _status(error) in _REFUSED:
            return StoreError(
                f"{what} answers {_status(error)}: {detail}.",
                hint="The token has to have write access to this repository (a fine-grained one "
                f"needs it for {self.registry}'s owner); make one at "
                "https://huggingface.co/settings/tokens and set HF_TOKEN.",
            )
        if _status(error) is not None:
            return StoreError(
                f"{what} answers {_status(error)}: {detail}.",
                hint="Publish again: what was sent is not sent again. If it stays so, look at "
                "registries in params.yaml and at the page of the repository.",
            )
        if _first(error, hub.HFValidationError):
            return StoreError(
                f"{what}: the Hub takes no such name: {detail}.",
                hint="Names of repositories: letters, digits, `-`, `_` and `.`, no `--`, no `..`, "
                "96 characters at most.",
            )
        if isinstance(error, ValueError) and str(error).startswith(_SAID_NO):
            return StoreError(
                f"{what}: the Hub refuses it: {detail}.",
                hint="Its documentation of storage limits and of model cards says what it takes.",
            )
        if isinstance(error, (ValueError, KeyError, TypeError, AttributeError)):
            return StoreError(
                f"{what}: {_clean(self.endpoint)} answers what the Hub does not: {detail}.",
                hint="A proxy or a login page may be between, or HF_ENDPOINT is no Hub.",
            )
        return error

    # reading

    def open(self, what: str, url: str, offset: int) -> httpx2.Response:
        """
        Ask for a file from an offset on; the caller reads the answer and closes it.

        Raises:
            NotThereError, StoreError, RetryLaterError: See `ask`.
        """

        def call() -> httpx2.Response:
            # Bytes as they are: hashes are of these.
            headers = {
                **build_hf_headers(library_name=_LIBRARY, library_version=__version__),
                "Accept-Encoding": "identity",
            }
            if offset:
                headers["Range"] = f"bytes={offset}-"
            client = get_session()
            request = client.build_request("GET", url, headers=headers, extensions={_LARGE: True})
            response = client.send(request, stream=True)
            if response.status_code == _NO_CONTENT_LEFT:
                return response
            try:
                hf_raise_for_status(response)
            except Exception:
                response.close()
                raise
            return response

        return self.ask(what, call, large=True)

    def stream(self, what: str, url: str, offset: int) -> Iterator[bytes]:
        """
        Yield a file from an offset on, asked for anew where the connection ends.

        Raises:
            NotThereError, StoreError, RetryLaterError: See `ask`.
        """
        while True:
            began = offset
            response = self.open(what, url, offset)
            try:
                if response.status_code == _NO_CONTENT_LEFT:
                    return
                # A server that knows no ranges gives all of it.
                skip = offset if response.status_code != _PARTIAL else 0
                for chunk in response.iter_raw(_CHUNK_BYTES):
                    rest = chunk[skip:]
                    skip = max(0, skip - len(chunk))
                    if rest:
                        offset += len(rest)
                        yield rest
            except httpx2.TransportError as error:
                if offset == began:
                    raise RetryLaterError(
                        f"{what}: the connection ended without a byte ({_detail(error)}).",
                        hint="Try again later: what is here already is not read again.",
                    ) from error
            else:
                return
            finally:
                response.close()


_LOGIN_HINT: Final = (
    "Set HF_TOKEN to a token that may do this (under Actions: a secret of that name), or "
    "HF_OIDC_RESOURCE for a trusted publisher."
)


# --- what went wrong --------------------------------------------------------------------------


def _failure(error: Exception) -> transfer.Failure | None:
    """Read what `_translated` let through."""
    if not isinstance(error, _PassingError):
        return None
    response = error.response
    if response is None:
        # Another certificate does not come by waiting.
        passing = _first(error, ssl.SSLCertVerificationError) is None
        return transfer.Failure(
            status=None, passing=passing, retry_after_s=None, detail=_clean(str(error))
        )
    found = transfer.of_status(response.status_code, response.headers, _clean(str(error)))
    wait_s = _reset_s(response) if found.retry_after_s is None else found.retry_after_s
    return transfer.Failure(
        status=found.status, passing=True, retry_after_s=wait_s, detail=found.detail
    )


def _reset_s(response: httpx2.Response) -> float | None:
    """Read the Hub's RateLimit header: seconds until there are requests left again."""
    limit = parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    step: BaseException | None = error
    while step is not None and id(step) not in seen:
        seen.add(id(step))
        yield step
        step = step.__cause__ or step.__context__


E = TypeVar("E", bound=BaseException)


def _first(error: BaseException, kind: type[E]) -> E | None:
    """Find an exception of a kind: the library wraps what happens in an upload."""
    return next((step for step in _chain(error) if isinstance(step, kind)), None)


def _status(error: BaseException) -> int | None:
    for step in _chain(error):
        status = getattr(getattr(step, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _address(error: BaseException) -> str:
    for step in _chain(error):
        request = getattr(getattr(step, "response", None), "_request", None)
        if request is not None:
            return str(request.url)
    return ""


def _is_exchange(address: str) -> bool:
    """Tell whether a request was to get a token for a job's identity."""
    mint = os.environ.get("ACTIONS_ID_TOKEN_REQUEST_URL", "").partition("?")[0]
    return "/oauth/token" in address or (bool(mint) and address.startswith(mint))


def _detail(error: BaseException) -> str:
    """Return what was said, by the server if it said anything."""
    for step in _chain(error):
        said = getattr(step, "server_message", None)
        if said:
            return _clean(str(said))
    told = _first(error, httpx2.HTTPError) or error
    return _clean(str(told)) or type(told).__name__


def _clean(text: str) -> str:
    """Make text fit for a message: one line, no token, no signed address."""
    for name in _SECRETS:
        secret = os.environ.get(name, "").strip()
        if secret:
            text = text.replace(secret, "***")
    text = _LOOKS_SECRET.sub("***", text)
    return console.clean(" ".join(text.split()))[:_LONGEST_DETAIL].rstrip(". ")


# --- what is sent -----------------------------------------------------------------------------


class Reader(io.BufferedIOBase):
    """
    A blob's source that is hashed while it is sent: read once, in the order of its bytes.

    What a repeated request reads again is not hashed again. The last bytes are not handed out
    before the digest is right, so no upload of other bytes is ever finished.

    Attributes:
        sent_bytes: How far it was read.
    """

    def __init__(self, blob: Blob, on_bytes: OnBytes) -> None:
        """Open nothing yet."""
        super().__init__()
        self.sent_bytes = 0
        self._blob = blob
        self._on_bytes = on_bytes
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes: a request that is repeated begins anew."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._blob.size_bytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """
        Return the next bytes.

        Raises:
            DigestError: They are not those of the blob.
        """
        left_bytes = max(0, self._blob.size_bytes - self._at)
        if not left_bytes:
            return b""
        file = self._opened()
        file.seek(self._at)
        chunk = file.read(left_bytes if size is None or size < 0 else min(size, left_bytes))
        if not chunk:
            raise self._other(self._at)
        began, self._at = self._at, self._at + len(chunk)
        if began <= self.sent_bytes < self._at:
            self._digest.update(chunk[self.sent_bytes - began :])
            self.sent_bytes = self._at
            if self.sent_bytes == self._blob.size_bytes:
                self.require()
            self._on_bytes(self.sent_bytes)
        return chunk

    def require(self) -> None:
        """
        Compare what was read with what the blob is.

        Raises:
            DigestError: It is something else.
        """
        if self._digest.hexdigest() != self._blob.sha256:
            raise self._other(self.sent_bytes)

    def close(self) -> None:
        """Close the source."""
        if self._file is not None:
            self._file.close()
        super().close()

    def _opened(self) -> BinaryIO:
        if self._file is None:
            source = self._blob.source
            if isinstance(source, bytes):
                self._file = io.BytesIO(source)
            else:
                # Unbuffered: it is read in the chunks that are sent.
                self._file = cast("BinaryIO", source.open("rb", buffering=0))
            size_bytes = self._file.seek(0, io.SEEK_END)
            if size_bytes != self._blob.size_bytes:
                raise self._other(size_bytes)
        return self._file

    def _other(self, size_bytes: int) -> DigestError:
        blob = self._blob
        return DigestError(
            f"{blob.name} is not the file of the release: sha256 {blob.sha256} "
            f"({blob.size_bytes} bytes) was wanted, sha256 {self._digest.hexdigest()} of the first "
            f"{self.sent_bytes} bytes was read, and it has {size_bytes}. Nothing of it was stored.",
            hint="Run `fleet repro`: it makes a file again that is not what its record says.",
        )


class Addition(huggingface_hub.CommitOperationAdd):
    """
    A file to add, of which size and sha256 are known: the library does not read it to hash it.

    A source that is a stream makes the library send large files by LFS over HTTP, each in one pass,
    and not by hf_xet, which reads files on its own threads, past our deadline.
    """

    def __init__(self, path: str, blob: Blob, on_bytes: OnBytes = lambda _: None) -> None:
        """Add a blob under a path of the repository."""
        self.reader = Reader(blob, on_bytes)
        self.blob = blob
        super().__init__(path, cast("BinaryIO", self.reader))

    def __post_init__(self) -> None:
        """Describe the file as the library would after having read it."""
        self.upload_info = UploadInfo(
            size=self.blob.size_bytes,
            sample=_sample(self.blob),
            sha256=bytes.fromhex(self.blob.sha256),
        )

    @property
    def is_large(self) -> bool:
        """Whether the Hub wants it in LFS."""
        return self._upload_mode == "lfs"

    @property
    def is_ignored(self) -> bool:
        """Whether a .gitignore of the repository keeps it out, without a word."""
        return bool(self._should_ignore)


def _sample(blob: Blob) -> bytes:
    """Return the first bytes, by which the Hub tells text from the rest."""
    if isinstance(blob.source, bytes):
        return blob.source[:_SAMPLE_BYTES]
    with blob.source.open("rb") as file:
        return file.read(_SAMPLE_BYTES)
