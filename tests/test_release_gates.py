"""Nothing is released that a record does not bear out; what a person let pass is named."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from publish_factory import HOSTS, TODAY, change, change_load_test, finished, publish_slice, waiver
from record_factory import (
    MODEL,
    choose_slice,
    engine_id,
    load_gate,
    load_gates,
    load_verdict,
    smoke,
    winner_test,
)

from pipelines import choose, params, records
from pipelines.load_records import LoadTestRecord
from pipelines.release import Composed, Refused, compose
from pipelines.release_records import release_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.params import PublishSlice

AGAIN = f"Run `fleet repro {MODEL}`."


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A checkout that is ready to be published."""
    return finished(tmp_path)


def reasons(at: Layout, today: str = TODAY, **changes: Any) -> tuple[str, ...]:
    """Return why there is no release; nothing if there is one."""
    found = compose(publish_slice(**changes), at, today=today)
    return found.reasons if isinstance(found, Refused) else ()


def made(at: Layout, slice_: PublishSlice | None = None) -> Composed:
    """Compose, and be sure that it was not refused."""
    found = compose(slice_ or publish_slice(), at, today=TODAY)
    assert isinstance(found, Composed), found
    return found


# --- records ----------------------------------------------------------------------------------


def paths(at: Layout) -> list[Path]:
    """Every record that a release needs."""
    stages = ("fetch", "convert", "verify", "calibrate", "choose", "load-test")
    return [
        *(at.model_record(stage, MODEL) for stage in stages),
        *(
            at.quant_record(stage, MODEL, type_)
            for stage in ("quantize", "benchmark")
            for type_ in ("Q8_0", "Q4_K_M")
        ),
    ]


@pytest.mark.parametrize("index", range(10))
def test_without_any_one_record_there_is_no_release(at: Layout, index: int) -> None:
    """Gone, cut, of another version or not JSON: each is named with the next step."""
    path = paths(at)[index]
    whole = path.read_bytes()
    spoilt = {
        "does not exist": None,
        "Invalid JSON": whole[: len(whole) // 2],
        "is not a": b"[]",
        "schema_version": whole.replace(b'"schema_version": 1', b'"schema_version": 2'),
    }
    for said, data in spoilt.items():
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)

        (reason,) = reasons(at)

        assert reason.startswith("Nothing is released without every record: ")
        assert path.name in reason
        assert said in reason
        assert reason.endswith(AGAIN)
        assert str(at.root) not in reason
    path.write_bytes(whole)
    assert not reasons(at)


OTHER = "0" * 64


@pytest.mark.parametrize(
    ("record", "changes", "said"),
    [
        ("fetch", {"model": "other"}, "fetch.json is of another model (other, not tiny-llama)"),
        ("fetch", {"source": "hf:a/b"}, "fetch.json is of another source"),
        ("fetch", {"revision": "0" * 40}, "fetch.json is of another revision (000000000000"),
        ("convert", {"model": "other"}, "convert.json is of another model"),
        ("convert", {"revision": "0" * 40}, "convert.json is of another revision"),
        ("convert", {"llama_cpp_commit": "0" * 40}, "is of another llama.cpp commit"),
        ("convert", {"recipe": 2}, "is of another recipe (1, not 2)"),
        ("calibrate", {"model": "other"}, "calibrate.json is of another model"),
        ("calibrate", {"f16_sha256": OTHER}, "calibrate.json is of another f16 sha256"),
        ("calibrate", {"imatrix": None}, "Q4_K_M.json is of another importance matrix"),
        ("calibrate", {"corpus_sha256": OTHER}, "is of another calibration corpus"),
        ("choose", {"model": "other"}, "choice.json is of another model"),
        ("choose", {"context_tokens": 256}, "choice.json is of another context (256, not 512)"),
    ],
)
def test_a_record_of_something_else_is_refused(
    at: Layout, record: str, changes: dict[str, Any], said: str
) -> None:
    """One sentence each, with what was found, what was due, and the command that settles it."""
    kinds: dict[str, type[records.Record]] = {
        "fetch": records.FetchRecord,
        "convert": records.ConvertRecord,
        "calibrate": records.CalibrateRecord,
        "choose": records.ChoiceRecord,
    }
    change(at.model_record(record, MODEL), kinds[record], **changes)

    found = reasons(at)

    assert any(said in reason and reason.endswith(AGAIN) for reason in found), found


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        ("quantize", {"model": "other"}, "quantize/Q8_0.json is of another model"),
        ("quantize", {"key": "other-Q8_0"}, "quantize/Q8_0.json is of another key"),
        ("quantize", {"type": "Q4_0"}, "quantize/Q8_0.json is of another type (Q4_0, not Q8_0)"),
        ("quantize", {"f16_sha256": OTHER}, "quantize/Q8_0.json is of another f16 sha256"),
        ("quantize", {"imatrix_sha256": OTHER}, "is of another importance matrix"),
        ("quantize", {"recipe": 9}, "is of another recipe"),
        ("benchmark", {"model": "other"}, "benchmark/Q8_0.json is of another model"),
        ("benchmark", {"type": "Q4_0"}, "benchmark/Q8_0.json is of another type"),
        ("benchmark", {"gguf_sha256": OTHER}, "benchmark/Q8_0.json is of another sha256"),
        ("benchmark", {"size_bytes": 7}, "benchmark/Q8_0.json is of another size (7, not "),
        ("benchmark", {"f16_sha256": OTHER}, "benchmark/Q8_0.json is of another f16 sha256"),
        ("benchmark", {"llama_cpp_commit": OTHER}, "is of another llama.cpp commit"),
    ],
)
def test_a_quant_of_something_else_is_refused(
    at: Layout, stage: str, changes: dict[str, Any], said: str
) -> None:
    """Also of a quant that is not the winner: a release holds it as well."""
    kinds: dict[str, type[records.Record]] = {
        "quantize": records.QuantizeRecord,
        "benchmark": records.BenchmarkRecord,
    }
    change(at.quant_record(stage, MODEL, "Q8_0"), kinds[stage], **changes)

    found = reasons(at)

    assert any(said in reason for reason in found), found


def test_a_file_that_was_built_again_is_refused_until_all_speak_of_it(at: Layout) -> None:
    """Benchmark, choice and load test are of the old bytes: each says so."""
    path = at.quant_record("quantize", MODEL, "Q8_0")
    built = records.read(path, records.QuantizeRecord)
    change(path, records.QuantizeRecord, gguf=built.gguf.model_dump() | {"sha256": OTHER})

    found = " ".join(reasons(at))

    assert "benchmark/Q8_0.json is of another sha256" in found
    assert "load-test.json, Q8_0 is of another sha256" in found
    assert "choice.json, Q8_0 is of another sha256" in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": 4}, "number of slots (1, not 4)"),
        ({"kv_type": "q8_0"}, "type of the key-value cache (f16, not q8_0)"),
    ],
)
def test_what_is_declared_now_must_be_what_was_served(
    at: Layout, changes: dict[str, Any], said: str
) -> None:
    """`fleet publish` by hand after an edit of params.yaml publishes nothing untested."""
    found = reasons(at, serving=params.Serving(**changes))

    assert any(said in reason for reason in found)
    assert reasons(at, context_tokens=1024)
    assert reasons(at, modelfile="modelfiles/other.Modelfile.j2")
    assert reasons(at, revision="0" * 40)
    assert reasons(at, source="hf:owner/other")


def test_another_set_of_quants_than_was_chosen_from_is_refused(at: Layout) -> None:
    """A line less in params.yaml is chosen again before it is released."""
    found = reasons(at, types=("Q4_K_M",))

    said = "choice.json speaks of other quants than are declared, on host local"
    assert any(reason == f"{said}. {AGAIN}" for reason in found)


def test_a_choice_that_was_edited_is_refused(at: Layout) -> None:
    """A winner that did not pass, a pass without a file, a pass of a doubted measurement."""
    path = at.model_record("choose", MODEL)
    choice = records.read(path, records.ChoiceRecord)
    (host,) = choice.hosts

    def altered(type_: str, **changes: Any) -> list[Any]:
        candidates = [
            one.model_copy(update=changes if one.type == type_ else {}) for one in host.candidates
        ]
        return [host.model_copy(update={"candidates": tuple(candidates)})]

    change(path, records.ChoiceRecord, hosts=altered("Q4_K_M", verdict="REJECT"))
    assert any("names Q4_K_M as winner, which did not pass" in each for each in reasons(at))
    change(path, records.ChoiceRecord, hosts=altered("Q8_0", gguf_sha256=None))
    assert any("lets Q8_0 pass without saying which file" in each for each in reasons(at))
    records.write(path, choice)
    benchmark = at.quant_record("benchmark", MODEL, "Q8_0")
    measured = records.read(benchmark, records.BenchmarkRecord)
    invalid = measured.validity.model_dump() | {"verdict": "INVALID", "reasons": ("busy",)}
    change(benchmark, records.BenchmarkRecord, validity=invalid)
    assert any("lets Q8_0 pass, whose measurement is INVALID" in each for each in reasons(at))


# Digests by which nothing is released or told apart: the environment of a measurement, and the
# prompts that were compared.
FREE = {"env_id", "golden.sha256"}


def digests_in(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the place of every digest in a record."""
    if isinstance(value, dict):
        return [each for key, inner in value.items() for each in digests_in(inner, (*place, key))]
    if isinstance(value, list):
        return [each for i, inner in enumerate(value) for each in digests_in(inner, (*place, i))]
    is_digest = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", value)
    return [place] if is_digest else []


def test_no_digest_in_any_record_can_be_another_one(at: Layout) -> None:
    """Each of them is compared with what it names: whichever is changed, nothing is released."""
    count = 0
    for path in paths(at):
        whole = path.read_bytes()
        for place in digests_in(json.loads(whole)):
            if {str(place[-1]), ".".join(map(str, place[-2:]))} & FREE:
                continue
            changed = inner = json.loads(whole)
            for step in place[:-1]:
                inner = inner[step]
            inner[place[-1]] = "0" * len(inner[place[-1]])
            path.write_text(json.dumps(changed))
            assert reasons(at), (path, place)
            count += 1
        path.write_bytes(whole)
    assert count > 30
    assert not reasons(at)


def test_a_choice_of_other_numbers_than_were_measured_is_refused(at: Layout) -> None:
    """A benchmark that was run again is chosen from again."""
    path = at.quant_record("benchmark", MODEL, "Q8_0")
    measured = records.read(path, records.BenchmarkRecord)
    quality = measured.quality.model_dump() | {"same_top": 0.5}
    change(path, records.BenchmarkRecord, quality=quality)

    assert any("choice.json is older than benchmark/Q8_0.json" in reason for reason in reasons(at))
    change(path, records.BenchmarkRecord, speed=())
    assert any("benchmark/Q8_0.json holds no speed" in reason for reason in reasons(at))


# --- verdicts ---------------------------------------------------------------------------------


def spoil_invalid(at: Layout) -> None:
    """The load test is not to be trusted."""
    tested = records.read(at.model_record("load-test", MODEL), LoadTestRecord)
    one = tested.winners[0].model_copy(update={"invalid": ("another process ran",)})
    said = load_verdict(verdict="INVALID", sentence="another process ran")
    change_load_test(at, winners=(one,), verdicts=(said,))


def spoil_hold(at: Layout) -> None:
    """An interval on both sides of its limit."""
    tested = records.read(at.model_record("load-test", MODEL), LoadTestRecord)
    gates = load_gates(outcome="INCONCLUSIVE", low=0.90, sentence="95 of 100 requests kept all")
    one = tested.winners[0].model_copy(update={"gates": gates})
    change_load_test(at, winners=(one,), verdicts=(load_verdict(verdict="HOLD"),))


def spoil_reject(at: Layout) -> None:
    """A level that was missed."""
    tested = records.read(at.model_record("load-test", MODEL), LoadTestRecord)
    gates = load_gates(outcome="FAIL", value=0.5, sentence="50 of 100 requests kept all")
    one = tested.winners[0].model_copy(update={"gates": gates})
    change_load_test(at, winners=(one,), verdicts=(load_verdict(verdict="REJECT"),))


def spoil_stand_in(at: Layout) -> None:
    """Another engine than was declared."""
    change_load_test(at, engine=engine_id(kind="llama-server", declared=False).model_dump())


def test_invalid_is_never_released(at: Layout) -> None:
    """No waiver lets a measurement pass that is not to be trusted."""
    spoil_invalid(at)
    everything = tuple(waiver(gate) for gate in ("hold", "license", "gated"))

    (reason,) = reasons(at, waivers=everything)

    assert reason.startswith("Host local is INVALID: ")
    assert "another process ran" in reason
    assert f"`fleet repro {MODEL}` measures again" in reason


@pytest.mark.parametrize("spoil", [spoil_hold, spoil_stand_in])
def test_hold_is_refused_unless_somebody_lets_it_pass(
    at: Layout, spoil: Callable[[Layout], None]
) -> None:
    """The sentence names the open question, and the key under which to answer it."""
    spoil(at)

    (reason,) = reasons(at)
    found = made(at, publish_slice(waivers=(waiver("hold"),)))

    assert reason.startswith("local: HOLD: Q4_K_M is chosen, but ")
    assert f"waiver of gate `hold` in models.{MODEL}.waivers" in reason
    assert [each.gate for each in found.release.waivers] == ["hold"]
    assert found.release.hosts["local"].verdict == "HOLD"
    assert found.release.stable_quant == "Q4_K_M"


def test_a_waiver_of_something_else_does_not_help(at: Layout) -> None:
    """One gate, one waiver."""
    spoil_hold(at)

    assert reasons(at, waivers=(waiver("license"), waiver("gated")))


def test_a_waiver_counts_until_its_day_and_no_longer(at: Layout) -> None:
    """On its last day it does; a day later the refusal says whose waiver ended."""
    spoil_hold(at)
    waivers = (waiver("hold", until="2027-01-31"),)

    assert not reasons(at, "2027-01-31", waivers=waivers)
    (reason,) = reasons(at, "2027-02-01", waivers=waivers)
    assert "The waiver of Ada Lovelace ended on 2027-01-31." in reason


def test_reject_everywhere_is_refused(at: Layout) -> None:
    """With the sentence of the verdict, and no waiver."""
    spoil_reject(at)

    (reason,) = reasons(at, waivers=(waiver("hold"),))

    assert reason.startswith("No host is PROMOTE: reject: Q4_K_M is chosen, but ")


def test_reject_for_one_host_does_not_keep_back_another(tmp_path: Path) -> None:
    """The release says for whom it is and for whom not."""
    hosts = {"big": {"memory_mib": 2048}, "small": {"memory_mib": 1025, "margin_mib": 1024}}
    at = finished(tmp_path, hosts=hosts)

    found = made(at, publish_slice(hosts=hosts)).release

    assert {name: one.verdict for name, one in found.hosts.items()} == {
        "big": "PROMOTE",
        "small": "REJECT",
    }
    assert found.hosts["small"].winner is None
    assert found.stable_quant == "Q4_K_M"


def test_one_invalid_host_keeps_back_all(tmp_path: Path) -> None:
    """Numbers that are not to be trusted are nobody's numbers."""
    hosts = {"big": {"memory_mib": 2048}, "other": {"memory_mib": 4096}}
    at = finished(tmp_path, hosts=hosts)
    assert not reasons(at, hosts=hosts)
    change_load_test(at, verdicts=(load_verdict("big"),))

    found = reasons(at, hosts=hosts)

    assert [reason.split(":")[0] for reason in found] == ["Host other is INVALID"]


def test_a_hold_without_a_choice_releases_nothing_even_if_it_is_let_pass(at: Layout) -> None:
    """There is no file that `stable` could mean."""
    path = at.model_record("choose", MODEL)
    (host,) = records.read(path, records.ChoiceRecord).hosts
    undecided = host.model_copy(
        update={
            "winner": None,
            "verdict": "HOLD",
            "sentence": "hold: two are as good",
            "candidates": tuple(
                one.model_copy(update={"verdict": "PASS"}) for one in host.candidates
            ),
        }
    )
    change(path, records.ChoiceRecord, hosts=(undecided,))

    (reason,) = reasons(at, waivers=(waiver("hold"),))

    assert reason.startswith("No host is PROMOTE: hold: two are as good.")


def test_nothing_chosen_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """A gate that no quant keeps."""
    at = finished(tmp_path)
    gates = {"max_kld_mean_nats": 1e-9}
    chosen = choose.run(choose_slice(("Q8_0", "Q4_K_M"), gates=gates, hosts=HOSTS), at)
    records.write(at.model_record("choose", MODEL), chosen)

    (reason,) = reasons(at, gates=gates)

    assert reason.startswith("No host is PROMOTE: ")
    assert reason.endswith("`fleet report` says what kept each quant out.")


def test_a_quant_that_failed_its_smoke_is_left_out_even_if_the_hold_is_let_pass(
    at: Layout,
) -> None:
    """A waiver of the open question brings no file in that did not load."""
    failed = smoke("Q8_0", served=None, outcome="FAIL", ok_count=0, sentence="it did not load")
    said = load_verdict(verdict="HOLD", sentence="Q8_0: it did not load")
    change_load_test(at, smokes=(failed,), verdicts=(said,))

    assert any("it did not load" in reason for reason in reasons(at))
    found = made(at, publish_slice(waivers=(waiver("hold"),))).release
    assert [quant.type for quant in found.quants] == ["Q4_K_M"]
    assert {file.type for file in found.files} == {None, "Q4_K_M"}


def test_a_quant_that_failed_elsewhere_at_more_than_levels_is_left_out(tmp_path: Path) -> None:
    """It won for one host and cannot hold a conversation; it passed for another host as well."""
    hosts = {"big": {"memory_mib": 2048}, "other": {"memory_mib": 4096}}
    at = finished(tmp_path, hosts=hosts)
    path = at.model_record("choose", MODEL)
    choice = records.read(path, records.ChoiceRecord)
    swapped = choice.hosts[0].model_copy(
        update={
            "winner": "Q8_0",
            "candidates": tuple(
                one.model_copy(update={"verdict": "CHOSEN" if one.type == "Q8_0" else "PASS"})
                for one in choice.hosts[0].candidates
            ),
        }
    )
    change(path, records.ChoiceRecord, hosts=(swapped, choice.hosts[1]))
    tested = records.read(at.model_record("load-test", MODEL), LoadTestRecord)
    good = tested.winners[0].model_copy(
        update={"hosts": ("other",), "gates": load_gates(("other",))}
    )
    bad = winner_test("Q8_0", ("big",), served=tested.smokes[0].served)
    said = (
        load_verdict("big", "Q8_0", verdict="REJECT", sentence="it answers nothing"),
        load_verdict("other", "Q4_K_M"),
    )
    for failures, types in (((), {"Q8_0", "Q4_K_M"}), (("it answers nothing",), {"Q4_K_M"})):
        one = bad.model_copy(update={"failures": failures})
        change_load_test(at, winners=(good, one), smokes=(), verdicts=said)

        found = made(at, publish_slice(hosts=hosts)).release

        assert found.hosts["big"].verdict == "REJECT"
        assert {quant.type for quant in found.quants} == types
        assert found.stable_quant == "Q4_K_M"


def test_a_quant_that_was_never_served_holds_the_release(at: Layout) -> None:
    """It passed its gates, so a release would hold it."""
    change_load_test(at, smokes=())

    assert any("Q8_0 passed its gates and was not served" in reason for reason in reasons(at))


def test_a_quant_that_missed_its_gates_is_not_released(at: Layout) -> None:
    """A release holds what was chosen and what passed, nothing else."""
    path = at.quant_record("benchmark", MODEL, "Q8_0")
    measured = records.read(path, records.BenchmarkRecord)
    quality = measured.quality.model_dump() | {"kld_mean_nats": 0.5}
    change(path, records.BenchmarkRecord, quality=quality)
    chosen = choose.run(choose_slice(("Q8_0", "Q4_K_M"), hosts=HOSTS), at)
    records.write(at.model_record("choose", MODEL), chosen)

    found = made(at).release

    assert [quant.type for quant in found.quants] == ["Q4_K_M"]


def test_gates_that_nobody_judged_hold_nothing_back_by_silence(at: Layout) -> None:
    """A load test without the declared levels is INVALID, so there is no release."""
    change_load_test(at, winners=(winner_with((load_gate("goodput"),), at),))

    assert any("INVALID" in reason for reason in reasons(at))


def winner_with(gates: tuple[Any, ...], at: Layout) -> Any:
    """Return the winner's test with other gates."""
    tested = records.read(at.model_record("load-test", MODEL), LoadTestRecord)
    return winner_test("Q4_K_M", served=tested.winners[0].served, gates=gates)


# --- licence and access -----------------------------------------------------------------------


def license_is(at: Layout, stated: str | None) -> None:
    """Let upstream state a licence."""
    change(at.model_record("fetch", MODEL), records.FetchRecord, license=stated)


@pytest.mark.parametrize("stated", [None, "other", "unknown", "Other", ""])
def test_an_unknown_licence_is_refused_until_somebody_declares_one(
    at: Layout, stated: str | None
) -> None:
    """The key to declare it under is named."""
    license_is(at, stated)

    (reason,) = reasons(at)
    found = made(at, publish_slice(license="llama3.2"))

    assert reason.startswith("Upstream states no licence. Read it and declare what you accept as ")
    assert f"models.{MODEL}.license" in reason
    assert found.release.license.id == "llama3.2"
    assert found.release.waivers == ()
    assert not reasons(at, waivers=(waiver("license"),))


def test_a_declared_licence_that_upstream_contradicts_is_refused(at: Layout) -> None:
    """Who accepted one licence has not accepted another."""
    (reason,) = reasons(at, license="mit")

    assert f"models.{MODEL}.license accepts mit, but upstream states apache-2.0" in reason
    assert not reasons(at, license="apache-2.0")


def released_before(at: Layout, **license_: Any) -> None:
    """Leave a release as the one before, of another licence."""
    before = made(at).release
    altered = before.license.model_copy(update=license_)
    at.release(MODEL).write_bytes(release_bytes(before.model_copy(update={"license": altered})))


def test_a_licence_that_has_changed_is_refused_until_it_was_read(at: Layout) -> None:
    """The old and the new one are named; declaring the new one settles it."""
    released_before(at, id="mit")

    (reason,) = reasons(at)

    assert "The licence has changed from mit to apache-2.0 since the release before" in reason
    assert not reasons(at, license="apache-2.0")
    assert not reasons(at, waivers=(waiver("license"),))


def test_a_text_that_has_changed_under_the_same_name_is_refused(at: Layout) -> None:
    """A licence is its text; upstream's own name for it confirmed is what accepts another."""
    released_before(at, files={"LICENSE": OTHER})

    (reason,) = reasons(at)

    assert "The text of the licence has changed since the release before" in reason
    assert not reasons(at, license="apache-2.0")
    license_is(at, None)
    released_before_of_none = reasons(at, license="apache-2.0")
    assert any("The text of the licence has changed" in each for each in released_before_of_none)


def test_a_licence_that_was_let_pass_is_not_accepted_by_that(at: Layout) -> None:
    """Equal inputs give the release again, waiver and all; when it has ended, nothing new."""
    released_before(at, id="mit")
    by_waiver = made(at, publish_slice(waivers=(waiver("license"),)))
    at.release(MODEL).write_bytes(by_waiver.data)

    again = made(at, publish_slice(waivers=(waiver("license"),)))
    (reason,) = reasons(at, today="2027-02-01", waivers=(waiver("license"),))

    assert again.data == by_waiver.data
    assert "let pass by Ada Lovelace for the release before" in reason
    assert "ended on 2027-01-31" in reason
    assert not reasons(at, license="apache-2.0")


@pytest.mark.parametrize("gated", ["auto", "manual"])
def test_a_gated_upstream_is_refused_unless_somebody_lets_it_pass(at: Layout, gated: str) -> None:
    """Its files are for those who agreed to its terms, not for everybody."""
    change(at.model_record("fetch", MODEL), records.FetchRecord, gated=gated)

    (reason,) = reasons(at)
    found = made(at, publish_slice(waivers=(waiver("gated"),)))

    assert reason.startswith(f"path:examples/{MODEL} is gated ({gated}): ")
    assert f"waiver of gate `gated` in models.{MODEL}.waivers" in reason
    assert [each.gate for each in found.release.waivers] == ["gated"]


def test_all_that_stands_against_a_release_is_said_at_once(at: Layout) -> None:
    """Nobody has to run it four times to hear of four things."""
    spoil_hold(at)
    change(at.model_record("fetch", MODEL), records.FetchRecord, gated="auto", license=None)

    found = reasons(at)

    assert len(found) == 3
    assert not reasons(at, waivers=tuple(waiver(each) for each in ("hold", "license", "gated")))
