"""Times and shares of a run, from answers whose times are known."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from test_load_dialects import prompt

from pipelines.load import measures, plan
from pipelines.load.dialects import Answer
from pipelines.load.generator import Raw
from pipelines.params import Slo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.load_records import LoadRun

MS = 1_000_000


def answer(index: int = 0, *, at: float = 0, **changes: Any) -> Answer:
    """Scheduled at `at` ms: first token 10 ms later, ten more to 60 ms, all over at 65 ms."""
    at_ns = round(at * MS)
    fields: dict[str, Any] = {
        "index": index,
        "scheduled_ns": at_ns,
        "sent_ns": at_ns,
        "first_ns": at_ns + 10 * MS,
        "last_ns": at_ns + 60 * MS,
        "end_ns": at_ns + 65 * MS,
        "status": 200,
        "done_reason": "stop",
        "prompt_tokens": 100,
        "output_tokens": 11,
        "chunks_count": 11,
    }
    return Answer(**(fields | changes))


def failed(index: int = 0, error: str = "timeout") -> Answer:
    """A request that came to nothing after 1 s."""
    nothing: dict[str, Any] = {
        "first_ns": None,
        "last_ns": None,
        "output_tokens": None,
        "done_reason": "",
    }
    return answer(index, error=error, detail="why", end_ns=1000 * MS, **nothing)


def raw(answers: Sequence[Answer], **changes: Any) -> Raw:
    """Everything that came of a run."""
    fields: dict[str, Any] = {
        "answers": tuple(answers),
        "warm_up": (),
        "gaps_us": {},
        "started_ns": 0,
        "cpu_s": 0.1,
        "after_cpu_s": 0.1,
        "unsent_count": 0,
        "threads_count": 1,
        "late_threads_count": 0,
    }
    return Raw(**(fields | changes))


CLOSED = plan.closed(
    "closed 2",
    concurrency=2,
    prompts=[prompt("x")] * 4,
    warm_up_requests=0,
    max_run_s=60,
    seed=1,
)
OPEN = plan.open_loop(
    "open", rate_per_s=4.0, prompts=[prompt("x")] * 4, warm_up_requests=0, max_run_s=60, seed=1
)


def summary(answers: Sequence[Answer], planned: plan.Plan = CLOSED, **slo: float) -> LoadRun:
    """The record of these answers, with the levels of one host."""
    return measures.summarise(planned, raw(answers), {"local": Slo(**slo)})


def test_times_count_from_the_scheduled_start() -> None:
    """A request that the client could send only 5 ms late has waited those 5 ms, too."""
    run = summary([answer(sent_ns=5 * MS)], OPEN)

    assert run.ttft_ms is not None
    assert run.ttft_ms.p50 == 10.0
    assert run.e2e_ms is not None
    assert run.e2e_ms.p50 == 60.0
    assert run.send_lag_p99_ms == 5.0


def test_time_per_token_is_over_the_tokens_that_the_server_counted() -> None:
    """Ten further tokens in 50 ms are 5 ms each, in however few chunks they came."""
    run = summary([answer(chunks_count=2)])

    assert run.tpot_ms is not None
    assert run.tpot_ms.p50 == 5.0


def test_the_token_that_ends_an_answer_has_its_time_as_well() -> None:
    """It is counted and shows nothing: eleven tokens in 50 ms, the last at the word that it is."""
    run = summary([answer(last_ns=55 * MS, done_ns=60 * MS)])

    assert run.tpot_ms is not None
    assert run.tpot_ms.p50 == 5.0
    assert run.e2e_ms is not None
    assert run.e2e_ms.p50 == 55.0


def test_a_prompt_that_was_not_sent_in_time_keeps_its_place_as_a_failure() -> None:
    """Answers of two runs of one plan are compared by their place."""
    found = measures.texts(CLOSED, raw([answer(0), answer(2)]))

    assert [each.index for each in found] == [0, 1, 2, 3]
    assert [each.error for each in found] == [None, "timeout", None, "timeout"]
    assert found[3].detail == "not sent: the run had lasted 60 s"


def test_throughput_counts_tokens_of_successes_over_the_whole_run() -> None:
    """From the first start to the last end, the wait for a failure included."""
    run = summary([answer(0), answer(1, at=100), failed(2)])

    assert run.wall_s == 1.0
    assert run.output_tok_s == 22.0
    assert run.requests_s == 2.0
    assert (run.requests_count, run.ok_count, run.errors) == (3, 2, {"timeout": 1})
    assert run.notes == ("timeout, the first: why",)


@pytest.mark.parametrize(
    ("count", "p95", "p99"),
    [(1, None, None), (199, None, None), (200, 190, None), (999, 950, None), (1000, 950, 990)],
)
def test_no_percentile_that_the_sample_does_not_carry(
    count: int, p95: float | None, p99: float | None
) -> None:
    """p95 from 200 values, p99 from 1,000: then ten lie above it."""
    found = measures.spread([float(number) for number in range(count, 0, -1)])

    assert found is not None
    assert (found.count, found.p95, found.p99) == (count, p95, p99)
    assert (found.p50, found.max) == ((count + 1) / 2, count)


def test_a_run_without_a_success_has_no_times() -> None:
    """Not 0 ms: none."""
    run = summary([failed(0), failed(1, "connect")], ttft_ms=1.0)

    spreads = (run.ttft_ms, run.tpot_ms, run.gap_ms, run.e2e_ms, run.queue_ms)
    assert spreads == (None, None, None, None, None)
    assert (run.ok_count, run.output_tok_s, run.effective_slots) == (0, 0.0, 0)
    assert run.prompt_tokens_median is None
    assert (run.good_count, run.kept_count) == ({"local": 0}, {"local": {"ttft": 0}})


def test_a_request_is_good_if_it_keeps_every_level() -> None:
    """Each level counted by itself, the good ones by all; a failure keeps none."""
    answers = [
        answer(0),
        answer(1, first_ns=40 * MS),  # first token too late, the others then faster
        answer(2, last_ns=110 * MS, end_ns=110 * MS),  # 10 ms a token, and so too long in all
        failed(3),
    ]

    run = summary(answers, ttft_ms=20.0, tpot_ms=5.0, e2e_ms=100.0)

    assert run.kept_count == {"local": {"ttft": 2, "tpot": 2, "e2e": 2}}
    assert run.good_count == {"local": 1}


def test_a_level_that_is_kept_exactly_is_kept() -> None:
    """Within 10 ms means 10 ms as well."""
    assert summary([answer()], ttft_ms=10.0, tpot_ms=5.0, e2e_ms=60.0).good_count == {"local": 1}


def test_without_levels_every_success_is_good() -> None:
    """Errors are never good, whatever is declared."""
    run = summary([answer(0), failed(1)])

    assert (run.good_count, run.kept_count) == ({"local": 1}, {"local": {}})


def test_one_token_keeps_the_level_of_further_tokens() -> None:
    """There is none whose time could be too long; that there are such answers is said."""
    one = answer(last_ns=10 * MS, output_tokens=1)

    run = summary([one], tpot_ms=1.0)

    assert run.good_count == {"local": 1}
    assert run.tpot_ms is None
    assert run.notes == ("1 of 1 answers have one token, and so no time per token",)


def test_tokens_that_nobody_counted_keep_no_level_of_time_per_token() -> None:
    """A time that is unknown is not within a limit."""
    run = summary([answer(output_tokens=None)], tpot_ms=1000.0, ttft_ms=1000.0)

    assert run.kept_count == {"local": {"ttft": 1, "tpot": 0}}
    assert run.good_count == {"local": 0}
    assert run.output_tokens_median is None
    assert run.notes == ("the server gave no count of tokens for 1 of 1 answers",)


def test_pauses_are_counted_by_length() -> None:
    """Kept as counts of microseconds, so that a soak of a day has its percentiles."""
    found = measures.summarise(CLOSED, raw([answer()], gaps_us={1500: 900, 20: 99, 90_000: 1}), {})

    assert found.gap_ms is not None
    assert (found.gap_ms.count, found.gap_ms.p50) == (1000, 1.5)
    assert (found.gap_ms.p99, found.gap_ms.max) == (1.5, 90.0)


def test_reasons_of_the_end_and_queue_times_are_kept() -> None:
    """What the server says of itself."""
    run = summary([answer(0, queue_ms=3.0), answer(1, done_reason="length"), answer(2)])

    assert run.done_reasons == {"length": 1, "stop": 2}
    assert run.queue_ms is not None
    assert (run.queue_ms.count, run.queue_ms.p50) == (1, 3.0)


def test_what_a_server_says_is_shown_without_its_commands() -> None:
    """Neither a runner of Actions nor a terminal obeys it; made-up words do not fill the record."""
    talkative = [answer(each, done_reason=f"reason {each}") for each in range(50)]
    hostile = failed(99, "http_5xx")
    hostile = replace(hostile, detail="a\n::error::b \x1b[2J c")

    run = summary([*talkative, hostile])

    assert len(run.done_reasons) == 9
    assert run.done_reasons["others"] == 42
    assert "::error" not in run.notes[0]
    assert "\x1b" not in run.notes[0]
    assert "\n" not in run.notes[0]


def test_notes_say_what_a_reader_has_to_know() -> None:
    """Requests that were not sent, a warm-up that failed, connections that were closed."""
    found = measures.summarise(
        CLOSED,
        raw(
            [answer(resent=True)],
            unsent_count=3,
            warm_up=(failed(), answer()),
            late_threads_count=2,
            threads_count=9,
        ),
        {},
    )

    assert found.notes == (
        "3 of 4 requests were not sent: the run had lasted 60 s (load_test.max_run_seconds)",
        "1 of 2 requests of the warm-up failed: 1 timeout",
        "1 requests were sent again: the server had closed the kept connection",
        "2 arrivals waited for one of 9 threads of the client",
    )


# --- slots ------------------------------------------------------------------------------------


def stream(index: int, begin: float, end: float, **changes: Any) -> Answer:
    """An answer whose content came from `begin` to `end`, in ms."""
    times = {"first_ns": round(begin * MS), "last_ns": round(end * MS)}
    return answer(index, end_ns=round(end * MS), **(times | changes))


def test_slots_are_the_streams_that_overlap() -> None:
    """Three at a time, although eight requests waited."""
    waves = [stream(3 * wave + slot, 100 * wave, 100 * wave + 90 + slot) for wave in range(4)
             for slot in range(3)]  # fmt: skip

    assert measures.effective_slots(waves) == 3


def test_one_slot_is_one_even_if_a_thread_stamps_late() -> None:
    """The end of a stream stamped 8 ms after the beginning of the next one is no second slot."""
    turns = [stream(turn, 100 * turn, 100 * turn + 108) for turn in range(20)]

    assert measures.effective_slots(turns) == 1


def test_a_rare_overlap_is_no_slot() -> None:
    """Two streams that overlap for a hundredth of the time were stamped on a busy machine."""
    turns = [stream(turn, 100 * turn, 100 * turn + 99) for turn in range(40)]
    late = stream(99, 150, 152)

    assert measures.effective_slots([*turns, late]) == 1


def test_chunks_that_were_held_back_hide_no_slot() -> None:
    """All content came at once at the end; the server says for how long it generated."""
    held = [stream(each, 100, 100, sent_ns=0, eval_ms=90.0) for each in range(4)]

    assert measures.effective_slots(held) == 4
    assert measures.effective_slots([stream(0, 5, 5)]) == 1
