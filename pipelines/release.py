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
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import (
    gguf_header,
    hashing,
    load_test,
    modelpack,
    release_gates,
    verdict_evidence,
    wording,
)
from pipelines.console import clean
from pipelines.errors import ParamsError
from pipelines.evidence import Readings
from pipelines.gguf_header import GgufError
from pipelines.release_records import (
    MachineClass,
    Release,
    ReleasedHost,
    ReleasedQuant,
    ReleaseFile,
    ReleaseLicense,
    ReleaseSource,
    ReleaseTools,
    release_bytes,
    release_id,
    short,
)
from pipelines.serving import ollama_store
from pipelines.serving.modelfile import MEDIA_TYPE
from pipelines.stores.base import Blob

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipelines.errors import FleetError
    from pipelines.layout import Layout
    from pipelines.params import PublishSlice
    from pipelines.records import FileDigest
    from pipelines.release_gates import Judgement, Papers
    from pipelines.release_records import Role
    from pipelines.serving.modelfile import Layer, Modelfile

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


def compose(
    slice_: PublishSlice,
    at: Layout,
    *,
    today: str | None = None,
    elsewhere: Mapping[str, Path] | None = None,
) -> Composed | Refused:
    """
    Compose the release of a model from what the stages left.

    Args:
        slice_: What is declared.
        at: The checkout.
        today: The day in UTC by which waivers count; that of the clock if None.
        elsewhere: Files that need not be here, since the registry has them, by their sha256; of a
            GGUF the path of a file with its header.

    Returns:
        The release with all its blobs, or why there is none. Where results/M/release.json says the
        same already, it is that release, byte for byte.

    Raises:
        ParamsError: The Modelfile is wrong.
        OSError: A file cannot be read.
    """
    try:
        return _compose(slice_, at, today, elsewhere or {})
    except _RefusedError as error:
        return Refused(reasons=(error.reason,))


def _compose(
    slice_: PublishSlice, at: Layout, today: str | None, elsewhere: Mapping[str, Path]
) -> Composed | Refused:
    evidence = verdict_evidence.collect(slice_, at, day=today)
    judged = release_gates.judge(evidence)
    papers = release_gates.papers_of(evidence)
    if judged.reasons or papers is None:
        return Refused(reasons=judged.reasons)
    composer = _Composer(slice_=slice_, at=at, papers=papers, judged=judged, elsewhere=elsewhere)
    composer.add_files()
    release = composer.release()
    leaks = tuple(_leaks(release, composer.texts, slice_, at))
    if leaks:
        return Refused(reasons=leaks)
    release, data = _with_previous(release, papers.previous)
    return Composed(
        release=release, data=data, id=release_id(data), blobs=tuple(composer.blobs.values())
    )


def _with_previous(release: Release, old: Release | None) -> tuple[Release, bytes]:
    """Name the release before, or return it where it says the same."""
    if old is None:
        return release, release_bytes(release)
    data = release_bytes(old)
    if release_bytes(old.model_copy(update={"previous": None})) == release_bytes(release):
        return old, data
    release = release.model_copy(update={"previous": release_id(data)})
    return release, release_bytes(release)


def _named(path: Path, at: Layout) -> str:
    return path.relative_to(at.root).as_posix()


# --- files and facts --------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Composer:
    """
    Puts a release together from papers that nothing stands against.

    Attributes:
        slice_: What is declared.
        at: The checkout.
        papers: All records.
        judged: What follows from them.
        elsewhere: Files that only the registry has, by sha256, and where their header is.
        files: Every file, in the order of the release.
        blobs: The same by sha256, each once.
        texts: Of those files that hold words of the operator's, by name.
    """

    slice_: PublishSlice
    at: Layout
    papers: Papers
    judged: Judgement
    elsewhere: Mapping[str, Path]
    files: list[ReleaseFile] = field(default_factory=list)
    blobs: dict[str, Blob] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def add_files(self) -> None:
        """Name every file: GGUFs, licences, matrix, then what lies beside each GGUF."""
        model = self.slice_.model
        keys = {
            key: type_ for key, type_ in self.slice_.quants.items() if type_ in self.judged.types
        }
        for key, type_ in keys.items():
            digest = self.papers.quantized[type_].gguf
            self._link(f"{key}.gguf", "gguf", self.at.gguf(model, key), digest, type_=type_)
        licenses = [
            self._link(digest.name, "license", self.at.source(model) / digest.name, digest)
            for digest in self.papers.fetched.files
            if digest.name in release_gates.license_files(self.papers.fetched)
        ]
        matrix = self.papers.calibrated.imatrix
        if any(self.papers.quantized[type_].imatrix_sha256 for type_ in keys.values()):
            assert matrix is not None, "the gates compared it with those of the quants"
            self._link(f"{model}.imatrix.gguf", "imatrix", self.at.imatrix(model), matrix)
        rendered = self._modelfile()
        for key in keys:
            self._packagings(key, rendered, licenses)

    def _modelfile(self) -> Modelfile:
        """Render the Modelfile; refuse another one than the one that was served under load."""
        tested = self.papers.tested
        rendered = load_test.render_modelfile(self.slice_, self.at)
        found = (rendered.digest(), rendered.version)
        if found != (tested.modelfile_sha256, tested.modelfile_version):
            raise _RefusedError(
                f"{self.slice_.modelfile} makes another Modelfile than the one that was "
                f"load-tested (version {rendered.version}, tested {tested.modelfile_version}). "
                f"{self._again}"
            )
        return rendered

    def _packagings(self, key: str, rendered: Modelfile, licenses: list[ReleaseFile]) -> None:
        """Add what people, Ollama and the readers of ModelPacks want beside one GGUF."""
        type_ = self.slice_.quants[key]
        digest = self.papers.quantized[type_].gguf
        try:
            path = self.elsewhere.get(digest.sha256, self.at.gguf(self.slice_.model, key))
            header = gguf_header.read(path)
            made = ollama_store.manifest(header, gguf_sha256=digest.sha256, modelfile=rendered)
            architecture = header.text("general.architecture")
        except (GgufError, ParamsError) as error:
            raise _RefusedError(self._told(error)) from error
        self._require_served(made, type_)
        text = rendered.text(f"./{key}.gguf")
        self.texts[f"{key}.Modelfile"] = text
        readable = self._make(f"{key}.Modelfile", "modelfile", TEXT_TYPE, text.encode(), type_)
        self._make(f"{key}.ollama-config.json", "ollama-config", *_of(made.config), type_)
        counts: Counter[str] = Counter()
        for layer in made.layers:
            kind = layer.media_type.removeprefix(MEDIA_TYPE)
            counts[kind] += 1
            name = f"{key}.ollama-{kind}" + (f"-{counts[kind]}" if counts[kind] > 1 else "")
            self._make(name, "ollama-layer", *_of(layer), type_)
        name = f"{key}.ollama-manifest.json"
        self._make(name, "ollama-manifest", ollama_store.MANIFEST_TYPE, made.data, type_)
        fetched = self.papers.fetched
        pack = modelpack.pack(
            modelpack.About(
                name=key,
                source=fetched.source,
                revision=fetched.revision,
                license=self.judged.license,
                architecture=architecture,
                parameters_count=fetched.parameters_count,
                quantization=type_,
            ),
            _layer(self._file(f"{key}.gguf")),
            [_layer(each) for each in (readable, *licenses)],
        )
        name = f"{key}.modelpack-config.json"
        self._make(name, "modelpack-config", modelpack.CONFIG_TYPE, pack.config, type_)
        name = f"{key}.modelpack-manifest.json"
        self._make(name, "modelpack-manifest", modelpack.MANIFEST_TYPE, pack.manifest, type_)

    def _require_served(self, made: ollama_store.Manifest, type_: str) -> None:
        """Refuse what Ollama would serve otherwise than it was served under load."""
        tested = self.papers.tested
        if tested.engine is None or tested.engine.kind != "ollama":
            return
        served = release_gates.served_of(tested, type_)
        was = served.manifest_sha256 if served else None
        if was != made.sha256:
            raise _RefusedError(
                f"{type_} would be published under Ollama's manifest {short(made.sha256)}, but the "
                f"load test served {short(was)}. {self._again}"
            )

    def _link(
        self,
        name: str,
        role: Role,
        path: Path,
        digest: FileDigest,
        *,
        type_: str | None = None,
    ) -> ReleaseFile:
        """
        Add a file of an earlier stage, which its record names.

        Large ones are not read: a store hashes what it is sent. A licence is, since the Modelfile
        repeats it.
        """
        is_held = digest.sha256 in self.elsewhere
        try:
            size_bytes = digest.size_bytes if is_held else path.stat().st_size
        except FileNotFoundError:
            raise _RefusedError(f"{_named(path, self.at)} does not exist. {self._again}") from None
        if size_bytes != digest.size_bytes:
            raise _RefusedError(
                f"{_named(path, self.at)} has {size_bytes:,} bytes, its record says "
                f"{digest.size_bytes:,}. {self._again}"
            )
        if role == "license" and hashing.digest(path).sha256 != digest.sha256:
            raise _RefusedError(
                f"{_named(path, self.at)} is not the text that was fetched. {self._again}"
            )
        media_type = {"gguf": GGUF_TYPE, "license": TEXT_TYPE}.get(role, IMATRIX_TYPE)
        file = ReleaseFile(
            name=name,
            role=role,
            type=type_,
            media_type=media_type,
            size_bytes=size_bytes,
            sha256=digest.sha256,
        )
        return self._added(file, path)

    def _make(self, name: str, role: Role, media_type: str, data: bytes, type_: str) -> ReleaseFile:
        """Add a file that is made here."""
        file = ReleaseFile(
            name=name,
            role=role,
            type=type_,
            media_type=media_type,
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        return self._added(file, data)

    def _added(self, file: ReleaseFile, source: Path | bytes) -> ReleaseFile:
        if any(file.name == other.name for other in self.files):
            raise _RefusedError(
                f"two files of the release would be called {file.name}: one of upstream's and one "
                "of ours. Call the model otherwise in params.yaml."
            )
        self.files.append(file)
        blob = Blob(
            name=file.name,
            sha256=file.sha256,
            size_bytes=file.size_bytes,
            media_type=file.media_type,
            source=source,
        )
        self.blobs.setdefault(file.sha256, blob)
        return file

    def _file(self, name: str) -> ReleaseFile:
        return next(file for file in self.files if file.name == name)

    @property
    def _again(self) -> str:
        return f"Run `fleet repro {self.slice_.model}`."

    def _told(self, error: FleetError) -> str:
        """Make an error a reason, without the folder of the checkout in it."""
        said = clean(error.message)
        for folder in (f"{self.at.root.resolve()}/", f"{self.at.root}/"):
            said = said.replace(folder, "")
        return f"{wording.sentence(said)} {error.hint or self._again}"

    # --- facts ---

    def release(self) -> Release:
        """Return the release, as if it were the first one."""
        papers, judged = self.papers, self.judged
        fetched, tested, choice = papers.fetched, papers.tested, papers.choice
        winners = {one.host: one.winner for one in choice.hosts}
        stable = next((type_ for host in judged.released if (type_ := winners[host])), None)
        engine, where = tested.engine, tested.machine
        assert stable is not None, "a host that is promoted has a winner"
        assert engine is not None, "and that was served"
        return Release(
            model=self.slice_.model,
            previous=None,
            source=ReleaseSource(
                source=fetched.source,
                revision=fetched.revision,
                architecture=fetched.architecture,
                parameters_count=fetched.parameters_count,
            ),
            license=ReleaseLicense(id=judged.license, files=release_gates.license_files(fetched)),
            tools=ReleaseTools(
                llama_cpp_commit=papers.converted.llama_cpp_commit,
                recipe=papers.converted.recipe,
                engine=engine.kind,
                engine_version=engine.version,
                engine_llama_cpp=engine.llama_cpp,
                modelfile=tested.modelfile,
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
            context_tokens=tested.context_tokens,
            objective=choice.objective,
            stable_quant=stable,
            hosts={
                one.host: ReleasedHost(
                    verdict=one.verdict, winner=winners[one.host], sentence=one.sentence
                )
                for one in judged.hosts
            },
            quants=tuple(
                self._quant(key, type_)
                for key, type_ in self.slice_.quants.items()
                if type_ in judged.types
            ),
            files=tuple(self.files),
            choice_gates=choice.gates,
            gates=tuple(gate for test in tested.winners for gate in test.gates),
            waivers=judged.waivers,
            evidence=self._evidence(),
        )

    def _quant(self, key: str, type_: str) -> ReleasedQuant:
        built, measured = self.papers.quantized[type_], self.papers.measured[type_]
        read = Readings(key, type_, built, measured)
        prefill, decode, deepest = read.prefill_tok_s, read.decode_tok_s, read.deepest_decode
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
            decode_tok_s=decode.value if decode else None,
            decode_depth_tokens=deepest.depth_tokens if deepest else None,
            sentence=self._said_of(type_),
        )

    def _said_of(self, type_: str) -> str:
        """Return what `choose` says of a quant for the first released host that may run it."""
        return next(
            each.sentence
            for host in self.papers.choice.hosts
            for each in host.candidates
            if host.host in self.judged.released
            and each.type == type_
            and each.verdict in {"CHOSEN", "PASS"}
        )

    def _evidence(self) -> dict[str, str]:
        """
        Return the sha256 of every record behind the release, by its path in results/MODEL.

        Of evals, a comparison and the engine alone only if there are any, and of the last two only
        those of a file that is released.
        """
        model, at = self.slice_.model, self.at
        stages = ("fetch", "convert", "verify", "calibrate", "choose", "load-test")
        paths = [at.model_record(stage, model) for stage in stages]
        evals, compared = at.model_record("evaluate", model), self.papers.compared
        paths += [evals] if evals.exists() else []
        released = {self.papers.quantized[type_].gguf.sha256 for type_ in self.judged.types}
        if compared is not None and compared.challenger.gguf_sha256 in released:
            paths.append(at.comparison(model))
        engine = self.papers.engine
        if engine is not None and engine.challenger.gguf_sha256 in released:
            paths.append(at.engine_record(model))
        for type_ in self.slice_.quants.values():
            paths += [at.quant_record(stage, model, type_) for stage in ("quantize", "benchmark")]
        below = at.release(model).parent
        return {
            path.relative_to(below).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths
        }


def _of(layer: Layer) -> tuple[str, bytes]:
    return layer.media_type, layer.data


def _layer(file: ReleaseFile) -> modelpack.Layer:
    return modelpack.Layer(name=file.name, sha256=file.sha256, size_bytes=file.size_bytes)


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


def _leaks(
    release: Release, texts: Mapping[str, str], slice_: PublishSlice, at: Layout
) -> Iterator[str]:
    """Yield a reason for each string that says where, by whom or with what secret it was made."""
    # What the operator has named himself is his to tell.
    declared = {release.model, *release.hosts, *slice_.quants}
    private = _private_names(declared, at)
    for place, text in _strings(json.loads(release.model_dump_json())):
        what = leak(text, private)
        if what:
            # A key may be the very secret; it is named by where it stands.
            shown = ["…" if leak(part, private) else part for part in place]
            yield _leaked(f"release.json, {'.'.join(shown)}", what)
    for name, text in texts.items():
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
        re.compile(rf"(?<![\w.-]){re.escape(folder)}(?![\w.-])")
        for folder in sorted(folders)
        if len(Path(folder).parts) > 1
    ]
    own = {word.lower() for word in declared}
    names = {socket.gethostname(), socket.gethostname().partition(".")[0]} - {"", "localhost"}
    found += [host_pattern(name) for name in sorted(names) if name.lower() not in own]
    with contextlib.suppress(OSError, KeyError):
        found.append(re.compile(rf"(?<![\w.-]){re.escape(getpass.getuser())}@"))
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


def _strings(
    value: Any,  # noqa: ANN401 - any JSON value
    place: tuple[str, ...] = (),
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every string of a JSON value with its place; keys are strings, too."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield (*place, "a key"), key
            yield from _strings(each, (*place, key))
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from _strings(each, (*place, str(i)))
