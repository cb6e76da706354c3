"""Which architectures llama.cpp converts, told before that; and what a GGUF is good for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from encoder_factory import tiny_bert_gguf
from gguf_factory import tiny_llama_gguf

from pipelines import architectures, gguf_header
from pipelines.errors import ToolError, UpstreamError

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.toolchain import Toolchain

COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
KNOWN = frozenset({"LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM"})


def converter(tmp_path: Path, table: str) -> Path:
    """A converter's folder with `table` as its conversion/__init__.py."""
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion/__init__.py").write_text(table)
    return tmp_path / "convert_hf_to_gguf.py"


@pytest.mark.toolchain
def test_the_pinned_llama_cpp_has_a_table_of_architectures(tools: Toolchain) -> None:
    """The real table is found, and names the models that everybody converts."""
    known = architectures.supported(tools.converter)

    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel"} <= known
    assert len(known) > 100


def test_the_table_is_read_and_nothing_of_it_is_executed(tmp_path: Path) -> None:
    """A table beside code that would fail is read as the literal that it is."""
    path = converter(
        tmp_path,
        "raise SystemExit('executed')\n"
        "TEXT_MODEL_MAP: dict[str, str] = {'AForCausalLM': 'a', **other, 'BForCausalLM': 'b'}\n",
    )

    assert architectures.supported(path) == {"AForCausalLM", "BForCausalLM"}


@pytest.mark.parametrize("table", ["", "TEXT_MODEL_MAP = load()", "TEXT_MODEL_MAP = {}", "def ("])
def test_a_converter_without_the_table_is_a_tool_error(table: str, tmp_path: Path) -> None:
    """An upstream refactoring is reported as such, never as "supports nothing"."""
    path = converter(tmp_path, table)

    with pytest.raises(ToolError, match=r"conversion/__init__\.py"):
        architectures.supported(path)


def test_an_unknown_architecture_is_named_with_the_list_of_known_ones() -> None:
    """The message has the architecture, llama.cpp's commit, close names and every known name."""
    with pytest.raises(UpstreamError) as caught:
        architectures.require_supported({"architectures": ["Qwen9ForCausalLM"]}, KNOWN, COMMIT)

    assert "llama.cpp 0c1e57098 does not convert Qwen9ForCausalLM." in caught.value.message
    assert "closest ones are Qwen2ForCausalLM" in caught.value.message
    assert all(name in caught.value.message for name in KNOWN)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["LlamaForCausalLM"], "text_config": {"architectures": ["Odd"]}},
        {"architectures": ["Odd"], "text_config": {"architectures": ["LlamaForCausalLM"]}},
    ],
)
def test_the_text_part_of_a_multimodal_model_counts(config: dict[str, Any]) -> None:
    """An architecture is supported if the whole model's or its text part's is."""
    found = architectures.require_supported(config, KNOWN, COMMIT)

    assert found == config["architectures"][0]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": []},
        {"architectures": [3]},
        {"architectures": None, "text_config": "x"},
        {"architectures": 5, "text_config": {"architectures": {"a": 1}}},
    ],
)
def test_a_config_without_an_architecture_is_refused(config: dict[str, Any]) -> None:
    """There is nothing to convert by."""
    with pytest.raises(UpstreamError, match="names no architecture"):
        architectures.require_supported(config, KNOWN, COMMIT)


# --- what a GGUF is good for ------------------------------------------------------------------


@pytest.mark.parametrize(("pooling", "word"), [(1, "mean"), (2, "cls"), (3, "last")])
def test_an_encoder_is_told_by_its_header(tmp_path: Path, pooling: int, word: str) -> None:
    """It names a pooling, and its attention sees what comes later."""
    header = gguf_header.read(tiny_bert_gguf(tmp_path / "bert.gguf", pooling=pooling))

    assert architectures.is_encoder(header)
    assert not architectures.is_causal(header)
    assert architectures.pooling(header) == word


def test_a_model_that_goes_on_with_texts_is_no_encoder(tmp_path: Path) -> None:
    """It names no pooling, and a token's attention ends at itself."""
    header = gguf_header.read(tiny_llama_gguf(tmp_path / "llama.gguf"))

    assert not architectures.is_encoder(header)
    assert architectures.is_causal(header)


def test_a_decoder_that_was_made_to_embed_is_an_encoder_with_an_importance_matrix(
    tmp_path: Path,
) -> None:
    """Ollama refuses to chat with it, and llama-imatrix can run it."""
    header = gguf_header.read(tiny_llama_gguf(tmp_path / "llama.gguf"))
    embeds = dataclasses.replace(header, metadata={**header.metadata, "llama.pooling_type": 3})

    assert architectures.is_encoder(embeds)
    assert architectures.is_causal(embeds)


@pytest.mark.parametrize(
    ("pooling", "why"),
    [
        (None, "does not say how the vectors of its tokens become one"),
        (0, "does not say how the vectors of its tokens become one"),
        (4, "ranks pairs of texts"),
    ],
)
def test_an_encoder_that_makes_no_embeddings_is_refused_in_words(
    tmp_path: Path, pooling: int | None, why: str
) -> None:
    """No server would give one vector for a text."""
    header = gguf_header.read(tiny_bert_gguf(tmp_path / "bert.gguf", pooling=pooling))

    assert architectures.is_encoder(header)
    with pytest.raises(UpstreamError, match=why):
        architectures.pooling(header)
