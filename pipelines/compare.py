"""
`fleet compare MODEL`: champion against challenger, on this machine, in one interleaved run.

Both are measured in turns, process by process, so that what the machine does hits both alike. First
the champion is measured against itself: a machine that cannot tell the difference that matters
says so instead of giving a verdict. The result is results/MODEL/compare.json, with every sample;
`fleet repro` judges with it. docs/compare.md describes the method and what it was proven with.

    compare_sides      who the two are, and how their bytes come here
    compare_engine     the engine alone, where the two sides run on two of them
    compare_run        the processes in turns, the journal, what voids a pair
    compare_quality    divergence from f16, block by block
    compare_words      what the record says
    stats_paired       the statistics
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from pipelines import (
    architectures,
    benchmark,
    bundle,
    compare_engine_words,
    compare_quality,
    compare_run,
    compare_sides,
    compare_words,
    console,
    corpora,
    gguf_header,
    host_records,
    measuring,
    params,
    records,
    registries,
    runner,
    stats,
    stats_paired,
    toolchain,
    wording,
)
from pipelines.compare_engine_records import EngineRecord
from pipelines.compare_records import CompareRecord, FlipComparison, SpeedComparison
from pipelines.errors import FleetError, ParamsError
from pipelines.records import FileDigest, Validity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pipelines.compare_engine import Axis
    from pipelines.compare_records import QualityComparison
    from pipelines.compare_run import Pair, Plan, ProcessRun, Session
    from pipelines.compare_sides import Contender
    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.stats_paired import Judgement, Metric

# A machine that changed by so much while the champion alone was looked at is not one machine. The
# order of the pairs takes out what is steady; 0.5 % from one process to the next, which is much,
# makes 16 % of 32.
MAX_DRIFT: Final = 0.20
_MIN_PAIRS: Final = 4
# Of the text, for the divergence: by both sides, and by the f16, maybe of each.
READINGS: Final = 4
# Lower end of the true scatter over that of four pairs: sqrt(3 / 9.35), by the 97.5th percentile of
# chi squared with three degrees of freedom.
_LEAST_SCATTER: Final = 0.57


def main(  # noqa: PLR0913 - the options of the verb
    declared: Declaration,
    at: Layout,
    *,
    models: Sequence[str],
    base: str | None = None,
    champion: str | None = None,
    quant: str | None = None,
    host: str | None = None,
    budget_minutes: float | None = None,
    plan_only: bool = False,
    fresh: bool = False,
    if_comparable: bool = False,
    as_json: bool = False,
) -> int:
    """
    Do `fleet compare`.

    Args:
        declared: The declaration.
        at: The checkout.
        models: Keys of the models, one after the other.
        base: Commit whose choice is the champion; by default where this branch left the default
            one.
        champion: `stable` or a release id of the local registry, instead of a commit.
        quant: Type of the challenger; by default what is chosen.
        host: For which both are chosen, and whose records lie here; None for the first one.
        budget_minutes: Time that it may take; `compare.max_minutes` by default.
        plan_only: Say what would be measured and how long it takes, and stop.
        fresh: Forget what a run that was stopped has measured.
        if_comparable: A model that has no champion, or no challenger, is a notice and no error.
        as_json: Print the record as JSON.

    Raises:
        FleetError: A side cannot be had, the budget is too small, a tool failed.
    """
    for model in models:
        registries.require_model(declared, model)
    if host is not None:
        bundle.require_declared(declared, (), host)
    host_records.require(at, declared, host)
    compared = []
    for model in models:
        try:
            task = _task(declared, at, model, base, champion, quant, host, budget_minutes)
        except compare_sides.NothingToCompareError as error:
            if not if_comparable:
                raise
            console.notice(f"{model} is not compared: {error.message}")
            continue
        record = _compared(task, plan_only=plan_only, fresh=fresh, as_json=as_json)
        compared += [] if record is None else [model]
    runner.outputs(compared=" ".join(compared))
    return 0


def _task(  # noqa: PLR0913, PLR0917 - the options of the verb
    declared: Declaration,
    at: Layout,
    model: str,
    base: str | None,
    champion: str | None,
    quant: str | None,
    host: str | None,
    budget_minutes: float | None,
) -> Task:
    """Find the two sides of one model."""
    at.log("compare", model).unlink(missing_ok=True)
    new = compare_sides.challenger(declared, at, model, quant, host=host)
    old = (
        compare_sides.of_release(declared, at, model, champion)
        if champion is not None
        else compare_sides.of_commit(at, model, base, new.side, host=host)
    )
    budget_s = 60.0 * (declared.compare.max_minutes if budget_minutes is None else budget_minutes)
    return Task(declared, at, model, old, new, budget_s, host)


def _compared(task: Task, *, plan_only: bool, fresh: bool, as_json: bool) -> CompareRecord | None:
    """Compare one model; None if nothing was measured."""
    if task.is_same:
        # No record: nothing was measured, and one of an earlier comparison stays as it is.
        same = task.nothing_to_compare()
        task.drop_stale_engine()
        if as_json:
            registries.print_json(json.loads(same.model_dump_json()))
        else:
            console.out(same.sentence)
        return None
    with measuring.one_at_a_time(toolchain.default_cache_root(), f"compare {task.model}"):
        bench = task.prepare(fresh=fresh)
        if plan_only:
            return None
        record = task.run(bench)
        _finish(task, record, as_json=as_json)
        if bench.axis is not None:
            _finish_engine(task, bench.axis.measure(record), as_json=as_json)
            bench.axis.forget()
        # Only now: until here a run that is killed goes on with what was measured.
        bench.session.journal.remove()
    return record


def _finish(task: Task, record: CompareRecord, *, as_json: bool) -> None:
    """Write the record, and say what it says."""
    path = task.at.comparison(task.model)
    # That of another comparison speaks of nothing any more; this one's is written after it.
    task.at.engine_record(task.model).unlink(missing_ok=True)
    records.write(path, record)
    if runner.in_actions():
        runner.summary(_markdown(record))
    if as_json:
        registries.print_json(json.loads(record.model_dump_json()))
        return
    if compare_words.rows(record):
        console.out("\n".join(compare_words.table(record)))
        console.out("")
    for line in compare_words.sentences(record):
        console.out(line)
    where = path.relative_to(task.at.root)
    console.out(f"Written to {where}; `fleet repro` judges with it.")


def _finish_engine(task: Task, record: EngineRecord, *, as_json: bool) -> None:
    """Write what was found of the engine alone, and say what it says."""
    path = task.at.engine_record(task.model)
    records.write(path, record)
    rows, said = compare_engine_words.rows(record), compare_engine_words.sentences(record)
    if runner.in_actions():
        title = f"The engine alone: {record.model}"
        runner.summary(_as_markdown(title, compare_engine_words.HEADS, rows, said))
    where = path.relative_to(task.at.root)
    if as_json:
        console.info(f"{record.sentence} Written to {where}.")
        return
    lines = ["", *compare_engine_words.table(record)] if rows else []
    console.out("\n".join([*lines, "", *said, f"Written to {where}."]))


def _markdown(record: CompareRecord) -> str:
    """Say what a record says as the summary of a job."""
    rows = [row.cells for row in compare_words.rows(record)]
    title = f"fleet compare: {record.model}"
    return _as_markdown(title, compare_words.HEADS, rows, compare_words.sentences(record))


def _as_markdown(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], sentences: Sequence[str]
) -> str:
    from pipelines.render import escape_markdown  # noqa: PLC0415 - jinja2

    lines = [f"### {escape_markdown(title)}"]
    if rows:
        lines += ["", "| " + " | ".join(heads) + " |"]
        lines += ["|" + "---|" * len(heads)]
        lines += ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in rows]
    for sentence in sentences:
        lines += ["", escape_markdown(sentence)]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """
    A comparison that is laid out: nothing of it but the warm-up was measured.

    Attributes:
        hardware: This machine.
        plan: What is run.
        files: The two GGUFs, below the checkout.
        sides: The two as they are run.
        session: Where it stands.
        estimate: How long it takes.
        axis: The engine alone; None where both sides run on one.
    """

    hardware: dict[str, Any]
    plan: Plan
    files: tuple[Path, Path]
    sides: tuple[compare_run.Runner, compare_run.Runner]
    session: Session
    estimate: Estimate
    axis: Axis | None


@dataclass(frozen=True)
class Task:
    """One comparison: who, where, and how long it may take."""

    declared: Declaration
    at: Layout
    model: str
    champion: Contender
    challenger: Contender
    budget_s: float
    host: str | None = None

    @property
    def is_same(self) -> bool:
        """Whether both are the same bytes, run by the same llama.cpp."""
        old, new = self.champion.side, self.challenger.side
        return (old.gguf_sha256, old.toolchain_id) == (new.gguf_sha256, new.toolchain_id)

    def nothing_to_compare(self) -> CompareRecord:
        """Return the record of two that are one."""
        hardware = measuring.this_machine(self.at)
        validity = Validity(
            verdict="VALID", reasons=(), notes=(), load_before=0.0, load_after=0.0,
            steal_share=0.0, gpu_info="",
        )  # fmt: skip
        old = self.champion.side
        said = (
            f"Nothing to compare: {compare_words.side(self.challenger.side)} is the same file, run "
            f"by the same llama.cpp, as that of {console.clean(old.source)}. `--base HEAD~1` and "
            "`--champion stable` name other champions."
        )
        return self._record(hardware, validity, sentence=said, outcome="equal")

    def drop_stale_engine(self) -> None:
        """Remove what was found of an engine that this checkout does not run any more."""
        path = self.at.engine_record(self.model)
        known = records.read_or_reason(path, EngineRecord)
        if isinstance(known, str) or known.challenger != self.challenger.side:
            path.unlink(missing_ok=True)

    def prepare(self, *, fresh: bool = False) -> Bench:
        """
        Bring both files, run each side once, and say how long all will take.

        Raises:
            FleetError: A file cannot be had, or a side does not run.
        """
        hardware = measuring.this_machine(self.at)
        brought = [
            compare_sides.bring(self.declared, self.at, self.model, each, each.gguf)
            for each in (self.champion, self.challenger)
        ]
        plan = plan_of(
            self.declared,
            self.model,
            brought[1],
            backend=self.challenger.tools.backend,
            cores=hardware["cpu"]["cores_count"],
        )
        sides = [
            compare_run.Runner(
                tools=each.tools,
                model=str(file.relative_to(self.at.root)),
                model_size_bytes=tensor_bytes(file),
            )
            for each, file in zip((self.champion, self.challenger), brought, strict=True)
        ]
        key = compare_run.journal_key(facts_of((self.champion, self.challenger), hardware, plan))
        path = self.at.scratch(self.model) / f"compare-{key}.jsonl"
        for other in self.at.scratch(self.model).glob("compare-*.jsonl"):
            if fresh or other != path:
                other.unlink(missing_ok=True)
        session = compare_run.Session(
            plan=plan,
            sides={"A": sides[0], "B": sides[1]},
            root=self.at.root,
            log=self.at.log("compare", self.model),
            journal=compare_run.Journal(path, key),
            budget_s=self.budget_s,
        )
        if session.journal.resumed:
            console.info(
                f"going on after {wording.counted(len(session.journal.runs), 'measured run')} of "
                "llama-bench"
            )
        estimate = estimate_of(session, self._quality_tokens(plan))
        bench = Bench(
            hardware=hardware,
            plan=plan,
            files=(brought[0], brought[1]),
            sides=(sides[0], sides[1]),
            session=session,
            estimate=estimate,
            axis=None,
        )
        axis = self._axis(bench, fresh=fresh)
        console.info(f"{self._who()}: {estimate.sentence}")
        if axis is not None:
            before_s = estimate.total_s(plan.pairs)
            console.info(axis.estimate.sentence(axis.what, before_s, self.budget_s))
        return replace(bench, axis=axis)

    def _axis(self, bench: Bench, *, fresh: bool) -> Axis | None:
        """Lay out the engine alone, where the two sides run on two of them."""
        from pipelines import compare_engine, compare_engine_releases  # noqa: PLC0415 - it uses us

        compare_engine.sweep(self.at, self.model, fresh=fresh)
        if not compare_engine.differs(self.champion, self.challenger):
            return None
        released = compare_engine_releases.released(self.declared, self.at, self.model, self.host)
        return compare_engine.Axis(
            declared=self.declared,
            at=self.at,
            model=self.model,
            champion=self.champion,
            challenger=self.challenger,
            files=bench.files,
            plan=bench.plan,
            hardware=bench.hardware,
            budget_s=self.budget_s,
            estimate=compare_engine.estimate_of(
                bench.estimate,
                releases=len(released.found),
                is_one_file=self.champion.side.gguf_sha256 == self.challenger.side.gguf_sha256,
            ),
            released=released,
            spent_s=lambda: bench.session.spent_s,
        )

    def run(self, bench: Bench) -> CompareRecord:
        """
        Measure, and judge.

        Raises:
            ParamsError: It does not fit the budget.
            FleetError: A tool failed.
        """
        bench.estimate.require()
        measured = measure(bench.session, doubling_fits=bench.estimate.doubling_fits)
        quality, notes = self._quality(bench.plan, bench.files, bench.sides)
        return self._record(
            bench.hardware,
            measured.validity,
            speed=measured.speed,
            quality=quality,
            flips=self._flips(),
            doubled=measured.doubled,
            void_pairs=tuple(bench.session.void),
            notes=notes,
            wall_s=round(bench.session.spent_s, 3),
        )

    def _who(self) -> str:
        return (
            f"{compare_words.side(self.challenger.side)} against "
            f"{compare_words.side(self.champion.side)}"
        )

    def _record(self, hardware: dict[str, Any], validity: Validity, **parts: Any) -> CompareRecord:  # noqa: ANN401 - fields of the record
        speed: tuple[SpeedComparison, ...] = parts.get("speed", ())
        quality: QualityComparison | None = parts.get("quality")
        flips: tuple[FlipComparison, ...] = parts.get("flips", ())
        outcomes = [one.outcome for one in speed if one.is_gated]
        outcomes += [quality.outcome] if quality is not None and quality.same_f16 else []
        outcomes += [one.outcome for one in flips]
        invalid = validity.verdict == "INVALID"
        given: dict[str, Any] = {
            "model": self.model,
            "context_tokens": self.declared.models[self.model].context_tokens,
            "champion": self.champion.side,
            "challenger": self.challenger.side,
            "machine": measuring.machine_id(hardware, self.challenger.tools),
            "validity": validity,
            "speed": (),
            "quality": None,
            "flips": (),
            "outcome": "undecided" if invalid else stats_paired.worst_of(outcomes),
            "sentence": "",
            "doubled": False,
            "budget_s": self.budget_s,
            "wall_s": 0.0,
            "measured_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        record = CompareRecord(**(given | parts))
        said = record.sentence or compare_words.outcome_sentence(record)
        return record.model_copy(update={"sentence": said})

    # quality

    def _quality_tokens(self, plan: Plan) -> int:
        """Tokens that are read for the divergence: both sides, and the f16, maybe of each."""
        if plan.is_encoder:
            return 0
        quality = self.declared.benchmark.quality
        return READINGS * quality.chunks * quality.context_tokens

    def _quality(
        self, plan: Plan, files: Sequence[Path], sides: Sequence[compare_run.Runner]
    ) -> tuple[QualityComparison | None, tuple[str, ...]]:
        """Compare the divergences; None, with the reason, where that cannot be done."""
        if plan.is_encoder:
            said = (
                "The embeddings of an encoder are not compared here: `choose` holds those of each "
                "quant against its f16 (min_cosine_mean)."
            )
            return None, (said,)
        wanted = params.benchmark_slice(self.declared, self.challenger.side.key)
        corpora.require(wanted.corpus, self.at, "evaluation text")
        same = self.champion.side.f16_sha256 == self.challenger.side.f16_sha256
        found = []
        for each, file, program in zip((self.champion, self.challenger), files, sides, strict=True):
            wanted_f16 = self.challenger.f16 if same else each.f16
            if wanted_f16 is None:
                reason = "the champion has an f16 of its own, which no release holds"
                return None, (f"Divergence is not compared: {reason}.",)
            try:
                f16 = compare_sides.bring(self.declared, self.at, self.model, each, wanted_f16)
            except FleetError as error:
                return None, (f"Divergence is not compared: {wording.clause(error.message)}.",)
            subject = compare_quality.Subject(
                gguf=file,
                model_size_bytes=program.model_size_bytes,
                tools=each.tools,
                f16=f16,
                f16_digest=FileDigest(
                    name=f16.name,
                    size_bytes=wanted_f16.size_bytes,
                    sha256=wanted_f16.sha256,
                    md5=wanted_f16.md5 or "",
                ),
            )
            found.append(compare_quality.measure(self.at, wanted, plan.execution, subject))
        compared = compare_quality.compare(
            *found,
            corpus_sha256=wanted.corpus.sha256,
            effect=self.declared.compare.min_quality_effect,
            same_f16=same,
        )
        return compared, ()

    # items

    def _flips(self) -> tuple[FlipComparison, ...]:
        """Compare item by item what both records of task evals hold of the two files."""
        old, new = self.champion, self.challenger
        if old.evals is None or new.evals is None:
            return ()
        found = []
        for mine in new.evals.sets:
            theirs = next((one for one in old.evals.sets if one.name == mine.name), None)
            if theirs is None or theirs.set_sha256 != mine.set_sha256 or mine.is_void:
                continue
            before = next(
                (q.outcomes for q in theirs.quants if q.gguf_sha256 == old.side.gguf_sha256), ""
            )
            after = next(
                (q.outcomes for q in mine.quants if q.gguf_sha256 == new.side.gguf_sha256), ""
            )
            if before and len(before) == len(after):
                found.append(flips(mine.name, before, after, self.declared.evaluate.alpha))
        return tuple(found)


def flips(name: str, before: str, after: str, alpha: float) -> FlipComparison:
    """Compare the outcomes (`1` right, `0` wrong) of two on the same items."""
    pairs = list(zip(before, after, strict=True))
    lost = sum(pair == ("1", "0") for pair in pairs)
    won = sum(pair == ("0", "1") for pair in pairs)
    p_value = stats_paired.mcnemar_p(lost, won)
    outcome: Any = "worse" if p_value < alpha else "equal"
    return FlipComparison(
        name=name,
        items_count=len(pairs),
        lost_count=lost,
        won_count=won,
        p_value=p_value,
        outcome=outcome,
        sentence=compare_words.flips_sentence(name, lost, won, p_value, outcome),
    )


# --- the plan ---------------------------------------------------------------------------------


def facts_of(
    both: tuple[Contender, Contender], hardware: dict[str, Any], plan: Plan, **more: object
) -> dict[str, object]:
    """Return what decides what is measured: samples of anything else are not gone on with."""
    return {
        "sides": [each.side.model_dump() for each in both],
        "hw_id": hardware["hw_id"],
        # Driver, kernel and governor, and the very programs, which may be built anew.
        "env_ids": [measuring.machine_id(hardware, each.tools).env_id for each in both],
        "programs": [each.tools.manifest_text() for each in both],
        "tests": [vars(test) for test in plan.tests],
        "run": [plan.repetitions, plan.execution.argv(), plan.is_encoder],
        **more,
    }


def plan_of(declared: Declaration, model: str, gguf: Path, *, backend: str, cores: int) -> Plan:
    """Resolve what is run: the tests of `benchmark`, in pairs as `compare` declares them."""
    tested, wanted = declared.benchmark, declared.compare
    header = gguf_header.read(gguf)
    experts = params.served_as(declared, model).cpu_moe_layers
    run_as = benchmark.execution(
        tested,
        backend,
        cores=cores,
        cpu_moe_layers=architectures.cpu_moe_layers(header, experts),
    )
    is_encoder = architectures.is_encoder(header)
    context_tokens = declared.models[model].context_tokens
    plan = compare_run.Plan(
        pairs=wanted.pairs,
        control_pairs=wanted.control_pairs,
        repetitions=wanted.repetitions,
        dropped_repetitions=wanted.dropped_repetitions,
        prompt_tokens=min(tested.prompt_tokens, context_tokens)
        if is_encoder
        else tested.prompt_tokens,
        generate_tokens=0 if is_encoder else tested.generate_tokens,
        depths=(0,) if is_encoder else tested.depths,
        execution=benchmark.of_encoder(run_as, context_tokens) if is_encoder else run_as,
        effects={"decode": wanted.min_decode_effect, "prefill": wanted.min_prefill_effect},
        is_encoder=is_encoder,
    )
    compare_run.refuse_wrong_plan(plan)
    return plan


def tensor_bytes(gguf: Path) -> int:
    """Sum up the tensor data of a file, as llama-bench will report it."""
    return sum(tensor.size_bytes for tensor in gguf_header.read(gguf).tensors)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How long a comparison takes, from one process of each side, and what of it fits."""

    plan: Plan
    process_s: float
    quality_s: float
    budget_s: float

    def total_s(self, pairs: int) -> float:
        """Time of a comparison of so many pairs."""
        return self.process_s * 2 * (1 + self.plan.control_pairs + pairs) + self.quality_s

    @property
    def doubling_fits(self) -> bool:
        """Whether there would be time for as many pairs again."""
        return self.total_s(2 * self.plan.pairs) <= self.budget_s

    @property
    def sentence(self) -> str:
        """Say it beforehand."""
        plan = self.plan
        once, twice = self.total_s(plan.pairs), self.total_s(2 * plan.pairs)
        doubling = (
            f"at most {compare_run.minutes(twice)} with one doubling"
            if self.doubling_fits
            else f"no time for a doubling, which would make it {compare_run.minutes(twice)}"
        )
        return (
            f"{wording.counted(plan.pairs, 'pair')} and {plan.control_pairs} of control x "
            f"{wording.counted(len(plan.tests), 'test')}, about {compare_run.minutes(once)}, "
            f"{doubling}; budget {compare_run.minutes(self.budget_s)}"
        )

    def require(self) -> None:
        """
        See that it fits.

        Raises:
            ParamsError: It does not; the hint says what would.
        """
        once = self.total_s(self.plan.pairs)
        if once <= self.budget_s:
            return
        fit = math.floor(
            (self.budget_s - self.quality_s) / (2 * self.process_s) - 1 - self.plan.control_pairs
        )
        fewer = f", or set compare.pairs to {fit}" if fit >= _MIN_PAIRS else ""
        raise ParamsError(
            f"this comparison takes about {compare_run.minutes(once)}, the budget is "
            f"{compare_run.minutes(self.budget_s)}: nothing was measured.",
            hint=f"--budget {math.ceil(once / 60)}{fewer}, or lower compare.repetitions.",
        )


def estimate_of(session: Session, quality_tokens: int) -> Estimate:
    """Run each side once, and take from that how long all will take."""
    console.step("warm-up: one process of each side")
    walls = session.warm_up()
    first = session.journal.find("warm-up", 0, 0, "B")
    prefills = [
        stats.median(samples)
        for test, samples in zip(
            session.plan.tests, first.samples_tok_s if first else (), strict=False
        )
        if test.test == "prefill"
    ]
    return Estimate(
        plan=session.plan,
        process_s=sum(walls.values()) / len(walls),
        quality_s=quality_tokens / max(prefills) if prefills else 0.0,
        budget_s=session.budget_s,
    )


# --- speed ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The speed of both, judged, and whether it may be believed."""

    speed: tuple[SpeedComparison, ...]
    validity: Validity
    doubled: bool


def measure(
    session: Session, *, doubling_fits: bool = True, names: str = "champion and challenger"
) -> Measured:
    """
    Measure the champion against itself, then both in turns, and judge.

    Args:
        session: Where it stands.
        doubling_fits: Whether there is time for as many pairs again.
        names: Of the two, for people.

    Returns:
        The comparison; INVALID, with what to do, where the machine could not tell.
    """
    plan = session.plan
    control: tuple[Pair, ...] = ()
    pairs: list[Pair] = []
    reasons: list[str] = []
    try:
        who = names.partition(" and ")[0]
        console.step(f"control: {wording.counted(plan.control_pairs, 'pair')} of the {who}")
        control = session.control()
        reasons += too_noisy(plan, control)
        if not reasons:
            console.step(f"{wording.counted(plan.pairs, 'pair')} of {names}")
            for end in (plan.pairs, 2 * plan.pairs):
                session.pairs(pairs, end, _teller(plan, end))
                outcome = stats_paired.worst_of(
                    [one.outcome for one in judge(plan, pairs) if one is not None]
                )
                if outcome != "undecided" or end > plan.pairs or not doubling_fits:
                    break
                console.info("undecided: as many pairs again")
    except compare_run.UnmeasurableError as error:
        reasons.append(str(error))
    speed = tuple(_speed(plan, control, pairs))
    reasons += [] if reasons else drifted(speed)
    return Measured(
        speed=speed,
        validity=certify(session, control, pairs, reasons),
        doubled=len(pairs) > plan.pairs,
    )


def metrics(plan: Plan, pairs: Sequence[Pair]) -> list[Metric]:
    """Return the log-ratios of each test."""
    return [
        stats_paired.Metric(
            differences=tuple(
                pair.sample(number, plan.dropped_repetitions).log_ratio for pair in pairs
            ),
            effect=plan.effects[test.test],
            is_gated=number in plan.gated,
        )
        for number, test in enumerate(plan.tests)
    ]


def judge(plan: Plan, pairs: Sequence[Pair]) -> list[Judgement | None]:
    """Judge the gated tests; None stands for those that decide nothing."""
    judged = stats_paired.judge(metrics(plan, pairs))
    return [one if number in plan.gated else None for number, one in enumerate(judged)]


def too_noisy(plan: Plan, control: Sequence[Pair]) -> list[str]:
    """Say why this machine cannot tell the differences that matter, if so."""
    found = []
    for number in plan.gated:
        test = plan.tests[number]
        effect = plan.effects[test.test]
        control_d = [pair.sample(number, plan.dropped_repetitions).log_ratio for pair in control]
        half = stats_paired.reachable_half_width(control_d, 2 * plan.pairs)
        # So few pairs may show twice the scatter that there is. A machine is refused only if it is
        # too noisy beyond doubt: where the pairs leave it undecided, they say so themselves.
        half *= _LEAST_SCATTER
        if half > effect:
            found.append(
                f"The machine is too noisy: the champion differs from itself in {test.test} so "
                f"much that {wording.counted(2 * plan.pairs, 'pair')} could tell no less than "
                f"{wording.beyond(half * 100, effect * 100)} %, and "
                f"{wording.declared(effect * 100)} % matter: stop what else runs here, raise "
                "compare.repetitions, or compare on a machine of its own."
            )
        elif stats_paired.finds_itself_different(control_d, effect):
            found.append(
                f"The champion differs from itself by more than {wording.declared(effect * 100)} % "
                f"in {test.test} in every pair of the control: something changes between two "
                "processes; look at the log."
            )
    return found


def drifted(speed: Sequence[SpeedComparison]) -> list[str]:
    """Say whether the machine became another one meanwhile."""
    return [
        f"The champion changed by {wording.percent(abs(one.drift))} in {one.test} over the run "
        f"(limit {wording.percent(MAX_DRIFT)}): let the machine come to rest, cool, and compare "
        "again."
        for one in speed
        if one.is_gated and abs(one.drift) > MAX_DRIFT
    ]


def _teller(plan: Plan, end: int) -> Callable[[Sequence[Pair]], None]:
    """Say after each pair how it stands."""

    def tell(pairs: Sequence[Pair]) -> None:
        parts = []
        for number, metric in enumerate(metrics(plan, pairs)):
            if number in plan.gated:
                found = stats_paired.paired_interval(metric.differences)
                shown = compare_words.interval(found.estimate, found.low, found.high)
                parts.append(f"{plan.tests[number].test} {shown}")
        console.info(f"pair {len(pairs)} of {end}: {', '.join(parts)}")

    return tell


def _speed(plan: Plan, control: Sequence[Pair], pairs: Sequence[Pair]) -> Iterator[SpeedComparison]:
    judged = stats_paired.judge(metrics(plan, pairs)) if pairs else ()
    for number, test in enumerate(plan.tests):
        effect = plan.effects[test.test]
        samples = tuple(pair.sample(number, plan.dropped_repetitions) for pair in pairs)
        controls = tuple(pair.sample(number, plan.dropped_repetitions) for pair in control)
        anchor = [
            each
            for one in controls
            for each in (
                (one.champion_tok_s, one.challenger_tok_s)
                if one.order == "AB"
                else (one.challenger_tok_s, one.champion_tok_s)
            )
        ]
        anchor += [one.champion_tok_s for one in samples]
        half = (
            stats_paired.reachable_half_width([one.log_ratio for one in controls], 2 * plan.pairs)
            if len(controls) > 1
            else 0.0
        )
        one = judged[number] if judged else None
        comparison = SpeedComparison(
            test=test.test,
            depth_tokens=test.depth_tokens,
            tokens=test.tokens,
            effect=effect,
            pairs=samples,
            control_pairs=controls,
            log_ratio_mean=one.interval.estimate if one else 0.0,
            log_ratio_low=one.interval.low if one else 0.0,
            log_ratio_high=one.interval.high if one else 0.0,
            control_half_width=half,
            drift=stats_paired.drift(anchor) if len(anchor) > 1 else 0.0,
            outcome=one.outcome if one else "undecided",
            sentence="",
            is_gated=number in plan.gated,
            coverage=one.interval.coverage if one else 0.0,
        )
        yield comparison.model_copy(update={"sentence": _sentence(comparison, one)})


def _sentence(one: SpeedComparison, judged: Judgement | None) -> str:
    if judged is None:
        return f"{compare_words.test_name(one).capitalize()} was not measured."
    return compare_words.speed_sentence(
        compare_words.test_name(one).capitalize(),
        one.outcome,
        compare_words.interval(one.log_ratio_mean, one.log_ratio_low, one.log_ratio_high),
        one.effect,
        held=judged.is_held,
    )


# --- the certificate --------------------------------------------------------------------------


def certify(
    session: Session, control: Sequence[Pair], pairs: Sequence[Pair], reasons: Sequence[str]
) -> Validity:
    """
    Sum up the certificates of the processes that count.

    Each was judged by itself, and its pair measured again if others disturbed it; of each rule the
    worst that was let pass stands here.
    """
    counted: list[ProcessRun] = [
        run for pair in (*control, *pairs) for run in (pair.champion, pair.challenger)
    ] or list(session.journal.runs)
    worst = max(counted, key=lambda run: run.condition("waiting_share") or 0.0)
    conditions: dict[str, records.Condition] = {}
    for run in counted:
        for each in run.validity.conditions:
            known = conditions.get(each.rule)
            if known is None or (each.value or 0.0) > (known.value or 0.0):
                conditions[each.rule] = each
    return worst.validity.model_copy(
        update={
            "verdict": "INVALID" if reasons else "VALID",
            "reasons": tuple(reasons),
            "load_before": counted[0].validity.load_before,
            "load_after": counted[-1].validity.load_after,
            "steal_share": max(run.validity.steal_share for run in counted),
            "conditions": tuple(conditions.values()),
        }
    )
