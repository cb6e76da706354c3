"""
From answers to the files that `fleet init` would write: params.yaml, owners, remote, the example.

What is asked of a model is in `init_model`, of a host in `init_host`; the text in `init_text`.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import (
    declaration,
    init_host,
    init_model,
    init_plan,
    init_repository,
    init_settings,
    init_source,
    init_state,
    init_text,
    params,
    wording,
)
from pipelines.errors import ParamsError
from pipelines.init_proposal import PARAMS, Proposal
from pipelines.init_source import COMPLETION_MODELFILE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.init_answers import Answers
    from pipelines.init_host import NewHost
    from pipelines.init_model import Wanted
    from pipelines.init_text import Entry
    from pipelines.layout import Layout
    from pipelines.params import Declaration

PRODUCTION: Final = "production"


def proposed(at: Layout, answers: Answers) -> Proposal:
    """
    Work out what would change; nothing is written.

    Args:
        at: The checkout.
        answers: What was said.

    Raises:
        ParamsError: An answer is wrong or contradicts what is declared, or params.yaml is wrong.
        UpstreamError: The chain cannot build the model.
        RetryLaterError: The Hub cannot be reached.
    """
    before = at.params.read_bytes()
    declared = declaration.load(at.params)
    # First of all: whoever mistyped the folder is told that, and nothing of his host.
    if answers.source is not None and not init_model.is_declared(at, declared, answers):
        init_source.require_source(answers.source, at)
    begins = is_beginning(at, declared, answers)
    # Hosts that somebody declared before his first model are his.
    new_hosts = begins and init_state.is_example_host(declared.hosts)
    host, room = init_host.choose(declared, answers, begins=new_hosts)
    wanted = init_model.choose(at, declared, answers, room, begins=begins)
    exchanged = _BEGUN if new_hosts else _BEGUN - {"hosts"} if begins else frozenset()
    sections: dict[str, str | None] = {}
    entries: list[Entry] = []
    if begins and wanted is not None:
        sections = _sections(at, declared, wanted, host if new_hosts else None)
    elif wanted is not None:
        entries += wanted.entries
    if host is not None and not new_hosts:
        entries.append(host.entry())
    data = _text(before.decode(), sections, entries, declared, answers)
    files: dict[str, bytes | None] = {PARAMS: data} if data != before else {}
    has_modelfile = (at.root / COMPLETION_MODELFILE).exists()
    if wanted is not None and wanted.needs_modelfile and not has_modelfile:
        files[COMPLETION_MODELFILE] = init_model.COMPLETION.encode()
    owned, note = _owned(at, answers)
    files |= owned | init_repository.dvc_config(at, answers.remote)
    if begins:
        files |= init_repository.example_records(at, tuple(declared.models))
    _require_kept(declared, _valid(at, data, files), exchanged)
    notes = [*(wanted.notes if wanted else ()), *([note] if note else []), *_network_notes(answers)]
    return Proposal(
        answers=answers,
        files=files,
        read={path: _bytes(at.root / path) for path in files} | {PARAMS: before},
        model=wanted.name if wanted else None,
        source=wanted.subject.source if wanted else None,
        revision=wanted.subject.revision if wanted else None,
        quants=tuple(each.type for each in wanted.plan.quants) if wanted else (),
        context_tokens=wanted.plan.context_tokens if wanted else None,
        host=room.host,
        notes=tuple(notes),
        table=init_plan.table(wanted.plan) if wanted else "",
        next_steps=_next_steps(wanted, begins=begins),
    )


def _next_steps(wanted: Wanted | None, *, begins: bool) -> tuple[str, ...]:
    if wanted is None:
        title = "Set up the fleet"
    elif begins:
        title = f"Begin with {wanted.name}"
    else:
        title = f"Add {wanted.name}" if wanted.is_new else f"Add quants of {wanted.name}"
    return (
        "fleet check",
        "fleet doctor",
        f'git add -A && git commit -m "{title}"',
        "fleet repro",
    )


def is_fresh(declared: Declaration) -> bool:
    """Tell whether nothing but the example is declared."""
    return init_state.is_fresh({name: {"source": m.source} for name, m in declared.models.items()})


def is_beginning(at: Layout, declared: Declaration, answers: Answers) -> bool:
    """Tell whether the model that was named takes the place of the example."""
    return (
        is_fresh(declared)
        and answers.source is not None
        and not answers.keep_example
        and not init_model.is_declared(at, declared, answers)
    )


def owners(at: Layout, answers: Answers) -> tuple[str, ...]:
    """Return who was named, else the owner of the repository, where CODEOWNERS names nobody yet."""
    if answers.owners or not init_repository.needs_owner(at):
        return answers.owners
    return init_repository.owners_of(at)


def _owned(at: Layout, answers: Answers) -> tuple[dict[str, bytes | None], str]:
    """Return CODEOWNERS, if it changes, and what is to be said of it."""
    named = owners(at, answers)
    files, note = init_repository.codeowners(at, named)
    if not named and init_repository.needs_owner(at):
        note = (
            f"{init_repository.CODEOWNERS} stays as it is, and names nobody: the git remote "
            "`origin` is none of GitHub. Once it is known who agrees to changes: fleet init "
            "--owner @login"
        )
    if files and not answers.owners:
        note = (
            f"{named[0]}, of the git remote `origin`, becomes the owner in "
            f"{init_repository.CODEOWNERS}. GitHub takes no organisation for one: if that is one, "
            f"say --owner {named[0]}/TEAM."
        )
    return files, note


# --- params.yaml ------------------------------------------------------------------------------


def _text(
    text: str,
    sections: Mapping[str, str | None],
    entries: Sequence[Entry],
    declared: Declaration,
    answers: Answers,
) -> bytes:
    """Write params.yaml: sections of the example exchanged, entries put behind the last ones."""
    if sections:
        text = init_text.begun(text, sections)
    added = [*entries, *_registry(declared, answers, text)]
    if added:
        text = init_text.grown(text, added)
    return _with_period(text.encode(), answers)


def _sections(
    at: Layout, declared: Declaration, wanted: Wanted, host: NewHost | None
) -> dict[str, str | None]:
    """Return the sections of a fleet that begins with this model."""
    corpus = declared.corpora.get("evaluation") or next(iter(declared.corpora.values()))
    path = at.root / corpus.path
    settings = init_settings.make(
        wanted.subject, wanted.plan, corpus_bytes=path.stat().st_size if path.is_file() else 0
    )
    found: dict[str, str | None] = {
        "models": init_text.section("models", [wanted.model_entry]),
        "quants": init_text.section("quants", init_text.quants(wanted.name, wanted.plan.quants)),
        "benchmark": init_text.benchmark(settings),
        "load_test": init_text.load_test(settings),
    }
    if host is not None:
        found["hosts"] = init_text.section("hosts", [host.entry()])
    if set(declared.evals) == {init_model.EVAL} and "evals" not in wanted.more:
        found["evals"] = None
    trained = wanted.subject.trained_tokens or wanted.plan.context_tokens
    if wanted.plan.uses_matrix and trained < declared.calibrate.context_tokens:
        found["calibrate"] = init_text.calibrate(settings.window_tokens)
    return found


def require_registry(url: str) -> None:
    """
    Refuse what is no address of a registry.

    Raises:
        ParamsError: It is none; never repeated, since it may hold a password.
    """
    if not re.fullmatch(params.REGISTRY, url):
        raise ParamsError(
            f"--registry is not {params.PATTERN_WORDS[params.REGISTRY]}.",
            hint="Credentials come from the environment (docs/registry.md).",
        )


def _registry(declared: Declaration, answers: Answers, text: str) -> tuple[Entry, ...]:
    """Return the registry `production`, if one is named that is not declared."""
    if answers.registry is None:
        if answers.environment is not None:
            raise ParamsError(
                "`--environment` guards a registry, and none is named.", hint="--registry URL"
            )
        return ()
    known = declared.registries.get(PRODUCTION)
    if known is not None:
        if known.url != answers.registry:
            raise ParamsError(
                f"registries.{PRODUCTION} is declared already, with url: {known.url}.",
                hint="Edit that line of params.yaml, or add another registry there.",
            )
        return ()
    require_registry(answers.registry)
    more = {"environment": answers.environment or PRODUCTION}
    if answers.registry.startswith("mlflow:"):
        more["blobs"] = params.LOCAL_REGISTRY
    entry = init_text.registry(PRODUCTION, answers.registry, **more)
    if re.search(r"(?m)^registries:", text):
        return (entry,)
    # Without a section there is this one; with one, it is better seen.
    return (init_text.registry(params.LOCAL_REGISTRY, params.LOCAL_URL), entry)


def _with_period(data: bytes, answers: Answers) -> bytes:
    """Declare how often upstream is looked at."""
    hours = answers.check_every_hours
    if hours is None:
        return data
    from pipelines import pin_lines  # noqa: PLC0415 - only for this option

    if not re.search(rb"(?m)^check_upstream:", data):
        block = init_text.check_upstream(hours)
        return init_text.begun(data.decode(), {"check_upstream": block}).encode()
    return pin_lines.changed(data, {("check_upstream", "period_hours"): hours})


def _valid(at: Layout, data: bytes, files: Mapping[str, bytes | None]) -> Declaration:
    """
    Read what would become params.yaml as every stage will.

    Raises:
        ParamsError: It is no declaration, or names a file that is not right.
    """
    with tempfile.TemporaryDirectory(prefix="fleet-init-") as folder:
        path = Path(folder).resolve() / PARAMS
        path.write_bytes(data)
        try:
            declared = declaration.load(path)
        except ParamsError as error:
            what = [problem.text for problem in error.problems]
            raise ParamsError(
                "with these answers params.yaml would be wrong:\n  " + "\n  ".join(what),
                hint="Give another answer; nothing was written.",
            ) from None
    # It is written together with what names it.
    new = COMPLETION_MODELFILE if COMPLETION_MODELFILE in files else None
    problems = [
        problem
        for problem in declaration.check_files(declared, at.root)
        if new is None or f"Modelfile {wording.quoted(new)} does not exist" not in problem.text
    ]
    if problems:
        raise ParamsError(
            "params.yaml names files that are not right:\n  "
            + "\n  ".join(problem.text for problem in problems),
            hint="Correct them first: fleet check",
        )
    return declared


# What is exchanged where a fleet begins; of the others entries are only added to these.
_BEGUN: Final = frozenset(
    {"models", "quants", "evals", "calibrate", "benchmark", "load_test", "hosts", "registries"}
)
_GROWN: Final = frozenset({"models", "quants", "hosts", "registries"})


def _require_kept(before: Declaration, after: Declaration, exchanged: frozenset[str]) -> None:
    """
    See that all that was declared is declared as it was, whatever the text looks like now.

    Args:
        before: What was declared.
        after: What will be.
        exchanged: Sections of the example, which go.

    Raises:
        ParamsError: Something else would change.
    """
    old, new = before.model_dump(), after.model_dump()
    odd = []
    for key, was in old.items():
        if key == "check_upstream" or key in exchanged:
            continue
        is_ = new[key]
        if key in _GROWN:
            is_ = {name: value for name, value in is_.items() if name in was}
        if is_ != was:
            odd.append(key)
    if odd:
        raise ParamsError(
            f"{', '.join(odd)} cannot be kept as it is in params.yaml; it was left alone.",
            hint="Write one entry of a section on each line, and run the same command again.",
        )


def _network_notes(answers: Answers) -> list[str]:
    """Say what else a remote that is named needs."""
    if answers.remote is None:
        return []
    return [
        "What is in DVC's old remote stays there: `dvc push` brings what is here to the new one."
    ]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
