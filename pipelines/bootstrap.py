"""
Set up `.venv` from requirements.lock: what `make` runs before anything else.

    python3 -m pipelines.bootstrap base      everything but torch: enough for all but `convert`
    python3 -m pipelines.bootstrap convert   and torch, which only the converter and its tests need

With `--shared`, as actions/setup asks, the environment is one of the user's cache, by the digest of
the lock: a runner lays out its checkout anew for each job, and would install all of it each time.
It holds the packages alone; the code is the checkout's, by PYTHONPATH (actions/fleet). With
`--toolchain true` it also does what `fleet toolchain` does.

Runs on the system's Python with nothing installed, so it uses the standard library and the
modules here that do the same. Quick when done already: a stamp holds the digest of the lock.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import atomic, console, proc, runner
from pipelines.errors import FleetError, MachineError, ToolError
from pipelines.toolchain import default_cache_root

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = ROOT / "work/logs/setup.log"
LOCK = ROOT / "requirements.lock"
# Outside the lock, since its digest depends on the index that a machine reaches: the CPU build
# (200 MB) where PyTorch's own index answers, else the CUDA build (5 GB on disk, runs on a CPU).
TORCH = "torch==2.13.0"
OLDEST_PYTHON = (3, 11)
# An editable install by a path, not by an import hook: the hook costs every start 40 ms.
PLAIN_PATH = ("--config-settings", "editable_mode=compat")
# Used where the machine has none; it checks every other package against the lock.
UV = "uv==0.13.8"
# The interpreter behind the environment that may be active: `.venv` cannot be made from itself.
PYTHON = getattr(sys, "_base_executable", None) or sys.executable
STAMP_NAME: Final = "gguf-fleet-setup.json"
# The environment that a machine was given by whoever set it up; nothing is installed into it.
VENV_ENV: Final = "GGUF_FLEET_VENV"
# An environment of the user's cache that no job has asked for in so long is of an old lock.
_UNUSED_FOR_S: Final = 30 * 24 * 3600.0


@dataclass(frozen=True)
class Environment:
    """
    A virtual environment.

    Attributes:
        venv: Its folder.
        log: What the installers print.
        is_shared: Whether it is one of the user's cache, which holds no code of a checkout.
    """

    venv: Path
    log: Path
    is_shared: bool

    @property
    def stamp(self) -> Path:
        """What was finished in it."""
        return self.venv / STAMP_NAME

    @property
    def name(self) -> str:
        """For people."""
        return str(self.venv) if self.is_shared else ".venv"


def main() -> int:
    """Make the environment that the caller named, or say that it is there."""
    parser = argparse.ArgumentParser(description="Set up .venv from requirements.lock.")
    parser.add_argument("profile", choices=("base", "convert"), help="how much to install")
    parser.add_argument(
        "--shared", action="store_true", help="in the user's cache, for checkouts that do not last"
    )
    parser.add_argument(
        "--toolchain",
        choices=("true", "false"),
        default="false",
        help="whether to build the pinned llama.cpp and the engine as well: `fleet toolchain`",
    )
    args = parser.parse_args()
    try:
        if args.shared:
            venv = set_up_shared(args.profile)
            runner.environment(**{VENV_ENV: str(venv)})
            runner.outputs(venv=str(venv))
            console.info(f"the environment is {venv}")
            if args.toolchain == "true":
                _build_toolchain(venv)
        else:
            set_up(args.profile)
    except FleetError as error:
        console.error(error.message)
        if error.log:
            console.info(f"  log:  {error.log}")
        if error.hint:
            console.info(f"  next: {error.hint}")
        return error.exit_code
    except KeyboardInterrupt:
        console.error("stopped. The same command goes on.")
        return 130
    return 0


def set_up(profile: str, environment: Environment | None = None) -> None:
    """
    Bring an environment to the lock: `.venv`, if none is named.

    Raises:
        MachineError: No Python that is new enough, or one without venv.
        ToolError: An installer failed; its log says why.
    """
    into = environment or Environment(VENV, LOG, is_shared=False)
    if sys.version_info < OLDEST_PYTHON:
        raise MachineError(
            f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}.",
            hint="Install python3.11 or newer, or say where one is: make PYTHON=/path/to/python3",
        )
    wanted = _lock_digest()
    done = _read_stamp(into.venv)
    if done.get("lock") == wanted and profile in done.get("profiles", ()):
        return
    if done.get("python") != sys.base_prefix:
        shutil.rmtree(into.venv, ignore_errors=True)
        done = {}
    uv = _uv(into)
    if done.get("lock") != wanted:
        console.step(f"Python packages into {into.name} (about 1 minute the first time)")
        _install(into, uv, "--require-hashes", "-r", str(LOCK))
        if not into.is_shared:
            _install(into, uv, "--no-deps", *PLAIN_PATH, "-e", str(ROOT))
        done = {"lock": wanted, "python": sys.base_prefix, "profiles": ["base"]}
        atomic.write_json(into.stamp, done)
    if profile == "convert":
        _install_torch(into, uv)
        atomic.write_json(into.stamp, {**done, "profiles": ["base", "convert"]})


def set_up_shared(profile: str) -> Path:
    """
    Bring an environment of the user's cache to the lock, and return its folder.

    One process sets it up, the others wait. What no job has asked for in 30 days is removed. An
    environment that $GGUF_FLEET_VENV names is taken as it is.

    Raises:
        MachineError: As `set_up`; or $GGUF_FLEET_VENV names no environment.
        ToolError: As `set_up`.
    """
    given = os.environ.get(VENV_ENV)
    if given:
        return _given(Path(given), profile)
    home = default_cache_root() / "environments"
    # An environment belongs to its interpreter.
    parts = (_lock_digest(), sys.base_prefix, sys.version, platform.machine())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    into = Environment(home / name, home / f"{name}.log", is_shared=True)
    home.mkdir(parents=True, exist_ok=True)
    with _alone(home / f"{name}.lock", f"the set-up of {into.name} by another job"):
        set_up(profile, into)
        os.utime(into.stamp)
    _sweep(home, keep=name)
    return into.venv


def _build_toolchain(venv: Path) -> None:
    """Let the fleet in the working directory build its tools; what it says is shown as it comes."""
    path = os.pathsep.join([str(venv / "bin"), os.environ.get("PATH", os.defpath)])
    proc.run(
        [venv / "bin/python", "-m", "pipelines", "toolchain"],
        log=ROOT / "work/logs/toolchain.log",
        env={"PATH": path},
        on_line=console.info,
    )


def _given(venv: Path, profile: str) -> Path:
    """Take the environment that the machine was given."""
    if not (venv / "bin/python").exists():
        raise MachineError(
            f"{VENV_ENV} is {venv}, where no virtual environment is.",
            hint=f"Unset {VENV_ENV}, and one is made.",
        )
    done = _read_stamp(venv)
    if done.get("lock") != _lock_digest() or profile not in done.get("profiles", ()):
        console.warn(f"{VENV_ENV} is {venv}, which was not set up for this lock; taken as it is.")
    return venv


@contextmanager
def _alone(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock of the user's cache; the kernel lets go of it however we end."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.info(f"waiting for {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(home: Path, *, keep: str) -> None:
    """Remove environments that no job has asked for in a long time."""
    for stamp in home.glob(f"*/{STAMP_NAME}"):
        venv = stamp.parent
        with contextlib.suppress(OSError):
            if venv.name != keep and time.time() - stamp.stat().st_mtime > _UNUSED_FOR_S:
                with _alone(home / f"{venv.name}.lock", f"another job, to remove {venv}"):
                    atomic.remove(venv)


def is_stale() -> bool:
    """Tell whether `.venv` was set up, and for another lock than that of this checkout."""
    done = _read_stamp(VENV)
    return bool(done) and done.get("lock") != _lock_digest()


def _lock_digest() -> str:
    """Digest of everything that decides what has to be installed."""
    parts = (LOCK.read_bytes(), (ROOT / "pyproject.toml").read_bytes(), TORCH.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _read_stamp(venv: Path) -> dict[str, Any]:
    """What an earlier run finished; nothing if it was cut."""
    try:
        stamp = json.loads((venv / STAMP_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and (venv / "bin/python").exists() else {}


def _uv(into: Environment) -> list[str]:
    """
    The uv to install with: the user's own, else one fetched into the environment.

    Creates the environment on the way.
    """
    venv = into.venv
    own = shutil.which("uv")
    if own:
        if not (venv / "bin/python").exists():
            _run(into, [own, "venv", "--quiet", "--python", PYTHON, str(venv)])
        return [own]
    try:
        import ensurepip  # noqa: F401, PLC0415 - Debian ships venv without it
    except ImportError:
        raise MachineError(
            f"{PYTHON} has no venv module.",
            hint="Debian, Ubuntu: sudo apt-get install python3-venv; or install uv.",
        ) from None
    inside = venv / "bin/uv"
    if not inside.exists():
        console.step(f"uv into {into.name}, since this machine has none (a few seconds)")
        _run(into, [PYTHON, "-m", "venv", str(venv)])
        _run(into, [str(venv / "bin/python"), "-m", "pip", "install", "--quiet", UV])
    return [str(inside)]


def _install(into: Environment, uv: list[str], *what: str) -> None:
    """Install byte-compiled, so that the first `fleet` is as fast as the second."""
    _run(into, [*uv, "pip", "install", "--compile-bytecode", *what])


def _install_torch(into: Environment, uv: list[str]) -> None:
    """Install torch: the CPU build if PyTorch's index answers within 5 s, else the ordinary one."""
    console.step("torch for the converter (the CPU build: 1 minute; the CUDA build: some more)")
    try:
        quick = {"UV_HTTP_TIMEOUT": "5", "UV_HTTP_RETRIES": "0"}
        _run(into, [*uv, "pip", "install", "--dry-run", "--torch-backend=cpu", TORCH], env=quick)
    except ToolError:
        console.info("  PyTorch's CPU index does not answer; taking the ordinary index's build.")
        _install(into, uv, TORCH)
    else:
        _install(into, uv, "--torch-backend=cpu", TORCH)


def _run(into: Environment, argv: list[str], env: dict[str, str] | None = None) -> None:
    """Run an installer with a progress line; its output goes to the log."""
    label = f"  {Path(argv[0]).name} {' '.join(argv[1:4])}"
    paths = {
        "VIRTUAL_ENV": str(into.venv),
        "UV_LINK_MODE": os.environ.get("UV_LINK_MODE", "hardlink"),
    }
    with console.Progress(label) as progress:
        proc.run(
            argv,
            log=into.log,
            cwd=ROOT,
            env={**paths, **(env or {})},
            on_line=lambda line: progress.update(0, line.strip()[:60]),
        )


if __name__ == "__main__":
    sys.exit(main())
