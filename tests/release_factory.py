"""
Releases with real bytes, small and made from a seed: what publishing and stores are tested with.

Everything that a release of a real model names is in them: GGUFs as files, and the Modelfile, the
licence, Ollama's config, layers and manifests, and ModelPack's, as bytes, one set for each quant.
The manifests are real JSON that names the other blobs, so that a store may read them.
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING, Any, Final

from pipelines import publishing
from pipelines.ledger import Ledger
from pipelines.load_records import LoadGate
from pipelines.records import QualityResult
from pipelines.release import Composed
from pipelines.release_records import (
    MachineClass,
    Release,
    ReleasedHost,
    ReleasedQuant,
    ReleaseFile,
    ReleaseLicense,
    ReleaseSource,
    ReleaseTools,
    ReleaseWaiver,
    Role,
    release_bytes,
    release_id,
)
from pipelines.stores.base import Blob

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MODEL: Final = "tiny-llama"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
MODELPACK_CONFIG: Final = "application/vnd.cncf.model.config.v1+json"
MODELPACK_WEIGHT: Final = "application/vnd.cncf.model.weight.v1.raw"
_OLLAMA: Final = "application/vnd.ollama.image."


def sha256(data: bytes) -> str:
    """Return the sha256 of bytes in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def by(why: str = "the tests want it", **changes: Any) -> publishing.By:
    """Build somebody who moves aliases, always at the same time."""
    fields = {"who": "Ada", "why": why, "run": None, "at": "2027-01-31T12:00:00Z"}
    return publishing.By(**(fields | changes))


def ledger(directory: Path, model: str = MODEL) -> Ledger:
    """Read the ledger of a checkout in `directory`, as every run does anew."""
    return Ledger.load(directory / "results" / model / "ledger.jsonl", model)


def composed(  # noqa: PLR0913 - each is one independent fact, named at the call
    directory: Path,
    seed: int = 1,
    *,
    model: str = MODEL,
    types: Sequence[str] = ("Q8_0", "Q4_K_M"),
    size_bytes: int = 40_000,
    previous: str | None = None,
    waivers: tuple[ReleaseWaiver, ...] = (),
) -> Composed:
    """
    Make a release and the files of it; the same arguments make the same release.

    Args:
        directory: The GGUFs go to `directory/<model>-<TYPE>-<seed>.gguf`.
        seed: Other seeds have other GGUFs; Modelfile, licence and small layers stay the same.
        model: Key of the model.
        types: Its quants; the first one is `stable_quant`.
        size_bytes: Of each GGUF.
        previous: Id of the release before.
        waivers: What was let pass.
    """
    made = _Made()
    modelfile = made.add("Modelfile", "modelfile", b"FROM ./model.gguf\n", "text/plain")
    licence = made.add("LICENSE", "license", b"Apache License 2.0\n", "text/plain")
    params = made.add("params.json", "ollama-layer", b'{"num_ctx":512}', f"{_OLLAMA}params")
    quants = []
    for type_ in types:
        path = directory / f"{model}-{type_}-{seed}.gguf"
        gguf = made.add_gguf(f"{model}-{type_}.gguf", path, seed, type_, size_bytes)
        _add_ollama(made, type_, gguf, [params, licence])
        _add_modelpack(made, type_, gguf)
        quants.append(_quant(model, type_, gguf.sha256))
    release = Release(
        model=model,
        previous=previous,
        source=ReleaseSource(
            source=f"path:examples/{model}",
            revision=sha256(model.encode())[:40],
            architecture="LlamaForCausalLM",
            parameters_count=3_400_000,
        ),
        license=ReleaseLicense(id="apache-2.0", files={"LICENSE": licence.sha256}),
        tools=ReleaseTools(
            llama_cpp_commit="0c1e57098a3f0c1e57098a3f0c1e57098a3f0c1e",
            recipe=1,
            engine="ollama",
            engine_version="0.33.0",
            engine_llama_cpp="build 1, commit 0c1e570",
            modelfile="modelfiles/chat.Modelfile.j2",
            modelfile_version=1,
            modelfile_sha256=modelfile.sha256,
        ),
        machine=MachineClass(
            hw_id="a1b2c3d4e5f6", backend="cpu", cpu="a CPU", cores_count=2, memory_gib=8, gpus=()
        ),
        context_tokens=512,
        objective="speed",
        stable_quant=types[0],
        hosts={
            "local": ReleasedHost(
                verdict="PROMOTE", winner=types[0], sentence="It kept every limit."
            )
        },
        quants=tuple(quants),
        files=tuple(made.files),
        choice_gates={"max_kld_mean_nats": 0.06},
        gates=(
            LoadGate(
                host="local",
                name="ttft",
                value=0.99,
                low=0.97,
                high=1.0,
                limit=0.95,
                outcome="PASS",
                more_requests=None,
                sentence="99 % of requests had their first token within 1,000 ms.",
            ),
        ),
        waivers=waivers,
        evidence={"choice": sha256(b"choice")},
    )
    data = release_bytes(release)
    return Composed(release=release, data=data, id=release_id(data), blobs=tuple(made.blobs))


class _Made:
    """Files of a release and where their bytes lie; each sha256 is a blob once."""

    def __init__(self) -> None:
        self.files: list[ReleaseFile] = []
        self.blobs: list[Blob] = []

    def add(
        self, name: str, role: Role, data: bytes, media_type: str, type_: str | None = None
    ) -> ReleaseFile:
        return self._add(name, role, type_, media_type, sha256(data), len(data), data)

    def add_gguf(
        self, name: str, path: Path, seed: int, type_: str, size_bytes: int
    ) -> ReleaseFile:
        data = gguf_bytes(seed, type_, size_bytes)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        media_type = f"{_OLLAMA}model"
        return self._add(name, "gguf", type_, media_type, sha256(data), len(data), path)

    def _add(  # noqa: PLR0913, PLR0917 - the fields of a file
        self,
        name: str,
        role: Role,
        type_: str | None,
        media_type: str,
        digest: str,
        size_bytes: int,
        source: Path | bytes,
    ) -> ReleaseFile:
        file = ReleaseFile(
            name=name,
            role=role,
            type=type_,
            media_type=media_type,
            size_bytes=size_bytes,
            sha256=digest,
        )
        self.files.append(file)
        if digest not in {blob.sha256 for blob in self.blobs}:
            self.blobs.append(
                Blob(
                    name=name,
                    sha256=digest,
                    size_bytes=size_bytes,
                    media_type=media_type,
                    source=source,
                )
            )
        return file


def gguf_bytes(seed: int, type_: str, size_bytes: int) -> bytes:
    """Return what stands for the weights of one quant: the magic and noise."""
    noise = random.Random(f"{seed} {type_}").randbytes(size_bytes - 8)
    return b"GGUF\3\0\0\0" + noise


def _descriptor(file: ReleaseFile, media_type: str | None = None) -> dict[str, Any]:
    return {
        "mediaType": media_type or file.media_type,
        "digest": f"sha256:{file.sha256}",
        "size": file.size_bytes,
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _add_ollama(made: _Made, type_: str, gguf: ReleaseFile, small: list[ReleaseFile]) -> None:
    """Add the config and the docker-v2 manifest that `ollama pull` asks for."""
    config = made.add(
        f"{type_}.ollama-config.json",
        "ollama-config",
        _json({"model_format": "gguf", "model_family": "llama", "file_type": type_}),
        DOCKER_CONFIG,
        type_,
    )
    layers = [_descriptor(gguf), *(_descriptor(file) for file in small)]
    manifest = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": _descriptor(config),
        "layers": layers,
    }
    made.add(
        f"{type_}.ollama-manifest.json",
        "ollama-manifest",
        _json(manifest),
        DOCKER_MANIFEST,
        type_,
    )


def _add_modelpack(made: _Made, type_: str, gguf: ReleaseFile) -> None:
    """Add the config and the OCI manifest of a ModelPack."""
    config = made.add(
        f"{type_}.modelpack-config.json",
        "modelpack-config",
        _json({"descriptor": {"name": type_}, "config": {"format": "gguf"}}),
        MODELPACK_CONFIG,
        type_,
    )
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": _descriptor(config),
        "layers": [_descriptor(gguf, MODELPACK_WEIGHT)],
    }
    made.add(
        f"{type_}.modelpack-manifest.json",
        "modelpack-manifest",
        _json(manifest),
        OCI_MANIFEST,
        type_,
    )


def _quant(model: str, type_: str, gguf_sha256: str) -> ReleasedQuant:
    return ReleasedQuant(
        key=f"{model}-{type_}",
        type=type_,
        gguf_sha256=gguf_sha256,
        f16_sha256=sha256(b"f16"),
        imatrix_sha256=None,
        imatrix_corpus_sha256=None,
        bits_per_weight=8.5,
        tensor_types={"Q8_0": 30, "F32": 9},
        quality=QualityResult(
            corpus_sha256=sha256(b"corpus"),
            context_tokens=512,
            chunks_count=100,
            scored_tokens=25_600,
            kld_mean_nats=0.01,
            kld_mean_error_nats=0.001,
            kld_p999_nats=0.2,
            kld_max_nats=0.5,
            same_top=0.97,
            same_top_error=0.001,
            ppl=11.2,
            ppl_f16=11.1,
            ppl_ratio=1.009,
            ppl_ratio_error=0.001,
        ),
        memory_mib=40.0,
        memory_context_tokens=512,
        prefill_tok_s=900.0,
        decode_tok_s=200.0,
        decode_depth_tokens=0,
        sentence="It kept every limit.",
    )
