"""
What a load test leaves behind: one record for each model, and the parts of which it is made.

Times are milliseconds of the monotonic clock of the client. Counts of tokens are the server's own,
never estimated from text or chunks: a chunk is not a token.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines import absent
from pipelines.records import Finite, MachineId, Part, Record, Validity

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]
# Everything that can be wrong with one request; `ok` is the only success. Source of the failures
# behind each: the streaming code of Ollama 0.33 (server/routes.go, llm/llama_server.go).
ErrorClass = Literal[
    "connect",  # refused, reset before the status line, name not found
    "http_4xx",
    "http_5xx",
    "error_in_stream",  # an error line inside a 200
    "truncated_stream",  # the end without `done` / `[DONE]`
    "loop",  # the repeat guard: a 200 that ends without `done` after equal chunks
    "malformed",  # a line that is no JSON, or not of the dialect
    "empty_output",  # `done` and no token
    "cut_context",  # the server read fewer prompt tokens than were sent
    "timeout",
]


class EngineId(Part):
    """
    What served: `version` as it says itself, `llama_cpp` the build line of its llama-server.

    `found_by` says where it came from. `declared` is false where the toolchain's llama-server
    stands in for an Ollama that could not be had; what it measured is real, but no promotion.
    """

    kind: Literal["ollama", "llama-server", "remote"]
    version: str
    llama_cpp: str
    found_by: Literal["PATH", "go install", "release archive", "toolchain", "url"]
    declared: bool
    sentence: str


class Served(Part):
    """
    One GGUF as the server has it.

    `manifest_sha256` is the digest of our manifest that /api/tags gave back (Ollama only). Sizes
    are what the server reports; None where it does not.
    """

    type: str
    gguf_sha256: str
    manifest_sha256: str | None
    context_tokens: int
    parallel: int
    gpu_layers: str
    kv_type: str
    size_bytes: int | None
    size_vram_bytes: int | None
    peak_memory_mib: Finite | None
    # From the first request to its first byte; includes 250 ms in which Ollama polls. The file has
    # just been hashed, so it comes from the page cache and not from the disk.
    cold_load_ms: Finite
    # As declared: first layers whose experts stay in main memory; None, and not written, if none.
    cpu_moe_layers: int | str | None = Field(None, exclude_if=absent.is_none)


class Spread(Part):
    """
    Median and percentiles of a duration; None where the sample does not carry the percentile.

    p95 needs 200 values, p99 needs 1,000: then ten lie above it.
    """

    count: int
    p50: Finite
    p95: Finite | None
    p99: Finite | None
    max: Finite


class LoadRun(Part):
    """
    One run of the generator.

    `ttft_ms` and `e2e_ms` count from the scheduled start of a request, so that waiting for a slot
    or for the client is inside; `e2e_ms` ends with the last content. `tpot_ms` is (end - first
    content) / (tokens - 1) of a request, where the end is the server's word that it is done: the
    token that ends an answer is counted and has no content. `gap_ms` are the pauses between its
    chunks; `queue_ms` what the server says a request waited, None where it does not say.
    `good_count` is the number of requests that kept all levels, by host; `kept_count` the number
    that kept each declared one, by host and "ttft", "tpot" or "e2e". A request that failed keeps
    none.
    """

    name: str
    kind: Literal["closed", "open", "soak"]
    concurrency: int | None
    rate_per_s: Finite | None
    requests_count: int
    ok_count: int
    errors: dict[str, int]
    wall_s: Finite
    prompt_tokens_median: Finite | None
    output_tokens_median: Finite | None
    done_reasons: dict[str, int]
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    gap_ms: Spread | None
    e2e_ms: Spread | None
    queue_ms: Spread | None
    output_tok_s: Finite
    requests_s: Finite
    effective_slots: int
    good_count: dict[str, int]
    kept_count: dict[str, dict[str, int]]
    # From the scheduled start of a request to its send; None of a closed run: it has no schedule.
    send_lag_p99_ms: Finite | None = None
    notes: tuple[str, ...] = ()


class Calibration(Part):
    """
    The client against a null server that streams at the pace of the real one.

    `delay_p99_ms` is from the server's send to the client's stamp of a chunk, `send_lag_p99_ms`
    from the scheduled start of a request to its send in the real open run. A client that is too
    slow makes the run INVALID: `reason` then says by how much. `null_late_p99_ms` is by how much
    the null server itself was behind its pace; it is in none of the delays.
    """

    streams_count: int
    chunks_per_s: Finite
    delay_p50_ms: Finite
    delay_p99_ms: Finite
    send_lag_p99_ms: Finite | None
    null_late_p99_ms: Finite | None = None
    cpu_s_per_1000_chunks: Finite
    client_bound: bool
    reason: str


class GoldenPrompt(Part):
    """One conversation: whether every renderer made the same prompt of it, and where not."""

    id: str
    outcome: Literal["PASS", "FAIL", "SKIPPED"]
    sentence: str
    diff: tuple[str, ...] = ()


class Golden(Part):
    """All conversations; `upstream` names the reference, `version` and `sha256` the prompts."""

    version: int
    sha256: str
    upstream: str
    prompts: tuple[GoldenPrompt, ...]


class Degenerate(Part):
    """
    Greedy answers that loop, never end or hold one token, beside those of f16.

    `excess` is (answers worse than f16's - better ones) / prompts answered by both; f16 counts are
    None where the host cannot hold f16, and then nothing is judged.
    """

    prompts_count: int
    degenerate_count: int
    f16_degenerate_count: int | None
    excess: Finite | None
    limit: Finite
    outcome: Outcome
    sentence: str
    kinds: dict[str, int]


class EmbeddingCheck(Part):
    """
    Embeddings that the engine serves beside those that the toolchain's llama.cpp makes of the file.

    `cosine_min` is the smallest cosine over `texts_count` texts, `limit` what it must reach.
    """

    texts_count: int
    cosine_min: Finite
    limit: Finite
    outcome: Literal["PASS", "FAIL"]
    sentence: str


class Smoke(Part):
    """A published quant that is not the winner: loaded, one golden prompt, a few requests."""

    served: Served | None
    type: str
    requests_count: int
    ok_count: int
    outcome: Literal["PASS", "FAIL"]
    sentence: str


class LoadGate(Part):
    """
    One service level of one host.

    `value` is the measured share or amount, [`low`, `high`] its interval (equal for an amount),
    `more_requests` how many further ones would decide an inconclusive one.
    """

    host: str
    name: Literal["ttft", "tpot", "e2e", "goodput", "error_rate", "memory"]
    value: Finite
    low: Finite
    high: Finite
    limit: Finite
    outcome: Outcome
    more_requests: int | None
    sentence: str


class LoadVerdict(Part):
    """What follows for one host."""

    host: str
    winner: str | None
    verdict: Literal["PROMOTE", "HOLD", "REJECT", "INVALID"]
    sentence: str


class RegressionResult(Part):
    """
    One declared question: how many of its answers were as expected.

    [`low`, `high`] is Wilson's interval of `share`; `misses` are the first answers that were not
    as expected, each with its reason.
    """

    id: str
    repeats_count: int
    pass_count: int
    share: Finite
    low: Finite
    high: Finite
    min_pass_share: Finite
    outcome: Outcome
    sentence: str
    misses: tuple[str, ...] = ()


class WinnerTest(Part):
    """The whole test of one winning quant: `hosts` are those that chose it."""

    type: str
    hosts: tuple[str, ...]
    served: Served | None
    golden: Golden | None
    runs: tuple[LoadRun, ...]
    calibration: Calibration | None
    degenerate: Degenerate | None
    regressions: tuple[RegressionResult, ...] = ()
    gates: tuple[LoadGate, ...]
    # What the quant or its server failed at, beside the gates: it could not be loaded, say.
    failures: tuple[str, ...]
    # Why the numbers cannot be trusted; empty if they can.
    invalid: tuple[str, ...]
    notes: tuple[str, ...]
    # Of the machine while it was under load; None if it never was. Its reasons are in `invalid`.
    validity: Validity | None = None
    # Of an encoder, in the place of golden prompts, greedy answers and regressions.
    embeddings: EmbeddingCheck | None = Field(None, exclude_if=absent.is_none)


class LoadTestRecord(Record):
    """
    What serving the chosen quants showed.

    `slos` are the declared levels by host, resolved, as {name of `params.Slo`: value}; a level
    that nobody declared is not in it.
    """

    stage: Literal["load-test"] = "load-test"
    model: str
    context_tokens: int
    slos: dict[str, dict[str, Finite]]
    engine: EngineId | None
    machine: MachineId
    modelfile: str
    # Of the rendered Modelfile's directives without FROM.
    modelfile_sha256: str
    modelfile_version: int
    winners: tuple[WinnerTest, ...]
    smokes: tuple[Smoke, ...]
    verdicts: tuple[LoadVerdict, ...]
    measured_at: str
    wall_s: Finite


class SweepPoint(Part):
    """One number of layers; what was not measured is None, and `sentence` says why."""

    gpu_layers: int
    size_vram_bytes: int | None
    ttft_p50_ms: Finite | None
    output_tok_s: Finite | None
    sentence: str


class SweepRecord(Record):
    """One quant over the layers on the GPU, one request at a time."""

    stage: Literal["sweep"] = "sweep"
    model: str
    type: str
    gguf_sha256: str
    layers_count: int
    context_tokens: int
    machine: MachineId
    engine: str
    points: tuple[SweepPoint, ...]
    measured_at: str


def metrics_rows(record: LoadTestRecord) -> dict[str, dict[str, float]]:
    """
    Return the headline numbers by type, for `dvc metrics diff` and MLflow; units at the end.

    A number of one run ends in what ran: `_c4` four requests at a time, `_open` random arrivals,
    `_soak` the same for long. A test that is not to be trusted gives no numbers at all.
    """
    return {test.type: _metrics_row(test) for test in record.winners if not test.invalid}


def _metrics_row(test: WinnerTest) -> dict[str, float]:
    values: dict[str, float | None] = {}
    if test.served is not None:
        values["cold_load_ms"] = test.served.cold_load_ms
        values["peak_memory_mib"] = test.served.peak_memory_mib
    for run in test.runs:
        end = f"c{run.concurrency}" if run.kind == "closed" else run.kind
        values |= _of_spread("ttft", run.ttft_ms, end)
        values |= _of_spread("tpot", run.tpot_ms, end)
        values |= _of_spread("e2e", run.e2e_ms, end)
        values[f"requests_s_{end}"] = run.requests_s
        if test.embeddings is None:  # which come in one piece
            values[f"output_tok_s_{end}"] = run.output_tok_s
            values[f"effective_slots_{end}"] = run.effective_slots
        if run.requests_count:
            values[f"error_rate_{end}"] = 1 - run.ok_count / run.requests_count
            for host, good in run.good_count.items():
                values[f"goodput_{end}_{host}"] = good / run.requests_count
    if test.degenerate is not None:
        values["degenerate_excess"] = test.degenerate.excess
    return {name: value for name, value in values.items() if value is not None}


def _of_spread(name: str, spread: Spread | None, end: str) -> dict[str, float | None]:
    if spread is None:
        return {}
    return {f"{name}_p50_ms_{end}": spread.p50, f"{name}_p95_ms_{end}": spread.p95}
