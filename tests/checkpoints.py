"""Small models of transformers' layout, written without torch, for several test files."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import fetch

if TYPE_CHECKING:
    from pipelines.toolchain import Toolchain

TOKENIZER = Path(__file__).resolve().parent.parent / "examples/tiny-llama"
_ITEM_BYTES = {"I64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1, "F8_E4M3": 1}

HIDDEN, HEADS, INTERMEDIATE, VOCABULARY = 64, 4, 96, 1024

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 256,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 1,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}

SHAPES = {
    "lm_head.weight": (VOCABULARY, HIDDEN),
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "model.layers.0.input_layernorm.weight": (HIDDEN,),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    "model.layers.0.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
    "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "model.layers.0.self_attn.k_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (HIDDEN, HIDDEN),
    "model.norm.weight": (HIDDEN,),
}
PARAMETERS_COUNT = sum(math.prod(shape) for shape in SHAPES.values())


def safetensors(tensors: dict[str, tuple[str, tuple[int, ...]]], *, seed: int = 1) -> bytes:
    """Return a file with {name: (dtype, shape)}; the numbers are small, varied and repeatable."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for position, (name, (dtype, shape)) in enumerate(tensors.items()):
        size_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + size_bytes],
        }
        # 0x3Cxx as little-endian halves: bf16 of about 0.01 to 0.02, never NaN.
        pattern = bytes(
            byte for i in range(251) for byte in ((i * 7 + position + seed) % 256, 0x3C)
        )
        data += (pattern * (size_bytes // len(pattern) + 1))[:size_bytes]
    return pack(header, bytes(data))


def pack(header: object, data: bytes = b"") -> bytes:
    """Put a header, right or wrong, before data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tiny(directory: Path, *, shards: int = 1, seed: int = 1, **config: Any) -> Path:
    """Write a whole one-layer Llama to `directory`; every weight is BF16."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory / name)
    tensors = {name: ("BF16", shape) for name, shape in SHAPES.items()}
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors(tensors, seed=seed))
        return directory
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        (directory / file).write_bytes(safetensors(part, seed=seed))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def declare(root: Path, source: Path, tools: Toolchain) -> None:
    """Write a params.yaml with one model, `tiny`, at `source` below `root`, and one quant."""
    spec = tools.manifest
    (root / "params.yaml").write_text(
        f"""\
toolchain: {{llama_cpp_python: {spec["llama_cpp_python"]}, sha256: "{spec["sdist_sha256"]}"}}
corpora: {{evaluation: {{path: corpora/evaluation.txt, sha256: "{"0" * 64}"}}}}
models:
  tiny:
    source: path:{source.relative_to(root)}
    revision: "{fetch.content_digest(source)}"
    context_tokens: 256
quants: {{tiny-Q8_0: {{model: tiny, type: Q8_0}}}}
hosts: {{here: {{memory_mib: 8192}}}}
"""
    )
