"""What an operator says of the fleet that he begins: the options of `fleet init`, as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from pipelines.params import Objective


@dataclass(frozen=True, kw_only=True)
class Answers:
    """
    What was answered; None or nothing where the default counts.

    Attributes:
        source: `hf:owner/repo` or `path:folder` of a model; None leaves the models as they are.
        name: Key of the model.
        revision: Branch, tag or commit of the Hub.
        quants: Types as llama-quantize calls them.
        context_tokens: At which the model will be served.
        objective: What is made best.
        license: That is accepted of a model whose files state none; `mine`: of one's own weights.
        ignore_code: Take a model without the code that it is said to need.
        host: Key in hosts:.
        vram_mib: Memory of its cards.
        memory_mib: Main memory for a model, on a host without cards.
        runner_labels: Of its runner, beside `self-hosted`.
        registry: Address of the registry `production`.
        environment: Of GitHub, that guards it.
        remote: Address of the DVC remote.
        owners: Code owners: `@login` or `@organisation/team`.
        check_every_hours: How often upstream is looked at.
        keep_example: Keep the example model and its records.
        detects: Whether what is not said may be taken from this machine: its name, its memory.
    """

    source: str | None = None
    name: str | None = None
    revision: str | None = None
    quants: tuple[str, ...] = ()
    context_tokens: int | None = None
    objective: Objective | None = None
    license: str | None = None
    ignore_code: bool = False
    host: str | None = None
    vram_mib: int | None = None
    memory_mib: int | None = None
    runner_labels: tuple[str, ...] = ()
    registry: str | None = None
    environment: str | None = None
    remote: str | None = None
    owners: tuple[str, ...] = ()
    check_every_hours: int | None = None
    keep_example: bool = False
    detects: bool = True

    @property
    def names_owners_only(self) -> bool:
        """Whether somebody is to agree to changes, and all else stays."""
        return bool(self.owners) and replace(self, owners=(), detects=True) == Answers()


def of_args(args: argparse.Namespace) -> Answers:
    """
    Take over what was typed. A blank counts as nothing: so a workflow passes every input.

    In a workflow (`--github`) nothing is taken from the machine: it is nobody's.
    """

    def text(value: str | None) -> str | None:
        return (value or "").strip() or None

    return Answers(
        source=text(args.source),
        name=text(args.name),
        revision=text(args.revision),
        quants=_words([args.quants or ""]),
        context_tokens=args.context,
        objective=args.objective or None,
        license=text(args.license),
        ignore_code=args.ignore_code,
        host=text(args.host),
        vram_mib=args.vram,
        memory_mib=args.memory,
        runner_labels=_words(args.runner_label),
        registry=text(args.registry),
        environment=text(args.environment),
        remote=text(args.remote),
        owners=_words(args.owner),
        check_every_hours=args.check_every,
        keep_example=args.keep_example,
        detects=not args.github,
    )


def _words(values: list[str]) -> tuple[str, ...]:
    """Return single words of what was typed with commas or blanks between, each once."""
    words = (word for value in values for word in value.replace(",", " ").split())
    return tuple(dict.fromkeys(words))
