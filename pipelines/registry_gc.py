"""
`fleet gc`: free what no promised rollback needs any more.

Mark and sweep. Kept is every release that an alias meant in its last moves or in the last days (by
the registry and by the ledger in git, whichever knows more), what params.yaml and results/ name,
and everything that is young. Releases go first, then the blobs that no release names: a kill
between the two leaves blobs that the next run frees, never a release without its files.

Somebody may publish meanwhile. So aliases are read again right before releases are removed and
right after, and releases are listed again right before blobs are: what was taken into use in
between stays or is put back. What cannot be read is not known, and where something is not known
nothing is removed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from pipelines import console, params, wording
from pipelines.errors import ParamsError, StoreError
from pipelines.registries import ledgers_of, print_json, shown
from pipelines.release_records import STABLE, parse_release, release_id, short
from pipelines.stores import open_store
from pipelines.stores.base import NotThereError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from pipelines.layout import Layout
    from pipelines.ledger import Ledger
    from pipelines.params import Declaration
    from pipelines.release_records import Move, Release
    from pipelines.stores.base import Store, StoredBlob

KEEP_MOVES: Final = 10
KEEP_DAYS: Final = 90
# Younger than this may belong to a publisher who is still at work.
YOUNG_S: Final = 24 * 3600.0

_MIB: Final = 2**20

_Key = tuple[str, str]  # model, release id


@runtime_checkable
class _DatesReleases(Protocol):
    """A store that knows when a release was put; others are asked for the age of its files."""

    def release_age_s(self, model: str, id_: str) -> float | None:
        """Seconds since it was written; None if unknown."""
        ...


@runtime_checkable
class _SweepsUploads(Protocol):
    """A store in which uploads that nobody went on with take room until somebody ends them."""

    def sweep(self) -> int:
        """End them; return how many there were."""
        ...


@dataclass(frozen=True, kw_only=True)
class GcRelease:
    """One stored release and why it stays or goes."""

    model: str
    id: str
    why: str


@dataclass(frozen=True, kw_only=True)
class GcPlan:
    """
    What a collection removes, or would.

    Attributes:
        registry: Key in params.yaml.
        applied: Whether it was done; else this is the plan.
        kept: Releases that stay.
        releases: Releases that go.
        blobs: Files that go.
        freed_bytes: Their size.
        kept_blobs_count: Files that stay since a release names them.
        kept_bytes: Their size.
        waiting_count: Files that nothing names, but too young, or of an age that is not known.
        notes: What else a person should know.
    """

    registry: str
    applied: bool
    kept: tuple[GcRelease, ...]
    releases: tuple[GcRelease, ...]
    blobs: tuple[StoredBlob, ...]
    freed_bytes: int
    kept_blobs_count: int
    kept_bytes: int
    waiting_count: int
    notes: tuple[str, ...]


def collect(  # noqa: PLR0913 - each of them decides what stays
    store: Store,
    ledgers: Mapping[str, Ledger],
    *,
    now: datetime,
    keep_moves: int = KEEP_MOVES,
    keep_days: int = KEEP_DAYS,
    pinned: Collection[str] = (),
    apply: bool = False,
) -> GcPlan:
    """
    Remove the releases and files that no promised rollback needs.

    Args:
        store: The registry.
        ledgers: Of each model that this checkout knows. Releases of other models stay: what their
            fleet still names cannot be seen from here.
        now: UTC; moves of the last `keep_days` before it are kept, and ages are counted up to it.
        keep_moves: Last moves of each alias whose releases are kept.
        keep_days: Days whose moves are kept.
        pinned: Ids of releases that stay in any case.
        apply: Remove; without it only the plan is made.

    Raises:
        ParamsError: The limits promise no rollback at all.
        StoreError: A release or an alias there cannot be read, or an alias means a release that is
            not there; nothing was removed then. Or somebody published in the very moment in which
            a file of his was removed; the message says how to mend that.
        LedgerError: A ledger is broken.
    """
    if keep_moves < 1 or keep_days < 0:
        raise ParamsError(
            "a collection keeps at least the last move: `--keep-moves` 1 or more, `--keep-days` "
            "0 or more."
        )
    sweep = _Sweep(
        store=store,
        ledgers=ledgers,
        since=now - timedelta(days=keep_days),
        ahead_s=(now - datetime.now(UTC)).total_seconds(),
        keep_moves=keep_moves,
        keep_days=keep_days,
        pinned=frozenset(pinned),
    )
    sweep.read()
    plan = sweep.plan()
    return sweep.apply(plan) if apply else plan


# --- the verb ---------------------------------------------------------------------------------

# The Hub keeps every commit of a repository; see `_require_freeable`.
_KEEPS_EVERYTHING: Final = "hf"


def main(  # noqa: PLR0913 - one for each option
    declared: Declaration,
    at: Layout,
    *,
    name: str,
    keep_moves: int,
    keep_days: int,
    apply: bool,
    as_json: bool,
) -> int:
    """
    Collect one registry, or say what would be collected.

    Returns:
        0.

    Raises:
        ParamsError: The registry is not declared, or nothing can be freed there by us.
        StoreError: Something there cannot be read; nothing was removed.
        LedgerError: A ledger is broken; nothing was removed.
    """
    store = open_store(name, declared, at.root)
    _require_freeable(name, declared)
    plan = collect(
        store,
        ledgers_of(declared, at),
        now=datetime.now(UTC),
        keep_moves=keep_moves,
        keep_days=keep_days,
        pinned=_pinned(declared, at, name),
        apply=apply,
    )
    plan = replace(plan, notes=(*plan.notes, *_own_notes(declared, name)))
    if as_json:
        print_json(asdict(plan))
    else:
        _print(plan)
    return 0


def _require_freeable(name: str, declared: Declaration) -> None:
    """
    Refuse to collect where that frees nothing.

    Raises:
        ParamsError: It does not; the hint says what does.
    """
    registry = params.registry_of(declared, name)
    assert registry is not None, "it was opened"
    if registry.url.startswith(f"{_KEEPS_EVERYTHING}:"):
        raise ParamsError(
            f"nothing can be collected in {name}: the Hub keeps every commit of a repository, so "
            "removing a file there frees nothing.",
            hint="Squash the history in the repository's settings if you must: no rollback to what "
            "was there is possible then.",
        )


def _pinned(declared: Declaration, at: Layout, name: str) -> set[str]:
    """
    Return the releases that this checkout names, and those of registries whose files lie here.

    Raises:
        StoreError: Such a registry cannot be read: what it needs is then not known.
    """
    pinned = {model.stable for model in declared.models.values()}
    pinned |= {release_id(path.read_bytes()) for path in at.root.glob("results/*/release.json")}
    for other, registry in declared.registries.items():
        if registry.blobs != name:
            continue
        store = open_store(other, declared, at.root)
        for model in store.list_models():
            pinned.update(store.list_releases(model))
    return pinned


def _own_notes(declared: Declaration, name: str) -> tuple[str, ...]:
    """Say what else frees disk in a registry of this kind."""
    registry = params.registry_of(declared, name)
    assert registry is not None, "it was opened"
    if registry.blobs is not None:
        return (f"The files are in {registry.blobs}: fleet gc --registry {registry.blobs}.",)
    if registry.url.startswith("oci:"):
        return ("The registry's own collection frees the disk then: see docs/registry.md.",)
    return ()


def _print(plan: GcPlan) -> None:
    size = f"{wording.number(plan.freed_bytes / _MIB)} MiB"
    kept = f"{wording.number(plan.kept_bytes / _MIB)} MiB"
    for each in plan.releases:
        console.out(f"  {shown(each.model, each.id)}: {each.why}")
    verb = "removed" if plan.applied else "would remove"
    console.out(
        f"{plan.registry}: {verb} {wording.counted(len(plan.releases), 'release')} and "
        f"{wording.counted(len(plan.blobs), 'file')} ({size}); "
        f"{wording.counted(len(plan.kept), 'release')} and "
        f"{wording.counted(plan.kept_blobs_count, 'file')} ({kept}) stay."
    )
    if plan.waiting_count:
        console.info(
            f"  {wording.counted(plan.waiting_count, 'file')} more that no kept release names: too "
            "young (a publisher may be at work), or the registry does not tell their age"
        )
    for note in plan.notes:
        console.info(f"  {note}")
    if not plan.applied and (plan.releases or plan.blobs):
        console.info("  next: the same command with --apply")


# --- mark and sweep ---------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Sweep:
    """One collection: what was read so far, and the same questions asked again later."""

    store: Store
    ledgers: Mapping[str, Ledger]
    since: datetime
    # By how much `now` is later than the clock by which stores count ages.
    ahead_s: float
    keep_moves: int
    keep_days: int
    pinned: frozenset[str]
    # Releases never change, so each is read once.
    read_releases: dict[_Key, tuple[Release, bytes]] = field(default_factory=dict)

    def read(self) -> tuple[_Key, ...]:
        """
        List the releases that are there now, and read those that are new.

        Raises:
            StoreError: One cannot be read: what it names is then not known.
        """
        keys = [
            (model, id_)
            for model in sorted(self.store.list_models())
            for id_ in sorted(self.store.list_releases(model))
        ]
        with console.Progress("reading releases", total=len(keys), unit="releases") as progress:
            for done, (model, id_) in enumerate(keys):
                progress.update(done)
                if (model, id_) not in self.read_releases:
                    self.read_releases[model, id_] = self._release(model, id_)
        return tuple(keys)

    def _release(self, model: str, id_: str) -> tuple[Release, bytes]:
        """
        Read one release.

        Raises:
            NotThereError: It is not there.
            StoreError: It is other bytes, or none of ours.
        """
        data = self.store.read_release(model, id_)
        try:
            return parse_release(data, id_, f"registry {self.store.name}"), data
        except StoreError as error:
            raise StoreError(
                f"{error.message} A release that cannot be read may name any file, so nothing is "
                "removed.",
                hint=error.hint,
            ) from error

    def marked(self, keys: Iterable[_Key]) -> dict[_Key, str]:
        """
        Say of each release that has to stay why it has to.

        Raises:
            StoreError: An alias cannot be read, or means a release that is not there.
        """
        there = set(keys)
        young = {x.sha256 for x in self.store.list_blobs() if self._too_young(x.age_s)}
        marks: dict[_Key, str] = {}
        for model in sorted({model for model, _ in there} | set(self.ledgers)):
            for alias in self._aliases(model):
                self._mark_alias(model, alias, there, marks)
        for key in sorted(there - set(marks)):
            if key[0] not in self.ledgers:
                marks[key] = "of a model that this checkout does not know"
            elif key[1] in self.pinned:
                marks[key] = "named by this checkout"
            elif self._is_young(*key, young):
                marks[key] = "younger than a day"
        return marks

    def _aliases(self, model: str) -> tuple[str, ...]:
        ledger = self.ledgers.get(model)
        lines = ledger.lines if ledger else ()
        return tuple(sorted({STABLE, *(x.alias for x in lines if x.registry == self.store.name)}))

    def _mark_alias(self, model: str, alias: str, there: set[_Key], marks: dict[_Key, str]) -> None:
        """Mark what an alias meant, by the registry and by the ledger."""
        stored, _token = self.store.read_alias(model, alias)
        if stored is not None:
            self._require_meant(model, alias, stored.release)
            marks[model, stored.release] = f"`{alias}` means it"
        ledger = self.ledgers.get(model)
        moves = [*(stored.moves if stored else ())]
        moves += ledger.moves(self.store.name, alias) if ledger else ()
        last = sorted({move.sequence for move in moves})[-self.keep_moves :]
        for move in moves:
            if move.sequence in last:
                why = f"among the last {wording.counted(self.keep_moves, 'move')}"
                self._mark((model, move.release), why, there, marks)
        for move in moves:
            if _is_since(move, self.since):
                why = f"meant within the last {wording.counted(self.keep_days, 'day')}"
                self._mark((model, move.release), why, there, marks)
                # Until then the one before was meant, however long ago its own move was.
                if move.previous is not None:
                    self._mark((model, move.previous), why, there, marks)

    @staticmethod
    def _mark(key: _Key, why: str, there: set[_Key], marks: dict[_Key, str]) -> None:
        if key in there:
            marks.setdefault(key, why)

    def _require_meant(self, model: str, alias: str, id_: str) -> None:
        """
        Read the release that an alias means; it may have been put since releases were listed.

        Raises:
            StoreError: It is not there.
        """
        if (model, id_) in self.read_releases:
            return
        try:
            self.read_releases[model, id_] = self._release(model, id_)
        except NotThereError as error:
            raise StoreError(
                f"`{alias}` of {model} means release {short(id_)}, which registry "
                f"{self.store.name} does not have. Nothing was removed.",
                hint=f"fleet verify-registry {self.store.name}",
            ) from error

    def _is_young(self, model: str, id_: str, young_blobs: Collection[str]) -> bool:
        """Tell whether a release may belong to a publisher who is still at work."""
        if isinstance(self.store, _DatesReleases):
            return self._too_young(self.store.release_age_s(model, id_))
        # The files of a release are put right before it; those that it shares are older.
        return any(file.sha256 in young_blobs for file in self.read_releases[model, id_][0].files)

    def _too_young(self, age_s: float | None) -> bool:
        return age_s is None or age_s + self.ahead_s < YOUNG_S

    def plan(self) -> GcPlan:
        """Say what would be removed now."""
        keys = self.read()
        marks = self.marked(keys)
        named = self._named(marks)
        blobs = list(self.store.list_blobs())
        unnamed = [blob for blob in blobs if blob.sha256 not in named]
        doomed = tuple(blob for blob in unnamed if not self._too_young(blob.age_s))
        kept = [blob for blob in blobs if blob.sha256 in named]
        return GcPlan(
            registry=self.store.name,
            applied=False,
            kept=tuple(GcRelease(model=m, id=i, why=why) for (m, i), why in sorted(marks.items())),
            releases=tuple(
                GcRelease(model=m, id=i, why="no promised rollback needs it")
                for m, i in keys
                if (m, i) not in marks
            ),
            blobs=doomed,
            freed_bytes=sum(blob.size_bytes for blob in doomed),
            kept_blobs_count=len(kept),
            kept_bytes=sum(blob.size_bytes for blob in kept),
            waiting_count=len(unnamed) - len(doomed),
            notes=tuple(self._notes(keys)),
        )

    def _named(self, keys: Iterable[_Key]) -> set[str]:
        """Return the digests of the files that some of these releases name."""
        return {file.sha256 for key in keys for file in self.read_releases[key][0].files}

    def _notes(self, keys: Iterable[_Key]) -> Iterator[str]:
        foreign = sorted({model for model, _ in keys} - set(self.ledgers))
        if foreign:
            yield (
                f"{wording.first_few(foreign)}: neither declared nor in the ledgers of this "
                "checkout, so everything of it stays."
            )

    def apply(self, plan: GcPlan) -> GcPlan:
        """Do what was planned, less what was taken into use since."""
        notes = list(plan.notes)
        marks = self.marked(self.read())
        gone = [each for each in plan.releases if (each.model, each.id) not in marks]
        with console.Progress("removing releases", total=len(gone), unit="releases") as progress:
            for done, each in enumerate(gone):
                progress.update(done)
                self.store.delete_release(each.model, each.id)
        gone = self._put_back(gone, notes)
        doomed = {blob.sha256 for blob in plan.blobs}
        listed = [blob for blob in self.store.list_blobs() if blob.sha256 in doomed]
        before = self.read()
        named = self._named(before)
        blobs = tuple(
            blob for blob in listed if blob.sha256 not in named and not self._too_young(blob.age_s)
        )
        with console.Progress("removing files", total=len(blobs), unit="files") as progress:
            for done, blob in enumerate(blobs):
                progress.update(done)
                self.store.delete_blob(blob.sha256)
        gone = self._require_unhurt(before, gone, {blob.sha256 for blob in blobs}, notes)
        if isinstance(self.store, _SweepsUploads) and (count := self.store.sweep()):
            notes.append(f"{wording.counted(count, 'upload')} that nobody went on with ended.")
        return GcPlan(
            registry=plan.registry,
            applied=True,
            kept=plan.kept,
            releases=tuple(gone),
            blobs=blobs,
            freed_bytes=sum(blob.size_bytes for blob in blobs),
            kept_blobs_count=plan.kept_blobs_count,
            kept_bytes=plan.kept_bytes,
            waiting_count=plan.waiting_count,
            notes=tuple(notes),
        )

    def _put_back(self, gone: list[GcRelease], notes: list[str]) -> list[GcRelease]:
        """Put back a release to which somebody moved an alias while it was being removed."""
        taken: set[_Key] = set()
        for model in {each.model for each in gone}:
            for alias in self._aliases(model):
                stored, _token = self.store.read_alias(model, alias)
                if stored is not None:
                    taken.add((model, stored.release))
        for each in gone:
            if (each.model, each.id) in taken:
                self.store.put_release(*self.read_releases[each.model, each.id])
                notes.append(
                    f"{each.model} was moved to {short(each.id)} meanwhile: that release is back."
                )
        return [each for each in gone if (each.model, each.id) not in taken]

    def _require_unhurt(
        self, before: tuple[_Key, ...], gone: list[GcRelease], removed: set[str], notes: list[str]
    ) -> list[GcRelease]:
        """
        See whether somebody took a release into use whose file was removed in the same moment.

        Returns:
            Releases that are gone: one to which an alias was moved, all of it still there, is back.

        Raises:
            StoreError: He did, by publishing it or by a rollback to it.
        """
        still = self._put_back(gone, notes)
        taken = [(each.model, each.id) for each in gone if each not in still]
        fresh = [key for key in self.read() if key not in before and key not in taken]
        hurt = [key for key in (*taken, *fresh) if removed & self._named((key,))]
        if hurt:
            shown = wording.first_few([f"{model}@{short(id_)}" for model, id_ in hurt])
            raise StoreError(
                f"{shown} was published while files that it needs were being removed.",
                hint=f"fleet publish {hurt[0][0]} --to {self.store.name} sends them again; then "
                f"fleet verify-registry {self.store.name}.",
            )
        return still


def _is_since(move: Move, since: datetime) -> bool:
    """Tell whether a move is recent; one whose time cannot be read is."""
    try:
        at = datetime.fromisoformat(move.at)
    except ValueError:
        return True
    return (at if at.tzinfo else at.replace(tzinfo=UTC)) >= since
