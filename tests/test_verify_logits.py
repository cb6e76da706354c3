"""Outputs: a right conversion passes on every machine, what is computed wrongly never does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from architecture_factory import before
from gguf_faults import FAULTS
from hypothesis import given
from hypothesis import strategies as st
from verify_factory import EMBEDDED, converted

from pipelines import verify_logits
from pipelines.errors import DigestError, ToolError
from pipelines.params import Corpus

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.toolchain import Toolchain
    from pipelines.verify_subject import Subject

pytestmark = pytest.mark.toolchain


@pytest.fixture(scope="session")
def embedded(tools: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as the pinned converter makes it."""
    return converted(EMBEDDED, tmp_path_factory.mktemp("logits"), tools)


@pytest.fixture(scope="session")
def reference(
    embedded: Path, tools: Toolchain, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Subject, Path, dict[str, Any]]:
    """What upstream computes for the embedded model, asked once."""
    root = tmp_path_factory.mktemp("reference")
    one = before(root, EMBEDDED, embedded, tools)
    job = verify_logits.write_job(one, root / "job", streamed=False)
    return one, job, verify_logits.ask_upstream(one, job)


def judged(reference: tuple[Subject, Path, dict[str, Any]], gguf: Path) -> Any:
    """Ask llama.cpp about another GGUF, and judge it against the same reference."""
    one, job, upstream = reference
    job.write_text(json.dumps(json.loads(job.read_text()) | {"gguf": str(gguf)}))
    compared = verify_logits.ask_llama(one, job)
    return verify_logits.judge(compared, upstream, corpus_sha256=one.slice_.corpus.sha256)[0]


def test_the_embedded_model_computes_what_upstream_computes(
    tmp_path: Path, embedded: Path, tools: Toolchain
) -> None:
    """The record says over how many tokens, and both sides lose the same on the text."""
    check, logits, embeddings = verify_logits.check(before(tmp_path, EMBEDDED, embedded, tools))

    assert check.outcome == "PASS", check.sentence
    assert embeddings is None
    assert logits is not None
    assert logits.tokens_count == check.examined_count == 256
    assert logits.same_top >= 0.99
    assert 0 <= logits.kld_mean_nats < 1e-6
    assert logits.nll_gguf_nats == pytest.approx(logits.nll_upstream_nats, abs=1e-3)
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    "fault",
    [
        "rope theta", "rope scale", "norm epsilon", "swapped layers", "swapped gate and up",
        "swapped norms", "transposed weight", "layer scale", "tied embedding lost",
        "misread dtype", "NaN", "infinity",
    ],
)  # fmt: skip
def test_a_model_that_computes_something_else_never_passes(
    fault: str,
    tmp_path: Path,
    embedded: Path,
    reference: tuple[Subject, Path, dict[str, Any]],
) -> None:
    """Each fault is found by the outputs alone, whatever other layers look at."""
    FAULTS[fault](embedded, tmp_path / "bad.gguf")

    check = judged(reference, tmp_path / "bad.gguf")

    assert check.outcome == "FAIL", check.sentence
    assert check.differing_count > 0


def test_what_llama_cpp_refuses_fails_in_its_own_words(
    tmp_path: Path, embedded: Path, reference: tuple[Subject, Path, dict[str, Any]]
) -> None:
    """A GGUF that is cut off cannot be loaded: that is data, and no crash."""
    content = embedded.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])

    check = judged(reference, tmp_path / "cut.gguf")

    assert check.outcome == "FAIL"
    assert "llama.cpp cannot load it" in check.sentence


def test_weights_as_they_are_stored_give_the_same_numbers(
    tmp_path: Path, embedded: Path, tools: Toolchain
) -> None:
    """Where memory holds 16 bits only, each matrix is widened when its turn comes: no rounding."""
    one = before(tmp_path, EMBEDDED, embedded, tools)
    outputs = []
    for streamed in (False, True):
        job = verify_logits.write_job(one, tmp_path / f"job-{streamed}", streamed=streamed)
        assert "failure" not in verify_logits.ask_upstream(one, job)
        outputs.append((job.parent / "upstream.f32").read_bytes())
    assert outputs[0] == outputs[1]


def test_switched_off_is_skipped_and_never_passed(
    tmp_path: Path, embedded: Path, tools: Toolchain
) -> None:
    """Nothing is run, and the sentence says who decided that."""
    one = before(tmp_path, EMBEDDED, embedded, tools, logits="off")

    check, logits, embeddings = verify_logits.check(one)

    assert (check.outcome, check.examined_count, logits, embeddings) == ("SKIP", 0, None, None)
    assert "params.yaml" in check.sentence
    assert not (tmp_path / "log").exists()


def test_too_little_memory_is_skipped_with_what_is_missing(
    tmp_path: Path, embedded: Path, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate is made before anything is loaded, and the sentence says what to do."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 29))

    check, *_ = verify_logits.check(before(tmp_path, EMBEDDED, embedded, tools))

    assert check.outcome == "SKIP"
    assert "0.5 GiB are free" in check.sentence
    assert "verify.logits: off" in check.sentence


def test_an_architecture_that_transformers_does_not_know_is_skipped(
    tmp_path: Path, embedded: Path, tools: Toolchain
) -> None:
    """No code of the repository is run instead."""
    source = shutil.copytree(EMBEDDED, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "nobody_knows", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "evil.py").write_text("open('/tmp/never', 'w')\n")

    check, *_ = verify_logits.check(before(tmp_path, source, embedded, tools))

    assert check.outcome == "SKIP"
    assert "does not know 'nobody_knows'" in check.sentence


def test_weights_that_upstream_lacks_are_never_invented(
    tmp_path: Path, embedded: Path, tools: Toolchain
) -> None:
    """Upstream's library would take random numbers for a missing tensor: that proves nothing."""
    source = shutil.copytree(EMBEDDED, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (source / "config.json").write_text(json.dumps(config))

    check, *_ = verify_logits.check(before(tmp_path, source, embedded, tools))

    assert check.outcome == "SKIP"
    assert "no weights for model.layers" in check.sentence


def test_another_corpus_than_declared_is_an_error(
    tmp_path: Path, embedded: Path, tools: Toolchain
) -> None:
    """The agreement names the sha256 of the text, so that text it must be."""
    one = before(tmp_path, EMBEDDED, embedded, tools)
    wrong = Corpus(path="corpora/evaluation.txt", sha256="0" * 64)

    with pytest.raises(DigestError):
        verify_logits.check(
            dataclasses.replace(one, slice_=one.slice_.model_copy(update={"corpus": wrong}))
        )


def test_a_crash_proves_nothing(tmp_path: Path, embedded: Path, tools: Toolchain) -> None:
    """A process that dies is an error of the tool, with its log; what the tool lacks is named."""
    one = before(tmp_path, EMBEDDED, embedded, tools)
    source = shutil.copytree(EMBEDDED, tmp_path / "source")
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(ToolError):
        verify_logits.check(dataclasses.replace(one, source=source))

    (tmp_path / "empty/python").mkdir(parents=True)
    nothing = dataclasses.replace(tools, prefix=tmp_path / "empty")
    job = verify_logits.write_job(one, tmp_path / "job", streamed=False)
    (job.parent / "answer.json").write_text(
        json.dumps({"windows": [[1]], "width": 1, "pooling": None})
    )
    (job.parent / "upstream.f32").write_bytes(bytes(4))
    with pytest.raises(ToolError, match="No module named 'llama_cpp'"):
        verify_logits.ask_llama(dataclasses.replace(one, tools=nothing), job)


def answers(divergence: list[float], rounding: list[float]) -> tuple[dict[str, Any], Any]:
    """Build what the two processes answer, for the judgement alone."""
    count = len(divergence)
    compared = {
        "kld_nats": divergence, "same_top": [True] * count,
        "nll_upstream_nats": [1.0] * count, "nll_gguf_nats": [1.0] * count,
    }  # fmt: skip
    upstream = {
        "pooling": None, "rounding": [[each, 0.0] for each in rounding],
        "windows": [list(range(count))],
    }  # fmt: skip
    return compared, upstream


_SMALL = st.floats(0, 1, allow_subnormal=False)


@given(
    st.lists(_SMALL, min_size=50, max_size=80),
    st.lists(st.floats(0, 1e-2), min_size=50, max_size=80),
    st.floats(1, 1e6),
)
def test_more_divergence_never_improves_the_outcome(
    divergence: list[float], rounding: list[float], factor: float
) -> None:
    """Monotone: what failed fails with larger numbers, too."""
    worse = [each * factor for each in divergence]
    outcomes = [
        verify_logits.judge(*answers(each, rounding), corpus_sha256="0" * 64)[0].outcome
        for each in (divergence, worse)
    ]
    assert outcomes != ["FAIL", "PASS"]


def test_one_token_sent_to_another_expert_is_no_fault_but_many_are() -> None:
    """A rounding may move a few positions far; a conversion that is wrong moves all of them."""
    rounding = [1e-6] * 500
    one = [1e-6] * 499 + [2.0]
    many = [1e-6] * 450 + [2.0] * 50
    all_of_them = [1e-3] * 500
    outcomes = [
        verify_logits.judge(*answers(each, rounding), corpus_sha256="0" * 64)[0].outcome
        for each in (one, many, all_of_them)
    ]
    assert outcomes == ["PASS", "FAIL", "FAIL"]
