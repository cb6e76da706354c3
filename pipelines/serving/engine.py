"""
Which program serves on this machine, where it came from, and which llama.cpp really runs in it.

    serving.engine   looked for, in this order
    ollama           PATH; built by Go; the release archive, if its sha256 is declared
    llama-server     the toolchain's
    auto             as ollama; if there is none, the toolchain's llama-server in its stead

What stands in was not declared: it measures, and nothing is promoted by what it measured.

An Ollama on PATH is what this machine's operator serves with, so it is taken or refused, never
passed over in silence for another. One that is too old is refused: it has its own copy of ggml
instead of a llama-server, and what the records say of the engine would not be true of it. One that
is newer than what was run here is taken with a warning: what it serves is proven at each load, by
digest, context and rendered prompts, and its speed is its speed.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import console, proc
from pipelines.errors import MachineError, ParamsError, ToolError
from pipelines.load_records import EngineId
from pipelines.params import NO_EXPERTS_APART
from pipelines.serving import ollama_install

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Literal

    from pipelines.params import Serving
    from pipelines.toolchain import Toolchain

# Since 0.30.0 Ollama runs llama-server as a program of its own (commit 9db4bdb); 0.33.0 is what was
# run here from one end to the other.
OLDEST: Final = (0, 30, 0)
NOT_RUN: Final = (0, 34, 0)
SUPPORTED: Final = "0.30.0 or later, run up to 0.33"

_TRIPLE: Final = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")
# `version: 0.5.0 (build 1, commit 0c1e57098)`, in older ones `version: 10488 (0c1e57098)`.
_LLAMA_LINE: Final = re.compile(r"^version: (.+)$", re.MULTILINE)
_SENTENCE_CHARACTERS: Final = 200


@dataclass(frozen=True, kw_only=True)
class Engine:
    """
    What serves.

    Attributes:
        id: What a record says of it.
        ollama: The program, in a place from which it finds its llama-server; None for a
            llama-server alone.
        llama_server: The one that really runs, below Ollama too.
        tools: The toolchain, whose llama-server made the benchmarks.
    """

    id: EngineId
    ollama: Path | None
    llama_server: Path
    tools: Toolchain


def find(serving: Serving, tools: Toolchain, *, log: Path) -> Engine:
    """
    Find the declared engine, and install Ollama if that is what it takes.

    Args:
        serving: The `serving` section of params.yaml.
        tools: The toolchain.
        log: Gets the whole output of what is run and installed.

    Raises:
        MachineError: Ollama was declared and there is none to be had; or the one on PATH is too
            old, says no version, or has no llama-server.
        ParamsError: The declared version of Ollama is too old, or none that exists; or experts are
            to stay in main memory, which it can be told of no single model.
        DigestError: What was downloaded is not what was declared.
        ToolError: An Ollama or a llama-server is there and does not run.
    """
    if serving.engine == "llama-server":
        return _toolchain_server(tools, log, declared=True, why="as declared")
    if serving.cpu_moe_layers is not None:
        raise ParamsError(
            f"serving.cpu_moe_layers: {NO_EXPERTS_APART}.",
            hint="Set `engine: llama-server` below `serving` of the model in params.yaml.",
        )
    if _triple(serving.ollama) < OLDEST:
        raise ParamsError(
            f"serving.ollama: Ollama {serving.ollama} is too old: supported is {SUPPORTED}.",
            hint="Set serving.ollama in params.yaml to a later release.",
        )
    on_path = shutil.which("ollama")
    if on_path is not None:
        return _on_path(Path(on_path), tools, log)
    refusals: list[str] = []
    hint = ""
    for found_by, install in _installers(serving, tools, log):
        try:
            program = install()
        except (MachineError, ToolError) as error:
            refusals.append(f"{found_by}: {_first_line(error.message)}")
            hint = error.hint
            continue
        version = ollama_install.version_of(program, log)
        return _ollama(program, version, found_by, tools, log)
    why = " ".join(["PATH: no ollama.", *refusals])
    if serving.engine == "ollama":
        raise MachineError(
            f"No Ollama can be had. {why}",
            hint=f"Install Ollama ({SUPPORTED}), or Go and a C++ compiler, from which it is built. "
            + hint,
            log=log,
        )
    console.warn(
        f"Ollama was not found and cannot be installed, so the toolchain's llama-server serves: "
        f"what it measures promotes nothing. {why} Install Ollama, or Go, by which it is built, or "
        "declare serving.engine: llama-server."
    )
    return _toolchain_server(tools, log, declared=False, why=f"no Ollama can be had ({why})")


def llama_server_of(ollama: Path) -> Path:
    """
    The llama-server that an Ollama program will run: the search of llm/llama_binary.go, 0.33.

    Links of the program are resolved first. The places that depend on the working directory of the
    server are left out: ours runs in an empty one.

    Raises:
        MachineError: There is none; Ollama itself would start and fail at the first load.
    """
    beside = ollama.resolve().parent
    tried = [place / "llama-server" for place in _helper_places(beside)]
    for path in tried:
        if path.exists():
            return path.resolve()
    raise MachineError(
        f"{ollama} has no llama-server: it starts, but no model could be loaded. Looked for "
        f"{', '.join(str(path) for path in tried)}.",
        hint="Install Ollama whole (its lib/ollama belongs beside its bin), or remove it from "
        "PATH: another is then installed apart.",
    )


def llama_version(llama_server: Path, log: Path) -> str:
    """
    What `llama-server --version` says: version, build and commit.

    Raises:
        ToolError: It does not run, or says nothing.
    """
    # Ollama's own finds its libraries in its directory only because Ollama tells it so.
    name = "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"
    inherited = os.environ.get(name)
    places = os.pathsep.join([str(llama_server.parent), *([inherited] if inherited else [])])
    done = proc.run([llama_server, "--version"], log=log, env={name: places}, timeout_s=60)
    found = _LLAMA_LINE.search(done.stdout + done.stderr)
    if found is None:
        raise ToolError(f"{llama_server} --version does not say a version.", log=log)
    return console.clean(found[1].strip())


def _installers(
    serving: Serving, tools: Toolchain, log: Path
) -> Iterator[tuple[Literal["go install", "release archive"], Callable[[], Path]]]:
    """Yield the ways in which Ollama can be installed, best first."""
    version = serving.ollama
    yield "go install", lambda: ollama_install.with_go(version, tools, log=log)
    sha256 = serving.ollama_archive_sha256
    yield "release archive", lambda: ollama_install.from_archive(version, sha256, log=log)


def _on_path(program: Path, tools: Toolchain, log: Path) -> Engine:
    version = ollama_install.version_of(program, log)
    hint = f"Install Ollama {SUPPORTED}, or remove it from PATH: another is then installed apart."
    if _triple(version) == (0, 0, 0):
        raise MachineError(
            f"Ollama on PATH ({program}) says version {version}: it was built without one, so "
            f"nobody knows whether it is supported ({SUPPORTED}).",
            hint=hint,
        )
    if _triple(version) < OLDEST:
        raise MachineError(
            f"Ollama {version} on PATH ({program}) is too old: supported is {SUPPORTED}.",
            hint=hint,
        )
    return _ollama(program, version, "PATH", tools, log)


def _ollama(
    program: Path,
    version: str,
    found_by: Literal["PATH", "go install", "release archive"],
    tools: Toolchain,
    log: Path,
) -> Engine:
    server = llama_server_of(program)
    llama_cpp = llama_version(server, log)
    is_ours = tools.commit[:7] in llama_cpp
    words = [
        f"Ollama {version} ({found_by}) with llama-server {llama_cpp},",
        "the llama.cpp of the benchmarks."
        if is_ours
        else f"another llama.cpp than the benchmarks' {tools.commit[:9]}.",
    ]
    if _triple(version) >= NOT_RUN:
        note = f"Ollama {version} is newer than what was run here (supported: {SUPPORTED})."
        console.warn(note + " Each load still proves what is served.")
        words.append(note)
    return Engine(
        id=EngineId(
            kind="ollama",
            version=version,
            llama_cpp=llama_cpp,
            found_by=found_by,
            declared=True,
            sentence=" ".join(words),
        ),
        ollama=program,
        llama_server=server,
        tools=tools,
    )


def _toolchain_server(tools: Toolchain, log: Path, *, declared: bool, why: str) -> Engine:
    server = tools.tool("llama-server")
    llama_cpp = llama_version(server, log)
    return Engine(
        id=EngineId(
            kind="llama-server",
            version=llama_cpp.split(" ", 1)[0],
            llama_cpp=llama_cpp,
            found_by="toolchain",
            declared=declared,
            sentence=f"llama-server {llama_cpp} of the toolchain, {why}.",
        ),
        ollama=None,
        llama_server=server,
        tools=tools,
    )


def _helper_places(beside: Path) -> Iterator[Path]:
    """Yield the directories in which an Ollama in `beside` looks for its helpers, in order."""
    system = sys.platform
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    local = [beside / "build/lib/ollama", beside / f"dist/{system}-{machine}/lib/ollama"]
    if system == "darwin":
        packaged = [beside / "lib/ollama", beside.parent / "lib/ollama"]
        libraries = [*packaged, *local, beside]
        packaged = [beside, *packaged]
    else:
        packaged = [beside.parent / "lib/ollama"]
        libraries = [*packaged, beside / "lib/ollama", *local]
    # ml.LibOllamaPath: the first of these directories that exists, else the program's own.
    first = next((place for place in libraries if place.is_dir()), beside)
    builds = sorted(beside.glob("build/llama-server-*/bin"))
    yield from dict.fromkeys([first, *packaged, *local, *builds])


def _triple(version: str) -> tuple[int, int, int]:
    """The release of a version such as 0.33.0-rc2; (0, 0, 0) if it is none."""
    found = _TRIPLE.match(version)
    return (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)


def _first_line(text: str) -> str:
    """The first line of a message, fit for a record: short, no directory of this machine."""
    line = text.splitlines()[0].replace(str(ollama_install.cache_root()), "the cache")
    home = str(Path("~").expanduser())
    if len(home) > 1:  # the home of a service may be /
        line = line.replace(home, "~")
    return console.clean(line)[:_SENTENCE_CHARACTERS]
