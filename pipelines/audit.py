"""
`fleet audit`: which bytes ran when, made from what, on which evidence, by whose decision.

The ledger in git is checked line by line and compared with every registry that can be reached: a
registry that was put back to an old state, or that tells another story, is named. Then the story of
the model follows in words, from the ledger and from the releases themselves.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from pipelines import console, wording
from pipelines.errors import FleetError, RetryLaterError, StoreError
from pipelines.ledger import Ledger, LedgerError
from pipelines.records import EmbeddingQuality
from pipelines.registries import (
    Failures,
    Told,
    first_alias,
    history,
    names,
    print_json,
    require_model,
    when,
)
from pipelines.registry_verify import Finding, compare
from pipelines.release_records import STABLE, parse_release, release_id, short
from pipelines.stores import open_store
from pipelines.stores.base import NotThereError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.release_records import Alias, Move, Release, ReleasedQuant
    from pipelines.stores.base import Store

_HARMLESS: Final = frozenset({"ahead", "empty"})
_MIB: Final = 2**20
_HOURS_OF_A_DAY: Final = 24
_SECONDS_OF_AN_HOUR: Final = 3600


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """
    One registry in the story of a model.

    Attributes:
        registry: Its key.
        address: Where it is; None if it is not declared any more, or could not be reached.
        moves: What registry and ledger tell, in order.
        findings: What they tell differently.
        stable: What it means now, by the registry, else by the ledger.
    """

    registry: str
    address: str | None
    moves: tuple[Told, ...]
    findings: tuple[Finding, ...]
    stable: str | None


@dataclass(kw_only=True)
class Story:
    """
    All that is known of a model.

    Attributes:
        model: Its key.
        wanted: What params.yaml says; None if it is not declared any more.
        broken: What is wrong with the ledger itself; empty if nothing is.
        chapters: One for each registry.
        releases: Those that can still be read, by id.
    """

    model: str
    wanted: str | None
    broken: str = ""
    chapters: list[Chapter] = field(default_factory=list)
    releases: dict[str, Release] = field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        """Whether the ledger is unbroken and every registry that was asked agrees with it."""
        found = [finding for chapter in self.chapters for finding in chapter.findings]
        return not self.broken and all(finding.kind in _HARMLESS for finding in found)


def main(declared: Declaration, at: Layout, *, model: str | None, as_json: bool) -> int:
    """
    Check and tell one model, or all that are declared or have a ledger.

    Returns:
        0; 8 if a ledger is broken or a registry contradicts it; else the exit code of the first
        registry that could not be asked.

    Raises:
        ParamsError: The model is not declared and has no ledger.
    """
    known = {path.parent.name for path in at.root.glob("results/*/ledger.jsonl")}
    if model is not None and model not in known:
        require_model(declared, model)
    failures = Failures()
    silent: dict[str, FleetError] = {}
    models = (model,) if model is not None else sorted({*declared.models, *known})
    stories = [tell(declared, at, each, failures, silent) for each in models]
    if as_json:
        told = {"models": [_as_json(story) for story in stories], "errors": failures.as_json()}
        print_json(told)
    else:
        for story in stories:
            # Whatever a registry told, in a name or in a number, is no command to a terminal.
            console.out("\n".join(console.clean(line) for line in lines(story)))
    if not all(story.is_sound for story in stories):
        return StoreError.exit_code
    return failures.exit_code


def tell(
    declared: Declaration,
    at: Layout,
    model: str,
    failures: Failures,
    silent: dict[str, FleetError],
) -> Story:
    """
    Read the ledger of a model and ask every registry about it.

    Args:
        declared: The declaration.
        at: The checkout.
        model: Its key.
        failures: Gets the registries that could not be asked.
        silent: Gets those that did not answer; they are not waited for a second time.
    """
    spec = declared.models.get(model)
    story = Story(model=model, wanted=spec.stable if spec else None)
    try:
        ledger = Ledger.load(at.ledger(model), model)
    except LedgerError as error:
        story.broken = f"{error.message} {error.hint}"
        ledger = Ledger(at.ledger(model), model)  # the registries still have their story
    _read_newest(at, story)
    for name in dict.fromkeys((*names(declared), *ledger.registries)):
        moves = ledger.moves(name, STABLE)
        store: Store | None = None
        alias: Alias | None = None
        if name in names(declared):
            try:
                if name in silent:
                    raise silent[name]
                store = open_store(name, declared, at.root)
                alias = first_alias(store, model)
            except FleetError as error:
                if isinstance(error, RetryLaterError):
                    silent[name] = error
                failures.add(f"{name}, {model}", error)
                store = None
        told = history(alias, moves)
        if not told:
            continue
        known = () if store is None or story.broken else compare(name, model, alias, ledger)
        story.chapters.append(
            Chapter(
                registry=name,
                address=console.clean(store.shown) if store else None,
                moves=told,
                findings=tuple(known),
                stable=alias.release if alias else told[-1].move.release,
            )
        )
        if store is not None:
            _read_releases(store, story, told)
    return story


def _read_newest(at: Layout, story: Story) -> None:
    """Take the release that results/ holds, if it is one."""
    try:
        data = at.release(story.model).read_bytes()
        story.releases[release_id(data)] = parse_release(data, release_id(data), "results/")
    except (OSError, StoreError):
        return


def _read_releases(store: Store, story: Story, told: Sequence[Told]) -> None:
    """Read what the moves went to, where nobody gave it yet; what cannot be read stays unknown."""
    for id_ in dict.fromkeys(each.move.release for each in told):
        if id_ in story.releases:
            continue
        try:
            data = store.read_release(story.model, id_)
            story.releases[id_] = parse_release(data, id_, f"registry {store.name}")
        except NotThereError:
            continue  # collected
        except FleetError as error:
            console.warn(error.message)


def _as_json(story: Story) -> dict[str, Any]:
    return {
        "model": story.model,
        "wanted": story.wanted,
        "is_sound": story.is_sound,
        "ledger": story.broken or "unbroken",
        "registries": [
            {
                "registry": chapter.registry,
                "address": chapter.address,
                "stable": chapter.stable,
                "findings": [asdict(finding) for finding in chapter.findings],
                "moves": [
                    {
                        **json.loads(told.move.model_dump_json()),
                        "in_registry": told.in_registry,
                        "in_ledger": told.in_ledger,
                    }
                    for told in chapter.moves
                ],
            }
            for chapter in story.chapters
        ],
        "releases": {
            id_: json.loads(release.model_dump_json()) for id_, release in story.releases.items()
        },
    }


# --- in words ---------------------------------------------------------------------------------


def lines(story: Story) -> Iterator[str]:
    """Tell a story line by line: what is wrong first, then what ran when, then what it is."""
    yield story.model
    if story.broken:
        yield f"  The ledger is broken: {story.broken}"
    if not story.chapters:
        yield "  was never published."
        return
    for chapter in story.chapters:
        yield from _chapter(chapter)
    if story.wanted is None:
        yield "  It is not declared in params.yaml any more."
    else:
        yield f"  params.yaml wants {_name(story.wanted)}."
    moved = [told.move.release for chapter in story.chapters for told in chapter.moves]
    for id_ in dict.fromkeys(moved):
        yield ""
        release = story.releases.get(id_)
        if release is None:
            yield f"  Release {short(id_)}: its release.json is in no registry any more."
        else:
            yield from _release(id_, release)


def _name(id_: str) -> str:
    return f"`{id_}`" if id_ == "latest" else short(id_)


def _chapter(chapter: Chapter) -> Iterator[str]:
    """Tell what one registry served when, and why."""
    where = f" ({chapter.address})" if chapter.address else ""
    state = "could not be compared with the ledger"
    if chapter.address:
        state = "agrees with the ledger" if not chapter.findings else "differs from the ledger"
    count = wording.counted(len(chapter.moves), "move")
    yield f"  {chapter.registry}{where}: {count} of `{STABLE}`; {state}."
    for finding in chapter.findings:
        yield f"    ! {finding.message} Next: {finding.next}"
    moves = [told.move for told in chapter.moves]
    for told, following in zip(chapter.moves, [*moves[1:], None], strict=True):
        yield f"    {_move(told, following)}"
        for waiver in told.move.waivers:
            yield (
                f"       let pass: `{waiver.gate}` by {console.clean(waiver.who)} until "
                f"{waiver.until}: {console.clean(waiver.why)}"
            )


def _move(told: Told, following: Move | None) -> str:
    """Tell one move: when, who, what, why, and how long it was served."""
    move = told.move
    verb = "published" if move.action == "publish" else "rolled back to"
    instead = f" in place of {short(move.previous)}" if move.previous else ""
    run = f" (run {console.clean(move.run)})" if move.run else ""
    ours = "" if told.in_ledger else " [not in the ledger]"
    served = (
        "Served since then." if following is None else f"Served {_span(move.at, following.at)}."
    )
    return (
        f"{move.sequence}. {when(move)} UTC: {console.clean(move.who)} {verb} "
        f"{short(move.release)}{instead}: {wording.sentence(console.clean(move.why) + run)} "
        f"{served}{ours}"
    )


def _span(begin: str, end: str) -> str:
    """Write how long lies between two times of moves: `2 days`, `5 hours`; clocks may be wrong."""
    try:
        first, last = (_time(text) for text in (begin, end))
    except ValueError:
        return "for a time that nobody can tell"
    seconds = (last - first).total_seconds()
    if seconds < 0:
        return "for a time that the clocks of two machines disagree about"
    hours = int(seconds // _SECONDS_OF_AN_HOUR)
    if hours >= 2 * _HOURS_OF_A_DAY:
        return f"for {hours // _HOURS_OF_A_DAY:,} days"
    if hours >= 1:
        return f"for {wording.counted(hours, 'hour')}"
    minutes = int(seconds // 60)
    return f"for {wording.counted(minutes, 'minute')}" if minutes else "for less than a minute"


def _time(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _release(id_: str, release: Release) -> Iterator[str]:
    """Tell what a release is made from, which bytes it holds, and on what it was judged."""
    clean = console.clean
    source, tools, machine = release.source, release.tools, release.machine
    millions = wording.number(source.parameters_count / 1e6)
    yield f"  Release {short(id_)} (sha256 {id_})"
    yield (
        f"    made from {clean(source.source)} at {clean(source.revision)}: "
        f"{clean(source.architecture)}, {millions} million parameters, licence "
        f"{clean(release.license.id)}"
    )
    yield (
        f"    by llama.cpp {clean(tools.llama_cpp_commit)[:12]}, recipe {tools.recipe}; "
        f"load-tested with {clean(tools.engine)} {clean(tools.engine_version)} and "
        f"{clean(tools.modelfile)}, version {tools.modelfile_version}"
    )
    gpus = wording.listed([clean(gpu) for gpu in machine.gpus]) or clean(machine.cpu)
    yield (
        f"    measured on {gpus} ({machine.backend}, {machine.cores_count} cores, "
        f"{machine.memory_gib} GiB)"
    )
    for quant in release.quants:
        yield f"    {quant.type}: sha256 {quant.gguf_sha256}{_matrix(quant)}"
        kept = "; ".join(_kept(release, quant))
        if kept:
            yield f"       {kept}"
    for host, final in sorted(release.hosts.items()):
        winner = f", {clean(final.winner)}" if final.winner else ""
        yield f"    {clean(host)}: {final.verdict}{winner}. {clean(final.sentence)}"
        for gate in release.gates:
            if gate.host == host:
                value = wording.beyond(gate.value, gate.limit)
                limit = wording.declared(gate.limit)
                yield (
                    f"       {gate.name}: {value}, limit {limit}: {gate.outcome}. "
                    f"{clean(gate.sentence)}"
                )
    if release.previous:
        yield f"    composed after {short(release.previous)}"


def _matrix(quant: ReleasedQuant) -> str:
    if quant.imatrix_corpus_sha256 is None:
        return ""
    return f", importance matrix from corpus {short(quant.imatrix_corpus_sha256)}"


def _kept(release: Release, quant: ReleasedQuant) -> Iterator[str]:
    """Write each limit of the choice beside what was measured."""
    size_mib = sum(file.size_bytes for file in release.of("gguf", quant.type)) / _MIB
    quality = quant.quality
    measured = (
        {"min_cosine_mean": quality.cosine_mean}
        if isinstance(quality, EmbeddingQuality)
        else {
            "max_kld_mean_nats": quality.kld_mean_nats,
            "max_kld_p999_nats": quality.kld_p999_nats,
            "min_same_top": quality.same_top,
            "max_ppl_ratio": quality.ppl_ratio,
        }
    ) | {
        "min_decode_tok_s": quant.decode_tok_s,
        "min_prefill_tok_s": quant.prefill_tok_s,
        "max_size_mib": size_mib,
    }
    for name, limit in sorted(release.choice_gates.items()):
        value = measured.get(name)
        shown = wording.ABSENT if value is None else wording.beyond(value, limit)
        yield f"{console.clean(name)}: {shown}, limit {wording.declared(limit)}"
