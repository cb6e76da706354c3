"""
The toolchain's llama-server: the engine of the benchmarks, without anything around it.

Every option that decides what or how fast it answers is on its command line. It has the model from
its start on, so that being ready and having loaded are the same.

Source: common/arg.cpp and tools/server of the pinned commit.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import architectures, console
from pipelines.load_records import Served
from pipelines.serving import ollama_store, server
from pipelines.serving.sandbox import HOST
from pipelines.serving.server import (
    Host,
    Loaded,
    LoadFailed,
    PartialOffload,
    ServerGone,
    WrongContext,
    WrongDigest,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pipelines.llama_embeddings import Embedded
    from pipelines.serving.engine import Engine
    from pipelines.serving.sandbox import Sandbox
    from pipelines.serving.server import Api, Client, GgufFile, Running, Settings

PROGRAM: Final = "llama-server"
# tools/server/server-http.cpp
_BIND_FAILURE: Final = "couldn't bind HTTP server socket"
_OFFLOADED: Final = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
# `0.00.018.276 E message`: common/log.cpp. The first says why, the following that it is the end.
_ERROR_LINE: Final = re.compile(r"\d+\.\d\d\.\d{3}\.\d{3} E (.*)")
_ERRORS_SHOWN: Final = 4


def argv(  # noqa: PLR0913 - each is one independent fact about a server
    program: Path,
    gguf: Path,
    settings: Settings,
    *,
    name: str,
    port: int,
    backend: str,
    is_encoder: bool = False,
) -> list[str]:
    """
    Spell a server with nothing left to defaults that decides what or how fast it answers.

    As below Ollama: no cache of prompts in main memory, no shifting of the context, a part of the
    cache for each slot, and without a GPU the weights are read into memory and not mapped.
    `auto` layers are those that fit; without fitting it would mean all. An encoder reads a text in
    one piece, so its batches are as long as its context.
    """
    run_as = server.execution(settings, backend, is_encoder=is_encoder)
    layers = server.layers_word(settings, backend)
    mapped = [] if backend != "cpu" else ["--load-mode", "none"]
    return [
        str(program),
        *("--model", str(gguf), "--alias", name, "--host", HOST, "--port", str(port)),
        *("-c", str(settings.context_tokens * settings.parallel), "-np", str(settings.parallel)),
        *("-t", str(settings.threads), "-tb", str(settings.threads)),
        *("-ngl", layers, "--fit", "on" if layers == "auto" else "off"),
        *(("--n-cpu-moe", str(run_as.cpu_moe_layers)) if run_as.cpu_moe_layers else ()),
        *("-fa", "on" if settings.flash_attention else "off"),
        *("-ctk", settings.kv_type, "-ctv", settings.kv_type),
        *("-b", str(run_as.batch_tokens), "-ub", str(run_as.ubatch_tokens)),
        *(["--embedding"] if is_encoder else []),
        *("--no-kv-unified", "--no-context-shift", "--cache-ram", "0", "--cont-batching"),
        *("--no-webui", "--offline", "--no-mmproj", "--jinja", "--metrics", "--slots"),
        *("--log-verbosity", "4", "--log-colors", "off"),
        *mapped,
    ]


class LlamaServerHost(Host):
    """Serves one file after the other from the toolchain's llama-server."""

    def __init__(
        self, engine: Engine, settings: Settings, *, model: str, place: Sandbox, log: Path
    ) -> None:
        """Serve in `place`; all options are arguments, so the environment decides nothing."""
        self.engine = engine
        self.settings = settings
        self.environment: dict[str, str] = {}
        self._model = model
        self._place = place
        self._log = log

    @contextmanager
    def load(self, file: GgufFile) -> Iterator[Loaded]:
        """See `Host.load`."""
        tools = self.engine.tools
        header = server.read_header(file, self.settings)
        settings = server.of_experts(self.settings, header)
        is_encoder = architectures.is_encoder(header)
        server.require_memory(file, settings, tools, log=self._log)
        proven = server.prove(file)
        name = str(ollama_store.name_of(self._model, file.type))
        gguf = file.path.resolve()
        on_card = server.uses_gpu(settings, tools)
        began = time.monotonic()

        def ready(running: Running) -> None:
            nonlocal began
            try:
                server.wait_until(
                    running,
                    lambda: running.client.is_up("/health"),
                    within_s=server.load_within_s(file, settings),
                    what=f"load {file.path.name}",
                )
            except ServerGone as error:
                # Killed for want of memory, or by somebody, is not the fault of the file.
                if running.process.was_killed or is_bind_failure(running.process.output()):
                    began = time.monotonic()
                    raise
                said = complaints(running).replace(f"{gguf.parent}/", "")
                raise LoadFailed(
                    f"llama-server cannot load {file.path.name}:\n{said}", log=self._log
                ) from error

        environment = self._place.environment(tools)
        with server.running(
            PROGRAM,
            lambda port: argv(
                self.engine.llama_server,
                gguf,
                settings,
                name=name,
                port=port,
                backend=tools.backend,
                is_encoder=is_encoder,
            ),
            env=lambda _: environment,
            cwd=self._place.temporary,
            log=self._log,
            on_card=on_card,
            is_bind_failure=is_bind_failure,
            ready=ready,
        ) as running:
            cold_load_ms = (time.monotonic() - began) * 1e3
            loaded = _LoadedByLlamaServer(
                running,
                Served(
                    type=file.type,
                    gguf_sha256=file.sha256,
                    manifest_sha256=None,
                    context_tokens=settings.context_tokens,
                    parallel=settings.parallel,
                    gpu_layers=server.layers_word(settings, tools.backend),
                    kv_type=settings.kv_type,
                    size_bytes=None,
                    size_vram_bytes=None,
                    peak_memory_mib=None,
                    cold_load_ms=round(cold_load_ms, 3),
                    cpu_moe_layers=self.settings.cpu_moe_layers,
                ),
                name=name,
                gguf=gguf,
                proven=proven,
            )
            loaded.verify()
            if server.wants_whole(settings, tools):
                require_offload(running)
            yield loaded


def is_bind_failure(output: str) -> bool:
    """Tell whether a llama-server ended because somebody else had its port."""
    return _BIND_FAILURE in output


def complaints(running: Running) -> str:
    """Return the first errors that a llama-server logged, indented, or else its last lines."""
    errors = [console.clean(line)[:300] for line in _ERROR_LINE.findall(running.process.output())]
    shown = "\n".join(f"    {line}" for line in errors[:_ERRORS_SHOWN])
    return shown or running.process.last_lines()


def require_props(
    client: Client, program: str, *, gguf: str, context_tokens: int, parallel: int
) -> None:
    """
    Hold what a llama-server says of itself against what it was to load.

    Args:
        client: Asks it.
        program: What messages call it.
        gguf: File that it was given, as its command line spells it.
        context_tokens: Declared context of a slot.
        parallel: Declared number of slots.

    Raises:
        WrongDigest: It has another file.
        WrongContext: A slot has another context, or there are more or fewer slots.
    """
    told = client.get("/props")
    path = str(told.get("model_path"))
    if path != gguf:
        # Names, not paths: the sentence may come into a record.
        raise WrongDigest(
            f"{program} serves a {console.clean(Path(path).name)} that is not the "
            f"{Path(gguf).name} which it was given."
        )
    context = told.get("default_generation_settings", {}).get("n_ctx")
    if context != context_tokens:
        raise WrongContext(
            f"{program} has a context of {context} tokens in each slot, declared are "
            f"{context_tokens}."
        )
    if told.get("total_slots") != parallel:
        raise WrongContext(
            f"{program} has {told.get('total_slots')} slots, declared are {parallel}.",
            hint="Some model families are served one request at a time: declare parallel: 1.",
        )


def require_offload(running: Running) -> None:
    """
    Make sure that a llama-server that has just loaded put all layers on the GPU.

    Raises:
        PartialOffload: It says fewer, or nothing.
    """
    found = _OFFLOADED.findall(running.process.output())
    placed, layers = found[-1] if found else ("0", "any")
    if placed != layers:
        raise PartialOffload(
            f"{placed} of {layers} layers are on the GPU.",
            hint="Declare that number as gpu_layers, or serve a smaller quant or context.",
        )


def render(
    client: Client,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    think: bool = False,
) -> str:
    """Return the prompt that a llama-server makes of a conversation."""
    body: dict[str, Any] = {
        "messages": [dict(message) for message in messages],
        "chat_template_kwargs": {"enable_thinking": think},
    }
    if tools:
        body["tools"] = list(tools)
    prompt = client.post("/apply-template", body).get("prompt")
    if not isinstance(prompt, str):
        raise server.ServingError("llama-server does not say the prompt of a conversation.")
    return prompt


def openai_prompt_tokens(
    client: Client, program: str, name: str, messages: Sequence[Mapping[str, Any]]
) -> int:
    """
    Return the prompt tokens that an OpenAI-compatible server counts; one token is generated.

    Thinking is switched off, as it is where a prompt is rendered.
    """
    told = client.post(
        "/v1/chat/completions",
        {
            "model": name,
            "messages": [dict(message) for message in messages],
            "max_tokens": 1,
            "temperature": 0,
            "stream": False,
            **without_thinking(program),
        },
    )
    usage = told.get("usage")
    return server.count_of(usage if isinstance(usage, dict) else {}, "prompt_tokens", program)


def openai_embedding(client: Client, name: str, text: str) -> Embedded:
    """Return the embedding that an OpenAI-compatible server makes of a text."""
    from pipelines import llama_embeddings  # noqa: PLC0415 - it imports us

    asked = {"model": name, "input": text, "encoding_format": "float"}
    return llama_embeddings.of_openai(client.post("/v1/embeddings", asked))


def without_thinking(program: str) -> dict[str, Any]:
    """Return what tells an OpenAI-compatible route to answer at once: Ollama's, or all others'."""
    if program == PROGRAM:
        return {"chat_template_kwargs": {"enable_thinking": False}}
    return {"reasoning_effort": "none"}


class _LoadedByLlamaServer(Loaded):
    """See `Loaded`."""

    api: Api = "openai"

    def __init__(
        self,
        running: Running,
        served: Served,
        *,
        name: str,
        gguf: Path,
        proven: server.Bytes,
    ) -> None:
        self.url = running.client.url
        self.name = name
        self._running = running
        self._served = served
        self._gguf = gguf
        self._proven = proven

    @property
    def served(self) -> Served:
        return self._served.model_copy(update={"peak_memory_mib": self.peak_memory_mib()})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        think: bool = False,
    ) -> str:
        return render(self._running.client, messages, tools, think=think)

    def render_by_llama_server(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        think: bool = False,
    ) -> str:
        return self.render(messages, tools, think=think)

    def prompt_tokens(self, messages: Sequence[Mapping[str, Any]]) -> int:
        return openai_prompt_tokens(self._running.client, PROGRAM, self.name, messages)

    def embed(self, text: str) -> Embedded:
        return openai_embedding(self._running.client, self.name, text)

    def verify(self) -> None:
        self._running.require_alive()
        try:
            require_props(
                self._running.client,
                PROGRAM,
                gguf=str(self._gguf),
                context_tokens=self._served.context_tokens,
                parallel=self._served.parallel,
            )
        except ServerGone:
            self._running.require_alive(dying_s=server.DYING_S)
            raise
        self._proven.require_unchanged()

    def peak_memory_mib(self) -> float | None:
        return self._running.memory.peak_mib()

    def as_openai(self) -> Loaded:
        return self
