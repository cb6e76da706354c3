"""
`vocabulary` and `tokens`: the GGUF has upstream's vocabulary, and makes the same tokens of text.

Two tokenizers are asked, neither of which is the converter: upstream's, as transformers loads it
(`upstream_tokens`), and llama.cpp's on the very GGUF (`gguf_tokens`). `vocabulary` compares what is
written in the file: texts, types and merges id by id, special tokens, the pre-tokenizer. `tokens`
compares what comes out for some thousand strings (`verify_corpus`) in three ways: with special
tokens in the text parsed, with them read as text, and with what a tokenizer adds.

llama.cpp is a second implementation and known to differ in a few ways whatever the conversion.
These are `KNOWN`, each with its reason and with the strings to which it applies; a string that
differs and to which none applies is a FAIL. Those excused are counted in the sentence, by reason.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from pipelines import apart, console, gguf_header, proc, verify_corpus
from pipelines.errors import MachineError, ToolError, UpstreamError
from pipelines.upstream_tokens import MODES
from pipelines.verify_corpus import Case
from pipelines.verify_records import Check
from pipelines.wording import clause, counted, listed, quoted, sentence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pipelines.gguf_header import Header
    from pipelines.toolchain import Toolchain
    from pipelines.verify_subject import Subject

TIMEOUT_S: Final = 600.0
MAX_FINDINGS: Final = 12
# How native code ends that does not like what it reads; killed from outside is no such end.
_DIED: Final = {
    -4: "an illegal instruction",
    -6: "a failed check of its own",
    -7: "a bus error",
    -8: "a division by zero",
    -11: "a segmentation fault",
}
_MODE_WORDS: Final = {
    "parsed": "special tokens parsed",
    "literal": "special tokens as text",
    "whole": "with what the tokenizer adds",
}

# llama.h, enum llama_token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_TYPE_WORDS: Final = ("undefined", "normal", "unknown", "control", "user-defined", "unused", "byte")
# Kinds of vocabularies whose texts the converter writes as they are, but for BERT's marks.
_SPELLED: Final = frozenset({"gpt2", "llama", "t5", "gemma4", "bert"})
# Kinds whose pieces have scores, and how equal these are: both sides keep float32.
_SCORED: Final = frozenset({"llama", "t5"})
_SCORE_TOLERANCE: Final = 1e-6
_BYTES_KINDS: Final = frozenset({"llama", "gemma4"})
_PADDING: Final = re.compile(r"\[PAD\d+\]")
_BYTE_TEXT: Final = re.compile(r"<0x[0-9A-F]{2}>")
# Roles without which a model is served wrong, and what llama.cpp assumes where they are missing
# (llama-vocab.cpp); a missing padding or unknown token harms nobody, cls is bos there, and sep
# matters where the tokenizer puts it behind a text.
_NEEDED: Final = ("bos", "eos")
_ASSUMED: Final = {
    ("llama", "bos"): 1,
    ("llama", "eos"): 2,
    ("bert", "bos"): 101,
    ("bert", "sep"): 102,
    ("gpt2", "bos"): 11,
    ("gpt2", "eos"): 11,
    ("t5", "eos"): 1,
}
# gguf-py/gguf/constants.py; the misspelling is theirs.
_ROLE_KEYS: Final = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding",
    "cls": "cls", "mask": "mask",
}  # fmt: skip
# The converter lets text have these tokens of Gemma 4, so that its chat parser sees them
# (conversion/gemma.py, visible_tokens).
_VISIBLE: Final = frozenset({
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
    "<tool_response|>", '<|"|>',
})  # fmt: skip
_LONGEST_WORD: Final = 100


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """
    What upstream's tokenizer has and makes of the corpus.

    Attributes:
        transformers: Version.
        tokenizer: Its class.
        tokens: Text of each id, None where there is none.
        added: {id: {content, special, normalized, lstrip, rstrip}} of the added tokens.
        special: {role: id} of bos, eos, unk, sep, pad, cls and mask.
        merges: Of a byte-pair encoding.
        scores: {text: score} of the pieces of SentencePiece, by which they are joined, or None.
        has_file: Whether there is a tokenizer.json, by which the converter goes.
        normalizers: Kinds that a fast tokenizer has.
        pre_tokenizers: Kinds that it has.
        cases: The strings.
        ids: {mode: token ids of each string, a text if it was refused, None if not asked}.
    """

    transformers: str
    tokenizer: str
    tokens: tuple[str | None, ...]
    added: dict[int, dict[str, Any]]
    special: dict[str, int | None]
    merges: tuple[tuple[str, str], ...] | None
    scores: dict[str, float] | None
    has_file: bool
    normalizers: frozenset[str]
    pre_tokenizers: frozenset[str]
    cases: tuple[Case, ...]
    ids: dict[str, list[list[int] | str | None]]

    @property
    def words(self) -> str:
        """Name it: `LlamaTokenizer of transformers 5.23.0`."""
        return f"{console.clean(self.tokenizer)} of transformers {self.transformers}"


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """
    What llama.cpp knows of a vocabulary and makes of strings.

    Attributes:
        tokens_count: Tokens.
        special: {role: id, -1 if there is none} of bos, eos, eot, sep, pad and mask.
        adds: Whether it adds {bos, eos, sep}.
        ends: Ids that end a generation.
        controls: Ids that it treats as control tokens, by their type or by their name.
        ids: Of each string one list for each of `MODES`, None where it was not asked.
        died: How it ended before the last string, if it did.
    """

    tokens_count: int
    special: dict[str, int]
    adds: dict[str, bool]
    ends: tuple[int, ...]
    controls: frozenset[int]
    ids: tuple[tuple[list[int] | None, ...], ...]
    died: str | None = None


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What is written in the GGUF."""

    kind: str
    pre: str | None
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    special: dict[str, int]
    rows: int | None
    space_prefix: bool

    @cached_property
    def is_spelled(self) -> bool:
        """Whether its texts are upstream's, so that they can be compared."""
        return self.kind in _SPELLED


def checks(subject: Subject) -> tuple[Check, ...]:
    """
    Compare vocabulary and tokens of a conversion with upstream's.

    Raises:
        MachineError: transformers, or one of the packages it needs, is missing.
        ToolError: One of the two processes failed; nothing is proven.
    """
    try:
        upstream = ask_upstream(subject.source, subject.scratch, subject.log)
    except UpstreamError as error:
        why = sentence(f"Not compared, since {clause(error.message)}")
        return skipped("vocabulary", why), skipped("tokens", why)
    asked = [
        (case.text, [upstream.ids[mode][index] is not None for mode in MODES])
        for index, case in enumerate(upstream.cases)
    ]
    tokenized = ask_gguf(subject.f16, asked, subject.tools, subject.scratch, subject.log)
    written = vocabulary_of(subject.header)
    return (
        vocabulary(upstream, written, subject.config),
        tokens(upstream, written, tokenized),
    )


def skipped(layer: Any, why: str) -> Check:  # noqa: ANN401 - one of Layer
    """Return the check of a layer that could not be looked at."""
    return Check(layer=layer, outcome="SKIP", examined_count=0, differing_count=0, sentence=why)


# --- asking -----------------------------------------------------------------------------------


def ask_upstream(source: Path, scratch: Path, log: Path) -> Upstream:
    """
    Let upstream's tokenizer say what it has and what it makes of the corpus.

    Raises:
        MachineError: Its packages are missing.
        UpstreamError: The tokenizer cannot be loaded without code of its repository, or at all.
        ToolError: The process failed.
    """
    path = scratch / "upstream-tokens.json"
    proc.run(
        apart.module("upstream's tokenizer", "pipelines.upstream_tokens", source.resolve(), path),
        log=log,
        env=apart.environment(scratch, ours=True),
        inherit_env=False,
        timeout_s=TIMEOUT_S,
    )
    answer = json.loads(path.read_bytes())
    failure = answer.get("failure")
    if failure is not None:
        cause = console.clean(failure["text"])[:300]
        if failure["kind"] == "import":
            raise MachineError(
                f"the Python packages that read upstream's tokenizer are incomplete: {cause}.",
                hint="Install the extra `convert`: make setup.",
                log=log,
            )
        raise UpstreamError(f"upstream's tokenizer cannot be read: {cause}.", log=log)
    merges = answer["merges"]
    return Upstream(
        transformers=answer["transformers"],
        tokenizer=answer["tokenizer"],
        tokens=tuple(answer["tokens"]),
        added={int(id_): fields for id_, fields in answer["added"].items()},
        special=answer["special"],
        merges=None if merges is None else tuple((left, right) for left, right in merges),
        scores=answer["scores"],
        has_file=(source / "tokenizer.json").is_file(),
        normalizers=frozenset(answer["normalizers"]),
        pre_tokenizers=frozenset(answer["pre_tokenizers"]),
        cases=tuple(Case(*case) for case in answer["cases"]),
        ids={mode: answer[mode] for mode in MODES},
    )


def ask_gguf(
    gguf: Path,
    asked: Sequence[tuple[str, Sequence[bool]]],
    tools: Toolchain,
    scratch: Path,
    log: Path,
) -> Tokenized:
    """
    Let llama.cpp tokenize strings with the vocabulary of a GGUF; no tensor is read.

    Args:
        gguf: The file.
        asked: Each string, with which of `MODES` are wanted.
        tools: Whose llama.cpp.
        scratch: Directory for the question and the answer.
        log: Gets what it prints.

    Raises:
        ToolError: The process failed otherwise than by native code that did not like the file.
    """
    request, path = scratch / "gguf-request.json", scratch / "gguf-tokens.jsonl"
    request.write_text(json.dumps([[text, list(modes)] for text, modes in asked]), encoding="ascii")
    path.unlink(missing_ok=True)
    environment = apart.environment(scratch, ours=True)
    bindings = tools.prefix / "python"
    done = proc.run(
        apart.module("llama.cpp", "pipelines.gguf_tokens", gguf.resolve(), request, path),
        log=log,
        env={
            **environment,
            **tools.python_env(),
            "PYTHONPATH": f"{bindings}:{environment['PYTHONPATH']}",
        },
        inherit_env=False,
        timeout_s=TIMEOUT_S,
        ok_codes=(0, *_DIED),
    )
    died = _DIED.get(done.code)
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    known: dict[str, Any] = json.loads(lines[0]) if lines else {"failure": "it wrote nothing"}
    if "failure" in known:
        return Tokenized(
            tokens_count=0,
            special={},
            adds={},
            ends=(),
            controls=frozenset(),
            ids=(),
            died=died or known["failure"],
        )
    if died is None and len(lines) != len(asked) + 1:
        raise ToolError("the process that asks llama.cpp for tokens broke off.", log=log)
    return Tokenized(
        tokens_count=known["tokens_count"],
        special=known["special"],
        adds=known["adds"],
        ends=tuple(known["ends"]),
        controls=frozenset(known["controls"]),
        ids=tuple(tuple(json.loads(line)) for line in lines[1:]),
        died=died,
    )


def vocabulary_of(header: Header) -> Vocabulary:
    """Read what is written in the GGUF; what is missing is empty."""
    metadata = header.metadata

    def values(key: str) -> list[Any]:
        found = metadata.get(f"tokenizer.ggml.{key}")
        return list(found.values()) if isinstance(found, gguf_header.Array) else []

    texts = values("tokens")
    pre = metadata.get("tokenizer.ggml.pre")
    embeddings = next((each for each in header.tensors if each.name == "token_embd.weight"), None)
    special = {
        role: metadata.get(f"tokenizer.ggml.{word}_token_id") for role, word in _ROLE_KEYS.items()
    }
    return Vocabulary(
        kind=str(metadata.get("tokenizer.ggml.model", "none")),
        pre=pre if isinstance(pre, str) else None,
        tokens=tuple(texts),
        types=tuple(values("token_type") or [NORMAL] * len(texts)),
        merges=tuple(values("merges")),
        scores=tuple(values("scores")),
        special={role: id_ for role, id_ in special.items() if isinstance(id_, int)},
        rows=embeddings.shape[1] if embeddings and len(embeddings.shape) > 1 else None,
        # llama-vocab.cpp: SentencePiece vocabularies have it unless they say otherwise.
        space_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
    )


# --- vocabulary -------------------------------------------------------------------------------


def vocabulary(upstream: Upstream, written: Vocabulary, config: Any) -> Check:  # noqa: ANN401 - config.json
    """
    Compare what is written in the GGUF with what upstream's tokenizer has.

    Args:
        upstream: Its tokens.
        written: The GGUF's.
        config: Upstream's config.json: where the tokenizer names no special token, it may.
    """
    findings = [
        *_sizes(upstream, written, config),
        *_texts(upstream, written),
        *_types(upstream, written),
        *_roles(upstream, written, config),
        *_merges(upstream, written),
        *_scores(upstream, written),
        *_pre_tokenizer(written),
    ]
    examined = len(written.tokens) + len(written.merges)
    if findings:
        return Check(
            layer="vocabulary",
            outcome="FAIL",
            examined_count=examined,
            differing_count=len(findings),
            sentence=sentence(
                f"{counted(len(findings), 'difference')} from {upstream.words}: {findings[0]}"
            ),
            findings=tuple(findings[:MAX_FINDINGS]),
        )
    padding = sum(text is None for text in upstream.tokens)
    padding += max(0, len(written.tokens) - len(upstream.tokens))
    what = "texts, types" if written.is_spelled else "types"
    said = (
        f"{counted(len(written.tokens), 'token')} have the {what} and roles that they have in "
        f"{upstream.words}"
    )
    if padding:
        said += f"; {padding:,} of them are upstream's padding"
    if upstream.added:
        said += f"; {counted(len(upstream.added), 'added token')}"
    if written.merges:
        said += f"; {counted(len(written.merges), 'merge')}"
    if upstream.scores is not None and written.kind in _SCORED:
        said += f"; {counted(len(written.scores), 'score')}"
    if written.kind == "gpt2":
        said += f"; pre-tokenizer {written.pre}"
    if not written.is_spelled:
        said += f"; texts not compared, since llama.cpp spells {quoted(written.kind)} otherwise"
    return Check(
        layer="vocabulary",
        outcome="PASS",
        examined_count=examined,
        differing_count=0,
        sentence=sentence(said),
    )


def _sizes(upstream: Upstream, written: Vocabulary, config: Any) -> Iterator[str]:  # noqa: ANN401 - as above
    """Yield what is missing, what is too much, and embeddings for other tokens than there are."""
    count = len(written.tokens)
    room = max(_room(config), len(upstream.tokens))
    if count > room:
        yield f"there are {count:,} tokens, upstream has room for {room:,}"
    for id_ in range(count, len(upstream.tokens)):
        if upstream.tokens[id_] is not None:
            yield f"token {id_} {quoted(upstream.tokens[id_] or '')} is missing"
    if written.rows is not None and written.rows != count:
        yield f"there are {count:,} tokens and embeddings for {written.rows:,}"
    if len(written.types) != count:
        yield f"there are {count:,} tokens and types of {len(written.types):,}"
    for id_ in range(count):
        known = id_ < len(upstream.tokens) and upstream.tokens[id_] is not None
        text, type_ = written.tokens[id_], _type(written, id_)
        if not known and (type_ != UNUSED or not _PADDING.fullmatch(text)):
            yield (
                f"token {id_} {quoted(text)}, {_word(type_)}, is none of upstream's and no padding"
            )


def _room(config: Any) -> int:  # noqa: ANN401 - as above
    """Return the rows that upstream's embeddings have, tokens and padding."""
    inner = config.get("text_config")
    told = [config, *([inner] if isinstance(inner, dict) else [])]
    sizes = [each.get("vocab_size") for each in told]
    multiple = config.get("pad_vocab_size_multiple")
    step = multiple if isinstance(multiple, int) and multiple > 0 else 1
    return max((-(-size // step) * step for size in sizes if isinstance(size, int)), default=0)


def _texts(upstream: Upstream, written: Vocabulary) -> Iterator[str]:
    """Yield ids whose text is another than upstream's."""
    if not written.is_spelled:
        return
    for id_, (wanted, got) in enumerate(zip(upstream.tokens, written.tokens, strict=False)):
        if wanted is not None and got not in _spellings(upstream, written, id_, wanted):
            yield f"token {id_} is {quoted(got)}, upstream's is {quoted(wanted)}"


def _spellings(upstream: Upstream, written: Vocabulary, id_: int, text: str) -> set[str]:
    """Return what a token may be called: the converter marks words of BERT, and blanks of added."""
    if id_ in upstream.added:
        return {text, text.replace("▁", " "), *_phantom(written, text)}
    return set(_phantom(written, text)) or {text}


def _phantom(written: Vocabulary, text: str) -> tuple[str, ...]:
    """Spell a token of BERT as llama.cpp does: `▁` where a word begins, else nothing."""
    if written.kind != "bert":
        return ()
    return (text[2:],) if text.startswith("##") else (f"▁{text}",)


def _types(upstream: Upstream, written: Vocabulary) -> Iterator[str]:
    """Yield ids whose type lets text become a token that it is not upstream, or the reverse."""
    for id_, text in enumerate(upstream.tokens[: len(written.types)]):
        if text is None:
            continue
        allowed = _allowed(upstream, written, id_, text)
        type_ = _type(written, id_)
        if type_ not in allowed:
            words = " or ".join(_word(each) for each in sorted(allowed))
            yield f"token {id_} {quoted(text)} is {_word(type_)}, upstream it is {words}"


def _allowed(upstream: Upstream, written: Vocabulary, id_: int, text: str) -> set[int]:
    added = upstream.added.get(id_)
    is_unknown = id_ == upstream.special["unk"]
    if added and added["special"]:
        visible = {USER_DEFINED} if text in _VISIBLE else set()
        return {CONTROL, *({UNKNOWN} if is_unknown else ())} | visible
    if added:
        return {USER_DEFINED, *({CONTROL} if _looks_special(text) else ())}
    if is_unknown:
        return {UNKNOWN, CONTROL, NORMAL}
    if id_ in upstream.special.values():
        return {CONTROL, NORMAL}
    if _BYTE_TEXT.fullmatch(text) and written.kind in _BYTES_KINDS:
        return {BYTE}
    return {NORMAL}


def _looks_special(text: str) -> bool:
    """Tell whether the converter takes a token for special by its name (conversion/base.py)."""
    return (
        text in {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))  # noqa: RUF001 - DeepSeek's
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _roles(upstream: Upstream, written: Vocabulary, config: Any) -> Iterator[str]:  # noqa: ANN401 - as above
    """Yield special tokens that are others than upstream's, or that are missing."""
    # What is added around a text is known by what the tokenizer did to the first plain one.
    around = _around(upstream)
    aliases = {"bos": upstream.special["cls"], "eos": upstream.special["sep"]}
    for role in _ROLE_KEYS:
        wanted = upstream.special[role]
        stated = _stated(config, role)
        got = written.special.get(role)
        if got is None:
            assumed = _ASSUMED.get((written.kind, role))
            is_needed = role in _NEEDED or (role == "sep" and wanted in around[1])
            if is_needed and wanted is not None and wanted != assumed:
                yield f"{role} is not stated, upstream it is {_named(upstream, wanted)}"
            continue
        allowed = {wanted} if wanted is not None else {*stated, aliases.get(role)}
        if role in {"bos", "eos", "sep", "cls"}:
            allowed |= around[role in {"eos", "sep"}]
        # Without a tokenizer.json the converter asks config.json, which is upstream's, too.
        allowed |= set() if upstream.has_file and wanted is not None else stated
        if got not in allowed:
            known = sorted(id_ for id_ in allowed if id_ is not None)
            words = listed([_named(upstream, id_) for id_ in known]) or "not stated"
            yield f"{role} is {_named(upstream, got)}, upstream it is {words}"


def _around(upstream: Upstream) -> tuple[set[int], set[int]]:
    """Return what the tokenizer puts in front of texts and behind."""
    for case, plain, whole in zip(
        upstream.cases, upstream.ids["parsed"], upstream.ids["whole"], strict=True
    ):
        if case.text == "Hello" and isinstance(plain, list) and isinstance(whole, list):
            for start in range(len(whole) - len(plain) + 1):
                if whole[start : start + len(plain)] == plain:
                    return set(whole[:start]), set(whole[start + len(plain) :])
    return set(), set()


def _stated(config: Any, role: str) -> set[int]:  # noqa: ANN401 - as above
    """Return the ids that config.json gives a role; it may be a list."""
    value = config.get(f"{role}_token_id")
    if value is None and isinstance(config.get("text_config"), dict):
        value = config["text_config"].get(f"{role}_token_id")
    values = value if isinstance(value, list) else [value]
    return {each for each in values if isinstance(each, int)}


def _merges(upstream: Upstream, written: Vocabulary) -> Iterator[str]:
    """Yield another number of merges, or the first that is another."""
    if upstream.merges is None or written.kind not in {"gpt2", "gemma4"}:
        return
    if len(upstream.merges) != len(written.merges):
        count = counted(len(written.merges), "merge")
        yield f"there are {count}, upstream {len(upstream.merges):,}"
    for rank, (pair, got) in enumerate(zip(upstream.merges, written.merges, strict=False)):
        # A blank inside of a part is written as the letter for it: vocab.py of gguf-py.
        wanted = " ".join(part.replace(" ", "Ġ") for part in pair)
        if wanted != got:
            yield f"merge {rank} is {quoted(got)}, upstream's is {quoted(wanted)}"
            return


def _scores(upstream: Upstream, written: Vocabulary) -> Iterator[str]:
    """
    Yield pieces whose score is another: no string of a corpus needs each of them.

    Added tokens are found in the text before any piece is; what score they have decides nothing.
    """
    if upstream.scores is None or written.kind not in _SCORED:
        return
    if len(written.scores) != len(written.tokens):
        yield f"there are {len(written.tokens):,} tokens and scores of {len(written.scores):,}"
    for id_, (text, got) in enumerate(zip(written.tokens, written.scores, strict=False)):
        wanted = upstream.scores.get(text)
        if wanted is None or id_ in upstream.added:
            continue
        if not math.isclose(got, wanted, rel_tol=_SCORE_TOLERANCE, abs_tol=_SCORE_TOLERANCE):
            yield f"the score of token {id_} {quoted(text)} is {got:.8g}, upstream's {wanted:.8g}"


def _pre_tokenizer(written: Vocabulary) -> Iterator[str]:
    """Yield a byte-pair encoding that says nothing of how text is split before its merges."""
    if written.kind == "gpt2" and written.pre in {None, "default"}:
        said = "nothing" if written.pre is None else '"default"'
        yield f"tokenizer.ggml.pre says {said}, so that llama.cpp guesses how text is split"


def _type(written: Vocabulary, id_: int) -> int:
    return written.types[id_] if id_ < len(written.types) else 0


def _word(type_: int) -> str:
    return _TYPE_WORDS[type_] if 0 <= type_ < len(_TYPE_WORDS) else f"of type {type_}"


def _named(upstream: Upstream, id_: int | None) -> str:
    """Name a token: `2 "</s>"`."""
    if id_ is None:
        return "none"
    text = upstream.tokens[id_] if 0 <= id_ < len(upstream.tokens) else None
    return f"{id_}" if text is None else f"{id_} {quoted(text)}"


# --- known differences ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What decides which known differences can occur."""

    upstream: Upstream
    written: Vocabulary
    tokenized: Tokenized

    @cached_property
    def stripping(self) -> tuple[tuple[str, bool, bool], ...]:
        """(text, takes blanks on its left, on its right) of added tokens that do."""
        return tuple(
            (each["content"], each["lstrip"], each["rstrip"])
            for each in self.upstream.added.values()
            if each["lstrip"] or each["rstrip"]
        )

    @cached_property
    def by_name(self) -> tuple[str, ...]:
        """
        Texts of tokens that are control tokens on one side only.

        llama.cpp makes some control tokens by their names (llama-vocab.cpp: "control-looking
        token"), and the converter others.
        """
        written = self.written
        ids = {
            id_
            for id_ in range(len(written.tokens))
            if (_type(written, id_) == CONTROL) != (id_ in self.tokenized.controls)
        }
        ids |= {
            id_
            for id_, each in self.upstream.added.items()
            if not each["special"] and _type(written, id_) == CONTROL
        }
        ids |= {
            id_
            for id_, each in self.upstream.added.items()
            if each["special"] and each["content"] in _VISIBLE
        }
        return tuple(written.tokens[id_] for id_ in sorted(ids) if id_ < len(written.tokens))

    @cached_property
    def added(self) -> tuple[str, ...]:
        """Texts of all added tokens."""
        return tuple(each["content"] for each in self.upstream.added.values())


class Known(NamedTuple):
    """
    A difference between llama.cpp and transformers that no conversion decides.

    `applies` tells the strings in which it can show. `keeps` says what has to be equal all the
    same: "text" that both spell the same but for blanks, "added" that they find the same added
    tokens, too, "nothing" that the text itself is changed before it is split.
    """

    reason: str
    applies: Callable[[str, _Facts], bool]
    keeps: Literal["nothing", "text", "added"]


_FORMS: Final = ("NFC", "NFD", "NFKC", "NFKD")


def _is_normalized(text: str, facts: _Facts) -> bool:
    return facts.written.kind == "gpt2" and any(
        form in facts.upstream.normalizers and unicodedata.normalize(form, text) != text
        for form in _FORMS
    )


def _is_by_name(text: str, facts: _Facts) -> bool:
    return any(name in text for name in facts.by_name)


def _is_beside_stripping(text: str, facts: _Facts) -> bool:
    for name, left, right in facts.stripping:
        for found in re.finditer(re.escape(name), text):
            before, after = text[: found.start()][-1:], text[found.end() :][:1]
            if (left and before.isspace()) or (right and after.isspace()):
                return True
    return False


def _is_behind_prefix(text: str, facts: _Facts) -> bool:
    if facts.written.kind != "llama" or not facts.written.space_prefix:
        return False
    return "Metaspace" in facts.upstream.pre_tokenizers and (
        text.startswith((" ", "▁")) or any(name in text for name in facts.added)
    )


def _is_beyond_word_piece(text: str, facts: _Facts) -> bool:
    if facts.written.kind != "bert":
        return False
    return any(
        unicodedata.category(character) in {"Mc", "Me"}
        or unicodedata.name(character, "").startswith("HANGUL")
        or character in "\v\f\x1c\x1d\x1e\x1f\x85▁"
        for character in text
    ) or any(len(word) > _LONGEST_WORD for word in re.split(r"\W+|_", text))


# Blanks for which llama.cpp has a vertical tab stand in while it splits (unicode.cpp: std::wregex
# knows no others), so that a class that names one of them, or the tab, means something else there.
# These two pre-tokenizers have such classes, and these strings of the corpus show it.
_RARE_BLANKS: Final = {"deepseek-llm": "\u3000\u2028\u2029", "falcon": "\v"}


def _is_rare_blank(text: str, facts: _Facts) -> bool:
    return any(blank in text for blank in _RARE_BLANKS.get(facts.written.pre or "", ""))


KNOWN: Final = (
    Known(
        "llama.cpp does not bring text into Unicode's normal form first", _is_normalized, "nothing"
    ),
    Known("llama.cpp tells some control tokens by their names", _is_by_name, "text"),
    Known(
        "llama.cpp keeps the blanks beside a token that swallows them",
        _is_beside_stripping,
        "added",
    ),
    Known(
        "llama.cpp puts a blank in front of a text that begins with one or follows a token",
        _is_behind_prefix,
        "added",
    ),
    Known(
        "llama.cpp's WordPiece drops more marks than accents, does not split Hangul, and has no "
        "longest word",
        _is_beyond_word_piece,
        "nothing",
    ),
    Known(
        "llama.cpp's rules for this pre-tokenizer group rare blanks otherwise",
        _is_rare_blank,
        "added",
    ),
)
_PRINTABLE: Final = (*range(33, 127), *range(161, 173), *range(174, 256))
# How byte-pair encodings write bytes: those that can be seen as they are, the others behind 256.
_LETTERS: Final = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + number): byte for number, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))
}


def _spelled(written: Vocabulary, ids: Sequence[int]) -> str:
    """Put the text of tokens together again, without any blanks."""
    data = bytearray()
    for id_ in ids:
        text = written.tokens[id_] if 0 <= id_ < len(written.tokens) else "?"
        if _BYTE_TEXT.fullmatch(text):
            data.append(int(text[3:5], 16))
        elif written.kind == "gpt2":
            for letter in text:
                byte = _LETTERS.get(letter)
                data += letter.encode() if byte is None else bytes([byte])
        else:
            data += text.replace("▁", " ").encode()
    return "".join(data.decode(errors="replace").split())


def _is_kept(known: Known, index: int, facts: _Facts) -> bool:
    """Tell whether a string is the same in all that a known difference leaves alone."""
    if known.keeps == "nothing":
        return True
    added = facts.upstream.added
    for position, mode in enumerate(MODES):
        wanted, got = facts.upstream.ids[mode][index], facts.tokenized.ids[index][position]
        if not isinstance(wanted, list) or got is None:
            continue
        if _spelled(facts.written, wanted) != _spelled(facts.written, got):
            return False
        if known.keeps == "added" and (
            [id_ for id_ in wanted if id_ in added] != [id_ for id_ in got if id_ in added]
        ):
            return False
    return True


# --- tokens -----------------------------------------------------------------------------------


def tokens(upstream: Upstream, written: Vocabulary, tokenized: Tokenized) -> Check:
    """Compare the tokens that both sides make of each string."""
    cases = upstream.cases
    if len(tokenized.ids) < len(cases):
        at = cases[len(tokenized.ids)]
        where = f"on {at.id} {quoted(at.text)}"
        if not tokenized.tokens_count:
            where = "when it loaded the vocabulary"
        return Check(
            layer="tokens",
            outcome="FAIL",
            examined_count=len(tokenized.ids),
            differing_count=1,
            sentence=sentence(f"llama.cpp's tokenizer ended {where}: {tokenized.died}"),
        )
    facts = _Facts(upstream=upstream, written=written, tokenized=tokenized)
    excused: dict[str, int] = {}
    findings: list[str] = []
    refused = 0
    for index, case in enumerate(cases):
        found = _difference(upstream, tokenized, index)
        if found is None:
            continue
        if isinstance(upstream.ids["parsed"][index], str):
            refused += 1
            continue
        reason = next(
            (
                each.reason
                for each in KNOWN
                if each.applies(case.text, facts) and _is_kept(each, index, facts)
            ),
            None,
        )
        if reason is None:
            findings.append(found)
        else:
            excused[reason] = excused.get(reason, 0) + 1
    corpus = f"corpus {verify_corpus.VERSION}, sha256 {verify_corpus.digest(cases)[:12]}"
    if findings:
        return Check(
            layer="tokens",
            outcome="FAIL",
            examined_count=len(cases),
            differing_count=len(findings),
            sentence=sentence(
                f"{len(findings):,} of {counted(len(cases), 'string')} ({corpus}) give other "
                f"tokens than {upstream.words}: {_policy(upstream, tokenized) or findings[0]}"
            ),
            findings=tuple(findings[:MAX_FINDINGS]),
        )
    said = (
        f"{counted(len(cases), 'string')} ({corpus}) give the tokens of {upstream.words}, read "
        f"three ways: {listed([_MODE_WORDS[mode] for mode in MODES])} ({_additions(upstream)})"
    )
    if excused:
        known = "; ".join(f"{count:,} since {reason}" for reason, count in excused.items())
        said += f", but {sum(excused.values()):,} that differ whatever the conversion: {known}"
    if refused:
        said += f"; {refused:,} were refused upstream"
    return Check(
        layer="tokens",
        outcome="PASS",
        examined_count=len(cases),
        differing_count=0,
        sentence=sentence(said),
    )


def _difference(upstream: Upstream, tokenized: Tokenized, index: int) -> str | None:
    """Say in which way a string differs first, from which token on, or None."""
    case = upstream.cases[index]
    for position, mode in enumerate(MODES):
        wanted, got = upstream.ids[mode][index], tokenized.ids[index][position]
        if wanted == got:
            continue
        if not isinstance(wanted, list) or got is None:
            return f"{case.id} {quoted(case.text)}: upstream refuses it"
        at = next(
            (i for i, (one, other) in enumerate(zip(wanted, got, strict=False)) if one != other),
            min(len(wanted), len(got)),
        )
        return (
            f"{case.id} {quoted(case.text)}, {_MODE_WORDS[mode]}: from token {at} on "
            f"{_few(got, at)}, upstream {_few(wanted, at)}"
        )
    return None


def _few(ids: Sequence[int], at: int) -> str:
    """Show the ids from the first difference on."""
    shown = ", ".join(str(id_) for id_ in ids[at : at + 4])
    return f"[{shown}{', …' if len(ids) > at + 4 else ''}]"


def _policy(upstream: Upstream, tokenized: Tokenized) -> str | None:
    """Say it where one side puts a token in front or behind that the other does not."""
    front, behind = _around(upstream)
    for word, ids, adds in (
        ("in front", front, tokenized.adds.get("bos")),
        ("behind", behind, tokenized.adds.get("eos") or tokenized.adds.get("sep")),
    ):
        if bool(ids) != bool(adds):
            names = listed([_named(upstream, id_) for id_ in sorted(ids)])
            does = f"puts {names} {word} of every text" if ids else f"puts nothing {word}"
            return f"upstream {does}, the GGUF {'does not' if ids else 'does'}"
    return None


def _additions(upstream: Upstream) -> str:
    front, behind = (
        listed([_named(upstream, id_) for id_ in sorted(ids)]) for ids in _around(upstream)
    )
    return f"{front or 'nothing'} in front, {behind or 'nothing'} behind"
