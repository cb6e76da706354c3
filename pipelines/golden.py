"""
Golden prompts: the engines make of a conversation what upstream's chat template makes of it.

A wrong template does not show in any benchmark. The model answers, a little worse or for ever, and
nobody knows why. So each conversation is rendered by upstream's tokenizer (`upstream_chat`), by the
engine that serves, and by the llama-server below it (unless the Modelfile has a template of its
own, by which Ollama renders alone), and the texts have to be equal, control tokens and blanks
included. Texts are compared without the one BOS in front: Ollama leaves it to the
tokenizer, others write it. What that hides, a second BOS or none, shows in the next comparison: the
number of tokens that the server counts is the number that upstream's tokenizer gives.

A conversation that upstream's template refuses (some know no system role) is skipped: there is no
text that would be right. Engines may render it all the same, by merging turns; nobody can judge
that. What is never skipped: a template that refuses the Modelfile's own system text, which every
conversation is served behind.
"""

from __future__ import annotations

import difflib
import unicodedata
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from pipelines import console
from pipelines.errors import FleetError
from pipelines.load_records import Golden, GoldenPrompt
from pipelines.wording import clause, counted, first_few, sentence, shortened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pipelines.load_records import Served
    from pipelines.prompts import Conversation, Prompts
    from pipelines.upstream_chat import Reference, Rendered, Rendering

NO_TEMPLATE: Final = (
    "upstream has no chat template, so that there is nothing to compare with, and Ollama would use "
    "ChatML, which this model has never seen"
)
_MAX_DIFF_LINES: Final = 16
_MAX_SIDE_LINES: Final = 5
_LINE_CHARACTERS: Final = 110
# How much of a line is shown in front of the first difference.
_BEFORE: Final = 30


class Renderer(Protocol):
    """What is needed of a loaded model (`pipelines.serving.server.Loaded`)."""

    llama_server_renders: bool

    @property
    def served(self) -> Served:
        """The file as the server has it."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        think: bool = False,
    ) -> str:
        """Return the prompt that the engine makes."""

    def render_by_llama_server(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        think: bool = False,
    ) -> str:
        """Return the prompt that the llama-server below makes."""

    def prompt_tokens(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of prompt tokens that the server counts."""


class _Side(NamedTuple):
    """One engine, how it renders, and what it has to make."""

    name: str
    render: Callable[..., str]
    wanted: Rendering


def check(reference: Reference, prompts: Prompts, loaded: Renderer) -> Golden:
    """
    Hold every conversation against the reference.

    Args:
        reference: What upstream makes of `prompts`, rendered behind the Modelfile that is served.
        prompts: The conversations.
        loaded: The model as it is served. One with a manifest is served by Ollama, which puts the
            Modelfile's system text in front; a bare llama-server has no Modelfile.

    Returns:
        One outcome for each conversation, in the order of the file. `objection` says what follows.

    Raises:
        FleetError: The server is gone. What it refuses to render is a FAIL of that conversation.
    """
    rendered = {each.id: each for each in reference.conversations}
    return Golden(
        version=prompts.version,
        sha256=prompts.sha256,
        upstream=reference.sentence,
        prompts=tuple(
            _judged(each, rendered[each.id], reference.bos_text, loaded)
            if reference.template_sha256
            else GoldenPrompt(id=each.id, outcome="SKIPPED", sentence=sentence(NO_TEMPLATE))
            for each in prompts.conversations
        ),
    )


def objection(golden: Golden) -> str | None:
    """
    Return the sentence by which the gate is closed, or None if the prompts are right.

    Nothing compared is an objection, too: a gate that looked at nothing has not been passed.
    """
    failed = [each for each in golden.prompts if each.outcome == "FAIL"]
    if failed:
        what = f"{counted(len(failed), 'conversation')} of {len(golden.prompts)}"
        return (
            f"{what} ({first_few([each.id for each in failed])}) did not pass as a prompt: "
            f"{sentence(clause(failed[0].sentence))}"
        )
    if not any(each.outcome == "PASS" for each in golden.prompts):
        return f"No prompt could be compared with upstream: {clause(golden.prompts[0].sentence)}."
    return None


def _judged(
    conversation: Conversation, rendered: Rendered, bos: str, loaded: Renderer
) -> GoldenPrompt:
    if rendered.skipped:
        return _skipped(conversation, rendered.skipped)
    if rendered.plain.refused is not None:
        return _skipped(conversation, f"upstream's template refuses it: {rendered.plain.refused}")
    sides = _sides(rendered, loaded)
    differing: dict[str, tuple[str, tuple[str, ...]]] = {}
    for side in sides:
        found = _difference(side, conversation, rendered, bos)
        if found is not None:
            differing[side.name] = found
    if differing:
        return GoldenPrompt(
            id=conversation.id,
            outcome="FAIL",
            sentence=sentence("; ".join(why for why, _ in differing.values())),
            diff=tuple(line for _, lines in differing.values() for line in lines),
        )
    names = " and ".join(side.name for side in sides)
    verb = "render" if len(sides) > 1 else "renders"
    wrong, counts = _counted(conversation, rendered, sides[0], loaded)
    return GoldenPrompt(
        id=conversation.id,
        outcome="FAIL" if wrong else "PASS",
        sentence=sentence(wrong or f"{names} {verb} it as upstream does{counts}"),
    )


def _skipped(conversation: Conversation, why: str) -> GoldenPrompt:
    return GoldenPrompt(
        id=conversation.id, outcome="SKIPPED", sentence=sentence(console.clean(why))
    )


def _sides(rendered: Rendered, loaded: Renderer) -> list[_Side]:
    """Return the engine that serves, and the llama-server below if it is one that renders."""
    if loaded.served.manifest_sha256 is None:
        return [_Side("llama-server", loaded.render, rendered.plain)]
    ollama = _Side("Ollama", loaded.render, rendered.served)
    if not loaded.llama_server_renders:
        return [ollama]
    return [ollama, _Side("llama-server", loaded.render_by_llama_server, rendered.plain)]


def _difference(
    side: _Side, conversation: Conversation, rendered: Rendered, bos: str
) -> tuple[str, tuple[str, ...]] | None:
    """Return what is wrong with one engine's prompt and the lines that show it, or None."""
    if side.wanted.refused is not None:
        # Not the plain one, which has been looked at.
        words = console.clean(side.wanted.refused)
        return f"upstream's template refuses it behind the Modelfile's system text: {words}", ()
    try:
        got = side.render(
            list(rendered.messages),
            conversation.plain_tools(),
            think=conversation.has("thinking"),
        )
    except FleetError as error:
        _require_refusal(error)
        return f"{side.name} does not render it: {clause(error.message)}", ()
    wanted, got = (text.removeprefix(bos) for text in (side.wanted.text, got))
    if wanted == got:
        return None
    line, column = _first_difference(wanted, got)
    return (
        f"{side.name} renders it otherwise than upstream, from line {line}, character {column} on",
        tuple(_diff(side.name, wanted, got)),
    )


def _require_refusal(error: FleetError) -> None:
    """
    Let an answer of the server pass, and nothing else: one that is gone has refused nothing.

    Raises:
        FleetError: The same error.
    """
    from pipelines.serving.server import ServingError  # noqa: PLC0415 - not for the report

    # Those below it say what is wrong with the server, not with the request.
    if type(error) is not ServingError:
        raise error


def _counted(
    conversation: Conversation, rendered: Rendered, side: _Side, loaded: Renderer
) -> tuple[str, str]:
    """Return (what is wrong with the number of tokens, else "", the end of the good sentence)."""
    wanted = side.wanted.tokens_count
    if conversation.tools or conversation.has("thinking"):
        return "", ""
    if wanted >= loaded.served.context_tokens:
        return "", "; not counted, for it is longer than the context"
    try:
        got = loaded.prompt_tokens(list(rendered.messages))
    except FleetError as error:
        _require_refusal(error)
        return f"{side.name} does not answer it: {clause(error.message)}", ""
    if got == wanted:
        return "", f", {got:,} tokens"
    if got == wanted + 1 and side.wanted.tokenizer_bos:
        return "", f", {got:,} tokens with the BOS that the tokenizer puts in front"
    more = "a second BOS?" if got == wanted + 1 else "another tokenizer, or text that was cut?"
    read = f"{side.name} reads {got:,} tokens"
    return f"{read}, upstream's tokenizer makes {wanted:,} of the same text: {more}", ""


# --- the difference, for people ---------------------------------------------------------------


def _first_difference(wanted: str, got: str) -> tuple[int, int]:
    """Return the 1-based line and character of the first difference, in upstream's text."""
    at = next(
        (i for i, (one, other) in enumerate(zip(wanted, got, strict=False)) if one != other),
        min(len(wanted), len(got)),
    )
    before = wanted[:at]
    return before.count("\n") + 1, at - (before.rfind("\n") + 1) + 1


def _diff(name: str, wanted: str, got: str) -> Iterator[str]:
    """Yield the lines that differ and one around: `-` as upstream has it, `+` as the engine."""
    yield "- upstream"
    yield f"+ {name}"
    lines = list(_diff_lines(_lines(wanted), _lines(got)))
    yield from lines[:_MAX_DIFF_LINES]
    if len(lines) > _MAX_DIFF_LINES:
        yield f"… and {counted(len(lines) - _MAX_DIFF_LINES, 'line')} more"


def _lines(text: str) -> list[str]:
    """Split at line feeds and nowhere else: the other line ends of Python have to be seen."""
    *lines, rest = text.split("\n")
    return [f"{line}\n" for line in lines] + ([rest] if rest else [])


def _diff_lines(wanted: list[str], got: list[str]) -> Iterator[str]:
    matcher = difflib.SequenceMatcher(None, wanted, got, autojunk=False)
    for group in matcher.get_grouped_opcodes(n=1):
        yield f"@@ line {group[0][1] + 1} @@"
        for kind, low, high, other_low, other_high in group:
            if kind == "equal":
                yield from (f"  {_visible(line)}" for line in wanted[low:high])
                continue
            ours, theirs = wanted[low:high], got[other_low:other_high]
            # Only the first of each is surely the same line.
            starts = [_shared_start(ours, theirs)] + [0] * (len(ours) + len(theirs))
            yield from _side_lines("-", ours, starts)
            yield from _side_lines("+", theirs, starts)


def _side_lines(sign: str, lines: list[str], starts: list[int]) -> Iterator[str]:
    """Show the first lines of one side, so that the other has room as well."""
    shown = zip(lines[:_MAX_SIDE_LINES], starts, strict=False)
    yield from (f"{sign} {_visible(*each)}" for each in shown)
    if len(lines) > _MAX_SIDE_LINES:
        yield f"{sign} … and {counted(len(lines) - _MAX_SIDE_LINES, 'line')} more"


def _shared_start(wanted: list[str], got: list[str]) -> int:
    """Return from where on lines need to be shown: a little before they begin to differ."""
    if not wanted or not got:
        return 0
    _, column = _first_difference(wanted[0], got[0])
    return max(0, column - 1 - _BEFORE)


def _visible(line: str, start: int = 0) -> str:
    r"""
    Show a line with what cannot be seen made visible, from `start` on.

    `·` is a blank at an end, `→` a tab, `↵` the end of the line, `\u200b` any other character
    that has no picture of its own.
    """
    body = line.removesuffix("\n")
    inner = body.strip(" ")
    lead = len(body) - len(body.lstrip(" "))
    dotted = "·" * lead + inner + "·" * (len(body) - lead - len(inner))
    text = dotted[start:] + ("↵" if line.endswith("\n") else "")
    shown = "".join(map(_picture, text))
    return ("…" if start else "") + shortened(console.clean(shown), _LINE_CHARACTERS)


def _picture(character: str) -> str:
    if character == "\t":
        return "→"
    if character == " " or unicodedata.category(character)[0] not in "CZ":
        return character
    return character.encode("unicode_escape").decode()
