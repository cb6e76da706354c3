"""
What became of a tokenizer, in words: sizes, ids that mean another token, parts that work otherwise.

An id that means another token is the fault that nothing else shows: a model goes on and writes
other words. A pre-tokenizer that changed may be one that llama.cpp does not know: it recognises
them by what they make of a fixed text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pipelines import wording
from pipelines.upstream_difference_words import (
    NotToldError,
    changed,
    clause,
    quoted,
    text_of,
    value,
    written,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PARTS: Final = (
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "truncation",
    "padding",
)
_FEW: Final = 4
# llama.cpp's converter finds the pre-tokenizer by a hash (conversion/base.py, chkhsh).
_BY_HASH: Final = "llama.cpp stops at one that it does not know"


def of_tokenizer_json(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """
    Say what differs between two tokenizer.json.

    Raises:
        NotToldError: One of them has not the parts of a tokenizer.
    """
    then, now = _Tokenizer(old), _Tokenizer(new)
    clauses = [
        *_ids(then.tokens, now.tokens),
        *_added(then.added, now.added),
        *_merges(then.merges, now.merges),
    ]
    if then.kind != now.kind:
        clauses.append(f"the model is {value(now.kind)}, was {value(then.kind)}")
    clauses += [
        f"{part} changed{f' ({_BY_HASH})' if part in {'normalizer', 'pre_tokenizer'} else ''}"
        for part in _PARTS
        if written(old.get(part)) != written(new.get(part))
    ]
    if then.options != now.options:
        keys = changed(then.options, now.options)
        clauses += [clause(key, then.options, now.options) for key in keys]
    if then.scores != now.scores:
        clauses.append("scores of tokens changed")
    return clauses


class _Tokenizer:
    """The parts of a tokenizer.json that decide ids."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        model = told.get("model")
        if not isinstance(model, dict):
            raise NotToldError("it has no model")
        self.kind = model.get("type")
        self.merges: list[Any] = _list(model.get("merges"), "merges")
        self.options = {
            key: each for key, each in model.items() if key not in {"type", "vocab", "merges"}
        }
        self.scores: dict[str, object] = {}
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            self.tokens = _by_id(vocabulary)
        else:  # Unigram: [token, score], by position
            pairs = _list(vocabulary, "vocab")
            if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):  # noqa: PLR2004 - a pair
                raise NotToldError("its vocabulary is neither an object nor a list of pairs")
            self.tokens = {at: str(pair[0]) for at, pair in enumerate(pairs)}
            self.scores = {str(pair[0]): written(pair[1]) for pair in pairs}
        self.added: dict[str, dict[str, Any]] = {}
        for each in _list(told.get("added_tokens"), "added_tokens"):
            if not isinstance(each, dict) or type(each.get("id")) is not int:
                raise NotToldError("one of its added tokens has no id")
            content = str(each.get("content"))
            self.added[content] = {key: flag for key, flag in each.items() if key != "content"}
            self.tokens[each["id"]] = content


def _list(told: object, what: str) -> list[Any]:
    if told is None:
        return []
    if not isinstance(told, list):
        raise NotToldError(f"its {what} is no list")
    return told


def _by_id(vocabulary: Mapping[str, object]) -> dict[int, str]:
    if not all(type(id_) is int for id_ in vocabulary.values()):
        raise NotToldError("an id in its vocabulary is no integer")
    return {id_: token for token, id_ in vocabulary.items() if isinstance(id_, int)}


def _ids(then: Mapping[int, str], now: Mapping[int, str]) -> list[str]:
    """Say how many tokens there are, and which ids mean another one."""
    clauses = []
    if len(then) != len(now):
        clauses.append(f"{len(then):,} -> {len(now):,} tokens")
    other = sorted(id_ for id_ in then.keys() & now.keys() if then[id_] != now[id_])
    if other:
        examples = ", ".join(
            f"{id_}: {quoted(then[id_])} -> {quoted(now[id_])}" for id_ in other[:_FEW]
        )
        clauses.append(
            f"{wording.counted(len(other), 'token id')} "
            f"{'means' if len(other) == 1 else 'mean'} another token ({examples}"
            f"{', …' if len(other) > _FEW else ''})"
        )
    if lost := sorted(then.keys() - now.keys()):
        examples = ", ".join(f"{id_}: {quoted(then[id_])}" for id_ in lost[:_FEW])
        clauses.append(f"{wording.counted(len(lost), 'token id')} gone ({examples})")
    return clauses


def _added(then: Mapping[str, dict[str, Any]], now: Mapping[str, dict[str, Any]]) -> list[str]:
    """Say which added tokens came, went, or are treated otherwise."""
    clauses = []
    for names, what in (
        ([token for token in now if token not in then], "new"),
        ([token for token in then if token not in now], "gone"),
    ):  # fmt: skip
        if names:
            more = ", …" if len(names) > _FEW else ""
            shown = ", ".join(quoted(each) for each in names[:_FEW])
            clauses.append(f"{wording.counted(len(names), 'added token')} {what}: {shown}{more}")
    other = [each for each in then if each in now and written(then[each]) != written(now[each])]
    for token in other[:_FEW]:
        keys = changed(then[token], now[token])
        told = ", ".join(clause(key, then[token], now[token]) for key in keys)
        clauses.append(f"{quoted(token)}: {told}")
    if len(other) > _FEW:
        clauses.append(f"{len(other) - _FEW:,} more added tokens are treated otherwise")
    return clauses


def _merges(then: Sequence[Any], now: Sequence[Any]) -> list[str]:
    # One version of the library writes a merge as `a b`, the next one as a pair.
    before, after = ([_merge(each) for each in merges] for merges in (then, now))
    if before == after:
        return []
    if len(before) != len(after):
        return [f"{len(before):,} -> {len(after):,} merges"]
    count = sum(one != other for one, other in zip(before, after, strict=True))
    return [f"{count:,} of {len(after):,} merges are others"]


def _merge(told: object) -> str:
    if isinstance(told, list) and all(isinstance(each, str) for each in told):
        return " ".join(told)
    return told if isinstance(told, str) else written(told)


def of_vocabulary(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """
    Say what differs between two objects from token to id: vocab.json, added_tokens.json.

    Raises:
        NotToldError: An id is no number.
    """
    return _ids(_by_id(old), _by_id(new))


def of_lines(old: bytes, new: bytes) -> list[str]:
    """
    Say what differs between two lists with an entry in each line: merges.txt, vocab.txt.

    Raises:
        NotToldError: One of them is no text.
    """
    before, after = (text_of(raw).splitlines() for raw in (old, new))
    count = sum(one != other for one, other in zip(before, after, strict=False))
    clauses = [f"{len(before):,} -> {len(after):,} lines"] if len(before) != len(after) else []
    if count:
        clauses.append(f"{wording.counted(count, 'line')} say something else")
    return clauses or ["only line ends differ"]
