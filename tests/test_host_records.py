"""A second measured host goes on from its own records, and from nobody else's."""

from __future__ import annotations

import contextlib
import json
import shutil
from typing import TYPE_CHECKING

import bundle_factory
import plan_factory
import pytest
from plan_factory import MODEL, commit, copy, edit, git

from pipelines import (
    adopt,
    atomic,
    bundle,
    bundle_files,
    choose,
    compare_sides,
    declaration,
    gate,
    host_records,
    plan,
    records,
)
from pipelines.__main__ import main
from pipelines.ci_records import MEASURING
from pipelines.coverage import Coverage
from pipelines.errors import ParamsError
from pipelines.layout import Layout

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.params import Declaration

FIRST, OTHER_HOST = "local", "big"
LABELS = "    runs_on: [self-hosted, gpu]\n"
HOST = (LABELS, f"{LABELS}  {OTHER_HOST}:\n    vram_mib: 24576\n    runs_on: [self-hosted, big]\n")
SHELF = (LABELS, f"{LABELS}  shelf:\n    memory_mib: 8192\n")
HW_IDS = {FIRST: "0" * 64, OTHER_HOST: "1" * 64}
ON_MACHINE = {"benchmark", "choose", "load-test"}


def declared(at: Layout) -> Declaration:
    """Read params.yaml."""
    return declaration.load(at.params)


def measure(at: Layout, host: str) -> None:
    """Leave what a run for a host leaves: its records, and DVC's own lock of them."""
    plan_factory.probe(at)
    at.machine.write_text(json.dumps({"hw_id": HW_IDS[host]}))
    for path in at.root.glob("results/*/benchmark/*.json"):
        told = json.loads(path.read_text())
        plan_factory.edit_json(path, machine=told["machine"] | {"hw_id": HW_IDS[host]})
    plan_factory.lock(at)


def dvc_would_run(at: Layout, host: str) -> set[str]:
    """Return the stages that DVC itself finds changed on the machine of a host."""
    from dvc.repo import Repo  # noqa: PLC0415 - heavy

    plan_factory.probe(at)
    at.machine.write_text(json.dumps({"hw_id": HW_IDS[host]}))
    with contextlib.chdir(at.root), Repo() as repo:
        return {name for name in repo.status() if name.partition("@")[0] in MEASURING}


def adopted(at: Layout, there: Layout, host: str) -> None:
    """Put what was measured in another checkout where git keeps it for a host."""
    told = declared(at)
    for model in told.models:
        found = bundle.from_git(there, told, model, host=FIRST, head="0" * 40)
        found = found.model_copy(update={"host": host, "primary": False})
        adopt.write(at, bundle_files.changes(at, told, [found]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A fork that its first host measured; and the same with what the other one measured."""
    folder = tmp_path_factory.mktemp("hosts")
    at = plan_factory.make(folder / "one")
    edit(at.params, *SHELF)
    edit(at.params, *HOST)
    measure(at, FIRST)
    commit(at.root)
    both = Layout(copy(at.root, folder / "both"))
    there = Layout(copy(at.root, folder / "there"))
    measure(there, OTHER_HOST)
    adopted(both, there, OTHER_HOST)
    commit(both.root)
    return at.root, both.root


@pytest.fixture
def fresh(made: tuple[Path, Path], tmp_path: Path) -> Layout:
    """A fork in which the other host never measured."""
    return Layout(copy(made[0], tmp_path / "fresh"))


@pytest.fixture
def both(made: tuple[Path, Path], tmp_path: Path) -> Layout:
    """A fork that is covered on both hosts."""
    return Layout(copy(made[1], tmp_path / "both"))


# --- what runs --------------------------------------------------------------------------------


def test_what_another_host_measured_is_not_measured_again_there(both: Layout) -> None:
    """Its machine finds nothing to do; without its own records everything measured would run."""
    assert {name.partition("@")[0] for name in dvc_would_run(both, OTHER_HOST)} >= {"benchmark"}

    assert host_records.lay(both, declared(both), OTHER_HOST) > 0

    assert dvc_would_run(both, OTHER_HOST) == set()
    text = both.quant_record("benchmark", MODEL, "Q4_K_M").read_text()
    assert json.loads(text)["machine"]["hw_id"] == HW_IDS[OTHER_HOST]
    assert host_records.held(both) == OTHER_HOST


def test_a_quant_more_is_all_that_the_other_host_measures(both: Layout) -> None:
    """What is new runs there, as plan and DVC agree; the other quants stay as they were."""
    edit(both.params, f"  {MODEL}-Q6_K:", f"  {MODEL}-Q5_K_M: {{model: {MODEL}, type: Q5_K_M}}\n"
         f"  {MODEL}-Q6_K:")  # fmt: skip
    commit(both.root)
    planned = Coverage(declared(both), both).runs(MODEL, host=OTHER_HOST)

    host_records.lay(both, declared(both), OTHER_HOST)

    wanted = {f"{run.stage}@{run.key}" for run in planned if not run.why.startswith("after ")}
    assert wanted == {f"{stage}@{MODEL}-Q5_K_M" for stage in ("quantize", "benchmark")} | {
        f"{stage}@{MODEL}" for stage in ("evaluate", "choose", "load-test")
    }
    found = {name for name in dvc_would_run(both, OTHER_HOST) if MODEL in name}
    assert f"benchmark@{MODEL}-Q6_K" not in found
    assert found <= {f"{run.stage}@{run.key}" for run in planned}


def test_a_host_that_is_new_measures_everything_itself_and_makes_nothing_again(
    fresh: Layout,
) -> None:
    """Even on an equal machine, no number of the first host becomes one of the new host."""
    host_records.lay(fresh, declared(fresh), OTHER_HOST)

    for machine in (FIRST, OTHER_HOST):
        assert {name.partition("@")[0] for name in dvc_would_run(fresh, machine)} == ON_MACHINE
    assert not list(fresh.root.glob("results/*/benchmark/*.json"))
    assert not fresh.model_record("choose", MODEL).exists()
    assert fresh.quant_record("quantize", MODEL, "Q4_K_M").exists()


def test_only_the_new_host_has_jobs(fresh: Layout, both: Layout) -> None:
    """A covered first host is left alone; where both are covered there is no job."""
    shutil.rmtree(fresh.root / "work")
    assert {leg.host for leg in plan.make(fresh).legs} == {OTHER_HOST}
    assert plan.make(both).legs == ()


def test_records_are_laid_once_and_what_was_measured_since_stays(both: Layout) -> None:
    """The second step of a job goes on from the first; a new checkout begins anew."""
    told = declared(both)
    host_records.lay(both, told, OTHER_HOST)
    path = both.quant_record("benchmark", MODEL, "Q4_K_M")
    path.write_text("measured since")
    assert host_records.lay(both, told, OTHER_HOST) == 0
    assert path.read_text() == "measured since"

    git(both.root, "reset", "-q", "--hard", "HEAD")
    assert host_records.held(both) is None
    assert host_records.lay(both, told, OTHER_HOST) > 0
    assert dvc_would_run(both, OTHER_HOST) == set()


def test_a_kill_while_records_are_laid_is_repaired_by_the_same_command(
    both: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is taken for laid that is not."""
    write, written = atomic.write_bytes, []

    def killed(target: Path, data: bytes) -> None:
        written.append(target)
        if len(written) == 4:
            raise KeyboardInterrupt
        write(target, data)

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            host_records.lay(both, declared(both), OTHER_HOST)
    assert host_records.held(both) is None

    host_records.lay(both, declared(both), OTHER_HOST)

    assert dvc_would_run(both, OTHER_HOST) == set()


def test_a_host_that_becomes_the_first_one_takes_its_records_along(both: Layout) -> None:
    """The first host goes; what the other one measured is packed as it is, and covers the head."""
    text = both.params.read_text()
    head, _, tail = text.partition(f"  {FIRST}:\n    memory_mib: 4096\n{LABELS}")
    both.params.write_text(head + tail)
    commit(both.root)
    told = declared(both)
    assert bundle.primary_host(told) == OTHER_HOST

    host_records.lay(both, told, OTHER_HOST)

    measured = {name for name in dvc_would_run(both, OTHER_HOST) if "benchmark" in name}
    assert measured == set()
    packed = [
        bundle.measured(both, told, model, host=OTHER_HOST, head="0" * 40, remote=None)
        for model in told.models
    ]
    assert all(one.primary for one in packed)
    assert list(host_records.not_of(both, told, MODEL, OTHER_HOST)) == []
    adopt.write(both, bundle_files.changes(both, told, packed))
    assert not list(both.root.glob("results/*/on/*/*.json"))
    found = bundle.from_git(both, told, MODEL, host=OTHER_HOST, head="0" * 40)
    assert found.machine_id == HW_IDS[OTHER_HOST]


# --- what is refused --------------------------------------------------------------------------


def test_records_of_one_host_are_never_packed_as_those_of_another(both: Layout) -> None:
    """A bundle says so as a failure, and the next run of another host does not begin."""
    told = declared(both)

    def failures(host: str) -> str:
        made = bundle.measured(both, told, MODEL, host=host, head="0" * 40, remote=None)
        return " ".join(one for one in made.failures if "the records here" in one)

    assert failures(FIRST) == ""
    assert "did not get to run" in failures(OTHER_HOST)
    host_records.lay(both, told, OTHER_HOST)
    assert failures(OTHER_HOST) == ""
    assert f"those of {OTHER_HOST}" in failures(FIRST)
    for host in (FIRST, None):
        with pytest.raises(ParamsError, match=f"what host {OTHER_HOST} measured"):
            host_records.require(both, told, host)


@pytest.mark.parametrize(
    "argv", [["publish", MODEL], ["repro", MODEL], ["adopt", "gate.json"], ["plan"]]
)
def test_numbers_of_another_host_are_no_release_and_no_records_of_the_first(
    both: Layout,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where they were laid, nothing takes them for those that a release is made of."""
    host_records.lay(both, declared(both), OTHER_HOST)
    (both.root / "gate.json").write_text(
        json.dumps({"base": None, "head": None, "verdict": None, "conclusion": "success",
                    "sentence": "x"})
    )  # fmt: skip
    monkeypatch.chdir(both.root)

    assert main(argv) == ParamsError.exit_code

    told = " ".join(capsys.readouterr().err.split())
    assert f"what host {OTHER_HOST} measured, not {FIRST}" in told
    assert not list(both.root.glob("registry/*"))


def test_measurements_that_git_does_not_have_are_not_laid_over(both: Layout) -> None:
    """They would be lost: nothing is written, and the way out is said."""
    lock = both.root / "dvc.lock"
    lock.write_text(lock.read_text().replace("md5: ", "md5:  ", 1))
    before = lock.read_bytes()

    with pytest.raises(ParamsError, match="take its place") as caught:
        host_records.lay(both, declared(both), OTHER_HOST)

    assert "git checkout" in caught.value.hint
    assert lock.read_bytes() == before
    assert not both.laid.exists()


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["repro", "--host", OTHER_HOST], f"made of the records of {FIRST}"),
        (["repro", "--host", OTHER_HOST, "--until", "publish"], "Measure alone"),
        (["repro", "--host", "bigg", "--until", "choose"], 'did you mean "big"'),
        (["repro", "--host", "shelf", "--until", "choose"], "no runner of its own"),
        (["compare", "--host", "shelf", MODEL], "no runner of its own"),
    ],
)  # fmt: skip
def test_a_host_that_cannot_be_meant_is_refused(
    fresh: Layout,
    argv: list[str],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing runs, and nothing is laid, for a host that does not measure or may not release."""
    monkeypatch.chdir(fresh.root)
    assert main(argv) == ParamsError.exit_code
    assert why in " ".join(capsys.readouterr().err.split())
    assert not fresh.laid.exists()


# --- what was chosen before -------------------------------------------------------------------


def test_champion_and_incumbent_of_a_host_are_what_that_host_chose(both: Layout) -> None:
    """By its own choice of the commit; while it has none, by what was chosen for it before."""
    own = both.on_hosts(MODEL) / OTHER_HOST / "choice.json"
    told = json.loads(own.read_text())
    (entry,) = (one for one in told["hosts"][:1])
    told["hosts"] = [
        entry | {"host": FIRST, "winner": "Q6_K", "verdict": "PROMOTE"},
        entry | {"host": OTHER_HOST, "winner": "Q2_K", "verdict": "PROMOTE"},
    ]
    own.write_text(json.dumps(told))
    commit(both.root)
    choice = records.read(own, records.ChoiceRecord)
    first, _ = choose.committed_winners(MODEL, both)
    host_records.lay(both, declared(both), OTHER_HOST)

    incumbents, notes = choose.committed_winners(MODEL, both)

    assert (incumbents[OTHER_HOST], notes) == ("Q2_K", ())
    assert incumbents != first
    assert compare_sides.chosen(choice, OTHER_HOST) == "Q2_K"
    assert compare_sides.chosen(choice) == "Q6_K"


# --- from plan to covered ---------------------------------------------------------------------


def test_two_hosts_from_their_bundles_to_a_second_run_without_a_job(tmp_path: Path) -> None:
    """Judged together and adopted; packed again from its own place, it is the same bundle."""
    at = bundle_factory.with_host(bundle_factory.fleet(tmp_path / "fork"), OTHER_HOST)
    shutil.copytree(plan_factory.ROOT / "examples", at.root / "examples")
    legs = [(MODEL, FIRST), (MODEL, OTHER_HOST)]
    made = [bundle_factory.bundle_of(at, *legs[0]),
            bundle_factory.bundle_of(at, *legs[1], memory_gib=24)]  # fmt: skip
    assert made[0].machine_id != made[1].machine_id
    (tmp_path / "plan.json").write_text(bundle_factory.plan_of(at, *legs).model_dump_json())
    bundles = bundle_factory.save(tmp_path / "bundles", *made)
    found, _ = gate.gate(at, plan_file=tmp_path / "plan.json", bundles=bundles)
    records.write(tmp_path / "gate.json", found)

    adopt.main(at, tmp_path / "gate.json")
    bundle_factory.commit(at.root)

    told = declared(at)
    assert plan.make(at).legs == ()
    host_records.lay(at, told, OTHER_HOST)
    packed = bundle.measured(at, told, MODEL, host=OTHER_HOST, head=made[1].head, remote=None)
    assert (packed.files, packed.lock) == (made[1].files, made[1].lock)
    assert packed.machine_id == made[1].machine_id
