"""
What Helm makes of Actions Runner Controller's charts with the values of deploy/kubernetes.

    python tests/helm_rendering.py          renders again, after a change of values or of a chart

Helm's engine is 80 s of compiling on 2 cores. So its answer is kept in tests/data/arc/rendered,
with a digest of everything that it was made from: an old answer is known as one without Helm. Where
Helm is built, by the line above or by FLEET_TEST_HELM=1, the tests render again and compare.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checks import installed  # noqa: E402 - also run as a program

ARC: Final = ROOT / "tests/data/arc"
RENDERED: Final = ARC / "rendered"
KUBERNETES: Final = "v1.37.0"
# Name of the rendering: chart, release, namespace, values.
CHARTS: Final = {
    "controller": (
        "gha-runner-scale-set-controller",
        "gguf-fleet-arc",
        "gguf-fleet-arc",
        ROOT / "deploy/kubernetes/controller-values.yaml",
    ),
    "host": (
        "gha-runner-scale-set",
        "gguf-desk",
        "gguf-fleet",
        ROOT / "deploy/kubernetes/host-values.yaml",
    ),
}


def digest(name: str) -> str:
    """Return the sha256 of all that a rendering is made from, the engine's version included."""
    chart, release, namespace, values = CHARTS[name]
    files = [each for each in sorted((ARC / chart).rglob("*")) if each.is_file()]
    engine = [installed.RENDER / each for each in ("main.go", "go.mod", "go.sum")]
    found = hashlib.sha256(f"{release} {namespace} {KUBERNETES}".encode())
    for each in (*files, values, *engine):
        found.update(hashlib.sha256(each.read_bytes()).digest())
    return found.hexdigest()


def kept(name: str) -> tuple[str, str]:
    """Return the digest that a kept rendering names, and the rendering."""
    first, _, text = (RENDERED / f"{name}.yaml").read_text().partition("\n")
    return first.removeprefix("# made from "), text


def program() -> Path | None:
    """Return Helm's engine, if it is built or is to be; None otherwise."""
    if os.environ.get("FLEET_TEST_HELM") or installed.is_built(installed.RENDER):
        return installed.go_module(installed.RENDER)
    return None


def render(helm: Path, name: str, values: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Render a chart with its values, or with others."""
    chart, release, namespace, own = CHARTS[name]
    argv: list[str | Path] = [helm, ARC / chart, release, namespace, KUBERNETES, values or own]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


def main() -> int:
    """Write both renderings."""
    helm = installed.go_module(installed.RENDER)
    RENDERED.mkdir(exist_ok=True)
    for name in CHARTS:
        done = render(helm, name)
        if done.returncode != 0:
            sys.stderr.write(done.stderr)
            return 1
        text = f"# made from {digest(name)}\n{done.stdout}"
        (RENDERED / f"{name}.yaml").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
