"""
One client for GitHub's REST API: github.com, and an Enterprise Server by GITHUB_API_URL.

    gh = GitHub.from_environment()
    gh.get("pulls/7")                              # below repos/OWNER/NAME
    gh.get("/rate_limit")                          # below the address of the API
    for each in gh.paged("issues/7/comments"): ...

Every request has a deadline, repeats included. Repeated is what may pass: broken connections, 5xx,
and limits, for as long as GitHub asks for, if that is within the deadline. A mutation whose answer
was lost is repeated only if doing it twice is doing it once; otherwise `UnknownOutcomeError` says
so. In a dry run mutations are printed, not sent.

The token goes to the host of the API and nowhere else: not to a redirect, not into an error, a log
or a dry run. No answer is believed to be small, to be JSON or to end.

Sources: docs.github.com, "Best practices for using the REST API" and "Rate limits for the REST
API".
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import quote, urlencode, urljoin, urlsplit

from pipelines import __version__, console, wording
from pipelines.errors import FleetError, ParamsError, RetryLaterError
from pipelines.github.errors import BusyError, GitHubError, TooLargeError, UnknownOutcomeError
from pipelines.github.scopes import hint_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import requests

API_URL: Final = "https://api.github.com"
API_VERSION: Final = "2022-11-28"
# Seconds for one call, with all its repeats and the pauses that GitHub asks for.
DEADLINE_S: Final = 180.0
_CONNECT_WITHIN_S: Final = 10.0
_ANSWER_WITHIN_S: Final = 30.0
_BODY_WITHIN_S: Final = 60.0
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 20.0
# Attempts until a person is told that there is something to wait for.
_TOLD_AT_ATTEMPT: Final = 3
# What GitHub asks for where a secondary limit comes without a time.
_SECONDARY_PAUSE_S: Final = 60.0

# The largest answer that makes sense: 100 comments of 65,536 characters, in JSON.
MAX_ANSWER_BYTES: Final = 32 << 20
_MAX_PAGES: Final = 500
_MAX_REDIRECTS: Final = 3
_PIECE_BYTES: Final = 1 << 16
_MOST_CACHED: Final = 256
_MOST_SAID: Final = 300

_NOT_MODIFIED: Final = 304
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_LIMITS: Final = frozenset({403, 429})
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,99}/[A-Za-z0-9._-]{1,100}")
_TOKEN: Final = re.compile(r"[!-~]{1,10000}")
_NEXT_PAGE: Final = re.compile(r"<([^<>]+)>\s*;\s*rel=\"?next\"?")

Answer = Any
"""A JSON value of GitHub's; what is taken from it is looked at where it is taken."""


class Unsent(dict[str, Any]):
    """The answer to a mutation that a dry run did not send: every field is said to be unknown."""

    def __missing__(self, key: str) -> str:
        """Give a word that reads well in the next request that is printed."""
        return f"({key} of a dry run)"


@dataclass(frozen=True)
class _Reply:
    """What came back: status, headers, body in whole; or the exception in place of it."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class _Request:
    method: str
    url: str
    path: str
    data: bytes | None
    repeatable: bool = True
    patient: bool = True


@dataclass
class _Cached:
    etag: str
    reply: _Reply


class GitHub:
    """One repository of one GitHub, as one token sees it; see the module."""

    def __init__(  # noqa: PLR0913 - each is one independent fact
        self,
        repository: str,
        token: str,
        *,
        api_url: str = API_URL,
        dry_run: bool = False,
        deadline_s: float = DEADLINE_S,
        answer_within_s: float = _ANSWER_WITHIN_S,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Know where the repository is; nothing is asked yet.

        Args:
            repository: OWNER/NAME.
            token: Of an App's installation, of a job, or of a person.
            api_url: https, or plain http on this machine.
            dry_run: Print what would be changed, and change nothing.
            deadline_s: Seconds for each call, with its repeats.
            answer_within_s: Seconds without a byte after which a connection is given up.
            sleep: For tests.
            clock: For tests.

        Raises:
            ParamsError: One of them cannot be.
        """
        if not _REPOSITORY.fullmatch(repository) or repository.endswith(("/.", "/..")):
            raise ParamsError(
                f"GITHUB_REPOSITORY is {console.clean(repository)[:100]!r}, not OWNER/NAME.",
                hint="Under Actions the runner sets it; elsewhere export it yourself.",
            )
        if not _TOKEN.fullmatch(token):
            raise ParamsError(
                "GITHUB_TOKEN is empty, or holds what no token has: a space or a line end.",
                hint="Set it to the token alone; in a workflow: GITHUB_TOKEN: ${{ github.token }}.",
            )
        self.repository = repository
        self.dry_run = dry_run
        self.api_url = _checked_api(api_url)
        self._token = token
        self._deadline_s = deadline_s
        self._answer_within_s = answer_within_s
        self.pause = sleep
        self._clock = clock
        self._cache: dict[str, _Cached] = {}
        self._session: requests.Session | None = None

    @classmethod
    def from_environment(cls, *, dry_run: bool = False, deadline_s: float = DEADLINE_S) -> Self:
        """
        Read GITHUB_REPOSITORY, GITHUB_TOKEN and GITHUB_API_URL, as a runner sets them.

        Raises:
            ParamsError: One of them is missing or cannot be.
        """
        return cls(
            os.environ.get("GITHUB_REPOSITORY", ""),
            os.environ.get("GITHUB_TOKEN", "").strip(),
            api_url=os.environ.get("GITHUB_API_URL") or API_URL,
            dry_run=dry_run,
            deadline_s=deadline_s,
        )

    def __repr__(self) -> str:
        """Name the repository; never the token."""
        return f"GitHub({self.repository!r}, api_url={self.api_url!r}, dry_run={self.dry_run})"

    @property
    def owner(self) -> str:
        """Whose repository it is."""
        return self.repository.partition("/")[0]

    @property
    def is_installation(self) -> bool:
        """Whether the token is that of a job or of an App, which is no user."""
        return self._token.startswith("ghs_")

    # --- reading

    def get(self, path: str, **query: str | int | None) -> Answer:
        """
        Return the JSON at a path.

        Args:
            path: Below repos/OWNER/NAME; with a leading slash, below the address of the API.
            query: Parameters; None is left out.

        Raises:
            GitHubError: It is refused or not there (`.status`), or is no JSON.
            RetryLaterError: It cannot be had before the deadline.
        """
        return self._json(self._asked(self._request("GET", path, query=query)), "GET", path)

    def find(self, path: str, **query: str | int | None) -> Answer | None:
        """Return the JSON at a path; None if there is none. Otherwise as `get`."""
        try:
            return self.get(path, **query)
        except GitHubError as error:
            if error.status == 404:  # noqa: PLR2004 - not found
                return None
            raise

    def exists(self, path: str) -> bool:
        """Say whether there is something, where the answer has no body. Otherwise as `get`."""
        try:
            self._asked(self._request("GET", path))
        except GitHubError as error:
            if error.status == 404:  # noqa: PLR2004 - not found
                return False
            raise
        return True

    def paged(
        self, path: str, key: str | None = None, **query: str | int | None
    ) -> Iterator[dict[str, Any]]:
        """
        Yield every entry of a list, page after page.

        Args:
            path: As in `get`.
            key: Where the list is in the answer: `artifacts`; None if it is the answer.
            query: Parameters; pages of 100 unless `per_page` says otherwise.

        Raises:
            GitHubError, RetryLaterError: See `get`. Also if a page leads to another host.
        """
        request = self._request("GET", path, query={"per_page": 100, **query})
        seen: set[str] = set()
        while True:
            seen.add(request.url)
            reply = self._asked(request)
            page = self._json(reply, "GET", path)
            entries = page.get(key) if key is not None and isinstance(page, dict) else page
            if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
                raise self._nonsense("GET", path, "is no list")
            yield from entries
            following = _NEXT_PAGE.search(reply.headers.get("Link", ""))
            if following is None:
                return
            url = urljoin(request.url, following[1])
            if _origin(url) != _origin(self.api_url):
                raise self._nonsense("GET", path, "leads to another host for its next page")
            if url in seen or len(seen) >= _MAX_PAGES:
                raise self._nonsense("GET", path, "does not end")
            request = _Request("GET", url, request.path, None)

    def download(self, path: str, limit_bytes: int) -> bytes:
        """
        Return bytes that GitHub keeps elsewhere: it redirects, and the token stays behind.

        Args:
            path: As in `get`.
            limit_bytes: Beyond which they are not read.

        Raises:
            GitHubError: See `get`; also if there are more bytes than that.
            RetryLaterError: See `get`.
        """
        request = self._request("GET", path)
        until_s = self._clock() + self._deadline_s
        # The address of the second host is good for a minute: it is asked for anew each time.
        for attempt in range(1, 100):
            reply = self._asked(request, follow=False, limit_bytes=limit_bytes)
            if reply.status not in _REDIRECTS:
                return reply.body
            try:
                return self._foreign(reply.headers.get("Location", ""), path, limit_bytes)
            except _PassingError as error:
                if self._clock() >= until_s or attempt == 5:  # noqa: PLR2004 - enough of them
                    raise self._given_up(request, error, attempt) from error
                self.pause(min(until_s - self._clock(), _pause_s(attempt)))
        raise AssertionError  # pragma: no cover

    # --- changing

    def post(self, path: str, body: Mapping[str, Any], *, repeatable: bool = False) -> Answer:
        """
        Make something new; `repeatable` if making it twice is making it once.

        Raises:
            GitHubError: It is refused.
            RetryLaterError: It cannot be done before the deadline.
            UnknownOutcomeError: Nobody knows whether it was done.
        """
        return self._mutated("POST", path, body, repeatable=repeatable)

    def patch(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        repeatable: bool = True,
        patient: bool = True,
    ) -> Answer:
        """
        Change something to a value that does not depend on what it was. Raises: see `post`.

        Not `patient`, where what is there may be newer by the time that GitHub asks to wait:
        `BusyError` instead of another attempt.
        """
        return self._mutated("PATCH", path, body, repeatable=repeatable, patient=patient)

    def put(self, path: str, body: Mapping[str, Any]) -> Answer:
        """Replace something. Raises: see `post`."""
        return self._mutated("PUT", path, body, repeatable=True)

    def delete(self, path: str) -> None:
        """Remove something; that it is not there (404) is what was wanted. Raises: see `post`."""
        with contextlib.suppress(_GoneError):
            self._mutated("DELETE", path, None, repeatable=True)

    def _mutated(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        repeatable: bool,
        patient: bool = True,
    ) -> Answer:
        request = self._request(method, path, body=body, repeatable=repeatable, patient=patient)
        if self.dry_run:
            shown = json.dumps(body, ensure_ascii=False, sort_keys=True) if body is not None else ""
            console.out(console.clean(f"{method} {request.path} {shown}".rstrip()))
            return Unsent()
        reply = self._asked(request)
        return self._json(reply, method, path) if reply.body else {}

    # --- one request

    def _request(  # noqa: PLR0913 - what a request is made of
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int | None] | None = None,
        body: Mapping[str, Any] | None = None,
        repeatable: bool = True,
        patient: bool = True,
    ) -> _Request:
        below = path if path.startswith("/") else f"/repos/{self.repository}/{path}"
        if any(part in {".", ".."} for part in below.split("/")):
            # Clients and servers shorten such a path to another one.
            raise GitHubError(
                f"{console.clean(path)[:200]!r} is no path.", method=method, path=path
            )
        asked = {key: value for key, value in (query or {}).items() if value is not None}
        url = f"{self.api_url}{below}" + (f"?{urlencode(asked)}" if asked else "")
        data = None
        if body is not None:
            data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        return _Request(method, url, below, data, repeatable, patient)

    def _asked(
        self, request: _Request, *, follow: bool = True, limit_bytes: int = MAX_ANSWER_BYTES
    ) -> _Reply:
        """Make a request until it is answered, refused, or late."""
        until_s = self._clock() + self._deadline_s
        attempt = 0
        while True:
            attempt += 1
            try:
                reply = self._followed(request, follow=follow, limit_bytes=limit_bytes)
                return self._accepted(request, reply, follow=follow)
            except _PassingError as error:
                left_s = until_s - self._clock()
                pause_s = error.pause_s if error.pause_s is not None else _pause_s(attempt)
                if error.uncertain and not request.repeatable:
                    raise UnknownOutcomeError(
                        f"{_named(request)}: {error.text}; nobody knows whether it was done.",
                        hint="Look at what is there, then run the job again.",
                    ) from error
                if pause_s > left_s:
                    raise self._given_up(request, error, attempt) from error
                if not request.patient:
                    raise BusyError(f"{_named(request)}: {error.text}.", pause_s) from error
                if error.pause_s is not None:
                    console.info(f"GitHub asks to wait {pause_s:.0f} s: {error.text}.")
                elif attempt == _TOLD_AT_ATTEMPT:
                    # A wrong address looks like this, too: nobody is to wait for it unsaid.
                    console.info(f"{_named(request)}: {error.text}; going on for {left_s:.0f} s.")
                self.pause(pause_s)

    def _followed(self, request: _Request, *, follow: bool, limit_bytes: int) -> _Reply:
        """Make one attempt; a redirect on the same host is followed, as of a renamed repository."""
        url = request.url
        for _ in range(_MAX_REDIRECTS):
            reply = self._once(request, url, limit_bytes)
            if not follow or reply.status not in _REDIRECTS:
                return reply
            url = urljoin(url, reply.headers.get("Location", ""))
            kept = reply.status in {307, 308} or request.method == "GET"
            if _origin(url) != _origin(self.api_url) or not kept:
                raise self._nonsense(request.method, request.path, "is a redirect elsewhere")
        raise self._nonsense(request.method, request.path, "is one redirect after another")

    def _once(self, request: _Request, url: str, limit_bytes: int) -> _Reply:
        headers = {
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {self._token}",
            "X-GitHub-Api-Version": API_VERSION,
        }
        cached = self._cache.get(url) if request.method == "GET" else None
        if cached:
            headers["If-None-Match"] = cached.etag
        if request.data is not None:
            headers["Content-Type"] = "application/json"
        reply = self._sent(request.method, url, headers, request.data, limit_bytes)
        if cached and reply.status == _NOT_MODIFIED:
            return cached.reply
        etag = reply.headers.get("ETag")
        if request.method == "GET" and reply.status == 200 and etag:  # noqa: PLR2004 - OK
            if len(self._cache) >= _MOST_CACHED:
                self._cache.clear()
            self._cache[url] = _Cached(etag, reply)
        return reply

    def _sent(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        data: bytes | None,
        limit_bytes: int,
    ) -> _Reply:
        """
        Put one request on the wire and read its answer.

        Raises:
            _PassingError: The connection broke, or the answer does not come or end in time.
            GitHubError: The answer is larger than `limit_bytes`; the address is none.
        """
        from pipelines.stores import oci_login, transfer  # noqa: PLC0415 - with requests

        try:
            answer = self._opened().request(
                method,
                url,
                headers=dict(headers),
                data=data,
                stream=True,
                allow_redirects=False,
                timeout=(_CONNECT_WITHIN_S, self._answer_within_s),
                verify=oci_login.authorities(),
                proxies=_proxies(url),
                auth=oci_login.no_auth,
            )
            with contextlib.closing(answer):
                body = self._body(answer, limit_bytes)
        except FleetError:
            raise
        except Exception as error:  # noqa: BLE001 - read and raised as ours
            found = transfer.failure_of(error)
            text = self._hidden(str(_root(error)))
            if found is not None and found.passing:
                raise _PassingError(text, uncertain=True) from None
            raise GitHubError(
                f"{method} {_shown(url)} cannot be asked: {text}.",
                method=method,
                hint="Check GITHUB_API_URL, the proxy, and for an Enterprise Server with an "
                "authority of its own SSL_CERT_FILE.",
            ) from None
        return _Reply(answer.status_code, answer.headers, body)

    def _body(self, answer: requests.Response, limit_bytes: int) -> bytes:
        """Read a body to its end, within its limits of size and time."""
        data = bytearray()
        until_s = time.monotonic() + _BODY_WITHIN_S
        # As it was sent: "identity" was asked for, and packed bytes could become any number.
        while chunk := answer.raw.read1(_PIECE_BYTES, decode_content=False):
            data += chunk
            if len(data) > limit_bytes:
                raise TooLargeError(
                    f"{_shown(answer.url)} has more than {limit_bytes} bytes; it was not read.",
                    status=answer.status_code,
                )
            if time.monotonic() > until_s:
                raise TimeoutError(f"only {len(data)} bytes came in {_BODY_WITHIN_S:.0f} s")
        told = answer.headers.get("Content-Length", "")
        whole = answer.status_code == _NOT_MODIFIED or told in {"", str(len(data))}
        if not whole:
            raise ConnectionError("the answer ended too early")
        return bytes(data)

    def _foreign(self, location: str, path: str, limit_bytes: int) -> bytes:
        """Fetch from the host that GitHub redirects to; nothing of ours goes there."""
        url = urljoin(self.api_url, location)
        for _ in range(_MAX_REDIRECTS):
            _require_secure(url, self.api_url, path)
            reply = self._sent("GET", url, {"Accept": "*/*"}, None, limit_bytes)
            if reply.status == 200:  # noqa: PLR2004 - OK
                return reply.body
            if reply.status not in _REDIRECTS:
                break
            url = urljoin(url, reply.headers.get("Location", ""))
        else:
            raise self._nonsense("GET", path, "is one redirect after another")
        if reply.status in _PASSING or reply.status in {403, 404}:
            # 403: the address is too old. 404: the storage does not know it yet.
            raise _PassingError(f"the storage answers {reply.status}")
        raise self._nonsense("GET", path, f"ends at a storage that answers {reply.status}")

    # --- what an answer means

    def _accepted(self, request: _Request, reply: _Reply, *, follow: bool) -> _Reply:
        """Return an answer that is a yes; raise what another one means."""
        status = reply.status
        if 200 <= status < 300 or (not follow and status in _REDIRECTS):  # noqa: PLR2004 - HTTP
            return reply
        said = self._said(reply)
        if status in _LIMITS and (pause_s := _limit_pause_s(reply, said)) is not None:
            # Refused before anything was done.
            raise _PassingError(said or "a rate limit was reached", pause_s=pause_s)
        if status in _PASSING:
            raise _PassingError(
                f"GitHub answers {status}" + (f" ({said})" if said else ""),
                pause_s=_retry_after_s(reply),
                uncertain=True,
            )
        kind = _GoneError if status in {404, 410} and request.method == "DELETE" else GitHubError
        raise kind(
            f"GitHub answers {status} to {_named(request)}" + (f": {said}." if said else "."),
            status=status,
            method=request.method,
            path=request.path,
            hint=hint_of(status, request.method, request.path),
        )

    def _json(self, reply: _Reply, method: str, path: str) -> Answer:
        try:
            return json.loads(reply.body)
        except (ValueError, RecursionError):
            raise self._nonsense(method, path, "is no JSON") from None

    def _said(self, reply: _Reply) -> str:
        """Return what GitHub says of a refusal, in its own words."""
        try:
            told = json.loads(reply.body)
            words = [str(told["message"])]
            for each in told.get("errors") or []:
                more = each.get("message") or each.get("code") if isinstance(each, dict) else each
                words.append(str(more))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return ""
        return self._hidden(", ".join(words)).rstrip(".")

    def _hidden(self, text: str) -> str:
        """Return text of somebody else's for people: without the token, cleaned, short."""
        text = text.replace(self._token, "***")
        return console.clean(" ".join(text.split()))[:_MOST_SAID]

    def _nonsense(self, method: str, path: str, what: str) -> GitHubError:
        return GitHubError(
            f"The answer to {method} {console.clean(path)[:200]} {what}.",
            method=method,
            path=path,
            hint="Something between here and GitHub answers in its place: check GITHUB_API_URL "
            "and the proxy.",
        )

    def _given_up(self, request: _Request, error: _PassingError, attempt: int) -> RetryLaterError:
        tried = wording.counted(attempt, "attempt")
        when = ""
        if error.pause_s is not None:
            when = f" GitHub asks to wait {error.pause_s:.0f} s."
        return RetryLaterError(
            f"{_named(request)}: {error.text}, after {tried} in {self._deadline_s:.0f} s.{when}",
            hint="Run the job again later: what was done is not done twice.",
        )

    def _opened(self) -> requests.Session:
        """Return the session; no .netrc, no redirect, no cookie, no packing."""
        if self._session is None:
            import requests  # noqa: PLC0415 - 0.1 s, and only where GitHub is asked

            session = requests.Session()
            session.trust_env = False
            session.headers["User-Agent"] = f"gguf-fleet/{__version__}"
            session.headers["Accept-Encoding"] = "identity"
            session.cookies.set_policy(_no_cookies())
            # Following is decided here: requests would read the body of a redirect, whole.
            session.get_redirect_target = lambda resp: None  # type: ignore[method-assign] # noqa: ARG005
            self._session = session
        return self._session


class _PassingError(Exception):
    """
    A failure that may be otherwise in a while.

    Attributes:
        text: What happened, as a clause.
        pause_s: How long GitHub asks to wait; None if it does not say.
        uncertain: Whether the request may have been carried out all the same.
    """

    def __init__(self, text: str, *, pause_s: float | None = None, uncertain: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.pause_s = pause_s
        self.uncertain = uncertain


class _GoneError(GitHubError):
    """What was to be removed is not there."""


def quoted(text: str) -> str:
    """Return text as one part of a path: a slash in it is none between parts."""
    return quote(text, safe="")


def ref_path(branch: str) -> str:
    """Return a branch's name for the paths of the Git data API, in which its slashes stay."""
    return quote(f"heads/{branch}", safe="/")


def taken(answer: Answer, key: str, kind: type[Any]) -> Any:  # noqa: ANN401 - of `kind`
    """
    Return a field of an answer that has to be there.

    Raises:
        GitHubError: It is not, or is something else.
    """
    value = answer.get(key) if isinstance(answer, dict) else None
    if isinstance(answer, Unsent):
        return answer[key] if kind is str else kind()
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise GitHubError(
            f"An answer of GitHub lacks {key!r}.",
            hint="Something between here and GitHub answers in its place.",
        )
    return value


def _checked_api(api_url: str) -> str:
    """
    Return the address of the API without a slash at its end.

    Raises:
        ParamsError: The token would travel in clear, or the address is none.
    """
    from pipelines.stores.addresses import is_private_way  # noqa: PLC0415 - small

    try:
        parts = urlsplit(api_url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        usable = usable and not (parts.username or parts.query or parts.fragment)
    except ValueError:
        usable = False
    if not usable:
        raise ParamsError(
            f"GITHUB_API_URL is {console.clean(api_url)[:100]!r}, which is no address of an API.",
            hint="https://api.github.com, or https://HOST/api/v3 of an Enterprise Server.",
        )
    if not is_private_way(api_url):
        raise ParamsError(
            f"GITHUB_API_URL is {console.clean(api_url)[:100]}: the token would travel in clear.",
            hint="Use https.",
        )
    return api_url.rstrip("/")


def _require_secure(url: str, api_url: str, path: str) -> None:
    """Refuse a storage that is this machine or speaks in clear, unless the API is so itself."""
    from pipelines.stores.addresses import is_link_local, is_loopback  # noqa: PLC0415 - small

    parts = urlsplit(url)
    local = is_loopback(urlsplit(api_url).hostname)
    fine = parts.scheme == "https" and not is_loopback(parts.hostname)
    fine = fine and not is_link_local(parts.hostname)
    if not (fine or (local and parts.scheme in {"http", "https"})):
        raise GitHubError(
            f"GET {path} leads to {_shown(url)}, from which nothing is read.",
            method="GET",
            path=path,
            hint="The storage of an Enterprise Server is to be reachable over https.",
        )


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    return parts.scheme, parts.hostname or "", port or {"http": 80}.get(parts.scheme, 443)


def _shown(url: str) -> str:
    """Return scheme, host and path of an address; its query may hold a signature."""
    parts = urlsplit(url)
    return console.clean(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")[:200]


def _named(request: _Request) -> str:
    return f"{request.method} {console.clean(request.path)[:200]}"


def _proxies(url: str) -> dict[str, str]:
    """Return the proxies of the environment, but for this machine."""
    import requests  # noqa: PLC0415 - see _opened

    from pipelines.stores.addresses import is_loopback  # noqa: PLC0415 - small

    if is_loopback(urlsplit(url).hostname or ""):
        return {}
    return dict(requests.utils.get_environ_proxies(url))


def _no_cookies() -> Any:  # noqa: ANN401 - DefaultCookiePolicy
    from http.cookiejar import DefaultCookiePolicy  # noqa: PLC0415 - with requests

    return DefaultCookiePolicy(allowed_domains=[])


def _pause_s(attempt: int) -> float:
    """Return a random pause that grows; not all clients come back at once (full jitter)."""
    longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(attempt - 1, 30))
    return random.uniform(0, longest_s)  # noqa: S311 - no secret


def _root(error: BaseException) -> BaseException:
    """Return what an exception was raised from in the end."""
    for _ in range(20):
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return error


def _retry_after_s(reply: _Reply) -> float | None:
    from pipelines.stores import transfer  # noqa: PLC0415 - with requests

    return transfer.retry_after_s(reply.headers)


def _limit_pause_s(reply: _Reply, said: str) -> float | None:
    """
    Return how long a limit asks to wait; None if the refusal is none.

    In GitHub's order: Retry-After; the reset of a primary limit that is used up; a minute for a
    secondary limit without a time, and for any other 429.
    """
    asked_s = _retry_after_s(reply)
    if asked_s is not None:
        return asked_s + random.uniform(0, _FIRST_PAUSE_S)  # noqa: S311 - not all at that second
    if reply.headers.get("x-ratelimit-remaining") == "0":
        reset = reply.headers.get("x-ratelimit-reset", "")
        if reset.isascii() and reset.isdecimal() and len(reset) < 12:  # noqa: PLR2004 - a year's
            return max(0.0, int(reset) - time.time()) + 1.0
        return _SECONDARY_PAUSE_S
    lower = said.lower()
    if reply.status == 429 or "rate limit" in lower or "abuse detection" in lower:  # noqa: PLR2004
        return _SECONDARY_PAUSE_S
    return None
