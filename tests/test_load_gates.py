"""What a declared service level accepts, refuses and leaves open."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import record_factory

from pipelines import load_gates, stats
from pipelines.params import Host, Slo

if TYPE_CHECKING:
    from pipelines.load_records import LoadGate, LoadRun

HOST = Host(memory_mib=4096)


def open_run(count: int, good: int, *, ok: int | None = None) -> LoadRun:
    """Return an open run in which `good` of `count` requests kept the level on the first token."""
    run = record_factory.load_run(None)
    return run.model_copy(
        update={
            "requests_count": count,
            "ok_count": count if ok is None else ok,
            "good_count": {"local": good},
            "kept_count": {"local": {"ttft": good}},
        }
    )


def judged(run: LoadRun, slo: Slo, *, memory_mib: float | None = 100.0) -> dict[str, LoadGate]:
    """Judge a run and return its gates by name."""
    gates = load_gates.judge(run, slo, "local", HOST, peak_memory_mib=memory_mib)
    return {gate.name: gate for gate in gates}


@pytest.mark.parametrize(
    ("good", "count", "outcome"),
    [(73, 73, "PASS"), (72, 72, "INCONCLUSIVE"), (197, 200, "PASS"), (196, 200, "INCONCLUSIVE"),
     (170, 200, "FAIL"), (0, 10, "FAIL")],
)  # fmt: skip
def test_a_share_passes_only_if_its_whole_interval_is_above_the_limit(
    good: int, count: int, outcome: str
) -> None:
    """95 % is shown by 73 requests without a miss, and refuted only by enough of them."""
    gate = judged(open_run(count, good), Slo(ttft_ms=300, min_goodput=0.95))["ttft"]

    assert gate.outcome == outcome
    assert gate.low <= gate.value <= gate.high


def test_an_open_question_says_how_many_more_requests_would_decide() -> None:
    """The number is right: with as many more that fall alike, the gate is decided."""
    slo = Slo(ttft_ms=300, min_goodput=0.95)
    gate = judged(open_run(60, 60), slo)["ttft"]

    assert gate.more_requests is not None
    assert f"about {gate.more_requests} more requests would decide" in gate.sentence
    enough = 60 + gate.more_requests
    assert judged(open_run(enough, enough), slo)["ttft"].outcome == "PASS"
    assert judged(open_run(enough - 1, enough - 1), slo)["ttft"].outcome == "INCONCLUSIVE"


def test_a_share_on_the_limit_is_never_decided_and_says_so() -> None:
    """No number of requests separates a share from a limit that equals it."""
    gate = judged(open_run(20, 19), Slo(ttft_ms=300, min_goodput=0.95))["ttft"]

    assert gate.outcome == "INCONCLUSIVE"
    assert gate.more_requests is None
    assert "no number of requests would decide" in gate.sentence


def test_a_share_too_close_to_the_limit_is_not_told_to_measure_for_ever() -> None:
    """A million requests is where a number stops being an advice."""
    run = open_run(200_000, 190_001)
    gate = judged(run, Slo(ttft_ms=300, min_goodput=0.95))["ttft"]

    assert gate.outcome == "INCONCLUSIVE"
    assert "1,000,000 more requests would not decide" in gate.sentence


def test_only_declared_levels_are_judged_and_goodput_always_is() -> None:
    """A level that nobody stated limits nothing; failed requests still count as not good."""
    gates = judged(open_run(200, 150), Slo(min_goodput=0.95))

    assert set(gates) == {"goodput", "memory"}
    assert gates["goodput"].outcome == "FAIL"
    assert gates["goodput"].sentence == (
        "150 of 200 requests were answered at 5.50/s; no latency is declared: "
        f"{stats.wilson(150, 200).low * 100:.1f} to {stats.wilson(150, 200).high * 100:.1f} %, "
        "95 % needed"
    )


def test_goodput_is_told_with_the_rate_at_which_it_was_kept() -> None:
    """A rate that nobody declared is a share of what this server can do: a slow one has it easy."""
    gate = judged(open_run(200, 200), Slo(ttft_ms=300, min_goodput=0.95))["goodput"]

    assert gate.sentence.startswith("200 of 200 requests kept every level at 5.50/s: ")


def test_a_run_in_which_nothing_arrived_is_not_judged() -> None:
    """Neither kept nor missed; the whole test is in doubt then."""
    assert load_gates.judged_run([record_factory.load_run(1), open_run(0, 0)]) is None
    assert load_gates.judged_run([open_run(1, 1), record_factory.load_run(1)]) == open_run(1, 1)


def test_errors_have_a_level_of_their_own() -> None:
    """Two failures of a thousand keep 1 %, thirty do not, and two of a hundred leave it open."""
    slo = Slo(min_goodput=0.5, max_error_rate=0.01)

    outcomes = {
        (count, failed): judged(open_run(count, 0, ok=count - failed), slo)["error_rate"].outcome
        for count, failed in ((1000, 2), (1000, 30), (100, 2))
    }

    assert outcomes == {(1000, 2): "PASS", (1000, 30): "FAIL", (100, 2): "INCONCLUSIVE"}


@pytest.mark.parametrize(("memory_mib", "outcome"), [(3072.0, "PASS"), (3073.0, "FAIL")])
def test_the_memory_of_the_server_must_leave_the_margin_of_the_host(
    memory_mib: float, outcome: str
) -> None:
    """4,096 MiB less the 1,024 that stay free."""
    gate = judged(open_run(200, 200), Slo(min_goodput=0.95), memory_mib=memory_mib)["memory"]

    assert gate.outcome == outcome
    assert "1,024 MiB stay free" in gate.sentence


def test_the_memory_of_a_foreign_server_is_not_judged() -> None:
    """Nobody here can see it."""
    assert "memory" not in judged(open_run(200, 200), Slo(min_goodput=0.95), memory_mib=None)
