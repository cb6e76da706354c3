"""The gate: it judges what was measured as planned, and nothing else ever passes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from bundle_factory import (
    BASE,
    HEAD,
    HOST,
    MODEL,
    TWIN,
    bundle_of,
    commit,
    edited,
    fleet,
    plan_of,
    save,
    with_host,
    with_twin,
)

from pipelines import gate, lock_entries, records
from pipelines.ci_records import GateRecord, ModelPlan, PlanProblem

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from pipelines.ci_records import BundleRecord, PlanRecord
    from pipelines.layout import Layout

LEG = (MODEL, HOST)
EDGE = "edge"


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A fleet as git holds it."""
    return fleet(tmp_path / "fork")


def judged(
    at: Layout, plan: PlanRecord | str | None, *bundles: BundleRecord, **results: Any
) -> tuple[GateRecord, bool]:
    """Let the gate look at what the jobs left."""
    folder = at.root.parent
    path = folder / "plan.json"
    if plan is not None:
        path.write_text(plan if isinstance(plan, str) else plan.model_dump_json())
    directory = save(folder / "bundles", *bundles) if bundles else folder / "none"
    return gate.gate(at, plan_file=path, bundles=directory, **results)


def rejected(at: Layout, model: str = MODEL, host: str = HOST) -> BundleRecord:
    """Return the bundle of a run in which every quant missed its gates."""
    good = bundle_of(at, model, host)
    choice = json.loads(good.files[f"results/{model}/choice.json"])
    for one in choice["hosts"]:
        one |= {"winner": None, "runner_up": None, "verdict": "REJECT", "sentence": "reject: no"}
        one["candidates"] = [
            {**each, "verdict": "REJECT", "on_frontier": False} for each in one["candidates"]
        ]
    return edited(good, at, "choice.json", hosts=choice["hosts"])


def disturbed(at: Layout, type_: str) -> BundleRecord:
    """Return the bundle of a run whose benchmark of one quant was disturbed."""
    good = bundle_of(at)
    told = json.loads(good.files[f"results/{MODEL}/benchmark/{type_}.json"])
    invalid = {**told["validity"], "verdict": "INVALID", "reasons": ["the machine was busy"]}
    return edited(good, at, f"benchmark/{type_}.json", validity=invalid)


# --- the four verdicts ------------------------------------------------------------------------


def test_what_was_measured_as_planned_and_passes_is_a_success(at: Layout) -> None:
    """One leg, one bundle, PROMOTE: the check is green and there is something to adopt."""
    record, new_records = judged(at, plan_of(at, LEG), bundle_of(at))

    assert (record.conclusion, record.verdict, record.failures) == ("success", "PROMOTE", ())
    assert new_records
    assert (record.base, record.head) == (BASE, HEAD)
    assert [(one.model, one.host, one.line) for one in record.models] == [(MODEL, HOST, 7)]


def test_what_misses_its_gates_is_a_failure_that_may_be_adopted(at: Layout) -> None:
    """REJECT is evidence as well: it is kept, and does not merge."""
    record, new_records = judged(at, plan_of(at, LEG), rejected(at))

    assert (record.conclusion, record.verdict, record.failures) == ("failure", "REJECT", ())
    assert new_records


def test_a_disturbed_measurement_is_neutral_and_is_never_adopted(at: Layout) -> None:
    """INVALID means: measure again. It is nobody's failure, and nobody's number."""
    record, new_records = judged(at, plan_of(at, LEG), disturbed(at, "Q4_K_M"))

    assert (record.conclusion, record.verdict) == ("neutral", "INVALID")
    assert not new_records


def test_the_worst_of_two_models_is_the_verdict(at: Layout) -> None:
    """Nobody merges a good model together with a bad one."""
    with_twin(at)
    plan = plan_of(at, LEG, (TWIN, HOST))

    record, _ = judged(at, plan, bundle_of(at), rejected(at, TWIN))

    assert record.verdict == "REJECT"
    assert {one.model: one.verdict for one in record.models} == {MODEL: "PROMOTE", TWIN: "REJECT"}
    assert record.sentence.startswith(f"{TWIN}: ")


def test_another_measured_host_is_judged_by_its_own_numbers(at: Layout) -> None:
    """The first host may pass where the second fails; the second's own tree says so."""
    with_host(at, EDGE)
    plan = plan_of(at, LEG, (MODEL, EDGE))

    record, _ = judged(at, plan, bundle_of(at), rejected(at, host=EDGE))

    assert {one.host: one.verdict for one in record.models} == {HOST: "PROMOTE", EDGE: "REJECT"}
    assert record.conclusion == "failure"


def test_what_git_covers_is_judged_from_git_and_nothing_is_new(at: Layout) -> None:
    """After the records were adopted, the same gate is green without a measurement."""
    covered = ModelPlan(model=MODEL, change="changed", covered=True)

    record, new_records = judged(at, plan_of(at, models=(covered,)), measured="skipped")

    assert (record.conclusion, record.verdict) == ("success", "PROMOTE")
    assert [one.model for one in record.bundles] == [MODEL]
    assert not new_records


def test_a_change_that_is_none_of_the_fleets_passes(at: Layout) -> None:
    """A pull request on the documentation has the same required check."""
    record, new_records = judged(at, plan_of(at), measured="skipped")

    assert (record.conclusion, record.verdict, record.models) == ("success", None, ())
    assert not new_records


def test_a_model_that_is_not_declared_any_more_is_taken_out_of_the_lock(at: Layout) -> None:
    """Nothing is measured for it, and what it left goes by the same commit."""
    with_twin(at)
    known = bundle_of(at, TWIN)
    both, _ = judged(at, plan_of(at, (TWIN, HOST)), known)
    assert both.conclusion == "success"
    told = yaml.safe_load(at.params.read_text())
    del told["models"][TWIN]
    told["quants"] = {key: one for key, one in told["quants"].items() if one["model"] != TWIN}
    lock = lock_entries.merged((at.root / "dvc.lock").read_text(), known.lock)
    (at.root / "dvc.lock").write_text(lock)
    at.params.write_text(yaml.safe_dump(told, sort_keys=False))
    gone = ModelPlan(model=TWIN, change="removed", covered=True)

    record, new_records = judged(at, plan_of(at, models=(gone,)))

    assert (record.conclusion, record.verdict) == ("success", None)
    assert TWIN in record.sentence
    assert new_records


# --- it fails closed --------------------------------------------------------------------------


def _of_another_commit(good: BundleRecord) -> list[BundleRecord]:
    return [good.model_copy(update={"head": "c" * 40})]


def _twice(good: BundleRecord) -> list[BundleRecord]:
    return [good, good.model_copy(update={"times_s": {}})]


def _of_another_host(good: BundleRecord) -> list[BundleRecord]:
    return [good.model_copy(update={"host": "nowhere"})]


def _not_primary(good: BundleRecord) -> list[BundleRecord]:
    return [good.model_copy(update={"primary": False})]


def _with_a_foreign_one(good: BundleRecord) -> list[BundleRecord]:
    return [good, good.model_copy(update={"host": "nowhere"})]


def _edited_number(good: BundleRecord) -> list[BundleRecord]:
    path = f"results/{MODEL}/benchmark/Q4_K_M.json"
    text = good.files[path].replace('"kld_mean_nats": 0.00', '"kld_mean_nats": 0.000', 1)
    assert text != good.files[path]
    return [good.model_copy(update={"files": {**good.files, path: text}})]


def _without_a_record(good: BundleRecord) -> list[BundleRecord]:
    path = f"results/{MODEL}/verify.json"
    return [good.model_copy(update={"files": {k: v for k, v in good.files.items() if k != path}})]


def _without_an_entry(good: BundleRecord) -> list[BundleRecord]:
    name = f"evaluate@{MODEL}"
    return [good.model_copy(update={"lock": {k: v for k, v in good.lock.items() if k != name}})]


def _failed_chain(good: BundleRecord) -> list[BundleRecord]:
    return [good.model_copy(update={"failures": ("quantize@tiny-llama-Q2_K failed: disk full",)})]


def _of_an_older_machine_file(good: BundleRecord) -> list[BundleRecord]:
    return [good.model_copy(update={"machine": good.machine + " "})]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_of_another_commit, "its bundle is of cccccccccccc"),
        (_twice, "there are two bundles of it"),
        (_of_another_host, "nobody asked for this bundle"),
        (_not_primary, "the first measured host"),
        (_with_a_foreign_one, "nobody asked for this bundle"),
        (_edited_number, "is not what benchmark@tiny-llama-Q4_K_M wrote"),
        (_without_a_record, "verify.json"),
        (_without_an_entry, "has no entry of evaluate@tiny-llama"),
        (_failed_chain, "disk full"),
        (_of_an_older_machine_file, "work/machine.json is not the one of dvc.lock"),
    ],
)
def test_what_does_not_belong_to_the_plan_or_to_itself_is_a_failure(
    at: Layout, spoil: Callable[[BundleRecord], list[BundleRecord]], why: str
) -> None:
    """Foreign, stale, doubled, edited, incomplete: each is named, none is judged or adopted."""
    record, new_records = judged(at, plan_of(at, LEG), *spoil(bundle_of(at)))

    assert record.conclusion == "failure"
    assert any(why in text for text in record.failures), record.failures
    assert not new_records
    assert record.verdict is None


@pytest.mark.parametrize(
    ("results", "conclusion", "why"),
    [
        ({}, "neutral", "its bundle did not come"),
        ({"measured": "cancelled"}, "neutral", "were cancelled"),
        ({"measured": "failure"}, "failure", "A measuring job failed"),
        ({"measured": "skipped"}, "neutral", "the measuring jobs were skipped"),
    ],
)
def test_a_leg_that_left_nothing_never_passes(
    at: Layout, results: dict[str, Any], conclusion: str, why: str
) -> None:
    """A lost runner and a cancelled job ask for another run; a job that failed is a failure."""
    record, new_records = judged(at, plan_of(at, LEG), **results)

    assert record.conclusion == conclusion
    assert any(why in text for text in record.failures)
    assert not new_records


def test_a_job_that_failed_does_not_pass_by_the_bundles_of_the_others(at: Layout) -> None:
    """All bundles are there and good, and still a job said that something went wrong."""
    record, new_records = judged(at, plan_of(at, LEG), bundle_of(at), measured="failure")

    assert (record.conclusion, record.verdict) == ("failure", "PROMOTE")
    assert not new_records


def cut(at: Layout, *, again: bool) -> BundleRecord:
    """Return the bundle of a chain that ended at its first stage."""
    empty = {"lock": {}, "files": {}, "ggufs": (), "toolchain": ""}
    told = {"failures": (f"fetch@{MODEL} failed: the Hub does not answer",), "again": again}
    return bundle_of(at).model_copy(update=empty | told)


@pytest.mark.parametrize(("again", "conclusion"), [(True, "neutral"), (False, "failure")])
def test_a_chain_that_failed_for_a_reason_that_passes_asks_for_another_run(
    at: Layout, *, again: bool, conclusion: str
) -> None:
    """Nobody's model is worse because the Hub did not answer; nothing is merged by it either."""
    record, new_records = judged(at, plan_of(at, LEG), cut(at, again=again), measured="failure")

    assert (record.conclusion, record.verdict, new_records) == (conclusion, None, False)
    assert any("the Hub does not answer" in text for text in record.failures)


def test_a_failure_that_passes_excuses_no_other_one(at: Layout) -> None:
    """Of two models one was cut by the Hub, and of the other nothing came at all."""
    with_twin(at)
    plan = plan_of(at, LEG, (TWIN, HOST))

    record, _ = judged(at, plan, cut(at, again=True), measured="failure")

    assert record.conclusion == "failure"


@pytest.mark.parametrize(
    ("plan", "result", "conclusion", "why"),
    [
        (None, "success", "failure", "left no plan that can be read"),
        (None, "failure", "failure", "The planning job failed"),
        (None, "cancelled", "neutral", "The planning job was cancelled"),
        ("{}", "success", "failure", "plan.json is no plan"),
        ('{"head": NaN}', "success", "failure", "NaN is not a number"),
        ("[" * 10_000, "success", "failure", "nested deeper"),
    ],
)
def test_without_a_plan_nothing_passes(
    at: Layout, plan: str | None, result: Any, conclusion: str, why: str
) -> None:
    """A plan that is missing, or none, is no plan in which nothing has to be done."""
    record, new_records = judged(at, plan, plan_result=result)

    assert record.conclusion == conclusion
    assert any(why in text for text in record.failures), record.failures
    assert (record.plan, new_records) == (None, False)


def test_a_plan_of_an_older_commit_asks_for_the_newer_run(
    at: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody pushed in between: the event names another head than the plan."""
    repository = {"full_name": "octo/fleet"}
    pull = {
        "number": 1,
        "head": {"sha": "d" * 40, "ref": "bump", "repo": repository},
        "base": {"sha": BASE, "ref": "main", "repo": repository},
    }
    (tmp_path / "event.json").write_text(json.dumps({"pull_request": pull}))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_EVENT_PATH", str(tmp_path / "event.json"))

    record, new_records = judged(at, plan_of(at, LEG), bundle_of(at))

    assert (record.conclusion, new_records) == ("neutral", False)
    assert f"The plan is of {HEAD[:12]}" in record.failures[0]


def test_what_a_fork_asks_for_is_not_measured_and_the_sentence_says_so(
    at: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring again changes nothing; a person has to take the branch over."""
    pull = {
        "number": 1,
        "head": {"sha": HEAD, "ref": "bump", "repo": {"full_name": "stranger/fleet"}},
        "base": {"sha": BASE, "ref": "main", "repo": {"full_name": "octo/fleet"}},
    }
    (tmp_path / "event.json").write_text(json.dumps({"pull_request": pull}))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_EVENT_PATH", str(tmp_path / "event.json"))

    record, _ = judged(at, plan_of(at, LEG), measured="skipped")

    assert record.conclusion == "failure"
    assert any("a branch of a fork" in text for text in record.failures)


def test_a_plan_over_its_budget_says_who_may_let_it_pass(at: Layout) -> None:
    """Nothing was measured, and that is no accident."""
    plan = plan_of(at, LEG, over=("90 GPU minutes, 60 are allowed",), allowed=False)

    record, _ = judged(at, plan, measured="skipped")

    assert record.conclusion == "failure"
    assert "90 GPU minutes" in record.failures[0]
    assert "`over-budget`" in record.failures[0]


def test_a_plan_of_another_declaration_is_a_failure(at: Layout) -> None:
    """What was planned is not what is merged."""
    plan = plan_of(at, LEG)
    good = bundle_of(at)
    at.params.write_text(at.params.read_text() + "# later\n")

    record, _ = judged(at, plan, good)

    assert record.conclusion == "failure"
    assert "another params.yaml" in record.failures[0]


def test_a_plan_that_forgot_a_model_is_found_out(at: Layout) -> None:
    """Everything that is declared has to be covered, whatever the plan asked for."""
    with_twin(at)

    record, new_records = judged(at, plan_of(at, LEG), bundle_of(at))

    assert record.conclusion == "failure"
    assert any(text.startswith(f"{TWIN} on {HOST}: ") for text in record.failures)
    assert not new_records


def test_an_input_that_changed_since_the_measurement_is_found_out(at: Layout) -> None:
    """The records agree with one another, and still are not those of this commit."""
    good = bundle_of(at)
    prompts = at.root / "corpora/prompts.yaml"
    prompts.write_text(prompts.read_text() + "# later\n")

    record, _ = judged(at, plan_of(at, LEG), good)

    assert record.conclusion == "failure"
    assert any("corpora/prompts.yaml changed" in text for text in record.failures)


def test_a_host_is_one_kind_of_machine(at: Layout) -> None:
    """Two runners with the same labels and other hardware measure two different hosts."""
    with_twin(at)
    plan = plan_of(at, LEG, (TWIN, HOST))

    record, new_records = judged(at, plan, bundle_of(at), bundle_of(at, TWIN, memory_gib=8))

    assert record.conclusion == "failure"
    assert f"{HOST} was measured on 2 kinds of machines" in record.failures[0]
    assert (record.models, new_records) == ((), False)


def test_a_disturbed_quant_that_nobody_chose_asks_for_another_run(at: Layout) -> None:
    """Such a head is never covered, so a green check would be followed by a red one."""
    record, new_records = judged(at, plan_of(at, LEG), disturbed(at, "Q2_K"))

    assert record.conclusion == "neutral"
    assert not new_records


def test_every_file_beside_the_bundles_has_to_be_one(at: Layout) -> None:
    """What a job left that is no bundle is not passed over."""
    directory = save(at.root.parent / "bundles", bundle_of(at))
    (directory / "notes.txt").write_text("{}")

    record, _ = judged(at, plan_of(at, LEG), bundle_of(at))

    assert record.conclusion == "failure"
    assert any("notes.txt is no bundle" in text for text in record.failures)


# --- judged again -----------------------------------------------------------------------------


def test_of_what_was_released_before_only_the_base_speaks(at: Layout) -> None:
    """A branch that edits release.json changes nothing of what it is held against."""
    base = commit(at.root)
    at.release(MODEL).write_text("{}")

    here, _ = judged(at, plan_of(at, LEG), bundle_of(at))
    record, _ = judged(at, plan_of(at, LEG, base=base), bundle_of(at))

    assert here.verdict != "PROMOTE", "a base that is not there leaves the checkout"
    assert (record.conclusion, record.verdict) == ("success", "PROMOTE")


def test_whoever_shows_it_judges_the_same_data_again(at: Layout, tmp_path: Path) -> None:
    """A gate.json whose words were changed is not what is shown."""
    plan = plan_of(at, LEG)
    record, _ = judged(at, plan, rejected(at))
    lied = record.model_copy(update={"verdict": "PROMOTE", "conclusion": "success", "models": ()})
    path = tmp_path / "gate.json"
    records.write(path, lied)
    told = GateRecord.model_validate_json(path.read_bytes())

    again = gate.judge_bundles(at, at.params.read_text(), plan, told.bundles)

    assert (again.verdict, again.conclusion) == ("REJECT", "failure")
    assert again.judged[LEG].verdict == "REJECT"
    assert again.models == record.models


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "code", "conclusion"),
    [
        (bundle_of, 0, "success"),
        (rejected, 5, "failure"),
        (lambda at: disturbed(at, "Q4_K_M"), 75, "neutral"),
    ],
)
def test_the_exit_code_is_what_branch_protection_sees(
    at: Layout,
    fleet: Callable[..., subprocess.CompletedProcess[str]],
    make: Callable[[Layout], BundleRecord],
    code: int,
    conclusion: str,
) -> None:
    """Only PROMOTE ends with 0; the outputs say the rest to the jobs that follow."""
    folder = at.root.parent
    (folder / "plan.json").write_text(plan_of(at, LEG).model_dump_json())
    save(folder / "bundles", make(at))
    files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    argv = ("--plan", "../plan.json", "--bundles", "../bundles", "--out", "../gate.json")

    done = fleet(
        "gate", *argv, "--measured", "success", cwd=at.root, GITHUB_ACTIONS="true",
        **{name: str(path) for name, path in files.items()},
    )  # fmt: skip

    assert done.returncode == code, done.stderr
    told = files["GITHUB_OUTPUT"].read_text()
    assert conclusion in told
    assert f"new_records<<{told.partition('new_records<<')[2][:38]}\n" in told
    assert MODEL in files["GITHUB_STEP_SUMMARY"].read_text()
    record = GateRecord.model_validate_json((folder / "gate.json").read_bytes())
    assert record.conclusion == conclusion


def test_a_wrong_declaration_ends_with_its_own_code(
    at: Layout, fleet: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The plan names the line; the gate is red by it and measures nothing."""
    problem = PlanProblem(file="params.yaml", line=3, column=1, text="gatez: unknown key")
    plan = plan_of(at, problems=(problem,), params_blob=None)
    (at.root.parent / "plan.json").write_text(plan.model_dump_json())

    done = fleet("gate", "--plan", "../plan.json", "--bundles", "../no", "--out", "../gate.json",
                 cwd=at.root)  # fmt: skip

    assert done.returncode == 2
    assert "params.yaml:3:1: gatez: unknown key" in done.stderr
    # Outside Actions there is no summary beside it: once is enough.
    assert done.stderr.count("gatez: unknown key") == 1
