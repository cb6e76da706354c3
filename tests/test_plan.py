"""`fleet plan`: what a pull request means, said before anything runs, whatever the branch holds."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_factory import MODEL, OTHER, commit, copy, edit, edit_json, git, make
from record_factory import compare_record

from pipelines import coverage, declaration, plan, plan_budget, records
from pipelines.__main__ import main
from pipelines.bundle import git_blob
from pipelines.ci_records import (
    MAX_LEGS,
    Budget,
    GateRecord,
    PlannedRun,
    PlanRecord,
    TimesRecord,
)
from pipelines.errors import ParamsError
from pipelines.layout import Layout
from pipelines.params import DeclaredHost

if TYPE_CHECKING:
    from pathlib import Path

GATE = ("max_kld_mean_nats: 0.005", "max_kld_mean_nats: 0.004")
QUANT = (f"  {MODEL}-Q6_K:", f"  {MODEL}-Q5_K_M: {{model: {MODEL}, type: Q5_K_M}}\n  {MODEL}-Q6_K:")
HOST_BIG = "  big:\n    vram_mib: 24576\n    runs_on: [self-hosted, big]"
HOST = ("    runs_on: [self-hosted, gpu]", f"    runs_on: [self-hosted, gpu]\n{HOST_BIG}")
OBJECTIVE = ("objective: speed", "objective: size")
EDITS = (
    GATE, QUANT, HOST, OBJECTIVE, ("repetitions: 7", "repetitions: 8"),
    ("recipe: 1", "recipe: 2"), ("ttft_ms: 500", "ttft_ms: 600"),
    (f"{MODEL}, type: Q6_K}}", f"{MODEL}, type: Q6_K, pure: true}}"),
)  # fmt: skip
COMPARING = f"how long comparing {MODEL} takes: no pull request has timed it, 30 min at most"
REMOVED = ("", "verify.json", "quantize", "on", "toolchain.json")
SOMEBODY = "tester/fleet"
HOSTILE_REF = "$(touch${IFS}x);`x`"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fork with two models, all measured and committed; never changed."""
    at = make(tmp_path_factory.mktemp("planned"))
    commit(at.root, "base")
    return at.root


@pytest.fixture
def at(made: Path, tmp_path: Path) -> Layout:
    """A copy of it, on a branch of its own."""
    root = copy(made, tmp_path / "fork")
    shutil.rmtree(root / "work")
    git(root, "switch", "-q", "-c", "bump")
    return Layout(root)


@pytest.fixture
def fleet(at: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Type `fleet plan` in it; returns exit code, stdout and stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.chdir(at.root)
        code = main(["plan", *argv])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a step of GitHub Actions."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    for name in ("OUTPUT", "STEP_SUMMARY"):
        monkeypatch.setenv(f"GITHUB_{name}", str(tmp_path / name))
    monkeypatch.setenv("GITHUB_EVENT_PATH", str(tmp_path / "event.json"))
    (tmp_path / "event.json").write_text("{}")
    monkeypatch.delenv("GITHUB_SHA", raising=False)
    return tmp_path


def outputs(actions: Path) -> dict[str, str]:
    """Read the outputs of a step; each has one line here."""
    text = (actions / "OUTPUT").read_text()
    return dict(re.findall(r"^(\w+)<<(?:fleet-\w+)\n(.*)\nfleet-\w+$", text, re.MULTILINE))


def event(actions: Path, *, head: str, base: str, labels: tuple[str, ...] = ()) -> None:
    """Start the run by a pull request, with the fields of GitHub's payload that are read."""
    repository = {"full_name": SOMEBODY}
    payload = {
        "pull_request": {
            "number": 7,
            "head": {"sha": head, "ref": HOSTILE_REF, "repo": repository},
            "base": {"sha": base, "ref": "main", "repo": repository},
            "labels": [{"name": name} for name in labels],
        }
    }
    (actions / "event.json").write_text(json.dumps(payload))


def model(found: PlanRecord, name: str = MODEL) -> Any:
    """Return what a plan says of one model."""
    (one,) = [each for each in found.models if each.model == name]
    return one


def line_of(at: Layout, text: str) -> int:
    """Return the first line of params.yaml with a text, counted from one."""
    lines = at.params.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


# --- nothing to do ----------------------------------------------------------------------------


def test_a_branch_that_changes_no_model_measures_nothing(
    at: Layout, fleet: Any, actions: Path
) -> None:
    """No job: GitHub makes an error of an empty matrix, so `any` says it."""
    (at.root / "README.md").write_text("words")
    commit(at.root)
    code, said, _ = fleet("--base", "main", "--out", "plan.json")

    assert code == 0
    assert "Nothing has to be measured" in said
    assert outputs(actions) == {
        "matrix": '{"include":[]}', "any": "false", "covered": "true", "models": "",
        "allowed": "true",
    }  # fmt: skip
    record = PlanRecord.model_validate_json((at.root / "plan.json").read_bytes())
    assert (record.models, record.legs, record.over, record.problems) == ((), (), (), ())
    assert record.base == git(at.root, "rev-parse", "main")
    assert record.head == git(at.root, "rev-parse", "HEAD")
    assert record.params_blob == git(at.root, "rev-parse", "HEAD:params.yaml")


def test_records_that_a_branch_brings_with_its_change_are_not_measured_again(at: Layout) -> None:
    """After the evidence was committed the same declaration is covered, and says so."""
    edit(at.params, "runs_on: [self-hosted, gpu]", "runs_on: [self-hosted, gpu2]")
    edit(at.params, "stable: latest", f"stable: '{'a' * 64}'")
    commit(at.root)
    found = plan.make(at, base="main")
    one = model(found, OTHER)
    assert (one.change, one.covered, one.runs) == ("changed", True, ())
    assert one.what == ("stable latest -> aaaaaaa",)
    assert found.legs == ()
    assert plan.sentence(found).startswith("the records in git cover")


def test_records_that_are_others_are_judged_although_nothing_was_declared(at: Layout) -> None:
    """Measured again for another Modelfile, and rejected: the next run must not find nothing."""
    path = at.model_record("load-test", MODEL)
    lock = at.root / "dvc.lock"
    before = hashlib.md5(path.read_bytes()).hexdigest()
    path.write_text(path.read_text() + "\n")
    # dvc.lock does not know of it yet.
    assert model(plan.make(at, base="main")).covered is False

    edit(lock, before, hashlib.md5(path.read_bytes()).hexdigest())
    commit(at.root)
    found = plan.make(at, base="main")
    one = model(found)
    assert (one.change, one.covered, one.runs) == ("unchanged", True, ())
    assert one.what == ("its records are not those of the base",)
    assert found.legs == ()
    assert [each.model for each in found.models] == [MODEL]


@pytest.mark.parametrize("name", ["compare.json", "on/big/choice.json"])
def test_records_beside_the_lock_count_as_well(at: Layout, name: str) -> None:
    """No entry of dvc.lock knows a comparison; a verdict goes by it."""
    edit(at.params, *HOST)
    commit(at.root, "two hosts")
    base = git(at.root, "rev-parse", "HEAD")
    path = at.root / "results" / MODEL / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    commit(at.root)

    before = plan.make(at, base=base)
    declared = declaration.load(at.params)
    cover = coverage.Coverage(declared, at)
    then = plan._then(declared, at, plan._Base(base, declared), at.root / "then")
    assert plan._renewed(declared, cover, plan._Base(base, declared), then) == {MODEL}
    assert MODEL in {each.model for each in before.models}


def test_a_ledger_and_a_release_are_no_measurement(at: Layout) -> None:
    """The pull request of what was published has nothing to be judged."""
    at.ledger(MODEL).write_text("{}\n")
    at.release(MODEL).write_text("{}\n")
    commit(at.root)
    assert plan.make(at, base="main").models == ()


def test_records_of_a_base_that_nobody_can_read_are_no_reason_to_believe_those_here(
    at: Layout,
) -> None:
    """What cannot be held against anything is judged."""
    (at.root / "dvc.lock").write_text("<<<<<<< ours\n")
    commit(at.root, "broken")
    base = git(at.root, "rev-parse", "HEAD")
    git(at.root, "checkout", "-q", "main", "--", "dvc.lock")
    commit(at.root)
    assert {one.model for one in plan.make(at, base=base).models} == {MODEL, OTHER}


# --- what changed -----------------------------------------------------------------------------


def test_a_gate_is_judged_again_and_nothing_before_it(at: Layout, fleet: Any) -> None:
    """The difference as a sentence, the stages with reasons, the line of the model."""
    edit(at.params, *GATE)
    commit(at.root)
    code, said, _ = fleet("--base=main", "--json")

    assert code == 0
    found = PlanRecord.model_validate_json(said)
    one = model(found)
    assert one.change == "changed"
    assert one.what == ("gates.max_kld_mean_nats 0.005 -> 0.004",)
    assert [(run.stage, run.key, run.why) for run in one.runs] == [
        ("choose", MODEL, "gates.max_kld_mean_nats 0.005 -> 0.004"),
        ("load-test", MODEL, "after choose"),
    ]
    assert one.line == line_of(at, f"  {MODEL}:")
    (leg,) = found.legs
    assert (leg.host, leg.models, leg.primary) == ("local", (MODEL,), True)
    assert leg.runs_on == ("self-hosted", "gpu")
    assert leg.timeout_minutes == 240


def test_a_quant_more_and_a_quant_less_are_named_by_their_type(at: Layout) -> None:
    """And a quant that is not touched is not measured again."""
    edit(at.params, *QUANT)
    edit(at.params, f"  {MODEL}-Q2_K: {{model: {MODEL}, type: Q2_K}}\n", "")
    commit(at.root)
    one = model(plan.make(at, base="main"))
    assert one.what == ("Q5_K_M is new", "Q2_K is gone")
    assert {run.key for run in one.runs} == {f"{MODEL}-Q5_K_M", MODEL}


def test_a_change_of_one_quant_names_it_and_a_change_of_all_is_said_once(at: Layout) -> None:
    """Three quants with nine repetitions are one line."""
    edit(at.params, "repetitions: 7", "repetitions: 9")
    edit(at.params, f"{MODEL}, type: Q6_K}}", f"{MODEL}, type: Q6_K, pure: true}}")
    commit(at.root)
    found = plan.make(at, base="main")
    assert model(found).what == ("Q6_K: pure false -> true", "benchmark.repetitions 7 -> 9")
    assert model(found, OTHER).what == ("benchmark.repetitions 7 -> 9",)


def test_a_pin_of_the_tools_is_a_change_of_every_model(at: Layout) -> None:
    """The numbers of another llama.cpp are none of these."""
    edit(at.params, "llama_cpp_python: 0.3.36", "llama_cpp_python: 0.3.37")
    commit(at.root)
    found = plan.make(at, base="main")
    for name in (MODEL, OTHER):
        assert model(found, name).what == ("toolchain.llama_cpp_python 0.3.36 -> 0.3.37",)
    assert [leg.models for leg in found.legs] == [(MODEL,), (OTHER,)]


def test_models_that_come_go_and_change_their_name_are_told_apart(at: Layout) -> None:
    """Of one that is no more nothing runs; a new name is a new model with an old source."""
    text = at.params.read_text().replace(OTHER, "third-llama")
    at.params.write_text(text)
    commit(at.root)
    found = plan.make(at, base="main")
    new, old = model(found, "third-llama"), model(found, OTHER)

    assert (new.change, new.covered) == ("added", False)
    assert new.what[0].startswith("new: path:examples/tiny-llama at ")
    assert new.what[1] == f"it was called {OTHER}" or MODEL in str(new.what)
    assert (old.change, old.covered, old.line, old.runs) == ("removed", True, None, ())
    assert old.what == ("it is now called third-llama",)
    assert [leg.models for leg in found.legs] == [("third-llama",)]
    # Those of the file first, in its order; then those that are no more.
    assert [one.model for one in found.models] == ["third-llama", OTHER]


def test_what_a_plan_says_of_params_yaml_is_what_lies_here(at: Layout) -> None:
    """The gate compares this name with the file that it reads itself."""
    edit(at.params, *GATE)
    found = plan.make(at, base="main")
    assert found.params_blob == git_blob(at.params.read_bytes())
    assert found.params_blob == git(at.root, "hash-object", "params.yaml")


def test_an_edit_that_is_not_committed_is_planned_and_said(at: Layout, fleet: Any) -> None:
    """The plan names a commit, and a pull request will not hold the edit."""
    edit(at.params, *GATE)
    code, out, err = fleet("--base", "main")
    assert (code, GATE[1].partition(":")[0] in out) == (0, True)
    assert "params.yaml is planned as it lies here" in err

    commit(at.root, "a gate")
    assert "as it lies here" not in fleet("--base", "main")[2]


# --- the base ---------------------------------------------------------------------------------


def test_what_the_other_branch_did_since_is_no_change_of_this_one(at: Layout) -> None:
    """Compared is with where the branch left it, as GitHub shows a pull request."""
    git(at.root, "switch", "-q", "main")
    edit(at.params, "objective: speed", "objective: size")
    theirs = commit(at.root, "theirs")
    git(at.root, "switch", "-q", "bump")
    edit(at.params, *GATE)
    commit(at.root)
    found = plan.make(at, base=theirs)
    assert found.base == git(at.root, "rev-parse", "main~1")
    assert model(found).what == ("gates.max_kld_mean_nats 0.005 -> 0.004",)


def test_without_a_base_the_default_branch_is_taken(at: Layout) -> None:
    """What a person means who types `fleet plan` alone, or an action with an empty input."""
    edit(at.params, *GATE)
    commit(at.root)
    assert plan.make(at) == plan.make(at, base="") == plan.make(at, base="main")


@pytest.mark.parametrize("base", ["nope", "0" * 40, "--output=/tmp/x", "$(touch x)"])
def test_a_base_that_is_not_there_makes_everything_new_and_nothing_measured_twice(
    at: Layout, fleet: Any, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run the plan goes on: what has to run is decided by the head alone."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    edit(at.params, *GATE)
    commit(at.root)
    code, said, err = fleet(f"--base={base}", "--json")
    found = PlanRecord.model_validate_json(said)
    assert code == 0
    assert found.base is None
    assert "everything counts as new" in err
    assert [one.change for one in found.models] == ["added", "added"]
    assert [leg.models for leg in found.legs] == [(MODEL,)]
    assert not list(at.root.rglob("x"))


def test_a_base_that_a_person_mistyped_is_refused(at: Layout, fleet: Any) -> None:
    """Who types a name means it; nothing is planned against something else."""
    commit(at.root)
    code, said, err = fleet("--base=mian")
    assert (code, said) == (2, "")
    assert 'git knows no commit "mian"' in err
    assert "next: " in err


def test_a_plan_for_a_folder_that_is_not_there_makes_none(at: Layout, fleet: Any) -> None:
    """A mistyped folder is not made on the way."""
    code, _, err = fleet("--out", str(at.root / "nope/plan.json"))
    assert code == 2
    assert "mkdir -p" in err
    assert not (at.root / "nope").exists()


def test_records_that_are_not_committed_are_not_said_to_be_in_git(at: Layout, fleet: Any) -> None:
    """A pull request holds only what is committed."""
    path = at.model_record("load-test", MODEL)
    before = hashlib.md5(path.read_bytes()).hexdigest()
    path.write_text(path.read_text() + "\n")
    edit(at.root / "dvc.lock", before, hashlib.md5(path.read_bytes()).hexdigest())
    _, here, _ = fleet("--base=main")
    commit(at.root)
    _, there, _ = fleet("--base=main")
    assert "the records here, not all of them committed, cover everything" in here
    assert "the records in git cover everything" in there


def test_a_host_that_comes_or_goes_is_one_word_and_no_json() -> None:
    """Its values stand in params.yaml."""
    before = {"hosts": {"local": {"memory_mib": 4096}}, "slos": {"local": {"ttft_ms": 500}}}
    after = {"hosts": {"desk": {"vram_mib": 24576}}, "slos": {"desk": {"ttft_ms": 500}}}
    assert coverage.differences(before, after) == [
        "host local is gone", "host desk is new",
        "slos of host local are gone", "slos of host desk are new",
    ]  # fmt: skip


def test_a_base_that_this_version_cannot_read_is_no_reason_to_stop(at: Layout, fleet: Any) -> None:
    """An older declaration, or one that was merged broken: somebody has to repair it."""
    git(at.root, "switch", "-q", "main")
    good = at.params.read_text()
    at.params.write_text(good + "\nunknown: {}\n")
    broken = commit(at.root, "broken")
    git(at.root, "switch", "-q", "-c", "repair")
    at.params.write_text(good)
    commit(at.root)
    code, said, err = fleet("--base", broken, "--json")
    found = PlanRecord.model_validate_json(said)
    assert (code, found.base, found.legs) == (0, broken, ())
    assert {one.change for one in found.models} == {"added"}
    assert "1 problem for this version" in err


def test_a_shallow_clone_says_what_checkout_has_to_bring(
    at: Layout,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What actions/checkout leaves without `fetch-depth: 0`; a base typed by hand has to exist."""
    base = git(at.root, "rev-parse", "HEAD")
    edit(at.params, *GATE)
    commit(at.root)
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{at.root}", "shallow")
    with pytest.raises(ParamsError) as refused:
        plan.make(Layout(tmp_path / "shallow"), base=base)
    assert "fetch-depth: 0" in refused.value.hint
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    found = plan.make(Layout(tmp_path / "shallow"), base=base)
    assert found.base is None
    assert "fetch-depth: 0" in capsys.readouterr().err
    assert [leg.models for leg in found.legs] == [(MODEL,)]


# --- a declaration that is wrong --------------------------------------------------------------


def test_every_problem_is_said_at_once_on_its_line_and_nothing_is_planned(
    at: Layout, fleet: Any, actions: Path
) -> None:
    """YAML, types, contradictions and files; the file is written, for the gate to show."""
    edit(at.params, "objective: speed", "objective: fast")
    edit(at.params, "evals: [technical-english]", "evals: [missing]")
    edit(at.params, f"  {MODEL}-Q6_K:", f"  {MODEL}-Q9:")
    edit(at.params, "path: corpora/calibration.txt", "path: corpora/nothing.txt")
    edit(at.params, "    memory_mib: 4096\n", "")
    edit(at.params, "max_kld_mean_nats: 0.05\n", "max_kld_mean_nats: .nan\n")
    code, _, err = fleet("--base", "main", "--out", "plan.json")

    assert code == 2
    found = PlanRecord.model_validate_json((at.root / "plan.json").read_bytes())
    texts = {one.line: one.text for one in found.problems}
    for text, said in (
        ("objective: fast", "fast"),
        ("evals: [missing]", "missing"),
        (f"{MODEL}-Q9", "must be called"),
        ("corpora/nothing.txt", "does not exist"),
        ("    runs_on", "memory_mib"),
        (".nan", "max_kld_mean_nats"),
    ):
        number = line_of(at, text) - (text == "    runs_on")
        assert said in texts[number], texts
        assert f"::error file=params.yaml,line={number}," in err
    assert (found.models, found.legs, found.allowed) == ((), (), False)
    assert outputs(actions) == {
        "matrix": '{"include":[]}', "any": "false", "covered": "false", "models": "",
        "allowed": "false",
    }  # fmt: skip
    assert "params.yaml cannot be built" in (actions / "STEP_SUMMARY").read_text()


def test_a_branch_without_a_declaration_has_a_plan_and_a_gate_that_say_so(
    at: Layout, fleet: Any
) -> None:
    """Whoever deletes params.yaml reads that, not that a file of the workflow is missing."""
    at.params.unlink()
    commit(at.root)

    code, _, said = fleet("--base", "main", "--out", "plan.json")
    judged = main(["gate", "--plan", "plan.json", "--bundles", "none", "--out", "gate.json"])

    assert (code, judged) == (2, 2)
    assert "params.yaml" in said
    (problem,) = PlanRecord.model_validate_json((at.root / "plan.json").read_bytes()).problems
    assert "No such file" in problem.text
    gated = GateRecord.model_validate_json((at.root / "gate.json").read_bytes())
    assert gated.conclusion == "failure"
    assert any("No such file" in text for text in gated.failures)


@pytest.mark.parametrize(
    "text", ["", "[]", "a: [", "\x00", "&a [*a]", "x: !!python/object:os.system {}", "- " * 3000]
)
def test_a_file_that_is_no_declaration_is_a_problem_not_a_traceback(
    at: Layout, fleet: Any, text: str
) -> None:
    """Whatever a branch puts there."""
    at.params.write_text(text)
    code, _, _ = fleet("--out", "plan.json")
    found = PlanRecord.model_validate_json((at.root / "plan.json").read_bytes())
    assert code == 2
    assert found.problems


def test_a_thousand_problems_fit_into_a_plan(at: Layout) -> None:
    """The first of them, and how many more there are."""
    at.params.write_text(at.params.read_text() + "".join(f"x{n}: 1\n" for n in range(1000)))
    found = plan.make(at)
    assert len(found.problems) == 201
    assert found.problems[-1].text.startswith("800 more problems")


def test_a_lock_that_was_merged_by_text_is_a_problem_of_its_own(at: Layout, fleet: Any) -> None:
    """Its line, and what to do."""
    edit(at.root / "dvc.lock", "stages:\n", "<<<<<<< HEAD\nstages:\n")
    code, _, _ = fleet("--out", "plan.json")
    (problem,) = PlanRecord.model_validate_json((at.root / "plan.json").read_bytes()).problems
    assert code == 2
    assert (problem.file, problem.line) == ("dvc.lock", 3)
    assert "git checkout origin/main -- dvc.lock" in problem.text


@pytest.mark.parametrize(
    "name", ["$(touch x)", "a b", "::error::x", "`x`", "<img src=x>", "x\\n::set-output", "-rf"]
)
def test_a_hostile_name_is_refused_before_it_is_anywhere(
    at: Layout, fleet: Any, actions: Path, name: str
) -> None:
    """A model is a word of lower-case letters; what is not, is shown quoted and runs nothing."""
    text = at.params.read_text().replace(f"  {OTHER}:", f"  {json.dumps(name)}:")
    at.params.write_text(text)
    code, _, err = fleet("--out", "plan.json")
    assert code == 2
    assert outputs(actions)["matrix"] == '{"include":[]}'
    # A runner obeys `::` at the start of a line; only our own annotations begin so.
    assert all(line.startswith("::error file=") for line in err.splitlines() if line[:2] == "::")
    assert "<img" not in (actions / "STEP_SUMMARY").read_text()
    assert not list(at.root.rglob("x"))


def test_text_of_a_declaration_is_only_text_in_a_summary(
    at: Layout, fleet: Any, actions: Path
) -> None:
    """A rule for tensors may hold what Markdown, HTML and GitHub give a meaning."""
    rule = "{match: 'a|@team<img>', type: q8_0}"
    edit(at.params, f"{MODEL}, type: Q6_K}}", f"{MODEL}, type: Q6_K, tensor_types: [{rule}]}}")
    commit(at.root)
    code, said, _ = fleet("--base=main")
    assert code == 0
    text = (actions / "STEP_SUMMARY").read_text()
    assert "@team" in said
    assert "@team" not in text
    assert "<img" not in text
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {MODEL}")]
    assert row.count("|") == 8


# --- the pull request -------------------------------------------------------------------------


def test_head_base_and_labels_are_those_of_the_event(at: Layout, fleet: Any, actions: Path) -> None:
    """Also of a branch whose name a shell would run."""
    edit(at.params, *GATE)
    at.params.write_text(at.params.read_text() + "\nplan: {max_gpu_minutes: 0.001}\n")
    head, base = commit(at.root), git(at.root, "rev-parse", "main")

    event(actions, head=head, base=base)
    code, _, err = fleet("--base", "", "--out", "plan.json")
    found = PlanRecord.model_validate_json((at.root / "plan.json").read_bytes())
    assert code == 5
    assert (found.head, found.base, found.allowed) == (head, base, False)
    assert "where plan.max_gpu_minutes allows 0.001" in found.over[0]
    assert "over-budget" in err
    assert outputs(actions)["any"] == outputs(actions)["allowed"] == "false"
    assert outputs(actions)["matrix"] == '{"include":[]}'
    assert found.legs

    (actions / "OUTPUT").unlink()
    event(actions, head=head, base=base, labels=("over-budget",))
    assert fleet("--out", "plan.json")[0] == 0
    assert outputs(actions)["any"] == outputs(actions)["allowed"] == "true"
    assert json.loads(outputs(actions)["matrix"]) == {
        "include": [
            {
                "host": "local", "models": MODEL, "runs_on": ["self-hosted", "gpu"],
                "primary": True, "timeout_minutes": 240, "number": 1,
            }
        ]
    }  # fmt: skip
    assert not list(at.root.rglob("x"))


def test_a_checkout_of_the_merge_is_refused_with_what_to_check_out(
    at: Layout, fleet: Any, actions: Path
) -> None:
    """What would be measured is not what would be merged into the branch."""
    base = git(at.root, "rev-parse", "main")
    commit(at.root)
    event(actions, head="1" * 40, base=base)
    code, _, err = fleet("--out", "plan.json")
    assert code == 2
    assert "github.event.pull_request.head.sha" in err
    assert not (at.root / "plan.json").exists()


def test_only_the_label_itself_lets_a_plan_over_its_budget_pass(at: Layout) -> None:
    """Another one means nothing, however it looks."""
    edit(at.params, *GATE)
    at.params.write_text(at.params.read_text() + "\nplan: {max_gpu_minutes: 0.001}\n")
    assert plan.make(at, base="main", labels=["bug", "over-budget"]).allowed
    for label in ("Over-Budget", "over-budget\n", "bug", ""):
        assert not plan.make(at, base="main", labels=[label]).allowed


# --- hosts ------------------------------------------------------------------------------------


def test_a_fleet_without_a_runner_is_told_which_line_is_missing(at: Layout, fleet: Any) -> None:
    """Only if something has to be measured: who measures by hand commits what he measured."""
    edit(at.params, "    runs_on: [self-hosted, gpu]\n", "")
    commit(at.root)
    assert fleet("--base=main")[0] == 0

    edit(at.params, *GATE)
    commit(at.root)
    code, _, _ = fleet("--base=main", "--out=plan.json")
    (problem,) = PlanRecord.model_validate_json((at.root / "plan.json").read_bytes()).problems
    assert code == 2
    assert problem.line == line_of(at, "hosts:")
    assert MODEL in problem.text
    assert "runs_on: [self-hosted, gpu]" in problem.text


def test_each_host_with_a_runner_measures_for_itself(at: Layout) -> None:
    """What one of them measured says nothing of the other; one without labels measures nothing."""
    edit(at.params, *HOST)
    edit(at.params, "  big:\n", "  shelf:\n    memory_mib: 8192\n  big:\n")
    commit(at.root)
    found = plan.make(at, base="main")
    legs = {(leg.host, leg.models, leg.primary) for leg in found.legs}
    # New hosts are judged as well, so the choice of the first is made again.
    assert legs == {
        ("local", (MODEL,), True), ("local", (OTHER,), True),
        ("big", (MODEL,), False), ("big", (OTHER,), False),
    }  # fmt: skip
    one = model(found)
    assert {run.stage for run in one.runs if not run.why.startswith("on big: ")} == {
        "choose", "load-test",
    }  # fmt: skip
    assert [run.why for run in one.runs if run.stage == "fetch"] == ["on big: never measured there"]


def test_records_of_the_first_host_are_not_those_of_another_one_that_is_put_first(
    at: Layout, tmp_path: Path
) -> None:
    """Who measures first decides whose numbers results/MODEL holds."""
    edit(at.params, "  local:\n    memory_mib: 4096", "  first:\n    memory_mib: 4096")
    commit(at.root)
    found = plan.make(at, base="main")
    one = model(found)
    assert [leg.host for leg in found.legs] == ["first", "first"]
    assert one.covered is False

    # And if the declaration is the same for both, so that no parameter tells.
    declared = declaration.load(at.params)
    cover = coverage.Coverage(declared, at)
    base = plan._Base(git(at.root, "rev-parse", "main"), None)
    then = plan._then(declared, at, base, tmp_path / "then")
    assert plan._moved(declared, cover, base, then) == {}
    before = base._replace(declared=declared.model_copy(update={
        "hosts": {"local": declared.hosts["first"]}}))  # fmt: skip
    assert set(plan._moved(declared, cover, before, then)) == {MODEL, OTHER}

    lock = yaml.safe_load((at.root / "dvc.lock").read_text())
    for name, entry in lock["stages"].items():
        for dep in entry.get("deps", []):
            if dep["path"] == "work/machine.json" and MODEL in name:
                dep["md5"] = "1" * 32
    (at.root / "dvc.lock").write_text(yaml.safe_dump(lock))
    cover = coverage.Coverage(declared, at)
    assert set(plan._moved(declared, cover, before, then)) == {OTHER}


# --- legs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def declared(made: Path) -> Any:
    """The declaration of the fork."""
    return declaration.load(made / "params.yaml")


def _fleet_of(declared: Any, models: int, hosts: int) -> Any:
    host = DeclaredHost(memory_mib=4096, runs_on=("self-hosted", "x"))
    return declared.model_copy(update={
        "models": {f"m{n}": declared.models[MODEL] for n in range(models)},
        "hosts": {f"h{n}": host for n in range(hosts)},
    })  # fmt: skip


RUN = (PlannedRun(stage="choose", key="m", why="x"),)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    models=st.integers(1, 320),
    hosts=st.integers(1, 5),
    which=st.randoms(use_true_random=False),
    share=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
def test_every_model_that_is_not_covered_is_in_one_job_and_no_job_is_empty(
    declared: Any, models: int, hosts: int, which: Any, share: float
) -> None:
    """For any fleet: nothing is forgotten, nothing is measured twice, GitHub starts them all."""
    fleet = _fleet_of(declared, models, hosts)
    runs: plan.Runs = {
        (host, name): RUN if which.random() < share else ()
        for host in fleet.hosts
        for name in fleet.models
    }
    legs = plan.legs_of(fleet, runs)
    wanted = [pair for pair, found in runs.items() if found]
    assert sorted((leg.host, name) for leg in legs for name in leg.models) == sorted(wanted)
    assert all(leg.models for leg in legs)
    assert len(legs) <= MAX_LEGS
    assert all(leg.primary == (leg.host == "h0") for leg in legs)
    assert len(legs) == len(wanted) or len(wanted) > MAX_LEGS


def test_three_hundred_models_share_jobs_that_have_the_time_for_it(declared: Any) -> None:
    """Two models a job, each with the declared time, none longer than GitHub's token lives."""
    fleet = _fleet_of(declared, 300, 1)
    legs = plan.legs_of(fleet, {("h0", name): RUN for name in fleet.models})
    assert len(legs) == 150
    assert {leg.timeout_minutes for leg in legs} == {480}
    fleet = _fleet_of(declared, 3000, 1)
    legs = plan.legs_of(fleet, {("h0", name): RUN for name in fleet.models})
    assert {leg.timeout_minutes for leg in legs} == {1440}


@settings(
    max_examples=12, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(edits=st.sets(st.sampled_from(EDITS), max_size=4), removed=st.sampled_from(REMOVED))
def test_whatever_a_branch_does_a_plan_measures_what_is_not_covered_and_only_that(
    at: Layout, edits: set[tuple[str, str]], removed: str
) -> None:
    """A leg for each host and model with something to run, and no other."""
    git(at.root, "checkout", "-qf", "main", "--", ".")
    for before, after in sorted(edits):
        edit(at.params, before, after)
    target = at.root / "results" / OTHER / removed
    if removed and target.exists():
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    found = plan.make(at, base="main")

    fleet = declaration.load(at.params)
    cover = coverage.Coverage(fleet, at)
    hosts = {"local": None, **({"big": "big"} if HOST in edits else {})}
    wanted = {
        (host, name)
        for host, other in hosts.items()
        for name in fleet.models
        if cover.runs(name, host=other)
    }
    assert {(leg.host, name) for leg in found.legs for name in leg.models} == wanted
    assert {one.model for one in found.models if one.runs} == {name for _, name in wanted}
    assert all(one.covered is not bool(one.runs) for one in found.models)
    assert json.loads(plan.matrix(found))["include"] or not wanted
    assert PlanRecord.model_validate_json(found.model_dump_json()) == found


# --- the budget -------------------------------------------------------------------------------


def _runs_of(at: Layout, name: str = MODEL) -> Budget:
    declared = declaration.load(at.params)
    runs = coverage.Coverage(declared, at).runs(name)
    return plan_budget.of_runs(declared, at, name, runs, host="local")


def _times(at: Layout, **wall_s: float) -> None:
    record = TimesRecord(wall_s={name.replace("__", "@"): s for name, s in wall_s.items()})
    path = at.model_record("times", MODEL)
    path.write_text(record.model_dump_json())


def test_time_is_that_of_the_same_stages_before(at: Layout) -> None:
    """Of a quant that is new that of the others; of a stage that nobody timed it is said."""
    edit(at.params, *QUANT)
    _times(at, **{
        f"quantize__{MODEL}-Q6_K": 60.0, f"quantize__{MODEL}-Q2_K": 120.0,
        f"quantize__{MODEL}-Q4_K_M": 90.0, f"benchmark__{MODEL}-Q6_K": 600.0,
        f"choose__{MODEL}": 3.0,
    })  # fmt: skip
    test_s = json.loads(at.model_record("load-test", MODEL).read_text())["wall_s"]
    found = _runs_of(at)
    assert found.gpu_minutes == pytest.approx((90 + 600 + test_s) / 60)
    assert found.unknown == (
        f"how long evaluate of {MODEL} takes: no pull request has timed it",
        COMPARING,
    )


def test_without_a_record_of_times_the_records_tell_of_themselves(at: Layout) -> None:
    """A benchmark and a load test say how long they took."""
    edit(at.params, "repetitions: 7", "repetitions: 9")
    walls = [
        json.loads(at.quant_record("benchmark", MODEL, type_).read_text())["wall_s"]
        for type_ in ("Q6_K", "Q4_K_M", "Q2_K")
    ]
    test_s = json.loads(at.model_record("load-test", MODEL).read_text())["wall_s"]
    found = _runs_of(at)
    assert found.gpu_minutes == pytest.approx((sum(walls) + test_s) / 60)
    assert (found.disk_bytes, found.network_bytes, found.unknown) == (0, 0, (COMPARING,))


def test_the_comparison_with_the_champion_costs_as_much_as_the_last_one(at: Layout) -> None:
    """It is no stage, and holds the machine all the same; without a choice before there is none."""
    edit(at.params, *OBJECTIVE)
    before = _runs_of(at)
    assert COMPARING in before.unknown

    records.write(at.comparison(MODEL), compare_record(wall_s=300.0, model=MODEL))
    found = _runs_of(at)
    assert found.gpu_minutes == pytest.approx((before.gpu_minutes or 0) + 5)
    assert COMPARING not in found.unknown

    at.comparison(MODEL).unlink()
    at.model_record("choose", MODEL).unlink()
    assert COMPARING not in _runs_of(at).unknown


def test_nothing_is_never_what_is_unknown(at: Layout) -> None:
    """A new model of the Hub: neither its time nor its size is zero, and the plan says so."""
    edit(at.params, f"  {OTHER}:\n    source: path:examples/tiny-llama",
         f"  {OTHER}:\n    source: hf:owner/other")  # fmt: skip
    shutil.rmtree(at.root / "results" / OTHER)
    found = _runs_of(at, OTHER)
    assert (found.gpu_minutes, found.disk_bytes, found.network_bytes) == (None, None, None)
    assert any("no pull request has timed it" in line for line in found.unknown)
    assert any("was never fetched" in line for line in found.unknown)
    assert any("is on the Hub" in line for line in found.unknown)
    total = plan_budget.together([found, Budget(gpu_minutes=2.0, disk_bytes=3, network_bytes=4)])
    assert (total.gpu_minutes, total.disk_bytes, total.network_bytes) == (2.0, 3, 4)
    assert total.unknown == found.unknown
    assert "unknown time" in plan._budget_words(found)[0]
    assert plan._budget_words(total)[0] == "at least 2.0 min"


def test_bytes_of_a_new_revision_are_told_by_the_one_before_and_the_hub_is_not_asked(
    at: Layout,
) -> None:
    """Of disk an estimate, of the network what is known: the size that the last one had."""
    edit(at.params, f"  {OTHER}:\n    source: path:examples/tiny-llama",
         f"  {OTHER}:\n    source: hf:owner/other")  # fmt: skip
    old = declaration.load(at.params).models[OTHER].revision
    path = at.model_record("fetch", OTHER)
    edit_json(path, source="hf:owner/other")
    size = json.loads(path.read_text())["size_bytes"]
    same = _runs_of(at, OTHER)
    assert same.network_bytes == size
    text = at.params.read_text()
    place = text.index(f"  {OTHER}:")
    at.params.write_text(text[:place] + text[place:].replace(old, "f" * 40, 1))
    found = _runs_of(at, OTHER)
    assert found.network_bytes is None
    assert found.disk_bytes is not None
    assert found.disk_bytes > 2 * size
    assert "at fffffff is on the Hub; the revision before had" in str(found.unknown)


def test_each_limit_of_the_declaration_holds_and_exactly_it_is_allowed(at: Layout) -> None:
    """More than is declared, not as much; what is unknown is over no limit."""
    limits = "\nplan: {max_gpu_minutes: 60, max_disk_gib: 2, max_network_gib: 1}\n"
    at.params.write_text(at.params.read_text() + limits)
    declared = declaration.load(at.params)
    gib = 1 << 30
    exactly = Budget(gpu_minutes=60.0, disk_bytes=2 * gib, network_bytes=gib)
    assert plan_budget.over(exactly, declared) == ()
    assert plan_budget.over(Budget(), declared) == ()
    more = Budget(gpu_minutes=60.01, disk_bytes=2 * gib + 1, network_bytes=3 * gib)
    said = plan_budget.over(more, declared)
    assert said[0] == "about 60.01 minutes on runners, where plan.max_gpu_minutes allows 60"
    assert said[1].startswith("about 2.0000000")
    assert said[2] == "about 3.00 GiB from the Hub, where plan.max_network_gib allows 1"


def test_times_that_nobody_can_have_measured_are_not_counted(at: Layout) -> None:
    """A record of a branch may say anything; it cannot make a plan cheaper than nothing."""
    edit(at.params, "repetitions: 7", "repetitions: 9")
    _times(at, **{f"benchmark__{MODEL}-Q6_K": -1e9})
    found = _runs_of(at)
    assert found.gpu_minutes is not None
    assert found.gpu_minutes > 0
    at.model_record("times", MODEL).write_text('{"wall_s": {"x": NaN}}')
    assert _runs_of(at).gpu_minutes == pytest.approx(found.gpu_minutes)


def test_a_checkout_without_a_commit_is_refused(at: Layout) -> None:
    """There is no head that could be planned."""
    shutil.rmtree(at.root / ".git")
    git(at.root, "init", "-q")
    with pytest.raises(ParamsError, match="git knows no commit"):
        plan.make(at)
