"""
`fleet bump`: what upstream has newer, as pull requests that change one pinned value each.

    fleet bump --all                  every model and engine of which something may be proposed
    fleet bump tiny-llama             one model
    fleet bump --engine llama.cpp     one engine
    fleet bump --all --dry-run        print the pull requests; needs no token
    fleet bump tiny-llama --local     branch and commit in this clone; needs no GitHub

It goes by the last look (`fleet check-upstream`), or looks itself where that is of another
declaration or older than `check_upstream.period_hours`: what was the newest last week would take
the place of what is proposed today. Directories cost no request, and are looked at every time.
Nothing is built of what it finds: a person merges a change of params.yaml, or not.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, get_args

from pipelines import (
    bump_body,
    bump_change,
    bump_view,
    console,
    declaration,
    pin_lines,
    records,
    runner,
    wording,
)
from pipelines.bump_change import Bump
from pipelines.errors import FleetError, ParamsError
from pipelines.marked_yaml import spell
from pipelines.registries import Failures
from pipelines.upstream_records import Engine, UpstreamRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pipelines.bump_change import Marker
    from pipelines.bump_pull import Main, Outcome
    from pipelines.github.client import GitHub
    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.pin_lines import Place
    from pipelines.upstream_records import EngineUpstream, ModelUpstream

ENGINES: Final[tuple[Engine, ...]] = get_args(Engine)
_CHANGED: Final = frozenset({"opened", "renewed", "withdrawn"})
_MARKS: Final = {
    "opened": "🆕", "renewed": "🔁", "unchanged": "✅", "pinned": "✅", "ignored": "⏭️",
    "left": "✋", "elsewhere": "⚠️", "withdrawn": "🗑️", "doubted": "⚠️",
}  # fmt: skip
_SHOWN_ROWS: Final = 200
# By which the clocks of two machines may differ.
_SKEW: Final = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """
    What was asked for.

    Attributes:
        models: Declared ones.
        engines: Engines.
        everything: Whether that is all of them, so that what is left over is out of date.
    """

    models: tuple[str, ...]
    engines: tuple[Engine, ...]
    everything: bool


def main(  # noqa: PLR0913 - one for each option
    at: Layout,
    models: Sequence[str] = (),
    *,
    engines: Sequence[str] = (),
    everything: bool = False,
    local: bool = False,
    dry_run: bool = False,
    upstream: Path | None = None,
    as_json: bool = False,
) -> int:
    """
    Do `fleet bump`.

    Args:
        at: The checkout.
        models: The only ones to propose.
        engines: The same.
        everything: All of them, where none is named.
        local: Make branches here instead of pull requests.
        dry_run: Print what would be proposed, and change nothing.
        upstream: Record of a look; None for the last one of this checkout.
        as_json: Print what was done as JSON.

    Returns:
        0, also if nothing moved; the exit code of the first that failed.

    Raises:
        ParamsError: The declaration is wrong, nothing or something unknown was named, `upstream`
            is no record or too old, or GitHub's variables are missing.
    """
    declared = declaration.load(at.params)
    wanted = _wanted(declared, models, engines, everything=everything)
    record = _last_look(at, declared, wanted, upstream)
    gh = _github(local=local, dry_run=dry_run)
    bumps = _planned(at, declared, record, wanted, waits=_waits(gh))
    _tell_others(record, wanted)
    failures = Failures()
    if dry_run:
        _show(at, gh, bumps, failures, as_json=as_json)
        return failures.exit_code
    outcomes = list(_brought(at, gh, bumps, failures))
    if gh is not None:
        outcomes += _settled(gh, record, wanted, failures)
    _tell(bumps, outcomes, failures, as_json=as_json, waits=_waits(gh))
    return failures.exit_code


def plan(
    at: Layout,
    declared: Declaration,
    record: UpstreamRecord,
    models: Sequence[str] | None = None,
    *,
    waits: bool = False,
) -> tuple[Bump, ...]:
    """
    Say which changes of models a look proposes.

    Args:
        at: The checkout, with the records of earlier runs.
        declared: Its declaration.
        record: Of the look.
        models: The only ones; None for all.
        waits: Whether checks of the pull request wait for a click.
    """
    chosen = declared.models if models is None else models
    return tuple(
        of_model(at, declared, found, waits=waits)
        for found in record.models
        if found.model in chosen and _is_proposed(declared, found)
    )


def of_model(at: Layout, declared: Declaration, found: ModelUpstream, *, waits: bool) -> Bump:
    """Return the change that a look proposes of one model; see `plan`."""
    newest = found.newest or found.pinned
    view = bump_view.of_model(at, declared, found, waits=waits)
    return Bump(
        subject=found.model,
        old=found.pinned,
        new=newest,
        edits={("models", found.model, "revision"): newest},
        title=bump_view.title(found),
        body=partial(bump_body.render, view),
        labels=bump_view.labels(found),
    )


def _is_proposed(declared: Declaration, found: ModelUpstream) -> bool:
    spec = declared.models.get(found.model)
    return (
        spec is not None
        and found.state == "moved"
        and found.newest is not None
        and (found.source, found.pinned) == (spec.source, spec.revision)
    )


# --- what is asked for ------------------------------------------------------------------------


def _wanted(
    declared: Declaration, models: Sequence[str], engines: Sequence[str], *, everything: bool
) -> _Wanted:
    """
    Say what is asked for.

    Raises:
        ParamsError: Nothing, or something that is not there.
    """
    for name in models:
        if name not in declared.models:
            raise ParamsError(
                f"{wording.quoted(name)} is no model of params.yaml"
                f"{wording.did_you_mean(name, declared.models)}",
                hint="`fleet check-upstream` lists them.",
            )
    for name in engines:
        if name not in ENGINES:
            raise ParamsError(f"{wording.quoted(name)} is no engine: {' or '.join(ENGINES)}.")
        if name in declared.models:
            raise ParamsError(
                f"a model is called {name}, too, and a branch can be of one of them only.",
                hint="Give the model another name, or change the pin of the engine by hand.",
            )
    if models or engines:
        known = tuple(each for each in ENGINES if each in engines)
        return _Wanted(models=tuple(dict.fromkeys(models)), engines=known, everything=False)
    if not everything:
        raise ParamsError(
            "nothing was named.", hint="fleet bump MODEL, or --engine NAME, or --all."
        )
    watched = ENGINES if declared.check_upstream.engines else ()
    # A model may be called `ollama`; the branch of that name is then the model's.
    free = tuple(each for each in watched if each not in declared.models)
    return _Wanted(models=tuple(declared.models), engines=free, everything=True)


def _last_look(
    at: Layout, declared: Declaration, wanted: _Wanted, upstream: Path | None
) -> UpstreamRecord:
    """
    Return the last look; a new one where there is none, or where that is old or of other words.

    Raises:
        ParamsError: `upstream` is no record, or too old.
    """
    from pipelines import check_upstream  # noqa: PLC0415 - only here somebody is asked

    path = upstream or at.upstream
    found = records.read_or_reason(path, UpstreamRecord)
    now = datetime.now(UTC)
    if upstream is not None and isinstance(found, str):
        raise ParamsError(
            f"{path} is no record of a look: {console.clean(found)}",
            hint=f"fleet check-upstream --out {path}",
        )
    if isinstance(found, str) and path.exists():
        # It alone remembers whose repository each was: without it a stranger's could pass.
        raise ParamsError(
            f"{console.clean(found)}: nothing is proposed by a look that has to begin anew.",
            hint="See on the Hub that each repository is whose it was, then type: "
            "fleet check-upstream",
        )
    if isinstance(found, UpstreamRecord):
        is_recent = _is_recent(declared, found.checked_at, now)
        if upstream is not None and not is_recent:
            raise ParamsError(
                f"{path} is a look of {found.checked_at:%Y-%m-%d %H:%M} UTC, older than "
                f"check_upstream.period_hours ({declared.check_upstream.period_hours}): what was "
                "the newest then may not be it now.",
                hint=f"Look again: fleet check-upstream --out {path}; in a workflow, run all of "
                "its jobs again.",
            )
        # A record that was named is the answer of another job, which also writes nothing.
        engines = wanted.engines if upstream is None else ()
        if (
            is_recent
            and _fits(at, declared, found, wanted, now)
            and _has_engines(declared, found, engines, now)
        ):
            local = [
                name for name in wanted.models if declared.models[name].source.startswith("path:")
            ]
            if not local:
                return found
            return check_upstream.look(at, declared, models=local, previous=found)
    console.info("There is no look at this very declaration that is recent enough: looking.")
    previous = None if isinstance(found, str) else found
    models = None if wanted.everything or wanted.engines else wanted.models
    record = check_upstream.look(at, declared, models=models, previous=previous)
    records.write(at.upstream, record)
    return record


def _is_recent(declared: Declaration, looked_at: datetime | None, now: datetime) -> bool:
    """Tell whether what was the newest at some time may be taken for that of now."""
    period = timedelta(hours=declared.check_upstream.period_hours)
    return looked_at is not None and -_SKEW <= now - looked_at < period


def _fits(
    at: Layout, declared: Declaration, record: UpstreamRecord, wanted: _Wanted, now: datetime
) -> bool:
    """Tell whether a look is of the declaration that is here."""
    if record.params_sha256 is not None:
        return record.params_sha256 == hashlib.sha256(at.params.read_bytes()).hexdigest()
    if wanted.engines:
        return False
    known = {found.model: found for found in record.models}
    for name in wanted.models:
        spec, found = declared.models[name], known.get(name)
        if found is None or (found.newest in spec.ignore) != (found.state == "ignored"):
            return False
        if (found.source, found.track, found.pinned) != (spec.source, spec.track, spec.revision):
            return False
        # A look at some models carries along what earlier ones said of the others.
        if found.state != "unknown" and not _is_recent(declared, found.last_success_at, now):
            return False
    return True


def _has_engines(
    declared: Declaration, record: UpstreamRecord, engines: Sequence[Engine], now: datetime
) -> bool:
    """Tell whether a look asked for engines: `fleet repro` carries along what others found."""
    if not engines or not declared.check_upstream.engines:
        return True
    from pipelines import engine_releases  # noqa: PLC0415 - only where engines were asked for

    known = {each.engine: each for each in record.engines}
    for pin in engine_releases.pins_of(declared):
        found = known.get(pin.engine)
        if pin.engine in engines and (
            found is None
            or (found.state != "unknown" and not _is_recent(declared, found.last_success_at, now))
        ):
            return False
    return True


def _planned(
    at: Layout, declared: Declaration, record: UpstreamRecord, wanted: _Wanted, *, waits: bool
) -> tuple[Bump, ...]:
    bumps = plan(at, declared, record, wanted.models, waits=waits)
    moved = [each.engine for each in record.engines if each.state == "moved"]
    if not any(name in wanted.engines for name in moved):
        return bumps
    from pipelines import bump_engine  # noqa: PLC0415 - only where an engine moved

    return (*bumps, *bump_engine.plan(at, declared, record, wanted.engines, waits=waits))


def _tell_others(record: UpstreamRecord, wanted: _Wanted) -> None:
    """Say of what was asked for and is not proposed why; loudly where a person has to look."""
    of_models = [(each.model, each) for each in record.models if each.model in wanted.models]
    of_engines = [(each.engine, each) for each in record.engines if each.engine in wanted.engines]
    others: list[tuple[str, ModelUpstream | EngineUpstream]] = [*of_models, *of_engines]
    for name, each in others:
        text = console.clean(f"{name}: {each.state}: {each.reason}")
        if each.state == "asks":
            console.warn(text)
        elif each.state != "moved":
            console.info(text)
        if each.state in {"asks", "unknown"} and each.next_step:
            console.info(f"  next: {console.clean(each.next_step)}")


# --- doing it ---------------------------------------------------------------------------------


def _github(*, local: bool, dry_run: bool) -> GitHub | None:
    """Return GitHub; None in a clone, and for a dry run that has no token."""
    from pipelines.github.client import GitHub  # noqa: PLC0415 - not for --help

    if local or (dry_run and not os.environ.get("GITHUB_TOKEN", "").strip()):
        return None
    try:
        return GitHub.from_environment()
    except ParamsError as error:
        error.hint = (
            f"{error.hint} Without GitHub: --local makes the branch in this clone, --dry-run "
            "prints the pull request."
        )
        raise


def _waits(gh: GitHub | None) -> bool:
    """Tell whether checks of what this token opens wait for a click."""
    from pipelines.github import identity  # noqa: PLC0415 - not for --local

    return gh is not None and not identity.starts_checks(gh)


def _brought(
    at: Layout, gh: GitHub | None, bumps: Sequence[Bump], failures: Failures
) -> Iterator[Outcome]:
    """Propose each; one that fails keeps nobody from the others."""
    from pipelines import bump_local, bump_pull  # noqa: PLC0415 - not for --dry-run

    for bump in bumps:
        with failures.of(bump.subject):
            seen = pin_lines.values(at.params, bump.edits)
            _tell_uncommitted(at, bump)
            yield (
                bump_pull.bring(gh, bump, seen)
                if gh is not None
                else bump_local.bring(at, bump, seen)
            )


def _tell_uncommitted(at: Layout, bump: Bump) -> None:
    """Say that a directory is pinned as it lies here, and not as any commit has it."""
    from pipelines import trees  # noqa: PLC0415 - the same

    spec = declaration.load(at.params).models.get(bump.subject)
    kind, _, place = spec.source.partition(":") if spec else ("", "", "")
    if kind == "path" and trees.Git(at.root).differs("HEAD", place):
        console.warn(
            f"{bump.subject}: files in {place} are not committed: the digest is that of the files "
            f"here. Commit them on {bump.branch}."
        )


def _settled(
    gh: GitHub, record: UpstreamRecord, wanted: _Wanted, failures: Failures
) -> Iterator[Outcome]:
    """Close what is out of date and mark what somebody has to look at first."""
    from pipelines import bump_pull  # noqa: PLC0415 - the same

    subjects: dict[str, ModelUpstream | EngineUpstream] = {
        **{each.model: each for each in record.models if each.model in wanted.models},
        **{each.engine: each for each in record.engines if each.engine in wanted.engines},
    }

    def reason(marker: Marker, main: Main) -> str | None:
        if wanted.everything or marker.subject in subjects:
            return _out_of_date(subjects.get(marker.subject), marker, main)
        return None

    def doubt(subject: str) -> str | None:
        found = subjects.get(subject)
        if found is None or found.state != "asks":
            return None
        return " ".join(filter(None, (found.reason, found.next_step)))

    with failures.of("open pull requests"):
        for each in bump_pull.settle(gh, reason, doubt):
            if isinstance(each, FleetError):
                failures.add("an open pull request", each)
            else:
                yield each


def _out_of_date(
    found: ModelUpstream | EngineUpstream | None, marker: Marker, main: Main
) -> str | None:
    """Say why what an open pull request proposes is out of date; None if it is not."""
    name, pins = bump_change.short(marker.new), _pins(main, marker.subject)
    if pins is None:
        return f"{marker.subject} is not declared on {main.name} any more."
    if pins == marker.new:
        return f"{main.name} pins {name} already."
    if found is None or found.pinned != pins:
        return None  # that look was of something else
    if found.state == "ignored" and found.newest != marker.new:
        return None
    return {
        "current": f"What {main.name} pins is the newest; {name} was taken back upstream.",
        "ignored": f"{name} is one that params.yaml passes over.",
        "card": "What is newest upstream differs in nothing that is proposed.",
    }.get(found.state)


def _pins(main: Main, subject: str) -> Any:  # noqa: ANN401 - a value of params.yaml
    """Return what the default branch pins of a model or an engine; None if that is not declared."""
    places: dict[str, Place] = {
        "llama.cpp": ("toolchain", "llama_cpp_python"),
        "ollama": ("serving", "ollama"),
    }
    place = places.get(subject, ("models", subject, "revision"))
    try:
        return pin_lines.values(main.params, [place])[place]
    except ParamsError:
        return None


# --- telling ----------------------------------------------------------------------------------


def _show(
    at: Layout, gh: GitHub | None, bumps: Sequence[Bump], failures: Failures, *, as_json: bool
) -> None:
    """Print what would be proposed, and with a token also why GitHub would not get it."""
    from pipelines import bump_pull  # noqa: PLC0415 - as above

    shown = []
    for bump in bumps:
        with failures.of(bump.subject):
            seen = pin_lines.values(at.params, bump.edits)
            objection = bump_pull.wish(gh, bump, seen) if gh is not None else None
            why = objection.sentence if objection else None
            shown.append(
                _shown(bump) | {"diff": diff(at, bump), "body": bump.text(), "objection": why}
            )
    if as_json:
        console.out(_json({"bumps": shown, "failures": failures.as_json()}))
        return
    for each in shown:
        console.out(f"{each['title']}\n")
        console.out(f"branch: {each['branch']}\nlabels: {', '.join(each['labels'])}\n")
        console.out(each["diff"])
        console.out(each["body"])
        if each["objection"]:
            console.warn(console.clean(f"{each['subject']}: {each['objection']}"))
    if not bumps:
        console.info("Nothing to propose.")


def diff(at: Layout, bump: Bump) -> str:
    """Return the change of params.yaml as a unified diff."""
    before = at.params.read_bytes()
    after = pin_lines.changed(before, bump.edits)
    lines = difflib.unified_diff(
        before.decode().splitlines(), after.decode().splitlines(),
        "a/params.yaml", "b/params.yaml", lineterm="", n=1,
    )  # fmt: skip
    return "".join(f"{console.clean(line)}\n" for line in lines)


def _json(told: dict[str, Any]) -> str:
    return json.dumps(told, indent=2, ensure_ascii=False)


def _shown(bump: Bump) -> dict[str, Any]:
    return {
        "subject": bump.subject,
        "old": bump.old,
        "new": bump.new,
        "branch": bump.branch,
        "title": bump.title,
        "labels": list(bump.labels),
        "edits": {spell(place): value for place, value in bump.edits.items()},
    }


def _tell(
    bumps: Sequence[Bump],
    outcomes: Sequence[Outcome],
    failures: Failures,
    *,
    as_json: bool,
    waits: bool,
) -> None:
    """Say what became of everything: to people, to the runner, to the summary of the job."""
    by_subject = {bump.subject: bump for bump in bumps}
    if as_json:
        told = [
            (_shown(by_subject[each.subject]) if each.subject in by_subject else {})
            | {
                "subject": each.subject,
                "state": each.state,
                "sentence": each.sentence,
                "url": each.url,
                "number": each.number,
                "commit": each.commit,
            }
            for each in outcomes
        ]
        console.out(_json({"bumps": told, "failures": failures.as_json()}))
    for each in outcomes:
        text = console.clean(
            f"{each.subject}: {each.sentence}" + (f" {each.url}" if each.url else "")
        )
        (console.warn if each.state in {"left", "elsewhere", "doubted"} else console.info)(text)
    if not outcomes and not failures.errors:
        console.info("Nothing to propose.")
    if not runner.in_actions():
        return
    runner.outputs(
        any=any(each.state in _CHANGED for each in outcomes),
        pull_requests=" ".join(each.url for each in outcomes if each.url),
    )
    runner.summary(_summary(outcomes, failures, waits=waits))


def _summary(outcomes: Sequence[Outcome], failures: Failures, *, waits: bool) -> str:
    from pipelines.render import escape_markdown as text  # noqa: PLC0415 - jinja2

    lines = ["## Proposed", ""]
    if waits and any(each.state in {"opened", "renewed"} for each in outcomes):
        lines += [f"> {bump_view.NOTICE}", ""]
    if outcomes:
        lines += ["| | | |", "|---|---|---|"]
    for each in outcomes[:_SHOWN_ROWS]:
        link = f" [#{each.number}]({each.url})" if each.url else ""
        lines.append(
            f"| {_MARKS[each.state]} {each.state} | **{text(each.subject)}**{link} | "
            f"{text(each.sentence)} |"
        )
    if not outcomes and not failures.errors:
        lines.append("Nothing to propose.")
    for what, error in failures.errors.items():
        lines.append(f"- ❌ **{text(what)}**: {text(error.message)}")
        lines += [f"  - next: {text(error.hint)}"] if error.hint else []
    return "\n".join(lines)
