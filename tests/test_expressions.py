"""
What every expression of a workflow says to every event, by GitHub's own evaluator.

A table holds each condition, label, matrix and group; one that is in no table fails by its name.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import github_events as github
import pytest

from checks import expressions, files, installed, node

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).resolve().parent.parent

EVENTS: Final[Mapping[str, Callable[[], dict[str, Any]]]] = {
    "pull request": github.pull_request,
    "pull request opened": lambda: github.pull_request("opened"),
    "pull request closed": lambda: github.pull_request("closed"),
    "label over-budget": lambda: github.pull_request("labeled", label="over-budget"),
    "another label": lambda: github.pull_request("labeled", label="question"),
    "fork": lambda: github.pull_request(fork=True),
    "fork with label over-budget": lambda: github.pull_request(
        "labeled", fork=True, label="over-budget"
    ),
    "merge group": github.merge_group,
    "push to main": github.push,
    "push to a branch": lambda: github.push("refs/heads/bump/tiny"),
    "push to main, private": lambda: github.push(private=True),
    "schedule": github.schedule,
    "dispatch": github.dispatch,
    "dispatch, private": lambda: github.dispatch(private=True),
    "dispatch on a branch": lambda: github.dispatch("refs/heads/bump/tiny"),
    "dispatch on a tag called main": lambda: github.dispatch("refs/tags/main"),
    "push to main of the template": lambda: github.push(template=True),
    "dispatch in the template": lambda: github.dispatch(template=True),
    "hub webhook": github.repository_dispatch,
    "run requested": lambda: github.workflow_run("requested", conclusion=None),
    "run succeeded": github.workflow_run,
    "run failed": lambda: github.workflow_run(conclusion="failure"),
    "run cancelled": lambda: github.workflow_run(conclusion="cancelled"),
    "run of a fork": lambda: github.workflow_run(fork=True),
    "run of a merge group": lambda: github.workflow_run(event_name="merge_group"),
}
NONE: Final[frozenset[str]] = frozenset()
ALL: Final = frozenset(EVENTS)
OWN: Final = frozenset(
    {"pull request", "pull request opened", "pull request closed", "label over-budget",
     "another label"}
)  # fmt: skip
# A workflow_run has the ref of the default branch, whatever it is about.
ON_MAIN: Final = frozenset(
    {"push to main", "push to main, private", "push to main of the template", "dispatch",
     "dispatch, private", "dispatch in the template", "hub webhook",
     *(event for event in EVENTS if event.startswith("run "))}
)  # fmt: skip
OFF_MAIN: Final = frozenset({"dispatch on a branch", "dispatch on a tag called main"})
IN_THE_TEMPLATE: Final = frozenset({"push to main of the template", "dispatch in the template"})
PUBLIC: Final = frozenset(event for event in EVENTS if not event.endswith(", private"))
RUNS: Final = frozenset(
    {"run requested", "run succeeded", "run failed", "run cancelled", "run of a fork"}
)


class Condition(NamedTuple):
    """
    An `if:`, what ran before it, and the events for which it then holds.

    Attributes:
        name: File and place.
        holds: Events for which what it guards runs; for all others it does not.
        given: Contexts beside `github`.
        status: How what ran before ended.
    """

    name: str
    holds: frozenset[str]
    given: Mapping[str, Any] = {}
    status: str = "success"


class Value(NamedTuple):
    """An expression that is no condition, and its value to each of some events."""

    name: str
    values: Mapping[str, Any]
    given: Mapping[str, Any] = {}


def needs(job: str, result: str = "success", **outputs: str) -> dict[str, Any]:
    """Return what a job that was waited for leaves behind."""
    return {"needs": {job: {"result": result, "outputs": outputs}}}


def even_if_it_failed(name: str) -> list[Condition]:
    """Return the rows of what runs after a failure and not after a cancel."""
    return [
        Condition(name, ALL),
        Condition(name, ALL, status="failure"),
        Condition(name, NONE, status="cancelled"),
    ]


def always(name: str) -> list[Condition]:
    """Return the rows of what runs however the rest ended."""
    return [Condition(name, ALL, status=s) for s in ("success", "failure", "cancelled")]


def with_an_app(name: str) -> list[Condition]:
    """Return the rows of what runs where an App is declared."""
    return [
        Condition(name, ALL, {"vars": {"FLEET_APP_CLIENT_ID": "Iv23"}}),
        Condition(name, NONE),
        Condition(name, NONE, {"vars": {"FLEET_APP_CLIENT_ID": "Iv23"}}, "failure"),
    ]


def where_something_is_to_do(name: str, planner: str, output: str = "any") -> list[Condition]:
    """Return the rows of what runs if the job before found something."""
    yes, no = {output: "true"}, {output: "false"}
    return [
        Condition(name, ALL, needs(planner, **yes)),
        Condition(name, NONE, needs(planner, **no)),
        Condition(name, NONE, needs(planner)),
        Condition(name, NONE, needs(planner, "failure", **yes), "failure"),
        Condition(name, NONE, needs(planner, "skipped"), "failure"),
        Condition(name, NONE, needs(planner, **yes), "cancelled"),
    ]


def published(**outputs: str) -> dict[str, Any]:
    """Return what the step that publishes left behind."""
    return {"steps": {"publish": {"outputs": outputs}}}


TWO: Final = published(checksums="checksums.txt", checksums_rest="checksums.2.txt")
ONE: Final = published(checksums="checksums.txt", checksums_rest="")
EMPTY: Final = published(checksums="", checksums_rest="")
ATTESTS: Final[dict[str, Any]] = {"vars": {"FLEET_ATTEST": "true"}}
UNSAID: Final[dict[str, Any]] = {"steps": {"publish": {"outputs": {}}}}

_GPU: Final = "model-pr jobs.gpu.if"
_ADOPT: Final = "model-pr jobs.adopt.if"
_FIRST: Final = 'publish jobs.publish.steps."Attest what was published".if'
_REST: Final = 'publish jobs.publish.steps."Attest the rest of it".if'
_ISSUES: Final = "runner-health jobs.issues.if"

CONDITIONS: Final = [
    *always("ci jobs.ok.if"),
    # Only a pull request of this repository gets to the operator's machine.
    Condition(_GPU, OWN, needs("plan", any="true")),
    Condition(_GPU, NONE, needs("plan", any="false")),
    Condition(_GPU, NONE, needs("plan")),
    Condition(_GPU, NONE, needs("plan", "failure", any="true"), "failure"),
    Condition(_GPU, NONE, needs("plan", any="true"), "cancelled"),
    *even_if_it_failed(
        'model-pr jobs.plan.steps."Hand over the plan, also one that says what is wrong".if'
    ),
    *even_if_it_failed(
        'model-pr jobs.gpu.steps."Pack the records, also those of a run that failed".if'
    ),
    *even_if_it_failed('model-pr jobs.gpu.steps."Hand over the records".if'),
    *always("model-pr jobs.gate.if"),
    *always('model-pr jobs.gate.steps."Hand over what was found".if'),
    # Also after a red gate: that a model was rejected belongs into the history.
    Condition(_ADOPT, OWN, needs("gate", new_records="true")),
    Condition(_ADOPT, OWN, needs("gate", "failure", new_records="true"), "failure"),
    Condition(_ADOPT, NONE, needs("gate", new_records="true"), "cancelled"),
    Condition(_ADOPT, NONE, needs("gate", new_records="false")),
    Condition(_ADOPT, NONE, needs("gate", "failure"), "failure"),
    *with_an_app("model-pr jobs.adopt.steps.app.if"),
    # A proposal changes the default branch, so the look is of that one. A timer tells no branch.
    Condition("check-upstream jobs.look.if", ALL - OFF_MAIN),
    *where_something_is_to_do("check-upstream jobs.bump.if", "look", "bump"),
    *with_an_app("check-upstream jobs.bump.steps.app.if"),
    *where_something_is_to_do("check-upstream jobs.issue.if", "look", "issue"),
    # What is published is what was agreed on, by whatever ref somebody starts it.
    Condition("publish jobs.plan.if", ON_MAIN),
    *where_something_is_to_do("publish jobs.publish.if", "plan"),
    *with_an_app("publish jobs.publish.steps.app.if"),
    # Where GitHub sells no attestations all is published without them, and nothing is red.
    Condition(_FIRST, PUBLIC, TWO),
    Condition(_FIRST, PUBLIC, ONE),
    Condition(_FIRST, PUBLIC, ONE, "failure"),
    Condition(_FIRST, NONE, ONE, "cancelled"),
    Condition(_FIRST, NONE, EMPTY),
    Condition(_FIRST, NONE, UNSAID, "failure"),
    # A private repository that GitHub sells attestations to says so.
    Condition(_FIRST, ALL, TWO | ATTESTS),
    Condition(_FIRST, PUBLIC, TWO | {"vars": {"FLEET_ATTEST": "false"}}),
    Condition(_FIRST, NONE, EMPTY | ATTESTS),
    Condition(_REST, PUBLIC, TWO),
    Condition(_REST, ALL, TWO | ATTESTS),
    Condition(_REST, NONE, ONE),
    Condition(_REST, NONE, UNSAID, "failure"),
    # Of forks too: nothing of theirs runs. A merge queue has no pull request to report to.
    Condition("report jobs.comment.if", RUNS),
    Condition("rollback jobs.rollback.if", ON_MAIN),
    *with_an_app("rollback jobs.rollback.steps.app.if"),
    Condition("template-init jobs.init.if", ON_MAIN - IN_THE_TEMPLATE),
    *with_an_app("runner-health jobs.ask.steps.app.if"),
    *where_something_is_to_do("runner-health jobs.probe.if", "ask"),
    Condition(_ISSUES, ALL, needs("ask")),
    Condition(_ISSUES, ALL, needs("ask"), "failure"),
    Condition(_ISSUES, NONE, needs("ask", "failure"), "failure"),
    Condition(_ISSUES, NONE, needs("ask"), "cancelled"),
]

MATRIX: Final = '{"include": [{"host": "local", "models": "tiny-llama"}]}'
LEGS: Final = {"include": [{"host": "local", "models": "tiny-llama"}]}
LEG: Final = {
    "matrix": {"host": "local", "runs_on": ["self-hosted", "gpu"], "timeout_minutes": 240,
               "environment": "production"}
}  # fmt: skip
LABELS: Final = ["self-hosted", "gpu"]

VALUES: Final = [
    Value(
        "ci concurrency.group",
        {"pull request": "ci-refs/pull/7/merge", "push to main": "ci-refs/heads/main",
         "merge group": "ci-refs/heads/gh-readonly-queue/main/pr-7-abc"},
    ),
    # One group for each pull request, whatever happens to it; none is shared with a push.
    Value(
        "model-pr concurrency.group",
        {"pull request": "model-pr-7", "label over-budget": "model-pr-7", "fork": "model-pr-7",
         "merge group": "model-pr-refs/heads/gh-readonly-queue/main/pr-7-abc"},
    ),
    Value(
        "model-pr concurrency.cancel-in-progress",
        {"pull request": True, "pull request opened": True, "label over-budget": True,
         "another label": False, "fork": True, "merge group": True},
    ),
    Value("model-pr jobs.gpu.strategy.matrix", {"pull request": LEGS},
          needs("plan", matrix=MATRIX)),
    Value("model-pr jobs.gpu.runs-on", {"pull request": LABELS}, LEG),
    Value("model-pr jobs.gpu.timeout-minutes", {"pull request": 240}, LEG),
    # The same group as a probe of the host: they never run beside one another.
    Value("model-pr jobs.gpu.concurrency.group", {"pull request": "gpu-local"}, LEG),
    Value("runner-health jobs.probe.concurrency.group", {"schedule": "gpu-local"}, LEG),
    Value("publish jobs.publish.strategy.matrix", {"push to main": LEGS},
          needs("plan", matrix=MATRIX)),
    Value("publish jobs.publish.environment", {"push to main": "production"}, LEG),
    Value(
        "report concurrency.group",
        {"run requested": "report-o/r-bump/tiny", "run succeeded": "report-o/r-bump/tiny",
         "run of a fork": "report-stranger/r-bump/tiny"},
    ),
    Value("rollback jobs.rollback.environment", {"dispatch": "production"},
          {"inputs": {"environment": "production"}}),
    Value("runner-health jobs.probe.strategy.matrix", {"schedule": LEGS},
          needs("ask", matrix=MATRIX)),
    Value("runner-health jobs.probe.runs-on", {"schedule": LABELS}, LEG),
    Value("runner-health jobs.probe.timeout-minutes", {"schedule": 240}, LEG),
]  # fmt: skip


ROWS: Final[list[Condition | Value]] = [*CONDITIONS, *VALUES]


@functools.cache
def _found() -> dict[str, expressions.Expression]:
    return {each.name: each for each in expressions.deciding(files.read(ROOT))}


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, int, str], Any]:
    """What GitHub's evaluator says to every row and event, all asked at once."""
    contexts = {event: make() for event, make in EVENTS.items()}
    asked, questions = [], []
    for number, row in enumerate(ROWS):
        for event in EVENTS if isinstance(row, Condition) else row.values:
            if row.name not in _found():
                continue
            asked.append((row.name, number, event))
            questions.append(
                {
                    "expression": _found()[row.name].text,
                    "condition": isinstance(row, Condition),
                    "context": {"github": contexts[event], **row.given},
                    "status": row.status if isinstance(row, Condition) else "success",
                }
            )
    try:
        return dict(zip(asked, node.evaluate(questions), strict=True))
    except installed.MissingError as missing:
        pytest.skip(missing.message)


def test_every_expression_that_decides_something_is_in_a_table() -> None:
    """A new condition comes with what it says to each event; one that is gone leaves no row."""
    assert sorted({row.name for row in ROWS}) == sorted(_found())


@pytest.mark.parametrize("number", range(len(CONDITIONS)), ids=lambda n: CONDITIONS[n].name)
def test_a_condition_holds_for_these_events_and_no_other(
    number: int, answers: dict[tuple[str, int, str], Any]
) -> None:
    """Each condition is asked with every event there is, also those that cannot start it."""
    row = CONDITIONS[number]
    said = {event: answers[row.name, number, event] for event in EVENTS}
    assert said == {event: event in row.holds for event in EVENTS}


@pytest.mark.parametrize("number", range(len(VALUES)), ids=lambda n: VALUES[n].name)
def test_an_expression_has_this_value(
    number: int, answers: dict[tuple[str, int, str], Any]
) -> None:
    """Labels, matrices, groups and environments are what the job before said."""
    row = VALUES[number]
    place = len(CONDITIONS) + number
    said = {event: answers[row.name, place, event] for event in row.values}
    assert said == dict(row.values)


def test_a_condition_that_is_not_known_is_named(tmp_path: Path) -> None:
    """The name says where to look."""
    path = tmp_path / ".github/workflows/ci.yml"
    path.parent.mkdir(parents=True)
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    path.write_text(text.replace("    name: check\n", "    name: check\n    if: 1 == 2\n", 1))
    names = {each.name for each in expressions.deciding(files.read(tmp_path))}
    assert names - set(_found()) == {"ci jobs.check.if"}


def test_an_expression_that_github_cannot_read_is_an_error_never_a_value() -> None:
    """A typing error in a condition is told as GitHub tells it."""
    try:
        said = node.evaluate([{"expression": "needs.plan.outputs.any ==", "condition": True}])
    except installed.MissingError as missing:
        pytest.skip(missing.message)
    assert isinstance(said[0], node.ExpressionError)
