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
    init_change,
    init_host,
    init_proposal,
    init_repository,
    init_source,
    init_state,
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
        answers = _asked(at, answers)
    _require_said(at, answers)
    proposal = proposed(at, answers)
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
    told = console.ask("Quants", usual)
    if told == usual:
        return proposal
    types = tuple(dict.fromkeys(told.replace(",", " ").split()))
    proposal = proposed(at, replace(answers, quants=types))
    _show(proposal)
    return proposal


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
    if answers.source is None and is_fresh and not answers.keep_example:
        raise ParamsError(
            "which model shall it be?",
            hint="fleet init hf:owner/repo, or fleet init path:models/my-model; --keep-example "
            "begins with the one that is here",
        )
    if init_repository.needs_owner(at) and not init_change.owners(at, answers):
        raise ParamsError(
            f"{init_repository.CODEOWNERS} names nobody, and the git remote `origin` is none of "
            "GitHub that would tell.",
            hint="Say who agrees to changes: --owner @login",
        )


def _asked(at: Layout, answers: Answers) -> Answers:
    """Ask what was not said; an empty line takes what stands in brackets."""
    declared = declaration.load(at.params)
    is_fresh = init_change.is_fresh(declared)
    if answers.source is None and not answers.keep_example:
        source = console.ask("Model, as hf:owner/repo or path:folder")
        if source:
            init_source.require_source(source)
        answers = replace(answers, source=source or None)
    if is_fresh and not answers.keep_example and init_state.is_example_host(declared.hosts):
        answers = _asked_host(answers)
    if not answers.owners and init_repository.needs_owner(at):
        known = " ".join(init_change.owners(at, answers))
        owner = console.ask("Who agrees to changes, as @login or @organisation/team", known)
        answers = replace(answers, owners=tuple(owner.replace(",", " ").split()))
    if is_fresh and answers.registry is None:
        url = console.ask("Where releases go besides this machine, as s3://bucket/prefix; or empty")
        answers = replace(answers, registry=url or None)
    return answers


def _asked_host(answers: Answers) -> Answers:
    """Ask for the host that serves, and for its memory."""
    if answers.host is None:
        name = console.ask("Host that serves it", init_repository.machine_name())
        init_host.require_name(name)
        answers = replace(answers, host=name)
    if answers.vram_mib or answers.memory_mib:
        return answers
    kind, mib, of_what = init_repository.memory()
    if kind == "vram_mib":
        return replace(answers, vram_mib=_mib(f"MiB of its cards (here: {of_what})", mib, least=1))
    if answers.host != init_repository.machine_name():
        # What has no card here may have one there.
        cards = _mib(f"MiB of all cards of {answers.host}; 0 if it has none", 0, least=0)
        if cards:
            return replace(answers, vram_mib=cards)
    what = f"MiB of its main memory for models (here: {of_what})"
    return replace(answers, memory_mib=_mib(what, mib, least=1))


def _mib(question: str, usual: int, *, least: int) -> int:
    told = console.ask(question, str(usual))
    if not told.isdecimal() or int(told) < least:
        raise ParamsError(f"{wording.quoted(told)} is no number of MiB.", hint="Such as 24576.")
    return int(told)
