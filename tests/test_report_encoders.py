"""A report of an encoder speaks of cosines where one of another model speaks of divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import record_factory as make

from pipelines import choose, records, render, report, verdict, verdict_evidence
from pipelines.layout import Layout
from pipelines.load_records import EmbeddingCheck, metrics_rows
from pipelines.params import ReportSlice
from pipelines.verify_records import EmbeddingAgreement

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.load_records import LoadRun, LoadTestRecord
    from pipelines.report_tree import Report
    from pipelines.verdict import ModelVerdict

MODEL = "tiny-bert"
NUMBERS = {
    "Q8_0": {"prefill_tok_s": 9_400.0, "cosine_mean": 0.99991, "memory_mib": 60.0, "size_mib": 5.0},
    "Q4_K_M": {"prefill_tok_s": 11_000.0, "cosine_mean": 0.9946, "memory_mib": 42.0,
               "size_mib": 3.0},
    "Q2_K": {"prefill_tok_s": 12_000.0, "cosine_mean": 0.958, "memory_mib": 30.0, "size_mib": 2.0},
}  # fmt: skip
CHECK = EmbeddingCheck(
    texts_count=8,
    cosine_min=0.99999,
    limit=0.9999,
    outcome="PASS",
    sentence="the embeddings of 8 texts have a cosine of 1.00 or more with those that are due",
)


def run_of(concurrency: int | None, **changes: Any) -> LoadRun:
    """Build a run of embeddings: whole times alone."""
    return make.load_run(
        concurrency, ttft_ms=20.0, **changes
    ).model_copy(
        update={
            "ttft_ms": None, "tpot_ms": None, "gap_ms": None, "output_tokens_median": None,
            "output_tok_s": 0.0, "done_reasons": {"none": 40},
            "kept_count": {"local": {"e2e": 40}},
        }
    )  # fmt: skip


def load_test_of(winner: str) -> LoadTestRecord:
    """Build the load test of an encoder that keeps everything."""
    test = make.winner_test(
        winner,
        model=MODEL,
        golden=None,
        degenerate=None,
        embeddings=CHECK,
        runs=(*(run_of(many) for many in (1, 2, 4)), run_of(None)),
        gates=tuple(make.load_gate(name) for name in ("goodput", "memory")),
    )
    smokes = tuple(
        make.smoke(type_, served=make.served(type_, MODEL)) for type_ in NUMBERS if type_ != winner
    )
    return make.load_test_record({"local": winner}, MODEL, winners=(test,), smokes=smokes)


@pytest.fixture(name="built")
def _built(tmp_path: Path) -> Report:
    """The report of an encoder with a winner and a quant that misses the limit."""
    at = Layout(tmp_path)
    quantized = [
        make.quantize_record(type_, MODEL, size_mib=own["size_mib"])
        for type_, own in NUMBERS.items()
    ]
    measured = [make.encoder_record(type_, MODEL, **own) for type_, own in NUMBERS.items()]
    make.write_model(at, MODEL, quantized=quantized, measured=measured)
    chosen = choose.run(make.choose_slice(NUMBERS, MODEL, gates={}), at)
    records.write(at.model_record("choose", MODEL), chosen)
    records.write(at.model_record("load-test", MODEL), load_test_of("Q4_K_M"))
    judged = make.judge_slice(NUMBERS, MODEL, gates={})
    return report.build(ReportSlice(models={MODEL: judged}), at)


# --- the verdict ------------------------------------------------------------------------------


def judged(root: Path, *, check: EmbeddingCheck | None = CHECK, corpus: str = "evaluation",
           agreement: bool = True) -> ModelVerdict:  # fmt: skip
    """Judge an encoder by records as the stages leave them."""
    at = Layout(root)
    types = ("Q4_K_M",)
    make.write_model(
        at, MODEL,
        quantized=[make.quantize_record("Q4_K_M", MODEL)],
        measured=[make.encoder_record("Q4_K_M", MODEL)],
    )  # fmt: skip
    vectors = EmbeddingAgreement(
        corpus_sha256=make.sha256(corpus), texts_count=12, cosine_mean=1.0, cosine_min=0.99999
    )
    proof = make.verify_record(MODEL, logits=None, embeddings=vectors if agreement else None)
    records.write(at.model_record("verify", MODEL), proof)
    chosen = choose.run(make.choose_slice(types, MODEL, gates={}), at)
    records.write(at.model_record("choose", MODEL), chosen)
    tested = load_test_of("Q4_K_M")
    test = tested.winners[0].model_copy(update={"embeddings": check})
    tested = tested.model_copy(update={"winners": (test,), "smokes": ()})
    records.write(at.model_record("load-test", MODEL), tested)
    declared = make.judge_slice(types, MODEL, gates={})
    return verdict.judge(verdict_evidence.collect(declared, at, day="2026-11-21"))


def test_an_encoder_with_honest_records_is_promoted(tmp_path: Path) -> None:
    """Without a golden prompt, a decode speed or a divergence, none of which it has."""
    found = judged(tmp_path)

    assert (found.verdict, found.types) == ("PROMOTE", ("Q4_K_M",)), found.sentence


@pytest.mark.parametrize(
    ("changes", "expected", "words"),
    [
        ({"check": None}, "INVALID", "embeddings were not compared"),
        ({"check": CHECK.model_copy(update={"outcome": "FAIL"})}, "REJECT", "8 texts"),
        ({"check": CHECK.model_copy(update={"cosine_min": 0.5})}, "REJECT", "8 texts"),
        ({"check": CHECK.model_copy(update={"cosine_min": 0.5, "limit": 0.1})}, "REJECT", "8"),
        ({"corpus": "another text"}, "INVALID", "another held-out text"),
        ({"agreement": False}, "INVALID", "calls layer logits PASS without a number"),
    ],
)
def test_an_encoder_is_not_promoted_by_what_only_calls_itself_good(
    tmp_path: Path, changes: dict[str, Any], expected: str, words: str
) -> None:
    """Embeddings are judged by their numbers, over the declared text, or not promoted."""
    found = judged(tmp_path, **changes)

    assert found.verdict == expected
    assert words in found.sentence
    assert found.released == ()


# --- the report -------------------------------------------------------------------------------


def test_every_form_shows_cosines_and_no_divergence(built: Report) -> None:
    """Terminal, Markdown and page; the same numbers, and no column that nobody could fill."""
    forms = (render.terminal(built, width=200), render.markdown(built), render.html(built))

    for text in forms:
        assert "0.99460" in text
        assert "cosine" in text
        assert "same nearest" in text
        assert "11,000" in text
        for absent in ("nats", "PPL ratio", "same top", "kept ttft", "seen at work"):
            assert absent not in text
    assert "No min_cosine_mean is declared, so 0.99 holds" in forms[1]
    assert "over 100 texts of up to 512 tokens" in forms[1]


def test_the_page_names_the_cosine_of_the_winner(built: Report) -> None:
    """In the place of decode speed and divergence."""
    page = render.html(built)

    assert "<dt>Q4_K_M reads</dt>" in page
    assert "<dt>keeps a cosine of</dt><dd>0.99460</dd>" in page
    assert "decodes</dt>" not in page


def test_what_the_load_test_compared_is_told(built: Report) -> None:
    """Embeddings against the toolchain's, where another model has its golden prompts."""
    text = render.markdown(built)

    assert "the embeddings of 8 texts have a cosine of 1.00 or more" in text
    assert "golden prompts" not in text


def test_no_metric_of_an_encoder_speaks_of_tokens_that_nobody_generated() -> None:
    """`dvc metrics` shows whole times and requests."""
    (row,) = metrics_rows(load_test_of("Q4_K_M")).values()

    assert row["requests_s_c1"] == 8.0
    assert row["e2e_p50_ms_open"] > 0
    assert not [name for name in row if name.startswith(("output_tok_s", "ttft", "tpot"))]
