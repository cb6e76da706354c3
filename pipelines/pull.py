"""
`fleet pull MODEL[@RELEASE]`: a release out of a registry, verified, onto this disk.

A registry is believed nothing: release.json has to have the sha256 by which it was asked for, every
file the one that release.json says, and an alias that is older than what the ledger here or this
user has seen of it is refused. A pull that was killed goes on where it stopped; a file that is
there is hashed, not fetched. release.json comes last: a folder that has it is complete.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pipelines import atomic, console, params, registries, wording
from pipelines.errors import ParamsError, StoreError
from pipelines.ledger import Ledger
from pipelines.reading import read_to, resolve
from pipelines.registries import print_json, shown
from pipelines.release_records import short
from pipelines.stores import open_store
from pipelines.stores.base import NotThereError
from pipelines.stores.transfer import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.release_records import Release, ReleaseFile
    from pipelines.stores.base import Store

_MIB: Final = 2**20
# Ignored by git and DVC: a model is no part of the repository.
_PULLED: Final = "pulled"
_RELEASE_NAME: Final = "release.json"
_FROM: Final = re.compile(r"^FROM[ \t].*$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A release, and what of it is wanted where."""

    id: str
    release: Release
    data: bytes
    types: tuple[str, ...]
    files: tuple[ReleaseFile, ...]
    directory: Path


def main(  # noqa: PLR0913 - one for each option
    declared: Declaration,
    at: Layout,
    *,
    reference: str,
    registry: str | None,
    types: Sequence[str],
    every: bool,
    to: Path | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """
    Bring a release into a folder.

    Args:
        declared: The declaration.
        at: The checkout.
        reference: `MODEL`, `MODEL@stable`, `MODEL@previous` or `MODEL@` and digits of a release.
        registry: Key of the registry; None for the local one.
        types: Quants that are wanted; none for the one that `stable` means.
        every: All quants.
        to: The folder; None for `pulled/MODEL-<release>` below the checkout.
        dry_run: Say what would be fetched.
        as_json: Print JSON.

    Raises:
        ParamsError: The registry is not declared, or the release has no such quant.
        NotThereError: There is no such model, release or file.
        DigestError: The registry gave other bytes; nothing of them was kept.
        StoreError: The alias is older than what was seen of it.
        MachineError: The disk is full, or too small.
    """
    wanted_model, wanted = registries.reference(reference)
    store = open_store(registry or params.LOCAL_REGISTRY, declared, at.root)
    ledger = Ledger.load(at.ledger(wanted_model), wanted_model)
    registries.require_answer(store, wanted_model)
    try:
        id_, release, data = resolve(store, wanted_model, wanted, ledger)
    except NotThereError:
        _require_known(declared, at, store, wanted_model)
        raise
    chosen = _types(release, types, every=every)
    pull = _Wanted(
        id=id_,
        release=release,
        data=data,
        types=chosen,
        files=_files(release, chosen),
        directory=to if to is not None else at.root / _PULLED / f"{wanted_model}-{short(id_)}",
    )
    if not dry_run:
        _bring(store, pull)
    if as_json:
        told = _as_json(pull, store, dry_run=dry_run)
        print_json(told)
    else:
        _print(pull, store, dry_run=dry_run)
    return 0


def _require_known(declared: Declaration, at: Layout, store: Store, model: str) -> None:
    """
    Say which model may have been meant, if nobody knows this one.

    Raises:
        NotThereError: It is neither declared, nor in the ledgers, nor in the registry.
    """
    known = sorted(registries.ledgers_of(declared, at))
    if model in known or store.list_releases(model):
        return
    raise NotThereError(
        f"model {wording.quoted(model)} is not declared here, and {store.shown} has no release of "
        f"it{wording.did_you_mean(model, known) or '.'}",
        hint=f"Declared: {', '.join(known)}.",
    )


def _types(release: Release, types: Sequence[str], *, every: bool) -> tuple[str, ...]:
    """
    Return the quants that are wanted, in the order of the release.

    Raises:
        ParamsError: The release has no such quant.
    """
    known = [quant.type for quant in release.quants]
    if every:
        return tuple(known)
    for type_ in types:
        if type_ not in known:
            raise ParamsError(
                f"this release of {release.model} has no quant {wording.quoted(type_)}"
                f"{wording.did_you_mean(type_, known) or '.'}",
                hint=f"It has: {', '.join(known)}.",
            )
    return tuple(type_ for type_ in known if type_ in (types or (release.stable_quant,)))


def _files(release: Release, types: Sequence[str]) -> tuple[ReleaseFile, ...]:
    """Return the GGUFs, their Modelfiles and the licence."""
    return tuple(
        file
        for file in release.files
        if file.role in {"gguf", "modelfile", "license"}
        and (file.type is None or file.type in types)
    )


def _bring(store: Store, pull: _Wanted) -> None:
    """Fetch every file, then write release.json."""
    kept = pull.directory / _RELEASE_NAME
    if kept.exists() and kept.read_bytes() != pull.data:
        kept.unlink()  # of another release: from now on the folder is not complete
    total_bytes = sum(file.size_bytes for file in pull.files)
    label = f"pulling {shown(pull.release.model, pull.id)} from {store.name}"
    with Progress(label, total_bytes) as progress:
        for file in pull.files:
            target = pull.directory / file.name
            on_bytes = progress.of(file.name, file.size_bytes)
            read_to(store, pull.release.model, file, target, on_bytes)
    for type_ in pull.types:
        _write_modelfile(pull, type_)
    atomic.write_bytes(kept, pull.data)


def _write_modelfile(pull: _Wanted, type_: str) -> None:
    """
    Write `<gguf>.Modelfile`, whose FROM line names the GGUF beside it.

    Raises:
        StoreError: The release has no GGUF of that quant, or its Modelfile is no text.
    """
    ggufs = pull.release.of("gguf", type_)
    source = next(
        (
            file
            for file in pull.release.of("modelfile")
            if file.type in {None, type_} and file in pull.files
        ),
        None,
    )
    if len(ggufs) != 1 or source is None:
        raise StoreError(
            f"release {short(pull.id)} names {wording.counted(len(ggufs), 'GGUF')} of {type_} and "
            f"{'a' if source else 'no'} Modelfile for it: it was not made by this template."
        )
    gguf = ggufs[0].name
    try:
        text = (pull.directory / source.name).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise StoreError(f"the Modelfile {source.name} of {short(pull.id)} is no text.") from error
    line = f"FROM ./{gguf}"
    pointed = _FROM.sub(line, text, count=1) if _FROM.search(text) else f"{line}\n{text}"
    atomic.write_text(pull.directory / f"{gguf.removesuffix('.gguf')}.Modelfile", pointed)


# --- what was done ----------------------------------------------------------------------------


def _as_json(pull: _Wanted, store: Store, *, dry_run: bool) -> dict[str, Any]:
    return {
        "model": pull.release.model,
        "release": pull.id,
        "registry": store.name,
        "directory": str(pull.directory),
        "dry_run": dry_run,
        "quants": pull.types,
        "files": [
            {
                "path": str(pull.directory / file.name),
                "role": file.role,
                "type": file.type,
                "size_bytes": file.size_bytes,
                "sha256": file.sha256,
            }
            for file in pull.files
        ],
    }


def _print(pull: _Wanted, store: Store, *, dry_run: bool) -> None:
    size = wording.number(sum(file.size_bytes for file in pull.files) / _MIB)
    verb = "would fetch" if dry_run else "verified"
    console.out(
        f"{shown(pull.release.model, pull.id)} from {store.name}: {verb} "
        f"{wording.counted(len(pull.files), 'file')} ({size} MiB) in {pull.directory}"
    )
    for file in pull.files:
        console.out(f"  sha256:{file.sha256}  {file.name}")
