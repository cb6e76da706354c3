"""
`fleet rollback`: `stable` of a model means an earlier release, as declared and in the registries.

    is the release whole in every registry?   ->   `stable:` in params.yaml   ->   the aliases

Nothing is changed before every registry was asked. params.yaml comes first of what is changed: it
is what is wanted, and whatever comes after it (the same command, `fleet publish`, `fleet repro`)
ends what a kill has cut off. Nothing is built and no file is sent.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import console, stable_line, wording
from pipelines.errors import RetryLaterError, StoreError
from pipelines.ledger import Ledger
from pipelines.moves import By
from pipelines.publish_to import as_told, require_reason
from pipelines.publishing import LATEST, Outcome, point
from pipelines.reading import resolve
from pipelines.registries import (
    Failures,
    Shelf,
    history,
    meant_before,
    names,
    print_json,
    require_model,
)
from pipelines.release_records import SHORT_CHARACTERS, STABLE, release_id, short
from pipelines.stores import open_store
from pipelines.stores.base import NotThereError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.stores.base import Store

# How many releases an error offers instead.
_MAX_OFFERED: Final = 6
# How long a registry may take to say whether it holds a model; of its retries, three or four.
_ANSWERS_WITHIN_S: Final = 15.0


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
    reason: str,
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
        reason: For the ledger.
        dry_run: Ask and say; change nothing.
        as_json: Print JSON.

    Returns:
        0, or the exit code of the first registry that could not be asked or moved; the others were.

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
    stores = _concerned(declared, at, model, registry, ledger=ledger, failures=failures)
    plan = _plan(at, model, target, stores, ledger)
    wanted = declared.models[model].stable
    if not dry_run:
        stable_line.write(at.params, model, plan.stable)
    outcomes: dict[str, Outcome] = {}
    for name, store in plan.stores.items():
        with failures.of(name):
            outcomes[name] = point(model, plan.target, store, ledger, by=by, dry_run=dry_run)
    undo = _undo(model, wanted, plan, registry)
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
        }
        print_json(told)
    else:
        _print(model, wanted, plan, outcomes, undo, dry_run=dry_run)
    return failures.exit_code


# --- before anything is changed ---------------------------------------------------------------


def _concerned(  # noqa: PLR0913 - each is one independent fact
    declared: Declaration,
    at: Layout,
    model: str,
    registry: str | None,
    *,
    ledger: Ledger,
    failures: Failures,
) -> dict[str, Store]:
    """
    Find the registries that hold the model; one that cannot be reached is told and left out.

    So is one that holds nothing of it though the ledger says that it did: in a fresh clone that is
    the local one, and it must not keep anybody from rolling back where models are served from.

    Raises:
        StoreError: None does, or none could be asked.
    """
    stores = {
        name: open_store(name, declared, at.root)
        for name in (names(declared) if registry is None else (registry,))
    }
    found: dict[str, Store] = {}
    for name, holds in _ask(stores, model).items():
        if isinstance(holds, RetryLaterError):
            failures.add(name, holds)
        elif isinstance(holds, Exception):
            raise holds
        elif holds:
            found[name] = stores[name]
        elif ledger.last(name, STABLE) is not None:
            console.warn(
                f"{name} holds nothing of {model}, though the ledger says that it did: it is "
                f"left out. `fleet publish {model} --to {name}` fills it."
            )
    if not found:
        if failures.errors:
            raise next(iter(failures.errors.values()))
        where = f"registry {registry}" if registry else "any declared registry"
        raise StoreError(
            f"{model} was never published to {where}: there is nothing to roll back to.",
            hint=f"fleet releases {model}",
        )
    return found


def _ask(stores: Mapping[str, Store], model: str) -> dict[str, bool | Exception]:
    """
    Ask all registries at once which of them hold the model.

    One that is gone is asked again for minutes by whoever sends files; here people wait for a
    rollback of the others, so that it is left out after `_ANSWERS_WITHIN_S`.

    Returns:
        For each, in the order given: whether it does, or what went wrong.
    """
    answers: dict[str, bool | Exception] = {}

    def ask(name: str, store: Store) -> None:
        try:
            answers[name] = _holds(store, model)
        except Exception as error:  # noqa: BLE001 - raised again by who asked
            answers[name] = error

    # Daemons: one that waits for an answer keeps no command from ending.
    threads = [
        threading.Thread(target=ask, args=each, daemon=True, name=f"ask {each[0]}")
        for each in stores.items()
    ]
    for thread in threads:
        thread.start()
    ends_at = time.monotonic() + _ANSWERS_WITHIN_S
    for thread in threads:
        thread.join(max(0.0, ends_at - time.monotonic()))
    late = RetryLaterError(
        f"it did not answer within {_ANSWERS_WITHIN_S:.0f} s and was left as it is.",
        hint="Type the same command again when it can be reached: it moves what is left.",
    )
    return {name: answers.get(name, late) for name in stores}


def _holds(store: Store, model: str) -> bool:
    alias, _token = store.read_alias(model, STABLE)
    return alias is not None or bool(store.list_releases(model))


def _plan(
    at: Layout, model: str, target: str, stores: Mapping[str, Store], ledger: Ledger
) -> _Plan:
    """
    Find the release and see that every registry holds it whole.

    Raises:
        NotThereError: One does not; the message offers what can be rolled back to.
        StoreError: `previous` means another release in each registry.
    """
    without: list[str] = []
    if target == LATEST:
        id_ = _latest(at, model)
        without = [name for name, store in stores.items() if not _is_whole(store, model, id_)]
    else:
        ids = {name: _find(model, target, store, ledger) for name, store in stores.items()}
        if len(set(ids.values())) > 1:
            said = wording.listed([f"{short(found)} in {name}" for name, found in ids.items()])
            raise StoreError(
                f"`{target}` of {model} is not the same everywhere: {said}. Nothing was changed.",
                hint=f"Name the release: fleet rollback {model} --to {short(ids[next(iter(ids))])}",
            )
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
    before = {}
    for name, store in moving.items():
        alias, _token = store.read_alias(model, STABLE)
        before[name] = alias.release if alias else None
    stable = LATEST if target == LATEST else id_
    return _Plan(target=id_, stable=stable, stores=moving, before=before, without=tuple(without))


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


def _undo(model: str, wanted: str, plan: _Plan, registry: str | None) -> str:
    """Return the command that takes it back."""
    to = wanted if wanted == LATEST else wanted[:SHORT_CHARACTERS]
    where = f" --registry {registry}" if registry else ""
    return f'fleet rollback {model} --to {to}{where} --reason "undo {short(plan.target)}"'


def _print(  # noqa: PLR0913 - each is one independent fact
    model: str,
    wanted: str,
    plan: _Plan,
    outcomes: Mapping[str, Outcome],
    undo: str,
    *,
    dry_run: bool,
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
    if not dry_run:
        console.info("  next: commit params.yaml and results/, so that every checkout knows of it")
        console.info(f"  undo: {undo}")


def _shown(stable: str) -> str:
    return stable if stable == LATEST else short(stable)
