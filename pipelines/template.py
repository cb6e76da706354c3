"""
`fleet template`: which version of the template this fork has, and the next one.

    status   what is newer, what to do for it, what would conflict; changes nothing
    update   merge it as one commit (`pipelines.template_update`), then look at the fleet with it
    migrate  rewrite keys of params.yaml that have another name by now (`pipelines.migrations`)
    tree     make the commits that forks merge (`pipelines.template_releases`)

The code that runs is of the very checkout that an update changes. So nothing is imported after the
files have moved, and what the new version has to say it says itself, in processes of its own.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pipelines import (
    console,
    migrations,
    proc,
    repro,
    template_releases,
    template_tree,
    template_update,
    wording,
)
from pipelines.errors import FleetError, GateError, ParamsError, ToolError
from pipelines.layout import Layout
from pipelines.template_releases import FETCHED, OWN, REMOTE, shown

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from pipelines.template_git import Objects
    from pipelines.template_releases import Base, Release, Version
    from pipelines.template_update import Update

_CHANGES: Final = "CHANGELOG.md"
_TO_DO: Final = "what you have to do"
_LOCAL_SHOWN: Final = 10
_CHILD_WITHIN_S: Final = 120.0
_ANY_CODE: Final = tuple(range(256))
# What an environment is made of: another one needs `make setup`.
_ENVIRONMENT: Final = frozenset({"requirements.lock", "pyproject.toml", "pipelines/bootstrap.py"})


def main(at: Layout, args: argparse.Namespace) -> int:
    """
    Do `fleet template`.

    Returns:
        0; 5 if what would be merged conflicts.

    Raises:
        ParamsError: The repository is not one that can be merged into now; says what to type.
        UpstreamError: The template cannot be read.
        GateError: Files conflict, and nothing was changed.
        MachineError: git is too old, does not commit, or cannot write.
    """
    if args.use == "migrate":
        return migrations.main(at, dry_run=args.dry_run)
    objects = template_releases.find(at.root)
    if args.use == "tree":
        return _tree(objects, args)
    if args.use == "update" and not args.dry_run:
        with repro.alone(at, wait=False):
            if template_update.finish(objects):
                console.warn("an update was stopped while it wrote files: they are written now")
            return _update(objects, args)
    found = _look(objects, args)
    if args.json:
        console.out(json.dumps(found.told(), indent=2))
    else:
        for line in found.lines(will=args.use == "update"):
            console.out(line)
    is_stopped = args.use == "update" and found.update is not None and found.update.conflicts
    return GateError.exit_code if is_stopped else 0


# --- what is newer ----------------------------------------------------------------------------


class Section(NamedTuple):
    """A version of CHANGELOG.md: its name, and what an operator has to do for it."""

    version: str
    to_do: tuple[str, ...]


class Found(NamedTuple):
    """
    What a look at the template found.

    Attributes:
        base: What the fork has of it.
        target: The release that would be taken.
        update: What that would change; None if there is nothing to take.
        sections: Of its CHANGELOG.md, those that are new to this fork, the oldest first.
        branch: That is checked out; None: none is.
    """

    base: Base
    target: Release
    update: Update | None
    sections: tuple[Section, ...]
    branch: str | None

    def told(self) -> dict[str, Any]:
        """Return it as JSON."""
        update = self.update
        return {
            "version": shown(self.base.version),
            "why": self.base.why,
            "to": self.target.name,
            "template_commit": self.target.template,
            "is_current": update is None,
            "changed": list(update.changed) if update else [],
            "local": list(update.local) if update else [],
            "conflicts": [one._asdict() for one in update.conflicts] if update else [],
            "to_do": {one.version: list(one.to_do) for one in self.sections if one.to_do},
        }

    def lines(self, *, will: bool) -> list[str]:
        """Return it as lines for people; `will` if they want it and not only to know."""
        have = f"this fork has {shown(self.base.version)} of the template: {self.base.why}"
        update = self.update
        if update is None:
            return [have, f"{self.target.name} is the newest: nothing to do"]
        changed = wording.counted(len(update.changed), "file")
        lines = [have, f"{self.target.name} changes {changed}, none of them yours"]
        if update.local:
            names = [console.clean(path) for path in update.local]
            more = f" and {len(names) - _LOCAL_SHOWN:,} more" if len(names) > _LOCAL_SHOWN else ""
            lines.append(
                f"the template's files that you have changed: {', '.join(names[:_LOCAL_SHOWN])}"
                f"{more}"
            )
        lines += self.to_do()
        if update.conflicts:
            lines += ["conflicts:", *template_update.conflict_lines(update)]
        elif not will:
            lines.append("no conflict. Next: fleet template update")
        return lines

    def to_do(self) -> list[str]:
        """Return what an operator has to do, as lines."""
        return [
            f"{one.version}: {console.clean(text)}" for one in self.sections for text in one.to_do
        ]


def _place(origin: str | None) -> str:
    """Return where the template was looked for, as it is typed, without a login in it."""
    return shlex.quote(console.clean(template_releases.without_login(origin))) if origin else REMOTE


def _look(objects: Objects, args: argparse.Namespace) -> Found:
    """
    Bring the template's releases, and merge the wanted one as objects alone.

    Raises:
        ParamsError: There is no release, none of the wanted name, or an older one is wanted.
    """
    for line in template_releases.fetch(objects, args.origin):
        console.warn(line)
    known = template_releases.releases(objects)
    if not known:
        raise ParamsError(
            "the template there has no release, which is a tag vX.Y.Z.",
            hint=f"git ls-remote --tags {_place(args.origin)}",
        )
    target = template_releases.release_of(known, args.to) if args.to else known[-1]
    head = objects.head
    base = template_releases.base_of(objects, head, known, target, args.base)
    if target.version < base.version and args.to:
        raise ParamsError(
            f"this fork has {shown(base.version)} of the template; {target.name} is older.",
            hint="Go back by git: `git revert -m 1 MERGE` takes back an update.",
        )
    branch = objects.maybe("symbolic-ref", "--quiet", "HEAD")
    update: Update | None = None
    sections: tuple[Section, ...] = ()
    if target.version > base.version:
        update = template_update.prepare(objects, head, base, target)
        data = objects.file(target.template, _CHANGES) or b""
        sections = changes(data.decode(errors="replace"), base.version, target.version)
    return Found(base, target, update, sections, branch)


def changes(text: str, after: Version, until: Version) -> tuple[Section, ...]:
    """
    Read what an operator has to do from CHANGELOG.md.

    Args:
        text: In the form of Keep a Changelog: `## [1.2.0] - ...`, then `### Headings` with lists.
        after: Version whose section, and those before it, are left out.
        until: Last version.

    Returns:
        The sections between, the oldest first.
    """
    found: list[tuple[Version, Section]] = []
    for part in re.split(r"(?m)^## ", text)[1:]:
        name = re.match(r"\[?v?(\d+\.\d+\.\d+)\]?", part)
        version = template_releases.parse(name[1]) if name else None
        if name is None or version is None or not after < version <= until:
            continue
        to_do: list[str] = []
        for block in re.split(r"(?m)^### ", part)[1:]:
            title, _, body = block.partition("\n")
            if title.strip().lower() == _TO_DO:
                items = re.split(r"(?m)^[-*] ", body)[1:]
                to_do += [" ".join(item.split()) for item in items]
        found.append((version, Section(name[1], tuple(to_do))))
    return tuple(section for _, section in sorted(found))


# --- taking it --------------------------------------------------------------------------------


def _update(objects: Objects, args: argparse.Namespace) -> int:
    """Merge, then let the new version look at the fleet."""
    template_update.require_branch(objects)
    template_update.require_clean(objects)
    found = _look(objects, args)
    update = found.update
    if not args.json:
        for line in found.lines(will=True):
            console.out(line)
    if args.json and (update is None or update.conflicts):
        console.out(json.dumps({**found.told(), "merged": None}, indent=2))
    if update is None:
        return 0
    if update.conflicts and args.leave_conflicts:
        template_update.leave(objects, update)
        console.info("  next: resolve them, git add FILE, git commit; or: git merge --abort")
        return GateError.exit_code
    made = template_update.apply(objects, update)
    if args.json:
        console.out(json.dumps({**found.told(), "merged": made}, indent=2))
    console.info(f"merged: {found.target.name} of the template as {made[:12]}")
    _look_again(objects, update)
    for line in _next(update, made):
        console.info(f"  next: {line}")
    return 0


def _look_again(objects: Objects, update: Update) -> None:
    """Let the code that has just come say whether the declaration fits, and what would run."""
    if _ENVIRONMENT.intersection(update.changed):
        console.info("  other packages are needed: `make setup` first, then `fleet check`")
        return
    console.step("what the new version says of this fleet")
    _child(objects, "check")
    _child(objects, "template", "migrate", "--dry-run")
    _child(objects, "plan", "--base", update.head)


def _child(objects: Objects, *argv: str) -> None:
    """Run a verb of the code that lies in the checkout now, and show what it says."""
    try:
        done = proc.run(
            [sys.executable, "-m", "pipelines", *argv],
            cwd=objects.root,
            log=Layout(objects.root).log("template", "update"),
            ok_codes=_ANY_CODE,
            timeout_s=_CHILD_WITHIN_S,
            env={"PYTHONSAFEPATH": ""},
        )
    except FleetError as error:
        console.warn(f"fleet {' '.join(argv)} was not to be had: {error.message}")
        return
    for line in f"{done.stdout}\n{done.stderr}".splitlines():
        if line.strip():
            console.info(f"  {console.clean(line)}")


def _next(update: Update, made: str) -> Sequence[str]:
    """Return what to type after an update."""
    first = ["make setup"] if _ENVIRONMENT.intersection(update.changed) else []
    return [
        *first,
        "fleet repro   (what is covered stays as it is)",
        "git push   (of a token it needs `workflow`, if workflows have changed)",
        f"back: git reset --keep {update.head[:12]}, or after a push: git revert -m 1 {made[:12]}",
    ]


# --- for who publishes it ---------------------------------------------------------------------


def _tree(objects: Objects, args: argparse.Namespace) -> int:
    """Make branch and tags of the template tree: of this repository's tags, or of those fetched."""
    remote = objects.maybe("config", "--get", f"remote.{REMOTE}.url")
    is_fork = bool(args.origin or remote)
    if is_fork:
        for line in template_releases.fetch(objects, args.origin):
            console.warn(line)
    known = template_releases.releases(objects, FETCHED if is_fork else OWN)
    if args.to:
        wanted = template_releases.release_of(known, args.to).version
        known = tuple(each for each in known if each.version <= wanted)
    if not known:
        raise ParamsError(
            "there is no release: no tag of the form vX.Y.Z.",
            hint="git tag v1.0.0; git push --tags",
        )
    made = template_tree.publish(objects, known, branch=not is_fork, dry_run=args.dry_run)
    if args.json:
        told = {f"v{each.name}": each.template for each in known}
        console.out(json.dumps({"template": told, "made": dict(made)}, indent=2))
        return 0
    for each in known:
        console.out(f"template/v{each.name}  {each.template}")
    if made and not args.dry_run and not is_fork:
        branch = template_tree.BRANCH.removeprefix("refs/heads/")
        console.info(f"  next: git push origin {branch} 'refs/tags/template/*'")
    return 0


def here(at: Layout) -> tuple[str | None, str | None]:
    """
    Return the version of the template that a fork has, and the newest that it knows of.

    Nothing is asked of a server: the second is what the last `fleet template status` saw. Either is
    None where it is not known.

    Args:
        at: The checkout.
    """
    try:
        objects = template_releases.find(at.root)
        version = template_releases.version_of(objects, objects.head)
        newest = template_releases.newest(objects)
    except (FleetError, ToolError):
        return None, None
    return shown(version) if version else None, shown(newest) if newest else None
