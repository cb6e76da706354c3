"""
The certificate of a measurement: what voids it, what is only noted, and what is done about it.

The cards are replayed from traces (`tests/data/nvml`); the rest is real: the kernel's counters of
this machine, its lock, and a llama-bench beside a busy loop.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from gguf_factory import converted_model
from hypothesis import given, settings
from hypothesis import strategies as st
from nvml_replay import TRACES, replay
from record_factory import validity as validity_block
from test_validity import CARD, QUIET, QUIET_CARD, QUIET_GPU

from pipelines import certificate, counters, gpu, machine, measuring, records, validity, watch
from pipelines.validity import Run

if TYPE_CHECKING:
    from pipelines.records import Validity
    from pipelines.toolchain import Toolchain
    from pipelines.validity import Conditions


def judged(name: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Validity:
    """Judge what a trace shows, on a machine that is quiet otherwise."""
    seen, cards, _ = replay(name, monkeypatch)
    info = ", ".join(card.name for card in cards)
    return validity.judge(
        replace(QUIET_GPU, cards=cards, gpu=seen, gpu_info=info, **changes),
    )


def outcomes(found: Validity) -> dict[str, str]:
    """Return {rule: outcome}."""
    return {each.rule: each.outcome for each in found.conditions}


# --- cards, replayed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trace", "rule", "words"),
    [
        ("thermal-drift", "clock_fall", "let it warm up"),
        ("hardware-slowdown", "hardware_slowdown_share", "in 10.0 % of the run (limit 2 %)"),
        ("power-brake", "hardware_power_brake_share", "check fans and power"),
        ("foreign-before", "foreign_programs_count", "program-900"),
        ("foreign-midway", "foreign_programs_count", "Stop them"),
        ("power-limit-changed", "power_limit_changes_count", "350 W and 280 W"),
        ("ecc-error", "ecc_errors_count", "1 error that it could not correct (limit 0)"),
        ("row-remapped", "retired_count", "1 part of its memory out of use"),
        ("pages-retired", "retired_count", "1 part of its memory out of use"),
        ("xid", "xids_count", "Xid 31"),
        ("lost", "cards_lost_count", "stopped answering"),
        ("two-cards-one-throttled", "hardware_thermal_slowdown_share", "in 10.0 % of the run"),
        ("at-slowdown", "temperature_margin_c", "0 °C below it"),
    ],
)
def test_trace_that_voids(
    trace: str, rule: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happened on the card makes the number wrong: one rule says so, and no other."""
    found = judged(trace, monkeypatch)

    assert found.verdict == "INVALID"
    voids = {each.rule for each in found.conditions if each.outcome == "void"}
    assert rule in voids
    assert any(words in reason for reason in found.reasons), found.reasons
    # A power brake comes with the general bit, and a card that is lost says why before.
    companions = {"power-brake": {"hardware_slowdown_share"}, "lost": {"xids_count"}}
    assert voids <= {rule} | companions.get(trace, set())


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        ("healthy", "SM clock"),
        ("warming", "SM clock"),
        ("power-cap", "SM clock"),
        ("short-slowdown", "SM clock"),
        ("ecc-old-errors", "SM clock"),
        ("side-a", "SM clock"),
        ("container", "does not show which process"),
        ("setup", "A screen hangs on the card"),
        ("setup", "50 % of the PCIe lanes"),
        ("setup", "Persistence mode is off"),
        ("silent", "does not show which process"),
    ],
)
def test_trace_that_voids_nothing(trace: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The neighbours: what is as designed, of long ago, short, or only worth a note."""
    found = judged(trace, monkeypatch)

    assert (found.verdict, found.reasons) == ("VALID", ())
    assert any(words in note for note in found.notes), found.notes


def test_every_trace_is_replayed_by_name() -> None:
    """No trace lies around that nothing looks at."""
    here = Path(__file__).read_text()

    assert [path.stem for path in TRACES.glob("*.json") if f'"{path.stem}"' not in here] == []


def test_power_limit_has_to_be_that_of_the_hardware_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers under a limit of 280 W do not go under the name of a card with 350 W."""
    lower = judged("power-limit-lower", monkeypatch)
    seen, cards, _ = replay("power-limit-lower", monkeypatch)
    identified = tuple(replace(card, power_limit_w=350) for card in cards)
    other = validity.judge(replace(QUIET_GPU, cards=identified, gpu=seen, gpu_info=cards[0].name))

    assert lower.verdict == "VALID"
    assert "350 W and 280 W" in other.reasons[0]


def test_power_cap_is_recorded_and_never_held_against_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of the run at the limit, as a 3090 does in prefill."""
    found = judged("power-cap", monkeypatch)

    (capped,) = [each for each in found.conditions if each.rule == "power_capped_share"]
    assert (capped.outcome, capped.value) == ("ok", 0.5)


def test_idle_clocks_are_not_the_clocks_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that waits for most of the time shows 210 MHz; what it has at work counts."""
    seen, _, _ = replay("side-b-alike", monkeypatch)

    assert seen.clock_mhz == 1_920


def test_clocks_of_two_sides_may_differ_by_three_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither side is wrong by itself; together they compare clocks and not models."""
    first = judged("side-a", monkeypatch)
    (alike,) = validity.sides(first, judged("side-b-alike", monkeypatch))
    (slower,) = validity.sides(first, judged("side-b-slower", monkeypatch))

    assert alike.outcome == "ok"
    assert slower.outcome == "void"
    assert "1,860 and 1,950 MHz, differ by 4.62 % (limit 3 %)" in slower.sentence
    assert validity.sides(validity.judge(QUIET), first) == ()


def test_card_lost_in_mid_run_leaves_what_was_read_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is raised: the run's own tool fails, or does not; either way the card is named."""
    seen, _, driver = replay("lost", monkeypatch)

    assert (seen.lost, seen.xids, seen.clock_mhz) == (True, (79,), 1_410)
    assert driver.opened == 0


def test_two_cards_are_judged_by_the_worse_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of eight cards at 10 % would be 1 % of all samples; the slowest one sets the pace."""
    seen, cards, _ = replay("two-cards-one-throttled", monkeypatch)

    assert len(cards) == 2
    assert seen.slowdowns == {"hardware thermal slowdown": 0.1}
    assert seen.peak_mib == 10_000


def test_replayed_names_and_codes_are_pynvmls() -> None:
    """The traces speak of functions and codes that nvidia-ml-py has."""
    pynvml = pytest.importorskip("pynvml")
    text = "".join(path.read_text() for path in TRACES.glob("*.json"))

    assert [name for name in set(re.findall(r"nvml\w+", text)) if not hasattr(pynvml, name)] == []
    assert (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED) == (15, 16)
    assert (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_TIMEOUT) == (3, 10)
    assert pynvml.nvmlEventTypeXidCriticalError == gpu._EVENT_XID
    assert pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN == gpu._THRESHOLD_SLOWDOWN
    assert pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED == gpu._ERRORS_UNCORRECTED
    assert pynvml.NVML_VOLATILE_ECC == gpu._COUNTER_VOLATILE
    assert pynvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR == gpu._RETIRED_DOUBLE_BIT
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_TEMPERATURE_GPU) == (1, 0)


# --- rules of the machine ---------------------------------------------------------------------


def counted(**changes: Any) -> dict[str, Any]:
    """Return conditions in which the counters of QUIET grew by so much."""
    known: dict[str, Any] = {
        "quotas": ((1_000, 10),),
        "swapped_in_count": 5_000,
        "hot_s": 3.0,
        "hot_count": 40,
        "available_mib": 8_000.0,
    }
    return {
        "before": replace(QUIET.before, **known),
        "after": replace(QUIET.after, **(known | changes)),
    }


SERVED: dict[str, Any] = {"subject": "server", "beside_s": 1.5}
HEATED = replace(QUIET_CARD, clock_fall=0.15, heating_c=30.0)


@pytest.mark.parametrize(
    ("rule", "void", "neighbour"),
    [
        ("steal_share", {"after": replace(QUIET.after, stolen_s=3.5)},
            {"after": replace(QUIET.after, stolen_s=3.0)}),
        ("waiting_share", {"usage": replace(QUIET.usage, waited_s=6.5)},
            {"usage": replace(QUIET.usage, waited_s=5.5)}),
        ("waiting_share",
            SERVED | {"usage": replace(QUIET.usage, on_core_s=9.0, waited_s=30.0)},
            SERVED | {"usage": replace(QUIET.usage, waited_s=30.0)}),
        ("cpu_quota_share", counted(quotas=((1_100, 16),)), counted(quotas=((1_100, 15),))),
        ("swap_ins_per_s", counted(swapped_in_count=6_001), counted(swapped_in_count=6_000)),
        ("major_faults_per_s", {"usage": replace(QUIET.usage, major_faults_count=1_001)},
            {"usage": replace(QUIET.usage, major_faults_count=1_000)}),
        ("cpu_hot_share", counted(hot_s=3.3), counted(hot_s=3.19)),
        ("cpu_hot_count", counted(hot_s=None, hot_count=41), counted(hot_s=None, hot_count=40)),
        ("on_battery_count", {"battery": True}, {"battery": False}),
        ("weights_seen_mib", {"peak_mib": 809.0}, {"peak_mib": 810.0}),
        ("lease_lost_count", {"leased": False}, {"leased": True}),
        ("hardware_changed_count", {"hw_id": "a" * 64, "hw_id_found": "b" * 64},
            {"hw_id": "a" * 64, "hw_id_found": "a" * 64}),
    ],
)  # fmt: skip
def test_rule_of_the_machine(rule: str, void: dict[str, Any], neighbour: dict[str, Any]) -> None:
    """Beyond its limit it voids the number; at its limit it does not."""
    wrong, right = (validity.judge(replace(QUIET, **each)) for each in (void, neighbour))

    assert outcomes(wrong)[rule] == "void"
    assert (wrong.verdict, len(wrong.reasons)) == ("INVALID", 1)
    assert outcomes(right)[rule] != "void"
    assert right.verdict == "VALID"


@pytest.mark.parametrize(
    ("rule", "void", "neighbour"),
    [
        ("gpus_used_count", {"gpu_info": " "}, {}),
        ("gpus_unused_count", {"cards": (CARD, replace(CARD, name="NVIDIA T4"))}, {}),
        ("card_samples_count", {"gpu": None}, {}),
        ("clock_fall", {"gpu": HEATED}, {"gpu": replace(HEATED, clock_fall=0.1)}),
        ("clock_fall", {"gpu": HEATED}, {"gpu": replace(HEATED, heating_c=9.0)}),
        ("temperature_margin_c", {"gpu": replace(QUIET_CARD, temperature_margin_c=0)},
            {"gpu": replace(QUIET_CARD, temperature_margin_c=1)}),
    ],
)  # fmt: skip
def test_rule_of_the_cards(rule: str, void: dict[str, Any], neighbour: dict[str, Any]) -> None:
    """Those that no trace shows from both sides."""
    wrong, right = (validity.judge(replace(QUIET_GPU, **each)) for each in (void, neighbour))

    assert outcomes(wrong)[rule] == "void"
    assert (wrong.verdict, right.verdict) == ("INVALID", "VALID")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (counted(quotas=((1_100, 11),)), "CPU quota stopped everything in 1.0 % of its periods"),
        (counted(swapped_in_count=5_050), "read 5.0 pages a second back from swap"),
        (counted(hot_s=3.1), "slowed down by heat in 1.0 % of the run"),
        ({"usage": replace(QUIET.usage, on_core_s=10.0)}, "Other programs used 1.0 cores"),
        ({"governor": "powersave"}, 'governor is "powersave"'),
        ({"before": replace(QUIET.before, available_mib=100.0)}, "900 MiB of weights"),
        (SERVED, "Client and engine took 0.150 of the cores"),
    ],
)
def test_what_makes_a_number_less_exact_is_a_note(changes: dict[str, Any], words: str) -> None:
    """It is told, and voids nothing."""
    found = validity.judge(replace(QUIET, **changes))

    assert found.verdict == "VALID"
    assert any(words in note for note in found.notes), found.notes


def test_what_a_system_does_not_tell_is_not_held_against_it() -> None:
    """No counters of swap, heat and quota: no condition about them, and no verdict."""
    assert not {"cpu_quota_share", "swap_ins_per_s", "cpu_hot_share", "cpu_hot_count"} & (
        outcomes(validity.judge(QUIET)).keys()
    )


# --- all rules at once ------------------------------------------------------------------------

SHARES = st.floats(0, 1)
WORSE = st.floats(0, 1e6)


@st.composite
def conditions(draw: st.DrawFn) -> Conditions:
    """Draw the conditions of some run on a card, good or bad."""
    share = st.one_of(st.just(0.0), SHARES)
    count = st.one_of(st.just(0), st.integers(0, 20_000))
    few = st.one_of(st.just(0), st.integers(0, 3))
    seen = replace(
        QUIET_CARD,
        foreign=tuple(f"program-{number}" for number in range(draw(few))),
        slowdowns={reason: draw(share) for reason in gpu.SLOWDOWN_REASONS.values()},
        clock_fall=draw(share),
        heating_c=draw(st.floats(-10, 60)),
        temperature_margin_c=draw(st.integers(-5, 50)),
        power_limits_w=((350, *(280,) * draw(few)),),
        ecc_errors_count=draw(few),
        retired_count=draw(few),
        xids=(31,) * draw(few),
        lost=draw(st.booleans()),
    )
    before = replace(
        QUIET.before, quotas=((0, 0),), swapped_in_count=0, hot_s=0.0, hot_count=0
    )  # fmt: skip
    after = replace(
        QUIET.after,
        stolen_s=1 + 20 * draw(share),
        quotas=((100, draw(st.integers(0, 100))),),
        swapped_in_count=draw(count),
        hot_s=10 * draw(share),
        hot_count=draw(few),
    )
    usage = replace(QUIET.usage, waited_s=20 * draw(share), major_faults_count=draw(count))
    return replace(
        QUIET_GPU,
        gpu=seen,
        before=before,
        after=after,
        usage=usage,
        battery=draw(st.booleans()),
        leased=draw(st.booleans()),
        peak_mib=draw(st.floats(0, 8_000)),
    )


def card_worse(seen: Conditions, **changes: Any) -> Conditions:
    """Change what the card showed."""
    assert seen.gpu is not None
    return replace(seen, gpu=replace(seen.gpu, **changes))


def worsened(seen: Conditions, by: float) -> list[Conditions]:
    """Make each reading worse, one at a time."""
    card, after, usage = seen.gpu, seen.after, seen.usage
    assert card is not None
    assert card.clock_fall is not None
    assert card.heating_c is not None
    assert card.temperature_margin_c is not None
    assert after.swapped_in_count is not None
    assert after.hot_s is not None
    assert usage.waited_s is not None
    assert usage.major_faults_count is not None
    some = int(by) + 1
    return [
        replace(seen, after=replace(after, stolen_s=after.stolen_s + by)),
        replace(seen, usage=replace(usage, waited_s=usage.waited_s + by)),
        replace(seen, usage=replace(usage, major_faults_count=usage.major_faults_count + some)),
        replace(seen, after=replace(after, swapped_in_count=after.swapped_in_count + some)),
        replace(seen, after=replace(after, hot_s=after.hot_s + by)),
        replace(seen, after=replace(after, quotas=((100, 100),))),
        replace(seen, battery=True),
        replace(seen, leased=False),
        replace(seen, hw_id="a" * 64, hw_id_found="b" * 64),
        replace(seen, peak_mib=max(0.0, (seen.peak_mib or 0.0) - by)),
        replace(seen, gpu_info=""),
        replace(seen, gpu=None),
        card_worse(seen, foreign=(*card.foreign, "blender")),
        card_worse(seen, slowdowns={name: min(1.0, share + by) for name, share in
                                    card.slowdowns.items()}),
        card_worse(seen, clock_fall=card.clock_fall + by),
        card_worse(seen, heating_c=card.heating_c + by),
        card_worse(seen, temperature_margin_c=card.temperature_margin_c - some),
        card_worse(seen, power_limits_w=((*card.power_limits_w[0], 100 + some),)),
        card_worse(seen, ecc_errors_count=(card.ecc_errors_count or 0) + some),
        card_worse(seen, retired_count=(card.retired_count or 0) + some),
        card_worse(seen, xids=(*card.xids, 79)),
        card_worse(seen, lost=True),
    ]  # fmt: skip


@settings(deadline=None)
@given(seen=conditions(), by=WORSE)
def test_a_worse_reading_never_makes_an_invalid_run_valid(seen: Conditions, by: float) -> None:
    """And never takes a reason away, but for the card that nobody watched any more."""
    found = validity.judge(seen)
    voids = {each.rule for each in found.conditions if each.outcome == "void"}

    for each in worsened(seen, by):
        worse = validity.judge(each)
        assert found.verdict == "VALID" or worse.verdict == "INVALID"
        if each.gpu is not None and each.gpu_info:
            assert voids <= {one.rule for one in worse.conditions if one.outcome == "void"}


ACTION = re.compile(
    r"\b(measure on|stop|Stop|declare|raise|free|take a|let (it|the card)|check|Check|plug|run it "
    r"again|Run|install|set|look)\b"
)


@settings(deadline=None)
@given(seen=conditions())
def test_every_reason_names_value_limit_and_what_to_do(seen: Conditions) -> None:
    """A reader has to know how bad it was, how bad it may be, and what helps."""
    found = validity.judge(seen)

    assert (found.verdict == "INVALID") == bool(found.reasons)
    for reason in found.reasons:
        assert "limit" in reason or "at least" in reason, reason
        assert re.search(r"\d|ran on its battery|was not held", reason), reason
        assert ACTION.search(reason), reason
        assert reason.endswith("."), reason
    for condition in found.conditions:
        if condition.outcome == "void":
            assert condition.value is not None
            assert condition.limit is not None


def test_record_keeps_what_was_looked_at_and_old_records_have_nothing() -> None:
    """Written and read again it is the same; a record of before is read as it was."""
    found = validity.judge(QUIET_GPU)
    old = found.model_dump(exclude={"conditions"})

    assert records.Validity.model_validate_json(found.model_dump_json()) == found
    assert len(found.conditions) == 13
    assert records.Validity.model_validate(old).conditions == ()


def test_a_certificate_in_one_line_says_what_a_reader_has_to_know() -> None:
    """How much was looked at, then reasons before notes; nothing where there is nothing to say."""
    line = validity.line(validity.judge(replace(QUIET_GPU, battery=True)))

    assert re.match(r"INVALID, \d+ conditions looked at, \d+ as they should be", line)
    assert 0 < line.index("ran on its battery") < line.index("SM clock")
    assert "\n" not in line
    assert validity.line(validity_block()) == ""


# --- this machine -----------------------------------------------------------------------------


def test_counters_come_from_the_kernels_files(tmp_path: Path) -> None:
    """Swap, memory, heat and the quotas of all control groups above us."""
    proc, sys_ = tmp_path / "proc", tmp_path / "sys"
    core = sys_ / "devices/system/cpu/cpu{}/thermal_throttle"
    for path, text in {
        proc / "vmstat": "pgmajfault 9\npswpin 77\npswpout 3\n",
        proc / "meminfo": "MemTotal: 4096 kB\nMemAvailable:    2048 kB\n",
        proc / "self/cgroup": "0::/pod/box\n",
        sys_ / "fs/cgroup/pod/box/cpu.stat": "usage_usec 5\nnr_periods 100\nnr_throttled 7\n",
        sys_ / "fs/cgroup/pod/cpu.stat": "usage_usec 5\n",
        Path(str(core).format(0)) / "core_throttle_count": "3\n",
        Path(str(core).format(1)) / "core_throttle_count": "4\n",
        Path(str(core).format(1)) / "core_throttle_total_time_ms": "2500\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    found = counters.cpu_times(proc, sys_)

    assert (found.swapped_in_count, found.available_mib) == (77, 2.0)
    assert (found.hot_s, found.hot_count) == (2.5, 7)
    assert found.quotas == ((100, 7),)


def test_counters_of_this_machine_are_read() -> None:
    """Whatever it tells is a number that does not shrink."""
    before, after = counters.cpu_times(), counters.cpu_times()

    for each in fields(before):
        assert type(getattr(before, each.name)) is type(getattr(after, each.name))
    if Path("/proc/vmstat").exists():
        assert after.swapped_in_count is not None


def test_pages_from_the_disk_are_counted(tmp_path: Path) -> None:
    """The kernel's count of major faults, whatever the name of the program."""
    proc = tmp_path / "proc"
    me = str(os.getpid())
    (proc / me / "task" / me).mkdir(parents=True)
    (proc / me / "task" / me / "children").write_text("77")
    (proc / "77/task").mkdir(parents=True)
    (proc / "77/cmdline").write_bytes(b"/opt/llama-bench\0-m\0")
    (proc / "77/stat").write_text("77 (llama) bench)) S 1 2 3 4 5 6 700 8 900 10 11 12\n")

    with watch.Watch("llama-bench", every_s=None, proc=proc) as watched:
        watched.sample()

    assert watched.usage().major_faults_count == 900


def test_lease_is_ours_until_the_lock_file_goes(tmp_path: Path) -> None:
    """Who empties the cache in mid-run lets the next measurement in: the numbers are void."""
    with measuring.one_at_a_time(tmp_path, "mine") as lease:
        with certificate.Watch("nothing") as kept:
            pass
        with certificate.Watch("nothing") as lost:
            shutil.rmtree(tmp_path)
            (tmp_path).mkdir()
        assert not lease.held()
        run = Run(backend="cpu", threads=1)
        found = [outcomes(each.judge(run)).get("lease_lost_count") for each in (kept, lost)]
    assert measuring.leases() == ()
    assert found == ["ok", "void"]


def test_run_without_the_lock_of_the_machine_is_void() -> None:
    """Nobody kept another measurement away."""
    with certificate.Watch("nothing") as watched:
        pass

    found = watched.judge(Run(backend="cpu", threads=1))

    assert outcomes(found)["lease_lost_count"] == "void"


def test_hardware_that_changes_in_mid_run_voids_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cores taken away by the hypervisor, a card gone, a power limit."""
    real = machine.probe()
    with measuring.one_at_a_time(tmp_path, "mine"), certificate.Watch("nothing") as watched:
        monkeypatch.setattr(machine, "probe", lambda: real | {"hw_id": "f" * 64})

    found = watched.judge(Run(backend="cpu", threads=1))

    assert outcomes(found)["hardware_changed_count"] == "void"


# --- a real run -------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
BUSY = "while True: pass"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the embedded model's f16, or where it has not been converted yet a random one."""
    embedded = ROOT / "work/tiny-llama/f16.gguf"
    if embedded.exists():
        return embedded
    at = converted_model(tmp_path_factory.mktemp("certificate") / "fleet")
    return at.f16("tiny")


def run_beside(tools: Toolchain, model: Path, lock: Path, neighbours: int) -> Validity:
    """Judge four seconds of a real llama-bench on all cores beside so many busy loops."""
    threads = os.cpu_count() or 1
    argv = [
        str(tools.tool("llama-bench")), "-m", str(model), "-p", "0", "-n", "128", "-r", "1000",
        "-t", str(threads), "-ngl", "0", "-o", "jsonl",
    ]  # fmt: skip
    commands = [[sys.executable, "-c", BUSY]] * neighbours + [argv]
    with measuring.one_at_a_time(lock, "mine"), certificate.Watch("llama-bench") as watched:
        # Ended by time: between busy loops no number of repetitions takes a time that is known.
        started = [subprocess.Popen(each, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                   for each in commands]  # fmt: skip
        try:
            time.sleep(4)
            watched.sample()
        finally:
            for each in started:
                each.kill()
                each.wait()
    return watched.judge(Run(backend="cpu", threads=threads))


@pytest.mark.alone
@pytest.mark.toolchain
def test_real_run_beside_busy_loops_is_void(tools: Toolchain, model: Path, tmp_path: Path) -> None:
    """Two on each core: llama-bench stands ready and has no core for most of the time."""
    found = run_beside(tools, model, tmp_path, neighbours=2 * (os.cpu_count() or 1))

    assert outcomes(found)["waiting_share"] == "void"
    assert any("waited for a core" in reason for reason in found.reasons)
    assert outcomes(found)["lease_lost_count"] == "ok"
