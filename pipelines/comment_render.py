"""
A comment as Markdown, within what GitHub takes.

A comment, a check run and a mail each have their limit; 60,000 characters are within all of them.
What does not fit is left out in this order, and the comment says so:

    1. details of single requests, prompts and conditions
    2. charts
    3. history
    4. quants that passed without being chosen
    5. everything folded
    6. table, changes and gates of single models, of the promoted ones first; the headline of each
       model and the table of the winners stay
    7. the table of the winners
    8. models: those that are not promoted stay longest, the rest is counted

The job summary holds the same text with more room.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup

from pipelines import comment_charts, comment_model, routing, tables, wording
from pipelines import render as render_report
from pipelines.publishing_words import shown_size
from pipelines.verdict_words import capital

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jinja2 import Template

    from pipelines.ci_records import Budget, ModelPlan, PlanRecord
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
    "failed": "❌", "waiting": "✋",
}  # fmt: skip
OUTCOME_MARKS: Final = {"PASS": "✅", "HOLD": "⏸️", "FAIL": "❌", "INVALID": "⚠️"}


_GOOD: Final = frozenset({"PROMOTE", "REMOVED"})
_BRIEF_CHARACTERS: Final = 300
_SEE: Final = "see the job summary"
_BLANK_LINES: Final = re.compile(r"\n{3,}")
# What GitHub takes for a commit, and longer digests.
_HEX: Final = re.compile(r"(?<![A-Za-z0-9])[0-9a-f]{7,64}(?![A-Za-z0-9])")
_SIX: Final = re.compile(r"[0-9a-f]{6}(?=.)")
# Backticks after they were escaped, around what needs no escape.
_COMMAND: Final = re.compile(r"&#96;([A-Za-z0-9 ._/:=\"'-]{1,200})&#96;")
_CODE: Final = re.compile(r"(`[^`]*`)")


@dataclass(frozen=True, kw_only=True)
class Detail:
    """
    What is shown; see the list at the top of this module.

    `opened` is the number of models that have more than a headline, `models` of those that have
    one; None is all of them.
    """

    requests: bool = True
    charts: bool = True
    history: bool = True
    losers: bool = True
    folded: bool = True
    opened: int | None = None
    has_table: bool = True
    models: int | None = None

    @property
    def left_out(self) -> str:
        """What is missing, in words; empty if nothing is."""
        if self.opened is not None:
            return "the details, and most of several models"
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
)
# Without anything that only one model has.
_HEADLINES: Final = replace(STEPS[-1], opened=0)


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
    head = f"{marker}\n" if marker else ""

    def made(detail: Detail) -> str | None:
        text = head + _rendered(comment, detail)
        return text if len(text) <= limit else None

    for detail in STEPS:
        if (text := made(detail)) is not None:
            return text
    count = len(comment.models)
    bare = replace(_HEADLINES, has_table=False)
    for name, detail in (("opened", _HEADLINES), ("opened", bare), ("models", bare)):
        if (text := _most(partial(_with, made, detail, name), count)) is not None:
            return text
    # What is left has no end of its own: the problems of a declaration.
    text = head + _rendered(comment, replace(bare, models=0))
    end = f"\n\n{_SEE}\n"
    return text[: max(text.rfind("\n", 0, limit - len(end)), 0)] + end


def _with(made: Callable[[Detail], str | None], detail: Detail, name: str, many: int) -> str | None:
    """Render with so many models opened, or shown at all."""
    opened = replace(detail, opened=many) if name == "opened" else replace(detail, models=many)
    return made(opened)


def _most(made: Callable[[int], str | None], count: int) -> str | None:
    """Return what fits with as many models as do; None if not even none of them does."""
    best = made(0)
    least, most = 0, count
    # Sizes of models differ, but one more never makes it shorter.
    while best is not None and most - least > 1:
        middle = (least + most) // 2
        if (tried := made(middle)) is None:
            most = middle
        else:
            least, best = middle, tried
    return best


def summary(comment: Comment) -> str:
    """Render the same for the summary of a job, which has more room."""
    return render(comment, limit=SUMMARY_LIMIT)


def _rendered(comment: Comment, detail: Detail) -> str:
    models = comment.models
    shown = _worst_first(models, detail.models) if detail.models is not None else models
    missing = len(models) - len(shown)
    alone = models[0] if len(models) == 1 and detail.models is None else None
    text = _template().render(
        comment=comment,
        detail=detail,
        alone=alone,
        many=alone is None and bool(models),
        models=shown,
        opened=_worst_first(models, len(models) if detail.opened is None else detail.opened),
        counted_out=_counted_out(models, shown) if missing else "",
        left_out=detail.left_out if models else "",
        see=f"; {_SEE}",
        mark=MARKS[comment.verdict] if comment.verdict else STATE_MARKS[comment.state],
        shown_rows=lambda table: _rows(table, detail),
        hidden=lambda table: len(table.rows) - len(_rows(table, detail)),
        **_COMMON,
    )
    return _BLANK_LINES.sub("\n\n", text).strip("\n") + "\n"


def _worst_first(models: Sequence[ModelComment], count: int) -> tuple[ModelComment, ...]:
    """Return so many models, those that are not promoted before the others, in their order."""
    order = sorted(range(len(models)), key=lambda i: models[i].verdict in _GOOD)
    return tuple(models[i] for i in sorted(order[:count]))


def _counted_out(models: Sequence[ModelComment], shown: Sequence[ModelComment]) -> str:
    names = {one.name for one in shown}
    counts: dict[str, int] = {}
    for one in models:
        if one.name not in names:
            counts[one.verdict] = counts.get(one.verdict, 0) + 1
    told = ", ".join(f"{count:,} {verdict}" for verdict, count in counts.items())
    return f"and {wording.counted(len(models) - len(shown), 'model')} more ({told})"


def _rows(table: Table, detail: Detail) -> Sequence[TableRow]:
    """Leave out, where room is short, what neither won nor failed."""
    if detail.losers:
        return table.rows
    return [
        row for row in table.rows
        if row.is_strong or any(cell.mark and cell.mark != "✅" for cell in row.cells)
    ] or table.rows[:1]  # fmt: skip


# --- what the template calls ------------------------------------------------------------------


def text(value: object) -> str:
    """
    Make any text one line that GitHub shows as it is; digests and commands as code.

    A commit would become a link, which inside code it does not, and is copied whole from there.
    """
    return str(value) if isinstance(value, Markup) else _escaped(str(value))


# A fleet says the same words often, and one comment is rendered several times until it fits.
@lru_cache(maxsize=1 << 16)
def _escaped(value: str) -> str:
    escaped = render_report.escape_markdown(value)
    escaped = _COMMAND.sub(lambda found: f"`{found[1]}`", escaped)
    parts = _CODE.split(escaped)
    return "".join(
        part if index % 2 else _HEX.sub(lambda found: f"`{found[0]}`", part)
        for index, part in enumerate(parts)
    )


def plain(value: object) -> Markup:
    """Make text fit for a place where GitHub reads HTML and no Markdown: a `<summary>`."""
    escaped = render_report.escape_markdown(value)
    # Six digits are no commit yet.
    broken = _HEX.sub(lambda found: _SIX.sub("\\g<0>\u200b", found[0]), escaped)
    return Markup(broken)  # noqa: S704 - escaped just now


def _together(value: str) -> Markup:
    """Keep a number and its unit on one line."""
    return Markup(text(value).replace(" ", "\u00a0"))  # noqa: S704 - escaped just now


def _capital(value: str) -> str:
    return capital(wording.clause(value) if value.isupper() else value)


def _short(commit: str) -> str:
    return commit[:12] if _HEX.fullmatch(commit) else commit


def _stages(model: ModelPlan) -> str:
    """Say what has to run: `fetch, quantize (3), benchmark (3)`."""
    counts: dict[str, int] = {}
    for one in model.runs:
        counts[one.stage] = counts.get(one.stage, 0) + 1
    return ", ".join(
        f"{stage} ({count})" if count > 1 else stage for stage, count in counts.items()
    )


def _where(plan: PlanRecord, model: str) -> str:
    """Say on which hosts a model is measured, with the labels of their runners."""
    legs = [leg for leg in plan.legs if model in leg.models]
    return "; ".join(f"{leg.host} ({', '.join(leg.runs_on)})" for leg in legs) or "none"


def _took(budget: Budget) -> str:
    known = budget.gpu_minutes
    return "unknown" if known is None else comment_model.minutes(known * 60)


def _cost(budget: Budget) -> str:
    parts = []
    if budget.gpu_minutes is not None:
        parts.append(f"about {comment_model.minutes(budget.gpu_minutes * 60)} on runners")
    if budget.disk_bytes is not None:
        parts.append(f"{shown_size(budget.disk_bytes)} of disk")
    if budget.network_bytes is not None:
        parts.append(f"{shown_size(budget.network_bytes)} from the Hub")
    unknown = [wording.shortened(one, 200) for one in budget.unknown[:3]]
    return "; ".join([", ".join(parts) or "nothing is known of the cost", *unknown])


_COMMON: Final[dict[str, Any]] = {
    "marks": MARKS,
    "outcomes": OUTCOME_MARKS,
    "section_outcomes": {
        "PASS": "✅", "INCONCLUSIVE": "⏸️", "FAIL": "❌", "INVALID": "⚠️", "SKIP": "⏭️",
    },
    "most_gates": 12,
    "most_problems": 20,
    "most_models": 40,
    "run_columns": tables.of_runs,
    "text_columns": tables.of_texts,
    "pareto": comment_charts.pareto,
    "history": comment_charts.history,
    "number": wording.number,
    "capital": _capital,
    "brief": lambda value: wording.shortened(value, _BRIEF_CHARACTERS),
    "short": _short,
    "stages": _stages,
    "where": _where,
    "took": _took,
    "cost": _cost,
    "not_measured": routing.told,
    "plain": plain,
    "together": _together,
    "safe": Markup,
    "part": render_report.part,
}  # fmt: skip


@cache
def _template() -> Template:
    environment = render_report.environment(finalize=text)
    return environment.get_template("comment.md.j2")
