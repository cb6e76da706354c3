"""
What upstream's own tokenizer makes of the adversarial corpus: the process that asks it.

It runs apart (`pipelines.apart`), without network and without the code of the model's repository.
transformers loads what every user of the model loads: the fast tokenizer where there is one, else
the slow one. It builds the corpus itself, since a part of that is made of the tokenizer's tokens.

Each string is encoded three times, which are the three that llama.cpp knows:
    parsed     special tokens in the text are tokens; nothing is added
    literal    special tokens in the text are text (`split_special_tokens`)
    whole      as parsed, with what the tokenizer adds (BOS, EOS, CLS, SEP)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import apart, atomic, verify_corpus

if TYPE_CHECKING:
    from collections.abc import Sequence

MODES: Final = ("parsed", "literal", "whole")
_SPECIAL: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Of the one long line only what users send: the other two differ by nothing that depends on length.
_LONG: Final = "long-line"


def main(argv: Sequence[str]) -> int:
    """Ask the tokenizer in SOURCE and write ANSWER."""
    source, answer = (Path(word) for word in argv)
    try:
        result = _answer(source)
    except ImportError as error:
        if apart.is_ours(error):
            raise
        result = {"failure": {"kind": "import", "text": str(error)}}
    except Exception as error:  # noqa: BLE001 - a tokenizer of a stranger can fail in any way
        result = {"failure": {"kind": "tokenizer", "text": f"{type(error).__name__}: {error}"}}
    atomic.write_json(answer, result)
    return 0


def _split_as_declared(tokenizer: Any, declared: Path) -> None:  # noqa: ANN401 - no types
    """
    Let a GPT2Tokenizer split text as its tokenizer.json says.

    The class of transformers 5 puts GPT-2's own split in its place (tokenization_gpt2.py). Families
    that name this class and split otherwise, digit by digit as StarCoder, were not trained so.
    """
    if type(tokenizer).__name__ != "GPT2Tokenizer" or not declared.is_file():
        return
    from tokenizers import Tokenizer  # noqa: PLC0415 - as in `_answer`

    split = Tokenizer.from_file(str(declared)).pre_tokenizer
    if split is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = split


def _answer(source: Path) -> dict[str, Any]:
    import transformers  # noqa: PLC0415 - seconds, and only in this process

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(source), trust_remote_code=False, local_files_only=True
    )
    _split_as_declared(tokenizer, source / "tokenizer.json")
    tokens = _tokens(tokenizer)
    added = tokenizer.added_tokens_decoder
    cases = [
        *verify_corpus.fixed(),
        *verify_corpus.of_model(
            [added[id_].content for id_ in sorted(added)],
            len(tokens),
            lambda id_: tokenizer.decode([id_], clean_up_tokenization_spaces=False),
        ),
    ]
    return {
        "transformers": transformers.__version__,
        "tokenizer": type(tokenizer).__name__,
        "tokens": tokens,
        "added": {
            str(id_): {
                "content": token.content,
                "special": token.special,
                "normalized": token.normalized,
                "lstrip": token.lstrip,
                "rstrip": token.rstrip,
            }
            for id_, token in sorted(added.items())
        },
        "special": {word: getattr(tokenizer, f"{word}_token_id", None) for word in _SPECIAL},
        "merges": _merges(tokenizer),
        "scores": _scores(source, tokenizer),
        "normalizers": _kinds(tokenizer, "normalizer"),
        "pre_tokenizers": _kinds(tokenizer, "pre_tokenizer"),
        "cases": [list(case) for case in cases],
        **{
            mode: [
                _encoded(tokenizer, case.text, mode)
                if mode == "parsed" or case.category != _LONG
                else None
                for case in cases
            ]
            for mode in MODES
        },
    }


def _tokens(tokenizer: Any) -> list[str | None]:  # noqa: ANN401 - transformers has no types
    """Return the text of each id, None where there is none."""
    by_id = {id_: text for text, id_ in tokenizer.get_vocab().items()}
    return [by_id.get(id_) for id_ in range(max(by_id, default=-1) + 1)]


def _merges(tokenizer: Any) -> list[list[str]] | None:  # noqa: ANN401 - as above
    """Return the merges of a byte-pair encoding in their order, None where there are none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    merges = json.loads(backend.to_str())["model"].get("merges")
    if merges is None:
        return None
    return [pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in merges]


def _scores(source: Path, tokenizer: Any) -> dict[str, float] | None:  # noqa: ANN401 - as above
    """
    Return by which scores pieces are joined or chosen, None of a vocabulary that has none.

    SentencePiece's own file has them. Without it a unigram model of tokenizer.json does.
    """
    own = source / "tokenizer.model"
    if own.is_file():
        import sentencepiece  # noqa: PLC0415 - a library of the extra `convert`

        pieces = sentencepiece.SentencePieceProcessor()
        pieces.Load(str(own))
        return {pieces.IdToPiece(id_): pieces.GetScore(id_) for id_ in range(pieces.GetPieceSize())}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    if model.get("type") != "Unigram":
        return None
    return {text: float(score) for text, score in model["vocab"]}


def _kinds(tokenizer: Any, part: str) -> list[str]:  # noqa: ANN401 - as above
    """Return the kinds of normalizers or pre-tokenizers that a fast tokenizer is made of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str())[part] if backend is not None else None
    return [] if described is None else sorted(set(_kinds_in(described)))


def _kinds_in(described: dict[str, Any]) -> list[str]:
    parts = described.get("normalizers", described.get("pretokenizers", []))
    return [described["type"], *(kind for part in parts for kind in _kinds_in(part))]


def _encoded(tokenizer: Any, text: str, mode: str) -> list[int] | str:  # noqa: ANN401 - as above
    """Return token ids, or the words in which the tokenizer refused the string."""
    try:
        return list(
            tokenizer(
                text,
                add_special_tokens=mode == "whole",
                split_special_tokens=mode == "literal",
                verbose=False,
            )["input_ids"]
        )
    except Exception as error:  # noqa: BLE001 - as above
        return f"{type(error).__name__}: {error}"[:300]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
