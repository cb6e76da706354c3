"""
Which models the pinned llama.cpp converts, told from config.json, and what a GGUF is good for.

The table is read out of the converter's own source, `TEXT_MODEL_MAP` in `conversion/__init__.py`,
as a literal: no import, so no torch, and nothing of it is executed. So an architecture that the
pinned commit does not know is named in seconds, before the first weight is loaded.
"""

from __future__ import annotations

import ast
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, Literal

from pipelines.errors import ParamsError, ToolError, UpstreamError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipelines.gguf_header import Header

    Pooling = Literal["none", "mean", "cls", "last", "rank"]

_TABLE: Final = "TEXT_MODEL_MAP"
# llama.h, enum llama_pooling_type.
_POOLINGS: Final[dict[object, Pooling]] = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}
# The tensors that --n-cpu-moe moves (common/common.h, LLM_FFN_EXPS_REGEX).
_EXPERTS: Final = re.compile(r"blk\.(\d{1,4})\.ffn_(?:up|down|gate|gate_up)_(?:ch)?exps")
# Encoders that say nothing of causality, since theirs is fixed in llama.cpp.
_NEVER_CAUSAL: Final = frozenset({"t5encoder"})


def supported(converter: Path) -> frozenset[str]:
    """
    Return the names of `architectures` in config.json that a converter knows.

    Args:
        converter: convert_hf_to_gguf.py of the toolchain, with `conversion/` beside it.

    Raises:
        ToolError: The table is not where this commit of llama.cpp should have it.
    """
    source = converter.parent / "conversion" / "__init__.py"
    try:
        module = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise ToolError(f"{source} cannot be read: {error}.") from error
    for node in module.body:
        target = _assigned_name(node)
        if target == _TABLE and isinstance(node, ast.Assign | ast.AnnAssign):
            names = _keys(node.value)
            if names:
                return names
    raise ToolError(
        f"{source} has no table {_TABLE}: this commit of llama.cpp keeps it elsewhere.",
        hint="Pin the llama_cpp_python version that the template was tested with.",
    )


def of_config(config: Mapping[str, Any]) -> tuple[str, ...]:
    """
    Return the architectures that config.json declares, the whole model's first.

    The converter takes the one of `text_config` if a multimodal model has it, so that counts too.

    Raises:
        UpstreamError: There is none.
    """
    text_config = config.get("text_config")
    sections = [config, text_config] if isinstance(text_config, dict) else [config]
    declared = [section.get("architectures") for section in sections]
    names = [
        name
        for listed in declared
        if isinstance(listed, list)
        for name in listed[:1]
        if isinstance(name, str)
    ]
    if not names:
        raise UpstreamError(
            "config.json names no architecture, so no converter can be picked for it.",
            hint="A repository of a transformers model has a key `architectures`.",
        )
    return tuple(names)


def require_supported(config: Mapping[str, Any], known: frozenset[str], commit: str) -> str:
    """
    Return the architecture of a model that the pinned llama.cpp converts.

    Args:
        config: The parsed config.json.
        known: What `supported` returned.
        commit: The llama.cpp commit, for the message.

    Raises:
        UpstreamError: It is not supported; the message lists what is.
    """
    names = of_config(config)
    if known.intersection(names):
        return names[0]
    close = get_close_matches(names[0], known, n=3)
    like = f" The closest ones are {', '.join(close)}." if close else ""
    raise UpstreamError(
        f"llama.cpp {commit[:9]} does not convert {' / '.join(names)}.{like}\n"
        f"    It converts {len(known)} architectures: {', '.join(sorted(known))}.",
        hint="Raise toolchain.llama_cpp_python if a newer llama.cpp supports it.",
    )


def is_encoder(header: Header) -> bool:
    """
    Tell whether a model makes vectors of texts, rather than going on with them.

    By what Ollama and llama-server tell it, too: the file names a pooling, whatever its value
    (`<arch>.pooling_type`; Ollama then offers /api/embed and refuses to chat). A model without one
    whose attention sees what comes later cannot go on with a text either.
    """
    architecture = header.text("general.architecture")
    return f"{architecture}.pooling_type" in header.metadata or not is_causal(header)


def is_causal(header: Header) -> bool:
    """
    Tell whether a token's attention ends at itself: what llama-imatrix and perplexities presume.

    It does so in some encoders, too: those that were made of a decoder.
    """
    architecture = header.text("general.architecture")
    causal = header.metadata.get(f"{architecture}.attention.causal", True)
    return causal is not False and architecture not in _NEVER_CAUSAL


def pooling(header: Header) -> Pooling:
    """
    Say how an encoder makes one vector of a text.

    Raises:
        UpstreamError: The file does not say, so that each token would have a vector of its own; or
            it makes one score of two texts, which is no vector.
    """
    architecture = header.text("general.architecture")
    found = _POOLINGS.get(header.metadata.get(f"{architecture}.pooling_type", 0))
    if found in {None, "none"}:
        raise UpstreamError(
            f"{header.path.name} ({architecture}) does not say how the vectors of its tokens "
            "become one of the text, so no server makes embeddings of it.",
            hint="The repository of an embedding model has modules.json and 1_Pooling/config.json; "
            "fetch them with it.",
        )
    if found == "rank":
        raise UpstreamError(
            f"{header.path.name} ({architecture}) ranks pairs of texts and makes no embeddings: "
            "the fleet can measure neither its quality nor its service.",
        )
    assert found is not None
    return found


def cpu_moe_layers(header: Header, declared: int | str | None) -> int:
    """
    Return of how many first layers the experts stay in main memory, of those that there are.

    llama.cpp is given a pattern of names and says nothing where it matches none, so what was
    declared of another model would be served as if it had not been.

    Args:
        header: The GGUF.
        declared: `serving.cpu_moe_layers`.

    Raises:
        ParamsError: The model has no experts, none in so many layers, or fewer layers.
    """
    if declared is None:
        return 0
    layers = {int(found[1]) for tensor in header.tensors if (found := _EXPERTS.search(tensor.name))}
    where = f"serving.cpu_moe_layers: {declared}: {header.path.name}"
    if not layers:
        raise ParamsError(
            f"{where} has no experts that could stay in main memory.",
            hint="Declare cpu_moe_layers below `serving` of the models that have experts.",
        )
    wanted = max(layers) + 1 if declared == "all" else int(declared)
    if not min(layers) < wanted <= max(layers) + 1:
        raise ParamsError(
            f"{where} has experts in the layers {min(layers)} to {max(layers)}, counted from 0.",
            hint=f"Declare {min(layers) + 1} to {max(layers) + 1}, or all.",
        )
    return wanted


def _assigned_name(node: ast.stmt) -> str | None:
    """Name on the left of `name = value` or `name: type = value`."""
    match node:
        case ast.AnnAssign(target=ast.Name(id=name)):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name
        case _:
            return None


def _keys(value: ast.expr | None) -> frozenset[str]:
    """Return the keys of a literal dict of strings; empty if it is anything else."""
    if not isinstance(value, ast.Dict):
        return frozenset()
    return frozenset(
        key.value
        for key in value.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    )
