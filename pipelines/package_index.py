"""
Which source distributions the package index lists, with their digests: by pip's configuration.

The simple repository API, as JSON (PEP 691, 700, 792) or as HTML (PEP 503, 592), which tells no
time and no size. A digest is believed because pip believes the place that it comes from (TLS, this
machine, or a trusted host), and because pip is later given it: `fleet toolchain` unpacks no other
bytes. What comes from the index is a stranger's: bounded, and looked at field by field.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from pipelines import console, proc, strict_json, wording
from pipelines.errors import FleetError, RetryLaterError, UpstreamError
from pipelines.params import SHA256

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from packaging.version import Version

_PAGE: Final = Path(__file__).with_name("pip_page.py")
# What the program that asks may print: the page of 32 MiB, in JSON, where a letter may take six.
_MOST_BYTES: Final = 200 << 20
_MOST_FILES: Final = 20_000
_MOST_SIZE_BYTES: Final = 1 << 50
_SAID_CHARACTERS: Final = 200
_JSON: Final = "application/vnd.pypi.simple.v1+json"
_HTML: Final = frozenset({"application/vnd.pypi.simple.v1+html", "text/html"})
# Major version of the interface that we read (PEP 629).
_MAJOR: Final = "1"
_NOT_FOUND: Final = frozenset({404, 410})
_REFUSED: Final = frozenset({401, 403, 407})
_OK: Final = 200

_CAUSES: Final = {
    "insecure": "is plain HTTP, whose digests pip does not trust: use https, or name the host in "
    "pip's trusted-host",
    "too-large": "answers with more than 32 MiB",
    "SSLError": "has a certificate that pip does not accept",
    "ProxyError": "is behind a proxy that does not answer",
    "TooManyRedirects": "redirects for ever",
    "RetryError": "answers with an error of its own (5xx), also when it is asked again",
}
_UNREACHABLE: Final = "cannot be reached"


@dataclass(frozen=True, kw_only=True)
class Sdist:
    """
    One source distribution.

    Attributes:
        version: As PEP 440 writes it.
        sha256: By the index's own metadata; None if it gives none, or two.
        size_bytes: None if the index does not say.
        uploaded_at: By the index's clock; None if it does not say.
        yanked: Why it was withdrawn, "" if nobody said; None: it stands.
        is_final: Whether it is no pre-release and no development release.
    """

    version: str
    sha256: str | None
    size_bytes: int | None
    uploaded_at: datetime | None
    yanked: str | None
    is_final: bool


@dataclass(frozen=True, kw_only=True)
class Page:
    """
    What an index says of a project.

    Attributes:
        host: Of the index, for people.
        sdists: That this Python may install, newest first.
        status: Of the project (PEP 792), `active` if the index does not say.
        requests_count: That it took.
    """

    host: str
    sdists: tuple[Sdist, ...]
    status: str
    requests_count: int


class IndexSilentError(RetryLaterError):
    """The index cannot be asked, or not now; the message is a sentence."""


class IndexAnswerError(UpstreamError):
    """The index answers what cannot be read, or does not know the project."""


def sdists(project: str, *, python: Path, within_s: float) -> Page:
    """
    Ask the index that pip is configured with.

    Of several (`extra-index-url`), the first that does not say that it has no such project.

    Args:
        project: Its name, normalised: letters, digits and `-`.
        python: Interpreter that has pip.
        within_s: Seconds for everything.

    Raises:
        IndexSilentError: No index can be reached in time, or pip is told to ask none.
        IndexAnswerError: It does not have the project, or its page cannot be read.
    """
    argv: list[str | Path] = [
        python,
        "-P",
        _PAGE,
        project,
        f"{max(1.0, min(15.0, within_s / 2)):.0f}",
    ]
    try:
        said = proc.answer(argv, within_s=within_s)
        answers = strict_json.loads(said, limit_bytes=_MOST_BYTES, lines_in=frozenset("*"))
        asked: list[dict[str, Any]] = answers["asked"]
    except (FleetError, KeyError, TypeError) as error:
        why = f" {error.message.splitlines()[0]}" if isinstance(error, FleetError) else ""
        raise IndexSilentError(
            f"pip could not ask the package index within {within_s:.0f} s.{why}"
        ) from error
    if not asked:
        raise IndexSilentError(
            "pip is told to use no index (no-index), so there is none to ask.",
            hint="Unset PIP_NO_INDEX, or set check_upstream.engines to false.",
        )
    if asked[-1].get("status") != _OK:
        raise _refusal(project, asked)
    found = asked[-1]
    host = _shown(found["host"])
    kind = str(found["type"]).partition(";")[0].strip().lower()
    try:
        page = read(str(found["text"]), kind, project)
    except _UnreadableError as error:
        raise IndexAnswerError(f"The package index {host} {error}.") from error
    if not page.sdists and page.status == "active":
        # Such as the page of a proxy that wants a login.
        raise IndexAnswerError(f"The package index {host} lists no release of {project}.")
    return Page(host=host, sdists=page.sdists, status=page.status, requests_count=len(asked))


def _refusal(project: str, asked: Sequence[dict[str, Any]]) -> FleetError:
    """Say why no index gave a page."""
    said = []
    for one in asked:
        host, status = _shown(one.get("host", "")), one.get("status")
        word = str(one.get("error") or "")
        if word == "configuration":
            return IndexSilentError(
                "pip's own configuration cannot be read.", hint="Run: pip config debug"
            )
        if word.startswith("pip:"):
            return IndexSilentError(
                f"the pip here cannot be asked for its index ({_shown(word[4:])}).",
                hint="Install another pip: python -m pip install --upgrade pip",
            )
        if status is None:
            said.append(f"{host} {_CAUSES.get(word, f'{_UNREACHABLE} ({_shown(word)})')}")
        elif status in _NOT_FOUND:
            said.append(f"{host} does not have {project}")
        elif status in _REFUSED:
            said.append(f"{host} refuses us ({status}): pip has no account there, or a wrong one")
        else:
            said.append(f"{host} answers {status}")
    text = f"The package index {'; '.join(said)}."
    if all(one.get("status") in _NOT_FOUND for one in asked):
        return IndexAnswerError(text, hint="Check PIP_INDEX_URL: pip config list")
    return IndexSilentError(text, hint="Check the network and pip's settings: pip config list")


# --- reading a page -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Read:
    sdists: tuple[Sdist, ...]
    status: str


class _UnreadableError(Exception):
    """A page that cannot be read; says why, as the end of a sentence that names the index."""


@dataclass(kw_only=True)
class _File:
    """One file as the page has it, before anything of it is believed."""

    name: object
    sha256: object = None
    size: object = None
    uploaded: object = None
    yanked: object = False
    python: object = None


def read(text: str, kind: str, project: str) -> _Read:
    """
    Read a page of the simple repository API.

    Args:
        text: The page.
        kind: Its content type, without parameters.
        project: Whose it should be.

    Raises:
        _UnreadableError: It is none, or of another version of the interface.
    """
    if kind == _JSON:
        files, status = _of_json(text)
    elif kind in _HTML:
        files, status = _of_html(text)
    else:
        raise _UnreadableError(f"answers with {_shown(kind)!r}, no page of packages")
    if len(files) > _MOST_FILES:
        raise _UnreadableError(f"lists {len(files):,} files; {_MOST_FILES:,} are read")
    return _Read(sdists=_sdists(files, project), status=status)


def _of_json(text: str) -> tuple[list[_File], str]:
    try:
        page = json.loads(text)
        version = str(page["meta"]["api-version"])
        listed = page["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _UnreadableError("answers with JSON that is no page of packages") from None
    _require_version(version)
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise _UnreadableError("answers with JSON whose files are no list")
    status = page.get("project-status")
    files = [
        _File(
            name=one.get("filename"),
            sha256=hashes.get("sha256") if isinstance(hashes := one.get("hashes"), dict) else None,
            size=one.get("size"),
            uploaded=one.get("upload-time"),
            yanked=one.get("yanked", False),
            python=one.get("requires-python"),
        )
        for one in listed
    ]
    return files, _status(status.get("status") if isinstance(status, dict) else None)


def _of_html(text: str) -> tuple[list[_File], str]:
    page = _Anchors()
    page.feed(text)
    _require_version(page.meta.get("pypi:repository-version", "1.0"))
    if not page.files and "<html" not in text.lower() and "<a" not in text.lower():
        raise _UnreadableError("answers with something that is no page of packages")
    return page.files, _status(page.meta.get("pypi:project-status"))


class _Anchors(HTMLParser):
    """The files of a page of PEP 503: every anchor; the digest is the fragment of its address."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[_File] = []
        self.meta: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take an anchor, or a word about the page."""
        held = dict(attrs)
        if tag == "meta" and held.get("name"):
            self.meta[str(held["name"])] = held.get("content") or ""
        if tag != "a" or not held.get("href"):
            return
        try:
            address = urlsplit(str(held["href"]))
        except ValueError:
            return
        digests = parse_qs(address.fragment).get("sha256", [None])
        self.files.append(
            _File(
                name=unquote(address.path.rpartition("/")[2]),
                sha256=digests[0] if len(digests) == 1 else None,
                # The attribute alone withdraws a file; its value says why.
                yanked=(held["data-yanked"] or True) if "data-yanked" in held else False,
                python=held.get("data-requires-python"),
            )
        )


def _require_version(version: str) -> None:
    if version.partition(".")[0] != _MAJOR:
        raise _UnreadableError(f"speaks version {_shown(version)} of its interface, not 1")


def _status(said: object) -> str:
    known = {"archived", "quarantined", "deprecated"}
    return said if isinstance(said, str) and said in known else "active"


def _sdists(files: Iterable[_File], project: str) -> tuple[Sdist, ...]:
    """Return the source distributions that this Python may install, newest first."""
    found: dict[Version, Sdist] = {}
    for file in files:
        version = _version(file.name, project)
        if version is None or not _may_install(file.python):
            continue
        one = _sdist(file, version)
        other = found.get(version)
        if other is not None:
            # Two names of one version, such as with `-` and with `_`: they must be the same bytes.
            digest = one.sha256 if one.sha256 == other.sha256 else None
            one = Sdist(
                version=one.version,
                sha256=digest,
                size_bytes=one.size_bytes,
                uploaded_at=one.uploaded_at,
                yanked=one.yanked if one.yanked is not None else other.yanked,
                is_final=one.is_final,
            )
        found[version] = one
    return tuple(found[version] for version in sorted(found, reverse=True))


def _version(name: object, project: str) -> Version | None:
    """Return the version of a source distribution of a project; None for every other file."""
    from packaging.utils import InvalidSdistFilename, parse_sdist_filename  # noqa: PLC0415
    from packaging.version import InvalidVersion  # noqa: PLC0415 - 20 ms that only a look pays

    # What `fleet toolchain` unpacks.
    if not isinstance(name, str) or not name.endswith(".tar.gz") or len(name) > _SAID_CHARACTERS:
        return None
    try:
        named, version = parse_sdist_filename(name)
    except (InvalidSdistFilename, InvalidVersion):
        return None
    return version if named == project else None


def _may_install(wanted: object) -> bool:
    """Tell whether pip would take a file for this Python."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet  # noqa: PLC0415

    if not isinstance(wanted, str) or not wanted:
        return True
    try:
        return SpecifierSet(wanted).contains(".".join(map(str, sys.version_info[:3])))
    except InvalidSpecifier:
        return True  # pip takes such a file, too


def _sdist(file: _File, version: Version) -> Sdist:
    digest = file.sha256.lower() if isinstance(file.sha256, str) else ""
    is_size = type(file.size) is int and 0 < file.size <= _MOST_SIZE_BYTES
    yanked = _shown(file.yanked) if isinstance(file.yanked, str) else ""
    return Sdist(
        version=str(version),
        sha256=digest if is_sha256(digest) else None,
        size_bytes=file.size if is_size else None,  # type: ignore[arg-type]
        uploaded_at=time_of(file.uploaded),
        yanked=yanked if file.yanked else None,
        is_final=not version.is_prerelease and version.local is None,
    )


def is_sha256(text: str) -> bool:
    """Tell whether a text is a digest, in lower case."""
    return re.fullmatch(SHA256, text) is not None


def time_of(said: object) -> datetime | None:
    """Read a time such as `2026-10-01T05:48:01.345495Z`; None for everything else."""
    if not isinstance(said, str):
        return None
    try:
        at = datetime.fromisoformat(said)
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _shown(text: object) -> str:
    return wording.shortened(console.clean(str(text)), _SAID_CHARACTERS)
