"""
What every server has in common: how it is asked to serve, what is proven of it, how it can fail.

`open_host` holds a private place; `Host.load` starts a server there for one file, loads it, proves
what it serves before anybody sends a request, and ends it. Each file has a server of its own: no
model is left over from the one before, and the memory that was used is that file's.

    WrongDigest     the model listed is not the one that was placed, or its bytes changed
    WrongContext    the context, or the number of slots, is not the declared one
    PartialOffload  some layers are not on the GPU, and that was not declared
    Evicted         the model was put aside for another one
    LoadFailed      the server cannot load the file, or not in time
    ServerGone      the server, or the llama-server below it, ended or was started again
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from pipelines import (
    architectures,
    console,
    gguf_header,
    gpu,
    llama_fit_params,
    llamacpp,
    machine,
    proc,
    watch,
)
from pipelines.errors import DigestError, MachineError, ParamsError, ToolError
from pipelines.llamacpp import Execution
from pipelines.serving import sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.llama_embeddings import Embedded
    from pipelines.load_records import Served
    from pipelines.serving.engine import Engine
    from pipelines.serving.modelfile import Modelfile
    from pipelines.toolchain import Toolchain

Api = Literal["ollama", "openai"]

MIB: Final = 1 << 20
# llama.cpp's own defaults, which are those of the benchmark.
BATCH_TOKENS: Final = 2048
UBATCH_TOKENS: Final = 512
# For the server itself, its threads' stacks, and what a request needs besides the model.
MARGIN_MIB: Final = 512
# llama.cpp rounds the context of a slot up to a multiple of this (llama-context.cpp, GGML_PAD).
CONTEXT_STEP: Final = 256
ANSWER_WITHIN_S: Final = 30.0
# A hard disk beside other work, or a share on the network; who reads more slowly than this hangs.
_SLOWEST_READ_BYTES_PER_S: Final = 50e6
_ALL_LAYERS: Final = 9999
_PORTS_TRIED: Final = 5
_POLL_S: Final = 0.01
# Within which a program that closed its port has ended, if it is ending.
DYING_S: Final = 1.0
_SAID_CHARACTERS: Final = 600
_HTTP_ERROR: Final = 400


class ServingError(ToolError):
    """What a server serves, or whether it serves, is not what was asked for."""


class WrongDigest(ServingError):  # noqa: N818 - the name says what is wrong
    """The model that is served is not the file that was measured."""


class WrongContext(ServingError):  # noqa: N818 - the same
    """The server has another context, or another number of slots, than was declared."""


class PartialOffload(ServingError):  # noqa: N818 - the same
    """Not all layers are on the GPU, and the declaration does not say how many are to be."""


class Evicted(ServingError):  # noqa: N818 - the same
    """The server put the model aside."""


class LoadFailed(ServingError):  # noqa: N818 - the same
    """The server cannot load the file."""


class ServerGone(ServingError):  # noqa: N818 - the same
    """The server, or the program below it that has the model, ended or was started again."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    How a file is served.

    Attributes:
        context_tokens: Context of each slot.
        parallel: Slots: requests that are served at the same time.
        threads: CPU threads.
        gpu_layers: Layers on the GPU: a number, `all`, or `auto`, by which the engine decides.
        kv_type: Type of both halves of the key-value cache.
        flash_attention: Flash attention, on or off.
        load_timeout_s: Seconds after which a load has failed, beside those that a slow disk takes.
        cpu_moe_layers: First layers whose experts stay in main memory: a number, `all`, or None.
    """

    context_tokens: int
    parallel: int
    threads: int
    gpu_layers: str | int
    kv_type: str
    flash_attention: bool
    load_timeout_s: float
    cpu_moe_layers: int | str | None = None


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """
    A file to be served.

    Attributes:
        type: Its quant, e.g. "Q4_K_M".
        path: Where it lies.
        sha256: Digest that its record names.
        modelfile: What is laid beside it for Ollama; a llama-server takes nothing of it.
    """

    type: str
    path: Path
    sha256: str
    modelfile: Modelfile


class Loaded(ABC):
    """
    A file that a server has loaded, and that was proven to be the one that was asked for.

    Attributes:
        url: Root of the server, without /api or /v1.
        api: Which of its two dialects requests are to use.
        name: What requests call the model.
        notes: What a reader of the numbers should know.
        llama_server_renders: Whether the llama-server has the model's template; it has not where
            Ollama renders by a template of the Modelfile.
    """

    url: str
    api: Api
    name: str
    notes: tuple[str, ...] = ()
    llama_server_renders: bool = True

    @property
    @abstractmethod
    def served(self) -> Served:
        """The file as the server has it, with the peak of its memory up to now."""

    @abstractmethod
    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        think: bool = False,
    ) -> str:
        """Return the prompt that this engine makes of a conversation, without a BOS text."""

    @abstractmethod
    def render_by_llama_server(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        think: bool = False,
    ) -> str:
        """Return the prompt that the llama-server makes of it: the one below, or the engine."""

    @abstractmethod
    def prompt_tokens(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """Return the length of a conversation's prompt as the server counts it, BOS included."""

    @abstractmethod
    def embed(self, text: str) -> Embedded:
        """
        Return the embedding of a text, by the route that `api` has for it.

        Raises:
            ServingError: The server refuses.
            VectorError: What it gives is no embedding.
        """

    @abstractmethod
    def verify(self) -> None:
        """
        Make sure that what was proven before the first request is still true.

        Raises:
            ServingError: The one below it that says what is not.
        """

    @abstractmethod
    def peak_memory_mib(self) -> float | None:
        """
        Return the most memory that the server and the program below it held up to now, in MiB.

        With layers on a GPU what the driver says that they hold there; else the sum of their
        high-water marks of resident memory (VmHWM). None if it was never seen.
        """

    @abstractmethod
    def as_openai(self) -> Loaded:
        """
        Return the same model behind the OpenAI-compatible route of the same server.

        Ollama loads the model again for it, since that route cannot switch off the shifting of
        the context, which is an option of the llama-server below. From then on this object's
        `verify` fails; `as_openai` of the new one is itself.
        """


class Host(ABC):
    """
    A private place in which one file after the other is served.

    Attributes:
        engine: What serves.
        settings: How.
        environment: Variables that decide how it serves; paths and ports, which do not, left out.
    """

    engine: Engine
    settings: Settings
    environment: dict[str, str]

    @abstractmethod
    def load(self, file: GgufFile) -> AbstractContextManager[Loaded]:
        """
        Serve a file until the block is left; then no program, port or file of it is left.

        Raises:
            DigestError: The file is missing or has other bytes than its record says.
            ParamsError: The model does not have the declared context.
            MachineError: The machine has too little memory; nothing was started.
            LoadFailed: The server cannot load it.
            ServingError: What was loaded is not what was asked for.
        """


@contextmanager
def open_host(
    engine: Engine, settings: Settings, *, model: str, at: Layout, log: Path
) -> Iterator[Host]:
    """
    Hold a private place for servers until the block is left, however that happens.

    What an earlier process left that was killed is swept first. The servers belong to the thread
    that loads: the kernel ends them when it ends.

    Args:
        engine: What serves.
        settings: How.
        model: Key of the model, part of the name under which it is served.
        at: The checkout; the place is below its work/serving.
        log: Gets the whole output of every program.
    """
    with sandbox.opened(at) as place:
        if engine.ollama is not None:
            from pipelines.serving.ollama import OllamaHost  # noqa: PLC0415 - it imports us

            yield OllamaHost(engine, engine.ollama, settings, model=model, place=place, log=log)
        else:
            from pipelines.serving.llama_server import LlamaServerHost  # noqa: PLC0415 - the same

            yield LlamaServerHost(engine, settings, model=model, place=place, log=log)


# --- before anything is started ---------------------------------------------------------------


@dataclass(frozen=True)
class Bytes:
    """Which bytes a path has: the digest that was read, and what tells a later change."""

    path: Path
    sha256: str
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path, sha256: str) -> Self:
        """Note a file whose digest was just read."""
        stat = path.stat()
        return cls(path, sha256, stat.st_size, stat.st_mtime_ns)

    def require_unchanged(self) -> None:
        """
        Make sure that nobody wrote to the file since; the server's copy is the same file.

        Raises:
            WrongDigest: It has another size or time, or is gone.
        """
        with contextlib.suppress(OSError):
            now = self.path.stat()
            if (now.st_size, now.st_mtime_ns) == (self.size_bytes, self.mtime_ns):
                return
        raise WrongDigest(
            f"{self.path.name} changed while it was served: what answered is unknown."
        )


def prove(file: GgufFile) -> Bytes:
    """
    Read all of a file and make sure that it is the one that its record names.

    Raises:
        DigestError: It is missing or has other bytes.
    """
    try:
        stat = file.path.stat()
        with file.path.open("rb") as opened, console.Progress(f"read {file.path.name}"):
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        raise DigestError(f"{file.path} does not exist.", hint="fleet repro") from None
    if found != file.sha256:
        raise DigestError(
            f"{file.path} is not the file of its record: its sha256 is {found}, recorded is "
            f"{file.sha256}.",
            hint="Remove it and run `fleet repro`: it is made or fetched again.",
        )
    return Bytes(file.path, found, stat.st_size, stat.st_mtime_ns)


def read_header(file: GgufFile, settings: Settings) -> gguf_header.Header:
    """
    Read what a file promises, and hold the declared context against it.

    Raises:
        DigestError: It is no whole GGUF, and not the file of its record either.
        LoadFailed: It is the file of its record, and that is no whole GGUF.
        ParamsError: The context is larger than the one it was trained with, or is one that
            llama.cpp would round up.
    """
    try:
        header = gguf_header.read(file.path)
        trained = header.integer(f"{header.text('general.architecture')}.context_length")
    except gguf_header.GgufError as error:
        prove(file)
        raise LoadFailed(error.message, hint=error.hint) from error
    wanted = settings.context_tokens
    if wanted > trained:
        raise ParamsError(
            f"{file.path.name} was trained with a context of {trained:,} tokens; declared are "
            f"{wanted:,}, which Ollama would silently cut.",
            hint=f"Set context_tokens of the model to {trained:,} or less in params.yaml.",
        )
    if wanted % CONTEXT_STEP:
        rounded = wanted - wanted % CONTEXT_STEP + CONTEXT_STEP
        raise ParamsError(
            f"a context of {wanted:,} tokens is served as {rounded:,}: llama.cpp rounds it up to a "
            f"multiple of {CONTEXT_STEP}, and what Ollama says of it would not be true.",
            hint=f"Set context_tokens of the model to a multiple of {CONTEXT_STEP}.",
        )
    return header


def of_experts(settings: Settings, header: gguf_header.Header) -> Settings:
    """
    Replace `all` layers whose experts stay in main memory by the number that a file has.

    Raises:
        ParamsError: It has no experts, or not in so many layers.
    """
    found = architectures.cpu_moe_layers(header, settings.cpu_moe_layers)
    return replace(settings, cpu_moe_layers=found or None)


def execution(settings: Settings, backend: str, *, is_encoder: bool = False) -> Execution:
    """
    Return how llama.cpp is to run the model; no layers on a GPU that the build does not have.

    An encoder reads a text in one piece, so its batches are as long as its context.

    Args:
        settings: Resolved by `of_experts`.
        backend: What the toolchain was built for.
        is_encoder: Whether it makes embeddings.
    """
    experts = settings.cpu_moe_layers or 0
    assert isinstance(experts, int), "resolved by `of_experts`"
    layers = settings.gpu_layers if isinstance(settings.gpu_layers, int) else _ALL_LAYERS
    return Execution(
        threads=settings.threads,
        gpu_layers=0 if backend == "cpu" else layers,
        flash_attention=settings.flash_attention,
        kv_type=settings.kv_type,
        batch_tokens=settings.context_tokens if is_encoder else BATCH_TOKENS,
        ubatch_tokens=settings.context_tokens if is_encoder else UBATCH_TOKENS,
        cpu_moe_layers=experts,
    )


def layers_word(settings: Settings, backend: str) -> str:
    """Spell the layers on the GPU as llama-server takes them: a number, `all` or `auto`."""
    return "0" if backend == "cpu" else str(settings.gpu_layers)


def load_within_s(file: GgufFile, settings: Settings) -> float:
    """Return the seconds after which a load has failed: a slow disk is no fault of a large file."""
    return settings.load_timeout_s + file.path.stat().st_size / _SLOWEST_READ_BYTES_PER_S


def wants_whole(settings: Settings, tools: Toolchain) -> bool:
    """
    Tell whether all layers have to lie on a GPU: the toolchain is for one, no number is declared.

    Whether a card is seen does not matter: one that its driver has lost, or that NVML does not
    know, would leave all layers on the CPU without a word.
    """
    return tools.backend != "cpu" and not isinstance(settings.gpu_layers, int)


def uses_gpu(settings: Settings, tools: Toolchain) -> bool:
    """Tell whether layers are to lie on a card that is there."""
    return layers_word(settings, tools.backend) != "0" and bool(gpu.cards())


def available_mib() -> float:
    """Return the main memory that a new program may take: free, or freed at once, in MiB."""
    import psutil  # noqa: PLC0415 - not at CLI start

    return min(psutil.virtual_memory().available, machine.usable_memory_bytes()) / MIB


def vram_mib() -> float:
    """Return what is free on all cards together, in MiB: another server may be on them."""
    return gpu.free_mib()


def require_memory(file: GgufFile, settings: Settings, tools: Toolchain, *, log: Path) -> None:
    """
    Refuse to load what this machine cannot hold, by llama.cpp's own plan for it.

    The plan is for weights, the cache of all slots and working space; a margin is added for the
    server. What counts is what is available now, in main memory and on the cards.

    Raises:
        MachineError: Too little; says how much is needed, of what, and how much there is.
    """
    on_card = uses_gpu(settings, tools)
    needed = _planned_mib(file, settings, tools, on_card=on_card, log=log)
    rooms = {True: (vram_mib(), "free on the GPUs"), False: (available_mib(), "available")}
    if settings.gpu_layers == "auto" and on_card:
        # The engine puts on the cards what fits there, and the rest beside it.
        room = sum(amount for amount, _ in rooms.values())
        _require(file, settings, sum(needed.values()), room, "available on GPUs and beside them")
        return
    for where, amount in needed.items():
        _require(file, settings, amount, *rooms[where])


def _planned_mib(
    file: GgufFile, settings: Settings, tools: Toolchain, *, on_card: bool, log: Path
) -> dict[bool, float]:
    """
    Return {on the GPU or not: MiB} that llama-fit-params plans for, of which the header is read.

    A file for which it cannot plan needs at least its own size; why the server cannot load it
    either, if it cannot, is for the server to say.
    """
    argv = llama_fit_params.estimate_argv(
        tools,
        str(file.path),
        context_tokens=settings.context_tokens * settings.parallel,
        execution=execution(settings, tools.backend),
    )
    try:
        done = proc.run(argv, log=log, env=llamacpp.environment(tools), inherit_env=False)
        return {
            where: llama_fit_params.parse_estimate(
                done.stdout, done.stderr, on_gpu=where, log=log
            ).total_mib
            for where in ((True, False) if on_card else (False,))
        }
    except ToolError:
        return {on_card: file.path.stat().st_size / MIB}


def _require(
    file: GgufFile, settings: Settings, needed_mib: float, room_mib: float, what: str
) -> None:
    if needed_mib + MARGIN_MIB <= room_mib:
        return
    slots = f"{settings.parallel} x " if settings.parallel > 1 else ""
    raise MachineError(
        f"the machine is too small for {file.path.name}: with a context of {slots}"
        f"{settings.context_tokens:,} tokens it needs {needed_mib:,.0f} MiB and {MARGIN_MIB} MiB "
        f"beside it, and {room_mib:,.0f} MiB are {what}. Nothing was loaded.",
        hint="Serve a smaller quant, a smaller context, fewer slots, or a smaller kv_type; or stop "
        "what else uses the memory.",
    )


# --- a running server -------------------------------------------------------------------------


class Client:
    """A few questions to a server on the loopback interface; no proxy of ours is between."""

    def __init__(self, program: str, port: int) -> None:
        """Ask `program`, as messages call it, on a port."""
        import requests  # noqa: PLC0415 - 0.1 s

        self._program = program
        self._session = requests.Session()
        self._session.trust_env = False
        # Between two questions minutes may pass, in which a server closes a kept connection.
        self._session.headers["Connection"] = "close"
        self.url = f"http://{sandbox.HOST}:{port}"

    def get(self, path: str, *, timeout_s: float = ANSWER_WITHIN_S) -> dict[str, Any]:
        """GET a JSON object; see `post`."""
        return self._ask("GET", path, None, timeout_s)

    def post(
        self, path: str, body: Mapping[str, Any], *, timeout_s: float = ANSWER_WITHIN_S
    ) -> dict[str, Any]:
        """
        POST a JSON object and return the one that comes back.

        Raises:
            ServerGone: No answer.
            ServingError: An error status, with the server's own words, or no JSON.
        """
        return self._ask("POST", path, body, timeout_s)

    def is_up(self, path: str) -> bool:
        """Tell whether a path answers with success at this moment."""
        import requests  # noqa: PLC0415 - loaded before

        try:
            answer = self._session.get(self.url + path, timeout=1.0)
        except requests.RequestException:
            return False
        return answer.ok

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> dict[str, Any]:
        import requests  # noqa: PLC0415 - loaded before

        try:
            answer = self._session.request(method, self.url + path, json=body, timeout=timeout_s)
            told = answer.json()
        except requests.JSONDecodeError as error:
            raise ServingError(f"{self._program} answered {path} with no JSON.") from error
        except requests.Timeout as error:
            raise ServerGone(
                f"{self._program} did not answer {path} within {timeout_s:.0f} s."
            ) from error
        except requests.RequestException as error:
            raise ServerGone(f"{self._program} no longer answers ({path}).") from error
        if not isinstance(told, dict):
            raise ServingError(f"{self._program} answered {path} with no JSON object.")
        if answer.status_code >= _HTTP_ERROR or "error" in told:
            raise ServingError(
                f"{self._program} refused {path} with status {answer.status_code}: "
                f"{_error_text(told)}"
            )
        return told


def _error_text(told: Mapping[str, Any]) -> str:
    """Find the words of an error: text in Ollama's dialect, an object in OpenAI's."""
    error = told.get("error", told)
    if isinstance(error, dict):
        error = error.get("message", error)
    return console.clean(str(error))[:_SAID_CHARACTERS]


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that is up: its program, how to ask it, and what its processes use."""

    program: str
    process: proc.Background
    client: Client
    port: int
    memory: Memory

    def require_alive(self, *, dying_s: float = 0.0) -> None:
        """
        Make sure that the program still runs.

        Args:
            dying_s: How long to look: the port of a program that is killed closes a moment before
                it has ended.

        Raises:
            ServerGone: It ended; says how, with its last words.
        """
        deadline = time.monotonic() + dying_s
        while (how := self.process.ended()) is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if how is not None:
            raise ServerGone(
                f"{self.program} {how}.\n{self.process.last_lines()}".rstrip(),
                log=self.process.log,
            )


class Memory:
    """What the processes of one server use, from its start to now."""

    def __init__(self, process: proc.Background, *, on_card: bool) -> None:
        """Prepare to watch a server and all that it starts."""
        self._server = _Processes(lambda: {process.pid})
        self._below = _Processes(lambda: watch.descendants(process.pid))
        self._cards = gpu.Watch(lambda: {process.pid, *watch.descendants(process.pid)})
        self._on_card = on_card

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Read while the block runs."""
        with self._server, self._below, self._cards if self._on_card else ExitStack():
            yield

    def peak_mib(self) -> float | None:
        """Return the peak up to now; see `Loaded.peak_memory_mib`."""
        if self._on_card and self._cards.sees_cards:
            self._cards.sample()
            mib = self._cards.observation().peak_mib
        else:
            self._server.sample()
            self._below.sample()
            parts = (self._server.usage(), self._below.usage())
            mib = sum(part.peak_rss_bytes for part in parts) / MIB
        return round(mib, 3) if mib > 0 else None


class _Processes(watch.Watch):
    """Watches the processes that a function names, whatever they are called."""

    def __init__(self, pids: Callable[[], set[int]]) -> None:
        super().__init__("")
        self._pids_now = pids

    def pids(self) -> set[int]:
        return self._pids_now()


@contextmanager
def running(  # noqa: PLR0913 - each is one independent fact about a server
    program: str,
    argv: Callable[[int], Sequence[str | Path]],
    *,
    env: Callable[[int], Mapping[str, str]],
    cwd: Path,
    log: Path,
    on_card: bool,
    is_bind_failure: Callable[[str], bool],
    ready: Callable[[Running], None],
) -> Iterator[Running]:
    """
    Start a server on a free port, wait until it is ready, and end it with the block.

    Args:
        program: What messages call it.
        argv: Its command line, by the port.
        env: All of its environment besides PATH, by the port.
        cwd: Its working directory.
        log: Gets all of its output.
        on_card: Whether to ask the GPU's driver for its memory.
        is_bind_failure: Tells from what it printed whether its port was taken.
        ready: Returns when it serves, or raises.

    Raises:
        ServerGone: Ports were taken again and again.
        Exception: What `ready` raised.
    """
    for _ in range(_PORTS_TRIED):
        port = sandbox.free_port()
        with ExitStack() as stack:
            process = stack.enter_context(
                proc.background(argv(port), log=log, cwd=cwd, env=env(port), inherit_env=False)
            )
            memory = Memory(process, on_card=on_card)
            stack.enter_context(memory.watched())
            server = Running(
                program=program,
                process=process,
                client=Client(program, port),
                port=port,
                memory=memory,
            )
            try:
                ready(server)
            except ServerGone:
                if not is_bind_failure(process.output()):
                    raise
                continue
            yield server
            return
    raise ServerGone(
        f"{program} found its port taken {_PORTS_TRIED} times in a row.",
        hint="Something on this machine takes every free port; see what listens: ss -ltnp",
        log=log,
    )


def wait_until(
    server: Running, is_ready: Callable[[], bool], *, within_s: float, what: str
) -> None:
    """
    Wait until the server is ready, on a port that it holds itself, and say so after a while.

    Raises:
        ServerGone: It ended.
        LoadFailed: It was not ready in time.
    """
    deadline = time.monotonic() + within_s
    with console.Progress(what) as progress:
        while not (is_ready() and sandbox.listens(server.process.pid, server.port)):
            server.require_alive()
            if time.monotonic() > deadline:
                raise LoadFailed(
                    f"{server.program} was not ready within {within_s:.0f} s ({what}).\n"
                    f"{server.process.last_lines()}".rstrip(),
                    log=server.process.log,
                )
            progress.update(0)
            time.sleep(_POLL_S)


def while_waiting(
    server: Running, call: Callable[[], dict[str, Any]], *, what: str
) -> dict[str, Any]:
    """
    Ask something that takes long, show that we wait, and see whether the server lives.

    Raises:
        ServerGone: It ended.
        Exception: What `call` raised.
    """
    answers: list[dict[str, Any]] = []
    failures: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(call())
        except Exception as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    # A daemon: a Ctrl-C must not wait for an answer that takes minutes.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    with console.Progress(what) as progress:
        while thread.is_alive():
            thread.join(timeout=0.2)
            progress.update(0)
            if thread.is_alive():
                server.require_alive()
    for failure in failures:
        server.require_alive()
        raise failure
    return answers[0]


def count_of(told: Mapping[str, Any], key: str, program: str) -> int:
    """
    Return a count that an answer must have.

    Raises:
        ServingError: It is missing, zero or no number: Ollama leaves zeros out.
    """
    value = told.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ServingError(f"{program} does not say {key}.")
