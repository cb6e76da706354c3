"""
The template's releases, as a fork sees them: which there are, and the commits that a fork merges.

A release is a tag `vX.Y.Z` of the template. What a fork merges is not its commit, which holds the
example's params.yaml, dvc.lock and records as well, but the release's commit of the *template
tree*: the same files without those that are the operator's, on top of the commit of the release
before, by the same author, at the same time, with the same words. So its id is the same wherever
it is computed, and a merge of it cannot touch what is the operator's.

Which paths are the operator's, each release says itself (`OPERATOR` in its pipelines/owners.py,
which is read as data and not run): a later release that thinks otherwise changes no earlier commit.

The template's tags are kept below refs/fleet/template/, so that a fork has its own `v1.0.0`.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import console, owners, wording
from pipelines.errors import ParamsError, ToolError, UpstreamError
from pipelines.template_git import Objects, strip

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


# Version as a tag and as pipelines/__init__.py have it; eight digits are a date at most.
_TAG: Final = re.compile(r"v(0|[1-9]\d{0,7})\.(0|[1-9]\d{0,7})\.(0|[1-9]\d{0,7})")
_VERSION: Final = re.compile(r'(?m)^__version__(?:: [^=]*)? = "([^"\n]{1,40})"')
REMOTE: Final = "template"
OWN: Final = "refs/tags/"
FETCHED: Final = "refs/fleet/template/tags/"
# COMMIT/PARENT: what was made of the commit of a release on top of the one before. The number is of
# the way in which that is done.
_MADE: Final = "refs/fleet/template/made/1/"
_VERSION_FILE: Final = "pipelines/__init__.py"
_OWNERS_FILE: Final = "pipelines/owners.py"
# User and password of an address, which git repeats in its errors.
_LOGIN: Final = re.compile(r"//[^/@\s]*@")
_LARGEST_TABLE: Final = 1000
# What ast says of text that is no table; the last two of text that is nested without end.
_UNREADABLE: Final = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)
# All of a template's history, the first time.
_FETCH_WITHIN_S: Final = 600.0

Version = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Release:
    """
    A release of the template.

    Attributes:
        version: As a tag has it, without the v.
        commit: Of its tag, with all of the template's files.
        owned: Paths that it says are the operator's.
        template: Its commit of the template tree.
    """

    version: Version
    commit: str
    owned: tuple[str, ...]
    template: str

    @property
    def name(self) -> str:
        """The version as people write it: 1.2.0."""
        return shown(self.version)


def shown(version: Version) -> str:
    """Write a version as people do: 1.2.0."""
    return ".".join(map(str, version))


def parse(text: str) -> Version | None:
    """Read `v1.2.0` or `1.2.0`; None if it is no release."""
    found = _TAG.fullmatch(text if text.startswith("v") else f"v{text}")
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


def version_of(objects: Objects, rev: str) -> Version | None:
    """Return the version of the template that a commit says it is; None if it says none."""
    data = objects.file(rev, _VERSION_FILE)
    found = _VERSION.search(data.decode(errors="replace")) if data else None
    return parse(found[1]) if found and not found[1].startswith("v") else None


# --- bringing them ----------------------------------------------------------------------------


def origin_of(objects: Objects, origin: str | None) -> str:
    """
    Return where the template is: what was said, else the git remote `template`.

    Raises:
        ParamsError: Nothing was said, and there is no such remote.
    """
    if origin:
        return origin
    if objects.maybe("config", "--get", f"remote.{REMOTE}.url") is None:
        raise ParamsError(
            f"this repository has no git remote `{REMOTE}`: nobody can tell what is newer.",
            hint=f"git remote add {REMOTE} URL-OF-THE-TEMPLATE   (or once: --from URL)",
        )
    return REMOTE


def without_login(text: str) -> str:
    """Return a text in which no address has a login."""
    return _LOGIN.sub("//", text)


def fetch(objects: Objects, origin: str | None) -> list[str]:
    """
    Bring the template's tags and what they hold, and nothing else.

    Args:
        objects: The fork.
        origin: URL, path or remote; None for the remote `template`.

    Returns:
        Sentences about tags that are no longer what they were.

    Raises:
        ParamsError: There is no remote `template`.
        UpstreamError: The template cannot be read.
    """
    place = origin_of(objects, origin)
    before = _tags(objects, FETCHED)
    try:
        objects.told(
            *("fetch", "--quiet", "--prune", "--no-tags", "--no-write-fetch-head"),
            *(
                "--no-auto-maintenance",
                "--no-recurse-submodules",
                "--",
                place,
                f"+{OWN}v*:{FETCHED}v*",
            ),
            within_s=_FETCH_WITHIN_S,
        )
    except ToolError as error:
        raise UpstreamError(
            without_login(
                f"the template cannot be read from {console.clean(place)}: {error.message}"
            ),
            hint="Is it the right place? "
            + ("" if origin else f"git remote set-url {REMOTE} URL, or ")
            + "--from URL|PATH, which may be a clone on this machine.",
        ) from error
    after = _tags(objects, FETCHED)
    return [
        f"the template's v{shown(version)} is "
        + ("gone" if version not in after else f"{after[version][:12]} now")
        + f", it was {commit[:12]}: somebody moved the tag."
        for version, commit in before.items()
        if after.get(version) != commit
    ]


def _tags(objects: Objects, below: str) -> dict[Version, str]:
    """
    Return the commit of each release's tag, by version, in the order of versions.

    A tag of another form is none of a release; one that means no commit neither.
    """
    facts = "%(refname) %(objecttype) %(objectname) %(*objecttype) %(*objectname)"
    told = objects.told("for-each-ref", f"--format={facts}", below).decode(errors="replace")
    found: dict[Version, str] = {}
    for line in told.splitlines():
        # No name has a space in it. An annotated tag says what it is of.
        name, *words = line.split(" ")
        kind, commit = words[2:4] if words[0] == "tag" else words[:2]
        if (version := parse_ref(name, below)) is not None and kind == "commit":
            found[version] = commit
    return dict(sorted(found.items()))


def newest(objects: Objects) -> Version | None:
    """Return the highest version that was fetched; None if none was."""
    return max(_tags(objects, FETCHED), default=None)


def parse_ref(name: str, below: str) -> Version | None:
    """Return the version of a tag by its whole name; None if it is no release."""
    tag = name.removeprefix(below)
    return parse(tag) if name.startswith(below) and tag.startswith("v") else None


# --- the template tree ------------------------------------------------------------------------


def releases(objects: Objects, below: str = FETCHED) -> tuple[Release, ...]:
    """
    Return every release, the oldest first, with its commit of the template tree.

    Args:
        objects: The repository; the commits are stored in it.
        below: Where the tags are: those that were fetched, or the repository's own.
    """
    found: list[Release] = []
    tags = _tags(objects, below)
    objects.read_ahead(tags.values(), _OWNERS_FILE, _VERSION_FILE)
    told = objects.told("for-each-ref", "--format=%(refname) %(objectname)", _MADE).decode()
    made = dict(line.split() for line in told.splitlines())
    new: list[str] = []
    for version, commit in tags.items():
        owned = owned_by(objects, commit)
        parent = found[-1].template if found else None
        name = f"{_MADE}{commit}/{parent or 'first'}"
        if name not in made:
            tree = objects.tree(strip(objects.entries(commit), owned))
            made[name] = objects.commit_like(commit, tree, parent)
            new.append(f"update {name} {made[name]}\n")
        release = Release(version=version, commit=commit, owned=owned, template=made[name])
        found.append(release)
    if new:
        # They are not made again, and git does not forget them.
        objects.told("update-ref", "--stdin", data="".join(new).encode())
    return tuple(found)


def owned_by(objects: Objects, rev: str) -> tuple[str, ...]:
    """Return the operator's paths as a commit of the template has them; ours if it does not say."""
    data = objects.file(rev, _OWNERS_FILE)
    found = None if data is None else _table(data)
    return owners.OPERATOR if found is None else found


def _table(source: bytes) -> tuple[str, ...] | None:
    """Read `OPERATOR = (...)` without running anything; None if there is no such table."""
    try:
        body = ast.parse(source).body
    except _UNREADABLE:
        return None
    for each in body:
        target = each.target if isinstance(each, ast.AnnAssign) else None
        if not isinstance(target, ast.Name) or target.id != "OPERATOR" or each.value is None:  # type: ignore[attr-defined]
            continue
        try:
            value = ast.literal_eval(each.value)  # type: ignore[attr-defined]
        except _UNREADABLE:
            return None
        if isinstance(value, tuple) and len(value) <= _LARGEST_TABLE:
            return tuple(path for path in value if isinstance(path, str) and path.strip("/"))
    return None


# --- where a fork began -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Base:
    """
    The state of the template that a fork has.

    Attributes:
        version: Of it.
        rev: Commit that holds its files.
        why: How that is known, as the end of "this fork has 1.0.0: ".
    """

    version: Version
    rev: str
    why: str


def base_of(
    objects: Objects, head: str, known: Sequence[Release], target: Release, wanted: str | None
) -> Base:
    """
    Find which state of the template a fork has, as exactly as its history tells.

    What counts is the version that its files are of. A merge that was squashed, or taken back, has
    left files of another version than its history would tell.

    Args:
        objects: The fork.
        head: Its commit.
        known: Releases of the template.
        target: Release that is to be taken.
        wanted: Version that somebody says it is; None to find out.

    Raises:
        ParamsError: It cannot be told; says what to type.
    """
    if wanted is not None:
        named = release_of(known, wanted)
        return Base(version=named.version, rev=named.commit, why="you say so")
    version = version_of(objects, head)
    if version is None:
        raise _untold(known, f"{_VERSION_FILE} names no version")
    for rev, why in _candidates(objects, head, target):
        if version_of(objects, rev) == version:
            return Base(version=version, rev=rev, why=why)
    release = next((each for each in known if each.version == version), None)
    if release is None:
        raise _untold(known, f"the template has no release {shown(version)}")
    _require_nearest(objects, head, known, release)
    return Base(version=version, rev=release.commit, why=f"{_VERSION_FILE} says so")


def release_of(known: Sequence[Release], name: str) -> Release:
    """
    Return a release by its name.

    Raises:
        ParamsError: There is none.
    """
    version = parse(name)
    for each in known:
        if each.version == version:
            return each
    raise ParamsError(
        f"the template has no release {wording.quoted(name)}.",
        hint=f"It has {_listed(known)}.",
    )


def _candidates(objects: Objects, head: str, target: Release) -> Iterator[tuple[str, str]]:
    """Yield commits that may be what the fork has of the template, the surest first."""
    for rev in taken(objects, head):
        yield rev, "it was merged before"
    if (shared := objects.maybe("merge-base", head, target.commit)) is not None:
        yield shared, "its history comes from there"
    for root in objects.word("rev-list", "--max-parents=0", head).split():
        if (copy := _same_tree(objects, root, target)) is not None:
            yield copy, "its first commit is a copy of it"


def taken(objects: Objects, head: str) -> list[str]:
    """
    Return the commits of the template tree that a fork has merged, the last one first.

    A commit of the template tree has the template's files and no params.yaml; no commit of a fork
    has that.
    """
    told = objects.told("rev-list", "--merges", "--parents", head).decode().splitlines()
    sides = list(dict.fromkeys(side for line in told for side in line.split()[2:]))
    if not sides:
        return []
    asked = "".join(f"{side}:{name}\n" for side in sides for name in (_OWNERS_FILE, "params.yaml"))
    answers = objects.told("cat-file", "--batch-check", data=asked.encode()).decode().splitlines()
    is_there = [not line.endswith(" missing") for line in answers]
    return [
        side
        for side, template, fork in zip(sides, is_there[::2], is_there[1::2], strict=True)
        if template and not fork
    ]


def _same_tree(objects: Objects, root: str, target: Release) -> str | None:
    """Return the commit of the template's history with exactly the files of a commit."""
    tree = objects.word("rev-parse", f"{root}^{{tree}}")
    told = objects.told("log", "--format=%H %T", target.commit).decode().split("\n")
    return next((line.split()[0] for line in told if line.endswith(f" {tree}")), None)


def _require_nearest(
    objects: Objects, head: str, known: Sequence[Release], release: Release
) -> None:
    """
    See that the files of a fork are nearer to no other release than to that of its version.

    Raises:
        ParamsError: They are: the version is not what it has.
    """
    here = objects.entries(head)
    trees = {each.name: objects.entries(each.template) for each in known}
    # A path that no release has is the fork's own.
    paths = {path for tree in trees.values() for path in tree}
    distances = {
        name: sum(here.get(path) != tree.get(path) for path in paths)
        for name, tree in trees.items()
    }
    nearest = min(distances, key=lambda name: distances[name])
    if distances[nearest] < distances[release.name]:
        raise _untold(
            known,
            f"{_VERSION_FILE} says {release.name}, of which {distances[release.name]} files are "
            f"other ones here, and of {nearest} only {distances[nearest]}",
        )


def _untold(known: Sequence[Release], why: str) -> ParamsError:
    return ParamsError(
        f"nobody can tell which version of the template this fork has: {why}.",
        hint=f"Say it: --base VERSION, one of {_listed(known)}.",
    )


def _listed(known: Sequence[Release]) -> str:
    return wording.listed([each.name for each in known[-10:]]) or "none yet"


# --- the repository -----------------------------------------------------------------------------


def find(root: Path) -> Objects:
    """
    Return the repository of a checkout.

    Raises:
        ParamsError: The fleet is a folder of a larger repository, or a part of its history is not
            here.
        MachineError: This is no repository, or git refuses to read it.
    """
    objects = Objects(root)
    objects.head = objects.git.commit("HEAD")
    prefix, is_shallow = objects.told(
        "rev-parse", "--show-prefix", "--is-shallow-repository"
    ).splitlines()
    if prefix:
        raise ParamsError(
            "this fleet is a folder of a larger repository: the template can be merged only into a "
            "repository of its own.",
            hint="Go to a repository whose top is the folder with params.yaml and dvc.yaml.",
        )
    if is_shallow == b"true":
        raise ParamsError(
            "a part of this repository's history is not here: nobody can tell what of the template "
            "it has.",
            hint=objects.git.deeper(),
        )
    return objects
