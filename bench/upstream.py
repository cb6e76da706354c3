"""
A look at a hundred models of a stand-in for the Hub.

The figures go to bench/results/upstream-look.json and, as one line, to stdout.

    nothing_moved   no model has anything newer, and the look before is known
    tenth_moved     every tenth one has other weights that nobody described yet
    not_due         what the stage of DVC costs on most days: it sees that there is nothing to ask

The stand-in is the one of the tests, a process beside; what the Hub itself takes comes on top.
"""

from __future__ import annotations

import json
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.fork import environment
from bench.overhead import machine_class
from pipelines import atomic, check_upstream, console, declaration
from pipelines.layout import Layout

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import sample  # noqa: E402 - beside the tests, which are no package

if TYPE_CHECKING:
    from hub import Hub

MODELS = 100
TURNS = 5
LOOK = [sys.executable, "-m", "pipelines", "check-upstream"]


def main() -> None:
    """Measure, print, write."""
    found = measure()
    atomic.write_json(ROOT / "bench/results/upstream-look.json", found)
    console.out(json.dumps(found))


def measure() -> dict[str, Any]:
    """
    Time the three looks.

    Returns:
        For each the median wall in seconds, all walls, and the requests of one look.

    Raises:
        SystemExit: A look failed, or a model was not in the state that it should be in.
    """
    from hub import Hub  # noqa: PLC0415 - of the tests, found by the path above

    before = machine_class()
    with tempfile.TemporaryDirectory() as folder, Hub() as hub:
        at = Layout(Path(folder))
        _declare(at, hub)
        _look(at, hub, {"current"})
        quiet = [_look(at, hub, {"current"}) for _ in range(TURNS)]
        idle = [_look(at, hub, {"current"}, "--if-due") for _ in range(TURNS)]
        known = at.upstream.read_bytes()
        for name in list(hub.repos)[::10]:
            hub.repos[name].commit({"model.safetensors": _weights(1)}, "Better", at=_long_ago())
        moved = []
        for _ in range(TURNS):
            at.upstream.write_bytes(known)
            moved.append(_look(at, hub, {"current", "waiting"}))
    looks = {"nothing_moved": quiet, "tenth_moved": moved, "not_due": idle}
    return {
        "schema_version": 1,
        "machine": before,
        "models_count": MODELS,
        **{name: _summary(turns) for name, turns in looks.items()},
    }


def _summary(turns: list[tuple[float, int]]) -> dict[str, Any]:
    walls = [wall_s for wall_s, _ in turns]
    return {
        "wall_s": round(statistics.median(walls), 3),
        "wall_s_all": [round(wall_s, 3) for wall_s in walls],
        "requests_count": max(count for _, count in turns),
    }


def _look(at: Layout, hub: Hub, states: set[str], *options: str) -> tuple[float, int]:
    """Look once, as a person types it; return the wall in seconds and the requests."""
    hub.forget()
    started = time.monotonic()
    done = subprocess.run(  # noqa: S603 - our own argv
        [*LOOK, *options], cwd=at.root, check=False, capture_output=True, text=True,
        env=environment() | hub.env(),
    )  # fmt: skip
    wall_s = time.monotonic() - started
    found = {model.state for model in check_upstream.read(at).models}
    if done.returncode or found != states:
        said = done.stdout[:1000] + done.stderr[-2000:]
        raise SystemExit(f"this was no such look, {found} in place of {states}: {said}")
    return wall_s, len(hub.requests)


def _declare(at: Layout, hub: Hub) -> None:
    """Declare models of the stand-in, like the embedded one; the engines are not asked."""
    text = sample.params_text()
    models, quants = (
        re.search(rf"^{name}:\n((?:  .*\n|\n)+)", text, re.MULTILINE)
        for name in ("models", "quants")
    )
    if models is None or quants is None:
        raise SystemExit("params.yaml has another shape than this benchmark expects.")
    lines = []
    for number in range(MODELS):
        repo = hub.create(f"acme/m{number}", files=_files(), at=_long_ago())
        lines.append(
            f"  m{number}: {{source: 'hf:acme/m{number}', revision: {repo.head}, "
            "context_tokens: 512}\n"
        )
    own = "".join(f"  m{n}-Q8_0: {{model: m{n}, type: Q8_0}}\n" for n in range(MODELS))
    text = text.replace(models[1], "".join(lines)).replace(quants[1], own)
    at.params.write_text(f"{text}\ncheck_upstream: {{engines: false}}\n")
    declaration.load(at.params)


def _files() -> dict[str, bytes]:
    example = ROOT / "examples/tiny-llama"
    names = ("config.json", "tokenizer.model", "tokenizer_config.json", "README.md")
    return {
        **{name: (example / name).read_bytes() for name in names},
        "model.safetensors": _weights(0),
    }


def _weights(value: int) -> bytes:
    header = {"model.norm.weight": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + bytes([value] * 4)


def _long_ago() -> datetime:
    return datetime.now(UTC) - timedelta(days=30)


if __name__ == "__main__":
    main()
