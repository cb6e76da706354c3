"""What became of a model's configuration, its defaults for sampling, its card and licence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final

from pipelines import wording
from pipelines.upstream_difference_words import (
    changed,
    clause,
    leaves,
    quoted,
    several,
    shown,
    value,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

# What the most important keys decide; they are told first, in this order. Those of a part, as of
# `text_config`, count like the whole model's.
_MEANINGS: Final = {
    "architectures": "what the model is",
    "model_type": "",
    "quantization_config": "",
    "auto_map": "code of the repository",
    "torch_dtype": "",
    "dtype": "",
    "max_position_embeddings": "the context it was trained for",
    "rope_theta": "positions",
    "rope_scaling": "positions beyond the trained context",
    "rope_parameters": "positions",
    "sliding_window": "how far attention reaches",
    "eos_token_id": "where answers end",
    "eos_token": "where answers end",
    "bos_token_id": "",
    "bos_token": "",
    "add_bos_token": "",
    "tokenizer_class": "",
    "pad_token_id": "",
    "vocab_size": "",
    "hidden_size": "",
    "num_hidden_layers": "",
    "num_attention_heads": "",
    "num_key_value_heads": "",
    "tie_word_embeddings": "",
}
_ORDER: Final = {key: at for at, key in enumerate(_MEANINGS)}
# Who wrote the file, and nothing about the model.
_OF_NO_MEANING: Final = frozenset({"transformers_version", "_name_or_path", "_commit_hash"})

# Of generation_config.json, what the converter writes into a GGUF: gguf-py/gguf/metadata.py
# (general.sampling.*), conversion/gemma.py (suppress_tokens), conversion/hunyuan.py (eos_token_id).
SAMPLING: Final = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "penalty_repeat",
    "penalty_last_n", "xtc_probability", "xtc_threshold", "sequence", "mirostat", "mirostat_tau",
    "mirostat_eta", "eos_token_id", "suppress_tokens",
)  # fmt: skip

_LICENSE_KEYS: Final = ("license", "license_name", "license_link")
# `license: mit`, `"license": mit`. Whatever else YAML allows at the first column is not told.
_KEY: Final = re.compile(r"([\"']?)([A-Za-z0-9_][A-Za-z0-9_. -]{0,99})\1\s{0,20}:(?:\s|$)")
# By its heading alone the converter makes a reranker of one family (conversion/qwen.py).
_RERANKERS: Final = ("# qwen3-reranker", "# qwen3-vl-reranker")
_MAX_FRONT_LINES: Final = 20_000


# --- config.json ------------------------------------------------------------------------------


def of_config(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say key by key what differs between two config.json, what matters most first."""
    then, now = leaves(old), leaves(new)
    keys = sorted(changed(then, now), key=_rank)
    return [_explained(key, then, now) for key in keys]


def _rank(key: str) -> tuple[int, str]:
    if key in _OF_NO_MEANING:
        return len(_ORDER) + 1, key
    return min(
        (_ORDER[part] for part in key.split(".") if part in _ORDER), default=len(_ORDER)
    ), key


def _explained(key: str, then: Mapping[str, object], now: Mapping[str, object]) -> str:
    meaning = next((_MEANINGS[part] for part in key.split(".") if _MEANINGS.get(part)), "")
    told = clause(key, then, now)
    return f"{told} ({meaning})" if meaning else told


def refusals(config: Mapping[str, Any], known_architectures: frozenset[str] | None) -> list[str]:
    """
    Say by which of its values fetch would refuse a configuration.

    Args:
        config: The new config.json.
        known_architectures: What the pinned llama.cpp converts; None if nobody looked.
    """
    found: list[str] = []
    names = architectures(config)
    if not names:
        found.append("config.json names no architecture")
    elif known_architectures is not None and not known_architectures.intersection(names):
        close = get_close_matches(names[0][:100], known_architectures, n=2)
        like = f" (like {' and '.join(close)}?)" if close else ""
        shown = " / ".join(quoted(name) for name in names)
        found.append(
            f"the pinned llama.cpp does not convert {shown}{like}; a newer one may "
            "(toolchain.llama_cpp_python)"
        )
    if declared := config.get("quantization_config"):
        method = declared.get("quant_method") if isinstance(declared, dict) else declared
        found.append(f"config.json says that the weights are quantized already ({value(method)})")
    return found


def architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the architectures that the converter would look at; see `architectures.of_config`."""
    sections = [config, config.get("text_config")]
    named = [each.get("architectures") for each in sections if isinstance(each, dict)]
    firsts = [names[0] for names in named if isinstance(names, list) and names]
    return tuple(name for name in firsts if isinstance(name, str))


# --- generation_config.json -------------------------------------------------------------------


def of_generation(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say which defaults for sampling differ; those that no GGUF holds come last and are named."""
    then, now = leaves(old), leaves(new)
    keys = changed(then, now)
    read = [key for key in keys if key.split(".")[0] in SAMPLING]
    told = [_explained(key, then, now) for key in read]
    rest = [clause(key, then, now) for key in keys if key not in read]
    if rest:
        told.append(f"of no effect on the GGUF: {several(rest, 4)}")
    return told


def reaches_gguf(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Tell whether a generation_config.json differs in something that the converter writes."""
    keys = changed(old, new)
    return any(key in SAMPLING for key in keys)


# --- the card ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Card:
    """
    A README.md as far as it decides something.

    Attributes:
        raw: The front matter as it is written; empty if there is none.
        front: Each key of the front matter with the lines of its value, in their order.
        is_plain: Whether the front matter is of that simple form all through. It is a stranger's
            YAML, and is not parsed: what cannot be told by its lines could be the licence.
        is_read: Whether the converter reads it: nothing stands before it, and be it a blank line.
        is_reranker: See `_RERANKERS`.
    """

    raw: str
    front: tuple[tuple[str, str], ...]
    is_plain: bool
    is_read: bool
    is_reranker: bool

    @property
    def license(self) -> tuple[tuple[str, str], ...]:
        """What it says of the licence."""
        return tuple((key, told) for key, told in self.front if key in _LICENSE_KEYS)


def card(text: str) -> Card:
    """
    Read a card as the converter does (gguf-py/gguf/metadata.py, load_model_card).

    But for what may stand before the front matter: the Hub passes over that, the converter over the
    whole card then, and whoever reads the licence on the Hub's page is not to be told another one.
    """
    is_read = text.startswith("---")
    lines = text.lstrip("\ufeff \t\r\n").splitlines()
    is_reranker = any(word in text.lower() for word in _RERANKERS)
    if not lines or lines[0] != "---":
        return Card(raw="", front=(), is_plain=True, is_read=True, is_reranker=is_reranker)
    end = next((at for at, line in enumerate(lines[1:], 1) if line == "---"), len(lines))
    front: list[tuple[str, list[str]]] = []
    is_plain = end <= _MAX_FRONT_LINES
    for line in lines[1 : min(end, _MAX_FRONT_LINES)]:
        key = _KEY.match(line)
        if key is not None:
            front.append((key[2].strip(), [line[key.end() :].strip()]))
        elif front and (not line.strip() or line[0] in " -#"):
            front[-1][1].append(line.strip())
        elif line.strip() and not line.startswith("#"):
            is_plain = False
    told = tuple((key, "\n".join(part for part in parts if part)) for key, parts in front)
    # An anchor, an alias or a merge takes a value from elsewhere.
    is_plain = is_plain and not any(
        key == "<<" or (key in _LICENSE_KEYS and each.startswith(("*", "&", "!", "{", "|", ">")))
        for key, each in told
    )
    return Card(
        raw="\n".join(lines[1:end]), front=told,
        is_plain=is_plain, is_read=is_read, is_reranker=is_reranker,
    )  # fmt: skip


def licence_differs(old: Card, new: Card) -> bool:
    """Tell whether two cards may declare different licences; yes where that cannot be told."""
    if old.license != new.license or (old.license and old.is_read != new.is_read):
        return True
    return not (old.is_plain and new.is_plain) and old.raw != new.raw


def card_reaches_gguf(old: Card, new: Card) -> bool:
    """Tell whether a card differs in something that the converter reads."""
    then, now = (each.raw if each.is_read else "" for each in (old, new))
    return then != now or old.is_reranker != new.is_reranker


def of_card(old: Card, new: Card) -> list[str]:
    """Say what differs between two cards."""
    clauses = []
    if licence_differs(old, new):
        then, now = _licence(old), _licence(new)
        clauses += [clause(key, then, now) for key in changed(then, now)]
        if not (old.is_plain and new.is_plain):
            clauses.append("the front matter is of a form that may hide what it says of a licence")
    if old.is_read != new.is_read and (old.raw or new.raw):
        what = "reads it now" if new.is_read else "overlooks it now, as something stands before it"
        clauses.append(f"the front matter is there, and the converter {what}")
    before, after = dict(old.front), dict(new.front)
    keys = [key for key in (*before, *after) if key not in _LICENSE_KEYS]
    keys = [key for key in dict.fromkeys(keys) if before.get(key) != after.get(key)]
    if keys:
        named = wording.listed([shown(key, 40) for key in keys[:8]])
        clauses.append(f"the front matter says something else of {named}")
    if old.is_reranker != new.is_reranker:
        clauses.append("by its heading, the converter makes a reranker of it or no longer does")
    if not clauses:
        clauses.append(
            "the front matter is written otherwise" if old.raw != new.raw
            else "only the text below the front matter changed"
        )  # fmt: skip
    return clauses


def _licence(told: Card) -> dict[str, object]:
    return {
        key: ", ".join(line.removeprefix("- ") for line in each.split("\n"))
        for key, each in told.license
    }
