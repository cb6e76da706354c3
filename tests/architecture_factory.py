"""
Tiny real models of many architectures, each with a real tokenizer.

A model is built by transformers from its own configuration class, with random weights from a seed,
and saved as a repository of the Hub has it: safetensors in bfloat16, config.json, the tokenizer's
files, a chat template where the family has one. The tokenizers are those that people use: their
tokens, types, scores and merges are in the vocabulary fixtures of the pinned llama.cpp source
(`models/ggml-vocab-*.gguf`), what a fixture does not hold, the way in which text is split before
the merges, is stated here. That it is right is judged by the converter, which knows a
pre-tokenizer by the hash of what it does to a sample, and by the fixtures' own token ids.

The weights are such that a fault shows. Embeddings are small, as trained ones are, so that the norm
before the first layer feels its epsilon; norms and biases are all different, so that a lost or
swapped one is missed; the logits have a standard deviation of about 3, so that a distribution has
a top.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sample
from verify_factory import subject

from pipelines import declaration, gguf_header
from pipelines.layout import Layout
from pipelines.params import Verify, VerifySlice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pipelines.gguf_header import Array
    from pipelines.toolchain import Toolchain
    from pipelines.verify_subject import Subject

ROOT: Final = Path(__file__).resolve().parent.parent

HIDDEN: Final = 64
HEADS: Final = 4
FEED_FORWARD: Final = 128
LAYERS: Final = 2
CONTEXT: Final = 512

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_ADDED_TEXT: Final = frozenset({"deepseek-llm", "deepseek-coder", "mpt"})
_GAP: Final = re.compile(r"\[PAD\d+\]")

# How text is split before merges, as the tokenizer.json of each family has it. llama.cpp's
# src/llama-vocab.cpp quotes them as "original regex".
_LLAMA_3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2: Final = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_DEEPSEEK_LETTERS: Final = (
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295"
    "-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-"
    "\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-"
    "\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-"
    "\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-"
    "\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e"
    "\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-"
    "\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-"
    "\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-"
    "\U0001e943]+"
)
_DEEPSEEK_PUNCTUATION: Final = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_HAN: Final = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclass(frozen=True, kw_only=True)
class Family:
    """
    One architecture with the tokenizer that its models come with.

    Attributes:
        vocabulary: Fixture that holds its tokens.
        config: Class of transformers' configuration.
        values: What that is called with, beside the sizes; a callable gets the size of the
            vocabulary.
        tokenizer_class: As tokenizer_config.json of the family has it.
        pre_tokenizer: How text is split; None: the tokenizer is SentencePiece's or WordPiece.
        special: Roles of special tokens: bos_token, eos_token, ...
        adds_bos: Whether every text begins with bos_token.
        template: The chat template; None where the family has none.
        encoder: It has embeddings, no logits.
        generation: Values of generation_config.json beside those that transformers writes.
        hub: Values of config.json where repositories of the Hub differ from what transformers
            writes today; None: they have none.
    """

    vocabulary: str
    config: str
    values: Callable[[], dict[str, Any]]
    tokenizer_class: str
    special: dict[str, str]
    pre_tokenizer: str | None = None
    adds_bos: bool = False
    template: str | None = None
    encoder: bool = False
    generation: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)


def _rms(**values: Any) -> dict[str, Any]:
    """Sizes in the words of the Llama family, which most share."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": CONTEXT,
        **values,
    }


_CHATML: Final = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content"
    " + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_LLAMA_CHAT: Final = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
_MISTRAL_CHAT: Final = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}"
    "{%- else %}{{- '[INST] ' + message['content'] + ' [/INST]' }}{%- endif %}{%- endfor %}"
)
_PHI_CHAT: Final = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content']"
    " + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_GEMMA_CHAT: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|turn>' + role + '\\n' + message['content'] | trim + '<turn|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
)
_COMMAND_CHAT: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'CHATBOT' if message['role'] == 'assistant' else message['role'] | upper %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' + message['content'] | trim"
    " + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
_DEEPSEEK_CHAT: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

_GPT_NEOX_TOKENS: Final = {
    "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
}  # fmt: skip
_DEEPSEEK_TOKENS: Final = {
    "bos_token": "<｜begin▁of▁sentence｜>",  # noqa: RUF001 - it is spelled so
    "eos_token": "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "pad_token": "<｜end▁of▁sentence｜>",  # noqa: RUF001
}
_SPM_TOKENS: Final = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family(
        vocabulary="llama-bpe",
        config="LlamaConfig",
        values=lambda: _rms(
            bos_token_id=128000, eos_token_id=[128001, 128009], rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128},
        ),
        tokenizer_class="PreTrainedTokenizerFast",
        pre_tokenizer="llama-bpe",
        special={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        adds_bos=True,
        template=_LLAMA_CHAT,
        generation={"temperature": 0.6, "top_p": 0.9},
    ),
    "qwen3": Family(
        vocabulary="qwen2",
        config="Qwen3Config",
        values=lambda: _rms(
            bos_token_id=151643, eos_token_id=151645, head_dim=32, rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        tokenizer_class="Qwen2Tokenizer",
        pre_tokenizer="qwen2",
        special={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        template=_CHATML,
        generation={"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    ),
    # With biases in its attention, which Qwen3 no longer has.
    "qwen2": Family(
        vocabulary="qwen2",
        config="Qwen2Config",
        values=lambda: _rms(
            bos_token_id=151643, eos_token_id=151645, rms_norm_eps=1e-6, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        tokenizer_class="Qwen2Tokenizer",
        pre_tokenizer="qwen2",
        special={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        template=_CHATML,
        generation={"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
    ),
    # Three layers, of which the first two look 128 tokens back and the last at all of them.
    "gemma4": Family(
        vocabulary="gemma-4",
        config="Gemma4TextConfig",
        values=lambda: _rms(
            architectures=["Gemma4ForCausalLM"], bos_token_id=2, eos_token_id=[1, 106],
            pad_token_id=0, num_hidden_layers=3, head_dim=16, global_head_dim=32,
            hidden_size_per_layer_input=0, vocab_size_per_layer_input=262144, sliding_window=128,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            final_logit_softcapping=30.0, tie_word_embeddings=True, rms_norm_eps=1e-6,
        ),
        tokenizer_class="GemmaTokenizer",
        pre_tokenizer="gemma-4",
        special={"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
            "pad_token": "<pad>", "mask_token": "<mask>"},
        adds_bos=True,
        template=_GEMMA_CHAT,
        generation={"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    ),
    "phi3": Family(
        vocabulary="phi-3",
        config="Phi3Config",
        values=lambda: _rms(
            num_key_value_heads=HEADS, bos_token_id=1, eos_token_id=32000, pad_token_id=32000,
            rms_norm_eps=1e-5, original_max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0},
        ),
        tokenizer_class="LlamaTokenizer",
        special={"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>",
            "pad_token": "<|endoftext|>"},
        template=_PHI_CHAT,
        generation={"eos_token_id": [32000, 32001, 32007]},
    ),
    "mistral": Family(
        vocabulary="llama-spm",
        config="MistralConfig",
        values=lambda: _rms(
            bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5, sliding_window=None, head_dim=16,
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        ),
        tokenizer_class="LlamaTokenizer",
        special=_SPM_TOKENS,
        adds_bos=True,
        template=_MISTRAL_CHAT,
    ),
    "mixtral": Family(
        vocabulary="llama-spm",
        config="MixtralConfig",
        values=lambda: _rms(
            bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5, num_local_experts=4,
            num_experts_per_tok=2, sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        tokenizer_class="LlamaTokenizer",
        special=_SPM_TOKENS,
        adds_bos=True,
        template=_MISTRAL_CHAT,
    ),
    "gpt2": Family(
        vocabulary="gpt-2",
        config="GPT2Config",
        values=lambda: {
            "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT,
            "n_ctx": CONTEXT, "bos_token_id": 50256, "eos_token_id": 50256,
        },
        tokenizer_class="GPT2Tokenizer",
        pre_tokenizer="gpt-2",
        special=_GPT_NEOX_TOKENS,
    ),
    "bert": Family(
        vocabulary="bert-bge",
        config="BertConfig",
        values=lambda: {
            "hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "max_position_embeddings": CONTEXT, "pad_token_id": 0,
        },
        tokenizer_class="BertTokenizer",
        special={"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]",
            "cls_token": "[CLS]", "mask_token": "[MASK]"},
        encoder=True,
    ),
    "command-r": Family(
        vocabulary="command-r",
        config="CohereConfig",
        values=lambda: _rms(
            bos_token_id=5, eos_token_id=255001, pad_token_id=0, logit_scale=0.0625,
            layer_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 8000000.0},
        ),
        tokenizer_class="CohereTokenizer",
        pre_tokenizer="command-r",
        special={"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>",
            "unk_token": "<UNK>", "pad_token": "<PAD>"},
        adds_bos=True,
        template=_COMMAND_CHAT,
    ),
    # deepseek-llm-7b and the coder of the same age are Llamas with a tokenizer of their own.
    "deepseek-llm": Family(
        vocabulary="deepseek-llm",
        config="LlamaConfig",
        values=lambda: _rms(
            bos_token_id=100000, eos_token_id=100001, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        tokenizer_class="PreTrainedTokenizerFast",
        pre_tokenizer="deepseek-llm",
        special=_DEEPSEEK_TOKENS,
        adds_bos=True,
        template=_DEEPSEEK_CHAT,
    ),
    "deepseek-coder": Family(
        vocabulary="deepseek-coder",
        config="LlamaConfig",
        values=lambda: _rms(
            bos_token_id=32013, eos_token_id=32014, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0},
        ),
        tokenizer_class="PreTrainedTokenizerFast",
        pre_tokenizer="deepseek-coder",
        special=_DEEPSEEK_TOKENS,
        adds_bos=True,
    ),
    # Latent attention and experts, a shared one among them, with the tokenizer of its forerunner.
    "deepseek-v2": Family(
        vocabulary="deepseek-llm",
        config="DeepseekV2Config",
        values=lambda: _rms(
            bos_token_id=100000, eos_token_id=100001, rms_norm_eps=1e-6, num_key_value_heads=HEADS,
            kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
            v_head_dim=16, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
            moe_intermediate_size=64, first_k_dense_replace=1, n_group=1, topk_group=1,
            routed_scaling_factor=1.0, norm_topk_prob=False, topk_method="greedy",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        tokenizer_class="PreTrainedTokenizerFast",
        pre_tokenizer="deepseek-llm",
        special=_DEEPSEEK_TOKENS,
        adds_bos=True,
        template=_DEEPSEEK_CHAT,
    ),
    # As Falcon-40B: the 7B's configuration, as transformers 5 reads it, breaks the converter.
    "falcon": Family(
        vocabulary="falcon",
        config="FalconConfig",
        values=lambda: {
            "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "num_kv_heads": HEADS // 2, "new_decoder_architecture": True, "alibi": False,
            "bias": False, "bos_token_id": 11, "eos_token_id": 11,
            "max_position_embeddings": 2048,
        },
        tokenizer_class="PreTrainedTokenizerFast",
        pre_tokenizer="falcon",
        special={"eos_token": "<|endoftext|>"},
    ),
    "starcoder2": Family(
        vocabulary="starcoder",
        config="Starcoder2Config",
        values=lambda: _rms(
            bos_token_id=0, eos_token_id=0, use_bias=True, norm_epsilon=1e-5, sliding_window=None,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 999999.4420358813},
        ),
        tokenizer_class="GPT2Tokenizer",
        pre_tokenizer="starcoder",
        special=_GPT_NEOX_TOKENS,
    ),
    "mpt": Family(
        vocabulary="mpt",
        config="MptConfig",
        values=lambda: {
            "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": CONTEXT,
            "expansion_ratio": 4, "bos_token_id": 0, "eos_token_id": 0,
        },
        tokenizer_class="GPTNeoXTokenizer",
        pre_tokenizer="mpt",
        hub={"architectures": ["MPTForCausalLM"]},
        special=_GPT_NEOX_TOKENS,
    ),
}  # fmt: skip

NAMES: Final[tuple[str, ...]] = tuple(FAMILIES)


@dataclass(frozen=True)
class Vocabulary:
    """What a fixture holds: `tokens[i]` is token i, of type `types[i]` in llama.cpp's numbers."""

    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]


def fixtures(directory: Path, tools: Toolchain) -> Path:
    """
    Unpack the vocabulary fixtures, with their texts and token ids, from the pinned source.

    Args:
        directory: Gets `ggml-vocab-*.gguf`, `.gguf.inp` and `.gguf.out`, 90 MB in all.
        tools: The toolchain that was built from that source; it keeps it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    version = tools.manifest["llama_cpp_python"]
    kept = tools.prefix.parent / "downloads" / f"llama_cpp_python-{version}.tar.gz"
    with tarfile.open(kept) as source:
        for member in source:
            name = Path(member.name).name
            if "/vendor/llama.cpp/models/ggml-vocab-" in member.name and member.isfile():
                content = source.extractfile(member)
                assert content is not None
                with (directory / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
    return directory


def vocabulary(fixtures_: Path, name: str) -> Vocabulary:
    """Read a fixture by its name, such as `qwen2`."""
    metadata = gguf_header.read(fixtures_ / f"ggml-vocab-{name}.gguf").metadata

    def values(key: str) -> list[Any]:
        found: Array | Any = metadata.get(f"tokenizer.ggml.{key}")
        return list(found.values()) if isinstance(found, gguf_header.Array) else []

    tokens = values("tokens")
    if name == "gemma-4":
        # The fixture calls two tokens like two others; these are their names upstream.
        tokens[258880], tokens[258881] = "<|image|>", "<|audio|>"
    return Vocabulary(tokens, values("token_type"), values("scores"), values("merges"))


def build(name: str, directory: Path, fixtures_: Path, *, seed: int = 1, **values: Any) -> Path:
    """
    Write a model of a family to `directory` and return it.

    Args:
        name: One of `NAMES`.
        directory: Gets the files of a repository of the Hub.
        fixtures_: What `fixtures` unpacked.
        seed: Of the weights.
        values: Further values of its configuration.
    """
    family = FAMILIES[name]
    known = vocabulary(fixtures_, family.vocabulary)
    directory.mkdir(parents=True, exist_ok=True)
    _write_model(family, directory, len(known.tokens), seed, values)
    _write_tokenizer(family, directory, known)
    (directory / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n# A tiny {name}\n")
    return directory


def _write_model(
    family: Family, directory: Path, tokens_count: int, seed: int, values: dict[str, Any]
) -> None:
    """Make random weights and save them with both configurations."""
    import torch  # noqa: PLC0415 - seconds, for the tests that build a model
    import transformers  # noqa: PLC0415

    transformers.logging.disable_progress_bar()
    config = getattr(transformers, family.config)(
        vocab_size=tokens_count, dtype="bfloat16", **{**family.values(), **values}
    )
    auto = transformers.AutoModel if family.encoder else transformers.AutoModelForCausalLM
    # Dropout would let the scale of the logits depend on chance.
    model = auto.from_config(config).eval()
    random = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if weight.ndim == 2 and ("embed" in key or weight is embeddings or ".wpe." in key):
                weight.copy_(0.02 * noise)
            elif weight.ndim == 1 and key.endswith("bias"):
                weight.copy_(0.1 * noise)
            elif weight.ndim == 1:
                weight.copy_(weight + 0.2 * noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)
        if output is not None:
            _spread_logits(model, config, random)
    model.to(torch.bfloat16).save_pretrained(directory)
    path = directory / "config.json"
    values = json.loads(path.read_text()) | family.hub
    path.write_text(json.dumps({key: v for key, v in values.items() if v is not None}, indent=2))
    if family.generation:
        path = directory / "generation_config.json"
        written = json.loads(path.read_text())
        path.write_text(json.dumps(written | {"do_sample": True} | family.generation, indent=2))


def _spread_logits(model: Any, config: Any, random: Any) -> None:
    """Scale the last norm so that the logits have a standard deviation of 3, measured on noise."""
    import torch  # noqa: PLC0415

    ids = torch.randint(0, config.vocab_size, (1, 32), generator=random)
    cap = getattr(config, "final_logit_softcapping", None)
    last = [
        weight
        for key, weight in model.named_parameters()
        if weight.ndim == 1 and "layers." not in key and ".h." not in key and "block" not in key
    ]
    for _ in range(3 if cap else 1):
        factor = 3.0 / float(model(ids).logits.float().std())
        for weight in last:
            weight.mul_(factor)


def _write_tokenizer(family: Family, directory: Path, known: Vocabulary) -> None:
    """Write the tokenizer's files as a repository of the family has them."""
    import tokenizers  # noqa: PLC0415 - a library of the extra `convert`

    added = {
        id_: {
            "content": token, "lstrip": False,
            # Plain text that these families added to their vocabulary: bytes, runs of spaces.
            "normalized": kind == _USER_DEFINED and family.vocabulary in _ADDED_TEXT,
            "rstrip": token.startswith("<|") and family.vocabulary == "phi-3",
            "single_word": False, "special": kind != _USER_DEFINED,
        }
        for id_, (token, kind) in enumerate(zip(known.tokens, known.types, strict=True))
        if _is_added(family, token, kind, id_)
    }  # fmt: skip
    config: dict[str, Any] = {
        "tokenizer_class": family.tokenizer_class,
        "added_tokens_decoder": {str(id_): fields for id_, fields in added.items()},
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        **family.special,
    }
    if family.vocabulary in {"phi-3", "llama-spm"}:
        config |= {"add_bos_token": family.adds_bos, "add_eos_token": False, "legacy": False}
        _write_sentencepiece(directory / "tokenizer.model", known)
        fast = _sentencepiece(family, known)
        fast.add_tokens([tokenizers.AddedToken(**fields) for fields in _in_order(added)])
        fast.save(str(directory / "tokenizer.json"), pretty=False)
        beyond = {fields["content"]: id_ for id_, fields in added.items() if id_ >= 32000}
        if beyond:
            (directory / "added_tokens.json").write_text(json.dumps(beyond, ensure_ascii=False))
    else:
        tokenizer = _word_piece(known) if family.encoder else _byte_pairs(family, known)
        tokenizer.add_tokens([tokenizers.AddedToken(**fields) for fields in _in_order(added)])
        tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    if family.vocabulary == "gemma-4":
        # Upstream names each of them; what is named nowhere is no special token to transformers.
        config["extra_special_tokens"] = [
            fields["content"] for fields in _in_order(added) if fields["special"]
        ]
    if family.encoder:
        config |= {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}
        plain = [
            _unmarked(token, kind) for token, kind in zip(known.tokens, known.types, strict=True)
        ]
        (directory / "vocab.txt").write_text("\n".join(plain) + "\n")
        _write_pooling(directory)
    if family.template is not None:
        config["chat_template"] = family.template
    (directory / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False))
    (directory / "special_tokens_map.json").write_text(json.dumps(family.special))


def _is_added(family: Family, token: str, kind: int, id_: int) -> bool:
    """Whether upstream has a token beside its vocabulary, so that text never runs into it."""
    if _GAP.fullmatch(token) or kind not in {_UNKNOWN, _CONTROL, _USER_DEFINED}:
        return False
    return not (family.vocabulary == "phi-3" and kind == _UNKNOWN and id_ >= 32000)


def _in_order(added: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [added[id_] for id_ in sorted(added)]


def _byte_pairs(family: Family, known: Vocabulary) -> Any:
    """Rebuild a BPE tokenizer."""
    from tokenizers import (  # noqa: PLC0415
        Tokenizer,
        decoders,
        models,
        normalizers,
        processors,
    )

    kind = family.pre_tokenizer
    of_bytes = kind != "gemma-4"
    # Tokens of the vocabulary itself; what comes beside it is added, at its own id.
    inside = {
        token: id_
        for id_, (token, type_) in enumerate(zip(known.tokens, known.types, strict=True))
        if not _GAP.fullmatch(token) and (type_ in {_NORMAL, _BYTE} or not of_bytes)
    }
    # Where special tokens come first, they are a part of the vocabulary as well.
    inside |= {
        token: id_
        for id_, (token, type_) in enumerate(zip(known.tokens, known.types, strict=True))
        if type_ == _CONTROL and id_ < len(inside)
    }
    merges = [(merge.partition(" ")[0], merge.partition(" ")[2]) for merge in known.merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=inside,
            merges=merges,
            ignore_merges=kind == "llama-bpe",
            byte_fallback=not of_bytes,
            fuse_unk=not of_bytes,
            unk_token=None if of_bytes else "<unk>",
        )
    )
    if kind in {"qwen2", "command-r", "mpt"}:
        tokenizer.normalizer = normalizers.NFC()
    elif not of_bytes:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = _pre_tokenizer(kind)
    tokenizer.decoder = (
        decoders.ByteLevel()
        if of_bytes
        else decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    )
    if family.adds_bos:
        bos = family.special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, known.tokens.index(bos))],
        )
    return tokenizer


def _pre_tokenizer(kind: str | None) -> Any:
    """How the text is split before the merges, as tokenizer.json of the family has it."""
    from tokenizers import Regex, pre_tokenizers  # noqa: PLC0415

    def split(pattern: str) -> Any:
        return pre_tokenizers.Split(Regex(pattern), "isolated")

    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt_2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    parts: dict[str, Callable[[], list[Any]]] = {
        "llama-bpe": lambda: [split(_LLAMA_3), bytes_only],
        "qwen2": lambda: [split(_QWEN_2), bytes_only],
        "gpt-2": lambda: [gpt_2],
        "mpt": lambda: [gpt_2],
        "starcoder": lambda: [pre_tokenizers.Digits(individual_digits=True), gpt_2],
        "command-r": lambda: [pre_tokenizers.Digits(individual_digits=True), gpt_2],
        "falcon": lambda: [
            pre_tokenizers.Punctuation("contiguous"),
            gpt_2,
            pre_tokenizers.Digits(individual_digits=False),
            split(r"[0-9][0-9][0-9]"),
        ],
        "deepseek-llm": lambda: [
            split("[\r\n]"),
            split(_DEEPSEEK_LETTERS),
            split(_DEEPSEEK_PUNCTUATION),
            split("\\s+$"),
            split(_DEEPSEEK_HAN),
            pre_tokenizers.Digits(individual_digits=True),
            bytes_only,
        ],
        "deepseek-coder": lambda: [
            split("[\r\n]"),
            split("\\s?\\p{L}+"),
            split("\\s?\\p{P}+"),
            split(_DEEPSEEK_HAN),
            pre_tokenizers.Digits(individual_digits=True),
            bytes_only,
        ],
        "gemma-4": lambda: [pre_tokenizers.Split(" ", "merged_with_previous")],
    }
    found = parts[kind or ""]()
    return found[0] if len(found) == 1 else pre_tokenizers.Sequence(found)


def _unmarked(token: str, kind: int) -> str:
    """WordPiece's own spelling of a token that llama.cpp marks where a word begins."""
    if kind == _CONTROL or re.fullmatch(r"\[\S+\]", token):
        return token
    return token[1:] if token.startswith("▁") else f"##{token}"


def _word_piece(known: Vocabulary) -> Any:
    """Rebuild BERT's tokenizer: lower case, no accents, longest piece first."""
    from tokenizers import (  # noqa: PLC0415
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    pieces = {
        _unmarked(token, kind): id_
        for id_, (token, kind) in enumerate(zip(known.tokens, known.types, strict=True))
    }
    tokenizer = Tokenizer(
        models.WordPiece(vocab=pieces, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", pieces["[CLS]"]), ("[SEP]", pieces["[SEP]"])],
    )
    return tokenizer


def _write_sentencepiece(path: Path, known: Vocabulary) -> None:
    """Write tokenizer.model of the Llama family: 32,000 pieces with their scores."""
    from sentencepiece import sentencepiece_model_pb2 as format_  # noqa: PLC0415

    model = format_.ModelProto()
    for id_, (token, kind) in enumerate(zip(known.tokens[:32000], known.types, strict=False)):
        piece = model.pieces.add()
        # Phi's fixture holds what its added tokens make of the first three.
        first = id_ < 3
        piece.piece = token
        piece.score = 0.0 if first else known.scores[id_]
        piece.type = (_UNKNOWN, _CONTROL, _CONTROL)[id_] if first else kind
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = format_.TrainerSpec.BPE
    trainer.vocab_size = 32000
    trainer.byte_fallback = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    path.write_bytes(model.SerializeToString())


def _sentencepiece(family: Family, known: Vocabulary) -> Any:
    """
    Rebuild the fast tokenizer that repositories have beside tokenizer.model.

    The best score is merged first; a blank is put in front of each piece, as llama.cpp does.
    """
    from tokenizers import (  # noqa: PLC0415
        Tokenizer,
        decoders,
        models,
        normalizers,
        processors,
    )

    inside = {token: id_ for id_, token in enumerate(known.tokens[:32000])}
    inside |= dict(zip(("<unk>", "<s>", "</s>"), range(3), strict=True))
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, id_ in inside.items():
        if known.types[id_] not in {_NORMAL, _USER_DEFINED}:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in inside and right in inside:
                ranked.append((-known.scores[id_], inside[left], inside[right], left, right))
    ranked.sort(key=lambda each: each[:3])
    tokenizer = Tokenizer(
        models.BPE(
            vocab=inside,
            merges=[(left, right) for *_, left, right in ranked],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    if family.adds_bos:
        bos = family.special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, inside[bos])],
        )
    return tokenizer


def _write_pooling(directory: Path) -> None:
    """State, as sentence-transformers does, that the first token's state is the embedding."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling",
         "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize",
         "type": "sentence_transformers.models.Normalize"},
    ]  # fmt: skip
    (directory / "modules.json").write_text(json.dumps(modules))
    pooling = {
        "word_embedding_dimension": HIDDEN,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling/config.json").write_text(json.dumps(pooling))


def before(root: Path, source: Path, f16: Path, tools: Toolchain, **verify: Any) -> Subject:
    """Put a conversion before the layer, with the sample's evaluation corpus."""
    corpus = declaration.load(sample.of("params.yaml")).corpora["evaluation"]
    return dataclasses.replace(
        subject(root, source, f16, tools),
        at=Layout(sample.SAMPLE),
        log=root / "log",
        slice_=VerifySlice(
            model="tiny",
            recipe=1,
            corpus=corpus,
            verify=Verify(**({"logits_tokens": 256} | verify)),
        ),
    )
