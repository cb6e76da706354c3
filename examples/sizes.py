# ruff: noqa: INP001 - a program beside the examples, no package
"""
Whether the models of the examples fit, by llama.cpp's own word: `python examples/sizes.py`.

From the shapes alone: a GGUF is written whose tensors are a hole in the file, and the pinned
llama-quantize says which type each tensor gets (`--dry-run`), from which the size of a quant
follows to the byte, but for its vocabulary (2 to 8 MiB). llama-fit-params then plans the memory of
serving it: weights, working space, and the key-value cache, which is 2 x layers x key-value heads x
head_dim x context x slots x 2 bytes. The plan is that of a CPU: on a card the working space is
another one, some hundred MiB more or less, for which `margin_mib` is there.

Shapes: config.json of each model; 1 MiB = 2^20 bytes. No weight is fetched or made.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipelines import (  # noqa: E402
    architectures,
    declaration,
    gguf_header,
    llama_fit_params,
    llamacpp,
    params,
    proc,
    quantize,
    tensor_mix,
    tensor_rules,
)
from pipelines.layout import Layout  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from pipelines.gguf_header import Header
    from pipelines.params import Declaration
    from pipelines.toolchain import Toolchain

MIB: Final = 1 << 20
_EXPERTS: Final = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|down)_exps\.")


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """
    What config.json of a model says.

    Attributes:
        architecture: As llama.cpp calls it.
        hidden: Length of a token's vector.
        layers: Blocks.
        heads: Of the queries.
        kv_heads: Of keys and values.
        feed_forward: Of one block, or of one expert.
        vocabulary: Tokens.
        head_dim: Length of a head.
        experts: Of each block; 0 for none.
        experts_used: For each token.
        q_norm: Queries and keys have norms.
        biases: Queries, keys and values have biases.
    """

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    head_dim: int = 128
    experts: int = 0
    experts_used: int = 0
    q_norm: bool = False
    biases: bool = False


# By `source`.
MODELS: Final[dict[str, Shapes]] = {
    "hf:Qwen/Qwen3-8B": Shapes(
        architecture="qwen3", hidden=4096, layers=36, heads=32, kv_heads=8, feed_forward=12288,
        vocabulary=151936, q_norm=True,
    ),
    "hf:Qwen/Qwen3-30B-A3B": Shapes(
        architecture="qwen3moe", hidden=2048, layers=48, heads=32, kv_heads=4, feed_forward=768,
        vocabulary=151936, experts=128, experts_used=8, q_norm=True,
    ),
    "hf:Qwen/Qwen2.5-Coder-14B-Instruct": Shapes(
        architecture="qwen2", hidden=5120, layers=48, heads=40, kv_heads=8, feed_forward=13824,
        vocabulary=152064, biases=True,
    ),
    "hf:meta-llama/Llama-3.1-8B-Instruct": Shapes(
        architecture="llama", hidden=4096, layers=32, heads=32, kv_heads=8, feed_forward=14336,
        vocabulary=128256,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fit:
    """
    One quant of an example on one of its hosts, in MiB.

    Attributes:
        model: Key of the model.
        quant: Type of the quant.
        host: Name of the host.
        file_mib: Weights of the file.
        cache_mib: Key-value cache of all slots.
        working_mib: Working space of a batch.
        beside_mib: Experts that `cpu_moe_layers` keeps in main memory.
        limit_mib: What the host has, less what has to stay free.
    """

    model: str
    quant: str
    host: str
    file_mib: float
    cache_mib: float
    working_mib: float
    beside_mib: float
    limit_mib: float

    @property
    def needed_mib(self) -> float:
        """What it takes of the card."""
        return self.file_mib + self.cache_mib + self.working_mib - self.beside_mib

    def row(self) -> str:
        """Return it as a row of the table in docs/examples.md."""
        figures = (
            self.file_mib, self.cache_mib, self.working_mib, self.beside_mib, self.needed_mib,
            self.limit_mib,
        )  # fmt: skip
        shown = " | ".join(f"{figure:,.0f}" for figure in figures)
        return f"| {self.model} | {self.quant} | {self.host} | {shown} |"


def cache_mib(shapes: Shapes, tokens: int) -> float:
    """Return the key-value cache of so many tokens: keys and values, 16 bits each."""
    return 2 * shapes.layers * shapes.kv_heads * shapes.head_dim * tokens * 2 / MIB


def hollow(shapes: Shapes, path: Path) -> Header:
    """Write the 16-bit GGUF of a model with a hole in the place of its weights."""
    import gguf  # noqa: PLC0415 - 0.1 s
    import numpy as np  # noqa: PLC0415

    writer = gguf.GGUFWriter(path, shapes.architecture)
    _write_metadata(writer, shapes)
    size_bytes = 0
    for name, shape in tensors(shapes):
        # Vectors and routers stay in 32 bits.
        is_wide = len(shape) == 1 or "gate_inp" in name
        type_ = np.dtype(np.float32 if is_wide else np.float16)
        tensor_bytes = math.prod(shape) * type_.itemsize
        writer.add_tensor_info(name, shape, type_, tensor_bytes)
        size_bytes += math.ceil(tensor_bytes / 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin = math.ceil(path.stat().st_size / 32) * 32
    with path.open("r+b") as file:
        file.truncate(begin + size_bytes)
    return gguf_header.read(path)


def _write_metadata(writer: Any, shapes: Shapes) -> None:  # noqa: ANN401 - gguf has no types
    import gguf  # noqa: PLC0415

    writer.add_type("model")
    writer.add_name("hollow")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(shapes.hidden)
    writer.add_feed_forward_length(shapes.feed_forward)
    writer.add_block_count(shapes.layers)
    writer.add_head_count(shapes.heads)
    writer.add_head_count_kv(shapes.kv_heads)
    writer.add_key_length(shapes.head_dim)
    writer.add_value_length(shapes.head_dim)
    writer.add_rope_dimension_count(shapes.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if shapes.experts:
        writer.add_expert_count(shapes.experts)
        writer.add_expert_used_count(shapes.experts_used)
        writer.add_expert_feed_forward_length(shapes.feed_forward)
    # Only their number counts.
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*special, *(f"t{number}" for number in range(shapes.vocabulary - len(special)))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256
    kinds += [gguf.TokenType.NORMAL] * (len(tokens) - len(special))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def tensors(shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes as llama.cpp has them: rows first, the length of a row last."""
    hidden, inner, head = shapes.hidden, shapes.feed_forward, shapes.head_dim
    queries, values = shapes.heads * head, shapes.kv_heads * head
    yield "token_embd.weight", (shapes.vocabulary, hidden)
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (shapes.vocabulary, hidden)
    for layer in range(shapes.layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (hidden,)
        yield f"{block}.ffn_norm.weight", (hidden,)
        for name, rows in (("attn_q", queries), ("attn_k", values), ("attn_v", values)):
            yield f"{block}.{name}.weight", (rows, hidden)
            if shapes.biases:
                yield f"{block}.{name}.bias", (rows,)
        yield f"{block}.attn_output.weight", (hidden, queries)
        if shapes.q_norm:
            yield f"{block}.attn_q_norm.weight", (head,)
            yield f"{block}.attn_k_norm.weight", (head,)
        suffix, experts = ("", ()) if not shapes.experts else ("_exps", (shapes.experts,))
        if shapes.experts:
            yield f"{block}.ffn_gate_inp.weight", (shapes.experts, hidden)
        yield f"{block}.ffn_gate{suffix}.weight", (*experts, inner, hidden)
        yield f"{block}.ffn_up{suffix}.weight", (*experts, inner, hidden)
        yield f"{block}.ffn_down{suffix}.weight", (*experts, hidden, inner)


def fits(example: Path, folder: Path, tools: Toolchain, types: Collection[str] = ()) -> list[Fit]:
    """
    Ask the pinned llama.cpp what the quants of an example take of each of its hosts.

    An importance matrix changes no type of the quants that the examples declare.

    Args:
        example: A params.yaml.
        folder: For files that are gone when this returns; they take what a vocabulary does.
        tools: The toolchain.
        types: The only quants that are looked at; all of them if empty.

    Raises:
        ParamsError: The example is wrong.
        ToolError: A tool failed, or said something unknown.
    """
    declared = declaration.load(example)
    found: list[Fit] = []
    for model, spec in declared.models.items():
        shapes = MODELS.get(spec.source)
        if shapes is None:
            continue
        source = hollow(shapes, folder / "hollow.gguf")
        for key, type_ in params.quants_of(declared, model).items():
            if types and type_ not in types:
                continue
            found += _of_quant(declared, key, shapes, source, tools)
        source.path.unlink()
    return found


def _of_quant(
    declared: Declaration, key: str, shapes: Shapes, source: Header, tools: Toolchain
) -> Iterator[Fit]:
    """Yield a quant on each host that serves it."""
    model = declared.quants[key].model
    served = params.served_as(declared, model)
    tokens = declared.models[model].context_tokens * served.parallel
    folder = source.path.parent
    planned = folder / "planned.gguf"
    wanted = params.quantize_slice(declared, key).model_copy(update={"imatrix": False})
    wanted = tensor_rules.resolve(wanted, source, Layout(folder))
    _, said = _said(quantize.quantize_argv(tools, wanted, source, output=None), tools, folder)
    gguf_header.write_plan(source, tensor_mix.predict(source, wanted, said).types, planned)
    header = gguf_header.read(planned)
    experts = architectures.cpu_moe_layers(header, served.cpu_moe_layers)
    run_as = llamacpp.Execution(
        threads=1, gpu_layers=0, flash_attention=True, kv_type="f16",
        batch_tokens=2048, ubatch_tokens=512, cpu_moe_layers=experts,
    )  # fmt: skip
    argv = llama_fit_params.estimate_argv(
        tools, str(planned), context_tokens=tokens, execution=run_as
    )
    plan = llama_fit_params.parse_estimate(
        *_said(argv, tools, folder), on_gpu=False, log=folder / "tools.log"
    )
    planned.unlink()
    beside = (
        tensor.size_bytes
        for tensor in header.tensors
        if (layer := _EXPERTS.match(tensor.name)) and int(layer[1]) < experts
    )
    beside_mib = sum(beside) / MIB
    for name, host in params.judged_hosts(declared, model).items():
        yield Fit(
            model=model,
            quant=declared.quants[key].type,
            host=name,
            file_mib=sum(tensor.size_bytes for tensor in header.tensors) / MIB,
            cache_mib=cache_mib(shapes, tokens),
            working_mib=plan.compute_mib,
            beside_mib=beside_mib,
            limit_mib=(host.vram_mib or host.memory_mib or 0) - host.margin_mib,
        )


def _said(argv: Sequence[str | Path], tools: Toolchain, folder: Path) -> tuple[str, str]:
    """Run a tool and return what it printed, on both streams."""
    environment = llamacpp.environment(tools)
    done = proc.run(argv, log=folder / "tools.log", env=environment, inherit_env=False)
    return done.stdout, done.stderr


def main() -> None:
    """Print the rows of the table in docs/examples.md, example by example."""
    from pipelines import console, toolchain  # noqa: PLC0415 - after the arguments were read

    tools = toolchain.load(Layout(ROOT))
    for example in sorted(Path(__file__).parent.glob("*.yaml")):
        with tempfile.TemporaryDirectory() as folder:
            for fit in fits(example, Path(folder), tools):
                console.out(f"{example.stem} {fit.row()}")


if __name__ == "__main__":
    main()
