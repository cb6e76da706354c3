"""
The commands that the pages show, and the test that types each of them.

    blocks("text")              the fenced blocks of a page
    commands(block)             the lines of one that a reader types, as words
    form(words)                 `bump --local`: a verb with its options, whatever their values

Rules for pages: commands stand in fences of `console` (lines that begin with `$ `; the rest is what
they printed) or `sh` (every line). What the tests cannot run has the reason on the line before the
fence: `<!-- needs: GitHub -->`. Every other `fleet` line is typed by a test, which stands below.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

# What a test of this suite has not: what stands behind `needs:`.
NEEDS: Final = frozenset((
    "GitHub", "GPU", "root", "network", "a rack", "Docker", "Kubernetes", "a registry",
    "the toolchain",
))  # fmt: skip

# A test, and the commands that it types: each a verb and its options, sorted, without values.
# `tests/test_docs.py` holds that it does.
_TYPED: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    (
        "test_release_verbs",
        "test_the_commands_of_the_page_about_releases_can_be_typed_as_they_stand",
    ): (
        "audit",
        "gc --registry",
        "publish --to",
        "pull --from",
        "releases --registry",
        "rollback --reason --to",
        "verify-registry",
    ),
    ("test_bump", "test_a_dry_run_prints_the_pull_request_without_a_token"): (
        "bump --all --dry-run",
    ),
    ("test_fork_story", "_life"): (
        "bump --local",
        "check",
        "comment --base --dry-run",
        "init",
        "repro",
    ),
    ("test_check_upstream", "test_a_directory_is_held_against_its_digest_without_a_network"): (
        "check-upstream",
    ),
    ("test_plan", "test_an_edit_that_is_not_committed_is_planned_and_said"): ("plan --base",),
    ("test_init", "test_a_clone_without_github_begins_and_names_its_owners_later"): (
        "init --host --license --memory --registry --yes",
    ),
    ("test_what_if", "test_a_smaller_host_gets_another_answer_and_nothing_is_written"): (
        "choose --what-if",
    ),
    ("test_runner_health", "test_the_probe_looks_at_the_real_machine"): (
        "runner-health probe --host",
    ),
    ("test_comment", "test_the_verb_prints_the_comment_of_two_revisions"): (
        "comment --base --dry-run --head",
        "comment --dry-run",
    ),
    ("test_comment", "test_outside_a_run_the_verb_says_how_it_prints"): (
        "comment --dry-run --gate",
    ),
    ("test_compare", "_compared"): (
        "compare",
        "compare --base",
        "compare --quant",
    ),
    ("test_compare", "test_the_plan_is_told_and_a_small_budget_is_refused_with_what_would_fit"): (
        "compare --budget",
        "compare --plan",
    ),
    ("test_doctor", "test_a_fork_before_its_first_run_fails_nothing"): ("doctor",),
    ("test_doctor", "test_a_healthy_fleet_gives_no_failure_and_every_other_line_a_fix"): (
        "doctor --json --offline",
        "doctor --offline --strict",
    ),
    (
        "test_template",
        "test_the_whole_template_is_updated_by_its_own_code_and_the_new_code_looks_at_the_fleet",
    ): (
        "template status",
        "template update",
    ),
    ("test_fetch", "test_fleet_digest_prints_the_revision"): ("digest",),
    ("test_load_remote", "test_the_dialect_of_a_server_is_found_out_and_it_is_driven"): (
        "load-test --json --name --url",
        "load-test --url",
    ),
}
RUN_BY: Final = {each: test for test, typed in _TYPED.items() for each in typed}
LANGUAGES: Final = frozenset(("console", "sh"))
_FENCE: Final = re.compile(r"^(?P<indent>\s*)(?P<mark>`{3,}|~{3,})\s*(?P<language>\S*)")
_NEEDS: Final = re.compile(r"^\s*<!-- needs: (.+?) -->\s*$")
_HEREDOC: Final = re.compile(r"<<-?\s*(['\"]?)(\w+)\1")
_ASSIGNED: Final = re.compile(r"[A-Za-z_]\w*=")
_USES: Final = frozenset(("template", "runner-health"))


class Block(NamedTuple):
    """
    A fenced block of a page.

    Attributes:
        line: Of its fence, from 1.
        language: Behind the fence; may be empty.
        lines: What is in it.
        needs: What it says that it needs.
    """

    line: int
    language: str
    lines: tuple[str, ...]
    needs: frozenset[str]


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        number += 1
        if not fence:
            continue
        first = number
        while number < len(lines) and lines[number].strip() != fence["mark"]:
            number += 1
        said = _NEEDS.match(lines[first - 2]) if first > 1 else None
        needs = frozenset(each.strip() for each in said[1].split(",")) if said else frozenset[str]()
        yield Block(first, fence["language"], tuple(lines[first:number]), needs)
        number += 1


def commands(block: Block) -> Iterator[list[str]]:
    """Yield what a reader types into a shell, one list of words for each program."""
    for line in _typed(block):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set(";&|"):
                yield from _program(words)
                words = []
            else:
                words.append(word)


def _typed(block: Block) -> Iterator[str]:
    """Yield the lines of the shell, each whole, without what a heredoc feeds in."""
    until = ""
    whole = ""
    for raw in block.lines:
        line = raw.strip()
        if until:
            until = "" if line == until else until
            continue
        if block.language == "console" and not whole:
            if not line.startswith("$ "):
                continue
            line = line.removeprefix("$ ")
        whole += line.removesuffix("\\") if line.endswith("\\") else line
        if line.endswith("\\"):
            continue
        if heredoc := _HEREDOC.search(whole):
            until = heredoc[2]
        yield whole
        whole = ""


def _program(words: list[str]) -> Iterator[list[str]]:
    """Yield one command without what stands around it: variables, `time`, where its output goes."""
    while words and (_ASSIGNED.match(words[0]) or words[0] in {"time", "exec"}):
        words = words[1:]
    ends = [index for index, word in enumerate(words) if set(word) <= set("<>") and word]
    words = words[: ends[0]] if ends else words
    if words[:3] == ["python", "-m", "pipelines"]:
        words = ["fleet", *words[3:]]
    if words:
        yield words


def form(words: list[str]) -> str:
    """Return the verb (of some also what it is to do) and the options of a `fleet` line, sorted."""
    rest = words[1:]
    use = rest[1:2] if rest[0] in _USES else []
    options = {word.partition("=")[0] for word in rest if word.startswith("--")}
    return " ".join([rest[0], *use, *sorted(options)])
