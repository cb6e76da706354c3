"""The quality of an encoder: what is compared, over which texts, and what is never believed."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING

import encoder_factory
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import benchmark, calibrate, embedding_quality, llama_embeddings, records
from pipelines.benchmark import Bench
from pipelines.embedding_quality import compare, cut
from pipelines.errors import DigestError, ParamsError, ToolError, UpstreamError
from pipelines.llama_embeddings import VectorError
from pipelines.params import CalibrateSlice

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.records import BenchmarkRecord
    from pipelines.toolchain import Toolchain

TYPES = ("Q8_0", "Q2_K")


# --- the real tools ---------------------------------------------------------------------------


@pytest.fixture(scope="module", name="made")
def _made(tools: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A fleet with one encoder and two quants of it."""
    at = encoder_factory.converted_encoder(tmp_path_factory.mktemp("encoder") / "fleet")
    (at.root / "corpora").mkdir()
    (at.root / "corpora/evaluation.txt").write_text(encoder_factory.text_of(3000))
    for type_ in TYPES:
        encoder_factory.add_quant(at, type_, tools)
    return at


@pytest.fixture(scope="module", name="measured")
def _measured(made: Layout, tools: Toolchain) -> BenchmarkRecord:
    """The whole benchmark of one quant, run once."""
    wanted = encoder_factory.benchmark_slice(made, "Q2_K")
    return benchmark.benchmark(wanted, made, tools, lock=made.root / "lock")


def bench_of(at: Layout, tools: Toolchain, type_: str = "Q8_0") -> Bench:
    """Return the benchmark of an encoder as it is before its first part."""
    wanted = encoder_factory.benchmark_slice(at, type_)
    quantized = records.read(at.quant_record("quantize", "tiny", type_), records.QuantizeRecord)
    return Bench(
        wanted=wanted,
        at=at,
        tools=tools,
        model_size_bytes=sum(quantized.tensor_bytes.values()),
        execution=benchmark.of_encoder(
            benchmark.execution(wanted.benchmark, tools.backend, cores=1), wanted.context_tokens
        ),
        is_encoder=True,
    )


def f16_of(at: Layout) -> records.FileDigest:
    """Return the digest of the f16 that its record names."""
    return records.read(at.model_record("convert", "tiny"), records.ConvertRecord).gguf


@pytest.mark.alone
@pytest.mark.toolchain
def test_the_record_of_an_encoder_holds_prefill_memory_and_cosines(
    measured: BenchmarkRecord, made: Layout, tools: Toolchain
) -> None:
    """Nothing is decoded, the texts are as many and as long as declared, and Q2_K is worse."""
    assert [(s.test, s.depth_tokens, s.tokens) for s in measured.speed] == [("prefill", 0, 64)]
    assert measured.speed[0].median_tok_s > 0
    assert measured.memory.measured_mib > measured.size_bytes / 2**20
    read = records.BenchmarkRecord.model_validate_json(measured.model_dump_json())
    assert read == measured
    assert isinstance(measured.quality, records.EmbeddingQuality)
    coarse = measured.quality
    fine = embedding_quality.measure(bench_of(made, tools), f16_of(made))
    assert (fine.texts_count, fine.context_tokens, fine.dimensions) == (64, 64, 256)
    assert 64 * 6 <= fine.scored_tokens <= 64 * 64
    assert 0.999 < fine.cosine_mean <= 1
    assert coarse.cosine_min <= coarse.cosine_p01 <= coarse.cosine_mean < fine.cosine_mean
    assert coarse.same_nearest < fine.same_nearest <= 1


@pytest.mark.alone
@pytest.mark.toolchain
def test_the_f16_is_embedded_once_for_all_quants_and_kept_by_its_digest(
    measured: BenchmarkRecord, made: Layout, tools: Toolchain, tmp_path: Path
) -> None:
    """Scratch that was touched is made again; an f16 of other bytes is refused."""
    assert measured
    at = type(made)(shutil.copytree(made.root, tmp_path / "fleet"))
    (kept,) = at.scratch("tiny").glob("embeddings-*.json")
    bench, f16 = bench_of(at, tools), f16_of(at)
    before = kept.read_bytes()
    reference = embedding_quality.reference_embeddings(bench, f16)
    damaged = json.loads(before)
    damaged["vectors"][0][0] += 1e-3
    kept.write_text(json.dumps(damaged))
    stale = kept.with_name("embeddings-0000000000000000.json")
    stale.write_text("{}")

    assert embedding_quality.reference_embeddings(bench, f16) == reference
    assert kept.read_bytes() == before
    assert not stale.exists()

    kept.unlink()
    with at.f16("tiny").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(DigestError, match="not the file of its record"):
        embedding_quality.reference_embeddings(bench, f16)


@pytest.mark.toolchain
def test_an_encoder_that_does_not_say_its_pooling_is_refused_in_words(
    tools: Toolchain, tmp_path: Path
) -> None:
    """Its tokens would have a vector each, and a server would serve none of the text."""
    at = encoder_factory.converted_encoder(tmp_path / "fleet", pooling=None)
    (at.root / "corpora").mkdir()
    (at.root / "corpora/evaluation.txt").write_text(encoder_factory.text_of(500))
    encoder_factory.add_quant(at, "Q8_0", tools)

    with pytest.raises(UpstreamError, match="does not say how the vectors of its tokens"):
        benchmark.benchmark(
            encoder_factory.benchmark_slice(at, "Q8_0"), at, tools, lock=at.root / "lock"
        )


@pytest.mark.toolchain
def test_a_corpus_too_short_for_so_many_texts_is_refused(
    made: Layout, tools: Toolchain, tmp_path: Path
) -> None:
    """64 equal texts would look like 64 proofs."""
    ignored = shutil.ignore_patterns("scratch")
    at = type(made)(shutil.copytree(made.root, tmp_path / "fleet", ignore=ignored))
    (at.root / "corpora/evaluation.txt").write_text("time and way")

    with pytest.raises(ParamsError, match="different texts, 64 are needed"):
        embedding_quality.measure(bench_of(at, tools), f16_of(at))


@pytest.mark.toolchain
def test_an_importance_matrix_of_an_encoder_is_refused_before_the_tool_aborts(
    made: Layout, tools: Toolchain
) -> None:
    """llama-imatrix predicts next tokens, and an encoder has none."""
    wanted = CalibrateSlice(
        model="tiny",
        recipe=1,
        corpus=encoder_factory.benchmark_slice(made, "Q8_0").corpus,
        context_tokens=128,
        chunks=2,
    )
    with pytest.raises(ParamsError, match="tiny is an encoder") as refused:
        calibrate.calibrate(wanted, made, tools)

    assert "remove `calibration` of tiny" in refused.value.hint
    assert not made.imatrix_dir("tiny").exists()


# --- the comparison ---------------------------------------------------------------------------


def unit(*vectors: list[float]) -> list[tuple[float, ...]]:
    """Return vectors of length one."""
    return [tuple(np.asarray(each) / np.linalg.norm(each)) for each in vectors]


def test_equal_embeddings_agree_in_everything() -> None:
    """The f16 beside itself."""
    base = unit([1, 0.1], [0, 1], [-1, 0.3])

    found = compare(base, base)

    assert (found.mean, found.least, found.p01, found.same_nearest) == (1.0, 1.0, 1.0, 1.0)
    assert found.mean_error == pytest.approx(0, abs=1e-9)


def test_cosine_and_nearest_text_are_what_they_are_called() -> None:
    """One vector turned by 60 degrees: cosine 0.5, and another neighbour for two texts."""
    base = unit([1, 0], [0.9, 0.1], [0, 1], [-1, 0])
    turned = [*base[:1], *unit([math.cos(math.radians(70)), math.sin(math.radians(70))]), *base[2:]]

    found = compare(base, turned)

    assert found.least == pytest.approx(float(np.dot(base[1], turned[1])), abs=1e-12)
    assert found.mean == pytest.approx((3 + found.least) / 4)
    # Text 0 had 1, and 2 is now as near as 1 to it; text 1 had 0, now 2; text 2 had 1 and keeps it.
    assert found.same_nearest == pytest.approx(0.75)


def test_an_f16_that_embeds_everything_alike_is_no_yardstick() -> None:
    """Any quant of it would have a cosine of 1."""
    with pytest.raises(ToolError, match="the same vector of 3 different texts"):
        compare(unit([1, 1e-5], [1, 2e-5], [1, 0]), unit([1, 0], [0, 1], [1, 0]))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 3))
def test_cosines_lie_where_cosines_lie(seed: int, noise: float) -> None:
    """Least, percentile and mean are in this order, whatever the vectors."""
    random = np.random.default_rng(seed)
    base = random.normal(size=(70, 8))
    found = compare(
        unit(*base.tolist()), unit(*(base + noise * random.normal(size=base.shape)).tolist())
    )

    assert -1 <= found.least <= found.p01 <= 1
    assert found.least <= found.mean <= 1
    assert 0 <= found.same_nearest <= 1
    assert found.mean_error >= 0


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([], "no numbers"),
        (None, "no numbers"),
        ([1.0, "x"], "something else than numbers"),
        ([True, 0.0], "something else than numbers"),
        ([math.nan, 1.0], "has the length nan"),
        ([0.0, 0.0], "has the length 0"),
        ([3.0, 4.0], "has the length 5"),
    ],
)
def test_what_is_no_embedding_is_never_taken_for_one(value: object, why: str) -> None:
    """Neither from llama-server nor from Ollama."""
    with pytest.raises(VectorError, match=why):
        llama_embeddings.of_openai({"data": [{"embedding": value}], "usage": {"prompt_tokens": 3}})
    with pytest.raises(VectorError, match=why):
        llama_embeddings.of_ollama({"embeddings": [value], "prompt_eval_count": 3})


@pytest.mark.parametrize("count", [None, 0, -1, True, "3"])
def test_an_embedding_of_an_unknown_number_of_tokens_is_refused(count: object) -> None:
    """A text that was cut shows in nothing else."""
    with pytest.raises(VectorError, match="how many tokens"):
        llama_embeddings.of_ollama({"embeddings": [[1.0]], "prompt_eval_count": count})


@pytest.mark.parametrize("vectors", [[], [[1.0], [1.0]], None])
def test_another_number_of_embeddings_than_texts_is_refused(vectors: list[list[float]]) -> None:
    """One text, one vector."""
    with pytest.raises(VectorError, match="one text with one embedding"):
        llama_embeddings.of_ollama({"embeddings": vectors, "prompt_eval_count": 3})


# --- the texts --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.sampled_from("ab cdé日本 .\n"), min_size=200, max_size=800),
    st.integers(64, 90),
    st.integers(4, 200),
)
def test_texts_fit_the_window_and_no_two_are_alike(text: str, count: int, most: int) -> None:
    """Whatever the script: a word may be as long as the text."""

    def letters(of: str) -> int:
        return len(of) + 2

    try:
        texts = cut(text, count, most_tokens=most, count_tokens=letters)
    except ParamsError:
        return
    assert len(texts) == len(set(texts)) == count
    assert all(0 < letters(each) <= most for each in texts)
    assert texts == cut(text, count, most_tokens=most, count_tokens=letters)


def test_texts_are_of_varied_length_and_from_all_of_the_corpus() -> None:
    """From a few tokens up to the window, from its begin to its end."""
    corpus = " ".join(f"w{number:04d}" for number in range(4000))
    texts = cut(corpus, 100, most_tokens=128, count_tokens=lambda of: len(of.split()) + 2)

    lengths = sorted(len(each.split()) for each in texts)
    assert lengths[0] <= 8
    assert lengths[-1] >= 100
    assert len(set(lengths)) > 30
    assert texts[0].startswith("w0000")
    assert "w39" in texts[-1]
