"""Which architectures llama.cpp converts, told before anything is converted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pipelines import architectures
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


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": [3]},
                                    {"architectures": None, "text_config": "x"}])  # fmt: skip
def test_a_config_without_an_architecture_is_refused(config: dict[str, Any]) -> None:
    """There is nothing to convert by."""
    with pytest.raises(UpstreamError, match="names no architecture"):
        architectures.require_supported(config, KNOWN, COMMIT)
