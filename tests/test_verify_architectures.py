"""Tiny real models of real architectures, each with a real tokenizer, through all of `verify`."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import architecture_factory
import pytest
from architecture_factory import FAMILIES, NAMES, before
from gguf_faults import FAULTS

from pipelines import gguf_header, proc, verify, verify_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipelines.toolchain import Toolchain

pytestmark = pytest.mark.toolchain

# Llama, Mixtral, GPT-2 and BERT are the controls of test_planted_faults.py, with all layers as
# here; `python -m bench.architectures` does all of `NAMES`, whose large vocabularies take minutes.
HERE = ("qwen3", "phi3")
# Faults of which the embedded Llama has no place, by a family that has one.
PLANTED = {
    "phi3": ("norm epsilon", "rope theta"),
}
TOKENS = 96


@pytest.mark.parametrize("name", HERE)
def test_a_right_conversion_passes_every_layer(
    name: str, tmp_path: Path, family: Callable[[str], tuple[Path, Path]], tools: Toolchain
) -> None:
    """Nothing of it fails, and nothing is skipped but what the family does not have."""
    source, f16 = family(name)
    subject = before(tmp_path, source, f16, tools, logits_tokens=TOKENS)

    checks, logits, embeddings = verify.ask(subject)

    outcomes = {check.layer: check.outcome for check in checks}
    sentences = "\n".join(f"{c.layer}: {c.outcome}: {c.sentence} {c.findings}" for c in checks)
    assert "FAIL" not in outcomes.values(), sentences
    skipped = {layer for layer, outcome in outcomes.items() if outcome == "SKIP"}
    assert skipped <= {"template", "generation"}, sentences
    assert (logits is None) == FAMILIES[name].encoder
    assert (embeddings is None) != FAMILIES[name].encoder


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_faults_that_only_some_families_can_have_are_found_by_the_outputs(
    name: str, tmp_path: Path, family: Callable[[str], tuple[Path, Path]], tools: Toolchain
) -> None:
    """Experts in another order, a lost bias, another pooling: one reference, each fault on it."""
    source, f16 = family(name)
    subject = before(tmp_path, source, f16, tools, logits_tokens=TOKENS)
    job = verify_logits.write_job(subject, tmp_path / "job", streamed=False)
    upstream = verify_logits.ask_upstream(subject, job)
    found = {"good": _outcome(subject, job, upstream, f16)}
    for fault in PLANTED[name]:
        FAULTS[fault](f16, tmp_path / "bad.gguf")
        found[fault] = _outcome(subject, job, upstream, tmp_path / "bad.gguf")
    assert found == {"good": "PASS"} | dict.fromkeys(PLANTED[name], "FAIL")


def _outcome(subject: Any, job: Path, upstream: dict[str, Any], gguf: Path) -> str:
    job.write_text(json.dumps(json.loads(job.read_text()) | {"gguf": str(gguf)}))
    compared = verify_logits.ask_llama(subject, job)
    return verify_logits.judge(compared, upstream, corpus_sha256="0" * 64)[0].outcome


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "bert"])
@pytest.mark.parametrize("type_", ["Q8_0", "Q4_0"])
def test_the_models_are_quantized_by_the_real_tool(
    name: str,
    type_: str,
    tmp_path: Path,
    family: Callable[[str], tuple[Path, Path]],
    tools: Toolchain,
) -> None:
    """Rows of 64 numbers divide into blocks of 32, so that every matrix is quantized."""
    _, f16 = family(name)
    into = tmp_path / "quant.gguf"
    proc.run([tools.tool("llama-quantize"), f16, into, type_], log=tmp_path / "log")

    types = Counter(
        tensor.type for tensor in gguf_header.read(into).tensors if len(tensor.shape) > 1
    )
    assert types[type_] >= sum(types.values()) / 2, types
    assert types["F16"] == 0


def test_every_family_is_rebuilt_with_the_pre_tokenizer_that_the_converter_knows(
    family: Callable[[str], tuple[Path, Path]],
) -> None:
    """The converter names a pre-tokenizer by what it does to a sample, and stops at a new one."""
    expected = {"llama": "llama-bpe", "qwen3": "qwen2", "gpt2": "gpt-2"}
    for name, pre in expected.items():
        header = gguf_header.read(family(name)[1])
        assert header.text("tokenizer.ggml.pre") == pre
    assert set(HERE) <= set(NAMES)


def test_equal_seeds_give_equal_models(tmp_path: Path, tools: Toolchain) -> None:
    """A fixture that changes by itself would move every figure that is measured on it."""
    fixtures = architecture_factory.fixtures(tmp_path / "fixtures", tools)
    built = [architecture_factory.build("gpt2", tmp_path / str(i), fixtures) for i in range(2)]
    files = [
        {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        for directory in built
    ]
    assert files[0] == files[1]
