"""
Log-likelihoods of continuations, computed by the toolchain's own libraries: a program of its own.

    python evals_scorer.py REQUEST.json      one line of JSON on stdout for each item

The request is {model, threads, gpu_layers, context_tokens, items: [{prompt, choices}]}; the answer
to an item is {nats: [...]}, one log-likelihood for each choice. If an item cannot be scored with
this model, the only answer is {item: NUMBER, problem: "..."}.

A choice is tokenized together with its prompt, since the two may share a token. What is scored
starts where the first token lies that is not one of the prompt alone; everything before it is equal
for all choices. So the difference between two choices is that of the probabilities of two whole
texts, wherever a tokenizer puts the border.

The prompt is computed once for all of its choices, which are sequences that share it, and several
items are computed at once. A recurrent model has a state instead of cells that could be shared:
there every choice is computed whole and alone.

Nothing of the package is imported here: it runs with the bindings on PYTHONPATH (see
`Toolchain.python_env`), and its own folder is no place for modules.

Source: include/llama.h of the pinned commit; tools/perplexity/perplexity.cpp shares prompts alike.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np

# llama.cpp's own defaults: a batch is computed in parts of this many tokens.
_UBATCH_TOKENS: Final = 512
# llama.cpp rounds contexts up to this (GGML_PAD in llama-context.cpp).
_CONTEXT_STEP: Final = 256
_FLASH_ATTENTION_OFF: Final = 0

Tokens = list[int]
# What all choices of an item share, and what each has behind it.
Item = tuple[Tokens, list[Tokens]]


class ScoringError(Exception):
    """The model cannot be loaded, or computes nothing that could be used."""


class Problem(Exception):  # noqa: N818 - no error of ours: an item that this model cannot do
    """One item cannot be scored with this model."""


class Scorer:
    """A loaded model and a context that holds the largest item."""

    def __init__(self, path: str, *, threads: int, gpu_layers: int, context_tokens: int) -> None:
        """
        Load a model.

        Raises:
            ScoringError: llama.cpp refuses it.
        """
        self._threads = threads
        self._context_tokens = context_tokens
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise ScoringError("llama.cpp cannot load the model")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._has_state = llama_cpp.llama_model_is_recurrent(
            self._model
        ) or llama_cpp.llama_model_is_hybrid(self._model)
        self._context: Any = None

    def tokens(self, text: str) -> Tokens:
        """Tokenize as a completion does: a BOS if the model has one, control tokens as text."""
        data = text.encode()
        room = len(data) + 16
        buffer = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(
            self._vocab,
            data,
            len(data),
            buffer,
            room,
            True,  # noqa: FBT003 - C
            False,  # noqa: FBT003 - C
        )
        if count < 0:
            raise Problem("the tokenizer refuses it")
        return list(buffer[:count])

    def parts(self, prompt: str, choices: list[str]) -> Item:
        """
        Return the tokens that all choices share, and those of each choice behind them.

        Raises:
            Problem: There is nothing before a choice, nothing of it, or too much of both.
        """
        alone = self.tokens(prompt)
        whole = [self.tokens(prompt + choice) for choice in choices]
        shared = min(_equal_tokens(alone, each) for each in whole)
        if shared == 0:
            raise Problem("the prompt has no token of its own before the choices")
        if min(map(len, whole)) == shared:
            raise Problem("a choice adds no token to the prompt")
        longest = max(map(len, whole))
        if longest > self._context_tokens:
            raise Problem(
                f"{longest:,} tokens do not fit into the context of {self._context_tokens:,}"
            )
        return alone[:shared], [each[shared:] for each in whole]

    def packed(self, items: list[Item]) -> list[list[Item]]:
        """
        Put items together that are computed at once: as many as fill one part of a batch.

        Small models spend most of their time between two calls. How items fall together depends on
        the tokenizer alone, so it is the same for f16 and its quants.
        """
        most = 1 if self._has_state else llama_cpp.llama_max_parallel_sequences()
        groups: list[list[Item]] = []
        cells = sequences = 0
        for item in items:
            cells, sequences = cells + _cells(item), sequences + len(item[1])
            if not groups or cells > _UBATCH_TOKENS or sequences > most:
                groups.append([])
                cells, sequences = _cells(item), len(item[1])
            groups[-1].append(item)
        return groups

    def prepare(self, groups: list[list[Item]]) -> None:
        """
        Make a context for the largest group.

        Raises:
            ScoringError: llama.cpp refuses, most often for want of memory.
        """
        cells = max(sum(map(_cells, group)) for group in groups)
        cells = -(-cells // _CONTEXT_STEP) * _CONTEXT_STEP
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = cells
        params.n_ubatch = min(_UBATCH_TOKENS, cells)
        params.n_seq_max = (
            1 if self._has_state else max(sum(len(rests) for _, rests in group) for group in groups)
        )
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = _FLASH_ATTENTION_OFF
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ScoringError(f"llama.cpp makes no context of {cells:,} tokens")
        self._batch = llama_cpp.llama_batch_init(cells, 0, params.n_seq_max)

    def nats(self, group: list[Item]) -> list[list[float]]:
        """
        Return, for each item, the log-likelihood of each rest behind what they share.

        Raises:
            ScoringError: llama.cpp fails, or a logit is not finite.
        """
        if self._has_state:
            return [
                [self._together([(shared, [rest])])[0][0] for rest in rests]
                for shared, rests in group
            ]
        return self._together(group)

    def _together(self, group: list[Item]) -> list[list[float]]:
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, True)  # noqa: FBT003 - C
        self._batch.n_tokens = 0
        sequence = 0
        # Where each token of each rest is predicted: at the one before it.
        places: list[list[list[int]]] = []
        for shared, rests in group:
            everyone = range(sequence, sequence + len(rests))
            for position, token in enumerate(shared):
                self._add(token, position, everyone, wanted=position == len(shared) - 1)
            last = self._batch.n_tokens - 1
            places.append([])
            for own, rest in zip(everyone, rests, strict=True):
                first = self._batch.n_tokens
                places[-1].append([last, *range(first, first + len(rest) - 1)])
                for i, token in enumerate(rest):
                    self._add(token, len(shared) + i, (own,), wanted=i < len(rest) - 1)
            sequence += len(rests)
        if code := llama_cpp.llama_decode(self._context, self._batch):
            raise ScoringError(f"llama_decode failed with {code}")
        return [
            [
                sum(map(self._log_probability, where, rest))
                for where, rest in zip(of_item, rests, strict=True)
            ]
            for of_item, (_, rests) in zip(places, group, strict=True)
        ]

    def _add(
        self, token: int, position: int, sequences: range | tuple[int], *, wanted: bool
    ) -> None:
        at = self._batch.n_tokens
        self._batch.token[at] = token
        self._batch.pos[at] = position
        self._batch.n_seq_id[at] = len(sequences)
        for i, sequence in enumerate(sequences):
            self._batch.seq_id[at][i] = sequence
        self._batch.logits[at] = wanted
        self._batch.n_tokens = at + 1

    def _log_probability(self, place: int, token: int) -> float:
        """Return ln p(token) as the logits of one place of the batch say, in nats."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, place)
        if not pointer:
            raise ScoringError("llama.cpp has no logits for a token that it was asked for")
        row = np.ctypeslib.as_array(pointer, shape=(self._vocabulary,)).astype(np.float64)
        largest = row.max()
        value = row[token] - largest - np.log(np.exp(row - largest).sum())
        if not np.isfinite(value):
            raise ScoringError("a log-likelihood is not finite: the model computes no numbers")
        return float(value)


def _equal_tokens(first: Tokens, second: Tokens) -> int:
    """Return how many tokens at the beginning of both are equal."""
    for i, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return i
    return min(len(first), len(second))


def _cells(item: Item) -> int:
    shared, rests = item
    return len(shared) + sum(map(len, rests))


def main(path: str) -> int:
    """Score what a request asks for."""
    asked = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        scorer = Scorer(
            asked["model"],
            threads=asked["threads"],
            gpu_layers=asked["gpu_layers"],
            context_tokens=asked["context_tokens"],
        )
        items = _tokenized(scorer, asked["items"])
        if items is None:
            return 0
        groups = scorer.packed(items)
        scorer.prepare(groups)
        for group in groups:
            for nats in scorer.nats(group):
                _tell({"nats": nats})
    except ScoringError as error:
        sys.stderr.write(f"evals_scorer: {error}\n")
        return 1
    return 0


def _tokenized(scorer: Scorer, asked: list[dict[str, Any]]) -> list[Item] | None:
    """Tokenize all items; None if one cannot be scored, which has been told then."""
    items: list[Item] = []
    for number, each in enumerate(asked):
        try:
            items.append(scorer.parts(each["prompt"], each["choices"]))
        except Problem as problem:
            _tell({"item": number, "problem": str(problem)})
            return None
    return items


def _tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
