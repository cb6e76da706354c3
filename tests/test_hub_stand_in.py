"""The stand-in for the Hub is one for huggingface_hub as it is, and says what the Hub says."""

from __future__ import annotations

import contextlib
import http.client
import random
import urllib.error
import urllib.request
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from hub import INSIDER, KINDS, Fault, Hub, Repo
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub import errors as hf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILES = {
    "README.md": b"---\nlicense: mit\n---\nA card.\n",
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "1_Pooling/config.json": b'{"word_embedding_dimension": 8}',
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub that this process uses."""
    with Hub() as hub:
        hub.use(monkeypatch)
        yield hub
        assert hub.unexpected == []


@pytest.fixture
def repo(hub: Hub) -> Repo:
    """A repository with one commit."""
    return hub.create("acme/Tiny", FILES, at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))


def test_the_real_client_reads_a_repository_whole(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    """Snapshot, refs, commits over several pages, listing and paths; a range by hand."""
    api = HfApi(endpoint=hub.url)
    first = repo.head
    hub.page = 2
    titles = ["initial commit", "b", "c", "d", "e"]
    for title in titles[1:]:
        repo.commit({"README.md": title.encode()}, title)
    repo.tag("v1", first)
    repo.branch("next", repo.head)

    into = snapshot_download(
        "acme/Tiny", revision="v1", local_dir=tmp_path / "into", endpoint=hub.url
    )

    assert {name: (tmp_path / "into" / name).read_bytes() for name in FILES} == FILES
    assert into == str(tmp_path / "into")
    refs = api.list_repo_refs("acme/Tiny")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {
        "main": repo.head,
        "next": repo.head,
    }
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    commits = api.list_repo_commits("acme/Tiny")
    assert [commit.title for commit in commits] == titles[::-1]
    assert commits[-1].commit_id == first
    assert [each.path for each in api.list_repo_tree("acme/Tiny", revision=first)] == [
        "1_Pooling", "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    info = api.model_info("acme/Tiny", revision=first, files_metadata=True)
    assert (info.sha, info.author, info.last_modified) == (
        first, "acme", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )  # fmt: skip
    assert api.model_info("acme/Tiny").sha == repo.head
    siblings = {each.rfilename: each for each in info.siblings or ()}
    weights, config = siblings["model.safetensors"], siblings["config.json"]
    paths = api.get_paths_info("acme/Tiny", ["model.safetensors", "nothing"], revision=first)
    assert [each.path for each in paths] == ["model.safetensors"]
    assert weights.lfs is not None
    assert weights.lfs.sha256 == repo.commits[first].tree["model.safetensors"].sha256
    # What `git hash-object` says of these two bytes.
    assert (config.lfs, config.blob_id) == (None, "9e26dfeeb6e641a33dae4961196235bdb965b21b")


def test_ranges_hold_only_for_the_bytes_that_they_were_begun_with(hub: Hub, repo: Repo) -> None:
    """206 with the offset; 200 with everything if the entity tag is another one; 416 beyond."""
    url = f"{hub.url}/acme/Tiny/resolve/{repo.head}/model.safetensors"
    weights = FILES["model.safetensors"]

    def get(**headers: str) -> tuple[int, bytes, str | None]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with urllib.request.urlopen(urllib.request.Request(url, headers=named)) as answer:
            return answer.status, answer.read(), answer.headers["Content-Range"]

    with urllib.request.urlopen(url) as answer:
        etag = answer.headers["ETag"]
    size = len(weights)
    assert get(Range="bytes=100-") == (206, weights[100:], f"bytes 100-{size - 1}/{size}")
    assert get(Range="bytes=0-7", If_Range=etag) == (206, weights[:8], f"bytes 0-7/{size}")
    assert get(Range="bytes=-8") == (206, weights[-8:], f"bytes {size - 8}-{size - 1}/{size}")
    assert get(Range="bytes=100-", If_Range='"other"') == (200, weights, None)
    with pytest.raises(urllib.error.HTTPError, match="416"):
        get(Range=f"bytes={size}-")
    assert {each.range for each in hub.asked("/storage/*")} >= {"", "bytes=100-"}


def test_who_may_not_read_is_told_as_the_hub_tells_it(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    """Gated, private, gone, disabled, no such commit or file: the client raises its own errors."""
    api = HfApi(endpoint=hub.url)

    def read(name: str = "config.json", revision: str = "main", token: str | None = None) -> str:
        return hf_hub_download(
            repo.name, name, revision=revision, token=token or False, endpoint=hub.url,
            local_dir=tmp_path / "into",
        )  # fmt: skip

    with pytest.raises(hf.RevisionNotFoundError):
        read(revision="0" * 40)
    with pytest.raises(hf.RemoteEntryNotFoundError):
        read("nothing.json")
    repo.gate("manual")
    assert api.model_info(repo.name).gated == "manual"
    with pytest.raises(hf.GatedRepoError):
        read()
    assert read("model.safetensors", token=INSIDER)
    repo.gate(None)
    repo.private = True
    with pytest.raises(hf.RepositoryNotFoundError):
        api.model_info(repo.name, token=False)
    assert api.model_info(repo.name, token=INSIDER).private
    repo.disable()
    with pytest.raises(hf.DisabledRepoError):
        api.model_info(repo.name, token=INSIDER)
    repo.delete()
    with pytest.raises(hf.RepositoryNotFoundError):
        api.model_info(repo.name, token=INSIDER)


def test_owners_rename_hand_over_replace_and_rewrite(hub: Hub, repo: Repo) -> None:
    """Old names lead to the new one until they are taken; a rewritten history has no old commit."""
    api = HfApi(endpoint=hub.url)
    first, id_ = repo.head, repo.id

    def known(name: str) -> tuple[str, str | None, str]:
        info = api.model_info(name)
        return info.id, info.author, vars(info)["_id"]

    repo.rename("acme/New")
    assert known("acme/Tiny") == ("acme/New", "acme", id_)
    repo.transfer("other/New")
    assert known("acme/Tiny") == known("acme/New") == ("other/New", "other", id_)
    hub.create("acme/Tiny", FILES)
    assert known("acme/Tiny")[:2] == ("acme/Tiny", "acme")
    assert known("acme/Tiny")[2] != id_
    again = repo.recreate(FILES)
    assert known("other/New") == ("other/New", "other", again.id)
    assert again.id != id_
    assert first not in again.commits

    old = again.head
    new = again.rewrite({"config.json": b"[]"})
    assert [commit.commit_id for commit in api.list_repo_commits("other/New")] == [new]
    with pytest.raises(hf.RevisionNotFoundError):
        api.model_info("other/New", revision=old)


CONTENT = random.Random(1).randbytes(1000)

# What a client without any cleverness sees of each kind, at a file of 1,000 bytes or its listing.
SEEN = {
    "flip": "200 wrong",
    "html": "200 short",
    "html_padded": "200 wrong",
    "swapped": "200 wrong",
    "short": "200 short",
    "long": "200 long",
    "empty": "200 short",
    "endless": "200 long",
    "lfs_pointer": "200 short",
    "gzip": "200 long gzip",
    "gzip_lie": "200 right gzip",
    "wrong_range": "206 short",
    "range_lie": "206 wrong",
    "range_ignored": "200 long",
    "range_refused": "416 short",
    "reset_before": "ConnectionResetError",
    "reset_mid": "ConnectionResetError",
    "cut_mid": "IncompleteRead",
    "stall_before": "TimeoutError",
    "stall_mid": "TimeoutError",
    "drip": "TimeoutError",
    "no_length": "200 right unmeasured",
    "no_length_cut": "200 short unmeasured",
    "chunked": "200 right unmeasured",
    "chunked_short": "200 short unmeasured",
    "status": "503 short",
    "retry_after": "503 short 3600",
    "retry_date": "503 short date",
    "allowance": "429 short",
    "redirect_other": "302 short /portal",
    "redirect_loop": "302 short /config.json",
    "wrong_etag": "200 right",
    "wrong_commit": "200 right",
    "wrong_linked_size": "200 right",
    "listing_missing_digest": "200 short",
    "listing_missing_size": "200 short",
    "listing_wrong_size": "200 wrong",
    "listing_lies": "200 wrong",
    "listing_other_sha": "200 wrong",
    "listing_other_id": "200 short",
    "listing_other_repository": "200 wrong",
    "listing_nothing": "200 short",
    "listing_nonsense": "200 short",
    "listing_html": "200 short",
    "listing_cut": "200 short",
    "listing_huge": "200 long",
    "listing_endless": "200 long",
    "listing_names": "200 long",
    "listing_twice": "200 long",
    "gated_mid": "401 short",
    "gone_mid": "401 short",
    "disabled_mid": "403 short",
    "moved_mid": "200 right",
    "renamed_mid": "307 short /config.json",
    "rewritten_mid": "404 short",
    "replaced_mid": "404 short",
}


def test_each_kind_of_fault_does_what_it_says(hub: Hub) -> None:
    """Seen with http.client; a fault that did nothing would let a test pass for nothing."""
    assert SEEN.keys() == KINDS.keys()
    found = {kind: _seen(hub, kind) for kind in KINDS}

    assert found == SEEN
    # A fault is done as often as it was asked for, and where it means something.
    repo = hub.repos["acme/flip"]
    url = f"{hub.url}/acme/flip/resolve/{repo.head}/config.json"
    assert urllib.request.urlopen(url).read() == CONTENT


def _seen(hub: Hub, kind: str) -> str:
    repo = hub.create(f"acme/{kind}", {"config.json": CONTENT})
    path = f"/acme/{kind}/resolve/{repo.head}/config.json"
    if KINDS[kind].where == "listing":
        path = f"/api/models/acme/{kind}/revision/{repo.head}?blobs=true"
    headers = {"Range": "bytes=500-"} if KINDS[kind].where == "range" else {}
    timeout_s = 0.2 if SEEN[kind] == "TimeoutError" else 20
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=timeout_s)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        before = connection.getresponse()
        right = before.read()
        hub.fault(f"*/{kind}/*", Fault(kind, count=20, pause_s=0.3 if kind == "drip" else 0.01))
        connection.request("GET", path, headers=headers)
        try:
            answer = connection.getresponse()
            content = answer.read(len(right) + 1)
            if len(content) < len(right) and not answer.isclosed():
                content += answer.read()
        except (TimeoutError, http.client.IncompleteRead, ConnectionResetError) as error:
            return type(error).__name__
    assert hub.requests[-1].fault == kind
    if KINDS[kind].where == "head":
        assert answer.headers.items() != before.headers.items(), kind
    return _words(answer, content, right)


def _words(answer: http.client.HTTPResponse, content: bytes, right: bytes) -> str:
    relation = ("short", "wrong", "long")[
        (len(content) >= len(right)) + (len(content) > len(right))
    ]
    words = [str(answer.status), "right" if content == right else relation]
    said = answer.headers
    if told := said["Retry-After"]:
        words.append(told if told.isdecimal() else "date")
    if told := said["Location"]:
        words.append("/" + told.rpartition("/")[2])
    if told := said["Content-Encoding"]:
        words.append(told)
    if relation != "long" and said["Content-Length"] is None:
        words.append("unmeasured")
    return " ".join(words)


def test_what_the_hub_does_not_know_is_loud(hub: Hub) -> None:
    """501, and a line that says what was asked."""
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(f"{hub.url}/api/modles/acme/Tiny")

    assert hub.unexpected == ["GET /api/modles/acme/Tiny"]
    hub.unexpected.clear()
