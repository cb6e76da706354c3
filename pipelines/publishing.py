"""
Publish, point, resolve, read: the order of steps that makes a registry never show half a release.

    prepare -> sizes -> blobs -> prove -> release.json -> alias -> ledger

A kill between any two leaves the alias where it was, and what was sent is found there by the next
run. One move has one number: 1 + the highest that registry or ledger know. A registry that is ahead
of the ledger (a publisher was killed before the line) is copied into the ledger; one that is behind
(empty, or brought back from a backup) gets the ledger's moves put back, with their numbers. The
same number with another release is two stories: an error that a person has to read, never guessed.

Two publishers at once: the alias moves by compare-and-set, who loses reads again and decides again.
Where a store cannot compare, moves are serialised by a lock of this machine and read back, and the
sentence of the outcome says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import hashlib
import os
import random
import re
import secrets
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from pydantic import ValidationError

from pipelines import atomic, console, disk, hashing, locks, proc, wording
from pipelines.errors import DigestError, FleetError, GateError, RetryLaterError, StoreError
from pipelines.records import Part
from pipelines.release_records import (
    MAX_MOVES,
    SHORT_CHARACTERS,
    STABLE,
    Action,
    Alias,
    Move,
    Release,
    ReleaseFile,
    parse_release,
    short,
)
from pipelines.stores.base import AliasMovedError, NotThereError, Repairs
from pipelines.stores.transfer import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.ledger import Ledger
    from pipelines.release import Composed
    from pipelines.stores.base import Blob, OnBytes, Store

LATEST: Final = "latest"
PREVIOUS: Final = "previous"
# Fewer digits of an id are a slip of the finger sooner than a name.
MIN_PREFIX_CHARACTERS: Final = 8
# How often one decides again when others move the alias; between two lies a pause of a second.
_MAX_ROUNDS: Final = 50
_LONGEST_PAUSE_S: Final = 1.0
_MAX_WORDS: Final = 300


@dataclass(frozen=True, kw_only=True)
class By:
    """
    Who moves an alias, and why.

    Attributes:
        who: A person's name, or the account that started the workflow.
        why: Reason.
        run: Address of the workflow run; None outside one.
        at: UTC, to the second, as `2027-01-31T12:00:00Z`.
    """

    who: str
    why: str
    run: str | None
    at: str

    @classmethod
    def from_environment(cls, why: str) -> By:
        """Ask GitHub Actions, else git, else the system who is at work here."""
        return cls(
            who=_words(os.environ.get("GITHUB_ACTOR") or _git_user() or _login()),
            why=_words(why),
            run=_run_address(),
            at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )


def _words(text: str) -> str:
    return console.clean(" ".join(text.split()))[:_MAX_WORDS] or "unknown"


def _git_user() -> str:
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(FleetError, OSError):
        argv = ["git", "config", "user.name"]
        return proc.run(argv, log=Path(scratch) / "log", timeout_s=10).stdout.strip()
    return ""


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"user {os.getuid()}"


def _run_address() -> str | None:
    server, repository, run = (
        os.environ.get(f"GITHUB_{name}") for name in ("SERVER_URL", "REPOSITORY", "RUN_ID")
    )
    if not (server and repository and run):
        return None
    return _words(f"{server}/{repository}/actions/runs/{run}")


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
        GateError: A file is larger than the store takes; nothing was sent.
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
            composed.release if target == composed.id else _whole_release(store, model, target)[1]
        )
        settled = _settle(_Mover(store=store, ledger=ledger, by=by), release, target, composed)
    return Outcome(
        release=composed.id,
        moved=settled.moved,
        uploaded_bytes=sent.sent_bytes,
        uploaded_count=sent.count,
        restored=settled.restored,
        sentence=_sentence(composed.id, store, sent, settled),
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
    mover = _Mover(store=store, ledger=ledger, by=by)
    if not dry_run:
        store.prepare(model)
    with contextlib.nullcontext() if dry_run else _serialised(store, model):
        id_ = _find(store, model, target, ledger)
        release = _whole_release(store, model, id_)[1]
        if dry_run:
            now, _ = store.read_alias(model, STABLE)
            planned = _decide(mover, release, id_, now)
            return Outcome(
                release=id_,
                moved=planned.moved,
                uploaded_bytes=0,
                uploaded_count=0,
                restored=planned.restored,
                sentence=_planned_sentence(id_, store, 0, 0, planned),
            )
        settled = _settle(mover, release, id_)
    return Outcome(
        release=id_,
        moved=settled.moved,
        uploaded_bytes=0,
        uploaded_count=0,
        restored=settled.restored,
        sentence=_sentence(id_, store, _Sent(), settled),
    )


def _require_sizes(composed: Composed, store: Store) -> None:
    """Refuse before the first byte what would fail after the last."""
    limit_bytes = store.guarantees.max_file_bytes
    if limit_bytes is None:
        return
    too_large = [blob for blob in composed.blobs if blob.size_bytes > limit_bytes]
    if too_large:
        names = wording.first_few(
            [f"{blob.name} ({_shown(blob.size_bytes)})" for blob in too_large]
        )
        raise GateError(
            f"{store.shown} takes files up to {_shown(limit_bytes)}; larger: {names}. Nothing was "
            "sent.",
            hint="Remove those quants from params.yaml, or publish to another registry.",
        )


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """Blobs that were not there, their size, and what of it was sent: not what is linked."""

    count: int = 0
    size_bytes: int = 0
    sent_bytes: int = 0


def _send(composed: Composed, store: Store) -> _Sent:
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
    return _Sent(count=len(missing), size_bytes=missing_bytes, sent_bytes=sent_bytes)


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


def _whole_release(store: Store, model: str, id_: str) -> tuple[str, Release, bytes]:
    """
    Read a release and see that every file of it is there.

    Raises:
        NotThereError: It is not there, or a file of it is missing.
        StoreError: It is not what its id says.
    """
    data = store.read_release(model, id_)
    release = parse_release(data, id_, store.shown)
    if release.model != model:
        raise StoreError(
            f"release {short(id_)} of {store.shown} is of {wording.quoted(release.model)}, not of "
            f"{model}.",
        )
    odd = [
        file.name
        for file in release.files
        if store.blob_size(model, file.sha256) != file.size_bytes
    ]
    if odd:
        raise NotThereError(
            f"release {short(id_)} of {model} is not whole in {store.shown}: "
            f"{wording.first_few(odd)} of it {'is' if len(odd) == 1 else 'are'} missing or of "
            "another size. The alias is where it was.",
            hint=f"Files of it were collected or lost. `fleet releases {model} --registry "
            f"{store.name}` lists what can be served; to bring it back, publish it again from the "
            "commit that made it.",
        )
    return id_, release, data


# --- the move ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Mover:
    """What a move needs beside the release: where, on what record, and by whom."""

    store: Store
    ledger: Ledger
    by: By


@dataclass(frozen=True, kw_only=True)
class _Settled:
    """
    Where an alias stands, or shall stand.

    `alias` is what has to be written; None if nothing has. `missing` are the moves that the
    registry knows and the ledger does not.
    """

    alias: Alias | None
    moved: Move | None
    restored: bool
    missing: tuple[Move, ...]
    before: str | None


def _settle(
    mover: _Mover, release: Release, target: str, composed: Composed | None = None
) -> _Settled:
    """Move the alias to `target` if it means something else; decide anew if somebody was faster."""
    store, ledger, model = mover.store, mover.ledger, release.model
    ours: Move | None = None
    restored = False
    for _ in range(_MAX_ROUNDS):
        now, token = store.read_alias(model, STABLE)
        if ours is not None and now is not None and ours in now.moves:
            # Our own write, whose answer was lost; perhaps another one's after it.
            _write_down(ledger, store.name, now, ours)
            return _Settled(alias=now, moved=ours, restored=restored, missing=(), before=None)
        settled = _decide(mover, release, target, now)
        for move in settled.missing:
            ledger.append(store.name, STABLE, move)
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


def _write_down(ledger: Ledger, registry: str, alias: Alias, ours: Move) -> None:
    """Append what the registry knows up to our own move."""
    known = ledger.last(registry, alias.alias)
    for move in alias.moves:
        if (known is None or move.sequence > known.sequence) and move.sequence <= ours.sequence:
            ledger.append(registry, alias.alias, move)


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


def _decide(mover: _Mover, release: Release, target: str, now: Alias | None) -> _Settled:
    """Compare registry, ledger and what is wanted; nothing is written."""
    store, ledger, by = mover.store, mover.ledger, mover.by
    alias, missing, behind = _joined(release.model, now, store, ledger)
    before = alias.release if alias else None
    if before == target:
        return _Settled(
            alias=alias if behind else None,
            moved=None,
            restored=behind,
            missing=missing,
            before=before,
        )
    meant = {move.release for move in (*ledger.moves(store.name, STABLE), *missing)}
    action: Action = "rollback" if target in meant else "publish"
    move = Move(
        sequence=alias.sequence + 1 if alias else 1,
        action=action,
        release=target,
        previous=before,
        at=by.at,
        who=by.who,
        why=by.why,
        run=by.run,
        waivers=release.waivers,
    )
    return _Settled(
        alias=alias.moved(move)
        if alias
        else Alias(model=release.model, alias=STABLE, moves=(move,)),
        moved=move,
        restored=behind,
        missing=missing,
        before=before,
    )


def _joined(
    model: str, now: Alias | None, store: Store, ledger: Ledger
) -> tuple[Alias | None, tuple[Move, ...], bool]:
    """
    Join what the registry and the ledger know of `stable`.

    Returns:
        The alias with the moves of both; the moves that the ledger lacks; whether the registry
        lacks some.

    Raises:
        StoreError: They contradict each other.
    """
    written = ledger.moves(store.name, STABLE)
    stored = now.moves if now else ()
    by_number = {move.sequence: move for move in written}
    for move in stored:
        ours = by_number.get(move.sequence)
        if ours is not None and ours != move:
            raise _two_stories(model, store, ledger, ours, move)
    last = written[-1].sequence if written else 0
    missing = tuple(move for move in stored if move.sequence > last)
    unknown = [move for move in stored if move.sequence < last and move.sequence not in by_number]
    if unknown:
        raise StoreError(
            f"{ledger.path} does not know move {unknown[0].sequence} of {model}@{STABLE}, to "
            f"{short(unknown[0].release)}, that {store.shown} holds, but later ones.",
            hint="The ledger lacks what another branch wrote: merge that branch first.",
        )
    moves = (*written, *missing)
    if not moves:
        return None, (), False
    behind = not stored or stored[-1].sequence < moves[-1].sequence
    # What is there is left as it is: it may be older than the ledger.
    alias = now if now and not behind else None
    return alias or Alias(model=model, alias=STABLE, moves=moves[-MAX_MOVES:]), missing, behind


def _two_stories(model: str, store: Store, ledger: Ledger, ours: Move, theirs: Move) -> StoreError:
    return StoreError(
        f"move {ours.sequence} of {model}@{STABLE} was to {short(ours.release)} by "
        f"{wording.quoted(ours.who)} at {ours.at} says {ledger.path}, and to "
        f"{short(theirs.release)} by {wording.quoted(theirs.who)} at {theirs.at} says "
        f"{store.shown}. Nothing was changed.",
        hint=f"Two checkouts published there without each other's ledger, or one of the two was "
        f"changed. `fleet audit` tells both stories. If the registry is right, take the lines of "
        f"{wording.quoted(store.name)} out of the ledger from that move on: they are copied anew.",
    )


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
    _, missing, _ = _joined(model, now, store, ledger)
    if not dry_run:
        for move in missing:
            ledger.append(store.name, STABLE, move)
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
        alias, _, behind = _joined(model, now, store, ledger)
        if alias is None or not behind:
            return False
        release = _whole_release(store, model, alias.release)[1]
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

    name = hashlib.sha256(f"{_place(store)}\n{model}".encode()).hexdigest()[:16]
    lock = default_cache_root() / "locks" / f"registry-{name}.lock"
    with locks.exclusively(lock, f"publishing {model} to {store.name}"):
        yield


# --- sentences --------------------------------------------------------------------------------


def _shown(size_bytes: int) -> str:
    """Write a size so that a Modelfile and a GGUF both read well."""
    for unit, unit_bytes in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= unit_bytes:
            return f"{wording.number(size_bytes / unit_bytes)} {unit}"
    return wording.counted(size_bytes, "byte")


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
        release = _whole_release(store, model, target)[1]
    now, _ = store.read_alias(model, STABLE)
    planned = _decide(_Mover(store=store, ledger=ledger, by=by), release, target, now)
    return Outcome(
        release=composed.id,
        moved=planned.moved,
        uploaded_bytes=size_bytes,
        uploaded_count=len(missing),
        restored=planned.restored,
        sentence=_planned_sentence(composed.id, store, len(missing), size_bytes, planned),
    )


def _planned_sentence(
    id_: str, store: Store, count: int, size_bytes: int, planned: _Settled
) -> str:
    if not count and planned.alias is None:
        return f"Release {short(id_)} is in {store.name}, and {STABLE} is right: nothing to do."
    files = f"{wording.counted(count, 'file')} ({_shown(size_bytes)})"
    sent = f"send {files}" if count else "send nothing"
    return f"Would {sent} to {store.shown} and {_move_words(planned, past=False)}."


def _move_words(settled: _Settled, *, past: bool) -> str:
    """Say what happens to the alias, as the end of a sentence."""
    move = settled.moved
    if move is None:
        if not settled.restored:
            return f"{STABLE} still means {short(settled.before)}" if past else f"leave {STABLE}"
        return "put back the moves of the ledger"
    verbs = {"publish": ("move", "moved"), "rollback": ("roll back", "rolled back")}
    verb = verbs[move.action][past]
    origin = f" from {short(move.previous)}" if move.previous else ""
    moved = f"{verb} {STABLE}{origin} to {short(move.release)} (move {move.sequence})"
    return f"put back the moves of the ledger and {moved}" if settled.restored else moved


def _sentence(id_: str, store: Store, sent: _Sent, settled: _Settled) -> str:
    """Say in one or two sentences what was done."""
    if not sent.count and settled.moved is None and not settled.restored:
        return (
            f"Release {short(id_)} is in {store.name} already, and {STABLE} means "
            f"{short(settled.before)}: nothing changed."
        )
    stored = ""
    if sent.count:
        size = _shown(sent.sent_bytes)
        if sent.sent_bytes < sent.size_bytes:
            size += " copied, the rest linked"
        files = wording.counted(sent.count, "file")
        stored = f"stored {files} of release {short(id_)} ({size}) and "
    text = wording.sentence(f"{stored}{_move_words(settled, past=True)} in {store.name}")
    text = text[0].upper() + text[1:]
    if settled.moved is not None and not store.guarantees.compare_and_set:
        text += (
            " This registry cannot refuse a move that comes too late: moves from this machine were "
            "serialised, and what was written was read back."
        )
    return text


# --- reading ----------------------------------------------------------------------------------


class _Seen(Part):
    """The last move of an alias that this user has read."""

    registry: str
    model: str
    alias: str
    sequence: int
    release: str


def resolve(
    store: Store, model: str, wanted: str, ledger: Ledger | None = None
) -> tuple[str, Release, bytes]:
    """
    Find the release that somebody asks for.

    Args:
        store: The registry.
        model: Key of the model.
        wanted: `stable`, `previous`, an id, or a prefix of at least 8 digits that only one has.
        ledger: Of the model, if there is one here.

    Returns:
        Its id, the release, and its bytes, whose sha256 is the id.

    Raises:
        NotThereError: There is none of that name, or several.
        StoreError: The alias is older than what the ledger or this user has seen of it: the
            registry was brought back from a backup, or somebody replays an old state. Or the
            release is not what its id says.
    """
    id_ = _find(store, model, wanted, ledger)
    data = store.read_release(model, id_)
    release = parse_release(data, id_, store.shown)
    if release.model != model:
        raise StoreError(
            f"release {short(id_)} of {store.shown} is of {wording.quoted(release.model)}, not of "
            f"{model}."
        )
    return id_, release, data


def _find(store: Store, model: str, wanted: str, ledger: Ledger | None) -> str:
    """Turn what somebody typed into an id."""
    if wanted in {STABLE, PREVIOUS}:
        return _meant(store, model, wanted, ledger)
    ids = store.list_releases(model)
    if wanted in ids:
        return wanted
    known = ", ".join(sorted(short(id_) for id_ in ids)[:10]) or "none"
    hint = f"There: {known}. `fleet releases {model} --registry {store.name}` tells more."
    if not re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX_CHARACTERS},64}}", wanted):
        raise NotThereError(
            f"{wording.quoted(wanted)} is neither {STABLE}, {PREVIOUS}, a release id, nor "
            f"{MIN_PREFIX_CHARACTERS} or more digits of one.",
            hint=hint,
        )
    found = [id_ for id_ in ids if id_.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} releases" if found else "no release"
    raise NotThereError(
        f"{store.shown} has {what} of {model} that {'begin' if found else 'begins'} with {wanted}.",
        hint=hint,
    )


def _meant(store: Store, model: str, wanted: str, ledger: Ledger | None) -> str:
    """Read the alias, and refuse one that has gone back in time."""
    # In this order: what was seen before the alias was read cannot be later than it.
    seen = _read_seen(store, model)
    alias, _ = store.read_alias(model, STABLE)
    if alias is None:
        raise NotThereError(
            f"{store.shown} has no {STABLE} release of {model}.",
            hint=f"Publish one: fleet publish {model} --to {store.name}",
        )
    _require_fresh(store, alias, seen, ledger)
    if wanted == STABLE:
        return alias.release
    previous = alias.moves[-1].previous
    if previous is None:
        raise NotThereError(
            f"{model}@{STABLE} of {store.shown} has meant one release only, {short(alias.release)}:"
            " there is no previous one.",
        )
    return previous


def _require_fresh(store: Store, alias: Alias, seen: _Seen | None, ledger: Ledger | None) -> None:
    """Hold an alias against what the ledger and this user knew before it was read; remember it."""
    known = ledger.last(store.name, alias.alias) if ledger else None
    if known is not None:
        _compare(store, alias, known.sequence, known.release, "the ledger in git")
    if seen is not None:
        path = _seen_path(store, alias.model)
        _compare(store, alias, seen.sequence, seen.release, f"this user ({path})")
    if seen is None or seen.sequence < alias.sequence:
        _remember(store, alias)


def _read_seen(store: Store, model: str) -> _Seen | None:
    """Return what this user saw last of an alias; None if nothing, or nothing that can be read."""
    try:
        return _Seen.model_validate_json(_seen_path(store, model).read_bytes())
    except (OSError, ValidationError):
        return None


def _remember(store: Store, alias: Alias) -> None:
    """Write down how far an alias is; other readers may do the same at this moment."""
    path = _seen_path(store, alias.model)
    now = _Seen(
        registry=store.shown,
        model=alias.model,
        alias=alias.alias,
        sequence=alias.sequence,
        release=alias.release,
    )
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{atomic.PART_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(now.model_dump_json() + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        why = error.strerror or error
        console.warn(f"{path} cannot be written ({why}): a replay would not be noticed.")


def _compare(store: Store, alias: Alias, sequence: int, release: str, where: str) -> None:
    name = f"{alias.model}@{alias.alias} of {store.shown}"
    if alias.sequence < sequence:
        raise StoreError(
            f"{name} is at move {alias.sequence}, but {where} has seen move {sequence}, to "
            f"{short(release)}: the registry was brought back from a backup, or somebody shows an "
            "old state. Nothing of it was used.",
            hint=f"`fleet publish {alias.model} --to {store.name}` puts the ledger's moves back (a "
            "rollback has a higher number, not a lower one). If the registry was set up anew on "
            "purpose, remove what remembers the old one.",
        )
    there = next((move for move in alias.moves if move.sequence == sequence), None)
    if there is not None and there.release != release:
        raise StoreError(
            f"move {sequence} of {name} is to {short(there.release)}, but {where} has seen it go "
            f"to {short(release)}: the history of that registry was rewritten.",
            hint="`fleet audit` tells both stories. Use nothing of it until you know why.",
        )


def _seen_path(store: Store, model: str) -> Path:
    """$XDG_STATE_HOME/gguf-fleet/seen/<digest>.json."""
    state = os.environ.get("XDG_STATE_HOME")
    root = Path(state) if state else Path.home() / ".local/state"
    key = f"{_place(store)}\n{model}\n{STABLE}"
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return root / "gguf-fleet/seen" / f"{name}.json"


def _place(store: Store) -> str:
    """
    Return what tells a registry from every other one that this user may come across.

    `file:registry` of one checkout is not that of another.
    """
    return str(getattr(store, "place", store.shown))


def read_to(store: Store, model: str, file: ReleaseFile, target: Path, on_bytes: OnBytes) -> None:
    """
    Bring one file of a release to `target`: verified, whole or not at all, resumed after a kill.

    A file that is there and right is left as it is.

    Args:
        store: The registry.
        model: Key of the model.
        file: What it must be.
        target: Final path; its directory is made.
        on_bytes: Called with the bytes that are there so far.

    Raises:
        DigestError: The store gave other bytes. Nothing of them is kept.
        NotThereError: It has none.
        MachineError: The disk is full, or too small, said before the first byte.
    """
    with disk.explained(target):
        if _is_already(target, file, on_bytes):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = atomic.part_name(target.with_name(f"{target.name}.{file.sha256[:SHORT_CHARACTERS]}"))
        disk.require(target.parent, file.size_bytes - _size_of(part), file.name)
        with _alone(part) as opened:
            if _is_already(target, file, on_bytes):  # by the process for which we waited
                part.unlink()
                return
            found = _fill(store, model, file, opened, on_bytes)
            if found != file.sha256:
                part.unlink(missing_ok=True)
                raise DigestError(
                    f"{store.shown} gave other bytes for {file.name}: sha256 {found} instead of "
                    f"{file.sha256}. Nothing of them was kept.",
                    hint=f"`fleet verify-registry {store.name}` names everything there that is not "
                    "what it should be.",
                )
            os.fsync(opened.fileno())
            part.replace(target)
            atomic.sync(target.parent)


def _fill(store: Store, model: str, file: ReleaseFile, opened: IO[bytes], on_bytes: OnBytes) -> str:
    """Read what a part lacks; return the sha256 of all of it."""
    opened.seek(0)
    digest, had_bytes = hashlib.sha256(), 0
    while chunk := opened.read(hashing.CHUNK_BYTES):
        digest.update(chunk)
        had_bytes += len(chunk)
    size_bytes = had_bytes
    for chunk in _rest(store, model, file, had_bytes):
        rest = memoryview(chunk)
        while rest:
            rest = rest[opened.write(rest) :]
        digest.update(chunk)
        size_bytes += len(chunk)
        on_bytes(size_bytes)
    if had_bytes and digest.hexdigest() != file.sha256:
        # What an earlier run left may be what is wrong.
        opened.truncate(0)
        return _fill(store, model, file, opened, on_bytes)
    return digest.hexdigest()


def _rest(store: Store, model: str, file: ReleaseFile, offset: int) -> Iterator[bytes]:
    """Yield what follows `offset`, asked for anew where a stream ends early; never more."""
    while offset < file.size_bytes:
        began = offset
        for chunk in store.read_blob(model, file.sha256, offset=offset):
            offset += len(chunk)
            if offset > file.size_bytes:
                raise DigestError(
                    f"{store.shown} gives more than the {file.size_bytes} bytes of {file.name}.",
                    hint=f"`fleet verify-registry {store.name}` names everything there that is not "
                    "what it should be.",
                )
            yield chunk
        if offset == began:
            raise StoreError(
                f"{store.shown} gave {offset} of the {file.size_bytes} bytes of {file.name}.",
                hint="Run the same command again: it goes on where this one ended. If it stays so, "
                f"`fleet verify-registry {store.name}` tells what was lost.",
            )


def _is_already(target: Path, file: ReleaseFile, on_bytes: OnBytes) -> bool:
    if target.is_symlink() or _size_of(target) != file.size_bytes or not target.is_file():
        return False
    with target.open("rb") as opened:
        right = hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
    if right:
        on_bytes(file.size_bytes)
    return right


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@contextmanager
def _alone(part: Path) -> Iterator[IO[bytes]]:
    """Open a part that no other process writes to."""
    while True:
        with part.open("a+b", buffering=0) as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                console.info(f"Waiting for another process that brings {part.name}.")
                fcntl.flock(opened, fcntl.LOCK_EX)
            # Whoever had it before us may have given it its final name.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(opened.fileno()), part.stat()):
                    yield opened
                    return
