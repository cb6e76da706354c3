"""
One certificate of validity for benchmark, compare and load test: watch a run, then judge it.

    with certificate.Watch("llama-bench") as watched:
        ...                                        # the run
    validity = watched.judge(validity.Run(backend=..., threads=...))

One sampler reads the measured programs, ours beside them and the cards ten times a second while the
block runs. What the kernel counts for the whole machine is read before and after it. The rules are
in `validity`; this module only knows how to look.
"""

from __future__ import annotations

import resource
import threading
import time
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Final, Self

from pipelines import counters, gpu, machine, measuring, validity, watch
from pipelines.validity import Conditions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.counters import CpuTimes
    from pipelines.gpu import Observation
    from pipelines.records import Validity
    from pipelines.validity import Run
    from pipelines.watch import Usage

SAMPLE_EVERY_S: Final = 0.1


class Watch:
    """
    What happened on this machine's CPU and cards while a block ran.

    Attributes:
        before: Counters of the machine when it began.
        after: Counters when it ended.
        wall_s: Length of the block.
        cards: What the cards did; None where the driver shows none.
    """

    before: CpuTimes
    after: CpuTimes
    wall_s: float
    cards: Observation | None = None

    def __init__(
        self,
        program: str,
        *,
        beside: Sequence[str] | None = None,
        every_s: float = SAMPLE_EVERY_S,
    ) -> None:
        """
        Prepare.

        Args:
            program: What is measured: the name of its programs, which are all below us.
            beside: Further programs below us that are part of what is measured, together with this
                process and the ones that it ran: an engine in front of the server. None for a
                benchmark: then whoever else has a core counts as somebody else.
            every_s: Time between two samples.
        """
        self._beside = beside
        self._every_s = every_s
        self._measured = watch.Watch(program, every_s=None)
        self._others = [watch.Watch(name, every_s=None) for name in beside or ()]
        self._card_watch = gpu.Watch(
            self._measured.pids if beside is None else watch.descendants, every_s=None
        )
        self._stack = ExitStack()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Self:
        """Begin to look."""
        # Opens the driver, which can take seconds, for all that is asked of it afterwards.
        self._stack.enter_context(self._card_watch)
        self._hw_id = machine.probe()["hw_id"]
        self._leases = measuring.leases()
        self._own_before_s = _own_cpu_s()
        self.before = counters.cpu_times()
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look a last time."""
        self._stopped.set()
        self._thread.join()
        self.wall_s = time.monotonic() - self._started
        self.after = counters.cpu_times()
        self.sample()
        self.beside_s = _own_cpu_s() - self._own_before_s
        self.beside_s += sum(each.usage().on_core_s for each in self._others)
        self._hardware = machine.probe()
        # Now, and not when it is judged: the machine may have been given to others by then.
        self._leased = bool(self._leases) and all(each.held() for each in self._leases)
        self._battery = counters.on_battery()
        self._stack.close()
        if self._card_watch.sees_cards:
            seen = self._card_watch.observation()
            # A server was there before we looked: where the driver does not name our processes
            # (a container), it is one of those that seem to be somebody else's.
            ours_from_before = self._beside is not None and not seen.attributed
            self.cards = replace(seen, foreign=()) if ours_from_before else seen

    def _loop(self) -> None:
        while not self._stopped.wait(self._every_s):
            self.sample()

    def sample(self) -> None:
        """Read once; also safe from another thread, at a moment that matters."""
        for each in (self._measured, *self._others):
            each.sample()
        self._card_watch.sample()

    def usage(self) -> Usage:
        """Return what the measured programs used."""
        return self._measured.usage()

    def judge(self, run: Run) -> Validity:
        """Judge the run that was watched; valid once the block has ended."""
        return validity.judge(self.conditions(run))

    def conditions(self, run: Run) -> Conditions:
        """Return all that the rules look at."""
        return Conditions(
            **{each.name: getattr(run, each.name) for each in fields(run)}
            | {"hw_id": run.hw_id or self._hw_id},
            before=self.before,
            after=self.after,
            wall_s=self.wall_s,
            usage=self.usage(),
            cards=tuple(gpu.Card(**card) for card in self._hardware["gpus"]),
            gpu=self.cards,
            battery=self._battery,
            beside_s=None if self._beside is None else self.beside_s,
            governor=machine.governor(),
            leased=self._leased,
            hw_id_found=self._hardware["hw_id"],
        )


def _own_cpu_s() -> float:
    """CPU time of this process and of the programs that it has seen end: the generator's."""
    times = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in times)
