"""
What is newer of the engines than what is declared, and whether it may be proposed.

The engines are llama.cpp, which is pinned as llama-cpp-python, and Ollama; who is asked for them
is in `pipelines.engine_releases`.

A release may be proposed that is newer than the declared one, is no pre-release, was not withdrawn,
is not passed over (`check_upstream.ignore`) and is as old as `check_upstream.cooldown_days` says.
Of those that may be, the newest: an engine that is released each week must not wait for ever. Age
is counted by the clock of the index. Where there is none, or only that of an author, as of Go, who
may date a commit as he likes, a release is no older than the look before the first that saw it.

A digest of the release in use that is not the declared one stops everything: somebody has to look.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from threading import Thread
from typing import TYPE_CHECKING, Final

from pipelines import console, engine_releases, go_versions, wording
from pipelines.engine_releases import PROJECT, Listing, Pin, Release
from pipelines.errors import FleetError, MachineError
from pipelines.layout import Layout
from pipelines.upstream_records import EngineUpstream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipelines.params import Declaration
    from pipelines.upstream_records import Engine, State, UpstreamRecord

_MOST_KEPT: Final = 50
# For a program that is being ended when the deadline comes; less than who asked us waits.
_GRACE_S: Final = 0.7


def look(  # noqa: PLR0913 - each is one independent fact
    declared: Declaration,
    *,
    previous: UpstreamRecord | None,
    deadline: float,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    engines: Sequence[Engine] | None = None,
    at: Layout | None = None,
) -> tuple[EngineUpstream, ...]:
    """
    Look at every engine that is in use, at once. Nothing is raised: silence is `unknown`.

    Args:
        declared: The declaration.
        previous: The look before.
        deadline: Instant of `time.monotonic()` at which everything is over.
        clock: What time it is.
        engines: The only ones; None for all.
        at: The checkout, for logs.
    """
    if not declared.check_upstream.engines:
        return ()
    before = {one.engine: one for one in previous.engines} if previous else {}
    log = (at or Layout()).log("check-upstream", "engines")
    pins = [
        pin for pin in engine_releases.pins_of(declared) if engines is None or pin.engine in engines
    ]
    if not pins:
        return ()
    now = clock()
    listings: dict[Engine, Listing | Exception] = {}

    def ask(pin: Pin) -> None:
        try:
            listings[pin.engine] = engine_releases.listing_of(pin, deadline, log)
        except Exception as error:  # noqa: BLE001 - raised again by who waits
            listings[pin.engine] = error

    # Daemons: one that hangs, in the resolver of names say, holds up neither the other one nor the
    # end of the process, as a pool would.
    threads = [Thread(target=ask, args=(pin,), name="engines", daemon=True) for pin in pins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(deadline + _GRACE_S - time.monotonic(), 0))
    late = MachineError("it did not answer in the time that there is for a look.")
    return tuple(
        _told(pin, listings.get(pin.engine, late), before.get(pin.engine), now) for pin in pins
    )


def _told(
    pin: Pin, listing: Listing | Exception, before: EngineUpstream | None, now: datetime
) -> EngineUpstream:
    if isinstance(listing, FleetError):
        return EngineUpstream(
            engine=pin.engine,
            pinned=pin.version,
            state="unknown",
            reason=wording.sentence(_bounded(listing.message)),
            next_step=_bounded(listing.hint),
            first_seen=before.first_seen if before else {},
            last_success_at=before.last_success_at if before else None,
        )
    if isinstance(listing, Exception):
        raise listing
    return judged(pin, listing, before=before, now=now)


def _bounded(text: str) -> str:
    return wording.shortened(console.clean(" ".join(text.split())), 1000)


# --- what follows -----------------------------------------------------------------------------


def judged(
    pin: Pin, listing: Listing, *, before: EngineUpstream | None, now: datetime
) -> EngineUpstream:
    """
    Say what a list means for what is declared.

    Args:
        pin: What is declared.
        listing: What was answered.
        before: The look before.
        now: What time it is.
    """
    standing = sorted(
        (one for one in listing.releases if one.withdrawn is None),
        key=lambda one: go_versions.key(one.version),
        reverse=True,
    )
    newer = [one for one in standing if _is_newer(one.version, pin.version)]
    seen = _first_seen(pin, newer, before, now)
    allowed = [one for one in newer if one.version not in pin.ignored]
    due = {one.version: _due_at(one, seen, pin.cooldown_days) for one in allowed}
    ready = [one for one in allowed if due[one.version] <= now]
    newest = next(iter([*ready, *allowed, *newer]), None)
    younger = allowed[0] if allowed and newest is not None and allowed[0] is not newest else None
    notes = list(listing.notes)
    if younger is not None:
        notes.append(
            f"{younger.version} is newer yet and may be proposed from "
            f"{due[younger.version]:%Y-%m-%d %H:%M} UTC."
        )
    own = next((one for one in standing if one.version == pin.version), None)
    shown = newest or own
    found = EngineUpstream(
        engine=pin.engine,
        pinned=pin.version,
        newest=shown.version if shown else pin.version,
        sha256=shown.sha256 if shown else None,
        size_bytes=shown.size_bytes if shown else None,
        newest_at=shown.at if shown else None,
        state="current",
        versions_between=tuple(
            one.version
            for one in standing
            if newest is not None
            and _is_newer(one.version, pin.version)
            and _is_newer(newest.version, one.version)
        )[:_MOST_KEPT],
        younger=younger.version if younger else None,
        first_seen={version: seen[version] for version in list(seen)[:_MOST_KEPT]},
        notes=tuple(_bounded(note) for note in notes)[:20],
        requests_count=listing.requests_count,
        reason=f"{listing.said_by} lists nothing newer than {pin.version}.",
        last_success_at=now,
    )
    doubt = _doubt(pin, listing, newest if ready else None, standing)
    if doubt is not None:
        reason, next_step = doubt
        return _as(found, "asks", reason, next_step)
    if newest is None:
        return found
    if ready:
        return _as(found, "moved", f"{_called(pin)} {newest.version} {_came(newest)}.", "")
    if allowed:
        until = min(due.values())
        reason = (
            f"{_called(pin)} {newest.version} {_came(newest)}, and waits until "
            f"{until:%Y-%m-%d %H:%M} UTC (check_upstream.cooldown_days: {pin.cooldown_days})."
        )
        return _as(found, "waiting", reason, "")
    return _as(
        found,
        "ignored",
        f"{_called(pin)} {newest.version} is passed over, by check_upstream.ignore.",
        "",
    )


def _as(found: EngineUpstream, state: State, reason: str, next_step: str) -> EngineUpstream:
    changes = {"state": state, "reason": _bounded(reason), "next_step": _bounded(next_step)}
    return found.model_copy(update=changes)


def _is_newer(version: str, than: str) -> bool:
    return go_versions.key(version) > go_versions.key(than)


def _called(pin: Pin) -> str:
    return PROJECT if pin.engine == "llama.cpp" else "Ollama"


def _came(release: Release) -> str:
    if release.at is None:
        return "is there"
    verb = "was tagged" if release.is_authors_time else "was released"
    return f"{verb} on {release.at:%Y-%m-%d}"


def _first_seen(
    pin: Pin, newer: Sequence[Release], before: EngineUpstream | None, now: datetime
) -> dict[str, datetime]:
    """
    Say since when each newer release is known to be there; see the top of the module.

    One that the look before would have listed, because it was newer than all that it listed, was
    not there then. Of the others, and at the first look of all, the time that somebody says.
    """
    known = before.first_seen if before else {}
    looked = before is not None and before.last_success_at is not None
    mark = pin.version
    for version in [before.newest, before.pinned, *known] if before else []:
        if version is not None and _is_newer(version, mark):
            mark = version
    found = {}
    for one in newer:
        was_absent = looked and _is_newer(one.version, mark)
        if one.version in known:
            found[one.version] = known[one.version]
        elif one.at is None or (one.is_authors_time and was_absent):
            found[one.version] = now
        else:
            found[one.version] = one.at
    return found


def _due_at(release: Release, seen: Mapping[str, datetime], cooldown_days: int) -> datetime:
    """When a release is old enough: by the clock of the index, else as long as it is known."""
    since = seen[release.version]
    if release.at is not None:
        since = max(since, release.at) if release.is_authors_time else release.at
    return since + timedelta(days=cooldown_days)


def _doubt(
    pin: Pin, listing: Listing, proposed: Release | None, standing: Sequence[Release]
) -> tuple[str, str] | None:
    """Say why somebody has to look, and what to do; None if nobody has to."""
    section = "toolchain" if pin.engine == "llama.cpp" else "serving"
    own = next((one for one in listing.releases if one.version == pin.version), None)
    name = _called(pin)
    if listing.pins_digest and own is not None and own.sha256 not in {None, pin.sha256}:
        reason = (
            f"{listing.said_by} lists sha256 {own.sha256} for {name} {pin.version}; declared is "
            f"{pin.sha256}. The file was exchanged, or the declaration is wrong."
        )
        step = "Compare with another index before anything is built of it, then correct"
        return reason, f"{step} {section} in params.yaml."
    if proposed is not None:
        if not listing.pins_digest or proposed.sha256 is not None:
            return None
        reason = (
            f"{name} {proposed.version} is there, but not one sha256 of the file that is pinned. "
            f"Asked was: {listing.said_by}."
        )
        step = "Download it, compare its digest with another source, then set both in"
        return reason, f"{step} {section} of params.yaml."
    last = f"The newest that stands is {standing[0].version}." if standing else ""
    if own is not None and own.withdrawn is not None:
        why = f": {own.withdrawn.rstrip('.')}" if own.withdrawn else ""
        reason = f"{name} {pin.version}, which is declared, was withdrawn{why}. {last}"
        return reason, f"Decide whether to stay, or declare another one in {section}."
    if own is None and not any(_is_newer(one.version, pin.version) for one in standing):
        reason = f"{listing.said_by} does not list the declared {name} {pin.version}. {last}"
        return reason, "pip config list" if pin.engine == "llama.cpp" else ""
    return None
