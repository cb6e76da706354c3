"""
Whether a measurement of speed and memory can be trusted: VALID or INVALID, and why.

INVALID means that the number is wrong, not that it is bad: it never fails a gate and never becomes
a baseline; it is measured again. What makes a number less exact, but not wrong, is a note, and
shows in the interval of its samples. Divergence from f16 is not judged here: its arithmetic comes
out the same however busy the machine is.

The limits are the constants below, with the reason for each.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import wording
from pipelines.records import Validity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.gpu import Card, Observation
    from pipelines.watch import Usage

_PROC: Final = Path("/proc")
_SYS: Final = Path("/sys")

# Share of the CPU time wanted on this machine that its hypervisor gave to other machines. Stolen
# time hits single samples by 10 ms and more, so a tenth of it moves the median itself.
MAX_STEAL_SHARE: Final = 0.10
NOTED_STEAL_SHARE: Final = 0.02

# Share of the run in which a thread of the benchmark stood ready and had no core. Its threads wait
# for one another after each tensor, so while one waits all do, and 0.5 makes a number that is half
# of the truth. An idle desktop shows 0.01, a shared runner 0.05 to 0.3: those vary, and say so.
MAX_WAITING_SHARE: Final = 0.50
NOTED_WAITING_SHARE: Final = 0.05

# Share of the moments at which a card was slowed down by heat or lack of power. One moment can be
# the end of what ran before.
MAX_SLOWDOWN_SHARE: Final = 0.02

# Share of the planned weights that must be seen in memory. Less on a card means that layers stayed
# on the CPU, whatever was asked for.
MIN_WEIGHTS_SEEN: Final = 0.90

# (largest - smallest) / median of one test's samples from which on the reader is told.
NOTED_SPREAD: Final = 0.20


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """
    Counters of the whole machine at one moment.

    Attributes:
        busy_s: CPU time spent on anything, by anybody, since the start of the machine.
        stolen_s: CPU time that the hypervisor withheld while somebody here wanted it.
        load: Programs that ran or wanted to, averaged over one minute.
    """

    busy_s: float
    stolen_s: float
    load: float


# user nice system idle iowait irq softirq steal guest guest_nice, in ticks; guests are in user.
_IDLE_FIELDS = (3, 4)
_STEAL_FIELD = 7


def cpu_times(proc: Path = _PROC) -> CpuTimes:
    """Read the counters; a system without /proc/stat has only its load."""
    load = os.getloadavg()[0]
    try:
        first = (proc / "stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return CpuTimes(busy_s=0.0, stolen_s=0.0, load=load)
    *ticks, stolen = (int(word) for word in first[1 : _STEAL_FIELD + 2])
    busy = sum(ticks) - sum(ticks[field] for field in _IDLE_FIELDS)
    hertz = os.sysconf("SC_CLK_TCK")
    return CpuTimes(busy_s=busy / hertz, stolen_s=stolen / hertz, load=load)


def steal_share(before: CpuTimes, after: CpuTimes) -> float:
    """Share of the CPU time wanted between two moments that the hypervisor withheld."""
    stolen = max(0.0, after.stolen_s - before.stolen_s)
    busy = max(0.0, after.busy_s - before.busy_s)
    return stolen / (stolen + busy) if stolen else 0.0


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


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """
    All that is known about the circumstances of a measurement.

    Attributes:
        backend: What llama.cpp was built for.
        before: Counters when it began.
        after: Counters when it ended.
        wall_s: Time between the two.
        usage: What the benchmark's own programs used meanwhile.
        cards: GPUs that programs here may use.
        gpu: What they did meanwhile; None on a machine without one.
        gpu_info: GPUs as llama.cpp names them.
        weights_mib: Weights as planned, on the cards or in main memory.
        peak_mib: Memory seen there at the declared context.
        battery: Whether the machine lived on a battery.
        spreads: (largest - smallest) / median of the samples, by the name of the test.
        threads: Threads of the benchmark.
        attempts: How often the speed was measured until the CPU was free, or we gave up.
    """

    backend: str
    before: CpuTimes
    after: CpuTimes
    wall_s: float
    usage: Usage
    cards: Sequence[Card]
    gpu: Observation | None
    gpu_info: str
    weights_mib: float
    peak_mib: float
    battery: bool
    spreads: Mapping[str, float]
    threads: int
    attempts: int = 1


def judge(seen: Conditions) -> Validity:
    """Apply the rules of this module; `reasons` is empty exactly if the verdict is VALID."""
    reasons: list[str] = []
    notes: list[str] = []
    _judge_cpu(seen, reasons, notes)
    if seen.backend != "cpu":
        _judge_gpu(seen, reasons, notes)
    if seen.peak_mib < MIN_WEIGHTS_SEEN * seen.weights_mib:
        reasons.append(
            f"Only {seen.peak_mib:,.0f} MiB were seen where {seen.weights_mib:,.0f} MiB of weights "
            "should lie: layers stayed elsewhere, or this memory cannot be measured here."
        )
    notes += [
        f"The samples of {test} differ by {wording.percent(spread)} of their median."
        for test, spread in seen.spreads.items()
        if spread > NOTED_SPREAD
    ]
    return Validity(
        verdict="INVALID" if reasons else "VALID",
        reasons=tuple(reasons),
        notes=tuple(notes),
        load_before=seen.before.load,
        load_after=seen.after.load,
        steal_share=steal_share(seen.before, seen.after),
        gpu_info=seen.gpu_info,
    )


def waiting_share(usage: Usage, *, wall_s: float, threads: int) -> float:
    """
    Share of a run in which at least one thread of the benchmark waited for a core.

    The scheduler counts the waits of each thread. With w the share of the run that one of the
    n threads waited on average, and threads that wait independently, it is 1 - (1 - w)^n. One
    other busy program on two cores: w = 0.25, so 0.44; the benchmark then runs at about half speed.
    """
    if wall_s <= 0:
        return 0.0
    each = min(1.0, (usage.waited_s or 0.0) / (threads * wall_s))
    return 1 - (1 - each) ** threads


def was_busy(
    before: CpuTimes, after: CpuTimes, usage: Usage, *, wall_s: float, threads: int
) -> bool:
    """Tell whether others took so much of the CPU that the run is void: worth another try."""
    return (
        steal_share(before, after) > MAX_STEAL_SHARE
        or waiting_share(usage, wall_s=wall_s, threads=threads) > MAX_WAITING_SHARE
    )


def _judge_cpu(seen: Conditions, reasons: list[str], notes: list[str]) -> None:
    stolen = steal_share(seen.before, seen.after)
    if stolen > MAX_STEAL_SHARE:
        reasons.append(
            f"The hypervisor withheld {_over(stolen, MAX_STEAL_SHARE)} of the CPU time (limit "
            f"{_limit(MAX_STEAL_SHARE)}): measure on a machine of its own, or at another time."
        )
    elif stolen > NOTED_STEAL_SHARE:
        notes.append(f"The hypervisor withheld {wording.percent(stolen)} of the CPU time.")
    waiting = waiting_share(seen.usage, wall_s=seen.wall_s, threads=seen.threads)
    if waiting > MAX_WAITING_SHARE:
        reasons.append(
            f"The benchmark waited for a core in {_over(waiting, MAX_WAITING_SHARE)} of its time "
            f"(limit {_limit(MAX_WAITING_SHARE)}): stop what else runs here, or declare fewer than "
            f"{seen.threads} benchmark.threads, and run it again."
        )
    elif seen.usage.waited_s is None:
        notes.append("This system does not tell whether the benchmark waited for a core.")
    elif waiting > NOTED_WAITING_SHARE:
        notes.append(f"The benchmark waited for a core in {wording.percent(waiting)} of its time.")
    if seen.attempts > 1:
        notes.append(f"Speed was measured {seen.attempts} times, since the machine was busy.")
    if seen.battery:
        reasons.append("The machine ran on its battery: plug it in and run it again.")


def _over(share: float, limit: float) -> str:
    """Write a share with as many digits as show on which side of its limit it lies."""
    return f"{wording.beyond(share * 100, limit * 100)} %"


def _limit(share: float) -> str:
    return f"{wording.declared(share * 100)} %"


def _judge_gpu(seen: Conditions, reasons: list[str], notes: list[str]) -> None:
    _judge_backend(seen, reasons)
    if seen.gpu is not None and seen.gpu.samples_count:
        judge_cards(seen.gpu, reasons, notes)
    elif seen.backend == "cuda":
        reasons.append(
            "Nothing watched the card: install the driver and nvidia-ml-py, so that other "
            "programs and slowdowns are seen."
        )
    else:
        notes.append(f"Nothing watches the cards of {seen.backend}: others may use them.")


def _judge_backend(seen: Conditions, reasons: list[str]) -> None:
    """Check that the GPU worked, and that it is the one that the driver shows."""
    unknown = [card.name for card in seen.cards if card.name not in seen.gpu_info]
    if not seen.gpu_info.strip():
        reasons.append(
            f"llama.cpp is built for {seen.backend} but used no GPU: check the driver with "
            "`nvidia-smi` and CUDA_VISIBLE_DEVICES."
        )
    elif unknown:
        reasons.append(
            f"The driver shows {', '.join(unknown)}, llama.cpp used {seen.gpu_info}: set "
            "CUDA_VISIBLE_DEVICES to the cards to measure."
        )


def judge_cards(gpu: Observation, reasons: list[str], notes: list[str]) -> None:
    """Add what was seen of the cards to the reasons for doubt and to the notes."""
    if gpu.foreign:
        reasons.append(
            f"Other programs computed on the card: {', '.join(gpu.foreign)}. Stop them and "
            "run it again."
        )
    reasons += [
        f"The card was slowed down ({reason}) in {wording.percent(share)} of the run: let it cool, "
        "check fans and power, and run it again."
        for reason, share in gpu.slowdowns.items()
        if share > MAX_SLOWDOWN_SHARE
    ]
    if not gpu.attributed:
        notes.append(
            "The driver does not show which process uses the card (a container?): memory is the "
            "growth of the whole card."
        )
    if gpu.clock_mhz is not None:
        heat = "" if gpu.temperature_c is None else f", {gpu.temperature_c} °C at most"
        notes.append(f"SM clock {gpu.clock_mhz:,.0f} MHz in the median{heat}.")
