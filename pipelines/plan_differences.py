"""
What a branch changes in the declaration of a model, as sentences: `gates.x 0.05 -> 0.02`.

Compared is what the stages read, resolved: a gate that only moved from the fleet to a model changes
nothing, and a default that a new version of the code has changed shows where it counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from pipelines import declaration, wording
from pipelines.coverage import differences
from pipelines.params import quants_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.params import Declaration

# Of these stages every value is read by nobody else, or under the same name.
_STAGES: Final = ("fetch", "verify", "evaluate", "benchmark", "choose", "load-test", "publish")
# Said otherwise, or of no meaning to a reader.
_LEFT_OUT: Final = frozenset({"model", "key", "type", "quants", "recipe"})
# Of what decides a release, that which nothing measures.
_OF_RELEASE: Final = frozenset(
    {"stable", "license", "waivers", "compare_required", "compare_effects", "registry"}
)
_SHOWN: Final = 40
_CHARACTERS: Final = 300


@dataclass(frozen=True, kw_only=True)
class Difference:
    """
    What happened to a model.

    Attributes:
        change: In one word.
        what: As sentences, none if nothing did.
    """

    change: Literal["added", "changed", "removed", "unchanged"]
    what: tuple[str, ...] = ()


def of_fleet(base: Declaration | None, head: Declaration) -> dict[str, Difference]:
    """
    Compare two declarations.

    Args:
        base: What was; None if nobody knows, and everything is new then.
        head: What is.

    Returns:
        By model, those of the head in its order, then those that are no more.
    """
    before = _views(base) if base else {}
    after = _views(head)
    found: dict[str, Difference] = {}
    for model in head.models:
        if base is None or model not in base.models:
            found[model] = Difference(change="added", what=_added(base, head, model))
            continue
        lines = _lines(before[model], after[model])
        if more := len(lines) - _SHOWN:
            lines = [*lines[:_SHOWN], wording.counted(more, "more change")] if more > 0 else lines
        found[model] = Difference(
            change="changed" if lines else "unchanged",
            what=tuple(wording.shortened(line, _CHARACTERS) for line in lines),
        )
    for model in base.models if base else ():
        if model not in head.models:
            new = _same_source(base, model, head) if base else None
            told = f"it is now called {new}" if new else "it is not declared any more"
            found[model] = Difference(change="removed", what=(told,))
    return found


def _added(base: Declaration | None, head: Declaration, model: str) -> tuple[str, ...]:
    """Say what a new model is, and what it was called."""
    spec = head.models[model]
    types: list[str] = list(quants_of(head, model).values())
    told = (
        f"new: {wording.shortened(spec.source, 120)} at {spec.revision[:7]}, "
        f"{wording.counted(len(types), 'quant')}: {wording.first_few(types)}"
    )
    old = _same_source(head, model, base) if base else None
    return (told, *([f"it was called {old}"] if old else []))


def _same_source(one: Declaration, model: str, other: Declaration) -> str | None:
    """Return the model of another declaration that is this one under a name that went or came."""
    spec = one.models[model]
    return next(
        (
            name
            for name, each in other.models.items()
            if name not in one.models
            and (each.source, each.revision) == (spec.source, spec.revision)
        ),
        None,
    )


@dataclass(frozen=True, kw_only=True)
class _View:
    """What the stages read of one model: of all of it, and of each quant by its type."""

    common: dict[str, Any]
    quants: dict[str, dict[str, Any]]


def _views(declared: Declaration) -> dict[str, _View]:
    slices = {
        name: json.loads(slice_.model_dump_json())
        for name, slice_ in declaration.slices(declared).items()
    }
    pin = json.loads(declared.toolchain.model_dump_json())
    found: dict[str, _View] = {}
    for model in declared.models:
        common: dict[str, Any] = {"toolchain": pin}
        for stage in _STAGES:
            if stage == "benchmark":
                continue
            told = slices[stage, model]
            common[stage] = _kept(told, only=_OF_RELEASE if stage == "publish" else None)
        # A model has two corpora, of which one is for this alone.
        common["calibrate"] = {"calibration": _kept(slices["calibrate", model])}
        quants: dict[str, dict[str, Any]] = {
            type_: {stage: _kept(slices[stage, key]) for stage in ("quantize", "benchmark")}
            for key, type_ in quants_of(declared, model).items()
        }
        found[model] = _View(common=common, quants=quants)
    return found


def _kept(told: Mapping[str, Any], *, only: frozenset[str] | None = None) -> dict[str, Any]:
    return {
        name: value
        for name, value in told.items()
        if name not in _LEFT_OUT and (only is None or name in only)
    }


def _lines(before: _View, after: _View) -> list[str]:
    """Say every difference once, whatever number of stages read it."""
    lines = differences(before.common["toolchain"], after.common["toolchain"], "toolchain")
    for stage, told in after.common.items():
        if stage != "toolchain":
            lines += differences(before.common[stage], told)
    lines += [f"{type_} is new" for type_ in after.quants if type_ not in before.quants]
    lines += [f"{type_} is gone" for type_ in before.quants if type_ not in after.quants]
    both = [type_ for type_ in after.quants if type_ in before.quants]
    of_each = {
        type_: [
            line
            for stage, told in after.quants[type_].items()
            for line in differences(before.quants[type_][stage], told)
        ]
        for type_ in both
    }
    for type_, own in of_each.items():
        for line in own:
            is_common = all(line in others for others in of_each.values())
            lines.append(line if is_common else f"{type_}: {line}")
    return list(dict.fromkeys(lines))
