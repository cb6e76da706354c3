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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from pipelines import (
    bundle,
    comment_model,
    comment_post,
    comment_table,
    console,
    declaration,
    plan_differences,
    routing,
    runner,
    verdict_evidence,
    wording,
)
from pipelines import gate as gate_
from pipelines.ci_records import OVER_BUDGET_LABEL, GateRecord, PlanProblem
from pipelines.comment_model import Measured, Sources
from pipelines.comment_post import Rendered
from pipelines.comment_render import MARKS, render
from pipelines.comment_tree import Comment
from pipelines.coverage import Coverage
from pipelines.errors import FleetError, ParamsError
from pipelines.github.checks import Annotation
from pipelines.layout import Layout
from pipelines.report_tree import VERDICTS
from pipelines.trees import Git, at_revision, at_working_tree, lay_over

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pipelines.ci_records import BundleRecord, Conclusion, ModelPlan, PlanRecord
    from pipelines.comment_post import Situation
    from pipelines.comment_tree import ModelComment, State
    from pipelines.params import Declaration, JudgeSlice, ReportSlice

__all__ = [
    "Comment", "Side", "build", "ended", "main", "measuring", "of_gate", "of_revisions", "render",
    "rendered",
]  # fmt: skip

# Bundles of a large fleet; what GitHub hands over is bounded before.
_GATE_LIMIT_BYTES: Final = 256 << 20

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
# Of what ended without a verdict: title, conclusion, what to do.
_ENDS: Final[dict[str, tuple[str, Conclusion, str]]] = {
    "cancelled": (
        "cancelled: nothing was judged", "neutral",
        "Re-run all jobs, or push: a new run replaces this.",
    ),
    "waiting": (
        "waits for approval: nothing of this commit has run yet", "action_required",
        'Look at the commit, then press "Approve workflows to run" on this pull request.',
    ),
    "over-budget": (
        "costs more than params.yaml allows: nothing was measured", "action_required",
        f"Put the label `{OVER_BUDGET_LABEL}` on the pull request to let it pass, or ask for less.",
    ),
    "failed": (
        "a job failed: nothing was judged", "failure",
        "Read the log of the run, then re-run all jobs.",
    ),
}  # fmt: skip
_URL: Final = re.compile(r"https?://[A-Za-z0-9.:_-]+/[A-Za-z0-9._/-]+")


@dataclass(frozen=True, kw_only=True)
class Side:
    """
    One of the two trees.

    Attributes:
        at: params.yaml and results/ as they are there.
        commit: 40 digits, or words for what is no commit.
        primary: Host whose machine measured `at`; empty if nobody says.
        on: What second machines measured: for each host the paths of a tree whose results/M are
            those of results/M/on/HOST.
        times_s: How long each stage ran, by model, of what was measured for this.
        uncovered: Models of which something that is declared was never measured.
    """

    at: Layout
    commit: str
    primary: str = ""
    on: Mapping[str, Layout] = field(default_factory=dict)
    times_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    uncovered: frozenset[str] = frozenset()


# --- what is said -----------------------------------------------------------------------------


def build(  # noqa: PLR0913 - each is one independent fact
    base: Side | None,
    head: Side,
    *,
    plan: PlanRecord | None = None,
    git: Git | None = None,
    run_url: str = "",
    day: str | None = None,
    models: Sequence[str] = (),
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
        models: Only these; all that are concerned if empty.
    """
    common: dict[str, Any] = {
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
    if declared.hosts and not head.primary:
        head = replace(head, primary=bundle.primary_host(declared))
    before = _declared(base)
    differences = plan_differences.of_fleet(before, declared) if base else {}
    return compose(
        base, head, _slices(declared), _slices(before) if before else None, common,
        what={name: one.what for name, one in differences.items()}, git=git, day=day,
        models=models,
    )  # fmt: skip


def compose(  # noqa: PLR0913 - each is one independent fact
    base: Side | None,
    head: Side,
    slices: Mapping[str, JudgeSlice],
    before: Mapping[str, JudgeSlice] | None,
    common: Mapping[str, Any],
    *,
    what: Mapping[str, tuple[str, ...]] | None = None,
    git: Git | None = None,
    day: str | None = None,
    models: Sequence[str] = (),
) -> Comment:
    """
    Compose a comment of what is declared.

    Args:
        base: As in `build`.
        head: As in `build`.
        slices: What each model is judged by at the head.
        before: The same of the base; None if that cannot be read.
        common: Fields of the comment that do not depend on a verdict.
        what: What was edited in the declaration of each model, where no plan says it.
        git: As in `build`.
        day: As in `build`.
        models: As in `build`.
    """
    plan: PlanRecord | None = common.get("plan")
    concerned = _concerned(base, head, slices, before, plan)
    if models:
        concerned = [name for name in concerned if name in models]
    plans = {one.model: one for one in plan.models} if plan else {}
    found = [
        comment_model.comment(
            _sources(
                name=name,
                declared=slices[name],
                base=base,
                head=head,
                plan=plans.get(name),
                what=(what or {}).get(name, ()),
                git=git,
                day=day,
            ),
            MARKS,
        )
        for name in concerned
        if name in slices
    ]
    gone = [name for name in concerned if name not in slices]
    found += [comment_model.removed(name, base.at) for name in gone if base is not None]
    return _of_models(tuple(found), common)


def measuring(plan: PlanRecord | None, *, head: str, base: str = "", run_url: str = "") -> Comment:
    """Say that a run is at work, and what it does if that is known."""
    # GitHub tells of a run when it is asked for: nothing is planned by then.
    title = "measuring ..." if plan else "planning, then measuring what is needed ..."
    return _stated(
        "measuring", title, None, plan, head=head, base=base, run_url=run_url,
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
        state: `cancelled`, `waiting`, `failed` or `over-budget`.
        head: Commit that was to be measured.
        plan: What was planned, if it came so far.
        failures: What went wrong, as sentences.
        base: Commit of the base.
        run_url: Page of the run.
    """
    title, conclusion, step = _ENDS.get(state, _ENDS["failed"])
    return _stated(
        state, title, conclusion, plan, head=head, base=base, run_url=run_url, next_step=step,
        failures=failures,
    )  # fmt: skip


def _stated(  # noqa: PLR0913 - each is one independent fact
    state: State,
    title: str,
    conclusion: Conclusion | None,
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
        conclusion=conclusion,
        next_step=next_step,
        base=base or (plan.base or "" if plan else ""),
        head=head,
        plan=plan,
        failures=tuple(failures),
        run_url=run_url if _URL.fullmatch(run_url) else "",
    )


def _of_problems(
    problems: Sequence[PlanProblem], common: Mapping[str, Any], failures: Sequence[str] = ()
) -> Comment:
    count = wording.counted(len(problems), "problem") if problems else "a problem"
    return Comment(
        state="problems",
        conclusion="failure",
        title=f"params.yaml has {count}: nothing was measured",
        next_step="`fleet check` says the same on your machine.",
        problems=tuple(problems),
        failures=tuple(failures),
        **common,
    )


def _of_models(models: tuple[ModelComment, ...], common: Mapping[str, Any]) -> Comment:
    if not models:
        return Comment(
            state="empty",
            conclusion="success",
            title="no model is affected: there is nothing to measure",
            **common,
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
        **common,
    )


def _shares(models: Sequence[ModelComment]) -> str:
    order = (*_STANDINGS[1:], _STANDINGS[0])
    counts = {standing: sum(one.verdict == standing for one in models) for standing in order}
    return ", ".join(
        f"{count:,} {_STANDING_WORDS[standing]}" for standing, count in counts.items() if count
    )


def _next_step(worst: str, models: Sequence[ModelComment]) -> str:
    """Say what a person does now: that of the worst model, or that nothing is in the way."""
    if worst == "REMOVED":
        return "Merging takes it out of the fleet."
    if worst == "PROMOTE":
        return "Merge: what was measured is then published, after approval where one is asked for."
    if worst == "INVALID":
        return f"{gate_.RERUN} A disturbed measurement says nothing of the model."
    return next((one.next_step for one in models if one.verdict == worst and one.next_step), "")


# --- from where -------------------------------------------------------------------------------


def _slices(declared: Declaration) -> Mapping[str, JudgeSlice]:
    slice_: ReportSlice = declaration.slices(declared)["report", "fleet"]  # type: ignore[assignment]
    return slice_.models


def _declared(base: Side | None) -> Declaration | None:
    """Read the declaration of the base; None if that is of another version, or there is none."""
    try:
        return declaration.load(base.at.params) if base else None
    except ParamsError:
        return None


def _concerned(
    base: Side | None,
    head: Side,
    now: Mapping[str, JudgeSlice],
    before: Mapping[str, JudgeSlice] | None,
    plan: PlanRecord | None,
) -> list[str]:
    """Return the models that differ, in the order of the declaration; removed ones are last."""
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
    *,
    name: str,
    declared: JudgeSlice,
    base: Side | None,
    head: Side,
    plan: ModelPlan | None,
    what: tuple[str, ...],
    git: Git | None,
    day: str | None,
) -> Sources:
    return Sources(
        declared=declared,
        now=head.at,
        before=base.at if base else None,
        day=day or verdict_evidence.today(),
        plan=plan,
        what=plan.what if plan else what,
        primary=head.primary,
        others=tuple(
            Measured(host=host, at=at, declared=declared)
            for host, at in head.on.items()
            if host in declared.hosts and at.model_record("choose", name).exists()
        ),
        git=git,
        base=base.commit if base else "",
        times_s=head.times_s.get(name),
        is_uncovered=name in head.uncovered,
    )


def _commands(base: Side | None, head: Side) -> list[str]:
    """Return what prints this comment again."""
    commits = [side.commit for side in (base, head) if side is not None]
    known = [one for one in commits if re.fullmatch(r"[0-9a-f]{40}", one)]
    if base is None or len(known) != len(commits):
        return ["fleet comment --dry-run"]
    return [f"fleet comment --dry-run --base {base.commit[:12]} --head {head.commit[:12]}"]


# --- the verb ---------------------------------------------------------------------------------


def main(  # noqa: PLR0913 - one for each option
    at: Layout,
    *,
    dry_run: bool,
    base: str | None = None,
    head: str | None = None,
    gate: Path | None = None,
    models: Sequence[str] = (),
) -> int:
    """
    Print the comment, or put it on the pull request of the run that GitHub's event tells of.

    Args:
        at: The checkout.
        dry_run: Print it and change nothing.
        base: Commit that the head is held against; where that left the default branch if None.
        head: Commit; the working tree if None.
        gate: What a gate found, in the place of both.
        models: Only these; all that differ if empty.

    Raises:
        ParamsError: git knows no such commit, or the options contradict each other.
    """
    if not dry_run:
        return _post(at, (base, head, gate, *models))
    if gate is not None and (base or head or models):
        raise ParamsError(
            "a gate's file says which commits it is of: it takes neither --base nor --head nor "
            "--model.",
            hint=f"fleet comment --dry-run --gate {gate}",
        )
    with tempfile.TemporaryDirectory(prefix="fleet-comment-") as folder:
        into = Path(folder)
        if gate is not None:
            found = of_gate(read_gate(gate), None, at, into)
        else:
            found = of_revisions(at, into, base=base, head=head, models=models)
        console.out(render(found).rstrip("\n"))
    return 0


def _post(at: Layout, options: Sequence[object]) -> int:
    """Report the run of GitHub's event to its pull request."""
    from pipelines.github.client import GitHub  # noqa: PLC0415 - only in Actions

    if any(options):
        raise ParamsError(
            "`fleet comment` says what GitHub's event tells of; --base, --head, --gate and --model "
            "are for people.",
            hint="fleet comment --dry-run ...",
        )
    if not runner.in_actions():
        raise ParamsError(
            "`fleet comment` puts a comment on the pull request of a run of Actions, and this is "
            "none.",
            hint="`fleet comment --dry-run` prints it here.",
        )
    comment_post.post(GitHub.from_environment(), runner.event(), lambda one: rendered(one, at))
    return 0


def of_revisions(
    at: Layout,
    into: Path,
    *,
    base: str | None = None,
    head: str | None = None,
    models: Sequence[str] = (),
) -> Comment:
    """
    Say what one revision means against another.

    Args:
        at: The checkout.
        into: A folder for both trees, empty.
        base: Commit; where the head left the default branch if None.
        head: Commit; the working tree if None.
        models: Only these; all that differ if empty.

    Raises:
        ParamsError: git knows no such commit, or one of the models does not differ.
    """
    git = Git(at.root)
    commit = git.commit(head or "HEAD")
    start = git.commit(base) if base else git.fork_point(commit)
    first = Side(at=at_revision(at.root, start, into / "base"), commit=start) if start else None
    tree = at_revision(at.root, commit, into / "head") if head else at_working_tree(
        at.root, into / "head"
    )  # fmt: skip
    second = Side(
        at=tree,
        commit=commit if head else WORKING_TREE,
        on=_on(tree, into / "on"),
        uncovered=_uncovered(tree, at.root),
    )
    found = build(first, second, git=git, models=models)
    missing = [name for name in models if name not in {one.name for one in found.models}]
    if missing and found.state in {"judged", "empty"}:
        raise ParamsError(
            f"{wording.listed([wording.quoted(name) for name in missing])} is not declared, or "
            "does not differ from the base.",
            hint="Without --model every model that differs is shown.",
        )
    return found


def _uncovered(tree: Layout, root: Path) -> frozenset[str]:
    """
    Return the models of which something that is declared was never measured, as `fleet plan` says.

    That a measurement was disturbed is not meant: it was made.
    """
    try:
        declared = declaration.load(tree.params)
        coverage = Coverage(declared, tree, files=root)
    except FleetError:
        return frozenset()
    return frozenset(
        model
        for model in declared.models
        for host, below in routing.measuring(declared, tree, model)
        for run in coverage.runs(model, host=below)
        if gate_.NOT_TRUSTED not in run.why and not run.why.startswith("after ")
    )


def _on(tree: Layout, into: Path) -> dict[str, Layout]:
    """Read what second machines measured, each into a tree of its own."""
    try:
        declared = declaration.load(tree.params)
    except ParamsError:
        return {}
    found = {}
    for host in bundle.measured_hosts(declared):
        texts: dict[str, str] = {}
        for model in declared.models:
            if host not in bundle.measured_hosts(declared, model)[1:]:
                continue
            texts |= bundle.from_git(tree, declared, model, host=host, head="0" * 40).files
        if texts:
            found[host] = lay_over(Layout(into / host), texts)
    return found


# --- what a gate found ------------------------------------------------------------------------


def read_gate(path: Path) -> GateRecord:
    """
    Read a gate's file.

    Raises:
        ParamsError: It is missing, too large, or none.
    """
    try:
        return GateRecord.model_validate_json(bundle.read_bounded(path, _GATE_LIMIT_BYTES))
    except bundle.BundleError as error:
        raise ParamsError(
            error.message,
            hint="`fleet gate --out FILE` writes it; of a run it is the artifact `gate`: "
            "gh run download RUN --name gate",
        ) from None
    except ValidationError as error:
        raise ParamsError(
            f"{path} is no record of a gate: {error.error_count()} of its fields are wrong.",
            hint="`fleet gate` writes it.",
        ) from None


def of_gate(
    gate: GateRecord, params: str | None, at: Layout, into: Path, run_url: str = ""
) -> Comment:
    """
    Judge again what a gate judged, and say what it means.

    Args:
        gate: What it found; only its plan, its failures and the records in its bundles are used.
        params: Text of params.yaml at its head; that of git if None.
        at: The checkout: base and older records come from its git.
        into: A folder for the trees, empty.
        run_url: Page of the run.
    """
    plan = gate.plan
    if plan is not None and plan.problems:
        return build(None, Side(at=at, commit=gate.head or ""), plan=plan, run_url=run_url)
    state: State | None = "over-budget" if plan is not None and not plan.allowed else None
    if state is None and (not gate.bundles and (gate.failures or plan is None)):
        state = "failed"
    if state is not None:
        return ended(
            state, head=gate.head or "", plan=plan, failures=gate.failures, base=gate.base or "",
            run_url=run_url,
        )  # fmt: skip
    assert plan is not None, "there is no gate without a plan"
    git = Git(at.root)
    start = git.parse(gate.base) if gate.base else None
    base = Side(at=at_revision(at.root, start, into / "base"), commit=start) if start else None
    if params is None:
        data = git.show(git.commit(plan.head), "params.yaml")
        params = (data or b"").decode(errors="replace")
    judged = gate_.judge_bundles(base.at if base else at, params, plan, gate.bundles)
    whole = [one for one in gate.bundles if (one.model, one.host) in judged.judged]
    head = _of_bundles(whole, params, plan.head, base.at if base else None, into)
    shown = {one.model for one in whole} | {
        one.model for one in plan.models if one.change == "removed"
    }
    found = build(base, head, plan=plan, git=git, run_url=run_url, models=sorted(shown) or [""])
    unplanned = _unplanned(base, head, plan) if base or not gate.base else ()
    failures = tuple(
        dict.fromkeys((*unplanned, *(one.text for one in judged.failures), *gate.failures))
    )
    if not failures:
        return replace(found, conclusion=judged.conclusion)
    return _beside(found, failures, _worse(judged.conclusion, gate.conclusion))


def _unplanned(base: Side | None, head: Side, plan: PlanRecord) -> Iterator[str]:
    """Yield what the declaration changes and the plan is silent about: a run may write any plan."""
    planned = {one.model: one.change for one in plan.models}
    different = plan_differences.of_fleet(_declared(base), declaration.load(head.at.params))
    for name, one in different.items():
        if one.change != "unchanged" and planned.get(name, "unchanged") == "unchanged":
            yield f"{name}: its declaration is another one than at the base, and the plan says not."


def _worse(ours: Conclusion, theirs: Conclusion) -> Conclusion:
    """Return how a run with failures ends: neutral only if both say that it has to be repeated."""
    return "neutral" if {ours, theirs} <= {"neutral", "success"} and "neutral" in {
        ours, theirs
    } else "failure"  # fmt: skip


def _beside(found: Comment, failures: Sequence[str], conclusion: Conclusion) -> Comment:
    """Let what went wrong stand before what could be judged all the same."""
    again = conclusion == "neutral"
    first = wording.shortened(wording.clause(failures[0]), 200)
    judged = f"; {found.title}" if found.models else ""
    return replace(
        found,
        state="judged" if found.models else "failed",
        verdict="INVALID" if found.models else None,
        conclusion=conclusion,
        title=f"{'measure again' if again else 'not judged as a whole'}: {first}{judged}",
        next_step=gate_.RERUN if again else "Read the log of the run, then re-run all jobs.",
        failures=tuple(failures),
    )


def _of_bundles(
    bundles: Sequence[BundleRecord], params: str, head: str, base: Layout | None, into: Path
) -> Side:
    """Lay what was measured out as trees: that of the first machine, and one for each other."""
    tree = lay_over(Layout(into / "head"), {"params.yaml": params})
    on: dict[str, Layout] = {}
    times_s: dict[str, dict[str, float]] = {}
    for one in bundles:
        where = tree if one.primary else on.setdefault(one.host, Layout(into / "on" / one.host))
        lay_over(where, one.files)
        # Of what was released before, only the base may speak.
        release = base.release(one.model) if base else where.release(one.model)
        if base and release.is_file():
            where.release(one.model).write_bytes(release.read_bytes())
        took = times_s.setdefault(one.model, {})
        took |= {f"{one.host} {name}": wall_s for name, wall_s in one.times_s.items()}
    return Side(at=tree, commit=head, on=on, times_s=times_s)


def rendered(situation: Situation, at: Layout) -> Rendered:
    """Make what is put on a pull request: comment, title, conclusion, annotations."""
    run = situation.run
    with tempfile.TemporaryDirectory(prefix="fleet-comment-") as folder:
        if situation.gate is not None:
            found = of_gate(situation.gate, situation.params, at, Path(folder), run.url)
        elif situation.state == "measuring":
            found = measuring(None, head=run.head, run_url=run.url)
        else:
            state: State = "failed"
            if situation.state in {"cancelled", "waiting"}:
                state = situation.state
            failures = (situation.problem,) if situation.problem else ()
            found = ended(state, head=run.head, failures=failures, run_url=run.url)
    lines = {one.model: one.line for one in found.plan.models} if found.plan else {}
    return Rendered(
        markdown=render(found),
        title=found.title,
        conclusion=found.conclusion,
        annotations=tuple(_annotations(found, lines)),
    )


def _annotations(found: Comment, lines: Mapping[str, int | None]) -> Iterator[Annotation]:
    """Yield what is wrong, at the lines of params.yaml where it is declared."""
    for problem in found.problems:
        yield Annotation(path="params.yaml", line=problem.line, message=problem.text)
    for model in found.models:
        line = lines.get(model.name)
        if line is None or model.verdict in {"PROMOTE", "REMOVED"}:
            continue
        told = [f"{one.where}: {one.sentence}" if one.where else one.sentence
                for one in model.hosts]  # fmt: skip
        yield Annotation(
            path="params.yaml",
            line=line,
            title=f"{model.name}: {model.headline}",
            message="\n".join([*told, model.next_step]).strip() or model.headline,
            level="failure" if model.verdict == "REJECT" else "warning",
        )
