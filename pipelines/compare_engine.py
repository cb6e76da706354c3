"""
The engine as the second axis of a comparison -> results/MODEL/engine.json.

After a bump of llama.cpp everything is converted again, so that champion and challenger differ in
two things at once. Here the engine alone changes: the champion's GGUF on the old and on the new
one, then the challenger's on both, by the very pairs, journal and statistics of a comparison.
Beside it what was released is tried on the new engine, before that is accepted.

    compare_engine_releases    what `stable` means and meant
    compare_engine_effects     which of the two made a difference
    compare_engine_words       what the record says
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from pipelines import (
    atomic,
    compare,
    compare_engine_effects,
    compare_engine_words,
    compare_quality,
    compare_run,
    compare_sides,
    compare_words,
    console,
    corpora,
    gguf_header,
    llama_bench,
    llamacpp,
    measuring,
    params,
    proc,
    stats,
    stats_paired,
    wording,
)
from pipelines.compare_engine_records import (
    Departure,
    EngineAnswers,
    EngineRecord,
    ReleaseTest,
)
from pipelines.errors import FleetError, ToolError
from pipelines.records import FileDigest
from pipelines.release_records import short

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pipelines.compare_engine_releases import Meant, Released
    from pipelines.compare_records import CompareRecord, Outcome, SpeedComparison
    from pipelines.compare_run import Plan
    from pipelines.compare_sides import Contender, Wanted
    from pipelines.layout import Layout
    from pipelines.params import BenchmarkSlice, Declaration
    from pipelines.records import Validity
    from pipelines.toolchain import Toolchain

# Both print their perplexity with four decimals or more, of the same logits.
_PPL_TOLERANCE: Final = 1e-3
# Enough to read the weights and to compute a token by them.
_PROBE_TOKENS: Final = 8
_ANY_CODE: Final = range(-128, 256)
_WHY_CHARACTERS: Final = 200
_PLACE: Final = "engine"
# How much more time than estimated is asked for where there was too little.
_ROOM: Final = 1.25
# Processes of a release: does it load on either engine, then one of each that is timed.
_RELEASE_PROCESSES: Final = 4


class NoTimeError(Exception):
    """There is no time left for a part; the text says which, how long it takes and what to type."""


def differs(champion: Contender, challenger: Contender) -> bool:
    """Tell whether the two sides run on two engines."""
    return champion.side.toolchain_id != challenger.side.toolchain_id


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """
    How long each part takes, from the warm-up of the comparison, in seconds.

    Attributes:
        answers_s: Reading the text with each combination.
        release_s: Trying one release.
        releases: How many there are.
        session_s: One session of pairs without a doubling.
        sessions: How many are needed: one for each GGUF, none where the comparison is that one.
    """

    answers_s: float
    release_s: float
    releases: int
    session_s: float
    sessions: int

    @property
    def total_s(self) -> float:
        """All parts."""
        return self.answers_s + self.releases * self.release_s + self.sessions * self.session_s

    def sentence(self, what: str, before_s: float, budget_s: float) -> str:
        """Say it beforehand; `before_s` is what the comparison itself takes."""
        parts = [
            wording.counted(self.sessions, "more session") + " of pairs" if self.sessions else "",
            "the answers of both" if self.answers_s else "",
            wording.counted(self.releases, "release") if self.releases else "",
        ]
        minutes = compare_run.minutes
        all_s = before_s + self.total_s
        said = (
            f"the engine alone ({what}): {', '.join(filter(None, parts)) or 'nothing to measure'}, "
            f"about {minutes(self.total_s)} more"
        )
        if all_s <= budget_s:
            return said
        return (
            f"{said}; that makes {minutes(all_s)}, and the budget is {minutes(budget_s)}: what "
            f"does not fit is left out and said so. `--budget {math.ceil(all_s / 60)}` measures all"
        )


@dataclass(kw_only=True)
class Axis:
    """
    One change of the engine while it is measured.

    Attributes:
        declared: The declaration.
        at: The checkout.
        model: Key of the model.
        champion: With the old engine.
        challenger: With the new one.
        files: The GGUFs of the two, below the checkout.
        plan: What each session runs.
        hardware: This machine.
        budget_s: Time for the comparison and all of this.
        estimate: How long each part takes.
        released: What the local registry holds.
        spent_s: Says how much of the budget is gone.
        quiet_within_s: How long a pair waits for a quiet moment.
    """

    declared: Declaration
    at: Layout
    model: str
    champion: Contender
    challenger: Contender
    files: tuple[Path, Path]
    plan: Plan
    hardware: dict[str, Any]
    budget_s: float
    estimate: Estimate
    released: Released
    spent_s: Callable[[], float]
    quiet_within_s: float = compare_run.QUIET_WITHIN_S
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _journals: list[compare_run.Journal] = field(default_factory=list)
    _before_s: float = 0.0

    @property
    def old(self) -> Toolchain:
        """The champion's engine."""
        return self.champion.tools

    @property
    def new(self) -> Toolchain:
        """That of this checkout."""
        return self.challenger.tools

    @property
    def is_one_file(self) -> bool:
        """Whether champion and challenger are the same bytes."""
        return self.champion.side.gguf_sha256 == self.challenger.side.gguf_sha256

    @property
    def what(self) -> str:
        """The change in words."""
        return compare_engine_words.change_of_engine(self.champion.side, self.challenger.side)

    @property
    def log(self) -> Path:
        """Whole output of every program, beside that of the comparison."""
        return self.at.log("compare", self.model)

    # --- all of it

    def measure(self, compared: CompareRecord) -> EngineRecord:
        """
        Measure the engine alone, as far as there is time, and judge.

        What decides about what is served now comes first: its answers, what was released, its
        speed; then what only tells the cause.

        Args:
            compared: The comparison of both sides.

        Raises:
            FleetError: A tool failed on the old engine with what it made, or the disk is full.
        """
        console.step(f"the engine alone: {self.what}")
        began, self._before_s = time.monotonic(), self.spent_s()
        answers = self._in_time("the answers of the engine", self.estimate.answers_s, self._answers)
        releases = self._releases(answers)
        speed, validity = self._speed(compared)
        self._clean()
        record = EngineRecord(
            model=self.model,
            context_tokens=compared.context_tokens,
            champion=self.champion.side,
            challenger=self.challenger.side,
            machine=measuring.machine_id(self.hardware, self.new),
            validity=validity,
            speed=speed,
            answers=answers,
            releases=releases,
            releases_note=self.released.note,
            releases_problem=self.released.problem,
            left_out=tuple(self.left_out),
            outcome="undecided",
            cause=compare_engine_effects.overall(speed),
            sentence="",
            notes=tuple(self.notes),
            budget_s=self.budget_s,
            wall_s=round(time.monotonic() - began, 3),
            measured_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        record = record.model_copy(update={"outcome": outcome_of(record)})
        said = compare_engine_words.outcome_sentence(record)
        return record.model_copy(update={"sentence": said})

    def forget(self) -> None:
        """Remove what only served to go on after a kill: the record holds it now."""
        for journal in self._journals:
            journal.remove()

    def _in_time(
        self, what: str, takes_s: float, do: Callable[[], Any], *, decides: bool = True
    ) -> Any:  # noqa: ANN401 - of `do`
        """Do a part if there is time for it; else say what it would take, and None."""
        try:
            if takes_s:
                self._require_time(what, takes_s)
            return do()
        except NoTimeError as error:
            console.warn(str(error))
            # What only explains holds nothing up.
            (self.left_out if decides else self.notes).append(str(error))
            return None

    def _require_time(self, what: str, takes_s: float) -> None:
        left_s = self.budget_s - self.spent_s()
        if takes_s > left_s:
            # The whole comparison runs again, and time is an estimate.
            minutes = math.ceil(_ROOM * (self._before_s + self.estimate.total_s) / 60)
            raise NoTimeError(
                f"There was no time left for {what}: about {compare_run.minutes(takes_s)}, of "
                f"{compare_run.minutes(self.budget_s)} {compare_run.minutes(max(left_s, 0.0))} "
                f"were left. `fleet compare {self.model} --budget {minutes}` measures all."
            )

    def _clean(self) -> None:
        """Remove the logits: of a large vocabulary they take many GB."""
        shutil.rmtree(self.at.scratch(self.model) / _PLACE, ignore_errors=True)

    # --- does it load

    def loads(self, tools: Toolchain, gguf: Path) -> tuple[bool | None, str]:
        """
        Let an engine read a file and compute a few tokens by it.

        Returns:
            Whether it did, and why not; None if it was killed from outside, which says nothing
            about the file.
        """
        plan = self.plan
        argv = llama_bench.speed_argv(
            tools,
            self._named(gguf),
            prompt_tokens=_PROBE_TOKENS,
            generate_tokens=0 if plan.is_encoder else 1,
            depths=(0,),
            repetitions=1,
            execution=plan.execution,
            **({"embeddings": True} if plan.is_encoder else {}),
        )
        done = proc.run(
            argv,
            log=self.log,
            cwd=self.at.root,
            env=llamacpp.environment(tools),
            inherit_env=False,
            ok_codes=_ANY_CODE,
        )
        if done.code == 0:
            return True, ""
        if done.code == -signal.SIGKILL:
            return None, "it was killed by the kernel or by somebody: often too little memory"
        lines = [console.clean(line).strip() for line in done.stderr.splitlines() if line.strip()]
        why = next((line for line in lines if "error" in line.lower()), "")
        why = why or (lines[-1] if lines else f"exit code {done.code}")
        return False, wording.shortened(why, _WHY_CHARACTERS)

    def _named(self, path: Path) -> str:
        return str(path.relative_to(self.at.root))

    # --- answers

    def _slice(self) -> BenchmarkSlice:
        return params.benchmark_slice(self.declared, self.challenger.side.key)

    def _subject(
        self, gguf: Path, tools: Toolchain, reference: Path, wanted: Wanted
    ) -> compare_quality.Subject:
        """Return a file on an engine, to be held against another one on the old engine."""
        return compare_quality.Subject(
            gguf=gguf,
            model_size_bytes=compare.tensor_bytes(gguf),
            tools=tools,
            f16=reference,
            f16_digest=FileDigest(
                name=reference.name,
                size_bytes=wanted.size_bytes,
                sha256=wanted.sha256,
                md5=wanted.md5 or "",
            ),
            f16_tools=self.old,
            place=_PLACE,
            reference="GGUF",
            may_be_same=True,
        )

    def _answers(self) -> EngineAnswers | None:
        """Hold each combination against the champion on its own engine, over the same text."""
        champion, challenger = self.files
        broken = self._why_not_loaded(champion, self.champion.gguf)
        if self.plan.is_encoder and not broken:
            self.notes.append(
                "The embeddings of an encoder are not compared between engines: `choose` holds "
                "those of each quant against its f16 (min_cosine_mean)."
            )
            return None
        limit = compare_engine_effects.MAX_ENGINE_KLD_NATS
        found: Departure | None = None
        why = [broken]
        if not broken:
            subject = self._subject(champion, self.new, champion, self.champion.gguf)
            found, odd = self._departure(subject)
            why = [odd] if odd else []
        others: dict[str, Departure | None] = {"model": None, "both": None}
        if found is not None and not self.is_one_file:
            others, more = self._of_new_file(champion, challenger)
            why += more
        wanted = self._slice()
        outcome: Outcome = compare_engine_effects.answers_outcome(found) if found else "worse"
        return EngineAnswers(
            corpus_sha256=wanted.corpus.sha256,
            chunks_count=wanted.benchmark.quality.chunks,
            context_tokens=wanted.benchmark.quality.context_tokens,
            limit_nats=limit,
            engine=found,
            outcome=outcome,
            sentence=compare_engine_words.answers_sentence(outcome, found, limit)
            if found
            else why.pop(0),
            why_not=tuple(why),
            **others,
        )

    def _why_not_loaded(self, gguf: Path, wanted: Wanted) -> str:
        """
        Say as a sentence why the new engine does not load a file; empty if it does.

        Raises:
            ToolError: It was killed from outside, so that nobody knows.
        """
        does, why = self.loads(self.new, gguf)
        if does is None:
            raise ToolError(
                f"whether {wanted.what} loads on the new engine cannot be told: {why}.",
                hint="Give it the memory that it needs and run the same command again.",
                log=self.log,
            )
        return (
            "" if does else f"The new engine does not load {wanted.what}: {wording.sentence(why)}"
        )

    def _of_new_file(
        self, champion: Path, challenger: Path
    ) -> tuple[dict[str, Departure | None], list[str]]:
        """Hold the new file on either engine against the champion, where a token is a token."""
        sizes = {_vocabulary_tokens(path) for path in (champion, challenger)}
        if len(sizes) > 1:
            said = "The new GGUF has another vocabulary: its answers cannot be held against the old"
            return {"model": None, "both": None}, [f"{said} one's."]
        found: dict[str, Departure | None] = {}
        why: list[str] = []
        for name, tools in (("model", self.old), ("both", self.new)):
            subject = self._subject(challenger, tools, champion, self.champion.gguf)
            try:
                found[name], odd = self._departure(subject)
                why += [odd] if odd else []
            except ToolError as error:
                which = "old" if name == "model" else "new"
                found[name] = None
                why.append(
                    f"The new GGUF on the {which} engine was not compared: "
                    f"{wording.sentence(wording.clause(_first_line(error)))}"
                )
        return found, why

    def _departure(self, subject: compare_quality.Subject) -> tuple[Departure, str]:
        """
        Read the text on one engine against the logits of the other.

        Returns:
            How far it departs, and as a sentence why only perplexities could be compared; empty if
            the logits of the old engine could be read by the new one.

        Raises:
            ToolError: One of the two engines does not get to the end of the text.
        """
        # The reference has a cache of 16 bits: another one would be told as the engine's doing.
        wanted, run_as = self._slice(), replace(self.plan.execution, kv_type="f16")
        corpora.require(wanted.corpus, self.at, "evaluation text")
        logits = compare_quality.reference(self.at, wanted, run_as, subject)
        try:
            read = compare_quality.read(self.at, wanted, run_as, subject, logits)
            _require_same_logits(read.found.ppl_base, logits.ppl, self.log)
        except ToolError as error:
            alone = replace(
                subject, f16=subject.gguf, f16_tools=subject.tools, f16_digest=_digest(subject.gguf)
            )
            own = compare_quality.reference(self.at, wanted, run_as, alone)
            return Departure(
                kld_mean_nats=None,
                kld_low_nats=None,
                kld_high_nats=None,
                same_top=None,
                ppl_ratio=own.ppl / logits.ppl,
                ppl_ratio_error=None,
            ), (
                "The logits that the old engine wrote are not comparable on the new one: "
                f"{wording.sentence(wording.clause(_first_line(error)))}"
            )
        low, high = compare_engine_effects.departure_interval(read.divergences.blocks_nats)
        return Departure(
            kld_mean_nats=read.found.kld_mean_nats,
            kld_low_nats=low,
            kld_high_nats=high,
            same_top=read.found.same_top,
            ppl_ratio=read.found.ppl_ratio,
            ppl_ratio_error=read.found.ppl_ratio_error,
        ), ""

    # --- what was released

    def _releases(self, answers: EngineAnswers | None) -> tuple[ReleaseTest, ...]:
        """Try each release on the new engine."""
        if self.released.note or self.released.problem:
            console.info(self.released.note or self.released.problem)
        found = []
        for meant in self.released.found:
            # The champion is often what `stable` means: what was read of these bytes stands.
            is_read = answers is not None and meant.wanted.sha256 == self.champion.gguf.sha256
            known = answers if is_read else None
            one = self._in_time(
                f"release {short(meant.id)} on the new engine",
                self.estimate.release_s,
                lambda meant=meant, known=known: self._release(meant, known),  # type: ignore[misc]
            )
            found += [one] if one is not None else []
        return tuple(found)

    def _release(self, meant: Meant, known: EngineAnswers | None) -> ReleaseTest:
        console.step(f"release {short(meant.id)} on the new engine")
        tried = ReleaseTest(
            release=meant.id,
            is_stable=meant.is_stable,
            type=meant.type,
            gguf_sha256=meant.wanted.sha256,
            size_bytes=meant.wanted.size_bytes,
            made_with=meant.release.tools.llama_cpp_commit,
            loads=None,
            answers=None,
            decode_ratio=None,
            outcome="undecided",
            sentence="",
        )
        side = self.champion.side.model_copy(update={"source": f"release {short(meant.id)}"})
        of = replace(self.champion, side=side, commit=None, gguf=meant.wanted)
        kept = {path.resolve() for path in self.files}
        there = set(self.at.scratch(self.model).glob("compare-*.gguf"))
        try:
            gguf = compare_sides.bring(self.declared, self.at, self.model, of, meant.wanted)
        except FleetError as error:
            return _told(tried, f"its file cannot be had: {wording.clause(_first_line(error))}")
        try:
            return self._tried(tried, gguf, meant.wanted, known)
        finally:
            is_ours = gguf.parent == self.at.scratch(self.model) and gguf not in there
            if is_ours and gguf.resolve() not in kept:
                atomic.remove(gguf)

    def _tried(
        self, tried: ReleaseTest, gguf: Path, wanted: Wanted, known: EngineAnswers | None
    ) -> ReleaseTest:
        """Load a release on either engine, and hold the answers of one against the other's."""
        is_fine, why = self.loads(self.new, gguf)
        if not is_fine:
            does_before, _ = self.loads(self.old, gguf)
            tried = tried.model_copy(update={"loads": is_fine})
            if is_fine is None or not does_before:
                more = "" if does_before else "; neither does it on the old one"
                return _told(tried, f"whether it loads cannot be told: {why}{more}")
            return _told(tried, f"it does not load: {why}", outcome="worse")
        tried = tried.model_copy(update={"loads": True, "decode_ratio": self._decode_ratio(gguf)})
        if self.plan.is_encoder:
            return _told(tried, "it loads; embeddings are not compared", outcome="equal")
        try:
            found = known.engine if known else None
            odd = ""
            if found is None:
                found, odd = self._departure(self._subject(gguf, self.new, gguf, wanted))
        except ToolError as error:
            return _told(
                tried,
                f"it loads, and was not read to the end: {wording.clause(_first_line(error))}",
            )
        outcome = compare_engine_effects.answers_outcome(found)
        how = {"worse": "otherwise, and worse", "undecided": "otherwise"}.get(outcome, "as before")
        said = f"it loads and answers {how}: {compare_engine_words.departure(found)}"
        return _told(
            tried.model_copy(update={"answers": found}),
            f"{said}; {wording.clause(odd)}" if odd else said,
            outcome="equal" if outcome == "better" else outcome,
        )

    def _decode_ratio(self, gguf: Path) -> float | None:
        """
        Run one process of each engine: decode of the new one over that of the old one.

        None where others disturbed them: one process of each has nothing to make up for that.
        """
        session = self._session("release", gguf, {"release": gguf.name})
        session.warm_up()
        number = self.plan.gated[-1]
        old, new = (session.journal.find("warm-up", 0, 0, letter) for letter in ("A", "B"))
        assert old is not None, "it was run"
        assert new is not None, "it was run"
        is_disturbed = compare_run.disturbance(old, new, self.plan.least_effect)
        if self.plan.tests[number].test != "decode" or is_disturbed:
            return None
        first, second = (
            stats.median(run.samples_tok_s[number][self.plan.dropped_repetitions :])
            for run in (old, new)
        )
        return second / first

    # --- speed

    def _speed(self, compared: CompareRecord) -> tuple[tuple[Any, ...], Validity]:
        """Measure either file on both engines, in turns."""
        if compared.validity.verdict == "INVALID":
            self.notes.append("The comparison itself is INVALID, so no speed of the engine was "
                              "measured.")  # fmt: skip
            return (), compared.validity
        if self.is_one_file:
            return compare_engine_effects.speeds(compared.speed), compared.validity
        if self._why_not_loaded(self.files[0], self.champion.gguf):
            return (), compared.validity  # the answers say so
        session_s = self.estimate.session_s
        engine = self._in_time(
            "the speed of the engine on the old GGUF", session_s, lambda: self._pairs(0)
        )
        if engine is None:
            return (), compared.validity
        if engine.validity.verdict == "INVALID":
            return (), engine.validity
        new: Sequence[SpeedComparison] = ()
        of_new = self._in_time(
            "the speed of the engine on the new GGUF", session_s, self._pairs_of_new, decides=False
        )
        if of_new is not None and of_new.validity.verdict == "VALID":
            new = of_new.speed
        elif of_new is not None:
            why = wording.clause(of_new.validity.reasons[0])
            self.notes.append(f"The new GGUF on both engines is not told: {why}.")
        found = compare_engine_effects.speeds(engine.speed, new, compared.speed)
        return found, engine.validity

    def _pairs_of_new(self) -> compare.Measured | None:
        """Measure the challenger's file on both engines, if the old one can run it."""
        does, why = self.loads(self.old, self.files[1])
        if does:
            return self._pairs(1)
        self.notes.append(
            f"The old engine does not run the new GGUF ({why}): whether both together do more than "
            "each by itself cannot be told."
        )
        return None

    def _pairs(self, file: int) -> compare.Measured:
        """Measure one file on the old engine and on the new one, in turns."""
        gguf = self.files[file]
        whose = "champion" if file == 0 else "challenger"
        console.step(f"the {whose}'s GGUF on both engines")
        session = self._session("pairs", gguf, {"pairs": file})
        session.warm_up()
        twice_s = self.estimate.session_s * (1 + self.plan.pairs / (self.plan.pairs + 1))
        return compare.measure(
            session,
            doubling_fits=twice_s <= session.budget_s,
            names="old engine and new engine",
        )

    def _session(self, kind: str, gguf: Path, facts: dict[str, object]) -> compare_run.Session:
        """Lay out pairs of old (A) and new engine (B) with one file."""
        size_bytes = compare.tensor_bytes(gguf)
        runners = [
            compare_run.Runner(tools=tools, model=self._named(gguf), model_size_bytes=size_bytes)
            for tools in (self.old, self.new)
        ]
        key = compare_run.journal_key({**self._facts(), **facts})
        journal = compare_run.Journal(
            self.at.scratch(self.model) / f"engine-{kind}-{key}.jsonl", key
        )
        self._journals.append(journal)
        if journal.resumed:
            console.info(
                f"going on after {wording.counted(len(journal.runs), 'measured run')} of "
                "llama-bench"
            )
        return compare_run.Session(
            plan=self.plan,
            sides={"A": runners[0], "B": runners[1]},
            root=self.at.root,
            log=self.log,
            journal=journal,
            budget_s=max(self.budget_s - self.spent_s(), 0.0) + journal.spent_s,
            quiet_within_s=self.quiet_within_s,
        )

    def _facts(self) -> dict[str, object]:
        """Return what decides what is measured, as a comparison does."""
        return compare.facts_of(
            (self.champion, self.challenger), self.hardware, self.plan, axis="engine"
        )


# --- laid out ---------------------------------------------------------------------------------


def estimate_of(whole: compare.Estimate, *, releases: int, is_one_file: bool) -> Estimate:
    """
    Say how long it takes, by what the warm-up of the comparison took.

    Args:
        whole: Of the comparison.
        releases: How many are tried.
        is_one_file: Whether the comparison is the session of the only file.
    """
    plan = whole.plan
    once_s = whole.quality_s / compare.READINGS
    combinations = 2 if is_one_file else 4
    return Estimate(
        answers_s=once_s * combinations,
        release_s=2 * once_s + _RELEASE_PROCESSES * whole.process_s,
        releases=releases,
        session_s=whole.process_s * 2 * (1 + plan.control_pairs + plan.pairs),
        sessions=0 if is_one_file else 2,
    )


def sweep(at: Layout, model: str, *, fresh: bool) -> None:
    """Remove the journals of runs that were stopped: all of them, or those that are too old."""
    for path in at.scratch(model).glob("engine-*.jsonl"):
        with contextlib.suppress(OSError):
            if fresh or time.time() - path.stat().st_mtime > compare_run.JOURNAL_LASTS_S:
                path.unlink()


def _told(tried: ReleaseTest, why: str, *, outcome: str = "undecided") -> ReleaseTest:
    """Say what came of a release."""
    name = f"Release {short(tried.release)} ({console.clean(tried.type)}"
    stable = ", what `stable` means" if tried.is_stable else ""
    text = f"{name}{stable}) on the new engine: {why}"
    if tried.decode_ratio is not None:
        change = compare_words.change(math.log(tried.decode_ratio))
        text += f"; decode {change} in one process of each, for information"
    return tried.model_copy(update={"outcome": outcome, "sentence": f"{text}."})


def outcome_of(record: EngineRecord) -> Outcome:
    """Return the worst of what the record says of the engine; `undecided` of what is missing."""
    parts: list[Outcome] = []
    speed = compare_engine_effects.engine_outcome(record.speed)
    if speed is not None:
        parts.append(speed)
    if record.answers is not None:
        parts.append(record.answers.outcome)
    parts += [one.outcome for one in record.releases]
    is_open = record.left_out or record.releases_problem or record.validity.verdict == "INVALID"
    return stats_paired.worst_of([*parts, "undecided"] if is_open or not parts else parts)


def _require_same_logits(read_ppl: float, written_ppl: float, log: Path) -> None:
    """
    See that an engine reads the logits that the other one wrote.

    Raises:
        ToolError: It takes them for something else.
    """
    if not math.isclose(read_ppl, written_ppl, rel_tol=_PPL_TOLERANCE):
        raise ToolError(
            f"it takes their perplexity for {read_ppl:.4f}, and it is {written_ppl:.4f}", log=log
        )


def _vocabulary_tokens(gguf: Path) -> int | None:
    tokens = gguf_header.read(gguf).metadata.get("tokenizer.ggml.tokens")
    return tokens.count if isinstance(tokens, gguf_header.Array) else None


def _digest(path: Path) -> FileDigest:
    from pipelines import hashing  # noqa: PLC0415 - only where logits cannot be read

    found = hashing.digest(path)
    return FileDigest(
        name=path.name, size_bytes=path.stat().st_size, sha256=found.sha256, md5=found.md5
    )


def _first_line(error: FleetError) -> str:
    """Return what a tool said, without the lines of its output."""
    lines = [line.strip() for line in error.message.splitlines() if line.strip()] or ["no reason"]
    telling = next((line for line in lines[1:] if "error" in line.lower()), lines[-1])
    first = lines[0].rstrip(".")
    said = f"{first}: {telling}" if len(lines) > 1 else first
    return wording.shortened(console.clean(said), _WHY_CHARACTERS)
