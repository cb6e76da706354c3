"""
`fleet gate`: what a pull request measured, held against its plan and judged; the required check.

It runs no tool and believes nothing: each bundle is read as the file of a stranger, has to be of
the planned commit and of a planned leg, has to agree with itself and with the declaration, and,
laid over the checkout, has to cover the head. Then `pipelines.verdict` judges, as everywhere.

It fails closed. Whatever is missing, of another commit or not to be believed makes the outcome
`failure`; what was lost or disturbed makes it `neutral`: measure again. Neither merges.

    exit 0    every model is PROMOTE, or nothing of the fleet changes
    exit 5    HOLD, REJECT, or a failure
    exit 75   INVALID, cancelled, lost: measure again
    exit 2    the declaration is wrong

`judge_bundles` is what whoever shows the outcome calls again, with code of the default branch.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pipelines import bundle as bundles_
from pipelines import (
    bundle_checks,
    bundle_files,
    console,
    declaration,
    params,
    records,
    routing,
    runner,
    trees,
    verdict,
    verdict_evidence,
    wording,
)
from pipelines.ci_records import (
    OVER_BUDGET_LABEL,
    BundleRecord,
    Conclusion,
    GateModel,
    GateRecord,
    PlanRecord,
)
from pipelines.coverage import Coverage
from pipelines.errors import FleetError, GateError, ParamsError, RetryLaterError
from pipelines.layout import Layout
from pipelines.verdict_words import WORDS, tidy, without_verb, worst

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pipelines.params import Declaration
    from pipelines.verdict import HostFinal, ModelVerdict, Reason, Verdict

JobResult = Literal["success", "failure", "cancelled", "skipped"]
_CONCLUSIONS: Final[dict[Verdict, Conclusion]] = {
    "PROMOTE": "success",
    "HOLD": "action_required",
    "REJECT": "failure",
    "INVALID": "neutral",
}
_EXIT_CODES: Final[dict[Conclusion, int]] = {
    "success": 0,
    "action_required": GateError.exit_code,
    "failure": GateError.exit_code,
    "neutral": RetryLaterError.exit_code,
}
_MOST_FILES: Final = 2000
_SENTENCE: Final = 1900
_MOST_FAILURES: Final = 100
# "Re-run failed jobs" runs the gate alone, on the same records.
RERUN: Final = "Re-run all jobs (not the failed ones alone): that measures again."
NOT_TRUSTED: Final = "the measurement was INVALID"


@dataclass(frozen=True)
class Failure:
    """
    Why there is nothing to judge, or why the judgement does not count.

    Attributes:
        text: A sentence.
        again: Whether measuring again is all that it takes.
    """

    text: str
    again: bool = False


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """
    What became of the bundles of a pull request.

    Attributes:
        verdict: The worst of all models; None if none was judged.
        conclusion: What it means for the pull request, together with the failures.
        sentence: That in words.
        models: For each model and host, in the order of the declaration.
        judged: The whole verdict, by model and measured host.
        failures: What went wrong beside that.
    """

    verdict: Verdict | None
    conclusion: Conclusion
    sentence: str
    models: tuple[GateModel, ...]
    judged: Mapping[tuple[str, str], ModelVerdict] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()


# --- the verb ---------------------------------------------------------------------------------


def main(  # noqa: PLR0913 - one for each option
    at: Layout,
    *,
    plan_file: Path,
    bundles: Path,
    out: Path,
    plan_result: JobResult = "success",
    measured: JobResult | None = None,
) -> int:
    """
    Judge a pull request, write what was found, and return the exit code.

    Args:
        at: The checkout of its head.
        plan_file: By `fleet plan`.
        bundles: Directory with the bundles of all legs, at any depth.
        out: File for the `GateRecord`.
        plan_result: How the planning job ended.
        measured: How the measuring jobs ended; None if nobody knows.
    """
    record, new_records = gate(
        at, plan_file=plan_file, bundles=bundles, plan_result=plan_result, measured=measured
    )
    records.write(out, record)
    runner.outputs(
        conclusion=record.conclusion, verdict=record.verdict or "", new_records=new_records
    )
    if runner.in_actions():
        runner.summary(_summary(at, record))
    _tell(record)
    if record.plan is not None and record.plan.problems:
        return ParamsError.exit_code
    return _EXIT_CODES[record.conclusion]


def gate(
    at: Layout,
    *,
    plan_file: Path,
    bundles: Path,
    plan_result: JobResult = "success",
    measured: JobResult | None = None,
) -> tuple[GateRecord, bool]:
    """
    Judge a pull request; see `main`.

    Returns:
        What was found, and whether there is something that may be adopted.
    """
    failures: list[Failure] = []
    plan = _plan(plan_file, plan_result, failures)
    if plan is None:
        return _failed(None, failures), False
    failures += _of_plan(plan, at)
    if plan.problems:
        return _failed(plan, failures), False
    try:
        text = at.params.read_bytes().decode()
        declared = declaration.load(at.params)
        found = [*_read_all(bundles, plan, failures)]
        found += _held_by_git(at, declared, plan, failures)
        failures += _of_legs(plan, measured, found)
        with tempfile.TemporaryDirectory(prefix="fleet-base-") as folder:
            base = base_of(at, plan, Path(folder))
            judgement = judge_bundles(base, text, plan, found, others=failures)
        judgement, changed = _covered(at, declared, plan, found, judgement)
    except (FleetError, UnicodeDecodeError, OSError) as error:
        said = error.message if isinstance(error, FleetError) else str(error)
        failures.append(Failure(wording.sentence(tidy(said, _SENTENCE))))
        return _failed(plan, failures), False
    may_be_adopted = judgement.verdict != "INVALID" and not judgement.failures
    record = GateRecord(
        base=plan.base,
        head=plan.head,
        verdict=judgement.verdict,
        conclusion=judgement.conclusion,
        sentence=judgement.sentence,
        models=judgement.models,
        plan=plan,
        bundles=tuple(found),
        failures=_sentences(judgement.failures),
    )
    return record, bool(changed) and may_be_adopted


def base_of(at: Layout, plan: PlanRecord, into: Path) -> Layout:
    """Return the tree of the base: of what was released before, no branch may speak for itself."""
    try:
        start = trees.Git(at.root).parse(plan.base) if plan.base else None
    except FleetError:
        start = None
    return trees.at_revision(at.root, start, into) if start else at


def _failed(plan: PlanRecord | None, failures: Sequence[Failure]) -> GateRecord:
    """Compose what is left where there is nothing to judge."""
    ended = _concluded((), {}, failures)
    return GateRecord(
        base=plan.base if plan else None,
        head=plan.head if plan else runner.head(),
        verdict=None,
        conclusion=ended.conclusion,
        sentence=ended.sentence,
        plan=plan,
        failures=_sentences(failures),
    )


def _sentences(failures: Iterable[Failure]) -> tuple[str, ...]:
    texts = list(dict.fromkeys(each.text for each in failures))
    more = len(texts) - _MOST_FAILURES
    return (*texts[:_MOST_FAILURES], *([f"And {more:,} more."] if more > 0 else []))


# --- plan and legs ----------------------------------------------------------------------------


def _plan(path: Path, result: JobResult, failures: list[Failure]) -> PlanRecord | None:
    try:
        return bundles_.read_plan(path)
    except FleetError as error:
        again = result == "cancelled"
        how = {
            "cancelled": "The planning job was cancelled",
            "failure": "The planning job failed",
            "skipped": "The planning job was skipped",
            "success": "The planning job left no plan that can be read",
        }[result]
        failures.append(Failure(f"{how}: {tidy(error.message)}.", again=again))
        return None


def _of_plan(plan: PlanRecord, at: Layout) -> Iterator[Failure]:
    """Yield why a plan is not one by which anything may be merged."""
    for each in plan.problems:
        yield Failure(f"{each.file}:{each.line}:{each.column}: {tidy(each.text)}.")
    pull = runner.pull_request()
    if pull is not None and pull.head != plan.head:
        yield Failure(
            f"The plan is of {plan.head[:12]}, the pull request is at {pull.head[:12]}.", again=True
        )
    if plan.problems:
        return
    try:
        blob = bundles_.git_blob(at.params.read_bytes())
    except OSError:
        blob = None
    if blob != plan.params_blob:
        yield Failure("The plan was made of another params.yaml than lies here.")
    if not plan.allowed:
        over = " ".join(wording.sentence(tidy(text)) for text in plan.over)
        yield Failure(
            f"The plan is over its budget. {over} Somebody who may agrees by the label "
            f"`{OVER_BUDGET_LABEL}`, or raises `plan:` in params.yaml."
        )


def _of_legs(
    plan: PlanRecord, measured: JobResult | None, found: Sequence[BundleRecord]
) -> Iterator[Failure]:
    """Yield why the measuring jobs did not end as they should."""
    if not plan.legs or measured in {None, "success"}:
        return
    if measured == "cancelled":
        yield Failure("The measuring jobs were cancelled.", again=True)
    elif measured == "skipped":
        pull = runner.pull_request()
        if pull is not None and pull.is_from_fork:
            yield Failure(
                "Nothing was measured: a branch of a fork never gets onto a self-hosted runner. "
                "Somebody who may puts it onto a branch of this repository."
            )
            return
        yield Failure("Nothing was measured: the measuring jobs were skipped.", again=plan.allowed)
    else:
        # Why, their bundles say, if all of them came.
        failed = [one for one in found if one.failures]
        came = {(one.model, one.host) for one in found} >= set(_legs(plan))
        again = came and bool(failed) and all(one.again for one in failed)
        yield Failure("A measuring job failed.", again=again)


def _legs(plan: PlanRecord) -> dict[tuple[str, str], bool]:
    """Return (model, host) of everything that was to be measured, and whether it is primary."""
    return {(model, leg.host): leg.primary for leg in plan.legs for model in leg.models}


def _removed(plan: PlanRecord) -> tuple[str, ...]:
    return tuple(one.model for one in plan.models if one.change == "removed")


def _hosts(declared: Declaration, plan: PlanRecord, model: str) -> tuple[str, ...]:
    """Return the hosts that measure a model, less those that the plan left out as too small."""
    measured = bundles_.measured_hosts(declared, model)
    left_out = {one.host for each in plan.models if each.model == model for one in each.left_out}
    hosts = measured or (bundles_.primary_host(declared, model),)
    return tuple(host for host in hosts if host not in left_out)


def _expected(declared: Declaration, plan: PlanRecord) -> dict[tuple[str, str], bool]:
    """Return (model, host) of every bundle that there has to be, and whether it was measured."""
    legs = _legs(plan)
    affected = {one.model for one in plan.models} | {model for model, _ in legs}
    return {
        (model, host): (model, host) in legs
        for model in declared.models
        if model in affected
        for host in _hosts(declared, plan, model)
    } | dict.fromkeys(legs, True)


def _read_all(directory: Path, plan: PlanRecord, failures: list[Failure]) -> Iterator[BundleRecord]:
    """Read every bundle there is, each as the file of a stranger."""
    paths = sorted(directory.rglob("*")) if directory.is_dir() else []
    if len(paths) > _MOST_FILES:
        failures.append(Failure(f"{len(paths):,} files are no bundles of {len(plan.legs)} legs."))
        return
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            continue
        try:
            yield bundles_.read(path)
        except FleetError as error:
            failures.append(Failure(wording.sentence(tidy(error.message, _SENTENCE))))


def _held_by_git(
    at: Layout, declared: Declaration, plan: PlanRecord, failures: list[Failure]
) -> Iterator[BundleRecord]:
    """Compose the bundles of what nobody had to measure."""
    for (model, host), is_measured in _expected(declared, plan).items():
        if is_measured:
            continue
        record = bundles_.from_git(at, declared, model, host=host, head=plan.head)
        try:
            bundles_.require_form(record, f"results/{model}")
        except FleetError as error:
            failures.append(Failure(wording.sentence(tidy(error.message, _SENTENCE))))
            continue
        yield record


# --- judging ----------------------------------------------------------------------------------


def judge_bundles(  # noqa: PLR0913 - each is one independent fact
    base: Layout,
    params_text: str,
    plan: PlanRecord,
    bundles: Sequence[BundleRecord],
    *,
    others: Sequence[Failure] = (),
    day: str | None = None,
) -> Judgement:
    """
    Judge bundles by a declaration.

    No program is started, nothing outside a temporary folder is written, and nothing that a gate
    said is read.

    Args:
        base: Checkout, or tree of a commit, that knows the last release of each model.
        params_text: params.yaml of the planned commit.
        plan: What was asked for.
        bundles: Those that were measured and those of what git holds, as `bundle.read` returns
            them; each is looked at again.
        others: What is known to have failed before.
        day: By which waivers count; today if None.

    Returns:
        The judgement; `failure` or `neutral` if a bundle is missing, foreign, of another commit, or
        does not agree with itself or the declaration. A model of which that is so is not judged.

    Raises:
        ParamsError: The declaration is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="fleet-gate-") as folder:
        root = Path(folder)
        at = trees.lay_over(Layout(root / "head"), {trees.DECLARATION: params_text})
        declared = declaration.load(at.params)
        failures, whole = _whole(declared, plan, bundles)
        judged: dict[tuple[str, str], ModelVerdict] = {}
        for bundle in whole:
            tree = _tree(root / bundle.host / bundle.model, base, bundle)
            slice_ = params.judge_slice(declared, bundle.model)
            evidence = verdict_evidence.collect(slice_, tree, day=day)
            judged[bundle.model, bundle.host] = verdict.judge(evidence)
    shown = tuple(_shown(declared, plan, judged))
    failures += _unmeasured(plan, shown, judged)
    return _concluded(shown, judged, (*others, *failures), removed=_removed(plan))


def _whole(
    declared: Declaration, plan: PlanRecord, bundles: Sequence[BundleRecord]
) -> tuple[list[Failure], list[BundleRecord]]:
    """Return what is wrong with the bundles, and those of models of which all is right."""
    expected = _expected(declared, plan)
    failures: list[Failure] = []
    bad: set[str] = set()
    found: dict[tuple[str, str], BundleRecord] = {}
    for bundle in bundles:
        key = (bundle.model, bundle.host)
        is_measured = expected.get(key)
        clauses = [*_place(bundle, plan, declared, is_expected=is_measured is not None)]
        if key in found:
            clauses.append("there are two bundles of it")
        if not clauses:
            clauses = [*bundle_checks.form(bundle)]
        whose = f"{bundle.model} on {bundle.host}"
        wrong = [Failure(wording.sentence(f"{whose}: {tidy(one)}")) for one in clauses]
        if not wrong and bundle.failures and bundle.again:
            # Nothing that it lacks is news.
            wrong = [
                Failure(wording.sentence(tidy(f"{whose}: {clause}", _SENTENCE)), again=True)
                for clause in bundle.failures
            ]
        if not wrong:
            told = bundle_checks.agreement(bundle, declared, measured=bool(is_measured))
            wrong = [Failure(tidy(one, _SENTENCE) + ".") for one in told]
        failures += wrong
        bad |= {bundle.model} if wrong else set()
        found.setdefault(key, bundle)
    for failure, models in _machines(found, expected):
        failures.append(failure)
        bad |= models
    for model, host in expected:
        if (model, host) not in found:
            again = expected[model, host]
            failures.append(Failure(f"{model} on {host}: its bundle did not come.", again=again))
            bad.add(model)
    order = list(expected)
    whole = [one for key, one in found.items() if one.model not in bad and key in expected]
    return failures, sorted(whole, key=lambda one: order.index((one.model, one.host)))


def _machines(
    found: Mapping[tuple[str, str], BundleRecord], expected: Mapping[tuple[str, str], bool]
) -> Iterator[tuple[Failure, set[str]]]:
    """Yield each host for which this run measured on more than one kind of machine."""
    for host in sorted({host for _, host in expected}):
        seen: dict[str, list[str]] = {}
        for (model, where), bundle in found.items():
            if where == host and expected.get((model, where)):
                seen.setdefault(bundle.machine_id, []).append(model)
        if len(seen) > 1:
            groups = [wording.first_few(models) for models in seen.values()]
            yield (
                Failure(
                    f"{host} was measured on {len(seen)} kinds of machines: {'; '.join(groups)}. "
                    "Labels of a host have to name one kind."
                ),
                {model for models in seen.values() for model in models},
            )


def _place(
    bundle: BundleRecord, plan: PlanRecord, declared: Declaration, *, is_expected: bool
) -> Iterator[str]:
    """Yield why a bundle is none of this plan."""
    if not is_expected:
        yield "nobody asked for this bundle"
    if bundle.head != plan.head:
        yield f"its bundle is of {bundle.head[:12]}, the plan of {plan.head[:12]}"
    if bundle.primary != (bundle.host == bundles_.primary_host(declared, bundle.model)):
        yield f"it is {'not ' if bundle.primary else ''}the first measured host"


def _tree(root: Path, base: Layout, bundle: BundleRecord) -> Layout:
    """Write the records of a bundle as the ones of its model; the last release lies beside them."""
    tree = trees.lay_over(Layout(root), bundle.files)
    release = base.release(bundle.model)
    if release.is_file() and not release.is_symlink():
        tree.release(bundle.model).write_bytes(release.read_bytes())
    return tree


def _shown(
    declared: Declaration, plan: PlanRecord, judged: Mapping[tuple[str, str], ModelVerdict]
) -> Iterator[GateModel]:
    """Yield the verdict on each model for each host, a measured host's by its own measurement."""
    lines = {one.model: one.line for one in plan.models}
    for model in declared.models:
        hosts = tuple(params.routed_hosts(declared, model))
        primary = bundles_.primary_host(declared, model)
        own = {host: found for (name, host), found in judged.items() if name == model}
        yield from of_hosts(model, hosts, primary, own, line=lines.get(model))


def _unmeasured(
    plan: PlanRecord,
    shown: Sequence[GateModel],
    judged: Mapping[tuple[str, str], ModelVerdict],
) -> Iterator[Failure]:
    """
    Yield each host that was left out as too small, and would serve by the numbers of another one.

    Both can be: a card does not hold what llama.cpp keeps in main memory. No host serves what it
    could have measured, and has not.
    """
    left_out = {(one.model, each.host) for one in plan.models for each in one.left_out}
    for one in shown:
        if one.verdict == "PROMOTE" and (one.model, one.host) in left_out - judged.keys():
            yield Failure(
                f"{one.model} on {one.host}: not measured, as too small for the weights; by the "
                f"numbers of another host it would serve. Name it in `models.{one.model}.hosts`, "
                "beside the others that serve: then it is measured."
            )


def of_hosts(
    model: str,
    hosts: Sequence[str],
    primary: str,
    judged: Mapping[str, ModelVerdict],
    *,
    line: int | None = None,
) -> Iterator[GateModel]:
    """
    Yield the verdict on a model for each host.

    Args:
        model: Its key.
        hosts: Every declared one.
        primary: The measured one by whose numbers hosts without a machine are judged.
        judged: The verdicts on what was measured, by host.
        line: Where the model is declared.
    """
    for host in hosts:
        own = judged.get(host) or judged.get(primary)
        if own is None:
            continue
        reasons = [each for each in own.reasons if each.counts and each.host in {"", host}]
        final = next((one for one in own.hosts if one.host == host), None)
        found = worst("PROMOTE" if final else "INVALID", *(each.verdict for each in reasons))
        yield GateModel(
            model=model,
            host=host,
            verdict=found,
            sentence=tidy(_said(found, final, own, reasons), _SENTENCE),
            next_step=wording.sentence(tidy(_next(found, own, reasons), _SENTENCE)),
            line=line,
        )


def _said(
    found: Verdict, final: HostFinal | None, own: ModelVerdict, reasons: Sequence[Reason]
) -> str:
    """Say the verdict for one host, as the report says that of a model."""
    if final is None:
        return own.sentence
    if final.verdict == found:
        return final.sentence
    if reasons:
        return f"{WORDS[found]}: {reasons[0].clause}"
    # Somebody let pass what stands against it.
    return f"{WORDS[found]}: {without_verb(final.sentence, final.verdict)}"


def _next(found: Verdict, own: ModelVerdict, reasons: Sequence[Reason]) -> str:
    if found == "PROMOTE":
        return "Merge it: the publish workflow releases what was measured."
    return next((each.next_step for each in reasons if each.verdict == found), own.next_step)


def _concluded(
    models: Sequence[GateModel],
    judged: Mapping[tuple[str, str], ModelVerdict],
    failures: Sequence[Failure],
    *,
    removed: Sequence[str] = (),
) -> Judgement:
    """Put verdicts and failures into one outcome: the worst of all."""
    found = worst(*(one.verdict for one in models)) if models else None
    conclusion: Conclusion = _CONCLUSIONS[found] if found else "success"
    if failures:
        conclusion = "neutral" if all(each.again for each in failures) else "failure"
        # A judgement that is bad by itself does not become better by what is missing.
        if found == "REJECT":
            conclusion = "failure"
        first = next((each for each in failures if not each.again), failures[0])
        more = len(_sentences(failures)) - 1
        beside = f" And {wording.counted(more, 'more failure')}." if more else ""
        again = f" {RERUN}" if conclusion == "neutral" else ""
        sentence = f"{first.text}{beside}{again}"
    elif found:
        sentence = _headline(found, models)
        if found == "INVALID":
            sentence = f"{wording.shortened(sentence, _SENTENCE - 100)} {RERUN}"
    else:
        gone = f"{wording.listed(list(removed))}: not declared any more. " if removed else ""
        sentence = f"{gone}Nothing of the fleet has to be judged."
    return Judgement(
        verdict=found,
        conclusion=conclusion,
        sentence=wording.shortened(sentence, _SENTENCE),
        models=tuple(models),
        judged=judged,
        failures=tuple(failures),
    )


def _headline(found: Verdict, models: Sequence[GateModel]) -> str:
    worst_one = next(one for one in models if one.verdict == found)
    names = list(dict.fromkeys(one.model for one in models))
    where = f" on {worst_one.host}" if len({one.host for one in models}) > 1 else ""
    text = wording.sentence(f"{worst_one.model}{where}: {worst_one.sentence}")
    others = f" {wording.counted(len(names), 'model')} judged." if len(names) > 1 else ""
    return f"{text}{others}"


# --- coverage ---------------------------------------------------------------------------------


def _covered(
    at: Layout,
    declared: Declaration,
    plan: PlanRecord,
    bundles: Sequence[BundleRecord],
    judgement: Judgement,
) -> tuple[Judgement, dict[str, bytes | None]]:
    """
    Hold the bundles, laid over the checkout, against what the head needs.

    Returns:
        The judgement with what is still not covered as failures, and the files that change.
    """
    sound = [one for one in bundles if (one.model, one.host) in judgement.judged]
    changed = bundle_files.changes(at, declared, sound, removed=_removed(plan))
    invalid = {one.model for one in judgement.models if one.verdict == "INVALID"}
    unjudged = {
        one.model for one in plan.models if one.model not in {m for m, _ in judgement.judged}
    }
    failures = []
    for model in declared.models:
        # Of these there is a word already.
        if model not in invalid | unjudged:
            failures += uncovered(at, declared, changed, model)
    ended = _concluded(
        judgement.models,
        judgement.judged,
        (*judgement.failures, *failures),
        removed=_removed(plan),
    )
    return ended, changed


def uncovered(
    at: Layout, declared: Declaration, changed: Mapping[str, bytes | None], model: str
) -> list[Failure]:
    """
    Return what of a model would not be covered by a checkout after some changes.

    Args:
        at: The checkout.
        declared: What its params.yaml says.
        changed: By `bundle_files.changes`.
        model: A declared one.
    """
    with tempfile.TemporaryDirectory(prefix="fleet-cover-") as folder:
        tree = trees.at_working_tree(at.root, Path(folder))
        for path, content in changed.items():
            if content is None:
                (tree.root / path).unlink(missing_ok=True)
        texts = {path: content.decode() for path, content in changed.items() if content is not None}
        trees.lay_over(tree, texts)
        coverage = Coverage(declared, tree, files=at.root)
        failures = []
        for host, below in routing.measuring(declared, tree, model):
            runs = coverage.runs(model, host=below)
            own = [one for one in runs if not one.why.startswith("after ")] or list(runs)
            for one in own:
                text = f"{model} on {host}: {one.stage} of {one.key} is not covered: "
                failures.append(
                    Failure(
                        wording.sentence(text + tidy(one.why, _SENTENCE - 200)),
                        again=one.why == NOT_TRUSTED,
                    )
                )
    return failures


# --- telling ----------------------------------------------------------------------------------


def _tell(record: GateRecord) -> None:
    """Say every result once: the outcome in one line, and before it what that does not say."""
    for one in record.models:
        if one.sentence not in record.sentence:
            console.info(f"{one.model} on {one.host}: {one.sentence}")
    for text in record.failures:
        if text not in record.sentence:
            console.error(text)
    say = console.info if record.conclusion == "success" else console.warn
    say(f"{record.conclusion}: {record.sentence}")


def _summary(at: Layout, record: GateRecord) -> str:
    """Compose the job's summary: the text of the comment, or the sentences where that fails."""
    from pipelines import comment  # noqa: PLC0415 - jinja2, and only for Actions

    try:
        text = at.params.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory(prefix="fleet-summary-") as folder:
            url = runner.run_url() or ""
            return comment.render(comment.of_gate(record, text, at, Path(folder), url))
    except (FleetError, OSError, ValueError) as error:
        console.warn(f"the summary is short: {tidy(str(error))}.")
    lines = [f"**{record.conclusion}**", "", f"    {record.sentence}", ""]
    lines += [f"    {one.model} on {one.host}: {one.sentence}" for one in record.models]
    lines += [f"    {text}" for text in record.failures]
    return "\n".join(console.clean(line) for line in lines) + "\n"
