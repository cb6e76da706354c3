"""
Every tiny architecture through the real converter and all of `verify`: a table.

    python -m bench.architectures [NAME ...]

One line for each: how each layer ended, the agreement of the outputs, and the seconds it took. The
models are those of tests/architecture_factory.py; the suite itself has time for half of them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from pipelines import declaration, toolchain, verify
from pipelines.errors import FleetError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

_LETTERS = {"PASS": "+", "FAIL": "F", "SKIP": "-"}


def say(line: str) -> None:
    """Print a line of the table at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(names: list[str]) -> int:
    """Print the table; return 1 if a layer failed or a model could not be asked."""
    import architecture_factory  # noqa: PLC0415 - of the tests, found by the path above
    from architecture_factory import before  # noqa: PLC0415
    from verify_factory import converted  # noqa: PLC0415

    tools = toolchain.ensure(toolchain.spec_of(declaration.load(ROOT / "params.yaml")))
    failed = False
    say(f"{'family':16} {'layers':8} {'divergence':>10} {'most':>8} {'top':>8} {'wall_s':>6}")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        fixtures = architecture_factory.fixtures(root / "fixtures", tools)
        for name in names or architecture_factory.NAMES:
            started = time.monotonic()
            try:
                source = architecture_factory.build(name, root / name, fixtures)
                f16 = converted(source, root / f"{name}-gguf", tools)
                subject = before(root / f"{name}-verify", source, f16, tools, logits_tokens=512)
                checks, logits, embeddings = verify.ask(subject)
            except FleetError as error:
                failed = True
                say(f"{name:16} {error}")
                continue
            layers = "".join(_LETTERS[check.outcome] for check in checks)
            notes = [f"{c.layer}: {c.sentence}" for c in checks if c.outcome != "PASS"]
            failed = failed or "F" in layers
            figures = f"{'':10} {'':8} {'':8}"
            if logits is not None:
                figures = (
                    f"{logits.kld_mean_nats:10.2g} {logits.kld_max_nats:8.2g} "
                    f"{logits.same_top:8.2%}"
                )
            if embeddings is not None:
                figures = f"{1 - embeddings.cosine_mean:10.2g} {1 - embeddings.cosine_min:8.2g} "
                figures += f"{'cosine':>8}"
            say(f"{name:16} {layers:8} {figures} {time.monotonic() - started:6.1f}")
            for note in notes:
                say(f"    {note}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
