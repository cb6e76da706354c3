"""A set of tasks is closed: what is wrong with it is said with its line before anything runs."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from pipelines import evals
from pipelines.errors import DigestError, ParamsError
from pipelines.evals import ExactMatch, ToolCall
from pipelines.evals_likelihood import takes
from pipelines.params import Eval

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.params import EvalKind

NAME = "corpora/evals/x.jsonl"
ASKED = [{"role": "user", "content": "How much is 2 + 2?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
GOOD: dict[EvalKind, dict[str, Any]] = {
    "multiple-choice": {"prompt": "It depends", "choices": [" on it.", " of it."], "answer": 0},
    "exact-match": {"messages": ASKED, "answers": ["4"], "normalisation": "number"},
    "json-schema": {"messages": ASKED, "schema": {"type": "object", "required": ["sum"]}},
    "tool-call": {
        "messages": ASKED,
        "tools": [WEATHER],
        "expected": {"name": "weather", "arguments": {"town": "Oslo"}},
    },
}


def lines(kind: EvalKind, count: int = 20) -> list[dict[str, Any]]:
    """Make a good set."""
    return [{"id": f"item-{i}"} | GOOD[kind] for i in range(count)]


def spelled(items: list[Any]) -> bytes:
    """Write items as a file has them; bytes are taken as a line as they are."""
    return b"".join(
        (each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in items
    )


def problems(kind: EvalKind, items: list[Any]) -> list[str]:
    """Return what is wrong with a set."""
    return [evals.spelled(each) for each in evals.parsed(spelled(items), NAME, kind)[1]]


def changed(kind: EvalKind, at: int = 2, **values: Any) -> list[str]:
    """Return what is wrong with a set of which one item is another."""
    items = lines(kind)
    items[at] = {key: each for key, each in (items[at] | values).items() if each is not ...}
    return problems(kind, items)


@pytest.mark.parametrize("kind", list(GOOD))
def test_a_good_set_of_each_kind_is_read(tmp_path: Path, kind: EvalKind) -> None:
    """All items, in the order of the file, and the share that guessing gets right."""
    data = spelled(lines(kind))
    (tmp_path / "corpora/evals").mkdir(parents=True)
    (tmp_path / NAME).write_bytes(data)
    declared = Eval(
        kind=kind, path=NAME, sha256=hashlib.sha256(data).hexdigest(), license="apache-2.0"
    )

    found = evals.read("x", declared, tmp_path)

    assert [item.id for item in found.items] == [f"item-{i}" for i in range(20)]
    assert found.chance == (0.5 if kind == "multiple-choice" else 0.0)


def test_chance_is_the_mean_over_the_items_or_else_what_is_declared(tmp_path: Path) -> None:
    """10 items with two choices and 10 with four: 0.375. A yes-or-no question has 0.5."""
    items = lines("multiple-choice")
    for item in items[10:]:
        item["choices"] = [" a", " b", " c", " d"]
    (tmp_path / "corpora/evals").mkdir(parents=True)
    (tmp_path / NAME).write_bytes(spelled(items))
    digest = hashlib.sha256(spelled(items)).hexdigest()
    declared = Eval(kind="multiple-choice", path=NAME, sha256=digest, license="mit")
    assert evals.read("x", declared, tmp_path).chance == 0.375

    data = spelled(lines("exact-match"))
    (tmp_path / NAME).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    asked = Eval(kind="exact-match", path=NAME, sha256=digest, license="mit", chance=0.5)
    assert evals.read("x", asked, tmp_path).chance == 0.5


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("multiple-choice", {"answer": 2}, "answer: 2 is none of 2 choices, counted from 0"),
        ("multiple-choice", {"answer": "0"}, "answer: must be a valid integer"),
        ("multiple-choice", {"answer": True}, "answer: must be a valid integer"),
        ("multiple-choice", {"answer": ...}, "answer: is missing"),
        ("multiple-choice", {"choices": [" a", " a"]}, "choices: two are equal"),
        ("multiple-choice", {"choices": [" a", ""]}, "choices.1: must have at least 1 character"),
        ("multiple-choice", {"choices": [" a"]}, "choices: must have at least 2 items"),
        ("multiple-choice", {"prompt": ""}, "prompt: must have at least 1 character"),
        ("multiple-choice", {"prompt": "a\x00"}, "holds U+0000, which cannot be sent"),
        ("multiple-choice", {"prompt": "\ud800"}, "holds U+D800, which cannot be sent"),
        ("multiple-choice", {"anwser": 1}, 'anwser: is no key here; did you mean "answer"?'),
        ("multiple-choice", {"id": "item-0"}, 'id: "item-0" is the id of line 1 already; ids'),
        ("multiple-choice", {"id": "a b"}, "id: must match pattern"),
        ("exact-match", {"prompt": "x"}, "messages: there must be either `messages` or `prompt`"),
        ("exact-match", {"messages": ...}, "messages: there must be either `messages` or `prompt`"),
        ("exact-match", {"answers": ["four"]}, 'answers.0: "four" is nothing to compare as number'),
        ("exact-match", {"normalisation": "fuzzy"}, "normalisation: must be 'exact', 'text' or"),
        (
            "exact-match",
            {"messages": [*ASKED, {"role": "assistant", "content": "5"}]},
            "messages: the last one is of the assistant; it must be the user's",
        ),
        (
            "json-schema",
            {"schema": {"type": "objekt"}},
            "schema: is no JSON Schema: type: 'objekt'",
        ),
        (
            "json-schema",
            {"schema": {"$ref": "http://127.0.0.1/x"}},
            'schema: is no JSON Schema: "http://127.0.0.1/x" lies outside of it, and nothing is',
        ),
        ("json-schema", {"schema": ...}, "schema: is missing"),
        ("tool-call", {"tools": [WEATHER, WEATHER]}, "tools: two have one name"),
        (
            "tool-call",
            {"expected": {"name": "wether", "arguments": {}}},
            'expected.name: "wether" is none of the tools; did you mean "weather"?',
        ),
        ("tool-call", {"expected": {"name": "weather"}}, "expected.arguments: is missing"),
    ],
)
def test_a_wrong_item_is_told_with_its_line(
    kind: EvalKind, values: dict[str, Any], said: str
) -> None:
    """`corpora/evals/x.jsonl:LINE: field: what is wrong`."""
    (found,) = changed(kind, **values)

    assert found.startswith(f"{NAME}:3: {said}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"", "is empty"),
        (b"   ", "is empty"),
        (b"{", "is no JSON"),
        (b"[1]", "must be an object"),
        (b'{"id": "a", "id": "b"}', 'is no JSON: the key "id" is there twice'),
        (b'{"id": NaN}', "is no JSON: NaN is no JSON value"),
        (b'{"id": "\xff"}', "is no UTF-8 (byte 9 of the line)"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_line_that_is_no_object_is_told(line: bytes, said: str) -> None:
    """Nothing of such a line is taken, and the others are judged all the same."""
    items: list[Any] = lines("multiple-choice")
    items[4] = line
    items[7] = items[7] | {"answer": 9}

    first, second = problems("multiple-choice", items)

    assert first.startswith(f"{NAME}:5: {said}")
    assert second.startswith(f"{NAME}:8: answer: ")


def test_too_few_items_are_refused() -> None:
    """With 19 items hardly any damage is told from chance."""
    assert problems("multiple-choice", lines("multiple-choice", 19)) == [
        f"{NAME}:19: has 19 items; 20 to 20,000 are allowed"
    ]
    assert problems("multiple-choice", []) == [f"{NAME}:1: has 0 items; 20 to 20,000 are allowed"]


def test_a_set_of_another_kind_is_told_by_its_keys() -> None:
    """Each line says which keys the declared kind has."""
    (first, *_) = problems("json-schema", lines("tool-call"))

    assert first.startswith(f"{NAME}:1: schema: is missing")


def test_other_bytes_and_a_missing_file_stop_the_stage(tmp_path: Path) -> None:
    """What was declared is done, or nothing."""
    declared = Eval(kind="exact-match", path=NAME, sha256="a" * 64, license="mit")
    with pytest.raises(ParamsError, match="cannot be read: No such file"):
        evals.read("x", declared, tmp_path)
    (tmp_path / "corpora/evals").mkdir(parents=True)
    (tmp_path / NAME).write_bytes(spelled(lines("exact-match")))
    with pytest.raises(DigestError, match=f"{NAME} has sha256"):
        evals.read("x", declared, tmp_path)


def test_all_that_is_wrong_stops_the_stage_at_once(tmp_path: Path) -> None:
    """The error holds every finding as a problem with its line."""
    items = lines("exact-match")
    items[0]["answers"] = []
    items[5]["extra"] = 1
    data = spelled(items)
    (tmp_path / "corpora/evals").mkdir(parents=True)
    (tmp_path / NAME).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()

    with pytest.raises(ParamsError) as caught:
        evals.read("x", Eval(kind="exact-match", path=NAME, sha256=digest, license="mit"), tmp_path)

    assert [problem.line for problem in caught.value.problems] == [1, 6]


# --- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalisation", "answer", "wanted", "is_right"),
    [
        ("exact", " Paris\n", "Paris", True),
        ("exact", "paris", "Paris", False),
        ("text", " **paris**.\n", "Paris", True),
        ("text", "New\n  York", "new york", True),
        ("text", "Paris is it", "Paris", False),
        ("text", "...", "Paris", False),
        ("number", "3 + 4 = 7", "7", True),
        ("number", "It is 1,234.50 in all.", "1234.5", True),
        ("number", "-0", "0", True),
        ("number", "007", "7", True),
        ("number", "7 of 10", "7", False),
        ("number", "seven", "7", False),
        ("number", "-3", "3", False),
    ],
)
def test_an_exact_match_forgives_what_its_normalisation_says(
    normalisation: Any, answer: str, wanted: str, *, is_right: bool
) -> None:
    """Case and stops for text, separators and zeros for numbers, nothing but blanks for exact."""
    item = ExactMatch(id="a", prompt="x", answers=("zzz9", wanted), normalisation=normalisation)

    assert evals.is_match(item, answer) is is_right


def test_a_tool_call_is_right_if_it_is_the_only_one_with_all_its_arguments() -> None:
    """Order of keys and 1 for 1.0 do not matter; another name, type, argument or call does."""
    item = ToolCall.model_validate_json(
        json.dumps(
            {"id": "a"}
            | GOOD["tool-call"]
            | {"expected": {"name": "weather", "arguments": {"town": "Oslo", "days": [1, 2]}}}
        )
    )

    assert evals.is_call(item, [("weather", '{"days": [1.0, 2], "town": "Oslo"}')])
    for calls in (
        [],
        [("wether", '{"days": [1, 2], "town": "Oslo"}')],
        [("weather", '{"town": "Oslo"}')],
        [("weather", '{"days": [1, 2], "town": "Oslo", "more": null}')],
        [("weather", '{"days": [true, 2], "town": "Oslo"}')],
        [("weather", '{"days": [2, 1], "town": "Oslo"}')],
        [("weather", '{"days": [1, 2], "town": "Oslo"')],
        [("weather", "[]")],
        [("weather", '{"days": [1, 2], "town": "Oslo"}')] * 2,
    ):
        assert not evals.is_call(item, calls), calls


def test_the_likeliest_choice_for_each_byte_is_taken_and_a_tie_is_not_right() -> None:
    """-6 nats over 6 bytes beat -4 over 3, though the sum is lower."""
    item = evals.MultipleChoice(id="a", prompt="x", choices=(" abcde", " ab"), answer=0)

    assert takes(item, [-6.0, -4.0])
    assert not takes(item, [-12.0, -4.0])
    assert not takes(item, [-6.0, -3.0])
    assert takes(item.model_copy(update={"choices": (" ää", " abcde")}), [-4.0, -6.0])
