"""
What Ollama is installed from, small: a Go module of its name, a release archive, and their server.

The real `go`, `tar` and `zstd` work on them as on the real ones; only what comes out does nothing
but say its version.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import threading
import zipfile
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULE = "github.com/ollama/ollama"
_MAIN = """\
package main

import "{module}/version"

func main() {{ println("client version is", version.Version) }}
"""


def go_proxy(
    folder: Path, *, version: str = "0.33.0", go: str = "1.21", stamp: bool = True
) -> Path:
    """
    Write a module proxy (go.dev/ref/mod#goproxy-protocol) that has one version of one module.

    Args:
        folder: Where it is written.
        version: The version that it has.
        go: What its go.mod wants.
        stamp: False for a program that no -ldflags can give a version.
    """
    place = folder / MODULE / "@v"
    place.mkdir(parents=True, exist_ok=True)
    (place / "list").write_text(f"v{version}\n")
    (place / f"v{version}.info").write_text(f'{{"Version":"v{version}"}}')
    mod = f"module {MODULE}\n\ngo {go}\n"
    (place / f"v{version}.mod").write_text(mod)
    keyword = "var" if stamp else "const"
    with zipfile.ZipFile(place / f"v{version}.zip", "w") as archive:
        for name, text in {
            "go.mod": mod,
            "main.go": _MAIN.format(module=MODULE),
            "version/version.go": f'package version\n\n{keyword} Version string = "0.0.0"\n',
        }.items():
            archive.writestr(f"{MODULE}@v{version}/{name}", text)
    return folder


def release(
    folder: Path, name: str, *, version: str = "0.33.0", leave_out: tuple[str, ...] = ()
) -> Path:
    """Write a release archive below `folder` as the download pages lay them out."""
    programs = {
        "bin/ollama": f"echo Warning: client version is {version}",
        "lib/ollama/llama-server": "echo 'version: 10488 (abcdef123)'",
        "lib/ollama/llama-quantize": "true",
    }
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for program, line in programs.items():
            if program not in leave_out:
                script = f"#!/bin/sh\n{line}\n".encode()
                info = tarfile.TarInfo(program)
                info.size, info.mode = len(script), 0o755
                archive.addfile(info, io.BytesIO(script))
        # What does not compress makes a download that can be cut.
        filler = tarfile.TarInfo("lib/ollama/libfiller.so")
        filler.size = 1 << 20
        archive.addfile(filler, io.BytesIO(Random(0).randbytes(filler.size)))
    path = folder / f"v{version}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        ["zstd", "-q", "-c", "-1"], input=data.getvalue(), capture_output=True, check=True
    )
    path.write_bytes(packed.stdout)
    return path


class _Handler(SimpleHTTPRequestHandler):
    """Serves files, ranges too; remembers what was asked, and waits where it is told to."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client was killed, as tests want it
            self.close_connection = True

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.asked.append(self.path)
        if server.stall and self.path.endswith(server.stall):
            server.stalled.set()
            server.go_on.wait(60)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=")[:-1])
        path = Path(self.translate_path(self.path))
        if not self.path.endswith(".zst"):
            super().do_GET()
            return
        try:
            data = path.read_bytes()
        except OSError:
            self.send_error(404)
            return
        server.starts.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: server.cut_bytes])
        self.close_connection = True


class Server(ThreadingHTTPServer):
    """
    A server on loopback.

    Attributes:
        asked: Paths that were asked for.
        starts: First bytes of the archives that were asked for.
        stall: End of the paths whose answer waits for `go_on`.
        cut_bytes: After how many an archive's connection is closed.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        """Bind a free port; `serving` answers at it."""
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.asked: list[str] = []
        self.starts: list[int] = []
        self.stall = ""
        self.cut_bytes: int | None = None
        self.stalled = threading.Event()
        self.go_on = threading.Event()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder while the block runs."""
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()
            thread.join()


def script(path: Path, body: str) -> Path:
    """Write a Python program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport os, sys\n{body}\n")
    path.chmod(0o755)
    return path


def old_style(folder: Path, version: str, *, with_server: bool = True) -> Path:
    """Write an installed Ollama that says `version`, with or without its llama-server."""
    if with_server:
        line = "print('version: 10488 (abcdef123)')"
        script(folder / "lib/ollama/llama-server", line)
    lines = ("could not connect to a running Ollama instance", f"client version is {version}")
    return script(folder / "bin/ollama", "\n".join(f'print("Warning: {line}")' for line in lines))
