"""The sizes that `fleet init` shows are those of the files that llama-quantize will write."""

from __future__ import annotations

import math
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from gguf_factory import quant

from pipelines import gguf_header, init_sizes, llama_fit_params, tensor_mix
from pipelines.init_sizes import MIB, Shape
from pipelines.llamacpp import Execution
from pipelines.safetensors_header import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.toolchain import Toolchain

TYPES = ("Q8_0", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q2_K")
# Upstream's names, and llama.cpp's.
BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Llama:
    """The numbers of a model as its config.json has them."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{upstream's name: (llama.cpp's name, shape)}, rows last."""
        kv = self.hidden // self.heads * self.kv_heads
        widths = {
            "self_attn.k_proj": (kv, self.hidden), "self_attn.v_proj": (kv, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden), "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
            "input_layernorm": (self.hidden,), "post_attention_layernorm": (self.hidden,),
        }  # fmt: skip
        found = {
            "model.embed_tokens.weight": ("token_embd.weight", (self.vocabulary, self.hidden)),
            "model.norm.weight": ("output_norm.weight", (self.hidden,)),
        }
        if not self.tied:
            found["lm_head.weight"] = ("output.weight", (self.vocabulary, self.hidden))
        for layer in range(self.layers):
            for theirs, ours in BLOCK.items():
                shape = widths.get(theirs, (self.hidden, self.hidden))
                found[f"model.layers.{layer}.{theirs}.weight"] = (
                    f"blk.{layer}.{ours}.weight",
                    shape,
                )
        return found

    def shape(self) -> Shape:
        """As `fleet init` finds it in the headers of the weights."""
        tensors = [
            Tensor(name=name, dtype="BF16", shape=shape, size_bytes=2 * math.prod(shape))
            for name, (_, shape) in self.shapes().items()
        ]
        config: dict[str, Any] = {
            "architectures": ["Qwen2ForCausalLM"], "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
        }  # fmt: skip
        return Shape(config=config, tensors=tensors, is_encoder=False)

    def write(self, path: Path) -> gguf_header.Header:
        """Write the 16-bit GGUF with a hole for its weights."""
        writer = gguf.GGUFWriter(path, "qwen2")
        writer.add_block_count(self.layers)
        writer.add_context_length(4096)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.inner)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(self.vocabulary)
        end = 0
        for name, shape in self.shapes().values():
            kind, width = ("float32", 4) if len(shape) == 1 else ("float16", 2)
            size_bytes = math.prod(shape) * width
            writer.add_tensor_info(name, shape, np.dtype(kind), size_bytes)
            end += -(-size_bytes // 32) * 32
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        start = -(-path.stat().st_size // 32) * 32
        with path.open("r+b") as file:
            file.truncate(start + end)
        return gguf_header.read(path)


MODELS = {
    # Qwen2.5-7B, and Qwen2.5-0.5B with rows of 896, which fall back, and tied embeddings.
    "7b": Llama(3584, 18944, 28, 28, 4, 152064),
    "0.5b": Llama(896, 4864, 24, 14, 2, 151936, tied=True),
}


@pytest.mark.toolchain
@pytest.mark.parametrize("name", MODELS)
def test_llama_quantize_plans_the_size_and_no_more_fallbacks_than_are_declared(
    name: str, tools: Toolchain, tmp_path: Path
) -> None:
    """Real shapes of models of billions of weights, whose file is a hole."""
    model = MODELS[name]
    header = model.write(tmp_path / "f16.gguf")
    for type_ in TYPES:
        found = init_sizes.estimate(model.shape(), type_, context_tokens=4096, slots=1)
        done = subprocess.run(
            [tools.tool("llama-quantize"), "--dry-run", header.path, type_],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        planned = tensor_mix.predict(header, quant(type_, max_fallbacks=10_000), done.stderr)

        tokenizer_bytes = model.vocabulary * 40
        off = (found.size_bytes - tokenizer_bytes) / planned.data_bytes - 1
        assert abs(off) < 0.01, (type_, off)
        assert len(planned.fallbacks) == found.fallbacks_count, type_


@pytest.mark.toolchain
def test_memory_is_no_less_than_llama_cpp_plans_for_and_hardly_more(
    tools: Toolchain, tmp_path: Path
) -> None:
    """Weights, the cache of two slots of 16,384 tokens, working space; of the 16-bit file."""
    model, context, slots = MODELS["7b"], 16_384, 2
    header = model.write(tmp_path / "f16.gguf")
    run_as = Execution(
        threads=1, gpu_layers=0, flash_attention=True, kv_type="f16", batch_tokens=2048,
        ubatch_tokens=512,
    )  # fmt: skip
    argv = llama_fit_params.estimate_argv(
        tools, str(header.path), context_tokens=context * slots, execution=run_as
    )
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    planned = llama_fit_params.parse_estimate(
        done.stdout, done.stderr, on_gpu=False, log=tmp_path / "log"
    )
    found = init_sizes.estimate(model.shape(), "F16", context_tokens=context, slots=slots)

    assert init_sizes.cache_bytes(model.shape(), context) * slots == planned.context_mib * MIB
    assert 1 <= found.memory_bytes / MIB / planned.total_mib < 1.01


def test_a_cache_is_that_of_the_attention_that_a_model_has() -> None:
    """Windows keep a window, compressed keys one vector, encoders nothing."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    kinds = ["sliding_attention"] * 3 + ["full_attention"]

    def cache(*, is_encoder: bool = False, **config: Any) -> int:
        shape = Shape(config={**sizes, **config}, tensors=(), is_encoder=is_encoder)
        return init_sizes.cache_bytes(shape, 8192)

    token_bytes = 2 * 2 * 16 * 2
    assert cache(num_hidden_layers=4) == 4 * 8192 * token_bytes
    mixed = cache(num_hidden_layers=4, sliding_window=1024, layer_types=kinds)
    assert mixed == (8192 + 3 * (1024 + 512)) * token_bytes
    # DeepSeek-V2-Lite: 512 and 64 for each token and layer.
    assert cache(num_hidden_layers=27, kv_lora_rank=512, qk_rope_head_dim=64) == 27 * 576 * 8192 * 2
    assert cache(num_hidden_layers=4, is_encoder=True) == 0


def test_experts_count_as_the_stack_that_the_converter_makes_of_them() -> None:
    """Rows of 192 fall back, whether the experts are single matrices or one tensor upstream."""
    experts = {f"model.layers.0.mlp.experts.{i}.down_proj.weight": (64, 192) for i in range(8)}
    fused = {"model.layers.0.mlp.experts.down_proj": (8, 192, 64)}
    sizes = set()
    for shapes in (experts, fused):
        tensors = [
            Tensor(name=name, dtype="BF16", shape=shape, size_bytes=2 * math.prod(shape))
            for name, shape in shapes.items()
        ]
        shape = Shape(config={"vocab_size": 0}, tensors=tensors, is_encoder=False)
        found = init_sizes.estimate(shape, "Q8_0", context_tokens=256, slots=1)
        sizes.add(found.size_bytes)
        assert init_sizes.fallbacks_count(shape, "Q4_K_M") == 1
        assert found.fallbacks_count == 0
    assert sizes == {8 * 64 * 192 * 34 // 32}
