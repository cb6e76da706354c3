"""Fetch of an `hf:` source: the real huggingface_hub against a stand-in for the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest
from checkpoints import CONFIG, PARAMETERS_COUNT, tiny

from pipelines.errors import DigestError, RetryLaterError, UpstreamError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
REPO = "acme/Tiny-Llama"
REVISION = "a" * 40

# What the stage does, in a process of its own: huggingface_hub reads its environment when it is
# imported, so neither the endpoint nor its absence can be changed in ours.
FETCH = """
import json, sys
from pathlib import Path
from pipelines import fetch
from pipelines.errors import FleetError
from pipelines.hub import HubRepo
repo, revision, into = sys.argv[1:]
try:
    fetched = fetch.fetch(
        HubRepo(repo, revision), Path(into), label="fetch tiny",
        known_architectures=frozenset({"LlamaForCausalLM"}),
        llama_cpp_commit="0c1e57098", revision=None,
    )
except FleetError as error:
    print(json.dumps({"code": error.exit_code, "message": error.message, "hint": error.hint}))
else:
    print(json.dumps({"code": 0, "parameters": fetched.checkpoint.parameters_count,
                      "gated": fetched.gated,
                      "files": {n: d.sha256 for n, d in fetched.digests.items()}}))
"""

SIZE = """
import dataclasses, json, sys
from pipelines import fetch
from pipelines.layout import Layout
print(json.dumps(dataclasses.asdict(fetch.size_of(*sys.argv[1:], Layout()))))
"""


@dataclass
class Hub:
    """A Hub with one repository: what it lists, what it sends, and what it was asked."""

    files: dict[str, bytes]
    revision: str = REVISION
    repo: str = REPO
    gated: Any = False
    sent: dict[str, bytes] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def listing(self) -> dict[str, Any]:
        """The answer to model_info with blobs; weights and tokenizer are in LFS, as on the Hub."""
        siblings = []
        for name, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if is_lfs(name):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"_id": "1", "id": self.repo, "modelId": self.repo, "sha": self.revision,
                "private": False, "gated": self.gated, "tags": [], "downloads": 0,
                "siblings": siblings}  # fmt: skip

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path."""
        if path.startswith("/api/"):
            if status := self.status.get("api"):
                return status, self.headers, b"{}"
            listing = json.dumps(self.listing()).encode()
            return 200, {"Content-Type": "application/json"}, listing
        name = path.rpartition("/")[2]
        if status := self.status.get(name):
            return status, self.headers, b"{}"
        listed = self.files[name]
        etag = hashlib.sha256(listed) if is_lfs(name) else hashlib.sha1(listed)
        headers = {"ETag": f'"{etag.hexdigest()}"', "X-Repo-Commit": REVISION}
        return 200, headers, self.sent.get(name, listed)

    def bodies_of(self, name: str) -> int:
        """How often the bytes of a file were asked for."""
        return sum(line.startswith("GET") and line.endswith(f"/{name}") for line in self.asked)


def is_lfs(name: str) -> bool:
    """Tell which files the stand-in keeps in LFS."""
    return name.endswith((".safetensors", ".model", ".bin"))


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free loopback port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            status, headers, content = hub.answer(path)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with a good model."""
    source = tiny(tmp_path / "upstream")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    files["modeling_tiny.py"] = b"raise SystemExit"
    files["onnx/model.safetensors"] = b"x"
    with serving(Hub(files)) as hub:
        yield hub


def fetch(hub: Hub, into: Path, revision: str = REVISION, **env: str) -> dict[str, Any]:
    """Fetch in a process of its own; return what came of it."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, REPO, revision, into],
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url,
            "NO_PROXY": "127.0.0.1", "HF_HOME": str(into.parent / "hf"), **env,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def left(into: Path) -> list[str]:
    """What a fetch left behind, its parts included."""
    work = into.parent
    return sorted(str(p.relative_to(work)) for p in work.rglob("*") if "hf" not in p.parts)


def test_a_good_repository_is_fetched_whole_and_verified(hub: Hub, tmp_path: Path) -> None:
    """Exactly the files of a build, by one listing; nothing of the Hub's bookkeeping stays."""
    into = tmp_path / "work/source"

    answer = fetch(hub, into)

    taken = ["README.md", "config.json", "model.safetensors", "tokenizer.model",
             "tokenizer_config.json"]  # fmt: skip
    assert answer["code"] == 0, answer
    assert answer["parameters"] == PARAMETERS_COUNT
    assert answer["files"] == {n: hashlib.sha256(hub.files[n]).hexdigest() for n in taken}
    assert {n: (into / n).read_bytes() for n in taken} == {n: hub.files[n] for n in taken}
    assert left(into) == ["source", *(f"source/{name}" for name in taken)]
    assert sum("/api/" in line for line in hub.asked) == 1
    assert all(f"/{REVISION}" in line for line in hub.asked)


@pytest.mark.parametrize(
    ("listed", "taken"),
    [(False, None), (None, None), ("auto", "auto"), ("manual", "manual"), (True, "manual")],
)
def test_how_upstream_guards_its_files_is_part_of_the_listing(
    hub: Hub, tmp_path: Path, listed: Any, taken: str | None
) -> None:
    """A token that may read a gated model fetches it; the record says that it is one."""
    hub.gated = listed

    answer = fetch(hub, tmp_path / "work/source")

    assert (answer["code"], answer["gated"]) == (0, taken)
    assert sum("/api/" in line for line in hub.asked) == 1


def test_the_size_of_a_model_is_asked_without_its_weights(hub: Hub, tmp_path: Path) -> None:
    """The listing and config.json tell bytes, weights and vocabulary before anything is fetched."""
    done = subprocess.run(
        [sys.executable, "-c", SIZE, f"hf:{REPO}", REVISION],
        cwd=tmp_path,
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url,
            "NO_PROXY": "127.0.0.1", "HF_HOME": str(tmp_path / "hf"),
        },
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    size = json.loads(done.stdout)
    assert size["vocabulary_tokens"] == CONFIG["vocab_size"]
    assert size["parameters_count"] == len(hub.files["model.safetensors"]) // 2
    assert hub.bodies_of("model.safetensors") == 0


def _flip_weights(hub: Hub) -> str:
    content = bytearray(hub.files["model.safetensors"])
    content[-1] ^= 1
    hub.sent["model.safetensors"] = bytes(content)
    return "model.safetensors"


def _flip_config(hub: Hub) -> str:
    hub.sent["config.json"] = hub.files["config.json"].replace(b"silu", b"gelu")
    return "config.json"


def _web_page(hub: Hub) -> str:
    page = b"<html><body>Sign in to the network</body></html>"
    hub.sent["model.safetensors"] = page.ljust(len(hub.files["model.safetensors"]))
    return "model.safetensors"


@pytest.mark.parametrize("spoil", [_flip_weights, _flip_config, _web_page])
def test_a_wrong_byte_is_refused_with_file_wanted_and_got(
    spoil: Callable[[Hub], str], hub: Hub, tmp_path: Path
) -> None:
    """A flipped bit in LFS or git, a login page of the right length: refused, nothing kept."""
    name = spoil(hub)
    listed, sent = hub.files[name], hub.sent[name]
    into = tmp_path / "work/source"

    answer = fetch(hub, into)

    def digest(content: bytes) -> str:
        blob = b"blob %d\0" % len(content) + content
        return (hashlib.sha256(content) if is_lfs(name) else hashlib.sha1(blob)).hexdigest()

    assert len(listed) == len(sent)
    assert answer["code"] == DigestError.exit_code
    assert answer["message"].startswith(f"{name} of hf:{REPO}")
    assert f"wanted {digest(listed)}" in answer["message"]
    assert f"got {digest(sent)}" in answer["message"]
    assert left(into) == []


REFUSALS: dict[str, tuple[dict[str, Any], int, str]] = {
    "gated": (
        {"status": {"api": 403}, "headers": {"X-Error-Code": "GatedRepo"}},
        UpstreamError.exit_code,
        "is gated",
    ),
    "gated at the file": (
        {"status": {"config.json": 403}, "headers": {"X-Error-Code": "GatedRepo"}},
        UpstreamError.exit_code,
        "is gated",
    ),
    "private": (
        {"status": {"api": 401}, "headers": {"X-Error-Code": "RepoNotFound"}},
        UpstreamError.exit_code,
        "does not exist, or this machine may not see it",
    ),
    "gone": (
        {"status": {"api": 404}, "headers": {"X-Error-Code": "RepoNotFound"}},
        UpstreamError.exit_code,
        "does not exist, or this machine may not see it",
    ),
    "no such revision": (
        {"status": {"api": 404}, "headers": {"X-Error-Code": "RevisionNotFound"}},
        UpstreamError.exit_code,
        "there is no such commit",
    ),
    "disabled": (
        {"status": {"api": 403}, "headers": {"X-Error-Message": "Access to this resource is "
                                             "disabled."}},
        UpstreamError.exit_code,
        "was disabled by the Hub",
    ),
    "a file that is gone": (
        {"status": {"config.json": 404}, "headers": {"X-Error-Code": "EntryNotFound"}},
        UpstreamError.exit_code,
        "config.json answers 404",
    ),
    "too many requests": ({"status": {"api": 429}}, RetryLaterError.exit_code, "answers 429"),
    "bad gateway": ({"status": {"api": 502}}, RetryLaterError.exit_code, "answers 502"),
    "renamed": ({"repo": "mallory/Tiny-Llama"}, UpstreamError.exit_code,
                "answers as mallory/Tiny-Llama"),
    "another commit": ({"revision": "b" * 40}, UpstreamError.exit_code, "with " + "b" * 40),
}  # fmt: skip


@pytest.mark.parametrize(("state", "code", "why"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_the_hub_refuses_is_said_with_the_action_to_take(
    state: dict[str, Any], code: int, why: str, hub: Hub, tmp_path: Path
) -> None:
    """Each answer has its class of exit code and a next step; no weight byte was asked for."""
    for name, value in state.items():
        setattr(hub, name, value)
    into = tmp_path / "work/source"

    answer = fetch(hub, into)

    assert answer["code"] == code, answer
    assert why in answer["message"]
    assert answer["hint"]
    assert hub.bodies_of("model.safetensors") == 0
    assert left(into) == []


def test_a_repository_with_pickles_only_is_refused_before_any_download(
    hub: Hub, tmp_path: Path
) -> None:
    """The listing alone decides."""
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    del hub.files["onnx/model.safetensors"]

    answer = fetch(hub, tmp_path / "work/source")

    assert answer["code"] == UpstreamError.exit_code
    assert "only there as pickles (pytorch_model.bin)" in answer["message"]
    assert all("/api/" in line for line in hub.asked)


def test_an_unsupported_architecture_costs_no_weight_byte(hub: Hub, tmp_path: Path) -> None:
    """config.json is enough to say so."""
    hub.files["config.json"] = b'{"architectures": ["GopherForCausalLM"]}'

    answer = fetch(hub, tmp_path / "work/source")

    assert answer["code"] == UpstreamError.exit_code
    assert "does not convert GopherForCausalLM" in answer["message"]
    assert hub.bodies_of("model.safetensors") == 0


def test_hostile_names_in_a_listing_write_nothing(hub: Hub, tmp_path: Path) -> None:
    """Names that climb, are absolute or carry control characters are not taken, or refused."""
    for name in ("../config.json", "/etc/config.json", "..\\config.json", "a/../../LICENSE"):
        hub.files[name] = b"x"
    into = tmp_path / "work/source"

    assert fetch(hub, into)["code"] == 0
    assert "x" not in [path.read_text() for path in into.glob("LICENSE*")]

    hub.files["LICENSE.\x1b[2J"] = b"x"
    answer = fetch(hub, into)
    assert answer["code"] == UpstreamError.exit_code
    assert "unsafe name 'LICENSE.\\x1b[2J'" in answer["message"]


def test_a_hub_that_is_down_or_forbidden_means_try_again_later(hub: Hub, tmp_path: Path) -> None:
    """A refused connection, and HF_HUB_OFFLINE, are exit 75 with what to check."""
    into = tmp_path / "work/source"

    down = fetch(hub, into, HF_ENDPOINT="http://127.0.0.1:9")
    offline = fetch(hub, into, HF_HUB_OFFLINE="1")

    assert down["code"] == offline["code"] == RetryLaterError.exit_code
    assert "cannot be had from http://127.0.0.1:9 now" in down["message"]
    assert "HF_HUB_OFFLINE is set" in offline["message"]
    assert hub.asked == []


def test_the_token_goes_to_the_hub_and_into_no_message(hub: Hub, tmp_path: Path) -> None:
    """A refused token is not echoed."""
    hub.status["api"] = 403
    hub.headers["X-Error-Code"] = "GatedRepo"

    answer = fetch(hub, tmp_path / "work/source", HF_TOKEN="hf_canaryCanaryCanary")

    assert answer["code"] == UpstreamError.exit_code
    assert "canary" not in json.dumps(answer).lower()
