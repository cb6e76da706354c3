"""
How a registry of OCI is spoken to: over TLS where it can be, with the login for it alone.

Plain HTTP goes to this machine, or where `insecure: true` says so. A redirect, the address of an
upload and a token service are the registry's word, and followed only where they cannot hurt: over
https, never to this machine or to a link-local address unless the registry is there itself, and
never with the login, but to a token service on the registry's own host or the declared one.

Logins: GGUF_FLEET_<NAME>_USERNAME and _PASSWORD, else what `docker login` wrote into config.json
(credential helpers are not run).

Source: distribution 2.8, docs/spec/auth/token.md.
"""

from __future__ import annotations

import contextlib
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3.exceptions

from pipelines import __version__, console
from pipelines.errors import StoreError
from pipelines.stores import transfer
from pipelines.stores.addresses import is_link_local, is_loopback
from pipelines.stores.oci_answers import (
    MAX_TOKEN_BYTES,
    AnswerError,
    address_of,
    body_of,
    is_page,
    let_go,
    object_of,
)
from pipelines.stores.oci_login import (
    authorities,
    basic,
    credentials,
    no_auth,
    origin_of,
    variables,
)
from pipelines.stores.oci_source import Body

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from pipelines.params import Registry

T = TypeVar("T")

_MAX_REDIRECTS: Final = 5
_CONNECT_WITHIN_S: Final = 10.0
ANSWER_WITHIN_S: Final = 60.0
_PROBE_WITHIN_S: Final = 30.0

_OK: Final = 200
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_UNAUTHORIZED: Final = 401
_HTTP_ERROR: Final = 400
SUCCESSES: Final = frozenset({200, 201, 202, 204})

_CHALLENGE: Final = re.compile(r"([a-z_]+)=\"([^\"]*)\"", re.IGNORECASE)
# What requests says of an address before it goes anywhere.
_NO_ADDRESS: Final = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
    urllib3.exceptions.LocationParseError,
    UnicodeError,
)


class _Session(requests.Session):
    """A session to which no answer is a redirect: `Http.asked` decides where one leads."""

    def get_redirect_target(self, resp: requests.Response) -> None:  # noqa: ARG002
        """Say nothing: requests would read the body, whole and unpacked, also not to follow it."""
        return


class Http:
    """One registry at one host; see the module."""

    def __init__(self, name: str, registry: Registry, *, deadline_s: float) -> None:
        """
        Know the registry `name`; nothing is asked of it yet.

        Args:
            name: Its key in params.yaml, from which the names of its credentials come.
            registry: Its declaration, `oci://host[:port]/namespace`.
            deadline_s: Seconds for which a request that fails is repeated.
        """
        self.name = name
        self.host, _, self.namespace = registry.url.removeprefix("oci://").partition("/")
        self.shown = registry.url
        self._hostname = urlsplit(f"//{self.host}").hostname or ""
        self._is_local = is_loopback(self._hostname)
        self._insecure = registry.insecure
        self._token_host = urlsplit(registry.endpoint).hostname if registry.endpoint else None
        self._deadline_s = deadline_s
        self._session = _Session()
        # Neither .netrc nor what the environment says of proxies for a server on this machine.
        self._session.trust_env = False
        self._session.headers["User-Agent"] = f"gguf-fleet/{__version__}"
        # As it is: a blob that was unpacked on the way has another digest.
        self._session.headers["Accept-Encoding"] = "identity"
        self._origin: str | None = None
        self._basic: str | None = None
        self._tokens: dict[str, str] = {}
        self._scopes: dict[str, list[str]] = {}

    def retried(self, what: str, call: Callable[[], T]) -> T:
        """Make a step that can be repeated; see `transfer.retrying`."""
        return transfer.retrying(
            what, call, deadline_s=self._deadline_s, credentials=self._credential_names()
        )

    @contextmanager
    def asked(  # noqa: PLR0913 - each is one independent fact about a request
        self,
        method: str,
        address: str,
        repository: str,
        headers: dict[str, str],
        *,
        data: bytes | Body | None = None,
        stream: bool = False,
        follow: bool = False,
        within_s: float = ANSWER_WITHIN_S,
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
        origin = self.origin()
        what = f"{self.shown}: {method}"
        url = address_of(origin, address, what)
        own = origin_of(url) == origin_of(origin)
        answer = self._once(method, url, repository if own else None, headers, data, within_s)
        try:
            if answer.status_code == _UNAUTHORIZED and own and self._logged_in(answer, repository):
                let_go(answer)
                if isinstance(data, Body):
                    # Half of the body may be gone: the next attempt asks where the upload stands.
                    if data.refusals >= 1:
                        raise AnswerError(answer)
                    data.source.refusals += 1
                    raise ConnectionError("the login expired while it was sent")
                answer = self._once(method, url, repository, headers, data, within_s)
            elif isinstance(data, Body) and answer.status_code < _HTTP_ERROR:
                data.source.refusals = 0
            for _ in range(_MAX_REDIRECTS if follow else 0):
                if answer.status_code not in _REDIRECTS:
                    break
                target = address_of(url, answer.headers.get("Location", ""), what)
                self.require_secure(target)
                let_go(answer)
                url = target
                answer = self._once(method, url, None, headers, None, within_s)
            yield answer
        finally:
            if stream:
                answer.close()  # the rest of a blob may be long
            else:
                let_go(answer)

    def _once(  # noqa: PLR0913, PLR0917 - what a request is made of
        self,
        method: str,
        url: str,
        repository: str | None,
        headers: dict[str, str],
        data: bytes | Body | None,
        within_s: float,
    ) -> requests.Response:
        """
        Make one request; `repository` None means without any login.

        Its body is still on the wire: who reads it says how much of it makes sense.

        Raises:
            StoreError: The registry gave an address that is none.
        """
        shown = dict(headers)
        if repository is not None:
            login = f"Bearer {self._tokens[repository]}" if repository in self._tokens else None
            login = login or self._basic
            if login:
                shown["Authorization"] = login
        return self._sent(method, url, shown, data=data, within_s=within_s)

    def _sent(  # noqa: PLR0913 - what a request is made of
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        *,
        data: bytes | Body | None = None,
        query: list[tuple[str, str]] | None = None,
        within_s: float = ANSWER_WITHIN_S,
    ) -> requests.Response:
        try:
            return self._session.request(
                method,
                url,
                params=query,
                headers=headers,
                data=data,
                stream=True,
                allow_redirects=False,
                timeout=(_CONNECT_WITHIN_S, within_s),
                verify=authorities(),
                proxies=self._proxies(url),
                auth=no_auth,
            )
        except _NO_ADDRESS as error:
            raise StoreError(
                f"{self.shown} sends to {_shown_host(url)!r}, which is no address."
            ) from error

    def _proxies(self, url: str) -> dict[str, str]:
        """Return the proxies of the environment, but for this machine."""
        if is_loopback(urlsplit(url).hostname or ""):
            return {}
        return dict(requests.utils.get_environ_proxies(url))

    def origin(self) -> str:
        """Return `scheme://host:port`, after finding out once whether it speaks TLS."""
        if self._origin is None:
            self._origin = self.retried(f"{self.shown}: connecting", self._find_origin)
        return self._origin

    def _find_origin(self) -> str:
        """
        Try TLS first; plain HTTP only where that is allowed and the server does not speak TLS.

        A certificate that is not trusted is an error everywhere: nothing falls back from it.
        """
        try:
            self._once("GET", f"https://{self.host}/v2/", None, {}, None, _PROBE_WITHIN_S).close()
        except requests.exceptions.SSLError as error:
            found = transfer.failure_of(error)
            if found is not None and not found.passing:
                raise StoreError(
                    f"{self.shown}: its certificate is not trusted: "
                    f"{console.clean(str(error.args[0]))[-200:]}.",
                    hint="A private authority: SSL_CERT_FILE=ca.crt. There is no way to skip this.",
                ) from error
            if not (self._is_local or self._insecure):
                raise StoreError(
                    f"{self.shown} does not speak TLS, and is not on this machine.",
                    hint="Serve it over TLS (deploy/registry/nginx-tls.conf), or, on a network "
                    f"that you trust, declare `insecure: true` for registries.{self.name}.",
                ) from error
        except requests.exceptions.ConnectionError:
            if not (self._is_local or self._insecure):
                raise
        else:
            return f"https://{self.host}"
        self._once("GET", f"http://{self.host}/v2/", None, {}, None, _PROBE_WITHIN_S).close()
        return f"http://{self.host}"

    def require_secure(self, url: str) -> None:
        """
        Refuse to go where the registry sends us, if that could hurt; see the module.

        Raises:
            StoreError: It could.
        """
        if self._may_be_asked(url):
            return
        raise StoreError(
            f"{self.shown} sends to {_shown_host(url)}, over which nothing is sent or read.",
            hint="The registry is to give out https addresses of other machines than this one; on "
            f"a network that you trust declare `insecure: true` for registries.{self.name}.",
        )

    def _may_be_asked(self, url: str) -> bool:
        """Tell whether an address that the registry named is one that it may send us to."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        if not host or parts.scheme not in {"http", "https"}:
            return False
        if is_loopback(host):
            # Another machine has no business with the servers of this one.
            return self._is_local
        if is_link_local(host) and host != self._hostname:
            return False
        return parts.scheme == "https" or self._insecure

    def require(self, answer: requests.Response, statuses: Collection[int], what: str) -> None:
        """Raise what an answer means unless its status is one of those and it is no web page."""
        if is_page(answer) and (answer.status_code in SUCCESSES or answer.status_code in statuses):
            raise StoreError(
                f"{what}: a web page came instead of an answer: the login page of a proxy, or no "
                "registry at all.",
                hint=f"Check registries.{self.name}.url in params.yaml, and the proxy.",
            )
        if answer.status_code in statuses:
            return
        if answer.status_code in _REDIRECTS:
            raise StoreError(
                f"{what}: the registry answers {answer.status_code} and sends elsewhere.",
                hint=f"Declare the address that it sends to in registries.{self.name}.url.",
            )
        raise AnswerError(answer)

    # --- login

    def _credential_names(self) -> str:
        user, password = variables(self.name)
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
            login = credentials(self.name, self.host)
            if login is not None:
                self._basic = basic(login)
                return True
        return False

    def _token(self, asked: dict[str, str], repository: str) -> str:
        """Fetch a token from the service that the registry names."""
        realm = address_of("", asked.get("realm", ""), f"{self.shown}: logging in")
        where = _shown_host(realm)
        if not self._may_be_asked(realm):
            raise StoreError(
                f"{self.shown} asks to log in at {where}, which is no https address.",
                hint="The registry's operator has to configure its token service with https.",
            )
        login = credentials(self.name, self.host)
        if login is not None and urlsplit(realm).hostname not in {self._hostname, self._token_host}:
            raise StoreError(
                f"{self.shown} asks to send the login to another host: {where}. It was not sent.",
                hint=f"If that is its token service, declare `endpoint: {where}` for "
                f"registries.{self.name} in params.yaml.",
            )
        scopes = self._scopes.setdefault(repository, [])
        scope = asked.get("scope", f"repository:{repository}:pull,push" if repository else "")
        if scope and scope not in scopes:
            scopes.append(scope)
        query = [("scope", each) for each in scopes]
        if "service" in asked:
            query.append(("service", asked["service"]))
        answer = self._sent(
            "GET", realm, {"Authorization": basic(login)} if login else {}, query=query
        )
        what = f"{self.shown}: logging in at {where}"
        with contextlib.closing(answer):
            self.require(answer, {_OK}, what)
            value = object_of(body_of(answer, MAX_TOKEN_BYTES, what), what)
        token = value.get("token") or value.get("access_token")
        if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
            raise StoreError(f"{what}: it gives no token.")
        return token


def _shown_host(url: str) -> str:
    """Return scheme, host and port of an address that somebody else made, for people."""
    parts = urlsplit(url)
    return console.clean(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")[:100]
