"""
What quantizing does to an encoder: cosines between its embeddings and those of its own f16.

The texts are cut from the evaluation corpus, of lengths from a few words up to the window of
`benchmark.quality`, spread evenly over the corpus, the same for all quants of a model. The f16's
embeddings are made once, with the texts, and kept in scratch under a name of all that decides them.

Two numbers beside the mean: the 1st percentile, since a search fails at the texts that moved most,
and the share of texts whose nearest other text is still the same, which is what a search returns.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from pipelines import atomic, console, llama_embeddings, machine, measuring, records
from pipelines.errors import ParamsError, ToolError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from pipelines.benchmark import Bench
    from pipelines.llama_embeddings import Embedded, Embedder
    from pipelines.llamacpp import Execution
    from pipelines.records import FileDigest

# Fewer say nothing of a percentile.
LEAST_TEXTS: Final = 64
_SHORTEST_TOKENS: Final = 6
_PROBE_CHARACTERS: Final = 2_000
# A model that makes the same vector of everything keeps it after any damage.
_ALIKE: Final = 0.99999
_RECIPE: Final = 1


@dataclass(frozen=True)
class Reference:
    """The texts, the tokens of each, and what the f16 makes of them: one vector of length one."""

    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    vectors: tuple[tuple[float, ...], ...]


def measure(bench: Bench, f16: FileDigest) -> records.EmbeddingQuality:
    """
    Compare the embeddings of a quant with those of its f16.

    Raises:
        ParamsError: The corpus is too short.
        ToolError: The server failed, or what it gave is no embedding.
        DigestError: The f16 has other bytes than its record says.
    """
    reference = reference_embeddings(bench, f16)
    wanted = bench.wanted
    console.step(f"embeddings of {wanted.key} against f16")
    with _server(bench, bench.gguf, bench.execution) as embedder:
        found = _embed_all(embedder, reference.texts, f"embeddings of {wanted.key}")
    other = next((i for i, each in enumerate(found) if each.tokens != reference.tokens[i]), None)
    if other is not None:
        raise ToolError(
            f"{wanted.key} reads {found[other].tokens} tokens where its f16 reads "
            f"{reference.tokens[other]}: it has another tokenizer.",
            hint="Remove it and run `fleet repro`: it is made again.",
            log=bench.log,
        )
    agreed = compare(reference.vectors, [each.vector for each in found])
    return records.EmbeddingQuality(
        corpus_sha256=wanted.corpus.sha256,
        context_tokens=window_tokens(bench),
        texts_count=len(reference.texts),
        scored_tokens=sum(reference.tokens),
        dimensions=len(reference.vectors[0]),
        cosine_mean=agreed.mean,
        cosine_mean_error=agreed.mean_error,
        cosine_p01=agreed.p01,
        cosine_min=agreed.least,
        same_nearest=agreed.same_nearest,
    )


def texts_count(bench: Bench) -> int:
    """Return how many texts are embedded: as many as there are windows, 64 at least."""
    return max(LEAST_TEXTS, bench.wanted.benchmark.quality.chunks)


def window_tokens(bench: Bench) -> int:
    """Return the length of the longest text: the window, or the context if that is shorter."""
    return min(bench.wanted.benchmark.quality.context_tokens, bench.wanted.context_tokens)


# --- what two sets of vectors have in common --------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Cosines over all texts, and the share of texts that keep their nearest other text."""

    mean: float
    mean_error: float
    p01: float
    least: float
    same_nearest: float


def compare(base: Sequence[Sequence[float]], found: Sequence[Sequence[float]]) -> Agreement:
    """
    Compare the vectors of the same texts, in the same order.

    Args:
        base: Of the f16, each of length one.
        found: Of the quant, each of length one.

    Raises:
        ToolError: The f16 makes the same vector of all texts, or a number is missing.
        VectorError: They have different numbers of dimensions.
    """
    import numpy as np  # noqa: PLC0415 - 0.1 s

    if len(base) != len(found) or len(base) <= 1:
        raise ToolError(f"{len(found)} embeddings were made of {len(base)} texts.")
    cosines = sorted(
        llama_embeddings.cosine(one, other) for one, other in zip(base, found, strict=True)
    )
    ours, theirs = np.asarray(base, dtype=np.float64), np.asarray(found, dtype=np.float64)
    between = ours @ ours.T
    count = len(base)
    alike = float(between.sum() - np.trace(between)) / (count * (count - 1))
    if alike > _ALIKE:
        raise ToolError(
            f"the f16 makes the same vector of {count} different texts (their cosines are "
            f"{alike:.6f} on average): what quantizing does to it cannot be measured.",
            hint="Look at the embeddings of upstream's own model.",
        )
    nearest = []
    for products in (between, theirs @ theirs.T):
        np.fill_diagonal(products, -np.inf)
        nearest.append(products.argmax(axis=1))
    mean = math.fsum(cosines) / count
    spread = math.sqrt(math.fsum((each - mean) ** 2 for each in cosines) / (count - 1))
    return Agreement(
        mean=mean,
        mean_error=spread / math.sqrt(count),
        p01=cosines[math.ceil(count / 100) - 1],
        least=cosines[0],
        same_nearest=float((nearest[0] == nearest[1]).mean()),
    )


# --- the texts --------------------------------------------------------------------------------


def cut(
    corpus: str, count: int, *, most_tokens: int, count_tokens: Callable[[str], int]
) -> tuple[str, ...]:
    """
    Cut texts of `most_tokens` at most, no two alike, spread evenly over a corpus.

    Their lengths grow by a constant factor from a few tokens to the longest, and are dealt out such
    that long and short ones take turns. All of it follows from the arguments; nothing is random.

    Args:
        corpus: The evaluation text.
        count: How many.
        most_tokens: Longest one, as the model counts.
        count_tokens: Counts the tokens of a text as the model does.

    Raises:
        ParamsError: The corpus is too short for so many different texts.
    """
    text = " ".join(corpus.split())
    if len(text) < count:
        raise _too_short(len(text), count)
    probe = text[:_PROBE_CHARACTERS]
    chars_per_token = len(probe) / max(1, count_tokens(probe))
    shortest = min(_SHORTEST_TOKENS, most_tokens)
    texts = []
    for index in range(count):
        # Stepping by a number without common divisor visits every length once.
        place = (index * _coprime(count)) % count
        tokens = shortest * (most_tokens / shortest) ** (place / (count - 1))
        start = index * len(text) // count
        length = max(1, round(tokens * chars_per_token))
        texts.append(_fitting(text[start : start + length], most_tokens, count_tokens))
    different = len({each for each in texts if each})
    if different < count:
        raise _too_short(different, count)
    return tuple(texts)


def _coprime(count: int) -> int:
    """Return a step near the golden section of a count, without a divisor in common with it."""
    step = max(1, round(count * 0.618))
    while math.gcd(step, count) != 1:
        step += 1
    return step


def _fitting(text: str, most_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """Leave letters out at the end until the model's own count fits."""
    text = text.strip()
    while text and (tokens := count_tokens(text)) > most_tokens:
        text = text[: min(len(text) - 1, len(text) * most_tokens // tokens)].strip()
    return text


def _too_short(found: int, needed: int) -> ParamsError:
    return ParamsError(
        f"the evaluation text gives {found:,} different texts, {needed:,} are needed.",
        hint="Take a longer text, or lower benchmark.quality.chunks.",
    )


# --- the f16's --------------------------------------------------------------------------------


def reference_embeddings(bench: Bench, f16: FileDigest) -> Reference:
    """
    Return the texts and the f16's embeddings of them, made unless scratch has them.

    They are named after everything that decides them. Files under other names are removed.

    Raises:
        ParamsError: The corpus is too short.
        DigestError: The f16 has other bytes than its record says.
        ToolError: The server failed, or what it gave is no embedding.
    """
    scratch = bench.at.scratch(bench.wanted.model)
    path = scratch / f"embeddings-{_key(bench, f16)}.json"
    for other in scratch.glob("*embeddings-*"):
        if other != path:
            atomic.remove(other)
    known = _known(path, texts_count(bench))
    if known is not None:
        console.info(f"the embeddings of {bench.wanted.model}'s f16 are here already: {path.name}")
        return known
    model = bench.at.f16(bench.wanted.model)
    measuring.prove(model, f16)
    console.step(f"embeddings of {bench.wanted.model}'s f16")
    corpus = (bench.at.root / bench.wanted.corpus.path).read_text(encoding="utf-8")
    with _server(bench, model, _reference_execution(bench)) as embedder:
        texts = cut(
            corpus,
            texts_count(bench),
            most_tokens=window_tokens(bench),
            count_tokens=embedder.count_tokens,
        )
        found = _embed_all(embedder, texts, f"embeddings of {bench.wanted.model}'s f16")
    made = Reference(
        texts, tuple(each.tokens for each in found), tuple(each.vector for each in found)
    )
    _require_equal_lengths(made)
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {"texts": made.texts, "tokens": made.tokens, "vectors": made.vectors}
    atomic.write_json(path, {"sha256": _digest(value), **value})
    return made


def _server(bench: Bench, gguf: Path, execution: Execution) -> AbstractContextManager[Embedder]:
    return llama_embeddings.opened(
        bench.tools,
        bench.named(gguf),
        context_tokens=bench.wanted.context_tokens,
        execution=execution,
        cwd=bench.at.root,
        log=bench.log,
    )


def _reference_execution(bench: Bench) -> Execution:
    return replace(bench.execution, kv_type="f16")


def _embed_all(embedder: Embedder, texts: Sequence[str], what: str) -> list[Embedded]:
    found = []
    with console.Progress(what, total=len(texts), unit="texts") as progress:
        for text in texts:
            found.append(embedder.embed(text))
            progress.update(len(found))
    return found


def _require_equal_lengths(made: Reference) -> None:
    if any(len(one) != len(other) for one, other in pairwise(made.vectors)):
        raise ToolError("the embeddings of the f16 have different numbers of dimensions.")


def _key(bench: Bench, f16: FileDigest) -> str:
    return machine.facts_id(
        {
            "recipe": _RECIPE,
            "f16": f16.sha256,
            "corpus": bench.wanted.corpus.sha256,
            "commit": bench.tools.commit,
            "backend": bench.tools.backend,
            "texts_count": texts_count(bench),
            "window_tokens": window_tokens(bench),
            "context_tokens": bench.wanted.context_tokens,
            "argv": _reference_execution(bench).argv()[2:],  # the threads change nothing
        }
    )[:16]


def _digest(value: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _known(path: Path, count: int) -> Reference | None:
    """Return embeddings of an earlier run if they are what was written then, by their digest."""
    try:
        value = json.loads(path.read_bytes())
        written = value.pop("sha256")
        if written != _digest(value):
            return None
        found = Reference(
            texts=tuple(value["texts"]),
            tokens=tuple(value["tokens"]),
            vectors=tuple(map(tuple, value["vectors"])),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    sizes = {len(found.texts), len(found.tokens), len(found.vectors)}
    return found if sizes == {count} else None
