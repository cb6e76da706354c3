"""The DVC that `fleet repro` runs decides, locks and writes as DVC does, only sooner."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import quick_dvc

PLAIN = ("dvc",)
QUICK = ("pipelines.quick_dvc",)
# Values of which YAML has more than one spelling, and words that are numbers to some readers.
PARAMS = {
    "small": 1e-05, "float": 0.06, "whole": 1.0, "text": "1e5", "octal": "0123", "word": "yes",
    "none": None, "list": [1, [2.5, "x"]], "empty": {}, "line": "a: b # c " * 20, "two": "a\nb\n",
}  # fmt: skip
STAGES = """\
stages:
  copy:
    foreach: [a, b]
    do:
      cmd: cat in > out-${item}
      deps: [in]
      params:
        - values.json:
      outs: ["out-${item}"]
  last:
    cmd: cat out-a > out
    deps: [out-a]
    outs: [out]
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A checkout with three stages, of which two read params."""
    root = tmp_path / "repo"
    root.mkdir()
    for argv in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(argv, cwd=root, check=True)
    (root / "dvc.yaml").write_text(STAGES)
    (root / "values.json").write_text(json.dumps(PARAMS))
    (root / "in").write_text("one")
    return root


def dvc(module: tuple[str, ...], root: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run DVC, plain or quick, in the checkout."""
    return subprocess.run(
        [sys.executable, "-m", *module, *argv], cwd=root, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip


def test_it_writes_the_lock_that_dvc_writes(repo: Path, tmp_path: Path) -> None:
    """An entry that changed, made by either, leaves the same bytes."""
    assert dvc(PLAIN, repo, "repro").returncode == 0
    (repo / "in").write_text("two")
    other = tmp_path / "other"
    shutil.copytree(repo, other)

    plain, quick = dvc(PLAIN, repo, "repro"), dvc(QUICK, other, "repro")

    assert quick.stdout.count("Running stage") == 3, quick.stderr
    assert quick.stdout == plain.stdout
    assert (other / "out").read_text() == "two"
    assert (other / "dvc.lock").read_bytes() == (repo / "dvc.lock").read_bytes()


def test_what_did_not_change_is_skipped_and_a_target_is_obeyed(repo: Path) -> None:
    """Nothing is run that DVC would not run, and a named stage alone is made."""
    assert dvc(QUICK, repo, "repro", "copy@b").returncode == 0
    assert not (repo / "out-a").exists()
    assert dvc(QUICK, repo, "repro").returncode == 0

    again = dvc(QUICK, repo, "repro")

    assert "Running stage" not in again.stdout
    assert again.stdout.count("didn't change, skipping") == 3


def test_pipelines_of_other_folders_are_left_alone(repo: Path) -> None:
    """As with plain `dvc repro`: only dvc.yaml and what it needs."""
    (repo / "own").mkdir()
    (repo / "own/dvc.yaml").write_text("stages:\n  long:\n    cmd: touch ran\n    outs: [ran]\n")

    assert dvc(QUICK, repo, "repro").returncode == 0
    assert not (repo / "own/ran").exists()


def test_a_stage_that_another_dvc_works_on_is_refused(repo: Path) -> None:
    """Its lock on the paths holds although nobody asks for it before a stage has to run."""
    held = {"write": {str(repo / "out-a"): {"pid": os.getpid(), "cmd": "dvc repro"}}}
    (repo / ".dvc/tmp").mkdir(exist_ok=True)
    (repo / ".dvc/tmp/rwlock").write_text(json.dumps(held))

    refused = dvc(QUICK, repo, "repro")

    assert refused.returncode != 0
    assert "is busy" in refused.stderr
    assert not (repo / "out-a").exists()


def test_the_installed_dvc_is_one_that_can_be_quickened() -> None:
    """An upgrade that renames what is replaced is noticed here, not as lost seconds."""
    code = "import sys; from pipelines import quick_dvc; sys.exit(not quick_dvc.quicken())"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_another_version_of_dvc_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is replaced if one of the names is not what it was."""
    from dvc.stage import Stage  # noqa: PLC0415 - heavy

    before = Stage.changed
    monkeypatch.setattr(Stage, "changed_outs", lambda _self: False)

    assert not quick_dvc.quicken()
    assert Stage.changed is before


@pytest.mark.parametrize("module", ["dvc.repo.reproduce", "dvc.utils.serialize._yaml"])
def test_a_dvc_whose_modules_were_moved_runs_as_it_is(repo: Path, module: str) -> None:
    """The loss is a second, not the run."""
    code = (
        "import sys; from importlib import import_module as get\n"
        f"parent, _, name = {module!r}.rpartition('.')\n"
        f"get({module!r}); delattr(get(parent), name); sys.modules[{module!r}] = None\n"
        "from pipelines import quick_dvc; sys.exit(quick_dvc.quicken())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, check=False)
    assert done.returncode == 0
