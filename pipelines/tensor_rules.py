"""
Where the tensor rules of a quant come from: its own, a recipe file's, a preset's, in this order.

llama-quantize takes the first rule whose pattern is found, so what stands in params.yaml beats a
file that another tool made, and both beat a preset.

A preset says what to keep, not how: the tensors that it names stay at Q8_0, which is within
rounding of 16 bits and has blocks of 32, so that rows of any model fit. It is laid out against the
model's own tensors, because a rule that decides nothing is an error: parts of a preset that a
model does not have are left out, a preset of which it has nothing is refused.

Sources: names of tensors in gguf-py/gguf/constants.py of the pinned llama.cpp; what is worth
keeping: docs.unsloth.ai (Dynamic 2.0: attention and state-space tensors of hybrids suffer first),
AesSedai's mixtures (always-active tensors of a mixture of experts at Q8_0: divergence .0102 where
other Q4 files have up to .0524), EAddario (llama.cpp pull request 15550).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, get_args

from pipelines import wording
from pipelines.console import clean
from pipelines.errors import ParamsError
from pipelines.params import TensorRule, TensorType, is_safe_regex

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pipelines.gguf_header import Header
    from pipelines.layout import Layout
    from pipelines.params import Preset, QuantizeSlice, RecipeFile

MAX_FILE_BYTES: Final = 1 << 20
MAX_RULES: Final = 4096
_MAX_PATTERN_CHARACTERS: Final = 200
KEPT_TYPE: Final = "q8_0"
# As good as what a preset would keep tensors at, or better.
NOTHING_TO_KEEP: Final = frozenset({"F32", "F16", "BF16", "Q8_0"})
_TYPES: Final = frozenset(get_args(TensorType))

_ATTENTION: Final = (
    r"\.attn_(?:q|k|v|qkv|output|gate|q_a|q_b|kv_b|k_b|v_b|kv_a_mqa)\.weight$",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Kept:
    """
    What a preset keeps.

    Attributes:
        words: For docs, help and errors.
        patterns: Tensors kept at Q8_0.
        needs: A pattern that some tensor of the model must have; without one the preset is not
            about this kind of model.
        lacks: What a model without such a tensor lacks.
    """

    words: str
    patterns: tuple[str, ...]
    needs: str = ""
    lacks: str = ""


PRESETS: Final[dict[Preset, Kept]] = {
    "protect-output": Kept(
        words="the output matrix, or the embeddings where they are used as one",
        patterns=(r"^output\.weight$",),
    ),
    "protect-embeddings": Kept(
        words="the token embeddings",
        patterns=(r"^token_embd\.weight$", r"^per_layer_token_embd\.weight$"),
    ),
    "protect-attention": Kept(words="all matrices of attention", patterns=_ATTENTION),
    "moe-protect-active": Kept(
        words="everything that each token uses in a mixture of experts: attention, shared experts, "
        "dense layers; the experts get the type of the quant",
        patterns=(*_ATTENTION, r"\.ffn_(?:gate|up|down)(?:_shexp)?\.weight$"),
        needs=r"_exps\.weight$",
        lacks="experts",
    ),
    "hybrid-protect-ssm": Kept(
        words="state-space and attention matrices of a hybrid model",
        patterns=(r"\.ssm_[a-z_]+\.weight$", *_ATTENTION),
        needs=r"\.ssm_",
        lacks="state-space layers",
    ),
}


def resolve(wanted: QuantizeSlice, header: Header, at: Layout) -> QuantizeSlice:
    """
    Return the quant with all its rules in `tensor_types`, in the order in which they are tried.

    Args:
        wanted: The declaration.
        header: Of the model's 16-bit GGUF.
        at: The checkout, for the recipe file.

    Raises:
        ParamsError: The file is missing, another one or unreadable (with its line), or the model
            has nothing that the preset keeps.
    """
    rules = list(wanted.tensor_types)
    if wanted.recipe_file is not None:
        rules += read_file(wanted.recipe_file, at.root, f"quants.{wanted.key}.recipe_file")
    if wanted.preset is not None:
        rules += _laid_out(wanted, wanted.preset, header, rules)
    return wanted.model_copy(update={"tensor_types": tuple(rules)})


# --- recipe files -----------------------------------------------------------------------------


def read_file(declared: RecipeFile, root: Path, owner: str) -> tuple[TensorRule, ...]:
    r"""
    Read the rules of a file: one `REGEX=TYPE` a line, comments from `#`, blank lines.

    It is what llama-quantize's `--tensor-type-file` and Thireus' GGUF-Tool-Suite write, with
    comments: `^blk\.(1|2)\.ffn_up\.weight$=q5_k`.

    Args:
        declared: Path and digest.
        root: The checkout.
        owner: Path in params.yaml, for errors.

    Raises:
        ParamsError: See `resolve`.
    """
    path = root / declared.path
    try:
        # One byte more than is allowed tells a larger file from a full one.
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ParamsError(f"{owner}: {declared.path} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_FILE_BYTES:
        raise ParamsError(f"{owner}: {declared.path} is larger than {MAX_FILE_BYTES:,} bytes.")
    found = hashlib.sha256(data).hexdigest()
    if found != declared.sha256:
        raise ParamsError(
            f"{owner}: {declared.path} has other bytes than declared: want {declared.sha256}, got "
            f"{found}.",
            hint=f"If they are meant, write: sha256: {found}",
        )
    return parse(data, declared.path)


def parse(data: bytes, name: str) -> tuple[TensorRule, ...]:
    """
    Parse the bytes of a recipe file.

    Raises:
        ParamsError: `NAME:LINE: what is wrong`, the first of them; or no rule, or too many.
    """
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ParamsError(f"{name}:{line}: holds a byte that is not ASCII.") from error
    rules = tuple(_rules(text, name))
    if not rules:
        raise ParamsError(f"{name} holds no rule.", hint="A line is REGEX=TYPE.")
    if len(rules) > MAX_RULES:
        raise ParamsError(f"{name} holds {len(rules):,} rules, {MAX_RULES:,} are allowed.")
    return rules


def _rules(text: str, name: str) -> Iterator[TensorRule]:
    for number, line in enumerate(text.splitlines(), start=1):
        rule = line.partition("#")[0].strip()
        if rule:
            yield _rule(rule, f"{name}:{number}")


def _rule(text: str, where: str) -> TensorRule:
    pattern, equals, type_ = (part.strip() for part in text.rpartition("="))
    if not equals or not pattern or not type_:
        shown = wording.quoted(clean(text))
        raise ParamsError(f"{where}: {shown} is no rule.", hint="A line is REGEX=TYPE.")
    # llama-quantize searches lower-cased patterns; other tools write type names in capitals.
    pattern, type_ = pattern.lower(), type_.lower()
    if type_ not in _TYPES:
        raise ParamsError(
            f"{where}: type {wording.quoted(clean(type_))} is not one of llama-quantize's"
            f"{wording.did_you_mean(type_, sorted(_TYPES)) or '.'}",
            hint="Types of forks (such as iq4_ks of ik_llama.cpp) cannot be made or served here.",
        )
    if (
        len(pattern) > _MAX_PATTERN_CHARACTERS
        or any(character.isspace() for character in pattern)
        or not is_safe_regex(pattern)
    ):
        raise ParamsError(
            f"{where}: {wording.quoted(clean(pattern))} is no regular expression that "
            "llama-quantize and Python read alike, and in reasonable time.",
            hint="Lower case, no spaces or `=`, no `(?` but `(?:` and `(?!`, four repeats at most, "
            "none within another.",
        )
    return TensorRule.model_validate({"match": pattern, "type": type_})


# --- presets ----------------------------------------------------------------------------------


def _laid_out(
    wanted: QuantizeSlice, preset: Preset, header: Header, before: Sequence[TensorRule]
) -> list[TensorRule]:
    """Return the rules of a preset that decide some tensor which no rule before them decides."""
    kept = PRESETS[preset]
    place = f"quants.{wanted.key}.preset"
    if wanted.type in NOTHING_TO_KEEP:
        raise ParamsError(
            f"{place}: {preset} has no effect on {wanted.type}, which is as exact already.",
            hint="Remove it.",
        )
    names = [tensor.name for tensor in header.tensors if len(tensor.shape) > 1]
    if kept.needs and not any(re.search(kept.needs, name) for name in names):
        raise ParamsError(
            f"{place}: {wanted.model} has no {kept.lacks}, which {preset} is about.",
            hint=f"Presets: {wording.listed(sorted(PRESETS))}.",
        )
    free = [name for name in names if not any(re.search(rule.match, name) for rule in before)]
    rules: list[TensorRule] = []
    for pattern in _patterns(preset, kept, names):
        decided = [name for name in free if re.search(pattern, name)]
        if decided:
            rules.append(TensorRule(match=pattern, type=KEPT_TYPE))
            free = [name for name in free if name not in decided]
    if not rules:
        raise ParamsError(
            f"{place}: {preset} keeps {kept.words}; nothing of that is left in {wanted.model} for "
            "it to decide.",
            hint="Remove it, or the rule that decides those tensors already.",
        )
    return rules


def _patterns(preset: Preset, kept: Kept, names: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns; a model with tied embeddings has its output matrix under their name."""
    if preset == "protect-output" and "output.weight" not in names:
        return (r"^token_embd\.weight$",)
    return kept.patterns
