"""
The figures of docs/compare.md, from what makes them.

    python -m bench.compare_docs            # write them, simulation included (half a minute)
    python -m bench.compare_docs --check    # say whether the ones of the real machine are those of
                                            # bench/results/compare-proof.json

Between its marks that page holds nothing that was typed by hand: the simulation is run here, and
what `make bench-compare` measured is read from its record.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from bench.compare import KINDS, RECORD
from bench.fork import ROOT
from pipelines import atomic, stats_paired
from pipelines.stats_paired import Metric

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.compare_records import Outcome

PAGE: Final = ROOT / "docs/compare.md"
PAIRS: Final = 8
# Relative slowdown of the machine from one process to the next, and the noise of one process.
DRIFT: Final = 0.005
NOISE: Final = 0.01
EFFECTS: Final = {"decode": 0.03, "prefill": 0.05}
TRIALS: Final = 2000
SEED: Final = 20261121
_OUTCOMES: Final[tuple[Outcome, ...]] = ("worse", "undecided", "equal")
# True loss in (decode, prefill), and noise.
ROWS: Final[tuple[tuple[tuple[float, float], float], ...]] = (
    ((0.0, 0.0), 0.01),
    ((0.0, 0.0), 0.02),
    ((0.0, 0.0), 0.05),
    ((0.03, 0.03), 0.01),
    ((0.03, 0.05), 0.01),
    ((0.03, 0.05), 0.05),
    ((0.05, 0.05), 0.01),
    ((0.05, 0.05), 0.02),
    ((0.05, 0.05), 0.05),
    ((0.10, 0.10), 0.05),
)


# --- the simulation ---------------------------------------------------------------------------


def differences(
    draw: random.Random, pairs: int, *, loss: float = 0.0, begin: int = 0, noise: float = NOISE
) -> list[float]:
    """Draw the log-ratios of pairs in alternating order on a machine that drifts all the time."""
    found = []
    for index in range(begin, begin + pairs):
        first, second = (
            -DRIFT * slot + draw.gauss(0, noise) for slot in (2 * index, 2 * index + 1)
        )
        sign = 1 if stats_paired.order_of(index) == "AB" else -1
        found.append(sign * (second - first) + math.log1p(-loss))
    return found


def compare(
    draw: random.Random, *, loss: float | Mapping[str, float], noise: float = NOISE
) -> Outcome:
    """Do what `fleet compare` does: both metrics, Holm, and one doubling if undecided."""
    losses = loss if not isinstance(loss, float) else dict.fromkeys(EFFECTS, loss)
    drawn: dict[str, list[float]] = {name: [] for name in EFFECTS}
    outcome: Outcome = "undecided"
    for begin in (0, PAIRS):
        for name in drawn:
            drawn[name] += differences(draw, PAIRS, loss=losses[name], begin=begin, noise=noise)
        judged = stats_paired.judge(
            [Metric(differences=tuple(drawn[name]), effect=EFFECTS[name]) for name in EFFECTS]
        )
        outcome = stats_paired.worst_of([one.outcome for one in judged])
        if outcome != "undecided":
            break
    return outcome


def row(losses: tuple[float, float], noise: float, trials: int = TRIALS) -> str:
    """Simulate one row of the table; equal arguments give equal rows."""
    draw = random.Random(SEED)  # noqa: S311 - a simulation
    named = dict(zip(EFFECTS, losses, strict=True))
    found = Counter(compare(draw, loss=named, noise=noise) for _ in range(trials))
    counts = [found["worse"], found["undecided"], found["equal"] + found["better"]]
    decode, prefill = (f"{100 * each:g} %" for each in losses)
    loss = decode if decode == prefill else f"{decode}, prefill {prefill}"
    at_limit = ", just what matters" if losses == tuple(EFFECTS.values()) else ""
    shares = (f"{100 * count / trials:.3g} %" for count in counts)
    return f"| {loss}{at_limit} | {100 * noise:g} % | {' | '.join(shares)} |"


def simulated() -> str:
    """Return the whole table."""
    return "\n".join(
        (
            "| true loss | noise of a process | worse | undecided | as good or better |",
            "|---|---|---|---|---|",
            *(row(losses, noise) for losses, noise in ROWS),
        )
    )


# --- the real machine -------------------------------------------------------------------------


def proven(figures: Mapping[str, Any]) -> str:
    """Return table and sentences of a record of `make bench-compare`."""
    same, slower = (figures[kind] for kind in KINDS)
    heads = ("", "comparisons", "INVALID", *_OUTCOMES[:2], "as good or better")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    names = ("the same file", f"stopped for {100 * figures['stopped_share']:.0f} % of its time")
    for name, one in zip(names, (same, slower), strict=True):
        counts = one["outcomes"]
        equal = counts.get("equal", 0) + counts.get("better", 0)
        known = [counts.get(each, 0) for each in ("INVALID", *_OUTCOMES[:2])]
        cells: list[object] = [name, one["comparisons_count"], *known, equal]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    slowed = slower["measured_difference"] or {}
    speeds = " and ".join(f"{-100 * slowed[test]:.1f} % in {test}" for test in slowed)
    void = same["void_pairs_count"] + slower["void_pairs_count"]
    nice = figures["niceness"]
    priority = f"had priority before them (`nice -n {nice}`)" if nice < 0 else "had no priority"
    doubled = same["doubled_count"] + slower["doubled_count"]
    said = (
        f"Worse than itself: {_of_valid(same)}. The slowed one found: {_of_valid(slower)}; it "
        f"measured slower by {speeds or 'nothing valid'}. The machine: "
        f"{figures['machine']['cores_count']} cores, load {same['load_median']:.0f} in the median, "
        f"neighbour included; the comparison {priority}. {void:,} pairs were void and measured "
        f"again; {same['wall_s_median']:.0f} s a comparison in the median, {doubled} of "
        f"{same['comparisons_count'] + slower['comparisons_count']} doubled."
    )
    lines += ["", *textwrap.wrap(said, 150, break_long_words=False, break_on_hyphens=False)]
    return "\n".join(lines)


def _of_valid(one: Mapping[str, Any]) -> str:
    valid = one["comparisons_count"] - one["outcomes"].get("INVALID", 0)
    if not valid:
        return "none was valid"
    low, high = (100 * one[f"worse_share_{end}"] for end in ("low", "high"))
    worse = one["outcomes"].get("worse", 0)
    return f"{worse} of {valid} valid (95 % interval {low:.1f} to {high:.1f} %)"


# --- the page ---------------------------------------------------------------------------------


def placed(page: str, name: str, text: str) -> str:
    """
    Put a text between its marks of a page.

    Raises:
        ValueError: The page has not exactly one pair of these marks.
    """
    begin, end = f"<!-- {name}: made by bench/compare_docs.py -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in after:
        raise ValueError(f"the page needs one {begin} before one {end}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the figures into the page, or compare those of the real machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    before = PAGE.read_text(encoding="utf-8")
    after = placed(before, "proof", proven(json.loads(RECORD.read_text(encoding="utf-8"))))
    if options.check:
        return 0 if after == before else 1
    atomic.write_text(PAGE, placed(after, "simulation", simulated()))
    return 0


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Show the module's docstring as it is."""


if __name__ == "__main__":
    sys.exit(main())
