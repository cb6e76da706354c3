"""What else happened on this machine, its CPU and its cards, while a model was under load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import certificate, validity

if TYPE_CHECKING:
    from pipelines.records import Validity


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
