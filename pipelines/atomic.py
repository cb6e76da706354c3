"""
Files that are either whole or absent.

Every file that another program may read gets its final name only after its bytes are on the disk:
temporary name in the same directory, fsync, rename, fsync of the directory. A kill at any moment
leaves the old file, the new file, or a `.part` that nobody reads and the next run removes. A
directory cannot be renamed over another one: between two renames there is neither, never a half.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PART_SUFFIX = ".part"


def part_name(path: Path) -> Path:
    """Name under which `path` is being written: hidden, beside it, one per final name."""
    return path.with_name(f".{path.name}{PART_SUFFIX}")


def _gone_name(path: Path) -> Path:
    """Name that an old directory has while it is removed; a `.part` to whoever finds it."""
    return path.with_name(f".{path.name}.old{PART_SUFFIX}")


def sync(path: Path) -> None:
    """Put the bytes of a file, or the names in a directory, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a tree if it is there; DVC's read-only outputs included."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_in_place(part: Path, path: Path) -> None:
    """Give a finished temporary file or directory its final name, replacing what was there."""
    gone = _gone_name(path)
    if part.is_dir():
        for inside in sorted(part.rglob("*")):
            if inside.is_file() or inside.is_dir():
                sync(inside)
        # Not removed in place: a kill would leave some of its files under the final name.
        remove(gone)
        with contextlib.suppress(FileNotFoundError):
            path.rename(gone)
    sync(part)
    part.replace(path)
    sync(path.parent)
    remove(gone)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Yield a temporary name beside `path`; rename it to `path` if the block succeeds.

    The block creates a file or a directory under the temporary name. If it raises, the temporary
    name is removed and `path` stays as it was. Leftovers of an earlier kill are removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_name(path)
    remove(part)
    try:
        yield part
    except BaseException:
        with contextlib.suppress(OSError):
            remove(part)
        raise
    put_in_place(part, path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically; an equal file is left untouched, with its time stamp."""
    if path.is_file() and not path.is_symlink() and path.read_bytes() == data:
        return
    with replacing(path) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path` atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """
    Write JSON that diffs well in a review: two spaces, keys in the order given, newline at the end.

    Raises:
        ValueError: `value` holds a NaN or an infinity, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
