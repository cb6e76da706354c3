"""
The text of params.yaml that `fleet init` writes: blocks with comments that teach, and insertions.

A file is taken apart at its top-level keys; what is written above a key belongs to it. Where a
fleet begins, whole blocks are exchanged; where it grows, lines are put behind the last entry of a
block, and every other byte stays as the operator wrote it.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pipelines.errors import ParamsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.init_plan import Plan, QuantLine
    from pipelines.init_settings import Settings
    from pipelines.init_source import Subject

_KEY: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*):(?:\s|$)")
# What `--license` says of weights of one's own, and how params.yaml and the Hub call that.
MINE: Final = "mine"
OTHER: Final = "other"
# Sections that need no line of their own unless something is said, and what they stand before.
_BEFORE: Final = {"calibrate": "benchmark", "check_upstream": "hosts"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Lines of one entry of a section: a comment, then the key; indented as below the section."""

    section: str
    lines: tuple[str, ...]


# --- entries ----------------------------------------------------------------------------------


def model(
    name: str, subject: Subject, plan: Plan, *, objective: str, license_: str | None, **more: str
) -> Entry:
    """
    Declare a model.

    Args:
        name: Its key.
        subject: What was found of it.
        plan: Its context and quants.
        objective: What is made best.
        license_: That was accepted where upstream states none; `mine`: the weights are one's own.
        more: Further keys with their values as YAML, such as `modelfile`.
    """
    shape = subject.shape
    facts = [
        _plain(subject.architecture),
        f"{shape.parameters_count:,} weights",
        _plain(subject.license) if subject.license else "no licence stated",
    ]
    if subject.trained_tokens:
        facts.append(f"trained with {subject.trained_tokens:,} tokens of context")
    lines = [f"# {', '.join(facts)}.", f"{name}:", f"  source: {subject.source}"]
    if subject.source.startswith("hf:"):
        track = subject.track or "main"
        lines += [
            f"  # What `{track}` meant when this was written. When it moves, `fleet bump` proposes",
            "  # the new commit with the evidence; until that is merged, nothing changes.",
        ]
    else:
        lines.append(f"  # Of the files in that folder: `fleet digest {subject.source[5:]}`.")
    lines.append(f"  revision: {_quoted(subject.revision)}")
    if subject.track:
        lines.append(f"  track: {_quoted(subject.track)}")
    lines.append(f"  context_tokens: {plan.context_tokens}")
    if plan.uses_matrix:
        lines.append("  calibration: calibration")
    if license_ == MINE:
        lines += [
            "  # These weights are our own, so that no licence of others is to be read; `other` is",
            "  # the Hub's word for one that is not in its list.",
            f"  license: {OTHER}",
        ]
    elif license_ is not None:
        lines.append("  # The files of the model state none. This is what was read and accepted.")
        lines.append(f"  license: {_quoted(license_)}")
    lines += [f"  {key}: {value}" for key, value in more.items()]
    lines.append(f"  objective: {objective}")
    return Entry(section="models", lines=tuple(lines))


def quants(name: str, chosen: Sequence[QuantLine]) -> tuple[Entry, ...]:
    """Declare quants, one line for each."""
    return tuple(_quant(name, each) for each in chosen)


def _quant(name: str, each: QuantLine) -> Entry:
    parts = [f"model: {name}", f"type: {each.type}"]
    if each.imatrix:
        parts.append("imatrix: true")
    if each.max_fallbacks:
        parts.append(f"max_fallbacks: {each.max_fallbacks}")
    return Entry(section="quants", lines=(f"{name}-{each.type}: {{{', '.join(parts)}}}",))


def host(name: str, *, kind: str, memory_mib: int, labels: Sequence[str]) -> Entry:
    """Declare a host; `kind` is `vram_mib` or `memory_mib`."""
    told = ", ".join(_quoted(label) for label in labels)
    lines = (f"{name}:", f"  {kind}: {memory_mib}", f"  runs_on: [{told}]")
    return Entry(section="hosts", lines=lines)


def registry(name: str, url: str, **more: str) -> Entry:
    """Declare a registry."""
    rest = "".join(f", {key}: {_quoted(value)}" for key, value in more.items())
    return Entry(section="registries", lines=(f"{name}: {{url: '{url}'{rest}}}",))


# --- sections of a fleet that begins ----------------------------------------------------------

_HEADS: Final = {
    "models": """\
# Who is in the fleet. Another one: `fleet init hf:owner/repo`, or a block like this one.
# docs/params.md has every key; `fleet check` says what is wrong, line by line.""",
    "quants": """\
# One line for each GGUF, called <model>-<TYPE>. All of them are made and measured, and the numbers
# decide which one is served on which host. To try another one, add a line.""",
    "hosts": """\
# Where models are served: `vram_mib` on a host with GPUs, `memory_mib` on one without. `runs_on`
# are the labels of the self-hosted runner that measures for it in a pull request.""",
    "registries": """\
# Where releases go. The chain keeps `local`; `fleet publish --to NAME` sends the same bytes to the
# others: s3://, oci://, hf: and mlflow: (docs/params.md).""",
}
_FALLBACKS: Final = """
# `max_fallbacks`: the rows of so many matrices at most are no whole blocks of the type, so that
# these get a wider one. Without it that is an error."""


def section(key: str, entries: Sequence[Entry]) -> str:
    """Write a whole section of entries."""
    lines = [f"  {line}" for entry in entries for line in entry.lines]
    has_fallbacks = any("max_fallbacks" in line for line in lines)
    head = _HEADS[key] + (_FALLBACKS if has_fallbacks else "")
    return "\n".join([head, f"{key}:", *lines])


def benchmark(settings: Settings) -> str:
    """Write how quants are measured."""
    depths = ", ".join(map(str, settings.depths))
    return f"""\
# Speed, by llama-bench: how fast a prompt is read and an answer written, with an empty context and
# with so many tokens in it. Quality, against the 16-bit GGUF: so many windows of the evaluation
# text, which has no more. Put a longer text of your own domain there (corpora/README.md) before
# you trust a small difference.
benchmark:
  prompt_tokens: {settings.prompt_tokens}
  generate_tokens: {settings.generate_tokens}
  depths: [{depths}]
  repetitions: 7
  dropped_repetitions: 1
  quality:
    context_tokens: {settings.window_tokens}
    chunks: {settings.chunks}"""


def load_test(settings: Settings) -> str:
    """Write what a served model has to stand."""
    levels = f"ttft_ms: {settings.ttft_ms}, tpot_ms: {settings.tpot_ms}, e2e_ms: {settings.e2e_ms}"
    return f"""\
# What the chosen quant has to stand: 1, 2, 4 requests at a time, then 200 random arrivals, of which
# 95 % must keep the levels: time to the first token, for each further one, for the whole answer.
# These are a beginning: write what your users need.
load_test:
  concurrency: [1, 2, 4]
  prompt_tokens: {settings.load_prompt_tokens}
  generate_tokens: {settings.load_generate_tokens}
  slo: {{{levels}}}"""


def calibrate(window_tokens: int) -> str:
    """Write in which windows the importance matrix is fitted."""
    return (
        "# The importance matrix, in windows that this model can read.\n"
        f"calibrate: {{context_tokens: {window_tokens}}}"
    )


def check_upstream(hours: int) -> str:
    """Write how often upstream is looked at."""
    return f"# How often upstream is looked at.\ncheck_upstream: {{period_hours: {hours}}}"


# --- the file ---------------------------------------------------------------------------------


def begun(text: str, blocks: Mapping[str, str | None]) -> str:
    """
    Exchange whole blocks.

    Args:
        text: params.yaml.
        blocks: New text of each, without a line end; None where the section goes.

    Raises:
        ParamsError: The file is written in a way in which its blocks cannot be told apart.
    """
    head, found = _blocks(text)
    end = _end_of(text)
    for key, new in blocks.items():
        if new is None:
            continue
        block = new.replace("\n", end)
        if key in found:
            found[key] = block
        else:
            found = _with(found, key, block, before=_BEFORE.get(key))
    parts = [head] if head else []
    parts += [block for key, block in found.items() if blocks.get(key, block) is not None]
    return (2 * end).join(part.strip("\r\n") for part in parts) + end


def grown(text: str, entries: Sequence[Entry]) -> str:
    """
    Put entries behind the last ones of their sections; a section that is missing is added.

    Raises:
        ParamsError: A section is written in one line, `{...}`: nothing can be put below.
    """
    inserts: dict[int, list[str]] = {}
    missing: dict[str, list[Entry]] = {}
    root = _root(text.replace("\r\n", "\n"))
    for entry in entries:
        node = next((value for key, value in root.value if key.value == entry.section), None)
        if node is None:
            missing.setdefault(entry.section, []).append(entry)
            continue
        if node.flow_style or not node.value:
            raise _cannot(entry)
        indent = " " * node.value[0][0].start_mark.column
        line = _last(node).end_mark.line + 1
        inserts.setdefault(line, []).extend(indent + each for each in entry.lines)
    end = _end_of(text)
    lines = re.split(r"(?<=\n)", text if text.endswith("\n") else text + end)
    for number in sorted(inserts, reverse=True):
        lines[number:number] = [each + end for each in inserts[number]]
    found = "".join(lines)
    for key, each in missing.items():
        block = section(key, each).replace("\n", end)
        found = found.rstrip("\r\n") + 2 * end + block + end
    return found


def _end_of(text: str) -> str:
    """Return the line end that most lines of a text have."""
    return "\r\n" if 2 * text.count("\r\n") > text.count("\n") else "\n"


def _blocks(text: str) -> tuple[str, dict[str, str]]:
    """Return what stands above the first block, and every block by its key."""
    lines = text.split("\n")
    starts: list[tuple[int, str]] = []
    for number, line in enumerate(lines):
        if found := _KEY.match(line):
            start = number
            while start and lines[start - 1].startswith("#"):
                start -= 1
            starts.append((start, found[1]))
    if not starts:
        raise ParamsError(
            "params.yaml is not written in blocks, one for each section.",
            hint="Write `key:` at the beginning of a line, and what belongs to it below.",
        )
    ends = [start for start, _ in starts[1:]] + [len(lines)]
    found_blocks = {
        key: "\n".join(lines[start:end]) for (start, key), end in zip(starts, ends, strict=True)
    }
    return "\n".join(lines[: starts[0][0]]), found_blocks


def _with(found: Mapping[str, str], key: str, block: str, *, before: str | None) -> dict[str, str]:
    """Put a block before another one, or at the end."""
    if before not in found:
        return {**found, key: block}
    return {
        each: text
        for old, kept in found.items()
        for each, text in (((key, block), (old, kept)) if old == before else ((old, kept),))
    }


def _last(node: Any) -> Any:  # noqa: ANN401 - a node of ruamel, which has no types
    """Return the node with which a block ends: its own end mark is where the next one begins."""
    while isinstance(node.value, list) and node.value and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    return node


def _root(text: str) -> Any:  # noqa: ANN401 - the same
    from ruamel.yaml import YAML  # noqa: PLC0415 - not for --help

    return YAML(typ="safe", pure=True).compose(io.StringIO(text, newline=""))


def _cannot(entry: Entry) -> ParamsError:
    shown = "\n".join(f"      {line}" for line in entry.lines)
    return ParamsError(
        f"`{entry.section}` of params.yaml is written in one line, below which nothing can be put; "
        "it was left as it is.",
        hint=f"Write each entry on a line of its own, or add this yourself:\n{shown}",
    )


def _quoted(value: str) -> str:
    """Write text as YAML: in quotes where it would be read as something else."""
    return value if is_word(value) else "'" + value.replace("'", "''") + "'"


def is_word(value: str) -> bool:
    """Tell whether YAML reads it as text without quotes; `null`, `0x1f` and `1e-5` are none."""
    if not re.fullmatch(r"[A-Za-z0-9_/][A-Za-z0-9._/-]*", value):
        return False
    return bool(_root(value).tag == "tag:yaml.org,2002:str")


def key_of(text: str, *, or_else: str = "local") -> str:
    """
    Make a key of a name: `my-desk` of `My Desk`.

    Args:
        text: As it was typed, or as a machine or a folder is called.
        or_else: What it is where nothing is left, and what stands before a number.
    """
    found = re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-_")
    if found and not is_word(found):
        found = f"{or_else}-{found}"
    return found[:63].rstrip("-_") or or_else


def _plain(text: str) -> str:
    """Keep of a stranger's word what is harmless in a comment."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text)[:80]
