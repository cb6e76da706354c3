"""What a kill leaves behind, and that the next run completes with the right bytes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines import orphans, repair
from pipelines.errors import MachineError
from pipelines.layout import Layout

KILLS = 20
# Three stages whose outputs are 4 MiB, written by a child of the stage, so that a kill can hit it.
STEP = (
    "sh -c 'sleep 0.2; head -c 4194304 /dev/zero | tr \"\\0\" {letter} > {out}'; cat {dep} >> {out}"
)
STAGES = {
    "a": {"cmd": STEP.format(letter="a", dep="seed", out="work/a"), "deps": ["seed"],
          "outs": ["work/a"]},
    "b": {"cmd": STEP.format(letter="b", dep="work/a", out="work/b"), "deps": ["work/a"],
          "outs": ["work/b"]},
    "c": {"cmd": STEP.format(letter="c", dep="work/b", out="work/c"), "deps": ["work/b"],
          "outs": ["work/c"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository with DVC and a graph of three stages; nothing has run."""
    path = tmp_path_factory.mktemp("template")
    (path / "dvc.yaml").write_text(json.dumps({"stages": STAGES}))
    (path / ".gitignore").write_text("/work/\n")
    (path / "work").mkdir()
    (path / "seed").write_text("0")
    git(path, "init", "-q")
    dvc(path, "init", "-q")
    dvc(path, "config", "cache.type", "reflink,hardlink,symlink")
    return path


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(template, tmp_path / "fleet")


def git(root: Path, *argv: str) -> None:
    """Run git as somebody."""
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.invalid")
    subprocess.run(["git", *who, *argv], cwd=root, check=True, capture_output=True)


def dvc(root: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run DVC to its end."""
    return subprocess.run(
        [sys.executable, "-m", "dvc", *argv],
        cwd=root,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def wanted(seed: str) -> dict[str, str]:
    """Digest of every output for a seed."""
    data = seed.encode()
    digests = {}
    for letter in b"abc":
        data = bytes([letter]) * 4194304 + data
        digests[chr(letter)] = hashlib.sha256(data).hexdigest()
    return digests


def found(root: Path) -> dict[str, str]:
    """Digest of every output that is there."""
    return {
        name: hashlib.sha256((root / "work" / name).read_bytes()).hexdigest()
        for name in "abc"
        if (root / "work" / name).exists()
    }


def test_a_run_killed_at_any_moment_is_followed_by_a_right_one(root: Path) -> None:
    """After SIGKILL of DVC at random moments, repair and one more run give the right bytes."""
    moments = random.Random(20261121)
    env = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    started = time.monotonic()
    dvc(root, "repro")
    whole_s = time.monotonic() - started
    killed = 0
    for number in range(KILLS):
        (root / "seed").write_text(str(number))
        with subprocess.Popen(
            [sys.executable, "-c", OWNER], cwd=root, env=env, stdout=subprocess.PIPE, text=True
        ) as owner:
            assert owner.stdout is not None
            victim = int(owner.stdout.readline())
            time.sleep(moments.uniform(0.2, 0.95) * whole_s)
            killed += psutil.pid_exists(victim)
            owner.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)

    repaired = repair.repair(Layout(root), left_over_after_s=0)
    last = dvc(root, "repro")

    assert killed > KILLS / 2
    assert last.returncode == 0, f"{repaired}\n{last.stderr}"
    assert found(root) == wanted(str(KILLS - 1))
    assert orphans.left_over(root) == []


# What `fleet repro` is to DVC: the owner of the mark, which dies with the run.
OWNER = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(Path(__file__).resolve().parent.parent)!r})
from pathlib import Path
from pipelines import orphans, repair
from pipelines.layout import Layout
repair.repair(Layout(), left_over_after_s=0)
env = dict(os.environ, {orphans.MARK_ENV}=orphans.mark(Path()))
child = subprocess.Popen([sys.executable, "-m", "dvc", "repro"], env=env,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("content", ["", "{", '{"write": {"x": ', "[]", '{"write": {"x": {}}}'])
def test_cut_table_of_readers_and_writers_is_removed(root: Path, content: str) -> None:
    """A table that a kill cut, on which DVC gives up for ever, does not stop the next run."""
    table = root / ".dvc/tmp/rwlock"
    table.parent.mkdir(exist_ok=True)
    table.write_text(content)

    told = repair.repair(Layout(root))

    assert len(told) == 1
    assert "table of readers and writers" in told[0]
    assert not table.exists()


def test_dvc_refuses_what_repair_mends(root: Path) -> None:
    """DVC alone fails on a cut table and on a cut lock, however often; after repair it runs."""
    (root / ".dvc/tmp").mkdir(exist_ok=True)
    (root / ".dvc/tmp/rwlock").write_text("")
    (root / "dvc.lock").write_text("")
    before = [dvc(root, "repro").returncode for _ in range(2)]

    repair.repair(Layout(root))
    after = dvc(root, "repro")

    assert 0 not in before
    assert after.returncode == 0, after.stderr
    assert found(root) == wanted("0")


def test_entries_of_dead_and_of_other_processes_are_removed(root: Path) -> None:
    """Entries of the dead go, also if their number is in use again; a living owner keeps his."""
    mine = {"pid": os.getpid(), "cmd": " ".join(psutil.Process().cmdline()[1:])}
    reused = {"pid": os.getpid(), "cmd": "dvc repro of somebody else"}
    dead = {"pid": 2**22 + 1, "cmd": "dvc repro"}
    table = root / ".dvc/tmp/rwlock"
    table.parent.mkdir(exist_ok=True)
    table.write_text(
        json.dumps({"write": {"/1": dead, "/2": reused, "/3": mine}, "read": {"/4": [dead, mine]}})
    )

    told = repair.repair(Layout(root))

    assert len(told) == 1
    assert json.loads(table.read_text()) == {"write": {"/3": mine}, "read": {"/4": [mine]}}


def test_table_that_somebody_is_writing_is_left_alone(root: Path) -> None:
    """While a living program holds DVC's guard, nothing is removed and the holder is findable."""
    tmp = root / ".dvc/tmp"
    tmp.mkdir(exist_ok=True)
    (tmp / "rwlock").write_text("")
    with (tmp / "rwlock.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        with pytest.raises(MachineError, match="held by another program"):
            repair.repair(Layout(root))

    assert (tmp / "rwlock").exists()


@pytest.mark.parametrize(
    "cut",
    [
        "",
        "schema: '2.0'\nstages:\n  a:\n    cmd: x\n    deps:\n    - path",
        "schema: '2.0'\nstages:\n  a:\n",
        "schema: '2",
        "\0\0\0",
    ],
)
def test_cut_lock_comes_back_from_the_last_commit(root: Path, cut: str) -> None:
    """A dvc.lock that a kill cut is the committed one again."""
    committed = "schema: '2.0'\nstages:\n  a:\n    cmd: x\n"
    (root / "dvc.lock").write_text(committed)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "lock")
    (root / "dvc.lock").write_text(cut)

    told = repair.repair(Layout(root))

    assert len(told) == 1
    assert "restored" in told[0]
    assert (root / "dvc.lock").read_text() == committed


def test_cut_lock_comes_back_from_the_copy_of_the_last_run(root: Path) -> None:
    """Without a commit the copy that the last run saved is taken, and no finished stage is lost."""
    dvc(root, "repro")
    repair.keep(Layout(root))
    (root / "dvc.lock").write_text("")

    told = repair.repair(Layout(root))
    after = dvc(root, "repro")

    assert len(told) == 1
    assert "restored" in told[0]
    assert after.stdout.count("didn't change") == 3


def test_lock_that_lost_its_end_is_whole_again_after_a_kill(root: Path) -> None:
    """After a kill a readable lock with fewer stages than its copy is replaced by the copy."""
    whole = "schema: '2.0'\nstages:\n  a:\n    cmd: x\n  b:\n    cmd: y\n"
    (root / "dvc.lock").write_text(whole)
    repair.keep(Layout(root))
    (root / "dvc.lock").write_text(whole.partition("  b:")[0])

    after_an_end = repair.repair(Layout(root))
    after_a_kill = repair.repair(Layout(root), died=True)

    assert after_an_end == []
    assert len(after_a_kill) == 1
    assert (root / "dvc.lock").read_text() == whole


def test_cut_lock_without_any_copy_is_removed(root: Path) -> None:
    """Where there is neither a commit nor a copy, DVC starts from nothing instead of refusing."""
    (root / "dvc.lock").write_text("")

    told = repair.repair(Layout(root))

    assert told == [f"removed {root / 'dvc.lock'}: a kill had cut it, and there is no copy"]
    assert not (root / "dvc.lock").exists()


def test_whole_checkout_needs_no_repair(root: Path) -> None:
    """After a run that ended well there is nothing to tell, and the lock stays as it is."""
    dvc(root, "repro")
    before = (root / "dvc.lock").read_bytes()

    assert repair.repair(Layout(root), left_over_after_s=0) == []
    assert (root / "dvc.lock").read_bytes() == before


# --- unfinished files -------------------------------------------------------------------------


def test_unfinished_files_of_the_dead_are_removed(root: Path) -> None:
    """Our `.part`s, files and directories, and DVC's partial copies go; finished files stay."""
    left = [
        root / "work/m/gguf/.m-Q4_0.gguf.part",
        root / "work/m/.source.part/model.safetensors",
        root / ".dvc/cache/files/md5/ab/.0123456789_-ABCDEFGHIJ.tmp",
        root / ".dvc/cache/files/md5/ab/cdef.0123456789_-ABCDEFGHIJ.tmp",
        root / "work/m/.0123456789_-ABCDEFGHIJ.tmp",
    ]
    kept = [
        root / "work/m/gguf/m-Q4_0.gguf",
        root / "work/m/notes.part",
        root / "work/m/x.tmp",
        root / ".dvc/cache/files/md5/ab/cdef",
    ]
    for path in (*left, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")

    told = repair.repair(Layout(root), left_over_after_s=0)

    assert len(told) == 5
    assert not any(path.exists() for path in left)
    assert not (root / "work/m/.source.part").exists()
    assert all(path.exists() for path in kept)


def test_unfinished_file_that_somebody_writes_stays(root: Path) -> None:
    """A file that a living process has open stays, and so does one that is only seconds old."""
    path = root / "work/.big.gguf.part"
    path.write_text("x")

    with path.open("a"):
        while_open = repair.repair(Layout(root), left_over_after_s=0)
    while_young = repair.repair(Layout(root))

    assert while_open == []
    assert while_young == []
    assert path.exists()


def test_partial_copies_are_found_in_a_cache_elsewhere(root: Path, tmp_path: Path) -> None:
    """A cache that the configuration puts elsewhere is swept as well."""
    cache = tmp_path / "shared"
    dvc(root, "config", "--local", "cache.dir", str(cache))
    partial = cache / "files/md5/ab/.0123456789_-ABCDEFGHIJ.tmp"
    partial.parent.mkdir(parents=True)
    partial.write_text("x")

    told = repair.repair(Layout(root), left_over_after_s=0)

    assert len(told) == 1
    assert not partial.exists()


# --- processes --------------------------------------------------------------------------------


def test_processes_of_a_dead_run_are_ended_and_others_are_not(root: Path, tmp_path: Path) -> None:
    """Only what carries the mark of a dead run in this very checkout is ended."""
    dead = orphans.mark(root).replace(f":{os.getpid()}:", f":{2**22 + 1}:")
    elsewhere = orphans.mark(tmp_path / "other").replace(f":{os.getpid()}:", f":{2**22 + 1}:")
    sleepers = [
        subprocess.Popen(["sleep", "300"], env={**os.environ, orphans.MARK_ENV: mark})
        for mark in (dead, elsewhere, orphans.mark(root))
    ]

    told = repair.repair(Layout(root))
    ended = [not psutil.pid_exists(sleeper.pid) for sleeper in sleepers]
    for sleeper in sleepers:
        sleeper.kill()
        sleeper.wait()

    assert told == [f"ended process {sleepers[0].pid} (sleep) of a run that was killed"]
    assert ended == [True, False, False]
