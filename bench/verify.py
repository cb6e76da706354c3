"""
Planted faults and tiny architectures through all of `verify`: the tables of docs/verify.md.

    python -m bench.verify [faults | architectures | NAME ...]

Each row is written as soon as it is measured; nothing in these tables is typed by hand. A NAME is a
fault or a model. All of it takes some minutes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pipelines import declaration, toolchain

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def _is_wanted(names: list[str], table: str, key: str) -> bool:
    return not names or table in names or key in names


def say(line: str) -> None:
    """Print a row at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(names: list[str]) -> int:
    """Write the tables; return 1 if a fault was not caught or a right conversion did not pass."""
    import architecture_factory  # noqa: PLC0415 - of the tests, found by the path above
    import planted  # noqa: PLC0415
    from verify_factory import converted  # noqa: PLC0415

    tools = toolchain.ensure(toolchain.spec_of(declaration.load(ROOT / "params.yaml")))
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        fixtures = architecture_factory.fixtures(root / "fixtures", tools)
        made: dict[str, tuple[Path, Path]] = {}

        def family(name: str) -> tuple[Path, Path]:
            if name not in made:
                source = architecture_factory.build(name, root / name, fixtures)
                made[name] = source, converted(source, root / f"{name}-gguf", tools)
            return made[name]

        bench = planted.Bench(root=root, tools=tools, family=family)
        order = tuple(fault for _, fault in planted.PLANTED)
        for model in planted.MODELS:
            # What upstream says of a model is asked once, for its own row and for its faults.
            if _is_wanted(names, "architectures", model):
                record = bench.prove(model)
                row = planted.architecture_row(model, planted.tokenizer_of(model), record)
                planted.write_rows(
                    "architectures", planted.ARCHITECTURE_HEAD, {model: row}, planted.MODELS
                )
                say(row)
                wrong += record.outcome == "FAIL"
            for fault in (each for of, each in planted.PLANTED if of == model):
                if _is_wanted(names, "faults", fault):
                    record = bench.prove(model, fault)
                    row = planted.fault_row(model, fault, record)
                    planted.write_rows("faults", planted.FAULT_HEAD, {fault: row}, order)
                    say(row)
                    wrong += record.outcome == "PASS"
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
