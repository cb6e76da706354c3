"""
Which releases a Go module has: by Go, as it is configured (GOPROXY and the like, `go env -w`).

A module proxy lists the versions that it has seen, and a mirror of a company lists those that
somebody asked it for: a list is a lower bound. Whoever reads one looks first whether it has the
version that is in use. The time of a version is that of its commit, which its author chose.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import console, package_index, proc, wording
from pipelines.errors import FleetError, RetryLaterError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime

# A version that is a release: no pre-release, no `+incompatible`.
_RELEASE: Final = re.compile(r"v(\d{1,4}\.\d{1,4}\.\d{1,4})")
_GO_LINE: Final = re.compile(r"(?m)^go[ \t]+(\d{1,3}(?:\.\d{1,3}){1,2})[ \t]*(?://.*)?$")
_MOST_MOD_BYTES: Final = 1 << 20
_MOST_VERSIONS: Final = 20_000
_MOST_BYTES: Final = 16 << 20


@dataclass(frozen=True, kw_only=True)
class ModuleVersion:
    """
    One release of a module.

    Attributes:
        version: Without its `v`.
        committed_at: When its commit was made, by whoever made it.
        go: The Go that its go.mod asks for; None if it does not say.
    """

    version: str
    committed_at: datetime | None
    go: str | None


class GoSilentError(RetryLaterError):
    """Go cannot say it, or not now; the message is a sentence."""


def key(version: str) -> tuple[int, ...]:
    """Return what orders releases: `0.10.0` is newer than `0.9.9`."""
    return tuple(map(int, version.split(".")))


def releases(module: str, go: Path, *, within_s: float) -> tuple[str, ...]:
    """
    Return the releases that Go finds, newest first, without those that their author retracted.

    Args:
        module: Its path.
        go: The program.
        within_s: Seconds for all of it.

    Raises:
        GoSilentError: No proxy answers, it does not have the module, or its answer is none.
    """
    found = next(iter(_asked(["-versions", f"{module}@latest"], module, go, within_s)), {})
    listed = found.get("Versions") or [found.get("Version")]
    versions = _releases(listed if isinstance(listed, list) else [])
    if not versions:
        raise GoSilentError(f"Go's module proxy lists no release of {module}.")
    return versions


def described(
    module: str, versions: Sequence[str], go: Path, *, within_s: float
) -> dict[str, ModuleVersion]:
    """
    Return what Go says of releases, by version; one that it cannot describe is left out.

    Args:
        module: Its path.
        versions: Without their `v`.
        go: The program.
        within_s: Seconds for all of it.

    Raises:
        GoSilentError: See `releases`.
    """
    if not versions:
        return {}
    wanted = [f"{module}@v{version}" for version in versions]
    found = {}
    for one in _asked(["-e", *wanted], module, go, within_s):
        release = _RELEASE.fullmatch(str(one.get("Version")))
        if release is None or one.get("Error") or release[1] not in versions:
            continue
        found[release[1]] = ModuleVersion(
            version=release[1],
            committed_at=package_index.time_of(one.get("Time")),
            go=one["GoVersion"],
        )
    return found


def _releases(listed: Iterable[object]) -> tuple[str, ...]:
    found = {
        release[1]
        for one in list(listed)[:_MOST_VERSIONS]
        if isinstance(one, str) and (release := _RELEASE.fullmatch(one))
    }
    return tuple(sorted(found, key=key, reverse=True))


def _asked(words: list[str], module: str, go: Path, within_s: float) -> list[dict[str, Any]]:
    """Return the objects that `go list -m -json` prints, each with the Go that its go.mod wants."""
    with tempfile.TemporaryDirectory(prefix="fleet-go-") as folder:
        argv: list[str | Path] = [go, "list", "-m", "-json", *words]
        try:
            said = proc.answer(argv, cwd=Path(folder), env=_environment(folder), within_s=within_s)
            found = list(_objects(said[:_MOST_BYTES].decode().strip()))
        except FleetError as error:
            cause = _cause(error)
            raise GoSilentError(f"Go cannot say what is newest of {module}: {cause}.") from error
        except (ValueError, RecursionError) as error:
            raise GoSilentError(f"Go prints something about {module} that is no JSON.") from error
        return [one | {"GoVersion": _wanted_go(one, Path(folder))} for one in found]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield JSON objects that follow each other."""
    while text:
        one, end = json.JSONDecoder().raw_decode(text)
        yield one if isinstance(one, dict) else {}
        text = text[end:].lstrip()


def _wanted_go(one: dict[str, Any], folder: Path) -> str | None:
    """Return the Go that a go.mod wants; Go itself does not say it where it is too old for it."""
    place = Path(str(one.get("GoMod"))).resolve()
    if not place.is_relative_to(folder.resolve()) or not place.is_file():
        return None
    found = _GO_LINE.search(place.read_bytes()[:_MOST_MOD_BYTES].decode(errors="replace"))
    return found[1] if found else None


def _environment(folder: str) -> dict[str, str]:
    """
    What Go is told beside the user's own settings.

    A cache of its own, so that nothing old is taken for an answer, and one that can be removed.
    GOFLAGS and GOWORK of the user are for their own modules. GOTOOLCHAIN: see `ollama_install`.
    """
    return {
        "GOPATH": f"{folder}/path",
        "GOMODCACHE": f"{folder}/modules",
        "GOCACHE": f"{folder}/cache",
        "GOTMPDIR": folder,
        "GOFLAGS": "-modcacherw",
        "GOWORK": "off",
        "GO111MODULE": "on",
        "GOTOOLCHAIN": os.environ.get("GOTOOLCHAIN") or "local",
    }


def _cause(error: FleetError) -> str:
    """Return Go's last words, without the addresses in them, which may hold a password."""
    lines = [line.strip() for line in error.message.splitlines() if line.strip()]
    last = re.sub(r"\b[a-z+]+://\S+", "(an address)", lines[-1] if lines else "it does not run")
    return wording.shortened(console.clean(last), 300).rstrip(".")
