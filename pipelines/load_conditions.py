"""What else happened on this machine, its CPU and its cards, while a model was under load."""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Self

from pipelines import gpu, validity, watch, wording

if TYPE_CHECKING:
    from pipelines.gpu import Observation
    from pipelines.watch import Usage


# Cores beside the model's from which on a reader of its speed should know.
_NOTED_CORES: Final = 0.1


class Attended:
    """
    What happened on this machine's CPU and cards while a block ran.

    The llama-server waits for cores that the client, Ollama and its own further threads use, too:
    that is part of serving on one machine. What others took is bounded from two sides, and the
    smaller bound counts: the time that its threads waited less the time that we used beside it, and
    the time that the whole machine was busy less all of ours.

    Attributes:
        cards: What the cards did; None where the driver shows none.
    """

    cards: Observation | None = None

    def __enter__(self) -> Self:
        """Begin to look."""
        self._server = watch.Watch("llama-server")
        self._ollama = watch.Watch("ollama")
        self._own_before_s = _own_cpu_s()
        self.before = validity.cpu_times()
        self._started = time.monotonic()
        self._server.__enter__()
        self._ollama.__enter__()
        self._cards = gpu.Watch(watch.descendants)
        self._cards.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Look a last time."""
        if self._cards.sees_cards:
            self._cards.sample()
            seen = self._cards.observation()
            # The server was there before we looked: where the driver does not name our processes
            # (a container), it is one of those that seem to be somebody else's.
            self.cards = seen if seen.attributed else replace(seen, foreign=())
        self._cards.__exit__(None, None, None)
        for each in (self._server, self._ollama):
            each.sample()
            each.__exit__(None, None, None)
        self.wall_s = time.monotonic() - self._started
        self.after = validity.cpu_times()
        self.beside_s = _own_cpu_s() - self._own_before_s + self._ollama.usage().on_core_s

    @property
    def beside_cores(self) -> float:
        """Cores that client and Ollama used on average."""
        return self.beside_s / self.wall_s

    def waiting_share(self, threads: int) -> float:
        """Share of the time in which a thread of the server was kept from a core by others."""
        usage = self._server.usage()
        return others_share(
            usage,
            beside_s=self.beside_s,
            busy_s=self.after.busy_s - self.before.busy_s,
            wall_s=self.wall_s,
            threads=threads,
        )


def doubts(attended: Attended, *, threads: int, on_gpu: bool) -> tuple[list[str], list[str]]:
    """
    Say why the numbers of an attended run are not to be trusted, and what a reader should know.

    Args:
        attended: What happened meanwhile.
        threads: Threads of the server that compute.
        on_gpu: Whether a part of the model lay on a card.

    Returns:
        Reasons and notes.
    """
    reasons: list[str] = []
    notes: list[str] = []
    stolen = validity.steal_share(attended.before, attended.after)
    if stolen > validity.MAX_STEAL_SHARE:
        reasons.append(f"the hypervisor withheld {wording.percent(stolen)} of the CPU")
    waiting = attended.waiting_share(threads)
    waited = f"others kept the server from a core in {wording.percent(waiting)} of the time"
    if waiting > validity.MAX_WAITING_SHARE:
        reasons.append(waited)
    elif waiting > validity.NOTED_WAITING_SHARE:
        notes.append(wording.sentence(waited[:1].upper() + waited[1:]))
    if attended.beside_cores > _NOTED_CORES and not on_gpu:
        notes.append(
            f"Client and engine took {wording.number(attended.beside_cores)} of the cores on which "
            "the model was computed; behind a network it would be faster."
        )
    if on_gpu and attended.cards is not None:
        validity.judge_cards(attended.cards, reasons, notes)
    if validity.on_battery():
        reasons.append("the machine ran on its battery")
    return reasons, notes


def others_share(
    usage: Usage, *, beside_s: float, busy_s: float, wall_s: float, threads: int
) -> float:
    """
    Bound the share of a run in which others kept a thread of the server from a core.

    Args:
        usage: What the server's threads used, and how long they waited.
        beside_s: CPU time that we used beside it: the client, Ollama.
        busy_s: CPU time that the whole machine used; 0 on a system that does not tell.
        wall_s: Length of the run.
        threads: Threads that compute.
    """
    waited_s = (usage.waited_s or 0.0) - beside_s
    if busy_s > 0:
        waited_s = min(waited_s, busy_s - usage.on_core_s - beside_s)
    alone = replace(usage, waited_s=max(0.0, waited_s))
    return validity.waiting_share(alone, wall_s=wall_s, threads=threads)


def _own_cpu_s() -> float:
    """CPU time of this process and of the programs that it has seen end: the generator's."""
    times = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in times)
