"""
The declared registries as the verbs see them: which there are, and what each has of a model.

One registry that cannot be reached keeps nobody from the others: `Failures` collects what went
wrong with each, and the first of it is the exit code.
"""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pipelines import console, params
from pipelines.errors import FleetError, ParamsError, RetryLaterError
from pipelines.ledger import Ledger
from pipelines.release_records import STABLE, Release, ReleaseFile, parse_release, short
from pipelines.stores.base import NotThereError
from pipelines.wording import counted, did_you_mean, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.release_records import Alias, Move
    from pipelines.stores.base import Store

_PLAIN_TIME_CHARACTERS = 16
# How long a registry may take for the first answer; of a store's retries, three or four.
ANSWERS_WITHIN_S: Final = 15.0
_Answer = TypeVar("_Answer")


def names(declared: Declaration) -> list[str]:
    """Return the keys of all registries: the local one first, then as they are declared."""
    return list(dict.fromkeys((params.LOCAL_REGISTRY, *declared.registries)))


def require_model(declared: Declaration, model: str) -> None:
    """
    See that a model is declared.

    Raises:
        ParamsError: It is not; the message says which one may have been meant.
    """
    if model not in declared.models:
        raise ParamsError(
            f"model {quoted(model)} is not declared{did_you_mean(model, declared.models) or '.'}",
            hint=f"Declared: {', '.join(declared.models)}.",
        )


def ledgers_of(declared: Declaration, at: Layout) -> dict[str, Ledger]:
    """
    Read the ledger of every model that this checkout knows, declared or not any more.

    Raises:
        LedgerError: One is broken.
    """
    known = {path.parent.name for path in at.root.glob("results/*/ledger.jsonl")}
    return {
        model: Ledger.load(at.ledger(model), model) for model in sorted({*declared.models, *known})
    }


def print_json(value: Any) -> None:  # noqa: ANN401 - any JSON value
    """
    Write a result as JSON that no terminal and no CI runner takes for more than text.

    Reasons and names come from registries. What a runner would obey is written with escapes of
    JSON, so that whoever parses it reads the very same words.
    """
    text = json.dumps(value, indent=2)
    console.out(text.replace("::", ":\\u003a").replace("##[", "#\\u0023["))


class Failures:
    """What went wrong with single registries or models, while the others were done."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.errors: dict[str, FleetError] = {}

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Do one of several things; an error of it is told and kept, and the next is done."""
        try:
            yield
        except FleetError as error:
            self.add(what, error)

    def add(self, what: str, error: FleetError) -> None:
        """Tell and keep one error."""
        self.errors.setdefault(what, error)
        # Many a message begins with what it is about.
        is_named = error.message.startswith(f"{what} ")
        console.error(error.message if is_named else f"{what}: {error.message}")
        if error.hint:
            console.info(f"  next: {error.hint}")

    @property
    def exit_code(self) -> int:
        """Exit code of the first; 0 if there was none."""
        return next((error.exit_code for error in self.errors.values()), 0)

    def as_json(self) -> dict[str, Any]:
        """Return the errors by what they are about, for `--json`."""
        return {
            what: {"exit_code": error.exit_code, "message": error.message, "next": error.hint}
            for what, error in self.errors.items()
        }


# --- the first question -----------------------------------------------------------------------


def answers(
    questions: Mapping[str, Callable[[], _Answer]],
) -> dict[str, _Answer | FleetError]:
    """
    Ask all registries at once what each is asked first; one that is gone keeps nobody waiting.

    Whoever sends files asks for minutes; who reads, or waits for a rollback, has an answer or an
    error after `ANSWERS_WITHIN_S`.

    Args:
        questions: What to call, by the name of the registry; only questions: a call that comes to
            no end is left behind.

    Returns:
        For each, in the order given: the answer, or what went wrong.
    """
    found: dict[str, _Answer | Exception] = {}

    def ask(name: str, question: Callable[[], _Answer]) -> None:
        try:
            found[name] = question()
        except Exception as error:  # noqa: BLE001 - raised again by who asked
            found[name] = error

    # Daemons: one that waits for an answer keeps no command from ending.
    threads = [
        threading.Thread(target=ask, args=each, daemon=True, name=f"ask {each[0]}")
        for each in questions.items()
    ]
    for thread in threads:
        thread.start()
    ends_at = time.monotonic() + ANSWERS_WITHIN_S
    for thread in threads:
        thread.join(max(0.0, ends_at - time.monotonic()))
    told: dict[str, _Answer | FleetError] = {}
    for name in questions:
        answer = found[name] if name in found else _late(name)
        if isinstance(answer, RetryLaterError):
            answer.hint = _ASK_AGAIN
        if isinstance(answer, Exception) and not isinstance(answer, FleetError):
            raise answer
        told[name] = answer
    return told


_ASK_AGAIN: Final = "Nothing was changed: it was only asked. Ask again when it can be reached."


def _late(name: str) -> RetryLaterError:
    return RetryLaterError(f"{name} did not answer within {ANSWERS_WITHIN_S:.0f} s.")


def require_answer(store: Store, model: str) -> None:
    """
    See that a registry answers at all, before somebody waits for it for minutes.

    Raises:
        RetryLaterError: It does not.
    """
    try:
        first_alias(store, model)
    except RetryLaterError:
        raise
    except FleetError:
        return  # it does; what is wrong there is said by what is asked next


def first_alias(store: Store, model: str) -> Alias | None:
    """
    Ask one registry for `stable`, for `ANSWERS_WITHIN_S` and no longer.

    Raises:
        RetryLaterError: It does not answer.
        StoreError: What it gives cannot be read.
    """
    answer = answers({store.name: lambda: store.read_alias(model, STABLE)[0]})[store.name]
    if isinstance(answer, FleetError):
        raise answer
    return answer


# --- what is there of a release ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Held:
    """
    What a registry has of one release.

    Attributes:
        release: None if release.json is not there (never published, or collected).
        missing: Files that are not there, or are of another size.
    """

    release: Release | None
    missing: tuple[ReleaseFile, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether a reader would find every file."""
        return self.release is not None and not self.missing

    @property
    def word(self) -> str:
        """The state in one word or two."""
        if self.release is None:
            return "collected"
        return f"{counted(len(self.missing), 'file')} missing" if self.missing else "whole"


@dataclass
class Shelf:
    """What a registry has of a model; each release and file is asked for once."""

    store: Store
    model: str
    _held: dict[str, Held] = field(default_factory=dict)
    _sizes: dict[str, int | None] = field(default_factory=dict)

    def held(self, id_: str) -> Held:
        """
        Ask for a release and the sizes of its files; no file is read.

        Raises:
            StoreError: It cannot be read, or is not the bytes of its name.
        """
        if id_ not in self._held:
            self._held[id_] = self._ask(id_)
        return self._held[id_]

    def _ask(self, id_: str) -> Held:
        try:
            data = self.store.read_release(self.model, id_)
        except NotThereError:
            return Held(release=None)
        release = parse_release(data, id_, f"registry {self.store.name}")
        missing = [file for file in release.files if self._size(file.sha256) != file.size_bytes]
        return Held(release=release, missing=tuple(missing))

    def _size(self, sha256: str) -> int | None:
        if sha256 not in self._sizes:
            self._sizes[sha256] = self.store.blob_size(self.model, sha256)
        return self._sizes[sha256]


# --- the moves of an alias --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Told:
    """
    One move, and who tells of it: the registry, the ledger in git, or both.

    A registry forgets all but its last moves; `is_lost` is true only of one that it should have.
    """

    move: Move
    in_registry: bool
    in_ledger: bool
    is_lost: bool


def history(alias: Alias | None, ledger: Iterable[Move]) -> tuple[Told, ...]:
    """
    Bring together what a registry and the ledger tell of an alias, in the order of the moves.

    Where they tell two stories of one move, both are in it.
    """
    stored = alias.moves if alias else ()
    written = tuple(ledger)
    oldest = stored[0].sequence if stored else 0
    moves = sorted({*stored, *written}, key=lambda move: (move.sequence, move.at, move.release))
    return tuple(
        Told(
            move=move,
            in_registry=move in stored,
            in_ledger=move in written,
            is_lost=move not in stored and move.sequence >= oldest,
        )
        for move in moves
    )


def meant_before(told: Iterable[Told]) -> list[str]:
    """Return the releases that an alias has meant, the newest first, each once."""
    return list(dict.fromkeys(each.move.release for each in reversed(tuple(told))))


def when(move: Move) -> str:
    """Write the time of a move for people: day and minute, UTC."""
    return console.clean(move.at)[:_PLAIN_TIME_CHARACTERS].replace("T", " ")


def shown(model: str, id_: str | None) -> str:
    """Write a release as the verbs take it: `model@0123456789ab`."""
    return f"{model}@{short(id_)}"


def reference(text: str) -> tuple[str, str]:
    """
    Split `MODEL`, `MODEL@ALIAS` or `MODEL@RELEASE`; without the latter it is `stable`.

    Raises:
        ParamsError: It is none of these.
    """
    model, at, wanted = text.partition("@")
    fits = re.fullmatch(params.MODEL_KEY, model)
    if not fits or (at and not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", wanted)):
        raise ParamsError(
            f"{quoted(text)} is no model and release.",
            hint="MODEL, MODEL@stable, MODEL@previous, or MODEL@ and the first digits of a "
            "release; `fleet releases MODEL` lists them.",
        )
    return model, wanted or STABLE
