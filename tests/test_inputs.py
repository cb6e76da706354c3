"""What a stage needs is asked for first, in the words of the operator and with the next command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from pipelines import fetch, inputs
from pipelines.layout import Layout

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Fleet = Callable[..., subprocess.CompletedProcess[str]]

KEY = "tiny-llama-Q4_K_M"
SLICE = {"model": "M", "key": "K", "type": "T", "imatrix": True}


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("convert tiny-llama", "work/tiny-llama/source"),
        ("calibrate tiny-llama", "work/tiny-llama/f16.gguf"),
        (f"quantize {KEY}", "work/tiny-llama/f16.gguf"),
        ("quantize tiny-llama-IQ4_XS", "work/tiny-llama/imatrix"),
        (f"benchmark {KEY}", f"work/tiny-llama/gguf/{KEY}.gguf"),
        ("load-test tiny-llama", "work/tiny-llama/gguf"),
        ("publish tiny-llama", "results/tiny-llama/load-test.json"),
    ],
)
def test_a_stage_in_a_bare_clone_says_what_is_missing_and_builds_nothing(
    fleet: Fleet, checkout: Path, tmp_path: Path, command: str, missing: str
) -> None:
    """The missing files and `fleet repro KEY` are named before a toolchain is looked for."""
    cache = tmp_path / "cache"

    done = fleet(*command.split(), cwd=checkout, GGUF_FLEET_CACHE=str(cache))

    assert done.returncode == 1
    assert f"error: {command} needs " in done.stderr
    assert missing in done.stderr
    assert f"  next: fleet repro {command.split()[1]}\n" in done.stderr
    assert not cache.exists()


def test_a_source_that_is_missing_is_said_before_anything_is_built(
    fleet: Fleet, checkout: Path, tmp_path: Path
) -> None:
    """`fleet fetch` of a folder that is not there builds no toolchain either."""
    (checkout / "examples/tiny-llama").rename(checkout / "elsewhere")
    cache = tmp_path / "cache"

    done = fleet("fetch", "tiny-llama", cwd=checkout, GGUF_FLEET_CACHE=str(cache))

    assert done.returncode == 3
    assert "examples/tiny-llama is no directory" in done.stderr
    assert not cache.exists()


@pytest.mark.parametrize(
    "stage",
    [
        "convert",
        "verify",
        "calibrate",
        "quantize",
        "benchmark",
        "evaluate",
        "load-test",
        "publish",
    ],
)
def test_inputs_are_those_of_the_graph(stage: str) -> None:
    """What is asked for by hand is what DVC waits for, less what only makes a stage run again."""
    graph = yaml.safe_load((Path(__file__).parent.parent / "dvc.yaml").read_text())["stages"]
    key = "M" if graph[stage]["foreach"] == "${models}" else "K"
    names = {"${key}": key, "${item.model}": "M", "${item.type}": "T"}
    deps = set()
    for dep in graph[stage]["do"]["deps"]:
        for name, value in names.items():
            dep = dep.replace(name, value)  # noqa: PLW2901 - one name after the other
        deps.add(dep)

    wanted = {str(path) for path in inputs.paths(stage, SLICE, Layout())}

    if stage in {"calibrate", "quantize", "benchmark", "evaluate"}:
        # It names the revision, and says of f16.gguf nothing but what that file says itself.
        deps.add("results/M/convert.json")
    if stage == "publish":  # in git; and what the probe writes, which only makes it run again
        deps -= {"modelfiles", str(Layout().observed("M")), str(Layout().compared("M"))}
    if stage == "verify":  # in git
        deps -= {str(Layout().prompts)}
    if stage == "load-test":  # of these two are in git, and the third only makes it run again
        deps -= {"modelfiles", str(Layout().prompts), str(Layout().machine)}
    assert wanted == deps - {str(Layout().toolchain)}


def test_a_quant_without_a_matrix_needs_none() -> None:
    """A quant that declares no importance matrix does not ask for one."""
    without = inputs.paths("quantize", SLICE | {"imatrix": False}, Layout())

    assert Layout().imatrix_dir("M") not in without


def test_digest_as_json_is_for_programs(fleet: Fleet, checkout: Path) -> None:
    """`fleet digest --json` gives the directory and its revision as one object."""
    plain = fleet("digest", "examples/tiny-llama", cwd=checkout)
    told = fleet("digest", "--json", "examples/tiny-llama", cwd=checkout)

    revision = fetch.content_digest(checkout / "examples/tiny-llama")
    assert plain.stdout == f"{revision}\n"
    assert json.loads(told.stdout) == {"directory": "examples/tiny-llama", "revision": revision}


def test_a_file_that_is_no_yaml_is_not_answered_with_a_list_of_keys(
    fleet: Fleet, checkout: Path
) -> None:
    """After a syntax error the next step is that place; after a wrong key the list of keys."""
    params = checkout / "params.yaml"
    text = params.read_text()
    params.write_text(text + "\n  - [broken\n")
    syntax = fleet("check", cwd=checkout)
    params.write_text(text.replace("recipe:", "recipee:"))
    key = fleet("check", cwd=checkout)

    assert syntax.returncode == key.returncode == 2
    assert "docs/params.md" not in syntax.stderr
    assert "next: Correct the place" in syntax.stderr
    assert "next: docs/params.md" in key.stderr
