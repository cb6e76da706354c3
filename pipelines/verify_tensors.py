"""
The first three layers of `verify`: tensors, hyperparameters, values.

    tensors           every weight of upstream is there, under its name, in its shape and in a type
                      that keeps it, and nothing else is (`tensor_origins`)
    hyperparameters   what decides the computation besides the weights (`hyperparameters`)
    values            every value equal to upstream's after rounding, finite, no row lost to zeros
                      (`tensor_values`)

For a class of transformers that is not in `tensor_origins.RULES` a tensor may be called or made
otherwise than we know. Such a one is not counted as wrong: the layer is SKIP, with its name, unless
something else is wrong for certain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pipelines import architectures, console, gguf_py, hyperparameters
from pipelines.errors import UpstreamError
from pipelines.verify_records import Check
from pipelines.wording import counted, first_few, shortened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from pipelines.gguf_header import Header, TensorInfo
    from pipelines.hyperparameters import Held
    from pipelines.tensor_origins import Origin, Traced
    from pipelines.tensor_values import Compared
    from pipelines.verify_records import Layer
    from pipelines.verify_subject import Subject

_MAX_FINDINGS: Final = 20
_MAX_FINDING_CHARACTERS: Final = 400
# llama.cpp wants these in 32 bits although they have two axes, or does not care.
_EITHER_TYPE: Final = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight",
    "token_types.weight", "ssm_conv1d.weight", "shortconv.conv.weight", "ssm_a",
)  # fmt: skip
_OUTPUT: Final = "output.weight"
# A frequency divided by it turns nothing, at any position.
_STANDSTILL: Final = 1e30
# The deepest models have some 130. A table of names has a thousand entries for each.
_MAX_BLOCKS: Final = 1024


def checks(subject: Subject) -> tuple[Check, ...]:
    """
    Ask the three layers.

    Raises:
        UpstreamError: Upstream's files cannot be read.
        ToolError: gguf-py of the toolchain cannot be used.
    """
    # Not at the top: numpy, for those who only want to know that this layer exists.
    from pipelines import source_tensors, tensor_origins, tensor_values  # noqa: PLC0415

    config = hyperparameters.text_config(subject.config)
    names = gguf_py.TensorNames(subject.tools, subject.architecture, _blocks(subject, config))
    sources = source_tensors.open_all(subject.source)
    traced = tensor_origins.trace(sources, names, config, _class(subject.config))
    computed = computed_tensors(subject.header, config)
    structure = _structure(subject.header, traced, computed)
    held = hyperparameters.hold_against(
        subject.header, subject.architecture, config, subject.source
    )
    size_bytes = sum(tensor.size_bytes for tensor in subject.header.tensors)
    with console.Progress(
        f"verify {subject.model}: values", total=size_bytes, unit="bytes"
    ) as progress:
        compared = tensor_values.compare(
            subject.header, structure.comparable, computed, progress.update
        )
    return (
        _tensors(subject.header, traced, structure),
        _hyperparameters(held),
        _values(subject.header, compared),
    )


def _blocks(subject: Subject, config: Mapping[str, Any]) -> int:
    """Blocks for which there are names; if the two sides differ, that is found by its own layer."""
    found = subject.header.metadata.get(f"{subject.architecture}.block_count")
    return max(
        hyperparameters.layers_count(config),
        found if isinstance(found, int) and found <= _MAX_BLOCKS else 0,
    )


def _class(config: Mapping[str, Any]) -> str:
    """Return upstream's class: of those that config.json names the first that we know."""
    from pipelines.tensor_origins import RULES  # noqa: PLC0415 - see `checks`

    try:
        named = architectures.of_config(config)
    except UpstreamError:
        return ""
    return next((name for name in named if name in RULES), named[0])


@dataclass(frozen=True, kw_only=True)
class _Structure:
    """
    What names and shapes say.

    Attributes:
        comparable: Origins of the tensors whose shape is right.
        differing: One sentence for each that is wrong.
        unexplained: Tensors on either side that nobody can say anything about.
    """

    comparable: dict[str, Origin]
    differing: tuple[str, ...]
    unexplained: tuple[str, ...]


def _structure(
    header: Header, traced: Traced, computed: Mapping[str, NDArray[np.float32]]
) -> _Structure:
    """Hold names, shapes and types of both sides against each other."""
    tensors = {tensor.name: tensor for tensor in header.tensors}
    comparable: dict[str, Origin] = {}
    differing: list[str] = []
    unexplained: list[str] = []
    extra = [
        f"{name} comes from no tensor of upstream"
        for name in tensors
        if name not in traced.origins and name not in computed
    ]
    # Of a class that is not known, a tensor may have been cut into others.
    cut = unexplained if extra and not traced.exact else differing
    for name, origin in traced.origins.items():
        tensor = tensors.get(name)
        if tensor is None:
            if name != _OUTPUT or not traced.tied:
                cut.append(f"{name} is missing ({origin.upstream})")
        elif _shape_fits(tensor, origin):
            comparable[name] = origin
        else:
            (differing if origin.certain else unexplained).append(
                f"{name} is {_shape(tensor)}, {origin.upstream} {list(origin.shape)}"
            )
    surely = differing if traced.exact else unexplained
    surely += [f"{name} of upstream has no counterpart" for name in traced.unknown]
    surely += extra
    differing += [problem for tensor in header.tensors if (problem := _type_problem(tensor))]
    return _Structure(
        comparable=comparable, differing=tuple(differing), unexplained=tuple(unexplained)
    )


def _shape(tensor: TensorInfo) -> list[int]:
    """Shape in numpy's order."""
    return list(reversed(tensor.shape))


def _shape_fits(tensor: TensorInfo, origin: Origin) -> bool:
    """Compare shapes; axes of length 1 may have been dropped."""
    found = [length for length in _shape(tensor) if length != 1]
    wanted = [length for length in origin.shape if length != 1]
    if origin.first_rows and found and wanted:
        return found[1:] == wanted[1:] and found[0] <= wanted[0]
    return found == wanted


def _type_problem(tensor: TensorInfo) -> str:
    """Say why the type of a tensor is not the one that a 16-bit GGUF has for it."""
    vector = len([length for length in tensor.shape if length > 1]) <= 1
    if vector and tensor.type != "F32":
        return f"{tensor.name} is a vector in {tensor.type}: F32 is what llama.cpp computes with"
    if not vector and tensor.type != "F16" and not tensor.name.endswith(_EITHER_TYPE):
        return f"{tensor.name} is a matrix in {tensor.type}, not in F16"
    return ""


def computed_tensors(header: Header, config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """
    Compute the tensors that follow from config.json: factors of the rotation's frequencies.

    Source: `_compute_llama3_parameters` and `_compute_longrope_parameters` of transformers'
    modeling_rope_utils.py. llama.cpp divides a frequency by the factor.
    """
    import numpy as np  # noqa: PLC0415 - see `checks`

    rope = hyperparameters.rope_parameters(config)
    there = {tensor.name for tensor in header.tensors}
    found: dict[str, NDArray[np.float32]] = {}
    for name, key in (("long", "long_factor"), ("short", "short_factor")):
        target = f"rope_factors_{name}.weight"
        if target in there and isinstance(rope.get(key), list):
            found[target] = np.asarray(rope[key], dtype=np.float32)
    kind = str(rope["rope_type"]).lower()
    if "rope_freqs.weight" in there and kind in {"llama3", "proportional"}:
        factors = (_llama3_factors if kind == "llama3" else _proportional_factors)(config, rope)
        found["rope_freqs.weight"] = np.asarray(factors, dtype=np.float32)
    return found


def _llama3_factors(config: Mapping[str, Any], rope: Mapping[str, Any]) -> list[float]:
    """Factor by which Llama 3.1 slows each frequency, long waves fully, short ones not at all."""
    length = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    base, factor = float(rope.get("rope_theta") or 10_000.0), float(rope.get("factor", 8.0))
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    original = float(rope.get("original_max_position_embeddings", 8192))
    factors = []
    for pair in range(length // 2):
        wave = 2 * math.pi * base ** (2 * pair / length)
        if wave < original / high:
            factors.append(1.0)
        elif wave > original / low:
            factors.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _proportional_factors(config: Mapping[str, Any], rope: Mapping[str, Any]) -> list[float]:
    """Factor of each frequency of Gemma 4: those behind the rotated part of a head stand still."""
    pairs = hyperparameters.full_head_dim(config) // 2
    rotated = int(pairs * float(rope.get("partial_rotary_factor") or 1.0))
    return [1.0] * rotated + [_STANDSTILL] * (pairs - rotated)


def _tensors(header: Header, traced: Traced, structure: _Structure) -> Check:
    wanted = traced.origins.keys() - ({_OUTPUT} if traced.tied else set())
    names = len(wanted | {tensor.name for tensor in header.tensors})
    compared = f"names, shapes and types of {counted(names, 'tensor')}"
    if structure.differing:
        wrong = counted(len(structure.differing), "difference")
        sentence = f"{compared} were compared: {wrong}, 0 are allowed. {structure.differing[0]}."
        return _check("tensors", "FAIL", names, structure.differing, sentence)
    if structure.unexplained:
        sentence = (
            f"upstream's class is not one of those whose tensors are known here, and "
            f"{counted(len(structure.unexplained), 'tensor')} could not be traced: "
            f"{first_few(structure.unexplained)}."
        )
        return _check("tensors", "SKIP", names, (), sentence, structure.unexplained)
    tied = ", the embeddings serve as output" if traced.tied and _OUTPUT in traced.origins else ""
    ignored = (
        f"; {counted(traced.ignored_count, 'tensor')} of upstream's that no text model has were "
        "left out"
        if traced.ignored_count
        else ""
    )
    return _check("tensors", "PASS", names, (), f"{compared} are upstream's{tied}{ignored}.")


def _hyperparameters(held: Held) -> Check:
    compared = f"{counted(held.examined_count, 'value')} of the metadata"
    note = f" Not compared: {'; '.join(held.notes)}." if held.notes else ""
    if held.differing:
        wrong = counted(len(held.differing), "difference")
        sentence = (
            f"{compared} were held against config.json: {wrong}, 0 are allowed. "
            f"{held.differing[0]}.{note}"
        )
        return _check("hyperparameters", "FAIL", held.examined_count, held.differing, sentence)
    sentence = f"{compared} mean what config.json means.{note}"
    return _check("hyperparameters", "PASS", held.examined_count, (), sentence, held.notes)


def _values(header: Header, compared: Compared) -> Check:
    read_count = len(header.tensors) - len(compared.unread)
    every = f"all {compared.values_count:,} values of {counted(read_count, 'tensor')}"
    if compared.differing:
        wrong = counted(len(compared.differing), "tensor")
        sentence = (
            f"{every} were compared: {wrong} with wrong values, 0 are allowed. "
            f"{compared.differing[0]}."
        )
        return _check("values", "FAIL", compared.values_count, compared.differing, sentence)
    left_out = [*compared.unexplained, *compared.untraced, *compared.unread]
    if left_out:
        sentence = (
            f"{every} are finite, but {counted(len(left_out), 'tensor')} could not be compared "
            f"with upstream: {first_few(left_out)}."
        )
        return _check("values", "SKIP", compared.values_count, (), sentence, left_out)
    order = (
        f" Of {counted(len(compared.reordered), 'tensor')} the order is not known here; their "
        f"values are the same ones: {first_few(compared.reordered)}."
        if compared.reordered
        else ""
    )
    sentence = f"{every} are finite and equal upstream's, rounded to the type.{order}"
    return _check("values", "PASS", compared.values_count, (), sentence, compared.reordered)


def _check(  # noqa: PLR0913, PLR0917 - the fields of a check
    layer: Layer,
    outcome: Any,  # noqa: ANN401 - a literal that pydantic checks
    examined: int,
    differing: Sequence[str],
    sentence: str,
    findings: Sequence[str] = (),
) -> Check:
    """Compose a check; names come from upstream's files, so they are cleaned and cut."""
    shown = [*differing, *findings][:_MAX_FINDINGS]
    return Check(
        layer=layer,
        outcome=outcome,
        examined_count=examined,
        differing_count=len(differing),
        sentence=shortened(console.clean(sentence[:1].upper() + sentence[1:]), 800),
        findings=tuple(shortened(console.clean(each), _MAX_FINDING_CHARACTERS) for each in shown),
    )
