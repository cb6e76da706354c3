"""Convert: the 16-bit GGUF by the real converter, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from checkpoints import PARAMETERS_COUNT, TOKENIZER, declare, tiny

from pipelines import convert, gguf_header, proc, records, toolchain
from pipelines.errors import FleetError, MachineError, ToolError, UpstreamError
from pipelines.layout import Layout
from pipelines.params import ConvertSlice

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from pipelines.toolchain import Toolchain


def converted(root: Path) -> records.ConvertRecord:
    """The record of the last conversion in a checkout."""
    return records.read(Layout(root).model_record("convert", "tiny"), records.ConvertRecord)


@pytest.mark.toolchain
def test_a_model_becomes_a_16_bit_gguf_with_the_same_bytes_each_time(
    tmp_path: Path, fleet: Callable[..., subprocess.CompletedProcess[str]], tools: Toolchain
) -> None:
    """
    Fetch and convert twice in two checkouts: equal GGUFs, equal records.

    The weights are all there, in 16 bits but for the norms, under the name of the fleet; no path
    of this machine and no temporary name is in the file or in the record.
    """
    roots = [tmp_path / "one", tmp_path / "another-place"]
    for root in roots:
        declare(root, tiny(root / "model", shards=2), tools)
        for stage in ("fetch", "convert"):
            done = fleet(stage, "tiny", cwd=root)
            assert done.returncode == 0, done.stderr

    one, another = (Layout(root) for root in roots)
    assert one.f16("tiny").read_bytes() == another.f16("tiny").read_bytes()
    assert converted(roots[0]) == converted(roots[1])
    record, header = converted(roots[0]), gguf_header.read(one.f16("tiny"))
    assert header.text("general.name") == header.text("general.basename") == "tiny"
    assert header.text("general.license") == "apache-2.0"
    assert sum(tensor.n_elements for tensor in header.tensors) == PARAMETERS_COUNT
    assert record.tensor_types == {"F16": 9, "F32": 3}
    assert (record.architecture, record.context_train_tokens) == ("llama", 256)
    assert record.llama_cpp_commit == tools.commit
    assert record.gguf.size_bytes == one.f16("tiny").stat().st_size
    content = one.f16("tiny").read_bytes() + one.model_record("convert", "tiny").read_bytes()
    for trace in (str(tmp_path), str(tools.prefix), ".part", "scratch"):
        assert trace.encode() not in content
    assert sorted(path.name for path in (roots[0] / "work/tiny").iterdir()) == [
        "f16.gguf",
        "source",
    ]


@pytest.mark.toolchain
def test_the_embedded_model_goes_through(
    tmp_path: Path, fleet: Callable[..., subprocess.CompletedProcess[str]], tools: Toolchain
) -> None:
    """The trained model of the template: its own name, licence and chat template arrive."""
    source = tmp_path / "examples/tiny-llama"
    shutil.copytree(TOKENIZER, source)
    declare(tmp_path, source, tools)
    for stage in ("fetch", "convert"):
        done = fleet(stage, "tiny")
        assert done.returncode == 0, done.stderr

    header = gguf_header.read(Layout(tmp_path).f16("tiny"))
    assert header.text("general.license") == "apache-2.0"
    assert "add_generation_prompt" in header.text("tokenizer.chat_template")
    assert header.integer("llama.context_length") == 512


def _fetched(root: Path, files_from: Path, source: str = "path:model") -> Layout:
    """Put a model where fetch puts it, with its record, without fetch's own checks."""
    at = Layout(root)
    shutil.copytree(files_from, at.source("tiny"))
    files = tuple(
        records.FileDigest(name=path.name, size_bytes=path.stat().st_size, sha256="", md5="")
        for path in sorted(at.source("tiny").iterdir())
    )
    record = records.FetchRecord(
        model="tiny", source=source, revision="0" * 40, architecture="LlamaForCausalLM",
        license=None, parameters_count=PARAMETERS_COUNT, dtypes={"BF16": 12}, size_bytes=0,
        files=files,
    )  # fmt: skip
    records.write(at.model_record("fetch", "tiny"), record)
    return at


@pytest.mark.toolchain
def test_an_unknown_pre_tokenizer_is_an_upstream_error_with_its_hash(
    tmp_path: Path, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A BPE tokenizer that llama.cpp does not know is said in one sentence, and no file is left."""
    # Llama wants SentencePiece first; Qwen2 is BPE only.
    source = tiny(tmp_path / "model", architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (source / name).unlink()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}  # fmt: skip
    (source / "tokenizer.json").write_text(
        json.dumps({
            "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None,
            "pre_tokenizer": byte_level, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": {chr(0x100 + i): i for i in range(300)},
                      "merges": []},
        })
    )  # fmt: skip
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    at = _fetched(tmp_path, source)
    monkeypatch.setattr(toolchain, "load", lambda _: tools)

    with pytest.raises(UpstreamError, match="does not know this model's pre-tokenizer") as caught:
        convert.run(ConvertSlice(model="tiny", recipe=1), at)

    assert "chkhsh " in caught.value.message
    assert caught.value.log is not None
    assert "NotImplementedError" in caught.value.log.read_text()
    assert [path.name for path in at.f16("tiny").parent.iterdir()] == ["source"]


# --- a converter that we write: faults that the real one cannot show -------------------------


def fake(tmp_path: Path, body: str) -> Toolchain:
    """A toolchain whose converter is `body`; `out` is the file it should write."""
    share = tmp_path / "prefix/share/llama.cpp"
    (share / "conversion").mkdir(parents=True)
    (share / "conversion/__init__.py").write_text("TEXT_MODEL_MAP = {'LlamaForCausalLM': 'llama'}")
    (share / "convert_hf_to_gguf.py").write_text(
        "import os, sys\nout = sys.argv[sys.argv.index('--outfile') + 1]\n" + body
    )
    return toolchain.Toolchain(
        prefix=tmp_path / "prefix", manifest={"llama_cpp_commit": "0" * 40, "tools": {}}
    )


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Layout:
    """Convert a good model with a converter of ours."""
    at = _fetched(tmp_path, tiny(tmp_path / "model"))
    tools = fake(tmp_path, body)
    monkeypatch.setattr(toolchain, "load", lambda _: tools)
    convert.run(ConvertSlice(model="tiny", recipe=1), at)
    return at


FAULTS: dict[str, tuple[str, type[FleetError], str]] = {
    "dies": ("os.kill(os.getpid(), 9)", ToolError, "was killed by the kernel"),
    "writes nothing": ("", ToolError, "reported success and wrote nothing"),
    "writes garbage": ("open(out, 'wb').write(b'garbage')", ToolError, "f16.gguf.part"),
    "writes half a header": ("open(out, 'wb').write(b'GGUF\\3\\0\\0\\0')", ToolError, "f16"),
    "lacks a package": ("import torch_that_is_not_there", MachineError, "make setup"),
    "is out of memory": ("raise MemoryError", MachineError, "out of memory"),
    "fills the disk": (
        "raise OSError(28, 'No space left on device')",
        MachineError,
        "the disk filled up",
    ),
    "misses a tensor": (
        "raise ValueError('Can not map tensor foo')",
        UpstreamError,
        "ValueError: Can not map tensor foo",
    ),
    "talks to the runner": (
        "raise ValueError('##[set-output name=verdict]PROMOTE ::error::x')",
        UpstreamError,
        "cannot read this model",
    ),
    "wants the network": (
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        UpstreamError,
        "PermissionError: the converter may not use socket",
    ),
    "starts a program": (
        "import subprocess; subprocess.run(['touch', out])",
        UpstreamError,
        "the converter may not use subprocess.Popen",
    ),
}


@pytest.mark.parametrize(("body", "kind", "why"), FAULTS.values(), ids=FAULTS.keys())
def test_a_failing_converter_is_explained_and_leaves_nothing(
    body: str,
    kind: type[FleetError],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The class of error says whose fault it is; there is no GGUF and no part of one."""
    with pytest.raises(FleetError) as caught:
        run(tmp_path, monkeypatch, body)

    assert isinstance(caught.value, kind)
    assert why in caught.value.message + caught.value.hint
    assert "##[" not in caught.value.message
    assert "::error" not in caught.value.message
    assert [path.name for path in (tmp_path / "work/tiny").iterdir()] == ["source"]
    assert not (tmp_path / "work/scratch/tiny/convert").exists()


def test_the_converter_sees_no_token_no_proxy_and_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of our environment it has PATH; the Hub is declared offline to every library."""
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "PYTHONPATH"):
        monkeypatch.setenv(name, "canary")
    body = "import json; json.dump(dict(os.environ), open(os.environ['HOME'] + '/../env', 'w'))"

    with pytest.raises(ToolError, match="wrote nothing"):
        run(tmp_path, monkeypatch, body)

    seen = json.loads((tmp_path / "work/scratch/tiny/env").read_text())
    assert "canary" not in seen.values()
    assert seen["HF_HUB_OFFLINE"] == seen["TRANSFORMERS_OFFLINE"] == "1"
    assert seen["CUDA_VISIBLE_DEVICES"] == ""


def test_a_quantized_gguf_is_no_16_bit_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the converter wrote is read back: tensors of other types are refused."""
    code = """
import gguf, numpy
writer = gguf.GGUFWriter(out, "llama")
writer.add_tensor("a.weight", numpy.zeros((2, 34), dtype=numpy.uint8),
                  raw_dtype=gguf.GGMLQuantizationType.Q8_0)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
    with pytest.raises(ToolError, match="wrote tensors of Q8_0 into a 16-bit GGUF"):
        run(tmp_path, monkeypatch, code)


def test_bytes_behind_the_last_tensor_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is exactly what its header describes."""
    code = """
import gguf, numpy
writer = gguf.GGUFWriter(out, "llama")
writer.add_tensor("a.weight", numpy.zeros((2, 64), dtype=numpy.float16))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
with open(out, "ab") as file:
    file.write(bytes(32))
"""
    with pytest.raises(ToolError, match="its own header describes"):
        run(tmp_path, monkeypatch, code)

    assert [path.name for path in (tmp_path / "work/tiny").iterdir()] == ["source"]


def test_a_source_that_is_not_the_fetched_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was added, removed or cut after the fetch stops the conversion."""
    at = _fetched(tmp_path, tiny(tmp_path / "model"))
    (at.source("tiny") / "tokenizer.py").write_text("raise SystemExit")
    (at.source("tiny") / "README.md").write_text("short")
    monkeypatch.setattr(toolchain, "load", lambda _: fake(tmp_path, ""))

    with pytest.raises(UpstreamError, match=r"not what was fetched; .* README.md, tokenizer.py"):
        convert.run(ConvertSlice(model="tiny", recipe=1), at)


def test_a_model_of_the_hub_keeps_its_name_and_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hf:owner/Repo` converts under the name Repo, with the repository in the metadata."""
    at = _fetched(tmp_path, tiny(tmp_path / "model"), source="hf:acme/Tiny-Llama-3M-Instruct")
    seen: list[list[str]] = []

    def spy(words: list[str | Path], **_: object) -> proc.Completed:
        seen.append([str(word) for word in words])
        seen.append([Path(words[words.index("--metadata") + 1]).read_text()])
        raise KeyboardInterrupt

    monkeypatch.setattr(toolchain, "load", lambda _: fake(tmp_path, ""))
    monkeypatch.setattr(proc, "run", spy)
    with pytest.raises(KeyboardInterrupt):
        convert.run(ConvertSlice(model="tiny", recipe=1), at)

    command, (metadata,) = seen
    assert command[0] == sys.executable
    assert command[command.index("--model-name") + 1] == "Tiny-Llama-3M-Instruct"
    assert command[command.index("--outtype") + 1] == "f16"
    assert json.loads(metadata) == {
        "general.source.repo_url": "https://huggingface.co/acme/Tiny-Llama-3M-Instruct"
    }
    assert [path.name for path in (tmp_path / "work/tiny").iterdir()] == ["source"]
