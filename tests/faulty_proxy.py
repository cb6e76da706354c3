"""
A proxy between a client and a real server that makes what the server cannot be made to do.

It passes HTTP on as it is, counts every byte, and at the requests that a test names it answers in
the server's stead, loses the server's answer, cuts it, changes its bytes or delays them:

    with FaultyProxy(server.endpoint) as proxy:
        proxy.strike(Fault("status", status=503), at=3)
        ...
        assert proxy.seen[2].fault is not None

The Host header stays the client's own, so signatures hold and redirects lead back here.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final, Literal, Self
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PIECE_BYTES: Final = 1 << 16
_HOP: Final = frozenset({"connection", "keep-alive", "transfer-encoding", "expect"})

Kind = Literal[
    "status",  # answers `status` itself, with `body`; the server does not hear of the request
    "html",  # the same, with 200 and a page as hotel networks and load balancers show
    "refuse",  # reads the request and breaks the connection
    "cut_request",  # breaks the connection after `after_bytes` of the request's body
    "lose",  # the server does what was asked; its answer never arrives
    "cut",  # breaks the connection after `after_bytes` of the answer's body
    "corrupt",  # changes one bit of the answer's body, at byte `after_bytes`
    "slow",  # waits `pause_s` before the answer, and again before each piece of its body
    "strip",  # drops the request headers named in `headers` on the way to the server
]

PAGE: Final = b"<!DOCTYPE html><html><head><title>Welcome</title></head><body>Log in</body></html>"


@dataclass(frozen=True)
class Fault:
    """One fault; which fields count is said at its kind."""

    kind: Kind
    status: int = 500
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    after_bytes: int = 0
    pause_s: float = 0.0


@dataclass
class Seen:
    """
    One request that passed.

    Attributes:
        number: 1, 2, 3, ... in the order of arrival.
        headers: Of the request, by lower-case name.
        sent_bytes: Of its body, as far as it was read.
        status: Of the answer that the client got; None if it got none.
        received_bytes: Of the answer's body that the client was sent.
        fault: What was done to it.
    """

    number: int
    method: str
    path: str
    headers: dict[str, str]
    sent_bytes: int = 0
    status: int | None = None
    received_bytes: int = 0
    fault: Fault | None = None


@dataclass
class _Strike:
    fault: Fault
    at: int | None
    when: Callable[[Seen], bool] | None
    left: int

    def hits(self, seen: Seen) -> bool:
        if self.left == 0 or (self.at is not None and seen.number < self.at):
            return False
        return self.when is None or self.when(seen)


class FaultyProxy:
    """A proxy on a free port of loopback, in threads of this process."""

    def __init__(self, upstream: str) -> None:
        """Begin to pass requests on to `upstream`, e.g. http://127.0.0.1:9000."""
        self.upstream = upstream
        self.seen: list[Seen] = []
        self._strikes: list[_Strike] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        """Use it as a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; connections that are open break."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def strike(
        self,
        fault: Fault,
        *,
        at: int | None = None,
        when: Callable[[Seen], bool] | None = None,
        times: int = 1,
    ) -> None:
        """
        Do `fault` to the next requests that fit.

        Args:
            fault: What to do.
            at: Number of the first request that may be hit, counted from the last `forget`.
            when: Which requests fit; all if absent.
            times: How many; -1 for all.
        """
        with self._lock:
            self._strikes.append(_Strike(fault, at, when, times))

    def forget(self) -> None:
        """Begin again: no faults, no requests seen."""
        with self._lock:
            self._strikes.clear()
            self.seen.clear()

    @property
    def sent_bytes(self) -> int:
        """Bytes of all bodies that clients sent."""
        return sum(seen.sent_bytes for seen in list(self.seen))

    def _arrived(self, method: str, path: str, headers: dict[str, str]) -> Seen:
        with self._lock:
            seen = Seen(len(self.seen) + 1, method, path, headers)
            self.seen.append(seen)
            for strike in self._strikes:
                if strike.hits(seen):
                    strike.left -= 1
                    seen.fault = strike.fault
                    break
            return seen


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024
    proxy: FaultyProxy

    def handle_error(self, *_: Any) -> None:
        """Say nothing: connections break here on purpose."""


class _BrokenError(Exception):
    """The connection to the client is to be broken now."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    _cut = False

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _pass(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = self.server.proxy._arrived(self.command, self.path, headers)
        self._cut = seen.fault is not None and seen.fault.kind == "cut"
        try:
            self._handle(seen)
        except (_BrokenError, OSError, http.client.HTTPException):
            self._break()

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = do_OPTIONS = _pass  # noqa: N815

    def _handle(self, seen: Seen) -> None:
        fault = seen.fault
        kind = fault.kind if fault else None
        if fault and kind in ("status", "html"):
            for _ in self._body(seen):
                pass
            self._answer_ourselves(seen, fault)
            return
        if kind == "refuse":
            for _ in self._body(seen):
                pass
            raise _BrokenError
        parts = urlsplit(self.server.proxy.upstream)
        upstream = http.client.HTTPConnection(parts.netloc, timeout=60)
        try:
            self._ask(upstream, seen)
            answer = upstream.getresponse()
            if kind == "lose":
                answer.read()
                raise _BrokenError
            self._hand_over(seen, answer)
        finally:
            upstream.close()

    def _answer_ourselves(self, seen: Seen, fault: Fault) -> None:
        html = fault.kind == "html"
        seen.status = 200 if html else fault.status
        body = PAGE if html else fault.body
        self.send_response(seen.status)
        if html:
            self.send_header("Content-Type", "text/html")
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _ask(self, upstream: http.client.HTTPConnection, seen: Seen) -> None:
        stripped = _HOP
        if seen.fault and seen.fault.kind == "strip":
            stripped = _HOP | {name.lower() for name in seen.fault.headers}
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in stripped:
                upstream.putheader(name, value)
        chunked = "transfer-encoding" in seen.headers
        if chunked:
            upstream.putheader("Transfer-Encoding", "chunked")
        upstream.endheaders()
        for piece in self._body(seen):
            upstream.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        if chunked:
            upstream.send(b"0\r\n\r\n")

    def _body(self, seen: Seen) -> Iterator[bytes]:
        """Yield the body of the request, and break off where the fault says so."""
        cut = seen.fault if seen.fault and seen.fault.kind == "cut_request" else None
        pieces = self._chunks() if "transfer-encoding" in seen.headers else self._counted(seen)
        for piece in pieces:
            if cut and seen.sent_bytes + len(piece) > cut.after_bytes:
                seen.sent_bytes = cut.after_bytes
                raise _BrokenError
            seen.sent_bytes += len(piece)
            yield piece

    def _counted(self, seen: Seen) -> Iterator[bytes]:
        left = int(seen.headers.get("content-length", "0"))
        while left:
            piece = self.rfile.read(min(left, _PIECE_BYTES))
            if not piece:
                raise _BrokenError
            left -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _hand_over(self, seen: Seen, answer: http.client.HTTPResponse) -> None:
        fault = seen.fault
        if fault and fault.kind == "slow":
            time.sleep(fault.pause_s)
        bodiless = self.command == "HEAD" or answer.status in (204, 304)
        chunked = not bodiless and answer.headers.get("Content-Length") is None
        seen.status = answer.status
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if bodiless:
            return
        while piece := answer.read1(_PIECE_BYTES):
            out = self._changed(seen, piece)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(out), out) if chunked else out)
            seen.received_bytes += len(out)
            if len(out) < len(piece):
                raise _BrokenError
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _changed(self, seen: Seen, piece: bytes) -> bytes:
        """Return what becomes of a piece of the answer; a shorter one if it is cut there."""
        fault = seen.fault
        if fault is None:
            return piece
        if fault.kind == "slow":
            time.sleep(fault.pause_s)
        place = fault.after_bytes - seen.received_bytes
        if fault.kind == "cut" and place < len(piece):
            return piece[: max(0, place)]
        if fault.kind == "corrupt" and 0 <= place < len(piece):
            return piece[:place] + bytes([piece[place] ^ 1]) + piece[place + 1 :]
        return piece

    def _break(self) -> None:
        """End the connection; by a reset, unless what was sent before has to arrive."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
        if not self._cut:
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
