"""
The thin client of the Hugging Face Hub: list one revision, bring one file, believe nothing.

huggingface_hub transports and authenticates; it does not verify. It accepts a body of the right
length with the wrong bytes, and it takes a file that lies in the target directory for the one that
was asked for. So every file is downloaded into an empty directory, hashed, held against the digest
that the Hub's own listing of the pinned commit gives (sha256 of LFS files, git's blob id of the
others), and only then gets its name.

The endpoint is HF_ENDPOINT, the token HF_TOKEN, both read by huggingface_hub when it is imported.
"""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

from pipelines import __version__, atomic, console, hashing
from pipelines.errors import DigestError, MachineError, RetryLaterError, UpstreamError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Whoever agrees to the terms gets the files; or somebody of upstream's decides about each.
Gate = Literal["auto", "manual"]

_LIBRARY: Final = "gguf-fleet"
_TOO_BUSY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_ACCESS_HINT: Final = (
    "Set HF_TOKEN to a token that may read it (under Actions: a secret of that name), and accept "
    "the model's conditions on its page if it has any."
)


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


@dataclass(frozen=True)
class HubRepo:
    """One repository of models at one commit."""

    repo: str
    revision: str

    def files(self) -> tuple[RemoteFile, ...]:
        """
        List the files of the revision with sizes and digests, in one request.

        Raises:
            UpstreamError: Gone, private, gated, disabled or renamed; no such commit.
            RetryLaterError: The Hub cannot be reached, or is too busy.
        """
        info = self._info
        if info.id != self.repo:
            raise UpstreamError(
                f"hf:{self.repo} answers as {console.clean(str(info.id))}: it was renamed or taken "
                "over.",
                hint="If you trust the new owner, declare that name as `source`.",
            )
        if info.sha != self.revision:
            raise UpstreamError(
                f"hf:{self.repo} answers revision {self.revision} with "
                f"{console.clean(str(info.sha))}.",
                hint="Declare the full id of a commit as `revision`.",
            )
        return tuple(_remote_file(self.repo, sibling) for sibling in info.siblings or ())

    def gated(self) -> Gate | None:
        """
        Return how the Hub guards its files; None if everybody may have them.

        Part of the answer that `files` asks for. A word that is not known counts as the strictest.

        Raises:
            UpstreamError, RetryLaterError: See `files`.
        """
        said = getattr(self._info, "gated", None)
        if not said:
            return None
        return "auto" if said == "auto" else "manual"

    @cached_property
    def _info(self) -> Any:  # noqa: ANN401 - ModelInfo
        with self._translated("the list of its files"):
            return _api().model_info(self.repo, revision=self.revision, files_metadata=True)

    def bring(
        self, file: RemoteFile, target: Path, progress: Callable[[int], None]
    ) -> hashing.Digests:
        """
        Download one file, verify it, and give it the name `target`.

        Args:
            file: An entry of `files()`.
            target: Final path; its directory exists.
            progress: Called with the number of bytes that arrived so far.

        Returns:
            Its size and digests, from one pass over what is on the disk.

        Raises:
            DigestError: The bytes are not those of the listing; nothing is kept of them.
            UpstreamError: The file cannot be had.
            RetryLaterError: It cannot be had now.
            MachineError: The disk is full.
        """
        # Fresh, since huggingface_hub believes whatever it finds in a local_dir.
        download = target.with_name(".download")
        atomic.remove(download)
        try:
            with self._translated(file.name):
                arrived = download / file.name
                _download(self, file.name, download, progress)
            digests = _verified(arrived, file, self)
            arrived.replace(target)
        finally:
            atomic.remove(download)
        return digests

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn what huggingface_hub raises into an error that says what to do."""
        import httpx2  # noqa: PLC0415 - 0.2 s, and only for hf: sources
        from huggingface_hub import errors as hub  # noqa: PLC0415 - the same

        where = f"hf:{self.repo} at {self.revision[:12]}"
        try:
            yield
        except hub.GatedRepoError as error:
            raise UpstreamError(f"{where} is gated.", hint=_ACCESS_HINT) from error
        except hub.DisabledRepoError as error:
            raise UpstreamError(
                f"{where} was disabled by the Hub.", hint="Declare another source."
            ) from error
        except hub.RevisionNotFoundError as error:
            raise UpstreamError(
                f"{where}: there is no such commit; upstream may have rewritten its history.",
                hint="Look at the commits on the Hub and declare another `revision`.",
            ) from error
        except hub.RepositoryNotFoundError as error:
            raise UpstreamError(
                f"hf:{self.repo} does not exist, or this machine may not see it.", hint=_ACCESS_HINT
            ) from error
        except (httpx2.HTTPError, OSError, hub.HFValidationError, hub.XetDownloadError) as error:
            raise self._refusal(error, f"{where}: {what}") from error

    def _refusal(self, error: Exception, what: str) -> UpstreamError | MachineError:
        """Sort an error that is not about the repository as such."""
        from huggingface_hub import constants  # noqa: PLC0415 - see _translated

        status = _status(error)
        detail = console.clean(str(_root(error)).strip().split("\n")[0])[:200]
        if status is not None and status not in _TOO_BUSY:
            return UpstreamError(f"{what} answers {status}: {detail}.", hint=_ACCESS_HINT)
        if status is not None:
            return RetryLaterError(
                f"{what}: the Hub answers {status} ({detail}).", hint="Try again in some minutes."
            )
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return MachineError(f"{what}: the disk is full.", hint="Make room and try again.")
        if constants.HF_HUB_OFFLINE:
            return RetryLaterError(
                f"{what} is not here, and HF_HUB_OFFLINE is set.", hint="Unset it to download."
            )
        return RetryLaterError(
            f"{what} cannot be had from {constants.ENDPOINT} now: {detail}.",
            hint="Check the network, the proxy and HF_ENDPOINT, then try again.",
        )


def git_blob_sha1(path: Path) -> str:
    """Return git's id of a file's content: sha1 of `blob <size>`, a NUL byte, and the bytes."""
    sha1 = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(hashing.CHUNK_BYTES):
            sha1.update(chunk)
    return sha1.hexdigest()


def _verified(path: Path, file: RemoteFile, source: HubRepo) -> hashing.Digests:
    """Hash a download and hold it against the listing."""
    digests = hashing.digest(path)
    if file.sha256 is not None:
        wanted, found = file.sha256, digests.sha256
    else:
        # A second pass, over the small files alone: the Hub keeps 10 MB and more in LFS.
        wanted, found = str(file.git_sha1), git_blob_sha1(path)
    if digests.size_bytes != file.size_bytes or wanted != found:
        raise DigestError(
            f"{file.name} of hf:{source.repo} at {source.revision[:12]} is not what the Hub lists: "
            f"wanted {wanted} ({file.size_bytes} bytes), got {found} ({digests.size_bytes} bytes).",
            hint="A proxy, a mirror or a disk changed it. Nothing was kept; try again.",
        )
    return digests


def _remote_file(repo: str, sibling: Any) -> RemoteFile:  # noqa: ANN401 - RepoSibling
    """Take over one entry of a listing; an entry without size and digest cannot be verified."""
    sha256 = sibling.lfs.sha256 if sibling.lfs else None
    if sibling.size is None or (sha256 is None and sibling.blob_id is None):
        raise UpstreamError(
            f"hf:{repo}: the Hub lists {console.clean(sibling.rfilename)} without size and digest."
        )
    return RemoteFile(
        name=sibling.rfilename,
        size_bytes=sibling.size,
        sha256=sha256,
        git_sha1=None if sha256 else sibling.blob_id,
    )


def _api() -> Any:  # noqa: ANN401 - HfApi
    # Constants of huggingface_hub from its import on; what the operator has set stays.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from huggingface_hub import HfApi  # noqa: PLC0415 - 0.2 s, and only for hf: sources

    return HfApi(library_name=_LIBRARY, library_version=__version__)


def _download(source: HubRepo, name: str, directory: Path, progress: Callable[[int], None]) -> None:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - see _api
    from huggingface_hub.utils.tqdm import tqdm  # noqa: PLC0415 - see _api

    class Bar(tqdm):
        """Reports to us instead of drawing over our own line."""

        def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - tqdm's
            super().__init__(*args, **(options | {"disable": True}))  # type: ignore[no-untyped-call]
            self.arrived_bytes = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.arrived_bytes += int(n or 0)
            progress(self.arrived_bytes)
            return None

    hf_hub_download(
        source.repo,
        name,
        revision=source.revision,
        local_dir=directory,
        tqdm_class=Bar,
        library_name=_LIBRARY,
        library_version=__version__,
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Walk an exception and what it was raised from."""
    seen: set[int] = set()
    step: BaseException | None = error
    while step is not None and id(step) not in seen:
        seen.add(id(step))
        yield step
        step = step.__cause__ or step.__context__


def _root(error: BaseException) -> BaseException:
    return list(_chain(error))[-1]


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, if a server answered at all."""
    for step in _chain(error):
        status = getattr(getattr(step, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None
