"""
What `fleet init` would change, as bytes: shown as a diff, written all or not at all.

New contents are first written beside the files that they replace, under names that nobody reads;
then each gets its own. params.yaml is the last: a stop at any moment leaves a repository that has
not begun yet, in which the same command goes on.
"""

from __future__ import annotations

import difflib
import fcntl
import re
import shutil
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import atomic, console, disk, wording
from pipelines.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pipelines.init_answers import Answers
    from pipelines.layout import Layout

PARAMS: Final = "params.yaml"
_TITLE_CHARACTERS: Final = 72


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """
    Files as they will be.

    Attributes:
        answers: What was said.
        files: New bytes by path below the root, None where a file goes; only what differs.
        read: Bytes by path that it was made of; None where there was no file.
        model: Key of the model that is added; None if none is.
        source: Of that model.
        revision: Of that model.
        quants: Types of that model that are added.
        context_tokens: Of that model.
        host: Key of the host that it is for.
        notes: What the operator should know, in sentences.
        table: The quants that were looked at, as text; empty without a model.
        next_steps: Commands to type next.
    """

    answers: Answers
    files: Mapping[str, bytes | None]
    read: Mapping[str, bytes | None]
    model: str | None = None
    source: str | None = None
    revision: str | None = None
    quants: tuple[str, ...] = ()
    context_tokens: int | None = None
    host: str | None = None
    notes: tuple[str, ...] = ()
    table: str = ""
    next_steps: tuple[str, ...] = ()

    @property
    def is_changed(self) -> bool:
        """Whether anything would be written."""
        return bool(self.files)

    @property
    def title(self) -> str:
        """Say in one line what it is, for a commit or a pull request."""
        where = f" on {self.host}" if self.host else ""
        what = f"Begin with {self.model}{where}" if self.model else f"Set up the fleet{where}"
        return wording.shortened(what, _TITLE_CHARACTERS).replace("…", "")


def diff(at: Layout, proposal: Proposal) -> str:
    """
    Show the change as a unified diff; files that go are counted by folder.

    Args:
        at: The checkout that the proposal was made of.
        proposal: See there.

    Returns:
        Cleaned text, without a line end; empty if nothing changes.
    """
    del at
    lines: list[str] = []
    gone: Counter[str] = Counter()
    for path, after in sorted(proposal.files.items()):
        before = proposal.read.get(path)
        if after is None:
            gone["/".join(path.split("/")[:2])] += 1
            continue
        old, new = (_lines(data) for data in (before, after))
        origin = f"a/{path}" if before is not None else "/dev/null"
        lines += difflib.unified_diff(old, new, origin, f"b/{path}", lineterm="")
    for name, count in sorted(gone.items()):
        more = "" if name in proposal.files else f"/ ({wording.counted(count, 'file')})"
        lines.append(f"removed: {name}{more}")
    return "\n".join(console.clean(line) for line in lines)


def _lines(data: bytes | None) -> list[str]:
    return re.split(r"\r?\n", data.decode(errors="replace").rstrip("\r\n")) if data else []


# --- writing ----------------------------------------------------------------------------------


def write(at: Layout, proposal: Proposal) -> None:
    """
    Make the files what is proposed.

    Raises:
        MachineError: A file was changed since it was read, `fleet repro` works here, or the disk
            refuses. params.yaml is as it was, and the same command goes on.
    """
    with _alone(at):
        for path, then in proposal.read.items():
            if _bytes(at.root / path) != then:
                raise MachineError(
                    f"{path} was changed by somebody else in this very moment; all was left as it "
                    "is.",
                    hint="Run the same command again.",
                )
        made = {path: data for path, data in proposal.files.items() if data is not None}
        parts: list[tuple[Path, Path]] = []
        try:
            parts.extend(_staged(at.root / path, made[path]) for path in sorted(made, key=_order))
            others = [pair for pair in parts if pair[1] != at.root / PARAMS]
            for part, target in others:
                with disk.explained(target):
                    atomic.put_in_place(part, target)
            for path in sorted(proposal.files.keys() - made.keys()):
                with disk.explained(at.root / path):
                    atomic.remove(at.root / path)
                _remove_empty(at.root / path, at.root)
            for part, target in parts[len(others) :]:
                with disk.explained(target):
                    atomic.put_in_place(part, target)
        except BaseException:
            for part, _ in parts:
                with suppress(OSError):
                    atomic.remove(part)
            raise


def _order(path: str) -> tuple[bool, str]:
    """Put the declaration last: by it a fleet has begun."""
    return path == PARAMS, path


def _staged(target: Path, data: bytes) -> tuple[Path, Path]:
    """Write the new bytes beside a file."""
    if target.is_symlink():
        raise MachineError(
            f"{target} is a link; what it names may be no file of this repository.",
            hint="Put the file itself there, and run the same command again.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = atomic.part_name(target)
    try:
        with disk.explained(target):
            atomic.remove(part)
            part.write_bytes(data)
            if target.is_file():
                shutil.copymode(target, part)
            atomic.sync(part)
    except BaseException:
        with suppress(OSError):
            atomic.remove(part)
        raise
    return part, target


def _remove_empty(path: Path, root: Path) -> None:
    """Remove the folders that a file leaves empty; git does not know them either."""
    for folder in path.parents:
        if folder == root:
            return
        try:
            folder.rmdir()
        except OSError:
            return


@contextmanager
def _alone(at: Layout) -> Iterator[None]:
    """Keep `fleet repro` out of the checkout (`repro.alone`), whose own notes stay as they are."""
    path = at.root / ".dvc/tmp/fleet-repro.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError(
                "`fleet repro` works in this checkout; nothing was changed.",
                hint="Wait until it has ended, and run the same command again.",
            ) from None
        yield


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
