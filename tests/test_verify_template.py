"""No conversion that changed a prompt, or when a generation ends, gets through."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sample
from gguf_faults import Gguf
from verify_factory import EMBEDDED, converted, subject

from pipelines import gguf_carrier, gguf_header, verify_template
from pipelines.serving.server import LoadFailed
from pipelines.upstream_chat import Reference, Rendered, Rendering
from pipelines.verify_tokens import Tokenized, ask_gguf

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.toolchain import Toolchain
    from pipelines.verify_records import Check
    from pipelines.verify_subject import Subject

ROOT = Path(__file__).resolve().parent.parent
_KEY = "tokenizer.chat_template"
_U32, _FLOAT, _TEXT = 4, 6, 8


@pytest.fixture(scope="module")
def conversion(tools: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, converted by the real converter."""
    return converted(EMBEDDED, tmp_path_factory.mktemp("embedded"), tools)


@pytest.fixture
def plant(conversion: Path, tools: Toolchain, tmp_path: Path) -> Callable[..., Subject]:
    """Put the conversion with one thing changed, in the GGUF or upstream, before the layers."""

    def planted(
        change: Callable[[Gguf], None] | None = None, **files: dict[str, Any] | str | None
    ) -> Subject:
        source = tmp_path / "source"
        shutil.copytree(EMBEDDED, source)
        for name, content in files.items():
            path = source / name.replace("__", ".")
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
        gguf = tmp_path / "changed.gguf"
        model = Gguf(conversion)
        if change is not None:
            change(model)
        model.write(gguf)
        sample.take(tmp_path, "corpora/prompts.yaml")
        return subject(tmp_path, source, gguf, tools)

    return planted


def _template() -> str:
    return str(json.loads((EMBEDDED / "tokenizer_config.json").read_text())["chat_template"])


def _config(template: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((EMBEDDED / "tokenizer_config.json").read_text())
    return told | {"chat_template": template}


# --- template ---------------------------------------------------------------------------------


def test_both_engines_make_the_same_prompts_of_the_golden_conversations(
    plant: Callable[..., Subject],
) -> None:
    """By transformers and by the llama-server that will serve; what has no meaning is named."""
    template, generation = verify_template.checks(plant())
    assert (template.layer, template.outcome) == ("template", "PASS")
    assert template.examined_count == 15
    assert (
        "not judged: tools (the upstream template has no tools) and thinking" in template.sentence
    )
    assert (generation.layer, generation.outcome) == ("generation", "PASS")
    assert '2 "</s>" and 6 "<|end|>"' in generation.sentence


def test_an_equal_template_that_renders_otherwise_fails_by_its_conversation(
    plant: Callable[..., Subject],
) -> None:
    """The template asks for the EOS token, and the GGUF names another one as that."""
    template = _template().replace("'<|end|>", "eos_token + '")

    def change(model: Gguf) -> None:
        model.set(_KEY, template)
        model.set("tokenizer.ggml.eos_token_id", 5)

    found, _ = verify_template.checks(plant(change, tokenizer_config__json=_config(template)))
    assert found.outcome == "FAIL"
    assert "llama.cpp renders 15 conversations of 15 otherwise" in found.sentence
    assert "<|assistant|>" in found.findings[0]


def _one_character(model: Gguf) -> None:
    model.set(_KEY, _template().replace("<|end|>\\n", "<|end|>", 1))


def _added(model: Gguf) -> None:
    model.set(f"{_KEY}.tool_use", "{{ messages }}", _TEXT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_one_character, "the chat template is not upstream's from line 1 on: "),
        (lambda model: model.pairs.pop(_KEY), "the chat template is missing in the GGUF"),
        (_added, 'the chat template "tool_use" in the GGUF is none of upstream\'s'),
    ],
    ids=["edited", "lost", "added"],
)
def test_a_template_that_is_not_upstreams_fails_with_the_line(
    change: Callable[[Gguf], None], words: str, plant: Callable[..., Subject]
) -> None:
    """One character is enough, and where it is gets shown."""
    template, _ = verify_template.checks(plant(change))
    assert template.outcome == "FAIL"
    assert words in template.sentence


def test_a_file_of_its_own_beats_the_template_in_the_configuration(
    plant: Callable[..., Subject],
) -> None:
    """As transformers has it; the converter of this llama.cpp takes the other one."""
    template, _ = verify_template.checks(plant(chat_template__jinja="{{ messages }}\n"))
    assert template.outcome == "FAIL"
    assert "from line 1 on" in template.sentence


def test_without_a_template_there_is_nothing_to_compare(plant: Callable[..., Subject]) -> None:
    """SKIP, which is never counted as passed."""
    wanted = plant(lambda model: model.pairs.pop(_KEY), tokenizer_config__json=_config(None))
    template, _ = verify_template.checks(wanted)
    assert template.outcome == "SKIP"


def test_named_templates_are_read_in_both_ways_of_writing_them(tmp_path: Path) -> None:
    """A list of names, as most have it, or files beside the main one."""
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    path.write_text(json.dumps({"chat_template": named}))
    assert verify_template.upstream_templates(tmp_path) == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.jinja").write_text("c")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/rag.jinja").write_text("d")
    assert verify_template.upstream_templates(tmp_path) == {"default": "c", "rag": "d"}


def test_a_server_that_is_not_ready_in_time_proves_nothing(
    plant: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow machine is no fault of a conversion: an error, and neither PASS nor FAIL."""
    monkeypatch.setattr(verify_template, "_READY_WITHIN_S", 0.0)
    with pytest.raises(LoadFailed, match="was not ready within 0 s"):
        verify_template.checks(plant())


# --- generation -------------------------------------------------------------------------------


def _judged(wanted: Subject, ends: tuple[int, ...], reference: Reference | None = None) -> Check:
    """Judge a GGUF with which llama.cpp ends at these tokens."""
    known = Tokenized(
        tokens_count=1024, special={}, adds={}, ends=ends, controls=frozenset(), ids=()
    )
    return verify_template.generation(wanted.source, wanted.config, wanted.header, known, reference)


def test_an_end_that_is_not_upstreams_fails(plant: Callable[..., Subject]) -> None:
    """Such a model would answer for ever."""
    found = _judged(plant(), (5,))
    assert found.outcome == "FAIL"
    assert 'upstream ends a generation at 2 "</s>" and 6 "<|end|>"' in found.sentence


def test_a_token_that_ends_turns_and_that_llama_cpp_does_not_know_fails(
    plant: Callable[..., Subject],
) -> None:
    """It follows what the assistant has said; any other is named as a stop to declare."""
    message = {"role": "assistant", "content": "Yes."}
    rendering = Rendering(text="<|assistant|>\nYes.<|end|>\n")
    reference = Reference(
        transformers="5",
        tokenizer="T",
        bos_text="<s>",
        template_sha256="0" * 64,
        thinking=False,
        conversations=(Rendered(id="x", messages=(message,), plain=rendering, served=rendering),),
    )
    wanted = plant()
    assert _judged(wanted, (2, 6), reference).outcome == "PASS"
    found = _judged(wanted, (2,), reference)
    assert found.outcome == "FAIL"
    assert "ends a turn with 6" in found.sentence
    named = _judged(wanted, (2,))
    assert named.outcome == "PASS"
    assert (
        'also end at 6 "<|end|>", for which a GGUF has no key: name it as a stop' in named.sentence
    )


def _sampling(**values: float) -> Callable[[Gguf], None]:
    def change(model: Gguf) -> None:
        for key, value in values.items():
            model.set(f"general.sampling.{key}", value, _FLOAT)

    return change


@pytest.mark.parametrize(
    ("written", "outcome", "words"),
    [
        ({"temp": 0.6, "top_p": 0.95}, "PASS", "sampling defaults are upstream's (temp, top_p)"),
        ({"temp": 0.7, "top_p": 0.95}, "FAIL", "sampling default temp is 0.6999"),
        ({"temp": 0.6}, "FAIL", "sampling default top_p is not in the GGUF"),
        ({"temp": 0.6, "top_p": 0.95, "min_p": 0.1}, "FAIL", "min_p is"),
    ],
)
def test_sampling_defaults_are_upstreams_or_fail(
    written: dict[str, float], outcome: str, words: str, plant: Callable[..., Subject]
) -> None:
    """In the 32 bits that GGUF has for them."""
    told = json.loads((EMBEDDED / "generation_config.json").read_text())
    stated = told | {"temperature": 0.6, "top_p": 0.95}
    found = _judged(plant(_sampling(**written), generation_config__json=stated), (2, 6))
    assert found.outcome == outcome
    assert words in found.sentence


def test_a_padding_token_that_no_file_of_upstream_knows_fails(
    plant: Callable[..., Subject],
) -> None:
    """Nor one that begins a text."""
    found = _judged(plant(lambda model: model.set("tokenizer.ggml.padding_token_id", 9)), (2, 6))
    assert found.outcome == "FAIL"
    assert "pad is 9" in found.sentence


def test_a_generation_configuration_that_is_no_json_is_skipped(
    plant: Callable[..., Subject],
) -> None:
    """With the file's name."""
    found = _judged(plant(generation_config__json="{"), (2, 6))
    assert found.outcome == "SKIP"
    assert "generation_config.json cannot be read" in found.sentence


# --- the carrier ------------------------------------------------------------------------------


def test_a_carrier_has_the_vocabulary_and_template_and_next_to_no_bytes(
    conversion: Path, tmp_path: Path
) -> None:
    """Each pair as it was, byte for byte; tensors are holes in the file."""
    header = gguf_header.read(conversion)
    gguf_carrier.write(header, tmp_path / "carrier.gguf")
    carried = gguf_header.read(tmp_path / "carrier.gguf")
    pairs = dict(gguf_carrier.raw_pairs(header))
    kept = {key: pair for key, pair in pairs.items() if key.startswith("tokenizer.")}
    assert kept
    assert {key: pair for key, pair in gguf_carrier.raw_pairs(carried) if key in kept} == kept
    assert carried.text("general.architecture") == "llama"
    assert carried.file_size_bytes < header.file_size_bytes / 10
    assert carried.file_size_bytes == carried.end_offset


def test_a_file_that_changed_after_its_header_was_read_is_an_error(
    conversion: Path, tmp_path: Path
) -> None:
    """No carrier is made of it."""
    path = tmp_path / "f16.gguf"
    shutil.copy(conversion, path)
    header = gguf_header.read(path)
    data = bytearray(path.read_bytes())
    data[24:32] = struct.pack("<Q", 1 << 40)
    path.write_bytes(data)
    with pytest.raises(gguf_header.GgufError):
        gguf_carrier.write(header, tmp_path / "carrier.gguf")


@pytest.mark.parametrize("key", ["eot_token_id", "eom_token_id", "fim_pad_token_id"])
def test_an_ordinary_token_at_which_every_answer_would_break_off_is_found(
    key: str, tools: Toolchain, plant: Callable[..., Subject]
) -> None:
    """No output shows it: token ids, logits and prompts are all right."""
    bad = plant(lambda model: model.set(f"tokenizer.ggml.{key}", 700, _U32))
    known = ask_gguf(bad.f16, (), tools, bad.scratch, bad.log)

    found = verify_template.generation(bad.source, bad.config, bad.header, known)

    assert found.outcome == "FAIL"
    assert "llama.cpp ends a generation at 700" in found.sentence
