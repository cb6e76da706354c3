"""A model laid where Ollama looks: our bytes, our manifest, nothing of Ollama's own."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import gguf_factory
import pytest
import requests

from pipelines import atomic, gguf_header, hashing
from pipelines.errors import DigestError, MachineError, ParamsError
from pipelines.gguf_header import GgufError
from pipelines.serving import ollama_store as store
from pipelines.serving.modelfile import MEDIA_TYPE, Message, Modelfile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.serving.engine import Engine

NAME = store.name_of("tiny", "F16")
SERVED = Modelfile(
    version=1,
    parameters={"num_ctx": 256, "temperature": 0.25, "stop": ("<|end|>", 'three "quotes"')},
    system='Say "no".\nThen stop.',
    licenses=("MIT\n\nline", "Second"),
    messages=(
        Message(role="user", content="Hello: you?"),
        Message(role="assistant", content="two\nlines"),
    ),
)
OPTIONS = store.runner_options(gpu_layers="all", threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a chat template, read-only as DVC leaves its outputs."""
    path = with_chat_template(tmp_path_factory.mktemp("model") / "tiny.gguf")
    path.chmod(0o444)
    return path


def with_chat_template(path: Path, template: str = "{{ messages[0]['content'] }}") -> Path:
    """Write the factory's model with a chat template in its metadata."""
    plain = gguf_factory.tiny_llama_gguf(path.with_suffix(".plain"), n_layer=1, n_ctx=256)
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub)
    writer.add_chat_template(template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain.unlink()
    return path


def sha256(path: Path) -> str:
    """Return the digest that a record would hold."""
    return hashing.digest(path).sha256


def place(models: Path, path: Path, modelfile: Modelfile = SERVED, **named: Any) -> store.Placed:
    """Place with defaults."""
    wanted = named.pop("sha256", None) or sha256(path)
    return store.place(
        models, path, wanted, modelfile, name=named.pop("name", NAME), options=OPTIONS, **named
    )


def files(folder: Path) -> list[str]:
    """Every file below `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@contextmanager
def ollama(engine: Engine, models: Path, home: Path) -> Iterator[str]:
    """Serve `models` from a private Ollama; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    home.mkdir(exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(home),
        "OLLAMA_HOST": address,
        "OLLAMA_MODELS": str(models),
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NOPRUNE": "1",
    }
    assert engine.ollama is not None
    with (
        (home / "log").open("wb") as log,
        subprocess.Popen(
            [engine.ollama, "serve"], env=environment, stdout=log, stderr=log, cwd=home
        ) as server,
    ):
        try:
            url = f"http://{address}"
            for _ in range(200):
                if answers(url):
                    break
                time.sleep(0.05)
            yield url
        finally:
            server.terminate()


def answers(url: str) -> bool:
    """Tell whether the server is up."""
    try:
        return requests.get(f"{url}/api/version", timeout=1).ok
    except requests.ConnectionError:
        return False


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Ask the server; a body makes it a POST."""
    answer = (
        requests.get(url + path, timeout=60)
        if body is None
        else requests.post(url + path, json=body, timeout=60)
    )
    answer.raise_for_status()
    return answer.json()


# --- with the real Ollama -------------------------------------------------------------------------


def test_ollama_serves_what_was_placed_under_the_digest_of_our_manifest(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    """Options, system text, licences and turns are ours, the prompt template is the GGUF's."""
    with ollama(engine, tmp_path / "models", tmp_path / "home") as url:
        # Placed while it runs: it looks again at each request.
        placed = place(tmp_path / "models", model)
        (listed,) = ask(url, "/api/tags")["models"]
        shown = ask(url, "/api/show", {"model": placed.name})
        body = {
            "model": placed.name,
            "messages": [{"role": "user", "content": "What?"}],
            "options": {"num_predict": 3},
            "stream": False,
        }
        answer = ask(url, "/api/chat", body)
        (loaded,) = ask(url, "/api/ps")["models"]

    assert (listed["name"], listed["digest"]) == (placed.name, placed.manifest_sha256)
    assert listed["size"] == placed.size_bytes
    assert listed["details"]["family"] == "llama"
    assert listed["details"]["quantization_level"] == "F16"
    assert shown["template"] == "{{ messages[0]['content'] }}"
    assert shown["system"] == SERVED.system
    assert shown["license"] == "MIT\n\nline\nSecond"
    assert shown["messages"] == [
        {"role": each.role, "content": each.content} for each in SERVED.messages
    ]
    options = [line.split(None, 1) for line in shown["parameters"].splitlines()]
    assert sorted(options) == [
        ["num_ctx", "256"],
        ["num_gpu", "999"],
        ["num_thread", "1"],
        ["stop", '"<|end|>"'],
        ["stop", '"three \\"quotes\\""'],
        ["temperature", "0.25"],
    ]
    assert answer["done"] is True
    assert answer["eval_count"] >= 1
    assert (loaded["digest"], loaded["context_length"]) == (placed.manifest_sha256, 256)


def test_ollama_create_makes_the_same_layers_of_the_text_that_people_read(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    """One source: whoever types `ollama create -f` on our text gets what we place."""
    home, models = tmp_path / "home", tmp_path / "models"
    text = tmp_path / "Modelfile"
    text.write_text(SERVED.with_parameters(OPTIONS).text(str(model)), encoding="utf-8")

    with ollama(engine, models, home) as url:
        assert engine.ollama is not None
        subprocess.run(
            [engine.ollama, "create", "copy", "-f", text],
            env={"PATH": os.environ["PATH"], "HOME": str(home), "OLLAMA_HOST": url},
            check=True,
            capture_output=True,
            timeout=120,
        )

    (manifest,) = (models / "manifests").glob("*/library/copy/latest")
    theirs: dict[str, list[Any]] = {}
    for layer in json.loads(manifest.read_text())["layers"]:
        kind = layer["mediaType"].removeprefix(MEDIA_TYPE)
        data = (models / "blobs" / layer["digest"].replace(":", "-")).read_bytes()
        if kind != "model":
            theirs.setdefault(kind, []).append(
                json.loads(data) if kind in {"params", "messages"} else data.decode()
            )
    # The Go template of ChatML that `create` adds to what has none that it knows is the reason
    # why it is not used; its stops come with it and give way to ours.
    theirs.pop("template", None)
    ours: dict[str, list[Any]] = {}
    for small in SERVED.with_parameters(OPTIONS).layers():
        kind = small.media_type.removeprefix(MEDIA_TYPE)
        ours.setdefault(kind, []).append(
            json.loads(small.data) if kind in {"params", "messages"} else small.data.decode()
        )
    assert theirs == ours


def test_other_bytes_under_the_same_name_are_refused_before_ollama_sees_them(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    """Ollama itself would serve them with status 200."""
    models = tmp_path / "models"
    other = tmp_path / model.name
    data = bytearray(model.read_bytes())
    data[-1000] ^= 1
    other.write_bytes(data)
    with ollama(engine, models, tmp_path / "home") as url:
        with pytest.raises(DigestError) as caught:
            place(models, other, sha256=sha256(model))
        assert ask(url, "/api/tags")["models"] == []

    assert sha256(model) in caught.value.message
    assert sha256(other) in caught.value.message
    assert files(models) == []


def test_bytes_planted_under_the_name_of_a_blob_are_replaced(model: Path, tmp_path: Path) -> None:
    """A blob that is there already is not believed."""
    blob = tmp_path / "blobs" / f"sha256-{sha256(model)}"
    blob.parent.mkdir()
    blob.write_bytes(b"GGUF planted")
    small = tmp_path / "blobs" / f"sha256-{SERVED.layers()[0].sha256}"
    small.write_bytes(b"planted")

    place(tmp_path, model)

    assert blob.read_bytes() == model.read_bytes()
    assert small.read_bytes() == SERVED.layers()[0].data


# --- the files ------------------------------------------------------------------------------------


def test_the_model_is_a_hard_link_and_the_source_stays_as_it_was(
    model: Path, tmp_path: Path
) -> None:
    """No second copy of 20 GB, and no write into DVC's cache."""
    before = model.stat()

    place(tmp_path, model)

    blob = tmp_path / "blobs" / f"sha256-{sha256(model)}"
    assert blob.samefile(model)
    assert not blob.is_symlink()
    assert (model.stat().st_mtime_ns, model.stat().st_mode) == (before.st_mtime_ns, before.st_mode)


def test_a_symbolic_link_of_dvc_is_followed(model: Path, tmp_path: Path) -> None:
    """DVC may link instead of copying; Ollama's folder must not depend on that link."""
    link = tmp_path / "work.gguf"
    link.symlink_to(model)

    place(tmp_path / "models", link)

    assert (tmp_path / "models/blobs" / f"sha256-{sha256(model)}").samefile(model)
    assert not (tmp_path / "models/blobs" / f"sha256-{sha256(model)}").is_symlink()


def test_where_hard_links_are_impossible_the_model_is_copied_and_the_copy_is_hashed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file system, or one that has none."""

    def refused(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refused)

    place(tmp_path / "a", model)

    blob = tmp_path / "a" / "blobs" / f"sha256-{sha256(model)}"
    assert blob.read_bytes() == model.read_bytes()
    assert not blob.samefile(model)
    with pytest.raises(DigestError):
        place(tmp_path / "b", model, sha256="0" * 64)
    assert files(tmp_path / "b") == []


def test_the_manifest_names_every_blob_and_is_written_last(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure half-way leaves blobs that nobody names, never a model without its blobs."""
    real, count = atomic.write_bytes, iter(range(100))

    def failing(path: Path, data: bytes) -> None:
        if next(count) == 3:
            raise OSError(28, "No space left on device")
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_bytes", failing)
        with pytest.raises(MachineError, match="the disk filled up"):
            place(tmp_path, model)
    assert not [name for name in files(tmp_path) if "manifest" in name or name.endswith(".part")]

    placed = place(tmp_path, model)
    data = (tmp_path / "manifests" / NAME.path).read_bytes()
    assert hashlib.sha256(data).hexdigest() == placed.manifest_sha256
    value = json.loads(data)
    for named in [value["config"], *value["layers"]]:
        blob = (tmp_path / "blobs" / named["digest"].replace(":", "-")).read_bytes()
        assert (len(blob), f"sha256:{hashlib.sha256(blob).hexdigest()}") == (
            named["size"],
            named["digest"],
        )
    assert len(files(tmp_path)) == 2 + len(value["layers"])
    assert placed.size_bytes == sum(n["size"] for n in [value["config"], *value["layers"]])


def test_placing_twice_changes_nothing(model: Path, tmp_path: Path) -> None:
    """Equal input, equal bytes: the digest is the model's identity."""
    first = place(tmp_path, model)
    before = files(tmp_path)

    assert place(tmp_path, model) == first
    assert files(tmp_path) == before


# --- what is refused ------------------------------------------------------------------------------


def test_a_truncated_gguf_is_refused_even_if_its_digest_was_recorded(
    model: Path, tmp_path: Path
) -> None:
    """The header says how long the file has to be."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-5000])

    with pytest.raises(GgufError, match="the file at"):
        place(tmp_path / "models", cut)


def test_a_missing_gguf_is_said(tmp_path: Path) -> None:
    """With its name."""
    with pytest.raises(MachineError, match=r"none\.gguf: No such file"):
        place(tmp_path / "models", tmp_path / "none.gguf", sha256="0" * 64)


def test_a_gguf_without_a_chat_template_is_refused_unless_the_modelfile_declares_one(
    tmp_path: Path,
) -> None:
    """Ollama would use ChatML, without a word."""
    bare = gguf_factory.tiny_llama_gguf(tmp_path / "bare.gguf", n_layer=1)

    with pytest.raises(ParamsError, match=r"bare\.gguf has no chat template.*ChatML"):
        place(tmp_path / "models", bare)
    assert not (tmp_path / "models/manifests").exists()
    declared = Modelfile(version=1, template="{{ .Prompt }}")
    place(tmp_path / "models", bare, declared)


@pytest.mark.parametrize("model_name", ["", "a/b", "..", "-a", "A", "a b", "a" * 81, "a@b", "a\n"])
def test_a_name_that_ollama_would_not_take_is_refused(model_name: str) -> None:
    """It also becomes a path."""
    with pytest.raises(ParamsError, match="cannot be the model of a model's name"):
        store.ModelName(model=model_name, tag="q4_k_m")


# --- pure data ------------------------------------------------------------------------------------


def test_the_manifest_is_pure_and_knows_no_name(model: Path) -> None:
    """Publishing pushes the same bytes under any host and tag."""
    header = gguf_header.read(model)

    made = store.manifest(header, gguf_sha256="a" * 64, modelfile=SERVED)

    value = json.loads(made.data)
    assert value["schemaVersion"] == 2
    assert value["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert value["layers"][0] == {
        "mediaType": "application/vnd.ollama.image.model",
        "digest": "sha256:" + "a" * 64,
        "size": model.stat().st_size,
    }
    assert [layer["mediaType"].removeprefix(MEDIA_TYPE) for layer in value["layers"]] == [
        "model", "system", "license", "license", "params", "messages",
    ]  # fmt: skip
    assert json.loads(made.config.data) == {
        "model_format": "gguf",
        "model_family": "llama",
        "model_families": ["llama"],
        "model_type": store.human_number(sum(t.n_elements for t in header.tensors)),
        "file_type": "F16",
        "architecture": "amd64",
        "os": "linux",
    }


def test_file_types_are_spelled_as_llama_cpp_numbers_them() -> None:
    """The table is a copy of gguf-py's."""
    known = {
        each.value: each.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        for each in gguf.LlamaFileType
        if each.name != "GUESSED"
    }

    assert known == store._FILE_TYPES


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (12, "12"), (1000, "1K"), (3_410_176, "3.41M"), (596_049_920, "596.05M"), (7_000_000, "7M"),
        (8_030_261_312, "8.0B"), (8_000_000_000, "8B"),
    ],
)  # fmt: skip
def test_sizes_of_models_are_written_as_ollama_does(count: int, text: str) -> None:
    """Ollama reads some decisions from this text."""
    assert store.human_number(count) == text


@pytest.mark.parametrize(
    ("gpu_layers", "threads", "options"),
    [
        ("all", 8, {"num_gpu": 999, "num_thread": 8}),
        ("auto", None, {}),
        (0, 2, {"num_gpu": 0, "num_thread": 2}),
        (12, None, {"num_gpu": 12}),
    ],
)
def test_the_runner_gets_the_declared_layers_and_threads(
    gpu_layers: str | int, threads: int | None, options: dict[str, int]
) -> None:
    """`auto` says nothing: then Ollama lets llama-server decide."""
    assert store.runner_options(gpu_layers=gpu_layers, threads=threads) == options
