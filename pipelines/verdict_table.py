"""
docs/verdict.md: the truth table of the verdict, made by asking the function itself.

`evidence` builds what is known of a small model of which every input is in one of its states.
`judge` answers for each state while all other inputs are good; that any combination is as bad as
the worst of its states, but for the inputs that have nothing to speak of where nothing is chosen,
is what `expected` says and what the tests hold against all combinations.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, get_args

from pipelines import verdict
from pipelines.compare_records import CompareRecord, Side, SpeedComparison
from pipelines.evaluate_records import EvalResult, EvaluateRecord, QuantEval
from pipelines.load_records import (
    EngineId,
    Golden,
    GoldenPrompt,
    LoadGate,
    LoadTestRecord,
    LoadVerdict,
    Served,
    WinnerTest,
)
from pipelines.params import Gates, Host, JudgeSlice, Serving, Slo, Waiver
from pipelines.records import (
    BenchmarkRecord,
    CalibrateRecord,
    Candidate,
    ChoiceRecord,
    ConvertRecord,
    FetchRecord,
    FileDigest,
    HostChoice,
    MachineId,
    Memory,
    QualityResult,
    QuantizeRecord,
    Speed,
    Validity,
)
from pipelines.release_records import (
    MachineClass,
    Release,
    ReleasedHost,
    ReleasedQuant,
    ReleaseLicense,
    ReleaseSource,
    ReleaseTools,
)
from pipelines.verdict_evidence import Evidence
from pipelines.verdict_words import VERDICTS, severest, worst
from pipelines.verify_records import Check, Layer, LogitsAgreement, VerifyRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pipelines.load_records import Outcome
    from pipelines.verdict import ModelVerdict
    from pipelines.verdict_words import Verdict

_MODEL: Final = "MODEL"
_HOST: Final = "host"
_TYPE: Final = "Q4_K_M"
_KEY: Final = f"{_MODEL}-{_TYPE}"
_COMMIT: Final = "c" * 40
_REVISION: Final = "a" * 40
_TODAY: Final = "2027-01-31"
_CONTEXT_TOKENS: Final = 4096
_SLO: Final = {"ttft_ms": 300.0, "min_goodput": 0.95}
_GATES: Final = {"max_kld_mean_nats": 0.05}
# Of a comparison: how far the challenger is from the champion, as a log-ratio.
_LOG_RATIOS: Final = {"better": 0.05, "equal": 0.0, "undecided": -0.03, "worse": -0.1}


def _sha256(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class State:
    """One state of one input: what changes in the evidence, and what it is called."""

    name: str
    words: str
    change: Callable[[Evidence], Evidence]


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of the verdict; its first state is the good one."""

    name: str
    record: str
    states: tuple[State, ...]


# --- a model of which everything is good ------------------------------------------------------


def _digest(name: str, size_bytes: int) -> FileDigest:
    return FileDigest(name=name, size_bytes=size_bytes, sha256=_sha256(name), md5="0" * 32)


def _machine() -> MachineId:
    return MachineId(
        hw_id="h" * 12, env_id="e" * 12, backend="cpu", cpu="a CPU", cores_count=8, memory_gib=32,
        gpus=(),
    )  # fmt: skip


def _validity(*reasons: str) -> Validity:
    return Validity(
        verdict="INVALID" if reasons else "VALID", reasons=reasons, notes=(), load_before=0.1,
        load_after=0.1, steal_share=0.0, gpu_info="",
    )  # fmt: skip


def _declared() -> JudgeSlice:
    return JudgeSlice(
        model=_MODEL, quants={_KEY: _TYPE}, source="hf:owner/repo", revision=_REVISION, recipe=1,
        context_tokens=_CONTEXT_TOKENS, modelfile="modelfiles/chat.Modelfile.j2",
        serving=Serving(), objective="speed", gates=Gates(**_GATES),
        hosts={_HOST: Host(memory_mib=16_384)}, slos={_HOST: Slo(**_SLO)},
        corpus_sha256=_sha256("text"), logits="auto", evals={"tasks": _sha256("tasks")}, alpha=0.05,
        compare_required=False,
        compare_effects={"decode": 0.03, "prefill": 0.05, "quality": 0.1},
        stable="latest", license=None, waivers=(),
    )  # fmt: skip


def _quality() -> QualityResult:
    return QualityResult(
        corpus_sha256=_sha256("text"), context_tokens=512, chunks_count=100, scored_tokens=25_600,
        kld_mean_nats=0.03, kld_mean_error_nats=0.001, kld_p999_nats=0.5, kld_max_nats=2.0,
        same_top=0.93, same_top_error=0.001, ppl=10.2, ppl_f16=10.0, ppl_ratio=1.02,
        ppl_ratio_error=0.001,
    )  # fmt: skip


def _benchmark(built: FileDigest, f16: FileDigest) -> BenchmarkRecord:
    return BenchmarkRecord(
        key=_KEY, model=_MODEL, type=_TYPE, gguf_sha256=built.sha256, f16_sha256=f16.sha256,
        size_bytes=built.size_bytes, llama_cpp_commit=_COMMIT, machine=_machine(),
        validity=_validity(), threads=8,
        speed=(
            Speed(
                test="decode", depth_tokens=0, tokens=128, median_tok_s=50.0, low_tok_s=49.0,
                high_tok_s=51.0, samples_tok_s=(50.0,), dropped_tok_s=(),
            ),
        ),
        quality=_quality(),
        memory=Memory(
            context_tokens=_CONTEXT_TOKENS, estimate_mib=5000, measured_mib=5100, method="rss",
            model_mib=4000, context_mib=500, compute_mib=500,
        ),
        measured_at="2027-01-30T12:00:00Z", wall_s=100,
    )  # fmt: skip


def _choice(built: FileDigest) -> ChoiceRecord:
    quality = _quality()
    candidate = Candidate(
        key=_KEY, type=_TYPE, gguf_sha256=built.sha256, size_mib=built.size_bytes / 2**20,
        memory_mib=5100, decode_tok_s=50.0, kld_mean_nats=quality.kld_mean_nats,
        kld_p999_nats=quality.kld_p999_nats, same_top=quality.same_top,
        ppl_ratio=quality.ppl_ratio, bits_per_weight=4.8, verdict="CHOSEN", on_frontier=True,
        sentence=f"{_TYPE}: the only quant, and it passes.",
    )  # fmt: skip
    host = HostChoice(
        host=_HOST, limit_mib=16_384, margin_mib=1024, incumbent=None, winner=_TYPE,
        runner_up=None, verdict="PROMOTE",
        sentence=f"promote {_TYPE}: the only quant, and it passes", binding="",
        candidates=(candidate,),
    )  # fmt: skip
    return ChoiceRecord(
        model=_MODEL, objective="speed", context_tokens=_CONTEXT_TOKENS, decode_depth_tokens=0,
        hw_id=_machine().hw_id, gates=_GATES, notes=(), hosts=(host,),
    )  # fmt: skip


def _load_test(built: FileDigest) -> LoadTestRecord:
    gates = tuple(_gate(name) for name in ("ttft", "goodput", "memory"))
    test = WinnerTest(
        type=_TYPE, hosts=(_HOST,),
        served=Served(
            type=_TYPE, gguf_sha256=built.sha256, manifest_sha256=_sha256("manifest"),
            context_tokens=_CONTEXT_TOKENS, parallel=1, gpu_layers="0", kv_type="f16",
            size_bytes=None, size_vram_bytes=None, peak_memory_mib=5200, cold_load_ms=900,
        ),
        golden=Golden(
            version=1, sha256=_sha256("prompts"), upstream="transformers",
            prompts=(GoldenPrompt(id="one", outcome="PASS", sentence="the same"),),
        ),
        runs=(), calibration=None, degenerate=None, gates=gates, failures=(), invalid=(), notes=(),
    )  # fmt: skip
    return LoadTestRecord(
        model=_MODEL, context_tokens=_CONTEXT_TOKENS, slos={_HOST: _SLO},
        engine=EngineId(
            kind="ollama", version="0.33.0", llama_cpp="b1", found_by="PATH", declared=True,
            sentence="Ollama 0.33.0",
        ),
        machine=_machine(), modelfile="modelfiles/chat.Modelfile.j2",
        modelfile_sha256=_sha256("modelfile"), modelfile_version=1, winners=(test,), smokes=(),
        verdicts=(
            LoadVerdict(
                host=_HOST, winner=_TYPE, verdict="PROMOTE",
                sentence="200 of 200 requests kept every level",
            ),
        ),
        measured_at="2027-01-30T13:00:00Z", wall_s=100,
    )  # fmt: skip


def _gate(name: str, outcome: Outcome = "PASS") -> LoadGate:
    low, high = {"PASS": (0.98, 1.0), "INCONCLUSIVE": (0.93, 0.98), "FAIL": (0.8, 0.9)}[outcome]
    if name == "memory":
        fields: dict[str, Any] = {"value": 5200.0, "low": 5200.0, "high": 5200.0, "limit": 16_384.0}
    else:
        fields = {"value": high, "low": low, "high": high, "limit": 0.95}
    return LoadGate(
        host=_HOST, name=name, outcome=outcome, more_requests=None,
        sentence=f"{low * 100:.0f} to {high * 100:.0f} % of requests kept every level, 95 % needed",
        **fields,
    )  # fmt: skip


def _verified(f16: FileDigest, outcomes: Mapping[str, str] | None = None) -> VerifyRecord:
    words = {
        "PASS": "all are equal", "FAIL": "3 of 2,400 strings get other ids, 0 may",
        "SKIP": "upstream's weights do not fit the memory of this machine",
    }  # fmt: skip
    found = dict.fromkeys(get_args(Layer), "PASS") | dict(outcomes or {})
    checks = tuple(
        Check.model_validate(
            {
                "layer": layer, "outcome": outcome, "sentence": words[outcome],
                "examined_count": 0 if outcome == "SKIP" else 2400,
                "differing_count": 3 if outcome == "FAIL" else 0,
            }
        )
        for layer, outcome in found.items()
    )  # fmt: skip
    return VerifyRecord(
        model=_MODEL, revision=_REVISION, architecture="llama", f16_sha256=f16.sha256,
        llama_cpp_commit=_COMMIT, recipe=1,
        outcome="FAIL" if "FAIL" in found.values() else "PASS", checks=checks,
        logits=LogitsAgreement(
            corpus_sha256=_sha256("text"), tokens_count=512, same_top=0.999, kld_mean_nats=1e-6,
            kld_max_nats=1e-4, nll_upstream_nats=2.3, nll_gguf_nats=2.3,
        ),
        embeddings=None,
    )  # fmt: skip


def _evaluated(built: FileDigest, f16: FileDigest, *, p_value: float = 0.5) -> EvaluateRecord:
    is_harmed = p_value < 0.05  # noqa: PLR2004 - evaluate.alpha of `_declared`
    quant = QuantEval(
        key=_KEY, type=_TYPE, gguf_sha256=built.sha256, outcomes="1" * 100, correct_count=90,
        harmed_count=12 if is_harmed else 2, helped_count=2, p_value=p_value,
        outcome="HARM" if is_harmed else "PASS", sentence="paired with f16",
    )  # fmt: skip
    one = EvalResult(
        name="tasks", kind="multiple-choice", set_sha256=_sha256("tasks"), license="mit",
        items_count=100, chance=0.25, f16_outcomes="1" * 100, f16_correct_count=90, is_void=False,
        sentence="f16 answers 90 of 100 rightly", quants=(quant,),
    )  # fmt: skip
    return EvaluateRecord(
        model=_MODEL, f16_sha256=f16.sha256, llama_cpp_commit=_COMMIT, recipe=1, alpha=0.05,
        canary_margin=0.1, sets=(one,),
    )  # fmt: skip


def _compared(built: FileDigest, outcome: str, *, file: str = "") -> CompareRecord:
    def side(source: str, gguf_sha256: str) -> Side:
        return Side(
            source=source, key=_KEY, type=_TYPE, gguf_sha256=gguf_sha256,
            f16_sha256=_sha256("f16"), size_bytes=1 << 30, llama_cpp_commit=_COMMIT,
            toolchain_id="t",
        )  # fmt: skip

    middle = _LOG_RATIOS[outcome]
    speed = SpeedComparison.model_validate(
        {
            "test": "decode", "depth_tokens": 0, "tokens": 128, "effect": 0.03, "pairs": (),
            "control_pairs": (), "log_ratio_mean": middle, "log_ratio_low": middle - 0.01,
            "log_ratio_high": middle + 0.01, "control_half_width": 0.01, "drift": 0.0,
            "outcome": outcome, "sentence": f"decode is {outcome}",
        }
    )  # fmt: skip
    return CompareRecord.model_validate(
        {
            "model": _MODEL, "context_tokens": _CONTEXT_TOKENS,
            "champion": side("release 0123456789ab", _sha256("champion")),
            "challenger": side("this checkout", file or built.sha256), "machine": _machine(),
            "validity": _validity(), "speed": (speed,), "quality": None, "flips": (),
            "outcome": outcome, "sentence": f"decode is {outcome}", "doubled": False,
            "budget_s": 60.0, "wall_s": 50.0, "measured_at": "2027-01-30T14:00:00Z",
        }
    )  # fmt: skip


def _champion() -> Release:
    """Build the release that is served now: the same model, another file."""
    return Release(
        model=_MODEL, previous=None,
        source=ReleaseSource(
            source="hf:owner/repo", revision="b" * 40, architecture="LlamaForCausalLM",
            parameters_count=8_000_000_000,
        ),
        license=ReleaseLicense(id="apache-2.0", files={}),
        tools=ReleaseTools(
            llama_cpp_commit=_COMMIT, recipe=1, engine="ollama", engine_version="0.33.0",
            engine_llama_cpp="b1", modelfile="modelfiles/chat.Modelfile.j2", modelfile_version=1,
            modelfile_sha256=_sha256("modelfile"),
        ),
        machine=MachineClass(
            hw_id="h" * 12, backend="cpu", cpu="a CPU", cores_count=8, memory_gib=32, gpus=()
        ),
        context_tokens=_CONTEXT_TOKENS, objective="speed", stable_quant=_TYPE,
        hosts={_HOST: ReleasedHost(verdict="PROMOTE", winner=_TYPE, sentence="promote")},
        quants=(
            ReleasedQuant(
                key=_KEY, type=_TYPE, gguf_sha256=_sha256("champion"), f16_sha256=_sha256("f16"),
                imatrix_sha256=None, imatrix_corpus_sha256=None, bits_per_weight=4.8,
                tensor_types={}, quality=_quality(), memory_mib=5100,
                memory_context_tokens=_CONTEXT_TOKENS, prefill_tok_s=None, decode_tok_s=50.0,
                decode_depth_tokens=0, sentence="it passes",
            ),
        ),
        files=(), choice_gates=_GATES, gates=(), waivers=(), evidence={},
    )  # fmt: skip


def good() -> Evidence:
    """Return what is known of a model that is promoted: every input in its first state."""
    f16, built = _digest("f16.gguf", 16 << 30), _digest(f"{_KEY}.gguf", 4 << 30)
    return Evidence(
        declared=_declared(),
        fetched=FetchRecord(
            model=_MODEL, source="hf:owner/repo", revision=_REVISION,
            architecture="LlamaForCausalLM", license="apache-2.0", parameters_count=8_000_000_000,
            dtypes={"BF16": 291}, size_bytes=16 << 30, files=(),
        ),
        converted=ConvertRecord(
            model=_MODEL, revision=_REVISION, architecture="llama", llama_cpp_commit=_COMMIT,
            recipe=1, tensors_count=291, tensor_types={"F16": 291}, context_train_tokens=8192,
            gguf=f16,
        ),
        verified=_verified(f16),
        calibrated=CalibrateRecord(
            model=_MODEL, f16_sha256=f16.sha256, llama_cpp_commit=_COMMIT, recipe=1, corpus=None,
            corpus_sha256=None, context_tokens=512, chunks_count=0, entries_count=0, imatrix=None,
        ),
        quantized={
            _TYPE: QuantizeRecord(
                key=_KEY, model=_MODEL, type=_TYPE, f16_sha256=f16.sha256,
                llama_cpp_commit=_COMMIT, recipe=1, imatrix_sha256=None,
                imatrix_corpus_sha256=None, bits_per_weight=4.8, tensors_count=291,
                tensor_types={}, tensor_bytes={}, rules=(), fallbacks=(), gguf=built,
            )
        },
        measured={_TYPE: _benchmark(built, f16)},
        evaluated=_evaluated(built, f16),
        choice=_choice(built),
        tested=_load_test(built),
        compared=_compared(built, "better"),
        previous=_champion(),
        today=_TODAY,
    )  # fmt: skip


# --- the states -------------------------------------------------------------------------------


def _state(name: str, words: str, **changes: Any) -> State:  # noqa: ANN401 - fields
    return State(name=name, words=words, change=lambda known: replace(known, **changes))


def _f16() -> FileDigest:
    return _digest("f16.gguf", 16 << 30)


def _built() -> FileDigest:
    return _digest(f"{_KEY}.gguf", 4 << 30)


def _with_declared(known: Evidence, **changes: Any) -> Evidence:  # noqa: ANN401 - fields
    return replace(known, declared=known.declared.model_copy(update=changes))


def _chosen(**changes: Any) -> ChoiceRecord:  # noqa: ANN401 - fields
    choice = _choice(_built())
    return choice.model_copy(update={"hosts": (choice.hosts[0].model_copy(update=changes),)})


def _refused_choice() -> ChoiceRecord:
    choice = _choice(_built())
    (candidate,) = choice.hosts[0].candidates
    out = candidate.model_copy(update={"verdict": "REJECT"})
    return _chosen(
        winner=None, verdict="REJECT", sentence=f"reject: {_TYPE} does not pass", candidates=(out,)
    )


def _doubted_choice() -> ChoiceRecord:
    return _chosen(verdict="HOLD", sentence=f"hold: {_TYPE} leads; Q8_0 cannot be judged")


def _tested(**changes: Any) -> LoadTestRecord:  # noqa: ANN401 - fields
    tested = _load_test(_built())
    return tested.model_copy(update={"winners": (tested.winners[0].model_copy(update=changes),)})


def _gated(outcome: Outcome) -> LoadTestRecord:
    return _tested(gates=(_gate("ttft", outcome), _gate("goodput", outcome), _gate("memory")))


def _other_file() -> LoadTestRecord:
    served = _load_test(_built()).winners[0].served
    assert served is not None, "by construction"
    return _tested(served=served.model_copy(update={"gguf_sha256": _sha256("another file")}))


def _stand_in() -> LoadTestRecord:
    tested = _load_test(_built())
    assert tested.engine is not None, "by construction"
    engine = tested.engine.model_copy(update={"kind": "llama-server", "declared": False})
    return tested.model_copy(update={"engine": engine})


def _void() -> EvaluateRecord:
    found = _evaluated(_built(), _f16())
    (one,) = found.sets
    quant = one.quants[0].model_copy(update={"outcome": "VOID"})
    void = one.model_copy(
        update={
            "is_void": True, "quants": (quant,), "f16_correct_count": 26,
            "sentence": "f16 answers 26 of 100 rightly, and chance 25",
        }
    )  # fmt: skip
    return found.model_copy(update={"sets": (void,)})


def _licensed(known: Evidence, license_: str | None, **changes: Any) -> Evidence:  # noqa: ANN401 - fields
    assert isinstance(known.fetched, FetchRecord), "by construction"
    fetched = known.fetched.model_copy(update={"license": license_} | changes)
    return replace(known, fetched=fetched)


def _waived(known: Evidence, gate: str) -> Evidence:
    waiver = Waiver.model_validate(
        {"gate": gate, "who": "Ada", "why": "read by our lawyer", "until": _TODAY}
    )
    return _with_declared(known, waivers=(*known.declared.waivers, waiver))


def inputs() -> tuple[Input, ...]:
    """Return every input with its states, the good one first."""
    f16, built = _f16(), _built()
    foreign = _verified(f16).model_copy(update={"f16_sha256": _sha256("another f16")})
    hot = _compared(built, "worse").model_copy(
        update={"validity": _validity("The card was throttled: cool it and compare again.")}
    )
    older = _compared(built, "worse", file=_sha256("an older file"))
    return (
        Input(name="verify", record="verify.json", states=(
            State(name="PASS", words="every layer holds", change=lambda known: known),
            _state("SKIP", "a layer was left out (`verify.logits: off`, or too large)",
                   verified=_verified(f16, {"logits": "SKIP"})),
            _state("FAIL", "a layer fails", verified=_verified(f16, {"tokens": "FAIL"})),
            _state("missing", "nobody has proven it", verified="verify.json does not exist"),
            _state("foreign", "it speaks of another f16, revision, recipe or commit",
                   verified=foreign),
        )),
        Input(name="choice", record="choice.json", states=(
            State(name="winner", words="a quant passes every gate and is chosen",
                  change=lambda known: known),
            _state("doubt", "a winner, but another quant cannot be judged",
                   choice=_doubted_choice()),
            _state("none", "no quant passes", choice=_refused_choice()),
        )),
        Input(name="evals", record="evaluate.json", states=(
            State(name="ok", words="no proof of harm", change=lambda known: known),
            State(name="none", words="no set is declared", change=lambda known: replace(
                _with_declared(known, evals={}), evaluated="evaluate.json does not exist")),
            _state("void", "f16 itself is not above chance", evaluated=_void()),
            _state("harm", "the winner loses more items than chance explains",
                   evaluated=_evaluated(built, f16, p_value=0.006)),
            _state("missing", "sets are declared and were not done",
                   evaluated="evaluate.json does not exist"),
        )),
        Input(name="load test", record="load-test.json", states=(
            State(name="good", words="every level is kept", change=lambda known: known),
            _state("open", "an interval lies on both sides of its limit",
                   tested=_gated("INCONCLUSIVE")),
            _state("stand-in", "llama-server served in the place of Ollama", tested=_stand_in()),
            _state("fails", "a level is missed", tested=_gated("FAIL")),
            _state("in doubt", "the numbers are not to be trusted",
                   tested=_tested(invalid=("another process ran",))),
            _state("missing", "it was not served", tested="load-test.json does not exist"),
            _state("foreign", "another file was served", tested=_other_file()),
        )),
        Input(name="comparison", record="compare.json", states=(
            State(name="better", words="clearly better", change=lambda known: known),
            _state("equal", "no loss that matters", compared=_compared(built, "equal")),
            _state("absent", "nothing was compared", compared=None),
            _state("stale", "it speaks of another file, context or machine", compared=older),
            State(name="absent, required",
                  words="nothing was compared, and `compare.required` asks for it",
                  change=lambda known: replace(
                      _with_declared(known, compare_required=True), compared=None)),
            State(name="stale, required",
                  words="of another file, and `compare.required` asks for one of this",
                  change=lambda known: replace(
                      _with_declared(known, compare_required=True), compared=older)),
            _state("undecided", "a loss is neither shown nor excluded",
                   compared=_compared(built, "undecided")),
            _state("worse", "a loss that matters is shown", compared=_compared(built, "worse")),
            _state("INVALID", "the measurement is not to be trusted", compared=hot),
        )),
        Input(name="licence", record="fetch.json", states=(
            State(name="ok", words="upstream states the one of the release before",
                  change=lambda known: known),
            State(name="unknown", words="upstream states none",
                  change=lambda known: _licensed(known, None)),
            State(name="changed", words="another one than that of the release before",
                  change=lambda known: _licensed(known, "mit")),
            State(name="gated", words="upstream gives its files only to some",
                  change=lambda known: _licensed(known, "apache-2.0", gated="manual")),
            State(name="waived", words="changed, and a waiver of `license` lets it pass",
                  change=lambda known: _waived(_licensed(known, "mit"), "license")),
        )),
    )  # fmt: skip


def evidence(states: Mapping[str, str]) -> Evidence:
    """Build what is known of a model; an input that is not named is good."""
    known = good()
    for one in inputs():
        name = states.get(one.name, one.states[0].name)
        known = next(each for each in one.states if each.name == name).change(known)
    return known


def alone(input_: str, state: str) -> ModelVerdict:
    """Judge one state of one input, all others being good."""
    return verdict.judge(evidence({input_: state}))


# Inputs that speak of the chosen file, and of nothing where none is chosen.
OF_WINNER: Final = ("evals: harm", "load test", "comparison")


def expected(verdicts: Mapping[tuple[str, str], Verdict], states: Mapping[str, str]) -> Verdict:
    """
    Return the verdict of a combination: the worst of its states.

    Where nothing is chosen there is no file that was served, harmed or compared.

    Args:
        verdicts: Of each (input, state) alone.
        states: The state of each input.
    """
    is_chosen = states["choice"] != "none"
    counting = [
        verdicts[name, state]
        for name, state in states.items()
        if is_chosen or (name not in OF_WINNER and f"{name}: {state}" not in OF_WINNER)
    ]
    return worst(*counting)


# --- the page ---------------------------------------------------------------------------------

_INTRODUCTION: Final = """\
# The verdict

<!-- Generated by `fleet schema --write` from pipelines/verdict_table.py: the rows are answers of
     the function `pipelines.verdict.judge`. -->

One pure function judges a model by all its records, by what params.yaml declares now, and by the
day (a waiver ends). `publish`, `fleet report` and `fleet report --strict` have no judgement of
their own: they show this one. It says PROMOTE, HOLD, REJECT or INVALID for each host and for the
model, gives every reason with the value, the limit and the record that says so, and the next step.

- **PROMOTE**: it may be served.
- **HOLD**: something is open that a measurement or a person can settle. `hold`, `license` and
  `gated` are waivers of params.yaml: each lets pass exactly what it names, until its day, with a
  name beside it in the report and in the release.
- **REJECT**: it is known to be worse than what is declared. No waiver.
- **INVALID**: the evidence is not to be trusted: a record is missing, of other bytes, of another
  declaration, or holds a number that is none. Never a failure of the model, never a baseline, and
  no waiver.

The verdict is the worst of its reasons. What is missing never counts as good.

## Each input

Each row is the verdict while every other input is in its first state. All {count:,} combinations of
these states are judged in the tests: each is as bad as the worst of its rows, but that the load
test, the comparison and a harm have no file to speak of where no quant is chosen; they count for
nothing there. The comparison is one of two quants of the same type; between two types only what the
model's `objective` makes best is held against the new one (docs/compare.md).
"""

_END: Final = """\

## In one look

{look}

## What else makes a model INVALID

Beside the rows above, every record has to speak of the same bytes as the one before it: source,
revision, f16, importance matrix, corpora, llama.cpp commit, recipe, each GGUF by sha256 and size,
the machine of choice and load test, and the file, context, slots and cache that were served. The
choice has to hold the very numbers of its benchmarks, and to be made by the gates, the objective,
the hosts and the service levels that params.yaml declares now; memory under load is held against
the host as it is declared now. Its winner is held against the gates
once more, from the benchmark itself. A number that is not finite is none, wherever it stands.

## A comparison is asked for by hand

`fleet compare` is no stage: a model is judged with the comparison that there is. One of another
file, context or machine does not count, and a note says so. It follows that removing a comparison
that says `worse` of the chosen file lets the model be judged without it, as if nobody had compared;
`compare.required: true` closes that: then the file has to be compared with what is served now
before it is promoted. What is served now is the release of release.json, or the one to which
`stable` is pinned. The comparison's digest is part of the release that it led to.

A comparison is never taken for better than its own numbers, held against the differences that
params.yaml says matter now: a wider limit at the time of measuring lets nothing pass.

## A changed engine

Where champion and challenger run on two builds of llama.cpp, `fleet compare` writes engine.json
beside compare.json: the engine alone, on the same GGUF, and what was released, on the new engine
(docs/compare.md). Its rule is `engine`, and its outcomes count as those of a comparison do: worse
is REJECT, because every model gets the new engine and better weights of one must not hide what it
costs; undecided, or left out for want of time, is HOLD; a speed that others disturbed is INVALID.
A release that the new engine does not load, or answers worse with, is REJECT: a rollback brings
its bytes back and not its engine. One that could not be tried is HOLD. It counts only if it
speaks of the file, the context, the machine and the llama.cpp that there are now, and of the two
sides of compare.json; a stale one never does, and a note says so. That an engine changed and was
not measured alone is a note, and with `compare.required` HOLD.

## What review has to see

Two files of results/ are asked for only if they are there, since a new model has neither:
compare.json, with engine.json beside it, and release.json. Without release.json nobody knows which
licence was accepted before and what is served, so that neither a changed licence nor a missing
comparison is seen. Git shows both removals: a change that deletes one of them needs a reason.

## Hosts

Each host has its own verdict; the model's is the worst of them. A release serves the hosts that are
PROMOTE (or HOLD with a waiver), unless something stands against the whole model or one host is
INVALID: numbers that are not to be trusted are nobody's numbers.
"""


def page() -> str:
    """Return the text of docs/verdict.md."""
    count = 1
    text = ""
    by_verdict: dict[Verdict, list[str]] = {each: [] for each in VERDICTS}
    for one in inputs():
        count *= len(one.states)
        text += f"\n### {one.name} (`{one.record}`)\n\n"
        text += "| state | verdict | what is said | next step |\n|:--|:--|:--|:--|\n"
        for state in one.states:
            found = alone(one.name, state.name)
            by_verdict[found.verdict].append(f"{one.name}: {state.name}")
            text += _row(state, found)
    look = "".join(
        f"- **{each}** if {_any(each)}: {'; '.join(by_verdict[each])}.\n"
        for each in reversed(VERDICTS)
    )
    return _INTRODUCTION.format(count=count) + text + _END.format(look=look.rstrip("\n"))


def _any(verdict_: Verdict) -> str:
    return {
        "INVALID": "any of these is so",
        "REJECT": "none of those, and any of these",
        "HOLD": "none of those, and any of these",
        "PROMOTE": "all are among these",
    }[verdict_]


def _row(state: State, found: ModelVerdict) -> str:
    reasons = [each for each in severest(found.reasons) if each.counts]
    said = (
        reasons[0].sentence if reasons else " ".join(_notes(found)) or "Nothing stands against it."
    )
    step = reasons[0].next_step if reasons else ""
    return f"| {state.name}: {state.words} | {found.verdict} | {_cell(said)} | {_cell(step)} |\n"


def _notes(found: ModelVerdict) -> list[str]:
    let_pass = [f"Let pass by {each.let_pass}: {each.clause}." for each in found.reasons]
    return [*(f"Note: {each}" for each in found.notes), *let_pass]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
