"""`fleet choose --what-if` answers with the measurements that are there, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sample
from record_factory import choose_slice

from pipelines import what_if
from pipelines.errors import ParamsError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def measured(checkout: Path) -> Path:
    """A checkout with the sample's records of the embedded model."""
    sample.take(checkout, "results")
    return checkout


def _digests(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*.json"))}


def test_a_smaller_host_gets_another_answer_and_nothing_is_written(
    measured: Path, fleet: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The limit is applied to what was measured; no record changes."""
    before = _digests(measured / "results")

    told = fleet("choose", "tiny-llama", "--what-if", "memory_mib=1000", cwd=measured)

    assert told.returncode == 0, told.stderr
    assert "over the 1,000 MiB of host local" in told.stdout
    assert "now it is" in told.stdout
    assert _digests(measured / "results") == before


def test_a_limit_that_changes_nothing_says_so(
    measured: Path, fleet: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Twice the memory keeps the winner."""
    told = fleet("choose", "tiny-llama", "--what-if", "local.memory_mib=8192", cwd=measured)

    assert "as it is now" in told.stdout


def test_as_json_it_is_a_choice(
    measured: Path, fleet: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The record that would be written, and what was asked."""
    told = fleet("choose", "tiny-llama", "--what-if", "objective=size", "--json", cwd=measured)

    answer = json.loads(told.stdout)
    assert answer["what_if"] == ["objective=size"]
    assert answer["choice"]["objective"] == "size"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("vram_mb=1", 'did you mean "vram_mib"'),
        ("nowhere.vram_mib=1", "is not declared"),
        ("local.max_size_mib=1", "a host has"),
        ("vram_mib", "is not NAME=VALUE"),
        ("vram_mib=lots", "valid integer"),
        ("vram_mib=-1", "greater than or equal to 1"),
        ("min_same_top=nan", "finite number"),
        ("objective=fast", "speed"),
    ],
)
def test_what_is_no_limit_is_refused_in_words(asked: str, words: str) -> None:
    """A slip of the finger is named, with what may be asked."""
    slice_ = choose_slice(hosts={"local": {"vram_mib": 8192}})

    with pytest.raises(ParamsError) as error:
        what_if.apply(slice_, [asked])

    assert words in f"{error.value.message} {error.value.hint}"


def test_a_limit_can_be_taken_away() -> None:
    """`none` removes a gate; the declaration that was given stays as it is."""
    slice_ = choose_slice()

    changed = what_if.apply(slice_, ["max_kld_mean_nats=none", "min_speed_effect=0.1"])

    assert changed.gates.max_kld_mean_nats is None
    assert changed.choose.min_speed_effect == pytest.approx(0.1)
    assert slice_.gates.max_kld_mean_nats is not None
