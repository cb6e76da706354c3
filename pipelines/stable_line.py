"""Writes `stable:` of one model into params.yaml, and not a byte beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import pin_lines

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, model: str, value: str) -> bool:
    """
    Make `value` the release that params.yaml wants for a model.

    Args:
        path: params.yaml.
        model: Key of a declared model.
        value: `latest` or a release id.

    Returns:
        Whether the file was changed; it is left untouched where it already says so.

    Raises:
        ParamsError, MachineError: See `pin_lines.write`.
    """
    return pin_lines.write(path, {("models", model, "stable"): value})
