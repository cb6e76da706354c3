"""
Publish and point: the order of steps that makes a registry never show half a release.

    prepare -> sizes -> blobs -> prove -> release.json -> alias -> ledger

A kill between any two leaves the alias where it was, and what was sent is found there by the next
run. What has to become of the alias is decided in `pipelines.moves`.

Two publishers at once: the alias moves by compare-and-set, who loses reads again and decides again.
Where a store cannot compare, moves are serialised by a lock of this machine and read back, and the
sentence of the outcome says so. A publisher from an older checkout takes nothing back: what he
brings was replaced since by somebody of whom his ledger does not know, and only `point` goes back.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import locks, wording
from pipelines.errors import DigestError, GateError, RetryLaterError
from pipelines.moves import By, Mover, Settled, decide, joined, require_current
from pipelines.publishing_words import Sent, done_sentence, planned_sentence, shown_size
from pipelines.reading import find, place_of, read_to, resolve, whole_release
from pipelines.release_records import STABLE, Alias, Move, Release
from pipelines.stores.base import AliasMovedError, NotThereError, Repairs
from pipelines.stores.transfer import Progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pipelines.ledger import Ledger
    from pipelines.release import Composed
    from pipelines.stores.base import Blob, Store

# Whoever publishes reads, too: he need not know where that is written.
__all__ = [
    "LATEST",
    "By",
    "Outcome",
    "catch_up",
    "point",
    "publish",
    "read_to",
    "resolve",
    "restore",
]

LATEST: Final = "latest"
# How often one decides again when others move the alias; between two lies a pause of a second.
_MAX_ROUNDS: Final = 50
_LONGEST_PAUSE_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """
    What was done, or with `dry_run` would be.

    Attributes:
        release: Id of the release that was published or pointed at.
        moved: The move of the alias; None if it means the right release already.
        uploaded_bytes: Sent to the store.
        uploaded_count: Blobs that were not there.
        restored: Whether the registry was behind the ledger and got its moves back.
        sentence: All of that, for people.
    """

    release: str
    moved: Move | None
    uploaded_bytes: int
    uploaded_count: int
    restored: bool
    sentence: str


# --- publish and point ------------------------------------------------------------------------


def publish(  # noqa: PLR0913 - each is one independent fact, named at the call
    composed: Composed,
    store: Store,
    ledger: Ledger,
    *,
    stable: str,
    by: By,
    dry_run: bool = False,
) -> Outcome:
    """
    Bring a release into a registry, whole, and make `stable` mean what is declared.

    Args:
        composed: The release and every byte of it.
        store: The registry.
        ledger: Of the model; gets a line for each move.
        stable: `latest` for this release, or the id of an earlier one that `stable` shall mean:
            then this one is stored all the same.
        by: Who and why, for the move.
        dry_run: Write nothing anywhere; say what would be sent and moved.

    Raises:
        GateError: A file is larger than the store takes; nothing was sent. Or the release was
            replaced by a move of which the ledger here does not know; the alias is where it was.
        DigestError: A file is not what the release says, or the store has other bytes under its
            name. The alias is where it was.
        NotThereError: `stable` names a release that is not there, or not whole.
        StoreError, RetryLaterError, MachineError: The store refused, lost or could not be reached.
    """
    model = composed.release.model
    _require_sizes(composed, store)
    if dry_run:
        return _planned_publish(composed, store, ledger, stable, by)
    store.prepare(model)
    with _serialised(store, model):
        sent = _send(composed, store)
        target = composed.id if stable == LATEST else stable
        release = (
            composed.release if target == composed.id else whole_release(store, model, target)[1]
        )
        settled = _settle(Mover(store=store, ledger=ledger, by=by), release, target, composed)
    return Outcome(
        release=composed.id,
        moved=settled.moved,
        uploaded_bytes=sent.sent_bytes,
        uploaded_count=sent.count,
        restored=settled.restored,
        sentence=done_sentence(composed.id, store, sent, settled),
    )


def _planned_publish(
    composed: Composed, store: Store, ledger: Ledger, stable: str, by: By
) -> Outcome:
    """Say what `publish` would do; only questions are asked."""
    model = composed.release.model
    missing = [blob for blob in composed.blobs if not _is_there(store, model, blob)]
    size_bytes = sum(blob.size_bytes for blob in missing)
    target = composed.id if stable == LATEST else stable
    release = composed.release
    if target != composed.id:
        release = whole_release(store, model, target)[1]
    now, _ = store.read_alias(model, STABLE)
    planned = decide(Mover(store=store, ledger=ledger, by=by), release, target, now)
    require_current(model, planned, store, ledger)
    return Outcome(
        release=composed.id,
        moved=planned.moved,
        uploaded_bytes=size_bytes,
        uploaded_count=len(missing),
        restored=planned.restored,
        sentence=planned_sentence(composed.id, store, len(missing), size_bytes, planned),
    )


def point(  # noqa: PLR0913 - each is one independent fact, named at the call
    model: str,
    target: str,
    store: Store,
    ledger: Ledger,
    *,
    by: By,
    dry_run: bool = False,
) -> Outcome:
    """
    Make `stable` mean a release that the registry holds; no byte of a blob is moved.

    Args:
        model: Key of the model.
        target: Id, a prefix of at least 8 digits, or `previous`.
        store: The registry.
        ledger: Of the model.
        by: Who and why.
        dry_run: Write nothing; say what would be moved.

    Raises:
        NotThereError: It is not there, or a file of it is missing: says which.
        StoreError, RetryLaterError: The store refused, lost or could not be reached.
    """
    mover = Mover(store=store, ledger=ledger, by=by)
    if not dry_run:
        store.prepare(model)
    with contextlib.nullcontext() if dry_run else _serialised(store, model):
        id_ = find(store, model, target, ledger)
        release = whole_release(store, model, id_)[1]
        if dry_run:
            now, _ = store.read_alias(model, STABLE)
            planned = decide(mover, release, id_, now)
            return Outcome(
                release=id_,
                moved=planned.moved,
                uploaded_bytes=0,
                uploaded_count=0,
                restored=planned.restored,
                sentence=planned_sentence(id_, store, 0, 0, planned),
            )
        settled = _settle(mover, release, id_)
    return Outcome(
        release=id_,
        moved=settled.moved,
        uploaded_bytes=0,
        uploaded_count=0,
        restored=settled.restored,
        sentence=done_sentence(id_, store, Sent(), settled),
    )


def _require_sizes(composed: Composed, store: Store) -> None:
    """Refuse before the first byte what would fail after the last."""
    limit_bytes = store.guarantees.max_file_bytes
    if limit_bytes is None:
        return
    too_large = [blob for blob in composed.blobs if blob.size_bytes > limit_bytes]
    if too_large:
        names = wording.first_few(
            [f"{blob.name} ({shown_size(blob.size_bytes)})" for blob in too_large]
        )
        raise GateError(
            f"{store.shown} takes files up to {shown_size(limit_bytes)}; larger: {names}. Nothing "
            "was sent.",
            hint="Remove those quants from params.yaml, or publish to another registry.",
        )


def _send(composed: Composed, store: Store) -> Sent:
    """
    Store what is missing, prove what was stored, then the release.

    A release is stored after its blobs were proven. So where it is there already, only blobs that
    have to be sent anew are proven; a new release has all of its blobs proven, whoever sent them.
    """
    model = composed.release.model
    known = _knows(store, composed)
    missing = [blob for blob in composed.blobs if not _is_there(store, model, blob)]
    proven = missing if known else list(composed.blobs)
    total_bytes = sum(blob.size_bytes for blob in (*missing, *proven))
    sent_bytes = 0
    with Progress(f"publish {model} to {store.name}", total_bytes) as progress:
        # Present ones, too: a store renews their age, so that no collection takes them meanwhile.
        for blob in composed.blobs:
            size_bytes = blob.size_bytes if blob in missing else 0
            sent_bytes += store.put_blob(model, blob, progress.of(blob.name, size_bytes))
        for blob in proven:
            name = f"{blob.name}, read again"
            store.prove_blob(model, blob, progress.of(name, blob.size_bytes))
    if not known:
        store.put_release(composed.release, composed.data)
    missing_bytes = sum(blob.size_bytes for blob in missing)
    return Sent(count=len(missing), size_bytes=missing_bytes, sent_bytes=sent_bytes)


def _knows(store: Store, composed: Composed) -> bool:
    """Tell whether the release is there; other bytes under its name are for the store to refuse."""
    try:
        return store.read_release(composed.release.model, composed.id) == composed.data
    except NotThereError:
        return False


def _is_there(store: Store, model: str, blob: Blob) -> bool:
    """
    Tell whether a blob has to be sent.

    Raises:
        DigestError: The store has something of another size under its name.
    """
    there_bytes = store.blob_size(model, blob.sha256)
    if there_bytes is not None and there_bytes != blob.size_bytes:
        raise DigestError(
            f"{store.shown} has {there_bytes} bytes under sha256:{blob.sha256}, which is "
            f"{blob.name} of {blob.size_bytes} bytes. Nothing was overwritten.",
            hint=f"`fleet verify-registry {store.name}` names everything there that is not what it "
            "should be; remove that blob and publish again.",
        )
    return there_bytes is not None


# --- the move ---------------------------------------------------------------------------------


def _settle(
    mover: Mover, release: Release, target: str, composed: Composed | None = None
) -> Settled:
    """Move the alias to `target` if it means something else; decide anew if somebody was faster."""
    store, ledger, model = mover.store, mover.ledger, release.model
    ours: Move | None = None
    restored = False
    for _ in range(_MAX_ROUNDS):
        now, token = store.read_alias(model, STABLE)
        if ours is not None and now is not None and ours in now.moves:
            # Our own write, whose answer was lost; perhaps another one's after it.
            _write_down(ledger, store.name, now, ours)
            return Settled(alias=now, moved=ours, restored=restored, missing=(), before=None)
        settled = decide(mover, release, target, now)
        if composed is not None:
            require_current(model, settled, store, ledger)
        _copy(settled.missing, store, ledger)
        if settled.alias is None:
            if now is not None and isinstance(store, Repairs):
                store.repair(now, release)
            return settled
        try:
            store.write_alias(settled.alias, release, token)
            if not store.guarantees.compare_and_set:
                _require_read_back(store, settled.alias)
        except AliasMovedError:
            ours, restored = settled.moved, settled.restored
            time.sleep(random.uniform(0, _LONGEST_PAUSE_S))  # noqa: S311 - no secret
            continue
        if settled.moved is not None:
            ledger.append(store.name, STABLE, settled.moved)
        if composed is not None:
            _heal(composed, store)
        return settled
    raise RetryLaterError(
        f"{model}@{STABLE} of {store.shown} is moved by others all the time: {_MAX_ROUNDS} "
        "attempts, each too late.",
        hint="Find out who else publishes there, then try again. The files are all there.",
    )


def _copy(moves: Iterable[Move], store: Store, ledger: Ledger) -> None:
    """Append moves that the registry knows and the ledger does not."""
    ledger.append(store.name, STABLE, *moves)


def _write_down(ledger: Ledger, registry: str, alias: Alias, ours: Move) -> None:
    """Append what the registry knows up to our own move."""
    known = ledger.last(registry, alias.alias)
    last = known.sequence if known else 0
    moves = [move for move in alias.moves if last < move.sequence <= ours.sequence]
    ledger.append(registry, alias.alias, *moves)


def _require_read_back(store: Store, written: Alias) -> None:
    found, _ = store.read_alias(written.model, written.alias)
    # A store may have room for the last moves only.
    if found is None or found.moves[-1] != written.moves[-1]:
        raise AliasMovedError(f"{written.model}@{written.alias} of {store.shown} was moved, too.")


def _heal(composed: Composed, store: Store) -> None:
    """Send again what a collection took in the moment before the alias named it."""
    model = composed.release.model
    for blob in composed.blobs:
        if not _is_there(store, model, blob):
            store.put_blob(model, blob, lambda _: None)
            store.prove_blob(model, blob, lambda _: None)


def catch_up(
    model: str, store: Store, ledger: Ledger, *, dry_run: bool = False
) -> tuple[Move, ...]:
    """
    Copy moves that the registry knows and the ledger does not: a publisher was killed in between.

    Returns:
        Those moves, the oldest first.

    Raises:
        StoreError: The two contradict each other.
    """
    now, _ = store.read_alias(model, STABLE)
    _, missing, _ = joined(model, now, store, ledger)
    if not dry_run:
        _copy(missing, store, ledger)
    return missing


def restore(model: str, store: Store, ledger: Ledger, *, dry_run: bool = False) -> bool:
    """
    Put back the ledger's moves into a registry that is behind: the same numbers, the same words.

    Returns:
        Whether it was behind.

    Raises:
        NotThereError: The release that the last move means is not there whole: publish it.
        StoreError: The two contradict each other.
    """
    with contextlib.nullcontext() if dry_run else _serialised(store, model):
        now, token = store.read_alias(model, STABLE)
        alias, _, behind = joined(model, now, store, ledger)
        if alias is None or not behind:
            return False
        release = whole_release(store, model, alias.release)[1]
        if not dry_run:
            store.write_alias(alias, release, token)
            if not store.guarantees.compare_and_set:
                _require_read_back(store, alias)
    return True


@contextmanager
def _serialised(store: Store, model: str) -> Iterator[None]:
    """Let publishers of this machine take turns where the store cannot tell who was first."""
    if store.guarantees.compare_and_set:
        yield
        return
    from pipelines.toolchain import default_cache_root  # noqa: PLC0415 - only such stores

    name = hashlib.sha256(f"{place_of(store)}\n{model}".encode()).hexdigest()[:16]
    lock = default_cache_root() / "locks" / f"registry-{name}.lock"
    with locks.exclusively(lock, f"publishing {model} to {store.name}"):
        yield
