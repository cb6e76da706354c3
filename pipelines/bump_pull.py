"""
A bump on GitHub: its branch with one commit on top of the default branch, its one pull request.

What there is decides, nothing is remembered elsewhere: a second run changes nothing.

    pull request closed without a merge    that change is not wanted; it is not proposed again
    branch with a commit of somebody else  is left alone, and said
    branch that pins what is proposed      stays as it is, records that were adopted on it too;
                                           without records it begins anew if it is in conflict
    branch that pins something else        becomes one fresh commit on top of the default branch

A branch is never forced over what somebody pushed in between, though REST cannot compare and set:
it is first moved forward, to a commit that joins what was seen there and the default branch. Who
pushed meanwhile makes that fail; who pushes after it is refused by git until he has looked.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from pipelines import bump_change, console, mainline, pin_lines
from pipelines.errors import FleetError, ParamsError, RetryLaterError
from pipelines.github import commits, identity, pulls
from pipelines.github.client import quoted, ref_path, taken
from pipelines.github.errors import GitHubError, MovedError, UnknownOutcomeError
from pipelines.render import escape_markdown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pipelines.bump_change import Bump, Marker
    from pipelines.github.client import GitHub
    from pipelines.pin_lines import Place, Value

PARAMS: Final = "params.yaml"
_MAX_ROUNDS: Final = 5
_FORBIDDEN: Final = 403
# For what is put into a body later, beside what people wrote.
_SLACK: Final = 100
# Around what is said above a body that is not rendered anew.
_ABOVE: Final = ("<!-- fleet:above -->", "<!-- fleet:above-end -->")

# opened      there is a pull request now
# renewed     its branch or its words were changed
# unchanged   it is as it has to be
# pinned      the default branch pins it already
# ignored     somebody closed it
# left        somebody else committed on the branch
# elsewhere   the default branch is not what was looked at
# withdrawn   it was closed: what it proposed is out of date
# doubted     it stays open, and says that somebody has to look first
State = Literal[
    "opened", "renewed", "unchanged", "pinned", "ignored", "left", "elsewhere", "withdrawn",
    "doubted",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """
    What became of a bump.

    Attributes:
        subject: Model or engine.
        state: See `State`.
        sentence: For people.
        url, number: Of the pull request; None if there is none.
        commit: That was made; None if none was.
    """

    subject: str
    state: State
    sentence: str
    url: str | None = None
    number: int | None = None
    commit: str | None = None


@dataclass(frozen=True, kw_only=True)
class Main:
    """
    The default branch at one moment.

    Attributes:
        name: Of it.
        commit, tree: That it is at.
        params: Its params.yaml.
    """

    name: str
    commit: str
    tree: str
    params: bytes

    @classmethod
    def read(cls, gh: GitHub) -> Main:
        """
        Ask for it.

        Raises:
            GitHubError, RetryLaterError: GitHub does not tell, or there is no params.yaml.
        """
        name = mainline.default_branch(gh)
        commit = commits.branch_head(gh, name)
        params = commits.read_file(gh, PARAMS, commit) if commit else None
        if commit is None or params is None:
            raise GitHubError(f"the default branch {console.clean(name)} has no {PARAMS}.")
        tree = taken(taken(gh.get(f"git/commits/{commit}"), "tree", dict), "sha", str)
        return cls(name=name, commit=commit, tree=tree, params=params)


@dataclass(frozen=True, kw_only=True)
class _Branch:
    """
    A branch of a bump, held against the default branch.

    Attributes:
        head: Commit that it is at.
        is_ahead: Whether it has commits of its own.
        foreign: Who else committed there, in words; None if nobody did.
        is_bump_alone: Whether all that it has is one commit of ours without records.
        fork: Commit where it left the default branch.
    """

    head: str
    is_ahead: bool
    foreign: str | None
    is_bump_alone: bool
    fork: str


# --- one bump ---------------------------------------------------------------------------------


def bring(gh: GitHub, bump: Bump, seen: Mapping[Place, Value]) -> Outcome:
    """
    Leave one open pull request with exactly this change, unless somebody does not want it.

    Args:
        gh: The repository.
        bump: The change.
        seen: What the declaration said that was looked at, at the places of the edits.

    Raises:
        GitHubError: GitHub refuses it; the hint says what to do.
        RetryLaterError: It cannot be reached, or others write to the branch all the time.
        ParamsError: The line in params.yaml of the default branch cannot be changed by itself.
    """
    for _ in range(_MAX_ROUNDS):
        try:
            return _brought(gh, bump, seen)
        except MovedError:
            continue  # somebody was faster: what is there now decides
    raise RetryLaterError(
        f"{bump.branch} is written to by others all the time: {_MAX_ROUNDS} attempts, each too "
        "late.",
        hint="Find out who else writes there, then run the same job again.",
    )


def wish(gh: GitHub, bump: Bump, seen: Mapping[Place, Value]) -> Outcome | None:
    """Return why nothing would be proposed; None if it would. Reads alone. Raises: see `bring`."""
    return _objection(gh, bump, seen, Main.read(gh), pulls.find_by_head(gh, bump.branch))


def _objection(
    gh: GitHub,
    bump: Bump,
    seen: Mapping[Place, Value],
    main: Main,
    pull: Mapping[str, Any] | None,
) -> Outcome | None:
    """Say why it is not proposed, as far as main and closed pull requests decide that."""
    try:
        there = pin_lines.values(main.params, bump.edits)
    except ParamsError as error:
        return Outcome(
            subject=bump.subject,
            state="elsewhere",
            sentence=f"{main.name} does not take it: {error.message}",
        )
    if there == dict(bump.edits):
        return Outcome(
            subject=bump.subject,
            state="pinned",
            sentence=f"{main.name} pins {bump_change.short(bump.new)}.",
        )
    if there != dict(seen):
        return Outcome(
            subject=bump.subject,
            state="elsewhere",
            sentence=f"{main.name} says something else than what was looked at: look again from "
            "there.",
        )
    closed = None if pull else _refused(gh, bump)
    if closed is not None:
        return _of_pull(
            closed,
            bump,
            "ignored",
            f"{bump_change.short(bump.new)} is not wanted: #{closed['number']} was closed. Reopen "
            "that to have it back.",
        )
    return None


def _brought(gh: GitHub, bump: Bump, seen: Mapping[Place, Value]) -> Outcome:
    main = Main.read(gh)
    pull = pulls.find_by_head(gh, bump.branch)
    objection = _objection(gh, bump, seen, main, pull)
    if objection is not None:
        return objection
    branch = _read(gh, main, bump.branch)
    made = None
    if (
        branch is None
        or not _is_right(gh, branch, bump, seen)
        or (branch.is_bump_alone and _conflicts(gh, pull))
    ):
        if branch is not None and branch.foreign:
            is_there = _pins(gh, branch.head, bump) == dict(bump.edits)
            return _left(gh, bump, pull, branch.foreign, main.name if is_there else None)
        made = _commit(gh, bump, main, branch)
    return _renewed(gh, bump, main, pull, made)


def _left(
    gh: GitHub, bump: Bump, pull: Mapping[str, Any] | None, foreign: str, merge: str | None
) -> Outcome:
    """
    Leave a branch to whom it is now, and say so where it is seen.

    Where it pins what is proposed and only the line of the default branch, `merge`, is another one,
    it must not be deleted: that closes its pull request, which says that this is not wanted.
    """
    new = bump_change.short(bump.new)
    if merge is None:
        heading, step = f"**{new} is there**", f"Delete the branch to have it made anew with {new}."
    else:
        heading = f"**{merge} has another line by now**"
        step = f"Merge {merge} into it, and keep {new} there."
    sentence = f"{bump.branch} is left as it is: {foreign} {step}"
    outcome = Outcome(subject=bump.subject, state="left", sentence=sentence)
    if pull is None:
        return outcome
    _say_above(gh, pull, "NOTE", heading, sentence)
    return _of_pull(pull, bump, "left", sentence)


def _renewed(
    gh: GitHub, bump: Bump, main: Main, pull: dict[str, Any] | None, made: str | None
) -> Outcome:
    """Open the pull request, or renew what we wrote of it."""
    before = (pull["title"], pull.get("body")) if pull else None
    room = bump_change.BODY_LIMIT
    if pull is not None:
        people = len(pulls.merged(pull.get("body"), ""))
        room = min(room, pulls.BODY_CHARACTERS - people - _SLACK)
    try:
        found = pulls.upsert_pull(
            gh,
            head=bump.branch,
            base=main.name,
            title=bump.title,
            body=bump.text(room),
            opens=pull is None,
        )
    except GitHubError as error:
        if error.status == _FORBIDDEN and pull is None:
            error.hint = (
                f"The branch {bump.branch} is there. In the repository's settings, Actions, "
                "General: allow GitHub Actions to create pull requests; or use the token of an "
                f"App. {error.hint}"
            ).strip()
        raise
    # Labels only with a new change: one that somebody took away stays away.
    if made is not None or pull is None:
        _label(gh, found, bump)
    if pull is None:
        return _of_pull(found, bump, "opened", f"proposed: {bump.title}.", made)
    if made is None and before == (found["title"], found.get("body")):
        return _of_pull(found, bump, "unchanged", "proposed already, and as it has to be.")
    return _of_pull(found, bump, "renewed", f"renewed: {bump.title}.", made)


def _label(gh: GitHub, pull: Mapping[str, Any], bump: Bump) -> None:
    """
    Give a pull request the labels of a change, and take away classes that a former one had.

    Labels decide nothing: a refusal is said. One that the repository does not have yet GitHub makes
    only for a token that may write issues, which no job of ours needs for anything else here; so
    each is asked for alone, and those that are there are given.
    """
    names = [each.get("name") for each in pull.get("labels") or () if isinstance(each, dict)]
    missing = [name for name in bump.labels if name not in names]
    start = bump_change.CLASS_LABEL.format(name="")
    stale = [name for name in names if str(name).startswith(start) and name not in bump.labels]
    number = taken(pull, "number", int)
    refused: dict[str, GitHubError] = {}
    for name in missing:
        try:
            gh.post(f"issues/{number}/labels", {"labels": [name]}, repeatable=True)
        except GitHubError as error:
            refused[name] = error
    if refused:
        commands = "; ".join(f'gh label create "{name}"' for name in refused)
        why = next(iter(refused.values())).message
        console.warn(f"#{number} lacks labels: {why} Make them once in the repository: {commands}")
    try:
        for former in stale:
            gh.delete(f"issues/{number}/labels/{quoted(str(former))}")
    except GitHubError as error:
        console.warn(f"#{number} has labels of what it was before: {error.message}")


def _of_pull(
    pull: Mapping[str, Any], bump: Bump, state: State, sentence: str, commit: str | None = None
) -> Outcome:
    return Outcome(
        subject=bump.subject,
        state=state,
        sentence=sentence,
        url=str(taken(pull, "html_url", str)),
        number=taken(pull, "number", int),
        commit=commit,
    )


def _refused(gh: GitHub, bump: Bump) -> dict[str, Any] | None:
    """Return the pull request of this very change that somebody closed."""
    for pull in gh.paged("pulls", state="closed", head=f"{gh.owner}:{bump.branch}"):
        marker = _marker(gh, pull)
        if (
            marker is not None
            and marker.subject == bump.subject
            and marker.new == bump.new
            and not marker.withdrawn
            and pull.get("merged_at") is None
        ):
            return pull
    return None


def _marker(gh: GitHub, pull: Mapping[str, Any]) -> Marker | None:
    """Return what a pull request from a branch of ours proposes, by our part of its body."""
    head = pull.get("head")
    repo = head.get("repo") if isinstance(head, dict) else None
    if not isinstance(repo, dict) or repo.get("full_name") != gh.repository:
        return None
    return bump_change.marker_of(pulls.ours(pull.get("body")))


# --- its branch -------------------------------------------------------------------------------


def _read(gh: GitHub, main: Main, name: str) -> _Branch | None:
    """Return what a branch has beside the default branch; None if there is no such branch."""
    head = commits.branch_head(gh, name)
    if head is None:
        return None
    compared = gh.get(f"compare/{main.commit}...{head}")
    listed = taken(compared, "commits", list)
    foreign = next(identity.strangers(gh, listed, bump_change.is_ours), None)
    if len(listed) != taken(compared, "total_commits", int):
        foreign = "it has more commits than GitHub shows."
    fork = taken(taken(compared, "merge_base_commit", dict), "sha", str)
    told = [taken(taken(each, "commit", dict), "message", str) for each in listed]
    return _Branch(
        head=head,
        is_ahead=bool(listed),
        foreign=foreign,
        is_bump_alone=foreign is None and len(told) == 1 and bump_change.is_bump(told[0]),
        fork=fork,
    )


def _is_right(gh: GitHub, branch: _Branch, bump: Bump, seen: Mapping[Place, Value]) -> bool:
    """Tell whether a branch proposes this change of the lines as the default branch has them."""
    if not branch.is_ahead:
        return False
    return _pins(gh, branch.head, bump) == dict(bump.edits) and (
        _pins(gh, branch.fork, bump) == dict(seen)
    )


def _conflicts(gh: GitHub, pull: Mapping[str, Any] | None) -> bool:
    """
    Tell whether GitHub says that a pull request cannot be merged; not yet known means no.

    A line of the default branch beside ours is enough, such as the `stable:` of a rollback.
    """
    if pull is None:
        return False
    told = gh.get(f"pulls/{taken(pull, 'number', int)}")
    return isinstance(told, dict) and told.get("mergeable") is False


def _pins(gh: GitHub, commit: str, bump: Bump) -> dict[Place, Any] | None:
    """Return what a commit says at the places of a bump; None if its params.yaml is wrong."""
    data = commits.read_file(gh, PARAMS, commit)
    try:
        return pin_lines.values(data, bump.edits) if data is not None else None
    except ParamsError:
        return None


def _commit(gh: GitHub, bump: Bump, main: Main, branch: _Branch | None) -> str:
    """Make the branch one commit on top of the default branch; see the top of this module."""
    text = pin_lines.changed(main.params, bump.edits).decode()
    entry = {"path": PARAMS, "mode": "100644", "type": "blob", "content": text}
    made = gh.post("git/trees", {"base_tree": main.tree, "tree": [entry]}, repeatable=True)
    tree = taken(made, "sha", str)

    def commit(message: str, *parents: str) -> str:
        request = {"message": message, "tree": tree, "parents": list(parents)}
        # Made twice, nobody sees the first.
        return str(taken(gh.post("git/commits", request, repeatable=True), "sha", str))

    fresh = commit(bump.message, main.commit)
    if branch is None:
        commits.create_branch(gh, bump.branch, fresh)
        return fresh
    if branch.is_ahead:
        joined = commit(f"Begin anew\n\n{bump.message}", branch.head, main.commit)
        commits.move_branch(gh, bump.branch, joined)
        commits.move_branch(gh, bump.branch, fresh, force=True)
    else:
        commits.move_branch(gh, bump.branch, fresh)
    return fresh


# --- what is out of date ----------------------------------------------------------------------


def settle(
    gh: GitHub,
    reason: Callable[[Marker, Main], str | None],
    doubt: Callable[[str], str | None],
) -> Iterator[Outcome | FleetError]:
    """
    Close what is out of date, and mark what somebody has to look at first.

    Args:
        gh: The repository.
        reason: Says of a subject and what its open pull request proposes why that is out of date,
            as a sentence; None if it is not.
        doubt: Says of a subject why somebody has to look first; None if nobody has to.

    Yields:
        What became of each; an error of one keeps nobody from the others.

    Raises:
        GitHubError, RetryLaterError: GitHub does not tell what is open.
    """
    main = Main.read(gh)
    for pull in list(gh.paged("pulls", state="open")):
        marker = _marker(gh, pull)
        ref = taken(taken(pull, "head", dict), "ref", str)
        if marker is None or ref != bump_change.branch_of(marker.subject):
            continue
        try:
            why, sentence = reason(marker, main), doubt(marker.subject)
            if why is not None:
                yield _withdrawn(gh, pull, marker, main, why)
            elif sentence is not None:
                yield _doubted(gh, pull, marker, sentence)
        except FleetError as error:
            yield error


def _withdrawn(
    gh: GitHub, pull: Mapping[str, Any], marker: Marker, main: Main, why: str
) -> Outcome:
    """Close a pull request with a word, and remove its branch if nobody else committed there."""
    number = taken(pull, "number", int)
    url = str(taken(pull, "html_url", str))
    name = bump_change.branch_of(marker.subject)
    branch = _read(gh, main, name)
    if branch is not None and branch.foreign:
        return Outcome(
            subject=marker.subject,
            state="left",
            sentence=f"#{number} is out of date, and left open: {branch.foreign} {why}",
            url=url,
            number=number,
        )
    told = pull.get("body")
    body = pulls.merged(told, bump_change.withdrawn(pulls.ours(told)))
    # In one request: what is closed says that it was not a person who closed it.
    gh.patch(f"pulls/{number}", {"state": "closed", "body": body})
    with contextlib.suppress(UnknownOutcomeError):  # said or not, once is enough
        gh.post(f"issues/{number}/comments", {"body": escape_markdown(why)})
    if branch is not None and commits.branch_head(gh, name) == branch.head:
        gh.delete(f"git/refs/{ref_path(name)}")
    return Outcome(
        subject=marker.subject,
        state="withdrawn",
        sentence=f"#{number} was closed: {why}",
        url=url,
        number=number,
    )


def _doubted(gh: GitHub, pull: Mapping[str, Any], marker: Marker, sentence: str) -> Outcome:
    """Say above our part of a body that somebody has to look first; nothing else is changed."""
    _say_above(gh, pull, "CAUTION", "**Do not merge before somebody looked**", sentence)
    number = taken(pull, "number", int)
    return Outcome(
        subject=marker.subject,
        state="doubted",
        sentence=f"#{number} stays open, but somebody has to look first: {sentence}",
        url=str(taken(pull, "html_url", str)),
        number=number,
    )


def _say_above(gh: GitHub, pull: Mapping[str, Any], kind: str, heading: str, sentence: str) -> None:
    """Put one paragraph above our part of a body, in place of one that is there already."""
    there = str(pull.get("body") or "").replace("\r\n", "\n")
    before = ours = pulls.ours(there)
    begin, end = _ABOVE
    if begin in ours and end in ours:
        ours = ours[: ours.index(begin)] + ours[ours.index(end) + len(end) :].lstrip("\n")
    first, _, rest = ours.partition("\n")
    told = f"> [!{kind}]\n> {heading}: {escape_markdown(sentence)}"
    ours = f"{first}\n{begin}\n{told}\n\n{end}\n{rest}"
    # Somebody took our part away; or what people wrote would be cut off.
    if not before or len(there) - len(before) + len(ours) > pulls.BODY_CHARACTERS:
        return
    body = pulls.merged(there, ours)
    if body != there:
        gh.patch(f"pulls/{taken(pull, 'number', int)}", {"body": body})
