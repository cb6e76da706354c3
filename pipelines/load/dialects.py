"""
What is said to a server and what its answer means: Ollama's own API, and the OpenAI-compatible one.

A stream is read after the run, from the bytes and the times at which they came. Every answer is
`ok` or of exactly one class of `pipelines.load_records.ErrorClass`; a 200 alone means nothing.

Source: streaming handlers of Ollama 0.33 (server/routes.go, openai/openai.go, llm/llama_server.go)
and of llama-server (tools/server/server.cpp); `docs/api.md` of the first.
"""

from __future__ import annotations

import itertools
import json
import math
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pipelines.load.plan import Api, Prompt, Target, Task
    from pipelines.load_records import ErrorClass

# Ollama ends a stream after more than 30 equal tokens, without `done` and without an error
# (llm/llama_server.go, "token repeat limit"). Chunks may merge, so that a few fewer arrive.
LOOP_CHUNKS: Final = 24
_DETAIL_CHARS: Final = 300
# A token is some tens of bytes of text in some hundred bytes of JSON.
_TOKEN_BYTES: Final = 2048
_ANSWER_BYTES: Final = 1 << 18
# 16,384 dimensions, each of some twenty letters.
_EMBEDDING_BYTES: Final = 1 << 20
# Tokens, or nanoseconds of a hundred days; sums of more are no numbers any more.
_MOST_COUNTED: Final = 1 << 53
_HTTP_OK: Final = 200
_HTTP_ERROR: Final = 400
_HTTP_SERVER_ERROR: Final = 500


@dataclass(kw_only=True)
class Exchange:
    """
    One request and the bytes that came back, each read with its time; as the process kept it.

    Attributes:
        index: Place in the plan's prompts.
        scheduled_ns: When it should start, on the monotonic clock, as are all times.
        sent_ns: When it did.
        end_ns: When the last byte came, or the failure was seen.
        status: HTTP status; None without an answer.
        failure: Class of what the transport met; None if the answer ended by itself.
        detail: What it said.
        resent: The server had closed the kept connection, so that it was sent on a new one.
        stamps: Time of each read.
        sizes: Bytes of each read.
        body: All of them.
    """

    index: int
    scheduled_ns: int
    sent_ns: int = 0
    end_ns: int = 0
    status: int | None = None
    failure: ErrorClass | None = None
    detail: str = ""
    resent: bool = False
    stamps: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """
    What one request came to.

    Attributes:
        index: Place in the plan's prompts, of which the first are the warm-up's.
        scheduled_ns, sent_ns, end_ns: See `Exchange`.
        first_ns, last_ns: Times of the first and last chunk with content; thinking is content. An
            embedding comes in one piece: it has a last one, and no first.
        done_ns: When the server said that generation had ended. An answer that ended by itself has
            a last token that is no content: it is in the server's count, and generated until then.
        error: Class of the failure; None of a success.
        detail: What the server or the transport said of it.
        status: HTTP status.
        text: Content of the answer, thinking left out.
        done_reason: Why it ended, in the server's word.
        prompt_tokens, output_tokens: As the server counts; None where it does not say.
        chunks_count: Chunks with content.
        queue_ms: What the server says it waited, of Ollama alone.
        eval_ms: What the server says that generation took.
        resent: See `Exchange`.
        stamps_ns: Times of all chunks with content; written to disk only if the plan says so.
        texts: Content of each of these chunks, thinking included; the same.
        calls: Name and arguments, as JSON text, of each call of a tool, in order.
    """

    index: int
    scheduled_ns: int
    sent_ns: int
    end_ns: int
    first_ns: int | None = None
    last_ns: int | None = None
    done_ns: int | None = None
    error: ErrorClass | None = None
    detail: str = ""
    status: int | None = None
    text: str = ""
    done_reason: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    chunks_count: int = 0
    queue_ms: float | None = None
    eval_ms: float | None = None
    resent: bool = False
    stamps_ns: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    calls: tuple[tuple[str, str], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it is a success."""
        return self.error is None


def path(api: Api, task: Task = "chat") -> str:
    """Path of the endpoint."""
    if task == "embed":
        return "/api/embed" if api == "ollama" else "/v1/embeddings"
    return "/api/chat" if api == "ollama" else "/v1/chat/completions"


def body(target: Target, prompt: Prompt) -> dict[str, Any]:
    """
    Compose a request.

    Ollama: `shift` and `truncate` off make it refuse what does not fit instead of cutting it, and
    `shift` is an attribute of the loaded model: a request without it would load it again. Nothing
    else that would (num_ctx, num_batch ...) is sent. `think` off is accepted of every model, on
    only of some.

    OpenAI-compatible: without `include_usage` there are no counts of tokens; `max_tokens`, since
    Ollama does not read `max_completion_tokens`.
    """
    if target.task == "embed":
        return _embedding_body(target, prompt.messages[-1]["content"])
    messages = list(prompt.messages)
    # Both spell them alike, and let the model decide whether it calls one.
    tools = {"tools": list(prompt.tools)} if prompt.tools else {}
    if target.api == "ollama":
        return tools | {
            "model": target.model,
            "messages": messages,
            "stream": True,
            "think": False,
            "shift": False,
            "truncate": False,
            "options": {
                "temperature": target.temperature,
                "seed": target.seed,
                "num_predict": target.generate_tokens,
            },
        }
    return tools | {
        "model": target.model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": target.temperature,
        "seed": target.seed,
        "max_tokens": target.generate_tokens,
    }


def _embedding_body(target: Target, text: str) -> dict[str, Any]:
    """Ask for one embedding; Ollama would silently cut a text that is too long."""
    asked: dict[str, Any] = {"model": target.model, "input": text}
    if target.api == "ollama":
        return asked | {"truncate": False}
    return asked | {"encoding_format": "float"}


def most_bytes(target: Target) -> int:
    """Bytes beyond which an answer is no answer of so many tokens, or no embedding."""
    if target.task == "embed":
        return _EMBEDDING_BYTES
    return _ANSWER_BYTES + _TOKEN_BYTES * target.generate_tokens


class _Failed(Exception):  # noqa: N818 - a way out of the parser, no error of ours
    """An answer is of this class."""

    def __init__(self, kind: ErrorClass, detail: str) -> None:
        super().__init__(detail)
        self.kind: ErrorClass = kind


@dataclass
class _Reading:
    """What is known of an answer so far."""

    stamps: list[int] = field(default_factory=list)
    chunks: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    calls: dict[int, list[str]] = field(default_factory=dict)
    done: bool = False
    done_stamp: int | None = None
    embedded_stamp: int | None = None
    done_reason: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    queue_ms: float | None = None
    eval_ms: float | None = None

    def content(self, stamp: int, shown: str, hidden: str) -> None:
        """Note a chunk; `hidden` is thinking or a tool call: content to the clock, not text."""
        if shown or hidden:
            self.stamps.append(stamp)
            self.chunks.append(shown + hidden)
        if shown:
            self.said.append(shown)

    def call(self, place: int, name: str, arguments: str) -> None:
        """Note a call, or the next piece of one; `place` tells the calls of an answer apart."""
        known = self.calls.setdefault(place, ["", ""])
        known[0] += name
        known[1] += arguments


def read(exchange: Exchange, target: Target, prompt: Prompt) -> Answer:
    """Tell what came of a request."""
    reading = _Reading()
    error: ErrorClass | None = None
    detail = ""
    try:
        _read(exchange, target, reading)
        _judge(exchange, target, prompt, reading)
    except _Failed as failed:
        error, detail = failed.kind, str(failed)[:_DETAIL_CHARS]
    return Answer(
        index=exchange.index,
        scheduled_ns=exchange.scheduled_ns,
        sent_ns=exchange.sent_ns,
        end_ns=exchange.end_ns,
        first_ns=reading.stamps[0] if reading.stamps else None,
        last_ns=reading.stamps[-1] if reading.stamps else reading.embedded_stamp,
        done_ns=reading.done_stamp,
        error=error,
        detail=detail,
        status=exchange.status,
        text="".join(reading.said),
        done_reason=reading.done_reason,
        prompt_tokens=reading.prompt_tokens,
        output_tokens=reading.output_tokens,
        chunks_count=len(reading.stamps),
        queue_ms=reading.queue_ms,
        eval_ms=reading.eval_ms,
        resent=exchange.resent,
        stamps_ns=tuple(reading.stamps),
        texts=tuple(reading.chunks),
        calls=tuple((name, arguments) for name, arguments in reading.calls.values()),
    )


def _read(exchange: Exchange, target: Target, reading: _Reading) -> None:
    """Take in an answer, up to a failure."""
    if exchange.status is None:
        raise _Failed(exchange.failure or "connect", exchange.detail)
    if exchange.status >= _HTTP_SERVER_ERROR:
        raise _Failed("http_5xx", _told(exchange))
    if exchange.status >= _HTTP_ERROR:
        raise _Failed("http_4xx", _told(exchange))
    if exchange.status != _HTTP_OK:
        raise _Failed("malformed", f"status {exchange.status}")
    if target.task == "embed":
        _embedding(exchange, target, reading)
    else:
        _lines(exchange, target, reading)


def _lines(exchange: Exchange, target: Target, reading: _Reading) -> None:
    """Take in a stream, line by line."""
    take = _ollama if target.api == "ollama" else _openai
    *lines, rest = exchange.body.split(b"\n")
    reads = zip(exchange.stamps, itertools.accumulate(exchange.sizes), strict=True)
    stamp, come = next(reads, (exchange.end_ns, 0))
    at = 0
    for line in lines:
        # A line is there when its end is: content in its first half could not be shown before.
        at += len(line) + 1
        while come < at:
            stamp, come = next(reads)
        take(line, stamp, reading)
    if rest.strip():
        # A last line without its end is whole only if the stream ended by itself.
        try:
            take(rest, exchange.end_ns, reading)
        except _Failed as failed:
            if failed.kind == "error_in_stream" or exchange.failure is None:
                raise


def _told(exchange: Exchange) -> str:
    """Return what a server says of its refusal: Ollama {"error": text}, OpenAI {"error": {..}}."""
    text = exchange.body[: 4 * _DETAIL_CHARS].decode(errors="replace")
    try:
        said = _error_text(json.loads(exchange.body)) or text
    except ValueError:
        said = text
    return f"status {exchange.status}: {said}".strip(": ")


def _error_text(value: object) -> str | None:
    """Return the text of an error in a parsed line, None if it holds none."""
    if not isinstance(value, dict) or not value.get("error"):
        return None
    error = value["error"]
    said = error.get("message", error) if isinstance(error, dict) else error
    return said if isinstance(said, str) else json.dumps(said)


def _judge(exchange: Exchange, target: Target, prompt: Prompt, reading: _Reading) -> None:
    """Judge an answer that holds no error line: did it end, and is it one."""
    if not reading.done:
        if _loops(reading.chunks) and exchange.failure in (None, "malformed"):
            raise _Failed("loop", f"{len(reading.chunks)} chunks, the last ones equal, and no end")
        if exchange.failure is not None:
            raise _Failed(exchange.failure, exchange.detail)
        raise _Failed(
            "truncated_stream", f"ended after {len(reading.chunks)} chunks without saying so"
        )
    if reading.embedded_stamp is None and (not reading.chunks or reading.output_tokens == 0):
        raise _Failed("empty_output", f"done ({reading.done_reason or 'no reason'}) and no token")
    read_tokens = reading.prompt_tokens
    if read_tokens is None:
        return
    if prompt.tokens is not None and read_tokens < prompt.tokens:
        raise _Failed("cut_context", f"{read_tokens} of {prompt.tokens} prompt tokens were read")
    # A text may fill the context of an encoder, since nothing follows it.
    room = target.context_tokens if target.task == "chat" else None
    if room is not None and read_tokens >= room:
        raise _Failed(
            "cut_context", f"{read_tokens} prompt tokens fill the context of {room}"
        )  # fmt: skip


def _loops(chunks: list[str]) -> bool:
    """Tell whether the last chunks are equal, as Ollama's guard compares them: without spaces."""
    last = chunks[-LOOP_CHUNKS:]
    return len(last) == LOOP_CHUNKS and len({chunk.strip() for chunk in last}) == 1


# --- Ollama -----------------------------------------------------------------------------------


def _ollama(line: bytes, stamp: int, reading: _Reading) -> None:
    if not line.strip():
        return
    value = _parsed(line)
    _fail_on_error(value)
    message = value.get("message")
    if not isinstance(message, dict):
        raise _Failed("malformed", f"a line without a message: {_shown(line)}")
    calls = message.get("tool_calls")
    for function, _ in _calls(calls, line):
        # Each comes whole, its arguments as an object.
        arguments = function.get("arguments")
        reading.call(len(reading.calls), _text(function.get("name"), line), json.dumps(arguments))
    hidden = _text(message.get("thinking"), line) + (json.dumps(calls) if calls else "")
    reading.content(stamp, _text(message.get("content"), line), hidden)
    if value.get("done") is not True:
        return
    reading.done, reading.done_stamp = True, stamp
    reading.done_reason = _text(value.get("done_reason"), line)
    # Fields that are 0 are left out of the line.
    reading.output_tokens = _count(value.get("eval_count"), line) or (
        None if reading.chunks else 0
    )  # fmt: skip
    reading.prompt_tokens = _count(value.get("prompt_eval_count"), line)
    names = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
    total, load, prompt, generation = (_count(value.get(name), line) or 0 for name in names)
    if total:
        reading.queue_ms = max(0, total - load - prompt - generation) / 1e6
        reading.eval_ms = generation / 1e6


# --- OpenAI-compatible ------------------------------------------------------------------------


def _openai(line: bytes, stamp: int, reading: _Reading) -> None:
    """
    Take in one line of server-sent events.

    llama-server says `error: {...}` in the place of `data:` in some versions, in others it puts
    the error into the data.
    """
    line = line.strip()
    name, _, data = line.partition(b":")
    data = data.strip()
    if not line or line.startswith(b":") or name in (b"event", b"id", b"retry"):
        return
    if name == b"error":
        raise _Failed("error_in_stream", data.decode(errors="replace"))
    if name != b"data":
        raise _Failed("malformed", f"no event: {_shown(line)}")
    if data == b"[DONE]":
        reading.done = True
        return
    value = _parsed(data)
    _fail_on_error(value)
    choices = value.get("choices")
    if not isinstance(choices, list):
        raise _Failed("malformed", f"an event without choices: {_shown(data)}")
    if choices:
        _openai_choice(choices[0], stamp, data, reading)
    usage = value.get("usage")
    if isinstance(usage, dict):
        reading.prompt_tokens = _count(usage.get("prompt_tokens"), data)
        reading.output_tokens = _count(usage.get("completion_tokens"), data)
    timings = value.get("timings")
    if isinstance(timings, dict):
        generation = timings.get("predicted_ms")
        if isinstance(generation, (int, float)):
            reading.eval_ms = float(generation)


def _openai_choice(choice: object, stamp: int, line: bytes, reading: _Reading) -> None:
    if not isinstance(choice, dict):
        raise _Failed("malformed", f"no choice: {_shown(line)}")
    delta = choice.get("delta") or {}
    if not isinstance(delta, dict):
        raise _Failed("malformed", f"no delta: {_shown(line)}")
    # `reasoning_content` is llama-server's and vLLM's word, `reasoning` Ollama's and newer vLLM's.
    calls = delta.get("tool_calls")
    for function, index in _calls(calls, line):
        # The name comes first, then the text of the arguments in pieces.
        name, arguments = (_text(function.get(key), line) for key in ("name", "arguments"))
        reading.call(index, name, arguments)
    hidden = _text(delta.get("reasoning_content") or delta.get("reasoning"), line)
    hidden += json.dumps(calls) if calls else ""
    reading.content(stamp, _text(delta.get("content"), line), hidden)
    reason = _text(choice.get("finish_reason"), line)
    if reason:
        reading.done_stamp, reading.done_reason = stamp, reason


# --- embeddings -------------------------------------------------------------------------------


def _embedding(exchange: Exchange, target: Target, reading: _Reading) -> None:
    """
    Take in an answer that is one JSON object, with one vector of finite numbers, not all zero.

    Whether it is the right vector is another question (`pipelines.load_embeddings`).
    """
    if exchange.failure is not None:
        raise _Failed(exchange.failure, exchange.detail)
    value = _parsed(exchange.body)
    _fail_on_error(value)
    if target.api == "ollama":
        vectors, counted = value.get("embeddings"), value
        name = "prompt_eval_count"
    else:
        data = value.get("data")
        vectors = (
            [each.get("embedding") if isinstance(each, dict) else None for each in data]
            if isinstance(data, list)
            else None
        )
        usage = value.get("usage")
        counted, name = usage if isinstance(usage, dict) else {}, "prompt_tokens"
    reading.prompt_tokens = _count(counted.get(name), exchange.body)
    if not isinstance(vectors, list) or len(vectors) != 1:
        raise _Failed("malformed", "not one embedding of one text")
    if not _is_vector(vectors[0]):
        raise _Failed("empty_output", "an embedding without numbers, or of zeros")
    reading.done = True
    reading.embedded_stamp = reading.done_stamp = (
        exchange.stamps[-1] if exchange.stamps else exchange.end_ns
    )


def _is_vector(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(each, int | float) and math.isfinite(each) for each in value)
        and any(value)
    )


# --- lines ------------------------------------------------------------------------------------


def _calls(calls: object, line: bytes) -> list[tuple[dict[str, Any], int]]:
    """Return the functions that are called and the number of each call."""
    found: list[tuple[dict[str, Any], int]] = []
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise _Failed("malformed", f"no call of a tool: {_shown(line)}")
        found.append((function, _count(call.get("index"), line) or 0))
    return found


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise _Failed("malformed", f"no JSON: {_shown(line)}") from None
    if not isinstance(value, dict):
        raise _Failed("malformed", f"no object: {_shown(line)}")
    return value


def _fail_on_error(value: dict[str, Any]) -> None:
    said = _error_text(value)
    if said is not None:
        raise _Failed("error_in_stream", said)


def _text(value: object, line: bytes) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Failed("malformed", f"no text where one should be: {_shown(line)}")
    return value


def _count(value: object, line: bytes) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST_COUNTED:
        raise _Failed("malformed", f"no count where one should be: {_shown(line)}")
    return value


def _shown(line: bytes) -> str:
    return line[:120].decode(errors="replace")
