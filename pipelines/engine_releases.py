"""
Which releases an engine has, and who says so: what `pipelines.upstream_engines` judges.

    llama.cpp   the package index that pip is configured with (`pipelines.package_index`)
    ollama      Go's module proxy (`pipelines.go_versions`); GitHub's releases where there is no Go,
                where the proxy is a mirror whose list lacks the release that is in use, and where
                the digest of a release archive is declared

Nobody is believed to be complete: a list that has neither the release in use nor a newer one says
nothing of what is newest.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from pipelines import go_versions, package_index, wording
from pipelines.errors import FleetError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from pipelines.params import Declaration
    from pipelines.upstream_records import Engine

PROJECT: Final = "llama-cpp-python"
OLLAMA: Final = "ollama/ollama"
# Releases whose age is asked for, from the newest; Ollama has one or two a week.
_MOST_DESCRIBED: Final = 20
_GO_SHARE: Final = 0.6
_LEAST_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Release:
    """
    One release of an engine.

    Attributes:
        version: Such as `0.3.36`.
        at: When it came; None if nobody says.
        is_authors_time: Whether whoever made the release chose that time.
        sha256: Of what is downloaded of it; None if nobody says, or if nothing is pinned of it.
        size_bytes: Of the same.
        withdrawn: Why it was taken back, "" if nobody said; None: it stands.
        go: The Go that it needs.
    """

    version: str
    at: datetime | None = None
    is_authors_time: bool = False
    sha256: str | None = None
    size_bytes: int | None = None
    withdrawn: str | None = None
    go: str | None = None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """
    What somebody who was asked knows of an engine.

    Attributes:
        said_by: Who, for people, as the beginning of a sentence.
        releases: Final ones whose version can be declared.
        notes: What else there is to know, as sentences.
        pins_digest: Whether a digest has to be pinned with the version.
        requests_count: That it took.
    """

    said_by: str
    releases: tuple[Release, ...]
    notes: tuple[str, ...] = ()
    pins_digest: bool = False
    requests_count: int = 1


@dataclass(frozen=True, kw_only=True)
class Pin:
    """
    What is declared of an engine.

    Attributes:
        engine: Which.
        version: The release in use.
        sha256: What the downloaded file must be; None if none is declared.
        ignored: Releases that are passed over.
        cooldown_days: Age that a release must have.
    """

    engine: Engine
    version: str
    sha256: str | None
    ignored: tuple[str, ...]
    cooldown_days: int


def pins_of(declared: Declaration) -> tuple[Pin, ...]:
    """Return what is declared of each engine in use; Ollama is in none if llama-server serves."""
    section = declared.check_upstream
    pins = [
        Pin(
            engine="llama.cpp",
            version=declared.toolchain.llama_cpp_python,
            sha256=declared.toolchain.sha256,
            ignored=section.ignore.llama_cpp_python,
            cooldown_days=section.cooldown_days,
        )
    ]
    if declared.serving.engine != "llama-server":
        pins.append(
            Pin(
                engine="ollama",
                version=declared.serving.ollama,
                sha256=declared.serving.ollama_archive_sha256,
                ignored=section.ignore.ollama,
                cooldown_days=section.cooldown_days,
            )
        )
    return tuple(pins)


def listing_of(pin: Pin, deadline: float, log: Path) -> Listing:
    """
    Ask who knows about an engine.

    Args:
        pin: What is declared of it.
        deadline: Instant of `time.monotonic()` at which everything is over.
        log: What programs print.

    Raises:
        FleetError: Nobody can say what is newest; the message tells what each said.
    """
    return (
        _llama_cpp(pin, deadline, log) if pin.engine == "llama.cpp" else _ollama(pin, deadline, log)
    )


def _left_s(deadline: float) -> float:
    """
    Seconds that are left.

    Raises:
        MachineError: None; whoever was asked before took them all.
    """
    left_s = deadline - time.monotonic()
    if left_s < _LEAST_S:
        raise MachineError("the time for the look was over before it could be asked.")
    return left_s


# --- llama.cpp --------------------------------------------------------------------------------


def _llama_cpp(pin: Pin, deadline: float, log: Path) -> Listing:
    """Ask the package index."""
    from pipelines import toolchain, toolchain_build  # noqa: PLC0415 - only a look needs them

    root = toolchain.default_cache_root().resolve() / "toolchain"
    root.mkdir(parents=True, exist_ok=True)
    python = toolchain_build.pip_python(root, log)
    page = package_index.sdists(PROJECT, python=python, within_s=_left_s(deadline))
    if page.status == "quarantined":
        raise MachineError(
            f"the package index {page.host} has put {PROJECT} in quarantine: nothing of it is to "
            "be installed."
        )
    notes = []
    if page.status != "active":
        notes.append(f"The package index {page.host} says that {PROJECT} is {page.status}.")
    final = [one for one in page.sdists if one.is_final]
    unsayable = [one.version for one in final if not _is_sayable(one.version)]
    if unsayable and _one_is_newer(unsayable, pin.version):
        notes.append(
            f"{wording.first_few(unsayable[:3])} cannot be declared: toolchain.llama_cpp_python is "
            "three numbers."
        )
    return Listing(
        said_by=f"The package index {page.host}",
        releases=tuple(
            Release(
                version=one.version,
                at=one.uploaded_at,
                sha256=one.sha256,
                size_bytes=one.size_bytes,
                withdrawn=one.yanked,
            )
            for one in final
            if _is_sayable(one.version)
        ),
        notes=tuple(notes),
        pins_digest=True,
        requests_count=page.requests_count,
    )


def _is_sayable(version: str) -> bool:
    parts = version.split(".")
    return len(parts) == 3 and all(  # noqa: PLR2004 - as params.VERSION has them
        part.isascii() and part.isdigit() and len(part) <= 4  # noqa: PLR2004 - the same
        for part in parts
    )


def _one_is_newer(versions: Iterable[str], than: str) -> bool:
    """Tell whether one of some versions that are not three numbers is newer than a release."""
    from packaging.version import Version  # noqa: PLC0415 - 20 ms that only a look pays

    return any(Version(version) > Version(than) for version in versions)


# --- Ollama -----------------------------------------------------------------------------------


def _ollama(pin: Pin, deadline: float, log: Path) -> Listing:
    """
    Ask Go, and GitHub where Go does not know.

    Raises:
        FleetError: Neither knows; says what each said.
    """
    found: Listing | None = None
    why: FleetError | None = None
    if pin.sha256 is None:
        try:
            found = _ollama_by_go(pin, deadline, log)
            return found if _knows(found, pin) else _with_note(found, pin)
        except FleetError as error:
            why = error
    try:
        return _ollama_by_github(pin, deadline)
    except FleetError as error:
        if why is None:
            raise
        both = f"{wording.sentence(why.message)} {wording.sentence(error.message)}"
        raise MachineError(both, hint=why.hint or error.hint) from error


class _IncompleteError(FleetError):
    """A list that cannot say what is newest."""


def _knows(found: Listing, pin: Pin) -> bool:
    return any(one.version == pin.version for one in found.releases)


def _with_note(found: Listing, pin: Pin) -> Listing:
    """Take a list without the release in use for what it is: what it has that is newer, is."""
    note = f"{found.said_by} does not list the declared {pin.version}; there may be newer ones yet."
    return replace(found, notes=(*found.notes, note))


def _ollama_by_go(pin: Pin, deadline: float, log: Path) -> Listing:
    """
    Ask Go.

    Raises:
        FleetError: No Go, no answer, or a list with neither the release in use nor a newer one.
    """
    from pipelines.serving import ollama_install  # noqa: PLC0415 - only a look needs it

    go = ollama_install.go_program(log)
    within_s = _left_s(deadline) * _GO_SHARE
    until = time.monotonic() + within_s
    module = ollama_install.MODULE
    versions = go_versions.releases(module, go, within_s=within_s)
    newer = [one for one in versions if go_versions.key(one) > go_versions.key(pin.version)]
    if not newer and pin.version not in versions:
        raise _IncompleteError(
            f"Go's module proxy lists {wording.counted(len(versions), 'release')} of Ollama, up to "
            f"{versions[0]}, and not the declared {pin.version}: it cannot say what is newest.",
            hint="Set GITHUB_TOKEN, by which GitHub is asked, or GOPROXY to a proxy that lists "
            "all; or check_upstream.engines to false.",
        )
    described = go_versions.described(
        module, newer[:_MOST_DESCRIBED], go, within_s=_left_s(until) if newer else 0
    )
    here = ollama_install.go_version(go, log)
    return Listing(
        said_by="Go's module proxy",
        releases=tuple(
            Release(
                version=one,
                at=described[one].committed_at if one in described else None,
                is_authors_time=True,
                go=described[one].go if one in described else None,
            )
            for one in versions
        ),
        notes=_too_old(newer, described, here),
        requests_count=2 if newer else 1,
    )


def _too_old(
    newer: Sequence[str], described: Mapping[str, go_versions.ModuleVersion], here: tuple[int, ...]
) -> tuple[str, ...]:
    """Say which Go the newest release needs, if the one here is older."""
    wanted = next((described[one].go for one in newer if one in described), None)
    if wanted is None or not here or here >= go_versions.key(wanted):
        return ()
    has = ".".join(map(str, here))
    note = f"Ollama {newer[0]} needs Go {wanted} to be built, and Go {has} is here."
    return (f"{note} With GOTOOLCHAIN=auto Go fetches the other one itself.",)


def _ollama_by_github(pin: Pin, deadline: float) -> Listing:
    """
    Ask GitHub, whose releases have a time by its own clock, and a digest for each file.

    Raises:
        FleetError: No token, no answer, or no such repository on this GitHub.
    """
    from pipelines.github.client import API_URL, GitHub  # noqa: PLC0415 - only a look needs it

    token = os.environ.get("GITHUB_TOKEN", "").strip()
    if not token:
        raise MachineError(
            "GITHUB_TOKEN is not set, so GitHub was not asked for the releases of Ollama.",
            hint="Give the step GITHUB_TOKEN, or set check_upstream.engines to false.",
        )
    github = GitHub(
        OLLAMA,
        token,
        api_url=os.environ.get("GITHUB_API_URL") or API_URL,
        deadline_s=_left_s(deadline),
    )
    answer = github.get("releases", per_page=100)
    told = [
        one
        for one in (answer if isinstance(answer, list) else [])
        if isinstance(one, dict) and not one.get("draft") and not one.get("prerelease")
    ]
    tagged = {
        tag[1:]: one
        for one in told
        if (tag := str(one.get("tag_name"))).startswith("v") and _is_sayable(tag[1:])
    }
    if not tagged:
        raise MachineError(f"GitHub lists no release of {OLLAMA}.")
    name = own = None
    if pin.sha256 is not None:
        there = tagged.get(pin.version, {})
        files = _digests(there)
        name = next((name for name, digest in files.items() if digest == pin.sha256), None)
        # None of its files is the declared one, if each says what it is: one is named as another.
        is_told = len(files) == len(_assets(there))
        own = pin.sha256 if name else next(iter(files.values()), None) if is_told else None
    return Listing(
        said_by="GitHub",
        releases=tuple(
            Release(
                version=version,
                at=package_index.time_of(one.get("published_at")),
                sha256=own if version == pin.version else _digests(one).get(name or ""),
                size_bytes=_sizes(one).get(name or ""),
            )
            for version, one in tagged.items()
        ),
        pins_digest=pin.sha256 is not None,
    )


def _assets(release: Mapping[str, Any]) -> list[dict[str, Any]]:
    assets = release.get("assets")
    return [one for one in assets if isinstance(one, dict)] if isinstance(assets, list) else []


def _digests(release: Mapping[str, Any]) -> dict[str, str]:
    """Return the sha256 of each file of a release, as GitHub computed it when it was uploaded."""
    found = {}
    for one in _assets(release):
        kind, _, digest = str(one.get("digest")).partition(":")
        if kind == "sha256" and package_index.is_sha256(digest):
            found[str(one.get("name"))] = digest
    return found


def _sizes(release: Mapping[str, Any]) -> dict[str, int]:
    return {
        str(one.get("name")): one["size"]
        for one in _assets(release)
        if type(one.get("size")) is int and one["size"] > 0
    }
