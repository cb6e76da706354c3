"""
Files to a branch as one commit, over the Git data API: no git, no push, no credential on a disk.

A commit that is made so by an App or by a job's token is signed by GitHub. It is the child of the
commit that the caller names, and the branch is only ever moved forward from there: what somebody
pushed in between stays (`MovedError`).

What REST cannot do is compare and set: a branch that is forced back to an ancestor of that commit
within the milliseconds between our look and our move is moved forward again.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any, Final

from pipelines import console
from pipelines.github.client import quoted, ref_path, taken
from pipelines.github.errors import GitHubError, MovedError, UnknownOutcomeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipelines.github.client import GitHub

_FILE: Final = "100644"
# Of the text of one request for a tree; GitHub's own limit is far above, its patience is not.
_TREE_BYTES: Final = 4 << 20
_TREE_ENTRIES: Final = 500
_UNPROCESSABLE: Final = 422
# Of what cannot be repeated blindly; each after a look.
_ATTEMPTS: Final = 4
_CONFLICT: Final = 409
_PLAIN: Final = re.compile(r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*")


def branch_head(gh: GitHub, branch: str) -> str | None:
    """
    Return the commit that a branch is at; None if there is no such branch.

    Raises:
        GitHubError, RetryLaterError: See `client.GitHub.get`.
    """
    found = gh.find(f"git/ref/{ref_path(branch)}")
    if found is None:
        return None
    return str(taken(taken(found, "object", dict), "sha", str))


def create_branch(gh: GitHub, branch: str, sha: str) -> None:
    """
    Make a branch at a commit; that it is there already, at that commit, is fine.

    Raises:
        MovedError: It is there, at another commit.
        GitHubError, RetryLaterError: See `client.GitHub.post`.
    """
    request = {"ref": f"refs/heads/{branch}", "sha": sha}
    for attempt in range(_ATTEMPTS):
        try:
            gh.post("git/refs", request)
        except (GitHubError, UnknownOutcomeError) as error:
            if isinstance(error, GitHubError) and error.status != _UNPROCESSABLE:
                raise
            found = branch_head(gh, branch)
            if found is None and isinstance(error, UnknownOutcomeError) and attempt + 1 < _ATTEMPTS:
                continue  # it was not done
            if found is None:
                raise
            if found != sha:
                raise _moved(branch, found, sha) from error
        return


def move_branch(gh: GitHub, branch: str, sha: str, *, force: bool = False) -> None:
    """
    Move a branch to a commit; forward only, unless `force`.

    Raises:
        MovedError: It is somewhere from which there is no way forward to that commit.
        GitHubError, RetryLaterError: See `client.GitHub.patch`.
    """
    try:
        gh.patch(f"git/refs/{ref_path(branch)}", {"sha": sha, "force": force})
    except GitHubError as error:
        if error.status not in {_CONFLICT, _UNPROCESSABLE}:
            raise
        found = branch_head(gh, branch)
        if found == sha:
            return
        raise _moved(branch, found, sha) from error


def commit_files(
    gh: GitHub, branch: str, files: Mapping[str, bytes | None], message: str, *, parent: str
) -> str:
    """
    Write files to a branch as one commit on top of `parent`.

    Args:
        gh: The repository.
        branch: Its name, without refs/heads/; it has to be there.
        files: Content by path below the repository; None removes the file.
        message: Of the commit.
        parent: Commit that the branch has to be at, and that the files are changed in.

    Returns:
        The new commit, or `parent` if the files are so already and no commit was made.

    Raises:
        MovedError: The branch is elsewhere; nothing was changed.
        GitHubError, RetryLaterError: See `client.GitHub.post`. The branch is as it was.
    """
    _require_at(gh, branch, parent)
    base = str(taken(taken(gh.get(f"git/commits/{parent}"), "tree", dict), "sha", str))
    tree = write_tree(gh, base, files)
    if tree == base:
        return parent
    # A commit made twice is another one by its time, and nobody sees the first.
    commit = gh.post(
        "git/commits", {"message": message, "tree": tree, "parents": [parent]}, repeatable=True
    )
    sha = str(taken(commit, "sha", str))
    _require_at(gh, branch, parent)
    move_branch(gh, branch, sha)
    return sha


def write_tree(gh: GitHub, base: str, files: Mapping[str, bytes | None]) -> str:
    """
    Return a tree with these files in it, and what else `base` has; no branch is changed.

    Args:
        gh: The repository.
        base: Name of a tree.
        files: Content by path below the repository; None removes the file.

    Raises:
        GitHubError, RetryLaterError: See `client.GitHub.post`.
    """
    tree = base
    for part in _parts(_entries(gh, base, files)):
        # Named by their content: made twice, they are one.
        made = gh.post("git/trees", {"base_tree": tree, "tree": part}, repeatable=True)
        tree = str(taken(made, "sha", str))
    return tree


def blob_sha(gh: GitHub, path: str, commit: str) -> str | None:
    """
    Return git's name of a file's content at a commit; None if there is no such file.

    Raises:
        GitHubError, RetryLaterError: See `client.GitHub.get`.
    """
    found = gh.find(f"contents/{_file_path(path)}", ref=commit)
    if not isinstance(found, dict) or found.get("type") != "file":
        return None
    return str(taken(found, "sha", str))


def read_file(gh: GitHub, path: str, commit: str, limit_bytes: int = 1 << 20) -> bytes | None:
    """
    Return a file's content at a commit; None if there is no such file.

    Raises:
        GitHubError: It is larger than `limit_bytes`; otherwise see `client.GitHub.get`.
        RetryLaterError: See `client.GitHub.get`.
    """
    sha = blob_sha(gh, path, commit)
    if sha is None:
        return None
    blob = gh.get(f"git/blobs/{sha}")
    if taken(blob, "size", int) > limit_bytes:
        raise GitHubError(
            f"{console.clean(path)} at {commit[:12]} has {blob['size']} bytes; more than "
            f"{limit_bytes} are not read."
        )
    try:
        return base64.b64decode(taken(blob, "content", str))
    except ValueError as error:
        raise GitHubError(f"git/blobs/{sha} is no base64.") from error


def _require_at(gh: GitHub, branch: str, parent: str) -> None:
    found = branch_head(gh, branch)
    if found != parent:
        raise _moved(branch, found, parent)


def _moved(branch: str, found: str | None, wanted: str) -> MovedError:
    name = console.clean(branch)[:200]
    at = f"is at {found[:12]}" if found else "is gone"
    return MovedError(
        f"The branch {name} {at}, not at {wanted[:12]}: somebody changed it in between. It was "
        "left as it is.",
        branch=branch,
        found=found,
        hint="The run for the newer commit does it; or run this again.",
    )


def _entries(
    gh: GitHub, base: str, files: Mapping[str, bytes | None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the size and the entry of a tree for each file, in the order of their paths."""
    gone = {path for path, content in files.items() if content is None}
    there = _paths(gh, base, gone) if gone else frozenset()
    for path, content in sorted(files.items()):
        _file_path(path)
        entry: dict[str, Any] = {"path": path, "mode": _FILE, "type": "blob"}
        if content is None:
            if path in there:  # GitHub refuses to remove what is not there
                yield len(path), entry | {"sha": None}
            continue
        text = _text(content)
        if text is not None:
            # In the tree itself: one request for hundreds of records.
            yield len(path) + len(content), entry | {"content": text}
            continue
        encoded = base64.b64encode(content).decode()
        blob = gh.post("git/blobs", {"content": encoded, "encoding": "base64"}, repeatable=True)
        yield len(path), entry | {"sha": taken(blob, "sha", str)}


def _parts(entries: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    size_bytes = 0
    for each_bytes, entry in entries:
        if part and (size_bytes + each_bytes > _TREE_BYTES or len(part) >= _TREE_ENTRIES):
            yield part
            part, size_bytes = [], 0
        part.append(entry)
        size_bytes += each_bytes
    if part:
        yield part


def _paths(gh: GitHub, tree: str, wanted: set[str]) -> frozenset[str]:
    """Return those of some paths that are files in a tree."""
    answer = gh.get(f"git/trees/{tree}", recursive=1)
    found = {
        each.get("path")
        for each in taken(answer, "tree", list)
        if isinstance(each, dict) and each.get("type") == "blob"
    }
    if answer.get("truncated"):
        # Too many files for one answer: each is looked for by itself.
        return frozenset(
            path for path in wanted if gh.find(f"contents/{_file_path(path)}", ref=tree)
        )
    return frozenset(wanted & found)


def _text(content: bytes) -> str | None:
    """Return content as text, if it is such as JSON carries it without a change."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text if _PLAIN.fullmatch(text) else None


def _file_path(path: str) -> str:
    """Return the path of a file for an address; one that leads elsewhere is refused."""
    parts = path.split("/")
    if not path or any(part in {"", ".", "..", ".git"} for part in parts):
        raise GitHubError(f"{console.clean(path)[:200]!r} is no path of a file in a repository.")
    return "/".join(quoted(part) for part in parts)
