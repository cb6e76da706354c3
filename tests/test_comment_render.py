"""A comment fits, shows every text as it is, and is read by GitHub's Markdown as it was meant."""

from __future__ import annotations

import functools
import html
import re
import string
import tempfile
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import comment_factory as make
import comment_page as page
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import comment, comment_charts, comment_render
from pipelines.ci_records import PlanProblem
from pipelines.comment_render import LIMIT, STEPS, SUMMARY_LIMIT, render

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.comment_tree import Comment, ModelComment

LONGEST = "a-model-with-a-name-as-long-as-the-name-of-a-model-can-get-here"
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS")
assert len(LONGEST) == 63


def fleet_of(models: list[ModelComment]) -> Comment:
    """Put models into one comment, as `comment.compose` does."""
    common = {"base": make.BASE, "head": make.HEAD, "run_url": make.RUN}
    return comment._of_models(tuple(models), common)


@pytest.fixture(name="states", scope="module")
def _states() -> dict[str, Comment]:
    """Comments of every state."""
    return {name: make.state(name) for name in make.STATES}


@functools.cache
def widest() -> ModelComment:
    """Return a model of eight quants with the longest legal names, compared, on two hosts."""
    with tempfile.TemporaryDirectory() as folder:
        return _widest(Path(folder))


def _widest(root: Path) -> ModelComment:
    fleet = {
        type_: {"decode_tok_s": 100.0 + 50 * index, "kld_mean_nats": 0.001 * 1.9**index,
                "memory_mib": 20_000.0 - 900 * index, "size_mib": 18_000.0 - 900 * index}
        for index, type_ in enumerate(TYPES)
    }  # fmt: skip
    hosts = {f"{host}-{'h' * 51}": {"vram_mib": 24576} for host in ("workstation", "laptop")}
    base, head = make._trees(root)
    make.write(base, LONGEST, fleet, hosts=hosts)
    declared = make.write(
        head, LONGEST, {t: {**one, "noise": 0.2} for t, one in fleet.items()}, hosts=hosts
    )
    what = tuple(f"gates: max_kld_mean_nats {n} -> {n + 1}" + "x" * 900 for n in range(40))
    one = make.model_plan(LONGEST, what=what)
    (found,) = make.compose(base, head, {LONGEST: declared}, plan=make.plan_of(one)).models
    return found


@pytest.fixture(name="wide", scope="module")
def _wide() -> ModelComment:
    """The same."""
    return widest()


def named(model: ModelComment, index: int, verdict: str) -> ModelComment:
    """Make one of many of a model, with its own name and verdict."""
    name = f"{LONGEST[:-3]}{index:03d}"
    row = (replace(model.row[0], text=name), *model.row[1:])
    return replace(model, name=name, verdict=verdict, row=row)


# --- it fits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", make.STATES)
def test_a_usual_comment_is_whole(states: dict[str, Comment], name: str) -> None:
    """Nothing is left out of a comment on a few models, and it ends with one line end."""
    text = render(states[name])

    assert len(text) < LIMIT / 2
    assert "Left out" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


@settings(max_examples=8, deadline=None)
@given(
    count=st.integers(1, 64),
    verdicts=st.lists(st.sampled_from(["PROMOTE", "HOLD", "REJECT", "INVALID"]), min_size=1),
    limit=st.sampled_from([LIMIT, 20_000, 3_000]),
)
def test_any_fleet_fits(count: int, verdicts: list[str], limit: int) -> None:
    """Whatever the number of models: within the limit, every model named or counted."""
    models = [named(widest(), i, verdicts[i % len(verdicts)]) for i in range(count)]
    marker = "<!-- fleet:report run=42 attempt=1 -->"

    text = render(fleet_of(models), marker=marker, limit=limit)

    assert len(text) <= limit
    assert text.startswith(marker)
    missing = [one for one in models if one.name not in text]
    if missing:
        assert f"and {len(missing)} model" in text
        assert "see the job summary" in text


def test_the_largest_fleet_fits_everywhere(wide: ModelComment) -> None:
    """64 models of 8 quants: comment, check run and summary take it, no model is lost."""
    found = fleet_of([named(wide, i, "HOLD" if i % 7 else "REJECT") for i in range(64)])

    text = render(found)
    summary = comment_render.summary(found)

    assert len(text) <= 60_000
    assert all(one.name in text for one in found.models)
    assert len(summary) <= SUMMARY_LIMIT
    assert len(summary.encode()) <= 1 << 20


def test_what_is_left_out_goes_in_the_stated_order(wide: ModelComment) -> None:
    """Details first, then charts, history, losers, folds, sentences; each step is said."""
    found = fleet_of([replace(wide, history=_history())])
    whole = comment_render._rendered(found, STEPS[0])
    signs: list[Callable[[str], bool]] = [
        lambda text: "cold load" in text,
        lambda text: "```mermaid" in text,
        lambda text: "over 2 records" in text,
        lambda text: "| Q5_K_S" in text,
        lambda text: "Make it again" in text,
    ]

    assert all(sign(whole) for sign in signs)
    for gone, step in enumerate(STEPS[1:], 1):
        text = comment_render._rendered(found, step)
        assert [sign(text) for sign in signs] == [False] * gone + [True] * (len(signs) - gone)
        assert "Left out here for length" in text
        assert len(text) < len(whole)


def _history() -> Any:
    from pipelines.comment_tree import History, Point  # noqa: PLC0415 - here alone

    points = tuple(
        Point(commit="0123456789ab", day="2026-11-21", value_tok_s=v, low_tok_s=v, high_tok_s=v)
        for v in (1.0, 2.0)
    )
    return History(type="Q8_0", what="decode", points=points)


def test_those_that_are_not_promoted_stay_longest(wide: ModelComment) -> None:
    """Where not even headlines fit, the promoted models are counted first."""
    models = [named(wide, i, "REJECT" if i == 40 else "PROMOTE") for i in range(64)]

    text = render(fleet_of(models), limit=2_500)

    assert models[40].name in text
    assert "PROMOTE" in text
    assert len(text) <= 2_500


# --- a stranger's text ------------------------------------------------------------------------

HOSTILE = (
    "![x](https://evil.example/x.png)", "[click](https://evil.example)", "@octo-org/team", "@me",
    "</details><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "`a` ``b`` ```",
    "a | b | c", "one\ntwo\r\n\n# three", "\u202eevil\u202c \u200fRTL\u061c", "```mermaid\ngraph",
    "%%{init: {'theme': 'x'}}%%", 'click A "https://evil.example"', "#123 GH-123 owner/repo#7",
    "0123456789abcdef0123456789abcdef01234567 abcdef1", "https://evil.example www.evil.example",
    "mailto:a@b.example a@b.example", "<!-- fleet:report -->", "$$x$$ ~~y~~ **z** _w_ [^1]",
    "::error::x ##[group]", ":tada: :octocat:", ":tada",
    "<a href='//x'>", "&lt;img&gt; &amp;", "\\",
    "]()", "| --- |\n| x |", "    indented", "- [ ] task", "1. one", "> quote", "===",
    "---", "\x1b[31mred",
)  # fmt: skip
# What our own template puts in.
OWN_HTML = frozenset({
    "<br>", "<sub>", "</sub>", "<details>", "</details>", "<b>", "</b>", "<summary>", "</summary>",
})  # fmt: skip
_AUTOLINK = re.compile(r"(?i)https?://|ftp://|www\.|mailto:\w|xmpp:\w|[\w.+-]+@[\w-]+\.\w")
_MENTION = re.compile(r"(?<![\w`])@[A-Za-z0-9]")
_ISSUE = re.compile(r"#\d|\bGH-\d")
_COMMIT = re.compile(r"\b[0-9a-f]{7,40}\b")
_EMOJI = re.compile(r":[a-z0-9_+-]+:")


def poisoned(value: Any, texts: list[str], seen: list[int] | None = None) -> Any:
    """Put hostile texts behind every text of a tree, each in turn."""
    seen = seen if seen is not None else [0]
    if isinstance(value, str):
        seen[0] += 1
        return f"{value} {texts[seen[0] % len(texts)]}"
    if isinstance(value, tuple):
        return tuple(poisoned(one, texts, seen) for one in value)
    if isinstance(value, dict):
        return {key: poisoned(one, texts, seen) for key, one in value.items()}
    if is_dataclass(value):
        kept = {"verdict", "outcome", "commands", "rollback", "run_url", "state", "conclusion"}
        changed = {
            one.name: poisoned(getattr(value, one.name), texts, seen)
            for one in fields(value)
            if one.name not in kept and one.name != "is_measured"
        }
        return replace(cast("Any", value), **changed)
    if hasattr(value, "model_copy"):
        changed = {
            name: poisoned(getattr(value, name), texts, seen)
            for name in type(value).model_fields
            if name not in {"change", "stage", "schema_version"}
        }
        return value.model_copy(update=changed)
    return value


def objections(text: str) -> list[str]:
    """Return what a reader of GitHub's Markdown would do with a text beside showing it."""
    found = []
    depth = 0
    for token in page.tokens(text):
        if token.type in {"image", "html_inline", "html_block"}:
            tags = re.findall(r"<!--.*?-->|<[^>]*>", token.content, re.DOTALL)
            found += [tag for tag in tags if token.type == "image" or tag not in OWN_HTML]
            told = html.unescape(re.sub(r"<[^>]*>", "", token.content))
        elif token.type == "link_open":
            href = str(token.attrGet("href"))
            found += [] if href == make.RUN else [href]
            continue
        elif token.type == "fence" and token.info.strip() not in {"mermaid", "sh"}:
            found.append(token.info)
            continue
        elif token.type == "fence":
            told = token.content.replace(comment_charts.COLOUR, "")
            found += re.findall(r"(?m)%%|^\s*click|https?:|<|`|@", told)
            continue
        elif token.type == "code_block":
            found.append(token.content)
            continue
        elif token.type == "text":
            told = token.content
        else:
            continue
        for pattern in (_AUTOLINK, _MENTION, _ISSUE, _COMMIT, _EMOJI):
            found += [one[0] for one in pattern.finditer(told)]
    folds = re.findall(r"</?details>", text)
    for fold in folds:
        depth += 1 if fold == "<details>" else -1
        found += ["details end before they begin"] if depth < 0 else []
    return found + (["details without an end"] if depth else [])


@pytest.mark.parametrize("name", make.STATES)
def test_our_own_comments_hold_nothing_foreign(states: dict[str, Comment], name: str) -> None:
    """The oracle itself has nothing against comments without hostile text."""
    assert objections(render(states[name])) == []


@pytest.mark.parametrize("name", make.STATES)
def test_hostile_text_is_shown_and_does_nothing(states: dict[str, Comment], name: str) -> None:
    """No image, link, mention, HTML, commit, issue, emoji or directive comes from data."""
    for shift in range(0, len(HOSTILE), 7):
        texts = [*HOSTILE[shift:], *HOSTILE[:shift]]
        text = render(poisoned(states[name], texts), limit=SUMMARY_LIMIT)

        assert objections(text) == []
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u200f\x1b]", text)


_NASTY = st.text(
    alphabet=st.one_of(
        st.sampled_from("`<>|*_[]()!#@&~$\\/:.%{}-=+\"' \n\r\t\u202e\u200b0af"),
        st.sampled_from(string.ascii_letters + string.digits),
    ),
    max_size=60,
)


@settings(max_examples=8, deadline=None)
@given(texts=st.lists(st.one_of(_NASTY, st.sampled_from(HOSTILE)), min_size=1, max_size=6))
def test_any_text_is_shown_and_does_nothing(texts: list[str]) -> None:
    """The same for whatever a generator thinks of."""
    for name in ("promote", "measuring", "failed"):
        text = render(poisoned(make.state(name), texts), limit=SUMMARY_LIMIT)

        assert objections(text) == []


def test_the_table_stays_a_table(states: dict[str, Comment]) -> None:
    """A pipe or a line end in a cell makes no further cell and no further row."""
    plain = render(states["promote"])
    text = render(poisoned(states["promote"], ["a | b\n| c | d |", "|"]), limit=SUMMARY_LIMIT)

    def shape(markdown: str) -> list[str]:
        kinds = {"table_open", "tr_open", "td_open", "th_open"}
        return [one.type for one in page.parser().parse(markdown) if one.type in kinds]

    assert shape(text) == shape(plain)


# --- it reads well ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", make.STATES)
def test_the_verdict_is_the_first_line(states: dict[str, Comment], name: str) -> None:
    """A heading with a mark; the table has nine columns at most; bold is the winner alone."""
    text = render(states[name])
    first = text.splitlines()[0]

    assert re.fullmatch(r"### \S+ .+", first)
    for line in text.splitlines():
        if line.startswith(("| quant ", "| model ")):
            assert line.count("|") - 1 <= 9
    rows = re.findall(r"(?m)^\| \*\*(\S+?)\*\*.*", text.split("<details>")[0])
    if states[name].state == "judged":
        assert len(rows) <= 1


@pytest.mark.skipif(page.BROWSER is None, reason="no Chromium here: apt install chromium")
@pytest.mark.parametrize("width", [390, 900])
def test_the_page_fits_and_its_charts_are_drawn(
    states: dict[str, Comment], tmp_path: Path, width: int
) -> None:
    """Mermaid draws every chart without an error; nothing but tables is wider than the window."""
    text = "\n\n".join(
        render(states[name]) for name in ("promote", "models", "measuring", "hosts", "problems")
    )

    seen = page.browse(text, tmp_path, width)

    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert seen["wider"] == []
    assert len(seen["charts"]) == text.count("```mermaid") >= 4
    assert not [one for one in seen["charts"] if "Syntax error" in one]
    # What was drawn is what was meant.
    assert all(type_ in seen["charts"][0] for type_ in make.FLEET)
    if width == 900:
        shown, whole = seen["tables"][0]
        assert whole <= shown


def test_a_plan_and_problems_of_any_size_fit() -> None:
    """What has no models has no end either: 500 problems, 64 models to measure, hostile words."""
    nasty = "<" * 1900
    problems = tuple(
        PlanProblem(file="params.yaml", line=line, column=1, text=nasty) for line in range(1, 500)
    )
    wrong = comment.ended("failed", head=make.HEAD, failures=[nasty] * 100)
    wrong = replace(wrong, problems=problems, title=nasty)
    models = [
        make.model_plan(f"{LONGEST[:-3]}{index:03d}", what=(nasty,) * 9) for index in range(64)
    ]
    plan = make.plan_of(*models, over=(nasty,) * 50)

    for found in (wrong, comment.measuring(plan, head=make.HEAD)):
        text = render(found)
        assert len(text) <= LIMIT
        assert objections(text) == []
