"""
What the answers of a run amount to.

Percentiles are nearest-rank order statistics, so each is a value that occurred, and none is given
that the sample does not carry. Counts of tokens are the server's; where it gives none, what would
need them is None and a note says so.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Final

from pipelines import console, stats
from pipelines.load import dialects
from pipelines.load_records import LoadRun, Spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pipelines.load.dialects import Answer
    from pipelines.load.generator import Raw
    from pipelines.load.plan import Plan
    from pipelines.params import Slo

_P95_FROM: Final = 200
_P99_FROM: Final = 1000
_MOST_WORDS: Final = 8
_WORD_CHARS: Final = 40
_NS_PER_MS: Final = 1e6
_NS_PER_S: Final = 1e9
# One slot hands over from answer to answer within a moment, and a thread on a busy machine stamps
# the end of one later than the beginning of the next. So a tenth of a stream is left out at both
# its ends, and streams that overlap have to do so in a fiftieth of the time with any stream.
_STREAM_MARGIN: Final = 0.1
_OVERLAP_SHARE: Final = 0.02
_LEVELS: Final = ("ttft", "tpot", "e2e")


def ttft_ms(answer: Answer) -> float:
    """Time from the scheduled start to the first content, which may be thinking."""
    assert answer.first_ns is not None, "an answer without content is no success"
    return (answer.first_ns - answer.scheduled_ns) / _NS_PER_MS


def e2e_ms(answer: Answer) -> float:
    """Time from the scheduled start to the last content; what the server tells after it is not."""
    assert answer.last_ns is not None, "an answer without content is no success"
    return (answer.last_ns - answer.scheduled_ns) / _NS_PER_MS


def tpot_ms(answer: Answer) -> float | None:
    """
    Time for each further token; None of an answer of one token, or of unknown length.

    Up to the server's word that it is done: the token that ends an answer is counted by llama.cpp,
    Ollama and vLLM, but shows no content. Up to the last content, 15 tokens were 7 % too fast.
    """
    if answer.first_ns is None or answer.last_ns is None or (answer.output_tokens or 0) <= 1:
        return None
    assert answer.output_tokens is not None
    ended_ns = max(answer.last_ns, answer.done_ns or 0)
    return (ended_ns - answer.first_ns) / (answer.output_tokens - 1) / _NS_PER_MS


def send_lag_ms(answer: Answer) -> float:
    """Time from the scheduled start to the moment in which the request was sent."""
    return max(0, answer.sent_ns - answer.scheduled_ns) / _NS_PER_MS


def texts(plan: Plan, raw: Raw) -> list[Answer]:
    """
    Return one answer for each prompt that counts, in their order.

    A prompt that was not sent within `max_run_s` has one that failed, so that the answers of two
    runs of one plan belong together by their place.
    """
    found = {answer.index: answer for answer in raw.answers}
    counted = range(plan.warm_up_requests, len(plan.prompts))
    return [found.get(index) or _unsent(index, plan) for index in counted]


def _unsent(index: int, plan: Plan) -> Answer:
    return dialects.Answer(
        index=index,
        scheduled_ns=0,
        sent_ns=0,
        end_ns=0,
        error="timeout",
        detail=f"not sent: the run had lasted {plan.max_run_s:g} s",
    )


def summarise(plan: Plan, raw: Raw, slos: Mapping[str, Slo]) -> LoadRun:
    """
    Compose the record of a run.

    Args:
        plan: What was to be sent.
        raw: What came of it.
        slos: Service levels by host, resolved.
    """
    fine = [answer for answer in raw.answers if answer.ok]
    wall_s = _wall_s(raw)
    kept = {host: _kept(fine, slo) for host, slo in slos.items()}
    return LoadRun(
        name=plan.name,
        kind=plan.kind,
        concurrency=plan.concurrency,
        rate_per_s=plan.rate_per_s,
        requests_count=len(raw.answers),
        ok_count=len(fine),
        errors=dict(sorted(Counter(each.error for each in raw.answers if each.error).items())),
        wall_s=wall_s,
        prompt_tokens_median=_median(each.prompt_tokens for each in fine),
        output_tokens_median=_median(each.output_tokens for each in fine),
        done_reasons=_done_reasons(fine),
        ttft_ms=spread([ttft_ms(each) for each in fine if each.first_ns is not None]),
        tpot_ms=spread([each for each in map(tpot_ms, fine) if each is not None]),
        gap_ms=_spread_of_gaps(raw.gaps_us),
        e2e_ms=spread([e2e_ms(each) for each in fine]),
        queue_ms=spread([each.queue_ms for each in fine if each.queue_ms is not None]),
        output_tok_s=sum(each.output_tokens or 0 for each in fine) / wall_s,
        requests_s=len(fine) / wall_s,
        effective_slots=effective_slots(fine),
        good_count={host: len(set.intersection(*each.values())) for host, each in kept.items()},
        kept_count={
            host: {
                level: len(each[level])
                for level in _LEVELS
                if getattr(slos[host], f"{level}_ms") is not None
            }
            for host, each in kept.items()
        },
        send_lag_p99_ms=percentile([send_lag_ms(each) for each in raw.answers], 0.99)
        if raw.answers and plan.kind != "closed"
        else None,
        notes=tuple(_notes(plan, raw, fine)),
    )


def _done_reasons(fine: Sequence[Answer]) -> dict[str, int]:
    """Count why answers ended, in the server's words; one that makes up words gets few lines."""
    words = (console.clean(each.done_reason)[:_WORD_CHARS] or "none" for each in fine)
    most = Counter(words).most_common(_MOST_WORDS)
    others = len(fine) - sum(count for _, count in most)
    return dict(sorted(most)) | ({"others": others} if others else {})


def _wall_s(raw: Raw) -> float:
    """Seconds from the first scheduled start to the end of the last answer, a moment at least."""
    if not raw.answers:
        return 1e-3
    started = min(answer.scheduled_ns for answer in raw.answers)
    return max(1e-3, (max(answer.end_ns for answer in raw.answers) - started) / _NS_PER_S)


def _median(values: Iterable[int | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return stats.median(known) if known else None


def percentile(values: Sequence[float], share: float) -> float:
    """
    Return the smallest value that `share` of all do not exceed (nearest rank).

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("there are no values")
    return sorted(values)[_rank(len(values), share) - 1]


def _rank(count: int, share: float) -> int:
    # 0.99 of 1,000 is 990 and not a hair more, as floating point has it of other pairs.
    return max(1, math.ceil(round(share * count, 6)))


def spread(values: Sequence[float]) -> Spread | None:
    """Return median, the percentiles that the sample carries, and the largest value."""
    return _spread_of_counts(sorted(Counter(values).items()))


def _spread_of_gaps(gaps_us: Mapping[int, int]) -> Spread | None:
    return _spread_of_counts([(length / 1000, gaps_us[length]) for length in sorted(gaps_us)])


def _spread_of_counts(counted: Sequence[tuple[float, int]]) -> Spread | None:
    """Make a spread of (value, how often), by value."""
    count = sum(often for _, often in counted)
    if not count:
        return None

    def at(rank: int) -> float:
        seen = 0
        for value, often in counted:
            seen += often
            if seen >= rank:
                return value
        raise AssertionError(rank)

    half = (at((count + 1) // 2) + at(count // 2 + 1)) / 2
    return Spread(
        count=count,
        p50=half,
        p95=at(_rank(count, 0.95)) if count >= _P95_FROM else None,
        p99=at(_rank(count, 0.99)) if count >= _P99_FROM else None,
        max=counted[-1][0],
    )


def _kept(fine: Sequence[Answer], slo: Slo) -> dict[str, set[int]]:
    """
    Return, by level, the answers that kept it; a level that is not stated is kept by all.

    An answer of one token has no further token whose time could be too long: it keeps the level of
    TPOT. One whose length the server does not tell has a TPOT that nobody knows: it does not.
    """
    kept: dict[str, set[int]] = {level: set() for level in _LEVELS}
    for answer in fine:
        one_token = answer.output_tokens == 1
        values = {
            "ttft": ttft_ms(answer) if answer.first_ns is not None else None,
            "tpot": 0.0 if one_token else tpot_ms(answer),
            "e2e": e2e_ms(answer),
        }
        for level, value in values.items():
            limit = getattr(slo, f"{level}_ms")
            if limit is None or (value is not None and value <= limit):
                kept[level].add(answer.index)
    return kept


def effective_slots(fine: Sequence[Answer]) -> int:
    """
    Return the largest number of answers that were generated at the same time.

    The time of an answer ends with its last chunk and begins with its first one, or as long before
    its last as the server says that generation took: a server or a network may hold chunks back and
    deliver them as one.
    """
    events: list[tuple[float, int]] = []
    for answer in fine:
        if answer.first_ns is None or answer.last_ns is None:
            continue
        begin = float(answer.first_ns)
        if answer.eval_ms is not None:
            begin = min(begin, max(answer.sent_ns, answer.last_ns - answer.eval_ms * _NS_PER_MS))
        margin = (answer.last_ns - begin) * _STREAM_MARGIN
        events += [(begin + margin, 1), (answer.last_ns - margin, -1)]
    lasted = _lasted(sorted(events))
    busy = sum(lasted.values())
    reached = 0.0
    for count in sorted(lasted, reverse=True):
        reached += lasted[count]
        if reached > _OVERLAP_SHARE * busy:
            return count
    return 1 if fine else 0


def _lasted(events: Sequence[tuple[float, int]]) -> dict[int, float]:
    """Return for how long there were 1, 2, 3 ... streams at the same time."""
    found: dict[int, float] = {}
    count, since = 0, 0.0
    for at, change in events:
        if count:
            found[count] = found.get(count, 0.0) + at - since
        count += change
        since = at
    return found


def _notes(plan: Plan, raw: Raw, fine: Sequence[Answer]) -> Iterable[str]:
    if raw.unsent_count:
        yield (
            f"{raw.unsent_count:,} of {plan.requests_count:,} requests were not sent: the run had "
            f"lasted {plan.max_run_s:g} s (load_test.max_run_seconds)"
        )
    failed = Counter(answer.error for answer in raw.warm_up if answer.error)
    if failed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(failed.items()))
        yield f"{failed.total()} of {len(raw.warm_up)} requests of the warm-up failed: {kinds}"
    for kind, first in _first_of_each(raw.answers).items():
        yield f"{kind}, the first: {console.clean(' '.join(first.detail.split()))}"
    # An embedding has no first content, and no tokens of its own.
    unknown = sum(each.output_tokens is None and each.first_ns is not None for each in fine)
    if unknown:
        yield f"the server gave no count of tokens for {unknown:,} of {len(fine):,} answers"
    single = sum(answer.output_tokens == 1 for answer in fine)
    if single:
        yield f"{single:,} of {len(fine):,} answers have one token, and so no time per token"
    resent = sum(answer.resent for answer in raw.answers)
    if resent:
        yield f"{resent:,} requests were sent again: the server had closed the kept connection"
    if raw.late_threads_count:
        yield (
            f"{raw.late_threads_count:,} arrivals waited for one of {raw.threads_count:,} threads "
            "of the client"
        )


def _first_of_each(answers: Iterable[Answer]) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for answer in answers:
        if answer.error is not None and answer.detail:
            found.setdefault(answer.error, answer)
    return dict(sorted(found.items()))
