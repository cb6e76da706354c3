"""
Composes a release: reads what the stages left, and names every byte that readers will need.

Nothing is published here and nothing is invented later: what a store keeps is what `compose` named.
The same records and the same files give the same bytes, so the same release id. Multi-GB files are
not read: their digests are those of the records, and a store hashes what it is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.release_records import Release
    from pipelines.stores.base import Blob


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
