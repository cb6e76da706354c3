"""
What starts workflows, as GitHub tells it: the `github` context of each event, from real payloads.

The payloads are those of @octokit/webhooks-examples. Each is adapted to one repository, `o/r`, so
that a pull request of that repository and one of a fork differ in nothing else.
"""

from __future__ import annotations

import copy
import functools
import json
from typing import Any, Final

import pytest

from checks import installed

REPOSITORY: Final = "o/r"
FORK: Final = "stranger/r"
HEAD: Final = "1" * 40
_EXAMPLES: Final = "node_modules/@octokit/webhooks-examples/api.github.com/index.json"


@functools.cache
def _examples() -> dict[str, list[dict[str, Any]]]:
    try:
        path = installed.node_packages() / _EXAMPLES
    except installed.MissingError as missing:
        pytest.skip(missing.message)
    return {kind["name"]: kind["examples"] for kind in json.loads(path.read_text(encoding="utf-8"))}


def payload(event: str, action: str | None = None) -> dict[str, Any]:
    """Return a real payload of an event, of repository `o/r`."""
    found = next(
        (each for each in _examples()[event] if action in {None, each.get("action")}), None
    )
    assert found is not None, f"no example of {event} {action}"
    adapted = copy.deepcopy(found)
    adapted["repository"].update(
        full_name=REPOSITORY,
        fork=False,
        default_branch="main",
        private=False,
        is_template=False,
    )
    return adapted


def pull_request(
    action: str = "synchronize", *, fork: bool = False, label: str | None = None
) -> dict[str, Any]:
    """Return the context of a pull request of this repository, or of a fork."""
    event = payload("pull_request", "opened")
    event.update(action=action, number=7)
    pull = event["pull_request"]
    pull.update(number=7, draft=False, state="closed" if action == "closed" else "open")
    pull["head"].update(ref="bump/tiny", sha=HEAD)
    pull["head"]["repo"]["full_name"] = FORK if fork else REPOSITORY
    pull["base"].update(ref="main")
    pull["base"]["repo"]["full_name"] = REPOSITORY
    pull["labels"] = [{"name": label}] if label else []
    if label:
        event["label"] = {"name": label}
    return _context("pull_request", event, ref="refs/pull/7/merge", head_ref="bump/tiny",
                    base_ref="main")  # fmt: skip


def merge_group() -> dict[str, Any]:
    """Return the context of a merge queue that asks for checks."""
    event = payload("merge_group", "checks_requested")
    return _context("merge_group", event, ref="refs/heads/gh-readonly-queue/main/pr-7-abc")


def push(
    ref: str = "refs/heads/main", *, private: bool = False, template: bool = False
) -> dict[str, Any]:
    """Return the context of a push to a branch or tag."""
    event = payload("push")
    event["ref"] = ref
    event["repository"].update(private=private, is_template=template)
    return _context("push", event, ref=ref)


def schedule() -> dict[str, Any]:
    """Return the context of a timer, which has no payload to speak of."""
    return _context("schedule", {"schedule": "17 */6 * * *"}, ref="refs/heads/main")


def dispatch(
    ref: str = "refs/heads/main", *, private: bool = False, template: bool = False
) -> dict[str, Any]:
    """Return the context of a run that somebody started by hand, on a branch or tag."""
    event = payload("workflow_dispatch")
    event["ref"] = ref
    event["repository"].update(private=private, is_template=template)
    return _context("workflow_dispatch", event, ref=ref)


def repository_dispatch() -> dict[str, Any]:
    """Return the context of a run that a relay started from outside."""
    event = payload("repository_dispatch")
    event.update(action="hub-webhook", branch="main")
    return _context("repository_dispatch", event, ref="refs/heads/main")


def workflow_run(
    action: str = "completed", *, conclusion: str | None = "success", fork: bool = False,
    event_name: str = "pull_request",
) -> dict[str, Any]:  # fmt: skip
    """Return the context of a run of another workflow that began or ended."""
    event = payload("workflow_run", "completed")
    run = event["workflow_run"]
    run.update(conclusion=conclusion, event=event_name, head_sha=HEAD, head_branch="bump/tiny",
               status="completed" if action == "completed" else "queued")  # fmt: skip
    run["head_repository"] = {**(run.get("head_repository") or {}),
                              "full_name": FORK if fork else REPOSITORY}  # fmt: skip
    event["action"] = action
    return _context("workflow_run", event, ref="refs/heads/main")


def _context(name: str, event: dict[str, Any], **more: str) -> dict[str, Any]:
    ref = more["ref"]
    return {
        "event_name": name,
        "event": event,
        "repository": REPOSITORY,
        "repository_owner": "o",
        "sha": "2" * 40,
        "ref_name": ref.split("/", 2)[2],
        "ref_type": "tag" if ref.startswith("refs/tags/") else "branch",
        "workflow": "some workflow",
        "run_id": "77",
        "run_attempt": "1",
        "run_number": "5",
        "actor": "somebody",
        "head_ref": "",
        "base_ref": "",
        "server_url": "https://github.com",
        "api_url": "https://api.github.com",
    } | more
