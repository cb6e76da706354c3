"""
What was released, on the new engine: a rollback brings its bytes back, but not its llama.cpp.

Looked at are the releases that `stable` means in the local registry and meant before, the newest
first. Each has to load on the new engine and to answer as it does on the old one. Its bytes are
believed for their sha256 alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pipelines import params, reading, release_records, wording
from pipelines.compare_sides import Wanted
from pipelines.errors import FleetError
from pipelines.ledger import Ledger
from pipelines.release_records import STABLE
from pipelines.stores import open_store
from pipelines.stores.base import NotThereError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.release_records import Alias, Release
    from pipelines.stores.base import Store

# A rollback goes to the release before; of one that was bad, too, to the one before that.
MOST_RELEASES: Final = 3


@dataclass(frozen=True, kw_only=True)
class Meant:
    """
    One release that `stable` means or meant.

    Attributes:
        id: Its id.
        is_stable: Whether `stable` means it now.
        release: It.
        type: Of the quant that it serves on the host.
        wanted: The file of that quant.
    """

    id: str
    is_stable: bool
    release: Release
    type: str
    wanted: Wanted


@dataclass(frozen=True, kw_only=True)
class Released:
    """
    What the local registry holds of a model.

    Attributes:
        found: The newest first, `MOST_RELEASES` at most.
        note: Why there is nothing, or less than was meant once; empty if all is there.
        problem: What is wrong with the registry; empty if nothing is.
    """

    found: tuple[Meant, ...] = ()
    note: str = ""
    problem: str = ""


def released(declared: Declaration, at: Layout, model: str, host: str | None) -> Released:
    """
    Look up the releases that `stable` means and meant; nothing is read of their files.

    Args:
        declared: The declaration.
        at: The checkout.
        model: Key of the model.
        host: Whose quant is taken of each; None for the one that a reader gets who can take only
            one.
    """
    try:
        store = open_store(params.LOCAL_REGISTRY, declared, at.root)
        stable = reading.find(store, model, STABLE, Ledger.load(at.ledger(model), model))
        alias, _ = store.read_alias(model, STABLE)
    except NotThereError:
        note = f"No release of {model} is in the local registry, so none was tried."
        return Released(note=note)
    except FleetError as error:
        return Released(
            problem="What was released could not be tried on the new engine: "
            f"{wording.sentence(wording.clause(error.message))}"
        )
    found: list[Meant] = []
    gone: list[str] = []
    for id_ in _meant(stable, alias):
        if len(found) == MOST_RELEASES:
            break
        try:
            found.append(_read(store, model, id_, host, is_stable=id_ == stable))
        except FleetError as error:
            if id_ == stable or not isinstance(error, NotThereError):
                problem = (
                    f"Release {release_records.short(id_)} could not be tried on the new engine: "
                    f"{wording.sentence(wording.clause(error.message))}"
                )
                return Released(found=tuple(found), problem=problem)
            gone.append(release_records.short(id_))
    note = f"Not in the local registry any more, so not tried: {', '.join(gone)}." if gone else ""
    return Released(found=tuple(found), note=note)


def _meant(stable: str, alias: Alias | None) -> Iterator[str]:
    """Yield what `stable` means and meant, each once, the newest first."""
    ids = [stable]
    for move in reversed(alias.moves if alias else ()):
        ids += [move.release, *([move.previous] if move.previous else [])]
    yield from dict.fromkeys(ids)


def _read(store: Store, model: str, id_: str, host: str | None, *, is_stable: bool) -> Meant:
    _, release, _ = reading.resolve(store, model, id_)
    own = release.hosts.get(host or "")
    type_ = (own.winner if own else None) or release.stable_quant
    file = next((each for each in release.of("gguf", type_)), None)
    if file is None:
        raise NotThereError(f"release {release_records.short(id_)} holds no GGUF of {type_}.")
    return Meant(
        id=id_,
        is_stable=is_stable,
        release=release,
        type=type_,
        wanted=Wanted(
            sha256=file.sha256,
            size_bytes=file.size_bytes,
            md5=None,
            what=f"the {type_} of release {release_records.short(id_)}",
        ),
    )
