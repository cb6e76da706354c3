"""The toolchain's llama-server serves exactly the file that was asked for, or says why not."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import requests
import serving_factory
from fake_tools import with_fake
from serving_factory import CONVERSATION, RENDERED, file, left_in, programs_in, settings

from pipelines import gpu, hashing, llama_fit_params
from pipelines.errors import DigestError, MachineError, ParamsError
from pipelines.layout import Layout
from pipelines.serving import llama_server, sandbox, server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from pipelines.serving.engine import Engine
    from pipelines.serving.server import Host
    from pipelines.toolchain import Toolchain

    Opened = Callable[..., AbstractContextManager[Host]]

pytestmark = pytest.mark.toolchain


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a chat template."""
    return serving_factory.model(tmp_path_factory.mktemp("model") / "tiny-F16.gguf")


@pytest.fixture
def at(tmp_path: Path) -> Iterator[Layout]:
    """A checkout, in which nothing may be left of any server when the test ends."""
    layout = Layout(tmp_path / "fork")
    layout.root.mkdir()
    yield layout
    assert left_in(layout) == []


@pytest.fixture
def engine(tools: Toolchain) -> Engine:
    """The real one."""
    return serving_factory.engine("llama-server", tools, tools.tool("llama-server"))


@pytest.fixture
def opened(at: Layout) -> Opened:
    """Open a host in the checkout."""

    def open_(chosen: Engine, **changes: Any) -> AbstractContextManager[Host]:
        return server.open_host(
            chosen, settings(**changes), model="tiny", at=at, log=at.root / "serve.log"
        )

    return open_


# --- the real one -----------------------------------------------------------------------------


def test_it_serves_the_file_with_the_declared_context_and_slots(
    model: Path, engine: Engine, opened: Opened
) -> None:
    """Two users are answered at once, each with the whole context, by the file of the record."""
    with opened(engine) as host, host.load(file(model)) as loaded:
        told = requests.get(loaded.url + "/props", timeout=10).json()
        answer = requests.post(
            loaded.url + "/v1/chat/completions",
            json={"model": loaded.name, "messages": CONVERSATION, "max_tokens": 3},
            timeout=60,
        ).json()
        loaded.verify()

        assert told["model_path"] == str(model)
        assert told["total_slots"] == 2
        assert told["default_generation_settings"]["n_ctx"] == 512
        assert answer["usage"]["completion_tokens"] > 0
        assert loaded.served.gguf_sha256 == hashing.digest(model).sha256
        assert (loaded.served.context_tokens, loaded.served.parallel) == (512, 2)
        assert loaded.served.cold_load_ms > 0
        assert loaded.api == "openai"
        assert loaded.as_openai() is loaded


def test_nothing_that_decides_an_answer_is_left_to_defaults(
    model: Path, at: Layout, engine: Engine, opened: Opened
) -> None:
    """Slots, threads, cache and attention are stated; no cache of prompts, no shifted context."""
    changes = {"parallel": 4, "kv_type": "q8_0", "context_tokens": 256}
    with opened(engine, **changes) as host, host.load(file(model)) as loaded:
        (process,) = programs_in(at)
        argv = " ".join(process.cmdline())
        loaded.verify()

    for stated in (
        *("-c 1024 -np 4", "-t 1 -tb 1", "-ngl 0", "--fit off", "-fa on", "-ctk q8_0 -ctv q8_0"),
        *("-b 2048 -ub 512", "--cache-ram 0", "--no-context-shift", "--no-kv-unified", "--jinja"),
        *("--offline", "--no-webui", "--slots", "--metrics", "--host 127.0.0.1"),
    ):
        assert f" {stated} " in argv


def test_it_renders_by_the_models_own_template_and_counts_as_it_answers(
    model: Path, engine: Engine, opened: Opened
) -> None:
    """The prompt is the template's; the count has its tokens and the BOS."""
    with opened(engine) as host, host.load(file(model)) as loaded:
        tokens = requests.post(
            loaded.url + "/tokenize",
            json={"content": RENDERED, "add_special": True, "parse_special": True},
            timeout=10,
        ).json()["tokens"]

        assert loaded.render(CONVERSATION) == RENDERED
        assert loaded.render_by_llama_server(CONVERSATION) == RENDERED
        assert loaded.prompt_tokens(CONVERSATION) == len(tokens)


def test_the_peak_of_its_memory_holds_at_least_the_weights(
    tmp_path: Path, engine: Engine, opened: Opened
) -> None:
    """What a host must have free is measured, not guessed."""
    large = serving_factory.model(tmp_path / "large.gguf", n_ff=8192)

    with opened(engine) as host, host.load(file(large)) as loaded:
        peak = loaded.peak_memory_mib()

    assert peak is not None
    assert peak > large.stat().st_size / 2**20


def test_one_file_after_the_other_is_served_and_the_first_is_gone(
    model: Path,
    tmp_path: Path,
    at: Layout,
    engine: Engine,
    opened: Opened,
) -> None:
    """Each file has a server of its own; its port is closed when its block is left."""
    other = serving_factory.model(tmp_path / "other.gguf", seed=1)

    with opened(engine) as host:
        with host.load(file(model)) as first:
            url = first.url
        assert programs_in(at) == []
        with pytest.raises(requests.ConnectionError):
            requests.get(url, timeout=5)
        with host.load(file(other, type_="Q8_0")) as second:
            assert second.name.endswith("tiny:q8_0")
            assert second.served.gguf_sha256 == hashing.digest(other).sha256


def test_no_token_of_ours_reaches_the_server(
    model: Path,
    at: Layout,
    engine: Engine,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stranger's model is read by a program that knows no secret, and no option of a profile."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "64")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")

    with opened(engine) as host, host.load(file(model)) as loaded:
        loaded.verify()
        (process,) = programs_in(at)
        seen = process.environ()

    assert not {"HF_TOKEN", "LLAMA_ARG_CTX_SIZE", "HTTP_PROXY"} & seen.keys()
    assert seen["HOME"].startswith(str(at.serving))
    assert seen["TMPDIR"].startswith(str(at.serving))


# --- what cannot be served --------------------------------------------------------------------


def test_a_torn_file_is_refused_by_its_digest(
    model: Path,
    tmp_path: Path,
    at: Layout,
    engine: Engine,
    opened: Opened,
) -> None:
    """Half a file is not a bad quant: it is not the quant."""
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(model.read_bytes()[:-1000])

    with (
        opened(engine) as host,
        pytest.raises(DigestError, match="not the file of its record"),
        host.load(file(torn, sha256=hashing.digest(model).sha256)),
    ):
        pass

    assert not (at.root / "serve.log").exists()


def test_a_file_that_was_recorded_torn_cannot_be_loaded(
    model: Path,
    tmp_path: Path,
    engine: Engine,
    opened: Opened,
) -> None:
    """It says what is missing of it."""
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(model.read_bytes()[:-1000])

    with (
        opened(engine) as host,
        pytest.raises(server.LoadFailed, match=r"torn\.gguf"),
        host.load(file(torn)),
    ):
        pass


def test_an_architecture_that_it_does_not_know_is_named(
    model: Path,
    tmp_path: Path,
    engine: Engine,
    opened: Opened,
) -> None:
    """The server's own words say why a quant cannot be served."""
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(model.read_bytes().replace(b"llama", b"lhama"))

    with (
        opened(engine) as host,
        pytest.raises(server.LoadFailed, match="unknown model architecture: 'lhama'") as info,
        host.load(file(strange)),
    ):
        pass

    assert str(tmp_path) not in info.value.message
    assert info.value.log is not None
    assert "lhama" in info.value.log.read_text()


def test_a_context_beyond_the_trained_one_is_refused_with_both_figures(
    model: Path, engine: Engine, opened: Opened
) -> None:
    """Ollama would cut it and say nothing."""
    with (
        opened(engine, context_tokens=1024) as host,
        pytest.raises(ParamsError, match=r"context of 512 tokens; declared are 1,024"),
        host.load(file(model)),
    ):
        pass


def test_a_context_that_would_be_rounded_up_is_refused(
    model: Path, engine: Engine, opened: Opened
) -> None:
    """What /api/ps says of it would not be true."""
    with (
        opened(engine, context_tokens=300) as host,
        pytest.raises(ParamsError, match="300 tokens is served as 512"),
        host.load(file(model)),
    ):
        pass


def test_20_gb_on_a_16_gb_host_is_refused_before_anything_is_loaded(
    tmp_path: Path,
    engine: Engine,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan is llama.cpp's own; the message has what is needed and what there is."""
    monkeypatch.setattr(server, "available_mib", lambda: 16 * 1024.0)
    large = serving_factory.hollow_model(tmp_path / "large.gguf")
    assert 19e9 < large.stat().st_size < 22e9

    with opened(engine) as host, pytest.raises(MachineError) as info:  # noqa: SIM117 - what raises
        with host.load(file(large, sha256="0" * 64)):
            pass

    said = re.search(r"needs ([\d,]+) MiB .* and ([\d,]+) MiB are available", info.value.message)
    assert said is not None
    assert 18_000 < int(said[1].replace(",", "")) < 22_000
    assert said[2] == "16,384"
    assert "Nothing was loaded" in info.value.message


def test_a_context_that_no_memory_holds_is_refused(
    tmp_path: Path,
    engine: Engine,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A small model with a context of a million tokens is as large as its cache."""
    monkeypatch.setattr(server, "available_mib", lambda: 1024.0)
    wide = serving_factory.model(tmp_path / "wide.gguf", n_ctx=1 << 20)

    with (
        opened(engine, context_tokens=1 << 20) as host,
        pytest.raises(MachineError, match="context of 2 x 1,048,576 tokens it needs"),
        host.load(file(wide)),
    ):
        pass


# --- what goes wrong while it runs ------------------------------------------------------------


def test_a_port_that_somebody_took_is_tried_again_with_another(
    model: Path,
    engine: Engine,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when that somebody answers as a healthy server does."""
    with serving_factory.healthy_stranger() as port:
        ports = iter([port, port, sandbox.free_port()])
        monkeypatch.setattr(sandbox, "free_port", lambda: next(ports))

        with opened(engine) as host, host.load(file(model)) as loaded:
            assert loaded.url != f"http://127.0.0.1:{port}"
            assert loaded.render(CONVERSATION) == RENDERED


def test_ports_that_are_taken_again_and_again_are_an_error(
    model: Path,
    engine: Engine,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It gives up and says what to look at."""
    with serving_factory.healthy_stranger() as port:
        monkeypatch.setattr(sandbox, "free_port", lambda: port)

        with (
            opened(engine) as host,
            pytest.raises(server.ServerGone, match="taken 5 times in a row"),
            host.load(file(model)),
        ):
            pass


def test_a_server_that_was_killed_is_told_by_verify(
    model: Path, at: Layout, engine: Engine, opened: Opened
) -> None:
    """Numbers of a server that crashed in between are nobody's."""
    with opened(engine) as host, host.load(file(model)) as loaded:
        (process,) = programs_in(at)
        process.kill()
        # Not waited for: it is for the one who started it to collect it.
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)

        with pytest.raises(server.ServerGone, match="llama-server was killed"):
            loaded.verify()
        with pytest.raises(server.ServerGone, match="no longer answers"):
            loaded.render(CONVERSATION)


def test_a_server_that_hangs_is_told_by_verify(
    model: Path,
    at: Layout,
    engine: Engine,
    opened: Opened,
) -> None:
    """A server that was stopped is as good as gone, and is ended all the same."""
    with opened(engine) as host, host.load(file(model)) as loaded:
        (process,) = programs_in(at)
        os.kill(process.pid, signal.SIGSTOP)
        client = server.Client("llama-server", int(loaded.url.rsplit(":", 1)[1]))

        with pytest.raises(server.ServerGone, match="did not answer /props within 1 s"):
            client.get("/props", timeout_s=1)


def test_a_file_that_changed_while_it_was_served_is_told_by_verify(
    model: Path,
    tmp_path: Path,
    engine: Engine,
    opened: Opened,
) -> None:
    """The server's bytes are the file's: somebody who writes to it changes what is served."""
    own = tmp_path / "own.gguf"
    own.write_bytes(model.read_bytes())

    with opened(engine) as host, host.load(file(own)) as loaded:
        with own.open("r+b") as opened_file:
            opened_file.seek(-10, os.SEEK_END)
            opened_file.write(b"0123456789")

        with pytest.raises(server.WrongDigest, match="changed while it was served"):
            loaded.verify()


# --- what the real one cannot be made to show -------------------------------------------------


_SCRIPTED = """
import http.server, json
told = json.loads({told!r})
port = int(argv[argv.index("--port") + 1])
model = argv[argv.index("--model") + 1]

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        props = {{"model_path": model}} | told
        body = json.dumps(props if self.path == "/props" else {{}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

print({said!r}, flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
_AS_DECLARED = {"default_generation_settings": {"n_ctx": 512}, "total_slots": 2}


@pytest.fixture
def scripted(tools: Toolchain, tmp_path: Path) -> Callable[..., Engine]:
    """An engine whose llama-server says of itself what it is told to say."""

    def make(said: str = "", backend: str = "", **told: Any) -> Engine:
        body = _SCRIPTED.format(told=json.dumps(_AS_DECLARED | told), said=said)
        fake = with_fake(tmp_path / "fake", tools, "llama-server", body)
        made_for = dataclasses.replace(
            tools, manifest=tools.manifest | ({"backend": backend} if backend else {})
        )
        return serving_factory.engine("llama-server", made_for, fake.tool("llama-server"))

    return make


@pytest.mark.parametrize(
    "expected",
    [
        (
            {"model_path": "/elsewhere/planted.gguf"},
            server.WrongDigest,
            r"serves a planted\.gguf that is not the tiny-F16\.gguf which it was given",
        ),
        (
            {"default_generation_settings": {"n_ctx": 256}},
            server.WrongContext,
            "context of 256 tokens in each slot, declared are 512",
        ),
        ({"total_slots": 1}, server.WrongContext, "has 1 slots, declared are 2"),
    ],
)
def test_a_server_that_has_something_else_is_told_apart_by_its_own_sentence(
    model: Path,
    scripted: Callable[..., Engine],
    opened: Opened,
    expected: tuple[dict[str, Any], type[server.ServingError], str],
) -> None:
    """Nobody sends a request to it."""
    told, kind, sentence = expected
    with opened(scripted(**told)) as host, pytest.raises(kind, match=sentence):  # noqa: SIM117
        with host.load(file(model)):
            pytest.fail("it was handed out")


def test_a_server_that_never_becomes_ready_is_ended(
    model: Path,
    tools: Toolchain,
    tmp_path: Path,
    opened: Opened,
) -> None:
    """It is waited for as long as declared, and not longer."""
    fake = with_fake(
        tmp_path / "fake", tools, "llama-server", "print('up?', flush=True)\ntime.sleep(600)"
    )
    chosen = serving_factory.engine("llama-server", tools, fake.tool("llama-server"))

    with (
        opened(chosen, load_timeout_s=1.0) as host,
        pytest.raises(server.LoadFailed, match=r"not ready within 1 s[^\n]*\n    up\?"),
        host.load(file(model)),
    ):
        pass


@pytest.mark.parametrize("gpu_layers", ["all", "auto"])
def test_layers_beside_the_gpu_are_an_error_unless_declared(
    model: Path,
    scripted: Callable[..., Engine],
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
    gpu_layers: str,
) -> None:
    """Numbers of a model that half runs on the CPU are not those of the GPU."""
    monkeypatch.setattr(server, "require_memory", lambda *_, **__: None)
    chosen = scripted("load_tensors: offloaded 10/33 layers to GPU", backend="cuda")

    with (
        opened(chosen, gpu_layers=gpu_layers) as host,
        pytest.raises(server.PartialOffload, match="10 of 33 layers are on the GPU"),
        host.load(file(model)),
    ):
        pass
    with opened(chosen, gpu_layers=10) as host, host.load(file(model)) as loaded:
        assert loaded.served.gpu_layers == "10"


def test_a_card_that_is_gone_is_no_reason_to_serve_from_the_cpu(
    model: Path, scripted: Callable[..., Engine], opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that lost it leaves every layer on the CPU, and the server answers all the same."""
    monkeypatch.setattr(server, "require_memory", lambda *_, **__: None)
    monkeypatch.setattr(gpu, "cards", lambda: ())

    with (
        opened(scripted("no usable GPU found", backend="cuda")) as host,
        pytest.raises(server.PartialOffload, match="0 of any layers are on the GPU"),
        host.load(file(model)),
    ):
        pass


@pytest.mark.parametrize(("gpu_layers", "fit"), [("all", "off"), ("auto", "on"), (7, "off")])
def test_the_engine_decides_about_layers_only_where_that_was_declared(
    gpu_layers: str | int, fit: str
) -> None:
    """Without its fitting `auto` would mean all, and end in a card that is full."""
    argv = llama_server.argv(
        Path("llama-server"), Path("m.gguf"), settings(gpu_layers=gpu_layers),
        name="m", port=1, backend="cuda",
    )  # fmt: skip

    assert f" -ngl {gpu_layers} --fit {fit} " in " ".join(argv)


def test_memory_that_another_server_holds_on_the_card_does_not_count(
    tmp_path: Path, engine: Engine, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that is taken is this machine's matter: the file would be blamed for a failed load."""
    monkeypatch.setattr(server, "uses_gpu", lambda *_: True)
    monkeypatch.setattr(gpu, "free_mib", lambda: 2048.0)
    monkeypatch.setattr(llama_fit_params, "parse_estimate", _estimate)
    large = serving_factory.hollow_model(tmp_path / "large.gguf")

    with (
        opened(engine) as host,
        pytest.raises(MachineError, match=r"needs 4,096 MiB .* 2,048 MiB are free on the GPUs"),
        host.load(file(large, sha256="0" * 64)),
    ):
        pass


def _estimate(*_: str, on_gpu: bool, **__: Any) -> Any:
    return SimpleNamespace(total_mib=4096.0 if on_gpu else 1.0)


def test_a_server_that_was_killed_while_it_loaded_blames_no_file(
    model: Path, tools: Toolchain, tmp_path: Path, opened: Opened
) -> None:
    """The kernel kills for want of memory: nothing is known of the file, so it is not rejected."""
    fake = with_fake(tmp_path / "fake", tools, "llama-server", "os.kill(os.getpid(), 9)")
    chosen = serving_factory.engine("llama-server", tools, fake.tool("llama-server"))

    with (
        opened(chosen) as host,
        pytest.raises(server.ServerGone, match="was killed by the kernel or by somebody"),
        host.load(file(model)),
    ):
        pass


def test_a_large_file_has_the_time_that_a_slow_disk_takes(tmp_path: Path) -> None:
    """A load is not failed by a declaration that fits small files."""
    large = tmp_path / "large.gguf"
    with large.open("wb") as opened_file:
        opened_file.truncate(50_000_000_000)
    wanted = dataclasses.replace(file(large, sha256="0" * 64), path=large)

    assert server.load_within_s(wanted, settings(load_timeout_s=120.0)) == 1120.0
