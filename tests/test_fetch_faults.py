"""Whatever goes wrong between the Hub and us: the right exit code in time, and no wrong byte."""

from __future__ import annotations

from fetch_trials import GRACE_S, TRIALS, Trials
from hub import Hub


def test_no_fault_of_the_network_or_of_upstream_leaves_a_wrong_file() -> None:
    """One download of each kind through the stage's code, held against what was committed."""
    one_of_each = {trial.kind: trial for trial in TRIALS}.values()
    with Hub() as hub, Trials(hub, at_a_time=6) as trials:
        begun = {trial: trials.begin(trial, 1) for trial in one_of_each}
        found = {trial: outcomes.result()[0] for trial, outcomes in begun.items()}
        assert hub.unexpected == []

    assert [(str(trial), outcome) for trial, outcome in found.items() if outcome.wrong] == []
    assert [(str(t), outcome) for t, outcome in found.items() if not t.was_met(outcome)] == []
    assert [str(trial) for trial, outcome in found.items() if outcome.late_s > GRACE_S] == []
