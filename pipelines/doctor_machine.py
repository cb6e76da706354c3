"""
What `fleet doctor` says of the machine that it runs on: packages, card, disk, tools, clock.

What a runner's probe looks at as well is looked at by the same code (`pipelines.health_probe`).
Nothing is installed or built. What is written is a file of 64 MiB in work/, to time the disk, two
empty ones that show whether files can be shared, and all of them are gone at the end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import bootstrap, doctor_disk, doctor_lines, gpu, machine, proc, toolchain, wording
from pipelines.doctor_lines import Line, fail, of_finding, ok, warn
from pipelines.errors import FleetError, MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pipelines.doctor_lines import Look
    from pipelines.layout import Layout
    from pipelines.params import Declaration, DeclaredHost

# Modules without which no stage runs, by the name of their package in pyproject.toml.
_PACKAGES: Final[Mapping[str, str]] = {
    "dvc": "dvc", "filelock": "filelock", "huggingface_hub": "huggingface_hub", "jinja2": "jinja2",
    "jsonschema": "jsonschema", "psutil": "psutil", "pydantic": "pydantic", "yaml": "pyyaml",
    "requests": "requests", "rich": "rich", "ruamel.yaml": "ruamel.yaml",
}  # fmt: skip
# Those that only the converter needs; torch stands for all of them.
_CONVERT: Final = "torch"
# `git merge-tree --write-tree`, by which `fleet template update` looks before it merges.
_GIT_WANTED: Final = (2, 38)
# The programs that are asked for their version, and the word that each answers to.
_PROGRAMS: Final[Mapping[str, tuple[str, ...]]] = {
    "git": ("--version",),
    "cmake": ("--version",),
    "c++": ("--version",),
    "ninja": ("--version",),
    "go": ("version",),
    "zstd": ("--version",),
}
_VERSION: Final = re.compile(r"\d+(?:\.\d+)+")
# What the bus has; vendor 10de is NVIDIA, class 03 a display or 3D controller (PCI code and ID).
_DEVICES: Final = Path("/sys/bus/pci/devices")
_USUAL_GO: Final = Path("/usr/local/go/bin/go")


def missing_packages() -> tuple[str, ...]:
    """Return the packages of pyproject.toml that this Python does not find."""
    return tuple(package for module, package in _PACKAGES.items() if not _is_installed(module))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def looks(at: Layout, declared: Declaration | None) -> dict[str, Look]:
    """
    Return every look at this machine alone, by name, in the order in which they are shown.

    Args:
        at: The checkout; its root may be no fleet at all.
        declared: Its declaration, if it has a good one.
    """
    missing = missing_packages()
    plain: dict[str, Look] = {
        "python": lambda: _python(missing),
        "memory": lambda: _memory(declared),
        "governor": _governor,
        "disk-speed": lambda: doctor_disk.speed(at),
        "reflink": lambda: doctor_disk.reflink(at),
        "locks": lambda: doctor_disk.locks(at),
        "tools": lambda: _tools(declared, is_bare=bool(missing)),
    }
    if missing:
        return plain
    return plain | {
        "loopback": _loopback,
        "card": lambda: _card(declared),
        "cuda": lambda: _cuda(declared, at),
        "disk": lambda: doctor_disk.free(at),
        "dvc-link": lambda: doctor_disk.links(at),
        "engine": lambda: _engine(declared, at),
        "runner": lambda: _runner(at),
    }


def looks_that_wait(at: Layout, declared: Declaration | None, *, offline: bool) -> dict[str, Look]:
    """Return the looks that wait for servers, or for a disk that is one; see `looks`."""
    waiting: dict[str, Look] = {}
    if missing_packages():
        return waiting
    if declared is not None:
        waiting["disk-fleet"] = lambda: doctor_disk.fleet_room(declared, at, offline=offline)
    if not offline and (api := _api(at)):
        waiting["clock"] = lambda: _clock(api)
    return waiting


def lines(at: Layout, declared: Declaration | None, *, offline: bool) -> list[Line]:
    """Look at everything; see `looks`."""
    found = [
        line
        for name, look in looks(at, declared).items()
        for line in doctor_lines.looked("machine", name, look)
    ]
    waiting = looks_that_wait(at, declared, offline=offline)
    return found + doctor_lines.together("machine", waiting)


# --- Python -----------------------------------------------------------------------------------


def _python(missing: tuple[str, ...]) -> Iterator[Line]:
    yield ok("machine", "python", f"{sys.version.split()[0]} in {sys.prefix}")
    if missing:
        yield fail(
            "machine",
            "packages",
            f"{wording.first_few(missing)} cannot be imported; what needs them was not looked at",
            "make setup\n. .venv/bin/activate",
        )
    elif not _is_installed(_CONVERT):
        yield warn(
            "machine",
            "packages",
            f"no {_CONVERT}: no model can be converted, tokens and logits not be compared",
            "make setup",
        )
    elif bootstrap.is_stale():
        yield warn(
            "machine",
            "packages",
            ".venv is not of this requirements.lock and pyproject.toml",
            "make setup",
        )
    else:
        yield ok("machine", "packages", f"all {len(_PACKAGES)} that stages import, and {_CONVERT}")


# --- memory and processor ---------------------------------------------------------------------


def _memory(declared: Declaration | None) -> Iterator[Line]:
    """Hold main memory against the host without a card that this machine can be."""
    here_mib = machine.usable_memory_bytes() / gpu.MIB
    text = f"{wording.mib(here_mib)} usable"
    plain = {
        name: host.memory_mib
        for name, host in (declared.hosts if declared else {}).items()
        if host.memory_mib is not None
    }
    mine = {name: mib for name, mib in plain.items() if name == _name_here()} or plain
    if declared is None or not mine or min(mine.values()) <= here_mib:
        yield ok("machine", "memory", text)
        return
    name = min(mine, key=lambda each: mine[each])
    said: Callable[..., Line] = fail if _is_here(name, declared) else warn
    yield said(
        "machine",
        "memory",
        f"{text}; host {name} is declared with {wording.mib(mine[name])}",
        f"Correct hosts.{name}.memory_mib of params.yaml, or run this on {name}.",
    )


def _is_here(host: str, declared: Declaration) -> bool:
    """
    Tell whether this machine is a declared host, and not a desk from which a fleet is kept.

    It is one of that name, one on which a job of ours runs, and one of a fleet with no other host
    and no runner. Of the rest nobody knows.
    """
    alone = len(declared.hosts) == 1 and declared.hosts[host].runs_on is None
    return host == _name_here() or alone or _is_self_hosted()


def _is_self_hosted() -> bool:
    return os.environ.get("RUNNER_ENVIRONMENT") == "self-hosted"


def _name_here() -> str:
    """Return what `fleet init` calls this machine."""
    return socket.gethostname().split(".")[0].lower()


def _governor() -> Iterator[Line]:
    """A governor that saves power makes each measurement one of its own reaction."""
    found = machine.governor()
    if found in {None, "performance"}:
        yield ok("machine", "governor", found or "the machine keeps its clocks to itself")
        return
    yield warn(
        "machine",
        "governor",
        f"{found}: clocks rise only after a measurement has begun",
        "sudo cpupower frequency-set --governor performance",
    )


# --- the card ---------------------------------------------------------------------------------


def _card(declared: Declaration | None) -> Iterator[Line]:
    """Hold driver and card against the host that this machine can be."""
    from pipelines import health_probe  # noqa: PLC0415 - pydantic

    cards = gpu.cards()
    if declared is None:
        names = wording.first_few([card.name for card in cards])
        yield ok("machine", "card", names or "no driver of NVIDIA's answers")
        return
    host, name = _host_here(declared, sum(card.vram_mib for card in cards))
    for finding in health_probe.card(host, declared):
        line = of_finding(finding)
        if line.state != "fail":
            yield line
        elif cards or _has_nvidia() or _is_here(name, declared):
            yield fail("machine", line.name, f"host {name}: {line.text}", line.fix)
        else:
            text = f"{line.text}; nothing can be measured for host {name} on this machine"
            yield warn("machine", line.name, text, f"On {name} itself: fleet doctor")
    if cards:
        yield from map(of_finding, health_probe.settings())


def _has_nvidia(devices: Path = _DEVICES) -> bool:
    """Tell whether a card of NVIDIA's is on the bus, with a driver or without one (Linux)."""
    for device in devices.glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
            if vendor == "0x10de" and kind.startswith("0x03"):
                return True
    return False


def _host_here(declared: Declaration, vram_mib: int) -> tuple[DeclaredHost, str]:
    """
    Return the host that this machine can be, and its name.

    That of this machine's name; else, of those with a card, the largest that fits on the cards
    here, or the smallest one; else the first.
    """
    hosts = declared.hosts
    if (name := _name_here()) in hosts:
        return hosts[name], name
    sizes = {name: host.vram_mib for name, host in hosts.items() if host.vram_mib is not None}
    fitting = {name: mib for name, mib in sizes.items() if mib <= vram_mib}
    if fitting:
        name = max(fitting, key=lambda each: fitting[each])
    elif sizes:
        name = min(sizes, key=lambda each: sizes[each])
    else:
        name = next(iter(hosts))
    return hosts[name], name


def _cuda(declared: Declaration | None, at: Layout) -> Iterator[Line]:
    """See whether llama.cpp can be compiled for the card: the system's toolkit, or one of ours."""
    if declared is None or declared.toolchain.backend not in {"auto", "cuda"}:
        return
    if toolchain.there(toolchain.spec_of(declared)) is not None:
        return  # compiled already
    from pipelines import toolchain_build as build  # noqa: PLC0415 - only with a declaration

    cards = build.nvidia_cards()
    if not cards:
        return
    # Its bytes are part of the key of every build, so no function of it is renamed for us.
    nvcc = build._system_nvcc()  # noqa: SLF001 - see above
    try:
        version = build._cuda_version(cards, at.log("doctor", "cuda"))  # noqa: SLF001 - the same
    except FleetError as error:
        yield doctor_lines.of_error("machine", "cuda", error)
        return
    driver = gpu.driver()
    where = str(nvcc) if nvcc else "NVIDIA's wheels, which `fleet toolchain` installs"
    if driver is not None and nvcc is not None and _major(version) > _major(driver.cuda):
        yield fail(
            "machine",
            "cuda",
            f"toolkit {version} of {where} is newer than driver {driver.version} can run "
            f"(CUDA {driver.cuda})",
            f"Install a driver for CUDA {_major(version)}, or a toolkit of CUDA "
            f"{_major(driver.cuda)} and name its compiler: export CUDACXX=/path/to/nvcc",
        )
        return
    yield ok("machine", "cuda", f"toolkit {version} from {where}")


def _major(version: str) -> int:
    first = version.partition(".")[0]
    return int(first) if first.isdecimal() else 0


# --- what servers need ------------------------------------------------------------------------


def _loopback() -> Iterator[Line]:
    """Find a free port of this machine alone, and reach it: every engine is served there."""
    from pipelines.serving import sandbox  # noqa: PLC0415 - only here

    port = sandbox.free_port()
    with socket.socket() as server, socket.socket() as client:
        server.bind((sandbox.HOST, port))
        server.listen(1)
        client.settimeout(doctor_lines.ANSWER_WITHIN_S)
        client.connect((sandbox.HOST, port))
    yield ok("machine", "loopback", f"a server on {sandbox.HOST}:{port} is reached")


def _engine(declared: Declaration | None, at: Layout) -> Iterator[Line]:
    from pipelines import health_probe  # noqa: PLC0415 - pydantic

    return map(of_finding, health_probe.engine(declared, at) if declared else ())


def _runner(at: Layout) -> Iterator[Line]:
    """Look at what only a machine with a runner has: hooks, its user, the runner's version."""
    from pipelines import health_probe  # noqa: PLC0415 - pydantic

    if not _is_self_hosted():
        return
    for findings in (health_probe.hooks(at), health_probe.user(), health_probe.runner(at)):
        yield from map(of_finding, findings)


def _api(at: Layout) -> str:
    """Return the address of GitHub's API if this repository is one of GitHub's; else nothing."""
    from pipelines.github.client import API_URL  # noqa: PLC0415 - only online

    told = os.environ.get("GITHUB_API_URL", "")
    return told or (API_URL if doctor_lines.github_repository(at.root) else "")


def _clock(api: str) -> Iterator[Line]:
    from pipelines import health_probe  # noqa: PLC0415 - pydantic

    # So that it says itself what is wrong before nobody waits for it any more.
    within_s = doctor_lines.ANSWER_WITHIN_S * 0.8
    return map(of_finding, health_probe.clock(api, within_s=within_s))


# --- programs ---------------------------------------------------------------------------------


def _tools(declared: Declaration | None, *, is_bare: bool) -> Iterator[Line]:
    """Say which versions there are; what is missing matters only if something needs it."""
    found = {name: _version(name, words) for name, words in _PROGRAMS.items()}
    git = found.pop("git")
    if git is None:
        yield fail(
            "machine",
            "git",
            "not installed; DVC and every comparison need it",
            "Debian and Ubuntu: sudo apt-get install git. Fedora: sudo dnf install git.",
        )
    elif tuple(map(int, git.split(".")[:2])) < _GIT_WANTED:
        wanted = ".".join(map(str, _GIT_WANTED))
        yield warn(
            "machine",
            "git",
            f"{git}; `fleet template update` needs {wanted} to look before it merges",
            f"Install git {wanted} or newer.",
        )
    else:
        yield ok("machine", "git", git)
    has = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    without = [name for name, version in found.items() if version is None]
    text = has + (f"; no {', '.join(without)}" if without else "")
    needed = None if is_bare else _needed_to_build(declared)
    if needed is None:
        yield ok("machine", "tools", text or "none")
    else:
        yield doctor_lines.of_error("machine", "tools", needed)


def _needed_to_build(declared: Declaration | None) -> FleetError | None:
    """Return the error with which `fleet toolchain` would end; None if it would build, or has."""
    from pipelines import toolchain_build as build  # noqa: PLC0415 - only here

    backend: toolchain.DeclaredBackend = "auto"
    if declared is not None:
        if toolchain.there(toolchain.spec_of(declared)) is not None:
            return None
        backend = declared.toolchain.backend
    chosen, _ = toolchain.detect_backend(backend)
    # Its bytes are part of the key of every build, so no function of it is renamed for us.
    absent = build._missing_programs(chosen)  # noqa: SLF001 - see above
    if not absent:
        return None
    try:
        build._give_up_for(absent)  # noqa: SLF001 - the same
    except MachineError as error:
        return error
    return None


def _version(name: str, words: tuple[str, ...]) -> str | None:
    """Return the version that a program tells, `found` if it tells none; None without it."""
    program = shutil.which(name)
    if program is None and name == "go" and os.access(_USUAL_GO, os.X_OK):
        program = str(_USUAL_GO)
    if program is None:
        return None
    try:
        said = proc.answer([program, *words], within_s=doctor_lines.ANSWER_WITHIN_S / 2)
    except FleetError:
        return None
    version = _VERSION.search(said.decode(errors="replace"))
    return version[0] if version else "found"
