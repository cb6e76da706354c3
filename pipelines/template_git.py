"""
Trees and commits that are made without a work tree: what `fleet template` is built of.

Nothing here touches a file, the index or a branch of the checkout; objects are added, which git
forgets by itself if nothing comes to name them. Files are merged by git (`merge-tree`, 2.38 or
newer), with a base that we name instead of the one that git would find in the history.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from pipelines import console, proc, trees
from pipelines.errors import MachineError, ToolError
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

WITHIN_S: Final = 120.0
_MERGES_TREES: Final = (2, 38)
_ENVIRONMENT: Final = {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}
# Commits that are made for one merge and that nothing names afterwards.
_NOBODY: Final = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "fleet"), ("EMAIL", "fleet@localhost"), ("DATE", "@0 +0000"))
}
# Of a commit's headers, what tells who made it and when; signatures are of other bytes.
_KEPT_HEADERS: Final = (b"author ", b"committer ", b"encoding ")


class Entry(NamedTuple):
    """A file of a tree: its mode as git writes it, and git's name of its content."""

    mode: str
    blob: str


# By path below the top; bytes that are no UTF-8 as `os.fsdecode` has them.
Entries = dict[str, Entry]


class Conflict(NamedTuple):
    """A file that git cannot merge: path, and what is wrong, as `content` or `modify/delete`."""

    path: str
    kind: str


class Merged(NamedTuple):
    """
    What a merge would be.

    Attributes:
        tree: With git's marks in files that conflict.
        conflicts: Those, each once, in the order of their paths.
        stages: `MODE BLOB STAGE<tab>PATH` of each side of them, as the index takes it.
        labels: How git's marks name our side and the other one.
    """

    tree: str
    conflicts: tuple[Conflict, ...] = ()
    stages: tuple[str, ...] = ()
    labels: tuple[str, str] = ("", "")


class Objects:
    """
    The repository of a checkout, seen as git's objects.

    Attributes:
        head: Commit that was checked out when somebody looked; empty before.
    """

    head = ""

    def __init__(self, root: Path) -> None:
        """Take the root of a checkout."""
        self.root = root
        self.git = trees.Git(root)
        self._entries: dict[str, Entries] = {}
        self._objects: dict[str, bytes | None] = {}

    def told(
        self,
        *argv: str,
        data: bytes = b"",
        env: Mapping[str, str] | None = None,
        within_s: float = WITHIN_S,
    ) -> bytes:
        """Return what git prints. Raises: ToolError if it fails, or takes longer than that."""
        return proc.answer(
            ["git", *argv],
            told=data,
            cwd=self.root,
            env={**_ENVIRONMENT, **(env or {})},
            within_s=within_s,
        )

    def word(self, *argv: str, data: bytes = b"", env: Mapping[str, str] | None = None) -> str:
        """Return the one word that git prints."""
        return os.fsdecode(self.told(*argv, data=data, env=env)).strip()

    def maybe(self, *argv: str) -> str | None:
        """Return the one word that git prints; None if git says no."""
        try:
            return self.word(*argv) or None
        except ToolError:
            return None

    # --- trees

    def entries(self, tree: str) -> Entries:
        """Return every file of a commit or tree, by git's name of it."""
        if tree in self._entries:
            return self._entries[tree]
        found: Entries = {}
        for line in filter(
            None, self.told("ls-tree", "-r", "-z", "--full-tree", tree).split(b"\0")
        ):
            facts, _, path = line.partition(b"\t")
            mode, _, blob = facts.decode().split()
            found[os.fsdecode(path)] = Entry(mode, blob)
        self._entries[tree] = found
        return found

    def stripped(self, rev: str, owned: Iterable[str]) -> str:
        """Return the tree of a commit without some paths, as `strip` leaves them out."""
        entries = self.entries(rev)
        left = strip(entries, owned)
        return f"{rev}^{{tree}}" if len(left) == len(entries) else self.tree(left)

    def tree(self, entries: Mapping[str, Entry]) -> str:
        """
        Store a tree.

        Raises:
            ToolError: A path is a file and a folder at once.
        """
        above = {path[:at] for path in entries for at, char in enumerate(path) if char == "/"}
        if both := sorted(above & entries.keys()):
            raise ToolError(
                f"git cannot store {console.clean(both[0])}: it is a file on one side, and a "
                "folder on the other one.",
                hint="Give yours another name (git mv), commit, and run the same command again.",
            )
        lines = (f"{entry.mode} {entry.blob}\t{path}\0" for path, entry in entries.items())
        with tempfile.TemporaryDirectory(prefix="fleet-index-") as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            data = os.fsencode("".join(lines))
            self.told("update-index", "-z", "--index-info", data=data, env=index)
            return self.word("write-tree", env=index)

    def file(self, rev: str, path: str) -> bytes | None:
        """Return a file of a commit or tree, by git's name of it; None if it has none."""
        self.read_ahead([rev], path)
        return self._objects[f"{rev}:{path}"]

    def read_ahead(self, commits: Iterable[str], *paths: str) -> None:
        """Read commits, and files of each of them, in one go."""
        names = [name for one in commits for name in (one, *(f"{one}:{path}" for path in paths))]
        wanted = [name for name in dict.fromkeys(names) if name not in self._objects]
        if not wanted:
            return
        told = self.told("cat-file", "--batch", data="".join(f"{one}\n" for one in wanted).encode())
        at = 0
        for name in wanted:
            end = told.index(b"\n", at)
            # "NAME KIND SIZE", its bytes and a line end; or "WHAT-WAS-ASKED missing".
            kind, size_bytes = [*told[at:end].split(), b"0"][1:3]
            at = end + 1
            self._objects[name] = None
            if kind != b"missing":
                self._objects[name] = told[at : at + int(size_bytes)]
                at += int(size_bytes) + 1

    # --- commits

    def commit_like(self, commit: str, tree: str, parent: str | None) -> str:
        """
        Store a commit of another tree with author, times and words of a commit.

        Its id depends on nothing but these: it is the same wherever it is made.
        """
        self.read_ahead([commit])
        headers, _, message = (self._objects[commit] or b"").partition(b"\n\n")
        kept = [line for line in headers.split(b"\n") if line.startswith(_KEPT_HEADERS)]
        parents = [f"parent {parent}".encode()] if parent else []
        data = b"\n".join([f"tree {tree}".encode(), *parents, *kept, b"", message])
        return self.word("hash-object", "-t", "commit", "-w", "--stdin", data=data)

    def commit(self, tree: str, message: str, *parents: str) -> str:
        """
        Store a commit by whoever git says that we are; signed, if that is how commits are made.

        Raises:
            MachineError: git does not know who commits, or cannot sign.
        """
        named = [word for parent in parents for word in ("-p", parent)]
        signs = self.maybe("config", "--type=bool", "commit.gpgSign") == "true"
        try:
            return self.word(
                *("commit-tree", tree, *named, *(["-S"] if signs else []), "-F", "-"),
                data=message.encode(),
            )
        except ToolError as error:
            raise MachineError(
                f"git does not commit: {error.message}",
                hint="commit.gpgSign is true: let git sign, or git config commit.gpgSign false"
                if signs
                else "git config user.name NAME; git config user.email ADDRESS",
            ) from error

    def has(self, commit: str, ancestor: str) -> bool:
        """Tell whether a commit is another one or comes after it."""
        try:
            self.told("merge-base", "--is-ancestor", ancestor, commit)
        except ToolError:
            return False
        return True

    # --- merging

    def merge(self, base: str, ours: str, theirs: str) -> Merged:
        """
        Merge trees.

        Args:
            base: Tree that both come from.
            ours: Tree of this side.
            theirs: Tree of the other side.

        Raises:
            ToolError: git fails, or says something else than it is known to say.
            MachineError: git is too old for it.
        """
        fork = self._nameless(base)
        sides = self._nameless(ours, fork), self._nameless(theirs, fork)
        try:
            done = proc.run(
                ["git", "merge-tree", "--write-tree", "--messages", "-z", *sides],
                cwd=self.root,
                log=Layout(self.root).log("template", "merge"),
                env=_ENVIRONMENT,
                ok_codes=(0, 1),
                timeout_s=WITHIN_S,
            )
        except ToolError:
            self._require_merges()
            raise
        if done.code == 0:
            return Merged(done.stdout.partition("\0")[0].strip())
        return _read_conflicts(done.stdout)._replace(labels=sides)

    def _require_merges(self) -> None:
        """
        See that git merges trees.

        Raises:
            MachineError: It is older.
        """
        told = self.word("version")
        found = re.search(r"(\d+)\.(\d+)", told)
        if found is None or (int(found[1]), int(found[2])) < _MERGES_TREES:
            raise MachineError(
                f"{console.clean(told)} cannot say beforehand what conflicts: 2.38 can.",
                hint="Take a newer git, or merge by hand: docs/template.md, `With git alone`.",
            )

    def _nameless(self, tree: str, *parents: str) -> str:
        named = [word for parent in parents for word in ("-p", parent)]
        return self.word("commit-tree", tree, *named, "-m", "fleet template", env=_NOBODY)


def _read_conflicts(told: str) -> Merged:
    """
    Read what `git merge-tree --write-tree -z` prints where files conflict.

    The tree, the sides of files that conflict, an empty word, then messages: the number of their
    paths, the paths, a kind, a sentence (git-merge-tree(1), "OUTPUT").
    """
    tree, *words = told.split("\0")
    end = words.index("") if "" in words else len(words)
    stages = words[:end]
    kinds: dict[str, str] = {}
    rest = words[end + 1 :]
    while len(rest) > 1 and rest[0].isdigit():
        count = int(rest[0])
        paths, kind = rest[1 : 1 + count], rest[1 + count]
        rest = rest[3 + count :]
        if kind.startswith("CONFLICT"):
            for path in paths[:1]:
                kinds.setdefault(path, kind.removeprefix("CONFLICT").strip(" ()"))
    paths_found = dict.fromkeys(line.partition("\t")[2] for line in stages)
    conflicts = {**dict.fromkeys(paths_found, "content"), **kinds}
    if not conflicts or not re.fullmatch("[0-9a-f]{40,64}", tree):
        raise ToolError(
            "git merge-tree says that files conflict, and not which.",
            hint="Merge by hand: docs/template.md, `With git alone`.",
        )
    found = tuple(Conflict(path, conflicts[path]) for path in sorted(conflicts))
    return Merged(tree, found, tuple(stages))


def no_object(name: str) -> str:
    """Return the name that git has for nothing, as long as a name of an object."""
    return "0" * len(name)


def strip(entries: Entries, owned: Iterable[str]) -> Entries:
    """Return the files that are not at or below paths: files, and folders with their slash."""
    files = frozenset(owned)
    folders = tuple(path for path in files if path.endswith("/"))
    return {
        path: entry
        for path, entry in entries.items()
        if path not in files and not path.startswith(folders)
    }
