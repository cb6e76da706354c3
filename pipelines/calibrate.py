"""
The stage `calibrate`: which inputs of each matrix matter, measured on a calibration text.

llama-imatrix runs the 16-bit model over the text and sums the squared inputs of every matrix;
llama-quantize spends its bits by them. For one build of the tools the result depends on the model,
the text, the window and the number of windows, and on nothing else: not on the threads, not on the
folder. A card sums in another order than a CPU, so another backend gives other last digits.

llama-imatrix writes the name of the text into its file as it is given, and llama-quantize copies
that into every GGUF made with it. So it gets the path as declared, below the repository; another
folder gives the same bytes, and none leaks.

Source: tools/imatrix/imatrix.cpp of the pinned llama.cpp.
"""

from __future__ import annotations

import math
import re
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import (
    architectures,
    atomic,
    console,
    corpora,
    dvc_state,
    gguf_header,
    hashing,
    llamacpp,
    machine,
    proc,
    records,
)
from pipelines.errors import FleetError, ParamsError, ToolError
from pipelines.gguf_header import Array
from pipelines.wording import first_few

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipelines.gguf_header import Header, TensorInfo
    from pipelines.layout import Layout
    from pipelines.params import CalibrateSlice, Corpus
    from pipelines.records import CalibrateRecord, ConvertRecord
    from pipelines.toolchain import Toolchain

# Tokens in one pass. The sums do not depend on it, the memory for the logits does: 512 tokens of a
# vocabulary of 150,000 take 0.3 GB, a window of 8,192 at once would take 5 GB.
_BATCH_TOKENS: Final = 512
# It saves what it has every N windows; only the end counts, and a file is written once.
_NEVER: Final = 1_000_000_000

_CHUNK: Final = re.compile(r"^\[(\d+)\]")
_CHUNKS_PLANNED: Final = re.compile(r"computing over (\d+) chunks")
_TOKENS: Final = re.compile(r"^Total number of tokens: (\d+)$", re.MULTILINE)
# A text with more bytes than this for each token is not short.
_MAX_TOKEN_BYTES: Final = 64
_SUMS: Final = ".in_sum2"
_COUNTS: Final = ".counts"
# Named in the record; `partial_entries_count` and `zero_columns_count` say how many there are.
_MAX_HOLES: Final = 6


@dataclass(frozen=True)
class _Entries:
    """Entries of an importance matrix, those with experts unseen, and where it knows nothing."""

    count: int = 0
    partial_count: int = 0
    zero_columns_count: int = 0
    holes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Content:
    """What is in an importance matrix: its entries, and windows of text."""

    entries: _Entries
    chunks_count: int


def run(slice_: CalibrateSlice, at: Layout) -> CalibrateRecord:
    """Make the importance matrix of a model with the fleet's own toolchain."""
    from pipelines import toolchain  # noqa: PLC0415 - not for tests of the rest

    return calibrate(slice_, at, toolchain.load(at))


def calibrate(wanted: CalibrateSlice, at: Layout, tools: Toolchain) -> CalibrateRecord:
    """
    Make work/MODEL/imatrix: a directory with imatrix.gguf, or an empty one without calibration.

    Raises:
        ParamsError: The corpus is missing or too short.
        DigestError: The corpus does not have the declared bytes.
        ToolError: llama-imatrix failed, or what it wrote cannot be used.
    """
    convert = records.read(at.model_record("convert", wanted.model), records.ConvertRecord)
    if wanted.corpus is None:
        with atomic.replacing(at.imatrix_dir(wanted.model)) as part:
            part.mkdir()
        console.info(f"{wanted.model}: no calibration is declared, so there is no imatrix.")
        return _record(wanted, convert, tools, _Content(_Entries(), 0), imatrix=None)

    corpora.require(wanted.corpus, at, "calibration text")
    _require_model(at.f16(wanted.model), convert)
    _require_causal(at.f16(wanted.model), wanted.model)
    final = at.imatrix(wanted.model)
    with atomic.replacing(final.parent) as part:
        part.mkdir()
        imatrix = part / final.name
        _run_tool(wanted, wanted.corpus, imatrix, at, tools)
        content = _check(imatrix, wanted, wanted.corpus)
        digests = hashing.digest(imatrix)
    dvc_state.remember(final, digests.md5)
    file = records.FileDigest(
        name=final.name, size_bytes=digests.size_bytes, sha256=digests.sha256, md5=digests.md5
    )
    return _record(wanted, convert, tools, content, imatrix=file)


def _require_model(f16: Path, convert: ConvertRecord) -> None:
    """Refuse a model that is plainly not the one of the record whose digest we pass on."""
    size_bytes = f16.stat().st_size if f16.is_file() else 0
    if size_bytes != convert.gguf.size_bytes:
        raise ToolError(
            f"{f16} has {size_bytes:,} bytes, its record says {convert.gguf.size_bytes:,}.",
            hint="fleet repro: it makes the file again.",
        )


def _require_causal(f16: Path, model: str) -> None:
    """
    Refuse a model that predicts no next token: llama-imatrix would abort in its middle.

    Raises:
        ParamsError: Names what to remove from the declaration.
    """
    if architectures.is_causal(gguf_header.read(f16)):
        return
    raise ParamsError(
        f"{model} is an encoder: it predicts no next token, so that llama-imatrix cannot run it.",
        hint=f"In params.yaml, remove `calibration` of {model}, and `imatrix: true` from its "
        "quants. Types that need an importance matrix (IQ1, IQ2, Q2_K_S) cannot be made of it.",
    )


def imatrix_argv(  # noqa: PLR0913 - each is one option of the tool
    program: Path,
    *,
    model: Path,
    corpus: str,
    output: Path,
    context_tokens: int,
    chunks: int | None,
    on_gpu: bool,
) -> list[str | Path]:
    """Spell the command: every option that can change a byte is there, whatever its default."""
    batch = str(min(context_tokens, _BATCH_TOKENS))
    threads = str(machine.usable_cores())  # they change no byte of the result
    return [
        program, "-m", model, "-f", corpus,
        "-o", output, "--output-format", "gguf",
        "--output-frequency", str(_NEVER), "--save-frequency", "0",
        "-c", str(context_tokens), "--chunks", str(-1 if chunks is None else chunks),
        "-b", batch, "-ub", batch, "-fa", "off",
        "-t", threads, "-tb", threads,
        # A model too large for the card still runs, with some layers on the CPU.
        *(("-ngl", "auto", "--fit", "on") if on_gpu else ("-ngl", "0", "--fit", "off")),
    ]  # fmt: skip


def _run_tool(
    wanted: CalibrateSlice, corpus: Corpus, imatrix: Path, at: Layout, tools: Toolchain
) -> None:
    """Run llama-imatrix with a progress line."""
    argv = imatrix_argv(
        tools.tool("llama-imatrix"),
        model=at.f16(wanted.model).absolute(),
        corpus=corpus.path,
        output=imatrix.absolute(),
        context_tokens=wanted.context_tokens,
        chunks=wanted.chunks,
        on_gpu=tools.backend != "cpu",
    )
    log = at.log("calibrate", wanted.model)
    with console.Progress(f"calibrate {wanted.model}", unit="windows") as progress:
        done = proc.run(
            argv,
            log=log,
            cwd=at.root,
            env=llamacpp.environment(tools),
            inherit_env=False,
            on_line=lambda line: _show(progress, line),
            line_ends=b"\r\n,",
            ok_codes=(0, 1),
            one_stream=True,
        )
    if done.code:
        raise _failure(wanted, corpus, at, tools, done)


def _failure(
    wanted: CalibrateSlice, corpus: Corpus, at: Layout, tools: Toolchain, done: proc.Completed
) -> FleetError:
    """
    Find out why llama-imatrix ended with exit code 1.

    llama.cpp hands messages to a thread and may end before that has written the last ones
    (common/log.cpp says so), so the commonest cause is looked for and not read.
    """
    log = at.log("calibrate", wanted.model)
    text = at.root / corpus.path
    if text.stat().st_size <= 2 * wanted.context_tokens * _MAX_TOKEN_BYTES:
        argv = tokenize_argv(tools.tool("llama-tokenize"), at.f16(wanted.model), text)
        tokenized = proc.run(argv, log=log, env=llamacpp.environment(tools), inherit_env=False)
        counted = _TOKENS.search(tokenized.stdout)
        if counted and int(counted[1]) < 2 * wanted.context_tokens:
            return _too_short(wanted, corpus, int(counted[1]) // wanted.context_tokens)
    return ToolError(
        f"llama-imatrix ended with exit code 1.\n{proc.tail(done)}",
        hint="If it does not say why: activations that are not finite end it like this, and its "
        "last words are sometimes lost.",
        log=log,
    )


def tokenize_argv(program: Path, model: Path, text: Path) -> list[str | Path]:
    """Spell the command that counts the tokens of a text as llama-imatrix does."""
    return [
        program, "-m", model, "-f", text,
        "--ids", "--show-count", "--no-parse-special", "--log-disable",
    ]  # fmt: skip


def _show(progress: console.Progress, line: str) -> None:
    if planned := _CHUNKS_PLANNED.search(line):
        progress.total = int(planned[1])
    elif chunk := _CHUNK.match(line):
        progress.update(int(chunk[1]))


def _too_short(wanted: CalibrateSlice, corpus: Corpus, chunks: int) -> ParamsError:
    needed = max(2, wanted.chunks or 0)
    return ParamsError(
        f"{corpus.path} fills {chunks} windows of {wanted.context_tokens} tokens of "
        f"{wanted.model}, {needed} are needed.",
        hint="Take a longer text, or lower `calibrate.chunks` or `calibrate.context_tokens`.",
    )


def _check(imatrix: Path, wanted: CalibrateSlice, corpus: Corpus) -> _Content:
    """
    Read the result again.

    Raises:
        ToolError: It is not there, not whole, not of this text, or has values that say nothing.
        ParamsError: The text ended before the declared number of windows.
    """
    if not imatrix.is_file():
        raise ToolError("llama-imatrix ended with exit code 0 and wrote nothing.")
    header = gguf_header.read(imatrix)
    if header.end_offset > header.file_size_bytes or header.text("general.type") != "imatrix":
        raise ToolError("llama-imatrix wrote a file that is not a whole importance matrix.")
    datasets = header.metadata.get("imatrix.datasets")
    if not isinstance(datasets, Array) or datasets.values() != [corpus.path]:
        raise ToolError(f"llama-imatrix did not write that it read {corpus.path}.")
    if header.integer("imatrix.chunk_size") != wanted.context_tokens:
        raise ToolError("llama-imatrix used another window than it was told.")
    chunks = header.integer("imatrix.chunk_count")
    if chunks < (wanted.chunks or 1):
        raise _too_short(wanted, corpus, chunks)
    if wanted.chunks is not None and chunks > wanted.chunks:
        raise ToolError(f"llama-imatrix read {chunks} windows instead of {wanted.chunks}.")
    return _Content(entries=_check_entries(header), chunks_count=chunks)


def _check_entries(header: Header) -> _Entries:
    """
    Look at all sums.

    Raises:
        ToolError: Sums are not finite, below zero, or all zero; names the entries and how many.
    """
    tensors = {tensor.name: tensor for tensor in header.tensors}
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    pairs = {name + end for name in names for end in (_SUMS, _COUNTS)}
    if not names or pairs != tensors.keys() or {"F32"} != set(header.type_counts()):
        raise ToolError("llama-imatrix wrote tensors that are not sums and counts of F32.")
    useless, unseen, silent = [], [], []
    silent_columns = 0
    for name in names:
        counts = next(_rows(header, tensors[name + _COUNTS], 1))
        rows = _rows(header, tensors[name + _SUMS], len(counts))
        # One row for each expert; an expert that no token was sent to has count 0 and no sums.
        used = [_look(row) for row, count in zip(rows, counts, strict=True) if count > 0]
        if flaw := next((each.flaw for each in used if each.flaw), "" if used else "no token"):
            useless.append(f"{name} ({flaw})")
            continue
        if len(used) < len(counts):
            unseen.append(f"{name} ({len(used)} of {len(counts)} experts)")
        if zeros := sum(each.zeros_count for each in used):
            columns = sum(each.columns_count for each in used)
            silent.append(f"{name} ({zeros:,} of {columns:,} columns are zero)")
            silent_columns += zeros
    if useless:
        raise ToolError(
            f"the importance matrix has zeros only, or values that are not finite, in "
            f"{first_few(useless)}.",
            hint="The 16-bit model is damaged, or its activations overflow: look at its outputs.",
        )
    _warn_of_holes(unseen, silent)
    return _Entries(
        count=len(names),
        partial_count=len(unseen),
        zero_columns_count=silent_columns,
        holes=tuple([*unseen, *silent][:_MAX_HOLES]),
    )


def _warn_of_holes(unseen: list[str], silent: list[str]) -> None:
    """Say where the importance matrix knows nothing."""
    if unseen:
        console.warn(
            f"the calibration text did not reach every expert: {first_few(unseen)}. Weights of "
            "the others are quantized without an importance matrix; a longer or more varied text "
            "helps."
        )
    if silent:
        console.warn(
            f"the importance matrix has holes: {first_few(silent)}. Weights that meet these inputs "
            "count for nothing while a quant is made; a longer or more varied text helps, unless "
            "the model never uses them."
        )


@dataclass(frozen=True)
class _Row:
    """One row of sums: what makes it useless, if anything does, and its columns."""

    flaw: str
    zeros_count: int
    columns_count: int


def _look(row: array[float]) -> _Row:
    """Look at sums of squares: finite, none below 0, not all 0; a sum of them keeps NaN."""
    total, zeros = sum(row), row.count(0.0)
    flaw = ""
    if not math.isfinite(total) and (bad := sum(not math.isfinite(value) for value in row)):
        flaw = f"{bad:,} of {len(row):,} not finite"
    elif min(row) < 0:
        flaw = f"{sum(value < 0 for value in row):,} of {len(row):,} below zero"
    elif zeros == len(row):
        flaw = f"all {zeros:,} zero"
    return _Row(flaw=flaw, zeros_count=zeros, columns_count=len(row))


def _rows(header: Header, tensor: TensorInfo, rows: int) -> Iterator[array[float]]:
    """Yield a tensor of F32 in `rows` equal parts, of which only one is in memory."""
    if tensor.n_elements % rows:
        raise ToolError(f"llama-imatrix wrote {tensor.name} not in {rows} equal rows.")
    size_bytes = tensor.size_bytes // rows
    with header.path.open("rb") as file:
        file.seek(header.data_offset + tensor.offset)
        for _ in range(rows):
            row = array("f")
            row.frombytes(file.read(size_bytes))
            yield row


def _record(
    wanted: CalibrateSlice,
    convert: ConvertRecord,
    tools: Toolchain,
    content: _Content,
    *,
    imatrix: records.FileDigest | None,
) -> CalibrateRecord:
    return records.CalibrateRecord(
        model=wanted.model,
        f16_sha256=convert.gguf.sha256,
        llama_cpp_commit=tools.commit,
        recipe=wanted.recipe,
        corpus=wanted.corpus.path if wanted.corpus else None,
        corpus_sha256=wanted.corpus.sha256 if wanted.corpus else None,
        context_tokens=wanted.context_tokens,
        chunks_count=content.chunks_count,
        entries_count=content.entries.count,
        partial_entries_count=content.entries.partial_count,
        zero_columns_count=content.entries.zero_columns_count,
        holes=content.entries.holes,
        imatrix=imatrix,
    )
