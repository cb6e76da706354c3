"""
The self-hosted runners of a repository, as GitHub sees them.

Only an App's token with `administration: read` may ask; the token of a job never may.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.github.client import quoted, taken
from pipelines.github.errors import GitHubError

if TYPE_CHECKING:
    from pipelines.github.client import GitHub


@dataclass(frozen=True, kw_only=True)
class Runner:
    """
    One runner.

    Attributes:
        id: GitHub's number of it.
        name: As it registered itself; its operator's text.
        os: `linux`, ...
        online: Whether it waits for jobs or has one.
        busy: Whether it has one.
        labels: In lower case, as GitHub compares them.
        version: Of its program; None where GitHub does not say.
        ephemeral: Whether its registration ends with its next job.
    """

    id: int
    name: str
    os: str
    online: bool
    busy: bool
    labels: frozenset[str]
    version: str | None = None
    ephemeral: bool = False


def runners(gh: GitHub) -> tuple[Runner, ...]:
    """
    Return every runner of the repository.

    Raises:
        GitHubError: The token may not ask (403).
        RetryLaterError: GitHub cannot be asked now.
    """
    return tuple(_runner(each) for each in gh.paged("actions/runners", "runners"))


def is_of_organization(gh: GitHub) -> bool:
    """
    Say whether an organization owns the repository: it may have runners of its own.

    Raises:
        GitHubError: The token may not read the repository.
        RetryLaterError: GitHub cannot be asked now.
    """
    told = gh.get(f"/repos/{gh.repository}")
    owner = told.get("owner") if isinstance(told, dict) else None
    return isinstance(owner, dict) and owner.get("type") == "Organization"


@dataclass(frozen=True, kw_only=True)
class Group:
    """
    A runner group of an organization, as far as it concerns one of its repositories.

    Attributes:
        name: Its operator's text.
        any_workflow: Whether every workflow may use its runners.
        runners: Of it.
    """

    name: str
    any_workflow: bool
    runners: tuple[Runner, ...]


def groups(gh: GitHub) -> tuple[Group, ...]:
    """
    Return the groups of the repository's organization that it may use.

    Raises:
        GitHubError: The token may not ask: it needs `admin:org`, or of an App
            `organization_self_hosted_runners: read`.
        RetryLaterError: GitHub cannot be asked now.
    """
    place = f"/orgs/{quoted(gh.owner)}/actions/runner-groups"
    name = gh.repository.partition("/")[2]
    return tuple(
        Group(
            name=taken(each, "name", str),
            any_workflow=each.get("restricted_to_workflows") is not True,
            runners=tuple(
                _runner(one)
                for one in gh.paged(f"{place}/{taken(each, 'id', int)}/runners", "runners")
            ),
        )
        for each in gh.paged(place, "runner_groups", visible_to_repository=name)
    )


def deprecation(gh: GitHub, version: str) -> dict[str, Any] | None:
    """
    Return what GitHub says of a runner's version: when it stops to get jobs.

    None where it says nothing: an Enterprise Server, or a GitHub from before September 2026.

    Raises:
        RetryLaterError: GitHub cannot be asked now.
    """
    try:
        found = gh.get(f"actions/runners/deprecations/{quoted(version)}")
    except GitHubError:
        return None
    return found if isinstance(found, dict) else None


def _runner(each: dict[str, Any]) -> Runner:
    labels = [label.get("name") for label in taken(each, "labels", list) if isinstance(label, dict)]
    version = each.get("version")
    return Runner(
        id=taken(each, "id", int),
        name=taken(each, "name", str),
        os=taken(each, "os", str),
        online=each.get("status") == "online",
        busy=each.get("busy") is True,
        labels=frozenset(str(label).lower() for label in labels if label),
        version=version if isinstance(version, str) and version else None,
        ephemeral=each.get("ephemeral") is True,
    )
