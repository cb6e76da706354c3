"""
`sha256  name` of every file of what is published: the subjects of an attestation.

`actions/attest` reads such files (`subject-checksums`), as `sha256sum` writes them, so that whoever
attests needs no byte of a model. It takes 1,024 subjects at a time: what matters most comes first,
release.json, which names all the rest, then the GGUFs; further files follow with a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pipelines import atomic
from pipelines.release_records import Release, release_id

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# The limit of one attestation (docs.github.com, "Using artifact attestations").
MAX_SUBJECTS: Final = 1024
_FIRST: Final = ("gguf", "ollama-manifest", "modelpack-manifest")


def write(path: Path, releases: Iterable[bytes]) -> tuple[Path, ...]:
    """
    Write the digests of releases and of every file of them, each digest once.

    Args:
        path: The first file; `checksums.txt` is followed by `checksums-2.txt`.
        releases: Canonical bytes of each release.

    Returns:
        The files that were written; none if nothing is published. Those of an earlier run are gone.
    """
    lines = [f"{sha256}  {name}\n" for sha256, name in _subjects(releases).items()]
    for old in (path, *path.parent.glob(f"{path.stem}-*{path.suffix}")):
        if old == path or old.stem.removeprefix(f"{path.stem}-").isdecimal():
            old.unlink(missing_ok=True)
    written = []
    for number, start in enumerate(range(0, len(lines), MAX_SUBJECTS), start=1):
        part = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        part.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(part, "".join(lines[start : start + MAX_SUBJECTS]))
        written.append(part)
    return tuple(written)


def _subjects(releases: Iterable[bytes]) -> dict[str, str]:
    """Return what is called how, by sha256; `model/name`, since models have files of one name."""
    ranked: list[tuple[int, str, str]] = []
    for data in releases:
        release = Release.model_validate_json(data)
        ranked.append((-1, release_id(data), f"{release.model}/release.json"))
        ranked += [
            (_rank(file.role), file.sha256, f"{release.model}/{file.name}")
            for file in release.files
        ]
    subjects: dict[str, str] = {}
    for _, sha256, name in sorted(ranked, key=lambda each: each[0]):
        subjects.setdefault(sha256, name)
    return subjects


def _rank(role: str) -> int:
    return _FIRST.index(role) if role in _FIRST else len(_FIRST)
