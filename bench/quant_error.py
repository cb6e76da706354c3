"""
How far a right quant is from its source: the figures behind `pipelines.quant_values.WORST`.

    python bench/quant_error.py [TYPE ...]

Matrices of several kinds are quantized by the toolchain's own llama-quantize, plainly and with two
importance matrices, and read back by gguf-py: normal numbers, heavy tails (Student's t with 3 and
with 1.5 degrees of freedom), a column that is 30 times as large, rows of very different size, and
uniform numbers. For each type the worst row and the worst tensor are printed, as the root mean
square of the error over that of the row. Nothing is written.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import gguf
import numpy as np

from pipelines import declaration, gguf_header, llamacpp, quant_values, toolchain

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS: Final = 128
LENGTH: Final = 1024


def matrices(random: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Weights by the name of the tensor that holds them."""
    shape = (ROWS, LENGTH)
    column = random.normal(0, 0.02, shape)
    column[:, 17] *= 30
    sizes = random.normal(0, 1, shape) * np.exp(random.normal(-4, 1, (ROWS, 1)))
    kinds = {
        "attn_q": random.normal(0, 0.02, shape),
        "attn_k": random.standard_t(3, shape) * 0.02,
        "attn_v": random.standard_t(1.5, shape).clip(-500, 500) * 0.01,
        "attn_output": column,
        "ffn_gate": sizes,
        "ffn_up": random.uniform(-0.1, 0.1, shape),
    }
    return {f"blk.0.{name}.weight": values.astype(np.float32) for name, values in kinds.items()}


def write_source(path: Path, weights: dict[str, NDArray[np.float32]]) -> None:
    """Write what llama-quantize takes for a model of 16 bits."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(LENGTH)
    writer.add_feed_forward_length(ROWS)
    writer.add_head_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, values in weights.items():
        writer.add_tensor(name, values.astype(np.float16))
    finish(writer)


def write_imatrix(path: Path, names: list[str], spread: float, random: Any) -> None:  # noqa: ANN401
    """Write an importance matrix whose entries differ by exp(normal x spread)."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name in names:
        sums = np.exp(random.normal(0, spread, (1, LENGTH))).astype(np.float32) * 512
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", np.array([[512.0]], dtype=np.float32))
    finish(writer)


def finish(writer: Any) -> None:  # noqa: ANN401 - gguf has no types
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(type_: str, folder: Path, tools: toolchain.Toolchain) -> tuple[float, float]:
    """Return the worst row and the worst tensor of one type."""
    source = gguf_header.read(folder / "source.gguf")
    worst_row = worst_tensor = 0.0
    for imatrix in (None, "flat", "steep"):
        made = folder / "made.gguf"
        made.unlink(missing_ok=True)
        argv: list[str | Path] = [tools.tool("llama-quantize"), "--pure"]
        argv += ["--imatrix", folder / f"{imatrix}.gguf"] if imatrix else []
        argv += ["--tensor-type", f".*={type_.lower()}"]
        done = subprocess.run(  # noqa: S603 - a tool of ours
            [*argv, folder / "source.gguf", made, "Q8_0"], capture_output=True, text=True,
            env=llamacpp.environment(tools), check=False,
        )  # fmt: skip
        if done.returncode:
            continue  # this type cannot be made without
        header = gguf_header.read(made)
        before = {tensor.name: tensor for tensor in source.tensors}
        for tensor in header.tensors:
            rows = np.arange(ROWS)
            wanted = quant_values.read_rows(source, before[tensor.name], rows, tools)
            found = quant_values.read_rows(header, tensor, rows, tools)
            if wanted is None or found is None or tensor.type != type_:
                continue
            errors = quant_values.row_errors(wanted, found)
            worst_row = max(worst_row, float(errors.max()))
            worst_tensor = max(worst_tensor, quant_values.whole_error(wanted, found))
    return worst_row, worst_tensor


def main() -> None:
    """Measure all types, or those that are named."""
    tools = toolchain.ensure(toolchain.spec_of(declaration.load(Path("params.yaml"))))
    random = np.random.default_rng(1)
    weights = matrices(random)
    types = sys.argv[1:] or sorted(quant_values.WORST)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_source(folder / "source.gguf", weights)
        write_imatrix(folder / "flat.gguf", list(weights), 0.5, random)
        write_imatrix(folder / "steep.gguf", list(weights), 2.0, random)
        for type_ in types:
            row, tensor = measure(type_, folder, tools)
            print(f'"{type_}": ({row:.3f}, {tensor:.3f}),', flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
