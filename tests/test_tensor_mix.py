"""The types of all tensors are known before the run, and a plan is believed only if it adds up."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from gguf_factory import quant, tiny_llama_gguf

from pipelines import gguf_header, tensor_mix
from pipelines.errors import ParamsError, ToolError

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.gguf_header import Header
    from pipelines.toolchain import Toolchain

pytestmark = pytest.mark.toolchain

# Of each family the quickest to make; the choice of the others is by the same code.
TYPES = ("Q4_K_M", "IQ4_XS", "Q8_0", "Q3_K_L", "Q5_0", "F16")


def dry_run(tools: Toolchain, model: Path, *words: str) -> str:
    """Run the real dry run and return its stderr."""
    *options, type_ = words
    argv: list[str | Path] = [tools.tool("llama-quantize"), "--dry-run", *options, model, type_]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stderr


# --- prediction = result ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_embd", "n_ff", "tied"),
    [(256, 512, False), (256, 512, True), (256, 896, False), (256, 100, False), (96, 256, True),
     (100, 100, False)],
)  # fmt: skip
def test_the_predicted_mix_is_the_mix_that_is_made(
    tmp_path: Path, tools: Toolchain, n_embd: int, n_ff: int, *, tied: bool
) -> None:
    """For rows that fit and rows that do not, all types end as predicted, 100 % of the tensors."""
    model = tiny_llama_gguf(
        tmp_path / "f16.gguf", n_embd=n_embd, n_ff=n_ff, vocab=300, n_head=2, n_head_kv=1, tied=tied
    )
    source = gguf_header.read(model)
    for type_ in TYPES:
        wanted = quant(type_, max_fallbacks=99)

        predicted = tensor_mix.predict(source, wanted, dry_run(tools, model, type_))

        made = tmp_path / "made.gguf"
        argv: list[str | Path] = [tools.tool("llama-quantize"), model, made, type_]
        subprocess.run(argv, check=True, capture_output=True)
        header = gguf_header.read(made)
        assert tensor_mix.differences(predicted.types, header) == []
        assert len(predicted.types) == len(source.tensors)
        assert predicted.data_bytes == sum(tensor.size_bytes for tensor in header.tensors)


def test_a_difference_names_the_tensor_and_both_types(tmp_path: Path, tools: Toolchain) -> None:
    """A file that is not as predicted is described tensor by tensor."""
    model = tiny_llama_gguf(tmp_path / "f16.gguf")
    header = gguf_header.read(model)
    predicted = tensor_mix.predict(header, quant("Q8_0"), dry_run(tools, model, "Q8_0")).types

    found = tensor_mix.differences({**predicted, "extra.weight": "F32"}, header)

    assert "blk.0.attn_q.weight: predicted Q8_0, found F16" in found
    assert "extra.weight: predicted F32, found no such tensor" in found
    assert not any("norm" in line for line in found)


# --- the text of the plan ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Header:
    """A model whose ffn_down has rows of 896."""
    return gguf_header.read(tiny_llama_gguf(tmp_path_factory.mktemp("f") / "f16.gguf", n_ff=896))


@pytest.fixture(scope="module")
def plan(source: Header, tools: Toolchain) -> str:
    """What the real dry run says about it, with one rule."""
    return dry_run(tools, source.path, "--tensor-type", "attn_q=q8_0", "Q4_K_M")


WANTED = quant("Q4_K_M", (("attn_q", "q8_0"),), max_fallbacks=2)
FALLBACK = (
    "warning: output.weight  - ncols    256 not divisible by 256 (required for type    q6_K) "
    "-> falling back to    q8_0\n"
)
CONTRADICTIONS = {
    "empty": (r"(?s).*", "", "does not name token_embd.weight"),
    "cut off": (r"(?s)\[  15/.*", "", "does not name"),
    "a line less": (r"\[  21/.*\n", "", "does not name blk.1.ffn_up.weight"),
    "a line twice": (r"(\[   1/.*\n)", r"\1\1", "which the header has not, or twice"),
    "a foreign tensor": (r"blk\.1\.ffn_up", "blk.9.ffn_up", "names blk.9.ffn_up.weight, which"),
    "another order": (r"\[   2/", "[   3/", "is number 3 of 21"),
    "another count": (r"/  21\]", "/  22]", "is number 1 of 22"),
    "another shape": (r"\[   896,    256,", "[   256,    896,", "is not [896, 256] of F16"),
    "another source type": (r"type =    f16", "type =   bf16", "is not [256, 512] of F16"),
    "an unknown type": (r"\(q6_K\)", "(q6_X)", "unknown type q6_X"),
    "a type that rows do not fit": (r"\(q5_0\)", "(q5_K)", "Q5_K cannot hold rows of 896"),
    "a fallback without a reason": (r"\A", FALLBACK, "output.weight falls back from Q6_K to Q8_0"),
    "a fallback to something else": (r"back to    q5_0", "back to    q5_1", "to Q5_1 without a"),
    "a fallback less": (r"warning: blk\.0\..*\n", "", "names 1 fallbacks but counts another"),
    "another number of fallbacks": (r"2 of 21 tensor", "3 of 21 tensor", "counts another number"),
    "a number that is none": (r"0\.10 MiB \(q6_K\)", "nan MiB (q6_K)", "is number 2 of 21"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_plan_that_contradicts_header_or_itself_is_refused(
    source: Header, plan: str, name: str
) -> None:
    """Every line is held against the header, and every fallback against arithmetic."""
    pattern, replacement, expected = CONTRADICTIONS[name]
    text, count = re.subn(pattern, replacement, plan)

    assert count
    with pytest.raises(ToolError) as caught:
        tensor_mix.predict(source, WANTED, text)
    assert "cannot be trusted" in caught.value.message
    assert expected in caught.value.message


def test_the_plan_is_read_as_it_is_printed(source: Header, plan: str) -> None:
    """Types, fallbacks and hits of the rule are those of the real text."""
    predicted = tensor_mix.predict(source, WANTED, plan)

    assert predicted.types["blk.0.attn_q.weight"] == "Q8_0"
    assert predicted.types["output_norm.weight"] == "F32"
    assert predicted.types["output.weight"] == "Q6_K"
    assert [(f.tensor, f.wanted, f.got) for f in predicted.fallbacks] == [
        ("blk.0.ffn_down.weight", "Q4_K", "Q5_0"),
        ("blk.1.ffn_down.weight", "Q6_K", "Q8_0"),
    ]
    assert [(rule.match, rule.tensors_count) for rule in predicted.rules] == [("attn_q", 2)]


def test_a_rule_that_the_tool_reads_differently_is_an_error(source: Header, plan: str) -> None:
    """Two readings of one regular expression must not pass as one."""
    wanted = quant("Q4_K_M", (("attn_k", "q8_0"),), max_fallbacks=2)

    with pytest.raises(ToolError, match=r"gives Q8_0 to blk\.0\.attn_q\.weight, by our reading"):
        tensor_mix.predict(source, wanted, plan)


def test_an_expression_that_only_python_reads_is_an_error(tmp_path: Path, tools: Toolchain) -> None:
    """What std::regex refuses ends the tool, and the stage with its message."""
    model = tiny_llama_gguf(tmp_path / "f16.gguf")

    with pytest.raises(subprocess.CalledProcessError):
        dry_run(tools, model, "--tensor-type", "(?<!attn)_k=q8_0", "Q4_K_M")


def test_a_rule_that_falls_back_still_counts(source: Header, tools: Toolchain) -> None:
    """A rule decides a tensor even if the rows then need another type; both are recorded."""
    wanted = quant("Q4_K_M", (("ffn_down", "q3_k"),), max_fallbacks=2)
    text = dry_run(tools, source.path, "--tensor-type", "ffn_down=q3_k", "Q4_K_M")

    predicted = tensor_mix.predict(source, wanted, text)

    assert predicted.rules[0].tensors_count == 2
    assert {(f.wanted, f.got) for f in predicted.fallbacks} == {("Q3_K", "Q4_0")}


def test_many_fallbacks_are_counted_not_listed(tmp_path: Path, tools: Toolchain) -> None:
    """A message about a hundred tensors stays one that people read."""
    model = tiny_llama_gguf(tmp_path / "f16.gguf", n_embd=96, n_layer=12, n_head=2, n_head_kv=1)

    with pytest.raises(ParamsError) as caught:
        tensor_mix.predict(
            gguf_header.read(model), quant("Q4_K_M"), dry_run(tools, model, "Q4_K_M")
        )

    assert "73 tensors have rows that do not fit" in caught.value.message
    assert " and 67 more." in caught.value.message
    assert len(caught.value.message) < 600
