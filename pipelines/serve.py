"""
`fleet serve MODEL@ALIAS`: a release into the operator's own Ollama, and back if it does not answer.

    resolve -> choose a quant -> blobs -> fleet/<model>:<type>-<id12> -> it answers
            -> fleet/<model>:stable in one move -> it answers -> old ones go

Clients ask for the served name and never see the one between: the release is loaded and asked under
a name of its own first, and the served name is switched by one rename of its manifest. Whatever
ends us, it means what it meant or what it shall mean. If it does not answer under the served name,
that is switched back. Names of the last releases stay, so that a rollback places nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

from pipelines import console, disk, locks, params, registries, wording
from pipelines.errors import DigestError, FleetError, GateError, ParamsError, StoreError
from pipelines.ledger import Ledger
from pipelines.publishing import read_to, resolve
from pipelines.publishing_words import shown_size
from pipelines.release_records import SHORT_CHARACTERS, short
from pipelines.serving import own_ollama
from pipelines.serving.ollama_store import ModelName, blob_path, place_manifest
from pipelines.serving.server import ServingError
from pipelines.stores import open_store
from pipelines.stores.transfer import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.release_records import Release, ReleaseFile
    from pipelines.serving.own_ollama import Answer, Ollama
    from pipelines.stores.base import OnBytes, Store

# Names of releases that stay, the served one among them.
KEPT_COUNT: Final = 3
_SERVED_TAG: Final = "stable"
_NAMESPACE: Final = "fleet"
# `q4_k_m-0123456789ab`, or `before-` and digits of what somebody else had put under the name.
_OURS: Final = re.compile(rf"[a-z0-9_]+-[0-9a-f]{{{SHORT_CHARACTERS}}}")
_BEFORE: Final = "before-"
_MIB: Final = 2**20


@dataclass(frozen=True, kw_only=True)
class ServeResult:
    """
    What is served now, or with `dry_run` would be.

    Attributes:
        model: Key of the model.
        release: Id of the release.
        type: Quant.
        name: Served name, as people type it.
        versioned_name: Name of this release alone.
        manifest_sha256: Digest by which both are listed.
        gguf_sha256: The weights.
        url: Of the Ollama.
        models_dir: Its folder.
        before: What the name meant: a versioned name, or a digest; None if nothing.
        back: Command that serves again what the name meant; None if that was nothing of ours, or
            the registry does not have it.
        switched: Whether it means something else now.
        placed_bytes: Size of the files that were not there.
        linked_bytes: What of that takes no room of its own: hard links.
        replaced: sha256 of files that were there with other bytes.
        context_tokens: As the loaded model has it.
        memory_mib: Of the loaded model; `vram_mib` of that on a GPU.
        removed: Names of older releases that were removed.
        dry_run: Nothing was written.
    """

    model: str
    release: str
    type: str
    name: str
    versioned_name: str
    manifest_sha256: str
    gguf_sha256: str
    url: str
    models_dir: str
    before: str | None
    back: str | None
    switched: bool
    placed_bytes: int
    linked_bytes: int
    replaced: tuple[str, ...]
    context_tokens: int
    memory_mib: float | None
    vram_mib: float | None
    removed: tuple[str, ...]
    dry_run: bool


def main(  # noqa: PLR0913 - one for each option
    declared: Declaration,
    at: Layout,
    *,
    model: str,
    alias: str,
    registry: str | None,
    host: str | None,
    quant: str | None,
    models_dir: Path | None,
    url: str | None,
    name: str | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """
    Serve a release and say so; see `run`.

    Args:
        declared: The declaration.
        at: The checkout; its ledger tells whether the registry shows an old state.
        model: Key of the model.
        alias: `stable`, `previous`, or an id.
        registry: Key of the registry; None for the local one.
        host: Take the quant that was chosen for this host.
        quant: Take this quant.
        models_dir: Folder of the Ollama; None to find it.
        url: Its address; None for OLLAMA_HOST, or the default.
        name: Served name; None for `fleet/<model>:stable`.
        dry_run: Write nothing.
        as_json: Print JSON.
    """
    result = run(
        open_store(registry or params.LOCAL_REGISTRY, declared, at.root),
        Ledger.load(at.ledger(model), model),
        model=model,
        wanted=alias,
        host=host,
        quant=quant,
        models_dir=models_dir,
        url=url,
        name=name,
        dry_run=dry_run,
    )
    if as_json:
        console.out(json.dumps(asdict(result), indent=2, ensure_ascii=False))
    else:
        console.out(sentence(result))
    return 0


def run(  # noqa: PLR0913 - one for each independent fact
    store: Store,
    ledger: Ledger | None,
    *,
    model: str,
    wanted: str,
    host: str | None = None,
    quant: str | None = None,
    models_dir: Path | None = None,
    url: str | None = None,
    name: str | None = None,
    dry_run: bool = False,
) -> ServeResult:
    """
    Bring a release into an Ollama that runs, and let a name mean it once it answers.

    Args:
        store: The registry.
        ledger: Of the model, if there is one here.
        model: Key of the model.
        wanted: `stable`, `previous`, an id, or a prefix of one.
        host: Take the quant that was chosen for this host of the release.
        quant: Take this quant.
        models_dir: Folder of the Ollama; None to find it.
        url: Its address; None for OLLAMA_HOST, or the default.
        name: Served name; None for `fleet/<model>:stable`.
        dry_run: Write nothing.

    Raises:
        GateError: The release was not promoted for that host.
        ParamsError: It has no such quant or host, or the name is none.
        RetryLaterError: The registry or the Ollama cannot be reached; nothing was placed.
        NotThereError, StoreError, DigestError: The registry does not have it, or other bytes.
        MachineError: The folder cannot be found or written to, or the disk is full.
        ServingError: The Ollama does not serve it; the name means what it meant.
    """
    id_, release, _ = resolve(store, model, wanted, ledger)
    type_ = _type_of(release, id_, host, quant)
    served = own_ollama.name_of(name or f"{_NAMESPACE}/{model}:{_SERVED_TAG}")
    ollama = own_ollama.Ollama(own_ollama.address(url))
    ollama.require_up()
    folder = own_ollama.models_dir(models_dir, ollama)
    plan = _Plan(
        store=store,
        release=release,
        id=id_,
        type=type_,
        data=_manifest(store, release, type_),
        ollama=ollama,
        folder=folder,
        served=served,
        versioned=replace(served, tag=f"{type_.lower()}-{short(id_)}"),
        typed=_Typed(host=host, quant=quant, models_dir=models_dir, url=url, name=name),
        ledger=ledger,
    )
    if plan.versioned == served:
        raise ParamsError(
            f"{own_ollama.shown(served)} is the name of that release alone; it cannot also be the "
            "one that is switched.",
            hint="Give --name another tag.",
        )
    if dry_run:
        return _planned(plan)
    # The folder may be another user's, and a lock in it would be in Ollama's way.
    key = hashlib.sha256(f"{folder}\n{served}".encode()).hexdigest()[:16]
    from pipelines.toolchain import default_cache_root  # noqa: PLC0415 - heavy for one path

    with locks.exclusively(
        default_cache_root() / "locks" / f"serve-{key}.lock",
        f"switching {own_ollama.shown(served)}",
    ):
        return _serve(plan)


@dataclass(frozen=True, kw_only=True)
class _Typed:
    """Options as somebody typed them, but for the registry; None for what was not typed."""

    host: str | None
    quant: str | None
    models_dir: Path | None
    url: str | None
    name: str | None


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be served, and where; `data` is the manifest."""

    store: Store
    release: Release
    id: str
    type: str
    data: bytes
    ollama: Ollama
    folder: Path
    served: ModelName
    versioned: ModelName
    typed: _Typed
    ledger: Ledger | None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def gguf(self) -> ReleaseFile:
        return self.release.of("gguf", self.type)[0]

    @property
    def files(self) -> tuple[ReleaseFile, ...]:
        """Everything that the manifest names, the GGUF last: it takes longest."""
        named = dict(own_ollama.blobs_of(self.data, f"release {short(self.id)}"))
        if self.gguf.sha256 not in named:
            raise StoreError(
                f"the Ollama manifest of {self.type} in release {short(self.id)} does not name "
                f"{self.gguf.name}: what it serves is another file.",
                hint="It was not made by this template; serve another release.",
            )
        found = {file.sha256: file for file in self.release.files if file.sha256 in named}
        for sha256, size_bytes in named.items():
            if sha256 not in found or found[sha256].size_bytes != size_bytes:
                raise StoreError(
                    f"the Ollama manifest of {self.type} in release {short(self.id)} names "
                    f"sha256:{sha256[:12]}, which is no file of that release of that size.",
                    hint="It was not made by this template; serve another release.",
                )
        return tuple(sorted(found.values(), key=lambda file: file.size_bytes))

    def require_answers(self, name: ModelName) -> Answer:
        return self.ollama.require_answers(
            name,
            self.sha256,
            context_tokens=self.release.context_tokens,
            size_bytes=self.gguf.size_bytes,
        )


# --- what is to be served ---------------------------------------------------------------------


def _type_of(release: Release, id_: str, host: str | None, quant: str | None) -> str:
    """
    Choose the quant.

    Raises:
        GateError: The host is not PROMOTE.
        ParamsError: There is no such host or quant.
    """
    types = {each.type: each for each in release.quants}
    if host is None:
        chosen = quant or release.stable_quant
    else:
        found = release.hosts.get(host)
        if found is None:
            raise ParamsError(
                f"release {short(id_)} of {release.model} says nothing of host "
                f"{wording.quoted(host)}{wording.did_you_mean(host, release.hosts) or '.'}",
                hint=f"It knows: {', '.join(release.hosts)}.",
            )
        if found.verdict != "PROMOTE" or found.winner is None:
            raise GateError(
                f"release {short(id_)} of {release.model} is {found.verdict} for {host}: "
                f"{console.clean(found.sentence)}",
                hint="Serve a release that is PROMOTE for it (`fleet releases "
                f"{release.model}`), or name a quant yourself: --quant TYPE.",
            )
        chosen = _winner(found.winner, release)
        if quant not in {None, chosen}:
            raise ParamsError(
                f"for {host} {chosen} was chosen, not {wording.quoted(quant or '')}.",
                hint="Give --host or --quant, not both.",
            )
    if chosen not in types:
        raise ParamsError(
            f"release {short(id_)} of {release.model} has no quant {wording.quoted(chosen)}"
            f"{wording.did_you_mean(chosen, types) or '.'}",
            hint=f"It has: {', '.join(types)}.",
        )
    return chosen


def _winner(named: str, release: Release) -> str:
    """Return the type of a winner, which is named by its type or by its key."""
    return next((each.type for each in release.quants if named in {each.type, each.key}), named)


def _manifest(store: Store, release: Release, type_: str) -> bytes:
    """
    Read the manifest of a quant, verified.

    Raises:
        StoreError: The release has none.
        DigestError: The registry gave other bytes.
    """
    found = release.of("ollama-manifest", type_)
    if len(found) != 1 or len(release.of("gguf", type_)) != 1:
        raise StoreError(
            f"this release of {release.model} has no manifest of {type_} for Ollama: it was not "
            "made by this template.",
        )
    (file,) = found
    parts, size_bytes = [], 0
    for chunk in store.read_blob(release.model, file.sha256):
        parts.append(chunk)
        size_bytes += len(chunk)
        if size_bytes > file.size_bytes:
            break
    data = b"".join(parts)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DigestError(
            f"{store.shown} gave other bytes for {file.name}: sha256 "
            f"{hashlib.sha256(data).hexdigest()} instead of {file.sha256}. Nothing was placed.",
            hint=f"`fleet verify-registry {store.name}` names everything there that is not what it "
            "should be.",
        )
    return data


def _planned(plan: _Plan) -> ServeResult:
    """Say what would be done; blobs that are there are not hashed."""
    missing = [file for file in plan.files if not blob_path(plan.folder, file.sha256).is_file()]
    before = _before(plan)
    return replace(
        _result(plan, before, None),
        switched=own_ollama.meaning(plan.folder, plan.served) != plan.data,
        placed_bytes=sum(file.size_bytes for file in missing),
        dry_run=True,
    )


# --- placing and switching --------------------------------------------------------------------


def _serve(plan: _Plan) -> ServeResult:
    """Place, prove, switch, prove; see the module."""
    had = own_ollama.meaning(plan.folder, plan.versioned)
    before = _before(plan)
    meant = own_ollama.meaning(plan.folder, plan.served)
    placed = _place_blobs(plan)
    if placed.replaced:
        _unload(plan, placed.replaced)
    with disk.explained(plan.folder):
        place_manifest(plan.folder, plan.versioned, plan.data)
    try:
        answer = plan.require_answers(plan.versioned)
    except FleetError as error:
        # Nobody shall choose from a list what does not answer.
        if had is None and own_ollama.meaning(plan.folder, plan.served) != plan.data:
            own_ollama.forget(plan.folder, plan.versioned)
        raise _refused(plan, error, before) from error
    switched = _switch(plan)
    return replace(
        _result(plan, before, answer),
        back=_back(plan, meant) if switched and meant else None,
        switched=switched,
        placed_bytes=placed.bytes,
        linked_bytes=placed.linked_bytes,
        replaced=placed.replaced,
        removed=_remove_older(plan),
    )


def _refused(plan: _Plan, error: FleetError, before: str | None) -> ServingError:
    """Say that nothing was switched, and why."""
    name = own_ollama.shown(plan.served)
    still = (
        f"{name} was not switched: it means {before} as before."
        if before
        else (f"{name} means nothing, as before.")
    )
    return ServingError(
        f"release {short(plan.id)} of {plan.release.model} does not serve: "
        f"{wording.clause(error.message)}. {still}",
        hint=error.hint
        or "See the log of that Ollama. `fleet verify-registry "
        f"{plan.store.name}` tells whether the files there are what they should be.",
    )


def _switch(plan: _Plan) -> bool:
    """
    Let the served name mean the release, and see that it answers; else what it meant before.

    Returns:
        Whether it meant something else.

    Raises:
        ServingError: It does not answer under that name, and means again what it meant.
    """
    before = own_ollama.meaning(plan.folder, plan.served)
    if before == plan.data:
        plan.require_answers(plan.served)
        return False
    with disk.explained(plan.folder):
        _keep(plan, before)
        place_manifest(plan.folder, plan.served, plan.data)
    try:
        plan.require_answers(plan.served)
    except FleetError as error:
        raise ServingError(
            f"{own_ollama.shown(plan.served)} does not answer as release {short(plan.id)}: "
            f"{wording.clause(error.message)}. {_switch_back(plan, before)}",
            hint="See the log of that Ollama.",
        ) from error
    except BaseException:
        # Interrupted before it was known to answer.
        console.warn(_switch_back(plan, before))
        raise
    return True


def _switch_back(plan: _Plan, before: bytes | None) -> str:
    """Let the served name mean what it meant, and say whether it is listed so."""
    name = own_ollama.shown(plan.served)
    if before is None:
        own_ollama.forget(plan.folder, plan.served)
        return f"It meant nothing before, and means nothing now: {name} is gone."
    place_manifest(plan.folder, plan.served, before)
    sha256 = hashlib.sha256(before).hexdigest()
    try:
        plan.ollama.require_listed(plan.served, sha256)
    except FleetError as error:
        return (
            f"{name} was switched back to {sha256[:12]}, which could not be seen: "
            f"{wording.clause(error.message)}."
        )
    return f"{name} was switched back to {_known_as(plan, before)}."


def _keep(plan: _Plan, before: bytes | None) -> None:
    """Give what somebody else had put under the name another one: Ollama would remove its files."""
    if before is None or _versions_of(plan, before):
        return
    digest = hashlib.sha256(before).hexdigest()
    place_manifest(
        plan.folder, replace(plan.served, tag=f"{_BEFORE}{digest[:SHORT_CHARACTERS]}"), before
    )


def _versions_of(plan: _Plan, data: bytes) -> list[ModelName]:
    return [
        name
        for name in own_ollama.tags_of(plan.folder, plan.served)
        if own_ollama.meaning(plan.folder, name) == data
    ]


def _known_as(plan: _Plan, data: bytes) -> str:
    names = _versions_of(plan, data)
    return own_ollama.shown(names[-1]) if names else hashlib.sha256(data).hexdigest()[:12]


def _before(plan: _Plan) -> str | None:
    """Say what the served name means now."""
    data = own_ollama.meaning(plan.folder, plan.served)
    return None if data is None else _known_as(plan, data)


def _back(plan: _Plan, meant: bytes) -> str | None:
    """
    Say the command that serves again what the name meant, by the id of its release.

    Options are those that were typed; where they mean another quant of that release, that one is
    named. What the registry does not have now it could not serve, so nothing is said of it.
    """
    ours = [tag for name in _versions_of(plan, meant) if _is_ours(tag := name.tag)]
    if not ours:
        return None
    type_, _, id12 = ours[-1].rpartition("-")
    model, typed = plan.release.model, plan.typed
    try:
        id_, release, _ = resolve(plan.store, model, id12, plan.ledger)
    except FleetError:
        return None
    what = [("--host", typed.host), ("--quant", typed.quant)]
    with contextlib.suppress(FleetError):
        if _type_of(release, id_, typed.host, typed.quant).lower() == type_:
            type_ = ""
    if type_:
        named = next((each.type for each in release.quants if each.type.lower() == type_), None)
        if named is None:
            return None
        what = [("--quant", named)]
    registry = None if plan.store.name == params.LOCAL_REGISTRY else plan.store.name
    words = ["fleet", "serve", f"{model}@{short(id_)}"]
    for option, value in (
        ("--from", registry),
        *what,
        ("--models-dir", typed.models_dir),
        ("--url", typed.url),
        ("--name", typed.name),
    ):
        if value is not None:
            words += [option, str(value)]
    return shlex.join(words)


def _is_ours(tag: str) -> bool:
    return bool(_OURS.fullmatch(tag)) and not tag.startswith(_BEFORE)


def _remove_older(plan: _Plan) -> tuple[str, ...]:
    """
    Remove the names of older releases than the last few, with the files that nothing else needs.

    What is in memory stays: somebody is using it by that name. A failure is only told.
    """
    with contextlib.suppress(FleetError):
        # By the releases that there are: a tag of the operator's may look like one of ours.
        releases = {short(id_) for id_ in plan.store.list_releases(plan.release.model)}
        return _remove(plan, releases)
    return ()


def _remove(plan: _Plan, releases: set[str]) -> tuple[str, ...]:
    """Remove the names of these releases but the last few."""
    ours = [
        name
        for name in own_ollama.tags_of(plan.folder, plan.served)
        if _is_ours(name.tag) and name.tag.rpartition("-")[2] in releases
    ]
    older = [name for name in ours if name != plan.versioned][: -(KEPT_COUNT - 1)]
    removed = []
    with contextlib.suppress(ServingError):
        used = {entry["name"] for entry in plan.ollama.loaded()}
        for name in older:
            if str(name) in used:
                continue
            try:
                plan.ollama.remove(name)
            except ServingError as error:
                console.warn(f"an older release stays: {error.message}")
                break
            removed.append(own_ollama.shown(name))
    return tuple(removed)


def _unload(plan: _Plan, replaced: tuple[str, ...]) -> None:
    """Have wrong bytes taken out of memory: what was loaded from them would answer for the new."""
    for entry in plan.ollama.loaded():
        with contextlib.suppress(ParamsError):
            name = own_ollama.name_of(str(entry["name"]))
            data = own_ollama.meaning(plan.folder, name)
            if data is None or any(sha256 in data.decode(errors="replace") for sha256 in replaced):
                plan.ollama.unload(name)


# --- blobs ------------------------------------------------------------------------------------


@dataclass
class _Placed:
    """What was brought: all of it, what of it are links, and what was wrong before."""

    bytes: int = 0
    linked_bytes: int = 0
    replaced: tuple[str, ...] = ()


def _place_blobs(plan: _Plan) -> _Placed:
    """
    Bring every blob to where Ollama looks for it; one that is there is hashed, too.

    Raises:
        DigestError: The registry gave other bytes. Nothing of them has a name.
        MachineError: The disk is full.
    """
    placed = _Placed()
    total_bytes = sum(file.size_bytes for file in plan.files)
    label = f"placing {registries.shown(plan.release.model, plan.id)}"
    with disk.explained(plan.folder), Progress(label, total_bytes) as progress:
        for file in plan.files:
            _place(plan, file, placed, progress.of(file.name, file.size_bytes))
    return placed


def _place(plan: _Plan, file: ReleaseFile, placed: _Placed, on_bytes: OnBytes) -> None:
    target = blob_path(plan.folder, file.sha256)
    rotten = target.is_file()
    if rotten:
        if _sha256(target, on_bytes) == file.sha256:
            return
        console.warn(
            f"{target} has other bytes than its name says; Ollama, which hashes nothing, serves "
            "them."
        )
    try:
        linked = _link(plan, file, target, on_bytes)
        if not linked:
            read_to(plan.store, plan.release.model, file, target, on_bytes)
            # Ollama may run as another user, and our umask is not made for it.
            target.chmod(target.stat().st_mode | 0o444)
    except DigestError as error:
        if rotten:
            raise _rotten_twice(plan, file, target) from error
        raise
    if rotten:
        console.warn(f"{target} was replaced.")
        placed.replaced += (file.sha256,)
    placed.linked_bytes += file.size_bytes if linked else 0
    placed.bytes += file.size_bytes


def _rotten_twice(plan: _Plan, file: ReleaseFile, target: Path) -> DigestError:
    """
    Say that neither Ollama's folder nor the registry has the file, and what to do.

    Only a link to the registry's own file that no name in Ollama needs is removed: that was placed
    by us for nobody. What a name needs stays, since without it that name could not be asked at all.
    """
    source = _local_file(plan.store, file.sha256)
    ours = source is not None and source.is_file() and source.samefile(target)
    users = own_ollama.users_of(plan.folder, file.sha256)
    if ours and not users:
        target.unlink()
        fate = "The file in Ollama's folder was removed: no name there needed it."
    elif users:
        needs = "needs" if len(users) == 1 else "need"
        fate = f"It was left there, since {', '.join(users)} {needs} it: what they answer is wrong."
    else:
        fate = "It was left there; no name there needs it."
    there = source if source is not None and source.is_file() else "that file there"
    return DigestError(
        f"{plan.store.shown} has other bytes under {file.name} than its sha256 {file.sha256} says, "
        f"and so has {target}{', which is the same file by a hard link' if ours else ''}. No byte "
        f"of it was placed, and nothing was switched. {fate}",
        hint=f"`fleet verify-registry {plan.store.name}` names what else is wrong. Remove {there} "
        "and publish again from a copy that is right, or serve from another registry (--from "
        "NAME): serving then replaces the file in Ollama's folder.",
    )


def _link(plan: _Plan, file: ReleaseFile, target: Path, on_bytes: OnBytes) -> bool:
    """
    Link a blob of a registry in a directory, hashed under the name that it is linked by.

    Returns:
        False if it cannot be linked: another file system, another kind of registry.

    Raises:
        DigestError: The registry has other bytes under that name.
    """
    source = _local_file(plan.store, file.sha256)
    if source is None:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    # Of this process alone: whoever serves another name from the same files links them, too.
    part = target.with_name(f".{target.name}.{os.getpid()}.link.part")
    part.unlink(missing_ok=True)
    try:
        part.hardlink_to(source)
    except OSError:
        return False
    try:
        found = _sha256(part, on_bytes)
        if found != file.sha256:
            raise DigestError(
                f"{plan.store.shown} has other bytes under {file.name}: sha256 {found} instead of "
                f"{file.sha256}. Nothing of them was placed.",
                hint=f"`fleet verify-registry {plan.store.name}` names everything there that is not"
                " what it should be.",
            )
        if not part.stat().st_mode & 0o004:
            return False
        part.replace(target)
    finally:
        # rename(2) does nothing, and keeps both names, where they are links to one file already.
        part.unlink(missing_ok=True)
    return True


def _local_file(store: Store, sha256: str) -> Path | None:
    """Where a registry in a directory keeps a blob; None of any other."""
    from pipelines.stores.local import LocalStore  # noqa: PLC0415 - what was opened is loaded

    inner = getattr(store, "blobs", store)
    return inner.root / "blobs/sha256" / sha256 if isinstance(inner, LocalStore) else None


def _sha256(path: Path, on_bytes: OnBytes) -> str:
    found = hashlib.sha256()
    done_bytes = 0
    for chunk in _chunks(path):
        found.update(chunk)
        done_bytes += len(chunk)
        on_bytes(done_bytes)
    return found.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as opened:
        while chunk := opened.read(_MIB):
            yield chunk


# --- what was done ----------------------------------------------------------------------------


def _result(plan: _Plan, before: str | None, answer: Answer | None) -> ServeResult:
    return ServeResult(
        model=plan.release.model,
        release=plan.id,
        type=plan.type,
        name=own_ollama.shown(plan.served),
        versioned_name=own_ollama.shown(plan.versioned),
        manifest_sha256=plan.sha256,
        gguf_sha256=plan.gguf.sha256,
        url=plan.ollama.url,
        models_dir=str(plan.folder),
        before=before,
        back=None,
        switched=False,
        placed_bytes=0,
        linked_bytes=0,
        replaced=(),
        context_tokens=answer.context_tokens if answer else plan.release.context_tokens,
        memory_mib=round(answer.size_bytes / _MIB, 3) if answer else None,
        vram_mib=round(answer.size_vram_bytes / _MIB, 3) if answer else None,
        removed=(),
        dry_run=False,
    )


def sentence(result: ServeResult) -> str:
    """Say what was done, in a few lines."""
    what = f"{registries.shown(result.model, result.release)} ({result.type})"
    before = f", which means {result.before}" if result.before else ""
    size = shown_size(result.placed_bytes)
    if result.dry_run:
        verb = "switch" if result.switched else "leave"
        return (
            f"Would place {size} in {result.models_dir} and {verb} {result.name}{before}"
            f"{f' to {what}' if result.switched else ''} at {result.url}."
        )
    lines = []
    if result.switched:
        origin = f"; before it meant {result.before}" if result.before else ""
        lines.append(f"{result.name} is {what} now{origin}.")
    else:
        lines.append(f"{result.name} is {what} already: nothing was switched.")
    if result.placed_bytes:
        linked = ", hard links" if result.linked_bytes == result.placed_bytes else ""
        lines.append(f"  placed   {size}{linked} in {result.models_dir}")
    lines.append(
        f"  answers  at {result.url} with {result.context_tokens:,} tokens of context, "
        f"digest {result.manifest_sha256[:12]}"
    )
    if result.memory_mib:
        on_card = (
            f", {wording.number(result.vram_mib)} MiB of it on a GPU" if result.vram_mib else ""
        )
        lines.append(f"  memory   {wording.number(result.memory_mib)} MiB{on_card}")
    if result.removed:
        lines.append(f"  removed  {', '.join(result.removed)}")
    if result.back:
        lines.append(f"  back     {result.back}")
    lines.append(
        f"  remove   `ollama rm {result.versioned_name}`, when this release is served by no name"
    )
    return "\n".join(lines)
