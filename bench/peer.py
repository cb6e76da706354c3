"""
A well-known client against the null server: what it adds and costs, as one line of JSON.

    python peer.py openai|ollama URL MODEL STREAMS ROUNDS

It is run by the Python of an environment of its own, so it knows nothing of ours. As our generator
it has a thread and a kept connection for each virtual user, ten milliseconds between their starts,
and a warm-up that does not count; unlike ours, it parses each chunk before it takes the time, since
that is how this client hands it out.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import resource
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RAMP_S = 0.01

_now = time.monotonic_ns


def openai_user(url: str, model: str) -> Callable[[str], Iterator[str]]:
    """Ask through the client of OpenAI."""
    client = importlib.import_module("openai").OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0
    )

    def ask(text: str) -> Iterator[str]:
        stream = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], stream=True
        )
        for event in stream:
            if event.choices and event.choices[0].delta.content:
                yield event.choices[0].delta.content

    return ask


def ollama_user(url: str, model: str) -> Callable[[str], Iterator[str]]:
    """Ask through the client of Ollama."""
    client = importlib.import_module("ollama").Client(host=url)

    def ask(text: str) -> Iterator[str]:
        messages = [{"role": "user", "content": text}]
        for part in client.chat(model=model, messages=messages, stream=True):
            if part.message.content:
                yield part.message.content

    return ask


def main(argv: list[str]) -> None:
    """Warm up, run, print."""
    name, url, model = argv[:3]
    streams, rounds = int(argv[3]), int(argv[4])
    make = {"openai": openai_user, "ollama": ollama_user}[name]
    users = [make(url, model) for _ in range(streams)]
    everybody(users, 1, "warm-up", [])
    gc.collect()
    gc.freeze()
    before = resource.getrusage(resource.RUSAGE_SELF)
    answers: list[tuple[int, list[tuple[int, str]]]] = []
    everybody(users, rounds, "run", answers)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    sys.stdout.write(json.dumps(summary(answers, cpu_s, name)) + "\n")


def everybody(
    users: list[Callable[[str], Iterator[str]]], rounds: int, text: str, answers: list[Any]
) -> None:
    """Let each virtual user ask so many times."""

    def one(ask: Callable[[str], Iterator[str]]) -> None:
        for _ in range(rounds):
            started = _now()
            chunks = [(_now(), chunk) for chunk in ask(text)]
            answers.append((started, chunks))

    threads = [threading.Thread(target=one, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
        time.sleep(RAMP_S)
    for thread in threads:
        thread.join()


def summary(
    answers: list[tuple[int, list[tuple[int, str]]]], cpu_s: float, name: str
) -> dict[str, Any]:
    """Compare the stamps of the client with those in the chunks: sent, late, asked."""
    delays: list[float] = []
    added: list[float] = []
    for started, chunks in answers:
        sent = [[int(part) for part in text.split(":")] for _, text in chunks]
        delays += [(at - each[0]) / 1e6 for (at, _), each in zip(chunks, sent, strict=True)]
        inside = sent[0][0] - sent[0][2]
        added.append((chunks[0][0] - started - inside) / 1e6)
    return {
        "version": importlib.metadata.version(name),
        "delays_ms": delays,
        "added_ttft_ms": added,
        "cpu_s_per_1000_chunks": cpu_s / len(delays) * 1000,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
