"""Whether others took the cores while a model was under load, and what is not held against them."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any, Self

import pytest
import record_factory as make

from pipelines import validity
from pipelines.gpu import Observation
from pipelines.load_conditions import MAX_WAITING_OF_A_MISS, Attended, disbelieved, judge
from pipelines.load_examine import Findings
from pipelines.records import Condition
from pipelines.validity import others_share
from pipelines.watch import Usage


def share(waited_s: float, *, beside_s: float = 3.0, busy_s: float = 0.0) -> float:
    """Return the share of a run of ten seconds, with two threads that computed for 13 s in all."""
    usage = Usage(peak_rss_bytes=0, on_core_s=13.0, waited_s=waited_s)
    return others_share(usage, beside_s=beside_s, busy_s=busy_s, wall_s=10.0, threads=2)


def test_cores_that_the_client_and_ollama_used_are_not_held_against_anybody() -> None:
    """One machine serves and asks: that is the test itself, and a note says how much it was."""
    assert share(3.0) == 0
    assert share(2.0) == 0


def test_nobody_can_have_taken_more_than_the_rest_of_the_machine_used() -> None:
    """Threads of the server wait for each other, too: a quiet machine is quiet."""
    assert share(7.0, busy_s=16.0) == 0
    assert share(7.0, busy_s=16.5) == pytest.approx(validity_share(0.5))


def test_what_others_took_voids_the_numbers() -> None:
    """Two busy programs on two cores."""
    assert share(14.0, busy_s=36.0) > validity.MAX_WAITING_SHARE
    assert share(14.0) > validity.MAX_WAITING_SHARE


def waited(value: float | None) -> Any:
    """Return a certificate by which others kept the server from a core for that share."""
    outcome = "unknown" if value is None else "note"
    rule = Condition(rule="waiting_share", outcome=outcome, value=value, limit=0.5)
    return make.validity(conditions=(rule,))


def test_a_missed_level_is_no_miss_of_the_model_while_others_have_the_cores() -> None:
    """Known worse is not the same as disturbed: the sentence says who, how much, what to do."""
    missed = make.load_gates(outcome="FAIL")

    (told,) = disbelieved(missed, waited(0.23))

    assert "others kept the server from a core in 23 %" in told
    assert "believed up to 10 %" in told
    assert "run it again" in told


def test_a_missed_level_is_believed_where_the_server_had_its_cores() -> None:
    """Up to the limit, and where nobody could tell, the miss is the model's."""
    missed = make.load_gates(outcome="FAIL")

    for seen in (waited(MAX_WAITING_OF_A_MISS), waited(None), make.validity(), None):
        assert disbelieved(missed, seen) == ()


def test_a_kept_level_and_the_memory_are_what_they_are() -> None:
    """Whoever kept the levels beside others kept them; memory does not wait for a core."""
    kept = make.load_gates()
    too_large = (make.load_gate("memory", outcome="FAIL"),)

    assert disbelieved(kept, waited(0.4)) == ()
    assert disbelieved(too_large, waited(0.4)) == ()


class FakeCards:
    """Cards that a driver shows, on which somebody else computes."""

    sees_cards = True
    attributed = True

    def __init__(self, ours: Any, *, every_s: float | None) -> None:
        """See nothing yet."""

    def __enter__(self) -> Self:
        """Look."""
        return self

    def __exit__(self, *_: object) -> None:
        """Look away."""

    def sample(self) -> None:
        """See nothing new."""

    def observation(self) -> Observation:
        """Say what was seen."""
        return Observation(
            peak_mib=9000.0, attributed=self.attributed, foreign=("blender",),
            slowdowns={"heat": 0.4}, clock_mhz=1200.0, temperature_c=93, samples_count=50,
        )  # fmt: skip


def test_what_others_do_on_the_card_is_seen_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on a card waits for its card: for other programs and for the fan."""
    monkeypatch.setattr("pipelines.gpu.Watch", FakeCards)
    with Attended() as attended:
        pass
    on_card = Findings(served=make.served(size_vram_bytes=9 << 20))
    on_cpu = Findings(served=make.served(size_vram_bytes=0))
    untold = Findings(served=make.served(size_vram_bytes=None, manifest_sha256=None))

    assert attended.cards is not None
    assert [each.served_on_gpu(attended) for each in (on_card, on_cpu, untold)] == [
        True, False, True,
    ]  # fmt: skip
    reasons = judge(attended, threads=2, on_gpu=True).reasons
    assert any("blender" in reason for reason in reasons)
    assert any("slowed down (heat)" in reason for reason in reasons)
    beside_the_card = judge(attended, threads=2, on_gpu=False)
    assert not any("card" in reason for reason in beside_the_card.reasons)


def test_our_own_server_in_a_container_is_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver knows it under another number, as it knows everybody there."""
    monkeypatch.setattr(FakeCards, "attributed", False)
    monkeypatch.setattr("pipelines.gpu.Watch", FakeCards)
    with Attended() as attended:
        pass

    found = judge(attended, threads=2, on_gpu=True)

    assert not any("blender" in reason for reason in found.reasons)
    assert any("does not show which process" in note for note in found.notes)


def validity_share(waited_s: float) -> float:
    """Return the share of a run in which two threads waited for so long in all."""
    usage = Usage(peak_rss_bytes=0, on_core_s=0.0, waited_s=waited_s)
    return validity.waiting_share(usage, wall_s=10.0, threads=2)


def test_the_cpu_time_of_programs_that_we_ran_is_counted_as_ours() -> None:
    """The generator is a process of its own that has ended when we look."""
    with Attended() as attended:
        code = "import time; t = time.process_time()\nwhile time.process_time() < t + 0.3: pass"
        subprocess.run([sys.executable, "-c", code], check=True)
        time.sleep(0.05)

    assert attended.beside_s >= 0.3
    assert attended.wall_s >= 0.3
    (client,) = [
        each for each in judge(attended, threads=2, on_gpu=False).conditions
        if each.rule == "client_cores"
    ]  # fmt: skip
    assert client.value == attended.beside_s / attended.wall_s
    assert client.outcome == "note"
