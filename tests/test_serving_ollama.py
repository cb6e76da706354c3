"""A real Ollama serves exactly the file that was measured, or it is said what is otherwise."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import requests
import serving_factory
from serving_factory import CONVERSATION, RENDERED, file, left_in, programs_in, settings

from pipelines import hashing
from pipelines.errors import DigestError
from pipelines.layout import Layout
from pipelines.serving import ollama, ollama_store, sandbox, server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from pipelines.serving.engine import Engine
    from pipelines.serving.server import Host, Loaded
    from pipelines.toolchain import Toolchain

    Opened = Callable[..., AbstractContextManager[Host]]

pytestmark = pytest.mark.toolchain
ROOT = Path(__file__).resolve().parent.parent


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
def opened(at: Layout) -> Opened:
    """Open a host in the checkout."""

    def open_(chosen: Engine, **changes: Any) -> AbstractContextManager[Host]:
        return server.open_host(
            chosen, settings(**changes), model="tiny", at=at, log=at.root / "serve.log"
        )

    return open_


def _below(at: Layout) -> psutil.Process:
    """Return the llama-server that runs below Ollama."""
    (found,) = (
        process
        for process in programs_in(at)
        if "llama-server" in process.cmdline()[0] and "--model" in process.cmdline()
    )
    return found


def _ollama(at: Layout) -> psutil.Process:
    (found,) = (process for process in programs_in(at) if process.cmdline()[1:] == ["serve"])
    return found


def _ask(loaded: Loaded, **changes: Any) -> requests.Response:
    body = {
        "model": loaded.name,
        "messages": CONVERSATION,
        "shift": False,
        "truncate": False,
        "stream": False,
        "options": {"num_predict": 4},
    }
    return requests.post(f"{loaded.url}/api/chat", json=body | changes, timeout=60)


# --- what it serves ---------------------------------------------------------------------------


def test_it_lists_our_manifest_alone_and_the_declared_context(
    model: Path, at: Layout, engine: Engine, opened: Opened
) -> None:
    """The digest of the record is the one that /api/tags gives, and the blob is our very file."""
    with opened(engine) as host, host.load(file(model)) as loaded:
        tags = requests.get(f"{loaded.url}/api/tags", timeout=10).json()["models"]
        held = requests.get(f"{loaded.url}/api/ps", timeout=10).json()["models"]
        blob = Path(_below(at).cmdline()[2])
        answer = _ask(loaded).json()
        loaded.verify()
        served = loaded.served

        assert [each["name"] for each in tags] == [loaded.name]
        assert tags[0]["digest"] == served.manifest_sha256
        assert [each["context_length"] for each in held] == [512]
        assert blob.name == f"sha256-{served.gguf_sha256}"
        assert blob.samefile(model)
        assert answer["done"] is True
        assert served.size_bytes == held[0]["size"]
        assert served.cold_load_ms >= 200
        assert served.peak_memory_mib is not None
        assert served.peak_memory_mib > 30
        assert loaded.notes == ()
    assert hashing.digest(model).sha256 == served.gguf_sha256


def test_both_renderers_give_the_models_own_prompt_and_the_count_has_the_bos(
    model: Path, engine: Engine, opened: Opened
) -> None:
    """Ollama's prompt is the one that its llama-server makes, by the template in the GGUF."""
    with opened(engine) as host, host.load(file(model)) as loaded:
        assert loaded.render(CONVERSATION) == RENDERED
        assert loaded.render_by_llama_server(CONVERSATION) == RENDERED
        count = loaded.prompt_tokens(CONVERSATION)
        assert count == _ask(loaded).json()["prompt_eval_count"]
        assert count > len(CONVERSATION)
        loaded.verify()


def test_a_declared_template_is_rendered_by_ollama_and_noted(
    model: Path, engine: Engine, opened: Opened
) -> None:
    """The llama-server below has no template then: what it would render is not what is served."""
    usual = file(model)
    own = dataclasses.replace(
        usual.modelfile, template="{{ range .Messages }}<{{ .Role }}>{{ end }}"
    )

    with opened(engine) as host, host.load(dataclasses.replace(usual, modelfile=own)) as loaded:
        assert loaded.render(CONVERSATION) == "<system><user>"
        assert loaded.render_by_llama_server(CONVERSATION) != "<system><user>"
        assert "renders prompts itself" in loaded.notes[0]


def test_every_setting_reaches_the_llama_server(
    model: Path, at: Layout, engine: Engine, opened: Opened
) -> None:
    """Slots, threads, cache and attention are those that were declared, and the host says so."""
    changes = {"parallel": 4, "threads": 1, "kv_type": "q8_0", "context_tokens": 256}
    wanted = file(model, context_tokens=256)
    with opened(engine, **changes) as host, host.load(wanted) as loaded:
        argv = " ".join(_below(at).cmdline())
        printed = (at.root / "serve.log").read_text()
        told = host.environment

        assert " -c 1024 -np 4 " in argv
        assert "--cache-type-k q8_0 --cache-type-v q8_0 --flash-attn on" in argv
        assert "--context-shift" not in argv
        assert "n_threads = 1 " in printed
        assert "prompt cache is disabled" in printed
        assert loaded.served.parallel == 4
    assert told["OLLAMA_NUM_PARALLEL"] == "4"
    assert told["OLLAMA_NO_CLOUD"] == "1"
    assert not any("/" in value or "127.0.0.1" in value for value in told.values())


def test_an_ollama_that_passes_a_setting_not_on_is_told_apart(
    model: Path, engine: Engine, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record would name a cache of q8_0, and one of f16 be served."""
    environment = ollama.environment
    forgetful = {"OLLAMA_KV_CACHE_TYPE": "", "OLLAMA_FLASH_ATTENTION": ""}
    monkeypatch.setattr(ollama, "environment", lambda *told: environment(*told) | forgetful)

    with (
        opened(engine, kv_type="q8_0") as host,
        pytest.raises(server.ServingError, match="nothing as --cache-type-k, declared is q8_0"),
        host.load(file(model)),
    ):
        pass


@pytest.mark.parametrize("changed", [{"-ngl": "5"}, {"-t": "8"}, {"--flash-attn": "off"}])
def test_what_the_command_line_overrides_is_told_apart(changed: dict[str, str]) -> None:
    """Its options win over the environment in which we state ours."""
    as_declared = {"--cache-type-k": "f16", "--cache-type-v": "f16", "--flash-attn": "on"}

    def words(options: dict[str, str]) -> list[str]:
        return ["llama-server", *(word for pair in options.items() for word in pair)]

    ollama.require_options(words(as_declared), settings(), "all")
    ollama.require_options(words(as_declared | {"-ngl": "all", "-t": "1"}), settings(), "all")
    with pytest.raises(server.ServingError, match="declared is"):
        ollama.require_options(words(as_declared | changed), settings(), "all")


def test_the_openai_route_is_a_target_of_its_own(
    model: Path, engine: Engine, opened: Opened
) -> None:
    """The same model behind /v1; the one before says that it is no longer what it was."""
    with opened(engine) as host, host.load(file(model)) as loaded:
        other = loaded.as_openai()
        requests.post(
            f"{other.url}/v1/chat/completions",
            json={"model": other.name, "messages": CONVERSATION, "max_tokens": 2},
            timeout=60,
        ).raise_for_status()

        other.verify()
        assert other.api == "openai"
        assert other.as_openai() is other
        assert other.render(CONVERSATION) == RENDERED
        assert other.prompt_tokens(CONVERSATION) > len(CONVERSATION)
        assert other.served.manifest_sha256 == loaded.served.manifest_sha256
        other.verify()
        with pytest.raises(server.ServerGone, match="another one than at the start"):
            loaded.verify()


def test_no_secret_and_no_setting_of_the_users_own_ollama_reaches_it(
    model: Path, at: Layout, engine: Engine, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator's own Ollama, its models and its address have nothing to do with ours."""
    for name in ("HF_TOKEN", "OLLAMA_DEBUG", "OLLAMA_ORIGINS", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    with opened(engine) as host, host.load(file(model)) as loaded:
        loaded.verify()
        for process in (_ollama(at), _below(at)):
            seen = process.environ()
            assert "http://127.0.0.1:9" not in seen.values()
            assert seen["HOME"].startswith(str(at.serving))


# --- what is planted --------------------------------------------------------------------------


@pytest.fixture
def planting(engine: Engine, tmp_path: Path) -> Callable[[str], Engine]:
    """Make an engine that is the real Ollama, before whose start somebody changes its store."""

    def make(body: str) -> Engine:
        program = tmp_path / "planting"
        program.write_text(
            f"#!{sys.executable}\n"
            "import json, os, pathlib, sys\n"
            "store = pathlib.Path(os.environ['OLLAMA_MODELS'])\n"
            "(manifest,) = [path for path in (store / 'manifests').rglob('*') if path.is_file()]\n"
            "told = json.loads(manifest.read_text())\n"
            "def blob(kind):\n"
            "    (one,) = [x for x in told['layers'] if x['mediaType'].endswith(kind)]\n"
            "    return store / 'blobs' / one['digest'].replace(':', '-')\n"
            + textwrap.dedent(body)
            + f"\nos.execv({str(engine.ollama)!r}, [{str(engine.ollama)!r}, *sys.argv[1:]])\n"
        )
        program.chmod(0o755)
        return dataclasses.replace(engine, ollama=program)

    return make


@pytest.mark.parametrize(
    "planted",
    [
        (
            "manifest.write_text(json.dumps(told, indent=1))",
            server.WrongDigest,
            "lists .* with the digest [0-9a-f]{64}; the manifest that was placed has",
        ),
        (
            # Under the digest of ours: Ollama compares no blob with its name.
            "blob('params').write_text(json.dumps({'num_ctx': 256}))",
            server.WrongContext,
            "with a context of 256 tokens, declared are 512",
        ),
        (
            """
            weights = bytearray(blob('model').read_bytes())
            blob('model').unlink()
            weights[-100:-90] = b'0123456789'
            blob('model').write_bytes(weights)
            """,
            server.WrongDigest,
            "changed while it was served",
        ),
        (
            "manifest.with_name('other').write_bytes(manifest.read_bytes())",
            server.WrongDigest,
            "lists localhost/fleet/tiny:other beside localhost/fleet/tiny:f16",
        ),
    ],
    ids=["another manifest", "a smaller context", "other weights", "a second model"],
)
def test_what_somebody_planted_stops_the_gate_with_its_own_sentence(
    model: Path,
    planting: Callable[[str], Engine],
    opened: Opened,
    planted: tuple[str, type[server.ServingError], str],
) -> None:
    """Nobody sends a request to a server that has something else."""
    body, kind, sentence = planted

    with opened(planting(body)) as host, pytest.raises(kind, match=sentence):  # noqa: SIM117
        with host.load(file(model)):
            pytest.fail("it was handed out")


def test_a_quant_whose_file_is_another_one_is_not_placed(
    model: Path, tmp_path: Path, at: Layout, engine: Engine, opened: Opened
) -> None:
    """Another GGUF under the name of the one that was measured is found by its digest."""
    other = serving_factory.model(tmp_path / "other.gguf", seed=7)
    planted = file(other, sha256=hashing.digest(model).sha256)

    with opened(engine) as host, pytest.raises(DigestError, match=r"other\.gguf is not the file"):  # noqa: SIM117
        with host.load(planted):
            pytest.fail("it was handed out")

    assert "serve" not in (at.root / "serve.log").read_text()


# --- what goes wrong while it runs ------------------------------------------------------------


def test_a_second_model_that_evicts_ours_is_told_by_verify(
    model: Path, tmp_path: Path, at: Layout, engine: Engine, opened: Opened
) -> None:
    """Whose numbers those are that came after nobody knows."""
    other = serving_factory.model(tmp_path / "other.gguf", seed=1)
    with opened(engine) as host, host.load(file(model)) as loaded:
        placed = ollama_store.place(
            Path(_ollama(at).environ()["OLLAMA_MODELS"]),
            other,
            hashing.digest(other).sha256,
            file(other).modelfile,
            name=ollama_store.name_of("intruder", "F16"),
            options={},
        )
        _ask(loaded, model=placed.name).raise_for_status()

        with pytest.raises(server.Evicted, match="has loaded localhost/fleet/intruder:f16"):
            loaded.verify()


def test_a_model_that_was_unloaded_is_told_by_verify(
    model: Path, engine: Engine, opened: Opened
) -> None:
    """Somebody else's keep_alive of 0 is enough."""
    with opened(engine) as host, host.load(file(model)) as loaded:
        _ask(loaded, messages=[], keep_alive=0).raise_for_status()
        _wait_until(lambda: not requests.get(f"{loaded.url}/api/ps", timeout=5).json()["models"])

        with pytest.raises(server.Evicted, match="out of its memory"):
            loaded.verify()


def test_a_llama_server_killed_in_mid_stream_is_told_by_verify(
    tmp_path: Path, at: Layout, engine: Engine, opened: Opened
) -> None:
    """/api/ps goes on listing the model; the process below says that it is gone."""
    wide = serving_factory.model(tmp_path / "wide.gguf", n_ctx=8192)
    wanted = file(wide, context_tokens=8192)
    with opened(engine, context_tokens=8192, parallel=1) as host, host.load(wanted) as loaded:
        below = _below(at)
        lines: list[bytes] = []
        with requests.post(
            f"{loaded.url}/api/chat",
            json={
                "model": loaded.name,
                "messages": CONVERSATION,
                "shift": False,
                "truncate": False,
                "options": {"num_predict": 8000, "temperature": 2.0},
            },
            stream=True,
            timeout=60,
        ) as answer:
            for line in answer.iter_lines():
                if not lines:
                    below.kill()
                lines.append(line)

        with pytest.raises(server.ServerGone, match="no llama-server any more"):
            loaded.verify()
    assert answer.status_code == 200
    assert b'"error"' in lines[-1]


def test_a_llama_server_that_was_started_again_is_told_by_verify(
    model: Path, at: Layout, engine: Engine, opened: Opened
) -> None:
    """Ollama loads by itself after a crash: the next answers look as if nothing had been."""
    with opened(engine) as host, host.load(file(model)) as loaded:
        below = _below(at)
        below.kill()
        _wait_until(lambda: not below.is_running())
        _wait_until(lambda: _ask(loaded).ok)

        with pytest.raises(server.ServerGone, match="another one than at the start"):
            loaded.verify()


def test_an_ollama_that_was_killed_is_told_by_verify_and_leaves_no_orphan(
    model: Path, at: Layout, engine: Engine, opened: Opened
) -> None:
    """Its llama-server lives on when it is killed, and is ended by us."""
    with opened(engine) as host:
        with host.load(file(model)) as loaded:
            process = _ollama(at)
            process.kill()
            _wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE)
            with pytest.raises(server.ServerGone, match="ollama was killed"):
                loaded.verify()
        assert programs_in(at) == []


def test_a_port_that_somebody_took_is_tried_again_with_another(
    model: Path, engine: Engine, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when that somebody answers as an Ollama does."""
    with serving_factory.healthy_stranger() as port:
        ports = iter([port, sandbox.free_port()])
        monkeypatch.setattr(sandbox, "free_port", lambda: next(ports))

        with opened(engine) as host, host.load(file(model)) as loaded:
            assert loaded.url != f"http://127.0.0.1:{port}"


def _wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- what cannot be served --------------------------------------------------------------------


def test_what_ollama_says_of_a_file_that_it_cannot_load_is_shown(
    model: Path, tmp_path: Path, engine: Engine, opened: Opened
) -> None:
    """An architecture that the llama-server below does not know."""
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(model.read_bytes().replace(b"llama", b"lhama"))

    with (
        opened(engine) as host,
        pytest.raises(
            server.LoadFailed, match=r"(?s)cannot load strange\.gguf.*status 500"
        ) as info,
        host.load(file(strange)),
    ):
        pass

    assert str(tmp_path) not in info.value.message


@pytest.mark.parametrize("gpu_layers", ["all", "auto"])
def test_a_model_beside_the_gpu_is_an_error_unless_declared(
    model: Path, engine: Engine, opened: Opened, monkeypatch: pytest.MonkeyPatch, gpu_layers: str
) -> None:
    """On a host with a card, what Ollama says lies on it must be all of the model."""
    monkeypatch.setattr(server, "require_memory", lambda *_, **__: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    chosen = _for(engine, "cuda")

    with opened(chosen, gpu_layers=gpu_layers) as host:  # noqa: SIM117
        with pytest.raises(server.PartialOffload, match=r"0 of \d+ MiB"), host.load(file(model)):
            pass
    with opened(chosen, gpu_layers=1) as host, host.load(file(model)) as loaded:
        loaded.verify()


def _for(engine: Engine, backend: str) -> Engine:
    tools = dataclasses.replace(engine.tools, manifest=engine.tools.manifest | {"backend": backend})
    return dataclasses.replace(engine, tools=tools)


def test_an_ollama_that_cannot_read_where_the_model_lies_proves_nothing(
    model: Path, engine: Engine, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It then gives the size of the file for both, as if all of it lay on the card."""
    monkeypatch.setattr(server, "require_memory", lambda *_, **__: None)
    size = model.stat().st_size
    monkeypatch.setattr(ollama._LoadedByOllama, "_sizes_of", staticmethod(lambda _: (size, size)))

    with (
        opened(_for(engine, "cuda")) as host,
        pytest.raises(server.PartialOffload, match="does not know where"),
        host.load(file(model)),
    ):
        pass


def test_no_card_is_shown_to_an_ollama_whose_toolchain_has_none(
    model: Path, at: Layout, engine: Engine, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries that it brings itself would read prompts on a card, and the CPU get the credit."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    with opened(_for(engine, "cpu")) as host, host.load(file(model)) as loaded:
        assert loaded.served.size_vram_bytes == 0
        for process in (_ollama(at), _below(at)):
            assert process.environ()["CUDA_VISIBLE_DEVICES"] == "-1"
            assert process.environ()["OLLAMA_VULKAN"] == "0"
    with opened(_for(engine, "cuda")) as host:
        assert "CUDA_VISIBLE_DEVICES" not in host.environment


def test_a_file_that_is_written_to_after_it_was_hashed_is_not_handed_out(
    model: Path, tmp_path: Path, engine: Engine, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ollama's blob is the very file: between the hash and the start somebody may write to it."""
    own = tmp_path / "own.gguf"
    own.write_bytes(model.read_bytes())
    os.utime(own, (1, 1))  # clocks of file systems tick slowly
    place = ollama_store.place

    def placed_then_written(*told: Any, **options: Any) -> ollama_store.Placed:
        placed = place(*told, **options)
        with own.open("r+b") as opened_file:
            opened_file.seek(-10, os.SEEK_END)
            opened_file.write(b"0123456789")
        return placed

    monkeypatch.setattr(ollama_store, "place", placed_then_written)

    with opened(engine) as host, pytest.raises(server.WrongDigest, match="changed while"):  # noqa: SIM117
        with host.load(file(own)):
            pytest.fail("it was handed out")


def test_a_llama_server_that_was_killed_while_it_loaded_blames_no_file(
    model: Path, tmp_path: Path, engine: Engine, opened: Opened
) -> None:
    """The kernel kills for want of memory: nothing is known of the file, so it is not rejected."""
    chosen = _with_helper(engine, tmp_path / "killed", "kill -9 $$")

    with (
        opened(chosen) as host,
        pytest.raises(server.ServerGone, match=r"killed while it loaded tiny-F16\.gguf"),
        host.load(file(model)),
    ):
        pass


def _with_helper(engine: Engine, folder: Path, command: str) -> Engine:
    """The real Ollama in a layout whose llama-server runs a command where it is to load a model."""
    assert engine.ollama is not None
    program = folder / "bin/ollama"
    helper = folder / "lib/ollama/llama-server"
    for path in (program, helper):
        path.parent.mkdir(parents=True)
    shutil.copy(engine.ollama, program)
    helper.write_text(f"#!/bin/sh\ncase $* in *--model*) {command};; esac\n")
    helper.chmod(0o755)
    return dataclasses.replace(engine, ollama=program)


def test_a_load_that_never_ends_is_ended(
    model: Path, tmp_path: Path, engine: Engine, opened: Opened
) -> None:
    """It is waited for as long as declared, and not longer."""
    with (
        opened(
            _with_helper(engine, tmp_path / "slow", "exec sleep 600"), load_timeout_s=1.0
        ) as host,
        pytest.raises(server.LoadFailed, match=r"tiny-F16\.gguf"),
        host.load(file(model)),
    ):
        pass


def test_an_ollama_that_ends_at_its_start_says_its_last_words(
    model: Path, tmp_path: Path, engine: Engine, opened: Opened
) -> None:
    """Its exit code and what it printed."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no room on the device >&2\nexit 3\n")
    broken.chmod(0o755)

    with (
        opened(dataclasses.replace(engine, ollama=broken)) as host,
        pytest.raises(server.ServerGone, match=r"exit code 3\.\n    no room on the device"),
        host.load(file(model)),
    ):
        pass


# --- being ended ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("phase", ["starting", "loading", "loaded"])
@pytest.mark.parametrize("kind", ["ollama", "llama-server"])
def test_nothing_is_left_whenever_and_however_we_are_ended(  # noqa: PLR0913, PLR0917
    model: Path,
    at: Layout,
    engine: Engine,
    tools: Toolchain,
    tmp_path: Path,
    kind: serving_factory.Kind,
    phase: str,
    number: signal.Signals,
) -> None:
    """No server, no llama-server, no port, no file: by Ctrl-C, by SIGTERM, and by kill -9."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    ours = subprocess.Popen(
        [
            *(sys.executable, str(Path(serving_factory.__file__)), kind),
            *(str(_program(kind, phase, engine, tools, tmp_path)), str(at.root), str(model)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert ours.stdout is not None
    try:
        if phase == "loaded":
            assert ours.stdout.readline().startswith(b"loaded http://")
        elif (kind, phase) == ("ollama", "loading"):
            _wait_until(lambda: ["sleep", "600"] in _programs(at))
        else:
            _wait_until(lambda: bool(_programs(at)))
        ports = _ports(at)
        ours.send_signal(number)
        ours.communicate(timeout=30)
    finally:
        ours.kill()
        ours.communicate()

    assert left_in(at) == []
    assert not ports & _listening()
    assert list(temporary.iterdir()) == []
    assert ours.returncode != 0


def _program(
    kind: serving_factory.Kind, phase: str, engine: Engine, tools: Toolchain, folder: Path
) -> Path:
    """Return a program that stays in a phase, or the real one, which comes to be loaded."""
    if phase == "loaded":
        program = engine.ollama if kind == "ollama" else tools.tool("llama-server")
    elif kind == "ollama" and phase == "loading":
        program = _with_helper(engine, folder / "slow", "exec sleep 600").ollama
    else:
        # A llama-server loads as it starts: what differs is whether it answers meanwhile.
        program = folder / "slow"
        program.write_text(_STARTING if phase == "starting" else _LOADING.format(sys.executable))
        program.chmod(0o755)
    assert program is not None
    return program


_STARTING = "#!/bin/sh\nsleep 600\n"
_LOADING = """#!{}
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(503, "Loading model")

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def _programs(at: Layout) -> list[list[str]]:
    found = []
    for process in programs_in(at):
        with contextlib.suppress(psutil.Error):
            found.append(process.cmdline())
    return found


def _ports(at: Layout) -> set[int]:
    found: set[int] = set()
    for process in programs_in(at):
        # Ollama starts some that only list devices: they end while we look.
        with contextlib.suppress(psutil.Error):
            found.update(_listened(process.net_connections(kind="tcp")))
    return found


def _listening() -> set[int]:
    """Ports on which anybody listens now."""
    return set(_listened(psutil.net_connections(kind="tcp")))


def _listened(connections: list[Any]) -> Iterator[int]:
    for item in connections:
        if item.status == psutil.CONN_LISTEN:
            yield item.laddr.port
