"""
Models to serve, engines that serve them, and a server in a process of its own that tests end.

`python serving_factory.py KIND PROGRAM ROOT GGUF` serves a model until it is ended, and says
`loaded` with its address when it is; what it finds there is found as by any other user.
"""

from __future__ import annotations

import dataclasses
import http.server
import math
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import gguf_factory
import numpy as np

from pipelines import hashing, orphans
from pipelines.layout import Layout
from pipelines.load_records import EngineId
from pipelines.serving import modelfile, server
from pipelines.serving.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil

    from pipelines.toolchain import Toolchain

Kind = Literal["ollama", "llama-server"]

CHAT = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CONVERSATION = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "state"})
RENDERED = "[system] Be brief.\n[user] state\n[assistant] "


def model(path: Path, **dimensions: Any) -> Path:
    """Write a small model with a chat template."""
    return gguf_factory.tiny_llama_gguf(path, chat_template=CHAT, **dimensions)


def hollow_model(path: Path) -> Path:
    """Write the header of a Llama of 10 billion weights, and a hole for its 20 GB of data."""
    import gguf  # noqa: PLC0415 - not for the process that serves

    n_embd, n_ff, n_layer, vocab = 4096, 28672, 26, 512
    writer = gguf.GGUFWriter(path, "llama")
    gguf_factory._write_metadata(writer, n_embd, n_ff, n_layer, 32, 8, 512, "F16")
    gguf_factory._write_vocabulary(writer, vocab)
    size = 0
    for name, shape in gguf_factory._shapes(n_embd, n_ff, n_layer, vocab, 32, 8, tied=False):
        type_ = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        tensor_bytes = math.prod(shape) * type_.itemsize
        writer.add_tensor_info(name, shape, type_, tensor_bytes)
        size += tensor_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    data = math.ceil(path.stat().st_size / 32) * 32
    with path.open("r+b") as file_:
        file_.truncate(data + size)
    return path


def file(
    path: Path, *, type_: str = "F16", sha256: str = "", context_tokens: int = 512
) -> server.GgufFile:
    """Name a file by the digest of its record, which is the one that it has if none is given."""
    return server.GgufFile(
        type=type_,
        path=path,
        sha256=sha256 or hashing.digest(path).sha256,
        modelfile=modelfile.Modelfile(version=1, parameters={"num_ctx": context_tokens}),
    )


def settings(**changes: Any) -> server.Settings:
    """Two slots of 512 tokens, but for what is said otherwise."""
    usual = server.Settings(
        context_tokens=512,
        parallel=2,
        threads=1,
        gpu_layers="all",
        kv_type="f16",
        flash_attention=True,
        load_timeout_s=60.0,
    )
    return dataclasses.replace(usual, **changes)


def engine(kind: Kind, tools: Toolchain, program: Path) -> Engine:
    """Return an engine whose program is `program`."""
    return Engine(
        id=EngineId(
            kind=kind,
            version="0.33.0",
            llama_cpp=tools.commit,
            found_by="PATH" if kind == "ollama" else "toolchain",
            declared=True,
            sentence="A test's.",
        ),
        ollama=program if kind == "ollama" else None,
        llama_server=tools.tool("llama-server") if kind == "ollama" else program,
        tools=tools,
    )


class _Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"status": "ok", "version": "0.33.0"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def healthy_stranger() -> Iterator[int]:
    """Listen on a port and answer as a server does that is up; yield the port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Healthy) as stranger:
        thread = threading.Thread(target=stranger.serve_forever, daemon=True)
        thread.start()
        try:
            yield stranger.server_address[1]
        finally:
            stranger.shutdown()
            thread.join()


def programs_in(at: Layout) -> list[psutil.Process]:
    """List the living programs that run in a server's private folder below `at`."""
    parent = str(at.serving.resolve())
    return [
        process
        for process, folder in orphans._all_marked(orphans.SANDBOX_ENV)
        if folder.startswith(parent)
    ]


def left_in(at: Layout, *, within_s: float = 10.0) -> list[str]:
    """Name what is left of servers below `at`, once it is nothing or the time is over."""
    deadline = time.monotonic() + within_s
    while True:
        left = [str(process) for process in programs_in(at)]
        # Unlike rglob, it takes no offence at a folder that goes while it is read.
        left += [
            f"{folder}/{name}"
            for folder, folders, files in os.walk(at.serving)
            for name in (*folders, *files)
        ]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _serve(kind: Kind, program: Path, root: Path, gguf: Path) -> None:
    from pipelines import declaration, toolchain  # noqa: PLC0415 - of the process, not of tests

    spec = toolchain.spec_of(declaration.load(Path(__file__).parent.parent / "params.yaml"))
    chosen = engine(kind, toolchain.ensure(spec), program)
    with (
        server.open_host(
            chosen, settings(), model="tiny", at=Layout(root), log=root / "serve.log"
        ) as host,
        host.load(file(gguf)) as loaded,
    ):
        print(f"loaded {loaded.url}", flush=True)  # noqa: T201 - its one answer
        time.sleep(600)


if __name__ == "__main__":
    # As `fleet` does, and as a process that no shell has put into the background.
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _serve(
        "ollama" if sys.argv[1] == "ollama" else "llama-server",
        *(Path(word) for word in sys.argv[2:5]),
    )
