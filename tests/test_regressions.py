"""Declared questions are asked as often as declared, and wrong answers are counted and shown."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gguf_factory
import pytest
import sample

from pipelines import convert, declaration, fetch, hashing, params, prompts, records, regressions
from pipelines.layout import Layout
from pipelines.load.dialects import Answer
from pipelines.load.plan import Target
from pipelines.prompts import Expect, Message, Prompts, Regression
from pipelines.serving import engine, modelfile, server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.load_records import ErrorClass, RegressionResult
    from pipelines.toolchain import Toolchain

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tiny-llama"
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "Sorry, I can't help with that request.",
    "I\u2019m really sorry, but I cannot assist with that.",
    "I apologize, but this is not something that I do.",
    "Unfortunately, I am unable to provide instructions for this.",
    "As an AI language model, I cannot take part in this.",
    "Breaking into a house is illegal.",
)
ANSWERS = (
    "The capital of France is Paris.",
    "I'm sorry to hear that your cat is ill. Have you called a vet?",
    "You can help your neighbour by carrying the bags.",
    "Sorry for the wait! Here is the list.",
    "",
)


def regression(**expect: Any) -> Regression:
    """Return a regression that is asked twice and has to be right each time."""
    return Regression(
        id="one", messages=(Message(role="user", content="Hi"),), repeats=2, expect=Expect(**expect)
    )


def answer(
    text: str,
    *,
    done_reason: str = "stop",
    output_tokens: int | None = 9,
    error: ErrorClass | None = None,
    detail: str = "",
) -> Answer:
    """Return an answer as the load generator gives it."""
    return Answer(
        index=0, scheduled_ns=0, sent_ns=0, end_ns=0, text=text, done_reason=done_reason,
        output_tokens=output_tokens, error=error, detail=detail,
    )  # fmt: skip


def judged(folder: Path, one: Regression, *answers: Answer | None) -> RegressionResult:
    """Judge answers to one regression."""
    (result,) = regressions.judge([one], {"one": answers}, log=folder / "log")
    return result


@pytest.mark.parametrize(
    ("expect", "good", "bad", "reason"),
    [
        ({"contains": "Paris"}, "It is Paris.", "It is paris.", 'does not contain "Paris"'),
        ({"not_contains": "Berlin"}, "Paris", "Berlin!", 'contains "Berlin"'),
        ({"regex": r"^\d+$"}, "42", "42!", "does not match"),
        ({"regex": r"(?m)^b$"}, "a\nb", "ab", "does not match"),
        ({"json_schema": {"type": "object", "required": ["a"]}}, '{"a": 1}', "{}", "breaks the"),
        ({"json_schema": {"type": "integer"}}, "```json\n7\n```", "seven", "is no JSON"),
        ({"json_schema": True}, "null", "NaN", "is no JSON: NaN"),
        ({"refusal": True}, REFUSALS[0], ANSWERS[0], "does not refuse"),
        ({"refusal": False}, ANSWERS[0], REFUSALS[0], "refuses"),
    ],
)
def test_an_answer_is_held_against_what_is_expected(
    tmp_path: Path, expect: dict[str, Any], good: str, bad: str, reason: str
) -> None:
    """One right and one wrong answer are told apart, with the reason and the words."""
    result = judged(tmp_path, regression(**expect), answer(good), answer(bad))

    assert (result.pass_count, result.repeats_count) == (1, 2)
    assert result.outcome == "FAIL"
    assert reason in result.misses[0]
    assert bad in result.misses[0]
    assert result.misses[0] in result.sentence


@pytest.mark.parametrize(
    ("one", "good"),
    [
        (answer("x", output_tokens=5), True),
        (answer("x", output_tokens=6), False),
        (answer("x", done_reason="length", output_tokens=5), False),
        (answer("x", output_tokens=None), False),
    ],
)
def test_an_answer_has_to_end_by_itself_within_its_tokens(
    tmp_path: Path, one: Answer, *, good: bool
) -> None:
    """By the server's count; one that was cut at the limit has not ended, one unknown neither."""
    result = judged(tmp_path, regression(max_tokens=5), one, one)

    assert (result.outcome == "PASS") == good


@pytest.mark.parametrize("text", REFUSALS)
def test_the_usual_ways_to_decline_are_refusals(text: str) -> None:
    """With either apostrophe."""
    assert regressions.is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_that_is_sorry_for_something_else_is_no_refusal(text: str) -> None:
    """Politeness and help are not mistaken for declining."""
    assert not regressions.is_refusal(text)


def test_all_that_is_expected_has_to_hold(tmp_path: Path) -> None:
    """The first thing that does not hold is the reason."""
    one = regression(contains="a", not_contains="z", regex="^a")

    result = judged(tmp_path, one, answer("abc"), answer("az"))

    assert result.pass_count == 1
    assert result.misses[0].startswith('contains "z"')


@pytest.mark.parametrize(
    ("good", "share", "outcome"),
    [(5, 1.0, "PASS"), (4, 1.0, "FAIL"), (5, 0.6, "PASS"), (2, 0.6, "INCONCLUSIVE"),
     (0, 0.6, "FAIL"), (3, 0.6, "PASS")],
)  # fmt: skip
def test_the_share_of_good_answers_decides_as_far_as_it_can(
    tmp_path: Path, good: int, share: float, outcome: str
) -> None:
    """Enough is a pass, an interval below is a failure, and between them nobody knows."""
    one = Regression(
        id="one", messages=(Message(role="user", content="Hi"),), repeats=5,
        min_pass_share=share, expect=Expect(contains="yes"),
    )  # fmt: skip

    result = judged(tmp_path, one, *[answer("yes")] * good, *[answer("no")] * (5 - good))

    assert result.outcome == outcome
    assert result.low <= result.share == good / 5 <= result.high
    assert len(result.misses) == min(3, 5 - good)
    assert ("more repeats would decide" in result.sentence) == (outcome == "INCONCLUSIVE")


PARIS = '{"city": "Paris", "days": 1}'


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ((("weather", '{"days": 1.0, "city": "Paris"}'),), ""),
        ((), "makes no tool call"),
        ((("weather", PARIS),) * 2, "makes 2 tool calls in the place of one"),
        ((("wether", PARIS),), 'calls "wether" in the place of "weather"'),
        ((("weather", '{"city": "Paris"'),), 'calls "weather" with no JSON'),
        ((("weather", '{"city": "Paris", "days": true}'),), '"days": true'),
        ((("weather", "[" * 100_000),), 'calls "weather" with no JSON'),
    ],
)
def test_the_one_call_that_is_expected_is_told_from_every_other(
    tmp_path: Path, calls: tuple[tuple[str, str], ...], reason: str
) -> None:
    """By its function and all its arguments, as JSON has them; text beside it is no matter."""
    expected = {"name": "weather", "arguments": {"city": "Paris", "days": 1}}
    said = dataclasses.replace(answer("Let me see."), calls=calls)

    result = judged(tmp_path, regression(tool_call=expected), said, said)

    assert (result.outcome == "PASS") == (not reason)
    assert all(reason in miss for miss in result.misses)


def test_arguments_may_be_held_to_a_schema_where_no_one_spelling_is_right(tmp_path: Path) -> None:
    """What the schema lets pass is right, however it is said; the rest is named."""
    schema = {"properties": {"city": {"enum": ["Paris", "paris"]}}, "required": ["city"]}
    one = regression(tool_call={"name": "weather", "arguments_schema": schema})
    right, wrong = (
        dataclasses.replace(answer(""), calls=(("weather", text),))
        for text in ('{"city": "paris"}', '{"city": "Rome"}')
    )

    result = judged(tmp_path, one, right, wrong)

    assert result.pass_count == 1
    assert result.misses[0].startswith("its arguments: breaks the schema: 'Rome' is not one of")


def test_a_request_that_fails_is_not_as_expected(tmp_path: Path) -> None:
    """To a user an error is no answer; neither is a question that was never sent."""
    failed = answer("", error="http_5xx", detail="no\x1b[31m slot")

    result = judged(tmp_path, regression(not_contains="z"), failed, None)

    assert result.outcome == "FAIL"
    assert result.misses == ("the request failed (http_5xx): no slot", "was not asked in time")


def test_an_expression_that_would_never_end_costs_its_time_and_no_more(tmp_path: Path) -> None:
    """Catastrophic backtracking is a miss with its reason; the other checks are made."""
    evil = regression(regex=r"^(a+)+$")
    fine = regression(regex="a").model_copy(update={"id": "two"})
    started = time.monotonic()

    first, second = regressions.judge(
        [evil, fine],
        {"one": [answer("a" * 64 + "!"), answer("aaa")], "two": [answer("a")]},
        log=tmp_path / "log",
    )

    assert "the regex took more than 2 s" in first.misses[0]
    assert first.pass_count == second.pass_count == 1
    assert time.monotonic() - started < 60
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_what_a_model_says_cannot_act_on_a_terminal_or_a_runner(tmp_path: Path) -> None:
    """Escapes are gone, a command of the runner is broken, a long answer is cut."""
    said = "\x1b[2J::error::x\n" + "long " * 1000

    (miss, _) = judged(tmp_path, regression(contains="Paris"), answer(said), answer(said)).misses

    assert "\x1b" not in miss
    assert "::" not in miss
    assert len(miss) < 300


def test_a_regression_is_asked_of_the_models_that_it_names(tmp_path: Path) -> None:
    """Without names it is asked of every one; a model without any is asked nothing."""
    own = regression(contains="a").model_copy(update={"models": (MODEL,)})
    common = regression(contains="a").model_copy(update={"id": "two"})
    declared = Prompts(name="p", version=1, sha256="", conversations=(), regressions=(own, common))
    nothing = declared.model_copy(update={"regressions": (own,)})
    target = Target(
        url="http://127.0.0.1:9", api="openai", model="x", generate_tokens=8, timeout_s=5,
        temperature=0.0, seed=1, context_tokens=None,
    )  # fmt: skip

    assert [r.id for r in regressions.of_model(declared, MODEL)] == ["one", "two"]
    assert [r.id for r in regressions.of_model(declared, "other")] == ["two"]
    assert regressions.run(nothing, target, model="other", log=tmp_path / "log") == ()


def test_a_server_that_is_not_there_fails_every_regression(tmp_path: Path) -> None:
    """The reason is the connection, and no exception hides the others."""
    declared = Prompts(
        name="p", version=1, sha256="", conversations=(), regressions=(regression(contains="a"),)
    )
    target = Target(
        url="http://127.0.0.1:9", api="openai", model="x", generate_tokens=8, timeout_s=5,
        temperature=0.0, seed=1, context_tokens=None,
    )  # fmt: skip

    (result,) = regressions.run(declared, target, model=MODEL, log=tmp_path / "log")

    assert result.outcome == "FAIL"
    assert "the request failed (connect)" in result.misses[0]


# --- the shipped regressions, the embedded model, a real server -------------------------------


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory, tools: Toolchain) -> Layout:
    """A checkout in which the embedded model has been fetched and converted."""
    root = tmp_path_factory.mktemp("regressions") / "fork"
    sample.take(root, "examples", "corpora", "params.yaml")
    at = Layout(root)
    declared = declaration.load(at.params)
    fetched = fetch.run(params.fetch_slice(declared, MODEL), at)
    records.write(at.model_record("fetch", MODEL), fetched)
    at.toolchain.write_text(json.dumps(tools.manifest))
    convert.run(params.convert_slice(declared, MODEL), at)
    return at


def asked(at: Layout, tools: Toolchain, folder: Path, text: str) -> Iterator[RegressionResult]:
    """Ask the shipped regressions of the embedded model behind a Modelfile, as Ollama serves it."""
    log = folder / "serve.log"
    path = at.f16(MODEL)
    file = server.GgufFile(
        type="F16", path=path, sha256=hashing.digest(path).sha256, modelfile=modelfile.parse(text)
    )
    settings = server.Settings(
        context_tokens=512, parallel=1, threads=1, gpu_layers="all", kv_type="f16",
        flash_attention=True, load_timeout_s=120.0,
    )  # fmt: skip
    found = engine.find(params.Serving(engine="ollama"), tools, log=log)
    with (
        server.open_host(found, settings, model=MODEL, at=Layout(folder), log=log) as host,
        host.load(file) as loaded,
    ):
        target = Target(
            url=loaded.url, api=loaded.api, model=loaded.name, generate_tokens=64, timeout_s=60,
            temperature=0.8, seed=1, context_tokens=512,
        )  # fmt: skip
        shipped = prompts.load(sample.of("corpora/prompts.yaml"))
        yield from regressions.run(shipped, target, model=MODEL, log=log)


@pytest.mark.toolchain
def test_the_embedded_model_keeps_the_shipped_regressions(
    at: Layout, tools: Toolchain, tmp_path: Path
) -> None:
    """Each is asked as often as declared, by seeds that give different answers."""
    results = list(asked(at, tools, tmp_path, "# version: 1\nFROM x\n"))

    assert {result.outcome for result in results} == {"PASS"}, results
    assert {result.repeats_count for result in results} == {5}
    assert [result.id for result in results] == ["thanks", "identity", "refuses", "numbered-list"]


@pytest.mark.toolchain
def test_a_broken_template_fails_the_shipped_regressions(
    at: Layout, tools: Toolchain, tmp_path: Path
) -> None:
    """ChatML for a model that never saw it: not one answer is right, and what it said is shown."""
    broken = (
        '# version: 1\nFROM x\nTEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n'
        '{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"""\n'
    )

    results = list(asked(at, tools, tmp_path, broken))

    assert {result.outcome for result in results} == {"FAIL"}, results
    assert all(result.misses for result in results)


# A template as many have: tools in front, a call between two words that llama.cpp looks for.
CALLING = (
    "{%- if tools %}<|im_start|>system\nCall in <tool_call></tool_call>:"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a place.",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {"city": {"type": "string"}},
        },
    },
}


@pytest.mark.toolchain
@pytest.mark.parametrize("kind", ["ollama", "llama-server"])
def test_a_call_that_a_served_model_makes_is_read_from_every_dialect(
    tmp_path: Path, tools: Toolchain, kind: Literal["ollama", "llama-server"]
) -> None:
    """By the servers' own parsers, from a model that says one call; without tools it is text."""
    said = '\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    path = gguf_factory.parrot_gguf(
        tmp_path / "parrot.gguf", ("<tool_call>", said), chat_template=CALLING
    )
    base: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [WEATHER],
    }
    call: dict[str, Any] = {"name": "weather", "arguments": {"city": "Paris"}}
    asked_for: dict[str, dict[str, Any]] = {
        "right": {"expect": {"tool_call": call}},
        "rome": {"expect": {"tool_call": call | {"arguments": {"city": "Rome"}}}},
        "toolless": {"tools": None, "expect": {"contains": "tool_call"}},
    }
    declared = Prompts(
        name="p", version=1, sha256="", conversations=(),
        regressions=tuple(
            Regression.model_validate_json(json.dumps({"id": id_, **base, **changes}))
            for id_, changes in asked_for.items()
        ),
    )  # fmt: skip
    file = server.GgufFile(
        type="F16", path=path, sha256=hashing.digest(path).sha256,
        modelfile=modelfile.parse("# version: 1\nFROM x\n"),
    )  # fmt: skip
    settings = server.Settings(
        context_tokens=512, parallel=1, threads=1, gpu_layers="all", kv_type="f16",
        flash_attention=True, load_timeout_s=120.0,
    )  # fmt: skip
    log = tmp_path / "serve.log"
    found = engine.find(params.Serving(engine=kind), tools, log=log)
    with (
        server.open_host(found, settings, model=MODEL, at=Layout(tmp_path), log=log) as host,
        host.load(file) as native,
    ):
        # Ollama's second one loads the model again.
        for is_native in (True, False):
            one = native if is_native else native.as_openai()
            target = Target(
                url=one.url, api=one.api, model=one.name, generate_tokens=64, timeout_s=60,
                temperature=0.0, seed=1, context_tokens=512,
            )  # fmt: skip

            right, rome, toolless = regressions.run(declared, target, model=MODEL, log=log)

            assert right.outcome == "PASS", right
            assert rome.misses == ('calls "weather" with “{"city": "Paris"}”',)
            assert toolless.outcome == "PASS", toolless
