"""
What this machine is, as far as a benchmark depends on it.

Two names for two questions. `hw_id` must be equal for two numbers to be compared: it is the digest
of the hardware facts in work/machine.json, so a benchmark runs again on other hardware. `env_id`
should be equal: driver, kernel, compiler; it is recorded with each number and changes nothing, so
that a security update of the kernel does not measure a whole fleet again.

Neither holds a serial number, a UUID or a host name. The probe runs at every `dvc repro`: it reads
a few small files and imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import atomic, console, gpu

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet

    from pipelines.layout import Layout
    from pipelines.toolchain import Toolchain

_PROC: Final = Path("/proc")
_SYS: Final = Path("/sys")
_GIB: Final = 1 << 30


def probe() -> dict[str, Any]:
    """
    Return the hardware facts and their digest.

    Equal machines give equal facts, whatever their load, time and names. Everything is what this
    process may use: cores of its affinity and quota, memory of its control group, visible cards.

    Returns:
        {"schema_version", "hw_id", "cpu": {"model", "cores_count"}, "memory_gib", "gpus": [...]}
    """
    facts = {
        "cpu": {"model": cpu_model(), "cores_count": usable_cores()},
        "memory_gib": memory_gib(usable_memory_bytes()),
        "gpus": [vars(card) for card in gpu.cards()],
    }
    return {"schema_version": 1, "hw_id": facts_id(facts), **facts}


def environment(tools: Toolchain) -> dict[str, Any]:
    """Return what also decides speed but changes with updates and settings: the env facts."""
    driver = gpu.driver()
    manifest = tools.manifest
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "os": _os_name(),
        "governor": governor(),
        "driver": None if driver is None else vars(driver),
        "backend": tools.backend,
        "llama_cpp_commit": tools.commit,
        "compiler": manifest.get("compiler"),
        "cmake_flags": manifest.get("cmake_flags"),
        "cuda_toolkit": manifest.get("cuda_toolkit"),
    }


def facts_id(facts: dict[str, Any]) -> str:
    """sha256 of the canonical JSON (sorted keys, no spaces) of facts."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write(at: Layout, tools: Toolchain) -> None:
    """
    Put work/machine.json and work/toolchain.json where DVC looks; unchanged files stay untouched.

    Warns if the tools were built for a GPU and none answers: benchmarks would be refused.
    """
    facts = probe()
    if tools.backend == "cuda" and not facts["gpus"]:
        console.warn(
            "llama.cpp was built for CUDA, but no NVIDIA card answers: the driver is missing, "
            "broken or hides it (CUDA_VISIBLE_DEVICES), or nvidia-ml-py is not installed."
        )
    atomic.write_json(at.machine, facts)
    atomic.write_json(at.toolchain, tools.manifest)


def keep_tools(model: str, at: Layout) -> None:
    """
    Put what the tools are beside the records that they make, where git has both.

    dvc.lock knows work/toolchain.json by its md5 alone; by these bytes anybody can see which
    llama.cpp that was.
    """
    if at.toolchain.exists():
        atomic.write_bytes(at.tools_record(model), at.toolchain.read_bytes())


# --- CPU --------------------------------------------------------------------------------------


def cpu_model(proc: Path = _PROC) -> str:
    """Name of the processor as the kernel gives it; its architecture if the kernel has none."""
    try:
        text = (proc / "cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    for key in ("model name", "Model", "cpu model", "uarch"):
        if (found := re.search(rf"^{key}\s*:\s*(\S.*)$", text, re.MULTILINE)) is not None:
            return console.clean(found[1].strip())
    parts = sorted(set(re.findall(r"^CPU (?:implementer|part)\s*:\s*(\S+)$", text, re.MULTILINE)))
    return " ".join([platform.machine(), *parts])


def usable_cores(proc: Path = _PROC, sys_: Path = _SYS) -> int:
    """
    Count the physical cores that this process may use, at least one.

    Two hardware threads of one core share its arithmetic, which is what a language model waits
    for; more threads than cores make llama.cpp slower. A quota of the control group counts too: a
    container with 2.5 CPUs of time has two.
    """
    if hasattr(os, "sched_getaffinity"):
        logical: AbstractSet[int] = os.sched_getaffinity(0)
    else:
        logical = set(range(os.cpu_count() or 1))
    cores = len({_core_of(cpu, sys_) for cpu in logical})
    quota = cpu_quota(proc, sys_)
    return max(1, cores if quota is None else min(cores, int(quota)))


def _core_of(cpu: int, sys_: Path) -> str:
    """Name the core that a hardware thread belongs to by the list of its siblings."""
    topology = sys_ / f"devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        try:
            return (topology / name).read_text().strip()
        except OSError:
            continue
    return f"cpu{cpu}"


def cpu_quota(proc: Path = _PROC, sys_: Path = _SYS) -> float | None:
    """CPUs' worth of time that the control groups above us allow; None means no limit."""
    limits: list[float] = []
    for group in control_groups(proc, sys_, "cpu"):
        words = _read_words(group / "cpu.max")
        if len(words) == 2 and words[0].isdigit():  # noqa: PLR2004 - "max 100000": quota, period
            limits.append(int(words[0]) / int(words[1]))
        quota, period = (
            _read_words(group / "cpu.cfs_quota_us"),
            _read_words(group / "cpu.cfs_period_us"),
        )
        if quota and period and quota[0].isdigit():
            limits.append(int(quota[0]) / int(period[0]))
    return min(limits, default=None)


# --- memory -----------------------------------------------------------------------------------


def memory_gib(size_bytes: int) -> int:
    """
    Round up to a multiple of two GiB, the smallest step in which memory is sold.

    The kernel keeps some of it for itself, a little more or less after each update: that must not
    look like another machine.
    """
    return max(1, 2 * math.ceil(size_bytes / (2 * _GIB)))


def usable_memory_bytes(proc: Path = _PROC, sys_: Path = _SYS) -> int:
    """Main memory, or less if a control group above us allows less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group in control_groups(proc, sys_, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _read_words(group / name)
            if words and words[0].isdigit():
                limits.append(int(words[0]))
    return min(limits)


def control_groups(proc: Path, sys_: Path, controller: str) -> Iterator[Path]:
    """
    Yield the directories of the control groups that we are in, from ours up to the root.

    /proc/self/cgroup has lines `id:controllers:path`; version 2 has id 0 and no controllers.
    In a container the path may not exist below the mount, which then shows our own group.
    """
    mount = sys_ / "fs/cgroup"
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        root = mount if number == "0" else mount / controller
        group = root / path.lstrip("/")
        yield from (place for place in (group, *group.parents) if place.is_relative_to(root))


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


# --- environment ------------------------------------------------------------------------------


def _os_name() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return platform.system()


def governor(sys_: Path = _SYS) -> str | None:
    """Frequency governor of the first CPU; None where the hypervisor keeps it to itself."""
    words = _read_words(sys_ / "devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return words[0] if words else None
