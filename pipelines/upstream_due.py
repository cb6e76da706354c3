"""
Whether it is time to look at upstream again: what `--if-due` asks, at every `dvc repro`.

Nothing heavy is imported: on most days the answer is no, and that is all that the stage does.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.layout import Layout


def params_sha256(at: Layout) -> str | None:
    """Return the digest of params.yaml; None if it cannot be read."""
    try:
        return hashlib.sha256(at.params.read_bytes()).hexdigest()
    except OSError:
        return None


def is_fresh(at: Layout, *, now: datetime | None = None) -> bool:
    """
    Tell whether the last look at this very declaration is younger than its period.

    Anything odd about the record of the last look, a time to come included, means no.
    """
    now = now or datetime.now(UTC)
    if not at.upstream_notices.is_file():
        return False
    try:
        told = json.loads(at.upstream.read_bytes())
        declared = told["params_sha256"]
        checked_at = datetime.fromisoformat(told["checked_at"])
        next_at = datetime.fromisoformat(told["next_at"])
        return declared == params_sha256(at) and checked_at <= now < next_at
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False
