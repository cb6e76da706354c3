"""The choice: who may win, who wins, and what is said about everybody else."""

from __future__ import annotations

import json
import math
import os
import subprocess
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from record_factory import (
    MODEL,
    benchmark_record,
    choose_slice,
    embedding_quality,
    encoder_record,
    machine_id,
    memory,
    quality,
    quantize_record,
    sha256,
    speed,
    validity,
    write_model,
)

from pipelines import choose as choose_stage
from pipelines import records
from pipelines.choose import choose
from pipelines.layout import Layout
from pipelines.params import Gates

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.params import ChooseSlice, Objective
    from pipelines.records import (
        BenchmarkRecord,
        Candidate,
        ChoiceRecord,
        HostChoice,
        QuantizeRecord,
    )

Numbers = dict[str, dict[str, float]]

# The order that real models show: less bits, more speed, more divergence.
FLEET: Numbers = {
    "Q8_0": {"decode_tok_s": 412, "kld_mean_nats": 0.0014, "memory_mib": 60, "size_mib": 5},
    "Q5_K_M": {"decode_tok_s": 520, "kld_mean_nats": 0.0108, "memory_mib": 50, "size_mib": 4},
    "Q4_K_M": {"decode_tok_s": 598, "kld_mean_nats": 0.0313, "memory_mib": 42, "size_mib": 3},
    "Q2_K": {"decode_tok_s": 700, "kld_mean_nats": 0.31, "memory_mib": 30, "size_mib": 2},
}


def measured_record(type_: str, values: dict[str, float]) -> BenchmarkRecord:
    """Build the benchmark record of a quant given by its numbers."""
    fields: dict[str, Any] = dict(values)
    return benchmark_record(type_, **fields)


def elect(
    numbers: Numbers,
    slice_: ChooseSlice | None = None,
    incumbent: str | None = None,
    replaced: dict[str, BenchmarkRecord | str] | None = None,
) -> ChoiceRecord:
    """Choose among quants given by their numbers; `replaced` swaps single benchmark records."""
    slice_ = slice_ or choose_slice(numbers)
    quantized: dict[str, QuantizeRecord | str] = {}
    measured: dict[str, BenchmarkRecord | str] = {}
    for type_, values in numbers.items():
        key = f"{MODEL}-{type_}"
        quantized[key] = quantize_record(type_, size_mib=values.get("size_mib", 3.0))
        measured[key] = (replaced or {}).get(type_, measured_record(type_, values))
    incumbents = dict.fromkeys(slice_.hosts, incumbent) if incumbent else {}
    return choose(slice_, quantized, measured, {k: v for k, v in incumbents.items() if v})


def only_host(choice: ChoiceRecord) -> HostChoice:
    """Return the choice for the one host that is declared."""
    (host,) = choice.hosts
    return host


def candidate(choice: ChoiceRecord, type_: str) -> Candidate:
    """Return what is said about one quant."""
    return next(one for one in only_host(choice).candidates if one.type == type_)


# --- the rule, by examples --------------------------------------------------------------------


def test_the_fastest_quant_within_the_gates_wins() -> None:
    """With objective speed the fastest quant whose divergence is allowed is promoted."""
    host = only_host(elect(FLEET))

    assert (host.winner, host.runner_up, host.verdict) == ("Q4_K_M", "Q5_K_M", "PROMOTE")
    assert host.sentence == (
        "promote Q4_K_M: the fastest of the 3 quants that pass "
        "(598 tok/s at depth 256, 0.0313 nats, 42.0 MiB)"
    )


@pytest.mark.parametrize(("objective", "winner"), [("quality", "Q8_0"), ("size", "Q4_K_M")])
def test_the_objective_decides_among_those_that_pass(objective: Objective, winner: str) -> None:
    """Quality takes the least divergent quant, size the smallest one, of those that pass."""
    choice = elect(FLEET, choose_slice(FLEET, objective=objective))

    assert only_host(choice).winner == winner


def test_a_missed_gate_names_value_limit_and_gate() -> None:
    """A quant over a limit is rejected in one sentence that a reader can check."""
    rejected = candidate(elect(FLEET), "Q2_K")

    assert rejected.verdict == "REJECT"
    assert rejected.sentence == (
        "Q2_K: mean divergence 0.310 nats is over the limit 0.06 (max_kld_mean_nats)."
    )


def test_a_value_a_hair_over_the_limit_does_not_look_equal_to_it() -> None:
    """The sentence shows as many digits as it takes to see that the limit is exceeded."""
    choice = elect({"Q4_K_M": {"kld_mean_nats": 0.060004}})

    assert "0.060004 nats is over the limit 0.06 " in candidate(choice, "Q4_K_M").sentence


def test_a_slower_quant_is_told_by_how_much() -> None:
    """A quant that passes and loses learns the difference, both values and the depth."""
    loser = candidate(elect(FLEET), "Q8_0")

    assert loser.verdict == "PASS"
    assert loser.sentence == (
        "Q8_0: passes; 31 % slower than Q4_K_M (412 against 598 tok/s at depth 256)."
    )


def test_memory_counts_for_each_host_by_itself() -> None:
    """A host takes what fits with its margin; the other one is told the missing MiB."""
    hosts = {"large": {"vram_mib": 1000, "margin_mib": 100}, "small": {"vram_mib": 140}}
    slice_ = choose_slice(FLEET, objective="quality", hosts=hosts | {
        "small": {"vram_mib": 1150, "margin_mib": 1095}})  # fmt: skip

    large, small = elect(FLEET, slice_).hosts

    assert (large.winner, small.winner) == ("Q8_0", "Q5_K_M")
    assert small.candidates[0].sentence == (
        "Q8_0: 5 MiB over the 1,150 MiB of host small at 512 tokens, of which 1,095 MiB stay free."
    )
    assert "Q8_0 is out: 5 MiB over" in small.binding


def test_the_worse_of_predicted_and_measured_memory_counts() -> None:
    """A prediction above the measurement keeps a quant out just as well."""
    record = benchmark_record(memory=memory(measured_mib=100.0, estimate_mib=3000.0))

    host = only_host(elect({"Q4_K_M": {}}, replaced={"Q4_K_M": record}))

    assert host.verdict == "REJECT"


def test_the_binding_limit_is_named() -> None:
    """The report can say which limit kept a better quant out, and how much better it is."""
    assert only_host(elect(FLEET)).binding == (
        "Q4_K_M is 15 % slower than Q2_K (598 against 700 tok/s at depth 256), but Q2_K is out: "
        "mean divergence 0.310 nats is over the limit 0.06 (max_kld_mean_nats)."
    )


def test_when_nothing_passes_the_nearest_miss_is_named() -> None:
    """No winner, verdict REJECT, and the quant that came closest."""
    slice_ = choose_slice(FLEET, gates={"max_kld_mean_nats": 0.001})

    host = only_host(elect(FLEET, slice_))

    assert (host.winner, host.verdict) == (None, "REJECT")
    assert host.binding.startswith("Q8_0 comes closest: mean divergence 0.00140 nats")


def test_equally_fast_quants_are_decided_by_divergence() -> None:
    """Within the minimum effect of the fastest, the less divergent quant wins and it is said."""
    numbers: Numbers = {
        "Q4_K_S": {"decode_tok_s": 600, "kld_mean_nats": 0.040},
        "Q4_K_M": {"decode_tok_s": 590, "kld_mean_nats": 0.030},
    }
    choice = elect(numbers)

    assert only_host(choice).winner == "Q4_K_M"
    assert candidate(choice, "Q4_K_S").sentence.startswith(
        "Q4_K_S: passes; as fast as Q4_K_M (within 3 %), and 33 % more divergent than Q4_K_M"
    )
    assert "least divergent of the 2 fastest quants, which are within 3 % of each other" in (
        only_host(choice).sentence
    )


def test_overlapping_intervals_are_no_difference() -> None:
    """A median 10 % higher wins nothing while the intervals overlap."""
    numbers: Numbers = {
        "Q4_K_S": {"decode_tok_s": 660, "kld_mean_nats": 0.040, "noise": 0.08},
        "Q4_K_M": {"decode_tok_s": 600, "kld_mean_nats": 0.030, "noise": 0.08},
    }

    choice = elect(numbers)

    assert only_host(choice).winner == "Q4_K_M"
    assert "the 2 fastest quants, whose intervals overlap (" in only_host(choice).sentence
    assert "as fast as Q4_K_M (their intervals overlap), and" in (
        candidate(choice, "Q4_K_S").sentence
    )


def test_a_large_difference_is_told_as_a_factor() -> None:
    """From twice as much on a reader gets `20 times as divergent`, not a percentage."""
    numbers: Numbers = {
        "Q8_0": {"decode_tok_s": 600, "kld_mean_nats": 0.001},
        "Q4_K_M": {"decode_tok_s": 600, "kld_mean_nats": 0.0204},
        "Q6_K": {"decode_tok_s": 600, "kld_mean_nats": 0.0018},
    }
    choice = elect(numbers)

    assert "20 times as divergent as Q8_0 (0.0204 against 0.00100 nats)" in (
        candidate(choice, "Q4_K_M").sentence
    )
    assert "80 % more divergent than Q8_0" in candidate(choice, "Q6_K").sentence


def test_words_of_service_are_for_what_serves() -> None:
    """A choice, committed or not, is no release: nothing says that it is in service."""
    tie: Numbers = {
        "Q4_K_S": {"decode_tok_s": 600, "kld_mean_nats": 0.040},
        "Q4_K_M": {"decode_tok_s": 590, "kld_mean_nats": 0.030},
    }

    for incumbent in (None, "Q4_K_S", "Q4_K_M"):
        assert "in service" not in elect(tie, incumbent=incumbent).model_dump_json()


def test_the_incumbent_stays_on_a_tie_and_goes_when_beaten() -> None:
    """What was chosen is not swapped for noise, and is for more than the minimum effect."""
    tie: Numbers = {
        "Q4_K_S": {"decode_tok_s": 600, "kld_mean_nats": 0.040},
        "Q4_K_M": {"decode_tok_s": 590, "kld_mean_nats": 0.030},
    }
    beaten: Numbers = tie | {"Q4_K_M": {"decode_tok_s": 700, "kld_mean_nats": 0.030}}

    kept = only_host(elect(tie, incumbent="Q4_K_S"))

    assert kept.winner == "Q4_K_S"
    assert "the committed choice, and no quant that passes is clearly faster" in kept.sentence
    assert "and Q4_K_S is the committed choice" in kept.candidates[1].sentence
    assert only_host(elect(beaten, incumbent="Q4_K_S")).winner == "Q4_K_M"


def test_a_dominated_quant_names_its_dominator() -> None:
    """A quant that is worse in memory, divergence and speed is off the frontier and told why."""
    numbers = FLEET | {
        "Q5_0": {"decode_tok_s": 480, "kld_mean_nats": 0.02, "memory_mib": 55, "size_mib": 4.2}
    }
    choice = elect(numbers)

    assert not candidate(choice, "Q5_0").on_frontier
    assert candidate(choice, "Q5_0").sentence.endswith(
        "Q5_K_M is as good or better in memory, divergence and speed."
    )
    assert all(candidate(choice, type_).on_frontier for type_ in FLEET)


def test_a_missing_quant_makes_the_comparison_incomplete() -> None:
    """A winner beside a quant without a measurement is on hold, and the gap is named."""
    host = only_host(elect(FLEET, replaced={"Q5_K_M": "Q5_K_M.json does not exist"}))

    assert (host.winner, host.verdict) == ("Q4_K_M", "HOLD")
    assert "Q5_K_M cannot be judged (not measured: Q5_K_M.json does not exist)" in host.sentence


def test_nothing_valid_means_invalid() -> None:
    """Without one trustworthy measurement there is neither a winner nor a rejection."""
    host = only_host(elect({"Q4_K_M": {}}, replaced={"Q4_K_M": "gone"}))

    assert (host.winner, host.verdict) == (None, "INVALID")


def test_a_tail_gate_needs_enough_tokens() -> None:
    """A 99.9th percentile of 25,600 tokens is no evidence, however good it looks; 102,400 are."""
    slice_ = choose_slice(["Q4_K_M"], gates={"max_kld_p999_nats": 2.0})
    enough = benchmark_record(quality=quality(chunks_count=400, scored_tokens=400 * 256))
    short = benchmark_record(quality=quality(chunks_count=400, scored_tokens=400 * 4))

    few = only_host(elect({"Q4_K_M": {}}, slice_))
    many = only_host(elect({"Q4_K_M": {}}, slice_, replaced={"Q4_K_M": enough}))

    assert (few.winner, few.verdict) == (None, "INVALID")
    assert "fewer than 100,000 tokens" in few.candidates[0].sentence
    windows = only_host(elect({"Q4_K_M": {}}, slice_, replaced={"Q4_K_M": short}))
    assert windows.winner is None
    assert many.winner == "Q4_K_M"


def test_every_declared_gate_is_judged() -> None:
    """A gate that the declaration knows and the choice does not would let everything pass."""
    limits = {
        "max_kld_mean_nats": 0.001, "max_kld_p999_nats": 0.1, "min_same_top": 0.99,
        "max_ppl_ratio": 1.001, "min_decode_tok_s": 9e9, "min_prefill_tok_s": 9e9,
        "max_size_mib": 0.1, "min_cosine_mean": 0.9999,
    }  # fmt: skip
    enough = benchmark_record(quality=quality(chunks_count=400, scored_tokens=400 * 256))

    assert set(limits) == set(Gates.model_fields)
    for name, limit in limits.items():
        slice_ = choose_slice(["Q4_K_M"], gates={name: limit})
        record = encoder_record() if name == "min_cosine_mean" else enough
        host = only_host(elect({"Q4_K_M": {}}, slice_, replaced={"Q4_K_M": record}))
        assert (host.verdict, name in host.candidates[0].sentence) == ("REJECT", True), name


# --- encoders ---------------------------------------------------------------------------------

# As real ones show: prefill barely depends on the bits, the cosine does.
ENCODERS: Numbers = {
    "Q8_0": {"prefill_tok_s": 9_400, "cosine_mean": 0.9999, "memory_mib": 60, "size_mib": 5},
    "Q5_K_M": {"prefill_tok_s": 9_900, "cosine_mean": 0.9981, "memory_mib": 50, "size_mib": 4},
    "Q4_K_M": {"prefill_tok_s": 11_000, "cosine_mean": 0.9946, "memory_mib": 42, "size_mib": 3},
    "Q2_K": {"prefill_tok_s": 12_000, "cosine_mean": 0.958, "memory_mib": 30, "size_mib": 2},
}


def elect_encoders(
    numbers: Numbers,
    slice_: ChooseSlice | None = None,
    replaced: dict[str, BenchmarkRecord] | None = None,
) -> ChoiceRecord:
    """Choose among quants of an encoder given by their numbers."""
    made = {type_: encoder_record(type_, **cast("Any", own)) for type_, own in numbers.items()}
    sizes = {type_: {"size_mib": own.get("size_mib", 3.0)} for type_, own in numbers.items()}
    chosen = slice_ or choose_slice(numbers, gates={})
    return elect(sizes, chosen, replaced={**made, **(replaced or {})})


@pytest.mark.parametrize(
    ("objective", "winner"), [("speed", "Q4_K_M"), ("quality", "Q8_0"), ("size", "Q4_K_M")]
)
def test_an_encoder_is_chosen_by_prefill_and_cosine(objective: Objective, winner: str) -> None:
    """Its speed is prefill, its quality 1 - the mean cosine; nothing decodes."""
    choice = elect_encoders(ENCODERS, choose_slice(ENCODERS, objective=objective, gates={}))
    host = only_host(choice)

    assert (host.winner, host.verdict, choice.decode_depth_tokens) == (winner, "PROMOTE", None)
    best = candidate(choice, winner)
    assert (best.decode_tok_s, best.kld_mean_nats) == (None, None)
    assert best.cosine_mean == ENCODERS[winner]["cosine_mean"]
    assert best.prefill_tok_s == ENCODERS[winner]["prefill_tok_s"]


def test_an_encoder_is_told_in_its_own_units() -> None:
    """Nobody reads of nats or of a depth where there are none."""
    host = only_host(elect_encoders(ENCODERS))

    assert host.sentence == (
        "promote Q4_K_M: the fastest of the 3 quants that pass "
        "(11,000 tok/s of prefill, 0.00540 below cosine 1, 42.0 MiB)"
    )
    texts = [host.sentence, host.binding, *(one.sentence for one in host.candidates)]
    assert not [text for text in texts if "nats" in text or "depth" in text]


def test_an_encoder_has_a_limit_on_its_quality_even_if_nobody_declares_one() -> None:
    """0.99 holds then, it is in the record, and a note says that nobody declared it."""
    choice = elect_encoders(ENCODERS)

    assert "0.958 is under the limit 0.99 (min_cosine_mean)" in candidate(choice, "Q2_K").sentence
    assert choice.gates == {"min_cosine_mean": 0.99}
    assert "No min_cosine_mean is declared, so 0.99 holds." in choice.notes


def test_a_declared_limit_takes_the_place_of_the_built_in_one() -> None:
    """What the operator states holds, in both directions."""
    loose = elect_encoders(ENCODERS, choose_slice(ENCODERS, gates={"min_cosine_mean": 0.9}))
    strict = elect_encoders(ENCODERS, choose_slice(ENCODERS, gates={"min_cosine_mean": 0.999}))

    assert (only_host(loose).winner, only_host(strict).winner) == ("Q2_K", "Q8_0")
    assert not [note for note in loose.notes if "declared" in note]


def test_limits_of_decoders_neither_fail_an_encoder_nor_judge_it_in_silence() -> None:
    """A fleet-wide limit on divergence is none of an encoder, and the choice says so."""
    gates = {"max_kld_mean_nats": 1e-9, "min_same_top": 1.0, "min_decode_tok_s": 9e9}
    choice = elect_encoders(ENCODERS, choose_slice(ENCODERS, gates=gates))

    assert only_host(choice).winner == "Q4_K_M"
    assert choice.gates == {"min_cosine_mean": 0.99}
    (note,) = [note for note in choice.notes if "max_kld_mean_nats" in note]
    assert note == (
        "max_kld_mean_nats, min_same_top and min_decode_tok_s speak of models that go on with "
        "texts; this one makes embeddings and was not judged by that."
    )


def test_a_limit_of_encoders_is_not_taken_for_one_of_a_decoder() -> None:
    """A cosine that nobody measured is not kept in silence either."""
    choice = elect(FLEET, choose_slice(FLEET, gates={"min_cosine_mean": 1.0}))

    assert only_host(choice).winner == "Q2_K"
    assert choice.gates == {}
    (note,) = [note for note in choice.notes if "min_cosine_mean" in note]
    assert "was not judged by that" in note


_DOUBTFUL_ENCODERS: dict[str, tuple[dict[str, Any], str]] = {
    "no prefill at depth 0": ({"speed": (speed("prefill", 8, 9e9),)}, "prefill speed is measured"),
    "a decode test": (
        {"speed": (speed("prefill", 0, 9e9), speed("decode", 0, 9e9))}, "decodes nothing",
    ),
    "a cosine above one": ({"quality": embedding_quality(cosine_mean=1.2)}, "cosines lie in -1..1"),
    "a least above the mean": (
        {"quality": embedding_quality(cosine_mean=0.98, cosine_min=0.99)}, "cosines lie in -1..1",
    ),
    "no text": ({"quality": embedding_quality(texts_count=0)}, "texts were embedded"),
    "no number": ({"quality": embedding_quality().model_copy(update={"cosine_p01": math.nan})},
                  "not a finite number"),
    "other texts": ({"quality": embedding_quality(texts_count=64)}, "number of chunks"),
    "another corpus": ({"quality": embedding_quality(corpus_sha256=sha256("other"))}, "corpus"),
    "a divergence": ({"quality": quality(), "speed": (speed("decode", 0, 9e9),)},
                     "kind of quality"),
}  # fmt: skip


@pytest.mark.parametrize("what", _DOUBTFUL_ENCODERS)
def test_a_record_of_an_encoder_that_does_not_fit_never_wins(what: str) -> None:
    """However good its numbers are."""
    changes, reason = _DOUBTFUL_ENCODERS[what]
    bad = encoder_record("Q4_K_M").model_copy(update=changes)

    choice = elect_encoders(ENCODERS, replaced={"Q4_K_M": bad})

    assert candidate(choice, "Q4_K_M").verdict == "INVALID"
    assert reason in candidate(choice, "Q4_K_M").sentence
    assert only_host(choice).winner == "Q5_K_M"


_encoder_numbers = st.fixed_dictionaries(
    {
        "prefill_tok_s": st.floats(950, 1050) | st.floats(10, 100_000),
        "cosine_mean": st.floats(0.98, 1.0) | st.floats(-1, 1),
        "memory_mib": st.floats(1, 3000),
        "size_mib": st.floats(1, 100),
        "noise": st.sampled_from([0.0, 0.01, 0.1]),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["Q8_0", "Q6_K", "Q4_K_M"]), _encoder_numbers, min_size=1),
    st.sampled_from(["speed", "quality", "size"]),
    st.data(),
)
def test_worse_numbers_never_make_a_losing_encoder_win(
    numbers: Numbers, objective: Objective, data: st.DataObject
) -> None:
    """A quant cannot gain by a lower cosine, a slower prefill, or more memory."""

    def winner(of: Numbers) -> str | None:
        return only_host(elect_encoders(of, choose_slice(of, objective=objective, gates={}))).winner

    target = data.draw(st.sampled_from(sorted(numbers)))
    assume(winner(numbers) != target)
    name = data.draw(st.sampled_from(["prefill_tok_s", "cosine_mean", "memory_mib", "size_mib"]))
    value, factor = numbers[target][name], data.draw(st.floats(1.0, 3.0))
    worse = {
        "prefill_tok_s": value / factor, "cosine_mean": 1 - min(2.0, (1 - value) * factor),
    }.get(name, value * factor)  # fmt: skip

    assert winner(numbers | {target: numbers[target] | {name: worse}}) != target


def test_a_choice_of_decoders_is_written_as_before() -> None:
    """Committed choices keep their bytes: the cosine is not written where there is none."""
    written = json.loads(elect(FLEET).model_dump_json())

    assert "cosine_mean" not in written["hosts"][0]["candidates"][0]
    encoder = json.loads(elect_encoders(ENCODERS).model_dump_json())
    assert encoder["hosts"][0]["candidates"][0]["cosine_mean"] == 0.9999


# --- doubt ------------------------------------------------------------------------------------

_DOUBTFUL: dict[str, tuple[dict[str, Any], str]] = {
    "another file": ({"gguf_sha256": sha256("other")}, "sha256"),
    "another size": ({"size_bytes": 5}, "size"),
    "another f16": ({"f16_sha256": sha256("other")}, "f16"),
    "another model": ({"model": "other"}, "model"),
    "another commit": ({"llama_cpp_commit": "f" * 40}, "commit"),
    "its own verdict": ({"validity": validity("another process used the CPU")}, "another process"),
    "other hardware": ({"machine": machine_id(hw_id=sha256("other"))}, "hardware"),
    "other threads": ({"threads": 64}, "threads"),
    "another corpus": ({"quality": quality(corpus_sha256=sha256("other"))}, "corpus"),
    "other chunks": ({"quality": quality(chunks_count=8)}, "chunks"),
    "shorter tests": (
        {"speed": (speed("decode", 256, 99999.0).model_copy(update={"tokens": 1}),)}, "speed tests",
    ),
    "memory of another kind": ({"memory": memory(method="nvml")}, "memory"),
    "another depth": ({"speed": (speed("decode", 8, 99999.0),)}, "depth"),
    "another context": ({"memory": memory(context_tokens=64)}, "context"),
    "no decode test": ({"speed": (speed("prefill", 0, 99999.0),)}, "decode speed is measured"),
    "a speed of zero": ({"speed": (speed("decode", 256, 0.0),)}, "above zero"),
    "a share above one": ({"quality": quality(same_top=97.1)}, "0..1"),
    "a negative divergence": ({"quality": quality(kld_mean_nats=-0.5)}, "below zero"),
}  # fmt: skip


@pytest.mark.parametrize("what", _DOUBTFUL)
def test_a_record_that_does_not_fit_never_wins(what: str) -> None:
    """The best numbers win nothing if they belong to something else; the reason is named."""
    changes, words = _DOUBTFUL[what]
    numbers = FLEET | {"Q3_K_M": {"decode_tok_s": 9000, "kld_mean_nats": 0.0001}}
    doubtful = benchmark_record("Q3_K_M", decode_tok_s=9000, kld_mean_nats=0.0001)
    choice = elect(numbers, replaced={"Q3_K_M": doubtful.model_copy(update=changes)})

    assert only_host(choice).winner == "Q4_K_M"
    assert only_host(choice).verdict == "HOLD"
    assert candidate(choice, "Q3_K_M").verdict == "INVALID"
    assert words in candidate(choice, "Q3_K_M").sentence
    assert candidate(choice, "Q3_K_M").decode_tok_s is None


def test_a_disturbed_measurement_keeps_what_no_load_can_change() -> None:
    """An INVALID quant never wins, yet its size, divergence and own memory can still be read."""
    busy = validity("The benchmark waited for a core in 63 % of its time: run it again.")
    record = benchmark_record("Q5_K_M", decode_tok_s=9000, size_mib=4, validity=busy)

    disturbed = candidate(elect(FLEET, replaced={"Q5_K_M": record}), "Q5_K_M")

    assert (disturbed.verdict, disturbed.on_frontier) == ("INVALID", False)
    assert (disturbed.decode_tok_s, disturbed.prefill_tok_s) == (None, None)
    assert disturbed.kld_mean_nats == 0.031
    assert disturbed.memory_mib == 42.0
    assert disturbed.sentence == (
        "Q5_K_M: the measurement is INVALID, since the benchmark waited for a core in 63 % of its "
        "time: run it again; size, divergence and memory do not depend on that."
    )


def test_a_busy_machine_is_named_in_the_headline() -> None:
    """When every measurement was disturbed, the verdict says so and what to type next."""
    busy = {
        type_: measured_record(type_, values).model_copy(update={"validity": validity("busy")})
        for type_, values in FLEET.items()
    }

    host = only_host(elect(FLEET, replaced={**busy}))

    assert (host.winner, host.verdict) == (None, "INVALID")
    assert host.sentence.endswith(
        "cannot be judged (their measurements were disturbed: `fleet repro` on a quiet machine "
        "repeats them)"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"quality": quality(corpus_sha256=sha256("other"))},
        {"quality": quality(same_top=97.1)},
        {"gguf_sha256": sha256("other")},
        {"memory": memory(context_tokens=64)},
    ],
)
def test_a_disturbed_measurement_with_another_fault_keeps_nothing(changes: dict[str, Any]) -> None:
    """What was measured on something else as well is not shown beside the others."""
    busy = benchmark_record("Q5_K_M", size_mib=4, validity=validity("busy"))
    record = busy.model_copy(update=changes)

    kept = candidate(elect(FLEET, replaced={"Q5_K_M": busy}), "Q5_K_M")
    none = candidate(elect(FLEET, replaced={"Q5_K_M": record}), "Q5_K_M")

    assert kept.kld_mean_nats is not None
    assert none.kld_mean_nats is None


def test_disturbed_memory_of_a_card_is_not_kept() -> None:
    """What a driver counts on a card may be other programs', so it goes with the speed."""
    record = benchmark_record(validity=validity("busy"), memory=memory(method="nvml"))

    disturbed = candidate(elect({"Q4_K_M": {}}, replaced={"Q4_K_M": record}), "Q4_K_M")

    assert disturbed.memory_mib is None
    assert disturbed.kld_mean_nats == 0.031


def test_memory_measured_on_the_other_kind_of_hardware_is_noted() -> None:
    """A host with cards that is judged by the memory of a CPU run is named in the record."""
    choice = elect({"Q4_K_M": {}}, choose_slice(hosts={"a": {"vram_mib": 24576}}))

    assert "Memory was measured on a CPU; on a it differs" in choice.notes[0]
    assert elect({"Q4_K_M": {}}).notes == ()


def test_two_halves_that_disagree_are_both_doubted() -> None:
    """One quant measured here and one there cannot be compared, so neither wins."""
    other = benchmark_record("Q5_K_M", machine=machine_id(hw_id=sha256("other")))

    host = only_host(elect({"Q4_K_M": {}, "Q5_K_M": {}}, replaced={"Q5_K_M": other}))

    assert (host.winner, host.verdict) == (None, "INVALID")
    assert "disagree about the hardware" in host.candidates[0].sentence


# --- properties -------------------------------------------------------------------------------

_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_M")
_numbers = st.fixed_dictionaries(
    {
        "decode_tok_s": st.floats(95, 105) | st.floats(10, 1000),
        "kld_mean_nats": st.floats(0.02, 0.024) | st.floats(0, 0.2),
        "memory_mib": st.floats(1, 3000),
        "size_mib": st.floats(1, 1.05) | st.floats(1, 100),
        "noise": st.sampled_from([0.0, 0.01, 0.1]),
    }
)
_fleets = st.dictionaries(st.sampled_from(_TYPES), _numbers, min_size=1, max_size=5)
_objectives = st.sampled_from(["speed", "quality", "size"])
_incumbents = st.none() | st.sampled_from(_TYPES)


def winner_of(
    numbers: Numbers, objective: Objective, incumbent: str | None, **kw: Any
) -> str | None:
    """Return the type that wins."""
    return only_host(
        elect(numbers, choose_slice(numbers, objective=objective), incumbent, **kw)
    ).winner


@settings(max_examples=40, deadline=None)
@given(_fleets, _objectives, _incumbents, st.data())
def test_a_doubtful_candidate_never_wins(
    numbers: Numbers, objective: Objective, incumbent: str | None, data: st.DataObject
) -> None:
    """Whatever the numbers, a record that does not fit or is not finite is not chosen."""
    target = data.draw(st.sampled_from(sorted(numbers)))
    record = measured_record(target, numbers[target])
    numeric = [name for name, value in record.quality if isinstance(value, float)]
    field = data.draw(st.sampled_from(numeric))
    bad_quality = record.quality.model_copy(
        update={field: data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))}
    )
    bad = data.draw(
        st.sampled_from([
            "missing",
            record.model_copy(update={"gguf_sha256": sha256("foreign")}),
            record.model_copy(update={"validity": validity("busy")}),
            record.model_copy(update={"quality": bad_quality}),
        ])
    )  # fmt: skip

    assert winner_of(numbers, objective, incumbent, replaced={target: bad}) != target


@settings(max_examples=100, deadline=None)
@given(_fleets, _objectives, _incumbents, st.data())
def test_worse_numbers_never_make_a_loser_win(
    numbers: Numbers, objective: Objective, incumbent: str | None, data: st.DataObject
) -> None:
    """A quant cannot gain by being slower, more divergent or larger."""
    target = data.draw(st.sampled_from(sorted(numbers)))
    assume(winner_of(numbers, objective, incumbent) != target)
    name = data.draw(st.sampled_from(["decode_tok_s", "kld_mean_nats", "memory_mib", "size_mib"]))
    factor = data.draw(st.floats(1.0, 3.0))
    value = numbers[target][name]
    worse = value / factor if name == "decode_tok_s" else value * factor

    after = numbers | {target: numbers[target] | {name: worse}}

    assert winner_of(after, objective, incumbent) != target


@settings(max_examples=100, deadline=None)
@given(_fleets, _objectives, _incumbents, st.data())
def test_removing_a_beaten_quant_never_changes_the_winner(
    numbers: Numbers, objective: Objective, incumbent: str | None, data: st.DataObject
) -> None:
    """Leaving out what failed, or what another one clearly beats, leaves the winner alone."""
    choice = elect(numbers, choose_slice(numbers, objective=objective), incumbent)
    winner = only_host(choice).winner
    tied = " within "
    losers = [
        one.type
        for one in only_host(choice).candidates
        if one.verdict == "REJECT" or (one.verdict == "PASS" and tied not in one.sentence)
    ]
    assume(winner is not None and losers)
    gone = data.draw(st.sampled_from(losers))

    rest = {type_: values for type_, values in numbers.items() if type_ != gone}

    assert winner_of(rest, objective, incumbent) == winner


@settings(max_examples=100, deadline=None)
@given(_fleets, st.data())
def test_noise_inside_the_minimum_effect_keeps_the_incumbent(
    numbers: Numbers, data: st.DataObject
) -> None:
    """The best quant stays chosen while every speed moves by less than half the effect."""
    passing = {t: v | {"kld_mean_nats": 0.03, "memory_mib": 10.0} for t, v in numbers.items()}
    best = max(passing, key=lambda t: (passing[t]["decode_tok_s"], t))
    noisy = {
        t: v | {"decode_tok_s": v["decode_tok_s"] * data.draw(st.floats(0.986, 1.014))}
        for t, v in passing.items()
    }

    assert winner_of(noisy, "speed", best) == best


@settings(max_examples=40, deadline=None)
@given(_fleets, _objectives, _incumbents, st.randoms(use_true_random=False))
def test_the_order_of_the_declaration_does_not_matter(
    numbers: Numbers, objective: Objective, incumbent: str | None, random: Any
) -> None:
    """Ties end at the name of the type, not at the line in params.yaml."""
    shuffled = list(numbers)
    random.shuffle(shuffled)

    again = winner_of({type_: numbers[type_] for type_ in shuffled}, objective, incumbent)

    assert again == winner_of(numbers, objective, incumbent)


@settings(max_examples=40, deadline=None)
@given(_fleets, _objectives, _incumbents)
def test_every_quant_gets_one_sentence_that_names_it(
    numbers: Numbers, objective: Objective, incumbent: str | None
) -> None:
    """Nobody is left without a reason, and the winner is one that keeps every limit."""
    host = only_host(elect(numbers, choose_slice(numbers, objective=objective), incumbent))

    assert [one.type for one in host.candidates] == list(numbers)
    assert all(one.sentence.startswith(f"{one.type}: ") for one in host.candidates)
    assert (host.winner is None) == (host.verdict in {"REJECT", "INVALID"})
    if host.winner:
        assert numbers[host.winner]["kld_mean_nats"] <= 0.06
        assert numbers[host.winner]["memory_mib"] + 256 <= 2048


# --- files ------------------------------------------------------------------------------------


def _git(root: Path, *argv: str) -> None:
    author = ("-c", "user.name=Test", "-c", "user.email=test@example.invalid")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    subprocess.run(["git", *author, *argv], cwd=root, check=True, env=environment)


def _fleet_on_disk(root: Path, numbers: Numbers) -> Layout:
    at = Layout(root)
    write_model(
        at,
        quantized=[quantize_record(t, size_mib=v.get("size_mib", 3.0)) for t, v in numbers.items()],
        measured=[measured_record(t, v) for t, v in numbers.items()],
    )
    return at


def test_only_declared_quants_are_read(tmp_path: Path) -> None:
    """Records of a quant that was removed from the declaration lie there and are ignored."""
    at = _fleet_on_disk(tmp_path, FLEET)

    choice = choose_stage.run(choose_slice(["Q8_0", "Q5_K_M"]), at)

    assert [one.type for one in only_host(choice).candidates] == ["Q8_0", "Q5_K_M"]
    assert only_host(choice).winner == "Q5_K_M"


def test_plots_and_metrics_get_the_measured_quants(tmp_path: Path) -> None:
    """`dvc plots` and `dvc metrics` read rows of finite numbers, without the doubted quants."""
    at = _fleet_on_disk(tmp_path, FLEET)
    at.quant_record("benchmark", MODEL, "Q8_0").write_text("{}")

    choice = choose_stage.run(choose_slice(FLEET), at)

    rows = json.loads(at.frontier(MODEL).read_text())
    assert [row["type"] for row in rows] == ["Q5_K_M", "Q4_K_M", "Q2_K"]
    assert rows[1]["decode_tok_s"] == 598
    assert json.loads(at.metrics(MODEL).read_text())["Q4_K_M"]["kld_mean_nats"] == 0.0313
    assert "Q8_0.json is not a BenchmarkRecord" in candidate(choice, "Q8_0").sentence
    assert str(tmp_path) not in choice.model_dump_json()


def test_the_committed_choice_is_the_incumbent(tmp_path: Path) -> None:
    """The winner of the last commit is kept on a tie; the file in the working tree is not asked."""
    tie: Numbers = {
        "Q4_K_S": {"decode_tok_s": 600, "kld_mean_nats": 0.040},
        "Q4_K_M": {"decode_tok_s": 590, "kld_mean_nats": 0.030},
    }
    at = _fleet_on_disk(tmp_path, tie)
    first = choose_stage.run(choose_slice(["Q4_K_S"]), at)
    records.write(at.model_record("choose", MODEL), first)
    _git(tmp_path, "init", "-q")

    before = choose_stage.run(choose_slice(tie), at)
    _git(tmp_path, "add", "-A")
    _git(tmp_path, "commit", "-qm", "first choice")
    at.model_record("choose", MODEL).unlink()
    after = choose_stage.run(choose_slice(tie), at)

    assert (only_host(before).incumbent, only_host(before).winner) == (None, "Q4_K_M")
    assert (only_host(after).incumbent, only_host(after).winner) == ("Q4_K_S", "Q4_K_S")
    assert before.notes == after.notes == ()


def test_a_garbage_incumbent_is_none_and_noted(tmp_path: Path) -> None:
    """A committed choice that cannot be read keeps nobody, and the record says so."""
    at = _fleet_on_disk(tmp_path, FLEET)
    at.model_record("choose", MODEL).write_text('{"schema_version": 99}')
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", "-A")
    _git(tmp_path, "commit", "-qm", "garbage")

    choice = choose_stage.run(choose_slice(FLEET), at)

    assert only_host(choice).winner == "Q4_K_M"
    assert only_host(choice).incumbent is None
    assert "not one of this version" in choice.notes[0]


def test_a_held_choice_does_not_take_the_place_of_the_one_before(tmp_path: Path) -> None:
    """Only a promotion replaces a choice; a hold leaves the one before."""
    at = _fleet_on_disk(tmp_path, FLEET)
    held = elect(FLEET, incumbent="Q5_K_M", replaced={"Q8_0": "gone"})
    records.write(at.model_record("choose", MODEL), held)
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", "-A")
    _git(tmp_path, "commit", "-qm", "hold")

    assert only_host(held).verdict == "HOLD"
    assert choose_stage.committed_winners(MODEL, at) == ({"local": "Q5_K_M"}, ())
