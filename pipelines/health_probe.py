"""
What a runner finds on itself: card, disk, caches, tools, hooks, user, clock.

Every look is a finding, also one that failed: a probe that ends half-way would hide the rest. No
look leaves anything but a log and the folders that DVC makes anyway. Nothing is installed, built or
fetched. It runs as the runner's user, in the checkout of a job.
"""

from __future__ import annotations

import contextlib
import email.utils
import filecmp
import os
import re
import shutil
import stat
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import console, disk, dvc_state, gpu, proc, toolchain, wording
from pipelines.errors import FleetError
from pipelines.health_records import Finding, HealthRecord, Status, worst
from pipelines.health_runners import OLDEST_RUNNER, stamp, triple

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.layout import Layout
    from pipelines.params import Declaration, DeclaredHost

HOOKS: Final = {
    "ACTIONS_RUNNER_HOOK_JOB_STARTED": "job-started.sh",
    "ACTIONS_RUNNER_HOOK_JOB_COMPLETED": "job-completed.sh",
}
# What fleet itself and DVC's databases want beside the artifacts.
_LEAST_FREE_GIB: Final = 10.0
# A token of GitHub's is an hour old at most; TLS and OIDC refuse far less than that.
_SKEW_WARN_S: Final = 30.0
_SKEW_SICK_S: Final = 300.0
_ANSWER_WITHIN_S: Final = 10.0
# Groups whose members are root in all but name (docs.docker.com, "Docker daemon attack surface").
_ROOTS_GROUPS: Final = frozenset({"docker", "lxd", "incus-admin", "sudo", "wheel", "disk", "root"})
_WATCH_S: Final = 1.0
_MIB_TOLERANCE: Final = 0.02


def probe(host: str, declared: Declaration, at: Layout, *, now: datetime) -> HealthRecord:
    """
    Look at everything.

    Args:
        host: Key in `hosts:`; its memory is what the card is held against.
        declared: params.yaml.
        at: The checkout.
        now: In UTC, by this machine.
    """
    looks: tuple[Callable[[], list[Finding]], ...] = (
        lambda: card(declared.hosts[host], declared),
        settings,
        lambda: fleet_room(declared, at),
        lambda: free_room(at),
        lambda: dvc_cache(at),
        lambda: tools(declared),
        lambda: engine(declared, at),
        lambda: hooks(at),
        user,
        lambda: runner(at),
        lambda: clock(os.environ.get("GITHUB_API_URL", "")),
    )
    findings: list[Finding] = []
    for look in looks:
        findings += _looked(look)
    return HealthRecord(
        host=host,
        checked_at=stamp(now),
        status=worst(tuple(findings)),
        findings=tuple(findings),
    )


def _looked(look: Callable[[], list[Finding]]) -> list[Finding]:
    """Do one look; one that breaks is a finding, too."""
    try:
        return look()
    except FleetError as error:
        return [_finding("probe", "warn", error.message, next_step=error.hint)]
    except OSError as error:
        return [_finding("probe", "warn", f"{error.filename}: {error.strerror}")]


def _finding(
    rule: str, status: Status, value: str, limit: str = "", next_step: str = ""
) -> Finding:
    texts = (console.clean(" ".join(each.split()))[:500] for each in (value, limit, next_step))
    shown, held, then = texts
    return Finding(rule=rule, status=status, value=shown, limit=held, next_step=then)


# --- the card ---------------------------------------------------------------------------------


def card(host: DeclaredHost, declared: Declaration) -> list[Finding]:
    """Hold driver and card against what the host is declared to be."""
    driver, cards = gpu.driver(), gpu.cards()
    wants = host.vram_mib is not None or declared.toolchain.backend == "cuda"
    if driver is None or not cards:
        value = "no driver answers" if driver is None else f"driver {driver.version} sees no card"
        if not wants:
            return [_finding("driver", "ok", f"{value}; the host is declared without a card")]
        return [
            _finding(
                "driver",
                "sick",
                value,
                f"{wording.mib(host.vram_mib)} of an NVIDIA card" if host.vram_mib else "a card",
                "nvidia-smi on that machine; after an update of the driver, a restart.",
            )
        ]
    names = wording.first_few([card.name for card in cards])
    found = [_finding("driver", "ok", f"{driver.version}, CUDA {driver.cuda}")]
    vram_mib = sum(card.vram_mib for card in cards)
    value = f"{names}, {wording.mib(vram_mib)}"
    # The driver keeps some of what is printed on the box.
    if host.vram_mib is not None and vram_mib < host.vram_mib * (1 - _MIB_TOLERANCE):
        found.append(
            _finding(
                "card",
                "sick",
                value,
                wording.mib(host.vram_mib),
                "A card is missing, or hidden by CUDA_VISIBLE_DEVICES; or correct hosts: of "
                "params.yaml.",
            )
        )
    else:
        found.append(_finding("card", "ok", value))
    if driver.persistence is False:
        found.append(
            _finding(
                "persistence",
                "warn",
                "the driver is unloaded when nobody uses the card",
                "loaded",
                "systemctl enable --now gguf-fleet-gpu (deploy/runner): clocks and limits last.",
            )
        )
    return found


def settings() -> list[Finding]:
    """Watch the idle card for a second: who else is on it, and what holds it down."""
    with gpu.Watch(lambda: {os.getpid()}) as watch:
        if not watch.sees_cards:
            return []
        time.sleep(_WATCH_S)
        watch.sample()
    seen = watch.observation()
    found = []
    if seen.foreign:
        found.append(
            _finding(
                "card-shared",
                "warn",
                wording.first_few(list(seen.foreign)),
                "no other program on the card",
                "Stop it while models are measured: each such measurement is INVALID.",
            )
        )
    else:
        found.append(_finding("card-shared", "ok", "no other program computes on the card"))
    if seen.lost or seen.xids:
        errors = ", ".join(str(each) for each in seen.xids) or "the card stopped answering"
        found.append(
            _finding(
                "card-errors", "sick", f"Xid {errors}", "none", "dmesg | grep -i xid; restart."
            )
        )
    if seen.slowdowns:
        found.append(
            _finding(
                "clocks",
                "sick",
                f"slowed while idle: {wording.first_few(sorted(seen.slowdowns))}",
                "no slowdown",
                "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER: cooling or power supply.",
            )
        )
    else:
        heat = "" if seen.temperature_c is None else f", {seen.temperature_c} °C"
        clock = "" if seen.clock_mhz is None else f"SM {seen.clock_mhz:.0f} MHz idle, "
        found.append(_finding("clocks", "ok", f"{clock}not slowed{heat}"))
    if seen.display:
        found.append(
            _finding("display", "warn", "a screen hangs on the card", "none", "Use another one.")
        )
    return found


# --- disk and caches --------------------------------------------------------------------------


def fleet_room(declared: Declaration, at: Layout) -> list[Finding]:
    """Hold the free disk against what is declared and not there yet; it may ask the Hub."""
    try:
        plan = disk.check_disk(declared, at)
    except FleetError as error:
        return [_finding("disk-fleet", "sick", error.message, next_step=error.hint)]
    value = f"everything declared fits ({str(plan) or 'all is there'})"
    return [_finding("disk-fleet", "ok", value)]


def free_room(at: Layout) -> list[Finding]:
    """Hold the free disk of each place against what DVC and fleet want beside the artifacts."""
    found = []
    places = {
        "disk-work": at.root / "work",
        "disk-cache": dvc_state.cache_dir(at.root),
        "disk-toolchain": toolchain.default_cache_root(),
    }
    for rule, place in places.items():
        there = place.absolute()
        while not there.exists():
            there = there.parent
        free_gib = shutil.disk_usage(there).free / disk.GIB
        low = free_gib < _LEAST_FREE_GIB
        found.append(
            _finding(
                rule,
                "warn" if low else "ok",
                f"{free_gib:,.1f} GiB free",
                f"{_LEAST_FREE_GIB:.0f} GiB" if low else "",
                "Make room: `dvc gc --workspace` in a checkout frees what no branch needs."
                if low
                else "",
            )
        )
    return found


def dvc_cache(at: Layout) -> list[Finding]:
    """See whether an artifact in DVC's cache and one in work/ can be the same bytes."""
    cache = dvc_state.cache_dir(at.root).resolve()
    local = cache.is_relative_to((at.root / ".dvc").resolve())
    found = []
    if local:
        found.append(
            _finding(
                "dvc-cache",
                "warn",
                "in the checkout, which is removed after each job",
                "a folder that jobs share",
                "DVC_SYSTEM_CONFIG_DIR, as deploy/runner/README.md says: else every job "
                "fetches and converts everything again.",
            )
        )
    work = (at.root / "work").resolve()
    try:
        for each in (cache, work):
            each.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".fleet-probe-", dir=cache)
        os.close(handle)
    except OSError as error:
        return [
            *found,
            _finding(
                "dvc-cache",
                "sick",
                f"cannot be written: {error.strerror}",
                "writable by the runner's user",
                "Mount it, and give it to the runner's user.",
            ),
        ]
    twin = work / Path(name).name
    try:
        os.link(name, twin)
    except OSError as error:
        found.append(
            _finding(
                "dvc-link",
                "warn",
                f"work/ and the cache cannot share files: {error.strerror}",
                "one file system",
                "Put `_work` and the cache onto one file system: now every artifact is copied.",
            )
        )
    else:
        found.append(_finding("dvc-link", "ok", "work/ and the cache share files"))
    finally:
        for each in (twin, Path(name)):
            with contextlib.suppress(OSError):
                each.unlink(missing_ok=True)
    return found


# --- tools ------------------------------------------------------------------------------------


def tools(declared: Declaration) -> list[Finding]:
    """Hash the toolchain that this machine has, if it has one."""
    tools = toolchain.there(toolchain.spec_of(declared))
    if tools is None:
        return [
            _finding(
                "toolchain",
                "warn",
                "not built yet",
                f"llama-cpp-python {declared.toolchain.llama_cpp_python}",
                "The first job builds it, in some minutes; or run fleet toolchain.",
            )
        ]
    try:
        tools.verify()
    except FleetError as error:
        return [_finding("toolchain", "sick", error.message.splitlines()[0], next_step=error.hint)]
    value = f"llama.cpp {tools.commit[:9]} for {tools.backend}, every file as it was built"
    return [_finding("toolchain", "ok", value)]


def engine(declared: Declaration, at: Layout) -> list[Finding]:
    """Find what serves, without installing it."""
    from pipelines.serving import ollama_install  # noqa: PLC0415 - only here

    if declared.serving.engine == "llama-server":
        return [_finding("engine", "ok", "the toolchain's llama-server, as declared")]
    version = declared.serving.ollama
    log = at.log("runner-health", "engine")
    on_path = shutil.which("ollama")
    places = sorted(ollama_install.cache_root().glob(f"{version}-*/bin/ollama"))
    for place in [Path(on_path)] if on_path else places:
        if os.access(place, os.X_OK):
            where = "on PATH" if on_path else "in the cache"
            return [
                _finding("engine", "ok", f"Ollama {ollama_install.version_of(place, log)} {where}")
            ]
    can_build = shutil.which("go") or Path("/usr/local/go/bin/go").exists()
    status: Status = "warn" if can_build or declared.serving.ollama_archive_sha256 else "sick"
    return [
        _finding(
            "engine",
            status,
            "no Ollama" + (", and no Go to build it with" if status == "sick" else " yet"),
            f"Ollama {version}",
            "Install Ollama on that machine, or Go; without either a release is HOLD at best."
            if status == "sick"
            else "fleet toolchain    # gets or builds it, too",
        )
    ]


# --- the runner -------------------------------------------------------------------------------


def hooks(at: Layout) -> list[Finding]:
    """See whether the machine refuses jobs itself, by files that no job could have written."""
    found = []
    for variable, name in HOOKS.items():
        rule = "hook-" + name.removesuffix(".sh")
        told = os.environ.get(variable, "")
        fix = f"Install deploy/runner/{name} as its README.md says, and restart the runner."
        if not told:
            found.append(_finding(rule, "sick", f"{variable} is not set", "a file of root's", fix))
            continue
        wrong = _writable(Path(told))
        if wrong is None:
            hooks = Path(told).with_name("runner_hooks.py")
            wrong = _writable(hooks) or _writable(hooks.with_name("runner.json"))
        if wrong is not None:
            found.append(_finding(rule, "sick", wrong, "root's, writable by nobody else", fix))
        elif not _is_ours(Path(told), at):
            found.append(
                _finding(rule, "warn", "not the one of this checkout", f"deploy/runner/{name}", fix)
            )
        else:
            found.append(_finding(rule, "ok", "installed, root's"))
    return found


def _writable(path: Path) -> str | None:
    """Say why a file could be changed by a job; None if it could not."""
    for each in (path, *path.absolute().parents):
        try:
            seen = each.lstat()
        except OSError as error:
            return f"{each}: {error.strerror}"
        sticky = stat.S_ISDIR(seen.st_mode) and seen.st_mode & stat.S_ISVTX
        if stat.S_ISLNK(seen.st_mode) or seen.st_uid != 0 or (seen.st_mode & 0o022 and not sticky):
            return f"{each} is not root's alone"
    return None


def _is_ours(hook: Path, at: Layout) -> bool:
    """Tell whether the installed hook is the one of this checkout."""
    ours = at.root / "deploy/runner"
    return all(
        (ours / name).is_file()
        and hook.with_name(name).is_file()
        and filecmp.cmp(ours / name, hook.with_name(name), shallow=False)
        for name in (hook.name, "runner_hooks.py")
    )


def user() -> list[Finding]:
    """See what the runner's user may do to the machine."""
    import grp  # noqa: PLC0415 - POSIX only

    if os.getuid() == 0:
        return [
            _finding(
                "user",
                "sick",
                "the runner is root",
                "a user without rights",
                "useradd --system, as deploy/runner/README.md says.",
            )
        ]
    names = set()
    for number in os.getgroups():
        with contextlib.suppress(KeyError):
            names.add(grp.getgrgid(number).gr_name)
    if strong := sorted(names & _ROOTS_GROUPS):
        return [
            _finding(
                "user",
                "sick",
                f"in the group {', '.join(strong)}, which is as good as root",
                "none of these",
                f"gpasswd --delete USER {strong[0]}, and restart the runner.",
            )
        ]
    return [_finding("user", "ok", "a user without rights")]


def runner(at: Layout) -> list[Finding]:
    """Ask the runner's own program for its version, if this is a job of one."""
    program = _listener()
    if program is None:
        return []
    done = proc.run(
        [program, "--version"],
        log=at.log("runner-health", "runner"),
        inherit_env=False,
        timeout_s=_ANSWER_WITHIN_S,
    )
    version = done.stdout.strip()[:40]
    old = triple(version) < triple(OLDEST_RUNNER)
    return [
        _finding(
            "runner-version",
            "sick" if old else "ok",
            f"runner {version}",
            OLDEST_RUNNER if old else "",
            "Update the runner: deploy/runner/README.md, Update." if old else "",
        )
    ]


def _listener() -> Path | None:
    """Find the runner's program from the folder that it gave the job: ROOT/_work/NAME."""
    told = os.environ.get("RUNNER_WORKSPACE", "")
    if not told or not Path(told).is_absolute():
        return None
    program = Path(told).parent.parent / "bin/Runner.Listener"
    return program if os.access(program, os.X_OK) else None


def clock(api: str, *, within_s: float = _ANSWER_WITHIN_S) -> list[Finding]:
    """
    Hold the clock against GitHub's.

    Args:
        api: Address of its API; nothing is asked of what is none.
        within_s: Wall seconds for an answer.
    """
    if not re.match(r"https?://[^/@\s]+", api):
        return []
    import requests  # noqa: PLC0415 - 0.1 s

    try:
        with requests.Session() as session:
            began = time.time()
            answer = session.head(api, timeout=within_s, allow_redirects=False)
            here = (began + time.time()) / 2
        theirs = email.utils.parsedate_to_datetime(answer.headers.get("Date", ""))
    except (requests.RequestException, ValueError, TypeError) as error:
        return [
            _finding(
                "clock",
                "unknown",
                f"GitHub's clock cannot be read: {type(error).__name__}",
                next_step="Let the machine reach GITHUB_API_URL; deploy/runner/README.md, Network.",
            )
        ]
    if theirs.tzinfo is None:
        theirs = theirs.replace(tzinfo=UTC)
    skew_s = abs(here - theirs.timestamp())
    status: Status = "ok"
    if skew_s > _SKEW_WARN_S:
        status = "sick" if skew_s > _SKEW_SICK_S else "warn"
    return [
        _finding(
            "clock",
            status,
            f"{skew_s:,.0f} s from GitHub's",
            f"{_SKEW_SICK_S if status == 'sick' else _SKEW_WARN_S:.0f} s" if status != "ok" else "",
            "timedatectl set-ntp true" if status != "ok" else "",
        )
    ]
