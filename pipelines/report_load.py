"""
What a load test says, as words and numbers of the report (`pipelines.report_tree`).

Only a test that speaks of what a host is to serve is told (`pipelines.verdict` says which one
does). Of a test that is not to be trusted the reasons are told and what was compared as text; its
times are not.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pipelines import wording
from pipelines.console import clean
from pipelines.report_tree import Finding, LoadBlock, LoadRow
from pipelines.verdict_served import engine_words

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from pipelines.load_records import (
        LoadGate,
        LoadRun,
        LoadTestRecord,
        Served,
        Smoke,
        Spread,
        WinnerTest,
    )
    from pipelines.verdict import HostFinal

_MIB = 1 << 20
_TEXT_CHARACTERS = 400
_LATENCIES = ("ttft", "tpot", "e2e")
_MAX_FAILED_PROMPTS = 5


def blocks(tested: LoadTestRecord, finals: Sequence[HostFinal]) -> tuple[LoadBlock, ...]:
    """Return one block for each test that speaks of a winner, for the hosts that it speaks of."""
    found = []
    for test in tested.winners:
        hosts = tuple(one.host for one in finals if one.test is test)
        if hosts:
            found.append(_block(tested, test, hosts))
    return tuple(found)


def smokes(
    tested: LoadTestRecord, passing: Collection[str], built: Mapping[str, str]
) -> tuple[Finding, ...]:
    """
    Return the short tests; a quant that passed without winning anywhere must have one.

    Args:
        tested: The load test; it speaks of the choice.
        passing: The types of these quants.
        built: sha256 of each GGUF that is there now, by type.
    """
    found = {one.type: one for one in tested.smokes}
    return tuple(
        _smoke(found[type_], built[type_])
        if type_ in found
        else Finding(outcome="FAIL", text=f"{type_}: was not served")
        for type_ in built
        if type_ in found or type_ in passing
    )


# --- one test ---------------------------------------------------------------------------------


def _block(tested: LoadTestRecord, test: WinnerTest, hosts: tuple[str, ...]) -> LoadBlock:
    trusted = not test.invalid
    runs = test.runs if trusted else ()
    if test.embeddings is not None:
        tested = _without_tokens(tested)
    return LoadBlock(
        type=test.type,
        hosts=hosts,
        title=_title(tested, test),
        doubts=tuple(wording.sentence(_tidy(text)) for text in test.invalid),
        rows=_rows(runs, tested, hosts),
        slos=tuple(tested.slos.get(host, {}) for host in hosts),
        levels=tuple(_levels(tested, test, hosts)) if trusted else (),
        capacity=tuple(_capacities(tested, test, hosts)) if trusted else (),
        checks=tuple(_checks(test)),
        facts=tuple((label, _tidy(text)) for label, text in _facts(tested, test)),
        notes=tuple(dict.fromkeys(_tidy(note) for note in _notes(test))),
    )


def _without_tokens(tested: LoadTestRecord) -> LoadTestRecord:
    """Leave out the levels that no embedding was judged by: it comes in one piece."""
    slos = {
        host: {name: limit for name, limit in slo.items() if name not in {"ttft_ms", "tpot_ms"}}
        for host, slo in tested.slos.items()
    }
    return tested.model_copy(update={"slos": slos})


def _title(tested: LoadTestRecord, test: WinnerTest) -> str:
    """Say what was served by what: `Q4_K_M on Ollama 0.33.0, llama.cpp b6500, 512 tokens`."""
    engine = engine_words(tested)
    build = f" with llama.cpp {_tidy(tested.engine.llama_cpp)}" if tested.engine else ""
    return (
        f"{test.type} on {engine}{build}, {wording.tokens(tested.context_tokens)} tokens of context"
    )


def run_row(run: LoadRun, good: Mapping[str, str] | str) -> LoadRow:
    """
    Return one run as a row.

    Args:
        run: The run.
        good: The share of requests that kept the levels, in words; by host where that differs.
    """
    return LoadRow(
        name=_run_words(run),
        concurrency=run.concurrency if run.kind == "closed" else None,
        requests_count=run.requests_count,
        ok_count=run.ok_count,
        failed_count=run.requests_count - run.ok_count,
        ttft_p50_ms=_p50(run.ttft_ms),
        ttft_p95_ms=run.ttft_ms.p95 if run.ttft_ms else None,
        ttft_max_ms=run.ttft_ms.max if run.ttft_ms else None,
        tpot_p50_ms=_p50(run.tpot_ms),
        e2e_p50_ms=_p50(run.e2e_ms),
        output_tok_s=run.output_tok_s,
        requests_s=run.requests_s,
        good={"": good} if isinstance(good, str) else good,
    )


def _p50(spread: Spread | None) -> float | None:
    return spread.p50 if spread else None


def _run_words(run: LoadRun) -> str:
    """Write `4 at a time`, `at random, 5.5/s`, `soak, 5.5/s`."""
    if run.kind == "closed":
        return f"{run.concurrency or 0:,} at a time"
    rate = f", {wording.number(run.rate_per_s)}/s" if run.rate_per_s else ""
    return f"{'at random' if run.kind == 'open' else 'soak'}{rate}"


def _rows(
    runs: Sequence[LoadRun], tested: LoadTestRecord, hosts: tuple[str, ...]
) -> tuple[LoadRow, ...]:
    """Return the runs, with one share of good requests if it is that of every host."""
    shares = [{host: _good_words(run, tested, host) for host in hosts} for run in runs]
    if any(len(set(by_host.values())) > 1 for by_host in shares):
        return tuple(run_row(run, by_host) for run, by_host in zip(runs, shares, strict=True))
    return tuple(run_row(run, by_host[hosts[0]]) for run, by_host in zip(runs, shares, strict=True))


def _good_words(run: LoadRun, tested: LoadTestRecord, host: str) -> str:
    """Write the share of requests that kept every level of a host; a dash if none is declared."""
    good = run.good_count.get(host)
    if good is None or not run.requests_count or not _latencies(tested, host):
        return wording.ABSENT
    return wording.percent(good / run.requests_count, 3)


# --- levels -----------------------------------------------------------------------------------


def _latencies(tested: LoadTestRecord, host: str) -> dict[str, float]:
    """Return the declared latencies of a host, in milliseconds."""
    slo = tested.slos.get(host, {})
    return {name: slo[f"{name}_ms"] for name in _LATENCIES if f"{name}_ms" in slo}


def _levels(tested: LoadTestRecord, test: WinnerTest, hosts: tuple[str, ...]) -> Iterator[Finding]:
    """Yield every level of every host; several hosts of which the same is said are named once."""
    said: dict[tuple[str, str], list[str]] = {}
    for host in hosts:
        gates = [gate for gate in test.gates if gate.host == host]
        for gate in sorted(gates, key=lambda gate: gate.name != "goodput"):
            text = _goodput(gate, tested, test) if gate.name == "goodput" else gate.sentence
            said.setdefault((gate.outcome, _tidy(text).rstrip(".")), []).append(host)
    for (outcome, text), names in said.items():
        where = "" if len(names) == len(hosts) else f"on {wording.listed(names)}: "
        yield Finding(outcome=outcome, text=f"{where}{text}")


def _goodput(gate: LoadGate, tested: LoadTestRecord, test: WinnerTest) -> str:
    """
    Say how many requests kept which levels.

    `100 of 100 requests kept ttft <= 300 ms, tpot <= 50 ms: 96.3-100 %, 95 % needed`
    """
    judged = next((run for run in test.runs if run.kind == "open"), None)
    if judged is None or gate.host not in judged.good_count:
        return gate.sentence
    latencies = _latencies(tested, gate.host)
    levels = ", ".join(
        f"{name} <= {wording.declared(limit)} ms" for name, limit in latencies.items()
    )
    kept = f"kept {levels}" if levels else "were answered; no latency is declared"
    needed = gate.limit * 100
    share = "-".join(wording.beyond(end * 100, needed) for end in (gate.low, gate.high))
    counts = f"{judged.good_count[gate.host]:,} of {judged.requests_count:,} requests"
    said = f"{counts} {kept}: {share} %, {wording.declared(round(needed, 9))} % needed"
    if gate.outcome != "INCONCLUSIVE":
        return said
    if gate.more_requests is None:
        return f"{said}; it lies on the limit, and no number of requests would decide"
    return f"{said}; about {gate.more_requests:,} more requests would decide"


def _capacities(tested: LoadTestRecord, test: WinnerTest, hosts: tuple[str, ...]) -> Iterator[str]:
    """Say for each host up to which step of the ladder enough requests kept the levels."""
    said: dict[str, list[str]] = {}
    for host in hosts:
        if text := _capacity(tested, test, host):
            said.setdefault(text, []).append(host)
    for text, names in said.items():
        where = f"On {wording.listed(names)} {wording.clause(text)}."
        yield text if len(names) == len(hosts) else where


def _capacity(tested: LoadTestRecord, test: WinnerTest, host: str) -> str:
    needed = tested.slos.get(host, {}).get("min_goodput")
    ladder = sorted(
        (run.concurrency, run) for run in test.runs
        if run.kind == "closed" and run.concurrency is not None and run.requests_count
    )  # fmt: skip
    if needed is None or not ladder or not _latencies(tested, host):
        return ""
    best: tuple[int, LoadRun] | None = None
    for concurrency, run in ladder:
        if run.good_count.get(host, 0) / run.requests_count < needed:
            break
        best = concurrency, run
    if best is None:
        low, run = ladder[0]
        good = f"{run.good_count.get(host, 0):,} of {run.requests_count:,}"
        return f"Not even {low:,} at a time keeps the levels: {good} requests did."
    concurrency, run = best
    good = f"{run.good_count.get(host, 0):,} of {run.requests_count:,}"
    most = ", the most that was tried" if concurrency == ladder[-1][0] else ""
    return (
        f"The highest concurrency that keeps the levels is {concurrency:,}{most} ({good} requests)."
    )


# --- what else was looked at ------------------------------------------------------------------


def _checks(test: WinnerTest) -> Iterator[Finding]:
    for text in test.failures:
        yield Finding(outcome="FAIL", text=_tidy(text))
    if test.golden is not None:
        yield _golden(test)
    if test.embeddings is not None and test.embeddings.outcome == "PASS":
        yield Finding(outcome="PASS", text=_tidy(test.embeddings.sentence))
    if test.degenerate is not None:
        one = test.degenerate
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in one.kinds.items() if count)
        text = _tidy(one.sentence).rstrip(".") + (f" ({_tidy(kinds)})" if kinds else "")
        yield Finding(outcome=one.outcome, text=text)
    yield from _regressions(test)


def _regressions(test: WinnerTest) -> Iterator[Finding]:
    """Tell each declared question that was not answered as expected, and count the others."""
    good = sum(one.outcome == "PASS" for one in test.regressions)
    if good:
        of = f"{good:,} of {wording.counted(len(test.regressions), 'prompt regression')}"
        yield Finding(outcome="PASS", text=f"{of} answered as expected")
    for one in test.regressions:
        if one.outcome != "PASS":
            yield Finding(
                outcome=one.outcome,
                text=f"{_tidy(one.id)}: {wording.clause(_tidy(one.sentence))}",
                lines=tuple(_line(miss) for miss in one.misses),
            )


def _golden(test: WinnerTest) -> Finding:
    """Count the prompts that are the same, and show the first that is not."""
    assert test.golden is not None, "by the caller"
    prompts = test.golden.prompts
    failed = [prompt for prompt in prompts if prompt.outcome == "FAIL"]
    equal = sum(prompt.outcome == "PASS" for prompt in prompts)
    skipped = len(prompts) - equal - len(failed)
    text = f"{equal:,} of {len(prompts):,} golden prompts are equal to those of upstream"
    if skipped:
        text += f", {skipped:,} cannot be compared"
    said = [
        f"{_tidy(prompt.id)}: {wording.clause(_tidy(prompt.sentence))}"
        for prompt in failed[:_MAX_FAILED_PROMPTS]
    ]
    if len(failed) > _MAX_FAILED_PROMPTS:
        said.append(f"and {len(failed) - _MAX_FAILED_PROMPTS:,} more")
    diff = next((prompt.diff for prompt in failed if prompt.diff), ())
    outcome = "FAIL" if failed or not equal else "PASS"
    return Finding(
        outcome=outcome,
        text="; ".join([text, *said]),
        lines=tuple(_line(each) for each in diff),
    )


def _smoke(one: Smoke, built_sha256: str) -> Finding:
    text = f"{one.type}: {wording.clause(_tidy(one.sentence))}"
    served = one.served.gguf_sha256 if one.served else None
    if one.outcome == "PASS" and served != built_sha256:
        return Finding(outcome="FAIL", text=f"{one.type}: what was served is another file")
    return Finding(outcome=one.outcome, text=text)


def _facts(tested: LoadTestRecord, test: WinnerTest) -> Iterator[tuple[str, str]]:
    """Yield what identifies and bounds the test, for those who check it."""
    engine = tested.engine
    if engine is not None:
        yield "engine", f"{engine_words(tested)}, llama.cpp {engine.llama_cpp}: {engine.sentence}"
    if test.served is not None:
        yield from _served_facts(test.served, test)
    yield (
        "Modelfile",
        f"{tested.modelfile}, version {tested.modelfile_version}, sha256 {tested.modelfile_sha256}",
    )
    if test.golden is not None:
        golden = test.golden
        yield (
            "golden prompts",
            f"version {golden.version}, sha256 {golden.sha256}; upstream: {golden.upstream}",
        )
    if test.calibration is not None:
        yield "client", _client_words(test)
    minutes = f"{tested.measured_at[:10]}, in {wording.number(tested.wall_s)} s"
    yield "tested", minutes


def _served_facts(served: Served, test: WinnerTest) -> Iterator[tuple[str, str]]:
    if served.manifest_sha256:
        yield "manifest", f"sha256 {served.manifest_sha256}"
    yield "served file", f"sha256 {served.gguf_sha256}"
    load_ms = wording.number(served.cold_load_ms)
    yield "cold load", f"{load_ms} ms to the first byte, the file in the page cache"
    slots = max((run.effective_slots for run in test.runs), default=None)
    known = slots is not None and not test.invalid and test.embeddings is None
    seen = f", {slots:,} seen at work" if known else ""
    yield "slots", f"{served.parallel:,} declared{seen}"
    size = f"; {wording.mib(served.size_bytes / _MIB)}" if served.size_bytes else ""
    on_gpu = (
        f", {wording.mib(served.size_vram_bytes / _MIB)} of it on the GPU"
        if served.size_bytes and served.size_vram_bytes is not None
        else ""
    )
    peak = f"; {wording.mib(served.peak_memory_mib)} at most" if served.peak_memory_mib else ""
    experts = (
        f"experts of {served.cpu_moe_layers} layers in main memory, "
        if served.cpu_moe_layers
        else ""
    )
    yield (
        "memory",
        f"gpu_layers {served.gpu_layers}, {experts}cache {served.kv_type}{size}{on_gpu}{peak}",
    )


def _client_words(test: WinnerTest) -> str:
    """Say how well the client keeps time; a client that is too slow measures itself."""
    one = test.calibration
    assert one is not None, "by the caller"
    lag = (
        f", sends {wording.number(one.send_lag_p99_ms)} ms late at p99"
        if one.send_lag_p99_ms is not None
        else ""
    )
    bound = f"; client-bound: {one.reason}" if one.client_bound else ""
    return (
        f"adds {wording.number(one.delay_p99_ms)} ms at p99 to "
        f"{wording.counted(one.streams_count, 'stream')} of a null server at "
        f"{wording.number(one.chunks_per_s)} chunks a second{lag}; "
        f"{wording.number(one.cpu_s_per_1000_chunks)} CPU seconds for 1,000 chunks{bound}"
    )


def _notes(test: WinnerTest) -> Iterator[str]:
    yield from (wording.sentence(note) for note in test.notes)
    if not test.invalid:
        failed: Counter[str] = Counter()
        for run in test.runs:
            failed.update(run.errors)
        if classes := ", ".join(f"{count:,} {name}" for name, count in failed.most_common()):
            yield f"Requests that failed, in all runs: {classes}."
        yield from (wording.sentence(note) for run in test.runs for note in run.notes)


# --- text from elsewhere ----------------------------------------------------------------------


def _tidy(text: str) -> str:
    """Make text of a record one short harmless line."""
    return wording.shortened(" ".join(clean(text).split()), _TEXT_CHARACTERS)


def _line(text: str) -> str:
    """Keep the blanks of a line of a diff: they may be what differs."""
    return wording.shortened(clean(text.replace("\n", " ")), _TEXT_CHARACTERS)
