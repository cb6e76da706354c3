"""Tags in the order of the versions that they name, and the newest one of a pattern."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_PRE_RELEASE: Final = re.compile(
    r"(?i)(?<![a-z])(?:alpha|beta|preview|pre|rc|dev|nightly|snapshot|test)(?![a-z])"
)


def newest_tag(pattern: str, tags: Mapping[str, object]) -> str | None:
    """
    Return the tag that matches a pattern and has the highest version; None if none matches.

    Numbers count as numbers: v1.10 follows v1.9. A tag that names a pre-release (`-rc1`, `-beta`,
    `.dev2`) is older than the plain version, and is passed over altogether as long as there is a
    plain one, however high its number: who tracks `v*` tracks releases. A pattern that asks for
    them by name (`v*-rc*`) gets them.

    Args:
        pattern: Of the whole name; `*` stands for any text.
        tags: By name.
    """
    shape = re.compile(".*".join(map(re.escape, pattern.split("*"))))
    found = [name for name in tags if shape.fullmatch(name)]
    plain = [name for name in found if not _PRE_RELEASE.search(name)]
    return max(plain or found, key=version_key, default=None)


def version_key(tag: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """
    Return what sorts tags by version: numbers as numbers; a pre-release before its release.

    `1.0-rc1` < `1.0-rc2` < `1.0` < `1.0.1` < `1.10`.
    """
    parts: list[tuple[int, int, str]] = []
    for word in re.findall(r"\d+|[A-Za-z]+", tag):
        if word.isdigit():
            parts.append((2, int(word[:18]), ""))
        elif _PRE_RELEASE.fullmatch(word):
            parts.append((0, 0, word.lower()))
        elif parts:
            parts.append((3, 0, word.lower()))
    # The end of a version: after any pre-release of it, before any further number.
    return (*parts, (1, 0, "")), tag
