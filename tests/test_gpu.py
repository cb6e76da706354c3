"""
NVIDIA cards are read as the driver tells them, and a machine without a driver has none.

`FakeNvml` stands in for pynvml with the driver behind it: it shows how answers are taken apart and
what is made of missing ones. That a real card answers like this is shown by `@pytest.mark.gpu`.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pipelines import gpu

if TYPE_CHECKING:
    from collections.abc import Callable


class FakeNvml(ModuleType):
    """A driver with cards that are plain namespaces; an absent attribute is not supported."""

    class NVMLError(Exception):
        """What every failing call raises."""

    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, cards: list[SimpleNamespace], *, broken: bool = False) -> None:
        """Have these cards, or refuse to open."""
        super().__init__("pynvml")
        self.cards = cards
        self.broken = broken
        self.opened = 0

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        """Open the driver."""
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802 - the same
        """Close it."""
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - the same
        """Count the cards."""
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> SimpleNamespace:  # noqa: N802 - the same
        """Open one card."""
        return self.cards[index]

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802 - the same
        """Answer in bytes, as old releases do."""
        return b"580.65.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802 - the same
        """Answer 1000 * major + 10 * minor."""
        return 13_010

    def nvmlSystemGetProcessName(self, pid: int) -> str:  # noqa: N802 - the same
        """Name a program by its path."""
        if pid == 666:
            raise self.NVMLError("Not Found")
        return f"/opt/bin/program-{pid}"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Answer nvmlDeviceGetX(handle) with the card's own X."""
        if not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)

        def ask(handle: SimpleNamespace, *_: object) -> Any:
            try:
                return getattr(handle, name.removeprefix("nvmlDeviceGet"))
            except AttributeError:
                raise self.NVMLError("Not Supported") from None

        return ask


def card(index: int = 0, **changes: Any) -> SimpleNamespace:
    """Return a card as NVML shows it."""
    answers = {
        "Name": "NVIDIA GeForce RTX 3090",
        "UUID": f"GPU-{index}0000000-aaaa",
        "MemoryInfo": SimpleNamespace(total=24_576 << 20, used=300 << 20),
        "CudaComputeCapability": (8, 6),
        "EnforcedPowerLimit": 349_600,
        "MaxPcieLinkGeneration": 4,
        "MaxPcieLinkWidth": 16,
        "PersistenceMode": 1,
        "ClockInfo": 1_695,
        "Temperature": 61,
        "CurrentClocksEventReasons": 0x4,
        "ComputeRunningProcesses": [],
    }
    return SimpleNamespace(**{k: v for k, v in (answers | changes).items() if v is not None})


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    """Install a fake driver with the given cards."""

    def install(*cards: SimpleNamespace, broken: bool = False) -> FakeNvml:
        fake = FakeNvml(list(cards), broken=broken)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.setattr(gpu, "_TRACES", (os.devnull,))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return fake

    return install


def process(pid: int, mib: int | None) -> SimpleNamespace:
    """Return a process as NVML lists it."""
    return SimpleNamespace(pid=pid, usedGpuMemory=None if mib is None else mib << 20)


def test_no_driver_means_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """On most machines there is nothing to find, and pynvml is not even imported."""
    monkeypatch.setattr(gpu, "_TRACES", ("/nonexistent",))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert gpu.cards() == ()
    assert gpu.driver() is None
    with gpu.Watch(set) as watch:
        watch.sample()
    assert not watch.sees_cards


def test_driver_that_does_not_answer_means_no_cards(driver: Callable[..., FakeNvml]) -> None:
    """A driver of another version than its library, for one."""
    driver(card(), broken=True)

    assert gpu.cards() == ()
    assert gpu.driver() is None


def test_missing_pynvml_means_no_cards(
    driver: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-ml-py is an extra."""
    driver(card())
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert gpu.cards() == ()


def test_what_is_free_is_what_nobody_holds_on_any_visible_card(
    driver: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server beside us holds memory that a card has and that we cannot have."""
    driver(card(0), card(1, MemoryInfo=SimpleNamespace(total=1024 << 20, used=24 << 20)))

    assert gpu.free_mib() == 24_276 + 1_000
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu.free_mib() == 1_000
    driver(card(), broken=True)
    assert gpu.free_mib() == 0


def test_card_in_full(driver: Callable[..., FakeNvml]) -> None:
    """Name, memory in MiB, capability, rounded power limit, best link of card and slot."""
    fake = driver(card())

    assert gpu.cards() == (
        gpu.Card(
            name="NVIDIA GeForce RTX 3090",
            vram_mib=24_576,
            compute_capability="8.6",
            power_limit_w=350,
            pcie_generation=4,
            pcie_lanes=16,
        ),
    )
    assert gpu.driver() == gpu.Driver(version="580.65.06", cuda="13.1", persistence=True)
    assert fake.opened == 0


def test_card_that_does_not_tell_everything(driver: Callable[..., FakeNvml]) -> None:
    """Laptops and virtual cards know no power limit or link; old pynvml returns bytes."""
    driver(
        card(
            Name=b"GRID A100",
            EnforcedPowerLimit=None,
            MaxPcieLinkGeneration=None,
            MaxPcieLinkWidth=None,
            CudaComputeCapability=None,
            PersistenceMode=None,
        )
    )

    (found,) = gpu.cards()

    assert found.name == "GRID A100"
    assert {found.power_limit_w, found.pcie_generation, found.compute_capability} == {None}
    known = gpu.driver()
    assert known is not None
    assert known.persistence is None


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("1,-1,0", [1]),
        ("7", []),
        ("0,0", []),
        ("GPU-1", [1]),
        ("GPU-", []),
        ("GPU-ff", []),
        ("NoDevFiles", []),
    ],
)
def test_visible_cards(declared: str | None, expected: list[int]) -> None:
    """CUDA_VISIBLE_DEVICES by number or by the beginning of a UUID; the first bad entry ends it."""
    assert gpu.visible(["GPU-0a", "GPU-1b", "GPU-2c"], declared) == expected


def test_hidden_cards_are_neither_listed_nor_watched(
    driver: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that belongs to another job does not count as ours."""
    driver(card(0, Name="first"), card(1, Name="second"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")

    assert [found.name for found in gpu.cards()] == ["second"]


def test_watch_keeps_the_peak_of_our_processes(driver: Callable[..., FakeNvml]) -> None:
    """The largest sum over all cards at one moment; others are named, and do not count."""
    first, second = card(0), card(1)
    driver(first, second)

    with gpu.Watch(lambda: {10}, every_s=60) as watch:
        for mine, others in ((100, []), (900, [process(20, 50)]), (300, [])):
            first.ComputeRunningProcesses = [process(10, mine), *others]
            second.ComputeRunningProcesses = [process(10, 50)]
            watch.sample()

    found = watch.observation()
    assert found.peak_mib == 950
    assert found.attributed
    assert found.foreign == ("program-20",)
    assert found.samples_count == 3


def test_watch_names_who_was_there_before_us(driver: Callable[..., FakeNvml]) -> None:
    """A program that computes when we begin is foreign even where ours cannot be told apart."""
    only = card(ComputeRunningProcesses=[process(666, 50)])
    driver(only)

    with gpu.Watch(lambda: {10}, every_s=60) as watch:
        watch.sample()

    assert watch.observation().foreign == ("process 666",)


@pytest.mark.parametrize("ours", [[], [process(4_000_000, 700)], [process(10, None)]])
def test_watch_where_processes_cannot_be_told_apart(
    driver: Callable[..., FakeNvml], ours: list[SimpleNamespace]
) -> None:
    """In a container the driver lists nobody, or strange numbers: the card's growth is taken."""
    only = card()
    driver(only)

    with gpu.Watch(lambda: {10}, every_s=60) as watch:
        only.ComputeRunningProcesses = ours
        only.MemoryInfo = SimpleNamespace(total=24_576 << 20, used=1_000 << 20)
        watch.sample()

    found = watch.observation()
    assert (found.peak_mib, found.attributed) == (700, False)
    assert found.foreign == ()


def test_watch_counts_unwanted_slowdowns_only(driver: Callable[..., FakeNvml]) -> None:
    """Idle, application clocks and the power cap are as designed; heat and the brake are not."""
    only = card()
    driver(only)

    with gpu.Watch(set, every_s=60) as watch:
        for bits in (0x1, 0x4, 0x4 | 0x40, 0x40 | 0x80):
            only.CurrentClocksEventReasons = bits
            watch.sample()

    assert watch.observation().slowdowns == {
        "hardware thermal slowdown": 0.5,
        "hardware power brake": 0.25,
    }


def test_watch_of_a_card_that_tells_nothing(driver: Callable[..., FakeNvml]) -> None:
    """What the driver does not know stays unknown."""
    driver(
        card(
            ClockInfo=None,
            Temperature=None,
            CurrentClocksEventReasons=None,
            ComputeRunningProcesses=None,
        )
    )

    with gpu.Watch(set, every_s=60) as watch:
        watch.sample()

    found = watch.observation()
    assert (found.clock_mhz, found.temperature_c, found.slowdowns) == (None, None, {})


def test_watch_reads_by_itself_and_closes_the_driver(driver: Callable[..., FakeNvml]) -> None:
    """The thread reads until the block ends; afterwards the driver is free."""
    fake = driver(card())

    with gpu.Watch(set, every_s=0.001) as watch:
        while watch.observation().samples_count < 3:
            pass

    assert fake.opened == 0
    assert watch.observation().clock_mhz == 1_695


@pytest.mark.gpu
def test_real_card_answers() -> None:
    """A real driver knows name and memory, and shows its clock while we watch."""
    found = gpu.cards()
    if not found:
        pytest.skip("no NVIDIA card here")

    with gpu.Watch(set, every_s=60) as watch:
        watch.sample()

    assert found[0].vram_mib > 1_000
    assert watch.observation().samples_count == 1
    assert watch.observation().clock_mhz
