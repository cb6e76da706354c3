"""Fetch of a `path:` source: what is taken, what is refused, and that nothing half-way stays."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from checkpoints import PARAMETERS_COUNT, SHAPES, declare, safetensors, tiny

from pipelines import fetch, fetch_downloads, records
from pipelines.errors import DigestError, MachineError, UpstreamError
from pipelines.fetch import LocalDirectory
from pipelines.layout import Layout

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from pipelines.toolchain import Toolchain

KNOWN = frozenset({"LlamaForCausalLM"})
TAKEN = [
    "README.md",
    "config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
]


def bring(
    source: Path, into: Path, revision: str | None = None, *, ignore_code: bool = False
) -> fetch.Fetched:
    """Fetch a directory as the stage does, with a table of one architecture."""
    return fetch.fetch(
        LocalDirectory(source),
        into,
        label="fetch tiny",
        known_architectures=KNOWN,
        llama_cpp_commit="0c1e57098",
        revision=revision,
        ignore_code=ignore_code,
    )


def names(directory: Path) -> list[str]:
    """Everything in a directory, at any depth."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A good model, as an operator has it."""
    return tiny(tmp_path / "model")


def test_the_files_of_a_model_are_copied_with_both_digests(source: Path, tmp_path: Path) -> None:
    """Every file that a build reads is there, byte for byte, and named by sha256 and md5."""
    into = tmp_path / "work/m/source"

    fetched = bring(source, into, fetch.content_digest(source))

    assert names(into) == TAKEN
    for name in TAKEN:
        content = (source / name).read_bytes()
        assert (into / name).read_bytes() == content
        assert fetched.digests[name].sha256 == hashlib.sha256(content).hexdigest()
        assert fetched.digests[name].md5 == hashlib.md5(content).hexdigest()
    assert fetched.architecture == "LlamaForCausalLM"
    assert fetched.license == "apache-2.0"
    assert fetched.checkpoint.parameters_count == PARAMETERS_COUNT
    assert fetched.checkpoint.dtypes == {"BF16": len(SHAPES)}


def test_the_copy_shares_nothing_with_the_original(source: Path, tmp_path: Path) -> None:
    """No hard link: an edit of the original leaves the fleet's bytes alone."""
    into = tmp_path / "source"
    bring(source, into)

    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"EDIT")

    assert (into / "model.safetensors").stat().st_nlink == 1
    assert not (into / "model.safetensors").read_bytes().endswith(b"EDIT")


def test_code_pickles_and_notes_are_never_taken(source: Path, tmp_path: Path) -> None:
    """What could run later, and what no build reads, stays where it is."""
    for name in ("modeling_tiny.py", "pytorch_model.bin", "optimizer.pt", "train.log",
                 "consolidated.safetensors", "tokenizer.py"):  # fmt: skip
        (source / name).write_bytes(b"x")
    (source / "onnx").mkdir()
    (source / "onnx/model.safetensors").write_bytes(b"x")

    bring(source, tmp_path / "source")

    assert names(tmp_path / "source") == TAKEN


def _encoder(source: Path, pooling: str = "1_Pooling") -> None:
    """Say of a model how its vectors are pooled, as sentence-transformers does."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": pooling, "type": "sentence_transformers.models.Pooling"},
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense"):
        (source / name).mkdir()
        (source / name / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (source / "1_Pooling" / "code.py").write_text("raise SystemExit")


def test_an_encoder_is_taken_with_the_pooling_that_lies_in_a_directory_of_its_own(
    source: Path, tmp_path: Path
) -> None:
    """Without it there are vectors for tokens only; nothing else of a directory is taken."""
    plain = fetch.content_digest(source)
    _encoder(source)
    fetched = bring(source, tmp_path / "into", fetch.content_digest(source))

    assert fetch.content_digest(source) != plain
    assert {"modules.json", "1_Pooling/config.json"} < fetched.digests.keys()
    assert names(tmp_path / "into") == sorted(
        [*TAKEN, "modules.json", "1_Pooling", "1_Pooling/config.json"]
    )


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "2_Dense"])
def test_an_encoder_whose_pooling_lies_elsewhere_is_refused(
    path: str, source: Path, tmp_path: Path
) -> None:
    """The converter would open whatever a stranger's modules.json names."""
    _encoder(source, path)
    with pytest.raises(UpstreamError, match=r"modules\.json has vectors pooled as"):
        bring(source, tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_a_sharded_model_is_taken_by_its_index(tmp_path: Path) -> None:
    """Exactly the shards that the index names, whatever else looks like one."""
    source = tiny(tmp_path / "model", shards=2)
    (source / "model-extra.safetensors").write_bytes(b"not named by the index")

    fetched = bring(source, tmp_path / "source")

    assert [name for name in names(tmp_path / "source") if name.endswith(".safetensors")] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert fetched.checkpoint.parameters_count == PARAMETERS_COUNT


# --- the content digest -----------------------------------------------------------------------


def test_the_content_digest_is_what_sha256sum_says_of_the_files_taken(source: Path) -> None:
    """It can be recomputed with coreutils: sha256 over sorted lines of `<sha256>  <name>`."""
    lines = "".join(
        f"{hashlib.sha256((source / name).read_bytes()).hexdigest()}  {name}\n" for name in TAKEN
    )

    assert fetch.content_digest(source) == hashlib.sha256(lines.encode()).hexdigest()[:40]


def test_the_content_digest_follows_the_files_of_a_build_and_no_others(source: Path) -> None:
    """A note beside the model changes nothing; the card, a byte of weights, a name change it."""
    before = fetch.content_digest(source)
    (source / "train.log").write_text("loss 3.2")
    assert fetch.content_digest(source) == before

    seen = {before}
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    seen.add(fetch.content_digest(source))
    (source / "model.safetensors").write_bytes(
        safetensors({name: ("BF16", shape) for name, shape in SHAPES.items()}, seed=2)
    )
    seen.add(fetch.content_digest(source))
    (source / "merges.txt").write_text("a b\n")
    seen.add(fetch.content_digest(source))
    assert len(seen) == 4


def test_other_contents_than_declared_are_refused_with_the_digest_to_declare(
    source: Path, tmp_path: Path
) -> None:
    """The error names both revisions; nothing is left of the copy, and an older one stays."""
    into = tmp_path / "work/m/source"
    declared = fetch.content_digest(source)
    bring(source, into, declared)
    kept = (into / "README.md").read_text()
    (source / "README.md").write_text("another card")

    with pytest.raises(DigestError) as caught:
        bring(source, into, declared)

    found = fetch.content_digest(source)
    assert f"revision {declared} is declared, {found} found" in caught.value.message
    assert f"set `revision: {found}`" in caught.value.hint
    assert (into / "README.md").read_text() == kept
    assert names(into.parent) == ["source", *(f"source/{name}" for name in TAKEN)]


# --- sources that are refused -----------------------------------------------------------------


def _edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | values))

    return edit


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def write(source: Path) -> None:
        (source / name).write_bytes(content)

    return write


def _drop(*dropped: str) -> Callable[[Path], None]:
    def drop(source: Path) -> None:
        for name in dropped:
            (source / name).unlink()

    return drop


def _pickle_only(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def _odd_name(source: Path) -> None:
    (source / "model.safetensors").rename(source / "weights.safetensors")


def _link_out(source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "elsewhere.safetensors")
    (source / "model.safetensors").symlink_to(source.parent / "elsewhere.safetensors")


def _broken_link(source: Path) -> None:
    (source / "tokenizer.json").symlink_to("nowhere.json")


def _fifo(source: Path) -> None:
    os.mkfifo(source / "tokenizer.json")


def _case(source: Path) -> None:
    for name in ("LICENSE.md", "LICENSE.MD"):
        (source / name).write_text("x")


def _climbing_index(source: Path) -> None:
    index = {"weight_map": {"a": "../../elsewhere.safetensors"}}
    (source / fetch.INDEX).write_text(json.dumps(index))


def _incomplete_index(source: Path) -> None:
    index = {"weight_map": dict.fromkeys(SHAPES, "model-00001-of-00002.safetensors")}
    (source / fetch.INDEX).write_text(json.dumps(index))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "is no directory"),
    "no config.json": (_drop("config.json"), "config.json is missing"),
    "config.json is no JSON": (_write("config.json", b"<html>"), "config.json is not JSON"),
    "config.json is a list": (_write("config.json", b"[]"), "config.json is no JSON object"),
    "config.json is deep": (_write("config.json", b"[" * 100_000), "config.json is not JSON"),
    "an unknown architecture": (
        _edit_config(architectures=["GopherForCausalLM"]),
        "does not convert GopherForCausalLM",
    ),
    "quantized already": (
        _edit_config(quantization_config={"quant_method": "gptq"}),
        r"is quantized already \(gptq\)",
    ),
    "no tokenizer": (_drop("tokenizer.model"), "the tokenizer is missing"),
    "no weights": (_drop("model.safetensors"), "there are no weights"),
    "only pickles": (_pickle_only, r"only there as pickles \(pytorch_model.bin\)"),
    "weights of another name": (_odd_name, "weights.safetensors is none of them"),
    "truncated weights": (
        lambda source: os.truncate(source / "model.safetensors", 5000),
        r"model.safetensors is no complete .* truncated",
    ),
    "garbage weights": (_write("model.safetensors", b"PK\x03\x04" + bytes(999)), "zip archive"),
    "8-bit weights": (
        _write("model.safetensors", safetensors({"a": ("F8_E4M3", (8, 8))})),
        "F8_E4M3",
    ),
    "a link out": (_link_out, "is a link out of its directory"),
    "a broken link": (_broken_link, "is a broken link"),
    "a pipe": (_fifo, "is no regular file"),
    "names that differ in case": (_case, "one file where case does not count"),
    "an unsafe name": (_write("LICENSE.a b", b"x"), r"unsafe name 'LICENSE.a b'"),
    "a runner's command": (_write("NOTICE.##[set-output name=a]b", b"x"), "unsafe name"),
    "an index that climbs": (_climbing_index, "unsafe name '../../elsewhere.safetensors'"),
    "a missing shard": (_incomplete_index, r"1 shard\(s\) that are not there: model-00001"),
}


@pytest.mark.parametrize(("spoil", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_a_source_that_cannot_be_built_is_refused_and_nothing_is_left(
    spoil: Callable[[Path], object], why: str, source: Path, tmp_path: Path
) -> None:
    """The message says what is wrong; there is neither a final directory nor a partial one."""
    spoil(source)

    with pytest.raises(UpstreamError) as caught:
        bring(source, tmp_path / "work/source")

    assert re.search(why, caught.value.message)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "work/source").exists()
    assert names(tmp_path / "work") == []


def _modules(source: Path) -> None:
    _encoder(source)
    modules = json.loads((source / "modules.json").read_text())
    modules[0]["type"] = "custom_st.Transformer"
    (source / "modules.json").write_text(json.dumps(modules))


CODE: dict[str, tuple[Callable[[Path], object], str]] = {
    "config.json": (
        _edit_config(auto_map={"AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}),
        r"config\.json .*: modeling_tiny\.TinyForCausalLM \(modeling_tiny\.py\)",
    ),
    "of another repository": (
        _edit_config(auto_map={"AutoConfig": "mallory/code--configuration_x.Config"}),
        r"mallory/code--configuration_x\.Config \(configuration_x\.py\)",
    ),
    "tokenizer_config.json": (
        _write("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["tok.Slow", null]}}'),
        r"tokenizer_config\.json .*: tok\.Slow \(tok\.py\)",
    ),
    "a list where no one expects it": (_edit_config(auto_map=["evil.Model"]), r"evil\.Model"),
    "modules.json": (_modules, r"modules\.json .*: custom_st\.Transformer \(custom_st\.py\)"),
}


@pytest.mark.parametrize(("edit", "why"), CODE.values(), ids=CODE.keys())
def test_a_model_that_names_code_is_refused_unless_it_is_wanted_without(
    edit: Callable[[Path], object], why: str, source: Path, tmp_path: Path
) -> None:
    """The message names file and code, and what to write; the code is not taken either way."""
    (source / "modeling_tiny.py").write_text("raise SystemExit")
    bring(source, tmp_path / "alone")  # code that nothing names is just not fetched
    edit(source)

    with pytest.raises(UpstreamError, match=why) as caught:
        bring(source, tmp_path / "source")
    assert "`ignore_code: true`" in caught.value.hint
    assert not (tmp_path / "source").exists()

    bring(source, tmp_path / "source", ignore_code=True)
    assert not list(tmp_path.glob("source/**/*.py"))


def test_a_model_that_nobody_converts_costs_no_weight_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small files come first: the weights of an unsupported architecture are never opened."""
    _edit_config(architectures=["GopherForCausalLM"])(source)
    brought: list[str] = []
    real = LocalDirectory.bring

    def spy(self: LocalDirectory, file: Any, *rest: Any) -> Any:
        brought.append(file.name)
        return real(self, file, *rest)

    monkeypatch.setattr(LocalDirectory, "bring", spy)
    with pytest.raises(UpstreamError, match="GopherForCausalLM"):
        bring(source, tmp_path / "source")

    assert "config.json" in brought
    assert "model.safetensors" not in brought


def test_a_link_inside_the_directory_is_followed(source: Path, tmp_path: Path) -> None:
    """What a link inside points to is copied as a file."""
    (source / "blob").write_bytes((source / "model.safetensors").read_bytes())
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to("blob")

    bring(source, tmp_path / "source")

    assert not (tmp_path / "source/model.safetensors").is_symlink()


def test_an_interrupted_fetch_leaves_nothing_and_the_next_one_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two files: no directory, no leftovers; then the same fetch succeeds."""
    into = tmp_path / "work/source"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bring(source, into)
    assert names(tmp_path / "work") == []

    bring(source, into)
    assert names(into) == TAKEN


def test_what_a_kill_left_behind_is_removed_by_the_next_fetch(source: Path, tmp_path: Path) -> None:
    """A partial directory of a killed run neither survives nor leaks into the result."""
    into = tmp_path / "source"
    (tmp_path / ".source.part").mkdir()
    (tmp_path / ".source.part/vocab.json").write_text("torn")

    bring(source, into)

    assert names(into) == TAKEN
    assert not (tmp_path / ".source.part").exists()


def test_too_small_a_disk_is_found_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needed, free and place are in the message, and not even a directory was made."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))

    with pytest.raises(MachineError, match=r"the disk is too small: fetch tiny needs .* are free"):
        bring(source, tmp_path / "work/source")

    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.ENOSPC, "the disk filled up while .*model.safetensors was written"),
        (errno.EIO, "model.safetensors: Input/output error"),
    ],
)
def test_a_disk_that_fails_half_way_is_said_in_words(
    number: int, why: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 7 and the file, no traceback; nothing half-written is kept."""
    real = fetch.copy_file

    def fail(file: Any, target: Path, progress: Any) -> Any:
        if target.name == "model.safetensors":
            target.write_bytes(b"half")
            raise OSError(number, os.strerror(number))
        return real(file, target, progress)

    monkeypatch.setattr(fetch, "copy_file", fail)
    with pytest.raises(MachineError, match=why):
        bring(source, tmp_path / "work/source")

    assert names(tmp_path / "work") == []


# --- licence ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "config", "text", "expected"),
    [
        ("---\nlicense: mit\n---\n", {}, "", "mit"),
        ("---\nlanguage: en\nlicense: 'cc-by-4.0'\n---\n", {}, "", "cc-by-4.0"),
        ("---\nlicense: other\nlicense_name: qwen\n---\n", {}, "", "qwen"),
        ("---\ntags: [a]\n---\nlicense: mit\n", {}, "", None),
        ("# no front matter\nlicense: mit\n", {}, "", None),
        ("", {"license": "llama3"}, "", "llama3"),
        ("", {"license": "a\n##[error]"}, "", None),
        ("", {}, "   Apache License\n   Version 2.0, January 2004", "apache-2.0"),
        ("", {}, "All rights reserved.", None),
    ],
)
def test_the_licence_is_the_one_that_the_model_declares(
    card: str, config: dict[str, Any], text: str, expected: str | None, tmp_path: Path
) -> None:
    """The card's front matter, then config.json, then the licence text; never a guess."""
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "LICENSE").write_text(text)

    assert fetch.license_of(tmp_path, config) == expected


# --- the stage --------------------------------------------------------------------------------


@pytest.mark.toolchain
def test_the_stage_writes_the_same_record_twice(
    source: Path,
    tmp_path: Path,
    fleet: Callable[..., subprocess.CompletedProcess[str]],
    tools: Toolchain,
) -> None:
    """`fleet fetch` twice: equal bytes of record and files, and no path of this machine in it."""
    declare(tmp_path, source, tools)
    at = Layout(tmp_path)

    first = fleet("fetch", "tiny")
    assert first.returncode == 0, first.stderr
    before = at.model_record("fetch", "tiny").read_bytes()
    at.model_record("fetch", "tiny").unlink()
    assert fleet("fetch", "tiny").returncode == 0

    assert at.model_record("fetch", "tiny").read_bytes() == before
    assert str(tmp_path).encode() not in before
    record = records.read(at.model_record("fetch", "tiny"), records.FetchRecord)
    assert [file.name for file in record.files] == TAKEN
    assert record.size_bytes == sum(file.size_bytes for file in record.files)


def test_an_object_of_the_cache_that_has_rotted_does_not_replace_what_was_verified(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DVC would link it in its place; one that is right, or the file itself, stays."""
    at = Layout(tmp_path)
    md5s = {path: hashlib.md5(path.read_bytes()).hexdigest() for path in source.iterdir()}
    rotted, right, linked = sorted(md5s)[:3]
    for path in (rotted, right, linked):
        fetch_downloads.cached(at, md5s[path]).parent.mkdir(parents=True)
    fetch_downloads.cached(at, md5s[rotted]).write_bytes(b"rot")
    fetch_downloads.cached(at, md5s[right]).write_bytes(right.read_bytes())
    fetch_downloads.cached(at, md5s[linked]).hardlink_to(linked)

    fetch_downloads.drop_rotted(at, md5s)

    assert [fetch_downloads.cached(at, md5s[path]).exists() for path in sorted(md5s)[:3]] == [
        False, True, True,
    ]  # fmt: skip
    assert capsys.readouterr().err.count("had rotted on the disk") == 1


def test_fleet_digest_prints_the_revision(
    source: Path, fleet: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """What it prints is what params.yaml wants as `revision`."""
    done = fleet("digest", str(source))

    assert done.stdout == fetch.content_digest(source) + "\n"
    assert done.returncode == 0


def test_fleet_digest_of_something_else_says_what_is_missing(
    tmp_path: Path, fleet: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Exit 3 and one sentence, no traceback."""
    done = fleet("digest", str(tmp_path))

    assert done.returncode == UpstreamError.exit_code
    assert "there are no weights" in done.stderr
    assert "Traceback" not in done.stderr
