"""
GitHub's OpenAPI description as a contract: which requests there are, and what may be in them.

`Contract.operation` finds what a request asks for, `Operation.problems_of` says what is wrong with
it, strictly: a parameter or a property that is not described is wrong too. `Contract.example` gives
the documented example of an object, from which answers of the stand-in are made.

Beyond the description, by GitHub's documentation (it describes them later than they come):
GET /repos/{owner}/{repo}/actions/runners/deprecations/{version}.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, unquote

import jsonschema  # type: ignore[import-untyped] # it has no types

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_METHODS: Final = ("get", "post", "put", "patch", "delete")
# Path parameters that have slashes in them.
_LONG: Final = {
    "/repos/{owner}/{repo}/contents/{path}": "path",
    "/repos/{owner}/{repo}/git/ref/{ref}": "ref",
    "/repos/{owner}/{repo}/git/refs/{ref}": "ref",
    "/repos/{owner}/{repo}/git/matching-refs/{ref}": "ref",
    "/repos/{owner}/{repo}/commits/{ref}": "ref",
    "/repos/{owner}/{repo}/commits/{ref}/check-runs": "ref",
    "/repos/{owner}/{repo}/branches/{branch}": "branch",
    "/repos/{owner}/{repo}/compare/{basehead}": "basehead",
}
_NEWER: Final = {
    "/repos/{owner}/{repo}/actions/runners/deprecations/{version}": {
        "get": {"parameters": [], "responses": {"200": {}, "404": {}}}
    }
}


class AnswerError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, **more: Any) -> None:
        """Answer with a status and a message."""
        super().__init__(message)
        self.status = status
        self.body = {
            "message": message,
            "documentation_url": "https://docs.github.com/rest",
            **more,
        }


@dataclass
class Operation:
    """
    One method of one path.

    Attributes:
        method: In lower case.
        template: `/repos/{owner}/{repo}/pulls`.
        path: Values of the parameters in it.
    """

    contract: Contract
    method: str
    template: str
    path: dict[str, str]
    spec: dict[str, Any]

    def problems_of(self, query: str, body: bytes) -> Iterator[str]:
        """Say what is wrong with a request, against the description."""
        parameters = [self.contract.resolved(each) for each in self.spec.get("parameters", ())]
        known = {each["name"]: each for each in parameters if each["in"] == "query"}
        for name, value in parse_qsl(query, keep_blank_values=True):
            if name not in known:
                yield f"the query parameter {name!r} is not described"
            else:
                yield from _wrong(f"query {name}", value, known[name].get("schema", {}))
        for each in parameters:
            if each["in"] == "path" and each["name"] in self.path:
                where = f"path {each['name']}"
                yield from _wrong(where, self.path[each["name"]], each.get("schema", {}))
        yield from self._problems_of_body(body)

    def _problems_of_body(self, body: bytes) -> Iterator[str]:
        described = self.contract.resolved(self.spec.get("requestBody", {}))
        if not body:
            if described.get("required"):
                yield "a body is required"
            return
        if not described:
            yield "no body is described"
            return
        try:
            value = json.loads(body)
        except ValueError:
            yield "the body is no JSON"
            return
        validator = self.contract.validator(
            f"{self.method} {self.template}", described["content"]["application/json"]["schema"]
        )
        for error in validator.iter_errors(value):
            yield f"body {error.json_path}: {error.message[:200]}"

    def problems_of_answer(self, status: int, value: Any) -> Iterator[str]:
        """Say what is wrong with an answer of the stand-in; of a list the first entry is seen."""
        answers = self.spec.get("responses", {})
        if str(status) not in answers:
            yield f"an answer {status} is not described"
            return
        content = self.contract.resolved(answers[str(status)]).get("content", {})
        schema = content.get("application/json", {}).get("schema")
        if schema is None:
            return
        shown = value[:1] if isinstance(value, list) else value
        if isinstance(value, dict):
            shown = {
                key: each[:1] if isinstance(each, list) else each for key, each in value.items()
            }
        validator = self.contract.validator(
            f"{self.method} {self.template} {status}", schema, closed=False
        )
        for error in validator.iter_errors(shown):
            yield f"answer {error.json_path}: {error.message[:200]}"


def _wrong(where: str, text: str, schema: dict[str, Any]) -> Iterator[str]:
    """Say what is wrong with the text of a parameter."""
    kind = schema.get("type")
    if kind == "integer" and not re.fullmatch(r"-?\d+", text):
        yield f"{where} is {text!r}, not an integer"
    if kind == "boolean" and text not in {"true", "false"}:
        yield f"{where} is {text!r}, not a boolean"
    if "enum" in schema and text not in map(str, schema["enum"]):
        yield f"{where} is {text!r}, not one of {schema['enum']}"


@dataclass
class Contract:
    """The whole description."""

    description: dict[str, Any]
    _routes: list[tuple[re.Pattern[str], str, int]] = field(default_factory=list)
    _validators: dict[str, jsonschema.Draft202012Validator] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make a pattern of each path."""
        self.description["paths"] |= _NEWER
        for template in self.description["paths"]:
            long = _LONG.get(template)
            parts = re.split(r"(\{[^}]+\})", template)
            pattern = "".join(
                f"(?P<{part[1:-1].replace('-', '_')}>{'.+' if part[1:-1] == long else '[^/]+'})"
                if part.startswith("{")
                else re.escape(part)
                for part in parts
            )
            literal = sum(len(part) for part in parts if not part.startswith("{"))
            self._routes.append((re.compile(pattern), template, literal))
        # The one with the most words of its own is meant.
        self._routes.sort(key=lambda each: -each[2])

    def operation(self, method: str, path: str) -> Operation | None:
        """Find what a request asks for; None if there is no such thing."""
        for pattern, template, _ in self._routes:
            found = pattern.fullmatch(path)
            spec = self.description["paths"][template].get(method.lower()) if found else None
            if found and spec is not None and method.lower() in _METHODS:
                values = {key: unquote(value) for key, value in found.groupdict().items()}
                return Operation(self, method.lower(), template, values, spec)
        return None

    def resolved(self, value: Any) -> Any:
        """Follow a reference, if it is one."""
        while isinstance(value, dict) and "$ref" in value:
            here: Any = self.description
            for part in value["$ref"].removeprefix("#/").split("/"):
                here = here[part.replace("~1", "/").replace("~0", "~")]
            value = here
        return value

    def example(self, name: str) -> dict[str, Any]:
        """Return a copy of a documented example, by its name in `components`."""
        found: dict[str, Any] = copy.deepcopy(
            self.description["components"]["examples"][name]["value"]
        )
        return found

    def validator(
        self, name: str, schema: dict[str, Any], *, closed: bool = True
    ) -> jsonschema.Draft202012Validator:
        """Return a validator of a schema; `closed`: undescribed properties are wrong."""
        if name not in self._validators:
            made = self._json_schema(schema, closed=closed, outer=closed)
            self._validators[name] = jsonschema.Draft202012Validator(made)
        return self._validators[name]

    def _json_schema(
        self, schema: Any, *, closed: bool, outer: bool, depth: int = 0
    ) -> dict[str, Any]:
        """Translate OpenAPI 3.0 into JSON Schema, references written out; deep ones are not."""
        if depth > 8:  # some objects hold themselves
            return {}
        schema = self.resolved(schema)
        made = {
            key: value
            for key, value in schema.items()
            if key
            in {"type", "enum", "required", "minItems", "maxItems", "minLength", "maxLength",
                "minimum", "maximum", "pattern", "additionalProperties"}
        }  # fmt: skip
        if isinstance(made.get("additionalProperties"), dict):
            made["additionalProperties"] = self._json_schema(
                made["additionalProperties"], closed=closed, outer=closed, depth=depth + 1
            )
        if "properties" in schema:
            made["properties"] = {
                key: self._json_schema(value, closed=closed, outer=closed, depth=depth + 1)
                for key, value in schema["properties"].items()
            }
            if outer and "additionalProperties" not in made and "allOf" not in schema:
                made["additionalProperties"] = False
        if "items" in schema:
            made["items"] = self._json_schema(
                schema["items"], closed=closed, outer=closed, depth=depth + 1
            )
        for word in ("oneOf", "anyOf", "allOf"):
            if word in schema:
                # Branches of an object that has properties itself only say what is required.
                made["anyOf" if word == "oneOf" else word] = [
                    self._json_schema(
                        each,
                        closed=closed,
                        outer=outer and word != "allOf" and "properties" not in schema,
                        depth=depth + 1,
                    )
                    for each in schema[word]
                ]
        return {"anyOf": [made, {"type": "null"}]} if schema.get("nullable") else made


@functools.cache
def load(path: Path) -> Contract:
    """Read the description; once a process."""
    return Contract(json.loads(path.read_text(encoding="utf-8")))
