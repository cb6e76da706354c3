"""
What became of a chat template, in words and as a diff.

A template decides how a model is talked to, and somebody who changes it can make a model say what
they want without touching a weight. So what is new in it is named: the variables and roles it asks
for, control tokens, addresses, and text that it puts into every conversation. Nothing is rendered:
the template is read as text, by patterns whose time grows with its length alone.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from pipelines import wording
from pipelines.upstream_difference_words import NotToldError, diff, quoted, several

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_MAX_LOOKED_AT: Final = 1 << 20
_MAX_TOLD: Final = 6

# What callers hand to a template (transformers' apply_chat_template, llama.cpp's common/chat.cpp),
# and what templates in use ask for besides.
_VARIABLES: Final = (
    "tools", "documents", "enable_thinking", "thinking", "reasoning_effort", "reasoning_content",
    "tool_calls", "add_generation_prompt", "strftime_now", "date_string", "builtin_tools",
    "custom_tools", "tools_in_user_message", "model_identity",
)  # fmt: skip
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_ROLE: Final = re.compile(r"role['\"]?\]?\s{0,4}(?:==|!=)\s{0,4}['\"]([A-Za-z_]{1,30})['\"]")
_CONTROL: Final = re.compile(
    r"<\|[^|<>\s]{1,60}\|>|<\uff5c[^<>\s]{1,60}\uff5c>|</?[A-Za-z_]{2,40}>|\[/?[A-Z_]{3,40}\]"
)
_ADDRESS: Final = re.compile(r"https?://[^\s'\"<>]{1,120}|\bwww\.[^\s'\"<>]{1,120}")
_LITERAL: Final = re.compile(r"\"[^\"\n]{16,4000}\"|'[^'\n]{16,4000}'|(?<=\})[^{}]{16,4000}(?=\{)")
_WORDS: Final = re.compile(r"\b[A-Za-z]{2,30}(?:[ ,.'-]{1,4}[A-Za-z]{1,30}){3}")


def texts(raw: object) -> dict[str, str]:
    """
    Return the templates that a `chat_template` holds, by name; `default` is the one of most.

    Raises:
        NotToldError: It is neither a text nor a list of names and templates.
    """
    if raw is None:
        return {}
    if isinstance(raw, str):
        return {"default": raw}
    if isinstance(raw, list) and all(isinstance(each, dict) for each in raw):
        found: dict[str, str] = {each.get("name"): each.get("template") for each in raw}
        if all(isinstance(name, str) and isinstance(text, str) for name, text in found.items()):
            return found
    if isinstance(raw, dict) and all(isinstance(text, str) for text in raw.values()):
        return raw
    raise NotToldError("its chat_template is no text")


def told(
    file: str, old: Mapping[str, str], new: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """
    Say what became of the templates of one file.

    Args:
        file: Its name, for the words.
        old: Templates by name.
        new: The same of the new revision.

    Returns:
        Sentences, and diffs by title.
    """
    notes: list[str] = []
    details: dict[str, str] = {}
    for name in dict.fromkeys((*old, *new)):
        what = "chat template" if name == "default" else f"chat template {quoted(name)}"
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        try:
            details[f"{what}, {file}"], size = diff(before or "", after or "")
            size += " (folded below)"
        except NotToldError as error:
            size = f"not compared by line, since {error.message}"
        if before is None or after is None:
            fate = "is new" if before is None else "is gone"
            clauses = [f"{fate} ({len(after or before or ''):,} characters, folded below)"]
            clauses += [] if after is None else _addressed("", after)
        else:
            clauses = ["changed: " + size, *_names(before, after), *_addressed(before, after)]
            clauses += _put_in(before, after)
        if max(len(before or ""), len(after or "")) > _MAX_LOOKED_AT:
            clauses.append(f"only its first {_MAX_LOOKED_AT:,} characters were looked at")
        if before is not None and after is not None and before.split() == after.split():
            clauses.append("only white space differs, which changes prompts all the same")
        notes.append(f"{file}: the {what} {several(clauses)}.")
    return notes, details


def _names(before: str, after: str) -> list[str]:
    """Say which variables, roles and control tokens came and went."""
    clauses: list[str] = []
    for find, come, gone in (
        (_variables, "it now uses", "it no longer uses"),
        (_roles, "it now knows the role", "it no longer knows the role"),
        (_controls, "it now writes", "it no longer writes"),
    ):
        was, now = find(before), find(after)
        if new := [each for each in now if each not in was]:
            clauses.append(f"{come} {_few(new)}")
        if lost := [each for each in was if each not in now]:
            clauses.append(f"{gone} {_few(lost)}")
    return clauses


def _few(names: list[str]) -> str:
    more = len(names) - _MAX_TOLD
    cut = names[:_MAX_TOLD]
    return wording.listed([*cut, f"{more:,} more"] if more > 0 else cut)


def _variables(text: str) -> dict[str, None]:
    names = set(_NAME.findall(text[:_MAX_LOOKED_AT]))
    return dict.fromkeys(name for name in _VARIABLES if name in names)


def _roles(text: str) -> dict[str, None]:
    return dict.fromkeys(_ROLE.findall(text[:_MAX_LOOKED_AT]))


def _controls(text: str) -> dict[str, None]:
    return dict.fromkeys(quoted(each) for each in _CONTROL.findall(text[:_MAX_LOOKED_AT]))


def _addressed(before: str, after: str) -> list[str]:
    """Name what a template has no business with."""
    new = _new(_addresses, before, after)
    return [f"ATTENTION: it now names the address {quoted(new[0])}"] if new else []


def _put_in(before: str, after: str) -> list[str]:
    """Name what everybody's conversation may begin with now."""
    new = _new(_sentences, before, after)
    more = f" and {len(new) - 1:,} more such" if len(new) > 1 else ""
    return [f"it now puts in the text {quoted(new[0])}{more}"] if new else []


def _new(find: Callable[[str], list[str]], before: str, after: str) -> list[str]:
    was = set(find(before))
    return [each for each in dict.fromkeys(find(after)) if each not in was]


def _addresses(text: str) -> list[str]:
    return _ADDRESS.findall(text[:_MAX_LOOKED_AT])


def _sentences(text: str) -> list[str]:
    """Find text for the model, in quotes or outside of Jinja: four words in a row and more."""
    found = _LITERAL.findall(text[:_MAX_LOOKED_AT])
    return [" ".join(each.strip("'\"").split()) for each in found if _WORDS.search(each)]


def of_json(raw: Mapping[str, Any]) -> dict[str, str]:
    """Return the templates of a chat_template.json, or of a tokenizer_config.json."""
    return texts(raw.get("chat_template"))
