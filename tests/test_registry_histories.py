"""
Random histories of a registry: publish, roll back, collect, die, rot, race; a model keeps count.

After every step: `stable` is a release of which every byte is there and right, the moves are
numbered 1, 2, 3, ..., every ledger tells a beginning of the same story, and each of the last
releases can be rolled back to.

`GGUF_FLEET_HISTORIES=1000 python -m pytest tests/test_registry_histories.py` runs as many; without
it a few dozen are made, the same each time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import release_factory as factory
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from store_contract import DiedError, Wrapped

from pipelines import publishing, reading, registry_gc
from pipelines.errors import FleetError, GateError, StoreError
from pipelines.release_records import STABLE, Alias, Move
from pipelines.stores.base import NotThereError, hash_blob
from pipelines.stores.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.ledger import Ledger
    from pipelines.release import Composed
    from pipelines.release_records import Release
    from pipelines.stores.base import Store, Token

MODEL: Final = factory.MODEL
HISTORIES: Final = int(os.environ.get("GGUF_FLEET_HISTORIES", "0"))
KEEP_MOVES: Final = 3
SEEDS: Final = 6
CHECKOUTS: Final = 2
# Steps of one history.
STEPS: Final = 20
# More steps than a publication has.
MAX_STEP: Final = 20


class Races(Wrapped):
    """Lets somebody else finish in the moment between reading the alias and moving it."""

    def __init__(self, store: Store, other: Callable[[], object]) -> None:
        """Wrap `store`; `other` runs right before the first move."""
        super().__init__(store)
        self._other: Callable[[], object] | None = other

    def write_alias(self, alias: Alias, release: Release, expected: Token) -> None:
        """Move, after the other one did."""
        other, self._other = self._other, None
        if other is not None:
            other()
        super().write_alias(alias, release, expected)


class Registry:
    """A registry of one kind: how to open an empty one, and how to harm it."""

    def __init__(self, open_: Callable[[], Store], tamper: Callable[[str], None]) -> None:
        """Keep both."""
        self.open = open_
        self.tamper = tamper


class Histories(RuleBasedStateMachine):
    """One history; `registry` and `releases` are set by the test."""

    new_registry: Callable[[Path], Registry]
    scratch: Path
    releases: tuple[Composed, ...]

    @initialize()
    def begin(self) -> None:
        """Start with an empty registry and two checkouts without a ledger."""
        self.root = Path(tempfile.mkdtemp(dir=type(self).scratch))
        self.registry = type(self).new_registry(self.root / "registry")
        self.stores = [self.registry.open() for _ in range(CHECKOUTS)]
        self.moves: list[Move] = []
        self.numbers = itertools.count(1)

    def teardown(self) -> None:
        """Remove what the history wrote."""
        with contextlib.suppress(AttributeError):
            shutil.rmtree(self.root)

    # what the world does

    @rule(checkout=st.integers(0, CHECKOUTS - 1), seed=st.integers(0, SEEDS - 1))
    def publish(self, checkout: int, seed: int) -> None:
        """Publish a release; it is the stable one afterwards."""
        made = self.releases[seed]
        outcome = self._publish(checkout, made)
        self._expect(outcome.moved, made.id)

    @precondition(lambda self: self.moves)
    @rule(data=st.data(), checkout=st.integers(0, CHECKOUTS - 1), seed=st.integers(0, SEEDS - 1))
    def publish_while_another_is_declared(self, data: Any, checkout: int, seed: int) -> None:
        """`stable: <id>`: the new release is stored, the alias means the declared one."""
        target = data.draw(st.sampled_from(self._promised()))
        outcome = self._publish(checkout, self.releases[seed], stable=target)
        self._expect(outcome.moved, target)
        assert self.releases[seed].id in self.stores[0].list_releases(MODEL)

    @precondition(lambda self: self.moves)
    @rule(data=st.data(), checkout=st.integers(0, CHECKOUTS - 1))
    def roll_back(self, data: Any, checkout: int) -> None:
        """Every promised rollback works, and no byte of a blob is moved by it."""
        target = data.draw(st.sampled_from(self._promised()))
        store = Wrapped(self.stores[checkout])
        outcome = publishing.point(
            MODEL, target, store, self._ledger(checkout), by=self._by("too slow")
        )
        assert not {"put_blob", "read_blob", "put_release"} & set(store.calls)
        self._expect(outcome.moved, target)

    @precondition(lambda self: self.moves and self.moves[-1].previous)
    @rule(checkout=st.integers(0, CHECKOUTS - 1))
    def roll_back_to_the_previous_one(self, checkout: int) -> None:
        """`previous` is where the last move came from."""
        target = self.moves[-1].previous
        assert target is not None
        outcome = publishing.point(
            MODEL, "previous", self.stores[checkout], self._ledger(checkout), by=self._by("back")
        )
        self._expect(outcome.moved, target)

    @precondition(lambda self: self.moves)
    @rule(seed=st.integers(0, SEEDS - 1), checkout=st.integers(0, CHECKOUTS - 1))
    def ask_for_what_may_be_gone(self, seed: int, checkout: int) -> None:
        """A release that no promise keeps is either whole or refused."""
        target = self.releases[seed].id
        try:
            outcome = publishing.point(
                MODEL, target, self.stores[checkout], self._ledger(checkout), by=self._by("try it")
            )
        except NotThereError:
            assert target not in self._promised()
        else:
            self._expect(outcome.moved, target)

    @rule(
        checkout=st.integers(0, CHECKOUTS - 1),
        seed=st.integers(0, SEEDS - 1),
        step=st.integers(1, MAX_STEP),
        again=st.booleans(),
    )
    def die(self, checkout: int, seed: int, step: int, again: bool) -> None:  # noqa: FBT001
        """A publisher ends after some step; a next one, or none, goes on."""
        made = self.releases[seed]
        store = Wrapped(self.stores[checkout], dies_after=step)
        by = self._by("before it died")
        try:
            outcome = publishing.publish(
                made, store, self._ledger(checkout), stable="latest", by=by
            )
        except DiedError:
            alias, _ = self.stores[checkout].read_alias(MODEL, STABLE)
            if alias is not None and len(alias.moves) > len(self.moves):
                self._expect(alias.moves[-1], made.id)
        except GateError:
            assert self._was_replaced(checkout, made.id)
        else:
            self._expect(outcome.moved, made.id)
        if again:
            outcome = self._publish(checkout, made)
            self._expect(outcome.moved, made.id)

    @rule(first=st.integers(0, SEEDS - 1), second=st.integers(0, SEEDS - 1))
    def two_publish_at_once(self, first: int, second: int) -> None:
        """One moves the alias just before the other one does: both are in the history."""
        one, two = self.releases[first], self.releases[second]

        def other() -> None:
            self._expect(self._publish(1, two).moved, two.id)

        store = Races(self.stores[0], other)
        try:
            outcome = publishing.publish(
                one, store, self._ledger(0), stable="latest", by=self._by("at once")
            )
        except GateError:
            assert self._was_replaced(0, one.id)
        else:
            self._expect(outcome.moved, one.id)

    @precondition(lambda self: self.moves)
    @rule(checkout=st.integers(0, CHECKOUTS - 1))
    def collect(self, checkout: int) -> None:
        """Everything that no promise needs is removed, however young."""
        registry_gc.collect(
            self.stores[checkout],
            {MODEL: self._ledger(checkout)},
            now=datetime(2100, 1, 1, tzinfo=UTC),
            keep_moves=KEEP_MOVES,
            keep_days=0,
            apply=True,
        )
        there = set(self.stores[checkout].list_releases(MODEL))
        assert there == set(self._promised())

    @precondition(lambda self: self.moves)
    @rule(data=st.data(), checkout=st.integers(0, CHECKOUTS - 1))
    def rot(self, data: Any, checkout: int) -> None:
        """A flipped bit is found by all who look; without that file, publishing again heals."""
        made = data.draw(st.sampled_from([self._made(id_) for id_ in self._promised()]))
        blob = data.draw(st.sampled_from(made.blobs))
        store = self.stores[checkout]
        self.registry.tamper(blob.sha256)
        with pytest.raises(FleetError):
            store.prove_blob(MODEL, blob, lambda _: None)
        store.delete_blob(blob.sha256)
        with pytest.raises(NotThereError):
            publishing.point(MODEL, made.id, store, self._ledger(checkout), by=self._by("no"))
        self._expect(self._publish(checkout, made).moved, made.id)

    @rule(checkout=st.integers(0, CHECKOUTS - 1))
    def lose_the_ledger(self, checkout: int) -> None:
        """A checkout of an older commit knows nothing of the moves since."""
        self._ledger(checkout).path.unlink(missing_ok=True)

    @precondition(lambda self: len(self.moves) > 1)
    @rule(data=st.data())
    def replay(self, data: Any) -> None:
        """An old state of the registry is noticed, and the ledger's moves are put back."""
        store, ledger = self.stores[0], self._ledger(0)
        publishing.catch_up(MODEL, store, ledger)
        count = data.draw(st.integers(1, len(self.moves) - 1))
        alias, token = store.read_alias(MODEL, STABLE)
        assert alias is not None
        old = alias.model_copy(update={"moves": alias.moves[:count]})
        store.write_alias(old, self._made(old.release).release, token)

        with pytest.raises(StoreError, match="old state"):
            publishing.resolve(store, MODEL, STABLE, ledger)

        assert publishing.restore(MODEL, store, ledger)

    # what is true after every step

    @invariant()
    def history_is_linear(self) -> None:
        """The alias holds the moves of the model, and each ledger a beginning of them."""
        if not hasattr(self, "moves"):
            return
        alias, _ = self.stores[0].read_alias(MODEL, STABLE)
        assert (alias.moves if alias else ()) == tuple(self.moves)
        assert [move.sequence for move in self.moves] == list(range(1, len(self.moves) + 1))
        for checkout in range(CHECKOUTS):
            written = self._ledger(checkout).moves("registry", STABLE)
            assert written == tuple(self.moves[: len(written)])

    @invariant()
    def stable_and_all_promised_are_whole(self) -> None:
        """Every byte of the stable release is right; of the promised ones every file is there."""
        if not getattr(self, "moves", None):
            return
        store = self.stores[-1]
        id_, release, _ = publishing.resolve(store, MODEL, STABLE)
        assert id_ == self.moves[-1].release
        for file in release.files:
            found = hash_blob(store.read_blob(MODEL, file.sha256), lambda _: None)
            assert found == (file.sha256, file.size_bytes)
        there = {blob.sha256: blob.size_bytes for blob in store.list_blobs()}
        for promised in self._promised():
            _, release, _ = publishing.resolve(store, MODEL, promised)
            for file in release.files:
                assert there[file.sha256] == file.size_bytes

    # below

    def _by(self, why: str) -> publishing.By:
        # No two moves are equal: else one could pass for another.
        return factory.by(f"{why} ({next(self.numbers)})")

    def _ledger(self, checkout: int) -> Ledger:
        return factory.ledger(self.root / f"checkout{checkout}")

    def _publish(self, checkout: int, made: Composed, stable: str = "latest") -> publishing.Outcome:
        """Publish; from a checkout that is too old to know better, only after it was pulled."""
        store = self.stores[checkout]
        publish = partial(publishing.publish, made, store, stable=stable)
        if self._was_replaced(checkout, made.id if stable == "latest" else stable):
            for dry_run in (True, False, False):
                with pytest.raises(GateError, match="does not know"):
                    publish(ledger=self._ledger(checkout), by=self._by("too old"), dry_run=dry_run)
            publishing.catch_up(MODEL, store, self._ledger(checkout))  # brings what a pull brings
        return publish(ledger=self._ledger(checkout), by=self._by("a better one"))

    def _was_replaced(self, checkout: int, target: str) -> bool:
        """
        Tell whether a release was `stable`, and no more, by moves that a checkout has not.

        Also if the last of those moves went back: nothing takes that back unasked.
        """
        written = self._ledger(checkout).moves("registry", STABLE)
        if len(written) >= len(self.moves) or target == self.moves[-1].release:
            return False
        return self.moves[-1].action == "rollback" or target in {
            move.release for move in self.moves
        }

    def _expect(self, moved: Move | None, target: str) -> None:
        """Hold a move against the model, and add it."""
        if moved is None:
            assert self.moves
            assert self.moves[-1].release == target
            return
        before = self.moves[-1].release if self.moves else None
        assert (moved.sequence, moved.previous, moved.release) == (
            len(self.moves) + 1,
            before,
            target,
        )
        known = {move.release for move in self.moves}
        assert moved.action == ("rollback" if target in known else "publish")
        self.moves.append(moved)

    def _promised(self) -> list[str]:
        return sorted({move.release for move in self.moves[-KEEP_MOVES:]})

    def _made(self, id_: str) -> Composed:
        return next(made for made in self.releases if made.id == id_)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place in memory if there is one: thousands of little files are put on the disk else."""
    memory = Path("/dev/shm")
    base = memory if os.access(memory, os.W_OK) else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir=base, prefix="fleet-histories-") as directory:
        yield Path(directory)


@pytest.fixture(autouse=True)
def _quick(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits, nothing is too young to be collected, no state of the user is touched."""
    monkeypatch.setattr(publishing, "_LONGEST_PAUSE_S", 0.0)
    monkeypatch.setattr(registry_gc, "YOUNG_S", 0.0)
    monkeypatch.setattr(reading, "_remember", lambda *_: None)
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(scratch / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(scratch / "state"))


def run(scratch: Path, new_registry: Callable[[Path], Registry], examples: int) -> None:
    """Make that many histories, the same each time unless many are asked for."""
    Histories.new_registry = staticmethod(new_registry)
    Histories.scratch = scratch
    Histories.releases = tuple(
        factory.composed(scratch / "files", seed, types=("Q8_0",), size_bytes=300)
        for seed in range(SEEDS)
    )
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=HISTORIES or examples,
            stateful_step_count=STEPS,
            derandomize=not HISTORIES,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(36_000 if HISTORIES else 600)
def test_every_history_of_a_directory_keeps_the_promises(scratch: Path) -> None:
    """On the local store."""

    def new_registry(root: Path) -> Registry:
        def tamper(sha256: str) -> None:
            path = root / "blobs/sha256" / sha256
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.chmod(0o644)
            # Not in place: it may be a link to the file from which it is published.
            path.unlink()
            path.write_bytes(data)

        return Registry(lambda: LocalStore("registry", root), tamper)

    run(scratch, new_registry, 60)


@pytest.mark.timeout(36_000 if HISTORIES else 600)
def test_every_history_of_s3_keeps_the_promises(
    scratch: Path, versitygw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real S3 server, where every step is a request."""
    from pipelines.stores.s3 import S3Store  # noqa: PLC0415 - brings botocore

    for name, value in versitygw.environment.items():
        monkeypatch.setenv(name, value)
    bucket, numbers = versitygw.new_bucket(), itertools.count()
    assert versitygw.directory is not None

    def new_registry(_: Path) -> Registry:
        prefix = f"history{next(numbers)}"
        registry = versitygw.registry(bucket=bucket, prefix=prefix)

        def tamper(sha256: str) -> None:
            path = versitygw.directory / bucket / prefix / "blobs/sha256" / sha256
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)

        return Registry(lambda: S3Store("registry", registry), tamper)

    run(scratch, new_registry, 6)
