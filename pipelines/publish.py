"""
Publish: what passed its gates becomes a release in the local registry, and `stable` means it.

What is refused is data: the record says `refused` with the reasons, the release before stays where
it is, and so does results/M/release.json. A registry that cannot be written to is an error.

The stage has an input that is no file of another stage: the registry itself. `note` puts what it
holds into work/published/M.json, the probe at the start of every run and this stage at its end; so
DVC runs it again exactly when somebody else moved the alias, removed a blob, or took results/ back
to an earlier commit, and a registry that is as it was left costs some looks at the disk.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from pipelines import atomic, console, hashing, params, records, wording
from pipelines.errors import FleetError, GateError
from pipelines.records import Record
from pipelines.release_records import STABLE, PublishRecord, Sha256, release_id, short

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.params import PublishSlice
    from pipelines.release import Composed
    from pipelines.release_records import ReleaseWaiver
    from pipelines.stores.local import LocalStore

_PROBLEM_CHARACTERS = 300


class Observed(Record):
    """
    What the local registry holds of a model, and what git says of it.

    Attributes:
        stable: Release that the alias means; None if there is none.
        sequence: Number of its last move.
        ledger_sequence: Number of the last move that the ledger in git knows of.
        release: Id of results/M/release.json; None if there is none.
        missing: Releases, and sha256 of files of releases, that are not there or of another size.
        problem: Why it cannot be told; empty if it can.
    """

    stage: Literal["observe"] = "observe"
    model: str
    stable: Sha256 | None
    sequence: int | None
    ledger_sequence: int | None
    release: Sha256 | None
    missing: tuple[str, ...]
    problem: str


class Compared(Record):
    """
    Which comparison of a model results/ holds, by the sha256 of its record; None if none.

    Where the engine was measured alone as well, it is the sha256 of both digests, one a line.
    """

    stage: Literal["compared"] = "compared"
    model: str
    sha256: Sha256 | None


class _File(BaseModel):
    """What of a file of a release has to be known to look for it."""

    sha256: Sha256
    size_bytes: int


class _Files(BaseModel):
    """What of a release has to be known to look for its files; whoever publishes reads the rest."""

    files: tuple[_File, ...]


def run(slice_: PublishSlice, at: Layout) -> PublishRecord:
    """
    Publish the release of a model to the local registry, or say why there is none.

    Raises:
        ParamsError: The Modelfile is wrong.
        StoreError: The registry or the ledger is not what was written.
        DigestError: A file is not the one of its record. The alias has not moved.
        MachineError: The disk is full, or the registry cannot be written to.
    """
    from pipelines.release import Refused, compose  # noqa: PLC0415 - not for the probe

    found = compose(slice_, at)
    if isinstance(found, Refused):
        record = _record(slice_, at, None, found.reasons)
    else:
        record = _record(slice_, at, found, _publish(found, slice_, at))
    note(slice_, at)
    _tell(record)
    return record


def local_store(slice_: PublishSlice, at: Layout) -> LocalStore:
    """Open the registry that `dvc repro` keeps."""
    from pipelines.stores.local import LocalStore  # noqa: PLC0415 - not for --help

    registry = slice_.registry
    return LocalStore(
        params.LOCAL_REGISTRY,
        at.root / registry.url.partition(":")[2],
        max_file_mib=registry.max_file_mib,
    )


def _publish(composed: Composed, slice_: PublishSlice, at: Layout) -> tuple[str, ...]:
    """
    Publish; return why the registry does not take it.

    That is a file that is too large for it; or a declared `stable` that it does not hold, as in a
    fresh clone of a fleet that was rolled back.
    """
    from pipelines import publishing  # noqa: PLC0415 - not for the probe
    from pipelines.ledger import Ledger  # noqa: PLC0415 - the same
    from pipelines.stores.base import NotThereError  # noqa: PLC0415 - the same

    why = "it passed its gates" if slice_.stable == "latest" else "declared as `stable`"
    try:
        outcome = publishing.publish(
            composed,
            local_store(slice_, at),
            Ledger.load(at.ledger(slice_.model), slice_.model),
            stable=slice_.stable,
            by=publishing.By.from_environment(why),
        )
    except (GateError, NotThereError) as error:
        if isinstance(error, NotThereError) and slice_.stable in {"latest", composed.id}:
            raise
        return (" ".join(filter(None, (error.message, error.hint))),)
    console.info(outcome.sentence)
    # Last: what it names is in the registry.
    atomic.write_bytes(at.release(slice_.model), composed.data)
    return ()


# --- what the probe tells ---------------------------------------------------------------------


def note(slice_: PublishSlice, at: Layout) -> None:
    """Write what `observe` finds where DVC looks; an equal file is left as it is."""
    records.write(at.observed(slice_.model), observe(slice_, at))


def note_comparison(model: str, at: Layout) -> None:
    """
    Write where DVC looks which comparison there is.

    `fleet compare` is no stage, so that nothing else tells DVC of what it leaves: a new comparison
    is judged, released and told by the next `fleet repro`.
    """
    digests = [_digest(path) for path in (at.comparison(model), at.engine_record(model))]
    found = digests[0]
    if digests[1] is not None:
        found = hashlib.sha256("\n".join(map(str, digests)).encode()).hexdigest()
    record = Compared(model=model, sha256=found)
    records.write(at.compared(model), record)


def observe(slice_: PublishSlice, at: Layout) -> Observed:
    """
    Look at what the local registry holds of a model, by names and sizes alone.

    Never raises for a registry in disorder: that is `problem`, so that the stage runs and says it.
    """
    store = local_store(slice_, at)
    ours = _digest(at.release(slice_.model))
    declared = slice_.stable if slice_.stable != "latest" else None
    stable: str | None = None
    sequence: int | None = None
    ledger_sequence: int | None = None
    missing: list[str] = []
    problem = ""
    try:
        alias, _ = store.read_alias(slice_.model, STABLE)
        if alias is not None:
            stable, sequence = alias.release, alias.sequence
        for id_ in dict.fromkeys(filter(None, (stable, ours, declared))):
            missing += _missing(store, slice_.model, id_)
        ledger_sequence = _ledger_sequence(slice_, at)
    except (FleetError, OSError, ValueError) as error:
        said = error.message if isinstance(error, FleetError) else str(error)
        # No folder of this machine: the file is compared with that of another checkout.
        said = console.clean(said).replace(str(store.root), "the registry")
        problem = wording.shortened(said, _PROBLEM_CHARACTERS)
    return Observed(
        model=slice_.model,
        stable=stable,
        sequence=sequence,
        ledger_sequence=ledger_sequence,
        release=ours,
        missing=tuple(dict.fromkeys(missing)),
        problem=problem,
    )


def _digest(path: Path) -> str | None:
    try:
        return hashing.digest(path).sha256
    except OSError:
        return None


def _missing(store: LocalStore, model: str, id_: str) -> list[str]:
    """Return the id of a release that is not there or rotten, or the digests of lost files."""
    if id_ not in store.list_releases(model):
        return [id_]
    data = store.read_release(model, id_)
    if release_id(data) != id_:
        return [id_]
    files = _Files.model_validate_json(data).files
    return [file.sha256 for file in files if store.blob_size(model, file.sha256) != file.size_bytes]


def _ledger_sequence(slice_: PublishSlice, at: Layout) -> int | None:
    from pipelines.ledger import Ledger  # noqa: PLC0415 - not for --help

    last = Ledger.load(at.ledger(slice_.model), slice_.model).last(params.LOCAL_REGISTRY, STABLE)
    return last.sequence if last else None


# --- the record -------------------------------------------------------------------------------


def _record(
    slice_: PublishSlice, at: Layout, composed: Composed | None, reasons: tuple[str, ...]
) -> PublishRecord:
    """Say what the registry holds now; not what had to be done for it, so that it is stable."""
    alias, _ = local_store(slice_, at).read_alias(slice_.model, STABLE)
    released = composed if composed is not None and not reasons else None
    files = {file.sha256: file.size_bytes for file in released.release.files} if released else {}
    return PublishRecord(
        model=slice_.model,
        status="released" if released else "refused",
        registry=slice_.registry.url,
        release=released.id if released else None,
        stable=alias.release if alias else None,
        sequence=alias.sequence if alias else None,
        files_count=len(files),
        size_bytes=sum(files.values()),
        reasons=reasons,
        waivers=released.release.waivers if released else (),
    )


def sentence(record: PublishRecord) -> str:
    """Say in one clause what came of a model: `released 46d7b5d7b617 (stable) in local, ...`."""
    if record.status == "refused":
        first = record.reasons[0] if record.reasons else "no reason is recorded"
        more = len(record.reasons) - 1
        rest = f" And {wording.counted(more, 'further reason')}: publish.json." if more > 0 else ""
        kept = f" `{STABLE}` stays {short(record.stable)}." if record.stable else ""
        return f"not released: {wording.sentence(first)}{rest}{kept}".rstrip(".")
    where = f"in {params.LOCAL_REGISTRY}, {record.registry}"
    if record.stable == record.release:
        return f"released {short(record.release)} ({STABLE}) {where}"
    return f"released {short(record.release)} {where}; {STABLE} is {short(record.stable)}"


def waiver_sentence(waiver: ReleaseWaiver) -> str:
    """Say who let pass what, why and until when, as a clause."""
    return f"waiver of `{waiver.gate}` until {waiver.until} by {waiver.who}: {waiver.why}"


def _tell(record: PublishRecord) -> None:
    (console.info if record.status == "released" else console.warn)(
        f"{record.model}: {wording.sentence(sentence(record))}"
    )
    for reason in record.reasons[1:]:
        console.info(f"  also: {reason}")
    for waiver in record.waivers:
        console.info(f"  {waiver_sentence(waiver)}")
