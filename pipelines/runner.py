"""
What a GitHub Actions runner gives to a step and takes from it: files that it names in variables.

    GITHUB_OUTPUT          outputs of the step     `outputs(models="a b", any=True)`
    GITHUB_ENV             variables of all later steps of the job
    GITHUB_STEP_SUMMARY    Markdown of the job     `summary("## Plan ...")`
    GITHUB_EVENT_PATH      what started the run    `event()`, `pull_request()`, `head()`, `base()`

Outside Actions nothing is written, and there is no event: the same verb is typed by people. The
formats are those of actions/runner (src/Runner.Worker/FileCommandManager.cs); the limits those of
docs.github.com, "Workflow commands for GitHub Actions".
"""

from __future__ import annotations

import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipelines import console
from pipelines.errors import FleetError, MachineError

# A summary that is larger is dropped by the runner, with a line in a log that nobody reads.
SUMMARY_LIMIT_BYTES: Final = 1 << 20
# Of all outputs of a job, as UTF-16.
OUTPUT_LIMIT_BYTES: Final = 1 << 20
# GitHub sends no payload above 25 MB.
_EVENT_LIMIT_BYTES: Final = 25 << 20
_CUT: Final = "> This summary was too long for GitHub; what follows is its beginning.\n\n"
_OUTPUT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,99}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}/[A-Za-z0-9._-]{1,100}")

in_actions = console.in_actions


@dataclass(frozen=True, kw_only=True)
class PullRequest:
    """
    The pull request that an event is about; all text of it is a stranger's.

    Attributes:
        number: Of the pull request.
        head: Commit at the end of its branch; not the merge that `GITHUB_SHA` names.
        base: Commit of the branch that it wants to change, when the event was sent.
        head_ref: Name of its branch.
        base_ref: Name of the other.
        head_repository: owner/name of the repository of its branch; None if that is gone.
        repository: owner/name of ours.
        labels: Names of its labels.
    """

    number: int
    head: str
    base: str
    head_ref: str
    base_ref: str
    head_repository: str | None
    repository: str
    labels: tuple[str, ...]

    @property
    def is_from_fork(self) -> bool:
        """Whether its branch is in another repository than ours, or nobody knows where."""
        return self.head_repository != self.repository


# --- given by the runner ----------------------------------------------------------------------


def event_name() -> str:
    """Return what started the run, `pull_request`; empty outside Actions."""
    return os.environ.get("GITHUB_EVENT_NAME", "") if in_actions() else ""


def event() -> dict[str, Any]:
    """
    Return the payload of the webhook that started the run; empty outside Actions.

    Raises:
        MachineError: The runner names a file that is not there, too large or no JSON object.
    """
    path = os.environ.get("GITHUB_EVENT_PATH", "")
    if not in_actions() or not path:
        return {}
    try:
        with Path(path).open("rb") as file:
            data = file.read(_EVENT_LIMIT_BYTES + 1)
    except OSError as error:
        raise MachineError(f"GITHUB_EVENT_PATH cannot be read: {error}.") from error
    if len(data) > _EVENT_LIMIT_BYTES:
        raise MachineError(f"{path} has more bytes than GitHub sends ({_EVENT_LIMIT_BYTES:,}).")
    try:
        payload = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MachineError(f"{path} is not the JSON of an event: {type(error).__name__}.") from None
    if not isinstance(payload, dict):
        raise MachineError(f"{path} is not the JSON of an event: no object.")
    return payload


def pull_request() -> PullRequest | None:
    """
    Return the pull request that started the run; None if something else did.

    Raises:
        MachineError: The event lacks what GitHub sends with every pull request.
    """
    payload = event()
    told = payload.get("pull_request")
    if not isinstance(told, dict):
        return None
    try:
        head, base = told["head"], told["base"]
        head_repository = (head.get("repo") or {}).get("full_name")
        return PullRequest(
            number=_number(told["number"]),
            head=_commit(head["sha"]),
            base=_commit(base["sha"]),
            head_ref=_text(head["ref"]),
            base_ref=_text(base["ref"]),
            head_repository=None if head_repository is None else _repository(head_repository),
            repository=_repository(base["repo"]["full_name"]),
            labels=tuple(_text(label["name"]) for label in told.get("labels") or ()),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MachineError(f"the event is no pull request as GitHub sends them: {error}.") from None


def head() -> str | None:
    """
    Return the commit that the run is about, as 40 hex digits; None outside Actions.

    For a pull request the end of its branch: `GITHUB_SHA` is a merge that nobody made.
    """
    return _end("head_sha", pull="head", push="after") or _own_sha()


def base() -> str | None:
    """
    Return the commit that the run is held against; None outside Actions, and where there is none.

    For a pull request and a merge group that of the branch that they want to change; for a push
    what the branch was before. The first push of a branch has none.
    """
    return _end("base_sha", pull="base", push="before")


def _end(of_group: str, *, pull: str, push: str) -> str | None:
    """Find one end of the change that the event is about."""
    request = pull_request()
    if request is not None:
        end: str = getattr(request, pull)
        return end
    payload = event()
    group = payload.get("merge_group")
    told = group.get(of_group) if isinstance(group, dict) else payload.get(push)
    return (
        told if isinstance(told, str) and _COMMIT.fullmatch(told) and set(told) != {"0"} else None
    )


def _own_sha() -> str | None:
    told = os.environ.get("GITHUB_SHA", "") if in_actions() else ""
    return told if _COMMIT.fullmatch(told) else None


def repository() -> str | None:
    """Return owner/name of the repository that the run belongs to; None outside Actions."""
    told = os.environ.get("GITHUB_REPOSITORY", "") if in_actions() else ""
    return told if _REPOSITORY.fullmatch(told) else None


def run_url() -> str | None:
    """Return the address of the run on GitHub; None outside Actions."""
    name, number = repository(), os.environ.get("GITHUB_RUN_ID", "")
    if name is None or not number.isdecimal():
        return None
    server = os.environ.get("GITHUB_SERVER_URL") or "https://github.com"
    return f"{server}/{name}/actions/runs/{number}"


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 53:
        raise ValueError("number")
    return value


def _commit(value: object) -> str:
    if not isinstance(value, str) or not _COMMIT.fullmatch(value):
        raise ValueError("sha")
    return value


def _repository(value: object) -> str:
    if not isinstance(value, str) or not _REPOSITORY.fullmatch(value):
        raise ValueError("full_name")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("name")
    return value


# --- taken by the runner ----------------------------------------------------------------------


def outputs(**values: str | float) -> None:
    """
    Give the step its outputs; nothing happens outside Actions.

    Args:
        values: By name, `_` as in Python; true and false as GitHub's expressions spell them. Text
            may have lines: each value is framed by a line that nobody can guess, so that text of
            a stranger becomes no other output.

    Raises:
        FleetError: The name is none, or the values are larger than GitHub takes.
    """
    path = os.environ.get("GITHUB_OUTPUT", "")
    if not in_actions() or not path:
        return
    framed = "".join(_framed(name, _spelled(value)) for name, value in values.items())
    if len(framed.encode("utf-16-le", "replace")) > OUTPUT_LIMIT_BYTES:
        raise FleetError(
            f"the outputs {', '.join(values)} are larger than the 1 MiB that GitHub takes."
        )
    with Path(path).open("ab") as file:
        file.write(framed.encode("utf-8", "replace"))


def _framed(name: str, value: str) -> str:
    if not _OUTPUT_NAME.fullmatch(name):
        raise FleetError(f"{name!r} is no name of an output or a variable.")
    frame = f"fleet-{secrets.token_hex(16)}"
    return f"{name}<<{frame}\n{value}\n{frame}\n"


def _spelled(value: str | float) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def environment(**values: str) -> None:
    """Give every later step of the job these variables; nothing happens outside Actions."""
    path = os.environ.get("GITHUB_ENV", "")
    if in_actions() and path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write("".join(_framed(name, value) for name, value in values.items()))


def summary(markdown: str) -> None:
    """
    Add Markdown to the summary of the job; nothing happens outside Actions.

    What is longer than GitHub shows is cut at the end of a line, and the first line says so.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY", "")
    if not in_actions() or not path:
        return
    file_path = Path(path)
    room = SUMMARY_LIMIT_BYTES - (file_path.stat().st_size if file_path.exists() else 0)
    data = markdown.rstrip("\n").encode("utf-8", "replace") + b"\n"
    if len(data) > room:
        cut = _CUT.encode()
        kept = data[: max(room - len(cut) - 1, 0)]
        data = cut + kept[: kept.rfind(b"\n") + 1]
        console.warn("the summary of this step is longer than GitHub shows, and was cut.")
    if len(data) <= room:
        with file_path.open("ab") as file:
            file.write(data)


def mask(secret: str) -> None:
    """Have the runner replace a secret by *** wherever a log would show it."""
    if in_actions():
        for line in secret.splitlines():
            if line.strip():
                console.info(f"::add-mask::{line.replace('%', '%25')}")
