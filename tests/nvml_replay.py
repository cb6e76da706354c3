"""
Traces of NVML behind the names of pynvml, so that what is tested is exactly `pipelines.gpu`.

The traces and their format are described in `tests/data/nvml/README.md`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipelines import gpu

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from pipelines.gpu import Card, Observation

TRACES = Path(__file__).parent / "data/nvml"
NOT_SUPPORTED = 3
TIMEOUT = 10


class NvmlReplay(ModuleType):
    """A driver that answers as a trace says for the moment at which it stands."""

    class NVMLError(Exception):
        """What every failing call raises; `value` is NVML's code."""

        def __init__(self, value: int) -> None:
            """Keep the code."""
            super().__init__(f"NVML error {value}")
            self.value = value

    def __init__(self, trace: dict[str, Any]) -> None:
        """Stand at the first sample."""
        super().__init__("pynvml")
        self.trace = trace
        self.step: dict[str, Any] = trace["steps"][0]
        self.share = 0.0
        self.events: list[dict[str, int]] = []
        self.opened = 0

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        """Open the driver."""
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802 - the same
        """Close it."""
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - the same
        """Count the cards."""
        return len(self.trace["cards"])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802 - the same
        """Open one card: its number serves as its handle."""
        return index

    def nvmlSystemGetProcessName(self, pid: int) -> str:  # noqa: N802 - the same
        """Name a program by its path."""
        return f"/usr/bin/program-{pid}"

    def nvmlEventSetCreate(self) -> list[int]:  # noqa: N802 - the same
        """Begin with no card."""
        return []

    def nvmlEventSetFree(self, event_set: list[int]) -> None:  # noqa: N802 - the same
        """Forget."""
        event_set.clear()

    def nvmlDeviceRegisterEvents(self, handle: int, kinds: int, event_set: list[int]) -> None:  # noqa: N802 - the same
        """Listen to a card that has ECC memory; a GeForce here does not support it."""
        if kinds != 0x8 or "GeForce" in self.trace["cards"][handle]["nvmlDeviceGetName"]:
            raise self.NVMLError(NOT_SUPPORTED)
        event_set.append(handle)

    def nvmlEventSetWait(self, event_set: list[int], timeout_ms: int) -> SimpleNamespace:  # noqa: N802 - the same
        """Return the next event of a card that is listened to."""
        assert timeout_ms == 0, "a sampler must not wait"
        for event in self.events:
            if event["card"] in event_set:
                self.events.remove(event)
                return SimpleNamespace(eventType=0x8, eventData=event["xid"])
        raise self.NVMLError(TIMEOUT)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Answer nvmlDeviceGetX(handle, ...) as the trace says."""
        if not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)
        return lambda handle, *_: self._answer(name, handle)

    def _answer(self, name: str, handle: int) -> Any:
        known = self.trace["cards"][handle] | self.step["cards"][handle]
        value = known.get(name, {"error": NOT_SUPPORTED})
        if name == "nvmlDeviceGetComputeRunningProcesses" and isinstance(value, list):
            return [SimpleNamespace(**each) for each in value]
        if isinstance(value, list):
            return value if name == "nvmlDeviceGetRetiredPages" else tuple(value)
        if not isinstance(value, dict):
            return value
        if "error" in value:
            raise self.NVMLError(value["error"])
        if "ramp" in value:
            first, last = value["ramp"]
            return round(first + self.share * (last - first))
        return SimpleNamespace(**value)

    def play(self, watch: gpu.Watch) -> None:
        """Let the watch sample each moment of the trace."""
        for step in self.trace["steps"]:
            self.step = step
            self.events += step.get("events", [])
            for number in range(step["samples"]):
                self.share = number / max(1, step["samples"] - 1)
                watch.sample()


def replay(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Observation, tuple[Card, ...], NvmlReplay]:
    """Replay a trace; return what was observed, the cards as they began, and the driver."""
    driver = NvmlReplay(json.loads((TRACES / f"{name}.json").read_text()))
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(gpu, "_TRACES", (os.devnull,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cards = gpu.cards()
    with gpu.Watch(lambda: set(driver.trace["ours"]), every_s=None) as watch:
        driver.play(watch)
    return watch.observation(), cards, driver
