"""
One check run of ours on a commit, with annotations on lines of its files.

A check run can be changed by the App that made it alone, and none can be removed; GitHub shows the
latest of a name. Annotations can be added and never taken back, so a check run that has some is not
changed to other ones: a new one is made.

Limits (the OpenAPI description): 65,535 characters in summary and in text, 50 annotations a call.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from pipelines.github.client import Unsent, taken
from pipelines.github.comments import Order
from pipelines.github.errors import GitHubError, UnknownOutcomeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pipelines.github.client import GitHub

MOST_CHARACTERS: Final = 65_535
ANNOTATIONS_A_CALL: Final = 50
# GitHub shows no more of them anywhere.
MOST_ANNOTATIONS: Final = 500
_TITLE_CHARACTERS: Final = 255
_MESSAGE_BYTES: Final = 64 << 10
_CUT: Final = "\n\n... (cut: too long for a check run; the comment has all of it)"

Conclusion = Literal[
    "action_required", "cancelled", "failure", "neutral", "success", "skipped", "timed_out"
]


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """A sentence at lines of a file of the commit; lines count from 1."""

    path: str
    line: int
    message: str
    title: str = ""
    level: Literal["notice", "warning", "failure"] = "failure"


@dataclass(frozen=True, kw_only=True)
class CheckRun:
    """
    What a check run says.

    Attributes:
        title: One line.
        summary: Markdown.
        conclusion: None while it runs.
        annotations: Beyond 500 the rest is left out.
        details_url: Where the whole of it is.
    """

    title: str
    summary: str
    conclusion: Conclusion | None
    annotations: Sequence[Annotation] = ()
    details_url: str | None = None


def upsert_check(  # noqa: PLR0913 - what a check run is, and whom to believe
    gh: GitHub,
    head: str,
    name: str,
    check: CheckRun,
    order: Order,
    *,
    believed: Callable[[Order], bool] | None = None,
) -> bool:
    """
    Say something about a commit under a name, unless a newer run said something already.

    Args:
        gh: The repository.
        head: The commit.
        name: Of the check run.
        check: What it says.
        order: Of the run that is reported.
        believed: As in `comments.upsert_comment`; beside one that is not, a new one is made.

    Returns:
        Whether it is said; False if a newer run's word stands there.

    Raises:
        GitHubError: It is refused.
        RetryLaterError: It cannot be done now.
    """
    for _ in range(4):
        there = _latest(gh, head, name)
        if there is not None and there.order > order:
            if believed is None or believed(there.order):
                return False
            there = None
        try:
            _write(gh, head, name, check, order, there)
        except UnknownOutcomeError:
            continue
        return True
    raise UnknownOutcomeError(
        f"The check run {name} of {head[:12]} could not be written: every answer was lost.",
        hint="Run the job again.",
    )


@dataclass(frozen=True)
class _There:
    id: int
    order: Order
    annotations: int
    completed: bool


def _latest(gh: GitHub, head: str, name: str) -> _There | None:
    """Return ours of the newest run, by the mark that we leave in `external_id`."""
    found: list[_There] = []
    for each in gh.paged(f"commits/{head}/check-runs", "check_runs", check_name=name, filter="all"):
        mark = re.fullmatch(
            r"fleet/([0-9]{1,19})/([0-9]{1,9})/([01])", str(each.get("external_id") or "")
        )
        if mark is None or each.get("name") != name:
            continue
        output = each.get("output")
        count = output.get("annotations_count") if isinstance(output, dict) else 0
        run_id, attempt, phase = (int(part) for part in mark.groups())
        found.append(
            _There(
                taken(each, "id", int),
                Order(run_id, attempt, phase),
                count if isinstance(count, int) else 0,
                each.get("status") == "completed",
            )
        )
    return max(found, key=lambda each: (each.order, each.id), default=None)


def _write(  # noqa: PLR0913, PLR0917 - see upsert_check
    gh: GitHub, head: str, name: str, check: CheckRun, order: Order, there: _There | None
) -> None:
    parts = list(_parts(check.annotations))
    fields = _fields(check, order)
    made: Any = None
    # A check run that is over is not taken back to running by a change of it.
    if (
        there is not None
        and not there.annotations
        and not (there.completed and not check.conclusion)
    ):
        try:
            made = gh.patch(f"check-runs/{there.id}", fields | {"output": _output(check, parts[0])})
        except GitHubError as error:
            if error.status not in {403, 404, 422}:
                raise
            # Of another App than ours, or its suite is over.
    if made is None:
        made = gh.post(
            "check-runs",
            {"name": name, "head_sha": head, **fields, "output": _output(check, parts[0])},
        )
    number = made["id"] if isinstance(made, Unsent) else taken(made, "id", int)
    for part in parts[1:]:
        gh.patch(f"check-runs/{number}", {"output": _output(check, part)}, repeatable=False)


def _fields(check: CheckRun, order: Order) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "external_id": f"fleet/{order.run_id}/{order.attempt}/{order.phase}",
        "status": "completed" if check.conclusion else "in_progress",
    }
    if check.conclusion:
        fields["conclusion"] = check.conclusion
    if check.details_url:
        fields["details_url"] = check.details_url
    return fields


def _output(check: CheckRun, annotations: list[dict[str, Any]]) -> dict[str, Any]:
    summary = check.summary
    if len(summary) > MOST_CHARACTERS:
        summary = summary[: MOST_CHARACTERS - len(_CUT)] + _CUT
    output: dict[str, Any] = {"title": check.title[:_TITLE_CHARACTERS], "summary": summary}
    if annotations:
        output["annotations"] = annotations
    return output


def _parts(annotations: Sequence[Annotation]) -> Iterator[list[dict[str, Any]]]:
    shown = [_annotation(each) for each in annotations[:MOST_ANNOTATIONS]]
    for start in range(0, max(1, len(shown)), ANNOTATIONS_A_CALL):
        yield shown[start : start + ANNOTATIONS_A_CALL]


def _annotation(each: Annotation) -> dict[str, Any]:
    message = each.message.encode()[:_MESSAGE_BYTES].decode(errors="ignore")
    fields: dict[str, Any] = {
        "path": each.path,
        "start_line": each.line,
        "end_line": each.line,
        "annotation_level": each.level,
        "message": message or each.level,
    }
    if each.title:
        fields["title"] = each.title[:_TITLE_CHARACTERS]
    return fields
