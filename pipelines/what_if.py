"""
`fleet choose MODEL --what-if vram_mib=12288`: what would be chosen under other limits.

The measurements are those on disk; only limits change, and nothing is written. What would need
another measurement (a context, a depth, a quant that is not there) cannot be asked.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ValidationError

from pipelines import choose, console, wording
from pipelines.errors import ParamsError
from pipelines.params import Choose, ChooseSlice, Gates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.layout import Layout
    from pipelines.records import ChoiceRecord, HostChoice

_HOST_KEYS: Final = ("vram_mib", "memory_mib", "margin_mib")
# What a person types to take a limit away.
_NOTHING: Final = frozenset({"none", "off"})


def main(slice_: ChooseSlice, at: Layout, asked: Sequence[str], *, as_json: bool) -> int:
    """
    Choose under other limits and say what that changes.

    Args:
        slice_: The declaration.
        at: The checkout.
        asked: `NAME=VALUE` each; a limit of one host alone as `HOST.NAME=VALUE`.
        as_json: Print the choice as JSON.

    Raises:
        ParamsError: A name is no limit, or a value is none that it may have.
    """
    changed = apply(slice_, asked)
    incumbents, _ = choose.committed_winners(slice_.model, at)
    now = choose.decide(slice_, at, incumbents)
    then = choose.decide(changed, at, incumbents)
    if as_json:
        told = {"what_if": list(asked), "choice": json.loads(then.model_dump_json())}
        console.out(json.dumps(told, indent=2))
    else:
        console.out(text(asked, now, then))
    return 0


def apply(slice_: ChooseSlice, asked: Sequence[str]) -> ChooseSlice:
    """Return the declaration with other limits; see `main`."""
    for each in asked:
        slice_ = _applied(slice_, each)
    return slice_


def _applied(slice_: ChooseSlice, asked: str) -> ChooseSlice:
    name, equals, value = (part.strip() for part in asked.partition("="))
    if not equals or not name or not value:
        raise ParamsError(
            f"--what-if {wording.quoted(asked)} is not NAME=VALUE.",
            hint="fleet choose MODEL --what-if vram_mib=12288",
        )
    host, _, key = name.rpartition(".")
    if host and host not in slice_.hosts:
        raise ParamsError(
            f"--what-if: host {wording.quoted(host)} is not declared"
            f"{wording.did_you_mean(host, slice_.hosts) or '.'}",
            hint=f"Declared: {wording.listed(list(slice_.hosts))}.",
        )
    if key in _HOST_KEYS:
        hosts = {
            each: _with(spec, key, value, asked) if host in {"", each} else spec
            for each, spec in slice_.hosts.items()
        }
        return slice_.model_copy(update={"hosts": hosts})
    if host:
        raise ParamsError(
            f"--what-if {wording.quoted(asked)}: a host has {wording.listed(list(_HOST_KEYS))}."
        )
    if key == "objective":
        changed: ChooseSlice = _with(slice_, key, value, asked)
        return changed
    if key in Gates.model_fields:
        return slice_.model_copy(update={"gates": _with(slice_.gates, key, value, asked)})
    if key in Choose.model_fields:
        return slice_.model_copy(update={"choose": _with(slice_.choose, key, value, asked)})
    known = [*_HOST_KEYS, "objective", *Gates.model_fields, *Choose.model_fields]
    raise ParamsError(
        f"--what-if: {wording.quoted(key)} is no limit{wording.did_you_mean(key, known) or '.'}",
        hint=f"Limits: {wording.listed(known)}.",
    )


def _with(part: Any, key: str, value: str, asked: str) -> Any:  # noqa: ANN401 - any closed model
    """Replace one value, checked as params.yaml checks it."""
    assert isinstance(part, BaseModel), "a part of a slice"
    told: Mapping[str, Any] = dict(part)
    try:
        return type(part).model_validate({**told, key: _value(value)})
    except ValidationError as error:
        why = error.errors(include_url=False)[0]["msg"]
        raise ParamsError(f"--what-if {wording.quoted(asked)}: {why}.") from error


def _value(text: str) -> int | float | str | None:
    """Read a value as YAML reads a plain scalar: a whole number, a number, or a word."""
    if text in _NOTHING:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# --- words ------------------------------------------------------------------------------------


def text(asked: Sequence[str], now: ChoiceRecord, then: ChoiceRecord) -> str:
    """Say for each host what would be chosen, whether that is another quant, and why."""
    lines = [f"{then.model}, if {wording.listed(list(asked))}; nothing was written"]
    for before, after in zip(now.hosts, then.hosts, strict=True):
        lines += ["", *_host_lines(before, after)]
    return "\n".join(console.clean(line) for line in lines)


def _host_lines(before: HostChoice, after: HostChoice) -> list[str]:
    lines = [f"host {after.host}: {after.sentence}"]
    if before.winner == after.winner:
        lines.append(f"  as it is now: {after.winner or 'nothing is chosen'}")
    else:
        lines.append(f"  now it is {before.winner or 'nothing'}: {before.sentence}")
    if after.binding:
        lines.append(f"  {after.binding}")
    lines += [f"  {candidate.verdict:8} {candidate.sentence}" for candidate in after.candidates]
    return lines
