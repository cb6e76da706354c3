"""
What every registry promises, as tests: one suite for all kinds of store.

A test file of a store says how to get a registry that nobody has written to, and inherits the rest:

    class TestS3(StoreContract):
        @pytest.fixture
        def world(self, s3_server: S3Server) -> World:
            registry = s3_server.registry()
            return World(open=lambda: S3Store("production", registry), tamper=..., ...)

Everything goes through `pipelines.publishing`, as in production, and through the store's own
methods only where one of its promises cannot be seen from there.
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import pytest
import release_factory as factory

from pipelines import publishing
from pipelines.errors import DigestError, FleetError, StoreError
from pipelines.release_records import STABLE, Alias, Move, release_bytes
from pipelines.stores.base import AliasMovedError, NotThereError, hash_blob

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipelines.release import Composed
    from pipelines.release_records import Release
    from pipelines.stores.base import OnBytes, Store, Token

MODEL: Final = factory.MODEL
NOBODY: Final = factory.sha256(b"nobody has these bytes")
READS_COUNT: Final = 1000
_PUBLISHERS_COUNT: Final = 4


@dataclass(frozen=True, kw_only=True)
class World:
    """
    A registry for one test, empty at its start.

    Attributes:
        open: Opens a handle on it, as another process would: nothing is shared but the registry.
        tamper: Flips a bit of a stored blob behind the store's back: model, sha256.
        garble_alias: Writes what is no alias under the name of one: model, alias.
        deletes: Whether its blobs can be deleted one by one; else they go with their release.
        reads_count: How many reads there are at least while releases come and go; fewer where one
            takes a dozen requests. `make prove` has a hundred thousand of them.
    """

    open: Callable[[], Store]
    tamper: Callable[[str, str], None]
    garble_alias: Callable[[str, str], None]
    deletes: bool = True
    reads_count: int = READS_COUNT


class DiedError(BaseException):
    """The publisher ends here; no `except Exception` of ours can go on."""


class Wrapped:
    """
    A store between the caller and a real one: counts, and dies where a test wants it.

    Attributes:
        calls: Names of the methods that were called, in order.
        read_bytes: What `read_blob` gave.
    """

    def __init__(self, store: Store, *, dies_after: int | None = None) -> None:
        """Wrap `store`; after `dies_after` writing steps the next thing is the end."""
        self.store = store
        self.calls: list[str] = []
        self.read_bytes = 0
        self._steps = itertools.count(1)
        self._dies_after = dies_after

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def _step(self) -> None:
        if next(self._steps) == self._dies_after:
            raise DiedError

    def put_blob(self, model: str, blob: Any, on_bytes: OnBytes) -> int:
        """Store, then count a step."""
        self.calls.append("put_blob")
        sent_bytes = self.store.put_blob(model, blob, on_bytes)
        self._step()
        return sent_bytes

    def prove_blob(self, model: str, blob: Any, on_bytes: OnBytes) -> None:
        """Prove, then count a step."""
        self.calls.append("prove_blob")
        self.store.prove_blob(model, blob, on_bytes)
        self._step()

    def read_blob(self, model: str, sha256: str, *, offset: int = 0) -> Iterator[bytes]:
        """Read, and count the bytes."""
        self.calls.append("read_blob")
        for chunk in self.store.read_blob(model, sha256, offset=offset):
            self.read_bytes += len(chunk)
            yield chunk

    def put_release(self, release: Release, data: bytes) -> None:
        """Store, then count a step."""
        self.calls.append("put_release")
        self.store.put_release(release, data)
        self._step()

    def write_alias(self, alias: Alias, release: Release, expected: Token) -> None:
        """Move, then count a step."""
        self.calls.append("write_alias")
        self.store.write_alias(alias, release, expected)
        self._step()


class LosesAnswer(Wrapped):
    """Moves the alias and then hears, of the retry after the lost answer, that it has moved."""

    def write_alias(self, alias: Alias, release: Release, expected: Token) -> None:
        """Move, and fail the first time."""
        super().write_alias(alias, release, expected)
        if self.calls.count("write_alias") == 1:
            raise AliasMovedError("the answer was lost, and the retry was refused")


def publish(
    world: World, directory: Path, made: Composed, store: Any = None, *, dry_run: bool = False
) -> publishing.Outcome:
    """Publish from a checkout in `directory`, by a fresh handle, with the ledger there."""
    return publishing.publish(
        made,
        store or world.open(),
        factory.ledger(directory, made.release.model),
        stable="latest",
        by=factory.by(),
        dry_run=dry_run,
    )


def stable(world: World) -> str:
    """Return the id that the alias means now, and see that all of that release is there."""
    store = world.open()
    id_, release, _ = publishing.resolve(store, MODEL, STABLE)
    for file in release.files:
        assert store.blob_size(MODEL, file.sha256) == file.size_bytes, file.name
    return id_


def size_bytes(made: Composed) -> int:
    """Sum the files of a release."""
    return sum(blob.size_bytes for blob in made.blobs)


class StoreContract:
    """See the module; `world` is what a subclass has to provide."""

    @pytest.fixture(autouse=True)
    def _own_state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What this user has seen of registries is another user's business."""
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        # A test decides again at once.
        monkeypatch.setattr(publishing, "_LONGEST_PAUSE_S", 0.05)

    @pytest.fixture
    def one(self, tmp_path: Path) -> Composed:
        """A release of two quants."""
        return factory.composed(tmp_path / "files")

    @pytest.fixture
    def two(self, tmp_path: Path, one: Composed) -> Composed:
        """Its successor: other weights, the same small files."""
        return factory.composed(tmp_path / "files", 2, previous=one.id)

    # publish and read

    def test_what_is_published_is_read_back_byte_for_byte(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """Alias, release and every file come back, with the ledger telling the move."""
        outcome = publish(world, tmp_path, one)

        store = world.open()
        id_, release, data = publishing.resolve(store, MODEL, STABLE)
        assert (id_, release, data) == (one.id, one.release, one.data)
        for file in release.files:
            target = tmp_path / "pulled" / file.name
            publishing.read_to(store, MODEL, file, target, lambda _: None)
            assert factory.sha256(target.read_bytes()) == file.sha256
        moved = factory.ledger(tmp_path).last(store.name, STABLE)
        assert moved is not None
        assert outcome.moved == moved
        assert (moved.sequence, moved.action, moved.release) == (1, "publish", one.id)
        assert outcome.uploaded_count == len(one.blobs)

    def test_publishing_again_changes_nothing_and_says_so(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """No byte is sent, no alias is written, no line is added."""
        publish(world, tmp_path, one)
        ledger = factory.ledger(tmp_path).path.read_bytes()
        again = Wrapped(world.open())

        outcome = publish(world, tmp_path, one, again)

        assert (outcome.uploaded_bytes, outcome.uploaded_count) == (0, 0)
        assert outcome.moved is None
        assert "nothing changed" in outcome.sentence
        assert not {"write_alias", "put_release", "prove_blob"} & set(again.calls)
        assert factory.ledger(tmp_path).path.read_bytes() == ledger

    def test_a_second_release_sends_only_what_is_new_and_keeps_the_first(
        self, world: World, tmp_path: Path, one: Composed, two: Composed
    ) -> None:
        """Equal files are stored once, and the first release stays whole."""
        publish(world, tmp_path, one)

        outcome = publish(world, tmp_path, two)

        new = {blob.sha256 for blob in two.blobs} - {blob.sha256 for blob in one.blobs}
        assert outcome.uploaded_count == len(new)
        assert stable(world) == two.id
        assert publishing.resolve(world.open(), MODEL, "previous")[0] == one.id
        assert set(world.open().list_releases(MODEL)) == {one.id, two.id}

    def test_a_dry_run_says_what_it_would_do_and_does_nothing(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """Sizes and the move are foretold; registry and ledger stay empty."""
        outcome = publish(world, tmp_path, one, dry_run=True)

        assert outcome.sentence.startswith("Would send ")
        assert outcome.uploaded_bytes == size_bytes(one)
        assert outcome.moved is not None
        store = world.open()
        assert store.read_alias(MODEL, STABLE)[0] is None
        assert store.list_releases(MODEL) == ()
        assert not factory.ledger(tmp_path).path.exists()

    def test_reading_goes_on_where_it_ended(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """What a killed reader has is not read again."""
        publish(world, tmp_path, one)
        file = one.release.of("gguf")[0]
        store = Wrapped(world.open())

        def dies(done_bytes: int) -> None:
            if done_bytes:
                raise DiedError

        with pytest.raises(DiedError):
            publishing.read_to(store, MODEL, file, tmp_path / "x.gguf", dies)
        first_bytes = store.read_bytes
        left = next(tmp_path.glob(".x.gguf*.part"))
        with left.open("r+b") as part:
            part.truncate(10_000)
        publishing.read_to(store, MODEL, file, tmp_path / "x.gguf", lambda _: None)

        assert store.read_bytes - first_bytes == file.size_bytes - 10_000
        assert factory.sha256((tmp_path / "x.gguf").read_bytes()) == file.sha256
        assert list(tmp_path.glob(".*.part")) == []

    def test_a_blob_is_read_from_any_offset(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """An offset skips exactly that many bytes."""
        publish(world, tmp_path, one)
        file = one.release.of("gguf")[0]
        store = world.open()

        whole = b"".join(store.read_blob(MODEL, file.sha256))

        assert factory.sha256(whole) == file.sha256
        for offset in (1, 1000, file.size_bytes - 1):
            assert b"".join(store.read_blob(MODEL, file.sha256, offset=offset)) == whole[offset:]

    # roll back

    def test_a_rollback_moves_no_byte_of_a_blob(
        self, world: World, tmp_path: Path, one: Composed, two: Composed
    ) -> None:
        """The alias means the earlier release again, with a higher number, and nothing is sent."""
        publish(world, tmp_path, one)
        publish(world, tmp_path, two)
        store = Wrapped(world.open())

        outcome = publishing.point(
            MODEL, "previous", store, factory.ledger(tmp_path), by=factory.by("two is slow")
        )

        assert outcome.moved is not None
        assert (outcome.moved.action, outcome.moved.sequence) == ("rollback", 3)
        assert stable(world) == one.id
        assert store.read_bytes == 0
        assert store.calls == ["write_alias"]
        assert [move.release for move in factory.ledger(tmp_path).moves(store.name, STABLE)] == [
            one.id,
            two.id,
            one.id,
        ]

    def test_nobody_is_led_to_what_was_never_published(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """The alias stays where it is."""
        publish(world, tmp_path, one)

        with pytest.raises(NotThereError):
            publishing.point(MODEL, NOBODY, world.open(), factory.ledger(tmp_path), by=factory.by())

        assert stable(world) == one.id

    def test_nobody_is_led_to_a_release_that_lost_a_file(
        self, world: World, tmp_path: Path, one: Composed, two: Composed
    ) -> None:
        """The file is named, and the alias stays where it is."""
        publish(world, tmp_path, one)
        publish(world, tmp_path, two)
        lost = one.release.of("gguf")[0]
        if world.deletes:
            world.open().delete_blob(lost.sha256)
        else:
            world.open().delete_release(MODEL, one.id)

        with pytest.raises(NotThereError, match=lost.name if world.deletes else "no release"):
            publishing.point(MODEL, one.id, world.open(), factory.ledger(tmp_path), by=factory.by())

        assert stable(world) == two.id

    # wrong bytes

    def test_a_file_that_is_not_what_its_name_says_is_never_stored(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """Nothing has its name, and no alias means the release."""
        path = tmp_path / "files" / f"{MODEL}-Q8_0-1.gguf"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

        with pytest.raises(DigestError, match="Q8_0"):
            publish(world, tmp_path, one)

        store = world.open()
        assert store.blob_size(MODEL, one.release.of("gguf", "Q8_0")[0].sha256) is None
        assert store.read_alias(MODEL, STABLE)[0] is None
        assert store.list_releases(MODEL) == ()

    def test_a_source_of_another_size_is_never_stored(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """A file that was cut off is noticed."""
        path = tmp_path / "files" / f"{MODEL}-Q8_0-1.gguf"
        path.write_bytes(path.read_bytes()[:-1])

        with pytest.raises(FleetError):
            publish(world, tmp_path, one)

        assert world.open().blob_size(MODEL, one.release.of("gguf", "Q8_0")[0].sha256) is None

    def test_a_rotten_blob_is_found_by_whoever_proves_or_reads_it(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """It is an error, and nothing of it gets a name."""
        store = world.open()
        publish(world, tmp_path, one, store)
        file = one.release.of("gguf", "Q8_0")[0]
        blob = next(each for each in one.blobs if each.sha256 == file.sha256)

        world.tamper(MODEL, file.sha256)

        for handle in (store, world.open()):
            with pytest.raises(FleetError):
                handle.prove_blob(MODEL, blob, lambda _: None)
        with pytest.raises(FleetError):
            publishing.read_to(world.open(), MODEL, file, tmp_path / "x.gguf", lambda _: None)
        assert not (tmp_path / "x.gguf").exists()

    def test_a_new_release_is_not_shown_with_a_rotten_blob_in_it(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """Files that are there already are read again, too, before the alias moves."""
        publish(world, tmp_path, one)
        world.tamper(MODEL, one.release.of("gguf", "Q8_0")[0].sha256)
        # The same files, another release: its context is another one.
        release = one.release.model_copy(update={"context_tokens": 1024, "previous": one.id})
        data = release_bytes(release)
        other = replace(one, release=release, data=data, id=factory.sha256(data))

        with pytest.raises(FleetError):
            publish(world, tmp_path, other)

        alias, _ = world.open().read_alias(MODEL, STABLE)
        assert alias is not None
        assert alias.release == one.id

    # what is not there

    def test_what_is_not_there_is_said_to_be_not_there(self, world: World, tmp_path: Path) -> None:
        """An empty registry answers; it neither fails nor invents."""
        store = world.open()
        store.prepare(MODEL)

        assert store.blob_size(MODEL, NOBODY) is None
        assert store.list_releases(MODEL) == ()
        assert store.list_models() == ()
        assert store.read_alias(MODEL, STABLE)[0] is None
        with pytest.raises(NotThereError):
            store.read_release(MODEL, NOBODY)
        with pytest.raises(NotThereError):
            b"".join(store.read_blob(MODEL, NOBODY))
        with pytest.raises(NotThereError):
            publishing.resolve(store, MODEL, STABLE)
        with pytest.raises(NotThereError):
            publishing.resolve(store, MODEL, NOBODY[:12])
        assert list(tmp_path.glob("x*")) == []

    def test_blobs_and_releases_are_listed_and_deleted(
        self, world: World, tmp_path: Path, one: Composed, two: Composed
    ) -> None:
        """What is deleted is gone; to delete it twice is no error."""
        publish(world, tmp_path, one)
        publish(world, tmp_path, two)
        store = world.open()

        listed = {blob.sha256: blob.size_bytes for blob in store.list_blobs()}
        for made in (one, two):
            for blob in made.blobs:
                assert listed[blob.sha256] == blob.size_bytes
        assert store.list_models() == (MODEL,)
        for _ in range(2):
            store.delete_release(MODEL, one.id)
        assert store.list_releases(MODEL) == (two.id,)
        if world.deletes:
            file = one.release.of("gguf")[0]
            for _ in range(2):
                store.delete_blob(file.sha256)
            assert world.open().blob_size(MODEL, file.sha256) is None
        assert stable(world) == two.id

    def test_garbage_under_the_name_of_an_alias_is_an_error(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """It is neither taken for an alias nor for none, and it is not overwritten."""
        publish(world, tmp_path, one)
        world.garble_alias(MODEL, STABLE)

        with pytest.raises(StoreError):
            publishing.resolve(world.open(), MODEL, STABLE)
        with pytest.raises(StoreError):
            publish(world, tmp_path, factory.composed(tmp_path / "files", 3))

    # two at once, and the end at any moment

    def test_an_alias_that_somebody_else_moved_is_not_overwritten(
        self, world: World, tmp_path: Path, one: Composed, two: Composed
    ) -> None:
        """Compare and set: the second of two who read the same is told, and nothing is written."""
        publish(world, tmp_path, one)
        told = publish(world, tmp_path, two).sentence
        first, second = world.open(), world.open()
        if not first.guarantees.compare_and_set:
            assert "read back" in told  # what is done instead, and said
            return
        alias, token = first.read_alias(MODEL, STABLE)
        same, other_token = second.read_alias(MODEL, STABLE)
        assert alias is not None
        assert same == alias
        first.write_alias(alias.moved(_move(3, one.id, two.id)), one.release, token)

        with pytest.raises(AliasMovedError):
            second.write_alias(alias.moved(_move(3, two.id, two.id)), two.release, other_token)

        assert stable(world) == one.id

    def test_of_two_who_create_an_alias_one_does(
        self, world: World, tmp_path: Path, one: Composed, two: Composed
    ) -> None:
        """An alias that was not there when it was read is not overwritten either."""
        store = world.open()
        if not store.guarantees.compare_and_set:
            assert "read back" in publish(world, tmp_path, one).sentence
            return
        store.prepare(MODEL)
        none, token = store.read_alias(MODEL, STABLE)
        assert none is None
        publish(world, tmp_path, one)
        for blob in two.blobs:
            store.put_blob(MODEL, blob, lambda _: None)
        store.put_release(two.release, two.data)

        with pytest.raises(AliasMovedError):
            store.write_alias(
                Alias(model=MODEL, alias=STABLE, moves=(_move(1, two.id, None),)),
                two.release,
                token,
            )

        assert stable(world) == one.id

    def test_publishers_at_once_make_one_history_in_which_none_is_lost(
        self, world: World, tmp_path: Path
    ) -> None:
        """Each has its own checkout, handle and ledger; the numbers are 1, 2, 3, ... in the end."""
        made = [
            factory.composed(tmp_path / "files", seed, types=("Q8_0",))
            for seed in range(_PUBLISHERS_COUNT)
        ]
        together = threading.Barrier(_PUBLISHERS_COUNT)

        def run(number: int) -> publishing.Outcome:
            store = world.open()
            together.wait()
            return publish(world, tmp_path / f"checkout{number}", made[number], store)

        with ThreadPoolExecutor(_PUBLISHERS_COUNT) as pool:
            outcomes = list(pool.map(run, range(_PUBLISHERS_COUNT)))

        alias, _ = world.open().read_alias(MODEL, STABLE)
        assert alias is not None
        assert [move.sequence for move in alias.moves] == list(range(1, _PUBLISHERS_COUNT + 1))
        assert {move.release for move in alias.moves} == {each.id for each in made}
        assert [move.previous for move in alias.moves[1:]] == [
            move.release for move in alias.moves[:-1]
        ]
        assert {outcome.moved for outcome in outcomes} == set(alias.moves)
        assert stable(world) == alias.release

    def test_a_move_whose_answer_was_lost_counts_once(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """It was done; it is not done again under another number."""
        store = LosesAnswer(world.open())

        outcome = publish(world, tmp_path, one, store)

        alias, _ = world.open().read_alias(MODEL, STABLE)
        assert alias is not None
        assert alias.moves == (outcome.moved,)
        assert factory.ledger(tmp_path).moves(store.name, STABLE) == alias.moves

    def test_an_upload_that_ends_half_way_leaves_no_name(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """Whoever is killed in the middle of a file stores nothing of it; the next run does."""
        store = world.open()
        store.prepare(MODEL)
        blob = next(each for each in one.blobs if each.name.endswith(".gguf"))

        def dies(done_bytes: int) -> None:
            raise DiedError(done_bytes)

        with pytest.raises(DiedError):
            store.put_blob(MODEL, blob, dies)

        there_bytes = world.open().blob_size(MODEL, blob.sha256)
        if there_bytes is not None:  # the last byte was sent when it was told
            world.open().prove_blob(MODEL, blob, lambda _: None)
        publish(world, tmp_path, one)
        assert stable(world) == one.id

    def test_a_publisher_may_end_after_any_step_and_the_next_one_finishes(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """Before the alias moves all see the release before; the next run ends what was begun."""
        publish(world, tmp_path, one)
        before, step, died = one.id, 0, True
        while died:
            step += 1
            made = factory.composed(
                tmp_path / "files", 100 + step, types=("Q8_0",), size_bytes=2000, previous=before
            )
            try:
                publish(world, tmp_path, made, Wrapped(world.open(), dies_after=step))
                died = False
            except DiedError:
                assert stable(world) in {before, made.id}
            outcome = publish(world, tmp_path, made)
            assert outcome.release == stable(world) == made.id
            before = made.id

        moves = factory.ledger(tmp_path).moves(world.open().name, STABLE)
        assert [move.sequence for move in moves] == list(range(1, step + 2))
        alias, _ = world.open().read_alias(MODEL, STABLE)
        assert alias is not None
        assert alias.moves == moves

    def test_a_ledger_that_missed_a_move_is_brought_up_to_date(
        self, world: World, tmp_path: Path, one: Composed, two: Composed
    ) -> None:
        """The registry remembers its moves; another checkout writes the very same lines."""
        publish(world, tmp_path / "a", one)
        publish(world, tmp_path / "a", two)

        outcome = publish(world, tmp_path / "b", two)

        assert outcome.moved is None
        assert (
            factory.ledger(tmp_path / "b").path.read_bytes()
            == factory.ledger(tmp_path / "a").path.read_bytes()
        )

    def test_readers_never_see_half_of_a_release_while_others_come_and_go(
        self, world: World, tmp_path: Path, one: Composed
    ) -> None:
        """A thousand of them: while the alias goes to and fro, everyone gets a whole one."""
        publish(world, tmp_path, one)
        ended = threading.Event()
        numbers = itertools.count()

        def read(_reader: int) -> list[tuple[str, str]]:
            wrong = []
            store = world.open()
            while (number := next(numbers)) < world.reads_count or not ended.is_set():
                id_, release, _ = publishing.resolve(store, MODEL, STABLE)
                file = release.files[number % len(release.files)]
                found = hash_blob(store.read_blob(MODEL, file.sha256), lambda _: None)
                if found != (file.sha256, file.size_bytes):
                    wrong.append((id_, file.name))
            return wrong

        with ThreadPoolExecutor(8) as pool:
            readers = [pool.submit(read, number) for number in range(8)]
            try:
                for seed in range(3, 8):
                    made = factory.composed(
                        tmp_path / "files", seed, types=("Q8_0",), size_bytes=4000
                    )
                    publish(world, tmp_path, made)
                    publishing.point(
                        MODEL,
                        "previous",
                        world.open(),
                        factory.ledger(tmp_path),
                        by=factory.by("to and fro"),
                    )
            finally:
                ended.set()
            assert [wrong for reader in readers for wrong in reader.result()] == []
        assert next(numbers) >= world.reads_count


def _move(sequence: int, release: str, previous: str | None) -> Move:
    by = factory.by()
    return Move(
        sequence=sequence,
        action="publish",
        release=release,
        previous=previous,
        at=by.at,
        who=by.who,
        why=by.why,
        run=by.run,
    )
