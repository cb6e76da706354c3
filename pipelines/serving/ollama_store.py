"""
A model as Ollama keeps it: a docker-v2 manifest, and its blobs by their sha256.

    blobs/sha256-<hex>                                  the GGUF (a hard link), config, small layers
    manifests/<host>/<namespace>/<model>/<tag>          the manifest, written last

`manifest` is pure: it makes every byte but the GGUF's, the same each time, for a private server
here and for a registry. `place` lays them where an Ollama looks for them. It never asks `ollama
create`, which rewrites the GGUF and adds a template and stops of its own.

Ollama checks the sha256 of no blob, neither when it loads one nor, if it is there already, when it
pulls (run with 0.33: other weights under the same name are served with status 200). So the bytes
are hashed here, under the name under which Ollama will read them.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from pipelines import architectures, atomic, console, disk, fetch, gguf_header, hashing
from pipelines.errors import DigestError, ParamsError
from pipelines.serving.modelfile import MEDIA_TYPE, Layer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from pipelines.gguf_header import Header
    from pipelines.serving.modelfile import Modelfile, Value

MANIFEST_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE: Final = "application/vnd.docker.container.image.v1+json"
MODEL_TYPE: Final = f"{MEDIA_TYPE}model"
# More layers than any model has: llama-server then offloads all or fails, and its own fitting of
# layers into memory is off (llm/llama_server.go: num_gpu > 0 becomes -ngl).
_ALL_LAYERS: Final = 999

# What Ollama takes for the parts of a name (types/model/name.go); lower case, since registries
# want it and Ollama takes no notice of it.
_HOST: Final = re.compile(r"[a-z0-9_][a-z0-9_.:-]{0,349}")
_NAMESPACE: Final = re.compile(r"[a-z0-9_][a-z0-9_-]{0,79}")
_PART: Final = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,79}")

# general.file_type -> name, as Ollama and llama.cpp spell it (gguf-py, LlamaFileType).
_FILE_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M",
    30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
    39: "NVFP4", 40: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelName:
    """
    The name of a model: host/namespace/model:tag, in lower case.

    A host of nobody's keeps a private model from ever being looked for in a registry.
    """

    model: str
    tag: str
    namespace: str = "fleet"
    host: str = "localhost"

    def __post_init__(self) -> None:
        """Refuse what Ollama would not take, or would read as a path."""
        for what, part, pattern in (
            ("host", self.host, _HOST),
            ("namespace", self.namespace, _NAMESPACE),
            ("model", self.model, _PART),
            ("tag", self.tag, _PART),
        ):
            if not pattern.fullmatch(part):
                raise ParamsError(f"{part!r} cannot be the {what} of a model's name in Ollama.")

    def __str__(self) -> str:
        """The name as the API wants it and gives it back."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def path(self) -> str:
        """The manifest's place below manifests/."""
        return f"{self.host}/{self.namespace}/{self.model}/{self.tag}"


def name_of(model: str, type_: str) -> ModelName:
    """The name of one quant of one model of the fleet."""
    return ModelName(model=model, tag=type_.lower())


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """
    A manifest and every blob that it names but the GGUF.

    Attributes:
        data: The manifest's own bytes.
        config: The config blob.
        layers: The small blobs, in the manifest's order.
        gguf_sha256: Name of the model layer.
        size_bytes: Of all blobs together, as /api/tags gives it.
    """

    data: bytes
    config: Layer
    layers: tuple[Layer, ...]
    gguf_sha256: str
    size_bytes: int

    @property
    def sha256(self) -> str:
        """The digest by which /api/tags and a registry name the manifest, in lower-case hex."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blobs(self) -> tuple[Layer, ...]:
        """Config and small layers: what a registry needs beside the GGUF."""
        return (self.config, *self.layers)


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A model that an Ollama with that folder serves: its name, its manifest's digest, its size."""

    name: str
    manifest_sha256: str
    size_bytes: int


def runner_options(*, gpu_layers: str | int, threads: int | None) -> dict[str, Value]:
    """
    The options that come from params.yaml instead of the template.

    Args:
        gpu_layers: "all", "auto" (the engine decides) or a number; 0 keeps all on the CPU.
        threads: CPU threads; None lets the engine decide.

    Source: llm/llama_server.go of 0.33: num_gpu -1 or absent passes no -ngl, anything else does.
    """
    options: dict[str, Value] = {}
    if gpu_layers != "auto":
        options["num_gpu"] = _ALL_LAYERS if gpu_layers == "all" else int(gpu_layers)
    if threads is not None:
        options["num_thread"] = threads
    return options


def manifest(header: Header, *, gguf_sha256: str, modelfile: Modelfile) -> Manifest:
    """
    Make the manifest of a GGUF and a Modelfile.

    Args:
        header: Of the GGUF; its size and metadata fill the model layer and the config.
        gguf_sha256: Digest of the whole file, 64 hex digits.
        modelfile: All else that is served; with the options of the runner.

    Raises:
        ParamsError: Neither the GGUF nor the Modelfile has a chat template; or the Modelfile of an
            encoder speaks of conversations.
        GgufError: The GGUF does not name its architecture.
    """
    if architectures.is_encoder(header):
        _require_no_chat(header, modelfile)
    else:
        _require_chat_template(header, modelfile)
    config = Layer(media_type=CONFIG_TYPE, data=_json(_config(header)))
    layers = modelfile.layers()
    model = _descriptor(MODEL_TYPE, gguf_sha256, header.file_size_bytes)
    value = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _described(config),
        "layers": [model, *(_described(layer) for layer in layers)],
    }
    return Manifest(
        data=_json(value),
        config=config,
        layers=layers,
        gguf_sha256=gguf_sha256,
        size_bytes=header.file_size_bytes + sum(len(each.data) for each in (config, *layers)),
    )


def place(  # noqa: PLR0913 - each is one independent fact, named at the call
    models_dir: Path,
    gguf: Path,
    gguf_sha256: str,
    modelfile: Modelfile,
    *,
    name: ModelName,
    options: Mapping[str, Value],
) -> Placed:
    """
    Lay a model where the Ollama of `models_dir` finds it, whether it runs already or not.

    Args:
        models_dir: Its OLLAMA_MODELS.
        gguf: The file; linked, or copied onto another file system.
        gguf_sha256: The digest that the file must have: that of the record.
        modelfile: What `modelfile.render` made.
        name: Under which it is served.
        options: Further options, see `runner_options`.

    Returns:
        The name as the API wants it, the digest that /api/tags must give back, the size.

    Raises:
        DigestError: The file is not the one that was measured. Nothing was placed.
        GgufError: It is no whole GGUF.
        ParamsError: It has no chat template, or the Modelfile states one of `options`.
        MachineError: It cannot be read, or there is no room.
    """
    with disk.explained(models_dir):
        _place_gguf(gguf, gguf_sha256, blob_path(models_dir, gguf_sha256))
        # Read from the blob, whose bytes are proven; called what people call it.
        header = replace(gguf_header.read(blob_path(models_dir, gguf_sha256)), path=gguf)
        made = manifest(
            header, gguf_sha256=gguf_sha256, modelfile=modelfile.with_parameters(options)
        )
        for each in made.blobs:
            atomic.write_bytes(blob_path(models_dir, each.sha256), each.data)
        place_manifest(models_dir, name, made.data)
    return Placed(name=str(name), manifest_sha256=made.sha256, size_bytes=made.size_bytes)


def place_manifest(models_dir: Path, name: ModelName, data: bytes) -> None:
    """Make a name mean a manifest, in one move; its blobs have to be there."""
    target = manifest_path(models_dir, name)
    # Written elsewhere first: Ollama takes every file below manifests/ for a model.
    staged = models_dir / f"{name.namespace}-{name.model}-{name.tag}.manifest"
    atomic.write_bytes(staged, data)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged.replace(target)
    atomic.sync(target.parent)


def manifest_path(models_dir: Path, name: ModelName) -> Path:
    """Where an Ollama looks for what a name means."""
    return models_dir / "manifests" / name.path


def blob_path(models_dir: Path, sha256: str) -> Path:
    """Where an Ollama looks for a blob."""
    return models_dir / "blobs" / f"sha256-{sha256}"


def _place_gguf(gguf: Path, expected: str, blob: Path) -> None:
    """
    Link or copy a file to its blob, and hash what lies there before it gets that name.

    Hashed is the very inode that Ollama will read: a name could get another file in between.
    """
    with atomic.replacing(blob) as part:
        # DVC may have made a symbolic link of the file; its target is what counts.
        source = gguf.resolve()
        with console.Progress(
            f"Hashing {gguf.name}", total=source.stat().st_size / 2**20 or None, unit="MiB"
        ) as progress:

            def show(size_bytes: int) -> None:
                progress.update(size_bytes / 2**20)

            try:
                part.hardlink_to(source)
            except OSError:  # another file system, or one without hard links
                with source.open("rb", buffering=0) as file:
                    got = fetch.copy_file(file, part, show).sha256
            else:
                got = _sha256(part, show)
        if got != expected:
            raise DigestError(
                f"{gguf} is not the file that was measured: its record says sha256 {expected}, the "
                f"file has {got}. Nothing of it is served.",
                hint="Run `fleet repro`: it makes a file again that is not what its record says.",
            )
    # rename(2) does nothing, and keeps both names, where they are links to one file already.
    atomic.remove(part)


def _sha256(path: Path, progress: Callable[[int], None]) -> str:
    """The one digest that counts here; DVC's second one would take longer than this."""
    found = hashlib.sha256()
    size_bytes = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(hashing.CHUNK_BYTES):
            found.update(chunk)
            size_bytes += len(chunk)
            progress(size_bytes)
    return found.hexdigest()


def _require_chat_template(header: Header, modelfile: Modelfile) -> None:
    """Ollama would silently wrap every conversation in ChatML (server/routes.go of 0.33)."""
    own = header.metadata.get("tokenizer.chat_template")
    if not own and modelfile.template is None:
        raise ParamsError(
            f"{header.path.name} has no chat template, and the Modelfile declares no TEMPLATE: "
            "Ollama would render every conversation as ChatML, whatever the model was trained on.",
            hint="Give the source a chat_template, or declare TEMPLATE in a template of its own.",
        )


def _require_no_chat(header: Header, modelfile: Modelfile) -> None:
    """Ollama puts neither a template nor a system text around what is embedded."""
    stated = [
        name
        for name, value in (
            ("TEMPLATE", modelfile.template),
            ("SYSTEM", modelfile.system),
            ("MESSAGE", modelfile.messages),
        )
        if value
    ]
    if stated:
        raise ParamsError(
            f"{header.path.name} is an encoder, and the Modelfile states {', '.join(stated)}: an "
            "encoder holds no conversations, and Ollama would take no notice of it.",
            hint="Remove it, or give the model a Modelfile of its own (`modelfile`, params.yaml).",
        )


def _config(header: Header) -> dict[str, Any]:
    """The config of types/model/config.go: what /api/tags shows as details."""
    family = header.text("general.architecture")
    weights = sum(tensor.n_elements for tensor in header.tensors)
    file_type = header.metadata.get("general.file_type")
    return {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family],
        "model_type": human_number(weights),
        "file_type": _FILE_TYPES.get(file_type, "unknown")
        if isinstance(file_type, int)
        else "unknown",
        "architecture": "amd64",
        "os": "linux",
    }


def human_number(count: int) -> str:
    """A number of weights as Ollama writes it: 596.05M, 8.0B (format/format.go, HumanNumber)."""
    for size, letter, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= size:
            return f"{count / size:.{0 if count % size == 0 else digits}f}{letter}"
    return str(count)


def _described(layer: Layer) -> dict[str, Any]:
    return _descriptor(layer.media_type, layer.sha256, len(layer.data))


def _descriptor(media_type: str, sha256: str, size_bytes: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{sha256}", "size": size_bytes}


def _json(value: Any) -> bytes:  # noqa: ANN401 - any JSON value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
