"""What a look at upstream found, in words: for a terminal, a job summary, and the report."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from pipelines import wording
from pipelines.console import clean
from pipelines.upstream_records import UpstreamNotices

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime, timedelta

    from pipelines.params import Declaration
    from pipelines.upstream_records import EngineUpstream, ModelUpstream, UpstreamRecord

# What a person has to look at comes first.
_ORDER: Final = ("asks", "moved", "unknown", "waiting", "card", "ignored", "current")
_COMMITS_SHOWN: Final = 3
_ROWS_SHOWN: Final = 200


class _Row(NamedTuple):
    """One model or engine."""

    name: str
    state: str
    age: str
    reason: str
    next_step: str


def silence(name: str, period_hours: int) -> str:
    """Say that nothing was heard of a model or an engine, without a time."""
    return f"{name}: nothing was heard of it for two periods of {period_hours} h"


def headline(record: UpstreamRecord) -> str:
    """Say in one sentence what a look came to."""
    counts = Counter(each.state for each in record.models)
    told = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
    text = f"{wording.counted(len(record.models), 'model')}: {told}"
    if record.engines:
        of_engines = ", ".join(f"{each.engine} {each.state}" for each in record.engines)
        text += f"; engines: {of_engines}"
    return f"{text}; {wording.counted(record.requests_count, 'request')}."


def lines(record: UpstreamRecord) -> Iterator[str]:
    """Yield the lines of a terminal; all text of a stranger is cleaned."""
    yield headline(record)
    rows = _rows(record)
    width = max((len(row.name) for row in rows), default=0)
    states = max((len(row.state) for row in rows), default=0)
    for row in rows:
        age = f" [{row.age}]" if row.age else ""
        yield clean(f"  {row.name:{width}}  {row.state:{states}}  {row.reason}{age}")
        if row.next_step:
            yield clean(f"  {'':{width}}  {'':{states}}  next: {row.next_step}")
        for title in _titles(record, row.name):
            yield clean(f"  {'':{width}}  {'':{states}}  - {title}")


def markdown(record: UpstreamRecord) -> str:
    """Return the summary of the job; all text of a stranger is escaped."""
    from pipelines.render import escape_markdown as text  # noqa: PLC0415 - jinja2

    told = [f"## Upstream: {text(headline(record))}", ""]
    told += [f"- **alarm**: {text(alarm)}" for alarm in record.alarms]
    told += ["", "| | state | what changed | age | next |", "|---|---|---|---|---|"]
    rows = _rows(record)
    for row in rows[:_ROWS_SHOWN]:
        cells = (row.name, row.state, row.reason, row.age or wording.ABSENT, row.next_step)
        told.append("| " + " | ".join(text(cell) for cell in cells) + " |")
    if more := rows[_ROWS_SHOWN:]:
        told += ["", f"And {wording.counted(len(more), 'more row')}."]
    return "\n".join(told)


def notices(record: UpstreamRecord, declared: Declaration) -> UpstreamNotices:
    """
    Return what the report says: without times and reasons, which change when nothing else does.

    Args:
        record: What was found.
        declared: The declaration.
    """
    alarms = {alarm.partition(":")[0] for alarm in record.alarms}
    names = [each.model for each in record.models] + [each.engine for each in record.engines]
    hours = declared.check_upstream.period_hours
    return UpstreamNotices(
        alarms=tuple(f"{silence(name, hours)}." for name in names if name in alarms),
        asks=tuple(
            wording.shortened(f"{name}: {reason}", 2000)
            for name, state, reason in _told(record)
            if state == "asks"
        ),
        moved=tuple(
            wording.shortened(f"{name}: {reason}", 2000)
            for name, state, reason in _told(record)
            if state == "moved"
        ),
    )


def _told(record: UpstreamRecord) -> Iterator[tuple[str, str, str]]:
    """Yield name, state and reason; of what cannot be asked now, what it said last."""
    for model in record.models:
        if model.state == "unknown" and model.last_state is not None:
            yield model.model, model.last_state, model.last_reason
        else:
            yield model.model, model.state, model.reason
    for engine in record.engines:
        newer = f"{engine.newest} is newer than {engine.pinned}."
        yield engine.engine, engine.state, newer if engine.state == "moved" else engine.reason


def notices_json(record: UpstreamRecord, declared: Declaration) -> str:
    """Return `notices` as the bytes of work/upstream.json: the same until one of them changes."""
    told = json.loads(notices(record, declared).model_dump_json())
    return json.dumps(told, indent=2, ensure_ascii=False) + "\n"


def _rows(record: UpstreamRecord) -> list[_Row]:
    """Return every model and engine, those that need a person first."""
    everything: Sequence[ModelUpstream | EngineUpstream] = (*record.models, *record.engines)
    rows = [_row(each, record.checked_at) for each in everything]
    return sorted(rows, key=lambda row: _ORDER.index(row.state))


def _row(each: ModelUpstream | EngineUpstream, now: datetime) -> _Row:
    name = each.model if hasattr(each, "model") else each.engine
    age = ""
    if each.state == "unknown":
        last = each.last_success_at
        age = f"last heard {age_words(now - last)} ago" if last else "never heard"
    elif each.state != "current" and each.newest_at is not None:
        age = f"upstream for {age_words(now - each.newest_at)}"
    return _Row(name, each.state, age, each.reason, each.next_step)


def _titles(record: UpstreamRecord, name: str) -> tuple[str, ...]:
    for each in record.models:
        if each.model == name and each.state in {"moved", "waiting"}:
            more = len(each.commits) - _COMMITS_SHOWN
            told = each.commits[:_COMMITS_SHOWN]
            return (*told, f"and {wording.counted(more, 'more commit')}") if more > 0 else told
    return ()


def age_words(age: timedelta) -> str:
    """Write an age in the unit that a person would: `40 min`, `5 h`, `3 days`."""
    minutes = max(age.total_seconds(), 0) / 60
    if minutes < 90:  # noqa: PLR2004 - an hour and a half
        return f"{minutes:.0f} min"
    if minutes < 48 * 60:
        return f"{minutes / 60:.0f} h"
    return wording.counted(round(minutes / 1440), "day")
