"""
What the load generator adds to the times that it measures, and costs.

The figures go to bench/results/load-overhead.json.

A server without a model streams 32 answers of 300 chunks at 100 chunks/s each, and says of each
chunk when it was sent. Beside our generator the clients of OpenAI and Ollama read the same, in
environments of their own, in turns within one run:

    added TTFT      time to first token as the client saw it, less what the server took from having
                    the request to sending the first chunk: connecting, sending, waking up, reading
    delay           from the send of a chunk to the stamp of the client
    CPU             core-seconds of the client for 1,000 chunks, while it ran

Single times depend on the machine, which is stated beside them; what its other programs did in the
meantime is in all of them.

    client          each stream keeps the pace from its own start
    client_batch    the chunks of all streams are sent at the same moments, as by a server that
                    generates in batches: 32 threads wake up at once, and each waits for the others

A section is a function of the log to write to; `SECTIONS` says which there are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.overhead import machine_class
from pipelines import atomic, console
from pipelines.load import calibration, measures, null_server

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT: Final = Path(__file__).resolve().parent.parent
RECORD: Final = ROOT / "bench/results/load-overhead.json"
STREAMS: Final = 32
CHUNKS: Final = 300
CHUNKS_PER_S: Final = 100.0
# 32 answers in each round, 1,024 in all: what a 99th percentile needs.
TURNS: Final = 4
ROUNDS: Final = 8
PEERS: Final = ("openai", "ollama")
AIM_TTFT_P99_MS: Final = 2.0
AIM_CPU_S: Final = 0.05

Sample = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the figures, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--only", choices=sorted(SECTIONS), help="measure one section")
    parser.add_argument("--out", type=Path, default=RECORD, help="file of the record")
    parser.add_argument("--turns", type=int, default=TURNS, help="turns of each client")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="answers to a user in a turn")
    options = parser.parse_args(argv)
    (ROOT / "work").mkdir(exist_ok=True)
    figures: dict[str, Any] = {"schema_version": 1, "machine": machine_class()}
    kept = _kept(options.out) if options.only else {}
    if kept.get("machine", figures["machine"])["hw_id"] != figures["machine"]["hw_id"]:
        raise SystemExit(
            f"{options.out} was measured on another machine, and it names one for all sections: "
            "leave out --only, or name another --out."
        )
    with tempfile.TemporaryDirectory(prefix="fleet-bench-", dir=ROOT / "work") as scratch:
        for name, section in SECTIONS.items():
            if options.only in (None, name):
                figures[name] = section(Path(scratch), options)
    console.out(json.dumps(figures, indent=2))
    atomic.write_json(options.out, kept | figures)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Show the module's docstring as it is."""


def _kept(path: Path) -> dict[str, Any]:
    """Return the sections that are not measured now."""
    try:
        kept = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return kept if isinstance(kept, dict) else {}


# --- the client -------------------------------------------------------------------------------


def client(scratch: Path, options: argparse.Namespace, *, batch: bool = False) -> dict[str, Any]:
    """Measure our generator and its peers in turns."""
    log = scratch / "load.log"
    clients: dict[str, Callable[[], Sample]] = {
        "fleet (Ollama's lines)": lambda: ours("ollama", log, options.rounds, batch=batch),
        "fleet (OpenAI's events)": lambda: ours("openai", log, options.rounds, batch=batch),
    }
    missing: dict[str, str] = {}
    for name in PEERS:
        python = environment(scratch / f"venv-{name}", name)
        if isinstance(python, str):
            missing[name] = python
        else:
            clients[name] = _peer(python, name, log, options.rounds, batch=batch)
    samples: dict[str, list[Sample]] = defaultdict(list)
    loads: list[float] = []
    for turn in range(options.turns):
        for name, measure in clients.items():
            console.step(f"{name}, turn {turn + 1} of {options.turns}")
            loads.append(os.getloadavg()[0])
            samples[name].append(measure())
    found = {name: figures(each) for name, each in samples.items()}
    return {
        "streams_count": STREAMS,
        "chunks_each": CHUNKS,
        "chunks_per_s": CHUNKS_PER_S,
        "aim": {"added_ttft_p99_ms": AIM_TTFT_P99_MS, "cpu_s_per_1000_chunks": AIM_CPU_S},
        "load_of_machine_median": round(statistics.median(loads), 2),
        "clients": found,
        "not_measured": missing,
    }


def client_batch(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same where all streams move at once."""
    return client(scratch, options, batch=True)


def ours(
    api: Any,  # noqa: ANN401 - one of two words
    log: Path,
    rounds: int,
    *,
    batch: bool,
) -> Sample:
    """Drive the null server with our generator."""
    found = calibration.footprint(
        streams=STREAMS,
        chunks=CHUNKS,
        chunks_per_s=CHUNKS_PER_S,
        api=api,
        log=log,
        rounds=rounds,
        batch=batch,
    )
    return {
        "delays_ms": found.delays_ms,
        "added_ttft_ms": found.added_ttft_ms,
        "late_ms": found.late_ms,
        "cpu_s_per_1000_chunks": found.cpu_s_per_1000_chunks,
        "after_cpu_s_per_1000_chunks": found.after_cpu_s_per_1000_chunks,
    }


def _peer(python: Path, name: str, log: Path, rounds: int, *, batch: bool) -> Callable[[], Sample]:
    def measure() -> Sample:
        with null_server.running(log) as url:
            model = null_server.model(CHUNKS, CHUNKS_PER_S, batch=batch)
            program = Path(__file__).with_name("peer.py")
            done = subprocess.run(  # noqa: S603 - our own argv
                [python, program, name, url, model, str(STREAMS), str(rounds)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        sample: Sample = json.loads(done.stdout.splitlines()[-1])
        return sample

    return measure


def environment(folder: Path, package: str) -> Path | str:
    """Install a package apart from ours, if it is not yet; return its Python, or why not."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        return "uv is not installed"
    python = folder / "bin/python"
    if python.exists():
        return python
    console.step(f"install {package} into an environment of its own")
    for argv in (
        [uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", "--quiet", "--python", str(python), package],
    ):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no word"]
            return f"{package} could not be installed: {console.clean(said[-1])[:200]}"
    return python


def figures(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pool the turns of one client; the CPU time is the median of them."""
    pooled = {
        name: [value for sample in samples for value in sample.get(name, ())]
        for name in ("delays_ms", "added_ttft_ms", "late_ms")
    }
    found: dict[str, Any] = {
        "requests_count": len(pooled["added_ttft_ms"]),
        "chunks_count": len(pooled["delays_ms"]),
    }
    if "version" in samples[0]:
        found["version"] = samples[0]["version"]
    for name, word in (("added_ttft_ms", "added_ttft"), ("delays_ms", "delay")):
        for share in (0.5, 0.99):
            key = f"{word}_p{share * 100:.0f}_ms"
            found[key] = round(measures.percentile(pooled[name], share), 3)
    if pooled["late_ms"]:
        found["null_server_late_p99_ms"] = round(measures.percentile(pooled["late_ms"], 0.99), 3)
    for name in ("cpu_s_per_1000_chunks", "after_cpu_s_per_1000_chunks"):
        if name in samples[0]:
            found[name] = round(statistics.median(sample[name] for sample in samples), 4)
    return found


SECTIONS: Final[dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]]] = {
    "client": client,
    "client_batch": client_batch,
}


if __name__ == "__main__":
    main()
