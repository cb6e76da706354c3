"""The report: it says what the records say, in three forms, and nothing that a stranger wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from markdown_it import MarkdownIt
from record_factory import (
    LEVELS,
    MODEL,
    benchmark_record,
    calibration,
    choose_slice,
    compare_record,
    degenerate,
    engine_id,
    eval_result,
    evaluate_record,
    fetch_record,
    golden,
    judge_slice,
    load_gate,
    load_gates,
    load_run,
    load_test_record,
    load_verdict,
    machine_id,
    quantize_record,
    served,
    sha256,
    side,
    smoke,
    speed_comparison,
    validity,
    verify_record,
    winner_test,
    write_model,
)

from pipelines import choose, compare_words, records, render, report
from pipelines.compare_records import PairSample
from pipelines.errors import GateError
from pipelines.layout import Layout
from pipelines.load_records import GoldenPrompt
from pipelines.params import ReportSlice
from pipelines.release_records import PublishRecord, ReleaseWaiver

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from pipelines.load_records import LoadTestRecord
    from pipelines.params import JudgeSlice
    from pipelines.report_tree import Report

FLEET: dict[str, dict[str, float]] = {
    "Q8_0": {"decode_tok_s": 412, "kld_mean_nats": 0.0014, "memory_mib": 60, "size_mib": 5},
    "Q5_K_M": {"decode_tok_s": 520, "kld_mean_nats": 0.0108, "memory_mib": 50, "size_mib": 4},
    "Q4_K_M": {"decode_tok_s": 598, "kld_mean_nats": 0.0313, "memory_mib": 42, "size_mib": 3},
    "Q2_K": {"decode_tok_s": 1234, "kld_mean_nats": 0.31, "memory_mib": 30, "size_mib": 2},
}


def write_fleet(
    at: Layout,
    model: str = MODEL,
    numbers: Mapping[str, Mapping[str, float]] | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    **kwargs: Any,
) -> JudgeSlice:
    """Write records and a choice of one model; return by what it is judged."""
    numbers = FLEET if numbers is None else numbers
    built, measured = [], []
    for type_, values in numbers.items():
        built.append(quantize_record(type_, model, size_mib=values["size_mib"]))
        fields: dict[str, Any] = {**values, **(changes or {}).get(type_, {})}
        if fields.get("missing") is None:
            measured.append(benchmark_record(type_, model, **fields))
    write_model(at, model, quantized=built, measured=measured)
    chosen = choose.run(choose_slice(numbers, model, **kwargs), at)
    records.write(at.model_record("choose", model), chosen)
    winners = {host.host: host.winner for host in chosen.hosts if host.winner is not None}
    others = (type_ for type_ in numbers if type_ not in winners.values())
    smokes = tuple(smoke(type_, served=served(type_, model)) for type_ in others)
    slos = {host.host: LEVELS for host in chosen.hosts}
    tested = load_test_record(winners, model, smokes=smokes, slos=slos)
    records.write(at.model_record("load-test", model), tested)
    return judge_slice(numbers, model, **kwargs)


def small_report(tmp_path: Path, **kwargs: Any) -> Report:
    """Build the report of one model."""
    at = Layout(tmp_path)
    return report.build(ReportSlice(models={MODEL: write_fleet(at, **kwargs)}), at)


def mixed_fleet(at: Layout) -> ReportSlice:
    """Write four models: promoted, on hold, rejected, and one of which nothing is known."""
    two_hosts = {"workstation": {"vram_mib": 24576}, "laptop": {"vram_mib": 1070}}
    gone: dict[str, dict[str, Any]] = {
        "Q5_K_M": {"missing": True},
        "Q8_0": {"validity": validity("another process ran")},
    }
    long_name = "a-model-with-a-name-as-long-as-a-name-of-a-model-may-become-here"[:63]
    many = {
        f"{kind}{bits}_{size}": {
            "decode_tok_s": 100.0 + 9 * index, "kld_mean_nats": 0.001 * 1.25**index,
            "memory_mib": 20000.0 - 500 * index, "size_mib": 18000.0 - 500 * index,
        }
        for index, (kind, bits, size) in enumerate(
            [("Q", 8, "0"), ("Q", 5, "K_M"), ("Q", 5, "K_S"), ("Q", 5, "1"), ("Q", 5, "0"),
             ("Q", 4, "K_M"), ("Q", 4, "K_S"), ("Q", 4, "1"), ("Q", 4, "0"), ("IQ", 4, "NL"),
             ("IQ", 4, "XS"), ("Q", 3, "K_L"), ("Q", 3, "K_M"), ("IQ", 3, "XXS")]
        )
    }  # fmt: skip
    return ReportSlice(
        models={
            long_name: write_fleet(at, long_name, many, hosts={"big": {"vram_mib": 24576}}),
            "both": write_fleet(at, "both", hosts=two_hosts),
            "held": write_fleet(at, "held", changes=gone),
            "refused": write_fleet(at, "refused", gates={"max_kld_mean_nats": 0.0001}),
            "unknown": judge_slice(["Q8_0"], "unknown"),
        }
    )


# --- what is said -----------------------------------------------------------------------------


def test_the_verdict_comes_first_in_words(tmp_path: Path) -> None:
    """All three forms begin with what to do, before any table."""
    built = small_report(tmp_path)
    words = f"{MODEL}: promote Q4_K_M: the fastest of the 3 quants that pass"

    assert render.terminal(built, 200).startswith(words)
    assert words in render.markdown(built).split("| quant", maxsplit=1)[0]
    assert "promote Q4_K_M: the fastest" in render.html(built).split("<table", maxsplit=1)[0]


def test_numbers_have_three_digits_intervals_and_units(tmp_path: Path) -> None:
    """Values are rounded to what is known, with separators, intervals and units in the head."""
    text = render.terminal(small_report(tmp_path), 200)

    assert "1,230 [1,220, 1,250]" in text
    assert "598 [592, 604]" in text
    assert re.search(r"tok/s +tok/s +nats", text)


def test_every_loser_gets_its_sentence(tmp_path: Path) -> None:
    """Each quant that was not chosen is explained in each form."""
    built = small_report(tmp_path)
    sentence = "mean divergence 0.310 nats is over the limit 0.06 (max_kld_mean_nats)"

    assert f"Q2_K: {sentence}" in render.terminal(built, 400)
    assert f"- Q2_K: {sentence}" in render.markdown(built)
    assert sentence in unescape(render.html(built)).replace("\u00a0", " ")


def test_hosts_that_differ_are_told_apart(tmp_path: Path) -> None:
    """With two hosts each gets its verdict, and a sentence says for which host it holds."""
    hosts = {"big": {"vram_mib": 4000}, "small": {"vram_mib": 1070}}

    text = render.terminal(small_report(tmp_path, objective="quality", hosts=hosts), 400)

    assert f"{MODEL} on big: promote Q8_0" in text
    assert f"{MODEL} on small: promote Q4_K_M" in text
    assert "Q8_0 on small: 14 MiB over the 1,070 MiB of host small" in text


def test_a_missing_record_is_shown_with_its_reason(tmp_path: Path) -> None:
    """A model of which nothing is there yet has a row for each quant, and is no fault of it."""
    at = Layout(tmp_path)
    built = report.build(ReportSlice(models={"new": judge_slice(["Q8_0"], "new")}), at)

    text = render.terminal(built, 120)

    assert "new: nothing is measured yet." in text
    assert "1 model: 1 not measured yet." in text
    assert "invalid" not in text.lower()
    assert ">not measured yet</span>" in render.html(built)
    assert "1 model: 1 not measured yet." in render.markdown(built)
    assert report.worst_verdict(built) == "INVALID"
    assert "Q8_0: not built: Q8_0.json does not exist." in text
    assert str(tmp_path) not in render.html(built)


def test_numbers_that_are_not_to_be_trusted_are_not_shown(tmp_path: Path) -> None:
    """An INVALID measurement shows its reason and no speed, but what no load can change."""
    changes = {
        "Q5_K_M": {
            "decode_tok_s": 87654.0,
            "kld_mean_nats": 0.0777,
            "validity": validity("Another process ran."),
        }
    }
    built = small_report(tmp_path, changes=changes)

    for text in (render.terminal(built, 300), render.markdown(built), render.html(built)):
        assert "INVALID, since another process ran; size, divergence and memory do not" in text
        assert "87,7" not in text
        assert "0.0777" in text
        assert not re.search(r"[a-z]\.\.(?!\w)", text)
    assert all("Q5_K_M" not in drawing for drawing in render.charts(built.models[0], 1))


def test_what_the_certificate_notes_is_told_beside_the_method(tmp_path: Path) -> None:
    """One line for each quant that has a note, among how it was measured; none for the others."""
    note = "Other programs used 0.4 cores\n# on average"
    noted = validity().model_copy(update={"notes": (note,)})
    built = small_report(tmp_path, changes={"Q4_K_M": {"validity": noted}})
    lines = [line for line in built.models[0].method if "VALID" in line]

    assert lines == ["Q4_K_M: VALID. Other programs used 0.4 cores # on average."]
    assert "Other programs used 0.4 cores" in render.markdown(built)


def test_a_choice_older_than_its_files_is_invalid(tmp_path: Path) -> None:
    """A choice that speaks of other bytes, or of other quants, is not passed on."""
    at = Layout(tmp_path)
    quants = write_fleet(at)
    other = quantize_record("Q8_0", gguf=quantize_record("Q8_0", "other").gguf)

    fewer = ReportSlice(models={MODEL: judge_slice(["Q8_0"])})
    assert report.worst_verdict(report.build(fewer, at)) == "INVALID"
    records.write(at.quant_record("quantize", MODEL, "Q8_0"), other)
    assert report.worst_verdict(report.build(ReportSlice(models={MODEL: quants}), at)) == "INVALID"


def test_a_choice_older_than_its_measurements_is_invalid(tmp_path: Path) -> None:
    """A quant that was measured again, to another result or to none, is not promoted by habit."""
    at = Layout(tmp_path)
    slice_ = ReportSlice(models={MODEL: write_fleet(at)})
    path = at.quant_record("benchmark", MODEL, "Q4_K_M")
    fresh = records.read(path, records.BenchmarkRecord)
    verdicts = [report.worst_verdict(report.build(slice_, at))]
    for change in (
        {"validity": validity("busy")},
        {"quality": fresh.quality.model_copy(update={"same_top": 0.5})},
    ):
        records.write(path, fresh.model_copy(update=change))
        verdicts.append(report.worst_verdict(report.build(slice_, at)))

    assert verdicts == ["PROMOTE", "INVALID", "INVALID"]


def test_strict_is_red_unless_all_is_promoted(tmp_path: Path) -> None:
    """`--strict` fails with exit code 5 and the verdicts, and is silent when all is well."""
    at = Layout(tmp_path)
    good = ReportSlice(models={MODEL: write_fleet(at)})
    bad = mixed_fleet(at)

    report.require_promote(good, at)
    with pytest.raises(GateError, match="refused: reject") as failure:
        report.require_promote(bad, at)
    assert failure.value.exit_code == 5
    with pytest.raises(GateError):
        report.require_promote(ReportSlice(models={}), at)


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    """Nothing depends on the clock or the directory, so a second run changes no file."""
    outputs = []
    for name in ("one", "two"):
        at = Layout(tmp_path / name)
        report.run(mixed_fleet(at), at)
        outputs.append((at.report_markdown.read_bytes(), at.report_html.read_bytes()))

    assert outputs[0] == outputs[1]


def test_only_the_chosen_file_is_proved_by_a_command(tmp_path: Path) -> None:
    """The commands make the model again and check the digest of what was chosen."""
    text = render.markdown(small_report(tmp_path))

    assert f"fleet repro {MODEL}\n" in text
    digest = sha256(f"{MODEL}-Q4_K_M.gguf")
    assert f"echo '{digest}  work/{MODEL}/gguf/{MODEL}-Q4_K_M.gguf' | sha256sum --check" in text


# --- the load test ----------------------------------------------------------------------------


def load_report(tmp_path: Path, *, hosts: Iterable[str] = ("local",), **changes: Any) -> Report:
    """Build the report of one model whose load test of Q4_K_M is special in `changes`."""
    at = Layout(tmp_path)
    hosts = list(hosts)
    declared: dict[str, Any] = {"hosts": {host: {"vram_mib": 4000} for host in hosts}}
    quants = write_fleet(at, **declared)
    record = {name: changes.pop(name) for name in ("smokes", "slos") if name in changes}
    if "slos" in record:
        quants = judge_slice(FLEET, slos=record["slos"], **declared)
    tested = load_test_record(
        dict.fromkeys(hosts, "Q4_K_M"),
        winners=(winner_test("Q4_K_M", hosts, **changes),),
        **record,
    )
    records.write(at.model_record("load-test", MODEL), tested)
    return report.build(ReportSlice(models={MODEL: quants}), at)


def forms(built: Report) -> tuple[str, str, str]:
    """Render in all three forms, as plain text without what merely escapes or breaks lines."""
    terminal = " ".join(render.terminal(built, 200).split())
    page = re.sub(r"<[^>]*>", " ", re.sub(r"<(style|script).*?</\1>", "", render.html(built)))
    return (
        terminal,
        unescape(render.markdown(built)).replace("\u200b", ""),
        " ".join(unescape(page).replace("\u00a0", " ").split()),
    )


def test_the_levels_are_told_in_words(tmp_path: Path) -> None:
    """How many requests kept which levels, in what interval, and what was needed."""
    built = load_report(tmp_path)
    words = "100 of 100 requests kept ttft <= 300 ms, tpot <= 50 ms: 96.3-100 %, 95 % needed"

    for text in forms(built):
        assert words in text
        assert "Q4_K_M on Ollama 0.33.0 with llama.cpp b6500" in text
        assert "The highest concurrency that keeps the levels is 4, the most that was tried" in text
        assert "2 of 2 golden prompts are equal to those of upstream" in text
        assert "2 of 24 answers are degenerate" in text
        assert "adds 0.900 ms at p99 to 4 streams of a null server" in text


def test_each_run_is_a_row_and_a_missing_percentile_a_dash(tmp_path: Path) -> None:
    """The ladder and the open run stand in one table; a p95 of 40 requests is not made up."""
    _, text, _ = forms(load_report(tmp_path))

    assert "| 1 at a time | 40 | 40 | 20.0 | — | 1.90 | 140 | 510 | 8.00 | 100 % |" in text
    assert "| 4 at a time | 40 | 40 | 80.0 |" in text
    assert "| at random, 5.50/s | 100 | 100 |" in text


def test_failed_requests_are_told_by_class(tmp_path: Path) -> None:
    """Errors have a column of their own and are named."""
    bad = load_run(
        None, 100, ok_count=97, errors={"timeout": 2, "http_5xx": 1}, good_count={"local": 96}
    )

    for text in forms(load_report(tmp_path, runs=(load_run(1), load_run(2), bad))):
        assert "2 timeout, 1 http_5xx" in text
        assert "96.0 %" in text


def test_an_open_question_says_how_many_requests_decide_it(tmp_path: Path) -> None:
    """An interval on both sides of its limit is shown as such, with digits that show the side."""
    gate = load_gate(
        value=0.98, low=0.94996, high=0.99, outcome="INCONCLUSIVE", more_requests=310,
        sentence="too few requests",
    )  # fmt: skip
    others = [load_gate(name) for name in ("ttft", "tpot", "memory")]
    built = load_report(tmp_path, gates=(gate, *others))

    assert report.worst_verdict(built) == "HOLD"
    for text in forms(built):
        assert "94.996-99.0 %, 95 % needed; about 310 more requests would decide" in text
        assert re.search("(?i)inconclusive", text)


def test_the_highest_concurrency_is_the_last_before_a_miss(tmp_path: Path) -> None:
    """A step beyond the first one that misses the levels does not count."""
    runs = (
        load_run(1), load_run(2), load_run(4, good_count={"local": 20}), load_run(8),
        load_run(None, 100),
    )  # fmt: skip
    none = (load_run(1, good_count={"local": 30}), load_run(2), load_run(None, 100))

    some = forms(load_report(tmp_path / "a", runs=runs))[0]
    nothing = forms(load_report(tmp_path / "b", runs=none))[0]

    assert "The highest concurrency that keeps the levels is 2 (40 of 40 requests)." in some
    assert "Not even 1 at a time keeps the levels: 30 of 40 requests did." in nothing


def test_hosts_with_other_levels_are_told_apart(tmp_path: Path) -> None:
    """One file, two hosts, two sets of levels: each gets its share and its sentence."""
    hosts = ("big", "small")
    runs = (
        load_run(1, hosts=hosts), load_run(2, hosts=hosts),
        load_run(None, 100, hosts=hosts, good_count={"big": 100, "small": 80}),
    )  # fmt: skip
    missed = load_gate(
        host="small", value=0.8, low=0.711, high=0.867, outcome="FAIL", sentence="80 of 100"
    )
    slos = {
        "big": {"ttft_ms": 300.0, "min_goodput": 0.95},
        "small": {"ttft_ms": 30.0, "min_goodput": 0.95},
    }
    rest = [load_gate(name, "small") for name in ("ttft", "memory")]
    gates = (*load_gates(["big"]), missed, *rest)

    built = load_report(tmp_path, hosts=hosts, runs=runs, gates=gates, slos=slos)

    text = forms(built)[0]
    assert "tiny-llama on big: promote Q4_K_M" in text
    assert "tiny-llama on small: reject: Q4_K_M is chosen, but 80 of 100" in text
    assert "on small: 80 of 100 requests kept ttft <= 30 ms: 71.1-86.7 %, 95 % needed" in text
    assert "| good, on big | good, on small |" in forms(built)[1]
    assert "| 100 % | 80.0 % |" in forms(built)[1]


def test_a_wrong_prompt_is_shown_where_it_differs(tmp_path: Path) -> None:
    """The gate fails with the lines that differ, readable in every form."""
    wrong = GoldenPrompt(
        id="system", outcome="FAIL", sentence="Ollama renders it otherwise.",
        diff=("- <|im_start|>system↵", "+ ··[INST] <<SYS>>↵"),
    )  # fmt: skip
    built = load_report(tmp_path, golden=golden(prompts=(*golden().prompts, wrong)))

    assert report.worst_verdict(built) == "REJECT"
    for text in forms(built):
        assert "2 of 3 golden prompts are equal to those of upstream; system: Ollama" in text
        assert "- <|im_start|>system↵" in text
        assert "+ ··[INST] <<SYS>>↵" in text


def test_times_of_a_client_that_was_too_slow_are_not_shown(tmp_path: Path) -> None:
    """An INVALID test shows its reason and what was compared as text, but no time and no chart."""
    slow = tuple(load_run(many, ttft_ms=87654.0) for many in (1, 2, None))
    built = load_report(tmp_path, runs=slow, invalid=("the client was too slow by 12 ms",))

    assert report.worst_verdict(built) == "INVALID"
    for text in forms(built):
        assert "he client was too slow by 12 ms" in text
        assert "87,7" not in text
        assert "golden prompts are equal" in text
        assert "requests kept" not in text
    assert render.load_charts(built.models[0].tests[0], "m1") == []


def test_without_a_load_test_nothing_is_promoted(tmp_path: Path) -> None:
    """A missing, unreadable or old load test is INVALID, said first, and no old number is shown."""
    at = Layout(tmp_path)
    slice_ = ReportSlice(models={MODEL: write_fleet(at)})
    path = at.model_record("load-test", MODEL)
    said = {}
    path.write_text("{")
    said["unreadable"] = render.terminal(report.build(slice_, at), 200)
    records.write(path, load_test_record({"local": "Q8_0"}))
    said["old"] = render.terminal(report.build(slice_, at), 200)
    path.unlink()
    said["missing"] = render.terminal(report.build(slice_, at), 200)

    for text in said.values():
        assert text.startswith(f"{MODEL}: invalid: Q4_K_M is chosen, but ")
        assert "Load test of" not in text
    assert "load-test.json is not a LoadTestRecord" in said["unreadable"]
    assert "older than the choice: it served Q8_0, not Q4_K_M" in said["old"]
    assert "load-test.json does not exist" in said["missing"]
    with pytest.raises(GateError, match="not served under load"):
        report.require_promote(slice_, at)


# --- releases ---------------------------------------------------------------------------------


def publish_record(**changes: Any) -> PublishRecord:
    """Build what `publish` left of a release."""
    fields: dict[str, Any] = {
        "model": MODEL, "status": "released", "registry": "file:registry",
        "release": sha256("release"), "stable": sha256("release"), "sequence": 1,
        "files_count": 20, "size_bytes": 1 << 20, "reasons": (), "waivers": (),
    }  # fmt: skip
    return PublishRecord(**(fields | changes))


def released_report(tmp_path: Path, *, evidence: bool = True, **changes: Any) -> Report:
    """Build the report of one model with a release of it, older than its records or not."""
    at = Layout(tmp_path)
    quants = write_fleet(at)
    named = {
        f"{name}.json": hashlib.sha256(at.model_record(stage, MODEL).read_bytes()).hexdigest()
        for stage, name in (("choose", "choice"), ("load-test", "load-test"))
    }
    data = json.dumps({"evidence": named if evidence else named | {"choice.json": "0" * 64}})
    at.release(MODEL).write_text(data)
    told = {"release": hashlib.sha256(data.encode()).hexdigest()}
    told["stable"] = told["release"]
    records.write(at.model_record("publish", MODEL), publish_record(**(told | changes)))
    return report.build(ReportSlice(models={MODEL: quants}), at)


def in_every_form(built: Report) -> list[str]:
    """Return the report as text without markup, three times."""
    page = unescape(re.sub(r"<[^>]+>", "", render.html(built)))
    return [render.terminal(built, 400), unescape(render.markdown(built)), page]


def test_the_release_is_told_with_its_id(tmp_path: Path) -> None:
    """At the end in a terminal, under the verdict elsewhere."""
    built = released_report(tmp_path)
    (said,) = built.models[0].released

    assert re.fullmatch(r"released [0-9a-f]{12} \(stable\) in local, file:registry\.", said)
    for text in in_every_form(built):
        assert said[1:] in text
    assert f"{MODEL}: {said}" in render.terminal(built, 400).splitlines()[-2]


def test_a_pinned_release_is_told_beside_the_newest(tmp_path: Path) -> None:
    """What is served is not what was built last."""
    built = released_report(tmp_path, stable=sha256("older"))

    assert built.models[0].released[0].endswith(f"; stable is {sha256('older')[:12]}.")


def test_a_refusal_is_told_with_its_reason_and_its_next_step(tmp_path: Path) -> None:
    """The first reason in full, how many more there are, and what stays stable."""
    why = ("Upstream states no licence. Read it.", "It is gated.")
    built = released_report(tmp_path, status="refused", release=None, reasons=why)

    (said,) = built.models[0].released
    assert said.startswith("not released: Upstream states no licence. Read it.")
    assert "And 1 further reason: publish.json" in said
    for text in in_every_form(built):
        assert "ot released: Upstream states no licence. Read it." in text


def test_a_waiver_is_shown_wherever_the_release_is(tmp_path: Path) -> None:
    """Who let pass what, why, and until when."""
    one = ReleaseWaiver(gate="hold", who="Ada", why="seen", until="2027-01-31")
    built = released_report(tmp_path, waivers=(one,))

    for text in in_every_form(built):
        assert "aiver of `hold` until 2027-01-31 by Ada: seen." in text


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("evidence", "is older than the choice and the load test; `fleet repro tiny-llama`"),
        ("bytes", "release.json is another one than was published"),
        ("gone", "release.json cannot be read"),
        ("record", "publish.json is not a PublishRecord of this version"),
    ],
)
def test_a_release_that_does_not_speak_of_the_records_is_none(
    tmp_path: Path, spoil: str, said: str
) -> None:
    """The report never calls released what is not what the records show."""
    at = Layout(tmp_path)
    released_report(tmp_path, evidence=spoil != "evidence")
    if spoil == "bytes":
        text = at.release(MODEL).read_text()
        at.release(MODEL).write_text(f"{text} ")
    elif spoil == "gone":
        at.release(MODEL).unlink()
    elif spoil == "record":
        at.model_record("publish", MODEL).write_text("{}")

    built = report.build(ReportSlice(models={MODEL: judge_slice(FLEET)}), at)

    (told,) = built.models[0].released
    assert told.startswith("not released: ")
    assert said in told


def test_a_model_that_never_came_so_far_says_nothing_of_releases(tmp_path: Path) -> None:
    """Its verdict says what is missing."""
    assert small_report(tmp_path).models[0].released == ()


def test_the_other_quants_are_told_with_their_smoke(tmp_path: Path) -> None:
    """Each published quant was at least loaded; a smoke of another file counts as none."""
    stale = smoke("Q5_K_M", served=served("Q5_K_M", gguf_sha256=sha256("old file")))

    missing = load_report(tmp_path / "a", smokes=(smoke("Q8_0"),))
    assert "fail: Q5_K_M: was not served" in forms(missing)[0]
    for text in forms(load_report(tmp_path / "b", smokes=(smoke("Q8_0"), stale))):
        assert "Q8_0: loads, renders its prompt and answers 10 of 10 requests" in text
        assert "Q5_K_M: what was served is another file" in text


def test_latency_over_concurrency_is_drawn_for_everybody(tmp_path: Path) -> None:
    """Two drawings with a title and the numbers in words; one concurrency makes none."""
    drawn = render.load_charts(load_report(tmp_path / "a").models[0].tests[0], "m1")
    single = load_report(tmp_path / "b", runs=(load_run(1), load_run(None, 100)))

    assert [re.findall(r'id="(m1-\w+)-title"', text) for text in drawn] == [
        ["m1-latency"], ["m1-throughput"],
    ]  # fmt: skip
    assert "TTFT p50 20.0, 40.0, 80.0" in drawn[0]
    assert "TPOT p50 1.90, 1.90, 1.90" in drawn[0]
    assert render.load_charts(single.models[0].tests[0], "m1") == []


# --- forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_text_fits_its_width(tmp_path: Path, width: int) -> None:
    """No line is longer than the terminal, and colour is there only when asked for."""
    at = Layout(tmp_path)
    built = report.build(mixed_fleet(at), at)

    plain = render.terminal(built, width)

    assert max(map(len, plain.splitlines())) <= width
    assert "\x1b" not in plain
    coloured = render.terminal(built, width, colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert coloured != plain


def test_long_markdown_is_cut_politely(tmp_path: Path) -> None:
    """A large fleet stays below the limit: quants that merely passed go first, and it is said."""
    at = Layout(tmp_path)
    models = {f"model-{index}": write_fleet(at, f"model-{index}") for index in range(12)}
    built = report.build(ReportSlice(models=models), at)
    full = render.markdown(built, limit=10_000_000)

    shorter = render.markdown(built, limit=len(full) // 2)
    shortest = render.markdown(built, limit=1_000)

    assert len(render.markdown(built)) < 60_000
    assert len(shorter) <= len(full) // 2
    assert all(f"{name}: promote Q4_K_M" in shorter for name in models)
    assert len(shortest) <= 1_000
    assert "12 models: 12 promoted" in shortest


HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=http://x.example/y.png>",
    "![i](http://x.example/z.png) [l](javascript:x)",
    "@team please #1 GH-1 www.x.example https://x.example mailto:a@b.example",
    "a | b || c `code` **bold** _em_ ~~gone~~ $x$ <!-- --> </td></table>",
    "``` \n# head\n- list\n> quote\n\n| a |\n|--|\n\x1b[31m::set-output name=x::y ##[group]",
    "'; touch /tmp/x; echo '",
    '" onmouseover="alert(1)',
    "\u202eright to left \u2028 line",
)


def hostile_report(tmp_path: Path, text: str) -> Report:
    """Build a report whose records hold `text` wherever a string is free."""
    at = Layout(tmp_path)
    changes: dict[str, dict[str, Any]] = {
        "Q8_0": {"machine": machine_id(cpu=text, backend=text), "measured_at": text},
        "Q5_K_M": {"validity": validity(text)},
    }
    quants = write_fleet(at, changes=changes)
    fetched = fetch_record(license=text, architecture=text, source=text, revision=text)
    records.write(at.model_record("fetch", MODEL), fetched)
    path = at.model_record("choose", MODEL)
    choice = json.loads(path.read_text())
    choice["notes"] = [text]
    host = choice["hosts"][0]
    host["sentence"], host["binding"] = text, text
    host["candidates"][0]["sentence"] = text
    path.write_text(json.dumps(choice))
    records.write(at.model_record("load-test", MODEL), hostile_load_test(text))
    built = report.build(ReportSlice(models={MODEL: quants}), at)
    assert built.models[0].tests
    assert built.models[0].smokes
    return built


def hostile_load_test(text: str) -> LoadTestRecord:
    """Build a load test that holds `text` wherever a string is free."""
    wrong = GoldenPrompt(id=text, outcome="FAIL", sentence=text, diff=(text, f"- {text}"))
    failed = load_run(
        None, 100, hosts=["local"], ok_count=99, errors={text: 1}, notes=(text,), name=text
    )
    test = winner_test(
        hosts=["local"],
        served=served(manifest_sha256=text, gpu_layers=text, kv_type=text),
        golden=golden(sha256=text, upstream=text, prompts=(wrong,)),
        runs=(load_run(1, hosts=["local"]), load_run(2, hosts=["local"]), failed),
        calibration=calibration(client_bound=True, reason=text),
        degenerate=degenerate(sentence=text, kinds={text: 1}),
        gates=(load_gate(), load_gate("ttft", sentence=text)),
        failures=(text,),
        notes=(text,),
    )
    return load_test_record(
        {"local": "Q4_K_M"},
        slos={"local": {"ttft_ms": 300.0, "min_goodput": 0.95}},
        engine=engine_id(version=text, llama_cpp=text, sentence=text),
        modelfile=text,
        modelfile_sha256=text,
        winners=(test,),
        smokes=(smoke("Q8_0", sentence=text),),
        verdicts=(load_verdict(sentence=text),),
        measured_at=text,
    )


class _Tags(HTMLParser):
    """Collects every tag with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def _tags(text: str) -> Iterable[tuple[str, dict[str, str | None]]]:
    parser = _Tags()
    parser.feed(text)
    return parser.found


@pytest.mark.parametrize("text", HOSTILE)
def test_html_shows_strange_text_as_text(tmp_path: Path, text: str) -> None:
    """Whatever a record holds, the page has only the elements and attributes of the template."""
    harmless = _tags(render.html(hostile_report(tmp_path / "a", "harmless words")))
    hostile = _tags(render.html(hostile_report(tmp_path / "b", text)))

    assert [tag for tag, _ in hostile] == [tag for tag, _ in harmless]
    for (_, attributes), (_, expected) in zip(hostile, harmless, strict=True):
        assert attributes.keys() == expected.keys()
        assert (attributes.get("href") or "#").startswith("#")


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_strange_text_as_text(tmp_path: Path, text: str) -> None:
    """No heading, link, image, table cell, mention or element comes from a record."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    shapes = []
    for name, words in (("a", "harmless words"), ("b", text)):
        source = render.markdown(hostile_report(tmp_path / name, words))
        assert not re.search(r"@\w|(?<!&)#\d|\w://|www\.", source.replace("&#", ""))
        tokens = parser.parse(source)
        inline = [child for token in tokens for child in token.children or ()]
        assert {token.type for token in inline} <= {
            "text", "softbreak", "strong_open", "strong_close",
        }  # fmt: skip
        raw = " ".join(token.content for token in tokens if token.type == "html_block")
        assert set(re.findall(r"</?\w+", raw)) <= {
            "<details", "</details", "<summary", "</summary",
        }  # fmt: skip
        shapes.append([token.type for token in tokens])
    assert shapes[0] == shapes[1]


def test_a_digest_that_is_none_goes_into_no_command(tmp_path: Path) -> None:
    """A line that people paste into a shell holds only what was checked."""
    at = Layout(tmp_path)
    quants = write_fleet(at)
    evil = "'; touch x; echo '"
    for type_ in FLEET:
        path = at.quant_record("quantize", MODEL, type_)
        record = json.loads(path.read_text())
        record["gguf"]["sha256"] = evil
        path.write_text(json.dumps(record))
        path = at.quant_record("benchmark", MODEL, type_)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"gguf_sha256": evil}))
    path = at.model_record("choose", MODEL)
    choice = json.loads(path.read_text())
    for one in choice["hosts"][0]["candidates"]:
        one["gguf_sha256"] = evil
    path.write_text(json.dumps(choice))
    path = at.model_record("load-test", MODEL)
    tested = json.loads(path.read_text())
    for one in (*tested["winners"], *tested["smokes"]):
        one["served"]["gguf_sha256"] = evil
    path.write_text(json.dumps(tested))

    built = report.build(ReportSlice(models={MODEL: quants}), at)

    assert report.worst_verdict(built) == "PROMOTE"
    assert built.models[0].commands == (f"fleet repro {MODEL}",)


def test_the_page_needs_nothing_from_anywhere(tmp_path: Path) -> None:
    """No address in it, and a policy that lets only its own style and script through."""
    at = Layout(tmp_path)
    text = render.html(report.build(mixed_fleet(at), at))
    policy = unescape(
        re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[0]
    )

    assert "default-src 'none'" in policy
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("// First up", ""))
    for tag in ("style", "script"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r'\sstyle="|\son\w+="', text)


# --- in a browser -----------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt install chromium")

# Texts of a chart whose boxes share more than a pixel, and whether anything widens the page.
MEASURE = """
const overlaps = [];
for (const svg of document.querySelectorAll("svg.chart")) {
  const texts = [...svg.querySelectorAll("text")];
  const boxes = texts.map((text) => text.getBoundingClientRect());
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b, j) => {
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 1 && high > 4) overlaps.push([texts[i].textContent, texts[i + 1 + j].textContent]);
  }));
}
const table = [...document.querySelectorAll("table.quants")].at(-3);
const types = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent.trim());
const before = types();
const head = table.tHead.rows[0].cells[4];
head.querySelector("button").click();
const ascending = types();
head.querySelector("button").click();
result({
  width: window.innerWidth,
  scroll: document.documentElement.scrollWidth,
  wider: [...document.querySelectorAll("body *")].filter(
    (e) => !e.closest(".scroll, pre, caption") && e.getBoundingClientRect().right > innerWidth + 1
  ).map((e) => e.tagName + "." + e.className),
  charts: document.querySelectorAll("svg.chart").length,
  overlaps, before, ascending, descending: types(),
});
"""


def browse(page: str, tmp_path: Path, width: int, script: str = "") -> str:
    """Open a page in a headless browser, run `script` in it, and return the document after that."""
    if script:
        # The page's own policy rightly forbids a script of ours. A window of a headless browser
        # has a least width, a frame has none.
        page = re.sub(r"<meta http-equiv[^>]*>", "", page)
        call = "const result = (x) => { parent.document.body.dataset.result = JSON.stringify(x); };"
        page = page.replace("</body>", f"<script>{{{call}{script}}}</script></body>")
        frame = f'<iframe width="{width}" height="900" srcdoc="{escape(page)}"></iframe>'
        page = f"<!doctype html><style>iframe {{ border: 0 }}</style><body>{frame}</body>"
    file = tmp_path / f"page-{width}.html"
    file.write_text(page)
    done = subprocess.run(
        [BROWSER or "", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1400,900", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


def wide_load_test(model: str) -> LoadTestRecord:
    """Build a load test with everything that takes room: hosts, failures, long lines, levels."""
    hosts = ("workstation", "laptop")
    good = {"workstation": 38, "laptop": 31}
    ladder = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    runs = tuple(
        load_run(
            many, ttft_ms=123.4, hosts=hosts, good_count=good, ok_count=38,
            errors={"error_in_stream": 1, "truncated_stream": 1},
        )
        for many in ladder
    )  # fmt: skip
    wrong = GoldenPrompt(
        id="a-conversation-with-a-long-name", outcome="FAIL", sentence="It differs.",
        diff=("- " + "x" * 110, "+ " + "y " * 55),
    )  # fmt: skip
    judged = load_run(None, 200, hosts=hosts, good_count={"workstation": 200, "laptop": 9})
    test = winner_test(
        "Q4_K_M", hosts, model, golden=golden(prompts=(wrong,)), runs=(*runs, judged),
        gates=tuple(load_gate(host=host) for host in hosts),
    )  # fmt: skip
    slos = {
        "workstation": {"ttft_ms": 4_000.0, "tpot_ms": 2.0, "min_goodput": 0.95},
        "laptop": {"ttft_ms": 4_100.0, "tpot_ms": 2.05, "min_goodput": 0.95},
    }
    chosen = dict.fromkeys(hosts, "Q4_K_M")
    return load_test_record(chosen, model, winners=(test,), slos=slos)


@in_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_a_desk(tmp_path: Path, width: int) -> None:
    """No horizontal scroll, no chart text over another, and tables that sort by a click."""
    at = Layout(tmp_path)
    slice_ = mixed_fleet(at)
    records.write(at.model_record("load-test", "both"), wide_load_test("both"))
    page = render.html(report.build(slice_, at)).replace("<details>", "<details open>")

    assert ">on workstation<" in page
    dom = browse(page, tmp_path, width, MEASURE)

    found = re.findall(r'data-result="([^"]*)"', dom)
    seen = json.loads(unescape(found[0]))
    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert seen["wider"] == []
    assert seen["charts"] == 14
    assert seen["overlaps"] == []
    # `held`: two quants were measured; those without a number stay at the end both ways.
    assert seen["before"] == ["Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K"]
    assert seen["ascending"] == ["Q4_K_M", "Q2_K", "Q8_0", "Q5_K_M"]
    assert seen["descending"] == ["Q2_K", "Q4_K_M", "Q8_0", "Q5_K_M"]


@in_browser
def test_the_policy_of_the_page_lets_its_own_script_run(tmp_path: Path) -> None:
    """Under its own policy the page gets its buttons to sort by, and hostile text runs nothing."""
    page = render.html(hostile_report(tmp_path, "<img src=x onerror=document.title=1>"))

    dom = browse(page, tmp_path, 1280)

    assert dom.count("<button") == 10
    assert "<title>Fleet report" in dom


# --- proof, evals, comparison -----------------------------------------------------------------


def evidence_report(tmp_path: Path, **evidence: Any) -> Report:
    """Build the report of one model with special records of these kinds."""
    at = Layout(tmp_path)
    evals = {name.name: name.set_sha256 for name in evidence.get("sets", ())}
    quants = write_fleet(at).model_copy(update={"evals": evals})
    if "verified" in evidence:
        records.write(at.model_record("verify", MODEL), evidence["verified"])
    if evals:
        record = evaluate_record(sets=evidence["sets"])
        records.write(at.model_record("evaluate", MODEL), record)
    if "compared" in evidence:
        records.write(at.comparison(MODEL), evidence["compared"])
    return report.build(ReportSlice(models={MODEL: quants}), at)


def test_the_proof_of_the_conversion_is_one_line_if_it_holds(tmp_path: Path) -> None:
    """Which layers hold; what was left out has a line of its own, and promotes all the same."""
    built = evidence_report(tmp_path, verified=verify_record(outcomes={"logits": "SKIP"}))

    assert report.worst_verdict(built) == "PROMOTE"
    for text in forms(built):
        assert "7 of 8 layers hold (tensors, hyperparameters, values, vocabulary, tokens" in text
        assert re.search("(?i)skip:? logits: it could not be looked at", text)


def test_a_failed_proof_is_the_headline_with_what_to_do(tmp_path: Path) -> None:
    """The layer, what differs, and the next step, before any table."""
    built = evidence_report(tmp_path, verified=verify_record(outcomes={"tokens": "FAIL"}))

    assert report.worst_verdict(built) == "REJECT"
    for text in forms(built):
        head = text[: text.index("bits/weight")]
        assert "the conversion is not the model: layer tokens fails: 3 of 2,400 differ" in head
        assert f"results/{MODEL}/verify.json, pin another revision or another toolchain" in head
        assert "'a b': 1, 2 upstream; 3 here" in text


def test_task_evals_are_a_table_of_pairs(tmp_path: Path) -> None:
    """Lost, won and p for each quant; a score by itself is not what is judged."""
    built = evidence_report(tmp_path, sets=(eval_result(types=FLEET),))

    assert report.worst_verdict(built) == "PROMOTE"
    assert (
        "| recall | Q4&#95;K&#95;M | 7 of 10 | 7 | 1 | 1 | 0.750 | pass |".replace("&#95;", "_")
        in forms(built)[1]
    )
    for text in forms(built):
        assert "Each quant is paired with f16, item by item" in text


def test_the_comparison_is_what_fleet_compare_prints(tmp_path: Path) -> None:
    """Its sentence and its table; one of another file is not shown, only that it does not count."""
    pairs = tuple(
        PairSample(index=i, order="AB", champion_tok_s=600, challenger_tok_s=540, log_ratio=-0.105)
        for i in range(8)
    )
    worse = compare_record("worse", speed=(speed_comparison("worse", pairs=pairs),))
    stale = compare_record("worse", challenger=side(gguf_sha256=sha256("older")))

    built = evidence_report(tmp_path / "a", compared=worse)
    assert report.worst_verdict(built) == "REJECT"
    for text in forms(built):
        for cell in compare_words.rows(worse)[0].cells[:2]:
            assert cell in text
        assert "Champion and challenger" in text
    old = evidence_report(tmp_path / "b", compared=stale)
    assert report.worst_verdict(old) == "PROMOTE"
    for text in forms(old):
        assert "Champion and challenger" not in text
        assert "The comparison does not count on host local: it is of another file" in text
