"""
`oci://` a registry of container images, from which an unmodified `ollama pull` works.

One repository for each model, `<namespace>/<model>`. Every file of a release is a blob there.

    <type>-<id12>              the docker-v2 manifest of a quant; written once
    <type>-<id12>-modelpack    its CNCF ModelPack manifest; written once
    release-<id>               release.json, and with it every blob of the release: written once,
                               last, and what keeps the registry's own collection from them

    <type>, <type>-modelpack   the quant of the release that is stable; moved
    stable, stable-<host>      the quant for readers that take only one; moved
    fleet-stable               the alias with its moves, which readers of ours trust; moved last

Tags know no compare-and-set. What was read is compared right before, all is read back after, and
moves of one registry have to be serialised by the caller. A publisher that is killed between two
tags leaves some of the moving ones ahead of `fleet-stable`: each of them means a whole model all
the same, and the next publish or rollback puts them right, also where the alias needs no move.

A moving tag that the stable release has nothing for (it lacks a quant that an earlier one had)
would go on serving what was replaced, perhaps since it was bad. distribution 2.8 cannot remove a
tag without its manifest; so it is withdrawn: it means an empty artifact, of which `ollama pull`
says that it does not exist.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from pipelines import console
from pipelines.errors import DigestError, StoreError
from pipelines.release_records import (
    SHORT_CHARACTERS,
    STABLE,
    Alias,
    Release,
    ReleaseFile,
    alias_bytes,
    canonical,
    parse_alias,
    parse_release,
    release_id,
    short,
)
from pipelines.stores.base import (
    AliasMovedError,
    Blob,
    Guarantees,
    NotThereError,
    StoredBlob,
    hash_blob,
)
from pipelines.stores.oci_client import OCI_MANIFEST, OciClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.params import Registry
    from pipelines.stores.base import OnBytes, Token

RELEASE_TYPE: Final = "application/vnd.gguf-fleet.release.v1+json"
ALIAS_TYPE: Final = "application/vnd.gguf-fleet.alias.v1+json"
WITHDRAWN_TYPE: Final = "application/vnd.gguf-fleet.withdrawn.v1+json"
# A manifest as a blob among others: by its own type registries would take it for a child.
_KEPT_MANIFEST: Final = "application/vnd.gguf-fleet.kept-manifest.v1+json"
_EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
_EMPTY: Final = b"{}"
_TITLE: Final = "org.opencontainers.image.title"
_DESCRIPTION: Final = "org.opencontainers.image.description"

_RELEASE_TAG: Final = re.compile(r"release-([0-9a-f]{64})")
_QUANT_TAG: Final = re.compile(rf"(.+)-[0-9a-f]{{{SHORT_CHARACTERS}}}(?:-modelpack)?")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_MANIFESTS: Final = ("ollama-manifest", "modelpack-manifest")
# What a release, an alias and a manifest of a quant hold at most.
_MAX_DOCUMENT_BYTES: Final = 64 << 20
_MIB: Final = 1 << 20
# docs.github.com, Working with the Container registry: "10 GB size limit for each layer".
_GHCR: Final = "ghcr.io"
_GHCR_LIMIT_BYTES: Final = 10 * 10**9


class OciStore:
    """A registry of OCI; see the module."""

    def __init__(self, name: str, registry: Registry, *, client: OciClient | None = None) -> None:
        """
        Open the registry `name`; nothing is asked of it yet.

        Args:
            name: Its key in params.yaml.
            registry: Its declaration.
            client: Another one than usual, for tests.
        """
        self.name = name
        self._client = client or OciClient(name, registry)
        self._has_empty: set[str] = set()
        limit = _GHCR_LIMIT_BYTES if self._client.host.split(":")[0] == _GHCR else None
        declared = registry.max_file_mib
        self._max_file_bytes = declared * _MIB if declared else limit

    @property
    def shown(self) -> str:
        """Its address; a login never is part of it."""
        return self._client.shown

    @property
    def guarantees(self) -> Guarantees:
        """What it promises."""
        return Guarantees(
            compare_and_set=False,
            # Of blobs it does; a tag of ours somebody else can overwrite, which readers notice.
            immutable=False,
            proves=True,
            max_file_bytes=self._max_file_bytes,
            sentence="Tags have no compare-and-set: let one workflow at a time publish "
            "(`concurrency:`). Disk is freed by the registry's own collection.",
        )

    def prepare(self, model: str) -> None:
        """
        Find out whether a registry answers there and lets this login write.

        Raises:
            StoreError: It does not, or the address is the one that everybody reads from.
        """
        self._client.connect()
        self._client.require_writable(self._repository(model))

    # blobs

    def blob_size(self, model: str, sha256: str) -> int | None:
        """Return the size in bytes of a blob of the model's repository; None if it is not there."""
        return self._client.blob_size(self._repository(model), _checked(sha256))

    def put_blob(self, model: str, blob: Blob, on_bytes: OnBytes) -> int:
        """
        Send a blob unless it is there; in parts, resumed after a cut or a kill.

        Returns:
            Bytes that were sent.

        Raises:
            DigestError: The source is not the bytes that its name says. Nothing has that name.
        """
        there_bytes = self.blob_size(model, blob.sha256)
        if there_bytes is not None:
            on_bytes(there_bytes)
            return 0
        return self._client.upload(self._repository(model), blob, on_bytes)

    def read_blob(self, model: str, sha256: str, *, offset: int = 0) -> Iterator[bytes]:
        """
        Yield the stored bytes from an offset on.

        Raises:
            NotThereError: There is no such blob.
        """
        return self._client.read_blob(self._repository(model), _checked(sha256), offset=offset)

    def prove_blob(self, model: str, blob: Blob, on_bytes: OnBytes) -> None:
        """
        Re-read a blob and hash it.

        Raises:
            DigestError: The registry has other bytes under that name.
            NotThereError: It has none.
        """
        found, size_bytes = hash_blob(self.read_blob(model, blob.sha256), on_bytes)
        if (found, size_bytes) != (blob.sha256, blob.size_bytes):
            raise DigestError(
                f"{self.shown} gives other bytes under sha256:{blob.sha256} ({blob.name}): they "
                f"have {found} ({size_bytes} bytes; {blob.size_bytes} were stored).",
                hint="Its disk, or something before it, changed them. Remove the file of that "
                "digest from the registry's disk (sending it again does not replace it), and "
                "publish again.",
            )

    def list_blobs(self) -> Iterator[StoredBlob]:
        """
        Yield every file of every release that is there, each digest once.

        No API lists what else a registry holds; its own collection frees that. Ages are not known.
        """
        seen: set[str] = set()
        for model in self.list_models():
            for id_ in self.list_releases(model):
                for digest, size_bytes in self._files_of(model, id_):
                    if digest not in seen:
                        seen.add(digest)
                        yield StoredBlob(sha256=digest, size_bytes=size_bytes, age_s=None)

    def _files_of(self, model: str, id_: str) -> list[tuple[str, int]]:
        """Return digest and size of what a release keeps, but for release.json itself."""
        held = self._client.manifest(self._repository(model), f"release-{id_}")
        return [] if held is None else _layers(held.value(self.shown), self.shown)[1:]

    def delete_blob(self, sha256: str) -> None:
        """
        Take a blob out of every repository of the namespace; a collection frees its disk.

        Raises:
            StoreError: The registry does not allow it.
        """
        for repository in self._client.repositories():
            if self._client.blob_size(repository, _checked(sha256)) is not None:
                self._client.delete_blob(repository, sha256)

    # releases

    def put_release(self, release: Release, data: bytes) -> None:
        """
        Store the manifests of every quant under their immutable tags, then release.json.

        Raises:
            StoreError: Other bytes are there under one of these names, or a blob is missing.
        """
        id_, repository = release_id(data), self._repository(release.model)
        for file, tag in _immutable_tags(release, id_).items():
            manifest = self._small(release.model, file.sha256, file.size_bytes)
            self._put_once(repository, tag, manifest, file.media_type)
        self._put_small(release.model, "release.json", data)
        self._put_empty(release.model)
        artifact = _artifact(
            RELEASE_TYPE,
            [_descriptor(RELEASE_TYPE, data, "release.json"), *_descriptors(release)],
        )
        self._put_once(repository, f"release-{id_}", artifact, OCI_MANIFEST)

    def _put_once(self, repository: str, tag: str, data: bytes, media_type: str) -> None:
        """Write a tag that is never moved."""
        wanted = hashlib.sha256(data).hexdigest()
        found = self._client.manifest_sha256(repository, tag)
        if found is None:
            self._client.put_manifest(repository, tag, data, media_type)
            return
        if found != wanted:
            raise StoreError(
                f"{self.shown} has something else under {repository}:{tag}, which is never moved: "
                f"sha256:{short(found)}, not sha256:{short(wanted)}. Nothing was overwritten.",
                hint="Somebody else writes there. Remove that tag in the registry, find out who, "
                "and publish again.",
            )

    def read_release(self, model: str, id_: str) -> bytes:
        """
        Return the stored bytes of a release.

        Raises:
            NotThereError: There is no such release.
            StoreError: Something else has its tag.
        """
        missing = NotThereError(
            f"{self.shown} has no release {short(id_)} of {model}.",
            hint=f"`fleet releases {model} --registry {self.name}` lists those it has.",
        )
        held = self._client.manifest(self._repository(model), f"release-{_checked(id_)}")
        if held is None:
            raise missing
        digest, size_bytes = _layers(held.value(self.shown), self.shown)[0]
        if digest != id_:
            raise StoreError(
                f"{self.shown}: the tag release-{short(id_)} of {model} holds another release: "
                f"{short(digest)}.",
                hint=f"Somebody moved that tag. `fleet verify-registry {self.name}` names more.",
            )
        return self._small(model, id_, size_bytes)

    def list_releases(self, model: str) -> tuple[str, ...]:
        """Return the ids of the stored releases of a model."""
        tags = self._client.tags(self._repository(model))
        return tuple(found[1] for tag in tags if (found := _RELEASE_TAG.fullmatch(tag)))

    def list_models(self) -> tuple[str, ...]:
        """
        Return the models of which it holds releases.

        Raises:
            StoreError: The registry lists no repositories, as some hosted ones do not.
        """
        prefix = f"{self._client.namespace}/"
        models = (each.removeprefix(prefix) for each in self._client.repositories())
        return tuple(model for model in models if "/" not in model and self.list_releases(model))

    def delete_release(self, model: str, id_: str) -> None:
        """
        Remove a release, and those of its manifests that no other release has.

        First goes what readers find it by. A tag of a manifest that is still used stays where the
        registry cannot remove a tag alone; nobody reads it.

        Raises:
            StoreError: The registry does not allow it.
        """
        repository, tag = self._repository(model), f"release-{_checked(id_)}"
        held = self._client.manifest(repository, tag)
        if held is None:
            return
        release = parse_release(self.read_release(model, id_), id_, self.shown)
        others = [other for other in self.list_releases(model) if other != id_]
        used = {digest for other in others for digest, _ in self._files_of(model, other)}
        self._client.delete_manifest(repository, held.sha256)
        for file, immutable in _immutable_tags(release, id_).items():
            if file.sha256 in used:
                self._client.delete_tag(repository, immutable)
            else:
                self._client.delete_manifest(repository, file.sha256)

    def release_age_s(self, model: str, id_: str) -> float | None:
        """
        Seconds since the alias was moved to a release last; None if it never was.

        Registries tell no times. What is of unknown age counts as young.
        """
        alias, _token = self.read_alias(model, STABLE)
        times = [move.at for move in (alias.moves if alias else ()) if move.release == id_]
        try:
            last = max(datetime.fromisoformat(at) for at in times)
            return max(0.0, (datetime.now(UTC) - last).total_seconds())
        except (ValueError, TypeError):  # no move, or a time without a zone
            return None

    # aliases

    def read_alias(self, model: str, alias: str) -> tuple[Alias | None, Token]:
        """Return an alias and the digest of its manifest; (None, None) if there is none."""
        held = self._client.manifest(self._repository(model), _document_tag(alias))
        if held is None:
            return None, None
        where = f"{self.shown}, alias {model}@{alias},"
        value = held.value(where)
        if value.get("artifactType") != ALIAS_TYPE:
            raise StoreError(
                f"{where} is no alias of a release.",
                hint="Something else than this template wrote there. `fleet audit` compares it "
                "with the ledger in git.",
            )
        digest, size_bytes = _layers(value, where)[0]
        found = parse_alias(self._small(model, digest, size_bytes), where)
        if (found.model, found.alias) != (model, alias):
            raise StoreError(
                f"{where} is {console.clean(found.model)}@{console.clean(found.alias)}.",
                hint="Somebody copied it there. `fleet audit` compares it with the ledger in git.",
            )
        return found, held.sha256

    def write_alias(self, alias: Alias, release: Release, expected: Token) -> None:
        """
        Move the tags that other readers look at, then the one that ours trust; read all back.

        Raises:
            AliasMovedError: It is no longer what was read, or somebody moved it at the same time.
        """
        repository, tag = self._repository(alias.model), _document_tag(alias.alias)
        self._require_unmoved(repository, tag, expected, alias)
        data = alias_bytes(alias)
        document = _artifact(ALIAS_TYPE, [_descriptor(ALIAS_TYPE, data, "alias.json")])
        self._put_small(alias.model, "alias.json", data)
        self._put_empty(alias.model)
        self._move_tags(
            alias, release, lambda: self._client.manifest_sha256(repository, tag), expected
        )
        self._require_unmoved(repository, tag, expected, alias)
        self._client.put_manifest(repository, tag, document, OCI_MANIFEST)
        self._require_unmoved(repository, tag, hashlib.sha256(document).hexdigest(), alias)
        # Another publisher, who has lost, may have moved tags between ours.
        self.repair(alias, release)

    def _require_unmoved(self, repository: str, tag: str, expected: Token, alias: Alias) -> None:
        if self._client.manifest_sha256(repository, tag) != expected:
            raise AliasMovedError(
                f"{alias.model}@{alias.alias} of {self.shown} was moved by somebody else."
            )

    def repair(self, alias: Alias, release: Release) -> tuple[str, ...]:
        """
        Put the moving tags right where a publisher was killed between them.

        Args:
            alias: As it is stored.
            release: The release that it means.

        Returns:
            The tags that were wrong; most of the time none.
        """
        return self._move_tags(alias, release, lambda: None, None)

    def _move_tags(
        self,
        alias: Alias,
        release: Release,
        now: Callable[[], Token],
        expected: Token,
    ) -> tuple[str, ...]:
        """Let each moving tag mean what the release says; return those that meant another thing."""
        if alias.alias != STABLE:
            return ()
        model, repository = release.model, self._repository(release.model)
        moved = []
        for tag, file in _moving_tags(release).items():
            if self._client.manifest_sha256(repository, tag) != file.sha256:
                if now() != expected:
                    raise AliasMovedError(f"{model}@{STABLE} of {self.shown} is moved by others.")
                data = self._small(model, file.sha256, file.size_bytes)
                self._client.put_manifest(repository, tag, data, file.media_type)
                moved.append(tag)
        return (*moved, *self._withdraw(model, set(_moving_tags(release))))

    def _withdraw(self, model: str, wanted: set[str]) -> list[str]:
        """Let the moving tags of earlier releases mean nothing where this one has nothing."""
        repository = self._repository(model)
        tags = self._client.tags(repository)
        quants = {found[1] for tag in tags if (found := _QUANT_TAG.fullmatch(tag))}
        ours = quants | {f"{each}-modelpack" for each in quants}
        stale = [
            tag
            for tag in tags
            if tag not in wanted and (tag in ours or tag.startswith(f"{STABLE}-"))
        ]
        if not stale:
            return []
        data = _artifact(
            WITHDRAWN_TYPE,
            [_descriptor(_EMPTY_TYPE, _EMPTY)],
            "The release that is stable now has nothing under this tag.",
        )
        digest = hashlib.sha256(data).hexdigest()
        stale = [tag for tag in stale if self._client.manifest_sha256(repository, tag) != digest]
        if stale:
            self._put_empty(model)
        for tag in stale:
            self._client.put_manifest(repository, tag, data, OCI_MANIFEST)
        return stale

    # below

    def _repository(self, model: str) -> str:
        if not re.fullmatch(r"[a-z0-9]+(?:[_-]+[a-z0-9]+)*", model):
            raise StoreError(
                f"{console.clean(model)[:100]!r} cannot be the name of a repository.",
                hint="Registries take lower-case letters and digits, with `-` or `_` between them.",
            )
        return f"{self._client.namespace}/{model}"

    def _put_small(self, model: str, name: str, data: bytes) -> None:
        blob = Blob(
            name=name,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            media_type="application/json",
            source=data,
        )
        self.put_blob(model, blob, lambda _: None)

    def _put_empty(self, model: str) -> None:
        """Store the config that every artifact has; once, as far as we know."""
        if model not in self._has_empty:
            self._put_small(model, "an empty config", _EMPTY)
            self._has_empty.add(model)

    def _small(self, model: str, sha256: str, size_bytes: int) -> bytes:
        """Read a small blob and hash it."""
        if size_bytes > _MAX_DOCUMENT_BYTES:
            raise StoreError(f"{self.shown}: sha256:{sha256} is larger than any release.")
        data = b""
        for chunk in self.read_blob(model, sha256):
            data += chunk
            if len(data) > size_bytes:
                break
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DigestError(
                f"{self.shown} gives other bytes under sha256:{sha256} of {model}.",
                hint=f"`fleet verify-registry {self.name}` names everything that is wrong.",
            )
        return data


# --- tags and manifests -----------------------------------------------------------------------


def _immutable_tags(release: Release, id_: str) -> dict[ReleaseFile, str]:
    """Return the manifest of each quant with its tag of this release alone."""
    endings = {"ollama-manifest": "", "modelpack-manifest": "-modelpack"}
    return {
        file: f"{file.type}-{short(id_)}{endings[file.role]}"
        for file in release.files
        if file.role in _MANIFESTS
    }


def _moving_tags(release: Release) -> dict[str, ReleaseFile]:
    """Return what each moving tag has to mean, in the order in which they are moved."""
    by_type = {str(file.type): file for file in release.of("ollama-manifest")}
    tags = dict(by_type)
    tags |= {f"{file.type}-modelpack": file for file in release.of("modelpack-manifest")}
    for host, verdict in release.hosts.items():
        if verdict.verdict == "PROMOTE" and verdict.winner in by_type:
            tags[f"{STABLE}-{host}"] = by_type[verdict.winner]
    if release.stable_quant in by_type:
        tags[STABLE] = by_type[release.stable_quant]
    return tags


def _document_tag(alias: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", alias):
        raise StoreError(f"{console.clean(alias)[:100]!r} cannot be the name of an alias.")
    return f"fleet-{alias}"


def _descriptor(media_type: str, data: bytes, title: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "mediaType": media_type,
        "digest": f"sha256:{hashlib.sha256(data).hexdigest()}",
        "size": len(data),
    }
    return found | ({"annotations": {_TITLE: title}} if title else {})


def _descriptors(release: Release) -> Iterator[dict[str, Any]]:
    """Yield a descriptor for each blob of a release, each digest once."""
    seen: set[str] = set()
    for file in release.files:
        if file.sha256 not in seen:
            seen.add(file.sha256)
            yield {
                "mediaType": _KEPT_MANIFEST if file.role in _MANIFESTS else file.media_type,
                "digest": f"sha256:{file.sha256}",
                "size": file.size_bytes,
                "annotations": {_TITLE: file.name},
            }


def _artifact(type_: str, layers: list[dict[str, Any]], description: str = "") -> bytes:
    """Return the manifest of an artifact that is no image: what OCI 1.1 recommends."""
    value: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": type_,
        "config": _descriptor(_EMPTY_TYPE, _EMPTY),
        "layers": layers,
    }
    if description:
        value["annotations"] = {_DESCRIPTION: description}
    return canonical(value)


def _layers(manifest: dict[str, Any], where: str) -> list[tuple[str, int]]:
    """Return sha256 and size of the layers of a manifest, at least one."""
    try:
        layers = [(str(each["digest"]), int(each["size"])) for each in manifest["layers"]]
    except (KeyError, TypeError, ValueError):
        layers = []
    found = [(digest.removeprefix("sha256:"), size) for digest, size in layers]
    if not found or not all(_SHA256.fullmatch(digest) and size >= 0 for digest, size in found):
        raise StoreError(
            f"{where} is no artifact of ours: it names no blob by sha256.",
            hint="Something else than this template wrote there.",
        )
    return found


def _checked(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise StoreError(f"{console.clean(sha256)[:100]!r} is no sha256.")
    return sha256
