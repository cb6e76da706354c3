"""
Links of the pages: each leads to a file of the template, and to a heading that is there.

Judged are the pages that README.md leads to, however far: those of the template. A page that
nothing leads to may be one of the operator's own; it is named, and no error.
"""

from __future__ import annotations

import re
import urllib.parse
from typing import TYPE_CHECKING, Final, NamedTuple

from checks.files import Finding
from pipelines import owners

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START: Final = "README.md"
RULE: Final = "page-link"
# Where pages lie; what others wrote (work/, .venv/) is none.
_GLOBS: Final = ("*.md", "docs/**/*.md", "deploy/**/*.md", "actions/*.md", "examples/**/*.md")
_FENCE: Final = re.compile(r"^\s*(?:> ?)*(`{3,}|~{3,})")
_SPAN: Final = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_INLINE: Final = re.compile(r"\]\(\s*<?([^)<>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE: Final = re.compile(r"^\s{0,3}\[[^\]]+\]:\s+<?(\S+?)>?(?:\s|$)")
_HEADING: Final = re.compile(r"^\s{0,3}#{1,6}\s+(.*?)\s*#*$")
_NAMED: Final = re.compile(r"<a\s+(?:id|name)=\"([^\"]+)\"")
_LINK_TEXT: Final = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_NO_LETTER: Final = re.compile(r"[^\w\- ]")
_ELSEWHERE: Final = re.compile(r"(?:[a-z][a-z0-9+.-]*:|//)", re.IGNORECASE)


class Link(NamedTuple):
    """A link of a page: the line, from 1, and where it leads."""

    line: int
    target: str


def judge(root: Path) -> list[Finding]:
    """Return every link of a page of the template that leads nowhere, or to what a fork lacks."""
    return [
        finding
        for page in reachable(root)
        for link in links((root / page).read_text(encoding="utf-8"))
        if (finding := _wrong(root, page, link))
    ]


def reachable(root: Path) -> list[str]:
    """Return the pages that README.md leads to, itself among them, as sorted paths below `root`."""
    found: set[str] = set()
    ahead = [START]
    while ahead:
        page = ahead.pop()
        if page in found or not (root / page).is_file() or owners.is_operators(page):
            continue
        found.add(page)
        for link in links((root / page).read_text(encoding="utf-8")):
            path = _path(root, page, link.target)
            if path and path.endswith(".md"):
                ahead.append(path)
    return sorted(found)


def unread(root: Path) -> list[str]:
    """Return the pages that lie beside those of the template, and that none of them leads to."""
    there = {path.relative_to(root).as_posix() for glob in _GLOBS for path in root.glob(glob)}
    return sorted(there.difference(reachable(root)))


def links(text: str) -> Iterator[Link]:
    """Yield the links of a page, without those that are only shown as code."""
    for number, line in prose(text):
        plain = _SPAN.sub("", line)
        for match in [*_INLINE.finditer(plain), *_REFERENCE.finditer(plain)]:
            yield Link(number, match[1])


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a page that are no code, with their numbers, from 1."""
    fence = ""
    for number, line in enumerate(text.splitlines(), start=1):
        mark = _FENCE.match(line)
        if not mark:
            if not fence:
                yield number, line
        elif not fence:
            fence = mark[1]
        elif mark[1].startswith(fence):
            fence = ""


def anchors(text: str) -> set[str]:
    """
    Return what may stand behind the `#` of a link to a page.

    Source: how GitHub makes anchors: lower case, spaces to hyphens, no punctuation, and a number
    behind one that was there before.
    """
    found: dict[str, int] = {}
    names: set[str] = set()
    for _, line in prose(text):
        names.update(_NAMED.findall(line))
        if heading := _HEADING.match(line):
            title = _LINK_TEXT.sub(r"\1", heading[1])
            slug = _NO_LETTER.sub("", title.replace("`", "").lower()).replace(" ", "-")
            count = found.get(slug, 0)
            found[slug] = count + 1
            names.add(f"{slug}-{count}" if count else slug)
    return names


def _path(root: Path, page: str, target: str) -> str | None:
    """Return the file that a link means, below the root; None if it is no file of this one."""
    path = urllib.parse.unquote(target.partition("#")[0])
    if _ELSEWHERE.match(target):
        return None
    if not path:
        return page
    full = (
        root / path.lstrip("/") if path.startswith("/") else root / page / ".." / path
    ).resolve()
    return (
        full.relative_to(root.resolve()).as_posix() if full.is_relative_to(root.resolve()) else ""
    )


def _wrong(root: Path, page: str, link: Link) -> Finding | None:
    path = _path(root, page, link.target)
    if path is None:
        return None
    text = fix = ""
    anchor = urllib.parse.unquote(link.target.partition("#")[2])
    file = root / path
    if not path or not file.exists():
        text, fix = f"{link.target} is not there", "Correct the link."
    elif owners.is_operators(path) or owners.is_operators(f"{path}/"):
        text = f"{link.target} is the operator's: a fork has others there"
        fix = "Link to tests/sample/ or bench/results/, or name the path without a link."
    elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text("utf-8")):
        text = f"{path} has no heading #{anchor}"
        fix = "Correct the anchor: lower case, hyphens for spaces, no punctuation."
    return Finding(page, link.line, RULE, text, fix) if text else None
