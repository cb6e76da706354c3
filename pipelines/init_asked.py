"""
The questions of `fleet init`, for whoever sits at the terminal.

An answer is checked when it is given, and asked for again with the cause if it will not do: nothing
that was answered before it is lost.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines import (
    console,
    declaration,
    init_change,
    init_host,
    init_model,
    init_repository,
    init_state,
    wording,
)
from pipelines.errors import FleetError, ParamsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.init_answers import Answers
    from pipelines.init_proposal import Proposal
    from pipelines.init_source import Subject
    from pipelines.layout import Layout
    from pipelines.params import Declaration


def until(question: str, usual: str, take: Callable[[str], None]) -> str:
    """
    Ask until an answer will do, and return it.

    Args:
        question: Without a mark at its end.
        usual: What an empty line means.
        take: Raises a FleetError for one that will not do; it is told, and asked again.

    Raises:
        KeyboardInterrupt: The input was closed (Ctrl-D).
    """
    while True:
        told = console.ask(question, usual)
        try:
            take(told)
        except FleetError as error:
            console.warn(" ".join(filter(None, (error.message, error.hint))))
        else:
            return told


def answers(at: Layout, said: Answers) -> Answers:
    """
    Ask what was not said; an empty line takes what stands in brackets.

    Args:
        at: The checkout.
        said: By options; checked before the first question.

    Raises:
        ParamsError: What was said by an option is wrong.
        UpstreamError: The chain cannot build the model that was named.
        RetryLaterError: The Hub cannot be reached.
    """
    if said.names_owners_only:
        return said
    declared = declaration.load(at.params)
    if said.host is not None and said.host not in declared.hosts:
        init_host.require_name(said.host)
    init_repository.codeowners(at, said.owners)
    # Before `command` may repeat it.
    init_repository.dvc_config(at, said.remote)
    if said.registry is not None:
        init_change.require_registry(said.registry)
    found, subject = _model(at, declared, said)
    if subject is not None:
        found = _license(_name(at, declared, found), subject)
    is_fresh = init_change.is_fresh(declared)
    if is_fresh and not found.keep_example and init_state.is_example_host(declared.hosts):
        found = _host(found)
    if not found.owners and init_repository.needs_owner(at):
        found = _owners(at, found)
    if is_fresh and found.registry is None:
        url = until(
            "Where releases go besides this machine, as s3://bucket/prefix; or empty",
            "",
            lambda told: init_change.require_registry(told) if told else None,
        )
        found = replace(found, registry=url or None)
    return found


def kept(at: Layout, said: Answers) -> Proposal:
    """
    Work out the change of what was answered; where that fails, the error repeats the answers.

    Raises:
        FleetError: As `init_change.proposed`; its hint is a command with all of them.
    """
    try:
        return init_change.proposed(at, said)
    except FleetError as error:
        error.hint = f"{error.hint} With what you answered: {command(said)}".strip()
        raise


def command(said: Answers) -> str:
    """Write answers as the command that gives them all."""
    options = {
        "--name": said.name,
        "--revision": said.revision,
        "--quants": ",".join(said.quants) or None,
        "--context": said.context_tokens,
        "--objective": said.objective,
        "--license": said.license,
        "--host": said.host,
        "--vram": said.vram_mib,
        "--memory": said.memory_mib,
        "--runner-label": ",".join(said.runner_labels) or None,
        "--registry": said.registry,
        "--environment": said.environment,
        "--remote": said.remote,
        "--owner": ",".join(said.owners) or None,
        "--check-every": said.check_every_hours,
    }
    words = ["fleet", "init", *([said.source] if said.source else [])]
    for option, value in options.items():
        if value is not None:
            words += [option, str(value)]
    words += ["--ignore-code"] if said.ignore_code else []
    words += ["--keep-example"] if said.keep_example else []
    return shlex.join(words)


# --- the model --------------------------------------------------------------------------------


def _model(at: Layout, declared: Declaration, said: Answers) -> tuple[Answers, Subject | None]:
    if said.source is not None:
        return said, init_model.first_look(at, declared, said)
    if said.keep_example:
        return said, None
    found: Subject | None = None

    def take(told: str) -> None:
        nonlocal found
        found = init_model.first_look(at, declared, replace(said, source=told or None))
        if not told and init_change.is_fresh(declared):
            raise ParamsError(
                "which model shall it be?", hint="Ctrl-C, and --keep-example: the one that is here."
            )

    told = until("Model, as hf:owner/repo or path:folder", "", take)
    return replace(said, source=told or None), found


def _name(at: Layout, declared: Declaration, said: Answers) -> Answers:
    """Ask for a name where that of the repository or the folder, or the one said, will not do."""
    begins = init_change.is_beginning(at, declared, said)

    def take(told: str) -> None:
        init_model.require_name(told, declared, begins=begins)

    usual = init_model.name_of(said.source or "", said)
    try:
        take(usual)
    except ParamsError as error:
        console.warn(f"{error.message} {error.hint}")
        return replace(said, name=until("Name of the model", "", take))
    return said


def _license(said: Answers, subject: Subject) -> Answers:
    """Ask under which licence weights of one's own are, where no file of the folder says it."""
    if said.license is not None:
        init_model.require_license(said.license, subject)
        return said
    if not subject.source.startswith("path:") or init_model.states_license(subject):
        return said
    told = until(
        "Licence that you accept: `mine` for weights of your own, or such as apache-2.0; or empty",
        "",
        lambda told: init_model.require_license(told, subject) if told else None,
    )
    return replace(said, license=told or None)


# --- the host and the owners ------------------------------------------------------------------


def _host(said: Answers) -> Answers:
    """Ask for the host that serves, and for its memory."""
    here = init_repository.machine_name()
    if said.host is None:
        said = replace(said, host=until("Host that serves it", here, init_host.require_name))
    if said.vram_mib or said.memory_mib:
        return said
    kind, mib, of_what = init_repository.memory()
    if kind == "vram_mib":
        return replace(said, vram_mib=_mib(f"MiB of its cards (here: {of_what})", mib, least=1))
    if said.host != here:
        # What has no card here may have one there.
        cards = _mib(f"MiB of all cards of {said.host}; 0 if it has none", 0, least=0)
        if cards:
            return replace(said, vram_mib=cards)
    what = f"MiB of its main memory for models (here: {of_what})"
    return replace(said, memory_mib=_mib(what, mib, least=1))


def _mib(question: str, usual: int, *, least: int) -> int:
    def take(told: str) -> None:
        if not (told.isascii() and told.isdecimal()) or int(told) < least:
            raise ParamsError(f"{wording.quoted(told)} is no number of MiB.", hint="Such as 24576.")

    return int(until(question, str(usual), take))


def _owners(at: Layout, said: Answers) -> Answers:
    known = " ".join(init_change.owners(at, said))

    def named(told: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(told.replace(",", " ").split()))

    def take(told: str) -> None:
        init_repository.codeowners(at, named(told))

    told = until("Who agrees to changes, as @login or @organisation/team; or empty", known, take)
    # What stands in brackets was named by nobody, and is said to be so.
    return said if told == known else replace(said, owners=named(told))
