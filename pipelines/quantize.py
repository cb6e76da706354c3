"""
The stage `quantize`: one quantized GGUF, and the proof of what is in it.

llama-quantize exits with 0 in cases that ruin a release: a rule that matches nothing is ignored,
rows that fit no block silently get a larger type. So the mixture is known before the run
(`pipelines.tensor_mix`), the finished file is read again, rows of every tensor are turned back into
numbers (`pipelines.quant_values`), and only a file that is what was predicted gets its final name.

The name of the importance matrix is written into the GGUF as it is given. The tool therefore runs
in the folder of the matrix and gets the bare name: another checkout makes the same bytes.

Source: tools/quantize/quantize.cpp and src/llama-quant.cpp of the pinned llama.cpp.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Final

from pipelines import (
    atomic,
    console,
    disk,
    dvc_state,
    gguf_header,
    hashing,
    llamacpp,
    proc,
    quant_values,
    records,
    tensor_mix,
    tensor_rules,
)
from pipelines.errors import DigestError, MachineError, ParamsError, ToolError
from pipelines.wording import first_few

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipelines.gguf_header import Header
    from pipelines.layout import Layout
    from pipelines.params import QuantizeSlice
    from pipelines.records import CalibrateRecord, ConvertRecord, QuantizeRecord
    from pipelines.tensor_mix import Prediction
    from pipelines.toolchain import Toolchain

# What the metadata may grow by: four keys about the importance matrix, with two short texts.
_METADATA_GROWTH_BYTES: Final = 4096

_TENSOR_DONE: Final = re.compile(r"^\[ *(\d+)/ *\d+\]")
_NO_WEIGHTS: Final = re.compile(r"did not find weights for (\S+)")
# What llama-quantize itself says about the file.
_OWN_METADATA: Final = frozenset({"general.file_type", "general.quantization_version"})
# llama-imatrix never looks at these (but for --process-output); quantizing them without is normal.
_NEVER_CALIBRATED: Final = frozenset(
    {"token_embd.weight", "output.weight", "per_layer_token_embd.weight"}
)


def run(slice_: QuantizeSlice, at: Layout) -> QuantizeRecord:
    """Make one quant with the fleet's own toolchain."""
    from pipelines import toolchain  # noqa: PLC0415 - not for tests of the rest

    return quantize(slice_, at, toolchain.load(at))


def quantize(wanted: QuantizeSlice, at: Layout, tools: Toolchain) -> QuantizeRecord:
    """
    Make work/MODEL/gguf/KEY.gguf.

    Raises:
        ParamsError: The declaration does not fit the model: a rule without effect, a type that
            rows do not fit, more fallbacks than allowed, a missing importance matrix.
        ToolError: llama-quantize failed, or made something else than it announced, or numbers that
            are not those of the source.
        DigestError: The 16-bit model is not the one of its record.
        MachineError: The disk is too small; nothing was written.
    """
    convert = records.read(at.model_record("convert", wanted.model), records.ConvertRecord)
    source, wanted, calibration = prepared(wanted, at, convert)
    log = at.log("quantize", wanted.key)
    final = at.gguf(wanted.model, wanted.key)
    # Both exist whether a model is calibrated or not; an output of DVC may be an empty folder.
    cwd = at.imatrix_dir(wanted.model) if calibration else at.f16(wanted.model).parent

    run_tool = partial(
        proc.run, log=log, cwd=cwd, env=llamacpp.environment(tools), inherit_env=False
    )
    plan = run_tool(quantize_argv(tools, wanted, source, output=None))
    mix = tensor_mix.predict(source, wanted, plan.stderr)
    disk.require(final, size_limit(source, mix), f"quantize {wanted.key}")

    with atomic.replacing(final) as part:
        argv = quantize_argv(tools, wanted, source, output=part)
        _make(wanted, partial(run_tool, argv), len(mix.types))
        made = check_made(part, source, mix, calibration)
        values = _read_back(wanted, source, made, tools)
        digests = hashing.digest(part)
    dvc_state.remember(final, digests.md5)
    return records.QuantizeRecord(
        key=wanted.key,
        model=wanted.model,
        type=wanted.type,
        f16_sha256=convert.gguf.sha256,
        llama_cpp_commit=tools.commit,
        recipe=wanted.recipe,
        imatrix_sha256=calibration.imatrix.sha256 if calibration and calibration.imatrix else None,
        imatrix_corpus_sha256=calibration.corpus_sha256 if calibration else None,
        bits_per_weight=round(made.bits_per_weight(), 4),
        tensors_count=len(made.tensors),
        tensor_types=made.type_counts(),
        tensor_bytes=made.type_bytes(),
        rules=mix.rules,
        fallbacks=mix.fallbacks,
        gguf=records.FileDigest(
            name=final.name, size_bytes=digests.size_bytes, sha256=digests.sha256, md5=digests.md5
        ),
        values=values,
    )


def prepared(
    wanted: QuantizeSlice, at: Layout, convert: ConvertRecord
) -> tuple[Header, QuantizeSlice, CalibrateRecord | None]:
    """
    Return what is quantized, with all rules, and the record of the matrix that is used, if one is.

    Raises:
        ParamsError, ToolError, DigestError: See `quantize`.
    """
    source = _source(at.f16(wanted.model), convert)
    resolved = tensor_rules.resolve(wanted, source, at)
    tensor_mix.check_forced_types(source, resolved)
    return source, resolved, _calibration(resolved, at, convert)


def quantize_argv(
    tools: Toolchain, wanted: QuantizeSlice, source: Header, *, output: Path | None
) -> list[str | Path]:
    """
    Spell the command; without `output` as a dry run.

    The number of threads is left to the tool: it changes no byte.
    """
    argv: list[str | Path] = [tools.tool("llama-quantize")]
    if output is None:
        argv.append("--dry-run")
    if wanted.imatrix:
        argv += ["--imatrix", "imatrix.gguf"]
    for rule in wanted.tensor_types:
        argv += ["--tensor-type", f"{rule.match}={rule.type}"]
    if wanted.output_tensor_type:
        argv += ["--output-tensor-type", wanted.output_tensor_type]
    if wanted.token_embedding_type:
        argv += ["--token-embedding-type", wanted.token_embedding_type]
    if wanted.pure:
        argv.append("--pure")
    if wanted.leave_output_tensor:
        argv.append("--leave-output-tensor")
    argv.append(source.path.absolute())
    if output is not None:
        argv.append(output.absolute())
    return [*argv, wanted.type]


def size_limit(source: Header, mix: Prediction) -> int:
    """Upper bound of the file to be made, in bytes, each tensor padded."""
    padding = len(mix.types) * gguf_header.DEFAULT_ALIGNMENT
    return source.data_offset + _METADATA_GROWTH_BYTES + mix.data_bytes + padding


def check_made(
    part: Path, source: Header, mix: Prediction, calibration: CalibrateRecord | None
) -> Header:
    """
    Read what llama-quantize wrote and compare it with what it should have written.

    Raises:
        ToolError: Nothing, less, more or something else was written.
        GgufError: It is not a GGUF.
    """
    if not part.is_file():
        raise ToolError("llama-quantize ended with exit code 0 and wrote nothing.")
    made = gguf_header.read(part)
    if made.file_size_bytes != made.end_offset:
        raise ToolError(
            f"llama-quantize wrote {made.file_size_bytes:,} bytes, its own header describes "
            f"{made.end_offset:,}."
        )
    if wrong := tensor_mix.differences(mix.types, made):
        raise ToolError(
            f"llama-quantize did not do what it announced in {len(wrong)} tensors: "
            f"{first_few(wrong)}."
        )
    if _shapes(made) != _shapes(source):
        raise ToolError("llama-quantize changed the shape of a tensor.")
    if changed := _changed_metadata(source, made):
        raise ToolError(f"llama-quantize changed {first_few(changed)}.")
    _check_imatrix(made, calibration)
    return made


def _read_back(
    wanted: QuantizeSlice, source: Header, made: Header, tools: Toolchain
) -> records.QuantValues:
    """Compare sampled rows of every tensor with the source; say of which that was not possible."""
    try:
        values = quant_values.examine(source, made, tools)
    except ImportError as error:
        raise MachineError(
            f"the Python packages that read a quant back are incomplete: {error}.",
            hint="Install the extra `convert`: make setup.",
        ) from error
    if values.unreadable:
        console.warn(
            f"{wanted.key}: {first_few(values.unreadable)} are of a type that gguf-py cannot read: "
            "their values were not compared with the 16-bit model's."
        )
    return values


def _changed_metadata(source: Header, made: Header) -> list[str]:
    """Name the metadata that differ, but for those that say how the file was quantized."""

    def comparable(header: Header) -> dict[str, object]:
        return {
            key: (value.element, value.count, value.size_bytes)
            if isinstance(value, gguf_header.Array)
            else value
            for key, value in header.metadata.items()
            if key not in _OWN_METADATA and not key.startswith("quantize.imatrix.")
        }

    before, after = comparable(source), comparable(made)
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def _check_imatrix(made: Header, calibration: CalibrateRecord | None) -> None:
    """Compare what the file says about its importance matrix with the record of that."""
    keys = ("file", "dataset", "entries_count", "chunks_count")
    found = tuple(made.metadata.get(f"quantize.imatrix.{key}") for key in keys)
    expected: tuple[object, ...] = (None,) * len(keys)
    if calibration is not None:
        # quantize.cpp keeps the first 127 bytes of both texts.
        dataset = (calibration.corpus or "")[:127]
        expected = ("imatrix.gguf", dataset, calibration.entries_count, calibration.chunks_count)
    if found != expected:
        raise ToolError(
            f"the GGUF says that it was made with the importance matrix {found}, not {expected}."
        )


def _source(path: Path, convert: ConvertRecord) -> Header:
    """
    Read the header of the 16-bit GGUF and refuse one that is quantized already, torn or another.

    Up to 256 MiB it is hashed, which takes half a second. Of a larger one header and size have to
    do, or each of ten quants would read it once more than the tool does. Below DVC its bytes were
    compared before the stage started; of what somebody makes by hand from other bytes of the same
    size, benchmark tells how far it is from the 16-bit model, which it hashes.
    """
    source = gguf_header.read(path)
    if source.file_size_bytes != convert.gguf.size_bytes:
        raise ToolError(
            f"{path} has {source.file_size_bytes:,} bytes, its record says "
            f"{convert.gguf.size_bytes:,}.",
            hint="fleet repro: it makes the file again.",
        )
    if source.file_size_bytes <= dvc_state.WORTH_BYTES:
        found = hashing.digest(path).sha256
        if found != convert.gguf.sha256:
            raise DigestError(
                f"{path} is {found[:12]}, its record says {convert.gguf.sha256[:12]}.",
                hint="fleet repro: it makes the file again.",
            )
    # Only quantized types store more than one element in a block.
    quantized = sorted(type_ for type_ in source.type_counts() if gguf_header.BLOCKS[type_][0] > 1)
    if quantized:
        raise ToolError(
            f"{path} holds tensors of {', '.join(quantized)}: quantizing twice loses quality.",
            hint="Take a source in 16 or 32 bits.",
        )
    return source


def _calibration(
    wanted: QuantizeSlice, at: Layout, convert: ConvertRecord
) -> CalibrateRecord | None:
    """Return the record of the importance matrix that this quant uses, if it uses one."""
    if not wanted.imatrix:
        return None
    record = records.read(at.model_record("calibrate", wanted.model), records.CalibrateRecord)
    if record.imatrix is None:
        raise ParamsError(
            f"quants.{wanted.key} wants an importance matrix, models.{wanted.model} has none.",
            hint=f"Declare `calibration` in models.{wanted.model}, or remove `imatrix`.",
        )
    path = at.imatrix(wanted.model)
    # All of it, unlike the 16-bit model: it is small, and no later stage would notice a wrong one.
    found = hashing.digest(path).sha256 if path.is_file() else None
    if record.f16_sha256 != convert.gguf.sha256 or found != record.imatrix.sha256:
        raise ToolError(
            f"{path} is not the importance matrix of the present 16-bit model.",
            hint="fleet repro: it makes the file again.",
        )
    return record


def _make(wanted: QuantizeSlice, tool: Callable[..., proc.Completed], tensors_count: int) -> None:
    """Run llama-quantize with a progress line; say which tensors it treats without the imatrix."""
    with console.Progress(
        f"quantize {wanted.key}", total=tensors_count, unit="tensors"
    ) as progress:

        def show(line: str) -> None:
            if tensor := _TENSOR_DONE.match(line):
                progress.update(int(tensor[1]))

        done = tool(on_line=show)
    without = sorted(set(_NO_WEIGHTS.findall(done.stderr)) - _NEVER_CALIBRATED)
    if without:
        console.warn(
            f"{wanted.key}: the importance matrix has nothing about {first_few(without)}; they are "
            "quantized without one."
        )


def _shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """Shapes by name; llama-quantize writes trailing dimensions of 1 or leaves them out."""
    return {
        tensor.name: tensor.shape + (1,) * (gguf_header.MAX_DIMS - len(tensor.shape))
        for tensor in header.tensors
    }
