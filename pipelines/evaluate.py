"""
The stage `evaluate`: the declared tasks, done by f16 and by every quant, and paired item by item.

    multiple-choice   log-likelihoods by the toolchain's libraries (`pipelines.evals_scorer`)
    the other kinds   answers of the toolchain's llama-server, greedy (`pipelines.evals_answers`)

f16 and quants are asked in the same way, one after the other. What one file makes of one set
depends on both, on the build of llama.cpp and on a few settings. It is kept under the digest of all
of these in scratch, so that a kill, another quant or another set repeats nothing; a file there that
is damaged is no result, and is made again. On a CPU equal inputs give equal records.

Nothing is timed here, so other work beside it does no harm. It would do harm to what is timed, and
waits until nothing is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field, ValidationError

from pipelines import (
    architectures,
    atomic,
    console,
    evals,
    evals_answers,
    evals_judge,
    evals_likelihood,
    gguf_header,
    machine,
    measuring,
    records,
)
from pipelines.errors import MachineError, ParamsError
from pipelines.evaluate_records import EvaluateRecord
from pipelines.params import Serving
from pipelines.records import Part
from pipelines.serving import engine as engines
from pipelines.serving import server
from pipelines.serving.modelfile import Modelfile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pipelines.evals import EvalSet
    from pipelines.layout import Layout
    from pipelines.params import EvaluateSlice
    from pipelines.records import FileDigest
    from pipelines.serving.server import GgufFile, Settings
    from pipelines.toolchain import Toolchain

F16: Final = "F16"
# Raised when the same file would answer the same set otherwise: results of before are then no more.
_METHOD: Final = 1
_ALL_LAYERS: Final = 9999


def run(slice_: EvaluateSlice, at: Layout) -> EvaluateRecord:
    """Do the tasks with the fleet's own toolchain, while nobody measures on this machine."""
    from pipelines import toolchain  # noqa: PLC0415 - not for tests of the rest

    tools = toolchain.load(at)
    with measuring.one_at_a_time(toolchain.default_cache_root(), f"evaluate {slice_.model}"):
        return evaluate(slice_, at, tools)


def evaluate(wanted: EvaluateSlice, at: Layout, tools: Toolchain) -> EvaluateRecord:
    """
    Do every declared set with f16 and every quant, and judge the pairs.

    Raises:
        RecordError: There is no record of f16 or of a quant.
        ParamsError: A set is wrong, does not fit the context, or the model is an encoder.
        DigestError: A set or a GGUF has other bytes than declared or recorded.
        MachineError: This machine cannot hold the model.
        ToolError: A tool failed, or answered what cannot be trusted.
    """
    convert = records.read(at.model_record("convert", wanted.model), records.ConvertRecord)
    sets = [evals.read(name, declared, at.root) for name, declared in wanted.evals.items()]
    if sets:
        _require_decoder(at.f16(wanted.model), wanted)
        files = [
            _File("f16", F16, at.f16(wanted.model), convert.gguf),
            *(_quant_file(wanted, at, key) for key in wanted.quants),
        ]
        outcomes = _Asker(wanted, at, tools).ask(files, sets)
    else:
        console.info(f"{wanted.model}: no evals are declared.")
        files, outcomes = [], {}
    results = tuple(
        evals_judge.of_set(
            set_,
            outcomes["f16", set_.name],
            [
                (file.key, file.type, file.digest.sha256, outcomes[file.key, set_.name])
                for file in files[1:]
            ],
            wanted.evaluate,
        )
        for set_ in sets
    )
    for result in results:
        tell = console.warn if result.is_void else console.info
        tell(f"{wanted.model} on {result.name}: {result.sentence}")
        for quant in result.quants:
            tell = console.warn if quant.outcome == "HARM" else console.info
            tell(f"  {quant.type} {quant.outcome}: {quant.sentence}")
    return EvaluateRecord(
        model=wanted.model,
        f16_sha256=convert.gguf.sha256,
        llama_cpp_commit=tools.commit,
        recipe=wanted.recipe,
        alpha=wanted.evaluate.alpha,
        canary_margin=wanted.evaluate.canary_margin,
        sets=results,
    )


@dataclass(frozen=True)
class _File:
    """One GGUF that does the tasks: `f16`, or the key of a quant."""

    key: str
    type: str
    path: Path
    digest: FileDigest


def _quant_file(wanted: EvaluateSlice, at: Layout, key: str) -> _File:
    type_ = wanted.quants[key]
    made = records.read(at.quant_record("quantize", wanted.model, type_), records.QuantizeRecord)
    return _File(key, type_, at.gguf(wanted.model, key), made.gguf)


def _require_decoder(f16: Path, wanted: EvaluateSlice) -> None:
    """
    Refuse tasks for a model that makes vectors.

    Raises:
        ParamsError: It does.
    """
    if architectures.is_encoder(gguf_header.read(f16)):
        raise ParamsError(
            f"{wanted.model} is an encoder: it answers nothing, so it can do none of its evals "
            f"({', '.join(wanted.evals)}).",
            hint=f"Remove `evals` of {wanted.model} from params.yaml; gates.min_cosine_mean judges "
            "its quants.",
        )


# --- what is kept -----------------------------------------------------------------------------


class Kept(Part):
    """
    What one file made of one set, as it lies in scratch.

    `answers` is for people: what was said, or the log-likelihoods. `digest` is that of the rest.
    """

    inputs: dict[str, str | int]
    outcomes: str = Field(pattern="^[01]*$")
    answers: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, inputs: dict[str, str | int], rights: Sequence[tuple[bool, str]]) -> Kept:
        """Put together what was found, item by item: whether it is right, and what was said."""
        outcomes = "".join("1" if right else "0" for right, _ in rights)
        answers = tuple(answer for _, answer in rights)
        return cls(
            inputs=inputs,
            outcomes=outcomes,
            answers=answers,
            digest=_digest([inputs, outcomes, answers]),
        )

    def is_of(self, inputs: dict[str, str | int], count: int) -> bool:
        """Tell whether it is whole, and of these inputs and so many items."""
        return (
            self.inputs == inputs
            and len(self.outcomes) == len(self.answers) == count
            and self.digest == _digest([inputs, self.outcomes, self.answers])
        )


def _digest(value: Any) -> str:  # noqa: ANN401 - any JSON value
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _Asker:
    """Asks one file after the other what is not known yet."""

    def __init__(self, wanted: EvaluateSlice, at: Layout, tools: Toolchain) -> None:
        self._wanted = wanted
        self._at = at
        self._tools = tools
        self._log = at.log("evaluate", wanted.model)
        self._folder = at.scratch(wanted.model) / "evals"

    def ask(self, files: Sequence[_File], sets: Sequence[EvalSet]) -> dict[tuple[str, str], str]:
        """Return the outcomes by key of the file and name of the set."""
        found: dict[tuple[str, str], str] = {}
        for file in files:
            missing = []
            for set_ in sets:
                kept = self._kept(file, set_)
                if kept is None:
                    missing.append(set_)
                else:
                    found[file.key, set_.name] = kept.outcomes
            for set_, kept in self._answered(file, missing):
                atomic.write_json(self._place(kept.inputs), json.loads(kept.model_dump_json()))
                found[file.key, set_.name] = kept.outcomes
        return found

    def _inputs(self, file: _File, set_: EvalSet) -> dict[str, str | int]:
        """Name everything that decides what a file makes of a set."""
        return {
            "method": _METHOD,
            "gguf": file.digest.sha256,
            "set": set_.declared.sha256,
            "kind": set_.declared.kind,
            # Commit, flags, backend and compiler.
            "toolchain": self._tools.prefix.name,
            "llama_cpp_commit": self._tools.commit,
            "recipe": self._wanted.recipe,
            "context_tokens": self._wanted.context_tokens,
            "generate_tokens": self._wanted.evaluate.generate_tokens,
        }

    def _place(self, inputs: dict[str, str | int]) -> Path:
        return self._folder / f"{_digest(inputs)}.json"

    def _kept(self, file: _File, set_: EvalSet) -> Kept | None:
        inputs = self._inputs(file, set_)
        with contextlib.suppress(OSError, UnicodeDecodeError, ValidationError):
            kept = Kept.model_validate_json(self._place(inputs).read_text(encoding="utf-8"))
            if kept.is_of(inputs, len(set_.items)):
                return kept
        return None

    # --- one file -----------------------------------------------------------------------------

    def _answered(self, file: _File, sets: Sequence[EvalSet]) -> Iterator[tuple[EvalSet, Kept]]:
        """Yield what a file makes of each set, as soon as it is known."""
        if not sets:
            return
        measuring.prove(file.path, file.digest)
        settings = self._settings(file)
        chosen = [set_ for set_ in sets if set_.declared.kind == "multiple-choice"]
        spoken = [set_ for set_ in sets if set_.declared.kind != "multiple-choice"]
        for set_ in chosen:
            with self._progress(file, set_) as progress:
                rights = evals_likelihood.rights(
                    set_,
                    file.path,
                    settings,
                    tools=self._tools,
                    scratch=self._folder,
                    log=self._log,
                    on_item=progress.update,
                )
            yield set_, Kept.of(self._inputs(file, set_), rights)
        if not spoken:
            return
        with ExitStack() as stack:
            loaded = stack.enter_context(self._host(stack, settings).load(self._served(file)))
            for set_ in spoken:
                with self._progress(file, set_) as progress:
                    rights = evals_answers.rights(
                        set_,
                        loaded.url,
                        loaded.name,
                        self._wanted.evaluate,
                        log=self._log,
                        on_item=progress.update,
                    )
                loaded.verify()
                yield set_, Kept.of(self._inputs(file, set_), rights)

    def _progress(self, file: _File, set_: EvalSet) -> console.Progress:
        label = f"evaluate {self._wanted.model}: {file.type} on {set_.name}"
        return console.Progress(label, total=len(set_.items), unit="items")

    def _host(self, stack: ExitStack, settings: Settings) -> server.Host:
        engine = engines.find(Serving(engine="llama-server"), self._tools, log=self._log)
        return stack.enter_context(
            server.open_host(engine, settings, model=self._wanted.model, at=self._at, log=self._log)
        )

    def _served(self, file: _File) -> GgufFile:
        # A Modelfile is Ollama's: what it says of sampling and of the system is not tested here.
        return server.GgufFile(
            type=file.type,
            path=file.path,
            sha256=file.digest.sha256,
            modelfile=Modelfile(version=1),
        )

    def _settings(self, file: _File) -> Settings:
        """
        Say how a file is run: one request at a time, whole on the GPU, or else whole beside it.

        A number of layers, since `auto` would have them placed by what happens to be free.

        Raises:
            MachineError: It fits neither there nor into main memory.
        """
        settings = server.Settings(
            context_tokens=self._wanted.context_tokens,
            parallel=1,
            threads=self._wanted.threads or machine.usable_cores(),
            gpu_layers=0 if self._tools.backend == "cpu" else _ALL_LAYERS,
            kv_type="f16",
            flash_attention=False,
            load_timeout_s=float(self._wanted.evaluate.timeout_seconds),
        )
        served = self._served(file)
        try:
            server.require_memory(served, settings, self._tools, log=self._log)
        except MachineError as error:
            if not settings.gpu_layers:
                raise
            console.info(f"{file.path.name} does its tasks on the CPU: {error.message}")
            settings = replace(settings, gpu_layers=0)
            server.require_memory(served, settings, self._tools, log=self._log)
        return settings
