"""Registries on the Hugging Face Hub: huggingface_hub unmodified against a stand-in of the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hub_writable
import huggingface_hub
import pytest
from huggingface_hub import constants
from store_contract import StoreContract, World

from pipelines.params import Registry
from pipelines.stores.huggingface import HuggingFaceStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hub_writable import Hub

REPO = "acme/tiny-llama-GGUF"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub without a repository, and a token in the environment that may write to it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", hub_writable.WRITE_TOKEN)
    huggingface_hub.close_session()
    with hub_writable.serve(tmp_path) as hub:
        yield hub
    huggingface_hub.close_session()


def opened(hub: Hub, **changes: object) -> HuggingFaceStore:
    """Open the registry as a publisher does who gives up soon."""
    registry = Registry(url="hf:acme", endpoint=hub.url, **changes)  # type: ignore[arg-type]
    return HuggingFaceStore("hub", registry, deadline_s=2)


def world_of(hub: Hub) -> World:
    """Return a registry whose files can be changed behind the Hub's back."""

    def tamper(model: str, sha256: str) -> None:
        assert model == "tiny-llama"
        data = bytearray(hub.object(sha256).read_bytes())
        data[len(data) // 2] ^= 1
        hub.swaps[sha256] = bytes(data)

    def garble(_model: str, alias: str) -> None:
        entry = hub_writable.regular(b"<html>no alias</html>")
        hub_writable.committed(hub, REPO, f"fleet/aliases/{alias}.json", entry)

    return World(open=lambda: opened(hub), tamper=tamper, garble_alias=garble, deletes=False)


class TestContract(StoreContract):
    """The one suite of all stores."""

    @pytest.fixture
    def world(self, hub: Hub) -> World:
        """An owner without repositories."""
        return world_of(hub)
