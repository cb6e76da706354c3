"""
The template tree under names: what a fork merges by git alone.

Made by whoever publishes a template, to be pushed, or in a fork whose template does not publish it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pipelines.errors import ParamsError
from pipelines.template_git import no_object

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.template_git import Objects
    from pipelines.template_releases import Release

BRANCH: Final = "refs/heads/template"
PUBLISHED: Final = "refs/tags/template/"


def publish(
    objects: Objects, known: Sequence[Release], *, branch: bool, dry_run: bool
) -> Mapping[str, str]:
    """
    Make the tags `template/vX.Y.Z` of this repository, and branch `template`.

    Args:
        objects: The repository.
        known: The releases.
        branch: Whether the branch is wanted: a fork has no use for it.
        dry_run: Only say what would be made.

    Returns:
        What was not there before: commit by name of the reference.

    Raises:
        ParamsError: A name is taken by another commit; nothing was made.
    """
    wanted = {f"{PUBLISHED}v{each.name}": each.template for each in known}
    if branch:
        wanted[BRANCH] = known[-1].template
    made: dict[str, str] = {}
    lines: list[str] = []
    for name, commit in wanted.items():
        there = objects.git.parse(name)
        if there == commit:
            continue
        if there is not None and not (name == BRANCH and objects.has(commit, there)):
            raise ParamsError(
                f"{name} is {there[:12]} here, and the releases make it {commit[:12]}.",
                hint="A tag vX.Y.Z was moved, or is lower than one that was there before: give it "
                "the next higher version. A branch of yours of that name: rename it.",
            )
        made[name] = commit
        lines.append(f"update {name} {commit} {there or no_object(commit)}\n")
    if lines and not dry_run:
        objects.told("update-ref", "--stdin", data="".join(lines).encode())
    return made
