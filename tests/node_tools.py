"""
What tests take from npm: single files of packages, and the payloads of GitHub's webhooks.

    openapi()                                     GitHub's own description of its REST API
    payload("pull_request", "synchronize")        what GitHub sends, as it documents it

Where npm is absent or its registry out of reach, the test is skipped with a line that says so.
"""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import filelock
import pytest

from checks import installed
from pipelines import atomic, proc
from pipelines.errors import ToolError

_WITHIN_S: Final = 300.0


@dataclass(frozen=True)
class NpmFile:
    """One file of a package at one version; `integrity` is sha512 of the package in base64."""

    package: str
    version: str
    member: str
    integrity: str


OPENAPI: Final = NpmFile(
    "@octokit/openapi",
    "23.0.2",
    "package/generated/api.github.com.json",
    "pV8M7L9GY23AybNvTmo2nyjmpmnt6+2sRE/tqr0ZLQcPS4lnw7u5eZGNmwRNkBC3D7gZXbFx5AHzLUVRBXGDhg==",
)


def npm_file(wanted: NpmFile) -> Path:
    """
    Return a file of a package, in the user's cache; the rest of the package is not kept.

    Raises:
        MissingError: There is no npm, no way to its registry, or the package is another one.
    """
    label = wanted.package.removeprefix("@").replace("/", "-")
    place = installed.home() / f"{label}-{wanted.version}-{Path(wanted.member).name}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{place}.lock"):
        if not place.is_file():
            npm = shutil.which("npm")
            if npm is None:
                raise installed.MissingError("npm is not installed (Debian: apt-get install npm)")
            work = place.with_name(f"{place.name}.work")
            atomic.remove(work)
            work.mkdir()
            try:
                _extract(npm, wanted, work, place)
            finally:
                atomic.remove(work)
    return place


def _extract(npm: str, wanted: NpmFile, work: Path, place: Path) -> None:
    name = f"{wanted.package}@{wanted.version}"
    argv = [npm, "pack", name, "--ignore-scripts", "--pack-destination", str(work)]
    try:
        proc.run(argv, log=work / "log", timeout_s=_WITHIN_S)
    except ToolError as error:
        last = error.message.strip().splitlines()[-1]
        raise installed.MissingError(f"{name} cannot be had: {last}") from error
    (archive,) = work.glob("*.tgz")
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != wanted.integrity:
        raise installed.MissingError(f"{name} is not what it was: sha512 {found}")
    with tarfile.open(archive) as tar:
        file = tar.extractfile(wanted.member)
        assert file is not None
        with atomic.replacing(place) as staging, staging.open("wb") as target:
            shutil.copyfileobj(file, target)


def openapi() -> Path:
    """Return the path of GitHub's OpenAPI description; the test is skipped without it."""
    try:
        return npm_file(OPENAPI)
    except installed.MissingError as missing:
        pytest.skip(missing.message)


def payload(kind: str, action: str | None = None, **patch: Any) -> dict[str, Any]:
    """
    Return a payload of a webhook, as GitHub documents it, with some of it changed.

    Args:
        kind: Of the event: `pull_request`.
        action: Its activity: `synchronize`; the first example if absent.
        patch: Merged into it, dictionaries key by key: `workflow_run={"head_sha": sha}`.
    """
    for example in _examples().get(kind, ()):
        if action is None or example.get("action") == action:
            return merged(copy.deepcopy(example), patch)
    raise AssertionError(f"there is no example of {kind} {action}")


def merged(there: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """Change a JSON object in place, inner objects key by key; return it."""
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(there.get(key), dict):
            merged(there[key], value)
        else:
            there[key] = value
    return there


@functools.cache
def _examples() -> dict[str, list[dict[str, Any]]]:
    try:
        folder = installed.node_packages() / "node_modules/@octokit/webhooks-examples"
    except installed.MissingError as missing:
        pytest.skip(missing.message)
    kinds = json.loads((folder / "api.github.com/index.json").read_text(encoding="utf-8"))
    return {kind["name"]: kind["examples"] for kind in kinds}
