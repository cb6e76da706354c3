"""
Sets of tasks: one JSON object on each line, closed, each kind with its own keys (docs/evals.md).

A set is read once: its digest and its items are of the same bytes. Everything that is wrong with it
is said at once, as `corpora/evals/x.jsonl:LINE: field: what is wrong`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NoReturn

from pydantic import Field, StringConstraints, ValidationError

from pipelines.console import clean
from pipelines.errors import DigestError, ParamsError, Problem
from pipelines.params import Closed
from pipelines.prompts import Message, Tool, schema_flaw
from pipelines.wording import did_you_mean, quoted, shortened

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pydantic_core import ErrorDetails

    from pipelines.params import Eval, EvalKind

HINT: Final = "docs/evals.md describes the keys of each kind."
# With fewer, hardly any damage is told from chance.
MIN_ITEMS: Final = 20
MAX_ITEMS: Final = 20_000
_MAX_BYTES: Final = 64 << 20
_MAX_CHARACTERS: Final = 100_000
_PROBLEM_CHARACTERS: Final = 300

Normalisation = Literal["exact", "text", "number"]

_Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
_Text = Annotated[str, StringConstraints(min_length=1, max_length=_MAX_CHARACTERS)]
_Messages = Annotated[tuple[Message, ...], Field(min_length=1, max_length=200)]


class MultipleChoice(Closed):
    """A text and its possible continuations; the likeliest one, for each byte of it, is taken."""

    id: _Id = Field(description="Name of the item, once in the file.")
    prompt: _Text = Field(description="Text, as it is: no chat template is put around it.")
    choices: Annotated[tuple[_Text, ...], Field(min_length=2, max_length=26)] = Field(
        description="Continuations, with the blank that they begin with."
    )
    answer: Annotated[int, Field(ge=0)] = Field(description="Number of the right one, from 0.")


class ExactMatch(Closed):
    """A question whose answer is one of a few texts."""

    id: _Id = Field(description="Name of the item, once in the file.")
    messages: _Messages | None = Field(None, description="Conversation to answer.")
    prompt: _Text | None = Field(
        None, description="Text to go on with instead, to the end of its line."
    )
    answers: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=100)] = Field(
        description="Right answers; one of them is enough."
    )
    normalisation: Normalisation = Field("text", description="What may differ.")


class JsonSchema(Closed):
    """A request whose answer has to be JSON of a certain form."""

    id: _Id = Field(description="Name of the item, once in the file.")
    messages: _Messages = Field(description="Conversation to answer; it has to ask for the form.")
    schema_: dict[str, Any] = Field(alias="schema", description="JSON Schema (2020-12).")


class ExpectedCall(Closed):
    """The call that is right."""

    name: str = Field(description="Function.")
    arguments: dict[str, Any] = Field(description="Its arguments, all of them.")


class ToolCall(Closed):
    """A request that has to end in one call of a function."""

    id: _Id = Field(description="Name of the item, once in the file.")
    messages: _Messages = Field(description="Conversation to answer.")
    tools: Annotated[tuple[Tool, ...], Field(min_length=1, max_length=50)] = Field(
        description="Functions that may be called."
    )
    expected: ExpectedCall = Field(description="The call that is right.")


Item = MultipleChoice | ExactMatch | JsonSchema | ToolCall

_TYPES: Final[dict[EvalKind, type[Item]]] = {
    "multiple-choice": MultipleChoice,
    "exact-match": ExactMatch,
    "json-schema": JsonSchema,
    "tool-call": ToolCall,
}


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """
    A set that was read and found right.

    Attributes:
        name: Its key in params.yaml.
        declared: Its declaration.
        items: In the order of the file.
        chance: Share that guessing gets right.
    """

    name: str
    declared: Eval
    items: tuple[Item, ...]
    chance: float


def read(name: str, declared: Eval, root: Path) -> EvalSet:
    """
    Read a declared set.

    Raises:
        ParamsError: It does not exist or is wrong; `problems` holds every finding with its line.
        DigestError: It has other bytes than declared.
    """
    try:
        data = _bytes(root / declared.path)
    except OSError as error:
        raise ParamsError(
            f"the set {declared.path} of eval {name} cannot be read: {error.strerror}.",
            hint="Put it there, or correct `path` under `evals` in params.yaml.",
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != declared.sha256:
        raise DigestError(
            f"{declared.path} has sha256 {found}, declared is {declared.sha256}.",
            hint="Restore the file, or declare the new digest if the change is meant.",
        )
    items, problems = parsed(data, declared.path, declared.kind)
    if problems:
        raise ParamsError("\n".join(map(spelled, problems)), hint=HINT, problems=problems)
    return EvalSet(
        name=name, declared=declared, items=items, chance=_chance(items, declared.chance)
    )


def problems_of(declared: Eval, root: Path) -> list[Problem]:
    """
    Return what is wrong with the items of a set, whatever its digest.

    Raises:
        OSError: It cannot be read.
    """
    return parsed(_bytes(root / declared.path), declared.path, declared.kind)[1]


def _bytes(path: Path) -> bytes:
    """Read a file that is no larger than a set may be, and one byte more."""
    with path.open("rb") as file:
        return file.read(_MAX_BYTES + 1)


def _chance(items: Sequence[Item], declared: float | None) -> float:
    """Return the share that guessing gets right: of a multiple choice the mean of 1 / choices."""
    shares = [1 / len(item.choices) for item in items if isinstance(item, MultipleChoice)]
    return math.fsum(shares) / len(shares) if shares else declared or 0.0


def spelled(problem: Problem) -> str:
    """Write a problem as `FILE:LINE: what is wrong`; a line of JSON has no columns of interest."""
    return f"{problem.file}:{problem.line}: {problem.text}"


# --- lines ------------------------------------------------------------------------------------


def parsed(data: bytes, name: str, kind: EvalKind) -> tuple[tuple[Item, ...], list[Problem]]:
    """
    Read the bytes of a set.

    Args:
        data: All of it.
        name: What problems call the file.
        kind: Decides the keys of its items.

    Returns:
        The items that are right, and what is wrong with the others and with the set.
    """
    if len(data) > _MAX_BYTES:
        return (), [Problem(name, 1, 1, f"is larger than {_MAX_BYTES >> 20} MiB")]
    items: list[Item] = []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    lines = data.split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        item, texts = _item(line, kind)
        if item is not None:
            first = seen.setdefault(item.id, number)
            if first != number:
                texts.append(f"id: {quoted(item.id)} is the id of line {first} already; ids differ")
            items.append(item)
        problems += [
            Problem(name, number, 1, shortened(text, _PROBLEM_CHARACTERS)) for text in texts
        ]
    if not MIN_ITEMS <= len(lines) <= MAX_ITEMS:
        text = f"has {len(lines):,} items; {MIN_ITEMS} to {MAX_ITEMS:,} are allowed"
        problems.append(Problem(name, max(1, len(lines)), 1, text))
    return tuple(items), problems


def _item(line: bytes, kind: EvalKind) -> tuple[Item | None, list[str]]:
    """Return the item of one line, or what is wrong with it."""
    try:
        value = json.loads(
            line.decode("utf-8", errors="strict"),
            object_pairs_hook=_without_twins,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError as error:
        return None, [f"is no UTF-8 (byte {error.start + 1} of the line)"]
    except RecursionError:
        return None, ["is nested too deeply"]
    except ValueError as error:
        return None, ["is empty" if not line.strip() else f"is no JSON: {clean(str(error))}"]
    if unsendable := _unsendable(value):
        return None, [unsendable]
    try:
        # From JSON, since strict types then take a list for a tuple, and nothing else for less.
        item = _TYPES[kind].model_validate_json(json.dumps(value))
    except ValidationError as error:
        details = error.errors(include_url=False)
        told = [_said(each, kind) for each in details if not _follows(each, details)]
        return None, list(dict.fromkeys(told))
    flaws = list(_contradictions(item))
    return (None, flaws) if flaws else (item, [])


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        twin = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {quoted(twin)} is there twice")
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON value")


def _unsendable(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Say what no server could be sent: half a surrogate pair, a NUL."""
    found = next(
        filter(None, (re.search("[\x00\ud800-\udfff]", text) for text in _texts(value))), None
    )
    return f"holds U+{ord(found[0]):04X}, which cannot be sent" if found else ""


def _texts(value: Any) -> Iterator[str]:  # noqa: ANN401 - any JSON value
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _follows(detail: ErrorDetails, others: Sequence[ErrorDetails]) -> bool:
    """Tell whether a list is only called too short since an item of it is wrong."""
    loc = detail["loc"]
    return detail["type"] == "too_short" and any(
        len(each["loc"]) > len(loc) and each["loc"][: len(loc)] == loc for each in others
    )


def _said(detail: ErrorDetails, kind: EvalKind) -> str:
    """Say in the words of this file what pydantic says in its own."""
    loc = ".".join(str(part) for part in detail["loc"])
    place = f"{clean(loc)}: " if loc else ""
    if detail["type"] == "missing":
        return f"{place}is missing"
    if detail["type"] == "extra_forbidden":
        keys = [each.alias or name for name, each in _TYPES[kind].model_fields.items()]
        top = len(detail["loc"]) == 1
        close = did_you_mean(loc, keys) if top else ""
        allowed = f" Allowed for {kind}: {', '.join(keys)}" if top else ""
        return f"{place}is no key here{close or '.'}{allowed}"
    return place + re.sub(
        r"^(?:Input|String|Tuple|Value|Dictionary) should ", "must ", clean(detail["msg"])
    )


# --- what contradicts itself ------------------------------------------------------------------


def _contradictions(item: Item) -> Iterator[str]:
    if isinstance(item, MultipleChoice):
        if item.answer >= len(item.choices):
            yield f"answer: {item.answer} is none of {len(item.choices)} choices, counted from 0"
        if len(set(item.choices)) != len(item.choices):
            yield "choices: two are equal"
        return
    messages = item.messages
    if messages is not None and messages[-1].role != "user":
        yield f"messages: the last one is of the {messages[-1].role}; it must be the user's"
    if isinstance(item, ExactMatch):
        yield from _exact_flaws(item)
    elif isinstance(item, JsonSchema):
        if why := schema_flaw(item.schema_):
            yield f"schema: is no JSON Schema: {why}"
    else:
        names = [tool.function.name for tool in item.tools]
        if len(set(names)) != len(names):
            yield "tools: two have one name"
        if item.expected.name not in names:
            close = did_you_mean(item.expected.name, names) or "."
            yield f"expected.name: {quoted(item.expected.name)} is none of the tools{close}"


def _exact_flaws(item: ExactMatch) -> Iterator[str]:
    if (item.messages is None) == (item.prompt is None):
        yield "messages: there must be either `messages` or `prompt`"
    for i, answer in enumerate(item.answers):
        if normal(answer, item.normalisation) is None:
            yield f"answers.{i}: {quoted(answer)} is nothing to compare as {item.normalisation}"


# --- answers ----------------------------------------------------------------------------------

_NUMBER: Final = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_ENDS: Final = " \t\r\n.,;:!?\"'`*"


def normal(text: str, normalisation: Normalisation) -> str | None:
    """
    Return what of an answer is compared; None if nothing is there.

    exact    the text without blanks around it
    text     in lower case, runs of blanks as one, without quotes, `*` and stops around it
    number   the last number: thousands separators and zeros behind the point left out
    """
    if normalisation == "exact":
        return text.strip() or None
    if normalisation == "text":
        return " ".join(text.casefold().split()).strip(_ENDS) or None
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    whole, _, part = numbers[-1].replace(",", "").partition(".")
    sign, digits = ("-", whole[1:]) if whole.startswith("-") else ("", whole)
    part = part.rstrip("0")
    value = (digits.lstrip("0") or "0") + (f".{part}" if part else "")
    return value if value == "0" else sign + value


def is_match(item: ExactMatch, answer: str) -> bool:
    """Tell whether an answer is one of those that are right."""
    said = normal(answer, item.normalisation)
    return said is not None and said in {normal(each, item.normalisation) for each in item.answers}


def is_call(item: ToolCall, calls: Sequence[tuple[str, str]]) -> bool:
    """
    Tell whether a model made the expected call, and no other.

    Args:
        item: What was asked.
        calls: Name and arguments, as JSON text, of each call that the server's parser found.
    """
    if len(calls) != 1 or calls[0][0] != item.expected.name:
        return False
    try:
        arguments = json.loads(calls[0][1], parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return equal_json(arguments, item.expected.arguments)


def equal_json(one: Any, other: Any) -> bool:  # noqa: ANN401 - any JSON values
    """Compare as JSON does: 1 and 1.0 are one number, true is none."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
