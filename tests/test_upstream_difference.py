"""What lies between two revisions: the right class, the fewest bytes, words to rely on."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from checkpoints import CONFIG, SHAPES, pack, safetensors, tiny
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import (
    convert,
    fetch,
    gguf_header,
    records,
    upstream_difference,
    upstream_difference_config,
    upstream_difference_tensors,
)
from pipelines.errors import DigestError, RetryLaterError, UpstreamError
from pipelines.hub import RemoteFile
from pipelines.upstream_difference import REACHES, STAGES, Side, difference
from pipelines.upstream_records import CLASSES, Difference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from pipelines.toolchain import Toolchain

KNOWN = frozenset({"LlamaForCausalLM", "Qwen2ForCausalLM"})
Files = dict[str, bytes]


def listed(name: str, content: bytes) -> RemoteFile:
    """A file as the Hub lists it: large and binary ones in LFS, the others in git."""
    if name.endswith((".safetensors", "tokenizer.json", ".model")):
        digest = hashlib.sha256(content).hexdigest()
        return RemoteFile(name=name, size_bytes=len(content), sha256=digest)
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return RemoteFile(name=name, size_bytes=len(content), git_sha1=blob)


class Revision:
    """A revision in memory that remembers what was read of it."""

    def __init__(self, mark: str, files: Mapping[str, bytes]) -> None:
        """Hold `files`; the commit is made of one letter."""
        self.contents = dict(files)
        self.read: list[str] = []
        self.ranges: list[tuple[str, int, int]] = []
        self.side = Side(
            revision=mark * 40,
            files=tuple(listed(name, content) for name, content in files.items()),
            read=self._read,
            read_range=self._read_range,
        )

    def _read(self, file: RemoteFile) -> bytes:
        self.read.append(file.name)
        return self.contents[file.name]

    def _read_range(self, file: RemoteFile, start: int, end: int) -> bytes:
        self.ranges.append((file.name, start, end))
        return self.contents[file.name][start:end]


def between(old: Files, new: Files, **options: Any) -> Difference:
    """The difference of two revisions with these files."""
    options = {"known_architectures": KNOWN} | options
    return difference(Revision("a", old).side, Revision("b", new).side, **options)


def as_json(told: object) -> bytes:
    """One file of JSON."""
    return json.dumps(told).encode()


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
TOKENIZER = {
    "added_tokens": [{"id": 4, "content": "<|end|>", "special": True}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3}, "merges": ["a b"]},
}
TOKENIZER_CONFIG = {"chat_template": TEMPLATE, "eos_token": "<|end|>", "add_bos_token": False}
GENERATION = {"temperature": 0.6, "eos_token_id": 2, "transformers_version": "4.40.0"}
CARD = "---\nlicense: apache-2.0\ntags: [chat]\n---\n# Tiny\nWhat it is.\n"


def whole(**weights: Any) -> Files:
    """A model of one file, with everything that a repository of a chat model has."""
    tensors = {name: ("BF16", shape) for name, shape in SHAPES.items()} | weights.pop("more", {})
    return {
        "config.json": as_json(CONFIG),
        "generation_config.json": as_json(GENERATION),
        "tokenizer.json": as_json(TOKENIZER),
        "tokenizer_config.json": as_json(TOKENIZER_CONFIG),
        "README.md": CARD.encode(),
        "LICENSE": b"Apache License\nVersion 2.0\n" + b"words\n" * 50,
        "model.safetensors": safetensors(tensors, **weights),
        "notes.txt": b"nobody reads this",
    }


BASE = whole()


def changed_json(name: str, **keys: Any) -> Files:
    """The model with other values in one file of JSON; None takes a key away."""
    told = json.loads(BASE[name]) | keys
    return {name: as_json({key: each for key, each in told.items() if each is not None})}


def other_tokenizer() -> dict[str, Any]:
    """A tokenizer in which two ids changed places, with another token, merge and splitter."""
    told = copy.deepcopy(TOKENIZER)
    told["model"]["vocab"] |= {"a": 1, "b": 0, "d": 6}  # type: ignore[index]
    told["model"]["merges"] = [["a", "b"], ["b", "c"]]  # type: ignore[index]
    told["added_tokens"].append({"id": 5, "content": "<think>", "special": False})  # type: ignore[attr-defined]
    told["pre_tokenizer"] = {"type": "Whitespace"}
    return told


CASES: dict[str, tuple[Files, tuple[str, ...], tuple[str, ...]]] = {
    "nothing of a build": ({"notes.txt": b"other", "train.ipynb": b"{}"}, (), ()),
    "the template in tokenizer_config.json": (
        changed_json(
            "tokenizer_config.json",
            chat_template=TEMPLATE + "{% if tools %}<think>{% endif %}{{ 'You are a poet now.' }}",
        ),
        ("template",),
        ("it now uses tools", 'it now writes "<think>"', 'the text "You are a poet now."'),
    ),
    "an address in the template": (
        changed_json("tokenizer_config.json", chat_template=TEMPLATE + "https://evil.example/x"),
        ("template",),
        ('ATTENTION: it now names the address "https://evil.example/x"',),
    ),
    "roles and thoughts": (
        changed_json(
            "tokenizer_config.json",
            chat_template="{% if m['role'] == 'dev' %}{{ enable_thinking }}</think>{% endif %}",
        ),
        ("template",),
        (
            "it now uses enable_thinking",
            "it now knows the role dev",
            'it now writes "</think',
        ),
    ),
    "a template beside the other one": (
        {"chat_template.jinja": b"{{ 'https://evil.example' }}"},
        ("template",),
        (
            "chat_template.jinja: the chat template is new (28 characters, folded below); ATTENT",
            "If tokenizer_config.json, which did not change, holds a template, llama.cpp's conv",
        ),
    ),
    "a template too long to compare": (
        changed_json("tokenizer_config.json", chat_template="https://evil.example/" + " " * 2**20),
        ("template",),
        ("ATTENTION", "not compared by line", "only its first 1,048,576 characters were looked at"),
    ),
    "the template and another key": (
        changed_json("tokenizer_config.json", chat_template=TEMPLATE + " ", eos_token="</s>"),
        ("tokenizer", "template"),
        ('eos_token "<|end|>" -> "</s>" (where answers end)', "the chat template changed"),
    ),
    "a template that moved": (
        changed_json("tokenizer_config.json", chat_template=None)
        | {"chat_template.jinja": TEMPLATE.encode()},
        ("template",),
        ("The chat template moved from tokenizer_config.json to chat_template.jinja; not a char",),
    ),
    "a tokenizer": (
        {"tokenizer.json": as_json(other_tokenizer())},
        ("tokenizer",),
        (
            '5 -> 7 tokens; 2 token ids mean another token (0: "a" -> "b", 1: "b" -> "a")',
            '1 added token new: "<think>"',
            "1 -> 2 merges",
            "pre_tokenizer changed (llama.cpp stops at one that it does not know)",
        ),
    ),
    "a tokenizer that is only written anew": (
        {"tokenizer.json": json.dumps(TOKENIZER, indent=2).encode()},
        ("tokenizer",),
        ("tokenizer.json is only written anew: it says the same.",),
    ),
    "a configuration": (
        changed_json("config.json", max_position_embeddings=8192, eos_token_id=[2, 7]),
        ("config",),
        (
            "config.json: max_position_embeddings 256 -> 8192 (the context it was trained for); ",
            "; eos_token_id 2 -> [2, 7] (where answers end).",
        ),
    ),
    "an architecture that nobody converts": (
        changed_json("config.json", architectures=["LlamaNextForCausalLM"]),
        ("config",),
        ('Would be refused: the pinned llama.cpp does not convert "LlamaNextForCausalLM" (like',),
    ),
    "weights that are quantized already": (
        changed_json("config.json", quantization_config={"quant_method": "fp8"}),
        ("config",),
        ('Would be refused: config.json says that the weights are quantized already ("fp8").',),
    ),
    "code of the repository": (
        changed_json("config.json", auto_map={"AutoModel": "modeling_x.X"})
        | {"modeling_x.py": b"import os", "pytorch_model.bin": b"x"},
        ("config",),
        (
            "Would be refused: config.json names code of the repository: modeling_x.X; `ignore_co",
            "modeling_x.py; code of a repository is never fetched.",
            "pytorch_model.bin; pickles are never fetched.",
        ),
    ),
    "sampling": (
        changed_json("generation_config.json", temperature=0.7, transformers_version="5.0.0"),
        ("generation",),
        ('temperature 0.6 -> 0.7; of no effect on the GGUF: transformers_version "4.40.0" -> "5',),
    ),
    "the licence of the card": (
        {"README.md": CARD.replace("apache-2.0", "other\nlicense_name: no-money").encode()},
        ("licence",),
        (
            'README.md: license "apache-2.0" -> "other"; license_name is new: "no-money".',
            "A release waits until somebody has read the licence",
        ),
    ),
    "the text of the licence": (
        {"LICENSE": BASE["LICENSE"] + b"No commercial use.\n"},
        ("licence",),
        ("LICENSE: 1 line new, 0 gone (folded below).",),
    ),
    "another licence": (
        {"LICENSE": b"TINY COMMUNITY LICENSE\n"},
        ("licence",),
        ('begins with "TINY COMMUNITY LICENSE", began with "Apache License"',),
    ),
    "the text of the card": (
        {"README.md": CARD.encode() + b"More.\n"},
        ("card",),
        ("README.md: only the text below the front matter changed.",),
    ),
    "tags of the card": (
        {"README.md": CARD.replace("[chat]", "[code]").encode()},
        ("card",),
        ("README.md: the front matter says something else of tags.",),
    ),
    "everything at once": (
        whole(seed=2)
        | changed_json("config.json", rope_theta=5e5)
        | changed_json("generation_config.json", top_k=20)
        | changed_json("tokenizer_config.json", chat_template="x", add_bos_token=True)
        | {"README.md": b"# no front matter", "NOTICE": b"new"},
        ("weights", "tokenizer", "template", "config", "generation", "licence"),
        ("12 tensors of the same name, type and shape, whose values may differ",),
    ),
}


@pytest.mark.parametrize(("files", "classes", "told"), CASES.values(), ids=CASES.keys())
def test_each_change_has_its_class_and_its_words_and_reads_nothing_but_what_changed(
    files: Files, classes: tuple[str, ...], told: tuple[str, ...]
) -> None:
    """By name and content; files that are the same are not read, of weights nothing but headers."""
    old, new = Revision("a", BASE), Revision("b", BASE | files)

    found = difference(old.side, new.side, known_architectures=KNOWN)

    assert found.classes == classes
    notes = "\n".join(found.notes)
    for words in told:
        assert words in notes
    assert found.refusals == tuple(n for n in found.notes if n.startswith("Would be refused"))
    differing = {name for name, content in files.items() if BASE.get(name) != content}
    assert set(old.read) <= differing & BASE.keys()
    assert set(new.read) <= differing
    assert len(old.read) == len(set(old.read))
    if "weights" not in classes:
        assert old.ranges == new.ranges == []
    assert {one.name for one in found.files} == {
        name for name in differing if name not in {"notes.txt", "train.ipynb", "modeling_x.py"}
        and not name.endswith(".bin")
    }  # fmt: skip
    assert found.download_bytes == sum(
        one.new.size_bytes for one in found.files if one.new is not None
    )
    assert (found.stages == ()) == (classes == ())


def test_every_file_of_a_build_has_a_class_and_every_class_a_reason() -> None:
    """A pattern that fetch takes one day has to be sorted here, too."""
    patterns = (*fetch.SMALL_FILES, fetch.POOLING)

    assert set(patterns) - {fetch.INDEX} == upstream_difference._CLASSES.keys()
    assert tuple(REACHES) == CLASSES
    assert set(upstream_difference._CLASSES.values()) | {"weights"} == set(CLASSES)


# --- weights ----------------------------------------------------------------------------------


def folder(path: Path) -> Files:
    """The files of a directory."""
    return {each.name: each.read_bytes() for each in path.iterdir()}


def test_headers_alone_say_which_tensors_came_went_and_changed(tmp_path: Path) -> None:
    """One shard of three is another: eight tensors are known to be the same, four may differ."""
    old = folder(tiny(tmp_path / "old", shards=3))
    new = old | {
        name: content
        for name, content in folder(tiny(tmp_path / "new", shards=3, seed=2)).items()
        if "00002-of" in name
    }
    first, second = Revision("a", old), Revision("b", new)

    found = difference(first.side, second.side)

    assert found.tensors is not None
    assert (found.tensors.same_count, found.tensors.touched_count) == (8, 4)
    assert found.tensors.compared_count == 4
    name = "model-00002-of-00003.safetensors"
    assert first.ranges == second.ranges == [(name, 0, 65536)]
    assert found.tensors.header_bytes == 2 * 65536
    assert found.download_bytes == len(new[name])
    assert [one.name for one in found.files] == [name]
    assert found.stages == STAGES["gguf"]


def test_other_shards_of_the_same_tensors_are_told_from_other_tensors(tmp_path: Path) -> None:
    """One file became three: every tensor is there again; that its values are, nobody knows."""
    old, new = folder(tiny(tmp_path / "old")), folder(tiny(tmp_path / "new", shards=3))

    found = between(old, new)

    assert found.tensors is not None
    assert (found.tensors.added_count, found.tensors.removed_count) == (0, 0)
    assert found.tensors.touched_count == len(SHAPES)
    (note,) = found.notes
    assert note.startswith("Weights: 1 file became 3: 12 tensors of the same name, type and shape,")
    assert note.endswith("whose values may differ.")


def test_tensors_of_another_type_or_shape_are_summed_up_and_named() -> None:
    """No wall of 300 names: counts by type, the first shapes, and a refusal of what is packed."""
    tensors = {name: ("F16", shape) for name, shape in SHAPES.items() if "norm" not in name}
    tensors |= {"lm_head.weight": ("F16", (1030, 64)), "extra.qweight": ("F8_E4M3", (8, 8))}

    found = between(BASE, BASE | {"model.safetensors": safetensors(tensors)})

    assert found.tensors is not None
    assert found.tensors.added == ("extra.qweight",)
    assert found.tensors.removed_count == 3
    assert "lm_head.weight: BF16 -> F16, 1024x64 -> 1030x64" in found.tensors.retyped
    (refusal,) = found.refusals
    assert "the weights are stored in F8_E4M3 (extra.qweight), not in F32, F16" in refusal
    assert "9 tensors BF16 -> F16; another shape: lm_head.weight" in found.notes[1]


def test_shards_under_other_names_are_the_same_weights_and_cost_nothing() -> None:
    """The digest is what a file is."""
    renamed = {name.replace("model.safe", "model-1.safe"): each for name, each in BASE.items()}

    found = between(BASE, renamed)

    assert found.classes == ("weights",)
    assert found.download_bytes == 0
    assert found.tensors is None
    assert found.notes == ("Weights: the same to the byte; their names changed.",)


def test_weights_that_are_not_there_or_none_would_be_refused(tmp_path: Path) -> None:
    """An index of missing shards, a renamed pickle, an LFS pointer, nothing but pickles."""
    sharded = folder(tiny(tmp_path, shards=3))
    name = "model-00003-of-00003.safetensors"

    def refused(old: Files, new: Files) -> str:
        return " ".join(between(old, new).refusals)

    lost = {each: content for each, content in sharded.items() if each != name}
    assert f"names 1 file that is not there: {name}" in refused(sharded, lost)
    for content, what in (
        (b"PK\x03\x04" + bytes(99), "it is a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        (BASE["model.safetensors"][:-1], "it is truncated"),
    ):
        assert what in refused(BASE, BASE | {"model.safetensors": content})
    bare = {each: content for each, content in BASE.items() if "safetensors" not in each}
    assert "there are no weights in safetensors" in refused(BASE, bare | {"model.bin": b"x"})
    mute = {each: content for each, content in BASE.items() if each != "tokenizer.json"}
    assert "the tokenizer is missing" in refused(BASE, mute)


def test_a_header_that_cannot_be_had_is_a_note_and_what_is_out_of_reach_an_error() -> None:
    """A mirror without ranges hides what changed; a Hub that is too busy ends the look."""
    old, new = Revision("a", BASE), Revision("b", whole(seed=2))

    def look(answer: Callable[[RemoteFile, int, int], bytes]) -> Difference:
        return difference(old.side, replace(new.side, read_range=answer))

    def raising(error: Exception) -> Callable[[RemoteFile, int, int], bytes]:
        def read(_file: RemoteFile, _start: int, _end: int) -> bytes:
            raise error

        return read

    for answer in (raising(UpstreamError("no ranges here.")), lambda *_: b"short"):
        found = look(answer)
        assert found.tensors is None
        assert found.refusals == ()
        assert "what changed in them is not known before they are fetched" in found.notes[0]
        assert found.stages == STAGES["gguf"]
    for error in (RetryLaterError("busy."), DigestError("other bytes.")):
        with pytest.raises(type(error)):
            look(raising(error))


def test_headers_are_bounded_in_number_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of 16 MiB, or thousands of shards, are not fetched to be looked at."""
    huge = pack(b" " * (1 << 20) + b"{}")
    monkeypatch.setattr(upstream_difference_tensors, "MAX_HEADER_BYTES", 1 << 20)
    new = Revision("b", BASE | {"model.safetensors": huge})

    found = difference(Revision("a", BASE).side, new.side)

    assert found.tensors is None
    assert "more than are fetched to look at it" in found.notes[0]
    assert new.ranges == [("model.safetensors", 0, 65536)]

    monkeypatch.setattr(upstream_difference_tensors, "MAX_FILES", 1)
    assert "2 changed files are more than are looked at" in between(BASE, whole(seed=2)).notes[0]


# --- strangers --------------------------------------------------------------------------------

HOSTILE = {
    "deep": b'{"a":' * 500 + b"1" + b"}" * 500,
    "deeper than a stack": b"[" * 300_000,
    "no number": b'{"a": NaN}',
    "an endless number": b'{"a": 1e999}',
    "a number of digits": b'{"a": ' + b"9" * 9_000 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
    "half a character": b'{"\\ud800": "\\udfff", "chat_template": "\\ud800", "license": "\\udc00"}',
    "a mark of byte order": b'\xef\xbb\xbf{"a": 1}',
    "two bytes for each character": '{"a": 1}'.encode("utf-16"),
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "a list": b"[1, [2]]",
    "a number": b"7",
    "nothing": b"",
    "wrong types": as_json({
        "architectures": 5, "text_config": [1], "quantization_config": [1], "license": {"a": 1},
        "chat_template": [{"name": 1, "template": None}], "model": {"vocab": {"a": "b"}},
        "added_tokens": [5], "eos_token_id": {"x": []}, "auto_map": 3, "temperature": "hot",
        "weight_map": {"a": 3},
    }),
    "a command of the runner": as_json({
        "a\n::error::x": "\n::set-output name=x::y\x1b[2J", "chat_template": "\n::stop-commands::x",
        "model": {"vocab": {"\n##[add-path]x": 0}}, "architectures": ["::warning::x"],
    }),
    "direction turned": as_json({"a": "\u202eevil\u200b", "chat_template": "\u202e\u2066x"}),
    "many keys": as_json({f"k{i}": i for i in range(30_000)}),
    "a wall of text": as_json({"chat_template": "x" * 2_000_000, "a": "y" * 500_000}),
}  # fmt: skip
ALL_JSON = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json",
    "chat_template.jinja", "tekken.json", "merges.txt", "modules.json", "README.md", "LICENSE",
    "model.safetensors.index.json",
)  # fmt: skip


def every_text(found: Difference) -> list[str]:
    """Everything that will be shown to somebody."""
    changes = found.tensors
    tensors = (*changes.added, *changes.removed, *changes.retyped) if changes else ()
    names = [one.name for one in found.files]
    return [*found.notes, *names, *tensors, *found.details, *found.details.values()]


def assert_sound(found: Difference) -> None:
    """Valid, bounded, printable on one line where it is one, and no command for anybody."""
    assert Difference.model_validate_json(found.model_dump_json()) == found
    for text in every_text(found):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
        assert "::" not in text
        assert "##[" not in text
    assert not any("\n" in note for note in found.notes)
    assert all(note.endswith((".", "…")) for note in found.notes)


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_files_of_a_stranger_are_a_note_never_a_traceback(raw: bytes) -> None:
    """Each in every place, new and old: what is said stays short, printable and no command."""
    for name in ALL_JSON:
        for old, new in ((BASE, BASE | {name: raw}), (BASE | {name: raw}, BASE)):
            found = between(old, new)
            assert found.classes
            assert_sound(found)
            assert found.notes


BROKEN = [
    *((name, raw) for raw in HOSTILE.values() for name in
      ("config.json", "generation_config.json", "model.safetensors.index.json")),
    *(("model.safetensors", raw) for raw in (b"", b"PK\x03\x04" + bytes(60), BASE["LICENSE"],
                                             safetensors({"a": ("F8_E4M3", (4, 4))}))),
    ("config.json", as_json(CONFIG | {"architectures": ["MambaNextForCausalLM"]})),
    ("config.json", as_json(CONFIG | {"quantization_config": {"bits": 4}})),
    ("generation_config.json", as_json({"auto_map": {"a": ["b.C", None]}})),
    ("special_tokens_map.json", b"{"),
]  # fmt: skip


def test_what_would_be_refused_is_what_fetch_refuses(tmp_path: Path) -> None:
    """Each file, broken in every way, is fetched for real: the forecast is right both ways."""
    for number, (name, raw) in enumerate(BROKEN):
        source = tmp_path / f"{number}"
        source.mkdir()
        for each, content in (BASE | {name: raw}).items():
            (source / each).write_bytes(content)

        refusal = ""
        try:
            fetch.fetch(
                fetch.LocalDirectory(source), tmp_path / "fetched", label="", revision=None,
                known_architectures=KNOWN, llama_cpp_commit="c" * 40,
            )  # fmt: skip
        except UpstreamError as error:
            refusal = error.message

        forecast = between(BASE, BASE | {name: raw}).refusals
        assert bool(forecast) == bool(refusal), (name, raw[:80], forecast, refusal)


def test_what_does_not_show_in_a_template_is_spelled_out_in_its_diff() -> None:
    """Whoever reviews the diff sees the character that turns the line around."""
    files = changed_json("tokenizer_config.json", chat_template=TEMPLATE + "\u202e\u200b!")

    found = between(BASE, BASE | files)

    (text,) = found.details.values()
    assert "+{% for m in messages %}" in text
    assert "\\u202e\\u200b!" in text


def test_of_two_templates_the_one_that_did_not_change_is_named() -> None:
    """The converter and transformers go by different files; a change of one divides them."""
    old = BASE | {"chat_template.jinja": b"x"}

    found = between(old, old | changed_json("tokenizer_config.json", chat_template="y"))

    assert found.notes[-1].startswith("chat_template.jinja is there, too, and did not change: tran")


def test_a_template_in_one_line_is_compared_tag_by_tag() -> None:
    """Most templates are one line of thousands of characters; a diff of that tells nobody."""
    template = "".join(f"{{% if x == {i} %}}text {i}{{% endif %}}" for i in range(200))
    files = BASE | changed_json("tokenizer_config.json", chat_template=template)
    other = changed_json("tokenizer_config.json", chat_template=template.replace("x == 77", "y"))

    found = between(files, files | other)

    (text,) = found.details.values()
    assert "-{% if x == 77 %}" in text.splitlines()
    assert "+{% if y %}" in text.splitlines()
    assert len(text.splitlines()) < 12


@pytest.mark.parametrize(
    "front",
    ["{license: mit}", "? license\n: mit", "license: *x", "'license' : mit", "license:\n- mit",
     "license: |\n  mit", "<<: *x\ntags: []", "tags: [chat]", "\tlicense: mit"],
)  # fmt: skip
def test_no_form_of_yaml_hides_a_licence_that_changed(front: str) -> None:
    """What cannot be told by its lines counts as another licence, so that a person looks."""
    found = between(BASE, BASE | {"README.md": f"---\n{front}\n---\n# Tiny\n".encode()})

    assert found.classes == ("licence",)
    assert found.stages == STAGES["gguf"]


@pytest.mark.parametrize("before", ["\ufeff", "\n \n", "\ufeff\r\n"])
def test_nothing_before_the_front_matter_hides_a_licence_that_changed(before: str) -> None:
    """The converter overlooks such a card; the Hub, and with it everybody who looks, does not."""
    old, new = (f"{before}---\nlicense: {name}\n---\n# Tiny\n".encode() for name in ("mit", "x"))

    found = between(BASE | {"README.md": old}, BASE | {"README.md": new})

    assert found.classes == ("licence",)
    assert any('"mit" -> "x"' in note for note in found.notes)

    plain = old.removeprefix(before.encode())
    overlooked = between(BASE | {"README.md": plain}, BASE | {"README.md": old})

    assert (overlooked.classes, overlooked.stages) == (("licence",), STAGES["gguf"])
    assert "the converter overlooks it now" in overlooked.notes[0]


def test_files_stored_otherwise_are_the_same_by_their_bytes() -> None:
    """A tokenizer that moved from git to LFS has no digest to compare; it is read on both sides."""
    old, new = Revision("a", BASE), Revision("b", BASE | {"notes.txt": b"x"})
    content = BASE["tokenizer.json"]
    in_git = RemoteFile(name="tokenizer.json", size_bytes=len(content), git_sha1="0" * 40)
    files = tuple(in_git if each.name == in_git.name else each for each in old.side.files)

    found = difference(replace(old.side, files=files), new.side)

    assert found.classes == ()
    assert found.notes == ("tokenizer.json is the same, stored otherwise.",)


def test_large_files_are_said_and_not_read() -> None:
    """A README of 9 MiB could hold any licence; a tokenizer beyond fetch's limit is refused."""
    old, new = Revision("a", BASE), Revision("b", BASE)
    sizes = {"README.md": 9 << 20, "tokenizer.json": 200 << 20}
    files = tuple(
        replace(each, size_bytes=sizes[each.name], git_sha1="1" * 40, sha256=None)
        if each.name in sizes
        else each
        for each in new.side.files
    )

    found = difference(old.side, replace(new.side, files=files))

    assert found.classes == ("tokenizer", "licence")
    assert old.read == new.read == []
    assert "tokenizer.json has 209,715,200 bytes, and no such file needs more" in found.refusals[0]


_NAMES = st.sampled_from([
    *BASE, *ALL_JSON, "model-00001-of-00002.safetensors", "consolidated.safetensors", "NOTICE.md",
    "a/b.json", fetch.POOLING, "evil.py", "x.bin", "LICENSE." + "x" * 400, "LICENSE.\n::x::\u202e",
])  # fmt: skip
_CONTENTS = st.one_of(
    st.sampled_from([*BASE.values(), *HOSTILE.values()]),
    st.binary(max_size=40),
    st.dictionaries(
        st.sampled_from(["weight_map", "chat_template", "license", "model", "architectures", "a"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
            max_leaves=6,
        ),
    ).map(as_json),
)
_LISTINGS = st.dictionaries(_NAMES, _CONTENTS, max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(old=_LISTINGS, new=_LISTINGS)
def test_any_two_listings_have_a_bounded_difference_and_none_with_themselves(
    old: Files, new: Files
) -> None:
    """Whatever lies in two revisions; and a revision differs in nothing from its own files."""
    found = between(old, new)

    assert_sound(found)
    assert {one.kind for one in found.files} <= set(found.classes)
    assert bool(found.stages) == bool(found.files)
    same = between(new, new)
    assert (same.classes, same.files, same.stages, same.download_bytes) == ((), (), (), 0)


# --- stages -----------------------------------------------------------------------------------


def names_revision(path: str) -> bool:
    """Whether a record has the revision in it, so that every bump makes it another file."""
    kinds: dict[str, Any] = {
        "fetch.json": records.FetchRecord,
        "convert.json": records.ConvertRecord,
    }
    kind = kinds.get(path.rpartition("/")[2])
    return kind is not None and "revision" in kind.model_fields


@pytest.mark.parametrize("reach", ["gguf", "source"])
def test_the_stages_are_those_that_the_graph_runs_again(reach: str) -> None:
    """
    By dvc.yaml: from fetch on, every stage of which an input is another file.

    A stage that runs makes other files of its outputs, but for f16.gguf where nothing that changed
    reaches it, and for what is made of f16.gguf alone.
    """
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    stages = {name: spec.get("do", spec) for name, spec in graph.items()}
    changed = {"work/${key}/source", "results/${key}/fetch.json"}
    found = ["fetch"]
    for name, spec in stages.items():
        inputs = [_plain(each) for each in spec.get("deps", ())]
        hit = [each for each in inputs if _touches(each, changed)]
        if name in found or not hit:
            continue
        found.append(name)
        outputs = [_plain(each) for kind in ("outs", "metrics") for each in spec.get(kind, ())]
        # Equal files in, equal files out, but for what names the revision and what is measured.
        same = reach == "source" and name in {"convert", "calibrate", "quantize"}
        changed |= {each for each in outputs if not same or names_revision(each)}

    assert tuple(found) == STAGES["gguf" if reach == "gguf" else "source"]


def _plain(entry: object) -> str:
    path = next(iter(entry)) if isinstance(entry, dict) else str(entry)
    return str(path).replace("${item.model}", "${key}")


def _touches(path: str, changed: set[str]) -> bool:
    """A folder is another one when a file in it is."""
    return any(each == path or each.startswith(f"{path}/") for each in changed)


def converted(source: Path, into: Path, tools: Toolchain) -> gguf_header.Header:
    """Run the real converter."""
    convert.convert(
        source,
        into,
        tools=tools,
        name="tiny",
        repository=None,
        scratch=into.with_suffix(".scratch"),
        log=into.with_suffix(".log"),
        label="convert",
    )
    return gguf_header.read(into)


def metadata(header: gguf_header.Header) -> dict[str, Any]:
    """All of a GGUF's metadata, its arrays with what is in them."""
    return {
        key: each.values() if isinstance(each, gguf_header.Array) else each
        for key, each in header.metadata.items()
    }


@pytest.mark.toolchain
def test_the_real_converter_writes_what_the_classes_say_and_nothing_of_the_rest(
    tmp_path: Path, tools: Toolchain
) -> None:
    """
    Licence text, notice, text of the card, and values of no effect: the same GGUF, to the byte.

    Template, sampling, the licence and the tags of the front matter: one key each, and no more.
    """
    source = tiny(tmp_path / "model")
    (source / "generation_config.json").write_bytes(as_json(GENERATION))
    before = folder(source)
    first = converted(source, tmp_path / "first.gguf", tools)

    (source / "LICENSE").write_text("MIT License\n")
    (source / "NOTICE").write_text("new\n")
    (source / "README.md").write_bytes(before["README.md"] + b"# Other words\n\nlicense: gpl-3.0\n")
    (source / "generation_config.json").write_bytes(
        as_json(GENERATION | {"transformers_version": "5.0.0", "do_sample": True})
    )
    converted(source, tmp_path / "second.gguf", tools)

    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()
    unseen = between(before, folder(source))
    assert unseen.classes == ("generation", "licence", "card")
    assert unseen.stages == STAGES["source"]

    (source / "README.md").write_text("---\nlicense: mit\ntags: [chat]\n---\n# Tiny\n")
    (source / "generation_config.json").write_bytes(as_json(GENERATION | {"temperature": 0.7}))
    told = json.loads(before["tokenizer_config.json"]) | {"chat_template": "{{ messages }}"}
    (source / "tokenizer_config.json").write_bytes(as_json(told))
    third = converted(source, tmp_path / "third.gguf", tools)

    was, now = metadata(first), metadata(third)
    assert {key for key in was.keys() | now.keys() if was.get(key) != now.get(key)} == {
        "general.license", "general.tags", "general.sampling.temp", "tokenizer.chat_template",
    }  # fmt: skip
    for name in ("README.md", "generation_config.json", "tokenizer_config.json"):
        one = between(before, before | {name: (source / name).read_bytes()})
        assert one.stages == STAGES["gguf"]


@pytest.mark.toolchain
def test_the_converter_reads_no_file_that_is_said_not_to_reach_the_gguf(tools: Toolchain) -> None:
    """
    By its own source: nothing opens a licence, and few places read the card and the defaults.

    A llama.cpp that reads more than these has to be looked at before it is pinned.
    """
    where = tools.converter.parent
    code = {
        path.relative_to(where).as_posix(): path.read_text(encoding="utf-8")
        for folder in ("conversion", "gguf-py/gguf")
        for path in (where / folder).glob("*.py")
    }

    def readers(word: str) -> set[str]:
        return {name for name, text in code.items() if f'"{word}' in text or f"'{word}" in text}

    assert readers("LICENSE") == readers("LICENCE") == readers("NOTICE") == set()
    assert readers("README.md") == {"conversion/qwen.py", "gguf-py/gguf/metadata.py"}
    assert readers("generation_config.json") == {
        "conversion/gemma.py", "conversion/hunyuan.py", "gguf-py/gguf/metadata.py",
    }  # fmt: skip
    read = set(re.findall(r'gen_config\.get\("(\w+)"', code["gguf-py/gguf/metadata.py"]))
    read |= set(re.findall(r'gen_cfg\.get\("(\w+)"', code["conversion/gemma.py"]))
    read |= set(re.findall(r'json\.load\(f\)\.get\("(eos\w+)"', code["conversion/hunyuan.py"]))
    assert read == set(upstream_difference_config.SAMPLING)
