"""
`fleet publish [MODEL] --to NAME`: the release of a model into another registry.

If results/M/release.json is the release of the records in git and a declared registry holds it
whole, exactly that one is sent, from there: a clone without work/ can publish. Else it is composed
from what the stages left. Either way the records are judged again, today: a waiver that has ended
lets nothing pass any more. A refusal is an error here, with every reason.

Where params.yaml pins `stable` to an earlier release that the other registry does not have yet,
that one is sent first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines import (
    atomic,
    console,
    hashing,
    params,
    records,
    release,
    release_gates,
    verdict_evidence,
    wording,
)
from pipelines.compare_records import CompareRecord
from pipelines.errors import GateError, ParamsError, RetryLaterError, StoreError
from pipelines.ledger import Ledger
from pipelines.moves import By
from pipelines.publishing import LATEST, publish
from pipelines.reading import read_to
from pipelines.registries import Failures, Shelf, names, print_json, require_model
from pipelines.release import Composed, Refused
from pipelines.release_records import parse_release, release_id, short
from pipelines.stores import open_store
from pipelines.stores.base import Blob
from pipelines.stores.local import LocalStore
from pipelines.stores.transfer import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.params import Declaration, PublishSlice
    from pipelines.publishing import Outcome
    from pipelines.release_records import Release, ReleaseFile
    from pipelines.stores.base import Store

_MAX_REASON_CHARACTERS = 300


def main(  # noqa: PLR0913 - one for each option
    declared: Declaration,
    at: Layout,
    *,
    model: str | None,
    to: str,
    reason: str | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """
    Publish one model, or all, to a registry; one that is refused keeps no other from it.

    Returns:
        0, or the exit code of the first model that was not published.

    Raises:
        ParamsError: The model or the registry is not declared.
    """
    if model is not None:
        require_model(declared, model)
    by = By.from_environment(require_reason(reason) if reason is not None else f"published to {to}")
    store = open_store(to, declared, at.root)
    failures = Failures()
    done: dict[str, Outcome] = {}
    for each in declared.models if model is None else (model,):
        with failures.of(each):
            done[each] = _one(declared, at, each, store, by, dry_run=dry_run)
            if not as_json:
                console.out(f"{each}: {done[each].sentence}")
    if not (as_json or dry_run) and any(outcome.moved for outcome in done.values()):
        console.info("  next: git add results && git commit, so that every checkout knows of it")
    if as_json:
        models = {each: as_told(outcome) for each, outcome in done.items()}
        told = {"registry": to, "dry_run": dry_run, "models": models, "errors": failures.as_json()}
        print_json(told)
    return failures.exit_code


def as_told(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome for `--json`."""
    move = json.loads(outcome.moved.model_dump_json()) if outcome.moved else None
    return {
        "release": outcome.release,
        "moved": move,
        "uploaded_bytes": outcome.uploaded_bytes,
        "uploaded_count": outcome.uploaded_count,
        "restored": outcome.restored,
        "sentence": outcome.sentence,
    }


def require_reason(text: str) -> str:
    """
    Return a reason as the ledger will say it.

    Raises:
        ParamsError: There is none in it, or it is too long to be read.
    """
    words = " ".join(console.clean(text).split())
    if not words or len(words) > _MAX_REASON_CHARACTERS:
        raise ParamsError(
            f"`--reason` is what the ledger will say for ever: 1 to {_MAX_REASON_CHARACTERS} "
            f"characters, not {len(words)}."
        )
    return words


def _one(  # noqa: PLR0913 - each is one independent fact
    declared: Declaration, at: Layout, model: str, store: Store, by: By, *, dry_run: bool
) -> Outcome:
    """Publish one model."""
    slice_ = params.publish_slice(declared, model)
    shelves = Shelves(declared, at, model, dry_run=dry_run)
    composed = to_publish(slice_, at, shelves)
    ledger = Ledger.load(at.ledger(model), model)
    if slice_.stable not in {LATEST, composed.id}:
        _bring_pinned(slice_.stable, shelves, store, ledger, by)
    outcome = publish(composed, store, ledger, stable=slice_.stable, by=by, dry_run=dry_run)
    if not dry_run:
        # Last: what it names is in a registry.
        atomic.write_bytes(at.release(model), composed.data)
        atomic.remove(shelves.scratch)
    return outcome


def _bring_pinned(id_: str, shelves: Shelves, store: Store, ledger: Ledger, by: By) -> None:
    """Send the release that `stable` is pinned to, where only another registry has it."""
    model = shelves.model
    if Shelf(store, model).held(id_).is_whole:
        return
    pinned = shelves.find(id_)
    if pinned is None:
        raise StoreError(
            f"params.yaml wants release {short(id_)} of {model}, which no declared registry that "
            "can be reached holds whole.",
            hint=f"fleet releases {model} lists what can be served; "
            f"`fleet rollback {model} --to latest` ends the rollback.",
        )
    outcome = publish(pinned, store, ledger, stable=id_, by=by, dry_run=shelves.dry_run)
    console.info(f"{model}: {outcome.sentence}")


# --- what is published ------------------------------------------------------------------------


def to_publish(slice_: PublishSlice, at: Layout, shelves: Shelves) -> Composed:
    """
    Return the release of the records in git, from a registry that has it or from work/.

    Raises:
        GateError: There may be none; every reason is in the message.
    """
    today = verdict_evidence.today()
    held = _held(slice_, at, shelves, today)
    composed = held if held is not None else release.compose(slice_, at, today=today)
    if isinstance(composed, Composed):
        return composed
    reasons = "".join(f"\n  - {reason}" for reason in composed.reasons)
    raise GateError(
        f"{slice_.model} is not published: "
        f"{wording.counted(len(composed.reasons), 'reason')}.{reasons}",
        hint="The release before stays where it is. `fleet report` shows the evidence.",
    )


def _held(
    slice_: PublishSlice, at: Layout, shelves: Shelves, today: str
) -> Composed | Refused | None:
    """
    Return the release of results/ as a registry holds it.

    Returns:
        It; or why there may be none; or None if it has to be composed: the records are others than
        those it was made of, or no registry holds it whole.
    """
    try:
        data = at.release(slice_.model).read_bytes()
    except FileNotFoundError:
        return None
    judged = release_gates.judge(verdict_evidence.collect(slice_, at, day=today))
    if judged.reasons:
        return Refused(reasons=judged.reasons)
    there = parse_release(data, release_id(data), at.release(slice_.model).name)
    if there.model != slice_.model or there.waivers != judged.waivers or _is_outdated(there, at):
        return None
    return shelves.find(release_id(data))


def _is_outdated(there: Release, at: Layout) -> bool:
    """
    Tell whether a record in git is another one than that of which the release was made.

    A comparison of one of its files that was made since is new evidence, too.
    """
    below = at.release(there.model).parent
    is_other = any(
        not (below / name).is_file() or hashing.digest(below / name).sha256 != sha256
        for name, sha256 in there.evidence.items()
    )
    path = at.comparison(there.model)
    if is_other or path.name in there.evidence or not path.exists():
        return is_other
    compared = records.read_or_reason(path, CompareRecord)
    files = {quant.gguf_sha256 for quant in there.quants}
    return not isinstance(compared, str) and compared.challenger.gguf_sha256 in files


@dataclass(frozen=True)
class Shelves:
    """
    The declared registries as sources of a release; files of a remote one come to `scratch`.

    With `dry_run` nothing is fetched: the paths of what would be are not there.
    """

    declared: Declaration
    at: Layout
    model: str
    dry_run: bool

    @property
    def scratch(self) -> Path:
        """Where fetched files lie until they were sent on."""
        return self.at.scratch(self.model) / "publish"

    def find(self, id_: str) -> Composed | None:
        """Return a release from the first registry that has it whole; the local one comes first."""
        for name in names(self.declared):
            try:
                store = open_store(name, self.declared, self.at.root)
                held = Shelf(store, self.model).held(id_)
                if held.release is not None and held.is_whole:
                    return self._from(store, id_, held.release)
            except (StoreError, RetryLaterError) as error:
                console.warn(f"{name}: {error.message}")
        return None

    def _from(self, store: Store, id_: str, found: Release) -> Composed:
        data = store.read_release(self.model, id_)
        files = {file.sha256: file for file in found.files}
        if isinstance(store, LocalStore):
            sources = {sha256: store.root / "blobs/sha256" / sha256 for sha256 in files}
        else:
            sources = {sha256: self.scratch / sha256 for sha256 in files}
            if not self.dry_run:
                self._fetch(store, files)
        blobs = tuple(
            Blob(
                name=file.name,
                sha256=sha256,
                size_bytes=file.size_bytes,
                media_type=file.media_type,
                source=sources[sha256],
            )
            for sha256, file in files.items()
        )
        return Composed(release=found, data=data, id=id_, blobs=blobs)

    def _fetch(self, store: Store, files: Mapping[str, ReleaseFile]) -> None:
        total_bytes = sum(file.size_bytes for file in files.values())
        with Progress(f"fetching {self.model} from {store.name}", total_bytes) as progress:
            for sha256, file in files.items():
                on_bytes = progress.of(file.name, file.size_bytes)
                read_to(store, self.model, file, self.scratch / sha256, on_bytes)
