"""
The chosen quant of one model in a real server, byte for byte the file that was measured.

For each quant that a host chose: served alone from a private server, its rendering of the golden
prompts compared with the upstream template's, driven up a ladder of concurrencies and by random
arrivals, its greedy answers compared with those of f16, and judged by the service levels of the
hosts that chose it. Every other quant that passed its gates gets a smoke: load, one golden prompt,
a few requests (`pipelines.load_examine`).

What is wrong with a quant or its server is data (REJECT, or INVALID where the numbers themselves
are not to be trusted), and the record is written. What is wrong with this machine, no engine, no
compiler, a declaration that cannot be served, is an error and leaves no record.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipelines import (
    atomic,
    console,
    load_records,
    load_verdict,
    measuring,
    prompts,
    records,
    upstream_chat,
)
from pipelines.load_examine import Examiner, F16Answers
from pipelines.load_records import LoadTestRecord
from pipelines.serving import engine as engines
from pipelines.serving import modelfile, server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.load_records import EngineId, Smoke, WinnerTest
    from pipelines.params import LoadTestSlice, PublishSlice
    from pipelines.records import ChoiceRecord
    from pipelines.serving.modelfile import Modelfile
    from pipelines.toolchain import Toolchain
    from pipelines.upstream_chat import Reference

# A longer one is no licence; its name is laid beside the model then.
_LICENSE_BYTES = 1 << 20
_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "COPYING")


def run(slice_: LoadTestSlice, at: Layout) -> LoadTestRecord:
    """Serve and load what `choose` has chosen; writes the headline numbers for `dvc metrics`."""
    from pipelines import toolchain  # noqa: PLC0415 - not for tests of the rest

    choice = records.read(at.model_record("choose", slice_.model), records.ChoiceRecord)
    record = load_test(slice_, choice, at, toolchain.load(at), lock=toolchain.default_cache_root())
    atomic.write_json(at.load_metrics(slice_.model), load_records.metrics_rows(record))
    return record


def load_test(
    wanted: LoadTestSlice, choice: ChoiceRecord, at: Layout, tools: Toolchain, *, lock: Path
) -> LoadTestRecord:
    """
    Test every winner whole and every other passing quant briefly.

    Args:
        wanted: What is served, how, and the levels to keep.
        choice: What was chosen for each host.
        at: The checkout; its records say which bytes these are.
        tools: The llama.cpp that serves, below Ollama too.
        lock: Directory, common to all checkouts of this user, in which machines are locked.

    Raises:
        RecordError: There is no record of a chosen quant.
        DigestError: A GGUF does not have the recorded bytes.
        MachineError: No engine can be had, or this machine cannot hold the model.
        ParamsError: The Modelfile or the prompts are wrong.
    """
    rendered = render_modelfile(wanted, at)
    hardware = measuring.this_machine(at)
    started = time.monotonic()
    examiner = Examiner(
        wanted=wanted,
        at=at,
        prompts=prompts.load(at.prompts),
        modelfile=rendered,
        threads=wanted.threads or hardware["cpu"]["cores_count"],
    )
    engine: EngineId | None = None
    winners: tuple[WinnerTest, ...] = ()
    smokes: tuple[Smoke, ...] = ()
    if any(host.winner is not None for host in choice.hosts):
        with measuring.one_at_a_time(lock, f"{wanted.model} under load"):
            engine, winners, smokes = _serve(examiner, choice, tools)
    else:
        console.info("nothing was chosen, so nothing is served")
    return LoadTestRecord(
        model=wanted.model,
        context_tokens=wanted.context_tokens,
        slos={host: slo.model_dump(exclude_none=True) for host, slo in wanted.slos.items()},
        engine=engine,
        machine=measuring.machine_id(hardware, tools),
        modelfile=wanted.modelfile,
        modelfile_sha256=rendered.digest(),
        modelfile_version=rendered.version,
        winners=winners,
        smokes=smokes,
        verdicts=tuple(
            load_verdict.of_host(host, winners, smokes, engine) for host in choice.hosts
        ),
        measured_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        wall_s=round(time.monotonic() - started, 3),
    )


def render_modelfile(wanted: LoadTestSlice | PublishSlice, at: Layout) -> Modelfile:
    """
    Render the declared Modelfile for a model.

    Raises:
        ParamsError: It is wrong; with its file and line.
    """
    return modelfile.render(
        at.root / wanted.modelfile,
        model=wanted.model,
        context_tokens=wanted.context_tokens,
        license=_license(wanted, at),
    )


def _license(wanted: LoadTestSlice | PublishSlice, at: Layout) -> str:
    """Return the licence text that upstream ships, or the name of it, or nothing."""
    for name in _LICENSE_FILES:
        path = at.source(wanted.model) / name
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if path.stat().st_size <= _LICENSE_BYTES:
                return path.read_text(encoding="utf-8")
    fetched = records.read(at.model_record("fetch", wanted.model), records.FetchRecord)
    return fetched.license or ""


def _serve(
    examiner: Examiner, choice: ChoiceRecord, tools: Toolchain
) -> tuple[EngineId, tuple[WinnerTest, ...], tuple[Smoke, ...]]:
    """Start the engine once and test one file after the other in it."""
    wanted, at = examiner.wanted, examiner.at
    engine = engines.find(wanted.serving, tools, log=examiner.log)
    (console.info if engine.id.declared else console.warn)(engine.id.sentence)
    hosts = _hosts_by_winner(choice)
    with (
        _upstream(examiner) as reference,
        server.open_host(
            engine, examiner.settings, model=wanted.model, at=at, log=examiner.log
        ) as host,
    ):
        f16 = F16Answers(examiner, host)
        winners = tuple(
            examiner.winner(host, reference(), f16, type_, names) for type_, names in hosts.items()
        )
        smokes = tuple(
            examiner.smoke(host, reference(), type_)
            for type_ in passing(choice, wanted)
            if type_ not in hosts
        )
    return engine.id, winners, smokes


@contextlib.contextmanager
def _upstream(examiner: Examiner) -> Iterator[Callable[[], Reference | None]]:
    """Let upstream render the golden prompts meanwhile; an encoder has no template to render by."""
    if examiner.is_encoder:
        yield lambda: None
        return
    with upstream_chat.start(
        examiner.at.source(examiner.wanted.model),
        examiner.prompts,
        examiner.log,
        system=examiner.modelfile.system or "",
        messages=[
            {"role": each.role, "content": each.content} for each in examiner.modelfile.messages
        ],
    ) as pending:
        yield pending.result


def _hosts_by_winner(choice: ChoiceRecord) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = defaultdict(list)
    for host in choice.hosts:
        if host.winner is not None:
            found[host.winner].append(host.host)
    return {type_: tuple(hosts) for type_, hosts in found.items()}


def passing(choice: ChoiceRecord, wanted: LoadTestSlice) -> list[str]:
    """Return the types that passed their gates on some host: those that a release may hold."""
    found = {
        one.type
        for host in choice.hosts
        for one in host.candidates
        if one.verdict in {"CHOSEN", "PASS"}
    }
    return [type_ for type_ in wanted.quants.values() if type_ in found]
