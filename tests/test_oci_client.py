"""The client of OCI registries believes nothing, sends nothing twice, and keeps logins at home."""

from __future__ import annotations

import base64
import contextlib
import http.server
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import release_factory as factory
import requests
from faulty_proxy import Fault, FaultyProxy, Seen

from pipelines import params, publishing
from pipelines.errors import DigestError, FleetError, RetryLaterError, StoreError
from pipelines.release_records import STABLE
from pipelines.stores import addresses, oci_http, oci_login, transfer
from pipelines.stores.base import Blob
from pipelines.stores.oci import OciStore
from pipelines.stores.oci_client import OCI_MANIFEST, OciClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from registry_servers import OciServer

ROOT: Final = Path(__file__).resolve().parent.parent
MODEL: Final = factory.MODEL
PART_BYTES: Final = 100_000
FILE: Final = factory.gguf_bytes(7, "Q8_0", 350_000)
BLOB: Final = Blob(
    name="tiny-llama-Q8_0.gguf",
    sha256=factory.sha256(FILE),
    size_bytes=len(FILE),
    media_type="application/vnd.ollama.image.model",
    source=FILE,
)


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login, proxy or memory of this machine's user; pauses that a test can wait for."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(transfer, "_FIRST_PAUSE_S", 0.001)
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def login(oci: OciServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The publisher's login, as the registry `production`."""
    for name, value in oci.environment("production").items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def proxy(oci: OciServer, login: None) -> Iterator[FaultyProxy]:
    """A way to the publishers' port that makes faults."""
    assert login is None
    with FaultyProxy(f"http://{oci.push}") as found:
        yield found


_namespaces = itertools.count()


def declared(address: str, **changes: Any) -> params.Registry:
    """Declare a registry with a namespace that no other test has."""
    address = address.removeprefix("http://")
    name = f"client-{os.getpid()}-{next(_namespaces)}"
    return params.Registry(**({"url": f"oci://{address}/{name}"} | changes))


def client(address: str, **changes: Any) -> OciClient:
    """Open a client that gives up after two seconds."""
    return OciClient(
        "production", declared(address, **changes), deadline_s=2, part_bytes=PART_BYTES
    )


def repository(opened: OciClient) -> str:
    """Name the repository of the model."""
    return f"{opened.namespace}/{MODEL}"


def upload(opened: OciClient, blob: Blob = BLOB) -> int:
    """Send a blob."""
    return opened.upload(repository(opened), blob, lambda _: None)


def read(opened: OciClient, offset: int = 0) -> bytes:
    """Read it back."""
    return b"".join(opened.read_blob(repository(opened), BLOB.sha256, offset=offset))


# --- every request may fail -------------------------------------------------------------------

PASSING: Final = {
    "500": Fault("status", status=500),
    "503": Fault("status", status=503, headers={"Retry-After": "0"}),
    "429": Fault("status", status=429, headers={"Retry-After": "0"}),
    "no answer": Fault("refuse"),
    "answer lost": Fault("lose"),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_publish_in_which_every_kind_of_request_fails_is_whole(
    fault: Fault, proxy: FaultyProxy, tmp_path: Path
) -> None:
    """The first of each kind, and every fifth; each is made again, and all is read back."""
    made = factory.composed(tmp_path / "files", types=("Q8_0",), size_bytes=150_000)
    registry = declared(proxy.endpoint)
    hit: set[tuple[str, str]] = set()

    def fits(seen: Seen) -> bool:
        place = re.sub(r".*/(uploads|blobs|manifests|tags|v2)/.*", r"\1", seen.path)
        is_first = (seen.method, place) not in hit
        hit.add((seen.method, place))
        return is_first or seen.number % 5 == 0

    proxy.strike(fault, when=fits, times=-1)
    opened = OciClient("production", registry, deadline_s=60, part_bytes=PART_BYTES)
    store = OciStore("production", registry, client=opened)

    publishing.publish(made, store, factory.ledger(tmp_path), stable="latest", by=factory.by())

    failed = {seen.method for seen in proxy.seen if seen.fault}
    proxy.forget()
    assert failed >= {"GET", "HEAD", "POST", "PATCH", "PUT"}
    id_, release, _ = publishing.resolve(store, MODEL, STABLE)
    assert id_ == made.id
    for file in release.files:
        assert factory.sha256(b"".join(store.read_blob(MODEL, file.sha256))) == file.sha256


def test_a_registry_that_goes_on_failing_is_left_for_later(proxy: FaultyProxy) -> None:
    """Exit code 75, and the sentence says that nothing is sent twice."""
    opened = client(proxy.endpoint)
    proxy.strike(Fault("status", status=503), times=-1)

    with pytest.raises(RetryLaterError, match="503"):
        upload(opened)


def test_a_page_is_never_taken_for_an_answer(proxy: FaultyProxy, tmp_path: Path) -> None:
    """A login page with status 200, at whichever request, is an error that says so."""
    made = factory.composed(tmp_path / "files", types=("Q8_0",))
    registry = declared(proxy.endpoint)

    def store() -> OciStore:
        return OciStore(
            "production", registry, client=OciClient("production", registry, deadline_s=2)
        )

    publishing.publish(made, store(), factory.ledger(tmp_path), stable="latest", by=factory.by())
    asked: dict[str, Callable[[OciStore], object]] = {
        "alias": lambda each: each.read_alias(MODEL, STABLE),
        "release": lambda each: each.read_release(MODEL, made.id),
        "releases": lambda each: each.list_releases(MODEL),
        "models": lambda each: each.list_models(),
        "size": lambda each: each.blob_size(MODEL, made.blobs[0].sha256),
        "blob": lambda each: b"".join(each.read_blob(MODEL, made.blobs[0].sha256)),
        "prepare": lambda each: each.prepare(MODEL),
        "write": lambda each: each.put_blob(MODEL, BLOB, lambda _: None),
        "delete": lambda each: each.delete_release(MODEL, made.id),
    }
    for what, ask in asked.items():
        proxy.forget()
        # The first request only finds out how the server speaks.
        proxy.strike(Fault("html"), when=lambda seen: seen.path != "/v2/", times=-1)
        with pytest.raises(StoreError, match="web page"):
            ask(store())
        assert any(seen.fault for seen in proxy.seen), what
    proxy.forget()
    assert publishing.resolve(store(), MODEL, STABLE)[0] == made.id


# --- uploads ----------------------------------------------------------------------------------


def test_a_large_file_goes_in_parts_and_arrives(proxy: FaultyProxy) -> None:
    """Each byte is sent once; reading from an offset gives the rest."""
    opened = client(proxy.endpoint)

    assert upload(opened) == len(FILE)

    parts = [seen.sent_bytes for seen in proxy.seen if seen.method == "PATCH"]
    assert parts == [PART_BYTES, PART_BYTES, PART_BYTES, 50_000]
    assert opened.blob_size(repository(opened), BLOB.sha256) == len(FILE)
    assert read(opened) == FILE
    assert read(opened, 123_456) == FILE[123_456:]
    assert read(opened, len(FILE)) == b""


def test_after_a_cut_only_what_is_missing_is_sent(proxy: FaultyProxy) -> None:
    """The registry gets whole parts alone from nginx: it goes on where the last one ended."""
    opened = client(proxy.endpoint)
    third = itertools.count(1)
    proxy.strike(
        Fault("cut_request", after_bytes=65_536),
        when=lambda seen: seen.method == "PATCH" and next(third) == 3,
    )

    upload(opened)

    assert read(opened) == FILE
    assert proxy.sent_bytes <= len(FILE) + PART_BYTES


KILLED: Final = """\
    import os, signal, sys
    sys.path[:0] = [{root!r}, {root!r} + "/tests"]
    import test_oci_client as ours
    from pipelines import params
    from pipelines.stores.oci_client import OciClient
    opened = OciClient("production", params.Registry(url={url!r}), part_bytes=ours.PART_BYTES)

    def killed(done_bytes):
        if done_bytes > 250_000:
            os.kill(os.getpid(), signal.SIGKILL)

    opened.upload(ours.repository(opened), ours.BLOB, killed)
"""


def test_after_a_kill_the_next_run_sends_only_the_rest(proxy: FaultyProxy) -> None:
    """The process is killed in the third part; two are there, and are not sent again."""
    registry = declared(proxy.endpoint)
    program = textwrap.dedent(KILLED).format(root=str(ROOT), url=registry.url)
    done = subprocess.run([sys.executable, "-c", program], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    proxy.forget()
    opened = OciClient("production", registry, deadline_s=2, part_bytes=PART_BYTES)

    sent_bytes = upload(opened)

    assert sent_bytes == len(FILE) - 2 * PART_BYTES
    assert proxy.sent_bytes == sent_bytes
    assert read(opened) == FILE


def test_a_forgotten_upload_is_begun_anew(proxy: FaultyProxy, oci: OciServer) -> None:
    """The registry swept what a killed publisher left; the file is sent whole."""
    opened = client(proxy.endpoint)

    def dies(done_bytes: int) -> None:
        if done_bytes > 250_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened.upload(repository(opened), BLOB, dies)
    for left in (oci.directory / "docker/registry/v2/repositories" / repository(opened)).rglob(
        "data"
    ):
        left.unlink()

    assert upload(opened) == len(FILE)
    assert read(opened) == FILE


def test_a_registry_without_parts_gets_the_file_in_one(proxy: FaultyProxy) -> None:
    """First one PATCH of all, then one PUT of all, as it lets us."""
    for always in (False, True):
        proxy.forget()

        def refused(seen: Seen, always: bool = always) -> bool:  # noqa: FBT001 - bound
            return seen.method == "PATCH" and (always or "content-range" in seen.headers)

        proxy.strike(Fault("status", status=405), when=refused, times=-1)
        opened = client(proxy.endpoint)
        upload(opened)
        proxy.forget()
        assert read(opened) == FILE


def test_a_source_with_other_bytes_gets_no_name(proxy: FaultyProxy) -> None:
    """Small or large, in parts or in one."""
    for size in (1000, 350_000):
        wrong = Blob(
            name="x.gguf",
            sha256=factory.sha256(b"another"),
            size_bytes=size,
            media_type="",
            source=bytes(size),
        )
        opened = client(proxy.endpoint)
        with pytest.raises(DigestError, match=r"x\.gguf"):
            upload(opened, wrong)
        assert opened.blob_size(repository(opened), wrong.sha256) is None


def test_a_file_is_read_once(proxy: FaultyProxy, tmp_path: Path) -> None:
    """Hashing and sending share one pass."""
    path = tmp_path / "x.gguf"
    path.write_bytes(FILE)
    opened = client(proxy.endpoint)
    opened.connect()
    before = _read_characters()

    upload(opened, Blob(**{**vars(BLOB), "source": path}))

    # Answers and a few small files beside it.
    assert _read_characters() - before < len(FILE) + 100_000


def _read_characters() -> int:
    """Bytes that this thread's process has read, of files and of sockets by read(2)."""
    text = Path("/proc/thread-self/io").read_text()
    return int(dict(line.split(": ") for line in text.splitlines())["rchar"])


# --- lies -------------------------------------------------------------------------------------


def test_a_cut_download_is_taken_up_where_it_broke(proxy: FaultyProxy) -> None:
    """By a Range; what came before is not asked for again."""
    opened = client(proxy.endpoint)
    upload(opened)
    proxy.forget()
    proxy.strike(Fault("cut", after_bytes=200_000), when=lambda seen: seen.method == "GET", times=1)

    assert read(opened) == FILE
    assert sum(seen.received_bytes for seen in proxy.seen) < len(FILE) + 66_000


def test_changed_bytes_of_a_manifest_are_an_error(proxy: FaultyProxy, tmp_path: Path) -> None:
    """A bit flipped on the way, in the manifest or in the document of an alias."""
    made = factory.composed(tmp_path / "files", types=("Q8_0",))
    registry = declared(proxy.endpoint)
    store = OciStore("production", registry, client=OciClient("production", registry, deadline_s=2))
    publishing.publish(made, store, factory.ledger(tmp_path), stable="latest", by=factory.by())
    asked: tuple[Callable[[], object], ...] = (
        lambda: store.read_alias(MODEL, STABLE),
        lambda: store.read_release(MODEL, made.id),
    )
    for part in ("/manifests/", "/blobs/"):

        def fits(seen: Seen, part: str = part) -> bool:
            return seen.method == "GET" and part in seen.path

        for ask in asked:
            proxy.forget()
            proxy.strike(Fault("corrupt", after_bytes=100), when=fits)
            with pytest.raises(FleetError, match=r"sha256|JSON"):
                ask()


class Liar(http.server.BaseHTTPRequestHandler):
    """A registry whose answers a test writes; remembers every request."""

    protocol_version = "HTTP/1.1"
    answers: Callable[[Liar], None]
    seen: list[tuple[str, str, dict[str, str]]]

    def answer(self) -> None:
        """Note the request and let the test answer."""
        self.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if self.path == "/v2/":
            self.say(200)
        else:
            type(self).answers(self)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Answer."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers and "Transfer_Encoding" not in headers:
            self.send_header("Content-Length", str(len(body)))
        # Who is told no length, or a wrong one, waits for the end of the connection.
        self.close_connection |= headers.get("Content_Length", str(len(body))) != str(len(body))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def liar(
    answers: Callable[[Liar], None],
) -> Iterator[tuple[str, list[tuple[str, str, dict[str, str]]]]]:
    """Run a registry that answers as the test says; yield its host:port and what it was asked."""
    seen: list[tuple[str, str, dict[str, str]]] = []
    kind = type("Told", (Liar,), {"answers": staticmethod(answers), "seen": seen})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()


def test_another_digest_than_its_own_is_an_error() -> None:
    """Of a manifest, of a blob, and of what was just written."""

    def lies(told: Liar) -> None:
        told.say(
            201 if told.command == "PUT" else 200, b"{}", Docker_Content_Digest=f"sha256:{'0' * 64}"
        )

    with liar(lies) as (address, _):
        opened = client(address)
        with pytest.raises(StoreError, match="calls it sha256:0"):
            opened.manifest(repository(opened), "stable")
        with pytest.raises(StoreError, match="calls it sha256:0"):
            opened.blob_size(repository(opened), BLOB.sha256)
        with pytest.raises(StoreError, match="calls it sha256:0"):
            read(opened)
        with pytest.raises(StoreError, match="answers with the digest"):
            opened.put_manifest(repository(opened), "x", b"{}", OCI_MANIFEST)


def test_a_body_without_an_end_is_cut_off() -> None:
    """No more is read than the blob has, or than a manifest can have."""

    def endless(told: Liar) -> None:
        if told.command == "HEAD":
            told.say(200, Content_Length="1000")
            return
        told.say(200, Transfer_Encoding="chunked")
        with contextlib.suppress(OSError):
            while True:
                told.wfile.write(b"10000\r\n%b\r\n" % bytes(1 << 16))

    with liar(endless) as (address, _):
        opened = client(address)
        with pytest.raises(StoreError, match="more bytes came than the 1000"):
            read(opened)
        with pytest.raises(StoreError, match="larger than any"):
            opened.manifest(repository(opened), "stable")


def test_a_server_without_ranges_is_read_from_the_place_all_the_same() -> None:
    """It sends everything; what was not asked for is passed over."""
    with liar(lambda told: told.say(200, FILE)) as (address, _):
        assert read(client(address), 300_000) == FILE[300_000:]


def test_a_registry_that_says_no_is_no_read_only_port() -> None:
    """A refusal in JSON is told in its own words, with the variables of the login."""
    body = b'{"errors": [{"code": "DENIED", "message": "not yours\\u001b[31m"}]}'
    with (
        liar(lambda told: told.say(403, body, Content_Type="application/json")) as (address, _),
        pytest.raises(StoreError, match="DENIED: not yours") as found,
    ):
        client(address).require_writable("fleet/x")
    assert "\x1b" not in found.value.message
    assert "GGUF_FLEET_PRODUCTION_USERNAME" in found.value.hint


def test_a_short_body_is_not_whole(proxy: FaultyProxy) -> None:
    """A blob of which the registry has only a part is noticed by whoever proves it."""
    registry = declared(proxy.endpoint)
    store = OciStore("production", registry, client=OciClient("production", registry, deadline_s=2))
    store.put_blob(MODEL, BLOB, lambda _: None)
    proxy.strike(
        Fault("status", status=200, body=FILE[:-1]), when=lambda seen: seen.method == "GET"
    )

    with pytest.raises(DigestError):
        store.prove_blob(MODEL, BLOB, lambda _: None)


def test_a_list_that_does_not_end_or_leads_away_is_an_error() -> None:
    """Pages are followed on the registry's own host only, and each once."""
    for link in ("</v2/x/tags/list?n=1000>; rel=next", "<http://127.0.0.2:1/v2/>; rel=next"):

        def pages(told: Liar, link: str = link) -> None:
            told.say(
                200, b'{"tags": ["a"]}', Link=link.replace("/v2/x", told.path.split("/tags")[0])
            )

        with liar(pages) as (address, _):
            opened = client(address)
            with pytest.raises(StoreError, match=r"list|another host"):
                opened.tags(repository(opened))


def test_pages_of_a_list_are_put_together() -> None:
    """Whether the next address has a host or not."""

    def pages(told: Liar) -> None:
        if "last=b" in told.path:
            told.say(200, b'{"tags": ["c"]}')
        else:
            told.say(200, b'{"tags": ["a", "b"]}', Link=f'<{told.path}&last=b>; rel="next"')

    with liar(pages) as (address, _):
        opened = client(address)
        assert opened.tags(repository(opened)) == ("a", "b", "c")


NOWHERE: Final = "http://[::1/x"
# What no registry may answer, by what is wrong with it; each is said in words.
IMPOSSIBLE: Final[dict[str, dict[str, Any]]] = {
    "a size that is no digit of ours": {"status": 200, "Content_Length": "\u00b2"},
    "a size of 5,000 digits": {"status": 200, "Content_Length": "9" * 5000},
    "a negative size": {"status": 200, "Content_Length": "-1"},
    "a range of 5,000 digits": {"status": 202, "Range": f"0-{'9' * 5000}", "Location": "/v2/x"},
    "an address that is none": {"status": 202, "Location": NOWHERE},
    "a redirect to nowhere": {"status": 307, "Location": NOWHERE},
    "a redirect to a file": {"status": 307, "Location": "file:///etc/passwd"},
    "a host that cannot be": {"status": 202, "Location": f"https://{'a' * 300}.example.org/x"},
    "a login nowhere": {"status": 401, "WWW_Authenticate": f'Bearer realm="{NOWHERE}"'},
    "a refusal of brackets": {"status": 400, "body": b"[" * 4096},
    "a list of brackets": {"status": 200, "body": b"[" * 100_000},
    "numbers for names": {"status": 200, "body": b'{"tags": [1], "manifests": 7}'},
    "packed": {"status": 200, "body": b"{}", "Content_Encoding": "gzip"},
}


@pytest.mark.parametrize("impossible", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_answer_that_cannot_be_is_an_error_in_words(impossible: dict[str, Any]) -> None:
    """Whatever is asked, nobody sees a traceback."""
    with liar(lambda told: told.say(**impossible)) as (address, _):
        opened = client(address)
        name = repository(opened)
        asked: tuple[Callable[[], object], ...] = (
            lambda: opened.manifest(name, "stable"),
            lambda: opened.manifest_sha256(name, "stable"),
            lambda: opened.blob_size(name, BLOB.sha256),
            lambda: opened.tags(name),
            lambda: read(opened, 10),
            lambda: upload(opened),
            lambda: opened.require_writable(name),
            lambda: opened.delete_manifest(name, BLOB.sha256),
        )
        failed = 0
        for ask in asked:
            try:
                ask()
            except FleetError:
                failed += 1
        assert failed >= 1


def test_an_answer_that_nobody_reads_has_an_end_all_the_same() -> None:
    """Of a write, of a removal: what follows the status is not collected."""

    def endless(told: Liar) -> None:
        told.say(201, Transfer_Encoding="chunked")
        with contextlib.suppress(OSError):
            for _ in range(1 << 16):
                told.wfile.write(b"10000\r\n%b\r\n" % bytes(1 << 16))
            ended.append(told.path)

    ended: list[str] = []
    with liar(endless) as (address, _):
        opened = client(address)
        opened.put_manifest(repository(opened), "x", b"{}", OCI_MANIFEST)
    assert ended == []


def test_a_registry_elsewhere_cannot_send_us_to_servers_of_this_machine() -> None:
    """Nor to where clouds hand out logins; its own storage over https is another matter."""
    elsewhere = oci_http.Http(
        "x", params.Registry(url="oci://registry.example.org/ns"), deadline_s=1
    )
    for url in (
        "http://127.0.0.1:11434/api/delete",
        "https://localhost/x",
        "https://127.1/x",
        "https://[::ffff:127.0.0.1]/x",
        "https://0.0.0.0/x",
        "https://169.254.169.254/latest/meta-data",
        "http://storage.example.org/x",
        "file:///etc/passwd",
        "https:///x",
    ):
        with pytest.raises(StoreError, match="nothing is sent or read"):
            elsewhere.require_secure(url)
    elsewhere.require_secure("https://storage.example.org/signed")


def test_an_address_with_the_usual_port_is_the_same_registry() -> None:
    """So the login goes along with the parts of a file."""
    assert oci_login.origin_of("https://R.example.org/v2/") == "https://r.example.org:443"
    assert oci_login.origin_of("https://r.example.org:443/x") == "https://r.example.org:443"
    assert oci_login.origin_of("http://r.example.org/x") != "https://r.example.org:443"


# --- logins -----------------------------------------------------------------------------------

USER: Final = {"GGUF_FLEET_PRODUCTION_USERNAME": "ada", "GGUF_FLEET_PRODUCTION_PASSWORD": "s3cret"}
BASIC: Final = f"Basic {base64.b64encode(b'ada:s3cret').decode()}"


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """A login of somebody called Ada."""
    for name, value in USER.items():
        monkeypatch.setenv(name, value)


def test_a_wrong_password_is_said_with_the_names_of_its_variables(
    oci: OciServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither it nor the user's name is in the message."""
    for name, value in USER.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreError) as found:
        upload(client(oci.push))

    text = f"{found.value.message} {found.value.hint}"
    assert "401" in text
    assert "GGUF_FLEET_PRODUCTION_PASSWORD" in text
    assert "s3cret" not in text


def test_half_a_login_is_an_error(oci: OciServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names what is missing."""
    monkeypatch.setenv("GGUF_FLEET_PRODUCTION_USERNAME", "ada")
    with pytest.raises(StoreError, match="_PASSWORD is not set"):
        upload(client(oci.push))


def test_dockers_login_is_used_and_its_helpers_are_not_run(
    oci: OciServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json in clear works; one that names a helper is an error that says what to set."""
    config = tmp_path / "docker/config.json"
    config.parent.mkdir()
    told = base64.b64encode(f"{oci.username}:{oci.password}".encode()).decode()
    config.write_text(json.dumps({"auths": {oci.push: {"auth": told}}}))
    assert upload(client(oci.push)) == len(FILE)

    config.write_text(json.dumps({"auths": {oci.push: {}}, "credsStore": "desktop"}))
    with pytest.raises(StoreError, match="not run here") as found:
        upload(client(oci.push))
    assert "GGUF_FLEET_PRODUCTION_USERNAME" in found.value.hint
    monkeypatch.setenv("GGUF_FLEET_PRODUCTION_USERNAME", oci.username)
    monkeypatch.setenv("GGUF_FLEET_PRODUCTION_PASSWORD", oci.password)
    upload(client(oci.push))


def test_the_port_that_everybody_reads_from_says_that_it_is_not_for_publishers(
    oci: OciServer, login: None
) -> None:
    """Before any byte is sent; and every writing method is refused there."""
    assert login is None
    store = OciStore("production", declared(oci.pull))
    with pytest.raises(StoreError, match="only reading") as found:
        store.prepare(MODEL)
    assert "5010" in found.value.hint
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        for place in ("blobs/uploads/", f"blobs/sha256:{'0' * 64}", "manifests/stable"):
            url = f"http://{oci.pull}/v2/fleet/x/{place}"
            assert requests.request(method, url, timeout=10).status_code == 403


@pytest.fixture
def tokens() -> Iterator[tuple[str, list[tuple[str, str, dict[str, str]]]]]:
    """A token service on loopback."""
    with liar(lambda told: told.say(200, b'{"token": "abc"}')) as found:
        yield found


def _challenge(address: str) -> str:
    return f'Bearer realm="http://{address}/token",service="registry",scope="repository:x:pull"'


def test_a_token_that_expires_is_fetched_again_and_the_upload_goes_on(
    oci: OciServer, tokens: tuple[str, list[tuple[str, str, dict[str, str]]]], ada: None
) -> None:
    """At every fifth request, in the middle of a file, too; the login goes to the realm alone."""
    assert ada is None
    expired = Fault("status", status=401, headers={"WWW-Authenticate": _challenge(tokens[0])})
    for turn in range(5):

        def fits(seen: Seen, turn: int = turn) -> bool:
            return seen.number % 5 == turn

        with FaultyProxy(f"http://{oci.direct}") as proxy:
            opened = client(proxy.endpoint)
            opened.connect()
            proxy.strike(expired, when=fits, times=-1)
            upload(opened)
            proxy.forget()
            assert read(opened) == FILE
            assert {seen.headers.get("authorization") for seen in proxy.seen} == {"Bearer abc"}
    assert {headers["authorization"] for _, path, headers in tokens[1] if "token" in path} == {
        BASIC
    }


def test_the_login_is_never_sent_to_a_host_that_was_not_declared(ada: None) -> None:
    """A registry that names another host gets an error, and the other host gets nothing."""
    assert ada is None
    with liar(lambda told: told.say(200, b'{"token": "abc"}')) as (elsewhere, asked):
        place = elsewhere.replace("127.0.0.1", "localhost")
        with liar(lambda told: told.say(401, WWW_Authenticate=_challenge(place))) as (address, _):
            with pytest.raises(StoreError, match="another host") as found:
                upload(client(address))
            assert asked == []
            assert "endpoint: http://localhost" in found.value.hint
            with pytest.raises(StoreError):
                upload(client(address, endpoint=f"http://{place}"))
        assert {headers["authorization"] for _, _, headers in asked} == {BASIC}


def test_no_login_goes_over_plain_http_to_another_machine(ada: None) -> None:
    """Neither to a token service nor along with a redirect."""
    assert ada is None
    outside = 'Bearer realm="http://192.0.2.1/token",service="registry"'
    with (
        liar(lambda told: told.say(401, WWW_Authenticate=outside)) as (address, _),
        pytest.raises(StoreError, match="no https address"),
    ):
        upload(client(address))
    with (
        liar(lambda told: told.say(307, Location="http://192.0.2.1/blob")) as (address, _),
        pytest.raises(StoreError, match="nothing is sent or read"),
    ):
        read(client(address))


def test_a_redirect_is_followed_without_the_login(ada: None) -> None:
    """As to the storage behind a registry, whose address is signed."""
    assert ada is None

    def storage(told: Liar) -> None:
        told.say(200, FILE)

    with liar(storage) as (elsewhere, asked):

        def registry(told: Liar) -> None:
            if "authorization" not in told.seen[-1][2]:
                told.say(401, WWW_Authenticate='Basic realm="x"')
            else:
                told.say(307, Location=f"http://{elsewhere}/signed")

        with liar(registry) as (address, seen):
            assert read(client(address)) == FILE
        assert any(headers.get("authorization") == BASIC for _, _, headers in seen)
        assert asked
        assert all("authorization" not in headers for _, _, headers in asked)


def test_plain_http_to_another_machine_is_refused_unless_declared(
    oci: OciServer, login: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server hears nothing but that we want TLS."""
    assert login is None
    monkeypatch.setattr(oci_http, "is_loopback", lambda _: False)
    with pytest.raises(StoreError, match="does not speak TLS") as found:
        upload(client(oci.push))
    assert "insecure: true" in found.value.hint

    assert upload(client(oci.push, insecure=True)) == len(FILE)


def test_a_certificate_of_nobody_we_trust_is_an_error_also_on_loopback(oci_tls: OciServer) -> None:
    """Nothing falls back from it to plain HTTP; the hint says how to trust an authority."""
    with pytest.raises(StoreError, match="not trusted") as found:
        upload(client(oci_tls.push, insecure=True))
    assert "SSL_CERT_FILE" in found.value.hint


def test_over_tls_with_a_private_authority_everything_works(
    oci_tls: OciServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSL_CERT_FILE names it, as it does for Ollama."""
    for name, value in oci_tls.environment("production").items():
        monkeypatch.setenv(name, value)
    opened = client(oci_tls.push)
    assert upload(opened) == len(FILE)
    assert read(opened) == FILE


def test_loopback_is_told_without_looking_names_up() -> None:
    """A name that merely begins like it is another machine."""
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"):
        assert addresses.is_loopback(host)
    for host in ("localhost.example.org", "127.0.0.1.example.org", "192.0.2.1", "", "registry"):
        assert not addresses.is_loopback(host)


def test_the_login_of_an_environment_is_that_of_its_only_registry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever it is called; a password goes to no second one, and none of its own is replaced."""
    names = [*oci_login.variables("team"), *oci_login.variables("other")]
    for name in names:
        monkeypatch.setenv(name, "")
    for name, value in zip(oci_login.SHARED, ("robot", "secret"), strict=True):
        monkeypatch.setenv(name, value)

    oci_login.lend({"team": "oci://one.example/a", "other": "oci://two.example/b"})
    assert [os.environ[name] for name in names] == ["", "", "", ""]
    oci_login.lend({"team": "oci://one.example/a", "bucket": "s3://b/x"})
    assert [os.environ[name] for name in names] == ["robot", "secret", "", ""]
    monkeypatch.setenv("REGISTRY_PASSWORD", "newer")
    oci_login.lend({"team": "oci://one.example/a"})
    assert os.environ[names[1]] == "secret"
