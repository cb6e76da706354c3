"""
How the prefix of `pipelines.toolchain` comes to be: download, unpack, configure, compile, install.

Everything happens below one directory of the user's cache:
    downloads/            the sdist, kept: 77 MB that make a rebuild possible without a network
    <key>.build/          source, objects and logs; removed when the prefix is complete
    <key>/                the prefix
    <key>.lock            held while somebody builds that prefix
    cuda-<version>/       NVIDIA's compiler from PyPI wheels, where the system has none
    pip/                  a pip of our own, where this environment has none

A kill at any moment costs the compile jobs that were running, nothing else: unpacking and
installing end with a rename, the compile tree belongs to the key and ninja goes on from its log.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import atomic, console, hashing, proc
from pipelines.errors import DigestError, MachineError, ToolError
from pipelines.locks import exclusively
from pipelines.toolchain import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    TOOLS,
    Toolchain,
    detect_backend,
    open_prefix,
    system_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.toolchain import Backend, ToolchainSpec

# Raised when the same inputs are built or laid out differently: part of every key.
LAYOUT: Final = 1

# A compiler of this family is what the CUDA wheels below bring; its programs need this driver.
CUDA_VERSION: Final = "13.0.88"
CUDA_DRIVER_MAJOR: Final = 580
_CUDA_WHEELS: Final = {
    "nvidia-cuda-nvcc==13.0.88": (
        "56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03",  # x86_64
        "c7ff28f86a24effdc6c034fa15230c549a273e4771b10a7fec14996f8cf3307f",  # aarch64
    ),
    "nvidia-nvvm==13.0.88": (
        "c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0",
        "c4376a291d72d22a315d9d2f69bdae8f8cd83a627f75bad395cee49a0fe65dc1",
    ),
    "nvidia-cuda-crt==13.0.88": (
        "2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4",
        "ee2ea2a97073e02ee62bb27841f437332be2c248e3eac013df07997ada39c003",
    ),
    "nvidia-cuda-cccl==13.0.85": (
        "e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649",
        "6f0203e29fed809ee2b7fe9b1344df66ecab990c37d6a2e0e189b26d6c97ed7c",
    ),
    "nvidia-cuda-runtime==13.0.96": (
        "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
        "ef9bcbe90493a2b9d810e43d249adb3d02e98dd30200d86607d8d02687c43f55",
    ),
    "nvidia-cublas==13.1.0.3": (
        "ee8722c1f0145ab246bccb9e452153b5e0515fd094c3678df50b2a0888b8b171",
        "c86fc7f7ae36d7528288c5d88098edcb7b02c633d262e7ddbb86b0ad91be5df2",
    ),
}
# Libraries of the toolkit that a program built with it loads; libcuda.so.1 is the driver's own.
_CUDA_RUNTIME: Final = ("libcudart.so.*", "libcublas.so.*", "libcublasLt.so.*")

# Measured on 2 cores of a shared server; the estimate divides by the cores of this machine.
_CPU_SECONDS: Final = {"cpu": 600, "vulkan": 1200, "metal": 660, "cuda": 600}
_CPU_SECONDS_PER_CUDA_ARCHITECTURE: Final = 1600
# Sdist, sources, objects and prefix together; cuda also unpacks its toolkit.
_NEEDED_GIB: Final = {"cpu": 1.0, "vulkan": 1.5, "metal": 1.0, "cuda": 3.0}
# One nvcc job on the flash-attention kernels; g++ on the server's sources stays below.
_GIB_PER_JOB: Final = 2.0

_INSTALL_COMPILERS: Final = (
    "Debian and Ubuntu: sudo apt-get install build-essential cmake ninja-build. "
    "Fedora: sudo dnf install gcc-c++ cmake ninja-build. "
    "macOS: xcode-select --install, then brew install cmake ninja. "
    "Without root, cmake and ninja are also Python packages: pip install cmake ninja."
)
_STEP = re.compile(r"^\[\s*(\d+)(?:/(\d+)\]|%\])")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# How the manifest calls gcc, and what only gcc says of itself.
_GCC = "gcc "
_WRITES_GCC = "Free Software Foundation"


@dataclass(frozen=True, kw_only=True)
class Card:
    """One NVIDIA card as its driver describes it."""

    name: str
    architecture: str  # compute capability without its dot: "86"
    driver_major: int | None  # None where the driver does not tell its version


@dataclass(frozen=True, kw_only=True)
class CudaToolkit:
    """A directory with bin/nvcc, include/ and lib/, and the version nvcc reports."""

    root: Path
    version: str
    is_ours: bool  # from wheels, inside our cache


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be built: all that decides the bytes of the prefix, and so its key."""

    spec: ToolchainSpec
    backend: Backend
    reason: str
    cuda_architectures: tuple[str, ...]
    cuda_toolkit: str | None
    flags: tuple[str, ...]
    compiler: str
    system: str

    def described(self) -> dict[str, Any]:
        """The part of the plan that goes, as it is, into the key and into toolchain.json."""
        return {
            "sdist_sha256": self.spec.sha256,
            "backend": self.backend,
            "cuda_architectures": list(self.cuda_architectures),
            "cuda_toolkit": self.cuda_toolkit,
            "cmake_flags": list(self.flags),
            "system": self.system,
            "compiler": self.compiler,
        }

    @property
    def key(self) -> str:
        """The prefix's directory name, e.g. "cpu-3f9c2a71b04de855"."""
        # Only gcc goes by another name than its own; what it says of itself names it already.
        compiler = self.compiler.removeprefix(_GCC)
        described = {"layout": LAYOUT, **self.described(), "compiler": compiler}
        text = json.dumps(described, sort_keys=True)
        return f"{self.backend}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is compiled: the unpacked sdist, its llama.cpp commit, NVIDIA's compiler if any."""

    top: Path
    commit: str
    toolkit: CudaToolkit | None

    @property
    def llama_cpp(self) -> Path:
        """The vendored llama.cpp."""
        return self.top / "vendor" / "llama.cpp"


def build(spec: ToolchainSpec, root: Path, *, offline: bool) -> Toolchain:
    """
    The prefix for `spec` under `root`, built unless it is already complete there.

    Waits for another process that builds the same prefix; resumes what a killed one left.

    Raises:
        MachineError: something that building needs is missing; see `pipelines.toolchain.ensure`.
        DigestError: the sdist is not the declared one.
        ToolError: configuring, compiling or trying the result failed.
    """
    backend, reason = detect_backend(spec.backend)
    missing = _missing_programs(backend)
    if missing:
        return _prebuilt(spec, backend, root) or _give_up_for(missing)
    plan = _plan(spec, backend, reason, root / "logs" / "probe.log")
    prefix = root / plan.key
    found = open_prefix(prefix)
    if found is not None:
        return found
    with exclusively(root / f"{plan.key}.lock", "building the same toolchain"):
        return open_prefix(prefix) or _build_locked(plan, root, offline=offline)


def _build_locked(plan: Plan, root: Path, *, offline: bool) -> Toolchain:
    work = root / f"{plan.key}.build"
    prefix = root / plan.key
    _announce(plan)
    _require_disk(plan, root)
    with exclusively(root / "downloads.lock", "downloading llama-cpp-python"):
        sdist = _sdist(plan.spec, root, work / "download.log", offline=offline)
    toolkit = _cuda_toolkit(root, offline=offline) if plan.backend == "cuda" else None
    top = _unpacked(sdist, work / "source")
    inputs = Inputs(top=top, commit=_llama_cpp_commit(top), toolkit=toolkit)
    compiled = _compiled(plan, inputs, work)
    with atomic.replacing(prefix) as staging:
        _install(compiled, inputs, staging)
        _try_out(staging, inputs.commit, work / "try-out.log")
        _warn_without_device(plan, staging, work / "try-out.log")
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "llama_cpp_python": plan.spec.llama_cpp_python,
            "llama_cpp_commit": inputs.commit,
            **plan.described(),
            **describe_prefix(staging),
        }
        atomic.write_json(staging / MANIFEST_NAME, manifest)
    atomic.remove(work)
    return Toolchain(prefix=prefix, manifest=manifest)


# --- what this machine can build -----------------------------------------------------------------


def _missing_programs(backend: Backend) -> list[str]:
    """What a build needs and PATH does not have, in words."""
    wanted = {
        "a C compiler (cc)": [os.environ.get("CC") or "cc"],
        "a C++ compiler (c++)": [os.environ.get("CXX") or "c++"],
        "cmake": ["cmake"],
        "ninja or make": ["ninja", "ninja-build", "make"],
    }
    if backend == "vulkan":
        wanted["glslc (Vulkan's shader compiler)"] = ["glslc"]
    return [what for what, names in wanted.items() if not any(shutil.which(name) for name in names)]


def _give_up_for(missing: list[str]) -> Toolchain:
    """
    Say what is missing; never returns.

    Raises:
        MachineError: always.
    """
    extra = ""
    if any("glslc" in what for what in missing):
        extra = " Vulkan: libvulkan-dev and glslc (Debian), vulkan-loader-devel and glslc (Fedora)."
    raise MachineError(
        f"llama.cpp cannot be compiled here: {', '.join(missing)} not found on PATH.",
        hint=_INSTALL_COMPILERS + extra,
    )


def _prebuilt(spec: ToolchainSpec, backend: Backend, root: Path) -> Toolchain | None:
    """
    A complete prefix that another machine of this kind built, for hosts without a compiler.

    Same sdist, backend, flags and C library; with any compiler, since nobody here can name one.
    """
    architectures = _architectures(spec, nvidia_cards()) if backend == "cuda" else ()
    wanted = {
        "sdist_sha256": spec.sha256,
        "backend": backend,
        "cuda_architectures": list(architectures),
        "cmake_flags": list(_flags(backend, architectures)),
        "system": system_name(),
    }
    for prefix in sorted(root.glob(f"{backend}-*")):
        toolchain = open_prefix(prefix)
        if toolchain and all(toolchain.manifest[name] == want for name, want in wanted.items()):
            _try_out(prefix, toolchain.commit, root / "logs" / "probe.log")
            return toolchain
    return None


def _plan(spec: ToolchainSpec, backend: Backend, reason: str, log: Path) -> Plan:
    if backend == "metal" and sys.platform != "darwin":
        raise MachineError(
            "The metal backend exists on macOS only.",
            hint="Set toolchain.backend to auto in params.yaml.",
        )
    architectures: tuple[str, ...] = ()
    cuda_version = None
    if backend == "cuda":
        cards = nvidia_cards()
        architectures = _architectures(spec, cards)
        cuda_version = _cuda_version(cards, log)
    return Plan(
        spec=spec,
        backend=backend,
        reason=reason,
        cuda_architectures=architectures,
        cuda_toolkit=cuda_version,
        flags=_flags(backend, architectures),
        compiler=_compiler_version(log),
        system=system_name(),
    )


def _compiler_version(log: Path) -> str:
    """What the C++ compiler calls itself; gcc repeats the name it was started by, so not that."""
    compiler = os.environ.get("CXX") or "c++"
    said = proc.run([compiler, "--version"], log=log).stdout
    version = said.splitlines()[0].split(" ", 1)[-1].strip()
    return f"{_GCC}{version}" if _WRITES_GCC in said else version


def _flags(backend: Backend, architectures: tuple[str, ...]) -> tuple[str, ...]:
    """
    The cmake options that decide the bytes; none of them holds a path.

    GGML_NATIVE=OFF: what is cached may run on another CPU of the same family; on x86-64 that
    still means AVX2, FMA and F16C. CCACHE and the UI are off because both depend on the machine:
    the UI's target downloads a prebuilt one.
    """
    flags = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON",
        "-DGGML_NATIVE=OFF",
        "-DGGML_CCACHE=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_APP=OFF",
        "-DLLAMA_BUILD_TOOLS=ON",
        "-DLLAMA_BUILD_SERVER=ON",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_BUILD_IS_DEV=OFF",
        f"-DGGML_CUDA={_on(backend == 'cuda')}",
        f"-DGGML_VULKAN={_on(backend == 'vulkan')}",
        f"-DGGML_METAL={_on(backend == 'metal')}",
    ]
    if backend == "cuda":
        flags += [
            f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}",
            "-DGGML_CUDA_NCCL=OFF",
            # Without it the library needs the driver's libcuda.so.1 even to be loaded.
            "-DGGML_CUDA_NO_VMM=ON",
        ]
    return tuple(flags)


def _on(claim: bool) -> str:  # noqa: FBT001 - a claim is all it takes
    return "ON" if claim else "OFF"


# --- NVIDIA --------------------------------------------------------------------------------------


def nvidia_cards() -> tuple[Card, ...]:
    """The cards the NVIDIA driver reports through NVML; none without a driver."""
    try:
        import pynvml  # noqa: PLC0415 - an extra: most machines do not have it

        pynvml.nvmlInit()
        try:
            return _cards_from_nvml(pynvml)
        finally:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()
    except Exception:  # noqa: BLE001 - every failure of NVML means the same: ask nvidia-smi
        return _cards_from_nvidia_smi()


def _cards_from_nvml(nvml: Any) -> tuple[Card, ...]:  # noqa: ANN401 - a module without types
    major = _series(_text(nvml.nvmlSystemGetDriverVersion()))
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    return tuple(
        Card(
            name=_text(nvml.nvmlDeviceGetName(handle)),
            architecture="{}{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle)),
            driver_major=major,
        )
        for handle in handles
    )


def _series(version: str) -> int | None:
    """Return 580 of `580.65.06`; None of what is no version, such as `[N/A]`."""
    first = version.partition(".")[0]
    return int(first) if first.isdecimal() else None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _cards_from_nvidia_smi() -> tuple[Card, ...]:
    """The same from the driver's own program; none where it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    with tempfile.TemporaryDirectory() as directory:
        try:
            done = proc.run(query, log=Path(directory) / "log", timeout_s=20)
        except (ToolError, MachineError):
            return ()
    return cards_from_csv(done.stdout)


def cards_from_csv(text: str) -> tuple[Card, ...]:
    """Read `nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader`."""
    rows = [[cell.strip() for cell in line.rsplit(",", 2)] for line in text.splitlines()]
    return tuple(
        Card(
            name=row[0],
            architecture=row[1].replace(".", ""),
            driver_major=_series(row[2]),
        )
        for row in rows
        if len(row) == 3 and re.fullmatch(r"\d+\.\d", row[1])  # noqa: PLR2004 - three columns
    )


def _architectures(spec: ToolchainSpec, cards: tuple[Card, ...]) -> tuple[str, ...]:
    """What to compile kernels for: the spec's, else $CUDAARCHS (cmake's own), else the cards'."""
    declared = tuple(filter(None, os.environ.get("CUDAARCHS", "").split(";")))
    architectures = spec.cuda_architectures or declared or {card.architecture for card in cards}
    if not architectures:
        raise MachineError(
            "The cuda backend was declared, but no NVIDIA driver answers on this machine.",
            hint="Set CUDAARCHS to compile for a card that is elsewhere (CUDAARCHS=86 for an RTX "
            "30), or toolchain.backend to auto.",
        )
    return tuple(sorted(architectures, key=lambda name: (len(name), name)))


def _system_nvcc() -> Path | None:
    """The nvcc of an installed toolkit: $CUDACXX, PATH, $CUDA_HOME, or where NVIDIA installs it."""
    declared = os.environ.get("CUDACXX")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for candidate in (declared, "nvcc", str(Path(home) / "bin" / "nvcc")):
        found = shutil.which(candidate) if candidate else None
        if found:
            return Path(found)
    return None


def _cuda_version(cards: tuple[Card, ...], log: Path) -> str:
    """The version of the toolkit that `_cuda_toolkit` will use, known before it is there."""
    nvcc = _system_nvcc()
    if nvcc is not None:
        text = proc.run([nvcc, "--version"], log=log).stdout
        release = re.search(r"\bV(\d+(?:\.\d+)+)", text)
        return release.group(1) if release else text.splitlines()[-1].strip()
    if sys.platform != "linux" or platform.machine() not in {"x86_64", "aarch64"}:
        raise MachineError(
            f"No CUDA compiler (nvcc) found, and NVIDIA's wheels do not cover {system_name()}.",
            hint="Install the CUDA toolkit, or set toolchain.backend to cpu.",
        )
    told = (card.driver_major for card in cards if card.driver_major is not None)
    old = [series for series in told if series < CUDA_DRIVER_MAJOR]
    if old:
        raise MachineError(
            f"The driver (series {old[0]}) is too old for CUDA {CUDA_VERSION}, the "
            "toolkit that we can install ourselves.",
            hint=f"Install a driver of series {CUDA_DRIVER_MAJOR} or newer, or the CUDA "
            "12 toolkit and put its nvcc on PATH, or set toolchain.backend to cpu.",
        )
    return CUDA_VERSION


def _cuda_toolkit(root: Path, *, offline: bool) -> CudaToolkit:
    """The system's toolkit, else one from NVIDIA's wheels (0.9 GB), put into our cache once."""
    nvcc = _system_nvcc()
    if nvcc is not None:
        home = nvcc.resolve().parent.parent
        return CudaToolkit(root=home, version="", is_ours=False)
    home = root / f"cuda-{CUDA_VERSION}"
    toolkit = CudaToolkit(root=home / "nvidia" / "cu13", version=CUDA_VERSION, is_ours=True)
    with exclusively(root / f"{home.name}.lock", "installing the CUDA compiler"):
        if not home.is_dir() and offline:
            raise MachineError(
                f"Offline, and neither nvcc nor our own CUDA {CUDA_VERSION} is installed.",
                hint="Run `fleet toolchain` once with a network.",
            )
        if not home.is_dir():
            _install_cuda_wheels(home, root)
    return toolkit


def _install_cuda_wheels(home: Path, root: Path) -> None:
    console.step(f"Installing NVIDIA's CUDA {CUDA_VERSION} compiler from wheels (0.9 GB unpacked)")
    with atomic.replacing(home) as staging:
        staging.mkdir(parents=True)
        wanted = staging / "requirements.txt"
        wanted.write_text(
            "".join(
                f"{pin} {' '.join(f'--hash=sha256:{digest}' for digest in digests)}\n"
                for pin, digests in _CUDA_WHEELS.items()
            ),
            encoding="utf-8",
        )
        log = root / "logs" / "cuda-wheels.log"
        options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-compile"]
        _pip(["install", *options, "--target", staging, "-r", wanted], root, log)
        _complete_cuda_tree(staging / "nvidia" / "cu13")


def _complete_cuda_tree(home: Path) -> None:
    """Add what wheels cannot hold: the links the linker asks for, and lib64, where nvcc looks."""
    for library in sorted((home / "lib").glob("lib*.so.*")):
        link = library.with_name(library.name.split(".so.")[0] + ".so")
        if not link.exists():
            link.symlink_to(library.name)
    if not (home / "lib64").exists():
        (home / "lib64").symlink_to("lib")


# --- download ------------------------------------------------------------------------------------


def _sdist(spec: ToolchainSpec, root: Path, log: Path, *, offline: bool) -> Path:
    """
    The declared sdist, from the cache or through pip, with the declared sha256.

    pip is given the digest too: it compares before it runs anything of the sdist's own.
    """
    kept = root / "downloads" / f"llama_cpp_python-{spec.llama_cpp_python}.tar.gz"
    if kept.is_file():
        got = hashing.digest(kept).sha256
        if got == spec.sha256:
            return kept
        console.warn(f"{kept.name} in the cache has sha256 {got}: downloading it again")
    if offline:
        raise MachineError(
            f"Offline, and llama-cpp-python {spec.llama_cpp_python} is neither built nor "
            f"downloaded under {root}.",
            hint="Run `fleet toolchain` once with a network, or copy the cache of a like machine.",
        )
    with atomic.replacing(kept.parent / f"{kept.name}.dir") as staging:
        staging.mkdir(parents=True)
        downloaded = _download(spec, staging, root, log)
        got = hashing.digest(downloaded).sha256
        if got != spec.sha256:
            raise _wrong_sdist(spec, downloaded.name, got)
        atomic.sync(downloaded)
        downloaded.replace(kept)
    atomic.remove(kept.parent / f"{kept.name}.dir")
    return kept


def _download(spec: ToolchainSpec, staging: Path, root: Path, log: Path) -> Path:
    pin = f"llama-cpp-python=={spec.llama_cpp_python}"
    console.step(f"Downloading {pin} (77 MB)")
    wanted = staging / "requirements.txt"
    wanted.write_text(f"{pin} --hash=sha256:{spec.sha256}\n", encoding="utf-8")
    # Never `--no-binary :all:`: pip would also build the build tools from source.
    options = ["--no-deps", "--require-hashes", "--no-binary", "llama-cpp-python"]
    try:
        _pip(["download", *options, "-d", staging, "-r", wanted], root, log)
    except ToolError as error:
        got = re.search(r"Got\s+([0-9a-f]{64})", error.message)
        if got:
            raise _wrong_sdist(spec, f"{pin} (sdist)", got.group(1)) from error
        raise MachineError(
            f"pip could not download {pin}.\n{error.message}",
            hint="Check the network and pip's own settings (PIP_INDEX_URL, PIP_CERT, proxies).",
        ) from error
    return next(iter(sorted(staging.glob("llama_cpp_python-*.tar.gz"))))


def _wrong_sdist(spec: ToolchainSpec, name: str, got: str) -> DigestError:
    return DigestError(
        f"{name}: wanted sha256 {spec.sha256}, got {got}. Nothing of it was used.",
        hint="If the version was changed on purpose, set toolchain.sha256 in params.yaml to the "
        "digest that the package index lists for the sdist.",
    )


def _pip(words: list[str | Path], root: Path, log: Path) -> None:
    """
    Run pip: this environment's own, else one in a venv of the cache (uv's venvs have none).

    Raises:
        ToolError: pip failed.
        MachineError: there is no pip and none can be made.
    """
    quiet = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command, *rest = words
    argv = [pip_python(root, log), "-m", "pip", command, *quiet, *rest]
    proc.run(argv, log=log, on_line=None)


def pip_python(root: Path, log: Path) -> Path:
    """
    Return the interpreter whose pip downloads: ours, else one in the cache, without our packages.

    Args:
        root: `toolchain` in the user's cache.
        log: What making it prints.

    Raises:
        MachineError: there is no pip and none can be made.
    """
    if importlib.util.find_spec("pip") is not None:
        return Path(sys.executable)
    return _private_pip(root, log)


def _private_pip(root: Path, log: Path) -> Path:
    """The interpreter of a venv with pip below `root`; made once, 4 s."""
    home = root / "pip"
    program = home / "bin" / "python"
    mark = home / "complete"  # a venv cannot be moved into place: its scripts hold its path
    with exclusively(root / "pip.lock", "installing pip"):
        if mark.is_file() and program.exists():
            return program  # the Python it links to may have been removed since
        try:
            proc.run([sys.executable, "-m", "venv", "--clear", home], log=log)
        except ToolError as error:
            raise MachineError(
                f"This Python environment has no pip and cannot make one:\n{error.message}",
                hint="Install it: `uv pip install pip`, or Debian's package python3-venv.",
            ) from error
        mark.touch()
    return program


# --- source --------------------------------------------------------------------------------------


def _unpacked(sdist: Path, target: Path) -> Path:
    """The sdist's own top directory, unpacked whole; an unpacking that was cut is done again."""
    if not target.is_dir():
        with atomic.replacing(target) as staging, tarfile.open(sdist) as archive:
            # Absent before 3.11.4; then we rely on the digest alone.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(staging)  # noqa: S202 - its sha256 was compared
    tops = [path for path in target.iterdir() if path.is_dir()]
    if len(tops) != 1 or not (tops[0] / "vendor" / "llama.cpp" / "CMakeLists.txt").is_file():
        raise ToolError(
            f"{sdist.name} does not hold llama.cpp under vendor/llama.cpp.",
            hint="Was toolchain.sha256 taken from a wheel or from another package?",
        )
    return tops[0]


def _llama_cpp_commit(source: Path) -> str:
    """
    The 40-hex llama.cpp commit, read from the git data that the sdist carries.

    Without git: `vendor/llama.cpp/.git` names a directory whose HEAD is the detached commit.
    """
    vendored = source / "vendor" / "llama.cpp"
    try:
        pointer = (vendored / ".git").read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (vendored / pointer / "HEAD").read_text(encoding="utf-8").strip()
    except OSError:
        head = ""
    if not _COMMIT.fullmatch(head):
        raise ToolError(
            f"{source.name} does not say which llama.cpp commit it holds.",
            hint="This sdist was packed without its git data: pin another version.",
        )
    return head


# --- compile -------------------------------------------------------------------------------------


def _compiled(plan: Plan, inputs: Inputs, work: Path) -> Path:
    """
    Configure and compile; returns the directory with programs and libraries.

    `configured` holds the generator and is written when cmake has succeeded. A tree without it,
    or with another generator, is of no use. make trusts an object that a kill cut short, ninja
    does not (it needs an entry in its log): a killed make starts over.
    """
    tree = work / "cmake"
    mark = work / "configured"
    ninja = shutil.which("ninja") or shutil.which("ninja-build")
    generator = "Ninja" if ninja else "Unix Makefiles"
    resumes = mark.is_file() and mark.read_text(encoding="utf-8") == generator and bool(ninja)
    if not resumes:
        atomic.remove(mark)
        atomic.remove(tree)
        _configure(plan, inputs, tree, generator)
        atomic.write_text(mark, generator)
    program = ninja or proc.find("make")
    jobs = f"-j{_jobs(plan.backend)}"
    label = "Compiling llama.cpp" + (", resumed," if resumes else "")
    with console.Progress(label, total=100) as progress:
        proc.run(
            [program, "-C", tree, jobs, *TOOLS],
            log=work / "compile.log",
            on_line=functools.partial(_show_step, progress),
        )
    return tree / "bin"


def _show_step(progress: console.Progress, line: str) -> None:
    """Turn ninja's `[12/250]` or make's `[ 4%]` into progress."""
    step = _STEP.match(line)
    if step is None:
        return
    if step.group(2):
        progress.total, progress.unit = float(step.group(2)), "steps"
    progress.update(float(step.group(1)))


def _configure(plan: Plan, inputs: Inputs, tree: Path, generator: str) -> None:
    proc.run(
        [
            proc.find("cmake"),
            "-S",
            inputs.llama_cpp,
            "-B",
            tree,
            "-G",
            generator,
            *plan.flags,
            *_place_flags(tree.parent.parent, inputs.toolkit),
            f"-DLLAMA_BUILD_COMMIT={inputs.commit[:9]}",
            "-DLLAMA_BUILD_NUMBER=1",
            # No git: its answer depends on the machine (a cache inside somebody's repository).
            "-DGIT_EXE=OFF",
            "-DGIT_EXECUTABLE=OFF",
        ],
        log=tree.parent / "configure.log",
    )


def _place_flags(root: Path, toolkit: CudaToolkit | None) -> list[str]:
    """
    Options that hold paths of this machine, or keep them out of the binaries.

    Programs find lib/ beside bin/ from the start, so nothing is rewritten at installation. They
    are linked without symbols: a fifth of the size.
    """
    map_paths = f"-ffile-prefix-map={root}=."
    is_mac = sys.platform == "darwin"
    origin = "@loader_path" if is_mac else "$ORIGIN"
    link = [] if is_mac else ["-Wl,-s"]
    flags = [
        "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
        f"-DCMAKE_INSTALL_RPATH={origin}/../lib",
        f"-DCMAKE_C_FLAGS={map_paths}",
        f"-DCMAKE_CXX_FLAGS={map_paths}",
    ]
    if toolkit is not None:
        link.append(f"-Wl,-rpath-link,{toolkit.root / 'lib64'}")
        flags += [
            f"-DCMAKE_CUDA_COMPILER={toolkit.root / 'bin' / 'nvcc'}",
            f"-DCUDAToolkit_ROOT={toolkit.root}",
            f"-DCMAKE_CUDA_FLAGS=-Xcompiler={map_paths}",
        ]
    return [
        *flags,
        f"-DCMAKE_EXE_LINKER_FLAGS={' '.join(link)}",
        f"-DCMAKE_SHARED_LINKER_FLAGS={' '.join(link)}",
    ]


def _cores() -> int:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _jobs(backend: Backend) -> int:
    """
    Compile jobs at once: one per core, fewer where memory would not do.

    $CMAKE_BUILD_PARALLEL_LEVEL, cmake's own variable, overrules it.
    """
    declared = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "")
    if declared.isdecimal() and int(declared) > 0:
        return int(declared)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    per_job_gib = _GIB_PER_JOB if backend == "cuda" else _GIB_PER_JOB / 2
    return max(1, min(_cores(), int(memory_gib / per_job_gib)))


def _announce(plan: Plan) -> None:
    """Say what begins and how long it takes, before it begins."""
    cpu_seconds = _CPU_SECONDS[plan.backend]
    cpu_seconds += _CPU_SECONDS_PER_CUDA_ARCHITECTURE * len(plan.cuda_architectures)
    jobs = _jobs(plan.backend)
    minutes = max(1, math.ceil(cpu_seconds / jobs / 60))
    console.step(
        f"Building llama.cpp of llama-cpp-python {plan.spec.llama_cpp_python} for {plan.backend} "
        f"({plan.reason}): about {minutes} minute(s) on {jobs} core(s), once per machine"
    )


def _require_disk(plan: Plan, root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    free_gib = shutil.disk_usage(root).free / 2**30
    needed_gib = _NEEDED_GIB[plan.backend]
    if free_gib < needed_gib:
        raise MachineError(
            f"Building the toolchain needs {needed_gib:.1f} GiB under {root}; "
            f"{free_gib:.1f} GiB are free.",
            hint="Free some space there, or set GGUF_FLEET_CACHE to a directory elsewhere.",
        )


# --- install -------------------------------------------------------------------------------------


def _install(compiled: Path, inputs: Inputs, prefix: Path) -> None:
    """Lay out the prefix. Only what the stages use: no headers, no cmake files, no web UI."""
    vendored = inputs.llama_cpp
    for name in TOOLS:
        _copy_file(compiled / name, prefix / "bin" / name)
    libraries = [*compiled.glob("lib*.so*"), *compiled.glob("lib*.dylib")]
    for library in sorted(libraries):
        _copy_file(library, prefix / "lib" / library.name)
    if inputs.toolkit is not None:
        _install_cuda_runtime(inputs.toolkit, prefix / "lib")
    share = prefix / "share" / "llama.cpp"
    _copy_file(vendored / "convert_hf_to_gguf.py", share / "convert_hf_to_gguf.py")
    _copy_tree(vendored / "conversion", share / "conversion")
    _copy_tree(vendored / "gguf-py", share / "gguf-py")
    _copy_tree(inputs.top / "llama_cpp", prefix / "python" / "llama_cpp")
    _copy_file(vendored / "LICENSE", share / "LICENSE")
    _copy_file(inputs.top / "LICENSE.md", prefix / "python" / "llama_cpp" / "LICENSE.md")


def _install_cuda_runtime(toolkit: CudaToolkit, lib: Path) -> None:
    """
    Put the CUDA libraries that the tools load where $ORIGIN/../lib finds them.

    Ours become part of the prefix (hard links: no disk); the system's are linked to.
    """
    for pattern in _CUDA_RUNTIME:
        for library in sorted((toolkit.root / "lib64").glob(pattern)):
            target = lib / library.name
            if not toolkit.is_ours:
                target.symlink_to(library)
            elif not library.is_symlink():
                _link_or_copy(library, target)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _copy_file(source: Path, target: Path) -> None:
    """Copy a program, a library or the link to one."""
    if not source.exists():
        raise ToolError(
            f"The build ended well, but {source.name} is not among its results.",
            hint="This llama.cpp has renamed or dropped it: pin a version that has it.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target, follow_symlinks=False)


def _copy_tree(source: Path, target: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "tests", "examples")
    shutil.copytree(source, target, ignore=ignored)


def _try_out(prefix: Path, commit: str, log: Path) -> None:
    """
    Run what is there: every library must load and the commit must be the declared one.

    Raises:
        ToolError: llama-server does not start, or reports another commit.
    """
    done = proc.run([prefix / "bin" / "llama-server", "--version"], log=log, timeout_s=60)
    text = done.stdout + done.stderr
    if commit[:9] not in text:
        raise ToolError(
            f"llama-server was built from {commit[:9]} but reports: {console.clean(text.strip())}",
            log=log,
        )


def _warn_without_device(plan: Plan, prefix: Path, log: Path) -> None:
    """
    Say so when a build for a device finds none: llama.cpp itself would quietly use the CPU.

    Only a warning, since machines without a card compile for machines with one.
    """
    if plan.backend == "cpu":
        return
    done = proc.run([prefix / "bin" / "llama-bench", "--list-devices"], log=log, timeout_s=60)
    devices = done.stdout.partition("Available devices:")[2].strip()
    if devices in {"", "(none)"}:
        console.warn(
            f"The {plan.backend} build runs here but finds no device: whatever it computes on this "
            "machine is computed by the CPU."
        )


# --- describe ------------------------------------------------------------------------------------


def describe_prefix(prefix: Path) -> dict[str, Any]:
    """
    Sizes and sha256 of all that a prefix holds, as toolchain.json has them; reads every byte.

    Returns:
        `tools` and `libraries` by file name, links left out; `trees`: converter and bindings,
        each as the number of its files and one digest over them.
    """
    return {
        "tools": {name: _described(prefix / "bin" / name) for name in _files(prefix / "bin")},
        "libraries": {name: _described(prefix / "lib" / name) for name in _files(prefix / "lib")},
        "trees": {
            "converter": _tree_described(prefix / "share" / "llama.cpp"),
            "bindings": _tree_described(prefix / "python" / "llama_cpp"),
        },
    }


def _files(directory: Path) -> list[str]:
    if not directory.is_dir():
        return []
    return sorted(p.name for p in directory.iterdir() if p.is_file() and not p.is_symlink())


def _described(path: Path) -> dict[str, Any]:
    found = hashing.digest(path)
    return {"sha256": found.sha256, "size_bytes": found.size_bytes}


def _tree_described(top: Path) -> dict[str, Any]:
    """One digest over `sha256  relative/path` lines; what Python caches beside does not count."""
    paths = sorted(
        path.relative_to(top).as_posix()
        for path in top.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    lines = "".join(f"{hashing.digest(top / path).sha256}  {path}\n" for path in paths)
    return {"sha256": hashing.sha256_text(lines), "files": len(paths)}
