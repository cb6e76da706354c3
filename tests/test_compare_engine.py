"""The engine as an axis of its own: which of the two it was, and what becomes of releases."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import comment_factory
import engine_factory
import gguf_factory
import pytest
import record_factory
import sample
from engine_factory import answers, departure, engine_record, release_test, timed
from test_compare import ROOT, edit, git, run, template

from pipelines import (
    bundle_checks,
    comment_render,
    compare,
    compare_engine,
    compare_engine_effects,
    compare_engine_releases,
    compare_engine_words,
    compare_run,
    compare_sides,
    declaration,
    hashing,
    llama_perplexity,
    measuring,
    publish,
    records,
    report_evidence,
    toolchain,
    verdict,
    verdict_table,
)
from pipelines.compare_engine_records import EngineRecord
from pipelines.compare_records import CompareRecord
from pipelines.errors import ToolError
from pipelines.layout import Layout
from pipelines.records import QuantizeRecord
from pipelines.toolchain import Toolchain

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.verdict import ModelVerdict
    from pipelines.verdict_evidence import Evidence

MODEL = "tiny-llama"
# The llama.cpp before the pinned one. `make test-engines` builds it (7 minutes on 2 cores).
BEFORE = toolchain.ToolchainSpec(
    llama_cpp_python="0.3.35",
    sha256="1139dbb54509074b70893fab8554e3b079aa9f4d312058ce4018ef0019e3de12",
)


# --- which of the two it was ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "of_new", "both", "cause"),
    [
        (-0.10, -0.10, -0.10, "engine"),
        (0.00, 0.00, -0.10, "model"),
        (-0.10, -0.10, -0.20, "both"),
        (0.00, 0.00, 0.00, "neither"),
        (0.10, 0.10, 0.10, "engine"),
        # The one costs what the other one wins.
        (-0.10, -0.10, 0.00, "both"),
        (-0.10, None, None, "engine"),
    ],
)
def test_the_table_says_which_of_the_two_it_was(
    engine: float, of_new: float | None, both: float | None, cause: str
) -> None:
    """Engine, GGUF, both, or neither: by the effect of each, with the interval of its own."""
    (found,) = engine_record(engine, of_new, both).speed

    assert found.cause == cause
    assert found.engine.low <= engine <= found.engine.high
    if both is not None and found.model is not None:
        assert found.model.log_ratio == pytest.approx(both - engine, abs=1e-9)
        assert (
            found.model.outcome
            == compare_engine_effects.speeds([timed(both - engine)])[0].engine.outcome
        )


def test_an_engine_that_runs_only_the_new_file_at_another_speed_is_an_interaction() -> None:
    """Neither does it alone: the old file is as fast, the new one is as fast, but not together."""
    (found,) = engine_record(0.0, -0.10, 0.0).speed

    assert found.interaction is not None
    assert (found.interaction.outcome, found.cause) == ("worse", "interaction")
    assert found.interaction.high < math.log(0.97)


@pytest.mark.parametrize(
    ("engine", "model", "cause"),
    [
        ("undecided", "equal", "cannot tell"),
        ("equal", "undecided", "cannot tell"),
        # It may be both.
        ("worse", "undecided", "cannot tell"),
        ("worse", None, "cannot tell"),
        ("worse", "better", "both"),
    ],
)
def test_what_is_not_known_is_no_cause(engine: Any, model: Any, cause: str) -> None:
    """Nothing is concluded from what noise hides."""
    assert compare_engine_effects.cause(engine, model) == cause


def test_few_pairs_and_noise_prove_no_cause() -> None:
    """Four pairs prove nothing, and a scatter of 20 % hides a loss of 5 %: cannot tell."""
    few = compare_engine_effects.speeds(
        [timed(-0.10, count=4)], [timed(-0.10, count=4)], [timed(-0.10, count=4)]
    )
    noisy = compare_engine_effects.speeds([timed(-0.05, noise=0.4)], [], [timed(-0.05)])

    assert {one.cause for one in (*few, *noisy)} == {"cannot tell"}


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (departure(1e-5), "equal"),
        (departure(0.004), "equal"),
        (departure(0.0048), "undecided"),
        # An engine that was corrected departs as much as one that was broken.
        (departure(0.5, 0.97), "undecided"),
        (departure(0.5, 1.001, 0.01), "undecided"),
        (departure(0.5, 1.2, 0.01), "worse"),
        (departure(0.0, 1.0, 0.0), "equal"),
        (departure(kld_mean_nats=None, kld_high_nats=None, ppl_ratio_error=None), "equal"),
        (departure(ratio=1.01, kld_high_nats=None, ppl_ratio_error=None), "undecided"),
        (departure(ratio=0.0), "undecided"),
        # An interval that was edited does not hide its own mean.
        (departure(0.5, kld_high_nats=1e-6), "undecided"),
    ],
)
def test_answers_are_worse_only_beyond_doubt(found: Any, outcome: str) -> None:
    """Another answer is no worse answer: divergence alone is for a person to look at."""
    assert compare_engine_effects.answers_outcome(found) == outcome


def test_a_mean_of_nothing_has_an_interval_of_nothing() -> None:
    """Equal engines have no divergence, and not one of the last printed digit."""
    assert compare_engine_effects.departure_interval([0.0, -1e-7, 0.0, 1e-7]) == (0.0, 0.0)
    low, high = compare_engine_effects.departure_interval([0.01, 0.02, 0.03] * 6)
    assert 0.01 < low < 0.02 < high < 0.03


def test_an_error_that_is_none_is_zero_only_where_two_are_one(tmp_path: Path) -> None:
    """The tool prints `nan` for it where both answer equally; anywhere else that stops the run."""
    stdout, stderr = (
        (ROOT / "tests/data" / f"llama-divergence.{end}").read_text()
        for end in ("stdout", "stderr")
    )
    base = llama_perplexity.BaseHeader(context_tokens=128, vocabulary_tokens=1024, chunks=6)
    for error in ("0.002778", "0.002765", "0.080693"):
        damaged = stdout.replace(f"±   {error}", "±       -nan")
        assert damaged != stdout
        for may_be_same in (False, True):  # their perplexities differ by 0.5 %
            with pytest.raises(ToolError, match="not finite"):
                llama_perplexity.parse_divergence(
                    damaged, stderr, base=base, log=tmp_path / "log", may_be_same=may_be_same
                )


# --- the verdict ------------------------------------------------------------------------------


def known(engine: EngineRecord | str | None, **changes: Any) -> Evidence:
    """Return a model that is promoted, with a comparison of two engines, and this of the engine."""
    good = verdict_table.good()
    assert isinstance(good.compared, CompareRecord)
    old = good.compared.champion.model_copy(
        update={"toolchain_id": "cpu-old", "llama_cpp_commit": engine_factory.OLD_COMMIT}
    )
    compared = good.compared.model_copy(update={"champion": old})
    if isinstance(engine, EngineRecord):
        engine = engine.model_copy(
            update={
                "model": good.declared.model, "context_tokens": compared.context_tokens,
                "champion": old, "challenger": compared.challenger, "machine": compared.machine,
            } | changes.pop("record", {})
        )  # fmt: skip
    return replace(good, compared=changes.pop("compared", compared), engine=engine)


def judged(engine: EngineRecord | str | None, **changes: Any) -> ModelVerdict:
    """Judge a model with this record of the engine."""
    return verdict.judge(known(engine, **changes))


@pytest.mark.parametrize(
    ("engine", "verdict_", "said"),
    [
        (engine_record(), "PROMOTE", ""),
        (engine_record(0.10), "PROMOTE", ""),
        (engine_record(-0.10), "REJECT", "is worse on the same GGUF: decode at 256 is slower"),
        # New weights that gain do not hide what the engine costs.
        (engine_record(-0.10, -0.10, 0.20), "REJECT", "The engine (llama.cpp 4df29be4f4c3 → "),
        (engine_record(-0.03), "HOLD", "is not shown to be as good on the same GGUF"),
        (engine_record(answers=answers(departure(0.5, 1.2, 0.01))), "REJECT", "and worse"),
        (engine_record(answers=answers(departure(0.5))), "HOLD", "answers otherwise"),
        (
            engine_record(answers=answers(outcome="worse", engine=None, sentence="Not loaded.")),
            "REJECT", "not loaded",
        ),
        (engine_record(releases=(release_test("worse"),)), "REJECT", "fails on the new engine"),
        (engine_record(releases=(release_test("undecided"),)), "HOLD", "is not shown to run"),
        (engine_record(releases=()), "PROMOTE", ""),
        (engine_record(releases_problem="The registry is torn."), "HOLD", "registry is torn"),
        (engine_record(left_out=("No time.",)), "HOLD", "was not measured: no time"),
        (engine_record(speed=()), "HOLD", "The speed of the engine alone"),
        (
            engine_record(
                speed=(),
                validity=record_factory.validity(verdict="INVALID", reasons=("It was hot.",)),
            ),
            "INVALID", "is INVALID: it was hot",
        ),
        ("engine.json is not JSON", "INVALID", "cannot be read"),
    ],
)  # fmt: skip
def test_the_verdict_names_the_engine_as_the_cause(
    engine: EngineRecord | str, verdict_: str, said: str
) -> None:
    """Worse is REJECT, what nobody knows is HOLD, what others disturbed is INVALID."""
    found = judged(engine)

    assert found.verdict == verdict_
    of_engine = [one for one in found.reasons if one.rule == "engine"]
    assert bool(of_engine) == bool(said)
    assert all(one.file.endswith("engine.json") and one.next_step for one in of_engine)
    assert said in " ".join(one.sentence for one in of_engine) or not said


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another"},
        {"context_tokens": 7},
        {"machine": record_factory.machine_id(hw_id="other")},
        *(
            {side: {field: "f" * 64}}
            for side, field in (
                ("challenger", "gguf_sha256"), ("challenger", "llama_cpp_commit"),
                ("challenger", "toolchain_id"), ("champion", "gguf_sha256"),
                ("champion", "toolchain_id"),
            )
        ),
    ],
)  # fmt: skip
def test_a_record_of_anything_else_never_counts(change: dict[str, Any]) -> None:
    """Neither a REJECT nor a PROMOTE comes of another file, engine, context or machine."""
    worse = known(engine_record(-0.10)).engine
    assert isinstance(worse, EngineRecord)
    put = {
        name: getattr(worse, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in change.items()
    }
    found = judged(worse, record=put)

    assert found.verdict == "PROMOTE"
    assert any("What was measured of the engine does not count" in one for one in found.notes)
    assert any("was not measured alone" in one for one in found.notes)


def test_a_limit_that_was_wide_when_it_was_measured_lets_nothing_pass() -> None:
    """A record is never taken for better than its own numbers by what is declared now."""
    worse = engine_record(-0.10)
    (speed,) = worse.speed
    mild = speed.model_copy(
        update={"effect": 0.5, "engine": speed.engine.model_copy(update={"outcome": "equal"})}
    )
    said = answers(departure(0.5, 1.2, 0.01), outcome="equal", limit_nats=9.0)
    tried = release_test("equal", answers=departure(0.5, 1.2, 0.01))

    assert judged(worse.model_copy(update={"speed": (mild,)})).verdict == "REJECT"
    assert judged(engine_record(answers=said)).verdict == "REJECT"
    assert judged(engine_record(releases=(tried,))).verdict == "REJECT"


def test_an_engine_that_nobody_measured_alone_is_told_and_held_where_that_is_asked_for() -> None:
    """A comparison of two engines says so itself; of one engine nothing is asked."""
    alone = known(None)
    required = alone.declared.model_copy(update={"compare_required": True})

    assert verdict.judge(alone).verdict == "PROMOTE"
    assert any("was not measured alone" in one for one in verdict.judge(alone).notes)
    assert verdict.judge(replace(alone, declared=required)).verdict == "HOLD"
    good = verdict_table.good()
    assert not any("engine" in one for one in verdict.judge(good).notes)


# --- what is shown and carried ----------------------------------------------------------------


def test_report_and_comment_show_four_combinations_in_nine_columns() -> None:
    """One sentence, one table that fits, each release; nothing at all of a stale record."""
    record = engine_record(-0.10, -0.10, -0.10, releases=(release_test("worse"),))
    evidence = known(record)
    shown = report_evidence.sections(evidence, verdict.judge(evidence))
    section = next(one for one in shown if one.title.startswith("The engine alone"))
    stale = known(record, record={"context_tokens": 7})

    assert section.table is not None
    assert len(section.table.heads) <= 9
    assert all(len(row) == len(section.table.heads) for row in section.table.rows)
    assert section.table.rows[0][-1] == "the engine"
    assert [one.outcome for one in section.findings] == ["FAIL", "FAIL"]
    assert not any(
        one.title.startswith("The engine alone")
        for one in report_evidence.sections(stale, verdict.judge(stale))
    )
    for line in compare_engine_words.table(record):
        assert len(line) < 160


def test_the_comment_has_the_engine_in_the_open_where_it_is_worse(tmp_path: Path) -> None:
    """It stands among what does not hold, its table is folded; else it is a gate that passes."""
    base, head = Layout(tmp_path / "base"), Layout(tmp_path / "head")
    comment_factory.write(base)
    declared = comment_factory.write(head)
    old = engine_record().champion
    records.write(head.comparison(MODEL), record_factory.compare_record("better", champion=old))
    shown = {}
    for name, change in (("worse", -0.10), ("equal", 0.0)):
        records.write(head.engine_record(MODEL), engine_record(change, change, 0.10))
        shown[name] = comment_render.render(comment_factory.compose(base, head, {MODEL: declared}))

    assert "engine on the same GGUF" in shown["worse"].partition("<details>")[0]
    assert "decode at 256 is slower" in shown["worse"].partition("<details>")[0]
    assert "engine on the same GGUF" not in shown["equal"].partition("<details>")[0]
    for text in shown.values():
        assert "The engine alone, on the same GGUF" in text
        table = next(line for line in text.splitlines() if "old GGUF, old engine" in line)
        assert table.count("|") == 9 + 1
        assert "below 0.0001 nats" in text


def test_what_was_measured_of_the_engine_travels_as_the_comparison_does(tmp_path: Path) -> None:
    """In a bundle, among what goes with a model, and in what tells DVC to judge again."""
    at = Layout(tmp_path)
    path = Layout().engine_record(MODEL).as_posix()
    records.write(at.comparison(MODEL), record_factory.compare_record())
    publish.note_comparison(MODEL, at)
    before = at.compared(MODEL).read_bytes()
    records.write(at.engine_record(MODEL), engine_record())
    publish.note_comparison(MODEL, at)
    after = at.compared(MODEL).read_bytes()
    publish.note_comparison(MODEL, at)

    assert bundle_checks.kinds(MODEL)[path] is EngineRecord
    assert at.engine_record(MODEL) in at.of_model(MODEL)
    assert before != after == at.compared(MODEL).read_bytes()
    at.engine_record(MODEL).unlink()
    publish.note_comparison(MODEL, at)
    assert at.compared(MODEL).read_bytes() == before


# --- the real thing ---------------------------------------------------------------------------


@pytest.fixture(scope="session", name="bed")
def _bed(tmp_path_factory: pytest.TempPathFactory, tools: Toolchain) -> Path:
    """A small Llama in two quants, made by the real quantizer."""
    root = tmp_path_factory.mktemp("engine") / "fork"
    (root / "work" / MODEL / "gguf").mkdir(parents=True)
    sample.take(root, "corpora", "params.yaml")
    for key, value in {"prompt_tokens": "16", "generate_tokens": "4", "depths": "[0]",
                       "chunks": "8"}.items():  # fmt: skip
        edit(root / "params.yaml", rf"^( +){key}: .*$", rf"\g<1>{key}: {value}")
    wanted = "pairs: 6, control_pairs: 3, repetitions: 3, dropped_repetitions: 1"
    edit(root / "params.yaml", r"^benchmark:\n",
         f"compare: {{{wanted}}}\n\nbenchmark:\n  threads: 1\n")  # fmt: skip
    at = Layout(root)
    gguf_factory.tiny_llama_gguf(at.f16(MODEL))
    for type_ in ("Q8_0", "Q4_K_M"):
        gguf = at.gguf(MODEL, f"{MODEL}-{type_}")
        argv = [tools.tool("llama-quantize"), at.f16(MODEL), gguf, type_]
        subprocess.run(argv, check=True, capture_output=True)
    return root


def other(tools: Toolchain, prefix: Path, programs: dict[str, str] | None = None) -> Toolchain:
    """
    Lay out the same llama.cpp under another identity: a real engine with equal results.

    Args:
        tools: The real one.
        prefix: Of the other one.
        programs: Scripts in the place of some of its programs; {real} is the real one's path.
    """
    (prefix / "bin").mkdir(parents=True)
    for name in tools.manifest["tools"]:
        (prefix / "bin" / name).symlink_to(tools.tool(name))
    for folder in ("share", "python", *(() if programs else ("lib",))):
        (prefix / folder).symlink_to(tools.prefix / folder)
    for name, text in (programs or {}).items():
        path = prefix / "bin" / name
        path.unlink()
        path.write_text(f"#!/bin/sh\n{text.format(real=tools.tool(name))}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return Toolchain(prefix=prefix, manifest=tools.manifest)


def contender(at: Layout, type_: str, tools: Toolchain, source: str) -> compare_sides.Contender:
    """Put a quant on an engine."""
    gguf = at.gguf(MODEL, f"{MODEL}-{type_}")
    digest = hashing.digest(gguf).sha256
    side = record_factory.side(
        source=source, key=gguf.stem, type=type_, gguf_sha256=digest,
        size_bytes=gguf.stat().st_size, llama_cpp_commit=tools.commit,
        toolchain_id=tools.prefix.name,
    )  # fmt: skip
    wanted = compare_sides.Wanted(
        sha256=digest, size_bytes=gguf.stat().st_size, md5=None, what=f"the {type_}"
    )
    return compare_sides.Contender(
        side=side, tools=tools, gguf=wanted, f16=None, evals=None, commit=None
    )


def axis(  # noqa: PLR0913 - each is one independent fact
    root: Path,
    old: Toolchain,
    new: Toolchain,
    *,
    types: tuple[str, str] = ("Q4_K_M", "Q4_K_M"),
    budget_s: float = 300.0,
    part_s: float = 1.0,
) -> compare_engine.Axis:
    """Lay out a change of the engine on the real model."""
    at = Layout(root)
    declared = declaration.load(at.params)
    sides = [
        contender(at, type_, tools, source)
        for type_, tools, source in zip(types, (old, new), ("HEAD~1", "this checkout"), strict=True)
    ]
    files = tuple(at.gguf(MODEL, each.side.key) for each in sides)
    plan = compare.plan_of(declared, MODEL, files[1], backend=old.backend, cores=1)
    released = compare_engine_releases.released(declared, at, MODEL, None)
    return compare_engine.Axis(
        declared=declared, at=at, model=MODEL, champion=sides[0], challenger=sides[1],
        files=(files[0], files[1]), plan=plan, hardware=measuring.this_machine(at),
        budget_s=budget_s, released=released, spent_s=lambda: 0.0, quiet_within_s=0.0,
        estimate=compare_engine.Estimate(
            answers_s=part_s, release_s=part_s, releases=len(released.found), session_s=part_s,
            sessions=0 if types[0] == types[1] else 2,
        ),
    )  # fmt: skip


def compared(found: compare_engine.Axis, **fields: Any) -> CompareRecord:
    """Build a comparison of the two sides, in which neither is faster."""
    speed = tuple(
        timed(0.0, count=6, test=test.test, depth_tokens=test.depth_tokens, tokens=test.tokens)
        for test in found.plan.tests
    )
    return record_factory.compare_record(
        speed=speed, champion=found.champion.side, challenger=found.challenger.side, **fields
    )


@pytest.mark.alone
@pytest.mark.toolchain
def test_one_engine_under_two_names_answers_equally_and_so_does_what_was_released(
    bed: Path, tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """All difference in the answers is the file's; a kill loses no run that was measured."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    root = tmp_path / "fork"
    shutil.copytree(bed, root)
    at = Layout(root)
    broken = root / "broken.gguf"
    good = at.gguf(MODEL, f"{MODEL}-Q4_K_M")
    broken.write_bytes(good.read_bytes().replace(b"general.architecture", b"general.architectura"))
    ids = engine_factory.publish(
        root, declaration.load(at.params), [broken, at.gguf(MODEL, f"{MODEL}-Q8_0"), good], tools
    )
    both = (other(tools, tmp_path / "cpu-other"), tools)
    begun = axis(root, *both, types=("Q4_K_M", "Q8_0"))
    real, kept = compare_run.Journal.append, []

    def killed(journal: compare_run.Journal, process: compare_run.ProcessRun) -> None:
        real(journal, process)
        kept.append(process)
        if process.phase == "control":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compare_run.Journal, "append", killed)
        with pytest.raises(KeyboardInterrupt), measuring.one_at_a_time(tmp_path, "engine"):
            begun.measure(compared(begun))
    again = axis(root, *both, types=("Q4_K_M", "Q8_0"))
    with measuring.one_at_a_time(tmp_path, "engine"):
        found = again.measure(compared(again))
    again.forget()

    assert found.answers is not None
    engine, model, whole = found.answers.engine, found.answers.model, found.answers.both
    assert engine is not None
    assert model is not None
    assert (engine.kld_mean_nats, engine.same_top, found.answers.outcome) == (0.0, 1.0, "equal")
    assert model == whole
    assert (model.kld_mean_nats or 0.0) > 1e-4
    assert [(one.release, one.is_stable, one.loads, one.outcome) for one in found.releases] == [
        (ids[2], True, True, "equal"), (ids[1], False, True, "equal"),
        (ids[0], False, False, "undecided"),
    ]  # fmt: skip
    assert "neither does it on the old one" in found.releases[2].sentence
    assert "going on after 3 measured runs" in capsys.readouterr().err
    assert "lock" not in " ".join(found.validity.reasons)
    if found.validity.verdict == "VALID":  # a busy machine may say that it cannot tell
        assert found.speed
        assert {len(one.engine.pairs) for one in found.speed} <= {6, 12}
        assert all(one.model and len(one.model.pairs) == 6 for one in found.speed)
    assert EngineRecord.model_validate_json(found.model_dump_json()) == found
    assert [path.suffix for path in at.scratch(MODEL).iterdir()] == []


@pytest.mark.toolchain
def test_an_engine_that_does_not_load_what_the_old_one_does_is_worse(
    bed: Path, tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Champion and releases: said with the engine's own words, and no speed is made up."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    root = tmp_path / "fork"
    shutil.copytree(bed, root)
    at = Layout(root)
    declared = declaration.load(at.params)
    engine_factory.publish(root, declared, [at.gguf(MODEL, f"{MODEL}-Q8_0")], tools)
    refuses = other(
        tools, tmp_path / "cpu-new",
        {"llama-bench": "echo 'error: unknown tensor type' >&2; exit 1"},
    )  # fmt: skip
    begun = axis(root, tools, refuses, types=("Q4_K_M", "Q8_0"))
    found = begun.measure(compared(begun))

    assert found.answers is not None
    assert (found.answers.outcome, found.outcome, found.speed) == ("worse", "worse", ())
    assert "unknown tensor type" in found.answers.sentence
    assert [(one.loads, one.outcome) for one in found.releases] == [(False, "worse")]
    assert "it does not load: error: unknown tensor type" in found.sentence

    (blob,) = (root / "registry").rglob(found.releases[0].gguf_sha256)
    blob.chmod(0o600)
    blob.write_bytes(b"x" * blob.stat().st_size)
    at.gguf(MODEL, f"{MODEL}-Q8_0").unlink()
    (torn,) = replace_files(begun)._releases(None)
    assert (torn.loads, torn.outcome) == (None, "undecided")
    assert "its file cannot be had" in torn.sentence


def replace_files(begun: compare_engine.Axis) -> compare_engine.Axis:
    """Return the same axis with one GGUF alone."""
    return replace(begun, files=(begun.files[0], begun.files[0]))


@pytest.mark.toolchain
def test_logits_that_the_new_engine_cannot_read_leave_the_perplexities(
    bed: Path, tools: Toolchain, tmp_path: Path
) -> None:
    """`not comparable` is said, and two perplexities over the same text are what is left."""
    cannot = other(
        tools, tmp_path / "cpu-new",
        {"llama-perplexity": 'case "$*" in *--kl-divergence*) echo "no such format" >&2; exit 1;; '
                             'esac; exec {real} "$@"'},
    )  # fmt: skip
    begun = axis(bed, tools, cannot)
    found = begun.measure(compared(begun))

    assert found.answers is not None
    assert found.answers.engine is not None
    assert found.answers.engine.kld_mean_nats is None
    assert found.answers.engine.ppl_ratio == pytest.approx(1.0)
    assert found.answers.sentence.startswith("The logits of the old engine are not comparable")
    assert "no such format" in " ".join(found.answers.why_not)
    # One file: the comparison itself is the measurement of the engine.
    assert [one.cause for one in found.speed if one.is_gated] == ["neither", "neither"]


@pytest.mark.toolchain
def test_what_there_is_no_time_for_is_told_with_the_budget_that_measures_it(
    bed: Path, tools: Toolchain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said beforehand and left out: no time is no result, and never a good one."""
    new = other(tools, tmp_path / "cpu-new")
    begun = axis(bed, tools, new, types=("Q4_K_M", "Q8_0"), budget_s=60.0, part_s=600.0)
    said = begun.estimate.sentence(begun.what, 30.0, 60.0)
    found = begun.measure(compared(begun))

    assert "2 more sessions of pairs" in said
    assert "the budget is 60 s: what does not fit is left out" in said
    assert "`--budget 31` measures all" in said
    assert (found.speed, found.answers, found.outcome) == ((), None, "undecided")
    assert len(found.left_out) == 2
    assert all("--budget 38`" in one for one in found.left_out)
    assert "There was no time left for the answers" in capsys.readouterr().err
    assert found.releases_note.startswith(f"No release of {MODEL} is in the local registry")


@pytest.mark.toolchain
def test_what_was_found_of_an_engine_that_is_not_run_any_more_goes(
    bed: Path, tools: Toolchain
) -> None:
    """Equal sides leave what speaks of this checkout, and remove what does not."""
    begun = axis(bed, tools, tools)
    task = compare.Task(begun.declared, begun.at, MODEL, begun.champion, begun.challenger, 60.0)
    path = begun.at.engine_record(MODEL)

    assert not compare_engine.differs(begun.champion, begun.challenger)
    records.write(path, engine_record(challenger=begun.challenger.side))
    task.drop_stale_engine()
    assert path.exists()
    records.write(path, engine_record())
    task.drop_stale_engine()
    assert not path.exists()


# --- two real builds --------------------------------------------------------------------------


@pytest.fixture(name="before")
def _before() -> Toolchain:
    """The llama.cpp before the pinned one, if it is here; built where that is asked for."""
    if os.environ.get("FLEET_TEST_ENGINES"):
        return toolchain.ensure(BEFORE)
    found = toolchain.there(BEFORE)
    if found is None:
        pytest.skip("needs a second llama.cpp: `make test-engines` builds it")
    return found


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.timeout(1800)
def test_a_bump_of_the_engine_is_told_apart_from_the_new_gguf(
    tmp_path: Path, tools: Toolchain, before: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fleet compare --base` over two real builds: answers, speed of both files, one release."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    root = tmp_path / "fork"
    template(root)
    edit(root / "params.yaml", r"pairs: 4,", "pairs: 6,")
    now = (root / "params.yaml").read_text()
    edit(root / "params.yaml", r"^  llama_cpp_python: .*$",
         f"  llama_cpp_python: {BEFORE.llama_cpp_python}")  # fmt: skip
    edit(root / "params.yaml", r"^  sha256: [0-9a-f]{64}$", f"  sha256: {BEFORE.sha256}")
    git(tmp_path, "init", "-q", str(root))
    stage = f"quantize@{MODEL}-Q4_K_M"
    run(root, "repro", stage, module="dvc")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "before")
    at = Layout(root)
    gguf = at.gguf(MODEL, f"{MODEL}-Q4_K_M")
    engine_factory.publish(root, declaration.load(at.params), [gguf], before)
    (root / "params.yaml").write_text(now)
    edit(root / "params.yaml", r"type: Q4_K_M\}", "type: Q4_K_M, output_tensor_type: q8_0}")
    run(root, "repro", stage, module="dvc")

    planned = run(root, "compare", MODEL, "--base", "HEAD", "--quant", "Q4_K_M", "--plan")
    done = run(root, "compare", MODEL, "--base", "HEAD", "--quant", "Q4_K_M")
    found = records.read(at.engine_record(MODEL), EngineRecord)
    whole = records.read(at.comparison(MODEL), CompareRecord)

    assert "the engine alone (llama.cpp" in planned.stderr
    assert (found.champion, found.challenger) == (whole.champion, whole.challenger)
    assert found.champion.llama_cpp_commit == before.commit != tools.commit
    assert found.challenger.llama_cpp_commit == tools.commit
    assert found.answers is not None
    assert found.answers.engine is not None
    assert found.answers.engine.kld_mean_nats is not None
    assert found.answers.outcome == "equal"
    assert [(one.is_stable, one.loads, one.outcome) for one in found.releases] == [
        (True, True, "equal")
    ]
    if found.validity.verdict == "VALID" and not found.left_out:
        assert {one.test for one in found.speed} == {"prefill", "decode"}
    for line in compare_engine_words.table(found):
        assert line in done.stdout
    assert json.loads(at.engine_record(MODEL).read_text())["schema_version"] == 1
    built = records.read(at.quant_record("quantize", MODEL, "Q4_K_M"), QuantizeRecord)
    assert found.challenger.gguf_sha256 == built.gguf.sha256 != found.champion.gguf_sha256
