"""
What upstream's own tokenizer makes of the prompts: the reference that every engine is held against.

transformers renders the chat template that lies beside the model's weights, in a process of its
own: importing it takes seconds, which pass while a server starts, and the template is a stranger's
code. transformers runs it in Jinja's sandbox; the process has no token, no network use, little
memory to add and a time-out, and no code of the repository is loaded (`trust_remote_code=False`).
A template that raises has refused a conversation, in its own words; that is a result.

Two renderings are made of each conversation: of its messages as they are, and of what Ollama sends
to the template, which puts the Modelfile's messages in front of them, and before these its system
text unless the conversation begins with one (server/routes.go of Ollama 0.33, ChatHandler).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from pydantic import ValidationError

from pipelines import apart, atomic, console, proc
from pipelines.errors import FleetError, MachineError, ToolError, UpstreamError
from pipelines.prompts import CONTROL_TOKENS
from pipelines.records import Part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.prompts import Conversation, Prompts

TIMEOUT_S: Final = 180.0
# What one conversation may become. The longest content is 100,000 characters.
_MAX_RENDERED_CHARACTERS: Final = 4_000_000
# What rendering may add to what the tokenizer holds already: a template can double a text for ever.
_MORE_MEMORY_BYTES: Final = 2 << 30
# Llama 3 reserves 250 of them, which no template uses; those that it uses come first.
_MAX_CONTROL_TOKENS: Final = 16
_REQUEST, _ANSWER = "request.json", "answer.json"
_POLL_S: Final = 0.2

Message = dict[str, Any]


class Rendering(Part):
    """
    One conversation as text and as a number of tokens, or the words in which it was refused.

    `tokenizer_bos` says that the text has no BOS and the tokenizer puts one in front of any text:
    an engine that does the same reads one token more than `tokens_count`.
    """

    text: str = ""
    tokens_count: int = 0
    tokenizer_bos: bool = False
    refused: str | None = None


class Rendered(Part):
    """
    A conversation as upstream renders it; `skipped` says why there is nothing to compare.

    `messages` are those to send to an engine: the conversation's, with the special tokens filled
    in. `plain` is made of them, `served` of them behind the Modelfile's own.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    plain: Rendering
    served: Rendering
    skipped: str | None = None


class Reference(Part):
    """
    All conversations, and by what they were rendered.

    `template_sha256` is None where upstream has no chat template; then there are no conversations.
    `thinking` tells whether the template has a switch for it (`enable_thinking`), `dated` whether
    it may print the date.
    """

    transformers: str
    tokenizer: str
    bos_text: str
    template_sha256: str | None
    thinking: bool
    dated: bool = False
    conversations: tuple[Rendered, ...]

    @property
    def sentence(self) -> str:
        """Name the reference: `transformers 5.23.0, LlamaTokenizer, template 1b2c3d4e5f60`."""
        template = (
            f"template {self.template_sha256[:12]}" if self.template_sha256 else "no template"
        )
        return f"transformers {self.transformers}, {self.tokenizer}, {template}"


# --- the side that asks -----------------------------------------------------------------------


class Pending:
    """A rendering under way. Leaving the block, or `close`, ends its process."""

    def __init__(self, source: Path, request: Mapping[str, Any], log: Path) -> None:
        """Start it; returns at once."""
        self._source = source
        self._request = request
        self._log = log
        # Named after the log, so that the next run finds and removes what a kill has left.
        self._folder = atomic.part_name(log.with_name(f"{log.name}.chat")).absolute()
        self._rendered_at = 0.0
        self._is_closed = False
        self._begin()

    def _begin(self) -> None:
        self._failure: BaseException | None = None
        self._reference: Reference | None = None
        atomic.remove(self._folder)
        self._folder.mkdir(parents=True)
        (self._folder / _REQUEST).write_text(json.dumps(self._request), encoding="utf-8")
        self._thread = threading.Thread(target=self._work, daemon=True, name="upstream-chat")
        self._thread.start()

    def __enter__(self) -> Self:
        """Begin the block in which the process may run."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process if it still runs."""
        self.close()

    def close(self) -> None:
        """End the process if it still runs; it goes when its request has gone."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            (self._folder / _REQUEST).unlink(missing_ok=True)
        self._thread.join(timeout=proc.STOP_WITHIN_S)
        with contextlib.suppress(OSError):
            atomic.remove(self._folder)

    def result(self) -> Reference:
        """
        Wait for the reference; where it may hold the date, render it again on another day.

        Raises:
            MachineError: The Python packages for it are missing here.
            UpstreamError: The tokenizer cannot be read, or its template does not come to an end.
            ToolError: The process died, or was closed before.
        """
        known = self._reference
        if known and known.dated and self._is_of_another_day() and not self._is_closed:
            self._begin()
        while self._thread.is_alive():
            # Not one long join: a signal is only handled between two short ones.
            self._thread.join(timeout=_POLL_S)
        if self._failure is not None:
            raise self._failure
        if self._reference is None:
            raise ToolError("the upstream chat template was not rendered.", log=self._log)
        return self._reference

    def _is_of_another_day(self) -> bool:
        """Tell whether the date has changed, here or in UTC: servers have a zone of their own."""
        now = time.time()
        return any(
            zone(self._rendered_at)[:3] != zone(now)[:3] for zone in (time.localtime, time.gmtime)
        )

    def _work(self) -> None:
        self._rendered_at = time.time()
        try:
            self._reference = _rendered(self._source, self._folder, self._log)
        except Exception as error:  # noqa: BLE001 - raised again by `result`
            self._failure = error
        finally:
            with contextlib.suppress(OSError):
                atomic.remove(self._folder)


def start(
    source: Path,
    prompts: Prompts,
    log: Path,
    *,
    system: str = "",
    messages: Sequence[Mapping[str, str]] = (),
) -> Pending:
    """
    Begin to render all conversations with the tokenizer in `source`.

    Args:
        source: Directory of the verified upstream files.
        prompts: The conversations.
        log: File for what the process prints; a folder beside it, named after it, exists meanwhile.
        system: The Modelfile's system text.
        messages: The Modelfile's messages.
    """
    request = {
        "conversations": [_asked(each) for each in prompts.conversations],
        "system": system,
        "messages": [dict(each) for each in messages],
    }
    return Pending(source.absolute(), request, log)


def _asked(conversation: Conversation) -> dict[str, Any]:
    return {
        "id": conversation.id,
        "messages": conversation.plain_messages(),
        "tools": conversation.plain_tools(),
        "needs": list(conversation.needs or ()),
    }


def _rendered(source: Path, folder: Path, log: Path) -> Reference:
    """Run the process and read what it has written."""
    try:
        proc.run(
            apart.module("the chat template", "pipelines.upstream_chat", source, folder / _REQUEST,
                         folder / _ANSWER),
            log=log,
            env=_environment(folder),
            inherit_env=False,
            timeout_s=TIMEOUT_S,
        )  # fmt: skip
    except ToolError as error:
        if "was stopped after" in error.message:
            raise UpstreamError(
                f"the chat template in {source.name}/ was still running after {TIMEOUT_S:.0f} s.",
                hint="Look at chat_template in the model's tokenizer_config.json.",
                log=log,
            ) from error
        raise
    try:
        answer = json.loads((folder / _ANSWER).read_bytes())
        if "failure" in answer:
            raise _failure(answer["failure"], log)
        return Reference.model_validate(answer)
    except (OSError, ValueError, ValidationError) as error:
        raise ToolError(
            "the process that renders the upstream chat template wrote no answer.", log=log
        ) from error


def _environment(folder: Path) -> dict[str, str]:
    """
    All that the process sees of our environment besides PATH.

    Not our time zone: a template may ask for the date (`strftime_now`), and servers do not have it.
    """
    return apart.environment(folder, ours=True) | {
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _failure(told: Mapping[str, str], log: Path) -> FleetError:
    cause = console.clean(told["text"])[:400]
    if told["kind"] == "import":
        return MachineError(
            f"the Python packages that render the upstream chat template are incomplete: {cause}.",
            hint="Install the extra `convert`: make setup.",
            log=log,
        )
    return UpstreamError(
        f"the upstream tokenizer cannot be read: {cause}.",
        hint="Without it no prompt can be checked. Was the model fetched whole?",
        log=log,
    )


# --- the process that renders -----------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Render what REQUEST asks for with the tokenizer in SOURCE and write ANSWER."""
    source, request, answer = (Path(word) for word in argv)
    threading.Thread(target=_leave_without, args=(request,), daemon=True).start()
    asked = json.loads(request.read_bytes())
    try:
        result = _answer(source, asked)
    except ImportError as error:
        if apart.is_ours(error):
            raise
        result = {"failure": {"kind": "import", "text": str(error)}}
    except Exception as error:  # noqa: BLE001 - a tokenizer of a stranger can fail in any way
        result = {"failure": {"kind": "tokenizer", "text": f"{type(error).__name__}: {error}"}}
    atomic.write_json(answer, result)
    return 0


def _leave_without(request: Path) -> None:
    """End this process when the request has gone: nobody waits for the answer any more."""
    while request.exists():
        time.sleep(_POLL_S)
    os._exit(3)


def _answer(source: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    import transformers  # noqa: PLC0415 - seconds, and only in this process

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(source), trust_remote_code=False, local_files_only=True
    )
    _limit_memory()
    renderer = _Renderer(tokenizer, asked)
    return {
        "transformers": transformers.__version__,
        "tokenizer": type(tokenizer).__name__,
        "bos_text": tokenizer.bos_token or "",
        "template_sha256": renderer.template_sha256,
        "thinking": renderer.thinking,
        "dated": "strftime_now" in renderer.template,
        "conversations": [
            renderer.conversation(each)
            for each in asked["conversations"]
            if renderer.template_sha256
        ],
    }


def _limit_memory() -> None:
    """Let the address space grow by a fixed amount from here on (Linux)."""
    import resource  # noqa: PLC0415 - only in this process

    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + _MORE_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class _Renderer:
    """One tokenizer and what the Modelfile puts in front."""

    def __init__(self, tokenizer: Any, asked: Mapping[str, Any]) -> None:  # noqa: ANN401 - transformers has no types
        self._tokenizer = tokenizer
        self._system: str = asked["system"]
        self._messages: list[Message] = asked["messages"]
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = json.dumps(template, sort_keys=True)
        self.template: str = template or ""
        self.template_sha256 = (
            hashlib.sha256(self.template.encode()).hexdigest() if self.template else None
        )
        self.thinking = bool(self.template) and self._differs("thinking", _PROBE, None)

    def conversation(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Render one conversation in both ways."""
        messages = [
            {**each, "content": each["content"].replace(CONTROL_TOKENS, self._control_tokens())}
            for each in asked["messages"]
        ]
        needs, tools = asked["needs"], asked["tools"]
        result = {
            "id": asked["id"],
            "messages": messages,
            "plain": self._render(messages, tools, needs),
            "served": self._render(self._behind(messages), tools, needs),
        }
        for need in ("tools", "thinking"):
            if need in needs and not self._differs(need, messages, tools):
                result["skipped"] = f"the upstream template has no {need}"
        if "prefill" in needs and (why := self._ambiguous(messages, result["plain"])):
            result["skipped"] = why
        return result

    def _ambiguous(self, messages: list[Message], going_on: Mapping[str, Any]) -> str | None:
        """
        Say why there is no one right text for an answer that has begun.

        transformers renders the answer as one that was given and cuts its end off. Servers render
        the question and append the words of the answer. Where a template puts something of its own
        in front of an answer (an empty thought), these differ, and neither is wrong.
        """
        if going_on["refused"] is not None:
            return f"upstream has no prefill: {going_on['refused']}"
        question = self._render(messages[:-1], None, ())
        if question["text"] + messages[-1]["content"] == going_on["text"]:
            return None
        return "the upstream template begins an answer otherwise than it shows one that was given"

    def _behind(self, messages: list[Message]) -> list[Message]:
        """Put in front what Ollama does."""
        served = [*self._messages, *messages]
        if self._system and messages[0]["role"] != "system":
            served = [{"role": "system", "content": self._system}, *served]
        return served

    def _differs(self, need: str, messages: list[Message], tools: list[Any] | None) -> bool:
        """Tell whether a template makes anything of tools, or of the switch for thinking."""
        without = self._render(messages, None if need == "tools" else tools, ())
        return self._render(messages, tools, (need,)) != without

    def _render(
        self, messages: list[Message], tools: list[Any] | None, needs: Sequence[str]
    ) -> dict[str, Any]:
        prefill = "prefill" in needs
        options: dict[str, Any] = {
            "tools": tools,
            "add_generation_prompt": not prefill,
            "continue_final_message": prefill,
            # Said in every request to an engine, too, since templates differ in what they assume.
            "enable_thinking": "thinking" in needs,
        }
        apply = self._tokenizer.apply_chat_template
        try:
            text = apply(messages, tokenize=False, **options)
            # transformers 5 gives a mapping, not a list.
            ids = list(apply(messages, tokenize=True, return_dict=True, **options)["input_ids"])
        except Exception as error:  # noqa: BLE001 - a template of a stranger can fail in any way
            return Rendering(refused=_words(error)).model_dump()
        if len(text) > _MAX_RENDERED_CHARACTERS:
            return Rendering(refused=f"{len(text):,} characters came out").model_dump()
        return Rendering(
            text=text, tokens_count=len(ids), tokenizer_bos=self._adds_bos(ids)
        ).model_dump()

    def _adds_bos(self, ids: list[int]) -> bool:
        """Tell whether the tokenizer would put a BOS in front that the template did not."""
        bos = self._tokenizer.bos_token_id
        return bos is not None and ids[:1] != [bos] and self._tokenizer("x")["input_ids"][0] == bos

    def _control_tokens(self) -> str:
        """Join the special tokens, those that the template itself spells out first."""
        added = self._tokenizer.added_tokens_decoder
        names = [added[id_].content for id_ in sorted(added)]
        names.sort(key=lambda name: name not in self.template)
        return "".join(names[:_MAX_CONTROL_TOKENS])


_PROBE: Final[list[Message]] = [{"role": "user", "content": "Hello"}]


def _words(error: Exception) -> str:
    """Give the words of a template; those of Jinja are better with the kind of mistake."""
    kind = type(error).__name__
    words = " ".join(str(error).split())
    own = kind == "TemplateError"
    return (words if own and words else f"{kind}: {words}".rstrip(": "))[:300]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
