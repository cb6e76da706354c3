"""
What the fleet costs over the same llama.cpp commands typed by hand -> results/overhead.json.

Everything is measured in one run on one machine, side by side, on the embedded model:

    wall        `dvc repro` of the whole chain over the commands that its stages ran, replayed from
                their logs in the same order with the same arguments and threads
    bytes       blocks written by the whole process tree (rusage) over the bytes of the artifacts
    no-op       `dvc repro` of a synthetic fleet of 20 models x 5 quants in which nothing changed,
                and the bytes that it read

Ratios are what counts: single times depend on the machine, which is stated beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import atomic, console, declaration, machine
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
MODELS = 20
QUANTS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q2_K")
# Large enough that reading the weights would show among the bytes read, small enough to make.
FAKE_WEIGHTS_BYTES = 4 << 20
BLOCK_BYTES = 512
CONVERTER = "convert_hf_to_gguf.py"
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one command cost, its children included."""

    wall_s: float
    cpu_s: float
    written_bytes: int


def main() -> None:
    """Measure, print one line for each figure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument(
        "--only", choices=("chain", "noop"), help="measure one part, the chain writes the record"
    )
    only = parser.parse_args().only
    (ROOT / "work").mkdir(exist_ok=True)
    figures: dict[str, Any] = {"schema_version": 1, "machine": machine_class()}
    with tempfile.TemporaryDirectory(prefix="fleet-bench-", dir=ROOT / "work") as scratch:
        if only != "noop":
            figures["chain"] = chain(Path(scratch) / "chain")
        if only != "chain":
            figures["noop"] = noop(Path(scratch) / "noop")
    console.out(json.dumps(figures, indent=2))
    if only != "noop":
        atomic.write_json(ROOT / "results/overhead.json", figures)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Show the module's docstring as it is."""


def machine_class() -> dict[str, Any]:
    """Tell what the figures were measured on, without a name of it."""
    facts = machine.probe()
    return {
        "hw_id": facts["hw_id"],
        "cpu": facts["cpu"]["model"],
        "cores_count": facts["cpu"]["cores_count"],
        "load_before": round(os.getloadavg()[0], 2),
    }


def cost_of(argv: list[str], cwd: Path) -> Cost:
    """Run a command and account for it and everything below it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(  # noqa: S603 - our own argv
        argv, cwd=cwd, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    wall_s = time.monotonic() - started
    if done.returncode:
        sys.stderr.write(done.stdout[-3000:] + done.stderr[-3000:])
        raise SystemExit(f"{shlex.join(argv)} ended with exit code {done.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(
        wall_s=wall_s,
        cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        written_bytes=(after.ru_oublock - before.ru_oublock) * BLOCK_BYTES,
    )


def checkout(root: Path) -> Path:
    """Make a fork without a cache."""
    hidden = shutil.ignore_patterns("work", "cache", "tmp", "__pycache__")
    for name in ("pipelines", "examples", "corpora", ".dvc"):
        shutil.copytree(ROOT / name, root / name, ignore=hidden)
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    git = shutil.which("git") or "git"
    subprocess.run([git, "init", "-q"], cwd=root, check=True)  # noqa: S603 - constant argv
    return root


# --- the chain --------------------------------------------------------------------------------


def chain(root: Path) -> dict[str, Any]:
    """Compare `dvc repro` from scratch with the same tools typed by hand."""
    checkout(root)
    # The probe once beforehand: a toolchain that is not built yet is set-up, not overhead.
    cost_of([sys.executable, "-m", "pipelines", "machine"], root)
    console.step("dvc repro from scratch (about 3 minutes on 2 cores)")
    fleet = cost_of([sys.executable, "-m", "dvc", "repro"], root)
    artifacts = artifact_bytes(root)
    commands = replay(root)
    console.step(f"the same {len(commands)} commands by hand")
    bare = [cost_of([*argv], cwd) for cwd, argv in commands]
    stages = len(re.findall(r"^  \S+@?\S*:$", (root / "dvc.lock").read_text(), re.MULTILINE))
    start_s = python_start_s(root)
    bare_s = sum(cost.wall_s for cost in bare)
    return {
        "dvc_repro_wall_s": round(fleet.wall_s, 2),
        "bare_wall_s": round(bare_s, 2),
        "ratio": round(fleet.wall_s / bare_s, 3),
        "stages_count": stages,
        "python_start_s_each": round(start_s, 3),
        "ratio_without_python_start": round((fleet.wall_s - stages * start_s) / bare_s, 3),
        "dvc_repro_cpu_s": round(fleet.cpu_s, 2),
        "bare_cpu_s": round(sum(cost.cpu_s for cost in bare), 2),
        "written_bytes": fleet.written_bytes,
        "bare_written_bytes": sum(cost.written_bytes for cost in bare),
        "artifact_bytes": artifacts,
        "written_over_artifacts": round(fleet.written_bytes / artifacts, 3),
    }


def artifact_bytes(root: Path) -> int:
    """Bytes of everything that has to be written: sources, GGUFs, imatrix, reference logits."""
    wanted = [*(root / "work").rglob("*.gguf"), *(root / "work").glob("*/source/*")]
    wanted += [path for path in (root / "work/scratch").rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in wanted if ".part" not in path.name)


def replay(root: Path) -> list[tuple[Path, list[str]]]:
    """
    Commands of llama.cpp that the stages ran, in order, with the folders they ran in.

    They write to the temporary names that the stages gave them, so that nothing of DVC's is
    overwritten.
    """
    logs = sorted((root / "work/logs").glob("*.log"), key=lambda path: path.stat().st_mtime_ns)
    found: list[tuple[Path, list[str]]] = []
    for log in logs:
        for folder, words in logged(log.read_text(errors="replace")):
            argv = by_hand(words)
            if argv:
                found.append((root / folder, argv))
    parts = {word for _, argv in found for word in argv if atomic.PART_SUFFIX in word}
    for cwd, argv in found:
        for index, word in enumerate(argv):
            if word in parts:
                (cwd / word).parent.mkdir(parents=True, exist_ok=True)
            # Logits of the 16-bit model are removed after the run: read those of the replay.
            part = str(atomic.part_name(Path(word))) if word.endswith(".kld") else ""
            argv[index] = part if part in parts and not (cwd / word).exists() else word
    return found


def logged(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, argv) of each command in a log; a quoted argument may hold line ends."""
    lines = iter(text.splitlines(keepends=True))
    for line in lines:
        if not line.startswith("+ "):
            continue
        command = line[2:]
        while (words := unquoted(command)) is None:
            command += next(lines)
        yield (words[1], words[3:]) if words[0] == "cd" else ("", words)


def unquoted(command: str) -> list[str] | None:
    """Split a command into words; None if a quotation goes on in the next line."""
    try:
        return shlex.split(command)
    except ValueError:
        return None


def by_hand(words: list[str]) -> list[str]:
    """Return what a person would type in place of a logged command; nothing if it is not a tool."""
    names = [Path(word).name for word in words]
    if CONVERTER in names:
        # We call it through a launcher and under a name of its own, with metadata of ours.
        script = names.index(CONVERTER)
        scratch, options = Path(words[script + 1]), words[script + 2 : words.index("--metadata")]
        source = scratch.parents[3] / scratch.name / "source"
        return [sys.executable, words[script], str(source), *options]
    tools = [i for i, name in enumerate(names) if re.fullmatch(r"llama-[a-z-]+", name)]
    return words[tools[0] :] if tools and "pipelines.mlflow_runs" not in words else []


def python_start_s(root: Path) -> float:
    """Median wall of a stage's interpreter that imports what every stage does and ends."""
    code = "from pipelines import declaration, records, toolchain; declaration.load('params.yaml')"
    code = code.replace("'params.yaml'", "__import__('pathlib').Path('params.yaml')")
    return statistics.median(
        cost_of([sys.executable, "-c", code], root).wall_s for _ in range(REPEATS)
    )


# --- the no-op --------------------------------------------------------------------------------


def noop(root: Path) -> dict[str, Any]:
    """Time `dvc repro` in a fleet of 20 x 5 in which nothing changed."""
    checkout(root)
    write_fleet(root)
    console.step(f"a fleet of {MODELS} models x {len(QUANTS)} quants (about 2 minutes)")
    cost_of([sys.executable, "-m", "pipelines", "machine"], root)
    weights = write_outputs(root)
    lock_outputs(root)
    runs = [one_noop(root) for _ in range(REPEATS + 1)][1:]
    return {
        "models_count": MODELS,
        "quants_count": MODELS * len(QUANTS),
        "weights_bytes": weights,
        "wall_s": round(statistics.median(run["wall_s"] for run in runs), 3),
        "wall_s_all": [round(run["wall_s"], 3) for run in runs],
        "read_bytes": max(run["read_bytes"] for run in runs),
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
    for path in outs:
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".json", ".md", ".html"):
            path.write_text(json.dumps({"name": str(path.relative_to(root))}))
            continue
        target = path if path.suffix == ".gguf" else path / "model.bin"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(os.urandom(FAKE_WEIGHTS_BYTES))
        weights += FAKE_WEIGHTS_BYTES
    assert Layout(root).machine.exists()
    return weights


def lock_outputs(root: Path) -> None:
    """
    Write the locks as if every stage had run.

    With DVC's own parts, but once: `dvc commit` rewrites the whole lock for each of 300 stages.
    """
    from dvc.repo import Repo  # noqa: PLC0415 - heavy
    from dvc.stage import serialize  # noqa: PLC0415 - heavy
    from dvc.utils.serialize import dump_yaml  # noqa: PLC0415 - heavy

    locks: dict[Path, dict[str, Any]] = {}
    with contextlib.chdir(root), Repo() as repo, repo.lock:
        for stage in repo.index.stages:
            stage.save()
            for out in stage.outs:
                out.commit()
            lock = Path(stage.path).with_suffix(".lock")
            locks.setdefault(lock, {}).update(serialize.to_lockfile(stage))
    for path, stages in locks.items():
        dump_yaml(str(path), {"schema": "2.0", "stages": stages})


def one_noop(root: Path) -> dict[str, float]:
    """Run `dvc repro` once, in a process that says how many bytes it read."""
    code = (
        "import sys; from dvc.cli import main; code = main(['repro', '--quiet']);"
        "print(open('/proc/self/io').read()); sys.exit(code)"
    )
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    started = time.monotonic()
    done = subprocess.run(  # noqa: S603 - our own argv
        [sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    wall_s = time.monotonic() - started
    read = re.search(r"^rchar: (\d+)", done.stdout, re.MULTILINE)
    assert read
    return {"wall_s": wall_s, "read_bytes": int(read[1])}


if __name__ == "__main__":
    main()
