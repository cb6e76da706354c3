"""The graph and the code say the same about every stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pipelines import declaration
from pipelines.__main__ import STAGES, WITH_TOOLS
from pipelines.layout import Layout

if TYPE_CHECKING:
    from pathlib import Path

# They look around at every run.
ALWAYS = {"pipelines/dvc.yaml:machine", "pipelines/dvc.yaml:check-upstream"}


@pytest.fixture(name="stages")
def _stages(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every stage of the real graph as DVC resolves it, by its address."""
    from dvc.repo import Repo  # noqa: PLC0415 - heavy

    # DVC names stages by their way from the working directory.
    monkeypatch.chdir(checkout)
    with Repo(str(checkout)) as repo:
        return {stage.addressing: stage for stage in repo.index.stages}


def test_every_key_has_its_stages(stages: dict[str, Any], checkout: Path) -> None:
    """Each stage exists for each model or quant of params.yaml, and nothing else exists."""
    slices = declaration.slices(declaration.load(checkout / "params.yaml"))

    expected = {"report" if stage == "report" else f"{stage}@{key}" for stage, key in slices}
    assert set(stages) == expected | ALWAYS


def test_a_stage_types_what_a_person_types(stages: dict[str, Any]) -> None:
    """The command of a stage is `python -m pipelines STAGE KEY`, and no more than that."""
    for address, stage in stages.items():
        name, _, key = address.rpartition(":")[2].partition("@")

        # The watch is a verb of its own; in the graph it looks only when that is due.
        more = [key] if key else ["--if-due"] if name == "check-upstream" else []
        assert stage.cmd.split() == ["python", "-m", "pipelines", name, *more]
        if address not in ALWAYS:
            assert name in {known.name for known in STAGES}


def test_a_stage_tracks_exactly_the_slice_that_it_reads(stages: dict[str, Any]) -> None:
    """Every stage depends on its own resolved parameters and on no other's."""
    for address, stage in stages.items():
        name, _, key = address.rpartition(":")[2].partition("@")
        if address in ALWAYS:
            continue
        tracked = [dep.def_path for dep in stage.deps if type(dep).__name__ == "ParamsDependency"]

        assert tracked == [str(Layout().slice(name, key or "fleet"))]


def test_paths_are_those_of_the_layout(stages: dict[str, Any], checkout: Path) -> None:
    """What a stage writes in the graph is where the code writes it."""
    declared = declaration.load(checkout / "params.yaml")
    at = Layout()
    for key, quant in declared.quants.items():
        outs = {out.def_path for out in stages[f"quantize@{key}"].outs}
        assert outs == {
            str(at.gguf(quant.model, key)),
            str(at.quant_record("quantize", quant.model, quant.type)),
        }
        outs = {out.def_path for out in stages[f"benchmark@{key}"].outs}
        assert outs == {str(at.quant_record("benchmark", quant.model, quant.type))}
    for model in declared.models:
        outs = {out.def_path for out in stages[f"choose@{model}"].outs}
        assert outs == {
            str(at.model_record("choose", model)),
            str(at.metrics(model)),
            str(at.frontier(model)),
        }
        outs = {out.def_path for out in stages[f"load-test@{model}"].outs}
        assert outs == {str(at.model_record("load-test", model)), str(at.load_metrics(model))}
        outs = {out.def_path for out in stages[f"convert@{model}"].outs}
        assert outs == {str(at.f16(model)), str(at.model_record("convert", model))}


def test_a_load_test_follows_what_it_serves(stages: dict[str, Any], checkout: Path) -> None:
    """Another GGUF, choice, prompt, Modelfile, machine or tool is tested again; code is not."""
    declared = declaration.load(checkout / "params.yaml")
    at = Layout()
    for model in declared.models:
        deps = {
            dep.def_path
            for dep in stages[f"load-test@{model}"].deps
            if type(dep).__name__ != "ParamsDependency"
        }
        assert deps == {
            str(at.source(model)),
            str(at.f16(model)),
            str(at.gguf(model, "x").parent),
            str(at.model_record("fetch", model)),
            str(at.quant_record("quantize", model, "x").parent),
            str(at.model_record("choose", model)),
            str(at.machine),
            str(at.toolchain),
            "modelfiles",
            str(at.prompts),
        }
        # The report reads the test, and DVC tells it of a new one through the receipt alone.
        told = {dep.def_path for dep in stages[f"track@{model}"].deps}
        assert str(at.model_record("load-test", model)) in told


def test_every_stage_with_tools_keeps_what_they_were(stages: dict[str, Any]) -> None:
    """Those that depend on the tools are those that put them beside their records, in git."""
    with_tools = {
        address.partition("@")[0]
        for address, stage in stages.items()
        if str(Layout().toolchain) in {dep.def_path for dep in stage.deps}
    }
    assert with_tools == WITH_TOOLS


def test_a_release_follows_what_it_holds_and_the_registry(
    stages: dict[str, Any], checkout: Path
) -> None:
    """Every record and file of it, the Modelfile, and what the probe saw in the registry."""
    at = Layout()
    for model in declaration.load(checkout / "params.yaml").models:
        stage = stages[f"publish@{model}"]
        deps = {d.def_path for d in stage.deps if type(d).__name__ != "ParamsDependency"}
        records = ("fetch", "convert", "verify", "calibrate", "evaluate", "choose", "load-test")
        assert deps == {
            str(at.source(model)),
            str(at.imatrix_dir(model)),
            str(at.gguf(model, "x").parent),
            *(str(at.model_record(name, model)) for name in records),
            *(str(at.quant_record(n, model, "x").parent) for n in ("quantize", "benchmark")),
            "modelfiles",
            str(at.observed(model)),
            str(at.compared(model)),
        }
        # Not release.json, which a refusal leaves alone, nor the ledger, which only grows.
        assert {out.def_path for out in stage.outs} == {str(at.model_record("publish", model))}
        # Nor is what the probe saw anybody's output: it would stand in a lock as it was before.
        assert not any(
            out.def_path.startswith("work/published") for each in stages.values()
            for out in each.outs
        )  # fmt: skip
        told = {dep.def_path for dep in stages[f"track@{model}"].deps}
        assert str(at.model_record("publish", model)) in told


def test_a_measurement_is_never_brought_back(stages: dict[str, Any], tmp_path: Path) -> None:
    """A load test seen before is made again after a revert: DVC keeps no run of one."""
    (release,) = (s for a, s in stages.items() if a.partition("@")[0] == "publish")
    assert not any(out.use_cache or out.metric for out in release.outs)
    (entry,) = (s for a, s in stages.items() if a.partition("@")[0] == "load-test")
    kinds = {out.def_path: "metrics" if out.metric else "outs" for out in entry.outs}
    assert not any(out.use_cache for out in entry.outs)
    graph: dict[str, Any] = {"cmd": "echo x >> ran", "deps": ["seen"], "outs": [], "metrics": []}
    for path, kind in kinds.items():
        name = path.rpartition("/")[2]
        graph["cmd"] += f"; cp seen {name}"
        graph[kind].append({name: {"cache": False}})
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"load-test": graph}}))
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "-q", "--no-scm"], cwd=tmp_path, check=True)

    for seen in ("1", "2", "1"):
        (tmp_path / "seen").write_text(seen)
        subprocess.run([*dvc, "repro", "-q"], cwd=tmp_path, check=True)

    assert (tmp_path / "ran").read_text() == "x\nx\nx\n"


def test_records_are_in_git_and_weights_are_not(stages: dict[str, Any]) -> None:
    """Everything below results/ is kept out of DVC's cache, so that a review sees it."""
    for stage in stages.values():
        for out in stage.outs:
            if out.def_path.startswith("results/"):
                assert not out.use_cache
            elif out.def_path.endswith((".gguf", "/source", "/imatrix")):
                assert out.use_cache


def test_everything_runs_after_the_probe(stages: dict[str, Any], checkout: Path) -> None:
    """The probe is upstream of every stage: no stage is judged by the parameters of yesterday."""
    from dvc.repo import Repo  # noqa: PLC0415 - heavy
    from networkx import descendants  # noqa: PLC0415 - comes with DVC

    with Repo(str(checkout)) as repo:
        graph = repo.index.graph
        for stage in graph.nodes:
            upstream = {node.addressing for node in descendants(graph, stage)}
            if stage.addressing not in ALWAYS:
                assert "pipelines/dvc.yaml:machine" in upstream
    assert stages


def test_what_is_newer_upstream_feeds_the_report_and_nothing_that_is_built(
    stages: dict[str, Any],
) -> None:
    """The watch runs at every `dvc repro`, reads no file of the graph, and only the report it."""
    watch = stages["pipelines/dvc.yaml:check-upstream"]
    notices = str(Layout().upstream_notices)

    assert watch.always_changed
    assert not watch.deps
    assert {out.def_path for out in watch.outs} == {notices}
    assert not any(out.use_cache for out in watch.outs)
    readers = {
        address
        for address, stage in stages.items()
        if notices in {dep.def_path for dep in stage.deps}
    }
    assert readers == {"report"}
    known = str(Layout().upstream)
    assert not any(
        known in {each.def_path for each in (*stage.deps, *stage.outs)} for stage in stages.values()
    )


def test_dvc_draws_the_graph(checkout: Path) -> None:
    """`dvc dag` shows the whole chain of a fresh fork."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "dag", "--md"],
        cwd=checkout, env=os.environ, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert "benchmark@tiny-llama-Q4_K_M" in done.stdout
