"""What else happened on this machine, its CPU and its cards, while a model was under load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pipelines import certificate, validity, wording

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.load_records import LoadGate
    from pipelines.records import Validity

# Share of a run in which others kept the server from a core, up to which a missed level is believed
# to be the model's own miss. A throughput that waits for a tenth of its time is a tenth lower; a
# latency at a rate near what the machine carries is a queue, which a tenth makes several times as
# long. A kept level was kept all the same, so nothing is asked of that.
MAX_WAITING_OF_A_MISS: Final = 0.10


class Attended(certificate.Watch):
    """
    What happened on this machine while a llama-server, maybe below Ollama, was asked by us.

    Client and Ollama use cores, too: that is part of serving on one machine, and is not held
    against anybody (`validity.others_share`).
    """

    def __init__(self) -> None:
        """Prepare."""
        super().__init__("llama-server", beside=("ollama",))


def judge(attended: Attended, *, threads: int, on_gpu: bool) -> Validity:
    """
    Say whether the numbers of an attended run are to be trusted.

    What is particular to load (the client's own delays, answers that failed, a server that is no
    longer what it was) is judged where it is found, and comes to the same list.

    Args:
        attended: What happened meanwhile.
        threads: Threads of the server that compute.
        on_gpu: Whether a part of the model lay on a card. Which one is the engine's affair: where
            the driver shows none, nobody can have watched it, and that is noted.
    """
    backend = "cpu" if not on_gpu else "cuda" if attended.cards is not None else "another GPU"
    return attended.judge(validity.Run(backend=backend, threads=threads, subject="server"))


def disbelieved(gates: Sequence[LoadGate], seen: Validity | None) -> tuple[str, ...]:
    """
    Say why missed levels are not held against a model: others had the cores meanwhile.

    Args:
        gates: Every level that was judged; memory is no matter of time.
        seen: What happened on the machine; None where nobody looked.

    Returns:
        A sentence; nothing if no level was missed, or the server had its cores.
    """
    missed = [one.name for one in gates if one.outcome == "FAIL" and one.name != "memory"]
    waited = (
        next((c.value for c in seen.conditions if c.rule == "waiting_share"), None)
        if seen
        else None
    )
    if not missed or waited is None or waited <= MAX_WAITING_OF_A_MISS:
        return ()
    names = wording.listed(list(dict.fromkeys(missed)))
    share, limit = wording.percent(waited), wording.percent(MAX_WAITING_OF_A_MISS)
    told = (
        f"It missed {names} while others kept the server from a core in {share} of its time (a "
        f"miss is believed up to {limit}): stop what else runs here and run it again."
    )
    return (told,)
