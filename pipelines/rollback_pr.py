"""
What a rollback tells on GitHub: outputs and summary of its job, and the pull request.

The aliases have moved by then. The pull request makes `stable:` in params.yaml and the ledger agree
on the default branch; that GitHub refuses it takes nothing back, and the error says what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines import console, propose, runner, wording
from pipelines.errors import FleetError
from pipelines.mainline import ROLLBACK_BRANCH
from pipelines.publishing import LATEST
from pipelines.release_records import STABLE, short
from pipelines.render import escape_markdown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.layout import Layout
    from pipelines.moves import By
    from pipelines.propose import Proposed
    from pipelines.publishing import Outcome
    from pipelines.registries import Failures


@dataclass(frozen=True, kw_only=True)
class RolledBack:
    """
    What was done.

    Attributes:
        model: Its key.
        stable: What params.yaml says now: a release, or `latest`.
        target: Release that the aliases mean.
        before: What each alias meant, by registry.
        outcomes: What was done with each, by registry.
        by: Who, and why: a stranger's text.
        undo: Command that takes it back; empty if nothing was changed.
        again: Command that does it again.
    """

    model: str
    stable: str
    target: str
    before: Mapping[str, str | None]
    outcomes: Mapping[str, Outcome]
    by: By
    undo: str
    again: str


def tell(at: Layout, done: RolledBack, failures: Failures, *, pr: bool) -> Proposed | None:
    """
    Open the pull request, if that is wanted, and tell the runner what was done.

    Args:
        at: The checkout.
        done: What was done.
        failures: What went wrong; gets what GitHub refuses.
        pr: Whether to open the pull request.

    Returns:
        The pull request; None if there is none.
    """
    proposed = None
    if pr:
        with failures.of("pull request"):
            proposed = _propose(at, done)
    if proposed is not None and proposed.url:
        console.info(f"  {proposed.url} brings this to the default branch: merge it")
    left = " ".join(dict.fromkeys(id_ for id_ in done.before.values() if id_))
    runner.outputs(
        **{"from": left},
        to=done.target,
        registries=" ".join(done.outcomes),
        pull_request=proposed.url or "" if proposed else "",
    )
    runner.summary(_summary(done, failures, proposed))
    return proposed


def _propose(at: Layout, done: RolledBack) -> Proposed:
    """
    Open the pull request.

    Raises:
        FleetError: GitHub refuses it; the hint says what to do.
    """
    from pipelines.github.client import GitHub  # noqa: PLC0415 - only with --pr

    model = done.model
    try:
        changes = [propose.stable_change(at, model, done.stable)]
        if at.ledger(model).exists():
            changes.append(propose.ledger_change(at, model))
        title = f"Roll back {model} to {short(done.target)}"
        if done.stable == LATEST:
            title = f"End the rollback of {model}"
        return propose.propose(
            GitHub.from_environment(),
            changes,
            branch=ROLLBACK_BRANCH.format(model=model),
            title=title,
            body=_told(done),
        )
    except FleetError as error:
        where = wording.listed(list(done.outcomes)) or "no registry"
        error.message = (
            f"{STABLE} of {model} means {short(done.target)} in {where}, but params.yaml on GitHub "
            f"does not say so yet: {error.message}"
        )
        error.hint = (
            f"{error.hint} Then start this job again; or type it in a clone, commit and push: "
            f"{done.again}"
        ).strip()
        raise


def _told(done: RolledBack) -> str:
    """Describe it as Markdown."""
    stable = f"`stable: {done.stable}` of {done.model}"
    rows = [
        f"| {name} | `{short(done.before[name])}` | `{short(done.target)}` | "
        f"{f'move {outcome.moved.sequence}' if outcome.moved else 'was there already'} |"
        for name, outcome in done.outcomes.items()
    ]
    agree = (
        f"The registries have moved. Merging this makes git agree: {stable} in params.yaml, and "
        "the ledger. Until then nothing is published over it."
    )
    lines = [
        f"{escape_markdown(done.by.who)}: {escape_markdown(done.by.why)}",
        "",
        "| registry | from | to | |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        agree,
    ]
    if done.undo:
        lines += ["", f"To take it back: {escape_markdown(done.undo)}"]
    return "\n".join(lines)


def _summary(done: RolledBack, failures: Failures, proposed: Proposed | None) -> str:
    lines = [f"### {done.model}: `{STABLE}` is {short(done.target)}", "", _told(done), ""]
    for what, error in failures.errors.items():
        lines.append(f"- **{escape_markdown(what)}**: {escape_markdown(error.message)}")
        lines += [f"  - next: {escape_markdown(error.hint)}"] if error.hint else []
    if proposed is not None and proposed.url:
        lines += ["", f"Merge {proposed.url}."]
    return "\n".join(lines)
