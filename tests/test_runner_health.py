"""Whether the machines that measure are there and well, and how people come to hear of it."""

from __future__ import annotations

import email.utils
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nvml_replay
import pytest
import sample
from github_api import GitHubApi, Token

from pipelines import (
    declaration,
    disk,
    gpu,
    health_issues,
    health_probe,
    health_runners,
    records,
    runner_health,
    toolchain,
)
from pipelines.__main__ import main
from pipelines.errors import MachineError
from pipelines.github.client import GitHub
from pipelines.health_records import Finding, HealthRecord, HostSeen, RunnersRecord
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
APP = "ghs_of-an-app"
HOSTS = """
hosts:
  desk:
    runs_on: [self-hosted, gpu, desk]
    memory_mib: 4096
  attic:
    runs_on: [self-hosted, gpu, attic]
    memory_mib: 4096
  server: {memory_mib: 4096}
"""


@pytest.fixture
def api(tmp_path: Path) -> Iterator[GitHubApi]:
    """A repository of whose machines one is online."""
    with GitHubApi(tmp_path / "origin.git") as served:
        served.tokens[APP] = Token("fleet[bot]", {"administration": "read", "actions": "read"})
        served.workflows = {".github/workflows/runner-health.yml": "active"}
        yield served


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with three hosts, of which two have runners; the working directory."""
    root = tmp_path / "fleet"
    root.mkdir()
    sample.take(root, "params.yaml", "modelfiles", "corpora", "examples", "deploy", ".dvc/config")
    text = (root / "params.yaml").read_text()
    begin, end = text.index("\nhosts:"), text.index("\nregistries:")
    end = text.rindex("\n\n", begin, end)
    (root / "params.yaml").write_text(text[:begin] + HOSTS + text[end:])
    monkeypatch.chdir(root)
    return root


def under_actions(
    api: GitHubApi, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str = APP
) -> Path:
    """Set what a runner sets; returns the file of outputs."""
    for name, value in api.environment(token).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_OUTPUT", str(folder / "output"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary"))
    return folder / "output"


def outputs(path: Path) -> dict[str, str]:
    """Read outputs as the runner does."""
    found, lines = {}, iter(path.read_text().splitlines())
    for line in lines:
        name, _, frame = line.partition("<<")
        value = []
        for each in lines:
            if each == frame:
                break
            value.append(each)
        found[name] = "\n".join(value)
    return found


def seen_by(api: GitHubApi, **hosts: tuple[str, ...]) -> RunnersRecord:
    """What is found out about some hosts."""
    gh = GitHub(api.repository, APP, api_url=api.url)
    return health_runners.look(gh, hosts, now=NOW)


# --- api: what GitHub says --------------------------------------------------------------------


def test_only_online_hosts_get_a_probe(
    api: GitHubApi, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is aimed at a machine that is off would wait for a day."""
    api.add_runner(
        "under-the-desk", ["self-hosted", "Linux", "X64", "GPU", "desk"], version="2.336.0"
    )
    api.add_runner("attic-1", ["self-hosted", "gpu", "attic"], status="offline")
    output = under_actions(api, tmp_path, monkeypatch)

    assert main(["runner-health", "api", "--out", "runners.json"]) == 0

    told = outputs(output)
    assert json.loads(told["matrix"]) == {
        "include": [
            {"host": "desk", "runs_on": ["self-hosted", "gpu", "desk"], "timeout_minutes": 10}
        ]
    }
    assert (told["any"], told["hosts"]) == ("true", "desk")
    record = records.read(fleet / "runners.json", RunnersRecord)
    assert [(each.host, each.status) for each in record.hosts] == [
        ("desk", "online"),
        ("attic", "offline"),
    ]
    assert record.hosts[1].findings[0].value == "offline: attic-1"
    assert "attic-1 (offline)" in (tmp_path / "summary").read_text()


def test_a_runner_serves_a_host_only_if_it_has_every_label(api: GitHubApi) -> None:
    """As GitHub routes jobs: whatever the case, and with more labels than asked for."""
    api.add_runner("one", ["self-hosted", "gpu"])
    api.add_runner("two", ["Self-Hosted", "GPU", "Attic", "more"])
    record = seen_by(api, desk=("self-hosted", "gpu", "desk"), attic=("self-hosted", "attic"))
    assert [each.status for each in record.hosts] == ["absent", "online"]
    assert "no runner has the labels self-hosted, gpu, desk" in record.hosts[0].findings[0].value
    assert "deploy/runner/README.md" in record.hosts[0].findings[0].next_step


@pytest.mark.parametrize(
    ("may", "status", "said"),
    [(True, "online", []), (False, "unknown", ["runners-of-organization"])],
)
def test_a_runner_of_the_organization_serves_a_host_and_unseen_ones_are_not_called_absent(
    api: GitHubApi, *, may: bool, status: str, said: list[str]
) -> None:
    """A rack is mostly registered there; a token that may not look there proves no absence."""
    number = api.add_runner("rack-1", ["self-hosted", "gpu", "rack"])
    api.settings.groups = [{"name": "rack", "restricted": True, "runners": [number]}]
    if may:
        api.tokens[APP] = Token("app[bot]", {"administration": "read", "actions": "read",
            "organization_self_hosted_runners": "read", "metadata": "read"})  # fmt: skip
    record = seen_by(api, rack=("self-hosted", "rack"))
    assert [each.status for each in record.hosts] == [status]
    assert [e.rule for e in record.findings if e.rule.startswith("runners")] == said


def test_a_token_that_may_not_ask_makes_hosts_unknown_and_says_which_right_is_missing(
    api: GitHubApi,
    fleet: Path,  # noqa: ARG001 - the working directory
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A fork without an App: nothing is probed, nothing fails."""
    output = under_actions(api, tmp_path, monkeypatch, token=api.token)
    assert main(["runner-health", "api", "--json"]) == 0
    told = capfd.readouterr()
    record = RunnersRecord.model_validate_json(told.out)
    assert {each.status for each in record.hosts} == {"unknown"}
    assert "administration: read" in record.findings[0].next_step
    assert "::warning::GitHub: runners: " in told.err
    assert outputs(output)["any"] == "false"


@pytest.mark.parametrize(
    ("version", "said", "status"),
    [
        ("2.328.0", None, "sick"),
        ("2.329.0", None, None),
        ("2.336.0", {"deprecated_at": "2026-12-01T00:00:00Z"}, "warn"),
        ("2.336.0", {"deprecated_at": "2026-11-01T00:00:00Z"}, "sick"),
        ("2.336.0", {"deprecated_at": "2027-06-01"}, None),
        ("2.336.0", {"created_at": "2020-01-01T00:00:00Z", "note": ["?"], "end": None}, None),
        ("2.336.0", {"deprecated_at": "9999-99-99T00:00:00Z"}, None),
        ("nightly", None, None),
        (None, None, None),
    ],
)
def test_a_runner_that_soon_gets_no_jobs_is_found(
    version: str | None, said: dict[str, Any] | None, status: str | None, api: GitHubApi
) -> None:
    """By the oldest version that GitHub takes, and by what it says of this one, if it does."""
    api.add_runner("one", ["self-hosted"], **({} if version is None else {"version": version}))
    if said is not None:
        api.deprecations["2.336.0"] = said
    findings = seen_by(api, desk=("self-hosted",)).hosts[0].findings
    assert [each.status for each in findings] == ([] if status is None else [status])
    api.violations.clear()  # the endpoint is newer than the description of the API


def test_jobs_that_wait_are_counted_for_the_host_that_they_wait_for(api: GitHubApi) -> None:
    """With the oldest; a day is all that GitHub waits."""
    api.add_runner("one", ["self-hosted", "gpu"])
    long_ago = health_runners.stamp(NOW - timedelta(hours=3))
    api.runs[5] = {"status": "queued"}
    api.jobs[5] = [
        {"status": "queued", "labels": ["self-hosted", "gpu"], "created_at": long_ago},
        {"status": "queued", "labels": ["ubuntu-24.04"], "created_at": long_ago},
        {"status": "completed", "labels": ["self-hosted", "gpu"], "created_at": long_ago},
    ]
    host = seen_by(api, desk=("self-hosted", "gpu", "desk")).hosts[0]
    assert (host.waiting_count, host.oldest_wait) == (1, long_ago)
    assert host.findings[-1].value == "1 jobs wait, the first for 180 minutes"


def test_schedules_that_stopped_are_said(api: GitHubApi) -> None:
    """After 60 days without a commit nothing runs any more, this check included."""
    api.workflows[".github/workflows/check-upstream.yml"] = "disabled_inactivity"
    found = [each for each in seen_by(api).findings if each.rule == "schedules"]
    assert found[0].value == ".github/workflows/check-upstream.yml is disabled by inactivity"
    assert found[0].next_step == "gh workflow enable check-upstream.yml"


def test_a_fleet_without_runners_is_no_failure(
    api: GitHubApi, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured by people; there is nothing to probe."""
    path = fleet / "params.yaml"
    lines = [line for line in path.read_text().splitlines(keepends=True) if "runs_on" not in line]
    path.write_text("".join(lines))
    output = under_actions(api, tmp_path, monkeypatch)
    assert main(["runner-health", "api"]) == 0
    assert outputs(output)["any"] == "false"


# --- probe: what the machine finds ------------------------------------------------------------


def found_by(host: str = "desk", now: datetime = NOW) -> dict[str, Finding]:
    """Probe the checkout in the working directory; findings by rule, the worst of each."""
    at = Layout()
    record = health_probe.probe(host, declaration.load(at.params), at, now=now)
    return {each.rule: each for each in record.findings}


def test_the_probe_looks_at_the_real_machine(
    fleet: Path, tools: toolchain.Toolchain, capfd: pytest.CaptureFixture[str]
) -> None:
    """On whichever it runs: disk, caches, toolchain; what is sick is said with a next step."""
    assert main(["runner-health", "probe", "--host", "desk", "--out", "health.json", "--json"]) == 0
    told = capfd.readouterr()
    record = records.read(fleet / "health.json", HealthRecord)
    assert record == HealthRecord.model_validate_json(told.out)
    findings = {each.rule: each for each in record.findings}
    assert findings["toolchain"].status == "ok"
    assert tools.commit[:9] in findings["toolchain"].value
    assert findings["dvc-link"].status == "ok"
    assert findings["dvc-cache"].status == "warn"
    assert findings["hook-job-started"].status == "sick"
    assert findings["disk-work"].value.endswith("GiB free")
    assert findings["user"].status == ("sick" if os.getuid() == 0 else findings["user"].status)
    for each in record.findings:
        assert each.status == "ok" or each.next_step, each
    assert list((fleet / ".dvc/cache").iterdir()) == []
    assert not list((fleet / "work").glob(".fleet-probe-*"))


def test_a_host_has_to_be_named_if_there_are_several(
    fleet: Path,  # noqa: ARG001 - the working directory
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A record under a wrong name would close the wrong issue."""
    assert main(["runner-health", "probe"]) == 2
    assert "--host desk | attic" in capfd.readouterr().err
    assert main(["runner-health", "probe", "--host", "dsek"]) == 2
    assert 'did you mean "desk"?' in capfd.readouterr().err


def test_a_card_that_is_declared_and_does_not_answer_is_sick(
    fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number would be one of the processor's."""
    path = fleet / "params.yaml"
    path.write_text(path.read_text().replace("    memory_mib: 4096", "    vram_mib: 24576", 1))
    monkeypatch.setattr(gpu, "driver", lambda: None)
    monkeypatch.setattr(gpu, "cards", tuple)
    found = found_by()["driver"]
    assert (found.status, found.limit) == ("sick", "24,576 MiB of an NVIDIA card")


def test_a_card_is_held_against_the_declared_memory(
    fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace of a real card behind NVML's names."""
    trace = min(nvml_replay.TRACES.glob("*.json"))
    card = json.loads(trace.read_text())
    driver = nvml_replay.NvmlReplay(card)
    for name, value in {
        "nvmlSystemGetCudaDriverVersion": 12080,
        "nvmlSystemGetDriverVersion": "570.10",
    }.items():
        setattr(driver, name, lambda value=value: value)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(gpu, "_may_have_driver", lambda: True)
    monkeypatch.setattr(health_probe, "_WATCH_S", 0.0)
    found = found_by()
    assert found["card"].status == "ok"
    assert found["clocks"].status in {"ok", "sick"}
    path = fleet / "params.yaml"
    path.write_text(path.read_text().replace("    memory_mib: 4096", "    vram_mib: 9999999", 1))
    assert found_by()["card"].status == "sick"
    assert driver.opened == 0


def test_a_cache_on_another_file_system_is_found(fleet: Path, tmp_path: Path) -> None:
    """Then every artifact is there twice."""
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == fleet.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own here")
    other = Path("/dev/shm") / f"fleet-{tmp_path.name}-{os.getpid()}"
    try:
        (fleet / ".dvc/config.local").write_text(f"[cache]\n    dir = {other}\n")
        found = found_by()
        assert found["dvc-link"].status == "warn"
        assert "cannot share files" in found["dvc-link"].value
        assert "dvc-cache" not in found
    finally:
        shutil.rmtree(other, ignore_errors=True)


def test_a_cache_that_cannot_be_written_is_sick(fleet: Path) -> None:
    """A mount that is missing, most often."""
    (fleet / "file").touch()
    (fleet / ".dvc/config.local").write_text("[cache]\n    dir = ../file/cache\n")
    found = found_by()["dvc-cache"]
    assert (found.status, found.limit) == ("sick", "writable by the runner's user")


def test_too_small_a_disk_is_sick_in_the_words_of_the_stage_that_would_stop(
    fleet: Path,  # noqa: ARG001 - the working directory
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same sum as before the first byte."""

    def full(*_: object) -> disk.Plan:
        raise MachineError("the disk is too small: 9 GiB", hint="Make room.")

    monkeypatch.setattr(disk, "check_disk", full)
    found = found_by()["disk-fleet"]
    assert (found.status, found.value, found.next_step) == (
        "sick",
        "the disk is too small: 9 GiB",
        "Make room.",
    )


def test_a_tool_that_was_changed_is_sick(
    fleet: Path,  # noqa: ARG001 - the working directory
    tools: toolchain.Toolchain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One byte more in one program."""
    prefix = tmp_path / "prefix"
    shutil.copytree(tools.prefix, prefix, symlinks=True)
    changed = prefix / "bin/llama-bench"
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    broken = toolchain.Toolchain(prefix=prefix, manifest=tools.manifest)
    monkeypatch.setattr(toolchain, "there", lambda _spec: broken)
    found = found_by()["toolchain"]
    assert found.status == "sick"
    assert "not what was built" in found.value
    monkeypatch.setattr(toolchain, "there", lambda _spec: None)
    assert found_by()["toolchain"].value == "not built yet"


def test_hooks_count_only_if_no_job_can_change_them(
    fleet: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Root's, in folders of root's, those of this checkout, with their configuration."""
    if os.getuid() != 0:
        pytest.skip("files of root's are needed: run the tests as root")
    import tempfile  # noqa: PLC0415 - only here

    installed = Path(tempfile.mkdtemp(prefix="fleet-hooks-"))
    try:
        installed.chmod(0o755)
        for name in ("job-started.sh", "job-completed.sh", "runner_hooks.py"):
            shutil.copy(fleet / "deploy/runner" / name, installed)
            # What `install` sets; a checkout may have been made with another umask.
            (installed / name).chmod(0o755)
        monkeypatch.setenv("ACTIONS_RUNNER_HOOK_JOB_STARTED", str(installed / "job-started.sh"))
        monkeypatch.setenv("ACTIONS_RUNNER_HOOK_JOB_COMPLETED", str(tmp_path / "gone.sh"))
        assert "runner.json: No such file" in found_by()["hook-job-started"].value
        (installed / "runner.json").write_text("{}")
        (installed / "runner.json").chmod(0o644)
        found = found_by()
        assert found["hook-job-started"].status == "ok"
        assert found["hook-job-completed"].status == "sick"
        with (installed / "runner_hooks.py").open("a") as file:
            file.write("# of last year\n")
        assert found_by()["hook-job-started"].status == "warn"
        os.chown(installed / "runner_hooks.py", 1234, 0)
        assert "is not root's alone" in found_by()["hook-job-started"].value
    finally:
        shutil.rmtree(installed)


@pytest.mark.parametrize(("off_s", "status"), [(0, "ok"), (60, "warn"), (3600, "sick")])
def test_the_clock_is_held_against_githubs(
    fleet: Path,  # noqa: ARG001 - the working directory
    off_s: int,
    status: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A token of an hour is no more valid on a machine that is an hour late."""

    class Clock(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(200)
            self.send_header("Date", email.utils.formatdate(time.time() + off_s, usegmt=True))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Clock)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("GITHUB_API_URL", f"http://127.0.0.1:{server.server_port}")
        assert found_by()["clock"].status == status
    finally:
        server.shutdown()
        server.server_close()
    assert found_by()["clock"].status == "unknown"


def test_the_runners_own_program_says_its_version(
    fleet: Path,  # noqa: ARG001 - the working directory
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found from the folder that it gives its jobs; a stand-in, since there is no runner here."""
    program = tmp_path / "actions-runner/bin/Runner.Listener"
    program.parent.mkdir(parents=True)
    monkeypatch.setenv("RUNNER_WORKSPACE", str(tmp_path / "actions-runner/_work/fleet"))
    for version, status in (("2.310.2", "sick"), ("2.336.0", "ok")):
        program.write_text(f"#!/bin/sh\necho {version}\n")
        program.chmod(0o755)
        found = found_by()["runner-version"]
        assert (found.status, found.value) == (status, f"runner {version}")


# --- issues: how people hear of it ------------------------------------------------------------

SICK = Finding(rule="disk-work", status="sick", value="1 GiB free", limit="9 GiB", next_step="gc")
WARN = Finding(rule="display", status="warn", value="a screen", next_step="another")


def left(fleet: Path, *hosts: HostSeen, **probes: tuple[Finding, ...]) -> None:
    """Write what the earlier jobs leave behind."""
    records.write(fleet / "runners.json", RunnersRecord(checked_at="now", hosts=hosts))
    shutil.rmtree(fleet / "probes", ignore_errors=True)
    for host, findings in probes.items():
        # As actions/download-artifact lays artifacts out: a folder for each.
        folder = fleet / f"probes/health-{host}"
        folder.mkdir(parents=True)
        record = HealthRecord(
            host=host,
            checked_at="now",
            status=max((each.status for each in findings), default="ok", key="ok warn sick".find),
            findings=findings,
        )
        records.write(folder / f"health-{host}.json", record)


def host(name: str, status: Any = "online", *findings: Finding) -> HostSeen:
    """A host as GitHub sees it."""
    return HostSeen(host=name, runs_on=("self-hosted", name), status=status, findings=findings)


def settle(*options: str) -> int:
    """Type the verb."""
    return main(
        ["runner-health", "issues", "--runners", "runners.json", "--probes", "probes", *options]
    )


def of_us(api: GitHubApi) -> list[tuple[str, str]]:
    """Title and state of every issue."""
    return [(each["title"], each["state"]) for each in api.issues.values()]


def test_a_sick_host_gets_one_issue_that_closes_itself(
    api: GitHubApi, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened once, renewed while it is sick, closed with a word when it is well."""
    under_actions(api, tmp_path, monkeypatch, token=api.token)
    left(fleet, host("desk"), host("attic"), desk=(SICK, WARN), attic=())
    assert settle() == 0
    assert of_us(api) == [("The runner of desk is sick", "open")]
    (issue,) = api.issues.values()
    assert issue["labels"] == ["runner-health"]
    assert "\n| disk-work | sick | 1 GiB free | 9 GiB | gc |\n" in issue["body"]
    requests = len([each for each in api.requests if each.is_write])
    assert settle() == 0
    assert of_us(api) == [("The runner of desk is sick", "open")]
    assert len([each for each in api.requests if each.is_write]) <= requests + 1
    left(fleet, host("desk"), host("attic"), desk=(WARN,), attic=())
    assert settle() == 0
    assert of_us(api) == [("The runner of desk is sick", "closed")]
    said = [*api.issues.values(), *api.comments.values()]
    assert any("desk is well again, with 1 warning." in each["body"] for each in said)


def test_a_host_that_was_online_and_says_nothing_is_sick(
    api: GitHubApi, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that hangs takes the probe with it."""
    under_actions(api, tmp_path, monkeypatch, token=api.token)
    left(fleet, host("desk"), host("attic", "offline", SICK))
    assert settle() == 0
    assert of_us(api) == [
        ("The runner of desk is sick", "open"),
        ("The runner of attic is sick", "open"),
    ]


def test_silence_opens_nothing_and_closes_nothing(
    api: GitHubApi, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an App nobody knows; an issue of before stays."""
    under_actions(api, tmp_path, monkeypatch, token=api.token)
    left(fleet, host("desk"), host("attic", "unknown"), desk=(SICK,))
    assert settle() == 0
    left(fleet, host("desk", "unknown"), host("attic", "unknown"))
    assert settle() == 0
    assert of_us(api) == [("The runner of desk is sick", "open")]


def test_a_host_that_is_no_more_loses_its_issue_and_other_peoples_issues_stay(
    api: GitHubApi, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what we opened ourselves is ours."""
    under_actions(api, tmp_path, monkeypatch, token=api.token)
    api.add_issue("gone", "<!-- fleet:runner cellar -->\nsick", ["runner-health"])
    api.add_issue("theirs", "<!-- fleet:runner desk -->\nsick", ["runner-health"], login="mona")
    left(fleet, host("desk"), desk=())
    assert settle() == 0
    assert of_us(api) == [("gone", "closed"), ("theirs", "open")]


def test_a_dry_run_changes_nothing_and_shows_what_it_would(
    api: GitHubApi,
    fleet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The request is printed in whole."""
    under_actions(api, tmp_path, monkeypatch, token=api.token)
    left(fleet, host("desk"), desk=(SICK,))
    assert settle("--dry-run", "--json") == 0
    told = capfd.readouterr()
    assert not [each for each in api.requests if each.is_write]
    assert "The runner of desk is sick" in told.out + told.err
    assert json.loads(told.out[told.out.rindex("{\n") :])["desk"].startswith("opened")


def test_what_a_machine_says_is_text_and_nothing_else(
    api: GitHubApi, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mention, link, image or row of somebody else's."""
    under_actions(api, tmp_path, monkeypatch, token=api.token)
    evil = "@octo/team #1 ![x](https://evil.example) | y |\n| <img src=x> `a` ::error::x"
    sick = Finding(rule="disk-work", status="sick", value=evil, next_step=evil)
    left(fleet, host("desk"), desk=(sick,))
    assert settle() == 0
    (issue,) = api.issues.values()
    body = issue["body"]
    for raw in ("@octo", " #1 ", "](", "<img", "https://evil", "`a`"):
        assert raw not in body
    assert body.count("\n| disk") == 1


@pytest.mark.parametrize(
    "spoil",
    ["x" * (2 << 20), "{", '{"schema_version": 1}', '{"host": "attic"}', None],
)
def test_a_record_that_is_none_counts_as_silence_of_its_host(
    spoil: str | None, api: GitHubApi, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too large, broken, of another host, a link: the host was online, so it is sick."""
    under_actions(api, tmp_path, monkeypatch, token=api.token)
    left(fleet, host("desk"), desk=())
    path = fleet / "probes/health-desk/health-desk.json"
    if spoil is None:
        secret = tmp_path / "secret.json"
        path.rename(secret)
        path.symlink_to(secret)
    elif spoil.startswith('{"host"'):
        path.write_text(path.read_text().replace('"desk"', '"attic"'))
    else:
        path.write_text(spoil)
    assert settle() == 0
    assert of_us(api) == [("The runner of desk is sick", "open")]


def test_an_issue_is_bounded_and_its_worst_rows_come_first() -> None:
    """However much a machine says."""
    many = (*[WARN] * 60, SICK)
    each = health_issues.Judged(host="desk", status="sick", findings=many)
    text = health_issues.body(each, since="2026-11-22T00:00:00Z", run_url="https://x/runs/1")
    assert text.index("sick |") < text.index("warn |")
    assert "20 more rows left out." in text
    assert "Known since 2026-11-22T00:00:00Z." in text.replace("\u200b", "")
    assert "[this run](https://x/runs/1)" in text


def test_help_is_quick_and_names_the_three_uses() -> None:
    """As every verb."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "runner-health", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "{api,probe,issues}" in done.stdout
    assert runner_health.PROBE_TIMEOUT_MINUTES == 10
