"""
Set up `.venv` from requirements.lock: what `make` runs before anything else.

    python3 -m pipelines.bootstrap base      everything but torch: enough for all but `convert`
    python3 -m pipelines.bootstrap convert   and torch, which only the converter and its tests need

Runs on the system's Python with nothing installed, so it uses the standard library and the
modules here that do the same. Quick when done already: a stamp holds the digest of the lock.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from pipelines import atomic, console, proc
from pipelines.errors import FleetError, MachineError, ToolError

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "gguf-fleet-setup.json"
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


def main() -> int:
    """Make the environment that the caller named, or say that it is there."""
    parser = argparse.ArgumentParser(description="Set up .venv from requirements.lock.")
    parser.add_argument("profile", choices=("base", "convert"), help="how much to install")
    profile = parser.parse_args().profile
    try:
        set_up(profile)
    except FleetError as error:
        console.error(error.message)
        if error.log:
            console.info(f"  log:  {error.log.relative_to(ROOT)}")
        if error.hint:
            console.info(f"  next: {error.hint}")
        return error.exit_code
    except KeyboardInterrupt:
        console.error("stopped. The same command goes on.")
        return 130
    return 0


def set_up(profile: str) -> None:
    """
    Bring `.venv` to the lock.

    Raises:
        MachineError: No Python that is new enough, or one without venv.
        ToolError: An installer failed; its log says why.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise MachineError(
            f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}.",
            hint="Install python3.11 or newer, or say where one is: make PYTHON=/path/to/python3",
        )
    wanted = _lock_digest()
    done = _read_stamp()
    if done.get("lock") == wanted and profile in done.get("profiles", ()):
        return
    if done.get("python") != sys.base_prefix:
        shutil.rmtree(VENV, ignore_errors=True)
        done = {}
    uv = _uv()
    if done.get("lock") != wanted:
        console.step("Python packages into .venv (about 1 minute the first time)")
        _install(uv, "--require-hashes", "-r", str(LOCK))
        _install(uv, "--no-deps", *PLAIN_PATH, "-e", str(ROOT))
        done = {"lock": wanted, "python": sys.base_prefix, "profiles": ["base"]}
        atomic.write_json(STAMP, done)
    if profile == "convert":
        _install_torch(uv)
        atomic.write_json(STAMP, {**done, "profiles": ["base", "convert"]})


def _lock_digest() -> str:
    """Digest of everything that decides what has to be installed."""
    parts = (LOCK.read_bytes(), (ROOT / "pyproject.toml").read_bytes(), TORCH.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _read_stamp() -> dict[str, Any]:
    """What an earlier run finished; nothing if it was cut."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and (VENV / "bin/python").exists() else {}


def _uv() -> list[str]:
    """
    The uv to install with: the user's own, else one fetched into the environment.

    Creates `.venv` on the way.
    """
    own = shutil.which("uv")
    if own:
        if not (VENV / "bin/python").exists():
            _run([own, "venv", "--quiet", "--python", PYTHON, str(VENV)])
        return [own]
    try:
        import ensurepip  # noqa: F401, PLC0415 - Debian ships venv without it
    except ImportError:
        raise MachineError(
            f"{PYTHON} has no venv module.",
            hint="Debian, Ubuntu: sudo apt-get install python3-venv; or install uv.",
        ) from None
    inside = VENV / "bin/uv"
    if not inside.exists():
        console.step("uv into .venv, since this machine has none (a few seconds)")
        _run([PYTHON, "-m", "venv", str(VENV)])
        _run([str(VENV / "bin/python"), "-m", "pip", "install", "--quiet", UV])
    return [str(inside)]


def _install(uv: list[str], *what: str, env: dict[str, str] | None = None) -> None:
    """Install into `.venv`, byte-compiled, so that the first `fleet` is as fast as the second."""
    _run([*uv, "pip", "install", "--compile-bytecode", *what], env=env)


def _install_torch(uv: list[str]) -> None:
    """Install torch: the CPU build if PyTorch's index answers within 5 s, else the ordinary one."""
    console.step("torch for the converter (the CPU build: 1 minute; the CUDA build: some more)")
    try:
        quick = {"UV_HTTP_TIMEOUT": "5", "UV_HTTP_RETRIES": "0"}
        _run([*uv, "pip", "install", "--dry-run", "--torch-backend=cpu", TORCH], env=quick)
    except ToolError:
        console.info("  PyTorch's CPU index does not answer; taking the ordinary index's build.")
        _install(uv, TORCH)
    else:
        _install(uv, "--torch-backend=cpu", TORCH)


def _run(argv: list[str], env: dict[str, str] | None = None) -> None:
    """Run an installer with a progress line; its output goes to the log."""
    label = f"  {Path(argv[0]).name} {' '.join(argv[1:4])}"
    paths = {"VIRTUAL_ENV": str(VENV), "UV_LINK_MODE": os.environ.get("UV_LINK_MODE", "hardlink")}
    with console.Progress(label) as progress:
        proc.run(
            argv,
            log=LOG,
            cwd=ROOT,
            env={**paths, **(env or {})},
            on_line=lambda line: progress.update(0, line.strip()[:60]),
        )


if __name__ == "__main__":
    sys.exit(main())
