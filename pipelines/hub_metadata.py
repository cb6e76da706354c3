"""
What the Hub says about a repository, without its weights: one answer for each question.

    look       the listing at what is tracked: a branch, or the newest tag of a pattern
    at         the listing of one commit
    commits    titles from one commit back to another, or that there is no such way
    read_file  a small file, held against the digest of its listing
    read_range bytes of a file, the header of its weights say; nothing but their number is proven

The session is huggingface_hub's: its proxies, its token, its headers. Its functions are not: they
read an answer of any size for any time, wait as long as a `Retry-After` says, follow a redirect to
wherever it leads, and read the whole history of a repository where ten commits would do. Here every
answer is bounded in bytes, every request ends by one deadline for all, what is worth it is repeated
after a jittered pause, and a listing is only ever taken from the endpoint itself.

A deadline is an instant of `time.monotonic()`, in seconds.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import json
import os
import random
import re
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import quote, urljoin, urlsplit

from pipelines import __version__, console, wording
from pipelines.errors import DigestError, MachineError, RetryLaterError, UpstreamError
from pipelines.hub import RemoteFile
from pipelines.hub_download import LONG_PAUSE_S, shown_address
from pipelines.version_tags import newest_tag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pipelines.hub import Gate
    from pipelines.upstream_records import Doubt

_LIBRARY: Final = "gguf-fleet"
# A listing of 10,000 files with digests has 3 MB.
MAX_LISTING_BYTES: Final = 32 << 20
MAX_COMMITS_PAGE_BYTES: Final = 4 << 20
# Of one repository are looked through, newest first, before its history counts as another one.
MAX_COMMITS: Final = 2000
TITLES_KEPT: Final = 50
_TITLE_CHARACTERS: Final = 160
_TOO_BUSY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS: Final = 5
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_TAG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_REPOSITORY: Final = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,99})?"
)
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_NEXT_PAGE: Final = re.compile(r"<([^<>]{1,2000})>\s*;[^,]*\brel=\"?next\"?")
_MOST_FILES: Final = 100_000


class DoubtError(UpstreamError):
    """The Hub's answer says that a person has to look; `doubt` is the word for why."""

    def __init__(self, doubt: Doubt, message: str, *, hint: str = "") -> None:
        """Say why; see `UpstreamError`."""
        super().__init__(message, hint=hint)
        self.doubt = doubt


@dataclass(frozen=True, kw_only=True)
class Head:
    """
    A repository at one commit, as its listing describes it. All text is a stranger's.

    Attributes:
        id: owner/name, as the Hub calls it now; another one than was asked for after a rename.
        repository_id: The Hub's own id of the repository; None if the answer has none.
        owner: User or organisation; None if the answer has none.
        sha: Commit, 40 hex digits.
        tag: That was chosen, where tags are tracked.
        last_modified: When the Hub got that commit, by its own clock; None if it does not say.
        gated: How its files are guarded; None if everybody may have them.
        disabled: Whether the Hub itself has shut it.
        files: With size and digest.
        undigested: Names of files that are listed without size or digest, or twice with different
            ones, or that are no text: nobody can verify them.
    """

    id: str
    repository_id: str | None
    owner: str | None
    sha: str
    tag: str | None = None
    last_modified: datetime | None
    gated: Gate | None
    disabled: bool
    files: tuple[RemoteFile, ...]
    undigested: tuple[str, ...] = ()


@dataclass(frozen=True)
class Commits:
    """
    The way back from a commit.

    Attributes:
        titles: Of the commits before `since` was met, newest first; the first `TITLES_KEPT`.
        is_ancestor: Whether `since` was met.
        looked_count: Commits that were looked through.
    """

    titles: tuple[str, ...]
    is_ancestor: bool
    looked_count: int


class Reader(Protocol):
    """Who asks the Hub, for any number of repositories, from any number of threads."""

    @property
    def requests_count(self) -> int:
        """Requests that were sent so far, repeats and redirects included."""
        ...

    @property
    def was_answered(self) -> bool:
        """Whether the Hub, or whoever is in its place, has said anything at all yet."""
        ...

    def look(self, repo: str, track: str) -> Head:
        """Return what is tracked: a branch, or the newest tag that matches a pattern."""
        ...

    def at(self, repo: str, revision: str) -> Head:
        """Return the listing of one commit."""
        ...

    def commits(self, repo: str, ref: str, since: str) -> Commits:
        """Walk from the commit `ref` back to the commit `since`."""
        ...

    def read_file(self, repo: str, revision: str, file: RemoteFile, max_bytes: int) -> bytes:
        """Return a small file, verified."""
        ...

    def read_range(self, repo: str, revision: str, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file, not verified."""
        ...


def look(repo: str, track: str, *, deadline: float) -> Head:
    """
    Ask once what is tracked of a repository; see `HubReader.look`.

    Args:
        repo: owner/name.
        track: Branch, or pattern of tags.
        deadline: Instant of `time.monotonic()`.
    """
    return HubReader(deadline=deadline).look(repo, track)


def endpoint() -> str:
    """
    Return the address of the Hub: HF_ENDPOINT now, else that of the Hub itself.

    What huggingface_hub calls ENDPOINT is what the variable was when it was first imported.

    Raises:
        MachineError: HF_ENDPOINT is no address, or another variable of huggingface_hub is odd.
    """
    try:
        from huggingface_hub import constants  # noqa: PLC0415 - 0.2 s, and only for hf: sources
    except ValueError as error:
        raise MachineError(
            f"huggingface_hub cannot read its own variables: {_words(error)}.",
            hint="Look at those that begin with HF_: env | grep ^HF_",
        ) from error
    address = (os.environ.get("HF_ENDPOINT") or constants.HUGGINGFACE_CO_URL_HOME).rstrip("/")
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        told = wording.quoted(shown_address(address))
        raise MachineError(
            f"HF_ENDPOINT is {told}, which is no address of a Hub.",
            hint="It begins with https://, or is not set at all.",
        )
    return address


class HubReader:
    """The real `Reader`."""

    def __init__(  # noqa: PLR0913 - each is one independent fact, named at the call
        self,
        *,
        deadline: float,
        attempts: int = 4,
        connect_timeout_s: float = 5.0,
        timeout_s: float = 10.0,
        answer_s: float = 60.0,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Prepare; nothing is asked yet.

        Args:
            deadline: Instant of `time.monotonic()` by which the last answer has to be here.
            attempts: How often a question is put to a Hub that is busy or out of reach.
            connect_timeout_s: For a connection.
            timeout_s: Without a byte.
            answer_s: For all bytes of one answer: who drips does not answer.
            pause: Waits between two attempts.
        """
        self._deadline = deadline
        self._attempts = attempts
        self._timeouts = (connect_timeout_s, timeout_s)
        self._answer_s = answer_s
        self._pause = pause
        self._lock = threading.Lock()
        self._requests_count = 0
        self._was_answered = False
        # Why the endpoint cannot be reached at all, once that is known: then nobody waits again.
        self._unreachable: str | None = None

    @property
    def requests_count(self) -> int:
        """Requests that were sent so far, repeats and redirects included."""
        return self._requests_count

    @property
    def was_answered(self) -> bool:
        """Whether the Hub, or whoever is in its place, has said anything at all yet."""
        return self._was_answered

    # --- questions ---

    def look(self, repo: str, track: str) -> Head:
        """
        Return what is tracked: one request, two where it is a pattern of tags.

        Args:
            repo: owner/name.
            track: Branch; with a `*` a pattern of tags, of which the highest version counts
                (`newest_tag`).

        Raises:
            DoubtError: The repository, the branch or such a tag is not there or not for us.
            RetryLaterError: The Hub cannot be reached, is too busy, or answers nonsense.
            UpstreamError: It refuses for another reason.
        """
        if "*" not in track:
            return self._listing(repo, track, missing="track-gone")
        refs = self._json(repo, f"/api/models/{repo}/refs", missing="gone")
        tags = {}
        for entry in _list_of(refs, "tags"):
            name, commit = entry.get("name"), entry.get("targetCommit")
            if not isinstance(name, str) or not isinstance(commit, str):
                continue
            if _TAG.fullmatch(name) and _COMMIT.fullmatch(commit):
                tags[name] = commit
        tag = newest_tag(track, tags)
        if tag is None:
            raise DoubtError(
                "track-gone",
                f"hf:{repo} has no tag that matches {track}.",
                hint="Declare another `track`, or remove it to follow the branch main.",
            )
        head = self._listing(repo, tags[tag], missing="track-gone", commit=tags[tag])
        return Head(**(vars(head) | {"tag": tag}))

    def at(self, repo: str, revision: str) -> Head:
        """
        Return the listing of one commit: one request.

        Raises:
            DoubtError: The repository or the commit is not there or not for us.
            RetryLaterError, UpstreamError: See `look`.
        """
        return self._listing(repo, revision, missing="revision-gone", commit=revision)

    def commits(self, repo: str, ref: str, since: str) -> Commits:
        """
        Walk from a commit back to another: a request for each page that the Hub makes of it.

        Args:
            repo: owner/name.
            ref: Commit to start from.
            since: Commit to find.

        Raises:
            DoubtError, RetryLaterError, UpstreamError: See `look`.
        """
        path: str | None = f"/api/models/{repo}/commits/{quote(ref, safe='')}"
        titles: list[str] = []
        looked = 0
        while path is not None and looked < MAX_COMMITS:
            page = self._answer(
                repo, path, MAX_COMMITS_PAGE_BYTES, missing="track-gone", stays=True
            )
            for entry in _objects(_parsed(repo, page.body)):
                if entry.get("id") == since:
                    return Commits(tuple(titles), is_ancestor=True, looked_count=looked)
                looked += 1
                if len(titles) < TITLES_KEPT:
                    titles.append(_title(entry.get("title")))
            path = self._next_page(page, path)
        return Commits(tuple(titles), is_ancestor=False, looked_count=looked)

    def read_file(self, repo: str, revision: str, file: RemoteFile, max_bytes: int) -> bytes:
        """
        Return a small file, held against the digest of its listing.

        Args:
            repo: owner/name.
            revision: Commit.
            file: An entry of that commit's listing.
            max_bytes: That are wanted at most.

        Raises:
            UpstreamError: It is larger than `max_bytes`.
            DigestError: The bytes are not those of the listing.
            DoubtError, RetryLaterError: See `look`.
        """
        where = f"{file.name} of hf:{repo} at {revision[:12]}"
        if file.size_bytes > max_bytes:
            raise UpstreamError(
                f"{where} has {file.size_bytes:,} bytes; {max_bytes:,} are looked at."
            )
        body = self._answer(
            repo,
            _resolve(repo, revision, file.name),
            file.size_bytes,
            missing="revision-gone",
            may_leave=True,
        ).body
        if file.sha256 is not None:
            wanted, found = file.sha256, hashlib.sha256(body).hexdigest()
        else:
            blob = b"blob %d\0" % len(body) + body
            wanted, found = (
                str(file.git_sha1),
                hashlib.sha1(blob, usedforsecurity=False).hexdigest(),
            )
        if len(body) != file.size_bytes or wanted != found:
            raise DigestError(
                f"{where} is not what the Hub lists: wanted {wanted} ({file.size_bytes} bytes), "
                f"got {found} ({len(body)} bytes).",
                hint="A proxy or a mirror changed it. Nothing was kept; try again.",
            )
        return body

    def read_range(self, repo: str, revision: str, name: str, start: int, end: int) -> bytes:
        """
        Return the bytes [start, end) of a file. No digest covers a part: nothing is proven by it.

        Args:
            repo: owner/name.
            revision: Commit.
            name: Path in the repository.
            start: First byte.
            end: Byte after the last one; the file may be shorter.

        Raises:
            UpstreamError: The answer is another part than was asked for.
            DoubtError, RetryLaterError: See `look`.
        """
        answer = self._answer(
            repo,
            _resolve(repo, revision, name),
            end - start,
            missing="revision-gone",
            may_leave=True,
            part=(start, end),
        )
        told = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        if told is None or int(told[1]) != start or int(told[2]) - start + 1 != len(answer.body):
            raise UpstreamError(
                f"{name} of hf:{repo}: asked for bytes {start} to {end - 1}, got something else."
            )
        return answer.body

    # --- answers ---

    def _listing(
        self, repo: str, revision: str, *, missing: Doubt, commit: str | None = None
    ) -> Head:
        path = f"/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
        told = self._json(repo, path, missing=missing)
        head = _head(repo, told)
        if commit is not None and head.sha != commit:
            raise UpstreamError(
                f"hf:{repo} answers revision {commit[:12]} with {head.sha[:12]}.",
                hint="A mirror or a proxy answers with what it has. Ask the Hub itself.",
            )
        return head

    def _json(self, repo: str, path: str, *, missing: Doubt) -> dict[str, Any]:
        body = self._answer(repo, path, MAX_LISTING_BYTES, missing=missing).body
        told = _parsed(repo, body)
        if not isinstance(told, dict):
            raise _nonsense(repo)
        return told

    def _next_page(self, page: _Answer, path: str) -> str | None:
        """Return the path of the next page, below the endpoint; None if this is the last one."""
        found = _NEXT_PAGE.search(page.headers.get("link", ""))
        if found is None:
            return None
        # A mirror hands on the Hub's own address; asked is who was asked before.
        prefix = urlsplit(endpoint()).path
        try:
            place = urlsplit(urljoin(endpoint() + path, found[1]))
        except ValueError:
            return None
        following = f"{place.path.removeprefix(prefix)}?{place.query}"
        return following if following.startswith("/api/models/") and following != path else None

    def _answer(  # noqa: PLR0913 - each is one independent fact, named at the call
        self,
        repo: str,
        path: str,
        max_bytes: int,
        *,
        missing: Doubt,
        may_leave: bool = False,
        stays: bool = False,
        part: tuple[int, int] | None = None,
    ) -> _Answer:
        """
        Ask until there is an answer, or none to be had in time.

        Args:
            repo: For messages.
            path: Below the endpoint.
            max_bytes: Of the answer.
            missing: The doubt if the Hub knows the repository but not what was asked of it.
            may_leave: Whether a redirect may lead to another host, as the Hub's to its storage.
            stays: Whether the answer itself does not name the repository: then none may be
                redirected, as those of a repository that was renamed are.
            part: [start, end) of the file; None for all of it.
        """
        attempt = 0
        while True:
            attempt += 1
            self._require_reachable(repo)
            try:
                return self._once(
                    repo, path, max_bytes, missing, may_leave=may_leave, stays=stays, part=part
                )
            except _AgainError as fault:
                wait_s = fault.wait_s
                if wait_s is None:
                    # Full jitter: a hundred watchers must not come back in step.
                    wait_s = random.uniform(0.2, 1) * min(2.0 ** (attempt - 1), 8)  # noqa: S311
                left_s = self._deadline - time.monotonic()
                if attempt < self._attempts and wait_s < left_s:
                    if wait_s >= LONG_PAUSE_S:
                        console.info(f"hf:{repo}: {fault.said} Again in {wait_s:.0f} s.")
                    self._pause(wait_s)
                    continue
                self._give_up(repo, fault, left_s)

    def _require_reachable(self, repo: str) -> None:
        """Spare whoever comes later the time in which the first found out."""
        if self._unreachable is not None:
            raise RetryLaterError(
                f"hf:{repo}: {self._unreachable}",
                hint="Check the network, the proxy and HF_ENDPOINT.",
            )
        if self._deadline <= time.monotonic():
            raise RetryLaterError(f"hf:{repo}: the time for the look was over.", hint="Try again.")

    def _give_up(self, repo: str, fault: _AgainError, left_s: float) -> None:
        if fault.is_unreachable and not self._was_answered:
            self._unreachable = fault.said
        when = ""
        if fault.wait_s is not None and fault.wait_s >= left_s:
            then = datetime.fromtimestamp(time.time() + fault.wait_s, UTC)
            when = f" It asks to be left alone until {then:%Y-%m-%d %H:%M:%S} UTC."
        raise RetryLaterError(
            f"hf:{repo}: {fault.said}{when}",
            hint="Check the network, the proxy and HF_ENDPOINT, then try again."
            if fault.is_unreachable
            else "Try again later; a token (HF_TOKEN) has a larger allowance than none.",
        ) from fault.__cause__

    def _once(  # noqa: PLR0913 - see _answer
        self,
        repo: str,
        path: str,
        max_bytes: int,
        missing: Doubt,
        *,
        may_leave: bool,
        stays: bool,
        part: tuple[int, int] | None,
    ) -> _Answer:
        base = endpoint()
        url = base + path
        for _ in range(_MOST_REDIRECTS + 1):
            answer = self._get(url, base, max_bytes, part, is_file=may_leave)
            if answer.status not in _REDIRECTS:
                break
            try:
                url = urljoin(url, answer.headers.get("location", ""))
            except ValueError:
                raise _nonsense(repo) from None
            if stays:
                raise DoubtError(
                    "renamed", f"hf:{repo} was renamed while we looked.", hint="Look again."
                )
            if not may_leave and not url.startswith(base + "/"):
                raise UpstreamError(
                    f"hf:{repo}: the Hub sends us to {console.clean(urlsplit(url).netloc)[:100]}, "
                    "which nobody declared.",
                    hint="If that is your mirror, set HF_ENDPOINT to it.",
                )
        else:
            raise UpstreamError(
                f"hf:{repo}: the Hub sends us in a circle.", hint="Check HF_ENDPOINT and the proxy."
            )
        self._was_answered = True
        if answer.status in {200, 206}:
            return answer
        if answer.status in _TOO_BUSY:
            raise _AgainError(
                f"the Hub answers {answer.status}.", wait_s=_retry_after_s(answer.headers)
            )
        raise _refusal(repo, answer, missing)

    def _get(
        self, url: str, base: str, max_bytes: int, part: tuple[int, int] | None, *, is_file: bool
    ) -> _Answer:
        """Send one request and read its answer as far as it may go."""
        import httpx2  # noqa: PLC0415 - 0.2 s, and only for hf: sources
        from huggingface_hub.errors import OfflineModeIsEnabled  # noqa: PLC0415 - the same

        client, headers = _session()
        if not url.startswith(base + "/"):
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        if part is not None:
            headers |= {"range": f"bytes={part[0]}-{part[1] - 1}", "accept-encoding": "identity"}
        connect_s, read_s = self._timeouts
        left_s = max(self._deadline - time.monotonic(), 0.01)
        timeout = httpx2.Timeout(min(read_s, left_s), connect=min(connect_s, left_s))
        with self._lock:
            self._requests_count += 1
        try:
            with client.stream(
                "GET", url, headers=headers, timeout=timeout, follow_redirects=False
            ) as response:
                self._was_answered = True
                body = b"".join(self._chunks(response, max_bytes, is_file=is_file))
                return _Answer(response.status_code, dict(response.headers), body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            said = f"{shown_address(base)} cannot be reached: {_words(error)}."
            raise _AgainError(said, is_unreachable=True) from error
        except OfflineModeIsEnabled as error:
            raise RetryLaterError(
                "HF_HUB_OFFLINE is set: neither the Hub nor a mirror is asked.",
                hint="Unset it. Without a way to the Hub: HF_ENDPOINT names a mirror, and a "
                "`path:` source needs none.",
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            said = f"the answer of {shown_address(base)} broke off: {_words(error)}."
            raise _AgainError(said) from error

    def _chunks(self, response: Any, max_bytes: int, *, is_file: bool) -> Iterator[bytes]:  # noqa: ANN401 - httpx2.Response
        """
        Yield the body; a drip is cut by the deadline, a flood by the size.

        Of a file that is longer than it should be no more is read than that: the caller sees by
        digest or range that it is not what was asked for, and asking again would not help.
        """
        is_error = response.status_code not in {200, 206}
        end = min(self._deadline, time.monotonic() + self._answer_s)
        size = 0
        # As they arrive: pieces of a size would be waited for, however slowly they come.
        for chunk in response.iter_bytes():
            size += len(chunk)
            if size > max_bytes:
                if is_error or is_file:
                    return
                raise _AgainError(f"an answer has more than {max_bytes:,} bytes.")
            yield chunk
            if end <= time.monotonic():
                raise _AgainError("the answer did not end in time.")


# --- parts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class _AgainError(Exception):
    """It failed in a way that may pass."""

    def __init__(
        self, said: str, *, wait_s: float | None = None, is_unreachable: bool = False
    ) -> None:
        super().__init__(said)
        self.said = said
        self.wait_s = wait_s
        self.is_unreachable = is_unreachable


def _session() -> tuple[Any, dict[str, str]]:
    """
    Return huggingface_hub's session and headers: proxies, the token, and who we are.

    Raises:
        MachineError: A proxy or certificates that are set for this machine cannot be used.
        UpstreamError: What is set as the token is none.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    import httpx2  # noqa: PLC0415 - 0.2 s, and only for hf: sources
    from huggingface_hub import utils as hub  # noqa: PLC0415 - the same

    try:
        told = hub.build_hf_headers(  # type: ignore[attr-defined]
            library_name=_LIBRARY, library_version=__version__
        )
        client = hub.get_session()  # type: ignore[attr-defined]
    except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
        raise MachineError(
            f"what this machine has set for its network cannot be used: {_words(error)}.",
            hint="Look at HTTPS_PROXY, ALL_PROXY (no SOCKS), SSL_CERT_FILE and SSL_CERT_DIR.",
        ) from error
    headers = {str(name): str(value) for name, value in told.items()}
    if not headers.get("authorization", "").isascii():
        raise UpstreamError(
            "the token has characters that none has.",
            hint="Set HF_TOKEN again, without what came along when it was copied.",
        )
    return client, headers


def _resolve(repo: str, revision: str, name: str) -> str:
    return f"/{repo}/resolve/{quote(revision, safe='')}/{quote(name)}"


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Read Retry-After, seconds or an HTTP date; None if there is none that means anything."""
    told = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(?:\.\d{1,9})?", told):
        return float(told)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        when = email.utils.parsedate_to_datetime(told)
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return max(when.timestamp() - time.time(), 0.0)
    return None


def _refusal(repo: str, answer: _Answer, missing: Doubt) -> UpstreamError:
    """Say what a refusal means. Codes are those that huggingface_hub knows (utils/_http.py)."""
    code = answer.headers.get("x-error-code", "")
    said = console.clean(answer.headers.get("x-error-message", ""))[:200]
    access = (
        "Look at its page. If it is there, set HF_TOKEN to a token that may read it (under "
        "Actions: a secret of that name), and accept the model's conditions."
    )
    if code == "GatedRepo":
        return DoubtError("gated", f"hf:{repo} is gated, and we have no access.", hint=access)
    if said == "Access to this resource is disabled.":
        return DoubtError(
            "disabled", f"hf:{repo} was disabled by the Hub.", hint="Declare another source."
        )
    if code == "RevisionNotFound" or (answer.status == 404 and code == "EntryNotFound"):  # noqa: PLR2004
        what = "such commit" if missing == "revision-gone" else "such branch or tag"
        return DoubtError(
            missing if missing != "gone" else "track-gone",
            f"hf:{repo} has no {what}.",
            hint="Look at its branches and commits on the Hub.",
        )
    if said == "Invalid credentials in Authorization header":
        return UpstreamError(
            "the Hub refuses our token.", hint="Renew HF_TOKEN: it is wrong or has expired."
        )
    if code == "RepoNotFound" or answer.status in {401, 404, 410, 451}:
        return DoubtError(
            "gone", f"hf:{repo} is not there, or is private or gated for us.", hint=access
        )
    return UpstreamError(
        f"hf:{repo}: the Hub answers {answer.status}{f' ({said})' if said else ''}.", hint=access
    )


def _words(error: BaseException) -> str:
    step = error
    while (deeper := step.__cause__ or step.__context__) is not None:
        step = deeper
    text = str(step).strip().split("\n")[0] or type(step).__name__
    return console.clean(text)[:200].rstrip(".")


def _nonsense(repo: str) -> RetryLaterError:
    return RetryLaterError(
        f"hf:{repo}: what answers does not speak as the Hub does.",
        hint="A proxy or a login page may be between. Check the network and HF_ENDPOINT.",
    )


def _parsed(repo: str, body: bytes) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise _nonsense(repo) from None


def _objects(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _list_of(told: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    return _objects(told.get(name))


def _title(value: object) -> str:
    return (_line(value) or "(no title)")[:_TITLE_CHARACTERS]


def _line(value: object) -> str:
    """Make one harmless line of text; a lone surrogate, which no file can hold, becomes a `?`."""
    text = value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""
    return " ".join(console.clean(text).split())


def _head(repo: str, told: Mapping[str, Any]) -> Head:
    """Read a listing; what is of another shape is none."""
    id_, sha, disabled = told.get("id"), told.get("sha"), told.get("disabled")
    if (
        not isinstance(id_, str)
        or not _REPOSITORY.fullmatch(id_)
        or not isinstance(sha, str)
        or not _COMMIT.fullmatch(sha)
    ):
        raise _nonsense(repo)
    files: dict[str, RemoteFile] = {}
    undigested: set[str] = set()
    siblings = _list_of(told, "siblings")
    if len(siblings) > _MOST_FILES:
        raise UpstreamError(
            f"hf:{repo} has more than {_MOST_FILES:,} files.",
            hint="If that is so on its page, declare another source.",
        )
    for sibling in siblings:
        file, name = _file(sibling), sibling.get("rfilename")
        if not isinstance(name, str):
            continue
        if name != name.encode("utf-8", "replace").decode():
            undigested.add(_line(name))
        elif file is None or files.setdefault(name, file) != file:
            undigested.add(name)
    gated = told.get("gated")
    return Head(
        id=id_,
        repository_id=_word(told.get("_id")),
        owner=_word(told.get("author")) or (id_.partition("/")[0] if "/" in id_ else None),
        sha=sha,
        last_modified=_instant(told.get("lastModified")),
        gated=None if not gated else "auto" if gated == "auto" else "manual",
        disabled=disabled is True,
        files=tuple(file for name, file in files.items() if name not in undigested),
        undigested=tuple(sorted(undigested)),
    )


def _file(sibling: Mapping[str, Any]) -> RemoteFile | None:
    """Take over one entry of a listing; None if it cannot be verified by it."""
    name, size, blob, lfs = (sibling.get(key) for key in ("rfilename", "size", "blobId", "lfs"))
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
    if not isinstance(name, str) or isinstance(size, bool) or not isinstance(size, int):
        return None
    if not 0 <= size < 1 << 60:
        return None
    if isinstance(sha256, str) and _SHA256.fullmatch(sha256):
        return RemoteFile(name=name, size_bytes=size, sha256=sha256)
    if lfs is None and isinstance(blob, str) and _COMMIT.fullmatch(blob):
        return RemoteFile(name=name, size_bytes=size, git_sha1=blob)
    return None


def _word(value: object) -> str | None:
    return _line(value)[:200] or None


def _instant(value: object) -> datetime | None:
    """Read a time as the Hub writes it: 2026-11-01T12:00:00.000Z."""
    with contextlib.suppress(ValueError, TypeError):
        when = datetime.fromisoformat(str(value))
        return when if when.tzinfo else when.replace(tzinfo=UTC)
    return None
