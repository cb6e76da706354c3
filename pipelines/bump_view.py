"""
What the pull request of a bumped model says: title, labels and view, made of the last look.

Everything comes from the record of the look, the declaration and the records of earlier runs, and
nothing from the clock: the same look gives the same words.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from pipelines import bump_change, comment_model, plan_budget, wording
from pipelines.bump_body import FileLine, Link, Risk, View
from pipelines.bundle import measured_hosts, primary_host
from pipelines.ci_records import MEASURING, PlannedRun
from pipelines.params import quants_of
from pipelines.publishing_words import shown_size

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from pipelines.ci_records import Budget
    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.upstream_records import (
        ChangeClass,
        Difference,
        FileChange,
        FileState,
        ModelUpstream,
        TensorChanges,
    )

HUB: Final = "https://huggingface.co"
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_WORDS: Final[dict[ChangeClass, str]] = {
    "weights": "weights",
    "tokenizer": "tokenizer",
    "template": "chat template",
    "config": "configuration",
    "generation": "sampling defaults",
    "licence": "licence",
    "card": "model card",
}
# What somebody should think of before the numbers come; in the order in which it is said.
_RISKS: Final[dict[ChangeClass, tuple[str, str]]] = {
    "licence": (
        "Licence",
        "it is another one. Somebody has to read it; publishing is held until it is accepted.",
    ),
    "template": (
        "Chat template",
        "the same conversation becomes another prompt, tool calls included. Read the difference.",
    ),
    "tokenizer": (
        "Tokenizer",
        "the same text becomes other tokens: lengths and numbers of before compare in part.",
    ),
    "config": ("Configuration", "the converter may write another model of it; the keys are below."),
}
# How the notes of a difference begin that say that a build would fail.
_REFUSED: Final = "Would be refused: "
_GATED: Final = "It is gated now"
_OF_QUANTS: Final = frozenset({"quantize", "benchmark"})
_NAMES_SHOWN: Final = 4
_MOST_UNKNOWN: Final = 3
# How `plan_budget` begins what it has no times of.
_UNTIMED: Final = "how long "
NOTICE: Final = (
    "**The checks wait for a click.** A job's own token opened this, and GitHub starts no workflow "
    "for that: press *Approve workflows to run* in the box below (where there is none, close this "
    "pull request and open it again). With the token of an App they start by themselves."
)


def title(found: ModelUpstream) -> str:
    """Return the title of the pull request: words and digests of ours alone."""
    classes = found.difference.classes if found.difference else ()
    what = f" ({', '.join(classes)})" if classes else ""
    return f"{found.model}: {_pair(found)}{what}"


def _pair(found: ModelUpstream) -> str:
    return f"{bump_change.short(found.pinned)} → {bump_change.short(found.newest or '')}"


def labels(found: ModelUpstream) -> tuple[str, ...]:
    """Return its labels: `bump`, and one for each class of what changed."""
    classes = found.difference.classes if found.difference else ()
    return (
        bump_change.LABEL,
        *(bump_change.CLASS_LABEL.format(name=name) for name in classes),
    )


def of_model(at: Layout, declared: Declaration, found: ModelUpstream, *, waits: bool) -> View:
    """
    Compose what the body says.

    Args:
        at: The checkout, with the records of earlier runs.
        declared: Its declaration.
        found: What the look found of the model; there is something newer.
        waits: Whether checks wait for a click.
    """
    difference = found.difference
    notes = difference.notes if difference else ()
    commands, note = comment_model.rollback(found.model, at)
    return View(
        lead=_lead(found),
        notice=NOTICE if waits else "",
        risks=tuple(_risks(found)),
        facts=tuple(_facts(at, declared, found)),
        links=tuple(_links(found)),
        files=tuple(_file(each) for each in difference.files) if difference else (),
        files_count=difference.files_count if difference else 0,
        notes=tuple(each for each in notes if not each.startswith(_REFUSED)),
        commits=found.commits,
        commits_count=len(found.commits),
        details=tuple(difference.details.items()) if difference else (),
        ignore=_ignore(found),
        rollback=commands,
        rollback_note=note,
    )


def _lead(found: ModelUpstream) -> str:
    classes = found.difference.classes if found.difference else ()
    kind, _, place = found.source.partition(":")
    then = (
        f"This changes one line of params.yaml, the `revision` of {found.model}. The checks build "
        "and measure what follows from it, and their comment says whether to merge."
    )
    if kind == "path":
        return f"The files in {place} are not those that are declared. {then}"
    what = wording.listed([_WORDS[name] for name in classes]) or "something"
    return f"{place} has a newer revision: {what} changed. {then}"


def _ignore(found: ModelUpstream) -> str:
    newest = bump_change.short(found.newest or "")
    return (
        f"close this, and {newest} is not proposed again (reopen it to have it back); "
        f"`models.{found.model}.ignore` in params.yaml says the same. Commits of yours on this "
        "branch stay: it is left alone then."
    )


# --- risks ------------------------------------------------------------------------------------


def _risks(found: ModelUpstream) -> Iterator[Risk]:
    difference = found.difference
    if difference is None:
        return
    for note in difference.notes:
        if note.startswith(_REFUSED):
            yield Risk("Would be refused", note.removeprefix(_REFUSED))
    _, gated, rest = found.reason.partition(_GATED)
    if gated:
        yield Risk("Access", f"it is gated now{rest} Whoever fetches it needs a token that may.")
    if difference.tensors is not None and (shape := _tensor_risk(difference.tensors)):
        yield Risk("Tensors", f"{shape}. The pinned llama.cpp may not convert that.")
    for kind, (label, text) in _RISKS.items():
        if kind in difference.classes:
            yield Risk(label, text)


def _tensor_risk(tensors: TensorChanges) -> str:
    """Name tensors that are not what they were by name, shape or type."""
    parts = [
        f"{wording.counted(count, word)} ({_few(names, count)})"
        for word, names, count in (
            ("added tensor", tensors.added, tensors.added_count),
            ("removed tensor", tensors.removed, tensors.removed_count),
            ("tensor", tensors.retyped, tensors.retyped_count),
        )
        if count
    ]
    if tensors.retyped_count:
        parts[-1] += " of another shape or type"
    return wording.listed(parts)


def _few(names: tuple[str, ...], count: int) -> str:
    more = count - len(names[:_NAMES_SHOWN])
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


# --- facts ------------------------------------------------------------------------------------


def _facts(at: Layout, declared: Declaration, found: ModelUpstream) -> Iterator[tuple[str, str]]:
    where = f", tag {found.newest_tag}" if found.newest_tag else ""
    on = f" on {found.track}" if found.source.startswith("hf:") and not where else ""
    yield "Revision", f"{_pair(found)}{on}{where}"
    if found.newest_at is not None:
        days = declared.models[found.model].cooldown_days
        waited = declared.check_upstream.cooldown_days if days is None else days
        text = f"{found.newest_at:%Y-%m-%d %H:%M} UTC"
        yield (
            "On the Hub since",
            (f"{text}; {wording.counted(waited, 'day')} of waiting are over" if waited else text),
        )
    difference = found.difference
    if difference is not None:
        yield "Changed", _changed(difference)
    if difference is not None and found.source.startswith("hf:"):
        size = difference.download_bytes
        again = f"{shown_size(size)}; what did not change is not fetched again"
        yield "Download", again if size else "nothing"
    runs = runs_of(declared, found.model, difference.stages if difference else MEASURING)
    if runs:
        yield "To run again", f"at most {stages_of(runs)}"
        yield "Takes", cost_of(budget_of(at, declared, found.model, runs))


def _changed(difference: Difference) -> str:
    """Say what changed: `weights (2 files, 6.68 → 7.01 MiB), chat template (1 file)`."""
    parts = []
    for kind in difference.classes:
        files = [each for each in difference.files if each.kind == kind]
        if not files:
            parts.append(_WORDS[kind])
            continue
        text = wording.counted(len(files), "file")
        if kind == "weights":
            old, new = (sum(_bytes(state) for state in states) for states in (
                [each.old for each in files], [each.new for each in files],
            ))  # fmt: skip
            text += f", {shown_size(old)} → {shown_size(new)}" if old != new else (
                f", {shown_size(new)} as before"
            )  # fmt: skip
        parts.append(f"{_WORDS[kind]} ({text})")
    return ", ".join(parts) or "no file of a build"


def _bytes(state: FileState | None) -> int:
    return state.size_bytes if state else 0


def runs_of(declared: Declaration, model: str, stages: Collection[str]) -> tuple[PlannedRun, ...]:
    """Return what has to run of these stages; what the model does not declare never does."""
    quants = quants_of(declared, model)
    spec = declared.models[model]
    idle = set()
    if not any(declared.quants[key].imatrix for key in quants):
        idle.add("calibrate")
    if not spec.evals:
        idle.add("evaluate")
    return tuple(
        PlannedRun(stage=stage, key=key, why="")
        for stage in MEASURING
        if stage in stages and stage not in idle
        for key in (quants if stage in _OF_QUANTS else (model,))
    )


def stages_of(runs: tuple[PlannedRun, ...]) -> str:
    """Name stages: `convert, quantize (5)`."""
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.stage] = counts.get(run.stage, 0) + 1
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def budget_of(
    at: Layout, declared: Declaration, model: str, runs: tuple[PlannedRun, ...]
) -> Budget:
    """Say what the runs cost on all measured hosts; the download is told by the look itself."""
    without = tuple(run for run in runs if run.stage != "fetch")
    hosts = measured_hosts(declared, model) or (primary_host(declared, model),)
    return plan_budget.together(
        plan_budget.of_runs(declared, at, model, without, host=host) for host in hosts
    )


def cost_of(budget: Budget) -> str:
    """Say what runs cost, and what nobody knows of it."""
    parts = []
    if budget.gpu_minutes is not None:
        untimed = any(text.startswith(_UNTIMED) for text in budget.unknown)
        about = "at least" if untimed else "about"
        parts.append(f"{about} {comment_model.minutes(budget.gpu_minutes * 60)} on runners")
    if budget.disk_bytes is not None:
        parts.append(f"{shown_size(budget.disk_bytes)} of disk")
    known = ", ".join(parts) or "nobody knows yet"
    return "; ".join([known, *budget.unknown[:_MOST_UNKNOWN]])


# --- files and links --------------------------------------------------------------------------


def _file(each: FileChange) -> FileLine:
    old, new = each.old, each.new
    if old is None:
        change = "new"
    elif new is None:
        change = "gone"
    else:
        more = new.size_bytes - old.size_bytes
        change = f"{'+' if more > 0 else '−'}{shown_size(abs(more))}" if more else "same size"  # noqa: RUF001 - a minus
    return FileLine(
        name=each.name,
        kind=_WORDS[each.kind],
        before=shown_size(old.size_bytes) if old else wording.ABSENT,
        after=shown_size(new.size_bytes) if new else wording.ABSENT,
        change=change,
    )


def _links(found: ModelUpstream) -> Iterator[Link]:
    """
    Yield where to read on; of a repository of the Hub alone.

    None where HF_ENDPOINT names another place: a mirror has no pages that we know of, its address
    may hold a secret, and what the Hub has under this name was not looked at.
    """
    from pipelines import hub_metadata  # noqa: PLC0415 - not for --help

    kind, _, place = found.source.partition(":")
    if kind != "hf" or not _REPOSITORY.fullmatch(place) or found.newest is None:
        return
    if hub_metadata.endpoint() != HUB:
        return
    yield Link(text="Commits", url=f"{HUB}/{place}/commits/{found.newest}")
    yield Link(text="the newest", url=f"{HUB}/{place}/commit/{found.newest}")
    yield Link(text="files now", url=f"{HUB}/{place}/tree/{found.newest}")
    yield Link(text="files before", url=f"{HUB}/{place}/tree/{found.pinned}")
