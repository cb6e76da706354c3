"""
What `verify` leaves behind: each layer of the proof that a GGUF is the model that it was made from.

A layer that could not be looked at says so (`SKIP`) and never counts as passed; the verdict shows
it. Findings name what differs, the first ones; `differing_count` is how many there are.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.records import Finite, Part, Record

# In the order in which they are tried; the first that fails is the one that caught a fault.
Layer = Literal[
    # Count, names, shapes and types of the tensors; metadata that decides the computation
    # (rope, norm epsilon, heads, experts) against upstream's config.
    "tensors",
    "hyperparameters",
    # Every value finite, no row all zero, sampled rows equal to the source.
    "values",
    # Token ids of an adversarial corpus, special and added tokens, BOS and EOS.
    "vocabulary",
    "tokens",
    # The chat template and what it renders; sampling defaults and end-of-generation tokens.
    "template",
    "generation",
    # Upstream's own implementation against llama.cpp on held-out text. Of an encoder: embeddings.
    "logits",
]


class Check(Part):
    """
    One layer: what was looked at, and what it found.

    `sentence` names the value, its limit and, where one differs, the tensor, the string or the key.
    """

    layer: Layer
    outcome: Literal["PASS", "FAIL", "SKIP"]
    examined_count: int = Field(ge=0)
    differing_count: int = Field(ge=0)
    sentence: str
    findings: tuple[str, ...] = ()


class LogitsAgreement(Part):
    """
    Upstream's implementation (float32) against llama.cpp on the 16-bit GGUF, over the same tokens.

    Rounded to four significant digits: the last ones differ from one CPU to the next.
    """

    corpus_sha256: str
    tokens_count: int
    same_top: Finite
    kld_mean_nats: Finite
    kld_max_nats: Finite
    nll_upstream_nats: Finite
    nll_gguf_nats: Finite


class EmbeddingAgreement(Part):
    """Of an encoder: cosines between the embeddings of upstream and those of the 16-bit GGUF."""

    corpus_sha256: str
    texts_count: int
    cosine_mean: Finite
    cosine_min: Finite


class VerifyRecord(Record):
    """Whether a 16-bit GGUF is the model of its source. FAIL if a layer failed."""

    stage: Literal["verify"] = "verify"
    model: str
    revision: str
    architecture: str
    f16_sha256: str
    llama_cpp_commit: str
    recipe: int
    outcome: Literal["PASS", "FAIL"]
    checks: tuple[Check, ...]
    logits: LogitsAgreement | None
    embeddings: EmbeddingAgreement | None
