"""
Decide what has to become of an alias: registry, ledger and what is wanted, held against each other.

One move has one number: 1 + the highest that registry or ledger know. A registry that is ahead of
the ledger (a publisher was killed before the line, or another checkout published) has its moves
copied; one that is behind (empty, or brought back from a backup) gets the ledger's moves put back,
with their numbers. The same number with another release is two stories: an error that a person has
to read, never guessed.

Nothing is written here.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import console, proc, wording
from pipelines.errors import FleetError, GateError, StoreError
from pipelines.release_records import MAX_MOVES, STABLE, Action, Alias, Move, Release, short

if TYPE_CHECKING:
    from pipelines.ledger import Ledger
    from pipelines.stores.base import Store

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


# --- the decision -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Mover:
    """What a move needs beside the release: where, on what record, and by whom."""

    store: Store
    ledger: Ledger
    by: By


@dataclass(frozen=True, kw_only=True)
class Settled:
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


def decide(mover: Mover, release: Release, target: str, now: Alias | None) -> Settled:
    """Compare registry, ledger and what is wanted; nothing is written."""
    store, ledger, by = mover.store, mover.ledger, mover.by
    alias, missing, behind = joined(release.model, now, store, ledger)
    before = alias.release if alias else None
    if before == target:
        return Settled(
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
    return Settled(
        alias=alias.moved(move)
        if alias
        else Alias(model=release.model, alias=STABLE, moves=(move,)),
        moved=move,
        restored=behind,
        missing=missing,
        before=before,
    )


def require_current(model: str, settled: Settled, store: Store, ledger: Ledger) -> None:
    """
    Refuse to take back what others decided since this checkout was made.

    An old workflow run that is started again, or a clone that was not pulled, brings a release that
    was right then. Who means to go back says so: `fleet rollback`. What the ledger lacks is not
    copied here: the same command would pass the second time, and `git pull` would meet a ledger
    that was changed.

    Nor may a release take back a rollback of which git does not know yet, be it as new as it may:
    its records were merged by somebody who saw the one that was rolled back.

    Raises:
        GateError: The release was replaced by a move that the ledger lacks; or it cannot be told,
            since neither the registry nor the ledger remembers all moves. Or the last move is a
            rollback that the ledger lacks.
    """
    move, missing = settled.moved, settled.missing
    if move is None or not missing:
        return
    if move.action != "rollback" and missing[-1].action == "rollback":
        raise _rolled_back(model, move, missing[-1], store)
    last = ledger.last(store.name, STABLE)
    first_unknown = last.sequence + 1 if last else 1
    is_forgotten = missing[0].sequence > first_unknown
    if move.action != "rollback" and not is_forgotten:
        return
    now = missing[-1]
    replaced = f"{short(move.release)} is an earlier release"
    if move.action != "rollback":
        replaced = (
            f"nobody can tell whether {short(move.release)} is an earlier release (no one here "
            f"remembers moves {first_unknown} to {missing[0].sequence - 1})"
        )
    raise GateError(
        f"{model}@{STABLE} in {store.name} was moved to {short(now.release)} by "
        f"{wording.quoted(now.who)} at {wording.quoted(now.at)} (move {now.sequence}), of which "
        f"the ledger of this checkout does not know; {replaced}. `{STABLE}` was left as it is.",
        hint=f"`git pull`, then publish again. If you do mean to go back: fleet rollback {model} "
        f"--to {short(move.release)} --registry {store.name} --reason TEXT",
    )


def _rolled_back(model: str, move: Move, rollback: Move, store: Store) -> GateError:
    return GateError(
        f"{model}@{STABLE} in {store.name} was rolled back to {short(rollback.release)} by "
        f"{wording.quoted(rollback.who)} at {wording.quoted(rollback.at)} (move "
        f"{rollback.sequence}), of which the ledger of this checkout does not know; "
        f"{short(move.release)} would take that back. `{STABLE}` was left as it is.",
        hint=f"Merge what that rollback left (the pull request from fleet/rollback-{model}, or "
        "`git pull`), then publish again. To end it: "
        f"fleet rollback {model} --to latest --registry {store.name} --reason TEXT",
    )


def joined(
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
