"""
Is the generator itself fast enough? Measured against a server that only sends.

The null server streams as many chunks to as many virtual users, at the pace that the real server
showed. What a chunk takes from its send to the stamp of the client is added to every time that the
client measures. It has to be small against the level that is judged, and requests have to leave on
schedule; otherwise the run says something about the client, and no gate may use it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import wording
from pipelines.load import generator, measures, null_server, plan
from pipelines.load_records import Calibration

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipelines.load.generator import Raw
    from pipelines.load.plan import Api

# Of the schedule of an open run; a request that leaves later was timed from a moment at which the
# client slept. Under levels of seconds more may pass.
MOST_SEND_LAG_MS: Final = 10.0
# A 99th percentile of fewer chunks is the worst one or two of them.
_CHUNKS_WANTED: Final = 1000
_MOST_S: Final = 10.0
_TIMEOUT_S: Final = 30.0
_NS_PER_MS: Final = 1e6


class CalibrationError(generator.GeneratorError):
    """The client did not read the null server to the end."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """
    What the client adds and costs.

    Attributes:
        delays_ms: From send to stamp, of each chunk.
        added_ttft_ms: Of each request: its time to first token, less the time that the server
            took from having the request to sending the first chunk.
        late_ms: How much the server was behind its pace, of each chunk; in none of the above.
        cpu_s_per_1000_chunks: Processor time of the client while it ran.
        after_cpu_s_per_1000_chunks: The same after the run, when the answers are understood.
    """

    delays_ms: tuple[float, ...]
    added_ttft_ms: tuple[float, ...]
    late_ms: tuple[float, ...]
    cpu_s_per_1000_chunks: float
    after_cpu_s_per_1000_chunks: float


def calibrate(  # noqa: PLR0913 - each is one independent fact about the run
    *,
    streams: int,
    chunks: int,
    chunks_per_s: float,
    api: Api,
    limit_ms: float,
    log: Path,
    send_lag_p99_ms: float | None = None,
    send_lag_limit_ms: float = MOST_SEND_LAG_MS,
) -> Calibration:
    """
    Measure the client at the pace of a run, and judge it.

    Args:
        streams: Answers that were streamed at the same time.
        chunks: Chunks of an answer.
        chunks_per_s: Of one stream.
        api: Dialect of the run.
        limit_ms: What may be added to a time at most, by 99 of 100 chunks.
        log: Output of the processes.
        send_lag_p99_ms: Of the real open run, if there was one.
        send_lag_limit_ms: What that may be. Times count from the scheduled start, so that a late
            send only makes them worse.

    Raises:
        CalibrationError: An answer did not come through.
    """
    found = footprint(streams=streams, chunks=chunks, chunks_per_s=chunks_per_s, api=api, log=log)
    p99 = measures.percentile(found.delays_ms, 0.99)
    reasons = []
    if p99 > limit_ms:
        reasons.append(
            f"the client adds {wording.beyond(p99, limit_ms)} ms to 1 of 100 chunks at {streams} "
            f"streams of {chunks_per_s:.0f} chunks/s, {limit_ms:.1f} ms are allowed"
        )
    if send_lag_p99_ms is not None and send_lag_p99_ms > send_lag_limit_ms:
        reasons.append(
            f"1 of 100 requests left {wording.beyond(send_lag_p99_ms, send_lag_limit_ms)} ms after "
            f"its time, {wording.declared(send_lag_limit_ms)} ms are allowed"
        )
    return Calibration(
        streams_count=streams,
        chunks_per_s=chunks_per_s,
        delay_p50_ms=measures.percentile(found.delays_ms, 0.5),
        delay_p99_ms=p99,
        send_lag_p99_ms=send_lag_p99_ms,
        null_late_p99_ms=measures.percentile(found.late_ms, 0.99),
        cpu_s_per_1000_chunks=found.cpu_s_per_1000_chunks,
        client_bound=bool(reasons),
        reason="; ".join(reasons),
    )


def footprint(  # noqa: PLR0913 - each is one independent fact about the run
    *,
    streams: int,
    chunks: int,
    chunks_per_s: float,
    api: Api,
    log: Path,
    rounds: int | None = None,
    batch: bool = True,
) -> Footprint:
    """
    Drive the null server.

    Args:
        streams: Answers that are streamed at the same time.
        chunks: Chunks of an answer.
        chunks_per_s: Of one stream.
        api: Dialect.
        log: Output of the processes.
        rounds: Answers to each virtual user; if absent, as many as a thousand chunks need, but for
            ten seconds at most.
        batch: Send the chunks of all streams at the same moments, as a server does that generates
            them in batches.

    Raises:
        CalibrationError: An answer did not come through.
    """
    if rounds is None:
        rounds = max(1, math.ceil(_CHUNKS_WANTED / (streams * chunks)))
        rounds = max(1, min(rounds, int(_MOST_S * chunks_per_s / chunks)))
    prompts = [_prompt(null_server.WARM_UP)] * streams + [_prompt("run")] * (streams * rounds)
    planned = plan.closed(
        f"calibration {streams}",
        concurrency=streams,
        prompts=prompts,
        warm_up_requests=streams,
        max_run_s=_MOST_S + 2 * rounds * chunks / chunks_per_s,
        seed=0,
        keep_stamps=True,
    )
    # All streams are sent at the same moments, and equal answers end at the same: without a pause
    # between their starts, all requests of a round would queue for this client.
    ramp_s = min(1 / chunks_per_s, chunks / chunks_per_s / streams)
    planned = dataclasses.replace(planned, ramp_s=ramp_s)
    with null_server.running(log) as url:
        target = plan.Target(
            url=url,
            api=api,
            model=null_server.model(chunks, chunks_per_s, batch=batch),
            generate_tokens=chunks,
            timeout_s=_TIMEOUT_S,
            temperature=0.0,
            seed=0,
            context_tokens=None,
        )
        raw = generator.run(planned, target, log=log)
    return _footprint(raw)


def _prompt(content: str) -> plan.Prompt:
    return plan.Prompt(messages=({"role": "user", "content": content},))


def _footprint(raw: Raw) -> Footprint:
    failed = [answer for answer in raw.answers if not answer.ok]
    if failed or not raw.answers:
        detail = f": {failed[0].error}, {failed[0].detail}" if failed else ""
        raise CalibrationError(
            f"{len(failed)} of {len(raw.answers)} answers of the null server failed{detail}."
        )
    delays: list[float] = []
    late: list[float] = []
    added: list[float] = []
    for answer in raw.answers:
        sent = [null_server.stamp(text) for text in answer.texts]
        delays += _differences_ms(answer.stamps_ns, [each.sent_ns for each in sent])
        late += [each.late_ns / _NS_PER_MS for each in sent]
        inside_ms = (sent[0].sent_ns - sent[0].asked_ns) / _NS_PER_MS
        added.append(measures.ttft_ms(answer) - inside_ms)
    return Footprint(
        delays_ms=tuple(delays),
        added_ttft_ms=tuple(added),
        late_ms=tuple(late),
        cpu_s_per_1000_chunks=raw.cpu_s / len(delays) * 1000,
        after_cpu_s_per_1000_chunks=raw.after_cpu_s / len(delays) * 1000,
    )


def _differences_ms(later: Sequence[int], earlier: Sequence[int]) -> list[float]:
    return [(one - other) / _NS_PER_MS for one, other in zip(later, earlier, strict=True)]
