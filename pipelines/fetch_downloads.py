"""
What a fetch need not transfer: the beginnings of files, and files that DVC has already.

    work/downloads/<digest>.part     a file of the Hub, as far as it came; named by what it will be
    work/downloads/needed.json       which declared revision needs which of them

A digest is the name that the listing has for the bytes: sha256 of what is in LFS, git's blob id of
the rest. A run that is killed, by whatever, leaves its parts; the next one goes on from there, of
this model or of another with the same file. What no declared revision needs is removed.

A file that was fetched before, of whatever revision or model, is in DVC's cache under the md5 of
its record, and records are in git. DVC removes `work/<model>/source` and the record itself before
it runs the stage, so records are read from the commit that is checked out and from the default
branch as well. Nothing that is found gets a name before it was hashed.
"""

from __future__ import annotations

import contextlib
import json
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from pipelines import atomic, console, disk, dvc_state, hashing, locks, records, trees
from pipelines.errors import DigestError, FleetError
from pipelines.hub import found_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from pipelines.hub import RemoteFile
    from pipelines.layout import Layout
    from pipelines.params import Declaration

NEEDED: Final = "needed.json"
_PART: Final = re.compile(r"(?:[0-9a-f]{40}|[0-9a-f]{64})\.part")
_MD5: Final = re.compile(r"[0-9a-f]{32}")
_PLAIN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)+")
_FETCHED: Final = re.compile(rf"{trees.RESULTS}/[^/]+/fetch\.json")


class Downloads:
    """What one fetch of one model keeps, and may take from others."""

    def __init__(
        self,
        at: Layout,
        model: str,
        source: str,
        revision: str,
        *,
        declared: Declaration | None = None,
    ) -> None:
        """
        Describe the fetch; nothing is read or written yet.

        Args:
            at: The checkout.
            model: Key of the model.
            source: As it is declared.
            revision: As it is declared.
            declared: All that is declared, so that what nobody needs can go; without it, what
                other models need stays.
        """
        self._at = at
        self._directory = at.downloads
        self._model = model
        self._needs = {"source": source, "revision": revision}
        self._declared = declared
        self._held = ExitStack()
        self._found: Known | None = None

    def part(self, file: RemoteFile) -> Path:
        """Return where the bytes of a file are kept until all of them are here."""
        self._directory.mkdir(parents=True, exist_ok=True)
        return self._directory / f"{file.digest}.part"

    def expect(self, files: Iterable[RemoteFile], *, within_s: float) -> dict[str, int]:
        """
        Keep others out, drop what nobody needs, and say what is here of `files`.

        Args:
            files: All that may be brought.
            within_s: Seconds to wait for another fetch in this checkout.

        Returns:
            {name: bytes that need neither be transferred nor written}.

        Raises:
            DigestError: The listing has other digests than a record of the same revision.
            RetryLaterError: Another process was at it all the time.
        """
        files = tuple(files)
        lock = self._directory / ".lock"
        self._held.enter_context(
            locks.exclusively(lock, "downloading", silent_s=0.5, timeout_s=within_s)
        )
        # After the wait: whoever was before us may have brought the very files.
        for file in files:
            if file.sha256 is not None:
                self.require_recorded(file.name, file.sha256)
        self._note(sorted({file.digest for file in files}))
        return present(self._at, files, self._known)

    def known(
        self, file: RemoteFile, target: Path, progress: Callable[[int], None]
    ) -> hashing.Digests | None:
        """
        Give a file that is here already the name `target`, after hashing it.

        It is linked where the disk can, else copied; DVC links what it caches as well.

        Returns:
            Its digests; None if it is not here, or no longer what its record says.
        """
        for source in self._known.candidates(file):
            # The very inode that gets the name is hashed, not what had another name before.
            digests = _linked(source, target, progress)
            if digests is None:
                continue
            if found_digest(target, file, digests) == file.digest:
                return digests
            atomic.remove(target)
            if source == cached(self._at, digests.md5):
                continue  # another file of the same name and size
            if source.is_relative_to(dvc_state.cache_dir(self._at.root)):
                _drop_rotted(source)
        return None

    def require_recorded(self, name: str, sha256: str) -> None:
        """
        Hold a digest against a record of the same revision, wherever it was made.

        Digests of a listing come from whoever answers; those of a record are in git.

        Raises:
            DigestError: It is another one.
        """
        known = self._known.of_revision(self._needs["source"], self._needs["revision"])
        if known.get(name, sha256) != sha256:
            where = f"{self._needs['source']} at {self._needs['revision'][:12]}"
            raise DigestError(
                f"{name} of {where} is not what it was when it was fetched before: its record says "
                f"sha256 {known[name]}, what answers now {sha256}.",
                hint="A commit does not change: a mirror, a proxy or somebody in between does. "
                "Look at HF_ENDPOINT, and ask the Hub itself.",
            )

    def done(self) -> None:
        """Drop what was kept for another try of this fetch."""
        self._note([])

    def close(self) -> None:
        """Let others at it."""
        self._held.close()

    # --- what is kept ---

    def _note(self, digests: list[str]) -> None:
        """Write down what this fetch needs, and remove what no declared revision does."""
        path = self._directory / NEEDED
        needed = {
            model: needs
            for model, needs in _needed(path).items()
            if self._is_declared(model, needs)
        }
        needed[self._model] = self._needs | {"digests": digests}
        if not digests:
            del needed[self._model]
        if needed:
            atomic.write_json(path, needed)
        else:
            atomic.remove(path)
        kept = {f"{digest}.part" for needs in needed.values() for digest in needs["digests"]}
        for part in self._directory.iterdir():
            is_torn = part.name == atomic.part_name(path).name
            if is_torn or (_PART.fullmatch(part.name) and part.name not in kept):
                atomic.remove(part)

    def _is_declared(self, model: str, needs: Mapping[str, Any]) -> bool:
        if model == self._model or self._declared is None:
            return model != self._model
        spec = self._declared.models.get(model)
        return spec is not None and (spec.source, spec.revision) == (
            needs["source"],
            needs["revision"],
        )

    @property
    def _known(self) -> Known:
        if self._found is None:
            self._found = Known(self._at)
        return self._found


class Known:
    """What the records of earlier fetches say about files."""

    def __init__(self, at: Layout) -> None:
        """Read them."""
        self._places: dict[str, dict[Path, None]] = {}
        self._revisions: dict[tuple[str, str], dict[str, str]] = {}
        for record, is_here in _records(at):
            named = self._revisions.setdefault((record.source, record.revision), {})
            for file in record.files:
                named.setdefault(file.name, file.sha256)
                paths = [cached(at, file.md5)] if _MD5.fullmatch(file.md5) else []
                # A record can be written by hand, with names in it that lead anywhere.
                if is_here and _PLAIN.fullmatch(f"{record.model}/{file.name}"):
                    paths.append(at.source(record.model) / file.name)
                for key in (file.sha256, _small_key(file.name, file.size_bytes)):
                    self._places.setdefault(key, {}).update(dict.fromkeys(paths))

    def of_revision(self, source: str, revision: str) -> Mapping[str, str]:
        """Return {name: sha256} of what a revision had when it was fetched before."""
        return self._revisions.get((source, revision), {})

    def candidates(self, file: RemoteFile) -> Iterator[Path]:
        """Yield files that may have the bytes; of those in git, whose id no record has, by name."""
        key = file.sha256 or _small_key(file.name, file.size_bytes)
        for path in self._places.get(key, ()):
            if _size_bytes(path) == file.size_bytes:
                yield path


def present(at: Layout, files: Iterable[RemoteFile], known: Known) -> dict[str, int]:
    """
    Say what of some files is here: as a beginning, or whole, where it can be linked.

    Args:
        at: The checkout.
        files: Of a listing.
        known: What was fetched before.

    Returns:
        {name: bytes that need neither be transferred nor written}.
    """
    device = disk.existing(at.downloads).stat().st_dev
    found = {}
    for file in files:
        part_bytes = _size_bytes(at.downloads / f"{file.digest}.part")
        # Across file systems nothing can be linked: a copy has to be written.
        if any(path.stat().st_dev == device for path in known.candidates(file)):
            found[file.name] = file.size_bytes
        elif part_bytes is not None:
            found[file.name] = min(part_bytes, file.size_bytes)
    return found


def cached(at: Layout, md5: str) -> Path:
    """Return where DVC has, or would have, a file with this md5."""
    return dvc_state.cache_dir(at.root) / "files/md5" / md5[:2] / md5[2:]


def drop_rotted(at: Layout, md5s: Mapping[Path, str]) -> None:
    """
    Remove what DVC's cache has under the names of right files, but with other bytes.

    DVC believes what it has and links it in the place of what a stage has just made, wherever that
    came from. An object that has rotted would so replace the very bytes that were verified.

    Args:
        at: The checkout.
        md5s: {verified file: md5}.
    """
    for path, md5 in md5s.items():
        there = cached(at, md5)
        if there.is_file() and not there.samefile(path) and hashing.digest(there).md5 != md5:
            _drop_rotted(there)


def _drop_rotted(path: Path) -> None:
    console.warn(f"{path} had rotted on the disk: it was not the file that its name says. Removed.")
    atomic.remove(path)


def here_bytes(at: Layout, model: str, source: str, revision: str) -> int:
    """Return how many bytes of a declared revision are here from a fetch that did not end."""
    needs = _needed(at.downloads / NEEDED).get(model)
    if needs is None or (needs["source"], needs["revision"]) != (source, revision):
        return 0
    parts = (at.downloads / f"{digest}.part" for digest in needs["digests"])
    return sum(part.stat().st_size for part in parts if part.exists())


def _needed(path: Path) -> dict[str, dict[str, Any]]:
    """Read who needs what; a file that is not ours or torn says nothing, and parts are swept."""
    try:
        told = json.loads(path.read_bytes())
        return {
            str(model): {
                "source": str(needs["source"]),
                "revision": str(needs["revision"]),
                "digests": [str(digest) for digest in needs["digests"]],
            }
            for model, needs in told.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _linked(source: Path, target: Path, progress: Callable[[int], None]) -> hashing.Digests | None:
    """Link or copy a file to `target` and hash it there; None if it cannot be read."""
    from pipelines import fetch  # noqa: PLC0415 - it reads this module

    try:
        # DVC may have made a symbolic link of the file; its target is what counts.
        real = source.resolve(strict=True)
        try:
            target.hardlink_to(real)
        except OSError:  # another file system, or one without hard links
            with real.open("rb", buffering=0) as file:
                return fetch.copy_file(file, target, progress)
        return hashing.digest(target, progress=progress)
    except OSError:
        atomic.remove(target)
        return None


def _size_bytes(path: Path) -> int | None:
    """Return the size of a regular file; None if it is not there."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _small_key(name: str, size_bytes: int) -> str:
    return f"{name} {size_bytes}"


def _records(at: Layout) -> Iterator[tuple[records.FetchRecord, bool]]:
    """
    Yield the records of fetches that the checkout, its commit and the default branch hold.

    With each comes whether it lies in the checkout, that is, whether it tells of work/MODEL/source.
    """
    here = [path.read_bytes() for path in sorted(at.root.glob("results/*/fetch.json"))]
    kept: list[bytes] = []
    with contextlib.suppress(FleetError):
        git = trees.Git(at.root)
        for commit in dict.fromkeys(filter(None, (git.parse("HEAD"), git.default_branch()))):
            names = git.files(commit, trees.RESULTS)
            kept += git.blobs(
                blob for path, blob in names.items() if _FETCHED.fullmatch(path)
            ).values()
    for content in dict.fromkeys((*here, *kept)):
        with contextlib.suppress(ValidationError):
            yield records.FetchRecord.model_validate_json(content), content in here
