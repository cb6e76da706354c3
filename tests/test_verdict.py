"""The final verdict: nothing is promoted that was not served, and every doubt counts against it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_factory import (
    benchmark_record,
    choose_slice,
    engine_id,
    golden,
    load_gate,
    load_gates,
    load_test_record,
    load_verdict,
    machine_id,
    quantize_record,
    served,
    sha256,
    smoke,
    winner_test,
)

from pipelines import verdict
from pipelines.choose import choose
from pipelines.load_records import GoldenPrompt, LoadTestRecord

if TYPE_CHECKING:
    from pipelines.load_records import Smoke
    from pipelines.records import ChoiceRecord

SPEEDS = {"Q8_0": 400.0, "Q4_K_M": 600.0}


def choice(**kwargs: Any) -> ChoiceRecord:
    """Choose among two quants; Q4_K_M wins unless gates say otherwise."""
    slice_ = choose_slice(SPEEDS, **kwargs)
    return choose(
        slice_,
        {key: quantize_record(type_) for key, type_ in slice_.quants.items()},
        {key: benchmark_record(t, decode_tok_s=SPEEDS[t]) for key, t in slice_.quants.items()},
    )


def judged(tested: LoadTestRecord | str, **kwargs: Any) -> tuple[str, str]:
    """Return the final verdict of the only host, and its sentence."""
    (one,) = verdict.final(choice(**kwargs), tested)
    return one.verdict, one.sentence


# --- agreement --------------------------------------------------------------------------------


def test_what_was_chosen_and_kept_its_levels_is_promoted() -> None:
    """The sentence is that of the choice, and goes on with what served it."""
    found, sentence = judged(load_test_record())

    assert found == "PROMOTE"
    assert sentence.startswith("promote Q4_K_M: the fastest of the 2 quants that pass (600 tok/s")
    assert sentence.endswith(
        "; on Ollama 0.33.0, 100 of 100 requests kept every level: 96.3 to 100.0 %, 95 % needed"
    )


@pytest.mark.parametrize("worse", ["HOLD", "REJECT", "INVALID"])
def test_a_load_test_that_is_worse_decides(worse: str) -> None:
    """The verdict of the test stands first, and why the quant was chosen is kept beside it."""
    said = load_verdict(verdict=worse, sentence=f"{worse.lower()}: 90 of 100 requests were good.")

    (one,) = verdict.final(choice(), load_test_record(verdicts=(said,)))

    assert one.verdict == worse
    assert one.sentence == (f"{worse.lower()}: Q4_K_M is chosen, but 90 of 100 requests were good")
    assert one.details[0].startswith("Q4_K_M: the fastest of the 2 quants that pass")


def test_a_choice_on_hold_is_not_lifted_by_a_good_load_test() -> None:
    """The worse of the two counts, in both directions."""
    held = choice()
    host = held.hosts[0].model_copy(update={"verdict": "HOLD", "sentence": "hold: Q4_K_M leads"})

    (one,) = verdict.final(held.model_copy(update={"hosts": (host,)}), load_test_record())

    assert one.verdict == "HOLD"
    assert one.sentence.startswith("hold: Q4_K_M leads; ")


@pytest.mark.parametrize("tested", ["load-test.json does not exist", load_test_record()])
def test_where_nothing_is_chosen_the_load_test_has_nothing_to_say(
    tested: LoadTestRecord | str,
) -> None:
    """A rejected model keeps its own sentence, whatever a load test says or fails to say."""
    rejected = choice(gates={"max_kld_mean_nats": 1e-6})

    (one,) = verdict.final(rejected, tested)

    assert (one.verdict, one.sentence) == ("REJECT", rejected.hosts[0].sentence)
    assert one.details == ()


def test_hosts_are_judged_apart() -> None:
    """One host misses a level, the other keeps its own promotion."""
    hosts = {"big": {"vram_mib": 24576}, "small": {"vram_mib": 24576}}
    chosen = choice(hosts=hosts)
    winners = dict.fromkeys(hosts, "Q4_K_M")
    gates = (*load_gates(["big"]), *load_gates(["small"], outcome="FAIL", sentence="too slow"))
    tested = load_test_record(winners, winners=(winner_test(hosts=hosts, gates=gates),))

    big, small = verdict.final(chosen, tested)

    assert (big.verdict, small.verdict) == ("PROMOTE", "REJECT")
    assert small.sentence == "reject: Q4_K_M is chosen, but too slow"


# --- a test that does not speak of the choice -------------------------------------------------

OTHER_FILE = winner_test(served=served(gguf_sha256=sha256("another file")))
SMALLER = winner_test(served=served(context_tokens=256))


@pytest.mark.parametrize(
    ("tested", "words"),
    [
        ("load-test.json does not exist", "not served under load (load-test.json does not exist)"),
        (load_test_record(winners=(OTHER_FILE,)), "served another file (sha256"),
        (load_test_record({"local": "Q8_0"}), "older than the choice: it served Q8_0, not Q4_K_M"),
        (load_test_record(context_tokens=256), "it served 256 tokens of context, not 512"),
        (load_test_record(winners=(SMALLER,)), "served with 256 tokens of context, not 512"),
        (load_test_record(verdicts=()), "it says nothing of host local"),
        (load_test_record(winners=()), "holds no test of Q4_K_M"),
        (load_test_record({"elsewhere": "Q4_K_M"}), "it says nothing of host local"),
        (load_test_record(model="other"), "of another model (other)"),
        (load_test_record(machine=machine_id(hw_id=sha256("other"))), "ran on other hardware"),
        (load_test_record(winners=(winner_test(served=None),)), "no engine served it"),
        (load_test_record(engine=None), "no engine served it"),
        (load_test_record(engine=engine_id(kind="remote")), "what served it is not ours"),
    ],
)
def test_a_test_of_anything_else_is_invalid(tested: LoadTestRecord | str, words: str) -> None:
    """Whatever the record claims, it promotes only the file, context and host of the choice."""
    found, sentence = judged(tested)

    assert found == "INVALID"
    assert sentence.startswith("invalid: Q4_K_M is chosen, but ")
    assert words in sentence


# --- a test whose parts say more than its verdict ---------------------------------------------

DIFFERENT = GoldenPrompt(id="system", outcome="FAIL", sentence="differs", diff=("-a", "+b"))
SKIPPED = GoldenPrompt(id="system", outcome="SKIPPED", sentence="upstream has no chat template")


@pytest.mark.parametrize(
    ("changes", "found", "words"),
    [
        ({"invalid": ("The client was too slow.",)}, "INVALID", "the client was too slow"),
        ({"golden": golden(prompts=(DIFFERENT,))}, "REJECT", "1 conversation of 1 (system)"),
        ({"failures": ("it does not load",), "served": None}, "REJECT", "it does not load"),
        ({"golden": None}, "INVALID", "were not compared"),
        ({"golden": golden(prompts=(SKIPPED,))}, "REJECT", "no prompt could be compared"),
        ({"golden": golden(prompts=())}, "INVALID", "were not compared"),
        ({"gates": ()}, "INVALID", "no level of host local was judged"),
        ({"gates": (load_gate("memory"),)}, "INVALID", "no level of host local was judged"),
        ({"gates": load_gates()[1:]}, "INVALID", "nobody judged ttft of host local"),
        ({"gates": load_gates()[:-1]}, "INVALID", "nobody judged memory of host local"),
        ({"gates": load_gates(outcome="FAIL", sentence="90 of 100")}, "REJECT", "90 of 100"),
        (
            {"gates": load_gates(outcome="INCONCLUSIVE", sentence="about 50 more decide")},
            "HOLD",
            "about 50 more decide",
        ),
    ],
)
def test_no_verdict_is_better_than_its_parts(
    changes: dict[str, Any], found: str, words: str
) -> None:
    """A record that promotes beside a failed part is not believed."""
    got, sentence = judged(load_test_record(winners=(winner_test(**changes),)))

    assert got == found
    assert words in sentence


def test_a_test_in_doubt_says_what_to_do() -> None:
    """An INVALID test is no end: it says how it is repeated."""
    tested = load_test_record(winners=(winner_test(invalid=("the machine was busy",)),))

    (one,) = verdict.final(choice(), tested)

    assert one.sentence == "invalid: Q4_K_M is chosen, but the machine was busy"
    assert one.next_step == "`fleet repro tiny-llama` repeats a load test that is INVALID."


def test_an_engine_that_stood_in_is_on_hold() -> None:
    """Numbers of llama-server are real, but they are not of the Ollama that was asked for."""
    stand_in = engine_id(kind="llama-server", version="b6500", declared=False)

    found, sentence = judged(load_test_record(engine=stand_in))
    declared = engine_id(kind="llama-server", version="b6500", declared=True)

    assert found == "HOLD"
    assert "llama-server stood in for Ollama" in sentence
    assert judged(load_test_record(engine=declared))[0] == "PROMOTE"


@pytest.mark.parametrize(
    ("smokes", "found", "words"),
    [
        ((), "HOLD", "Q8_0 passed its gates and was not served"),
        ((smoke("Q8_0", served=served("Q8_0", gguf_sha256=sha256("old"))),), "HOLD",
         "Q8_0 was served, but from another file"),
        ((smoke("Q8_0", outcome="FAIL", sentence="it does not load"),), "HOLD",
         "Q8_0: it does not load"),
        ((smoke("Q8_0"),), "PROMOTE", "on Ollama 0.33.0"),
    ],
)  # fmt: skip
def test_a_release_of_which_a_quant_was_never_served_is_on_hold(
    smokes: tuple[Smoke, ...], found: str, words: str
) -> None:
    """It is published beside the winner, and nobody knows whether it loads."""
    got, sentence = judged(load_test_record(smokes=smokes))

    assert got == found
    assert words in sentence


_verdicts = st.sampled_from(verdict.VERDICTS)


@settings(max_examples=50, deadline=None)
@given(_verdicts, _verdicts)
def test_the_final_verdict_is_never_better_than_either(one: str, other: str) -> None:
    """For every pair of verdicts the final one is the worse of the two."""
    chosen = choice()
    host = chosen.hosts[0].model_copy(update={"verdict": one, "sentence": f"{one.lower()}: words"})
    tested = load_test_record(verdicts=(load_verdict(verdict=other),))

    (final,) = verdict.final(chosen.model_copy(update={"hosts": (host,)}), tested)

    assert final.verdict == max(one, other, key=("PROMOTE", "HOLD", "REJECT", "INVALID").index)


def test_strange_text_of_a_record_stays_one_harmless_line() -> None:
    """What a stranger wrote into a record does not become a line, a colour or a command."""
    said = load_verdict(verdict="REJECT", sentence="a\n::error::b\x1b[31m" + "x" * 5000)

    _, sentence = judged(load_test_record(verdicts=(said,)))

    assert not {"\n", "\x1b"}.intersection(sentence)
    assert "::error" not in sentence
    assert len(sentence) < 400
