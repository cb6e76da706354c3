"""The fleet of the tests is none of the operator's: the tests hold in a fork, too."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest
import sample

from pipelines import coverage, declaration, marked_yaml, owners
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# They hold for any valid declaration, or take nothing but the pins of llama.cpp and Ollama from it.
OF_EVERY_FORK = {
    "bench/architectures.py", "bench/compare.py", "bench/verify.py", "tests/conftest.py",
    "tests/sample.py", "tests/serving_factory.py", "tests/test_declaration.py",
    "tests/test_schema.py",
}  # fmt: skip
FOREIGN = {
    "params.yaml": "ours", "dvc.lock": "ours", "results/ours/choice.json": "{}",
    "results/tiny-llama/times.json": "{}", "corpora/ours.txt": "words", ".dvc/config": "ours",
    ".github/CODEOWNERS": "* @me", "modelfiles/ours.Modelfile.j2": "FROM x",
}  # fmt: skip


def _read_from_root(text: str) -> Iterator[str]:
    """Yield the paths that a program joins to the root of this repository."""
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)):
            continue
        left, right = ast.unparse(node.left), node.right
        if not left.endswith(("ROOT", "HERE", "REPOSITORY", ".parent.parent", ".parents[1]")):
            continue
        if isinstance(right, ast.Constant):
            yield str(right.value)


def test_no_test_and_no_benchmark_reads_what_is_the_operators() -> None:
    """In a fork it is another fleet: `sample.of`, `sample.take` and `sample.lay` have one."""
    found = {
        f"{folder}/{path.name}: {name}"
        for folder in ("tests", "bench")
        for path in (sample.ROOT / folder).glob("*.py")
        if f"{folder}/{path.name}" not in OF_EVERY_FORK
        for name in _read_from_root(path.read_text(encoding="utf-8"))
        if owners.is_operators(name) or owners.is_operators(f"{name}/")
    }

    assert found == set()


def test_the_sample_is_whole(tmp_path: Path) -> None:
    """Valid, and measured: its records cover all that it declares, by the graph of today."""
    sample.take(tmp_path, "examples", "dvc.yaml", "pipelines/dvc.yaml")
    sample.lay(tmp_path)
    at = Layout(tmp_path)
    declared = declaration.check(at)

    covered = coverage.Coverage(declared, at)

    assert [str(run) for model in declared.models for run in covered.runs(model)] == []


@pytest.mark.parametrize("records", [True, False])
def test_nothing_of_a_fork_is_left_where_the_sample_is_laid(
    tmp_path: Path,
    records: bool,  # noqa: FBT001 - what is laid
) -> None:
    """What the operator had is gone; records come only with the pins that they are of."""
    for name, text in FOREIGN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    sample.lay(tmp_path, records=records)

    here = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*") if path.is_file()}
    frozen = {p.relative_to(sample.SAMPLE): p for p in sample.SAMPLE.rglob("*") if p.is_file()}
    if not records:
        frozen = {name: path for name, path in frozen.items()
                  if name.parts[0] != "results" and name.name != "dvc.lock"}  # fmt: skip
    assert set(here) == set(frozen)
    assert all(
        path.read_bytes() == frozen[name].read_bytes()
        for name, path in here.items()
        if records or name.name != "params.yaml"
    )


def test_a_copy_of_the_code_has_the_sample_in_the_place_of_the_operators(tmp_path: Path) -> None:
    """Also below a folder that is the template's for the rest, and without what runs left there."""
    sample.take(tmp_path, ".dvc", "pipelines", ".github", "params.yaml", frozen=True)

    for name in (".dvc/config", "pipelines/dvc.lock", ".github/CODEOWNERS", "params.yaml"):
        assert (tmp_path / name).read_bytes() == (sample.SAMPLE / name).read_bytes()
    assert (tmp_path / "pipelines/owners.py").is_file()
    left = {path.name for path in tmp_path.rglob("*")}
    assert not left & {"cache", "tmp", "__pycache__", "config.local"}


def test_without_records_a_fork_tests_the_engines_that_it_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own declaration nothing else is taken: models, gates and texts stay the sample's."""
    text = (sample.SAMPLE / "params.yaml").read_text(encoding="utf-8")
    ours = text.replace("0.3.36", "0.3.99").replace("832db069", "00000000")
    ours = ours.replace(
        "  ollama: 0.33.0\n", f"  ollama: 0.99.0\n  ollama_archive_sha256: {'e' * 64}\n"
    )
    (tmp_path / "params.yaml").write_text(ours.replace("tiny-llama", "ours"), encoding="utf-8")
    monkeypatch.setattr(sample, "ROOT", tmp_path)

    found = sample.params_text.__wrapped__()

    assert found == ours
    assert marked_yaml.read(sample.of("params.yaml")).data["toolchain"]["recipe"] == 1
