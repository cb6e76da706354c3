"""
Whether the measured service keeps the declared levels of a host: PASS, FAIL or INCONCLUSIVE.

A level on latency is judged as a share: "ttft of 300 ms" means that `min_goodput` of all requests
have their first token within 300 ms. The share has Wilson's interval, whatever the distribution of
the latency. PASS if the whole interval is on the good side of the limit, FAIL if the whole of it is
on the other, else INCONCLUSIVE: then the gate says how many more requests would decide, if they
fall as those so far did.

What the interval presumes: requests that miss independently of each other. Those that wait in one
queue miss together, so that an interval with misses in it is narrower than it should be; one
without a miss, or with as many as a lone bad moment gives, is not concerned. Each gate is judged at
95 % by itself. A promotion needs all of them, so that a true miss is promoted no more often than a
single gate would let it (an intersection-union test); a FAIL by chance is as likely as with the sum
of the gates, 2.5 % for each that lies on its limit.

The open run is judged, timed from the scheduled arrival of each request. The closed runs of the
ladder throttle themselves when the server is slow and would hide it. Its rate is a part of the
result: one that nobody declared is a share of what this very server can do, and a slow server has
an easy one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from pipelines import stats, wording
from pipelines.limits import memory_limit_mib
from pipelines.load_records import LoadGate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.load_records import LoadRun, Outcome
    from pipelines.params import Host, Slo

Level = Literal["ttft", "tpot", "e2e"]
# Why there are no gates although there was an open run.
NOTHING_ARRIVED: Final = (
    "no random arrival fell into the time of the run, so that no level was judged "
    "(load_test.max_run_seconds, load_test.rate_per_s)"
)
_Share = Literal["ttft", "tpot", "e2e", "goodput"]
_LEVELS: Final[tuple[Level, ...]] = ("ttft", "tpot", "e2e")
_WORDS: Final = {
    "ttft": "the first token within",
    "tpot": "each further token within",
    "e2e": "the whole answer within",
}


def judged_run(runs: Sequence[LoadRun]) -> LoadRun | None:
    """Return the run with random arrivals; None if there was none, or none arrived in it."""
    return next((run for run in runs if run.kind == "open" and run.requests_count), None)


def judge(
    run: LoadRun, slo: Slo, host: str, spec: Host, *, peak_memory_mib: float | None
) -> tuple[LoadGate, ...]:
    """
    Judge one host by the open run.

    Args:
        run: The run with random arrivals, in which there were some (`judged_run`).
        slo: Levels of the host, resolved: `min_goodput` is stated.
        host: Its name.
        spec: Its memory and margin.
        peak_memory_mib: Most memory that the server and its programs had; None of a server that is
            not ours: its memory is not judged.
    """
    floor = slo.min_goodput
    assert floor is not None, "resolved by load_test_slice"
    kept = run.kept_count.get(host, {})
    gates = [
        _share(host, level, kept.get(level, 0), run, floor=floor, words=_limit_words(slo, level))
        for level in _LEVELS
        if getattr(slo, f"{level}_ms") is not None
    ]
    good = run.good_count.get(host, 0)
    gates.append(_share(host, "goodput", good, run, floor=floor, words=_goodput_words(slo, run)))
    if slo.max_error_rate is not None:
        gates.append(_errors(host, run, slo.max_error_rate))
    limit = memory_limit_mib(spec)
    if limit is not None and peak_memory_mib is not None:
        gates.append(_memory(host, limit, spec.margin_mib, peak_memory_mib))
    return tuple(gates)


def _goodput_words(slo: Slo, run: LoadRun) -> str:
    """Say what a good request did, and at which rate they came."""
    rate = f" at {wording.number(run.rate_per_s)}/s" if run.rate_per_s else ""
    if any(getattr(slo, f"{level}_ms") is not None for level in _LEVELS):
        return f"kept every level{rate}"
    return f"were answered{rate}; no latency is declared"


def _limit_words(slo: Slo, level: Level) -> str:
    return f"had {_WORDS[level]} {wording.declared(getattr(slo, f'{level}_ms'))} ms"


def _share(  # noqa: PLR0913 - each is one independent fact about the gate
    host: str, name: _Share, good: int, run: LoadRun, *, floor: float, words: str
) -> LoadGate:
    """Judge a share of requests that must be `floor` or more."""
    count = run.requests_count
    seen = stats.wilson(good, count)
    outcome: Outcome = (
        "PASS" if seen.low >= floor else "FAIL" if seen.high < floor else "INCONCLUSIVE"
    )
    more = stats.requests_to_decide(good, count, floor) if outcome == "INCONCLUSIVE" else None
    return LoadGate(
        host=host,
        name=name,
        value=good / count,
        low=seen.low,
        high=seen.high,
        limit=floor,
        outcome=outcome,
        more_requests=more,
        sentence=f"{good:,} of {count:,} requests {words}: {_range(seen.low, seen.high)}, "
        f"{_percent(floor)} needed{_open_end(outcome, more)}",
    )


def _errors(host: str, run: LoadRun, limit: float) -> LoadGate:
    """Judge the share of failed requests, which must be `limit` or less."""
    failed, count = run.requests_count - run.ok_count, run.requests_count
    seen = stats.wilson(failed, count)
    outcome: Outcome = (
        "PASS" if seen.high <= limit else "FAIL" if seen.low > limit else "INCONCLUSIVE"
    )
    more = stats.requests_to_decide(failed, count, limit) if outcome == "INCONCLUSIVE" else None
    return LoadGate(
        host=host,
        name="error_rate",
        value=failed / count,
        low=seen.low,
        high=seen.high,
        limit=limit,
        outcome=outcome,
        more_requests=more,
        sentence=f"{failed:,} of {count:,} requests failed: {_range(seen.low, seen.high)}, "
        f"{_percent(limit)} allowed{_open_end(outcome, more)}",
    )


def _memory(host: str, limit_mib: int, margin_mib: int, peak_mib: float) -> LoadGate:
    fits = peak_mib + margin_mib <= limit_mib
    margin = f", of which {wording.mib(margin_mib)} stay free" if margin_mib else ""
    return LoadGate(
        host=host,
        name="memory",
        value=peak_mib,
        low=peak_mib,
        high=peak_mib,
        limit=limit_mib,
        outcome="PASS" if fits else "FAIL",
        more_requests=None,
        sentence=f"the server took {wording.mib(peak_mib)}, {'within' if fits else 'over'} the "
        f"{wording.mib(limit_mib)} of host {host}{margin}",
    )


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %"


def _range(low: float, high: float) -> str:
    return f"{low * 100:.1f} to {high * 100:.1f} %"


def _open_end(outcome: str, more: int | None) -> str:
    if outcome != "INCONCLUSIVE":
        return ""
    if more is None:
        return "; it lies on the limit, and no number of requests would decide"
    if more >= stats.MOST_REQUESTS:
        return f"; it lies so close to the limit that {more:,} more requests would not decide"
    return (
        f"; about {more:,} more requests would decide (load_test.open_requests, and time for them "
        "in load_test.max_run_seconds)"
    )
