"""
The divergence of champion and challenger, each from its own f16, window by window.

llama-perplexity prints the running mean after each window with five decimals. A single window would
be all rounding, so windows are taken together in blocks, of which the mean is exact to a few 1e-5
nats; the rounding of one block is taken back by the next. The difference is then resampled by
blocks, of both at the same places if both come from one f16: tokens of a window depend on each
other, and an error bar that takes them as independent is half of the true one.
"""

from __future__ import annotations

import itertools
import os
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from pipelines import (
    atomic,
    benchmark,
    compare_words,
    console,
    llama_perplexity,
    llamacpp,
    proc,
    stats_paired,
)
from pipelines.compare_records import QualityComparison
from pipelines.layout import Layout

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.llamacpp import Execution
    from pipelines.params import BenchmarkSlice
    from pipelines.records import FileDigest
    from pipelines.toolchain import Toolchain

BLOCKS: Final = 20


@dataclass(frozen=True, kw_only=True)
class Subject:
    """
    One side, ready to be read.

    Attributes:
        gguf: Its file, below the checkout.
        model_size_bytes: Tensor data.
        tools: Its llama.cpp.
        f16: The file that it is held against, below the checkout: the one that it was made from.
        f16_digest: What that file is.
        f16_tools: llama.cpp that reads that file, if not the side's own.
        place: Folder in scratch for an f16 that is not that of this checkout, and its logits.
        reference: What it is, for people.
        may_be_same: Whether it may be the very same model, so that there is no difference.
    """

    gguf: Path
    model_size_bytes: int
    tools: Toolchain
    f16: Path
    f16_digest: FileDigest
    f16_tools: Toolchain | None = None
    place: str = "champion"
    reference: str = "f16"
    may_be_same: bool = False


@dataclass(frozen=True, kw_only=True)
class Divergences:
    """Mean divergence over all windows, and of each block of them, in nats."""

    mean_nats: float
    blocks_nats: tuple[float, ...]
    chunks: int


@dataclass(frozen=True, kw_only=True)
class Reading:
    """
    All that one reading says.

    Attributes:
        found: The statistics over the whole text.
        divergences: The same by blocks of windows.
        reference_ppl: Perplexity that was printed when the logits were written.
    """

    found: llama_perplexity.Divergence
    divergences: Divergences
    reference_ppl: float


def measure(at: Layout, wanted: BenchmarkSlice, run_as: Execution, subject: Subject) -> Divergences:
    """
    Compare one side with its own f16, over the text and the windows of the benchmark.

    Raises:
        ToolError: llama-perplexity failed, or printed what cannot be trusted.
        MachineError: The disk is too small for the logits.
    """
    return read(at, wanted, run_as, subject).divergences


def reference(
    at: Layout, wanted: BenchmarkSlice, run_as: Execution, subject: Subject
) -> benchmark.Logits:
    """
    Return the logits of the file that a side is held against, made unless scratch has them.

    Raises:
        ToolError: llama-perplexity failed, or left a file of another format.
        MachineError: The disk is too small for the logits.
    """
    place = at if subject.f16 == at.f16(wanted.model) else _apart(at, wanted, subject)
    bench = benchmark.Bench(
        wanted=wanted,
        at=place,
        tools=subject.f16_tools or subject.tools,
        model_size_bytes=subject.model_size_bytes,
        execution=run_as,
        reference=subject.reference,
    )
    return benchmark.reference_logits(bench, subject.f16_digest)


def read(
    at: Layout,
    wanted: BenchmarkSlice,
    run_as: Execution,
    subject: Subject,
    logits: benchmark.Logits | None = None,
) -> Reading:
    """
    Read the text as one side does, and hold it against the logits of another file.

    Args:
        at: The checkout.
        wanted: Text and windows.
        run_as: How the model is run.
        subject: The side.
        logits: What it is held against; None for `reference`.

    Raises:
        ToolError: llama-perplexity failed, or printed what cannot be trusted.
        MachineError: The disk is too small for the logits.
    """
    logits = logits or reference(at, wanted, run_as, subject)
    window = logits.header.context_tokens
    batch = llama_perplexity.window_batch(window, run_as.batch_tokens)
    log = at.log("compare", wanted.model)
    argv = llama_perplexity.divergence_argv(
        subject.tools,
        str(subject.gguf.relative_to(at.root)),
        base=str(logits.path.relative_to(at.root)),
        context_tokens=window,
        execution=replace(
            run_as, batch_tokens=batch, ubatch_tokens=min(batch, run_as.ubatch_tokens)
        ),
    )
    with console.Progress(
        f"divergence of {subject.gguf.name}", total=logits.header.chunks, unit="windows"
    ) as progress:

        def show(line: str) -> None:
            if (windows := llama_perplexity.divergence_progress(line)) is not None:
                progress.update(windows)

        done = proc.run(
            argv,
            log=log,
            cwd=at.root,
            env=llamacpp.environment(subject.tools),
            inherit_env=False,
            on_line=show,
        )
    found = llama_perplexity.parse_divergence(
        done.stdout,
        done.stderr,
        base=logits.header,
        log=log,
        may_be_same=subject.may_be_same,
    )
    running = llama_perplexity.running_divergence(done.stdout, logits.header, log)
    return Reading(
        found=found,
        divergences=Divergences(
            mean_nats=found.kld_mean_nats,
            # The last mean is printed once more, with one more decimal.
            blocks_nats=block_means((*running[:-1], found.kld_mean_nats)),
            chunks=logits.header.chunks,
        ),
        reference_ppl=logits.ppl,
    )


def _apart(at: Layout, wanted: BenchmarkSlice, subject: Subject) -> Layout:
    """Lay out another f16 as a checkout of its own, so that its logits are not taken for ours."""
    place = Layout(at.scratch(wanted.model) / subject.place)
    for source, target in (
        (subject.f16, place.f16(wanted.model)),
        (at.root / wanted.corpus.path, place.root / wanted.corpus.path),
    ):
        with atomic.replacing(target) as part:
            try:
                os.link(source, part)
            except OSError:
                shutil.copyfile(source, part)
    return place


def block_means(running: tuple[float, ...], blocks: int = BLOCKS) -> tuple[float, ...]:
    """
    Return the mean of each block of windows from the running means after 1, 2, 3, ... windows.

    Blocks are of one length, but for one window more in some where that does not divide.
    """
    count = len(running)
    ends = [round(number * count / min(blocks, count)) for number in range(min(blocks, count) + 1)]
    sums = [0.0, *(mean * number for number, mean in enumerate(running, 1))]
    return tuple(
        (sums[end] - sums[begin]) / (end - begin) for begin, end in itertools.pairwise(ends)
    )


def compare(
    champion: Divergences,
    challenger: Divergences,
    *,
    corpus_sha256: str,
    effect: float,
    same_f16: bool,
) -> QualityComparison:
    """Judge the difference; where both are as good as f16 there is none."""
    interval = stats_paired.bootstrap_log_ratio(
        champion.blocks_nats, challenger.blocks_nats, paired=same_f16
    )
    outcome = stats_paired.outcome_of_rise(interval.low, interval.high, effect)
    least = stats_paired.NEGLIGIBLE_NATS
    negligible = max(champion.mean_nats, challenger.mean_nats) < least
    if negligible:
        outcome = "equal"
    difference = compare_words.interval(interval.estimate, interval.low, interval.high)
    sentence = (
        f"Divergence from f16 is below {least:g} nats for both, which is that of f16 from itself."
        if negligible
        else compare_words.quality_sentence(outcome, difference, effect, same_f16=same_f16)
    )
    return QualityComparison(
        same_f16=same_f16,
        corpus_sha256=corpus_sha256,
        chunks_count=challenger.chunks,
        champion_kld_mean_nats=champion.mean_nats,
        challenger_kld_mean_nats=challenger.mean_nats,
        log_ratio=interval.estimate,
        log_ratio_low=interval.low,
        log_ratio_high=interval.high,
        effect=effect,
        outcome=outcome,
        sentence=sentence,
    )
