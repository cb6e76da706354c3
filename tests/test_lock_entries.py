"""Entries of dvc.lock: by key, never by text; the bytes that DVC would write."""

from __future__ import annotations

import json
from itertools import permutations
from typing import TYPE_CHECKING

import pytest
import sample
import yaml
from bundle_factory import MODEL, ROOT, TWIN, bundle_of, fleet, with_twin

from pipelines import declaration, lock_entries
from pipelines.errors import FleetError

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.layout import Layout

WRITTEN_BY_DVC = sample.of("dvc.lock").read_text()


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A fleet of two models, of which one was measured."""
    return with_twin(fleet(tmp_path / "fork"))


def test_what_went_through_json_is_written_byte_by_byte_as_dvc_wrote_it() -> None:
    """A bundle is JSON; the lock that comes of it is the one that DVC left."""
    entries = json.loads(json.dumps(lock_entries.parsed(WRITTEN_BY_DVC)))

    assert lock_entries.merged("", entries) == WRITTEN_BY_DVC
    assert lock_entries.merged(WRITTEN_BY_DVC, entries) == WRITTEN_BY_DVC


def test_an_entry_keeps_its_place_and_no_other_byte_changes() -> None:
    """A stage that ran again is replaced where it stands."""
    entries = lock_entries.parsed(WRITTEN_BY_DVC)
    name = f"convert@{MODEL}"
    digest = entries[name]["outs"][0]["md5"]
    entries[name]["outs"][0]["md5"] = "f" * 32

    merged = lock_entries.merged(WRITTEN_BY_DVC, {name: entries[name]})

    outs = WRITTEN_BY_DVC.index("outs:", WRITTEN_BY_DVC.index(f"  {name}:\n"))
    at = WRITTEN_BY_DVC.index(digest, outs)
    assert merged == WRITTEN_BY_DVC[:at] + "f" * 32 + WRITTEN_BY_DVC[at + 32 :]


def test_two_models_are_merged_in_any_order_to_the_same_entries(at: Layout) -> None:
    """Two pull requests that measured two models do not meet in the lock."""
    bundles = {model: bundle_of(at, model).lock for model in (MODEL, TWIN)}
    results = []
    for order in permutations(bundles):
        text = (at.root / "dvc.lock").read_text()
        for model in order:
            text = lock_entries.merged(text, bundles[model])
        results.append(lock_entries.parsed(text))

    assert results[0] == results[1]
    assert results[0] == lock_entries.parsed(WRITTEN_BY_DVC) | bundles[MODEL] | bundles[TWIN]


def test_what_is_not_declared_goes_and_what_a_person_added_stays(at: Layout) -> None:
    """An entry of a stage that is none of ours is the operator's own."""
    told = yaml.safe_load(at.params.read_text())
    del told["quants"][f"{MODEL}-Q2_K"], told["models"][TWIN]
    told["quants"] = {key: one for key, one in told["quants"].items() if one["model"] == MODEL}
    at.params.write_text(yaml.safe_dump(told))
    declared = declaration.load(at.params)
    names = [*lock_entries.parsed(WRITTEN_BY_DVC), "mine@old", f"publish@{TWIN}", f"fetch@{TWIN}"]

    gone = lock_entries.undeclared(names, declared)

    wanted = {f"quantize@{MODEL}-Q2_K", f"benchmark@{MODEL}-Q2_K", f"publish@{TWIN}"}
    assert set(gone) == wanted | {f"fetch@{TWIN}"}
    left = lock_entries.parsed(lock_entries.merged(WRITTEN_BY_DVC, {}, gone=gone))
    assert f"quantize@{MODEL}-Q2_K" not in left
    assert "report" in left


def test_a_lock_without_an_entry_is_no_file() -> None:
    """DVC removes an empty lock; so do we, by an empty text."""
    names = list(lock_entries.parsed(WRITTEN_BY_DVC))

    assert lock_entries.merged(WRITTEN_BY_DVC, {}, gone=names) == ""


@pytest.mark.parametrize(
    "text",
    ["<<<<<<< HEAD\nschema: '2.0'\n=======\n", "- a\n- b\n", "stages: [1]\n", "schema: '2.0'\n"],
)
def test_a_lock_that_was_merged_by_text_is_named_and_left_alone(text: str) -> None:
    """The error says what to type."""
    with pytest.raises(FleetError, match=r"dvc\.lock is not what DVC writes") as caught:
        lock_entries.merged(text, {})

    assert "git checkout origin/main -- dvc.lock" in caught.value.hint


def test_the_stages_of_a_model_are_those_of_the_graph() -> None:
    """What is measured of a model is what dvc.yaml has for it, but publish and track."""
    declared = declaration.load(sample.of("params.yaml"))
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

    stages = {name.partition("@")[0] for name in lock_entries.names_of(declared, MODEL)}

    assert stages == set(graph) - {"publish", "track", "report"}
