"""A release gets into the operator's own Ollama whole, or the name means what it meant."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import registry_servers
import release_factory as factory
import requests
import serving_factory
from release_factory import MODEL

from pipelines import gguf_header, publishing, serve
from pipelines.errors import (
    DigestError,
    FleetError,
    GateError,
    MachineError,
    ParamsError,
    RetryLaterError,
    StoreError,
)
from pipelines.release_records import (
    STABLE,
    ReleasedHost,
    ReleaseFile,
    release_bytes,
    release_id,
)
from pipelines.serving import modelfile, ollama_store, own_ollama
from pipelines.serving.server import ServingError
from pipelines.stores.base import Blob
from pipelines.stores.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.release import Composed
    from pipelines.release_records import Role
    from pipelines.serving.engine import Engine

pytestmark = pytest.mark.toolchain
ROOT = Path(__file__).resolve().parent.parent
NAME = f"fleet/{MODEL}:stable"


@dataclass(frozen=True)
class Fleet:
    """A registry with releases, and an Ollama of the operator's."""

    root: Path
    url: str
    models: Path

    @property
    def store(self) -> LocalStore:
        """The registry."""
        return LocalStore("local", self.root / "registry")

    def publish(self, made: Composed) -> str:
        """Publish a release; return its id."""
        return publishing.publish(
            made, self.store, factory.ledger(self.root), stable="latest", by=factory.by()
        ).release

    def serve(self, wanted: str = STABLE, **options: Any) -> serve.ServeResult:
        """Serve a release, as the verb does."""
        told: dict[str, Any] = {"url": self.url, "models_dir": self.models} | options
        return serve.run(self.store, factory.ledger(self.root), model=MODEL, wanted=wanted, **told)

    def digests(self) -> dict[str, str]:
        """What the Ollama lists."""
        models = requests.get(f"{self.url}/api/tags", timeout=30).json()["models"]
        return {each["name"]: each["digest"] for each in models}

    def chat(self, name: str = NAME) -> requests.Response:
        """Ask a name as a client does."""
        body = {
            "model": name,
            "messages": [{"role": "user", "content": "state"}],
            "stream": False,
            "options": {"num_predict": 4, "temperature": 0, "seed": 1},
        }
        return requests.post(f"{self.url}/api/chat", json=body, timeout=60)

    def answers(self, name: str = NAME) -> bool:
        """Whether a name answers to the end."""
        answer = self.chat(name)
        return answer.ok and answer.json()["done"] is True

    def manifest(self, tag: str) -> bytes | None:
        """What a tag of the model means on the disk."""
        path = self.models / f"manifests/registry.ollama.ai/fleet/{MODEL}/{tag}"
        return path.read_bytes() if path.exists() else None


@contextlib.contextmanager
def _ollama(engine: Engine, models: Path, home: Path) -> Iterator[str]:
    """Run the real Ollama on a folder, as an operator does; yield its address."""
    port = registry_servers.free_port()
    home.mkdir(exist_ok=True)
    environment = {
        "HOME": str(home),
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "OLLAMA_MODELS": str(models),
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NOHISTORY": "1",
    }
    url = f"http://127.0.0.1:{port}"
    with registry_servers.serving(
        [str(engine.ollama), "serve"], f"{url}/api/version", home / "log", env=environment
    ):
        yield url


@pytest.fixture
def fleet(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """A fleet whose Ollama has nothing yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    models = tmp_path / "models"
    models.mkdir()
    with _ollama(engine, models, tmp_path / "home") as url:
        yield Fleet(tmp_path, url, models)


def composed(  # noqa: PLR0913 - each is one independent fact, named at the call
    directory: Path,
    seed: int = 1,
    *,
    previous: str | None = None,
    break_gguf: Callable[[bytes], bytes] | None = None,
    context_tokens: int = 512,
    promised_tokens: int | None = None,
) -> Composed:
    """
    Make a release of a real small model in two quants, with the manifests that Ollama takes.

    Args:
        directory: For the GGUFs.
        seed: Of the weights.
        previous: Id of the release before.
        break_gguf: Changes the bytes of what is published as a GGUF.
        context_tokens: Of its params layer.
        promised_tokens: What the release says of that, if something else.
    """
    base = factory.composed(directory / "notes", seed, types=("F16", "F32"), previous=previous)
    files = [f for f in base.release.files if f.role not in _OF_OLLAMA]
    blobs = [b for b in base.blobs if b.sha256 in {f.sha256 for f in files}]
    quants = []
    for quant, dtype in zip(base.release.quants, ("F16", "F32"), strict=True):
        path = serving_factory.model(
            directory / f"{MODEL}-{dtype}-{seed}.gguf", seed=seed, dtype=dtype, n_embd=64, n_ff=128
        )
        header = gguf_header.read(path)
        if break_gguf:
            path.write_bytes(break_gguf(path.read_bytes()))
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        made = ollama_store.manifest(
            replace(header, file_size_bytes=len(data)),
            gguf_sha256=sha256,
            modelfile=modelfile.Modelfile(version=1, parameters={"num_ctx": context_tokens}),
        )
        small: list[tuple[str, Role, str, bytes]] = [
            (f"{dtype}.config.json", "ollama-config", ollama_store.CONFIG_TYPE, made.config.data),
            *(
                (f"{dtype}.{number}.layer", "ollama-layer", layer.media_type, layer.data)
                for number, layer in enumerate(made.layers)
            ),
            (f"{dtype}.manifest.json", "ollama-manifest", ollama_store.MANIFEST_TYPE, made.data),
        ]
        named: list[tuple[str, Role, str, bytes | Path]] = [
            (f"{MODEL}-{dtype}.gguf", "gguf", ollama_store.MODEL_TYPE, path),
            *small,
        ]
        for name, role, media_type, source in named:
            content = data if isinstance(source, Path) else source
            file = ReleaseFile(
                name=name,
                role=role,
                type=dtype,
                media_type=media_type,
                size_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            )
            files.append(file)
            if file.sha256 not in {blob.sha256 for blob in blobs}:
                blobs.append(
                    Blob(
                        name=name,
                        sha256=file.sha256,
                        size_bytes=file.size_bytes,
                        media_type=media_type,
                        source=source,
                    )
                )
        quants.append(quant.model_copy(update={"gguf_sha256": sha256}))
    release = base.release.model_copy(
        update={
            "files": tuple(files),
            "quants": tuple(quants),
            "context_tokens": promised_tokens or context_tokens,
            "stable_quant": "F16",
            "hosts": {
                "local": ReleasedHost(verdict="PROMOTE", winner="F16", sentence="It is fast."),
                "large": ReleasedHost(verdict="PROMOTE", winner="F32", sentence="It is exact."),
                "edge": ReleasedHost(verdict="HOLD", winner="F16", sentence="TTFT is unclear."),
            },
        }
    )
    data = release_bytes(release)
    return replace(base, release=release, data=data, id=release_id(data), blobs=tuple(blobs))


_OF_OLLAMA = {
    "gguf",
    "ollama-config",
    "ollama-layer",
    "ollama-manifest",
    "modelpack-config",
    "modelpack-manifest",
}


def _manifest_sha256(made: Composed, type_: str = "F16") -> str:
    (file,) = made.release.of("ollama-manifest", type_)
    return file.sha256


def _blob(fleet: Fleet, made: Composed, type_: str = "F16") -> Path:
    (file,) = made.release.of("gguf", type_)
    return fleet.models / f"blobs/sha256-{file.sha256}"


# --- serving, once and again ------------------------------------------------------------------


def test_the_first_release_is_linked_proven_and_served_under_two_names(fleet: Fleet) -> None:
    """The digest that Ollama lists is that of release.json, and the GGUF takes no second room."""
    made = composed(fleet.root / "files")
    fleet.publish(made)

    result = fleet.serve()

    versioned = f"fleet/{MODEL}:f16-{made.id[:12]}"
    assert fleet.digests() == {
        NAME: _manifest_sha256(made),
        versioned: _manifest_sha256(made),
    }
    assert fleet.answers()
    assert (result.name, result.versioned_name, result.switched) == (NAME, versioned, True)
    assert result.before is None
    assert result.context_tokens == 512
    assert result.linked_bytes == result.placed_bytes > 100_000
    assert _blob(fleet, made).samefile(
        fleet.root / "registry/blobs/sha256" / made.release.quants[0].gguf_sha256
    )
    assert not list(fleet.models.rglob("*.part"))
    assert not list(fleet.models.glob("*.manifest"))


def test_a_second_release_switches_and_a_rollback_places_nothing(fleet: Fleet) -> None:
    """Each is listed by its own name, too; the served name says which by its digest."""
    one = composed(fleet.root / "files")
    two = composed(fleet.root / "files", 2, previous=one.id)
    fleet.publish(one)
    fleet.serve()
    fleet.publish(two)

    switched = fleet.serve()
    back = fleet.serve("previous")

    assert switched.before == f"fleet/{MODEL}:f16-{one.id[:12]}"
    assert switched.manifest_sha256 == _manifest_sha256(two)
    assert (back.release, back.switched, back.placed_bytes) == (one.id, True, 0)
    assert fleet.digests() == {
        NAME: _manifest_sha256(one),
        f"fleet/{MODEL}:f16-{one.id[:12]}": _manifest_sha256(one),
        f"fleet/{MODEL}:f16-{two.id[:12]}": _manifest_sha256(two),
    }
    assert fleet.answers()
    assert fleet.answers(f"fleet/{MODEL}:f16-{two.id[:12]}")


def test_the_way_back_names_what_was_served_and_works_as_it_is_typed(fleet: Fleet) -> None:
    """By id, with the options that were typed; `previous` may be a release never served here."""
    one = composed(fleet.root / "files")
    two = composed(fleet.root / "files", 2, previous=one.id)
    three = composed(fleet.root / "files", 3, previous=two.id)
    fleet.publish(one)
    first = fleet.serve(host="large", name="assistant")
    fleet.publish(two)  # published, never served
    fleet.publish(three)

    second = fleet.serve(host="large", name="assistant")
    other = fleet.serve(quant="F16", name="assistant")
    again = fleet.serve(quant="F16", name="assistant")

    options = f"--models-dir {fleet.models} --url {fleet.url} --name assistant"
    assert first.back is None
    assert "  back " not in serve.sentence(first)
    assert second.back == f"fleet serve {MODEL}@{one.id[:12]} --host large {options}"
    assert f"  back     {second.back}\n" in serve.sentence(second)
    # Before was the quant of another host, which these options do not mean.
    assert other.back == f"fleet serve {MODEL}@{three.id[:12]} --quant F32 {options}"
    assert again.back is None

    back = fleet.serve(three.id[:12], quant="F32", name="assistant")
    assert back.manifest_sha256 == second.manifest_sha256


def test_the_way_back_names_the_registry_and_only_one_that_has_the_release(fleet: Fleet) -> None:
    """A release of another registry cannot be served from this one, so nothing is promised."""
    one = composed(fleet.root / "files")
    two = composed(fleet.root / "files", 2, previous=one.id)
    three = composed(fleet.root / "files", 3, previous=two.id)
    fleet.publish(one)
    fleet.serve()
    site = LocalStore("site", fleet.root / "site")
    told: dict[str, Any] = {"model": MODEL, "url": fleet.url, "models_dir": fleet.models}
    backs = []
    for made in (two, three):
        ledger = factory.ledger(fleet.root)
        publishing.publish(made, site, ledger, stable="latest", by=factory.by())
        backs.append(serve.run(site, ledger, wanted=STABLE, **told).back)

    assert backs[0] is None
    assert backs[1] is not None
    assert backs[1].startswith(f"fleet serve {MODEL}@{two.id[:12]} --from site ")


def test_sizes_are_told_in_units_that_fit(fleet: Fleet) -> None:
    """A small file is no fraction of a MiB."""
    fleet.publish(composed(fleet.root / "files"))
    result = fleet.serve()
    small = replace(result, placed_bytes=27, linked_bytes=27)
    assert "  placed   27 bytes, hard links in " in serve.sentence(small)
    large = replace(result, placed_bytes=5 << 30, linked_bytes=0)
    assert "  placed   5.00 GiB in " in serve.sentence(large)
    assert serve.sentence(replace(small, dry_run=True)).startswith("Would place 27 bytes in ")


def test_serving_again_switches_nothing_and_says_so(fleet: Fleet) -> None:
    """It is proven once more all the same."""
    fleet.publish(composed(fleet.root / "files"))
    fleet.serve()

    again = fleet.serve()

    assert (again.switched, again.placed_bytes, again.removed) == (False, 0, ())
    assert "nothing was switched" in serve.sentence(again)


def test_the_last_three_releases_stay_and_older_ones_go_with_their_files(fleet: Fleet) -> None:
    """Disks are finite; the operator's own models are not touched."""
    made, results = [], []
    for seed in range(1, 5):
        made.append(composed(fleet.root / "files", seed))
        fleet.publish(made[-1])
        results.append(fleet.serve())
        requests.post(
            f"{fleet.url}/api/generate",
            json={"model": results[-1].versioned_name, "keep_alive": 0},
            timeout=30,
        )
        if seed == 2:
            # The operator's own, under a name as ours.
            ours = fleet.models / f"manifests/registry.ollama.ai/fleet/{MODEL}"
            shutil.copy(ours / f"f16-{made[1].id[:12]}", ours / "f16-0123456789ab")
    mine = fleet.models / "manifests/registry.ollama.ai/library/mine/latest"
    mine.parent.mkdir(parents=True)
    shutil.copy(
        fleet.models / f"manifests/registry.ollama.ai/fleet/{MODEL}/f16-{made[3].id[:12]}", mine
    )

    assert results[-1].removed == (f"fleet/{MODEL}:f16-{made[0].id[:12]}",)
    assert not _blob(fleet, made[0]).exists()
    assert set(fleet.digests()) == {
        NAME,
        "mine:latest",
        f"fleet/{MODEL}:f16-0123456789ab",
        *(f"fleet/{MODEL}:f16-{each.id[:12]}" for each in made[1:]),
    }
    assert (fleet.root / "registry/blobs/sha256" / made[0].release.quants[0].gguf_sha256).exists()


def test_a_host_gets_the_quant_that_was_chosen_for_it(fleet: Fleet) -> None:
    """One that is not PROMOTE gets none, and one that nobody knows is a slip of the pen."""
    made = composed(fleet.root / "files")
    fleet.publish(made)

    assert fleet.serve(host="large").type == "F32"
    assert fleet.digests()[NAME] == _manifest_sha256(made, "F32")
    assert fleet.serve(quant="F16").type == "F16"
    with pytest.raises(GateError, match=r"is HOLD for edge: TTFT is unclear\."):
        fleet.serve(host="edge")
    with pytest.raises(ParamsError, match="did you mean"):
        fleet.serve(host="larg")
    with pytest.raises(ParamsError, match="has no quant"):
        fleet.serve(quant="Q2_K")
    assert fleet.digests()[NAME] == _manifest_sha256(made)


def test_a_name_of_the_operators_is_served_and_what_it_meant_is_kept(fleet: Fleet) -> None:
    """Without another name Ollama would remove its files at the next start."""
    one = composed(fleet.root / "files")
    two = composed(fleet.root / "files", 2)
    fleet.publish(one)
    fleet.serve(name="assistant")
    versioned = fleet.models / (f"manifests/registry.ollama.ai/library/assistant/f16-{one.id[:12]}")
    versioned.unlink()  # as if somebody had made the name by other means
    fleet.publish(two)

    result = fleet.serve(name="assistant")

    digests = fleet.digests()
    assert result.before == _manifest_sha256(one)[:12]
    assert digests["assistant:latest"] == _manifest_sha256(two)
    assert digests[f"assistant:before-{_manifest_sha256(one)[:12]}"] == _manifest_sha256(one)


def test_a_dry_run_writes_nothing_and_tells_what_it_would_do(fleet: Fleet) -> None:
    """The folder stays as it is."""
    fleet.publish(composed(fleet.root / "files"))

    result = fleet.serve(dry_run=True)

    assert result.dry_run
    assert result.switched
    assert result.placed_bytes > 100_000
    assert serve.sentence(result).startswith("Would place ")
    assert list(fleet.models.rglob("*-*")) == []
    assert fleet.digests() == {}


def test_the_folder_of_a_running_ollama_is_found(fleet: Fleet) -> None:
    """By the environment of its process; and what it does not list is not believed."""
    fleet.publish(composed(fleet.root / "files"))

    result = fleet.serve(models_dir=None)

    assert Path(result.models_dir) == fleet.models
    assert fleet.answers()
    other = fleet.root / "other"
    other.mkdir()
    with pytest.raises(MachineError, match="reads another folder"):
        fleet.serve(models_dir=other)
    assert list(other.iterdir()) == []


def test_an_empty_folder_that_the_ollama_does_not_read_is_found_out_before_the_switch(
    fleet: Fleet,
) -> None:
    """It lists nothing yet, so nothing could be compared: the placed name is not listed."""
    fleet.publish(composed(fleet.root / "files"))
    other = fleet.root / "other"
    other.mkdir()

    with pytest.raises(ServingError, match="reads another folder"):
        fleet.serve(models_dir=other)

    assert not (other / "manifests/registry.ollama.ai/fleet" / MODEL / "stable").exists()


# --- what does not serve ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [lambda data: data[: len(data) // 2], lambda data: b"GGML" + data[4:], lambda data: data[:100]],
    ids=["half of it", "another magic", "a stub"],
)
def test_a_broken_gguf_is_never_switched_to(fleet: Fleet, broken: Callable[[bytes], bytes]) -> None:
    """The old release answers afterwards, and nobody finds the broken one in a list."""
    one = composed(fleet.root / "files")
    fleet.publish(one)
    fleet.serve()
    before = fleet.chat().json()["message"]["content"]
    two = composed(fleet.root / "files", 2, previous=one.id, break_gguf=broken)
    fleet.publish(two)

    with pytest.raises(ServingError, match="was not switched: it means") as caught:
        fleet.serve()

    assert f"f16-{one.id[:12]}" in caught.value.message
    assert caught.value.exit_code == 4
    assert set(fleet.digests()) == {NAME, f"fleet/{MODEL}:f16-{one.id[:12]}"}
    assert fleet.digests()[NAME] == _manifest_sha256(one)
    assert fleet.chat().json()["message"]["content"] == before


def test_another_context_than_the_release_says_is_never_switched_to(fleet: Fleet) -> None:
    """A client that sends long conversations would have them cut."""
    fleet.publish(composed(fleet.root / "files", context_tokens=256, promised_tokens=512))

    with pytest.raises(ServingError, match="with a context of 256 tokens"):
        fleet.serve()

    assert fleet.digests() == {}


class _Between:
    """An Ollama that fails where a test wants it: before the real one, which does all else."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.url = ""
        # Asked with path and JSON body of each request; a status and a body, or None to pass it on.
        self.fault: Callable[[str, dict[str, Any]], tuple[int, bytes] | None] = lambda *_: None

    @contextlib.contextmanager
    def running(self) -> Iterator[_Between]:
        between = self

        class Handler(BaseHTTPRequestHandler):
            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                own = between.fault(self.path, json.loads(body or b"{}"))
                if own is None:
                    passed = requests.request(
                        self.command, between.upstream + self.path, data=body, timeout=120
                    )
                    own = passed.status_code, passed.content
                self.send_response(own[0])
                self.send_header("Content-Length", str(len(own[1])))
                self.end_headers()
                self.wfile.write(own[1])

            do_GET = do_POST = do_DELETE = _any  # noqa: N815 - of http.server

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


@pytest.mark.parametrize(
    "answer",
    [
        (500, b'{"error": "llama-server process no longer running"}'),
        (200, b'{"message": {"content": "he"}, "done": false}'),
        (200, b"<html>"),
    ],
    ids=["an error", "no end", "no JSON"],
)
def test_a_name_that_does_not_answer_after_the_switch_is_switched_back(
    fleet: Fleet, answer: tuple[int, bytes]
) -> None:
    """The release answered by its own name; the served one means what it meant, and answers."""
    one = composed(fleet.root / "files")
    fleet.publish(one)
    fleet.serve()
    two = composed(fleet.root / "files", 2, previous=one.id)
    fleet.publish(two)
    between = _Between(fleet.url)
    between.fault = lambda path, told: (
        answer if path == "/api/chat" and told["model"].endswith(":stable") else None
    )

    with between.running(), pytest.raises(ServingError, match="was switched back to") as caught:
        fleet.serve(url=between.url)

    assert f"f16-{one.id[:12]}" in caught.value.message
    assert fleet.digests()[NAME] == _manifest_sha256(one)
    assert fleet.answers()


def test_a_first_release_that_does_not_answer_leaves_no_name(fleet: Fleet) -> None:
    """There is nothing to switch back to; it is said."""
    fleet.publish(composed(fleet.root / "files"))
    between = _Between(fleet.url)
    between.fault = lambda path, told: (
        (500, b'{"error": "no"}')
        if path == "/api/chat" and told["model"].endswith(":stable")
        else None
    )

    with between.running(), pytest.raises(ServingError, match="means nothing now"):
        fleet.serve(url=between.url)

    assert NAME not in fleet.digests()


def test_a_digest_that_is_not_the_releases_is_never_switched_to(fleet: Fleet) -> None:
    """Whatever answers there reads another manifest."""
    made = composed(fleet.root / "files")
    fleet.publish(made)
    between = _Between(fleet.url)

    def lies(path: str, _told: dict[str, Any]) -> tuple[int, bytes] | None:
        if path != "/api/tags":
            return None
        listed = requests.get(f"{fleet.url}/api/tags", timeout=30).text
        return 200, listed.replace(_manifest_sha256(made), "0" * 64).encode()

    between.fault = lies
    with between.running(), pytest.raises(ServingError, match="with the digest 0000"):
        fleet.serve(url=between.url)

    assert fleet.manifest("stable") is None


def test_nobody_at_the_address_is_said_before_anything_is_placed(fleet: Fleet) -> None:
    """With the next step."""
    fleet.publish(composed(fleet.root / "files"))

    with pytest.raises(RetryLaterError, match="Nothing was placed") as caught:
        fleet.serve(url=f"127.0.0.1:{registry_servers.free_port()}")

    assert "ollama serve" in caught.value.hint
    assert list(fleet.models.rglob("sha256-*")) == []


# --- wrong bytes ------------------------------------------------------------------------------


def test_a_rotten_blob_that_is_there_already_is_replaced_and_taken_out_of_memory(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ollama loads other weights under the same digest without a word; we hash."""
    made = composed(fleet.root / "files")
    fleet.publish(made)
    fleet.serve()
    right = fleet.chat().json()["message"]["content"]
    blob = _blob(fleet, made)
    data = bytearray(blob.read_bytes())
    data[-4096:] = bytes(reversed(data[-4096:]))
    blob.unlink()  # not the registry's own copy, to which it is linked
    blob.write_bytes(data)

    result = fleet.serve()

    assert result.replaced == (made.release.quants[0].gguf_sha256,)
    said = capsys.readouterr().err
    assert "has other bytes than its name says" in said
    assert f"{blob} was replaced." in said
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == made.release.quants[0].gguf_sha256
    assert fleet.chat().json()["message"]["content"] == right


def test_a_file_that_rotted_for_ollama_and_the_registry_at_once_is_named_and_not_hidden(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are one file by a hard link: nothing is replaced, and nobody says that it was."""
    made = composed(fleet.root / "files")
    fleet.publish(made)
    fleet.serve()
    sha256 = made.release.quants[0].gguf_sha256
    blob = _blob(fleet, made)
    _rot(blob)

    with pytest.raises(DigestError) as caught:
        fleet.serve()

    versioned = f"fleet/{MODEL}:f16-{made.id[:12]}"
    told = caught.value.message
    assert str(blob) in told
    assert "the same file by a hard link" in told
    assert f"left there, since {versioned}, {NAME} need it" in told
    assert "fleet verify-registry local" in caught.value.hint
    assert "replaced" not in capsys.readouterr().err
    assert blob.exists()

    # What the hint says: removed, published again from a copy that is right, and served again.
    rotten = fleet.root / "registry/blobs/sha256" / sha256
    assert f"Remove {rotten} and publish again" in caught.value.hint
    rotten.unlink()
    fleet.publish(composed(fleet.root / "again"))
    result = fleet.serve()

    assert result.replaced == (sha256,)
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == sha256
    assert fleet.answers()


def test_a_rotten_link_that_no_name_needs_does_not_stay_in_ollamas_folder(fleet: Fleet) -> None:
    """As after a serve that was killed before the manifest; one of somebody's stays."""
    made = composed(fleet.root / "files")
    fleet.publish(made)
    blob = _blob(fleet, made)
    blob.parent.mkdir(exist_ok=True)
    blob.hardlink_to(fleet.root / "registry/blobs/sha256" / made.release.quants[0].gguf_sha256)
    _rot(blob)

    with pytest.raises(DigestError, match="removed: no name there needed it"):
        fleet.serve()
    assert not blob.exists()

    blob.write_bytes(b"a file of its own")
    with pytest.raises(DigestError, match="left there; no name there needs it"):
        fleet.serve()
    assert blob.read_bytes() == b"a file of its own"
    assert fleet.digests() == {}


def _rot(path: Path) -> None:
    """Change a byte where it lies, as a disk does: for every name of the file."""
    path.chmod(0o644)
    with path.open("r+b") as opened:
        opened.seek(-4096, os.SEEK_END)
        byte = opened.read(1)
        opened.seek(-4096, os.SEEK_END)
        opened.write(bytes([byte[0] ^ 1]))


def test_bytes_that_rotted_in_the_registry_are_never_placed(fleet: Fleet) -> None:
    """The name means what it meant."""
    one = composed(fleet.root / "files")
    fleet.publish(one)
    fleet.serve()
    two = composed(fleet.root / "files", 2, previous=one.id)
    fleet.publish(two)
    path = fleet.root / "registry/blobs/sha256" / two.release.quants[0].gguf_sha256
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)

    with pytest.raises(DigestError, match="other bytes"):
        fleet.serve()

    assert not _blob(fleet, two).exists()
    assert fleet.digests()[NAME] == _manifest_sha256(one)
    assert fleet.answers()


def test_a_manifest_that_names_a_strangers_file_is_refused(fleet: Fleet) -> None:
    """A release that was put together by somebody else says nothing of that file."""
    made = composed(fleet.root / "files")
    without = made.release.model_copy(
        update={"files": tuple(file for file in made.release.files if file.role != "ollama-layer")}
    )
    data = release_bytes(without)
    fleet.publish(replace(made, release=without, data=data, id=release_id(data)))

    with pytest.raises(StoreError, match="which is no file of that release"):
        fleet.serve()

    assert fleet.digests() == {}


def test_a_manifest_that_serves_other_weights_than_the_release_says_is_refused(
    fleet: Fleet,
) -> None:
    """What is said to be served is what is served, also where somebody else composed it."""
    made = composed(fleet.root / "files")
    (license_file, *_) = made.release.of("license")
    other = {"sha256": license_file.sha256, "size_bytes": license_file.size_bytes}
    files = tuple(
        file.model_copy(update=other) if file.role == "gguf" else file
        for file in made.release.files
    )
    changed = made.release.model_copy(update={"files": files})
    data = release_bytes(changed)
    fleet.publish(replace(made, release=changed, data=data, id=release_id(data)))

    with pytest.raises(StoreError, match="does not name"):
        fleet.serve()

    assert fleet.digests() == {}


def test_a_registry_that_is_not_a_folder_is_read_byte_by_byte(fleet: Fleet) -> None:
    """Over a network nothing can be linked: streamed, hashed, then named."""
    made = composed(fleet.root / "files")
    fleet.publish(made)

    class Remote:
        """The same registry as if it were far away."""

        def __getattr__(self, name: str) -> Any:
            return getattr(fleet.store, name)

    result = serve.run(
        Remote(),
        factory.ledger(fleet.root),
        model=MODEL,
        wanted=STABLE,
        url=fleet.url,
        models_dir=fleet.models,
    )

    assert result.linked_bytes == 0
    assert result.placed_bytes > 100_000
    assert not _blob(fleet, made).samefile(
        fleet.root / "registry/blobs/sha256" / made.release.quants[0].gguf_sha256
    )
    assert fleet.answers()


# --- the end at any moment --------------------------------------------------------------------

# Each with the number of the call: the first place_manifest is of the release's own name, the
# second of the served one.
_STEPS = (
    ("pipelines.serve._link", 1),
    ("pipelines.serve.place_manifest", 1),
    ("pipelines.serving.own_ollama.Ollama.require_answers", 1),
    ("pipelines.serving.ollama_store.manifest_path", 4),
    ("pipelines.serve.place_manifest", 2),
    ("pipelines.serving.own_ollama.Ollama.require_answers", 2),
    ("pipelines.serve._remove_older", 1),
)


def test_a_kill_at_any_step_leaves_the_old_name_or_the_new_one(fleet: Fleet) -> None:
    """SIGKILL before and after each step; the name always answers, and the next run completes."""
    previous = composed(fleet.root / "files")
    fleet.publish(previous)
    fleet.serve()
    seed, seen = 1, set()
    for step, number in _STEPS:
        for moment in ("before", "after"):
            seed += 1
            made = composed(fleet.root / "files", seed, previous=previous.id)
            fleet.publish(made)

            _serve_and_die(fleet, step, number, moment)

            digest = fleet.digests()[NAME]
            assert digest in {_manifest_sha256(previous), _manifest_sha256(made)}, (step, moment)
            seen.add(digest == _manifest_sha256(made))
            assert fleet.answers(), (step, moment)
            fleet.serve()
            assert fleet.digests()[NAME] == _manifest_sha256(made)
            previous = made
    assert seen == {True, False}
    assert not list(fleet.models.rglob("*.part"))
    assert not list(fleet.models.glob("*.manifest"))


def _serve_and_die(fleet: Fleet, step: str, number: int, moment: str) -> None:
    """Serve in a process of its own that is killed before or after a call of a step."""
    script = textwrap.dedent(
        f"""
        import os, pathlib, pkgutil, signal, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import release_factory as factory
        from pipelines import serve
        from pipelines.stores.local import LocalStore
        place, _, name = {step!r}.rpartition(".")
        owner = pkgutil.resolve_name(place)
        real = getattr(owner, name)
        calls = []
        def dying(*told, **named):
            calls.append(told)
            if len(calls) == {number} and {moment!r} == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            done = real(*told, **named)
            if len(calls) == {number}:
                os.kill(os.getpid(), signal.SIGKILL)
            return done
        setattr(owner, name, dying)
        root = pathlib.Path({str(fleet.root)!r})
        serve.run(
            LocalStore("local", root / "registry"), factory.ledger(root), model={MODEL!r},
            wanted="stable", url={fleet.url!r}, models_dir=pathlib.Path({str(fleet.models)!r}),
        )
        """
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL


def test_an_interrupt_right_after_the_switch_switches_back(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before the switched name is known to answer: it means what it meant."""
    one = composed(fleet.root / "files")
    fleet.publish(one)
    fleet.serve()
    two = composed(fleet.root / "files", 2, previous=one.id)
    fleet.publish(two)
    real = own_ollama.Ollama.require_answers

    def interrupted(self: own_ollama.Ollama, name: Any, *told: Any, **named: Any) -> Any:
        if name.tag == "stable":
            raise KeyboardInterrupt
        return real(self, name, *told, **named)

    with monkeypatch.context() as patched:
        patched.setattr(own_ollama.Ollama, "require_answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fleet.serve()

    assert fleet.digests()[NAME] == _manifest_sha256(one)
    assert fleet.answers()


def test_the_served_name_is_there_at_every_moment_of_a_switch(fleet: Fleet) -> None:
    """Readers of the manifest never find none, and never half of one."""
    one = composed(fleet.root / "files")
    two = composed(fleet.root / "files", 2, previous=one.id)
    fleet.publish(one)
    fleet.serve()
    fleet.publish(two)
    seen: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            data = fleet.manifest("stable")
            seen.add(hashlib.sha256(data).hexdigest() if data else "none")

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for wanted in (STABLE, "previous", STABLE):
            fleet.serve(wanted)
    finally:
        ended.set()
        reader.join()

    assert seen == {_manifest_sha256(one), _manifest_sha256(two)}


# --- the machine ------------------------------------------------------------------------------


def test_a_folder_of_another_user_is_refused_with_what_to_do(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Linux service: its files can be read, not written. Nothing is placed."""
    # Below pytest's own directories nobody else may look.
    with tempfile.TemporaryDirectory(prefix="fleet-serve-") as scratch:
        root = Path(scratch)
        root.chmod(0o755)
        monkeypatch.setenv("XDG_STATE_HOME", str(root / "state"))
        models = root / "models"
        for path in (models, models / "blobs", models / "manifests"):
            path.mkdir()
        with _ollama(engine, models, root / "home") as url:
            fleet = Fleet(root, url, models)
            fleet.publish(composed(root / "files"))
            (root / "state").mkdir(mode=0o777, exist_ok=True)
            for path in (models, models / "blobs", models / "manifests"):
                path.chmod(0o555)
            with _as_somebody_else(), pytest.raises(MachineError) as caught:
                fleet.serve()
            for path in (models, models / "blobs", models / "manifests"):
                path.chmod(0o755)

        assert "cannot be written to by you" in caught.value.message
        assert "as its owner" in caught.value.hint
        assert "OLLAMA_MODELS=DIR" in caught.value.hint
        assert list((models / "blobs").iterdir()) == []


@contextlib.contextmanager
def _as_somebody_else() -> Iterator[None]:
    """Root may write everywhere; be somebody who may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_addresses_and_names_are_read_as_ollama_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Short forms are completed; passwords and nonsense are refused."""
    monkeypatch.setenv("OLLAMA_HOST", "0.0.0.0")
    assert own_ollama.address(None) == "http://127.0.0.1:11434"
    assert own_ollama.address("10.0.0.7:9000") == "http://10.0.0.7:9000"
    assert own_ollama.address("https://box.example/") == "https://box.example:443"
    for wrong in ("ftp://x", "http://", "http://u:secret@host", "http://host:99999"):
        with pytest.raises(ParamsError) as caught:
            own_ollama.address(wrong)
        assert "secret" not in caught.value.message
    assert own_ollama.shown(own_ollama.name_of("Assistant")) == "assistant:latest"
    assert own_ollama.shown(own_ollama.name_of("a/b:c")) == "a/b:c"
    assert own_ollama.shown(own_ollama.name_of("h:1/a/b:c")) == "h:1/a/b:c"
    for wrong in ("a/b/c/d", "", "../x", "a b", "x:y:z/"):
        with pytest.raises(FleetError):
            own_ollama.name_of(wrong)


def test_the_verb_serves_from_a_checkout_and_tells_people_and_programs(
    fleet: Fleet, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fleet serve MODEL`: sentences on stdout; --json for programs."""
    made = composed(fleet.root / "files")
    publishing.publish(
        made,
        LocalStore("local", checkout / "registry"),
        factory.ledger(checkout),
        stable="latest",
        by=factory.by(),
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        words = ["serve", MODEL, "--url", fleet.url, "--models-dir", str(fleet.models), *options]
        return subprocess.run(
            [sys.executable, "-m", "pipelines", *words],
            cwd=checkout,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    told = run()
    as_json = run("--json")
    unknown = run("--from", "nowhere")

    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(f"{NAME} is {MODEL}@{made.id[:12]} (F16) now.")
    assert "  back " not in told.stdout  # nothing was served before
    assert f"`ollama rm fleet/{MODEL}:f16-{made.id[:12]}`" in told.stdout
    assert json.loads(as_json.stdout)["switched"] is False
    assert json.loads(as_json.stdout)["manifest_sha256"] == fleet.digests()[NAME]
    assert unknown.returncode == 2
    assert "nowhere" in unknown.stderr
