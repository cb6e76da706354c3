"""
A bump in this clone: the same branch and commit as on GitHub, for people who work without it.

Nothing that lies in the working tree or in the index is touched, and nothing is switched: objects
are written and one branch is set, against what it was. Only then does somebody type `git switch`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import bump_change, console, pin_lines, proc, trees
from pipelines.bump_pull import PARAMS, Outcome
from pipelines.errors import MachineError, ParamsError, ToolError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.bump_change import Bump
    from pipelines.bump_pull import State
    from pipelines.layout import Layout
    from pipelines.pin_lines import Place, Value

_WITHIN_S: Final = 60.0
_NONE: Final = "0" * 40


def bring(at: Layout, bump: Bump, seen: Mapping[Place, Value]) -> Outcome:
    """
    Leave a branch with exactly this change on top of the commit that is checked out.

    Args:
        at: The checkout.
        bump: The change.
        seen: What the declaration said that was looked at, at the places of the edits.

    Returns:
        What became of it: `opened` for a branch that is new, `renewed` for one that was moved.

    Raises:
        ParamsError: There is no commit, or the line cannot be changed by itself.
        MachineError: git does not know who commits, or the branch was moved in this very moment.
    """
    clone = _Clone(at)
    data = clone.git.show(clone.head, PARAMS)
    there = pin_lines.values(data, bump.edits) if data is not None else None
    if data is None or there != dict(seen):
        if there == dict(bump.edits):
            return _of(bump, "pinned", f"HEAD pins {bump_change.short(bump.new)}.")
        return _of(
            bump,
            "elsewhere",
            f"{PARAMS} here is not that of the commit that is checked out: commit it, then run the "
            "same command again.",
        )
    before = clone.git.parse(f"refs/heads/{bump.branch}")
    if before is not None:
        if clone.is_right(before, bump, seen):
            return _of(bump, "unchanged", f"{bump.branch} is as it has to be.")
        if (why := clone.foreign(before, bump)) is not None:
            return _of(
                bump,
                "left",
                f"{bump.branch} is left as it is: {why} `git branch -D {bump.branch}` makes room.",
            )
        if (where := clone.checked_out(bump.branch)) is not None:
            return _of(
                bump, "left", f"{bump.branch} is checked out in {where}: switch to another branch."
            )
    made = clone.commit(bump, data, before)
    done = f"{bump.branch} is one commit on top of HEAD. Next: git switch {bump.branch}"
    state: State = "opened" if before is None else "renewed"
    return Outcome(subject=bump.subject, state=state, sentence=done, commit=made)


def _of(bump: Bump, state: State, sentence: str) -> Outcome:
    return Outcome(subject=bump.subject, state=state, sentence=sentence)


class _Clone:
    """The clone that we stand in, as git knows it."""

    def __init__(self, at: Layout) -> None:
        self.root = at.root
        self.git = trees.Git(at.root)
        self.head = self.git.commit("HEAD")

    def is_right(self, commit: str, bump: Bump, seen: Mapping[Place, Value]) -> bool:
        """Tell whether a branch proposes this change of the lines as HEAD has them."""
        fork = self.git.fork_point(commit, self.head)
        return (
            fork is not None
            and fork != commit
            and self._pins(commit, bump) == dict(bump.edits)
            and self._pins(fork, bump) == dict(seen)
        )

    def _pins(self, commit: str, bump: Bump) -> dict[Place, Any] | None:
        data = self.git.show(commit, PARAMS)
        try:
            return pin_lines.values(data, bump.edits) if data is not None else None
        except ParamsError:
            return None

    def foreign(self, commit: str, bump: Bump) -> str | None:
        """Say which commit of a branch is none of ours; None if all are."""
        for one in self._words("rev-list", f"{self.head}..{commit}"):
            told = self._told("show", "-s", "--format=%B", one).decode(errors="replace")
            records = bump_change.is_ours(told) and not bump_change.is_bump(told)
            if not records and not (bump_change.is_bump(told) and self._is_made_here(one, bump)):
                return f"{one[:12]} is a commit of yours."
        return None

    def _is_made_here(self, commit: str, bump: Bump) -> bool:
        """Tell whether a commit is what we make of the one before, and was not amended since."""
        touched = self._words("diff-tree", "--no-commit-id", "--name-only", "-r", "-m", commit)
        if [name.rpartition("/")[2] for name in touched] != [PARAMS]:
            return False
        before, after = self.git.show(f"{commit}^", PARAMS), self.git.show(commit, PARAMS)
        if before is None or after is None:
            return False
        try:
            return pin_lines.changed(before, pin_lines.values(after, bump.edits)) == after
        except ParamsError:
            return False

    def checked_out(self, branch: str) -> str | None:
        """Return where a branch is checked out; None if it is nowhere."""
        place = ""
        for line in self._told("worktree", "list", "--porcelain").decode().splitlines():
            if line.startswith("worktree "):
                place = line.removeprefix("worktree ")
            if line == f"branch refs/heads/{branch}":
                return console.clean(place)
        return None

    def commit(self, bump: Bump, data: bytes, before: str | None) -> str:
        """Write objects and set the branch, if it still is where it was."""
        text = pin_lines.changed(data, bump.edits)
        blob = self._word("hash-object", "-w", "--stdin", told=text)
        mode, path = self._entry()
        with tempfile.TemporaryDirectory(prefix="fleet-index-") as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            self._told("read-tree", self.head, env=index)
            self._told("update-index", "--cacheinfo", f"{mode},{blob},{path}", env=index)
            tree = self._word("write-tree", env=index)
        try:
            made = self._word(
                "commit-tree", tree, "-p", self.head, "-F", "-", told=bump.message.encode()
            )
        except ToolError as error:
            raise MachineError(
                f"git does not commit: {error.message}",
                hint="git config user.name NAME; git config user.email ADDRESS",
            ) from error
        try:
            self._told(
                *("update-ref", "-m", "fleet bump", f"refs/heads/{bump.branch}", made),
                before or _NONE,
            )
        except ToolError as error:
            raise MachineError(
                f"{bump.branch} could not be set: {error.message}",
                hint="Run the same command again.",
            ) from error
        return made

    def _entry(self) -> tuple[str, str]:
        """Return the mode of params.yaml and its path below the top of the repository."""
        told = self._told("ls-tree", "--full-name", "-z", self.head, "--", PARAMS).decode()
        facts, _, path = told.rstrip("\0").partition("\t")
        return facts.split()[0], path

    def _words(self, *argv: str) -> list[str]:
        return self._told(*argv).decode(errors="replace").split()

    def _word(self, *argv: str, told: bytes = b"", env: Mapping[str, str] | None = None) -> str:
        return self._told(*argv, told=told, env=env).decode().strip()

    def _told(self, *argv: str, told: bytes = b"", env: Mapping[str, str] | None = None) -> bytes:
        return proc.answer(
            ["git", *argv],
            told=told,
            cwd=self.root,
            env={"LC_ALL": "C", **(env or {})},
            within_s=_WITHIN_S,
        )
