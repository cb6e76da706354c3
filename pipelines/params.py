"""
The declaration as types: params.yaml on one side, the slice that each stage reads on the other.

`Declaration` is the file as the operator writes it: closed, strict, frozen. A stage never sees it.
It gets a `...Slice`: every value that can change its result, with defaults filled in and the owner
decided (quant > model > top-level section > built-in). DVC tracks exactly that slice, so what a
stage reads and what makes it run again cannot drift apart.

`pipelines.declaration` reads the file and reports what is wrong with it, line by line.
"""

from __future__ import annotations

import math
import operator
import re
import warnings
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
)

from pipelines import absent

# A dot would break DVC's parameter paths, an upper-case letter Ollama's and the registries' names.
MODEL_KEY = r"^[a-z0-9][a-z0-9_-]{0,62}$"
# No `..` as a part of it, and no `-` in front: a program would read that as an option.
_PATH = r"(?![-/])(?!(?:.*/)?\.\.(?:/|$))[A-Za-z0-9._/-]{1,200}"
_REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
RELATIVE_PATH = rf"^{_PATH}$"
QUANT_KEY = r"^[a-z0-9][A-Za-z0-9_-]{0,79}$"
# Where DVC looks for changes of them.
MODELFILE = r"^modelfiles/[A-Za-z0-9][A-Za-z0-9._-]{0,100}\.Modelfile\.j2$"
SHA256 = r"^[0-9a-f]{64}$"
REVISION = r"^[0-9a-f]{40}$"
SOURCE = rf"^(?:path:{_PATH}|hf:{_REPOSITORY})$"
VERSION = r"^[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}$"
TENSOR_PATTERN = r"^[!-<>-@\[-~]{1,200}$"
TRACKING_URI = r"^[!-~]{1,400}$"
EXPERIMENT = r"^[A-Za-z0-9._ -]{1,100}$"
_HOST = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}(?::[0-9]{1,5})?"
# No user, no password, no query: credentials come from the environment.
REGISTRY = (
    rf"^(?:file:/?{_PATH}"
    r"|s3://[a-z0-9][a-z0-9.-]{1,62}(?:/" + _PATH + ")?"
    # One level: Ollama reads no more (types/model/name.go).
    rf"|oci://{_HOST}/[a-z0-9][a-z0-9_-]{{0,79}}"
    r"|hf:[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
    rf"|mlflow:(?:sqlite:////?{_PATH}|https?://{_HOST}(?:/{_PATH})?))$"
)
ENDPOINT = rf"^https?://{_HOST}(?:/{_PATH})?$"
RELEASE = r"^(?:latest|[0-9a-f]{64})$"
LICENSE = r"^[A-Za-z0-9][A-Za-z0-9.+-]{0,63}$"
# With the days that each month has, so that an editor refuses 30 February, too.
DAY = (
    r"^[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|[12][0-9]))$"
)
SENTENCE = r"^(?=.*[A-Za-z])[ -~]{3,300}$"
# A label of a runner, and the name of a deployment environment. No `$` and no `{`: both become part
# of a job's description.
LABEL = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
# What git takes for a branch, of letters that mean nothing to a shell or an address; with a `*` it
# is a pattern of tags.
TRACK = r"^(?!.*(?:\.\.|//|/\.|\.lock(?:/|$)|[./]$))[A-Za-z0-9*][A-Za-z0-9._/*-]{0,99}$"

# What a pattern means, for people: error messages, the schema and docs/params.md say this.
PATTERN_WORDS = {
    MODEL_KEY: "a word of lower-case letters, digits, `-` and `_`, 63 at most",
    QUANT_KEY: "`<model>-<TYPE>`",
    RELATIVE_PATH: "a path below the repository: letters, digits, `.`, `_`, `-` and `/`, "
    "without `..`",
    MODELFILE: "a file `modelfiles/NAME.Modelfile.j2`",
    SHA256: "a sha256: 64 digits of 0-9a-f",
    REVISION: "a full commit: 40 digits of 0-9a-f",
    SOURCE: "`hf:owner/repo`, or `path:` and a directory below the repository",
    VERSION: "a release such as 0.3.36",
    TENSOR_PATTERN: "a regular expression in lower case without spaces and `=`",
    TRACKING_URI: "a URI of at most 400 printable ASCII characters",
    EXPERIMENT: "at most 100 letters, digits, spaces, `.`, `_` and `-`",
    REGISTRY: "`file:DIRECTORY`, `s3://bucket/prefix`, `oci://host/namespace`, `hf:owner` or "
    "`mlflow:` and a tracking URI, without a user and a password",
    ENDPOINT: "an http or https address without a user and a password",
    RELEASE: "`latest` or a release id: 64 digits of 0-9a-f",
    LICENSE: "the Hub's word for a licence, such as apache-2.0",
    DAY: "a day such as 2027-01-31",
    SENTENCE: "3 to 300 printable ASCII characters with a letter in them",
    LABEL: "at most 63 letters, digits, `.`, `_` and `-`",
    TRACK: "a branch such as main, or a pattern of tags such as v*",
}

# What llama-quantize of the pinned commit makes (tools/quantize/quantize.cpp, QUANT_OPTIONS), less
# the names that only copy (COPY) and the aliases (Q3_K, Q4_K, Q5_K): one name for one recipe.
QuantType = Literal[
    "F32", "F16", "BF16",
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0",
    "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4_MOE",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS",
    "Q2_K", "Q2_K_S", "Q2_0", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS",
    "IQ1_M", "IQ1_S", "Q1_0", "TQ1_0", "TQ2_0",
]  # fmt: skip
# llama-quantize refuses to make these without an importance matrix. IQ2_M and IQ3_XS are here for
# the tensors that they store as IQ2_S and IQ3_XXS (src/llama-quant.cpp, tensor_requires_imatrix).
NEEDS_IMATRIX = frozenset(
    {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}
)
# Tokens that a gate on the 99.9th percentile needs: 102 of them lie above it. llama-perplexity
# scores the second half of each window, so these are 400 windows of 512.
P999_TOKENS = 400 * 256
# Fewer samples have no median that one disturbance could not move.
MIN_SAMPLES = 3
# What a chat template may add around a short prompt of the load test, its nonce included.
TEMPLATE_TOKENS = 64
# Not quantized: rules for single tensors have no effect on them.
UNQUANTIZED = frozenset({"F32", "F16", "BF16"})

# Types of single tensors, as a rule of `tensor_types` may name them.
TensorType = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0",
    "iq4_nl", "iq4_xs", "q3_k", "iq3_s", "iq3_xxs", "q2_k", "q2_0", "iq2_s", "iq2_xs", "iq2_xxs",
    "iq1_m", "iq1_s", "q1_0", "tq1_0", "tq2_0", "mxfp4",
]  # fmt: skip

Objective = Literal["speed", "quality", "size"]
Backend = Literal["auto", "cpu", "cuda", "vulkan", "metal"]
KvType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
# What Ollama passes on (fs/ggml of 0.33, SupportsKVCacheType); llama-server would take more.
ServedKvType = Literal["f16", "q8_0", "q4_0"]
Engine = Literal["auto", "ollama", "llama-server"]


def printable(text: str) -> str:
    r"""
    Let ASCII text without control characters pass.

    Every string of the declaration comes through here, since `$` in Python also matches before a
    newline at the end: `"tiny-llama\n"` satisfies the pattern of a key.

    Raises:
        ValueError: Something else is in it.
    """
    if not (text.isascii() and text.isprintable()):
        raise ValueError("holds a control character, a line end or a letter beyond ASCII")
    return text


def existing_day(text: str) -> str:
    """
    Let a day of the calendar pass; which years have a 29 February no pattern says.

    Raises:
        ValueError: There is no such day.
    """
    try:
        date.fromisoformat(text)
    except ValueError:
        raise ValueError("is no day of the calendar") from None
    return text


_PRINTABLE = AfterValidator(printable)
ModelKey = Annotated[str, StringConstraints(pattern=MODEL_KEY), _PRINTABLE]
QuantKey = Annotated[str, StringConstraints(pattern=QUANT_KEY), _PRINTABLE]
CorpusKey = ModelKey
EvalKey = ModelKey
HostKey = ModelKey
Sha256 = Annotated[str, StringConstraints(pattern=SHA256), _PRINTABLE]
Revision = Annotated[str, StringConstraints(pattern=REVISION), _PRINTABLE]
RelativePath = Annotated[str, StringConstraints(pattern=RELATIVE_PATH), _PRINTABLE]
Source = Annotated[str, StringConstraints(pattern=SOURCE), _PRINTABLE]
Tokens = Annotated[int, Field(ge=1, le=10_000_000)]
RegistryUrl = Annotated[str, StringConstraints(pattern=REGISTRY), _PRINTABLE]
Endpoint = Annotated[str, StringConstraints(pattern=ENDPOINT), _PRINTABLE]
Stable = Annotated[str, StringConstraints(pattern=RELEASE), _PRINTABLE]
LicenseId = Annotated[str, StringConstraints(pattern=LICENSE), _PRINTABLE]
Day = Annotated[str, StringConstraints(pattern=DAY), _PRINTABLE, AfterValidator(existing_day)]
Sentence = Annotated[str, StringConstraints(pattern=SENTENCE), _PRINTABLE]
Label = Annotated[str, StringConstraints(pattern=LABEL), _PRINTABLE]
Tracked = Annotated[str, StringConstraints(pattern=TRACK), _PRINTABLE]
Days = Annotated[int, Field(ge=0, le=3650)]
Version = Annotated[str, StringConstraints(pattern=VERSION), _PRINTABLE]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e12)]


class Closed(BaseModel):
    """Every model here: unknown keys, NaN, and values of a neighbouring type are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        # The Rust engine has no look-ahead, by which `..` is kept out of paths.
        regex_engine="python-re",
    )


# --- the file, as the operator writes it ------------------------------------------------------


class Toolchain(Closed):
    """One llama.cpp for converter, quantizer, benchmark and server."""

    llama_cpp_python: Annotated[str, StringConstraints(pattern=VERSION), _PRINTABLE] = Field(
        description="Version of the llama-cpp-python source distribution, which holds llama.cpp."
    )
    sha256: Sha256 = Field(description="sha256 of that source distribution.")
    backend: Backend = Field("auto", description="`auto` takes CUDA or Metal if this host has it.")
    recipe: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        1, description="Raise it to make everything after fetch again."
    )


class Corpus(Closed):
    """A text file and the bytes it must have."""

    path: RelativePath = Field(description="File below the repository.")
    sha256: Sha256 = Field(description="sha256 of the file.")


class Gates(Closed):
    """Limits that a quant must keep to be chosen. All measured against the model's own f16."""

    max_kld_mean_nats: Positive | None = Field(
        None, description="Mean KL divergence from the f16 model, nats for each token."
    )
    max_kld_p999_nats: Positive | None = Field(
        None, description="99.9th percentile of the KL divergence; needs 400 chunks of 512 tokens."
    )
    min_same_top: Share | None = Field(
        None, description="Share of tokens at which f16 and quant agree on the most likely one."
    )
    max_ppl_ratio: Positive | None = Field(
        None, description="Perplexity of the quant over that of f16, on the same text."
    )
    min_cosine_mean: Share | None = Field(
        None,
        description="Mean cosine between the embeddings of f16 and quant; for encoders, which have "
        "no perplexity. 0.99 holds for them where none is declared.",
    )
    min_decode_tok_s: Positive | None = Field(
        None, description="Tokens generated in a second, at the deepest declared depth."
    )
    min_prefill_tok_s: Positive | None = Field(
        None, description="Prompt tokens read in a second, at depth 0."
    )
    max_size_mib: Positive | None = Field(None, description="Size of the GGUF file in MiB.")


class Slo(Closed):
    """
    Service levels of a host that serves. A request that keeps all of them is good.

    No percentile is estimated: "95 % of requests within 300 ms" is a share, and a share has an
    interval that holds for any distribution (Wilson).
    """

    ttft_ms: Positive | None = Field(
        None, description="Time to first token of a request, queueing included."
    )
    tpot_ms: Positive | None = Field(
        None, description="Time for each further token of a request, on average."
    )
    e2e_ms: Positive | None = Field(None, description="Time from request to last token.")
    min_goodput: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Share of requests that must be good; 0.95 if no level states it."
    )
    max_error_rate: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Share of requests that may fail. They count as not good, too."
    )


class TensorRule(Closed):
    """One `--tensor-type` rule of llama-quantize: the first whose pattern is found wins."""

    match: Annotated[str, StringConstraints(pattern=TENSOR_PATTERN), _PRINTABLE] = Field(
        description="Regular expression, in lower case, searched in the tensor's name."
    )
    type: TensorType = Field(description="Type that the matching tensors get.")


GpuLayers = Annotated[int, Field(ge=0, le=9999)] | Literal["auto", "all"]
CpuMoeLayers = Annotated[int, Field(ge=1, le=9999)] | Literal["all"]
Slots = Annotated[int, Field(ge=1, le=256)]
# Ollama hands its environment on to its llama-server, so LLAMA_ARG_N_CPU_MOE would reach it: for
# all models that it serves, by no line of a Modelfile, and its scheduler goes on counting the whole
# file as memory of the card, by which it also picks the batch.
NO_EXPERTS_APART = (
    "needs `engine: llama-server` beside it: Ollama has no such option for one model. There, "
    "`gpu_layers: auto` lets its llama-server place experts by the memory that is free"
)


class ModelServing(Closed):
    """How one model is served, where that differs from the top-level `serving`."""

    engine: Literal["llama-server"] | None = Field(
        None, description="This model alone is served by the toolchain's llama-server."
    )
    parallel: Slots | None = Field(None, description="Requests served at the same time.")
    gpu_layers: GpuLayers | None = Field(None, description="Layers on the GPU.")
    cpu_moe_layers: CpuMoeLayers | None = Field(
        None, description="First layers whose experts stay in main memory."
    )
    kv_type: ServedKvType | None = Field(None, description="Type of the key-value cache.")
    flash_attention: bool | None = Field(None, description="Flash attention.")


# What a person may let pass. Nothing else can be: no INVALID, no missing or foreign record.
Waivable = Literal["hold", "license", "gated"]


class Waiver(Closed):
    """One refusal of `publish` that a person takes upon himself; shown wherever the release is."""

    gate: Waivable = Field(
        description="`hold`: a HOLD verdict; `license`: a licence that is unknown or has changed; "
        "`gated`: an upstream that gives its files only to those who agreed to its terms."
    )
    who: Sentence = Field(description="Who decided.")
    why: Sentence = Field(description="The reason.")
    until: Day = Field(description="Last day on which it lets a release be published.")


# `off` where the weights of upstream do not fit the memory of any machine that runs the chain.
VerifyLogits = Literal["auto", "off"]


class ModelVerify(Closed):
    """How the conversion of one model is proven, where that differs from the top-level `verify`."""

    logits: VerifyLogits | None = Field(
        None, description="Whether upstream's own implementation is run for comparison."
    )


class Model(Closed):
    """One model of the fleet."""

    source: Source = Field(description="`hf:owner/repo`, or `path:` of a directory here.")
    revision: Revision = Field(
        description="40-hex commit on the Hub; for `path:` the digest that `fleet digest` prints."
    )
    track: Tracked = Field(
        "main",
        description="What `check-upstream` follows on the Hub: a branch, or, with a `*`, the "
        "newest tag that matches.",
    )
    cooldown_days: Days | None = Field(
        None, description="Override of `check_upstream.cooldown_days`."
    )
    ignore: tuple[Revision, ...] = Field(
        (),
        description="Commits that `check-upstream` passes over. A pull request of `bump` that was "
        "closed says the same of its commit.",
        max_length=64,
    )
    ignore_code: bool = Field(
        default=False,
        description="Take a model whose repository names Python code of its own (`auto_map`): the "
        "code is never fetched, and the model is converted without it.",
    )
    context_tokens: Tokens = Field(description="Context at which the model will be served.")
    evaluation: CorpusKey = Field(
        "evaluation", description="Corpus on which divergence from f16 is measured."
    )
    calibration: CorpusKey | None = Field(
        None, description="Corpus for the importance matrix; required by quants with `imatrix`."
    )
    objective: Objective = Field(
        "speed", description="What is made best among the quants that pass every gate."
    )
    gates: Gates = Field(default=Gates(), description="Overrides of the top-level `gates`.")
    modelfile: Annotated[str, StringConstraints(pattern=MODELFILE), _PRINTABLE] = Field(
        "modelfiles/chat.Modelfile.j2",
        description="Template of the Modelfile: sampling parameters, stops, system text.",
    )
    serving: ModelServing = Field(
        default=ModelServing(), description="Overrides of the top-level `serving`."
    )
    slo: Slo = Field(default=Slo(), description="Overrides of the host's and the fleet's `slo`.")
    verify: ModelVerify = Field(
        default=ModelVerify(), description="Overrides of the top-level `verify`."
    )
    evals: tuple[EvalKey, ...] = Field(
        (), description="Sets of `evals` on which its quants are compared with f16.", max_length=32
    )
    hosts: Annotated[tuple[HostKey, ...], Field(min_length=1, max_length=64)] | None = Field(
        None,
        description="Names of `hosts` that serve it; without them every host does. It is measured, "
        "chosen and judged for these alone.",
    )
    stable: Stable = Field(
        "latest",
        description="Release that is served: `latest`, or the id of an earlier one, which rolls "
        "back to it.",
    )
    license: LicenseId | None = Field(
        None,
        description="Licence that was read and accepted; needed where upstream states none, or "
        "another than the release before.",
    )
    waivers: tuple[Waiver, ...] = Field(
        (), description="Refusals of `publish` that somebody lets pass.", max_length=16
    )


# Named mixtures of tensor types; what each means stands in `pipelines.presets`.
Preset = Literal[
    "protect-output",
    "protect-attention",
    "protect-embeddings",
    "moe-protect-active",
    "hybrid-protect-ssm",
]


class RecipeFile(Closed):
    """A file of tensor rules that another tool made, and the bytes it must have."""

    path: RelativePath = Field(description="File below the repository: a line `REGEX=TYPE` each.")
    sha256: Sha256 = Field(description="sha256 of the file.")


class Quant(Closed):
    """One GGUF of one model."""

    model: ModelKey = Field(description="Key under `models`.")
    type: QuantType = Field(description="Type as llama-quantize names it.")
    imatrix: bool = Field(default=False, description="Use the model's importance matrix.")
    tensor_types: tuple[TensorRule, ...] = Field(
        (), description="Types of single tensors; a rule that matches nothing is an error.",
        max_length=256,
    )  # fmt: skip
    preset: Preset | None = Field(
        None, description="Named tensor rules, tried after `tensor_types` and `recipe_file`."
    )
    recipe_file: RecipeFile | None = Field(
        None, description="Tensor rules of a file, tried after `tensor_types`."
    )
    output_tensor_type: TensorType | None = Field(None, description="Type of the output tensor.")
    token_embedding_type: TensorType | None = Field(None, description="Type of the embeddings.")
    pure: bool = Field(default=False, description="No mixtures: all tensors get `type`.")
    leave_output_tensor: bool = Field(
        default=False, description="Leave the output tensor as it is in f16."
    )
    max_fallbacks: Annotated[int, Field(ge=0, le=100_000)] = Field(
        0,
        description="Tensors allowed to fall back to another type since their rows are not a "
        "multiple of the block size.",
    )


class Calibrate(Closed):
    """How an importance matrix is computed."""

    context_tokens: Tokens = Field(512, description="Window in which the corpus is read.")
    chunks: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="Windows to read; all of the corpus if absent."
    )


class Quality(Closed):
    """How divergence from f16 is measured."""

    context_tokens: Tokens = Field(512, description="Window; half of it is scored.")
    chunks: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        100,
        description="Windows to score; fewer if the corpus is shorter is an error. Of an encoder: "
        "texts to embed, 64 at least.",
    )


class Benchmark(Closed):
    """How a quant is measured."""

    prompt_tokens: Tokens = Field(512, description="Length of the prompt of the prefill test.")
    generate_tokens: Tokens = Field(128, description="Tokens generated in the decode test.")
    depths: Annotated[tuple[Annotated[int, Field(ge=0, le=10_000_000)], ...],
                      Field(min_length=1, max_length=16)] = Field(
        (0,), description="Tokens already in the context when a test starts."
    )  # fmt: skip
    repetitions: Annotated[int, Field(ge=3, le=1000)] = Field(
        7,
        description="Repetitions of every test, those that are dropped included; six that count "
        "give the median's interval its 95 %.",
    )
    dropped_repetitions: Annotated[int, Field(ge=0, le=100)] = Field(
        1, description="First repetitions that do not count: caches and clocks are still cold."
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="CPU threads; the physical cores this process may use if absent."
    )
    gpu_layers: Annotated[int, Field(ge=0, le=9999)] = Field(
        99, description="Layers on the GPU; 99 means all."
    )
    flash_attention: bool = Field(default=True, description="Flash attention.")
    kv_type: KvType = Field("f16", description="Type of the key-value cache.")
    batch_tokens: Tokens = Field(2048, description="Logical batch (-b).")
    ubatch_tokens: Tokens = Field(512, description="Physical batch (-ub).")
    quality: Quality = Field(default=Quality(), description="Divergence from f16.")


class Choose(Closed):
    """When a difference is large enough to matter."""

    min_speed_effect: Share = Field(
        0.03, description="Relative difference in speed below which two quants are equally fast."
    )
    min_quality_effect: Share = Field(
        0.10, description="Relative difference in mean divergence below which two are equal."
    )
    min_size_effect: Share = Field(
        0.01, description="Relative difference in file size below which two are equal."
    )


class Serving(Closed):
    """What serves the models, and how."""

    engine: Engine = Field(
        "auto",
        description="`auto`: Ollama where it is installed or can be, else the llama-server of the "
        "toolchain, and then no release is promoted. A model's own can be `llama-server` only.",
    )
    ollama: Annotated[str, StringConstraints(pattern=VERSION), _PRINTABLE] = Field(
        "0.33.0", description="Version of Ollama that is installed where PATH has none."
    )
    ollama_archive_sha256: Sha256 | None = Field(
        None,
        description="sha256 of that version's release archive for this platform, used where Go is "
        "not installed; without it no archive is downloaded.",
    )
    parallel: Slots = Field(
        1,
        description="Requests served at the same time (OLLAMA_NUM_PARALLEL, llama-server -np); "
        "each has the whole context.",
    )
    gpu_layers: GpuLayers = Field(
        "all", description="Layers on the GPU; `auto` lets the engine decide. No effect on a CPU."
    )
    cpu_moe_layers: CpuMoeLayers | None = Field(
        None,
        exclude_if=absent.is_none,
        description="First layers whose experts stay in main memory while all else of them is on "
        "the GPU (--n-cpu-moe): so a mixture of experts that is larger than a card runs on it. "
        "Measured and served alike; needs `engine: llama-server`. An error for a model without "
        "experts.",
    )
    kv_type: ServedKvType = Field("f16", description="Type of the key-value cache.")
    flash_attention: bool = Field(default=True, description="Flash attention.")


class LoadTest(Closed):
    """How the chosen GGUF is put under load."""

    concurrency: Annotated[tuple[Annotated[int, Field(ge=1, le=256)], ...],
                           Field(min_length=1, max_length=16)] = Field(
        (1, 2, 4), description="Requests in flight, one run for each, from few to many."
    )  # fmt: skip
    requests: Annotated[int, Field(ge=10, le=100_000)] = Field(
        40, description="Requests of each of these runs."
    )
    open_requests: Annotated[int, Field(ge=10, le=1_000_000)] = Field(
        200,
        description="Requests of the run with random arrivals, by which the service levels are "
        "judged; 73 without a miss are what 95 % needs, of 200 three may miss.",
    )
    rate_per_s: Positive | None = Field(
        None,
        description="Arrivals in a second that the model must carry; if absent, 70 % of what the "
        "concurrent runs reached.",
    )
    soak_seconds: Annotated[int, Field(ge=0, le=86_400)] = Field(
        0, description="Length of a last run at the same rate; 0 leaves it out."
    )
    prompt_tokens: Tokens = Field(128, description="Length of a prompt, about.")
    generate_tokens: Tokens = Field(64, description="Tokens that an answer may have.")
    warm_up_requests: Annotated[int, Field(ge=1, le=1000)] = Field(
        4, description="Requests that do not count, before each run."
    )
    smoke_requests: Annotated[int, Field(ge=1, le=1000)] = Field(
        10, description="Requests to every other quant that passed its gates."
    )
    degenerate_prompts: Annotated[int, Field(ge=8, le=1000)] = Field(
        24, description="Greedy answers compared with those of f16 for loops and missing ends."
    )
    max_degenerate_excess: Share = Field(
        0.10, description="Share of them that may be degenerate beyond those of f16."
    )
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        120, description="Silence after which a request has failed."
    )
    max_run_seconds: Annotated[int, Field(ge=1, le=86_400)] = Field(
        600, description="A run sends no more requests after this time and says so."
    )
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(
        1, description="Of prompts, arrivals and sampling."
    )
    slo: Slo = Field(default=Slo(), description="Service levels of every model and host.")


class Verify(Closed):
    """How a conversion is proven: upstream's files against the 16-bit GGUF."""

    logits: VerifyLogits = Field(
        "auto",
        description="`auto`: upstream's own implementation is run on held-out text where memory "
        "allows; `off` leaves that out, and every verdict says so.",
    )
    logits_tokens: Annotated[int, Field(ge=64, le=65_536)] = Field(
        512, description="Tokens of held-out text on which the logits are compared."
    )


# What a set asks of a model, and so how an answer is judged.
EvalKind = Literal["multiple-choice", "exact-match", "json-schema", "tool-call"]


class Eval(Closed):
    """A set of tasks: JSON lines, one item each."""

    kind: EvalKind = Field(
        description="`multiple-choice`: the likeliest continuation; `exact-match`: the answer; "
        "`json-schema`: an answer that the schema of the item accepts; `tool-call`: the call that "
        "the item expects, through the server's own tool parser."
    )
    path: RelativePath = Field(description="File below the repository.")
    sha256: Sha256 = Field(description="sha256 of the file.")
    license: LicenseId = Field(description="Licence of the set.")
    chance: Share | None = Field(
        None,
        description="Share that guessing gets right; of a multiple choice known from the items.",
    )


class Evaluate(Closed):
    """How task evals are run and judged: paired with f16, never by an absolute score."""

    alpha: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.05,
        description="Probability of so many more losses than gains by chance, below which a quant "
        "counts as harmed (McNemar's exact test, one-sided).",
    )
    canary_margin: Share = Field(
        0.10, description="What f16 must be above chance; a set on which it is not is void."
    )
    generate_tokens: Tokens = Field(64, description="Tokens that an answer may have.")
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        120, description="Silence of the server after which the stage ends with an error."
    )


class Compare(Closed):
    """How champion and challenger are compared on one machine."""

    pairs: Annotated[int, Field(ge=4, le=64)] = Field(
        8, description="Pairs of processes; as many again, once, if they leave it undecided."
    )
    control_pairs: Annotated[int, Field(ge=3, le=32)] = Field(
        4, description="Pairs of the champion with itself, which show what the machine can tell."
    )
    repetitions: Annotated[int, Field(ge=2, le=100)] = Field(
        5, description="Repetitions of each test in one process."
    )
    dropped_repetitions: Annotated[int, Field(ge=0, le=99)] = Field(
        1, description="First repetitions of a process that do not count."
    )
    min_decode_effect: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.03, description="Relative difference in decode speed that matters."
    )
    min_prefill_effect: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.05, description="Relative difference in prefill speed that matters."
    )
    min_quality_effect: Annotated[float, Field(gt=0, lt=10)] = Field(
        0.10, description="Relative difference in mean divergence that matters."
    )
    max_minutes: Annotated[int, Field(ge=1, le=1440)] = Field(
        30, description="Time that a comparison may take; it says beforehand what it will."
    )
    required: bool = Field(
        default=False,
        description="HOLD what was not compared with the release that is served now.",
    )


class Track(Closed):
    """Where runs are shown."""

    tracking_uri: Annotated[str, StringConstraints(pattern=TRACKING_URI), _PRINTABLE] = Field(
        "sqlite:///work/mlflow.db",
        description="MLflow tracking URI, without a password: MLflow reads that from "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
    )
    experiment: Annotated[str, StringConstraints(pattern=EXPERIMENT), _PRINTABLE] = Field(
        "gguf-fleet", description="MLflow experiment."
    )


# The registry that `dvc repro` keeps; the others are published to by name.
LOCAL_REGISTRY = "local"
LOCAL_URL = "file:registry"


class Registry(Closed):
    """Where releases go. Credentials come from the environment, never from here."""

    url: RegistryUrl = Field(
        description="`file:registry`, `s3://bucket/prefix`, `oci://host:port/namespace`, "
        "`hf:owner`, `mlflow:http://host:5000`."
    )
    endpoint: Endpoint | None = Field(
        None,
        description="Address of an S3 service other than AWS, of a mirror of the Hub, or of the "
        "token service of an OCI registry that has it on another host.",
    )
    region: Annotated[str, StringConstraints(pattern=MODEL_KEY), _PRINTABLE] | None = Field(
        None, description="Region of an S3 bucket."
    )
    insecure: bool = Field(
        default=False, description="Allow plain HTTP to a host other than this one."
    )
    private: bool = Field(default=True, description="A new repository on the Hub is private.")
    blobs: ModelKey | None = Field(
        None, description="Registry that holds the files; `mlflow:` keeps none itself."
    )
    max_file_mib: Annotated[int, Field(ge=1, le=100_000_000)] | None = Field(
        None, description="Largest file that it takes, where that is less than its kind takes."
    )


class Host(Closed):
    """A machine that will serve."""

    vram_mib: Annotated[int, Field(ge=1, le=100_000_000)] | None = Field(
        None, description="Memory of its GPUs; absent on a host that serves from the CPU."
    )
    memory_mib: Annotated[int, Field(ge=1, le=100_000_000)] | None = Field(
        None, description="Main memory that a model may take on a host without a GPU."
    )
    margin_mib: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        1024, description="Memory that has to stay free (llama.cpp's own default is 1,024 MiB)."
    )
    slo: Slo = Field(default=Slo(), description="Overrides of the fleet's `slo`.")


class DeclaredHost(Host):
    """A machine that will serve, and the runner that measures for it in a pull request."""

    runs_on: Annotated[tuple[Label, ...], Field(min_length=1, max_length=10)] | None = Field(
        None,
        description="Labels of the self-hosted runner that measures for this host in a pull "
        "request, `self-hosted` first. A host without them is judged by what the first one with "
        "them measured.",
    )

    def judged(self) -> Host:
        """Return what decides a verdict: a label that is renamed measures nothing again."""
        return Host(**{name: getattr(self, name) for name in Host.model_fields})


class DeclaredRegistry(Registry):
    """Where releases go, and whose approval that takes on GitHub."""

    environment: Label | None = Field(
        None,
        description="Deployment environment of GitHub in which the publish workflow writes to it: "
        "its reviewers approve, its secrets open the registry. Without one the workflow leaves it "
        "alone; `local` is never written there.",
    )

    def opened(self) -> Registry:
        """Return what a release depends on."""
        return Registry(**{name: getattr(self, name) for name in Registry.model_fields})


class Plan(Closed):
    """What a pull request may cost before a person has to agree, by the label `over-budget`."""

    max_gpu_minutes: Positive | None = Field(
        None, description="Minutes on self-hosted runners, all models and hosts together."
    )
    max_disk_gib: Positive | None = Field(
        None, description="GiB of new files on the runners and in the DVC remote."
    )
    max_network_gib: Positive | None = Field(None, description="GiB to be fetched from the Hub.")
    timeout_minutes: Annotated[int, Field(ge=5, le=1440)] = Field(
        240,
        description="Minutes after which a measuring job is ended. GitHub's own token is good for "
        "a day.",
    )


class IgnoredReleases(Closed):
    """Releases of the engines that `check-upstream` passes over, by the key that pins them."""

    llama_cpp_python: tuple[Version, ...] = Field(
        (), description="Of llama-cpp-python.", max_length=64
    )
    ollama: tuple[Version, ...] = Field((), description="Of Ollama.", max_length=64)


class CheckUpstream(Closed):
    """How models and engines are watched. Nothing of it changes what is made of a commit."""

    cooldown_days: Days = Field(
        3,
        description="Age that a change has to reach before it is proposed: time for others to find "
        "out that it is broken or hostile.",
    )
    period_hours: Annotated[int, Field(ge=1, le=8760)] = Field(
        24,
        description="How often upstream is looked at. What could not be looked at for two periods "
        "is an alarm in the report.",
    )
    cards: bool = Field(
        default=False, description="Propose also what changes nothing but the model card."
    )
    engines: bool = Field(default=True, description="Watch llama-cpp-python and Ollama, too.")
    ignore: IgnoredReleases = Field(
        default=IgnoredReleases(),
        description="Releases of the engines that are passed over; of a model that is "
        "`models.*.ignore`. A pull request of `bump` that was closed says the same of its release.",
    )
    deadline_seconds: Annotated[int, Field(ge=5, le=3600)] = Field(
        120, description="For one look at everything, with all repeats."
    )


class Fetch(Closed):
    """How patient a download is. Nothing of it changes the bytes."""

    deadline_minutes: Annotated[int, Field(ge=1, le=10_080)] = Field(
        720, description="For all files of a model, with all repeats."
    )
    min_rate_kib_s: Annotated[int, Field(ge=0, le=10_000_000)] = Field(
        100, description="A transfer that is slower for `stall_seconds` is ended and begun again."
    )
    stall_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        60, description="See `min_rate_kib_s`."
    )


class Declaration(Closed):
    """params.yaml."""

    toolchain: Toolchain = Field(description="The one pinned llama.cpp.")
    corpora: dict[CorpusKey, Corpus] = Field(description="Texts for calibration and evaluation.")
    models: dict[ModelKey, Model] = Field(description="The fleet, by name.", min_length=1)
    quants: dict[QuantKey, Quant] = Field(
        description="The GGUFs to make, as <model>-<TYPE>.", min_length=1
    )
    gates: Gates = Field(default=Gates(), description="Limits for every model.")
    verify: Verify = Field(default=Verify(), description="The proof of a conversion.")
    calibrate: Calibrate = Field(default=Calibrate(), description="The importance matrix.")
    benchmark: Benchmark = Field(default=Benchmark(), description="The measurements.")
    evals: dict[EvalKey, Eval] = Field(default_factory=dict, description="Sets of tasks, by name.")
    evaluate: Evaluate = Field(default=Evaluate(), description="The task evals.")
    choose: Choose = Field(default=Choose(), description="The choice.")
    compare: Compare = Field(default=Compare(), description="Champion against challenger.")
    serving: Serving = Field(default=Serving(), description="The engine that serves.")
    load_test: LoadTest = Field(default=LoadTest(), description="The load test.")
    track: Track = Field(default=Track(), description="MLflow.")
    plan: Plan = Field(default=Plan(), description="What a pull request may cost.")
    check_upstream: CheckUpstream = Field(
        default=CheckUpstream(), description="The watch over models and engines."
    )
    fetch: Fetch = Field(default=Fetch(), description="Downloads.")
    hosts: dict[HostKey, DeclaredHost] = Field(
        description="Where models are served, by name.", min_length=1
    )
    registries: dict[ModelKey, DeclaredRegistry] = Field(
        default_factory=lambda: {LOCAL_REGISTRY: DeclaredRegistry(url=LOCAL_URL)},
        description="Where releases go, by name; `local` is the one that `dvc repro` keeps.",
    )


# --- what one stage reads, resolved -----------------------------------------------------------


class FetchSlice(Closed):
    """Decides the bytes that fetch brings, and whether it brings any."""

    model: str
    source: str
    revision: str
    ignore_code: bool = Field(default=False, exclude_if=operator.not_)


class ConvertSlice(Closed):
    """Decides, with the source and the toolchain, the f16 GGUF."""

    model: str
    recipe: int


class VerifySlice(Closed):
    """Decides how the conversion is proven; the held-out text is the model's evaluation corpus."""

    model: str
    recipe: int
    corpus: Corpus
    verify: Verify


class CalibrateSlice(Closed):
    """Decides the importance matrix; without a corpus there is none."""

    model: str
    recipe: int
    corpus: Corpus | None
    context_tokens: int
    chunks: int | None


class QuantizeSlice(Closed):
    """Decides a quantized GGUF."""

    key: str
    model: str
    recipe: int
    type: QuantType
    imatrix: bool
    tensor_types: tuple[TensorRule, ...]
    preset: Preset | None
    recipe_file: RecipeFile | None
    output_tensor_type: TensorType | None
    token_embedding_type: TensorType | None
    pure: bool
    leave_output_tensor: bool
    max_fallbacks: int


class BenchmarkSlice(Closed):
    """Decides what is measured of a quant."""

    key: str
    model: str
    type: QuantType
    recipe: int
    context_tokens: int
    corpus: Corpus
    benchmark: Benchmark
    cpu_moe_layers: CpuMoeLayers | None = Field(None, exclude_if=absent.is_none)


class EvaluateSlice(Closed):
    """Decides which tasks the quants of a model do, and how they are judged."""

    model: str
    quants: dict[str, QuantType]
    recipe: int
    context_tokens: int
    threads: int | None
    evals: dict[str, Eval]
    evaluate: Evaluate


class ChooseSlice(Closed):
    """Decides which measured quant is best."""

    model: str
    quants: dict[str, QuantType]
    objective: Objective
    gates: Gates
    context_tokens: int
    choose: Choose
    hosts: dict[str, Host]


class LoadTestSlice(Closed):
    """Decides how a model is served and loaded; `slos` holds the resolved levels by host."""

    model: str
    quants: dict[str, QuantType]
    recipe: int
    context_tokens: int
    modelfile: str
    corpus: Corpus
    threads: int | None
    serving: Serving
    load_test: LoadTest
    hosts: dict[str, Host]
    slos: dict[str, Slo]


class JudgeSlice(Closed):
    """
    Decides, with the records, the verdict on a model: what they are held against.

    `gates`, `hosts` and `slos` are those by which `choose` and the load test judge now;
    `corpus_sha256` is that of the text on which divergence is measured, `evals` the sha256 of each
    declared set, by name; `compare_effects` are the differences that matter, of `decode`, `prefill`
    and `quality`.
    """

    model: str
    quants: dict[str, QuantType]
    source: str
    revision: str
    recipe: int
    context_tokens: int
    modelfile: str
    serving: Serving
    objective: Objective
    gates: Gates
    hosts: dict[str, Host]
    slos: dict[str, Slo]
    corpus_sha256: str
    logits: VerifyLogits
    evals: dict[str, str]
    alpha: float
    compare_required: bool
    compare_effects: dict[str, float]
    stable: str
    license: str | None
    waivers: tuple[Waiver, ...]


class PublishSlice(JudgeSlice):
    """Decides what a release holds and which one is stable; the registry is the local one."""

    threads: int | None
    registry: Registry


class TrackSlice(Closed):
    """Decides what MLflow is told."""

    model: str
    quants: dict[str, QuantType]
    track: Track


class ReportSlice(Closed):
    """Decides what the report covers, and by what each model is judged."""

    models: dict[str, JudgeSlice]


# --- from the file to the slices --------------------------------------------------------------


def fetch_slice(declared: Declaration, model: str) -> FetchSlice:
    """Resolve what `fetch` of a model reads."""
    spec = declared.models[model]
    return FetchSlice(
        model=model,
        source=spec.source,
        revision=spec.revision,
        ignore_code=spec.ignore_code,
    )


def convert_slice(declared: Declaration, model: str) -> ConvertSlice:
    """Resolve what `convert` of a model reads."""
    return ConvertSlice(model=model, recipe=declared.toolchain.recipe)


def verify_slice(declared: Declaration, model: str) -> VerifySlice:
    """Resolve what `verify` of a model reads; a model's own value beats the top-level one."""
    spec = declared.models[model]
    own = spec.verify.model_dump(exclude_none=True)
    return VerifySlice(
        model=model,
        recipe=declared.toolchain.recipe,
        corpus=declared.corpora[spec.evaluation],
        verify=declared.verify.model_copy(update=own),
    )


def evaluate_slice(declared: Declaration, model: str) -> EvaluateSlice:
    """Resolve what `evaluate` of a model reads."""
    spec = declared.models[model]
    return EvaluateSlice(
        model=model,
        quants=quants_of(declared, model),
        recipe=declared.toolchain.recipe,
        context_tokens=spec.context_tokens,
        threads=declared.benchmark.threads,
        evals={name: declared.evals[name] for name in spec.evals},
        evaluate=declared.evaluate,
    )


def calibrate_slice(declared: Declaration, model: str) -> CalibrateSlice:
    """Resolve what `calibrate` of a model reads."""
    name = declared.models[model].calibration
    return CalibrateSlice(
        model=model,
        recipe=declared.toolchain.recipe,
        corpus=declared.corpora[name] if name else None,
        context_tokens=declared.calibrate.context_tokens,
        chunks=declared.calibrate.chunks,
    )


def quantize_slice(declared: Declaration, key: str) -> QuantizeSlice:
    """Resolve what `quantize` of a quant reads."""
    quant = declared.quants[key]
    return QuantizeSlice(key=key, recipe=declared.toolchain.recipe, **dict(quant))


def benchmark_slice(declared: Declaration, key: str) -> BenchmarkSlice:
    """Resolve what `benchmark` of a quant reads."""
    quant = declared.quants[key]
    model = declared.models[quant.model]
    return BenchmarkSlice(
        key=key,
        model=quant.model,
        type=quant.type,
        recipe=declared.toolchain.recipe,
        context_tokens=model.context_tokens,
        corpus=declared.corpora[model.evaluation],
        benchmark=declared.benchmark,
        cpu_moe_layers=served_as(declared, quant.model).cpu_moe_layers,
    )


def quants_of(declared: Declaration, model: str) -> dict[str, QuantType]:
    """Return {quant key: type} of a model, in the order of the file."""
    return {key: quant.type for key, quant in declared.quants.items() if quant.model == model}


def routed_hosts(declared: Declaration, model: str) -> dict[str, DeclaredHost]:
    """Return the hosts that serve a model, in the order of `hosts`; without a route every one."""
    wanted = declared.models[model].hosts
    return {name: host for name, host in declared.hosts.items() if wanted is None or name in wanted}


def judged_hosts(declared: Declaration, model: str) -> dict[str, Host]:
    """Return the hosts of a model as `choose` and the load test see them."""
    return {name: host.judged() for name, host in routed_hosts(declared, model).items()}


def choose_slice(declared: Declaration, model: str) -> ChooseSlice:
    """Resolve what `choose` of a model reads; a model's own gate beats the top-level one."""
    spec = declared.models[model]
    own = spec.gates.model_dump(exclude_none=True)
    return ChooseSlice(
        model=model,
        quants=quants_of(declared, model),
        objective=spec.objective,
        gates=Gates(**(declared.gates.model_dump() | own)),
        context_tokens=spec.context_tokens,
        choose=declared.choose,
        hosts=judged_hosts(declared, model),
    )


def served_as(declared: Declaration, model: str) -> Serving:
    """Resolve how a model is served; its own value beats the top-level one."""
    own = declared.models[model].serving.model_dump(exclude_none=True)
    return declared.serving.model_copy(update=own)


# 95 %, two-sided; `pipelines.stats` judges by the same.
_Z_SQUARED = 1.959963984540054**2


def least_requests(share: float) -> int:
    """
    Return how many requests without a miss show a share: Wilson's bound n / (n + z^2) reaches it.

    73 for 0.95, 381 for 0.99.
    """
    return math.ceil(_Z_SQUARED * share / (1 - share))


# A service level that nobody states.
MIN_GOODPUT = 0.95


def load_test_slice(declared: Declaration, model: str) -> LoadTestSlice:
    """Resolve what `load-test` of a model reads; levels: model > host > fleet > built-in."""
    spec = declared.models[model]
    fleet = declared.load_test.slo
    slos = {
        name: Slo(
            **(
                {"min_goodput": MIN_GOODPUT}
                | fleet.model_dump(exclude_none=True)
                | host.slo.model_dump(exclude_none=True)
                | spec.slo.model_dump(exclude_none=True)
            )
        )
        for name, host in routed_hosts(declared, model).items()
    }
    return LoadTestSlice(
        model=model,
        quants=quants_of(declared, model),
        recipe=declared.toolchain.recipe,
        context_tokens=spec.context_tokens,
        modelfile=spec.modelfile,
        corpus=declared.corpora[spec.evaluation],
        threads=declared.benchmark.threads,
        serving=served_as(declared, model),
        load_test=declared.load_test,
        hosts=judged_hosts(declared, model),
        slos=slos,
    )


def registry_of(declared: Declaration, name: str) -> Registry | None:
    """Return a declared registry; `local` is there even if nobody declares it."""
    if name in declared.registries:
        return declared.registries[name].opened()
    return Registry(url=LOCAL_URL) if name == LOCAL_REGISTRY else None


def judge_slice(declared: Declaration, model: str) -> JudgeSlice:
    """Resolve by what a model is judged."""
    spec = declared.models[model]
    chosen = choose_slice(declared, model)
    served = load_test_slice(declared, model)
    evaluated = evaluate_slice(declared, model)
    return JudgeSlice(
        model=model,
        quants=chosen.quants,
        source=spec.source,
        revision=spec.revision,
        recipe=declared.toolchain.recipe,
        context_tokens=spec.context_tokens,
        modelfile=spec.modelfile,
        serving=served.serving,
        objective=chosen.objective,
        gates=chosen.gates,
        hosts=chosen.hosts,
        slos=served.slos,
        corpus_sha256=declared.corpora[spec.evaluation].sha256,
        logits=verify_slice(declared, model).verify.logits,
        evals={name: spec.sha256 for name, spec in evaluated.evals.items()},
        alpha=evaluated.evaluate.alpha,
        compare_required=declared.compare.required,
        compare_effects={
            "decode": declared.compare.min_decode_effect,
            "prefill": declared.compare.min_prefill_effect,
            "quality": declared.compare.min_quality_effect,
        },
        stable=spec.stable,
        license=spec.license,
        waivers=spec.waivers,
    )


def publish_slice(declared: Declaration, model: str) -> PublishSlice:
    """Resolve what `publish` of a model reads."""
    local = registry_of(declared, LOCAL_REGISTRY)
    assert local is not None, "there is a default"
    return PublishSlice(
        **dict(judge_slice(declared, model)),
        threads=declared.benchmark.threads,
        registry=local,
    )


def track_slice(declared: Declaration, model: str) -> TrackSlice:
    """Resolve what `track` of a model reads."""
    return TrackSlice(model=model, quants=quants_of(declared, model), track=declared.track)


def report_slice(declared: Declaration) -> ReportSlice:
    """Resolve what `report` reads."""
    return ReportSlice(models={model: judge_slice(declared, model) for model in declared.models})


# Syntax that Python has and std::regex has not, or that means something else there, and the `=` at
# which llama-quantize ends the pattern. Escapes are limited to classes and to punctuation.
_NOT_IN_BOTH = re.compile(r"\(\?[^:!]|\\[^bdsw\W]|[*+?}]\+|\{,|\[\^?\]|\[\[|=")


def is_safe_regex(pattern: str) -> bool:
    r"""
    Tell whether llama-quantize reads a pattern as Python does.

    llama-quantize lower-cases it (which turns `\D` into `\d`) and gives it to std::regex
    (ECMAScript); the prediction of a quant's tensor types searches with Python's `re`. Both go
    back and try again, so a pattern that can match in more ways than there is time for is refused.
    """
    if pattern != pattern.lower() or _NOT_IN_BOTH.search(pattern):
        return False
    try:
        with warnings.catch_warnings():
            # FutureWarning: a set operation of a later Python, which std::regex does not have.
            warnings.simplefilter("error")
            re.compile(pattern)
            parsed = re._parser.parse(pattern)  # type: ignore[attr-defined]  # noqa: SLF001
    except (re.error, OverflowError, RecursionError, Warning):
        return False
    return _repeats(parsed) <= _MAX_REPEATS


# Names of tensors have some 60 characters. With four repeats a search has 500,000 ways at most.
_MAX_REPEATS = 4


def _repeats(parsed: Any, *, inside: bool = False) -> float:  # noqa: ANN401 - a tree of re's own
    """
    Count the repeats of a parsed pattern; endless if one repeats what can match in many ways.

    `(a+)+` and `(a|b)*` have twice as many ways for each further character.
    """
    count = 0.0
    for operation, argument in parsed:
        name = str(operation)
        if name in {"MAX_REPEAT", "MIN_REPEAT"}:
            _, most, inner = argument
            repeated = most > 1
            if repeated and inside:
                return math.inf
            count += 1 + _repeats(inner, inside=inside or repeated)
        elif name == "BRANCH":
            if inside:
                return math.inf
            count += max(_repeats(each) for each in argument[1])
        elif name == "SUBPATTERN":
            count += _repeats(argument[-1], inside=inside)
        elif name in {"ASSERT", "ASSERT_NOT"}:
            count += _repeats(argument[1], inside=inside)
    return count
