"""What `act` is given of a workflow, and what is refused."""

from __future__ import annotations

import lowering
import pytest

WORKFLOW = """\
name: x # a comment
on: push
cache-mode: none
concurrency: {group: a, queue: max}
jobs:
  one:
    environment: {name: bot, deployment: false}
    concurrency: {group: b, queue: max, cancel-in-progress: false}
    permissions: {contents: read, artifact-metadata: write}
    strategy: {matrix: {a: [1, 2]}, max-parallel: 4}
    steps:
      - uses: $/actions/plan
      - run: echo "$X"
"""


def test_what_act_does_not_know_is_taken_out_and_nothing_else() -> None:
    """Queue, cache, deployment, a new right; an action of this repository is found by its path."""
    text = lowering.lowered(WORKFLOW)

    for gone in ("queue", "cache-mode", "deployment", "artifact-metadata", "$/"):
        assert gone not in text
    for kept in ("group: a", "group: b", "cancel-in-progress: false", "name: bot",
                 "contents: read", 'run: echo "$X"', "uses: ./actions/plan"):  # fmt: skip
        assert kept in text


def test_legs_run_one_after_the_other() -> None:
    """Otherwise act ends by a fault of its own, once in 70 runs of jobs side by side."""
    assert "max-parallel: 1" in lowering.lowered(WORKFLOW)


@pytest.mark.parametrize("key", ["background: true", "wait: x", "parallel: []"])
def test_steps_beside_one_another_are_refused(key: str) -> None:
    """Left out, they would run in turns, and a test of them would mean nothing."""
    with pytest.raises(ValueError, match="beside one another"):
        lowering.lowered(WORKFLOW + f"      - {key}\n")
