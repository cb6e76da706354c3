"""A fleet whose records cover it, locked by DVC itself, without an hour of measuring."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import sample
from sample import SAMPLE

from pipelines import declaration
from pipelines.layout import Layout

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tiny-llama"
OTHER = "other-llama"
_HOLDS = (
    "examples", "corpora", "modelfiles", ".dvc", "dvc.yaml", "params.yaml", ".dvcignore",
    ".gitignore", "pipelines/dvc.yaml",
)  # fmt: skip
_LARGE_BYTES = 100_000
# A second model of the same files, with its own name everywhere.
_OTHER_MODEL = f"""\
  {OTHER}:
    source: path:examples/tiny-llama
    revision: REVISION
    context_tokens: 256
    calibration: calibration
    stable: latest
"""
_OTHER_QUANTS = f"""\
  {OTHER}-Q8_0: {{model: {OTHER}, type: Q8_0}}
"""


def make(root: Path) -> Layout:
    """
    Make a fork with two models, of which everything was measured; no git repository yet.

    Records are those of the embedded model, for the other one with its name in them; the large
    files hold their own names. dvc.lock is what DVC writes of them.
    """
    sample.take(root, *_HOLDS, frozen=True)
    at = Layout(root)
    _declare_other(at)
    probe(at)
    _write_outputs(at)
    lock(at)
    return at


def copy(root: Path, to: Path) -> Path:
    """Copy a fork to be changed; large files, which no test changes, are linked."""

    def one(source: str, target: str) -> None:
        large = Path(source).stat().st_size > _LARGE_BYTES
        (os.link if large else shutil.copy2)(source, target)

    shutil.copytree(root, to, symlinks=True, copy_function=one)
    return to


def _declare_other(at: Layout) -> None:
    text = at.params.read_text()
    revision = declaration.load(at.params).models[MODEL].revision
    other = _OTHER_MODEL.replace("REVISION", revision)
    text = text.replace("\n# One line for each GGUF", f"\n{other}\n# One line for each GGUF")
    for type_ in ("Q8_0", "IQ4_XS"):
        text = re.sub(rf"(?m)^  {MODEL}-{type_}: .*\n", "", text)
    text = text.replace("quants:\n", f"quants:\n{_OTHER_QUANTS}")
    at.params.write_text(text)
    declaration.load(at.params)


def probe(at: Layout) -> None:
    """Do what the probe does at every run, on a machine that is always the same."""
    declaration.write_slices(declaration.load(at.params), at)
    at.machine.write_text('{"schema_version": 1, "hw_id": "0"}')
    if not at.toolchain.exists():
        shutil.copy(Layout(SAMPLE).tools_record(MODEL), at.toolchain)


def _write_outputs(at: Layout) -> None:
    declared = declaration.load(at.params)
    real = Layout(SAMPLE)
    own = list(real.root.glob(f"results/{MODEL}/**/*.json"))
    for model in declared.models:
        for path in own:
            target = at.root / str(path.relative_to(SAMPLE)).replace(MODEL, model)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path == real.tools_record(MODEL):
                shutil.copy(path, target)
            else:
                target.write_text(path.read_text().replace(MODEL, model))
        types = {q.type for q in declared.quants.values() if q.model == model}
        for path in at.root.glob(f"results/{model}/*/*.json"):
            if path.stem not in types:
                path.unlink()
        for path in (at.source(model) / "model.safetensors", at.f16(model), at.imatrix(model)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{path.name} of {model}")
        for path in (at.observed(model), at.compared(model), at.receipt(model)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'{{"model": "{model}"}}')
    for key, quant in declared.quants.items():
        path = at.gguf(quant.model, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(key)
    at.upstream_notices.write_text('{"schema_version": 1, "stage": "check-upstream"}')
    at.report_markdown.write_text("# Report\n")
    at.report_html.write_text("<h1>Report</h1>\n")


def lock(at: Layout) -> None:
    """Write the locks as if every stage had just run, with DVC's own parts."""
    from dvc.repo import Repo  # noqa: PLC0415 - heavy
    from dvc.stage import serialize  # noqa: PLC0415 - the same
    from dvc.utils.serialize import dump_yaml  # noqa: PLC0415 - the same

    if not (at.root / ".git").exists():
        git(at.root, "init", "-q", "-b", "main")
    locks: dict[Path, dict[str, Any]] = {}
    with contextlib.chdir(at.root), Repo() as repo, repo.lock:
        for stage in repo.index.stages:
            stage.save(run_cache=False)
            for out in stage.outs:
                out.commit()
            locks.setdefault(Path(stage.path).with_suffix(".lock"), {}).update(
                serialize.to_lockfile(stage)
            )
    for path, stages in locks.items():
        dump_yaml(str(path), {"schema": "2.0", "stages": stages})


def git(root: Path, *argv: str) -> str:
    """Run git as a person would, with none of this machine's settings."""
    env = os.environ | {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "LC_ALL": "C",
    }
    who = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", *who, *argv], cwd=root, env=env, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(root: Path, message: str = "next") -> str:
    """Commit everything that git does not ignore; return the name of the commit."""
    git(root, "add", "--all")
    git(root, "commit", "-q", "--allow-empty", "-m", message)
    return git(root, "rev-parse", "HEAD")


def edit(path: Path, before: str, after: str) -> None:
    """Replace a text that is there, once."""
    text = path.read_text()
    assert before in text, f"{before!r} is not in {path}"
    path.write_text(text.replace(before, after, 1))


def edit_json(path: Path, **changes: Any) -> None:
    """Replace fields of a JSON file, as an editor would."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")
