"""Reading params.yaml: a declaration, or every problem at once, each on its line."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoints
import pytest
from dvc.utils.serialize import load_yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from record_factory import fetch_record, file_digest
from ruamel.yaml import YAML

from pipelines import declaration, dvc_state, fetch, marked_yaml, params, records
from pipelines.errors import ParamsError, Problem
from pipelines.layout import Layout

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Fleet = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parent.parent
VALID = (ROOT / "tests/data/params.yaml").read_text(encoding="utf-8")
LINES = VALID.splitlines()
CALIBRATION = b"Text to fit a matrix to.\n"
EVALUATION = b"Text to judge a quant by.\n"

INVISIBLE = ("\x00", "\x1b", "\n", "\r", "\x7f", "\u2028", "\u202e")
CHARACTERS = (" ", ".", "/", "../x", "; touch x", "$(touch x)", "ä", *INVISIBLE)


def write(folder: Path, text: str | bytes) -> Path:
    """Write a declaration into `folder` and return its path."""
    path = folder / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(folder: Path, text: str | bytes) -> list[str]:
    """Write a bad declaration, load it, and return its problems as `line:column: text`."""
    path = write(folder, text)
    with pytest.raises(ParamsError) as caught:
        declaration.load(path)
    assert caught.value.exit_code == 2
    assert caught.value.problems
    return [f"{each.line}:{each.column}: {each.text}" for each in caught.value.problems]


def edited(old: str, new: str) -> str:
    """Return the valid text with one place changed."""
    assert VALID.count(old) == 1, f"{old!r} is in the sample {VALID.count(old)} times"
    return VALID.replace(old, new)


def line_of(part: str) -> int:
    """Return the number of the first line of the valid text that holds `part`."""
    return next(i for i, line in enumerate(LINES, 1) if part in line)


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A checkout whose files are those that its declaration names."""
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora/calibration.txt").write_bytes(CALIBRATION)
    (tmp_path / "corpora/evaluation.txt").write_bytes(EVALUATION)
    (tmp_path / "modelfiles").mkdir()
    for name in ("small", "chat"):
        (tmp_path / f"modelfiles/{name}.Modelfile.j2").write_bytes(b"FROM {{ gguf }}\n")
    (tmp_path / "examples/tiny-llama").mkdir(parents=True)
    text = VALID.replace("a" * 64, hashlib.sha256(CALIBRATION).hexdigest())
    write(tmp_path, text.replace("b" * 64, hashlib.sha256(EVALUATION).hexdigest()))
    return Layout(tmp_path)


# --- what is read -----------------------------------------------------------------------------


def test_every_key_of_the_declaration_can_be_used(tmp_path: Path) -> None:
    """A file with all keys loads, and nothing in it falls back to a default."""
    declared = declaration.load(write(tmp_path, VALID))

    assert declared.models["tiny-llama"].gates.max_kld_mean_nats == 0.01
    assert declared.quants["tiny-llama-IQ2_XS"].tensor_types[0].match == r"blk\.(0|1)\.ffn_down"
    assert declared.benchmark.depths == (0, 4096)
    assert declared.load_test.concurrency == (1, 8)
    assert list(declared.hosts) == ["laptop", "rtx-4090"]
    assert declared.models["tiny-llama"].waivers[1].until == "2999-01-31"
    assert list(declared.registries) == ["local", "bucket", "lan", "hub", "shown"]


def test_a_service_level_is_that_of_the_model_then_of_the_host_then_of_the_fleet(
    tmp_path: Path,
) -> None:
    """The most specific level that states a value owns it."""
    declared = declaration.load(write(tmp_path, VALID))
    found = params.load_test_slice(declared, "tiny-llama").slos["laptop"]

    assert (found.tpot_ms, found.ttft_ms, found.e2e_ms) == (25, 300, 9000)
    assert found.min_goodput == 0.9


def test_a_share_of_good_requests_is_required_even_if_nobody_states_one(tmp_path: Path) -> None:
    """Without a declared share 95 % of requests have to be good."""
    text = edited("min_goodput: 0.9, ", "")
    declared = declaration.load(write(tmp_path, text))

    assert params.load_test_slice(declared, "qwen3-8b").slos["laptop"].min_goodput == 0.95


def test_a_model_is_served_as_it_declares_and_otherwise_as_the_fleet_does(tmp_path: Path) -> None:
    """Overrides of `serving` hold for their model alone."""
    declared = declaration.load(write(tmp_path, VALID))
    own = params.load_test_slice(declared, "tiny-llama").serving
    other = params.load_test_slice(declared, "qwen3-8b").serving

    assert (own.parallel, own.gpu_layers, own.kv_type, own.engine) == (2, "auto", "q8_0", "ollama")
    assert (other.parallel, other.gpu_layers, other.kv_type) == (4, 33, "q4_0")


def test_prompts_and_answers_of_the_load_test_must_fit_the_context(tmp_path: Path) -> None:
    """Otherwise the engine would cut them, and nobody would see it."""
    found = refused(tmp_path, edited("prompt_tokens: 256", "prompt_tokens: 400"))

    place = f"{line_of('context_tokens: 512')}:21: models.tiny-llama.context_tokens: 512"
    needs = "400 prompt_tokens, 96 generate_tokens and 64 for the chat template"
    assert found == [f"{place} is less than the load test needs: {needs}"]


def test_a_share_of_good_requests_that_so_few_cannot_show_is_told(tmp_path: Path) -> None:
    """Such a gate would be open for ever, however good the server."""
    text = edited("min_goodput: 0.9,", "min_goodput: 0.99,").replace("quests: 400", "quests: 380")

    (found,) = refused(tmp_path, text)

    assert found.endswith(
        "load_test.slo.min_goodput: needs `load_test.open_requests` of 381 or more, not 380"
    )
    declaration.load(write(tmp_path, text.replace("quests: 380", "quests: 381")))


@pytest.mark.parametrize("value", ["most", "-1", "1.5", "[]", ""])
def test_layers_are_a_number_or_a_word(tmp_path: Path, value: str) -> None:
    """One line says both, whatever was written."""
    (found,) = refused(tmp_path, edited("gpu_layers: 33", f"gpu_layers: {value}"))

    assert found.endswith("is not a whole number from 0 to 9,999 or one of auto, all")


def test_a_quantized_cache_needs_flash_attention(tmp_path: Path) -> None:
    """The engines refuse it, or fall back in silence."""
    text = edited("kv_type: q8_0, flash_attention: true", "kv_type: q8_0, flash_attention: false")

    (found,) = refused(tmp_path, text)

    assert found.endswith("serving: `kv_type: q8_0` needs `flash_attention: true`")


def test_a_missing_modelfile_is_told_before_anything_is_served(at: Layout) -> None:
    """Also one that leads out of the repository by a link."""
    (at.root / "modelfiles/small.Modelfile.j2").unlink()
    link = at.root / "modelfiles/chat.Modelfile.j2"
    link.unlink()
    link.symlink_to("/etc/hostname")

    with pytest.raises(ParamsError) as caught:
        declaration.check(at)

    small, chat = (problem.text for problem in caught.value.problems)
    assert small.endswith('Modelfile "modelfiles/small.Modelfile.j2" does not exist')
    assert chat.endswith('Modelfile "modelfiles/chat.Modelfile.j2" leads out of the repository')


def test_the_declaration_of_the_repository_is_valid() -> None:
    """params.yaml as it is shipped has no problem."""
    assert declaration.load(ROOT / "params.yaml").models


@pytest.mark.parametrize("text", [VALID, (ROOT / "params.yaml").read_text(encoding="utf-8")])
def test_we_read_what_dvc_reads(tmp_path: Path, text: str) -> None:
    """The plain data behind a declaration equals what DVC loads from the same file."""
    path = write(tmp_path, text)

    assert marked_yaml.read(path).data == load_yaml(str(path))


@pytest.mark.parametrize(
    "value",
    ["no", "yes", "on", "010", "0o17", "0x1F", "0b11", "1_000", "1e3", "1E-3", ".5", "1.", "+1",
     "-0", "~", "null", "NULL", "true", "TRUE", "tRUE", "1.10", "0.3.36", "1:30", "'6'", '"\\x41"',
     "''", "[]", "{}", "[1, [2, {a: 3}]]", "-.inf", "|\n  two\n  lines", ">-\n  one\n  line"],
)  # fmt: skip
def test_every_scalar_reads_as_in_dvc(tmp_path: Path, value: str) -> None:
    """Octals, hex, booleans, quotes, blocks: no value has two readings."""
    path = write(tmp_path, f"a: {value}\n")
    expected = YAML(typ="safe").load(path.read_text(encoding="utf-8"))

    assert marked_yaml.read(path).data == expected
    assert type(marked_yaml.read(path).data["a"]) is type(expected["a"])


# --- one mistake ------------------------------------------------------------------------------

MISTAKES = {
    "unknown quant type": (
        "type: Q4_K_M}",
        "type: Q4_K}",
        ('quants.qwen3-8b-Q4_K_M.type: "Q4_K" is unknown; did you mean "Q4_K_'),
    ),
    "misspelt key": (
        "    source: hf:",
        "    sorce: hf:",
        ('models.qwen3-8b.sorce: is no key here; did you mean "source"? Allowed: source, revision'),
    ),
    "misspelt section": (
        "calibrate:\n",
        "callibrate:\n",
        'callibrate: is no key here; did you mean "calibrate"?',
    ),
    "required key missing": (
        "    source: hf:Qwen/Qwen3-8B\n",
        "",
        "models.qwen3-8b.source: is missing.",
    ),
    "NaN gate": (
        "max_size_mib: 8192",
        "max_size_mib: .nan",
        "gates.max_size_mib: .nan is not a number",
    ),
    "infinite gate": (
        "max_size_mib: 8192",
        "max_size_mib: .inf",
        "gates.max_size_mib: .inf is not a number",
    ),
    "gate that overflows": (
        "max_size_mib: 8192",
        "max_size_mib: 1e999",
        "gates.max_size_mib: 1e999 is not a number",
    ),
    "NaN gate of a model": (
        "_nats: 0.01",
        "_nats: .NaN",
        "models.tiny-llama.gates.max_kld_mean_nats: .NaN is not",
    ),
    "negative gate": ("min_same_top: 0.9", "min_same_top: -0.1", "a number from 0 to 1"),
    "text for a number": ("recipe: 3", 'recipe: "3"', 'toolchain.recipe: "3" is not a whole'),
    "fraction for a count": ("recipe: 3", "recipe: 3.5", "3.5 is not a whole number from 1 to"),
    "number for a flag": ("imatrix: true", "imatrix: 1", "imatrix: 1 is not true or false"),
    "yes for a flag": ("imatrix: true", "imatrix: yes", 'imatrix: "yes" is not true or false'),
    "list for a mapping": (
        "laptop: {memory_mib: 8192, margin_mib: 512, slo: {ttft_ms: 300, tpot_ms: 20}}",
        "laptop: [1]",
        "hosts.laptop: a list is not a mapping with the keys vram_mib",
    ),
    "nothing for a mapping": (
        "rtx-4090: {vram_mib: 24576}",
        "rtx-4090:",
        "hosts.rtx-4090: nothing is not a mapping",
    ),
    "empty list": ("depths: [0, 4096]", "depths: []", "depths: an empty list is not a list of 1"),
    "revision of a branch": (
        "fedcba9876543210fedcba9876543210fedcba98",
        "main",
        'models.qwen3-8b.revision: "main" is not a full commit: 40 digits',
    ),
    "short revision": (
        "fedcba9876543210fedcba9876543210fedcba98",
        "fedcba9",
        "is not a full commit",
    ),
    "revision of digits alone": (
        "fedcba9876543210fedcba9876543210fedcba98",
        "1" * 40,
        "put it in quotes",
    ),
    "key with a dot": (
        "  qwen3-8b:",
        "  qwen2.5:",
        (
            'models."qwen2.5": is not a word of lower-case '
            'letters, digits, `-` and `_`, 63 at most; "qwen2-5" would be'
        ),
    ),
    "key in upper case": ("  qwen3-8b:", "  Qwen3:", '; "qwen3" would be'),
    "key that is a number": ("  qwen3-8b:", "  3:", "models.3: is not text to YAML"),
    "key that is a list": ("  qwen3-8b:", "  [a, b]:", "a key must be a word"),
    "key that names a folder of ours": (
        "  qwen3-8b:",
        "  scratch:",
        "models.scratch: is the name of a folder in work/",
    ),
    "key that names the folder of the servers": (
        "  qwen3-8b:",
        "  serving:",
        "models.serving: is the name of a folder in work/",
    ),
    "quant that is not called after its model and type": (
        "  qwen3-8b-Q4_K_M:",
        "  qwen-Q4_K_M:",
        'quants.qwen-Q4_K_M: must be called "qwen3-8b-Q4_K_M"',
    ),
    "quant of an undeclared model": (
        "model: qwen3-8b,",
        "model: qwen3-7b,",
        (
            'quants.qwen3-8b-Q4_K_M.model: model "qwen3-7b" is not declared; '
            'did you mean "qwen3-8b"? Declared: "tiny-llama", "qwen3-8b"'
        ),
    ),
    "model without a quant": (
        "  qwen3-8b-Q4_K_M: {model: qwen3-8b, type: Q4_K_M}\n",
        "",
        ('models.qwen3-8b: has no quant; declare one under `quants`, such as "qwen3-8b-Q4_K_M"'),
    ),
    "undeclared corpus": (
        "calibration: calibration",
        "calibration: calibraton",
        (
            'models.tiny-llama.calibration: corpus "calibraton" is not declared; did you mean '
            '"calibration"? Declared: "calibration", "evaluation"'
        ),
    ),
    "judged by the text that it was fitted to": (
        "evaluation: evaluation",
        "evaluation: calibration",
        "models.tiny-llama.calibration: is the same text as `evaluation`",
    ),
    "two names for one text": (
        "b" * 64,
        "a" * 64,
        "models.tiny-llama.calibration: is the same text as `evaluation`",
    ),
    "imatrix without a corpus": (
        "    calibration: calibration\n",
        "",
        'quants.tiny-llama-IQ2_XS.imatrix: model "tiny-llama" declares no `calibration` corpus',
    ),
    "type that needs an imatrix": (
        "imatrix: true",
        "imatrix: false",
        "quants.tiny-llama-IQ2_XS.imatrix: must be true: llama-quantize makes no IQ2_XS without",
    ),
    "upper case in a tensor rule": ("ffn_down'", "ffn_DOWN'", "tensor_types[0].match:"),
    "tensor rule that does not compile": ("ffn_down'", "(ffn_down'", "is no regular expression"),
    "tensor rule with an equals sign": ("ffn_down'", "ffn=down'", "without spaces and `=`"),
    "tensor rule on a type without quantization": (
        "tiny-llama-IQ2_XS:\n    model: tiny-llama\n    type: IQ2_XS",
        "tiny-llama-BF16:\n    model: tiny-llama\n    type: BF16",
        "tensor_types: has no effect on BF16",
    ),
    "output tensor declared twice": (
        "leave_output_tensor: false",
        "leave_output_tensor: true",
        "output_tensor_type: contradicts `leave_output_tensor: true`",
    ),
    "too few samples": (
        "dropped_repetitions: 2",
        "dropped_repetitions: 4",
        "benchmark.dropped_repetitions: of 6 repetitions 3 samples must remain: 3 at most",
    ),
    "a comparison without samples": (
        "benchmark:\n",
        "compare: {repetitions: 3, dropped_repetitions: 3}\nbenchmark:\n",
        "compare.dropped_repetitions: leaves none of 3 repetitions: 2 at most",
    ),
    "percentile of too little text": (
        "chunks: 400",
        "chunks: 399",
        "gates.max_kld_p999_nats: needs `benchmark.quality.chunks` of 400 or more, not 399",
    ),
    "percentile of short windows": (
        "context_tokens: 512\n    chunks: 400",
        "context_tokens: 8\n    chunks: 400",
        "gates.max_kld_p999_nats: needs `benchmark.quality.chunks` of 25,600 or more, not 400",
    ),
    "physical batch above the logical": (
        "ubatch_tokens: 512",
        "ubatch_tokens: 4096",
        "benchmark.ubatch_tokens: 4096 is more than",
    ),
    "quantized cache without flash attention": (
        "flash_attention: true\n  kv_type: f16",
        "flash_attention: false\n  kv_type: q8_0",
        'benchmark.kv_type: "q8_0" needs `flash_attention: true`',
    ),
    "depth that stands twice": ("[0, 4096]", "[0, 0]", "benchmark.depths: holds a depth twice"),
    "host without memory": (
        "memory_mib: 8192, ",
        "",
        "hosts.laptop: needs `vram_mib` (a GPU host) or `memory_mib`",
    ),
    "files of MLflow in an unknown registry": (
        "blobs: bucket",
        "blobs: buckets",
        'registries.shown.blobs: registry "buckets" is not declared; did you mean "bucket"?',
    ),
    "files of MLflow in MLflow": (
        "blobs: bucket",
        "blobs: shown",
        'registries.shown.blobs: "shown" is `mlflow:`, which keeps no files either',
    ),
    "MLflow without a registry for its files": (
        ", blobs: bucket",
        "",
        'registries.shown: needs `blobs`: the registry that holds the files. Declared: "local"',
    ),
    "a registry for the files of one that keeps its own": (
        "private: false",
        "blobs: bucket",
        "registries.hub.blobs: is for `mlflow:`; this registry keeps its own files",
    ),
    "endpoint of a kind that has none": (
        "insecure: true",
        "endpoint: 'http://localhost:5000'",
        "registries.lan.endpoint: is for `s3:` and `hf:`; remove it",
    ),
    "region of a kind that has none": (
        "private: false",
        "region: eu-1",
        "registries.hub.region: is for `s3:`; remove it",
    ),
    "plain HTTP to another machine": (
        "endpoint: 'http://127.0.0.1:9000'",
        "endpoint: 'http://minio.lan:9000'",
        'registries.bucket.endpoint: is plain HTTP to "minio.lan": anybody on the way',
    ),
    "plain HTTP to another MLflow": (
        "mlflow:https:",
        "mlflow:http:",
        'registries.shown.url: is plain HTTP to "mlflow.lan": anybody on the way',
    ),
    "plain HTTP to a name that only looks like this machine": (
        "endpoint: 'http://127.0.0.1:9000'",
        "endpoint: 'http://127.0.0.1.example.org'",
        'registries.bucket.endpoint: is plain HTTP to "127.0.0.1.example.org"',
    ),
    "local registry somewhere else": (
        "'file:registry'",
        "'s3://other/fleet'",
        "registries.local.url: must be `file:` and a directory",
    ),
    "one place under two names": (
        "hub: {url: 'hf:acme'",
        "hub: {url: 'oci://registry.lan:5000/models'",
        'registries.hub.url: is the place of registry "lan" already; remove one of the two',
    ),
    "one place under two spellings": (
        "hub: {url: 'hf:acme'",
        "hub: {url: 'file:./registry'",
        'registries.hub.url: is the place of registry "local" already',
    ),
    "a user in the address of a registry": (
        "'hf:acme'",
        "'s3://me:secret@bucket'",
        "registries.hub.url:",
    ),
    "two waivers of one gate": (
        "gate: gated",
        "gate: hold",
        'models.tiny-llama.waivers[1].gate: "hold" has a waiver already',
    ),
    "a waiver of something that nobody may let pass": (
        "gate: gated",
        "gate: invalid",
        "models.tiny-llama.waivers[1].gate:",
    ),
    "a waiver until no day": (
        "until: '2999-01-31'",
        "until: '2999-02-32'",
        "models.tiny-llama.waivers[1].until:",
    ),
    "a waiver without a reason": (
        "why: terms allow it",
        "why: '--'",
        "models.tiny-llama.waivers[1].why:",
    ),
    "path out of the repository": (
        "corpora/evaluation.txt",
        "../evaluation.txt",
        "corpora.evaluation.path:",
    ),
    "absolute path": ("corpora/evaluation.txt", "/etc/passwd", "is not a path below the repos"),
    "path that reads as an option": ("corpora/evaluation.txt", "-rf", "is not a path below the"),
    "source out of the repository": (
        "path:examples/tiny-llama",
        "path:../examples",
        "models.tiny-llama.source:",
    ),
    "source out of the repository, later": (
        "path:examples/tiny-llama",
        "path:a/../../b",
        "models.tiny-llama.source:",
    ),
    "source of an unknown kind": ("hf:Qwen/Qwen3-8B", "s3://bucket/x", "models.qwen3-8b.source:"),
    "date": ("experiment: gguf-fleet", "experiment: 2026-01-31", "reads as a date in YAML"),
    "equals sign alone": ("experiment: gguf-fleet", "experiment: =", "put it in quotes"),
    "number that is none": ("recipe: 3", "recipe: -_", "-_ is no number"),
    "number of 5,000 digits": ("recipe: 3", "recipe: " + "9" * 5000, "a number of 5,000 char"),
    "newline at the end of a value": (
        "experiment: gguf-fleet",
        'experiment: "gguf-fleet\\n"',
        "track.experiment:",
    ),
    "newline at the end of a key": (
        "  qwen3-8b:",
        '  "qwen3-8b\\n":',
        'models."qwen3-8b\\n": is n',
    ),
    "escape in a value": ("sqlite:///work/mlflow.db", '"sqlite:///\\e[2J"', "track.tracking_uri:"),
}


# A key that is missing is told at its owner, a contradiction where it is resolved.
TOLD_ELSEWHERE = {
    "required key missing": "  qwen3-8b:",
    "model without a quant": "  qwen3-8b:",
    "judged by the text that it was fitted to": "calibration: calibration",
    "two names for one text": "calibration: calibration",
    "imatrix without a corpus": "imatrix: true",
    "tensor rule on a type without quantization": "tensor_types:",
    "output tensor declared twice": "output_tensor_type:",
    "percentile of too little text": "max_kld_p999_nats:",
    "percentile of short windows": "max_kld_p999_nats:",
    "quantized cache without flash attention": "  kv_type: q8_0",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_on_its_line(tmp_path: Path, name: str) -> None:
    """Each mistake names its key, what is wrong and what is allowed, where it was made."""
    old, new, expected = MISTAKES[name]
    text = edited(old, new)
    lines = text.splitlines()
    if name in TOLD_ELSEWHERE:
        line = next(i for i, each in enumerate(lines, 1) if TOLD_ELSEWHERE[name] in each)
    else:
        line = next(i for i, each in enumerate(lines, 1) if each != LINES[i - 1])

    [problem] = [each for each in refused(tmp_path, text) if expected in each]

    assert problem.startswith(f"{line}:")


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("recipe: 3", "recipe: x", (6, 11)),
        ("backend: cpu", "bakend: cpu", (5, 3)),
        ("[0, 4096]", "[0, -1]", (64, 15)),
        ("type: q4_k}", "type: q4}", (43, 47)),
    ],
)
def test_line_and_column_point_at_the_very_value(
    tmp_path: Path, old: str, new: str, place: tuple[int, int]
) -> None:
    """Values in blocks, flow lists and nested rules: the place is where the text stands."""
    line, column = place
    text = edited(old, new)
    assert LINES[line - 1] != text.splitlines()[line - 1]

    assert refused(tmp_path, text)[0].startswith(f"{line}:{column}: ")


def test_columns_count_characters_not_bytes(tmp_path: Path) -> None:
    """A comment or a quoted letter beyond ASCII before a value does not shift its column."""
    problems = refused(tmp_path, edited("experiment: gguf-fleet", 'experiment: ["ä", {b: 1}]'))

    assert problems[0].startswith(f"{line_of('experiment:')}:15: track.experiment: a list is not")


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Types, contradictions and duplicate keys come in one list, from top to bottom."""
    text = VALID
    for old, new in (
        ("backend: cpu", "backend: cudaa"),
        ("context_tokens: 16384", "context_tokens: 16384\n    context_tokens: 8192"),
        ("model: qwen3-8b,", "model: qwen3-9b,"),
        ("max_size_mib: 8192", "max_size_mib: .nan"),
        ("dropped_repetitions: 2", "dropped_repetitions: 5"),
        ("{vram_mib: 24576}", "{vram: 24576}"),
    ):
        text = text.replace(old, new)

    problems = refused(tmp_path, text)

    places = [tuple(map(int, each.split(":")[:2])) for each in problems]
    assert places == sorted(places)
    for part in ("cudaa", "duplicate key", "qwen3-9b", ".nan", "3 at most", '"vram_mib"?', "needs"):
        assert any(part in each for each in problems), part


def test_a_duplicate_key_names_both_lines(tmp_path: Path) -> None:
    """Two quants of one name: the second is told, with the line of the first."""
    first = line_of("tiny-llama-Q8_0:")
    text = edited(LINES[first - 1], f"{LINES[first - 1]}\n{LINES[first - 1]}")

    assert refused(tmp_path, text) == [
        f"{first + 1}:3: quants.tiny-llama-Q8_0: is a duplicate key; it stands in line {first} too"
    ]


def test_two_quants_of_one_model_and_type_are_refused(tmp_path: Path) -> None:
    """They would write the same record."""
    text = edited("quants:\n", "quants:\n  second: {model: tiny-llama, type: Q8_0}\n")

    assert any('Q8_0 of "tiny-llama" is declared by "second"' in x for x in refused(tmp_path, text))


@pytest.mark.parametrize("hostile", CHARACTERS)
@pytest.mark.parametrize("section", ["corpora", "models", "quants", "hosts"])
def test_a_name_holds_nothing_that_a_shell_or_a_path_reads(
    tmp_path: Path, section: str, hostile: str
) -> None:
    """No name with a space, a dot, `..`, a command, a control character or a foreign letter."""
    key = json.dumps(f"a{hostile}")
    problems = refused(tmp_path, edited(f"\n{section}:\n", f"\n{section}:\n  {key}: {{}}\n"))

    line = line_of(f"{section}:") + 1
    assert any(each.startswith(f"{line}:3: {section}.") for each in problems)
    assert all(each.isprintable() for each in problems)


@pytest.mark.parametrize("hostile", INVISIBLE)
@pytest.mark.parametrize(
    "value", ["hf:Qwen/Qwen3-8B", "sqlite:///work/mlflow.db", "corpora/evaluation.txt", "0.3.36"]
)
def test_no_value_holds_a_line_end_or_a_control_character(
    tmp_path: Path, value: str, hostile: str
) -> None:
    """Also not at the very end, where `$` of a regular expression would let a newline pass."""
    assert refused(tmp_path, edited(value, json.dumps(f"{value}{hostile}")))


def test_a_password_is_refused_and_not_repeated(tmp_path: Path) -> None:
    """A tracking URI with a password does not reach a log or an annotation."""
    for uri in ("https://ci:hunter2@mlflow.example.org", "https://ci:hunter2@host/\\n"):
        problems = refused(tmp_path, edited("sqlite:///work/mlflow.db", f'"{uri}"'))

        assert any("track.tracking_uri" in each for each in problems)
        assert "hunter2" not in str(problems)


@pytest.mark.parametrize("key", ["url", "endpoint"])
@pytest.mark.parametrize(
    "address",
    [
        "s3://key:hunter2@bucket",
        "oci://ci:hunter2@host:5000/models",
        "hf:ci:hunter2@owner",
        "mlflow:http://ci:hunter2@host:5000",
        "mlflow:http://[ci:hunter2@host",
        "http://[ci:hunter2@host",
        "https://ci:hunter2@host",
        "http://ci:hunter2@host",
        "ci:hunter2@host",
        "file:hunter2@host/..",
    ],
)
def test_a_login_in_the_address_of_a_registry_is_refused_and_not_repeated(
    tmp_path: Path, key: str, address: str
) -> None:
    """Neither a log nor an annotation shows it; it says where a login belongs."""
    entry = {"url": "s3://bucket/prefix", key: address}
    text = edited("local: {url: 'file:registry'}", f"production: {json.dumps(entry)}")

    problems = refused(tmp_path, text)

    assert any(f"registries.production.{key}: is not" in each for each in problems)
    assert "belong in the environment" in str(problems)
    assert "hunter2" not in str(problems)


def test_a_problem_cannot_give_the_ci_runner_a_command(tmp_path: Path) -> None:
    """`::` and `##[` in a key or a value are broken up before they are shown."""
    text = edited("backend: cpu", "backend: '##[error]x ::warning::y'")

    for each in refused(tmp_path, text):
        assert "##[" not in each
        assert "::" not in each.split(": ", 1)[1]


# --- one file ---------------------------------------------------------------------------------

FILES = {
    "empty": (b"", "1:1: the file: is empty"),
    "comments alone": (b"# nothing\n", "1:1: the file: is empty"),
    "an empty document": (b"---\n", "1:1: the file: is empty"),
    "an empty mapping": (b"{}\n", "1:1: the file: is empty"),
    "a list": (b"- a\n- b\n", "1:1: the file: a list is not a mapping with the keys toolchain"),
    "a word": (b"hello\n", '1:1: the file: "hello" is not a mapping with the keys toolchain'),
    "NUL bytes": (b"a: 1\nb: \x00\x01", "2:4: the file: character U+0000 cannot be seen"),
    "a GGUF": (b"GGUF\x03\x00\x00\x00", "1:5: the file: character U+0003 cannot be seen"),
    "no UTF-8": (b"a: 1\nb: caf\xe9\n", "2:7: the file: byte 0xe9 is no UTF-8"),
    "UTF-16": ("a: 1\n".encode("utf-16"), "1:1: the file: byte 0xff is no UTF-8"),
    "a byte-order mark": (b"\xef\xbb\xbfa: 1\n", "1:1: the file: character U+FEFF cannot"),
    "text that reads backwards": ("a: 1 # \u202ex\n".encode(), "1:8: the file: character U+202E"),
    "a tab as indentation": (b"a:\n\tb: 1\n", "(a tab? indent with spaces)"),
    "an open bracket": (b"a: [1\n", "did not find expected ',' or ']'"),
    "an open quote": (b"a: 'x\n", "found unexpected end of stream"),
    "a colon too many": (b"a: b: c\n", "1:5: the file: is no YAML: mapping values"),
    "a bad escape": (b'a: "\\ud800"\n', "the file: is no YAML"),
    "an alias": (b"a: &x 1\nb: *x\n", "2:4: the file: an alias (`*`) is not allowed"),
    "an unknown alias": (b"a: *x\n", "1:4: the file: an alias (`*`) is not allowed"),
    "a tag": (b"a: !!str 1\n", "1:4: the file: a tag (`!`) is not allowed"),
    "a Python tag": (b"a: !!python/object/apply:os.system ['touch x']\n", "1:4: the file: a tag"),
    "a tag without a name": (b"a: ! 1\n", "1:4: the file: a tag (`!`) is not allowed"),
    "a second document": (b"a: 1\n---\nb: 2\n", "2:1: the file: a second document"),
    "YAML 1.1": (b"%YAML 1.1\n---\na: no\n", "the file: a directive (`%`) is not allowed"),
    "a merge key": (b"<<: {a: 1}\n", '1:1: "<<": is a merge key, which is not allowed here'),
    "deep lists": (b"[" * 200_000, "is nested more than 16 levels deep"),
    "deep mappings": (b"{a: " * 50_000, "is nested more than 16 levels deep"),
    "deep blocks": (b"- " * 100_000, "is nested more than 16 levels deep"),
    "deep keys": (b"? " * 100_000, "is nested more than 16 levels deep"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_declaration_is_refused_by_line(tmp_path: Path, name: str) -> None:
    """Whatever the file holds, the answer is a line and a sentence."""
    data, expected = FILES[name]

    assert any(expected in each for each in refused(tmp_path, data))


def test_an_anchor_bomb_is_refused_alias_by_alias(tmp_path: Path) -> None:
    """Nine lists of nine aliases are not expanded; each alias and anchor is told."""
    names = "abcdefghi"
    lines = ["a: &a [x, x]"]
    lines += [f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]" for p, n in itertools.pairwise(names)]

    problems = refused(tmp_path, "\n".join(lines))

    assert len([each for each in problems if "alias" in each]) == 72
    assert problems[1].startswith("2:4: the file: an anchor (`&`) is not allowed")
    assert problems[2].startswith("2:8: the file: an alias (`*`) is not allowed")


def test_what_is_not_a_readable_file_is_refused(tmp_path: Path) -> None:
    """Missing, a directory, a pipe, a link, a device, 100 MB: told without reading it."""
    places: dict[str, Path] = {
        "No such file": tmp_path / "params.yaml",
        "is a directory": tmp_path,
        "is not a regular file": tmp_path / "pipe",
        "is a symbolic link": tmp_path / "link",
        "is larger than 256 KiB": tmp_path / "huge",
        "Not a directory": tmp_path / "huge/params.yaml",
        "File name too long": tmp_path / ("x" * 300),
    }
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/hostname")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(100_000_000)
    if Path("/proc/self/mem").exists():
        # Readable by its mode, and yet reading fails: what a bad disk does.
        places["cannot be read: Input/output error"] = Path("/proc/self/mem")

    for expected, path in places.items():
        with pytest.raises(ParamsError, match=expected) as caught:
            declaration.load(path)
        assert (caught.value.problems[0].line, caught.value.problems[0].column) == (1, 1)


def test_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    """A file that an editor saved with CR LF loads as before and keeps its line numbers."""
    crlf = VALID.replace("\n", "\r\n")

    same = declaration.load(write(tmp_path, crlf))
    problems = refused(tmp_path, crlf.replace("recipe: 3", "recipe: x"))

    assert same == declaration.load(write(tmp_path, VALID))
    assert problems[0].startswith("6:11: ")


# --- files that the declaration names ---------------------------------------------------------


def file_problems(at: Layout) -> list[str]:
    """Check a checkout whose declaration is right and whose files are not."""
    with pytest.raises(ParamsError) as caught:
        declaration.check(at)
    declared = declaration.load(at.params)
    assert [str(each) for each in declaration.check_files(declared, at.root)] == [
        str(each) for each in caught.value.problems
    ]
    return [f"{each.line}:{each.column}: {each.text}" for each in caught.value.problems]


def test_a_complete_checkout_has_no_problem(at: Layout) -> None:
    """Corpora with the declared bytes and a source directory: nothing to say."""
    declared = declaration.check(at)

    assert declaration.check_files(declared, at.root) == []


def test_a_corpus_with_other_bytes_is_told_with_what_to_paste(at: Layout) -> None:
    """The problem stands on the line of the sha256 and holds the new one."""
    (at.root / "corpora/evaluation.txt").write_bytes(b"other\n")
    got = hashlib.sha256(b"other\n").hexdigest()

    [problem] = file_problems(at)

    assert problem.startswith(f"{line_of('b' * 64)}:13: corpora.evaluation.sha256: ")
    assert f"want {hashlib.sha256(EVALUATION).hexdigest()}, got {got}" in problem
    assert problem.endswith(f"write: sha256: {got}")


def test_a_corpus_that_is_no_file_of_the_repository_is_told(
    at: Layout, tmp_path_factory: Any
) -> None:
    """Missing, a directory, a pipe, a loop of links, a link to a file elsewhere."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.txt"
    elsewhere.write_bytes(EVALUATION)
    path = at.root / "corpora/evaluation.txt"
    path.unlink()
    name = "corpora/evaluation.txt"
    place = f"{line_of(name)}:11: corpora.evaluation.path: {name}"

    assert file_problems(at) == [f"{place} does not exist"]
    path.mkdir()
    assert file_problems(at) == [f"{place} is not a regular file"]
    path.rmdir()
    os.mkfifo(path)
    assert file_problems(at) == [f"{place} is not a regular file"]
    path.unlink()
    path.symlink_to(elsewhere)
    assert file_problems(at) == [f"{place} leads out of the repository"]
    path.unlink()
    path.symlink_to(path)
    assert "link" in file_problems(at)[0]


def test_a_source_directory_that_is_missing_is_told(at: Layout) -> None:
    """The problem stands on the `source` of the model."""
    (at.root / "examples/tiny-llama").rmdir()

    assert file_problems(at) == [
        (
            f"{line_of('path:examples')}:13: models.tiny-llama.source: directory "
            '"examples/tiny-llama" does not exist'
        )
    ]


def test_a_source_that_leads_out_or_is_the_repository_itself_is_told(at: Layout) -> None:
    """A link to a directory elsewhere, a file, and `path:.` are no sources."""
    directory = at.root / "examples/tiny-llama"
    directory.rmdir()
    directory.symlink_to("/")
    assert "leads out of the repository" in file_problems(at)[0]
    directory.unlink()
    directory.write_bytes(b"")
    assert "is not a directory" in file_problems(at)[0]
    text = at.params.read_text(encoding="utf-8")
    at.params.write_text(text.replace("path:examples/tiny-llama", "path:."), encoding="utf-8")
    assert "not the whole repository" in file_problems(at)[0]


def test_a_source_with_other_bytes_is_told_with_what_to_paste(at: Layout) -> None:
    """The problem stands on the line of the revision, in the words of fetch, and holds the new."""
    source = checkpoints.tiny(at.root / "examples/tiny-llama")
    declared = re.search(r"path:examples/tiny-llama\n\s+revision: (\S+)", VALID)
    assert declared is not None
    found = fetch.content_digest(source)

    [problem] = file_problems(at)

    line = line_of("path:examples") + 1
    assert problem.startswith(f"{line}:15: models.tiny-llama.revision: the files are not the")
    assert f"revision {declared[1]} is declared, {found} found" in problem
    assert problem.endswith(f"write: revision: {found}")
    text = at.params.read_text().replace(declared[1], found)
    at.params.write_text(text)
    assert declaration.check_files(declaration.check(at), at.root) == []


def test_a_source_too_large_to_hash_is_compared_by_what_was_fetched(
    at: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and sizes are those of the fetch record, or the problem says which are not."""
    monkeypatch.setattr(dvc_state, "WORTH_BYTES", 1)
    monkeypatch.setattr(fetch, "content_digest", _must_not_hash)
    source = checkpoints.tiny(at.root / "examples/tiny-llama")
    revision = declaration.load(at.params).models["tiny-llama"].revision
    files = tuple(
        file_digest(path.name, path.stat().st_size) for path in source.iterdir() if path.is_file()
    )
    unknown = declaration.check(at)
    records.write(
        at.model_record("fetch", "tiny-llama"), fetch_record(revision=revision, files=files)
    )
    same = declaration.check(at)
    with (source / "config.json").open("a") as config:
        config.write("\n")

    [problem] = file_problems(at)

    assert unknown == same
    assert "config.json of revision" in problem
    assert problem.endswith(f"fleet digest {source}")


def _must_not_hash(_directory: Path) -> str:
    raise AssertionError("hashed a large source")


def test_check_tells_mistakes_and_files_together(at: Layout) -> None:
    """A misspelt key does not hide that a corpus is missing."""
    (at.root / "corpora/evaluation.txt").unlink()
    text = at.params.read_text(encoding="utf-8")
    at.params.write_text(text.replace("recipe: 3", "recipee: 3"), encoding="utf-8")

    with pytest.raises(ParamsError) as caught:
        declaration.check(at)

    assert ["recipee" in each.text for each in caught.value.problems] == [True, False]
    assert "does not exist" in caught.value.problems[1].text


# --- the command line -------------------------------------------------------------------------


def test_check_says_what_is_declared(at: Layout, fleet: Fleet) -> None:
    """`fleet check` counts models, quants and hosts on stdout."""
    done = fleet("check", cwd=at.root)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "params.yaml: 2 models, 3 quants, 2 hosts, all well\n"


def test_check_prints_every_problem_and_exits_with_2(at: Layout, fleet: Fleet) -> None:
    """Lines that an editor can jump to, no traceback, and annotations under Actions."""
    at.params.write_text(edited("recipe: 3", "recipe: x"), encoding="utf-8")

    plain = fleet("check", cwd=at.root)
    actions = fleet("check", cwd=at.root, GITHUB_ACTIONS="true")

    assert plain.returncode == actions.returncode == 2
    assert 'params.yaml:6:11: toolchain.recipe: "x" is not a whole number' in plain.stderr
    assert "::error file=params.yaml,line=6,col=11::toolchain.recipe: " in actions.stderr
    assert "Traceback" not in plain.stderr + actions.stderr


def test_check_gives_problems_as_json(at: Layout, fleet: Fleet) -> None:
    """`fleet check --json` is for programs: one object on stdout, exit 2 if there are problems."""
    good = fleet("check", "--json", cwd=at.root)
    (at.root / "corpora/evaluation.txt").unlink()
    bad = fleet("check", "--json", cwd=at.root)

    assert json.loads(good.stdout) == {
        "file": "params.yaml", "models": 2, "quants": 3, "hosts": 2, "problems": [],
        "warnings": [],
    }  # fmt: skip
    assert (good.returncode, bad.returncode) == (0, 2)
    [problem] = json.loads(bad.stdout)["problems"]
    assert problem["line"] == line_of("corpora/evaluation.txt")


def test_a_waiver_that_is_over_is_a_warning_and_stops_nothing(at: Layout, fleet: Fleet) -> None:
    """At midnight the chain goes on; who let what pass, and until when, is told."""
    text = at.params.read_text()
    at.params.write_text(text.replace("2999-12-31", "2026-01-31"))

    shown = fleet("check", cwd=at.root)
    told = fleet("check", "--json", cwd=at.root)

    said = (
        "models.tiny-llama.waivers: the waiver of `hold` by Ada Lovelace ended on 2026-01-31: "
        "nothing new is released by it. Remove it, or decide again."
    )
    assert shown.returncode == told.returncode == 0
    assert f"warning: params.yaml: {said}" in shown.stderr
    assert json.loads(told.stdout)["warnings"] == [said]


def test_a_waiver_counts_on_its_last_day(tmp_path: Path) -> None:
    """`until` is a day, and that day is inside."""
    declared = declaration.load(write(tmp_path, VALID))

    assert not declaration.over_waivers(declared, "2999-01-31")
    assert len(declaration.over_waivers(declared, "2999-02-01")) == 1
    assert len(declaration.over_waivers(declared, "3000-01-01")) == 2


def test_the_local_registry_is_there_even_if_nobody_declares_it(tmp_path: Path) -> None:
    """Another one cannot take its place; MLflow may keep its files in it."""
    text = VALID.replace("  local: {url: 'file:registry'}\n", "")
    declared = declaration.load(write(tmp_path, text.replace("blobs: bucket", "blobs: local")))
    local = params.registry_of(declared, "local")

    assert local is not None
    assert local.url == "file:registry"
    assert params.publish_slice(declared, "tiny-llama").registry == local
    (found,) = refused(tmp_path, text.replace("'hf:acme'", "'file:registry'"))
    assert 'is the place of registry "local" already' in found


# --- sets of tasks ----------------------------------------------------------------------------

EVAL_PATH = "corpora/evals/x.jsonl"
ITEMS = [
    {"id": f"i{i}", "prompt": "It depends", "choices": [" on it.", " of it."], "answer": 0}
    for i in range(20)
]


def with_set(text: str, data: bytes, *, more: str = "", used: str = "[x]") -> str:
    """Declare a set for the first model."""
    digest = hashlib.sha256(data).hexdigest()
    line = f"    path: {EVAL_PATH}\n    sha256: {digest}\n    license: mit\n{more}"
    text = text.replace("    objective: size\n", f"    objective: size\n    evals: {used}\n")
    return f"{text}evals:\n  x:\n    kind: multiple-choice\n{line}"


def items_as(items: list[Any]) -> bytes:
    """Write a set."""
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def test_a_model_names_declared_sets_once(tmp_path: Path) -> None:
    """A slip gets a suggestion; a name that is there twice would count twice."""
    text = with_set(VALID, b"", used="[x, y, x]")

    unknown, twice = refused(tmp_path, text)

    assert 'models.tiny-llama.evals[1]: eval "y" is not declared' in unknown
    assert 'Declared: "x"' in unknown
    assert 'models.tiny-llama.evals[2]: eval "x" is there twice' in twice


def test_the_chance_of_a_multiple_choice_is_not_declared(tmp_path: Path) -> None:
    """The items say it, and two sources would contradict each other."""
    [found] = refused(tmp_path, with_set(VALID, b"", more="    chance: 0.5\n"))

    assert "evals.x.chance: is for the other kinds" in found


def test_a_set_of_tasks_is_looked_at_line_by_line(at: Layout) -> None:
    """Missing, other bytes, wrong items: each is said on the line of the declaration."""
    good = items_as(ITEMS)
    write(at.root, with_set(at.params.read_text(encoding="utf-8"), good))
    [missing] = file_problems(at)
    assert f"evals.x.path: {EVAL_PATH} does not exist" in missing

    (at.root / EVAL_PATH).parent.mkdir(parents=True)
    (at.root / EVAL_PATH).write_bytes(good)
    declared = declaration.check(at)
    assert params.evaluate_slice(declared, "tiny-llama").evals == {"x": declared.evals["x"]}
    assert params.evaluate_slice(declared, "qwen3-8b").evals == {}

    (at.root / EVAL_PATH).write_bytes(items_as([*ITEMS[:2], ITEMS[2] | {"answer": 7}, *ITEMS[3:]]))
    wrong_item, wrong_bytes = file_problems(at)
    assert f"evals.x.path: {EVAL_PATH}:3: answer: 7 is none of 2 choices" in wrong_item
    assert "evals.x.sha256: " in wrong_bytes
    assert "If they are meant, write: sha256: " in wrong_bytes

    (at.root / EVAL_PATH).write_bytes(items_as(ITEMS[:19]))
    assert any("has 19 items; 20 to" in problem for problem in file_problems(at))


def test_a_set_of_another_kind_does_not_fill_the_screen(at: Layout) -> None:
    """Twenty wrong lines are ten problems and how many more there are."""
    data = items_as([{"id": item["id"]} for item in ITEMS])
    write(at.root, with_set(at.params.read_text(encoding="utf-8"), data))
    (at.root / EVAL_PATH).parent.mkdir(parents=True)
    (at.root / EVAL_PATH).write_bytes(data)

    found = file_problems(at)

    assert len(found) == 11
    assert found[-1].endswith(f"{EVAL_PATH} has 50 problems more like these")


# --- slices -----------------------------------------------------------------------------------


def test_every_stage_has_a_slice_for_each_of_its_keys(tmp_path: Path) -> None:
    """Stages by model, stages by quant, and the report, which has the key "fleet"."""
    found = declaration.slices(declaration.load(write(tmp_path, VALID)))

    models, quants = ["tiny-llama", "qwen3-8b"], ["tiny-llama-Q8_0", "tiny-llama-IQ2_XS",
                                                  "qwen3-8b-Q4_K_M"]  # fmt: skip
    expected = {(stage, key) for stage in ("fetch", "convert", "verify", "calibrate", "evaluate",
                                                "choose", "load-test", "publish", "track")
                for key in models}  # fmt: skip
    expected |= {(stage, key) for stage in ("quantize", "benchmark") for key in quants}
    assert set(found) == expected | {("report", "fleet")}


def test_a_slice_holds_the_resolved_values(tmp_path: Path) -> None:
    """A model's own gate beats the top-level one; the others and the defaults are filled in."""
    found = {
        key: json.loads(slice_.model_dump_json())
        for key, slice_ in declaration.slices(declaration.load(write(tmp_path, VALID))).items()
    }

    gates = found["choose", "tiny-llama"]["gates"]
    assert (gates["max_kld_mean_nats"], gates["max_kld_p999_nats"]) == (0.01, 1.5)
    assert found["choose", "qwen3-8b"]["gates"]["max_kld_mean_nats"] == 0.05
    assert found["choose", "qwen3-8b"]["objective"] == "speed"
    assert found["calibrate", "qwen3-8b"]["corpus"] is None
    assert found["benchmark", "qwen3-8b-Q4_K_M"]["corpus"]["path"] == "corpora/evaluation.txt"
    assert found["quantize", "tiny-llama-IQ2_XS"]["recipe"] == 3


def written(at: Layout) -> dict[str, bytes]:
    """Return {STAGE/KEY.json: bytes} of everything below work/params."""
    base = at.root / "work/params"
    return {
        path.relative_to(base).as_posix(): path.read_bytes()
        for path in sorted(base.rglob("*"))
        if path.is_file()
    }


def test_slices_are_written_where_dvc_tracks_them(at: Layout) -> None:
    """work/params/STAGE/KEY.json, JSON that reads back as the slice."""
    declared = declaration.load(at.params)

    declaration.write_slices(declared, at)

    files = written(at)
    for (stage, key), slice_ in declaration.slices(declared).items():
        assert type(slice_).model_validate_json(files[f"{stage}/{key}.json"]) == slice_
    assert len(files) == len(declaration.slices(declared))


def test_an_edit_changes_only_the_slices_that_read_it(at: Layout) -> None:
    """A new gate touches choice and verdict alone; other files keep their bytes and times."""
    declaration.write_slices(declaration.load(at.params), at)
    before = written(at)
    stamps = {path: path.stat().st_mtime_ns for path in at.root.glob("work/params/*/*.json")}
    for path in stamps:
        os.utime(path, ns=(1, 1))
    text = at.params.read_text(encoding="utf-8")
    at.params.write_text(text.replace("min_same_top: 0.9", "min_same_top: 0.8"), encoding="utf-8")

    declaration.write_slices(declaration.load(at.params), at)

    changed = {name for name, data in written(at).items() if data != before[name]}
    judged = {f"{stage}/{key}.json" for stage in ("choose", "publish")
              for key in ("tiny-llama", "qwen3-8b")}  # fmt: skip
    assert changed == judged | {"report/fleet.json"}
    rewritten = {path.relative_to(at.root / "work/params").as_posix() for path in stamps
                 if path.stat().st_mtime_ns != 1}  # fmt: skip
    assert rewritten == changed


def test_slices_of_what_is_gone_are_removed(at: Layout) -> None:
    """A model and its quants, an unfinished file, and a stage that no longer exists."""
    declaration.write_slices(declaration.load(at.params), at)
    base = at.root / "work/params"
    (base / "fetch/.old.json.part").write_bytes(b"")
    (base / "weigh").mkdir()
    (base / "weigh/tiny-llama.json").write_bytes(b"{}")
    lines = at.params.read_text(encoding="utf-8").splitlines()
    start = lines.index("  qwen3-8b:")
    kept = [each for each in lines[:start] + lines[start + 4 :] if "qwen3-8b-Q4" not in each]
    write(at.root, "\n".join(kept))

    declaration.write_slices(declaration.load(at.params), at)

    assert not [name for name in written(at) if "qwen" in name or "weigh" in name or "part" in name]
    assert "quantize/tiny-llama-Q8_0.json" in written(at)


# --- anything at all --------------------------------------------------------------------------

HOSTILE = (
    "; touch x", "$(touch x)", "`touch x`", "../../etc/passwd", "${models}", "{{ x }}", "\x00",
    "\x1b[2J", "\n", "\r", "\t", "\u2028", "\u202e", "ä", "\U0001f600", "'", '"', "&a", "*a", "!!x",
    "<<: ", "---\n", "...\n", "%YAML 1.1\n", ".nan", "-.inf", "1e999", "9" * 50, "0x", "-_", "~",
    "[", "]", "{", "}", "- ", "? ", ": ", "#", "|", ">", "@", "null", "2026-01-31", "=",
    "::error::", "x" * 300, "[" * 100, "\ufeff", "\ud7ff", "\ufffe",
)  # fmt: skip
WORDS = sorted({*re.findall(r"[A-Za-z0-9_.:/-]+", VALID)})


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """The valid file after one to four edits: of bytes, words, lines, or with hostile text."""
    data = VALID.encode()
    for _ in range(draw(st.integers(1, 4))):
        text = data.decode(errors="surrogateescape")
        edit = draw(st.sampled_from(["byte", "cut", "insert", "word", "line", "swap"]))
        where = draw(st.integers(0, len(text)))
        if edit == "byte":
            position = draw(st.integers(0, max(len(data) - 1, 0)))
            data = data[:position] + bytes([draw(st.integers(0, 255))]) + data[position + 1 :]
            continue
        if edit == "cut":
            text = text[:where] + text[where + draw(st.integers(1, 80)) :]
        elif edit == "insert":
            text = text[:where] + draw(st.sampled_from(HOSTILE)) + text[where:]
        elif edit == "word":
            old = draw(st.sampled_from(WORDS))
            text = text.replace(old, draw(st.sampled_from((*WORDS, *HOSTILE))), 1)
        else:
            lines = text.splitlines(keepends=True)
            i = draw(st.integers(0, max(len(lines) - 1, 0)))
            j = draw(st.integers(0, max(len(lines) - 1, 0)))
            if edit == "line":
                lines.insert(i, draw(st.sampled_from([*lines, "x: 1\n"])))
            elif lines:
                lines[i], lines[j] = lines[j], lines[i]
            text = "".join(lines)
        data = text.encode(errors="surrogateescape")
    return data


def assert_placed(problems: tuple[Problem, ...], data: bytes) -> None:
    """Every problem stands on a line that the file has, and says something on one line."""
    count = len(re.split(r"\r\n|\r|\n", data.decode(errors="replace")))
    assert problems
    for problem in problems:
        assert problem.file.endswith("params.yaml")
        assert 1 <= problem.line <= count + 1
        assert problem.column >= 1
        assert problem.text.replace("\u200b", "").isprintable()
        assert re.fullmatch(r".+?: .+", problem.text)


@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(mutants())
def test_whatever_is_in_the_file_the_answer_is_a_declaration_or_lines(
    tmp_path: Path, data: bytes
) -> None:
    """600 broken files: never another exception, and no value that DVC reads otherwise."""
    path = write(tmp_path, data)
    try:
        declared = declaration.load(path)
    except ParamsError as error:
        assert_placed(error.problems, data)
    else:
        assert marked_yaml.read(path).data == load_yaml(str(path))
        assert "nan" not in declared.model_dump_json().lower()


VALID_JSON = json.dumps(YAML(typ="safe").load(VALID))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10_000) | st.floats() | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def misshapen(draw: st.DrawFn) -> str:
    """The valid data with up to three parts replaced by data of any shape, as JSON (so YAML)."""
    data = json.loads(VALID_JSON)
    for _ in range(draw(st.integers(1, 3))):
        place: Any = data
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or draw(st.booleans()):
                place[key] = draw(JSON_VALUES)
                break
            place = place[key]
    text = json.dumps(data, indent=1)
    return text.replace("NaN", ".nan").replace("-Infinity", "-.inf").replace("Infinity", ".inf")


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(misshapen())
def test_data_of_any_shape_is_a_declaration_or_lines(tmp_path: Path, text: str) -> None:
    """A list where a name belongs, a mapping where a number belongs: never another exception."""
    path = write(tmp_path, text)
    try:
        declared = declaration.load(path)
    except ParamsError as error:
        assert_placed(error.problems, text.encode())
    else:
        assert set(declaration.slices(declared))
