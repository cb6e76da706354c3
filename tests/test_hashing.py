"""One pass over a file gives both of its names."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from pipelines import hashing

if TYPE_CHECKING:
    from pathlib import Path


@given(data=st.binary(max_size=4096), repeat=st.integers(min_value=0, max_value=600))
def test_digests_are_those_of_the_bytes(tmp_path_factory: object, data: bytes, repeat: int) -> None:
    """Size, sha256 and md5 equal what hashlib says of the same bytes, at any size."""
    path: Path = tmp_path_factory.mktemp("h") / "file"  # type: ignore[attr-defined]
    content = data * repeat
    path.write_bytes(content)

    found = hashing.digest(path)

    assert found.size_bytes == len(content)
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.md5 == hashlib.md5(content).hexdigest()


def test_progress_ends_at_the_size(tmp_path: Path) -> None:
    """The listener hears growing byte counts and last of all the whole size."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * (3 * hashing.CHUNK_BYTES + 7))
    heard: list[int] = []

    hashing.digest(path, progress=heard.append)

    assert heard == sorted(heard)
    assert heard[-1] == path.stat().st_size
