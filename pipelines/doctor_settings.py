"""
The settings of docs/security.md as calls: what `fleet doctor` prints to paste, for `gh`.

    print(command(APPROVAL))          echo '{...}' | gh api --method PUT repos/{owner}/{repo}/...

`gh` fills in `{owner}/{repo}` in a checkout. A test holds these calls against that page and against
GitHub's own description of its API.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# The App behind every job's token: only what it says of `gate` and `ci` is believed.
ACTIONS_APP_ID: Final = 15368
REQUIRED_CHECKS: Final = ("gate", "ci")
# Of the pull request of a job in the environment `bot`, which runs on its merge.
PULL_REFS: Final = "refs/pull/*/merge"
RETENTION_DAYS: Final = 30


@dataclass(frozen=True, kw_only=True)
class Call:
    """
    One request that changes a setting.

    Attributes:
        method: Of the request.
        path: Below the repository.
        body: JSON; empty without one.
    """

    method: str
    path: str
    body: Mapping[str, Any] = field(default_factory=dict)


APPROVAL: Final = Call(
    method="PUT",
    path="actions/permissions/fork-pr-contributor-approval",
    body={"approval_policy": "all_external_contributors"},
)
ALLOWED: Final = (
    Call(
        method="PUT",
        path="actions/permissions",
        body={"enabled": True, "allowed_actions": "selected", "sha_pinning_required": True},
    ),
    Call(
        method="PUT",
        path="actions/permissions/selected-actions",
        body={"github_owned_allowed": True, "verified_allowed": False, "patterns_allowed": []},
    ),
)
PRIVATE_FORKS: Final = Call(
    method="PUT",
    path="actions/permissions/fork-pr-workflows-private-repos",
    body={
        "run_workflows_from_fork_pull_requests": False,
        "send_write_tokens_to_workflows": False,
        "send_secrets_and_variables": False,
        "require_approval_for_fork_pr_workflows": True,
    },
)
RETENTION: Final = Call(
    method="PUT",
    path="actions/permissions/artifact-and-log-retention",
    body={"days": RETENTION_DAYS},
)
ALERTS: Final = Call(method="PUT", path="vulnerability-alerts")


def workflow_token(*, opens_pulls: bool) -> Call:
    """Let a job's token read; without an App it has to open pull requests, too."""
    return Call(
        method="PUT",
        path="actions/permissions/workflow",
        body={
            "default_workflow_permissions": "read",
            "can_approve_pull_request_reviews": opens_pulls,
        },
    )


def ruleset(*, alone: bool) -> Call:
    """Guard the default branch; who is alone cannot be reviewed by anybody."""
    checks = [{"context": name, "integration_id": ACTIONS_APP_ID} for name in REQUIRED_CHECKS]
    return Call(
        method="POST",
        path="rulesets",
        body={
            "name": "default branch",
            "target": "branch",
            "enforcement": "active",
            "conditions": {"ref_name": {"include": ["~DEFAULT_BRANCH"], "exclude": []}},
            "rules": [
                {"type": "deletion"},
                {"type": "non_fast_forward"},
                {
                    "type": "pull_request",
                    "parameters": {
                        "required_approving_review_count": 0 if alone else 1,
                        "require_code_owner_review": not alone,
                        "require_last_push_approval": not alone,
                        "dismiss_stale_reviews_on_push": False,
                        "required_review_thread_resolution": False,
                    },
                },
                {
                    "type": "required_status_checks",
                    "parameters": {
                        "strict_required_status_checks_policy": False,
                        "required_status_checks": checks,
                    },
                },
            ],
        },
    )


def environment(
    name: str, *, branches: Iterable[str], reviewer: int | None, alone: bool = False
) -> tuple[Call, ...]:
    """
    Guard an environment.

    Args:
        name: Of it.
        branches: That may use it.
        reviewer: GitHub's number of the person who approves; None: nobody has to.
        alone: Whether there is nobody else who could.
    """
    body: dict[str, Any] = {
        "deployment_branch_policy": {"protected_branches": False, "custom_branch_policies": True}
    }
    if reviewer is not None:
        body = {
            "prevent_self_review": not alone,
            "reviewers": [{"type": "User", "id": reviewer}],
            **body,
        }
    path = f"environments/{name}"
    policies = (
        Call(
            method="POST",
            path=f"{path}/deployment-branch-policies",
            body={"name": each, "type": "branch"},
        )
        for each in branches
    )
    return (Call(method="PUT", path=path, body=body), *policies)


def command(*calls: Call) -> str:
    """Write calls as a person pastes them, with GitHub's command line."""
    return "\n".join(_line(each) for each in calls)


def label_command(names: Iterable[str]) -> str:
    """Write the commands that make labels."""
    return "\n".join(f"gh label create {shlex.quote(each)} --color c5def5" for each in names)


def _line(call: Call) -> str:
    start = f"gh api --method {call.method} repos/{{owner}}/{{repo}}/{call.path}"
    # One line each: what ends a here-document would not stand at the beginning of its line.
    body = shlex.quote(json.dumps(call.body, ensure_ascii=False))
    return f"echo {body} | {start} --input -" if call.body else start
