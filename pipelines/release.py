"""
Composes a release: reads what the stages left, and names every byte that readers will need.

Nothing is published here and nothing is invented later: what a store keeps is what `compose` named.
The same records and the same files give the same bytes, so the same release id. Multi-GB files are
not read: their digests are those of the records, and a store hashes what it is sent.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import re
import socket
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import gguf_header, load_test, modelpack, records, release_gates, wording
from pipelines.console import clean
from pipelines.errors import FleetError, ParamsError, StoreError
from pipelines.evidence import Readings
from pipelines.gguf_header import GgufError
from pipelines.load_records import LoadTestRecord
from pipelines.release_gates import Papers
from pipelines.release_records import (
    MachineClass,
    Release,
    ReleasedHost,
    ReleasedQuant,
    ReleaseFile,
    ReleaseLicense,
    ReleaseSource,
    ReleaseTools,
    parse_release,
    release_bytes,
    release_id,
)
from pipelines.serving import ollama_store
from pipelines.serving.modelfile import MEDIA_TYPE
from pipelines.stores.base import Blob

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.layout import Layout
    from pipelines.params import PublishSlice
    from pipelines.release_gates import Judgement
    from pipelines.release_records import Role
    from pipelines.serving.modelfile import Modelfile

GGUF_TYPE: Final = modelpack.WEIGHT_TYPE
TEXT_TYPE: Final = modelpack.DOC_TYPE
IMATRIX_TYPE: Final = "application/octet-stream"


@dataclass(frozen=True, kw_only=True)
class Composed:
    """
    A release that may be published, and its bytes.

    Attributes:
        release: It.
        data: Its canonical bytes.
        id: Their sha256.
        blobs: Every file of it, once for each sha256; GGUFs with the path of the file.
    """

    release: Release
    data: bytes
    id: str
    blobs: tuple[Blob, ...]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """No release may be made of what there is; each reason says what to do about it."""

    reasons: tuple[str, ...]


class _RefusedError(Exception):
    """Something found while composing that stands against a release."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def compose(slice_: PublishSlice, at: Layout, *, today: str | None = None) -> Composed | Refused:
    """
    Compose the release of a model from what the stages left.

    Args:
        slice_: What is declared.
        at: The checkout.
        today: The day in UTC by which waivers count; that of the clock if None.

    Returns:
        The release with all its blobs, or why there is none. Where results/M/release.json says the
        same already, it is that release, byte for byte.

    Raises:
        ParamsError: The Modelfile is wrong.
        OSError: A file cannot be read.
    """
    try:
        return _compose(slice_, at, today or datetime.now(UTC).strftime("%Y-%m-%d"))
    except _RefusedError as error:
        return Refused(reasons=(error.reason,))


def _compose(slice_: PublishSlice, at: Layout, today: str) -> Composed | Refused:
    papers, problems = _papers(slice_, at)
    if papers is None:
        return Refused(reasons=problems)
    judged = release_gates.judge(slice_, papers, today=today)
    if judged.reasons:
        return Refused(reasons=judged.reasons)
    rendered = load_test.render_modelfile(slice_, at)
    _require_modelfile(slice_, rendered, papers.tested)
    files = _files(slice_, at, papers, judged, rendered)
    release = _release(slice_, at, papers, judged, files)
    leaks = tuple(_leaks(release, files, slice_, at))
    if leaks:
        return Refused(reasons=leaks)
    release, data = _with_previous(release, at)
    return Composed(
        release=release, data=data, id=release_id(data), blobs=tuple(files.blobs.values())
    )


# --- records ----------------------------------------------------------------------------------


def _papers(slice_: PublishSlice, at: Layout) -> tuple[Papers | None, tuple[str, ...]]:
    """Read every record of the model, or say which are not there."""
    model, types = slice_.model, tuple(slice_.quants.values())

    def quant(stage: str, type_: str) -> Path:
        return at.quant_record(stage, model, type_)

    fetched = records.read_or_reason(at.model_record("fetch", model), records.FetchRecord)
    converted = records.read_or_reason(at.model_record("convert", model), records.ConvertRecord)
    calibrated = records.read_or_reason(
        at.model_record("calibrate", model), records.CalibrateRecord
    )
    quantized = {
        type_: records.read_or_reason(quant("quantize", type_), records.QuantizeRecord)
        for type_ in types
    }
    measured = {
        type_: records.read_or_reason(quant("benchmark", type_), records.BenchmarkRecord)
        for type_ in types
    }
    choice = records.read_or_reason(at.model_record("choose", model), records.ChoiceRecord)
    tested = records.read_or_reason(at.model_record("load-test", model), LoadTestRecord)
    alone = (fetched, converted, calibrated, choice, tested)
    problems = [each for each in alone if isinstance(each, str)]
    for stage, found in (("quantize", quantized), ("benchmark", measured)):
        problems += [f"{stage}/{each}" for each in found.values() if isinstance(each, str)]
    if problems or any(isinstance(each, str) for each in alone):
        return None, release_gates.missing(model, problems)
    assert isinstance(fetched, records.FetchRecord)
    assert isinstance(converted, records.ConvertRecord)
    assert isinstance(calibrated, records.CalibrateRecord)
    assert isinstance(choice, records.ChoiceRecord)
    assert isinstance(tested, LoadTestRecord)
    before = _previous(at, model)
    return Papers(
        fetched=fetched,
        converted=converted,
        calibrated=calibrated,
        quantized={k: v for k, v in quantized.items() if isinstance(v, records.QuantizeRecord)},
        measured={k: v for k, v in measured.items() if isinstance(v, records.BenchmarkRecord)},
        choice=choice,
        tested=tested,
        previous=before[0] if before else None,
    ), ()


def _previous(at: Layout, model: str) -> tuple[Release, bytes] | None:
    """Read the release that results/ holds; None if there is none yet."""
    path = at.release(model)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    undo = f"`git checkout -- {_named(path, at)}` brings back the last one."
    try:
        release = parse_release(data, release_id(data), _named(path, at))
    except StoreError as error:
        raise _RefusedError(f"{error.message} {undo}") from error
    if release_bytes(release) != data:
        raise _RefusedError(f"{_named(path, at)} was edited: a release never is. {undo}")
    if release.model != model:
        raise _RefusedError(f"{_named(path, at)} is of another model. {undo}")
    return release, data


def _with_previous(release: Release, at: Layout) -> tuple[Release, bytes]:
    """Name the release before, or return it where it says the same."""
    before = _previous(at, release.model)
    if before is None:
        return release, release_bytes(release)
    old, data = before
    if release_bytes(old.model_copy(update={"previous": None})) == release_bytes(release):
        return old, data
    release = release.model_copy(update={"previous": release_id(data)})
    return release, release_bytes(release)


def _named(path: Path, at: Layout) -> str:
    return path.relative_to(at.root).as_posix()


def _evidence(slice_: PublishSlice, at: Layout) -> dict[str, str]:
    """Return the sha256 of every record behind the release, by its path below results/MODEL."""
    model = slice_.model
    stages = ("fetch", "convert", "calibrate", "choose", "load-test")
    paths = [at.model_record(stage, model) for stage in stages]
    for type_ in slice_.quants.values():
        paths += [at.quant_record(stage, model, type_) for stage in ("quantize", "benchmark")]
    below = at.release(model).parent
    return {
        path.relative_to(below).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def _require_modelfile(slice_: PublishSlice, rendered: Modelfile, tested: LoadTestRecord) -> None:
    """Refuse another Modelfile than the one that was served under load."""
    found = (rendered.digest(), rendered.version)
    if found != (tested.modelfile_sha256, tested.modelfile_version):
        raise _RefusedError(
            f"{slice_.modelfile} makes another Modelfile than the one that was load-tested "
            f"(version {rendered.version}, tested {tested.modelfile_version}). Run `fleet repro "
            f"{slice_.model}`."
        )


# --- files ------------------------------------------------------------------------------------


@dataclass
class _Files:
    """The files of a release as they are composed; blobs once for each sha256."""

    files: list[ReleaseFile] = field(default_factory=list)
    blobs: dict[str, Blob] = field(default_factory=dict)
    # What we wrote ourselves and what may hold words of the operator's, by name.
    texts: dict[str, str] = field(default_factory=dict)

    def add(  # noqa: PLR0913 - each is one independent fact about a file
        self,
        name: str,
        role: Role,
        media_type: str,
        source: Path | bytes,
        *,
        type_: str | None = None,
        sha256: str | None = None,
        size_bytes: int | None = None,
    ) -> ReleaseFile:
        """Add a file; digest and size are those of its bytes unless a record names them."""
        if isinstance(source, bytes):
            sha256, size_bytes = hashlib.sha256(source).hexdigest(), len(source)
        assert sha256 is not None, "a path comes with the digest of its record"
        assert size_bytes is not None, "and with its size"
        file = ReleaseFile(
            name=name,
            role=role,
            type=type_,
            media_type=media_type,
            size_bytes=size_bytes,
            sha256=sha256,
        )
        blob = Blob(
            name=name, sha256=sha256, size_bytes=size_bytes, media_type=media_type, source=source
        )
        self.files.append(file)
        self.blobs.setdefault(sha256, blob)
        return file


def _files(
    slice_: PublishSlice, at: Layout, papers: Papers, judged: Judgement, rendered: Modelfile
) -> _Files:
    """Name every file, the GGUFs first."""
    found = _Files()
    keys = {type_: key for key, type_ in slice_.quants.items()}
    for type_ in judged.types:
        digest = papers.quantized[type_].gguf
        path = _require(at.gguf(slice_.model, keys[type_]), digest, slice_, at)
        found.add(
            f"{keys[type_]}.gguf", "gguf", GGUF_TYPE, path,
            type_=type_, sha256=digest.sha256, size_bytes=digest.size_bytes,
        )  # fmt: skip
    licenses = _licenses(found, slice_, at, papers)
    _imatrix(found, slice_, at, papers, judged)
    for type_ in judged.types:
        _packagings(found, slice_, at, papers, rendered, licenses, keys[type_])
    return found


def _require(path: Path, digest: records.FileDigest, slice_: PublishSlice, at: Layout) -> Path:
    """Refuse a file that is not there or of another size; its bytes are hashed as they are sent."""
    again = f"Run `fleet repro {slice_.model}`."
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        raise _RefusedError(f"{_named(path, at)} does not exist. {again}") from None
    if size_bytes != digest.size_bytes:
        raise _RefusedError(
            f"{_named(path, at)} has {size_bytes:,} bytes, its record says {digest.size_bytes:,}. "
            f"{again}"
        )
    return path


def _licenses(
    found: _Files, slice_: PublishSlice, at: Layout, papers: Papers
) -> tuple[ReleaseFile, ...]:
    wanted = release_gates.license_files(papers.fetched)
    added = []
    for digest in papers.fetched.files:
        if digest.name in wanted:
            path = _require(at.source(slice_.model) / digest.name, digest, slice_, at)
            added.append(
                found.add(
                    digest.name, "license", TEXT_TYPE, path,
                    sha256=digest.sha256, size_bytes=digest.size_bytes,
                )
            )  # fmt: skip
    return tuple(added)


def _imatrix(
    found: _Files, slice_: PublishSlice, at: Layout, papers: Papers, judged: Judgement
) -> None:
    digest = papers.calibrated.imatrix
    used = any(papers.quantized[type_].imatrix_sha256 for type_ in judged.types)
    if digest is None or not used:
        return
    path = _require(at.imatrix(slice_.model), digest, slice_, at)
    found.add(
        f"{slice_.model}.imatrix.gguf", "imatrix", IMATRIX_TYPE, path,
        sha256=digest.sha256, size_bytes=digest.size_bytes,
    )  # fmt: skip


def _packagings(  # noqa: PLR0913 - each is one independent fact about a quant
    found: _Files,
    slice_: PublishSlice,
    at: Layout,
    papers: Papers,
    rendered: Modelfile,
    licenses: tuple[ReleaseFile, ...],
    key: str,
) -> None:
    """Add what people, Ollama and the readers of ModelPacks want beside one GGUF."""
    type_ = slice_.quants[key]
    digest = papers.quantized[type_].gguf
    gguf = at.gguf(slice_.model, key)
    try:
        header = gguf_header.read(gguf)
        made = ollama_store.manifest(header, gguf_sha256=digest.sha256, modelfile=rendered)
        architecture = header.text("general.architecture")
    except (GgufError, ParamsError) as error:
        raise _RefusedError(_told(error, slice_, at)) from error
    _require_manifest(made, type_, slice_, papers.tested)
    text = rendered.text(f"./{key}.gguf")
    readable = found.add(f"{key}.Modelfile", "modelfile", TEXT_TYPE, text.encode(), type_=type_)
    found.texts[readable.name] = text
    found.add(
        f"{key}.ollama-config.json", "ollama-config", made.config.media_type, made.config.data,
        type_=type_,
    )  # fmt: skip
    counts: dict[str, int] = {}
    for layer in made.layers:
        kind = layer.media_type.removeprefix(MEDIA_TYPE)
        counts[kind] = number = counts.get(kind, 0) + 1
        name = f"{key}.ollama-{kind}" + (f"-{number}" if number > 1 else "")
        found.add(name, "ollama-layer", layer.media_type, layer.data, type_=type_)
    found.add(
        f"{key}.ollama-manifest.json", "ollama-manifest", ollama_store.MANIFEST_TYPE, made.data,
        type_=type_,
    )  # fmt: skip
    about = modelpack.About(
        name=key,
        source=papers.fetched.source,
        revision=papers.fetched.revision,
        license=slice_.license or papers.fetched.license or "other",
        architecture=architecture,
        parameters_count=papers.fetched.parameters_count,
        quantization=type_,
    )
    weights = modelpack.Layer(
        name=f"{key}.gguf", sha256=digest.sha256, size_bytes=digest.size_bytes
    )
    documents = [
        modelpack.Layer(name=each.name, sha256=each.sha256, size_bytes=each.size_bytes)
        for each in (readable, *licenses)
    ]
    pack = modelpack.pack(about, weights, documents)
    found.add(
        f"{key}.modelpack-config.json", "modelpack-config", modelpack.CONFIG_TYPE, pack.config,
        type_=type_,
    )  # fmt: skip
    found.add(
        f"{key}.modelpack-manifest.json", "modelpack-manifest", modelpack.MANIFEST_TYPE,
        pack.manifest, type_=type_,
    )  # fmt: skip


def _require_manifest(
    made: ollama_store.Manifest, type_: str, slice_: PublishSlice, tested: LoadTestRecord
) -> None:
    """Refuse what Ollama would serve otherwise than it was served under load."""
    if tested.engine is None or tested.engine.kind != "ollama":
        return
    served = release_gates.served_of(tested, type_)
    was = served.manifest_sha256 if served else None
    if was != made.sha256:
        raise _RefusedError(
            f"{type_} would be published under Ollama's manifest {made.sha256[:12]}, but the load "
            f"test served {(was or 'none')[:12]}. Run `fleet repro {slice_.model}`."
        )


def _told(error: FleetError, slice_: PublishSlice, at: Layout) -> str:
    """Make an error a reason, without the folder of the checkout in it."""
    said = clean(error.message).replace(f"{at.root.resolve()}/", "").replace(f"{at.root}/", "")
    step = wording.sentence(error.hint) if error.hint else f"Run `fleet repro {slice_.model}`."
    return f"{wording.sentence(said)} {step}"


# --- the release ------------------------------------------------------------------------------


def _release(
    slice_: PublishSlice, at: Layout, papers: Papers, judged: Judgement, files: _Files
) -> Release:
    fetched, converted, tested, choice = (
        papers.fetched, papers.converted, papers.tested, papers.choice,
    )  # fmt: skip
    winners = {one.host: one.winner for one in choice.hosts}
    stable = next((w for host in judged.released if (w := winners[host])), None)
    assert stable is not None, "a host that is promoted has a winner"
    engine = tested.engine
    assert engine is not None, "a host that is promoted was served"
    where = tested.machine
    return Release(
        model=slice_.model,
        previous=None,
        source=ReleaseSource(
            source=fetched.source,
            revision=fetched.revision,
            architecture=fetched.architecture,
            parameters_count=fetched.parameters_count,
        ),
        license=ReleaseLicense(id=judged.license, files=release_gates.license_files(fetched)),
        tools=ReleaseTools(
            llama_cpp_commit=converted.llama_cpp_commit,
            recipe=converted.recipe,
            engine=engine.kind,
            engine_version=engine.version,
            engine_llama_cpp=engine.llama_cpp,
            modelfile=slice_.modelfile,
            modelfile_version=tested.modelfile_version,
            modelfile_sha256=tested.modelfile_sha256,
        ),
        machine=MachineClass(
            hw_id=where.hw_id,
            backend=where.backend,
            cpu=where.cpu,
            cores_count=where.cores_count,
            memory_gib=where.memory_gib,
            gpus=where.gpus,
        ),
        context_tokens=slice_.context_tokens,
        objective=choice.objective,
        stable_quant=stable,
        hosts={
            one.host: ReleasedHost(
                verdict=one.verdict, winner=winners[one.host], sentence=one.sentence
            )
            for one in judged.hosts
        },
        quants=tuple(_quant(type_, slice_, papers, judged) for type_ in judged.types),
        files=tuple(files.files),
        choice_gates=choice.gates,
        gates=tuple(gate for test in tested.winners for gate in test.gates),
        waivers=judged.waivers,
        evidence=_evidence(slice_, at),
    )


def _quant(type_: str, slice_: PublishSlice, papers: Papers, judged: Judgement) -> ReleasedQuant:
    built, measured = papers.quantized[type_], papers.measured[type_]
    key = next(key for key, each in slice_.quants.items() if each == type_)
    read = Readings(key, type_, built, measured)
    said = next(
        each.sentence
        for host in papers.choice.hosts
        for each in host.candidates
        if host.host in judged.released
        and each.type == type_
        and each.verdict in {"CHOSEN", "PASS"}
    )
    prefill = read.prefill_tok_s
    return ReleasedQuant(
        key=key,
        type=type_,
        gguf_sha256=built.gguf.sha256,
        f16_sha256=built.f16_sha256,
        imatrix_sha256=built.imatrix_sha256,
        imatrix_corpus_sha256=built.imatrix_corpus_sha256,
        bits_per_weight=built.bits_per_weight,
        tensor_types=built.tensor_types,
        quality=measured.quality,
        memory_mib=read.memory_mib.value,
        memory_context_tokens=measured.memory.context_tokens,
        prefill_tok_s=prefill.value if prefill else None,
        decode_tok_s=read.decode_tok_s.value,
        decode_depth_tokens=read.deepest_decode.depth_tokens,
        sentence=said,
    )


# --- what must not get out --------------------------------------------------------------------

_SECRETS: Final = re.compile(
    r"\b(?:hf_|ghp_|gho_|ghu_|ghs_|ghr_|github_pat_|glpat-|xox[abprs]-|sk-|dop_v1_)[A-Za-z0-9_-]{8,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|\b(?:[Bb]earer|[Bb]asic)\s+[A-Za-z0-9._~+/=-]{12,}"
    r"|://[^\s/@]+@"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# A path of somebody's machine: from one of the folders that machines have, or two parts deep. Not
# the routes of a server's API, of which verdicts speak, nor what follows a word or an address.
_PATHS: Final = re.compile(
    r"(?<![\w.:/*+~-])/(?!api/|v1/)"
    r"(?:(?:home|root|Users|tmp|var|usr|opt|etc|mnt|media|srv|work|data|private|proc|dev|run|nix|"
    r"builds|github|workspace|workspaces)\b|[\w.@~+-]+/[\w.@~+-]+)"
    r"|file:/|\b[A-Za-z]:\\|\\\\[\w.-]+\\"
    r"|(?<![\w.~/-])~/"
)


def _leaks(release: Release, files: _Files, slice_: PublishSlice, at: Layout) -> Iterator[str]:
    """Yield a reason for each string that says where, by whom or with what secret it was made."""
    # What the operator has named himself is his to tell.
    declared = {release.model, *release.hosts, *slice_.quants}
    private = _private_names(declared, at)
    for place, text in _strings(json.loads(release.model_dump_json()), ""):
        what = leak(text, private)
        if what:
            yield _leaked(f"release.json, {place.lstrip('.')}", what)
    for name, text in files.texts.items():
        # Paths may be a model's business; a system text speaks of /etc at will.
        what = leak(text, private, paths=False)
        if what:
            yield _leaked(name, what)


def _leaked(place: str, what: str) -> str:
    return (
        f"{place} holds {what}, which does not belong into a release. Take it out of where it "
        "comes from: params.yaml, the Modelfile, or the record of the stage."
    )


def leak(text: str, private: tuple[re.Pattern[str], ...], *, paths: bool = True) -> str:
    """
    Say what a text tells that others must not know; nothing if it tells nothing.

    Args:
        text: Any text of a release.
        private: Names of this machine and of its user's folders.
        paths: Whether an absolute path is one of those things.
    """
    if _SECRETS.search(text):
        return "what looks like a token, a key or a password"
    if any(pattern.search(text) for pattern in private):
        return "a name or a folder of this machine"
    if paths and _PATHS.search(text):
        return "an absolute path"
    return ""


def _private_names(declared: set[str], at: Layout) -> tuple[re.Pattern[str], ...]:
    """Compile what names this machine: its host name, the home and the folders that we work in."""
    folders = {str(at.root.resolve()), tempfile.gettempdir()}
    with contextlib.suppress(RuntimeError):
        folders.add(str(Path.home()))
    found = [
        re.compile(rf"{re.escape(folder)}(?![\w.-])")
        for folder in sorted(folders)
        if len(Path(folder).parts) > 1
    ]
    names = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    found += [host_pattern(name) for name in sorted(names - declared - {"", "localhost"})]
    with contextlib.suppress(OSError, KeyError):
        user = getpass.getuser()
        found.append(re.compile(rf"/{re.escape(user)}/|\b{re.escape(user)}@"))
    return tuple(found)


def host_pattern(name: str) -> re.Pattern[str]:
    """
    Compile how a host name shows itself in a text.

    One of letters alone may be a word of any sentence ("the server took 68 MiB"): it counts only
    where an address would be, after `@` or `//`, before a port or a domain.
    """
    word = re.escape(name)
    if name.isalpha():
        return re.compile(
            rf"(?:@|//){word}\b|(?<![\w.-]){word}(?::[0-9]{{2,5}}\b|\.(?:local|lan)\b)"
        )
    return re.compile(rf"(?<![\w.-]){word}(?![\w-])", re.IGNORECASE)


def _strings(value: Any, place: str) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - any JSON value
    """Yield every string of a JSON value with its place; keys are strings, too."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield f"{place}.{key} (a key)", key
            yield from _strings(each, f"{place}.{key}")
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from _strings(each, f"{place}.{i}")
