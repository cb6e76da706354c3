"""A registry of OCI keeps what every registry promises, and `ollama pull` reads from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from store_contract import StoreContract, World

from pipelines.stores.oci import OciStore
from pipelines.stores.oci_client import OCI_MANIFEST, OciClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from registry_servers import OciServer

    from pipelines.params import Registry


@pytest.fixture(autouse=True)
def _own_logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login, authority or proxy of this machine's user."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def store(registry: Registry, name: str = "production") -> OciStore:
    """Open a store that gives up after two seconds."""
    return OciStore(name, registry, client=OciClient(name, registry, deadline_s=2))


def logged_in(server: OciServer, monkeypatch: pytest.MonkeyPatch, name: str = "production") -> None:
    """Put the publisher's login into the environment."""
    for variable, value in server.environment(name).items():
        monkeypatch.setenv(variable, value)


def blob_path(server: OciServer, sha256: str) -> Path:
    """Return where docker-registry keeps the bytes of a digest."""
    return server.directory / f"docker/registry/v2/blobs/sha256/{sha256[:2]}/{sha256}/data"


@pytest.fixture
def rotten(oci: OciServer) -> Iterator[Callable[[str, str], None]]:
    """Flip a bit of a blob on the registry's disk, which all repositories share; mend it after."""
    before: dict[Path, bytes] = {}

    def tamper(_model: str, sha256: str) -> None:
        path = blob_path(oci, sha256)
        before[path] = path.read_bytes()
        data = bytearray(before[path])
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    yield tamper
    for path, data in before.items():
        path.write_bytes(data)


class TestDockerRegistry(StoreContract):
    """The contract on Debian's docker-registry behind the nginx of deploy/registry, by login."""

    @pytest.fixture
    def world(
        self,
        oci: OciServer,
        rotten: Callable[[str, str], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> World:
        """An empty namespace of the registry."""
        logged_in(oci, monkeypatch)
        registry = oci.registry()

        def garble(model: str, alias: str) -> None:
            client = OciClient("production", registry)
            repository = f"{client.namespace}/{model}"
            release = next(tag for tag in client.tags(repository) if tag.startswith("release-"))
            held = client.manifest(repository, release)
            assert held is not None
            client.put_manifest(repository, f"fleet-{alias}", held.data, OCI_MANIFEST)

        return World(open=lambda: store(registry), tamper=rotten, garble_alias=garble)
