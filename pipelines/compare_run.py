"""
The interleaved run of a comparison: which process comes next, and what is kept of each.

Every process of llama-bench is one line of a journal, written to the disk before the next one
starts. A run that was killed at any moment goes on where it was: only the process that was running
is lost. Void pairs stay in the journal, too.

What voids a pair is what others did on this machine while it was measured, never its speed.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import ValidationError

from pipelines import (
    atomic,
    certificate,
    console,
    llama_bench,
    llamacpp,
    machine,
    proc,
    stats,
    stats_paired,
    validity,
    wording,
)
from pipelines.compare_records import PairSample, VoidPair
from pipelines.errors import ParamsError
from pipelines.records import Finite, Part, Validity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipelines.llama_bench import SpeedTest
    from pipelines.llamacpp import Execution
    from pipelines.toolchain import Toolchain

Phase = Literal["warm-up", "control", "pairs"]
Letter = Literal["A", "B"]

# Neighbours share the state of the machine; what runs a minute later is no neighbour.
NEIGHBOUR_WITHIN_S: Final = 60.0
# A machine changes in hours: heat, other users, updates.
JOURNAL_LASTS_S: Final = 6 * 3600.0
# Twice as many void pairs as pairs that were wanted: then the machine is somebody else's.
MAX_VOID_SHARE: Final = 2.0
# How long a pair waits for others to be done, and how long is looked for that.
QUIET_WITHIN_S: Final = 5.0
_LOOK_S: Final = 0.2
_NEVER_QUIET: Final = 2
# Share of a core that may be busy when all cores that are wanted count as free: this program, too.
_IDLE_ENOUGH: Final = 0.3


@dataclass(frozen=True, kw_only=True)
class Runner:
    """
    One side as it is run.

    Attributes:
        tools: Its llama.cpp.
        model: Its GGUF, as llama-bench is told: below the checkout.
        model_size_bytes: Tensor data, as llama-bench will report it.
    """

    tools: Toolchain
    model: str
    model_size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    What one comparison runs.

    Attributes:
        pairs: Pairs before a doubling.
        control_pairs: Pairs of the champion with itself.
        repetitions: Of each test in one process.
        dropped_repetitions: First ones that do not count.
        prompt_tokens: Of the prefill.
        generate_tokens: Of the decode; 0 of an encoder.
        depths: Tokens in the context when a test begins.
        execution: How both models are run.
        effects: Relative difference that matters, by the name of the test.
        is_encoder: Whether the models make embeddings.
    """

    pairs: int
    control_pairs: int
    repetitions: int
    dropped_repetitions: int
    prompt_tokens: int
    generate_tokens: int
    depths: tuple[int, ...]
    execution: Execution
    effects: Mapping[str, float]
    is_encoder: bool = False

    @property
    def tests(self) -> tuple[SpeedTest, ...]:
        """Tests of each process, in order."""
        found = llama_bench.speed_tests(
            prompt_tokens=self.prompt_tokens,
            generate_tokens=self.generate_tokens,
            depths=self.depths,
        )
        return tuple(test for test in found if test.tokens)

    @property
    def gated(self) -> tuple[int, ...]:
        """Numbers of the tests that decide: prefill of an empty context, decode at the deepest."""
        tests = self.tests
        deepest = max(self.depths)
        return tuple(
            number
            for number, test in enumerate(tests)
            if test.depth_tokens == (0 if test.test == "prefill" and 0 in self.depths else deepest)
        )

    @property
    def least_effect(self) -> float:
        """The smallest difference that matters."""
        return min(self.effects[self.tests[number].test] for number in self.gated)


# --- what is kept of a process ----------------------------------------------------------------


class ProcessRun(Part):
    """
    One process of llama-bench: where in the plan it stands, its samples, and what else happened.

    Attributes:
        phase: Warm-up, control (both sides are the champion), or pair.
        index: Number of the pair.
        attempt: 0, or how many attempts of this pair were void before.
        letter: A is the champion; of a control pair both are.
        ended_at: Seconds since 1970.
        samples_tok_s: Of each test, every repetition.
        gpu_info: GPUs as llama-bench names them.
        validity: What the certificate says of these seconds alone.
    """

    phase: Phase
    index: int
    attempt: int
    letter: Letter
    ended_at: Finite
    wall_s: Finite
    samples_tok_s: tuple[tuple[Finite, ...], ...]
    gpu_info: str
    validity: Validity

    def condition(self, rule: str) -> float | None:
        """Return what one rule of the certificate saw."""
        return next((each.value for each in self.validity.conditions if each.rule == rule), None)


class _Head(Part):
    """First line of a journal: whose it is."""

    key: str
    boot_id: str
    begun_at: Finite


class Journal:
    """The processes of one comparison on the disk, one line each."""

    def __init__(self, path: Path, key: str) -> None:
        """
        Open a journal; one of another boot, or older than six hours, is begun anew.

        Args:
            path: The file.
            key: Digest of everything that decides what is measured.
        """
        self.path = path
        self._head = _Head(key=key, boot_id=_boot_id(), begun_at=round(time.time(), 3))
        self.runs: list[ProcessRun] = []
        self.resumed = self._read()
        if not self.resumed:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, self._head.model_dump_json() + "\n")

    def _read(self) -> bool:
        """Read what is there; a last line that was cut off by a kill is dropped."""
        try:
            data = self.path.read_bytes()
        except OSError:
            return False
        whole, _, torn = data.rpartition(b"\n")
        lines = whole.split(b"\n")
        try:
            head = _Head.model_validate_json(lines[0])
            runs = [ProcessRun.model_validate_json(line) for line in lines[1:]]
        except (ValidationError, ValueError):
            console.warn(f"{self.path} cannot be read: the comparison begins anew.")
            return False
        age_s = self._head.begun_at - head.begun_at
        same = (head.key, head.boot_id) == (self._head.key, self._head.boot_id)
        if not same or not 0 <= age_s < JOURNAL_LASTS_S:
            return False
        if torn:
            atomic.write_bytes(self.path, whole + b"\n")
        self._head, self.runs = head, runs
        return bool(runs)

    def append(self, run: ProcessRun) -> None:
        """Put a process on the disk before anything else happens."""
        with self.path.open("ab") as file:
            file.write(run.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.runs.append(run)

    def find(self, phase: Phase, index: int, attempt: int, letter: Letter) -> ProcessRun | None:
        """Return a process that was measured, if it was."""
        return next(
            (
                run
                for run in self.runs
                if (run.phase, run.index, run.attempt, run.letter)
                == (phase, index, attempt, letter)
            ),
            None,
        )

    @property
    def spent_s(self) -> float:
        """Time that its processes took."""
        return sum(run.wall_s for run in self.runs)

    def remove(self) -> None:
        """Forget all: the record holds it now."""
        atomic.remove(self.path)


def _boot_id() -> str:
    """Name this boot of the machine; empty where the kernel does not."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


# --- one pair ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two neighbouring processes that nobody disturbed."""

    index: int
    champion: ProcessRun
    challenger: ProcessRun

    def sample(self, test: int, dropped: int) -> PairSample:
        """Return what it says about one test."""
        kept = [run.samples_tok_s[test][dropped:] for run in (self.champion, self.challenger)]
        old, new = (stats.median(each) for each in kept)
        return PairSample(
            index=self.index,
            order=stats_paired.order_of(self.index),
            champion_tok_s=old,
            challenger_tok_s=new,
            log_ratio=stats_paired.log_ratio(old, new),
            champion_samples_tok_s=kept[0],
            challenger_samples_tok_s=kept[1],
        )


def disturbance(first: ProcessRun, second: ProcessRun, effect: float) -> str:
    """
    Say what others did to a pair that makes it void; empty if nothing.

    Two processes that waited for a core equally long are slowed down alike, and their ratio stands.
    One that waited for 3 % more of its time is up to 3 % slower: no difference of that size may
    come from others, so the limit is the smallest difference that matters.
    """
    for run in (first, second):
        if run.validity.reasons:
            return run.validity.reasons[0]
    for rule, what in (("waiting_share", "waited for a core"), ("steal_share", "lost to the host")):
        seen = [run.condition(rule) for run in (first, second)]
        if None in seen and any(each is not None for each in seen):
            return f"Of one of the two nobody saw how long it {what}."
        shares = [each or 0.0 for each in seen]
        difference = abs(shares[0] - shares[1])
        if difference > effect:
            return (
                f"One of the two {what} in {wording.beyond(difference * 100, effect * 100)} % more "
                f"of its time than the other (limit {wording.declared(effect * 100)} %)."
            )
    for found in validity.sides(first.validity, second.validity):
        if found.outcome == "void":
            return found.sentence
    return ""


def wait_for_quiet(threads: int, within_s: float = QUIET_WITHIN_S) -> bool:
    """
    Give others a while to be done before a pair begins; go on after that in any case.

    Quiet means that as many cores are free as llama-bench has threads.

    Returns:
        Whether it became quiet.
    """
    from pipelines import counters  # noqa: PLC0415 - beside the loop that needs it

    cores = os.cpu_count() or 1
    ends_at = time.monotonic() + within_s
    while time.monotonic() < ends_at:
        before, began = counters.cpu_times(), time.monotonic()
        time.sleep(_LOOK_S)
        busy = (counters.cpu_times().busy_s - before.busy_s) / (time.monotonic() - began)
        if cores - busy >= min(threads, cores) - _IDLE_ENOUGH:
            return True
    return False


# --- all pairs --------------------------------------------------------------------------------


class UnmeasurableError(Exception):
    """The machine did not let the pairs be measured; the text says why, and what to do."""


@dataclass
class Session:
    """
    One comparison while it runs.

    Attributes:
        plan: What is run.
        sides: The two, by letter.
        root: The checkout, in which names of models hold.
        log: Whole output of every process.
        journal: What has been measured.
        budget_s: Time that it may take in all.
        void: Pairs that were measured again.
    """

    plan: Plan
    sides: Mapping[Letter, Runner]
    root: Path
    log: Path
    journal: Journal
    budget_s: float
    quiet_within_s: float = QUIET_WITHIN_S
    void: list[VoidPair] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)
    _never_quiet: int = 0

    def __post_init__(self) -> None:
        """Note what an earlier run took."""
        self._before_s = self.journal.spent_s

    @property
    def spent_s(self) -> float:
        """Time taken so far, by a run that was killed, too."""
        return self._before_s + time.monotonic() - self._started

    def warm_up(self) -> dict[Letter, float]:
        """Run each side once, and return how long a process of each takes, in seconds."""
        found: dict[Letter, float] = {}
        for letter in ("A", "B"):
            done = self.journal.find("warm-up", 0, 0, letter)
            found[letter] = (done or self._process("warm-up", 0, 0, letter, letter)).wall_s
        return found

    def control(self) -> tuple[Pair, ...]:
        """Measure the champion against itself."""
        return tuple(self._pair("control", index) for index in range(self.plan.control_pairs))

    def pairs(self, found: list[Pair], end: int, tell: Callable[[Sequence[Pair]], None]) -> None:
        """Add pairs to those that were found until there are `end`; `tell` hears after each."""
        while len(found) < end:
            found.append(self._pair("pairs", len(found)))
            tell(found)

    def _pair(self, phase: Phase, index: int) -> Pair:
        """
        Measure one pair until nobody disturbs it.

        Raises:
            UnmeasurableError: Too many were void, or the budget is spent.
        """
        order: tuple[Letter, Letter] = ("B", "A") if stats_paired.order_of(index) == "BA" else (
            "A", "B",
        )  # fmt: skip
        attempt = 0
        while True:
            done = [self.journal.find(phase, index, attempt, letter) for letter in order]
            if done[0] is not None and done[1] is None and _is_late(done[0]):
                attempt += 1  # its neighbour never ran
                continue
            for place, letter in enumerate(order):
                if done[place] is None:
                    if place == 0:
                        self._require_time(phase, index)
                        self._wait()
                    side: Letter = "A" if phase == "control" else letter
                    done[place] = self._process(phase, index, attempt, letter, side)
            first, second = done
            assert first is not None
            assert second is not None
            reason = disturbance(first, second, self.plan.least_effect)
            if not reason:
                by_letter = {run.letter: run for run in (first, second)}
                return Pair(index=index, champion=by_letter["A"], challenger=by_letter["B"])
            self.void.append(
                VoidPair(
                    phase="control" if phase == "control" else "pairs", index=index, reason=reason
                )
            )
            self._tell_void(f"{phase} {index + 1}", reason)
            self._require_patience(reason)
            attempt += 1

    def _tell_void(self, pair: str, reason: str) -> None:
        """Say why a pair does not count; of a reason that was told before only its first words."""
        kind = reason.split(" in ", 1)[0]
        again = any(each.reason.split(" in ", 1)[0] == kind for each in self.void[:-1])
        told = kind if again else reason
        console.info(f"{pair} is void and measured again: {told}")

    def _wait(self) -> None:
        """Wait for a quiet moment; where none came twice in a row, none is waited for again."""
        if self._never_quiet < _NEVER_QUIET:
            quiet = wait_for_quiet(self.plan.execution.threads, self.quiet_within_s)
            self._never_quiet = 0 if quiet else self._never_quiet + 1

    def _require_patience(self, reason: str) -> None:
        wanted = self.plan.pairs + self.plan.control_pairs
        if len(self.void) > MAX_VOID_SHARE * wanted:
            raise UnmeasurableError(
                f"{wanted} pairs were wanted, and {len(self.void)} attempts at one were void, "
                f"the last since: {wording.clause(reason)}. Others use this machine: stop what "
                "else runs here and run the same command again."
            )

    def _require_time(self, phase: Phase, index: int) -> None:
        """See that another pair fits the budget."""
        walls = sorted(run.wall_s for run in self.journal.runs)
        if walls and self.spent_s + 2 * stats.median(walls) > self.budget_s:
            raise UnmeasurableError(
                f"The budget of {minutes(self.budget_s)} was spent before {phase} {index + 1}"
                + (
                    f", since {wording.counted(len(self.void), 'pair')} were void"
                    if self.void
                    else ""
                )
                + ": raise compare.max_minutes or --budget, or stop what else runs here."
            )

    def _process(
        self, phase: Phase, index: int, attempt: int, letter: Letter, side: Letter
    ) -> ProcessRun:
        """Run llama-bench once, and write down what it found."""
        runner, plan = self.sides[side], self.plan
        argv = llama_bench.speed_argv(
            runner.tools,
            runner.model,
            prompt_tokens=plan.prompt_tokens,
            generate_tokens=plan.generate_tokens,
            depths=plan.depths,
            repetitions=plan.repetitions,
            execution=plan.execution,
            **({"embeddings": True} if plan.is_encoder else {}),
        )
        with certificate.Watch("llama-bench") as watched:

            def look(line: str) -> None:
                # A test has ended and the process is still there: what it waited is all counted,
                # however short it was.
                if line.startswith("{"):
                    watched.sample()

            done = proc.run(
                argv,
                log=self.log,
                cwd=self.root,
                env=llamacpp.environment(runner.tools, timed=True),
                inherit_env=False,
                on_line=look,
            )
        results = llama_bench.parse_bench(done.stdout, self._expectation(runner), self.log)
        gpu_info = results[0].gpu_info
        run = ProcessRun(
            phase=phase,
            index=index,
            attempt=attempt,
            letter=letter,
            ended_at=round(time.time(), 3),
            wall_s=round(done.wall_s, 4),
            samples_tok_s=tuple(result.samples_tok_s for result in results),
            gpu_info=gpu_info,
            validity=watched.judge(
                validity.Run(
                    backend=runner.tools.backend,
                    threads=plan.execution.threads,
                    gpu_info=gpu_info,
                )
            ),
        )
        self.journal.append(run)
        return run

    def _expectation(self, runner: Runner) -> llama_bench.BenchExpectation:
        return llama_bench.BenchExpectation(
            model=runner.model,
            model_size_bytes=runner.model_size_bytes,
            commit=runner.tools.commit,
            backend=runner.tools.backend,
            repetitions=self.plan.repetitions,
            execution=self.plan.execution,
            tests=self.plan.tests,
            **({"embeddings": True} if self.plan.is_encoder else {}),
        )


def _is_late(first: ProcessRun) -> bool:
    return not 0 <= time.time() - first.ended_at < NEIGHBOUR_WITHIN_S


def minutes(seconds: float) -> str:
    """Write a time as people plan it: `40 s`, `4 min`."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"  # noqa: PLR2004


def journal_key(facts: dict[str, object]) -> str:
    """Digest of everything that decides what is measured, for the name of the journal."""
    return machine.facts_id(json.loads(json.dumps(facts)))[:16]


def refuse_wrong_plan(plan: Plan) -> None:
    """
    See that something is left to count.

    Raises:
        ParamsError: No repetition would be left.
    """
    if plan.dropped_repetitions >= plan.repetitions:
        raise ParamsError(
            f"compare.dropped_repetitions ({plan.dropped_repetitions}) leaves none of "
            f"{plan.repetitions} repetitions.",
            hint="Raise compare.repetitions in params.yaml.",
        )
