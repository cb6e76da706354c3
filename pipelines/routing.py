"""
Which hosts measure which model.

`models.M.hosts` names the hosts that serve a model; without it every host does. Those with a runner
measure it, each into a place of its own: the first one into results/MODEL, of which releases are
made, every other one into results/MODEL/on/HOST (`pipelines.bundle`).

A host that cannot hold even the smallest declared GGUF measures nothing: its runner would be busy
for an hour to say what is known before. Where it is the first one the plan is refused, since nobody
else's numbers make a release. That has to be certain, so only recorded files count, those of the
very declaration, and of them only the bytes of the weights:

    host without a card   weights + margin > memory_mib. What `choose` holds against that limit is
                          never less: llama.cpp's plan counts every tensor there is.
    host with cards       weights > vram_mib. The margin is left out on purpose: llama.cpp keeps the
                          token embeddings in main memory. Where layers or experts are declared to
                          stay there as well, nothing is certain and the host measures. Where those
                          embeddings are more than the context and the margin, a card may hold what
                          its bytes exceed: a gate that finds so fails, and says to name the host.

A host that a model names itself always measures: the operator said so. What `choose` then finds is
said for each host, as of every other quant that does not fit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from pipelines import bundle, limits, params, records, wording

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pipelines.ci_records import ModelPlan
    from pipelines.layout import Layout
    from pipelines.params import Declaration

_MIB: Final = 1 << 20


def measuring(declared: Declaration, at: Layout, model: str) -> Iterator[tuple[str, str | None]]:
    """
    Yield the hosts that measure a model, the first one first and always.

    Args:
        declared: The declaration.
        at: The checkout with the records, by which hosts are too small.
        model: A declared one.

    Returns:
        Its key, and by which name its records are asked for: None of the first one, whose records
        are those of results/MODEL. Where nobody has a runner, the host for which somebody measures
        by hand.
    """
    first = bundle.primary_host(declared, model)
    for host in bundle.measured_hosts(declared, model) or (first,):
        if host == first or not too_small(declared, at, model, host):
            yield host, None if host == first else host


def left_out(declared: Declaration, at: Layout, model: str) -> dict[str, str]:
    """Return the hosts that measure nothing of a model, with the clause that says why."""
    hosts = bundle.measured_hosts(declared, model)[1:]
    found = {host: too_small(declared, at, model, host) for host in hosts}
    return {host: why for host, why in found.items() if why}


def told(models: Iterable[ModelPlan]) -> Iterator[str]:
    """Yield a sentence for each host that a plan left out, with what says so for good."""
    for one in models:
        for each in one.left_out:
            yield (
                f"{one.model} is not measured on {each.host}: {each.why}. "
                f"`models.{one.model}.hosts` names the hosts that serve it."
            )


def too_small(declared: Declaration, at: Layout, model: str, host: str) -> str:
    """
    Say why a host can serve nothing of a model, as a clause; empty if that is not certain.

    Args:
        declared: The declaration.
        at: The checkout with the records.
        model: A declared one.
        host: A declared one.
    """
    spec = declared.hosts[host]
    limit_mib = limits.memory_limit_mib(spec)
    if limit_mib is None or declared.models[model].hosts is not None:
        return ""
    serving = params.served_as(declared, model)
    if spec.vram_mib is not None:
        if serving.gpu_layers != "all" or serving.cpu_moe_layers is not None:
            return ""
        margin_mib = 0
    else:
        margin_mib = spec.margin_mib
    smallest = _smallest(declared, at, model)
    if smallest is None or smallest[1] + margin_mib * _MIB <= limit_mib * _MIB:
        return ""
    type_, weights_bytes = smallest
    staying = f", of which {wording.mib(margin_mib)} stay free" if margin_mib else ""
    # Rounded up: as much as the host has would be no reason.
    weights_mib = math.ceil(weights_bytes / _MIB)
    return (
        f"even {type_}, its smallest GGUF, has {wording.mib(weights_mib)} of weights, and {host} "
        f"has {wording.mib(limit_mib)}{staying}"
    )


def _smallest(declared: Declaration, at: Layout, model: str) -> tuple[str, int] | None:
    """Return the declared quant with the fewest bytes of weights; None if one is not recorded."""
    made = records.read_or_reason(at.model_record("convert", model), records.ConvertRecord)
    recipe = declared.toolchain.recipe
    if isinstance(made, str):
        return None
    if (made.revision, made.recipe) != (declared.models[model].revision, recipe):
        return None
    sizes: dict[str, int] = {}
    for key, type_ in params.quants_of(declared, model).items():
        one = records.read_or_reason(
            at.quant_record("quantize", model, type_), records.QuantizeRecord
        )
        if isinstance(one, str):
            return None
        known = (one.key, one.type, one.recipe, one.f16_sha256)
        if known != (key, type_, recipe, made.gguf.sha256):
            return None
        sizes[type_] = sum(one.tensor_bytes.values())
    return min(sizes.items(), key=lambda one: one[1]) if sizes else None
