"""
Outputs: upstream's own implementation against llama.cpp, on the same tokens of held-out text.

Two processes of ours compute, one after the other so that one model is in memory at a time:
`pipelines.upstream_logits` with transformers in float32, `pipelines.llama_logits` with llama.cpp
and the 16-bit GGUF. Both get the token ids of upstream's tokenizer.

The limit is no constant. A 16-bit GGUF cannot equal float32: llama.cpp rounds activations to 16
bits before each product, and what that does to the outputs grows with the depth of a model and with
the sharpness of its distributions. So upstream's implementation is run once more with that rounding
and nothing else changed, and the GGUF may differ `ROUNDINGS` times as much as that, or the floor
below which nobody could tell the difference. The divergence that is judged is the mean without the
2 % of positions that moved most: where experts are routed, a rounding now and then sends a token to
another one, which is no fault, and a fault of the conversion moves every position.

Measured over 512 tokens of the evaluation corpus, in nats, on tiny models with random weights
(tests/architecture_factory.py) and on the embedded, trained one; the limit is ten roundings:

    model        GGUF      rounding  limit     smallest planted fault that is computed
    tiny-llama   7.2e-08   < 1e-06   1.0e-05   2.3e-04  norm epsilon x 100
    llama        6.2e-06   6.2e-06   6.2e-05
    mixtral      8.7e-06   8.8e-06   8.8e-05   3.9e-02  one layer x 1.1
    gemma4       3.6e-05   3.4e-05   3.4e-04
    bert         1.0e-07   (1 - cosine; limit 1.0e-06)
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import psutil

from pipelines import apart, architectures, atomic, console, corpora, disk, machine, proc, wording
from pipelines.errors import MachineError, ToolError
from pipelines.llama_logits import COMPARED
from pipelines.upstream_logits import ANSWER
from pipelines.verify_records import Check, EmbeddingAgreement, LogitsAgreement

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipelines.verify_subject import Subject

# A GGUF may differ so many times as much as rounding alone makes upstream differ from itself.
ROUNDINGS: Final = 10.0
# Nats below which a divergence is nothing: a hundredth of what Q8_0 does to an 8B model.
FLOOR_NATS: Final = 1e-5
# One less the cosine of two embeddings, the same for an encoder.
FLOOR_COSINE: Final = 1e-6
# With the positions that moved most: a router that rounds to another expert, and nothing more.
MAX_MEAN_NATS: Final = 0.01
# Positions at which the most probable token may be another, beside those that rounding changes.
FLOOR_FLIPS: Final = 0.01
_TRIMMED_SHARE: Final = 0.02

# Longer windows would need logits of gigabytes, and show nothing that the metadata does not.
WINDOW_TOKENS: Final = 512
TEXTS: Final = 48
LEAST_TEXTS: Final = 32
# torch, transformers and what they load, before the first weight.
_OVERHEAD_BYTES: Final = 1 << 30
_FLOAT_BYTES: Final = 4
_STORED_BYTES: Final = 2
# Logits of a window as the model makes them, as a float32 copy, with rounding, and in float64.
_COPIES: Final = 5


@dataclass(frozen=True)
class Memory:
    """
    What upstream's implementation needs, and what there is, in bytes.

    Attributes:
        full: With all weights in float32.
        streamed: With the weights as they are stored, and the largest in float32.
        free: What programs can take now.
    """

    full: int
    streamed: int
    free: int

    @property
    def fits(self) -> bool:
        """Whether there is a way."""
        return self.streamed <= self.free

    @property
    def must_stream(self) -> bool:
        """Whether float32 of all weights does not fit."""
        return self.full > self.free


def check(subject: Subject) -> tuple[Check, LogitsAgreement | None, EmbeddingAgreement | None]:
    """
    Compare the outputs.

    Returns:
        The check, with the agreement of a model that predicts tokens, or of an encoder; both None
        where nothing was compared.

    Raises:
        ParamsError: The evaluation corpus is missing.
        DigestError: It is another one than declared.
        ToolError: One of the two processes crashed, so that nothing is proven.
        MachineError: Memory, disk or Python packages are missing.
    """
    if subject.slice_.verify.logits == "off":
        return _skipped("switched off in params.yaml (verify.logits: off)"), None, None
    memory = memory_of(subject)
    if not memory.fits:
        return _skipped(_too_little(memory)), None, None
    corpora.require(subject.slice_.corpus, subject.at, "evaluation text")
    job = write_job(subject, subject.scratch / "logits", streamed=memory.must_stream)
    try:
        upstream = ask_upstream(subject, job)
        if "failure" in upstream:
            cause = _words(upstream["failure"])
            return _skipped(f"upstream's implementation cannot be asked: {cause}"), None, None
        compared = ask_llama(subject, job)
    finally:
        atomic.remove(job.parent)
    return judge(compared, upstream, corpus_sha256=subject.slice_.corpus.sha256)


def memory_of(subject: Subject) -> Memory:
    """Estimate what upstream's implementation needs, and ask what there is."""
    count = subject.fetch.parameters_count
    width = max((t.shape[-1] for t in subject.header.tensors if t.name in _WIDE), default=0)
    largest = max((tensor.n_elements for tensor in subject.header.tensors), default=0)
    logits = _COPIES * _FLOAT_BYTES * WINDOW_TOKENS * width
    free = min(psutil.virtual_memory().available, machine.usable_memory_bytes())
    return Memory(
        # Rounding makes a 16-bit copy of one matrix at a time, reading a copy of one as well.
        full=_OVERHEAD_BYTES + logits + _FLOAT_BYTES * (count + largest),
        streamed=_OVERHEAD_BYTES + logits + _STORED_BYTES * count + 2 * _FLOAT_BYTES * largest,
        free=free,
    )


# Matrices whose rows are tokens.
_WIDE: Final = frozenset({"output.weight", "token_embd.weight"})


def _too_little(memory: Memory) -> str:
    gib = [f"{size / 2**30:.1f} GiB" for size in (memory.streamed, memory.free)]
    return (
        f"upstream's implementation needs {gib[0]} of memory, {gib[1]} are free: run verify on a "
        "machine with more, or declare verify.logits: off"
    )


def write_job(subject: Subject, directory: Path, *, streamed: bool) -> Path:
    """
    Write down what both processes have to do.

    Args:
        subject: The conversion.
        directory: Of the comparison's own; made anew.
        streamed: Keep upstream's weights as they are stored.

    Raises:
        MachineError: The disk has no room for upstream's logits.
    """
    atomic.remove(directory)
    directory.mkdir(parents=True)
    encoder = architectures.is_encoder(subject.header)
    context = subject.convert.context_train_tokens or WINDOW_TOKENS
    tokens = subject.slice_.verify.logits_tokens
    width = max((t.shape[-1] for t in subject.header.tensors if t.name in _WIDE), default=0)
    if not encoder:
        disk.require(directory, _FLOAT_BYTES * tokens * width, f"verify {subject.model}: logits")
    job = directory / "job.json"
    atomic.write_json(
        job,
        {
            "source": str(subject.source.absolute()),
            "gguf": str(subject.f16.absolute()),
            "corpus": str((subject.at.root / subject.slice_.corpus.path).absolute()),
            "tokens": tokens,
            "window": min(WINDOW_TOKENS, context),
            "texts": TEXTS,
            "pooling": architectures.pooling(subject.header) if encoder else None,
            "threads": machine.usable_cores(),
            "streamed": streamed,
        },
    )
    return job


def ask_upstream(subject: Subject, job: Path) -> dict[str, Any]:
    """
    Let transformers compute; the outputs lie beside the job afterwards.

    Raises:
        ToolError: It crashed.
        MachineError: Its packages are missing, or memory was used up.
    """
    words = apart.module("upstream's implementation", "pipelines.upstream_logits", job)
    return _asked(subject, job, words, ANSWER, apart.environment(job.parent, ours=True))


def ask_llama(subject: Subject, job: Path) -> dict[str, Any]:
    """
    Let llama.cpp compute the same, and compare; see `ask_upstream` for what is raised.

    The GGUF is the one of the job.
    """
    words = apart.module("llama.cpp", "pipelines.llama_logits", job)
    environment = apart.environment(job.parent, ours=True)
    bindings = subject.tools.prefix / "python"
    environment["PYTHONPATH"] = f"{bindings}:{environment['PYTHONPATH']}"
    environment["LLAMA_CPP_LIB_PATH"] = str(subject.tools.prefix / "lib")
    return _asked(subject, job, words, COMPARED, environment)


def _asked(
    subject: Subject,
    job: Path,
    words: Sequence[str | Path],
    answer: str,
    environment: dict[str, str],
) -> dict[str, Any]:
    """Run one of the two processes and read its answer."""
    done = proc.run(words, log=subject.log, env=environment, inherit_env=False)
    try:
        found: dict[str, Any] = json.loads((job.parent / answer).read_text())
    except (OSError, ValueError) as error:
        raise ToolError(
            f"{answer} was not written whole: {error}.\n{proc.tail(done)}".rstrip(), log=subject.log
        ) from error
    failure = found.get("failure", {})
    if failure.get("kind") == "import":
        raise MachineError(
            f"the comparison of outputs needs Python packages that are missing: {_words(failure)}.",
            hint="Install the extra `convert`: make setup.",
            log=subject.log,
        )
    if failure.get("kind") == "memory":
        raise MachineError(
            f"memory was used up while outputs of {subject.model} were compared.",
            hint="Use a machine with more, or declare verify.logits: off.",
            log=subject.log,
        )
    if failure:
        complaint = _COMPLAINT.findall(done.stderr)
        if complaint:
            failure["text"] += f" ({complaint[0]})"
    return found


_COMPLAINT: Final = re.compile(r"error loading model: (?!error loading)(.+)$", re.MULTILINE)


def _words(failure: dict[str, str]) -> str:
    return console.clean(failure["text"])[:300].rstrip(".")


def judge(
    compared: dict[str, Any], upstream: dict[str, Any], *, corpus_sha256: str
) -> tuple[Check, LogitsAgreement | None, EmbeddingAgreement | None]:
    """
    Hold what was found against what rounding alone does.

    Args:
        compared: Answer of `ask_llama`.
        upstream: Answer of `ask_upstream`.
        corpus_sha256: Of the text.
    """
    if "failure" in compared:
        return (
            _failed(
                0, f"The 16-bit GGUF gave no outputs to compare: {_words(compared['failure'])}.", ()
            ),
            None,
            None,
        )
    if upstream["pooling"] is not None:
        outcome, embeddings = _judge_embeddings(compared, upstream, corpus_sha256)
        return outcome, None, embeddings
    outcome, logits = _judge_logits(compared, upstream, corpus_sha256)
    return outcome, logits, None


def _judge_logits(
    compared: dict[str, Any], upstream: dict[str, Any], corpus_sha256: str
) -> tuple[Check, LogitsAgreement]:
    divergence: list[float] = compared["kld_nats"]
    rounding, flips = zip(*upstream["rounding"], strict=True)
    agreement = LogitsAgreement(
        corpus_sha256=corpus_sha256,
        tokens_count=len(divergence),
        same_top=_rounded(statistics.fmean(compared["same_top"])),
        kld_mean_nats=_rounded(statistics.fmean(divergence)),
        kld_max_nats=_rounded(max(divergence)),
        nll_upstream_nats=_rounded(statistics.fmean(compared["nll_upstream_nats"])),
        nll_gguf_nats=_rounded(statistics.fmean(compared["nll_gguf_nats"])),
    )
    found, limit = trimmed_mean(divergence), max(FLOOR_NATS, ROUNDINGS * trimmed_mean(rounding))
    mean, mean_limit = (
        agreement.kld_mean_nats,
        max(MAX_MEAN_NATS, ROUNDINGS * statistics.fmean(rounding)),
    )
    least_same = 1 - FLOOR_FLIPS - ROUNDINGS * statistics.fmean(flips)
    differing = compared["same_top"].count(False)
    sentence = (
        f"On {wording.counted(len(divergence), 'token')} of held-out text the probabilities differ "
        f"from upstream's by {found:.2g} nats (mean divergence without the {_TRIMMED_SHARE:.0%} of "
        f"tokens that differ most; limit {limit:.2g}), by {mean:.2g} with those (limit "
        f"{mean_limit:.2g}); the most probable token is the same at {agreement.same_top:.2%} (at "
        f"least {max(least_same, 0):.2%}); the loss is {agreement.nll_upstream_nats:.4g} nats "
        f"upstream, {agreement.nll_gguf_nats:.4g} here."
    )
    if found <= limit and mean <= mean_limit and agreement.same_top >= least_same:
        return _passed(len(divergence), differing, sentence), agreement
    worst = sorted(range(len(divergence)), key=lambda at: -divergence[at])[:5]
    ids = [id_ for window in upstream["windows"] for id_ in window]
    findings = tuple(f"after token {at} (id {ids[at]}): {divergence[at]:.3g} nats" for at in worst)
    return _failed(len(divergence), sentence, findings, max(1, differing)), agreement


def _judge_embeddings(
    compared: dict[str, Any], upstream: dict[str, Any], corpus_sha256: str
) -> tuple[Check, EmbeddingAgreement | None]:
    cosines: list[float] = compared["cosines"]
    if len(cosines) < LEAST_TEXTS:
        return _skipped(
            f"the corpus has {wording.counted(len(cosines), 'paragraph')}, {LEAST_TEXTS} are needed"
        ), None
    agreement = EmbeddingAgreement(
        corpus_sha256=corpus_sha256,
        texts_count=len(cosines),
        cosine_mean=round(statistics.fmean(cosines), 8),
        cosine_min=round(min(cosines), 8),
    )
    distances = [1 - cosine for cosine in cosines]
    rounding = [figures[0] for figures in upstream["rounding"]]
    limit = max(FLOOR_COSINE, ROUNDINGS * statistics.fmean(rounding))
    found = statistics.fmean(distances)
    count = wording.counted(len(cosines), "text")
    sentence = (
        f"The embeddings of {count} ({upstream['pooling']} pooling, as "
        f"upstream) were compared with upstream's: 1 less the cosine is {found:.2g} on average "
        f"(limit {limit:.2g}), {max(distances):.2g} at most."
    )
    if found <= limit:
        return _passed(len(cosines), 0, sentence), agreement
    beyond = [at for at, distance in enumerate(distances) if distance > limit]
    findings = tuple(f"text {at}: cosine {cosines[at]:.6f}" for at in beyond[:5])
    return _failed(len(cosines), sentence, findings, max(1, len(beyond))), agreement


def trimmed_mean(values: Sequence[float]) -> float:
    """Return the mean of all but the largest 2 %."""
    kept = sorted(values)[: max(1, round(len(values) * (1 - _TRIMMED_SHARE)))]
    return statistics.fmean(kept)


def _rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def _skipped(reason: str) -> Check:
    return Check(
        layer="logits",
        outcome="SKIP",
        examined_count=0,
        differing_count=0,
        sentence=f"Outputs were not compared: {reason}.",
    )


def _passed(count: int, differing: int, sentence: str) -> Check:
    return Check(
        layer="logits",
        outcome="PASS",
        examined_count=count,
        differing_count=differing,
        sentence=sentence,
    )


def _failed(count: int, sentence: str, findings: tuple[str, ...], differing: int = 1) -> Check:
    return Check(
        layer="logits",
        outcome="FAIL",
        examined_count=count,
        differing_count=differing,
        sentence=sentence,
        findings=findings,
    )
