"""
What `fleet doctor` asks GitHub first: the repository, and what several looks need of it.

Every question is a GET. What a token may not see is said with the right that it lacks and the page
on which a person can look; it never counts as well.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pipelines import at_once, doctor_lines, wording
from pipelines.doctor_lines import ANSWER_WITHIN_S, Line, warn
from pipelines.errors import FleetError, RetryLaterError
from pipelines.github.client import API_URL, GitHub, taken
from pipelines.github.errors import GitHubError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from pipelines.params import Declaration

APP_CLIENT: Final = "FLEET_APP_CLIENT_ID"
ATTEST: Final = "FLEET_ATTEST"
# Statuses with which GitHub says that a token may not see something.
UNSEEN: Final = frozenset({401, 403, 404})
# GitHub gives no more variables at once.
_VARIABLES_A_PAGE: Final = 30
_API_OF_SERVER: Final = "/api/v3"


@dataclass(frozen=True, kw_only=True)
class Basis:
    """
    What is known of the repository before anything is looked at.

    Attributes:
        repository: OWNER/NAME.
        web: Its page.
        private: Whether only some may see it.
        organization: Whether an organization owns it, which has runners of its own.
        branch: Its default branch.
        people: Who may push; None if that cannot be seen.
        person: GitHub's number of whose token it is; None if it is no person's.
        seen_variables: Of the repository, by name; or why they cannot be seen.
        seen_environments: As GitHub describes them, by name; or why they cannot be seen.
    """

    repository: str
    web: str
    private: bool
    organization: bool
    branch: str
    people: int | None
    person: int | None
    seen_variables: dict[str, str] | GitHubError
    seen_environments: dict[str, dict[str, Any]] | GitHubError

    @property
    def alone(self) -> bool:
        """Whether nobody but one may push, so that nobody can review anybody."""
        return self.people == 1

    @property
    def variables(self) -> dict[str, str]:
        """
        Return the variables of the repository.

        Raises:
            GitHubError: They cannot be seen.
        """
        if isinstance(self.seen_variables, GitHubError):
            raise self.seen_variables
        return self.seen_variables

    @property
    def environments(self) -> dict[str, dict[str, Any]]:
        """
        Return the environments.

        Raises:
            GitHubError: They cannot be seen.
        """
        if isinstance(self.seen_environments, GitHubError):
            raise self.seen_environments
        return self.seen_environments

    @property
    def has_app(self) -> bool | None:
        """Whether there is an App; None if that cannot be seen."""
        if isinstance(self.seen_variables, GitHubError):
            return None
        return bool(self.seen_variables.get(APP_CLIENT))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """
    What a look has.

    Attributes:
        gh: A client of its own: looks go on at once.
        basis: Of the repository.
        declared: The declaration; None if it cannot be read.
    """

    gh: GitHub
    basis: Basis
    declared: Declaration | None


@dataclass(frozen=True, kw_only=True)
class Look:
    """
    One look at the repository.

    Attributes:
        name: Of its line.
        look: What is done.
        scope: Right of a token that may see it.
        page: Where a person sees it, below the page of the repository.
    """

    name: str
    look: Callable[[Asked], Iterable[Line]]
    scope: str
    page: str


def client(root: Path) -> GitHub | None:
    """
    Return a client of the repository's GitHub that gives up after a few seconds.

    Returns:
        None if nothing says which repository it is, or there is no token.

    Raises:
        ParamsError: One of them cannot be.
    """
    repository = doctor_lines.github_repository(root)
    token = doctor_lines.token().strip()
    return _client(repository, token) if repository and token else None


def another(gh: GitHub) -> GitHub:
    """Return a client like this one, for a thread of its own."""
    return _client(gh.repository, doctor_lines.token().strip())


def _client(repository: str, token: str) -> GitHub:
    return GitHub(
        repository,
        token,
        api_url=os.environ.get("GITHUB_API_URL") or API_URL,
        deadline_s=ANSWER_WITHIN_S,
        answer_within_s=ANSWER_WITHIN_S,
    )


def web(gh: GitHub) -> str:
    """Return the page of a repository: of github.com, or of an Enterprise Server."""
    server = os.environ.get("GITHUB_SERVER_URL") or (
        "https://github.com" if gh.api_url == API_URL else gh.api_url.removesuffix(_API_OF_SERVER)
    )
    return f"{server.rstrip('/')}/{gh.repository}"


def basis(gh: GitHub) -> Basis:
    """
    Ask for the repository and what several looks need, at once.

    Raises:
        GitHubError: The repository cannot be seen, or its answer is none.
        RetryLaterError: GitHub does not answer in time.
    """
    questions: dict[str, Callable[[GitHub], Any]] = {
        "repository": lambda own: own.get(f"/repos/{own.repository}"),
        "variables": _variables,
        "environments": _environments,
        "people": _people,
        "person": lambda own: int(taken(own.get("/user"), "id", int)),
    }
    until = at_once.Until(
        last=time.monotonic() + ANSWER_WITHIN_S,
        first=None,
        answered=lambda: True,
        asked=frozenset(),
    )
    found = at_once.run(
        {name: functools.partial(_answer, another(gh), ask) for name, ask in questions.items()},
        until,
        label="asking GitHub",
        unit="questions",
    )
    late = RetryLaterError(
        f"GitHub does not answer within {ANSWER_WITHIN_S:.0f} s.",
        hint="Look at the network and the proxy, or use --offline.",
    )
    told = found.get("repository", late)
    if isinstance(told, FleetError):
        raise told
    return Basis(
        repository=gh.repository,
        web=web(gh),
        private=bool(taken(told, "private", bool)),
        organization=(told.get("owner") or {}).get("type") == "Organization",
        branch=str(taken(told, "default_branch", str)),
        people=_number(found.get("people")),
        person=_number(found.get("person")),
        seen_variables=_known(found.get("variables", late)),
        seen_environments=_known(found.get("environments", late)),
    )


def _answer(gh: GitHub, ask: Callable[[GitHub], Any]) -> Any:  # noqa: ANN401 - of the question
    """Ask; what GitHub refuses is an answer, too."""
    try:
        return ask(gh)
    except FleetError as error:
        return error


def _variables(gh: GitHub) -> dict[str, str]:
    every = gh.paged("actions/variables", "variables", per_page=_VARIABLES_A_PAGE)
    return {str(taken(each, "name", str)): str(taken(each, "value", str)) for each in every}


def _environments(gh: GitHub) -> dict[str, dict[str, Any]]:
    return {
        str(taken(each, "name", str)): each for each in gh.paged("environments", "environments")
    }


def _people(gh: GitHub) -> int:
    return sum(1 for _ in gh.paged("collaborators", permission="push"))


def _number(found: object) -> int | None:
    return found if isinstance(found, int) else None


def _known(found: Any) -> Any:  # noqa: ANN401 - of the question
    """Return an answer, or a refusal as what a look raises."""
    if isinstance(found, FleetError) and not isinstance(found, GitHubError):
        return GitHubError(found.message, hint=found.hint)
    return found


def watched(look: Look, asked: Callable[[], Asked]) -> list[Line]:
    """
    Do a look; what the token may not see is a warning that says where to look instead.

    Raises:
        FleetError: It cannot be done for another reason.
    """
    one = asked()
    try:
        return list(look.look(one))
    except GitHubError as error:
        if error.status not in UNSEEN:
            raise
        return [unseen(look, one.basis, error)]


def unseen(look: Look, basis: Basis, error: GitHubError) -> Line:
    """Say that the token may not see something."""
    return warn(
        "github",
        look.name,
        f"cannot be seen: {wording.clause(error.message)}",
        "export GITHUB_TOKEN=$(gh auth token)  # of an administrator of the repository; a "
        f"fine-grained one needs {look.scope}\n"
        f"or look there: {basis.web}/{look.page}",
    )
