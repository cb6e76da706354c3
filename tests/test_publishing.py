"""A registry never shows half a release; a move has one number, and the ledger tells it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import release_factory as factory
from small_disk import fill, small_disk
from store_contract import Wrapped

from pipelines import publishing
from pipelines.errors import DigestError, FleetError, GateError, MachineError, StoreError
from pipelines.release_records import STABLE, Alias, ReleaseWaiver, short
from pipelines.stores.base import AliasMovedError, NotThereError
from pipelines.stores.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.release import Composed
    from pipelines.release_records import Release
    from pipelines.stores.base import Guarantees, Store, Token

ROOT = Path(__file__).resolve().parent.parent
MODEL = factory.MODEL


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(publishing, "_LONGEST_PAUSE_S", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """An empty registry."""
    return LocalStore("local", tmp_path / "registry")


@pytest.fixture
def one(tmp_path: Path) -> Composed:
    """A release."""
    return factory.composed(tmp_path / "files")


@pytest.fixture
def two(tmp_path: Path, one: Composed) -> Composed:
    """The next one."""
    return factory.composed(tmp_path / "files", 2, previous=one.id)


def publish(
    tmp_path: Path, made: Composed, store: Any, *, stable: str = "latest", dry_run: bool = False
) -> publishing.Outcome:
    """Publish from the checkout in `tmp_path`."""
    return publishing.publish(
        made,
        store,
        factory.ledger(tmp_path),
        stable=stable,
        by=factory.by(),
        dry_run=dry_run,
    )


def point(tmp_path: Path, target: str, store: Any, *, dry_run: bool = False) -> publishing.Outcome:
    """Move the alias from the checkout in `tmp_path`."""
    return publishing.point(
        MODEL, target, store, factory.ledger(tmp_path), by=factory.by("it is slow"), dry_run=dry_run
    )


class Limited(Wrapped):
    """A store whose guarantees are other ones."""

    def __init__(self, store: Store, **changes: Any) -> None:
        """Wrap `store`."""
        super().__init__(store)
        self._changes = changes

    @property
    def guarantees(self) -> Guarantees:
        """The changed ones."""
        return replace(self.store.guarantees, **self._changes)


class Careless(Limited):
    """A registry that cannot compare: it writes whatever comes, and somebody else comes, too."""

    def __init__(self, store: Store, other: Callable[[], object] | None = None) -> None:
        """Wrap `store`; `other` runs right after the first move."""
        super().__init__(store, compare_and_set=False)
        self._other = other

    def write_alias(self, alias: Alias, release: Release, expected: Token) -> None:
        """Write over whatever is there."""
        del expected
        token = self.store.read_alias(alias.model, alias.alias)[1]
        super().write_alias(alias, release, token)
        other, self._other = self._other, None
        if other is not None:
            other()


# --- publishing -------------------------------------------------------------------------------


def test_an_outcome_says_in_words_what_was_done(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """Files, the move and its number; nothing where nothing was done."""
    first, second = publish(tmp_path, one, store), publish(tmp_path, two, store)
    back, again = point(tmp_path, "previous", store), point(tmp_path, one.id, store)

    assert first.sentence == (
        f"Stored 13 files of release {short(one.id)} (2.51 KiB copied, the rest linked) and moved "
        f"stable to {short(one.id)} (move 1) in local."
    )
    assert f"moved stable from {short(one.id)} to {short(two.id)} (move 2)" in second.sentence
    assert back.sentence == (
        f"Rolled back stable from {short(two.id)} to {short(one.id)} (move 3) in local."
    )
    assert "nothing changed" in again.sentence


def test_a_dry_run_foretells_exactly_what_is_done_then(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """Count and move are those of the run that follows."""
    acts: tuple[Callable[..., publishing.Outcome], ...] = (
        partial(publish, tmp_path, one, store),
        partial(publish, tmp_path, two, store),
        partial(point, tmp_path, "previous", store),
        partial(publish, tmp_path, one, store),
    )
    for act in acts:
        told, done = act(dry_run=True), act(dry_run=False)
        assert (told.release, told.moved, told.uploaded_count, told.restored) == (
            done.release,
            done.moved,
            done.uploaded_count,
            done.restored,
        )
    assert "nothing to do" in publish(tmp_path, one, store, dry_run=True).sentence


def test_a_file_that_is_too_large_is_refused_before_the_first_byte(
    tmp_path: Path, store: LocalStore, one: Composed
) -> None:
    """Which, how large, and what to do; not even the small files are sent."""
    limited = Limited(store, max_file_bytes=30_000)

    with pytest.raises(GateError, match=r"tiny-llama-Q8_0\.gguf \(39.1 KiB\)") as caught:
        publish(tmp_path, one, limited)

    assert "params.yaml" in caught.value.hint
    assert limited.calls == []
    assert not store.root.exists()


def test_a_declared_release_stays_stable_while_new_ones_are_stored(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """`stable: <id>` in params.yaml: the new one is there, the alias does not move."""
    publish(tmp_path, one, store)

    outcome = publish(tmp_path, two, store, stable=one.id)

    assert outcome.release == two.id
    assert outcome.moved is None
    assert f"stable still means {short(one.id)}" in outcome.sentence
    assert two.id in store.list_releases(MODEL)
    assert publishing.resolve(store, MODEL, STABLE)[0] == one.id


def test_declaring_an_earlier_release_is_the_rollback(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """The edit of params.yaml and the command lead to the same move."""
    for made in (one, two):
        publish(tmp_path, made, store)
        publish(tmp_path / "other", made, LocalStore("local", tmp_path / "other registry"))

    by_edit = publish(tmp_path, two, store, stable=one.id).moved
    by_verb = point(
        tmp_path / "other", one.id, LocalStore("local", tmp_path / "other registry")
    ).moved

    assert by_edit is not None
    assert by_verb is not None
    assert by_edit.action == "rollback"
    assert by_edit.model_copy(update={"why": ""}) == by_verb.model_copy(update={"why": ""})


def test_declaring_what_is_not_there_is_an_error_and_moves_nothing(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """The new release is stored all the same; stable is where it was."""
    publish(tmp_path, one, store)

    with pytest.raises(NotThereError, match="has no release"):
        publish(tmp_path, two, store, stable="f" * 64)

    assert publishing.resolve(store, MODEL, STABLE)[0] == one.id


def test_a_waiver_is_written_into_move_and_ledger(tmp_path: Path, store: LocalStore) -> None:
    """Whoever reads the history sees who let what pass."""
    waiver = ReleaseWaiver(gate="hold", who="Ada", why="read by hand", until="2027-02-28")
    made = factory.composed(tmp_path / "files", waivers=(waiver,))

    outcome = publish(tmp_path, made, store)

    assert outcome.moved is not None
    assert outcome.moved.waivers == (waiver,)
    kinds = [line.kind for line in factory.ledger(tmp_path).lines]
    assert kinds == ["waiver", "move"]


# --- registry and ledger ----------------------------------------------------------------------


def test_an_empty_registry_is_built_again_without_a_new_line(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """A fresh clone with the same records changes no file in git."""
    publish(tmp_path, one, store)
    publish(tmp_path, two, store)
    ledger = factory.ledger(tmp_path).path.read_bytes()
    fresh = LocalStore("local", tmp_path / "clone/registry")

    outcome = publish(tmp_path, two, fresh)

    assert outcome.restored
    assert outcome.moved is None
    assert "put back the moves of the ledger" in outcome.sentence
    assert factory.ledger(tmp_path).path.read_bytes() == ledger
    assert fresh.read_alias(MODEL, STABLE)[0] == store.read_alias(MODEL, STABLE)[0]


def test_an_empty_registry_gets_the_history_before_a_new_release(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """Its first move there has the number that follows the ledger's."""
    publish(tmp_path, one, store)
    fresh = LocalStore("local", tmp_path / "clone/registry")

    outcome = publish(tmp_path, two, fresh)

    assert outcome.moved is not None
    assert outcome.moved.sequence == 2
    assert outcome.restored
    alias, _ = fresh.read_alias(MODEL, STABLE)
    assert alias is not None
    assert alias.moves == factory.ledger(tmp_path).moves("local", STABLE)


def test_two_stories_of_one_move_are_an_error(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """Registry and ledger name different releases under one number: a person has to read both."""
    publish(tmp_path / "a", one, store)
    publish(tmp_path / "b", two, LocalStore("local", tmp_path / "elsewhere"))

    with pytest.raises(StoreError, match="move 1 of tiny-llama@stable was to") as caught:
        publish(tmp_path / "b", two, store)

    assert short(one.id) in caught.value.message
    assert short(two.id) in caught.value.message
    assert publishing.resolve(store, MODEL, STABLE)[0] == one.id


def test_catching_up_copies_what_a_killed_publisher_did_not_write(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """The lines are those that it would have written; a second time there is nothing to copy."""
    publish(tmp_path / "a", one, store)
    publish(tmp_path / "a", two, store)
    ledger = factory.ledger(tmp_path / "b")

    told = publishing.catch_up(MODEL, store, ledger, dry_run=True)
    assert not ledger.path.exists()
    copied = publishing.catch_up(MODEL, store, ledger)

    assert told == copied == factory.ledger(tmp_path / "a").moves("local", STABLE)
    assert ledger.path.read_bytes() == factory.ledger(tmp_path / "a").path.read_bytes()
    assert publishing.catch_up(MODEL, store, ledger) == ()


def test_an_alias_with_a_long_history_keeps_its_last_moves_and_its_numbers(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """After 205 moves the registry remembers 200 and the ledger all of them."""
    publish(tmp_path, one, store)
    publish(tmp_path, two, store)
    ledger = factory.ledger(tmp_path)
    for _ in range(203):
        publishing.point(MODEL, "previous", store, ledger, by=factory.by())

    alias, _ = store.read_alias(MODEL, STABLE)
    assert alias is not None
    assert (len(alias.moves), alias.sequence) == (200, 205)
    assert len(factory.ledger(tmp_path).moves("local", STABLE)) == 205
    fresh = LocalStore("local", tmp_path / "clone/registry")
    publish(tmp_path, one, fresh)
    publish(tmp_path, two, fresh)
    assert fresh.read_alias(MODEL, STABLE)[0] is not None
    assert publish(tmp_path, two, fresh).moved is None


# --- an old checkout --------------------------------------------------------------------------


@pytest.mark.parametrize("stable", ["latest", "pinned"])
def test_an_old_checkout_takes_nothing_back(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed, stable: str
) -> None:
    """Run again, an old workflow names who replaced its release, and moves nothing."""
    publish(tmp_path, one, store)
    old = tmp_path / "old"
    publishing.catch_up(MODEL, store, factory.ledger(old))
    publish(tmp_path, two, store)
    before = store.read_alias(MODEL, STABLE)
    ledger = factory.ledger(old).path.read_bytes()

    wanted = one.id if stable == "pinned" else stable
    for dry_run in (True, False):
        with pytest.raises(GateError, match="does not know"):
            publish(old, one, store, stable=wanted, dry_run=dry_run)
    with pytest.raises(GateError, match=r'by "Ada" at "[^"]+" \(move 2\)') as caught:
        publish(old, one, store, stable=wanted)

    assert caught.value.exit_code == 5
    assert f"moved to {short(two.id)}" in caught.value.message
    assert "git pull" in caught.value.hint
    assert f"fleet rollback {MODEL} --to {short(one.id)} --registry local" in caught.value.hint
    assert store.read_alias(MODEL, STABLE) == before
    # `git pull` has to find it as it was.
    assert factory.ledger(old).path.read_bytes() == ledger


def test_who_pulled_or_says_so_goes_back(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """Either next step of the refusal is one."""
    publish(tmp_path, one, store)
    publish(tmp_path, two, store)
    pulled, old = tmp_path / "pulled", tmp_path / "old"
    publishing.catch_up(MODEL, store, factory.ledger(pulled))

    back = publish(pulled, one, store).moved
    publish(pulled, two, store)
    said = point(old, one.id[:12], store).moved

    assert back is not None
    assert said is not None
    assert (back.action, back.sequence) == (said.action, said.sequence - 2) == ("rollback", 3)
    assert len(factory.ledger(old).moves("local", STABLE)) == 5


def test_an_old_checkout_publishes_what_is_new(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """A publisher who was killed before his line, then builds on: the same again, and a new one."""
    publish(tmp_path, one, store)
    killed = tmp_path / "killed"

    same = publish(killed, one, store)
    assert same.moved is None
    assert len(factory.ledger(killed).moves("local", STABLE)) == 1
    factory.ledger(killed).path.unlink()
    new = publish(killed, two, store).moved

    assert new is not None
    assert (new.action, new.sequence) == ("publish", 2)
    alias, _ = store.read_alias(MODEL, STABLE)
    assert alias is not None
    assert factory.ledger(killed).moves("local", STABLE) == alias.moves


def test_what_neither_registry_nor_ledger_remembers_is_not_taken_for_new(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """A registry remembers its last moves only: a release from before them may be an old one."""
    three = factory.composed(tmp_path / "files", 3, previous=two.id)
    for made in (one, two, three):
        publish(tmp_path, made, store)
    alias, token = store.read_alias(MODEL, STABLE)
    assert alias is not None
    short_memory = alias.model_copy(update={"moves": alias.moves[-1:]})
    store.write_alias(short_memory, three.release, token)

    with pytest.raises(GateError, match="remembers moves 1 to 2"):
        publish(tmp_path / "old", one, store)

    assert publishing.resolve(store, MODEL, STABLE)[0] == three.id


# --- a store that cannot compare --------------------------------------------------------------


def test_a_store_that_cannot_compare_is_read_back_and_says_so(
    tmp_path: Path, store: LocalStore, one: Composed
) -> None:
    """The outcome tells what was not promised."""
    outcome = publish(tmp_path, one, Careless(store))

    assert "cannot refuse a move that comes too late" in outcome.sentence
    assert "read back" in outcome.sentence


def test_a_move_that_was_overwritten_is_noticed_and_made_again(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """Another machine wrote in between: its move stays in the history, ours follows it."""

    def other() -> None:
        alias, token = store.read_alias(MODEL, STABLE)
        assert alias is not None
        for blob in two.blobs:
            store.put_blob(MODEL, blob, lambda _: None)
        store.put_release(two.release, two.data)
        theirs = alias.moves[-1].model_copy(update={"release": two.id, "who": "Eve"})
        store.write_alias(alias.model_copy(update={"moves": (theirs,)}), two.release, token)

    outcome = publish(tmp_path, one, Careless(store, other))

    assert outcome.moved is not None
    assert outcome.moved.sequence == 2
    assert [move.who for move in factory.ledger(tmp_path).moves("local", STABLE)] == ["Eve", "Ada"]
    assert publishing.resolve(store, MODEL, STABLE)[0] == one.id


def test_who_is_always_too_late_gives_up_and_says_why(
    tmp_path: Path, store: LocalStore, one: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody turns for ever."""
    monkeypatch.setattr(publishing, "_LONGEST_PAUSE_S", 0.0)

    class Busy(Wrapped):
        def write_alias(self, *_: object) -> None:
            raise AliasMovedError("somebody else")

    with pytest.raises(FleetError, match="moved by others all the time") as caught:
        publish(tmp_path, one, Busy(store))
    assert caught.value.exit_code == 75


# --- reading ----------------------------------------------------------------------------------


def test_a_release_is_found_by_its_first_digits(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """Eight digits that only one has are enough; fewer, or those of none, are not."""
    publish(tmp_path, one, store)
    publish(tmp_path, two, store)

    assert publishing.resolve(store, MODEL, one.id[:8])[0] == one.id
    for wrong in (one.id[:7], "f" * 12, "", "latest", one.id.upper(), "../" + one.id, one.id + "0"):
        with pytest.raises(NotThereError) as caught:
            publishing.resolve(store, MODEL, wrong)
        assert short(one.id) in caught.value.hint


def test_digits_that_two_releases_share_name_neither(
    tmp_path: Path, store: LocalStore, one: Composed
) -> None:
    """A prefix is never guessed."""
    publish(tmp_path, one, store)
    twin = one.id[:9] + ("0" if one.id[9] != "0" else "1") * 55
    (store.root / "releases" / MODEL / f"{twin}.json").write_bytes(one.data)

    with pytest.raises(NotThereError, match="2 releases"):
        publishing.resolve(store, MODEL, one.id[:9])


def test_a_release_with_other_bytes_than_its_name_is_refused(
    tmp_path: Path, store: LocalStore, one: Composed
) -> None:
    """Its name is its digest."""
    publish(tmp_path, one, store)
    path = store.root / "releases" / MODEL / f"{one.id}.json"
    path.write_bytes(one.data.replace(b"PROMOTE", b"REJECT!"))

    with pytest.raises(StoreError, match="other bytes"):
        publishing.resolve(store, MODEL, STABLE)
    with pytest.raises(StoreError, match="other bytes"):
        publish(tmp_path, one, store)


def replayed(tmp_path: Path, store: LocalStore, one: Composed, two: Composed) -> None:
    """Publish two releases, then bring the alias back as it was after the first."""
    publish(tmp_path, one, store)
    path = store.root / "aliases" / MODEL / f"{STABLE}.json"
    old = path.read_bytes()
    publish(tmp_path, two, store)
    publishing.resolve(store, MODEL, STABLE)
    path.write_bytes(old)


def test_an_old_state_is_refused_by_who_has_the_ledger(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed, monkeypatch: Any
) -> None:
    """Git knows of a later move: nothing of the old state is used, until it is put right."""
    replayed(tmp_path, store, one, two)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))

    with pytest.raises(StoreError, match="old state") as caught:
        publishing.resolve(store, MODEL, STABLE, factory.ledger(tmp_path))
    assert "the ledger in git" in caught.value.message

    assert publishing.restore(MODEL, store, factory.ledger(tmp_path), dry_run=True)
    assert publishing.restore(MODEL, store, factory.ledger(tmp_path))
    assert not publishing.restore(MODEL, store, factory.ledger(tmp_path))
    assert publishing.resolve(store, MODEL, STABLE, factory.ledger(tmp_path))[0] == two.id


def test_an_old_state_is_refused_by_who_has_seen_a_later_one(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """A reader without a checkout remembers what it was shown."""
    replayed(tmp_path, store, one, two)

    for wanted in (STABLE, "previous"):
        with pytest.raises(StoreError, match="old state"):
            publishing.resolve(store, MODEL, wanted)


def test_a_rollback_is_no_replay(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """Its number is higher, though its release is older."""
    publish(tmp_path, one, store)
    publish(tmp_path, two, store)
    publishing.resolve(store, MODEL, STABLE)
    point(tmp_path, "previous", store)

    found, _, _ = publishing.resolve(store, MODEL, STABLE, factory.ledger(tmp_path))
    assert found == one.id


def test_a_rewritten_history_is_refused(
    tmp_path: Path, store: LocalStore, one: Composed, two: Composed
) -> None:
    """The same number, another release than this user has seen under it."""
    publish(tmp_path, one, store)
    publishing.resolve(store, MODEL, STABLE)
    other = LocalStore("local", tmp_path / "other")
    publish(tmp_path / "other checkout", two, other)
    (other.root / "aliases" / MODEL / "stable.json").replace(
        store.root / "aliases" / MODEL / "stable.json"
    )

    with pytest.raises(StoreError, match="was rewritten"):
        publishing.resolve(store, MODEL, STABLE)


def test_a_home_that_cannot_be_written_to_does_not_stop_a_reader(
    tmp_path: Path,
    store: LocalStore,
    one: Composed,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is told what is not noticed then."""
    publish(tmp_path, one, store)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))

    assert publishing.resolve(store, MODEL, STABLE)[0] == one.id
    assert "a replay would not be noticed" in capsys.readouterr().err


def test_a_file_that_is_right_already_is_not_read_again(
    tmp_path: Path, store: LocalStore, one: Composed
) -> None:
    """Pulling twice costs nothing; a wrong file is replaced."""
    publish(tmp_path, one, store)
    file = one.release.of("gguf")[0]
    counted = Wrapped(store)
    target = tmp_path / "pulled/x.gguf"
    for _ in range(2):
        publishing.read_to(counted, MODEL, file, target, lambda _: None)
    assert counted.read_bytes == file.size_bytes

    target.write_bytes(b"x" * file.size_bytes)
    publishing.read_to(counted, MODEL, file, target, lambda _: None)
    assert factory.sha256(target.read_bytes()) == file.sha256


def test_two_who_bring_the_same_file_read_it_once(
    tmp_path: Path, store: LocalStore, one: Composed
) -> None:
    """The second one waits, and takes what the first one has brought."""
    publish(tmp_path, one, store)
    file = one.release.of("gguf")[0]
    counted = Wrapped(store)

    def pull(_: int) -> None:
        publishing.read_to(counted, MODEL, file, tmp_path / "pulled/x.gguf", lambda _: None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(pull, range(16)))

    assert counted.read_bytes == file.size_bytes
    assert [path.name for path in (tmp_path / "pulled").iterdir()] == ["x.gguf"]


def test_what_an_earlier_run_left_wrong_is_read_anew(
    tmp_path: Path, store: LocalStore, one: Composed
) -> None:
    """A part that rotted, or that is too long, does not spoil the file."""
    publish(tmp_path, one, store)
    file = one.release.of("gguf")[0]
    target = tmp_path / "x.gguf"
    for left in (b"wrong", b"x" * (file.size_bytes + 7)):
        (tmp_path / f".x.gguf.{short(file.sha256)}.part").write_bytes(left)
        publishing.read_to(store, MODEL, file, target, lambda _: None)
        assert factory.sha256(target.read_bytes()) == file.sha256
        target.unlink()


class Lying(Wrapped):
    """Gives something else than the blob."""

    def __init__(self, store: Store, chunks: tuple[bytes, ...]) -> None:
        """Wrap `store`; every blob is `chunks`."""
        super().__init__(store)
        self._chunks = chunks

    def read_blob(self, model: str, sha256: str, *, offset: int = 0) -> Iterator[bytes]:
        """Yield them, whatever was asked for."""
        del model, sha256, offset
        yield from self._chunks


@pytest.mark.parametrize(
    ("chunks", "error", "says"),
    [
        ((b"<html>", b"</html>" * 9000), DigestError, "gives more than"),
        ((b"x" * 40_000,), DigestError, "gave other bytes"),
        ((), StoreError, "gave 0 of the 40000 bytes"),
    ],
    ids=["a page", "other bytes", "nothing"],
)
def test_a_registry_that_lies_is_not_believed(
    tmp_path: Path, store: LocalStore, chunks: tuple[bytes, ...], error: type[Exception], says: str
) -> None:
    """Nothing has the name of the file; the next honest answer is taken."""
    one = factory.composed(tmp_path / "files")
    publish(tmp_path, one, store)
    file = one.release.of("gguf")[0]
    target = tmp_path / "x.gguf"

    with pytest.raises(error, match=says):
        publishing.read_to(Lying(store, chunks), MODEL, file, target, lambda _: None)
    assert not target.exists()

    publishing.read_to(store, MODEL, file, target, lambda _: None)
    assert factory.sha256(target.read_bytes()) == file.sha256


def test_a_stream_that_ends_early_is_asked_for_the_rest(
    tmp_path: Path, store: LocalStore, one: Composed
) -> None:
    """Each time a little: the file is whole in the end."""
    publish(tmp_path, one, store)
    file = one.release.of("gguf")[0]

    class Short(Wrapped):
        def read_blob(self, model: str, sha256: str, *, offset: int = 0) -> Iterator[bytes]:
            yield next(self.store.read_blob(model, sha256, offset=offset))[:9999]

    publishing.read_to(Short(store), MODEL, file, tmp_path / "x.gguf", lambda _: None)
    assert factory.sha256((tmp_path / "x.gguf").read_bytes()) == file.sha256


def test_a_disk_that_is_too_small_is_noticed_before_the_first_byte(
    tmp_path: Path, store: LocalStore, one: Composed
) -> None:
    """Nothing is left on it."""
    publish(tmp_path, one, store)
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        fill(disk)
        with pytest.raises(MachineError, match="disk is too small"):
            publishing.read_to(
                store, MODEL, one.release.of("gguf")[0], disk / "x.gguf", lambda _: None
            )
        assert [path.name for path in disk.iterdir()] == ["filler"]


# --- who --------------------------------------------------------------------------------------


def test_a_workflow_signs_with_its_actor_and_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the ledger finds the run."""
    monkeypatch.setenv("GITHUB_ACTOR", "ada")
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.example")
    monkeypatch.setenv("GITHUB_REPOSITORY", "ada/fleet")
    monkeypatch.setenv("GITHUB_RUN_ID", "42")

    by = publishing.By.from_environment("a  better\none ::set-output name=x::y")

    assert by.who == "ada"
    assert by.run == "https://github.example/ada/fleet/actions/runs/42"
    assert by.why.startswith("a better one")
    assert "::" not in by.why
    assert time.strptime(by.at, "%Y-%m-%dT%H:%M:%SZ")


def test_a_person_signs_with_the_name_that_git_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without git's name it is the login; without both it is still somebody."""
    for name in ("GITHUB_ACTOR", "GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    (tmp_path / "gitconfig").write_text("[user]\n\tname = Ada Lovelace\n")
    assert publishing.By.from_environment("x").who == "Ada Lovelace"

    (tmp_path / "gitconfig").write_text("")
    monkeypatch.setenv("LOGNAME", "grace")
    by = publishing.By.from_environment("x")
    assert by.who == "grace"
    assert by.run is None


# --- real processes ---------------------------------------------------------------------------

PUBLISHER = textwrap.dedent("""
    import sys
    from pathlib import Path
    import release_factory as factory
    from pipelines import publishing
    from pipelines.stores.local import LocalStore

    files, registry, checkout, seed = sys.argv[1:]
    made = factory.composed(Path(files), int(seed), types=("Q8_0",), size_bytes=2_000_000)
    print("ready", flush=True)
    sys.stdin.readline()
    outcome = publishing.publish(
        made, LocalStore("local", Path(registry)), factory.ledger(Path(checkout)),
        stable="latest", by=factory.by(f"seed {seed}"),
    )
    print(outcome.moved.sequence if outcome.moved else 0, flush=True)
""")


def publisher(tmp_path: Path, seed: int, checkout: str) -> subprocess.Popen[str]:
    """Start a process that publishes when it gets a line."""
    words = [tmp_path / "files", tmp_path / "registry", tmp_path / checkout, seed]
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, *map(str, words)],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    """Let it publish."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_that_publish_at_once_make_one_history(tmp_path: Path) -> None:
    """Each in a checkout of its own: 1, 2, 3, and nobody's move is lost."""
    running = [publisher(tmp_path, seed, f"checkout{seed}") for seed in (1, 2, 3)]
    for process in running:
        go(process)
    numbers = sorted(int(process.communicate(timeout=60)[0]) for process in running)

    assert numbers == [1, 2, 3]
    alias, _ = LocalStore("local", tmp_path / "registry").read_alias(MODEL, STABLE)
    assert alias is not None
    assert len({move.release for move in alias.moves}) == 3
    for seed in (1, 2, 3):
        written = factory.ledger(tmp_path / f"checkout{seed}").moves("local", STABLE)
        assert written == alias.moves[: len(written)]


def test_a_publisher_that_is_killed_leaves_a_whole_release_and_the_next_one_finishes(
    tmp_path: Path,
) -> None:
    """SIGKILL at five moments of a publication, 200 in `make prove`; no reader ever sees half."""
    store = LocalStore("local", tmp_path / "registry")
    publish(tmp_path, factory.composed(tmp_path / "files", types=("Q8_0",)), store)
    for number in range(5):
        seed = 10 + number
        process = publisher(tmp_path, seed, ".")
        go(process)
        time.sleep(number * 0.008)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        _, release, _ = publishing.resolve(store, MODEL, STABLE)
        for file in release.files:
            assert store.blob_size(MODEL, file.sha256) == file.size_bytes
    made = factory.composed(tmp_path / "files", 14, types=("Q8_0",), size_bytes=2_000_000)
    publish(tmp_path, made, store)

    assert publishing.resolve(store, MODEL, STABLE, factory.ledger(tmp_path))[0] == made.id
    moves = factory.ledger(tmp_path).moves("local", STABLE)
    assert [move.sequence for move in moves] == list(range(1, len(moves) + 1))
    assert [path.name for path in (store.root / "parts").iterdir()] == [".lock"]
