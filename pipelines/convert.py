"""
Convert: the 16-bit GGUF of a model, made by llama.cpp's own converter of the pinned commit.

The converter reads files of strangers with large libraries, so it runs apart: with none of our
environment but PATH, without network, tokens or GPU, and it never sees code of the model's
repository, since fetch took none. What it writes has a final name only after it was read back:
header and tensors complete, types 16 or 32 bits, both digests from one pass.

Equal sources give equal bytes. The name in the metadata is upstream's (`hf:`) or the fleet's
(`path:`), never a path of this machine.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from pipelines import (
    apart,
    architectures,
    atomic,
    console,
    disk,
    dvc_state,
    fetch,
    gguf_header,
    hashing,
    proc,
    records,
    toolchain,
)
from pipelines.errors import MachineError, ToolError, UpstreamError

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.gguf_header import Header
    from pipelines.layout import Layout
    from pipelines.params import ConvertSlice
    from pipelines.toolchain import Toolchain

# `--outtype f16`: matrices in 16 bits, norms and the like in 32.
ALLOWED_TYPES: Final = frozenset({"F32", "F16"})

_PROGRESS: Final = re.compile(r"Writing:\s+(\d+)%")
_RAISED: Final = re.compile(r"(?m)^(?:[\w.]+\.)?(\w*(?:Error|Exception))(?:: (.*))?$")
_CHKHSH: Final = re.compile(r"chkhsh:\s+([0-9a-f]{64})")


def run(slice_: ConvertSlice, at: Layout) -> records.ConvertRecord:
    """
    Make work/<model>/f16.gguf.

    Raises:
        UpstreamError: The converter cannot make sense of the model, and why.
        ToolError: It failed, or wrote something that is no 16-bit GGUF; carries the log.
        MachineError: The disk is too small, or the converter's Python packages are missing.
    """
    tools = toolchain.load(at)
    model = slice_.model
    source = records.read(at.model_record("fetch", model), records.FetchRecord)
    _require_source(at.source(model), source, tools)
    f16 = at.f16(model)
    disk.require(f16, disk.f16_bytes(source.parameters_count), f"convert {model}")
    log = at.log("convert", model)
    with atomic.replacing(f16) as part:
        convert(
            at.source(model),
            part,
            tools=tools,
            name=upstream_name(source),
            repository=source.source.removeprefix("hf:") if _is_hub(source) else None,
            scratch=at.scratch(model) / "convert",
            log=log,
            label=f"convert {model}",
        )
        header = _read_back(part, log)
        with console.Progress(
            f"convert {model}: hash", total=header.file_size_bytes, unit="bytes"
        ) as progress:
            digests = hashing.digest(part, progress=progress.update)
    dvc_state.remember(f16, digests.md5)
    architecture = header.text("general.architecture")
    return records.ConvertRecord(
        model=model,
        revision=source.revision,
        architecture=architecture,
        llama_cpp_commit=tools.commit,
        recipe=slice_.recipe,
        tensors_count=len(header.tensors),
        tensor_types=header.type_counts(),
        context_train_tokens=_context(header, architecture),
        gguf=records.FileDigest(
            name=f16.name,
            size_bytes=digests.size_bytes,
            sha256=digests.sha256,
            md5=digests.md5,
        ),
    )


def convert(  # noqa: PLR0913 - each is one independent fact, named at the call
    source: Path,
    into: Path,
    *,
    tools: Toolchain,
    name: str,
    repository: str | None,
    scratch: Path,
    log: Path,
    label: str,
) -> None:
    """
    Run the converter on a directory of safetensors.

    Args:
        source: Directory that fetch made.
        into: The GGUF to write.
        tools: Whose converter.
        name: `general.name`; base name, size and version are derived from it as the Hub's naming
            habit has it (`Qwen2.5-0.5B-Instruct`).
        repository: `owner/repo` on the Hub, noted as the source; None for a local model.
        scratch: Directory for the converter's own small files; removed at the end.
        log: Gets all its output.
        label: Begins the progress line.

    Raises:
        UpstreamError, ToolError, MachineError: See `run`.
    """
    atomic.remove(scratch)
    scratch.mkdir(parents=True)
    # The converter derives base name and size from the directory's name, which is `source` here.
    named = scratch / name
    named.symlink_to(source.resolve(), target_is_directory=True)
    metadata = scratch / "metadata.json"
    url = f"https://huggingface.co/{repository}"
    atomic.write_json(
        metadata,
        {"general.source.repo_url": url} if repository else {"general.basename": name},
    )
    words = apart.script(
        "the converter", tools.converter, named,
        "--outfile", into, "--outtype", "f16", "--model-name", name, "--metadata", metadata,
    )  # fmt: skip
    try:
        with console.Progress(label, total=100) as progress:
            done = proc.run(
                words,
                log=log,
                env=apart.environment(scratch),
                inherit_env=False,
                on_line=lambda line: _show(line, progress),
                ok_codes=(0, 1),
            )
    finally:
        atomic.remove(scratch)
    if done.code != 0:
        raise _explained(done, log)


def _show(line: str, progress: console.Progress) -> None:
    """Pass on the percentage of the converter's own progress bar."""
    found = _PROGRESS.search(line)
    progress.update(int(found[1]) if found else 0)


def upstream_name(source: records.FetchRecord) -> str:
    """Return what the model is called upstream; a local one has the name that the fleet gives."""
    return source.source.rpartition("/")[2] if _is_hub(source) else source.model


def _is_hub(source: records.FetchRecord) -> bool:
    return source.source.startswith("hf:")


def _require_source(directory: Path, source: records.FetchRecord, tools: Toolchain) -> None:
    """
    Check that the directory has the files of the record, and that this llama.cpp converts them.

    Sizes only: fetch hashed them, and DVC runs this stage on nothing else. The architecture is
    asked again, since llama.cpp may be another one than at the time of the fetch.
    """
    found = {
        str(path.relative_to(directory)): path.stat().st_size
        for path in directory.rglob("*")
        if not path.is_dir()
    }
    wanted = {file.name: file.size_bytes for file in source.files}
    if found != wanted:
        differing = sorted({name for name, _ in found.items() ^ wanted.items()})
        raise UpstreamError(
            f"{directory} is not what was fetched; look at {', '.join(differing)}.",
            hint=f"fleet fetch {source.model}",
        )
    known = architectures.supported(tools.converter)
    architectures.require_supported(fetch.read_config(directory), known, tools.commit)


def _read_back(path: Path, log: Path) -> Header:
    """
    Read the header of what was written, and require that it is a whole 16-bit model.

    Raises:
        ToolError: It is not.
    """
    if not path.is_file():
        raise ToolError("the converter reported success and wrote nothing.", log=log)
    header = gguf_header.read(path)
    odd = sorted(header.type_counts().keys() - ALLOWED_TYPES)
    if odd or not header.tensors:
        what = f"tensors of {', '.join(odd)}" if odd else "no tensors"
        raise ToolError(f"the converter wrote {what} into a 16-bit GGUF.", log=log)
    if header.file_size_bytes != header.end_offset:
        raise ToolError(
            f"the converter wrote {header.file_size_bytes:,} bytes, its own header describes "
            f"{header.end_offset:,}.",
            log=log,
        )
    return header


def _context(header: Header, architecture: str) -> int:
    """Return the context that the model was trained for, in tokens; 0 if it states none."""
    value = header.metadata.get(f"{architecture}.context_length", 0)
    return value if isinstance(value, int) else 0


def _explained(done: proc.Completed, log: Path) -> ToolError | UpstreamError | MachineError:
    """Find in a traceback what an operator can act on."""
    text = done.stderr + done.stdout
    raised = _RAISED.findall(text)
    kind, cause = (raised[-1][0], console.clean(raised[-1][1])[:400]) if raised else ("", "")
    if kind in {"ModuleNotFoundError", "ImportError"}:
        return MachineError(
            f"the converter's Python packages are incomplete: {cause}.",
            hint="Install the extra `convert`: make setup.",
            log=log,
        )
    if kind == "MemoryError":
        return MachineError("the converter ran out of memory.", log=log)
    if kind == "OSError" and "No space left" in cause:
        return MachineError("the disk filled up while the GGUF was written.", log=log)
    if "pre-tokenizer was not recognized" in cause:
        found = _CHKHSH.search(text)
        return UpstreamError(
            "llama.cpp does not know this model's pre-tokenizer"
            f"{f' (chkhsh {found[1]})' if found else ''}: its tokens would be wrong.",
            hint="Raise toolchain.llama_cpp_python, or take the tokenizer files of the base model.",
            log=log,
        )
    if kind:
        return UpstreamError(
            f"the converter cannot read this model: {kind}: {cause}.",
            hint="The log has the whole story; a newer llama.cpp may support the model.",
            log=log,
        )
    return ToolError(f"the converter failed.\n{proc.tail(done)}".rstrip(), log=log)
