"""
`fleet quantize KEY --explain`: what a quant will be, before anything is quantized.

Size, bits per weight, the type of every tensor, which rule decides how many, fallbacks, and the
memory at the declared context. llama-quantize decides (`--dry-run`) and llama-fit-params plans on a
file that has the predicted header and a hole for its weights; so the prediction is made by the
code that does the work. Nothing is kept.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines import (
    architectures,
    atomic,
    benchmark,
    console,
    gguf_header,
    llama_fit_params,
    llamacpp,
    machine,
    proc,
    quantize,
    records,
    tensor_mix,
    tensor_rules,
    toolchain,
    wording,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.gguf_header import Header
    from pipelines.layout import Layout
    from pipelines.llama_fit_params import MemoryEstimate
    from pipelines.params import BenchmarkSlice, QuantizeSlice
    from pipelines.tensor_mix import Prediction
    from pipelines.toolchain import Toolchain

_MIB = 1 << 20
# Every fallback is shown here, however many the declaration allows.
_ANY_FALLBACKS = 100_000


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """
    A quant before it is made.

    Attributes:
        wanted: The declaration, with all rules.
        mix: Type of every tensor, rules, fallbacks.
        tensor_bytes: Bytes by type, largest first.
        size_bytes: Size of the file; the real one may have a few KB more of metadata.
        bits_per_weight: Of the tensor data, as llama-quantize counts them.
        context_tokens: Context for which memory is planned.
        memory: Planned by llama.cpp at that context.
        allowed_fallbacks: What the declaration allows.
    """

    wanted: QuantizeSlice
    mix: Prediction
    tensor_bytes: Mapping[str, int]
    size_bytes: int
    bits_per_weight: float
    context_tokens: int
    memory: MemoryEstimate
    allowed_fallbacks: int


def main(declared: QuantizeSlice, measured: BenchmarkSlice, at: Layout, *, as_json: bool) -> int:
    """
    Explain one quant on the terminal.

    Raises:
        ParamsError: The declaration does not fit the model.
        ToolError: A tool failed or printed what cannot be trusted.
    """
    found = explain(declared, measured, at, toolchain.load(at))
    console.out(json_text(found) if as_json else text(found))
    return 0


def explain(
    declared: QuantizeSlice, measured: BenchmarkSlice, at: Layout, tools: Toolchain
) -> Explanation:
    """Predict a quant; see `main` for the errors."""
    convert = records.read(at.model_record("convert", declared.model), records.ConvertRecord)
    source, wanted, calibration = quantize.prepared(declared, at, convert)
    lenient = wanted.model_copy(update={"max_fallbacks": _ANY_FALLBACKS})
    log = at.log("quantize", f"{wanted.key}-explain")
    log.unlink(missing_ok=True)
    plan = proc.run(
        quantize.quantize_argv(tools, lenient, source, output=None),
        log=log,
        cwd=at.imatrix_dir(wanted.model) if calibration else at.f16(wanted.model).parent,
        env=llamacpp.environment(tools),
        inherit_env=False,
    )
    mix = tensor_mix.predict(source, lenient, plan.stderr)
    by_type: Counter[str] = Counter()
    for tensor in source.tensors:
        elements, block_bytes = gguf_header.BLOCKS[mix.types[tensor.name]]
        by_type[mix.types[tensor.name]] += tensor.n_elements // elements * block_bytes
    weights_count = sum(tensor.n_elements for tensor in source.tensors)
    size_bytes, memory = _memory(source, mix, measured, at, tools)
    return Explanation(
        wanted=wanted,
        mix=mix,
        tensor_bytes=dict(by_type.most_common()),
        size_bytes=size_bytes,
        bits_per_weight=8 * mix.data_bytes / weights_count,
        context_tokens=measured.context_tokens,
        memory=memory,
        allowed_fallbacks=declared.max_fallbacks,
    )


def _memory(
    source: Header, mix: Prediction, measured: BenchmarkSlice, at: Layout, tools: Toolchain
) -> tuple[int, MemoryEstimate]:
    """Return the size of the file to come, and what llama.cpp plans for it."""
    log = at.log("quantize", f"{measured.key}-explain")
    execution = benchmark.execution(
        measured.benchmark,
        tools.backend,
        cores=machine.usable_cores(),
        cpu_moe_layers=architectures.cpu_moe_layers(source, measured.cpu_moe_layers),
    )
    scratch = at.scratch(measured.model)
    scratch.mkdir(parents=True, exist_ok=True)
    planned = scratch / f"{measured.key}.planned.gguf"
    try:
        size_bytes = gguf_header.write_plan(source, mix.types, planned)
        done = proc.run(
            llama_fit_params.estimate_argv(
                tools,
                str(planned.relative_to(at.root)),
                context_tokens=measured.context_tokens,
                execution=execution,
            ),
            log=log,
            cwd=at.root,
            env=llamacpp.environment(tools),
            inherit_env=False,
        )
    finally:
        atomic.remove(planned)
    on_gpu = tools.backend != "cpu" and execution.gpu_layers > 0
    return size_bytes, llama_fit_params.parse_estimate(
        done.stdout, done.stderr, on_gpu=on_gpu, log=log
    )


# --- words ------------------------------------------------------------------------------------


def text(found: Explanation) -> str:
    """Write an explanation for people."""
    wanted, mix, memory = found.wanted, found.mix, found.memory
    counts = Counter(mix.types.values())
    tensors = ", ".join(
        f"{type_} {counts[type_]} ({wording.number(size / _MIB)} MiB)"
        for type_, size in found.tensor_bytes.items()
    )
    lines = [
        f"{wanted.key}, predicted; nothing was quantized",
        (
            f"  size       {wording.number(found.size_bytes / _MIB)} MiB, "
            f"{wording.number(found.bits_per_weight)} bits per weight"
        ),
        f"  tensors    {tensors}",
        (
            f"  memory     {wording.number(memory.total_mib)} MiB at "
            f"{wording.tokens(found.context_tokens)} tokens (weights "
            f"{wording.number(memory.model_mib)}, context {wording.number(memory.context_mib)}, "
            f"working space {wording.number(memory.compute_mib)}); planned by llama.cpp, less than "
            "a process takes, which the benchmark measures"
        ),
        *(
            f"  {'rules' if index == 0 else '':10} {rule.match} -> {rule.type}: "
            f"{wording.counted(rule.tensors_count, 'tensor')}"
            for index, rule in enumerate(mix.rules)
        ),
    ]
    if wanted.preset is not None:
        lines.append(f"  preset     {wanted.preset}: {tensor_rules.PRESETS[wanted.preset].words}")
    lines += _fallback_lines(found)
    return "\n".join(lines)


def _fallback_lines(found: Explanation) -> list[str]:
    fallbacks = found.mix.fallbacks
    if not fallbacks:
        return ["  fallbacks  none"]
    lines = [
        f"  {'fallbacks' if index == 0 else '':10} {each.tensor}: {each.got} instead of "
        f"{each.wanted}, whose blocks its rows are no multiple of"
        for index, each in enumerate(fallbacks)
    ]
    if len(fallbacks) > found.allowed_fallbacks:
        lines.append(
            f"  {'':10} refused as declared: {len(fallbacks)} fallbacks, "
            f"{found.allowed_fallbacks} allowed (`max_fallbacks`)"
        )
    return lines


def json_text(found: Explanation) -> str:
    """Write an explanation as JSON."""
    import json  # noqa: PLC0415 - only for --json

    told: dict[str, Any] = {
        "key": found.wanted.key,
        "model": found.wanted.model,
        "type": found.wanted.type,
        "size_bytes": found.size_bytes,
        "bits_per_weight": round(found.bits_per_weight, 4),
        "tensor_types": dict(Counter(found.mix.types.values()).most_common()),
        "tensor_bytes": dict(found.tensor_bytes),
        "types": dict(found.mix.types),
        "rules": [rule.model_dump() for rule in found.mix.rules],
        "preset": found.wanted.preset,
        "fallbacks": [each.model_dump() for each in found.mix.fallbacks],
        "allowed_fallbacks": found.allowed_fallbacks,
        "is_allowed": len(found.mix.fallbacks) <= found.allowed_fallbacks,
        "context_tokens": found.context_tokens,
        "memory_mib": found.memory.total_mib,
        "model_mib": found.memory.model_mib,
        "context_mib": found.memory.context_mib,
        "compute_mib": found.memory.compute_mib,
    }
    return json.dumps(told, indent=2)
