"""
`fleet releases MODEL`: who moved `stable` to which release, when and why, and what is still there.

The history is that of the registry and that of the ledger in git, together: a registry remembers
the last moves and may have lost some, the ledger remembers all but knows nothing of a move that was
made elsewhere and not committed. Where they differ, the row says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines import console, wording
from pipelines.errors import FleetError, StoreError
from pipelines.ledger import Ledger
from pipelines.registries import (
    Failures,
    Shelf,
    answers,
    first_alias,
    history,
    names,
    print_json,
    require_model,
    when,
)
from pipelines.release_records import STABLE, short
from pipelines.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.registries import Told
    from pipelines.release_records import Alias
    from pipelines.stores.base import Store

_HEADS: tuple[str, ...] = (
    "", "#", "when (UTC)", "action", "release", "files", "who", "why",
)  # fmt: skip
_MAX_WHO_CHARACTERS = 24
_MAX_WHY_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class Row:
    """One move, or one release that no alias has meant, and what is there of it."""

    told: Told | None
    release: str
    state: str
    is_stable: bool


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What one registry tells of a model; `wanted` is what params.yaml says."""

    registry: str
    address: str
    wanted: str
    stable: str | None
    rows: tuple[Row, ...]


def main(
    declared: Declaration, at: Layout, *, model: str, registry: str | None, as_json: bool
) -> int:
    """
    Print the history of a model, in one registry or in all.

    Args:
        declared: The declaration.
        at: The checkout.
        model: Its key.
        registry: Key of one registry; None for all. Those that hold nothing of it are left out.
        as_json: Print JSON.

    Returns:
        0, or the exit code of the first registry that could not be asked.

    Raises:
        ParamsError: The model or the registry is not declared.
        LedgerError: The ledger is broken.
    """
    require_model(declared, model)
    ledger = Ledger.load(at.ledger(model), model)
    failures = Failures()
    found: list[Listed] = []
    wanted = declared.models[model].stable
    if registry is not None:
        store = open_store(registry, declared, at.root)
        found.append(listed(store, first_alias(store, model), wanted, model, ledger))
    else:
        for name, (store, alias) in _asked(declared, at, model, failures).items():
            with failures.of(name):
                one = listed(store, alias, wanted, model, ledger)
                if one.rows:
                    found.append(one)
    if as_json:
        told = [_as_json(one) for one in found]
        print_json(
            {
                "model": model,
                "wanted": wanted,
                "registries": told,
                "errors": failures.as_json(),
            }
        )
    else:
        _print(model, declared, found, failures)
    return failures.exit_code


def _asked(
    declared: Declaration, at: Layout, model: str, failures: Failures
) -> dict[str, tuple[Store, Alias | None]]:
    """Ask all registries at once for `stable`; those that cannot be asked go to `failures`."""
    stores: dict[str, Store] = {}
    for name in names(declared):
        with failures.of(name):
            stores[name] = open_store(name, declared, at.root)
    found: dict[str, tuple[Store, Alias | None]] = {}
    asked = answers({name: partial(_alias, store, model) for name, store in stores.items()})
    for name, alias in asked.items():
        if isinstance(alias, FleetError):
            failures.add(name, alias)
        else:
            found[name] = stores[name], alias
    return found


def _alias(store: Store, model: str) -> Alias | None:
    return store.read_alias(model, STABLE)[0]


def listed(store: Store, alias: Alias | None, wanted: str, model: str, ledger: Ledger) -> Listed:
    """
    Say what a registry tells of `stable`, and ask what is there of each release.

    Args:
        store: The registry.
        alias: What it says of `stable`.
        wanted: What params.yaml says of it.
        model: Key of the model.
        ledger: Of the model.

    Raises:
        StoreError: What it gives cannot be read.
        RetryLaterError: It cannot be reached any more.
    """
    told = history(alias, ledger.moves(store.name, STABLE))
    shelf = Shelf(store, model)
    stable = alias.release if alias else None
    moved = dict.fromkeys(each.move.release for each in told)
    others = [id_ for id_ in sorted(store.list_releases(model)) if id_ not in moved]
    states: dict[str, str] = {}
    with console.Progress(
        f"asking {store.name}", total=len(moved) + len(others), unit="releases"
    ) as progress:
        for done, id_ in enumerate((*moved, *others)):
            progress.update(done)
            states[id_] = _state(shelf, id_)
    rows = [
        Row(
            told=each,
            release=each.move.release,
            state=states[each.move.release],
            is_stable=alias is not None and each.move == alias.moves[-1],
        )
        for each in told
    ]
    rows += [Row(told=None, release=id_, state=states[id_], is_stable=False) for id_ in others]
    return Listed(
        registry=store.name,
        address=console.clean(store.shown),
        wanted=wanted,
        stable=stable,
        rows=tuple(rows),
    )


def _state(shelf: Shelf, id_: str) -> str:
    """Say whether a release is whole, collected, or cannot be read."""
    try:
        return shelf.held(id_).word
    except StoreError:
        return "unreadable"


def _as_json(one: Listed) -> dict[str, Any]:
    return {
        "registry": one.registry,
        "address": one.address,
        "stable": one.stable,
        "moves": [
            {
                **json.loads(row.told.move.model_dump_json()),
                "state": row.state,
                "is_stable": row.is_stable,
                "in_registry": row.told.in_registry,
                "in_ledger": row.told.in_ledger,
            }
            for row in one.rows
            if row.told
        ],
        "never_stable": [
            {"release": row.release, "state": row.state} for row in one.rows if row.told is None
        ],
    }


# --- for people -------------------------------------------------------------------------------


def _print(model: str, declared: Declaration, found: Sequence[Listed], failures: Failures) -> None:
    wanted = declared.models[model].stable
    said = "the newest release (`stable: latest`)" if wanted == "latest" else short(wanted)
    if not found and not failures.errors:
        console.out(f"{model} was never published.")
        console.info("  next: fleet repro")
    for one in found:
        console.out(f"{model} in {one.registry} ({one.address}); params.yaml wants {said}")
        console.out(_table(one))
    for one in found:
        if wanted not in {"latest", one.stable}:
            console.warn(
                f"{one.registry} serves {short(one.stable)}, params.yaml wants {short(wanted)}: "
                f"`fleet publish {model} --to {one.registry}` moves it."
            )


def _table(one: Listed) -> str:
    """Set the rows in columns; the move that counts now is marked."""
    if not one.rows:
        return "  nothing was published here"
    lines = [_HEADS, *(_cells(row) for row in one.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    mark = "→" if row.is_stable else ""
    if row.told is None:
        return (mark, "—", "", "stored", short(row.release), row.state, "", "never stable")
    move = row.told.move
    why = wording.shortened(console.clean(" ".join(move.why.split())), _MAX_WHY_CHARACTERS)
    notes = [f"waiver for {waiver.gate} by {waiver.who}" for waiver in move.waivers]
    if not row.told.in_ledger:
        notes.append("not in the ledger")
    if row.told.is_lost:
        notes.append("not in the registry")
    return (
        mark,
        str(move.sequence),
        when(move),
        move.action,
        short(move.release),
        row.state,
        wording.shortened(console.clean(move.who), _MAX_WHO_CHARACTERS),
        why + (f" ({console.clean('; '.join(notes))})" if notes else ""),
    )
