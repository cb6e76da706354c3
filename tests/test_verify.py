"""The stage `verify`: all layers asked, nothing proven by a crash, a fault is data."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, get_args

import pytest
from gguf_factory import converted_model
from record_factory import fetch_record
from verify_factory import EMBEDDED

from pipelines import (
    console,
    gguf_header,
    records,
    verify,
    verify_logits,
    verify_template,
    verify_tensors,
    verify_tokens,
)
from pipelines.errors import DigestError, FleetError, MachineError, ToolError
from pipelines.params import Corpus, Verify, VerifySlice
from pipelines.verify_records import Check, Layer, VerifyRecord

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.toolchain import Toolchain
    from pipelines.verify_subject import Subject

pytestmark = pytest.mark.toolchain

LAYERS: tuple[Layer, ...] = get_args(Layer)
GROUPS: dict[Any, tuple[Layer, ...]] = {
    verify_tensors: ("tensors", "hyperparameters", "values"),
    verify_tokens: ("vocabulary", "tokens"),
    verify_template: ("template", "generation"),
}


def check(layer: Layer, outcome: Any = "PASS") -> Check:
    """Build the answer of one layer."""
    return Check(
        layer=layer, outcome=outcome, examined_count=1, differing_count=int(outcome == "FAIL"),
        sentence=f"{layer} ended with {outcome}.",
    )  # fmt: skip


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A checkout in which a model was fetched and converted."""
    at = converted_model(tmp_path)
    at.source("tiny").mkdir(parents=True)
    (at.source("tiny") / "config.json").write_bytes((EMBEDDED / "config.json").read_bytes())
    convert = records.read(at.model_record("convert", "tiny"), records.ConvertRecord)
    records.write(at.model_record("fetch", "tiny"), fetch_record("tiny", revision=convert.revision))
    return at


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Subject]]:
    """Put answers of ours in place of the layers; returns the subjects that they were given."""

    def plant(**outcomes: str) -> list[Subject]:
        asked: list[Subject] = []

        def group(layers: tuple[Layer, ...]) -> Callable[[Subject], tuple[Check, ...]]:
            def answer(subject: Subject) -> tuple[Check, ...]:
                asked.append(subject)
                return tuple(check(layer, outcomes.get(layer, "PASS")) for layer in layers)

            return answer

        for module, layers in GROUPS.items():
            monkeypatch.setattr(module, "checks", group(layers))
        monkeypatch.setattr(
            verify_logits,
            "check",
            lambda _: (check("logits", outcomes.get("logits", "PASS")), None, None),
        )
        return asked

    return plant


def wanted() -> VerifySlice:
    """Declare the proof of the model `tiny`."""
    corpus = Corpus(path="corpora/evaluation.txt", sha256="0" * 64)
    return VerifySlice(model="tiny", recipe=3, corpus=corpus, verify=Verify())


def test_every_layer_is_asked_in_its_order_about_the_proved_bytes(
    at: Layout, tools: Toolchain, answers: Callable[..., list[Subject]]
) -> None:
    """The record names the bytes, the tools and what each layer said, and is the same each time."""
    asked = answers()

    record = verify.verify(wanted(), at, tools)

    convert = records.read(at.model_record("convert", "tiny"), records.ConvertRecord)
    assert [each.layer for each in record.checks] == list(LAYERS)
    assert record.outcome == "PASS"
    assert (record.f16_sha256, record.revision) == (convert.gguf.sha256, convert.revision)
    assert (record.llama_cpp_commit, record.recipe) == (tools.commit, 3)
    assert record == verify.verify(wanted(), at, tools)
    assert VerifyRecord.model_validate_json(record.model_dump_json()) == record
    subject = asked[0]
    assert subject.header == gguf_header.read(at.f16("tiny"))
    assert subject.config["model_type"] == "llama"
    assert not subject.scratch.exists()


@pytest.mark.parametrize("layer", LAYERS)
def test_one_failed_layer_fails_the_record_and_is_named(
    layer: Layer,
    at: Layout,
    tools: Toolchain,
    answers: Callable[..., list[Subject]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The verdict is data: nothing is raised, the record says FAIL, and a warning says why."""
    answers(**{layer: "FAIL"})

    record = verify.verify(wanted(), at, tools)

    assert record.outcome == "FAIL"
    assert f"tiny: {layer} failed: {layer} ended with FAIL." in capsys.readouterr().err


def test_a_layer_that_could_not_be_asked_is_never_counted_as_passed(
    at: Layout,
    tools: Toolchain,
    answers: Callable[..., list[Subject]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SKIP stays SKIP in the record, and people are told."""
    answers(logits="SKIP")

    record = verify.verify(wanted(), at, tools)

    assert record.outcome == "PASS"
    assert record.checks[-1].outcome == "SKIP"
    shown = capsys.readouterr().err
    assert "tiny: logits skipped: logits ended with SKIP." in shown
    assert "7 of 8 layers passed" in shown


CRASHES: dict[str, tuple[Exception, type[FleetError], str]] = {
    "an unforeseen value": (KeyError("rope"), ToolError, "broke off while it looked at"),
    "a tool": (ToolError("llama-tokenize failed"), ToolError, "llama-tokenize failed"),
    "a package": (
        ModuleNotFoundError("No module named 'numpy'", name="numpy"),
        MachineError,
        "No module named 'numpy'",
    ),
    "a module of ours": (
        ModuleNotFoundError("No module named 'pipelines.x'", name="pipelines.x"),
        ToolError,
        "No module named 'pipelines.x'",
    ),
    "a name in a module of ours": (
        ImportError("cannot import name 'x' from 'pipelines.apart'", name="pipelines.apart"),
        ToolError,
        "cannot import name 'x'",
    ),
    "memory": (MemoryError(), MachineError, "ran out of memory"),
    "a forged command": (ValueError("##[set-output name=x]y"), ToolError, "broke off"),
}


@pytest.mark.parametrize("module", [*GROUPS, verify_logits], ids=lambda each: each.__name__)
@pytest.mark.parametrize(("raised", "kind", "says"), CRASHES.values(), ids=CRASHES.keys())
def test_a_crash_proves_nothing_in_either_direction(  # noqa: PLR0913, PLR0917 - fixtures
    raised: Exception,
    kind: type[FleetError],
    says: str,
    module: Any,
    at: Layout,
    tools: Toolchain,
    answers: Callable[..., list[Subject]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever layer it is: an error with a next step, no record, no scratch left."""
    answers()

    def crash(_: Subject) -> None:
        raise raised

    monkeypatch.setattr(module, "check" if module is verify_logits else "checks", crash)
    with pytest.raises(FleetError) as caught:
        verify.verify(wanted(), at, tools)

    assert isinstance(caught.value, kind)
    assert says in caught.value.message
    assert "##[" not in caught.value.message
    assert not (at.scratch("tiny") / "verify").exists()


def test_a_layer_that_is_missing_or_answers_twice_is_an_error(
    at: Layout,
    tools: Toolchain,
    answers: Callable[..., list[Subject]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing may look more proven than it is."""
    answers()
    for given in ((), (check("vocabulary"), check("vocabulary"))):
        monkeypatch.setattr(verify_tokens, "checks", lambda _, given=given: given)
        with pytest.raises(ToolError, match="verify asked"):
            verify.verify(wanted(), at, tools)


def test_other_bytes_than_the_recorded_ones_are_not_looked_at(
    at: Layout, tools: Toolchain, answers: Callable[..., list[Subject]]
) -> None:
    """One flipped bit after the conversion: a proof of it would be a proof of something else."""
    asked = answers()
    data = bytearray(at.f16("tiny").read_bytes())
    data[-1] ^= 1
    at.f16("tiny").write_bytes(data)

    with pytest.raises(DigestError, match="is not the file of its record"):
        verify.verify(wanted(), at, tools)
    assert asked == []


def test_a_source_of_another_revision_is_not_the_one_that_was_converted(
    at: Layout, tools: Toolchain, answers: Callable[..., list[Subject]]
) -> None:
    """After a bump the old GGUF must not be proven by the new files."""
    answers()
    records.write(at.model_record("fetch", "tiny"), fetch_record("tiny", revision="1" * 40))

    with pytest.raises(ToolError, match="is of revision 000000000000"):
        verify.verify(wanted(), at, tools)


def test_text_of_a_stranger_is_cleaned_before_it_is_shown(
    at: Layout,
    tools: Toolchain,
    answers: Callable[..., list[Subject]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tensor may be called like a command of the CI runner."""
    answers()
    shown: list[str] = []
    monkeypatch.setattr(console, "warn", shown.append)
    forged = check("template", "FAIL").model_copy(update={"sentence": "::error::x"})
    monkeypatch.setattr(verify_template, "checks", lambda _: (forged, check("generation")))

    verify.verify(wanted(), at, tools)

    assert shown
    assert all("::" not in text for text in shown)


def test_a_subject_cannot_be_changed_by_a_layer(
    at: Layout, tools: Toolchain, answers: Callable[..., list[Subject]]
) -> None:
    """What one layer is given is what the next one is given."""
    asked = answers()
    verify.verify(wanted(), at, tools)

    with pytest.raises(dataclasses.FrozenInstanceError):
        asked[0].model = "other"  # type: ignore[misc]
    assert len({id(subject) for subject in asked}) == 1


def test_the_layers_are_those_of_the_record() -> None:
    """The groups that are asked cover every layer, each once."""
    covered = [layer for layers in GROUPS.values() for layer in layers]

    assert (*covered, "logits") == LAYERS
    assert json.loads(json.dumps(LAYERS)) == list(verify.LAYERS)
