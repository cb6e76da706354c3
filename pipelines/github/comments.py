"""
One comment of ours on a pull request, whoever else writes at the same time.

GitHub has no "create or update" for comments. A comment is ours if it begins with our marker and
was written under our login; the marker says which run it is of, so that an older run never
overwrites a newer one. After every write all comments are read again: of several of ours the one of
the newest run stays (the oldest, if they are of the same run) and the others are removed, by
whoever sees them. The last to look sees all of them, so in the end there is one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines.errors import RetryLaterError
from pipelines.github import identity
from pipelines.github.client import Unsent, taken
from pipelines.github.errors import BusyError, GitHubError, UnknownOutcomeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.github.client import GitHub

BODY_CHARACTERS: Final = 65_536
_ROUNDS: Final = 20
# After a write, until it is looked at again: longer than between another one's look and its write.
SETTLE_S: Final = 2.0
_NOT_FOUND: Final = 404
_GONE: Final = 410


@dataclass(frozen=True, order=True)
class Order:
    """
    Which of two reports is the newer one.

    Attributes:
        run_id: Of the run that is reported; later runs have larger ones.
        attempt: Of that run, 1, 2, ...
        phase: 0 while it measures, 1 when it is over.
    """

    run_id: int
    attempt: int
    phase: int


@dataclass(frozen=True)
class _Own:
    order: Order
    id: int
    body: str

    @property
    def rank(self) -> tuple[Order, int]:
        """The one to keep has the highest: of the newest run, and there for the longest time."""
        return self.order, -self.id


def marker_line(marker: str, order: Order) -> str:
    """Return the first line of a comment of ours, which GitHub does not show."""
    return f"<!-- {marker} run={order.run_id} attempt={order.attempt} phase={order.phase} -->"


def upsert_comment(  # noqa: PLR0913 - what a comment is, and how to settle
    gh: GitHub,
    number: int,
    marker: str,
    body: str,
    order: Order,
    *,
    create: bool = True,
    keep_ended: bool = False,
    believed: Callable[[Order], bool] | None = None,
    settle_s: float = SETTLE_S,
) -> bool:
    """
    Leave exactly one comment of ours on a pull request: this one, unless there is a newer one.

    Args:
        gh: The repository.
        number: Of the pull request.
        marker: Name of this comment among ours: `fleet:report`.
        body: Markdown.
        order: Of this report.
        create: Make one where there is none; otherwise only one that is there is changed.
        keep_ended: Leave one of another run as it is: that is over, or still ends (the run whose
            own commit of records made this one wait).
        believed: Tells of the order of a newer one whether there is such a run; one that is not
            believed is overwritten. All are believed if absent.
        settle_s: Seconds after a write until it is looked at once more.

    Returns:
        Whether it is this one that stands there; False if a newer run's does, or none.

    Raises:
        GitHubError: It is refused: the token may not, or the conversation is locked.
        RetryLaterError: It cannot be done now.
    """
    text = f"{marker_line(marker, order)}\n{body}"
    if len(text) > BODY_CHARACTERS:
        raise GitHubError(f"A comment of {len(text)} characters is too long for GitHub.")
    own = _Writer(gh, number, marker)
    settled = False
    for _ in range(_ROUNDS):
        found = own.all()
        best = max(found, key=lambda each: each.rank, default=None)
        for each in found:
            if each is not best:
                own.remove(each)
        if best is None and not (create or own.wrote):
            return False
        if best is not None and _stays(best.order, order, believed, keep_ended=keep_ended):
            return False
        if best is not None and best.order == order and best.body == text:
            if settled or not own.wrote:
                return True
            settled = True
            gh.pause(settle_s)
            continue
        if own.write(best, text) and gh.dry_run:
            return True
    raise RetryLaterError(
        f"Comments on #{number} change as fast as they are written.",
        hint="Run the job again: something else writes the same comment.",
    )


def _stays(
    there: Order, order: Order, believed: Callable[[Order], bool] | None, *, keep_ended: bool
) -> bool:
    """Tell whether what stands there is not to be overwritten."""
    if there > order:
        return believed is None or believed(there)
    return keep_ended and there != order


class _Writer:
    """Comments of one marker on one pull request, under one login."""

    def __init__(self, gh: GitHub, number: int, marker: str) -> None:
        self._gh = gh
        self._number = number
        self._login = identity.login(gh)
        self.wrote = False
        # At the very beginning: a comment that quotes ours is none of ours.
        self._line = re.compile(
            f"<!-- {re.escape(marker)} run=([0-9]{{1,19}}) attempt=([0-9]{{1,9}}) phase=([01]) -->"
        )

    def all(self) -> list[_Own]:
        """Return those that are there."""
        found = []
        for each in self._gh.paged(f"issues/{self._number}/comments"):
            body = each.get("body")
            body = body.replace("\r\n", "\n") if isinstance(body, str) else ""
            line = self._line.match(body)
            if line and identity.login_of(each) == self._login:
                run_id, attempt, phase = (int(part) for part in line.groups())
                found.append(_Own(Order(run_id, attempt, phase), taken(each, "id", int), body))
        return found

    def write(self, there: _Own | None, text: str) -> bool:
        """
        Change the comment that is there, or make one; False if it has to be looked at anew.

        A refused or lost attempt is not repeated blindly: what is there may have changed while
        GitHub made us wait.
        """
        if there is not None:
            try:
                self._gh.patch(f"issues/comments/{there.id}", {"body": text}, patient=False)
            except BusyError as error:
                # By then another run may have written a newer one.
                self._gh.pause(error.pause_s)
                return False
            except GitHubError as error:
                if error.status in {_NOT_FOUND, _GONE}:
                    return False  # removed by a person in between
                raise
            self.wrote = True
            return True
        try:
            made = self._gh.post(f"issues/{self._number}/comments", {"body": text})
        except UnknownOutcomeError:
            return False
        self.wrote = True
        if not isinstance(made, Unsent):
            # What GitHub calls us is our name; an older comment may be found by it now.
            self._login = identity.login_of(made) or self._login
        return True

    def remove(self, each: _Own) -> None:
        """Remove one; that somebody else did is fine."""
        self._gh.delete(f"issues/comments/{each.id}")
