"""Speed over the layers on the GPU: what is swept, what is written, what the choice says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import record_factory as make

from pipelines import choose, load_sweep, records, render_load
from pipelines.gpu import Card
from pipelines.layout import Layout
from pipelines.load_records import SweepPoint, SweepRecord

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from pipelines.toolchain import Toolchain

    Fleet = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parent.parent
CARD = Card(
    name="NVIDIA GeForce RTX 3090", vram_mib=24576, compute_capability="8.6", power_limit_w=350,
    pcie_generation=4, pcie_lanes=16,
)  # fmt: skip


def sweep_record(**changes: object) -> SweepRecord:
    """Return the sweep of a model that fits with a half of its layers."""
    points = (
        SweepPoint(gpu_layers=0, size_vram_bytes=0, ttft_p50_ms=900.0, output_tok_s=4.1,
                   sentence="10 of 10 requests answered"),
        SweepPoint(gpu_layers=17, size_vram_bytes=9 << 30, ttft_p50_ms=300.0, output_tok_s=11.0,
                   sentence="10 of 10 requests answered"),
        SweepPoint(gpu_layers=33, size_vram_bytes=None, ttft_p50_ms=None, output_tok_s=None,
                   sentence="it does not fit"),
    )  # fmt: skip
    fields: dict[str, object] = {
        "model": make.MODEL, "type": "Q8_0",
        "gguf_sha256": make.quantize_record("Q8_0").gguf.sha256, "layers_count": 33,
        "context_tokens": 4096, "machine": make.machine_id(), "engine": "ollama 0.33.0",
        "points": points, "measured_at": "2026-11-21T00:00:00Z",
    }  # fmt: skip
    return SweepRecord.model_validate(fields | changes)


def test_a_host_without_a_card_has_nothing_to_sweep_and_says_so() -> None:
    """A CPU build and a GPU build without its card are told apart."""
    assert "serves from the CPU" in load_sweep.nothing_to_sweep("cpu", [])
    assert "no card is seen" in load_sweep.nothing_to_sweep("cuda", [])
    assert not load_sweep.nothing_to_sweep("cuda", [CARD])
    assert not load_sweep.nothing_to_sweep("metal", [])


def test_the_verb_says_that_there_is_nothing_and_ends_well(
    tools: Toolchain, fleet: Fleet, checkout: Path
) -> None:
    """No fault of the operator's; stdout stays machine-readable."""
    if tools.backend != "cpu":
        pytest.skip("this machine has something to sweep")
    done = fleet("load-test", "tiny-llama", "--sweep", "gpu_layers", "--json", cwd=checkout)

    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    assert "nothing to sweep" in done.stderr


@pytest.mark.parametrize(
    ("layers", "counts"), [(33, [0, 8, 16, 25, 33]), (5, [0, 1, 2, 4, 5]), (1, [0, 1])]
)
def test_points_go_from_no_layer_to_all(layers: int, counts: list[int]) -> None:
    """Quarters; a small model has fewer."""
    assert load_sweep.layer_counts(layers) == counts


def test_swept_are_the_winner_and_what_a_host_has_too_little_memory_for() -> None:
    """What merely lost says nothing about a card."""
    slice_ = make.choose_slice(
        ("Q8_0", "Q6_K", "Q4_K_M"), hosts={"small": {"memory_mib": 1000, "margin_mib": 0}}
    )
    sizes = {"Q8_0": 1200.0, "Q6_K": 800.0, "Q4_K_M": 600.0}
    choice = choose.choose(
        slice_,
        {key: make.quantize_record(type_) for key, type_ in slice_.quants.items()},
        {
            key: make.benchmark_record(
                type_,
                memory=make.memory(measured_mib=sizes[type_], estimate_mib=sizes[type_]),
                decode_tok_s=100.0 if type_ == "Q4_K_M" else 50.0,
            )
            for key, type_ in slice_.quants.items()
        },
    )

    assert sorted(load_sweep.types_to_sweep(choice)) == ["Q4_K_M", "Q8_0"]


def test_the_table_shows_what_fits_and_what_does_not() -> None:
    """A point that was not served has no numbers, and its reason."""
    text = render_load.sweep(sweep_record())

    assert "17 of 33" in text
    assert "9,220" in text
    assert "it does not fit" in text


def test_the_choice_tells_a_sweep_of_the_very_file_and_no_other(tmp_path: Path) -> None:
    """One of an older GGUF says nothing any more."""
    at = Layout(tmp_path)
    slice_ = make.choose_slice(("Q8_0",))
    quantized = make.quantize_record("Q8_0")
    make.write_model(at, quantized=[quantized], measured=[make.benchmark_record("Q8_0")])
    records.write(at.sweep_record(make.MODEL, "Q8_0"), sweep_record())

    told = choose.run(slice_, at).notes
    records.write(at.sweep_record(make.MODEL, "Q8_0"), sweep_record(gguf_sha256="0" * 64))

    assert (
        "Q8_0 with a part of its 33 layers on the GPU, one request at a time: 0: 4.1 tok/s, "
        "17: 11 tok/s, 33: not served."
    ) in told
    assert not any("layers on the GPU" in note for note in choose.run(slice_, at).notes)
