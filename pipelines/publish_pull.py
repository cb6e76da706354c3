"""
Bring the files of a release from DVC's remote, for a clone without work/ that publishes.

    record and dvc.lock (git)  ->  DVC's remote  ->  work/, hashed by sha256 against the record

What was measured is promoted by digest; nothing is made here. Brought is only what the registry
does not hold: of a GGUF that is there its first bytes are enough, since a release says of it what
its header says. Whoever stores a new release has all of it read again and hashed
(`pipelines.publishing`), so that a file is believed to no registry.

DVC's md5 is what its cache calls a file, no promise: dvc.lock of one measurement beside the records
of another would bring whole files that nobody has measured.

A kill leaves what was brought in DVC's cache; the next run brings the rest.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import (
    atomic,
    console,
    disk,
    dvc_state,
    hashing,
    hub,
    proc,
    release_gates,
    verdict_evidence,
    wording,
)
from pipelines.errors import DigestError, FleetError, StoreError, ToolError
from pipelines.gguf_header import GgufError
from pipelines.gguf_header import read as read_header
from pipelines.publishing_words import shown_size
from pipelines.release_records import short

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipelines.layout import Layout
    from pipelines.params import PublishSlice
    from pipelines.records import FileDigest
    from pipelines.release_gates import Papers
    from pipelines.stores.base import Store

# How much one call of DVC brings: it says nothing before its end, and starting it takes a second.
_BATCH_BYTES: Final = 1 << 30
# More than the metadata of any GGUF: what `gguf_header` keeps of one, and as much for its arrays.
_HEADER_BYTES: Final = 128 << 20
_ANY_CODE: Final = tuple(range(256))
# How DVC says that an object is not in its remote: of a whole output, and of a file in a folder
# (dvc/repo/checkout.py; then what the file system or s3fs says).
_MISSING_WORDS: Final = (
    "missing-files",
    "Missing cache files",
    "[Errno 2] No such file",
    "specified key does not exist",
)
_TAIL_CHARACTERS: Final = 300


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One file of a release that an earlier stage made: where it belongs, and what it has to be."""

    path: Path
    digest: FileDigest
    is_gguf: bool = False
    is_text: bool = False


@dataclass(kw_only=True)
class Brought:
    """
    What was brought for one model, to be thrown away when it is published.

    Attributes:
        elsewhere: As `release.compose` takes it: files that the registry has.
        files: Those that were not here before.
        objects: Of DVC's cache, the same.
        size_bytes: Of the files together.
    """

    elsewhere: dict[str, Path] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    objects: list[Path] = field(default_factory=list)
    size_bytes: int = 0

    def discard(self) -> None:
        """Make room again: a hosted machine has less of it than a fleet has models."""
        for path in (*self.elsewhere.values(), *self.files, *self.objects):
            path.unlink(missing_ok=True)


def missing(slice_: PublishSlice, at: Layout, store: Store) -> tuple[Wanted, ...]:
    """Return the files that would have to be brought; nothing is read but sizes."""
    return tuple(
        each
        for each in _wanted(slice_, at)
        if not each.path.exists() and not (_may_stay(each) and _is_held(store, slice_, each))
    )


def bring(slice_: PublishSlice, at: Layout, store: Store, brought: Brought) -> None:
    """
    Bring what a release needs and neither this checkout nor the registry has.

    Args:
        slice_: What is declared.
        at: The checkout.
        store: The registry that it is for.
        brought: What was brought for other registries; gets what is brought here.

    Raises:
        DigestError: A file is not that of its record, or dvc.lock names another one.
        StoreError: DVC's remote does not have it.
        ToolError: DVC could not ask its remote.
        MachineError: There is no room for it.
    """
    brought.elsewhere.clear()
    needed: list[Wanted] = []
    for each in _wanted(slice_, at):
        if each.path.exists():
            _require(each, at)
        elif _may_stay(each) and _is_held(store, slice_, each):
            brought.elsewhere[each.digest.sha256] = _header(each, slice_, at, store)
        else:
            needed.append(each)
    if not needed:
        return
    _require_same_measurement(needed, at)
    total_bytes = sum(each.digest.size_bytes for each in needed)
    disk.require(at.root, 2 * total_bytes, f"the release of {slice_.model}, in DVC's cache, too,")
    at.log("publish", slice_.model).unlink(missing_ok=True)  # programs append; a log is of one run
    what = f"{wording.counted(len(needed), 'file')} of {slice_.model} ({shown_size(total_bytes)})"
    console.info(f"bringing {what} from DVC's remote")
    done_bytes = 0
    with console.Progress(f"bringing {slice_.model} from DVC's remote", total=total_bytes) as shown:
        for batch in _batches(needed):
            _bring_batch(batch, slice_, at, brought)
            done_bytes += sum(each.digest.size_bytes for each in batch)
            shown.update(done_bytes)


# --- which files ------------------------------------------------------------------------------


def _wanted(slice_: PublishSlice, at: Layout) -> tuple[Wanted, ...]:
    """Name the files of a release; none if there may be no release: that is said elsewhere."""
    evidence = verdict_evidence.collect(slice_, at)
    judged, papers = release_gates.judge(evidence), release_gates.papers_of(evidence)
    if judged.reasons or papers is None:
        return ()
    keys = {key: type_ for key, type_ in slice_.quants.items() if type_ in judged.types}
    return tuple(_files(slice_.model, keys, papers, at))


def _files(model: str, keys: Mapping[str, str], papers: Papers, at: Layout) -> Iterator[Wanted]:
    for key, type_ in keys.items():
        yield Wanted(path=at.gguf(model, key), digest=papers.quantized[type_].gguf, is_gguf=True)
    texts = release_gates.license_files(papers.fetched)
    for digest in papers.fetched.files:
        if digest.name in texts:
            yield Wanted(path=at.source(model) / digest.name, digest=digest, is_text=True)
    matrix = papers.calibrated.imatrix
    if matrix is not None and any(
        papers.quantized[type_].imatrix_sha256 for type_ in keys.values()
    ):
        yield Wanted(path=at.imatrix(model), digest=matrix)


def _may_stay(wanted: Wanted) -> bool:
    """Whether a release can be composed without the whole of a file: the Modelfile quotes texts."""
    return not wanted.is_text


def _is_held(store: Store, slice_: PublishSlice, wanted: Wanted) -> bool:
    digest = wanted.digest
    return store.blob_size(slice_.model, digest.sha256) == digest.size_bytes


def _require(wanted: Wanted, at: Layout) -> None:
    """
    Hash a file against its record.

    Raises:
        DigestError: It is another one.
    """
    found = hashing.digest(wanted.path)
    if found.sha256 == wanted.digest.sha256:
        return
    raise DigestError(
        f"{wanted.path.relative_to(at.root)} is {short(found.sha256)}, its record says "
        f"{short(wanted.digest.sha256)}: these are not the bytes that were measured.",
        hint="Remove that file and publish again; if it comes back the same, dvc.lock and results/ "
        "are of two measurements: take both from one commit.",
    )


# --- of what the registry has -----------------------------------------------------------------


def _header(wanted: Wanted, slice_: PublishSlice, at: Layout, store: Store) -> Path:
    """Read the beginning of a GGUF from the registry into a file of its size, with a hole."""
    path = at.scratch(slice_.model) / "publish" / f"{wanted.digest.sha256}.header"
    if not wanted.is_gguf:
        return path  # nothing of it is read
    with atomic.replacing(path) as part, part.open("wb") as file:
        for chunk in store.read_blob(slice_.model, wanted.digest.sha256):
            file.write(chunk)
            if file.tell() >= min(_HEADER_BYTES, wanted.digest.size_bytes):
                break
        file.truncate(wanted.digest.size_bytes)
    try:
        read_header(path)
    except GgufError as error:
        raise DigestError(
            f"{store.name} has something else under the name of {wanted.path.name}: "
            f"{error.message}",
            hint=f"fleet verify-registry {store.name}",
        ) from error
    return path


# --- of DVC -----------------------------------------------------------------------------------


def _require_same_measurement(needed: list[Wanted], at: Layout) -> None:
    """
    Hold dvc.lock against the records before anything is brought.

    Raises:
        DigestError: It names another file than the record.
    """
    locked = _locked_outs(at.root / "dvc.lock")
    for each in needed:
        name = each.path.relative_to(at.root).as_posix()
        there = locked.get(name)
        if there is not None and there != each.digest.md5:
            raise DigestError(
                f"dvc.lock names {name} by md5 {there[:12]}, its record by {each.digest.md5[:12]}: "
                "they are of two measurements. Nothing was brought.",
                hint="Take dvc.lock and results/ from one commit: that of the pull request which "
                "measured it.",
            )


def _locked_outs(lock: Path) -> dict[str, str]:
    """Return the md5 of every single file that dvc.lock holds, by its path."""
    import yaml  # noqa: PLC0415 - not at CLI start

    try:
        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        stages = yaml.load(lock.read_bytes(), loader)["stages"]  # noqa: S506 - safe
        outs = [out for stage in stages.values() for out in stage.get("outs", ())]
        return {str(out["path"]): str(out["md5"]) for out in outs if "md5" in out}
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(
            f"{lock} cannot be read ({type(error).__name__}): it says what DVC's remote calls the "
            "files that were measured.",
            hint="git checkout main -- dvc.lock; `fleet repro` writes it where it never was.",
        ) from error


def _batches(needed: list[Wanted]) -> Iterator[list[Wanted]]:
    """Put files together that one call of DVC brings; texts, which it may lack, alone."""
    yield from ([each] for each in needed if each.is_text)
    batch: list[Wanted] = []
    for each in needed:
        if each.is_text:
            continue
        if batch and sum(one.digest.size_bytes for one in (*batch, each)) > _BATCH_BYTES:
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


def _bring_batch(batch: list[Wanted], slice_: PublishSlice, at: Layout, brought: Brought) -> None:
    cache = dvc_state.cache_dir(at.root) / "files/md5"
    objects = [cache / each.digest.md5[:2] / each.digest.md5[2:] for each in batch]
    brought.objects += [path for path in objects if not path.exists()]
    brought.files += [each.path for each in batch]
    done: proc.Completed | None = None
    if not _from_repository(batch, slice_, at):
        done = _dvc_pull(_absent(batch, at), slice_.model, at)
        # DVC gives up at the first object that it cannot have: each is asked for alone then.
        for name in _absent(batch, at) if len(batch) > 1 else ():
            done = _dvc_pull([name], slice_.model, at)
    for each in batch:
        if each.is_text and not each.path.exists():
            _from_hub(each, slice_)
    lost = _absent(batch, at)
    if lost:
        assert done is not None, "what the repository gave is there"
        raise _not_brought(lost, done, slice_, at)
    for each in batch:
        _require(each, at)
        brought.size_bytes += each.digest.size_bytes


def _absent(batch: list[Wanted], at: Layout) -> list[str]:
    return [each.path.relative_to(at.root).as_posix() for each in batch if not each.path.exists()]


def _dvc_pull(names: list[str], model: str, at: Layout) -> proc.Completed:
    """Ask DVC for files; what it could not bring is seen by what is not there."""
    own_bin = str(Path(sys.executable).parent)
    env = {
        "PATH": os.pathsep.join([own_bin, os.environ.get("PATH", os.defpath)]),
        "DVC_NO_ANALYTICS": "1",
        "GITHUB_ACTIONS": "",
    }
    return proc.run(
        [sys.executable, "-m", "dvc", "pull", *names],
        cwd=at.root,
        log=at.log("publish", model),
        env=env,
        ok_codes=_ANY_CODE,
    )


def _not_brought(
    lost: list[str], done: proc.Completed, slice_: PublishSlice, at: Layout
) -> FleetError:
    said = console.clean(f"{done.stdout}\n{done.stderr}")
    log = at.log("publish", slice_.model)
    what = wording.first_few(lost)
    if any(words in said for words in _MISSING_WORDS):
        error: FleetError = StoreError(
            f"DVC's remote does not have {what}, which dvc.lock names. {slice_.model} is not "
            "published.",
            hint="On the machine that measured it: `dvc push`, then publish again. If its cache is "
            f"gone, too: `fleet repro {slice_.model}` makes the same files again.",
        )
        error.log = log
        return error
    tail = " ".join(said.split())[-_TAIL_CHARACTERS:]
    return ToolError(
        f"DVC could not bring {what}: {tail or 'it said nothing'}.",
        hint="Look at the remote of .dvc/config and at its login in the environment (AWS_* for "
        "s3), then publish again: what was brought is kept.",
        log=log,
    )


# --- texts that nobody has to send ------------------------------------------------------------


def _from_repository(batch: list[Wanted], slice_: PublishSlice, at: Layout) -> bool:
    """Take a licence text of a `path:` source from git; tell whether it was that of the record."""
    kind, _, place = slice_.source.partition(":")
    wanted = batch[0]
    there = at.root / place / wanted.digest.name
    if kind != "path" or not wanted.is_text or not there.is_file():
        return False
    if hashing.digest(there).sha256 != wanted.digest.sha256:
        return False
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(wanted.path) as part:
        shutil.copyfile(there, part)
    return True


def _from_hub(wanted: Wanted, slice_: PublishSlice) -> None:
    """Take a licence text from the pinned revision of the Hub, as `fetch` did."""
    kind, _, repo = slice_.source.partition(":")
    if kind != "hf":
        return
    digest = wanted.digest
    file = hub.RemoteFile(name=digest.name, size_bytes=digest.size_bytes, sha256=digest.sha256)
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    with closing(hub.HubRepo(repo, slice_.revision)) as source:
        source.bring(file, wanted.path, lambda _: None)
