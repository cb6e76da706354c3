"""
What the kernel counts for the whole machine: CPU, hypervisor, quota, swap, heat, battery, memory.

Counters are read at two moments, before and after a measurement; what lies between is what happened
meanwhile. A system that does not count something says None or zero, and nothing is held against it.

Sources: proc(5) for /proc/stat, /proc/vmstat and /proc/meminfo; the kernel's
admin-guide/cgroup-v2.rst for cpu.stat; arch/x86/kernel/cpu/mce/therm_throt.c for thermal_throttle.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pipelines import machine

_PROC: Final = Path("/proc")
_SYS: Final = Path("/sys")
_MIB: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """
    Counters of the whole machine at one moment.

    Attributes:
        busy_s: CPU time spent on anything, by anybody, since the start of the machine.
        stolen_s: CPU time that the hypervisor withheld while somebody here wanted it.
        load: Programs that ran or wanted to, averaged over one minute.
        quotas: (periods, throttled periods) so far of each control group above us that counts them:
            in a throttled one the quota of CPU time was used up, and we stood still.
        swapped_in_count: Pages of 4 KiB, say, that were read back from swap; None if not counted.
        hot_s: Longest time that one core was slowed down by heat; None if not counted.
        hot_count: How often that began, over all cores; None if not counted.
        available_mib: Memory that programs could take at this moment; None if not told.
    """

    busy_s: float
    stolen_s: float
    load: float
    quotas: tuple[tuple[int, int], ...] = ()
    swapped_in_count: int | None = None
    hot_s: float | None = None
    hot_count: int | None = None
    available_mib: float | None = None


# user nice system idle iowait irq softirq steal guest guest_nice, in ticks; guests are in user.
_IDLE_FIELDS = (3, 4)
_STEAL_FIELD = 7


def cpu_times(proc: Path = _PROC, sys_: Path = _SYS) -> CpuTimes:
    """Read the counters; a system without /proc/stat has only its load."""
    busy_s, stolen_s = _cpu_s(proc)
    hot_s, hot_count = _heat(sys_)
    return CpuTimes(
        busy_s=busy_s,
        stolen_s=stolen_s,
        load=os.getloadavg()[0],
        quotas=_quotas(proc, sys_),
        swapped_in_count=_named(proc / "vmstat").get("pswpin"),
        hot_s=hot_s,
        hot_count=hot_count,
        available_mib=_available_mib(proc),
    )


def _cpu_s(proc: Path) -> tuple[float, float]:
    """Return what all CPUs worked and what was stolen from them, in seconds."""
    try:
        first = (proc / "stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return 0.0, 0.0
    *ticks, stolen = (int(word) for word in first[1 : _STEAL_FIELD + 2])
    busy = sum(ticks) - sum(ticks[field] for field in _IDLE_FIELDS)
    hertz = os.sysconf("SC_CLK_TCK")
    return busy / hertz, stolen / hertz


def _named(path: Path) -> dict[str, int]:
    """Read lines `name number ...`; nothing where the file is missing or is something else."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split()[:2] for line in lines)
    return {
        pair[0].rstrip(":"): int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()
    }


def _quotas(proc: Path, sys_: Path) -> tuple[tuple[int, int], ...]:
    read = (_named(group / "cpu.stat") for group in machine.control_groups(proc, sys_, "cpu"))
    return tuple(
        (each["nr_periods"], each["nr_throttled"])
        for each in read
        if {"nr_periods", "nr_throttled"} <= each.keys()
    )


def _heat(sys_: Path) -> tuple[float | None, int | None]:
    """Return how long and how often cores were slowed down by heat (x86 with Intel's counters)."""
    times_ms: list[int] = []
    counts: list[int] = []
    for core in (sys_ / "devices/system/cpu").glob("cpu[0-9]*/thermal_throttle"):
        with contextlib.suppress(OSError, ValueError):
            counts.append(int((core / "core_throttle_count").read_text()))
        with contextlib.suppress(OSError, ValueError):
            times_ms.append(int((core / "core_throttle_total_time_ms").read_text()))
    return max(times_ms) / 1000 if times_ms else None, sum(counts) if counts else None


def _available_mib(proc: Path) -> float | None:
    kib = _named(proc / "meminfo").get("MemAvailable")
    return None if kib is None else kib * 1024 / _MIB


def on_battery(sys_: Path = _SYS) -> bool:
    """Tell whether this machine lives on a battery now, which lowers its clocks."""
    for supply in sorted((sys_ / "class/power_supply").glob("*")):
        try:
            kind = (supply / "type").read_text().strip()
            status = (supply / "status").read_text().strip()
        except OSError:
            continue
        scope = supply / "scope"  # "Device" is the battery of a mouse or a headset
        of_device = scope.exists() and scope.read_text().strip() == "Device"
        if kind == "Battery" and status == "Discharging" and not of_device:
            return True
    return False
