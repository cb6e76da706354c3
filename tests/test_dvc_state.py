"""DVC takes over a digest that a stage has already computed, and is never misled by it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import dvc_state

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
SIZE_BYTES = 100 * MIB

# A stage that writes a file full of zeros but for its start (sparse: no disk is used), hashes it,
# and, by its arguments, tells DVC, and changes the file afterwards.
STAGE = f"""
import hashlib, sys
from pathlib import Path
from pipelines import dvc_state
dvc_state.WORTH_BYTES = 1  # DVC is imported for less than it would be worth: a quicker test
path = Path("out.bin")
with path.open("wb") as file:
    file.write(b"weights")
    file.truncate({SIZE_BYTES})
md5 = hashlib.md5(path.read_bytes()).hexdigest()
if "remember" in sys.argv:
    assert dvc_state.remember(path, md5)
if "touch" in sys.argv:
    with path.open("r+b") as file:
        file.write(b"WEIGHTS")
"""


def _dvc(repo: Path, *argv: str) -> str:
    """Run DVC in a repository and return what it printed."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *argv],
        cwd=repo,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT),
             "DVC_SITE_CACHE_DIR": str(repo / "site")},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with DVC as the template configures it."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text(
        '[core]\n    analytics = false\n[cache]\n    type = "hardlink,reflink,symlink"\n'
    )
    (tmp_path / "stage.py").write_text(STAGE)
    return tmp_path


def _declare(repo: Path, arguments: str) -> None:
    (repo / "dvc.yaml").write_text(
        f"stages:\n  make:\n    cmd: python stage.py {arguments}\n    outs: [out.bin]\n"
    )


def _bytes_read(repo: Path, arguments: str) -> int:
    """
    Bytes that `dvc repro` itself reads while it commits what the stage made.

    The stage runs as a child; /proc/self/io of a process counts its reaped children, too, so the
    stage's own reads (one hash pass) are known and taken off by the caller.
    """
    _declare(repo, arguments)
    script = (
        "import sys\nfrom dvc.cli import main\n"
        "assert main(['repro', '-q']) == 0\n"
        "text = open('/proc/self/io').read()\n"
        "print(text.split('rchar: ')[1].split()[0])\n"
    )
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=repo,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT),
             "DVC_SITE_CACHE_DIR": str(repo / "site")},
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


def _locked_md5(repo: Path) -> str:
    found = re.search(
        rf"md5: ([0-9a-f]{{32}})\n\s+size: {SIZE_BYTES}", (repo / "dvc.lock").read_text()
    )
    assert found
    return found[1]


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="reads are counted by /proc")
def test_dvc_does_not_read_an_output_whose_digest_it_was_told(repo: Path) -> None:
    """`dvc repro` reads a 100 MiB output to hash it, and reads nothing of it if it was told."""
    told = _bytes_read(repo, "remember")
    md5_told = _locked_md5(repo)
    untold = _bytes_read(repo, "silent")

    assert untold - told > 0.9 * SIZE_BYTES
    assert told < 1.9 * SIZE_BYTES  # the stage's own pass, and the modules of two programs
    assert md5_told == _md5(repo / "out.bin") == _locked_md5(repo)


def test_the_digest_survives_that_dvc_moves_the_file_into_its_cache(repo: Path) -> None:
    """Afterwards output and cache are one file under its md5, and DVC calls all up to date."""
    _declare(repo, "remember")
    _dvc(repo, "repro", "-q")
    md5 = _locked_md5(repo)
    cached = repo / ".dvc/cache/files/md5" / md5[:2] / md5[2:]

    assert (repo / "out.bin").samefile(cached)
    assert _md5(cached) == md5
    assert "up to date" in _dvc(repo, "status")


def test_a_file_that_changed_after_it_was_hashed_is_hashed_by_dvc(repo: Path) -> None:
    """A stale digest is void: DVC records the bytes that are there, not those it was told of."""
    _declare(repo, "remember touch")
    _dvc(repo, "repro", "-q")

    with (repo / "out.bin").open("rb") as file:
        assert file.read(7) == b"WEIGHTS"
    assert _locked_md5(repo) == _md5(repo / "out.bin")


def _large(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(dvc_state.WORTH_BYTES)
    return path


def test_without_dvc_nothing_happens(tmp_path: Path) -> None:
    """Outside a repository of DVC's the hint is dropped without an error."""
    assert not dvc_state.remember(_large(tmp_path / "out.bin"), "0" * 32)


def test_a_small_file_is_left_to_dvc(repo: Path) -> None:
    """Where hashing is quicker than importing DVC, DVC is not imported."""
    (repo / "small").write_bytes(b"x" * 1000)
    code = (
        "import sys; from pathlib import Path; from pipelines import dvc_state\n"
        "assert not dvc_state.remember(Path('small'), '0' * 32)\n"
        "assert not any(name.split('.')[0] in ('dvc', 'dvc_data') for name in sys.modules)\n"
    )

    subprocess.run(
        [sys.executable, "-c", code], cwd=repo, env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )  # fmt: skip


@pytest.mark.parametrize("fault", ["version", "interface"])
def test_another_dvc_costs_the_hint_and_nothing_else(
    fault: str, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that was not tested, or an interface that changed: False, and no error."""
    if fault == "version":
        monkeypatch.setattr(dvc_state, "TESTED_MAJORS", {"dvc": "2"})
    else:

        def broken(*_: object) -> None:
            raise AttributeError("'Repo' object has no attribute 'state'")

        monkeypatch.setattr(dvc_state, "_save", broken)

    assert not dvc_state.remember(_large(repo / "out.bin"), "0" * 32)


@pytest.mark.parametrize(
    ("config", "local", "expected"),
    [
        ("[core]\n    analytics = false\n", "", "cache"),
        ("[cache]\n    dir = ../big\n", "", "../big"),
        ("[cache]\n    dir = ../big\n", '[cache]\n    dir = "/mnt/big"\n', "/mnt/big"),
        ("not a config file", "", "cache"),
    ],
)
def test_the_cache_is_where_dvcs_own_files_say(
    config: str, local: str, expected: str, tmp_path: Path
) -> None:
    """config.local wins over config; a relative path starts at the folder of the file."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text(config)
    (tmp_path / ".dvc/config.local").write_text(local)

    assert dvc_state.cache_dir(tmp_path) == tmp_path / ".dvc" / expected


def test_a_cache_that_a_machine_shares_is_found_by_dvcs_own_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner's checkouts do not last; what they share is declared outside of them."""
    for variable in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        (tmp_path / variable).mkdir()
    repo = tmp_path / "repo"
    (repo / ".dvc").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", repo], check=True)
    assert dvc_state.cache_dir(repo) == repo / ".dvc/cache"
    (tmp_path / "DVC_SYSTEM_CONFIG_DIR/config").write_text("[cache]\n    dir = /srv/shared\n")
    assert dvc_state.cache_dir(repo) == Path("/srv/shared")
    mine = tmp_path / "DVC_GLOBAL_CONFIG_DIR"
    (mine / "config").write_text("[cache]\n    dir = mine\n")
    assert dvc_state.cache_dir(repo) == mine / "mine"
    assert Path(repo, _dvc(repo, "cache", "dir").strip()).resolve() == mine / "mine"
    (repo / ".dvc/config").write_text("[cache]\n    dir = /here\n")
    assert dvc_state.cache_dir(repo) == Path("/here")
