"""
The report as Markdown, as one HTML page, and as text for a terminal.

Records may come from a stranger's pull request, so every value is escaped where it is put: in
Markdown by `escape_markdown`, through which the template engine sends all that is not marked safe;
in HTML by autoescape, behind a Content-Security-Policy that lets nothing load or run but the style
and the script inside the page, by their digests.
"""

from __future__ import annotations

import base64
import hashlib
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipelines import chart, wording
from pipelines.console import clean
from pipelines.report_tree import VERDICTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipelines.evidence import Measured
    from pipelines.report_tree import ModelReport, Report, Row

# GitHub takes 65,536 characters in a comment; the sticky marker and the footer need some.
MARKDOWN_LIMIT = 60_000
_COLOURS = {
    "PROMOTE": "32", "CHOSEN": "32", "HOLD": "33", "REJECT": "31", "INVALID": "35", "PASS": "2",
}  # fmt: skip
_MARKS = {"PROMOTE": "✅", "HOLD": "⏸️", "REJECT": "❌", "INVALID": "⚠️"}


# --- cells ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table of quants: its head, its text, and the number by which it sorts."""

    head: str
    unit: str
    text: Callable[[Row], str]
    sort: Callable[[Row], float | str | None]
    is_number: bool = True
    priority: int = 0

    @property
    def title(self) -> str:
        """Head and unit in one line."""
        return f"{self.head}, {self.unit}" if self.unit else self.head


def columns(model: ModelReport) -> tuple[Column, ...]:
    """Return the columns of a model; context and depth stand in their heads."""
    context = _at(model.context_tokens)
    depth = _at(model.depth_tokens)
    return (
        Column(head="quant", unit="", text=lambda r: r.type, sort=lambda r: r.type,
               is_number=False),
        Column(head="size", unit="MiB", text=lambda r: wording.number(r.size_mib),
               sort=lambda r: r.size_mib, priority=2),
        Column(head="bits/weight", unit="", text=lambda r: wording.number(r.bits_per_weight),
               sort=lambda r: r.bits_per_weight, priority=5),
        Column(head=f"memory{context}", unit="MiB", text=lambda r: wording.number(r.memory_mib),
               sort=lambda r: r.memory_mib, priority=1),
        Column(head=f"decode{depth}", unit="tok/s", text=lambda r: _interval(r.decode_tok_s),
               sort=lambda r: _value(r.decode_tok_s)),
        Column(head="prefill", unit="tok/s", text=lambda r: _interval(r.prefill_tok_s),
               sort=lambda r: _value(r.prefill_tok_s), priority=4),
        Column(head="divergence", unit="nats", text=lambda r: wording.number(r.kld_mean_nats),
               sort=lambda r: r.kld_mean_nats),
        Column(head="same top", unit="%", text=lambda r: wording.number(_percent(r.same_top)),
               sort=lambda r: r.same_top, priority=3),
        Column(head="PPL ratio", unit="", text=lambda r: wording.number(r.ppl_ratio, 4),
               sort=lambda r: r.ppl_ratio, priority=6),
        Column(head="verdict", unit="", text=lambda r: r.verdict_words,
               sort=lambda r: r.verdict_words, is_number=False),
    )  # fmt: skip


def _at(count: int | None) -> str:
    return "" if count is None else f" at {wording.tokens(count)}"


def _percent(share: float | None) -> float | None:
    return None if share is None else share * 100


def _value(measured: Measured | None) -> float | None:
    return None if measured is None else measured.value


def _interval(value: Measured | None) -> str:
    if value is None:
        return wording.ABSENT
    low, high = wording.number(value.low), wording.number(value.high)
    return f"{wording.number(value.value)} [{low}, {high}]"


# --- Markdown ---------------------------------------------------------------------------------

_ENTITIES = str.maketrans(
    {character: f"&#{ord(character)};" for character in "&<>|`*[]\\~$"}
    # GitHub turns @name and #1 into mentions and links after Markdown has been read, where an
    # entity is a plain character again; a zero-width space inside is what keeps them text.
    | {"@": "@\u200b", "#": "#\u200b"}
)
_LOOSE_UNDERSCORE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_UNITS = re.compile(r"(?<=\d) (?=%|tok/s|nats|MiB|GiB|tokens|quants)|(?<=at depth) (?=\d)")
_LINK = re.compile(r"(?i)(:)(?=//)|(www)(?=\.)|(mailto|xmpp)(?=:)")


def escape_markdown(value: object) -> str:
    """Make any text one line that GitHub shows as the very same characters and nothing else."""
    if isinstance(value, Markup):
        return str(value)
    line = " ".join(clean(str(value)).split()).translate(_ENTITIES)
    line = _LOOSE_UNDERSCORE.sub("&#95;", line)
    return _LINK.sub(lambda found: f"{found[0]}\u200b", line)


def markdown(report: Report, limit: int = MARKDOWN_LIMIT) -> str:
    """
    Render for GitHub; shorter and shorter until it fits into `limit` characters.

    First go lineage and method, then the quants that passed without being chosen, then the tables,
    at last the models that are promoted. What was left out is said.
    """
    text = ""
    for detail in (4, 3, 2, 1, 0):
        text = _markdown(report, detail)
        if len(text) <= limit:
            return text
    end = "\n\nThe rest does not fit here: see `results/report.html`.\n"
    return text[: text.rfind("\n", 0, limit - len(end))] + end


def _markdown(report: Report, detail: int) -> str:
    template = _environment(finalize=escape_markdown, autoescape=False).get_template("report.md.j2")
    shown = [m for m in report.models if detail > 0 or m.verdict != "PROMOTE"]
    return template.render(
        report=report,
        models=shown,
        detail=detail,
        columns=columns,
        rows=lambda model: _rows(model, everyone=detail > 2),  # noqa: PLR2004 - see `markdown`
        marks=_MARKS,
        number=wording.number,
        safe=Markup,
    )


def _rows(model: ModelReport, *, everyone: bool) -> Sequence[Row]:
    return [row for row in model.rows if everyone or row.verdict != "PASS"]


# --- HTML -------------------------------------------------------------------------------------


def html(report: Report) -> str:
    """Render one page that needs nothing from anywhere."""
    css, script = _asset("report.css"), _asset("report.js")
    template = _environment(autoescape=True).get_template("report.html.j2")
    return template.render(
        report=report,
        # Ours, from the package; nothing of a record is in them.
        css=Markup(css),  # noqa: S704 - a file of this package
        script=Markup(script),  # noqa: S704 - a file of this package
        policy=_policy(css, script),
        columns=columns,
        charts=charts,
        number=wording.number,
        prose=prose,
        commands=lambda model: "\n".join(model.commands),
    )


def prose(text: str) -> str:
    """Keep numbers and their units on one line."""
    return _UNITS.sub("\u00a0", text)


def _policy(css: str, script: str) -> str:
    """Allow the style and the script of the page by digest, and nothing else at all."""
    return (
        f"default-src 'none'; style-src '{_source_digest(css)}'; "
        f"script-src '{_source_digest(script)}'; base-uri 'none'; form-action 'none'"
    )


def _source_digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def charts(model: ModelReport, index: int) -> list[Markup]:
    """Draw divergence over memory and over speed; empty if fewer than two quants have both."""
    shown = [
        row
        for row in model.rows
        if row.verdict != "INVALID" and row.kld_mean_nats is not None and row.memory_mib
    ]
    if len(shown) < 2:  # noqa: PLR2004 - a single point shows no trade
        return []
    kld_limit = model.limits.get("max_kld_mean_nats")
    by_memory = chart.plan(
        [_mark(row, row.memory_mib, None) for row in shown if row.memory_mib],
        title=f"{model.name}: memory and divergence",
        x_title=f"memory{_at(model.context_tokens)} tokens, MiB",
        less_x_is_better=True,
        x_limit=model.memory_limit_mib,
        kld_limit=kld_limit,
    )
    by_speed = chart.plan(
        [_mark(row, r.value, r) for row in shown if (r := row.decode_tok_s)],
        title=f"{model.name}: speed and divergence",
        x_title=f"decode{_at(model.depth_tokens)}, tok/s",
        less_x_is_better=False,
        x_limit=None,
        kld_limit=kld_limit,
    )
    drawings = ((by_memory, "memory"), (by_speed, "speed"))
    return [
        Markup(chart.svg(plan, name=f"m{index}-{word}"))  # noqa: S704 - escaped by chart
        for plan, word in drawings
        if plan is not None
    ]


def _mark(row: Row, x: float, interval: Measured | None) -> chart.Mark:
    return chart.Mark(
        label=row.type,
        x=x,
        low=interval.low if interval else x,
        high=interval.high if interval else x,
        kld_mean_nats=row.kld_mean_nats or 0.0,
        verdict=row.verdict,
        on_frontier=row.on_frontier,
    )


# --- terminal ---------------------------------------------------------------------------------


def terminal(report: Report, width: int = 80, *, colour: bool = False) -> str:
    """Render for a person at a terminal of `width` columns; colour only if that is one."""
    width = max(width, 40)
    blocks = [_terminal_model(model, width, colour=colour) for model in report.models]
    last = f"{report.summary}. Details: results/report.md, results/report.html"
    blocks.append(_wrap(last, width))
    return "\n\n".join("\n".join(block) for block in blocks)


def _terminal_model(model: ModelReport, width: int, *, colour: bool) -> list[str]:
    lines: list[str] = []
    for headline, host in zip(model.headlines, model.hosts, strict=True):
        first, *rest = _wrap(headline, width)
        lines += [_paint(line, f"1;{_COLOURS[host.verdict]}", on=colour) for line in (first, *rest)]
    lines += ["", *_terminal_table(model, width, colour=colour), ""]
    lines += [line for text in model.losers for line in _wrap(text, width, indent=2)]
    details = dict.fromkeys(text for host in model.hosts for text in host.details)
    for text in (*details, *model.notes):
        lines += _wrap(text, width, indent=2)
    lines += [
        _paint(line, "2", on=colour) for text in model.method for line in _wrap(text, width, 2)
    ]
    return lines


def _wrap(text: str, width: int, indent: int = 0) -> list[str]:
    lead = " " * indent
    return textwrap.wrap(
        clean(text), width, initial_indent=lead, subsequent_indent=lead + "  ",
        break_on_hyphens=False,
    ) or [""]  # fmt: skip


def _terminal_table(model: ModelReport, width: int, *, colour: bool) -> list[str]:
    """Set the table in as many columns as fit, the least telling ones left out first."""
    shown = list(columns(model))
    while _table_width(shown, model.rows) > width and any(column.priority for column in shown):
        shown.remove(max(shown, key=lambda column: column.priority))
    widths = [_column_width(column, model.rows) for column in shown]
    heads = [_cell(column, column.head, w) for column, w in zip(shown, widths, strict=True)]
    units = [_cell(column, column.unit, w) for column, w in zip(shown, widths, strict=True)]
    lines = [
        _paint(_cut(("  " + "  ".join(cells)).rstrip(), width), "2", on=colour)
        for cells in (heads, units)
    ]
    for row in model.rows:
        cells = [_cell(c, clean(c.text(row)), w) for c, w in zip(shown, widths, strict=True)]
        mark = "▸ " if row.is_winner else "  "
        text = _cut((mark + "  ".join(cells)).rstrip(), width)
        lines.append(_paint(text, _COLOURS[row.verdict], on=colour and row.verdict != "PASS"))
    return lines


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"


def _column_width(column: Column, rows: Sequence[Row]) -> int:
    return max(
        len(column.head), len(column.unit), *(len(clean(column.text(row))) for row in rows), 0
    )


def _table_width(shown: Sequence[Column], rows: Sequence[Row]) -> int:
    return 2 * len(shown) + sum(_column_width(column, rows) for column in shown)


def _cell(column: Column, text: str, width: int) -> str:
    return text.rjust(width) if column.is_number else text.ljust(width)


def _paint(text: str, code: str, *, on: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if on else text


# --- templates --------------------------------------------------------------------------------


@cache
def _asset(name: str) -> str:
    return (files("pipelines") / "templates" / name).read_text(encoding="utf-8").strip()


def _environment(
    *, autoescape: bool, finalize: Callable[[object], str] | None = None
) -> Environment:
    return Environment(
        loader=PackageLoader("pipelines", "templates"),
        autoescape=autoescape,  # noqa: S701 - what is not autoescaped goes through `finalize`
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


assert set(_MARKS) == set(VERDICTS)
