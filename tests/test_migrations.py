"""What another version of the template wrote is read as what it was, or refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sample
from pydantic import TypeAdapter

from pipelines import (
    __version__,
    bundle_checks,
    declaration,
    migrations,
    records,
    release_records,
)
from pipelines.errors import FleetError, ParamsError
from pipelines.layout import Layout
from pipelines.ledger import Ledger
from pipelines.migrations import Renamed

if TYPE_CHECKING:
    from collections.abc import Callable

STATE = Path(__file__).resolve().parent / "data/state"
VERSIONS = sorted(path.name for path in STATE.iterdir())
MODEL = "tiny-llama"
# Not written by a stage that measures, each with its reader.
OTHERS: dict[str, Callable[[Path], object]] = {
    "params.yaml": declaration.load,
    f"results/{MODEL}/ledger.jsonl": lambda path: Ledger.load(path, MODEL).lines[0],
    f"results/{MODEL}/release.json": lambda path: release_records.parse_release(
        path.read_bytes(), release_records.release_id(path.read_bytes()), "git"
    ),
    f"results/{MODEL}/publish.json": lambda path: records.read(path, release_records.PublishRecord),
    f"results/{MODEL}/toolchain.json": lambda path: json.loads(path.read_bytes())[
        "llama_cpp_commit"
    ],
}


def _read(root: Path, name: str) -> object:
    """Read a file of a state as the verbs do."""
    if name in OTHERS:
        return OTHERS[name](root / name)
    kind = bundle_checks.kinds(MODEL)[name]
    if isinstance(kind, TypeAdapter):
        return kind.validate_json((root / name).read_bytes())
    return records.read(root / name, kind)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_every_released_version_wrote_can_be_read(version: str) -> None:
    """Declaration, records, release and ledger; a release says the same as it did, by its id."""
    root = STATE / version
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    assert len(names) > 10
    for name in names:
        assert _read(root, name)
    release = (root / f"results/{MODEL}/release.json").read_bytes()
    told = release_records.parse_release(release, release_records.release_id(release), "git")
    assert release_records.release_bytes(told) == release
    ledger = Ledger.load(root / f"results/{MODEL}/ledger.jsonl", MODEL)
    assert ledger.moves("local", "stable")[-1].release == release_records.release_id(release)


def test_this_version_has_an_example_of_its_state() -> None:
    """A patch writes what the version before it wrote."""
    minor = __version__.rpartition(".")[0]
    assert any(name.rpartition(".")[0] == minor for name in VERSIONS)


@pytest.mark.parametrize(
    ("written", "text", "hint"),
    [
        (2, "was written by a later version of the template", "fleet template update"),
        (10**30, "was written by a later version of the template", "fleet template update"),
        (0, "was written by an earlier version of the template", ""),
        (-1, "was written by an earlier version of the template", ""),
    ],
)
@pytest.mark.parametrize("name", ["choice.json", "load-test.json", "release.json", "ledger.jsonl"])
def test_what_another_version_wrote_is_refused_with_its_number_and_ours(
    tmp_path: Path, name: str, written: int, text: str, hint: str
) -> None:
    """Also where it has fields that nobody here has heard of."""
    whole = f"results/{MODEL}/{name}"
    place = tmp_path / whole
    place.parent.mkdir(parents=True)
    line, *_ = (STATE / "1.0.0" / whole).read_text(encoding="utf-8").split("\n")
    value = json.loads(line if name.endswith("l") else (STATE / "1.0.0" / whole).read_bytes())
    text_written = json.dumps({**value, "schema_version": written, "unheard_of": {}})
    place.write_text(f"{text_written}\n", encoding="utf-8")
    with pytest.raises(FleetError, match=text) as raised:
        _read(tmp_path, whole)
    shown = str(written)[:20]
    assert f"schema_version {shown}, and {__version__} reads 1" in raised.value.message
    assert hint in raised.value.hint
    assert ("fleet template update" in raised.value.hint) == bool(hint)


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"[]", b'{"schema_version": "2"}', b"\xff"])
def test_what_says_no_version_is_refused_for_what_it_is(tmp_path: Path, data: bytes) -> None:
    """A version is nothing to talk about in bytes that are no record."""
    place = tmp_path / "fetch.json"
    place.write_bytes(data)
    with pytest.raises(FleetError, match="not a FetchRecord of this version"):
        records.read(place, records.FetchRecord)


# --- params.yaml ------------------------------------------------------------------------------

RENAMED = (
    Renamed(("models", "*", "aim"), "goal", "1.1.0"),
    Renamed(("models", "*", "goal"), "objective", "1.2.0"),
    Renamed(("load_testing",), "load_test", "1.1.0"),
    Renamed(("quants", "*", "tensors", "*", "name"), "match", "1.2.0"),
)
BEFORE = """\
# aim: of the fleet
load_testing:  # as before
  requests: 20
models:
  one:
    source: "hf:o/aim"   # aim
    'aim': speed         # kept
  two: {aim: size, note: "aim: no key"}
  both: {aim: size, objective: speed}
quants:
  one-Q8_0: {model: one, tensors: [{name: a, type: Q8_0}, {name: b}]}
"""
AFTER = (
    BEFORE.replace("load_testing:", "load_test:")
    .replace("'aim': speed", "'objective': speed")
    .replace("{aim: size, note", "{objective: size, note")
    .replace("both: {aim:", "both: {goal:")
    .replace("{name: ", "{match: ")
)


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this version have renamed keys, one of them twice."""
    monkeypatch.setattr(migrations, "RENAMED", RENAMED)


@pytest.mark.usefixtures("renamed")
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_renamed_keys_get_their_new_names_and_not_a_byte_beside_them_changes(
    line_end: str,
) -> None:
    """Comments, values and quotes stay; a key whose new name is there, too, is for a person."""
    assert migrations.rewritten(BEFORE.replace("\n", line_end)) == AFTER.replace("\n", line_end)
    assert migrations.rewritten(AFTER) == AFTER
    # `fleet check` allows no alias; here it must not make a wrong key of one that is reached twice.
    alias = "models:\n  one: &one\n    aim: size\n  two: *one\n"
    assert migrations.rewritten(alias) == alias.replace("aim", "objective")
    for text in ("", "aim", "[", "models: [aim]", "models: {one: }", "a\tb: - c"):
        assert migrations.rewritten(text) == text


@pytest.mark.usefixtures("renamed")
def test_an_old_key_is_an_error_that_says_what_it_is_called_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one verb writes it, with the diff, so that the declaration is what it was."""
    sample.lay(tmp_path, records=False)
    at = Layout(tmp_path)
    before = at.params.read_text(encoding="utf-8")
    at.params.write_text(before.replace("objective: speed", "aim: speed"), encoding="utf-8")
    with pytest.raises(ParamsError) as raised:
        declaration.load(at.params)
    (problem,) = raised.value.problems
    assert 'is called "goal" since 1.1.0: fleet template migrate' in problem.text
    assert migrations.main(at, dry_run=True) == 0
    assert "+    objective: speed" in capsys.readouterr().out
    assert "aim: speed" in at.params.read_text(encoding="utf-8")
    assert migrations.main(at, dry_run=False) == 0
    assert at.params.read_text(encoding="utf-8") == before
    declaration.load(at.params)
    at.params.write_bytes(b"\xff")
    with pytest.raises(ParamsError, match="cannot be read"):
        migrations.main(at, dry_run=False)


def test_every_renamed_key_leads_to_one_that_there_is() -> None:
    """The table grows only; a key in it is none of this version, the last name of it is."""
    from pipelines import schema  # noqa: PLC0415 - builds the JSON Schema

    for each in migrations.RENAMED:
        place = tuple("key" if part == "*" else part for part in each.place[:-1])
        known = set(schema.at(place)["properties"])
        later = {other.place[-1] for other in migrations.RENAMED if other.place[:-1] == place}
        assert each.place[-1] not in known
        assert each.name in known | later
