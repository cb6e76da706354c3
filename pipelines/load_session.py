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

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from pipelines import console
from pipelines.errors import ToolError
from pipelines.load import calibration, generator, measures, plan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from pipelines.load.dialects import Answer
    from pipelines.load.plan import Api, Plan, Target, Task
    from pipelines.load_records import Calibration, LoadRun
    from pipelines.params import LoadTest, Slo

# Arrivals at what a server can do at most queue without end; at 70 % of it the queue stays short
# enough that the levels speak of the server and not of the backlog (M/D/1: a mean wait of 1.2
# services).
_SHARE_OF_SATURATION: Final = 0.70
# A twentieth of the level that is judged, and never less than what threads in Python can keep on a
# busy machine.
_DELAY_SHARE: Final = 0.05
_LEAST_DELAY_MS: Final = 2.0
_CALIBRATION_S: Final = 1.5
# Chunks that come all at once, since something held them back, show no pace.
_MOST_OVER_AVERAGE: Final = 10.0
# After so many others a prompt is in no cache of the server, and all of them fit into memory.
_MOST_SOAK_PROMPTS: Final = 20_000
# Bits of the number in front of each prompt.
SALT_BITS: Final = plan.NONCE_BITS
# Two prompts of one text: what a chat template adds to both cancels out.
_PROBE_CHARACTERS: Final = (120, 480)


class NotAnsweredError(ToolError):
    """A server that answers no request, or says nothing of the tokens that it read."""


def opened(  # noqa: PLR0913 - each is one independent fact about the session
    *,
    url: str,
    api: Api,
    name: str,
    declared: LoadTest,
    slos: Mapping[str, Slo],
    corpus: str,
    context_tokens: int | None,
    log: Path,
    salt: int = 0,
    task: Task = "chat",
) -> Session:
    """
    Make ready to drive a model: ask the server how it tokenizes the corpus.

    Args:
        url: Root of the server.
        api: What it speaks.
        name: The model as it calls it.
        declared: Sizes of the runs.
        slos: Levels by host.
        corpus: Text from which prompts are cut.
        context_tokens: Context of a request, if it is known.
        log: Output of the generator's processes.
        salt: Changes what prompts begin with and nothing else of them: another one for each test of
            a server that keeps the prompts of earlier ones.
        task: Answers to conversations, or embeddings; of those only the whole time is judged.

    Raises:
        NotAnsweredError: The server does not answer, or says nothing of the tokens that it read.
        ToolError: The generator's process died.
    """
    # Greedy: two runs of one plan then have answers of the same length, and can be compared.
    target = plan.Target(
        url=url,
        api=api,
        model=name,
        generate_tokens=declared.generate_tokens,
        timeout_s=float(declared.timeout_seconds),
        temperature=0.0,
        seed=declared.seed,
        context_tokens=context_tokens,
        task=task,
    )
    return Session(
        target=target,
        declared=declared,
        slos=slos if task == "chat" else {host: of_embeddings(slo) for host, slo in slos.items()},
        corpus=corpus,
        chars_per_token=_chars_per_token(target, corpus, log),
        log=log,
        salt=salt,
    )


def of_embeddings(slo: Slo) -> Slo:
    """Return the levels that an embedding can keep: it comes in one piece."""
    return slo.model_copy(update={"ttft_ms": None, "tpot_ms": None})


def _chars_per_token(target: Target, corpus: str, log: Path) -> float:
    """Measure how many characters of a text the server reads as one token."""
    planned = plan.closed(
        "tokens of the corpus",
        concurrency=1,
        prompts=[
            plan.Prompt(messages=({"role": "user", "content": corpus[:count]},))
            for count in _PROBE_CHARACTERS
        ],
        warm_up_requests=0,
        max_run_s=2 * target.timeout_s,
        seed=target.seed,
    )
    raw = generator.run(planned, replace(target, generate_tokens=1), log=log, progress=None)
    short, long = measures.texts(planned, raw)
    for each in (short, long):
        # The one token that is asked for may show nothing: the end, the start of a thought, the
        # half of a character. Its prompt was read all the same.
        if not each.ok and each.error != "empty_output":
            raise NotAnsweredError(
                f"{target.url} does not answer a request: {each.error}: {each.detail}",
                hint="Look at the server's own log.",
                log=log,
            )
    if not short.prompt_tokens or not long.prompt_tokens:
        raise NotAnsweredError(
            f"{target.url} does not say how many tokens it read, and they are not guessed here.",
            hint="For an OpenAI-compatible server: it has to support stream_options.include_usage.",
            log=log,
        )
    characters = _PROBE_CHARACTERS[1] - _PROBE_CHARACTERS[0]
    return characters / max(1, long.prompt_tokens - short.prompt_tokens)


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
        salt: See `opened`.
    """

    target: Target
    declared: LoadTest
    slos: Mapping[str, Slo]
    corpus: str
    chars_per_token: float
    log: Path
    salt: int = 0

    def drive(self, runs: list[LoadRun], verify: Callable[[], None]) -> None:
        """
        Run the ladder, the open run, and the soak if one is declared.

        Args:
            runs: Each finished run is appended at once, so that what breaks later loses nothing.
            verify: Called after each run; raises if the server is no longer what it was.
        """
        for concurrency in sorted(set(self.declared.concurrency)):
            runs.append(self._closed(concurrency))
            verify()
        rate_per_s = self.rate_per_s(runs)
        if rate_per_s <= 0:
            return
        runs.append(self._with_its_rate(self.open_loop(rate_per_s)))
        verify()
        if self.declared.soak_seconds:
            runs.append(self.soak(rate_per_s))
            verify()

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

    def rate_per_s(self, ladder: Sequence[LoadRun]) -> float:
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

    def _with_its_rate(self, run: LoadRun) -> LoadRun:
        """Say that a rate was not declared: a slower server would have had an easier one."""
        if self.declared.rate_per_s is not None or run.rate_per_s is None:
            return run
        note = (
            f"arrivals came at {run.rate_per_s:.3g}/s, {_SHARE_OF_SATURATION:.0%} of what this "
            "server reached; how many users ask for is declared as load_test.rate_per_s"
        )
        return run.model_copy(update={"notes": (*run.notes, note)})

    def soak(self, rate_per_s: float) -> LoadRun:
        """Run random arrivals for the declared time."""
        expected = rate_per_s * self.declared.soak_seconds
        # Four deviations more than the mean of a Poisson count, so that none is sent twice.
        count = min(_MOST_SOAK_PROMPTS, math.ceil(expected + 4 * math.sqrt(expected)) + 10)
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

    def smoke(self, type_: str) -> LoadRun:
        """Send a few requests, one at a time."""
        return self._run(
            plan.closed(
                f"smoke {type_}",
                concurrency=1,
                prompts=self._prompts(self.declared.smoke_requests, salt=1 << 18, warm_up=False),
                warm_up_requests=0,
                max_run_s=self.declared.max_run_seconds,
                seed=self.declared.seed,
            )
        )

    def greedy_answers(self, type_: str) -> list[Answer]:
        """Ask the same of every type, one at a time, without chance; one answer for each prompt."""
        planned = plan.closed(
            f"greedy answers of {type_}",
            concurrency=1,
            prompts=plan.corpus_prompts(
                self.corpus,
                self.declared.degenerate_prompts,
                prompt_tokens=self.declared.prompt_tokens,
                chars_per_token=self.chars_per_token,
                seed=self.declared.seed,
            ),
            warm_up_requests=0,
            max_run_s=self.declared.max_run_seconds,
            seed=self.declared.seed,
        )
        return measures.texts(planned, self._send(planned))

    def _prompts(self, count: int, *, salt: int, warm_up: bool = True) -> tuple[plan.Prompt, ...]:
        """Cut prompts that no earlier run sent, so that no cache of the server knows them."""
        return plan.corpus_prompts(
            self.corpus,
            count + (self.declared.warm_up_requests if warm_up else 0),
            prompt_tokens=self.declared.prompt_tokens,
            chars_per_token=self.chars_per_token,
            seed=self.declared.seed * (1 << 20) + salt,
            salt=self.salt,
        )

    def _run(self, planned: Plan) -> LoadRun:
        return measures.summarise(planned, self._send(planned), self.slos)

    def _send(self, planned: Plan) -> generator.Raw:
        with console.Progress(
            f"load: {planned.name}", total=len(planned.prompts), unit="requests"
        ) as progress:
            return generator.run(planned, self.target, log=self.log, progress=progress)

    def _embeds(self, run: LoadRun) -> bool:
        return self.target.task == "embed" and run.ok_count > 0

    def calibrate(self, runs: Sequence[LoadRun]) -> Calibration | None:
        """Measure the client at the fastest pace that a run showed; None if no run had output."""
        paces = [_pace(run) for run in runs if run.output_tok_s > 0 or self._embeds(run)]
        if not paces:
            return None
        streams, pace = max(paces, key=math.prod)
        levels = [slo.tpot_ms for slo in self.slos.values() if slo.tpot_ms is not None]
        lags = [run.send_lag_p99_ms for run in runs if run.send_lag_p99_ms is not None]
        allowed = _DELAY_SHARE * min(levels) if levels else _LEAST_DELAY_MS
        firsts = [slo.ttft_ms for slo in self.slos.values() if slo.ttft_ms is not None]
        late = _DELAY_SHARE * min(firsts, default=0.0)
        return calibration.calibrate(
            streams=streams,
            chunks=max(20, round(pace * _CALIBRATION_S)),
            chunks_per_s=pace,
            api=self.target.api,
            limit_ms=max(_LEAST_DELAY_MS, allowed),
            log=self.log,
            send_lag_p99_ms=max(lags, default=None),
            send_lag_limit_ms=max(calibration.MOST_SEND_LAG_MS, late),
        )


def _pace(run: LoadRun) -> tuple[int, float]:
    """
    Return (streams at the same time, chunks a second of one of them) while they are streamed.

    Tokens over the whole run are fewer: prompts are read in between, and nothing comes. Of
    embeddings each is one chunk, and as many are waited for as there are users.
    """
    if run.output_tok_s <= 0:
        users = run.concurrency or max(1, run.effective_slots)
        return users, run.requests_s / users
    streams = max(1, run.effective_slots)
    average = run.output_tok_s / streams
    if run.tpot_ms is None or run.tpot_ms.p50 <= 0:
        return streams, average
    return streams, max(average, min(1000 / run.tpot_ms.p50, _MOST_OVER_AVERAGE * average))
