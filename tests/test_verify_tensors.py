"""Tensors, hyperparameters and values: what a right conversion shows, and what a wrong one does."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verify_factory import (
    EMBEDDED,
    bf16,
    converted,
    read_tensor,
    rewritten,
    subject,
    widened,
    write_checkpoint,
    write_gguf,
)

from pipelines import gguf_header, hyperparameters, tensor_origins, verify_tensors
from pipelines.errors import UpstreamError
from pipelines.source_tensors import open_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from pipelines.toolchain import Toolchain
    from pipelines.verify_records import Check

pytestmark = pytest.mark.toolchain


@pytest.fixture(scope="session")
def embedded(tools: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as the pinned converter makes it."""
    return converted(EMBEDDED, tmp_path_factory.mktemp("embedded"), tools)


def asked(root: Path, source: Path, f16: Path, tools: Toolchain) -> dict[str, Check]:
    """Ask the three layers and return their answers by name."""
    return {
        check.layer: check for check in verify_tensors.checks(subject(root, source, f16, tools))
    }


def outcomes(checks: dict[str, Check]) -> dict[str, str]:
    """Say how each layer ended."""
    return {layer: check.outcome for layer, check in checks.items()}


def test_the_embedded_model_is_upstreams_to_the_last_bit(
    tmp_path: Path, embedded: Path, tools: Toolchain
) -> None:
    """All layers pass, every value was looked at, and the tie of the embeddings is said."""
    checks = asked(tmp_path, EMBEDDED, embedded, tools)

    assert set(outcomes(checks).values()) == {"PASS"}
    assert checks["values"].examined_count == sum(
        tensor.n_elements for tensor in gguf_header.read(embedded).tensors
    )
    assert "the embeddings serve as output" in checks["tensors"].sentence
    assert checks["hyperparameters"].examined_count >= 12


# --- planted faults ---------------------------------------------------------------------------


def metadata(key: str, value: Any) -> Callable[[Path, Path], Path]:
    """Plant a value of the metadata; None removes it."""
    return lambda path, into: rewritten(path, into, metadata={f"llama.{key}": value})


def changed(
    name: str, change: Callable[[NDArray[Any]], NDArray[Any]]
) -> Callable[[Path, Path], Path]:
    """Plant other values in one tensor."""

    def plant(path: Path, into: Path) -> Path:
        return rewritten(path, into, tensors={name: change(read_tensor(path, name))})

    return plant


def with_value(value: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Put one value into a matrix."""

    def put(values: NDArray[Any]) -> NDArray[Any]:
        values[3, 5] = value
        return values

    return put


def zero_row(values: NDArray[Any]) -> NDArray[Any]:
    """Lose a row."""
    values[7] = 0
    return values


def one_bit(values: NDArray[Any]) -> NDArray[Any]:
    """Flip the lowest bit of the last value."""
    bits = values.view(np.uint16)
    bits[-1, -1] ^= 1
    return values


def swapped(path: Path, into: Path) -> Path:
    """Swap two layers' matrices of equal shape."""
    names = ("blk.1.ffn_up.weight", "blk.2.ffn_up.weight")
    one, two = (read_tensor(path, name) for name in names)
    return rewritten(path, into, tensors={names[0]: two, names[1]: one})


def untied(path: Path, into: Path) -> Path:
    """Give a tied model an output of its own."""
    other = np.random.default_rng(1).normal(0, 0.02, (1024, 256)).astype(np.float16)
    return rewritten(path, into, tensors={"output.weight": other})


def padded(path: Path, into: Path) -> Path:
    """Add rows of garbage to the vocabulary."""
    rows = np.random.default_rng(1).normal(0, 0.02, (64, 256)).astype(np.float16)
    table = read_tensor(path, "token_embd.weight")
    return rewritten(path, into, tensors={"token_embd.weight": np.concatenate([table, rows])})


def unpermuted(values: NDArray[Any]) -> NDArray[Any]:
    """Lay the halves of each head as upstream does."""
    heads = values.reshape(4, 32, 2, 256)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(256, 256)


Q, UP, NORM = "blk.1.attn_q.weight", "blk.1.ffn_up.weight", "blk.1.attn_norm.weight"
SQUARE = "blk.1.attn_output.weight"
FAULTS: dict[str, tuple[Callable[[Path, Path], Path], str, str]] = {
    "rope theta": (metadata("rope.freq_base", 500_000.0), "hyperparameters", "10000"),
    "rope scale": (metadata("rope.scaling.factor", 2.0), "hyperparameters", "scaling.factor"),
    "rope scaling type": (metadata("rope.scaling.type", "yarn"), "hyperparameters", "yarn"),
    "part of a head rotated": (metadata("rope.dimension_count", 32), "hyperparameters", "64"),
    "norm epsilon": (metadata("attention.layer_norm_rms_epsilon", 1e-5), "hyperparameters",
                     "rms_norm_eps"),
    "norm epsilon lost": (metadata("attention.layer_norm_rms_epsilon", None), "hyperparameters",
                          "missing"),
    "heads of keys": (metadata("attention.head_count_kv", 4), "hyperparameters", "means 2"),
    "length of a head": (metadata("attention.key_length", 32), "hyperparameters", "head_dim"),
    "context": (metadata("context_length", 4096), "hyperparameters", "512"),
    "layers": (metadata("block_count", 3), "hyperparameters", "number of layers"),
    "swapped tensors": (swapped, "values", "it holds model.layers.2.mlp.up_proj.weight"),
    "dropped tensor": (lambda path, into: rewritten(path, into, drop=[NORM]), "tensors",
                       "blk.1.attn_norm.weight is missing"),
    "one tensor too many": (
        lambda path, into: rewritten(
            path, into, tensors={"blk.1.attn_q.bias": np.zeros(256, np.float32)}),
        "tensors", "blk.1.attn_q.bias comes from no tensor"),
    "transposed square": (changed(SQUARE, lambda v: np.ascontiguousarray(v.T)), "values",
                          "the same values lie in another order"),
    "transposed": (changed(UP, lambda v: np.ascontiguousarray(v.T)), "tensors", "[256, 768]"),
    "halves of heads": (changed(Q, unpermuted), "values", "another order"),
    "one bit": (changed(UP, one_bit), "values", "in 1 value, the first in row 767, column 255"),
    "scale of a layer": (changed(UP, lambda v: v * np.float16(0.5)), "values", "0.5 times"),
    "scale of a norm": (changed(NORM, lambda v: v * np.float32(1.01)), "values", "1.01 times"),
    "tied embedding lost": (untied, "values", "output.weight differs from model.embed_tokens"),
    "vocabulary padded": (padded, "tensors", "[1088, 256]"),
    "norm in 16 bits": (changed(NORM, lambda v: v.astype(np.float16)), "tensors", "in F16"),
    "matrix in 32 bits": (changed(UP, lambda v: v.astype(np.float32)), "tensors", "in F32"),
    "NaN": (changed(UP, with_value(np.nan)), "values", "NaN or infinity in 1 value"),
    "Inf": (changed(UP, with_value(np.inf)), "values", "the first in row 3"),
    "row of zeros": (changed(UP, zero_row), "values", "the first is row 7"),
}  # fmt: skip


@pytest.mark.parametrize(("plant", "layer", "says"), FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_caught_by_its_layer_and_named(  # noqa: PLR0913, PLR0917 - fixtures
    plant: Callable[[Path, Path], Path],
    layer: str,
    says: str,
    tmp_path: Path,
    embedded: Path,
    tools: Toolchain,
) -> None:
    """Of a conversion in which one thing is wrong, the layer whose matter it is says which."""
    checks = asked(tmp_path, EMBEDDED, plant(embedded, tmp_path / "wrong.gguf"), tools)

    failed = [name for name, check in checks.items() if check.outcome == "FAIL"]
    assert failed[0] == layer
    assert checks[layer].differing_count >= 1
    assert says in " ".join([checks[layer].sentence, *checks[layer].findings])


@settings(max_examples=40, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_any_tensor_is_found(
    where: float, bit: int, embedded: Path, tools: Toolchain, tmp_path_factory: Any
) -> None:
    """Wherever in the data it is: there is no sample that could miss it."""
    root = tmp_path_factory.mktemp("flipped")
    header = gguf_header.read(embedded)
    at = int(where * sum(tensor.n_elements for tensor in header.tensors))
    for tensor in header.tensors:
        if at < tensor.n_elements:
            break
        at -= tensor.n_elements
    offset = header.data_offset + tensor.offset + at * (2 if tensor.type == "F16" else 4)
    data = bytearray(embedded.read_bytes())
    data[offset] ^= 1 << bit
    (root / "flipped.gguf").write_bytes(data)

    checks = asked(root, EMBEDDED, root / "flipped.gguf", tools)

    assert outcomes(checks)["values"] == "FAIL"
    assert tensor.name in checks["values"].sentence
    shutil.rmtree(root)


# --- what other classes need ------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> NDArray[np.uint16]:
    """Bit patterns of bfloat16 of small normal numbers."""
    return bf16(np.random.default_rng([seed, *shape]).normal(0, 0.05, shape))


def f16(bits: NDArray[np.uint16]) -> NDArray[np.float16]:
    """Round bfloat16 to float16."""
    return widened(bits).astype(np.float16)


EXPERTS, FFN, WIDTH = 4, 8, 16


def mixtral(order: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Experts of one layer, as upstream has them and stacked in an order of ours."""
    stem = "model.layers.0.block_sparse_moe"
    upstream = {
        f"{stem}.experts.{expert}.w1.weight": normal(FFN, WIDTH, seed=expert)
        for expert in range(EXPERTS)
    }
    upstream[f"{stem}.gate.weight"] = normal(EXPERTS, WIDTH, seed=9)
    stacked = [f16(upstream[f"{stem}.experts.{expert}.w1.weight"]) for expert in order]
    made = {
        "blk.0.ffn_gate_exps.weight": np.stack(stacked),
        "blk.0.ffn_gate_inp.weight": widened(upstream[f"{stem}.gate.weight"]),
    }
    return upstream, made


def answers(
    root: Path, tools: Toolchain, class_: tuple[str, str], upstream: Any, made: Any, **config: Any
) -> dict[str, Check]:
    """Ask about tensors that we write on both sides."""
    name, architecture = class_
    source = write_checkpoint(root / "source", {"architectures": [name]} | config, upstream)
    path = write_gguf(root / "made.gguf", architecture, 1, made)
    return asked(root, source, path, tools)


def test_experts_are_stacked_by_their_number_and_in_no_other_order(
    tmp_path: Path, tools: Toolchain
) -> None:
    """A router that sends tokens to swapped experts looks alive and talks nonsense."""
    class_ = ("MixtralForCausalLM", "llama")
    right = answers(tmp_path / "a", tools, class_, *mixtral([0, 1, 2, 3]))
    wrong = answers(tmp_path / "b", tools, class_, *mixtral([0, 2, 1, 3]))

    assert (right["tensors"].outcome, right["values"].outcome) == ("PASS", "PASS")
    assert wrong["values"].outcome == "FAIL"
    assert "another order" in wrong["values"].sentence


def test_a_lost_expert_is_a_wrong_shape(tmp_path: Path, tools: Toolchain) -> None:
    """Three of four experts are not the layer."""
    upstream, made = mixtral([0, 1, 2])
    checks = answers(tmp_path, tools, ("MixtralForCausalLM", "llama"), upstream, made)

    assert checks["tensors"].outcome == "FAIL"
    assert "[3, 8, 16]" in checks["tensors"].sentence


def test_fused_gate_and_up_of_experts_are_cut_in_halves(tmp_path: Path, tools: Toolchain) -> None:
    """In transformers 5:  (experts, gate and up, hidden); swapped halves are found."""
    fused = normal(EXPERTS, 2 * FFN, WIDTH)
    halves = f16(fused[:, :FFN]), f16(fused[:, FFN:])
    upstream = {"model.layers.0.mlp.experts.gate_up_proj": fused}
    for number, (gate, up) in enumerate((halves, halves[::-1])):
        made = {"blk.0.ffn_gate_exps.weight": gate, "blk.0.ffn_up_exps.weight": up}
        class_ = ("Qwen3MoeForCausalLM", "qwen3moe")
        checks = answers(tmp_path / str(number), tools, class_, upstream, made)
        assert checks["tensors"].outcome == "PASS"
        assert checks["values"].outcome == ("PASS", "FAIL")[number]


def test_a_lost_bias_is_missed(tmp_path: Path, tools: Toolchain) -> None:
    """Qwen 2 has biases on q, k and v; llama.cpp loads a model without them and says nothing."""
    stem = "model.layers.0.self_attn.q_proj"
    upstream = {f"{stem}.weight": normal(WIDTH, WIDTH), f"{stem}.bias": normal(WIDTH)}
    made = {"blk.0.attn_q.weight": f16(upstream[f"{stem}.weight"])}
    checks = answers(tmp_path, tools, ("Qwen2ForCausalLM", "qwen2"), upstream, made)

    assert checks["tensors"].outcome == "FAIL"
    assert f"blk.0.attn_q.bias is missing ({stem}.bias)" in checks["tensors"].sentence


@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_the_one_in_gemmas_norms_must_be_added(
    plus: float, tmp_path: Path, tools: Toolchain
) -> None:
    """Upstream multiplies by 1 + w; a norm without the one scales everything to nothing."""
    norm = normal(WIDTH)
    made = {"output_norm.weight": widened(norm) + np.float32(plus)}
    class_ = ("Gemma2ForCausalLM", "gemma2")
    checks = answers(tmp_path, tools, class_, {"model.norm.weight": norm}, made)

    assert checks["values"].outcome == ("PASS" if plus else "FAIL")


@pytest.mark.parametrize("transposed", [True, False])
def test_conv1d_weights_must_be_transposed(
    transposed: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
    tools: Toolchain,
) -> None:
    """GPT-2 keeps (in, out); a square one that was not turned has the right shape."""
    weight = normal(WIDTH, WIDTH)
    made = f16(weight)
    made = np.ascontiguousarray(made.T) if transposed else made
    checks = answers(
        tmp_path, tools, ("GPT2LMHeadModel", "gpt2"),
        {"h.0.attn.c_proj.weight": weight}, {"blk.0.attn_output.weight": made},
    )  # fmt: skip

    assert checks["values"].outcome == ("PASS" if transposed else "FAIL")


@pytest.mark.parametrize("sorted_", [True, False])
def test_fused_heads_must_be_sorted_into_queries_keys_and_values(
    sorted_: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
    tools: Toolchain,
) -> None:
    """GPT-NeoX lays q, k and v of each head together, llama.cpp all queries first."""
    heads, dim = 2, WIDTH // 2
    weight = normal(3 * WIDTH, WIDTH)
    kinds = np.ascontiguousarray(f16(weight).reshape(heads, 3, dim, WIDTH).swapaxes(0, 1))
    made = kinds.reshape(3 * WIDTH, WIDTH) if sorted_ else f16(weight)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    checks = answers(
        tmp_path, tools, ("GPTNeoXForCausalLM", "gptneox"), {name: weight},
        {"blk.0.attn_qkv.weight": made}, num_attention_heads=heads,
    )  # fmt: skip

    assert checks["values"].outcome == ("PASS" if sorted_ else "FAIL")


@pytest.mark.parametrize("right", [True, False])
def test_compressed_keys_and_values_are_cut_apart_and_the_keys_turned(
    right: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
    tools: Toolchain,
) -> None:
    """DeepSeek's kv_b_proj becomes two tensors; keys that were not turned are found."""
    heads, keys, values, rank = 3, 8, 8, 8
    weight = normal(heads * (keys + values), rank)
    each = f16(weight).reshape(heads, keys + values, rank)
    turned = each[:, :keys].swapaxes(1, 2) if right else each[:, :keys]
    made = {
        "blk.0.attn_k_b.weight": np.ascontiguousarray(turned),
        "blk.0.attn_v_b.weight": np.ascontiguousarray(each[:, keys:]),
    }
    checks = answers(
        tmp_path, tools, ("DeepseekV2ForCausalLM", "deepseek2"),
        {"model.layers.0.self_attn.kv_b_proj.weight": weight}, made,
        num_attention_heads=heads, qk_nope_head_dim=keys, v_head_dim=values,
    )  # fmt: skip

    assert checks["tensors"].outcome == "PASS"
    assert checks["values"].outcome == ("PASS" if right else "FAIL")


def test_positions_before_the_padding_are_left_out_of_roberta(
    tmp_path: Path, tools: Toolchain
) -> None:
    """Positions start at pad_token_id + 1; rows from another place are found."""
    table = normal(12, WIDTH)
    for number, start in enumerate((2, 0)):
        made = {"position_embd.weight": widened(table[start : start + 10])}
        checks = answers(
            tmp_path / str(number), tools, ("XLMRobertaModel", "bert"),
            {"embeddings.position_embeddings.weight": table}, made, pad_token_id=1,
        )  # fmt: skip
        assert checks["values"].outcome == ("PASS", "FAIL")[number]


def test_a_value_too_large_for_16_bits_is_a_fault_although_it_was_rounded_right(
    tmp_path: Path, tools: Toolchain
) -> None:
    """bfloat16 reaches 3e38, float16 65,504: such a model must not be used in 16 bits."""
    weight = normal(WIDTH, WIDTH)
    weight[2, 3] = bf16(np.array([1e6]))[0]
    with np.errstate(over="ignore"):
        made = {"output.weight": f16(weight)}
    checks = answers(
        tmp_path, tools, ("Qwen2ForCausalLM", "qwen2"), {"lm_head.weight": weight}, made
    )

    assert checks["values"].outcome == "FAIL"
    assert "too large for 16 bits" in checks["values"].sentence


def test_rows_that_are_zero_upstream_may_be_zero(tmp_path: Path, tools: Toolchain) -> None:
    """Padding of a vocabulary is zeros in many models; rows that fell below 16 bits are not."""
    table = normal(WIDTH, WIDTH)
    table[-4:] = 0
    made = {"token_embd.weight": f16(table)}
    class_ = ("Qwen2ForCausalLM", "qwen2")
    name = "model.embed_tokens.weight"
    right = answers(tmp_path / "a", tools, class_, {name: table}, made)
    table[-1] = bf16(np.full(WIDTH, 1e-9))
    lost = answers(tmp_path / "b", tools, class_, {name: table}, {"token_embd.weight": f16(table)})

    assert right["values"].outcome == "PASS"
    assert lost["values"].outcome == "FAIL"
    assert (
        "zeros only, where upstream's has numbers, the first is row 15" in lost["values"].sentence
    )


# --- classes that are not known ---------------------------------------------------------------


def unknown(root: Path, tools: Toolchain, made: NDArray[Any], weight: NDArray[Any]) -> Check:
    """Ask about one tensor of a class that nobody knows."""
    class_ = ("StrangeForCausalLM", "qwen2")
    return answers(root, tools, class_, {"lm_head.weight": weight}, {"output.weight": made})[
        "values"
    ]


def test_of_an_unknown_class_only_damage_is_a_fault(tmp_path: Path, tools: Toolchain) -> None:
    """Another order of the same values passes and is said; a made-up rule is SKIP; damage fails."""
    weight = normal(64, 64)
    made = f16(weight)
    damaged = made.copy()[::-1].copy()
    damaged[1, 1] = 7

    reordered = unknown(tmp_path / "a", tools, made[::-1].copy(), weight)
    assert reordered.outcome == "PASS"
    assert "the order is not known here" in reordered.sentence
    assert unknown(tmp_path / "b", tools, damaged, weight).outcome == "FAIL"
    rule = unknown(tmp_path / "c", tools, -np.exp(made), weight)
    assert rule.outcome == "SKIP"
    assert "output.weight" in rule.sentence


def test_a_weight_without_a_name_is_a_fault_of_a_known_class_and_skips_an_unknown_one(
    tmp_path: Path, tools: Toolchain
) -> None:
    """What nobody can trace is never counted as right."""
    upstream = {"model.norm.weight": normal(WIDTH), "model.layers.0.novelty": normal(WIDTH)}
    made = {"output_norm.weight": widened(upstream["model.norm.weight"])}
    for number, class_ in enumerate(("Qwen2ForCausalLM", "StrangeForCausalLM")):
        checks = answers(tmp_path / str(number), tools, (class_, "qwen2"), upstream, made)
        assert checks["tensors"].outcome == ("FAIL", "SKIP")[number]
        assert "model.layers.0.novelty" in checks["tensors"].sentence


def test_pictures_and_buffers_are_no_part_of_a_text_model(tmp_path: Path, tools: Toolchain) -> None:
    """A multimodal repository has more tensors than its text model; how many is said."""
    upstream = {
        "language_model.model.norm.weight": normal(WIDTH),
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight": normal(WIDTH, WIDTH),
        "model.layers.0.self_attn.rotary_emb.inv_freq": normal(WIDTH),
    }
    made = {"output_norm.weight": widened(upstream["language_model.model.norm.weight"])}
    checks = answers(tmp_path, tools, ("Qwen2ForCausalLM", "qwen2"), upstream, made)

    assert checks["tensors"].outcome == "PASS"
    assert "2 tensors of upstream's that no text model has were left out" in (
        checks["tensors"].sentence
    )


# --- metadata of other kinds of models --------------------------------------------------------


def held(root: Path, architecture: str, config: dict[str, Any], **values: Any) -> list[str]:
    """Hold metadata that we write against a config.json that we write."""
    path = write_gguf(root / "held.gguf", architecture, 2, {})
    keys = {f"{architecture}.{key.replace('__', '.')}": value for key, value in values.items()}
    path = rewritten(path, root / "more.gguf", metadata=keys)
    whole = hyperparameters.text_config({"num_hidden_layers": 2} | config)
    return hyperparameters.hold_against(gguf_header.read(path), architecture, whole).differing


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"attention__causal": False}, "attention.causal is False, Qwen2ForCausalLM means True"),
        ({"rope__scaling__attn_factor": 2.0}, "rope.scaling.attn_factor is 2, rope_type default"),
    ],
)
def test_what_decides_the_computation_and_no_config_declares_is_found(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """llama.cpp obeys these keys whatever the architecture."""
    config = {"architectures": ["Qwen2ForCausalLM"]}
    assert held(tmp_path, "qwen2", config) == []
    assert words in " ".join(held(tmp_path, "qwen2", config, **values))


def test_a_key_that_was_held_against_nothing_is_said_not_to_have_been_compared(
    tmp_path: Path,
) -> None:
    """It must not pass for equal because nobody looked."""
    path = write_gguf(tmp_path / "held.gguf", "qwen2", 2, {})
    path = rewritten(path, tmp_path / "more.gguf", metadata={"qwen2.clamp": 2.0})
    found = hyperparameters.hold_against(gguf_header.read(path), "qwen2", {"num_hidden_layers": 2})
    assert [note for note in found.notes if note.startswith("qwen2.")] == [
        "qwen2.clamp, which config.json does not state in a way that is known here"
    ]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}


def test_a_scaling_that_was_lost_or_changed_is_named(tmp_path: Path) -> None:
    """YaRN has a type, a factor and the context that it stretches."""
    config = {"rope_theta": 1e6, "rope_scaling": YARN}
    right: dict[str, Any] = {
        "rope__freq_base": 1e6,
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 32_768,
    }
    assert held(tmp_path, "qwen2", config, **right) == []
    for key, value in (
        ("type", "linear"),
        ("type", None),
        ("factor", 2.0),
        ("original_context_length", 4096),
    ):
        wrong = held(tmp_path, "qwen2", config, **right | {f"rope__scaling__{key}": value})
        assert len(wrong) == 1
        assert f"rope.scaling.{key}" in wrong[0]


def test_a_rope_base_that_the_gguf_does_not_name_is_10000(tmp_path: Path) -> None:
    """A missing key is the reader's default, which is right for one model and not for another."""
    assert held(tmp_path, "llama", {"rope_theta": 10_000.0}) == []
    assert "rope.freq_base is 10000" in held(tmp_path, "llama", {"rope_theta": 5e5})[0]


def test_the_sections_of_a_multimodal_config_are_read(tmp_path: Path) -> None:
    """The text model's numbers stand in text_config; transformers 5 nests the rotation."""
    config = {
        "rope_theta": 1.0,
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    }
    assert held(tmp_path, "qwen2", config, rope__freq_base=5e5) == []
    assert held(tmp_path, "qwen2", config, rope__freq_base=1.0) != []


@pytest.mark.parametrize(
    ("architecture", "config", "key", "right", "wrong"),
    [
        ("llama", {"num_local_experts": 8}, "expert_count", 8, 4),
        ("llama", {"num_experts_per_tok": 2}, "expert_used_count", 2, 1),
        ("gemma2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", 50.0, 30.0),
        ("gemma2", {"sliding_window": 4096}, "attention__sliding_window", 4096, 2048),
        ("gemma2", {"sliding_window": 4096}, "attention__sliding_window", 4096, None),
        ("granite", {"attention_multiplier": 0.01}, "attention__scale", 0.01, 0.125),
        ("granite", {"attention_multiplier": 0.01}, "attention__scale", 0.01, None),
        ("bert", {"layer_norm_eps": 1e-12}, "attention__layer_norm_epsilon", 1e-12, 1e-5),
        ("gemma3", {"rope_local_base_freq": 1e4}, "rope__freq_base_swa", 1e4, 1e6),
    ],
)
def test_what_only_some_architectures_have_is_compared(  # noqa: PLR0913, PLR0917 - one case
    architecture: str, config: dict[str, Any], key: str, right: Any, wrong: Any, tmp_path: Path
) -> None:
    """Experts, caps on logits, windows, scales: right passes, wrong is named."""
    assert held(tmp_path, architecture, config, **{key: right}) == []
    problems = held(tmp_path, architecture, config, **{key: wrong})
    assert [key.replace("__", ".") in problem for problem in problems] == [True]


def test_a_scale_of_attention_that_llama_cpp_cannot_have_is_found(tmp_path: Path) -> None:
    """Gemma 2 declares what scores are divided by; llama.cpp derives it from a head's length."""
    config = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    values: dict[str, Any] = {
        "embedding_length": 64, "attention__head_count": 4, "attention__head_count_kv": 4,
        "attention__key_length": 16, "attention__value_length": 16,
    }  # fmt: skip
    right = config | {"query_pre_attn_scalar": 16}
    assert held(tmp_path, "gemma2", right, **values) == []
    other = held(tmp_path, "gemma2", config | {"query_pre_attn_scalar": 24}, **values)
    assert len(other) == 1
    assert "query_pre_attn_scalar" in other[0]


def test_the_slowed_frequencies_of_llama_3_1_are_computed_and_compared(
    tmp_path: Path, tools: Toolchain
) -> None:
    """The real converter's factors are ours; another factor is found in its values."""
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    source = tmp_path / "source"
    shutil.copytree(EMBEDDED, source)
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10_000.0} | scaling
    (source / "config.json").write_text(json.dumps(config))
    path = converted(source, tmp_path / "made", tools)

    assert set(outcomes(asked(tmp_path, source, path, tools)).values()) == {"PASS"}
    factors = read_tensor(path, "rope_freqs.weight")
    assert len(set(factors.tolist())) > 1
    factors[-1] = 4
    wrong = rewritten(path, tmp_path / "wrong.gguf", tensors={"rope_freqs.weight": factors})
    checks = asked(tmp_path, source, wrong, tools)
    assert "rope_freqs.weight differs from config.json" in checks["values"].sentence
    lost = rewritten(path, tmp_path / "lost.gguf", drop=["rope_freqs.weight"])
    assert asked(tmp_path, source, lost, tools)["hyperparameters"].outcome == "FAIL"


def test_a_source_that_is_not_whole_is_an_upstream_error(
    tmp_path: Path, embedded: Path, tools: Toolchain
) -> None:
    """A shard that was cut after the fetch proves nothing."""
    shutil.copytree(EMBEDDED, tmp_path / "source")
    weights = tmp_path / "source/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])

    with pytest.raises(UpstreamError, match="truncated"):
        asked(tmp_path, tmp_path / "source", embedded, tools)


@settings(max_examples=50, deadline=None)
@given(heads=st.integers(1, 6), half=st.integers(1, 8))
def test_rotated_pairs_are_a_permutation_within_each_head(heads: int, half: int) -> None:
    """Every row is used once, and none leaves its head."""
    rows = tensor_origins._pairs(heads * half * 2, heads)

    assert sorted(rows.tolist()) == list(range(heads * half * 2))
    assert (rows // (2 * half) == np.arange(len(rows)) // (2 * half)).all()
    assert rows[:2].tolist() == [0, half]


def test_the_checkpoint_is_mapped_and_not_loaded() -> None:
    """Tensors are views of the files, so that a model larger than memory can be proven."""
    tensors = open_all(EMBEDDED)

    assert len(tensors) == 38
    assert all(isinstance(tensor.array(), np.memmap) for tensor in tensors.values())
