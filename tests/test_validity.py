"""A measurement is void for what makes it wrong, and only for that; the reason says what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pipelines import counters, validity
from pipelines.counters import CpuTimes
from pipelines.gpu import Card, Observation
from pipelines.validity import Conditions
from pipelines.watch import Usage

if TYPE_CHECKING:
    from pathlib import Path

CARD = Card(
    name="NVIDIA GeForce RTX 3090",
    vram_mib=24_576,
    compute_capability="8.6",
    power_limit_w=350,
    pcie_generation=4,
    pcie_lanes=16,
)
QUIET_CARD = Observation(
    peak_mib=5_000.0,
    attributed=True,
    foreign=(),
    slowdowns={},
    clock_mhz=1_700.0,
    temperature_c=61,
    samples_count=100,
)
QUIET = Conditions(
    backend="cpu",
    before=CpuTimes(busy_s=100.0, stolen_s=1.0, load=0.1),
    after=CpuTimes(busy_s=120.0, stolen_s=1.0, load=1.9),
    wall_s=10.0,
    usage=Usage(peak_rss_bytes=1 << 30, on_core_s=19.8, waited_s=0.2),
    cards=(),
    gpu=None,
    gpu_info="",
    weights_mib=900.0,
    peak_mib=1_024.0,
    battery=False,
    spreads={"decode at 0": 0.02},
    threads=2,
)
QUIET_GPU = replace(
    QUIET,
    backend="cuda",
    cards=(CARD,),
    gpu=QUIET_CARD,
    gpu_info=CARD.name,
    weights_mib=4_500.0,
    peak_mib=5_000.0,
)


def test_quiet_machine_is_valid() -> None:
    """No reason and no note on an idle CPU; the record keeps the figures."""
    found = validity.judge(QUIET)

    assert (found.verdict, found.reasons, found.notes) == ("VALID", (), ())
    assert (found.load_before, found.load_after, found.steal_share) == (0.1, 1.9, 0.0)


def test_quiet_card_is_valid_and_its_clock_is_noted() -> None:
    """What decides the speed of a card is told even if nothing is wrong."""
    found = validity.judge(QUIET_GPU)

    assert (found.verdict, found.reasons) == ("VALID", ())
    assert found.notes == ("SM clock 1,700 MHz in the median, 61 °C at most.",)
    assert found.gpu_info == CARD.name


def test_load_alone_voids_nothing() -> None:
    """A high load average is no reason as long as our threads had their cores."""
    busy = replace(
        QUIET,
        before=CpuTimes(busy_s=0.0, stolen_s=0.0, load=30.0),
        after=CpuTimes(busy_s=640.0, stolen_s=0.0, load=40.0),
    )

    assert validity.judge(busy).verdict == "VALID"


@pytest.mark.parametrize(
    ("waited_s", "verdict", "notes"),
    [(0.0, "VALID", 0), (0.4, "VALID", 0), (2.0, "VALID", 1), (5.0, "VALID", 1),
     (6.5, "INVALID", 0), (20.0, "INVALID", 0), (None, "VALID", 1)],
)  # fmt: skip
def test_waiting_for_a_core(waited_s: float | None, verdict: str, notes: int) -> None:
    """Up to half of the run is a note, as is not knowing it; more than half voids the number."""
    usage = replace(QUIET.usage, waited_s=waited_s)

    found = validity.judge(replace(QUIET, usage=usage))

    assert (found.verdict, len(found.notes)) == (verdict, notes)
    if verdict == "INVALID":
        assert "waited for a core" in found.reasons[0]


def test_waiting_share_by_hand() -> None:
    """Two threads that each wait a quarter of 10 s: 1 - 0.75^2 of it some thread waits."""
    usage = Usage(peak_rss_bytes=0, on_core_s=15.0, waited_s=5.0)

    assert validity.waiting_share(usage, wall_s=10.0, threads=2) == pytest.approx(0.4375)
    assert validity.waiting_share(usage, wall_s=0.0, threads=2) == 0.0
    assert validity.waiting_share(usage, wall_s=1.0, threads=2) == 1.0


def test_busy_run_is_worth_another_try() -> None:
    """Exactly what voids the measurement on a CPU; how often it was tried is noted."""
    quiet, waiting = QUIET.usage, replace(QUIET.usage, waited_s=15.0)
    stolen = replace(QUIET.after, stolen_s=9.0)

    assert not validity.was_busy(QUIET.before, QUIET.after, quiet, wall_s=10.0, threads=2)
    assert validity.was_busy(QUIET.before, QUIET.after, waiting, wall_s=10.0, threads=2)
    assert validity.was_busy(QUIET.before, stolen, quiet, wall_s=10.0, threads=2)
    found = validity.judge(replace(QUIET, attempts=3))
    assert found.verdict == "VALID"
    assert found.notes == ("Speed was measured 3 times, since the machine was busy.",)


@pytest.mark.parametrize(
    ("stolen_s", "verdict", "notes"), [(0.2, "VALID", 0), (1.0, "VALID", 1), (3.0, "INVALID", 0)]
)
def test_stolen_time(stolen_s: float, verdict: str, notes: int) -> None:
    """Stolen time is measured against the time that was wanted: 3 of 23 s are 13 %."""
    found = validity.judge(
        replace(QUIET, after=CpuTimes(busy_s=120.0, stolen_s=1.0 + stolen_s, load=1.0))
    )

    assert (found.verdict, len(found.notes)) == (verdict, notes)
    assert found.steal_share == pytest.approx(stolen_s / (20 + stolen_s))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"battery": True}, "plug it in"),
        ({"peak_mib": 700.0}, "Only 700 MiB were seen where 900 MiB of weights"),
    ],
)
def test_other_reasons_on_a_cpu(changes: dict[str, Any], words: str) -> None:
    """Each names what was wrong and what to do."""
    found = validity.judge(replace(QUIET, **changes))

    assert found.verdict == "INVALID"
    assert words in found.reasons[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu_info": ""}, "used no GPU"),
        ({"gpu_info": "NVIDIA GeForce RTX 4090"}, "llama.cpp used NVIDIA GeForce RTX 4090"),
        ({"gpu": None}, "Nothing watched the card"),
        ({"gpu": replace(QUIET_CARD, samples_count=0)}, "Nothing watched the card"),
        ({"gpu": replace(QUIET_CARD, foreign=("ollama",))}, "Other programs computed on the card"),
        (
            {"gpu": replace(QUIET_CARD, slowdowns={"hardware thermal slowdown": 0.3})},
            "slowed down (hardware thermal slowdown) in 30.0 % of the run (limit 2 %)",
        ),
        ({"peak_mib": 600.0}, "layers stayed elsewhere"),
    ],
)
def test_reasons_on_a_gpu(changes: dict[str, Any], words: str) -> None:
    """Another program, heat, the wrong card or layers on the CPU: the number is void."""
    found = validity.judge(replace(QUIET_GPU, **changes))

    assert found.verdict == "INVALID"
    assert any(words in reason for reason in found.reasons)


def test_what_varies_is_noted() -> None:
    """Samples far apart, a short slowdown and unattributed memory are told and void nothing."""
    found = validity.judge(
        replace(
            QUIET_GPU,
            spreads={"decode at 4096": 0.31, "prefill at 0": 0.05},
            gpu=replace(
                QUIET_CARD, attributed=False, slowdowns={"software thermal slowdown": 0.01}
            ),
        )
    )

    assert found.verdict == "VALID"
    assert any("decode at 4096 differ by 31 %" in note for note in found.notes)
    assert any("growth of the whole card" in note for note in found.notes)
    assert not any("prefill" in note for note in found.notes)


def test_gpu_that_nobody_can_watch_is_noted() -> None:
    """There is no NVML for Metal; its numbers stand, and say so."""
    found = validity.judge(replace(QUIET, backend="metal", gpu_info="Apple M4"))

    assert found.verdict == "VALID"
    assert found.notes == ("Nothing watches the cards of metal: others may use them.",)


def test_counters_of_this_machine() -> None:
    """What the kernel counts grows, and is in seconds."""
    before = counters.cpu_times()
    sum(range(2_000_000))
    after = counters.cpu_times()

    assert after.busy_s >= before.busy_s > 0
    assert after.load >= 0
    assert 0 <= validity.steal_share(before, after) <= 1


def test_counters_are_read_by_field(tmp_path: Path) -> None:
    """Of user 10, nice 20, system 30, idle 40, iowait 50, irq 60, softirq 70, steal 80 ticks."""
    (tmp_path / "stat").write_text("cpu  10 20 30 40 50 60 70 80 5 6\ncpu0 1 2 3\n")

    found = counters.cpu_times(tmp_path)

    assert found.stolen_s / found.busy_s == pytest.approx(80 / 190)


def test_system_without_counters_has_its_load(tmp_path: Path) -> None:
    """What is not counted is zero, so that nothing is held against the measurement."""
    found = counters.cpu_times(tmp_path)

    assert (found.busy_s, found.stolen_s) == (0.0, 0.0)
    assert found.load >= 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, False),
        ({"BAT0/type": "Battery", "BAT0/status": "Discharging"}, True),
        ({"BAT0/type": "Battery", "BAT0/status": "Charging"}, False),
        ({"AC/type": "Mains"}, False),
        ({"m/type": "Battery", "m/status": "Discharging", "m/scope": "Device"}, False),
    ],
)
def test_battery(tmp_path: Path, files: dict[str, str], expected: bool) -> None:  # noqa: FBT001 - a table
    """The machine's own battery counts, not that of its mouse."""
    for name, text in files.items():
        path = tmp_path / "class/power_supply" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    assert counters.on_battery(tmp_path) is expected
