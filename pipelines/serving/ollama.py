"""
A real Ollama that serves exactly the file that was measured.

The model is laid into a private store by our own manifest, never by `ollama create`, which may
rewrite it. Ollama hashes no blob when it loads one, so the file is hashed before it is linked; then
/api/tags must list that manifest's digest and nothing else, /api/ps the declared context, and the
llama-server below, asked directly, the blob, the context and the number of slots: /api/ps shows
what was requested, and goes on listing a model whose llama-server has died.

What decides how it serves and is no part of the model (threads, layers on the GPU, the type of the
cache) is in its environment, which it hands on to llama-server.

Source: server/routes.go, server/sched.go, llm/llama_server.go, envconfig/config.go of 0.33.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from pipelines import architectures, console, llama_embeddings
from pipelines.load_records import Served
from pipelines.serving import llama_server, ollama_store, server
from pipelines.serving.sandbox import HOST
from pipelines.serving.server import (
    Evicted,
    Host,
    Loaded,
    LoadFailed,
    PartialOffload,
    ServerGone,
    ServingError,
    WrongContext,
    WrongDigest,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from pipelines.llama_embeddings import Embedded
    from pipelines.serving.engine import Engine
    from pipelines.serving.ollama_store import Placed
    from pipelines.serving.sandbox import Sandbox
    from pipelines.serving.server import Api, GgufFile, Running, Settings

PROGRAM: Final = "ollama"
# It answers in 0.05 s; on a busy host, or one whose GPUs are asked first, it takes longer.
_UP_WITHIN_S: Final = 60.0
_BIND_FAILURE: Final = "address already in use"
# Longest text that Ollama lets an encoder read, where no num_batch says otherwise: an encoder reads
# it in one batch (llm/llama_server.go, DefaultEmbeddingNumBatch).
ENCODER_BATCH_TOKENS: Final = 2048
# How Go says that SIGKILL ended the llama-server below.
_KILLED: Final = "signal: killed"
# An Ollama of PATH brings libraries for cards. Where the toolchain, and so the benchmark, has none,
# they would still read prompts on one that is there: with no layer on it, and nothing said.
_NO_CARDS: Final = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "ROCR_VISIBLE_DEVICES": "-1",
    "OLLAMA_VULKAN": "0",
}


def environment(settings: Settings, backend: str) -> dict[str, str]:
    """
    Return the variables that decide how Ollama serves, all of them stated.

    No call to the vendor's cloud, no pruning of what we laid into the store, one model at a time
    and for ever, no cache of prompts in main memory, the declared slots, context and cache, and no
    card where the toolchain is for none.
    """
    return {
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_MAX_LOADED_MODELS": "1",
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_MAX_QUEUE": "512",
        "OLLAMA_NUM_PARALLEL": str(settings.parallel),
        "OLLAMA_CONTEXT_LENGTH": str(settings.context_tokens),
        "OLLAMA_KV_CACHE_TYPE": settings.kv_type,
        "OLLAMA_FLASH_ATTENTION": "1" if settings.flash_attention else "0",
        "OLLAMA_LOAD_TIMEOUT": f"{max(1, round(settings.load_timeout_s))}s",
        "LLAMA_ARG_THREADS": str(settings.threads),
        "LLAMA_ARG_N_GPU_LAYERS": server.layers_word(settings, backend),
        "LLAMA_ARG_CACHE_RAM": "0",
        "LLAMA_ARG_ENDPOINT_METRICS": "1",
        **(_NO_CARDS if backend == "cpu" else {}),
    }


class OllamaHost(Host):
    """Serves one file after the other, each from an Ollama and a store of its own."""

    def __init__(  # noqa: PLR0913 - each is one independent fact about a host
        self,
        engine: Engine,
        program: Path,
        settings: Settings,
        *,
        model: str,
        place: Sandbox,
        log: Path,
    ) -> None:
        """Serve with `program` in `place`."""
        self.engine = engine
        self.settings = settings
        self.environment = environment(settings, engine.tools.backend)
        self._program = program
        self._model = model
        self._place = place
        self._log = log

    @contextmanager
    def load(self, file: GgufFile) -> Iterator[Loaded]:
        """See `Host.load`."""
        settings, tools = self.settings, self.engine.tools
        is_encoder = architectures.is_encoder(server.read_header(file, settings))
        if is_encoder:
            # server/sched.go: what does not complete texts gets one slot, whatever is asked for.
            settings = replace(settings, parallel=1)
        server.require_memory(file, settings, tools, log=self._log)
        on_card = server.uses_gpu(settings, tools)
        with ExitStack() as stack:
            store = stack.enter_context(self._place.store())
            # Before it is hashed: who writes to it from then on is noticed.
            before = server.Bytes.of(file.path, file.sha256)
            placed = ollama_store.place(
                store,
                file.path,
                file.sha256,
                file.modelfile,
                name=ollama_store.name_of(self._model, file.type),
                options={},
            )
            blob = store / "blobs" / f"sha256-{file.sha256}"
            proven = (
                replace(before, path=blob)
                if blob.samefile(file.path)
                else server.Bytes.of(blob, file.sha256)  # a copy, which only we know
            )
            running = stack.enter_context(self._running(store, on_card=on_card))
            loaded = _LoadedByOllama(
                _Served(
                    running=running,
                    store=store,
                    placed=placed,
                    file=file,
                    proven=proven,
                    settings=settings,
                    layers=server.layers_word(settings, tools.backend),
                    whole=server.wants_whole(settings, tools),
                    load_within_s=server.load_within_s(file, settings),
                    is_encoder=is_encoder,
                    asked_parallel=self.settings.parallel,
                ),
                api="ollama",
            )
            loaded.verify()
            yield loaded

    def _running(self, store: Path, *, on_card: bool) -> AbstractContextManager[Running]:
        """Start an Ollama on a store."""

        def ready(running: Running) -> None:
            server.wait_until(
                running,
                lambda: running.client.is_up("/api/version"),
                within_s=_UP_WITHIN_S,
                what="start ollama",
            )

        own = self._place.environment(self.engine.tools) | self.environment
        return server.running(
            PROGRAM,
            lambda _: [self._program, "serve"],
            env=lambda port: own | {"OLLAMA_HOST": f"{HOST}:{port}", "OLLAMA_MODELS": str(store)},
            cwd=self._place.temporary,
            log=self._log,
            on_card=on_card,
            is_bind_failure=lambda output: _BIND_FAILURE in output,
            ready=ready,
        )


@dataclass(frozen=True)
class Below:
    """The llama-server that an Ollama started: its process, when it started, where it listens."""

    pid: int
    started_s: float
    port: int
    argv: tuple[str, ...]

    @property
    def has_templates(self) -> bool:
        """Whether it renders by the model's own template."""
        return "--no-jinja" not in self.argv


def below(pid: int, models: Path) -> list[Below]:
    """List the llama-servers that live below a process and have a blob of a store loaded."""
    import psutil  # noqa: PLC0415 - not at CLI start

    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
    found = []
    for child in children:
        try:
            argv = child.cmdline()
            if (
                os.path.basename(argv[0]).startswith("llama-server")  # noqa: PTH119 - argv
                and child.status() != psutil.STATUS_ZOMBIE
                and _option(argv, "--model").startswith(str(models))
            ):
                port = int(_option(argv, "--port"))
                found.append(Below(child.pid, child.create_time(), port, tuple(argv)))
        # It may end while we look; Ollama also runs one that only lists devices.
        except (psutil.Error, ValueError, IndexError):
            continue
    return found


def require_options(argv: Sequence[str], settings: Settings, layers: str) -> None:
    """
    Hold the command line that Ollama made for its llama-server against what was declared.

    Nothing else shows it: an Ollama that does not pass a setting on, since it knows better or calls
    it otherwise, would serve with another cache under the name of the declared one.

    Args:
        argv: Words of the llama-server's command line.
        settings: How the file is to be served.
        layers: The declared layers on the GPU, as a llama-server takes them.

    Raises:
        ServingError: An option is missing or has another value.
    """
    wanted = {
        "--cache-type-k": settings.kv_type,
        "--cache-type-v": settings.kv_type,
        "--flash-attn": "on" if settings.flash_attention else "off",
    }
    # These are in its environment, over which the command line wins.
    wanted |= {
        name: value
        for name, value in {"-ngl": layers, "-t": str(settings.threads)}.items()
        if name in argv
    }
    for name, value in wanted.items():
        if name not in argv[:-1] or _option(argv, name) != value:
            found = console.clean(_option(argv, name)) if name in argv[:-1] else "nothing"
            raise ServingError(
                f"ollama gives its llama-server {found} as {name}, declared is {value}.",
                hint="An Ollama that is newer than what was run here? Remove it from PATH: the "
                "declared one is then installed apart.",
            )


def _option(argv: Sequence[str], name: str) -> str:
    return argv[argv.index(name) + 1]


@dataclass(frozen=True, kw_only=True)
class _Served:
    """What both dialects of one loaded file share."""

    running: Running
    store: Path
    placed: Placed
    file: GgufFile
    proven: server.Bytes
    settings: Settings
    layers: str
    whole: bool
    load_within_s: float
    is_encoder: bool = False
    asked_parallel: int = 1


class _LoadedByOllama(Loaded):
    """See `Loaded`; loads when it is made."""

    def __init__(self, what: _Served, *, api: Api) -> None:
        self.url = what.running.client.url
        self.api = api
        self.name = what.placed.name
        self._what = what
        self._ollama = what.running.client
        # Whether the context is shifted is an option of the llama-server below: a request that
        # states it otherwise loads the model again. The OpenAI route cannot state it.
        self._request: dict[str, Any] = {"model": self.name, "stream": False}
        if what.is_encoder:
            self._request = {"model": self.name}
        elif api == "ollama":
            self._request |= {"shift": False, "truncate": False}
        self._cold_load_ms = self._load()
        self._below = self._only_below()
        require_options(self._below.argv, what.settings, what.layers)
        self._llama = server.Client(llama_server.PROGRAM, self._below.port)
        self.llama_server_renders = self._below.has_templates
        self.notes = (
            _notes_of_encoder(what)
            if what.is_encoder
            else ()
            if self._below.has_templates
            else ("Ollama renders prompts itself: the llama-server below has no template.",)
        )
        self._size_bytes, self._size_vram_bytes = self._sizes()

    def _load(self) -> float:
        """Load the model by a request without a message; return the milliseconds that it took."""
        what = self._what
        asked: dict[str, Any] = {} if what.is_encoder else {"messages": []}
        path = "/api/embed" if what.is_encoder else "/api/chat"
        began = time.monotonic()
        try:
            told = server.while_waiting(
                what.running,
                lambda: self._ollama.post(
                    path,
                    self._request | asked | {"keep_alive": -1},
                    timeout_s=what.load_within_s,
                ),
                what=f"load {what.file.path.name}",
            )
        except ServerGone as error:
            what.running.require_alive(dying_s=server.DYING_S)
            raise LoadFailed(
                f"ollama did not load {what.file.path.name} within {what.load_within_s:.0f} s.",
                log=what.running.process.log,
            ) from error
        except ServingError as error:
            said = error.message.replace(f"{what.store}/", "")
            if _KILLED in said:
                raise ServerGone(
                    f"the llama-server below ollama was killed while it loaded "
                    f"{what.file.path.name}: often there was too little memory.",
                    log=what.running.process.log,
                ) from error
            raise LoadFailed(
                f"ollama cannot load {what.file.path.name}: {said}",
                log=what.running.process.log,
            ) from error
        # What comes back without an input: no embedding, or the reason of an answer without words.
        is_loaded = (
            told.get("embeddings") == [] if what.is_encoder else told.get("done_reason") == "load"
        )
        if not is_loaded:
            raise LoadFailed(f"ollama does not say that it loaded {what.file.path.name}.")
        return round((time.monotonic() - began) * 1e3, 3)

    # --- what is said of it

    @property
    def served(self) -> Served:
        what = self._what
        return Served(
            type=what.file.type,
            gguf_sha256=what.file.sha256,
            manifest_sha256=what.placed.manifest_sha256,
            context_tokens=what.settings.context_tokens,
            parallel=what.settings.parallel,
            gpu_layers=what.layers,
            kv_type=what.settings.kv_type,
            size_bytes=self._size_bytes,
            size_vram_bytes=self._size_vram_bytes,
            peak_memory_mib=self.peak_memory_mib(),
            cold_load_ms=self._cold_load_ms,
        )

    def peak_memory_mib(self) -> float | None:
        return self._what.running.memory.peak_mib()

    # --- what it is asked

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        think: bool = False,
    ) -> str:
        body = self._request | {
            "messages": [dict(message) for message in messages],
            "_debug_render_only": True,
            "think": think,
        }
        if tools:
            body["tools"] = list(tools)
        told = self._ollama.post("/api/chat", body).get("_debug_info")
        prompt = told.get("rendered_template") if isinstance(told, dict) else None
        if not isinstance(prompt, str):
            raise ServingError("ollama does not say the prompt of a conversation.")
        return prompt

    def render_by_llama_server(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        think: bool = False,
    ) -> str:
        return llama_server.render(self._llama, messages, tools, think=think)

    def prompt_tokens(self, messages: Sequence[Mapping[str, Any]]) -> int:
        if self.api == "openai":
            return llama_server.openai_prompt_tokens(self._ollama, PROGRAM, self.name, messages)
        body = self._request | {
            "messages": [dict(message) for message in messages],
            "options": {"num_predict": 1, "temperature": 0},
            "think": False,
        }
        return server.count_of(self._ollama.post("/api/chat", body), "prompt_eval_count", PROGRAM)

    def embed(self, text: str) -> Embedded:
        if self.api == "openai":
            return llama_server.openai_embedding(self._ollama, self.name, text)
        asked = self._request | {"input": text, "truncate": False}
        return llama_embeddings.of_ollama(self._ollama.post("/api/embed", asked))

    def as_openai(self) -> Loaded:
        return (
            self if self.api == "openai" else _verified(_LoadedByOllama(self._what, api="openai"))
        )

    # --- what is proven of it

    def verify(self) -> None:
        self._what.running.require_alive()
        try:
            self._verify()
        except ServerGone:
            self._what.running.require_alive(dying_s=server.DYING_S)
            raise

    def _verify(self) -> None:
        what = self._what
        entry = self._listed_as_loaded()
        now = self._only_below()
        if now != self._below:
            raise ServerGone(
                "the llama-server below ollama is another one than at the start: it crashed, or "
                "was ended, and the model was loaded again.",
                log=what.running.process.log,
            )
        self._require_listed()
        self._require_entry(entry)
        llama_server.require_props(
            self._llama,
            "the llama-server below ollama",
            gguf=str(what.proven.path),
            context_tokens=what.settings.context_tokens,
            parallel=what.settings.parallel,
        )
        what.proven.require_unchanged()

    def _listed_as_loaded(self) -> dict[str, Any]:
        """Return our entry of /api/ps, in which there must be no other."""
        entries = _entries(self._ollama.get("/api/ps"), "/api/ps")
        others = [console.clean(str(each.get("name"))) for each in entries if not self._is_us(each)]
        if others:
            raise Evicted(f"ollama has loaded {', '.join(others)} in the place of {self.name}.")
        if not entries:
            raise Evicted(f"ollama has put {self.name} out of its memory.")
        return entries[0]

    def _is_us(self, entry: Mapping[str, Any]) -> bool:
        return str(entry.get("name")).lower() == self.name.lower()

    def _only_below(self) -> Below:
        what = self._what
        found = below(what.running.process.pid, what.store)
        if len(found) != 1:
            raise ServerGone(
                "ollama has no llama-server any more: it crashed, or was ended."
                if not found
                else f"ollama has {len(found)} llama-servers; one was to serve {self.name}.",
                log=what.running.process.log,
            )
        return found[0]

    def _require_listed(self) -> None:
        """Hold /api/tags against our manifest."""
        entries = _entries(self._ollama.get("/api/tags"), "/api/tags")
        others = [console.clean(str(each.get("name"))) for each in entries if not self._is_us(each)]
        if others:
            raise WrongDigest(f"ollama lists {', '.join(others)} beside {self.name}.")
        digest = entries[0].get("digest") if entries else None
        if digest != self._what.placed.manifest_sha256:
            raise WrongDigest(
                f"ollama lists {self.name} with the digest {console.clean(str(digest))}; the "
                f"manifest that was placed has {self._what.placed.manifest_sha256}."
            )

    def _require_entry(self, entry: Mapping[str, Any]) -> None:
        """Hold our entry of /api/ps against what was declared."""
        what = self._what
        if entry.get("digest") != what.placed.manifest_sha256:
            raise WrongDigest(
                f"ollama has loaded {self.name} with the digest "
                f"{console.clean(str(entry.get('digest')))}; the manifest that was placed has "
                f"{what.placed.manifest_sha256}."
            )
        context = entry.get("context_length")
        if context != what.settings.context_tokens:
            raise WrongContext(
                f"ollama serves {self.name} with a context of {context} tokens, declared are "
                f"{what.settings.context_tokens}."
            )
        size, on_card = self._sizes_of(entry)
        if what.whole and size == what.proven.size_bytes:
            # llm/llama_server.go, MemorySize: without those words it gives this for both sizes.
            raise PartialOffload(
                f"ollama does not know where {self.name} lies: it found no word of its "
                "llama-server on that, and gives the size of the file."
            )
        if what.whole and on_card != size:
            raise PartialOffload(
                f"{on_card / server.MIB:,.0f} of {size / server.MIB:,.0f} MiB of {self.name} are "
                f"on the GPU.",
                hint="Declare a number as gpu_layers, or serve a smaller quant or context.",
            )

    def _sizes(self) -> tuple[int, int]:
        return self._sizes_of(self._listed_as_loaded())

    @staticmethod
    def _sizes_of(entry: Mapping[str, Any]) -> tuple[int, int]:
        size, on_card = entry.get("size"), entry.get("size_vram")
        if not isinstance(size, int) or not isinstance(on_card, int):
            raise ServingError("ollama does not say how large the loaded model is.")
        return size, on_card


def _notes_of_encoder(what: _Served) -> tuple[str, ...]:
    notes = []
    if what.asked_parallel != what.settings.parallel:
        notes.append(
            f"Ollama serves an encoder in one slot; serving.parallel: {what.asked_parallel} has no "
            "effect on it"
        )
    if what.settings.context_tokens > ENCODER_BATCH_TOKENS:
        notes.append(
            f"Ollama refuses texts of more than {ENCODER_BATCH_TOKENS:,} tokens unless the "
            "Modelfile states a larger num_batch"
        )
    return tuple(notes)


def _verified(loaded: Loaded) -> Loaded:
    loaded.verify()
    return loaded


def _entries(told: Mapping[str, Any], path: str) -> list[dict[str, Any]]:
    """Return the models of a list."""
    entries = told.get("models")
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ServingError(f"ollama answered {path} with no list of models.")
    return entries
