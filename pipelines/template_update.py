"""
Brings a release of the template into a fork: as one merge commit, whole or not at all.

The commit is made without touching a file. Then its branch is moved to it, if it still is where it
was, and last the files are written. Whoever is killed before that has changed nothing. Whoever is
killed while files are written has the new version on the branch and some old files: as there was
nothing in the work tree that no commit has, `git reset --hard` writes the rest, without a line of
this code, which may be half old and half new at that moment. So does the same command again.

Operator's paths take no part in the merge: neither side shows git any, so no rename that git
guesses can reach them, and the result has them as they are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import atomic, console, wording
from pipelines.errors import GateError, MachineError, ParamsError, RetryLaterError, ToolError
from pipelines.template_git import Entry, no_object, strip
from pipelines.template_releases import owned_by, shown

if TYPE_CHECKING:
    from pipelines.template_git import Conflict, Entries, Merged, Objects
    from pipelines.template_releases import Base, Release

# The merge commit, while its files are written.
_MOVING: Final = "refs/fleet/template/moving"
_UNDER_WAY: Final = {
    "MERGE_HEAD": "git merge --abort",
    "CHERRY_PICK_HEAD": "git cherry-pick --abort",
    "REVERT_HEAD": "git revert --abort",
    "rebase-merge": "git rebase --abort",
    "rebase-apply": "git rebase --abort",
}
FINISH: Final = "git reset --hard"
_CONFLICTS_SHOWN: Final = 20
_LINK: Final = "120000"
_SUBMODULE: Final = "160000"


@dataclass(frozen=True, kw_only=True)
class Update:
    """
    What a merge of a release would be; nothing of the checkout has changed yet.

    Attributes:
        head: Commit that is checked out.
        base: What the fork has of the template.
        target: What it would have.
        merged: The template's files after it, without the operator's.
        tree: All files after it.
        before: All files now.
        after: Those of `tree`.
        local: The template's files that this fork has changed or removed.
    """

    head: str
    base: Base
    target: Release
    merged: Merged
    tree: str
    before: Entries
    after: Entries
    local: tuple[str, ...]

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        """Files that git cannot merge."""
        return self.merged.conflicts

    @property
    def changed(self) -> tuple[str, ...]:
        """Paths that it would write or remove, sorted."""
        paths = {*self.before, *self.after}
        return tuple(sorted(p for p in paths if self.before.get(p) != self.after.get(p)))


def prepare(objects: Objects, head: str, base: Base, target: Release) -> Update:
    """
    Merge a release into a commit, as objects alone.

    Raises:
        MachineError: git is too old for it.
        ToolError: git fails.
    """
    owned = {*owned_by(objects, head), *owned_by(objects, base.rev), *target.owned}
    before = objects.entries(head)
    ours = strip(before, owned)
    from_template = strip(objects.entries(base.rev), owned)
    merged = objects.merge(
        objects.stripped(base.rev, owned),
        objects.stripped(head, owned),
        objects.stripped(target.template, owned),
    )
    kept = {path: entry for path, entry in before.items() if path not in ours}
    after = {**objects.entries(merged.tree), **kept}
    return Update(
        head=head,
        base=base,
        target=target,
        merged=merged,
        tree=objects.tree(after),
        before=before,
        after=after,
        local=tuple(sorted(p for p, entry in from_template.items() if ours.get(p) != entry)),
    )


def message_of(update: Update) -> str:
    """Return the words of the merge commit."""
    return (
        f"Take {update.target.name} of the template\n\n"
        f"It was {shown(update.base.version)}. Nothing of params.yaml, dvc.lock, modelfiles/, "
        "corpora/\nand results/ is in it.\n\n"
        f"Template-Version: {update.target.name}\n"
    )


# --- before -----------------------------------------------------------------------------------


def require_branch(objects: Objects) -> str:
    """
    Return the branch that is checked out, as refs/heads/NAME.

    Raises:
        ParamsError: None is.
    """
    branch = objects.maybe("symbolic-ref", "--quiet", "HEAD")
    if branch is None or not branch.startswith("refs/heads/"):
        raise ParamsError(
            "no branch is checked out: a merge here would be on none, and soon lost.",
            hint="git switch BRANCH, or git switch --create template-update",
        )
    return branch


def require_clean(objects: Objects) -> None:
    """
    See that every tracked file is that of the commit, and that nothing is under way.

    Raises:
        ParamsError: It is not; names files, or what is under way.
    """
    asked = [word for name in _UNDER_WAY for word in ("--git-path", name)]
    places = objects.word("rev-parse", *asked).split("\n")
    for place, (name, abort) in zip(places, _UNDER_WAY.items(), strict=True):
        if (objects.root / place).exists():
            raise ParamsError(
                f"git is in the middle of something ({name}): nothing was changed.",
                hint=f"Finish it, or: {abort}",
            )
    told = objects.told("status", "--porcelain", "-z", "--untracked-files=no")
    # Of a rename the old name follows in a word of its own; it has no state before it.
    words = [os.fsdecode(word) for word in told.split(b"\0")]
    dirty = [word[3:] for word in words if word[2:3] == " "]
    if dirty:
        raise ParamsError(
            f"the work tree is not what the commit says: {wording.first_few(dirty)}. Nothing was "
            "changed.",
            hint="Commit it, or put it aside: git stash",
        )


def require_room(objects: Objects, update: Update) -> None:
    """
    See that nothing is overwritten that no commit has.

    That is what lies where a new file has to go, and a changed file that git was told to pass over.

    Raises:
        ParamsError: There is such a file; nothing was changed.
    """
    found = [
        path
        for path in update.changed
        if path in update.after
        and path not in update.before
        and (_is_taken(objects, update, path) or _is_below_another(objects, update, path))
    ]
    if found:
        raise ParamsError(
            f"files that git does not know are in the way of new ones: {wording.first_few(found)}. "
            "Nothing was changed.",
            hint="Move them elsewhere, or commit them.",
        )
    if hidden := _passed_over(objects, update):
        raise ParamsError(
            "git was told not to look at files that change, and what is in them cannot be told: "
            f"{wording.first_few(hidden)}. Nothing was changed.",
            hint="git update-index --no-assume-unchanged FILE; git update-index --no-skip-worktree "
            "FILE; then commit what is in it, or git restore FILE",
        )


def _passed_over(objects: Objects, update: Update) -> list[str]:
    """
    Return files that would be written and that `git status` says nothing of.

    Neither would `git reset` write them, and the branch would have the new version without them.
    """
    told = objects.told("ls-files", "-v", "-z").split(b"\0")
    # A small letter: assume-unchanged; S: skip-worktree (git-ls-files(1), -v and -t).
    flagged = {os.fsdecode(one[2:]) for one in told if one[:1].islower() or one[:1] == b"S"}
    return [
        path
        for path in update.changed
        # One that a sparse checkout has left out is nobody's work.
        if path in flagged and os.path.lexists(objects.root / path)
    ]


def _is_below_another(objects: Objects, update: Update, path: str) -> bool:
    """Tell whether something else than a folder lies where a folder of a new file has to be."""
    parts = path.split("/")
    above = ["/".join(parts[:count]) for count in range(1, len(parts))]
    return any(
        each not in update.before
        and os.path.lexists(objects.root / each)
        # git would put a folder in place of a link.
        and ((objects.root / each).is_symlink() or not (objects.root / each).is_dir())
        for each in above
    )


def _is_taken(objects: Objects, update: Update, path: str) -> bool:
    """Tell whether something else lies there than what would be written."""
    place = objects.root / path
    if not os.path.lexists(place):
        return False
    if place.is_dir() and not place.is_symlink():
        return any(
            (Path(folder) / name).relative_to(objects.root).as_posix() not in update.before
            for folder, folders, names in os.walk(place)
            for name in (*names, *(one for one in folders if (Path(folder) / one).is_symlink()))
        )
    return _content(place) != objects.told("cat-file", "blob", update.after[path].blob)


def _content(place: Path) -> bytes | None:
    """Return what a file or link holds; None if it is not there."""
    try:
        return os.fsencode(place.readlink()) if place.is_symlink() else place.read_bytes()
    except OSError:
        return None


def _inside(objects: Objects, name: str) -> Path:
    """Return the path of a file of git's own."""
    return objects.root / objects.word("rev-parse", "--git-path", name)


# --- what a kill left -------------------------------------------------------------------------


def finish(objects: Objects) -> bool:
    """
    Write the files of an update that was stopped while it wrote them.

    Returns:
        Whether there was one.

    Raises:
        MachineError: A file was edited since, or git still holds the index.
    """
    meant = objects.maybe("rev-parse", "--verify", "--quiet", _MOVING)
    if meant is None:
        return False
    head = objects.head
    if head != meant:
        # Killed before the branch was moved, or somebody has gone on since.
        objects.told("update-ref", "-d", _MOVING)
        return False
    told = objects.told("diff", "--name-only", "-z", "--no-renames", "HEAD")
    paths = [os.fsdecode(path) for path in told.split(b"\0") if path]
    before, after = objects.entries(objects.word("rev-parse", f"{head}^1")), objects.entries(head)
    edited = [path for path in paths if not _is_between(objects, path, before, after)]
    if edited or _inside(objects, "index.lock").exists():
        what = wording.first_few(edited) or "the lock of the index"
        raise MachineError(
            f"an update was stopped while it wrote files, and {what} is neither old nor new.",
            hint=f"If nothing of it is worth keeping: "
            f"rm -f {_inside(objects, 'index.lock')}; {FINISH}",
        )
    _write(objects, head)
    return bool(paths)


def _is_between(objects: Objects, path: str, before: Entries, after: Entries) -> bool:
    """Tell whether a file is as it was, gone, or the beginning of what it has to be."""
    here = _content(objects.root / path)
    if here is None:
        return True
    sides = [
        objects.told("cat-file", "blob", entry.blob)
        for entries in (before, after)
        if (entry := entries.get(path)) is not None and entry.mode != _SUBMODULE
    ]
    return here in sides or (path in after and bool(sides) and sides[-1].startswith(here))


def _write(objects: Objects, commit: str) -> None:
    """Make work tree and index those of the commit that the branch is at."""
    try:
        objects.told("reset", "--hard", "--quiet", "--no-recurse-submodules", commit)
    except ToolError as error:
        raise MachineError(
            f"the branch has the new version, and its files cannot be written: {error.message}",
            hint=f"{FINISH}   when that is solved",
        ) from error
    objects.told("update-ref", "-d", _MOVING)


# --- the merge --------------------------------------------------------------------------------


def apply(objects: Objects, update: Update) -> str:
    """
    Bring an update that has no conflict onto the branch and into the work tree.

    Returns:
        The merge commit.

    Raises:
        GateError: Files conflict. Nothing was changed.
        ParamsError: No branch is checked out, files are not committed, or files are in the way.
        RetryLaterError: The branch was moved in this very moment.
        MachineError: git does not commit, or cannot write files.
    """
    branch = require_branch(objects)
    require_clean(objects)
    if update.conflicts:
        raise conflict_error(update)
    require_room(objects, update)
    made = objects.commit(update.tree, message_of(update), update.head, update.target.template)
    # Whoever signs may have been asked for a passphrase, and has worked on meanwhile.
    _require_same(objects, branch)
    require_clean(objects)
    require_room(objects, update)
    console.info(
        f"{branch.removeprefix('refs/heads/')} moves to {made[:12]}. If this is stopped from now "
        f"on: {FINISH}"
    )
    objects.told("update-ref", _MOVING, made)
    try:
        words = ("-m", "fleet template update", branch, made, update.head)
        objects.told("update-ref", *words)
    except ToolError as error:
        objects.told("update-ref", "-d", _MOVING)
        raise RetryLaterError(
            f"the branch was moved in this very moment: {error.message}",
            hint="Run the same command again.",
        ) from error
    _write(objects, made)
    return made


def _require_same(objects: Objects, branch: str) -> None:
    """
    See that a branch is still the one that is checked out: its files are about to be written.

    Raises:
        RetryLaterError: Another one is.
    """
    if objects.maybe("symbolic-ref", "--quiet", "HEAD") != branch:
        raise RetryLaterError(
            "another branch was checked out in this very moment. Nothing was changed.",
            hint="Run the same command again, on the branch that takes it.",
        )


def conflict_error(update: Update) -> GateError:
    """Say which files conflict, and what can be done."""
    return GateError(
        f"{update.target.name} of the template and this fork have changed the same "
        f"lines. Nothing was changed here.\n" + "\n".join(conflict_lines(update)),
        hint="Take back what this fork need not have changed (git checkout "
        f"{update.base.rev[:12]} -- FILE; git commit), or resolve by hand: "
        "fleet template update --leave-conflicts",
    )


def conflict_lines(update: Update) -> list[str]:
    """Return a line for each file that conflicts."""
    shown_ones = update.conflicts[:_CONFLICTS_SHOWN]
    lines = [f"  {console.clean(each.path)}  ({console.clean(each.kind)})" for each in shown_ones]
    more = len(update.conflicts) - len(shown_ones)
    return [*lines, *([f"  and {more:,} more"] if more else [])]


def leave(objects: Objects, update: Update) -> None:
    """
    Leave a merge with its conflicts in the work tree, as `git merge` does.

    The index refuses a commit until each file is resolved; `git merge --abort` takes all back.

    Raises:
        ParamsError: No branch is checked out, files are not committed, or files are in the way.
        MachineError: git cannot write files.
    """
    require_branch(objects)
    require_clean(objects)
    require_room(objects, update)
    after = dict(update.after)
    for path in {each.path for each in update.conflicts} & after.keys():
        after[path] = _named(objects, after[path], update)
    console.info(f"If this is stopped from now on: {FINISH}")
    try:
        objects.told("read-tree", "-m", "-u", update.head, objects.tree(after))
        removed = dict.fromkeys(line.partition("\t")[2] for line in update.merged.stages)
        lines = [f"0 {no_object(update.head)} 0\t{path}" for path in removed] + list(
            update.merged.stages
        )
        data = os.fsencode("".join(f"{line}\0" for line in lines))
        objects.told("update-index", "-z", "--index-info", data=data)
        atomic.write_text(_inside(objects, "MERGE_MSG"), message_of(update))
        objects.told("update-ref", "MERGE_HEAD", update.target.template)
    except ToolError as error:
        raise MachineError(
            f"the merge could not be left here: {error.message}", hint=FINISH
        ) from error


def _named(objects: Objects, entry: Entry, update: Update) -> Entry:
    """Write the names of the sides into git's marks."""
    if entry.mode == _LINK:
        return entry
    data = objects.told("cat-file", "blob", entry.blob)
    ours, theirs = (label.encode() for label in update.merged.labels)
    data = data.replace(b"<<<<<<< " + ours, b"<<<<<<< this fork")
    data = data.replace(b">>>>>>> " + theirs, b">>>>>>> template " + update.target.name.encode())
    return Entry(entry.mode, objects.word("hash-object", "-w", "--stdin", data=data))
