"""
What each workflow and job may, with the reason: the other half of every workflow file.

A change of a right, a trigger, a runner or a secret has to be made here too, by a person who reads
why it was otherwise. `checks.policy` holds the files against these tables, both ways.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    # A right of the job's token: its level, and what it is for.
    Rights = Mapping[str, tuple[str, str]]

HOSTED: Final = "ubuntu-24.04"


@dataclass(frozen=True, kw_only=True)
class Job:
    """
    What one job may.

    Attributes:
        permissions: Rights of its token, each with its reason.
        steps: Actions that it uses, and lines that it runs, in order.
        needs: Jobs that it waits for.
        guards: Conditions that its `if:` joins with `&&`, as they are written.
        environment: Its `environment:`, as it is written; holds approval and secrets.
        concurrency: Its `concurrency:`, as it is written.
        secrets: Secrets that it may read.
    """

    permissions: Rights
    steps: tuple[str, ...]
    needs: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()
    environment: Any = None
    concurrency: Any = None
    secrets: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """
    What starts one workflow, and what its runs share.

    Attributes:
        on: Its triggers, as they are written, without the descriptions of inputs.
        concurrency: Its `concurrency:`, as it is written.
        cache_mode: Its `cache-mode:`; None if it is not written, which is GitHub's default.
        jobs: Its jobs by name.
    """

    on: Any
    concurrency: Any = None
    cache_mode: str | None = None
    jobs: Mapping[str, Job] = field(default_factory=dict)


READS: Final[Rights] = {"contents": ("read", "takes the repository")}

# The labels come from params.yaml through the plan; nothing else leaves GitHub's machines.
SELF_HOSTED_IN: Final[Mapping[tuple[str, str], str]] = {
    ("model-pr", "gpu"): "${{ matrix.runs_on }}",
    ("runner-health", "probe"): "${{ matrix.runs_on }}",
}
# Minutes that the declaration states: `plan.timeout_minutes`, bounded by its schema.
DECLARED_TIMEOUTS: Final = ("${{ matrix.timeout_minutes }}",)
# Signs what it published; no other job needs to be anybody.
ID_TOKEN_IN: Final[Mapping[str, tuple[str, ...]]] = {"publish": ("publish",)}
# Branch protection asks for these names.
REQUIRED_CHECKS: Final[Mapping[tuple[str, str], str]] = {
    ("ci", "ok"): "ci",
    ("model-pr", "gate"): "gate",
}
# Rights of a token of the App, by the job that asks for one.
APP_TOKENS: Final[Mapping[tuple[str, str], Mapping[str, str]]] = {
    # One commit on the branch of the pull request, after which its checks start.
    ("model-pr", "adopt"): {"contents": "write"},
    # Branches with one changed pin, and their pull requests, whose checks then start.
    ("check-upstream", "bump"): {"contents": "write", "pull-requests": "write"},
    # A branch and its pull request: ledger and releases, `stable:`.
    ("publish", "publish"): {"contents": "write", "pull-requests": "write"},
    ("rollback", "rollback"): {"contents": "write", "pull-requests": "write"},
    # Only an App may list runners; GITHUB_TOKEN has no such right.
    ("runner-health", "ask"): {"actions": "read", "administration": "read", "contents": "read"},
}
# What people wrote, not the merge that GitHub made of it: records belong to the former.
_WRITTEN: Final = "${{ github.event.pull_request.head.sha || github.sha }}"
# Where another commit is taken than that of the event.
CHECKOUT_REFS: Final[Mapping[tuple[str, str], str]] = {
    ("model-pr", "plan"): _WRITTEN,
    ("model-pr", "gpu"): _WRITTEN,
    ("model-pr", "gate"): _WRITTEN,
    ("model-pr", "adopt"): _WRITTEN,
}
# Artifacts that jobs hand over: patterns of their names to the only path that is packed. Reports;
# GGUFs go by the DVC remote.
ARTIFACTS: Final[Mapping[str, str]] = {
    r"plan": "plan.json",
    r"gate": "gate.json",
    r"bundle-.+": "bundles",
    r"upstream": "upstream.json",
    r"runners": "runners.json",
    r"health-.+": "health-${{ matrix.host }}.json",
}
# What actions/fleet does itself, before there is an environment in which a verb could run.
BOOTSTRAP: Final = "bootstrap"

# A pull request of this repository, not of a fork: whoever opened it may push here anyway.
OWN_PULL_REQUEST: Final = "github.event.pull_request.head.repo.full_name == github.repository"
# A branch may say anything of registries and releases; a tag can have the name of a branch.
DEFAULT_BRANCH: Final = (
    "github.ref == format('refs/heads/{0}', github.event.repository.default_branch)"
)
# The same where a timer and a relay start it too: their events name no default branch, and they run
# on no other.
DISPATCHED_ON_DEFAULT_BRANCH: Final = (
    f"(github.event_name != 'workflow_dispatch' || {DEFAULT_BRANCH})"
)

# A repository that others are made of is nobody's fleet.
NOT_THE_TEMPLATE: Final = "!github.event.repository.is_template"

# What `make test` wants and GitHub's machines have not.
_INSTALL: Final = (
    "sudo apt-get update --quiet && sudo apt-get install --yes --quiet "
    "--no-install-recommends docker-registry nginx-light zstd ninja-build"
)
_CHECKOUT: Final = "actions/checkout"
_SETUP: Final = "./actions/setup"
_TAKE: Final = "actions/download-artifact"
_HAND_OVER: Final = "actions/upload-artifact"
_APP: Final = "actions/create-github-app-token"
_ATTEST: Final = "actions/attest"
_HEALTH: Final = "./actions/runner-health"
_LOOK: Final = "./actions/check-upstream"

_APP_KEY: Final = "FLEET_APP_KEY"
_LOGINS: Final = frozenset(
    {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_USERNAME",
     "MLFLOW_TRACKING_PASSWORD", "REGISTRY_USERNAME", "REGISTRY_PASSWORD"}
)  # fmt: skip
# Holds the key of the App for jobs that have no environment of a registry; deploys nothing.
_BOT: Final = {"name": "bot", "deployment": False}
# One measurement, or probe, of a host at a time.
_ONE_PER_HOST: Final = {
    "group": "gpu-${{ matrix.host }}",
    "queue": "max",
    "cancel-in-progress": False,
}
# A publish that waits for its approval holds its group; a rollback must not wait for that.
_PUBLISHING: Final = {"group": "publish", "queue": "max", "cancel-in-progress": False}
_ROLLING_BACK: Final = {"group": "rollback", "queue": "max", "cancel-in-progress": False}

WORKFLOWS: Final[Mapping[str, Workflow]] = {
    "ci": Workflow(
        on={"push": {"branches": ["main"]}, "pull_request": None, "merge_group": None},
        concurrency={"group": "ci-${{ github.ref }}", "cancel-in-progress": True},
        cache_mode="none",
        jobs={
            "check": Job(permissions=READS, steps=(_CHECKOUT, "make check")),
            "test": Job(
                permissions=READS,
                steps=(
                    _CHECKOUT,
                    _INSTALL,
                    "make test",
                ),
            ),
            "ok": Job(
                permissions={},
                steps=('test "$RESULTS" = "success success"',),
                needs=("check", "test"),
            ),
        },
    ),
    "model-pr": Workflow(
        on={
            "pull_request": {"types": ["opened", "synchronize", "reopened", "labeled"]},
            "merge_group": None,
        },
        concurrency={
            "group": "model-pr-${{ github.event.pull_request.number || github.ref }}",
            "cancel-in-progress": "${{ github.event.action != 'labeled' || "
            "github.event.label.name == 'over-budget' }}",
        },
        cache_mode="none",
        jobs={
            "plan": Job(permissions=READS, steps=(_CHECKOUT, _SETUP, "./actions/plan", _HAND_OVER)),
            # Runs the tools on files of strangers: reads, and hands over artifacts.
            "gpu": Job(
                permissions=READS,
                steps=(
                    _CHECKOUT,
                    _SETUP,
                    _TAKE,
                    "./actions/quantize",
                    "./actions/benchmark",
                    "./actions/load-test",
                    "./actions/compare",
                    "./actions/bundle",
                    _HAND_OVER,
                ),
                needs=("plan",),
                guards=(OWN_PULL_REQUEST,),
                concurrency=_ONE_PER_HOST,
            ),
            # Judges what that one measured, so it runs no tool and may not write either.
            "gate": Job(
                permissions=READS,
                steps=(_CHECKOUT, _SETUP, _TAKE, _TAKE, "./actions/gate", _HAND_OVER),
                needs=("plan", "gpu"),
            ),
            "adopt": Job(
                permissions={"contents": ("write", "one commit of records on the branch")},
                steps=(_CHECKOUT, _SETUP, _TAKE, _APP, "./actions/adopt"),
                needs=("gate",),
                guards=(OWN_PULL_REQUEST,),
                environment=_BOT,
                secrets=frozenset({_APP_KEY}),
            ),
        },
    ),
    "report": Workflow(
        on={"workflow_run": {"workflows": ["model PR"], "types": ["requested", "completed"]}},
        concurrency={
            "group": "report-${{ github.event.workflow_run.head_repository.full_name }}-"
            "${{ github.event.workflow_run.head_branch }}",
            "queue": "max",
            "cancel-in-progress": False,
        },
        cache_mode="none",
        jobs={
            "comment": Job(
                permissions={
                    **READS,
                    "actions": ("read", "takes the artifact of the run"),
                    "checks": ("write", "the check run with annotations on params.yaml"),
                    "pull-requests": ("write", "the comment"),
                },
                steps=(_CHECKOUT, _SETUP, "./actions/comment"),
            ),
        },
    ),
    "check-upstream": Workflow(
        on={
            "schedule": [{"cron": "41 4 * * *"}],
            "workflow_dispatch": {"inputs": {"models": {"type": "string", "default": ""}}},
            "repository_dispatch": {"types": ["hub-webhook"]},
        },
        # One that waits may be replaced: the next one looks at the same.
        concurrency={"group": "check-upstream", "cancel-in-progress": False},
        cache_mode="none",
        jobs={
            # Reads what strangers wrote on the Hub: writes nothing.
            "look": Job(
                permissions={
                    **READS,
                    "actions": ("read", "the record of the last look"),
                    "issues": ("read", "whether an issue is open"),
                    "pull-requests": ("read", "whether a proposal is open"),
                },
                steps=(_CHECKOUT, _SETUP, _LOOK, _HAND_OVER),
                guards=(DISPATCHED_ON_DEFAULT_BRANCH,),
                environment=_BOT,
                secrets=frozenset({"HF_TOKEN"}),
            ),
            "bump": Job(
                permissions={
                    "contents": ("write", "branches with one changed pin"),
                    "pull-requests": ("write", "their pull requests, with labels"),
                },
                steps=(_CHECKOUT, _SETUP, _TAKE, _APP, "./actions/bump"),
                needs=("look",),
                environment=_BOT,
                secrets=frozenset({_APP_KEY}),
            ),
            "issue": Job(
                permissions={**READS, "issues": ("write", "one issue for a person")},
                steps=(_CHECKOUT, _SETUP, _TAKE, _LOOK),
                needs=("look",),
            ),
        },
    ),
    "publish": Workflow(
        on={
            "push": {
                "branches": ["main"],
                "paths": ["params.yaml", "dvc.lock", "modelfiles/**", "results/**"],
            },
            "workflow_dispatch": {
                "inputs": {
                    "model": {"type": "string", "default": ""},
                    "reason": {"type": "string", "default": ""},
                },
            },
        },
        concurrency=_PUBLISHING,
        cache_mode="none",
        jobs={
            "plan": Job(
                permissions=READS,
                steps=(_CHECKOUT, _SETUP, 'actions/fleet publish --plan -- "$FLEET_MODEL"'),
                guards=(DEFAULT_BRANCH,),
            ),
            "publish": Job(
                permissions={
                    "contents": ("write", "the branch with the ledger"),
                    "pull-requests": ("write", "its pull request"),
                    "id-token": ("write", "signs as this workflow"),
                    "attestations": ("write", "keeps what was signed"),
                },
                # The second attestation is for what is more than one takes.
                steps=(_CHECKOUT, _SETUP, _APP, "./actions/publish", _ATTEST, _ATTEST),
                needs=("plan",),
                environment="${{ matrix.environment }}",
                secrets=frozenset({_APP_KEY}) | _LOGINS,
            ),
        },
    ),
    "rollback": Workflow(
        on={
            "workflow_dispatch": {
                "inputs": {
                    "model": {"type": "string", "required": True},
                    "to": {"type": "string", "required": True, "default": "previous"},
                    "reason": {"type": "string", "required": True},
                    "registry": {"type": "string", "default": ""},
                    "environment": {"type": "string", "required": True, "default": "production"},
                },
            },
        },
        concurrency=_ROLLING_BACK,
        cache_mode="none",
        jobs={
            "rollback": Job(
                permissions={
                    "contents": ("write", "the branch with `stable:` and ledger"),
                    "pull-requests": ("write", "its pull request"),
                },
                steps=(_CHECKOUT, _SETUP, _APP, "./actions/rollback"),
                guards=(DEFAULT_BRANCH,),
                environment="${{ inputs.environment }}",
                secrets=frozenset({_APP_KEY}) | _LOGINS,
            ),
        },
    ),
    "template-init": Workflow(
        on={
            "push": {"branches": ["main"], "paths": [".github/CODEOWNERS"]},
            "workflow_dispatch": {
                "inputs": {
                    "model": {"type": "string", "default": ""},
                    "host": {"type": "string", "default": ""},
                    "vram": {"type": "string", "default": ""},
                    "registry": {"type": "string", "default": ""},
                },
            },
        },
        # One that waits may be replaced: nobody asks twice within a minute.
        concurrency={"group": "template-init", "cancel-in-progress": False},
        cache_mode="none",
        jobs={
            "init": Job(
                permissions={
                    "contents": ("write", "the branch fleet/init"),
                    "pull-requests": ("write", "its pull request"),
                },
                steps=(_CHECKOUT, _SETUP, "./actions/init"),
                guards=(DEFAULT_BRANCH, NOT_THE_TEMPLATE),
            ),
        },
    ),
    "runner-health": Workflow(
        on={"schedule": [{"cron": "17 */6 * * *"}], "workflow_dispatch": None},
        concurrency={"group": "runner-health", "cancel-in-progress": False},
        cache_mode="none",
        jobs={
            "ask": Job(
                permissions={**READS, "actions": ("read", "jobs that wait, where there is no App")},
                steps=(_CHECKOUT, _SETUP, _APP, _HEALTH, _HAND_OVER),
                environment=_BOT,
                secrets=frozenset({_APP_KEY}),
            ),
            "probe": Job(
                permissions=READS,
                steps=(_CHECKOUT, _SETUP, _HEALTH, _HAND_OVER),
                needs=("ask",),
                concurrency=_ONE_PER_HOST,
            ),
            "issues": Job(
                permissions={**READS, "issues": ("write", "one issue for each sick host")},
                steps=(_CHECKOUT, _SETUP, _TAKE, _TAKE, _HEALTH),
                needs=("ask", "probe"),
            ),
        },
    ),
}
