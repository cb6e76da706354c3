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
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipelines import chart, chart_latency, tables, wording
from pipelines.console import clean
from pipelines.report_tree import NOTICES, VERDICTS, Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipelines.evidence import Measured
    from pipelines.report_tree import LoadBlock, ModelReport, Report, Row, Section

# GitHub takes 65,536 characters in a comment; the sticky marker and the footer need some.
MARKDOWN_LIMIT = 60_000
_COLOURS = {
    "PROMOTE": "32", "CHOSEN": "32", "HOLD": "33", "REJECT": "31", "INVALID": "35", "PASS": "2",
    "FAIL": "31", "INCONCLUSIVE": "33", "SKIP": "2",
}  # fmt: skip
# Whose tone of the style sheet the outcome of a load test has.
_TONES = {
    "PASS": "promote", "FAIL": "reject", "INCONCLUSIVE": "hold", "INVALID": "invalid",
    "SKIP": "pass",
}  # fmt: skip
_TERMINAL_FACTS = frozenset({"manifest", "cold load", "slots", "client"})
_MARKS = {"PROMOTE": "✅", "HOLD": "⏸️", "REJECT": "❌", "INVALID": "⚠️"}
_OUTCOMES = {"PASS": "✅", "INCONCLUSIVE": "⏸️", "FAIL": "❌", "INVALID": "⚠️", "SKIP": "⏭️"}


# --- Markdown ---------------------------------------------------------------------------------

_ENTITIES = str.maketrans(
    {character: f"&#{ord(character)};" for character in "&<>|`*[]\\~$"}
    # GitHub turns @name and #1 into mentions and links after Markdown has been read, where an
    # entity is a plain character again; a zero-width space inside is what keeps them text.
    | {"@": "@\u200b", "#": "#\u200b"}
)
_LOOSE_UNDERSCORE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_UNITS = re.compile(r"(?<=\d) (?=%|tok/s|nats|MiB|GiB|tokens|quants)|(?<=at depth) (?=\d)")
_LINK = re.compile(r"(?i)(:)(?=//)|(www)(?=\.)|(mailto|xmpp)(?=:)|\b(GH-)(?=\d)")
# GitHub draws some of these as images; the second colon may be the one that follows the text.
_EMOJI = re.compile(r":(?=[a-z0-9_+-]+(?::|$))")


def escape_markdown(value: object) -> str:
    """Make any text one line that GitHub shows as the very same characters and nothing else."""
    if isinstance(value, Markup):
        return str(value)
    line = " ".join(clean(str(value)).split()).translate(_ENTITIES)
    line = _LOOSE_UNDERSCORE.sub("&#95;", line)
    return _EMOJI.sub(":\u200b", _LINK.sub(lambda found: f"{found[0]}\u200b", line))


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
    template = environment(finalize=escape_markdown, autoescape=False).get_template("report.md.j2")
    shown = [m for m in report.models if detail > 0 or m.verdict != "PROMOTE"]
    return template.render(
        report=report,
        models=shown,
        detail=detail,
        columns=tables.of_quants,
        run_columns=tables.of_runs,
        text_columns=tables.of_texts,
        rows=lambda model: _rows(model, everyone=detail > 2),  # noqa: PLR2004 - see `markdown`
        marks=_MARKS,
        outcomes=_OUTCOMES,
        number=wording.number,
        is_winner=lambda row: row.is_winner,
        safe=Markup,
        part=part,
    )


def part(markdown: str) -> Markup:
    """Put what a macro of `parts.md.j2` made, which is escaped already, into another template."""
    return Markup(markdown.rstrip("\n"))  # noqa: S704 - every value in it was escaped there


def _rows(model: ModelReport, *, everyone: bool) -> Sequence[Row]:
    return [row for row in model.rows if everyone or row.verdict != "PASS"]


# --- HTML -------------------------------------------------------------------------------------


def html(report: Report) -> str:
    """Render one page that needs nothing from anywhere."""
    css, script = _asset("report.css"), _asset("report.js")
    template = environment(autoescape=True).get_template("report.html.j2")
    return template.render(
        report=report,
        # Ours, from the package; nothing of a record is in them.
        css=Markup(css),  # noqa: S704 - a file of this package
        script=Markup(script),  # noqa: S704 - a file of this package
        policy=_policy(css, script),
        columns=tables.of_quants,
        run_columns=tables.of_runs,
        text_columns=tables.of_texts,
        charts=charts,
        load_charts=load_charts,
        tones=_TONES,
        notices=NOTICES,
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
        x_title=f"memory{tables.at(model.context_tokens)} tokens, MiB",
        less_x_is_better=True,
        x_limit=model.memory_limit_mib,
        kld_limit=kld_limit,
    )
    by_speed = chart.plan(
        [_mark(row, r.value, r) for row in shown if (r := row.decode_tok_s)],
        title=f"{model.name}: speed and divergence",
        x_title=f"decode{tables.at(model.depth_tokens)}, tok/s",
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


def load_charts(block: LoadBlock, name: str) -> list[Markup]:
    """Draw latency and throughput over concurrency; empty if fewer than two were tried."""
    steps = [
        chart_latency.Step(
            concurrency=row.concurrency,
            ttft_p50_ms=row.ttft_p50_ms,
            ttft_p95_ms=row.ttft_p95_ms,
            ttft_max_ms=row.ttft_max_ms,
            tpot_p50_ms=row.tpot_p50_ms,
            output_tok_s=row.output_tok_s,
        )
        for row in block.rows
        if row.concurrency is not None
    ]
    panels = chart_latency.plan(steps, title=block.type, levels=block.slos)
    words = ("latency", "throughput")
    return [
        Markup(chart_latency.svg(panel, name=f"{name}-{word}"))  # noqa: S704 - escaped there
        for panel, word in zip(panels or (), words, strict=False)
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
    released = [f"{model.name}: {text}" for model in report.models for text in model.released]
    last = f"{report.summary}. Details: results/report.md, results/report.html"
    upstream = [f"upstream, {one.kind}: {one.text}" for one in report.upstream]
    blocks.append([line for text in (*released, *upstream, last) for line in _wrap(text, width)])
    return "\n\n".join("\n".join(block) for block in blocks)


def _terminal_model(model: ModelReport, width: int, *, colour: bool) -> list[str]:
    lines: list[str] = []
    for headline, host in zip(model.headlines, model.hosts, strict=True):
        first, *rest = _wrap(headline, width)
        lines += [_paint(line, f"1;{_COLOURS[host.verdict]}", on=colour) for line in (first, *rest)]
    if model.next_step:
        lines += _wrap(f"next: {model.next_step}", width)
    lines += ["", *_terminal_table(model, width, colour=colour), ""]
    lines += [line for text in model.losers for line in _wrap(text, width, indent=2)]
    details = dict.fromkeys(text for host in model.hosts for text in host.details)
    for text in (*details, *model.notes):
        lines += _wrap(text, width, indent=2)
    for section in model.sections:
        lines += _terminal_section(section, width, colour=colour)
    for block in model.tests:
        lines += _terminal_test(block, width, colour=colour)
    if model.smokes:
        lines += ["", *_wrap("Smoke of the other quants", width)]
    for one in model.smokes:
        lines += _terminal_finding(one, width, colour=colour)
    lines += [""] if model.tests else []
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
    """Set the table of the quants, what was chosen marked and coloured."""
    found = tables.lines(
        tables.of_quants(model), model.rows, width, is_marked=lambda row: row.is_winner
    )
    return [
        _paint(line.text, "2", on=colour)
        if line.row is None
        else _paint(line.text, _COLOURS[line.row.verdict], on=colour and line.row.verdict != "PASS")
        for line in found
    ]


def _terminal_section(section: Section, width: int, *, colour: bool) -> list[str]:
    """Set one kind of evidence: what was found, its table, how it was looked at."""
    lines = ["", *_wrap(section.title, width)]
    for one in section.findings:
        lines += _terminal_finding(one, width, colour=colour)
    if section.table is not None:
        columns = tables.of_texts(section.table)
        found = tables.lines(columns, section.table.rows, width, is_marked=lambda _: False)
        # No column has a unit.
        shown = [found[0], *found[2:]]
        lines += ["", *(_paint(one.text, "2", on=colour and one.row is None) for one in shown), ""]
    for text in section.notes:
        lines += _wrap(text, width, indent=2)
    return lines


def _terminal_test(block: LoadBlock, width: int, *, colour: bool) -> list[str]:
    """Set the load test of one winner: title, levels, table, what else was looked at."""
    lines = ["", *_wrap(f"Load test of {block.title}", width)]
    for text in block.doubts:
        lines += _terminal_finding(Finding(outcome="INVALID", text=text), width, colour=colour)
    for one in (*block.levels, *block.checks):
        lines += _terminal_finding(one, width, colour=colour)
    lines += [line for text in block.capacity for line in _wrap(text, width, indent=2)]
    if block.rows:
        found = tables.lines(
            tables.of_runs(block.rows), block.rows, width, is_marked=lambda _: False
        )
        lines += ["", *(_paint(one.text, "2", on=colour and one.row is None) for one in found), ""]
    for text in block.notes:
        lines += _wrap(text, width, indent=2)
    facts = [f"{label}: {text}" for label, text in block.facts if label in _TERMINAL_FACTS]
    lines += [_paint(line, "2", on=colour) for line in _wrap(f"{'; '.join(facts)}.", width, 2)]
    return lines


def _terminal_finding(one: Finding, width: int, *, colour: bool) -> list[str]:
    lines = [
        _paint(line, _COLOURS[one.outcome], on=colour)
        for line in _wrap(f"{one.outcome.lower()}: {one.text}", width, indent=2)
    ]
    return [*lines, *(_cut(f"      {line}", width) for line in one.lines)]


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"


def _paint(text: str, code: str, *, on: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if on else text


# --- templates --------------------------------------------------------------------------------


@cache
def _asset(name: str) -> str:
    return (files("pipelines") / "templates" / name).read_text(encoding="utf-8").strip()


def environment(
    *, autoescape: bool = False, finalize: Callable[[object], str] | None = None
) -> Environment:
    """Return the engine of our templates; without `autoescape` every value goes to `finalize`."""
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
