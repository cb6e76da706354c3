"""What `fleet quantize --explain` says is what `fleet quantize` then makes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from gguf_factory import converted_model, quant

from pipelines import explain, gguf_header
from pipelines.params import Benchmark, BenchmarkSlice, Corpus
from pipelines.quantize import quantize

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.params import QuantizeSlice
    from pipelines.toolchain import Toolchain

pytestmark = pytest.mark.toolchain


def _measured(wanted: QuantizeSlice, context_tokens: int = 256) -> BenchmarkSlice:
    return BenchmarkSlice(
        key=wanted.key,
        model=wanted.model,
        type=wanted.type,
        recipe=1,
        context_tokens=context_tokens,
        corpus=Corpus(path="corpora/evaluation.txt", sha256="0" * 64),
        benchmark=Benchmark(threads=1),
    )


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A fleet with one converted model."""
    return converted_model(tmp_path / "fleet")


@pytest.mark.parametrize(
    "wanted",
    [
        quant("Q4_K_M"),
        quant("Q2_K", preset="protect-attention"),
        quant("Q8_0", ((r"ffn_up", "q4_0"),)),
        quant("Q4_K_M", pure=True),
    ],
    ids=["plain", "preset", "rule", "pure"],
)
def test_size_types_and_bits_are_those_of_the_file(
    at: Layout, tools: Toolchain, wanted: QuantizeSlice
) -> None:
    """The prediction is exact but for a few KB of metadata."""
    told = explain.explain(wanted, _measured(wanted), at, tools)

    record = quantize(wanted, at, tools)

    made = gguf_header.read(at.gguf("tiny", wanted.key))
    assert told.mix.types == {tensor.name: tensor.type for tensor in made.tensors}
    assert told.tensor_bytes == dict(record.tensor_bytes)
    assert told.bits_per_weight == pytest.approx(record.bits_per_weight, abs=1e-4)
    assert 0 <= made.file_size_bytes - told.size_bytes <= 4096


def test_nothing_is_made(at: Layout, tools: Toolchain) -> None:
    """No GGUF and no scratch file is left."""
    wanted = quant()

    explain.explain(wanted, _measured(wanted), at, tools)

    assert not at.gguf("tiny", wanted.key).exists()
    assert not list(at.root.rglob("*.planned.gguf"))


def test_more_context_takes_more_memory(at: Layout, tools: Toolchain) -> None:
    """The memory is planned for the declared context."""
    wanted = quant()

    short, long = (
        explain.explain(wanted, _measured(wanted, context), at, tools) for context in (512, 65536)
    )

    assert long.memory.context_mib > short.memory.context_mib
    assert long.memory.model_mib == short.memory.model_mib


def test_fallbacks_are_shown_with_what_the_declaration_makes_of_them(
    tmp_path: Path, tools: Toolchain
) -> None:
    """Rows of 320 fit no block of 256: shown tensor by tensor, and that it would be refused."""
    at = converted_model(tmp_path / "fleet", n_embd=320, n_ff=640)
    wanted = quant("Q4_K_M")

    told = explain.explain(wanted, _measured(wanted), at, tools)

    said = explain.text(told)
    assert told.mix.fallbacks
    assert f"{told.mix.fallbacks[0].tensor}: " in said
    assert "refused as declared" in said
    assert json.loads(explain.json_text(told))["is_allowed"] is False


def test_a_planned_header_is_read_back_as_it_was_written(at: Layout, tmp_path: Path) -> None:
    """Metadata and shapes of the source, the predicted types, and no byte on the disk for them."""
    source = gguf_header.read(at.f16("tiny"))
    types = {
        tensor.name: "Q8_0" if len(tensor.shape) > 1 else tensor.type for tensor in source.tensors
    }
    path = tmp_path / "plan.gguf"

    size_bytes = gguf_header.write_plan(source, types, path)

    planned = gguf_header.read(path)
    assert planned.metadata.keys() == source.metadata.keys()
    assert {tensor.name: tensor.type for tensor in planned.tensors} == types
    assert planned.end_offset == planned.file_size_bytes == size_bytes
