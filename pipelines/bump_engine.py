"""
The pull request of a newer engine: which values change together, and what it says.

    bump/llama.cpp   toolchain.llama_cpp_python and toolchain.sha256
    bump/ollama      serving.ollama, and serving.ollama_archive_sha256 where it is declared

Nothing else is pinned with them. Packages that the converter runs on (gguf, torch, transformers)
are those of requirements.lock: llama.cpp brings the gguf that it needs, and a converter that wants
another one of the others fails in `convert`, before anything is measured.

Like the body of a model's bump, this one depends on the look and the declaration alone.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Final

from pipelines import bump_body, bump_change, bump_view, console, go_versions, plan_budget, wording
from pipelines.bump_body import Link, Risk, View
from pipelines.bump_change import Bump
from pipelines.ci_records import MEASURING
from pipelines.engine_releases import pins_of
from pipelines.params import SHA256, VERSION
from pipelines.publishing_words import shown_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pipelines.engine_releases import Pin
    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.pin_lines import Place, Value
    from pipelines.upstream_records import Engine, EngineUpstream, UpstreamRecord

ENGINE_LABEL: Final = bump_change.CLASS_LABEL.format(name="engine")
# What depends on an engine: on llama.cpp everything but the files of upstream.
_STAGES: Final[Mapping[Engine, tuple[str, ...]]] = {
    "llama.cpp": tuple(stage for stage in MEASURING if stage != "fetch"),
    "ollama": ("load-test",),
}
_NAMES: Final[Mapping[Engine, str]] = {"llama.cpp": "llama-cpp-python", "ollama": "Ollama"}
_REPOSITORIES: Final[Mapping[Engine, str]] = {
    "llama.cpp": "https://github.com/abetlen/llama-cpp-python",
    "ollama": "https://github.com/ollama/ollama",
}
_IGNORED_BY: Final[Mapping[Engine, str]] = {
    "llama.cpp": "check_upstream.ignore.llama_cpp_python",
    "ollama": "check_upstream.ignore.ollama",
}
_SHOWN_BETWEEN: Final = 12


def plan(
    at: Layout,
    declared: Declaration,
    record: UpstreamRecord,
    engines: Sequence[Engine] | None = None,
    *,
    waits: bool = False,
) -> tuple[Bump, ...]:
    """
    Say which changes of engines a look proposes.

    Args:
        at: The checkout, with the records of earlier runs.
        declared: Its declaration.
        record: Of the look; it may come from elsewhere, so that its values are looked at.
        engines: The only ones; None for all.
        waits: Whether checks of the pull request wait for a click.
    """
    pins = {pin.engine: pin for pin in pins_of(declared)}
    return tuple(
        of_engine(at, declared, found, waits=waits)
        for found in record.engines
        if (engines is None or found.engine in engines)
        and found.engine in pins
        and _is_proposed(pins[found.engine], found)
    )


def of_engine(at: Layout, declared: Declaration, found: EngineUpstream, *, waits: bool) -> Bump:
    """Return the change that a look proposes of one engine; see `plan`."""
    newest = found.newest or found.pinned
    view = _view(at, declared, found, waits=waits)
    return Bump(
        subject=found.engine,
        old=found.pinned,
        new=newest,
        edits=_edits(declared, found),
        title=f"{_called(found)} {found.pinned} → {newest}",
        body=partial(bump_body.render, view),
        labels=(bump_change.LABEL, ENGINE_LABEL),
    )


def _is_proposed(pin: Pin, found: EngineUpstream) -> bool:
    """
    Tell whether a look proposes something that can be declared instead of what is declared.

    What says otherwise than its state (an older release, no digest) is no look of ours.
    """
    if found.state != "moved" or found.pinned != pin.version or found.newest is None:
        return False
    is_release = re.fullmatch(VERSION, found.newest) is not None
    if not is_release or go_versions.key(found.newest) <= go_versions.key(pin.version):
        console.warn(f"the look proposes {_NAMES[pin.engine]} {found.newest!r:.40}: passed over.")
        return False
    if pin.sha256 is not None and re.fullmatch(SHA256, found.sha256 or "") is None:
        console.warn(f"the look has no digest of {_NAMES[pin.engine]} {found.newest}: passed over.")
        return False
    return found.newest not in pin.ignored


def _edits(declared: Declaration, found: EngineUpstream) -> dict[Place, Value]:
    """Return the values that change together."""
    newest, sha256 = found.newest or found.pinned, found.sha256 or ""
    if found.engine == "llama.cpp":
        return {("toolchain", "llama_cpp_python"): newest, ("toolchain", "sha256"): sha256}
    edits: dict[Place, Value] = {("serving", "ollama"): newest}
    if declared.serving.ollama_archive_sha256 is not None:
        edits["serving", "ollama_archive_sha256"] = sha256
    return edits


# --- what it says -----------------------------------------------------------------------------


def _called(found: EngineUpstream) -> str:
    return "llama.cpp: llama-cpp-python" if found.engine == "llama.cpp" else "Ollama"


def _view(at: Layout, declared: Declaration, found: EngineUpstream, *, waits: bool) -> View:
    return View(
        lead=_lead(found),
        notice=bump_view.NOTICE if waits else "",
        risks=tuple(_risks(found)),
        facts=tuple(_facts(at, declared, found)),
        links=tuple(_links(found)),
        notes=tuple(_notes(found)),
        ignore=(
            f"close this, and {found.newest} is not proposed again (reopen it to have it back); "
            f"`{_IGNORED_BY[found.engine]}` in params.yaml says the same. Commits of yours on this "
            "branch stay: it is left alone then."
        ),
        rollback_note=(
            "press Revert on this pull request once it is merged: params.yaml, dvc.lock and the "
            "records come back as they were, and the files are still in the cache of DVC, so that "
            "nothing is made or measured again. What is served does not change by that: "
            "`fleet rollback MODEL` puts a release of before in its place."
        ),
    )


def _lead(found: EngineUpstream) -> str:
    if found.engine == "llama.cpp":
        return (
            f"There is a newer llama.cpp, in llama-cpp-python {found.newest}. This changes two "
            "lines of params.yaml, the version and the sha256 of its source distribution. "
            "Converter, quantizer, benchmark and server are all built of it, so the checks make "
            "and measure every model again, and their comment says whether to merge."
        )
    return (
        f"There is a newer Ollama, {found.newest}. This changes `serving.ollama` in params.yaml. "
        "No GGUF depends on it: the checks serve every model with it and put it under load again, "
        "and their comment says whether to merge."
    )


def _risks(found: EngineUpstream) -> Iterator[Risk]:
    for note in found.notes:
        yield Risk("Note", note)


def _facts(at: Layout, declared: Declaration, found: EngineUpstream) -> Iterator[tuple[str, str]]:
    yield "Release", f"{found.pinned} → {found.newest}"
    if found.newest_at is not None:
        waited = declared.check_upstream.cooldown_days
        over = f"; {wording.counted(waited, 'day')} of waiting are over" if waited else ""
        yield "There since", f"{found.newest_at:%Y-%m-%d %H:%M} UTC{over}"
    yield "Releases between", _between(found)
    if found.sha256 is not None:
        size = f", {shown_size(found.size_bytes)}" if found.size_bytes else ""
        who = "package index" if found.engine == "llama.cpp" else "release on GitHub"
        yield "sha256", f"{found.sha256}{size}, as the {who} says; other bytes are never unpacked"
    models = tuple(declared.models)
    runs = {model: bump_view.runs_of(declared, model, _STAGES[found.engine]) for model in models}
    every = tuple(run for of_one in runs.values() for run in of_one)
    yield (
        "To run again",
        f"{bump_view.stages_of(every)}, of {wording.counted(len(models), 'model')}",
    )
    budget = plan_budget.together(
        bump_view.budget_of(at, declared, model, of_one) for model, of_one in runs.items()
    )
    yield "Takes", bump_view.cost_of(budget)


def _between(found: EngineUpstream) -> str:
    versions = [one for one in found.versions_between if re.fullmatch(VERSION, one)]
    shown = ", ".join(versions[:_SHOWN_BETWEEN])
    more = len(versions) - _SHOWN_BETWEEN
    return (f"{shown} and {more} more" if more > 0 else shown) or "none"


def _notes(found: EngineUpstream) -> Iterator[str]:
    if found.engine == "llama.cpp":
        yield (
            "Speed and divergence are measured with the old and with the new llama.cpp on the same "
            "GGUF, so that what the engine changes is told from what other files change."
        )
        yield (
            "Releases that `stable` means, and those before them, are loaded by the new llama.cpp "
            "and held against the old one: their files stay as they are, and hosts may serve them "
            "with it."
        )
        yield (
            "The packages that the converter runs on (gguf, torch, transformers) stay those of "
            "requirements.lock. If it needs others, `convert` fails before anything is measured."
        )
        return
    yield (
        "The llama-server below Ollama is that of the toolchain, before and after: what differs is "
        "the server in front of it."
    )


def _links(found: EngineUpstream) -> Iterator[Link]:
    """Yield where to read on; both releases are three numbers."""
    home = _REPOSITORIES[found.engine]
    versions = f"v{found.pinned}...v{found.newest}"
    yield Link(text="what changed", url=f"{home}/compare/{versions}")
    if found.engine == "llama.cpp":
        yield Link(text="its change log", url=f"{home}/blob/v{found.newest}/CHANGELOG.md")
    else:
        yield Link(text="release notes", url=f"{home}/releases/tag/v{found.newest}")
