"""
A server without a model: it streams chunks at a given pace, each with the time of its sending.

The generator is measured against it (`pipelines.load.calibration`): what a chunk takes from the
send of this process to the stamp of the other is the delay of the client and of the machine, and of
nothing else. Both read the same monotonic clock. As of a real server that generates in batches, the
chunks of all streams are due at the same moments, which is the harder case for a client; or each
stream keeps the pace from its own start, as independent servers do.

It is a process of its own (`python -m pipelines.load.null_server`), one thread that sends what is
due; when it is late itself, since the machine is busy, the chunk says by how much.

    POST /api/chat               Ollama's lines
    POST /v1/chat/completions    the OpenAI-compatible events
    POST /stop                   the end of the process

`model` in a request says how many chunks, and how many a second: "null:300:100:batch", or
"null:300:100:apart". A warm-up, which is a message that says so, gets a few.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import math
import os
import selectors
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Final

from pipelines import proc
from pipelines.errors import FleetError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipelines.load.plan import Api

WARM_UP: Final = "warm-up"
_WARM_UP_CHUNKS: Final = 5
_HOST: Final = "127.0.0.1"
_NS: Final = 1_000_000_000
_START_WITHIN_S: Final = 20.0
# Nobody asks any more: whoever started it is gone.
_IDLE_S: Final = 60.0
_REQUEST_BYTES: Final = 1 << 20
_HEAD: Final = (
    "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
)  # fmt: skip

_now = time.monotonic_ns


class NullServerError(FleetError):
    """The null server did not start."""


def model(chunks: int, chunks_per_s: float, *, batch: bool = True) -> str:
    """Name of the model that streams so many chunks at this pace, all streams at once or not."""
    return f"null:{chunks}:{chunks_per_s:.6g}:{'batch' if batch else 'apart'}"


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """
    What a chunk says of itself, on the monotonic clock.

    Attributes:
        sent_ns: Right before it was written.
        late_ns: How much later than due that was.
        asked_ns: When the request was there.
    """

    sent_ns: int
    late_ns: int
    asked_ns: int


def stamp(text: str) -> Stamp:
    """Read the content of a chunk."""
    sent, late, asked = text.split(":")
    return Stamp(sent_ns=int(sent), late_ns=int(late), asked_ns=int(asked))


@contextmanager
def running(log: Path) -> Iterator[str]:
    """
    Start a null server and yield its URL; it is gone when the block is left, in whichever way.

    Raises:
        NullServerError: It does not start.
    """
    url: list[str] = []
    started = threading.Event()
    failures: list[Exception] = []

    def on_line(line: str) -> None:
        if line.startswith("http://"):
            url.append(line)
            started.set()

    def serve() -> None:
        try:
            proc.run([sys.executable, "-m", "pipelines.load.null_server"], log=log, on_line=on_line)
        except FleetError as error:
            failures.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        started.wait(_START_WITHIN_S)
        if not url:
            cause = f": {failures[0]}" if failures else f" in {_START_WITHIN_S:g} s"
            raise NullServerError(f"The null server did not start{cause}", log=log)
        yield url[0]
    finally:
        if url:
            _stop(url[0])
        thread.join(proc.STOP_WITHIN_S)


def _stop(url: str) -> None:
    with contextlib.suppress(OSError):
        connection = HTTPConnection(url.removeprefix("http://"), timeout=1)
        connection.request("POST", "/stop")
        connection.close()


# --- the process ------------------------------------------------------------------------------


@dataclass(eq=False)
class _Stream:
    """One connection and what it is owed."""

    link: socket.socket
    received: bytearray = field(default_factory=bytearray)
    api: Api = "ollama"
    asked_ns: int = 0
    period_ns: int = 0
    next_ns: int = 0
    left: int = 0
    total: int = 0
    busy: bool = False


class _Server:
    """Accepts, reads requests, sends what is due."""

    def __init__(self) -> None:
        self._listening = socket.create_server((_HOST, 0), backlog=2048)
        self._listening.settimeout(0)
        # select(2) waits for microseconds, epoll for whole milliseconds; there are few connections.
        self._selector = selectors.SelectSelector()
        self._selector.register(self._listening, selectors.EVENT_READ, None)
        self._due: list[tuple[int, int, _Stream]] = []
        self._number = itertools.count()
        self._last_asked_ns = _now()
        self._stopped = False
        self.url = f"http://{_HOST}:{self._listening.getsockname()[1]}"

    def serve(self) -> None:
        """Serve until told to stop, or until nobody has asked for a minute."""
        while not self._stopped and (
            self._due or _now() - self._last_asked_ns < _IDLE_S * _NS
        ):  # fmt: skip
            left_ns = self._due[0][0] - _now() if self._due else _NS
            for key, _ in self._selector.select(max(0, left_ns) / _NS):
                if key.data is None:
                    self._accept()
                else:
                    self._receive(key.data)
            if self._due:
                self._send_due()

    def _send_due(self) -> None:
        """Send everything whose time has come."""
        while self._due and self._due[0][0] <= _now():
            due_ns, _, stream = heapq.heappop(self._due)
            self._send(stream, due_ns)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            link, _ = self._listening.accept()
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(link, selectors.EVENT_READ, _Stream(link))

    def _receive(self, stream: _Stream) -> None:
        try:
            data = stream.link.recv(1 << 16)
        except OSError:
            data = b""
        stream.received += data
        if not data or len(stream.received) > _REQUEST_BYTES:
            self._close(stream)
            return
        head, found, rest = bytes(stream.received).partition(b"\r\n\r\n")
        if not found or stream.busy:
            return
        lines = head.decode(errors="replace").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return
        stream.received = bytearray(rest[length:])
        self._answer(stream, lines[0].split(" ")[1], rest[:length])

    def _answer(self, stream: _Stream, path: str, body: bytes) -> None:
        self._last_asked_ns = stream.asked_ns = _now()
        if path == "/stop":
            self._stopped = True
            return
        asked = json.loads(body)
        _, chunks, per_second, phase = asked["model"].split(":")
        if asked["messages"][-1]["content"] == WARM_UP:
            chunks = min(int(chunks), _WARM_UP_CHUNKS)
        stream.api = "ollama" if path == "/api/chat" else "openai"
        stream.left = stream.total = int(chunks)
        stream.period_ns = max(1, round(_NS / float(per_second)))
        stream.busy = True
        kind = "application/x-ndjson" if stream.api == "ollama" else "text/event-stream"
        with contextlib.suppress(OSError):
            stream.link.sendall(_HEAD.format(kind=kind).encode())
        due_ns = stream.asked_ns + stream.period_ns
        if phase == "batch":
            # The next tick that all streams of this pace share, and at least half of one from now.
            earliest_ns = stream.asked_ns + stream.period_ns // 2
            due_ns = math.ceil(earliest_ns / stream.period_ns) * stream.period_ns
        self._plan(stream, due_ns)

    def _plan(self, stream: _Stream, due_ns: int) -> None:
        heapq.heappush(self._due, (due_ns, next(self._number), stream))

    def _send(self, stream: _Stream, due_ns: int) -> None:
        if not stream.busy:
            return
        sent_ns = _now()
        text = f"{sent_ns}:{sent_ns - due_ns}:{stream.asked_ns}"
        stream.left -= 1
        try:
            stream.link.sendall(_chunk(_line(stream.api, text)))
            if stream.left:
                self._plan(stream, due_ns + stream.period_ns)
            else:
                stream.busy = False
                stream.link.sendall(
                    b"".join(map(_chunk, _end(stream.api, stream.total))) + b"0\r\n\r\n"
                )
        except OSError:
            self._close(stream)

    def _close(self, stream: _Stream) -> None:
        stream.busy = False
        with contextlib.suppress(OSError, KeyError, ValueError):
            self._selector.unregister(stream.link)
        stream.link.close()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _line(api: Api, text: str) -> bytes:
    """One line or event with content, in about the size of a real one."""
    if api == "ollama":
        return (
            b'{"model":"null","created_at":"2026-01-01T00:00:00.000000000Z",'
            b'"message":{"role":"assistant","content":"%b"},"done":false}\n' % text.encode()
        )
    return (
        b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":"%b"}}],'
        b'"created":1,"id":"null","model":"null","object":"chat.completion.chunk"}\n\n'
        % text.encode()
    )


def _end(api: Api, total: int) -> list[bytes]:
    """The end of an answer as the dialect has it."""
    if api == "ollama":
        last = {
            "model": "null",
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "done_reason": "length",
            "prompt_eval_count": 1,
            "eval_count": total,
        }
        return [json.dumps(last).encode() + b"\n"]
    choice = {"choices": [{"finish_reason": "length", "index": 0, "delta": {}}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": total}}
    events = [f"data: {json.dumps(value)}\n\n".encode() for value in (choice, usage)]
    return [*events, b"data: [DONE]\n\n"]


def main() -> None:
    """Serve; the first line of stdout is the URL."""
    server = _Server()
    sys.stdout.write(server.url + "\n")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):
        server.serve()
    os._exit(0)


if __name__ == "__main__":
    main()
