"""
llama-bench: how it is called, and what of its output is believed.

Source: tools/llama-bench/llama-bench.cpp at the pinned commit; outputs recorded in tests/data.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pipelines.console import clean
from pipelines.llamacpp import refuse

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipelines.llamacpp import Execution
    from pipelines.toolchain import Toolchain


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
    embeddings: bool = False


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
    """
    List the tests of one llama-bench run in the order in which it makes them.

    No decode of no tokens: that is how an encoder is measured.
    """
    tests: list[SpeedTest] = []
    for depth in depths:
        tests.append(SpeedTest(test="prefill", tokens=prompt_tokens, depth_tokens=depth))
        if generate_tokens:
            tests.append(SpeedTest(test="decode", tokens=generate_tokens, depth_tokens=depth))
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
    embeddings: bool = False,
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
        *_bench_options(tools, execution, load_mode="auto", embeddings=embeddings),
    ]


MEMORY_PAUSE_S = 1


def memory_argv(
    tools: Toolchain,
    model: str,
    *,
    context_tokens: int,
    execution: Execution,
    embeddings: bool = False,
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
        *_bench_options(tools, execution, load_mode="none", embeddings=embeddings),
    ]


def memory_tests(context_tokens: int) -> tuple[SpeedTest, ...]:
    """List the tests that `memory_argv` asks for."""
    return tuple(
        SpeedTest(test="prefill", tokens=tokens, depth_tokens=0) for tokens in (context_tokens, 1)
    )


# The option came with this release. llama-bench of earlier ones repacks, too, and cannot be told
# not to (use_extra_bufts of llama_model_default_params); a comparison runs it beside a newer one.
_REPACK_SINCE = (0, 3, 36)


def _bench_options(
    tools: Toolchain, execution: Execution, *, load_mode: str, embeddings: bool
) -> list[str]:
    release = tuple(map(int, tools.manifest["llama_cpp_python"].split(".")))
    return [
        *execution.argv(),
        *("-lm", load_mode, "-sm", "layer", "-mg", "0", "-nkvo", "0"),
        *(() if execution.cpu_moe_layers else ("-ncmoe", "0")),
        *("--poll", "50", "--cpu-strict", "0", "-nopo", "0", "--no-host", "0"),
        *("-embd", "1" if embeddings else "0"),
        *(("--repack", "1") if release >= _REPACK_SINCE else ()),
    ]


# Rounding of what llama-bench prints: streams write doubles with six significant digits, the
# averages have six decimals.
_STREAM_ERROR = 1e-5
_AVERAGE_ERROR = 1e-6
_NS_PER_S = 1_000_000_000
# 31 years in nanoseconds; JSON has integers that are too large for a float.
_NO_MEASUREMENT = 10**18


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
    except (ValueError, RecursionError) as error:
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
        "n_cpu_moe": run.cpu_moe_layers,
        "flash_attn": int(run.flash_attention),
        "type_k": run.kv_type,
        "type_v": run.kv_type,
        "n_batch": run.batch_tokens,
        "n_ubatch": run.ubatch_tokens,
        "embeddings": expected.embeddings,
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
    if not 0 < value < _NO_MEASUREMENT:
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
