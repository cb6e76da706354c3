"""
Digests of artifacts: every byte is read once for both names that it needs.

sha256 is the name that we trust (records, registries, releases). md5 is the key under which DVC
caches a file; DVC offers nothing else. Both come from one pass, and DVC is told the md5
(`pipelines.dvc_state`), so that it does not read the file a second time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Large enough that hashing, not the system call, is what costs; small enough to stay in L2.
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Digests:
    """What one pass over a file tells: its size in bytes and both digests in lower-case hex."""

    size_bytes: int
    sha256: str
    md5: str


def digest(path: Path, *, progress: Callable[[int], None] | None = None) -> Digests:
    """
    Read `path` once and return its size, sha256 and md5.

    Args:
        path: A regular file.
        progress: Called with the number of bytes read so far, once per mebibyte.
    """
    sha256 = hashlib.sha256()
    md5 = hashlib.md5(usedforsecurity=False)
    size_bytes = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            md5.update(chunk)
            size_bytes += len(chunk)
            if progress is not None:
                progress(size_bytes)
    return Digests(size_bytes=size_bytes, sha256=sha256.hexdigest(), md5=md5.hexdigest())


def sha256_text(text: str) -> str:
    """Return the sha256 of the UTF-8 bytes of `text`, in lower-case hex."""
    return hashlib.sha256(text.encode()).hexdigest()
