"""
A comment as Markdown, within what GitHub takes.

A comment, a check run and a mail each have their limit; 60,000 characters are within all of them.
What does not fit is left out in this order, and the comment says so:

    1. details of single requests, prompts and conditions
    2. charts
    3. history
    4. quants that passed without being chosen
    5. everything folded
    6. sentences of the verdicts, changes and gates; the headline of each model stays
    7. models: those that are not promoted stay longest, the rest is counted

The job summary holds the same text with more room.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from markupsafe import Markup

from pipelines import comment_charts, render, tables, wording

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jinja2 import Template

    from pipelines.comment_tree import Comment, ModelComment, Table, TableRow

LIMIT: Final = 60_000
# A job summary takes 1 MiB, a character up to four bytes.
SUMMARY_LIMIT: Final = 250_000
MARKS: Final = {
    "PROMOTE": "✅", "HOLD": "⏸️", "REJECT": "❌", "INVALID": "⚠️", "UNMEASURED": "⚠️",
    "REMOVED": "🗑️",
}  # fmt: skip
STATE_MARKS: Final = {
    "measuring": "⏳", "empty": "✅", "problems": "❌", "over-budget": "✋", "cancelled": "⏹️",
    "failed": "❌",
}  # fmt: skip
OUTCOME_MARKS: Final = {"PASS": "✅", "HOLD": "⏸️", "FAIL": "❌", "INVALID": "⚠️"}


@dataclass(frozen=True, kw_only=True)
class Detail:
    """What is shown; see the list at the top of this module."""

    requests: bool = True
    charts: bool = True
    history: bool = True
    losers: bool = True
    folded: bool = True
    sentences: bool = True
    models: int | None = None

    @property
    def left_out(self) -> str:
        """What is missing, in words; empty if nothing is."""
        if not self.folded:
            return "the details"
        parts = {
            "details of single requests": self.requests,
            "charts": self.charts,
            "history": self.history,
            "quants that passed without being chosen": self.losers,
        }
        return wording.listed([name for name, is_there in parts.items() if not is_there])


STEPS: Final = (
    Detail(),
    Detail(requests=False),
    Detail(requests=False, charts=False),
    Detail(requests=False, charts=False, history=False),
    Detail(requests=False, charts=False, history=False, losers=False),
    Detail(requests=False, charts=False, history=False, losers=False, folded=False),
    Detail(requests=False, charts=False, history=False, losers=False, folded=False,
           sentences=False),
)  # fmt: skip


def render(comment: Comment, *, marker: str = "", limit: int = LIMIT) -> str:
    """
    Render a comment.

    Args:
        comment: What it says.
        marker: Hidden first line, `<!-- ... -->`; the caller's own, not escaped.
        limit: Of characters, the marker included.

    Returns:
        Markdown that ends with a line end.
    """
    return f"{marker}\n## {comment.title}\n"[:limit]
