"""
`fleet doctor --security`: which level of docs/security.md ("Levels") a repository has reached.

It is made of the lines about GitHub and of nothing else, so a level is claimed only for what was
seen: a setting that could not be looked at is missing. Level 3 is claimed for nobody: what it adds
is on the machines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pipelines import wording
from pipelines.doctor_lines import Line, fail, ok, warn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pipelines.layout import Layout

# Names of lines that have to be well. Those with a blank stand for all that begin so.
_FIRST: Final = ("fork-approval", "workflow-token")
_SECOND: Final = (
    *_FIRST,
    "actions",
    "default-branch",
    "code-owners",
    "secrets",
    "environment ",
    "app",
)
_LEVELS: Final = (
    "nothing of GitHub reaches a machine",
    "enough for a private repository: who may push may do to the machine what its user may",
    "one registration for each job, environments with reviewers, code owners, an App",
)
# Of runners that stay registered after a job.
_REGISTRATION: Final = "registration"
_MACHINE: Final = "A host with `runs_on` in params.yaml, and its runner: deploy/runner/README.md."
_BY_HAND: Final = (
    "seen by no call: workflow execution protections (Settings > Actions), the hooks of the "
    "machine (there: fleet runner-health probe), and level 3: egress, caches, attestations that "
    "are required where models are served"
)


def lines(at: Layout, found: Sequence[Line]) -> list[Line]:  # noqa: ARG001 - as of every area
    """
    Say which level is reached, and what the next one needs.

    Args:
        at: The checkout.
        found: Every line about GitHub.
    """
    mine = [each for each in found if each.area == "github"]
    if not any(each.name == "repository" and each.state == "ok" for each in mine):
        text = "cannot be told: nobody could ask GitHub"
        return [warn("security", "level", text, "export GITHUB_TOKEN=$(gh auth token)")]
    if any(each.name == "runners" and each.state != "ok" for each in mine):
        text = "cannot be told: whether GitHub reaches a machine was not seen"
        return [warn("security", "level", text, "The line runners above says how it is seen.")]
    return [*_told(mine), ok("security", "by-hand", _BY_HAND)]


def _told(mine: Sequence[Line]) -> list[Line]:
    """Say the level, and what the next one misses."""
    first, second = _missing(mine, _FIRST), _missing(mine, _SECOND)
    kept = {each.state for each in mine if each.name == _REGISTRATION}
    # Well: it is private, which is enough for level 1.
    first += [_REGISTRATION] if kept - {"ok"} else []
    second += [_REGISTRATION] if kept else []
    reached = kept or any(each.name.startswith("runner ") and each.state != "fail" for each in mine)
    if not reached:
        steps = f"{_MACHINE}\n{_fix(first)}"
        needs = wording.listed(["a machine", *first])
        # One that is declared may come back while nobody looks.
        absent = [each.name for each in mine if each.name.startswith("runner ")]
        what = f"GitHub knows no {wording.listed(absent)} now" if absent else _LEVELS[0]
        return [
            ok("security", "level", f"0 of 3: {what}"),
            warn("security", "level 1", f"needs {needs}", steps),
        ]
    if first:
        needs = wording.listed(first)
        text = f"none, though a job of GitHub reaches a machine: level 1 needs {needs}"
        return [fail("security", "level", text, _fix(first))]
    if second:
        return [
            ok("security", "level", f"1 of 3: {_LEVELS[1]}"),
            warn("security", "level 2", f"needs {wording.listed(second)}", _fix(second)),
        ]
    return [ok("security", "level", f"2 of 3: {_LEVELS[2]}")]


def _missing(found: Iterable[Line], wanted: Iterable[str]) -> list[str]:
    """Return the names of lines that are wanted and not well, or not there."""
    by_name: dict[str, bool] = {}
    for each in found:
        by_name[each.name] = by_name.get(each.name, True) and each.state == "ok"
    names: list[str] = []
    for one in wanted:
        if one.endswith(" "):
            names += [name for name, well in by_name.items() if name.startswith(one) and not well]
        elif not by_name.get(one, False):
            names.append(one)
    return names


def _fix(missing: Sequence[str]) -> str:
    steps: list[str] = []
    if missing:
        steps.append(f"The fix of each is above: {wording.listed(list(missing))}.")
    if _REGISTRATION in missing:
        steps.append("One registration for each job: deploy/runner/README.md, 4b.")
    return "\n".join(steps)
