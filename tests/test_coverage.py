"""What records in git cover: the same as DVC says where it can see everything, and no more."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from plan_factory import MODEL, OTHER, copy, edit, edit_json, make, probe

from pipelines import coverage, declaration, machine, repro
from pipelines.ci_records import MEASURING
from pipelines.errors import ParamsError
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipelines.ci_records import PlannedRun

AT = Layout()
Q4 = f"{MODEL}-Q4_K_M"


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fork with two models, all measured; never changed."""
    return make(tmp_path_factory.mktemp("covered")).root


@pytest.fixture
def at(_made: Path, tmp_path: Path) -> Layout:
    """A copy of it, to be changed."""
    return Layout(copy(_made, tmp_path / "fork"))


def runs(at: Layout, model: str = MODEL, host: str | None = None) -> tuple[PlannedRun, ...]:
    """Ask what of a model has to run."""
    return coverage.Coverage(declaration.load(at.params), at).runs(model, host=host)


def names(found: tuple[PlannedRun, ...]) -> list[str]:
    """Return the stages as dvc.lock calls them."""
    return [f"{run.stage}@{run.key}" for run in found]


def why(at: Layout, stage: str, key: str = MODEL) -> str:
    """Return why one stage has to run."""
    (run,) = [run for run in runs(at) if (run.stage, run.key) == (stage, key)]
    return run.why


def dvc_says(at: Layout) -> tuple[set[str], set[str]]:
    """Return what DVC finds changed, and that with everything that follows it in DVC's graph."""
    import networkx as nx  # noqa: PLC0415 - DVC's own
    from dvc.repo import Repo  # noqa: PLC0415 - heavy

    probe(at)
    with contextlib.chdir(at.root), Repo() as repo:
        changed = {name for name in repo.status() if name.partition("@")[0] in MEASURING}
        graph = repo.index.graph
        all_ = set(changed)
        for stage in graph:
            if stage.addressing in changed:
                all_ |= {one.addressing for one in nx.ancestors(graph, stage)}
    return changed, {name for name in all_ if name.partition("@")[0] in MEASURING}


# --- nothing is measured twice, nothing is forgotten ------------------------------------------


def test_what_was_just_measured_is_covered(at: Layout) -> None:
    """Nothing to do for any model, with and without what only the machine has."""
    assert dvc_says(at) == (set(), set())
    shutil.rmtree(at.root / "work")
    assert runs(at, MODEL) == runs(at, OTHER) == ()


def _edit_params(before: str, after: str) -> Callable[[Layout], None]:
    return lambda at: edit(at.params, before, after)


def _edit_lock(change: Callable[[dict[str, Any]], object]) -> Callable[[Layout], None]:
    def change_file(at: Layout) -> None:
        path = at.root / "dvc.lock"
        content = yaml.safe_load(path.read_text())
        change(content["stages"])
        path.write_text(yaml.safe_dump(content))

    return change_file


def _other_tools(at: Layout) -> None:
    edit(at.params, "llama_cpp_python: 0.3.36", "llama_cpp_python: 0.3.37")
    # What the probe would write once they are built.
    edit_json(at.toolchain, llama_cpp_python="0.3.37")


def _grow_source(at: Layout) -> None:
    source = at.root / "examples/tiny-llama"
    (source / "README.md").write_text("another revision")
    from pipelines.fetch import content_digest  # noqa: PLC0415 - only here

    old = declaration.load(at.params).models[MODEL].revision
    edit(at.params, old, content_digest(source))


def _retired_quant(at: Layout) -> None:
    edit(at.params, f"  {MODEL}-Q2_K: {{model: {MODEL}, type: Q2_K}}\n", "")
    for path in at.of_quant(MODEL, f"{MODEL}-Q2_K", "Q2_K"):
        path.unlink(missing_ok=True)
    _edit_lock(lambda lock: [lock.pop(f"{s}@{MODEL}-Q2_K") for s in ("quantize", "benchmark")])(at)


# Every kind of edit that a branch can bring, and the first stages that it means; what follows is
# DVC's to say.
EDITS: dict[str, tuple[Callable[[Layout], object], set[str]]] = {
    "a gate of one model": (
        _edit_params("max_kld_mean_nats: 0.005", "max_kld_mean_nats: 0.004"),
        {f"choose@{MODEL}"},
    ),
    "an objective": (_edit_params("objective: speed", "objective: size"), {f"choose@{MODEL}"}),
    "a number of the benchmark": (
        _edit_params("repetitions: 7", "repetitions: 9"),
        {f"benchmark@{MODEL}-{t}" for t in ("Q6_K", "Q4_K_M", "Q2_K")}
        | {f"benchmark@{OTHER}-Q8_0"},
    ),
    "a level of the load test": (
        _edit_params("ttft_ms: 500", "ttft_ms: 400"),
        {f"load-test@{MODEL}", f"load-test@{OTHER}"},
    ),
    "a label of a runner": (_edit_params("runs_on: [self-hosted, gpu]", "runs_on: [self-hosted, "
                                         "gpu2]"), set()),
    "a release that is served": (_edit_params("stable: latest", f"stable: '{'0' * 64}'"), set()),
    "a budget": (lambda at: at.params.write_text(at.params.read_text() + "\nplan: "
                                                 "{max_gpu_minutes: 5}\n"), set()),
    "a quant added": (
        _edit_params(f"  {MODEL}-Q6_K:", f"  {MODEL}-Q5_K_M: {{model: {MODEL}, type: Q5_K_M}}\n"
                                         f"  {MODEL}-Q6_K:"),
        {f"quantize@{MODEL}-Q5_K_M", f"benchmark@{MODEL}-Q5_K_M", f"choose@{MODEL}"},
    ),
    "a quant removed": (_retired_quant, {f"choose@{MODEL}", f"evaluate@{MODEL}"}),
    "an option of a quant": (
        _edit_params(f"{MODEL}, type: Q6_K}}", f"{MODEL}, type: Q6_K, pure: true}}"),
        {f"quantize@{MODEL}-Q6_K"},
    ),
    "a revision": (_grow_source, {f"fetch@{MODEL}"}),
    "a calibration": (
        _edit_params("calibration: calibration\n    evaluation: evaluation\n    evals",
                     "evaluation: evaluation\n    evals"),
        {f"calibrate@{MODEL}"},
    ),
    "the recipe": (_edit_params("recipe: 1", "recipe: 2"),
                   {f"convert@{MODEL}", f"load-test@{OTHER}"}),
    "the tools": (_other_tools, {f"convert@{MODEL}", f"benchmark@{OTHER}-Q8_0"}),
    "a Modelfile": (
        lambda at: edit(at.root / "modelfiles/chat.Modelfile.j2", "\n", "\n# more\n"),
        {f"load-test@{MODEL}", f"load-test@{OTHER}"},
    ),
    "the prompts": (
        lambda at: at.prompts.write_text(at.prompts.read_text() + "# more\n"),
        {f"verify@{MODEL}", f"load-test@{OTHER}"},
    ),
    "a record edited by hand": (
        lambda at: edit_json(at.quant_record("benchmark", MODEL, "Q4_K_M"), wall_s=1.5),
        {f"benchmark@{Q4}"},
    ),
    "a record of a proof edited": (
        lambda at: at.model_record("verify", MODEL).write_text("{}"), {f"verify@{MODEL}"},
    ),
    "a record removed": (lambda at: at.model_record("convert", MODEL).unlink(),
                         {f"convert@{MODEL}"}),
    "the rows of the frontier removed": (lambda at: at.frontier(MODEL).unlink(),
                                         {f"choose@{MODEL}"}),
    "a record more than there are quants": (
        lambda at: at.sweep_record(MODEL, "Q6_K").write_text("{}"), {f"choose@{MODEL}"},
    ),
    "an entry of the lock removed": (
        _edit_lock(lambda lock: lock.pop(f"quantize@{Q4}")), {f"quantize@{Q4}"},
    ),
    "all entries of the lock removed": (
        _edit_lock(lambda lock: lock.clear()), {f"fetch@{MODEL}", f"fetch@{OTHER}"},
    ),
    "an entry with another command": (
        _edit_lock(lambda lock: lock[f"choose@{MODEL}"].update(cmd="true")), {f"choose@{MODEL}"},
    ),
    "an entry with another parameter": (
        _edit_lock(lambda lock: lock[f"choose@{MODEL}"]["params"].update(
            {f"work/params/choose/{MODEL}.json": {"model": MODEL}})),
        {f"choose@{MODEL}"},
    ),
    "an entry that read less": (
        _edit_lock(lambda lock: lock[f"choose@{MODEL}"]["deps"].pop()), {f"choose@{MODEL}"},
    ),
    "an entry of a graph that read more": (
        _edit_lock(lambda lock: lock[f"quantize@{Q4}"]["deps"].append(
            {"path": f"results/{MODEL}/convert.json", "hash": "md5", "md5": "0" * 32, "size": 1})),
        set(),
    ),
    "an entry of a graph that wrote more": (
        _edit_lock(lambda lock: lock[f"quantize@{Q4}"]["outs"].append(
            {"path": f"results/{MODEL}/more.json", "hash": "md5", "md5": "0" * 32, "size": 1})),
        set(),
    ),
    "an entry that wrote less": (
        _edit_lock(lambda lock: lock[f"choose@{MODEL}"]["outs"].pop()), {f"choose@{MODEL}"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_after_any_edit_it_says_what_dvc_says_in_a_whole_checkout(at: Layout, what: str) -> None:
    """Every stage that DVC finds changed, every one that follows, and no other one."""
    change, first = EDITS[what]
    change(at)
    changed, all_ = dvc_says(at)
    found = [run for model in (MODEL, OTHER) for run in runs(at, model)]

    assert {f"{run.stage}@{run.key}" for run in found} == all_
    # A reason of its own is one that DVC knows as well.
    assert {f"{r.stage}@{r.key}" for r in found if not r.why.startswith("after ")} <= changed
    assert first <= changed

    # And the same from git alone, where work/ is not there.
    shutil.rmtree(at.root / "work")
    assert [run for model in (MODEL, OTHER) for run in runs(at, model)] == found


# --- reasons ----------------------------------------------------------------------------------


def test_each_reason_names_the_value_the_file_or_the_stage(at: Layout) -> None:
    """What an author of a pull request needs to see of it."""
    edit(at.params, "max_kld_mean_nats: 0.005", "max_kld_mean_nats: 0.004")
    edit_json(at.quant_record("benchmark", MODEL, "Q4_K_M"), wall_s=1.5)
    edit(at.params, f"  {MODEL}-Q6_K:",
         f"  {MODEL}-Q5_K_M: {{model: {MODEL}, type: Q5_K_M}}\n  {MODEL}-Q6_K:")  # fmt: skip
    at.model_record("verify", MODEL).unlink()

    assert why(at, "quantize", f"{MODEL}-Q5_K_M") == "Q5_K_M is new"
    assert why(at, "benchmark", Q4) == (
        f"results/{MODEL}/benchmark/Q4_K_M.json is not the file that dvc.lock knows: it was edited"
    )
    assert why(at, "verify") == f"results/{MODEL}/verify.json is missing"
    assert "gates.max_kld_mean_nats 0.005 -> 0.004" in why(at, "choose")
    assert why(at, "load-test") == "Q5_K_M is new"


def test_what_only_follows_is_told_from_what_changed(at: Layout) -> None:
    """A change of the quantizer's option leaves the conversion alone."""
    edit(at.params, f"{MODEL}, type: Q6_K}}", f"{MODEL}, type: Q6_K, pure: true}}")
    found = {f"{run.stage}@{run.key}": run.why for run in runs(at)}
    assert found == {
        f"quantize@{MODEL}-Q6_K": "pure false -> true",
        f"benchmark@{MODEL}-Q6_K": "after quantize",
        f"evaluate@{MODEL}": "after quantize",
        f"choose@{MODEL}": "after quantize, benchmark and evaluate",
        f"load-test@{MODEL}": "after quantize and choose",
    }


def test_a_model_that_nobody_measured_is_new(at: Layout) -> None:
    """Neither a record nor an entry: every stage, in the order of the graph."""
    shutil.rmtree(at.root / "results" / OTHER)
    _edit_lock(lambda lock: [lock.pop(n) for n in list(lock) if OTHER in n])(at)
    found = runs(at, OTHER)
    assert [run.stage for run in found] == sorted((run.stage for run in found), key=MEASURING.index)
    assert set(MEASURING) == {run.stage for run in found}
    assert found[0].why == f"{OTHER} was never measured"


def test_a_long_list_of_changes_is_cut_where_somebody_would_stop_reading(at: Layout) -> None:
    """A lock of another version differs everywhere."""
    _edit_lock(lambda lock: lock[f"load-test@{MODEL}"].update(params={}))(at)
    text = why(at, "load-test")
    assert len(text) <= 600
    assert re.search(r"\d+ more changes$", text)


# --- what DVC does not look at ----------------------------------------------------------------


def _relock(at: Layout, path: Path) -> None:
    """Make dvc.lock know a record as it is, as it does after a measurement that was disturbed."""
    name = path.relative_to(at.root).as_posix()
    text = (at.root / "dvc.lock").read_text()
    known = re.search(rf"path: {re.escape(name)}\n\s+hash: md5\n\s+md5: ([0-9a-f]+)", text)
    assert known
    now = coverage._md5_of(path)
    assert now
    text = text.replace(known[1], now)
    folder = re.search(rf"path: {re.escape(str(path.parent.relative_to(at.root)))}\n\s+hash: md5\n"
                       r"\s+md5: ([0-9a-f]+\.dir)", text)  # fmt: skip
    if folder:
        text = text.replace(folder[1], coverage._md5_of(path.parent) or "")
    (at.root / "dvc.lock").write_text(text)


def test_a_measurement_that_was_disturbed_covers_nothing(at: Layout) -> None:
    """INVALID is measured again, though DVC sees no change; and `fleet repro` means the same."""
    path = at.quant_record("benchmark", MODEL, "Q4_K_M")
    record = json.loads(path.read_text())
    record["validity"] |= {"verdict": "INVALID", "reasons": ["The machine was busy."]}
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    _relock(at, path)
    assert dvc_says(at)[0] == set()

    assert names(runs(at)) == [f"benchmark@{Q4}", f"choose@{MODEL}", f"load-test@{MODEL}"]
    assert why(at, "benchmark", Q4) == "the measurement was INVALID"
    declared = declaration.load(at.params)
    repro.withdraw_invalid(at, declared, repro.plan_of(declared, [MODEL]))
    assert not path.exists()
    assert f"benchmark@{Q4}" in dvc_says(at)[0]


def test_records_of_other_tools_than_declared_are_not_covered_without_a_toolchain_here(
    at: Layout,
) -> None:
    """A pin that no machine has built yet: DVC, which has the old tools, sees nothing of it."""
    edit(at.params, "llama_cpp_python: 0.3.36", "llama_cpp_python: 0.3.37")
    assert dvc_says(at)[0] == set()
    found = runs(at)
    assert {run.stage for run in found} == set(MEASURING) - {"fetch"}
    assert why(at, "convert") == "toolchain.llama_cpp_python 0.3.36 -> 0.3.37"


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("backend: auto", "backend: cuda", "toolchain.backend cpu -> cuda"),
        ("sha256: 832db06", "sha256: 832db07", "toolchain.sha256 832db06 -> 832db07"),
        ("backend: auto", "backend: cpu", None),
    ],
)
def test_every_part_of_the_pin_counts(
    at: Layout, before: str, after: str, reason: str | None
) -> None:
    """A backend `auto` is what the machine had; any other has to be the one that was used."""
    edit(at.params, before, after)
    found = runs(at)
    assert (reason is None and not found) or why(at, "convert") == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "nothing in git says which tools made it: results/tiny-llama/toolchain.json"),
        ("{}", "it was made by other tools than results/tiny-llama/toolchain.json tells of"),
    ],
)  # fmt: skip
def test_tools_that_nobody_can_name_are_not_believed(
    at: Layout, text: str | None, reason: str
) -> None:
    """The lock knows them by an md5 alone; a claim beside it has to be those very bytes."""
    path = at.tools_record(MODEL)
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert why(at, "convert").startswith(reason)
    assert runs(at, OTHER) == ()


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'"x"'])
def test_a_manifest_that_is_none_is_no_word_for_the_declared_tools(at: Layout, text: bytes) -> None:
    """Whatever a stranger puts there."""
    said = list(coverage.other_tools(text, declaration.load(at.params)))
    assert said == ["what git says of its tools cannot be read"]


def test_the_copy_of_the_manifest_is_made_where_records_are(at: Layout) -> None:
    """The stages leave it, byte for byte; without a manifest they leave none."""
    at.tools_record(MODEL).unlink()
    machine.keep_tools(MODEL, at)
    assert at.tools_record(MODEL).read_bytes() == at.toolchain.read_bytes()
    at.toolchain.unlink()
    at.tools_record(MODEL).unlink()
    machine.keep_tools(MODEL, at)
    assert not at.tools_record(MODEL).exists()


def test_a_run_that_finds_all_up_to_date_names_the_tools_of_older_records(at: Layout) -> None:
    """Records from before git kept the tools are covered after one run, and not measured again."""
    declared = declaration.load(at.params)
    path = at.tools_record(MODEL)
    path.unlink()
    assert "nothing in git says which tools made it" in why(at, "convert")

    repro.name_tools(at, declared, [MODEL])

    assert runs(at) == ()
    assert path.read_bytes() == at.toolchain.read_bytes()


def test_tools_that_made_nothing_are_not_named_as_those_that_did(at: Layout) -> None:
    """A machine with another build says nothing of records that it did not make."""
    declared = declaration.load(at.params)
    path = at.tools_record(MODEL)
    path.unlink()
    at.toolchain.write_bytes(at.toolchain.read_bytes() + b"\n")

    repro.name_tools(at, declared, [MODEL])

    assert not path.exists()


def test_measurements_of_two_machines_are_not_mixed(at: Layout) -> None:
    """One quant measured elsewhere, as after a merge of two branches: it is measured again."""

    def move(lock: dict[str, Any]) -> None:
        for dep in lock[f"benchmark@{Q4}"]["deps"]:
            if dep["path"] == "work/machine.json":
                dep["md5"] = "0" * 32

    _edit_lock(move)(at)
    assert (
        why(at, "benchmark", Q4) == "it was measured on another machine than the rest of the model"
    )
    assert names(runs(at))[0] == f"benchmark@{Q4}"


# --- another host -----------------------------------------------------------------------------


def _measure_elsewhere(at: Layout, host: str = "gpu2") -> Path:
    """Put the records of the model where those of another host go."""
    folder = at.root / "results" / MODEL
    there = folder / "on" / host
    for path in list(folder.rglob("*.json")):
        target = there / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    lock = yaml.safe_load((at.root / "dvc.lock").read_text())["stages"]
    (there / "lock.json").write_text(json.dumps({n: e for n, e in lock.items() if MODEL in n}))
    return there


def test_another_host_has_records_and_a_lock_of_its_own(at: Layout) -> None:
    """What one host measured says nothing of another one."""
    found = runs(at, host="gpu2")
    assert {run.stage for run in found} == set(MEASURING)
    assert found[0].why == "never measured there"

    there = _measure_elsewhere(at)
    assert runs(at, host="gpu2") == runs(at) == ()
    (there / "benchmark/Q4_K_M.json").unlink()
    assert names(runs(at, host="gpu2"))[0] == f"benchmark@{Q4}"
    assert f"results/{MODEL}/on/gpu2/benchmark/Q4_K_M.json is missing" in str(runs(at, host="gpu2"))
    assert runs(at) == ()
    (there / "lock.json").write_text("[" * 100_000)
    assert {run.stage for run in runs(at, host="gpu2")} == set(MEASURING)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "<<<<<<< HEAD\nschema: '2.0'\n=======\n",
        "stages: {a: 1, a: 2}\n",
        "stages: &a [*a\n",
        "\x00",
        "stages:\n\t- x\n",
        "[" * 5000,
        "{a: " * 100_000,
        "- " * 100_000,
        "x: ']'\ny: " + "[']', " * 100_000,
    ],
)
def test_a_lock_that_is_none_is_a_problem_with_its_line(at: Layout, text: str) -> None:
    """Two branches merged by text, most often; DVC would fail as well."""
    (at.root / "dvc.lock").write_text(text)
    with pytest.raises(ParamsError) as caught:
        runs(at)
    (problem,) = caught.value.problems
    assert problem.file.endswith("dvc.lock")
    assert problem.line >= 1


@pytest.mark.parametrize(
    "value",
    [
        *(1e-05, 0.06, 1.0, -3, 10**12, 1e300, True, None, [], {}, [1, [2.5, "x"]], "", "a\nb\n"),
        *(
            "1e5",
            "0123",
            "0o17",
            "0x1f",
            "1_000",
            "yes",
            "no",
            "on",
            "null",
            "~",
            "true",
            "1.",
            ".",
        ),
        *("2026-11-22", "12:30:45", "=", "<<", "#x", "a: b # c", "é", "::x", "-", "1e-05", "+.inf"),
    ],
)
def test_a_value_in_the_lock_is_read_as_dvc_reads_what_it_wrote(tmp_path: Path, value: Any) -> None:
    """Words that are numbers, days or switches to other readers of YAML stay what they were."""
    from dvc.utils.serialize import dump_yaml, load_yaml  # noqa: PLC0415 - heavy

    path = tmp_path / "dvc.lock"
    dump_yaml(str(path), {"stages": {"value": value}})
    found = coverage._yaml(path)["stages"]["value"]
    assert (found, type(found)) == (value, type(value))
    assert load_yaml(str(path))["stages"]["value"] == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "stages: []",
        "stages: {choose@tiny-llama: 5}",
        "stages: {choose@tiny-llama: {deps: {a: b}, outs: [1, {path: 2}], params: 7, cmd: []}}",
        "stages: {choose@tiny-llama: {deps: [{path: [x]}], outs: null, params: {a: [1]}}}",
        "stages: &a {choose@tiny-llama: *a}",
    ],
)
def test_entries_of_any_shape_cover_nothing(at: Layout, text: str) -> None:
    """A stranger may have written the lock: nothing of it is trusted, nothing of it breaks us."""
    (at.root / "dvc.lock").write_text(text)
    assert f"choose@{MODEL}" in names(runs(at))


def test_a_fleet_without_a_lock_is_new(at: Layout) -> None:
    """The first pull request of a fork."""
    (at.root / "dvc.lock").unlink()
    shutil.rmtree(at.root / "results")
    assert {run.stage for run in runs(at)} == set(MEASURING)


def test_a_graph_without_one_of_the_stages_is_refused(at: Layout) -> None:
    """A dvc.yaml of another version would make every answer a guess."""
    path = at.root / "dvc.yaml"
    path.write_text(path.read_text().replace("  verify:\n", "  prove:\n", 1))
    with pytest.raises(ParamsError, match="has no stage `verify`"):
        runs(at)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"a": {"b": 0.05}}, {"a": {"b": 0.02}}, ["a.b 0.05 -> 0.02"]),
        ({"r": "0" * 40}, {"r": "1" * 40}, ["r 0000000 -> 1111111"]),
        ({"l": [1, 2]}, {"l": [1]}, ["l [1, 2] -> [1]"]),
        ({"x": None}, {"x": True}, ["x none -> true"]),
        ({"t": "a\nb"}, {"t": "::error::x"}, ["t a\\nb -> :\u200b:error:\u200b:x"]),
        ({"t": ""}, {}, ['t "" -> none']),
        ({"a": 1}, {"a": 1.0}, []),
    ],
)
def test_a_difference_is_one_short_line(before: Any, after: Any, said: list[str]) -> None:
    """Numbers as declared, digests by their first digits, text of a stranger made harmless."""
    assert coverage.differences(before, after) == said
