"""
`fleet rollback`: `stable` of a model means an earlier release, as declared and in the registries.

    is the release whole in every registry?   ->   `stable:` in params.yaml   ->   the aliases

Nothing is changed before every registry was asked. params.yaml comes first of what is changed: it
is what is wanted, and whatever comes after it (the same command, `fleet publish`, `fleet repro`)
ends what a kill has cut off. Nothing is built and no file is sent.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from pipelines import console, rollback_pr, stable_line, wording
from pipelines.errors import FleetError, ParamsError, RetryLaterError, StoreError
from pipelines.ledger import Ledger
from pipelines.moves import By
from pipelines.publish_to import as_told, of_environment, require_reason
from pipelines.publishing import LATEST, Outcome, point
from pipelines.reading import PREVIOUS, resolve
from pipelines.registries import (
    Failures,
    Shelf,
    answers,
    history,
    meant_before,
    names,
    print_json,
    require_model,
)
from pipelines.release_records import STABLE, release_id, short
from pipelines.stores import open_store
from pipelines.stores.base import NotThereError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.stores.base import Store

# How many releases an error offers instead.
_MAX_OFFERED: Final = 6
# What stands between double quotes as it is, in every shell.
_PLAIN: Final = re.compile(r"[^\"$`\\!]*")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """
    What is to be done.

    Attributes:
        target: Id of the release.
        stable: What params.yaml will say: it, or `latest`.
        stores: Registries whose alias moves, by name.
        before: What each means now.
        without: Registries that do not have the release (only for `latest`).
    """

    target: str
    stable: str
    stores: Mapping[str, Store]
    before: Mapping[str, str | None]
    without: tuple[str, ...]


def main(  # noqa: PLR0913 - one for each option
    declared: Declaration,
    at: Layout,
    *,
    model: str,
    target: str,
    registry: str | None,
    environment: str | None = None,
    reason: str,
    pr: bool = False,
    dry_run: bool,
    as_json: bool,
) -> int:
    """
    Roll a model back, or forward to `latest`.

    Args:
        declared: The declaration.
        at: The checkout.
        model: Its key.
        target: Release id, 8 digits of one or more, `previous`, or `latest`.
        registry: The only registry whose alias moves; None for every one that holds the model.
        environment: Deployment environment: the registry has to be of it; without one, every
            registry that declares it.
        reason: For the ledger.
        pr: Open the pull request by which params.yaml and ledger on GitHub agree. The aliases come
            first: a refusal of GitHub leaves them where they are wanted.
        dry_run: Ask and say; change nothing.
        as_json: Print JSON.

    Returns:
        0, or the exit code of the first registry that could not be asked or moved; the others were.
        Which command moves that one is said.

    Raises:
        ParamsError: Model, registry or reason are wrong.
        NotThereError: A registry does not hold that release whole; nothing was changed.
        StoreError: It holds something else than it should; nothing was changed.
        MachineError: params.yaml was saved by somebody else; no alias was moved.
    """
    require_model(declared, model)
    by = By.from_environment(require_reason(reason))
    ledger = Ledger.load(at.ledger(model), model)
    failures = Failures()
    again = _command(model, target, by.why, registry)
    wanted_of = _named(declared, registry, environment)
    stores, left = _concerned(declared, at, model, wanted_of, ledger=ledger, again=again)
    wanted = declared.models[model].stable
    try:
        target = _ended(model, target, stores, ledger, by)
        plan = _plan(at, model, target, stores, ledger, wanted=wanted, left=left, why=by.why)
    except FleetError:
        for name, error in left.items():
            failures.add(name, error)
        raise
    for name, error in left.items():
        failures.add(name, _left(error, _command(model, plan.stable, by.why, name)))
    if not dry_run:
        stable_line.write(at.params, model, plan.stable)
    outcomes: dict[str, Outcome] = {}
    for name, store in plan.stores.items():
        try:
            outcomes[name] = point(model, plan.target, store, ledger, by=by, dry_run=dry_run)
        except FleetError as error:
            failures.add(name, _left(error, _command(model, plan.stable, by.why, name)))
    undo = _undo(at, model, wanted, plan, outcomes, registry=registry)
    proposed = None
    if not dry_run:
        done = rollback_pr.RolledBack(
            model=model,
            stable=plan.stable,
            target=plan.target,
            before=plan.before,
            outcomes=outcomes,
            by=by,
            undo=undo,
            again=_command(model, plan.stable, by.why, registry),
        )
        proposed = rollback_pr.tell(at, done, failures, pr=pr)
    if as_json:
        told = {
            "model": model,
            "release": plan.target,
            "dry_run": dry_run,
            "params": {"before": wanted, "after": plan.stable},
            "registries": {
                name: {"before": plan.before[name], **as_told(outcome)}
                for name, outcome in outcomes.items()
            },
            "without": plan.without,
            "errors": failures.as_json(),
            "undo": undo,
            "pull_request": proposed.url if proposed else None,
        }
        print_json(told)
    else:
        _print(model, wanted, plan, outcomes, undo, dry_run=dry_run, pr=pr)
    return failures.exit_code


# --- before anything is changed ---------------------------------------------------------------


def _named(declared: Declaration, registry: str | None, environment: str | None) -> tuple[str, ...]:
    """
    Return the registries that are meant.

    Raises:
        ParamsError: No registry declares the environment, or the one that is named does not.
    """
    if environment is None:
        return tuple(names(declared)) if registry is None else (registry,)
    there = of_environment(declared, environment)
    if registry is None:
        return there
    if registry not in there:
        raise ParamsError(
            f"registry {wording.quoted(registry)} does not declare the environment "
            f"{wording.quoted(environment)}: a job in it has no login there. Nothing was changed.",
            hint=f"Of that environment: {wording.listed(list(there))}.",
        )
    return (registry,)


def _concerned(  # noqa: PLR0913 - each is one independent fact
    declared: Declaration,
    at: Layout,
    model: str,
    wanted: tuple[str, ...],
    *,
    ledger: Ledger,
    again: str,
) -> tuple[dict[str, Store], dict[str, FleetError]]:
    """
    Find the registries that hold the model, and those that do not say so: these are left out.

    A server that is down, a login that is missing, a state that cannot be read: what is wrong with
    one registry keeps nobody from a rollback of the others. One that holds nothing of the model
    though the ledger says that it did is left out, too: in a fresh clone that is the local one.

    Returns:
        The stores, by name; and what went wrong with the others.

    Raises:
        FleetError: None holds it, or none could be asked.
    """
    stores = {name: open_store(name, declared, at.root) for name in wanted}
    found: dict[str, Store] = {}
    left: dict[str, FleetError] = {}
    asked = answers({name: partial(_holds, store, model) for name, store in stores.items()})
    for name, holds in asked.items():
        if isinstance(holds, FleetError):
            left[name] = holds
        elif holds:
            found[name] = stores[name]
        elif ledger.last(name, STABLE) is not None:
            console.warn(
                f"{name} holds nothing of {model}, though the ledger says that it did: it is "
                f"left out. `fleet publish {model} --to {name}` fills it."
            )
    if not found and left:
        for name, error in list(left.items())[1:]:
            console.error(f"{name}: {error.message}")
        name, first = next(iter(left.items()))
        said = first.message.removeprefix(f"{name} ")
        first.message = f"{name}{' ' if said != first.message else ': '}{said} Nothing was changed."
        raise _left(first, again)
    if not found:
        where = "any declared registry"
        if wanted != tuple(names(declared)):
            noun = "registry" if len(wanted) == 1 else "registries"
            where = f"{noun} {wording.listed(list(wanted))}"
        raise StoreError(
            f"{model} was never published to {where}: there is nothing to roll back to.",
            hint=f"fleet releases {model}",
        )
    return found, left


def _holds(store: Store, model: str) -> bool:
    alias, _token = store.read_alias(model, STABLE)
    return alias is not None or bool(store.list_releases(model))


def _ended(model: str, target: str, stores: Mapping[str, Store], ledger: Ledger, by: By) -> str:
    """
    Return what `previous` means where a rollback was begun of which git does not know.

    A run that was stopped between the alias and its pull request, and is started again, ends what
    it began: `previous` would by now mean the release that was left.

    Raises:
        StoreError: It was another run, or a person; who asks has to say which release he means.
    """
    if target != PREVIOUS:
        return target
    for name, store in stores.items():
        alias, _token = store.read_alias(model, STABLE)
        last = alias.moves[-1] if alias else None
        if last is None or last.action != "rollback" or last in ledger.moves(name, STABLE):
            continue
        if by.run is not None and last.run == by.run:
            return last.release
        assert last.previous is not None, "who goes back comes from somewhere"
        raise StoreError(
            f"{model}@{STABLE} in {name} was rolled back to {short(last.release)} by "
            f"{wording.quoted(last.who)} at {wording.quoted(last.at)}, of which the ledger of this "
            f"checkout does not know: `{PREVIOUS}` would take that back, to "
            f"{short(last.previous)}. Nothing was changed.",
            hint=f"To have it in git, too: {_command(model, last.release, by.why, name)}. To take "
            f"it back: {_command(model, last.previous, by.why, name)}",
        )
    return target


def _plan(  # noqa: PLR0913 - each is one independent fact
    at: Layout,
    model: str,
    target: str,
    stores: Mapping[str, Store],
    ledger: Ledger,
    *,
    wanted: str,
    left: Mapping[str, FleetError],
    why: str,
) -> _Plan:
    """
    Find the release and see that every registry holds it whole.

    Raises:
        NotThereError: One does not; the message offers what can be rolled back to.
        StoreError: `previous` means another release in each registry, or would take back a rollback
            that one which was left has not seen yet.
    """
    without: list[str] = []
    if target == LATEST:
        id_ = _latest(at, model)
        without = [name for name, store in stores.items() if not _is_whole(store, model, id_)]
    else:
        ids = {name: _find(model, target, store, ledger) for name, store in stores.items()}
        if len(set(ids.values())) > 1:
            raise _differing(model, stores, ids, wanted=wanted, why=why)
        id_ = next(iter(ids.values()))
        for store in stores.values():
            _require_whole(store, model, id_, ledger)
    moving = {name: store for name, store in stores.items() if name not in without}
    if not moving:
        raise NotThereError(
            f"the newest release of {model}, {short(id_)}, is in none of "
            f"{wording.listed(list(stores))}. Nothing was changed.",
            hint=f"fleet repro {model}, then fleet publish {model} --to NAME",
        )
    before = {name: _meant_now(store, model) for name, store in moving.items()}
    behind = [
        name
        for name in left
        if (last := ledger.last(name, STABLE)) is not None and last.release != wanted
    ]
    if target == PREVIOUS and behind and set(before.values()) == {wanted}:
        raise StoreError(
            f"{wording.listed(list(before))} {'has' if len(before) == 1 else 'have'} gone to "
            f"{short(wanted)} already, as params.yaml wants, and {wording.listed(behind)}, which "
            f"cannot be asked now, has not: `{PREVIOUS}` would take that back, to {short(id_)}. "
            "Nothing was changed.",
            hint=f"To end what was begun, when it can be reached: "
            f"{_command(model, wanted, why, behind[0] if len(behind) == 1 else None)}. "
            f"To take it back: {_command(model, id_, why)}",
        )
    stable = LATEST if target == LATEST else id_
    return _Plan(target=id_, stable=stable, stores=moving, before=before, without=tuple(without))


def _meant_now(store: Store, model: str) -> str | None:
    alias, _token = store.read_alias(model, STABLE)
    return alias.release if alias else None


def _differing(
    model: str, stores: Mapping[str, Store], ids: Mapping[str, str], *, wanted: str, why: str
) -> StoreError:
    """Say what `previous` means where; if some have moved already, where those have gone to."""
    aliases = {name: store.read_alias(model, STABLE)[0] for name, store in stores.items()}
    now = {name: alias.release if alias else None for name, alias in aliases.items()}
    said = wording.listed(
        [f"{short(found)} in {name} (now {short(now[name])})" for name, found in ids.items()]
    )
    text = f"`{PREVIOUS}` of {model} is not the same everywhere: {said}."
    back = {
        alias.release
        for alias in aliases.values()
        if alias and alias.moves[-1].action == "rollback"
    }
    # Some mean it now and were brought there; it is what `previous` means for the others.
    goals = [
        goal for goal in sorted(back) if all(goal in {ids[name], now[name]} for name in stores)
    ]
    goals = [wanted] if wanted in goals else goals
    if len(goals) == 1:
        moved = [name for name in stores if now[name] == goals[0]]
        verb = "has" if len(moved) == 1 else "have"
        text += f" {wording.listed(moved)} {verb} gone to {short(goals[0])} already."
        hint = f"To bring the others there, too: {_command(model, goals[0], why)}"
    else:
        served = set(now.values())
        left = [found for found in dict.fromkeys(ids.values()) if found not in served]
        commands = [_command(model, found, why) for found in left]
        hint = f"Name the release: {', or '.join(commands)}" if commands else ""
        hint = hint or f"`fleet releases {model}` tells what each was; name the release."
    return StoreError(f"{text} Nothing was changed.", hint=hint)


def _latest(at: Layout, model: str) -> str:
    """
    Return the id of the newest release, which results/ holds.

    Raises:
        StoreError: There is none.
    """
    try:
        return release_id(at.release(model).read_bytes())
    except FileNotFoundError:
        raise StoreError(
            f"{at.release(model)} is not there: nobody knows here which release of {model} is the "
            "newest.",
            hint=f"fleet repro {model}",
        ) from None


def _is_whole(store: Store, model: str, id_: str) -> bool:
    return Shelf(store, model).held(id_).is_whole


def _find(model: str, target: str, store: Store, ledger: Ledger) -> str:
    """
    Turn what was typed into an id.

    Raises:
        NotThereError: The registry knows nothing of that name.
    """
    try:
        return resolve(store, model, target, ledger)[0]
    except NotThereError as error:
        raise _cannot(error.message, store, model, ledger) from error


def _require_whole(store: Store, model: str, id_: str, ledger: Ledger) -> None:
    """
    See that a registry holds a release and every file of it.

    Raises:
        NotThereError: It does not.
    """
    held = Shelf(store, model).held(id_)
    if held.release is None:
        raise _cannot(f"{store.name} has no release {short(id_)}.", store, model, ledger)
    if held.missing:
        lost = wording.first_few([file.name for file in held.missing])
        text = f"release {short(id_)} in {store.name} is not whole: it lacks {lost}."
        raise _cannot(text, store, model, ledger)


def _cannot(why: str, store: Store, model: str, ledger: Ledger) -> NotThereError:
    """Say what can be rolled back to instead."""
    alias, _token = store.read_alias(model, STABLE)
    told = history(alias, ledger.moves(store.name, STABLE))
    shelf = Shelf(store, model)
    known = dict.fromkeys((*meant_before(told), *store.list_releases(model)))
    now = alias.release if alias else None
    whole = [short(id_) for id_ in known if id_ != now and shelf.held(id_).is_whole]
    offered = ", ".join(whole[:_MAX_OFFERED]) or "nothing"
    return NotThereError(
        f"{model} cannot be rolled back: {wording.sentence(why)} Nothing was changed. In "
        f"{store.name} it can go to: {offered}.",
        hint=f"fleet releases {model} --registry {store.name} tells what each of them was.",
    )


# --- what was done ----------------------------------------------------------------------------


def _command(model: str, to: str, why: str, registry: str | None = None) -> str:
    """Return a rollback as it can be typed, with the id of the release: that means one thing."""
    where = f" --registry {registry}" if registry else ""
    reason = f'"{why}"' if _PLAIN.fullmatch(why) else shlex.quote(why)
    return f"fleet rollback {model} --to {_shown(to)}{where} --reason {reason}"


def _left(error: FleetError, command: str) -> FleetError:
    """Add to an error the command that moves what was left."""
    if isinstance(error, RetryLaterError):
        error.hint = f"It was left as it is. When it can be reached: {command}"
    else:
        error.hint = f"{error.hint} Then: {command}".strip()
    return error


def _undo(  # noqa: PLR0913 - each is one independent fact
    at: Layout,
    model: str,
    wanted: str,
    plan: _Plan,
    outcomes: Mapping[str, Outcome],
    *,
    registry: str | None,
) -> str:
    """
    Return the command that takes it back; empty if nothing was changed.

    It names what `stable` meant before; `latest`, if params.yaml said so and that is the same.
    """
    why = f"undo {short(plan.target)}"
    before = {
        name: plan.before[name]
        for name, outcome in outcomes.items()
        if outcome.moved is not None and plan.before[name] is not None
    }
    if not before:
        return "" if wanted == plan.stable else _command(model, wanted, why, registry)
    try:
        declared = _latest(at, model) if wanted == LATEST else wanted
    except StoreError:
        declared = None
    there = {name: wanted if id_ == declared else str(id_) for name, id_ in before.items()}
    if len(set(there.values())) == 1:
        return _command(model, next(iter(there.values())), why, registry)
    return " && ".join(_command(model, to, why, name) for name, to in there.items())


def _print(  # noqa: PLR0913 - each is one independent fact
    model: str,
    wanted: str,
    plan: _Plan,
    outcomes: Mapping[str, Outcome],
    undo: str,
    *,
    dry_run: bool,
    pr: bool,
) -> None:
    for name, outcome in outcomes.items():
        console.out(f"{name}: {outcome.sentence}")
    for name in plan.without:
        console.warn(
            f"{name} does not have {short(plan.target)}: `fleet publish {model} --to {name}`."
        )
    if wanted == plan.stable:
        console.out(f"params.yaml: `stable: {_shown(wanted)}` of {model} was there already.")
    else:
        verb = "would become" if dry_run else "is now"
        console.out(
            f"params.yaml: `stable: {_shown(wanted)}` of {model} {verb} "
            f"`stable: {_shown(plan.stable)}`."
        )
    if undo and not dry_run and not pr:
        console.info("  next: commit params.yaml and results/, so that every checkout knows of it")
    if undo and not dry_run:
        console.info(f"  undo: {undo}")


def _shown(stable: str) -> str:
    return stable if stable == LATEST else short(stable)
