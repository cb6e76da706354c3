"""Every answer of a server is a success or of exactly one class of failure; a 200 means nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from array import array
from typing import TYPE_CHECKING, Any, get_args

import pytest
from scripted_server import Fault, Script, serve

from pipelines.load import dialects, generator, plan
from pipelines.load_records import ErrorClass

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.load.dialects import Answer, Exchange
    from pipelines.load.plan import Api

CONTEXT = 64
SCRIPTS: dict[str, Script] = {
    **{fault: Script(fault=fault) for fault in get_args(Fault)},
    "forever": Script(fault="forever", text="new"),
    "refused": Script(fault="status", status=400),
    "redirected": Script(fault="status", status=307),
    "cut": Script(fault="cut", prompt_tokens=5),
    "full": Script(fault="full", prompt_tokens=CONTEXT),
    "thinking": Script(tokens=6, thinking=4),
    "only thinking": Script(tokens=3, thinking=3),
    "merged": Script(tokens=20, merged=True),
    "no counts": Script(counts=False),
    "few tokens in a row": Script(fault="no_done", tokens=3),
}
CLASSES: dict[str, ErrorClass | None] = {
    "none": None,
    "status": "http_5xx",
    "refused": "http_4xx",
    "redirected": "malformed",
    "error_line": "error_in_stream",
    "no_done": "truncated_stream",
    "few tokens in a row": "truncated_stream",
    "loop": "loop",
    "empty": "empty_output",
    "malformed": "malformed",
    "other_dialect": "malformed",
    "half_line": "truncated_stream",
    "gone": "truncated_stream",
    "reset": "connect",
    "stall": "timeout",
    "stall_before": "timeout",
    "comments": "timeout",
    "forever": "loop",
    "babble": "malformed",
    "drip": "timeout",
    "cut": "cut_context",
    "full": "cut_context",
    "thinking": None,
    "only thinking": None,
    "merged": None,
    "no counts": None,
}


def target(url: str = "http://127.0.0.1:1", api: Api = "ollama", **changes: Any) -> plan.Target:
    """A model on a server."""
    fields: dict[str, Any] = {
        "url": url,
        "api": api,
        "model": "scripted",
        "generate_tokens": 8,
        "timeout_s": 1.0,
        "temperature": 0.0,
        "seed": 7,
        "context_tokens": CONTEXT,
    }
    return plan.Target(**(fields | changes))


def prompt(text: str, tokens: int | None = None) -> plan.Prompt:
    """One user's message."""
    return plan.Prompt(messages=({"role": "user", "content": text},), tokens=tokens)


@pytest.fixture(scope="module", params=["ollama", "openai"])
def api(request: Any) -> Any:
    """Both dialects."""
    return request.param


@pytest.fixture(scope="module")
def answers(api: Api, tmp_path_factory: Any) -> dict[str, Answer]:
    """What the generator makes of every script, by its name, in one run."""
    log = tmp_path_factory.mktemp("dialects") / "load.log"
    with serve(SCRIPTS) as server:
        raw = generator.run(
            plan.closed(
                "all scripts",
                concurrency=len(SCRIPTS),
                prompts=[prompt(name, tokens=8 if name == "cut" else None) for name in SCRIPTS],
                warm_up_requests=0,
                max_run_s=2,
                seed=1,
            ),
            target(server.url, api),
            log=log,
        )
    assert len(raw.answers) == len(SCRIPTS)
    return {name: raw.answers[place] for place, name in enumerate(SCRIPTS)}


def test_every_failure_has_its_class(api: Api, answers: dict[str, Answer]) -> None:
    """Each script, in both dialects, ends in the class that its fault has."""
    # Ollama's lines know no comments.
    expected = CLASSES | ({"comments": "malformed"} if api == "ollama" else {})
    assert {name: answer.error for name, answer in answers.items()} == expected
    assert set(get_args(ErrorClass)) == {error for error in CLASSES.values() if error}


def test_a_truncated_stream_is_an_error_never_a_success(answers: dict[str, Answer]) -> None:
    """Tokens came, the HTTP answer ended as it should, and nobody said that it is done."""
    answer = answers["no_done"]

    assert answer.status == 200
    assert answer.chunks_count == 5
    assert not answer.ok
    assert "ended after 5 chunks" in answer.detail


def test_a_failure_carries_what_the_server_said(answers: dict[str, Answer]) -> None:
    """The text of a refusal or of an error line is kept; a class alone helps nobody."""
    assert answers["status"].detail == "status 503: server busy, please try again"
    assert answers["error_line"].detail.endswith("running the model: unexpected EOF")
    assert "silent for 1 s" in answers["stall"].detail
    assert answers["cut"].detail == "5 of 8 prompt tokens were read"
    assert "fill the context of 64" in answers["full"].detail


def test_a_success_has_text_and_counts_of_the_server(answers: dict[str, Answer]) -> None:
    """Tokens are what the server counted, not the chunks that came."""
    answer = answers["merged"]

    assert answer.text == "".join(f"tok{number} " for number in range(20))
    assert (answer.prompt_tokens, answer.output_tokens) == (10, 20)
    assert answer.done_reason == "stop"


def test_thinking_is_content_to_the_clock_and_no_text(answers: dict[str, Answer]) -> None:
    """The first token of a model that thinks is a thought."""
    answer = answers["thinking"]

    assert answer.text == "tok4 tok5 "
    assert answer.chunks_count == 6
    assert answers["only thinking"].text == ""
    assert answers["only thinking"].first_ns is not None


def test_tokens_that_the_server_does_not_count_are_unknown(answers: dict[str, Answer]) -> None:
    """They are not estimated from the text."""
    assert answers["no counts"].ok
    assert answers["no counts"].output_tokens is None
    assert answers["no counts"].chunks_count == 5


def test_a_model_that_never_ends_is_cut_off(answers: dict[str, Answer]) -> None:
    """By the bytes that so many tokens can have, or by the end of the run."""
    assert "chunks, the last ones equal" in answers["forever"].detail
    assert answers["babble"].detail == "more than 278,528 bytes"
    assert "had not ended when the run had" in answers["drip"].detail


def test_a_server_that_is_not_there_is_said_in_its_own_words(tmp_path: Path) -> None:
    """No name of a Python object: what the operating system said."""
    raw = generator.run(
        plan.closed(
            "x", concurrency=1, prompts=[prompt("a")], warm_up_requests=0, max_run_s=5, seed=1
        ),
        target(),
        log=tmp_path / "x.log",
    )

    assert raw.answers[0].error == "connect"
    assert raw.answers[0].detail == "Connection refused"


def test_what_ollama_is_asked() -> None:
    """Nothing that would be cut silently, nothing that would load the model again."""
    assert dialects.path("ollama") == "/api/chat"
    assert dialects.body(target(), prompt("hi")) == {
        "model": "scripted",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "think": False,
        "shift": False,
        "truncate": False,
        "options": {"temperature": 0.0, "seed": 7, "num_predict": 8},
    }


def test_what_an_openai_compatible_server_is_asked() -> None:
    """`max_tokens`, since Ollama reads nothing else, and the counts of tokens."""
    assert dialects.path("openai") == "/v1/chat/completions"
    assert dialects.body(target(api="openai"), prompt("hi")) == {
        "model": "scripted",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "seed": 7,
        "max_tokens": 8,
    }


# --- bytes, without a server ------------------------------------------------------------------


def exchange(*reads: bytes, **changes: Any) -> Exchange:
    """An answer that came in these reads, at 1,000, 2,000, 3,000 ... ns."""
    fields: dict[str, Any] = {
        "index": 0,
        "scheduled_ns": 0,
        "sent_ns": 10,
        "end_ns": 1000 * (len(reads) + 1),
        "status": 200,
        "stamps": array("q", (1000 * (place + 1) for place in range(len(reads)))),
        "sizes": array("q", map(len, reads)),
        "body": b"".join(reads),
    }
    return dialects.Exchange(**(fields | changes))


def ollama(text: str, **more: Any) -> bytes:
    """One line of Ollama."""
    return json.dumps({"message": {"content": text}, "done": False, **more}).encode() + b"\n"


DONE = ollama("", done=True, done_reason="stop", eval_count=2, prompt_eval_count=3)


def read(*reads: bytes, api: Api = "ollama", **changes: Any) -> Answer:
    """Understand an answer that came in these reads."""
    return dialects.read(exchange(*reads, **changes), target(api=api), prompt("x"))


def test_a_token_is_there_when_its_line_is_whole() -> None:
    """A line that came in two reads has the time of the second; two lines of a read have its."""
    first, second = ollama("a"), ollama("b")

    answer = read(first[:9], first[9:] + second, DONE)

    assert answer.ok
    assert (answer.first_ns, answer.last_ns) == (2000, 2000)
    assert answer.text == "ab"


def test_generation_ends_when_the_server_says_so_not_with_the_last_content() -> None:
    """The token that ends an answer shows nothing; what comes after the reason is no generation."""
    reason = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
    token = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'

    events = read(token, reason, usage, b"data: [DONE]\n\n", api="openai")

    assert (events.last_ns, events.done_ns) == (1000, 2000)
    assert read(ollama("a"), ollama("b"), DONE).done_ns == 3000
    assert read(ollama("a"), failure="truncated_stream").done_ns is None


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_where_the_network_cuts_makes_no_difference(cut: int) -> None:
    """Bytes of a character, a line or the end may come apart."""
    whole = ollama("grüße ") + ollama("\N{GRINNING FACE}") + DONE
    pieces = [whole[at : at + cut] for at in range(0, len(whole), cut)]

    answer = read(*pieces)

    assert (answer.ok, answer.text) == (True, "grüße \N{GRINNING FACE}")


def test_an_error_line_without_its_end_is_heard() -> None:
    """A server that dies may not come to write the line end."""
    answer = read(
        ollama("a"), b'{"error":"unexpected EOF"}', failure="truncated_stream", detail="x"
    )

    assert (answer.error, answer.detail) == ("error_in_stream", "unexpected EOF")


def test_done_without_a_line_end_is_done() -> None:
    """The last line of a stream that ended by itself needs none."""
    assert read(ollama("a"), DONE.rstrip()).ok


def test_silence_after_the_end_harms_nobody() -> None:
    """The answer was whole when the connection failed."""
    assert read(ollama("a"), DONE, failure="timeout", detail="silent").ok


@pytest.mark.parametrize(
    "line",
    [
        b"[]\n",
        b"null\n",
        b'"text"\n',
        b"{}\n",
        b'{"message":"text"}\n',
        b'{"message":{"content":5}}\n',
        b'{"message":{"content":"a"},"done":true,"eval_count":-1}\n',
        b'{"message":{"content":"a"},"done":true,"eval_count":"many"}\n',
        b'{"message":{"content":"a"},"done":true,"prompt_eval_count":true}\n',
        b'{"message":{"content":"a"},"done":true,"eval_count":1' + b"0" * 400 + b"}\n",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b"<html>502 Bad Gateway</html>\n",
    ],
)
def test_what_is_not_of_the_dialect_is_malformed(line: bytes) -> None:
    """Whatever a server sends, it is an answer of a class and never a traceback."""
    assert read(ollama("a"), line, DONE).error == "malformed"


@pytest.mark.parametrize(
    "line",
    [
        b"data: []\n",
        b'data: {"choices":5}\n',
        b'data: {"choices":[5]}\n',
        b'data: {"choices":[{"delta":5}]}\n',
        b'data: {"choices":[{"delta":{"content":5}}]}\n',
        b'data: {"choices":[],"usage":{"completion_tokens":"many"}}\n',
        b"text\n",
    ],
)
def test_what_is_no_event_is_malformed(line: bytes) -> None:
    """The same of server-sent events."""
    assert read(line, b"data: [DONE]\n\n", api="openai").error == "malformed"


def test_events_may_have_comments_names_and_either_line_end() -> None:
    """Servers differ in what surrounds the data."""
    answer = read(
        b": ping\r\n\r\n",
        b'event: message\r\ndata: {"choices":[{"delta":{"content":"a"}}]}\r\n\r\n',
        b'data:{"choices":[{"delta":{"reasoning":"b"},"finish_reason":"stop"}],'
        b'"timings":{"predicted_ms":1.5}}\n\n',
        b"data: [DONE]\n\n",
        api="openai",
    )

    assert (answer.ok, answer.text, answer.done_reason) == (True, "a", "stop")
    assert (answer.chunks_count, answer.eval_ms) == (2, 1.5)


def test_an_error_event_of_llama_server_is_one() -> None:
    """Old versions put it beside the data, new ones into it."""
    for line in (
        b'error: {"code":500,"message":"slot failed"}\n\n',
        b'data: {"error":{"code":500,"message":"slot failed"}}\n\n',
    ):
        answer = read(line, b"data: [DONE]\n\n", api="openai")
        assert answer.error == "error_in_stream"
        assert "slot failed" in answer.detail


def test_calls_of_tools_are_content() -> None:
    """A model that answers with a call has answered."""
    call = {"message": {"content": "", "tool_calls": [{"function": {"name": "f"}}]}}
    assert read(json.dumps(call).encode() + b"\n", DONE).chunks_count == 1


def test_the_wait_of_a_request_is_what_the_server_did_not_work_on_it() -> None:
    """Queue time: total less loading, reading and writing; never less than none."""
    done = {"eval_count": 2, "total_duration": 90_000_000, "load_duration": 10_000_000}
    work = {"prompt_eval_duration": 20_000_000, "eval_duration": 30_000_000}

    answer = read(ollama("a"), ollama("", done=True, **done, **work))
    rounded = read(ollama("a"), ollama("", done=True, **(done | {"total_duration": 9}), **work))

    assert (answer.queue_ms, answer.eval_ms) == (30.0, 30.0)
    assert rounded.queue_ms == 0.0


# --- embeddings -------------------------------------------------------------------------------


def embedding(body: object, api: Api, **changes: Any) -> Answer:
    """Understand what came back where an embedding was asked for."""
    asked = dataclasses.replace(target(api=api), task="embed")
    return dialects.read(exchange(json.dumps(body).encode(), **changes), asked, prompt("x"))


def embedded(vector: object, api: Api, tokens: object = 5) -> dict[str, Any]:
    """An answer with one vector, in a dialect."""
    if api == "ollama":
        return {"embeddings": [vector], "prompt_eval_count": tokens}
    return {"data": [{"embedding": vector}], "usage": {"prompt_tokens": tokens}}


APIS: tuple[Api, ...] = ("ollama", "openai")


@pytest.mark.parametrize("api", APIS)
def test_an_embedding_comes_in_one_piece(api: Api) -> None:
    """It has an end and no first content; nobody generated a token."""
    answer = embedding(embedded([0.6, 0.8], api), api)

    assert answer.ok
    assert (answer.first_ns, answer.last_ns, answer.prompt_tokens) == (None, 1000, 5)
    assert (answer.output_tokens, answer.chunks_count, answer.text) == (None, 0, "")


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("vector", "error"),
    [
        ([], "empty_output"),
        ([0.0, 0.0], "empty_output"),
        (None, "empty_output"),
        ([math.nan], "empty_output"),
        (["0.1"], "empty_output"),
    ],
)
def test_what_is_no_vector_is_no_success(api: Api, vector: object, error: str) -> None:
    """A 200 alone means nothing."""
    assert embedding(embedded(vector, api), api).error == error


@pytest.mark.parametrize("api", APIS)
def test_an_answer_without_one_embedding_is_malformed(api: Api) -> None:
    """None, two, and an answer to a conversation."""
    bodies: tuple[object, ...] = (
        {}, {"embeddings": [[1.0], [1.0]]}, {"data": []}, {"choices": []}, ["x"],
    )  # fmt: skip
    for body in bodies:
        assert embedding(body, api).error == "malformed"
    assert embedding({"error": "out of slots"}, api).error == "error_in_stream"
    assert embedding(embedded([1.0], api), api, failure="truncated_stream").error == (
        "truncated_stream"
    )
    assert embedding({"error": "too long"}, api, status=400).error == "http_4xx"


def test_a_text_that_fills_the_context_of_an_encoder_was_not_cut() -> None:
    """Nothing follows it, so that it may be as long as the context; fewer tokens than due are."""
    whole = embedding(embedded([1.0], "ollama", tokens=CONTEXT), "ollama")
    asked = dataclasses.replace(target(api="ollama"), task="embed")
    body = json.dumps(embedded([1.0], "ollama", tokens=5)).encode()

    assert whole.ok
    assert dialects.read(exchange(body), asked, prompt("x", tokens=8)).error == "cut_context"


def test_an_embedding_is_asked_for_uncut() -> None:
    """Ollama would silently cut a text that is too long."""
    asked = dataclasses.replace(target(api="ollama"), task="embed")

    assert dialects.body(asked, prompt("hi"))["truncate"] is False
    assert dialects.path("ollama", "embed") == "/api/embed"
    assert dialects.path("openai", "embed") == "/v1/embeddings"


@pytest.mark.parametrize(
    ("api", "lines", "calls"),
    [
        (
            "openai",
            [
                {"index": 0, "id": "a", "function": {"name": "one", "arguments": ""}},
                {"index": 0, "function": {"arguments": '{"x"'}},
                {"index": 1, "id": "b", "function": {"name": "two", "arguments": "{}"}},
                {"index": 0, "function": {"arguments": ": 1}"}},
            ],
            (("one", '{"x": 1}'), ("two", "{}")),
        ),
        (
            "ollama",
            [
                {"function": {"name": "one", "arguments": {"x": 1}}},
                {"function": {"name": "one", "arguments": {"x": 2}}},
            ],
            (("one", '{"x": 1}'), ("one", '{"x": 2}')),
        ),
        ("openai", [{"index": 0, "function": "one"}], None),
        ("openai", [{"index": "0", "function": {"name": "one"}}], None),
        ("ollama", ["one"], None),
    ],
)
def test_calls_of_tools_are_put_together_from_their_pieces(
    api: Api, lines: list[Any], calls: tuple[tuple[str, str], ...] | None
) -> None:
    """By the number of the call, or one after the other; what is no call is no answer."""
    body = b""
    for call in lines:
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        line = (
            {"message": message, "done": False}
            if api == "ollama"
            else {"choices": [{"delta": message}]}
        )
        body += (b"" if api == "ollama" else b"data: ") + json.dumps(line).encode() + b"\n"
    body += (
        b'{"message": {"content": ""}, "done": true, "done_reason": "stop", "eval_count": 3}\n'
        if api == "ollama"
        else b'data: {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}\ndata: [DONE]\n'
    )
    exchange = dialects.Exchange(
        index=0, scheduled_ns=0, status=200, stamps=array("q", [1]), sizes=array("q", [len(body)]),
        body=body,
    )  # fmt: skip

    answer = dialects.read(exchange, target(api=api), prompt("Hi"))

    assert answer.error == (None if calls is not None else "malformed")
    assert calls is None or answer.calls == calls
