"""Rules of a quant come from params.yaml, a file, a preset: in this order, none without effect."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

import pytest
from gguf_factory import converted_model, quant
from hypothesis import given
from hypothesis import strategies as st

from pipelines import gguf_header, tensor_rules
from pipelines.errors import ParamsError
from pipelines.params import QUANT_KEY, Preset, RecipeFile, TensorRule, is_safe_regex
from pipelines.quantize import quantize

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.toolchain import Toolchain


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A fleet with one converted model, its output matrix apart from its embeddings."""
    return converted_model(tmp_path / "fleet")


def _header(at: Layout) -> gguf_header.Header:
    return gguf_header.read(at.f16("tiny"))


def _file(at: Layout, text: str, name: str = "recipes/mix.txt") -> RecipeFile:
    path = at.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return RecipeFile(path=name, sha256=hashlib.sha256(text.encode()).hexdigest())


def _decided(at: Layout, tools: Toolchain, **options: Any) -> dict[str, str]:
    """Quantize for real and return {tensor: type} of the file."""
    wanted = quant("Q4_K_M", **options)
    quantize(wanted, at, tools)
    made = gguf_header.read(at.gguf("tiny", wanted.key))
    return {tensor.name: tensor.type for tensor in made.tensors}


# --- presets ----------------------------------------------------------------------------------


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("preset", "pattern"),
    [
        ("protect-output", r"^output\.weight$"),
        ("protect-embeddings", r"^token_embd\.weight$"),
        ("protect-attention", r"attn_(q|k|v|output)\.weight$"),
    ],
)
def test_a_preset_keeps_its_tensors_and_no_others(
    at: Layout, tools: Toolchain, preset: Preset, pattern: str
) -> None:
    """What the preset names is Q8_0 in the real file; everything else is as without it."""
    plain = _decided(at, tools)
    kept = _decided(at, tools, preset=preset)

    chosen = {name for name in kept if re.search(pattern, name)}
    assert chosen
    assert {kept[name] for name in chosen} == {"Q8_0"}
    # llama-quantize mixes Q6_K and Q4_K by counting layers; both are what it would take.
    assert all(kept[name] in {plain[name], "Q4_K", "Q6_K"} for name in kept.keys() - chosen)


@pytest.mark.toolchain
def test_tied_embeddings_are_the_output_that_is_protected(tmp_path: Path, tools: Toolchain) -> None:
    """A model without an output matrix of its own keeps the embeddings that serve as one."""
    at = converted_model(tmp_path / "fleet", tied=True)

    kept = _decided(at, tools, preset="protect-output")

    assert kept["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in kept


@pytest.mark.parametrize(
    ("preset", "lacks"), [("moe-protect-active", "experts"), ("hybrid-protect-ssm", "state-space")]
)
def test_a_preset_for_another_kind_of_model_is_refused(
    at: Layout, preset: Preset, lacks: str
) -> None:
    """A dense model has no experts to squeeze: the error says what is missing."""
    with pytest.raises(ParamsError, match=lacks) as error:
        tensor_rules.resolve(quant(preset=preset), _header(at), at)

    assert "quants.tiny-Q4_K_M.preset" in error.value.message


@pytest.mark.parametrize("type_", sorted(tensor_rules.NOTHING_TO_KEEP))
def test_a_preset_that_can_keep_nothing_is_refused(at: Layout, type_: str) -> None:
    """Keeping tensors at Q8_0 has no effect on a quant that is as exact."""
    with pytest.raises(ParamsError, match="no effect"):
        tensor_rules.resolve(quant(type_, preset="protect-output"), _header(at), at)


def test_a_preset_whose_tensors_are_all_decided_already_is_refused(at: Layout) -> None:
    """A rule of params.yaml beats the preset; a preset with nothing left is no silent no-op."""
    wanted = quant(rules=((r"output\.weight", "q6_k"),), preset="protect-output")

    with pytest.raises(ParamsError, match="nothing of that is left"):
        tensor_rules.resolve(wanted, _header(at), at)


def test_every_preset_is_in_the_schema_and_has_patterns_that_both_sides_read() -> None:
    """No preset can be declared that is not defined, and llama-quantize reads all as we do."""
    from typing import get_args  # noqa: PLC0415 - only here

    assert set(tensor_rules.PRESETS) == set(get_args(Preset))
    for kept in tensor_rules.PRESETS.values():
        assert kept.patterns
        assert all(is_safe_regex(pattern) for pattern in kept.patterns)


# --- files ------------------------------------------------------------------------------------


@pytest.mark.toolchain
def test_rules_of_a_file_decide_after_those_of_params_and_before_a_preset(
    at: Layout, tools: Toolchain
) -> None:
    """The first rule that is found wins: params.yaml, then the file, then the preset."""
    text = "# made by a search\n^blk\\.0\\.attn_q\\.weight$=Q6_K\n\nffn_up=q5_0\n"

    made = _decided(
        at,
        tools,
        rules=((r"blk\.0\.attn_k", "f16"),),
        recipe_file=_file(at, text),
        preset="protect-attention",
    )

    assert made["blk.0.attn_k.weight"] == "F16"
    assert made["blk.0.attn_q.weight"] == "Q6_K"
    assert made["blk.1.ffn_up.weight"] == "Q5_0"
    assert made["blk.1.attn_q.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("ffn_up=q4_k\nffn_down q6_k\n", 2, "is no rule"),
        ("# fine\nffn_up=iq4_ks\n", 2, "not one of llama-quantize"),
        ("ffn_up=q9_k\n", 1, "did you mean"),
        ("ffn up=q4_k\n", 1, "no regular expression"),
        ("(?<x>a)=q4_k\n", 1, "no regular expression"),
        ("ffn_(up=q4_k\n", 1, "no regular expression"),
        ("=q4_k\n", 1, "is no rule"),
    ],
)
def test_a_bad_line_is_named_with_its_number(at: Layout, text: str, line: int, words: str) -> None:
    """What is wrong with a file of another tool, and where."""
    wanted = quant(recipe_file=_file(at, text))

    with pytest.raises(ParamsError, match=words) as error:
        tensor_rules.resolve(wanted, _header(at), at)

    assert error.value.message.startswith(f"recipes/mix.txt:{line}: ")


def test_a_file_with_other_bytes_than_declared_is_refused_and_says_which_it_has(at: Layout) -> None:
    """A recipe decides the bytes of a GGUF: nobody changes it beside params.yaml."""
    declared = _file(at, "ffn_up=q6_k\n")
    found = _file(at, "ffn_up=q2_k\n").sha256

    with pytest.raises(ParamsError, match="other bytes than declared") as error:
        tensor_rules.read_file(declared, at.root, "quants.x.recipe_file")

    assert found in (error.value.hint or "")


def test_a_file_that_is_missing_empty_too_long_or_no_text_is_an_error(at: Layout) -> None:
    """Each in words; none is read as a recipe without rules."""
    nowhere = RecipeFile(path="recipes/none.txt", sha256="0" * 64)
    with pytest.raises(ParamsError, match=r"recipes/none\.txt cannot be read"):
        tensor_rules.read_file(nowhere, at.root, "quants.x.recipe_file")
    with pytest.raises(ParamsError, match="holds no rule"):
        tensor_rules.parse(b"# nothing but words\n", "mix.txt")
    with pytest.raises(ParamsError, match="4,096 are allowed"):
        tensor_rules.parse(b"a=q4_k\n" * 4097, "mix.txt")
    with pytest.raises(ParamsError, match=r"mix\.txt:2: holds a byte that is not ASCII"):
        tensor_rules.parse("a=q4_k\nü=q4_k\n".encode(), "mix.txt")


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
def test_any_line_is_a_rule_or_an_error_with_its_place(line: str) -> None:
    """No text makes the reader fail otherwise, and a rule that it lets pass is a safe one."""
    said = "mix.txt"
    rules: tuple[TensorRule, ...] = ()
    try:
        rules = tensor_rules.parse(f"{line}\n".encode(), "mix.txt")
    except ParamsError as error:
        said = error.message

    assert said.startswith("mix.txt")
    assert all(is_safe_regex(rule.match) for rule in rules)


# --- the declaration --------------------------------------------------------------------------


def test_check_names_a_recipe_that_cannot_be_used(
    checkout: Path, fleet: Callable[..., object]
) -> None:
    """`fleet check` reads the file: missing, changed and broken ones are named by line."""
    path = checkout / "params.yaml"
    text = path.read_text()
    broken = "ffn_up=q9_k\n"
    (checkout / "corpora/mix.txt").write_text(broken)
    digest = hashlib.sha256(broken.encode()).hexdigest()
    path.write_text(
        text.replace(
            "  tiny-llama-Q2_K: {model: tiny-llama, type: Q2_K}\n",
            "  tiny-llama-Q2_K:\n    model: tiny-llama\n    type: Q2_K\n"
            "    preset: protect-output\n"
            f"    recipe_file: {{path: corpora/mix.txt, sha256: {digest}}}\n"
            "  tiny-llama-F16: {model: tiny-llama, type: F16, preset: protect-attention}\n",
        )
    )

    told = fleet("check", cwd=checkout)

    assert getattr(told, "returncode") == 2  # noqa: B009 - typed as object
    said = getattr(told, "stdout") + getattr(told, "stderr")  # noqa: B009 - the same
    assert "corpora/mix.txt:1: type" in said
    assert "no effect on F16" in said
    assert re.search(QUANT_KEY, "tiny-llama-F16")
