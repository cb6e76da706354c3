"""
llama.cpp's measuring tools: how each is called, and what of its output is believed.

A parser here accepts what the pinned tool prints when all went well, line by line as its printf
says, and refuses everything else: a missing, repeated or unknown line, a number that is cut, not
finite, or at odds with another one that says the same. A wrong number is worse than none.

Every option that can change a number is on the command line, so that no default of another
llama.cpp and no environment variable can.

Sources at the pinned commit: tools/llama-bench/llama-bench.cpp, tools/perplexity/perplexity.cpp,
tools/fit-params/fit-params.cpp, common/fit.cpp, common/log.cpp; outputs recorded in tests/data.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

from pipelines.console import clean
from pipelines.errors import ToolError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipelines.toolchain import Toolchain

# --- what all tools are told ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Execution:
    """
    How a model is run, whatever is measured of it.

    Attributes:
        threads: CPU threads.
        gpu_layers: Layers on the GPU; 0 on a CPU build.
        flash_attention: Flash attention, on or off, never "auto".
        kv_type: Type of both halves of the key-value cache.
        batch_tokens: Logical batch.
        ubatch_tokens: Physical batch.
    """

    threads: int
    gpu_layers: int
    flash_attention: bool
    kv_type: str
    batch_tokens: int
    ubatch_tokens: int

    def argv(self) -> list[str]:
        """Spell the options that llama-bench shares with the other tools."""
        return [
            *("-t", str(self.threads), "-ngl", str(self.gpu_layers)),
            *("-fa", "on" if self.flash_attention else "off"),
            *("-ctk", self.kv_type, "-ctv", self.kv_type),
            *("-b", str(self.batch_tokens), "-ub", str(self.ubatch_tokens)),
        ]


# Threads that wait for each other in OpenMP's barriers sleep instead of spinning. Where other work
# shares the cores, spinning costs a multiple: the same run of llama-perplexity on two busy cores
# took 9.0 s spinning and 1.2 s sleeping. What comes out is the same. Not for what is timed: a
# server spins as well.
UNTIMED_ENV: Final = {"OMP_WAIT_POLICY": "passive"}

# Levels and times in front of each message, by which an error is told from a result.
_LOG_OPTIONS: Final = ("--log-prefix", "--log-timestamps", "--log-colors", "off")


def refuse(message: str, log: Path) -> NoReturn:
    """Reject output: say what is wrong with it and where all of it is."""
    raise ToolError(
        clean(message),
        hint="Nothing was taken from this run. Read the log; the same command tries again.",
        log=log,
    )


# --- llama-bench ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SpeedTest:
    """One test that llama-bench is asked for: `tokens` of a kind, after `depth_tokens` others."""

    test: Literal["prefill", "decode"]
    tokens: int
    depth_tokens: int


@dataclass(frozen=True, kw_only=True)
class BenchExpectation:
    """What every line of llama-bench has to confirm; see `parse_bench`."""

    model: str
    model_size_bytes: int
    commit: str
    backend: str
    repetitions: int
    execution: Execution
    tests: tuple[SpeedTest, ...]


@dataclass(frozen=True, kw_only=True)
class SpeedResult:
    """
    Samples of one test, in the order in which they were taken.

    Attributes:
        test: What was measured.
        samples_tok_s: Tokens a second, computed from the nanoseconds of each repetition.
        cpu_info: Description of the CPU, as llama.cpp names it.
        gpu_info: Descriptions of the GPUs, joined by commas; empty without one.
        backends: Backends that this build has loaded.
    """

    test: SpeedTest
    samples_tok_s: tuple[float, ...]
    cpu_info: str
    gpu_info: str
    backends: str


def speed_tests(
    *, prompt_tokens: int, generate_tokens: int, depths: Sequence[int]
) -> tuple[SpeedTest, ...]:
    """List the tests of one llama-bench run in the order in which it makes them."""
    tests: list[SpeedTest] = []
    for depth in depths:
        tests += (
            SpeedTest(test="prefill", tokens=prompt_tokens, depth_tokens=depth),
            SpeedTest(test="decode", tokens=generate_tokens, depth_tokens=depth),
        )
    return tuple(tests)


def speed_argv(  # noqa: PLR0913 - each is one option of the tool
    tools: Toolchain,
    model: str,
    *,
    prompt_tokens: int,
    generate_tokens: int,
    depths: Sequence[int],
    repetitions: int,
    execution: Execution,
) -> list[str]:
    """
    Measure prefill and decode at each depth in one process: the model is loaded once.

    `-d` fills the context before a test and does not count in its time; its state is kept between
    repetitions.
    """
    return [
        str(tools.tool("llama-bench")),
        *("-m", model, "-o", "jsonl", "--progress", "-r", str(repetitions), "--prio", "0"),
        *("-p", str(prompt_tokens), "-n", str(generate_tokens)),
        *("-d", ",".join(str(depth) for depth in depths)),
        *_bench_options(execution, load_mode="auto"),
    ]


MEMORY_PAUSE_S = 1


def memory_argv(
    tools: Toolchain, model: str, *, context_tokens: int, execution: Execution
) -> list[str]:
    """
    Fill a context of `context_tokens` once, then pause, so that its peak can be read.

    A prompt as long as the context makes llama-bench create exactly that context
    (n_ctx = n_prompt + n_gen + n_depth) and write every cell of its cache; with `-d` it would keep
    a second copy of the cache in main memory. The tool sleeps `--delay` before each test, so the
    second, tiny one holds the process for a second after the peak.

    Weights are read, not mapped (`-lm none`): mapped pages count as resident or not depending on
    what else the machine does, and repacked weights would count twice.
    """
    return [
        str(tools.tool("llama-bench")),
        *("-m", model, "-o", "jsonl", "--progress", "-r", "1", "--prio", "0", "--no-warmup"),
        *("--delay", str(MEMORY_PAUSE_S), "-p", f"{context_tokens},1", "-n", "0", "-d", "0"),
        *_bench_options(execution, load_mode="none"),
    ]


def memory_tests(context_tokens: int) -> tuple[SpeedTest, ...]:
    """List the tests that `memory_argv` asks for."""
    return tuple(
        SpeedTest(test="prefill", tokens=tokens, depth_tokens=0) for tokens in (context_tokens, 1)
    )


def _bench_options(execution: Execution, *, load_mode: str) -> list[str]:
    return [
        *execution.argv(),
        *("-lm", load_mode, "-sm", "layer", "-mg", "0", "-ncmoe", "0", "-nkvo", "0"),
        *("--poll", "50", "--cpu-strict", "0", "-embd", "0", "-nopo", "0", "--no-host", "0"),
        *("--repack", "1"),
    ]


# Rounding of what llama-bench prints: streams write doubles with six significant digits, the
# averages have six decimals.
_STREAM_ERROR = 1e-5
_AVERAGE_ERROR = 1e-6
_NS_PER_S = 1_000_000_000


def parse_bench(stdout: str, expected: BenchExpectation, log: Path) -> tuple[SpeedResult, ...]:
    """
    Read the JSON lines of llama-bench: one for each test, in order, each confirming what was asked.

    Every line repeats the model, its size, the commit and all options; a line that differs in one
    belongs to another run. The nanoseconds of each repetition are the result; the tokens a second
    and the averages printed beside them have to agree, so that a damaged digit does not pass.

    Raises:
        ToolError: A line is missing, extra, cut, or says something else than was asked.
    """
    if stdout and not stdout.endswith("\n"):
        refuse("llama-bench was cut off: its last line has no end.", log)
    lines = [line for line in stdout.splitlines() if line.strip()]
    if len(lines) != len(expected.tests):
        refuse(
            f"llama-bench reported {len(lines)} tests instead of {len(expected.tests)}.",
            log,
        )
    return tuple(
        _bench_line(line, test, expected, log)
        for line, test in zip(lines, expected.tests, strict=True)
    )


def _bench_line(line: str, test: SpeedTest, expected: BenchExpectation, log: Path) -> SpeedResult:
    try:
        found = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except ValueError as error:
        refuse(f"llama-bench printed a line that is no JSON ({error}): {line[:200]}", log)
    if not isinstance(found, dict):
        refuse(f"llama-bench printed {line[:200]} where a test was expected.", log)
    _same_run(found, test, expected, log)
    samples_ns = _numbers(found, "samples_ns", log)
    if len(samples_ns) != expected.repetitions:
        refuse(
            f"llama-bench took {len(samples_ns)} samples instead of {expected.repetitions}.", log
        )
    samples_tok_s = tuple(test.tokens * _NS_PER_S / ns for ns in samples_ns)
    _agree(found, samples_ns, samples_tok_s, log)
    gpu_info = _text(found, "gpu_info", log)
    if expected.backend != "cpu" and not gpu_info.strip():
        refuse(
            f"llama-bench saw no GPU although llama.cpp was built for {expected.backend}: "
            "it ran on the CPU.",
            log,
        )
    return SpeedResult(
        test=test,
        samples_tok_s=samples_tok_s,
        cpu_info=_text(found, "cpu_info", log),
        gpu_info=gpu_info,
        backends=_text(found, "backends", log),
    )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _same_run(
    found: dict[str, Any], test: SpeedTest, expected: BenchExpectation, log: Path
) -> None:
    """Compare every statement of a line about itself with what was asked for."""
    run = expected.execution
    wanted: dict[str, object] = {
        "model_filename": expected.model,
        "model_size": expected.model_size_bytes,
        "n_prompt": test.tokens if test.test == "prefill" else 0,
        "n_gen": test.tokens if test.test == "decode" else 0,
        "n_depth": test.depth_tokens,
        "n_threads": run.threads,
        "n_gpu_layers": run.gpu_layers,
        "flash_attn": int(run.flash_attention),
        "type_k": run.kv_type,
        "type_v": run.kv_type,
        "n_batch": run.batch_tokens,
        "n_ubatch": run.ubatch_tokens,
    }
    for name, value in wanted.items():
        if name not in found:
            refuse(f"llama-bench left out {name}.", log)
        if type(found[name]) is not type(value) or found[name] != value:
            refuse(f"llama-bench reports {name} = {found[name]!r} instead of {value!r}.", log)
    commit = _text(found, "build_commit", log)
    if not re.fullmatch(r"[0-9a-f]{7,40}", commit) or not expected.commit.startswith(commit):
        refuse(
            f"llama-bench was built from commit {commit!r}, the toolchain is {expected.commit}.",
            log,
        )


def _text(found: dict[str, Any], name: str, log: Path) -> str:
    value = found.get(name)
    if not isinstance(value, str):
        refuse(f"llama-bench reports {name} = {value!r}, which is no text.", log)
    return clean(value)


def _numbers(found: dict[str, Any], name: str, log: Path) -> tuple[float, ...]:
    values = found.get(name)
    if not isinstance(values, list) or not values:
        refuse(f"llama-bench reports {name} = {values!r}, which are no samples.", log)
    return tuple(_positive(value, name, log) for value in values)


def _positive(value: object, name: str, log: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(f"llama-bench reports {name} with {value!r}, which is no number.", log)
    if not math.isfinite(value) or value <= 0:
        refuse(f"llama-bench reports {name} with {value}, which is no measurement.", log)
    return value


def _agree(
    found: dict[str, Any],
    samples_ns: Sequence[float],
    samples_tok_s: Sequence[float],
    log: Path,
) -> None:
    """Check what llama-bench derived from the nanoseconds against our own arithmetic."""
    printed = _numbers(found, "samples_ts", log)
    if len(printed) != len(samples_tok_s) or not all(
        math.isclose(ours, theirs, rel_tol=_STREAM_ERROR)
        for ours, theirs in zip(samples_tok_s, printed, strict=False)
    ):
        refuse("llama-bench's tokens a second do not follow from its nanoseconds.", log)
    mean_ns = _positive(found.get("avg_ns"), "avg_ns", log)
    mean_tok_s = _positive(found.get("avg_ts"), "avg_ts", log)
    # avg_ns is an integer division in the tool.
    if abs(sum(samples_ns) / len(samples_ns) - mean_ns) > 1 or not math.isclose(
        sum(samples_tok_s) / len(samples_tok_s),
        mean_tok_s,
        rel_tol=_AVERAGE_ERROR,
        abs_tol=_AVERAGE_ERROR,
    ):
        refuse("llama-bench's averages do not follow from its samples.", log)


_BENCH_PROGRESS = re.compile(
    r"llama-bench: benchmark (\d+)/(\d+): (?:(?:prompt|generation) run (\d+)/(\d+))?"
)


def bench_progress(line: str) -> float | None:
    """Read how much of a llama-bench run is behind a line of `--progress`: 0 to 1, or None."""
    found = _BENCH_PROGRESS.match(line)
    if found is None:
        return None
    test, tests, run, runs = (int(group) if group else 0 for group in found.groups())
    return (test - 1 + (run - 1) / runs if runs else test - 1) / tests if tests else None


# --- llama-perplexity -------------------------------------------------------------------------

# llama-perplexity hands its results to a thread that prints them and ends without waiting for it
# (common/log.cpp says so at common_log_main): on a busy machine the last lines are lost with exit
# code 0, 7 times of 60 in a test on two loaded cores. Its whole program is one function of a shared
# library, so we call that from a process of our own, and wait for the printing before it ends. The
# names are those of the Itanium C++ ABI, which Linux and macOS share.
_FLUSHING_MAIN = """\
import ctypes, signal, sys
impl, common, *words = sys.argv[1:]
signal.signal(signal.SIGINT, signal.SIG_DFL)
common = ctypes.CDLL(common)
main = getattr(ctypes.CDLL(impl), "_Z16llama_perplexityiPPc")
log_of, flush = common._Z15common_log_mainv, common._Z16common_log_flushP10common_log
log_of.restype, flush.argtypes, flush.restype = ctypes.c_void_p, [ctypes.c_void_p], None
encoded = [word.encode() for word in words]
code = main(len(encoded), (ctypes.c_char_p * (len(encoded) + 1))(*encoded, None))
flush(log_of())
sys.exit(code)
"""


def perplexity_program(tools: Toolchain) -> list[str]:
    """
    Begin a command line that runs llama-perplexity to the end of its output.

    A build without the shared libraries runs the program as it is; if it then loses its last
    lines, the parser refuses what is left.
    """
    program = tools.tool("llama-perplexity")
    suffix = "dylib" if sys.platform == "darwin" else "so"
    libraries = [
        tools.prefix / "lib" / f"{name}.{suffix}"
        for name in ("libllama-perplexity-impl", "libllama-common")
    ]
    if not all(library.exists() for library in libraries):
        return [str(program)]
    python = [sys.executable, "-I", "-S", "-c", _FLUSHING_MAIN]
    return [*python, *(str(library) for library in libraries), str(program)]


def window_batch(context_tokens: int, batch_tokens: int) -> int:
    """Largest batch up to `batch_tokens` that llama-perplexity takes: whole windows, or a part."""
    if batch_tokens < context_tokens:
        return batch_tokens
    return batch_tokens // context_tokens * context_tokens


def base_argv(  # noqa: PLR0913 - each is one option of the tool
    tools: Toolchain,
    model: str,
    *,
    corpus: str,
    base: str,
    context_tokens: int,
    chunks: int,
    execution: Execution,
    place_by_memory: bool,
) -> list[str]:
    """
    Write the logits of the reference model over a text to `base`.

    `place_by_memory` lets llama.cpp choose how many layers go to the GPU: an f16 model that does
    not fit there whole can still be the reference of quants that do.
    """
    options = execution.argv()
    if place_by_memory:
        options[options.index("-ngl") + 1] = "auto"
    return [
        *perplexity_program(tools),
        *("-m", model, "-f", corpus, "-c", str(context_tokens), "--chunks", str(chunks)),
        *("--save-all-logits", base, "--ppl-stride", "0", "--ppl-output-type", "1"),
        *("-fit", "on" if place_by_memory else "off", *options, "-tb", str(execution.threads)),
        *_LOG_OPTIONS,
    ]


def divergence_argv(
    tools: Toolchain, model: str, *, base: str, context_tokens: int, execution: Execution
) -> list[str]:
    """Compare a model with the logits in `base`; text, windows and chunks come from that file."""
    return [
        *perplexity_program(tools),
        *("-m", model, "-c", str(context_tokens)),
        *("--kl-divergence", "--kl-divergence-base", base),
        *("-fit", "off", *execution.argv(), "-tb", str(execution.threads), *_LOG_OPTIONS),
    ]


@dataclass(frozen=True, kw_only=True)
class BaseHeader:
    """What a file of logits says about itself: window and vocabulary in tokens, windows."""

    context_tokens: int
    vocabulary_tokens: int
    chunks: int


_BASE_MAGIC: Final = b"_logits_"
_BASE_HEADER: Final = struct.Struct("<8siii")


def scored_tokens(context_tokens: int, chunks: int) -> int:
    """Tokens whose prediction is scored: the second half of each window, less its last token."""
    return chunks * (context_tokens - 1 - context_tokens // 2)


def base_size_bytes(header: BaseHeader) -> int:
    """
    Size of a file of logits: 20 bytes, then for each window its tokens and its log-probabilities.

    Tokens are int32; of each scored token the whole vocabulary is kept as uint16, rounded up to an
    even number, with two floats (scale and minimum) in front. 100 windows of 512 tokens over a
    vocabulary of 128,256 take 6.5 GB.

    Source: perplexity() and process_logits() in tools/perplexity/perplexity.cpp.
    """
    row_bytes = 2 * (2 * ((header.vocabulary_tokens + 1) // 2) + 4)
    tokens_bytes = 4 * header.context_tokens * header.chunks
    rows = scored_tokens(header.context_tokens, header.chunks)
    return _BASE_HEADER.size + tokens_bytes + rows * row_bytes


def read_base_header(base: Path) -> BaseHeader | None:
    """Read the header of a file of logits; None if the file is absent, cut off or another kind."""
    try:
        with base.open("rb") as file:
            data = file.read(_BASE_HEADER.size)
    except FileNotFoundError:
        return None
    if len(data) != _BASE_HEADER.size:
        return None
    magic, context_tokens, vocabulary_tokens, chunks = _BASE_HEADER.unpack(data)
    if magic != _BASE_MAGIC or min(context_tokens, vocabulary_tokens, chunks) < 1:
        return None
    return BaseHeader(
        context_tokens=context_tokens, vocabulary_tokens=vocabulary_tokens, chunks=chunks
    )


# `0.00.456.866 E message`, in front of which stdout's half of a line may stand.
_LOGGED_ERROR = re.compile(r"\d+\.\d\d\.\d{3}\.\d{3} E (.*)")
_FINAL_ESTIMATE = re.compile(r"Final estimate: PPL = (\d+\.\d{4}) \+/- (\d+\.\d{5})$")


def refuse_errors(program: str, stderr: str, log: Path) -> None:
    """
    Refuse a run that logged an error, whatever its exit code: llama-perplexity ends with 0.

    Raises:
        ToolError: With the first error's own words.
    """
    for line in stderr.splitlines():
        if (found := _LOGGED_ERROR.search(line)) is not None:
            refuse(f"{program} reports an error: {found[1].strip()}", log)


def parse_base_run(stderr: str, log: Path) -> float:
    """
    Return the perplexity that the run which wrote the logits reports; the logits have no other.

    The number is not anchored at the start of a line, since "ETA" stands in front of it there.

    Raises:
        ToolError: An error was logged, or there is not exactly one finite estimate.
    """
    refuse_errors("llama-perplexity", stderr, log)
    found = [match for line in stderr.splitlines() if (match := _FINAL_ESTIMATE.search(line))]
    if len(found) != 1:
        refuse(f"llama-perplexity printed {len(found)} final estimates instead of one.", log)
    return float(found[0][1])


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """
    How far a model is from its reference over the scored tokens of a text.

    KL divergences in nats for each token, `same_top` as a share; errors are standard errors over
    tokens, which understate the truth by about two, since tokens of one window depend on another.
    """

    ppl: float
    ppl_base: float
    ppl_ratio: float
    ppl_ratio_error: float
    kld_mean_nats: float
    kld_mean_error_nats: float
    kld_p999_nats: float
    kld_max_nats: float
    same_top: float
    same_top_error: float


# The printf formats of kl_divergence(), without their line ends, in the order in which it prints.
_CHUNK_HEADER = (
    "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence"
    "              Δp RMS            Same top p"
)
_CHUNK_ROW = (
    "%4d    %9.4f ± %9.4f    %10.5f ± %10.5f    %10.5f ± %10.5f"
    "    %6.3f ± %6.3f %%    %6.3f ± %6.3f %%"
)
_BLOCK_START = "====== Perplexity statistics ======"
_BLOCK = (
    _BLOCK_START,
    "Mean PPL(Q)                   : %10.6f ± %10.6f",
    "Mean PPL(base)                : %10.6f ± %10.6f",
    "Cor(ln(PPL(Q)), ln(PPL(base))): %6.2f%%",
    "Mean ln(PPL(Q)/PPL(base))     : %10.6f ± %10.6f",
    "Mean PPL(Q)/PPL(base)         : %10.6f ± %10.6f",
    "Mean PPL(Q)-PPL(base)         : %10.6f ± %10.6f",
    "",
    "====== KL divergence statistics ======",
    "Mean    KLD: %10.6f ± %10.6f",
    *(f"{name} KLD: %10.6f" for name in (
        "Maximum", "99.9%%  ", "99.0%%  ", "95.0%%  ", "90.0%%  ", "Median ",
        "10.0%%  ", " 5.0%%  ", " 1.0%%  ", " 0.1%%  ", "Minimum",
    )),
    "",
    "====== Token probability statistics ======",
    "Mean    Δp: %6.3f ± %5.3f %%",
    *(f"{name} Δp: %6.3f%%" for name in (
        "Maximum", "99.9%%  ", "99.0%%  ", "95.0%%  ", "90.0%%  ", "75.0%%  ", "Median ",
        "25.0%%  ", "10.0%%  ", " 5.0%%  ", " 1.0%%  ", " 0.1%%  ", "Minimum",
    )),
    "RMS Δp    : %6.3f ± %5.3f %%",
    "Same top p: %6.3f ± %5.3f %%",
)  # fmt: skip
# e^50: no text and no model is further apart, and exp() of a damaged number must not overflow.
_LARGEST_LOG_RATIO: Final = 50.0
_PLACEHOLDER = re.compile(r"%%|%\d+(?:\.\d+)?[df]")


def _pattern(template: str) -> re.Pattern[str]:
    """Turn a printf format into the pattern of a line that it can have printed."""
    parts: list[str] = []
    position = 0
    for found in _PLACEHOLDER.finditer(template):
        parts.append(re.escape(template[position : found.start()]))
        parts.append("%" if found[0] == "%%" else r"( *-?(?:\d+(?:\.\d+)?|nan|inf))")
        position = found.end()
    parts.append(re.escape(template[position:]))
    return re.compile("".join(parts))


_ROW_PATTERN = _pattern(_CHUNK_ROW)
_BLOCK_PATTERNS = tuple(_pattern(template) for template in _BLOCK)


def _values(
    template: str, pattern: re.Pattern[str], line: str, log: Path, *, finite: bool = True
) -> list[float]:
    """
    Read the numbers of one line and prove it by printing the line again from them.

    A number that lost a digit at its end has too few decimals, one that lost a digit at its front
    has too few characters: neither is printed again as it stands there.
    """
    found = pattern.fullmatch(line)
    if found is None:
        wanted = template.partition("%")[0].strip() or template
        refuse(f"llama-perplexity printed {line[:120]!r} where {wanted!r} was expected.", log)
    values = [float(group) for group in found.groups()]
    if finite and not all(math.isfinite(value) for value in values):
        refuse(f"llama-perplexity printed a number that is not finite: {line.strip()}", log)
    if template % tuple(values) != line:
        refuse(f"llama-perplexity printed a damaged number: {line.strip()[:120]}", log)
    return values


def parse_divergence(stdout: str, stderr: str, *, base: BaseHeader, log: Path) -> Divergence:
    """
    Read the table and the statistics that llama-perplexity --kl-divergence prints.

    Args:
        stdout: Its standard output: progress, a table with a row for each window, statistics.
        stderr: Its messages; one error among them voids the run.
        base: Header of the logits that it read.
        log: File with the whole output, for the error.

    Returns:
        The statistics, after the windows were counted and every number that is printed twice, or
        follows from others, was found to agree.

    Raises:
        ToolError: Anything is missing, extra, damaged, not finite, or contradicts the rest.
    """
    refuse_errors("llama-perplexity", stderr, log)
    lines = stdout.split("\n")
    starts = [number for number, line in enumerate(lines) if line == _BLOCK_START]
    headers = [number for number, line in enumerate(lines) if line == _CHUNK_HEADER]
    if len(starts) != 1 or len(headers) != 1:
        refuse(
            f"llama-perplexity printed {len(headers)} tables and {len(starts)} blocks of "
            "statistics instead of one of each. It prints no statistics for fewer than 100 "
            "scored tokens.",
            log,
        )
    start, header = starts[0], headers[0]
    rows = lines[header + 1 : start - 1]
    block = lines[start : start + len(_BLOCK)]
    rest = lines[start + len(_BLOCK) :]
    if len(block) != len(_BLOCK) or start <= header or lines[start - 1] or any(rest) or not rest:
        refuse("the statistics of llama-perplexity are cut off or something follows them.", log)
    last_row = _last_row(rows, base.chunks, log)
    values = [
        _values(template, pattern, line, log)
        for template, pattern, line in zip(_BLOCK, _BLOCK_PATTERNS, block, strict=True)
    ]
    return _consistent(values, last_row, base, log)


def _last_row(rows: Sequence[str], chunks: int, log: Path) -> list[float]:
    """Return the numbers of the last window's row, after every window was found once."""
    table = [_values(_CHUNK_ROW, _ROW_PATTERN, row, log, finite=False) for row in rows]
    if [row[0] for row in table] != list(range(1, chunks + 1)):
        refuse(
            f"llama-perplexity's table has {len(table)} rows, the logits have {chunks} windows.",
            log,
        )
    return table[-1]


def _consistent(
    values: list[list[float]], last_row: list[float], base: BaseHeader, log: Path
) -> Divergence:
    """Check what the statistics say twice, and return those that are kept."""
    (ppl, ppl_error), (ppl_base, _), _, (ln_ratio, _), (ratio, ratio_error), (difference, _) = (
        values[1:7]
    )
    kld_mean, kld_error = values[9]
    kld_percentiles = [value for (value,) in values[10:21]]
    probability_percentiles = [value for (value,) in values[24:37]]
    (rms, rms_error), (same_top, same_top_error) = values[37:39]
    scored = scored_tokens(base.context_tokens, base.chunks)
    share = same_top / 100
    if min(ppl, ppl_base, ratio) <= 0 or abs(ln_ratio) > _LARGEST_LOG_RATIO:
        refuse(f"llama-perplexity printed impossible perplexities: {ppl} over {ppl_base}.", log)
    # What the rounding of both to six decimals can make of the log of their ratio.
    rounding = 1e-6 * (1 + 1 / ppl + 1 / ppl_base)
    printed_twice = (
        ("perplexity", last_row[1:3], (ppl, ppl_error), 1e-4),
        ("log ratio of perplexities", last_row[3:4], (ln_ratio,), 1e-5),
        ("mean divergence", last_row[5:7], (kld_mean, kld_error), 1e-5),
        ("RMS of probabilities", last_row[7:9], (rms, rms_error), 1e-3),
        ("same top", last_row[9:11], (same_top, same_top_error), 1e-3),
        ("ratio of perplexities", (ratio,), (math.exp(ln_ratio),), 2e-6 * max(1.0, ratio)),
        ("log of the ratio", (ln_ratio,), (math.log(ppl / ppl_base),), rounding),
        ("difference of perplexities", (difference,), (ppl - ppl_base,), 4e-6),
        (
            "error of same top",
            (same_top_error,),
            (100 * math.sqrt(max(0.0, share * (1 - share)) / (scored - 1)),),
            2e-3,
        ),
    )  # fmt: skip
    for name, left, right, tolerance in printed_twice:
        if not all(
            math.isclose(one, other, rel_tol=0, abs_tol=tolerance)
            for one, other in zip(left, right, strict=True)
        ):
            refuse(
                f"llama-perplexity contradicts itself about the {name}: "
                f"{list(left)} and {list(right)}.",
                log,
            )
    for name, percentiles in (
        ("divergence", kld_percentiles),
        ("probability", probability_percentiles),
    ):
        if percentiles != sorted(percentiles, reverse=True):
            refuse(f"the percentiles of the {name} are out of order: {percentiles}.", log)
    if not (
        kld_percentiles[-1] <= kld_mean <= kld_percentiles[0] and 0 <= same_top <= 100  # noqa: PLR2004 - percent
    ):
        refuse("llama-perplexity printed a mean outside of its own range.", log)
    return Divergence(
        ppl=ppl,
        ppl_base=ppl_base,
        ppl_ratio=ratio,
        ppl_ratio_error=ratio_error,
        # A model equal to its reference prints -0.000000.
        kld_mean_nats=kld_mean + 0.0,
        kld_mean_error_nats=kld_error,
        kld_p999_nats=kld_percentiles[1] + 0.0,
        kld_max_nats=kld_percentiles[0] + 0.0,
        same_top=share,
        same_top_error=same_top_error / 100,
    )


_CHUNK_LINE = re.compile(r" *(\d+)    +-?\d")
_STRIDE_LINE = re.compile(r" +\d+  \d+\.\d{4}  ")


def is_base_row(line: str) -> bool:
    """Tell whether a line of the run that writes logits ends a window."""
    return _STRIDE_LINE.match(line) is not None


def divergence_progress(line: str) -> int | None:
    """Read how many windows are compared once a line of the table is printed, or None."""
    found = _CHUNK_LINE.match(line)
    return int(found[1]) if found and "±" in line else None


# --- llama-fit-params -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """
    Memory in MiB that llama.cpp plans for: weights, key-value cache, working space.

    Each term of each device is rounded down to a whole MiB by the tool, so a sum is up to a MiB
    too small for each term.
    """

    model_mib: float
    context_mib: float
    compute_mib: float

    @property
    def total_mib(self) -> float:
        """All three together."""
        return self.model_mib + self.context_mib + self.compute_mib


def estimate_argv(
    tools: Toolchain, model: str, *, context_tokens: int, execution: Execution
) -> list[str]:
    """
    Ask for the planned memory; only the header of the model is read.

    Repacking is off here: the tool leaves repacked weights out of its table (they lie in a buffer
    type of their own), and they take as many bytes as they did before.
    """
    return [
        str(tools.tool("llama-fit-params")),
        *("-m", model, "-c", str(context_tokens), "-np", "1", "-fitp", "on", "--no-repack"),
        *(*execution.argv(), *_LOG_OPTIONS),
    ]


_ESTIMATE_LINE = re.compile(r"(\S+(?: \S+)*?) (\d+) (\d+) (\d+) ")
_HOST = "Host"


def parse_estimate(stdout: str, stderr: str, *, on_gpu: bool, log: Path) -> MemoryEstimate:
    """
    Read one line for each device, `NAME model context compute `, of which Host is the last.

    Args:
        stdout: The table.
        stderr: The messages; an error voids the run.
        on_gpu: Add the devices up, rather than what stays in main memory.
        log: File with the whole output, for the error.

    Raises:
        ToolError: A line has another form, a device is there twice, Host is not the last, there
            is no GPU although one is used, or all is zero.
    """
    refuse_errors("llama-fit-params", stderr, log)
    table: dict[str, tuple[int, int, int]] = {}
    lines = stdout.splitlines()
    for line in lines:
        found = _ESTIMATE_LINE.fullmatch(line)
        if found is None or found[1] in table:
            refuse(f"llama-fit-params printed {line[:120]!r}, which is no new device.", log)
        table[found[1]] = (int(found[2]), int(found[3]), int(found[4]))
    if not stdout.endswith("\n") or not lines or list(table)[-1] != _HOST:
        refuse("llama-fit-params did not end its table with the line of the host.", log)
    rows = [row for name, row in table.items() if (name != _HOST) == on_gpu]
    if not rows:
        refuse("llama-fit-params lists no GPU, although the layers are to lie on one.", log)
    model, context, compute = (sum(column) for column in zip(*rows, strict=True))
    if model + context + compute == 0:
        refuse("llama-fit-params says that the model needs no memory at all.", log)
    return MemoryEstimate(model_mib=model, context_mib=context, compute_mib=compute)
