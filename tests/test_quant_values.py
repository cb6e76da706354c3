"""The numbers in a quant: a right one passes, a wrong one never exists under its final name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from fake_tools import with_fake
from gguf_factory import converted_model, quant
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import console, gguf_header, hashing, quant_values, records
from pipelines.errors import ToolError
from pipelines.quantize import quantize

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.toolchain import Toolchain

pytestmark = pytest.mark.toolchain

# Wide enough that a row is more than one block, long enough that rows are sampled.
SIZES: dict[str, Any] = {"n_embd": 512, "n_ff": 1024, "n_layer": 1}
VICTIM = "blk.0.ffn_up.weight"

# Runs the real llama-quantize, then spoils the data of one tensor in what it wrote.
SPOIL = """
import numpy as np
code = run()
if "--dry-run" not in argv:
    sys.path.insert(0, {root!r})
    from pipelines import gguf_header
    header = gguf_header.read(Path(argv[-2]))
    tensor = next(each for each in header.tensors if each.name == {victim!r})
    rows = tensor.n_elements // tensor.shape[0]
    data = np.memmap(argv[-2], dtype=np.uint8, mode="r+", offset=header.data_offset + tensor.offset,
                     shape=(rows, tensor.size_bytes // rows))
    {spoil}
    data.flush()
sys.exit(code)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A 16-bit model with random weights."""
    return converted_model(tmp_path_factory.mktemp("model"), **SIZES)


# Q4_0 keeps blocks of 18 bytes: a scale in float16, then 32 numbers of four bits.
FAULTS = {
    "a row of another place": ("data[0] = data[5].copy()", "row 0 is 1."),
    "a row of zeros": ("data[-1] = np.tile(np.r_[0, 0, [0x88] * 16].astype(np.uint8), 16)",
                       "row 1,023 is zero, the 16-bit model's is not"),
    "NaN": ("data[0, :2] = (0, 0x7E)", "row 0 holds values that are NaN or infinite"),
    "Inf": ("data[0, :2] = (0, 0x7C)", "row 0 holds values that are NaN or infinite"),
    "all rows moved by one": ("data[:] = np.roll(data, 1, axis=0)", "16 of 16 sampled rows"),
    "half of the scale": (
        "d = data.reshape(rows, -1, 18)[..., :2]; d[:] = (d.copy().view('<f2') / 2).view('u1')",
        "is 0.5"),
    "a sign": ("scales = data.reshape(rows, -1, 18); scales[:, :, 1] ^= 0x80", "is 2.0"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "says"), FAULTS.values(), ids=FAULTS.keys())
def test_a_quant_with_wrong_numbers_never_gets_its_name(
    spoil: str, says: str, tmp_path: Path, model: Layout, tools: Toolchain
) -> None:
    """Header and types are right, the tool said that all went well; the numbers are not."""
    root = str(quant_values.__file__).rpartition("/pipelines/")[0]
    body = SPOIL.format(root=root, victim=VICTIM, spoil=spoil)
    fake = with_fake(tmp_path / "fake", tools, "llama-quantize", body)

    with pytest.raises(ToolError) as caught:
        quantize(quant("Q4_0"), model, fake)

    assert f"llama-quantize made {VICTIM} wrong" in caught.value.message
    assert says in caught.value.message
    assert "fleet toolchain --verify" in caught.value.hint
    assert not model.gguf("tiny", "tiny-Q4_0").exists()


@pytest.mark.parametrize("type_", ["Q8_0", "Q4_K_M", "Q2_K", "TQ2_0", "F16"])
def test_a_right_quant_passes_and_its_record_says_what_was_looked_at(
    type_: str, model: Layout, tools: Toolchain
) -> None:
    """Sixteen rows of each tensor, the worst of them by name, the same in every run."""
    first = quantize(quant(type_), model, tools)
    again = quantize(quant(type_), model, tools)

    values = first.values
    assert values is not None
    assert values == again.values
    assert values.tensors_count == first.tensors_count
    assert values.rows_count == sum(
        min(16, tensor.n_elements // tensor.shape[0])
        for tensor in gguf_header.read(model.gguf("tiny", f"tiny-{type_}")).tensors
    )
    assert values.worst_error <= values.worst_limit
    assert (values.worst_error > 0) == (type_ != "F16")


def test_rows_of_tiny_numbers_are_counted_and_not_judged(tmp_path: Path, tools: Toolchain) -> None:
    """Below 1e-7 a scale of 16 bits is zero: that is what the type can do, and no fault."""
    at = converted_model(tmp_path, **SIZES)
    header = gguf_header.read(at.f16("tiny"))
    tensor = next(each for each in header.tensors if each.name == VICTIM)
    data = np.memmap(
        at.f16("tiny"), dtype=np.float16, mode="r+", offset=header.data_offset + tensor.offset,
        shape=tensor.shape[::-1],
    )  # fmt: skip
    data[0] = np.float16(6e-8)
    data.flush()
    made = tmp_path / "made.gguf"
    made.write_bytes(at.f16("tiny").read_bytes())
    source = gguf_header.read(at.f16("tiny"))
    record = records.read(at.model_record("convert", "tiny"), records.ConvertRecord)
    digests = hashing.digest(at.f16("tiny"))
    file = record.gguf.model_copy(update={"sha256": digests.sha256, "md5": digests.md5})
    records.write(at.model_record("convert", "tiny"), record.model_copy(update={"gguf": file}))

    quantize(quant("Q4_0"), at, tools)
    values = quant_values.examine(source, gguf_header.read(at.gguf("tiny", "tiny-Q4_0")), tools)

    assert values.tiny_rows_count == 1


def test_a_type_that_gguf_py_cannot_read_is_said(
    model: Layout, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is claimed of it: the record names the tensors, and a warning does."""
    warnings: list[str] = []
    monkeypatch.setattr(console, "warn", warnings.append)

    record = quantize(quant("Q2_0"), model, tools)

    assert record.values is not None
    assert VICTIM in record.values.unreadable
    assert "gguf-py cannot read" in warnings[0]


def test_records_without_read_rows_stay_as_they_are(model: Layout, tools: Toolchain) -> None:
    """A record of before has no such field, and writing it again adds none."""
    record = quantize(quant("Q8_0"), model, tools).model_copy(update={"values": None})

    assert "values" not in record.model_dump()
    assert records.QuantizeRecord.model_validate_json(record.model_dump_json()) == record


def test_every_quantized_type_of_gguf_py_has_a_measured_bound() -> None:
    """A type that can be read and has no bound would be judged as if it were rounding."""
    readable = {kind.name for kind in gguf.quants._type_traits} - {"F32", "F16", "BF16"}

    assert readable - {"NVFP4"} == set(quant_values.WORST)
    assert all(0 < tensor <= row for row, tensor in quant_values.WORST.values())


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 100_000), name=st.text(min_size=1, max_size=40))
def test_a_sample_has_the_ends_and_no_row_twice(rows: int, name: str) -> None:
    """The first and the last row are where a wrong length shows."""
    picked = quant_values.sample(name, rows).tolist()

    assert picked == sorted(set(picked))
    assert (picked[0], picked[-1]) == (0, rows - 1)
    assert len(picked) == min(rows, quant_values.ROWS_PER_TENSOR)
