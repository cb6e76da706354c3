"""
Speed over the number of layers on the GPU: `fleet load-test MODEL --sweep gpu_layers`.

For the winner, and for each quant that is over the memory of a host: how fast it would answer with
a part of its layers on the card. The table lies beside the benchmarks, so that `choose` sees it at
the next run and can say what a quant that does not fit would still do. It never decides: a host
gets what fits whole.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from pipelines import console, gguf_header, gpu, measuring, prompts, records, toolchain, wording
from pipelines.errors import MachineError, ParamsError
from pipelines.load_examine import Examiner
from pipelines.load_records import SweepPoint, SweepRecord
from pipelines.load_session import NotAnsweredError
from pipelines.load_test import render_modelfile
from pipelines.serving import engine as engines
from pipelines.serving import server

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.layout import Layout
    from pipelines.params import LoadTestSlice
    from pipelines.records import MachineId
    from pipelines.serving.engine import Engine

_SHARES: Final = (0.0, 0.25, 0.5, 0.75, 1.0)


def nothing_to_sweep(backend: str, cards: Sequence[gpu.Card]) -> str:
    """Say why a machine has no layers to move; empty if it has."""
    if backend == "cpu":
        return "there is nothing to sweep: this toolchain serves from the CPU, no layer can move"
    if not cards and backend != "metal":
        return f"there is nothing to sweep: this toolchain is for {backend}, but no card is seen"
    return ""


def run(wanted: LoadTestSlice, at: Layout) -> list[SweepRecord]:
    """
    Sweep the winner and what is over the memory of a host; writes one record for each.

    Returns:
        The records; none where there is nothing to sweep, which is said.

    Raises:
        ParamsError: The model is an encoder, which generates nothing.
    """
    tools = toolchain.load(at)
    why = nothing_to_sweep(tools.backend, gpu.cards())
    if why:
        console.info(why)
        return []
    choice = records.read(at.model_record("choose", wanted.model), records.ChoiceRecord)
    hardware = measuring.this_machine(at)
    examiner = Examiner(
        wanted=wanted,
        at=at,
        prompts=prompts.load(at.prompts),
        modelfile=render_modelfile(wanted, at),
        threads=wanted.threads or hardware["cpu"]["cores_count"],
    )
    if examiner.is_encoder:
        raise ParamsError(
            f"{wanted.model} is an encoder: a sweep compares how fast answers are made, and it "
            "makes none.",
            hint=f"fleet load-test {wanted.model} measures its embeddings.",
        )
    engine = engines.find(wanted.serving, tools, log=examiner.log)
    found = []
    with measuring.one_at_a_time(toolchain.default_cache_root(), f"{wanted.model}, a sweep"):
        for type_ in types_to_sweep(choice):
            record = _sweep(examiner, engine, type_, measuring.machine_id(hardware, tools))
            records.write(at.sweep_record(wanted.model, type_), record)
            found.append(record)
    return found


def types_to_sweep(choice: records.ChoiceRecord) -> list[str]:
    """Return the winners, and the quants that a host has too little memory for."""
    found: dict[str, None] = {}
    for host in choice.hosts:
        for one in host.candidates:
            too_large = (
                host.limit_mib is not None
                and one.memory_mib is not None
                and one.memory_mib + host.margin_mib > host.limit_mib
            )
            if one.type == host.winner or too_large:
                found[one.type] = None
    return list(found)


def layer_counts(layers_count: int) -> list[int]:
    """Return the numbers of layers to try, from none to all."""
    return sorted({round(share * layers_count) for share in _SHARES})


def _sweep(examiner: Examiner, engine: Engine, type_: str, machine: MachineId) -> SweepRecord:
    file = examiner.file(type_)
    header = gguf_header.read(file.path)
    # llama.cpp counts the output layer as one more.
    architecture = header.text("general.architecture")
    layers_count = header.integer(f"{architecture}.block_count") + 1
    return SweepRecord(
        model=examiner.wanted.model,
        type=type_,
        gguf_sha256=file.sha256,
        layers_count=layers_count,
        context_tokens=examiner.wanted.context_tokens,
        machine=machine,
        engine=f"{engine.id.kind} {engine.id.version}",
        points=tuple(
            _point(examiner, engine, type_, layers) for layers in layer_counts(layers_count)
        ),
        measured_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _point(examiner: Examiner, engine: Engine, type_: str, layers: int) -> SweepPoint:
    """Serve with a number of layers on the card; what does not fit is a point without numbers."""
    console.step(f"{type_} with {wording.counted(layers, 'layer')} on the GPU")
    settings = replace(examiner.settings, gpu_layers=layers)
    try:
        with (
            server.open_host(
                engine, settings, model=examiner.wanted.model, at=examiner.at, log=examiner.log
            ) as host,
            host.load(examiner.file(type_)) as loaded,
        ):
            run = examiner.session(loaded).smoke(type_)
            loaded.verify()
            served = loaded.served
    except (MachineError, server.ServingError, NotAnsweredError) as error:
        return SweepPoint(
            gpu_layers=layers,
            size_vram_bytes=None,
            ttft_p50_ms=None,
            output_tok_s=None,
            sentence=wording.clause(error.message),
        )
    return SweepPoint(
        gpu_layers=layers,
        size_vram_bytes=served.size_vram_bytes,
        ttft_p50_ms=run.ttft_ms.p50 if run.ttft_ms else None,
        output_tok_s=run.output_tok_s if run.ok_count else None,
        sentence=f"{run.ok_count} of {run.requests_count} requests answered",
    )
