"""A bare repository behind GitHub's Git data API: real objects, real branches."""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


class GitError(Exception):
    """git refused; its own words."""


@dataclass(frozen=True)
class BareRepository:
    """A repository without a work tree at `path`."""

    path: Path

    def git(self, *arguments: str, data: bytes | None = None, **environment: str) -> bytes:
        """Run git; return what it prints."""
        done = subprocess.run(
            ["git", f"--git-dir={self.path}", *arguments],
            input=data,
            capture_output=True,
            check=False,
            env={
                **os.environ,
                "GIT_AUTHOR_NAME": "github-actions[bot]",
                "GIT_AUTHOR_EMAIL": "github-actions@example.invalid",
                "GIT_COMMITTER_NAME": "GitHub",
                "GIT_COMMITTER_EMAIL": "noreply@example.invalid",
                **environment,
            },
        )
        if done.returncode:
            raise GitError(done.stderr.decode(errors="replace").strip())
        return done.stdout

    def text(self, *arguments: str) -> str:
        """Run git; return the line it prints."""
        return self.git(*arguments).decode().strip()

    @classmethod
    def create(cls, path: Path) -> BareRepository:
        """Make an empty one."""
        subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(path)], check=True)
        return cls(path)

    def merges(self, base: str, head: str) -> bool | None:
        """Tell whether two commits merge without a conflict; None where that is not known."""
        told = subprocess.run(
            ["git", "-C", str(self.path), "merge-tree", "--write-tree", base, head],
            capture_output=True, check=False,
        )  # fmt: skip
        return {0: True, 1: False}.get(told.returncode)

    # --- branches

    def head(self, branch: str) -> str | None:
        """Return the commit of a branch; None if there is none."""
        return self.resolve(f"refs/heads/{branch}")

    def resolve(self, name: str) -> str | None:
        """Return the object that a name means; None if it means none."""
        try:
            return self.text("rev-parse", "--verify", "--quiet", name)
        except GitError:
            return None

    def commit(
        self,
        branch: str,
        files: dict[str, str | bytes | None],
        message: str = "change",
        *,
        author: str | None = None,
    ) -> str:
        """Change files of a branch as a person does who pushes; make the branch if need be."""
        parent = self.head(branch)
        entries = {
            path: None
            if content is None
            else self.blob(content.encode() if isinstance(content, str) else content)
            for path, content in files.items()
        }
        tree = self.tree(f"{parent}^{{tree}}" if parent else None, entries)
        made = self.commit_tree(
            tree, [parent] if parent else [], message, author=author, committer=author
        )
        self.git("update-ref", f"refs/heads/{branch}", made)
        return made

    def files(self, revision: str) -> dict[str, bytes]:
        """Return every file of a revision."""
        names = self.git("ls-tree", "-r", "-z", "--name-only", revision).decode().split("\0")
        return {name: self.git("cat-file", "blob", f"{revision}:{name}") for name in names if name}

    # --- objects

    def blob(self, data: bytes) -> str:
        """Store content; return its name."""
        return self.git("hash-object", "-w", "--stdin", data=data).decode().strip()

    def blobs(self, contents: list[bytes]) -> list[str]:
        """Store contents; return their names. One program for all of them."""
        stream = b"".join(
            b"blob\nmark :%d\ndata %d\n%b\n" % (at, len(each), each)
            for at, each in enumerate(contents, 1)
        )
        with tempfile.NamedTemporaryFile() as marks:
            self.git("fast-import", "--quiet", f"--export-marks={marks.name}", data=stream)
            lines = Path(marks.name).read_text(encoding="ascii").splitlines()
        names = dict(line.split() for line in lines)
        return [names[f":{at}"] for at in range(1, len(contents) + 1)]

    def tree(self, base: str | None, entries: dict[str, str | None]) -> str:
        """Return a tree with other blobs; None removes a path, which has to be there."""
        with tempfile.TemporaryDirectory() as folder:
            index = str(Path(folder) / "index")
            if base:
                self.git("read-tree", base, GIT_INDEX_FILE=index)
            listed = self.git("ls-files", "-z", GIT_INDEX_FILE=index).decode()
            there = set(listed.split("\0"))
            lines = []
            for path, blob in entries.items():
                if blob is None and path not in there:
                    raise GitError("GitRPC::BadObjectState")
                lines.append(f"100644 {blob}\t{path}" if blob else f"0 {'0' * 40}\t{path}")
            data = "".join(f"{line}\0" for line in lines).encode()
            self.git("update-index", "-z", "--index-info", data=data, GIT_INDEX_FILE=index)
            return self.git("write-tree", GIT_INDEX_FILE=index).decode().strip()

    def commit_tree(
        self,
        tree: str,
        parents: list[str],
        message: str,
        *,
        author: str | None = None,
        committer: str | None = None,
    ) -> str:
        """Store a commit; return its name. By default GitHub made it for the token of a job."""
        arguments = [part for parent in parents for part in ("-p", parent)]
        who = {"GIT_AUTHOR_NAME": author, "GIT_COMMITTER_NAME": committer}
        told = {name: value for name, value in who.items() if value}
        made = self.git("commit-tree", tree, *arguments, data=message.encode(), **told)
        return made.decode().strip()

    def is_forward(self, before: str, after: str) -> bool:
        """Tell whether one commit is an ancestor of another."""
        try:
            self.git("merge-base", "--is-ancestor", before, after)
        except GitError:
            return False
        return True
