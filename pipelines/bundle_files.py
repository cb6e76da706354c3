"""
Where the records of bundles belong in a checkout: the files that change, and what they hold then.

    results/M/**            records of the primary host, beside release and ledger
    results/M/on/HOST/**    those of another measured host, by the same names
    results/M/on/HOST/lock.json, dvc.lock    their entries of dvc.lock

A bundle is all that there is of a model for a host: a record that the stages write and that is not
in it goes, for example that of a quant which is no longer declared.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from pipelines import bundle_checks, lock_entries, records
from pipelines.bundle import measured_hosts
from pipelines.ci_records import TimesRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from pipelines.ci_records import BundleRecord
    from pipelines.layout import Layout
    from pipelines.params import Declaration

LOCK: Final = "lock.json"


def folder(bundle: BundleRecord) -> str:
    """Return the folder of its records below the repository."""
    own = f"results/{bundle.model}"
    return own if bundle.primary else f"{own}/on/{bundle.host}"


def changes(
    at: Layout,
    declared: Declaration,
    bundles: Sequence[BundleRecord],
    *,
    removed: Iterable[str] = (),
) -> dict[str, bytes | None]:
    """
    Return what has to change in a checkout so that it holds the records of bundles.

    Args:
        at: The checkout.
        declared: What its params.yaml says.
        bundles: Of good form, one for each model and host.
        removed: Models that are not declared any more.

    Returns:
        New content by path below the repository, None of a file that goes; nothing of what is so
        already. In the order in which they are to be written: dvc.lock, without which the others
        speak of nothing, is the last.

    Raises:
        FleetError: dvc.lock is not what DVC writes.
    """
    wanted: dict[str, bytes | None] = {}
    for bundle in bundles:
        wanted |= _of_bundle(at, declared, bundle)
    for model in removed:
        if model not in declared.models:
            wanted |= dict.fromkeys(_of_removed(at, model))
    wanted |= _of_lock(at, declared, bundles)
    return {
        path: content for path, content in wanted.items() if content != _content(at.root / path)
    }


def _of_bundle(at: Layout, declared: Declaration, bundle: BundleRecord) -> dict[str, bytes | None]:
    own = f"results/{bundle.model}"
    into = folder(bundle)
    known = [path.removeprefix(f"{own}/") for path in bundle_checks.kinds(bundle.model)]
    found: dict[str, bytes | None] = {f"{into}/{name}": None for name in known}
    for path, text in bundle.files.items():
        found[f"{into}/{path.removeprefix(f'{own}/')}"] = text.encode()
    found[f"{into}/{at.tools_record(bundle.model).name}"] = bundle.toolchain.encode() or None
    times = at.times(bundle.model).name
    found[f"{into}/{times}"] = _times(at.root / into / times, declared, bundle)
    if not bundle.primary:
        found[f"{into}/{LOCK}"] = _json(_ordered(bundle, declared))
    for gone in _others(at, declared, bundle.model):
        found[gone] = None
    return found


def _ordered(bundle: BundleRecord, declared: Declaration) -> dict[str, Any]:
    """Return its entries in the order of the graph: equal ones give equal bytes."""
    names = lock_entries.names_of(declared, bundle.model)
    return {name: bundle.lock[name] for name in names if name in bundle.lock}


def _times(path: Path, declared: Declaration, bundle: BundleRecord) -> bytes | None:
    """Return how long its stages took: now, or before if they did not run now."""
    before = records.read_or_reason(path, TimesRecord)
    known = ({} if isinstance(before, str) else before.wall_s) | bundle.times_s
    names = lock_entries.names_of(declared, bundle.model)
    kept = {name: known[name] for name in names if name in known}
    return _json(json.loads(TimesRecord(wall_s=kept).model_dump_json())) if kept else None


def _others(at: Layout, declared: Declaration, model: str) -> Iterator[str]:
    """Yield what lies here of hosts that nobody measures any more."""
    known = measured_hosts(declared, model)[1:]
    for each in sorted(at.on_hosts(model).glob("*")):
        if each.name not in known and not each.is_symlink():
            yield from _files_below(at, each)


def _of_removed(at: Layout, model: str) -> Iterator[str]:
    """Yield the records of a model that is not declared; what was once served stays on record."""
    own = at.root / "results" / model
    for path in [*(at.root / name for name in bundle_checks.kinds(model)), *at.of_model(model)]:
        if path.is_relative_to(own) and path.is_file():
            yield path.relative_to(at.root).as_posix()
    yield from _files_below(at, at.on_hosts(model))


def _files_below(at: Layout, directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*.json")):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(at.root).as_posix()


def _of_lock(
    at: Layout, declared: Declaration, bundles: Sequence[BundleRecord]
) -> dict[str, bytes | None]:
    path = at.root / lock_entries.NAME
    text = (_content(path) or b"").decode(errors="replace")
    entries: dict[str, Any] = {}
    order = list(declared.models)
    for bundle in sorted(bundles, key=lambda one: order.index(one.model)):
        if bundle.primary:
            entries |= _ordered(bundle, declared)
    there = lock_entries.parsed(text)
    gone = lock_entries.undeclared(there, declared)
    # DVC writes a lock anew only if an entry of it changed.
    if not gone and all(there.get(name) == entry for name, entry in entries.items()):
        return {}
    merged = lock_entries.merged(text, entries, gone=gone)
    return {lock_entries.NAME: merged.encode() or None}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _content(path: Path) -> bytes | None:
    try:
        return None if path.is_symlink() else path.read_bytes()
    except OSError:
        return None
