"""The host of `fleet init`: the one that is declared, named, or this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines import console, init_repository, init_text, params, wording
from pipelines.errors import ParamsError
from pipelines.init_plan import Room

if TYPE_CHECKING:
    from pipelines.init_answers import Answers
    from pipelines.init_text import Entry
    from pipelines.params import Declaration


@dataclass(frozen=True, kw_only=True)
class NewHost:
    """A host that is not declared yet."""

    name: str
    kind: str
    memory_mib: int
    labels: tuple[str, ...]

    def entry(self) -> Entry:
        """As params.yaml has it."""
        return init_text.host(
            self.name, kind=self.kind, memory_mib=self.memory_mib, labels=self.labels
        )


def choose(declared: Declaration, answers: Answers, *, begins: bool) -> tuple[NewHost | None, Room]:
    """Return a host that is to be declared, if one is, and what the host of the model has."""
    name = answers.host
    if name is None and begins and answers.detects:
        name = init_repository.machine_name()
    said = answers.vram_mib or answers.memory_mib
    if name is None:
        if said or answers.runner_labels:
            raise ParamsError("which host has that memory or label?", hint="--host NAME")
        first = next(iter(declared.hosts))
        return None, _room(first, declared.hosts[first])
    if name in declared.hosts and not begins:
        _require_same_host(name, declared.hosts[name], answers)
        return None, _room(name, declared.hosts[name])
    require_name(name)
    kind, mib = ("vram_mib", answers.vram_mib) if answers.vram_mib else ("memory_mib", said)
    if mib is None:
        if not answers.detects:
            raise ParamsError(
                f"nothing says how much memory {name} has.",
                hint="--vram MIB of its cards, or --memory MIB for models on a host without",
            )
        kind, mib, of_what = init_repository.memory()
        if name == init_repository.machine_name():
            console.info(f"{name}: {wording.mib(mib)}, {of_what}.")
        else:
            console.warn(
                f"{name} is taken for this machine: {wording.mib(mib)}, {of_what}. Of another one "
                "say --vram or --memory."
            )
    labels = ("self-hosted", *(answers.runner_labels or ("gpu", name)))
    found = NewHost(name=name, kind=kind, memory_mib=mib, labels=tuple(dict.fromkeys(labels)))
    return found, _room(name, params.Host.model_validate({kind: mib}))


def require_name(name: str) -> None:
    """
    Refuse a name that is no key of hosts:.

    Raises:
        ParamsError: It has other letters, or YAML reads it as a number or as nothing.
    """
    if not re.fullmatch(params.MODEL_KEY, name) or not init_text.is_word(name):
        allowed = params.PATTERN_WORDS[params.MODEL_KEY]
        raise ParamsError(
            f"--host {wording.quoted(name)} is not {allowed}.",
            hint=f"--host {init_text.key_of(name, or_else='host')}",
        )


def _require_same_host(name: str, spec: params.DeclaredHost, answers: Answers) -> None:
    said = {"vram_mib": answers.vram_mib, "memory_mib": answers.memory_mib}
    for key, value in said.items():
        if value is not None and value != getattr(spec, key):
            raise ParamsError(
                f"hosts.{name} is declared already, with {key}: {getattr(spec, key)}.",
                hint="Edit that line of params.yaml, or give another --host.",
            )
    odd = [label for label in answers.runner_labels if label not in (spec.runs_on or ())]
    if odd:
        raise ParamsError(
            f"hosts.{name} is declared already, and runs_on of it lacks {wording.listed(odd)}.",
            hint="Edit that line of params.yaml, or give another --host.",
        )


def _room(name: str, spec: params.Host) -> Room:
    has_cards = spec.vram_mib is not None
    total = spec.vram_mib if has_cards else spec.memory_mib
    return Room(host=name, total_mib=total or 0, margin_mib=spec.margin_mib, has_cards=has_cards)
