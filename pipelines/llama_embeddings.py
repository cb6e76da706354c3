"""
llama-server as it makes embeddings: how it is called, and what of its answers is believed.

The pinned llama.cpp has no program of its own for embeddings; its server makes them, one text at a
time in one slot, so that no text shares a batch with another. The vectors come back with a length
of one (`embd_normalize`, by default Euclidean), of which a cosine is the product.

Source: tools/server/server.cpp and common/arg.cpp of the pinned commit.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pipelines import llamacpp
from pipelines.errors import ToolError
from pipelines.serving import server
from pipelines.serving.llama_server import PROGRAM, complaints, is_bind_failure
from pipelines.serving.sandbox import HOST
from pipelines.serving.server import LoadFailed, ServerGone, ServingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pipelines.llamacpp import Execution
    from pipelines.serving.server import Client, Running
    from pipelines.toolchain import Toolchain

# A slow disk, or a card whose kernels are compiled first.
_UP_WITHIN_S: Final = 600.0
_ANSWER_WITHIN_S: Final = 600.0
# Of the length of a vector that is one by construction: its numbers have seven digits.
_LENGTH_TOLERANCE: Final = 1e-3


class VectorError(ToolError):
    """What a server gave as an embedding is none."""


@dataclass(frozen=True)
class Embedded:
    """The vector of a text, of length one, and how many tokens were read for it."""

    vector: tuple[float, ...]
    tokens: int


def argv(
    tools: Toolchain, model: str, *, port: int, context_tokens: int, execution: Execution
) -> list[str]:
    """
    Spell a server for embeddings with nothing left to defaults that decides what it answers.

    An encoder reads a text in one piece, so the physical batch is as long as the context.
    """
    return [
        str(tools.tool("llama-server")),
        *("--model", model, "--host", HOST, "--port", str(port), "--embedding"),
        *("-c", str(context_tokens), "-np", "1", "-tb", str(execution.threads), "--fit", "off"),
        *execution.argv(),
        *("--no-context-shift", "--cache-ram", "0", "--no-webui", "--offline", "--no-mmproj"),
        *("--log-verbosity", "4", "--log-colors", "off"),
    ]


@contextmanager
def opened(  # noqa: PLR0913 - each is one independent fact about a server
    tools: Toolchain,
    model: str,
    *,
    context_tokens: int,
    execution: Execution,
    cwd: Path,
    log: Path,
) -> Iterator[Embedder]:
    """
    Serve a model for embeddings until the block is left.

    Args:
        tools: The toolchain.
        model: The GGUF, as the server is to be told it, from `cwd`.
        context_tokens: Longest text, special tokens included.
        execution: How it is run; its batches have to hold the longest text.
        cwd: Working directory of the server.
        log: Gets all that it says.

    Raises:
        LoadFailed: It cannot load the model.
        ServerGone: It ended, or found no port.
    """

    def ready(running: Running) -> None:
        try:
            server.wait_until(
                running,
                lambda: running.client.is_up("/health"),
                within_s=_UP_WITHIN_S,
                what=f"load {model.rpartition('/')[2]}",
            )
        except ServerGone as error:
            if running.process.was_killed or is_bind_failure(running.process.output()):
                raise
            said = complaints(running)
            raise LoadFailed(f"llama-server cannot load {model}:\n{said}", log=log) from error

    environment = llamacpp.environment(tools)
    with server.running(
        PROGRAM,
        lambda port: argv(
            tools, model, port=port, context_tokens=context_tokens, execution=execution
        ),
        env=lambda _: environment,
        cwd=cwd,
        log=log,
        on_card=False,
        is_bind_failure=is_bind_failure,
        ready=ready,
    ) as running:
        told = running.client.get("/props")
        if told.get("model_path") != model:
            raise ServingError(f"llama-server serves another file than {model}.", log=log)
        yield Embedder(running.client, log)


class Embedder:
    """Asks a llama-server for embeddings."""

    def __init__(self, client: Client, log: Path) -> None:
        """Ask by `client`; errors name `log`."""
        self._client = client
        self._log = log

    def count_tokens(self, text: str) -> int:
        """
        Return the tokens of a text, those included that stand for its begin and end.

        Raises:
            ServingError: The server does not say.
        """
        told = self._client.post("/tokenize", {"content": text, "add_special": True})
        tokens = told.get("tokens")
        if not isinstance(tokens, list):
            raise ServingError("llama-server does not say the tokens of a text.", log=self._log)
        return len(tokens)

    def embed(self, text: str) -> Embedded:
        """
        Return the embedding of a text.

        Raises:
            VectorError: There is none, or it is none.
            ServingError: The server refuses.
        """
        told = self._client.post(
            "/v1/embeddings",
            {"input": text, "encoding_format": "float"},
            timeout_s=_ANSWER_WITHIN_S,
        )
        return of_openai(told)


def of_openai(told: dict[str, Any]) -> Embedded:
    """
    Read the answer of /v1/embeddings to one text.

    Raises:
        VectorError: It has no vector, more than one, or one that is no embedding.
    """
    data, usage = told.get("data"), told.get("usage")
    if not isinstance(data, list) or len(data) != 1 or not isinstance(data[0], dict):
        raise VectorError("the server did not answer one text with one embedding.")
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return Embedded(vector_of(data[0].get("embedding")), _count(tokens))


def of_ollama(told: dict[str, Any]) -> Embedded:
    """
    Read the answer of Ollama's /api/embed to one text.

    Raises:
        VectorError: It has no vector, more than one, or one that is no embedding.
    """
    vectors = told.get("embeddings")
    if not isinstance(vectors, list) or len(vectors) != 1:
        raise VectorError("ollama did not answer one text with one embedding.")
    return Embedded(vector_of(vectors[0]), _count(told.get("prompt_eval_count")))


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise VectorError("the server does not say how many tokens it read for an embedding.")


def vector_of(value: object) -> tuple[float, ...]:
    """
    Return an embedding as it came, once it is sure that it is one: finite, and of length one.

    Raises:
        VectorError: It is empty, holds something else than numbers, or has another length.
    """
    if not isinstance(value, list) or not value:
        raise VectorError("an embedding has no numbers.")
    if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in value):
        raise VectorError("an embedding holds something else than numbers.")
    length = math.sqrt(math.fsum(each * each for each in value))
    # NaN is in no interval.
    if not 1 - _LENGTH_TOLERANCE <= length <= 1 + _LENGTH_TOLERANCE:
        raise VectorError(f"an embedding has the length {length}; one was due.")
    return tuple(float(each) for each in value)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """
    Return the cosine of two vectors of length one, to which rounding is put right.

    Raises:
        VectorError: They have different numbers of dimensions.
    """
    if len(one) != len(other):
        raise VectorError(f"an embedding has {len(one):,} dimensions, another {len(other):,}.")
    product = math.fsum(a * b for a, b in zip(one, other, strict=True))
    lengths = math.sqrt(math.fsum(a * a for a in one) * math.fsum(b * b for b in other))
    return max(-1.0, min(1.0, product / lengths))
