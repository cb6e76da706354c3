"""The types of the declaration, and what they claim about llama-quantize."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING, Any, get_args

import pytest
from gguf_factory import tiny_llama_gguf
from pydantic import TypeAdapter, ValidationError

from pipelines import params
from pipelines.params import NEEDS_IMATRIX, UNQUANTIZED, QuantType, TensorType, is_safe_regex

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.toolchain import Toolchain

TYPES: tuple[str, ...] = get_args(QuantType)
TENSOR_TYPES: tuple[str, ...] = get_args(TensorType)
# Of single tensors; llama-quantize wants a matrix for each of them.
TENSOR_TYPES_WITH_MATRIX = {"iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    """A Llama of eight layers with random weights: deep enough that every mixture shows."""
    return tiny_llama_gguf(tmp_path_factory.mktemp("model") / "f16.gguf", n_layer=8)


def quantize(
    tools: Toolchain, model: Path, type_: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """Run llama-quantize on the model; the output lies beside it."""
    out = model.with_name("out.gguf")
    argv = [str(tools.tool("llama-quantize")), *options, str(model), str(out), type_, "1"]
    return subprocess.run(
        argv, capture_output=True, text=True, errors="replace", timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (params.ModelKey, ["a", "0", "qwen3-8b", "a_b"],
         ["", "A", "-a", "_a", "a.b", "a b", "a/b", "..", "a;b", "a\n", "a" * 64, "ä", "a\x00"]),
        (params.QuantKey, ["a-Q4_K_M"], ["", "A-Q8_0", "a b", "a-Q8_0\n", "a.b"]),
        (params.RelativePath, ["a", "a/b.txt", ".a", "a..b", "./a"],
         ["", "/a", "..", "../a", "a/..", "a/../b", "-a", "a b", "a\n", "~/a\\b", "a\tb"]),
        (params.Source, ["path:a", "path:a/b", "hf:a/b", "hf:Qwen/Qwen3-8B"],
         ["a", "path:", "path:/a", "path:..", "path:../a", "path:a/../b", "path:-a", "path:a\n",
          "hf:a", "hf:a/b/c", "hf:../b", "hf:a/..", "hf:-a/b", "hf:a/b\n", "s3://a", "PATH:a"]),
        (params.Revision, ["0" * 40, "f" * 40], ["main", "F" * 40, "0" * 39, "0" * 41, "0" * 64,
                                                 "0" * 40 + "\n"]),
        (params.Sha256, ["0" * 64], ["0" * 63, "0" * 65, "g" * 64, "0" * 64 + "\n"]),
        (params.RegistryUrl,
         ["file:registry", "file:/srv/registry", "s3://bucket", "s3://bucket/a/b",
          "oci://registry.lan:5000/models", "oci://localhost/m", "hf:acme",
          "mlflow:http://127.0.0.1:5000", "mlflow:https://a.b/c", "mlflow:sqlite:///work/r.db"],
         ["registry", "file:", "file:../x", "file:a/../b", "file:-x", "s3://", "s3://B",
          "s3:bucket",
          "s3://key:secret@bucket", "s3://bucket/../x", "s3://bucket?x=1", "oci://registry.lan",
          "oci://registry.lan/a/b", "oci://registry.lan/A", "oci://me:pw@registry.lan/m",
          "hf:acme/model", "hf:-a", "hf:a b", "mlflow:", "mlflow:file:x",
          "mlflow:http://me:pw@host", "mlflow:databricks", "http://host", "file:a\n"]),
        (params.Endpoint, ["http://127.0.0.1:9000", "https://minio.lan/x"],
         ["minio.lan", "ftp://x", "http://me:pw@x", "http://x?y", "http://x\n", "http://"]),
        (params.Stable, ["latest", "0" * 64], ["newest", "0" * 63, "F" * 64, "previous", ""]),
        (params.LicenseId, ["apache-2.0", "llama3.2", "mit", "gpl-3.0+"],
         ["", "-x", "a b", "a/b", "mit\n", "x" * 65]),
        (params.Day, ["2027-01-31", "2999-12-01", "2028-02-29"],
         ["2027-02-30", "2027-02-29", "2027-04-31", "0000-01-01",
          "2027-1-31", "2027-13-01", "2027-00-10", "2027-01-32", "27-01-31", "2027-01-31\n",
          "tomorrow"]),
        (params.Sentence, ["Ada", "read by our lawyer"],
         ["", "ab", "---", "   ", "x" * 301, "a\nb", "\x1b[31mred"]),
    ],
    ids=["model", "quant", "path", "source", "revision", "sha256", "registry", "endpoint",
         "stable", "license", "day", "sentence"],
)  # fmt: skip
def test_a_name_is_what_its_words_say(kind: Any, good: list[str], bad: list[str]) -> None:
    """What DVC, a shell, a path or a registry could misread is no value of its type."""
    adapter = TypeAdapter(kind, config={"regex_engine": "python-re"})

    for text in good:
        assert adapter.validate_python(text) == text
    for text in bad:
        with pytest.raises(ValidationError):
            adapter.validate_python(text)


def test_a_slice_is_frozen_and_closed() -> None:
    """A stage can neither change its parameters nor be given one that it does not know."""
    slice_ = params.ConvertSlice(model="a", recipe=1)

    with pytest.raises(ValidationError, match="frozen"):
        slice_.recipe = 2  # type: ignore[misc] # the point of the test
    with pytest.raises(ValidationError, match="Extra inputs"):
        params.ConvertSlice.model_validate({"model": "a", "recipe": 1, "more": 1})


@pytest.mark.parametrize(
    "pattern",
    ["attn_v", r"blk\.(0|1)\.ffn_down", "^output", r"blk\.\d+\.attn_[qk]\.", "ffn_(?:up|gate)",
     "attn_(?!output)", r"\battn", "a{2,3}", "(a|b)*", "[^.]+", "."],
)  # fmt: skip
def test_a_pattern_of_both_languages_is_accepted(pattern: str) -> None:
    """What std::regex and Python read alike can be a rule."""
    assert is_safe_regex(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["ATTN_V", r"blk\.\D", "(", "a)", "[a", "*a", "a=b", "(?=a)", "(?i)a", "(?<!a)b", "(?P<n>a)",
     "(?#c)a", "a++", "a*+", "a{2}+", "a{,3}", "[]a]", "[^]a]", "[[:alpha:]]", "[a--b]", r"\1(a)",
     r"\x41", "a{99999999999}", "(" * 200 + ")" * 199],
)  # fmt: skip
def test_a_pattern_of_one_language_is_refused(pattern: str) -> None:
    """Where llama-quantize would fail, or match other tensors than the prediction says."""
    assert not is_safe_regex(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", r"(?:[a-z_.\d]+)*!", "(?:ab|a|b)*!", "a?" * 30 + "a" * 30, ".*" * 5 + "!",
     "((a{1,9}){1,9}){1,9}!", "(?!(?:.+)+!)"],
)  # fmt: skip
def test_a_pattern_that_no_search_comes_to_the_end_of_is_refused(pattern: str) -> None:
    """It would hold up Python and llama-quantize on the first name that almost matches."""
    assert not is_safe_regex(pattern)


@pytest.mark.parametrize(
    "pattern",
    [r"^blk\.([0-9]|1[0-9])\.ffn_(?:up|gate|down)_exps\.weight$", r"blk\.\d+\..*_q.*\.weight",
     r"\.ffn_(?:gate|up|down)(?:_shexp)?\.weight$"],
)  # fmt: skip
def test_patterns_as_recipes_have_them_are_accepted(pattern: str) -> None:
    """Alternatives and single repeats are what rules are made of."""
    assert is_safe_regex(pattern)


@pytest.mark.toolchain
def test_the_types_are_those_of_llama_quantize(tools: Toolchain) -> None:
    """Every recipe that the pinned llama-quantize lists, but COPY and the aliases."""
    done = subprocess.run(
        [tools.tool("llama-quantize"), "--help"], capture_output=True, text=True, check=False
    )
    listed = re.findall(r"^ *(?:\d+ +or)? +([A-Z0-9_]+) +:(.*)$", done.stdout, re.MULTILINE)
    recipes = {name for name, text in listed if name != "COPY" and "alias" not in text}

    assert set(TYPES) == recipes


@pytest.mark.toolchain
def test_types_that_need_a_matrix_are_those_that_llama_quantize_refuses(
    tools: Toolchain, model: Path
) -> None:
    """A dry run of each type warns for exactly those of NEEDS_IMATRIX; a real one fails."""
    refused = set()
    for type_ in TYPES:
        done = quantize(tools, model, type_, "--dry-run")
        assert done.returncode == 0, type_
        if "will require an imatrix" in done.stdout + done.stderr:
            refused.add(type_)
    real = quantize(tools, model, "IQ2_M")

    assert refused == NEEDS_IMATRIX
    assert real.returncode != 0
    assert "requires an importance matrix" in real.stdout + real.stderr


@pytest.mark.toolchain
def test_every_tensor_type_can_be_made(tools: Toolchain, model: Path) -> None:
    """llama-quantize makes each, or says that it wants a matrix; it aborts on none."""
    for type_ in TENSOR_TYPES:
        done = quantize(tools, model, "Q8_0", "--tensor-type", rf"blk\.0\.ffn_up={type_}")
        text = done.stdout + done.stderr
        if type_ in TENSOR_TYPES_WITH_MATRIX:
            assert done.returncode != 0, type_
            assert "requires an imatrix" in text, type_
        else:
            assert done.returncode == 0, (type_, text[-500:])


@pytest.mark.toolchain
def test_rules_have_no_effect_on_types_without_quantization(tools: Toolchain, model: Path) -> None:
    """The reason why a tensor rule of an F16 quant is refused."""
    import gguf  # noqa: PLC0415 - the oracle, in two tests

    for type_ in sorted(UNQUANTIZED):
        assert quantize(tools, model, type_, "--tensor-type", "ffn_up=q4_0").returncode == 0
        tensors = gguf.GGUFReader(model.with_name("out.gguf")).tensors
        assert "Q4_0" not in {tensor.tensor_type.name for tensor in tensors}


@pytest.mark.toolchain
@pytest.mark.parametrize(
    "pattern",
    ["attn_v", r"blk\.(0|1)\.ffn_down", r"blk\.\d+\.attn_[qk]\.", "ffn_(?:up|gate)", "[^.]+_down",
     "attn_(?!output)", r"\battn_q", "f{2}n_u"],
)  # fmt: skip
def test_a_pattern_matches_the_same_tensors_in_llama_quantize_and_python(
    tools: Toolchain, model: Path, pattern: str
) -> None:
    """The tensors that get the type of a rule are those in whose name Python finds it."""
    import gguf  # noqa: PLC0415 - the oracle, in two tests

    assert quantize(tools, model, "Q8_0", "--tensor-type", f"{pattern}=q4_0").returncode == 0
    tensors = gguf.GGUFReader(model.with_name("out.gguf")).tensors
    found = {tensor.name for tensor in tensors if tensor.tensor_type.name == "Q4_0"}
    matrices = {t.name for t in tensors if len(t.shape) > 1 and "norm" not in t.name}

    assert found == {name for name in matrices if re.search(pattern, name)}
    assert found


def test_what_publish_reads_is_resolved_from_its_owners() -> None:
    """Serving of the model beats that of the fleet; the local registry is there by itself."""
    declared = params.Declaration(
        toolchain=params.Toolchain(llama_cpp_python="0.3.36", sha256="0" * 64),
        corpora={"evaluation": params.Corpus(path="e.txt", sha256="0" * 64)},
        models={
            "tiny": params.Model(
                source="path:x",
                revision="a" * 40,
                context_tokens=512,
                serving=params.ModelServing(parallel=3),
                stable="b" * 64,
                license="mit",
            )
        },
        quants={"tiny-Q8_0": params.Quant(model="tiny", type="Q8_0")},
        serving=params.Serving(parallel=7, kv_type="q8_0"),
        hosts={"here": params.DeclaredHost(memory_mib=1)},
    )

    found = params.publish_slice(declared, "tiny")

    assert (found.serving.parallel, found.serving.kv_type) == (3, "q8_0")
    assert (found.revision, found.stable, found.license) == ("a" * 40, "b" * 64, "mit")
    assert (found.registry.url, found.waivers) == ("file:registry", ())
    assert found.quants == {"tiny-Q8_0": "Q8_0"}
