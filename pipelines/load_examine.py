"""
One GGUF in a running server: the whole test of a winner, the smoke of another quant.

What is found before something breaks is kept: a record that says where it broke is worth more than
an error. A server that is not what it should be (another digest, another context, gone) makes the
numbers INVALID; a file that cannot be loaded is a failure of that file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final

from pipelines import (
    architectures,
    console,
    corpora,
    degenerate,
    gguf_header,
    golden,
    load_conditions,
    load_embeddings,
    load_gates,
    load_session,
    records,
    regressions,
    wording,
)
from pipelines.errors import MachineError
from pipelines.llama_embeddings import VectorError
from pipelines.load_conditions import Attended
from pipelines.load_records import Smoke, WinnerTest
from pipelines.load_session import NotAnsweredError
from pipelines.serving import server

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.load.dialects import Answer
    from pipelines.load_embeddings import Due
    from pipelines.load_records import (
        Calibration,
        Degenerate,
        EmbeddingCheck,
        Golden,
        LoadGate,
        LoadRun,
        RegressionResult,
        Served,
    )
    from pipelines.load_session import Session
    from pipelines.params import LoadTestSlice, Slo
    from pipelines.prompts import Prompts
    from pipelines.records import Validity
    from pipelines.serving.modelfile import Modelfile
    from pipelines.serving.server import GgufFile, Host, Loaded, Settings
    from pipelines.upstream_chat import Reference

    GreedyAnswers = list[Answer]

# What Ollama samples with where neither Modelfile nor request says (api/types.go, DefaultOptions).
_OLLAMA_TEMPERATURE: Final = 0.8
# The 16-bit GGUF under the name that a type would have: with it greedy answers are compared.
F16: Final = "F16"


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """
    What the tests of one model share.

    Attributes:
        wanted: What is served, how, and the levels to keep.
        at: The checkout.
        prompts: Golden prompts.
        modelfile: Of the model, rendered.
        threads: CPU threads of the server.
    """

    wanted: LoadTestSlice
    at: Layout
    prompts: Prompts
    modelfile: Modelfile
    threads: int

    @property
    def log(self) -> Path:
        """Whole output of every program."""
        return self.at.log("load-test", self.wanted.model)

    @property
    def settings(self) -> Settings:
        """How every file of this model is served."""
        serving = self.wanted.serving
        return server.Settings(
            context_tokens=self.wanted.context_tokens,
            parallel=serving.parallel,
            threads=self.threads,
            gpu_layers=serving.gpu_layers,
            kv_type=serving.kv_type,
            flash_attention=serving.flash_attention,
            load_timeout_s=float(self.wanted.load_test.timeout_seconds),
            cpu_moe_layers=serving.cpu_moe_layers,
        )

    def file(self, type_: str) -> GgufFile:
        """
        Name a quant, or f16, with the digest of its record.

        Raises:
            RecordError: There is no record of it.
        """
        model = self.wanted.model
        if type_ == F16:
            made = records.read(self.at.model_record("convert", model), records.ConvertRecord)
            path, sha256 = self.at.f16(model), made.gguf.sha256
        else:
            key = next(key for key, each in self.wanted.quants.items() if each == type_)
            quantized = records.read(
                self.at.quant_record("quantize", model, type_), records.QuantizeRecord
            )
            path, sha256 = self.at.gguf(model, key), quantized.gguf.sha256
        return server.GgufFile(type=type_, path=path, sha256=sha256, modelfile=self.modelfile)

    @cached_property
    def is_encoder(self) -> bool:
        """Whether the model makes embeddings, and goes on with no text."""
        return architectures.is_encoder(gguf_header.read(self.at.f16(self.wanted.model)))

    def corpus(self) -> str:
        """Return the text of which requests are made."""
        corpora.require(self.wanted.corpus, self.at, "text of the load test's prompts")
        return (self.at.root / self.wanted.corpus.path).read_text(encoding="utf-8")

    def session(self, loaded: Loaded) -> Session:
        """Make ready to drive a loaded model."""
        return load_session.opened(
            url=loaded.url,
            api=loaded.api,
            name=loaded.name,
            declared=self.wanted.load_test,
            slos=self.wanted.slos,
            corpus=self.corpus(),
            context_tokens=self.wanted.context_tokens,
            log=self.log,
            task="embed" if self.is_encoder else "chat",
        )

    def regressions(self, session: Session) -> tuple[RegressionResult, ...]:
        """Ask the declared questions, with the temperature at which the model is served."""
        declared = self.modelfile.parameters.get("temperature")
        temperature = float(declared) if isinstance(declared, int | float) else _OLLAMA_TEMPERATURE
        return regressions.run(
            self.prompts,
            replace(session.target, temperature=temperature),
            model=self.wanted.model,
            log=self.log,
        )

    # --- the whole test -----------------------------------------------------------------------

    def winner(
        self,
        host: Host,
        reference: Reference | None,
        f16: F16Answers,
        type_: str,
        hosts: tuple[str, ...],
    ) -> WinnerTest:
        """
        Test the quant that `hosts` chose.

        Args:
            host: Where it is served.
            reference: What upstream renders; None of an encoder, which has no template.
            f16: Answers to compare with; an encoder gives none.
            type_: The quant.
            hosts: Those that chose it.
        """
        console.step(f"load test of {type_}")
        seen = Findings()
        try:
            # Before the engine has the memory.
            due = self._embeddings_due(host, type_)
            with host.load(self.file(type_)) as loaded:
                seen.served = loaded.served
                seen.notes += loaded.notes
                self._compare(loaded, reference, due, seen)
                self._examine(loaded, seen)
        except server.LoadFailed as error:
            seen.failures.append(error.message)
        except server.ServingError as error:
            seen.invalid.append(error.message)
        if seen.answers and not seen.invalid:
            declared = self.wanted.load_test
            seen.degenerate = degenerate.compare(
                seen.answers,
                f16.get(),
                declared.max_degenerate_excess,
                limit_tokens=declared.generate_tokens,
            )
        gates = self._gates(seen, hosts)
        seen.invalid += load_conditions.disbelieved(gates, seen.validity)
        return WinnerTest(
            type=type_,
            hosts=hosts,
            served=seen.served,
            golden=seen.golden,
            runs=tuple(seen.runs),
            calibration=seen.calibration,
            degenerate=seen.degenerate,
            regressions=seen.regressions,
            gates=gates,
            failures=tuple(map(wording.clause, seen.failures)),
            invalid=tuple(map(wording.clause, seen.invalid)),
            notes=tuple(seen.notes),
            validity=seen.validity,
            embeddings=seen.embeddings,
        )

    def _embeddings_due(self, host: Host, type_: str) -> Due | None:
        """Let the toolchain embed a few texts with an encoder."""
        if not self.is_encoder:
            return None
        return load_embeddings.by_toolchain(
            self.file(type_), self.corpus(), self.settings, host.engine.tools, log=self.log
        )

    def _compare(
        self, loaded: Loaded, reference: Reference | None, due: Due | None, seen: Findings
    ) -> None:
        """Hold what the engine makes of a text against upstream, or against the toolchain."""
        if reference is not None:
            seen.golden = golden.check(reference, self.prompts, loaded)
        if due is None:
            return
        try:
            seen.embeddings = load_embeddings.check(due, loaded)
        except VectorError as error:
            seen.failures.append(error.message)
        else:
            if seen.embeddings.outcome == "FAIL":
                seen.failures.append(seen.embeddings.sentence)
        slos = self.wanted.slos.values()
        if any(slo.ttft_ms is not None or slo.tpot_ms is not None for slo in slos):
            seen.notes.append(
                "an embedding comes in one piece: levels on the first token and on further ones "
                "were not judged"
            )

    def _examine(self, loaded: Loaded, seen: Findings) -> None:
        """Ask, drive, watch."""
        try:
            session = self.session(loaded)
        except NotAnsweredError as error:
            loaded.verify()
            seen.failures.append(error.message)
            return
        if not self.is_encoder:
            seen.answers = session.greedy_answers(loaded.served.type)
            seen.regressions = self.regressions(session)
        with Attended() as attended:
            session.drive(seen.runs, loaded.verify)
        seen.served = loaded.served.model_copy(update={"peak_memory_mib": loaded.peak_memory_mib()})
        seen.calibration = session.calibrate(seen.runs)
        self._doubt(seen, attended)

    def _doubt(self, seen: Findings, attended: Attended) -> None:
        """Collect why the numbers of these runs are not to be trusted."""
        seen.validity = load_conditions.judge(
            attended, threads=self.threads, on_gpu=seen.served_on_gpu(attended)
        )
        seen.invalid += seen.validity.reasons
        seen.notes += seen.validity.notes
        if seen.calibration is not None and seen.calibration.client_bound:
            seen.invalid.append(seen.calibration.reason)
        if seen.served is not None and seen.served.peak_memory_mib is None:
            seen.invalid.append("the memory of the server could not be seen")
        if not any(run.kind == "open" for run in seen.runs):
            seen.failures.append("it answered no request of the ladder")
        elif load_gates.judged_run(seen.runs) is None:
            seen.invalid.append(load_gates.NOTHING_ARRIVED)

    def _gates(self, seen: Findings, hosts: tuple[str, ...]) -> tuple[LoadGate, ...]:
        judged = load_gates.judged_run(seen.runs)
        if judged is None or seen.served is None:
            return ()
        return tuple(
            gate
            for host in hosts
            for gate in load_gates.judge(
                judged,
                self._levels(host),
                host,
                self.wanted.hosts[host],
                peak_memory_mib=seen.served.peak_memory_mib,
            )
        )

    def _levels(self, host: str) -> Slo:
        slo = self.wanted.slos[host]
        return load_session.of_embeddings(slo) if self.is_encoder else slo

    # --- the smoke ----------------------------------------------------------------------------

    def smoke(self, host: Host, reference: Reference | None, type_: str) -> Smoke:
        """Load a quant, compare one prompt or a few embeddings, send a few requests."""
        console.step(f"smoke of {type_}")
        one = self.prompts.model_copy(update={"conversations": self.prompts.conversations[:1]})
        served: Served | None = None
        run: LoadRun | None = None
        wrong: list[str] = []
        try:
            due = self._embeddings_due(host, type_)
            with host.load(self.file(type_)) as loaded:
                served = loaded.served
                if reference is not None:
                    objection = golden.objection(golden.check(reference, one, loaded))
                    wrong += [objection] if objection else []
                if due is not None:
                    checked = load_embeddings.check(due, loaded)
                    wrong += [checked.sentence] if checked.outcome == "FAIL" else []
                run = self.session(loaded).smoke(type_)
                loaded.verify()
        except (server.ServingError, NotAnsweredError, VectorError) as error:
            wrong.append(error.message)
        if run is not None and run.ok_count < run.requests_count:
            errors = ", ".join(f"{name} {count}" for name, count in run.errors.items())
            wrong.append(f"{run.requests_count - run.ok_count} requests failed: {errors}")
        sent, ok = (run.requests_count, run.ok_count) if run else (0, 0)
        return Smoke(
            served=served,
            type=type_,
            requests_count=sent,
            ok_count=ok,
            outcome="FAIL" if wrong else "PASS",
            sentence="; ".join(map(wording.clause, wrong))
            or f"loaded, {'embeds' if self.is_encoder else 'prompted'} right, {ok} of {sent} "
            "requests answered",
        )


@dataclass(kw_only=True)
class Findings:
    """What has been found of one winner so far."""

    served: Served | None = None
    golden: Golden | None = None
    embeddings: EmbeddingCheck | None = None
    answers: GreedyAnswers = field(default_factory=list)
    runs: list[LoadRun] = field(default_factory=list)
    calibration: Calibration | None = None
    degenerate: Degenerate | None = None
    regressions: tuple[RegressionResult, ...] = ()
    failures: list[str] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    validity: Validity | None = None

    def served_on_gpu(self, attended: Attended) -> bool:
        """Tell whether any of the model lay on a card: as the server says, else as was seen."""
        if self.served is not None and self.served.size_vram_bytes is not None:
            return self.served.size_vram_bytes > 0
        return attended.cards is not None and attended.cards.attributed


class F16Answers:
    """The greedy answers of f16, asked for once, when the first quant has been unloaded."""

    def __init__(self, examiner: Examiner, host: Host) -> None:
        """Prepare; nothing is served yet."""
        self._examiner = examiner
        self._host = host
        self._answers: GreedyAnswers | None = None
        self._asked = False

    def get(self) -> GreedyAnswers | None:
        """Return them; None where this machine cannot hold f16."""
        if self._asked:
            return self._answers
        self._asked = True
        try:
            with self._host.load(self._examiner.file(F16)) as loaded:
                self._answers = self._examiner.session(loaded).greedy_answers(F16)
        except (MachineError, server.ServingError, NotAnsweredError) as error:
            console.warn(f"f16 is not served here, so loops are not compared: {error.message}")
        return self._answers
