"""
No conversion with a fault gets through `verify`, and docs/verify.md says which layers find it.

Each row of the page's tables is made again here, by the whole stage, and has to be the one that is
written there. `python -m bench.verify` writes them, and does the families that take too long here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import planted
import pytest
from gguf_faults import FAULTS
from planted import EMBEDDED_NAME, MODELS, PLANTED, Bench, caught_by, rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.toolchain import Toolchain

pytestmark = pytest.mark.toolchain

# Gemma's and Command R's vocabularies of 250,000 tokens take a minute each.
HERE = (EMBEDDED_NAME, "mixtral", "gpt2", "bert")


@pytest.fixture(scope="session")
def bench(
    request: pytest.FixtureRequest,
    tools: Toolchain,
    family: Callable[[str], tuple[Path, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Bench]:
    """A place to plant faults in; upstream is asked once about each model."""
    bench = Bench(root=tmp_path_factory.mktemp("planted"), tools=tools, family=family)
    names = [item.name for item in request.session.items if item.path == Path(__file__)]
    # The first one is proven at once; meanwhile the others are made.
    needed = [model for model in HERE if any(f"{model}]" in name for name in names)]
    bench.begin(needed[1:])
    try:
        yield bench
    finally:
        bench.close()


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        pytest.param(model, fault, id=f"{fault} in {model}")
        for model, fault in sorted(PLANTED, key=lambda each: MODELS.index(each[0]))
        if model in HERE
    ],
)
def test_a_planted_fault_never_gets_through(model: str, fault: str, bench: Bench) -> None:
    """It fails, in the layers that the page names, and each of them says what it found."""
    record = bench.prove(model, fault)

    assert record.outcome == "FAIL"
    assert planted.fault_row(model, fault, record) == rows("faults")[fault]
    for check in record.checks:
        assert not check.sentence[0].islower()
        assert check.sentence.endswith(".")
        assert check.differing_count > 0 or check.outcome != "FAIL"


@pytest.mark.parametrize("model", HERE)
def test_a_right_conversion_passes_as_the_page_says(model: str, bench: Bench) -> None:
    """The control: without it, a stage that fails everything would catch every fault."""
    record = bench.prove(model)

    row = planted.architecture_row(model, planted.tokenizer_of(model), record)
    assert record.outcome == "PASS", caught_by(record)
    # The figures behind the layers differ from one CPU to the next.
    assert row.split(" | ")[:5] == rows("architectures")[model].split(" | ")[:5]


def test_every_kind_of_fault_and_every_family_stands_on_the_page() -> None:
    """No fault is left out because nothing catches it, no family because it does not pass."""
    faults, architectures = rows("faults"), rows("architectures")

    assert list(faults) == list(FAULTS) == [fault for _, fault in PLANTED]
    assert len(FAULTS) >= 15
    # Where `verify.logits: off` is declared, each of them is caught all the same.
    assert not [row for row in faults.values() if "| nothing |" in row or "| `logits` |" in row]
    assert list(architectures) == list(MODELS)
    assert all("FAIL" not in row for row in architectures.values())
