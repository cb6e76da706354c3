"""
A quant as a CNCF ModelPack: what container runtimes and model runners other than Ollama pull.

An OCI image manifest whose only weight layer is the GGUF itself, not packed into a tar: so it is
the very blob that Ollama's manifest names, stored once. Texts lie beside it as documents. Nothing
here reads a file, and nothing depends on the clock: equal facts give equal bytes.

Source: modelpack/model-spec, docs/spec.md, specs-go/v1/{config,mediatype,annotations}.go and
schema/config-schema.json, whose objects are closed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pipelines.serving.ollama_store import human_number

if TYPE_CHECKING:
    from collections.abc import Sequence

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE: Final = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE: Final = "application/vnd.cncf.model.weight.v1.raw"
DOC_TYPE: Final = "application/vnd.cncf.model.doc.v1.raw"
_FILE_PATH: Final = "org.cncf.model.filepath"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A file of the pack: its name in it, and the blob."""

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class About:
    """
    What the pack says of its model.

    Attributes:
        name: Of the quant: `<model>-<TYPE>`.
        source: `hf:owner/repo`, or `path:directory`, of which no address is given.
        revision: Of the source.
        license: The Hub's word for it.
        architecture: `general.architecture` of the GGUF.
        parameters_count: Weights.
        quantization: Type of the quant.
    """

    name: str
    source: str
    revision: str
    license: str
    architecture: str
    parameters_count: int
    quantization: str


@dataclass(frozen=True, kw_only=True)
class Pack:
    """The two small blobs of a ModelPack."""

    config: bytes
    manifest: bytes


def pack(about: About, gguf: Layer, documents: Sequence[Layer]) -> Pack:
    """
    Make config and manifest.

    Args:
        about: The model.
        gguf: The weights.
        documents: Modelfile and licence texts, in the order in which they are listed.
    """
    config = _json(_config(about, [gguf, *documents]))
    config_sha256 = hashlib.sha256(config).hexdigest()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": _descriptor(CONFIG_TYPE, config_sha256, len(config)),
        "layers": [
            _layer(WEIGHT_TYPE, gguf),
            *(_layer(DOC_TYPE, document) for document in documents),
        ],
    }
    return Pack(config=config, manifest=_json(manifest))


def _config(about: About, layers: Sequence[Layer]) -> dict[str, Any]:
    kind, _, place = about.source.partition(":")
    descriptor = {
        "name": about.name,
        "family": about.architecture,
        "revision": about.revision,
        "licenses": [about.license],
    }
    if kind == "hf":
        descriptor["sourceURL"] = f"https://huggingface.co/{place}"
    return {
        "descriptor": descriptor,
        "config": {
            "architecture": about.architecture,
            "format": "gguf",
            "paramSize": human_number(about.parameters_count).lower(),
            "quantization": about.quantization,
        },
        # A layer that is no archive is its own content.
        "modelfs": {"type": "layers", "diffIds": [f"sha256:{one.sha256}" for one in layers]},
    }


def _layer(media_type: str, layer: Layer) -> dict[str, Any]:
    found = _descriptor(media_type, layer.sha256, layer.size_bytes)
    return found | {"annotations": {_FILE_PATH: layer.name}}


def _descriptor(media_type: str, sha256: str, size_bytes: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{sha256}", "size": size_bytes}


def _json(value: Any) -> bytes:  # noqa: ANN401 - any JSON value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
