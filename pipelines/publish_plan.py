"""
`fleet publish --plan`: which registries have something to do, told from git alone.

Somebody has to approve what is written to an environment, and nobody should be asked where nothing
changes. So no registry is asked here and no login is needed: the records of a model say what should
be published, its release and ledger what was. Under Actions the ledger that waits in a pull request
counts, too.

That a registry lost something git does not know. Whoever starts the workflow by hand means that: a
run by `workflow_dispatch` has something to do everywhere, and `fleet publish` finds out what.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines import (
    console,
    params,
    publish_hosts,
    publish_to,
    release_gates,
    runner,
    verdict_evidence,
    wording,
)
from pipelines.ledger import Ledger
from pipelines.mainline import ROLLBACK_BRANCH, Mainline
from pipelines.publishing import LATEST
from pipelines.registries import print_json, require_model
from pipelines.release_records import STABLE, parse_release, release_id, short
from pipelines.render import escape_markdown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.release_gates import Judgement
    from pipelines.release_records import Move


@dataclass(frozen=True, kw_only=True)
class Due:
    """
    What is known of one model and one registry.

    Attributes:
        is_due: Whether publishing would change something.
        why: As a clause.
    """

    model: str
    registry: str
    environment: str
    is_due: bool
    why: str


def main(
    declared: Declaration,
    at: Layout,
    *,
    model: str | None,
    environment: str | None,
    as_json: bool,
) -> int:
    """
    Say which environments have something to do; outputs `matrix` and `any`.

    Args:
        declared: The declaration.
        at: The checkout.
        model: The only one that is looked at; None for all.
        environment: The same.
        as_json: Print JSON.

    Raises:
        ParamsError: The model or the environment is not declared.
        LedgerError: A ledger is broken.
    """
    if model is not None:
        require_model(declared, model)
    if environment is not None:
        publish_to.of_environment(declared, environment)
    mainline = Mainline.of_run() if os.environ.get("GITHUB_TOKEN", "").strip() else None
    found = [
        due(declared, at, each, name, mainline)
        for each in (declared.models if model is None else (model,))
        for name, registry in declared.registries.items()
        if registry.environment is not None and environment in {None, registry.environment}
    ]
    matrix = _matrix(found)
    if as_json:
        print_json({"matrix": matrix, "models": [each.__dict__ for each in found]})
    else:
        for each in found:
            console.out(f"{each.environment}: {each.model} to {each.registry}: {each.why}")
        if not found:
            console.out("no registry of params.yaml declares an `environment`: nothing to publish")
            console.info(
                "  next: give one `environment: production` (docs/github.md), or publish from "
                "here: fleet publish --to NAME"
            )
    runner.outputs(matrix=json.dumps(matrix), any=bool(matrix["include"]))
    runner.summary(_summary(found))
    return 0


def due(
    declared: Declaration, at: Layout, model: str, registry: str, mainline: Mainline | None
) -> Due:
    """Tell from git whether publishing a model to a registry would change something."""

    def told(why: str, *, is_due: bool) -> Due:
        return Due(
            model=model,
            registry=registry,
            environment=declared.registries[registry].environment or "",
            is_due=is_due,
            why=why,
        )

    slice_ = params.publish_slice(declared, model)
    today = verdict_evidence.today()
    judged = release_gates.judge(verdict_evidence.collect(slice_, at, day=today))
    against = (
        *judged.reasons,
        *publish_hosts.refusals(declared, slice_, at, today=today),
    )
    if against:
        return told(f"may not be published: {against[0]}", is_due=False)
    if runner.event_name() == "workflow_dispatch":
        return told("asked for by hand", is_due=True)
    last = _last_move(at, model, registry, mainline)
    if (back := _rolled_back(model, registry, last, mainline)) is not None:
        return told(back, is_due=False)
    if slice_.stable != LATEST and (last is None or last.release != slice_.stable):
        return told(f"{STABLE} has to become {short(slice_.stable)}", is_due=True)
    id_ = _release(model, at, judged, mainline)
    if id_ is None or (slice_.stable == LATEST and (last is None or last.release != id_)):
        before = f", not {short(last.release)}" if last else ""
        why = f"{STABLE} has to become {short(id_)}{before}"
        return told(why if id_ else "its records are newer than its release", is_due=True)
    return told(
        f"{STABLE} is {short(last.release if last else None)}, as it has to be", is_due=False
    )


def _release(model: str, at: Layout, judged: Judgement, mainline: Mainline | None) -> str | None:
    """Return the id of the release of these records, on the default branch or waiting."""
    path = at.release(model)
    known = [path.read_bytes()] if path.exists() else []
    waiting = mainline.waiting_release(model) if mainline else None
    known += [waiting] if waiting is not None else []
    for data in known:
        there = parse_release(data, release_id(data), path.name)
        if publish_to.is_of_records(there, model, judged, at):
            return release_id(data)
    return None


def _last_move(at: Layout, model: str, registry: str, mainline: Mainline | None) -> Move | None:
    """Return the last move that git knows of, on the default branch or waiting."""
    last = Ledger.load(at.ledger(model), model).last(registry, STABLE)
    waiting = mainline.waiting(model, registry) if mainline else ()
    return max(
        (move for move in (last, *waiting) if move is not None),
        key=lambda move: move.sequence,
        default=None,
    )


def _rolled_back(
    model: str, registry: str, last: Move | None, mainline: Mainline | None
) -> str | None:
    """
    Return a clause on a rollback that waits to be merged: until then `fleet publish` refuses.

    That branch alone is nobody's word. It keeps from asking for an approval, and no more: a run by
    hand asks the registry.
    """
    if mainline is None:
        return None
    branch = ROLLBACK_BRANCH.format(model=model)
    waiting = mainline.waiting(model, registry, branch)
    newest = max(waiting, key=lambda move: move.sequence, default=None)
    if newest is None or newest.sequence <= (last.sequence if last else 0):
        return None
    return f"rolled back to {short(newest.release)}: merge {branch} first"


def _matrix(found: list[Due]) -> dict[str, list[dict[str, str]]]:
    """Return one entry for each environment with something to do."""
    environments = dict.fromkeys(each.environment for each in found if each.is_due)
    return {
        "include": [
            {
                "environment": name,
                "registries": _words(each.registry for each in found if _is_in(each, name)),
                "models": _words(each.model for each in found if _is_in(each, name)),
            }
            for name in environments
        ]
    }


def _is_in(each: Due, environment: str) -> bool:
    return each.is_due and each.environment == environment


def _words(names: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(names))


def _summary(found: list[Due]) -> str:
    count = sum(each.is_due for each in found)
    lines = [f"### Publish: {wording.counted(count, 'model')} with something to do", ""]
    if found:
        lines += ["| model | registry | environment | to do |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {each.model} | {each.registry} | {each.environment} | "
            f"{'**yes**: ' if each.is_due else 'no: '}{escape_markdown(each.why)} |"
            for each in found
        ]
    return "\n".join(lines)
