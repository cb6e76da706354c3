"""
Read a release as somebody who believes a registry nothing: alias -> release -> files.

An id is the sha256 of release.json, and that names every file by its sha256; so bytes are what they
should be or are refused. What has no digest is the alias: it may not go back behind what the ledger
in git, or this very user, has seen of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from pydantic import ValidationError

from pipelines import atomic, console, disk, hashing, wording
from pipelines.errors import DigestError, StoreError
from pipelines.records import Part
from pipelines.release_records import (
    SHORT_CHARACTERS,
    STABLE,
    Alias,
    Release,
    ReleaseFile,
    parse_release,
    short,
)
from pipelines.stores.base import NotThereError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.ledger import Ledger
    from pipelines.stores.base import OnBytes, Store

PREVIOUS: Final = "previous"
# Fewer digits of an id are a slip of the finger sooner than a name.
MIN_PREFIX_CHARACTERS: Final = 8


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
    id_ = find(store, model, wanted, ledger)
    return _release(store, model, id_)


def find(store: Store, model: str, wanted: str, ledger: Ledger | None) -> str:
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


def _release(store: Store, model: str, id_: str) -> tuple[str, Release, bytes]:
    """
    Read a release, and hold it against its id and its place.

    Raises:
        NotThereError: There is none.
        StoreError: It is other bytes than its id says, or the release of another model.
    """
    data = store.read_release(model, id_)
    release = parse_release(data, id_, store.shown)
    if release.model != model:
        raise StoreError(
            f"release {short(id_)} of {store.shown} is of {wording.quoted(release.model)}, not of "
            f"{model}.",
            hint=f"Somebody copied it there. `fleet verify-registry {store.name}` names all that "
            "is not what it should be.",
        )
    return id_, release, data


def whole_release(store: Store, model: str, id_: str) -> tuple[str, Release, bytes]:
    """
    Read a release and see that every file of it is there.

    Raises:
        NotThereError: It is not there, or a file of it is missing.
        StoreError: It is not what its id says.
    """
    _, release, data = _release(store, model, id_)
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


# --- the alias --------------------------------------------------------------------------------


class _Seen(Part):
    """The last move of an alias that this user has read."""

    registry: str
    model: str
    alias: str
    sequence: int
    release: str


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
    key = f"{place_of(store)}\n{model}\n{STABLE}"
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return root / "gguf-fleet/seen" / f"{name}.json"


def place_of(store: Store) -> str:
    """
    Return what tells a registry from every other one that this user may come across.

    `file:registry` of one checkout is not that of another.
    """
    return str(getattr(store, "place", store.shown))


# --- files ------------------------------------------------------------------------------------


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
