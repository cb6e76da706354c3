"""
Who may change which path of a fork: the operator, or the template.

The two sets are disjoint, so a fork takes the template's next version without a conflict: nothing
of the operator's is in what the template publishes (see `pipelines.template`).
"""

from __future__ import annotations

from typing import Final

# Files, and folders with their slash. Whatever the template has no file for is the operator's too.
OPERATOR: Final = (
    "params.yaml",
    "dvc.lock",
    # What the probe of this machine wrote there.
    "pipelines/dvc.lock",
    ".dvc/config",
    ".github/CODEOWNERS",
    # GitHub shows this one in place of the template's README.md.
    ".github/README.md",
    "corpora/",
    "modelfiles/",
    "results/",
)


def is_operators(path: str) -> bool:
    """
    Say whether a path is the operator's.

    Args:
        path: Of a tracked file, below the root of the repository, with forward slashes.
    """
    return any(path.startswith(one) if one.endswith("/") else path == one for one in OPERATOR)
