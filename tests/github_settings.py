"""
The settings of the repository of the stand-in: read and changed as GitHub's OpenAPI describes it.

    api.settings.private = True
    api.settings.variables["FLEET_APP_CLIENT_ID"] = "Iv23..."
    api.settings.secrets["production"] = {"HF_TOKEN"}     # "" is the repository itself

A new repository has GitHub's defaults, so a test says what an operator has changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from github_openapi import AnswerError

if TYPE_CHECKING:
    from collections.abc import Callable

R: Final = "/repos/{owner}/{repo}"
ROUTES: Final[dict[tuple[str, str], Any]] = {}
_APPROVAL: Final = "fork-pr-contributor-approval"
_OF_PRIVATE: Final = "fork-pr-workflows-private-repos"
_RETENTION: Final = "artifact-and-log-retention"


@dataclass
class Settings:
    """
    What an operator clicks under Settings.

    Attributes:
        private: Whether only some may see the repository.
        groups: Runner groups of the organization that owns it: `name`, `restricted`, `runners` by
            their numbers in `api.runners`; None: a person owns it.
        permissions: Bodies of actions/permissions/..., by the last part of the path.
        environments: By name: `reviewers`, `prevent_self_review`, `deployment_branch_policy`,
            `branches`.
        secrets: Names by environment; "" is the repository, "organization" its owner's.
        variables: Of the repository.
        rulesets: As they were made.
        protection: Of the default branch, the older kind; None without.
        people: Logins that may push.
        alerts: Whether Dependabot's are on.
        scanning: Statuses of secret scanning and push protection; empty where they are not shown.
        pushed_at: When somebody pushed; the documented example's time if None.
        owners_wrong: Lines of CODEOWNERS that GitHub does not understand; None: there is no file.
    """

    private: bool = False
    groups: list[dict[str, Any]] | None = None
    permissions: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {
            "": {"enabled": True, "allowed_actions": "all", "sha_pinning_required": False},
            "selected-actions": {
                "github_owned_allowed": True,
                "verified_allowed": False,
                "patterns_allowed": [],
            },
            "workflow": {
                "default_workflow_permissions": "read",
                "can_approve_pull_request_reviews": False,
            },
            _APPROVAL: {"approval_policy": "first_time_contributors"},
            _OF_PRIVATE: {
                "run_workflows_from_fork_pull_requests": False,
                "send_write_tokens_to_workflows": False,
                "send_secrets_and_variables": False,
                "require_approval_for_fork_pr_workflows": False,
            },
            _RETENTION: {"days": 90},
        }
    )
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    secrets: dict[str, set[str]] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    rulesets: dict[int, dict[str, Any]] = field(default_factory=dict)
    protection: dict[str, Any] | None = None
    people: list[str] = field(default_factory=lambda: ["mona", "hubot"])
    alerts: bool = False
    scanning: str = "disabled"
    pushed_at: str | None = None
    owners_wrong: list[int] | None = field(default_factory=list)


def _route(method: str, template: str) -> Callable[[Any], Any]:
    def register(handler: Any) -> Any:
        ROUTES[method, R + template] = handler
        return handler

    return register


def _organization(template: str) -> Callable[[Any], Any]:
    def register(handler: Any) -> Any:
        ROUTES["get", f"/orgs/{{org}}{template}"] = handler
        return handler

    return register


def of_repository(api: Any) -> dict[str, Any]:
    """Return what the repository itself tells of its settings."""
    settings = api.settings
    shown = {"status": settings.scanning}
    return {
        **({"pushed_at": settings.pushed_at} if settings.pushed_at else {}),
        "owner": api.user(api.repository.partition("/")[0])
        | {"type": "User" if settings.groups is None else "Organization"},
        "private": settings.private,
        "visibility": "private" if settings.private else "public",
        "security_and_analysis": {
            "secret_scanning": shown,
            "secret_scanning_push_protection": shown,
        }
        if settings.scanning
        else None,
    }


# --- actions ----------------------------------------------------------------------------------


def _permission(name: str) -> None:
    """Serve one of the bodies below actions/permissions."""
    template = f"/actions/permissions/{name}" if name else "/actions/permissions"

    def get(api: Any, _call: Any) -> tuple[int, Any]:
        settings = api.settings
        if name == (_APPROVAL if settings.private else _OF_PRIVATE):
            raise AnswerError(404, "Not Found")
        shown = dict(settings.permissions[name])
        if name == _RETENTION:
            shown["maximum_allowed_days"] = 365
        if not name and shown["allowed_actions"] != "selected":
            shown.pop("selected_actions_url", None)
        return 200, shown

    def put(api: Any, call: Any) -> tuple[int, Any]:
        api.settings.permissions[name] |= call.body
        return 204, None

    ROUTES["get", R + template] = get
    ROUTES["put", R + template] = put


for _name in ("", "selected-actions", "workflow", _APPROVAL, _OF_PRIVATE, _RETENTION):
    _permission(_name)


def _shown_secrets(names: set[str]) -> tuple[int, Any]:
    shown = [
        {"name": name, "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z"}
        for name in sorted(names)
    ]
    return 200, {"total_count": len(shown), "secrets": shown}


@_route("get", "/actions/secrets")
def _secrets(api: Any, _call: Any) -> tuple[int, Any]:
    return _shown_secrets(api.settings.secrets.get("", set()))


@_route("get", "/actions/organization-secrets")
def _secrets_of_owner(api: Any, _call: Any) -> tuple[int, Any]:
    return _shown_secrets(api.settings.secrets.get("organization", set()))


@_route("get", "/actions/variables")
def _variables(api: Any, call: Any) -> tuple[int, Any]:
    if int(call.query.get("per_page", "10")) > 30:
        raise AnswerError(422, "per_page is 30 at most")
    shown = [
        {
            "name": name,
            "value": value,
            "created_at": "2026-01-01T00:00:00Z",
            "updated_at": "2026-01-01T00:00:00Z",
        }
        for name, value in sorted(api.settings.variables.items())
    ]
    return 200, {"total_count": len(shown), "variables": shown}


@_organization("/actions/runner-groups")
def _groups(api: Any, call: Any) -> tuple[int, Any]:
    assert call.query["visible_to_repository"] == api.repository.partition("/")[2]
    made = api.contract.example("runner-groups-org")["runner_groups"][0]
    shown = [
        made | {"id": at, "name": each["name"], "restricted_to_workflows": each["restricted"]}
        for at, each in enumerate(api.settings.groups or ())
    ]
    return 200, {"total_count": len(shown), "runner_groups": shown}


@_organization("/actions/runner-groups/{runner_group_id}/runners")
def _runners_of_group(api: Any, call: Any) -> tuple[int, Any]:
    mine = api.settings.groups[call.number("runner_group_id")]["runners"]
    shown = [api.shown_runner(number) for number in mine]
    return 200, {"total_count": len(shown), "runners": shown}


# --- environments -----------------------------------------------------------------------------


def _shown_environment(api: Any, name: str) -> dict[str, Any]:
    made = api.contract.example("environments")["environments"][0]
    rules = {each["type"]: each for each in made["protection_rules"]}
    kept = api.settings.environments[name]
    protection = []
    if kept.get("reviewers"):
        person = rules["required_reviewers"]["reviewers"][0]
        protection.append(
            rules["required_reviewers"]
            | {
                "prevent_self_review": bool(kept.get("prevent_self_review")),
                "reviewers": [person] * len(kept["reviewers"]),
            }
        )
    if kept.get("deployment_branch_policy"):
        protection.append(rules["branch_policy"])
    shown: dict[str, Any] = made | {
        "name": name,
        "protection_rules": protection,
        "deployment_branch_policy": kept.get("deployment_branch_policy"),
    }
    return shown


@_route("get", "/environments")
def _environments(api: Any, _call: Any) -> tuple[int, Any]:
    shown = [_shown_environment(api, name) for name in api.settings.environments]
    return 200, {"total_count": len(shown), "environments": shown}


@_route("put", "/environments/{environment_name}")
def _put_environment(api: Any, call: Any) -> tuple[int, Any]:
    name = call.operation.path["environment_name"]
    kept = api.settings.environments.setdefault(name, {"branches": []})
    # What is not said is taken away.
    for key in ("reviewers", "prevent_self_review", "deployment_branch_policy"):
        kept[key] = call.body.get(key)
    return 200, _shown_environment(api, name)


def _environment(api: Any, call: Any) -> dict[str, Any]:
    name = call.operation.path["environment_name"]
    if name not in api.settings.environments:
        raise AnswerError(404, "Not Found")
    found: dict[str, Any] = api.settings.environments[name]
    return found


@_route("get", "/environments/{environment_name}/deployment-branch-policies")
def _branch_policies(api: Any, call: Any) -> tuple[int, Any]:
    kept = _environment(api, call)
    made = api.contract.example("deployment-branch-policies-list")["branch_policies"][0]
    shown = [made | {"id": at, "name": name} for at, name in enumerate(kept.get("branches", []))]
    return 200, {"total_count": len(shown), "branch_policies": shown}


@_route("post", "/environments/{environment_name}/deployment-branch-policies")
def _add_branch_policy(api: Any, call: Any) -> tuple[int, Any]:
    kept = _environment(api, call)
    policy = kept.get("deployment_branch_policy")
    if not policy or not policy["custom_branch_policies"]:
        raise AnswerError(404, "custom branch policies are not enabled")
    kept.setdefault("branches", []).append(call.body["name"])
    made = api.contract.example("deployment-branch-policies-list")["branch_policies"][0]
    return 200, made | {"name": call.body["name"]}


@_route("get", "/environments/{environment_name}/secrets")
def _secrets_of_environment(api: Any, call: Any) -> tuple[int, Any]:
    _environment(api, call)
    return _shown_secrets(api.settings.secrets.get(call.operation.path["environment_name"], set()))


# --- branches, people, labels -----------------------------------------------------------------


def _shown_ruleset(api: Any, number: int) -> dict[str, Any]:
    made: dict[str, Any] = api.contract.example("repository-ruleset") | {"bypass_actors": []}
    made |= api.settings.rulesets[number] | {"id": number}
    if made["bypass_actors"] is None:  # as for who may not change it
        del made["bypass_actors"]
    return made


@_route("post", "/rulesets")
def _make_ruleset(api: Any, call: Any) -> tuple[int, Any]:
    number = len(api.settings.rulesets) + 1
    api.settings.rulesets[number] = call.body
    return 201, _shown_ruleset(api, number)


@_route("get", "/rulesets/{ruleset_id}")
def _get_ruleset(api: Any, call: Any) -> tuple[int, Any]:
    number = call.number("ruleset_id")
    if number not in api.settings.rulesets:
        raise AnswerError(404, "Not Found")
    return 200, _shown_ruleset(api, number)


@_route("get", "/rules/branches/{branch}")
def _rules(api: Any, call: Any) -> tuple[int, Any]:
    assert call.operation.path["branch"] == api.default_branch
    return 200, [
        {
            **rule,
            "ruleset_source_type": "Repository",
            "ruleset_source": api.repository,
            "ruleset_id": number,
        }
        for number, each in api.settings.rulesets.items()
        if each["enforcement"] == "active"
        and "~DEFAULT_BRANCH" in each["conditions"]["ref_name"]["include"]
        for rule in each["rules"]
    ]


@_route("get", "/branches/{branch}/protection")
def _protection(api: Any, _call: Any) -> tuple[int, Any]:
    if api.settings.protection is None:
        raise AnswerError(404, "Branch not protected")
    return 200, api.settings.protection


@_route("get", "/collaborators")
def _people(api: Any, call: Any) -> tuple[int, Any]:
    made = api.contract.example("collaborator-items")[0]
    assert call.query.get("permission") == "push"
    return 200, [made | {"login": login} for login in api.settings.people]


@_route("get", "/codeowners/errors")
def _owners(api: Any, _call: Any) -> tuple[int, Any]:
    if api.settings.owners_wrong is None:
        raise AnswerError(404, "Not Found")
    made = api.contract.example("codeowners-errors")["errors"][1]
    return 200, {"errors": [made | {"line": line} for line in api.settings.owners_wrong]}


@_route("get", "/labels")
def _labels(api: Any, _call: Any) -> tuple[int, Any]:
    return 200, api.shown_labels(sorted(api.labels))


@_route("post", "/labels")
def _make_label(api: Any, call: Any) -> tuple[int, Any]:
    if call.body["name"] in api.labels:
        raise AnswerError(422, "Validation Failed", errors=[{"code": "already_exists"}])
    api.labels.add(call.body["name"])
    return 201, api.shown_labels([call.body["name"]])[0]


@_route("get", "/vulnerability-alerts")
def _alerts(api: Any, _call: Any) -> tuple[int, Any]:
    if not api.settings.alerts:
        raise AnswerError(404, "Vulnerability alerts are disabled.")
    return 204, None


@_route("put", "/vulnerability-alerts")
def _alerts_on(api: Any, _call: Any) -> tuple[int, Any]:
    api.settings.alerts = True
    return 204, None
