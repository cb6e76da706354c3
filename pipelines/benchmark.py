"""
The stage `benchmark`: speed, divergence from f16 and memory of one quant on this machine.

One benchmark runs at a time on a machine. Each of its four parts is one run of a llama.cpp tool
whose output is believed only as far as its parser can prove it, and the record is made
when all are done: a stop at any moment leaves no half a number, and the next run goes on with
whatever scratch is whole.

    speed      llama-bench: prefill and decode at each declared depth, all samples kept
    memory     llama-fit-params' plan, and the peak that is seen while a context is filled
    logits     llama-perplexity on the f16, once for a model, in scratch, shared by its quants
    quality    llama-perplexity --kl-divergence on the quant

Of an encoder, which goes on with no text, speed is prefill alone, and quality the cosine between
its embeddings and those of its f16 (`pipelines.embedding_quality`).
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal

from pipelines import (
    architectures,
    atomic,
    certificate,
    console,
    corpora,
    embedding_quality,
    gguf_header,
    gpu,
    llama_bench,
    llama_fit_params,
    llama_perplexity,
    llamacpp,
    machine,
    measuring,
    proc,
    records,
    stats,
    validity,
    watch,
)
from pipelines.errors import MachineError, ParamsError, ToolError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.llama_bench import SpeedResult
    from pipelines.llama_fit_params import MemoryEstimate
    from pipelines.llama_perplexity import BaseHeader, Divergence
    from pipelines.llamacpp import Execution
    from pipelines.params import Benchmark, BenchmarkSlice
    from pipelines.records import BenchmarkRecord, FileDigest
    from pipelines.toolchain import Toolchain

MIB: Final = 1 << 20
# How far the f16's perplexity may lie from the one that its stored logits give: they are kept in
# 16 bits, 16 nats deep. Another model or text is off by far more.
_PPL_TOLERANCE: Final = 0.01
SPEED_ATTEMPTS: Final = 3
PAUSE_BETWEEN_ATTEMPTS_S: Final = 2.0


def run(slice_: BenchmarkSlice, at: Layout) -> BenchmarkRecord:
    """Measure a quant with the fleet's own toolchain."""
    from pipelines import toolchain  # noqa: PLC0415 - not for tests of the rest

    return benchmark(slice_, at, toolchain.load(at), lock=toolchain.default_cache_root())


def benchmark(
    wanted: BenchmarkSlice, at: Layout, tools: Toolchain, *, lock: Path
) -> BenchmarkRecord:
    """
    Measure one quant.

    Args:
        wanted: What is measured.
        at: The checkout; its convert and quantize records say which bytes these are.
        tools: The llama.cpp that is measured.
        lock: Directory, common to all checkouts of this user, in which machines are locked.

    Raises:
        DigestError: A model or the corpus does not have the recorded bytes.
        ParamsError: The corpus is missing or too short, or no repetition would be left.
        MachineError: The disk is too small for the logits, or work/machine.json is of another one.
        ToolError: A tool failed, or printed what cannot be trusted.
    """
    convert = records.read(at.model_record("convert", wanted.model), records.ConvertRecord)
    quantized = records.read(
        at.quant_record("quantize", wanted.model, wanted.type), records.QuantizeRecord
    )
    if wanted.benchmark.dropped_repetitions >= wanted.benchmark.repetitions:
        raise ParamsError(
            f"benchmark.dropped_repetitions ({wanted.benchmark.dropped_repetitions}) leaves none "
            f"of {wanted.benchmark.repetitions} repetitions.",
            hint="Raise benchmark.repetitions in params.yaml.",
        )
    hardware = measuring.this_machine(at)
    with measuring.one_at_a_time(lock, wanted.key):
        started = time.monotonic()
        corpora.require(wanted.corpus, at, "evaluation text")
        gguf = at.gguf(wanted.model, wanted.key)
        measuring.prove(gguf, quantized.gguf)
        is_encoder = _is_encoder(gguf)
        run_as = execution(
            wanted.benchmark,
            tools.backend,
            cores=hardware["cpu"]["cores_count"],
            cpu_moe_layers=architectures.cpu_moe_layers(
                gguf_header.read(gguf), wanted.cpu_moe_layers
            ),
        )
        bench = Bench(
            wanted=wanted,
            at=at,
            tools=tools,
            model_size_bytes=sum(quantized.tensor_bytes.values()),
            execution=of_encoder(run_as, wanted.context_tokens) if is_encoder else run_as,
            is_encoder=is_encoder,
        )
        speed = measure_speed_in_peace(bench)
        estimate, peak = measure_memory(bench)
        quality = (
            embedding_quality.measure(bench, convert.gguf)
            if is_encoder
            else _quality_record(wanted, measure_quality(bench, convert.gguf))
        )
        return records.BenchmarkRecord(
            key=wanted.key,
            model=wanted.model,
            type=wanted.type,
            gguf_sha256=quantized.gguf.sha256,
            f16_sha256=convert.gguf.sha256,
            size_bytes=quantized.gguf.size_bytes,
            llama_cpp_commit=tools.commit,
            machine=measuring.machine_id(hardware, tools),
            validity=_judge(bench, speed, estimate, peak),
            threads=bench.execution.threads,
            cpu_moe_layers=wanted.cpu_moe_layers,
            speed=speed_records(speed.results, dropped=wanted.benchmark.dropped_repetitions),
            quality=quality,
            memory=records.Memory(
                context_tokens=wanted.context_tokens,
                estimate_mib=estimate.total_mib,
                measured_mib=peak.mib,
                method=peak.method,
                model_mib=estimate.model_mib,
                context_mib=estimate.context_mib,
                compute_mib=estimate.compute_mib,
            ),
            measured_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            wall_s=round(time.monotonic() - started, 3),
        )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """
    What all parts of one benchmark share.

    Attributes:
        wanted: What is measured.
        at: The checkout.
        tools: The llama.cpp that is measured.
        model_size_bytes: Tensor data of the quant, as its record sums it and llama-bench sees it.
        execution: How the model is run.
        is_encoder: Whether it makes embeddings, and goes on with no text.
        reference: What the quant is held against, for people.
    """

    wanted: BenchmarkSlice
    at: Layout
    tools: Toolchain
    model_size_bytes: int
    execution: Execution
    is_encoder: bool = False
    reference: str = "f16"

    @property
    def gguf(self) -> Path:
        """The quant."""
        return self.at.gguf(self.wanted.model, self.wanted.key)

    @property
    def log(self) -> Path:
        """Whole output of all tools."""
        return self.at.log("benchmark", self.wanted.key)

    @property
    def on_gpu(self) -> bool:
        """Whether layers are to lie on a card."""
        return self.tools.backend != "cpu" and self.execution.gpu_layers > 0

    def named(self, path: Path) -> str:
        """Name a file as the tools get it: below the checkout, so that no output holds our path."""
        return str(path.relative_to(self.at.root))

    def run(
        self, argv: Sequence[str], on_line: Callable[[str], None], *, timed: bool = False
    ) -> proc.Completed:
        """Run one tool where the relative names hold."""
        return proc.run(
            argv,
            log=self.log,
            cwd=self.at.root,
            env=llamacpp.environment(self.tools, timed=timed),
            inherit_env=False,
            on_line=on_line,
        )


def execution(
    declared: Benchmark, backend: str, *, cores: int, cpu_moe_layers: int = 0
) -> Execution:
    """Resolve how models are run: threads default to the usable cores, no layers without a GPU."""
    return llamacpp.Execution(
        threads=declared.threads or cores,
        gpu_layers=0 if backend == "cpu" else declared.gpu_layers,
        flash_attention=declared.flash_attention,
        kv_type=declared.kv_type,
        batch_tokens=declared.batch_tokens,
        ubatch_tokens=min(declared.ubatch_tokens, declared.batch_tokens),
        cpu_moe_layers=cpu_moe_layers,
    )


def of_encoder(run_as: Execution, context_tokens: int) -> Execution:
    """Run an encoder, whose attention sees all of a text: in one piece, however long it is."""
    return replace(run_as, batch_tokens=context_tokens, ubatch_tokens=context_tokens)


def _is_encoder(gguf: Path) -> bool:
    """
    Tell an encoder, of which embeddings can be had.

    Raises:
        UpstreamError: It is one of which none can be had.
    """
    header = gguf_header.read(gguf)
    if not architectures.is_encoder(header):
        return False
    architectures.pooling(header)
    return True


# --- speed ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Speed:
    """Samples, and the circumstances under which they were taken."""

    results: tuple[SpeedResult, ...]
    watched: certificate.Watch
    attempts: int = 1


def measure_speed_in_peace(bench: Bench) -> _Speed:
    """
    Measure speed again while the machine is too busy for it, three times at most.

    What decides is how much of the CPU others took, never the speed itself: repeating until a
    number pleases would not be a measurement. The last one is returned, valid or not.
    """
    attempt = 1
    while True:
        speed = replace(measure_speed(bench), attempts=attempt)
        busy = validity.was_busy(
            speed.watched.before,
            speed.watched.after,
            speed.watched.usage(),
            wall_s=speed.watched.wall_s,
            threads=bench.execution.threads,
        )
        if not busy or attempt == SPEED_ATTEMPTS:
            return speed
        console.info("others took too much of the CPU: the speed is measured again")
        time.sleep(PAUSE_BETWEEN_ATTEMPTS_S)
        attempt += 1


def measure_speed(bench: Bench) -> _Speed:
    """Run llama-bench over all depths, watching the machine meanwhile."""
    declared = bench.wanted.benchmark
    console.step(f"speed of {bench.wanted.key}")
    tested = _Tested.of(bench)
    argv = llama_bench.speed_argv(
        bench.tools,
        bench.named(bench.gguf),
        prompt_tokens=tested.prompt_tokens,
        generate_tokens=tested.generate_tokens,
        depths=tested.depths,
        repetitions=declared.repetitions,
        execution=bench.execution,
        embeddings=bench.is_encoder,
    )
    tests = llama_bench.speed_tests(
        prompt_tokens=tested.prompt_tokens,
        generate_tokens=tested.generate_tokens,
        depths=tested.depths,
    )
    with (
        console.Progress(f"speed of {bench.wanted.key}", total=1) as progress,
        certificate.Watch("llama-bench") as watched,
    ):
        done = bench.run(argv, lambda line: _show_bench(progress, line), timed=True)
    return _Speed(
        results=llama_bench.parse_bench(
            done.stdout, _expectation(bench, tests, declared.repetitions), bench.log
        ),
        watched=watched,
    )


@dataclass(frozen=True, kw_only=True)
class _Tested:
    """What llama-bench is to time."""

    prompt_tokens: int
    generate_tokens: int
    depths: tuple[int, ...]

    @classmethod
    def of(cls, bench: Bench) -> _Tested:
        """As declared; of an encoder one text that it can hold, and nothing else."""
        declared = bench.wanted.benchmark
        if bench.is_encoder:
            prompt_tokens = min(declared.prompt_tokens, bench.wanted.context_tokens)
            return cls(prompt_tokens=prompt_tokens, generate_tokens=0, depths=(0,))
        return cls(
            prompt_tokens=declared.prompt_tokens,
            generate_tokens=declared.generate_tokens,
            depths=declared.depths,
        )


def _expectation(
    bench: Bench, tests: tuple[llama_bench.SpeedTest, ...], repetitions: int
) -> llama_bench.BenchExpectation:
    return llama_bench.BenchExpectation(
        model=bench.named(bench.gguf),
        model_size_bytes=bench.model_size_bytes,
        commit=bench.tools.commit,
        backend=bench.tools.backend,
        repetitions=repetitions,
        execution=bench.execution,
        tests=tests,
        embeddings=bench.is_encoder,
    )


def _show_bench(progress: console.Progress, line: str) -> None:
    if (share := llama_bench.bench_progress(line)) is not None:
        progress.update(share)


def speed_records(results: Sequence[SpeedResult], *, dropped: int) -> tuple[records.Speed, ...]:
    """Sum up each test: the first `dropped` samples are kept in the record and do not count."""
    return tuple(_speed_record(result, dropped) for result in results)


def _speed_record(result: SpeedResult, dropped: int) -> records.Speed:
    kept = result.samples_tok_s[dropped:]
    interval = stats.median_interval(kept)
    return records.Speed(
        test=result.test.test,
        depth_tokens=result.test.depth_tokens,
        tokens=result.test.tokens,
        median_tok_s=interval.median,
        low_tok_s=interval.low,
        high_tok_s=interval.high,
        samples_tok_s=kept,
        dropped_tok_s=result.samples_tok_s[:dropped],
    )


def _judge(bench: Bench, speed: _Speed, estimate: MemoryEstimate, peak: _Peak) -> records.Validity:
    declared = bench.wanted.benchmark
    return speed.watched.judge(
        validity.Run(
            backend=bench.tools.backend,
            gpu_info=speed.results[0].gpu_info,
            weights_mib=estimate.model_mib,
            peak_mib=peak.mib,
            spreads={
                f"{result.test.test} at {result.test.depth_tokens}": stats.spread(
                    result.samples_tok_s[declared.dropped_repetitions :]
                )
                for result in speed.results
            },
            threads=bench.execution.threads,
            attempts=speed.attempts,
        )
    )


# --- memory -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Peak:
    """Largest memory seen, and by which counter."""

    mib: float
    method: Literal["nvml", "rss"]


def measure_memory(bench: Bench) -> tuple[MemoryEstimate, _Peak]:
    """
    Return the planned memory at the declared context, and the peak while it is filled.

    The measured run is llama-bench reading one prompt as long as the context
    (`llama_bench.memory_argv`): it creates exactly that context, and every cell of its cache is
    written, as by a conversation that fills it. On a GPU the peak is what the driver says our
    processes hold on all cards. On a CPU it is the kernel's high-water mark of llama-bench alone
    (VmHWM in /proc/PID/status); wait4's ru_maxrss would also count the Python that forked it.

    Raises:
        ToolError: A tool failed, or the process was never seen.
    """
    context_tokens = bench.wanted.context_tokens
    console.step(f"memory of {bench.wanted.key} at {context_tokens:,} tokens")
    model = bench.named(bench.gguf)
    planned = bench.run(
        llama_fit_params.estimate_argv(
            bench.tools, model, context_tokens=context_tokens, execution=bench.execution
        ),
        lambda _: None,
    )
    estimate = llama_fit_params.parse_estimate(
        planned.stdout, planned.stderr, on_gpu=bench.on_gpu, log=bench.log
    )
    argv = llama_bench.memory_argv(
        bench.tools,
        model,
        context_tokens=context_tokens,
        execution=bench.execution,
        embeddings=bench.is_encoder,
    )
    with (
        console.Progress(f"memory of {bench.wanted.key}", total=1) as progress,
        watch.Watch("llama-bench") as ours,
        gpu.Watch(ours.pids) as cards,
    ):

        def look(line: str) -> None:
            # The process now sleeps with its peak behind it: no short run escapes the sampling.
            ours.sample()
            _show_bench(progress, line)

        done = bench.run(argv, look)
    tests = llama_bench.memory_tests(context_tokens)
    llama_bench.parse_bench(done.stdout, _expectation(bench, tests, 1), bench.log)
    by_driver = bench.on_gpu and cards.sees_cards
    mib = cards.observation().peak_mib if by_driver else ours.usage().peak_rss_bytes / MIB
    if mib <= 0:
        raise ToolError("the memory of llama-bench was never seen while it ran.", log=bench.log)
    return estimate, _Peak(mib=round(mib, 3), method="nvml" if by_driver else "rss")


# --- quality ----------------------------------------------------------------------------------


def measure_quality(bench: Bench, f16: FileDigest) -> tuple[BaseHeader, Divergence]:
    """
    Return the divergence of the quant from its f16, and the windows over which it was taken.

    The f16 always runs with an f16 cache: what a quantized cache costs shows in the quant's
    numbers, as it will in service.
    """
    logits = reference_logits(bench, f16)
    console.step(f"divergence of {bench.wanted.key} from f16")
    argv = llama_perplexity.divergence_argv(
        bench.tools,
        bench.named(bench.gguf),
        base=bench.named(logits.path),
        context_tokens=logits.header.context_tokens,
        execution=_in_windows(bench),
    )
    with console.Progress(
        f"divergence of {bench.wanted.key}", total=logits.header.chunks, unit="windows"
    ) as progress:

        def show(line: str) -> None:
            if (windows := llama_perplexity.divergence_progress(line)) is not None:
                progress.update(windows)

        done = bench.run(argv, show)
    found = llama_perplexity.parse_divergence(
        done.stdout, done.stderr, base=logits.header, log=bench.log
    )
    if not math.isclose(found.ppl_base, logits.ppl, rel_tol=_PPL_TOLERANCE):
        atomic.remove(logits.path)
        raise ToolError(
            f"the logits of the f16 give perplexity {found.ppl_base}, {logits.ppl} was measured "
            "when they were written: they are damaged and have been removed.",
            hint="Run the same command again.",
            log=bench.log,
        )
    return logits.header, found


def _in_windows(bench: Bench) -> Execution:
    """Run as declared, with the batch cut to whole windows, which llama-perplexity insists on."""
    quality = bench.wanted.benchmark.quality
    batch = llama_perplexity.window_batch(quality.context_tokens, bench.execution.batch_tokens)
    return replace(
        bench.execution,
        batch_tokens=batch,
        ubatch_tokens=min(batch, bench.execution.ubatch_tokens),
    )


@dataclass(frozen=True, kw_only=True)
class Logits:
    """A whole file of logits: where it is, what it holds, and the perplexity it has to give."""

    path: Path
    header: BaseHeader
    ppl: float


def reference_logits(bench: Bench, f16: FileDigest) -> Logits:
    """
    Return the f16's logits over the corpus, computed unless scratch has them.

    They are named after everything that decides them, so the quants of a model share one file,
    and another text, window, commit or f16 never meets an old one. Files under other names are
    removed: at 100 windows and a vocabulary of 128,256 each takes 6.5 GB.

    Raises:
        MachineError: The disk is too small; says by how many bytes.
        ParamsError: The corpus has fewer windows than declared.
        ToolError: llama-perplexity failed or left a file of another size.
    """
    scratch = bench.at.scratch(bench.wanted.model)
    path = scratch / f"logits-{_logits_key(bench, f16)}.kld"
    known = _known_logits(path, _expected_logits(bench))
    for other in scratch.glob("*logits-*"):
        if other not in {path, _note_of(path)}:
            atomic.remove(other)
    if known is not None:
        console.info(
            f"the logits of {bench.wanted.model}'s {bench.reference} are here already: {path.name}"
        )
        return known
    measuring.prove(bench.at.f16(bench.wanted.model), f16)
    return _compute_logits(bench, path)


def _logits_key(bench: Bench, f16: FileDigest) -> str:
    quality = bench.wanted.benchmark.quality
    return machine.facts_id(
        {
            "f16": f16.sha256,
            "corpus": bench.wanted.corpus.sha256,
            "commit": bench.tools.commit,
            "backend": bench.tools.backend,
            "context_tokens": quality.context_tokens,
            "chunks": quality.chunks,
            "argv": _reference_execution(bench).argv()[2:],  # the threads change nothing
        }
    )[:16]


def _reference_execution(bench: Bench) -> Execution:
    return replace(_in_windows(bench), kv_type="f16")


def _expected_logits(bench: Bench) -> BaseHeader:
    """Say what the header of the logits has to be, from the f16's own vocabulary."""
    quality = bench.wanted.benchmark.quality
    path = bench.at.f16(bench.wanted.model)
    tokens = gguf_header.read(path).metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, gguf_header.Array):
        raise ToolError(f"{path} has no vocabulary: its divergence cannot be measured.")
    return llama_perplexity.BaseHeader(
        context_tokens=quality.context_tokens,
        vocabulary_tokens=tokens.count,
        chunks=quality.chunks,
    )


def _note_of(path: Path) -> Path:
    """Name the note beside the logits, written when they were whole."""
    return path.with_suffix(".json")


def _known_logits(path: Path, expected: BaseHeader) -> Logits | None:
    """
    Return logits of an earlier run if they are still the file that was written then.

    Size and time of change say whether anybody touched it. It is not hashed: that would take as
    long as the comparison that reads it, which checks its perplexity anyway.
    """
    try:
        note = json.loads(_note_of(path).read_text())
        stat = path.stat()
        same = (note["size_bytes"], note["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        ppl = float(note["ppl"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = stat.st_size == llama_perplexity.base_size_bytes(expected)
    if not (same and whole and llama_perplexity.read_base_header(path) == expected):
        return None
    return Logits(path=path, header=expected, ppl=ppl)


def _compute_logits(bench: Bench, path: Path) -> Logits:
    model, corpus = bench.wanted.model, bench.wanted.corpus
    expected = _expected_logits(bench)
    size_bytes = llama_perplexity.base_size_bytes(expected)
    path.parent.mkdir(parents=True, exist_ok=True)
    _require_room(path.parent, size_bytes, expected)
    console.step(f"logits of {model}'s {bench.reference} ({size_bytes:,} bytes of scratch)")
    atomic.remove(_note_of(path))
    with atomic.replacing(path) as part:
        argv = llama_perplexity.base_argv(
            bench.tools,
            bench.named(bench.at.f16(model)),
            corpus=corpus.path,
            base=bench.named(part),
            context_tokens=expected.context_tokens,
            chunks=expected.chunks,
            execution=_reference_execution(bench),
            place_by_memory=bench.tools.backend != "cpu",
        )
        done = _run_reference(bench, argv, expected.chunks)
        _check_length(done.stderr, part, expected, bench)
        llamacpp.refuse_errors("llama-perplexity", done.stderr, bench.log)
        found = llama_perplexity.read_base_header(part)
        written_bytes = part.stat().st_size if part.exists() else 0
        if found != expected or written_bytes != size_bytes:
            llamacpp.refuse(
                f"llama-perplexity ended with exit code 0 and left {written_bytes:,} bytes "
                f"of logits ({found}); {size_bytes:,} were expected ({expected}).",
                bench.log,
            )
        ppl = llama_perplexity.parse_base_run(done.stderr, bench.log)
    stat = path.stat()
    atomic.write_json(
        _note_of(path), {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ppl": ppl}
    )
    return Logits(path=path, header=expected, ppl=ppl)


def _run_reference(bench: Bench, argv: Sequence[str], chunks: int) -> proc.Completed:
    with console.Progress(
        f"logits of {bench.wanted.model}'s {bench.reference}", total=chunks, unit="windows"
    ) as progress:
        windows = 0

        def show(line: str) -> None:
            nonlocal windows
            windows += llama_perplexity.is_base_row(line)
            progress.update(windows)

        return bench.run(argv, show)


_TOO_SHORT = re.compile(r"tokenizes to only (\d+) tokens")


def _check_length(stderr: str, part: Path, expected: BaseHeader, bench: Bench) -> None:
    """
    Refuse a corpus with fewer windows than declared; llama.cpp takes what there is and says 0.

    Raises:
        ParamsError: Says how many windows there are.
    """
    found = llama_perplexity.read_base_header(part)
    if short := _TOO_SHORT.search(stderr):
        windows = int(short[1]) // expected.context_tokens
    elif found is not None and found.chunks < expected.chunks:
        windows = found.chunks
    else:
        return
    raise ParamsError(
        f"{bench.wanted.corpus.path} fills {windows} windows of {expected.context_tokens} tokens "
        f"of {bench.wanted.model}, {max(2, expected.chunks)} are needed.",
        hint="Take a longer text, or lower benchmark.quality.chunks or its context_tokens.",
    )


def _require_room(directory: Path, size_bytes: int, expected: BaseHeader) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < size_bytes:
        raise MachineError(
            f"the logits of the f16 take {size_bytes:,} bytes ({expected.chunks} windows of "
            f"{expected.context_tokens} tokens over a vocabulary of "
            f"{expected.vocabulary_tokens:,}), {free_bytes:,} are free in {directory}.",
            hint="Make room, or lower benchmark.quality.chunks.",
        )


def _quality_record(
    wanted: BenchmarkSlice, measured: tuple[BaseHeader, Divergence]
) -> records.QualityResult:
    header, found = measured
    return records.QualityResult(
        corpus_sha256=wanted.corpus.sha256,
        context_tokens=header.context_tokens,
        chunks_count=header.chunks,
        scored_tokens=llama_perplexity.scored_tokens(header.context_tokens, header.chunks),
        kld_mean_nats=found.kld_mean_nats,
        kld_mean_error_nats=found.kld_mean_error_nats,
        kld_p999_nats=found.kld_p999_nats,
        kld_max_nats=found.kld_max_nats,
        same_top=found.same_top,
        same_top_error=found.same_top_error,
        ppl=found.ppl,
        ppl_f16=found.ppl_base,
        ppl_ratio=found.ppl_ratio,
        ppl_ratio_error=found.ppl_ratio_error,
    )
