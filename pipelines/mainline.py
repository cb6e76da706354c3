"""
What the default branch on GitHub says, for a run that publishes: it may have moved on.

A run publishes what the default branch says, not what its own commit said: a run that is started
again after weeks, one that waited for its approval, or one of another branch finds other records
there and stops. Compared is content, by git's name of each file that decides what is published.

The ledger of the default branch lags: moves get there by a pull request from the branch
`fleet/ledger` (`pipelines.propose`), and until somebody merges it the registry knows of moves that
the checkout does not. A move that the registry tells and that branch, too, is ours: `acknowledge`
writes it down here. Nothing is taken from the branch alone: whoever can push to it could otherwise
have any move made.
"""

from __future__ import annotations

import base64
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import console, hub, moves, runner, wording
from pipelines.errors import GateError, ParamsError, RetryLaterError, StoreError
from pipelines.github import commits
from pipelines.github.client import GitHub, taken
from pipelines.github.errors import GitHubError
from pipelines.ledger import Ledger, LedgerError
from pipelines.release_records import STABLE, parse_release, release_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipelines.layout import Layout
    from pipelines.release_records import Move
    from pipelines.stores.base import Store

LEDGER_BRANCH: Final = "fleet/ledger"
ROLLBACK_BRANCH: Final = "fleet/rollback-{model}"
# Files of a model that publishing itself writes; they say nothing of what is to be published.
_OWN: Final = frozenset({"ledger.jsonl", "release.json", "publish.json"})
_MAX_FILE_BYTES: Final = 16 << 20


class OutdatedError(GateError):
    """The default branch says something else than this checkout."""


# --- one branch -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Branch:
    """
    A branch at one moment.

    Attributes:
        name: Without refs/heads/.
        commit: That it is at.
        tree: Of that commit.
        files: git's name of every file, by path.
    """

    name: str
    commit: str
    tree: str
    files: Mapping[str, str]


def read_branch(gh: GitHub, name: str) -> Branch | None:
    """
    Read which files a branch has; None if there is no such branch.

    Raises:
        GitHubError, RetryLaterError: GitHub does not tell, or not all.
    """
    commit = commits.branch_head(gh, name)
    if commit is None:
        return None
    tree = str(taken(taken(gh.get(f"git/commits/{commit}"), "tree", dict), "sha", str))
    listed = gh.get(f"git/trees/{tree}", recursive=1)
    if listed.get("truncated"):
        raise GitHubError(
            f"{name} has more files than GitHub lists: nobody can tell what it says.",
            hint="Take large trees out of the repository; files of models belong into DVC.",
        )
    files = {
        str(taken(each, "path", str)): str(taken(each, "sha", str))
        for each in taken(listed, "tree", list)
        if each.get("type") == "blob"
    }
    return Branch(name=name, commit=commit, tree=tree, files=files)


def read_blob(gh: GitHub, sha: str) -> bytes:
    """
    Return a file by git's name of it.

    Raises:
        GitHubError, RetryLaterError: GitHub does not give it, or it is larger than any record.
    """
    blob = gh.get(f"git/blobs/{sha}")
    if taken(blob, "size", int) > _MAX_FILE_BYTES:
        raise GitHubError(f"git/blobs/{sha[:12]} is larger than any record: it was not read.")
    try:
        return base64.b64decode(taken(blob, "content", str))
    except ValueError as error:
        raise GitHubError(f"git/blobs/{sha[:12]} is no base64.") from error


def default_branch(gh: GitHub) -> str:
    """
    Return the name of the default branch: the event that started a run tells, else GitHub.

    Raises:
        GitHubError, RetryLaterError: GitHub does not tell.
    """
    repository = runner.event().get("repository")
    told = repository.get("default_branch") if isinstance(repository, dict) else None
    if isinstance(told, str) and told:
        return told
    return str(taken(gh.get(f"/repos/{gh.repository}"), "default_branch", str))


# --- for a run that publishes -----------------------------------------------------------------


@dataclass
class Mainline:
    """The default branch that a run has to keep to, and the ledger that waits beside it."""

    gh: GitHub
    _main: Branch | None = field(default=None, repr=False)
    _waiting: dict[str, Branch | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of_run(cls) -> Mainline | None:
        """
        Return the default branch that a run of Actions has to keep to; None outside Actions.

        Raises:
            ParamsError: The run has no token to ask with.
        """
        if not console.in_actions():
            return None
        if not os.environ.get("GITHUB_TOKEN", "").strip():
            raise ParamsError(
                "GITHUB_TOKEN is not set: nobody can tell whether the default branch still says "
                "what this run would publish. Nothing was published.",
                hint="Give the step the token of its job, `GITHUB_TOKEN: ${{ github.token }}`, "
                "with `contents: read`.",
            )
        return cls(GitHub.from_environment())

    def require_current(self, model: str, at: Layout) -> None:
        """
        See that what decides about a release is on the default branch as it is here.

        Raises:
            OutdatedError: It is not; names files that differ.
            GitHubError, RetryLaterError: GitHub does not tell.
        """
        name = default_branch(self.gh)
        # Asked for again at every model: what a commit holds, only once.
        if self._main is None or commits.branch_head(self.gh, name) != self._main.commit:
            self._main = read_branch(self.gh, name)
        files = self._main.files if self._main else {}
        there = {path: sha for path, sha in files.items() if _decides(path, model)}
        here = {path: hub.git_blob_sha1(at.root / path) for path in _deciding(model, at)}
        differing = sorted(path for path in {*here, *there} if here.get(path) != there.get(path))
        if differing:
            raise OutdatedError(
                f"{model} is left as it is: by now {console.clean(name)} says something else "
                f"than this run in {wording.first_few(differing)}.",
                hint=f"The run of that commit publishes. If there is none, start this workflow on "
                f"{console.clean(name)}.",
            )

    def acknowledge(self, model: str, store: Store, ledger: Ledger) -> None:
        """
        Write down moves of which registry and waiting ledger tell the same; see the module.

        A branch that cannot be read acknowledges nothing: whoever publishes then refuses what he
        has to.
        """
        alias, _ = store.read_alias(model, STABLE)
        _, missing, _ = moves.joined(model, alias, store, ledger)
        if missing and set(missing) <= set(self.waiting(model, store.name)):
            ledger.append(store.name, STABLE, *missing)

    def waiting(self, model: str, registry: str, branch: str = LEDGER_BRANCH) -> tuple[Move, ...]:
        """Return the moves that the ledger of a branch tells of; none if it cannot be read."""
        data = self._waits(f"results/{model}/ledger.jsonl", branch)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "ledger.jsonl"
                path.write_bytes(data or b"")
                return Ledger.load(path, model).moves(registry, STABLE)
        except LedgerError as error:
            console.warn(f"the ledger of {branch} was not read: {error.message}")
            return ()

    def waiting_release(self, model: str) -> bytes | None:
        """Return the release that waits with the ledger; None if there is none to be read."""
        data = self._waits(f"results/{model}/release.json", LEDGER_BRANCH)
        try:
            if data is not None:
                parse_release(data, release_id(data), LEDGER_BRANCH)
        except StoreError as error:
            console.warn(f"the release of {LEDGER_BRANCH} was not read: {error.message}")
            return None
        return data

    def _waits(self, path: str, name: str) -> bytes | None:
        """Return a file of a branch that waits; None if there is none to be read."""
        try:
            if name not in self._waiting:
                self._waiting[name] = read_branch(self.gh, name)
            branch = self._waiting[name]
            sha = branch.files.get(path) if branch else None
            return read_blob(self.gh, sha) if sha else None
        except (GitHubError, RetryLaterError) as error:
            console.warn(f"{name} was not read: {error.message}")
            return None


def _decides(name: str, model: str) -> bool:
    """Tell whether a file of the repository decides about a release of a model."""
    below = f"results/{model}/"
    if name.startswith(below):
        return name.removeprefix(below) not in _OWN
    return name in {"params.yaml", "dvc.lock"} or name.startswith("modelfiles/")


def _deciding(model: str, at: Layout) -> Iterator[str]:
    """Yield the names of those of this checkout."""
    for top in ("params.yaml", "dvc.lock", "modelfiles", f"results/{model}"):
        place = at.root / top
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            name = path.relative_to(at.root).as_posix()
            if path.is_file() and _decides(name, model):
                yield name
