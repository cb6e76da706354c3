"""
Whether a measurement of speed and memory can be trusted: VALID or INVALID, and why.

INVALID means that the number is wrong, not that it is bad: it never fails a gate and never becomes
a baseline; it is measured again. What makes a number less exact, but not wrong, is a note, and
shows in the interval of its samples. Divergence from f16 is not judged here: its arithmetic comes
out the same however busy the machine is.

One rule is one function, those of cards in `validity_cards`: it looks at the circumstances and says
what was seen, where the limit lies and what to do. Rules know nothing of each other, and only add:
a reading that gets worse cannot make a measurement valid. What could not be read is never held
against a measurement, except where nobody watched at all. The limits are the constants, with the
reason for each.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

from pipelines import validity_cards, wording
from pipelines.records import Condition, Validity
from pipelines.validity_findings import (
    MAX_SLOWDOWN_SHARE,
    Finding,
    limit_of,
    note,
    ok,
    over,
    unknown,
    void,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pipelines.counters import CpuTimes
    from pipelines.gpu import Card, Observation
    from pipelines.watch import Usage

# Share of the CPU time wanted on this machine that its hypervisor gave to other machines. Stolen
# time hits single samples by 10 ms and more, so a tenth of it moves the median itself.
MAX_STEAL_SHARE: Final = 0.10
NOTED_STEAL_SHARE: Final = 0.02

# Share of the run in which a thread of the benchmark stood ready and had no core. Its threads wait
# for one another after each tensor, so while one waits all do, and 0.5 makes a number that is half
# of the truth. An idle desktop shows 0.01, a shared runner 0.05 to 0.3: those vary, and say so.
MAX_WAITING_SHARE: Final = 0.50
NOTED_WAITING_SHARE: Final = 0.05

# Share of the periods in which the CPU quota of a container was used up. It then stands still for
# the rest of the period (cgroup-v2.rst, cpu.max: 100 ms), longer than most samples of ours.
MAX_QUOTA_SHARE: Final = 0.05

# Pages a second that had to be read from a disk. One takes about 0.1 ms on an SSD (4 KiB at queue
# depth 1), so at 100 in a second a hundredth of the run is spent waiting for a disk; a model that
# does not fit the memory shows thousands.
MAX_PAGE_INS_PER_S: Final = 100.0

# Cores that others had on average from which on a reader is told: they share the memory's
# bandwidth, which decides the speed of decoding, even where nobody waits for a core.
NOTED_OTHER_CORES: Final = 0.25

# Relative difference of the median SM clocks of two sides that are compared. Decoding follows the
# clock less than proportionally, so this stays below the smallest effect that is gated (3 %).
MAX_CLOCK_DIFFERENCE: Final = 0.03

# Share of the planned weights that must be seen in memory. Less on a card means that layers stayed
# on the CPU, whatever was asked for.
MIN_WEIGHTS_SEEN: Final = 0.90

# (largest - smallest) / median of one test's samples from which on the reader is told.
NOTED_SPREAD: Final = 0.20

# Cores beside the model's from which on a reader of its speed should know.
NOTED_CLIENT_CORES: Final = 0.1

_BEST_GOVERNORS: Final = (None, "performance")


@dataclass(frozen=True, kw_only=True)
class Run:
    """
    What is known of a run without watching it.

    Attributes:
        backend: What llama.cpp was built for; "cpu" if nothing of the model lay on a card.
        threads: Threads that compute.
        subject: What is measured: sentences speak of it.
        gpu_info: GPUs as llama.cpp names them; None where nobody says.
        weights_mib: Weights as planned, on the cards or in main memory; None if not planned.
        peak_mib: Memory seen there at the declared context; None if that is judged elsewhere.
        spreads: (largest - smallest) / median of the samples, by the name of the test.
        attempts: How often the speed was measured until the CPU was free, or we gave up.
        hw_id: Hardware for which the numbers will be recorded; None if for none.
    """

    backend: str
    threads: int
    subject: Literal["benchmark", "server"] = "benchmark"
    gpu_info: str | None = None
    weights_mib: float | None = None
    peak_mib: float | None = None
    spreads: Mapping[str, float] = field(default_factory=dict)
    attempts: int = 1
    hw_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Conditions(Run):
    """
    All that is known about the circumstances of a measurement.

    Attributes:
        before: Counters when it began.
        after: Counters when it ended.
        wall_s: Time between the two.
        usage: What the measured programs used meanwhile.
        cards: GPUs that programs here may use.
        gpu: What they did meanwhile; None on a machine without one.
        battery: Whether the machine lived on a battery.
        beside_s: CPU time of our own that is not held against anybody: the client, the engine in
            front of the server. None for a benchmark, which nobody talks to.
        governor: Of the CPU's frequency; None where there is none.
        leased: Whether the lock of this machine was ours to the end; None if nobody looked.
        hw_id_found: Hardware as it was when the run ended; None if nobody looked.
    """

    before: CpuTimes
    after: CpuTimes
    wall_s: float
    usage: Usage
    cards: Sequence[Card]
    gpu: Observation | None
    battery: bool
    beside_s: float | None = None
    governor: str | None = None
    leased: bool | None = None
    hw_id_found: str | None = None


def judge(seen: Conditions) -> Validity:
    """Apply the rules of this module; `reasons` is empty exactly if the verdict is VALID."""
    found = findings(seen)
    reasons = tuple(each.sentence for each in found if each.outcome == "void")
    return Validity(
        verdict="INVALID" if reasons else "VALID",
        reasons=reasons,
        notes=tuple(each.sentence for each in found if each.outcome != "void" and each.sentence),
        load_before=seen.before.load,
        load_after=seen.after.load,
        steal_share=steal_share(seen.before, seen.after),
        gpu_info=seen.gpu_info or "",
        conditions=tuple(
            Condition(rule=each.rule, outcome=each.outcome, value=each.value, limit=each.limit)
            for each in found
        ),
    )


def findings(seen: Conditions) -> tuple[Finding, ...]:
    """Return what each rule says that applies, those of the machine before those of its cards."""
    rules = RULES if seen.backend == "cpu" else RULES + validity_cards.RULES
    return tuple(found for rule in rules for found in rule(seen))


def sides(first: Validity, second: Validity) -> tuple[Finding, ...]:
    """
    Judge what the certificates of two runs that are compared show only together: their clocks.

    Returns:
        One finding, or none where the cards' clocks are not known.
    """
    clocks = [
        each.value
        for validity in (first, second)
        for each in validity.conditions
        if each.rule == "clock_mhz" and each.value
    ]
    if len(clocks) < 2:  # noqa: PLR2004 - two sides
        return ()
    low, high = min(clocks), max(clocks)
    rule = ("clock_difference", 1 - low / high, MAX_CLOCK_DIFFERENCE)
    if rule[1] <= MAX_CLOCK_DIFFERENCE:
        return (ok(*rule),)
    sentence = (
        f"The median SM clocks of the two sides, {low:,.0f} and {high:,.0f} MHz, differ by "
        f"{over(rule[1], MAX_CLOCK_DIFFERENCE)} (limit {limit_of(MAX_CLOCK_DIFFERENCE)}): let the "
        "card warm up, or fix its clock with `nvidia-smi -lgc`, and run it again."
    )
    return (void(*rule, sentence),)


_COUNTED: Final = {
    "ok": "as they should be",
    "note": "noted",
    "void": "not as they should be",
    "unknown": "not told",
}


def line(found: Validity) -> str:
    """
    Write a certificate in one line: how much was looked at, then its reasons and notes.

    Reasons and notes may hold names of programs and of cards, which are text from outside: whoever
    shows them cleans them.

    Returns:
        The line; empty where there is neither a reason nor a note.
    """
    if not (found.reasons or found.notes):
        return ""
    counts = {name: sum(c.outcome == name for c in found.conditions) for name in _COUNTED}
    told = wording.listed([f"{count} {_COUNTED[name]}" for name, count in counts.items() if count])
    looked = f"{wording.counted(len(found.conditions), 'condition')} looked at, {told}"
    first = f"{found.verdict}, {looked}" if found.conditions else found.verdict
    said = (wording.sentence(" ".join(each.split())) for each in (*found.reasons, *found.notes))
    return " ".join((f"{first}.", *dict.fromkeys(said)))


# --- shares -----------------------------------------------------------------------------------


def steal_share(before: CpuTimes, after: CpuTimes) -> float:
    """Share of the CPU time wanted between two moments that the hypervisor withheld."""
    stolen = max(0.0, after.stolen_s - before.stolen_s)
    busy = max(0.0, after.busy_s - before.busy_s)
    return stolen / (stolen + busy) if stolen else 0.0


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


def others_share(
    usage: Usage, *, beside_s: float, busy_s: float, wall_s: float, threads: int
) -> float:
    """
    Bound the share of a run in which others kept a thread of the server from a core.

    A server waits for cores that the client, Ollama and its own further threads use, too: that is
    part of serving on one machine. What others took is bounded from two sides, and the smaller
    bound counts: the time that its threads waited less the time that we used beside it, and the
    time that the whole machine was busy less all of ours.

    Args:
        usage: What the server's threads used, and how long they waited.
        beside_s: CPU time that we used beside it: the client, Ollama.
        busy_s: CPU time that the whole machine used; 0 on a system that does not tell.
        wall_s: Length of the run.
        threads: Threads that compute.
    """
    waited_s = (usage.waited_s or 0.0) - beside_s
    if busy_s > 0:
        waited_s = min(waited_s, busy_s - usage.on_core_s - beside_s)
    alone = replace(usage, waited_s=max(0.0, waited_s))
    return waiting_share(alone, wall_s=wall_s, threads=threads)


def quota_share(before: CpuTimes, after: CpuTimes) -> float | None:
    """Share of the periods in which a CPU quota was used up; None without a quota."""
    shares = [
        max(0, throttled - throttled_before) / (periods - periods_before)
        for (periods_before, throttled_before), (periods, throttled) in zip(
            before.quotas, after.quotas, strict=False
        )
        if periods > periods_before
    ]
    return max(shares, default=None)


def was_busy(
    before: CpuTimes, after: CpuTimes, usage: Usage, *, wall_s: float, threads: int
) -> bool:
    """Tell whether the CPU was so busy with others that measuring again is worth it."""
    return (
        steal_share(before, after) > MAX_STEAL_SHARE
        or waiting_share(usage, wall_s=wall_s, threads=threads) > MAX_WAITING_SHARE
    )


# --- rules of the machine ---------------------------------------------------------------------


def _steal(seen: Conditions) -> Iterator[Finding]:
    share = steal_share(seen.before, seen.after)
    rule = ("steal_share", share, MAX_STEAL_SHARE)
    if share > MAX_STEAL_SHARE:
        yield void(
            *rule,
            f"The hypervisor withheld {over(share, MAX_STEAL_SHARE)} of the CPU time (limit "
            f"{limit_of(MAX_STEAL_SHARE)}): measure on a machine of its own, or at another time.",
        )
    elif share > NOTED_STEAL_SHARE:
        yield note(*rule, f"The hypervisor withheld {wording.percent(share)} of the CPU time.")
    else:
        yield ok(*rule)


def _waiting(seen: Conditions) -> Iterator[Finding]:
    usage, wall_s = seen.usage, seen.wall_s
    if usage.waited_s is None:
        yield unknown(
            "waiting_share",
            MAX_WAITING_SHARE,
            f"This system does not tell whether the {seen.subject} waited for a core.",
        )
        return
    if seen.beside_s is None:
        share = waiting_share(usage, wall_s=wall_s, threads=seen.threads)
    else:
        share = others_share(
            usage,
            beside_s=seen.beside_s,
            busy_s=seen.after.busy_s - seen.before.busy_s,
            wall_s=wall_s,
            threads=seen.threads,
        )
    rule = ("waiting_share", share, MAX_WAITING_SHARE)
    waited = f"The {seen.subject} waited for a core in"
    if share > MAX_WAITING_SHARE:
        section = "benchmark.threads" if seen.subject == "benchmark" else "serving.threads"
        yield void(
            *rule,
            f"{waited} {over(share, MAX_WAITING_SHARE)} of its time (limit "
            f"{limit_of(MAX_WAITING_SHARE)}): stop what else runs here, or declare fewer than "
            f"{seen.threads} {section}, and run it again.",
        )
    elif share > NOTED_WAITING_SHARE:
        yield note(*rule, f"{waited} {wording.percent(share)} of its time.")
    else:
        yield ok(*rule)


def _others(seen: Conditions) -> Iterator[Finding]:
    busy_s = seen.after.busy_s - seen.before.busy_s
    if busy_s <= 0 or seen.wall_s <= 0:
        return
    cores = max(0.0, busy_s - seen.usage.on_core_s - (seen.beside_s or 0.0)) / seen.wall_s
    rule = ("others_cores", cores, NOTED_OTHER_CORES)
    if cores > NOTED_OTHER_CORES:
        yield note(
            *rule,
            f"Other programs used {wording.number(cores, 2)} cores on average (noted from "
            f"{wording.declared(NOTED_OTHER_CORES)}): they share the memory's bandwidth.",
        )
    else:
        yield ok(*rule)


def _attempts(seen: Conditions) -> Iterator[Finding]:
    if seen.attempts > 1:
        yield note(
            "attempts_count",
            seen.attempts,
            1,
            f"Speed was measured {seen.attempts} times, since the machine was busy.",
        )


def _quota(seen: Conditions) -> Iterator[Finding]:
    share = quota_share(seen.before, seen.after)
    if share is None:
        return
    rule = ("cpu_quota_share", share, MAX_QUOTA_SHARE)
    if share > MAX_QUOTA_SHARE:
        yield void(
            *rule,
            f"The container's CPU quota stopped everything in {over(share, MAX_QUOTA_SHARE)} of "
            f"its periods (limit {limit_of(MAX_QUOTA_SHARE)}): raise the quota, or declare fewer "
            f"than {seen.threads} threads, and run it again.",
        )
    elif share > 0:
        yield note(
            *rule,
            f"The container's CPU quota stopped everything in {wording.percent(share)} of its "
            "periods.",
        )
    else:
        yield ok(*rule)


def _swap(seen: Conditions) -> Iterator[Finding]:
    before, after = seen.before.swapped_in_count, seen.after.swapped_in_count
    if before is not None and after is not None:
        yield from _page_ins(
            "swap_ins_per_s",
            after - before,
            seen,
            "The machine read {} pages a second back from swap",
            "free memory, or take a smaller model or context, and run it again",
        )


def _faults(seen: Conditions) -> Iterator[Finding]:
    if seen.usage.major_faults_count is not None:
        yield from _page_ins(
            "major_faults_per_s",
            seen.usage.major_faults_count,
            seen,
            f"The {seen.subject} had to read {{}} pages a second from the disk",
            "its weights do not stay in memory; free memory, or take a smaller quant, and run it "
            "again",
        )


def _page_ins(rule: str, count: int, seen: Conditions, what: str, advice: str) -> Iterator[Finding]:
    rate = max(0, count) / seen.wall_s if seen.wall_s > 0 else 0.0
    if rate > MAX_PAGE_INS_PER_S:
        yield void(
            rule,
            rate,
            MAX_PAGE_INS_PER_S,
            f"{what.format(wording.beyond(rate, MAX_PAGE_INS_PER_S))} (limit "
            f"{wording.declared(MAX_PAGE_INS_PER_S)}): {advice}.",
        )
    elif rate > 1:
        yield note(rule, rate, MAX_PAGE_INS_PER_S, f"{what.format(wording.number(rate, 2))}.")
    else:
        yield ok(rule, rate, MAX_PAGE_INS_PER_S)


def _hot_cpu(seen: Conditions) -> Iterator[Finding]:
    """Judge by the time that a core was slowed down; by the events where only they are counted."""
    before, after = seen.before, seen.after
    advice = "let it cool, check its fans, and run it again"
    if before.hot_s is not None and after.hot_s is not None and seen.wall_s > 0:
        share = max(0.0, after.hot_s - before.hot_s) / seen.wall_s
        rule = ("cpu_hot_share", share, MAX_SLOWDOWN_SHARE)
        if share > MAX_SLOWDOWN_SHARE:
            yield void(
                *rule,
                f"The CPU was slowed down by heat in {over(share, MAX_SLOWDOWN_SHARE)} of the run "
                f"(limit {limit_of(MAX_SLOWDOWN_SHARE)}): {advice}.",
            )
        elif share > 0:
            yield note(
                *rule, f"The CPU was slowed down by heat in {wording.percent(share)} of the run."
            )
        else:
            yield ok(*rule)
    elif before.hot_count is not None and after.hot_count is not None:
        count = max(0, after.hot_count - before.hot_count)
        if count > 0:
            yield void(
                "cpu_hot_count",
                count,
                0,
                f"The CPU was slowed down by heat {wording.counted(count, 'time')} (limit 0, "
                f"since this kernel does not tell for how long): {advice}.",
            )
        else:
            yield ok("cpu_hot_count", 0, 0)


def _battery(seen: Conditions) -> Iterator[Finding]:
    if seen.battery:
        yield void(
            "on_battery_count",
            1,
            0,
            "The machine ran on its battery, which lowers its clocks (limit: never): plug it in "
            "and run it again.",
        )
    else:
        yield ok("on_battery_count", 0, 0)


def _governor(seen: Conditions) -> Iterator[Finding]:
    if seen.governor not in _BEST_GOVERNORS:
        yield Finding(
            "cpu_governor",
            "note",
            sentence=f"The CPU's frequency governor is {wording.quoted(str(seen.governor))}; "
            '"performance" makes the samples more equal.',
        )


def _room(seen: Conditions) -> Iterator[Finding]:
    available, weights = seen.before.available_mib, seen.weights_mib
    if seen.backend != "cpu" or available is None or weights is None:
        return
    rule = ("memory_available_mib", available, weights)
    if available < weights:
        yield note(
            *rule,
            f"{wording.mib(available)} of memory were free for {wording.mib(weights)} of weights.",
        )
    else:
        yield ok(*rule)


def _weights(seen: Conditions) -> Iterator[Finding]:
    weights, peak = seen.weights_mib, seen.peak_mib
    if weights is None or peak is None:
        return
    least = MIN_WEIGHTS_SEEN * weights
    if peak < least:
        yield void(
            "weights_seen_mib",
            peak,
            least,
            f"Only {peak:,.0f} MiB were seen where {weights:,.0f} MiB of weights should lie "
            f"(at least {limit_of(MIN_WEIGHTS_SEEN)}): layers stayed elsewhere, or this memory "
            "cannot be measured here. Check that the model fits, and run it again.",
        )
    else:
        yield ok("weights_seen_mib", peak, least)


def _spread(seen: Conditions) -> Iterator[Finding]:
    if seen.spreads:
        worst = max(seen.spreads.values())
        outcome: Literal["note", "ok"] = "note" if worst > NOTED_SPREAD else "ok"
        yield Finding("samples_spread", outcome, worst, NOTED_SPREAD)
    for test, spread in seen.spreads.items():
        if spread > NOTED_SPREAD:
            yield note(
                f"samples_spread of {test}",
                spread,
                NOTED_SPREAD,
                f"The samples of {test} differ by {wording.percent(spread)} of their median.",
            )


def _lease(seen: Conditions) -> Iterator[Finding]:
    if seen.leased is None:
        return
    if seen.leased:
        yield ok("lease_lost_count", 0, 0)
    else:
        yield void(
            "lease_lost_count",
            1,
            0,
            "This machine's lock was not held to the end of the run (limit: always): another "
            "measurement may have run beside it. Let nothing empty the cache meanwhile, and run it "
            "again.",
        )


def _hardware(seen: Conditions) -> Iterator[Finding]:
    if seen.hw_id is None or seen.hw_id_found is None:
        return
    if seen.hw_id != seen.hw_id_found:
        yield void(
            "hardware_changed_count",
            1,
            0,
            f"The hardware is {seen.hw_id_found[:12]} at the end of the run and was "
            f"{seen.hw_id[:12]} (limit: the same): cores, memory, cards or a power limit changed. "
            "Run `fleet machine`, and run it again.",
        )
    else:
        yield ok("hardware_changed_count", 0, 0)


def _client(seen: Conditions) -> Iterator[Finding]:
    if seen.beside_s is None or seen.wall_s <= 0 or seen.backend != "cpu":
        return
    cores = seen.beside_s / seen.wall_s
    rule = ("client_cores", cores, NOTED_CLIENT_CORES)
    if cores > NOTED_CLIENT_CORES:
        yield note(
            *rule,
            f"Client and engine took {wording.number(cores)} of the cores on which the model was "
            "computed; behind a network it would be faster.",
        )
    else:
        yield ok(*rule)


RULES: Final = (
    _lease,
    _hardware,
    _steal,
    _waiting,
    _attempts,
    _others,
    _quota,
    _swap,
    _faults,
    _hot_cpu,
    _battery,
    _governor,
    _room,
    _client,
    _weights,
    _spread,
)
