"""The engines make upstream's prompts, and every way in which they do not is seen and shown."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sample

from pipelines import convert, declaration, fetch, golden, hashing, params, prompts, records
from pipelines import upstream_chat as chat
from pipelines.layout import Layout
from pipelines.load_records import Golden, GoldenPrompt, Served
from pipelines.serving import engine, modelfile, server
from pipelines.upstream_chat import Reference, Rendered, Rendering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.prompts import Prompts
    from pipelines.serving.engine import Engine
    from pipelines.toolchain import Toolchain

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tiny-llama"
PLAIN = "# version: 1\nFROM x\n"
TEMPLATE = PLAIN + 'TEMPLATE """{}"""\n'
# What the Jinja of the embedded model says, in the language of Ollama.
RIGHT_TEMPLATE = (
    "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n"
)
# A template with everything that may be there: tools, and a switch for thinking.
RICH = (
    "{{- bos_token }}{%- if tools %}{{- '<|system|>\\n' + (tools | tojson) + '<|end|>\\n' }}"
    "{%- endif %}{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


# --- a real model in real engines -------------------------------------------------------------


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory, tools: Toolchain) -> Layout:
    """A checkout in which the embedded model has been fetched and converted."""
    root = tmp_path_factory.mktemp("golden") / "fork"
    sample.take(root, "examples", "corpora", "params.yaml")
    at = Layout(root)
    declared = declaration.load(at.params)
    fetched = fetch.run(params.fetch_slice(declared, MODEL), at)
    records.write(at.model_record("fetch", MODEL), fetched)
    at.toolchain.write_text(json.dumps(tools.manifest))
    convert.run(params.convert_slice(declared, MODEL), at)
    return at


@pytest.fixture(scope="module")
def asked() -> Prompts:
    """The prompts of the template."""
    return prompts.load(sample.of("corpora/prompts.yaml"))


@pytest.fixture(scope="module")
def engines(tools: Toolchain, at: Layout) -> dict[str, Engine]:
    """Both engines, each as the stage finds it."""
    return {
        kind: engine.find(params.Serving(engine=kind), tools, log=at.root / "engines.log")
        for kind in ("ollama", "llama-server")
    }


@pytest.fixture(scope="module")
def upstream(at: Layout, asked: Prompts) -> Callable[..., Reference]:
    """Render upstream's prompts, once for each Modelfile and source."""
    known: dict[str, Reference] = {}

    def render(text: str = PLAIN, source: Path | None = None) -> Reference:
        key = f"{source} {text}"
        if key not in known:
            read = modelfile.parse(text)
            with chat.start(
                source or at.source(MODEL),
                asked,
                at.root / "upstream.log",
                system=read.system or "",
                messages=[{"role": m.role, "content": m.content} for m in read.messages],
            ) as pending:
                known[key] = pending.result()
        return known[key]

    return render


@pytest.fixture
def serve(engines: dict[str, Engine], at: Layout, tmp_path: Path) -> Callable[..., Any]:
    """Serve the embedded model, or another file, from an engine."""

    @contextmanager
    def run(kind: str, text: str = PLAIN, gguf: Path | None = None) -> Iterator[server.Loaded]:
        path = gguf or at.f16(MODEL)
        file = server.GgufFile(
            type="F16",
            path=path,
            sha256=hashing.digest(path).sha256,
            modelfile=modelfile.parse(text),
        )
        settings = server.Settings(
            context_tokens=512,
            parallel=1,
            threads=1,
            gpu_layers="all",
            kv_type="f16",
            flash_attention=True,
            load_timeout_s=120.0,
        )
        log = tmp_path / "serve.log"
        with (
            server.open_host(
                engines[kind], settings, model=MODEL, at=Layout(tmp_path), log=log
            ) as host,
            host.load(file) as loaded,
        ):
            yield loaded

    return run


def altered(gguf: Path, out: Path, *options: str) -> Path:
    """Copy a GGUF with other metadata, by gguf-py's own tool."""
    tool = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", str(gguf), str(out), "--force"]
    subprocess.run([*tool, *options], check=True, capture_output=True)
    return out


def outcomes(judged: Golden) -> dict[str, str]:
    """Return the outcome of each conversation."""
    return {each.id: each.outcome for each in judged.prompts}


@pytest.mark.toolchain
@pytest.mark.parametrize("kind", ["ollama", "llama-server"])
def test_a_real_engine_makes_the_prompts_of_upstream(
    kind: str, serve: Callable[..., Any], asked: Prompts, upstream: Callable[..., Reference]
) -> None:
    """Every conversation to the last blank and token, but for what the template does not have."""
    with serve(kind) as loaded:
        judged = golden.check(upstream(), asked, loaded)

    assert golden.objection(judged) is None
    assert {id_ for id_, outcome in outcomes(judged).items() if outcome != "PASS"} == {
        "tools",
        "thinking",
    }
    assert judged.sha256 == asked.sha256
    assert "21 tokens" in judged.prompts[0].sentence


@pytest.mark.toolchain
@pytest.mark.parametrize(
    "text",
    [PLAIN + "SYSTEM Be kind.\n", PLAIN + "MESSAGE user Hi.\nMESSAGE assistant Hello!\n"],
    ids=["system", "messages"],
)
def test_what_the_modelfile_puts_in_front_is_expected_in_front(
    text: str, serve: Callable[..., Any], asked: Prompts, upstream: Callable[..., Reference]
) -> None:
    """With it in the reference all is right; without it Ollama, and only Ollama, differs."""
    with serve("ollama", text) as loaded:
        right = golden.check(upstream(text), asked, loaded)
        wrong = golden.check(upstream(), asked, loaded)

    assert golden.objection(right) is None
    first = wrong.prompts[0]
    assert first.outcome == "FAIL"
    assert first.sentence.startswith("Ollama renders it otherwise than upstream, from line")
    assert "llama-server" not in first.sentence


@pytest.mark.toolchain
def test_a_planted_wrong_template_layer_closes_the_gate(
    serve: Callable[..., Any], asked: Prompts, upstream: Callable[..., Reference]
) -> None:
    """ChatML for a model that never saw it: a sentence that says where, and the lines."""
    wrong = (
        "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n"
    )
    with serve("ollama", TEMPLATE.format(wrong)) as loaded:
        judged = golden.check(upstream(), asked, loaded)

    objection = golden.objection(judged) or ""
    assert "15 conversations of 17" in objection
    assert "Ollama renders it otherwise than upstream, from line 1, character 3 on" in objection
    diff = judged.prompts[0].diff
    assert diff[:2] == ("- upstream", "+ Ollama")
    assert "- <|user|>↵" in diff
    assert "+ <|im_start|>user↵" in diff


@pytest.mark.toolchain
def test_a_template_layer_that_is_right_passes_on_its_own(
    serve: Callable[..., Any], asked: Prompts, upstream: Callable[..., Reference]
) -> None:
    """Ollama then renders alone; only the begun answer, which this template ends, is wrong."""
    with serve("ollama", TEMPLATE.format(RIGHT_TEMPLATE)) as loaded:
        judged = golden.check(upstream(), asked, loaded)

    assert {id_ for id_, outcome in outcomes(judged).items() if outcome == "FAIL"} == {"prefill"}
    assert judged.prompts[0].sentence == "Ollama renders it as upstream does, 21 tokens."


@pytest.mark.toolchain
@pytest.mark.parametrize("kind", ["ollama", "llama-server"])
def test_a_gguf_whose_template_was_altered_closes_the_gate(  # noqa: PLR0913, PLR0917 - fixtures
    kind: str,
    serve: Callable[..., Any],
    asked: Prompts,
    upstream: Callable[..., Reference],
    at: Layout,
    tmp_path: Path,
) -> None:
    """A blank that is gone is enough, and both engines are named."""
    source = json.loads((at.source(MODEL) / "tokenizer_config.json").read_text())
    template = source["chat_template"].replace("'<|assistant|>\\n'", "'<|assistant|>'")
    assert template != source["chat_template"]
    gguf = altered(at.f16(MODEL), tmp_path / "altered.gguf", "--chat-template", template)

    with serve(kind, gguf=gguf) as loaded:
        judged = golden.check(upstream(), asked, loaded)

    first = judged.prompts[0]
    assert first.outcome == "FAIL"
    assert "llama-server renders it otherwise than upstream" in first.sentence
    assert ("Ollama renders it otherwise" in first.sentence) == (kind == "ollama")
    assert "- <|assistant|>↵" in first.diff
    assert "+ <|assistant|>" in first.diff


@pytest.mark.toolchain
@pytest.mark.parametrize("kind", ["ollama", "llama-server"])
def test_tools_and_thinking_are_compared_where_the_template_has_them(  # noqa: PLR0913, PLR0917 - fixtures
    kind: str,
    serve: Callable[..., Any],
    asked: Prompts,
    upstream: Callable[..., Reference],
    at: Layout,
    tmp_path: Path,
) -> None:
    """A template with both, in tokenizer and GGUF, is rendered alike, tokens included."""
    source = Path(shutil.copytree(at.source(MODEL), tmp_path / "source"))
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").chmod(0o644)
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": RICH}))
    gguf = altered(at.f16(MODEL), tmp_path / "rich.gguf", "--chat-template", RICH)

    with serve(kind, gguf=gguf) as loaded:
        judged = golden.check(upstream(source=source), asked, loaded)

    assert golden.objection(judged) is None
    found = outcomes(judged)
    assert found["tools"] == found["thinking"] == found["one-line"] == "PASS"
    assert found["prefill"] == "SKIPPED"


# --- faults that no engine can be made to show ------------------------------------------------


def rendering(text: str, count: int = 5, *, bos: bool = False) -> Rendering:
    """Return what upstream makes of a conversation."""
    return Rendering(text=text, tokens_count=count, tokenizer_bos=bos)


REFUSED = Rendering(refused="System role not supported")
SERVED = Served(
    type="F16", gguf_sha256="0" * 64, manifest_sha256="1" * 64, context_tokens=64, parallel=1,
    gpu_layers="0", kv_type="f16", size_bytes=None, size_vram_bytes=None, peak_memory_mib=None,
    cold_load_ms=1.0,
)  # fmt: skip


@dataclass
class Scripted:
    """An Ollama whose answers are given, errors included."""

    text: str | Exception = "<u>Hi<a>"
    count: int | Exception = 5
    served: Served = SERVED
    llama_server_renders: bool = True

    def render(self, *_: object, think: bool = False) -> str:
        """Give the prompt."""
        del think
        if isinstance(self.text, Exception):
            raise self.text
        return self.text

    render_by_llama_server = render

    def prompt_tokens(self, _messages: object) -> int:
        """Give the count."""
        if isinstance(self.count, Exception):
            raise self.count
        return self.count


def judge(loaded: Scripted, plain: Rendering, served: Rendering | None = None) -> GoldenPrompt:
    """Judge one conversation, of which upstream makes `plain`."""
    one = prompts.Conversation(
        id="one", messages=(prompts.Message(role="user", content="Hi"),)
    )  # fmt: skip
    listed = prompts.Prompts(
        name="prompts.yaml", version=1, sha256="", conversations=(one,), regressions=()
    )
    rendered = Rendered(
        id="one", messages=tuple(one.plain_messages()), plain=plain, served=served or plain
    )
    reference = Reference(
        transformers="5", tokenizer="T", bos_text="<s>", template_sha256="0" * 64,
        thinking=False, conversations=(rendered,),
    )  # fmt: skip
    (found,) = golden.check(reference, listed, loaded).prompts
    return found


@pytest.mark.parametrize("text", ["<u>Hi<a>", "<s><u>Hi<a>"])
def test_the_one_bos_in_front_may_be_written_or_left_to_the_tokenizer(text: str) -> None:
    """Ollama leaves it out, others write it; it is one token in both cases."""
    assert judge(Scripted(text=text), rendering("<s><u>Hi<a>")).outcome == "PASS"


def test_a_second_bos_is_a_fault() -> None:
    """In the text it differs, in the tokens it is one too many."""
    in_text = judge(Scripted(text="<s><s><u>Hi<a>"), rendering("<s><u>Hi<a>"))
    in_tokens = judge(Scripted(count=6), rendering("<s><u>Hi<a>"))

    assert in_text.outcome == in_tokens.outcome == "FAIL"
    assert "a second BOS?" in in_tokens.sentence


def test_a_bos_that_only_the_tokenizer_adds_is_none() -> None:
    """A template without BOS, a tokenizer with one: known beforehand, said, and right."""
    found = judge(Scripted(count=6), rendering("<u>Hi<a>", bos=True))

    assert found.outcome == "PASS"
    assert "6 tokens with the BOS" in found.sentence


def test_another_count_of_tokens_is_a_fault_though_the_text_is_right() -> None:
    """Another tokenizer, or text that was cut, is seen by the count alone."""
    found = judge(Scripted(count=4), rendering("<u>Hi<a>"))

    assert found.outcome == "FAIL"
    assert "Ollama reads 4 tokens, upstream's tokenizer makes 5" in found.sentence


def test_a_conversation_beyond_the_context_is_compared_and_not_counted() -> None:
    """A server cannot read it; its text can still be right."""
    found = judge(Scripted(count=ValueError()), rendering("<u>Hi<a>", count=64))

    assert found.outcome == "PASS"
    assert "longer than the context" in found.sentence


def test_what_upstream_refuses_is_skipped_in_its_words() -> None:
    """Nothing would be right, so nothing is wrong."""
    found = judge(Scripted(), REFUSED)

    assert found.outcome == "SKIPPED"
    assert "System role not supported" in found.sentence


def test_a_system_text_of_the_modelfile_that_upstream_refuses_is_a_fault() -> None:
    """Every conversation is served behind it, and the template does not know its role."""
    found = judge(Scripted(), rendering("<u>Hi<a>"), REFUSED)

    assert found.outcome == "FAIL"
    assert "behind the Modelfile's system text: System role not supported" in found.sentence


def test_what_an_engine_refuses_and_upstream_renders_is_a_fault() -> None:
    """The sentence has the engine's own words."""
    refusal = server.ServingError('ollama answers 400: "tiny" does not support tools.')

    found = judge(Scripted(text=refusal), rendering("<u>Hi<a>"))

    assert found.outcome == "FAIL"
    assert 'Ollama does not render it: ollama answers 400: "tiny" does' in found.sentence


@pytest.mark.parametrize(
    "loaded",
    [Scripted(text=server.ServerGone("gone")), Scripted(count=server.ServerGone("gone"))],
    ids=["text", "count"],
)
def test_a_server_that_is_gone_has_refused_nothing(loaded: Scripted) -> None:
    """Its end is no wrong prompt, and whoever called hears of it."""
    with pytest.raises(server.ServerGone):
        judge(loaded, rendering("<u>Hi<a>"))


def test_a_difference_shows_what_cannot_be_seen_and_nothing_that_acts() -> None:
    """Blanks at the ends, tabs, line ends, invisible letters; no escape, no runner command."""
    wanted = "<u>\nHi \u200b\x1b[31m::error::x\tend  \n<a>\n"
    found = judge(Scripted(text="<u>\nHi\n<a>"), rendering(wanted))

    shown = "\n".join(found.diff)
    assert "→end··↵" in shown
    assert "\\u200b\\x1b[31m" in shown
    assert "::" not in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", shown)
    assert "- <a>↵" in found.diff
    assert "+ <a>" in found.diff


def test_a_long_difference_is_cut_around_the_place() -> None:
    """One changed letter in a line of thousands is still on the screen."""
    words = "word " * 2000
    found = judge(
        Scripted(text="\n".join([words + "b" + words, *map(str, range(100))])),
        rendering("\n".join([words + "a" + words, *(f"{i}x" for i in range(100))])),
    )

    assert f"character {len(words) + 1} on" in found.sentence
    assert any(line.startswith("- …") and "word aword" in line for line in found.diff)
    assert any(line.startswith("+ …") and "word bword" in line for line in found.diff)
    assert "- … and 96 lines more" in found.diff
    assert len(found.diff) < 40
    assert max(map(len, found.diff)) < 130


def test_a_gate_that_looked_at_nothing_is_not_passed() -> None:
    """A model without a chat template, or one that refuses everything, has proved nothing."""
    reference = Reference(
        transformers="5", tokenizer="T", bos_text="", template_sha256=None, thinking=False,
        conversations=(),
    )  # fmt: skip
    asked = prompts.load(sample.of("corpora/prompts.yaml"))

    judged = golden.check(reference, asked, Scripted())

    assert set(outcomes(judged).values()) == {"SKIPPED"}
    assert "No prompt could be compared with upstream" in (golden.objection(judged) or "")
    assert "ChatML" in (golden.objection(judged) or "")
