"""
The body of the pull request of a bump: what somebody who is tired has to know to decide.

What needs a look comes first, then one table of facts, then the files, the notes and the commits;
differences are folded. It holds no verdict: the numbers come with the comment. It depends on what
upstream and the declaration say alone, not on the hour, so that a second run writes the same text.

Every word of upstream's is escaped. Links are made here, of parts that were looked at. What does
not fit into `limit` characters is left out in this order, and the body says so:

    1. differences, the longest first
    2. commits, beyond the first three
    3. notes, beyond the first five
    4. files, beyond the first five
    5. risks, beyond the first five; each sentence is cut
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from markupsafe import Markup

from pipelines import comment_render, console, wording
from pipelines import render as render_report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jinja2 import Template

MOST_COMMITS: Final = 10
MOST_FILES: Final = 20
_COMMIT_CHARACTERS: Final = 120
_BRIEF_CHARACTERS: Final = 240
# Of what is kept when room is short.
_FEW: Final = 5
_FEW_COMMITS: Final = 3
_BLANK_LINES: Final = re.compile(r"\n{3,}")
_TICKS: Final = re.compile(r"`+")
_URL: Final = re.compile(r"https?://[A-Za-z0-9._:\[\]-]{1,260}(?:/[A-Za-z0-9._+-]{1,120}){0,8}")
_COMMENT: Final = re.compile(r"<!--(?=\s*fleet:)")
_LEFT_OUT: Final = "Left out here for length"


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link of our making: words of ours, and an address of parts that were looked at."""

    text: str
    url: str

    def __post_init__(self) -> None:
        """Refuse what could be more than an address: that is a fault of ours."""
        if not _URL.fullmatch(self.url):
            raise ValueError(f"{self.url!r} is no address of ours")


class Risk(NamedTuple):
    """What needs a look before anything else: a word of ours, and a sentence."""

    label: str
    text: str


@dataclass(frozen=True, kw_only=True)
class FileLine:
    """
    One file.

    Attributes:
        name: Its name; upstream's.
        kind: What it is to a build: `weights`.
        before, after: Sizes in words; a dash if it is not there.
        change: What happened to it, with the difference of the sizes.
    """

    name: str
    kind: str
    before: str
    after: str
    change: str


@dataclass(frozen=True, kw_only=True)
class View:
    """
    What a body says; every text is escaped where it is put, and may be upstream's.

    Attributes:
        lead: What this is, in one or two sentences.
        risks: What needs a look before anything else.
        facts: Rows of the table: a label and its text.
        links: Where to read on.
        files: What changed; the first ones of `files_count`.
        files_count: All of them.
        notes: What changed, in sentences.
        commits: Titles, newest first; the first ones of `commits_count`.
        commits_count: All that are known.
        details: What is folded: title and text, shown as it is.
        ignore: How not to have it, as a sentence.
        rollback: Commands that take it back once it is merged; of ours.
        rollback_note: What they do, or why there are none.
        notice: What somebody has to do so that checks start, Markdown of ours; empty if nothing.
        truncated: What was left out for length, in words; `render` fills it in.
    """

    lead: str
    facts: tuple[tuple[str, str], ...]
    risks: tuple[Risk, ...] = ()
    links: tuple[Link, ...] = ()
    files: tuple[FileLine, ...] = ()
    files_count: int = 0
    notes: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()
    commits_count: int = 0
    details: tuple[tuple[str, str], ...] = ()
    ignore: str = ""
    rollback: tuple[str, ...] = ()
    rollback_note: str = ""
    notice: str = ""
    truncated: tuple[str, ...] = ()


def render(view: View, limit: int) -> str:
    """
    Render a body.

    Args:
        view: What it says.
        limit: Of characters.

    Returns:
        Markdown that ends with a line end, with `limit` characters at most.
    """
    text = ""
    for shorter in _shorter(view):
        text = _rendered(shorter)
        if len(text) <= limit:
            return text
    end = f"\n\n{_LEFT_OUT}: the rest.\n"
    return text[: max(text.rfind("\n", 0, max(limit - len(end), 0)), 0)] + end


def _shorter(view: View) -> Iterator[View]:
    """Yield it whole, then with less and less; see the top of this module."""
    view = replace(view, commits=view.commits[:MOST_COMMITS], files=view.files[:MOST_FILES])
    yield view
    details = list(view.details)
    while details:
        details.remove(max(details, key=lambda one: len(one[1])))
        view = _less(view, "differences", details=tuple(details))
        yield view
    view = _less(view, "commits", commits=view.commits[:_FEW_COMMITS])
    yield view
    view = _less(view, "notes", notes=_brief(view.notes[:_FEW]))
    yield view
    view = _less(view, "files", files=view.files[:_FEW])
    yield view
    facts = tuple((name, _cut(text)) for name, text in view.facts)
    risks = tuple(Risk(one.label, _cut(one.text)) for one in view.risks[:_FEW])
    yield _less(view, "ends of sentences", risks=risks, facts=facts)


def _less(view: View, what: str, **changes: Any) -> View:  # noqa: ANN401 - fields of it
    """Shorten one part of it, and say so if there was more."""
    shorter = replace(view, **changes)
    if shorter == view or what in view.truncated:
        return shorter
    return replace(shorter, truncated=(*view.truncated, what))


def _brief(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_cut(text) for text in texts)


def _cut(text: str) -> str:
    return wording.shortened(text, _BRIEF_CHARACTERS)


def _rendered(view: View) -> str:
    text = _template().render(
        view=view,
        code=code,
        fenced=fenced,
        plain=comment_render.plain,
        safe=Markup,
        left_out=f"{_LEFT_OUT}: {wording.listed(list(view.truncated))}.",
        number=lambda count: f"{count:,}",
    )
    # Not within what is shown as it is.
    parts = re.split(r"(?ms)(^(?P<fence>`{3,})\w*\n.*?^(?P=fence)$)", text)
    for index in range(0, len(parts), 3):
        parts[index] = _BLANK_LINES.sub("\n\n", parts[index])
    del parts[2::3]
    return "".join(parts).strip("\n") + "\n"


# --- a stranger's text ------------------------------------------------------------------------


def code(text: str, characters: int = _COMMIT_CHARACTERS) -> Markup:
    """Show a line of somebody's as code, in which GitHub reads neither Markdown nor names."""
    line = wording.shortened(" ".join(_plain(text).split()), characters) or "(no title)"
    longest = max((len(run) for run in _TICKS.findall(line)), default=0)
    ticks = "`" * (longest + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return Markup(f"{ticks}{pad}{line}{pad}{ticks}")  # noqa: S704 - nothing ends it early


def fenced(text: str, language: str = "diff") -> Markup:
    """Show lines of somebody's as they are, behind a fence that is longer than any in them."""
    clean = _plain(text.replace("\r\n", "\n")).strip("\n")
    longest = max((len(run) for run in _TICKS.findall(clean)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{clean}\n{fence}")  # noqa: S704 - the same


def _plain(text: str) -> str:
    """Clean it; and by a comment like ours, which GitHub hides, nobody finds our part again."""
    return _COMMENT.sub("<!\u200b--", console.clean(text))


@cache
def _template() -> Template:
    environment = render_report.environment(finalize=comment_render.text)
    return environment.get_template("bump.md.j2")
