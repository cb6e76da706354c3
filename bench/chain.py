"""
The whole chain over the same llama.cpp commands typed by hand, and the bytes that it writes.

The load test is left out on both sides: its time is declared, not spent.

Bytes are measured on two models. What the fleet writes beside artifacts hardly depends on a
model's size (MLflow's store, DVC's databases and lock, logs, records, compiled Python), so it
weighs much on the embedded model of 7 MB and little on a model of a real size.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.fork import ROOT, checkout, cost_of, run
from pipelines import atomic, console

if TYPE_CHECKING:
    from collections.abc import Iterator

CONVERTER = "convert_hf_to_gguf.py"
REPEATS = 5
DVC_REPRO = [sys.executable, "-m", "dvc", "repro"]
# 154 M parameters, 310 MB in 16 bits: large beside what is fixed, small enough for two cores.
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
         "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}  # fmt: skip
LARGE_QUANTS = ("Q8_0", "Q4_K_M")
LARGE_CHUNKS = 8


def chain(root: Path) -> dict[str, Any]:
    """
    Compare `dvc repro` from scratch with the same tools typed by hand, on the embedded model.

    Returns:
        Walls and CPU in seconds; `ratio` of the walls; `written_bytes` of the whole process tree,
        `artifact_bytes` of what has to be written, and `fixed_bytes`, their difference.
    """
    checkout(root)
    without_load_test(root)
    # The probe once beforehand: a toolchain that is not built yet is set-up, not overhead.
    run([sys.executable, "-m", "pipelines", "machine"], root)
    console.step("dvc repro from scratch (about 1 minute on 2 cores)")
    fleet = cost_of(DVC_REPRO, root)
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
        "bare_written_bytes": sum(cost.written_bytes for cost in bare),
        **written(root, fleet.written_bytes),
    }


def large(root: Path) -> dict[str, Any]:
    """Count what `dvc repro` writes for a model of random weights, 45 times the embedded one."""
    checkout(root)
    without_load_test(root)
    console.step("a model of random weights, 310 MB")
    make_model(root / "examples/large")
    declare_large(root)
    run([sys.executable, "-m", "pipelines", "machine"], root)
    console.step("dvc repro from scratch (about 3 minutes on 2 cores)")
    fleet = cost_of(DVC_REPRO, root)
    return written(root, fleet.written_bytes)


def written(root: Path, written_bytes: int) -> dict[str, Any]:
    """Hold what was written against what had to be."""
    artifacts = artifact_bytes(root)
    return {
        "written_bytes": written_bytes,
        "artifact_bytes": artifacts,
        "fixed_bytes": written_bytes - artifacts,
        "written_over_artifacts": round(written_bytes / artifacts, 3),
    }


def without_load_test(root: Path) -> None:
    """Take the load test, and the release that needs it, out of the fork's graph."""
    from ruamel.yaml import YAML  # noqa: PLC0415 - 30 ms

    graph = YAML(typ="safe").load(root / "dvc.yaml")
    taken = [graph["stages"].pop(name, {"do": {}}) for name in ("load-test", "publish")]
    made = {
        name
        for stage in taken
        for kind in ("outs", "metrics")
        for each in stage["do"].get(kind, [])
        for name in each
    }
    for other in graph["stages"].values():
        deps = other.get("do", other).get("deps", [])
        deps[:] = [dep for dep in deps if dep not in made]
    (root / "dvc.yaml").write_text(json.dumps(graph, indent=2))


def make_model(directory: Path) -> None:
    """Make a model of random weights with the embedded model's tokenizer."""
    code = (
        "import json, sys, torch; from transformers import LlamaConfig, LlamaForCausalLM;"
        "torch.manual_seed(1); config = LlamaConfig.from_pretrained(sys.argv[1]);"
        "config.update(json.loads(sys.argv[3]));"
        "LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[2])"
    )
    tiny = ROOT / "examples/tiny-llama"
    run([sys.executable, "-c", code, str(tiny), str(directory), json.dumps(LARGE)], ROOT)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "LICENSE"):
        shutil.copy(tiny / name, directory / name)


def declare_large(root: Path) -> None:
    """Declare that model alone, with few chunks of text."""
    from ruamel.yaml import YAML  # noqa: PLC0415 - 30 ms

    data = YAML(typ="safe").load(root / "params.yaml")
    revision = run([sys.executable, "-m", "pipelines", "digest", "examples/large"], root).strip()
    data["models"] = {
        "large": {
            "source": "path:examples/large", "revision": revision,
            "context_tokens": 512, "evaluation": "evaluation",
        }
    }  # fmt: skip
    data["quants"] = {f"large-{type_}": {"model": "large", "type": type_} for type_ in LARGE_QUANTS}
    # Only bytes are counted here, so speed is measured as shortly as it goes.
    data["benchmark"].update(prompt_tokens=32, generate_tokens=8, depths=[0])
    data["benchmark"]["quality"]["chunks"] = LARGE_CHUNKS
    (root / "params.yaml").write_text(json.dumps(data, indent=2))


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
