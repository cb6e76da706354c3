"""A registry of OCI keeps what every registry promises, and `ollama pull` reads from it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
import release_factory as factory
import requests
from registry_servers import oci_server
from store_contract import MODEL, StoreContract, World

from pipelines import publishing
from pipelines.errors import StoreError
from pipelines.params import Registry
from pipelines.release_records import release_bytes
from pipelines.stores.base import AliasMovedError
from pipelines.stores.oci import OciStore
from pipelines.stores.oci_client import OCI_MANIFEST, OciClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from registry_servers import OciServer

    from pipelines.release import Composed
    from pipelines.release_records import Role


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

        return World(
            open=lambda: store(registry), tamper=rotten, garble_alias=garble, reads_count=200
        )


# --- what only a registry of OCI has ----------------------------------------------------------

DOCKER: Final = "application/vnd.docker.distribution.manifest.v2+json"
QUANTS: Final = ("Q8_0", "Q4_K_M")


@dataclass(frozen=True)
class Shop:
    """A registry with its publisher and a reader who knows nothing of releases."""

    server: OciServer
    registry: Registry
    directory: Path

    def publish(
        self, made: Composed, opened: OciStore | None = None, stable: str = "latest"
    ) -> publishing.Outcome:
        """Publish as a workflow does."""
        return publishing.publish(
            made,
            opened or store(self.registry),
            factory.ledger(self.directory),
            stable=stable,
            by=factory.by(),
        )

    def point(self, target: str) -> publishing.Outcome:
        """Roll back."""
        ledger = factory.ledger(self.directory)
        return publishing.point(MODEL, target, store(self.registry), ledger, by=factory.by())

    def release(self, seed: int, types: Sequence[str] = QUANTS, **options: Any) -> Composed:
        """Make a release."""
        return factory.composed(self.directory / "files", seed, types=types, **options)

    def pulls(self, tag: str, media_type: str = DOCKER) -> str | None:
        """Ask for a tag as Ollama does, from the port for everybody; return the digest."""
        namespace = self.registry.url.rpartition("/")[2]
        answer = requests.get(
            f"http://{self.server.pull}/v2/{namespace}/{MODEL}/manifests/{tag}",
            headers={"Accept": media_type},
            timeout=30,
        )
        assert answer.status_code in {200, 404}
        return factory.sha256(answer.content) if answer.status_code == 200 else None

    def wrong_tags(self, made: Composed) -> list[str]:
        """Return the moving tags that do not mean what a release says."""
        wanted = {
            **{type_: manifest(made, type_) for type_ in made_types(made)},
            "stable": manifest(made, made.release.stable_quant),
            "stable-local": manifest(made, made.release.stable_quant),
        }
        wrong = [tag for tag, digest in wanted.items() if self.pulls(tag) != digest]
        return wrong + [
            f"{type_}-modelpack"
            for type_ in made_types(made)
            if self.pulls(f"{type_}-modelpack", OCI_MANIFEST)
            != manifest(made, type_, "modelpack-manifest")
        ]


def made_types(made: Composed) -> tuple[str, ...]:
    """Return the quants of a release."""
    return tuple(quant.type for quant in made.release.quants)


def manifest(made: Composed, type_: str, role: Role = "ollama-manifest") -> str:
    """Return the digest that release.json names."""
    return made.release.of(role, type_)[0].sha256


@pytest.fixture
def shop(oci: OciServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """An empty namespace, by login."""
    logged_in(oci, monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(tmp_path / "cache"))
    return Shop(oci, oci.registry(), tmp_path)


class Dies:
    """A client whose process ends right before it writes a tag for the n-th time."""

    def __init__(self, opened: OciClient, at: int) -> None:
        """Wrap `opened`."""
        self._opened = opened
        self._left = at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def put_manifest(self, *words: Any) -> None:
        """Write a tag, or end."""
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        self._opened.put_manifest(*words)


def test_every_tag_means_what_the_release_says(shop: Shop) -> None:
    """Quants, hosts and stable for Ollama, ModelPack for the rest, from the port for everybody."""
    one = shop.release(1)
    shop.publish(one)

    assert shop.wrong_tags(one) == []
    for type_ in QUANTS:
        assert shop.pulls(f"{type_}-{one.id[:12]}") == manifest(one, type_)
        # Neither is the other's: Ollama would take a ModelPack for a broken model.
        assert shop.pulls(f"{type_}-modelpack") is None


def test_a_publisher_killed_between_two_tags_is_put_right_by_the_next(shop: Shop) -> None:
    """At each of them: by a rollback to where the alias still is, which needs no move."""
    one, two = shop.release(1), shop.release(2)
    shop.publish(one)
    shop.publish(two, stable=one.id)  # there, and not yet stable
    died = 0
    while True:
        opened = Dies(OciClient("production", shop.registry), at=died + 1)
        try:
            shop.publish(
                two, OciStore("production", shop.registry, client=cast("OciClient", opened))
            )
        except KeyboardInterrupt:
            died += 1
        else:
            break
        assert publishing.resolve(store(shop.registry), MODEL, "stable")[0] == one.id
        # Before the first nothing has moved, before the last everything but the alias.
        assert len(shop.wrong_tags(one)) == died - 1

        assert shop.point(one.id).moved is None

        assert shop.wrong_tags(one) == []
    assert died == len(("Q8_0", "Q4_K_M")) * 2 + len(("stable-local", "stable", "fleet-stable"))
    assert shop.wrong_tags(two) == []


def test_a_quant_that_the_stable_release_lacks_is_not_served_any_more(shop: Shop) -> None:
    """Its tag is withdrawn, so that nobody pulls what was replaced; a rollback brings it back."""
    one, two = shop.release(1), shop.release(2, ("Q8_0",))
    shop.publish(one)
    shop.publish(two)

    assert shop.pulls("Q4_K_M") is None
    assert shop.pulls(f"Q4_K_M-{one.id[:12]}") == manifest(one, "Q4_K_M")
    assert shop.wrong_tags(two) == []
    shop.point("previous")
    assert shop.wrong_tags(one) == []


def test_somebody_who_moved_the_alias_is_not_overwritten(shop: Shop) -> None:
    """What was read is compared right before the first tag is touched."""
    one, two = shop.release(1), shop.release(2)
    shop.publish(one)
    late = store(shop.registry)
    alias, token = late.read_alias(MODEL, "stable")
    assert alias is not None
    shop.publish(two)

    move = alias.moves[-1].model_copy(update={"sequence": 2})
    with pytest.raises(AliasMovedError):
        late.write_alias(alias.moved(move), one.release, token)

    assert shop.wrong_tags(two) == []


def test_an_immutable_tag_that_means_something_else_is_never_overwritten(shop: Shop) -> None:
    """Neither of a quant nor of a release."""
    one, two = shop.release(1), shop.release(2)
    shop.publish(one)
    client = OciClient("production", shop.registry)
    repository = f"{client.namespace}/{MODEL}"
    found = client.manifest(repository, f"Q8_0-{one.id[:12]}")
    assert found is not None
    client.put_manifest(repository, f"Q4_K_M-{two.id[:12]}", found.data, found.media_type)

    with pytest.raises(StoreError, match="never moved"):
        shop.publish(two)

    assert shop.wrong_tags(one) == []
    assert two.id not in store(shop.registry).list_releases(MODEL)


def test_the_registrys_own_collection_frees_a_deleted_release_and_no_other(shop: Shop) -> None:
    """`docker-registry garbage-collect` after a deletion; small files are shared by both."""
    one, two = shop.release(1, size_bytes=60_000), shop.release(2, size_bytes=61_000)
    shop.publish(one)
    shop.publish(two)
    opened = store(shop.registry)
    opened.delete_release(MODEL, one.id)
    # As long as the repository lists them, the registry keeps what nothing names.
    gone = {file.sha256 for file in one.release.of("gguf")}
    kept = {file.sha256 for file in two.release.files}

    shop.server.collect_garbage()

    assert {sha256 for sha256 in gone if blob_path(shop.server, sha256).exists()} == set()
    assert {sha256 for sha256 in kept if not blob_path(shop.server, sha256).exists()} == set()
    assert publishing.resolve(store(shop.registry), MODEL, "stable")[0] == two.id
    for file in two.release.files:
        data = b"".join(opened.read_blob(MODEL, file.sha256))
        assert factory.sha256(data) == file.sha256
    assert shop.wrong_tags(two) == []
    # And what was freed can be published again.
    shop.publish(one)
    assert shop.wrong_tags(one) == []


def test_a_manifest_that_another_release_has_stays(shop: Shop) -> None:
    """Two releases with one and the same quant: deleting the first leaves the second whole."""
    one = shop.release(1)
    changed = one.release.model_copy(update={"context_tokens": 1024, "previous": one.id})
    data = release_bytes(changed)
    two = replace(one, release=changed, data=data, id=factory.sha256(data))
    shop.publish(one)
    shop.publish(two)

    store(shop.registry).delete_release(MODEL, one.id)

    assert store(shop.registry).list_releases(MODEL) == (two.id,)
    assert shop.wrong_tags(two) == []


def test_a_registry_that_deletes_nothing_says_how_it_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """405 of docker-registry; the release stays whole."""
    with oci_server(tmp_path / "server", delete=False) as server:
        logged_in(server, monkeypatch)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        closed = Shop(server, server.registry(), tmp_path)
        one = closed.release(1)
        closed.publish(one)
        with pytest.raises(StoreError, match="does not allow it") as found:
            store(closed.registry).delete_release(MODEL, one.id)
        assert "delete: enabled: true" in found.value.hint
        assert closed.wrong_tags(one) == []


def test_a_read_only_registry_can_be_read_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variant for copies: what was there before is served, and no port takes anything."""
    with oci_server(tmp_path / "a") as server:
        logged_in(server, monkeypatch)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        first = Shop(server, server.registry(namespace="fleet"), tmp_path)
        one = first.release(1)
        first.publish(one)
        with oci_server(tmp_path / "b", variant="nginx-read-only.conf") as copy:
            shutil.copytree(server.directory, copy.directory, dirs_exist_ok=True)
            there = Shop(copy, copy.registry(namespace="fleet", address=copy.pull), tmp_path)
            assert there.wrong_tags(one) == []
            assert publishing.resolve(store(there.registry), MODEL, "stable")[0] == one.id
            with pytest.raises(StoreError, match="only reading"):
                there.publish(there.release(2))


def test_ages_are_those_of_moves(shop: Shop) -> None:
    """A registry tells no times; what was never stable is of unknown age, which is young."""
    one, two = shop.release(1), shop.release(2)
    shop.publish(one)
    opened = store(shop.registry)
    assert opened.release_age_s(MODEL, one.id) == 0.0  # Ada's clock is in 2027
    assert opened.release_age_s(MODEL, two.id) is None
    assert {blob.age_s for blob in opened.list_blobs()} == {None}


def test_ghcr_takes_ten_gigabytes_unless_declared_otherwise() -> None:
    """Checked before anything is sent; other registries have no limit that we know."""

    def limit(url: str, **changes: Any) -> int | None:
        return OciStore("x", Registry(url=url, **changes)).guarantees.max_file_bytes

    assert limit("oci://ghcr.io/owner") == 10_000_000_000
    assert limit("oci://ghcr.io/owner", max_file_mib=5) == 5 << 20
    assert limit("oci://registry.example.org/fleet") is None
