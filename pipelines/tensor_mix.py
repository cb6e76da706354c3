"""
Which type each tensor of a quantized model will get, known before the work starts.

llama-quantize decides tensor by tensor, from name, position, shape and recipe. `--dry-run` makes
those decisions and prints them without writing a byte: the code that decides here is the code that
quantizes later, so nothing can drift when the pin moves. What it prints is text, so it is believed
only if it names every tensor of the header once, with the shape and the type that the header gives.

The lines, on stderr (src/llama-quant.cpp of the pinned llama.cpp):

    warning: NAME - ncols 896 not divisible by 256 (required for type q4_K) -> falling back to q5_0
    llama_tensor_get_type: NAME - applying manual override: q4_K -> q8_0
    [   9/  21] NAME - [   896,    256,      1,      1], type =    f16, size = .. MiB (q5_0)

The last has no type in brackets if the tensor stays what it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines.errors import ParamsError, ToolError
from pipelines.gguf_header import BLOCKS
from pipelines.records import Fallback, RuleHits
from pipelines.wording import first_few

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.gguf_header import Header, TensorInfo
    from pipelines.params import QuantizeSlice, TensorRule

_TENSOR_LINE: Final = re.compile(
    r"^\[ *(?P<index>\d+)/ *(?P<count>\d+)\] (?P<name>\S+) +- \[(?P<shape>[\d, ]+)\], "
    r"type = +(?P<type>\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((?P<new_type>\w+)\))?$",
    re.MULTILINE,
)
_FALLBACK_LINE: Final = re.compile(
    r"^warning: (?P<name>\S+) +- ncols +(?P<ncols>\d+) not divisible by +(?P<block>\d+) "
    r"\(required for type +(?P<wanted>\w+)\) (?:\(WARNING: [^)\n]*\) )?"
    r"-> falling back to +(?P<got>\w+)$",
    re.MULTILINE,
)
_OVERRIDE_LINE: Final = re.compile(
    r"^\w+: (?P<name>\S+) +- applying manual override: \w+ -> (?P<type>\w+)$", re.MULTILINE
)
_FALLBACK_COUNT: Final = re.compile(r"WARNING: (\d+) of \d+ tensor\(s\) required fallback")
_NEEDS_IMATRIX: Final = "will require an imatrix!"

_OUTPUT: Final = "output.weight"
_EMBEDDINGS: Final = "token_embd.weight"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """
    What llama-quantize is going to do.

    Attributes:
        types: Type of every tensor, in capitals, in the order in which they are written.
        fallbacks: Tensors whose rows no block of the wanted type divides, and what they get.
        rules: Every declared rule and the number of tensors that it decides, never 0.
        data_bytes: Bytes of tensor data, padding not included.
    """

    types: Mapping[str, str]
    fallbacks: tuple[Fallback, ...]
    rules: tuple[RuleHits, ...]
    data_bytes: int


def check_forced_types(header: Header, wanted: QuantizeSlice) -> None:
    """
    Refuse a forced type that cannot hold the rows of its tensor: llama-quantize would abort.

    Raises:
        ParamsError: Names the tensor and the option.
    """
    forced = (
        (_OUTPUT, "output_tensor_type", wanted.output_tensor_type),
        (_EMBEDDINGS, "token_embedding_type", wanted.token_embedding_type),
    )
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    for name, option, type_ in forced:
        if type_ is None or name not in shapes:
            continue
        block, _ = BLOCKS[type_.upper()]
        if shapes[name][0] % block:
            raise ParamsError(
                f"quants.{wanted.key}.{option}: {type_} stores blocks of {block} elements, but "
                f"the rows of {name} have {shapes[name][0]:,}.",
                hint="Take a type with blocks of 32, such as q8_0 or q5_0, or f16.",
            )


def predict(header: Header, wanted: QuantizeSlice, dry_run: str) -> Prediction:
    """
    Read what `llama-quantize --dry-run` printed and hold it against header and declaration.

    Args:
        header: Of the 16-bit GGUF that was given to it.
        wanted: The declaration of the quant.
        dry_run: Its stderr.

    Raises:
        ToolError: The text is incomplete or contradicts the header.
        ParamsError: The declaration has no effect, falls back too often, or lacks an imatrix.
    """
    types = _types(header, dry_run)
    fallbacks = _fallbacks(header, types, dry_run)
    decided = dict(types)
    decided.update((fallback.tensor, fallback.wanted) for fallback in fallbacks)
    _check_imatrix(wanted, dry_run)
    _check_options(wanted, decided)
    rules = _rules(wanted, decided, dry_run)
    _check_fallbacks(wanted, fallbacks)
    data_bytes = sum(_size_bytes(tensor, types[tensor.name]) for tensor in header.tensors)
    return Prediction(types=types, fallbacks=fallbacks, rules=rules, data_bytes=data_bytes)


def differences(predicted: Mapping[str, str], made: Header) -> list[str]:
    """Say in which tensors a finished file differs from the prediction; empty if in none."""
    found = {tensor.name: tensor.type for tensor in made.tensors}
    return [
        f"{name}: predicted {predicted.get(name, 'no such tensor')}, "
        f"found {found.get(name, 'no such tensor')}"
        for name in sorted(predicted.keys() | found.keys())
        if predicted.get(name) != found.get(name)
    ]


def _types(header: Header, dry_run: str) -> dict[str, str]:
    """Collect the type of every tensor; anything missing, doubled or unknown is an error."""
    sources = {tensor.name: tensor for tensor in header.tensors}
    types: dict[str, str] = {}
    for number, line in enumerate(_TENSOR_LINE.finditer(dry_run), start=1):
        name, old = line["name"], line["type"].upper()
        source = sources.get(name)
        if source is None or name in types:
            raise _distrust(f"it names {name}, which the header has not, or twice")
        if (int(line["index"]), int(line["count"])) != (number, len(sources)):
            raise _distrust(f"{name} is number {line['index']} of {line['count']}")
        shape = tuple(int(length) for length in line["shape"].split(","))
        if shape != source.shape + (1,) * (4 - len(source.shape)) or old != source.type:
            raise _distrust(f"{name} is not {list(source.shape)} of {source.type} in it")
        types[name] = _type(line["new_type"] or old)
        if source.shape[0] % BLOCKS[types[name]][0]:
            raise _distrust(f"{types[name]} cannot hold rows of {source.shape[0]:,} ({name})")
    missing = [name for name in sources if name not in types]
    if missing:
        raise _distrust(f"it does not name {first_few(missing)}")
    return types


def _fallbacks(header: Header, types: Mapping[str, str], dry_run: str) -> tuple[Fallback, ...]:
    """Collect the fallbacks, each checked by arithmetic, all of them by their number."""
    rows = {tensor.name: tensor.shape[0] for tensor in header.tensors}
    fallbacks = []
    for line in _FALLBACK_LINE.finditer(dry_run):
        name, wanted, got = line["name"], _type(line["wanted"]), _type(line["got"])
        fits = not rows.get(name, 0) % BLOCKS[wanted][0]
        if fits or types[name] != got or int(line["ncols"]) != rows[name]:
            raise _distrust(f"{name} falls back from {wanted} to {got} without a reason")
        fallbacks.append(Fallback(tensor=name, wanted=wanted, got=got))
    counted = _FALLBACK_COUNT.search(dry_run)
    if len(fallbacks) != (int(counted[1]) if counted else 0):
        raise _distrust(f"it names {len(fallbacks)} fallbacks but counts another number")
    order = {name: index for index, name in enumerate(types)}
    return tuple(sorted(fallbacks, key=lambda fallback: order[fallback.tensor]))


def _rules(wanted: QuantizeSlice, decided: Mapping[str, str], dry_run: str) -> tuple[RuleHits, ...]:
    """
    Count the tensors that each declared rule decides.

    llama-quantize searches the patterns in order and takes the first that is found; it says nothing
    about one that never is. We search the same way; where it reports an override, both must agree,
    since its regular expressions (ECMAScript) are not quite ours.
    """
    overridden = {line["name"]: _type(line["type"]) for line in _OVERRIDE_LINE.finditer(dry_run)}
    hits = [0] * len(wanted.tensor_types)
    for name, type_ in decided.items():
        index = _first_match(wanted.tensor_types, name)
        by_us = None if index is None else _type(wanted.tensor_types[index].type)
        if overridden.get(name, by_us) != by_us:
            raise ToolError(
                f"llama-quantize and we read the rules of {wanted.key} differently: it gives "
                f"{overridden[name]} to {name}, by our reading it gets {by_us or 'no rule'}.",
                hint="Use plain patterns: names, `.`, `*`, `[0-9]`, `(a|b)`, `^` and `$`.",
            )
        if index is not None and by_us == type_:
            hits[index] += 1
    for rule, count in zip(wanted.tensor_types, hits, strict=True):
        if not count:
            raise ParamsError(
                f"quants.{wanted.key}: the rule {rule.match} -> {rule.type} decides no tensor; "
                f"names look like {first_few(_examples(list(decided)))}.",
                hint="A rule before it may win, or no name holds the pattern; norms and, with an "
                "option of their own, embeddings and output are never decided by rules.",
            )
    return tuple(
        RuleHits(match=rule.match, type=rule.type, tensors_count=count)
        for rule, count in zip(wanted.tensor_types, hits, strict=True)
    )


def _first_match(rules: Sequence[TensorRule], name: str) -> int | None:
    return next((i for i, rule in enumerate(rules) if re.search(rule.match, name)), None)


def _check_imatrix(wanted: QuantizeSlice, dry_run: str) -> None:
    if not wanted.imatrix and _NEEDS_IMATRIX in dry_run:
        raise ParamsError(
            f"quants.{wanted.key}: some tensor gets a type that is garbage without an importance "
            "matrix.",
            hint=f"Set `imatrix: true`, and `calibration` in models.{wanted.model}.",
        )


def _check_options(wanted: QuantizeSlice, decided: Mapping[str, str]) -> None:
    """Refuse an option that llama-quantize took and then did not apply."""
    output = _OUTPUT if _OUTPUT in decided else _EMBEDDINGS
    for option, type_, name in (
        ("output_tensor_type", wanted.output_tensor_type, output),
        ("token_embedding_type", wanted.token_embedding_type, _EMBEDDINGS),
    ):
        if type_ is not None and decided.get(name) != _type(type_):
            raise ParamsError(
                f"quants.{wanted.key}.{option}: {name} gets {decided.get(name, 'nothing')}, not "
                f"{type_}: another option of this quant decides it.",
                hint=f"Remove {option}, or the option that beats it.",
            )
    if wanted.type == "MXFP4_MOE" and "MXFP4" not in decided.values():
        raise ParamsError(
            f"quants.{wanted.key}: MXFP4_MOE stores experts as MXFP4 and all else as Q8_0, but "
            f"{wanted.model} has no experts.",
            hint="Declare Q8_0, which is what would be made.",
        )
    if wanted.leave_output_tensor and _OUTPUT not in decided:
        raise ParamsError(
            f"quants.{wanted.key}.leave_output_tensor: this model has no output tensor, its "
            "embeddings are used as one.",
            hint="Remove it; `token_embedding_type: f16` keeps the embeddings.",
        )


def _check_fallbacks(wanted: QuantizeSlice, fallbacks: tuple[Fallback, ...]) -> None:
    if len(fallbacks) <= wanted.max_fallbacks:
        return
    lines = [f"{item.tensor}: {item.got} instead of {item.wanted}" for item in fallbacks]
    raise ParamsError(
        f"quants.{wanted.key}: {len(fallbacks)} tensors have rows that do not fit the type of "
        f"{wanted.type}, {wanted.max_fallbacks} are allowed: {first_few(lines)}.",
        hint=f"Declare `max_fallbacks: {len(fallbacks)}` if that is fine, or a rule in "
        "`tensor_types` that names a type with blocks of 32.",
    )


def _size_bytes(tensor: TensorInfo, type_: str) -> int:
    elements, size_bytes = BLOCKS[type_]
    return tensor.n_elements // elements * size_bytes


def _type(name: str) -> str:
    """Turn ggml's name of a type into ours."""
    if name.upper() not in BLOCKS:
        raise _distrust(f"it names the unknown type {name}")
    return name.upper()


def _distrust(reason: str) -> ToolError:
    return ToolError(
        f"the plan that llama-quantize --dry-run printed cannot be trusted: {reason}.",
        hint="The pinned llama.cpp prints something new: report it with the log.",
    )


def _examples(names: list[str]) -> list[str]:
    """Pick the names that say most: one of each kind, by dropping the number of the block."""
    kinds = {re.sub(r"\d+", "N", name): name for name in reversed(names)}
    return list(kinds.values())
