"""
What a run left behind, read as if a stranger had written it: on a pull request one may have.

Nothing is unpacked to a disk. An artifact has one file of a known name and a size that makes sense,
before and while it is unpacked; the digest that GitHub recorded is held against the bytes.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
import zlib
from typing import TYPE_CHECKING, Any, Final

from pipelines import console, strict_json
from pipelines.errors import FleetError
from pipelines.github.client import taken
from pipelines.github.errors import GitHubError, TooLargeError

if TYPE_CHECKING:
    from pipelines.github.client import GitHub

MAX_ZIP_BYTES: Final = 4 << 20
MAX_FILE_BYTES: Final = 32 << 20
_PIECE_BYTES: Final = 1 << 16
# Records are kept as the texts that they are.
_ANY_LINES: Final = frozenset({"*"})
_ENCRYPTED: Final = 1
_PLAIN_METHODS: Final = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})


class ArtifactError(FleetError):
    """An artifact is not what this repository's own jobs leave behind; nothing of it was used."""

    exit_code = 6


def find_artifact(gh: GitHub, run_id: int, name: str, *, since: str = "") -> dict[str, Any] | None:
    """
    Return the newest artifact of a run by name; None if there is none, or it has expired.

    Args:
        gh: The repository.
        run_id: Of the run.
        name: Of the artifact.
        since: When the attempt began, as GitHub writes times: those of earlier ones do not count.

    Raises:
        GitHubError, RetryLaterError: See `client.GitHub.get`.
    """
    found = [
        each
        for each in gh.paged(f"actions/runs/{run_id}/artifacts", "artifacts", name=name)
        if each.get("name") == name
        and each.get("expired") is False
        and str(each.get("created_at") or "") >= since
    ]
    return max(found, key=lambda each: int(taken(each, "id", int)), default=None)


def read_json(gh: GitHub, artifact: dict[str, Any], member: str) -> dict[str, Any]:
    """
    Return the JSON object that an artifact holds in its only file.

    Args:
        gh: The repository.
        artifact: As `find_artifact` returns it.
        member: Name of the file.

    Raises:
        ArtifactError: It is anything else; says what.
        GitHubError, RetryLaterError: See `client.GitHub.download`.
    """
    name = console.clean(str(artifact.get("name")))[:100]
    size_bytes = taken(artifact, "size_in_bytes", int)
    if size_bytes > MAX_ZIP_BYTES:
        raise ArtifactError(f"The artifact {name} has {size_bytes} bytes; ours have not so many.")
    number = taken(artifact, "id", int)
    try:
        data = gh.download(f"actions/artifacts/{number}/zip", MAX_ZIP_BYTES)
    except TooLargeError as error:
        raise ArtifactError(f"The artifact {name} has more than {MAX_ZIP_BYTES} bytes.") from error
    except GitHubError as error:
        if error.status in {404, 410}:
            raise ArtifactError(f"The artifact {name} is gone.") from error
        raise
    told = artifact.get("digest")
    found = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if told and told != found:
        raise ArtifactError(
            f"The artifact {name} has {found}, not {console.clean(str(told))[:80]} as GitHub "
            "recorded: it was changed on the way."
        )
    return parsed(unpacked(data, member), member)


def unpacked(data: bytes, member: str) -> bytes:
    """
    Return the only file of a zip.

    Raises:
        ArtifactError: There is another one, or more, or it is larger than any of ours.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) != 1 or entries[0].filename != member or entries[0].is_dir():
                names = ", ".join(console.clean(each.filename)[:60] for each in entries[:5])
                raise ArtifactError(f"The artifact holds {names or 'nothing'}, not {member} alone.")
            entry = entries[0]
            if entry.flag_bits & _ENCRYPTED or entry.compress_type not in _PLAIN_METHODS:
                raise ArtifactError(f"{member} of the artifact is packed as none of ours is.")
            if entry.file_size > MAX_FILE_BYTES:
                raise ArtifactError(f"{member} of the artifact says {entry.file_size} bytes.")
            return _inflated(archive, entry, member)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, struct.error) as error:
        raise ArtifactError(f"The artifact is no zip that can be read: {error}.") from error
    except (NotImplementedError, RuntimeError) as error:
        raise ArtifactError(f"The artifact is a zip of another kind: {error}.") from error


def _inflated(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, member: str) -> bytes:
    """Unpack piece by piece: what a zip says of its sizes is its writer's word."""
    data = bytearray()
    with archive.open(entry) as file:
        while piece := file.read(_PIECE_BYTES):
            data += piece
            if len(data) > MAX_FILE_BYTES:
                raise ArtifactError(
                    f"{member} of the artifact becomes more than {MAX_FILE_BYTES} bytes."
                )
    return bytes(data)


def parsed(data: bytes, what: str) -> dict[str, Any]:
    """
    Return a JSON object from outside: see `strict_json.loads`.

    Raises:
        ArtifactError: It is anything else.
    """
    try:
        value = strict_json.loads(data, limit_bytes=MAX_FILE_BYTES, lines_in=_ANY_LINES)
    except strict_json.NotJsonError as error:
        raise ArtifactError(f"{what} is no JSON of ours: {error.message}.") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{what} is no JSON object.")
    return value
