"""`fleet gc`: what no promised rollback needs is freed; what is not known is left alone."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import release_factory as factory
from release_checkout import MODEL, OTHER, PARAMS, REASON, Checkout

from pipelines import declaration, publishing, registry_gc
from pipelines.errors import ParamsError, StoreError
from pipelines.params import Registry
from pipelines.release_records import STABLE, alias_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from registry_servers import OciServer, S3Server

    from pipelines.registry_gc import GcPlan

# Everything that the tests write is older than a day then.
TOMORROW = datetime.now(UTC) + timedelta(days=2)
LATER = datetime(2100, 1, 1, tzinfo=UTC)


@pytest.fixture
def checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Checkout:
    """A fleet with two directories as registries."""
    return Checkout(tmp_path / "fleet", monkeypatch, capsys)


def collect(checkout: Checkout, **options: Any) -> GcPlan:
    """Collect the local registry long after all moves, for good."""
    wanted: dict[str, Any] = {
        "now": LATER,
        "keep_moves": 2,
        "keep_days": 0,
        "apply": True,
    } | options
    ledgers = {MODEL: checkout.ledger(), OTHER: checkout.ledger(OTHER)}
    return registry_gc.collect(checkout.store(), ledgers, **wanted)


def files(checkout: Checkout, registry: str = "registry") -> set[str]:
    """Digests of the files in a registry."""
    return {path.name for path in (checkout.root / registry / "blobs/sha256").iterdir()}


def named(*releases: Any) -> set[str]:
    """Digests of the files of releases."""
    return {file.sha256 for made in releases for file in made.release.files}


# --- what stays and what goes -----------------------------------------------------------------


def test_releases_of_the_last_moves_stay_and_older_ones_go(checkout: Checkout) -> None:
    """Of five releases the two of the last two moves stay, with every file that they name."""
    ids = [checkout.publish(seed) for seed in range(1, 6)]

    plan = collect(checkout)

    assert set(checkout.store().list_releases(MODEL)) == set(ids[3:])
    assert {each.id for each in plan.releases} == set(ids[:3])
    assert files(checkout) == named(checkout.release(4), checkout.release(5))
    assert plan.freed_bytes == sum(blob.size_bytes for blob in plan.blobs) > 200_000


def test_every_promised_rollback_works_after_a_collection(checkout: Checkout) -> None:
    """What a kept move went to can be rolled back to."""
    ids = [checkout.publish(seed) for seed in range(1, 6)]
    collect(checkout, keep_moves=3)

    for id_ in ids[2:]:
        ran = checkout.fleet("rollback", MODEL, "--to", id_, "--reason", REASON)
        assert ran.code == 0, ran.err


def test_moves_of_the_last_days_stay_however_many(checkout: Checkout) -> None:
    """Moves of 1 to 5 January: 90 days later all of them count, a week after that none."""
    ids = [checkout.publish(seed, year=2027) for seed in range(1, 6)]

    kept = collect(checkout, keep_days=90, now=datetime(2027, 4, 1, tzinfo=UTC), apply=False)
    gone = collect(checkout, keep_days=90, now=datetime(2027, 4, 8, tzinfo=UTC), apply=False)

    assert {each.id for each in kept.kept} == set(ids)
    assert {each.id for each in gone.releases} == set(ids[:3])


def test_what_was_served_until_yesterday_stays_however_long_it_was(checkout: Checkout) -> None:
    """Its own move is years old, and many came since: the days count from when it was replaced."""
    first = checkout.publish(1, year=2020)
    ids = [checkout.publish(seed, year=2027) for seed in range(2, 6)]

    kept = collect(checkout, keep_days=90, now=datetime(2027, 4, 1, tzinfo=UTC), apply=False)
    gone = collect(checkout, keep_days=90, now=datetime(2027, 4, 8, tzinfo=UTC), apply=False)

    assert {each.id for each in kept.kept} == {first, *ids}
    assert first in {each.id for each in gone.releases}


def test_what_is_pinned_stays(checkout: Checkout) -> None:
    """A release that params.yaml names is kept, however old its move."""
    ids = [checkout.publish(seed) for seed in range(1, 6)]

    collect(checkout, pinned={ids[0]})

    assert set(checkout.store().list_releases(MODEL)) == {ids[0], *ids[3:]}


def test_the_ledger_keeps_what_the_registry_forgot(checkout: Checkout) -> None:
    """A registry that was put back to an old alias: the ledger's last moves count, too."""
    ids = [checkout.publish(1), checkout.publish(2)]
    path = checkout.root / "registry/aliases" / MODEL / "stable.json"
    old = path.read_bytes()
    ids += [checkout.publish(3), checkout.publish(4)]
    path.write_bytes(old)

    collect(checkout)

    # 3 and 4 by the ledger; 2 since the alias means it.
    assert set(checkout.store().list_releases(MODEL)) == set(ids[1:])


def test_the_registry_keeps_what_the_ledger_does_not_know(checkout: Checkout) -> None:
    """A checkout of an older commit collects nothing that the alias still remembers."""
    ids = [checkout.publish(seed) for seed in range(1, 4)]
    checkout.at.ledger(MODEL).unlink()

    collect(checkout)

    assert set(checkout.store().list_releases(MODEL)) == set(ids[1:])


def test_files_that_another_model_names_stay(checkout: Checkout) -> None:
    """Files are shared by all models; each is kept as long as one release names it."""
    for seed in (1, 2, 3):
        checkout.publish(seed)
    checkout.publish(1, model=OTHER)

    collect(checkout, keep_moves=1)

    assert named(checkout.release(1, OTHER)) <= files(checkout)


def test_a_model_that_this_checkout_does_not_know_is_left_alone(checkout: Checkout) -> None:
    """A registry shared by two fleets: nothing of the other one is removed, and that is said."""
    for seed in (1, 2, 3):
        checkout.publish(seed, model=OTHER)

    plan = registry_gc.collect(
        checkout.store(), {MODEL: checkout.ledger()}, now=LATER, keep_moves=1, keep_days=0,
        apply=True,
    )  # fmt: skip

    assert not plan.releases
    assert len(checkout.store().list_releases(OTHER)) == 3
    assert OTHER in plan.notes[0]


def test_young_files_and_releases_stay(checkout: Checkout) -> None:
    """What was written within a day may be of a publisher who is at work."""
    for seed in range(1, 6):
        checkout.publish(seed)
    orphan = b"a killed publisher left this"
    checkout.blob_path(factory.sha256(orphan)).write_bytes(orphan)

    plan = collect(checkout, now=datetime.now(UTC), keep_days=0)

    assert not plan.releases
    assert not plan.blobs
    assert plan.waiting_count == 1
    old = collect(checkout, now=TOMORROW)
    assert factory.sha256(orphan) in {blob.sha256 for blob in old.blobs}


def test_a_second_collection_finds_nothing(checkout: Checkout) -> None:
    """After a collection there is nothing left to collect."""
    for seed in range(1, 6):
        checkout.publish(seed)
    collect(checkout)

    plan = collect(checkout)

    assert not plan.releases
    assert not plan.blobs


# --- where something is not known -------------------------------------------------------------


def test_a_release_that_cannot_be_read_stops_it(checkout: Checkout) -> None:
    """It may name any file, so nothing at all is removed."""
    ids = [checkout.publish(seed) for seed in range(1, 6)]
    path = checkout.root / "registry/releases" / MODEL / f"{ids[0]}.json"
    path.chmod(0o644)
    path.write_bytes(b"{}")
    before = files(checkout)

    with pytest.raises(StoreError, match="nothing is removed"):
        collect(checkout)

    assert files(checkout) == before
    assert len(checkout.store().list_releases(MODEL)) == 5


def test_an_alias_that_cannot_be_read_stops_it(checkout: Checkout) -> None:
    """Without it nobody knows what is served."""
    for seed in range(1, 6):
        checkout.publish(seed)
    (checkout.root / "registry/aliases" / MODEL / "stable.json").write_bytes(b"<html>")

    with pytest.raises(StoreError):
        collect(checkout)

    assert len(checkout.store().list_releases(MODEL)) == 5


def test_an_alias_to_a_release_that_is_gone_stops_it(checkout: Checkout) -> None:
    """A registry in disorder is verified first, not collected."""
    ids = [checkout.publish(seed) for seed in range(1, 4)]
    checkout.store().delete_release(MODEL, ids[-1])

    with pytest.raises(StoreError, match="does not have") as caught:
        collect(checkout)

    assert "verify-registry" in caught.value.hint


def test_a_broken_ledger_stops_it(checkout: Checkout) -> None:
    """The verb reads every ledger before it looks at the registry."""
    for seed in range(1, 6):
        checkout.publish(seed)
    checkout.at.ledger(MODEL).write_text("{}\n")

    ran = checkout.fleet("gc", "--registry", "local", "--keep-moves", "1", "--apply")

    assert ran.code == 8
    assert len(checkout.store().list_releases(MODEL)) == 5


@pytest.mark.parametrize("options", [{"keep_moves": 0}, {"keep_days": -1}])
def test_limits_that_promise_nothing_are_refused(checkout: Checkout, options: Any) -> None:
    """The last move is always kept."""
    with pytest.raises(ParamsError):
        collect(checkout, **options)


# --- somebody publishes meanwhile -------------------------------------------------------------


def test_a_rollback_while_releases_are_removed_puts_its_release_back(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alias moves to a release in the moment in which it is removed: it is put back whole."""
    ids = [checkout.publish(seed) for seed in range(1, 6)]
    store = checkout.store()
    real = store.delete_release
    alias, token = store.read_alias(MODEL, STABLE)
    assert alias is not None
    move = alias.moves[-1].model_copy(
        update={"sequence": 6, "release": ids[0], "action": "rollback", "previous": ids[4]}
    )

    def delete(model: str, id_: str) -> None:
        if id_ == ids[0]:
            store.write_alias(alias.moved(move), checkout.release(1).release, token)
        real(model, id_)

    monkeypatch.setattr(store, "delete_release", delete)

    plan = registry_gc.collect(
        store, {MODEL: checkout.ledger()}, now=LATER, keep_moves=1, keep_days=0, apply=True
    )

    assert ids[0] not in {each.id for each in plan.releases}
    assert any("is back" in note for note in plan.notes)
    data = checkout.store().read_release(MODEL, ids[0])
    assert factory.sha256(data) == ids[0]
    assert named(checkout.release(1)) <= files(checkout)


def test_an_alias_that_moved_since_the_plan_keeps_its_release(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between plan and sweep somebody rolls back: what he took is not removed."""
    ids = [checkout.publish(seed) for seed in range(1, 6)]
    real = registry_gc._Sweep.apply

    def apply(sweep: Any, plan: Any) -> Any:
        publishing.point(MODEL, ids[0], checkout.store(), checkout.ledger(), by=factory.by())
        return real(sweep, plan)

    monkeypatch.setattr(registry_gc._Sweep, "apply", apply)

    collect(checkout)

    assert checkout.store().read_release(MODEL, ids[0])
    assert named(checkout.release(1)) <= files(checkout)


def test_a_publisher_whose_file_was_removed_is_named(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that appears while its files go is an error that says how to mend it."""
    for seed in (1, 2, 3):
        checkout.publish(seed)
    store = checkout.store()
    store.delete_release(MODEL, checkout.release(1).id)
    real = store.delete_blob

    def delete(sha256: str) -> None:
        store.put_release(checkout.release(1).release, checkout.release(1).data)
        real(sha256)

    monkeypatch.setattr(store, "delete_blob", delete)

    with pytest.raises(StoreError, match="was published while") as caught:
        registry_gc.collect(
            store, {MODEL: checkout.ledger()}, now=LATER, keep_moves=1, keep_days=0, apply=True
        )

    assert f"fleet publish {MODEL} --to local" in caught.value.hint


def test_a_rollback_while_files_are_removed_is_named(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looked before the release went and moved the alias after: never a word of success."""
    ids = [checkout.publish(seed) for seed in range(1, 4)]
    store = checkout.store()
    real = store.delete_blob
    alias, token = store.read_alias(MODEL, STABLE)
    assert alias is not None
    back = {"sequence": 4, "release": ids[0], "action": "rollback", "previous": ids[2]}
    moved = alias.moved(alias.moves[-1].model_copy(update=back))

    def delete(sha256: str) -> None:
        if store.read_alias(MODEL, STABLE)[0] == alias:
            store.write_alias(moved, checkout.release(1).release, token)
        real(sha256)

    monkeypatch.setattr(store, "delete_blob", delete)

    with pytest.raises(StoreError, match=f"{MODEL}@{ids[0][:12]} was published while") as caught:
        registry_gc.collect(
            store, {MODEL: checkout.ledger()}, now=LATER, keep_moves=1, keep_days=0, apply=True
        )

    assert f"fleet publish {MODEL} --to local" in caught.value.hint
    assert store.read_release(MODEL, ids[0])


def test_a_kill_between_releases_and_files_leaves_only_files(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next collection frees them; no release ever lacks one."""
    for seed in range(1, 6):
        checkout.publish(seed)
    from pipelines.stores.local import LocalStore  # noqa: PLC0415 - to end it there

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalStore, "delete_blob", die)
    with pytest.raises(KeyboardInterrupt):
        collect(checkout)
    monkeypatch.undo()

    assert named(checkout.release(4), checkout.release(5)) < files(checkout)
    collect(checkout)
    assert files(checkout) == named(checkout.release(4), checkout.release(5))


# --- the verb ---------------------------------------------------------------------------------


def age(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let two days pass for the store, which looks at the clock of inodes."""
    now = time.time
    monkeypatch.setattr("pipelines.stores.local.time.time", lambda: now() + 2 * 86_400)
    assert checkout.root.exists()


def test_it_is_a_dry_run_unless_apply_is_typed(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan names what would go; nothing goes; --apply does exactly that."""
    ids = [checkout.publish(seed) for seed in range(1, 6)]
    age(checkout, monkeypatch)
    argv = ("gc", "--registry", "local", "--keep-moves", "2", "--keep-days", "0")

    planned = checkout.fleet(*argv, "--json")
    assert planned.code == 0, planned.err
    assert len(checkout.store().list_releases(MODEL)) == 5
    done = checkout.fleet(*argv, "--json", "--apply")

    assert not planned.json["applied"]
    assert done.json["applied"]
    assert done.json["releases"] == planned.json["releases"]
    assert done.json["freed_bytes"] == planned.json["freed_bytes"] > 0
    assert set(checkout.store().list_releases(MODEL)) == set(ids[3:])


def test_people_read_what_goes_and_how_to_do_it(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each release that goes, the sum, and the next step."""
    ids = [checkout.publish(seed) for seed in range(1, 4)]
    age(checkout, monkeypatch)

    ran = checkout.fleet("gc", "--registry", "local", "--keep-moves", "1", "--keep-days", "0")

    assert f"{MODEL}@{ids[0][:12]}" in ran.out
    gone = named(checkout.release(1), checkout.release(2)) - named(checkout.release(3))
    assert f"local: would remove 2 releases and {len(gone)} files" in ran.out
    assert "--apply" in ran.err


def test_what_params_yaml_and_results_name_is_kept_by_the_verb(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stable: <id>` and results/M/release.json pin their releases."""
    ids = [checkout.publish(seed) for seed in range(1, 6)]
    checkout.at.params.write_text(PARAMS.replace("# pinned\n", f"# pinned\n    stable: {ids[0]}\n"))
    checkout.at.release(MODEL).write_bytes(checkout.release(2).data)
    age(checkout, monkeypatch)

    argv = ("gc", "--registry", "local", "--keep-moves", "1", "--keep-days", "0", "--apply")
    assert checkout.fleet(*argv).code == 0

    assert set(checkout.store().list_releases(MODEL)) == {ids[0], ids[1], ids[4]}


def test_the_hub_is_not_collected(checkout: Checkout) -> None:
    """Where nothing can be freed the verb says so instead of pretending."""
    checkout.at.params.write_text(f'{PARAMS}  hub: {{url: "hf:owner"}}\n')

    ran = checkout.fleet("gc", "--registry", "hub")

    assert ran.code == 2
    assert "frees nothing" in ran.err


def test_releases_of_a_registry_that_keeps_its_files_here_count(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow names releases of this registry; where it cannot be asked nothing is removed."""
    for seed in range(1, 6):
        checkout.publish(seed)
    extra = '  tracker: {url: "mlflow:http://127.0.0.1:9", blobs: local}\n'
    checkout.at.params.write_text(PARAMS + extra)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    age(checkout, monkeypatch)

    ran = checkout.fleet("gc", "--registry", "local", "--keep-moves", "1", "--apply")

    assert ran.code != 0
    assert len(checkout.store().list_releases(MODEL)) == 5


def test_the_alias_file_is_never_touched(checkout: Checkout) -> None:
    """A collection removes releases and files, and writes nothing."""
    for seed in range(1, 6):
        checkout.publish(seed)
    path = checkout.root / "registry/aliases" / MODEL / "stable.json"
    before = path.read_bytes(), path.stat().st_mtime_ns

    collect(checkout)

    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert path.read_bytes() == alias_bytes(checkout.alias())


# --- other kinds of registries ----------------------------------------------------------------


def test_a_bucket_is_collected_as_a_folder_is(checkout: Checkout, s3_server: S3Server) -> None:
    """Old releases and their files go, shared ones stay, and what is left is whole."""
    checkout.declare("production", s3_server.registry(prefix="fleet"))
    ids = [checkout.publish(seed, "production") for seed in range(1, 5)]
    store = checkout.store("production")

    plan = registry_gc.collect(
        store, {MODEL: checkout.ledger()}, now=LATER, keep_moves=2, keep_days=0, apply=True
    )

    assert set(store.list_releases(MODEL)) == set(ids[2:])
    assert {blob.sha256 for blob in store.list_blobs()} == named(
        checkout.release(3), checkout.release(4)
    )
    assert plan.freed_bytes > 100_000
    assert checkout.fleet("verify-registry", "production").code == 0
    ran = checkout.fleet(
        "rollback", MODEL, "--to", ids[2], "--registry", "production", "--reason", REASON
    )
    assert ran.code == 0, ran.err


def test_a_registry_of_oci_loses_manifests_and_keeps_what_is_served(
    checkout: Checkout, oci: OciServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Releases that no promise needs go; its own collection frees the disk; the rest is whole."""
    for name, value in oci.environment("harbour").items():
        monkeypatch.setenv(name, value)
    checkout.declare("harbour", oci.registry(namespace="collected"))
    ids = [checkout.publish(seed, "harbour") for seed in range(1, 4)]
    store = checkout.store("harbour")

    registry_gc.collect(
        store, {MODEL: checkout.ledger()}, now=LATER, keep_moves=2, keep_days=0, apply=True
    )

    assert set(store.list_releases(MODEL)) == set(ids[1:])
    assert checkout.fleet("verify-registry", "harbour").code == 0


def test_a_registry_without_files_of_its_own_keeps_those_that_it_names(
    checkout: Checkout,
) -> None:
    """MLflow's releases pin their files in the other registry until they are collected there."""
    checkout.declare(
        "tracker", Registry(url=f"mlflow:sqlite:///{checkout.root}/mlflow.db", blobs="local")
    )
    ids = [checkout.publish(seed, "local", "tracker") for seed in range(1, 4)]
    declared = declaration.load(checkout.at.params)
    assert set(ids) <= registry_gc._pinned(declared, checkout.at, "local")

    registry_gc.collect(
        checkout.store("tracker"), {MODEL: checkout.ledger()}, now=LATER, keep_moves=1,
        keep_days=0, apply=True,
    )  # fmt: skip

    assert ids[0] not in registry_gc._pinned(declared, checkout.at, "local")
    assert ids[0] in checkout.store().list_releases(MODEL)
    assert checkout.blob_path(checkout.release(1).release.files[0].sha256).exists()
