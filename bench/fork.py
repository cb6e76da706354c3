"""A fork to measure in, and what a command cost."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import sample  # noqa: E402 - beside the tests, which are no package

BLOCK_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one command cost, its children included; `written_bytes` are blocks that got dirty."""

    wall_s: float
    cpu_s: float
    written_bytes: int


def environment() -> dict[str, str]:
    """Variables under which the fork's own stages find this interpreter and this code."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT)}


def run(argv: list[str], cwd: Path) -> str:
    """
    Run a command and return what it printed.

    Raises:
        SystemExit: It failed; its last words are shown.
    """
    done = subprocess.run(  # noqa: S603 - our own argv
        argv, cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stdout[-3000:] + done.stderr[-3000:])
        raise SystemExit(f"{shlex.join(argv)} ended with exit code {done.returncode}")
    return done.stdout


def cost_of(argv: list[str], cwd: Path) -> Cost:
    """Run a command and account for it and everything below it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    run(argv, cwd)
    wall_s = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(
        wall_s=wall_s,
        cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        written_bytes=(after.ru_oublock - before.ru_oublock) * BLOCK_BYTES,
    )


def checkout(root: Path) -> Path:
    """Make a fork of the fleet of the tests, with the pins of this repository; without a cache."""
    sample.take(root, *sample.CHECKOUT)
    (root / "pipelines/dvc.lock").unlink()
    git = shutil.which("git") or "git"
    subprocess.run([git, "init", "-q"], cwd=root, check=True)  # noqa: S603 - constant argv
    return root
