"""
A real HTTP server that answers as it is told: the faults that a real engine cannot be made to show.

It speaks Ollama's lines (/api/chat) and OpenAI-compatible events (/v1/chat/completions), streamed
in HTTP chunks over kept connections. What it does with a request is decided by the last message of
it: `with serve({"hello": Script(fault="stall")}) as server`. Other paths answer `pages`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Fault = Literal[
    "none",
    "status",  # `status` and an error text in place of a stream
    "error_line",  # an error inside a 200, after the tokens
    "no_done",  # the stream ends, with its proper HTTP end, and never said that it is done
    "loop",  # 31 equal tokens, then the same: Ollama's repeat guard
    "empty",  # done, and no token
    "malformed",  # a line that is no JSON
    "other_dialect",  # JSON that is no answer
    "half_line",  # half a line, then the connection ends
    "gone",  # tokens, then the connection ends
    "reset",  # the connection is reset before the status line
    "stall",  # tokens, then silence
    "stall_before",  # silence before the status line
    "comments",  # nothing but comments that keep the connection open
    "forever",  # the same token without end
    "babble",  # other tokens without end
    "drip",  # a token now and then, without end
    "cut",  # fewer prompt tokens than were sent
    "full",  # as many prompt tokens as the context has
]


@dataclass(frozen=True, kw_only=True)
class Script:
    """
    One behaviour.

    Attributes:
        fault: What goes wrong.
        tokens: Tokens of the answer, each a chunk.
        first_s: Pause before the first token, which a slot is held for.
        pause_s: Pause between tokens.
        status: Of `status`.
        thinking: So many of the tokens are thinking.
        merged: All tokens are written at once.
        prompt_tokens: That the server says it read.
        counts: Tell the counts of tokens.
        text: Of a token; its number follows.
        close: Close the connection after the answer, without having said so.
    """

    fault: Fault = "none"
    tokens: int = 5
    first_s: float = 0.0
    pause_s: float = 0.0
    status: int = 503
    thinking: int = 0
    merged: bool = False
    prompt_tokens: int = 10
    counts: bool = True
    text: str = "tok"
    close: bool = False


@dataclass(frozen=True, kw_only=True)
class Page:
    """What another path answers where that is no JSON; `endless` repeats the body for ever."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    endless: bool = False


@dataclass
class Seen:
    """One request: what it asked, over which connection, when it came (monotonic)."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    connection: int
    at_ns: int


@dataclass
class Scripted:
    """The running server."""

    url: str
    scripts: dict[str, Script]
    pages: dict[str, Any]
    slots: threading.Semaphore
    seen: list[Seen] = field(default_factory=list)
    asked: list[Seen] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def script(self, body: dict[str, Any]) -> Script:
        """Choose by the last message; the first script if none is for it."""
        messages = body.get("messages") or [{"content": ""}]
        default = next(iter(self.scripts.values()), Script())
        return self.scripts.get(messages[-1]["content"], default)


@contextmanager
def serve(
    scripts: Mapping[str, Script] | Script | None = None,
    *,
    pages: Mapping[str, Any] | None = None,
    slots: int = 256,
) -> Iterator[Scripted]:
    """
    Serve until the block is left; what still hangs is let go.

    Args:
        scripts: Behaviour by the text of the last message, or one for all.
        pages: JSON of other paths, e.g. /api/tags, or a `Page`.
        slots: Answers that are streamed at the same time; others wait.
    """
    if isinstance(scripts, Script):
        scripts = {"": scripts}
    server = _Server(("127.0.0.1", 0), _Handler)
    server.scripted = Scripted(
        url=f"http://127.0.0.1:{server.server_port}",
        scripts=dict(scripts or {"": Script()}),
        pages=dict(pages or {}),
        slots=threading.Semaphore(slots),
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.scripted
    finally:
        server.scripted.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    scripted: Scripted
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def handle_error(self, *_: Any) -> None:
        """A client that left is none of our business."""


class _StoppedError(Exception):
    """The test is over."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 0

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    @property
    def _scripted(self) -> Scripted:
        return self.server.scripted

    def do_GET(self) -> None:
        """Answer a page."""
        page = self._scripted.pages.get(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        port = self.client_address[1]
        self._scripted.asked.append(Seen(self.path, headers, {}, port, time.monotonic_ns()))
        if isinstance(page, Page):
            with contextlib.suppress(OSError):
                self._page(page)
            return
        self._json(200 if page is not None else 404, page if page is not None else {})

    def do_POST(self) -> None:
        """Answer a chat as scripted, anything else as a page."""
        length = int(self.headers.get("Content-Length", "0"))
        body = json.loads(self.rfile.read(length) or b"{}")
        headers = {name.lower(): value for name, value in self.headers.items()}
        port = self.client_address[1]
        self._scripted.seen.append(Seen(self.path, headers, body, port, time.monotonic_ns()))
        if self.path not in ("/api/chat", "/v1/chat/completions"):
            self.do_GET()
            return
        script = self._scripted.script(body)
        with self._scripted.slots, contextlib.suppress(OSError, _StoppedError):
            _Chat(self, script, body).answer()
        over = script.close or self._scripted.stopped.is_set()
        if over or script.fault in ("half_line", "gone", "reset"):
            self.close_connection = True

    def _page(self, page: Page) -> None:
        self.send_response(page.status)
        for name, value in page.headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(page.body)
        while page.endless and not self._scripted.stopped.is_set():
            self.wfile.write(page.body)
        self.close_connection = True

    def _json(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Chat:
    """One answer."""

    def __init__(self, handler: _Handler, script: Script, body: dict[str, Any]) -> None:
        self._handler = handler
        self._script = script
        self._ollama = handler.path == "/api/chat"
        self._body = body
        self._stopped = handler.server.scripted.stopped

    def answer(self) -> None:
        script = self._script
        if script.fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._handler.connection.close()
            return
        if script.fault == "stall_before":
            self._wait_for_ever()
        if script.fault == "status":
            said = "server busy, please try again"
            error: Any = said if self._ollama else {"message": said, "code": script.status}
            self._handler._json(script.status, {"error": error})
            return
        self._handler.send_response(200)
        kind = "application/x-ndjson" if self._ollama else "text/event-stream"
        self._handler.send_header("Content-Type", kind)
        self._handler.send_header("Transfer-Encoding", "chunked")
        self._handler.end_headers()
        self._sleep(script.first_s)
        self._stream()

    def _stream(self) -> None:
        script = self._script
        if script.fault == "comments":
            while True:
                self._chunk(b": still there\n\n")
                self._sleep(0.05)
        if script.fault in ("forever", "babble", "drip"):
            for number in itertools.count():
                word = script.text if script.fault == "forever" else f"{script.text}{number}"
                self._chunk(self._token(word))
                self._sleep(0.2 if script.fault == "drip" else 0.0)
        if script.fault == "loop":
            for _ in range(31):
                self._chunk(self._token(script.text))
            self._end()
            return
        tokens = 0 if script.fault == "empty" else script.tokens
        lines = [self._token(f"{script.text}{number} ", number) for number in range(tokens)]
        if script.merged:
            self._chunk(b"".join(lines))
        else:
            for number, line in enumerate(lines):
                self._sleep(script.pause_s if number else 0)
                self._chunk(line)
        self._finish(tokens)

    def _finish(self, tokens: int) -> None:
        fault = self._script.fault
        if fault == "stall":
            self._wait_for_ever()
        if fault == "gone":
            return
        if fault == "half_line":
            self._chunk(self._token("half")[:20])
            return
        if fault == "error_line":
            said = "an error was encountered while running the model: unexpected EOF"
            error = {"error": said} if self._ollama else {"error": {"message": said, "code": 500}}
            self._chunk(self._line(error))
        elif fault == "malformed":
            self._chunk(b'{"message": {"content"\n' if self._ollama else b"data: {no json\n\n")
        elif fault == "other_dialect":
            self._chunk(self._line({"weather": "fine"}))
        elif fault != "no_done":
            for line in self._last(tokens):
                self._chunk(line)
        self._end()

    def _token(self, text: str, number: int = 99) -> bytes:
        thinking = number < self._script.thinking
        if self._ollama:
            message = {"role": "assistant", "content": "" if thinking else text}
            if thinking:
                message["thinking"] = text
            return self._line({"model": "scripted", "message": message, "done": False})
        delta = {"reasoning_content" if thinking else "content": text}
        return self._line({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    def _last(self, tokens: int) -> list[bytes]:
        read = self._script.prompt_tokens
        reason = "stop" if tokens else "length"
        if self._ollama:
            line: dict[str, Any] = {
                "model": "scripted",
                "message": {"role": "assistant", "content": ""},
                "done": True,
                "done_reason": reason,
            }
            if self._script.counts:
                # As in Go with `omitempty`: what is 0 is left out.
                counts = {
                    "total_duration": 50_000_000,
                    "load_duration": 1_000_000,
                    "prompt_eval_count": read,
                    "prompt_eval_duration": 4_000_000,
                    "eval_count": tokens,
                    "eval_duration": 5_000_000,
                }
                line |= {name: count for name, count in counts.items() if count}
            return [self._line(line)]
        lines = [self._line({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})]
        if self._script.counts and self._body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": read, "completion_tokens": tokens}
            lines.append(self._line({"choices": [], "usage": usage}))
        return [*lines, b"data: [DONE]\n\n"]

    def _line(self, value: Any) -> bytes:
        data = json.dumps(value).encode()
        return data + b"\n" if self._ollama else b"data: " + data + b"\n\n"

    def _chunk(self, data: bytes) -> None:
        if self._stopped.is_set():
            raise _StoppedError
        self._handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _end(self) -> None:
        self._handler.wfile.write(b"0\r\n\r\n")

    def _sleep(self, seconds: float) -> None:
        if seconds and self._stopped.wait(seconds):
            raise _StoppedError

    def _wait_for_ever(self) -> None:
        self._stopped.wait()
        raise _StoppedError
