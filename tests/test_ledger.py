"""The ledger tells every move, survives merges, and names the line that somebody changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import release_factory as factory
from hypothesis import given, settings
from hypothesis import strategies as st
from small_disk import fill, small_disk

from pipelines import ledger as ledgers
from pipelines.errors import MachineError
from pipelines.ledger import Ledger, LedgerError, MoveLine, WaiverLine
from pipelines.release_records import STABLE, Move, ReleaseWaiver

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
MODEL = factory.MODEL
WAIVER = ReleaseWaiver(gate="hold", who="Ada", why="read by hand", until="2027-02-28")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the ledger will be."""
    return tmp_path / "results" / MODEL / "ledger.jsonl"


def move(sequence: int, *, why: str = "better", waivers: tuple[ReleaseWaiver, ...] = ()) -> Move:
    """Return the n-th move of an alias."""
    return Move(
        sequence=sequence,
        action="publish",
        release=factory.sha256(str(sequence).encode()),
        previous=factory.sha256(str(sequence - 1).encode()) if sequence > 1 else None,
        at="2027-01-31T12:00:00Z",
        who="Ada",
        why=why,
        run=None,
        waivers=waivers,
    )


def written(path: Path, count: int, registry: str = "local") -> Ledger:
    """Write so many moves."""
    ledger = Ledger.load(path, MODEL)
    for sequence in range(1, count + 1):
        ledger.append(registry, STABLE, move(sequence))
    return ledger


def test_a_missing_file_is_an_empty_ledger(path: Path) -> None:
    """A model that was never published has none, and to look creates nothing."""
    ledger = Ledger.load(path, MODEL)

    assert ledger.lines == ()
    assert ledger.last("local", STABLE) is None
    assert not path.parent.exists()


def test_what_is_appended_is_read_back(path: Path) -> None:
    """Moves of each registry by themselves, in order, by a process that starts anew."""
    written(path, 3)
    written(path, 2, registry="production")

    again = Ledger.load(path, MODEL)

    assert again.moves("local", STABLE) == (move(1), move(2), move(3))
    assert again.last("production", STABLE) == move(2)
    assert again.moves("elsewhere", STABLE) == ()
    assert again.registries == ("local", "production")
    assert path.read_bytes().count(b"\n") == 5


def test_a_move_that_is_there_is_not_written_again(path: Path) -> None:
    """Whoever comes second changes no byte."""
    written(path, 2)
    before = path.read_bytes()

    Ledger.load(path, MODEL).append("local", STABLE, move(2))
    Ledger.load(path, MODEL).append("local", STABLE, move(1))

    assert path.read_bytes() == before


def test_the_same_moves_make_the_same_bytes(path: Path, tmp_path: Path) -> None:
    """Lines are a function of the moves: two checkouts write one history."""
    written(path, 3)
    written(tmp_path / "other.jsonl", 3)

    assert path.read_bytes() == (tmp_path / "other.jsonl").read_bytes()


def test_a_waiver_has_a_line_right_before_its_move(path: Path) -> None:
    """Who let it pass is read before what was passed."""
    ledger = Ledger.load(path, MODEL)
    ledger.append("local", STABLE, move(1, waivers=(WAIVER,)))

    first, second = Ledger.load(path, MODEL).lines

    assert isinstance(first, WaiverLine)
    assert (first.waiver, first.sequence) == (WAIVER, 1)
    assert isinstance(second, MoveLine)
    assert second.move == move(1, waivers=(WAIVER,))


def test_each_line_names_the_one_before_it_of_its_registry(path: Path) -> None:
    """`sha256sum` of a line is what the next one says."""
    written(path, 2)
    first, second = path.read_bytes().splitlines()

    assert json.loads(first)["after"] is None
    assert json.loads(second)["after"] == factory.sha256(first)


@settings(deadline=None, max_examples=50)
@given(why=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_reason_fits_in_one_line(why: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Line ends, controls and other scripts in a reason break nothing."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    Ledger.load(path, MODEL).append("local", STABLE, move(1, why=why))

    assert Ledger.load(path, MODEL).moves("local", STABLE) == (move(1, why=why),)
    assert path.read_bytes().count(b"\n") == 1


# --- what somebody did to it ------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_edited_line_is_named(path: Path, number: int) -> None:
    """Another name in a line, the last one included, is found at that line."""
    written(path, 3)
    lines = path.read_text().splitlines()
    lines[number - 1] = lines[number - 1].replace("Ada", "Eve")
    path.write_text("\n".join(lines) + "\n")

    with pytest.raises(LedgerError, match=rf"ledger\.jsonl:{number}: this line was edited"):
        Ledger.load(path, MODEL)


def test_a_line_that_was_edited_with_its_own_digest_breaks_the_next_one(path: Path) -> None:
    """Who knows how to make a digest cannot change what comes after without being seen."""
    written(path, 3)
    lines = path.read_bytes().splitlines()
    after = json.loads(lines[1])["after"]
    forged = ledgers.lines_of(MODEL, "local", STABLE, move(2, why="worse"), after)
    lines[1] = ledgers.line_bytes(forged[0])
    path.write_bytes(b"\n".join(lines) + b"\n")

    with pytest.raises(LedgerError, match=r":3: the line before it, .* is missing"):
        Ledger.load(path, MODEL)


@pytest.mark.parametrize("number", [1, 2])
def test_a_removed_line_is_named_by_the_one_that_follows_it(path: Path, number: int) -> None:
    """What came after it knows that it is missing."""
    written(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[number - 1]
    path.write_bytes(b"".join(lines))

    with pytest.raises(LedgerError, match=rf":{number}: the line before it"):
        Ledger.load(path, MODEL)


def test_a_removed_waiver_is_noticed(path: Path) -> None:
    """A move does not get rid of what was let pass for it."""
    ledger = Ledger.load(path, MODEL)
    ledger.append("local", STABLE, move(1, waivers=(WAIVER,)))
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[1])

    with pytest.raises(LedgerError, match=":1: the line before it"):
        Ledger.load(path, MODEL)


def test_a_waiver_without_its_move_is_named(path: Path) -> None:
    """A cut between the two is no end of a ledger."""
    Ledger.load(path, MODEL).append("local", STABLE, move(1, waivers=(WAIVER,)))
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])

    with pytest.raises(LedgerError, match=":1: the move that this waiver was for is missing"):
        Ledger.load(path, MODEL)


@pytest.mark.parametrize("cut", [1, 40])
def test_a_last_line_that_was_cut_off_is_named_and_can_be_removed(path: Path, cut: int) -> None:
    """A power cut of another program's making; without that line the move is written anew."""
    written(path, 2)
    data = path.read_bytes()
    path.write_bytes(data[:-cut])

    with pytest.raises(LedgerError, match=r":2: the last line was cut off") as caught:
        Ledger.load(path, MODEL)
    assert "Remove that line" in caught.value.hint

    path.write_bytes(data[: data.index(b"\n") + 1])
    Ledger.load(path, MODEL).append("local", STABLE, move(2))
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"null", b"<html>", b"\xff\xfe", b'{"kind":"move"}', b"[" * 5000, b"1e999"],
    ids=["empty", "object", "null", "html", "not utf-8", "half", "deep", "infinite"],
)
def test_a_line_of_something_else_is_named(path: Path, line: bytes) -> None:
    """Whatever was written there, the place is said."""
    written(path, 1)
    path.write_bytes(path.read_bytes() + line + b"\n")

    with pytest.raises(LedgerError, match=r"ledger\.jsonl:2: no line of a ledger") as caught:
        Ledger.load(path, MODEL)
    assert ": :" not in caught.value.message


def test_the_ledger_of_another_model_is_refused(path: Path) -> None:
    """A copied file is not this model's history."""
    written(path, 1)

    with pytest.raises(LedgerError, match=r':1: a line of model "tiny-llama" in the ledger of'):
        Ledger.load(path, "other")


def test_another_move_of_the_same_number_is_refused(path: Path) -> None:
    """Two stories: neither is overwritten."""
    ledger = written(path, 2)
    before = path.read_bytes()

    with pytest.raises(LedgerError, match=r":2: move 2 of tiny-llama@stable"):
        ledger.append("local", STABLE, move(2, why="another"))

    assert path.read_bytes() == before


# --- several at once --------------------------------------------------------------------------


def test_writers_at_once_lose_no_line(path: Path) -> None:
    """Each has read the file before; each writes all the same after all others."""
    names = [f"registry{number}" for number in range(8)]
    readers = {name: Ledger.load(path, MODEL) for name in names}

    def write(name: str) -> None:
        for sequence in range(1, 6):
            readers[name].append(name, STABLE, move(sequence))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, names))

    again = Ledger.load(path, MODEL)
    assert all(len(again.moves(name, STABLE)) == 5 for name in names)
    assert list(path.parent.glob(".*")) == []


def test_processes_at_once_lose_no_line(path: Path) -> None:
    """Locks hold between processes, too."""
    script = textwrap.dedent("""
        import sys, test_ledger
        from pathlib import Path
        test_ledger.written(Path(sys.argv[1]), 10, registry=sys.argv[2])
    """)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path), f"registry{number}"],
            cwd=ROOT / "tests",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for number in range(3)
    ]
    assert [each.wait(60) for each in running] == [0, 0, 0]

    again = Ledger.load(path, MODEL)
    assert [len(again.moves(f"registry{number}", STABLE)) for number in range(3)] == [10] * 3


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    """Whole or as before: never half a line."""
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        path = disk / "ledger.jsonl"
        ledger = written(path, 2)
        before = path.read_bytes()
        fill(disk)

        with pytest.raises(MachineError, match="disk filled up"):
            ledger.append("local", STABLE, move(3, why="long " * 50))

        assert path.read_bytes() == before
        assert Ledger.load(path, MODEL).last("local", STABLE) == move(2)
        (disk / "filler").unlink()
        ledger.append("local", STABLE, move(3))
        assert Ledger.load(path, MODEL).last("local", STABLE) == move(3)


# --- git --------------------------------------------------------------------------------------


@pytest.fixture
def git(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A repository with the template's own .gitattributes."""
    root = tmp_path / "fork"
    root.mkdir()
    shutil.copy(ROOT / ".gitattributes", root)

    def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        argv = ["git", "-c", "user.name=Test", "-c", "user.email=test@example.invalid", *words]
        return subprocess.run(argv, cwd=root, check=check, capture_output=True, text=True)

    run("init", "-qb", "main")
    return run


def commit(git: Callable[..., subprocess.CompletedProcess[str]], what: str) -> None:
    """Commit everything."""
    git("add", "-A")
    git("commit", "-qm", what)


def test_moves_in_two_registries_merge_without_a_conflict(
    tmp_path: Path, git: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Two branches appended; `git merge` keeps both histories, each with its chain."""
    path = tmp_path / "fork/results" / MODEL / "ledger.jsonl"
    written(path, 2)
    written(path, 2, registry="production")
    commit(git, "base")
    git("switch", "-qc", "rollback")
    Ledger.load(path, MODEL).append("production", STABLE, move(3, why="rolled back"))
    commit(git, "rollback")
    git("switch", "-q", "main")
    ledger = Ledger.load(path, MODEL)
    ledger.append("local", STABLE, move(3))
    ledger.append("local", STABLE, move(4))
    commit(git, "bump")

    git("merge", "-q", "--no-edit", "rollback")

    merged = Ledger.load(path, MODEL)
    assert len(merged.moves("local", STABLE)) == 4
    assert merged.last("production", STABLE) == move(3, why="rolled back")


def test_the_same_move_in_two_branches_merges_to_one(
    tmp_path: Path, git: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Both branches copied a move from the registry; it happened once."""
    path = tmp_path / "fork/results" / MODEL / "ledger.jsonl"
    written(path, 1)
    commit(git, "base")
    git("switch", "-qc", "other")
    ledger = Ledger.load(path, MODEL)
    ledger.append("production", STABLE, move(1))
    ledger.append("local", STABLE, move(2))
    commit(git, "other")
    git("switch", "-q", "main")
    ledger = Ledger.load(path, MODEL)
    ledger.append("local", STABLE, move(2))
    ledger.append("local", STABLE, move(3))
    commit(git, "main")

    git("merge", "-q", "--no-edit", "other")

    merged = Ledger.load(path, MODEL)
    assert merged.moves("local", STABLE) == (move(1), move(2), move(3))
    assert merged.last("production", STABLE) == move(1)
    merged.append("local", STABLE, move(4))
    assert Ledger.load(path, MODEL).last("local", STABLE) == move(4)


def test_two_branches_that_moved_the_same_alias_differently_are_named(
    tmp_path: Path, git: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The merge has no conflict, the ledger does: the first line of either side is said."""
    path = tmp_path / "fork/results" / MODEL / "ledger.jsonl"
    written(path, 1)
    commit(git, "base")
    git("switch", "-qc", "other")
    Ledger.load(path, MODEL).append("local", STABLE, move(2, why="mine"))
    commit(git, "other")
    git("switch", "-q", "main")
    Ledger.load(path, MODEL).append("local", STABLE, move(2, why="yours"))
    commit(git, "main")
    git("merge", "-q", "--no-edit", "other")

    with pytest.raises(LedgerError, match=r":3: this line and line 2 follow the same line"):
        Ledger.load(path, MODEL)


def test_marks_of_a_conflict_are_called_that(path: Path) -> None:
    """A fork without .gitattributes is told what to write there."""
    written(path, 1)
    path.write_bytes(b"<<<<<<< HEAD\n" + path.read_bytes())

    with pytest.raises(LedgerError, match=":1: a conflict of git's") as caught:
        Ledger.load(path, MODEL)
    assert ".gitattributes" in caught.value.hint
