"""
Fetch: the bytes of one pinned revision, every one of them verified, in work/<model>/source/.

A source is `path:` a directory of the checkout or `hf:owner/repo`. Of either, only the files that
a build reads are taken, by an allow-list of names: weights in safetensors, configuration,
tokenizer, chat template, card and licence. Code and pickles never are, so there is nothing that a
later tool could run, and a model that is said to need code of its own is refused unless the
operator wants it without. Small files come first: a model that nobody converts is refused before
its weights are touched.

The directory appears under its name only when all of it is there and right. What of it is here
already, of a fetch that was killed or of another revision, is not transferred again
(`pipelines.fetch_downloads`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import stat
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

from pipelines import (
    architectures,
    atomic,
    console,
    disk,
    dvc_state,
    fetch_downloads,
    hashing,
    records,
    safetensors_header,
    toolchain,
    wording,
)
from pipelines.errors import DigestError, UpstreamError
from pipelines.hashing import Digests
from pipelines.hub import HubRepo, RemoteFile
from pipelines.hub_download import QUICK, Patience

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pipelines.hub import Gate
    from pipelines.layout import Layout
    from pipelines.params import Fetch, FetchSlice
    from pipelines.safetensors_header import Checkpoint

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
WEIGHTS: Final = "model*.safetensors"

# Whatever the converter, its tokenizers or a published card may read, at the top of a repository.
# Nothing here is executed by anybody: no *.py, no pickle.
SMALL_FILES: Final = (
    CONFIG, INDEX, "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.tiktoken",
    "rwkv_vocab_*.txt", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "modules.json",
    "README.md", "LICENSE", "LICENSE.*", "LICENCE", "LICENCE.*", "NOTICE", "NOTICE.*",
)  # fmt: skip
# How an encoder makes one vector of many, where sentence-transformers writes it: without it the
# converter makes a model of which no server makes embeddings. No other subdirectory counts.
POOLING: Final = "1_Pooling/config.json"
# One of these sets is what a tokenizer is made of.
TOKENIZERS: Final = (
    ("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",),
    ("tekken.json",), ("*.tiktoken",), ("rwkv_vocab_*.txt",),
)  # fmt: skip
# Where a model says which code of its own has to be loaded.
CODE_NAMING: Final = (
    CONFIG, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "generation_config.json", "modules.json",
)  # fmt: skip
PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")

_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
# The largest tokenizer.json in use has 34 MB. A configuration that does not fit was never one.
MAX_SMALL_FILE_BYTES: Final = 128 << 20
_FICLONE: Final = 0x40049409


class Upstream(Protocol):
    """Where a model comes from."""

    def files(self) -> tuple[RemoteFile, ...]:
        """List what is there."""
        ...

    def gated(self) -> Gate | None:
        """Return how upstream guards its files; None if everybody may have them."""
        ...

    def expect(self, files: Sequence[RemoteFile]) -> Mapping[str, int]:
        """Prepare to bring files; return {name: bytes} of what is here already."""
        ...

    def bring(self, file: RemoteFile, target: Path, progress: Callable[[int], None]) -> Digests:
        """Put one file, verified as far as the listing allows, at `target`."""
        ...

    def done(self) -> None:
        """Say that everything has its final name."""
        ...

    def close(self) -> None:
        """End what the source still does."""
        ...


@dataclass(frozen=True)
class LocalDirectory:
    """A directory of the operator's, which is only ever read."""

    path: Path

    def files(self) -> tuple[RemoteFile, ...]:
        """
        List the regular files at the top of the directory, and what an encoder has below.

        Raises:
            UpstreamError: It is no directory, or a file that a build needs is a link out of it or
                no regular file.
        """
        if not self.path.is_dir():
            raise UpstreamError(
                f"{self.path} is no directory.",
                hint="`path:` names a directory with the files of a model, from the repository on.",
            )
        found = []
        with disk.explained(self.path):
            names = sorted(path.name for path in self.path.iterdir())
            if (self.path / POOLING).exists():
                names.append(POOLING)
        for name in names:
            wanted = _is_wanted(name)
            if not wanted and not _matches(name, ("*.safetensors", *PICKLES)):
                continue
            status = self._resolved(name).stat()
            if stat.S_ISREG(status.st_mode):
                found.append(RemoteFile(name=name, size_bytes=status.st_size))
            elif wanted:
                raise UpstreamError(f"{self.path / name} is no regular file.")
        return tuple(found)

    def gated(self) -> None:
        """Nobody guards what lies in the checkout."""

    def expect(self, _files: Sequence[RemoteFile]) -> Mapping[str, int]:
        """Nothing is here of a copy that was not made yet."""
        return {}

    def done(self) -> None:
        """Nothing was kept."""

    def close(self) -> None:
        """Nothing is open."""

    def bring(self, file: RemoteFile, target: Path, progress: Callable[[int], None]) -> Digests:
        """
        Copy one file and hash it in the same pass; on a file system with reflinks, clone it.

        A hard link would be cheaper and wrong: DVC makes what it tracks read-only, and the
        operator's next edit of the original would change the fleet's bytes.
        """
        with self._resolved(file.name).open("rb", buffering=0) as source:
            return copy_file(source, target, progress)

    def _resolved(self, name: str) -> Path:
        """Follow links as long as they stay inside."""
        try:
            resolved = (self.path / name).resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise UpstreamError(f"{self.path / name} is a broken link.") from error
        if not resolved.is_relative_to(self.path.resolve()):
            raise UpstreamError(
                f"{self.path / name} is a link out of its directory.",
                hint=f"Copy the files themselves: cp -rL {self.path} ...",
            )
        return resolved


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What the verified files of a model say about it."""

    architecture: str
    license: str | None
    gated: Gate | None
    checkpoint: Checkpoint
    digests: Mapping[str, Digests]


def run(slice_: FetchSlice, at: Layout) -> records.FetchRecord:
    """
    Bring the declared revision of a model to work/<model>/source/.

    Raises:
        UpstreamError: The source is gone, gated, incomplete, of an unsupported architecture,
            quantized already, or without weights in safetensors.
        RetryLaterError: It cannot be reached now.
        DigestError: Bytes differ from what is declared or listed. Nothing was kept.
        MachineError: The disk is too small, said before the first byte.
    """
    source = _source(slice_, at)
    if isinstance(source, LocalDirectory):
        source.files()  # what is missing is said before a toolchain is built
    tools = toolchain.load(at)
    fetched = fetch(
        source,
        at.source(slice_.model),
        label=f"fetch {slice_.model}",
        known_architectures=architectures.supported(tools.converter),
        llama_cpp_commit=tools.commit,
        revision=slice_.revision if slice_.source.startswith("path:") else None,
        ignore_code=slice_.ignore_code,
    )
    directory = at.source(slice_.model)
    md5s = {directory / name: digests.md5 for name, digests in fetched.digests.items()}
    fetch_downloads.drop_rotted(at, md5s)
    dvc_state.remember_all(md5s)
    return records.FetchRecord(
        model=slice_.model,
        source=slice_.source,
        revision=slice_.revision,
        architecture=fetched.architecture,
        license=fetched.license,
        gated=fetched.gated,
        parameters_count=fetched.checkpoint.parameters_count,
        dtypes=fetched.checkpoint.dtypes,
        size_bytes=sum(digests.size_bytes for digests in fetched.digests.values()),
        files=tuple(
            records.FileDigest(
                name=name,
                size_bytes=digests.size_bytes,
                sha256=digests.sha256,
                md5=digests.md5,
            )
            for name, digests in sorted(fetched.digests.items())
        ),
    )


def upstream(source: str, revision: str, at: Layout) -> Upstream:
    """Open a declared source for a question on the way, which must not take long."""
    kind, _, place = source.partition(":")
    if kind == "hf":
        return HubRepo(place, revision, patience=QUICK)
    return LocalDirectory(at.root / place)


def patience_of(declared: Fetch) -> Patience:
    """Take over how patient a download is declared to be."""
    return Patience(
        deadline_s=declared.deadline_minutes * 60.0,
        min_rate_bytes_s=declared.min_rate_kib_s * 1024.0,
        stall_s=float(declared.stall_seconds),
    )


def _source(slice_: FetchSlice, at: Layout) -> Upstream:
    """
    Open the source of a stage.

    How patient it is stands in the declaration and not in the slice: it changes no byte, so that no
    edit of it lets a model be fetched again.
    """
    kind, _, place = slice_.source.partition(":")
    if kind != "hf":
        return LocalDirectory(at.root / place)
    from pipelines import declaration  # noqa: PLC0415 - it reads this module

    declared = declaration.load(at.params) if at.params.exists() else None
    return HubRepo(
        place,
        slice_.revision,
        downloads=fetch_downloads.Downloads(
            at, slice_.model, slice_.source, slice_.revision, declared=declared
        ),
        patience=None if declared is None else patience_of(declared.fetch),
    )


def fetch(  # noqa: PLR0913 - each is one independent fact, named at the call
    source: Upstream,
    into: Path,
    *,
    label: str,
    known_architectures: frozenset[str],
    llama_cpp_commit: str,
    revision: str | None,
    ignore_code: bool = False,
) -> Fetched:
    """
    Bring what a build needs from `source` to the directory `into`, whole or not at all.

    Args:
        source: Where it comes from.
        into: Directory that will hold exactly the files taken.
        label: Begins the progress line.
        known_architectures: What the converter knows.
        llama_cpp_commit: Its commit, for messages.
        revision: The content digest that the files must have; None where the listing has digests
            of its own.
        ignore_code: Take the model without the code that it is said to need.

    Raises:
        UpstreamError, RetryLaterError, DigestError, MachineError: See `run`.
    """
    try:
        fetched = _fetch(
            source,
            into,
            label=label,
            known_architectures=known_architectures,
            llama_cpp_commit=llama_cpp_commit,
            revision=revision,
            ignore_code=ignore_code,
        )
        source.done()
    finally:
        source.close()
    return fetched


def _fetch(  # noqa: PLR0913 - see fetch
    source: Upstream,
    into: Path,
    *,
    label: str,
    known_architectures: frozenset[str],
    llama_cpp_commit: str,
    revision: str | None,
    ignore_code: bool,
) -> Fetched:
    listing = source.files()
    small, weights = _small_files(listing), _matching_weights(listing)
    # The index, which is not here yet, may name weights that no pattern of ours matches.
    here = source.expect((*small, *_possible_weights(listing)))
    missing_bytes = sum(file.size_bytes - here.get(file.name, 0) for file in (*small, *weights))
    disk.require(into, missing_bytes, label)
    with (
        atomic.replacing(into) as part,
        console.Progress(label, total=missing_bytes, unit="bytes") as progress,
    ):
        part.mkdir()
        bringer = _Bringer(source, part, progress, here)
        bringer.bring(small)
        config = read_config(part)
        architecture = architectures.require_supported(
            config, known_architectures, llama_cpp_commit
        )
        require_buildable(part, listing, ignore_code=ignore_code)
        shards = _shards(listing, part)
        disk.require(
            part, sum(shard.size_bytes - here.get(shard.name, 0) for shard in shards), label
        )
        bringer.bring(shards)
        checkpoint = _checkpoint(part, shards)
        if revision is not None:
            _require_revision(revision, bringer.digests)
        return Fetched(
            architecture=architecture,
            license=license_of(part, config),
            gated=source.gated(),
            checkpoint=checkpoint,
            digests=bringer.digests,
        )


def require_buildable(
    directory: Path, listing: Sequence[RemoteFile], *, ignore_code: bool = False
) -> None:
    """
    Refuse what no build can be made of, by the small files that say so (`CODE_NAMING`).

    Args:
        directory: Holds them.
        listing: Of the source.
        ignore_code: Take the model without the code that it is said to need.

    Raises:
        UpstreamError: It is quantized already, needs code of its repository, has no tokenizer, or
            pools its vectors as a file says that is not fetched.
    """
    _require_unquantized(read_config(directory))
    if not ignore_code:
        _require_no_code(directory)
    _require_tokenizer([file.name for file in _small_files(listing)])
    _require_pooling(directory)


def weights(listing: Sequence[RemoteFile], directory: Path) -> list[RemoteFile]:
    """
    Return the files of a listing that hold the weights.

    Args:
        listing: Of the source.
        directory: Holds its index, if it has one.

    Raises:
        UpstreamError: There are none in safetensors; says what there is instead. Or the index names
            a file that is not there.
    """
    _matching_weights(listing)
    return _shards(listing, directory)


def content_digest(directory: Path) -> str:
    """
    Return the `revision` of a `path:` source: a name for exactly the files that fetch takes of it.

    It is the first 40 hex digits of the sha256 over one line for each file, sorted by name:
    `<sha256>  <name>`, as `sha256sum` prints them. Card and licence count, too: their front matter
    is copied into the GGUF's metadata and decides under which licence it is published, so a
    revision that left them out would name several different builds. Everything else in the
    directory (scripts, notes, optimizer states) does not count.

    Raises:
        UpstreamError: Files that a build needs are missing or cannot be taken.
    """
    source = LocalDirectory(directory)
    listing = source.files()
    files = (*_small_files(listing), *_shards(listing, directory))
    return _digest_of({file.name: hashing.digest(directory / file.name) for file in files})


def revision_flaw(directory: Path, revision: str, known: records.FetchRecord | None) -> str:
    """
    Say that a directory is not the declared revision, as far as a look may take time for it.

    Up to 256 MiB, half a second, the files are hashed. Larger ones are held by name and size
    against what was fetched of this revision, if anything was; their bytes are left to fetch, which
    reads them all the same and before anything else.

    Args:
        directory: Directory of a `path:` source.
        revision: What is declared.
        known: The record of what was fetched last, if there is one.

    Returns:
        The flaw and what to write; nothing if there is none, or if the directory is no source that
        can be fetched, which fetch says in its own words.
    """
    source = LocalDirectory(directory)
    try:
        listing = source.files()
        files = (*_small_files(listing), *_shards(listing, directory))
        if sum(file.size_bytes for file in files) <= dvc_state.WORTH_BYTES:
            found = content_digest(directory)
            told = f"{_other_revision(revision, found)} If you mean the new contents, write: "
            return "" if found == revision else f"{told}revision: {found}"
    except UpstreamError:
        return ""
    if known is None or known.revision != revision:
        return ""
    now = {file.name: file.size_bytes for file in files}
    then = {file.name: file.size_bytes for file in known.files}
    odd = sorted(name for name in now.keys() | then if now.get(name) != then.get(name))
    if not odd:
        return ""
    return (
        f"the files are not the declared ones: {wording.first_few(odd)} of revision {revision} had "
        f"another size or was not there. If you mean the new contents, write what this prints: "
        f"fleet digest {directory}"
    )


def size_of(source: str, revision: str, at: Layout) -> disk.Size:
    """
    Ask a source how large the model is, without bringing more of it than its config.json.

    Weights whose headers are not at hand count as 16-bit, so that the answer is an upper bound.

    Raises:
        UpstreamError: The source is not there, or has no weights in safetensors.
        RetryLaterError: It cannot be asked now.
    """
    with closing(upstream(source, revision, at)) as opened:
        return _size_of(opened, at)


def _size_of(opened: Upstream, at: Layout) -> disk.Size:
    listing = opened.files()
    weights = _matching_weights(listing)
    weights_bytes = sum(file.size_bytes for file in weights)
    parameters_count = weights_bytes // 2
    if isinstance(opened, LocalDirectory):
        checkpoint = _checkpoint(opened.path, _shards(listing, opened.path))
        parameters_count = checkpoint.parameters_count
    small = _small_files(listing)
    here: Mapping[str, int] = {}
    if not isinstance(opened, LocalDirectory):
        here = fetch_downloads.present(at, (*small, *weights), fetch_downloads.Known(at))
    return disk.Size(
        source_bytes=sum(file.size_bytes for file in small) + weights_bytes,
        parameters_count=parameters_count,
        vocabulary_tokens=_vocabulary_tokens_of(opened, small),
        here_bytes=sum(here.values()),
    )


def _vocabulary_tokens_of(source: Upstream, small: Sequence[RemoteFile]) -> int | None:
    """Return the size of the vocabulary by the one small file that tells it."""
    if isinstance(source, LocalDirectory):
        return vocabulary_tokens(source.path)
    config = next((file for file in small if file.name == CONFIG), None)
    if config is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        source.bring(config, Path(directory) / CONFIG, lambda _: None)
        return vocabulary_tokens(Path(directory))


def vocabulary_tokens(directory: Path) -> int | None:
    """Return the tokens that a model of this directory predicts; None if its config hides that."""
    try:
        config = read_config(directory)
    except (UpstreamError, OSError):
        return None
    inner = config.get("text_config")
    counts = [each.get("vocab_size") for each in (config, inner) if isinstance(each, dict)]
    return max((count for count in counts if isinstance(count, int)), default=None)


def read_config(directory: Path) -> dict[str, Any]:
    """
    Read config.json.

    Raises:
        UpstreamError: It is missing, or no JSON object.
    """
    try:
        config = json.loads((directory / CONFIG).read_bytes())
    except FileNotFoundError:
        raise UpstreamError(
            f"{CONFIG} is missing: this is no model of transformers' layout.",
            hint="Declare the repository or directory that holds config.json and the weights.",
        ) from None
    except (ValueError, RecursionError) as error:
        raise UpstreamError(f"{CONFIG} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UpstreamError(f"{CONFIG} is no JSON object.")
    return config


def license_of(directory: Path, config: Mapping[str, Any]) -> str | None:
    """
    Return the licence that a model declares, as the Hub spells it (`apache-2.0`), or None.

    The card's front matter counts first, then config.json, then the first lines of LICENSE where
    they are one of the common ones. The front matter is searched, not parsed: it is somebody
    else's YAML, and one line of it is all that we want.
    """
    card = directory / "README.md"
    if card.is_file():
        front = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
        for key in ("license_name", "license"):
            found = re.search(rf"(?m)^{key}:\s*[\"']?([A-Za-z0-9][A-Za-z0-9._-]{{0,99}})", front)
            if front.startswith("---") and found and found[1] != "other":
                return found[1]
    declared = config.get("license")
    if isinstance(declared, str) and _SAFE_NAME.fullmatch(declared):
        return declared
    for path in sorted(directory.glob("LICEN[SC]E*")):
        start = " ".join(path.read_text(encoding="utf-8", errors="replace")[:2000].split())
        for words, name in (
            ("Apache License Version 2.0", "apache-2.0"),
            ("MIT License", "mit"),
            ("Creative Commons Attribution 4.0", "cc-by-4.0"),
        ):
            if words in start:
                return name
    return None


def copy_file(source: IO[bytes], target: Path, progress: Callable[[int], None]) -> Digests:
    """Copy an open file to `target`, hashing the very bytes that are written."""
    with target.open("xb", buffering=0) as file:
        if _clone(source, file):
            return hashing.digest(target, progress=progress)
        sha256 = hashlib.sha256()
        md5 = hashlib.md5(usedforsecurity=False)
        size_bytes = 0
        while chunk := source.read(hashing.CHUNK_BYTES):
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
            sha256.update(chunk)
            md5.update(chunk)
            size_bytes += len(chunk)
            progress(size_bytes)
    return Digests(size_bytes=size_bytes, sha256=sha256.hexdigest(), md5=md5.hexdigest())


def _clone(source: IO[bytes], target: IO[bytes]) -> bool:
    """Share the blocks of `source` (btrfs, xfs, bcachefs); False where that is not possible."""
    with suppress(OSError):
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        return True
    return False


class _Bringer:
    """Brings files one after another, and keeps their digests and the sum for the progress line."""

    def __init__(
        self, source: Upstream, into: Path, progress: console.Progress, here: Mapping[str, int]
    ) -> None:
        self.digests: dict[str, Digests] = {}
        self._source = source
        self._into = into
        self._progress = progress
        self._here = here
        self._done_bytes = 0

    def bring(self, files: Sequence[RemoteFile]) -> None:
        """Bring files; the source verifies what it can."""
        for file in files:
            self.digests[file.name] = self._bring(file)
            self._done_bytes += file.size_bytes - self._here.get(file.name, 0)

    def _bring(self, file: RemoteFile) -> Digests:
        started = time.monotonic()
        # What was here before takes no time that would say anything of the rest.
        here_bytes = self._here.get(file.name, 0)

        def show(size_bytes: int) -> None:
            new_bytes = max(size_bytes - here_bytes, 0)
            rate = new_bytes / 1024 / max(time.monotonic() - started, 0.001)
            shown = f"{rate / 1024:,.1f} MiB/s" if rate >= 1024 else f"{rate:,.0f} KiB/s"  # noqa: PLR2004 - KiB in a MiB
            self._progress.update(self._done_bytes + new_bytes, f"{file.name} at {shown}")

        target = self._into / file.name
        target.parent.mkdir(exist_ok=True)
        with disk.explained(target):
            return self._source.bring(file, target, show)


# --- which files ------------------------------------------------------------------------------


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_wanted(name: str) -> bool:
    return name == POOLING or _matches(name, (*SMALL_FILES, WEIGHTS))


def _small_files(listing: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Return everything but weights that a build may read: at the top, and `POOLING`."""
    files = [
        file
        for file in listing
        if file.name == POOLING or (_matches(file.name, SMALL_FILES) and "/" not in file.name)
    ]
    for file in files:
        if file.size_bytes > MAX_SMALL_FILE_BYTES:
            raise UpstreamError(
                f"{file.name} has {file.size_bytes} bytes; no such file needs more than "
                f"{MAX_SMALL_FILE_BYTES}."
            )
    _require_safe_names([file.name for file in files if file.name != POOLING])
    return sorted(files, key=lambda file: file.name)


def _matching_weights(listing: Sequence[RemoteFile]) -> list[RemoteFile]:
    """
    Return the weights as far as names alone tell, to know the sum before the first byte.

    Raises:
        UpstreamError: There are none in safetensors; says what there is instead.
    """
    weights = [file for file in listing if fnmatchcase(file.name, WEIGHTS) and "/" not in file.name]
    if weights or any(file.name == INDEX for file in listing):
        return weights
    pickles = sorted(file.name for file in listing if _matches(file.name, PICKLES))
    if pickles:
        raise UpstreamError(
            f"the weights are only there as pickles ({console.clean(', '.join(pickles[:3]))}), "
            "which can run code when they are loaded.",
            hint="Take a repository or revision with model.safetensors.",
        )
    others = sorted(file.name for file in listing if file.name.endswith(".safetensors"))
    found = f"; {console.clean(', '.join(others[:3]))} is none of them" if others else ""
    raise UpstreamError(
        f"there are no weights: neither model.safetensors nor its shards{found}.",
        hint="Weights have to be at the top of the source, in transformers' layout.",
    )


def _possible_weights(listing: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Return everything that an index could name."""
    return [
        file
        for file in listing
        if file.name.endswith(".safetensors") and _SAFE_NAME.fullmatch(file.name)
    ]


def _shards(listing: Sequence[RemoteFile], directory: Path) -> list[RemoteFile]:
    """
    Return the weights exactly: those that the index in `directory` names, or all without an index.

    Raises:
        UpstreamError: The index names a file that is not there or has no name we would write.
    """
    if not (directory / INDEX).is_file():
        shards = _matching_weights(listing)
        _require_safe_names([file.name for file in shards])
        return sorted(shards, key=lambda file: file.name)
    names = sorted(set(safetensors_header.weight_map(directory / INDEX).values()))
    _require_safe_names(names)
    by_name = {file.name: file for file in listing}
    missing = [name for name in names if name not in by_name or not name.endswith(".safetensors")]
    if missing:
        raise UpstreamError(
            f"{INDEX} names {len(missing)} shard(s) that are not there: {', '.join(missing[:5])}.",
            hint="The upload is incomplete: take another revision.",
        )
    return [by_name[name] for name in names]


def _require_safe_names(names: Sequence[str]) -> None:
    """Refuse names that mean something to a shell or a file system, or the same on some."""
    for name in names:
        if not _SAFE_NAME.fullmatch(name):
            raise UpstreamError(
                f"the source has a file with the unsafe name {name!r:.120}.",
                hint="Take another repository or revision: no honest model has such a file.",
            )
    folded: dict[str, str] = {}
    for name in names:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise UpstreamError(f"{other} and {name} are one file where case does not count.")


# --- what is in them --------------------------------------------------------------------------


def _require_tokenizer(names: Sequence[str]) -> None:
    """Refuse a model without a tokenizer; the converter would find that out only at its end."""
    for needed in TOKENIZERS:
        if all(any(fnmatchcase(name, pattern) for name in names) for pattern in needed):
            return
    wanted = ", ".join(" + ".join(needed) for needed in TOKENIZERS)
    raise UpstreamError(
        f"the tokenizer is missing: there is none of {wanted}.",
        hint="Add the tokenizer's files, or declare the base model's repository.",
    )


def _require_no_code(directory: Path) -> None:
    """
    Refuse a model that says that code of its repository has to run for it to work.

    Nobody runs it here, with this or without: a `*.py` is never fetched. But a model that needs it
    may be converted wrongly without it, which only a person can know.
    """
    for name in CODE_NAMING:
        try:
            told = json.loads((directory / name).read_bytes())
        except FileNotFoundError:
            continue
        except (ValueError, RecursionError) as error:
            raise UpstreamError(f"{name} is not JSON: {error}.") from error
        named = sorted(named_code(name, told))
        if named:
            files = sorted({f"{one.split('--')[-1].partition('.')[0]}.py" for one in named})
            raise UpstreamError(
                f"{name} names code of the repository: {console.clean(wording.first_few(named))} "
                f"({console.clean(wording.first_few(files))}). It was not fetched.",
                hint="Take a repository that works without, or, if you know that this one does, "
                "write `ignore_code: true` into the model's entry of params.yaml.",
            )


def named_code(name: str, told: object) -> Iterator[str]:
    """Yield classes that transformers or sentence-transformers would load from the repository."""
    if name == "modules.json":
        for module in told if isinstance(told, list) else ():
            type_ = str(module.get("type", "")) if isinstance(module, dict) else ""
            if type_ and not type_.startswith("sentence_transformers."):
                yield type_[:120]
        return
    declared = told.get("auto_map") if isinstance(told, dict) else None
    values = declared.values() if isinstance(declared, dict) else [declared]
    for value in values:
        for one in value if isinstance(value, list) else [value]:
            if one:
                yield str(one)[:120]


def _require_pooling(directory: Path) -> None:
    """
    Refuse an encoder whose pooling lies where it is not fetched from; the converter would crash.

    Its path is a stranger's, and the converter opens whatever it names.
    """
    try:
        modules = json.loads((directory / "modules.json").read_bytes())
        pooling = next(
            (str(each["path"]) for each in modules if str(each["type"]).endswith("Pooling")), None
        )
    except FileNotFoundError:
        return
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UpstreamError(
            f"modules.json does not list the parts of an encoder: {error}."
        ) from error
    if pooling is None:
        return
    if f"{pooling}/config.json" != POOLING or not (directory / POOLING).is_file():
        raise UpstreamError(
            f"modules.json has vectors pooled as {console.clean(pooling)[:80]}/config.json says, "
            "which is not fetched.",
            hint=f"An encoder of sentence-transformers has {POOLING}; add it to the source.",
        )


def _require_unquantized(config: Mapping[str, Any]) -> None:
    declared = config.get("quantization_config")
    if declared:
        method = declared.get("quant_method") if isinstance(declared, dict) else declared
        raise UpstreamError(
            f"config.json says that the model is quantized already ({console.clean(str(method))}).",
            hint="Take the original, unquantized repository of this model.",
        )


def _checkpoint(directory: Path, shards: Sequence[RemoteFile]) -> Checkpoint:
    index = directory / INDEX
    return safetensors_header.read_checkpoint(
        directory, [shard.name for shard in shards], index if index.is_file() else None
    )


def _digest_of(digests: Mapping[str, Digests]) -> str:
    lines = "".join(f"{digests[name].sha256}  {name}\n" for name in sorted(digests))
    return hashing.sha256_text(lines)[:40]


def _other_revision(declared: str, found: str) -> str:
    return f"the files are not the declared ones: revision {declared} is declared, {found} found."


def _require_revision(declared: str, digests: Mapping[str, Digests]) -> None:
    found = _digest_of(digests)
    if found != declared:
        raise DigestError(
            _other_revision(declared, found),
            hint=f"If you mean the new contents, set `revision: {found}`.",
        )
