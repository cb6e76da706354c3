"""An encoder under load in real engines: embeddings are the file's own, and only whole times."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import encoder_factory
import pytest
import record_factory as make
import sample
import serving_factory
from serving_factory import left_in

from pipelines import (
    benchmark,
    choose,
    declaration,
    hashing,
    load_embeddings,
    load_test,
    params,
    records,
    render,
    report,
    verdict_served,
)
from pipelines.errors import ParamsError
from pipelines.layout import Layout
from pipelines.llama_embeddings import Embedded, VectorError
from pipelines.load_records import LoadTestRecord, metrics_rows
from pipelines.serving import modelfile, server

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.load_records import WinnerTest
    from pipelines.params import LoadTestSlice
    from pipelines.records import ChoiceRecord
    from pipelines.serving.engine import Engine
    from pipelines.toolchain import Toolchain

ROOT = Path(__file__).resolve().parent.parent
FEW = {
    "concurrency": (1, 2), "requests": 4, "open_requests": 20, "warm_up_requests": 1,
    "smoke_requests": 2, "prompt_tokens": 48,
}  # fmt: skip
real = [pytest.mark.toolchain, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", name="at")
def _at(tmp_path_factory: pytest.TempPathFactory, tools: Toolchain) -> Layout:
    """A checkout with an encoder, two quants of it, and all that a load test reads."""
    at = encoder_factory.converted_encoder(tmp_path_factory.mktemp("encoder") / "fork")
    sample.take(at.root, "corpora", "modelfiles", "params.yaml")
    (at.root / "corpora/nouns.txt").write_text(encoder_factory.text_of(4000))
    for type_ in ("Q8_0", "Q4_K_M"):
        encoder_factory.add_quant(at, type_, tools)
    records.write(at.model_record("fetch", "tiny"), make.fetch_record("tiny", license="mit"))
    return at


def wanted(at: Layout, **changes: Any) -> LoadTestSlice:
    """Resolve a load test of few requests, with levels that are kept and one that cannot be."""
    declared = declaration.load(at.params)
    slice_ = params.load_test_slice(declared, next(iter(declared.models)))
    corpus = at.root / "corpora/nouns.txt"
    # No embedding has a first token, however fast: who judged it would have to reject.
    slo = params.Slo(ttft_ms=0.001, tpot_ms=0.001, e2e_ms=60_000.0, min_goodput=0.8)
    fields = {
        "model": "tiny",
        "quants": {"tiny-Q8_0": "Q8_0", "tiny-Q4_K_M": "Q4_K_M"},
        "context_tokens": 512,
        "corpus": params.Corpus(path="corpora/nouns.txt", sha256=hashing.digest(corpus).sha256),
        "threads": 1,
        "load_test": slice_.load_test.model_copy(update=FEW),
        "slos": {"local": slo},
    }
    return slice_.model_copy(update=fields | changes)


def choice() -> ChoiceRecord:
    """Say that one host chose Q8_0, and that both passed."""
    host = records.HostChoice(
        host="local", limit_mib=4096, margin_mib=1024, incumbent=None, winner="Q8_0",
        runner_up=None, verdict="PROMOTE", sentence="", binding="",
        candidates=tuple(
            records.Candidate(
                key=f"tiny-{type_}", type=type_, verdict="PASS", on_frontier=True, sentence="",
                cosine_mean=0.999,
            )
            for type_ in ("Q8_0", "Q4_K_M")
        ),
    )  # fmt: skip
    return records.ChoiceRecord(
        model="tiny", objective="speed", context_tokens=512, decode_depth_tokens=None, hw_id="hw",
        gates={}, notes=(), hosts=(host,),
    )  # fmt: skip


def require_whole(test: WinnerTest) -> None:
    """Look at what must be in the test of an encoder, and what must not."""
    assert test.failures == ()
    assert (test.golden, test.degenerate, test.regressions) == (None, None, ())
    assert test.embeddings is not None
    assert (test.embeddings.outcome, test.embeddings.texts_count) == ("PASS", 8)
    assert test.embeddings.cosine_min >= 0.9999
    assert [run.kind for run in test.runs] == ["closed", "closed", "open"]
    for run in test.runs:
        assert (run.ok_count, run.ttft_ms, run.tpot_ms) == (run.requests_count, None, None)
        assert run.e2e_ms is not None
        assert run.e2e_ms.p50 > 0
        assert 30 <= (run.prompt_tokens_median or 0) <= 70
        assert set(run.kept_count["local"]) == {"e2e"}
    assert {gate.name for gate in test.gates} == {"e2e", "goodput", "memory"}
    assert "were not judged" in " ".join(test.notes)
    assert test.calibration is not None


# --- real engines -----------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.timeout(300)
def test_ollama_serves_the_embeddings_that_the_measured_file_makes(
    at: Layout, tools: Toolchain, engine: Engine
) -> None:
    """The whole test of a winner, and the smoke of another quant, by /api/embed."""
    assert engine.ollama is not None
    record = load_test.load_test(wanted(at), choice(), at, tools, lock=at.root / "lock")

    assert left_in(at) == []
    assert record.engine is not None
    assert record.engine.kind == "ollama"
    (winner,), (smoke,) = record.winners, record.smokes
    require_whole(winner)
    assert (smoke.outcome, smoke.sentence) == (
        "PASS", "loaded, embeds right, 2 of 2 requests answered",
    )  # fmt: skip
    again = LoadTestRecord.model_validate_json(record.model_dump_json())
    assert again == record
    assert "ttft_p50_ms_open" not in metrics_rows(record).get("Q8_0", {})
    # On a busy machine the numbers may be INVALID; they are never something else for that.
    (verdict,) = record.verdicts
    assert verdict.verdict in {"PROMOTE", "INVALID", "HOLD"}


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.timeout(300)
def test_the_toolchains_server_serves_an_encoder_as_well(at: Layout, tools: Toolchain) -> None:
    """By /v1/embeddings, where llama-server is declared."""
    serving = wanted(at).serving.model_copy(update={"engine": "llama-server"})
    record = load_test.load_test(
        wanted(at, serving=serving), choice(), at, tools, lock=at.root / "lock"
    )

    assert left_in(at) == []
    require_whole(record.winners[0])
    assert record.smokes[0].outcome == "PASS"


@pytest.mark.toolchain
@pytest.mark.timeout(300)
def test_embeddings_of_another_file_are_a_failure(
    at: Layout, tools: Toolchain, engine: Engine
) -> None:
    """What is served is held against the file that was measured, vector by vector."""
    settings = serving_factory.settings(parallel=1)
    corpus = (at.root / "corpora/nouns.txt").read_text()
    log = at.log("load-test", "other")
    coarse = serving_factory.file(at.gguf("tiny", "tiny-Q4_K_M"), type_="Q4_K_M")
    fine = serving_factory.file(at.gguf("tiny", "tiny-Q8_0"), type_="Q8_0")
    due = load_embeddings.by_toolchain(fine, corpus, settings, tools, log=log)

    with (
        server.open_host(engine, settings, model="tiny", at=at, log=log) as host,
        host.load(coarse) as loaded,
    ):
        found = load_embeddings.check(due, loaded)

    assert found.outcome == "FAIL"
    assert found.cosine_min < 0.9999
    assert "0.9999 needed" in found.sentence


@pytest.mark.toolchain
def test_a_modelfile_of_conversations_is_refused_for_an_encoder(at: Layout, engine: Engine) -> None:
    """Ollama would take no notice of a system text, and its operator would think otherwise."""
    chatty = dataclasses.replace(
        serving_factory.file(at.gguf("tiny", "tiny-Q8_0"), type_="Q8_0"),
        modelfile=modelfile.Modelfile(version=1, system="Be brief.", parameters={"num_ctx": 512}),
    )
    log = at.log("load-test", "chatty")
    settings = serving_factory.settings(parallel=1)
    with (
        server.open_host(engine, settings, model="tiny", at=at, log=log) as host,
        pytest.raises(ParamsError, match="is an encoder, and the Modelfile states SYSTEM"),
        host.load(chatty),
    ):
        pass


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.timeout(300)
def test_a_bert_of_upstream_goes_through_the_chain(
    family: Callable[[str], tuple[Path, Path]], tools: Toolchain, engine: Engine, tmp_path: Path
) -> None:
    """Converted by the real converter, with its real vocabulary: measured, chosen, served, told."""
    assert engine.ollama is not None
    at = Layout(tmp_path / "fork")
    at.f16("tiny").parent.mkdir(parents=True)
    shutil.copy(family("bert")[1], at.f16("tiny"))
    sample.take(at.root, "corpora", "modelfiles", "params.yaml")
    (at.root / "corpora/nouns.txt").write_text(encoder_factory.text_of(4000))
    encoder_factory.record_conversion(at)
    encoder_factory.add_quant(at, "Q8_0", tools)
    records.write(at.model_record("fetch", "tiny"), make.fetch_record("tiny", license="mit"))
    records.write(at.model_record("calibrate", "tiny"), make.calibrate_record("tiny"))
    context_tokens = 256
    measuring_ = encoder_factory.benchmark_slice(at, "Q8_0").model_copy(
        update={"context_tokens": context_tokens}
    )
    measured = benchmark.benchmark(measuring_, at, tools, lock=at.root / "lock")
    assert isinstance(measured.quality, records.EmbeddingQuality)
    assert measured.quality.cosine_mean > 0.99
    # Whether the machine was quiet is not what is tested.
    quiet = measured.validity.model_copy(update={"verdict": "VALID", "reasons": ()})
    measured = measured.model_copy(update={"validity": quiet})
    records.write(at.quant_record("benchmark", "tiny", "Q8_0"), measured)
    slice_ = make.choose_slice(["Q8_0"], "tiny", gates={})
    slice_ = slice_.model_copy(update={"context_tokens": context_tokens})
    chosen = choose.run(slice_, at)
    assert (chosen.hosts[0].winner, chosen.hosts[0].verdict) == ("Q8_0", "PROMOTE")

    few = {"quants": {"tiny-Q8_0": "Q8_0"}, "context_tokens": context_tokens}
    record = load_test.load_test(wanted(at, **few), chosen, at, tools, lock=at.root / "lock")

    assert left_in(at) == []
    require_whole(record.winners[0])
    records.write(at.model_record("choose", "tiny"), chosen)
    records.write(at.model_record("load-test", "tiny"), record)
    judged = make.judge_slice(["Q8_0"], "tiny", gates={})
    built = report.build(params.ReportSlice(models={"tiny": judged}), at)
    assert "cosine" in render.terminal(built, width=160)


# --- faults that no engine shows on demand ----------------------------------------------------


class _Engine:
    """Answers with given embeddings, in the place of a loaded model."""

    def __init__(self, *answers: Embedded) -> None:
        self._answers = list(answers)

    def embed(self, _: str) -> Embedded:
        return self._answers.pop(0)


def checked(*answers: Embedded) -> Any:
    """Hold answers of an engine against two texts whose vectors are the axes of a plane."""
    due = load_embeddings.Due(
        texts=("one", "two"), embedded=(Embedded((1.0, 0.0), 3), Embedded((0.0, 1.0), 3))
    )
    loaded: Any = _Engine(*answers)
    return load_embeddings.check(due, loaded)


def test_a_text_that_the_engine_cuts_is_a_failure_even_if_the_vectors_agree() -> None:
    """Another number of tokens means that it read something else."""
    found = checked(Embedded((1.0, 0.0), 3), Embedded((0.0, 1.0), 2))

    assert found.outcome == "FAIL"
    assert "reads 2 tokens of a text of which llama.cpp reads 3" in found.sentence


def test_a_vector_a_little_beside_is_a_failure() -> None:
    """One text is enough, however well the others do."""
    found = checked(Embedded((1.0, 0.0), 3), Embedded((0.02, 0.9998), 3))

    assert (found.outcome, found.cosine_min < 0.9999) == ("FAIL", True)


def test_a_vector_of_other_dimensions_is_an_error_in_words() -> None:
    """Cosines between different spaces are not computed."""
    with pytest.raises(VectorError, match="2 dimensions, another 3"):
        checked(Embedded((1.0, 0.0, 0.0), 3), Embedded((0.0, 1.0), 3))


def test_a_test_without_the_comparison_promotes_nothing() -> None:
    """The verdict misses it as it misses golden prompts of a model that chats."""
    host = choice().hosts[0]
    test = make.winner_test(golden=None, degenerate=None)
    missing = verdict_served._missing(host, test, {}, embeds=True)

    assert "its embeddings were not compared with the toolchain's" in [each[0] for each in missing]
