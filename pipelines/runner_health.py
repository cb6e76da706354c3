"""
`fleet runner-health`: whether the machines that measure are there, and well.

    api      on a hosted runner     what GitHub says: who is online, too old, waited for
    probe    on each that is        what the machine finds on itself
    issues   on a hosted runner     one issue for each sick host, closed by itself

Each leaves a record for the next. A sick host fails no job: the issue is the alarm, and a gate
looks at the conditions of each measurement itself.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from pipelines import console, records, runner, wording
from pipelines.errors import ParamsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from pipelines.health_issues import Judged
    from pipelines.health_records import Finding, HealthRecord, RunnersRecord
    from pipelines.layout import Layout
    from pipelines.params import Declaration

# A probe answers in seconds; one that hangs hangs in the driver.
PROBE_TIMEOUT_MINUTES: Final = 10
_RECORD_LIMIT_BYTES: Final = 1 << 20
_MOST_FILES: Final = 1000
_SIGNS: Final = {"ok": "ok", "unknown": "unknown", "warn": "warn", "sick": "SICK"}


def api(at: Layout, *, out: Path | None, as_json: bool) -> int:
    """
    Ask GitHub about the runners; give the workflow the hosts to probe.

    Outputs `matrix` ({"include": [{"host", "runs_on", "timeout_minutes"}]}), `any` and `hosts`.

    Args:
        at: The checkout.
        out: Gets the RunnersRecord.
        as_json: Print the record.

    Raises:
        ParamsError: The declaration is wrong, or there is no token.
        RetryLaterError: GitHub cannot be asked now.
    """
    from pipelines import health_runners  # noqa: PLC0415 - not for --help
    from pipelines.github.client import GitHub  # noqa: PLC0415 - the same

    hosts = measured(_load(at))
    record = health_runners.look(GitHub.from_environment(), hosts, now=datetime.now(UTC))
    _leave(out, record)
    include = [
        {
            "host": seen.host,
            "runs_on": list(seen.runs_on),
            "timeout_minutes": PROBE_TIMEOUT_MINUTES,
        }
        for seen in record.hosts
        # A job for a machine that may be off would wait for it a day, and hold its group.
        if seen.status == "online"
    ]
    runner.outputs(
        matrix=json.dumps({"include": include}, separators=(",", ":")),
        any=bool(include),
        hosts=" ".join(str(each["host"]) for each in include),
    )
    runner.summary(_runners_page(record))
    for seen in record.hosts:
        names = wording.first_few([each.name for each in seen.runners])
        console.info(f"{seen.host}: {seen.status}{f' ({names})' if names else ''}")
        _warn(seen.host, seen.findings)
    _warn("GitHub", record.findings)
    if not hosts:
        console.info("No host of params.yaml has `runs_on`, so no runner measures for this fleet.")
    if as_json:
        console.out(record.model_dump_json(indent=2))
    return 0


def probe(at: Layout, *, host: str | None, out: Path | None, as_json: bool) -> int:
    """
    Look at this machine.

    Args:
        at: The checkout.
        host: Key in `hosts:`; None if there is one only.
        out: Gets the HealthRecord: a file, or a folder for `health-HOST.json`.
        as_json: Print the record.

    Raises:
        ParamsError: There is no such host.
    """
    from pipelines import health_probe  # noqa: PLC0415 - not for --help

    declared = _load(at)
    record = health_probe.probe(
        _host_of(declared, host), declared, at, now=datetime.now(UTC)
    )  # fmt: skip
    _leave(out / f"health-{record.host}.json" if out is not None and out.is_dir() else out, record)
    from pipelines import health_issues  # noqa: PLC0415 - jinja2

    page = [
        f"## Runner of {record.host}: {record.status}",
        "",
        *health_issues.table(record.findings),
    ]
    runner.summary("\n".join(page))
    for each in record.findings:
        limit = f" (limit {each.limit})" if each.limit else ""
        console.info(f"{_SIGNS[each.status]:8}{each.rule:20}{each.value}{limit}")
        if each.next_step and each.status != "ok":
            console.info(f"{'':28}next: {each.next_step}")
    if console.in_actions():
        _warn(record.host, record.findings)
    if as_json:
        console.out(record.model_dump_json(indent=2))
    return 0


def issues(at: Layout, *, runners: Path, probes: Path | None, dry_run: bool, as_json: bool) -> int:
    """
    Leave exactly one open issue for each sick host.

    Args:
        at: The checkout.
        runners: RunnersRecord, by `api`.
        probes: Folder of HealthRecords, by `probe`; one that was online and has none is sick.
        dry_run: Print what would be changed; change nothing.
        as_json: Print what was done, by host.

    Raises:
        RecordError: `runners` is none.
        GitHubError: The token may not write issues.
        RetryLaterError: GitHub cannot be asked now.
    """
    from pipelines import health_issues  # noqa: PLC0415 - not for --help
    from pipelines.github.client import GitHub  # noqa: PLC0415 - the same
    from pipelines.health_records import RunnersRecord  # noqa: PLC0415 - the same

    hosts = measured(_load(at))
    seen = _read(runners, RunnersRecord)
    found = _probes(probes, hosts)
    judged = [
        health_issues.judge(each, found.get(each.host), probed=each.status == "online")
        for each in seen.hosts
        if each.host in hosts
    ]
    gh = GitHub.from_environment(dry_run=dry_run)
    done = health_issues.settle(gh, judged, run_url=runner.run_url())
    runner.summary(_issues_page(judged, done))
    for host, what in done.items():
        console.info(f"{host}: {what}")
    if as_json:
        console.out(json.dumps(done, indent=2))
    return 0


def measured(declared: Declaration) -> dict[str, tuple[str, ...]]:
    """Return the labels of each host that a runner measures for, in the order of the file."""
    return {name: host.runs_on for name, host in declared.hosts.items() if host.runs_on}


def _load(at: Layout) -> Declaration:
    from pipelines import declaration  # noqa: PLC0415 - not for --help

    return declaration.load(at.params)


def _host_of(declared: Declaration, host: str | None) -> str:
    known = list(measured(declared) or declared.hosts)
    if host is None and len(known) == 1:
        return known[0]
    if host is None or host not in declared.hosts:
        asked = (
            "no host is named" if host is None else f"host {wording.quoted(host)} is not declared"
        )
        more = wording.did_you_mean(host, known) if host else ""
        raise ParamsError(f"{asked}{more or '.'}", hint=f"--host {' | '.join(known)}")
    return host


def _leave(out: Path | None, record: records.Record) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        records.write(out, record)


def _read(path: Path, kind: type[records.R]) -> records.R:
    """Read a small record of somebody else's."""
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise records.RecordError(
            f"{path} cannot be read: {error.strerror}.",
            hint="`fleet runner-health api --out FILE` writes what --runners takes, `probe` the "
            "others.",
        ) from error
    if size_bytes > _RECORD_LIMIT_BYTES or not path.is_file() or path.is_symlink():
        raise records.RecordError(f"{path} is no record: {size_bytes:,} bytes.")
    return records.read(path, kind)


def _probes(folder: Path | None, hosts: Mapping[str, Any]) -> dict[str, HealthRecord]:
    """Read the record of each host; one that cannot be read counts as none, with a word."""
    from pipelines.health_records import HealthRecord  # noqa: PLC0415 - not for --help

    found: dict[str, HealthRecord] = {}
    for host in hosts if folder is not None and folder.is_dir() else ():
        assert folder is not None
        # An artifact lies in a folder of its own, or all of them together.
        places = [folder / f"health-{host}.json", folder / f"health-{host}/health-{host}.json"]
        for path in places:
            if not path.exists() and not path.is_symlink():
                continue
            try:
                record = _read(path, HealthRecord)
            except records.RecordError as error:
                console.warn(error.message)
                continue
            if record.host == host:
                found[host] = record
            else:
                console.warn(f"{path} is of another host than its name says; it counts as none.")
    return found


def _warn(what: str, findings: Iterable[Finding]) -> None:
    """Tell what somebody should look at."""
    for each in findings:
        if each.status != "ok":
            limit = f"; limit: {each.limit}" if each.limit else ""
            step = f" {each.next_step}" if each.next_step else ""
            console.warn(f"{what}: {each.rule}: {each.value}{limit}.{step}")


def _runners_page(record: RunnersRecord) -> str:
    """Write the summary of `api`."""
    from pipelines import health_issues, render  # noqa: PLC0415 - jinja2

    escape = render.escape_markdown
    lines = ["## Runners", "", "| host | status | runners | waiting |", "| --- | --- | --- | --- |"]
    for seen in record.hosts:
        names = ", ".join(
            f"{each.name}{' (busy)' if each.busy else ''}{'' if each.online else ' (offline)'}"
            for each in seen.runners[:5]
        )
        waiting = "–" if seen.waiting_count is None else str(seen.waiting_count)
        lines.append(f"| {escape(seen.host)} | {seen.status} | {escape(names)} | {waiting} |")
    findings = [*record.findings, *(one for seen in record.hosts for one in seen.findings)]
    return "\n".join([*lines, *(["", *health_issues.table(findings)] if findings else [])])


def _issues_page(judged: Iterable[Judged], done: Mapping[str, str]) -> str:
    """Write the summary of `issues`."""
    from pipelines import render  # noqa: PLC0415 - jinja2

    escape = render.escape_markdown
    lines = ["## Runners", "", "| host | status | issue |", "| --- | --- | --- |"]
    for each in judged:
        what = done.get(each.host, "")
        lines.append(f"| {escape(each.host)} | {escape(each.status)} | {escape(what)} |")
    return "\n".join(lines)
