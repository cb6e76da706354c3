"""
Whether an engine serves the very embeddings that the measured file makes.

In the place of golden prompts: an encoder has no template that could be rendered otherwise, but an
engine may cut, prefix or pool texts in a way of its own, or run another llama.cpp. So a few texts
are embedded by the toolchain's llama.cpp, from the same file, and by the engine; the vectors have
to point the same way. Two builds of llama.cpp differ in the last digits, far below the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import embedding_quality, gguf_header, llama_embeddings, wording
from pipelines.load_records import EmbeddingCheck
from pipelines.load_verdict import MIN_COSINE
from pipelines.serving import server

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.llama_embeddings import Embedded
    from pipelines.serving.server import GgufFile, Loaded, Settings
    from pipelines.toolchain import Toolchain

TEXTS_COUNT: Final = 8
# Ollama refuses longer ones (`serving.ollama.ENCODER_BATCH_TOKENS`).
MOST_TOKENS: Final = 2048


@dataclass(frozen=True)
class Due:
    """A few texts, and what the toolchain makes of each."""

    texts: tuple[str, ...]
    embedded: tuple[Embedded, ...]


def by_toolchain(
    file: GgufFile, corpus: str, settings: Settings, tools: Toolchain, *, log: Path
) -> Due:
    """
    Cut a few texts, up to as long as the context, and embed them with the toolchain's llama.cpp.

    Raises:
        LoadFailed: Its server cannot load the file.
        ParamsError: The corpus is too short.
    """
    gguf = file.path.resolve()
    settings = server.of_experts(settings, gguf_header.read(gguf))
    run_as = server.execution(settings, tools.backend, is_encoder=True)
    with llama_embeddings.opened(
        tools,
        str(gguf),
        context_tokens=settings.context_tokens,
        execution=run_as,
        cwd=gguf.parent,
        log=log,
    ) as embedder:
        texts = embedding_quality.cut(
            corpus,
            TEXTS_COUNT,
            most_tokens=min(settings.context_tokens, MOST_TOKENS),
            count_tokens=embedder.count_tokens,
        )
        return Due(texts, tuple(embedder.embed(text) for text in texts))


def check(due: Due, loaded: Loaded) -> EmbeddingCheck:
    """
    Have a loaded model embed the texts, and compare.

    Raises:
        ServingError: The server is gone, or refuses one.
        VectorError: What it gives is no embedding, or has other dimensions.
    """
    pairs = [
        (wanted, loaded.embed(text)) for text, wanted in zip(due.texts, due.embedded, strict=True)
    ]
    least = min(llama_embeddings.cosine(one.vector, other.vector) for one, other in pairs)
    read = ((one.tokens, other.tokens) for one, other in pairs)
    other_tokens = next((pair for pair in read if pair[0] != pair[1]), None)
    texts_words = wording.counted(len(due.texts), "text")
    if other_tokens is not None:
        sentence = (
            f"the engine reads {other_tokens[1]:,} tokens of a text of which llama.cpp reads "
            f"{other_tokens[0]:,}: it cuts it, or puts something around it"
        )
    else:
        shown = wording.beyond(least, MIN_COSINE)
        sentence = (
            f"the embeddings of {texts_words} have a cosine of {shown} or more with those that the "
            f"toolchain's llama.cpp makes of the same file ({wording.declared(MIN_COSINE)} needed)"
        )
    return EmbeddingCheck(
        texts_count=len(due.texts),
        cosine_min=least,
        limit=MIN_COSINE,
        outcome="PASS" if other_tokens is None and least >= MIN_COSINE else "FAIL",
        sentence=sentence,
    )
