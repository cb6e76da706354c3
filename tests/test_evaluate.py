"""Every quant does the declared tasks beside f16: real weights, real libraries, a real server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sample
import torch
import verify_factory
from record_factory import convert_record, quantize_record
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines import (
    atomic,
    evals,
    evals_answers,
    evals_likelihood,
    evaluate,
    hashing,
    machine,
    records,
)
from pipelines.errors import DigestError, MachineError, ParamsError, ToolError
from pipelines.evals import EvalSet, MultipleChoice
from pipelines.layout import Layout
from pipelines.params import Eval, Evaluate, EvaluateSlice
from pipelines.serving import server
from pipelines.toolchain import Toolchain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.params import EvalKind

pytestmark = pytest.mark.toolchain

ROOT = Path(__file__).resolve().parent.parent
ENGLISH = sample.of("corpora/evals/technical-english.jsonl")
MODEL = "tiny-llama"
TYPES = ("Q4_K_M", "TQ1_0")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of llama.cpp wait for one another, which stalls a shared machine."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)


@pytest.fixture(scope="module")
def made(tools: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """The embedded model as f16, as a good quant, and as one with three values for each weight."""
    at = Layout(tmp_path_factory.mktemp("made"))
    f16 = verify_factory.converted(verify_factory.EMBEDDED, at.f16(MODEL).parent, tools)
    put_record(at, "F16", f16)
    for type_ in TYPES:
        path = at.gguf(MODEL, f"{MODEL}-{type_}")
        path.parent.mkdir(exist_ok=True)
        subprocess.run(
            [tools.tool("llama-quantize"), f16, path, type_], check=True, capture_output=True
        )
        put_record(at, type_, path)
    return at


def put_record(at: Layout, type_: str, path: Path) -> None:
    """Write the record that names the bytes of a file."""
    digests = hashing.digest(path)
    digest = records.FileDigest(
        name=path.name, size_bytes=digests.size_bytes, sha256=digests.sha256, md5=digests.md5
    )
    if type_ == "F16":
        records.write(at.model_record("convert", MODEL), convert_record(gguf=digest))
    else:
        records.write(
            at.quant_record("quantize", MODEL, type_), quantize_record(type_, gguf=digest)
        )


@pytest.fixture
def at(made: Layout, tmp_path: Path) -> Layout:
    """A checkout with the files of `made`, and nothing in scratch."""
    shutil.copytree(made.root, tmp_path / "fork", copy_function=os.link)
    return Layout(tmp_path / "fork")


def declared(
    at: Layout, kind: EvalKind, items: list[dict[str, Any]] | bytes, name: str = "x"
) -> Eval:
    """Write a set and declare it."""
    path = f"corpora/evals/{name}.jsonl"
    data = (
        items
        if isinstance(items, bytes)
        else b"".join(json.dumps(i).encode() + b"\n" for i in items)
    )
    (at.root / path).parent.mkdir(parents=True, exist_ok=True)
    (at.root / path).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return Eval(kind=kind, path=path, sha256=digest, license="apache-2.0")


def wanted(sets: dict[str, Eval], types: tuple[str, ...] = TYPES, **changes: Any) -> EvaluateSlice:
    """Return the slice of the model with these sets and quants."""
    values: dict[str, Any] = {
        "model": MODEL,
        "quants": {f"{MODEL}-{type_}": type_ for type_ in types},
        "recipe": 1,
        "context_tokens": 512,
        "threads": None,
        "evals": {name: each.model_dump() for name, each in sets.items()},
        "evaluate": Evaluate(generate_tokens=16).model_dump(),
    }
    return EvaluateSlice.model_validate(values | changes)


def some_english(count: int = 24) -> bytes:
    """Return the first items of the set that ships."""
    return b"".join(ENGLISH.read_bytes().splitlines(keepends=True)[:count])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were scored, in order; the real scorer scores them."""
    names: list[str] = []
    real = evals_likelihood.rights

    def counted(set_: EvalSet, gguf: Path, *words: Any, **options: Any) -> Any:
        names.append(gguf.name)
        return real(set_, gguf, *words, **options)

    monkeypatch.setattr(evals_likelihood, "rights", counted)
    return names


# --- what ships -------------------------------------------------------------------------------


def test_the_set_that_ships_tells_a_damaged_quant_from_a_good_one(
    at: Layout, tools: Toolchain, capsys: pytest.CaptureFixture[str]
) -> None:
    """f16 is far above chance, Q4_K_M as good, TQ1_0 proven harmed; the record holds each item."""
    sets = {"technical-english": declared(at, "multiple-choice", ENGLISH.read_bytes())}

    record = evaluate.evaluate(wanted(sets), at, tools)

    (found,) = record.sets
    good, damaged = found.quants
    assert found.chance == 0.25
    assert found.items_count == len(found.f16_outcomes) == 288
    assert found.f16_correct_count > 0.25 * 288 + 0.30 * 288
    assert (good.outcome, damaged.outcome) == ("PASS", "HARM")
    assert damaged.p_value < 0.001
    assert damaged.gguf_sha256 == hashing.digest(at.gguf(MODEL, f"{MODEL}-TQ1_0")).sha256
    said = capsys.readouterr().err
    assert f"warning:   TQ1_0 HARM: {damaged.sentence}" in said
    assert f"  Q4_K_M PASS: {good.sentence}" in said


# --- log-likelihoods --------------------------------------------------------------------------


@cache
def upstream() -> tuple[Any, Any]:
    """Give model and tokenizer as a user of transformers gets them, in 32 bits."""
    folder = verify_factory.EMBEDDED
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def upstream_nats(prompt: str, choice: str, shared: int) -> float:
    """Compute the log-likelihood of what follows the first `shared` tokens of prompt and choice."""
    model, tokenizer = upstream()
    ids = tokenizer(prompt + choice, return_tensors="pt").input_ids
    with torch.inference_mode():
        logs = model(ids).logits.double().log_softmax(-1)[0]
    return float(sum(logs[i - 1, ids[0, i]] for i in range(shared, ids.shape[1])))


def test_log_likelihoods_are_those_of_transformers(at: Layout, tools: Toolchain) -> None:
    """Also where the end of a prompt and the beginning of a choice become one token."""
    items = [json.loads(line) for line in some_english(18).splitlines()]
    split = [("The func", ["tion returns", "tions", "y"]), ("retu", ["rn a value.", "rned"])]
    items += [
        {"id": f"split-{i}", "prompt": prompt, "choices": choices, "answer": 0}
        for i, (prompt, choices) in enumerate(split)
    ]
    set_ = evals.read("x", declared(at, "multiple-choice", items), at.root)
    tokenizer = upstream()[1]

    rights = scored(set_, at, tools)

    for item, (_, nats) in zip(set_.items, rights, strict=True):
        assert isinstance(item, MultipleChoice)
        alone = tokenizer(item.prompt).input_ids
        whole = [tokenizer(item.prompt + choice).input_ids for choice in item.choices]
        shared = next(
            i
            for i in range(len(alone) + 1)
            if i == len(alone) or any(each[i] != alone[i] for each in whole)
        )
        if item.id.startswith("split"):
            assert shared < len(alone)
        expected = [upstream_nats(item.prompt, choice, shared) for choice in item.choices]
        assert json.loads(nats) == pytest.approx(expected, abs=0.05)


def scored(set_: EvalSet, at: Layout, tools: Toolchain) -> list[tuple[bool, str]]:
    """Score a set with f16."""
    return evals_likelihood.rights(
        set_,
        at.f16(MODEL),
        server.Settings(
            context_tokens=512, parallel=1, threads=1, gpu_layers=0, kv_type="f16",
            flash_attention=False, load_timeout_s=60.0,
        ),
        tools=tools,
        scratch=at.scratch(MODEL),
        log=at.root / "log",
        on_item=lambda _: None,
    )  # fmt: skip


_AS_IF_RECURRENT = """
import runpy, sys, llama_cpp
llama_cpp.llama_model_is_recurrent = lambda _: True
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_model_that_cannot_share_a_prompt_gets_the_same_likelihoods(
    at: Layout, tools: Toolchain, tmp_path: Path
) -> None:
    """Recurrent models are computed choice by choice; only rounding is another."""
    items = [json.loads(line) for line in some_english(6).splitlines()]
    request = tmp_path / "request.json"
    request.write_text(
        json.dumps(
            {
                "model": str(at.f16(MODEL)),
                "threads": 1,
                "gpu_layers": 0,
                "context_tokens": 512,
                "items": items,
            }
        )
    )
    scorer = ROOT / "pipelines/evals_scorer.py"
    together, alone = (
        subprocess.run(
            [sys.executable, "-P", *words, scorer, request],
            env={**os.environ, **tools.python_env()},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        for words in ((), ("-c", _AS_IF_RECURRENT))
    )

    assert len(together) == len(alone) == 6
    for one, other in zip(together, alone, strict=True):
        assert json.loads(one)["nats"] == pytest.approx(json.loads(other)["nats"], abs=0.02)


def test_an_item_that_the_model_cannot_do_is_told_with_its_line(
    at: Layout, tools: Toolchain
) -> None:
    """Too long for the context, or nothing before the choices: no number is made up for it."""
    items = [json.loads(line) for line in some_english(20).splitlines()]
    items[6]["prompt"] = "word " * 600
    with pytest.raises(
        ParamsError, match=r"x\.jsonl:7: preposition-007: .* tokens do not fit into"
    ):
        evaluate.evaluate(wanted({"x": declared(at, "multiple-choice", items)}), at, tools)
    assert not list(at.scratch(MODEL).glob("evals/.*"))


# --- what is kept -----------------------------------------------------------------------------


def test_equal_runs_give_equal_records_and_nothing_is_done_twice(
    at: Layout, tools: Toolchain, asked: list[str]
) -> None:
    """From an empty scratch the same bytes come out; from a full one nothing is asked."""
    slice_ = wanted({"x": declared(at, "multiple-choice", some_english())})
    first = evaluate.evaluate(slice_, at, tools)
    kept = {path.name: path.read_bytes() for path in at.scratch(MODEL).rglob("*.json")}
    atomic.remove(at.scratch(MODEL))

    second = evaluate.evaluate(slice_, at, tools)
    done = len(asked)
    third = evaluate.evaluate(slice_, at, tools)

    assert first == second == third
    assert kept == {path.name: path.read_bytes() for path in at.scratch(MODEL).rglob("*.json")}
    assert (done, len(asked)) == (6, 6)


def test_another_quant_repeats_nothing_of_the_others(
    at: Layout, tools: Toolchain, asked: list[str]
) -> None:
    """Only what was added does its tasks."""
    sets = {"x": declared(at, "multiple-choice", some_english())}
    evaluate.evaluate(wanted(sets, ("Q4_K_M",)), at, tools)
    asked.clear()

    record = evaluate.evaluate(wanted(sets), at, tools)

    assert asked == [f"{MODEL}-TQ1_0.gguf"]
    assert [quant.type for quant in record.sets[0].quants] == list(TYPES)


DAMAGES: tuple[Callable[[str], str], ...] = (
    lambda text: text[: len(text) // 2],
    lambda text: text.replace('"outcomes": "', '"outcomes": "1', 1),
    lambda text: text.replace('"outcomes": "', '"outcomes": "x', 1),
    lambda _: "",
    lambda _: "[]",
    lambda text: text.replace('"recipe": 1', '"recipe": 2', 1),
)


def test_a_damaged_result_is_none_and_is_made_again(
    at: Layout, tools: Toolchain, asked: list[str]
) -> None:
    """Torn, edited or of other inputs: what is kept counts if all of it is right."""
    slice_ = wanted({"x": declared(at, "multiple-choice", some_english(20))}, ())
    before = evaluate.evaluate(slice_, at, tools)
    (path,) = at.scratch(MODEL).rglob("*.json")
    whole = path.read_text()

    for damage in DAMAGES:
        asked.clear()
        path.write_text(damage(whole))
        assert path.read_text() != whole
        assert evaluate.evaluate(slice_, at, tools) == before
        assert path.read_text() == whole
        assert asked == ["f16.gguf"]


def test_a_run_that_was_stopped_goes_on_where_it_was(
    at: Layout, tools: Toolchain, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    """After a stop at the second file f16 is not asked again."""
    slice_ = wanted({"x": declared(at, "multiple-choice", some_english(20))})
    real = evals_likelihood.rights

    def stopped(set_: EvalSet, gguf: Path, *words: Any, **options: Any) -> Any:
        if gguf.name != "f16.gguf":
            raise KeyboardInterrupt
        return real(set_, gguf, *words, **options)

    monkeypatch.setattr(evals_likelihood, "rights", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(slice_, at, tools)
    monkeypatch.setattr(evals_likelihood, "rights", real)
    asked.clear()
    evaluate.evaluate(slice_, at, tools)

    assert asked == [f"{MODEL}-{type_}.gguf" for type_ in TYPES]


# --- answers of the real server ---------------------------------------------------------------

PERSONS = ("Be polite.", "Be brief.", "Answer in one sentence.", "You help.", "Answer briefly.")
SHAPE = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def conversations(questions: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Ask each question of a few persons; ids differ."""
    return [
        {
            "id": f"{i}-{j}",
            "messages": [
                {"role": "system", "content": person},
                {"role": "user", "content": question},
            ],
            "answers": [answer],
        }
        for i, person in enumerate(PERSONS)
        for j, (question, answer) in enumerate(questions)
    ]


def test_answers_of_the_real_server_are_judged_and_equal_every_time(
    at: Layout, tools: Toolchain
) -> None:
    """What a dialogue taught the model it still says; what it cannot do voids a set."""
    known = conversations(
        [
            ("Thank you!", "You're welcome!"),
            ("What is your name?", "I am tiny-llama, a small example model."),
            ("What colour is snow?", "Snow is white."),
            ("Who are you?", "I am tiny-llama, a small example model"),
        ]
    )
    unknown = [{key: item[key] for key in ("id", "messages")} for item in known]
    lines = [{"id": f"p{i}", "prompt": "def f(x):", "answers": ["no such line"]} for i in range(20)]
    sets = {
        "known": declared(at, "exact-match", known, "known"),
        "lines": declared(at, "exact-match", lines, "lines"),
        "json": declared(at, "json-schema", [i | {"schema": SHAPE} for i in unknown], "json"),
        "call": declared(
            at,
            "tool-call",
            [
                i | {"tools": [ADD], "expected": {"name": "add", "arguments": {"a": 1}}}
                for i in unknown
            ],
            "call",
        ),
    }
    long = Evaluate(generate_tokens=40).model_dump()

    first = evaluate.evaluate(wanted(sets, (), evaluate=long), at, tools)
    atomic.remove(at.scratch(MODEL))
    second = evaluate.evaluate(wanted(sets, (), evaluate=long), at, tools)

    assert first == second
    known_, lines_, json_, call = first.sets
    assert not known_.is_void
    assert known_.f16_correct_count >= 10
    for void in (lines_, json_, call):
        assert void.is_void
        assert void.f16_correct_count == 0
        assert "says nothing" in void.sentence
    assert not list((at.root / "work/serving").glob("*"))


# --- answers of a server that says what it is told --------------------------------------------


class _Scripted(BaseHTTPRequestHandler):
    """Answers each request by the text of its last message."""

    protocol_version = "HTTP/1.1"
    script: dict[str, tuple[int, Any]]
    bodies: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        last = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        status, told = self.script[last]
        if status == 0:
            self.close_connection = True
            return
        if status == 1:
            time.sleep(told)
            self.close_connection = True
            return
        data = told if isinstance(told, bytes) else json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def scripted(script: dict[str, tuple[int, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve a script; yield the address and what was asked."""
    bodies: list[dict[str, Any]] = []
    handler = type("Handler", (_Scripted,), {"script": script, "bodies": bodies})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}", bodies
        finally:
            running.shutdown()
            thread.join()


def reply(text: str | None, *, reason: str = "stop", calls: list[tuple[str, str]] = []) -> Any:  # noqa: B006 - read only
    """Write what llama-server answers."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ]
    return 200, {"choices": [{"message": message, "finish_reason": reason}]}


def outcomes(
    tmp_path: Path, kind: EvalKind, extra: dict[str, Any], answers: list[tuple[int, Any]], **by: Any
) -> tuple[str, list[dict[str, Any]]]:
    """Ask a scripted server 20 items, of which the first get these answers, the others the last."""
    at = Layout(tmp_path)
    script = {f"q{i}": answers[min(i, len(answers) - 1)] for i in range(20)}
    items = [{"id": q, "messages": [{"role": "user", "content": q}]} | extra for q in script]
    set_ = evals.read("x", declared(at, kind, items), at.root)
    with scripted(script) as (url, bodies):
        rights = evals_answers.rights(
            set_, url, "tiny", Evaluate(**by), log=tmp_path / "log", on_item=lambda _: None
        )
    return "".join(str(int(right)) for right, _ in rights), bodies


def test_json_is_right_if_it_keeps_the_schema_and_has_ended(tmp_path: Path) -> None:
    """Other types, text around it and an end for want of tokens are not; one code fence is."""
    found, bodies = outcomes(
        tmp_path,
        "json-schema",
        {"schema": SHAPE},
        [
            reply('{"sum": 4}'),
            reply('```json\n{"sum": 4}\n```'),
            reply('{"sum": "4"}'),
            reply("{}"),
            reply('The sum: {"sum": 4}'),
            reply('{"sum": 4}', reason="length"),
            reply(None),
            reply(""),
        ],
    )

    assert found == "11" + "0" * 18
    assert not any({"response_format", "json_schema", "grammar"} & body.keys() for body in bodies)


def test_a_call_is_right_if_it_is_the_expected_one(tmp_path: Path) -> None:
    """A text instead, another argument, two calls, or one that the server cannot read are not."""
    call = ("add", '{"a": 1}')
    unread = {"error": {"message": "The model produced output that does not match the expected"}}
    found, bodies = outcomes(
        tmp_path,
        "tool-call",
        {"tools": [ADD], "expected": {"name": "add", "arguments": {"a": 1}}},
        [
            reply(None, reason="tool_calls", calls=[call]),
            reply("I add.", reason="tool_calls", calls=[call]),
            reply(None, reason="tool_calls", calls=[("add", '{"a": 2}')]),
            reply(None, reason="tool_calls", calls=[call, call]),
            (500, unread),
            reply('{"name": "add", "arguments": {"a": 1}}'),
        ],
    )

    assert found == "11" + "0" * 18
    assert {body["tool_choice"] for body in bodies} == {"auto"}
    assert bodies[0]["tools"] == [ADD]


def test_nothing_of_sampling_is_left_to_the_server_or_to_the_file(tmp_path: Path) -> None:
    """Greedy, one seed, no cache, no penalties, no thinking."""
    _, bodies = outcomes(tmp_path, "exact-match", {"answers": ["4"]}, [reply("4")])

    body = bodies[0]
    assert (body["temperature"], body["top_k"], body["seed"]) == (0, 1, 1)
    assert body["cache_prompt"] is False
    assert (body["repeat_penalty"], body["presence_penalty"]) == (1.0, 0.0)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["max_tokens"] == 64


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        ((500, {"error": {"message": "out of memory"}}), ToolError, "status 500: out of memory"),
        ((400, {"error": {"message": "too long"}}), ParamsError, "status 400: too long"),
        ((200, b"<html>"), ToolError, "answered with no JSON"),
        ((200, {"choices": []}), ToolError, "answered in an unknown form"),
        ((200, []), ToolError, "answered in an unknown form"),
        ((0, None), ToolError, "no longer answers"),
        ((1, 3), ToolError, "did not answer within 1 s"),
    ],
)
def test_a_server_that_fails_is_an_error_and_never_a_wrong_answer(
    tmp_path: Path, answer: tuple[int, Any], error: type[Exception], said: str
) -> None:
    """A crash or a slow machine must not count as harm; the message names the line."""
    with pytest.raises(error, match=rf"x\.jsonl:2: llama-server .*{said}"):
        outcomes(
            tmp_path, "exact-match", {"answers": ["4"]}, [reply("4"), answer], timeout_seconds=1
        )


# --- what is refused --------------------------------------------------------------------------


def test_a_model_without_evals_has_an_empty_record(at: Layout, tools: Toolchain) -> None:
    """Nothing is asked; the record says by its emptiness that nothing was declared."""
    record = evaluate.evaluate(wanted({}), at, tools)

    assert record.sets == ()
    assert record.f16_sha256 == hashing.digest(at.f16(MODEL)).sha256
    assert not at.scratch(MODEL).exists()


def test_an_encoder_does_no_tasks(at: Layout, tools: Toolchain, tmp_path: Path) -> None:
    """It answers nothing; the error says what judges its quants instead."""
    changed = verify_factory.rewritten(
        at.f16(MODEL), tmp_path / "encoder.gguf", metadata={"llama.pooling_type": 1}
    )
    at.f16(MODEL).unlink()
    changed.rename(at.f16(MODEL))

    with pytest.raises(ParamsError, match="tiny-llama is an encoder") as caught:
        evaluate.evaluate(wanted({"x": declared(at, "multiple-choice", some_english())}), at, tools)
    assert "min_cosine_mean" in caught.value.hint


def test_other_bytes_than_recorded_are_never_asked(
    at: Layout, tools: Toolchain, asked: list[str]
) -> None:
    """A flipped bit in a quant: f16 did its tasks, the quant is refused."""
    path = at.gguf(MODEL, f"{MODEL}-TQ1_0")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)

    with pytest.raises(DigestError, match="is not the file of its record"):
        evaluate.evaluate(
            wanted({"x": declared(at, "multiple-choice", some_english())}, ("TQ1_0",)), at, tools
        )
    assert asked == ["f16.gguf"]


def test_a_model_that_its_libraries_cannot_load_is_a_fault_of_the_tool(
    at: Layout, tools: Toolchain
) -> None:
    """The scorer's own words are shown, with the log."""
    at.f16(MODEL).unlink()
    at.f16(MODEL).write_bytes(b"GGUF no more")
    set_ = evals.read("x", declared(at, "multiple-choice", some_english()), at.root)

    with pytest.raises(ToolError, match=r"evals_scorer: llama\.cpp cannot load the model"):
        scored(set_, at, tools)


def test_what_does_not_fit_on_the_gpu_does_its_tasks_beside_it(
    at: Layout, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers on the card or none: an f16 that is too large for it is still the reference."""
    on_gpu = Toolchain(prefix=tools.prefix, manifest={**tools.manifest, "backend": "cuda"})
    layers: list[Any] = []

    def require(_file: Any, settings: Any, *_words: Any, **_options: Any) -> None:
        layers.append(settings.gpu_layers)
        if settings.gpu_layers:
            raise MachineError("the machine is too small")

    monkeypatch.setattr(server, "require_memory", require)
    slice_ = wanted({"x": declared(at, "multiple-choice", some_english())}, ())

    record = evaluate.evaluate(slice_, at, on_gpu)

    assert layers == [9999, 0]
    assert record.sets[0].f16_correct_count > 0
