"""Upstream's own tokenizer renders the prompts, and its template can do no harm."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import sample

from pipelines import prompts, upstream_chat
from pipelines.errors import MachineError, ToolError, UpstreamError

if TYPE_CHECKING:
    from pipelines.prompts import Prompts
    from pipelines.upstream_chat import Reference, Rendered

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/tiny-llama"
SYSTEM = "Be kind."
HISTORY = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]

# A template as others have them: no system role, tools, a switch for thinking, no BOS.
RICH = (
    "{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}"
    "{%- endif %}"
    "{%- if tools %}{{- '<|system|>' + (tools | tojson) + '<|end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}"
    "{%- if not enable_thinking %}{{- '<think></think>' }}{%- endif %}{%- endif %}"
)
# Sentences of a conversation decide which attack it starts.
HOSTILE = (
    "{%- set says = messages[-1]['content'] %}"
    "{%- if 'France' in says %}{{ says.__class__.__mro__[1].__subclasses__() }}"
    "{%- elif 'Monday' in says %}{%- set box = namespace(text='x' * 100000) %}"
    "{%- for i in range(40) %}{%- set box.text = box.text ~ box.text %}{%- endfor %}{{ box.text }}"
    "{%- elif 'hot' in says %}{{ nothing.at.all }}"
    "{%- else %}{{ says }}{%- endif %}"
)
ENDLESS = "{%- for i in range(90000) %}{%- for j in range(90000) %}{%- endfor %}{%- endfor %}never"


@pytest.fixture(scope="module")
def shipped() -> Prompts:
    """The prompts of the template."""
    return prompts.load(sample.of("corpora/prompts.yaml"))


def source_with(folder: Path, template: str | None) -> Path:
    """Copy the tokenizer of the embedded model and give it another chat template."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.model", "special_tokens_map.json", "config.json"):
        shutil.copy(MODEL / name, folder / name)
    config = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def rendered(source: Path, asked: Prompts, folder: Path, **front: Any) -> Reference:
    """Render with a log in `folder`, and leave nothing but the log."""
    folder.mkdir(parents=True, exist_ok=True)
    with upstream_chat.start(source, asked, folder / "log", **front) as pending:
        reference = pending.result()
    assert [path.name for path in folder.iterdir()] == ["log"]
    return reference


def by_id(reference: Reference) -> dict[str, Rendered]:
    """Return the conversations by id."""
    return {each.id: each for each in reference.conversations}


@pytest.fixture(scope="module")
def embedded(shipped: Prompts, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What the embedded model's tokenizer makes of them, behind a Modelfile with a system text."""
    return rendered(MODEL, shipped, tmp_path_factory.mktemp("embedded"), system=SYSTEM)


@pytest.fixture(scope="module")
def rich(shipped: Prompts, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What a template with tools, thinking and no system role makes of them."""
    folder = tmp_path_factory.mktemp("rich")
    return rendered(source_with(folder / "source", RICH), shipped, folder / "log", messages=HISTORY)


def test_the_reference_is_the_upstream_template_with_its_generation_prompt(
    embedded: Reference,
) -> None:
    """The text, the BOS and the tokens are those of transformers."""
    one = by_id(embedded)["one-line"]

    assert one.plain.text == "<s><|user|>\nWhat is the capital of France?<|end|>\n<|assistant|>\n"
    assert one.plain.tokens_count == 21
    assert not one.plain.tokenizer_bos
    assert embedded.bos_text == "<s>"
    assert embedded.sentence.startswith("transformers 5.")
    assert embedded.template_sha256 is not None
    assert not embedded.thinking


def test_the_system_text_of_the_modelfile_stands_in_front_unless_there_is_one(
    embedded: Reference,
) -> None:
    """Ollama sends it with every conversation that has none of its own, an empty one included."""
    found = by_id(embedded)

    assert found["one-line"].served.text.startswith("<s><|system|>\nBe kind.<|end|>\n<|user|>")
    assert found["one-line"].served.tokens_count > found["one-line"].plain.tokens_count
    for name in ("system", "empty-system"):
        assert found[name].served == found[name].plain


def test_messages_of_the_modelfile_stand_in_front_of_every_conversation(rich: Reference) -> None:
    """Ollama sends them even before a system message of the conversation."""
    found = by_id(rich)

    assert found["one-line"].served.text.startswith(
        "<|user|>\nHi.<|end|>\n<|assistant|>\nHello!<|end|>\n<|user|>\nWhat is"
    )
    assert "Hello!<|end|>\n<|system|>\nYou are" in found["system"].served.text


def test_the_models_own_control_tokens_are_put_into_a_user_text(embedded: Reference) -> None:
    """The file cannot know them; what is sent to the engines holds them too."""
    one = by_id(embedded)["own-control-tokens-in-user-text"]

    assert prompts.CONTROL_TOKENS not in one.messages[0]["content"]
    for token in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<s>", "</s>"):
        assert token in one.messages[0]["content"]
    assert one.messages[0]["content"] in one.plain.text


def test_an_answer_that_has_begun_is_gone_on_with(embedded: Reference) -> None:
    """A prefill ends in the assistant's own words, without an end token."""
    one = by_id(embedded)["prefill"]

    assert one.skipped is None
    assert one.plain.text.endswith("<|assistant|>\n1. red\n2.")


def test_tools_and_thinking_are_skipped_where_the_template_has_them_not(
    embedded: Reference,
) -> None:
    """A template that ignores both is no failure, and the result says what was not looked at."""
    found = by_id(embedded)

    assert found["tools"].skipped == "the upstream template has no tools"
    assert found["thinking"].skipped == "the upstream template has no thinking"


def test_tools_and_thinking_are_rendered_where_the_template_has_them(rich: Reference) -> None:
    """Only the conversation about thinking is told to think."""
    found = by_id(rich)

    assert rich.thinking
    assert found["tools"].skipped is found["thinking"].skipped is None
    assert '"name": "get_weather"' in found["tools"].plain.text
    assert found["thinking"].plain.text.endswith("<|assistant|>\n")
    assert found["one-line"].plain.text.endswith("<|assistant|>\n<think></think>")


def test_a_template_that_raises_refuses_in_its_own_words(rich: Reference) -> None:
    """A model without a system role is common; that is a result and no crash."""
    assert by_id(rich)["system"].plain.refused == "System role not supported"


def test_a_bos_that_the_tokenizer_puts_in_front_is_known(rich: Reference) -> None:
    """A template without a BOS, a tokenizer with one: servers read one token more."""
    one = by_id(rich)["one-line"]

    assert not one.plain.text.startswith("<s>")
    assert one.plain.tokenizer_bos


def test_a_model_without_a_chat_template_is_a_clear_result(
    shipped: Prompts, tmp_path: Path
) -> None:
    """There is nothing to compare with, and nobody is told otherwise."""
    reference = rendered(source_with(tmp_path / "source", None), shipped, tmp_path / "log")

    assert reference.template_sha256 is None
    assert reference.conversations == ()
    assert reference.sentence.endswith("no template")


def test_a_hostile_template_reaches_nothing_and_refuses_one_conversation(
    shipped: Prompts, tmp_path: Path
) -> None:
    """Python's insides are out of reach, memory has a limit, and the rest is rendered."""
    found = by_id(rendered(source_with(tmp_path / "s", HOSTILE), shipped, tmp_path / "log"))

    assert "SecurityError" in (found["one-line"].plain.refused or "")
    assert "MemoryError" in (found["empty-system"].plain.refused or "")
    assert "UndefinedError" in (found["system-multi-turn"].plain.refused or "")
    assert found["system"].plain.text == "What is a database?"


def test_a_template_that_does_not_end_is_stopped_and_named(
    shipped: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time-out that says what was running, and no process left."""
    monkeypatch.setattr(upstream_chat, "TIMEOUT_S", 6.0)

    with pytest.raises(UpstreamError, match="still running after 6 s"):
        rendered(source_with(tmp_path / "s", ENDLESS), shipped, tmp_path / "log")
    assert renderers() == []


def test_a_tokenizer_that_cannot_be_read_is_an_error_of_the_source(
    shipped: Prompts, tmp_path: Path
) -> None:
    """The words of transformers, short, and what follows from it."""
    source = source_with(tmp_path / "source", RICH)
    (source / "tokenizer_config.json").write_text("{", encoding="utf-8")

    with pytest.raises(UpstreamError, match="the upstream tokenizer cannot be read") as caught:
        rendered(source, shipped, tmp_path / "log")
    assert "fetched whole" in caught.value.hint


def test_a_template_that_prints_the_date_is_rendered_again_on_another_day(
    shipped: Prompts, tmp_path: Path
) -> None:
    """A load test that lasts over midnight compares with today's prompt."""
    source = source_with(
        tmp_path / "source", "{{ strftime_now('%d %b %Y') }} {{ messages | length }}"
    )
    few = shipped.model_copy(update={"conversations": shipped.conversations[:1]})
    log = tmp_path / "log"

    with upstream_chat.start(source, few, log) as pending:
        today = pending.result()
        assert pending.result() is today
        pending._rendered_at -= 2 * 24 * 3600
        again = pending.result()

    assert today.dated
    assert again is not today
    assert time.strftime("%Y") in again.conversations[0].plain.text
    assert log.read_text().count("pipelines.upstream_chat") == 2


def test_missing_packages_are_named_with_the_way_to_get_them(
    shipped: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers is an extra: an installation without it is told which one."""
    (tmp_path / "transformers.py").write_text("raise ModuleNotFoundError('No transformers')")
    ours = upstream_chat._environment
    monkeypatch.setattr(
        upstream_chat,
        "_environment",
        lambda folder: ours(folder) | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )

    with pytest.raises(MachineError, match="incomplete: No transformers") as caught:
        rendered(MODEL, shipped, tmp_path / "log")
    assert "make setup" in caught.value.hint


def renderers() -> list[psutil.Process]:
    """Return the processes below us that render."""
    return [
        each
        for each in psutil.Process().children(recursive=True)
        if each.status() != psutil.STATUS_ZOMBIE and "pipelines.upstream_chat" in each.cmdline()
    ]


def test_the_process_has_no_token_of_ours_and_ends_when_nobody_waits(
    shipped: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's template runs without secrets; after the block no process and file is left."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    # The servers do not have it, and a template may print the date.
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    killed = tmp_path / ".log.chat.part"
    killed.mkdir()
    (killed / "answer.json").write_text("{}", encoding="utf-8")

    with upstream_chat.start(MODEL, shipped, tmp_path / "log") as pending:
        deadline = time.monotonic() + 30
        while not (children := renderers()) and time.monotonic() < deadline:
            time.sleep(0.02)
        environment = children[0].environ()
    with pytest.raises(ToolError):
        pending.result()

    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "TZ"} & environment.keys()
    assert renderers() == []
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
