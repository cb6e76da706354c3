"""The pages: links lead somewhere, commands are ones that exist, and a test types each of them."""

from __future__ import annotations

import argparse
import ast
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from docs_commands import LANGUAGES, NEEDS, RUN_BY, blocks, commands, form

from checks import pages
from pipelines import cli_pages, error_pages, error_sites
from pipelines.__main__ import parser

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = [page for page in pages.reachable(ROOT) if not page.startswith("tests/")]
TARGETS: Final = frozenset(
    re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
)
VERBS: Final = cli_pages.verbs_of(parser())
SPAN: Final = re.compile(r"`(?:\$ )?(fleet [a-z][^`]*)`")


@cache
def text(page: str) -> str:
    """Return the text of a page or of a test of this repository."""
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def written(test: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the functions of a test, and the words of its texts."""
    nodes = list(ast.walk(ast.parse(text(test))))
    words = {
        word
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for word in re.split(r"[\s`]+", node.value)
    }
    for page in words.intersection(PAGES):
        # One that reads the page types what stands there.
        words.update(re.split(r"[\s`]+", text(page)))
    functions = (node.name for node in nodes if isinstance(node, ast.FunctionDef))
    return frozenset(functions), frozenset(words)


def shown(program: str) -> Iterator[tuple[str, list[str], frozenset[str]]]:
    """Yield place, words and needs of every command of a program in a block of a page."""
    for page in PAGES:
        for block in blocks(text(page)):
            if block.language in LANGUAGES:
                for words in commands(block):
                    if words[0] == program:
                        yield f"{page}:{block.line}", words, block.needs


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the parser of the command line has against a `fleet` line; empty if nothing."""
    try:
        parser().parse_args(words[1:])
    except SystemExit as end:
        said = capsys.readouterr()
        return "" if end.code == 0 else said.err.strip().splitlines()[-1]
    return ""


def test_every_link_of_every_page_leads_somewhere() -> None:
    """To a file of the template, and to a heading that it has."""
    assert [str(finding) for finding in pages.judge(ROOT)] == []
    assert len(PAGES) > 15


def test_a_link_that_leads_nowhere_is_told_with_its_line(tmp_path: Path) -> None:
    """A missing file, a missing heading, what is a fork's own; not what is only shown as code."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(
        "# A\n\n[page](docs/page.md#two-words-1) [gone](docs/gone.md)\n"
        "`[code](nowhere.md)` [out](https://example.invalid/x) [up](../x.md)\n"
        "```text\n[fenced](nowhere.md)\n```\n[by name]: docs/page.md#three\n[own](results/)\n"
    )
    (tmp_path / "docs/page.md").write_text(
        "# `Two` words\n\n## Two, words!\n\n[home](/README.md#a)"
    )
    (tmp_path / "docs/own.md").write_text("[x](y.md)")

    found = [(each.line, each.text) for each in pages.judge(tmp_path)]

    assert found == [
        (3, "docs/gone.md is not there"), (4, "../x.md is not there"),
        (8, "docs/page.md has no heading #three"),
        (9, "results/ is the operator's: a fork has others there"),
    ]  # fmt: skip
    assert pages.unread(tmp_path) == ["docs/own.md"]


def test_every_command_of_every_page_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """Verb and options exist: each `fleet` line of a block goes through the real parser."""
    wrong = [
        f"{place}: {' '.join(words)}: {said}"
        for place, words, _ in shown("fleet")
        if (said := refusal(words, capsys))
    ]
    missing = [f"{place}: make {w}" for place, words, _ in shown("make") for w in words[1:]
               if w not in TARGETS and "=" not in w]  # fmt: skip

    assert wrong + missing == []
    assert sum(1 for _ in shown("fleet")) > 30


def test_commands_stand_where_a_reader_can_copy_them() -> None:
    """A fence that holds commands says so, and says its needs in words that are known."""
    for page in PAGES:
        for block in blocks(text(page)):
            place = f"{page}:{block.line}"
            assert block.needs <= NEEDS, f"{place}: {', '.join(block.needs - NEEDS)}"
            if not block.language:
                assert not any(line.lstrip("$ ").startswith("fleet ") for line in block.lines), (
                    f"{place}: say ```sh, ```console or ```text"
                )


def test_a_test_types_every_command_of_every_page() -> None:
    """With the same options; where none can, the block says what that would need."""
    untested = {
        f"{place}: `{form(words)}` is typed by no test of docs_commands.py"
        for place, words, needs in shown("fleet")
        if not needs and form(words) not in RUN_BY
    }

    assert sorted(untested) == []


@pytest.mark.parametrize("typed", RUN_BY)
def test_the_test_that_is_named_types_that_command(typed: str) -> None:
    """It exists, and verb and options stand in its file as words."""
    module, name = RUN_BY[typed]
    functions, words = written(f"tests/{module}.py")

    assert name in functions
    assert set(typed.split()) <= words


def test_a_command_within_a_sentence_exists() -> None:
    """Of `fleet VERB --option` in the text of a page verb and options are real ones."""
    wrong = []
    for page in PAGES:
        for number, line in pages.prose(text(page)):
            for span in SPAN.findall(line):
                verb, *words = re.split(r"[\s|]+", span.removeprefix("fleet ").replace("\\", ""))
                given = {re.sub(r"[^a-z-].*", "", w.lstrip("[")) for w in words if "--" in w[:3]}
                known = VERBS[verb]._option_string_actions if verb in VERBS else None
                if known is None or not {g for g in given if g != "--"} <= set(known):
                    wrong.append(f"{page}:{number}: {span}")

    assert wrong == []


def test_every_verb_and_every_option_has_words_on_its_page() -> None:
    """docs/cli.md leaves nothing out that `fleet --help` knows."""
    page = cli_pages.page()

    for name, verb in VERBS.items():
        block = page.split(f"\n## fleet {name}\n")[1].split("\n## ")[0].replace("\\|", "|")
        for action in verb._actions:
            if action.dest != "help" and action.help is not argparse.SUPPRESS:
                assert any(f"`{word}" in block or f", {word}" in block
                           for word in action.option_strings or [f"{action.metavar or ''}"]), (
                    f"{name} {action.dest}"
                )  # fmt: skip
                assert action.help, f"{name} {action.dest}"


def test_the_commonest_errors_are_those_of_the_code() -> None:
    """What is said by hand about an error is said about words that the code still has."""
    code = "".join(
        re.sub(r"\"\s*\n\s*f?\"", "", path.read_text("utf-8"))
        for path in sorted(error_sites.PACKAGE.rglob("*.py"))
        if path.name != "error_pages.py"
    )

    for each in error_pages.COMMON:
        assert each.said in code, each.said


def test_every_error_of_the_code_is_found_with_its_exit_code_and_its_next_step(
    tmp_path: Path,
) -> None:
    """A literal, an f-string, a text by name, a subclass with a code of its own."""
    (tmp_path / "a.py").write_text(
        "HINT = 'Do this.'\n"
        "class OwnError(ToolError):\n    exit_code = 6\n"
        "def f(path, quant):\n"
        "    text = f'{path} of {quant.name} is not what {len(path)} of `fleet x {path}` said.'\n"
        "    raise OwnError(text, hint=HINT)\n"
        "def g(error):\n    raise StoreError(error.message)\n"
        "class C:\n    def h(self):\n        return ParamsError('that ' 'is wrong.')\n"
    )
    (tmp_path / "errors.py").write_text(
        "class FleetError(Exception): exit_code = 1\n"
        "class ToolError(FleetError):\n    exit_code = 4\n"
        "class StoreError(FleetError):\n    exit_code = 8\n"
        "class ParamsError(FleetError):\n    exit_code = 2\n"
    )

    found = error_sites.sites(tmp_path)

    assert [(site.exit_code, site.message, site.hint) for site in found] == [
        (6, "<path> of <quant> is not what <number> of `fleet x <path>` said.", "Do this."),
        (2, "that is wrong.", ""),
    ]
    assert error_pages._markdown(found[0].message) == (
        "*path* of *quant* is not what *number* of `fleet x PATH` said."
    )


def test_the_page_of_errors_has_the_exit_code_of_every_class() -> None:
    """None of the code's errors is without a table, and each that is told has words."""
    page = error_pages.page()
    found = error_sites.sites()

    assert {site.exit_code for site in found} == {1, 2, 3, 4, 5, 6, 7, 8, 75}
    assert len(found) > 500
    for site in found[::25]:
        assert f"| {error_pages._markdown(site.message)} |" in page
