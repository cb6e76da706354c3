"""
Questions that wait for others, several at a time, until one deadline for all of them.

The threads are daemons: one that hangs, in the resolver of names say, holds nobody up, not even the
end of the process.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pipelines import console

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Set as AbstractSet

THREADS: Final = 8
_STEP_S: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class Until:
    """
    How long is waited, in instants of `time.monotonic()`.

    Attributes:
        last: The end.
        first: When it is over already if nobody who is asked has said a word, and only questions to
            them are left; None to wait for them as for anything.
        answered: Whether somebody has.
        asked: Those questions.
    """

    last: float
    first: float | None
    answered: Callable[[], bool]
    asked: frozenset[str]

    def seconds(self, left: AbstractSet[str]) -> float:
        """Return how long to wait yet for the questions that are left."""
        is_mute = left <= self.asked and not self.answered()
        end = self.last if self.first is None or not is_mute else self.first
        return end - time.monotonic()


class _Done(queue.SimpleQueue[tuple[str, Any, BaseException | None]]):
    """What came of each question: its name, its answer, or what it raised."""


def run(
    questions: Mapping[str, Callable[[], Any]], until: Until, *, label: str, unit: str
) -> dict[str, Any]:
    """
    Ask everything, and return the answers that were there in time, by name.

    Args:
        questions: By name.
        until: How long to wait.
        label: Begins the progress line.
        unit: What is counted.

    Raises:
        BaseException: What a question raised, where it is waited for.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done = _Done()
    for name in questions:
        waiting.put(name)
    for _ in range(min(THREADS, len(questions))):
        threading.Thread(
            target=_work, args=(questions, waiting, done), daemon=True, name=label
        ).start()
    found: dict[str, Any] = {}
    with console.Progress(label, total=len(questions), unit=unit) as progress:
        while left := questions.keys() - found.keys():
            wait_s = until.seconds(left)
            try:
                name, value, error = done.get(timeout=min(max(wait_s, 0.001), _STEP_S))
            except queue.Empty:
                if wait_s <= 0:
                    break
            else:
                if error is not None:
                    raise error
                found[name] = value
            progress.update(len(found))
    return found


def _work(
    questions: Mapping[str, Callable[[], Any]], waiting: queue.SimpleQueue[str], done: _Done
) -> None:
    while True:
        try:
            name = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            done.put((name, questions[name](), None))
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            done.put((name, None, error))
