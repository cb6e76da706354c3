"""params.schema.json and docs/params.md: generated, complete, and of one mind with the loader."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema  # type: ignore[import-untyped] # it has no types
import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from pipelines import cli_pages, error_pages, schema
from pipelines.params import PATTERN_WORDS, Declaration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Fleet = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "tests/data/params.yaml"
SCHEMA = json.loads(schema.generate())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

# Instead of any value of the sample. A float without a fraction is not among them: JSON Schema
# takes 1.0 for an integer, the loader does not. Neither is text that ends in a newline, which `$`
# lets pass in Python's jsonschema, but not in an editor.
REPLACEMENTS: tuple[Any, ...] = (
    None, True, 0, 1, -1, 10**9, 0.5, "", "x", "Q4_K_M", "../x", "a b", "A", "f" * 40, "f" * 64,
    "path:x", "path:../x", "hf:a/b", [], ["x"], [1], {}, [{"match": "x", "type": "q4_k"}],
)  # fmt: skip


def load(path: Path) -> Any:
    """Return the plain data of a YAML file."""
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value below `data`."""
    for key in list(data) if isinstance(data, dict) else range(len(data)):
        yield (*path, key)
        if isinstance(data[key], dict | list):
            yield from places(data[key], (*path, key))


def fragments(part: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping inside a schema."""
    if isinstance(part, dict):
        yield part
        for value in part.values():
            yield from fragments(value)
    elif isinstance(part, list):
        for value in part:
            yield from fragments(value)


def loads(data: Any) -> bool:
    """Tell whether the types let plain data pass."""
    try:
        Declaration.model_validate_json(json.dumps(data))
    except ValidationError:
        return False
    return True


def test_the_schema_is_a_schema() -> None:
    """It is valid JSON Schema of the dialect that it names."""
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", [ROOT / "params.yaml", SAMPLE], ids=["repository", "sample"])
def test_the_schema_accepts_valid_declarations(path: Path) -> None:
    """An editor shows no error in a file that `fleet check` accepts."""
    assert [each.message for each in VALIDATOR.iter_errors(load(path))] == []


def test_the_first_line_of_the_declaration_names_the_schema() -> None:
    """An editor with the YAML language server finds the schema by itself."""
    first = (ROOT / "tests/sample/params.yaml").read_text(encoding="utf-8").splitlines()[0]

    assert first == f"# yaml-language-server: $schema={schema.SCHEMA_FILE}"


def test_schema_and_loader_refuse_the_same_values() -> None:
    """Every value of the sample replaced by 23 others: both accept it or both refuse it."""
    sample = load(SAMPLE)
    accepted = refused = 0
    for *owner, key in places(sample):
        for value in REPLACEMENTS:
            data = copy.deepcopy(sample)
            place = data
            for step in owner:
                place = place[step]
            place[key] = value
            verdict = loads(data)
            assert VALIDATOR.is_valid(data) == verdict, (owner, key, value)
            accepted, refused = accepted + verdict, refused + (not verdict)

    assert accepted > 100
    assert refused > 1000


def test_schema_and_loader_refuse_the_same_keys() -> None:
    """A key removed, a key misspelt, a key too many, at every place of the sample."""
    sample = load(SAMPLE)
    for *owner, key in places(sample):
        if isinstance(key, int):
            continue
        for edit in ("remove", "rename", "add", "dot"):
            data = copy.deepcopy(sample)
            place = data
            for step in owner:
                place = place[step]
            if edit == "remove":
                del place[key]
            elif edit == "rename":
                place[f"{key}x"] = place.pop(key)
            else:
                place["more" if edit == "add" else "a.b"] = copy.deepcopy(place[key])
            assert VALIDATOR.is_valid(data) == loads(data), (owner, key, edit)


def test_every_key_is_described() -> None:
    """An editor and the reference explain every key; no mapping is left open."""
    for part in fragments(SCHEMA):
        for key, value in part.get("properties", {}).items():
            if isinstance(value, dict) and "properties" not in part.get("properties", {}):
                assert value.get("description", "").endswith("."), key
        if part.get("type") == "object":
            assert "additionalProperties" in part
            assert part["additionalProperties"] is False or "propertyNames" in part


def test_every_pattern_has_words() -> None:
    """Where a pattern refuses a value, the editor says in words what is allowed."""
    patterns = [part for part in fragments(SCHEMA) if isinstance(part.get("pattern"), str)]

    assert {part["pattern"] for part in patterns} == set(PATTERN_WORDS)
    for part in patterns:
        assert part["patternErrorMessage"] == f"must be {PATTERN_WORDS[part['pattern']]}"


@pytest.mark.parametrize("pattern", PATTERN_WORDS)
def test_every_pattern_means_the_same_in_javascript(pattern: str) -> None:
    """No syntax that only Python has; where node is at hand, it decides 20 strings as Python."""
    assert not re.search(r"\(\?[^:!=]|\\[AZz]|[*+?}]\+", pattern)
    if (node := shutil.which("node")) is None:
        return
    strings = ["", "a", "A", "a b", "a.b", "../a", "a/..", "a/../b", "..", "-a", "/a", "a/b", "a\n",
               "hf:a/b", "path:a", "path:../a", "path:a/..", "f" * 40, "f" * 64, "0.3.36",
               "a-Q4_K_M", "ä", "\x00", r"blk\.0", "a=b", "sqlite:///x"]  # fmt: skip
    script = """
        const [pattern, strings] = JSON.parse(process.argv[1]);
        const regex = new RegExp(pattern, "u");
        console.log(JSON.stringify(strings.map((each) => regex.test(each))));
    """
    done = subprocess.run(
        [node, "-e", script, json.dumps([pattern, strings])],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip

    # JavaScript's `$` is the end of the text; so is Python's `\Z`.
    ours = [re.search(pattern.replace("$", r"\Z"), each) is not None for each in strings]
    assert json.loads(done.stdout) == ours


def test_the_reference_names_every_key_with_its_default_and_its_limits() -> None:
    """docs/params.md has a row for each key of the declaration."""
    text = schema.generate_docs()

    for section in Declaration.model_fields:
        assert f"\n## {section}\n" in text
    for row in (
        "| `quality.chunks` | a whole number from 1 to 1,000,000 | `100` |",
        "| `tensor_types[].match` | a regular expression in lower case",
        "| `revision` | a full commit: 40 digits of 0-9a-f | required |",
        '| `backend` | one of auto, cpu, cuda, vulkan, metal | `"auto"` |',
        "| `min_same_top` | a number from 0 to 1 | absent |",
    ):
        assert row in text
    for part in fragments(SCHEMA["$defs"]):
        for key in part.get("properties", {}):
            assert f"{key}`" in text, key


def test_the_committed_files_are_up_to_date() -> None:
    """The schemas and the generated pages say what the code says now."""
    assert schema.in_sync(ROOT) == []


def test_a_stale_or_missing_file_is_named(tmp_path: Path) -> None:
    """All are missing at first; after writing none; after an edit the one that was edited."""
    assert schema.in_sync(tmp_path) == [
        schema.SCHEMA_FILE, schema.DOCS_FILE, schema.RELEASE_FILE, schema.VERDICT_FILE,
        cli_pages.PAGE_FILE, error_pages.PAGE_FILE,
    ]  # fmt: skip

    schema.write(tmp_path)
    assert schema.in_sync(tmp_path) == []

    with (tmp_path / schema.DOCS_FILE).open("a", encoding="utf-8") as file:
        file.write("edited\n")
    assert schema.in_sync(tmp_path) == [schema.DOCS_FILE]


def test_the_command_line_writes_and_compares(tmp_path: Path, fleet: Fleet) -> None:
    """`fleet schema --check` exits with 2 and the command to type until `--write` ran."""
    stale = fleet("schema", "--check", cwd=tmp_path)
    fleet("schema", "--write", cwd=tmp_path)
    fresh = fleet("schema", "--check", cwd=tmp_path)

    assert (stale.returncode, fresh.returncode) == (2, 0)
    assert "fleet schema --write" in stale.stderr
    assert (tmp_path / schema.SCHEMA_FILE).read_text(encoding="utf-8") == schema.generate()
