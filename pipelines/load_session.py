"""
The runs of one load test against one server, whoever runs it.

    ladder      closed runs with 1, 2, 4 ... requests in flight: what the server can do
    open        random arrivals at a fixed rate, timed from the scheduled moment: what users get
    soak        the same for as long as declared
    calibration the client against a null server, at the pace that the runs showed

The client is calibrated after the runs, since the pace to calibrate with is known only then, and
before anything is judged: a client that was too slow makes all of it INVALID.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import console
from pipelines.load import calibration, generator, measures, plan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pipelines.load.plan import Plan, Target
    from pipelines.load_records import Calibration, LoadRun
    from pipelines.params import LoadTest, Slo

# Arrivals at what a server can do at most queue without end; at 70 % of it the queue stays short
# enough that the levels speak of the server and not of the backlog (M/D/1: 1.2 services of waiting).
_SHARE_OF_SATURATION: Final = 0.70
# A twentieth of the level that is judged, and never less than what threads in Python can keep on a
# busy machine.
_DELAY_SHARE: Final = 0.05
_LEAST_DELAY_MS: Final = 2.0
_CALIBRATION_S: Final = 1.5


@dataclass(frozen=True, kw_only=True)
class Session:
    """
    A target, what is to be sent to it, and the levels by which answers are counted.

    Attributes:
        target: The server and the model on it.
        declared: Sizes of the runs.
        slos: Levels by host.
        corpus: Text from which prompts are cut.
        chars_per_token: Of that text, as the server tokenizes it.
        log: Output of the generator's processes.
    """

    target: Target
    declared: LoadTest
    slos: Mapping[str, Slo]
    corpus: str
    chars_per_token: float
    log: Path

    def ladder(self) -> tuple[LoadRun, ...]:
        """Run every declared concurrency, from few to many."""
        return tuple(self._closed(each) for each in sorted(set(self.declared.concurrency)))

    def _closed(self, concurrency: int) -> LoadRun:
        return self._run(
            plan.closed(
                f"closed {concurrency}",
                concurrency=concurrency,
                prompts=self._prompts(self.declared.requests, salt=concurrency),
                warm_up_requests=self.declared.warm_up_requests,
                max_run_s=self.declared.max_run_seconds,
                seed=self.declared.seed + concurrency,
            )
        )

    def rate_per_s(self, ladder: tuple[LoadRun, ...]) -> float:
        """Return the declared rate of arrivals, or 70 % of the most that the ladder reached."""
        if self.declared.rate_per_s is not None:
            return self.declared.rate_per_s
        return round(_SHARE_OF_SATURATION * max(run.requests_s for run in ladder), 4)

    def open_loop(self, rate_per_s: float) -> LoadRun:
        """Run the declared number of random arrivals."""
        return self._run(
            plan.open_loop(
                "open",
                rate_per_s=rate_per_s,
                prompts=self._prompts(self.declared.open_requests, salt=1 << 16),
                warm_up_requests=self.declared.warm_up_requests,
                max_run_s=self.declared.max_run_seconds,
                seed=self.declared.seed,
            )
        )

    def soak(self, rate_per_s: float) -> LoadRun:
        """Run random arrivals for the declared time."""
        count = max(10, round(rate_per_s * self.declared.soak_seconds))
        return self._run(
            plan.soak(
                "soak",
                rate_per_s=rate_per_s,
                prompts=self._prompts(count, salt=1 << 17),
                warm_up_requests=self.declared.warm_up_requests,
                max_run_s=self.declared.soak_seconds,
                seed=self.declared.seed + 1,
            )
        )

    def _prompts(self, count: int, *, salt: int) -> tuple[plan.Prompt, ...]:
        """Cut prompts that no earlier run sent, so that no cache of the server knows them."""
        return plan.corpus_prompts(
            self.corpus,
            count + self.declared.warm_up_requests,
            prompt_tokens=self.declared.prompt_tokens,
            chars_per_token=self.chars_per_token,
            seed=self.declared.seed * (1 << 20) + salt,
        )

    def _run(self, planned: Plan) -> LoadRun:
        with console.Progress(f"load: {planned.name}", total=len(planned.prompts)) as progress:
            raw = generator.run(planned, self.target, log=self.log, progress=progress)
        return measures.summarise(planned, raw, self.slos)

    def calibrate(self, runs: tuple[LoadRun, ...]) -> Calibration | None:
        """Measure the client at the fastest pace that a run showed; None if no run had output."""
        fastest = max(runs, key=lambda run: run.output_tok_s, default=None)
        if fastest is None or fastest.output_tok_s <= 0:
            return None
        streams = fastest.concurrency or max(1, fastest.effective_slots)
        pace = fastest.output_tok_s / streams
        levels = [slo.tpot_ms for slo in self.slos.values() if slo.tpot_ms is not None]
        allowed = _DELAY_SHARE * min(levels) if levels else _LEAST_DELAY_MS
        return calibration.calibrate(
            streams=streams,
            chunks=max(20, round(pace * _CALIBRATION_S)),
            chunks_per_s=pace,
            api=self.target.api,
            limit_ms=max(_LEAST_DELAY_MS, allowed),
            log=self.log,
        )
