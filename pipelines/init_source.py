"""
Look at a model before it is declared: whether the chain can build it, its sizes, its commit.

Of a repository of the Hub only small files are read, each held against the digest of its listing,
and the headers of its weights by range. A directory is read in place, without any network. What the
chain would refuse hours later is refused here, in the same words.
"""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import (
    architectures,
    at_once,
    atomic,
    console,
    dvc_state,
    fetch,
    hub_metadata,
    hyperparameters,
    params,
    safetensors_header,
    toolchain,
    verify_template,
    wording,
)
from pipelines.errors import ParamsError, RetryLaterError, UpstreamError
from pipelines.init_sizes import Shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pipelines.hub import RemoteFile
    from pipelines.hub_metadata import Head, HubReader
    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.safetensors_header import Tensor

_NOT_TEXT: Final = re.compile(
    r"(^|\.)(vision|visual|audio|multi_modal_projector|mm_projector)|vision_|audio_"
)
# For all questions to the Hub together. A model of 400 billion weights has some 190 headers.
DEADLINE_S: Final = 120.0
_MAX_HEADER_BYTES: Final = 16 << 20
_COMMIT: Final = re.compile(params.REVISION)
# Small files that say what a model is, beside those that name code.
_READ: Final = (
    *fetch.CODE_NAMING, fetch.INDEX, fetch.POOLING, "README.md", "LICENSE", "LICENCE",
    "LICENSE.txt", "LICENSE.md", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# GitHub refuses a file of more; a repository of models on it is no place for weights.
_GITHUB_MAX_BYTES: Final = 100 << 20


@dataclass(frozen=True, kw_only=True)
class Subject:
    """
    A model as it will be declared.

    Attributes:
        source: As params.yaml has it.
        revision: 40 hex digits.
        track: Branch to follow; None: main, or nothing to follow.
        architecture: Class in config.json.
        license: As upstream declares it; None if it does not.
        is_gated: Whether its files are for those only who agreed to its terms.
        source_bytes: Weights that will be fetched.
        trained_tokens: Context that it was trained with; None if config.json does not say.
        has_template: Whether it brings a chat template.
        shape: What decides its sizes.
        notes: What the operator should know, in sentences.
    """

    source: str
    revision: str
    track: str | None
    architecture: str
    license: str | None
    is_gated: bool
    source_bytes: int
    trained_tokens: int | None
    has_template: bool
    shape: Shape
    notes: tuple[str, ...]

    @property
    def is_encoder(self) -> bool:
        """Whether it makes embeddings rather than text."""
        return self.shape.is_encoder


@dataclass(frozen=True, kw_only=True)
class _Files:
    """What was read of a source: its listing, a directory with its small files, its tensors."""

    listing: Sequence[RemoteFile]
    directory: Path
    tensors: Sequence[Tensor]


def look(  # noqa: PLR0913 - each is one independent fact, named at the call
    source: str,
    revision: str | None,
    at: Layout,
    declared: Declaration,
    *,
    ignore_code: bool,
    digests: bool = True,
) -> Subject:
    """
    Look at a model.

    Args:
        source: As it was typed.
        revision: Branch, tag or commit of the Hub; None: main.
        at: The checkout, for a `path:`.
        declared: What is declared now; its toolchain says what can be converted.
        ignore_code: Take the model without the code that it is said to need.
        digests: Compute the revision of a directory, which takes seconds for each GiB; without it
            the revision is empty, and all else is looked at.

    Raises:
        ParamsError: It is no source, or `revision` does not go with it.
        UpstreamError: The chain cannot build it; says why.
        RetryLaterError: The Hub cannot be reached.
    """
    kind, _, place = source.partition(":")
    if kind == "path" and place:
        if revision:
            raise ParamsError(
                "`--revision` is for the Hub: that of a directory is the digest of its files.",
                hint="Leave it out.",
            )
        name = below(at.root, place)
        return _directory(name, at, declared, ignore_code=ignore_code, digests=digests)
    require_source(source, at)
    return _repository(place, revision or "main", declared, ignore_code=ignore_code)


def require_source(source: str, at: Layout) -> None:
    """
    Refuse what is neither a repository of the Hub nor a directory with weights.

    Nobody is asked whether the repository exists.

    Raises:
        ParamsError: It is no source; says which was meant.
        UpstreamError: The directory is none, or holds no weights in safetensors.
    """
    if re.match(r"path:.", source):
        folder = at.root / below(at.root, source.removeprefix("path:"))
        listing = fetch.LocalDirectory(folder).files()
        _require_safetensors(source, [path.name for path in folder.iterdir()])
        fetch.weights(listing, folder)
        return
    if re.fullmatch(params.SOURCE, source):
        return
    raise ParamsError(
        f"{wording.quoted(source)} is no source of a model.",
        hint=f"Say {_meant(source)}, or path:models/my-model for a directory of this repository.",
    )


def _meant(source: str) -> str:
    """Guess the source that was meant: an address, or a name without `hf:`."""
    found = re.search(r"(?:^|huggingface\.co/)([\w.-]+/[\w.-]+)", source)
    repo = found[1] if found and re.fullmatch(params.SOURCE, f"hf:{found[1]}") else "owner/repo"
    return f"hf:{repo}"


def below(root: Path, typed: str) -> str:
    """
    Return a directory as params.yaml names it: from the root of the repository.

    Raises:
        ParamsError: It is not in the repository, or has a name that is not allowed.
    """
    base = root.resolve()
    path = Path(typed)
    path = (path if path.is_absolute() else base / path).resolve()
    name = path.relative_to(base).as_posix() if path.is_relative_to(base) else ""
    if not re.fullmatch(params.RELATIVE_PATH, name) or name == ".":
        what = "is not a directory below this repository" if name in {"", "."} else "is no name: "
        allowed = "" if name in {"", "."} else params.PATTERN_WORDS[params.RELATIVE_PATH]
        raise ParamsError(
            f"path:{console.clean(typed)} {what}{allowed}.",
            hint="Put the model's files in a folder here, such as models/my-model.",
        )
    return name


# --- a directory ------------------------------------------------------------------------------


def _directory(
    name: str, at: Layout, declared: Declaration, *, ignore_code: bool, digests: bool
) -> Subject:
    folder = at.root / name
    listing = fetch.LocalDirectory(folder).files()
    _require_safetensors(f"path:{name}", [path.name for path in folder.iterdir()])
    shards = fetch.weights(listing, folder)
    index = folder / fetch.INDEX
    checkpoint = safetensors_header.read_checkpoint(
        folder, [shard.name for shard in shards], index if index.is_file() else None
    )
    files = _Files(listing=listing, directory=folder, tensors=checkpoint.tensors)
    size_bytes = sum(file.size_bytes for file in shards)
    if digests and size_bytes >= dvc_state.WORTH_BYTES:
        console.step(f"digest of path:{name}, {wording.mib(size_bytes / 2**20)}")
    large = [file.name for file in shards if file.size_bytes > _GITHUB_MAX_BYTES]
    notes = (
        f"{wording.first_few(large)} has more than 100 MiB, which GitHub takes in Git LFS only. Or "
        f"add /{name}/ to .gitignore, and keep the files on the host that measures."
    ) if large else ""  # fmt: skip
    return _subject(
        f"path:{name}",
        fetch.content_digest(folder) if digests else "",
        files,
        declared,
        ignore_code=ignore_code,
        track=None,
        is_gated=False,
        notes=(notes,) if notes else (),
    )


# --- a repository of the Hub ------------------------------------------------------------------


def _repository(repo: str, revision: str, declared: Declaration, *, ignore_code: bool) -> Subject:
    reader = hub_metadata.HubReader(deadline=time.monotonic() + DEADLINE_S)
    console.step(f"look at hf:{repo}")
    is_commit = bool(_COMMIT.fullmatch(revision))
    head = reader.at(repo, revision) if is_commit else reader.look(repo, revision)
    notes = list(_named(repo, head))
    if head.disabled:
        raise UpstreamError(f"hf:{repo} was disabled by the Hub.", hint="Take another source.")
    if head.undigested:
        raise UpstreamError(
            f"hf:{head.id}: the Hub lists {wording.first_few(head.undigested)} without size and "
            "digest, or with several.",
            hint="A mirror may have made that of it. Ask the Hub itself: see HF_ENDPOINT.",
        )
    _require_safetensors(f"hf:{head.id}", [file.name for file in head.files])
    with tempfile.TemporaryDirectory(prefix="fleet-init-") as place:
        folder = Path(place)
        wanted = [file for file in head.files if file.name in _READ]
        for file in wanted:
            data = reader.read_file(head.id, head.sha, file, fetch.MAX_SMALL_FILE_BYTES)
            atomic.write_bytes(folder / file.name, data)
        shards = fetch.weights(head.files, folder)
        files = _Files(listing=head.files, directory=folder, tensors=_headers(reader, head, shards))
        if head.gated:
            notes.append(
                f"hf:{head.id} is gated: every machine that fetches it needs HF_TOKEN of an "
                "account that agreed to its terms, and a release of it a waiver (docs/params.md)."
            )
        return _subject(
            f"hf:{head.id}",
            head.sha,
            files,
            declared,
            ignore_code=ignore_code,
            track=None if is_commit or revision == "main" else revision,
            is_gated=head.gated is not None,
            notes=notes,
        )


def _named(repo: str, head: Head) -> Iterator[str]:
    """Take the Hub's own spelling of a name, and refuse another name."""
    if head.id == repo:
        return
    if head.id.casefold() != repo.casefold():
        raise UpstreamError(
            f"hf:{repo} answers as {console.clean(head.id)}: it was renamed or taken over.",
            hint=f"If you trust the new owner: fleet init hf:{console.clean(head.id)}",
        )
    yield f"The Hub spells it hf:{console.clean(head.id)}, and so does params.yaml."


def _headers(reader: HubReader, head: Head, shards: Sequence[RemoteFile]) -> tuple[Tensor, ...]:
    """Read the headers of all weights, several at once."""

    def read(file: RemoteFile) -> tuple[Tensor, ...]:
        part = partial(reader.read_range, head.id, head.sha, file.name)
        tensors, _ = safetensors_header.read_ranges(
            part, name=file.name, size_bytes=file.size_bytes, limit_bytes=_MAX_HEADER_BYTES
        )
        return tensors

    until = at_once.Until(
        last=time.monotonic() + DEADLINE_S,
        first=None,
        answered=lambda: reader.was_answered,
        asked=frozenset(),
    )
    found = at_once.run(
        {file.name: partial(read, file) for file in shards},
        until,
        label=f"headers of hf:{head.id}",
        unit="files",
    )
    if missing := [file.name for file in shards if file.name not in found]:
        raise RetryLaterError(
            f"hf:{head.id}: {wording.first_few(missing)} did not come in {DEADLINE_S:.0f} s.",
            hint="Try again.",
        )
    return tuple(tensor for file in shards for tensor in found[file.name])


# --- both -------------------------------------------------------------------------------------


def _require_safetensors(source: str, names: Sequence[str]) -> None:
    """Say of a repository of GGUFs that it is one: there is nothing left to convert."""
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if ggufs and not any(name.endswith(".safetensors") for name in names):
        raise UpstreamError(
            f"{source} holds GGUFs only ({wording.first_few(ggufs)}): they are quantized already, "
            "so that nothing could be held against the original.",
            hint="Take the repository that they were made of; its card names it as base_model.",
        )


def _subject(  # noqa: PLR0913 - each is one independent fact, named at the call
    source: str,
    revision: str,
    files: _Files,
    declared: Declaration,
    *,
    ignore_code: bool,
    track: str | None,
    is_gated: bool,
    notes: Sequence[str],
) -> Subject:
    config = fetch.read_config(files.directory)
    architecture, doubts = _architecture(config, declared)
    _require_buildable(files, ignore_code=ignore_code)
    _require_unquantized(files.tensors)
    text = hyperparameters.text_config(config)
    trained = hyperparameters.context_tokens(text)
    license_ = fetch.license_of(files.directory, config)
    is_encoder = _is_encoder(config, files.listing)
    if is_encoder:
        _require_pooling(architecture, files.listing)
    has_template = bool(verify_template.upstream_templates(files.directory).get("default"))
    found = [*notes, *doubts]
    if trained is None:
        found.append("config.json does not say which context it was trained with.")
    if not has_template and not is_encoder:
        found.append(
            f"It brings no chat template. It is measured, and served with {COMPLETION_MODELFILE}, "
            "which adds none; but nothing of it is released, since no prompt can be compared with "
            "upstream's. Take the repository of the model that chats, or put a chat_template.jinja "
            "beside the weights in a folder of your own."
        )
    shards = fetch.weights(files.listing, files.directory)
    return Subject(
        source=source,
        revision=revision,
        track=track,
        architecture=architecture,
        license=license_,
        is_gated=is_gated,
        source_bytes=sum(shard.size_bytes for shard in shards),
        trained_tokens=trained[1] if trained else None,
        has_template=has_template,
        shape=Shape(config=text, tensors=_of_text(files.tensors), is_encoder=is_encoder),
        notes=tuple(found),
    )


# Written beside the template's own where a model has no chat template.
COMPLETION_MODELFILE: Final = "modelfiles/completion.Modelfile.j2"


def _architecture(config: Mapping[str, Any], declared: Declaration) -> tuple[str, tuple[str, ...]]:
    """Return the class of a model that can be converted, and what is not known of that yet."""
    tools = toolchain.there(toolchain.spec_of(declared))
    if tools is None:
        name = architectures.of_config(config)[0]
        doubt = (
            f"The llama.cpp of params.yaml is not built on this machine, so that nobody has looked "
            f"whether it converts {console.clean(name)[:80]}: `fleet toolchain` builds it, and "
            "fetch refuses what it does not know."
        )
        return name, (doubt,)
    known = architectures.supported(tools.converter)
    return architectures.require_supported(config, known, tools.commit), ()


def _of_text(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Leave out what sees and hears: the converter makes a GGUF of the text model."""
    return tuple(tensor for tensor in tensors if not _NOT_TEXT.search(tensor.name))


def _require_buildable(files: _Files, *, ignore_code: bool) -> None:
    try:
        fetch.require_buildable(files.directory, files.listing, ignore_code=ignore_code)
    except UpstreamError as error:
        error.hint = error.hint.replace(
            "write `ignore_code: true` into the model's entry of params.yaml", "add --ignore-code"
        )
        raise


def _require_unquantized(tensors: Sequence[Tensor]) -> None:
    odd = [
        tensor
        for tensor in tensors
        if tensor.dtype not in safetensors_header.UNQUANTIZED and not tensor.is_buffer
    ]
    if odd:
        dtypes = ", ".join(sorted({tensor.dtype for tensor in odd}))
        raise UpstreamError(
            f"the weights are stored in {dtypes} ({wording.first_few([odd[0].name])}): only F32, "
            "F16 and BF16 are quantized from.",
            hint="Take the original, unquantized repository of this model.",
        )


def _require_pooling(architecture: str, listing: Sequence[RemoteFile]) -> None:
    """Refuse an encoder of whose tokens nobody knows how they become one vector of a text."""
    if architecture.endswith("ForSequenceClassification"):
        raise UpstreamError(
            f"{console.clean(architecture)[:80]} ranks pairs of texts and makes no embeddings: the "
            "fleet can measure neither its quality nor its service.",
            hint="Take a model that makes embeddings or text.",
        )
    if fetch.POOLING not in {file.name for file in listing}:
        raise UpstreamError(
            f"it makes vectors of tokens and does not say how they become one of a text: there is "
            f"no {fetch.POOLING}.",
            hint="Take the repository of an embedding model, as sentence-transformers writes it.",
        )


def _is_encoder(config: Mapping[str, Any], listing: Sequence[RemoteFile]) -> bool:
    """Tell whether a GGUF of it will name a pooling (`architectures.is_encoder`)."""
    names = {file.name for file in listing}
    kind = str(config.get("model_type")).lower()
    return fetch.POOLING in names or "modules.json" in names or "bert" in kind
