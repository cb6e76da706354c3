"""
Valid records, for tests that say only what is special about theirs.

Every builder takes keywords that replace fields; numbers are those of a small, plausible quant.
Digests are made from names, so that records of one quant fit together and those of others do not.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, cast, get_args

from pipelines import records
from pipelines.compare_records import CompareRecord, QualityComparison, Side, SpeedComparison
from pipelines.evaluate_records import EvalResult, EvaluateRecord, QuantEval
from pipelines.load_records import (
    Calibration,
    Degenerate,
    EngineId,
    Golden,
    GoldenPrompt,
    LoadGate,
    LoadRun,
    LoadTestRecord,
    LoadVerdict,
    Served,
    Smoke,
    Spread,
    WinnerTest,
)
from pipelines.params import Choose, ChooseSlice, Gates, Host, JudgeSlice, QuantType, Serving, Slo
from pipelines.records import (
    BenchmarkRecord,
    CalibrateRecord,
    ConvertRecord,
    EmbeddingQuality,
    FetchRecord,
    FileDigest,
    MachineId,
    Memory,
    QualityResult,
    QuantizeRecord,
    Speed,
    Validity,
)
from pipelines.verify_records import Check, Layer, LogitsAgreement, VerifyRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pipelines.layout import Layout
    from pipelines.params import Objective

MODEL = "tiny-llama"
COMMIT = "0c1e57098a3f0c1e57098a3f0c1e57098a3f0c1e"
CONTEXT_TOKENS = 512
CHUNKS = 100
LEVELS = {"ttft_ms": 300.0, "tpot_ms": 50.0, "min_goodput": 0.95}


def sha256(name: str) -> str:
    """Return a digest that is different for each name."""
    return hashlib.sha256(name.encode()).hexdigest()


def file_digest(name: str, size_bytes: int = 3 << 20) -> FileDigest:
    """Build the digest of a file that does not exist."""
    md5 = hashlib.md5(name.encode()).hexdigest()
    return FileDigest(name=name, size_bytes=size_bytes, sha256=sha256(name), md5=md5)


def fetch_record(model: str = MODEL, **changes: Any) -> FetchRecord:
    """Build the record of a fetched model."""
    fields: dict[str, Any] = {
        "model": model,
        "source": f"path:examples/{model}",
        "revision": sha256(model)[:40],
        "architecture": "LlamaForCausalLM",
        "license": "apache-2.0",
        "parameters_count": 3_400_000,
        "dtypes": {"BF16": 39},
        "size_bytes": 7_000_000,
        "files": (file_digest("model.safetensors", 6_900_000), file_digest("tokenizer.model")),
    }
    return FetchRecord(**(fields | changes))


def convert_record(model: str = MODEL, **changes: Any) -> ConvertRecord:
    """Build the record of a converted model."""
    fields: dict[str, Any] = {
        "model": model,
        "revision": sha256(model)[:40],
        "architecture": "llama",
        "llama_cpp_commit": COMMIT,
        "recipe": 1,
        "tensors_count": 39,
        "tensor_types": {"F16": 30, "F32": 9},
        "context_train_tokens": 2048,
        "gguf": f16_digest(model),
    }
    return ConvertRecord(**(fields | changes))


def f16_digest(model: str) -> FileDigest:
    """Build the digest of the model's f16 GGUF, to which all its other records refer."""
    return FileDigest(
        name="f16.gguf", size_bytes=7 << 20, sha256=sha256(f"{model} f16"), md5="0" * 32
    )


def check(layer: str = "tokens", outcome: str = "PASS", **changes: Any) -> Check:
    """Build one layer of the proof of a conversion."""
    fields: dict[str, Any] = {
        "layer": layer,
        "outcome": outcome,
        "examined_count": 0 if outcome == "SKIP" else 2400,
        "differing_count": 3 if outcome == "FAIL" else 0,
        "sentence": {
            "PASS": "2,400 of 2,400 are equal",
            "FAIL": "3 of 2,400 differ, 0 are allowed",
            "SKIP": "It could not be looked at.",
        }[outcome],
        "findings": ("'a b': 1, 2 upstream; 3 here",) if outcome == "FAIL" else (),
    }
    return Check(**(fields | changes))


def verify_record(
    model: str = MODEL, *, outcomes: Mapping[str, str] | None = None, **changes: Any
) -> VerifyRecord:
    """Build the proof of a conversion that passed every layer but those of `outcomes`."""
    found = dict.fromkeys(get_args(Layer), "PASS") | dict(outcomes or {})
    fields: dict[str, Any] = {
        "model": model,
        "revision": sha256(model)[:40],
        "architecture": "llama",
        "f16_sha256": f16_digest(model).sha256,
        "llama_cpp_commit": COMMIT,
        "recipe": 1,
        "outcome": "FAIL" if "FAIL" in found.values() else "PASS",
        "checks": tuple(check(layer, outcome) for layer, outcome in found.items()),
        "logits": LogitsAgreement(
            corpus_sha256=sha256("evaluation"), tokens_count=512, same_top=0.998,
            kld_mean_nats=1e-5, kld_max_nats=1e-3, nll_upstream_nats=2.5, nll_gguf_nats=2.5001,
        ),
        "embeddings": None,
    }  # fmt: skip
    return VerifyRecord(**(fields | changes))


def quant_eval(type_: str = "Q4_K_M", model: str = MODEL, **changes: Any) -> QuantEval:
    """Build the answers of a quant that lost one item and won one."""
    built = quantize_record(type_, model)
    fields: dict[str, Any] = {
        "key": built.key, "type": type_, "gguf_sha256": built.gguf.sha256,
        "outcomes": "1011101110", "correct_count": 7, "harmed_count": 1, "helped_count": 1,
        "p_value": 0.75, "outcome": "PASS",
        "sentence": f"{type_}: 1 item lost, 1 won; no proof of harm (p = 0.75)",
    }  # fmt: skip
    return QuantEval(**(fields | changes))


def eval_result(
    name: str = "recall", types: Iterable[str] = ("Q8_0", "Q4_K_M"), model: str = MODEL,
    **changes: Any,
) -> EvalResult:  # fmt: skip
    """Build one set on which no quant is harmed."""
    fields: dict[str, Any] = {
        "name": name, "kind": "multiple-choice", "set_sha256": sha256(f"set {name}"),
        "license": "mit", "items_count": 10, "chance": 0.25, "f16_outcomes": "1011011110",
        "f16_correct_count": 7, "is_void": False, "sentence": "f16 answers 7 of 10 rightly",
        "quants": tuple(quant_eval(type_, model) for type_ in types),
    }  # fmt: skip
    return EvalResult(**(fields | changes))


def evaluate_record(
    model: str = MODEL, *, sets: Iterable[EvalResult] = (), **changes: Any
) -> EvaluateRecord:
    """Build the task evals of a model; without sets nothing was declared."""
    fields: dict[str, Any] = {
        "model": model, "f16_sha256": f16_digest(model).sha256, "llama_cpp_commit": COMMIT,
        "recipe": 1, "alpha": 0.05, "canary_margin": 0.1, "sets": tuple(sets),
    }  # fmt: skip
    return EvaluateRecord(**(fields | changes))


def side(type_: str = "Q4_K_M", model: str = MODEL, **changes: Any) -> Side:
    """Build one of the two that are compared: the quant of this checkout."""
    built = quantize_record(type_, model)
    fields: dict[str, Any] = {
        "source": "this checkout", "key": built.key, "type": type_,
        "gguf_sha256": built.gguf.sha256, "f16_sha256": built.f16_sha256,
        "size_bytes": built.gguf.size_bytes, "llama_cpp_commit": COMMIT, "toolchain_id": "t" * 12,
    }  # fmt: skip
    return Side(**(fields | changes))


def speed_comparison(outcome: str = "equal", **changes: Any) -> SpeedComparison:
    """Build one compared test."""
    low = {"better": 0.04, "equal": -0.01, "undecided": -0.05, "worse": -0.12}[outcome]
    fields: dict[str, Any] = {
        "test": "decode", "depth_tokens": 256, "tokens": 32, "effect": 0.03, "pairs": (),
        "control_pairs": (), "log_ratio_mean": low + 0.01, "log_ratio_low": low,
        "log_ratio_high": low + 0.02, "control_half_width": 0.01, "drift": 0.0,
        "outcome": outcome, "sentence": f"decode is {outcome}",
    }  # fmt: skip
    return SpeedComparison(**(fields | changes))


def quality_comparison(outcome: str = "equal", **changes: Any) -> QualityComparison:
    """Build the divergence of both, made from one f16."""
    low = {"better": -0.5, "equal": -0.01, "undecided": 0.05, "worse": 0.9}[outcome]
    fields: dict[str, Any] = {
        "same_f16": True, "corpus_sha256": sha256("evaluation"), "chunks_count": 100,
        "champion_kld_mean_nats": 0.02, "challenger_kld_mean_nats": 0.02, "log_ratio": low + 0.01,
        "log_ratio_low": low, "log_ratio_high": low + 0.1 * (outcome == "undecided"),
        "effect": 0.1, "outcome": outcome, "sentence": f"divergence is {outcome}",
    }  # fmt: skip
    return QualityComparison(**(fields | changes))


def compare_record(outcome: str = "equal", model: str = MODEL, **changes: Any) -> CompareRecord:
    """Build a comparison of the chosen Q4_K_M with the one of the commit before."""
    champion = side(source="HEAD~1", model=model, gguf_sha256=sha256(f"{model} champion"))
    fields: dict[str, Any] = {
        "model": model, "context_tokens": CONTEXT_TOKENS, "champion": champion,
        "challenger": side(model=model), "machine": machine_id(), "validity": validity(),
        "speed": (speed_comparison(outcome),), "quality": None, "flips": (), "outcome": outcome,
        "sentence": f"decode is {outcome}", "doubled": False, "budget_s": 60.0, "wall_s": 42.0,
        "measured_at": "2026-11-21T10:00:00Z",
    }  # fmt: skip
    return CompareRecord(**(fields | changes))


def judge_slice(
    types: Iterable[str] = ("Q8_0", "Q4_K_M"), model: str = MODEL, **changes: Any
) -> JudgeSlice:
    """Build what a model is judged by; `hosts` as {name: fields}, `evals` as names of sets."""
    return JudgeSlice(**judge_fields(types, model, **changes))


def judge_fields(types: Iterable[str], model: str = MODEL, **changes: Any) -> dict[str, Any]:
    """Return the fields of `judge_slice`: those of the records that this module builds."""
    hosts = changes.pop("hosts", None) or {"local": {"memory_mib": 2048, "margin_mib": 256}}
    gates = changes.pop("gates", {"max_kld_mean_nats": 0.06})
    slos = changes.pop("slos", None)
    fields: dict[str, Any] = {
        "model": model,
        "quants": {f"{model}-{type_}": type_ for type_ in types},
        "source": f"path:examples/{model}",
        "revision": sha256(model)[:40],
        "recipe": 1,
        "context_tokens": CONTEXT_TOKENS,
        "modelfile": "modelfiles/chat.Modelfile.j2",
        "serving": Serving(),
        "objective": "speed",
        "gates": Gates(**gates),
        "hosts": {name: Host.model_validate(spec) for name, spec in hosts.items()},
        "slos": {name: Slo(**one) for name, one in (slos or dict.fromkeys(hosts, LEVELS)).items()},
        "corpus_sha256": sha256("evaluation"),
        "logits": "auto",
        "evals": {name: sha256(f"set {name}") for name in changes.pop("evals", ())},
        "alpha": 0.05,
        "compare_required": False,
        "compare_effects": {"decode": 0.03, "prefill": 0.05, "quality": 0.10},
        "stable": "latest",
        "license": None,
        "waivers": (),
    }
    return fields | changes


def calibrate_record(model: str = MODEL, **changes: Any) -> CalibrateRecord:
    """Build the record of an importance matrix."""
    fields: dict[str, Any] = {
        "model": model,
        "f16_sha256": f16_digest(model).sha256,
        "llama_cpp_commit": COMMIT,
        "recipe": 1,
        "corpus": "corpora/calibration.txt",
        "corpus_sha256": sha256("calibration"),
        "context_tokens": 512,
        "chunks_count": 60,
        "entries_count": 28,
        "imatrix": file_digest("imatrix.gguf", 40_000),
    }
    return CalibrateRecord(**(fields | changes))


def quantize_record(type_: str = "Q4_K_M", model: str = MODEL, **changes: Any) -> QuantizeRecord:
    """Build the record of a quantized file; `size_mib` sets its size."""
    key = f"{model}-{type_}"
    size_bytes = round(changes.pop("size_mib", 3.0) * (1 << 20))
    fields: dict[str, Any] = {
        "key": key,
        "model": model,
        "type": type_,
        "f16_sha256": f16_digest(model).sha256,
        "llama_cpp_commit": COMMIT,
        "recipe": 1,
        "imatrix_sha256": None,
        "imatrix_corpus_sha256": None,
        "bits_per_weight": 4.85,
        "tensors_count": 39,
        "tensor_types": {"Q4_K": 24, "Q6_K": 6, "F32": 9},
        "tensor_bytes": {"Q4_K": 2_000_000, "Q6_K": 1_000_000, "F32": 10_000},
        "rules": (),
        "fallbacks": (),
        "gguf": file_digest(f"{key}.gguf", size_bytes),
    }
    return QuantizeRecord(**(fields | changes))


def speed(  # noqa: PLR0913 - a test in full
    test: str = "decode",
    depth_tokens: int = 256,
    median_tok_s: float = 598.0,
    noise: float = 0.01,
    *,
    low_tok_s: float | None = None,
    high_tok_s: float | None = None,
) -> Speed:
    """Build one throughput test whose interval is the median plus and minus a share `noise`."""
    low = median_tok_s * (1 - noise) if low_tok_s is None else low_tok_s
    high = median_tok_s * (1 + noise) if high_tok_s is None else high_tok_s
    return Speed(
        test=cast("Any", test),
        depth_tokens=depth_tokens,
        tokens=512 if test == "prefill" else 128,
        median_tok_s=median_tok_s,
        low_tok_s=low,
        high_tok_s=high,
        samples_tok_s=(low, median_tok_s, high),
        dropped_tok_s=(median_tok_s * 0.9,),
    )


def machine_id(**changes: Any) -> MachineId:
    """Build the identity of a small CPU machine."""
    fields: dict[str, Any] = {
        "hw_id": sha256("hardware"),
        "env_id": sha256("environment"),
        "backend": "cpu",
        "cpu": "Example CPU @ 2.50GHz",
        "cores_count": 2,
        "memory_gib": 8,
        "gpus": (),
    }
    return MachineId(**(fields | changes))


def validity(*reasons: str, **changes: Any) -> Validity:
    """Build a validity block: VALID without reasons, INVALID with them."""
    fields: dict[str, Any] = {
        "verdict": "INVALID" if reasons else "VALID",
        "reasons": reasons,
        "notes": (),
        "load_before": 0.2,
        "load_after": 1.1,
        "steal_share": 0.0,
        "gpu_info": "",
    }
    return Validity(**(fields | changes))


def quality(**changes: Any) -> QualityResult:
    """Build a divergence from f16."""
    fields: dict[str, Any] = {
        "corpus_sha256": sha256("evaluation"),
        "context_tokens": 512,
        "chunks_count": CHUNKS,
        "scored_tokens": CHUNKS * 256,
        "kld_mean_nats": 0.031,
        "kld_mean_error_nats": 0.0003,
        "kld_p999_nats": 1.1,
        "kld_max_nats": 4.2,
        "same_top": 0.921,
        "same_top_error": 0.002,
        "ppl": 12.4,
        "ppl_f16": 12.1,
        "ppl_ratio": 1.025,
        "ppl_ratio_error": 0.001,
    }
    return QualityResult(**(fields | changes))


def embedding_quality(**changes: Any) -> EmbeddingQuality:
    """Build the agreement of an encoder's embeddings with those of its f16."""
    fields: dict[str, Any] = {
        "corpus_sha256": sha256("evaluation"),
        "context_tokens": 512,
        "texts_count": CHUNKS,
        "scored_tokens": CHUNKS * 130,
        "dimensions": 384,
        "cosine_mean": 0.9972,
        "cosine_mean_error": 0.0001,
        "cosine_p01": 0.991,
        "cosine_min": 0.988,
        "same_nearest": 0.96,
    }
    return EmbeddingQuality(**(fields | changes))


def encoder_record(  # noqa: PLR0913 - the numbers that tests vary most
    type_: str = "Q4_K_M",
    model: str = MODEL,
    *,
    prefill_tok_s: float = 9_400.0,
    noise: float = 0.01,
    cosine_mean: float = 0.9972,
    memory_mib: float = 42.0,
    size_mib: float = 3.0,
    **changes: Any,
) -> BenchmarkRecord:
    """Build the record of a measured quant of an encoder; the keywords decide."""
    least = min(cosine_mean, 0.9) if cosine_mean < 1 else 1.0
    fields: dict[str, Any] = {
        "speed": (speed("prefill", 0, prefill_tok_s, noise),),
        "quality": embedding_quality(
            cosine_mean=cosine_mean,
            cosine_mean_error=(1 - cosine_mean) * 0.01,
            cosine_p01=least,
            cosine_min=least,
        ),
    }
    return benchmark_record(
        type_, model, memory_mib=memory_mib, size_mib=size_mib, **(fields | changes)
    )


def memory(**changes: Any) -> Memory:
    """Build the memory at the declared context."""
    fields: dict[str, Any] = {
        "context_tokens": CONTEXT_TOKENS,
        "estimate_mib": 40.0,
        "measured_mib": 42.0,
        "method": "rss",
        "model_mib": 3.0,
        "context_mib": 2.0,
        "compute_mib": 35.0,
    }
    return Memory(**(fields | changes))


def benchmark_record(  # noqa: PLR0913 - the numbers that tests vary most
    type_: str = "Q4_K_M",
    model: str = MODEL,
    *,
    decode_tok_s: float = 598.0,
    noise: float = 0.01,
    kld_mean_nats: float = 0.031,
    memory_mib: float = 42.0,
    size_mib: float = 3.0,
    **changes: Any,
) -> BenchmarkRecord:
    """Build the record of a measured quant; the keywords are the values that decide."""
    built = quantize_record(type_, model, size_mib=size_mib)
    fields: dict[str, Any] = {
        "key": built.key,
        "model": model,
        "type": type_,
        "gguf_sha256": built.gguf.sha256,
        "f16_sha256": built.f16_sha256,
        "size_bytes": built.gguf.size_bytes,
        "llama_cpp_commit": COMMIT,
        "machine": machine_id(),
        "validity": validity(),
        "threads": 2,
        "speed": (
            speed("prefill", 0, decode_tok_s * 6, noise),
            speed("decode", 0, decode_tok_s * 1.1, noise),
            speed("decode", 256, decode_tok_s, noise),
        ),
        "quality": quality(
            kld_mean_nats=kld_mean_nats, kld_mean_error_nats=abs(kld_mean_nats) * 0.01
        ),
        "memory": memory(measured_mib=memory_mib, estimate_mib=memory_mib * 0.95),
        "measured_at": "2026-11-21T08:00:00Z",
        "wall_s": 12.5,
    }
    return BenchmarkRecord(**(fields | changes))


def spread(p50: float, count: int = 40, **changes: Any) -> Spread:
    """Build the spread of a duration whose slowest value is the doubled median."""
    fields: dict[str, Any] = {
        "count": count,
        "p50": p50,
        "p95": p50 * 1.8 if count >= 200 else None,
        "p99": None,
        "max": p50 * 2,
    }
    return Spread(**(fields | changes))


def engine_id(**changes: Any) -> EngineId:
    """Build an Ollama with its own llama-server."""
    fields: dict[str, Any] = {
        "kind": "ollama",
        "version": "0.33.0",
        "llama_cpp": f"b6500 ({COMMIT[:8]})",
        "found_by": "go install",
        "declared": True,
        "sentence": "Ollama 0.33.0, built by go install, with the llama-server of the toolchain",
    }
    return EngineId(**(fields | changes))


def served(type_: str = "Q4_K_M", model: str = MODEL, **changes: Any) -> Served:
    """Build one GGUF as Ollama has it: the file of `quantize_record`, at the declared context."""
    fields: dict[str, Any] = {
        "type": type_,
        "gguf_sha256": quantize_record(type_, model).gguf.sha256,
        "manifest_sha256": sha256(f"{model}-{type_} manifest"),
        "context_tokens": CONTEXT_TOKENS,
        "parallel": 1,
        "gpu_layers": "0",
        "kv_type": "f16",
        "size_bytes": 9 << 20,
        "size_vram_bytes": 0,
        "peak_memory_mib": 180.0,
        "cold_load_ms": 640.0,
    }
    return Served(**(fields | changes))


def load_run(
    concurrency: int | None = 1,
    requests_count: int = 40,
    *,
    hosts: Iterable[str] = ("local",),
    ttft_ms: float = 20.0,
    **changes: Any,
) -> LoadRun:
    """Build a closed run, or with a concurrency of None the open one, in which all went well."""
    many = concurrency or 1
    fields: dict[str, Any] = {
        "name": "open" if concurrency is None else f"c{concurrency}",
        "kind": "open" if concurrency is None else "closed",
        "concurrency": concurrency,
        "rate_per_s": 5.5 if concurrency is None else None,
        "requests_count": requests_count,
        "ok_count": requests_count,
        "errors": {},
        "wall_s": requests_count / 8,
        "prompt_tokens_median": 131.0,
        "output_tokens_median": 64.0,
        "done_reasons": {"length": requests_count},
        "ttft_ms": spread(ttft_ms * many, requests_count),
        "tpot_ms": spread(1.9, requests_count),
        "gap_ms": spread(1.8, requests_count * 64),
        "e2e_ms": spread(ttft_ms * many + 120, requests_count),
        "queue_ms": None,
        "output_tok_s": 510.0,
        "requests_s": 8.0,
        "effective_slots": 1,
        "good_count": dict.fromkeys(hosts, requests_count),
        "kept_count": {host: {"ttft": requests_count, "tpot": requests_count} for host in hosts},
    }
    return LoadRun(**(fields | changes))


def load_gate(name: str = "goodput", host: str = "local", **changes: Any) -> LoadGate:
    """Build a gate on a share that 100 of 100 requests kept."""
    fields: dict[str, Any] = {
        "host": host,
        "name": name,
        "value": 1.0,
        "low": 0.963,
        "high": 1.0,
        "limit": 0.95,
        "outcome": "PASS",
        "more_requests": None,
        "sentence": "100 of 100 requests kept every level: 96.3 to 100.0 %, 95 % needed",
    }
    if name == "memory":
        fields |= {"value": 40.0, "low": 40.0, "high": 40.0, "limit": 1070.0}
    return LoadGate(**(fields | changes))


def load_gates(hosts: Iterable[str] = ("local",), **changes: Any) -> tuple[LoadGate, ...]:
    """Build all gates of some hosts; `changes` are those of the goodput."""
    return tuple(
        load_gate(name, host, **(changes if name == "goodput" else {}))
        for host in hosts
        for name in ("ttft", "tpot", "goodput", "memory")
    )


def golden(**changes: Any) -> Golden:
    """Build two conversations that every renderer makes the same prompt of."""
    fields: dict[str, Any] = {
        "version": 1,
        "sha256": sha256("prompts"),
        "upstream": "transformers 5.17.0",
        "prompts": (
            GoldenPrompt(id="one-line", outcome="PASS", sentence="the same in all renderers"),
            GoldenPrompt(id="system", outcome="PASS", sentence="the same in all renderers"),
        ),
    }
    return Golden(**(fields | changes))


def calibration(**changes: Any) -> Calibration:
    """Build a client that is fast enough."""
    fields: dict[str, Any] = {
        "streams_count": 4,
        "chunks_per_s": 600.0,
        "delay_p50_ms": 0.2,
        "delay_p99_ms": 0.9,
        "send_lag_p99_ms": 1.1,
        "cpu_s_per_1000_chunks": 0.03,
        "client_bound": False,
        "reason": "",
    }
    return Calibration(**(fields | changes))


def degenerate(**changes: Any) -> Degenerate:
    """Build answers that are as sound as those of f16."""
    fields: dict[str, Any] = {
        "prompts_count": 24,
        "degenerate_count": 2,
        "f16_degenerate_count": 2,
        "excess": 0.0,
        "limit": 0.1,
        "outcome": "PASS",
        "sentence": "2 of 24 answers are degenerate, as many as those of f16",
        "kinds": {"loop": 2},
    }
    return Degenerate(**(fields | changes))


def smoke(type_: str = "Q8_0", **changes: Any) -> Smoke:
    """Build the short test of a quant that is not the winner."""
    fields: dict[str, Any] = {
        "served": served(type_),
        "type": type_,
        "requests_count": 10,
        "ok_count": 10,
        "outcome": "PASS",
        "sentence": "loads, renders its prompt and answers 10 of 10 requests",
    }
    return Smoke(**(fields | changes))


def winner_test(
    type_: str = "Q4_K_M",
    hosts: Iterable[str] = ("local",),
    model: str = MODEL,
    **changes: Any,
) -> WinnerTest:
    """Build the whole test of a quant that keeps every level of every host."""
    hosts = tuple(hosts)
    fields: dict[str, Any] = {
        "type": type_,
        "hosts": hosts,
        "served": served(type_, model),
        "golden": golden(),
        "runs": (
            *(load_run(many, hosts=hosts) for many in (1, 2, 4)),
            load_run(None, 100, hosts=hosts),
        ),
        "calibration": calibration(),
        "degenerate": degenerate(),
        "gates": load_gates(hosts),
        "failures": (),
        "invalid": (),
        "notes": (),
    }
    return WinnerTest(**(fields | changes))


def load_test_record(
    chosen: dict[str, str] | None = None, model: str = MODEL, **changes: Any
) -> LoadTestRecord:
    """Build the load test of the winner of each host, {host: type}, with nothing to complain of."""
    chosen = {"local": "Q4_K_M"} if chosen is None else chosen
    by_type: dict[str, list[str]] = {}
    for host, type_ in chosen.items():
        by_type.setdefault(type_, []).append(host)
    fields: dict[str, Any] = {
        "model": model,
        "context_tokens": CONTEXT_TOKENS,
        "slos": dict.fromkeys(chosen, LEVELS),
        "engine": engine_id(),
        "machine": machine_id(),
        "modelfile": "modelfiles/chat.Modelfile.j2",
        "modelfile_sha256": sha256("modelfile"),
        "modelfile_version": 1,
        "winners": tuple(winner_test(type_, hosts, model) for type_, hosts in by_type.items()),
        "smokes": tuple(
            smoke(type_, served=served(type_, model))
            for type_ in ("Q8_0", "Q5_K_M", "Q4_K_M")
            if type_ not in by_type
        ),
        "verdicts": tuple(load_verdict(host, type_) for host, type_ in chosen.items()),
        "measured_at": "2026-11-21T09:00:00Z",
        "wall_s": 61.0,
    }
    return LoadTestRecord(**(fields | changes))


def load_verdict(host: str = "local", winner: str = "Q4_K_M", **changes: Any) -> LoadVerdict:
    """Build what the load test says of one host."""
    fields: dict[str, Any] = {
        "host": host,
        "winner": winner,
        "verdict": "PROMOTE",
        "sentence": "100 of 100 requests kept every level: 96.3 to 100.0 %, 95 % needed",
    }
    return LoadVerdict(**(fields | changes))


def choose_slice(
    types: Iterable[str] = ("Q4_K_M",),
    model: str = MODEL,
    *,
    objective: Objective = "speed",
    gates: dict[str, float] | None = None,
    hosts: dict[str, dict[str, int]] | None = None,
    **effects: float,
) -> ChooseSlice:
    """Build what `choose` reads; gates are those of a 4-bit class unless given."""
    declared = {"max_kld_mean_nats": 0.06} if gates is None else gates
    return ChooseSlice(
        model=model,
        quants={f"{model}-{type_}": cast("QuantType", type_) for type_ in types},
        objective=objective,
        gates=Gates(**declared),
        context_tokens=CONTEXT_TOKENS,
        choose=Choose(**effects),
        hosts={
            name: Host.model_validate(spec)
            for name, spec in (hosts or {"local": {"memory_mib": 2048, "margin_mib": 256}}).items()
        },
    )


def write_model(
    at: Layout,
    model: str = MODEL,
    *,
    quantized: Iterable[QuantizeRecord] = (),
    measured: Iterable[BenchmarkRecord] = (),
) -> None:
    """Write the records of one model where stages look for them, without a choice."""
    records.write(at.model_record("fetch", model), fetch_record(model))
    records.write(at.model_record("convert", model), convert_record(model))
    records.write(at.model_record("verify", model), verify_record(model))
    records.write(at.model_record("calibrate", model), calibrate_record(model))
    records.write(at.model_record("evaluate", model), evaluate_record(model))
    for built in quantized:
        records.write(at.quant_record("quantize", model, built.type), built)
    for one in measured:
        records.write(at.quant_record("benchmark", model, one.type), one)
