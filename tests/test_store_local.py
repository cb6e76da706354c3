"""A directory is a registry: it keeps what every store promises, whatever happens to the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from store_contract import StoreContract, World

from pipelines.stores.local import LocalStore

if TYPE_CHECKING:
    from pathlib import Path


class TestContract(StoreContract):
    """The promises of all stores."""

    @pytest.fixture
    def world(self, tmp_path: Path) -> World:
        """A directory that is not there yet."""
        root = tmp_path / "registry"

        def tamper(_: str, sha256: str) -> None:
            path = root / "blobs/sha256" / sha256
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.chmod(0o644)
            path.write_bytes(data)

        def garble(model: str, alias: str) -> None:
            (root / "aliases" / model / f"{alias}.json").write_text("<html>\n")

        return World(open=lambda: LocalStore("local", root), tamper=tamper, garble_alias=garble)
