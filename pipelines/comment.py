"""
`fleet comment`: what a pull request means, as one comment made from two trees of records.

    fleet comment --dry-run                          the working tree against where it left main
    fleet comment --dry-run --base REV --head REV    two commits
    fleet comment --dry-run --gate gate.json         what a gate judged
    fleet comment                                    in Actions: put it on the pull request

Everything that is judged here is judged by `pipelines.verdict`, through `pipelines.report`: the
comment has no opinion of its own.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import comment_model, comment_table, console, declaration, verdict_evidence, wording
from pipelines.ci_records import OVER_BUDGET_LABEL, PlanProblem
from pipelines.comment_model import Measured, Sources
from pipelines.comment_render import MARKS, SUMMARY_LIMIT, render
from pipelines.comment_tree import Comment
from pipelines.errors import ParamsError
from pipelines.report_tree import VERDICTS
from pipelines.trees import Git, at_revision, at_working_tree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.ci_records import Conclusion, ModelPlan, PlanRecord
    from pipelines.comment_tree import ModelComment, State
    from pipelines.layout import Layout
    from pipelines.params import Declaration, JudgeSlice, ReportSlice

__all__ = ["Comment", "Side", "build", "ended", "main", "measuring", "render"]

WORKING_TREE: Final = "the working tree"
_CONCLUSIONS: Final[dict[str, Conclusion]] = {
    "PROMOTE": "success", "HOLD": "action_required", "REJECT": "failure", "INVALID": "neutral",
    "UNMEASURED": "failure", "REMOVED": "success",
}  # fmt: skip
# From good to bad, with what is no verdict.
_STANDINGS: Final = ("REMOVED", *VERDICTS[:3], "UNMEASURED", VERDICTS[3])
_STANDING_WORDS: Final = {
    "PROMOTE": "promoted", "HOLD": "on hold", "REJECT": "rejected", "INVALID": "to be measured "
    "again", "UNMEASURED": "not measured yet", "REMOVED": "removed",
}  # fmt: skip
_URL: Final = re.compile(r"https?://[A-Za-z0-9.:_-]+/[A-Za-z0-9._/-]+")


@dataclass(frozen=True, kw_only=True)
class Side:
    """
    One of the two trees.

    Attributes:
        at: params.yaml and results/ as they are there.
        commit: 40 digits, or words for what is no commit.
        on: What second machines measured: for each host the paths of a tree whose results/M are
            those of results/M/on/HOST.
        times_s: How long each stage ran, by model, of what was measured for this.
    """

    at: Layout
    commit: str
    on: Mapping[str, Layout] = field(default_factory=dict)
    times_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


# --- what is said -----------------------------------------------------------------------------


def build(
    base: Side | None,
    head: Side,
    *,
    plan: PlanRecord | None = None,
    git: Git | None = None,
    run_url: str = "",
    day: str | None = None,
) -> Comment:
    """
    Judge the head and hold it against the base.

    Args:
        base: What it is held against; None if there is nothing.
        head: What a merge would bring.
        plan: Which models are concerned and why; without it, those whose declaration or records
            differ.
        git: Where older records are, for the history of the speed.
        run_url: Page of the run.
        day: The day in UTC by which waivers count; that of the clock if None.
    """
    common = {
        "base": base.commit if base else "",
        "head": head.commit,
        "plan": plan,
        "run_url": run_url if _URL.fullmatch(run_url) else "",
        "commands": tuple(_commands(base, head)),
    }
    if plan is not None and plan.problems:
        return _of_problems(plan.problems, common)
    try:
        declared = declaration.load(head.at.params)
    except ParamsError as error:
        problems = tuple(
            PlanProblem(
                file="params.yaml", line=max(one.line, 1), column=max(one.column, 1),
                text=wording.shortened(one.text, 2000),
            )
            for one in error.problems
        )  # fmt: skip
        return _of_problems(problems, common, () if problems else (error.message,))
    slices = _slices(declared)
    before = _declared(base)
    concerned = _concerned(base, head, slices, before, plan)
    plans = {one.model: one for one in plan.models} if plan else {}
    models = [
        comment_model.comment(
            _sources(name, slices[name], base, head, plans.get(name), git, day), MARKS
        )
        if name in slices
        else comment_model.removed(name, base.at)
        for name in concerned
        if name in slices or base is not None
    ]
    return _of_models(tuple(models), common)


def measuring(
    plan: PlanRecord | None, *, head: str, base: str = "", run_url: str = ""
) -> Comment:
    """Say that a run is at work, and what it does if that is known."""
    return _stated(
        "measuring", "measuring ...", None, plan, head=head, base=base, run_url=run_url,
        next_step="Nothing to do: this comment is replaced when the run ends.",
    )  # fmt: skip


def ended(  # noqa: PLR0913 - each is one independent fact
    state: State,
    *,
    head: str,
    plan: PlanRecord | None = None,
    failures: Sequence[str] = (),
    base: str = "",
    run_url: str = "",
) -> Comment:
    """
    Say that a run ended without a verdict.

    Args:
        state: `cancelled`, `failed` or `over-budget`.
        head: Commit that was to be measured.
        plan: What was planned, if it came so far.
        failures: What went wrong, as sentences.
        base: Commit of the base.
        run_url: Page of the run.
    """
    title, conclusion, step = {
        "cancelled": (
            "cancelled: nothing was judged", "neutral",
            "Run it again, or push: a new run replaces this.",
        ),
        "over-budget": (
            "costs more than params.yaml allows: nothing was measured", "action_required",
            f"Put the label `{OVER_BUDGET_LABEL}` on the pull request to let it pass, or ask for "
            "less.",
        ),
    }.get(
        state,
        ("a job failed: nothing was judged", "failure", "Read the log of the run, then run it "
         "again."),
    )  # fmt: skip
    return _stated(
        state, title, conclusion, plan, head=head, base=base, run_url=run_url, next_step=step,
        failures=failures,
    )  # fmt: skip


def _stated(  # noqa: PLR0913 - each is one independent fact
    state: State,
    title: str,
    conclusion: str | None,
    plan: PlanRecord | None,
    *,
    head: str,
    base: str,
    run_url: str,
    next_step: str,
    failures: Sequence[str] = (),
) -> Comment:
    return Comment(
        state=state,
        title=title,
        conclusion=conclusion,  # type: ignore[arg-type]
        next_step=next_step,
        base=base or (plan.base or "" if plan else ""),
        head=head,
        plan=plan,
        failures=tuple(failures),
        run_url=run_url if _URL.fullmatch(run_url) else "",
    )


def _of_problems(
    problems: Sequence[PlanProblem], common: dict[str, object], failures: Sequence[str] = ()
) -> Comment:
    count = wording.counted(len(problems), "problem") if problems else "a problem"
    return Comment(
        state="problems",
        conclusion="failure",
        title=f"params.yaml has {count}: nothing was measured",
        next_step="`fleet check` says the same on your machine.",
        problems=tuple(problems),
        failures=tuple(failures),
        **common,  # type: ignore[arg-type]
    )


def _of_models(models: tuple[ModelComment, ...], common: dict[str, object]) -> Comment:
    if not models:
        return Comment(
            state="empty",
            conclusion="success",
            title="no model is affected: there is nothing to measure",
            **common,  # type: ignore[arg-type]
        )
    worst = max((one.verdict for one in models), key=_STANDINGS.index)
    if len(models) == 1:
        title = f"{models[0].name}: {models[0].headline}"
    else:
        title = f"{wording.counted(len(models), 'model')}: {_shares(models)}"
    rows = [one.row for one in models if one.row]
    return Comment(
        state="judged",
        verdict=worst,
        conclusion=_CONCLUSIONS[worst],
        title=title,
        next_step=_next_step(worst, models),
        models=models,
        table=comment_table.of_fleet(rows) if len(models) > 1 and rows else None,
        **common,  # type: ignore[arg-type]
    )


def _shares(models: Sequence[ModelComment]) -> str:
    counts = {standing: sum(one.verdict == standing for one in models) for standing in _STANDINGS}
    return ", ".join(
        f"{count:,} {_STANDING_WORDS[standing]}" for standing, count in counts.items() if count
    )


def _next_step(worst: str, models: Sequence[ModelComment]) -> str:
    """Say what a person does now: that of the worst model, or that nothing is in the way."""
    if worst == "REMOVED":
        return "Merging takes it out of the fleet."
    if worst == "PROMOTE":
        return "Merge it: what was measured is then published, after approval where one is asked."
    if worst == "INVALID":
        return "Re-run: the measurement is not to be trusted, which says nothing about the model."
    return next((one.next_step for one in models if one.verdict == worst and one.next_step), "")


# --- from where -------------------------------------------------------------------------------


def _slices(declared: Declaration) -> Mapping[str, JudgeSlice]:
    slice_: ReportSlice = declaration.slices(declared)["report", "fleet"]  # type: ignore[assignment]
    return slice_.models


def _declared(base: Side | None) -> Mapping[str, JudgeSlice] | None:
    """Read the declaration of the base; None if that is of another version, or there is none."""
    try:
        return _slices(declaration.load(base.at.params)) if base else None
    except ParamsError:
        return None


def _concerned(
    base: Side | None,
    head: Side,
    now: Mapping[str, JudgeSlice],
    before: Mapping[str, JudgeSlice] | None,
    plan: PlanRecord | None,
) -> list[str]:
    """Return the models that differ, in the order of the declaration, those that are no more last."""
    if plan is not None:
        return [one.model for one in plan.models if one.change != "unchanged" or not one.covered or
                _differs(one.model, base, head)]  # fmt: skip
    gone = [name for name in before or {} if name not in now]
    return [
        name
        for name in now
        if before is None or before.get(name) != now[name] or _differs(name, base, head)
    ] + gone


def _differs(name: str, base: Side | None, head: Side) -> bool:
    """Tell whether the records of a model are others than those of the base."""
    return base is None or _bytes_of(base.at, name) != _bytes_of(head.at, name)


def _bytes_of(at: Layout, name: str) -> dict[str, bytes]:
    folder = at.model_record("fetch", name).parent
    return {
        each.relative_to(folder).as_posix(): each.read_bytes()
        for each in sorted(folder.rglob("*.json"))
        if each.is_file()
    }


def _sources(  # noqa: PLR0913 - each is one independent fact
    name: str,
    declared: JudgeSlice,
    base: Side | None,
    head: Side,
    plan: ModelPlan | None,
    git: Git | None,
    day: str | None,
) -> Sources:
    return Sources(
        declared=declared,
        now=head.at,
        before=base.at if base else None,
        day=day or verdict_evidence.today(),
        plan=plan,
        others=tuple(
            Measured(host=host, at=at, declared=declared)
            for host, at in head.on.items()
            if host in declared.hosts and at.model_record("choose", name).exists()
        ),
        git=git,
        base=base.commit if base else "",
        times_s=head.times_s.get(name),
    )


def _commands(base: Side | None, head: Side) -> list[str]:
    """Return what prints this comment again."""
    commits = [side.commit for side in (base, head) if side is not None]
    known = [one for one in commits if re.fullmatch(r"[0-9a-f]{40}", one)]
    if base is None or len(known) != len(commits):
        return ["fleet comment --dry-run"]
    return [f"fleet comment --dry-run --base {base.commit[:12]} --head {head.commit[:12]}"]


# --- the verb ---------------------------------------------------------------------------------


def main(at: Layout, *, base: str | None, head: str | None, models: Sequence[str] = ()) -> int:
    """
    Print the comment of two revisions of this checkout.

    Args:
        at: The checkout.
        base: Commit that it is held against; where the head left the default branch if None.
        head: Commit; the working tree if None.
        models: Only these; all that differ if empty.

    Raises:
        ParamsError: git knows no such commit.
    """
    git = Git(at.root)
    with tempfile.TemporaryDirectory(prefix="fleet-comment-") as folder:
        into = Path(folder)
        commit = git.commit(head or "HEAD")
        start = git.commit(base) if base else git.fork_point(commit)
        first = Side(at=at_revision(at.root, start, into / "base"), commit=start) if start else None
        if head is None:
            tree = at_working_tree(at.root, into / "head")
        else:
            tree = at_revision(at.root, commit, into / "head")
        second = Side(at=tree, commit=commit if head else WORKING_TREE)
        console.out(render(build(first, second, git=git)).rstrip("\n"))
    return 0
