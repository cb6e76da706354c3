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
        needs: Jobs that it waits for.
        guards: Conditions that its `if:` joins with `&&`, as they are written.
        environment: Its `environment:`, as it is written; holds approval and secrets.
        concurrency: Its `concurrency:`, as it is written.
        secrets: Secrets that it may read.
    """

    permissions: Rights
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
        on: Its triggers, as they are written.
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
    ("model-pr", "gpu"): "${{ fromJSON(matrix.runs_on) }}",
    ("runner-health", "probe"): "${{ fromJSON(matrix.runs_on) }}",
}
# Minutes that the declaration states: `plan.timeout_minutes`, held between 1 and 360 by its schema.
DECLARED_TIMEOUTS: Final = ("${{ matrix.timeout_minutes }}",)
ID_TOKEN_IN: Final[Mapping[str, tuple[str, ...]]] = {"publish": ("publish",)}
# Branch protection asks for these names.
REQUIRED_CHECKS: Final[Mapping[tuple[str, str], str]] = {
    ("ci", "ok"): "ci",
    ("model-pr", "gate"): "gate",
}
# Rights of a token of the App, by the job that asks for one.
APP_TOKENS: Final[Mapping[tuple[str, str], Mapping[str, str]]] = {
    ("model-pr", "adopt"): {"contents": "write"},
    ("publish", "ledger"): {"contents": "write", "pull-requests": "write"},
    ("rollback", "propose"): {"contents": "write", "pull-requests": "write"},
    ("runner-health", "ask"): {"administration": "read"},
}
CHECKOUT_REFS: Final[Mapping[tuple[str, str], str]] = {}
# Names of artifacts that jobs hand over, as patterns of Python.
ARTIFACTS: Final = (r"plan", r"gate", r"bundle-.+")
# What actions/fleet does itself, before there is an environment in which a verb could run.
BOOTSTRAP: Final = "bootstrap"

# A pull request of this repository, not of a fork: whoever opened it may push here anyway.
OWN_PULL_REQUEST: Final = "github.event.pull_request.head.repo.full_name == github.repository"

WORKFLOWS: Final[Mapping[str, Workflow]] = {}
