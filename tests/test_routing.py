"""Each model goes to the hosts that serve it, and no job starts where it cannot fit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import bundle_factory
import plan_factory
import pytest
import sample
from bundle_factory import TWIN
from plan_factory import MODEL, OTHER, commit, copy, edit, edit_json

from pipelines import (
    adopt,
    bundle,
    comment,
    declaration,
    gate,
    params,
    plan,
    publish_hosts,
    records,
    repro,
    routing,
)
from pipelines.ci_records import LeftOut
from pipelines.comment_render import render
from pipelines.errors import ParamsError
from pipelines.layout import Layout
from pipelines.records import QuantizeRecord

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.ci_records import GateRecord, PlanRecord
    from pipelines.params import Declaration

FIRST, BIG, EDGE = "local", "big", "edge"
LABELS = "    runs_on: [self-hosted, gpu]\n"
RUNS_ON_BIG = "    runs_on: [self-hosted, big]\n"
MIB = 1 << 20


def host(memory: str, more: str = "") -> str:
    """Return a second host that measures."""
    return f"{LABELS}  {BIG}:\n    {memory}\n{more}{RUNS_ON_BIG}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fork of two models and one host of which everything was measured."""
    at = plan_factory.make(tmp_path_factory.mktemp("routing") / "fork")
    commit(at.root)
    return at.root


@pytest.fixture
def at(made: Path, tmp_path: Path) -> Layout:
    """A copy of it."""
    return Layout(copy(made, tmp_path / "fork"))


def declared(at: Layout) -> Declaration:
    """Read params.yaml."""
    return declaration.load(at.params)


def route(at: Layout, model: str, *hosts: str) -> None:
    """Name the hosts of a model."""
    edit(at.params, f"  {model}:\n", f"  {model}:\n    hosts: [{', '.join(hosts)}]\n")


def planned(at: Layout) -> PlanRecord:
    """Commit, and plan against what was before."""
    commit(at.root)
    return plan.make(at, base="HEAD^")


def legs(found: PlanRecord) -> set[tuple[str, tuple[str, ...], bool]]:
    """Return the jobs of a plan."""
    return {(leg.host, leg.models, leg.primary) for leg in found.legs}


def smallest_bytes(at: Layout, model: str) -> int:
    """Return the weights of the smallest recorded quant of a model."""
    paths = at.quant_record("quantize", model, "x").parent.glob("*.json")
    told = [QuantizeRecord.model_validate_json(path.read_bytes()) for path in paths]
    return min(sum(one.tensor_bytes.values()) for one in told)


# --- the route --------------------------------------------------------------------------------


def test_a_model_is_measured_and_judged_on_the_hosts_that_it_names(at: Layout) -> None:
    """Each has a first host of its own, whose numbers its releases are made of."""
    edit(at.params, LABELS, host("vram_mib: 24576"))
    route(at, OTHER, BIG)
    found = planned(at)

    assert legs(found) == {
        (FIRST, (MODEL,), True), (BIG, (MODEL,), False), (BIG, (OTHER,), True),
    }  # fmt: skip
    slices = declaration.slices(declared(at))
    assert list(params.choose_slice(declared(at), OTHER).hosts) == [BIG]
    assert list(params.load_test_slice(declared(at), OTHER).slos) == [BIG]
    assert list(params.choose_slice(declared(at), MODEL).hosts) == [FIRST, BIG]
    assert slices
    (include,) = [
        one
        for one in json.loads(plan.matrix(found))["include"]
        if (one["host"], one["models"]) == (BIG, OTHER)
    ]
    assert include["runs_on"] == ["self-hosted", "big"]


def test_naming_every_host_changes_nothing_and_measures_nothing(at: Layout) -> None:
    """What stages read is byte for byte the same, so no release and no number is lost."""
    before = {name: one.model_dump_json() for name, one in declaration.slices(declared(at)).items()}
    route(at, MODEL, FIRST)

    after = {name: one.model_dump_json() for name, one in declaration.slices(declared(at)).items()}
    assert after == before
    assert planned(at).legs == ()


def test_a_host_without_a_runner_is_still_measured_for_by_the_first_one(at: Layout) -> None:
    """As before, where a model is served on such a host alone."""
    edit(at.params, LABELS, f"{LABELS}  {EDGE}:\n    memory_mib: 8192\n")
    route(at, OTHER, EDGE)
    told = declared(at)

    assert bundle.primary_host(told, OTHER) == FIRST
    assert bundle.measured_hosts(told, OTHER) == (FIRST,)
    assert legs(planned(at)) == {(FIRST, (MODEL,), True), (FIRST, (OTHER,), True)}


def test_records_of_another_first_host_are_measured_again(at: Layout) -> None:
    """A route that changes whose numbers results/MODEL holds says so."""
    edit(at.params, LABELS, host("vram_mib: 24576"))
    commit(at.root)
    route(at, MODEL, BIG)
    found = planned(at)

    (one,) = [each for each in found.models if each.model == MODEL]
    assert "big is now the first measured host" in " ".join(run.why for run in one.runs)
    assert (BIG, (MODEL,), True) in legs(found)


@pytest.mark.parametrize(
    ("names", "said"),
    [("[lokal]", 'host "lokal" is not declared'), ("[local, local]", "is there twice"), ("[]", "")],
)
def test_a_route_to_nowhere_is_refused_on_its_line(at: Layout, names: str, said: str) -> None:
    """With what was probably meant."""
    edit(at.params, f"  {MODEL}:\n", f"  {MODEL}:\n    hosts: {names}\n")

    with pytest.raises(ParamsError) as caught:
        declared(at)

    (problem,) = caught.value.problems
    assert problem.text.startswith(f"models.{MODEL}.hosts")
    assert said in problem.text


def test_a_machine_is_refused_a_model_that_is_not_served_there(at: Layout) -> None:
    """And without a name it makes its own models alone."""
    edit(at.params, LABELS, host("vram_mib: 24576"))
    route(at, OTHER, FIRST)
    told = declared(at)

    assert repro._of_host(told, BIG) == [MODEL]
    assert repro._of_host(told, FIRST) == []
    with pytest.raises(ParamsError, match=f"{OTHER} is not measured on {BIG}: it is on {FIRST}"):
        repro._require_may_measure(told, [MODEL, OTHER], BIG, "load-test")
    route(at, MODEL, BIG)
    # The first one of this model: here its release is made.
    repro._require_may_measure(declared(at), [MODEL], BIG, None)
    with pytest.raises(ParamsError, match="a release is made of the records of local, not of big"):
        repro._require_may_measure(told, [MODEL], BIG, None)


def test_a_run_that_says_no_host_is_told_whose_numbers_it_makes(
    at: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """One machine would measure for two, and nobody could see it in the records."""
    edit(at.params, LABELS, host("memory_mib: 65536"))
    assert repro._of_several(declared(at), [MODEL, OTHER]) == ""
    route(at, OTHER, BIG)
    said = repro._of_several(declared(at), [MODEL, OTHER])
    assert f"counts as measured on {FIRST} and {BIG} ({FIRST}: {MODEL}; {BIG}: {OTHER})" in said
    assert "--host NAME" in said
    assert repro._of_several(declared(at), [OTHER]) == ""

    repro._require_may_measure(declared(at), [MODEL, OTHER], None, None)
    assert "counts as measured on" in capsys.readouterr().err


@pytest.fixture
def two(tmp_path: Path) -> Layout:
    """A fork of two models on two hosts, each of which serves one of them."""
    at = bundle_factory.with_twin(bundle_factory.fleet(tmp_path / "two"))
    bundle_factory.with_host(at, EDGE)
    edit(at.params, f"  {MODEL}:\n", f"  {MODEL}:\n    hosts: [{FIRST}]\n")
    edit(at.params, f"  {TWIN}:\n", f"  {TWIN}:\n    hosts: [{EDGE}]\n")
    sample.take(at.root, "examples")
    return at


def judged(at: Layout, **changes: Any) -> GateRecord:
    """Let the gate look at what the host of the second model measured."""
    path = at.root.parent / "plan.json"
    path.write_text(bundle_factory.plan_of(at, (TWIN, EDGE)).model_dump_json())
    one = bundle_factory.bundle_of(at, TWIN, EDGE).model_copy(update=changes)
    bundles = bundle_factory.save(at.root.parent / "bundles", one)
    return gate.gate(at, plan_file=path, bundles=bundles)[0]


def test_what_the_host_of_a_model_measured_is_adopted_as_its_first(two: Layout) -> None:
    """Judged for its hosts alone, put into results/MODEL; then nothing is left to measure."""
    found = judged(two)

    assert (found.conclusion, found.failures) == ("success", ()), found.failures
    assert [one.host for one in found.models if one.model == TWIN] == [EDGE]
    records.write(two.root.parent / "gate.json", found)
    adopt.main(two, two.root.parent / "gate.json")
    bundle_factory.commit(two.root)
    assert two.model_record("choose", TWIN).is_file()
    assert not two.on_hosts(TWIN).exists()
    assert plan.make(two).legs == ()
    told = declared(two)
    assert publish_hosts.refusals(
        told, params.publish_slice(told, TWIN), two, today="2026-11-22"
    ) == ()  # fmt: skip


def test_a_bundle_that_is_not_of_the_models_first_host_is_refused(two: Layout) -> None:
    """A release is made of that one's numbers."""
    found = judged(two, primary=False)

    assert found.failures == (f"{TWIN} on {EDGE}: it is the first measured host.",)


# --- what cannot fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "more", "starts"),
    [
        ("vram_mib: {under}", "", False),
        # llama.cpp keeps the token embeddings elsewhere: the margin is not held against the card.
        ("vram_mib: {over}", "    margin_mib: 4096\n", True),
        ("memory_mib: {over}", "    margin_mib: 4096\n", False),
        ("memory_mib: 9999", "    margin_mib: 4096\n", True),
    ],
)
def test_no_job_starts_where_not_even_the_smallest_quant_fits(
    at: Layout,
    memory: str,
    more: str,
    starts: bool,  # noqa: FBT001 - a column of the table
) -> None:
    """It would take a runner for an hour to say what the records know; the plan says it instead."""
    size_mib = smallest_bytes(at, MODEL) // MIB
    sizes = {"under": max(size_mib - 1, 1), "over": size_mib + 1}
    edit(at.params, LABELS, host(memory.format(**sizes), more))
    # The other one has another quant, which is larger.
    route(at, OTHER, FIRST)
    found = planned(at)

    assert ((BIG, (MODEL,), False) in legs(found)) is starts
    (one,) = [each for each in found.models if each.model == MODEL]
    assert [each.host for each in one.left_out] == ([] if starts else [BIG])
    told = declared(at)
    expected = gate._expected(told, found)
    assert ((MODEL, BIG) in expected) is starts
    assert (MODEL, FIRST) in expected
    measuring = render(comment.measuring(found, head=found.head))
    for said in (" ".join(plan._lines(found, "in git")), plan.markdown(found), measuring):
        words = said.replace("\\", "").replace("\u200b", "")
        assert ("is not measured on big: even Q2" in words) is not starts, said


@pytest.mark.parametrize("is_left_out", [True, False])
def test_a_host_that_was_left_out_serves_nothing_by_the_numbers_of_another_one(
    tmp_path: Path,
    is_left_out: bool,  # noqa: FBT001 - a column of the table
) -> None:
    """Token embeddings lie in main memory: what is larger than a card by its bytes may fit."""
    at = bundle_factory.fleet(tmp_path / "fleet")
    bundle_factory.with_host(at, EDGE)
    sample.take(at.root, "examples")
    first = bundle_factory.bundle_of(at, MODEL, FIRST)
    legs = [(MODEL, FIRST)] if is_left_out else [(MODEL, FIRST), (MODEL, EDGE)]
    asked = bundle_factory.plan_of(at, *legs)
    if is_left_out:
        left_out = (LeftOut(host=EDGE, why="even Q2_K is too large"),)
        asked = asked.model_copy(
            update={"models": (asked.models[0].model_copy(update={"left_out": left_out}),)}
        )
    bundles = [first] if is_left_out else [first, bundle_factory.bundle_of(at, MODEL, EDGE)]
    found = gate.judge_bundles(at, at.params.read_text(), asked, bundles)

    assert [one.verdict for one in found.models] == ["PROMOTE", "PROMOTE"], found
    assert found.conclusion == ("failure" if is_left_out else "success"), found.failures
    assert (f"Name it in `models.{MODEL}.hosts`, beside" in found.sentence) is is_left_out


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("the operator named the host", lambda at: route(at, MODEL, FIRST, BIG)),
        ("another revision has other sizes", lambda at: edit_json(
            at.model_record("convert", MODEL), revision="0" * 40)),
        ("one quant was never made",
         lambda at: at.quant_record("quantize", MODEL, "Q2_K").unlink()),
        ("experts may stay in main memory", lambda at: edit(
            at.params, f"  {MODEL}:\n", f"  {MODEL}:\n    serving: {{gpu_layers: 3}}\n")),
    ],
)  # fmt: skip
def test_where_that_is_not_certain_the_host_measures(at: Layout, what: str, change: Any) -> None:
    """No estimate keeps a host from being asked."""
    edit(at.params, LABELS, host("vram_mib: 1"))
    assert routing.left_out(declared(at), at, MODEL)

    change(at)

    assert routing.left_out(declared(at), at, MODEL) == {}, what


def test_a_first_host_that_can_serve_nothing_is_a_problem_before_it_measures(at: Layout) -> None:
    """Its numbers make the releases; the line of the model says what to declare."""
    edit(at.params, "    memory_mib: 4096\n", "    memory_mib: 1025\n")
    assert planned(at).problems == ()  # the choice alone is made again, and rejects
    edit(at.params, "repetitions: 7", "repetitions: 8")
    found = planned(at)

    assert found.legs == ()
    assert {one.line for one in found.problems} == {
        number
        for number, line in enumerate(at.params.read_text().splitlines(), 1)
        if line in {f"  {MODEL}:", f"  {OTHER}:"}
    }
    assert "which hosts serve it" in found.problems[0].text
