"""
The records of one measured host, laid where DVC looks for them: in results/MODEL and dvc.lock.

Git holds the records of the first measured host in results/MODEL, and those of every other one in
results/MODEL/on/HOST, with its entries of dvc.lock in lock.json. DVC knows one place alone. So
before the machine of another host measures, that host's own records and entries take this place, in
its checkout only: what they cover does not run again. `fleet bundle --host HOST` packs them there.

    what the host has an entry of     its entry and its records
    measurements, and what follows    nothing: the numbers of one host are not those of another
    the rest (fetch ... quantize)     stays: inputs decide it, on every machine

A host that was not the first one and now is has its records there as well: they are laid too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from pipelines import (
    atomic,
    bundle,
    bundle_checks,
    bundle_files,
    coverage,
    lock_entries,
    repair,
    times,
    trees,
)
from pipelines.errors import ParamsError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipelines.coverage import Step
    from pipelines.layout import Layout
    from pipelines.params import Declaration

_BACK: Final = "`git checkout HEAD -- dvc.lock results` puts back what git has"


def held(at: Layout) -> str | None:
    """Return whose records were laid here; None if what lies here is of the first host."""
    found = _marked(at)
    # A checkout of another commit, or of the same one, puts back dvc.lock and leaves the mark.
    return None if found is None or _is_as_in_git(at) else found


def require(at: Layout, declared: Declaration, host: str | None) -> None:
    """
    See that this checkout holds no records of another host than the one that is meant.

    Args:
        at: The checkout.
        declared: Its declaration.
        host: Its key; None for the first one.

    Raises:
        ParamsError: It does: its numbers would become those of this one.
    """
    wanted = host or bundle.primary_host(declared)
    found = held(at)
    if found is not None and not (found == host if host else _is_first(declared, found)):
        raise ParamsError(
            f"results/ and dvc.lock of this checkout hold what host {found} measured, not "
            f"{wanted}.",
            hint=f"Go on with --host {found}, or {_BACK}.",
        )


def lay(at: Layout, declared: Declaration, host: str) -> int:
    """
    Lay the records of a host where its measurement goes on from, once in a checkout.

    Args:
        at: The checkout; nobody else works in it.
        declared: Its declaration.
        host: Key of a measured host.

    Returns:
        How many of its records are here now; 0 if there was nothing to do.

    Raises:
        ParamsError: The host is not measured, or the checkout holds what git does not: another
            host's records, or measurements that would be lost.
        FleetError: Its entries, or dvc.lock, cannot be read; nothing was changed.
    """
    from pipelines import adopt  # noqa: PLC0415 - the verdict

    bundle.require_declared(declared, (), host)
    if held(at) == host:
        return 0
    require(at, declared, host)
    models = [
        model
        for model in declared.models
        if host in bundle.measured_hosts(declared, model) and _has_place(at, declared, model, host)
    ]
    if not models:
        return 0
    if not _is_as_in_git(at):
        raise ParamsError(
            f"dvc.lock is not the one of git, and the records of {host} would take its place.",
            hint=f"Commit what was measured here, or {_BACK}.",
        )
    changes = _changes(at, declared, models, host)
    atomic.write_json(at.laid, {"host": host})
    times.path(at).unlink(missing_ok=True)
    adopt.write(at, changes)
    # So that what a kill cuts is not repaired by the records of the other host.
    repair.keep(at)
    return sum(content is not None for content in changes.values())


def not_of(at: Layout, declared: Declaration, model: str, host: str) -> Iterator[str]:
    """Yield why the records in results/MODEL are not those of a host, as a clause."""
    if host == bundle.primary_host(declared, model):
        found = held(at)
        if found not in {None, host}:
            yield f"the records here are those of {found}"
    elif (found := _marked(at)) != host:
        whose = f"those of {found}" if found else "those that git has of the first host"
        yield f"the records here are {whose}: `fleet repro --host {host}` did not get to run"


# --- what changes -----------------------------------------------------------------------------


def _is_first(declared: Declaration, host: str) -> bool:
    """Tell whether what a host measured is what results/ holds of every model that it measures."""
    mine = [model for model in declared.models if host in bundle.measured_hosts(declared, model)]
    return bool(mine) and all(bundle.primary_host(declared, model) == host for model in mine)


def _has_place(at: Layout, declared: Declaration, model: str, host: str) -> bool:
    """Tell whether the records of results/MODEL may be those of another host."""
    is_first = host == bundle.primary_host(declared, model)
    return not is_first or (at.on_hosts(model) / host / bundle_files.LOCK).is_file()


def _changes(
    at: Layout, declared: Declaration, models: list[str], host: str
) -> dict[str, bytes | None]:
    """Return new content by path, None of what goes; dvc.lock is the last."""
    graph = coverage.steps_of(declared, at.root / "dvc.yaml")
    lock = at.root / lock_entries.NAME
    text = lock.read_text(encoding="utf-8") if lock.is_file() else ""
    there = lock_entries.parsed(text)
    wanted: dict[str, bytes | None] = {}
    entries: dict[str, Any] = {}
    gone: list[str] = []
    for model in models:
        steps = [step for step in graph.values() if step.model == model]
        folder = at.on_hosts(model) / host
        told = bundle.read_lock(folder / bundle_files.LOCK)
        own = {name: entry for name, entry in told.items() if isinstance(entry, dict)}
        measured = coverage.measured_on(steps)
        kept = [step for step in steps if step.name not in own and step.name not in measured]
        entries |= {step.name: own[step.name] for step in steps if step.name in own}
        gone += [name for name in measured if name not in own and name in there]
        wanted |= dict(_records(model, folder, kept))
    merged = lock_entries.merged(text, entries, gone=gone)
    return wanted | {lock_entries.NAME: merged.encode() or None}


def _records(model: str, folder: Path, kept: list[Step]) -> Iterator[tuple[str, bytes | None]]:
    """Yield every record of a model and what this host has of it, less what stays as it is."""
    staying = {out for step in kept for out in step.outs}
    for path in bundle_checks.kinds(model):
        if path not in staying:
            own = folder / path.split("/", 2)[2]
            yield path, own.read_bytes() if own.is_file() and not own.is_symlink() else None


# --- the mark ---------------------------------------------------------------------------------


def _marked(at: Layout) -> str | None:
    try:
        found = json.loads(at.laid.read_bytes())["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(found)


def _is_as_in_git(at: Layout) -> bool:
    path = at.root / lock_entries.NAME
    git = trees.Git(at.root)
    head = git.parse("HEAD")
    known = git.show(head, lock_entries.NAME) if head else None
    return known == (path.read_bytes() if path.is_file() else None)
