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
