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
    from collections.abc import Callable, Iterable, Iterator
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

POWER_CAP: Final = 0x04
_IDLE: Final = 0x01

# Of nvml.h; pynvml has the same, not all of them in every release.
_CLOCK_SM: Final = 1
_TEMPERATURE_GPU: Final = 0
_THRESHOLD_SLOWDOWN: Final = 1
_ERRORS_UNCORRECTED: Final = 1
_COUNTER_VOLATILE: Final = 0
_RETIRED_DOUBLE_BIT: Final = 1
_EVENT_XID: Final = 0x08
_LOST_ERRORS: Final = frozenset({15, 16})  # GPU_IS_LOST, RESET_REQUIRED

# One in so many samples reads what should not change: limits and counters of errors.
_SELDOM: Final = 10
# A card that reports more than this is broken, and says nothing new.
_MOST_XIDS: Final = 20
# A median of fewer clocks would be one clock.
_LEAST_DRIFT_SAMPLES: Final = 5

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

    Of several cards the worst counts. What a card or its driver does not tell is None, or missing.

    Attributes:
        peak_mib: Largest memory that our processes held on all cards together. Where the driver
            cannot tell processes apart (`attributed` is False: containers with process numbers of
            their own), the growth of the cards' used memory since the beginning.
        attributed: Whether the driver named our processes.
        foreign: Names or numbers of other programs that computed on the cards.
        slowdowns: Share of the samples in which each unwanted reason lowered a clock.
        clock_mhz: Median of the SM clock over all busy samples and cards; None if never told.
        temperature_c: Highest.
        samples_count: Moments at which all of this was read.
        power_capped: Share of the samples in which the power limit set the clock, as designed.
        clock_fall: Relative fall of the median SM clock from the first quarter of the busy samples
            to the last. Samples at the power limit do not count: there the load sets the clock.
        heating_c: Rise of the median temperature between the same.
        temperature_margin_c: Least distance from the temperature at which the card slows down.
        power_limits_w: All limits that each card was seen to enforce, in their order.
        ecc_errors_count: Uncorrected errors of memory that were new.
        retired_count: Rows or pages of memory that were newly taken out of use.
        xids: Numbers of the critical errors that the driver reported meanwhile.
        lost: Whether a card stopped answering ("GPU is lost").
        pcie_lanes_share: Lanes in use, at most, of those that card and slot agree on.
        display: Whether a screen hangs on a card.
        persistence: Whether the driver stays loaded when nobody uses the card.
    """

    peak_mib: float
    attributed: bool
    foreign: tuple[str, ...]
    slowdowns: dict[str, float]
    clock_mhz: float | None
    temperature_c: int | None
    samples_count: int
    power_capped: float = 0.0
    clock_fall: float | None = None
    heating_c: float | None = None
    temperature_margin_c: int | None = None
    power_limits_w: tuple[tuple[int, ...], ...] = ()
    ecc_errors_count: int | None = None
    retired_count: int | None = None
    xids: tuple[int, ...] = ()
    lost: bool = False
    pcie_lanes_share: float | None = None
    display: bool | None = None
    persistence: bool | None = None


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """One card at one moment; None is what it does not tell."""

    clock_mhz: int | None
    temperature_c: int | None
    reasons: int | None

    @property
    def busy(self) -> bool:
        """Whether it worked: an idle card has the clock of an idle card."""
        return not (self.reasons or 0) & _IDLE


@dataclass
class _CardReadings:
    """All that has been read so far of one card."""

    moments: list[_Moment] = field(default_factory=list)
    power_limits_w: list[int] = field(default_factory=list)
    lanes: list[int] = field(default_factory=list)
    lanes_possible: int | None = None
    slowdown_c: int | None = None
    ecc_errors: list[int] = field(default_factory=list)
    retired: list[int] = field(default_factory=list)
    display: bool | None = None
    persistence: bool | None = None

    def busy(self) -> list[_Moment]:
        """Moments at which it worked; all if it never did."""
        return [each for each in self.moments if each.busy] or self.moments

    def share(self, bit: int) -> float:
        """Share of its moments at which a reason set its clock."""
        return sum(bool((each.reasons or 0) & bit) for each in self.moments) / max(
            1, len(self.moments)
        )

    def drift(self) -> tuple[float, float] | None:
        """Return how far the clock fell and the heat rose, or None where there is too little."""
        free = [
            (each.clock_mhz, each.temperature_c)
            for each in self.busy()
            if each.clock_mhz and each.temperature_c and not (each.reasons or 0) & POWER_CAP
        ]
        quarter = len(free) // 4
        if quarter < _LEAST_DRIFT_SAMPLES:
            return None
        first, last = free[:quarter], free[-quarter:]
        clocks = [statistics.median(clock for clock, _ in part) for part in (first, last)]
        heats = [statistics.median(heat for _, heat in part) for part in (first, last)]
        return 1 - clocks[1] / clocks[0], heats[1] - heats[0]

    def margin_c(self) -> int | None:
        """Return the least distance from the temperature at which it slows down."""
        heats = [each.temperature_c for each in self.moments if each.temperature_c is not None]
        return self.slowdown_c - max(heats) if heats and self.slowdown_c else None


@dataclass
class _Readings:
    """All that one watcher has read so far."""

    peak_ours_bytes: int = 0
    peak_used_bytes: int = 0
    foreign: set[str] = field(default_factory=set)
    cards: list[_CardReadings] = field(default_factory=list)
    xids: list[int] = field(default_factory=list)
    lost: bool = False
    samples_count: int = 0


class Watch:
    """Reads the cards ten times a second while the block runs; without a card, nothing."""

    def __init__(
        self,
        ours: Callable[[], AbstractSet[int]],
        *,
        every_s: float | None = SAMPLE_EVERY_S,
    ) -> None:
        """
        Prepare; `ours` returns the numbers of the processes that belong to us at the moment.

        Without `every_s` it reads when `sample` is called, at the beginning, and at the end.
        """
        self._ours = ours
        self._every_s = every_s
        self._stack = contextlib.ExitStack()
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._events: Any = None
        self._used_before_bytes = 0
        self._readings = _Readings()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Self:
        """Open the driver, note who is there already, start reading."""
        self._nvml = self._stack.enter_context(_nvml())
        if self._nvml is not None:
            self._handles = _ask(self._nvml, lambda: _handles(self._nvml)) or []
        if self._handles:
            self._readings.cards = [_CardReadings() for _ in self._handles]
            self._used_before_bytes = sum(self._used(handle) for handle in self._handles)
            there = {pid for handle in self._handles for pid in self._processes(handle)}
            self._readings.foreign |= {self._label(pid) for pid in there - set(self._ours())}
            self._listen()
            self._once()
            self._settings()
            if self._every_s is not None:
                self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading, look a last time at what changes seldom, and close the driver."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._handles:
            self._settings()
            if self._events is not None:
                self._call("nvmlEventSetFree", self._events)
        self._stack.close()

    def _loop(self) -> None:
        while not self._stopped.wait(self._every_s):
            self.sample()

    @property
    def sees_cards(self) -> bool:
        """Whether there is anything to watch."""
        return bool(self._handles)

    def sample(self) -> None:
        """Read every card once."""
        if not self._handles:
            return
        seen = self._readings
        ours = set(self._ours())
        ours_bytes = used_bytes = 0
        for handle, card in zip(self._handles, seen.cards, strict=True):
            processes = self._processes(handle)
            ours_bytes += sum(size for pid, size in processes.items() if pid in ours)
            used_bytes += self._used(handle)
            # Where our own numbers show up, every other one is somebody else.
            if ours & processes.keys():
                seen.foreign |= {self._label(pid) for pid in processes.keys() - ours}
            card.moments.append(self._moment(handle))
            if (lanes := self._call("nvmlDeviceGetCurrPcieLinkWidth", handle)) is not None:
                card.lanes.append(lanes)
        seen.peak_ours_bytes = max(seen.peak_ours_bytes, ours_bytes)
        seen.peak_used_bytes = max(seen.peak_used_bytes, used_bytes)
        if seen.samples_count % _SELDOM == 0:
            self._settings()
        seen.samples_count += 1

    def _moment(self, handle: Any) -> _Moment:  # noqa: ANN401 - a handle of the driver
        # Renamed in driver 535; old releases of pynvml have only the old name.
        new, old = (
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
        )
        return _Moment(
            clock_mhz=self._call("nvmlDeviceGetClockInfo", handle, _CLOCK_SM),
            temperature_c=self._call("nvmlDeviceGetTemperature", handle, _TEMPERATURE_GPU),
            reasons=self._call(new if hasattr(self._nvml, new) else old, handle),
        )

    def _once(self) -> None:
        """Read what does not change."""
        for handle, card in zip(self._handles, self._readings.cards, strict=True):
            card.slowdown_c = self._call(
                "nvmlDeviceGetTemperatureThreshold", handle, _THRESHOLD_SLOWDOWN
            )
            card.lanes_possible = self._call("nvmlDeviceGetMaxPcieLinkWidth", handle)
            display = self._call("nvmlDeviceGetDisplayActive", handle)
            card.display = None if display is None else bool(display)
            mode = self._call("nvmlDeviceGetPersistenceMode", handle)
            card.persistence = None if mode is None else bool(mode)

    def _settings(self) -> None:
        """Read what should not change: limits, and counters of errors."""
        for handle, card in zip(self._handles, self._readings.cards, strict=True):
            limit_mw = self._call("nvmlDeviceGetEnforcedPowerLimit", handle)
            if limit_mw is not None and [round(limit_mw / 1000)] != card.power_limits_w[-1:]:
                card.power_limits_w.append(round(limit_mw / 1000))
            errors = self._call(
                "nvmlDeviceGetTotalEccErrors", handle, _ERRORS_UNCORRECTED, _COUNTER_VOLATILE
            )
            if errors is not None:
                card.ecc_errors.append(errors)
            if (retired := self._retired(handle)) is not None:
                card.retired.append(retired)
        self._hear()

    def _retired(self, handle: Any) -> int | None:  # noqa: ANN401 - a handle of the driver
        """Count the rows (since Ampere) or pages (before) of memory that are out of use."""
        rows = self._call("nvmlDeviceGetRemappedRows", handle)
        if rows is not None:
            correctable, uncorrectable, *_ = rows
            return int(correctable) + int(uncorrectable)
        pages = self._call("nvmlDeviceGetRetiredPages", handle, _RETIRED_DOUBLE_BIT)
        return None if pages is None else len(pages)

    def _listen(self) -> None:
        """Ask the driver to keep critical errors for us; not all cards and systems can."""
        self._events = self._call("nvmlEventSetCreate")
        if self._events is not None:
            for handle in self._handles:
                self._call("nvmlDeviceRegisterEvents", handle, _EVENT_XID, self._events)

    def _hear(self) -> None:
        """Take the errors that came meanwhile, without waiting for one."""
        while self._events is not None and len(self._readings.xids) < _MOST_XIDS:
            event = self._call("nvmlEventSetWait", self._events, 0)
            if event is None:  # the answer to "none" is NVML_ERROR_TIMEOUT
                return
            if event.eventType & _EVENT_XID:
                self._readings.xids.append(int(event.eventData))

    def _call(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401 - a module without types
        """Ask NVML by the name of its function; None if pynvml, driver or card does not know."""
        function = getattr(self._nvml, name, None)
        if function is None:
            return None
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            self._readings.lost |= getattr(error, "value", None) in _LOST_ERRORS
            return None

    def _used(self, handle: Any) -> int:  # noqa: ANN401 - a handle of the driver
        memory = self._call("nvmlDeviceGetMemoryInfo", handle)
        return 0 if memory is None else int(memory.used)

    def _processes(self, handle: Any) -> dict[int, int]:  # noqa: ANN401 - a handle of the driver
        """Return {process number: bytes} of what computes on a card; 0 bytes if not told."""
        found = self._call("nvmlDeviceGetComputeRunningProcesses", handle)
        return {item.pid: item.usedGpuMemory or 0 for item in found or []}

    def _label(self, pid: int) -> str:
        """Name a process by its program, without its path, or by its number."""
        name = self._call("nvmlSystemGetProcessName", pid)
        return _name(name).rsplit("/", 1)[-1] if name else f"process {pid}"

    def observation(self) -> Observation:
        """Sum up; valid once the block has ended."""
        seen = self._readings
        cards = seen.cards
        attributed = seen.peak_ours_bytes > 0
        grown = max(0, seen.peak_used_bytes - self._used_before_bytes)
        clocks = [each.clock_mhz for card in cards for each in card.busy() if each.clock_mhz]
        heats = [each.temperature_c for card in cards for each in card.moments]
        # The card whose clock fell most, and how much warmer the same one became.
        fall, heating = max(
            (drift for card in cards if (drift := card.drift())), default=(None,) * 2
        )
        slowdowns = {
            reason: max((card.share(bit) for card in cards), default=0.0)
            for bit, reason in SLOWDOWN_REASONS.items()
        }
        return Observation(
            peak_mib=(seen.peak_ours_bytes if attributed else grown) / MIB,
            attributed=attributed,
            foreign=tuple(sorted(seen.foreign)),
            slowdowns={reason: share for reason, share in slowdowns.items() if share > 0},
            clock_mhz=statistics.median(clocks) if clocks else None,
            temperature_c=_most(heats),
            samples_count=seen.samples_count,
            power_capped=max((card.share(POWER_CAP) for card in cards), default=0.0),
            clock_fall=fall,
            heating_c=heating,
            temperature_margin_c=_least(card.margin_c() for card in cards),
            power_limits_w=tuple(tuple(card.power_limits_w) for card in cards),
            ecc_errors_count=_most(_grown(card.ecc_errors) for card in cards),
            retired_count=_most(_grown(card.retired) for card in cards),
            xids=tuple(seen.xids),
            lost=seen.lost,
            pcie_lanes_share=_least(
                max(card.lanes) / card.lanes_possible
                for card in cards
                if card.lanes and card.lanes_possible
            ),
            display=_any(card.display for card in cards),
            persistence=_all(card.persistence for card in cards),
        )


N = TypeVar("N", int, float)


def _most(told: Iterable[N | None]) -> N | None:
    return max((each for each in told if each is not None), default=None)


def _least(told: Iterable[N | None]) -> N | None:
    return min((each for each in told if each is not None), default=None)


def _grown(counter: list[int]) -> int | None:
    """Return by how much a counter grew; one that a reset of the driver set back did not."""
    return max(0, max(counter) - counter[0]) if counter else None


def _any(told: Iterable[bool | None]) -> bool | None:
    known = [each for each in told if each is not None]
    return any(known) if known else None


def _all(told: Iterable[bool | None]) -> bool | None:
    known = [each for each in told if each is not None]
    return all(known) if known else None
