"""A prompts file is read whole and strictly, or every mistake in it is said on its line."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sample

from pipelines import prompts
from pipelines.errors import ParamsError

if TYPE_CHECKING:
    from pipelines.errors import Problem

ROOT = Path(__file__).resolve().parent.parent

VALID = """\
version: 3
conversations:
  - id: one
    messages:
      - {role: system, content: ""}
      - {role: user, content: "Hi"}
  - id: two
    needs: [tools]
    messages:
      - {role: user, content: "Weather?"}
    tools:
      - type: function
        function:
          name: get_weather
          description: Weather of a city.
          parameters: {type: object, properties: {city: {type: string}}}
regressions:
  - id: one
    messages:
      - {role: user, content: "2 + 2?"}
    repeats: 3
    min_pass_share: 0.5
    expect:
      regex: "[0-9]"
      json_schema: {type: integer}
"""


def write(folder: Path, text: str) -> Path:
    """Write a prompts file and return its path."""
    path = folder / "prompts.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def edited(old: str, new: str) -> str:
    """Return the valid text with one place changed."""
    assert VALID.count(old) == 1, f"{old!r} is in the sample {VALID.count(old)} times"
    return VALID.replace(old, new)


def refused(folder: Path, text: str) -> tuple[Problem, ...]:
    """Load a bad file and return its problems."""
    path = write(folder, text)
    with pytest.raises(ParamsError) as caught:
        prompts.load(path)
    assert caught.value.hint == prompts.HINT
    for problem in caught.value.problems:
        assert problem.file.endswith("prompts.yaml")
        assert str(problem) in caught.value.message
    return caught.value.problems


def test_the_prompts_of_the_sample_are_valid_and_named_by_version_and_bytes() -> None:
    """What results refer to is the version and the sha256 of the file as it lies there."""
    path = sample.of("corpora/prompts.yaml")

    read = prompts.load(path)

    assert read.version == 2
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    needs = {need for each in read.conversations for need in each.needs or ()}
    assert needs == {"tools", "thinking", "prefill"}
    assert read.regressions


def test_a_file_is_read_into_messages_and_tools_as_chat_apis_take_them(tmp_path: Path) -> None:
    """No key is added to a message, none of a tool is lost or moved."""
    read = prompts.load(write(tmp_path, VALID))
    one, two = read.conversations

    assert one.plain_messages() == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi"},
    ]
    assert one.plain_tools() is None
    assert two.has("tools")
    tools = two.plain_tools()
    assert tools is not None
    (tool,) = tools
    assert list(tool["function"]) == ["name", "description", "parameters"]
    assert tool["function"]["parameters"]["properties"] == {"city": {"type": "string"}}
    (regression,) = read.regressions
    assert (regression.repeats, regression.min_pass_share) == (3, 0.5)
    assert regression.expect.json_schema == {"type": "integer"}


def test_a_file_without_regressions_has_none(tmp_path: Path) -> None:
    """Conversations alone are enough."""
    read = prompts.load(write(tmp_path, VALID[: VALID.index("regressions:")]))

    assert read.regressions == ()


@pytest.mark.parametrize(
    ("old", "new", "place", "text"),
    [
        ("version: 3\n", "", "1:1", "version: is missing"),
        ("version: 3", "version: three", "1:10", "a whole number from 1 to 1,000,000"),
        ("regressions:", "regresions:", "17:1", 'did you mean "regressions"?'),
        ("role: system", "role: sistem", "5:16", 'did you mean "system"?'),
        ("role: system", "role: tool", "5:16", "one of system, user, assistant"),
        ('content: "Hi"', "content: 5", "6:31", "put it in quotes"),
        ('content: "Hi"', 'contents: "Hi"', "6:22", 'did you mean "content"?'),
        ('content: "Hi"', 'content: "a\\0b"', "6:31", "U+0000"),
        ('content: "Hi"', 'content: "\\ud800"', "6:34", "invalid Unicode character"),
        ("id: two", "id: one", "7:9", '"one" is the id of conversations[0] already'),
        ("id: two", "id: Two Words", "7:9", "lower-case letters"),
        ("needs: [tools]", "needs: [tool]", "8:13", 'did you mean "tools"?'),
        ("needs: [tools]", "needs: [tools, tools]", "8:12", "says the same twice"),
        ("needs: [tools]", "needs: [thinking]", "11:5", "needs: [tools]"),
        ("needs: [tools]", "needs: []", "8:12", "a list of 1 to 3 items"),
        ("type: function", "type: funktion", "12:15", 'did you mean "function"?'),
        ("name: get_weather", 'name: "get weather"', "14:17", "letters, digits"),
        ("repeats: 3", "repeats: 0", "21:14", "a whole number from 1 to 1,000"),
        ("min_pass_share: 0.5", "min_pass_share: 0", "22:21", "a number above 0, at most 1"),
        ('regex: "[0-9]"', 'regex: "[0-9"', "24:14", "is no regular expression"),
        ('regex: "[0-9]"', 'regexp: "[0-9]"', "24:7", 'did you mean "regex"?'),
        ("{type: integer}", "{type: interger}", "25:20", "is no JSON Schema"),
        (
            "{type: integer}",
            '{$ref: "https://host.invalid/x"}',
            "25:20",
            "lies outside of it, and nothing is fetched",
        ),
        ('user, content: "2 + 2?"', 'assistant, content: "4"', "20:9", "needs: [prefill]"),
        ('user, content: "2 + 2?"', 'system, content: "4"', "20:9", "nobody has asked"),
    ],
)
def test_a_mistake_is_said_on_its_line_with_what_is_allowed(
    tmp_path: Path, old: str, new: str, place: str, text: str
) -> None:
    """Each has file, line, column, path and words that help."""
    found = refused(tmp_path, edited(old, new))

    assert any(f"{each.line}:{each.column}" == place and text in each.text for each in found), found


@pytest.mark.parametrize("emptied", ["conversations", "regressions", "messages", "tools"])
def test_an_empty_list_is_a_mistake_and_not_nothing_to_check(tmp_path: Path, emptied: str) -> None:
    """A gate that looks at nothing would be passed by everything."""
    start = VALID.index(f"{emptied}:")
    indent = start - VALID.rindex("\n", 0, start) - 1
    rest = VALID[start:].splitlines(keepends=True)[1:]
    inside = [line for line in rest if len(line) - len(line.lstrip()) > indent]
    count = next((i for i, line in enumerate(rest) if line not in inside), len(rest))
    text = VALID[:start] + f"{emptied}: []\n" + "".join(rest[count:])

    assert any("is not a list of 1 to" in each.text for each in refused(tmp_path, text))


def test_an_expectation_of_nothing_is_a_mistake(tmp_path: Path) -> None:
    """A regression that every answer passes hides one that nobody wrote."""
    text = VALID[: VALID.index("      regex:")].replace("    expect:\n", "    expect: {}\n")

    (found,) = refused(tmp_path, text)

    assert found.line == 23
    assert "expects nothing. State one or more of: contains, not_contains" in found.text


def test_a_prefill_ends_with_the_assistant_and_excludes_thinking(tmp_path: Path) -> None:
    """An answer that has begun is gone on with, not thought of."""
    late = edited("needs: [tools]", "needs: [tools, prefill]")
    both = edited("needs: [tools]", "needs: [tools, prefill, thinking]")

    assert any("must be the assistant's" in each.text for each in refused(tmp_path, late))
    assert any("exclude each other" in each.text for each in refused(tmp_path, both))


def test_all_mistakes_are_said_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Nobody wants to hear of the second one after the first is mended."""
    text = edited("role: system", "role: sistem").replace("repeats: 3", "repeats: many")

    assert [each.line for each in refused(tmp_path, text)] == [5, 21]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("- a\n", "not a mapping"),
        ("version: 1\n\tconversations: []\n", "is no YAML"),
        ("version: &a 1\nconversations: []\n", "an anchor"),
    ],
)
def test_a_file_that_is_no_mapping_of_plain_yaml_is_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    """The same strict YAML as params.yaml."""
    assert any(words in each.text for each in refused(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The message holds the path that was looked for."""
    with pytest.raises(ParamsError, match=r"nowhere\.yaml.*No such file"):
        prompts.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("{name: read_flie}", 'none of the tools; did you mean "read_file"? Declared: read_file'),
        ("{name: read file}", "letters, digits"),
        ("{arguments: {}}", "tool_call.name: is missing"),
        ("{name: read_file, arguments: [1]}", "is not a mapping"),
        ("{name: read_file, arguments_schema: {type: objekt}}", "is no JSON Schema"),
        ("{name: read_file, schema: {}}", "is no key here"),
    ],
)
def test_a_call_that_no_answer_could_make_is_refused_on_its_line(
    tmp_path: Path, call: str, text: str
) -> None:
    """A function that is not declared, no name, arguments that are no object."""
    tools = "[{type: function, function: {name: read_file, description: Reads., parameters: {}}}]"
    ask = f"  - {{id: call, messages: [{{role: user, content: Read it}}], tools: {tools},\n"
    file = f"{VALID}{ask}     expect: {{tool_call: {call}}}}}\n"

    (problem,) = refused(tmp_path, file)

    assert text in problem.text
    assert problem.line == VALID.count("\n") + 2


def test_a_call_without_tools_is_refused(tmp_path: Path) -> None:
    """Nothing could be called."""
    ask = "  - {id: call, messages: [{role: user, content: Hi}], expect: {tool_call: {name: a}}}\n"

    (problem,) = refused(tmp_path, VALID + ask)

    assert "needs `tools` beside `expect`" in problem.text
