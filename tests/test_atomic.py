"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines import atomic

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_file_appears_whole(tmp_path: Path) -> None:
    """Written text is there under its final name, and no temporary file is left."""
    path = tmp_path / "deep/er/a.txt"

    atomic.write_text(path, "hello\n")

    assert path.read_text() == "hello\n"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    """If writing raises half-way, the earlier content stays and nothing else is left."""
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")

    def write_and_fail() -> None:
        with atomic.replacing(path) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()

    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_directory_is_replaced_as_one(tmp_path: Path) -> None:
    """A new directory takes the place of the old one; files of the old one are gone."""
    path = tmp_path / "source"
    for name in ("first", "second"):
        with atomic.replacing(path) as part:
            part.mkdir()
            (part / name).write_text(name)

    assert [p.name for p in path.iterdir()] == ["second"]


def test_a_directory_is_never_half_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever anything is removed or renamed, the final name holds all files of a version."""
    path = tmp_path / "source"
    seen: list[set[str]] = []

    def look() -> None:
        seen.append({p.name for p in path.iterdir()} if path.exists() else set())

    for version in ("old", "new"):
        with atomic.replacing(path) as part:
            part.mkdir()
            for name in ("a", "b", "c"):
                (part / f"{version}-{name}").write_text(name)
            monkeypatch.setattr(os, "unlink", _after(look, os.unlink))
            monkeypatch.setattr(os, "rename", _after(look, os.rename))
            monkeypatch.setattr(os, "replace", _after(look, os.replace))

    whole = [{f"{version}-{name}" for name in "abc"} for version in ("old", "new")]
    assert len(seen) > 3
    assert all(names in [set(), *whole] for names in seen)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def _after(look: Callable[[], None], call: Callable[..., None]) -> Callable[..., None]:
    """Make a system call of ours that is looked at after each use."""

    def both(*args: object, **kwargs: object) -> None:
        call(*args, **kwargs)
        look()

    return both


def test_read_only_output_of_dvc_is_replaced(tmp_path: Path) -> None:
    """A file that DVC made read-only, hard-linked to its cache, is replaced; the cache is not."""
    cached = tmp_path / "cache"
    cached.write_text("cached")
    cached.chmod(0o444)
    path = tmp_path / "out"
    path.hardlink_to(cached)

    atomic.write_text(path, "new")

    assert path.read_text() == "new"
    assert cached.read_text() == "cached"


def test_equal_content_keeps_its_time_stamp(tmp_path: Path) -> None:
    """Writing what is there already touches nothing, so that DVC has nothing to hash again."""
    path = tmp_path / "a.json"
    atomic.write_json(path, {"a": 1})
    os.utime(path, (1, 1))

    atomic.write_json(path, {"a": 1})

    assert path.stat().st_mtime == 1


def test_json_never_holds_a_nan(tmp_path: Path) -> None:
    """A number that is not finite is refused, and no file appears."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "a.json", {"kld": float("nan")})

    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="strace-like order is checked by a shim here")
def test_bytes_reach_the_disk_before_the_name(tmp_path: Path) -> None:
    """The order is write, fsync, rename, fsync of the directory: a power cut cannot reorder it."""
    code = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from pipelines import atomic
        fsync, rename, calls = os.fsync, Path.replace, []
        def kind(handle):
            return "dir" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"
        os.fsync = lambda handle: (calls.append("fsync " + kind(handle)), fsync(handle))[1]
        Path.replace = lambda self, to: (calls.append("rename"), rename(self, to))[1]
        atomic.write_text(Path(sys.argv[1]), "x")
        print(",".join(calls))
    """)
    root = Path(__file__).resolve().parent.parent

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stdout.strip() == "fsync file,rename,fsync dir"


def test_a_kill_while_writing_leaves_no_final_name(tmp_path: Path) -> None:
    """After kill -9 in mid-write only a part is left, and the next write removes it."""
    code = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from pipelines import atomic
        with atomic.replacing(Path(sys.argv[1])) as part:
            part.write_text("half")
            os.kill(os.getpid(), 9)
    """)
    path = tmp_path / "a.gguf"
    root = Path(__file__).resolve().parent.parent

    subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, check=False)

    assert not path.exists()
    assert atomic.part_name(path).exists()
    atomic.write_text(path, "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
