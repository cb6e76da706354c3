"""
llama-perplexity: logits of a reference model, and how far another model is from them.

Source: tools/perplexity/perplexity.cpp and common/log.cpp at the pinned commit; outputs recorded in
tests/data.
"""

from __future__ import annotations

import math
import re
import struct
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from pipelines.llamacpp import LOG_OPTIONS, refuse, refuse_errors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipelines.llamacpp import Execution
    from pipelines.toolchain import Toolchain

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
    not fit there whole can still be the reference of quants that do. It places experts, too, and
    only where nobody else has.
    """
    options = (replace(execution, cpu_moe_layers=0) if place_by_memory else execution).argv()
    if place_by_memory:
        options[options.index("-ngl") + 1] = "auto"
    return [
        *perplexity_program(tools),
        *("-m", model, "-f", corpus, "-c", str(context_tokens), "--chunks", str(chunks)),
        *("--save-all-logits", base, "--ppl-stride", "0", "--ppl-output-type", "1"),
        *("-fit", "on" if place_by_memory else "off", *options, "-tb", str(execution.threads)),
        *LOG_OPTIONS,
    ]


def divergence_argv(
    tools: Toolchain, model: str, *, base: str, context_tokens: int, execution: Execution
) -> list[str]:
    """Compare a model with the logits in `base`; text, windows and chunks come from that file."""
    return [
        *perplexity_program(tools),
        *("-m", model, "-c", str(context_tokens)),
        *("--kl-divergence", "--kl-divergence-base", base),
        *("-fit", "off", *execution.argv(), "-tb", str(execution.threads), *LOG_OPTIONS),
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


_FINAL_ESTIMATE = re.compile(r"Final estimate: PPL = (\d+\.\d{4}) \+/- (\d+\.\d{5})$")


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
_PLACEHOLDER = re.compile(r"%%|%\d+(?:\.\d+)?([df])")
# No number that the tool prints has more digits, and none of these overflows a float.
_NUMBERS: Final = {
    None: "%",
    "d": r"( *\d{1,9})",
    "f": r"( *-?(?:\d{1,30}(?:\.\d{1,9})?|nan|inf))",
}


def _pattern(template: str) -> re.Pattern[str]:
    """Turn a printf format into the pattern of a line that it can have printed."""
    parts: list[str] = []
    position = 0
    for found in _PLACEHOLDER.finditer(template):
        parts.append(re.escape(template[position : found.start()]))
        parts.append(_NUMBERS[found[1]])
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
    # C prints the sign of a number that is none, Python does not.
    if template % tuple(values) != line.replace("-nan", " nan"):
        refuse(f"llama-perplexity printed a damaged number: {line.strip()[:120]}", log)
    return values


# The lines of the block that end in the error of a difference between the two models.
_OF_DIFFERENCE: Final = frozenset({4, 5, 6})
# Five decimals are printed of the log of their ratio: two that differ by less are one.
_SAME_LOG_RATIO: Final = 1e-4


def parse_divergence(
    stdout: str, stderr: str, *, base: BaseHeader, log: Path, may_be_same: bool = False
) -> Divergence:
    """
    Read the table and the statistics that llama-perplexity --kl-divergence prints.

    Of a model that is held against itself the variance of the difference is nothing but rounding,
    which may be below zero: the tool then prints `nan` for its root. Only where the two may be the
    same, and their perplexities are, that error is taken for the zero that it is.

    Args:
        stdout: Its standard output: progress, a table with a row for each window, statistics.
        stderr: Its messages; one error among them voids the run.
        base: Header of the logits that it read.
        log: File with the whole output, for the error.
        may_be_same: Whether both may be one model.

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
        _values(template, pattern, line, log, finite=not (may_be_same and number in _OF_DIFFERENCE))
        for number, (template, pattern, line) in enumerate(
            zip(_BLOCK, _BLOCK_PATTERNS, block, strict=True)
        )
    ]
    if may_be_same:
        _without_error(values, log)
    return _consistent(values, last_row, base, log)


def _without_error(values: list[list[float]], log: Path) -> None:
    """Take an error of the difference that is none for zero, where there is no difference."""
    for number in sorted(_OF_DIFFERENCE):
        value, error = values[number]
        if math.isfinite(value) and math.isnan(error) and abs(values[4][0]) <= _SAME_LOG_RATIO:
            values[number][1] = 0.0
        if not all(map(math.isfinite, values[number])):
            refuse("llama-perplexity printed a number that is not finite.", log)


def running_divergence(stdout: str, base: BaseHeader, log: Path) -> tuple[float, ...]:
    """
    Return the mean divergence over the first 1, 2, 3, ... windows, in nats, as the table has it.

    Five decimals are printed: of window c itself, c m(c) - (c - 1) m(c - 1), an error of c 1e-5 is
    left, so windows are taken together (`pipelines.compare_quality`).

    Args:
        stdout: Output that `parse_divergence` has accepted.
        base: Header of the logits that were read.
        log: File with the whole output, for the error.

    Raises:
        ToolError: A window is missing, or a number is damaged or not finite.
    """
    lines = stdout.split("\n")
    begin = lines.index(_CHUNK_HEADER) + 1 if _CHUNK_HEADER in lines else len(lines)
    table = [
        _values(_CHUNK_ROW, _ROW_PATTERN, row, log, finite=False)
        for row in lines[begin : begin + base.chunks]
    ]
    means = tuple(row[5] for row in table)
    if [row[0] for row in table] != list(range(1, base.chunks + 1)) or not all(
        math.isfinite(mean) for mean in means
    ):
        refuse(f"llama-perplexity's table does not hold the {base.chunks} windows.", log)
    return means


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
            (100 * math.sqrt(max(0.0, share * (1 - share)) / max(1, scored - 1)),),
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
