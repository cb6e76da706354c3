"""`dvc repro`, plain and as `fleet repro` starts it, in a fleet in which nothing changed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.fork import checkout, environment, run
from pipelines import console, declaration
from pipelines.layout import Layout
from pipelines.records import TrackReceipt

MODELS = 20
QUANTS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q2_K")
# Large enough that reading the weights would show among the bytes read, small enough to make.
FAKE_WEIGHTS_BYTES = 4 << 20
REPEATS = 5
# The only stages that may run: they look at the machine, at params.yaml and, if due, at upstream.
ALWAYS = frozenset({"pipelines/dvc.yaml:machine", "pipelines/dvc.yaml:check-upstream"})
_RAN = re.compile(r"^(?:Running stage '(.+?)':|Stage '(.+?)' is cached)", re.MULTILINE)
_SKIPPED = re.compile(r"^Stage '.+?' didn't change, skipping$", re.MULTILINE)
# Both are DVC and print what DVC prints; the second is what `fleet repro` starts.
COMMANDS = {"dvc_repro": "dvc", "quick_dvc_repro": "pipelines.quick_dvc"}


def noop(root: Path) -> dict[str, Any]:
    """
    Time both commands in turn.

    Returns:
        `stages_count` without those that always run; for each command the median wall in seconds,
        all walls, and the most bytes that it and what it ran read: weights would be among them.

    Raises:
        SystemExit: A stage ran, so that it was no no-op.
    """
    checkout(root)
    write_fleet(root)
    console.step(f"a fleet of {MODELS} models x {len(QUANTS)} quants")
    run([sys.executable, "-m", "pipelines", "machine"], root)
    run([sys.executable, "-m", "pipelines", "check-upstream", "--if-due"], root)
    weights = write_outputs(root)
    stages = lock_outputs(root)
    console.step(f"dvc repro on {stages} stages of which none changed")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in COMMANDS}
    for _ in range(REPEATS + 1):
        for name, module in COMMANDS.items():
            found[name].append(one_noop(root, module, stages))
    return {
        "models_count": MODELS,
        "quants_count": MODELS * len(QUANTS),
        "stages_count": stages,
        "lock_bytes": (root / "dvc.lock").stat().st_size,
        "weights_bytes": weights,
        **{name: summary(runs[1:]) for name, runs in found.items()},
    }


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Median and all walls; the most that was read."""
    walls = [run["wall_s"] for run in runs]
    return {
        "wall_s": round(statistics.median(walls), 3),
        "wall_s_all": [round(wall, 3) for wall in walls],
        "read_bytes": int(max(run["read_bytes"] for run in runs)),
    }


def write_fleet(root: Path) -> None:
    """Declare 20 models with 5 quants each, all like the embedded one."""
    text = (root / "params.yaml").read_text()
    block = re.search(r"^models:\n((?:  .*\n|\n)+)", text, re.MULTILINE)
    quants = re.search(r"^quants:\n((?:  .*\n|\n)+)", text, re.MULTILINE)
    assert block
    assert quants
    models = "".join(block[1].replace("tiny-llama:", f"m{i}:", 1) for i in range(MODELS))
    lines = "".join(
        f"  m{i}-{type_}: {{model: m{i}, type: {type_}}}\n"
        for i in range(MODELS)
        for type_ in QUANTS
    )
    text = text.replace(block[1], models).replace(quants[1], lines)
    (root / "params.yaml").write_text(text)
    declaration.load(root / "params.yaml")


def write_outputs(root: Path) -> int:
    """Put a file under every name that the graph writes; returns the bytes of fake weights."""
    from dvc.repo import Repo  # noqa: PLC0415 - heavy

    weights = 0
    with Repo(str(root)) as repo:
        outs = [Path(out.fs_path) for stage in repo.index.stages for out in stage.outs]
    receipts = Layout(root).receipt("any").parent
    for path in outs:
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent == receipts:
            # The probe withdraws one that is not settled, and its stage would run each time.
            path.write_text(receipt(path.stem))
        elif path.suffix in (".json", ".md", ".html"):
            path.write_text(json.dumps({"name": str(path.relative_to(root))}))
        else:
            target = path if path.suffix == ".gguf" else path / "model.bin"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(os.urandom(FAKE_WEIGHTS_BYTES))
            weights += FAKE_WEIGHTS_BYTES
    return weights


def receipt(model: str) -> str:
    """Write what `track` leaves when a store has been told everything."""
    settled = TrackReceipt(model=model, status="tracked", reason="", runs=())
    return settled.model_dump_json()


def lock_outputs(root: Path) -> int:
    """
    Write the locks as if every stage had run; returns how many there are that need not run.

    With DVC's own parts, but once: `dvc commit` rewrites the whole lock for each of 300 stages.
    """
    from dvc.repo import Repo  # noqa: PLC0415 - heavy
    from dvc.stage import serialize  # noqa: PLC0415 - heavy
    from dvc.utils.serialize import dump_yaml  # noqa: PLC0415 - heavy

    locks: dict[Path, dict[str, Any]] = {}
    with contextlib.chdir(root), Repo() as repo, repo.lock:
        for stage in repo.index.stages:
            stage.save(run_cache=False)
            for out in stage.outs:
                out.commit()
            lock = Path(stage.path).with_suffix(".lock")
            locks.setdefault(lock, {}).update(serialize.to_lockfile(stage))
    for path, stages in locks.items():
        dump_yaml(str(path), {"schema": "2.0", "stages": stages})
    return sum(map(len, locks.values())) - len(ALWAYS)


def one_noop(root: Path, module: str, stages: int) -> dict[str, float]:
    """
    Run DVC once, in a process that says how many bytes it and its children read.

    Raises:
        SystemExit: A stage ran, or not all of them were looked at.
    """
    code = (
        f"import runpy, sys; sys.argv = ['dvc', 'repro']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "finally: print(open('/proc/self/io').read())"
    )
    started = time.monotonic()
    done = subprocess.run(  # noqa: S603 - our own argv
        [sys.executable, "-c", code], cwd=root, check=False, capture_output=True, text=True,
        env=environment(),
    )  # fmt: skip
    wall_s = time.monotonic() - started
    require_noop(done.stdout, done.returncode, done.stderr, stages)
    read = re.search(r"^rchar: (\d+)", done.stdout, re.MULTILINE)
    assert read
    return {"wall_s": wall_s, "read_bytes": int(read[1])}


def require_noop(said: str, code: int, errors: str, stages: int) -> None:
    """
    Refuse a figure of a run in which anything was done but what always is.

    Raises:
        SystemExit: DVC failed, a stage ran or came from the run cache, or some were not looked at.
    """
    if code:
        raise SystemExit(f"`dvc repro` ended with exit code {code}: {errors[-2000:]}")
    ran = [name for found in _RAN.findall(said) for name in found if name and name not in ALWAYS]
    skipped = len(_SKIPPED.findall(said))
    if ran or skipped != stages:
        names = ", ".join(ran[:5]) or "none"
        raise SystemExit(
            f"this was no no-op: {len(ran)} stages ran ({names}), and {skipped} of {stages} were "
            "looked at and skipped."
        )
