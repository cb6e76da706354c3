"""
Workflows as `act` 0.2.87 understands them: its schema is of April 2026, and stricter than GitHub.

What is taken out has no meaning on one machine: a queue of runs, the right to a cache, a record of
a deployment. `strategy.max-parallel: 1` goes in, since act ends by a fault of its own in one of 70
runs with jobs side by side. Steps beside one another are refused: they would mean something else.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

if TYPE_CHECKING:
    from pathlib import Path

_BESIDE = frozenset({"background", "wait", "wait-all", "cancel", "parallel"})
_UNKNOWN_PERMISSIONS = ("artifact-metadata", "models", "vulnerability-alerts")


def lower(root: Path) -> None:
    """Lower every workflow of a checkout in place."""
    for path in sorted((root / ".github/workflows").glob("*.y*ml")):
        path.write_text(lowered(path.read_text(encoding="utf-8")), encoding="utf-8")


def lowered(text: str) -> str:
    """
    Lower the text of one workflow.

    Raises:
        ValueError: It uses what cannot be lowered without another meaning.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1 << 16
    workflow = yaml.load(text)
    _lower_part(workflow)
    for job in workflow["jobs"].values():
        _lower_part(job)
        if isinstance(job.get("strategy"), CommentedMap):
            job["strategy"]["max-parallel"] = 1
        for step in job.get("steps", ()):
            beside = _BESIDE & set(step)
            if beside:
                raise ValueError(f"{', '.join(sorted(beside))}: steps beside one another")
            _lower_uses(step)
        _lower_uses(job)
    out = io.StringIO()
    yaml.dump(workflow, out)
    return out.getvalue()


def _lower_part(part: Any) -> None:
    """Take out what stands in a workflow as well as in a job."""
    part.pop("cache-mode", None)
    part.pop("snapshot", None)
    for name, key in (("concurrency", "queue"), ("environment", "deployment")):
        if isinstance(part.get(name), CommentedMap):
            part[name].pop(key, None)
    if isinstance(part.get("permissions"), CommentedMap):
        for right in _UNKNOWN_PERMISSIONS:
            part["permissions"].pop(right, None)


def _lower_uses(part: Any) -> None:
    if str(part.get("uses", "")).startswith("$/"):
        part["uses"] = f"./{part['uses'][2:]}"
