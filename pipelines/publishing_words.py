"""What `publish` and `point` say of what they did, or would do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines import wording
from pipelines.release_records import STABLE, short

if TYPE_CHECKING:
    from pipelines.moves import Settled
    from pipelines.stores.base import Store


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Blobs that were not there, their size, and what of it was sent: not what is linked."""

    count: int = 0
    size_bytes: int = 0
    sent_bytes: int = 0


def done_sentence(id_: str, store: Store, sent: Sent, settled: Settled) -> str:
    """Say in one or two sentences what was done."""
    if not sent.count and settled.moved is None and not settled.restored:
        return (
            f"Release {short(id_)} is in {store.name} already, and {STABLE} means "
            f"{short(settled.before)}: nothing changed."
        )
    stored = ""
    if sent.count:
        size = shown_size(sent.sent_bytes)
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


def planned_sentence(id_: str, store: Store, count: int, size_bytes: int, planned: Settled) -> str:
    """Say in one sentence what would be done."""
    if not count and planned.alias is None:
        return f"Release {short(id_)} is in {store.name}, and {STABLE} is right: nothing to do."
    files = f"{wording.counted(count, 'file')} ({shown_size(size_bytes)})"
    sent = f"send {files}" if count else "send nothing"
    return f"Would {sent} to {store.shown} and {_move_words(planned, past=False)}."


def _move_words(settled: Settled, *, past: bool) -> str:
    """Say what happens to the alias, as the end of a sentence."""
    move = settled.moved
    if move is None:
        if not settled.restored:
            return f"{STABLE} still means {short(settled.before)}" if past else f"leave {STABLE}"
        return "put back the moves of the ledger"
    verb = ("move", "moved")[past]
    way = f"{verb} {STABLE}"
    if move.action == "rollback":
        way = (
            f"{way} forward"
            if _is_forward(settled)
            else f"{('roll', 'rolled')[past]} back {STABLE}"
        )
    origin = f" from {short(move.previous)}" if move.previous else ""
    moved = f"{way}{origin} to {short(move.release)} (move {move.sequence})"
    return f"put back the moves of the ledger and {moved}" if settled.restored else moved


def _is_forward(settled: Settled) -> bool:
    """Whether the alias goes to a release that it has meant only after the one that it leaves."""
    move = settled.moved
    moves = settled.alias.moves if settled.alias else ()
    first = {each.release: each.sequence for each in reversed(moves[:-1])}
    if move is None or move.previous is None:
        return False
    return first.get(move.release, 0) > first.get(move.previous, move.sequence)


def shown_size(size_bytes: int) -> str:
    """Write a size so that a Modelfile and a GGUF both read well."""
    for unit, unit_bytes in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= unit_bytes:
            return f"{wording.number(size_bytes / unit_bytes)} {unit}"
    return wording.counted(size_bytes, "byte")
