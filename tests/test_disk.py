"""Room on the disk: the sum is made from the declaration, before the first byte."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, get_args

import pytest
from checkpoints import CONFIG, PARAMETERS_COUNT, tiny
from record_factory import benchmark_record, quantize_record, validity

from pipelines import declaration, disk, fetch, params, records
from pipelines.errors import MachineError
from pipelines.layout import Layout

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.params import Declaration
    from pipelines.toolchain import Toolchain

LLAMA_3_8B = 8_030_261_248
# 100 windows of 512 tokens, by default, over the vocabulary of the tiny model: 20 bytes, 4 for each
# token, and for each of 100 * 255 scored ones 2 for each entry and 8 more.
LOGITS_BYTES = 20 + 4 * 51_200 + 25_500 * (2 * CONFIG["vocab_size"] + 8)
PARAMS = """\
toolchain: {{llama_cpp_python: 0.3.36, sha256: "{digest}"}}
corpora: {{evaluation: {{path: corpora/evaluation.txt, sha256: "{digest}"}}}}
models:
  tiny: {{source: "{source}", revision: "{revision}", context_tokens: 256}}
quants:
  tiny-Q8_0: {{model: tiny, type: Q8_0}}
  tiny-Q4_K_M: {{model: tiny, type: Q4_K_M}}
hosts: {{here: {{memory_mib: 8192}}}}
"""


def declare(root: Path, source: str = "path:model", revision: str = "0" * 40) -> Declaration:
    """One model with two quants."""
    path = root / "params.yaml"
    path.write_text(PARAMS.format(digest="0" * 63 + "a", source=source, revision=revision))
    return declaration.load(path)


def free(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    """Pretend that this much is free, everywhere."""
    usage = shutil._ntuple_diskusage(1 << 50, 0, free_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def needed(root: Path) -> int:
    """What the whole declaration needs, from its parts."""
    source = sum(path.stat().st_size for path in (root / "model").iterdir())
    parts = (
        source,
        disk.f16_bytes(PARAMETERS_COUNT),
        disk.quant_bytes("Q8_0", PARAMETERS_COUNT),
        disk.quant_bytes("Q4_K_M", PARAMETERS_COUNT),
    )
    return int(sum(parts) * 1.05) + int(LOGITS_BYTES * 1.05)


def test_the_plan_is_the_sum_of_source_f16_and_every_quant(tmp_path: Path) -> None:
    """A declared model that is not there yet counts with all its parts and a reserve."""
    tiny(tmp_path / "model")

    plan = disk.check_disk(declare(tmp_path), Layout(tmp_path))

    assert plan.total_bytes == needed(tmp_path)
    assert plan.logits_bytes == LOGITS_BYTES


def test_logits_that_are_there_or_not_needed_take_no_room(tmp_path: Path) -> None:
    """The f16's logits count until every quant is measured or they lie in scratch already."""
    tiny(tmp_path / "model")
    declared, at = declare(tmp_path), Layout(tmp_path)
    at.scratch("tiny").mkdir(parents=True)
    logits = at.scratch("tiny") / "logits-0123456789abcdef.kld"
    with logits.open("wb") as file:
        file.truncate(LOGITS_BYTES)
    there = disk.check_disk(declared, at)
    logits.unlink()
    for type_ in ("Q8_0", "Q4_K_M"):
        records.write(at.quant_record("quantize", "tiny", type_), quantize_record(type_))
        records.write(at.quant_record("benchmark", "tiny", type_), benchmark_record(type_))
    measured = disk.check_disk(declared, at)
    again = benchmark_record("Q8_0", validity=validity("The box was busy."))
    records.write(at.quant_record("benchmark", "tiny", "Q8_0"), again)

    assert there.logits_bytes == measured.logits_bytes == 0
    assert disk.check_disk(declared, at).logits_bytes == LOGITS_BYTES


def test_a_model_whose_vocabulary_is_unknown_leaves_the_logits_to_the_benchmark(
    tmp_path: Path,
) -> None:
    """No estimate is made of what the config does not say."""
    source = tiny(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    del config["vocab_size"]
    (source / "config.json").write_text(json.dumps(config))
    unknown = disk.check_disk(declare(tmp_path), Layout(tmp_path))
    (source / "config.json").write_text(json.dumps(config | {"text_config": {"vocab_size": 4000}}))
    inner = disk.check_disk(declare(tmp_path), Layout(tmp_path))

    assert unknown.logits_bytes == 0
    assert inner.logits_bytes == 20 + 4 * 51_200 + 25_500 * (2 * 4000 + 8)


def test_one_byte_too_few_is_refused_with_needed_free_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The boundary is exact, the message has the parts, and nothing was written."""
    tiny(tmp_path / "model")
    declared = declare(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    free(monkeypatch, needed(tmp_path))
    disk.check_disk(declared, Layout(tmp_path))
    free(monkeypatch, needed(tmp_path) - 1)
    with pytest.raises(MachineError) as caught:
        disk.check_disk(declared, Layout(tmp_path))

    message = caught.value.message
    assert "the disk is too small: the fleet (" in message
    parts = ("sources", "16-bit GGUFs", "quants", "logits of the 16-bit models", "are free in")
    assert all(part in message for part in parts)
    assert str(tmp_path) in message
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_there_already_needs_no_room(tmp_path: Path) -> None:
    """After fetch only f16 and quants are left to write; with all of them there, nothing."""
    source = tiny(tmp_path / "model")
    revision = fetch.content_digest(source)
    declared, at = declare(tmp_path, revision=revision), Layout(tmp_path)
    shutil.copytree(source, at.source("tiny"))
    shutil.rmtree(source)
    file = records.FileDigest(name="f16.gguf", size_bytes=1, sha256="", md5="")
    records.write(
        at.model_record("fetch", "tiny"),
        records.FetchRecord(
            model="tiny", source="path:model", revision=revision, architecture="LlamaForCausalLM",
            license=None, parameters_count=PARAMETERS_COUNT, dtypes={}, size_bytes=5, files=(),
        ),
    )  # fmt: skip

    plan = disk.check_disk(declared, at)
    assert plan.logits_bytes == LOGITS_BYTES
    assert plan.source_bytes == 0
    assert plan.f16_bytes == disk.f16_bytes(PARAMETERS_COUNT)

    at.f16("tiny").write_bytes(b"x")
    records.write(
        at.model_record("convert", "tiny"),
        records.ConvertRecord(
            model="tiny", revision=revision, architecture="llama", llama_cpp_commit="0" * 40,
            recipe=1, tensors_count=1, tensor_types={}, context_train_tokens=256, gguf=file,
        ),
    )  # fmt: skip
    for key, type_ in (("tiny-Q8_0", "Q8_0"), ("tiny-Q4_K_M", "Q4_K_M")):
        at.gguf("tiny", key).parent.mkdir(parents=True, exist_ok=True)
        at.gguf("tiny", key).write_bytes(b"x")
        records.write(
            at.quant_record("quantize", "tiny", type_),
            records.QuantizeRecord(
                key=key, model="tiny", type=type_, f16_sha256="", llama_cpp_commit="0" * 40,
                recipe=1, imatrix_sha256=None, imatrix_corpus_sha256=None, bits_per_weight=8.5,
                tensors_count=1, tensor_types={}, tensor_bytes={}, rules=(), fallbacks=(),
                gguf=file,
            ),
        )  # fmt: skip
        records.write(
            at.quant_record("benchmark", "tiny", type_), benchmark_record(type_, gguf_sha256="")
        )
    assert disk.check_disk(declared, at).total_bytes == 0


def test_another_revision_or_recipe_counts_again(tmp_path: Path) -> None:
    """Old artifacts stay in DVC's cache, so what is made anew needs room of its own."""
    source = tiny(tmp_path / "model")
    at = Layout(tmp_path)
    shutil.copytree(source, at.source("tiny"))
    records.write(
        at.model_record("fetch", "tiny"),
        records.FetchRecord(
            model="tiny", source="path:model", revision="1" * 40, architecture="LlamaForCausalLM",
            license=None, parameters_count=PARAMETERS_COUNT, dtypes={}, size_bytes=5, files=(),
        ),
    )  # fmt: skip

    plan = disk.check_disk(declare(tmp_path), at)

    assert plan.total_bytes == needed(tmp_path)


def test_a_source_that_cannot_be_asked_is_left_to_fetch(tmp_path: Path) -> None:
    """Offline, or gone: the check says nothing about that model, fetch will."""
    assert disk.check_disk(declare(tmp_path), Layout(tmp_path)).total_bytes == 0
    assert disk.check_disk(declare(tmp_path, "hf:acme/tiny"), Layout(tmp_path)).total_bytes == 0


def test_a_cache_on_another_file_system_needs_the_same_room(tmp_path: Path) -> None:
    """Where DVC cannot link, it copies: both file systems are asked."""
    tiny(tmp_path / "model")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[cache]\n    dir = /proc/self\n")

    # /proc has no room at all, whatever the real disk has.
    with pytest.raises(MachineError, match=r"in DVC's cache needs .* are free in /proc"):
        disk.check_disk(declare(tmp_path), Layout(tmp_path))


@pytest.mark.toolchain
def test_the_bound_of_a_quant_lies_above_what_llama_quantize_states(tools: Toolchain) -> None:
    """For each type: more than its size of Llama-3-8B, or its bits a weight, but never twice."""
    text = subprocess.run(
        [tools.tool("llama-quantize"), "--help"], capture_output=True, text=True, check=False
    )
    sizes = re.findall(r"or\s+(\w+)\s*:\s+([\d.]+)G, .* @ Llama-3-8B", text.stdout + text.stderr)
    widths = re.findall(r"or\s+(\w+)\s*:\s+([\d.]+)\s+bpw", text.stdout + text.stderr)
    stated = {name: float(size) * 2**30 for name, size in sizes}
    stated |= {name: float(bits) / 8 * LLAMA_3_8B for name, bits in widths}
    declarable = stated.keys() & set(get_args(params.QuantType))

    assert len(declarable) > 25
    for name in declarable:
        assert stated[name] < disk.quant_bytes(name, LLAMA_3_8B) < 2 * stated[name], name


def test_every_type_that_can_be_declared_has_a_bound() -> None:
    """A new type in the schema cannot be forgotten here."""
    for name in get_args(params.QuantType):
        assert disk.quant_bytes(name, LLAMA_3_8B) > 0


def test_a_small_model_gets_the_room_of_its_fallbacks() -> None:
    """Qwen2.5-0.5B as Q2_K takes 339 MB, not the 3 bits a weight of a large model."""
    assert disk.quant_bytes("Q2_K", 494_000_000) > 339_000_000


def test_a_directory_that_does_not_exist_yet_is_asked_of_its_nearest_parent(
    tmp_path: Path,
) -> None:
    """The disk of a path is known before the path is."""
    disk.require(tmp_path / "a/b/c", 1, "a test")
    with pytest.raises(MachineError, match="a test needs"):
        disk.require(tmp_path / "a/b/c", 1 << 60, "a test")
