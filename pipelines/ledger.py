"""
The ledger: every move of every alias of a model, in git, one line each, chained by hash.

    {"after":<sha256 of the line before>,"alias":"stable","kind":"move",...,"sha256":<of the rest>}

The line before is that of the same registry and alias, so that moves in two registries, made in two
branches, merge by union without a conflict (`merge=union` in .gitattributes). A waiver has a line
of its own, right before its move. Lines are a pure function of the moves: whoever writes the same
move writes the same line, and to write it twice changes nothing.

A line that was edited, removed or cut off is named with its place. What the ledger cannot tell is
whether its last lines are missing: `fleet audit` compares it with the registries for that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from pipelines import atomic, console, disk, locks, migrations, wording
from pipelines.errors import StoreError
from pipelines.records import Part
from pipelines.release_records import Move, ReleaseWaiver, Sequence, Sha256, short

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

_LOCK_TIMEOUT_S: Final = 60.0
_SILENT_S: Final = 2.0
_HINT: Final = (
    "It is only ever appended to. Take back the edit: `git log -p` shows who made it, and `git "
    "checkout COMMIT -- FILE` brings back how it was."
)


class LedgerError(StoreError):
    """The ledger in git is not what was written."""


class _Line(Part):
    """
    What every line has.

    Attributes:
        after: sha256 of the line before, of the same registry and alias; None of the first.
        sha256: Of this line without this field.
    """

    schema_version: Literal[1] = 1
    model: str
    registry: str
    alias: str
    after: Sha256 | None
    sha256: Sha256


class MoveLine(_Line):
    """A move of an alias; its waivers have lines of their own."""

    kind: Literal["move"] = "move"
    move: Move


class WaiverLine(_Line):
    """A refusal that somebody let pass for the move that follows."""

    kind: Literal["waiver"] = "waiver"
    sequence: Sequence
    waiver: ReleaseWaiver


LedgerLine = MoveLine | WaiverLine
_LINE: Final[TypeAdapter[LedgerLine]] = TypeAdapter(
    Annotated[LedgerLine, Field(discriminator="kind")]
)
_Key = tuple[str, str]  # registry, alias


def line_bytes(line: LedgerLine) -> bytes:
    """Return a line as it is written: canonical JSON in one line, without its end."""
    return _json(json.loads(line.model_dump_json()))


def _json(value: Any) -> bytes:  # noqa: ANN401 - any JSON value
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def lines_of(
    model: str, registry: str, alias: str, move: Move, after: str | None
) -> tuple[LedgerLine, ...]:
    """
    Return the lines of a move: one for each waiver, then its own.

    Args:
        model: Key of the model.
        registry: Key of the registry.
        alias: Name of the alias.
        move: The move.
        after: sha256 of the last line of that registry and alias; None if there is none.
    """
    made: list[LedgerLine] = []
    common = {"schema_version": 1, "model": model, "registry": registry, "alias": alias}
    contents: list[dict[str, Any]] = [
        {
            "kind": "waiver",
            "sequence": move.sequence,
            "waiver": json.loads(waiver.model_dump_json()),
        }
        for waiver in move.waivers
    ]
    contents.append({"kind": "move", "move": json.loads(move.model_dump_json())})
    for content in contents:
        value = {**common, **content, "after": after}
        line = _LINE.validate_json(_json({**value, "sha256": _digest(_json(value))}))
        made.append(line)
        after = _digest(line_bytes(line))
    return tuple(made)


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """A line and where it is in the file."""

    number: int
    data: bytes
    line: LedgerLine

    @property
    def key(self) -> _Key:
        return self.line.registry, self.line.alias


class Ledger:
    """
    The moves of one model, read and checked; `append` writes through to the file.

    Attributes:
        path: The file; it need not exist.
        model: Key of the model.
        lines: All lines, in file order; the same line twice (two branches wrote it) counts once.
    """

    def __init__(self, path: Path, model: str) -> None:
        """Begin with an empty ledger; `load` reads what there is."""
        self.path = path
        self.model = model
        self.lines: tuple[LedgerLine, ...] = ()
        self._chains: dict[_Key, tuple[_Placed, ...]] = {}

    @classmethod
    def load(cls, path: Path, model: str) -> Ledger:
        """
        Read and check a ledger; a missing file is an empty one.

        Raises:
            LedgerError: A line was edited, removed, cut off or written by something else; names
                file and line.
        """
        ledger = cls(path, model)
        ledger._read()
        return ledger

    def moves(self, registry: str, alias: str) -> tuple[Move, ...]:
        """Return every move of an alias in a registry, the oldest first."""
        return tuple(
            each.line.move
            for each in self._chains.get((registry, alias), ())
            if isinstance(each.line, MoveLine)
        )

    def last(self, registry: str, alias: str) -> Move | None:
        """Return the last move; None if there is none."""
        return next(reversed(self.moves(registry, alias)), None)

    @property
    def registries(self) -> tuple[str, ...]:
        """Registries of which it holds moves, sorted."""
        return tuple(sorted({registry for registry, _ in self._chains}))

    def append(self, registry: str, alias: str, *moves: Move) -> None:
        """
        Write moves, the oldest first, those that are not there.

        The file is read again first: another process may have written meanwhile. The new one is on
        the disk, whole, before its name is.

        Raises:
            LedgerError: It holds another move of that number, or a later one.
            RetryLaterError: Another process does not stop writing.
            MachineError: The disk is full; the file is as it was.
        """
        with disk.explained(self.path), self._writing():
            self._read()
            known = self.moves(registry, alias)
            chain = self._chains.get((registry, alias), ())
            after = _digest(chain[-1].data) if chain else None
            last = known[-1].sequence if known else 0
            lines: list[LedgerLine] = []
            for move in moves:
                if move in known:
                    continue
                if move.sequence <= last:
                    raise self._two_stories(registry, alias, move)
                lines += lines_of(self.model, registry, alias, move, after)
                after, last = _digest(line_bytes(lines[-1])), move.sequence
            if not lines:
                return
            old = self.path.read_bytes() if self.path.exists() else b""
            atomic.write_bytes(
                self.path, old + b"".join(line_bytes(line) + b"\n" for line in lines)
            )
            self._read()

    def _two_stories(self, registry: str, alias: str, move: Move) -> LedgerError:
        ours = next(
            each
            for each in self._chains[registry, alias]
            if isinstance(each.line, MoveLine) and each.line.move.sequence >= move.sequence
        )
        assert isinstance(ours.line, MoveLine), "chosen so"
        return LedgerError(
            f"{self.path}:{ours.number}: move {ours.line.move.sequence} of {self.model}@{alias} in "
            f"{wording.quoted(registry)} was to {short(ours.line.move.release)}; it cannot also be "
            f"move {move.sequence}, to {short(move.release)}.",
            hint="Two histories were mixed. `fleet audit` shows the registry's; keep the lines of "
            "one.",
        )

    def _writing(self) -> AbstractContextManager[None]:
        """Take turns with other writers of this checkout."""
        from pipelines.toolchain import default_cache_root  # noqa: PLC0415 - only who writes

        # Not beside the file: there it would be one more in git's eyes.
        name = _digest(str(self.path.resolve()).encode())[:16]
        return locks.exclusively(
            default_cache_root() / "locks" / f"ledger-{name}.lock",
            f"writing {self.path}",
            silent_s=_SILENT_S,
            timeout_s=_LOCK_TIMEOUT_S,
        )

    # reading

    def _read(self) -> None:
        """Read the file and check every chain in it."""
        with disk.explained(self.path):
            try:
                data = self.path.read_bytes()
            except FileNotFoundError:
                data = b""
        placed = self._placed(data)
        chains: dict[_Key, list[_Placed]] = {}
        for each in placed:
            chains.setdefault(each.key, []).append(each)
        self._chains = {key: self._linked(lines) for key, lines in chains.items()}
        self.lines = tuple(each.line for each in placed)

    def _placed(self, data: bytes) -> list[_Placed]:
        """Read the lines one by one."""
        *whole, rest = data.split(b"\n")
        if rest:
            raise LedgerError(
                f"{self.path}:{len(whole) + 1}: the last line was cut off: {len(rest)} bytes and "
                "no end.",
                hint="A power cut or another program did that. Remove that line and run the same "
                "command again: the registry remembers the move and its line is written anew.",
            )
        seen: set[bytes] = set()
        placed = []
        for number, line in enumerate(whole, start=1):
            if line not in seen:
                placed.append(_Placed(number=number, data=line, line=self._parsed(number, line)))
            seen.add(line)
        return placed

    def _parsed(self, number: int, data: bytes) -> LedgerLine:
        """Read one line, strictly: whatever is not canonical was not written by us."""
        where = f"{self.path}:{number}"
        if data.startswith((b"<<<<<<<", b"=======", b">>>>>>>")):
            raise LedgerError(
                f"{where}: a conflict of git's.",
                hint="Write `results/*/ledger.jsonl merge=union` into .gitattributes, then merge "
                "again; or keep the lines of both sides and remove the marks.",
            )
        try:
            line = _LINE.validate_json(data)
        except ValidationError as error:
            if (told := migrations.refusal(data)) is not None:
                advice = migrations.advice(data, _HINT)
                raise LedgerError(f"{where}: this line {told}.", hint=advice) from error
            first = error.errors(include_url=False)[0]
            at = console.clean(".".join(map(str, first["loc"])))[:100]
            place = f"{at}: " if at else ""
            raise LedgerError(
                f"{where}: no line of a ledger: {place}{console.clean(first['msg'])[:200]}.",
                hint=_HINT,
            ) from error
        value = json.loads(data)
        digest = value.pop("sha256")
        if line_bytes(line) != data or _digest(_json(value)) != digest:
            raise LedgerError(
                f"{where}: this line was edited: it does not have its sha256.", hint=_HINT
            )
        if line.model != self.model:
            raise LedgerError(
                f"{where}: a line of model {wording.quoted(line.model)} in the ledger of "
                f"{self.model}.",
                hint=_HINT,
            )
        return line

    def _linked(self, lines: list[_Placed]) -> tuple[_Placed, ...]:
        """
        Follow the chain of one registry and alias, wherever a merge put its lines.

        Raises:
            LedgerError: A line that another one follows is missing, or two follow the same.
        """
        following: dict[str | None, _Placed] = {}
        for each in lines:
            twin = following.setdefault(each.line.after, each)
            if twin is not each:
                raise LedgerError(
                    f"{self.path}:{each.number}: this line and line {twin.number} follow the same "
                    f"line: two branches moved {each.line.alias} in "
                    f"{wording.quoted(each.line.registry)} on their own.",
                    hint="Keep the lines of the branch that really moved it (`fleet audit` shows "
                    "what the registry says) and remove those of the other, then run the chain "
                    "again.",
                )
        chain: list[_Placed] = []
        after: str | None = None
        while (found := following.pop(after, None)) is not None:
            chain.append(found)
            after = _digest(found.data)
        if following:
            lost = min(following.values(), key=lambda each: each.number)
            raise LedgerError(
                f"{self.path}:{lost.number}: the line before it, of {lost.line.alias} in "
                f"{wording.quoted(lost.line.registry)}, is missing: it was removed or changed.",
                hint=_HINT,
            )
        self._require_upwards(chain)
        return tuple(chain)

    def _require_upwards(self, chain: list[_Placed]) -> None:
        """Moves are numbered upwards, and a waiver belongs to the move right after it."""
        waived: list[WaiverLine] = []
        last = 0
        for each in chain:
            line = each.line
            sequence = line.sequence if isinstance(line, WaiverLine) else line.move.sequence
            if sequence <= last or any(waiver.sequence != sequence for waiver in waived):
                raise LedgerError(
                    f"{self.path}:{each.number}: number {sequence} does not follow {last}.",
                    hint=_HINT,
                )
            if isinstance(line, WaiverLine):
                waived.append(line)
                continue
            if tuple(waiver.waiver for waiver in waived) != line.move.waivers:
                raise LedgerError(
                    f"{self.path}:{each.number}: the waivers before this move are not its own.",
                    hint=_HINT,
                )
            waived, last = [], sequence
        if waived:
            raise LedgerError(
                f"{self.path}:{chain[-1].number}: the move that this waiver was for is missing.",
                hint=_HINT,
            )
