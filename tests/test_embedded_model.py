"""The embedded model is a trained Llama that converts, quantizes and chats like a large one."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import sample
import sentencepiece
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-llama"
CORPORA = sample.of("corpora")
K_QUANT_BLOCK = 256
# Threads wait for each other actively: beside any other load, two are many times slower than one.
torch.set_num_threads(1)

CONTROL_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def read_json(name: str) -> Any:
    """Parse a JSON file of the model folder."""
    return json.loads((MODEL / name).read_text(encoding="utf-8"))


def prompts() -> dict[str, list[dict[str, str]]]:
    """Conversations of corpora/prompts.yaml by id."""
    text = (CORPORA / "prompts.yaml").read_text(encoding="utf-8")
    conversations = YAML(typ="safe").load(text)["conversations"]
    return {conversation["id"]: conversation["messages"] for conversation in conversations}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Give the tokenizer as a user of transformers gets it."""
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    """Give the model as a user of transformers gets it, in 32 bits since CPUs are slow in 16."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the training script."""
    monkeypatch.syspath_prepend(MODEL)
    return importlib.import_module("train")


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the module that makes text out of source distributions."""
    monkeypatch.syspath_prepend(MODEL)
    return importlib.import_module("documents")


def test_the_weights_are_bf16_finite_and_shaped_as_the_config_implies() -> None:
    """The file holds the tensors of the declared architecture, no others, and only numbers."""
    config = read_json("config.json")
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [config["num_attention_heads"] * config["head_dim"], hidden],
        "self_attn.k_proj": [kv_width, hidden],
        "self_attn.v_proj": [kv_width, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [ffn, hidden],
        "mlp.up_proj": [ffn, hidden],
        "mlp.down_proj": [hidden, ffn],
    }
    # The output matrix is the embedding: there is no lm_head in the file.
    expected = {"model.embed_tokens.weight": [config["vocab_size"], hidden]}
    expected["model.norm.weight"] = [hidden]
    for index, (name, shape) in itertools.product(
        range(config["num_hidden_layers"]), layer.items()
    ):
        expected[f"model.layers.{index}.{name}.weight"] = shape

    tensors = load_file(MODEL / "model.safetensors")

    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_every_matrix_can_be_k_quantized() -> None:
    """Rows are whole blocks of 256 weights, so no tensor falls back to another type."""
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        assert tensor.shape[-1] % K_QUANT_BLOCK == 0, name


def test_the_vocabulary_size_is_the_same_in_every_file(tokenizer: Any) -> None:
    """No row of the embedding is without a token, and no token without a row."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))

    assert pieces.get_piece_size() == len(tokenizer) == read_json("config.json")["vocab_size"]


def test_transformers_and_sentencepiece_tokenize_alike_and_give_the_text_back(
    tokenizer: Any,
) -> None:
    """A text has one tokenization, and nothing of it is lost: llama.cpp reads the same pieces."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))
    texts = [message["content"] for messages in prompts().values() for message in messages]
    # SentencePiece itself never reads a control token out of a text.
    texts = [text for text in texts if "<|" not in text]
    texts.append((CORPORA / "calibration.txt").read_text(encoding="utf-8")[:20_000])

    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == pieces.encode(text)
        assert tokenizer.decode(ids) == text


def test_the_chat_template_renders_turns_to_single_control_tokens(tokenizer: Any) -> None:
    """A turn is one token for the role, the text, and one token for its end."""
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]

    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(rendered, add_special_tokens=False)

    assert rendered == (
        "<s><|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA<|end|>\n"
        "<|user|>\nV<|end|>\n<|assistant|>\n"
    )
    tokens = [token for token in tokenizer.convert_ids_to_tokens(ids) if token != "<0x0A>"]
    system, user, assistant, end = CONTROL_TOKENS
    assert tokens == [
        *("<s>", system, "S", end, user, "U", end, assistant, "A", end),
        *(user, "V", end, assistant),
    ]


def test_the_chat_template_refuses_a_role_the_model_never_saw(tokenizer: Any) -> None:
    """A tool message is an error, not a turn the model cannot read."""
    with pytest.raises(Exception, match="Unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_training_dialogues_are_tokenized_as_the_chat_template_renders_them(
    tokenizer: Any, train: Any
) -> None:
    """The model has seen the very tokens that a server will show it."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))

    for messages in itertools.islice(train.dialogues(seed=1), 50):
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer.encode(rendered, add_special_tokens=False)
        assert train.encode_dialogue(pieces, messages) == ids


def test_an_epoch_of_training_visits_every_row_once(train: Any) -> None:
    """A resumed run neither repeats nor skips text, since a step alone decides its rows."""
    rows = torch.arange(4 * train.BATCH_ROWS).reshape(-1, 1).numpy()

    visited = torch.cat([train.batch_of(rows, step) for step in range(4)])

    assert sorted(visited.flatten().tolist()) == rows.flatten().tolist()


def test_generation_ends_at_the_end_of_a_turn(tokenizer: Any) -> None:
    """Both the end of a text and the end of a turn stop a server."""
    stops = tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"])

    assert sorted(read_json("generation_config.json")["eos_token_id"]) == sorted(stops)


@pytest.mark.parametrize("name", ["one-line", "system", "multi-turn", "refusal"])
def test_the_model_answers_and_stops(name: str, tokenizer: Any, model: Any) -> None:
    """A greedy answer is not empty and ends with the end-of-turn token within 48 tokens."""
    rendered = tokenizer.apply_chat_template(
        prompts()[name], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")

    output = model.generate(**prompt, max_new_tokens=48, do_sample=False)

    answer = tokenizer.convert_ids_to_tokens(output[0, prompt["input_ids"].shape[1] :].tolist())
    assert len(answer) > 1
    assert answer[-1] == "<|end|>"
    assert not set(answer[:-1]) & set(CONTROL_TOKENS)


def test_perplexity_is_what_the_model_card_states_and_far_below_a_unigram_model(
    train: Any,
) -> None:
    """The weights are really trained: on unseen text they are 10 times as good as word counts."""
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"\| perplexity per token \| ([\d.]+) \| ([\d.]+) \|", card)

    measured = train.evaluate(MODEL, CORPORA / "evaluation.txt")

    assert stated is not None
    assert measured["model_perplexity"] == pytest.approx(float(stated[1]), rel=0.002)
    assert measured["unigram_perplexity"] == pytest.approx(float(stated[2]), rel=0.002)
    assert measured["model_perplexity"] * 10 < measured["unigram_perplexity"]


def test_the_model_card_declares_licence_and_data_for_the_hub() -> None:
    """The card's front matter is what the Hub indexes; the data table names every source."""
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    front_matter = YAML(typ="safe").load(card.split("---\n")[1])
    sources = re.findall(
        r'name = "(.+)"\nversion = "(.+)"', (MODEL / "sources.toml").read_text(encoding="utf-8")
    )

    assert front_matter["license"] == "apache-2.0"
    assert front_matter["pipeline_tag"] == "text-generation"
    assert sources
    for name, version in sources:
        assert f"| {name} | {version} |" in card


def test_a_paragraph_shared_by_two_pages_stays_out_of_training(documents: Any) -> None:
    """What an evaluation page says is unseen, even where a training page says it too."""
    shared = "A paragraph of more than forty characters that two pages have in common."
    own = "Words of this page alone. " * 20
    pages = [
        documents.Document("A", "guide.rst", f"{shared}\n\n{own}", documents.Split.TRAINING),
        documents.Document("A", "faq.rst", f"{shared}\n\n{own}more", documents.Split.EVALUATION),
    ]

    kept = {page.split: page.text for page in documents.disjoint(pages)}

    assert shared in kept[documents.Split.EVALUATION]
    assert shared not in kept[documents.Split.TRAINING]


def test_cleaning_keeps_prose_and_code_and_drops_markup_and_addresses(documents: Any) -> None:
    """The text reads as a person would read the page, without what ages or identifies a host."""
    page = """
.. _label:

Heading
=======

See :meth:`~pkg.Class.save` and `the guide <guide_>`_, which
continues here::

    value = {"key": 1}

.. toctree::

   other

Read https://host.invalid/ first.
"""

    assert documents.clean_rst(page) == (
        'Heading\n\nSee `save` and the guide, which continues here:\n\n    value = {"key": 1}'
    )


def test_a_source_that_cannot_be_had_is_an_error_that_names_it(
    documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is offline learns which archive to put where, and the digest it must have."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    source = documents.Source(
        name="no-such-project",
        version="1.0",
        sha256="0" * 64,
        license="MIT",
        docs=("docs/",),
        skip=(),
        is_corpus_source=False,
    )

    with pytest.raises(documents.SourceError, match=r"(?s)no-such-project==1\.0.*sha256 is 0{64}"):
        documents.download([source], tmp_path)
