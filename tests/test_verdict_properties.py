"""
What holds of the verdict whatever the records say: 10,000 cases, drawn by hypothesis.

Each starts from a model of which every input is in one of the states of docs/verdict.md.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

import pytest
import record_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pipelines import verdict, verdict_table
from pipelines.choose import choose
from pipelines.compare_records import CompareRecord
from pipelines.evaluate_records import EvaluateRecord
from pipelines.load_records import LoadTestRecord
from pipelines.params import Choose, ChooseSlice, Gates, Waiver
from pipelines.records import BenchmarkRecord, ChoiceRecord, QuantizeRecord
from pipelines.verdict_words import VERDICTS, Verdict
from pipelines.verify_records import Layer, VerifyRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.verdict import ModelVerdict
    from pipelines.verdict_evidence import Evidence

INPUTS = verdict_table.inputs()
GOOD = verdict_table.good()
# Records by the name of their field; those of quants are in a mapping of one type.
RECORDS = (
    "fetched", "converted", "verified", "calibrated", "evaluated", "choice", "tested", "compared",
    "quantized", "measured",
)  # fmt: skip
TYPE = "Q4_K_M"
Place = tuple[str | int, ...]


def cases(count: int) -> settings:
    """Run a property so often; together they are 10,000 cases and more."""
    return settings(max_examples=count, deadline=None)


states = st.tuples(*(st.sampled_from(one.states) for one in INPUTS))
# Those of which nothing is INVALID: where a worse number can still be told from a better one.
judged_states = st.tuples(
    *(
        st.sampled_from(
            [s for s in one.states if verdict_table.alone(one.name, s.name).verdict != "INVALID"]
        )
        for one in INPUTS
    )
)


def known_of(combination: tuple[verdict_table.State, ...]) -> Evidence:
    """Build what is known of a model in these states."""
    known = GOOD
    for state in combination:
        known = state.change(known)
    return known


def rank(known: Evidence) -> int:
    """Judge, and return how bad it is: 0 for PROMOTE, 3 for INVALID."""
    return VERDICTS.index(verdict.judge(known).verdict)


# --- records as places ------------------------------------------------------------------------


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield every value of a record that has no parts, with its place."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from leaves(getattr(value, name), (*place, name))
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, (*place, key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from leaves(each, (*place, index))
    else:
        yield place, value


def put(value: Any, place: Place, new: Any) -> Any:
    """Return a record with another value at a place, unvalidated."""
    if not place:
        return new
    step, rest = place[0], place[1:]
    if isinstance(value, BaseModel):
        assert isinstance(step, str)
        return value.model_copy(update={step: put(getattr(value, step), rest, new)})
    if isinstance(value, dict):
        return value | {step: put(value[step], rest, new)}
    if not isinstance(value, list | tuple):
        raise TypeError(value)
    return tuple(put(each, rest, new) if i == step else each for i, each in enumerate(value))


def with_value(known: Evidence, place: Place, new: Any) -> Evidence:
    """Return what is known with another value at a place below one of `RECORDS`."""
    field = str(place[0])
    return replace(known, **{field: put(getattr(known, field), place[1:], new)})


@cache
def places(kind: type) -> list[Place]:
    """Return where values of a kind stand in the records of the good model."""
    return [
        (field, *place)
        for field in RECORDS
        for place, value in leaves(getattr(GOOD, field))
        if type(value) is kind
    ]


# --- fail closed ------------------------------------------------------------------------------


@cases(1500)
@given(st.sampled_from(places(float)), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_no_number_that_is_none_ever_promotes(place: Place, bad: float) -> None:
    """Wherever in any record it stands, and whether or not anything looks at it."""
    found = verdict.judge(with_value(GOOD, place, bad))

    assert found.verdict == "INVALID"
    assert any(each.rule == "numbers" for each in found.reasons)


# Digests that name nothing which a verdict rests on: they are compared where a release is composed,
# or are of the champion.
FREE = {"md5", "env_id", "manifest_sha256", "modelfile_sha256", "toolchain_id"}
HEX = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}|h{12}")


def digest_places() -> list[Place]:
    """Return where digests stand that have to be of what there is now."""
    return [
        place
        for place in places(str)
        if place[0] != "compared"
        and place[-1] not in FREE
        and place[-2:] != ("golden", "sha256")
        and HEX.fullmatch(str(dict(leaves(getattr(GOOD, str(place[0]))))[place[1:]]))
    ]


@cases(600)
@given(states, st.sampled_from(digest_places()), st.sampled_from("0123456789abcdef"))
def test_no_foreign_digest_ever_promotes(
    combination: tuple[verdict_table.State, ...], place: Place, digit: str
) -> None:
    """Any digest of any record that is another one stops the model, whatever else is so."""
    known = known_of(combination)
    try:
        changed = with_value(known, place, digit * 64)
    except (AttributeError, TypeError, KeyError, AssertionError):
        changed = with_value(GOOD, place, digit * 64)  # that record is not there

    if rank(known) == 0:
        assert rank(changed) == VERDICTS.index("INVALID"), place
    assert rank(changed) > 0


@cases(600)
@given(states, st.sets(st.sampled_from([*RECORDS, "nothing"]), min_size=1))
def test_removing_records_never_leads_to_a_promotion(
    combination: tuple[verdict_table.State, ...], gone: set[str]
) -> None:
    """But for a comparison that nobody asks for, and for evals of which none is declared."""
    known = known_of(combination)
    missing: dict[str, Any] = {name: f"{name}.json does not exist" for name in gone - {"nothing"}}
    for name in {"quantized", "measured"} & gone:
        missing[name] = {TYPE: missing[name]}
    if "compared" in gone:
        missing["compared"] = None
    found = rank(replace(known, **missing))

    needed = gone - {"nothing", "compared"}
    if not known.declared.evals:
        needed -= {"evaluated"}
    if known.declared.compare_required:
        needed |= {"compared"} & gone
    is_chosen = combination[1].name != "none"
    assert found > 0 or not needed
    if needed - {"compared"} and is_chosen:
        assert found == VERDICTS.index("INVALID")


def test_a_comparison_that_is_worse_can_be_removed_unless_one_is_required() -> None:
    """docs/verdict.md says so, and `compare.required` closes it."""
    worse = verdict_table.evidence({"comparison": "worse"})
    required = replace(worse, declared=worse.declared.model_copy(update={"compare_required": True}))

    assert verdict.judge(worse).verdict == verdict.judge(required).verdict == "REJECT"
    assert verdict.judge(replace(worse, compared=None)).verdict == "PROMOTE"
    assert verdict.judge(replace(required, compared=None)).verdict == "HOLD"
    assert "removing a comparison" in verdict_table.page().replace("\n", " ")


# --- monotone ---------------------------------------------------------------------------------

# What a gate can look at, and in which direction it gets worse.
WORSE = {
    ("quality", "kld_mean_nats"): 1, ("quality", "kld_p999_nats"): 1, ("quality", "same_top"): -1,
    ("quality", "ppl_ratio"): 1, ("speed", 0, "median_tok_s"): -1,
    ("memory", "measured_mib"): 1, ("memory", "estimate_mib"): 1, ("size",): 1,
}  # fmt: skip
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "max_kld_mean_nats": st.floats(0.001, 0.2), "min_same_top": st.floats(0.5, 1.0),
        "max_ppl_ratio": st.floats(0.9, 1.5), "min_decode_tok_s": st.floats(1.0, 100.0),
        "max_size_mib": st.floats(1000.0, 9000.0),
    },
)  # fmt: skip


def measured(known: Evidence, place: Place, factor: float) -> Evidence:
    """Change one number of the benchmark, consistently: of the file, too, if it is its size."""
    one, built = known.measured[TYPE], known.quantized[TYPE]
    assert isinstance(one, BenchmarkRecord)
    assert isinstance(built, QuantizeRecord)
    if place == ("size",):
        size = max(1, round(one.size_bytes * factor))
        one = one.model_copy(update={"size_bytes": size})
        built = put(built, ("gguf", "size_bytes"), size)
    elif place[0] == "speed":
        speed = one.speed[0]
        names = ("low_tok_s", "median_tok_s", "high_tok_s")
        slower = speed.model_copy(update={n: getattr(speed, n) * factor for n in names})
        one = one.model_copy(update={"speed": (slower,)})
    else:
        value = dict(leaves(one))[place] * factor
        # Beyond 1 a share is impossible, which is another doubt than a bad one.
        one = put(one, place, min(value, 1.0) if place[-1] == "same_top" else value)
    return replace(known, measured={TYPE: one}, quantized={TYPE: built})


def chosen_again(known: Evidence, limits: dict[str, float]) -> Evidence:
    """Choose by these limits, as `choose` does."""
    declared = known.declared.model_copy(update={"gates": Gates(**limits)})
    slice_ = ChooseSlice(
        model=declared.model, quants=declared.quants, objective=declared.objective,
        gates=declared.gates, context_tokens=declared.context_tokens, choose=Choose(),
        hosts=declared.hosts,
    )  # fmt: skip
    (key,) = declared.quants
    evals = known.evaluated if isinstance(known.evaluated, EvaluateRecord) else None
    found = choose(slice_, {key: known.quantized[TYPE]}, {key: known.measured[TYPE]}, None, evals)
    return replace(known, declared=declared, choice=found)


@cases(900)
@given(
    judged_states, LIMITS, st.sampled_from(list(WORSE)), st.floats(0.2, 4.0), st.floats(1.0, 50.0)
)
def test_a_worse_measurement_never_gives_a_better_verdict(
    combination: tuple[verdict_table.State, ...],
    limits: dict[str, float],
    place: Place,
    start: float,
    by: float,
) -> None:
    """Every number that a gate or a host's memory looks at; the choice is made again each time."""
    known = measured(known_of(combination), place, start)
    worse = measured(known, place, by if WORSE[place] > 0 else 1 / by)

    assert rank(chosen_again(worse, limits)) >= rank(chosen_again(known, limits))


def test_a_choice_that_was_not_made_again_is_no_way_out() -> None:
    """A worse benchmark beside the old choice is stale: INVALID, and the gates speak, too."""
    found = verdict.judge(measured(GOOD, ("quality", "kld_mean_nats"), 10.0))

    assert found.verdict == "INVALID"
    assert {"chain", "gates"} <= {each.rule for each in found.reasons}


SHARES = st.floats(0.0, 1.0)


@cases(1500)
@given(
    judged_states,
    st.tuples(SHARES, SHARES, SHARES).map(sorted),
    st.sampled_from(["PASS", "INCONCLUSIVE", "FAIL"]),
    st.sampled_from(["low", "value", "high"]),
    st.floats(0.0, 1.0),
)
def test_a_worse_share_of_good_requests_never_gives_a_better_verdict(
    combination: tuple[verdict_table.State, ...],
    numbers: list[float],
    outcome: str,
    which: str,
    factor: float,
) -> None:
    """Whatever outcome the record claims: it counts only where it is worse than its numbers."""
    known = known_of(combination)
    tested = known.tested
    assert isinstance(tested, LoadTestRecord)
    shares = dict(zip(("low", "value", "high"), numbers, strict=True))
    claim = {"outcome": outcome}

    def with_gate(changes: dict[str, Any]) -> Evidence:
        (test,) = tested.winners
        gates = tuple(
            gate.model_copy(update=changes) if gate.name == "goodput" else gate
            for gate in test.gates
        )
        winner = test.model_copy(update={"gates": gates})
        return replace(known, tested=tested.model_copy(update={"winners": (winner,)}))

    before = with_gate(shares | claim)
    after = with_gate(shares | {which: shares[which] * factor} | claim)

    assert rank(after) >= rank(before)
    if shares["low"] < 0.95 and combination[1].name != "none":
        assert rank(before) > 0


@cases(600)
@given(judged_states, st.floats(100.0, 40_000.0), st.floats(1.0, 10.0))
def test_more_memory_under_load_never_gives_a_better_verdict(
    combination: tuple[verdict_table.State, ...], memory_mib: float, factor: float
) -> None:
    """The limit of the host is held against the number itself."""
    known = known_of(combination)

    def with_memory(value: float) -> Evidence:
        tested = known.tested
        assert isinstance(tested, LoadTestRecord)
        (test,) = tested.winners
        used = {"value": value, "low": value, "high": value}
        gates = (*test.gates[:2], test.gates[2].model_copy(update=used))
        winner = test.model_copy(update={"gates": gates})
        return replace(known, tested=tested.model_copy(update={"winners": (winner,)}))

    assert rank(with_memory(memory_mib * factor)) >= rank(with_memory(memory_mib))


@cases(700)
@given(judged_states, st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.sampled_from(["PASS", "HARM"]))
def test_a_smaller_p_value_never_gives_a_better_verdict(
    combination: tuple[verdict_table.State, ...], p_value: float, factor: float, outcome: str
) -> None:
    """An eval that calls itself PASS under the level is harm all the same."""
    known = known_of((*combination[:2], INPUTS[2].states[0], *combination[3:]))
    evals = known.evaluated
    assert isinstance(evals, EvaluateRecord)

    def with_p(value: float) -> Evidence:
        quant = ("sets", 0, "quants", 0)
        changed = put(put(evals, (*quant, "p_value"), value), (*quant, "outcome"), outcome)
        return replace(known, evaluated=changed)

    assert rank(with_p(p_value * factor)) >= rank(with_p(p_value))
    if (p_value < evals.alpha or outcome == "HARM") and combination[1].name != "none":
        assert rank(with_p(p_value)) >= VERDICTS.index("REJECT")


@cases(700)
@given(
    judged_states,
    st.lists(st.sampled_from(["PASS", "SKIP", "FAIL"]), min_size=8, max_size=8),
    st.integers(0, 7),
    st.sampled_from(["SKIP", "FAIL"]),
)
def test_a_layer_that_holds_no_more_never_gives_a_better_verdict(
    combination: tuple[verdict_table.State, ...], outcomes: list[str], index: int, worse: str
) -> None:
    """A layer that was left out proves nothing; one that fails rejects, whatever is claimed."""
    known = known_of(combination)
    proof = GOOD.verified
    assert isinstance(proof, VerifyRecord)
    assert len(get_args(Layer)) == len(proof.checks)
    outcomes[index] = "PASS"

    def with_outcomes(found: list[str]) -> Evidence:
        checks = tuple(
            check.model_copy(update={"outcome": outcome})
            for check, outcome in zip(proof.checks, found, strict=True)
        )
        # The record goes on calling itself PASS.
        return replace(known, verified=proof.model_copy(update={"checks": checks}))

    changed = [worse if i == index else each for i, each in enumerate(outcomes)]
    assert rank(with_outcomes(changed)) >= rank(with_outcomes(outcomes))
    if "FAIL" in changed:
        assert rank(with_outcomes(changed)) >= VERDICTS.index("REJECT")


OUTCOMES = ("better", "equal", "undecided", "worse")


@cases(700)
@given(
    judged_states, st.sampled_from(OUTCOMES), st.sampled_from(OUTCOMES), st.integers(0, 3),
    st.booleans(),
)  # fmt: skip
def test_a_worse_comparison_never_gives_a_better_verdict(
    combination: tuple[verdict_table.State, ...],
    whole: str,
    part: str,
    steps: int,
    of_whole: bool,  # noqa: FBT001 - drawn
) -> None:
    """Of the whole or of one test: the worse of the two counts."""
    known = known_of(combination)
    good = GOOD.compared
    assert isinstance(good, CompareRecord)

    def with_outcomes(of_record: str, of_test: str) -> Evidence:
        changed = put(put(good, ("outcome",), of_record), ("speed", 0, "outcome"), of_test)
        return replace(known, compared=changed)

    def down(outcome: str) -> str:
        return OUTCOMES[min(OUTCOMES.index(outcome) + steps, 3)]

    after = (down(whole), part) if of_whole else (whole, down(part))
    assert rank(with_outcomes(*after)) >= rank(with_outcomes(whole, part))


@cases(700)
@given(
    judged_states, st.sampled_from(("better", "equal")), st.floats(-0.2, 0.2), st.floats(0, 0.1),
    st.floats(0, 0.2),
)  # fmt: skip
def test_a_comparison_is_never_taken_for_better_than_its_numbers(
    combination: tuple[verdict_table.State, ...], said: str, low: float, width: float, loss: float
) -> None:
    """Whatever it calls itself: a slower challenger never gets a better verdict than a faster."""
    known = known_of(combination)
    good = GOOD.compared
    assert isinstance(good, CompareRecord)

    def with_interval(low: float) -> Evidence:
        changed = put(put(good, ("outcome",), said), ("speed", 0, "outcome"), said)
        changed = put(changed, ("speed", 0, "log_ratio_low"), low)
        return replace(known, compared=put(changed, ("speed", 0, "log_ratio_high"), low + width))

    assert rank(with_interval(low - loss)) >= rank(with_interval(low))
    if low + width < math.log(0.97) and known.choice == GOOD.choice:
        assert rank(with_interval(low)) >= VERDICTS.index("REJECT")


@pytest.mark.parametrize(
    ("objective", "speed", "quality", "verdict_"),
    [
        ("speed", "equal", "worse", "PROMOTE"),
        ("speed", "worse", "equal", "REJECT"),
        ("speed", "undecided", "better", "HOLD"),
        ("quality", "worse", "equal", "PROMOTE"),
        ("quality", "better", "worse", "REJECT"),
        ("size", "worse", "worse", "PROMOTE"),
    ],
)
def test_a_quant_of_another_type_may_lose_what_its_objective_does_not_ask_for(
    objective: str, speed: str, quality: str, verdict_: str
) -> None:
    """Q4_K_M for Q8_0 diverges more, by intent: the gates bound that, and the report says so."""
    good = GOOD.compared
    assert isinstance(good, CompareRecord)
    champion = good.champion.model_copy(update={"type": "Q8_0"})
    compared = good.model_copy(
        update={
            "champion": champion,
            "speed": (record_factory.speed_comparison(speed),),
            "quality": record_factory.quality_comparison(quality),
            "outcome": max(speed, quality, key=OUTCOMES.index),
        }
    )
    declared = GOOD.declared.model_copy(update={"objective": objective})
    choice = GOOD.choice
    assert isinstance(choice, ChoiceRecord)
    known = replace(
        GOOD, declared=declared, compared=compared,
        choice=choice.model_copy(update={"objective": objective}),
    )  # fmt: skip

    found = verdict.judge(known)

    assert found.verdict == verdict_
    assert any("takes the place of Q8_0" in note for note in found.notes)
    alike = compared.model_copy(update={"champion": good.champion})
    assert verdict.judge(replace(known, compared=alike)).verdict == {
        "worse": "REJECT", "undecided": "HOLD",
    }.get(max(speed, quality, key=OUTCOMES.index), "PROMOTE")  # fmt: skip


def test_a_limit_that_was_wider_when_it_was_measured_lets_nothing_pass() -> None:
    """A loss of 10 % that was compared with 30 % is worse as soon as 3 % matter."""
    good = GOOD.compared
    assert isinstance(good, CompareRecord)
    (speed,) = good.speed
    lax = {"effect": 0.30, "log_ratio_low": -0.12, "log_ratio_high": -0.09, "outcome": "equal"}
    compared = good.model_copy(
        update={"speed": (speed.model_copy(update=lax),), "outcome": "equal"}
    )
    found = verdict.judge(replace(GOOD, compared=compared))

    assert found.verdict == "REJECT"
    assert "by the limits that are declared now" in found.sentence


@pytest.mark.parametrize("changes", [{"limit_mib": 8_192}, {"margin_mib": 16_000}])
def test_memory_under_load_is_held_against_the_host_as_it_is_declared_now(
    changes: dict[str, int],
) -> None:
    """A host that shrank after the load test, and was only chosen for again, is not served."""
    assert isinstance(GOOD.choice, ChoiceRecord)
    (host,) = GOOD.choice.hosts
    choice = GOOD.choice.model_copy(update={"hosts": (host.model_copy(update=changes),)})
    own = GOOD.declared.hosts[host.host]
    smaller = own.model_copy(
        update={"memory_mib": changes.get("limit_mib", own.memory_mib),
                "margin_mib": changes.get("margin_mib", own.margin_mib)}
    )  # fmt: skip
    declared = GOOD.declared.model_copy(update={"hosts": {host.host: smaller}})
    found = verdict.judge(replace(GOOD, choice=choice, declared=declared))

    assert found.verdict == "INVALID"
    assert found.released == ()
    assert any(each.rule == "load-test" and "memory" in each.clause for each in found.reasons)


def test_what_calls_itself_valid_and_says_why_not_is_not_believed() -> None:
    """A reason beside VALID, in a benchmark or a comparison, is a reason."""
    doubted = {"reasons": ("Another process ran.",)}
    good, measured = GOOD.compared, GOOD.measured[TYPE]
    assert isinstance(good, CompareRecord)
    assert isinstance(measured, BenchmarkRecord)
    compared = put(good, ("validity",), good.validity.model_copy(update=doubted))
    benchmark = put(measured, ("validity",), measured.validity.model_copy(update=doubted))

    assert verdict.judge(replace(GOOD, compared=compared)).verdict == "INVALID"
    assert verdict.judge(replace(GOOD, measured={TYPE: benchmark})).verdict == "INVALID"


def test_of_a_pinned_release_any_other_file_is_a_challenger() -> None:
    """`stable` names an older release: compared has to be with that one, and nothing else."""
    pin = "46b7d5b7b617" + "0" * 52
    declared = GOOD.declared.model_copy(update={"stable": pin, "compare_required": True})
    good = GOOD.compared
    assert isinstance(good, CompareRecord)

    def judged(source: str) -> ModelVerdict:
        champion = good.champion.model_copy(update={"source": source})
        compared = good.model_copy(update={"champion": champion})
        return verdict.judge(replace(GOOD, declared=declared, compared=compared))

    assert judged("release 46b7d5b7b617").verdict == "PROMOTE"
    held = judged(good.champion.source)
    assert held.verdict == "HOLD"
    assert f"compared with {good.champion.source}" in held.sentence
    assert verdict.judge(replace(GOOD, declared=declared, compared=None)).verdict == "HOLD"


def test_a_comparison_with_something_else_than_what_is_served_is_said() -> None:
    """Better than an old commit is not better than what is served: a note says so."""
    good = GOOD.compared
    assert isinstance(good, CompareRecord)
    other = {"source": "HEAD~9", "gguf_sha256": "0" * 64}
    compared = good.model_copy(update={"champion": good.champion.model_copy(update=other)})
    found = verdict.judge(replace(GOOD, compared=compared))

    assert found.verdict == "PROMOTE"
    assert any("HEAD~9, not with the release that is served now" in each for each in found.notes)


# --- what is said -----------------------------------------------------------------------------

SENTENCE = re.compile(r"^\S.* \(MODEL/[A-Za-z0-9_./-]+\.json: \S.*; due: \S.*\)\.$")


def texts(found: ModelVerdict) -> Iterator[str]:
    """Yield everything that a verdict says."""
    yield from (found.sentence, found.next_step, *found.notes)
    for each in found.reasons:
        yield from (each.clause, each.value, each.limit, each.file, each.next_step, each.sentence)
    for host in found.hosts:
        yield from (host.sentence, host.own_sentence, host.next_step, *host.details)


@cases(900)
@given(states)
def test_every_reason_names_value_limit_and_record(
    combination: tuple[verdict_table.State, ...],
) -> None:
    """And forces its verdict: none is worse than its reasons, and none better."""
    found = verdict.judge(known_of(combination))
    counting = [each for each in found.reasons if each.counts]

    for each in found.reasons:
        assert SENTENCE.fullmatch(each.sentence), each.sentence
        assert f"({each.file}: {each.value}; due: {each.limit})" in each.sentence
        assert each.rule
        assert each.next_step.endswith((".", "…"))
    verdicts: list[Verdict] = [each.verdict for each in counting]
    assert found.verdict == verdict.worst("PROMOTE", *verdicts)
    assert found.sentence.startswith(found.verdict.lower())
    assert found.next_step
    assert bool(found.released) == (found.verdict == "PROMOTE")


@cases(300)
@given(states)
def test_equal_evidence_gives_an_equal_verdict(
    combination: tuple[verdict_table.State, ...],
) -> None:
    """No clock, no file and no order of a dictionary is in it."""
    assert verdict.judge(known_of(combination)) == verdict.judge(known_of(combination))


HOSTILE = (
    "a\nb", "a\r\n::error::b", "\x1b[31mred\x1b[0m", "::set-output name=x::y", "##[group]x",
    "\u202eright to left\u2028line", "x" * 5000, "\x00\x07", "  \n\t ",
)  # fmt: skip
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]|::|##\[")


def is_free(place: Place) -> bool:
    """Tell whether any text may stand at a place: no outcome, no verdict, no name of a stage."""
    record = getattr(GOOD, str(place[0]))
    record = record[TYPE] if place[0] in {"quantized", "measured"} else record
    inner = place[2:] if place[0] in {"quantized", "measured"} else place[1:]
    try:
        type(record).model_validate(put(record, inner, "any words").model_dump())
    except ValidationError:
        return False
    return True


FREE_PLACES = [place for place in places(str) if is_free(place)]


@cases(900)
@given(
    states, st.lists(st.tuples(st.sampled_from(FREE_PLACES), st.sampled_from(HOSTILE)), max_size=4)
)
def test_no_text_of_a_record_is_more_than_a_short_line(
    combination: tuple[verdict_table.State, ...], changes: list[tuple[Place, str]]
) -> None:
    """No line break, no colour, no command of a runner; the renderers escape the rest."""
    known = known_of(combination)
    for place, text in changes:
        try:
            known = with_value(known, place, text)
        except (AttributeError, TypeError, KeyError, AssertionError):
            continue  # that record is not there in this state

    for said in texts(verdict.judge(known)):
        assert not CONTROLS.search(said), said
        assert len(said) < 2500


# --- waivers ----------------------------------------------------------------------------------

GATES = ("hold", "license", "gated")


@cases(700)
@given(states, st.sets(st.sampled_from(GATES)), st.sampled_from(["2027-01-30", "2027-01-31"]))
def test_a_waiver_lets_pass_what_it_names_and_nothing_else(
    combination: tuple[verdict_table.State, ...], gates: set[str], until: str
) -> None:
    """Never a REJECT, never an INVALID, never another gate, never after its day."""
    known = known_of(combination)
    waivers = tuple(
        Waiver.model_validate({"gate": gate, "who": "Grace", "why": "seen", "until": until})
        for gate in sorted(gates)
    )
    declared = known.declared.model_copy(update={"waivers": waivers})
    none = replace(known, declared=known.declared.model_copy(update={"waivers": ()}))
    before, after = verdict.judge(none), verdict.judge(replace(known, declared=declared))

    def gate_of(each: verdict.Reason) -> str:
        return "hold" if each.host else each.rule

    for each in after.reasons:
        if each.let_pass:
            assert each.verdict == "HOLD" or before.hosts[0].own_verdict == "HOLD"
            assert gate_of(each) in gates
            assert until >= known.today
    assert {gate.gate for gate in after.waivers} <= gates
    if before.verdict in {"REJECT", "INVALID"}:
        assert after.verdict == before.verdict
    open_ = {gate_of(each) for each in before.reasons if each.verdict == "HOLD"}
    if before.verdict == "HOLD":
        is_settled = open_ <= gates and until >= known.today
        assert after.verdict == ("PROMOTE" if is_settled else "HOLD")


@pytest.mark.parametrize("gate", GATES)
def test_a_waiver_that_ended_is_named_with_its_day(gate: str) -> None:
    """Whoever reads the next step sees whose decision it was."""
    state = {"hold": ("load test", "open"), "license": ("licence", "unknown"),
             "gated": ("licence", "gated")}[gate]  # fmt: skip
    known = verdict_table.evidence(dict([state]))
    waiver = Waiver.model_validate(
        {"gate": gate, "who": "Grace", "why": "seen", "until": "2027-01-30"}
    )
    declared = known.declared.model_copy(update={"waivers": (waiver,)})

    found = verdict.judge(replace(known, declared=declared))

    assert found.verdict == "HOLD"
    assert "The waiver of Grace ended on 2027-01-30." in found.next_step
