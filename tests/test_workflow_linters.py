"""Programs that look at workflows: each says what only it knows, and nothing of what is right."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import checks.__main__
from checks import files, installed, linters

if TYPE_CHECKING:
    from collections.abc import Callable

    from checks.files import Finding

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = "actions/checkout@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1"
WORKFLOW = f"""\
name: sample
on:
  push:
    branches: [main]
permissions: {{}}
concurrency:
  group: sample-${{{{ github.ref }}}}
  cancel-in-progress: true
cache-mode: none
defaults:
  run:
    shell: bash
jobs:
  first:
    name: first
    runs-on: ubuntu-24.04
    timeout-minutes: 5
    permissions:
      contents: read # takes the repository
    outputs:
      answer: ${{{{ steps.ask.outputs.answer }}}}
    steps:
      - name: Take the repository
        uses: {CHECKOUT}
        with:
          persist-credentials: false
      - name: Ask
        id: ask
        uses: ./actions/ask
        with:
          model: tiny
  second:
    name: second
    needs: first
    if: needs.first.outputs.answer == 'yes'
    runs-on: ubuntu-24.04
    timeout-minutes: 5
    permissions: {{}}
    steps:
      - name: Say it
        env:
          ANSWER: ${{{{ needs.first.outputs.answer }}}}
        run: echo "$ANSWER"
"""
ACTION = """\
name: ask
description: Asks
inputs:
  model:
    description: Which model
    required: true
outputs:
  answer:
    description: What it says
    value: ${{ steps.it.outputs.answer }}
runs:
  using: composite
  steps:
    - name: Ask it
      id: it
      shell: bash
      env:
        MODEL: ${{ inputs.model }}
      run: echo "$MODEL"
"""
SCRIPT = '#!/usr/bin/env bash\nset -euo pipefail\necho "$1"\n'


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A repository with one workflow and one action, in which nothing is wrong."""
    return _sample(tmp_path)


def _sample(tmp_path: Path) -> Path:
    for name in ("actionlint.yaml", "yamllint.yaml", "zizmor.yml", "pins.yaml", "dependabot.yml"):
        _write(tmp_path, f".github/{name}", (ROOT / ".github" / name).read_text(encoding="utf-8"))
    _write(tmp_path, ".github/workflows/sample.yml", WORKFLOW)
    _write(tmp_path, "actions/ask/action.yml", ACTION)
    _write(tmp_path, "deploy/runner/hook", SCRIPT)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def _write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _say(linter: str, root: Path) -> list[Finding]:
    try:
        return list(linters.ALL[linter](files.read(root)))
    except installed.MissingError as missing:
        pytest.skip(missing.message)


@pytest.mark.parametrize("linter", linters.ALL)
def test_a_repository_in_which_nothing_is_wrong_passes(linter: str, sample: Path) -> None:
    """A false alarm would teach people to look away."""
    assert _say(linter, sample) == []


class Planted(NamedTuple):
    """An edit that one program objects to, with the place and a word of what it says."""

    linter: str
    file: str
    old: str
    new: str
    line: int
    says: str


SAMPLE = ".github/workflows/sample.yml"
ASK = "actions/ask/action.yml"
PLANTED = [
    Planted("actionlint", SAMPLE, "first.outputs.answer ==", "first.outputs.anwser ==", 35,
            "anwser"),
    Planted("zizmor", SAMPLE, "permissions:\n      contents: read # takes the repository",
            "permissions: write-all", 19, "excessive-permissions"),
    Planted("zizmor", SAMPLE, "[main]", "[main]\n  pull_request_target:", 5, "dangerous-triggers"),
    Planted("schema", SAMPLE, "cache-mode: none", "cache-mode: never", 9, "cache-mode"),
    Planted("schema", ASK, "  using: composite", "  using: composit", 12, "runs"),
    Planted("schema", ".github/dependabot.yml", "interval: weekly", "interval: often", 1, "often"),
    Planted("yamllint", SAMPLE, "name: sample\n", "name: sample \n", 1, "trailing spaces"),
    Planted("shellcheck", SAMPLE, 'echo "$ANSWER"', "echo $ANSWER", 43, "SC2086"),
    Planted("shellcheck", ASK, 'echo "$MODEL"', "cd $MODEL", 19, "SC2164"),
    Planted("shellcheck", "deploy/runner/hook", 'echo "$1"', "rm -rf $1/*", 3, "SC2086"),
    Planted("language-service", SAMPLE, "model: tiny", "modell: tiny", 31, "input 'modell'"),
    Planted("language-service", SAMPLE, "persist-credentials:", "persist-credential:", 26,
            "input 'persist-credential'"),
    Planted("language-service", SAMPLE, "      - name: Say it",
            "      - uses: ./actions/aks\n      - name: Say it", 40, "actions/aks"),
]  # fmt: skip


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Finding]]:
    """What a program says to a repository with all that is planted for it; asked once."""
    asked: dict[str, list[Finding]] = {}

    def ask(linter: str) -> list[Finding]:
        if linter not in asked:
            root = _sample(tmp_path_factory.mktemp(linter))
            for planted in (each for each in PLANTED if each.linter == linter):
                path = root / planted.file
                text = path.read_text(encoding="utf-8")
                assert planted.old in text
                path.write_text(text.replace(planted.old, planted.new, 1), encoding="utf-8")
            asked[linter] = _say(linter, root)
        return asked[linter]

    return ask


@pytest.mark.parametrize("planted", PLANTED, ids=lambda each: f"{each.linter}-{each.says}")
def test_each_program_says_what_only_it_knows(
    planted: Planted, said: Callable[[str], list[Finding]]
) -> None:
    """A fault is told with its file and line, whatever the program's own form."""
    found = said(planted.linter)
    told = [(each.file, each.line) for each in found if planted.says in str(each)]
    assert (planted.file, planted.line) in told, found


def test_an_exception_for_the_language_service_is_gone_when_it_is_not_needed(
    sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The day that the service knows a word, the exception for it hides nothing but faults."""
    monkeypatch.setattr(linters, "NEWER_THAN_THE_SERVICE", {})
    said = " ".join(finding.text for finding in _say("language-service", sample))
    for key in ("cache-mode",):
        assert key in said


def test_a_machine_without_go_and_node_says_what_was_skipped(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody needs Go or Node to work on the Python here; CI has both."""
    monkeypatch.setattr(installed, "home", lambda: tmp_path / "empty")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    repository = files.read(sample)

    for linter, why in (("actionlint", "no Go"), ("language-service", "Node is not installed")):
        findings, skipped = checks.__main__.asked(linter, repository)
        assert findings == []
        assert skipped.startswith(f"{linter} was skipped: ")
        assert why in skipped


def test_in_ci_a_program_that_is_missing_is_an_error_never_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A green check has to mean that everything was looked at."""
    monkeypatch.setattr(installed, "home", lambda: tmp_path)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["checks"])
    monkeypatch.setattr(linters, "ALL", {"language-service": linters.language_service})
    monkeypatch.setenv("CI", "true")
    with pytest.raises(installed.MissingError, match="was skipped"):
        checks.__main__.main()


@pytest.mark.parametrize("actions", [False, True])
def test_what_is_wrong_is_told_on_its_line_here_and_in_a_pull_request(
    sample: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    actions: bool,
) -> None:
    """An editor jumps to `file:line:column`; GitHub shows an annotation."""
    path = sample / SAMPLE
    path.write_text(path.read_text(encoding="utf-8").replace("permissions: {}\nconc", "conc"))
    monkeypatch.setattr(installed, "ROOT", sample)
    monkeypatch.setattr(linters, "ALL", {"yamllint": linters.yamllint})
    monkeypatch.setattr(sys, "argv", ["checks"])
    monkeypatch.setenv("GITHUB_ACTIONS", "true" if actions else "")

    assert checks.__main__.main() == 1

    said = capsys.readouterr().err
    assert f"{SAMPLE}:1:1: [permissions-exact] A workflow has no rights of its own" in said
    assert "Next: Write `permissions: {}` above the jobs." in said
    assert (f"::error file={SAMPLE},line=1,col=1::[permissions-exact]" in said) == actions


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own GitHub settings reaches a linter."""
    monkeypatch.delenv("GH_TOKEN", raising=False)
