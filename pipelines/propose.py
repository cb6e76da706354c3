"""
Bring what publishing and rolling back leave in a checkout to the default branch: a pull request.

    results/M/ledger.jsonl    by union of lines: the default branch's, those that wait, the new ones
    results/M/release.json    as it was published
    params.yaml               the default branch's own text, with one `stable:` exchanged

One branch (`fleet/ledger`, `fleet/rollback-M`), one commit, one open pull request, renewed by the
next run as long as nobody has merged it. A protected default branch takes nothing else, and the
person who merges sees who moved what. The branch is only ever moved forward: each commit is a child
of what waits there and of the default branch, so that the pull request never conflicts when it was
just made, and a run that was faster is never undone.

Nothing waits for the merge: the registry knows every move, and the next run writes down again what
was lost on the way here.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import console, declaration, stable_line
from pipelines.errors import RetryLaterError, StoreError
from pipelines.github import commits, pulls
from pipelines.github.client import taken
from pipelines.github.errors import GitHubError, MovedError
from pipelines.ledger import Ledger, LedgerError
from pipelines.mainline import Branch, default_branch, read_blob, read_branch
from pipelines.params import MODEL_KEY
from pipelines.release_records import parse_release, release_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pipelines.github.client import GitHub
    from pipelines.layout import Layout

# What the default branch has of a file, and what waits; None where there is none.
Merge = Callable[[bytes | None, bytes | None], bytes]
_MAX_ROUNDS: Final = 10
_KEY: Final = MODEL_KEY.strip("^$")
_CARRIED: Final = re.compile(rf"results/({_KEY})/(ledger\.jsonl|release\.json)")


@dataclass(frozen=True, kw_only=True)
class Change:
    """
    One file to be proposed.

    Attributes:
        path: Below the repository.
        merge: Makes its content of what the default branch has and what waits.
    """

    path: str
    merge: Merge


@dataclass(frozen=True, kw_only=True)
class Proposed:
    """
    What became of a proposal.

    Attributes:
        url: Of the pull request; None if the default branch has it all.
        number: Of the pull request, the same.
        commit: That was made; None if the branch was right already.
    """

    url: str | None = None
    number: int | None = None
    commit: str | None = None


def propose(
    gh: GitHub, changes: Iterable[Change], *, branch: str, title: str, body: str
) -> Proposed:
    """
    Let one open pull request bring changes to the default branch.

    Args:
        gh: The repository.
        changes: Files; those that the default branch has so already are left out.
        branch: Of the pull request.
        title: Of the pull request and its commit; words of ours.
        body: Of the pull request, Markdown in which words of others are escaped.

    Returns:
        The pull request; without an address if nothing has to be changed.

    Raises:
        GitHubError: GitHub refuses it (`.status`).
        RetryLaterError: GitHub cannot be reached, or others write to the branch all the time.
        LedgerError: The ledger here and that of the default branch tell two stories.
    """
    changes = tuple(changes)
    for _ in range(_MAX_ROUNDS):
        try:
            return _proposed(gh, changes, branch=branch, title=title, body=body)
        except MovedError:
            continue  # a run that was faster: its lines are read, too
    raise RetryLaterError(
        f"{branch} is written to by others all the time: {_MAX_ROUNDS} attempts, each too late.",
        hint="Find out who else writes there, then run the same job again.",
    )


def _proposed(
    gh: GitHub, changes: tuple[Change, ...], *, branch: str, title: str, body: str
) -> Proposed:
    main = read_branch(gh, default_branch(gh))
    if main is None:
        raise GitHubError("the default branch is not there: the repository is empty.")
    waiting = read_branch(gh, branch)
    files = _differing(gh, changes, main, waiting)
    if not files:
        return Proposed()
    commit = None
    wanted = {**main.files, **{path: _blob_sha(data) for path, data in files.items()}}
    if waiting is None or dict(waiting.files) != wanted:
        commit = _commit(gh, files, main, waiting, branch=branch, title=title)
    pull = pulls.find_by_head(gh, branch) if commit is None else None
    if pull is None:
        pull = pulls.upsert_pull(gh, head=branch, base=main.name, title=title, body=body)
    return Proposed(
        url=str(taken(pull, "html_url", str)), number=taken(pull, "number", int), commit=commit
    )


def _commit(  # noqa: PLR0913 - each is one independent fact
    gh: GitHub,
    files: Mapping[str, bytes],
    main: Branch,
    waiting: Branch | None,
    *,
    branch: str,
    title: str,
) -> str:
    """Make a commit of the default branch with these files, and move the branch forward to it."""
    entries = [
        {"path": path, "mode": "100644", "type": "blob", "content": data.decode()}
        for path, data in sorted(files.items())
    ]
    tree = gh.post("git/trees", {"base_tree": main.tree, "tree": entries}, repeatable=True)
    parents = [waiting.commit, main.commit] if waiting else [main.commit]
    made = gh.post(
        "git/commits",
        {"message": title, "tree": taken(tree, "sha", str), "parents": parents},
        repeatable=True,  # made twice, nobody sees the first
    )
    sha = str(taken(made, "sha", str))
    if waiting is None:
        commits.create_branch(gh, branch, sha)
    else:
        commits.move_branch(gh, branch, sha)
    return sha


def _differing(
    gh: GitHub, changes: tuple[Change, ...], main: Branch, waiting: Branch | None
) -> dict[str, bytes]:
    """Return the files that the default branch does not have so, with what waits of others."""
    files: dict[str, bytes] = {}
    own = {change.path for change in changes}
    for change in (*changes, *_carried(main, waiting, own)):
        there = _content(gh, main, change.path)
        data = change.merge(there, _content(gh, waiting, change.path))
        if data != there:
            files[change.path] = data
    return files


def _carried(main: Branch, waiting: Branch | None, own: set[str]) -> Iterable[Change]:
    """Yield what waits of models that the caller says nothing of."""
    for path, sha in (waiting.files if waiting else {}).items():
        found = _CARRIED.fullmatch(path)
        if found and path not in own and main.files.get(path) != sha:
            merge = _union(found[1], b"") if found[2] == "ledger.jsonl" else _newer_release
            yield Change(path=path, merge=merge)


def _content(gh: GitHub, branch: Branch | None, path: str) -> bytes | None:
    sha = branch.files.get(path) if branch else None
    return read_blob(gh, sha) if sha else None


def _blob_sha(data: bytes) -> str:
    """Return git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


# --- what can be proposed ---------------------------------------------------------------------


def ledger_change(at: Layout, model: str) -> Change:
    """Propose the ledger of a model: every line that the checkout, the branch or main has."""
    path = at.ledger(model)
    ours = path.read_bytes() if path.exists() else b""
    return Change(path=path.relative_to(at.root).as_posix(), merge=_union(model, ours))


def release_change(at: Layout, model: str) -> Change:
    """Propose the release of a model as it was published from this checkout."""
    data = at.release(model).read_bytes()
    path = at.release(model).relative_to(at.root).as_posix()
    return Change(path=path, merge=lambda _main, _waiting: data)


def stable_change(at: Layout, model: str, stable: str) -> Change:
    """Propose one `stable:`, in whatever params.yaml the default branch has by then."""

    def merge(main: bytes | None, _waiting: bytes | None) -> bytes:
        if main is None:
            raise StoreError("params.yaml is not on the default branch.")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "params.yaml"
            path.write_bytes(main)
            if model not in declaration.load(path).models:
                raise StoreError(f"{model} is not declared on the default branch any more.")
            stable_line.write(path, model, stable)
            return path.read_bytes()

    return Change(path=at.params.relative_to(at.root).as_posix(), merge=merge)


def _union(model: str, ours: bytes) -> Merge:
    """
    Merge a ledger by its lines, as git would by `merge=union`.

    What waits is nobody's word: if it is no ledger, or tells another story, it is left out.
    """

    def merge(main: bytes | None, waiting: bytes | None) -> bytes:
        try:
            return _joined(model, main or b"", waiting or b"", ours)
        except LedgerError as error:
            if waiting is None:
                raise
            console.warn(f"what waits of {model} was left out of the ledger: {error.message}")
            return _joined(model, main or b"", ours)

    return merge


def _joined(model: str, *texts: bytes) -> bytes:
    """
    Return every line once, in the order in which it is met.

    Raises:
        LedgerError: They are no ledger together.
    """
    lines = dict.fromkeys(line for text in texts for line in text.splitlines(keepends=True))
    data = b"".join(lines)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "ledger.jsonl"
        path.write_bytes(data)
        Ledger.load(path, model)
    return data


def _newer_release(main: bytes | None, waiting: bytes | None) -> bytes:
    """Keep the release of the default branch only if it follows the one that waits."""
    if waiting is None:
        return main or b""
    if main is None:
        return waiting
    try:
        follows = parse_release(main, release_id(main), "main").previous == release_id(waiting)
        parse_release(waiting, release_id(waiting), "what waits")
    except StoreError:
        return main
    return main if follows else waiting
