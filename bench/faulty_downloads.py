"""
What a fetch does when the Hub, the network or upstream goes wrong.

The figures go to bench/results/fetch-faults.json.

For each kind of fault, `--downloads` fetches of a small model of two shards through the code of the
stage, each in a process as the stage has one, from a server that speaks as the Hub does
(tests/hub). Which file is struck, and where in it, is by chance; half of the downloads of a kind
meet the fault once, and the other half each time, where both mean something. Told of each kind:

    expected     exit code of each form: 0 all is there and right, 3 a person has to decide,
                 6 the bytes are wrong, 75 try again later
    codes        exit codes that were seen
    unexpected   downloads with another exit code than expected, or for another reason
    wrong_files  files under a final name that are not what was committed, by their bytes
    late         downloads that took more than 10 s longer than their deadline
    wall_s_max   the slowest one
    next_runs    of every fifth: it ran once more in the same checkout without the fault
    next_right   and then everything was there and right

Nothing here is a speed: a busy machine gives the same figures but for `wall_s_max`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.fork import ROOT
from bench.overhead import machine_class
from pipelines import atomic, console

sys.path.insert(0, str(ROOT / "tests"))

from fetch_trials import GRACE_S, PATIENT, TRIALS, Outcome, Trial, Trials
from hub import Hub

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

_NEXT_RUN_EVERY: Final = 5


def main() -> None:
    """Download, print, write the record; fail if a promise was not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--downloads", type=int, default=30, help="of each kind")
    parser.add_argument("--at-a-time", type=int, default=6)
    parser.add_argument("--only", action="append", help="one kind; no record is written")
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/fetch-faults.json")
    args = parser.parse_args()
    kinds: dict[str, list[Trial]] = {}
    for trial in TRIALS:
        if args.only is None or trial.kind in args.only:
            kinds.setdefault(trial.kind, []).append(trial)
    figures = measure(kinds, args.downloads, args.at_a_time)
    console.out(json.dumps(figures, indent=2))
    if args.only is None:
        atomic.write_json(args.output, figures)
    require_kept(figures)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Show the module's docstring as it is."""


def measure(kinds: dict[str, list[Trial]], downloads_count: int, at_a_time: int) -> dict[str, Any]:
    """Return the record: `downloads_count` of each kind, spread over its forms."""
    began = time.monotonic()
    machine = machine_class()
    with Hub() as hub, Trials(hub, at_a_time=at_a_time) as trials:
        begun: dict[str, list[tuple[Trial, Future[list[Outcome]]]]] = {kind: [] for kind in kinds}
        # Kinds in turn: those that wait do not wait for one another.
        for number in range(downloads_count):
            for kind, forms in kinds.items():
                form = forms[number % len(forms)]
                outcomes = trials.begin(form, number, again=again(form, number, len(forms)))
                begun[kind].append((form, outcomes))
        told = {
            kind: summary([(form, outcomes.result()) for form, outcomes in downloads])
            for kind, downloads in begun.items()
        }
        assert hub.unexpected == [], hub.unexpected
    counted = ("downloads", "unexpected", "wrong_files", "late", "next_runs", "next_right")
    return {
        "schema_version": 1,
        "machine": machine,
        "took_s": round(time.monotonic() - began),
        "deadline_s": PATIENT.deadline_s,
        **{name: sum(each[name] for each in told.values()) for name in counted},
        "kinds": told,
    }


def again(form: Trial, number: int, forms_count: int) -> bool:
    """Decide whether a next run follows: it costs as much again."""
    return form.may_pass and number // forms_count % _NEXT_RUN_EVERY == 0


def summary(downloads: Sequence[tuple[Trial, Sequence[Outcome]]]) -> dict[str, Any]:
    """Return the figures of one kind, and say what was not as expected."""
    for form, outcomes in downloads:
        for outcome in outcomes:
            right = form.was_met(outcome) if outcome is outcomes[0] else is_right(outcome)
            if not right or outcome.wrong:
                console.error(f"{form}: {outcome}")
    first = [outcomes[0] for _, outcomes in downloads]
    following = [outcomes[1] for _, outcomes in downloads if len(outcomes) > 1]
    codes = Counter(outcome.code for outcome in first)
    return {
        "downloads": len(first),
        "expected": {form.how: form.expected for form, _ in downloads},
        "codes": {str(code): codes[code] for code in sorted(codes)},
        "unexpected": sum(not form.was_met(outcomes[0]) for form, outcomes in downloads),
        "wrong_files": sum(len(outcome.wrong) for outcome in (*first, *following)),
        "late": sum(outcome.late_s > GRACE_S for outcome in (*first, *following)),
        "wall_s_max": round(max(outcome.wall_s for outcome in first), 1),
        "next_runs": len(following),
        "next_right": sum(is_right(outcome) for outcome in following),
    }


def is_right(outcome: Outcome) -> bool:
    """Tell whether everything is there, and right."""
    return not (outcome.code or outcome.wrong or outcome.missing)


def require_kept(figures: dict[str, Any]) -> None:
    """
    Hold the figures against what is promised.

    Raises:
        SystemExit: Something is not kept.
    """
    broken = [
        f"{figures[name]} {name}" for name in ("unexpected", "wrong_files", "late") if figures[name]
    ]
    if figures["next_right"] < figures["next_runs"]:
        broken.append(f"{figures['next_runs'] - figures['next_right']} next runs failed")
    if broken:
        console.error(f"not kept: {', '.join(broken)}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
