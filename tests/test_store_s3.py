"""Registries in S3: what every store promises, on two servers, and what only a network can do."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import release_factory as factory
from faulty_proxy import Fault, FaultyProxy, Seen
from registry_servers import free_port, versitygw_server
from store_contract import StoreContract, World

from pipelines import publishing
from pipelines.errors import DigestError, FleetError, ParamsError, RetryLaterError, StoreError
from pipelines.params import Registry
from pipelines.release_records import STABLE, Alias, Move, release_bytes, release_id
from pipelines.stores import transfer
from pipelines.stores.base import AliasMovedError, NotThereError, hash_blob
from pipelines.stores.s3 import S3Store
from pipelines.stores.s3_objects import part_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from registry_servers import S3Server

    from pipelines.release import Composed
    from pipelines.stores.base import Blob

ROOT: Final = Path(__file__).resolve().parent.parent


def world_of(server: S3Server) -> World:
    """Return an empty registry on a server, below a prefix of a bucket of its own."""
    bucket = server.new_bucket()
    registry = server.registry(bucket=bucket, prefix="models/gguf")

    def tamper(_model: str, sha256: str) -> None:
        key = f"models/gguf/blobs/sha256/{sha256}"
        if server.directory is not None:  # as a disk does it: ETag and size stay
            path = server.directory / bucket / key
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            with path.open("r+b") as file:
                file.write(data)
            return
        client = server.client()
        data = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
        data[len(data) // 2] ^= 1
        client.put_object(Bucket=bucket, Key=key, Body=bytes(data))
        client.close()

    def garble(model: str, alias: str) -> None:
        client = server.client()
        key = f"models/gguf/aliases/{model}/{alias}.json"
        client.put_object(Bucket=bucket, Key=key, Body=b"<html>no alias</html>")
        client.close()

    # Small parts: the files of these tests are sent as large ones are. 5 MiB is S3's least.
    return World(
        open=lambda: S3Store("production", registry, part_bytes=5 << 20),
        tamper=tamper,
        garble_alias=garble,
    )


class TestContract(StoreContract):
    """The one suite, on each server."""

    @pytest.fixture
    def world(self, s3_server: S3Server) -> World:
        """An empty registry."""
        return world_of(s3_server)


# --- a publish through a proxy that makes faults ----------------------------------------------


@dataclass(frozen=True)
class Line:
    """A registry behind a proxy: `open` goes through it, `direct` past it."""

    proxy: FaultyProxy
    registry: Registry
    direct: Registry

    def open(self, *, deadline_s: float = 5.0) -> S3Store:
        """Open the registry through the proxy, with the smallest parts that S3 takes."""
        return S3Store("production", self.registry, part_bytes=PART, deadline_s=deadline_s)

    def below(self, prefix: str) -> Line:
        """Return another registry in the same bucket."""
        return replace(
            self,
            registry=self.registry.model_copy(update={"url": f"{self.registry.url}/{prefix}"}),
            direct=self.direct.model_copy(update={"url": f"{self.direct.url}/{prefix}"}),
        )

    def past(self) -> S3Store:
        """Open it past the proxy."""
        return S3Store("production", self.direct, part_bytes=PART)


PART: Final = 5 << 20


@pytest.fixture
def use_versitygw(versitygw: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server whose conditions hold under races, with its login in the environment."""
    for name, value in versitygw.environment.items():
        monkeypatch.setenv(name, value)
    return versitygw


@pytest.fixture(scope="module")
def tls_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The same server behind a certificate of a private authority."""
    with versitygw_server(tmp_path_factory.mktemp("tls"), tls=True) as server:
        yield server


@pytest.fixture
def line(use_versitygw: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """A registry behind a proxy; pauses between attempts are short."""
    monkeypatch.setattr(transfer, "_FIRST_PAUSE_S", 0.01)
    bucket = use_versitygw.new_bucket()
    with FaultyProxy(use_versitygw.endpoint) as proxy:
        yield Line(
            proxy=proxy,
            registry=use_versitygw.registry(bucket=bucket, endpoint=proxy.endpoint),
            direct=use_versitygw.registry(bucket=bucket),
        )


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this user has seen of registries is another user's business."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def small(directory: Path, seed: int = 1, *, size_bytes: int = PART + 1000) -> Composed:
    """Make a release of one GGUF, which goes in two parts, and one small file."""
    made = factory.composed(directory, seed, types=("Q8_0",), size_bytes=size_bytes)
    roles = {"gguf", "license"}
    files = tuple(file for file in made.release.files if file.role in roles)
    kept = {file.sha256 for file in files}
    release = made.release.model_copy(update={"files": files})
    data = release_bytes(release)
    return replace(
        made,
        release=release,
        data=data,
        id=release_id(data),
        blobs=tuple(blob for blob in made.blobs if blob.sha256 in kept),
    )


def gguf_of(made: Composed) -> Blob:
    """Return the large file of a release."""
    return max(made.blobs, key=lambda blob: blob.size_bytes)


def publish_to(store: S3Store, directory: Path, made: Composed) -> publishing.Outcome:
    """Publish from the checkout in `directory`."""
    ledger = factory.ledger(directory)
    return publishing.publish(made, store, ledger, stable="latest", by=factory.by())


def is_part(seen: Seen) -> bool:
    """Tell whether a request sends a part."""
    return seen.method == "PUT" and "partNumber=" in seen.path


FAULTS: Final = {
    "answers 500 and then 429": Fault("status", status=500),
    "breaks the connection before it does anything": Fault("refuse"),
    "does it and loses the answer": Fault("lose"),
    "answers 200 with a page of HTML": Fault("html"),
    "cuts the answer": Fault("cut", after_bytes=20),
    "garbles the answer": Fault("corrupt", after_bytes=200),
    "cuts the request": Fault("cut_request", after_bytes=1000),
}


# A write that was done and is not known to be, and an answer that looks like one: at each request.
# The others break a connection or pass, all on one way through the code: each request meets one of
# them, in turn, and another one when the order is turned.
TURNS: Final = {
    "does it and loses the answer": [FAULTS["does it and loses the answer"]],
    "answers 200 with a page of HTML": [FAULTS["answers 200 with a page of HTML"]],
    "breaks in some way": [
        fault for fault in FAULTS.values() if fault.kind not in {"lose", "html"}
    ],
}


@pytest.mark.parametrize("faults", TURNS.values(), ids=TURNS)
def test_whatever_request_of_a_publish_fails_nothing_half_is_seen_and_the_next_run_completes(
    line: Line, tmp_path: Path, faults: list[Fault]
) -> None:
    """For each request in turn: it is made again, or the publish ends with a next step."""
    number, struck = 0, True
    while struck:
        number += 1
        # Other bytes each time, so that every run has everything to send.
        made = small(tmp_path / "files", number)
        struck = publish_twice(line, tmp_path, made, faults[number % len(faults)], number)
    assert number > 15, "every request of a publish was struck"
    moves = factory.ledger(tmp_path).moves("production", STABLE)
    assert [move.sequence for move in moves] == list(range(1, number + 1))


@pytest.mark.parametrize("faults", TURNS.values(), ids=TURNS)
def test_whatever_request_of_the_very_first_publish_fails_the_next_run_completes(
    line: Line, tmp_path: Path, faults: list[Fault]
) -> None:
    """Into an empty prefix, small files alone: what is created, and not replaced."""
    made = small(tmp_path, size_bytes=1000)
    number, struck = 0, True
    while struck:
        number += 1
        fault = faults[-number % len(faults)]
        struck = publish_twice(
            line.below(f"run-{number}"), tmp_path / f"{number}", made, fault, number
        )
    assert number > 15, "every request of a publish was struck"


def publish_twice(line: Line, directory: Path, made: Composed, fault: Fault, number: int) -> bool:
    """
    Publish with a fault at one request, look at what can be seen then, and publish again.

    Returns:
        Whether there was such a request.
    """
    before, _ = line.past().read_alias(made.release.model, STABLE)
    line.proxy.forget()
    line.proxy.strike(fault, at=number)
    if fault.kind == "status":  # and the next attempt is too early
        line.proxy.strike(Fault("status", status=429, headers={"Retry-After": "0"}), at=number)
    hints = ["none is needed"]
    try:
        publish_to(line.open(), directory, made)
    except FleetError as error:
        hints = [error.hint]
    assert all(hints), "an error says what to do next"
    struck = any(seen.fault for seen in line.proxy.seen)

    now, _ = line.past().read_alias(made.release.model, STABLE)
    if now != before:
        assert now is not None
        assert now.release == made.id
        assert is_whole(line.past(), made)
    if hints == ["none is needed"]:
        assert now != before
        return struck
    line.proxy.forget()
    publish_to(line.open(), directory, made)
    now, _ = line.past().read_alias(made.release.model, STABLE)
    assert now is not None
    assert now.release == made.id
    assert len(now.moves) == 1 + (len(before.moves) if before else 0)
    assert is_whole(line.past(), made)
    return struck


def is_whole(store: S3Store, made: Composed) -> bool:
    """Tell whether every byte of a release can be read."""
    for blob in made.blobs:
        store.prove_blob(made.release.model, blob, lambda _: None)
    return store.read_release(made.release.model, made.id) == made.data


def test_a_service_that_stays_away_is_said_to_be_away_and_what_was_sent_is_not_sent_again(
    line: Line, tmp_path: Path
) -> None:
    """RetryLaterError within the deadline; the next run sends the rest alone."""
    made = small(tmp_path, size_bytes=3 * PART)
    line.proxy.strike(Fault("status", status=503), at=1, when=lambda s: is_last(s, 3), times=-1)

    with pytest.raises(RetryLaterError) as caught:
        publish_to(line.open(deadline_s=0.3), tmp_path, made)
    assert "try again" in caught.value.hint.lower()
    assert line.past().blob_size(made.release.model, gguf_of(made).sha256) is None

    line.proxy.forget()
    publish_to(line.open(), tmp_path, made)
    assert sum(seen.sent_bytes for seen in line.proxy.seen if is_part(seen)) == PART
    assert is_whole(line.past(), made)


def is_last(seen: Seen, number: int) -> bool:
    """Tell whether a request sends the part of that number."""
    return is_part(seen) and f"partNumber={number}" in seen.path


# --- kill -------------------------------------------------------------------------------------

_PUBLISHER: Final = """
import sys
from pathlib import Path
from pipelines.params import Registry
from pipelines.stores.base import Blob
from pipelines.stores.s3 import S3Store
url, endpoint, path, sha256, size = sys.argv[1:]
blob = Blob(name="x.gguf", sha256=sha256, size_bytes=int(size), media_type="a/b", source=Path(path))
store = S3Store("production", Registry(url=url, endpoint=endpoint), part_bytes=5 << 20)
print(store.put_blob("tiny-llama", blob, lambda done: None))
"""


def start_publisher(line: Line, blob: Blob) -> subprocess.Popen[str]:
    """Start a process that sends one file."""
    assert line.registry.endpoint is not None
    argv = [line.registry.url, line.registry.endpoint, str(blob.source), blob.sha256]
    return subprocess.Popen(
        [sys.executable, "-c", _PUBLISHER, *argv, str(blob.size_bytes)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_after_kill_9_in_the_middle_of_a_file_the_next_run_sends_the_missing_parts_alone(
    line: Line, use_versitygw: S3Server, tmp_path: Path
) -> None:
    """What the server has by then is not sent again: the proxy counts the bytes."""
    blob = gguf_of(small(tmp_path, size_bytes=10 * PART + 77))
    line.proxy.strike(Fault("slow", pause_s=0.1), when=is_part, times=-1)
    with start_publisher(line, blob) as first:
        while sum(is_part(s) and s.status == 200 for s in list(line.proxy.seen)) < 4:
            assert first.poll() is None
            time.sleep(0.01)
        first.kill()
    time.sleep(0.3)  # what was under way at that moment arrives, or breaks
    client = use_versitygw.client()
    bucket = line.registry.url.removeprefix("s3://")
    upload = client.list_multipart_uploads(Bucket=bucket)["Uploads"][0]
    kept = client.list_parts(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])["Parts"]
    client.close()
    kept_bytes = sum(part["Size"] for part in kept)
    assert 4 * PART <= kept_bytes < blob.size_bytes
    assert line.past().blob_size("tiny-llama", blob.sha256) is None

    line.proxy.forget()
    with start_publisher(line, blob) as second:
        assert second.stdout is not None
        told_bytes = int(second.stdout.read())
    sent_bytes = sum(seen.sent_bytes for seen in line.proxy.seen if is_part(seen))

    assert second.returncode == 0
    assert sent_bytes == told_bytes == blob.size_bytes - kept_bytes
    line.past().prove_blob("tiny-llama", blob, lambda _: None)


def test_ctrl_c_ends_a_publisher_whose_service_has_fallen_silent(
    line: Line, tmp_path: Path
) -> None:
    """It does not wait for the answers to what it is sending."""
    blob = gguf_of(small(tmp_path, size_bytes=4 * PART))
    line.proxy.strike(Fault("slow", pause_s=50), when=is_part, times=-1)
    with start_publisher(line, blob) as publisher:
        while not any(is_part(s) and s.sent_bytes == PART for s in list(line.proxy.seen)):
            assert publisher.poll() is None
            time.sleep(0.01)
        publisher.send_signal(signal.SIGINT)
        assert publisher.wait(timeout=30) != 0

    assert line.past().blob_size("tiny-llama", blob.sha256) is None


def test_parts_of_other_bytes_that_somebody_left_are_replaced(
    line: Line, use_versitygw: S3Server, tmp_path: Path
) -> None:
    """A part is taken for sent only if its size and MD5 are those of the file here."""
    blob = gguf_of(small(tmp_path, size_bytes=3 * PART))
    client = use_versitygw.client()
    bucket, key = line.registry.url.removeprefix("s3://"), f"blobs/sha256/{blob.sha256}"
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    where = {"Bucket": bucket, "Key": key, "UploadId": upload}
    client.upload_part(**where, PartNumber=1, Body=bytes(PART))
    client.upload_part(**where, PartNumber=2, Body=b"short")
    client.upload_part(**where, PartNumber=9, Body=b"of a longer file")
    client.close()

    assert line.open().put_blob("tiny-llama", blob, lambda _: None) == blob.size_bytes
    line.past().prove_blob("tiny-llama", blob, lambda _: None)


def test_a_large_file_that_is_not_what_its_name_says_gets_no_name_and_leaves_no_parts(
    line: Line, use_versitygw: S3Server, tmp_path: Path
) -> None:
    """It is known at its end only, when all parts are there; they are thrown away."""
    blob = gguf_of(small(tmp_path, size_bytes=3 * PART))
    assert isinstance(blob.source, Path)
    with blob.source.open("r+b") as file:
        file.seek(PART)
        file.write(b"rot")

    with pytest.raises(DigestError, match="Nothing of it has a name"):
        line.open().put_blob("tiny-llama", blob, lambda _: None)

    assert line.past().blob_size("tiny-llama", blob.sha256) is None
    client = use_versitygw.client()
    uploads = client.list_multipart_uploads(Bucket=line.registry.url.removeprefix("s3://"))
    client.close()
    assert "Uploads" not in uploads


# What S3 says when two are at the same name, and when it fails after it has begun to answer.
PASSING: Final = {
    "409 ConditionalRequestConflict": (409, "ConditionalRequestConflict"),
    "200 and an error in the body": (200, "InternalError"),
    "400 RequestTimeout": (400, "RequestTimeout"),
    "503 SlowDown": (503, "SlowDown"),
}


@pytest.mark.parametrize(("status", "code"), PASSING.values(), ids=PASSING)
def test_what_passes_by_itself_is_tried_again(
    line: Line, tmp_path: Path, status: int, code: str
) -> None:
    """When a large file is completed, and when the alias is moved."""
    made = small(tmp_path)
    fault = Fault("status", status=status, body=said(code))
    line.proxy.strike(fault, when=lambda s: s.method == "POST" and "uploadId=" in s.path)
    if status != 200:  # PUT has no such answer
        line.proxy.strike(fault, when=lambda s: s.method == "PUT" and "/aliases/" in s.path)

    publish_to(line.open(), tmp_path, made)

    assert sum(seen.fault is not None for seen in line.proxy.seen) == (1 if status == 200 else 2)
    assert is_whole(line.past(), made)


# --- many at once -----------------------------------------------------------------------------


def test_of_sixteen_who_move_an_alias_at_once_one_does_in_every_round(
    line: Line, tmp_path: Path
) -> None:
    """On versitygw: moto is one process with a lock, and proves nothing about others."""
    writers, rounds = 16, 12
    stores = [line.past() for _ in range(writers)]
    for store in stores:
        store.prepare("tiny-llama")
    together = threading.Barrier(writers)
    release = small(tmp_path, size_bytes=1000).release
    moves: list[Move] = []

    def move(number: int) -> Move | None:
        found, token = stores[number].read_alias("tiny-llama", STABLE)
        mine = Move(
            sequence=len(moves) + 1,
            action="publish",
            release=factory.sha256(b"a release"),
            previous=None,
            at="2027-01-31T12:00:00Z",
            who=f"writer {number}",
            why="a race",
            run=None,
        )
        alias = (
            found.moved(mine) if found else Alias(model="tiny-llama", alias=STABLE, moves=(mine,))
        )
        together.wait()
        try:
            stores[number].write_alias(alias, release, token)
        except AliasMovedError:
            return None
        return mine

    for _ in range(rounds):
        with ThreadPoolExecutor(writers) as pool:
            won = [mine for mine in pool.map(move, range(writers)) if mine]
        assert len(won) == 1
        moves += won
    found, _ = line.past().read_alias("tiny-llama", STABLE)
    assert found is not None
    assert found.moves == tuple(moves)


def test_of_many_who_send_the_same_large_file_at_once_all_succeed(
    line: Line, tmp_path: Path
) -> None:
    """They may even share an upload: its parts are the same. On versitygw; moto loses such."""
    blob = gguf_of(small(tmp_path, size_bytes=3 * PART))
    together = threading.Barrier(6)

    def send(_: int) -> int:
        store = line.past()
        together.wait()
        return store.put_blob("tiny-llama", blob, lambda _: None)

    with ThreadPoolExecutor(6) as pool:
        sent = list(pool.map(send, range(6)))

    assert max(sent) <= 3 * blob.size_bytes
    line.past().prove_blob("tiny-llama", blob, lambda _: None)


# --- reading ----------------------------------------------------------------------------------


def test_a_reader_goes_on_after_a_cut_in_the_middle_of_a_file(line: Line, tmp_path: Path) -> None:
    """The rest of the very same object is asked for, by range and ETag."""
    blob = gguf_of(small(tmp_path))
    line.past().put_blob("tiny-llama", blob, lambda _: None)
    line.proxy.strike(Fault("cut", after_bytes=3_000_000))

    data = b"".join(line.open().read_blob("tiny-llama", blob.sha256))

    assert factory.sha256(data) == blob.sha256
    _, again = line.proxy.seen
    assert again.headers["range"].startswith("bytes=")
    assert again.headers["range"] != "bytes=0-"
    assert "if-match" in again.headers


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(line: Line, tmp_path: Path) -> None:
    """Not the beginning of one and the end of another."""
    blob = gguf_of(small(tmp_path))
    line.past().put_blob("tiny-llama", blob, lambda _: None)
    line.proxy.strike(Fault("cut", after_bytes=3_000_000))
    reader = line.open().read_blob("tiny-llama", blob.sha256)
    next(reader)
    line.past()._put(f"blobs/sha256/{blob.sha256}", bytes(blob.size_bytes), "replacing")

    with pytest.raises(StoreError, match="replaced meanwhile"):
        b"".join(reader)


def test_one_changed_bit_on_the_way_is_found_when_a_file_is_proven(
    line: Line, tmp_path: Path
) -> None:
    """The digest is of what arrives, not of what the service says it sent."""
    blob = gguf_of(small(tmp_path))
    store = line.open()
    store.put_blob("tiny-llama", blob, lambda _: None)
    line.proxy.strike(Fault("corrupt", after_bytes=4_000_000))

    with pytest.raises(DigestError, match="gives other bytes"):
        store.prove_blob("tiny-llama", blob, lambda _: None)
    store.prove_blob("tiny-llama", blob, lambda _: None)


# --- what services say ------------------------------------------------------------------------


def said(code: str, message: str = "It says why.") -> bytes:
    """Write an error as S3 does."""
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


@pytest.mark.parametrize(
    ("status", "code", "text", "hint"),
    [
        (400, "ExpiredToken", "the login has expired", "AWS_SESSION_TOKEN"),
        (403, "RequestTimeTooSkewed", "clocks", "timedatectl"),
        (403, "AccessDenied", "may not do that", "s3:PutObject"),
        (403, "SignatureDoesNotMatch", "the login is wrong", "AWS_ACCESS_KEY_ID"),
        (403, "QuotaExceeded", "the store is full", "fleet gc"),
        (507, "XMinioStorageFull", "the store is full", "fleet gc"),
        (404, "NoSuchBucket", "there is no bucket", "Create it"),
        (501, "NotImplemented", "does not know", "conditional writes"),
        (400, "AuthorizationHeaderMalformed", "another region", "region"),
        (400, "EntityTooLarge", "too large", "max_file_mib"),
        (404, "", "no S3", "endpoint"),
        (418, "Teapot", "Teapot: It says why", "log of the service"),
    ],
)
def test_each_refusal_is_said_in_words_with_a_next_step(  # noqa: PLR0913, PLR0917 - a table
    line: Line, tmp_path: Path, status: int, code: str, text: str, hint: str
) -> None:
    """Whatever request it strikes; it is not repeated, for waiting changes nothing."""
    store = line.open()
    store.prepare("tiny-llama")
    line.proxy.forget()
    body = said(code) if code else b"<html>404</html>"
    line.proxy.strike(Fault("status", status=status, body=body), times=-1)
    blob = gguf_of(small(tmp_path, size_bytes=1000))

    with pytest.raises(StoreError) as caught:
        store._put(f"blobs/sha256/{blob.sha256}", b"", "writing x.gguf")

    assert text in caught.value.message
    assert hint in caught.value.hint
    assert len(line.proxy.seen) == 1
    assert "not-a-secret" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    "entries",
    [
        b"<Contents><Key>x</Key></Contents>",
        b"<Contents><Size>1</Size></Contents>",
        b"<CommonPrefixes></CommonPrefixes>",
    ],
)
def test_a_list_whose_entries_lack_what_they_always_have_is_of_no_s3(
    line: Line, entries: bytes
) -> None:
    """It is an error in words, whichever list it is."""
    body = b"<ListBucketResult><IsTruncated>false</IsTruncated>%b</ListBucketResult>" % entries
    line.proxy.strike(Fault("status", status=200, body=body), times=-1)

    with pytest.raises(StoreError, match="no S3"):
        list(line.open().list_blobs())
    with pytest.raises(StoreError, match="no S3"):
        line.open().list_models()


def test_a_body_without_an_end_is_not_hashed_for_ever() -> None:
    """Once more bytes came than a blob has, it is another file."""
    found, size_bytes = hash_blob(itertools.repeat(b"x" * 1000), lambda _: None, most_bytes=5000)
    assert size_bytes == 6000
    assert found != factory.sha256(b"x" * 5000)


@pytest.mark.parametrize("code", ["ExpiredToken", "NoSuchBucket", "AccessDenied"])
def test_an_answer_without_a_body_is_asked_about(line: Line, code: str) -> None:
    """HEAD has none: a missing bucket or a lapsed login is not taken for a missing file."""
    status = {"ExpiredToken": 400, "NoSuchBucket": 404, "AccessDenied": 403}[code]
    line.proxy.strike(Fault("status", status=status, body=said(code)), times=-1)

    with pytest.raises(StoreError) as caught:
        line.open().blob_size("tiny-llama", factory.sha256(b""))

    assert not isinstance(caught.value, NotThereError)
    assert caught.value.hint


def test_a_login_that_expires_in_the_middle_ends_the_run_and_the_next_one_goes_on(
    line: Line, tmp_path: Path
) -> None:
    """The parts that were sent before stay."""
    made = small(tmp_path, size_bytes=3 * PART)
    expired = Fault("status", status=400, body=said("ExpiredToken"))
    line.proxy.strike(expired, when=lambda seen: is_last(seen, 3), times=-1)

    with pytest.raises(StoreError, match="the login has expired"):
        publish_to(line.open(), tmp_path, made)
    line.proxy.forget()
    publish_to(line.open(), tmp_path, made)

    assert sum(seen.sent_bytes for seen in line.proxy.seen if is_part(seen)) == PART


def test_real_refusals_of_a_real_service_are_understood(
    use_versitygw: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong secret, an unknown key, no bucket, no login at all."""
    registry = use_versitygw.registry()
    nowhere = registry.model_copy(update={"url": "s3://there-is-none"})
    with pytest.raises(StoreError, match="there is no bucket there-is-none"):
        S3Store("production", nowhere).prepare("tiny-llama")
    with pytest.raises(StoreError, match="there is no bucket there-is-none"):
        S3Store("production", nowhere).blob_size("tiny-llama", factory.sha256(b""))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="the login is wrong"):
        S3Store("production", registry).prepare("tiny-llama")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StoreError, match="the login is wrong"):
        S3Store("production", registry).blob_size("tiny-llama", factory.sha256(b""))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="there is no login"):
        S3Store("production", registry).prepare("tiny-llama")


def test_a_service_where_nobody_listens_is_worth_another_try(
    use_versitygw: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RetryLaterError, after the deadline."""
    monkeypatch.setattr(transfer, "_FIRST_PAUSE_S", 0.01)
    registry = use_versitygw.registry(endpoint=f"http://127.0.0.1:{free_port()}")

    with pytest.raises(RetryLaterError, match="cannot be reached"):
        S3Store("production", registry, deadline_s=0.2).prepare("tiny-llama")


# --- what is declared -------------------------------------------------------------------------


def test_plain_http_to_another_machine_is_refused_unless_it_is_declared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever the address comes from."""
    far = Registry(url="s3://bucket", endpoint="http://192.0.2.1:9000")
    with pytest.raises(ParamsError, match="plain HTTP") as caught:
        S3Store("production", far)
    assert "registries.production.insecure" in caught.value.hint
    assert S3Store("production", far.model_copy(update={"insecure": True})).name == "production"
    for near in ("http://127.0.0.1:9000", "http://localhost:9000", "https://192.0.2.1"):
        S3Store("production", far.model_copy(update={"endpoint": near}))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://192.0.2.1:9000")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    with pytest.raises(ParamsError, match="plain HTTP"):
        S3Store("production", Registry(url="s3://bucket", region="us-east-1")).prepare("x")


def test_a_service_that_ignores_conditions_is_found_out_and_said_to_be_one(
    moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """As old clones do. Publishing works; less is promised, and an alias is read back."""
    for name, value in moto_s3.environment.items():
        monkeypatch.setenv(name, value)
    with FaultyProxy(moto_s3.endpoint) as proxy:
        dropped = {"If-None-Match": "", "If-Match": ""}
        proxy.strike(Fault("strip", headers=dropped), times=-1)
        store = S3Store("production", moto_s3.registry(endpoint=proxy.endpoint))
        made = small(tmp_path, size_bytes=1000)

        publish_to(store, tmp_path, made)

        assert not store.guarantees.compare_and_set
        assert not store.guarantees.immutable
        assert "ignores conditional writes" in store.guarantees.sentence
        assert "ignores conditional writes" in capsys.readouterr().err
        alias, token = store.read_alias("tiny-llama", STABLE)
        assert alias is not None
        assert alias.release == made.id
        with pytest.raises(AliasMovedError):
            store.write_alias(alias, made.release, "an older token")
        store.put_release(made.release, made.data)
        store.write_alias(alias, made.release, token)


def test_a_service_that_refuses_conditions_as_unknown_is_published_to_without_them(
    line: Line, tmp_path: Path
) -> None:
    """501 for a header: files, release and alias are stored all the same."""
    unknown = Fault("status", status=501, body=said("NotImplemented"))
    line.proxy.strike(
        unknown, when=lambda s: "if-none-match" in s.headers or "if-match" in s.headers, times=-1
    )
    store = line.open()
    made = small(tmp_path)

    publish_to(store, tmp_path, made)

    assert not store.guarantees.compare_and_set
    assert is_whole(line.past(), made)
    assert line.past().blob_size("tiny-llama", factory.sha256(b"")) is None


def test_no_checksums_in_trailers_are_sent_unless_that_is_asked_for(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old services choke on them; Content-MD5 they all know."""
    line.open().prepare("tiny-llama")
    plain = line.proxy.seen[0].headers
    assert "content-md5" in plain
    assert not [name for name in plain if name.startswith("x-amz-checksum")]

    line.proxy.forget()
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    line.open().prepare("tiny-llama")
    assert [name for name in line.proxy.seen[0].headers if name.startswith("x-amz-checksum")]


def test_a_service_with_a_private_authority_is_used_once_the_authority_is_named(
    tls_s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Over TLS bodies are sent in other ways than over plain HTTP; they arrive all the same."""
    for name, value in tls_s3.environment.items():
        monkeypatch.setenv(name, value)
    registry = tls_s3.registry()
    with pytest.raises(StoreError, match="certificate is not trusted") as caught:
        S3Store("production", registry, deadline_s=5).prepare("tiny-llama")
    assert "AWS_CA_BUNDLE" in caught.value.hint

    monkeypatch.setenv("AWS_CA_BUNDLE", str(tls_s3.ca))
    made = small(tmp_path)
    store = S3Store("production", registry, part_bytes=PART)
    publish_to(store, tmp_path, made)

    assert is_whole(store, made)
    assert store.guarantees.compare_and_set


def test_the_limit_of_a_file_is_the_declared_one_and_at_most_that_of_s3() -> None:
    """5 TiB, unless less is declared."""
    registry = Registry(url="s3://bucket", max_file_mib=100)
    assert S3Store("production", registry).guarantees.max_file_bytes == 100 << 20
    whole = registry.model_copy(update={"max_file_mib": None})
    assert S3Store("production", whole).guarantees.max_file_bytes == 5 << 40


@pytest.mark.parametrize("size_bytes", [1, 16 << 20, 160 << 30, 5 << 40, (5 << 40) - 1])
def test_no_file_has_more_parts_than_s3_takes(size_bytes: int) -> None:
    """The parts of a very large file are larger."""
    part = part_bytes(size_bytes)
    assert 16 << 20 <= part <= 5 << 30
    assert -(-size_bytes // part) <= 10_000


# --- housekeeping -----------------------------------------------------------------------------


def test_more_files_than_fit_into_one_answer_are_listed(
    line: Line, use_versitygw: S3Server
) -> None:
    """S3 lists a thousand at a time."""
    assert use_versitygw.directory is not None
    bucket = line.registry.url.removeprefix("s3://")
    place = use_versitygw.directory / bucket / "blobs/sha256"
    place.mkdir(parents=True)
    names = {factory.sha256(str(number).encode()) for number in range(1005)}
    for name in names:
        (place / name).write_bytes(b"x")
    (place / "notes.txt").write_bytes(b"no blob")

    assert {blob.sha256 for blob in line.open().list_blobs()} == names


def test_an_old_file_that_is_taken_into_use_again_is_young_again(
    line: Line, use_versitygw: S3Server, tmp_path: Path
) -> None:
    """Else a collection that runs meanwhile could take it; not a byte of it is sent."""
    assert use_versitygw.directory is not None
    blob = gguf_of(small(tmp_path))
    store = line.open()
    store.put_blob("tiny-llama", blob, lambda _: None)
    bucket = line.registry.url.removeprefix("s3://")
    path = use_versitygw.directory / bucket / f"blobs/sha256/{blob.sha256}"
    old = time.time() - 40 * 86400
    os.utime(path, (old, old))
    [listed] = store.list_blobs()
    assert listed.age_s is not None
    assert listed.age_s > 39 * 86400
    line.proxy.forget()

    assert store.put_blob("tiny-llama", blob, lambda _: None) == 0

    [listed] = store.list_blobs()
    assert listed.age_s is not None
    assert listed.age_s < 3600
    assert line.proxy.sent_bytes == 0
    store.delete_blob(blob.sha256)
    assert list(store.list_blobs()) == []
    assert list(store._listed("used/sha256/")) == []


def test_uploads_that_nobody_goes_on_with_are_ended_after_a_day(
    line: Line, use_versitygw: S3Server
) -> None:
    """Young ones are left alone, and so is what others upload to the bucket."""
    client = use_versitygw.client()
    bucket = line.registry.url.removeprefix("s3://")
    ours = f"blobs/sha256/{factory.sha256(b'')}"
    for key in (ours, "somebody/elses.bin"):
        client.create_multipart_upload(Bucket=bucket, Key=key)

    assert line.open().sweep() == 0
    assert line.open().sweep(older_than_s=0) == 1

    left = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    client.close()
    assert [upload["Key"] for upload in left] == ["somebody/elses.bin"]


def test_another_file_under_the_name_of_a_blob_is_never_overwritten(
    line: Line, tmp_path: Path
) -> None:
    """Its size says so before a byte is sent."""
    blob = gguf_of(small(tmp_path))
    line.past()._put(f"blobs/sha256/{blob.sha256}", b"something else", "planting")

    with pytest.raises(StoreError, match="Nothing was overwritten"):
        line.open().put_blob("tiny-llama", blob, lambda _: None)
    assert line.past().blob_size("tiny-llama", blob.sha256) == len(b"something else")
