"""
`fleet init --github`: the beginning of a fleet as a pull request, with a list of what to do next.

Nothing is pushed: the branch `fleet/init` is made over GitHub's API, of what `fleet init` would
write in a checkout. After the push by which a repository is made of the template it is opened once,
as long as nobody has begun; by hand whenever somebody asks.

    default branch is not what was read    nothing is made: the answers may be others there
    branch that has it already             stays as it is
    branch with a commit of somebody else  is left alone, and said
    jobs may open no pull request          the branch is there, and a person is told where to click
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from pipelines import console, init_proposal, init_state, mainline, runner, wording
from pipelines.errors import FleetError, RetryLaterError
from pipelines.github import commits, identity, pulls
from pipelines.github.client import GitHub, taken
from pipelines.github.errors import GitHubError, MovedError
from pipelines.render import escape_markdown

if TYPE_CHECKING:
    from pipelines.init_proposal import Proposal
    from pipelines.layout import Layout
    from pipelines.mainline import Branch

BRANCH: Final = "fleet/init"
_CODEOWNERS: Final = ".github/CODEOWNERS"
# No token of a job may change them, and nobody's should for this.
_WORKFLOWS: Final = ".github/workflows/"
_FORBIDDEN: Final = 403
_FENCE: Final = "````"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """
    What was done.

    Attributes:
        any: Whether the repository was changed.
        branch: Of the change; empty if there is none.
        pull_request: Address of it; empty if none is open.
        sentence: For people.
    """

    any: bool = False
    branch: str = ""
    pull_request: str = ""
    sentence: str


def main(at: Layout, proposal: Proposal, *, as_json: bool, dry_run: bool) -> int:
    """
    Open the pull request, or say why there is none.

    Args:
        at: The checkout of the default branch.
        proposal: What would be written.
        as_json: Print {any, branch, pull_request, sentence}.
        dry_run: Print the diff; ask and change nothing.

    Raises:
        ParamsError: There is no token.
        GitHubError: GitHub refuses it.
        RetryLaterError: It cannot be reached, or the default branch has moved on.
    """
    if dry_run:
        console.out(init_proposal.diff(at, proposal))
        return 0
    done = _done(at, proposal)
    runner.outputs(any=done.any, pull_request=done.pull_request)
    console.info(done.sentence)
    if as_json:
        console.out(json.dumps(asdict(done), indent=2))
    return 0


def _done(at: Layout, proposal: Proposal) -> Opened:
    asked_for = runner.event_name() != "push"
    if not asked_for and not _is_untouched(at):
        return Opened(sentence="Somebody has begun here already: nothing is proposed.")
    if not proposal.is_changed:
        return Opened(sentence="All of this is declared already: nothing is proposed.")
    _require_harmless(proposal)
    gh = GitHub.from_environment()
    main_branch = mainline.read_branch(gh, mainline.default_branch(gh))
    if main_branch is None:
        raise GitHubError(
            "the default branch is not there: the repository is empty.",
            hint="Push the first commit, and run it again.",
        )
    _require_read(proposal, main_branch)
    if not asked_for and _was_closed(gh):
        return Opened(sentence=f"The pull request from {BRANCH} was closed: it is not wanted.")
    return _proposed(gh, proposal, main_branch)


def _is_untouched(at: Layout) -> bool:
    path = at.root / _CODEOWNERS
    owners = path.read_bytes() if path.is_file() else None
    return init_state.is_untouched(at.params.read_bytes(), owners)


def _require_harmless(proposal: Proposal) -> None:
    """Refuse what no answer can lead to: a change of what runs with the rights of a job."""
    wrong = [path for path in proposal.files if path.startswith(_WORKFLOWS)]
    if wrong:
        raise FleetError(
            f"{wording.first_few(wrong)} would be changed, which `fleet init` never does."
        )


def _require_read(proposal: Proposal, main_branch: Branch) -> None:
    """
    See that the default branch has what the proposal was made of.

    Raises:
        RetryLaterError: It has moved on.
    """
    for path, data in proposal.read.items():
        name = None if data is None else _blob_name(data)
        if main_branch.files.get(path) != name:
            raise RetryLaterError(
                f"{path} of {console.clean(main_branch.name)} is another one than here: somebody "
                "changed it in between. Nothing was proposed.",
                hint="Run it again, on the default branch as it is now.",
            )


def _blob_name(data: bytes) -> str:
    """Return git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _was_closed(gh: GitHub) -> bool:
    """Say whether somebody did not want it."""
    if pulls.find_by_head(gh, BRANCH) is not None:
        return False
    return any(
        taken(taken(each, "head", dict), "ref", str) == BRANCH
        for each in gh.paged("pulls", state="closed", head=f"{gh.owner}:{BRANCH}")
    )


# --- the branch and its pull request ----------------------------------------------------------


def _proposed(gh: GitHub, proposal: Proposal, main_branch: Branch) -> Opened:
    try:
        foreign, changed = _written(gh, proposal, main_branch)
    except MovedError as error:
        raise RetryLaterError(error.message, hint="Run it again.") from error
    if foreign is not None:
        sentence = (
            f"{BRANCH} is left as it is: {foreign} Merge it or delete the branch, then run this "
            "again."
        )
        console.warn(sentence)
        return Opened(branch=BRANCH, sentence=sentence)
    body = _body(gh, proposal, main_branch.name)
    try:
        pull = pulls.upsert_pull(
            gh, head=BRANCH, base=main_branch.name, title=proposal.title, body=body
        )
    except GitHubError as error:
        if error.status != _FORBIDDEN:
            raise
        return _by_hand(gh, proposal, main_branch.name, body)
    url = str(taken(pull, "html_url", str))
    runner.summary(f"## {escape_markdown(proposal.title)}\n\n{url}\n\n{body}")
    return Opened(
        any=changed,
        branch=BRANCH,
        pull_request=url,
        sentence=f"{url} proposes it: {proposal.title}.",
    )


def _written(gh: GitHub, proposal: Proposal, main_branch: Branch) -> tuple[str | None, bool]:
    """Bring the files to the branch; return who else committed there, and whether it changed."""
    tree = commits.write_tree(gh, main_branch.tree, proposal.files)
    there = commits.branch_head(gh, BRANCH)
    compared: dict[str, Any] = (
        gh.get(f"compare/{main_branch.commit}...{there}") if there is not None else {}
    )
    listed = taken(compared, "commits", list) if there is not None else []
    if there is not None and listed:
        told = taken(gh.get(f"git/commits/{there}"), "tree", dict)
        if taken(told, "sha", str) == tree:
            return None, False
        if len(listed) != taken(compared, "total_commits", int):
            return "it has more commits than GitHub shows.", False
        if (foreign := next(identity.strangers(gh, listed), None)) is not None:
            return foreign, False
    # Of what waits there, too: a branch is only ever moved forward.
    parents = [each for each in (there if listed else None, main_branch.commit) if each]
    made = gh.post(
        "git/commits",
        {"message": proposal.title, "tree": tree, "parents": parents},
        repeatable=True,  # made twice, nobody sees the first
    )
    sha = str(taken(made, "sha", str))
    if there is None:
        commits.create_branch(gh, BRANCH, sha)
    else:
        commits.move_branch(gh, BRANCH, sha)
    return None, True


def _by_hand(gh: GitHub, proposal: Proposal, base: str, body: str) -> Opened:
    """Say where a person opens what no job may: GitHub's default for a new repository."""
    page = f"{_server()}/{gh.repository}"
    url = f"{page}/compare/{base}...{BRANCH}?expand=1"
    sentence = (
        f"The branch {BRANCH} is there, and no job may open a pull request here. Open it: {url} "
        "Or allow it, and run this again: Settings, Actions, General, Allow GitHub Actions to "
        "create and approve pull requests."
    )
    console.warn(sentence)
    runner.summary(f"## {escape_markdown(proposal.title)}\n\n{sentence}\n\n{body}")
    return Opened(any=True, branch=BRANCH, sentence=sentence)


def _server() -> str:
    return os.environ.get("GITHUB_SERVER_URL") or "https://github.com"


# --- what it says -----------------------------------------------------------------------------


def _body(gh: GitHub, proposal: Proposal, base: str) -> str:
    """Return our part of the body: what is declared, what is to be known, what to do next."""
    parts = [
        "This makes the repository a fleet of its own. Nothing was built or measured for it.",
        _facts(proposal),
    ]
    if proposal.table:
        parts.append(f"{_FENCE}text\n{proposal.table}\n{_FENCE}")
    if proposal.notes:
        parts.append("\n".join(f"- {escape_markdown(note)}" for note in proposal.notes))
    docs = f"{_server()}/{gh.repository}/blob/{base}"
    parts.append("\n".join(["### What to do", "", *_steps(gh, proposal, docs)]))
    return "\n\n".join(parts)


def _facts(proposal: Proposal) -> str:
    answers = proposal.answers
    rows = {
        "model": proposal.model and f"{proposal.model}, {proposal.source}",
        "revision": proposal.revision,
        "quants": ", ".join(proposal.quants),
        "context": proposal.context_tokens and f"{wording.tokens(proposal.context_tokens)} tokens",
        "host": answers.host,
        "owners": " ".join(_owners(proposal)),
        "registry": answers.registry,
        "removed": _removed(proposal),
    }
    lines = [
        f"| {name} | {escape_markdown(value).replace('|', '&#124;')} |"
        for name, value in rows.items()
        if value
    ]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else ""


def _owners(proposal: Proposal) -> list[str]:
    """Return the owners that CODEOWNERS will name, each once."""
    data = proposal.files.get(_CODEOWNERS)
    lines = data.decode(errors="replace").splitlines() if data else []
    words = [word for line in lines if not line.startswith("#") for word in line.split()[1:]]
    return list(dict.fromkeys(words))


def _removed(proposal: Proposal) -> str:
    gone = sum(data is None for data in proposal.files.values())
    return (
        wording.counted(gone, "record of the example").replace("examples", "example")
        if gone
        else ""
    )


def _steps(gh: GitHub, proposal: Proposal, docs: str) -> list[str]:
    """Return the list of what to do, as boxes to tick."""
    owners = " ".join(_owners(proposal))
    steps: list[str] = []
    if not identity.starts_checks(gh):
        steps.append("Click **Approve workflows to run** below: a job opened this.")
    if owners:
        steps.append(
            f"See that {escape_markdown(owners)} may write here: GitHub asks nobody else, and an "
            f"organization is nobody; name a team ([docs]({docs}/docs/security.md))."
        )
    steps.append("Read the change of params.yaml, and merge.")
    if proposal.model is None:
        steps.append(
            "Name the first model: Actions, template init, Run workflow; or in a checkout "
            f"`fleet init hf:owner/repo` ([docs]({docs}/docs/first-model.md))."
        )
    if proposal.answers.host is None:
        steps.append(
            "Name the machine that serves it: `hosts:` in params.yaml "
            f"([docs]({docs}/docs/params.md))."
        )
    steps.append(
        f"Register the runner of the machine ([docs]({docs}/deploy/runner/README.md)), and give "
        f"DVC a remote that it reaches ([docs]({docs}/docs/github.md))."
    )
    steps.append(
        "In a checkout: `fleet doctor` says what is missing there and on GitHub, `fleet doctor "
        f"--security` which level of [docs]({docs}/docs/security.md) is reached."
    )
    if proposal.model is not None:
        steps.append(
            f"`fleet repro` there makes and measures {escape_markdown(proposal.model)}; or a pull "
            "request that changes params.yaml, once the runner is online."
        )
    return [f"- [ ] {each}" for each in steps]
