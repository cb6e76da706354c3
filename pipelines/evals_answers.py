"""
What a served model answers to the items of a set, and whether it is right.

Greedy: temperature 0, a fixed seed, one slot, no cache of prompts, no penalties, whatever sampling
the file itself asks for. The chat template is the model's own, applied by the server, which is told
to let the model not think. JSON is not forced by a grammar, since it is the model that is tested;
where a tool call begins, llama-server itself may hold the model to the form of one, for f16 and
quants alike.

An answer that has not ended within `evaluate.generate_tokens` is not right. Silence is no answer:
it is an error of the stage, since a slow machine must not count as harm.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from pipelines import console, evals, regressions
from pipelines.errors import ParamsError, ToolError
from pipelines.evals import ExactMatch, JsonSchema, MultipleChoice, ToolCall
from pipelines.prompts import plain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipelines.evals import EvalSet, Item
    from pipelines.params import Evaluate

_SEED: Final = 1
# Nothing left to what the server or the file takes by default (tools/server/README.md).
_GREEDY: Final[dict[str, Any]] = {
    "temperature": 0,
    "top_k": 1,
    "seed": _SEED,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "xtc_probability": 0.0,
    "mirostat": 0,
    "samplers": ["top_k", "temperature"],
    "cache_prompt": False,
    "stream": False,
}
_SERVER_FAILED: Final = 500
_REFUSED: Final = 400
# "The model produced output that does not match the expected ... format": common/chat.cpp.
_NOT_PARSED: Final = "the model produced output"
_SAID_CHARACTERS: Final = 600


def rights(  # noqa: PLR0913 - each is one independent fact
    set_: EvalSet,
    url: str,
    name: str,
    declared: Evaluate,
    *,
    log: Path,
    on_item: Callable[[float], None],
) -> list[tuple[bool, str]]:
    """
    Ask a server every item of a set, one at a time, and judge what it says.

    Args:
        set_: Any kind but a multiple choice.
        url: Root of the server.
        name: What it calls the model.
        declared: Length of an answer and how long silence is borne.
        log: Gets what the process prints that applies schemas.
        on_item: Called with the number of items done.

    Returns:
        For each item whether the answer is right, and the answer.

    Raises:
        ParamsError: The server refuses an item: it is too long, or no template can render it.
        ToolError: It does not answer.
    """
    speaker = _Speaker(url, name, declared, log)
    said: list[Said] = []
    for number, item in enumerate(set_.items, start=1):
        said.append(speaker.ask(item, place=f"{set_.declared.path}:{number}"))
        on_item(number)
    return _judged(set_, said, log)


class Said:
    """One answer: its text, the calls in it, whether it ended by itself."""

    def __init__(self, text: str, *, has_ended: bool, calls: list[tuple[str, str]]) -> None:
        """Hold it."""
        self.text = text
        self.has_ended = has_ended
        self.calls = calls

    def shown(self) -> str:
        """Return all of it as text, for people."""
        return json.dumps({"text": self.text, "calls": self.calls, "ended": self.has_ended})


def _judged(set_: EvalSet, said: list[Said], log: Path) -> list[tuple[bool, str]]:
    """Decide about all answers; schemas are applied by a process of its own, each within a time."""
    checks = [
        {"kind": "json_schema", "value": item.schema_, "text": answer.text}
        for item, answer in zip(set_.items, said, strict=True)
        if isinstance(item, JsonSchema)
    ]
    reasons = iter(regressions.apart(checks, log))
    rights: list[tuple[bool, str]] = []
    for item, answer in zip(set_.items, said, strict=True):
        is_right = not next(reasons) if isinstance(item, JsonSchema) else _is_right(item, answer)
        rights.append((is_right and answer.has_ended, answer.shown()))
    return rights


def _is_right(item: Item, answer: Said) -> bool:
    if isinstance(item, ExactMatch):
        return evals.is_match(item, answer.text)
    return isinstance(item, ToolCall) and evals.is_call(item, answer.calls)


# --- one request ------------------------------------------------------------------------------


class _Speaker:
    """Asks one server, one item after the other; no proxy of ours is between."""

    def __init__(self, url: str, name: str, declared: Evaluate, log: Path) -> None:
        import requests  # noqa: PLC0415 - 0.1 s

        self._url = url
        self._name = name
        self._declared = declared
        self._log = log
        self._session = requests.Session()
        self._session.trust_env = False

    def ask(self, item: Item, *, place: str) -> Said:
        """
        Ask one item; `place` is its line in its file.

        Raises:
            ParamsError: The server refuses it.
            ToolError: There is no answer, or none that can be read.
        """
        path, body = _request(item, self._name, self._declared)
        status, told = self._post(path, body, place)
        if status < _REFUSED:
            try:
                return _read(told, is_chat="messages" in body)
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise ToolError(
                    f"{place}: llama-server answered in an unknown form.", log=self._log
                ) from error
        why = _error_text(told)
        if status >= _SERVER_FAILED and "messages" in body and _NOT_PARSED in why.lower():
            # The model began what the server's parser could not read to the end: the model's fault.
            return Said(why, has_ended=False, calls=[])
        text = f"{place}: llama-server refused it with status {status}: {why}"
        if status >= _SERVER_FAILED:
            raise ToolError(text, log=self._log)
        raise ParamsError(text, hint="Shorten the item, or raise context_tokens of the model.")

    def _post(self, path: str, body: dict[str, Any], place: str) -> tuple[int, Any]:
        import requests  # noqa: PLC0415 - loaded before

        within_s = self._declared.timeout_seconds
        try:
            answer = self._session.post(self._url + path, json=body, timeout=within_s)
            return answer.status_code, answer.json()
        except requests.JSONDecodeError as error:
            raise ToolError(
                f"{place}: llama-server answered with no JSON.", log=self._log
            ) from error
        except requests.Timeout as error:
            raise ToolError(
                f"{place}: llama-server did not answer within {within_s} s.",
                hint="Raise evaluate.timeout_seconds on a slow machine.",
                log=self._log,
            ) from error
        except requests.RequestException as error:
            raise ToolError(f"{place}: llama-server no longer answers.", log=self._log) from error


def _request(item: Item, name: str, declared: Evaluate) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request."""
    assert not isinstance(item, MultipleChoice), "those are scored, not asked"
    if isinstance(item, ExactMatch) and item.prompt is not None:
        body = {"prompt": item.prompt, "n_predict": declared.generate_tokens, "stop": ["\n"]}
        return "/completion", _GREEDY | body
    assert item.messages is not None, "checked when the set was read"
    body = {
        "model": name,
        "messages": plain(item.messages),
        "max_tokens": declared.generate_tokens,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    if isinstance(item, ToolCall):
        body["tools"] = [tool.model_dump() for tool in item.tools]
        body["tool_choice"] = "auto"
    return "/v1/chat/completions", _GREEDY | body


def _read(told: dict[str, Any], *, is_chat: bool) -> Said:
    if not is_chat:
        return Said(str(told["content"]), has_ended=told["stop_type"] != "limit", calls=[])
    choice = told["choices"][0]
    message = choice["message"]
    return Said(
        str(message.get("content") or ""),
        has_ended=choice["finish_reason"] != "length",
        calls=[
            (str(call["function"]["name"]), str(call["function"]["arguments"]))
            for call in message.get("tool_calls") or ()
        ],
    )


def _error_text(told: Any) -> str:  # noqa: ANN401 - any JSON value
    error = told.get("error", told) if isinstance(told, dict) else told
    if isinstance(error, dict):
        error = error.get("message", error)
    return console.clean(str(error))[:_SAID_CHARACTERS]
