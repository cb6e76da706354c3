"""
What the operator's files were at a commit, or would be: read from git into a folder of their own.

The files are params.yaml, dvc.lock and results/: what a fleet is and what is known of it. Every
reader of a checkout then reads a commit as well. The bytes are git's own, so that their md5 is that
of the lock: no attribute of a branch and no filter of this machine changes them.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from pipelines import console, proc
from pipelines.errors import FleetError, MachineError, ParamsError, ToolError
from pipelines.layout import Layout
from pipelines.wording import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

LOCK: Final = "dvc.lock"
DECLARATION: Final = "params.yaml"
RESULTS: Final = "results"
# What an operator owns, of what is in git and of interest here.
OWNED: Final = (DECLARATION, LOCK, RESULTS)

_NO_REPOSITORY: Final = 128
_DEFAULT_BRANCHES: Final = ("origin/HEAD", "origin/main", "origin/master", "main", "master")
# Records have some kilobytes, a lock of a hundred quants a few hundred.
_LARGEST_FILE_BYTES: Final = 16 << 20
_LARGEST_TREE_BYTES: Final = 256 << 20
_WITHIN_S: Final = 120.0


class Git:
    """What git holds of a checkout."""

    def __init__(self, root: Path) -> None:
        """Take the root of a checkout; it may be a folder of a larger repository."""
        self.root = root

    def commit(self, rev: str) -> str:
        """
        Turn a name into a commit.

        Raises:
            ParamsError: git knows none of that name; says whether the clone is too shallow.
            MachineError: This is no repository, or git refuses to read it.
        """
        found = self.parse(rev)
        if found is None:
            raise ParamsError(
                f"git knows no commit {quoted(console.clean(rev))}.",
                hint=self.deeper() if self.is_shallow() else "`git log --oneline` lists them.",
            )
        return found

    def parse(self, rev: str) -> str | None:
        """
        Turn a name into a commit; None if there is none.

        Raises:
            MachineError: This is no repository, or git refuses to read it.
        """
        done = self._run(
            *("rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}"),
            ok_codes=(0, 1, _NO_REPOSITORY),
        )
        if done.code == _NO_REPOSITORY and "fatal:" in done.stderr and not self._is_repository():
            raise MachineError(
                f"git reads no repository here.\n{proc.tail(done)}".rstrip(),
                hint="Go to the root of your fleet; in a container, see `safe.directory` of git.",
            )
        return done.stdout.strip() or None if done.code == 0 else None

    def _is_repository(self) -> bool:
        return self._run("rev-parse", "--git-dir", ok_codes=(0, _NO_REPOSITORY)).code == 0

    def is_shallow(self) -> bool:
        """Tell whether older commits were left out of this clone."""
        return self._run("rev-parse", "--is-shallow-repository").stdout.strip() == "true"

    @staticmethod
    def deeper() -> str:
        """Say what brings the rest of a shallow clone."""
        if console.in_actions():
            return "This clone is shallow: give actions/checkout `fetch-depth: 0`."
        return "This clone is shallow: git fetch --unshallow (in a workflow: `fetch-depth: 0`)."

    def default_branch(self) -> str | None:
        """Return the commit that the default branch means, under its usual names; None: none is."""
        return next(filter(None, map(self.parse, _DEFAULT_BRANCHES)), None)

    def fork_point(self, head: str, *others: str) -> str | None:
        """
        Return the commit where `head` left the first of the others that there is.

        Args:
            head: A commit.
            others: Names of commits or branches; the default branch, under its usual names, if
                there are none.

        Returns:
            None if none of them is there, or if they have nothing in common.
        """
        for other in others or _DEFAULT_BRANCHES:
            if (commit := self.parse(other)) is not None:
                found = self._run("merge-base", head, commit, ok_codes=(0, 1)).stdout.strip()
                if found:
                    return found
        return None

    def files(self, commit: str, *paths: str) -> dict[str, str]:
        """
        Return the names that git has for the regular files at or below some paths.

        Args:
            commit: A commit.
            paths: Below the root; what is not there is left out.

        Raises:
            FleetError: A file, or all of them together, are larger than records can be.
        """
        told = self._answer("ls-tree", "-r", "-z", "--long", commit, "--", *paths)
        found: dict[str, str] = {}
        total = 0
        for entry in filter(None, told.split(b"\0")):
            facts, _, name = entry.partition(b"\t")
            mode, _, blob, size_bytes = facts.split()
            path = name.decode(errors="replace")
            # Neither links nor submodules: a link would be followed out of the folder.
            if not mode.startswith(b"100"):
                continue
            total += int(size_bytes)
            if int(size_bytes) > _LARGEST_FILE_BYTES or total > _LARGEST_TREE_BYTES:
                raise FleetError(
                    f"{console.clean(path)} of {commit[:12]} has {int(size_bytes):,} bytes, "
                    f"{total:,} with those before it: these are no records.",
                    hint="Take it out of the branch.",
                )
            found[path] = blob.decode()
        return found

    def blobs(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return the bytes of files by the names that git has for them."""
        wanted = list(dict.fromkeys(names))
        if not wanted:
            return {}
        told = self._answer("cat-file", "--batch", told="".join(f"{one}\n" for one in wanted))
        found: dict[str, bytes] = {}
        at = 0
        for name in wanted:
            # "<name> blob <size>\n<bytes>\n"
            end = told.index(b"\n", at)
            words = told[at:end].split()
            if words[1:2] != [b"blob"]:
                raise ToolError(
                    f"git lacks {name[:12]}, a file of a commit that it has.",
                    hint="The clone is damaged or partial: git fsck.",
                )
            size_bytes = int(words[2])
            found[name] = told[end + 1 : end + 1 + size_bytes]
            at = end + 1 + size_bytes + 1
        return found

    def show(self, commit: str, path: str) -> bytes | None:
        """Return a file of a commit by its path below the root; None if it has none."""
        names = self.files(commit, path)
        return self.blobs([names[path]])[names[path]] if path in names else None

    def differs(self, commit: str, *paths: str) -> bool:
        """Tell whether the working tree has other files at or below paths than a commit."""
        told = self._run("diff", "--quiet", commit, "--", *paths, ok_codes=(0, 1))
        new = self._run("ls-files", "--others", "--exclude-standard", "--", *paths)
        return told.code == 1 or bool(new.stdout.strip())

    def history(self, commit: str, path: str, most: int) -> list[tuple[str, bytes]]:
        """
        Return a file as it was written on a branch, the newest first, with the commit of each.

        Args:
            commit: The end of the branch; of a merge only its own side counts.
            path: Below the root.
            most: Commits to look at.
        """
        told = self._answer(
            "log", "--first-parent", f"--max-count={most}", "--format=%H", commit, "--", path
        )
        commits = told.decode().split()
        names = {one: self.files(one, path).get(path) for one in commits}
        found = self.blobs(name for name in names.values() if name)
        return [(one, found[name]) for one, name in names.items() if name]

    def _run(self, *argv: str, ok_codes: tuple[int, ...] = (0,)) -> proc.Completed:
        return proc.run(
            ["git", *argv],
            cwd=self.root,
            log=Layout(self.root).log("git", "fleet"),
            env={"LC_ALL": "C"},
            ok_codes=ok_codes,
        )

    def _answer(self, *argv: str, told: str = "") -> bytes:
        return proc.answer(
            ["git", *argv],
            told=told.encode(),
            cwd=self.root,
            env={"LC_ALL": "C"},
            within_s=_WITHIN_S,
        )


def at_revision(root: Path, rev: str, into: Path) -> Layout:
    """
    Write the operator's files of a commit into a folder.

    Args:
        root: The checkout.
        rev: A commit as git names it.
        into: Folder that is empty or not there.

    Returns:
        The paths below `into`; a file that the commit has not, is not there either.

    Raises:
        ParamsError: git knows no such commit.
        FleetError: Files are larger than records can be, or git cannot be read.
    """
    git = Git(root)
    names = git.files(git.commit(rev), *OWNED)
    # A commit can be made by hand, with names in it that lead anywhere.
    names = {path: blob for path, blob in names.items() if is_owned(path)}
    bytes_of = git.blobs(names.values())
    _write(into, {path: bytes_of[blob] for path, blob in names.items()})
    return Layout(into)


def at_working_tree(root: Path, into: Path) -> Layout:
    """Copy the operator's files as they lie in the checkout into a folder."""
    found: dict[str, bytes] = {}
    for name in OWNED:
        path = root / name
        for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if each.is_file() and not each.is_symlink():
                found[each.relative_to(root).as_posix()] = each.read_bytes()
    _write(into, found)
    return Layout(into)


def lay_over(layout: Layout, files: Mapping[str, str]) -> Layout:
    """
    Write texts over the files of a folder that `at_revision` or `at_working_tree` filled.

    Args:
        layout: That folder.
        files: Text by path: params.yaml, dvc.lock or something below results/.

    Returns:
        The same paths.

    Raises:
        FleetError: A path is not one of an operator's files, or a text is none; nothing is written.
    """
    found: dict[str, bytes] = {}
    for path, text in files.items():
        if not is_owned(path):
            raise FleetError(
                f"{quoted(console.clean(path))} is no file of {DECLARATION}, {LOCK} or {RESULTS}/."
            )
        try:
            found[path] = text.encode()
        except UnicodeEncodeError as error:
            raise FleetError(f"{console.clean(path)} holds no text: {error.reason}.") from error
    _write(layout.root, found)
    return layout


def is_owned(path: str) -> bool:
    """Tell whether a path is that of an operator's file, spelled in the one plain way."""
    parts = PurePosixPath(path).parts
    plain = "/".join(parts) == path and path.isprintable() and "\\" not in path
    inside = path in {DECLARATION, LOCK} or (len(parts) > 1 and parts[0] == RESULTS)
    return plain and inside and not any(part in {".", ".."} for part in parts)


def _write(into: Path, files: Mapping[str, bytes]) -> None:
    """Write files below a folder of our own, where nobody else reads before we are done."""
    into.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        target = into / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise FleetError(
                f"{quoted(path)} is a file in one place and a folder in another."
            ) from error
