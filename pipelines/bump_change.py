"""
One proposed change of a pin: what a pull request, a branch or a dry run is made of.

A bump is of a model (`tiny-llama`) or of an engine (`llama.cpp`). It has one branch,
`bump/SUBJECT`, with one commit on top of the default branch that changes single values of
params.yaml, and one open pull request. The marker in its body says what it proposes; it is the
whole memory of a bump: a pull request that somebody closed means that this very change is not
wanted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pipelines.pin_lines import Place, Value

PREFIX: Final = "bump/"
LABEL: Final = "bump"
# Of what changed: `bump: weights`.
CLASS_LABEL: Final = "bump: {name}"
# Characters of our part of a body; GitHub takes 65,536, and people write something, too.
BODY_LIMIT: Final = 60_000
_TRAILER: Final = "Fleet-Bump"
_WORD: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_MARKER: Final = re.compile(
    rf"<!-- fleet:bump (?P<subject>{_WORD}) (?P<old>{_WORD}?)\.\.(?P<new>{_WORD}?)"
    r"(?P<withdrawn> withdrawn)? -->"
)
_TRAILED: Final = re.compile(rf"(?m)^{_TRAILER}: {_WORD} {_WORD}$")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHORT: Final = 7
# How `fleet adopt` begins the message of a commit of records.
_RECORDS: Final = "Records: "


@dataclass(frozen=True, kw_only=True)
class Bump:
    """
    One change of a pin.

    Attributes:
        subject: Key of the model, or name of the engine.
        old: What params.yaml pins: a commit, a version.
        new: What it would pin.
        edits: Value by its place in params.yaml.
        title: Of the pull request and of its commit: words and digests of ours, one line.
        body: Makes our part of the body, Markdown in which words of others are escaped, with so
            many characters at most; without the marker.
        labels: Of the pull request.
    """

    subject: str
    old: str
    new: str
    edits: Mapping[Place, Value]
    title: str
    body: Callable[[int], str] = field(repr=False)
    labels: tuple[str, ...] = (LABEL,)

    @property
    def branch(self) -> str:
        """Its branch."""
        return branch_of(self.subject)

    @property
    def marker(self) -> str:
        """The line of the body, which GitHub does not show, that says what it proposes."""
        return f"<!-- fleet:bump {self.subject} {self.old}..{self.new} -->"

    @property
    def message(self) -> str:
        """Of its commit; the last line tells it from what people commit."""
        return f"{self.title}\n\n{_TRAILER}: {self.subject} {self.new}\n"

    def text(self, limit: int = BODY_LIMIT) -> str:
        """Return our part of the body, marker included, with `limit` characters at most."""
        head = f"{self.marker}\n"
        return head + self.body(min(limit, BODY_LIMIT) - len(head))


class Marker(NamedTuple):
    """
    What a body says of itself; everything is a stranger's.

    Attributes:
        subject, old, new: As in `Bump`.
        withdrawn: Whether we closed it ourselves, which says nothing of what people want.
    """

    subject: str
    old: str
    new: str
    withdrawn: bool


def branch_of(subject: str) -> str:
    """Return the branch of a model or an engine."""
    return f"{PREFIX}{subject}"


def marker_of(body: object) -> Marker | None:
    """Return what the body of a pull request proposes; None if it does not say."""
    found = _MARKER.search(body) if isinstance(body, str) else None
    if found is None:
        return None
    return Marker(found["subject"], found["old"], found["new"], found["withdrawn"] is not None)


def withdrawn(body: str) -> str:
    """Return a body that says that we took its proposal back."""
    return _MARKER.sub(
        lambda found: (
            f"<!-- fleet:bump {found['subject']} {found['old']}..{found['new']} withdrawn -->"
        ),
        body,
        count=1,
    )


def short(text: str) -> str:
    """Shorten a commit for people; a version stays."""
    return text[:_SHORT] if _COMMIT.fullmatch(text) else text


def is_bump(message: str) -> bool:
    """Tell whether a commit has the message of a bump."""
    return bool(_TRAILED.search(message))


def is_ours(message: str) -> bool:
    """Tell whether a commit has a message of ours: a bump, or records that a gate accepted."""
    return is_bump(message) or message.startswith(_RECORDS)
