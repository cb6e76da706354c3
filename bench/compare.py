"""
How often a comparison is wrong on this machine -> bench/results/compare-proof.json.

Real comparisons of the embedded model with itself, by the code of `fleet compare`, while a busy
neighbour switches on and off at random (seeded): two threads that take both cores of a small
machine for 0.2 to 3 s, then leave it alone for 1 to 8 s.

    same      50 comparisons of one file with itself: how often "worse" is said, which is wrong
    slower    20 in which the challenger is really 10 % slower: its process is stopped for 0.8 ms of
              every 10 ms. How often "worse" is said, which is right. Of those that are INVALID
              nothing is concluded, which is what they are for

Made short for that: one thread, prompts of 256 tokens, 64 generated, six repetitions of which five
count, four pairs of control, eight pairs and one doubling. It waits for no quiet moment, so that
the neighbour hits. What else the machine does is noise on top; its load stands in the record.
Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.fork import ROOT
from bench.overhead import machine_class
from pipelines import (
    atomic,
    compare,
    compare_run,
    console,
    declaration,
    llamacpp,
    measuring,
    stats,
    stats_paired,
    toolchain,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipelines.toolchain import Toolchain

RECORD: Final = ROOT / "bench/results/compare-proof.json"
MODEL: Final = "work/tiny-llama/gguf/tiny-llama-Q4_K_M.gguf"
KINDS: Final = {"same": 50, "slower": 20}
STOPPED_S: Final = 0.0008
PERIOD_S: Final = 0.010
SEED: Final = 1
BUDGET_S: Final = 240.0

# Starts the real program, then stops it for a part of every period. A real-time priority, where it
# may have one, keeps its clock on a busy machine.
_WRAPPER: Final = """\
#!{python} -IS
import os, signal, subprocess, sys, time
child = subprocess.Popen([{program!r}, *sys.argv[1:]])
try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
except OSError:
    pass
next_s = time.monotonic()
while child.poll() is None:
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep({stopped_s})
    os.kill(child.pid, signal.SIGCONT)
    next_s = max(next_s + {period_s}, time.monotonic())
    time.sleep(max(0.0, next_s - time.monotonic()))
sys.exit(child.returncode)
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the figures, write the record if all comparisons are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--neighbour", type=int, metavar="SEED", help=argparse.SUPPRESS)
    parser.add_argument("--journal", type=Path, default=ROOT / "work/compare-proof.jsonl")
    parser.add_argument("--out", type=Path, default=RECORD, help="file of the record")
    parser.add_argument("--same", type=int, default=KINDS["same"], help="comparisons of equals")
    parser.add_argument("--slower", type=int, default=KINDS["slower"], help="of a slower one")
    parser.add_argument("--no-neighbour", action="store_true", help="leave the neighbour out")
    options = parser.parse_args(argv)
    if options.neighbour is not None:
        neighbour(options.neighbour)
        return
    wanted = {"same": options.same, "slower": options.slower}
    known = _known(options.journal)
    with tempfile.TemporaryDirectory(prefix="fleet-bench-", dir=ROOT / "work") as scratch:
        for kind, number in _order(wanted):
            if any((one["kind"], one["number"]) == (kind, number) for one in known):
                continue
            with busy_neighbour(SEED + len(known), on=not options.no_neighbour):
                one = compare_once(kind, number, Path(scratch))
            known.append(one)
            with options.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(one) + "\n")
            counts = Counter((each["kind"], each["outcome"]) for each in known)
            told = ", ".join(f"{kind} {outcome} {n}" for (kind, outcome), n in counts.items())
            console.info(f"{len(known)} of {sum(wanted.values())}: {told}")
    figures = {"schema_version": 1, "machine": machine_class(), **summary(known)}
    console.out(json.dumps(figures, indent=2))
    atomic.write_json(options.out, figures)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Show the module's docstring as it is."""


def _known(journal: Path) -> list[dict[str, Any]]:
    try:
        lines = journal.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _order(wanted: dict[str, int]) -> list[tuple[str, int]]:
    """Mix both kinds, so that both see the same hours."""
    all_ = [(kind, number) for kind, count in wanted.items() for number in range(count)]
    return sorted(all_, key=lambda each: (each[1] / wanted[each[0]], each[0]))


# --- one comparison ---------------------------------------------------------------------------


def compare_once(kind: str, number: int, scratch: Path) -> dict[str, Any]:
    """Compare the embedded model with itself, or with itself stopped now and then."""
    declared = declaration.load(ROOT / "params.yaml")
    tools = toolchain.ensure(toolchain.spec_of(declared))
    slowed = _slowed(tools, scratch / "slowed") if kind == "slower" else tools
    size_bytes = compare.tensor_bytes(ROOT / MODEL)
    plan = compare_run.Plan(
        pairs=8,
        control_pairs=4,
        repetitions=6,
        dropped_repetitions=1,
        prompt_tokens=256,
        generate_tokens=64,
        depths=(0,),
        execution=llamacpp.Execution(
            threads=1,
            gpu_layers=0,
            flash_attention=True,
            kv_type="f16",
            batch_tokens=2048,
            ubatch_tokens=512,
        ),
        effects={
            "decode": declared.compare.min_decode_effect,
            "prefill": declared.compare.min_prefill_effect,
        },
    )
    journal = scratch / f"{kind}-{number}.jsonl"
    champion, challenger = (
        compare_run.Runner(tools=each, model=MODEL, model_size_bytes=size_bytes)
        for each in (tools, slowed)
    )
    session = compare_run.Session(
        plan=plan,
        sides={"A": champion, "B": challenger},
        root=ROOT,
        log=scratch / "log",
        journal=compare_run.Journal(journal, "proof"),
        budget_s=BUDGET_S,
        quiet_within_s=0.0,
    )
    began = time.monotonic()
    load_before = os.getloadavg()[0]
    with measuring.one_at_a_time(scratch, f"{kind} {number}"):
        session.warm_up()
        measured = compare.measure(session)
    valid = measured.validity.verdict == "VALID"
    outcome = stats_paired.worst_of([one.outcome for one in measured.speed])
    return {
        "kind": kind,
        "number": number,
        "outcome": outcome if valid else "INVALID",
        "reasons": list(measured.validity.reasons),
        "doubled": measured.doubled,
        "void_pairs_count": len(session.void),
        "wall_s": round(time.monotonic() - began, 1),
        "load": round(load_before, 2),
        "tests": {
            one.test: {
                "outcome": one.outcome,
                "log_ratio": one.log_ratio_mean,
                "low": one.log_ratio_low,
                "high": one.log_ratio_high,
                "control_half_width": one.control_half_width,
                "drift": one.drift,
                "pairs": [pair.log_ratio for pair in one.pairs],
                "control": [pair.log_ratio for pair in one.control_pairs],
            }
            for one in measured.speed
        },
    }


def _slowed(tools: Toolchain, prefix: Path) -> Toolchain:
    """Lay out the same toolchain with a llama-bench that is stopped for a part of its time."""
    if not prefix.exists():
        (prefix / "bin").mkdir(parents=True)
        for folder in ("lib", "share", "python"):
            (prefix / folder).symlink_to(tools.prefix / folder)
        for name in tools.manifest["tools"]:
            (prefix / "bin" / name).symlink_to(tools.prefix / "bin" / name)
        wrapper = prefix / "bin" / "llama-bench"
        wrapper.unlink()
        wrapper.write_text(
            _WRAPPER.format(
                python=sys.executable,
                program=str(tools.tool("llama-bench")),
                stopped_s=STOPPED_S,
                period_s=PERIOD_S,
            )
        )
        wrapper.chmod(0o755)
    return toolchain.Toolchain(prefix=prefix, manifest=tools.manifest)


# --- the neighbour ----------------------------------------------------------------------------


@contextmanager
def busy_neighbour(seed: int, *, on: bool) -> Iterator[None]:
    """Run the neighbour beside the block."""
    if not on:
        yield
        return
    child = subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-m", "bench.compare", "--neighbour", str(seed)], cwd=ROOT
    )
    try:
        yield
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def neighbour(seed: int) -> None:
    """Take two cores for a while, leave them for a while, until we are ended with our parent."""
    from pipelines import proc  # noqa: PLC0415 - only in the child

    proc.die_with_parent()
    draw = random.Random(seed)  # noqa: S311 - a schedule
    while True:
        ends_at = time.monotonic() + draw.uniform(0.2, 3.0)
        threads = [threading.Thread(target=_burn, args=(ends_at,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(draw.uniform(1.0, 8.0))


def _burn(ends_at: float) -> None:
    block = bytes(1 << 20)
    while time.monotonic() < ends_at:
        hashlib.sha256(block).digest()  # releases the interpreter's lock


# --- the figures ------------------------------------------------------------------------------


def summary(known: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count the outcomes of each kind, with Wilson's interval of what matters."""
    figures: dict[str, Any] = {
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "stopped_share": STOPPED_S / PERIOD_S,
    }
    for kind in KINDS:
        of_kind = [one for one in known if one["kind"] == kind]
        valid = [one for one in of_kind if one["outcome"] != "INVALID"]
        worse = sum(one["outcome"] == "worse" for one in valid)
        share = stats.wilson(worse, len(valid)) if valid else None
        figures[kind] = {
            "comparisons_count": len(of_kind),
            "outcomes": dict(sorted(Counter(one["outcome"] for one in of_kind).items())),
            "worse_share_of_valid": share.share if share else None,
            "worse_share_low": share.low if share else None,
            "worse_share_high": share.high if share else None,
            "doubled_count": sum(one["doubled"] for one in of_kind),
            "void_pairs_count": sum(one["void_pairs_count"] for one in of_kind),
            "wall_s_median": stats.median([one["wall_s"] for one in of_kind]) if of_kind else None,
            "load_median": stats.median([one["load"] for one in of_kind]) if of_kind else None,
            "measured_difference": {
                test: math.expm1(stats.median([one["tests"][test]["log_ratio"] for one in valid]))
                for test in ("prefill", "decode")
            }
            if valid
            else None,
            "reasons": dict(
                Counter(reason.split(":")[0][:40] for one in of_kind for reason in one["reasons"])
            ),
        }
    return figures


if __name__ == "__main__":
    main()
