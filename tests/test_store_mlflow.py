"""MLflow's model registry keeps what every registry promises, on a database and over HTTP."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import registry_servers
import release_factory as factory
import requests
import store_contract

# The server is asked for by its name here, as a fixture.
from registry_servers import mlflow_http
from store_contract import MODEL, StoreContract, World

from pipelines import publishing
from pipelines.errors import MachineError, ParamsError, RetryLaterError, StoreError
from pipelines.params import Registry
from pipelines.release_records import MAX_MOVES, STABLE, Alias, ReleaseWaiver
from pipelines.stores import mlflow as store_module
from pipelines.stores.base import AliasMovedError
from pipelines.stores.local import LocalStore
from pipelines.stores.mlflow import CANDIDATE, MAX_TAG_BYTES, PREVIOUS, MlflowStore, fitted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from registry_servers import MlflowServer

    from pipelines.release import Composed

__all__ = ["mlflow_http"]

ROOT = Path(__file__).resolve().parent.parent
API = "api/2.0/mlflow"


def _open(root: Path, uri: str, **changes: Any) -> MlflowStore:
    registry = Registry(url=f"mlflow:{uri}", blobs="local", **changes)
    return MlflowStore("models", registry, LocalStore("local", root / "registry"), root)


def _world(root: Path, uri: str) -> World:
    def tamper(_: str, sha256: str) -> None:
        path = root / "registry/blobs/sha256" / sha256
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)

    def garble(model: str, alias: str) -> None:
        _open(root, uri)._ask(
            "point", model=model, aliases={}, tags={f"fleet.alias.{alias}": "<html>"}
        )

    return World(open=lambda: _open(root, uri), tamper=tamper, garble_alias=garble)


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


class TestOnADatabase(StoreContract):
    """sqlite, as on a workstation."""

    @pytest.fixture
    def world(self, tmp_path: Path, new_database: Callable[[Path], None]) -> World:
        """A database with tables and nothing in them: to make them takes MLflow seconds."""
        new_database(tmp_path / "mlflow.db")
        return _world(tmp_path, "sqlite:///mlflow.db")


class TestOverHttp(StoreContract):
    """A tracking server, as teams have it."""

    @pytest.fixture
    def world(self, tmp_path: Path, mlflow_http: MlflowServer) -> World:
        """A server that holds no model."""
        mlflow_http.forget_all()
        # Each reads twice over HTTP from one worker; the thousand are read from the database.
        return replace(_world(tmp_path, mlflow_http.url), reads_count=200)


@pytest.fixture(scope="session")
def new_database(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path], None]:
    """Copy a database that MLflow has just made."""
    root = tmp_path_factory.mktemp("database")
    _open(root, "sqlite:///mlflow.db").prepare("another-model")
    made = (root / "mlflow.db").read_bytes()

    def copy(path: Path) -> None:
        path.write_bytes(made)

    return copy


@pytest.fixture(params=["database", "server"])
def world(
    request: pytest.FixtureRequest, tmp_path: Path, new_database: Callable[[Path], None]
) -> World:
    """An empty registry of either kind."""
    if request.param == "database":
        new_database(tmp_path / "mlflow.db")
        return _world(tmp_path, "sqlite:///mlflow.db")
    server: MlflowServer = request.getfixturevalue("mlflow_http")
    server.forget_all()
    return _world(tmp_path, server.url)


def _store(world: World) -> MlflowStore:
    store = world.open()
    assert isinstance(store, MlflowStore)
    return store


def _publish(world: World, directory: Path, made: Composed) -> publishing.Outcome:
    return store_contract.publish(world, directory, made)


def _point(world: World, directory: Path, target: str) -> publishing.Outcome:
    return publishing.point(
        MODEL, target, world.open(), factory.ledger(directory), by=factory.by("the other is slow")
    )


def _aliases(world: World) -> dict[str, int]:
    held = _store(world)._read(MODEL)
    assert held is not None
    aliases: dict[str, int] = held["aliases"]
    return aliases


def _by_release(world: World) -> dict[int, tuple[str, str]]:
    return {
        each["version"]: (each["tags"]["fleet.release"], each["tags"]["fleet.type"])
        for each in _store(world)._versions(MODEL)
    }


# --- what people find in MLflow ---------------------------------------------------------------


def test_each_quant_of_a_release_is_a_version_whose_source_names_its_bytes(
    world: World, tmp_path: Path
) -> None:
    """Tags say what it is, of what it was made, and what was measured; no path of this machine."""
    waiver = ReleaseWaiver(gate="hold", who="Ada", why="only for the demo", until="2027-02-28")
    made = factory.composed(tmp_path / "files", waivers=(waiver,))
    _publish(world, tmp_path, made)

    versions = _store(world)._versions(MODEL)

    assert [each["tags"]["fleet.type"] for each in versions] == ["Q8_0", "Q4_K_M"]
    for each, quant in zip(versions, made.release.quants, strict=True):
        tags = each["tags"]
        assert each["source"] == f"gguf-fleet://local/blobs/sha256/{quant.gguf_sha256}"
        assert tags["fleet.release"] == made.id
        assert tags["fleet.gguf_sha256"] == quant.gguf_sha256
        assert tags["fleet.size_bytes"] == "40000"
        assert tags["fleet.llama_cpp_commit"] == made.release.tools.llama_cpp_commit
        assert tags["fleet.revision"] == made.release.source.revision
        assert tags["fleet.license"] == "apache-2.0"
        assert json.loads(tags["fleet.gates"])[0]["limit"] == 0.95
        assert json.loads(tags["fleet.waivers"])[0]["who"] == "Ada"
        assert str(tmp_path) not in json.dumps(each)
    assert versions[0]["tags"]["fleet.verdict"] == "local: PROMOTE"
    assert versions[1]["tags"]["fleet.verdict"] == "PASS"


def test_candidate_stable_and_previous_mean_what_their_names_say(
    world: World, tmp_path: Path
) -> None:
    """Each is the stable quant of a release; numbers are numbers, whoever gives them."""
    one = factory.composed(tmp_path / "files")
    two = factory.composed(tmp_path / "files", 2, previous=one.id)
    _publish(world, tmp_path, one)
    first = {alias: _by_release(world)[version] for alias, version in _aliases(world).items()}
    _publish(world, tmp_path, two)
    second = {alias: _by_release(world)[version] for alias, version in _aliases(world).items()}

    assert first == {CANDIDATE: (one.id, "Q8_0"), STABLE: (one.id, "Q8_0")}
    assert second == {
        CANDIDATE: (two.id, "Q8_0"),
        STABLE: (two.id, "Q8_0"),
        PREVIOUS: (one.id, "Q8_0"),
    }
    assert all(isinstance(version, int) for version in _aliases(world).values())


def test_a_rollback_sets_an_alias_and_makes_no_version(world: World, tmp_path: Path) -> None:
    """What was newest stays the candidate."""
    one = factory.composed(tmp_path / "files")
    two = factory.composed(tmp_path / "files", 2, previous=one.id)
    _publish(world, tmp_path, one)
    _publish(world, tmp_path, two)
    before = _by_release(world)

    _point(world, tmp_path, "previous")

    assert _by_release(world) == before
    meant = {alias: before[version][0] for alias, version in _aliases(world).items()}
    assert meant == {CANDIDATE: two.id, STABLE: one.id, PREVIOUS: two.id}


def test_an_alias_that_somebody_moved_by_hand_is_put_back_with_a_warning(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow asks nobody; the next publish says what it found, and makes no new move."""
    one = factory.composed(tmp_path / "files")
    two = factory.composed(tmp_path / "files", 2, previous=one.id)
    _publish(world, tmp_path, one)
    _publish(world, tmp_path, two)
    before = _aliases(world)
    _store(world)._ask("point", model=MODEL, aliases={STABLE: before[PREVIOUS]}, tags={})

    outcome = _publish(world, tmp_path, two)

    assert _aliases(world) == before
    assert outcome.moved is None
    assert "`stable` of tiny-llama meant version 1, which no move of ours says" in (
        capsys.readouterr().err
    )


def test_a_release_that_is_collected_takes_its_versions_with_it_and_leaves_the_files(
    world: World, tmp_path: Path
) -> None:
    """Other registries may need them: a collection of this one is told of no age of a file."""
    one = factory.composed(tmp_path / "files")
    two = factory.composed(tmp_path / "files", 2, previous=one.id)
    _publish(world, tmp_path, one)
    _publish(world, tmp_path, two)
    store = _store(world)

    store.delete_release(MODEL, one.id)

    assert store.list_releases(MODEL) == (two.id,)
    assert {release for release, _ in _by_release(world).values()} == {two.id}
    assert all(blob.age_s is None for blob in store.list_blobs())
    assert store.blob_size(MODEL, one.release.quants[0].gguf_sha256) == 40_000
    assert store.blobs.read_release(MODEL, one.id) == one.data
    age_s = store.release_age_s(MODEL, two.id)
    assert age_s is not None
    assert age_s < 600


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("s3://bucket/fleet", "s3://bucket/fleet/blobs/sha256/{gguf}"),
        ("oci://host:5000/fleet", "oci://host:5000/fleet/tiny-llama@sha256:{modelpack}"),
        ("hf:owner", "hf://owner/tiny-llama-GGUF@release-{id12}/tiny-llama-Q8_0.gguf"),
    ],
)
def test_a_server_takes_the_source_of_every_kind_of_registry(
    address: str, source: str, tmp_path: Path, mlflow_http: MlflowServer
) -> None:
    """It refuses paths and file:, and would refuse a whole publish."""
    mlflow_http.forget_all()
    made = factory.composed(tmp_path / "files")

    class Elsewhere(LocalStore):
        shown = address

    store = MlflowStore(
        "models",
        Registry(url=f"mlflow:{mlflow_http.url}", blobs="local"),
        Elsewhere("local", tmp_path / "registry"),
        tmp_path,
    )
    store.put_release(made.release, made.data)

    (manifest,) = made.release.of("modelpack-manifest", "Q8_0")
    assert store._versions(MODEL)[0]["source"] == source.format(
        gguf=made.release.quants[0].gguf_sha256, modelpack=manifest.sha256, id12=made.id[:12]
    )


def test_all_moves_are_remembered_though_a_tag_has_room_for_few(
    world: World, tmp_path: Path
) -> None:
    """No tag is longer than PostgreSQL and MySQL take, and a registry that was lost gets all."""
    one = factory.composed(tmp_path / "files", types=("Q8_0",))
    two = factory.composed(tmp_path / "files", 2, types=("Q8_0",), previous=one.id)
    _publish(world, tmp_path, one)
    _publish(world, tmp_path, two)
    for _ in range(18):
        _point(world, tmp_path, "previous")

    held = _store(world)._read(MODEL)
    alias, _ = world.open().read_alias(MODEL, STABLE)

    assert held is not None
    assert max(len(text.encode()) for text in held["tags"].values()) <= MAX_TAG_BYTES
    assert len([name for name in held["tags"] if name.startswith("fleet.moves.")]) > 0
    assert alias is not None
    assert [move.sequence for move in alias.moves] == list(range(1, 21))
    assert alias.moves == factory.ledger(tmp_path).moves("models", STABLE)


def test_garbage_beside_an_alias_is_an_error_in_words(
    tmp_path: Path, new_database: Callable[[Path], None]
) -> None:
    """A tag that looks like an earlier move of ours and is none."""
    new_database(tmp_path / "mlflow.db")
    world = _world(tmp_path, "sqlite:///mlflow.db")
    store_contract.publish(world, tmp_path, factory.composed(tmp_path / "files", types=("Q8_0",)))
    store = _open(tmp_path, "sqlite:///mlflow.db")
    store._ask("point", model=MODEL, aliases={}, tags={"fleet.moves.stable.0": "<html>"})

    with pytest.raises(StoreError, match="no JSON"):
        store.read_alias(MODEL, STABLE)


def test_a_move_too_long_for_a_tag_is_refused_before_anything_moves() -> None:
    """A person reads which words to make shorter."""
    made = store_contract._move(1, "a" * 64, None).model_copy(update={"why": "long " * 1200})

    with pytest.raises(StoreError, match=r"5,000 bytes .* Nothing was moved") as caught:
        fitted(Alias(model=MODEL, alias=STABLE, moves=(made,)))

    assert "--reason" in caught.value.hint


def test_the_document_has_room_for_a_dozen_moves() -> None:
    """What the page of this store says."""
    moves = tuple(
        store_contract._move(number, f"{number:064x}", f"{number - 1:064x}")
        for number in range(1, MAX_MOVES + 1)
    )

    text, earlier = fitted(Alias(model=MODEL, alias=STABLE, moves=moves))

    assert len(text.encode()) <= MAX_TAG_BYTES
    assert 10 <= MAX_MOVES - len(earlier) <= 20


# --- the end at any moment --------------------------------------------------------------------


@pytest.mark.parametrize("step", ["register", "complete", "point"])
def test_a_publisher_killed_between_versions_and_alias_makes_no_second_ones(
    world: World, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each question to MLflow: the next run finds what is there."""
    one = factory.composed(tmp_path / "files")
    _publish(world, tmp_path, one)
    before = one.id
    ask = MlflowStore._ask
    for number, moment in enumerate(("before", "after"), start=2):
        made = factory.composed(tmp_path / "files", number, previous=before)

        def dying(self: MlflowStore, operation: str, at: str = moment, **told: Any) -> Any:
            if operation == step and at == "before":
                raise store_contract.DiedError
            answer = ask(self, operation, **told)
            if operation == step:
                raise store_contract.DiedError
            return answer

        with monkeypatch.context() as patched:
            patched.setattr(MlflowStore, "_ask", dying)
            with pytest.raises(store_contract.DiedError):
                _publish(world, tmp_path, made)
        assert store_contract.stable(world) in {before, made.id}

        _publish(world, tmp_path, made)

        before = made.id
        assert store_contract.stable(world) == made.id
        versions = list(_by_release(world).values())
        assert sorted(set(versions)) == sorted(versions)
        assert (made.id, "Q4_K_M") in versions


def test_a_publisher_that_is_killed_for_good_leaves_no_program_behind(
    tmp_path: Path, mlflow_http: MlflowServer
) -> None:
    """SIGKILL: what talks to MLflow for it ends by itself, and the next run completes."""
    mlflow_http.forget_all()
    world = _world(tmp_path, mlflow_http.url)
    made = factory.composed(tmp_path / "files")
    script = textwrap.dedent(
        f"""
        import sys, pathlib, psutil
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import release_factory as factory, test_store_mlflow as t, store_contract
        root = pathlib.Path({str(tmp_path)!r})
        world = t._world(root, {mlflow_http.url!r})
        made = factory.composed(root / "files")
        store = world.open()
        store.put_release(made.release, made.data)
        (child,) = psutil.Process().children()
        print(child.pid, flush=True)
        sys.stdin.read()
        """
    )
    publisher = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert publisher.stdout is not None
        child = int(publisher.stdout.readline())
        publisher.send_signal(signal.SIGKILL)
    finally:
        publisher.kill()
        publisher.communicate()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)

    _publish(world, tmp_path, made)

    assert not Path(f"/proc/{child}").exists()
    assert store_contract.stable(world) == made.id
    assert len(_by_release(world)) == 2


# --- faults -----------------------------------------------------------------------------------


class _Proxy:
    """Between a store and a real server: passes on, or answers by itself what a test wants."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.requests: list[str] = []
        # Asked for each request with "METHOD path" and its number; None passes it on.
        self.answer: Callable[[str, int], tuple[int, str] | None] = lambda _what, _number: None
        # Changes the body of an answer of the real server.
        self.edit: Callable[[str, str], str] = lambda _what, body: body
        self.url = ""
        # By which name the real server is asked.
        self.host: str | None = None
        self.logins: list[str] = []

    @contextmanager
    def running(self) -> Iterator[_Proxy]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def _any(self) -> None:
                what = f"{self.command} {self.path.partition('?')[0]}"
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if not what.endswith("/health"):
                    proxy.requests.append(what)
                    proxy.logins.append(self.headers.get("Authorization", ""))
                own = proxy.answer(what, len(proxy.requests))
                if own is None:
                    passed = requests.request(
                        self.command,
                        proxy.upstream + self.path,
                        data=body,
                        headers={"Content-Type": "application/json"}
                        | ({"Host": proxy.host} if proxy.host else {}),
                        timeout=60,
                    )
                    own = passed.status_code, proxy.edit(what, passed.text)
                data = own[1].encode()
                self.send_response(own[0])
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_DELETE = _any  # noqa: N815 - of http.server

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


@pytest.fixture
def proxy(mlflow_http: MlflowServer) -> Iterator[_Proxy]:
    """A proxy before an empty server."""
    mlflow_http.forget_all()
    with _Proxy(mlflow_http.url).running() as running:
        yield running


def test_a_server_error_at_any_request_is_tried_again(proxy: _Proxy, tmp_path: Path) -> None:
    """500 or 429 at each single one: published once, without a second version."""
    world = _world(tmp_path, proxy.url)
    one = factory.composed(tmp_path / "files", types=("Q8_0",))
    _publish(world, tmp_path, one)
    # Every request after the first publish fails once, and its repetition does not.
    answered: set[str] = set()

    def each_once(what: str, number: int) -> tuple[int, str] | None:
        if what.endswith("/health") or what in answered:
            return None
        answered.add(what)
        return (500, "oops") if number % 2 else (429, "slowly")

    proxy.answer = each_once
    two = factory.composed(tmp_path / "files", 2, types=("Q8_0",), previous=one.id)

    _publish(world, tmp_path, two)

    assert len(answered) >= 6
    assert store_contract.stable(world) == two.id
    assert sorted(_by_release(world).values()) == sorted([(one.id, "Q8_0"), (two.id, "Q8_0")])


def test_an_answer_that_was_lost_makes_no_second_version(proxy: _Proxy, tmp_path: Path) -> None:
    """The server did it and its answer never came: it is looked for before it is made again."""
    world = _world(tmp_path, proxy.url)
    lost: list[str] = []

    def edit(what: str, body: str) -> str:
        if what.endswith("model-versions/create") and not lost:
            lost.append(what)
            proxy.answer = lambda _what, _number: None
            return "<html>502 Bad Gateway</html>"
        return body

    proxy.edit = edit
    made = factory.composed(tmp_path / "files")
    with pytest.raises(StoreError, match="an answer that cannot be"):
        _publish(world, tmp_path, made)

    _publish(world, tmp_path, made)

    assert lost
    assert len(_by_release(world)) == 2


def test_a_version_that_is_not_ready_is_waited_for(
    proxy: _Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No alias means it before; and not for ever."""
    world = _world(tmp_path, proxy.url)
    asked: list[str] = []

    def slow(what: str, body: str) -> str:
        if "model-versions/create" in what or (
            what.endswith("model-versions/get") and len(asked) < 3
        ):
            asked.append(what)
            return body.replace('"READY"', '"PENDING_REGISTRATION"')
        return body

    proxy.edit = slow
    one = factory.composed(tmp_path / "files", types=("Q8_0",))
    _publish(world, tmp_path, one)
    assert [what.rpartition("/")[2] for what in asked] == ["create", "get", "get"]

    proxy.edit = lambda what, body: (
        body.replace('"READY"', '"PENDING_REGISTRATION"') if "model-versions" in what else body
    )
    monkeypatch.setattr(store_module, "_READY_WITHIN_S", 1)
    two = factory.composed(tmp_path / "files", 2, types=("Q8_0",), previous=one.id)
    with pytest.raises(RetryLaterError, match="version 2 of tiny-llama is not READY after 1 s"):
        _publish(world, tmp_path, two)
    assert store_contract.stable(world) == one.id

    proxy.edit = lambda what, body: (
        body.replace('"READY"', '"FAILED_REGISTRATION"') if "model-versions" in what else body
    )
    with pytest.raises(StoreError, match="is FAILED_REGISTRATION"):
        _publish(world, tmp_path, two)


@pytest.mark.parametrize(
    ("answer", "error", "says", "hint"),
    [
        ((401, "You are not authenticated."), StoreError, "401", "MLFLOW_TRACKING_USERNAME"),
        ((403, "Permission denied"), StoreError, "403", "MLFLOW_TRACKING_USERNAME"),
        ((200, "<html>Sign in</html>"), StoreError, "an answer that cannot be", "login page"),
        ((200, "{}"), StoreError, "an answer that cannot be", "login page"),
        ((404, "no such page"), StoreError, "404", "log of the MLflow server"),
        ((503, "restarting"), RetryLaterError, "503", "Try again later"),
        ((500, '{"error_code": "INTERNAL_ERROR"}'), RetryLaterError, "500", "Try again"),
    ],
)
def test_a_refusal_says_what_to_do_before_anything_was_sent(  # noqa: PLR0913, PLR0917 - a row
    proxy: _Proxy,
    tmp_path: Path,
    answer: tuple[int, str],
    error: type[Exception],
    says: str,
    hint: str,
) -> None:
    """No file is stored for a server that does not want us."""
    world = _world(tmp_path, proxy.url)
    proxy.answer = lambda what, _number: None if what.endswith("/health") else answer
    began = time.monotonic()

    with pytest.raises(error, match=says) as caught:
        _publish(world, tmp_path, factory.composed(tmp_path / "files"))

    assert hint in getattr(caught.value, "hint", "")
    assert time.monotonic() - began < 60
    assert not (tmp_path / "registry").exists()


def test_a_server_that_was_not_told_its_name_says_so(proxy: _Proxy, tmp_path: Path) -> None:
    """The real one, asked by another name, as behind a proxy of a company."""
    proxy.host = "models.example.com"

    with pytest.raises(StoreError, match="refuses its own name") as caught:
        _open(tmp_path, proxy.url).prepare(MODEL)

    assert "Invalid Host header" in caught.value.message
    assert "--allowed-hosts" in caught.value.hint


def test_a_login_of_the_environment_is_sent_as_it_is_at_that_moment(
    proxy: _Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that expires is replaced while we run; one that is gone is not sent on."""
    store = _open(tmp_path, proxy.url)

    for password in ("one", "two"):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        store.read_alias(MODEL, STABLE)
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    store.read_alias(MODEL, STABLE)

    sent = [base64.b64decode(each.removeprefix("Basic ")).decode() for each in proxy.logins]
    assert sent == ["ada:one", "ada:two", ""]


def test_terminal_codes_and_secrets_of_an_answer_are_not_shown(
    proxy: _Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a password of ours get into an error."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2-secret")
    proxy.answer = lambda _what, _number: (418, "\x1b[31m::error::http://u:hunter2@host\u202e")

    with pytest.raises(StoreError) as caught:
        _open(tmp_path, proxy.url).read_alias(MODEL, STABLE)

    assert "hunter2" not in caught.value.message
    assert "\x1b" not in caught.value.message
    assert "::error" not in caught.value.message


def test_nobody_at_the_address_is_said_in_seconds_and_to_be_tried_later(tmp_path: Path) -> None:
    """MLflow itself would try for minutes."""
    store = _open(tmp_path, f"http://127.0.0.1:{registry_servers.free_port()}")
    began = time.monotonic()

    with pytest.raises(RetryLaterError, match="Connection refused"):
        store.prepare(MODEL)

    assert time.monotonic() - began < 60


def test_a_server_that_accepts_and_never_answers_is_given_up(
    tmp_path: Path, proxy: _Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What asks it is ended by its clock, and another one asks the next server."""
    monkeypatch.setattr(store_module, "_ANSWER_WITHIN_S", 2)
    monkeypatch.setattr(store_module, "_TRIED_FOR_S", 0.5)
    silence = threading.Event()

    def stall(what: str, _number: int) -> tuple[int, str] | None:
        if not what.endswith("/health"):
            silence.wait(30)
        return None

    proxy.answer = stall
    store = _open(tmp_path, proxy.url)
    try:
        with pytest.raises(RetryLaterError, match="no answer within 2 s"):
            store.prepare(MODEL)
    finally:
        silence.set()

    proxy.answer = lambda _what, _number: None
    assert store.read_alias(MODEL, STABLE) == (None, None)


def test_a_server_killed_in_the_middle_of_a_publish_costs_nothing(tmp_path: Path) -> None:
    """The alias means what it meant; with the server back the same command completes."""
    directory = tmp_path / "server"
    directory.mkdir()
    one = factory.composed(tmp_path / "files")
    two = factory.composed(tmp_path / "files", 2, previous=one.id)
    with registry_servers.mlflow_server(directory) as server:
        world = _world(tmp_path, server.url)
        _publish(world, tmp_path, one)
        store = store_contract.Wrapped(world.open())
        prove = store.store.prove_blob

        def prove_and_kill(*told: Any) -> None:
            prove(*told)
            os.killpg(server.process.pid, signal.SIGKILL)

        store.prove_blob = prove_and_kill  # type: ignore[method-assign, assignment]
        with pytest.raises(RetryLaterError):
            store_contract.publish(world, tmp_path, two, store)
        assert len(factory.ledger(tmp_path).moves("models", STABLE)) == 1
    port = int(server.url.rpartition(":")[2])

    with registry_servers.mlflow_server(directory, port=port):
        assert store_contract.stable(world) == one.id
        _publish(world, tmp_path, two)

        assert store_contract.stable(world) == two.id
        assert len(_by_release(world)) == 4


def test_who_moves_at_the_same_moment_is_told(world: World, tmp_path: Path) -> None:
    """MLflow takes both; what is read back is not what was written."""
    one = factory.composed(tmp_path / "files")
    two = factory.composed(tmp_path / "files", 2, previous=one.id)
    _publish(world, tmp_path, one)
    store = _store(world)
    alias, token = store.read_alias(MODEL, STABLE)
    assert alias is not None
    _publish(world, tmp_path, two)

    with pytest.raises(AliasMovedError, match="somebody else moved") as caught:
        store.write_alias(alias.moved(store_contract._move(2, one.id, one.id)), one.release, token)

    assert "only one workflow" in caught.value.hint
    assert store_contract.stable(world) == two.id


def test_a_version_of_other_bytes_is_never_taken_for_ours(world: World, tmp_path: Path) -> None:
    """Somebody edited a tag in MLflow: nothing moves to it."""
    one = factory.composed(tmp_path / "files")
    two = factory.composed(tmp_path / "files", 2, previous=one.id)
    _publish(world, tmp_path, one)
    _publish(world, tmp_path, two)
    if "sqlite" in _store(world)._uri:
        import sqlite3  # noqa: PLC0415 - one test

        with sqlite3.connect(tmp_path / "mlflow.db") as database:
            database.execute(
                "update model_version_tags set value = ? where key = ? and version = 1",
                ("0" * 64, "fleet.gguf_sha256"),
            )
        database.close()
    else:
        requests.post(
            f"{_store(world)._uri}/{API}/model-versions/set-tag",
            json={"name": MODEL, "version": "1", "key": "fleet.gguf_sha256", "value": "0" * 64},
            timeout=30,
        ).raise_for_status()

    with pytest.raises(StoreError, match="version 1 of tiny-llama with fleet"):
        _point(world, tmp_path, one.id)

    assert store_contract.stable(world) == two.id


# --- what is refused before anybody is asked --------------------------------------------------


def test_plain_http_to_another_machine_is_refused_unless_declared(tmp_path: Path) -> None:
    """Nothing was asked; TLS and this machine are no question."""
    with pytest.raises(ParamsError, match="plain HTTP") as caught:
        _open(tmp_path, "http://mlflow.example.com:5000")

    assert "insecure: true" in caught.value.hint
    _open(tmp_path, "http://mlflow.example.com:5000", insecure=True)
    _open(tmp_path, "https://mlflow.example.com")
    for address in ("http://localhost:5000", "http://127.0.0.2:5000"):
        _open(tmp_path, address)


def test_a_machine_without_mlflow_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an extra; to wait for it would be in vain."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "mlflow.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", str(hidden))
    program = store_module._Program()
    monkeypatch.setattr(store_module, "_program", program)

    with pytest.raises(MachineError, match="not installed here") as caught:
        _open(tmp_path, "sqlite:///mlflow.db").prepare(MODEL)
    program.close()

    assert "pip install" in caught.value.message


def test_the_files_cannot_be_in_another_mlflow(tmp_path: Path) -> None:
    """It keeps none."""
    inner = _open(tmp_path, "sqlite:///mlflow.db")

    with pytest.raises(ParamsError, match="is of MLflow too"):
        MlflowStore("outer", Registry(url="mlflow:sqlite:///b.db", blobs="models"), inner, tmp_path)


def test_what_it_cannot_promise_is_said(tmp_path: Path) -> None:
    """No compare-and-set; the rest is that of the registry with the files."""
    found = _open(tmp_path, "sqlite:///mlflow.db").guarantees

    assert not found.compare_and_set
    assert found.immutable
    assert "no compare-and-set" in found.sentence
    assert "registry local" in found.sentence
