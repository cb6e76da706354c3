"""
Print technical-english.jsonl: multiple choices about the English of software documentation.

    python examples/technical_english.py > corpora/evals/technical-english.jsonl

Each item is a beginning and four endings of which one is English. No sentence is taken from
anywhere. The kinds of task are such as the embedded model can do at all; no single item was chosen
by what a model answers, which would make every quant look harmed.
Equal on every machine: one seed, and nothing of Python's own hashing.
"""

# ruff: noqa: INP001 - a script, no package

from __future__ import annotations

import json
import random
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = 20_261_121

# Beginning, right ending, wrong endings.
Task = tuple[str, str, list[str]]

_NOUNS = (
    "function", "method", "module", "template", "database", "server", "test", "class", "command",
    "field", "query", "view", "session", "request", "package", "user",
)  # fmt: skip
# What goes before a preposition, the one that is right, three that never are, what can follow.
_GOVERNED = (
    ("The result depends", "on", "of to with", ("the value", "the type", "the order", "the name")),
    ("This option refers", "to", "of with at", ("a file", "the module", "the default", "a column")),
    ("The list consists", "of", "on to at", ("three items", "two parts", "the names", "two lines")),
    ("Use this instead", "of", "to with at", ("the old one", "a loop", "the class", "a function")),
    ("The name is based", "on", "of to with", ("the path", "the table", "the class", "a template")),
    ("It is set according", "to", "of with on", ("the rules", "the type", "the order", "its name")),
    (
        "It is responsible",
        "for",
        "of on with",
        ("the request", "the session", "each file", "it all"),
    ),
    (
        "This class is similar",
        "to",
        "of with on",
        ("the other one", "a list", "a view", "the field"),
    ),
    (
        "It is different",
        "from",
        "of on with",
        ("the first one", "the default", "a string", "a list"),
    ),
    (
        "The module is part",
        "of",
        "to with at",
        ("the package", "the project", "a test", "the rest"),
    ),
    ("It has no effect", "on", "of from at", ("the output", "the query", "the data", "the tests")),
    (
        "The test is related",
        "to",
        "of at from",
        ("the bug", "the database", "this error", "a cache"),
    ),
    ("Replace the string", "with", "of to at", ("a number", "a new one", "the name", "a value")),
    (
        "The class inherits",
        "from",
        "with to at",
        ("the base class", "a model", "a view", "another"),
    ),
    ("We have to deal", "with", "to of at", ("the error", "two files", "this case", "the rest")),
    ("Everything is subject", "to", "of with from", ("change", "the rules", "a check", "a limit")),
    ("It is a kind", "of", "to with from", ("list", "function", "database", "template")),
    ("The number", "of", "to with on", ("items", "users", "fields", "tests")),
    ("This is due", "to", "of with on", ("an error", "the cache", "the order", "a bug")),
    ("In addition", "to", "of with from", ("the name", "this class", "the default", "a file")),
    ("It is compatible", "with", "of on from", ("the new version", "a list", "both", "the rest")),
    ("It is equal", "to", "of with from", ("the default", "the first one", "a number", "two")),
)
_VERBS = (
    ("returns", ("return", "returning", "to return")),
    ("contains", ("contain", "containing", "to contain")),
    ("creates", ("create", "creating", "to create")),
    ("uses", ("use", "using", "to use")),
    ("takes", ("take", "taking", "to take")),
    ("provides", ("provide", "providing", "to provide")),
)
_SUBJECTS = ("It", "This is a class that", "When it is called, the method")
_PARTICIPLES = (
    ("can be", "used", ("use", "using", "uses")),
    ("will be", "created", ("create", "creating", "creates")),
    ("has been", "added", ("add", "adding", "adds")),
    ("should be", "called", ("call", "calls", "to call")),
    ("is not", "required", ("require", "requires", "to require")),
    ("was", "changed", ("change", "changes", "to change")),
)
_INFINITIVES = (
    ("If you want to", "use", ("uses", "using", "used")),
    ("It is possible to", "define", ("defines", "defining", "defined")),
    ("You need to", "create", ("creates", "creating", "created")),
    ("This makes it easy to", "write", ("writes", "writing", "written")),
    ("The user will have to", "change", ("changes", "changing", "changed")),
    ("You can also", "add", ("adds", "adding", "added")),
    ("You should not", "call", ("calls", "calling", "called")),
    ("Make sure to", "include", ("includes", "including", "included")),
)


def _prepositions() -> Iterator[Task]:
    for begin, right, wrong, tails in _GOVERNED:
        for tail in tails:
            ends = [f"{each} {tail}." for each in (right, *wrong.split())]
            yield begin, ends[0], ends[1:]


def _agreement() -> Iterator[Task]:
    for noun in _NOUNS:
        for begin in _SUBJECTS:
            for right, wrong in _VERBS:
                ends = [f"{each} the {noun}." for each in (right, *wrong)]
                yield begin, ends[0], ends[1:]


def _participles() -> Iterator[Task]:
    for noun in _NOUNS:
        for begin, right, wrong in _PARTICIPLES:
            ends = [f"{each} in the file." for each in (right, *wrong)]
            yield f"In this case the {noun} {begin}", ends[0], ends[1:]


def _infinitives() -> Iterator[Task]:
    for noun in _NOUNS:
        for begin, right, wrong in _INFINITIVES:
            ends = [f"{each} the {noun}." for each in (right, *wrong)]
            yield begin, ends[0], ends[1:]


def _number() -> Iterator[Task]:
    tail = "available in the module."
    for noun in _NOUNS:
        plural = (
            f"{noun[:-1]}ies" if noun[-1] == "y" else f"{noun}{'es' if noun[-1] == 's' else 's'}"
        )
        yield f"These {plural}", f"are {tail}", [f"{each} {tail}" for each in ("is", "am", "be")]
        yield f"This {noun}", f"is {tail}", [f"{each} {tail}" for each in ("are", "were", "be")]


# How many items of each kind; all of them would be much of the same.
_KINDS = (
    ("preposition", _prepositions, 88),
    ("agreement", _agreement, 96),
    ("participle", _participles, 24),
    ("infinitive", _infinitives, 48),
    ("number", _number, 32),
)


def made() -> str:
    """Return the whole file."""
    rng = random.Random(SEED)  # noqa: S311 - the same items every time, no secret
    lines = []
    for kind, tasks, count in _KINDS:
        for number, (begin, right, wrong) in enumerate(rng.sample(list(tasks()), count), start=1):
            endings = [right, *wrong]
            rng.shuffle(endings)
            item = {
                "id": f"{kind}-{number:03}",
                "prompt": begin,
                "choices": [f" {each}" for each in endings],
                "answer": endings.index(right),
            }
            lines.append(json.dumps(item) + "\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.stdout.write(made())
