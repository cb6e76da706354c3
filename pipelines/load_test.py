"""
The chosen quant of one model in a real server, byte for byte the file that was measured.

For each quant that a host chose: served alone from a private server, its rendering of the golden
prompts compared with the upstream template's, driven up a ladder of concurrencies and by random
arrivals, its greedy answers compared with those of f16, and judged by the service levels of the
hosts that chose it. Every other quant that passed its gates gets a smoke: load, one golden prompt,
a few requests.

What is wrong with a quant or its server is data (REJECT, or INVALID where the numbers themselves
are not to be trusted), and the record is written. What is wrong with this machine, no engine, no
compiler, a declaration that cannot be served, is an error and leaves no record.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from pipelines import (
    console,
    corpora,
    degenerate,
    golden,
    load_gates,
    measuring,
    prompts,
    records,
    upstream_chat,
    validity,
    watch,
    wording,
)
from pipelines.errors import FleetError, MachineError
from pipelines.load import generator, measures, plan
from pipelines.load_records import (
    Degenerate,
    LoadTestRecord,
    LoadVerdict,
    Smoke,
    WinnerTest,
)
from pipelines.load_session import Session
from pipelines.serving import engine as engines
from pipelines.serving import modelfile, server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.load.plan import Target
    from pipelines.load_records import LoadGate, LoadRun, Served
    from pipelines.params import LoadTestSlice
    from pipelines.prompts import Prompts
    from pipelines.records import ChoiceRecord
    from pipelines.serving.engine import Engine
    from pipelines.serving.modelfile import Modelfile
    from pipelines.serving.server import GgufFile, Host, Loaded, Settings
    from pipelines.toolchain import Toolchain
    from pipelines.upstream_chat import Pending, Reference

# The 16-bit GGUF under the name that a type would have: what degenerate answers are compared with.
_F16: Final = "F16"
_PROBE_CHARACTERS: Final = (200, 600)


def run(slice_: LoadTestSlice, at: Layout) -> LoadTestRecord:
    """Serve and load what `choose` has chosen, with the fleet's own toolchain."""
    from pipelines import toolchain  # noqa: PLC0415 - not for tests of the rest

    return load_test(slice_, at, toolchain.load(at), lock=toolchain.default_cache_root())


def load_test(
    wanted: LoadTestSlice, at: Layout, tools: Toolchain, *, lock: Path
) -> LoadTestRecord:
    """
    Test every winner whole and every other passing quant briefly.

    Args:
        wanted: What is served, how, and the levels to keep.
        at: The checkout; its records say which bytes were chosen.
        tools: The llama.cpp that serves, below Ollama too.
        lock: Directory, common to all checkouts of this user, in which machines are locked.

    Raises:
        RecordError: There is no choice yet, or no record of a chosen quant.
        MachineError: No engine can be had, or this machine cannot hold the model.
        ParamsError: The Modelfile or the prompts are wrong.
    """
    choice = records.read(at.model_record("choose", wanted.model), records.ChoiceRecord)
    loaded_prompts = prompts.load(at.root / wanted.load_test.prompts)
    rendered = modelfile.render(
        at.root / wanted.modelfile,
        model=wanted.model,
        context_tokens=wanted.context_tokens,
        license=_license(wanted, at),
    )
    hardware = measuring.this_machine(at)
    started = time.monotonic()
    test = _Test(
        wanted=wanted,
        at=at,
        tools=tools,
        choice=choice,
        prompts=loaded_prompts,
        modelfile=rendered,
        threads=wanted.threads or hardware["cpu"]["cores_count"],
    )
    with measuring.one_at_a_time(lock, f"{wanted.model} under load"):
        engine, winners, smokes = test.everything()
    return LoadTestRecord(
        model=wanted.model,
        context_tokens=wanted.context_tokens,
        engine=engine.id if engine else None,
        machine=measuring.machine_id(hardware, tools),
        modelfile=wanted.modelfile,
        modelfile_sha256=rendered.digest(),
        modelfile_version=rendered.version,
        winners=winners,
        smokes=smokes,
        verdicts=tuple(
            _verdict(host, winners, smokes, declared=engine is not None and engine.id.declared)
            for host in choice.hosts
        ),
        measured_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        wall_s=round(time.monotonic() - started, 3),
    )


def _license(wanted: LoadTestSlice, at: Layout) -> str:
    """Return the licence text that upstream ships, or the name of it, or nothing."""
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (at.source(wanted.model) / name).read_text(encoding="utf-8")
    fetched = records.read(at.model_record("fetch", wanted.model), records.FetchRecord)
    return fetched.license or ""


@dataclass(frozen=True, kw_only=True)
class _Test:
    """What all parts of one test share."""

    wanted: LoadTestSlice
    at: Layout
    tools: Toolchain
    choice: ChoiceRecord
    prompts: Prompts
    modelfile: Modelfile
    threads: int

    @property
    def log(self) -> Path:
        """Whole output of every program."""
        return self.at.log("load-test", self.wanted.model)

    def everything(self) -> tuple[Engine | None, tuple[WinnerTest, ...], tuple[Smoke, ...]]:
        """Test what the choice names; without a winner nothing is started."""
        winners: dict[str, list[str]] = defaultdict(list)
        for host in self.choice.hosts:
            if host.winner is not None:
                winners[host.winner].append(host.host)
        if not winners:
            console.info("nothing was chosen, so nothing is served")
            return None, (), ()
        engine = engines.find(self.wanted.serving, self.tools, log=self.log)
        (console.info if engine.id.declared else console.warn)(engine.id.sentence)
        reference = upstream_chat.start(
            self.at.source(self.wanted.model), self.prompts, log=self.log
        )
        with contextlib.closing(reference), self._host(engine) as host:
            f16 = _F16Answers(self, host)
            tests = tuple(
                self._winner(host, reference, f16, type_, tuple(hosts))
                for type_, hosts in winners.items()
            )
            others = [type_ for type_ in self._passing() if type_ not in winners]
            return engine, tests, tuple(self._smoke(host, reference, type_) for type_ in others)

    def _passing(self) -> list[str]:
        """Types that passed their gates on some host: those that a release may hold."""
        passing = {
            one.type
            for host in self.choice.hosts
            for one in host.candidates
            if one.verdict in {"CHOSEN", "PASS"}
        }
        return [type_ for type_ in self.wanted.quants.values() if type_ in passing]

    @contextmanager
    def _host(self, engine: Engine) -> Iterator[Host]:
        with server.open_host(
            engine, self.settings, model=self.wanted.model, at=self.at, log=self.log
        ) as host:
            yield host

    @property
    def settings(self) -> Settings:
        """How every file of this test is served."""
        serving = self.wanted.serving
        return server.Settings(
            context_tokens=self.wanted.context_tokens,
            parallel=serving.parallel,
            threads=self.threads,
            gpu_layers=serving.gpu_layers,
            kv_type=serving.kv_type,
            flash_attention=serving.flash_attention,
            load_timeout_s=float(self.wanted.load_test.timeout_seconds),
        )

    def file(self, type_: str) -> GgufFile:
        """
        Name a quant with the digest of its record.

        Raises:
            RecordError: There is no record of it.
        """
        model = self.wanted.model
        if type_ == _F16:
            converted = records.read(
                self.at.model_record("convert", model), records.ConvertRecord
            )
            return server.GgufFile(
                type=_F16,
                path=self.at.f16(model),
                sha256=converted.gguf.sha256,
                modelfile=self.modelfile,
            )
        key = next(key for key, declared in self.wanted.quants.items() if declared == type_)
        quantized = records.read(
            self.at.quant_record("quantize", model, type_), records.QuantizeRecord
        )
        return server.GgufFile(
            type=type_,
            path=self.at.gguf(model, key),
            sha256=quantized.gguf.sha256,
            modelfile=self.modelfile,
        )

    # --- the whole test of a winner -----------------------------------------------------------

    def _winner(
        self,
        host: Host,
        reference: Pending,
        f16: _F16Answers,
        type_: str,
        hosts: tuple[str, ...],
    ) -> WinnerTest:
        console.step(f"load test of {type_}")
        seen = _Findings()
        try:
            with host.load(self.file(type_)) as loaded:
                seen.served = loaded.served
                self._examine(loaded, reference, seen)
        except server.LoadFailed as error:
            seen.failures.append(wording.clause(error.message))
        except server.ServingError as error:
            seen.invalid.append(wording.clause(error.message))
        if seen.answers and not seen.invalid:
            seen.degenerate = degenerate.compare(
                seen.answers, f16.get(), self.wanted.load_test.max_degenerate_excess
            )
        return WinnerTest(
            type=type_,
            hosts=hosts,
            served=seen.served,
            golden=seen.golden,
            runs=tuple(seen.runs),
            calibration=seen.calibration,
            degenerate=seen.degenerate,
            gates=self._gates(seen, hosts),
            failures=tuple(seen.failures),
            invalid=tuple(seen.invalid),
            notes=tuple(seen.notes),
        )

    def _examine(self, loaded: Loaded, reference: Pending, seen: _Findings) -> None:
        """Ask, drive, watch; whatever is found before something breaks stays in `seen`."""
        seen.golden = golden.check(reference.result(), self.prompts, loaded)
        seen.answers = self.greedy_answers(loaded)
        session = self._session(loaded)
        before = validity.cpu_times()
        started = time.monotonic()
        with watch.Watch("llama-server") as ours:
            seen.runs += session.ladder()
            loaded.verify()
            rate = session.rate_per_s(tuple(seen.runs))
            if rate > 0:
                seen.runs.append(session.open_loop(rate))
            if rate > 0 and self.wanted.load_test.soak_seconds:
                seen.runs.append(session.soak(rate))
            ours.sample()
        wall_s = time.monotonic() - started
        loaded.verify()
        seen.served = loaded.served.model_copy(
            update={"peak_memory_mib": loaded.peak_memory_mib()}
        )
        seen.calibration = session.calibrate(tuple(seen.runs))
        self._doubt(seen, before, ours, wall_s)

    def _session(self, loaded: Loaded) -> Session:
        corpora.require(self.wanted.corpus, self.at, "prompts of the load test")
        text = (self.at.root / self.wanted.corpus.path).read_text(encoding="utf-8")
        return Session(
            target=self._target(loaded),
            declared=self.wanted.load_test,
            slos=self.wanted.slos,
            corpus=text,
            chars_per_token=chars_per_token(loaded, text),
            log=self.log,
        )

    def _target(self, loaded: Loaded, *, temperature: float | None = None) -> Target:
        declared = self.wanted.load_test
        return plan.Target(
            url=loaded.url,
            api=loaded.api,
            model=loaded.name,
            generate_tokens=declared.generate_tokens,
            timeout_s=float(declared.timeout_seconds),
            temperature=temperature,
            seed=declared.seed,
            context_tokens=self.wanted.context_tokens,
        )

    def greedy_answers(self, loaded: Loaded) -> list[measures.Answer]:
        """Let the model answer the same prompts without chance, one at a time."""
        declared = self.wanted.load_test
        text = (self.at.root / self.wanted.corpus.path).read_text(encoding="utf-8")
        planned = plan.closed(
            "greedy",
            concurrency=1,
            prompts=plan.corpus_prompts(
                text,
                declared.degenerate_prompts,
                prompt_tokens=declared.prompt_tokens,
                chars_per_token=chars_per_token(loaded, text),
                seed=declared.seed,
            ),
            warm_up_requests=0,
            max_run_s=declared.max_run_seconds,
            seed=declared.seed,
        )
        with console.Progress(
            f"greedy answers of {loaded.served.type}", total=declared.degenerate_prompts
        ) as progress:
            raw = generator.run(
                planned, self._target(loaded, temperature=0.0), log=self.log, progress=progress
            )
        return measures.answers(raw)

    def _doubt(
        self, seen: _Findings, before: validity.CpuTimes, ours: watch.Watch, wall_s: float
    ) -> None:
        """Collect why the numbers of these runs are not to be trusted."""
        after = validity.cpu_times()
        usage = ours.usage()
        stolen = validity.steal_share(before, after)
        waiting = validity.waiting_share(usage, wall_s=wall_s, threads=self.threads)
        if stolen > validity.MAX_STEAL_SHARE:
            seen.invalid.append(f"the hypervisor withheld {stolen:.0%} of the CPU time")
        if waiting > validity.MAX_WAITING_SHARE:
            seen.invalid.append(f"the server waited for a core in {waiting:.0%} of the time")
        elif waiting > validity.NOTED_WAITING_SHARE:
            seen.notes.append(f"the server waited for a core in {waiting:.0%} of the time")
        if validity.on_battery():
            seen.invalid.append("the machine ran on its battery")
        if seen.calibration is not None and seen.calibration.client_bound:
            seen.invalid.append(wording.clause(seen.calibration.reason))
        if seen.served is not None and seen.served.peak_memory_mib is None:
            seen.invalid.append("the memory of the server could not be seen")
        if not any(run.kind == "open" for run in seen.runs):
            seen.failures.append("no request of the ladder was answered")

    def _gates(self, seen: _Findings, hosts: tuple[str, ...]) -> tuple[LoadGate, ...]:
        judged = next((run for run in seen.runs if run.kind == "open"), None)
        if judged is None or seen.served is None:
            return ()
        return tuple(
            gate
            for host in hosts
            for gate in load_gates.judge(
                judged,
                self.wanted.slos[host],
                host,
                self.wanted.hosts[host],
                peak_memory_mib=seen.served.peak_memory_mib,
            )
        )

    # --- the smoke of the others ---------------------------------------------------------------

    def _smoke(self, host: Host, reference: Pending, type_: str) -> Smoke:
        console.step(f"smoke of {type_}")
        declared = self.wanted.load_test
        first = self.prompts.model_copy(
            update={"conversations": self.prompts.conversations[:1]}
        )
        served: Served | None = None
        planned: LoadRun | None = None
        try:
            with host.load(self.file(type_)) as loaded:
                served = loaded.served
                checked = golden.check(reference.result(), first, loaded)
                wrong = [one.sentence for one in checked.prompts if one.outcome == "FAIL"]
                text = (self.at.root / self.wanted.corpus.path).read_text(encoding="utf-8")
                requests = plan.closed(
                    f"smoke {type_}",
                    concurrency=1,
                    prompts=plan.corpus_prompts(
                        text,
                        declared.smoke_requests,
                        prompt_tokens=declared.prompt_tokens,
                        chars_per_token=chars_per_token(loaded, text),
                        seed=declared.seed,
                    ),
                    warm_up_requests=0,
                    max_run_s=declared.max_run_seconds,
                    seed=declared.seed,
                )
                raw = generator.run(requests, self._target(loaded), log=self.log, progress=None)
                planned = measures.summarise(requests, raw, {})
                loaded.verify()
        except server.ServingError as error:
            wrong = [wording.clause(error.message)]
        ok = planned.ok_count if planned else 0
        if planned and ok < planned.requests_count:
            errors = ", ".join(f"{name} {count}" for name, count in planned.errors.items())
            wrong.append(f"{planned.requests_count - ok} requests failed ({errors})")
        return Smoke(
            served=served,
            type=type_,
            requests_count=planned.requests_count if planned else 0,
            ok_count=ok,
            outcome="FAIL" if wrong else "PASS",
            sentence="; ".join(wrong) or f"{ok} of {ok} requests answered",
        )


@dataclass(kw_only=True)
class _Findings:
    """What has been found of one winner so far."""

    served: Served | None = None
    golden: golden.Golden | None = None
    answers: list[measures.Answer] = field(default_factory=list)
    runs: list[LoadRun] = field(default_factory=list)
    calibration: measures.Calibration | None = None
    degenerate: Degenerate | None = None
    failures: list[str] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _F16Answers:
    """The greedy answers of f16, asked for once, after the first quant has been unloaded."""

    def __init__(self, test: _Test, host: Host) -> None:
        self._test = test
        self._host = host
        self._answers: list[measures.Answer] | None = None
        self._asked = False

    def get(self) -> list[measures.Answer] | None:
        """Return them; None where this machine cannot hold f16."""
        if not self._asked:
            self._asked = True
            try:
                with self._host.load(self._test.file(_F16)) as loaded:
                    self._answers = self._test.greedy_answers(loaded)
            except (MachineError, server.ServingError) as error:
                console.warn(f"f16 is not served here: {error.message}")
        return self._answers


def chars_per_token(loaded: Loaded, text: str) -> float:
    """
    Measure how many characters of a text the server reads as one token.

    From two prompts of different length, so that what the chat template adds cancels out.
    """
    short, long = (
        loaded.prompt_tokens([{"role": "user", "content": text[:count]}])
        for count in _PROBE_CHARACTERS
    )
    return (_PROBE_CHARACTERS[1] - _PROBE_CHARACTERS[0]) / max(1, long - short)


# --- the verdict --------------------------------------------------------------------------------


def _verdict(
    host: records.HostChoice,
    winners: tuple[WinnerTest, ...],
    smokes: tuple[Smoke, ...],
    *,
    declared: bool,
) -> LoadVerdict:
    """Say what follows for one host: doubt first, then failures, then open questions."""
    if host.winner is None:
        return LoadVerdict(
            host=host.host,
            winner=None,
            verdict=host.verdict,
            sentence="nothing was chosen, so nothing was served",
        )
    test = next(one for one in winners if one.type == host.winner)
    gates = [gate for gate in test.gates if gate.host == host.host]
    failed = [*test.failures, *(gate.sentence for gate in gates if gate.outcome == "FAIL")]
    open_ = [gate.sentence for gate in gates if gate.outcome == "INCONCLUSIVE"]
    if test.golden is not None:
        failed += [one.sentence for one in test.golden.prompts if one.outcome == "FAIL"][:1]
    if test.degenerate is not None and test.degenerate.outcome != "PASS":
        (failed if test.degenerate.outcome == "FAIL" else open_).append(test.degenerate.sentence)
    open_ += [f"{one.type}: {one.sentence}" for one in smokes if one.outcome == "FAIL"]
    if not declared:
        open_.append("no Ollama served it, and `serving.engine` does not declare llama-server")
    for verdict, sentences in (("INVALID", test.invalid), ("REJECT", failed), ("HOLD", open_)):
        if sentences:
            return LoadVerdict(
                host=host.host,
                winner=host.winner,
                verdict=verdict,
                sentence="; ".join(sentences),
            )
    return LoadVerdict(
        host=host.host,
        winner=host.winner,
        verdict="PROMOTE",
        sentence=next(gate.sentence for gate in gates if gate.name == "goodput"),
    )
