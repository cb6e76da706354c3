"""
The prompts of the fleet: conversations that every engine has to render alike, and regressions.

A conversation states messages, and sometimes what its template must have for it to make sense
(`needs`). A regression states messages and what the answer must be like. The file carries a version
that people raise and the sha256 of its bytes, and results name both: a rendering that was checked
with other prompts is another check.

The file is closed, strict YAML like params.yaml, and what is wrong with it is said in one go, each
finding on its line.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, StringConstraints, ValidationError

from pipelines import console, marked_yaml
from pipelines.errors import ParamsError
from pipelines.marked_yaml import Finding
from pipelines.params import MODEL_KEY, PATTERN_WORDS, Closed, Share
from pipelines.wording import did_you_mean, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from pydantic_core import ErrorDetails

    from pipelines.marked_yaml import Document, Loc

HINT = "corpora/README.md describes the file; conversations and regressions are lists with ids."
# Where the special tokens of the model under test are put, since no file can know them.
CONTROL_TOKENS = "[[control tokens]]"
MAX_CONTENT_CHARACTERS = 100_000

Role = Literal["system", "user", "assistant"]
Need = Literal["tools", "thinking", "prefill"]
ExpectKey = Literal[
    "contains", "not_contains", "regex", "json_schema", "tool_call", "refusal", "max_tokens"
]

_FUNCTION_NAME = r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$"
_WORDS = PATTERN_WORDS | {_FUNCTION_NAME: "a name of letters, digits, `_` and `-`, 64 at most"}

_Id = Annotated[str, StringConstraints(pattern=MODEL_KEY)]
_Text = Annotated[str, StringConstraints(max_length=MAX_CONTENT_CHARACTERS)]
_Short = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class Message(Closed):
    """One turn."""

    role: Role = Field(description="Who speaks.")
    content: _Text = Field(description="What is said; may be empty.")


class Function(Closed):
    """A function that the model may call."""

    name: Annotated[str, StringConstraints(pattern=_FUNCTION_NAME)] = Field(description="Its name.")
    description: _Short = Field(description="What it does.")
    parameters: dict[str, Any] = Field(description="JSON Schema of its arguments.")


class Tool(Closed):
    """A tool, as OpenAI's chat API spells it; Ollama and transformers take the same."""

    type: Literal["function"] = Field(description="Always `function`.")
    function: Function = Field(description="The function.")


_Messages = Annotated[tuple[Message, ...], Field(min_length=1, max_length=200)]


class Conversation(Closed):
    """Messages that are rendered and never answered."""

    id: _Id = Field(description="Stable name; other messages mean another id.")
    messages: _Messages = Field(description="The turns.")
    tools: Annotated[tuple[Tool, ...], Field(min_length=1, max_length=50)] | None = Field(
        None, description="Functions that the model may call."
    )
    needs: Annotated[tuple[Need, ...], Field(min_length=1, max_length=3)] | None = Field(
        None, description="What a template must have; where it has not, this is skipped."
    )

    def has(self, need: Need) -> bool:
        """Tell whether the conversation is about `need`."""
        return need in (self.needs or ())

    def plain_messages(self) -> list[dict[str, str]]:
        """Return the messages as chat APIs take them."""
        return plain(self.messages)

    def plain_tools(self) -> list[dict[str, Any]] | None:
        """Return the tools as chat APIs take them."""
        return [tool.model_dump() for tool in self.tools] if self.tools else None


class ExpectedCall(Closed):
    """The one call that an answer has to make, as the server's parser of tool calls reads it."""

    name: Annotated[str, StringConstraints(pattern=_FUNCTION_NAME)] = Field(
        description="Function, one of `tools`."
    )
    arguments: dict[str, Any] | None = Field(
        None, description="Its arguments, all of them; 1 and 1.0 are one number."
    )
    arguments_schema: dict[str, Any] | bool | None = Field(
        None, description="JSON Schema (2020-12) that its arguments keep."
    )


class Expect(Closed):
    """What an answer must be like; everything that is stated has to hold."""

    contains: _Short | None = Field(None, description="Text that it holds, upper case as written.")
    not_contains: _Short | None = Field(None, description="Text that it does not hold.")
    regex: _Short | None = Field(
        None, description="Regular expression (Python) that is found somewhere in it."
    )
    json_schema: dict[str, Any] | bool | None = Field(
        None, description="JSON Schema (2020-12) that it keeps when read as JSON."
    )
    tool_call: ExpectedCall | None = Field(None, description="The one call that it makes.")
    refusal: bool | None = Field(None, description="Whether it declines to help.")
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None, description="Tokens within which it has ended by itself."
    )


class Regression(Closed):
    """A question whose answer must stay right."""

    id: _Id = Field(description="Stable name; another question means another id.")
    models: Annotated[tuple[_Id, ...], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="Models that are asked; every one if absent."
    )
    messages: _Messages = Field(description="The turns; the last one is the user's.")
    tools: Annotated[tuple[Tool, ...], Field(min_length=1, max_length=50)] | None = Field(
        None, description="Functions that the model may call."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="Of sampling; as the model is served if absent."
    )
    repeats: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="How often it is asked, each time with another seed."
    )
    min_pass_share: Annotated[Share, Field(gt=0)] = Field(
        1.0, description="Share of the answers that must be as expected."
    )
    expect: Expect = Field(description="What an answer must be like.")


class _File(Closed):
    version: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        description="Raised with every change."
    )
    conversations: Annotated[tuple[Conversation, ...], Field(min_length=1, max_length=1000)] = (
        Field(description="Conversations whose rendering is checked.")
    )
    regressions: Annotated[tuple[Regression, ...], Field(min_length=1, max_length=1000)] | None = (
        Field(None, description="Questions whose answers are checked.")
    )


class Prompts(Closed):
    """The content of one prompts file; `sha256` is that of its bytes, `name` what it is called."""

    name: str
    version: int
    sha256: str
    conversations: tuple[Conversation, ...]
    regressions: tuple[Regression, ...]

    def conversation(self, id_: str) -> Conversation:
        """Return one conversation by its id."""
        return next(each for each in self.conversations if each.id == id_)


def plain(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    """Return messages as chat APIs take them."""
    return [{"role": each.role, "content": each.content} for each in messages]


class _Flaw(NamedTuple):
    loc: Loc
    text: str
    on_key: bool = False


def load(path: Path) -> Prompts:
    """
    Read a prompts file.

    Raises:
        ParamsError: It cannot be read or is wrong; `problems` holds every finding with its place.
    """
    try:
        document = marked_yaml.read(path)
        read = _judge(document)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except ParamsError as error:
        raise ParamsError(error.message, hint=HINT, problems=error.problems) from None
    return Prompts(
        name=document.name,
        version=read.version,
        sha256=digest,
        conversations=read.conversations,
        regressions=read.regressions or (),
    )


def _judge(document: Document) -> _File:
    """
    Return the typed content if nothing is wrong with it.

    Raises:
        ParamsError: Something is.
    """
    problems = [finding.within(document.name) for finding in document.findings]
    refused = {finding.loc for finding in document.findings}
    flaws = list(_unsendable(document.data, ()))
    read = None
    if not flaws:
        try:
            # From JSON, since strict types then take a list for a tuple, and nothing else for less.
            read = _File.model_validate_json(json.dumps(document.data))
        except ValidationError as error:
            details = error.errors(include_url=False)
            flaws = [_typed(document, each) for each in details if not _follows(each, details)]
            flaws = [flaw for flaw in flaws if flaw.loc not in refused]
    refused |= {flaw.loc for flaw in flaws}
    flaws += [flaw for flaw in _contradictions(document.data) if flaw.loc not in refused]
    for flaw in dict.fromkeys(flaws):
        mark = document.key_at(flaw.loc) if flaw.on_key else document.value_at(flaw.loc)
        problems.append(Finding(mark, flaw.loc, flaw.text).within(document.name))
    if read is None or problems:
        raise marked_yaml.failure(problems)
    return read


def _unsendable(value: Any, loc: Loc) -> Iterator[_Flaw]:  # noqa: ANN401 - any YAML value
    """Yield the texts that no server could be sent: half a surrogate pair, a NUL."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _unsendable(inner, (*loc, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _unsendable(inner, (*loc, i))
    elif isinstance(value, str) and (found := re.search("[\x00\ud800-\udfff]", value)):
        yield _Flaw(loc, f"holds U+{ord(found[0]):04X}, which cannot be sent to a server")


# --- what the types refuse --------------------------------------------------------------------


def _follows(detail: ErrorDetails, others: list[ErrorDetails]) -> bool:
    """Tell whether a list is only called too short since its items are wrong."""
    loc = detail["loc"]
    return detail["type"] == "too_short" and any(
        len(each["loc"]) > len(loc) and each["loc"][: len(loc)] == loc for each in others
    )


def _typed(document: Document, detail: ErrorDetails) -> _Flaw:
    """Say in the words of this file what pydantic says in its own."""
    # The branch of a union is a word of pydantic's in the path.
    loc: Loc = tuple(part for part in detail["loc"] if part not in {"dict[str,any]", "bool"})
    if detail["type"] == "extra_forbidden":
        known = list(_part(loc[:-1])["properties"])
        close = did_you_mean(str(loc[-1]), known) or "."
        text = f"is no key here{close} Allowed: {', '.join(known)}"
        return _Flaw(loc, text, on_key=True)
    part, shown = _part(loc), document.shown(loc)
    words = _allowed(part)
    if detail["type"] == "missing":
        return _Flaw(
            loc, f"is missing. {part.get('description', '')} Allowed: {words}", on_key=True
        )
    values = _values(part)
    if values and (close := did_you_mean(str(detail["input"]), values)):
        return _Flaw(loc, f"{shown} is unknown{close} Allowed: {words}")
    quotes = part.get("type") == "string" and isinstance(detail["input"], int | float)
    return _Flaw(loc, f"{shown} is not {words}" + ("; put it in quotes" if quotes else ""))


def _schema() -> dict[str, Any]:
    return _File.model_json_schema()


def _part(loc: Loc) -> dict[str, Any]:
    """Return the part of the JSON Schema that describes the value at a path."""
    schema = _schema()
    part = schema
    for step in loc:
        part = _resolved(part, schema)
        part = part["items"] if isinstance(step, int) else part.get("properties", {}).get(step, {})
    return _resolved(part, schema)


def _resolved(part: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Follow a reference, and see the value behind `value or null`; keep the description."""
    found = dict(part)
    while "$ref" in found or "anyOf" in found:
        if "$ref" in found:
            inner = schema["$defs"][found.pop("$ref").removeprefix("#/$defs/")]
        else:
            inner = next(each for each in found.pop("anyOf") if each != {"type": "null"})
        found = {**inner, **found}
    return found


def _values(part: Mapping[str, Any]) -> list[str]:
    return [part["const"]] if "const" in part else list(part.get("enum", ()))


def _allowed(part: Mapping[str, Any]) -> str:
    """Say in words which values a part of the schema lets pass."""
    if values := _values(part):
        return ("one of " if len(values) > 1 else "") + ", ".join(values)
    if "pattern" in part:
        return _WORDS[part["pattern"]]
    if "properties" in part:
        return "a mapping with the keys " + ", ".join(part["properties"])
    words: dict[str, Callable[[], str]] = {
        "string": lambda: f"text of {_least(part)} {part['maxLength']:,} characters",
        "array": lambda: f"a list of {part['minItems']} to {part['maxItems']:,} items",
        "integer": lambda: f"a whole number from {part['minimum']:,} to {part['maximum']:,}",
        "number": lambda: f"a number {_lower(part)}, at most {part['maximum']:g}",
        "boolean": lambda: "true or false",
    }
    return words.get(part.get("type", ""), lambda: "a mapping")()


def _lower(part: Mapping[str, Any]) -> str:
    above = part.get("exclusiveMinimum")
    return f"from {part['minimum']:g}" if above is None else f"above {above:g}"


def _least(part: Mapping[str, Any]) -> str:
    return f"{part['minLength']} to" if part.get("minLength") else "at most"


# --- what contradicts itself ------------------------------------------------------------------
#
# These functions see plain data that may be of any shape: whatever is not of the type that a rule
# is about has been reported by the types.


def _contradictions(data: Any) -> Iterator[_Flaw]:  # noqa: ANN401 - any YAML value
    for name in ("conversations", "regressions"):
        yield from _duplicates(data, name)
        for loc, entry in _entries(data, name):
            yield from _message_flaws((*loc, "messages"), entry)
    for loc, entry in _entries(data, "conversations"):
        yield from _need_flaws(loc, entry)
    for loc, entry in _entries(data, "regressions"):
        expect = entry.get("expect")
        if isinstance(expect, dict):
            yield from _expect_flaws((*loc, "expect"), expect)
            yield from _call_flaws((*loc, "expect", "tool_call"), entry, expect.get("tool_call"))


def _entries(data: Any, name: str) -> Iterator[tuple[Loc, dict[str, Any]]]:  # noqa: ANN401 - any YAML value
    listed = data.get(name) if isinstance(data, dict) else None
    for i, entry in enumerate(listed if isinstance(listed, list) else ()):
        if isinstance(entry, dict):
            yield (name, i), entry


def _duplicates(data: Any, name: str) -> Iterator[_Flaw]:  # noqa: ANN401 - any YAML value
    seen: dict[str, int] = {}
    for loc, entry in _entries(data, name):
        id_ = entry.get("id")
        if not isinstance(id_, str):
            continue
        if id_ in seen:
            yield _Flaw(
                (*loc, "id"), f"{quoted(id_)} is the id of {name}[{seen[id_]}] already; ids differ"
            )
        seen.setdefault(id_, int(loc[1]))


def _needs(entry: Mapping[str, Any]) -> list[Any]:
    needs = entry.get("needs")
    return needs if isinstance(needs, list) else []


def _message_flaws(loc: Loc, entry: Mapping[str, Any]) -> Iterator[_Flaw]:
    """Look for an order of turns that no server could answer."""
    messages = entry.get("messages")
    turns = messages if isinstance(messages, list) else []
    roles = [each.get("role") if isinstance(each, dict) else None for each in turns]
    if not roles or not set(roles) <= set(get_args(Role)):
        return
    prefill = "prefill" in _needs(entry)
    if prefill and roles[-1] != "assistant":
        yield _Flaw((*loc, len(roles) - 1), "must be the assistant's: `needs` says prefill")
    elif roles[-1] == "assistant" and not prefill:
        text = "is the assistant's; a conversation that the assistant goes on with needs: [prefill]"
        yield _Flaw((*loc, len(roles) - 1), text)
    elif roles[-1] == "system":
        yield _Flaw((*loc, len(roles) - 1), "is the system's; nobody has asked anything")


def _need_flaws(loc: Loc, entry: Mapping[str, Any]) -> Iterator[_Flaw]:
    needs = _needs(entry)
    if entry.get("tools") and "tools" not in needs:
        text = "also wants needs: [tools], as a template without tools leaves them out"
        yield _Flaw((*loc, "tools"), text, on_key=True)
    if "tools" in needs and not entry.get("tools"):
        yield _Flaw((*loc, "needs"), "says tools, and there are no `tools`")
    if "thinking" in needs and "prefill" in needs:
        text = "thinking and prefill exclude each other: an answer that has begun is not thought of"
        yield _Flaw((*loc, "needs"), text)
    if len(set(map(str, needs))) != len(needs):
        yield _Flaw((*loc, "needs"), "says the same twice")


def _expect_flaws(loc: Loc, expect: Mapping[str, Any]) -> Iterator[_Flaw]:
    if not any(expect.get(key) is not None for key in get_args(ExpectKey)):
        known = ", ".join(get_args(ExpectKey))
        yield _Flaw(loc, f"expects nothing. State one or more of: {known}", on_key=True)
    pattern = expect.get("regex")
    if isinstance(pattern, str) and (why := _regex_flaw(pattern)):
        yield _Flaw((*loc, "regex"), f"{quoted(pattern)} is no regular expression: {why}")
    schema = expect.get("json_schema")
    if isinstance(schema, dict | bool) and (why := schema_flaw(schema)):
        yield _Flaw((*loc, "json_schema"), f"is no JSON Schema: {why}")


def _call_flaws(loc: Loc, entry: Mapping[str, Any], call: object) -> Iterator[_Flaw]:
    """Look for a call that no answer could make."""
    if not isinstance(call, dict):
        return
    tools = entry.get("tools")
    functions = [
        each.get("function") if isinstance(each, dict) else None
        for each in (tools if isinstance(tools, list) else ())
    ]
    names = [str(each.get("name")) for each in functions if isinstance(each, dict)]
    name = call.get("name")
    if not names:
        yield _Flaw(loc, "needs `tools` beside `expect`: nothing can be called", on_key=True)
    elif isinstance(name, str) and name not in names:
        close = did_you_mean(name, names) or "."
        text = f"{quoted(name)} is none of the tools{close} Declared: {', '.join(names)}"
        yield _Flaw((*loc, "name"), text)
    schema = call.get("arguments_schema")
    if isinstance(schema, dict | bool) and (why := schema_flaw(schema)):
        yield _Flaw((*loc, "arguments_schema"), f"is no JSON Schema: {why}")


def _regex_flaw(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return console.clean(str(error)) or type(error).__name__
    return ""


def schema_flaw(schema: dict[str, Any] | bool) -> str:  # noqa: FBT001 - a schema may be `true`
    """Say what is wrong with a JSON Schema; a reference beyond itself is, as nothing is fetched."""
    try:
        # 60 ms, only where it is used; the package has no types.
        from jsonschema import (  # type: ignore[import-untyped]  # noqa: PLC0415
            Draft202012Validator,
            SchemaError,
        )
    except ImportError:
        return "nobody can tell, the package jsonschema is not installed (make setup)"
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        where = ".".join(map(str, error.absolute_path))
        return console.clean(f"{where}: {error.message}" if where else error.message)[:300]
    except RecursionError:
        return "nested too deeply"
    outside = [each for each in _references(schema) if not each.startswith("#")]
    return f"{quoted(outside[0])} lies outside of it, and nothing is fetched" if outside else ""


def _references(value: Any) -> Iterator[str]:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in {"$ref", "$dynamicRef"} and isinstance(inner, str):
                yield inner
            else:
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)
