"""Setting up `.venv`: what is asked of the installer, and when nothing is."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from pipelines import bootstrap
from pipelines.errors import ToolError

if TYPE_CHECKING:
    from pathlib import Path

# An installer that writes down what it was asked, and makes the environment that it was asked for.
UV = """\
#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
case "$*" in *"$REFUSED"*) exit 1 ;; esac
if [ "$1" = venv ]; then
  for last; do :; done
  mkdir -p "$last/bin" && touch "$last/bin/python"
fi
"""


@pytest.fixture(name="home")
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of our own, and an installer that only takes notes."""
    uv = tmp_path / "tools/uv"
    uv.parent.mkdir()
    uv.write_text(UV)
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{uv.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("REFUSED", "nothing is refused")
    venv = tmp_path / ".venv"
    monkeypatch.setattr(bootstrap, "VENV", venv)
    monkeypatch.setattr(bootstrap, "STAMP", venv / "gguf-fleet-setup.json")
    monkeypatch.setattr(bootstrap, "LOG", tmp_path / "setup.log")
    return tmp_path


def asked(home: Path) -> list[str]:
    """Return what the installer was asked since the last time."""
    notes = home / "tools/asked"
    lines = notes.read_text().splitlines() if notes.exists() else []
    notes.unlink(missing_ok=True)
    return lines


def test_packages_come_from_the_lock_by_their_hashes(home: Path) -> None:
    """The first run makes the environment and installs nothing that has no declared hash."""
    bootstrap.set_up("base")

    made, packages, ourselves = asked(home)
    assert made.startswith("venv")
    assert "--require-hashes" in packages
    assert "--no-deps" in ourselves


def test_a_second_run_does_nothing(home: Path) -> None:
    """What is set up is not set up again, and the smaller profile is part of the larger one."""
    bootstrap.set_up("convert")
    asked(home)

    bootstrap.set_up("convert")
    bootstrap.set_up("base")

    assert asked(home) == []


def test_an_active_environment_does_not_remove_itself(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make` typed while `.venv` is active runs the Python inside it, which has to survive."""
    bootstrap.set_up("base")
    asked(home)
    mark = home / ".venv/mark"
    mark.touch()
    monkeypatch.setattr(sys, "prefix", str(home / ".venv"))
    monkeypatch.setattr(sys, "executable", str(home / ".venv/bin/python"))

    bootstrap.set_up("base")
    bootstrap.set_up("convert")

    assert mark.exists()
    assert not any(line.startswith("venv") for line in asked(home))


def test_a_new_lock_under_another_python_starts_afresh(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages of one interpreter are not mixed with those of another one."""
    bootstrap.set_up("base")
    mark = home / ".venv/mark"
    mark.touch()
    monkeypatch.setattr(sys, "base_prefix", "/opt/another-python")

    bootstrap.set_up("base")
    assert mark.exists()
    monkeypatch.setattr(bootstrap, "TORCH", "torch==99")
    bootstrap.set_up("base")

    assert not mark.exists()


def test_torch_comes_from_the_ordinary_index_if_its_own_is_out_of_reach(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch's index does not answer, the larger build is taken instead of none."""
    monkeypatch.setenv("REFUSED", "--torch-backend=cpu")

    bootstrap.set_up("convert")

    *_, refused, taken = asked(home)
    assert "--torch-backend=cpu" in refused
    assert taken.endswith(bootstrap.TORCH)
    assert "--torch-backend" not in taken


def test_a_cut_set_up_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed installation the next run installs again; it does not believe the first."""
    monkeypatch.setenv("REFUSED", "--require-hashes")
    with pytest.raises(ToolError, match="exit code 1"):
        bootstrap.set_up("base")
    monkeypatch.setenv("REFUSED", "nothing is refused")
    asked(home)

    bootstrap.set_up("base")

    assert any("--require-hashes" in line for line in asked(home))
