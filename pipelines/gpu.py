"""
NVIDIA cards: what they are, and what they do while something runs on them.

A thin layer on NVML (nvidia-ml-py), which is asked only here. A machine without a driver has no
GPUs; that is never an error. Numbers are those of the driver: memory in MiB, clocks in MHz.

Source: NVML API reference; reason bits from nvmlClocksEventReasons in nvml.h.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Set as AbstractSet

MIB: Final = 1 << 20
SAMPLE_EVERY_S: Final = 0.1

# Why the driver lowered a clock. A card at its power limit (0x4) works as designed and idle (0x1)
# or application clocks (0x2) are wanted; these are not.
SLOWDOWN_REASONS: Final = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}

# What a loaded driver leaves on Linux; the last is how Windows' driver shows in its subsystem.
_TRACES: Final = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Card:
    """
    One card that programs here may use.

    Attributes:
        name: As the driver names it, e.g. "NVIDIA GeForce RTX 3090".
        vram_mib: All of its memory.
        compute_capability: E.g. "8.6"; None if the driver does not say.
        power_limit_w: Limit that is enforced now; a setting, but one that decides the speed.
        pcie_generation: Highest that card and slot agree on; the current one drops when idle.
        pcie_lanes: Likewise.
    """

    name: str
    vram_mib: int
    compute_capability: str | None
    power_limit_w: int | None
    pcie_generation: int | None
    pcie_lanes: int | None


@dataclass(frozen=True, kw_only=True)
class Driver:
    """Versions of the driver, of the CUDA it supports, and whether it stays loaded when idle."""

    version: str
    cuda: str
    persistence: bool | None


def _may_have_driver() -> bool:
    """Rule a driver out by one look: importing pynvml costs more than the rest of the probe."""
    return sys.platform != "linux" or any(map(os.path.exists, _TRACES))


@contextmanager
def _nvml() -> Iterator[Any]:
    """Yield pynvml with the driver open, or None where there is no driver or no pynvml."""
    if not _may_have_driver():
        yield None
        return
    try:
        import pynvml  # noqa: PLC0415 - only machines with a card have it
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _ask(nvml: Any, call: Callable[[], T]) -> T | None:  # noqa: ANN401 - a module without types
    """Return what the driver answers; None if this card or driver does not know."""
    try:
        return call()
    except nvml.NVMLError:
        return None


def _name(raw: str | bytes) -> str:
    """Decode a text: old releases of pynvml return bytes."""
    return raw.decode(errors="replace") if isinstance(raw, bytes) else raw


def visible(uuids: list[str], declared: str | None) -> list[int]:
    """
    Return the indices of the cards that CUDA_VISIBLE_DEVICES leaves, in its order.

    Args:
        uuids: Of all cards, in PCI bus order, which `tool_environment` makes CUDA's order too.
        declared: The variable; None or absent means all. As CUDA does, stop at the first entry
            that names no card: "1,-1,0" leaves one card, "" none.
    """
    if declared is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in (part.strip() for part in declared.split(",")):
        if entry.isdigit() and int(entry) < len(uuids):
            index = int(entry)
        elif entry.startswith("GPU-") and sum(uuid.startswith(entry) for uuid in uuids) == 1:
            index = next(number for number, uuid in enumerate(uuids) if uuid.startswith(entry))
        else:
            break
        if index in chosen:
            return []
        chosen.append(index)
    return chosen


def tool_environment() -> dict[str, str]:
    """Variables under which CUDA counts the cards as NVML does."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _handles(nvml: Any) -> list[Any]:  # noqa: ANN401 - a module without types
    """Open the cards that programs here may use."""
    every = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    uuids = [_name(_ask(nvml, partial(nvml.nvmlDeviceGetUUID, handle)) or "") for handle in every]
    return [every[index] for index in visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))]


def cards() -> tuple[Card, ...]:
    """List the cards that programs here may use; none without a driver."""
    with _nvml() as nvml:
        if nvml is None:
            return ()
        try:
            return tuple(_card(nvml, handle) for handle in _handles(nvml))
        except nvml.NVMLError:
            return ()


def free_mib() -> float:
    """Return what is free at this moment on the cards that programs here may use, in MiB."""
    with _nvml() as nvml:
        if nvml is None:
            return 0.0
        told = [
            _ask(nvml, partial(nvml.nvmlDeviceGetMemoryInfo, handle))
            for handle in _ask(nvml, lambda: _handles(nvml)) or []
        ]
    return float(sum(memory.total - memory.used for memory in told if memory is not None)) / MIB


def _card(nvml: Any, handle: Any) -> Card:  # noqa: ANN401 - a module without types
    capability = _ask(nvml, lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
    limit_mw = _ask(nvml, lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    return Card(
        name=_name(nvml.nvmlDeviceGetName(handle)),
        vram_mib=nvml.nvmlDeviceGetMemoryInfo(handle).total // MIB,
        compute_capability=f"{capability[0]}.{capability[1]}" if capability else None,
        power_limit_w=None if limit_mw is None else round(limit_mw / 1000),
        pcie_generation=_ask(nvml, lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
        pcie_lanes=_ask(nvml, lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
    )


def driver() -> Driver | None:
    """Return the versions of the driver; None without one."""
    with _nvml() as nvml:
        if nvml is None:
            return None
        cuda = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion)
        handles = _ask(nvml, lambda: _handles(nvml)) or []
        modes = [
            _ask(nvml, partial(nvml.nvmlDeviceGetPersistenceMode, handle)) for handle in handles
        ]
        return Driver(
            version=_name(_ask(nvml, nvml.nvmlSystemGetDriverVersion) or "unknown"),
            cuda="unknown" if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            persistence=all(modes) if modes and None not in modes else None,
        )


@dataclass(frozen=True, kw_only=True)
class Observation:
    """
    What the cards did between two moments.

    Attributes:
        peak_mib: Largest memory that our processes held on all cards together. Where the driver
            cannot tell processes apart (`attributed` is False: containers with process numbers of
            their own), the growth of the cards' used memory since the beginning.
        attributed: Whether the driver named our processes.
        foreign: Names or numbers of other programs that computed on the cards.
        slowdowns: Share of the samples in which each unwanted reason lowered a clock.
        clock_mhz: Median of the SM clock over all samples and cards; None if never told.
        temperature_c: Highest.
        samples_count: Moments at which all of this was read.
    """

    peak_mib: float
    attributed: bool
    foreign: tuple[str, ...]
    slowdowns: dict[str, float]
    clock_mhz: float | None
    temperature_c: int | None
    samples_count: int


@dataclass
class _Readings:
    """All that one watcher has read so far."""

    peak_ours_bytes: int = 0
    peak_used_bytes: int = 0
    foreign: set[str] = field(default_factory=set)
    slowdowns: dict[str, int] = field(default_factory=dict)
    clocks_mhz: list[int] = field(default_factory=list)
    temperatures_c: list[int] = field(default_factory=list)
    samples_count: int = 0


class Watch:
    """Reads the cards ten times a second while the block runs; without a card, nothing."""

    def __init__(
        self,
        ours: Callable[[], AbstractSet[int]],
        *,
        every_s: float = SAMPLE_EVERY_S,
    ) -> None:
        """Prepare; `ours` returns the numbers of the processes that belong to us at the moment."""
        self._ours = ours
        self._every_s = every_s
        self._stack = contextlib.ExitStack()
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._used_before_bytes = 0
        self._foreign_before: set[int] = set()
        self._readings = _Readings()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Self:
        """Open the driver, note who is there already, start reading."""
        self._nvml = self._stack.enter_context(_nvml())
        if self._nvml is not None:
            self._handles = _ask(self._nvml, lambda: _handles(self._nvml)) or []
        if self._handles:
            self._used_before_bytes = sum(self._used(handle) for handle in self._handles)
            self._foreign_before = {
                pid for handle in self._handles for pid in self._processes(handle)
            } - set(self._ours())
            self._readings.foreign |= {self._label(pid) for pid in self._foreign_before}
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading and close the driver."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self._stack.close()

    @property
    def sees_cards(self) -> bool:
        """Whether there was anything to read."""
        return bool(self._handles)

    def _loop(self) -> None:
        while not self._stopped.wait(self._every_s):
            with contextlib.suppress(self._nvml.NVMLError):
                self.sample()

    def sample(self) -> None:
        """Read every card once."""
        if not self._handles:
            return
        seen = self._readings
        ours = set(self._ours())
        ours_bytes = used_bytes = 0
        for handle in self._handles:
            processes = self._processes(handle)
            ours_bytes += sum(size for pid, size in processes.items() if pid in ours)
            used_bytes += self._used(handle)
            # Where our own numbers show up, every other one is somebody else.
            if ours & processes.keys():
                seen.foreign |= {self._label(pid) for pid in processes.keys() - ours}
            self._condition(handle)
        seen.peak_ours_bytes = max(seen.peak_ours_bytes, ours_bytes)
        seen.peak_used_bytes = max(seen.peak_used_bytes, used_bytes)
        seen.samples_count += 1

    def _condition(self, handle: Any) -> None:  # noqa: ANN401 - a handle of the driver
        nvml, seen = self._nvml, self._readings
        clock = _ask(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        heat = _ask(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        # Renamed in driver 535; old releases of pynvml have only the old name.
        reasons_of = getattr(
            nvml,
            "nvmlDeviceGetCurrentClocksEventReasons",
            getattr(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", None),
        )
        bits = _ask(nvml, lambda: reasons_of(handle)) if reasons_of else None
        if clock is not None:
            seen.clocks_mhz.append(clock)
        if heat is not None:
            seen.temperatures_c.append(heat)
        for bit, reason in SLOWDOWN_REASONS.items():
            if (bits or 0) & bit:
                seen.slowdowns[reason] = seen.slowdowns.get(reason, 0) + 1

    def _used(self, handle: Any) -> int:  # noqa: ANN401 - a handle of the driver
        memory = _ask(self._nvml, lambda: self._nvml.nvmlDeviceGetMemoryInfo(handle))
        return 0 if memory is None else int(memory.used)

    def _processes(self, handle: Any) -> dict[int, int]:  # noqa: ANN401 - a handle of the driver
        """Return {process number: bytes} of what computes on a card; 0 bytes if not told."""
        found = _ask(self._nvml, lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        return {item.pid: item.usedGpuMemory or 0 for item in found or []}

    def _label(self, pid: int) -> str:
        """Name a process by its program, without its path, or by its number."""
        name = _ask(self._nvml, lambda: self._nvml.nvmlSystemGetProcessName(pid))
        return _name(name).rsplit("/", 1)[-1] if name else f"process {pid}"

    def observation(self) -> Observation:
        """Sum up; valid once the block has ended."""
        seen = self._readings
        cards_read = max(1, seen.samples_count * len(self._handles))
        attributed = seen.peak_ours_bytes > 0
        grown = max(0, seen.peak_used_bytes - self._used_before_bytes)
        return Observation(
            peak_mib=(seen.peak_ours_bytes if attributed else grown) / MIB,
            attributed=attributed,
            foreign=tuple(sorted(seen.foreign)),
            slowdowns={reason: count / cards_read for reason, count in seen.slowdowns.items()},
            clock_mhz=statistics.median(seen.clocks_mhz) if seen.clocks_mhz else None,
            temperature_c=max(seen.temperatures_c, default=None),
            samples_count=seen.samples_count,
        )
