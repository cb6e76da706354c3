"""
A checkout in which every stage before `publish` has run, with GGUFs that Ollama would load.

Small files, real headers, and records that agree with them and with one another: the choice is made
by `choose`, and the load test names the manifests that Ollama would have given back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from gguf_factory import tiny_llama_gguf
from record_factory import (
    LEVELS,
    MODEL,
    benchmark_record,
    calibrate_record,
    choose_slice,
    convert_record,
    evaluate_record,
    fetch_record,
    judge_fields,
    load_test_record,
    quantize_record,
    served,
    sha256,
    smoke,
    verify_record,
    winner_test,
)

from pipelines import choose, gguf_header, hashing, load_test, params, records
from pipelines.layout import Layout
from pipelines.load_records import LoadTestRecord
from pipelines.params import PublishSlice
from pipelines.records import FileDigest
from pipelines.serving import ollama_store

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from pipelines.load_records import Served

R = TypeVar("R", bound=records.Record)

TYPES = ("Q8_0", "Q4_K_M")
HOSTS = {"local": {"memory_mib": 2048}}
SPEEDS = {"Q8_0": 400.0, "Q4_K_M": 600.0}
LICENSE = "Apache License\n\nDo what you like.\n"
TODAY = "2027-01-31"
MODELFILE = """\
# version: 3
PARAMETER temperature 0.8
SYSTEM You answer briefly.
{% if license %}LICENSE {{ license }}{% endif %}
"""


def publish_slice(types: Iterable[str] = TYPES, model: str = MODEL, **changes: Any) -> PublishSlice:
    """Build what `publish` reads, with the local registry below the checkout."""
    changes.setdefault("hosts", HOSTS)
    fields = {"threads": None, "registry": params.Registry(url=params.LOCAL_URL)}
    own = {name: changes.pop(name) for name in fields if name in changes}
    return PublishSlice(**(judge_fields(types, model, **changes) | fields | own))


def waiver(gate: str, until: str = TODAY, **changes: str) -> params.Waiver:
    """Build somebody's decision to let a refusal pass."""
    fields = {"gate": gate, "who": "Ada Lovelace", "why": "read by our lawyer", "until": until}
    return params.Waiver.model_validate(fields | changes)


def finished(  # noqa: PLR0913 - each is one independent fact, named at the call
    root: Path,
    *,
    model: str = MODEL,
    speeds: Mapping[str, float] | None = None,
    hosts: dict[str, dict[str, int]] | None = None,
    template: str | None = "{{ messages[0]['content'] }}",
    modelfile: str = MODELFILE,
) -> Layout:
    """Write a checkout below `root` that is ready to be published; Q4_K_M has a matrix."""
    at = Layout(root)
    speeds = SPEEDS if speeds is None else speeds
    _write(at.root / "modelfiles/chat.Modelfile.j2", modelfile)
    _write(at.source(model) / "LICENSE", LICENSE)
    matrix = _write(at.imatrix(model), "a matrix")
    records.write(
        at.model_record("fetch", model),
        fetch_record(model, files=(digest_of(at.source(model) / "LICENSE"),)),
    )
    records.write(at.model_record("convert", model), convert_record(model))
    records.write(
        at.model_record("calibrate", model), calibrate_record(model, imatrix=digest_of(matrix))
    )
    records.write(at.model_record("verify", model), verify_record(model))
    records.write(at.model_record("evaluate", model), evaluate_record(model))
    for seed, type_ in enumerate(speeds):
        path = tiny_llama_gguf(
            at.gguf(model, f"{model}-{type_}"),
            seed=seed, n_layer=1, n_embd=64, n_ff=64, vocab=300, n_head=2, n_head_kv=1,
            chat_template=template,
        )  # fmt: skip
        _write_quant(at, model, type_, path, speeds[type_])
    choose_and_serve(at, model, tuple(speeds), hosts)
    return at


def served_again(at: Layout, model: str = MODEL) -> None:
    """Write the choice and the load test anew, as after a change of the Modelfile."""
    choose_and_serve(at, model, tuple(SPEEDS))


def _write_quant(at: Layout, model: str, type_: str, path: Path, decode_tok_s: float) -> None:
    digest = digest_of(path)
    matrix = digest_of(at.imatrix(model)) if type_ == "Q4_K_M" else None
    built = quantize_record(
        type_,
        model,
        gguf=digest,
        imatrix_sha256=matrix.sha256 if matrix else None,
        imatrix_corpus_sha256=sha256("calibration") if matrix else None,
    )
    measured = benchmark_record(
        type_,
        model,
        decode_tok_s=decode_tok_s,
        gguf_sha256=digest.sha256,
        size_bytes=digest.size_bytes,
    )
    records.write(at.quant_record("quantize", model, type_), built)
    records.write(at.quant_record("benchmark", model, type_), measured)


def choose_and_serve(
    at: Layout,
    model: str,
    types: tuple[str, ...],
    hosts: dict[str, dict[str, int]] | None = None,
) -> None:
    """Write the choice among what was measured, and the load test of it."""
    hosts = hosts or HOSTS
    chosen = choose.run(choose_slice(types, model, hosts=hosts), at)
    records.write(at.model_record("choose", model), chosen)
    slice_ = publish_slice(types, model)
    rendered = load_test.render_modelfile(slice_, at)
    winners = {host.host: host.winner for host in chosen.hosts if host.winner is not None}
    by_type: dict[str, list[str]] = {}
    for host, type_ in winners.items():
        by_type.setdefault(type_, []).append(host)
    record = load_test_record(
        winners,
        model,
        slos=dict.fromkeys(hosts, LEVELS),
        modelfile=slice_.modelfile,
        modelfile_sha256=rendered.digest(),
        modelfile_version=rendered.version,
        winners=tuple(
            winner_test(type_, names, model, served=as_served(at, model, type_, slice_))
            for type_, names in by_type.items()
        ),
        smokes=tuple(
            smoke(type_, served=as_served(at, model, type_, slice_))
            for type_ in types
            if type_ not in by_type
        ),
    )
    records.write(at.model_record("load-test", model), record)


def as_served(at: Layout, model: str, type_: str, slice_: PublishSlice) -> Served:
    """Build what Ollama would have told of a GGUF of the checkout."""
    path = at.gguf(model, f"{model}-{type_}")
    digest = hashing.digest(path).sha256
    header = gguf_header.read(path)
    if header.metadata.get("tokenizer.chat_template") is None:
        made = None  # Ollama would not be given such a file
    else:
        rendered = load_test.render_modelfile(slice_, at)
        made = ollama_store.manifest(header, gguf_sha256=digest, modelfile=rendered).sha256
    return served(type_, model, gguf_sha256=digest, manifest_sha256=made, gpu_layers="0")


def digest_of(path: Path) -> FileDigest:
    """Return the digest of a file as its record has it."""
    found = hashing.digest(path)
    return FileDigest(
        name=path.name, size_bytes=found.size_bytes, sha256=found.sha256, md5=found.md5
    )


def change(path: Path, kind: type[R], **changes: Any) -> R:
    """Change fields of a record on the disk, as somebody might, and return it."""
    record = records.read(path, kind)
    altered = kind.model_validate(record.model_dump() | changes)
    records.write(path, altered)
    return altered


def change_load_test(at: Layout, model: str = MODEL, **changes: Any) -> LoadTestRecord:
    """Change fields of the load test."""
    return change(at.model_record("load-test", model), LoadTestRecord, **changes)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
