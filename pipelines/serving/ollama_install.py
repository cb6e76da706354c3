"""
Ollama in the user's cache, for machines that have none: built by Go, or the release archive.

Everything happens below one directory beside the toolchain's:
    <version>-go.build/         Go's module and build caches; removed when the program is complete
    <version>-go/               the program that `go install` made
    <version>-go-<toolchain>/   the layout: bin/ollama, and lib/ollama, which is the toolchain's bin
    <version>-release/          the release archive, unpacked; it brings a llama-server of its own
    downloads/                  the archive while it comes

Ollama looks for llama-server in ../lib/ollama beside its own program, links resolved
(llm/llama_binary.go of 0.33): so bin/ollama is a hard link or a copy, and lib/ollama may be a
link. In the layout with a toolchain the server that is loaded and the benchmark that chose the
quant are the same llama.cpp.

Go's caches are ours, not the user's: a build needs 1 GB of modules and objects that nothing else
there uses, a kill must be able to go on from them, and what we filled we can remove. GOPROXY,
GONOSUMDB and the like are the user's.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import atomic, console, disk, hashing, proc
from pipelines.errors import DigestError, FleetError, MachineError, ParamsError, ToolError
from pipelines.locks import exclusively
from pipelines.toolchain import default_cache_root

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.toolchain import Toolchain

MODULE: Final = "github.com/ollama/ollama"
# Where Go's own installer puts it; not on the PATH of a service.
_USUAL_GO: Final = Path("/usr/local/go/bin/go")
# Modules and objects of 0.33.0 take 0.9 GiB together (du), Go's temporary files and the program the
# rest.
_GO_NEEDED_GIB: Final = 1.5
_GO_TIMEOUT_S: Final = 3600.0

RELEASES: Final = f"https://{MODULE}/releases/download"
_ARCHIVE_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_CONNECT_TIMEOUT_S: Final = 5.0
_READ_TIMEOUT_S: Final = 30.0
# Of the archive's size: what unpacking adds. zstd makes libraries about three times smaller.
_UNPACKED_RATIO: Final = 3.5

_DONE: Final = "complete"
_VERSION_LINE: Final = re.compile(r"\b(?:client|ollama) version is (\S+)")
_GO_VERSION: Final = re.compile(r"\bgo(\d+(?:\.\d+)*)")
_GO_TOO_OLD: Final = re.compile(r"requires go >= ([\d.]+)(?: \(running go ([\d.]+))?")
_GO_MOD_TOO_NEW: Final = re.compile(r"invalid go version '([\d.]+)'")
_OUT_OF_REACH: Final = re.compile(
    r"dial tcp|no such host|i/o timeout|connection re|proxyconnect|TLS handshake|x509|"
    r"\b50[0234] |unexpected EOF|disabled by GOPROXY"
)
_UNKNOWN_VERSION: Final = re.compile(r"unknown revision|no matching|\b(?:404|410) ")


def cache_root() -> Path:
    """Where every Ollama of ours lives: `ollama` in the cache of `pipelines.toolchain`."""
    return default_cache_root().resolve() / "ollama"


def version_of(program: Path, log: Path) -> str:
    """
    The version that an Ollama program has, whatever server may run on this machine.

    `ollama --version` asks the server of $OLLAMA_HOST first and prints the server's version; it is
    given an address at which nobody listens, and a home of its own.

    Raises:
        ToolError: It does not run, or prints no version.
    """
    with tempfile.TemporaryDirectory() as home:
        private = {"HOME": home, "OLLAMA_HOST": "127.0.0.1:1"}
        done = proc.run(
            [program, "--version"], log=log, env=private, inherit_env=False, timeout_s=30
        )
    found = _VERSION_LINE.findall(done.stdout + done.stderr)
    if not found:
        raise ToolError(f"{program} --version does not say a version.", log=log)
    return console.clean(found[-1])


# --- by Go ---------------------------------------------------------------------------------------


def with_go(version: str, tools: Toolchain, *, log: Path) -> Path:
    """
    The program of Ollama `version`, built by Go, in a layout with the toolchain's llama-server.

    Waits for another process that installs the same; goes on where a killed one ended. When all
    is there it costs a few stats.

    Args:
        version: A release, such as "0.33.0".
        tools: Whose llama-server and llama-quantize it shall run.
        log: Gets the whole output of Go.

    Raises:
        MachineError: No Go, a Go that is too old, no C compiler, no room, no network; says which.
        ParamsError: There is no such release.
        DigestError: A module is not what Go's checksum database lists.
        ToolError: The build failed, or the program is another version.
    """
    root = cache_root()
    layout = root / f"{version}-go-{tools.prefix.name}"
    program = layout / "bin" / "ollama"
    if _is_laid_out(layout, tools):
        return program
    with (
        disk.explained(root),
        exclusively(root / f"{version}-go.lock", f"installing Ollama {version}"),
    ):
        if not _is_laid_out(layout, tools):
            _lay_out(_built(version, root, log), layout, tools)
    return program


def _is_laid_out(layout: Path, tools: Toolchain) -> bool:
    """Tell whether Ollama would find its program and the toolchain's llama-server there."""
    lib = layout / "lib" / "ollama"
    return (
        _is_complete(layout)
        and lib.resolve() == (tools.prefix / "bin").resolve()
        and all(os.access(lib / name, os.X_OK) for name in ("llama-server", "llama-quantize"))
    )


def _is_complete(home: Path) -> bool:
    """Tell whether `home` was finished and its program still has the size that it had then."""
    try:
        size_bytes = int((home / _DONE).read_text(encoding="ascii"))
        return (home / "bin" / "ollama").stat().st_size == size_bytes
    except (OSError, ValueError):
        return False


def _finish(home: Path) -> None:
    """Write what `_is_complete` looks for; the last file of a directory that is being made."""
    size_bytes = (home / "bin" / "ollama").stat().st_size
    (home / _DONE).write_text(str(size_bytes), encoding="ascii")


def _lay_out(program: Path, layout: Path, tools: Toolchain) -> None:
    with atomic.replacing(layout) as staging:
        (staging / "bin").mkdir(parents=True)
        (staging / "lib").mkdir()
        _link_or_copy(program, staging / "bin" / "ollama")
        (staging / "lib" / "ollama").symlink_to((tools.prefix / "bin").resolve())
        _finish(staging)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _built(version: str, root: Path, log: Path) -> Path:
    """The program that Go made of `version`, made now if it is not there."""
    home = root / f"{version}-go"
    if not _is_complete(home):
        go = go_program(log)
        compilers = _compilers()
        work = root / f"{version}-go.build"
        _require_room(root, _GO_NEEDED_GIB)
        console.step(f"Installing Ollama {version} with Go: some 90 CPU seconds, once per version")
        atomic.remove(work / "tmp")
        (work / "tmp").mkdir(parents=True)
        with atomic.replacing(home) as staging:
            _go_install(go, version, staging / "bin", _go_environment(work, compilers), log)
            _require_version(staging / "bin" / "ollama", version, log)
            _finish(staging)
        atomic.remove(work)
    return home / "bin" / "ollama"


def go_program(log: Path) -> Path:
    """
    The Go of PATH, or the usual one if that is newer: a service often sees an old one only.

    Raises:
        MachineError: There is none.
    """
    on_path = shutil.which("go")
    found = [Path(on_path)] if on_path else []
    if os.access(_USUAL_GO, os.X_OK):
        found.append(_USUAL_GO)
    if not found:
        raise MachineError(
            f"Go is not installed: neither on PATH nor as {_USUAL_GO}.",
            hint="Install Go from your distribution or from go.dev.",
        )
    if len({path.resolve() for path in found}) == 1:
        return found[0]
    return max(found, key=lambda go: go_version(go, log))


def go_version(go: Path, log: Path) -> tuple[int, ...]:
    """E.g. (1, 26, 8); nothing for a Go that does not run."""
    try:
        said = proc.run([go, "version"], log=log, timeout_s=30).stdout
    except (ToolError, MachineError):
        return ()
    version = _GO_VERSION.search(said)
    return tuple(map(int, version[1].split("."))) if version else ()


def _compilers() -> dict[str, str]:
    """CC and CXX for cgo: the declared ones, else what this machine has."""
    wanted = {"CC": ("gcc", "cc", "clang"), "CXX": ("g++", "c++", "clang++")}
    found = {
        name: os.environ.get(name) or next(filter(None, map(shutil.which, usual)), None)
        for name, usual in wanted.items()
    }
    missing = [name for name, program in found.items() if program is None]
    if missing:
        words = {"CC": "a C compiler (gcc)", "CXX": "a C++ compiler (g++)"}
        raise MachineError(
            f"Ollama is built with cgo, and {' and '.join(words[name] for name in missing)} "
            "is not on PATH.",
            hint="Debian and Ubuntu: sudo apt-get install g++. Fedora: sudo dnf install gcc-c++.",
        )
    return {name: program for name, program in found.items() if program is not None}


def _go_environment(work: Path, compilers: dict[str, str]) -> dict[str, str]:
    """
    What Go is told beside the user's own settings.

    GOTOOLCHAIN=local unless the user set it: Go would otherwise download another Go, unasked.
    GOFLAGS and GOWORK of the user are for their own modules. -modcacherw, so that the modules can
    be removed; -trimpath, so that the program names no directory of this machine.
    """
    return {
        "GOPATH": str(work / "path"),
        "GOMODCACHE": str(work / "path" / "pkg" / "mod"),
        "GOCACHE": str(work / "cache"),
        # Else a kill leaves objects in the user's temporary directory, where nobody removes them.
        "GOTMPDIR": str(work / "tmp"),
        "TMPDIR": str(work / "tmp"),
        "GOTOOLCHAIN": os.environ.get("GOTOOLCHAIN") or "local",
        "GOFLAGS": "-modcacherw -trimpath",
        "GOWORK": "off",
        "GO111MODULE": "on",
        "GOOS": "",
        "GOARCH": "",
        "CGO_ENABLED": "1",
        **compilers,
    }


def _go_install(go: Path, version: str, into: Path, env: dict[str, str], log: Path) -> None:
    into.mkdir(parents=True)
    # Without -X the program calls itself 0.0.0; -s -w leaves out symbols, a third of its size.
    ldflags = f"-s -w -X {MODULE}/version.Version={version}"
    argv: list[str | Path] = [go, "install", "-v", "-ldflags", ldflags, f"{MODULE}@v{version}"]
    try:
        with _ticking(f"Installing Ollama {version}") as tell:
            proc.run(
                argv, log=log, env=env | {"GOBIN": str(into)}, timeout_s=_GO_TIMEOUT_S, on_line=tell
            )
    except ToolError as error:
        raise _explained(error, version) from error


def _explained(error: ToolError, version: str) -> FleetError:
    """What an unsuccessful `go install` means, where its words are known."""
    text = error.message
    too_old = _GO_TOO_OLD.search(text) or _GO_MOD_TOO_NEW.search(text)
    if too_old:
        running = f"Go {too_old[2]}" if too_old.lastindex == 2 else "The Go here"  # noqa: PLR2004
        return MachineError(
            f"{running} is too old to build Ollama {version}, which wants Go {too_old[1]}.",
            hint="Install a newer Go, or set GOTOOLCHAIN=auto so that Go downloads one itself.",
        )
    if "SECURITY ERROR" in text or "checksum mismatch" in text:
        return DigestError(f"Go refused a module of Ollama {version}: {text}")
    if "no space left" in text:
        return MachineError(
            f"The disk filled up while Ollama {version} was built.",
            hint=f"Make room under {cache_root()}; the same command goes on.",
        )
    if _OUT_OF_REACH.search(text):
        return MachineError(
            f"Go could not download Ollama {version}: the module proxy is out of reach.\n{text}",
            hint="Check the network and Go's own settings (GOPROXY, GOSUMDB, proxies).",
        )
    if _UNKNOWN_VERSION.search(text):
        return ParamsError(
            f"serving.ollama: Go finds no Ollama {version}.\n{text}",
            hint="Set serving.ollama in params.yaml to a release that exists.",
        )
    return error


@contextmanager
def _ticking(label: str) -> Iterator[Callable[[str], None]]:
    """Show progress also while a program is silent; yields what takes its latest line."""
    latest = [""]
    over = threading.Event()

    def tick(progress: console.Progress) -> None:
        while not over.wait(0.2):
            progress.update(0, latest[0][:60])

    def tell(line: str) -> None:
        latest[0] = line

    with console.Progress(label) as progress:
        thread = threading.Thread(target=tick, args=(progress,), daemon=True)
        thread.start()
        try:
            yield tell
        finally:
            over.set()
            thread.join()


def _require_room(root: Path, needed_gib: float) -> None:
    root.mkdir(parents=True, exist_ok=True)
    free_gib = shutil.disk_usage(root).free / disk.GIB
    if free_gib < needed_gib:
        raise MachineError(
            f"Installing Ollama needs {needed_gib:.1f} GiB in the cache; "
            f"{free_gib:.1f} GiB are free.",
            hint=f"Free some space under {root}, or set GGUF_FLEET_CACHE to a directory elsewhere.",
        )


def _require_version(program: Path, version: str, log: Path) -> None:
    got = version_of(program, log)
    if got != version:
        raise ToolError(f"Ollama {version} was installed, but the program says {got}.", log=log)


# --- the release archive -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One file of an Ollama release."""

    version: str
    name: str
    sha256: str

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{RELEASES}/v{self.version}/{self.name}"


def from_archive(version: str, sha256: str | None, *, log: Path) -> Path:
    """
    The program of the official release archive, beside the llama-server that it brings.

    Args:
        version: A release, such as "0.33.0".
        sha256: Declared digest of the archive for this platform; without it nothing is downloaded.
        log: Gets the output of tar.

    Raises:
        MachineError: No digest declared, no archive for this platform, no zstd, no room, no
            network.
        DigestError: The archive is another one; nothing of it was unpacked.
        ToolError: It does not unpack, or holds no Ollama of that version.
    """
    root = cache_root()
    home = root / f"{version}-release"
    program = home / "bin" / "ollama"
    if _is_complete(home):
        return program
    archive = _archive(version, sha256)
    missing = [name for name in ("tar", "zstd") if shutil.which(name) is None]
    if missing:
        raise MachineError(
            f"The release archive of Ollama cannot be unpacked: {' and '.join(missing)} is not on "
            "PATH.",
            hint="Debian and Ubuntu: sudo apt-get install zstd. Fedora: sudo dnf install zstd.",
        )
    with (
        disk.explained(root),
        exclusively(root / f"{home.name}.lock", f"installing Ollama {version}"),
    ):
        if not _is_complete(home):
            kept = _downloaded(archive, root / "downloads")
            _unpack(kept, home, version, log)
            kept.unlink()
    return program


def _archive(version: str, sha256: str | None) -> Archive:
    architecture = _ARCHIVE_ARCHITECTURES.get(platform.machine())
    if sys.platform != "linux" or architecture is None:
        raise MachineError(
            f"There is no release archive for {sys.platform} on {platform.machine()} that we know."
        )
    if sha256 is None:
        raise MachineError(
            "No sha256 of Ollama's release archive is declared, so none is downloaded.",
            hint=f"Set serving.ollama_archive_sha256 to the digest of ollama-linux-{architecture}"
            f".tar.zst in sha256sum.txt of release v{version}.",
        )
    return Archive(version=version, name=f"ollama-linux-{architecture}.tar.zst", sha256=sha256)


def _downloaded(archive: Archive, folder: Path) -> Path:
    """The archive with its declared digest; what an interrupted download brought is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{archive.version}-{archive.name}"
    part = atomic.part_name(kept)
    if not kept.is_file():
        _fetch(archive, part)
        atomic.put_in_place(part, kept)
    got = hashing.digest(kept).sha256
    if got != archive.sha256:
        kept.unlink()
        raise DigestError(
            f"{archive.name} of Ollama {archive.version}: wanted sha256 {archive.sha256}, got "
            f"{got}. Nothing of it was used.",
            hint="If the version was changed on purpose, set serving.ollama_archive_sha256 to the "
            "digest in that release's sha256sum.txt.",
        )
    return kept


def _fetch(archive: Archive, part: Path) -> None:
    """Download into `part`, going on from its end where the server can do that."""
    import requests  # noqa: PLC0415 - 0.1 s that only a download pays

    done_bytes = part.stat().st_size if part.is_file() else 0
    console.step(f"Downloading {archive.name} of Ollama {archive.version}")
    try:
        with requests.get(
            archive.url,
            headers={"Range": f"bytes={done_bytes}-"} if done_bytes else {},
            timeout=(_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S),
            stream=True,
        ) as answer:
            if answer.status_code == requests.codes.requested_range_not_satisfiable:
                return  # all of it is there; its digest decides
            answer.raise_for_status()
            resumes = answer.status_code == requests.codes.partial_content
            done_bytes = done_bytes if resumes else 0
            left_bytes = int(answer.headers.get("Content-Length") or 0)
            total_bytes = done_bytes + left_bytes
            _require_room(part.parent, (left_bytes + total_bytes * _UNPACKED_RATIO) / disk.GIB)
            label = f"Downloading Ollama {archive.version}"
            with (
                part.open("ab" if resumes else "wb") as file,
                console.Progress(label, total=total_bytes / 2**20 or None, unit="MiB") as progress,
            ):
                for chunk in answer.iter_content(1 << 18):
                    file.write(chunk)
                    done_bytes += len(chunk)
                    progress.update(done_bytes / 2**20)
    except requests.RequestException as error:
        status = error.response.status_code if error.response is not None else None
        cause = f"the server answers {status}" if status else type(error).__name__
        raise MachineError(
            f"{archive.name} of Ollama {archive.version} could not be downloaded: {cause}.",
            hint="Check the network; the same command goes on where this one ended.",
        ) from error


def _unpack(archive: Path, home: Path, version: str, log: Path) -> None:
    with atomic.replacing(home) as staging:
        staging.mkdir(parents=True)
        # Its sha256 is the declared one, so its paths are trusted.
        proc.run(["tar", "--zstd", "-xf", archive, "-C", staging], log=log)
        for name in ("bin/ollama", "lib/ollama/llama-server"):
            if not os.access(staging / name, os.X_OK):
                raise ToolError(f"The release archive of Ollama {version} holds no {name}.")
        _require_version(staging / "bin" / "ollama", version, log)
        _finish(staging)
