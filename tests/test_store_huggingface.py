"""Registries on the Hugging Face Hub: huggingface_hub unmodified against a stand-in of the Hub."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast, get_args

import hub_writable
import huggingface_hub
import pytest
import release_factory as factory
from huggingface_hub import constants
from store_contract import MODEL, StoreContract, World, publish, stable

from pipelines import publishing
from pipelines.errors import (
    DigestError,
    FleetError,
    GateError,
    ParamsError,
    RetryLaterError,
    StoreError,
)
from pipelines.params import Registry
from pipelines.release_records import STABLE
from pipelines.stores import huggingface_client, transfer
from pipelines.stores.base import NotThereError
from pipelines.stores.huggingface import HuggingFaceStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hub_writable import Asked, Fault, Hub

    from pipelines.release import Composed

ROOT = Path(__file__).resolve().parent.parent
REPO = f"acme/{MODEL}-GGUF"
CANARIES = (
    hub_writable.WRITE_TOKEN, hub_writable.READ_TOKEN, hub_writable.JWT, hub_writable.RUNNER_TOKEN,
    "signature=",
)  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub without a repository, and a token in the environment that may write to it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transfer, "_FIRST_PAUSE_S", 0.01)
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


# --- one file, one pass -----------------------------------------------------------------------


@pytest.fixture
def one(tmp_path: Path) -> Composed:
    """A release of one quant."""
    return factory.composed(tmp_path / "files", types=("Q8_0",))


@pytest.fixture
def two(tmp_path: Path, one: Composed) -> Composed:
    """Its successor: other weights, the same small files."""
    return factory.composed(tmp_path / "files", 2, types=("Q8_0",), previous=one.id)


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this user has seen is another one's business, and tests wait for nobody."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(publishing, "_LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(transfer, "_FIRST_PAUSE_S", 0.01)


PUT = """
import hashlib, json, re, resource, sys
from pathlib import Path
from pipelines.params import Registry
from pipelines.stores.base import Blob
from pipelines.stores.huggingface import HuggingFaceStore
url, path, sha256 = sys.argv[1:]
path = Path(path)
size = path.stat().st_size
blob = Blob(name=path.name, sha256=sha256, size_bytes=size, media_type="x", source=path)
store = HuggingFaceStore("hub", Registry(url="hf:acme", endpoint=url))
store.prepare("tiny-llama")
read = lambda: int(re.search(r"rchar: (\\d+)", Path("/proc/self/io").read_text())[1])
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
began, small = read(), rss()
sent = store.put_blob("tiny-llama", blob, lambda _: None)
print(json.dumps({"sent": sent, "read": read() - began, "rss": rss() - small}))
"""


def environment(hub: Hub, **changes: str) -> dict[str, str]:
    """Return the environment of a publisher's own process."""
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url,
        "HF_HOME": str(hub.root / "hf"), **changes,
    }  # fmt: skip


@pytest.mark.parametrize("part_bytes", [None, 5 << 20])
def test_a_large_file_is_read_once_in_little_memory(
    part_bytes: int | None, hub: Hub, tmp_path: Path
) -> None:
    """Whole or in parts: hashed while it is sent, by one pass over the disk."""
    hub.part_bytes = part_bytes
    path = tmp_path / "large.gguf"
    block = b"GGUF\0" + bytes(range(251)) * 4
    with path.open("wb") as file:
        for _ in range(48):
            file.write((block * 1100)[: 1 << 20])
    size_bytes = path.stat().st_size

    done = subprocess.run(
        [sys.executable, "-c", PUT, hub.url, path, factory.sha256(path.read_bytes())],
        env=environment(hub), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["sent"] == hub.received == size_bytes
    assert size_bytes <= told["read"] < size_bytes * 1.05
    assert told["rss"] < 32 << 20
    assert hub.object(factory.sha256(path.read_bytes())).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("part_bytes", [None, 10_000])
def test_a_file_that_changes_while_it_is_sent_gets_no_name(
    part_bytes: int | None, hub: Hub, one: Composed
) -> None:
    """The last bytes of something else are never sent, and the Hub keeps nothing of it."""
    hub.part_bytes = part_bytes
    store = opened(hub)
    blob = next(each for each in one.blobs if each.name.endswith(".gguf"))
    path = cast("Path", blob.source)
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    with pytest.raises(DigestError, match="Q8_0"):
        store.put_blob(MODEL, blob, lambda _: None)

    assert hub.repos[REPO].objects == set()
    assert not hub.object(blob.sha256).exists()


def test_what_a_killed_publisher_has_sent_is_not_sent_again(
    hub: Hub, tmp_path: Path, one: Composed
) -> None:
    """No commit names it yet; the Hub has it all the same."""
    for blob in one.blobs:
        opened(hub).put_blob(MODEL, blob, lambda _: None)
    assert opened(hub).list_releases(MODEL) == ()
    sent_bytes = hub.received
    hub.begin()

    outcome = publish(world_of(hub), tmp_path, one)

    assert sent_bytes > 0
    assert hub.received == sent_bytes
    assert not [each for each in hub.asked if each.method == "PUT"]
    assert outcome.uploaded_bytes < sent_bytes
    assert stable(world_of(hub)) == one.id


def test_a_rollback_sends_no_byte_of_a_large_file_and_one_commit(
    hub: Hub, tmp_path: Path, one: Composed, two: Composed
) -> None:
    """Main gets the files of the release from within the Hub, by one commit with one parent."""
    publish(world_of(hub), tmp_path, one)
    publish(world_of(hub), tmp_path, two)
    repo, received, served = hub.repos[REPO], hub.received, hub.served
    before = repo.head
    hub.begin()

    publishing.point(MODEL, one.id, opened(hub), factory.ledger(tmp_path), by=factory.by())

    assert (hub.received, hub.served) == (received, served)
    assert not [each for each in hub.asked if each.method == "PUT"]
    # The documents: release.json, the card, the alias.
    assert sum(each.body_bytes for each in hub.asked) < 40_000
    assert repo.head.parent == before.id
    gguf = one.release.of("gguf")[0]
    assert factory.sha256(hub.file(REPO, gguf.name)) == gguf.sha256
    assert hub.file(REPO, "release.json") == one.data
    assert one.id in hub.file(REPO, "README.md").decode()


# --- whatever goes wrong, at every request ----------------------------------------------------


@contextmanager
def _each_request(hub: Hub, tmp_path: Path, one: Composed) -> Iterator[Callable[[int], Path]]:
    """Publish one release; then bring Hub and checkout back to that state as often as asked."""
    publish(world_of(hub), tmp_path / "base", one)
    repos = copy.deepcopy(hub.repos)

    def again(number: int) -> Path:
        hub.repos = copy.deepcopy(repos)
        hub.begin()
        shutil.rmtree(
            tmp_path / "state", ignore_errors=True
        )  # who goes back in time has seen nothing
        checkout = tmp_path / f"checkout{number}"
        ledger = checkout / f"results/{MODEL}/ledger.jsonl"
        ledger.parent.mkdir(parents=True)
        ledger.write_bytes((tmp_path / f"base/results/{MODEL}/ledger.jsonl").read_bytes())
        return checkout

    yield again


def _meant(hub: Hub) -> str:
    """What the alias on main means."""
    alias = json.loads(hub.file(REPO, "fleet/aliases/stable.json"))
    release: str = alias["moves"][-1]["release"]
    return release


def _require_whole(hub: Hub, *allowed: str) -> None:
    """
    See that readers find one of these releases, and that no tag is one of half a release.

    Looked at is what the Hub holds, past the code under test.
    """
    repo = hub.repos[REPO]
    assert _meant(hub) in allowed
    assert factory.sha256(hub.file(REPO, "release.json")) == _meant(hub)
    for revision in ("main", *repo.tags):
        commit = repo.at(revision)
        assert commit is not None
        held = {factory.sha256(hub.read(entry)) for entry in commit.tree.values()}
        release = json.loads(hub.file(REPO, "release.json", revision))
        assert {file["sha256"] for file in release["files"]} <= held


# Those of a group go the same way through the code: each request meets one of them, in turn.
PASSING: Final[tuple[Fault, ...]] = ("500", "429", "cut")
REFUSING: Final[tuple[Fault, ...]] = ("401", "403", "html")
GROUPS: Final[dict[str, tuple[Fault, ...]]] = {
    "what passes": PASSING,
    "what does not": REFUSING,
    "lost": ("lost",),
    "late 500": ("late 500",),
}


def test_every_fault_that_the_hub_can_be_made_to_show_is_tried() -> None:
    """But 503, which is a 500 to everybody who reads it."""
    tried = {fault for group in GROUPS.values() for fault in group}
    assert tried == set(get_args(hub_writable.Fault)) - {"503"}


@pytest.mark.parametrize("faults", GROUPS.values(), ids=GROUPS)
def test_a_fault_at_any_request_leaves_the_release_before_or_the_whole_new_one(
    faults: tuple[Fault, ...], hub: Hub, tmp_path: Path, one: Composed, two: Composed
) -> None:
    """
    It is got over, or it is an error with no secret in it; the next run completes.

    An answer that is lost after something was done matters for requests that do something.
    """
    hub.retry_after = "0"
    with _each_request(hub, tmp_path, one) as again:
        publish(world_of(hub), again(0), two)
        asked, failed = list(hub.asked), 0
        for number, request in enumerate(asked):
            fault = faults[number % len(faults)]
            if fault in {"lost", "late 500"} and request.method == "GET":
                continue
            checkout = again(number + 1)
            hub.faults = {number: fault}
            refused: FleetError | None = None
            try:
                publish(world_of(hub), checkout, two)
            except FleetError as error:
                refused = error
            if refused is not None:
                failed += 1
                told = f"{refused.message} {refused.hint}"
                assert not [canary for canary in CANARIES if canary in told], told
                assert refused.hint or isinstance(refused, NotThereError), told
                _require_whole(hub, one.id, two.id)
                hub.begin()
                publish(world_of(hub), checkout, two)
            _require_whole(hub, two.id)
            moves = factory.ledger(checkout).moves("hub", STABLE)
            assert [move.release for move in moves] == [one.id, two.id]

    assert len(asked) > 20
    # What may pass is tried again; a refusal and an answer that is none are not.
    assert (failed > len(asked) // 2) if faults is REFUSING else (failed == 0)


# Forks publishers, each with everything imported: a hundred of them in the time of ten.
PUBLISHERS = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import release_factory as factory
from pipelines import publishing
from pipelines.params import Registry
from pipelines.stores import transfer
from pipelines.stores.huggingface import HuggingFaceStore
publishing._LONGEST_PAUSE_S, transfer._FIRST_PAUSE_S = 0.05, 0.01
for line in sys.stdin:
    told = json.loads(line)
    child = os.fork()
    if not child:
        checkout, files = Path(told["checkout"]), Path(told["files"])
        store = HuggingFaceStore("hub", Registry(url="hf:acme", endpoint=told["url"]))
        ledger = factory.ledger(checkout)
        if told["roll_back"]:
            publishing.point(factory.MODEL, "previous", store, ledger, by=factory.by())
        else:
            one = factory.composed(files, types=("Q8_0",))
            two = factory.composed(files, 2, types=("Q8_0",), previous=one.id)
            publishing.publish(two, store, ledger, stable="latest", by=factory.by())
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def _publishers(hub: Hub) -> Iterator[Callable[..., tuple[int, list[Asked]]]]:
    """Yield what runs one publisher and has it killed at its n-th request; -9 says that it was."""
    with subprocess.Popen(
        [sys.executable, "-c", PUBLISHERS, ROOT / "tests"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(hub), text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None

        def run(kill_at: int, when: str, **told: Any) -> tuple[int, list[Asked]]:
            assert process.stdin is not None
            assert process.stdout is not None
            pid: list[int] = []

            def kill(number: int, *_: object) -> None:
                if number == kill_at:
                    os.kill(pid[0], signal.SIGKILL)

            hub.before = hub.after = None
            setattr(hub, when, kill)
            with hub.lock:  # no request is counted before we know who asks
                process.stdin.write(json.dumps({"url": hub.url, **told}) + "\n")
                process.stdin.flush()
                pid.append(int(process.stdout.readline()))
            code = int(process.stdout.readline())
            hub.before = hub.after = None
            return code, list(hub.asked)

        yield run
        process.stdin.close()


@pytest.mark.parametrize("roll_back", [False, True], ids=["publish", "rollback"])
def test_a_publisher_killed_at_any_moment_leaves_no_half_and_the_next_run_completes(
    *, roll_back: bool, hub: Hub, tmp_path: Path, one: Composed, two: Composed
) -> None:
    """
    Main is where it was, or it holds the whole release; nobody has to mend anything.

    Killed is right after each request that changes the Hub, and before the first of them: what
    there is right before another one is what there was after the one before it.
    """
    target = one if roll_back else two
    told = {"files": str(tmp_path / "files"), "roll_back": roll_back}
    with _each_request(hub, tmp_path, one) as again, _publishers(hub) as run:
        if roll_back:
            publish(world_of(hub), tmp_path / "base", two)
        base = copy.deepcopy(hub.repos)
        checkout = again(0)
        hub.repos = copy.deepcopy(base)
        code, asked = run(-1, "before", checkout=str(checkout), **told)
        assert code == 0
        writes = [number for number, request in enumerate(asked) if request.method != "GET"]
        moments = [(writes[0], "before"), *((number, "after") for number in writes)]
        for count, (number, when) in enumerate(moments):
            checkout = again(count + 1)
            hub.repos = copy.deepcopy(base)
            head = hub.repos[REPO].head.id
            code, _ = run(number, when, checkout=str(checkout), **told)
            assert code == -signal.SIGKILL, (number, when)
            _require_whole(hub, one.id, two.id)
            if _meant(hub) != target.id:
                assert hub.repos[REPO].head.id == head
            hub.begin()
            if roll_back:
                ledger = factory.ledger(checkout)
                publishing.point(MODEL, one.id, opened(hub), ledger, by=factory.by())
            else:
                publish(world_of(hub), checkout, two)
            _require_whole(hub, target.id)

    assert len(moments) > (4 if roll_back else 10)


def test_an_hour_of_retry_after_is_not_waited_for(hub: Hub, tmp_path: Path, one: Composed) -> None:
    """The library would sleep 3,601 s five times; here the deadline ends it, with what to do."""
    hub.retry_after = "3600"
    registry = Registry(url="hf:acme", endpoint=hub.url)
    store = HuggingFaceStore("hub", registry, deadline_s=0.2)
    hub.faults = dict.fromkeys(range(100), "429")

    with pytest.raises(RetryLaterError, match="429") as refused:
        publish(world_of(hub), tmp_path, one, store)

    assert refused.value.hint


def test_a_hub_that_is_down_means_try_again_later(hub: Hub, tmp_path: Path, one: Composed) -> None:
    """Nothing listens there."""
    registry = Registry(url="hf:acme", endpoint="http://127.0.0.1:9")
    store = HuggingFaceStore("hub", registry, deadline_s=0.2)

    with pytest.raises(RetryLaterError, match="cannot be reached"):
        publish(world_of(hub), tmp_path, one, store)


@pytest.mark.parametrize("fault", ["lost", "late 500"])
def test_a_move_whose_answer_is_lost_is_known_to_be_ours(
    fault: Fault, hub: Hub, tmp_path: Path, one: Composed, two: Composed
) -> None:
    """The library's answer would be that the branch has moved: by our own commit."""
    publish(world_of(hub), tmp_path, one)
    publish(world_of(hub), tmp_path, two)
    store = opened(hub)
    alias, token = store.read_alias(MODEL, STABLE)
    assert alias is not None
    back = alias.moves[0].model_copy(update={"sequence": 3, "action": "rollback"})
    hub.begin()

    def commits(number: int, method: str, path: str) -> None:
        if method == "POST" and path.endswith("/commit/main") and not hub.faults:
            hub.faults[number] = fault

    hub.before = commits
    store.write_alias(alias.moved(back), one.release, token)

    assert stable(world_of(hub)) == one.id
    assert [each.status for each in hub.asked if each.path.endswith("/commit/main")] in (
        [0, 412],
        [500, 412],
    )


# --- who may, and who may not -----------------------------------------------------------------


def test_a_token_that_may_only_read_is_refused_before_anything_is_sent(
    hub: Hub, tmp_path: Path, one: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence says what the token needs, and does not hold it."""
    hub.create(REPO)
    monkeypatch.setenv("HF_TOKEN", hub_writable.READ_TOKEN)

    with pytest.raises(StoreError, match="403") as refused:
        publish(world_of(hub), tmp_path, one)

    assert "write access" in refused.value.hint
    assert hub_writable.READ_TOKEN not in str(refused.value)
    assert hub.writes() == []


def test_no_token_and_a_wrong_owner_are_said_at_once(
    hub: Hub, tmp_path: Path, one: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was made, nothing was sent."""
    stranger = HuggingFaceStore("hub", Registry(url="hf:somebody", endpoint=hub.url))
    with pytest.raises(StoreError, match="not in somebody"):
        publish(world_of(hub), tmp_path, one, stranger)

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(StoreError) as refused:
        publish(world_of(hub), tmp_path, one)

    assert "HF_TOKEN" in refused.value.hint
    assert hub.writes() == []
    assert hub.repos == {}


def test_a_token_that_expires_on_the_way_is_an_error_and_the_next_run_goes_on(
    hub: Hub, tmp_path: Path, one: Composed
) -> None:
    """After the upload, before the commit: what was sent is not sent again with the new token."""

    def expire(_number: int, _method: str, path: str) -> None:
        if path.endswith("/branch/release-" + one.id[:12]):
            hub.expired.add(hub_writable.WRITE_TOKEN)

    hub.before = expire
    with pytest.raises(StoreError, match="does not accept the token") as refused:
        publish(world_of(hub), tmp_path, one)
    assert "HF_TOKEN" in refused.value.hint
    assert hub_writable.WRITE_TOKEN not in f"{refused.value.message} {refused.value.hint}"

    hub.before = None
    hub.expired.clear()
    sent_bytes = hub.received
    publish(world_of(hub), tmp_path, one)
    assert hub.received == sent_bytes
    assert stable(world_of(hub)) == one.id


KEYLESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import release_factory as factory
from pipelines import publishing
from pipelines.errors import FleetError
from pipelines.params import Registry
from pipelines.stores.huggingface import HuggingFaceStore
directory, endpoint = Path(sys.argv[2]), sys.argv[3] or None
made = factory.composed(directory / "files", types=("Q8_0",))
try:
    store = HuggingFaceStore("hub", Registry(url="hf:acme", endpoint=endpoint), deadline_s=0.5)
    publishing.publish(made, store, factory.ledger(directory), stable="latest", by=factory.by())
except FleetError as error:
    print(type(error).__name__, error.message, error.hint)
"""


def _keyless(hub: Hub, tmp_path: Path, endpoint: str = "", **changes: str) -> str:
    """Publish in a job of GitHub's without a token of the Hub; return what it said."""
    env = environment(
        hub,
        GITHUB_ACTIONS="true",
        HF_OIDC_RESOURCE=REPO,
        ACTIONS_ID_TOKEN_REQUEST_URL=f"{hub.url}/oidc/mint?job=1",
        ACTIONS_ID_TOKEN_REQUEST_TOKEN=hub_writable.RUNNER_TOKEN,
    )
    env.pop("HF_TOKEN", None)
    done = subprocess.run(
        [sys.executable, "-c", KEYLESS, ROOT / "tests", tmp_path, endpoint],
        env=env | changes, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not [canary for canary in CANARIES if canary in done.stdout + done.stderr]
    return done.stdout


def test_a_job_of_githubs_publishes_without_a_stored_token(
    hub: Hub, tmp_path: Path, one: Composed
) -> None:
    """Its identity is exchanged once, for the very repository, and serves for everything."""
    hub.create(REPO)

    assert _keyless(hub, tmp_path) == ""

    assert [each["resource"] for each in hub.exchanged] == [REPO]
    assert stable(world_of(hub)) == one.id


def test_a_job_without_an_identity_is_told_what_it_needs(hub: Hub, tmp_path: Path) -> None:
    """No permission, a refused exchange, or another address: no silent way around."""
    hub.create(REPO)

    missing = _keyless(hub, tmp_path, ACTIONS_ID_TOKEN_REQUEST_URL="")
    refused = _keyless(hub, tmp_path, HF_OIDC_ID_TOKEN="somebody else's")
    elsewhere = _keyless(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9", endpoint=hub.url)

    for told in (missing, refused):
        assert told.startswith("StoreError")
        assert "id-token: write" in told
    assert "invalid_grant" in refused
    assert f"Set HF_ENDPOINT={hub.url}" in elsewhere
    assert hub.exchanged == []
    assert hub.writes() == [each for each in hub.writes() if each.path == "/oauth/token"]


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_as_private_as_declared_and_an_old_one_stays_as_it_is(
    *, private: bool, hub: Hub, tmp_path: Path, one: Composed, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody's repository is opened or closed by a publication; a difference is said."""
    publish(world_of(hub), tmp_path, one, opened(hub, private=private))
    assert hub.repos[REPO].private is private
    assert capsys.readouterr().err == ""

    publish(world_of(hub), tmp_path, one, opened(hub, private=not private))

    assert hub.repos[REPO].private is private
    now = "private" if private else "public"
    assert f"is {now}" in capsys.readouterr().err


def test_gated_and_disabled_repositories_are_said_with_what_to_do(
    hub: Hub, tmp_path: Path, one: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader without access to a gated one; anybody with a disabled one."""
    publish(world_of(hub), tmp_path, one)
    hub.repos[REPO].gated = True
    monkeypatch.setenv("HF_TOKEN", hub_writable.READ_TOKEN)
    with pytest.raises(StoreError, match="gated") as gated:
        publishing.resolve(opened(hub), MODEL, STABLE)
    assert "conditions" in gated.value.hint

    hub.repos[REPO].disabled = True
    with pytest.raises(StoreError, match="disabled"):
        publishing.resolve(opened(hub), MODEL, STABLE)


def test_a_public_release_is_read_without_any_token(
    hub: Hub, tmp_path: Path, one: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that only pulls holds no secret; a private repository tells it nothing."""
    publish(world_of(hub), tmp_path, one, opened(hub, private=False))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))

    assert stable(world_of(hub)) == one.id
    file = one.release.of("gguf")[0]
    publishing.read_to(opened(hub), MODEL, file, tmp_path / "x.gguf", lambda _: None)
    assert factory.sha256((tmp_path / "x.gguf").read_bytes()) == file.sha256

    hub.repos[REPO].private = True
    with pytest.raises(NotThereError, match="may not see it") as unseen:
        publishing.resolve(opened(hub), MODEL, STABLE)
    assert "HF_TOKEN" in unseen.value.hint


def test_a_file_beyond_the_limit_is_refused_before_any_byte(hub: Hub, tmp_path: Path) -> None:
    """The declared limit, and the one that the Hub documents."""
    large = factory.composed(tmp_path / "files", types=("Q8_0",), size_bytes=(1 << 20) + 1)
    store = opened(hub, max_file_mib=1)

    with pytest.raises(GateError, match="takes files up to"):
        publish(world_of(hub), tmp_path, large, store)
    with pytest.raises(StoreError, match="takes files up to"):
        store.put_blob(MODEL, large.blobs[3], lambda _: None)

    assert hub.asked == []
    assert opened(hub).guarantees.max_file_bytes == 500_000_000_000


def test_plain_http_to_another_machine_is_refused_unless_declared() -> None:
    """The token would be readable by everybody between."""
    with pytest.raises(ParamsError, match="plain HTTP"):
        HuggingFaceStore("hub", Registry(url="hf:acme", endpoint="http://mirror.example"))
    HuggingFaceStore("hub", Registry(url="hf:acme", endpoint="https://mirror.example"))
    registry = Registry(url="hf:acme", endpoint="http://mirror.example", insecure=True)
    HuggingFaceStore("hub", registry)


# --- what others do, and what lies ------------------------------------------------------------


def test_a_hub_that_has_other_bytes_is_refused_before_there_is_a_tag(
    hub: Hub, tmp_path: Path, one: Composed, two: Composed
) -> None:
    """Its listing tells another sha256 than was sent: the release before stays what it is."""
    publish(world_of(hub), tmp_path, one)
    head = hub.repos[REPO].head.id
    hub.lies[two.release.of("gguf")[0].sha256] = "0" * 64

    with pytest.raises(StoreError, match="is not sha256"):
        publish(world_of(hub), tmp_path, two)

    assert hub.repos[REPO].head.id == head
    assert list(hub.repos[REPO].tags) == [f"release-{one.id[:12]}"]


def test_a_hub_whose_small_files_are_other_ones_is_refused_before_the_alias_moves(
    hub: Hub, tmp_path: Path, one: Composed, two: Composed
) -> None:
    """A tag whose Modelfile somebody changed is not what the alias may mean."""
    publish(world_of(hub), tmp_path, one)
    publish(world_of(hub), tmp_path, two)
    hub_writable.tampered(
        hub,
        REPO,
        "Modelfile",
        hub_writable.regular(b"FROM ./other.gguf\n"),
        f"release-{one.id[:12]}",
    )
    head = hub.repos[REPO].head.id

    with pytest.raises(FleetError, match="Modelfile"):
        publishing.point(MODEL, one.id, opened(hub), factory.ledger(tmp_path), by=factory.by())

    assert hub.repos[REPO].head.id == head


def test_a_tag_that_somebody_moved_is_an_error_and_is_not_overwritten(
    hub: Hub, tmp_path: Path, one: Composed, two: Composed
) -> None:
    """It is named after one release and holds another."""
    publish(world_of(hub), tmp_path, one)
    publish(world_of(hub), tmp_path, two)
    tags = hub.repos[REPO].tags
    tags[f"release-{one.id[:12]}"] = tags[f"release-{two.id[:12]}"]

    with pytest.raises(StoreError, match="nothing was overwritten"):
        opened(hub).put_release(one.release, one.data)
    with pytest.raises(StoreError, match=one.id[:12]):
        opened(hub).list_releases(MODEL)


def test_files_of_others_stay_and_ours_of_the_release_before_go(
    hub: Hub, tmp_path: Path, one: Composed
) -> None:
    """What we did not put there is not ours, and what somebody changed is not ours any more."""
    publish(world_of(hub), tmp_path, factory.composed(tmp_path / "files", 5))
    hub_writable.committed(hub, REPO, "notes.md", hub_writable.regular(b"by hand"))
    hub_writable.committed(hub, REPO, "Modelfile", hub_writable.regular(b"FROM by-hand\n"))
    fewer = one.release.model_copy(
        update={"files": tuple(x for x in one.release.files if x.role != "modelfile")}
    )
    made = factory_composed(one, fewer)

    publish(world_of(hub), tmp_path, made)

    tree = hub.repos[REPO].head.tree
    assert {".gitattributes", "notes.md", "LICENSE", f"{MODEL}-Q8_0.gguf"} <= set(tree)
    assert f"{MODEL}-Q4_K_M.gguf" not in tree
    assert hub.file(REPO, "Modelfile") == b"FROM by-hand\n"
    named = {f"fleet/blobs/{each.sha256}" for each in fewer.files}
    assert {path for path in tree if path.startswith("fleet/blobs/")} <= named


def factory_composed(made: Composed, release: Any) -> Composed:
    """Compose the same files into a release that names fewer of them."""
    from pipelines.release_records import release_bytes  # noqa: PLC0415 - only here

    data = release_bytes(release)
    wanted = {file.sha256 for file in release.files}
    blobs = tuple(blob for blob in made.blobs if blob.sha256 in wanted)
    return replace(made, release=release, data=data, id=factory.sha256(data), blobs=blobs)


def test_a_commit_by_hand_in_between_is_kept_and_publishing_goes_on(
    hub: Hub, tmp_path: Path, one: Composed, two: Composed
) -> None:
    """The move is refused by its parent, decided again, and made on top of the other commit."""
    publish(world_of(hub), tmp_path, one)
    by_hand: list[str] = []

    def commit(_number: int, method: str, path: str) -> None:
        if (method, path.rpartition("/commit/")[2]) == ("POST", "main") and not by_hand:
            entry = hub_writable.regular(b"by hand")
            by_hand.append(hub_writable.committed(hub, REPO, "notes.md", entry))

    hub.before = commit
    outcome = publish(world_of(hub), tmp_path, two)

    assert outcome.moved is not None
    assert outcome.moved.sequence == 2
    assert hub.repos[REPO].head.parent == by_hand[0]
    assert hub.file(REPO, "notes.md") == b"by hand"
    assert 412 in [each.status for each in hub.asked]


def test_a_gitignore_that_keeps_files_out_is_an_error_not_half_a_release(
    hub: Hub, tmp_path: Path, one: Composed
) -> None:
    """The library leaves such files out without a word."""
    hub.create(REPO).gitignore = ("fleet/*",)

    with pytest.raises(StoreError, match="gitignore keeps out fleet/blobs"):
        publish(world_of(hub), tmp_path, one)

    assert hub.repos[REPO].tags == {}


def test_small_models_in_git_itself_and_long_listings_are_no_other_case(
    hub: Hub, tmp_path: Path, one: Composed, two: Composed
) -> None:
    """The Hub decides what is large, and how many files are on a page."""
    hub.all_regular = True
    hub.page = 3
    publish(world_of(hub), tmp_path, one)
    publish(world_of(hub), tmp_path, two)
    publishing.point(MODEL, one.id, opened(hub), factory.ledger(tmp_path), by=factory.by())

    assert hub.received == 0
    assert stable(world_of(hub)) == one.id
    _require_whole(hub, one.id, two.id)


def test_a_removed_release_can_be_brought_back_from_what_main_holds(
    hub: Hub, tmp_path: Path, one: Composed
) -> None:
    """As a collection does that finds out late; files of others' releases are not removed."""
    publish(world_of(hub), tmp_path, one)
    store = opened(hub)
    age_s = store.release_age_s(MODEL, one.id)
    assert age_s is not None
    assert age_s < 3600
    store.delete_release(MODEL, one.id)
    assert (store.list_releases(MODEL), store.list_models()) == ((), ())
    assert list(hub.repos[REPO].branches) == ["main"]

    sent_bytes = hub.received
    store.put_release(one.release, one.data)

    assert hub.received == sent_bytes
    assert stable(world_of(hub)) == one.id
    with pytest.raises(StoreError, match="a release holds"):
        store.delete_blob(one.blobs[0].sha256)


def test_what_people_and_ollama_look_for_is_there_by_name(
    hub: Hub, tmp_path: Path, one: Composed
) -> None:
    """GGUFs, Modelfile and licence by name, Ollama's params, and the card of this release."""
    publish(world_of(hub), tmp_path, one)

    tree = hub.repos[REPO].head.tree
    assert {f"{MODEL}-Q8_0.gguf", "Modelfile", "LICENSE", "params", "release.json"} <= set(tree)
    assert hub.file(REPO, "params") == b'{"num_ctx":512}'
    card = hub.file(REPO, "README.md").decode()
    assert f"ollama pull hf.co/{REPO}:Q8_0" in card
    assert one.id in card


class _Endless(BaseHTTPRequestHandler):
    """Answers everything by JSON that does not end, or that unpacks to as much."""

    protocol_version = "HTTP/1.1"
    packed = False

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        if type(self).packed:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b"10000\r\n%b\r\n" % (b" " * (1 << 16)))

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library may ask a server, by a client of its own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.close_session()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_without_an_end_is_not_collected(
    *, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one unpacked that nobody asked to be packed."""
    monkeypatch.setattr(huggingface_client, "_MAX_ANSWER_BYTES", 1 << 20)
    kind = type("Answers", (_Endless,), {"packed": packed})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        store = HuggingFaceStore("hub", Registry(url="hf:acme", endpoint=endpoint), deadline_s=1)
        with pytest.raises(StoreError, match="packed" if packed else "larger than any"):
            store.read_alias(MODEL, STABLE)
        server.shutdown()


def test_a_hub_elsewhere_cannot_send_us_to_servers_of_this_machine() -> None:
    """By a redirect or by the address of its storage: neither there nor over plain HTTP."""
    hub_ = huggingface_client.Hub.of("hub", Registry(url="hf:acme"), 1)
    for url in (
        "http://127.0.0.1:11434/api/delete",
        "https://localhost/x",
        "https://169.254.169.254/latest/meta-data",
        "http://storage.example.org/x",
    ):
        assert not hub_.may_be_asked(url)
    assert hub_.may_be_asked("https://storage.example.org/signed?x=y")


@pytest.mark.usefixtures("online")
def test_a_redirect_over_plain_http_to_another_machine_is_not_followed() -> None:
    """Whatever request of the library meets it."""

    class Leads(_Endless):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", "http://192.0.2.1/x")
            self.send_header("Content-Length", "0")
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Leads) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        store = HuggingFaceStore("hub", Registry(url="hf:acme", endpoint=endpoint), deadline_s=1)
        with pytest.raises(StoreError, match="nothing is sent or read"):
            store.read_alias(MODEL, STABLE)
        server.shutdown()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    "told",
    [
        (
            b'{"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": 7}],'
            b' "converts": [], "tags": []}'
        ),
        (
            b'{"branches": [{"name": "main", "ref": "x", "targetCommit": "../.."}],'
            b' "converts": [], "tags": []}'
        ),
        b'{"branches": 7, "converts": [], "tags": []}',
        b"[]",
    ],
)
def test_branches_that_cannot_be_are_an_error_in_words(told: bytes) -> None:
    """What is no commit gets into no address."""

    class Says(_Endless):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

    with ThreadingHTTPServer(("127.0.0.1", 0), Says) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        store = HuggingFaceStore("hub", Registry(url="hf:acme", endpoint=endpoint), deadline_s=1)
        with pytest.raises(StoreError, match="answers what the Hub does not"):
            store.read_alias(MODEL, STABLE)
        server.shutdown()
