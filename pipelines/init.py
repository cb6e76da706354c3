"""
`fleet init`: make a fleet of your own of the template, or add a model to one.

    fleet init hf:Qwen/Qwen2.5-7B-Instruct          asks what it does not know
    fleet init path:models/mine --yes ...           takes everything from the command line
    fleet init hf:acme/coder --dry-run              shows what it would write

While nothing but the example is declared, the fleet begins: the example's declaration and records
go, and the fleet's settings become such that this model can keep them. Later runs only add. What is
there already stays as it is written, so that a second run with the same answers changes nothing.
Nothing is committed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines import (
    console,
    declaration,
    init_answers,
    init_asked,
    init_change,
    init_proposal,
    wording,
)
from pipelines.errors import ParamsError
from pipelines.init_change import proposed

if TYPE_CHECKING:
    import argparse

    from pipelines.init_answers import Answers
    from pipelines.init_proposal import Proposal
    from pipelines.layout import Layout

__all__ = ["main", "proposed"]


def main(at: Layout, args: argparse.Namespace) -> int:
    """
    Do `fleet init`.

    Args:
        at: The checkout.
        args: See `fork_verbs`.

    Raises:
        ParamsError: Something has to be said that was not; names the option.
        UpstreamError: The chain cannot build the model.
        MachineError: Something cannot be written; nothing was.
    """
    answers = init_answers.of_args(args)
    if args.github:
        from pipelines import init_pull  # noqa: PLC0415 - only in a workflow

        proposal = proposed(at, answers)
        return init_pull.main(at, proposal, as_json=args.json, dry_run=args.dry_run)
    asks = console.can_ask() and not (args.yes or args.dry_run or args.json)
    if asks:
        answers = init_asked.answers(at, answers)
    _require_said(at, answers)
    proposal = init_asked.kept(at, answers) if asks else proposed(at, answers)
    if args.json:
        is_written = args.yes and not args.dry_run and proposal.is_changed
        if is_written:
            init_proposal.write(at, proposal)
        console.out(_json(at, proposal, is_written=is_written))
        return 0
    _show(proposal)
    if asks and proposal.quants and not answers.quants:
        proposal = _with_quants(at, answers, proposal)
    return _carried_out(at, proposal, args, asks=asks)


def _carried_out(at: Layout, proposal: Proposal, args: argparse.Namespace, *, asks: bool) -> int:
    """Show the change, and make it if somebody says so."""
    if not proposal.is_changed:
        console.info("Nothing changes: all of this is declared already.")
        return 0
    console.out(init_proposal.diff(at, proposal))
    if args.dry_run:
        return 0
    if not (args.yes or asks):
        raise ParamsError(
            "nobody can be asked here, so nothing was written.", hint="Add --yes to write this."
        )
    if asks and console.ask("Write this? yes or no", "yes").lower() not in {"y", "yes"}:
        console.info("Nothing was written.")
        return 0
    init_proposal.write(at, proposal)
    console.info(f"{wording.counted(len(proposal.files), 'file')} changed. Next:")
    for step in proposal.next_steps:
        console.info(f"  {step}")
    return 0


def _show(proposal: Proposal) -> None:
    if proposal.table:
        console.out(f"{proposal.source} at {str(proposal.revision)[:12]}\n\n{proposal.table}\n")
    for note in proposal.notes:
        console.warn(note)


def _with_quants(at: Layout, answers: Answers, proposal: Proposal) -> Proposal:
    """Ask which quants it shall be, now that their sizes are seen."""
    usual = ",".join(proposal.quants)
    found = proposal

    def take(told: str) -> None:
        nonlocal found
        if told != usual:
            types = tuple(dict.fromkeys(told.replace(",", " ").split()))
            found = proposed(at, replace(answers, quants=types))

    init_asked.until("Quants", usual, take)
    if found is not proposal:
        _show(found)
    return found


def _json(at: Layout, proposal: Proposal, *, is_written: bool) -> str:
    told = {
        "model": proposal.model,
        "source": proposal.source,
        "revision": proposal.revision,
        "quants": list(proposal.quants),
        "context_tokens": proposal.context_tokens,
        "host": proposal.host,
        "changed": sorted(path for path, data in proposal.files.items() if data is not None),
        "removed": sorted(path for path, data in proposal.files.items() if data is None),
        "is_written": is_written,
        "notes": list(proposal.notes),
        "next": list(proposal.next_steps),
        "diff": init_proposal.diff(at, proposal),
    }
    return json.dumps(told, indent=2, ensure_ascii=False)


def _require_said(at: Layout, answers: Answers) -> None:
    """Refuse what only a person can say, where nobody is asked."""
    is_fresh = init_change.is_fresh(declaration.load(at.params))
    if answers.names_owners_only:
        return
    if answers.source is None and is_fresh and not answers.keep_example:
        raise ParamsError(
            "which model shall it be?",
            hint="fleet init hf:owner/repo, or fleet init path:models/my-model; --keep-example "
            "begins with the one that is here",
        )
