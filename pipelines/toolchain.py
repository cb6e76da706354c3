"""
The one llama.cpp every stage uses: converter, tools, server and Python bindings of one commit.

`ensure()` returns the toolchain a declaration asks for. When the prefix is already in the cache
that costs a few milliseconds (one small JSON read, some thirty stats, no hashing); otherwise
`pipelines.toolchain_build` downloads the pinned llama-cpp-python sdist, which vendors the whole
of llama.cpp, and builds it.

The prefix
    bin/         the programs in TOOLS
    lib/         the shared libraries, found by the programs through $ORIGIN/../lib
    python/      the llama_cpp bindings, pure ctypes, loaded with `Toolchain.python_env()`
    share/       convert_hf_to_gguf.py, conversion/, gguf-py/ and the licences
    toolchain.json   what was built, from what, and the sha256 of each file; written last

toolchain.json names no path of the machine it was built on: it is a dependency of DVC stages and
is the same on machines that built the same thing the same way.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

from pipelines.errors import DigestError, ToolError

if TYPE_CHECKING:
    from pipelines.layout import Layout
    from pipelines.params import Declaration

Backend: TypeAlias = Literal["cpu", "cuda", "vulkan", "metal"]
DeclaredBackend: TypeAlias = Literal["auto", "cpu", "cuda", "vulkan", "metal"]

SCHEMA_VERSION: Final = 1
MANIFEST_NAME: Final = "toolchain.json"
_BUILD_RECIPE: Final = Path(__file__).with_name("toolchain_build.py")

# Also the build targets: nothing else of llama.cpp is compiled into the prefix.
TOOLS: Final = (
    "llama-batched-bench",
    "llama-bench",
    "llama-cli",
    "llama-completion",
    "llama-fit-params",
    "llama-gguf-split",
    "llama-imatrix",
    "llama-perplexity",
    "llama-quantize",
    "llama-results",
    "llama-server",
    "llama-tokenize",
)


@dataclass(frozen=True)
class ToolchainSpec:
    """
    The `toolchain:` section of params.yaml.

    Attributes:
        llama_cpp_python: Version of the sdist, e.g. "0.3.36"; it decides the llama.cpp commit.
        sha256: Digest of that sdist, 64 hex digits. Bytes with another digest are never unpacked.
        backend: What to compile for; "auto" asks `detect_backend`.
        recipe: Counter of the operator's: raising it re-runs the stages that list it in DVC. It
            does not change the build, so it is in neither the cache key nor toolchain.json.
        cuda_architectures: CUDA architectures such as "86" or "90a"; empty: those in $CUDAARCHS,
            else those of the cards in this machine. Used by the cuda backend only.
    """

    llama_cpp_python: str
    sha256: str
    backend: DeclaredBackend = "auto"
    recipe: int = 1
    cuda_architectures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Toolchain:
    """A complete prefix on this machine, and what its toolchain.json says about it."""

    prefix: Path
    manifest: dict[str, Any]

    @property
    def commit(self) -> str:
        """The llama.cpp commit everything here was built from, 40 hex digits."""
        return cast("str", self.manifest["llama_cpp_commit"])

    @property
    def backend(self) -> Backend:
        """What the libraries were compiled for; not a promise that a device answers."""
        return cast("Backend", self.manifest["backend"])

    @property
    def converter(self) -> Path:
        """convert_hf_to_gguf.py; it finds conversion/ and gguf-py/ beside itself."""
        return self.prefix / "share" / "llama.cpp" / "convert_hf_to_gguf.py"

    def tool(self, name: str) -> Path:
        """
        The path of one llama.cpp program.

        Raises:
            ToolError: `name` is none of TOOLS, or the file has gone since the prefix was opened.
        """
        path = self.prefix / "bin" / name
        if name not in self.manifest["tools"]:
            raise ToolError(
                f"{name} is not part of the toolchain.",
                hint=f"It has: {', '.join(self.manifest['tools'])}.",
            )
        if not os.access(path, os.X_OK):
            raise ToolError(
                f"{path} is missing or cannot be run.",
                hint="Run `fleet toolchain`: it rebuilds an incomplete prefix.",
            )
        return path

    def python_env(self) -> dict[str, str]:
        """
        Variables with which `import llama_cpp` uses this prefix: hand them to `proc.run(env=...)`.

        The bindings come first on PYTHONPATH. What they import themselves (numpy, jinja2,
        diskcache, typing_extensions) comes from the interpreter's own environment.
        """
        inherited = os.environ.get("PYTHONPATH")
        search = [str(self.prefix / "python"), *([inherited] if inherited else [])]
        return {
            "PYTHONPATH": os.pathsep.join(search),
            "LLAMA_CPP_LIB_PATH": str(self.prefix / "lib"),
        }

    def manifest_text(self) -> str:
        """The manifest as its own file has it, without the last line end."""
        return json.dumps(self.manifest, indent=2, ensure_ascii=False)

    def verify(self) -> None:
        """
        Hash every file that toolchain.json names and compare (0.1 s for cpu, 2 s for cuda).

        Raises:
            DigestError: at least one file differs or is missing; the message names each.
        """
        from pipelines.toolchain_build import describe_prefix  # noqa: PLC0415 - it imports us

        found = describe_prefix(self.prefix)
        wrong = [
            f"{part}/{name}: wanted {_sha256_of(want)}, got {_sha256_of(found[part].get(name))}"
            for part in ("tools", "libraries", "trees")
            for name, want in self.manifest[part].items()
            if found[part].get(name) != want
        ]
        if wrong:
            raise DigestError(
                f"{len(wrong)} part(s) of the toolchain in {self.prefix} are not what was built:\n"
                + "\n".join(wrong),
                hint="Delete that directory and run `fleet toolchain`.",
            )


def ensure(
    spec: ToolchainSpec, *, cache_root: Path | None = None, offline: bool = False
) -> Toolchain:
    """
    The toolchain `spec` declares, built first if this machine does not have it.

    Args:
        spec: The declaration.
        cache_root: Where prefixes live; None: `default_cache_root()`.
        offline: Never use the network. What is in the cache still gets built.

    Raises:
        MachineError: a compiler, cmake, the network, disk space or the declared device's toolkit
            is missing; says which and how to install it.
        DigestError: the sdist's sha256 is not the declared one.
        ToolError: cmake, the compiler or a program just built failed; the log has it all.
    """
    root = (cache_root or default_cache_root()).resolve() / "toolchain"
    selection = root / "selected" / f"{_host_fingerprint(spec)}.json"
    found = _selected(selection)
    if found is not None:
        return found

    # Only now: the fast path needs neither, and toolchain_build imports this module.
    from pipelines import toolchain_build  # noqa: PLC0415
    from pipelines.atomic import write_json  # noqa: PLC0415

    toolchain = toolchain_build.build(spec, root, offline=offline)
    selection.parent.mkdir(parents=True, exist_ok=True)
    write_json(selection, {"schema_version": SCHEMA_VERSION, "key": toolchain.prefix.name})
    return toolchain


def there(spec: ToolchainSpec, *, cache_root: Path | None = None) -> Toolchain | None:
    """The toolchain `spec` declares if this machine has chosen one already; nothing is built."""
    root = (cache_root or default_cache_root()).resolve() / "toolchain"
    return _selected(root / "selected" / f"{_host_fingerprint(spec)}.json")


def spec_of(declared: Declaration) -> ToolchainSpec:
    """The `toolchain` section of params.yaml as this module's own type."""
    section = declared.toolchain
    return ToolchainSpec(
        llama_cpp_python=section.llama_cpp_python,
        sha256=section.sha256,
        backend=section.backend,
        recipe=section.recipe,
    )


def load(at: Layout) -> Toolchain:
    """The toolchain that the fleet at `at` declares; what a stage calls."""
    from pipelines import declaration  # noqa: PLC0415 - pydantic, not for the fast path

    return ensure(spec_of(declaration.load(at.params)))


def default_cache_root() -> Path:
    """$GGUF_FLEET_CACHE, else $XDG_CACHE_HOME/gguf-fleet, else ~/.cache/gguf-fleet."""
    declared = os.environ.get("GGUF_FLEET_CACHE")
    if declared:
        return Path(declared).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "gguf-fleet"


def open_prefix(prefix: Path) -> Toolchain | None:
    """
    The toolchain in `prefix`, or None unless it is complete.

    Complete means: toolchain.json is readable and each program and library it names is there
    with the size it says. No byte is hashed; `Toolchain.verify` does that.
    """
    try:
        manifest = json.loads((prefix / MANIFEST_NAME).read_text(encoding="utf-8"))
        if manifest["schema_version"] != SCHEMA_VERSION:
            return None
        files = [(prefix / "bin" / name, item) for name, item in manifest["tools"].items()]
        files += [(prefix / "lib" / name, item) for name, item in manifest["libraries"].items()]
        if any(path.stat().st_size != item["size_bytes"] for path, item in files):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # Half a prefix is no prefix: the caller builds it again.
    toolchain = Toolchain(prefix=prefix, manifest=manifest)
    return toolchain if toolchain.converter.is_file() else None


def detect_backend(declared: DeclaredBackend = "auto") -> tuple[Backend, str]:
    """
    What to compile for, and why, as a sentence for the log.

    cuda when an NVIDIA driver answers, metal on macOS, else cpu. vulkan only when declared: a
    loader without a usable device is common, and ends in a slow software renderer.
    """
    if declared != "auto":
        return declared, "declared in params.yaml"
    if sys.platform == "darwin":
        return "metal", "this is macOS"

    from pipelines.toolchain_build import nvidia_cards  # noqa: PLC0415 - it imports us

    cards = nvidia_cards()
    if cards:
        names = ", ".join(sorted({card.name for card in cards}))
        return "cuda", f"the NVIDIA driver reports {len(cards)} card(s): {names}"
    return "cpu", "no NVIDIA driver answers and this is not macOS"


def main_text(toolchain: Toolchain) -> str:
    """What `fleet toolchain` prints: the pin, the backend, the place, the size."""
    manifest = toolchain.manifest
    files = [*manifest["tools"].values(), *manifest["libraries"].values()]
    size_mib = sum(item["size_bytes"] for item in files) / 2**20
    archs = manifest["cuda_architectures"]
    backend = toolchain.backend + (f" for sm_{', sm_'.join(archs)}" if archs else "")
    return "\n".join(
        [
            f"llama.cpp  {toolchain.commit[:12]} (llama-cpp-python {manifest['llama_cpp_python']})",
            f"backend    {backend}",
            f"compiler   {manifest['compiler']}",
            f"prefix     {toolchain.prefix}",
            (
                f"size       {size_mib:.0f} MiB, {len(manifest['tools'])} programs, "
                f"{len(manifest['libraries'])} libraries"
            ),
        ]
    )


def _selected(selection: Path) -> Toolchain | None:
    """The prefix an earlier `ensure` chose under the same circumstances, if still complete."""
    try:
        key = json.loads(selection.read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return open_prefix(selection.parent.parent / str(key))


def _host_fingerprint(spec: ToolchainSpec) -> str:
    """
    A name for everything that decides which prefix `spec` means here, without running a program.

    The real key holds the compiler's version and the cards' architectures, which take processes
    and driver calls to learn. Paths, sizes and mtimes of the same programs change whenever those
    answers do, and cost stats only.
    """
    observed = {
        # The recipe of the build, comments included: another one has to look for its own key.
        "recipe": hashlib.sha256(_BUILD_RECIPE.read_bytes()).hexdigest(),
        "spec": [spec.llama_cpp_python, spec.sha256, spec.backend, spec.cuda_architectures],
        "system": system_name(),
        "driver": _nvidia_driver_text() if spec.backend in {"auto", "cuda"} else None,
        "programs": [
            _program_stamp(os.environ.get("CC") or "cc"),
            _program_stamp(os.environ.get("CXX") or "c++"),
            _program_stamp(os.environ.get("CUDACXX") or "nvcc"),
        ],
        "cuda": [os.environ.get(name) for name in ("CUDAARCHS", "CUDA_HOME", "CUDA_PATH")],
    }
    return hashlib.sha256(json.dumps(observed).encode()).hexdigest()[:20]


def system_name() -> str:
    """E.g. "Linux x86_64 glibc 2.36": what decides whether a binary built elsewhere runs here."""
    if sys.platform == "darwin":
        return f"macOS {platform.machine()} {platform.mac_ver()[0]}"
    libc = "unknown libc"
    if hasattr(os, "confstr"):
        libc = os.confstr("CS_GNU_LIBC_VERSION") or libc
    return f"{platform.system()} {platform.machine()} {libc}"


def _nvidia_driver_text() -> str | None:
    """The kernel driver's own version text; None without the driver. A file read, no call."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _program_stamp(name: str) -> list[str | int] | None:
    found = shutil.which(name)
    if found is None:
        return None
    real = Path(found).resolve()
    stat = real.stat()
    return [str(real), stat.st_size, stat.st_mtime_ns]


def _sha256_of(item: dict[str, Any] | None) -> str:
    return "nothing" if item is None else str(item["sha256"])
