"""
`mlflow:` MLflow's model registry as the place where people find releases; the files lie elsewhere.

    registered model    the key of a model in params.yaml
      tag fleet.alias.stable      the alias document: which release, by which moves
      tags fleet.moves.stable.N   earlier moves, for which that tag has no room
      alias candidate             stable quant of the newest release
      alias stable, previous      stable quant of the release that is served, and of that before it
      version                     one quant of one release; its source names the bytes by digest

Files and release.json are in the registry that `blobs` names; a version's source is an address
there: `s3://bucket/prefix/blobs/sha256/<hex>`, `oci://host/namespace/model@sha256:<manifest>`,
`hf://owner/model-GGUF@release-<id>/<file>`, and for a directory `gguf-fleet://<its key in
params.yaml>/blobs/sha256/<hex>`: a server refuses paths, and one of this machine means nothing
elsewhere (MLflow 3.17.2: a server takes any scheme with a host, and refuses file:, urn: and bare
paths; a database takes anything).

MLflow moves an alias without a condition: two who move it at once both succeed, and the last one
wins. Whoever publishes is alone (`pipelines.publishing` holds a lock on this machine; across
machines a concurrency group of the workflow has to), the document is compared right before, and
everything is read back.

MLflow runs in a process of its own (`pipelines.mlflow_registry`), which is started at the first
question and asked by all stores of this process.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import console, proc, track
from pipelines.errors import FleetError, MachineError, ParamsError, StoreError, ToolError
from pipelines.mlflow_registry import COMPLETE_TAG, RELEASE_TAG, TYPE_TAG
from pipelines.release_records import MAX_MOVES, STABLE, parse_alias, release_id, short
from pipelines.stores import transfer
from pipelines.stores.addresses import is_private_way
from pipelines.stores.base import AliasMovedError, Guarantees, NotThereError, StoredBlob

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.params import Registry
    from pipelines.release_records import Alias, Move, Release, ReleasedQuant
    from pipelines.stores.base import Blob, OnBytes, Store, Token

CANDIDATE: Final = "candidate"
PREVIOUS: Final = "previous"
# A schema of MLflow's has 5,000 characters for the tag of a registered model (dbmodels/models.py);
# sqlite does not count, PostgreSQL and MySQL refuse more. Its own check is at 100,000.
MAX_TAG_BYTES: Final = 5000
# Of a version: a TEXT, of which MySQL takes 65,535 bytes.
_MAX_VERSION_TAG_BYTES: Final = 60_000
_MAX_DESCRIPTION_CHARACTERS: Final = 4900
_STABLE_QUANT_TAG: Final = "fleet.stable_quant"
_ALIAS_TAG: Final = "fleet.alias."
_MOVES_TAG: Final = "fleet.moves."
# By which a registered model is known to be ours.
_OURS_TAG: Final = "fleet.registry"

# What one request may take; a database makes its tables in 2 s, 10 s on a busy machine.
_ANSWER_WITHIN_S: Final = 7
_HTTP_TIMEOUT_S: Final = 5
_TABLES_WITHIN_S: Final = 120
# Files are already where they belong, so a version is READY at once; a plugin may take its time.
_READY_WITHIN_S: Final = 30
# Beside that: the start of Python and the import of mlflow, 2 s or, on a busy machine, 20.
_START_WITHIN_S: Final = 180
# How long after a first failure an operation is tried again.
_TRIED_FOR_S: Final = 5.0
_CREDENTIALS: Final = (
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN,"
)
_REBINDING: Final = "Invalid Host header"


class MlflowStore:
    """A registry of MLflow, and the registry that holds its files; see the module."""

    def __init__(self, name: str, registry: Registry, blobs: Store, root: Path) -> None:
        """
        Open the registry `name`; nothing is asked yet.

        Raises:
            ParamsError: Plain HTTP to another machine, which is not declared; or the files would be
                in a registry that keeps none.
        """
        self.name = name
        self.blobs = blobs
        self._shown = registry.url
        uri = registry.url.removeprefix("mlflow:")
        if isinstance(blobs, MlflowStore):
            raise ParamsError(
                f"registries.{name}.blobs names {blobs.name}, which is of MLflow too and keeps no "
                "files.",
                hint="Name a registry of another kind.",
            )
        self._local = uri.startswith(track.SQLITE)
        if self._local:
            uri = f"{track.SQLITE}{Path(root.resolve(), uri.removeprefix(track.SQLITE))}"
        elif not (registry.insecure or is_private_way(uri)):
            raise ParamsError(
                f"registry {name} is spoken to by plain HTTP: {registry.url}. Whoever is between "
                "reads the password and may change every answer.",
                hint=f"Use https, or declare registries.{name}.insecure: true.",
            )
        self._uri = uri
        self._within_s = _TABLES_WITHIN_S if self._local else _ANSWER_WITHIN_S

    @property
    def shown(self) -> str:
        """Its address as declared; it cannot have credentials in it."""
        return self._shown

    @property
    def place(self) -> str:
        """Its address on this machine, whatever the working directory is; for no record."""
        return f"mlflow:{self._uri}"

    @property
    def guarantees(self) -> Guarantees:
        """What it promises; of files what the registry that holds them does."""
        files = self.blobs.guarantees
        return Guarantees(
            compare_and_set=False,
            immutable=files.immutable,
            proves=files.proves,
            max_file_bytes=files.max_file_bytes,
            sentence=f"Files and release.json are in registry {self.blobs.name}; MLflow has no "
            "compare-and-set, so moves are serialised by the publisher and read back, and whoever "
            "may write to MLflow can move its aliases unseen until the next publish.",
        )

    def prepare(self, model: str) -> None:
        """
        Find out whether both registries can be reached and written to.

        MLflow has no way to ask whether we may write, so the registered model is made, or a tag of
        it set, before any byte is sent. Its aliases are put back to what the moves say, if somebody
        moved them by hand.
        """
        self.blobs.prepare(model)
        if self._local:
            file = Path(self._uri.removeprefix(track.SQLITE))
            place = next(path for path in (file, *file.parents) if path.exists())
            if not os.access(place, os.R_OK | os.W_OK):
                raise StoreError(
                    f"{self.shown} cannot be written to: {place} is not yours.",
                    hint=f"registries.{self.name}.url in params.yaml names the file.",
                )
        self._ensure(model)
        self._align(model)

    # blobs: in the other registry

    def blob_size(self, model: str, sha256: str) -> int | None:
        """Return the size in bytes of a stored blob; None if it is not there."""
        return self.blobs.blob_size(model, sha256)

    def put_blob(self, model: str, blob: Blob, on_bytes: OnBytes) -> int:
        """Store a blob in the registry that holds the files."""
        return self.blobs.put_blob(model, blob, on_bytes)

    def read_blob(self, model: str, sha256: str, *, offset: int = 0) -> Iterator[bytes]:
        """Yield the stored bytes from an offset on."""
        return self.blobs.read_blob(model, sha256, offset=offset)

    def prove_blob(self, model: str, blob: Blob, on_bytes: OnBytes) -> None:
        """Re-read a blob from the registry that holds it."""
        self.blobs.prove_blob(model, blob, on_bytes)

    def list_blobs(self) -> Iterator[StoredBlob]:
        """
        Yield every blob of the registry that holds the files.

        Their age is not told: other registries use them too, so a collection here removes none.
        """
        for blob in self.blobs.list_blobs():
            yield StoredBlob(sha256=blob.sha256, size_bytes=blob.size_bytes, age_s=None)

    def delete_blob(self, sha256: str) -> None:
        """Remove a blob from the registry that holds the files."""
        self.blobs.delete_blob(sha256)

    # releases

    def put_release(self, release: Release, data: bytes) -> None:
        """
        Store a release where the files are, then make a version of each of its quants.

        Versions that are there stay: a release is found again by its id. `candidate` follows, and
        aliases that somebody moved by hand in MLflow are put back to what the document says.
        """
        self.blobs.put_release(release, data)
        self._ensure(release.model)
        versions = self._register(release, release_id(data))
        self._align(release.model)
        self._ask("complete", model=release.model, version=versions[release.stable_quant])

    def _ensure(self, model: str) -> None:
        self._ask(
            "ensure",
            model=model,
            tags={_OURS_TAG: self.blobs.name},
            description=_text(
                f"Releases of {model}, published by gguf-fleet; their files are in registry "
                f"{self.blobs.name}."
            ),
        )

    def read_release(self, model: str, id_: str) -> bytes:
        """
        Return the bytes of a release that has all its versions here.

        Raises:
            NotThereError: It has not, or the registry of the files does not have it.
        """
        if not any(_is_complete(each) for each in self._versions(model, id_)):
            raise NotThereError(
                f"{self.shown} has no release {short(id_)} of {model}.",
                hint=f"fleet releases {model} --registry {self.name}",
            )
        return self.blobs.read_release(model, id_)

    def list_releases(self, model: str) -> tuple[str, ...]:
        """Return the ids of the releases that have all their versions here."""
        found = {each["tags"][RELEASE_TAG] for each in self._versions(model) if _is_complete(each)}
        return tuple(sorted(found))

    def list_models(self) -> tuple[str, ...]:
        """Return the models that have releases here."""
        if self._local and not self._exists():
            return ()
        names = self._ask("models", tag=_OURS_TAG)
        return tuple(sorted(name for name in _strings(names) if self.list_releases(name)))

    def delete_release(self, model: str, id_: str) -> None:
        """Remove the versions of a release; its files stay, for others may need them."""
        self._ask("delete", model=model, release=id_)

    def release_age_s(self, model: str, id_: str) -> float | None:
        """Seconds since the first version of a release was made; None if there is none."""
        import time  # noqa: PLC0415 - one question

        made = [int(each["created_ms"]) for each in self._versions(model, id_)]
        return time.time() - min(made) / 1000 if made else None

    # aliases

    def read_alias(self, model: str, alias: str) -> tuple[Alias | None, Token]:
        """Return an alias and the text of its document; (None, None) if there is none."""
        held = self._read(model)
        text = held["tags"].get(_ALIAS_TAG + alias) if held else None
        if held is None or text is None:
            return None, None
        return self._parsed(model, alias, held["tags"]), text

    def _parsed(self, model: str, alias: str, tags: dict[str, str]) -> Alias:
        """Join the document of an alias with the earlier moves that lie beside it."""
        text = tags[_ALIAS_TAG + alias]
        where = f"alias {alias} of {model} in {self.shown}"
        newest = parse_alias(text.encode(), where)
        if (newest.model, newest.alias) != (model, alias):
            raise StoreError(
                f"{where} is the document of another one: "
                f"{console.clean(newest.alias)} of {console.clean(newest.model)}.",
                hint="Something else than this template wrote there. `fleet audit` compares it "
                "with the ledger in git.",
            )
        earlier = sorted(
            (int(name.removeprefix(f"{_MOVES_TAG}{alias}.")), text)
            for name, text in tags.items()
            if re.fullmatch(rf"{re.escape(_MOVES_TAG + alias)}\.[0-9]{{1,9}}", name)
        )
        # Those that a kill left before the document was written are in the document still.
        try:
            moves = [json.loads(t) for number, t in earlier if number < newest.moves[0].sequence]
        except (ValueError, RecursionError) as error:
            raise StoreError(
                f"{where} has a move beside it that is no JSON.",
                hint="Something else than this template wrote there. `fleet audit` compares it "
                "with the ledger in git.",
            ) from error
        moves += [move.model_dump(mode="json") for move in newest.moves]
        whole = {**newest.model_dump(mode="json"), "moves": moves[-MAX_MOVES:]}
        return parse_alias(json.dumps(whole).encode(), where)

    def write_alias(self, alias: Alias, release: Release, expected: Token) -> None:
        """
        Move an alias to a release whose versions are READY, write its document, read both back.

        The document is what readers of ours trust, so it is last. A kill before it leaves MLflow's
        alias ahead; the next publish moves again, or puts it back. Moving to a release that has
        versions makes none.

        Raises:
            AliasMovedError: The document is no longer what was read, or somebody else wrote in the
                moment in which we did.
        """
        model = alias.model
        document, earlier = fitted(alias)
        held = self._read(model) or {"tags": {}, "aliases": {}}
        if held["tags"].get(_ALIAS_TAG + alias.alias) != expected:
            raise self._moved(alias)
        self._ensure(model)
        versions = self._register(release, alias.release)
        aliases: dict[str, int | None] = {alias.alias: versions[release.stable_quant]}
        if alias.alias == STABLE:
            aliases[PREVIOUS] = self._version_of(model, alias.moves[-1].previous)
        tags = {
            f"{_MOVES_TAG}{alias.alias}.{move.sequence}": _compact(move.model_dump(mode="json"))
            for move in earlier
        }
        # The document is last: what it does not hold is there by then.
        tags[_ALIAS_TAG + alias.alias] = document
        after = self._ask(
            "point",
            model=model,
            aliases=_changes(held["aliases"], aliases),
            tags={name: text for name, text in tags.items() if held["tags"].get(name) != text},
        )
        if (
            not isinstance(after, dict)
            or any(after["tags"].get(name) != text for name, text in tags.items())
            or _changes(after["aliases"], aliases)
        ):
            raise self._moved(alias)

    def _moved(self, alias: Alias) -> AliasMovedError:
        return AliasMovedError(
            f"somebody else moved `{alias.alias}` of {alias.model} in {self.shown} at the same "
            "time.",
            hint="Run the command again; let only one workflow at a time publish to it.",
        )

    # --- versions

    def _register(self, release: Release, id_: str) -> dict[str, int]:
        """
        Make the versions of a release that are missing, and wait until all are READY.

        Returns:
            The number of the version, by type.

        Raises:
            StoreError: A version of that release is of other bytes.
        """
        wanted = [self._version(release, id_, quant) for quant in release.quants]
        # The one that aliases mean is made first: whatever is there of a release, it is.
        wanted.sort(key=lambda each: each["tags"][TYPE_TAG] != release.stable_quant)
        made = self._ask(
            "register",
            model=release.model,
            release=id_,
            versions=wanted,
            ready_within_s=_READY_WITHIN_S,
            more_s=(_READY_WITHIN_S + self._within_s) * len(wanted),
        )
        if not isinstance(made, list) or len(made) != len(wanted):
            raise self._wrong("other versions than were asked for")
        for one, found in zip(wanted, made, strict=True):
            self._require_same(one, found, release.model)
        return {found["tags"][TYPE_TAG]: int(found["version"]) for found in made}

    def _require_same(self, wanted: dict[str, Any], found: dict[str, Any], model: str) -> None:
        """Never take a version of other bytes for ours: somebody may have edited it."""
        for name in ("fleet.gguf_sha256", RELEASE_TAG, TYPE_TAG):
            if found["tags"].get(name) != wanted["tags"][name]:
                raise self._wrong(
                    f"version {found['version']} of {model} with {name} "
                    f"{console.clean(str(found['tags'].get(name)))[:80]}, which is not the "
                    "release's"
                )
        if found["source"] != wanted["source"]:
            raise StoreError(
                f"version {found['version']} of {model} in {self.shown} has its source in another "
                f"place than registry {self.blobs.name}: "
                f"{console.clean(str(found['source']))[:200]}.",
                hint=f"If registries.{self.name}.blobs was changed on purpose, delete that version "
                "in MLflow and publish again.",
            )

    def _version(self, release: Release, id_: str, quant: ReleasedQuant) -> dict[str, Any]:
        """Compose one version."""
        gguf = next(
            file for file in release.of("gguf", quant.type) if file.sha256 == quant.gguf_sha256
        )
        tags = {
            RELEASE_TAG: id_,
            TYPE_TAG: quant.type,
            _STABLE_QUANT_TAG: release.stable_quant,
            "fleet.key": quant.key,
            "fleet.file": gguf.name,
            "fleet.gguf_sha256": quant.gguf_sha256,
            "fleet.size_bytes": str(gguf.size_bytes),
            "fleet.source": release.source.source,
            "fleet.revision": release.source.revision,
            "fleet.llama_cpp_commit": release.tools.llama_cpp_commit,
            "fleet.license": release.license.id,
            "fleet.verdict": _verdicts(release, quant.type),
            "fleet.gates": _compact([gate.model_dump(mode="json") for gate in release.gates]),
            "fleet.waivers": _compact([each.model_dump(mode="json") for each in release.waivers]),
            "fleet.blobs": self.blobs.name,
        }
        for manifest in release.of("ollama-manifest", quant.type):
            tags["fleet.ollama_manifest_sha256"] = manifest.sha256
        for tag, value in tags.items():
            if len(value.encode()) > _MAX_VERSION_TAG_BYTES:
                tags[tag] = f"too long for MLflow; see release {id_}"
        waived = "".join(
            f"\nWaived until {each.until} by {each.who}: {each.gate}: {each.why}"
            for each in release.waivers
        )
        return {
            "source": self._source(release, id_, quant),
            "tags": tags,
            "description": _text(
                f"{quant.type} of release {short(id_)}: {quant.sentence}\n"
                f"sha256 {quant.gguf_sha256}{waived}"
            ),
        }

    def _source(self, release: Release, id_: str, quant: ReleasedQuant) -> str:
        """Name the bytes of a quant by digest, where the other registry has them."""
        place = self.blobs.shown.rstrip("/")
        kind = place.partition(":")[0]
        if kind == "s3":
            return f"{place}/blobs/sha256/{quant.gguf_sha256}"
        if kind == "oci":
            # What clients of a registry ask for by digest is a manifest, not a blob.
            manifest = (
                *release.of("modelpack-manifest", quant.type),
                *release.of("ollama-manifest", quant.type),
            )[0]
            return f"{place}/{release.model}@sha256:{manifest.sha256}"
        if kind == "hf":
            owner = place.partition(":")[2].strip("/")
            (file, *_) = release.of("gguf", quant.type)
            return f"hf://{owner}/{release.model}-GGUF@release-{short(id_)}/{file.name}"
        return f"gguf-fleet://{self.blobs.name}/blobs/sha256/{quant.gguf_sha256}"

    def _versions(self, model: str, release: str | None = None) -> list[dict[str, Any]]:
        """Return the versions of ours of a model, oldest first."""
        if self._local and not self._exists():
            return []
        found = self._ask("versions", model=model, release=release)
        if not isinstance(found, list):
            raise self._wrong("no list of versions")
        return [each for each in found if RELEASE_TAG in each["tags"]]

    def _version_of(self, model: str, release: str | None) -> int | None:
        """
        Return the version that an alias has to mean to mean a release; None if there is none.

        A release that has no versions here, since it was published elsewhere or collected, is not
        brought back for an alias that only people look at.
        """
        if release is None:
            return None
        for each in self._versions(model, release):
            if each["tags"].get(TYPE_TAG) == each["tags"].get(_STABLE_QUANT_TAG):
                return int(each["version"])
        return None

    def _align(self, model: str) -> None:
        """Set MLflow's aliases to what versions and documents say, and say what was otherwise."""
        held = self._read(model)
        if held is None:
            raise self._wrong(f"no model {model}, of which versions were just made")
        # One question for all: the newest release is the one with the highest version.
        versions = self._versions(model)
        stable_quants = {
            each["tags"][RELEASE_TAG]: int(each["version"])
            for each in reversed(versions)
            if each["tags"].get(TYPE_TAG) == each["tags"].get(_STABLE_QUANT_TAG)
        }
        wanted: dict[str, int | None] = {
            CANDIDATE: stable_quants.get(versions[-1]["tags"][RELEASE_TAG]) if versions else None
        }
        told = {}
        for tag in held["tags"]:
            if tag.startswith(_ALIAS_TAG):
                alias = self._parsed(model, tag.removeprefix(_ALIAS_TAG), held["tags"])
                told[alias.alias] = stable_quants.get(alias.release)
                if alias.alias == STABLE:
                    told[PREVIOUS] = stable_quants.get(alias.moves[-1].previous or "")
        changes = _changes(held["aliases"], {**wanted, **told})
        for alias_name in sorted(changes.keys() & told.keys()):
            there = held["aliases"].get(alias_name)
            console.warn(
                f"{self.shown}: `{alias_name}` of {model} meant "
                f"{f'version {there}' if there else 'nothing'}, which no move of ours says; it is "
                "put back."
            )
        if changes:
            self._ask("point", model=model, aliases=changes, tags={})

    # --- questions

    def _exists(self) -> bool:
        """Tell whether a database is there: to ask it would make one."""
        return Path(self._uri.removeprefix(track.SQLITE)).exists()

    def _read(self, model: str) -> dict[str, Any] | None:
        """Return tags and aliases of a registered model; None if there is none."""
        if self._local and not self._exists():
            return None
        held = self._ask("read", model=model)
        if held is not None and not (isinstance(held, dict) and {"tags", "aliases"} <= held.keys()):
            raise self._wrong("no registered model")
        return held

    def _ask(self, operation: str, *, more_s: float = 0, **told: Any) -> Any:  # noqa: ANN401 - JSON
        """
        Have an operation done; again, for some seconds, while it may succeed later.

        Every operation may be repeated: it looks first, and does what is missing.

        Raises:
            RetryLaterError: The server cannot be reached, is too slow, or has an error of its own.
            StoreError: It refused, or answered what cannot be.
        """
        question = json.dumps(
            {
                **told,
                "operation": operation,
                "uri": self._uri,
                "secrets": _secrets(),
                "answer_within_s": self._within_s,
            }
        )
        within_s = _START_WITHIN_S + 2 * self._within_s + more_s

        def once() -> Any:  # noqa: ANN401 - any JSON value
            try:
                answer = json.loads(_program.ask(question, within_s=within_s))
            except ToolError as error:
                if "SIGALRM" in error.message:
                    raise _PassingError(f"no answer within {self._within_s} s") from error
                raise
            if "failure" not in answer:
                return answer["value"]
            if answer["failure"] == "unreachable":
                raise _PassingError(answer["text"])
            raise self._refusal(answer["failure"], answer["text"])

        return transfer.retrying(
            self.shown, once, deadline_s=_TRIED_FOR_S, credentials=_CREDENTIALS, failure=_failure
        )

    def _refusal(self, kind: str, text: str) -> FleetError:
        """Say what was refused, and the next step."""
        said = console.clean(text)
        if kind == "missing":
            return MachineError(f"registry {self.name} cannot be asked: {said}.")
        if _REBINDING in said:
            return StoreError(
                f"{self.shown} refuses its own name: {said}",
                hint="Start the server with --allowed-hosts and the name that is in params.yaml: "
                "MLflow answers only to names that it was told, against DNS rebinding.",
            )
        if kind == "denied":
            return StoreError(
                f"{self.shown} does not let us: {said}",
                hint=f"Check {_CREDENTIALS} in the environment: the login is missing, has expired, "
                "or may not do this.",
            )
        if kind == "wrong":
            return self._wrong(said)
        return StoreError(
            f"{self.shown} refused: {said}",
            hint="See the log of the MLflow server.",
        )

    def _wrong(self, what: str) -> StoreError:
        return StoreError(
            f"{self.shown} gave an answer that cannot be: {what}. Nothing was concluded from it.",
            hint="Is that address an MLflow server (3.17 was run), and nothing else's login page?",
        )


class _PassingError(Exception):
    """May be otherwise in a while."""


def _failure(error: Exception) -> transfer.Failure | None:
    if not isinstance(error, _PassingError):
        return None
    return transfer.Failure(status=None, passing=True, retry_after_s=None, detail=str(error))


class _Program:
    """The process that imports mlflow: one for all stores of ours, started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._dialogue: proc.Dialogue | None = None
        self._owner = 0

    def ask(self, question: str, *, within_s: float) -> str:
        with self._lock:
            # A process that was forked off has no program of its own, only our pipes.
            if self._dialogue is None or self._owner != os.getpid():
                self._dialogue = proc.Dialogue(
                    [sys.executable, "-m", "pipelines.mlflow_registry"], env=_environment()
                )
                self._owner = os.getpid()
            try:
                return self._dialogue.ask(question, within_s=within_s)
            except BaseException:
                # It is gone; the next question has another one.
                self._dialogue = None
                raise

    def close(self) -> None:
        if self._dialogue is not None and self._owner == os.getpid():
            self._dialogue.close()
            self._dialogue = None


_program = _Program()
atexit.register(_program.close)


def _environment() -> dict[str, str]:
    """Variables of the program; MLflow reads them when it is imported."""
    places = [str(Path(__file__).resolve().parent.parent.parent), os.environ.get("PYTHONPATH")]
    return {
        # Whether to try again is decided here: the defaults are 7 retries of 120 s each.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_HTTP_TIMEOUT_S),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONPATH": os.pathsep.join(place for place in places if place),
    }


def _secrets() -> dict[str, str]:
    """Credentials as they are now: the program may be older than they are."""
    names = ("USERNAME", "PASSWORD", "TOKEN")
    return {
        f"MLFLOW_TRACKING_{name}": os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in names
    }


def _is_complete(version: dict[str, Any]) -> bool:
    return bool(version["tags"].get(COMPLETE_TAG) == "true")


# --- what is written --------------------------------------------------------------------------


def fitted(alias: Alias) -> tuple[str, tuple[Move, ...]]:
    """
    Return the document of an alias as a tag has room for it, and the moves that it has not.

    About a dozen moves fit; each of the others gets a tag of its own.

    Raises:
        StoreError: Not even one move does.
    """
    for count in range(len(alias.moves), 0, -1):
        moves = alias.moves[-count:]
        text = _compact(alias.model_copy(update={"moves": moves}).model_dump(mode="json"))
        if len(text.encode()) <= MAX_TAG_BYTES:
            return text, alias.moves[:-count]
    raise StoreError(
        f"the move of `{alias.alias}` of {alias.model} is longer than the {MAX_TAG_BYTES:,} bytes "
        "that a tag of MLflow takes. Nothing was moved.",
        hint="Give a shorter --reason, or shorter words in the waivers.",
    )


def _changes(held: dict[str, int], wanted: dict[str, int | None]) -> dict[str, int | None]:
    """Return the aliases that have to be set; MLflow answers 404 for one that it does not have."""
    return {alias: version for alias, version in wanted.items() if held.get(alias) != version}


def _compact(value: Any) -> str:  # noqa: ANN401 - any JSON value
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _text(text: str) -> str:
    """Cut a description to what MLflow's schema has room for."""
    return console.clean(text)[:_MAX_DESCRIPTION_CHARACTERS]


def _verdicts(release: Release, type_: str) -> str:
    """Say for which hosts a quant was chosen, and what became of it."""
    mine = [
        f"{name}: {host.verdict}" for name, host in release.hosts.items() if host.winner == type_
    ]
    return ", ".join(mine) or "PASS"


def _strings(value: Any) -> list[str]:  # noqa: ANN401 - any JSON value
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []
