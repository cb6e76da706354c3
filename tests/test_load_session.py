"""The runs of a load test against one server: what is asked of it first, and what is kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import record_factory as make
import sample
from scripted_server import Script, Scripted, serve

from pipelines import degenerate, load_session
from pipelines.load_session import NotAnsweredError, Session
from pipelines.params import LoadTest, Slo

if TYPE_CHECKING:
    from pipelines.load_records import LoadRun

ROOT = Path(__file__).resolve().parent.parent
CORPUS = sample.of("corpora/evaluation.txt").read_text(encoding="utf-8")


def opened(server: Scripted, log: Path, **changes: Any) -> Session:
    """Make ready to drive the scripted server, with few short requests."""
    few: dict[str, Any] = {
        "requests": 10, "open_requests": 10, "warm_up_requests": 1, "degenerate_prompts": 8,
        "prompt_tokens": 16, "generate_tokens": 8, "timeout_seconds": 5,
    }  # fmt: skip
    return load_session.opened(
        url=server.url,
        api="ollama",
        name="served",
        declared=LoadTest(**(few | changes)),
        slos={"local": Slo(ttft_ms=1000.0, min_goodput=0.9)},
        corpus=CORPUS,
        context_tokens=None,
        log=log,
    )


@pytest.fixture(name="log")
def _log(tmp_path: Path) -> Path:
    return tmp_path / "load.log"


def test_a_first_token_that_shows_nothing_is_no_server_that_does_not_answer(log: Path) -> None:
    """Half a character, the start of a thought, the end at once: the prompt was counted."""
    with serve(Script(fault="empty")) as server:
        session = opened(server, log)

    assert session.chars_per_token > 0


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (Script(fault="status"), "http_5xx"),
        (Script(fault="stall"), "timeout"),
        (Script(counts=False), "does not say how many tokens it read"),
    ],
)
def test_a_server_that_answers_nothing_or_counts_nothing_is_said_at_once(
    log: Path, script: Script, said: str
) -> None:
    """Before a ladder of failures is climbed."""
    with serve(script) as server, pytest.raises(NotAnsweredError) as caught:
        opened(server, log, timeout_seconds=1)

    assert said in caught.value.message


def test_greedy_answers_that_a_slow_machine_does_not_come_to_are_no_crash(log: Path) -> None:
    """The f16 of a large model may answer a few of them in the time that the quant answers all."""
    with serve(Script(first_s=0.4)) as server:
        slow = opened(server, log, max_run_seconds=1).greedy_answers("F16")
    with serve(Script()) as server:
        quick = opened(server, log).greedy_answers("Q4_K_M")

    assert len(slow) == len(quick) == 8
    assert {each.error for each in slow} == {None, "timeout"}
    assert degenerate.compare(quick, slow, 0.1).outcome == "INCONCLUSIVE"


def test_without_a_declared_rate_arrivals_come_at_70_percent_of_what_the_ladder_reached(
    log: Path,
) -> None:
    """What is declared is taken as it is."""
    ladder = [make.load_run(1, requests_s=3.0), make.load_run(2, requests_s=5.0)]
    with serve() as server:
        session, declared = opened(server, log), opened(server, log, rate_per_s=0.25)

    assert session.rate_per_s(ladder) == 3.5
    assert declared.rate_per_s(ladder) == 0.25


@pytest.mark.parametrize("rate_per_s", [None, 50.0])
def test_a_rate_that_nobody_declared_is_told_as_such(log: Path, rate_per_s: float | None) -> None:
    """A slow server is asked less, so that a level it keeps is worth less."""
    runs: list[LoadRun] = []
    with serve() as server:
        opened(server, log, concurrency=(1,), rate_per_s=rate_per_s).drive(runs, lambda: None)

    told = [note for note in runs[-1].notes if "load_test.rate_per_s" in note]
    assert len(told) == (rate_per_s is None)


def test_the_client_is_calibrated_at_the_pace_of_streams_not_at_that_of_the_whole_run(
    log: Path,
) -> None:
    """While prompts are read nothing streams, and requests that wait for a slot are no streams."""
    run = make.load_run(4, effective_slots=2, output_tok_s=100.0, tpot_ms=make.spread(5.0))
    with serve() as server:
        found = opened(server, log).calibrate([make.load_run(1, output_tok_s=1.0), run])

    assert found is not None
    assert (found.streams_count, found.chunks_per_s) == (2, 200.0)


def test_no_prompt_is_sent_twice_in_a_whole_test(log: Path) -> None:
    """A server that has read a prompt has it in its cache."""
    with serve(Script(tokens=2)) as server:
        session = opened(server, log, concurrency=(1, 2), soak_seconds=1, rate_per_s=20.0)
        server.seen.clear()
        session.drive([], lambda: None)
        starts = [each.body["messages"][-1]["content"][:12] for each in server.seen]

    assert len(starts) > 40
    assert len(set(starts)) == len(starts)
