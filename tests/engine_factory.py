"""Records of a changed engine, and releases with real GGUFs, for the tests of `compare_engine`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import record_factory as make
import release_factory

from pipelines import compare_engine_effects, compare_engine_words, publishing, release_records
from pipelines.compare_engine_records import (
    Departure,
    EngineAnswers,
    EngineRecord,
    ReleaseTest,
)
from pipelines.compare_records import PairSample, SpeedComparison
from pipelines.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipelines.params import Declaration
    from pipelines.toolchain import Toolchain

OLD_COMMIT = "4df29be4f4c3673f428170fda944a5b19f743bb8"


def timed(change: float, *, noise: float = 0.002, count: int = 8, **fields: Any) -> SpeedComparison:
    """Build a test in which every pair shows one log-ratio, give or take some noise."""
    pairs = tuple(
        PairSample(
            index=index,
            order="BA" if index % 2 else "AB",
            champion_tok_s=100.0,
            challenger_tok_s=100.0,
            log_ratio=change + noise * (index - (count - 1) / 2) / count,
        )
        for index in range(count)
    )
    return make.speed_comparison("equal", pairs=pairs, **fields)


def departure(
    kld: float = 1e-5, ratio: float = 1.0, error: float = 1e-4, **fields: Any
) -> Departure:
    """Build how far something answers otherwise."""
    found: dict[str, Any] = {
        "kld_mean_nats": kld, "kld_low_nats": 0.9 * kld, "kld_high_nats": 1.1 * kld,
        "same_top": 0.999, "ppl_ratio": ratio, "ppl_ratio_error": error,
    }  # fmt: skip
    return Departure(**(found | fields))


def answers(found: Departure | None = None, **fields: Any) -> EngineAnswers:
    """Build the answers of an engine, judged as they are when they are measured."""
    engine = departure() if found is None else found
    outcome = compare_engine_effects.answers_outcome(engine)
    limit = compare_engine_effects.MAX_ENGINE_KLD_NATS
    said = compare_engine_words.answers_sentence(outcome, engine, limit)
    told: dict[str, Any] = {
        "corpus_sha256": make.sha256("evaluation"), "chunks_count": 100, "context_tokens": 512,
        "limit_nats": limit, "engine": engine, "model": departure(0.02), "both": departure(0.02),
        "outcome": outcome, "sentence": said,
    }  # fmt: skip
    return EngineAnswers(**(told | fields))


def release_test(outcome: str = "equal", **fields: Any) -> ReleaseTest:
    """Build what came of a release on the new engine."""
    found: dict[str, Any] = {
        "release": make.sha256("release"), "is_stable": True, "type": "Q4_K_M",
        "gguf_sha256": make.sha256("served"), "size_bytes": 1000, "made_with": OLD_COMMIT,
        "loads": outcome != "worse", "answers": departure() if outcome == "equal" else None,
        "decode_ratio": None, "outcome": outcome, "sentence": f"The release is {outcome}.",
    }  # fmt: skip
    return ReleaseTest(**(found | fields))


def engine_record(
    engine: float = 0.0, of_new: float | None = None, both: float | None = None, **fields: Any
) -> EngineRecord:
    """Build a record in which the engine makes decode faster by so much, as a log-ratio."""
    old = make.side(
        source="HEAD~1", gguf_sha256=make.sha256(f"{make.MODEL} champion"),
        llama_cpp_commit=OLD_COMMIT, toolchain_id="cpu-old",
    )  # fmt: skip
    speed = compare_engine_effects.speeds(
        [timed(engine)],
        [] if of_new is None else [timed(of_new)],
        [] if both is None else [timed(both)],
    )
    found: dict[str, Any] = {
        "model": make.MODEL, "context_tokens": make.CONTEXT_TOKENS, "champion": old,
        "challenger": make.side(), "machine": make.machine_id(), "validity": make.validity(),
        "speed": speed, "answers": answers(), "releases": (release_test(),), "releases_note": "",
        "releases_problem": "", "left_out": (), "outcome": "equal",
        "cause": compare_engine_effects.overall(speed), "sentence": "said", "budget_s": 60.0,
        "wall_s": 42.0, "measured_at": "2026-11-22T10:00:00Z",
    }  # fmt: skip
    return EngineRecord(**(found | fields))


def publish(
    root: Path, declared: Declaration, ggufs: Sequence[Path], tools: Toolchain
) -> list[str]:
    """Release files of one model one after the other; the last one is `stable`. Returns the ids."""
    store = open_store("local", declared, root)
    ids: list[str] = []
    real = release_factory.gguf_bytes
    for number, gguf in enumerate(ggufs):
        release_factory.gguf_bytes = lambda *_, gguf=gguf: gguf.read_bytes()
        try:
            made = release_factory.composed(
                root / "elsewhere", number, types=("Q4_K_M",), previous=ids[-1] if ids else None
            )
        finally:
            release_factory.gguf_bytes = real
        of_tools = made.release.tools.model_copy(update={"llama_cpp_commit": tools.commit})
        release = made.release.model_copy(update={"tools": of_tools})
        data = release_records.release_bytes(release)
        made = replace(made, release=release, data=data, id=release_records.release_id(data))
        by = release_factory.by(at=f"2027-01-31T12:00:0{number}Z")
        publishing.publish(made, store, release_factory.ledger(root), stable="latest", by=by)
        ids.append(made.id)
    return ids
