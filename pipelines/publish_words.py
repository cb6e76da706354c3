"""What a run that published tells on GitHub: the summary of its job, the body of a pull request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pipelines.publishing_words import shown_size
from pipelines.release_records import STABLE, short
from pipelines.render import escape_markdown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pipelines.errors import FleetError
    from pipelines.propose import Proposed
    from pipelines.publishing import Outcome

# A pull request takes 65,536 characters; the ledger has every move.
_MOST_ROWS: Final = 200
_LEDGER: Final = (
    "What was published, for the ledger in git. The registries know of it already: merging this "
    "changes nothing that is served. The next run adds its lines here."
)


def summary(
    registries: Iterable[str],
    done: Mapping[tuple[str, str], Outcome],
    errors: Mapping[str, FleetError],
    outdated: Mapping[str, FleetError],
    proposed: Proposed | None,
) -> str:
    """
    Say what was published, what was refused and why, and what to do about it.

    Args:
        registries: Their names.
        done: What was done, by model and registry.
        errors: What was not, by what it is about.
        outdated: Models of which the default branch says something else by now.
        proposed: The pull request with the ledger.
    """
    moved = sum(outcome.moved is not None for outcome in done.values())
    names = ", ".join(f"`{name}`" for name in registries)
    counts = f"{moved} moved, {len(done) - moved} unchanged, {len(errors)} not published"
    lines = [f"### Published to {names}: {counts}", ""]
    if done:
        rows = [
            (model, name, f"`{short(outcome.release)}`", _sent(outcome), _moved(outcome))
            for (model, name), outcome in done.items()
        ]
        lines += _table(("model", "registry", "release", "sent", f"`{STABLE}`"), rows)
    for what, error in (*errors.items(), *outdated.items()):
        lines += [f"**{escape_markdown(what)}**", ""]
        lines += [f"- {escape_markdown(line.removeprefix('  - '))}" for line in _lines(error)]
        if error.hint:
            lines.append(f"- next: {escape_markdown(error.hint)}")
        lines.append("")
    if proposed is not None and proposed.url:
        lines += [f"Merge {proposed.url}, so that git knows of it.", ""]
    return "\n".join(lines)


def body(done: Mapping[tuple[str, str], Outcome]) -> str:
    """Describe the pull request that brings the ledger to the default branch."""
    rows = [
        (
            model,
            name,
            f"{outcome.moved.sequence}",
            f"`{short(outcome.moved.previous)}`",
            f"`{short(outcome.moved.release)}`",
            escape_markdown(outcome.moved.who),
            escape_markdown(outcome.moved.why),
        )
        for (model, name), outcome in done.items()
        if outcome.moved
    ]
    lines = [_LEDGER, ""]
    if rows:
        lines += _table(("model", "registry", "move", "from", "to", "who", "why"), rows)
    return "\n".join(lines)


def _lines(error: FleetError) -> list[str]:
    return [line for line in error.message.splitlines() if line.strip()]


def _sent(outcome: Outcome) -> str:
    return shown_size(outcome.uploaded_bytes) if outcome.uploaded_count else "nothing"


def _moved(outcome: Outcome) -> str:
    move = outcome.moved
    if move is None:
        return "as it was"
    return f"`{short(move.previous)}` → `{short(move.release)}` (move {move.sequence})"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows[:_MOST_ROWS]]
    if len(rows) > _MOST_ROWS:
        lines += ["", f"And {len(rows) - _MOST_ROWS} more: the ledger has them all."]
    return [*lines, ""]
