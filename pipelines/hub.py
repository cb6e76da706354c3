"""
One revision of the Hugging Face Hub: list it, bring its files, believe nothing.

huggingface_hub knows addresses, the token and xet; it does not verify. It accepts a body of the
right length with the wrong bytes, and it takes a file that lies in the target directory for the one
that was asked for. So every file is brought under the name of its digest, by a worker that is
watched (`pipelines.hub_download`), hashed, held against the digest that the Hub's own listing of
the pinned commit gives (sha256 of LFS files, git's blob id of the others), and only then gets its
name. What a killed run left of it is the beginning of the next.

The endpoint is HF_ENDPOINT as it is when it is asked. The token, HF_TOKEN or what
huggingface_hub has stored, goes to no other host.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from pipelines import atomic, console, hashing, hub_download
from pipelines.errors import DigestError, UpstreamError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from pipelines.fetch_downloads import Downloads
    from pipelines.hub_download import Patience
    from pipelines.hub_metadata import Head

# Whoever agrees to the terms gets the files; or somebody of upstream's decides about each.
Gate = Literal["auto", "manual"]


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """
    One file of a source, as its listing declares it.

    Attributes:
        name: Path in the repository.
        size_bytes: Its size.
        sha256: Digest of an LFS file, 64 hex digits; None if the listing has none.
        git_sha1: Blob id of a file that is stored in git itself; None if the listing has none.
    """

    name: str
    size_bytes: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def digest(self) -> str:
        """The one that the listing has; empty where it has none, as that of a directory."""
        return self.sha256 or self.git_sha1 or ""


class HubRepo:
    """One repository of models at one commit."""

    def __init__(
        self,
        repo: str,
        revision: str,
        *,
        downloads: Downloads | None = None,
        patience: Patience | None = None,
    ) -> None:
        """
        Take a declared source; nothing is asked yet.

        Args:
            repo: owner/name.
            revision: Commit, 40 hex digits.
            downloads: What is kept of unfinished files; without it, nothing is.
            patience: With the network; from here on its deadline runs.
        """
        self.repo = repo
        self.revision = revision
        self._downloads = downloads
        self._patience = patience or hub_download.Patience()
        self._transfers = hub_download.Transfers(repo, revision, self._patience)

    def files(self) -> tuple[RemoteFile, ...]:
        """
        List the files of the revision with sizes and digests, in one request.

        Raises:
            UpstreamError: Gone, private, gated, disabled or renamed; no such commit.
            RetryLaterError: The Hub cannot be reached, or is too busy.
        """
        head = self._head
        if head.id != self.repo:
            raise UpstreamError(
                f"hf:{self.repo} answers as {console.clean(head.id)}: it was renamed or taken "
                "over.",
                hint="If you trust the new owner, declare that name as `source`.",
            )
        if head.sha != self.revision:
            raise UpstreamError(
                f"hf:{self.repo} answers revision {self.revision} with {console.clean(head.sha)}.",
                hint="Declare the full id of a commit as `revision`.",
            )
        if head.undigested:
            raise UpstreamError(
                f"hf:{self.repo}: the Hub lists {console.clean(head.undigested[0])[:200]} without "
                "size and digest, or with several.",
                hint="A mirror may have made that of it. Ask the Hub itself: see HF_ENDPOINT.",
            )
        return head.files

    def gated(self) -> Gate | None:
        """
        Return how the Hub guards its files; None if everybody may have them.

        Part of the answer that `files` asks for. A word that is not known counts as the strictest.

        Raises:
            UpstreamError, RetryLaterError: See `files`.
        """
        return self._head.gated

    @cached_property
    def _head(self) -> Head:
        from pipelines import hub_metadata  # noqa: PLC0415 - it reads this module

        reader = hub_metadata.HubReader(
            deadline=time.monotonic() + max(self._transfers.left_s, 0),
            attempts=self._patience.tries + 1,
            answer_s=self._patience.stall_s,
        )
        return reader.at(self.repo, self.revision)

    def expect(self, files: Iterable[RemoteFile]) -> Mapping[str, int]:
        """
        Prepare to bring files: drop what is kept of others.

        Returns:
            {name: bytes that need not be transferred} of those of which some are here already.

        Raises:
            DigestError: The listing has other digests than a record of the same revision.
            RetryLaterError: Another process is at it, until our deadline.
        """
        if self._downloads is None:
            return {}
        return self._downloads.expect(files, within_s=max(self._transfers.left_s, 0))

    def bring(
        self, file: RemoteFile, target: Path, progress: Callable[[int], None]
    ) -> hashing.Digests:
        """
        Bring one file, verify it, and give it the name `target`.

        Args:
            file: An entry of `files()`.
            target: Final path; its directory exists.
            progress: Called with the number of its bytes that are here so far.

        Returns:
            Its size and digests, from one pass over what is on the disk.

        Raises:
            DigestError: The bytes are not those of the listing, twice; nothing is kept of them.
            UpstreamError: The file cannot be had.
            RetryLaterError: It cannot be had now; what came is kept.
            MachineError: The disk is full.
        """
        if self._downloads is None:
            part = atomic.part_name(target)
            atomic.remove(part)
            try:
                digests = self._arrived(file, part, progress)
                part.replace(target)
            finally:
                atomic.remove(part)
            return digests
        known = self._downloads.known(file, target, progress)
        if known is not None:
            return known
        part = self._downloads.part(file)
        digests = self._arrived(file, part, progress)
        self._downloads.require_recorded(file.name, digests.sha256)
        _name(part, target)
        return digests

    def _arrived(
        self, file: RemoteFile, part: Path, progress: Callable[[int], None]
    ) -> hashing.Digests:
        """Transfer what is missing and hash all of it; wrong bytes are asked for once more."""
        for is_last in (False, True):
            try:
                _own(part, file.size_bytes)
                self._transfers.bring(
                    file.name,
                    file.size_bytes,
                    part,
                    progress,
                    large=file.sha256 is not None,
                    fresh=is_last,
                )
                return _verified(part, file, self)
            except DigestError:
                # None of it is of any use: nobody knows which of its bytes are wrong.
                atomic.remove(part)
                if is_last:
                    raise
        raise AssertionError

    def done(self) -> None:
        """Say that all files have their final names: nothing has to be kept for another try."""
        if self._downloads is not None:
            self._downloads.done()

    def close(self) -> None:
        """End what runs, and let others at what is kept."""
        self._transfers.close()
        if self._downloads is not None:
            self._downloads.close()


def _name(part: Path, target: Path) -> None:
    """
    Give a verified file its name beside the one under which it is kept.

    A fetch of many files that is killed finds those again that had arrived.
    """
    with contextlib.suppress(OSError):
        target.hardlink_to(part)
        return
    part.replace(target)


def _own(part: Path, size_bytes: int) -> None:
    """
    See that there is a file to append to, and that nobody else has it.

    One that is linked elsewhere was whole: it is a model's by now, and an object of DVC's cache. If
    it has another size than is listed now, it is left to them.
    """
    if part.exists() and part.stat().st_nlink > 1 and part.stat().st_size != size_bytes:
        atomic.remove(part)
    if not part.exists():
        part.touch()


def git_blob_sha1(path: Path) -> str:
    """Return git's id of a file's content: sha1 of `blob <size>`, a NUL byte, and the bytes."""
    sha1 = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(hashing.CHUNK_BYTES):
            sha1.update(chunk)
    return sha1.hexdigest()


def found_digest(path: Path, file: RemoteFile, digests: hashing.Digests) -> str:
    """
    Return the digest of a file that its listing has, of what lies at `path`.

    A second pass is made over small files alone: the Hub keeps 10 MB and more in LFS.
    """
    return digests.sha256 if file.sha256 is not None else git_blob_sha1(path)


def _verified(path: Path, file: RemoteFile, source: HubRepo) -> hashing.Digests:
    """Hash a download and hold it against the listing."""
    digests = hashing.digest(path)
    found = found_digest(path, file, digests)
    if digests.size_bytes != file.size_bytes or found != file.digest:
        raise DigestError(
            f"{file.name} of hf:{source.repo} at {source.revision[:12]} is not what the Hub lists: "
            f"wanted {file.digest} ({file.size_bytes} bytes), got {found} ({digests.size_bytes} "
            "bytes).",
            hint="A proxy, a mirror or a disk changed it. Nothing was kept; try again.",
        )
    return digests
