"""
A package index and GitHub's releases, small: a real server that answers by path as it is told.

The real pip, the real Go and our own client for GitHub ask it.
"""

from __future__ import annotations

import base64
import html
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

JSON = "application/vnd.pypi.simple.v1+json"
BELOW = "/simple"
PAGE = f"{BELOW}/llama-cpp-python/"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a path answers; `stalls` lets the client wait until the server is closed."""

    status: int = 200
    kind: str = JSON
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    stalls: bool = False


@dataclass(kw_only=True)
class Index:
    """
    The server.

    Attributes:
        url: Its address.
        answers: By path; every other one is 404.
        login: `user:password` that it wants, if any.
        asked: Path and headers of every request.
    """

    url: str = ""
    answers: dict[str, Answer] = field(default_factory=dict)
    login: str | None = None
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def page(self, *files: dict[str, Any], path: str = PAGE, **more: Any) -> None:
        """Let it have a page of these files."""
        self.answers[path] = Answer(body=page(*files, **more))


def sdist(version: str, sha256: str | None = "a" * 64, **fields: Any) -> dict[str, Any]:
    """Describe a source distribution as PEP 691 and PEP 700 do; None leaves a field out."""
    return _filled(
        {
            "filename": f"llama_cpp_python-{version}.tar.gz",
            "url": f"https://files.invalid/llama_cpp_python-{version}.tar.gz",
            "hashes": {"sha256": sha256} if sha256 else {"md5": "0" * 32},
            "size": 70_000_000,
            "upload-time": "2026-10-01T05:48:01.345495Z",
            "yanked": False,
            **fields,
        }
    )


def _filled(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def page(*files: dict[str, Any], version: str = "1.4", status: str | None = None) -> bytes:
    """Return a page of the simple repository API as JSON."""
    told: dict[str, Any] = {
        "meta": {"api-version": version},
        "name": "llama-cpp-python",
        "files": list(files),
    }
    if status is not None:
        told["project-status"] = {"status": status}
    return json.dumps(told).encode()


def anchors(*files: dict[str, Any], meta: str = "") -> bytes:
    """Return the same files as PEP 503 writes them: no time, no size."""
    lines = []
    for one in files:
        digest = one["hashes"].get("sha256")
        fragment = f"#sha256={digest}" if digest else "#md5=0"
        more = ""
        if one.get("yanked"):
            said = one["yanked"] if isinstance(one["yanked"], str) else ""
            more += f' data-yanked="{html.escape(said)}"'
        if one.get("requires-python"):
            more += f' data-requires-python="{html.escape(one["requires-python"])}"'
        lines.append(f'<a href="{one["url"]}{fragment}"{more}>{one["filename"]}</a><br/>')
    return f"<!DOCTYPE html><html><head>{meta}</head><body>{''.join(lines)}</body></html>".encode()


@contextmanager
def serving() -> Iterator[Index]:
    """Run it on loopback."""
    index = Index()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            index.asked.append((self.path, dict(self.headers)))
            answer = index.answers.get(path, Answer(status=404))
            wanted = base64.b64encode((index.login or "").encode()).decode()
            if index.login and self.headers.get("Authorization") != f"Basic {wanted}":
                answer = Answer(status=401, headers=(("WWW-Authenticate", "Basic"),))
            if answer.stalls:
                index.closed.wait(30)
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    index.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield index
    finally:
        index.closed.set()
        server.shutdown()
        server.server_close()
        thread.join()
