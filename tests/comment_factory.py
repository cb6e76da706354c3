"""
Comments of every state, made from records in folders and, for the history, in a real repository.

`python tests/comment_factory.py` writes the golden files in tests/data/comment again; look at the
difference before you commit it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import record_factory as make

from pipelines import choose, comment, comment_render, records
from pipelines.ci_records import (
    Budget,
    Leg,
    ModelPlan,
    PlannedRun,
    PlanProblem,
    PlanRecord,
)
from pipelines.comment import Side
from pipelines.layout import Layout
from pipelines.ledger import Ledger
from pipelines.load_records import EmbeddingCheck
from pipelines.release_records import Move
from pipelines.trees import Git
from pipelines.verify_records import EmbeddingAgreement

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipelines.comment_tree import Comment
    from pipelines.params import JudgeSlice

GOLDEN: Final = Path(__file__).parent / "data/comment"
MODEL: Final = make.MODEL
BASE: Final = "1a" * 20
HEAD: Final = "2b" * 20
DAY: Final = "2026-11-21"
RUN: Final = "https://github.example/owner/fleet/actions/runs/42"
FLEET: Final[dict[str, dict[str, float]]] = {
    "Q8_0": {"decode_tok_s": 412, "kld_mean_nats": 0.0014, "memory_mib": 60, "size_mib": 5},
    "Q5_K_M": {"decode_tok_s": 520, "kld_mean_nats": 0.0108, "memory_mib": 50, "size_mib": 4},
    "Q4_K_M": {"decode_tok_s": 598, "kld_mean_nats": 0.0313, "memory_mib": 42, "size_mib": 3},
    "Q2_K": {"decode_tok_s": 1234, "kld_mean_nats": 0.31, "memory_mib": 30, "size_mib": 2},
}
OLD: Final = {type_: FLEET[type_] for type_ in ("Q8_0", "Q5_K_M")}


# --- trees ------------------------------------------------------------------------------------


def write(
    at: Layout,
    model: str = MODEL,
    fleet: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    fetched: Mapping[str, Any] | None = None,
    shared: Mapping[str, Any] | None = None,
    **declared: Any,
) -> JudgeSlice:
    """
    Write the records of a model, chosen and load-tested; return by what it is judged.

    Args:
        at: A tree.
        model: Its key.
        fleet: Fields of the benchmark of each quant.
        fetched: Fields of the fetch record.
        shared: Fields of every benchmark.
        declared: Of `judge_slice` and `choose_slice`: hosts, gates.
    """
    numbers = FLEET if fleet is None else fleet
    built = [
        make.quantize_record(type_, model, size_mib=one.get("size_mib", 3.0))
        for type_, one in numbers.items()
    ]
    measured = [
        make.benchmark_record(type_, model, **{**one, **(shared or {})})
        for type_, one in numbers.items()
    ]
    make.write_model(at, model, quantized=built, measured=measured)
    if fetched:
        records.write(at.model_record("fetch", model), make.fetch_record(model, **fetched))
    chosen = choose.run(make.choose_slice(numbers, model, **declared), at)
    records.write(at.model_record("choose", model), chosen)
    winners = {one.host: one.winner for one in chosen.hosts if one.winner is not None}
    others = (type_ for type_ in numbers if type_ not in winners.values())
    smokes = tuple(make.smoke(type_, served=make.served(type_, model)) for type_ in others)
    slos = {one.host: make.LEVELS for one in chosen.hosts}
    tested = make.load_test_record(winners, model, smokes=smokes, slos=slos)
    records.write(at.model_record("load-test", model), tested)
    return make.judge_slice(numbers, model, **declared)


def write_encoder(at: Layout, model: str = MODEL, prefill_tok_s: float = 9_400.0) -> JudgeSlice:
    """Write the records of a model that makes embeddings."""
    types = ("Q8_0", "Q4_K_M")
    built = [make.quantize_record(type_, model) for type_ in types]
    measured = [
        make.encoder_record("Q8_0", model, prefill_tok_s=prefill_tok_s * 0.8, cosine_mean=0.9999),
        make.encoder_record("Q4_K_M", model, prefill_tok_s=prefill_tok_s),
    ]
    make.write_model(at, model, quantized=built, measured=measured)
    vectors = EmbeddingAgreement(
        corpus_sha256=make.sha256("evaluation"), texts_count=12, cosine_mean=1.0,
        cosine_min=0.99999,
    )  # fmt: skip
    proof = make.verify_record(model, logits=None, embeddings=vectors)
    records.write(at.model_record("verify", model), proof)
    chosen = choose.run(make.choose_slice(types, model, gates={}), at)
    records.write(at.model_record("choose", model), chosen)
    check = EmbeddingCheck(
        texts_count=8, cosine_min=0.99999, limit=0.9999, outcome="PASS",
        sentence="the embeddings of 8 texts have a cosine of 1.00 or more with those that are due",
    )  # fmt: skip
    runs = tuple(
        make.load_run(many, ttft_ms=20.0).model_copy(
            update={
                "ttft_ms": None, "tpot_ms": None, "gap_ms": None, "output_tokens_median": None,
                "output_tok_s": 0.0, "done_reasons": {"none": 40},
                "kept_count": {"local": {"e2e": 40}},
            }
        )
        for many in (1, 2, 4, None)
    )  # fmt: skip
    test = make.winner_test(
        "Q4_K_M", model=model, golden=None, degenerate=None, embeddings=check, runs=runs,
        gates=tuple(make.load_gate(name) for name in ("goodput", "memory")),
    )  # fmt: skip
    smokes = (make.smoke("Q8_0", served=make.served("Q8_0", model)),)
    tested = make.load_test_record({"local": "Q4_K_M"}, model, winners=(test,), smokes=smokes)
    records.write(at.model_record("load-test", model), tested)
    return make.judge_slice(types, model, gates={})


def release(at: Layout, model: str = MODEL, *registries: str) -> None:
    """Write into the ledger that a release is stable in these registries."""
    ledger = Ledger.load(at.ledger(model), model)
    for registry in registries or ("production",):
        move = Move(
            sequence=1, action="publish", release=make.sha256("a release"), previous=None,
            at="2026-11-20T12:00:00Z", who="Ada", why="it passed its gates", run=None,
        )  # fmt: skip
        ledger.append(registry, "stable", move)


def model_plan(model: str = MODEL, **changes: Any) -> ModelPlan:
    """Build the plan of a changed model."""
    fields: dict[str, Any] = {
        "model": model,
        "change": "changed",
        "what": (f"quants: {model}-Q4_K_M is new",),
        "line": 12,
        "runs": (
            PlannedRun(stage="quantize", key=f"{model}-Q4_K_M", why="Q4_K_M is new"),
            PlannedRun(stage="benchmark", key=f"{model}-Q4_K_M", why="Q4_K_M is new"),
            PlannedRun(stage="load-test", key=model, why="the choice may change"),
        ),
        "budget": Budget(gpu_minutes=3.5, disk_bytes=3 << 20, network_bytes=0),
        "covered": False,
    }  # fmt: skip
    return ModelPlan(**(fields | changes))


def plan_of(*models: ModelPlan, **changes: Any) -> PlanRecord:
    """Build the plan of a pull request."""
    names = tuple(one.model for one in models if one.runs)
    runs_on = ("self-hosted", "gpu")
    legs = tuple(
        Leg(host="local", models=(name,), runs_on=runs_on, primary=True, timeout_minutes=60)
        for name in names
    )
    fields: dict[str, Any] = {
        "base": BASE, "head": HEAD, "params_blob": None, "models": models,
        "legs": legs,
        "budget": Budget(gpu_minutes=3.5, disk_bytes=3 << 20, network_bytes=0),
    }  # fmt: skip
    return PlanRecord(**(fields | changes))


def compose(  # noqa: PLR0913 - each is one independent fact
    base: Layout | None,
    head: Layout,
    slices: Mapping[str, JudgeSlice],
    *,
    plan: PlanRecord | None = None,
    before: Mapping[str, JudgeSlice] | None = None,
    on: Mapping[str, Layout] | None = None,
    times_s: Mapping[str, Mapping[str, float]] | None = None,
    git: Git | None = None,
    commit: str = BASE,
) -> Comment:
    """Compose a comment of two trees."""
    common = {
        "base": commit if base else "", "head": HEAD, "plan": plan, "run_url": RUN,
        "commands": (f"fleet comment --dry-run --base {commit[:12]} --head {HEAD[:12]}",),
    }  # fmt: skip
    return comment.compose(
        Side(at=base, commit=commit) if base else None,
        Side(at=head, commit=HEAD, on=on or {}, times_s=times_s or {}),
        slices, before, common, git=git, day=DAY,
    )  # fmt: skip


# --- states -----------------------------------------------------------------------------------


def _trees(root: Path) -> tuple[Layout, Layout]:
    return Layout(root / "base"), Layout(root / "head")


def promote(root: Path) -> Comment:
    """A new quant wins, compared in turns with what was chosen; released before; a history."""
    head = Layout(root / "head")
    repository, commits = _repository(root / "repository")
    base = Layout(root / "repository")
    declared = write(head, shared={"measured_at": "2026-11-21T08:00:00Z"})
    release(base)
    then = make.quantize_record("Q5_K_M")
    compared = make.compare_record(
        "better",
        champion=make.side("Q5_K_M", source="the base", gguf_sha256=then.gguf.sha256),
        speed=(
            make.speed_comparison("better"),
            make.speed_comparison("equal", test="prefill", depth_tokens=0, tokens=512),
        ),
    )
    records.write(head.comparison(MODEL), compared)
    times_s = {MODEL: {"benchmark@tiny-llama-Q4_K_M": 140.0, "load-test@tiny-llama": 70.0}}
    return compose(
        base, head, {MODEL: declared}, plan=plan_of(model_plan()), times_s=times_s,
        git=repository, commit=commits[-1],
    )  # fmt: skip


def _repository(root: Path) -> tuple[Git, list[str]]:
    """Make a repository whose branch has a record of Q4_K_M at each of six commits."""
    at = Layout(root)
    root.mkdir(parents=True)
    _git(root, "init", "--quiet", "--initial-branch=main")
    commits = []
    for day, decode_tok_s in enumerate((571.0, 575.0, 560.0, 590.0, 588.0, 596.0), 10):
        fleet = {**OLD, "Q4_K_M": {**FLEET["Q4_K_M"], "decode_tok_s": decode_tok_s}}
        write(at, fleet=fleet, shared={"measured_at": f"2026-11-{day}T08:00:00Z"})
        _git(root, "add", "results")
        _git(root, "commit", "--quiet", "--message", f"records of day {day}")
        commits.append(_git(root, "rev-parse", "HEAD"))
    write(at, fleet=OLD, shared={"measured_at": "2026-11-16T08:00:00Z"})
    at.quant_record("benchmark", MODEL, "Q4_K_M").unlink()
    at.quant_record("quantize", MODEL, "Q4_K_M").unlink()
    return Git(root), commits


def _git(root: Path, *argv: str) -> str:
    """Run git with dates and names that make the same commits each time."""
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": str(root), "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "Ada", "GIT_AUTHOR_EMAIL": "ada@example.org",
        "GIT_COMMITTER_NAME": "Ada", "GIT_COMMITTER_EMAIL": "ada@example.org",
        "GIT_AUTHOR_DATE": "2026-11-21T00:00:00Z", "GIT_COMMITTER_DATE": "2026-11-21T00:00:00Z",
    }  # fmt: skip
    done = subprocess.run(
        ["git", *argv], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def new_model(root: Path) -> Comment:
    """A model that the base does not know."""
    base, head = _trees(root)
    base.root.mkdir(parents=True)
    return compose(base, head, {MODEL: write(head)}, plan=plan_of(model_plan(change="added")))


def bump(root: Path) -> Comment:
    """Upstream moved: another revision, another licence, one more file, other weights."""
    base, head = _trees(root)
    write(base, fetched={"revision": "c" * 40, "source": "hf:owner/repo", "license": "mit"})
    release(base, MODEL, "production", "mirror")
    files = (make.file_digest("model-2.safetensors"), make.file_digest("tokenizer.model"))
    faster = {type_: {**one, "decode_tok_s": one["decode_tok_s"] * 1.3}
              for type_, one in FLEET.items()}  # fmt: skip
    declared = write(
        head, fleet=faster,
        fetched={"source": "hf:owner/repo", "files": files, "parameters_count": 3_500_000},
    )  # fmt: skip
    declared = declared.model_copy(update={"source": "hf:owner/repo"})
    one = model_plan(what=(f"revision {'c' * 12} -> {make.sha256(MODEL)[:12]}",))
    return compose(base, head, {MODEL: declared}, plan=plan_of(one))


def other_hardware(root: Path) -> Comment:
    """The base was measured on another machine."""
    base, head = _trees(root)
    write(base, shared={"machine": make.machine_id(hw_id=make.sha256("another machine"))})
    return compose(base, head, {MODEL: write(head)})


def hold(root: Path) -> Comment:
    """One quant was measured while something else ran, and could be the winner."""
    base, head = _trees(root)
    write(base, fleet=OLD)
    fleet: dict[str, dict[str, Any]] = {
        **FLEET, "Q5_K_M": {**FLEET["Q5_K_M"], "decode_tok_s": 700.0,
                            "validity": make.validity("Another process computed on the card.")},
    }  # fmt: skip
    return compose(base, head, {MODEL: write(head, fleet=fleet)}, plan=plan_of(model_plan()))


def reject(root: Path) -> Comment:
    """No quant keeps the limit."""
    base, head = _trees(root)
    write(base, fleet=OLD)
    release(base)
    limit = {"max_kld_mean_nats": 0.0001}
    one = model_plan(what=("gates: max_kld_mean_nats 0.06 -> 0.0001",))
    return compose(base, head, {MODEL: write(head, gates=limit)}, plan=plan_of(one))


def invalid(root: Path) -> Comment:
    """Everything was measured while the machine was busy."""
    base, head = _trees(root)
    write(base, fleet=OLD)
    busy = make.validity("Other programs used 3.1 cores on average.")
    return compose(
        base, head, {MODEL: write(head, shared={"validity": busy})}, plan=plan_of(model_plan())
    )


def covered(root: Path) -> Comment:
    """The records in git are those of this commit."""
    base, head = _trees(root)
    write(base, fleet=OLD)
    one = model_plan(runs=(), covered=True)
    return compose(base, head, {MODEL: write(head)}, plan=plan_of(one))


def encoder(root: Path) -> Comment:
    """A model that makes embeddings."""
    base, head = _trees(root)
    write_encoder(base, prefill_tok_s=9_000.0)
    return compose(base, head, {MODEL: write_encoder(head)})


def hosts(root: Path) -> Comment:
    """Two machines measured; the second one's numbers are its own."""
    base, head = _trees(root)
    second = Layout(root / "second")
    spec = {"workstation": {"vram_mib": 24576}, "laptop": {"memory_mib": 1070}}
    limits = {"max_kld_mean_nats": 0.06, "min_decode_tok_s": 100.0}
    write(base, fleet=OLD, hosts=spec, gates=limits)
    declared = write(head, hosts=spec, gates=limits)
    slow = {type_: {**one, "decode_tok_s": one["decode_tok_s"] / 9} for type_, one in FLEET.items()}
    write(second, fleet=slow, hosts=spec, gates=limits)
    return compose(base, head, {MODEL: declared}, on={"laptop": second})


def models(root: Path) -> Comment:
    """Several models: promoted, rejected, an encoder, one that nobody measured, one removed."""
    base, head = _trees(root)
    names = ("alpha", "beta", "embedder", "unknown")
    write(base, "alpha", OLD)
    write(base, "gone")
    release(base, "gone")
    write_encoder(base, "embedder", 9_000.0)
    slices = {
        "alpha": write(head, "alpha"),
        "beta": write(head, "beta", gates={"max_kld_mean_nats": 0.0001}),
        "embedder": write_encoder(head, "embedder"),
        "unknown": make.judge_slice(["Q8_0"], "unknown"),
    }
    plan = plan_of(
        *(model_plan(name) for name in names), model_plan("gone", change="removed", runs=())
    )
    return compose(base, head, slices, plan=plan)


def measuring(_: Path) -> Comment:
    """A run is at work; the plan is known."""
    plan = plan_of(model_plan(), model_plan("other", runs=(), covered=True))
    return comment.measuring(plan, head=HEAD, run_url=RUN)


def started(_: Path) -> Comment:
    """A run is at work; nothing is known yet."""
    return comment.measuring(None, head=HEAD, run_url=RUN)


def waiting(_: Path) -> Comment:
    """Somebody has to let the run start."""
    return comment.ended("waiting", head=HEAD, run_url=RUN)


def over_budget(_: Path) -> Comment:
    """It costs too much."""
    plan = plan_of(
        model_plan(),
        over=("It takes about 720 GPU minutes; plan.max_gpu_minutes allows 240.",),
        allowed=False,
        budget=Budget(gpu_minutes=720.0, disk_bytes=1 << 40, unknown=("network: no record yet",)),
    )
    return comment.ended("over-budget", head=HEAD, plan=plan, run_url=RUN)


def problems(root: Path) -> Comment:
    """params.yaml is wrong."""
    texts = {
        31: 'unknown key "gate"; did you mean "gates"?',
        44: "revision: a full commit: 40 digits of 0-9a-f",
    }
    found = tuple(
        PlanProblem(file="params.yaml", line=line, column=5, text=text)
        for line, text in texts.items()
    )
    plan = plan_of(problems=found, legs=(), budget=Budget())
    return comment.build(None, Side(at=Layout(root), commit=HEAD), plan=plan, run_url=RUN)


def cancelled(_: Path) -> Comment:
    """Somebody stopped the run."""
    return comment.ended("cancelled", head=HEAD, run_url=RUN)


def failed(_: Path) -> Comment:
    """A job failed before there was something to judge."""
    failures = ("tiny-llama on local: quantize failed: llama-quantize ended with code 1.",)
    return comment.ended("failed", head=HEAD, failures=failures, run_url=RUN)


def removed(root: Path) -> Comment:
    """A model is declared no more."""
    base, head = _trees(root)
    write(base)
    release(base)
    head.root.mkdir(parents=True)
    return compose(base, head, {}, plan=plan_of(model_plan(change="removed", runs=())))


def empty(root: Path) -> Comment:
    """Nothing of any model differs."""
    return compose(Layout(root), Layout(root), {}, plan=plan_of())


STATES: Final[dict[str, Callable[[Path], Comment]]] = {
    each.__name__.replace("_", "-"): each
    for each in (
        promote, new_model, bump, other_hardware, hold, reject, invalid, covered, encoder, hosts,
        models, measuring, started, waiting, over_budget, problems, cancelled, failed,
        removed, empty,
    )
}  # fmt: skip


@functools.cache
def state(name: str) -> Comment:
    """Return the comment of a state; made once."""
    with tempfile.TemporaryDirectory() as folder:
        return STATES[name](Path(folder))


def main(names: Sequence[str]) -> None:
    """Write golden files again."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in names or STATES:
        text = comment_render.render(state(name))
        (GOLDEN / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
