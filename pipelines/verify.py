"""
The stage `verify`: whether the 16-bit GGUF is the model that upstream published.

A converter can be wrong without failing: a rope base that is not read, tensors in another order, a
pre-tokenizer that is only similar. So what it made is held against upstream's own files, layer by
layer, by code that is not the converter's. The layers are asked in the order of
`verify_records.Layer`, cheapest first; all of them are asked, whatever an earlier one found, since
the one fault that shows in three of them is understood faster than the one that shows in one.

    tensors, hyperparameters, values    verify_tensors
    vocabulary, tokens                  verify_tokens
    template, generation                verify_template
    logits                              verify_logits

The outcome is data: a conversion that is not faithful ends with exit code 0, a record that says
FAIL, and a verdict that says REJECT. A layer that could not be asked is SKIP and is never counted
as passed. A tool that crashed proves nothing either way: that is an error, and no record.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, get_args

from pipelines import apart, atomic, console, fetch, gguf_header, measuring, records, toolchain
from pipelines.errors import FleetError, MachineError, ToolError
from pipelines.verify_records import Layer, VerifyRecord
from pipelines.verify_subject import Subject
from pipelines.wording import counted, listed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.params import VerifySlice
    from pipelines.toolchain import Toolchain
    from pipelines.verify_records import Check, EmbeddingAgreement, LogitsAgreement

LAYERS: tuple[Layer, ...] = get_args(Layer)


def run(slice_: VerifySlice, at: Layout) -> VerifyRecord:
    """Prove a conversion with the fleet's own toolchain, while nobody measures on this machine."""
    tools = toolchain.load(at)
    # Nothing is timed here. But it takes all cores, and would spoil what is timed beside it.
    with measuring.one_at_a_time(toolchain.default_cache_root(), f"verify {slice_.model}"):
        return verify(slice_, at, tools)


def verify(wanted: VerifySlice, at: Layout, tools: Toolchain) -> VerifyRecord:
    """
    Ask every layer about work/MODEL/f16.gguf.

    Raises:
        DigestError: The 16-bit model is not the one of its record.
        ToolError: A program that a layer needs failed; nothing is proven, in neither direction.
        MachineError: Python packages of the extra `convert` are missing.
    """
    model = wanted.model
    convert = records.read(at.model_record("convert", model), records.ConvertRecord)
    fetched = records.read(at.model_record("fetch", model), records.FetchRecord)
    if fetched.revision != convert.revision:
        raise ToolError(
            f"{at.model_record('convert', model)} is of revision {convert.revision[:12]}, the "
            f"source of {fetched.revision[:12]}.",
            hint="fleet repro: it converts the present source.",
        )
    # The one read that binds all that follows to the digest in the record.
    measuring.prove(at.f16(model), convert.gguf)
    with _scratch(at, model) as subject_scratch, _packages():
        subject = Subject(
            model=model,
            source=at.source(model),
            f16=at.f16(model),
            header=gguf_header.read(at.f16(model)),
            config=fetch.read_config(at.source(model)),
            fetch=fetched,
            convert=convert,
            tools=tools,
            log=at.log("verify", model),
            scratch=subject_scratch,
            at=at,
            slice_=wanted,
        )
        checks, logits, embeddings = ask(subject)
    return compose(subject, checks, logits, embeddings)


def ask(
    subject: Subject,
) -> tuple[tuple[Check, ...], LogitsAgreement | None, EmbeddingAgreement | None]:
    """
    Ask all layers in their order; return their checks, and the agreement in numbers.

    Raises:
        ToolError: A layer broke off; says which.
    """
    # Only now: they load numpy, some of them tokenizers and torch.
    from pipelines import (  # noqa: PLC0415
        verify_logits,
        verify_template,
        verify_tensors,
        verify_tokens,
    )

    checks: list[Check] = []
    for module, words in (
        (verify_tensors, "tensors and hyperparameters against upstream's files"),
        (verify_tokens, "token ids against upstream's tokenizer"),
        (verify_template, "chat template and generation defaults"),
    ):
        console.step(f"verify {subject.model}: {words}")
        with _whole(words):
            checks += module.checks(subject)
    console.step(f"verify {subject.model}: outputs against upstream's implementation")
    with _whole("outputs"):
        check, logits, embeddings = verify_logits.check(subject)
    return (*checks, check), logits, embeddings


def compose(
    subject: Subject,
    checks: tuple[Check, ...],
    logits: LogitsAgreement | None,
    embeddings: EmbeddingAgreement | None,
) -> VerifyRecord:
    """
    Put the answers together and tell people what failed and what could not be asked.

    Raises:
        ToolError: A layer is missing or answered twice: nothing may look more proven than it is.
    """
    if [check.layer for check in checks] != list(LAYERS):
        raise ToolError(
            f"verify asked {listed([check.layer for check in checks])}, not {listed([*LAYERS])}.",
            hint="A layer of verify is broken: report it with the log.",
            log=subject.log,
        )
    failed = [check for check in checks if check.outcome == "FAIL"]
    for check in checks:
        if check.outcome != "PASS":
            verb = "failed" if check.outcome == "FAIL" else "skipped"
            console.warn(f"{subject.model}: {check.layer} {verb}: {console.clean(check.sentence)}")
    passed = sum(check.outcome == "PASS" for check in checks)
    console.info(
        f"verify {subject.model}: {'FAIL' if failed else 'PASS'}, {passed} of "
        f"{counted(len(checks), 'layer')} passed."
    )
    if failed:
        console.info(
            "This GGUF is not the model that upstream published: nothing that is made of it gets "
            "PROMOTE. The first differences of each layer are in "
            f"{subject.at.model_record('verify', subject.model)}."
        )
    return VerifyRecord(
        model=subject.model,
        revision=subject.convert.revision,
        architecture=subject.architecture,
        f16_sha256=subject.convert.gguf.sha256,
        llama_cpp_commit=subject.tools.commit,
        recipe=subject.slice_.recipe,
        outcome="FAIL" if failed else "PASS",
        checks=checks,
        logits=logits,
        embeddings=embeddings,
    )


@contextlib.contextmanager
def _scratch(at: Layout, model: str) -> Iterator[Path]:
    """Lend an empty directory for the layers' own files."""
    directory = at.scratch(model) / "verify"
    atomic.remove(directory)
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        atomic.remove(directory)


@contextlib.contextmanager
def _packages() -> Iterator[None]:
    """
    Turn a missing Python package into the sentence that says how to install it.

    A module of ours that cannot be imported is a fault of ours, which no installation mends.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if not apart.is_package(error):
            raise
        raise MachineError(
            f"the proof of a conversion needs Python packages that are missing: {error}.",
            hint="Install the extra `convert`: make setup.",
        ) from error


@contextlib.contextmanager
def _whole(words: str) -> Iterator[None]:
    """
    Make an error of everything that a layer did not foresee.

    A layer reads files of strangers. What breaks it has not been proven, and is never a pass.
    """
    try:
        yield
    except FleetError:
        raise
    except MemoryError as error:
        raise MachineError(f"verify ran out of memory while it looked at {words}.") from error
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and apart.is_package(error):
            raise
        raise ToolError(
            f"verify broke off while it looked at {words}: {type(error).__name__}: "
            f"{console.clean(str(error))[:300]}.",
            hint="Nothing is proven of this conversion. If the source is fine, report it.",
        ) from error
