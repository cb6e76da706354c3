"""
Turn pinned source distributions into clean prose, split by document.

The documentation inside the source distributions listed in sources.toml is the only text this model
and the corpora are made of. A document belongs to exactly one split, decided by the digest of its
name, so that no choice made later can leak an evaluation document into training.
"""

# ruff: noqa: INP001 - a folder of scripts, no package

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MIN_DOCUMENT_BYTES = 400
MIN_SHARED_PARAGRAPH_CHARS = 40
MAX_LINE_CHARS = 600
CORPUS_DOCUMENT_BYTES = range(1_500, 24_001)
CORPUS_BYTES = 120_000


class SourceError(Exception):
    """A source distribution is missing, differs from its pin, or holds no documentation."""


class Split(StrEnum):
    """What a document may be used for."""

    TRAINING = "training"
    CALIBRATION = "calibration"
    EVALUATION = "evaluation"


@dataclass(frozen=True)
class Source:
    """One pinned source distribution and the part of it that is documentation."""

    name: str
    version: str
    sha256: str
    license: str
    docs: tuple[str, ...]
    skip: tuple[str, ...]
    is_corpus_source: bool

    def is_documentation(self, path: PurePosixPath) -> bool:
        """Whether a path inside the archive is prose we read."""
        text = path.as_posix()
        return (
            path.suffix in {".rst", ".txt", ".md"}
            and any(text.startswith(prefix) for prefix in self.docs)
            and not any(part in text for part in self.skip)
        )


@dataclass(frozen=True)
class Document:
    """One cleaned documentation page."""

    source: str
    path: str
    text: str
    split: Split


def read_sources(path: Path) -> tuple[Source, ...]:
    """Read sources.toml."""
    with path.open("rb") as file:
        entries = tomllib.load(file)["source"]
    return tuple(
        Source(
            name=entry["name"],
            version=entry["version"],
            sha256=entry["sha256"],
            license=entry["license"],
            docs=tuple(entry["docs"]),
            skip=tuple(entry.get("skip", ())),
            is_corpus_source=entry.get("corpus", False),
        )
        for entry in entries
    )


def download(sources: Sequence[Source], folder: Path) -> dict[str, Path]:
    """
    Fetch every source distribution that is not in the folder yet.

    Returns:
        The archive of each source, by source name; each has the pinned sha256.

    Raises:
        SourceError: pip could not get an archive, or its bytes are not the pinned ones.

    """
    folder.mkdir(parents=True, exist_ok=True)
    by_digest = {_sha256(path): path for path in folder.glob("*.tar.gz")}
    for source in sources:
        if source.sha256 not in by_digest:
            _pip_download(source, folder)
    by_digest = {_sha256(path): path for path in folder.glob("*.tar.gz")}
    missing = [source.name for source in sources if source.sha256 not in by_digest]
    if missing:
        message = f"No archive in {folder} has the pinned sha256 of: {', '.join(missing)}."
        raise SourceError(message)
    return {source.name: by_digest[source.sha256] for source in sources}


def _pip_download(source: Source, folder: Path) -> None:
    # pip runs a package's build hooks to read its metadata, even for a download. Hash-checking mode
    # makes it compare the archive with the pin before any code of the archive runs.
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "requirements.txt"
        pin = f"{source.name}=={source.version} --hash=sha256:{source.sha256}\n"
        requirements.write_text(pin, encoding="utf-8")
        argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        argv += ["--no-binary", source.name, "--dest", str(folder)]
        argv += ["--requirement", str(requirements)]
        # S603: the arguments are the pinned list above.
        done = subprocess.run(argv, check=False, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        last_lines = "\n".join(done.stderr.splitlines()[-5:])
        message = (
            f"pip could not download {source.name}=={source.version}:\n{last_lines}\n"
            f"Put the source distribution into {folder} by hand; its sha256 is {source.sha256}."
        )
        raise SourceError(message)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_documents(sources: Sequence[Source], archives: dict[str, Path]) -> list[Document]:
    """
    Clean all documentation pages and make their texts disjoint.

    Raises:
        SourceError: an archive holds no documentation under the declared folders.

    """
    documents: list[Document] = []
    for source in sources:
        pages = list(_read_pages(source, archives[source.name]))
        if not pages:
            message = f"{source.name} {source.version} has no documentation under {source.docs}."
            raise SourceError(message)
        documents += pages
    return list(disjoint(documents))


def _read_pages(source: Source, archive: Path) -> Iterator[Document]:
    with tarfile.open(archive) as tar:
        for member in tar:
            # The first component is NAME-VERSION; the rest is stable between versions.
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if not member.isfile() or not source.is_documentation(path):
                continue
            file = tar.extractfile(member)
            if file is None:
                continue
            raw = file.read().decode("utf-8", errors="replace")
            text = clean_markdown(raw) if path.suffix == ".md" else clean_rst(raw)
            yield Document(source.name, path.as_posix(), text, _split(source, path))


def _split(source: Source, path: PurePosixPath) -> Split:
    if not source.is_corpus_source:
        return Split.TRAINING
    digest = hashlib.sha256(f"{source.name}/{path}".encode()).digest()
    match digest[0] % 16:
        case 0:
            return Split.EVALUATION
        case 1:
            return Split.CALIBRATION
        case _:
            return Split.TRAINING


def _digest_order(document: Document) -> str:
    return hashlib.sha256(f"{document.source}/{document.path}".encode()).hexdigest()


def disjoint(documents: Sequence[Document]) -> Iterator[Document]:
    """
    Drop every paragraph seen before, and then the documents with hardly any text left.

    Evaluation pages come first, then calibration, then training, so that a paragraph two pages
    share survives only where it is needed most and the splits have no paragraph in common.
    """
    priority = [Split.EVALUATION, Split.CALIBRATION, Split.TRAINING]
    seen: set[str] = set()
    for document in sorted(
        documents, key=lambda document: (priority.index(document.split), _digest_order(document))
    ):
        kept = []
        for paragraph in document.text.split("\n\n"):
            identity = " ".join(paragraph.split())
            if len(identity) >= MIN_SHARED_PARAGRAPH_CHARS:
                if identity in seen:
                    continue
                seen.add(identity)
            kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text.encode()) >= MIN_DOCUMENT_BYTES:
            yield Document(document.source, document.path, text, document.split)


def corpus_documents(documents: Sequence[Document], split: Split) -> list[Document]:
    """Pages of medium length in digest order, up to CORPUS_BYTES together."""
    chosen: list[Document] = []
    size_bytes = 0
    for document in documents:
        document_bytes = len(document.text.encode())
        if document.split is not split or document_bytes not in CORPUS_DOCUMENT_BYTES:
            continue
        if size_bytes + document_bytes <= CORPUS_BYTES:
            chosen.append(document)
            size_bytes += document_bytes
    return chosen


# --- cleaning -------------------------------------------------------------------------------------

_ADORNMENT = re.compile(r"""^\s*([=\-~`'"^#*+.:_<>])\1{2,}\s*$""")
_TABLE = re.compile(r"^\s*(?:\+[-=+]+\+|\|.*\||[= ]{9,})\s*$")
_DROPPED_BLOCK = re.compile(
    r"^(\s*)\.\. (?:_|\[|\||(?:toctree|image|figure|index|currentmodule|module|highlight|contents"
    r"|raw|include|literalinclude|auto\w+|rst-class|meta|tabs|changelog|class::$|role|default-role"
    r"|default-domain|inheritance-diagram|csv-table|list-table|table|plot|graphviz)\b)"
)
_COMMENT = re.compile(r"^(\s*)\.\.(?:$| (?!\S*::))")
_DIRECTIVE = re.compile(r"^(\s*)\.\. ([\w:+-]+)::\s*(.*)$")
_VERSION_NOTES = {
    "versionadded": "New in version ",
    "versionchanged": "Changed in version ",
    "deprecated": "Deprecated since version ",
}
_CODE_DIRECTIVE = re.compile(r"^\s*\.\. (?:code-block|code|sourcecode|console|parsed-literal)::")
_OPTION = re.compile(r"^\s+:[\w-]+:(?:\s.*)?$")
_INLINE: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r":[\w:+-]+:`([^`<]+?)\s*<[^`>]+>`"), r"\1"),
    (re.compile(r":[\w:+-]+:`[~!]?(?:[^`]*\.)?([^`.]+(?:\(\))?)`(?=\W|$)"), r"`\1`"),
    (re.compile(r":[\w:+-]+:`([^`]+)`"), r"`\1`"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]+>`__?"), r"\1"),
    (re.compile(r"``([^`]+)``"), r"`\1`"),
    (re.compile(r"`([^`]+)`__?(?=\W|$)"), r"\1"),
    (re.compile(r"\*\*([^*\n]+)\*\*"), r"\1"),
    (re.compile(r"\s?\[[#\w]+\]_"), ""),
    (re.compile(r"::$"), ":"),
)
_MARKDOWN_INLINE: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^#+\s+"), ""),
    (re.compile(r"\{[\w:]+\}`~?([^`<]+?)(?:\s*<[^`>]+>)?`"), r"`\1`"),
    (re.compile(r"\[([^\]]+)\](?:\([^)]*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r"\*\*([^*\n]+)\*\*"), r"\1"),
)
_MARKDOWN_DROPPED = re.compile(r"^\s*(?:```|~~~|:::|:[\w-]+:|\(.+\)=$|<|!\[|\[[^\]]+\]:|\|)")
# Host names, addresses and absolute paths say nothing about language and age badly.
_UNWANTED = re.compile(
    r"https?:|ftp:|www\.|\b[\w-]+\.(?:org|com|net|io|dev|edu)\b"
    r"|/(?:home|Users)/|(?:^|[\s\"'`(=:])/(?:usr|var|etc|tmp|root|opt|srv|path|work|bin)\b",
    re.MULTILINE | re.IGNORECASE,
)
_BULLET = re.compile(r"^(\s*)(?:[*-]|\d+\.|#\.)\s+(?=\S)")


def clean_rst(raw: str) -> str:
    """Remove reStructuredText markup; keep prose, lists, signatures and code."""
    lines: list[str] = []
    skip_deeper_than: int | None = None
    for line in raw.expandtabs(4).splitlines():
        indent = len(line) - len(line.lstrip())
        if skip_deeper_than is not None:
            if not line.strip() or indent > skip_deeper_than:
                continue
            skip_deeper_than = None
        dropped = _DROPPED_BLOCK.match(line) or _COMMENT.match(line)
        if dropped:
            skip_deeper_than = len(dropped[1])
        elif _CODE_DIRECTIVE.match(line) or _ADORNMENT.match(line) or _OPTION.match(line):
            lines.append("")
        elif directive := _DIRECTIVE.match(line):
            argument = _substitute(directive[3], _INLINE)
            lines += ["", directive[1] + _VERSION_NOTES.get(directive[2], "") + argument]
        else:
            lines.append(_substitute(line.rstrip(), _INLINE))
    return _join_paragraphs(lines)


def clean_markdown(raw: str) -> str:
    """Remove Markdown markup; keep prose, lists and code."""
    lines = [
        "" if _MARKDOWN_DROPPED.match(line) else _substitute(line.rstrip(), _MARKDOWN_INLINE)
        for line in raw.expandtabs(4).splitlines()
    ]
    return _join_paragraphs(lines)


def _substitute(line: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        line = pattern.sub(replacement, line)
    return line


def _join_paragraphs(lines: Sequence[str]) -> str:
    paragraphs = re.split(r"\n\s*\n+", "\n".join(lines).strip("\n"))
    kept = [_unwrap(paragraph) for paragraph in paragraphs if _is_wanted(paragraph)]
    return "\n\n".join(kept)


def _is_wanted(paragraph: str) -> bool:
    lines = paragraph.splitlines()
    return (
        bool(paragraph.strip())
        and not _UNWANTED.search(paragraph)
        and not any(_TABLE.match(line) or len(line) > MAX_LINE_CHARS for line in lines)
        and "\ufffd" not in paragraph
    )


def _unwrap(paragraph: str) -> str:
    """Join the lines of prose and of list items; indented blocks (code) keep their lines."""
    joined: list[str] = []
    text_indent = 0
    for line in paragraph.splitlines():
        indent = len(line) - len(line.lstrip())
        bullet = _BULLET.match(line)
        if joined and not bullet and indent == text_indent and not line.startswith((">>>", "$")):
            joined[-1] += " " + line.strip()
            continue
        joined.append(line)
        # An indented line that opens no list item is code or a nested block: nothing joins it.
        text_indent = len(bullet[0]) if bullet else (0 if indent == 0 else -1)
    return "\n".join(joined)
