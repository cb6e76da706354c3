"""
What has to be there before a stage begins: said first, not after a toolchain was built for it.

DVC sees to its stages' inputs by itself; a person who types `fleet quantize KEY` in a bare clone
has nobody who does. The paths are those that `dvc.yaml` names as dependencies, less those that only
tell DVC when to run again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import wording
from pipelines.errors import FleetError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipelines.layout import Layout


# Records of a model without which there is no release.
_PUBLISHED = ("fetch", "convert", "verify", "calibrate", "evaluate", "choose", "load-test")


class InputError(FleetError):
    """A file that an earlier stage leaves is not there."""


def require(stage: str, slice_: Mapping[str, object], at: Layout) -> None:
    """
    Refuse to begin a stage whose inputs are not there.

    Args:
        stage: Its name.
        slice_: What it reads of the declaration: `model`, and of a quant `key` and `type`.
        at: The checkout.

    Raises:
        InputError: Names every input that is missing, and the command that makes all of them.
    """
    missing = [str(path) for path in paths(stage, slice_, at) if not path.exists()]
    if missing:
        key = slice_.get("key", slice_["model"])
        raise InputError(
            f"{stage} {key} needs {wording.listed(missing)}, not there yet.",
            hint=f"fleet repro {key}",
        )


def paths(stage: str, slice_: Mapping[str, object], at: Layout) -> tuple[Path, ...]:
    """Return what the stages before this one leave for it; nothing for a stage that needs none."""
    model = str(slice_.get("model"))
    key, type_ = str(slice_.get("key")), str(slice_.get("type"))
    f16 = (at.f16(model), at.model_record("convert", model))
    matrix = (at.imatrix_dir(model), at.model_record("calibrate", model))
    quant = (at.gguf(model, key), at.quant_record("quantize", model, type_))
    # Which of its quants is served, only the choice says.
    served = (at.source(model), at.f16(model), *(path.parent for path in quant))
    return {
        "convert": (at.source(model), at.model_record("fetch", model)),
        "verify": (at.source(model), at.model_record("fetch", model), *f16),
        "calibrate": f16,
        "quantize": (*f16, *(matrix if slice_.get("imatrix") else ())),
        "benchmark": (*f16, *quant, at.machine),
        "evaluate": (*f16, *(path.parent for path in quant)),
        "load-test": (*served, at.model_record("fetch", model), at.model_record("choose", model)),
        "publish": (
            at.source(model),
            at.imatrix_dir(model),
            at.gguf(model, key).parent,
            *(at.model_record(stage, model) for stage in _PUBLISHED),
            *(at.quant_record(stage, model, type_).parent for stage in ("quantize", "benchmark")),
        ),
    }.get(stage, ())
