"""
What the fleet costs over the same llama.cpp commands typed by hand -> bench/results/overhead.json.

Everything is measured in one run on one machine, side by side:

    chain   wall of `dvc repro` of the embedded model's whole chain over the commands that its
            stages ran, replayed from their logs in the same order with the same arguments and
            threads; bytes that the whole process tree wrote over the bytes of the artifacts
    large   the same bytes for a model of 310 MB: what does not grow with a model weighs less there
    noop    `dvc repro` of a synthetic fleet of 20 models x 5 quants in which nothing changed, plain
            and as `fleet repro` starts it, and the bytes that it read. It fails if a stage ran.

`written_bytes` are blocks that got dirty in memory (rusage), so a page that is written, flushed and
written again counts twice. `artifact_bytes` are the files that have to be written: the verified
copy of the source, 16-bit GGUF, quants, importance matrix, and the 16-bit model's logits.
`fixed_bytes` is the rest. Ratios are what counts: single times depend on the machine, which is
stated beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import chain, noop
from bench.fork import ROOT
from pipelines import atomic, console, machine

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "chain": chain.chain,
    "large": chain.large,
    "noop": noop.noop,
}


def main() -> None:
    """Measure, print the figures, write the record if all of them are of this run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--only", choices=PARTS, help="measure one part and write no record")
    only = parser.parse_args().only
    if only is None:
        require_quiet()
    (ROOT / "work").mkdir(exist_ok=True)
    figures: dict[str, Any] = {"schema_version": 2, "machine": machine_class()}
    with tempfile.TemporaryDirectory(prefix="fleet-bench-", dir=ROOT / "work") as scratch:
        # DVC's databases, which are in a directory of the system and would stay there.
        os.environ["DVC_SITE_CACHE_DIR"] = str(Path(scratch) / "dvc")
        for name, measure in PARTS.items():
            if only in {None, name}:
                figures[name] = measure(Path(scratch) / name)
    console.out(json.dumps(figures, indent=2))
    if only is None:
        atomic.write_json(ROOT / "bench/results/overhead.json", figures)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Show the module's docstring as it is."""


def require_quiet() -> None:
    """
    Make no record beside other work: a ratio of 1.3 was one of 0.4.

    The tools by hand spin at barriers where ours sleep.

    Raises:
        SystemExit: The machine is busy.
    """
    if os.getloadavg()[0] > (os.cpu_count() or 1):
        raise SystemExit("this machine is busy; a record of it would be wrong. Try again later.")


def machine_class() -> dict[str, Any]:
    """Tell what the figures were measured on, without a name of it."""
    facts = machine.probe()
    return {
        "hw_id": facts["hw_id"],
        "cpu": facts["cpu"]["model"],
        "cores_count": facts["cpu"]["cores_count"],
        "load_before": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    main()
