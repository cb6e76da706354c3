"""
`fleet check-upstream`: what is newer than what is declared, and whether it may be proposed.

The only verb that asks "what is newest?". It writes results/upstream.json, of which nothing is
built, and work/upstream.json, what the report says of it. What it finds becomes a change of the
declaration by `fleet bump` or by a person, or nothing.

A model costs one request for metadata as long as nothing moved, or nothing since the last look.
What moved is proven before it is proposed: the same repository (name, owner, the Hub's own id), a
history in which the declared commit is, files that are listed with their digests. Where that cannot
be proven the state is `asks`. A Hub that fails is `unknown` and no failure: what was known stays,
and silence for two periods becomes an alarm.
"""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pipelines import (
    architectures,
    at_once,
    atomic,
    console,
    records,
    runner,
    toolchain,
    upstream_due,
    upstream_model,
    upstream_words,
    wording,
)
from pipelines.errors import GateError, ParamsError, ToolError
from pipelines.hub_metadata import HubReader
from pipelines.layout import Layout
from pipelines.upstream_records import UpstreamRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from pipelines.hub_metadata import Reader
    from pipelines.params import Declaration
    from pipelines.upstream_records import EngineUpstream, ModelUpstream

# For an answer that is being read when the deadline comes.
_GRACE_S: Final = 1.0
# Nobody asked for this look by name.
_STAGE_DEADLINE_S: Final = 20.0
# ... and where names are not resolved or packets vanish, not even for this long.
_FIRST_ANSWER_S: Final = 3.0
# A look that reached nobody is repeated sooner than one that found nothing new.
_AGAIN_AFTER: Final = timedelta(hours=1)
_ENGINES: Final = ":engines"


def _now() -> datetime:
    return datetime.now(UTC)


def main(  # noqa: PLR0913 - one for each option
    at: Layout,
    models: Sequence[str] = (),
    *,
    as_json: bool = False,
    out: Path | None = None,
    previous: Path | None = None,
    if_due: bool = False,
    strict: bool = False,
) -> int:
    """
    Do `fleet check-upstream`.

    Args:
        at: The checkout.
        models: To look at; all if empty. What is known of the others stays.
        as_json: Print the record instead of a table.
        out: File for the record, beside results/upstream.json.
        previous: The record of the look before; None for results/upstream.json.
        if_due: This is the stage of DVC: engines are not asked, nobody waits for a Hub that is out
            of reach.
        strict: Exit with 5 if something moved or a person has to look.

    Returns:
        0, also if nobody could be asked; 5 see `strict`.

    Raises:
        ParamsError: The declaration is wrong, a model is not in it, or there is no folder for
            `out`.
    """
    from pipelines import declaration  # noqa: PLC0415 - not for a reader of the record

    if out is not None and not out.parent.is_dir():
        raise ParamsError(
            f"there is no folder {out.parent} for the record.", hint=f"mkdir -p {out.parent}"
        )
    declared = declaration.load(at.params)
    before = _before(at, previous)
    record = look(at, declared, models=models or None, previous=before, is_stage=if_due)
    records.write(at.upstream, record)
    atomic.write_text(at.upstream_notices, upstream_words.notices_json(record, declared))
    if out is not None:
        records.write(out, record)
    moved = [each.model for each in record.models if each.state == "moved"]
    moved += [each.engine for each in record.engines if each.state == "moved"]
    if as_json:
        console.out(record.model_dump_json(indent=2))
    else:
        for line in upstream_words.lines(record):
            console.out(line)
    for alarm in record.alarms:
        console.warn(console.clean(alarm))
    if runner.in_actions():
        runner.outputs(moved=" ".join(moved), any=bool(moved))
        runner.summary(upstream_words.markdown(record))
    asks = "asks" in {each.state for each in record.models} | {
        each.state for each in record.engines
    }
    return GateError.exit_code if strict and (moved or asks) else 0


def read(place: Layout | Path) -> UpstreamRecord:
    """
    Read what the last look found.

    Args:
        place: A checkout, or the file of a record.

    Raises:
        ParamsError: There is none, or it is none of this version.
    """
    path = place.upstream if isinstance(place, Layout) else place
    found = records.read_or_reason(path, UpstreamRecord)
    if isinstance(found, str):
        raise ParamsError(f"{path}: {found}.", hint="fleet check-upstream")
    return found


def _before(at: Layout, previous: Path | None) -> UpstreamRecord | None:
    """Read the record of the look before; without one, or with a strange one, all is new."""
    path = previous or at.upstream
    if not path.exists():
        if previous is not None:
            console.info(f"there is no {previous}: this is the first look.")
        return None
    found = records.read_or_reason(path, UpstreamRecord)
    if isinstance(found, str):
        console.warn(f"{console.clean(found)}: this look starts from nothing.")
        return None
    return found


# --- one look ---------------------------------------------------------------------------------


def look(  # noqa: PLR0913 - each is one independent fact, named at the call
    at: Layout,
    declared: Declaration,
    *,
    models: Sequence[str] | None = None,
    previous: UpstreamRecord | None = None,
    clock: Callable[[], datetime] = _now,
    reader: Reader | None = None,
    is_stage: bool = False,
) -> UpstreamRecord:
    """
    Look at every model, and at the engines, all at once, until one deadline for all.

    Args:
        at: The checkout.
        declared: Its declaration.
        models: To look at; None for all, and for the engines.
        previous: The look before: what it proved is not proven again, and what it trusted is what
            this one is held against.
        clock: The time of day.
        reader: Who asks the Hub; None for one made for this look.
        is_stage: Whether nobody asked for it by name: engines are not asked, since that is
            another network than the Hub's, and a stage must be cheap where there is none.

    Raises:
        ParamsError: A model is not declared.
    """
    chosen = _chosen(declared, models)
    now = clock()
    section = declared.check_upstream
    limit_s = float(section.deadline_seconds)
    if is_stage:
        limit_s = min(limit_s, _STAGE_DEADLINE_S)
    deadline = time.monotonic() + limit_s
    if reader is None:
        patience: dict[str, Any] = {"attempts": 1, "connect_timeout_s": 2.0} if is_stage else {}
        reader = HubReader(deadline=deadline, **patience)
    known = {each.model: each for each in previous.models} if previous else {}
    names = _Architectures(declared)
    subjects = {
        model: upstream_model.Subject(
            at=at,
            declared=declared,
            model=model,
            before=known.get(model),
            now=now,
            reader=reader,
            architectures=names,
            is_stage=is_stage,
        )
        for model in chosen
    }
    jobs: dict[str, Callable[[], Any]] = {
        model: partial(upstream_model.look, subject) for model, subject in subjects.items()
    }
    asks_engines = models is None and section.engines and not is_stage
    if asks_engines:
        jobs[_ENGINES] = partial(_look_at_engines, at, declared, previous, deadline, clock)
    on_the_hub = {m for m in chosen if declared.models[m].source.startswith("hf:")}
    until = at_once.Until(
        last=deadline + _GRACE_S,
        first=time.monotonic() + _FIRST_ANSWER_S if is_stage else None,
        answered=lambda: reader.was_answered,
        asked=frozenset(on_the_hub),
    )
    found = at_once.run(jobs, until, label="check-upstream", unit="questions")
    late = "it did not answer in the time that there is for a look."
    told = {model: each for model, each in known.items() if _is_of(declared, each)} | {
        model: found.get(model) or upstream_model.silent(subject, late)
        for model, subject in subjects.items()
    }
    engines = _still_declared(declared, previous.engines if previous else ())
    if asks_engines:
        engines = _since(found.get(_ENGINES) or _silent_engines(engines, late), engines, now)
    own = tuple(told[model] for model in declared.models if model in told)
    period = timedelta(hours=section.period_hours)
    reached = [each.state != "unknown" for each in own if each.source.startswith("hf:")]
    return UpstreamRecord(
        checked_at=now,
        requests_count=reader.requests_count
        + sum(each.requests_count for each in engines if asks_engines),
        models=own,
        engines=engines,
        alarms=_alarms(
            {each.model: each for each in own if each.source.startswith("hf:")}
            | {each.engine: each for each in engines},
            {*chosen, *(each.engine for each in engines if asks_engines)},
            now,
            section.period_hours,
            previous.alarms if previous else (),
        ),
        params_sha256=upstream_due.params_sha256(at) if models is None else None,
        next_at=now + (period if any(reached) or not reached else min(period, _AGAIN_AFTER)),
    )


def _chosen(declared: Declaration, models: Sequence[str] | None) -> tuple[str, ...]:
    """
    Return the models to look at.

    Raises:
        ParamsError: One is not declared.
    """
    if models is None:
        return tuple(declared.models)
    for name in models:
        if name not in declared.models:
            raise ParamsError(
                f"model {wording.quoted(name)} is not declared"
                f"{wording.did_you_mean(name, declared.models) or '.'}",
                hint=f"Declared: {', '.join(declared.models)}.",
            )
    return tuple(dict.fromkeys(models))


def _is_of(declared: Declaration, each: ModelUpstream) -> bool:
    """Tell whether what is known is about what is declared now."""
    spec = declared.models.get(each.model)
    return spec is not None and (each.source, each.track, each.pinned) == (
        spec.source,
        spec.track,
        spec.revision,
    )


class _Architectures:
    """The names that the pinned converter knows, read once and only if somebody asks."""

    def __init__(self, declared: Declaration) -> None:
        self._declared = declared
        self._lock = threading.Lock()
        self._found: list[frozenset[str] | None] = []

    def __call__(self) -> frozenset[str] | None:
        with self._lock:
            if not self._found:
                self._found.append(self._read())
            return self._found[0]

    def _read(self) -> frozenset[str] | None:
        # A hosted machine has no toolchain, and a look is no reason to build one.
        tools = toolchain.there(toolchain.spec_of(self._declared))
        try:
            return None if tools is None else architectures.supported(tools.converter)
        except ToolError:
            return None


# --- engines ----------------------------------------------------------------------------------


def _still_declared(
    declared: Declaration, known: tuple[EngineUpstream, ...]
) -> tuple[EngineUpstream, ...]:
    """Return what is known of the engines as they are declared now."""
    if not known or not declared.check_upstream.engines:
        return ()
    from pipelines import engine_releases  # noqa: PLC0415 - only where engines were asked

    pins = {(pin.engine, pin.version) for pin in engine_releases.pins_of(declared)}
    return tuple(each for each in known if (each.engine, each.pinned) in pins)


def _look_at_engines(
    at: Layout,
    declared: Declaration,
    previous: UpstreamRecord | None,
    deadline: float,
    clock: Callable[[], datetime],
) -> tuple[EngineUpstream, ...]:
    from pipelines import upstream_engines  # noqa: PLC0415 - not in the stage

    return upstream_engines.look(declared, previous=previous, deadline=deadline, clock=clock, at=at)


def _silent_engines(known: tuple[EngineUpstream, ...], reason: str) -> tuple[EngineUpstream, ...]:
    return tuple(
        each.model_copy(update={"state": "unknown", "reason": reason, "next_step": ""})
        for each in known
    )


def _since(
    found: tuple[EngineUpstream, ...], known: tuple[EngineUpstream, ...], now: datetime
) -> tuple[EngineUpstream, ...]:
    """Keep since when each engine is asked: silence is counted from there."""
    first = {each.engine: each.first_asked_at for each in known}
    return tuple(
        each.model_copy(update={"first_asked_at": first.get(each.engine) or now}) for each in found
    )


# --- alarms -----------------------------------------------------------------------------------


def _alarms(
    told: Mapping[str, ModelUpstream | EngineUpstream],
    asked: AbstractSet[str],
    now: datetime,
    period_hours: int,
    before: Sequence[str],
) -> tuple[str, ...]:
    """
    Say of what nothing was heard for two periods.

    Who was not asked is not silent: of those an alarm stays as it was. A directory always answers.

    Args:
        told: What is known of each model and engine.
        asked: Those that this look asked.
        now: The time of day.
        period_hours: As declared.
        before: The alarms of the look before.
    """
    found = []
    for name, each in told.items():
        if name not in asked:
            found += [line for line in before if line.startswith(f"{name}: ")]
            continue
        since = each.last_success_at or each.first_asked_at
        limit = 2 * timedelta(hours=period_hours)
        if each.state != "unknown" or since is None or now - since <= limit:
            continue
        heard = (
            f"the last success was at {each.last_success_at:%Y-%m-%d %H:%M} UTC"
            if each.last_success_at
            else f"it was never heard of since {since:%Y-%m-%d %H:%M} UTC"
        )
        text = f"{upstream_words.silence(name, period_hours)}; {heard}. {each.reason}"
        found.append(wording.shortened(text, 2000))
    return tuple(found)
