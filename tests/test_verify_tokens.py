"""No conversion that changed the vocabulary, or what becomes of a text, gets through."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import architecture_factory
import pytest
from gguf_faults import Gguf
from verify_factory import EMBEDDED, converted, subject

from pipelines import gguf_header, verify_tokens
from pipelines.errors import ToolError
from pipelines.upstream_tokens import MODES
from pipelines.verify_corpus import Case

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.toolchain import Toolchain
    from pipelines.verify_records import Check
    from pipelines.verify_tokens import Tokenized, Upstream

_BOOL = 7
_INPUTS_END = "\n__ggml_vocab_test__\n"
# Those of the pinned source that have token ids beside them.
FIXTURES = (
    "bert-bge", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2",
    "llama-bpe", "llama-spm", "phi-3", "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip


class Asked:
    """A good conversion, what upstream makes of the corpus, and GGUFs with one thing changed."""

    def __init__(self, source: Path, gguf: Path, tools: Toolchain, place: Path) -> None:
        """Ask upstream's tokenizer once."""
        self.source = source
        self.gguf = gguf
        self.config = json.loads((source / "config.json").read_text())
        self._tools = tools
        self._place = place
        self.upstream = verify_tokens.ask_upstream(source, place, place / "log")

    def changed(self, change: Callable[[Gguf], None]) -> Path:
        """Write the GGUF with one thing changed."""
        model = Gguf(self.gguf)
        change(model)
        bad = self._place / "changed.gguf"
        model.write(bad)
        return bad

    def vocabulary(self, gguf: Path) -> Check:
        """Judge what is written in a GGUF."""
        written = verify_tokens.vocabulary_of(gguf_header.read(gguf))
        return verify_tokens.vocabulary(self.upstream, written, self.config)

    def tokenized(self, gguf: Path, upstream: Upstream) -> Tokenized:
        """Let llama.cpp tokenize the strings of `upstream`."""
        asked = [
            (case.text, [upstream.ids[mode][index] is not None for mode in MODES])
            for index, case in enumerate(upstream.cases)
        ]
        return verify_tokens.ask_gguf(gguf, asked, self._tools, self._place, self._place / "log")

    def tokens(self, gguf: Path) -> Check:
        """Judge what becomes of texts."""
        written = verify_tokens.vocabulary_of(gguf_header.read(gguf))
        return verify_tokens.tokens(self.upstream, written, self.tokenized(gguf, self.upstream))


@pytest.fixture(scope="module")
def conversion(tools: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, converted by the real converter."""
    return converted(EMBEDDED, tmp_path_factory.mktemp("embedded"), tools)


@pytest.fixture(scope="module")
def embedded(conversion: Path, tools: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """A SentencePiece vocabulary of 1,024 tokens."""
    return Asked(EMBEDDED, conversion, tools, tmp_path_factory.mktemp("asked"))


@pytest.fixture(scope="module")
def gpt2(vocabularies: Path, tools: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """The byte-pair encoding of GPT-2: its real tokens and merges, without weights."""
    source = tmp_path_factory.mktemp("gpt2")
    family = architecture_factory.FAMILIES["gpt2"]
    known = architecture_factory.vocabulary(vocabularies, family.vocabulary)
    architecture_factory._write_tokenizer(family, source, known)
    config = {
        "model_type": "gpt2", "vocab_size": len(known.tokens), "bos_token_id": 50256,
        "eos_token_id": 50256,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    return Asked(
        source, vocabularies / "ggml-vocab-gpt-2.gguf", tools, tmp_path_factory.mktemp("asked")
    )


# --- what is right passes ---------------------------------------------------------------------


def test_the_embedded_model_has_upstreams_vocabulary_and_makes_its_tokens(
    conversion: Path, tools: Toolchain, tmp_path: Path
) -> None:
    """Over all strings in three ways, with no difference that would have to be excused."""
    vocabulary, tokens = verify_tokens.checks(subject(tmp_path, EMBEDDED, conversion, tools))
    assert (vocabulary.layer, vocabulary.outcome) == ("vocabulary", "PASS")
    assert "1,024 tokens" in vocabulary.sentence
    assert (tokens.layer, tokens.outcome, tokens.differing_count) == ("tokens", "PASS", 0)
    assert tokens.examined_count > 4_000
    assert '(1 "<s>" in front, nothing behind).' in tokens.sentence


def test_a_real_byte_pair_encoding_has_the_same_tokens_and_merges(gpt2: Asked) -> None:
    """50,257 tokens, 50,000 merges."""
    vocabulary, tokens = gpt2.vocabulary(gpt2.gguf), gpt2.tokens(gpt2.gguf)
    assert vocabulary.outcome == "PASS", vocabulary.sentence
    assert "50,000 merges; pre-tokenizer gpt-2" in vocabulary.sentence
    assert tokens.outcome == "PASS", tokens.sentence
    assert "whatever the conversion" not in tokens.sentence


@pytest.mark.parametrize("name", FIXTURES)
def test_llama_cpp_gives_the_token_ids_that_come_with_its_vocabularies(
    name: str, vocabularies: Path, tools: Toolchain, tmp_path: Path
) -> None:
    """So what is compared with upstream is what llama.cpp means, for vocabularies of all kinds."""
    gguf = vocabularies / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{gguf}.inp").read_text(encoding="utf-8").split(_INPUTS_END)
    lines = Path(f"{gguf}.out").read_text(encoding="utf-8").splitlines()
    wanted = [[int(word) for word in line.split()] for line in lines]
    found = verify_tokens.ask_gguf(
        gguf,
        [(text, (False, True, False)) for text in texts],
        tools,
        tmp_path,
        tmp_path / "log",
    )
    assert len(wanted) > 40
    assert [ids[1] for ids in found.ids[: len(wanted)]] == wanted


# --- what is wrong is found -------------------------------------------------------------------


def _eos(model: Gguf) -> None:
    model.set("tokenizer.ggml.eos_token_id", 5)


def _bos(model: Gguf) -> None:
    model.set("tokenizer.ggml.bos_token_id", 3)


def _texts_swapped(model: Gguf) -> None:
    tokens = model.value("tokenizer.ggml.tokens")
    tokens[600], tokens[601] = tokens[601], tokens[600]
    model.set("tokenizer.ggml.tokens", tokens)


def _retyped(id_: int, type_: int) -> Callable[[Gguf], None]:
    def change(model: Gguf) -> None:
        types = model.value("tokenizer.ggml.token_type")
        types[id_] = type_
        model.set("tokenizer.ggml.token_type", types)

    return change


def _lost(model: Gguf) -> None:
    tokens = model.value("tokenizer.ggml.tokens")
    tokens[4] = "[PAD4]"
    model.set("tokenizer.ggml.tokens", tokens)
    _retyped(4, 5)(model)


def _padded(model: Gguf) -> None:
    for key, fill in (("tokens", "[PAD1024]"), ("token_type", 5), ("scores", -1e3)):
        name = f"tokenizer.ggml.{key}"
        model.set(name, [*model.value(name), fill])


def _cut(model: Gguf) -> None:
    for key in ("tokens", "token_type", "scores"):
        name = f"tokenizer.ggml.{key}"
        model.set(name, model.value(name)[:-1])


def _scores_exchanged(model: Gguf) -> None:
    scores = model.value("tokenizer.ggml.scores")
    scores[600], scores[900] = scores[900], scores[600]
    model.set("tokenizer.ggml.scores", scores)


def _scores_lost(model: Gguf) -> None:
    del model.pairs["tokenizer.ggml.scores"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_eos, 'eos is 5 "<|assistant|>", upstream it is 2 "</s>"'),
        (_bos, 'bos is 3 "<|system|>", upstream it is 1 "<s>"'),
        (_texts_swapped, "token 600 is "),
        (_retyped(6, 1), 'token 6 "<|end|>" is normal, upstream it is control'),
        (_retyped(6, 4), 'token 6 "<|end|>" is user-defined, upstream it is control'),
        (_retyped(700, 3), "is control, upstream it is normal"),
        (_lost, 'token 4 is "[PAD4]", upstream\'s is "<|user|>"'),
        (_padded, "there are 1,025 tokens, upstream has room for 1,024"),
        (_cut, "token 1023 "),
        # No string of the corpus betrays this one.
        (_scores_exchanged, 'the score of token 600 "ity" is -637, upstream\'s -337'),
        (_scores_lost, "there are 1,024 tokens and scores of 0"),
    ],
    ids=["eos", "bos", "swapped", "control-to-normal", "control-to-user", "normal-to-control",
         "lost", "padded", "cut", "scores-exchanged", "scores-lost"],
)  # fmt: skip
def test_a_vocabulary_that_is_not_upstreams_fails_and_the_token_is_named(
    change: Callable[[Gguf], None], words: str, embedded: Asked
) -> None:
    """By what is written in the file, before any text is tokenized."""
    found = embedded.vocabulary(embedded.changed(change))
    assert found.outcome == "FAIL"
    assert found.differing_count >= 1
    assert words in " ".join((found.sentence, *found.findings))


def _merges_cut(model: Gguf) -> None:
    key = "tokenizer.ggml.merges"
    model.set(key, model.value(key)[:-100])


def _merges_exchanged(model: Gguf) -> None:
    key = "tokenizer.ggml.merges"
    merges = model.value(key)
    merges[500], merges[501] = merges[501], merges[500]
    model.set(key, merges)


def _pre(word: str) -> Callable[[Gguf], None]:
    return lambda model: model.set("tokenizer.ggml.pre", word)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_merges_cut, "there are 49,900 merges, upstream 50,000"),
        (_merges_exchanged, "merge 500 is "),
        (_pre("default"), 'tokenizer.ggml.pre says "default"'),
        (lambda model: model.pairs.pop("tokenizer.ggml.pre"), "tokenizer.ggml.pre says nothing"),
    ],
    ids=["merges-cut", "merges-exchanged", "pre-default", "pre-missing"],
)
def test_merges_or_a_pre_tokenizer_that_are_not_upstreams_fail(
    change: Callable[[Gguf], None], words: str, gpt2: Asked
) -> None:
    """A missing pre-tokenizer is what llama.cpp only warns of."""
    found = gpt2.vocabulary(gpt2.changed(change))
    assert found.outcome == "FAIL"
    assert words in " ".join((found.sentence, *found.findings))


def test_another_pre_tokenizer_gives_other_tokens(gpt2: Asked) -> None:
    """Which no look at the file shows: its name is one that llama.cpp knows."""
    bad = gpt2.changed(_pre("qwen2"))
    assert gpt2.vocabulary(bad).outcome == "PASS"
    found = gpt2.tokens(bad)
    assert found.outcome == "FAIL"
    assert found.differing_count > 100
    assert "from token" in found.findings[0]


def _no_bos(model: Gguf) -> None:
    model.set("tokenizer.ggml.add_bos_token", 0, _BOOL)


def _an_eos(model: Gguf) -> None:
    model.set("tokenizer.ggml.add_eos_token", 1, _BOOL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_no_bos, 'upstream puts 1 "<s>" in front of every text, the GGUF does not'),
        (_an_eos, "upstream puts nothing behind, the GGUF does"),
        (_texts_swapped, "from token"),
        # Not <|end|>, which llama.cpp knows by its name.
        (_retyped(4, 1), "special tokens"),
    ],
    ids=["bos", "eos", "swapped", "retyped"],
)
def test_tokens_that_are_not_upstreams_fail_and_the_string_is_named(
    change: Callable[[Gguf], None], words: str, embedded: Asked
) -> None:
    """A BOS too many or too few is said in words; all else by its string and position."""
    found = embedded.tokens(embedded.changed(change))
    assert found.outcome == "FAIL"
    assert words in " ".join((found.sentence, *found.findings))


def test_a_blank_in_front_of_every_text_is_found(embedded: Asked) -> None:
    """Upstream says that there is none (`add_prefix_space`)."""
    found = embedded.tokens(
        embedded.changed(lambda model: model.set("tokenizer.ggml.add_space_prefix", 1))
    )
    assert found.outcome == "FAIL"
    assert found.differing_count > 1_000


def test_a_vocabulary_on_which_llama_cpp_dies_is_a_fail_and_no_crash_of_ours(
    embedded: Asked,
) -> None:
    """It stops at a check of its own when two tokens have one text."""

    def twice(model: Gguf) -> None:
        tokens = model.value("tokenizer.ggml.tokens")
        tokens[700] = tokens[701]
        model.set("tokenizer.ggml.tokens", tokens)

    bad = embedded.changed(twice)
    assert embedded.vocabulary(bad).outcome == "FAIL"
    found = embedded.tokens(bad)
    assert found.outcome == "FAIL"
    assert "ended when it loaded the vocabulary: a failed check of its own" in found.sentence


# --- what is excused is counted ---------------------------------------------------------------


def _differing(asked: Asked, text: str, normalizers: set[str]) -> Check:
    """Judge one string on which both sides differ, upstream's having these normalizers."""
    upstream = dataclasses.replace(
        asked.upstream,
        normalizers=frozenset(normalizers),
        cases=(Case("x-0", "x", text),),
        ids={mode: [[1, 2, 3]] for mode in MODES},
    )
    tokenized = asked.tokenized(asked.gguf, upstream)
    written = verify_tokens.vocabulary_of(gguf_header.read(asked.gguf))
    return verify_tokens.tokens(upstream, written, tokenized)


@pytest.mark.parametrize(
    ("text", "normalizers", "outcome"),
    [
        ("e\u0301", {"NFC"}, "PASS"),
        ("e\u0301", set(), "FAIL"),
        ("plain", {"NFC"}, "FAIL"),
    ],
)
def test_only_strings_that_a_known_difference_explains_are_excused(
    text: str, normalizers: set[str], outcome: str, gpt2: Asked
) -> None:
    """Text that upstream brings into a normal form, and no other; and it is counted."""
    found = _differing(gpt2, text, normalizers)
    assert found.outcome == outcome
    if outcome == "PASS":
        assert "1 that differ whatever the conversion: 1 since llama.cpp does not" in found.sentence


@pytest.mark.parametrize(
    ("ids", "outcome"),
    [([3, 40], "PASS"), ([3, 41], "FAIL"), ([40], "FAIL"), ([3, 40, 3], "FAIL")],
    ids=["the-same-text", "another-letter", "without-the-token", "with-it-twice"],
)
def test_what_a_known_difference_does_not_explain_is_not_excused_with_it(
    ids: list[int], outcome: str, embedded: Asked
) -> None:
    """A blank too many behind a token is known; another text, or another token, is not."""
    written = dataclasses.replace(
        verify_tokens.vocabulary_of(gguf_header.read(embedded.gguf)),
        space_prefix=True,
        tokens=(*["x"] * 39, "\u2581a", "a", "b"),
    )
    upstream = dataclasses.replace(
        embedded.upstream,
        added={3: {"content": "<|s|>", "special": True, "lstrip": False, "rstrip": False}},
        pre_tokenizers=frozenset({"Metaspace"}),
        cases=(Case("x-0", "x", "<|s|>a"),),
        ids={mode: [[3, 39]] for mode in MODES},
    )
    tokenized = dataclasses.replace(
        embedded.tokenized(embedded.gguf, upstream), ids=((ids, ids, ids),)
    )
    assert verify_tokens.tokens(upstream, written, tokenized).outcome == outcome


# --- what cannot be asked ---------------------------------------------------------------------


def test_an_upstream_tokenizer_that_cannot_be_read_is_skipped_and_never_passed(
    conversion: Path, tools: Toolchain, tmp_path: Path
) -> None:
    """The sentence says why."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((EMBEDDED / "config.json").read_bytes())
    (source / "tokenizer.json").write_text("{}")
    checks = verify_tokens.checks(subject(tmp_path / "at", source, conversion, tools))
    assert [check.outcome for check in checks] == ["SKIP", "SKIP"]
    assert "upstream's tokenizer cannot be read" in checks[0].sentence


def test_a_tokenizer_that_wants_code_of_its_repository_gets_none_of_it_run(
    conversion: Path, tools: Toolchain, tmp_path: Path
) -> None:
    """Whatever it says: nothing is written by it."""
    source = tmp_path / "source"
    source.mkdir()
    ran = tmp_path / "ran"
    (source / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config"}})
    )
    (source / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    )
    (source / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    checks = verify_tokens.checks(subject(tmp_path / "at", source, conversion, tools))
    assert [check.outcome for check in checks] == ["SKIP", "SKIP"]
    assert not ran.exists()


def test_a_process_that_breaks_off_proves_nothing(
    conversion: Path, tools: Toolchain, tmp_path: Path
) -> None:
    """It is an error with a log, neither PASS nor FAIL."""
    log = tmp_path / "log"
    request: Any = [("text", (True, True))]
    with pytest.raises(ToolError) as caught:
        verify_tokens.ask_gguf(conversion, request, tools, tmp_path, log)
    assert caught.value.log == log
