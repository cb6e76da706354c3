"""What the stand-in keeps of a repository: files, commits, branches, tags, and who may read it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .server import Hub

# As the Hub does: what is large, and what .gitattributes of a new repository name.
LFS_FROM_BYTES: Final = 10_000_000
_LFS_NAMES: Final = (".safetensors", ".model", ".bin", ".pt", ".gguf", ".onnx")
POINTER_BYTES: Final = 134


def is_lfs(name: str, content: bytes = b"") -> bool:
    """Tell whether a file is kept in LFS; by its name, or by its size."""
    return name.endswith(_LFS_NAMES) or len(content) >= LFS_FROM_BYTES


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    name: str
    content: bytes

    @property
    def is_lfs(self) -> bool:
        """Whether git itself keeps only a pointer."""
        return is_lfs(self.name, self.content)

    @cached_property
    def sha256(self) -> str:
        """Name of the bytes in LFS."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git keeps of a file in LFS."""
        return (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {len(self.content)}\n"
        ).encode()

    @cached_property
    def blob_id(self) -> str:
        """Git's id of the content, or of the pointer."""
        kept = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()

    @property
    def etag(self) -> str:
        """How the Hub tags it: by sha256 if it is in LFS, by git's blob id if not."""
        return self.sha256 if self.is_lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """
    A commit with its whole tree.

    Attributes:
        at: When the Hub received it.
        authored_at: What its author claims.
    """

    id: str
    parent: str | None
    title: str
    at: datetime
    authored_at: datetime
    tree: Mapping[str, File]


@dataclass
class Repo:
    """
    A repository of models; its methods are what its owner does.

    Attributes:
        name: `owner/repo`, as it is called now.
        id: The Hub's own id, which a new repository of the same name does not have.
        private: Only INSIDER sees it.
        gated: Everybody sees it, only INSIDER reads its files.
        disabled: Nobody reads it.
    """

    hub: Hub
    name: str
    id: str
    private: bool = False
    gated: Literal["auto", "manual"] | None = None
    disabled: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        """The commit that main means."""
        return self.branches["main"]

    @property
    def owner(self) -> str:
        """The user or organisation."""
        return self.name.partition("/")[0]

    def find(self, revision: str) -> Commit | None:
        """Find a commit by branch, tag or id."""
        id_ = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(id_)

    def revision(self, id_: str) -> dict[str, bytes]:
        """Return the files of a commit."""
        return {name: file.content for name, file in self.commits[id_].tree.items()}

    def history(self, id_: str) -> list[Commit]:
        """Return a commit and its ancestors, newest first."""
        found = [self.commits[id_]]
        while (parent := found[-1].parent) is not None:
            found.append(self.commits[parent])
        return found

    def commit(
        self,
        files: Mapping[str, bytes | None],
        title: str = "Upload files",
        *,
        branch: str = "main",
        at: datetime | None = None,
        authored_at: datetime | None = None,
    ) -> str:
        """Add or replace files, and remove those given as None; return the commit's id."""
        with self.hub.lock:
            parent = self.branches.get(branch)
            tree = dict(self.commits[parent].tree) if parent else {}
            for name, content in files.items():
                if content is None:
                    del tree[name]
                else:
                    tree[name] = File(name, content)
            at = at or datetime.now(UTC)
            listing = "\n".join(f"{file.blob_id} {name}" for name, file in sorted(tree.items()))
            # Of repository and place, too: the same files twice are two commits.
            text = f"{self.id} {len(self.commits)}\n{parent} {at} {title}\n{listing}"
            made = Commit(
                hashlib.sha1(text.encode()).hexdigest(), parent, title, at, authored_at or at, tree
            )
            self.commits[made.id] = made
            self.branches[branch] = made.id
            self.hub.objects |= {file.sha256: file for file in tree.values() if file.is_lfs}
            return made.id

    def tag(self, name: str, id_: str) -> None:
        """Let a tag mean a commit; it may be one that meant another."""
        self.tags[name] = self.commits[id_].id

    def branch(self, name: str, id_: str) -> None:
        """Let a branch mean a commit."""
        self.branches[name] = self.commits[id_].id

    def rename(self, name: str) -> None:
        """Give it another name; the old one redirects until somebody else takes it."""
        with self.hub.lock:
            del self.hub.repos[self.name]
            self.hub.moved[self.name] = name
            self.hub.moved.pop(name, None)
            self.name = name
            self.hub.repos[name] = self

    # On the Hub, to hand over is to rename: the id stays, the owner is another one.
    transfer = rename

    def delete(self) -> None:
        """Remove it; its name is free for everybody."""
        with self.hub.lock:
            del self.hub.repos[self.name]

    def recreate(self, files: Mapping[str, bytes]) -> Repo:
        """Remove it, and let somebody make another one of the same name."""
        self.delete()
        return self.hub.create(self.name, files=files)

    def gate(self, how: Literal["auto", "manual"] | None) -> None:
        """Ask readers for their consent, and for ours."""
        self.gated = how

    def disable(self) -> None:
        """Let nobody have it, as the Hub does with what breaks its rules."""
        self.disabled = True

    def rewrite(self, files: Mapping[str, bytes], *, at: datetime | None = None) -> str:
        """Force-push a history of one commit; every other commit is gone. Return its id."""
        with self.hub.lock:
            self.branches.clear()
            self.tags.clear()
            made = self.commit(files, title="Super-squash branch 'main'", at=at)
            self.commits = {made: self.commits[made]}
            return made
