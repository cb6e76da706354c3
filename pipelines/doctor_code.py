"""
Whose code runs: that of the checkout we stand in, or another one's.

The console script `fleet` belongs to the environment that is active, and runs the checkout which
that was made for, wherever it is typed. A folder beside `params.yaml` is not looked at. Two
checkouts of different versions would so measure by the wrong rules, and nobody would see it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.doctor_lines import Line

RUNNING: Final = Path(__file__).resolve().parent
# What makes a folder a checkout of the template with code of its own.
_OURS: Final = ("pipelines/__main__.py", "dvc.yaml")
OTHER: Final = "the code that runs is that of ANOTHER checkout"


def is_other(root: Path) -> bool:
    """Say whether a checkout has code of its own, and another one runs; costs a few stats."""
    mine = root / "pipelines"
    try:
        return not mine.samefile(RUNNING) and all((root / each).exists() for each in _OURS)
    except OSError:
        return False  # it has none


def differs(root: Path) -> bool:
    """Say whether the code that runs is not, byte for byte, what a checkout has."""
    return is_other(root) and _code(root / "pipelines") != _code(RUNNING)


def _code(package: Path) -> dict[str, bytes]:
    return {
        path.relative_to(package).as_posix(): path.read_bytes()
        for path in sorted(package.rglob("*.py"))
    }


def way_back(root: Path) -> str:
    """Return what to paste so that the checkout's own code runs."""
    place = root / ".venv"
    activate = ". .venv/bin/activate"
    if place.is_symlink():
        # Its console script runs the checkout that it was made in.
        return f"rm .venv    # it is the one of another checkout\nmake setup\n{activate}"
    if not (place / "bin/activate").exists():
        return f"make setup\n{activate}"
    if place.resolve() == Path(sys.prefix).resolve():
        return "unset PYTHONPATH    # and if that was not it: rm -r .venv; make setup"
    return activate


def lines(root: Path) -> Iterator[Line]:
    """Say whose code runs; one of the same bytes does no harm until somebody edits either."""
    from pipelines.doctor_lines import fail, ok, warn  # noqa: PLC0415 - every verb asks `is_other`

    where = RUNNING.parent
    if not is_other(root):
        yield ok("repository", "code", f"what runs is {where}")
    elif differs(root):
        text = f"{OTHER}: {where}; every other line is by its rules"
        yield fail("repository", "code", text, way_back(root))
    else:
        text = f"{OTHER}: {where}, the same to the byte until one of them is edited"
        yield warn("repository", "code", text, way_back(root))
