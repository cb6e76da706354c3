"""The stage `publish`: a release in the local registry, or the reason why there is none."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine_factory
import pytest
import yaml
from publish_factory import (
    HOSTS,
    change,
    change_load_test,
    choose_and_serve,
    digest_of,
    finished,
    publish_slice,
    waiver,
)
from record_factory import MODEL, compare_record, sha256, side

from pipelines import declaration, params, publish, records
from pipelines.compare_records import CompareRecord
from pipelines.errors import DigestError, MachineError, StoreError
from pipelines.ledger import Ledger
from pipelines.release_records import (
    PublishRecord,
    Release,
    parse_release,
    release_id,
    short,
)
from pipelines.stores.local import LocalStore

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from pipelines.layout import Layout

    Fleet = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A checkout that is ready to be published."""
    return finished(tmp_path)


def published(at: Layout, **changes: Any) -> PublishRecord:
    """Run the stage, and write its record as the command line does."""
    record = publish.run(publish_slice(**changes), at)
    records.write(at.model_record("publish", MODEL), record)
    return record


def registry(at: Layout) -> LocalStore:
    """The local registry of a checkout."""
    return LocalStore("local", at.root / "registry")


def release_of(at: Layout) -> Release:
    """What results/ holds."""
    data = at.release(MODEL).read_bytes()
    return parse_release(data, release_id(data), "results")


def moves(at: Layout) -> list[tuple[str, str]]:
    """The moves of `stable` as (action, release)."""
    found = Ledger.load(at.ledger(MODEL), MODEL).moves("local", "stable")
    return [(move.action, move.release) for move in found]


# --- releasing --------------------------------------------------------------------------------


def test_what_passed_its_gates_is_in_the_registry_and_stable(at: Layout) -> None:
    """release.json, every blob of it, the alias, the ledger line and the record."""
    record = published(at)

    store = registry(at)
    data = at.release(MODEL).read_bytes()
    assert record.status == "released"
    assert record.release == record.stable == release_id(data)
    assert store.read_release(MODEL, release_id(data)) == data
    release = release_of(at)
    for file in release.files:
        assert store.blob_size(MODEL, file.sha256) == file.size_bytes
    assert record.files_count == len({file.sha256 for file in release.files})
    assert moves(at) == [("publish", release_id(data))]
    assert publish.sentence(record) == (
        f"released {short(record.release)} (stable) in local, file:registry"
    )


def test_again_changes_nothing(at: Layout) -> None:
    """Record, release, ledger, registry and what the probe sees keep their bytes."""
    first = published(at)
    before = {path: path.read_bytes() for path in at.root.rglob("*") if path.is_file()}

    second = published(at)

    after = {path: path.read_bytes() for path in at.root.rglob("*") if path.is_file()}
    assert second == first
    assert after == before


def test_an_empty_registry_is_filled_again_without_a_new_line_in_git(at: Layout) -> None:
    """As in a fresh clone: the same id, the same number, no file of results/ changes."""
    published(at)
    before = {path: path.read_bytes() for path in (at.root / "results").rglob("*.json*")}
    shutil.rmtree(at.root / "registry")

    record = published(at)

    assert record.sequence == 1
    assert {path: path.read_bytes() for path in before} == before
    assert publish.observe(publish_slice(), at).missing == ()


def test_a_new_release_follows_the_old_one(at: Layout) -> None:
    """`previous` names it, the alias moves, and both are there."""
    first = published(at)
    change_load_test(at, wall_s=2.0)

    second = published(at)

    assert release_of(at).previous == first.release
    assert second.release == second.stable != first.release
    assert second.sequence == 2
    assert set(registry(at).list_releases(MODEL)) == {first.release, second.release}


def test_a_declared_release_is_stable_and_the_new_one_is_kept(at: Layout) -> None:
    """`stable: ID` moves the alias back; the newest build is published all the same."""
    first = published(at)
    change_load_test(at, wall_s=2.0)
    second = published(at)
    assert first.release is not None

    back = published(at, stable=first.release)

    assert (back.release, back.stable) == (second.release, first.release)
    assert [action for action, _ in moves(at)] == ["publish", "publish", "rollback"]
    assert publish.sentence(back).endswith(f"; stable is {short(first.release)}")
    assert published(at).stable == second.release


def test_a_stable_that_the_registry_does_not_hold_is_data_not_a_failure(at: Layout) -> None:
    """As in a fresh clone of a fleet that was rolled back: the rest of the chain goes on."""
    first = published(at)

    record = published(at, stable="0" * 64)

    assert record.status == "refused"
    assert record.stable == first.release
    assert "000000000000" in record.reasons[0]
    assert publish.observe(publish_slice(stable="0" * 64), at).missing == ("0" * 64,)


def test_a_waiver_is_told_with_the_release(at: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    """In the record, in the ledger, and on the terminal: who, why, until when."""
    change(at.model_record("fetch", MODEL), records.FetchRecord, gated="manual")

    record = published(at, waivers=(waiver("gated", until="2999-12-31"),))

    assert [each.gate for each in record.waivers] == ["gated"]
    assert "waiver of `gated` until 2999-12-31 by Ada Lovelace" in capsys.readouterr().err
    assert '"kind":"waiver"' in at.ledger(MODEL).read_text()


# --- refusing ---------------------------------------------------------------------------------


def test_a_refusal_is_data_and_the_release_before_stays(
    at: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """release.json, alias and ledger are as they were; the record says why."""
    first = published(at)
    kept = at.release(MODEL).read_bytes(), at.ledger(MODEL).read_bytes()
    change(at.model_record("fetch", MODEL), records.FetchRecord, license=None, gated="auto")

    record = published(at)

    assert (record.status, record.release, record.files_count) == ("refused", None, 0)
    assert record.stable == first.release
    assert len(record.reasons) == 2
    assert (at.release(MODEL).read_bytes(), at.ledger(MODEL).read_bytes()) == kept
    told = capsys.readouterr().err
    assert all(reason in told for reason in record.reasons)
    said = publish.sentence(record)
    assert said.startswith("not released: Upstream states no licence.")
    assert "And 1 further reason: publish.json" in said
    assert said.endswith(f"`stable` stays {short(first.release)}")


def test_a_first_refusal_leaves_no_release(at: Layout) -> None:
    """Nothing in the registry, nothing in results/ but the record."""
    change(at.model_record("fetch", MODEL), records.FetchRecord, license=None)

    record = published(at)

    assert (record.stable, record.sequence) == (None, None)
    assert not at.release(MODEL).exists()
    assert not at.ledger(MODEL).exists()
    assert not list((at.root / "registry").rglob("*.json"))


def test_a_file_that_the_registry_does_not_take_is_refused_before_any_byte(
    at: Layout, tmp_path: Path
) -> None:
    """`max_file_mib` of params.yaml; the sentence names the file and its size."""
    path = at.gguf(MODEL, f"{MODEL}-Q8_0")
    with path.open("ab") as file:
        file.truncate(3 << 20)
    _resized(at, "Q8_0")
    small = params.Registry(url=params.LOCAL_URL, max_file_mib=1)

    record = published(at, registry=small)

    assert record.status == "refused"
    assert f"{MODEL}-Q8_0.gguf" in record.reasons[0]
    assert not list((tmp_path / "registry").rglob("*"))


def _resized(at: Layout, type_: str) -> None:
    """Let every record speak of a GGUF as it is now."""
    digest = digest_of(at.gguf(MODEL, f"{MODEL}-{type_}"))
    change(
        at.quant_record("quantize", MODEL, type_), records.QuantizeRecord, gguf=digest.model_dump()
    )
    change(
        at.quant_record("benchmark", MODEL, type_),
        records.BenchmarkRecord,
        gguf_sha256=digest.sha256,
        size_bytes=digest.size_bytes,
    )
    choose_and_serve(at, MODEL, ("Q8_0", "Q4_K_M"))


def test_a_file_with_other_bytes_is_an_error_and_nothing_is_stable(at: Layout) -> None:
    """The right size, the right header, another weight: the store hashes what it is given."""
    path = at.gguf(MODEL, f"{MODEL}-Q8_0")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(DigestError, match="is not the file of the release"):
        publish.run(publish_slice(), at)

    assert not at.release(MODEL).exists()
    assert publish.observe(publish_slice(), at).stable is None


def test_a_registry_that_cannot_be_written_to_is_an_error(at: Layout) -> None:
    """It is this machine's fault, not the model's."""
    (at.root / "registry").write_text("a file")

    with pytest.raises(MachineError, match="cannot be written to"):
        publish.run(publish_slice(), at)


def test_a_ledger_that_was_edited_is_an_error(at: Layout) -> None:
    """Nothing is moved on top of a story that does not hold together."""
    published(at)
    ledger = at.ledger(MODEL)
    ledger.write_text(ledger.read_text().replace("it passed its gates", "it is nice"))
    change_load_test(at, wall_s=2.0)

    with pytest.raises(StoreError):
        publish.run(publish_slice(), at)


# --- what the probe sees ----------------------------------------------------------------------


def test_the_probe_sees_what_somebody_else_did_to_the_registry(at: Layout) -> None:
    """A lost blob, a cut one, a lost release, a moved alias: each is another answer."""
    published(at)
    slice_ = publish_slice()
    whole = publish.observe(slice_, at)
    assert (whole.missing, whole.problem) == ((), "")
    file = release_of(at).files[0]
    blob = at.root / "registry/blobs/sha256" / file.sha256
    data = blob.read_bytes()

    blob.unlink()
    assert publish.observe(slice_, at).missing == (file.sha256,)
    blob.write_bytes(data[:-1])
    assert publish.observe(slice_, at).missing == (file.sha256,)
    blob.unlink()
    blob.write_bytes(data)
    assert publish.observe(slice_, at) == whole
    (release,) = (at.root / "registry/releases" / MODEL).iterdir()
    text = release.read_bytes()
    release.unlink()
    assert publish.observe(slice_, at).missing == (whole.release,)
    release.write_bytes(text)
    (alias,) = (at.root / "registry/aliases" / MODEL).iterdir()
    alias.unlink()
    assert publish.observe(slice_, at).stable is None


@pytest.mark.parametrize("text", ["no JSON", "{}", "[" * 100_000, '{"files": [{"sha256": 1}]}'])
@pytest.mark.parametrize("spoil", ["aliases", "releases", "named by an alias"])
def test_a_registry_in_disorder_is_noted_and_not_raised(at: Layout, spoil: str, text: str) -> None:
    """The probe runs for every model of the fleet: one broken file must not stop the others."""
    published(at)
    id_ = release_id(at.release(MODEL).read_bytes())
    (alias,) = (at.root / "registry/aliases" / MODEL).iterdir()
    (release,) = (at.root / "registry/releases" / MODEL).iterdir()
    path = alias if spoil == "aliases" else release
    if spoil == "named by an alias":
        other = release_id(text.encode())
        alias.write_bytes(alias.read_bytes().replace(id_.encode(), other.encode()))
        path = release.with_name(f"{other}.json")
    path.write_text(text)

    found = publish.observe(publish_slice(), at)

    assert found.problem or found.missing == (id_,)
    assert str(at.root) not in found.problem


def test_the_probe_reads_no_blob(at: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look costs the same for 20 GB as for 20 MB."""
    published(at)
    opened: list[str] = []
    real, real_os = Path.open, os.open

    def recorded(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(str(path))
        return real(path, *args, **options)

    def recorded_os(path: Any, *args: Any, **options: Any) -> int:
        opened.append(str(path))
        return real_os(path, *args, **options)

    monkeypatch.setattr(Path, "open", recorded)
    monkeypatch.setattr(os, "open", recorded_os)
    publish.observe(publish_slice(), at)

    assert [name for name in opened if "/releases/" in name]
    assert not [name for name in opened if "/blobs/" in name or name.endswith(".gguf")]


# --- below DVC --------------------------------------------------------------------------------

PARAMS = {
    "toolchain": {"llama_cpp_python": "0.3.36", "sha256": "0" * 64},
    "corpora": {"evaluation": {"path": "corpora/evaluation.txt", "sha256": sha256("evaluation")}},
    "models": {
        MODEL: {
            "source": f"path:examples/{MODEL}",
            "revision": publish_slice().revision,
            "context_tokens": 512,
        }
    },
    "quants": {
        key: {"model": MODEL, "type": type_} for key, type_ in publish_slice().quants.items()
    },
    "gates": {"max_kld_mean_nats": 0.06},
    "load_test": {"slo": {"ttft_ms": 300.0, "tpot_ms": 50.0}},
    "hosts": HOSTS,
}


class Chain:
    """The real stage in the real graph of a checkout, behind the probe."""

    def __init__(self, at: Layout) -> None:
        """Write params.yaml and the one stage of dvc.yaml; nothing ran yet."""
        self.at = at
        self.declare()
        graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["publish"]
        (at.root / "dvc.yaml").write_text(json.dumps({"stages": {"publish": graph}}))

    def declare(self, **model: Any) -> None:
        """Write params.yaml with other values of the model."""
        changed = PARAMS | {"models": {MODEL: PARAMS["models"][MODEL] | model}}  # type: ignore[index]
        self.at.params.write_text(json.dumps(changed))

    def run(self) -> bool:
        """Do what `fleet repro` does for this stage; return whether it ran."""
        from dvc.repo import Repo  # noqa: PLC0415 - heavy

        declared = declaration.load(self.at.params)
        declaration.write_slices(declared, self.at)
        publish.note(params.publish_slice(declared, MODEL), self.at)
        publish.note_comparison(MODEL, self.at)
        if not (self.at.root / ".dvc").is_dir():
            Repo.init(str(self.at.root), no_scm=True).close()
        with Repo(str(self.at.root)) as repo:
            return [stage.addressing for stage in repo.reproduce()] == [f"publish@{MODEL}"]

    def record(self) -> PublishRecord:
        """What the stage left."""
        return records.read(self.at.model_record("publish", MODEL), PublishRecord)


@pytest.fixture
def chain(at: Layout, monkeypatch: pytest.MonkeyPatch) -> Chain:
    """A checkout with DVC, in which stages find this Python and our modules."""
    monkeypatch.chdir(at.root)
    own = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([own, os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    return Chain(at)


def test_dvc_runs_it_again_exactly_when_the_registry_is_not_as_it_was_left(
    at: Layout, chain: Chain
) -> None:
    """Not after a whole run; but after a lost blob, an edit of `stable`, a revert of results/."""
    assert chain.run()
    assert not chain.run()
    first = chain.record()
    lock = (at.root / "dvc.lock").read_bytes()
    results = {path: path.read_bytes() for path in (at.root / "results").rglob("*.json*")}

    (at.root / "registry/blobs/sha256" / release_of(at).files[0].sha256).unlink()
    assert chain.run()
    assert (at.root / "dvc.lock").read_bytes() == lock
    assert not chain.run()

    change_load_test(at, wall_s=2.0)
    assert chain.run()
    second = chain.record()
    assert not chain.run()
    chain.declare(stable=first.release)
    assert chain.run()
    assert chain.record().stable == first.release
    assert not chain.run()
    chain.declare()
    assert chain.run()
    assert chain.record().stable == second.release

    # git checkout of the commit after the first run: records, ledger and lock are as they were.
    ledger = at.ledger(MODEL).read_bytes()
    for path, data in results.items():
        path.write_bytes(data)
    (at.root / "dvc.lock").write_bytes(lock)
    assert chain.run()
    assert chain.record().status == "refused"
    assert "`git pull`, then publish again" in chain.record().reasons[0]
    assert chain.record().stable == second.release
    assert not chain.run()
    # A commit that takes back the records and keeps the ledger: somebody decided that here.
    at.ledger(MODEL).write_bytes(ledger)
    assert chain.run()
    assert chain.record().stable == first.release
    assert [action for action, _ in moves(at)][-1] == "rollback"
    assert not chain.run()


def compared(at: Layout, outcome: str = "better", **changes: Any) -> None:
    """Leave a comparison of the chosen file, as `fleet compare` would."""
    built = records.read(at.quant_record("quantize", MODEL, "Q4_K_M"), records.QuantizeRecord)
    challenger = side(gguf_sha256=built.gguf.sha256)
    records.write(at.comparison(MODEL), compare_record(outcome, challenger=challenger, **changes))


def test_a_comparison_that_appears_is_judged_and_part_of_the_evidence(
    at: Layout, chain: Chain
) -> None:
    """`fleet compare` is no stage: the probe tells DVC; a worse file is no release, once seen."""
    assert chain.run()
    first = chain.record()

    compared(at)
    assert chain.run()
    better = chain.record()
    assert "compare.json" in release_of(at).evidence
    assert better.release != first.release
    assert not chain.run()

    whole = records.read(at.comparison(MODEL), CompareRecord)
    older = whole.champion.model_copy(update={"toolchain_id": "cpu-old"})
    records.write(at.comparison(MODEL), whole.model_copy(update={"champion": older}))
    told = engine_factory.engine_record(
        champion=older, challenger=whole.challenger, machine=whole.machine,
        context_tokens=whole.context_tokens,
    )  # fmt: skip
    records.write(at.engine_record(MODEL), told)
    assert chain.run()
    assert "engine.json" in release_of(at).evidence
    better = chain.record()
    assert not chain.run()
    at.engine_record(MODEL).unlink()
    compared(at, "worse")
    assert chain.run()

    assert chain.record().status == "refused"
    assert chain.record().stable == better.release
    assert "is worse: decode is worse" in chain.record().reasons[0]


def test_dvc_takes_a_refusal_for_a_result(at: Layout, chain: Chain) -> None:
    """The stage is done, its record says why, and release.json of before is still there."""
    change(at.model_record("fetch", MODEL), records.FetchRecord, license=None)
    assert chain.run()
    assert chain.record().status == "refused"
    assert not at.release(MODEL).exists()
    assert not chain.run()

    chain.declare(license="llama3.2")
    assert chain.run()
    kept = at.release(MODEL).read_bytes()
    assert chain.record().status == "released"
    chain.declare()
    assert chain.run()
    assert chain.record().status == "refused"
    assert at.release(MODEL).read_bytes() == kept
    assert not chain.run()


# --- the command line -------------------------------------------------------------------------


def test_the_command_prints_a_line_or_the_record(at: Layout, fleet: Fleet) -> None:
    """`fleet publish MODEL` for a person, with `--json` for a program; a refusal exits 0."""
    Chain(at)
    shown = fleet("publish", MODEL)
    told = fleet("publish", MODEL, "--json")
    change(at.model_record("fetch", MODEL), records.FetchRecord, license=None)
    refused = fleet("publish", MODEL)

    record = PublishRecord.model_validate_json(told.stdout)
    assert shown.returncode == told.returncode == refused.returncode == 0, shown.stderr
    assert f"{MODEL}: released {short(record.release)} (stable) in local" in shown.stderr
    assert f"warning: {MODEL}: not released: Upstream states no licence." in refused.stderr
    stored = records.read(at.model_record("publish", MODEL), PublishRecord)
    assert stored.status == "refused"
