"""
`fleet plan`: what a pull request means before anything runs.

    declaration   every problem with its line, before anything else is looked at
    difference    head against base, model by model, as sentences
    coverage      which stages the records in git do not cover, and why (`pipelines.coverage`)
    legs          one job for each measured host and model of which something has to run
    budget        minutes, disk and network, against `plan:` of params.yaml

The head is the checkout that we stand in, the base where its branch left the other one. A base that
is not there, or whose params.yaml this version cannot read, is no reason to stop: everything is new
then. What has to be measured does not depend on it, with one exception: where another host has
become the first measured one, the records of the base are those of the old one.

Under GitHub Actions the plan becomes outputs (`matrix`, `any`, `covered`, `models`, `allowed`), a
job summary and annotations on the lines of params.yaml.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pipelines import (
    console,
    declaration,
    host_records,
    marked_yaml,
    plan_budget,
    plan_differences,
    records,
    routing,
    runner,
    trees,
    wording,
)
from pipelines.bundle import git_blob, measured_hosts, primary_host
from pipelines.ci_records import (
    MAX_LEGS,
    OVER_BUDGET_LABEL,
    LeftOut,
    Leg,
    ModelPlan,
    PlannedRun,
    PlanProblem,
    PlanRecord,
)
from pipelines.coverage import Coverage
from pipelines.errors import FleetError, GateError, ParamsError, Problem
from pipelines.publishing_words import shown_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pipelines.ci_records import Budget
    from pipelines.layout import Layout
    from pipelines.params import Declaration

_MOST_PROBLEMS: Final = 200
_FILE_CHARACTERS: Final = 200
_TEXT_CHARACTERS: Final = 2000
_WHY_CHARACTERS: Final = 900
_A_DAY_MINUTES: Final = 1440
_CHANGES_SHOWN: Final = 6
_ROWS_SHOWN: Final = 100
# They compare what was measured, in seconds or with one file.
_AFTER_MEASURING: Final = frozenset({"choose", "load-test"})
_NEW = "everything counts as new"
_RECORDS_ALONE: Final = "its records are not those of the base"


class _Base(NamedTuple):
    """What the head is held against: a commit, and its declaration if it can be read."""

    commit: str | None
    declared: Declaration | None


def main(
    at: Layout,
    *,
    base: str | None = None,
    out: Path | None = None,
    as_json: bool = False,
    labels: Sequence[str] = (),
) -> int:
    """
    Do `fleet plan`.

    Args:
        at: The checkout of the head.
        base: Commit to compare with; None or empty for that of the event, or the default branch.
        out: File for the record.
        as_json: Print the record instead of a table.
        labels: Of the pull request, beside those of the event.

    Returns:
        0; 2 if the declaration is wrong; 5 if it costs more than is declared and nobody agreed.

    Raises:
        ParamsError: There is no commit, no such base, no folder for `out`, or the checkout is not
            that of the pull request.
    """
    if out is not None and not out.parent.is_dir():
        raise ParamsError(
            f"there is no folder {out.parent} for the plan.", hint=f"mkdir -p {out.parent}"
        )
    plan = make(at, base=base, labels=labels)
    _warn_of_uncommitted(at, plan)
    if out is not None:
        records.write(out, plan)
    differs = not runner.in_actions() and trees.Git(at.root).differs(plan.head, *trees.OWNED)
    _tell(plan, as_json=as_json, where="here, not all of them committed," if differs else "in git")
    if runner.in_actions():
        runner.outputs(
            matrix=matrix(plan),
            any=plan.allowed and bool(plan.legs),
            covered=not plan.problems and not plan.legs,
            models=" ".join(dict.fromkeys(model for leg in plan.legs for model in leg.models)),
            allowed=plan.allowed,
        )
        runner.summary(markdown(plan))
    if plan.problems:
        return ParamsError.exit_code
    return 0 if plan.allowed else GateError.exit_code


def make(at: Layout, *, base: str | None = None, labels: Iterable[str] = ()) -> PlanRecord:
    """
    Plan the checkout; see `main`.

    Raises:
        ParamsError: There is no commit, or the checkout is not that of the pull request.
    """
    head = _head(at)
    try:
        blob = git_blob(at.params.read_bytes())
    except OSError:
        blob = None
    common: dict[str, Any] = {"head": head, "params_blob": blob}
    try:
        declared = declaration.check(at)
        coverage = Coverage(declared, at)
    except ParamsError as error:
        found = _problems(at, error)
        return PlanRecord(base=None, problems=found, allowed=False, **common)
    host_records.require(at, declared, None)
    before = _base(at, head, base or None)
    with tempfile.TemporaryDirectory(prefix="fleet-plan-") as folder:
        then = _then(declared, at, before, Path(folder) / "base")
        runs = _runs(declared, at, coverage, before, then)
        renewed = _renewed(declared, coverage, before, then)
    if flaw := _nobody_measures(at, declared, runs):
        return PlanRecord(base=before.commit, problems=(flaw,), allowed=False, **common)
    if flaws := tuple(_too_small(at, declared, runs))[:_MOST_PROBLEMS]:
        return PlanRecord(base=before.commit, problems=flaws, allowed=False, **common)
    legs = legs_of(declared, runs)
    if len(legs) > MAX_LEGS:
        flaw = _at(at, ("hosts",), f"{len(legs):,} hosts measure, GitHub starts {MAX_LEGS} jobs")
        return PlanRecord(base=before.commit, problems=(flaw,), allowed=False, **common)
    models, budget = _models(declared, at, before, runs, renewed)
    over = plan_budget.over(budget, declared)
    pull = runner.pull_request()
    agreed = OVER_BUDGET_LABEL in {*labels, *(pull.labels if pull else ())}
    return PlanRecord(
        base=before.commit,
        models=models,
        legs=legs,
        budget=budget,
        over=over,
        allowed=agreed or not over,
        **common,
    )


# --- head and base ----------------------------------------------------------------------------


def _head(at: Layout) -> str:
    """
    Return the commit that is planned.

    Raises:
        ParamsError: There is none, or it is not that of the pull request.
    """
    head = trees.Git(at.root).commit("HEAD")
    pull = runner.pull_request()
    if pull is not None and pull.head != head:
        raise ParamsError(
            f"this checkout is of {head[:12]}, the pull request is at {pull.head[:12]}.",
            hint="GitHub checks out a merge by default. Give actions/checkout "
            "`ref: ${{ github.event.pull_request.head.sha }}` and `fetch-depth: 0`.",
        )
    return head


def _warn_of_uncommitted(at: Layout, plan: PlanRecord) -> None:
    """Say that what was planned is no commit: a pull request, and the gate, know only commits."""
    if runner.in_actions():
        return
    told = trees.Git(at.root).show(plan.head, trees.DECLARATION)
    if plan.params_blob is not None and (told is None or git_blob(told) != plan.params_blob):
        console.warn(
            f"{trees.DECLARATION} is planned as it lies here, and {plan.head[:12]} has another. "
            "A pull request holds what is committed: git commit, then plan again."
        )


def _base(at: Layout, head: str, wanted: str | None) -> _Base:
    """Find where the head left the base, and what was declared there."""
    git = trees.Git(at.root)
    name = wanted or runner.base()
    if wanted and not runner.in_actions():
        # A person who types a name means it; the base of an event may be gone.
        git.commit(wanted)
    if name is not None and git.parse(name) is None:
        shown = wording.quoted(name)
        deeper = f" {git.deeper()}" if git.is_shallow() else ""
        console.warn(f"git knows no base {shown}, so {_NEW}.{deeper}")
        return _Base(None, None)
    commit = git.fork_point(head, *([name] if name else []))
    if commit is None and name is not None:
        # Nothing in common, or the common part was cut off.
        deeper = f" {git.deeper()}" if git.is_shallow() else ""
        console.warn(f"where this branch left {wording.quoted(name)} cannot be seen.{deeper}")
        commit = git.commit(name)
    if commit is None:
        console.warn(f"there is no default branch to compare with, so {_NEW}.")
        return _Base(None, None)
    return _Base(commit, _declared_at(git, commit))


def _declared_at(git: trees.Git, commit: str) -> Declaration | None:
    text = git.show(commit, trees.DECLARATION)
    if text is None:
        console.warn(f"{commit[:12]} has no {trees.DECLARATION}, so {_NEW}.")
        return None
    with tempfile.TemporaryDirectory(prefix="fleet-plan-") as folder:
        path = Path(folder) / trees.DECLARATION
        path.write_bytes(text)
        try:
            return declaration.load(path)
        except ParamsError as error:
            count = wording.counted(max(len(error.problems), 1), "problem")
            console.warn(
                f"{trees.DECLARATION} of {commit[:12]} has {count} for this version, so {_NEW}."
            )
            return None


# --- problems ---------------------------------------------------------------------------------


def _problems(at: Layout, error: ParamsError) -> tuple[PlanProblem, ...]:
    found = error.problems or (
        Problem(marked_yaml.shown_name(at.params), 1, 1, f"{error.message} {error.hint}".strip()),
    )
    problems = [
        PlanProblem(
            file=wording.shortened(console.clean(one.file), _FILE_CHARACTERS),
            line=max(one.line, 1),
            column=max(one.column, 1),
            text=wording.shortened(console.clean(one.text), _TEXT_CHARACTERS),
        )
        for one in found[:_MOST_PROBLEMS]
    ]
    if more := found[_MOST_PROBLEMS:]:
        last = problems[-1]
        text = f"{wording.counted(len(more), 'more problem')}: `fleet check` says all of them"
        problems.append(last.model_copy(update={"text": text}))
    return tuple(problems)


def _at(at: Layout, loc: marked_yaml.Loc, text: str) -> PlanProblem:
    """Put a problem on the line of a key."""
    document = marked_yaml.read(at.params)
    mark = document.key_at(loc)
    return PlanProblem(file=document.name, line=mark.line, column=mark.column, text=text)


def _nobody_measures(at: Layout, declared: Declaration, runs: Runs) -> PlanProblem | None:
    missing = list(dict.fromkeys(model for (_, model), found in runs.items() if found))
    if not missing or measured_hosts(declared):
        return None
    return _at(
        at,
        ("hosts",),
        f"{wording.first_few(missing)} must be measured, and no host has a runner: give one its "
        "labels, such as `runs_on: [self-hosted, gpu]`, or measure by `fleet repro` and commit "
        "what it writes",
    )


def _too_small(at: Layout, declared: Declaration, runs: Runs) -> Iterator[PlanProblem]:
    """Yield models that would be measured on a first host that can serve none of their quants."""
    for (host, model), found in runs.items():
        is_first = host == primary_host(declared, model)
        if not is_first or all(run.stage in _AFTER_MEASURING for run in found):
            continue
        if why := routing.too_small(declared, at, model, host):
            todo = "Declare a smaller quant, or which hosts serve it: `hosts: [NAME]`"
            text = f"{why}. {todo}"
            yield _at(at, ("models", model), text)


# --- what has to run, and where ---------------------------------------------------------------


# By host and model, hosts in the order of the declaration, the primary one first.
Runs = dict[tuple[str, str], tuple[PlannedRun, ...]]


def _then(declared: Declaration, at: Layout, base: _Base, folder: Path) -> Coverage | None:
    """Look at the records of the base, written into a folder; None if they cannot be read."""
    if base.commit is None:
        return None
    try:
        tree = trees.at_revision(at.root, base.commit, folder)
        return Coverage(declared, tree, files=at.root)
    except FleetError:
        return None


def _runs(
    declared: Declaration, at: Layout, coverage: Coverage, base: _Base, then: Coverage | None
) -> Runs:
    """Ask for every host and model that it measures; see `pipelines.routing`."""
    moved = _moved(declared, coverage, base, then)
    measuring = {model: dict(routing.measuring(declared, at, model)) for model in declared.models}
    found: Runs = {}
    for host in declared.hosts:
        for model, hosts in measuring.items():
            if host not in hosts:
                continue
            runs = coverage.runs(model, host=hosts[host])
            if hosts[host] is None and model in moved:
                known = {(run.stage, run.key) for run in runs}
                again = tuple(
                    PlannedRun(stage=stage, key=key, why=moved[model])
                    for stage, key in _on_machine(declared, model)
                    if (stage, key) not in known
                )
                runs = (*again, *runs)
            found[host, model] = runs
    return found


def _on_machine(declared: Declaration, model: str) -> Iterator[tuple[str, str]]:
    """Yield the stages of a model that measure."""
    for key, quant in declared.quants.items():
        if quant.model == model:
            yield "benchmark", key
    yield from ((stage, model) for stage in ("choose", "load-test"))


def _moved(
    declared: Declaration, coverage: Coverage, base: _Base, then: Coverage | None
) -> Mapping[str, str]:
    """
    Say of which models the records are still those of the host that was the first measured one.

    The records of results/MODEL name no host, only a machine. They are those of the new first host
    as soon as the machine in dvc.lock is another one than at the base.
    """
    if base.declared is None or then is None or not measured_hosts(base.declared):
        return {}
    found = {}
    for model in declared.models:
        if model not in base.declared.models:
            continue
        old, new = primary_host(base.declared, model), primary_host(declared, model)
        if old != new and coverage.machine_md5s(model) & then.machine_md5s(model):
            found[model] = f"hosts: {new} is now the first measured host, these are of {old}"
    return found


def _renewed(
    declared: Declaration, coverage: Coverage, base: _Base, then: Coverage | None
) -> frozenset[str]:
    """
    Return the models whose records are not those of the base, whoever wrote them.

    A release is made of them, so they are judged, also where not a word of the declaration changed:
    they may have been measured again, for another Modelfile, or edited by hand. Where nobody can
    read those of the base, all of them are.
    """
    if base.commit is None:
        return frozenset()  # everything is new
    return frozenset(
        model
        for model in declared.models
        if then is None
        or any(
            coverage.held(model, host=h) != then.held(model, host=h)
            for h in (None, *measured_hosts(declared, model)[1:])
        )
    )


def legs_of(declared: Declaration, runs: Runs) -> tuple[Leg, ...]:
    """
    Make one job for each host and model, or for several models where GitHub starts no more.

    Args:
        declared: The declaration.
        runs: What has to run, by host and model.
    """
    wanted: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for (host, model), found in runs.items():
        if found:
            wanted[host, host == primary_host(declared, model)].append(model)
    size = 1
    while wanted and sum(-(-len(models) // size) for models in wanted.values()) > MAX_LEGS:
        size += 1
        if size > max(map(len, wanted.values())):
            break
    timeout = declared.plan.timeout_minutes
    return tuple(
        Leg(
            host=host,
            models=tuple(models[first : first + size]),
            runs_on=declared.hosts[host].runs_on or (),
            primary=is_primary,
            timeout_minutes=min(timeout * len(models[first : first + size]), _A_DAY_MINUTES),
        )
        for (host, is_primary), models in wanted.items()
        for first in range(0, len(models), size)
    )


def _models(
    declared: Declaration, at: Layout, base: _Base, runs: Runs, renewed: frozenset[str]
) -> tuple[tuple[ModelPlan, ...], Budget]:
    """Compose what is said of each model, and the budget of all of them."""
    different = plan_differences.of_fleet(base.declared, declared)
    document = marked_yaml.read(at.params)
    hosts = list(dict.fromkeys(host for host, _ in runs))
    budgets: list[Budget] = []
    found: list[ModelPlan] = []
    for model, difference in different.items():
        own = {host: runs.get((host, model), ()) for host in hosts}
        what = difference.what
        if difference.change == "unchanged" and not any(own.values()):
            if model not in renewed:
                continue
            what = (_RECORDS_ALONE,)
        costs = [
            plan_budget.of_runs(declared, at, model, each, host=host)
            for host, each in own.items()
            if each
        ]
        budgets += costs
        is_declared = model in declared.models
        found.append(
            ModelPlan(
                model=model,
                change=difference.change,
                what=what,
                line=document.key_at(("models", model)).line if is_declared else None,
                runs=tuple(
                    run
                    if not is_declared or host == primary_host(declared, model)
                    else _elsewhere(run, host)
                    for host, each in own.items()
                    for run in each
                ),
                budget=plan_budget.together(costs),
                covered=not any(own.values()),
                left_out=_left_out(declared, at, model) if is_declared else (),
            )
        )
    return tuple(found), plan_budget.together(budgets)


def _left_out(declared: Declaration, at: Layout, model: str) -> tuple[LeftOut, ...]:
    found = routing.left_out(declared, at, model).items()
    return tuple(
        LeftOut(host=host, why=wording.shortened(why, _WHY_CHARACTERS)) for host, why in found
    )


def _elsewhere(run: PlannedRun, host: str) -> PlannedRun:
    why = wording.shortened(f"on {host}: {run.why}", _WHY_CHARACTERS)
    return run.model_copy(update={"why": why})


# --- for GitHub -------------------------------------------------------------------------------


def matrix(plan: PlanRecord) -> str:
    """Return the jobs as `strategy.matrix` takes them: one line of JSON, models as one text."""
    legs = plan.legs if plan.allowed else ()
    return json.dumps(
        {
            "include": [
                {
                    "host": leg.host,
                    "models": " ".join(leg.models),
                    "runs_on": list(leg.runs_on),
                    "primary": leg.primary,
                    "timeout_minutes": leg.timeout_minutes,
                    # Of its artifact, whose name no other job of the run may have.
                    "number": number,
                }
                for number, leg in enumerate(legs, 1)
            ]
        },
        separators=(",", ":"),
    )


def markdown(plan: PlanRecord) -> str:
    """Return the plan as Markdown for the summary of the job; all text of it is escaped."""
    from pipelines.render import escape_markdown as text  # noqa: PLC0415 - jinja2

    lines = [f"## Plan: {text(sentence(plan))}", ""]
    if plan.problems:
        lines += ["| params.yaml | problem |", "|---|---|"]
        lines += [
            f"| {text(one.file)}:{one.line}:{one.column} | {text(one.text)} |"
            for one in plan.problems
        ]
        return "\n".join(lines)
    if plan.over:
        lines += [f"- {text(each)}" for each in plan.over]
        lines += [f"- {text(_agreement(plan))}", ""]
    if plan.models:
        lines += ["| model | changed | what runs | on | time | disk | network |",
                  "|---|---|---|---|---:|---:|---:|"]  # fmt: skip
        for one in plan.models[:_ROWS_SHOWN]:
            cells = (
                one.model,
                "; ".join(_changes(one)),
                _stages(one),
                _where(plan, one.model),
                *_costs(one),
            )
            lines.append("| " + " | ".join(text(cell) for cell in cells) + " |")
        if more := plan.models[_ROWS_SHOWN:]:
            lines += ["", f"And {wording.counted(len(more), 'more model')}."]
        lines.append("")
    lines += [f"- {text(each)}" for each in routing.told(plan.models)]
    lines += [f"- unknown: {text(each)}" for each in plan.budget.unknown]
    for one in plan.models[:_ROWS_SHOWN]:
        if one.runs:
            lines += ["", f"<details><summary>{text(one.model)}: why</summary>", ""]
            lines += [f"- {text(line)}" for line in _reasons(one)]
            lines += ["", "</details>"]
    return "\n".join(lines)


# --- for people -------------------------------------------------------------------------------


def sentence(plan: PlanRecord, *, where: str = "in git") -> str:
    """Say in one sentence what a plan comes to; `where` are the records."""
    if plan.problems:
        return f"params.yaml cannot be built: {wording.counted(len(plan.problems), 'problem')}."
    if not plan.legs:
        changed = [one.model for one in plan.models]
        if not changed:
            return "nothing changes, and every record is there. Nothing has to be measured."
        return f"the records {where} cover everything that is declared. Nothing has to be measured."
    models = len(dict.fromkeys(model for leg in plan.legs for model in leg.models))
    hosts = len({leg.host for leg in plan.legs})
    costs = _costs_of(plan.budget)
    jobs = wording.counted(len(plan.legs), "job")
    over = "" if not plan.over else (
        " Over the budget, and agreed." if plan.allowed else " Over the budget: nothing is started."
    )  # fmt: skip
    return (
        f"{wording.counted(models, 'model')} to measure on {wording.counted(hosts, 'host')} in "
        f"{jobs}; {costs}.{over}"
    )


def _costs_of(budget: Budget) -> str:
    time, disk, network = _budget_words(budget)
    files = "no new files" if budget.disk_bytes == 0 else f"{disk} of new files"
    return f"{time} on runners, {files}, {network} from the Hub"


def _budget_words(budget: Budget) -> tuple[str, str, str]:
    """Return time, disk and network; `unknown` of what nothing is known of."""
    time = "unknown time"
    if budget.gpu_minutes is not None:
        at_least = "at least " if any("timed" in one for one in budget.unknown) else "about "
        time = f"{at_least}{_minutes(budget.gpu_minutes)}"
    disk, network = (
        "an unknown size" if size is None else shown_size(size) if size else "nothing"
        for size in (budget.disk_bytes, budget.network_bytes)
    )
    return time, disk, network


def _minutes(minutes: float) -> str:
    if minutes < 1:
        return f"{minutes * 60:.0f} s"
    if minutes < 120:  # noqa: PLR2004 - two hours
        return f"{wording.number(minutes, 2)} min"
    return f"{wording.number(minutes / 60, 2)} h"


def _costs(one: ModelPlan) -> tuple[str, str, str]:
    return (wording.ABSENT,) * 3 if one.covered else _budget_words(one.budget)


def _agreement(plan: PlanRecord) -> str:
    if plan.allowed:
        return f"somebody agreed, by the label {OVER_BUDGET_LABEL}"
    return (
        f"nothing is started until somebody agrees by the label {OVER_BUDGET_LABEL}, or raises "
        "`plan:` in params.yaml"
    )


def _changes(one: ModelPlan) -> list[str]:
    shown = [wording.shortened(each, 160) for each in one.what[:_CHANGES_SHOWN]]
    more = len(one.what) - len(shown)
    told = [*shown, *([wording.counted(more, "more change")] if more else [])]
    return told or ["no declared value"]


def _stages(one: ModelPlan) -> str:
    """Say what has to run: `fetch, quantize (3), benchmark (3)`."""
    counts: dict[str, int] = {}
    for run in one.runs:
        counts[run.stage] = counts.get(run.stage, 0) + 1
    named = [f"{stage} ({n})" if n > 1 else stage for stage, n in counts.items()]
    return ", ".join(named) or "nothing: covered"


def _reasons(one: ModelPlan) -> list[str]:
    """Say why each stage runs, quants with the same reason together: `benchmark Q6_K, Q2_K: x`."""
    keys: dict[tuple[str, str], list[str]] = {}
    for run in one.runs:
        type_ = run.key.removeprefix(one.model).lstrip("-")
        keys.setdefault((run.stage, run.why), []).extend([type_] if type_ else [])
    return [
        f"{stage}{' ' if types else ''}{wording.first_few(types)}: {why}"
        for (stage, why), types in keys.items()
    ]


def _where(plan: PlanRecord, model: str) -> str:
    legs = [leg for leg in plan.legs if model in leg.models]
    return "; ".join(f"{leg.host} ({', '.join(leg.runs_on)})" for leg in legs) or wording.ABSENT


def _tell(plan: PlanRecord, *, as_json: bool, where: str) -> None:
    """Say what was planned: problems as annotations, the plan as lines or JSON on stdout."""
    for one in plan.problems:
        console.error(one.text, where=Problem(one.file, one.line, one.column, one.text))
    if plan.over and not plan.allowed:
        for line in plan.over:
            console.error(f"over the budget: {line}.")
        console.info(f"  next: {_agreement(plan)}.")
    if as_json:
        console.out(plan.model_dump_json(indent=2))
        return
    for line in _lines(plan, where):
        console.out(console.clean(line))


def _lines(plan: PlanRecord, where: str) -> Iterator[str]:
    against = "" if plan.problems else f" against {plan.base[:12] if plan.base else 'nothing'}"
    yield f"{plan.head[:12]}{against}: {sentence(plan, where=where)}"
    width = max((len(one.model) for one in plan.models), default=0)
    for one in plan.models:
        told = _changes(one)
        yield f"  {one.model:{width}}  {one.change}: {told[0]}"
        yield from (f"  {'':{width}}  {line}" for line in told[1:])
        yield f"  {'':{width}}  runs {_stages(one)}" if one.runs else f"  {'':{width}}  covered"
        own = [line for line in _reasons(one) if ": after " not in line]
        yield from (f"  {'':{width}}    {line}" for line in own[:_CHANGES_SHOWN])
        if len(own) > _CHANGES_SHOWN:
            yield f"  {'':{width}}    and {len(own) - _CHANGES_SHOWN} more"
        if one.runs:
            yield f"  {'':{width}}  on {_where(plan, one.model)}: {_costs_of(one.budget)}"
    yield from (f"  {line}" for line in routing.told(plan.models))
    yield from (f"  unknown: {line}" for line in plan.budget.unknown)
