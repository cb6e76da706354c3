"""`fleet publish` on a hosted machine: a clone without work/, DVC's remote, main, the ledger."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from github_api import Fault, GitHubApi
from hosted_job import Hosted
from hub import Hub
from publish_factory import LICENSE, change, change_load_test, finished
from record_factory import MODEL
from release_checkout import Checkout
from test_release_verbs import params_of

from pipelines import checksums, declaration, params, records, release
from pipelines.layout import Layout
from pipelines.ledger import Ledger
from pipelines.records import FetchRecord
from pipelines.release_records import Release, release_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
OTHER = "second-model"
# The stages that make what a release holds; the real graph has the same outputs.
GRAPH = """\
stages:
  fetch: {foreach: "${models}", do: {cmd: "true", outs: ["work/${key}/source"]}}
  calibrate: {foreach: "${models}", do: {cmd: "true", outs: ["work/${key}/imatrix"]}}
  quantize:
    foreach: ${quants}
    do: {cmd: "true", outs: ["work/${item.model}/gguf/${key}.gguf"]}
"""
CONFIG = """\
[core]
    analytics = false
    check_update = false
    remote = storage
['remote "storage"']
    url = ../../storage
    verify = true
"""
REGISTRIES = """\
  production: {"url": "file:production", "environment": "production"}
  backup: {"url": "file:backup", "environment": "production"}
"""


def dvc(root: Path, *argv: str) -> None:
    """Run DVC in a folder."""
    subprocess.run(
        [sys.executable, "-m", "dvc", *argv], cwd=root, check=True, capture_output=True, timeout=120
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two measured models: `machine` as it was left, `clone` as git holds it, and `storage`."""
    folder = tmp_path_factory.mktemp("measured")
    root = folder / "machine"
    for model in (MODEL, OTHER):
        # Other bytes for each: what one model's tests remove is not the other's.
        finished(root, model=model, template=f"{{{{ messages[0]['content'] }}}} of {model}")
        example = root / "examples" / model
        example.mkdir(parents=True)
        shutil.copy(root / "work" / model / "source/LICENSE", example)
    (root / "params.yaml").write_text(params_of(MODEL, OTHER) + REGISTRIES)
    (root / "dvc.yaml").write_text(GRAPH)
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text(CONFIG)
    (root / ".gitignore").write_text("/work\n/registry\n/mirror\n/production\n/backup\n/state\n")
    subprocess.run(["git", "init", "-q", "-b", "main", str(root)], check=True)
    dvc(root, "commit", "-f")
    dvc(root, "push")
    shutil.copy(ROOT / "dvc.yaml", root)
    kept = shutil.ignore_patterns("work", "cache", "tmp")
    shutil.copytree(root, folder / "clone", ignore=kept)
    shutil.rmtree(root / ".dvc/cache")
    return folder


@pytest.fixture
def checkout(
    measured: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Checkout:
    """A clone on a hosted machine: no work/, no DVC cache; the remote is a folder beside it."""
    shutil.copytree(measured / "clone", tmp_path / "fleet")
    shutil.copytree(measured / "storage", tmp_path / "storage")
    return Checkout(tmp_path / "fleet", monkeypatch, capsys)


@pytest.fixture
def stocked(
    measured: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Checkout:
    """The same with work/: as if everything had been brought, so that nobody waits for DVC."""
    shutil.copytree(measured / "machine", tmp_path / "fleet")
    return Checkout(tmp_path / "fleet", monkeypatch, capsys)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[GitHubApi]:
    """GitHub."""
    with GitHubApi(tmp_path / "origin.git") as served:
        yield served


@pytest.fixture
def hosted(stocked: Checkout, api: GitHubApi, monkeypatch: pytest.MonkeyPatch) -> Hosted:
    """A job on main."""
    return Hosted(stocked, api, monkeypatch)


def objects(store: Path) -> list[Path]:
    """Return what DVC's remote holds."""
    return sorted(path for path in store.rglob("*") if path.is_file())


def object_of(checkout: Checkout, key: str, model: str = MODEL) -> Path:
    """Return where DVC's remote keeps a GGUF."""
    type_ = key.removeprefix(f"{model}-")
    record = json.loads(checkout.at.quant_record("quantize", model, type_).read_text())
    md5: str = record["gguf"]["md5"]
    return checkout.root.parent / "storage/files/md5" / md5[:2] / md5[2:]


# --- from DVC's remote ------------------------------------------------------------------------


def test_a_clone_without_work_publishes_what_was_measured(checkout: Checkout) -> None:
    """GGUFs, licence and matrix come from the remote; the registry holds them whole; none stays."""
    ran = checkout.fleet("publish", "--to", "production", "--pull")

    assert ran.code == 0, ran.err
    assert "from DVC's remote" in ran.err
    for model in (MODEL, OTHER):
        release = Release.model_validate_json(checkout.at.release(model).read_bytes())
        assert {quant.type for quant in release.quants} == {"Q8_0", "Q4_K_M"}
        assert checkout.alias("production", model).sequence == 1
    assert checkout.fleet("verify-registry", "production").code == 0
    assert not list((checkout.root / "work").rglob("*.gguf"))
    assert not list((checkout.root / ".dvc/cache/files").rglob("*")) or not any(
        path.is_file() and not path.name.endswith(".dir")
        for path in (checkout.root / ".dvc/cache/files").rglob("*")
    )


def test_the_clone_publishes_the_very_release_of_the_machine_that_measured(
    checkout: Checkout, measured: Path
) -> None:
    """One release, one id, wherever it is composed: nothing is made again."""
    checkout.fleet("publish", MODEL, "--to", "production", "--pull")
    machine = Layout(measured / "machine")
    slice_ = params.publish_slice(declaration.load(machine.params), MODEL)

    made = release.compose(slice_, machine)

    assert isinstance(made, release.Composed)
    assert made.id == checkout.alias("production").release


def test_nothing_is_brought_that_the_registry_holds(checkout: Checkout) -> None:
    """Other records of the same GGUFs: a new release, of whose weights the remote gives no byte."""
    checkout.fleet("publish", MODEL, "--to", "production", "--pull")
    change_load_test(checkout.at, MODEL, wall_s=123.0)
    for type_ in ("Q8_0", "Q4_K_M"):
        object_of(checkout, f"{MODEL}-{type_}").unlink()

    ran = checkout.fleet("publish", MODEL, "--to", "production", "--pull")

    assert ran.code == 0, ran.err
    assert checkout.alias("production").sequence == 2
    assert checkout.fleet("verify-registry", "production").code == 0


def test_a_registry_with_other_bytes_under_a_name_of_a_model_is_not_believed(
    checkout: Checkout,
) -> None:
    """The header is right, the rest is not: it is read again before a release names it."""
    checkout.fleet("publish", MODEL, "--to", "production", "--pull")
    before = checkout.alias("production")
    change_load_test(checkout.at, MODEL, wall_s=123.0)
    record = json.loads(checkout.at.quant_record("quantize", MODEL, "Q8_0").read_text())
    path = checkout.blob_path(record["gguf"]["sha256"], "production")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)

    ran = checkout.fleet("publish", MODEL, "--to", "production", "--pull")

    assert ran.code == 6
    assert checkout.alias("production") == before


def test_an_object_that_the_remote_lacks_is_named_with_the_next_step(checkout: Checkout) -> None:
    """The other model is published all the same."""
    object_of(checkout, f"{MODEL}-Q4_K_M").unlink()

    ran = checkout.fleet("publish", "--to", "production", "--pull")

    assert ran.code == 8
    assert f"DVC's remote does not have work/{MODEL}/gguf/{MODEL}-Q4_K_M.gguf" in ran.err
    assert "dvc push" in ran.err
    assert not list(checkout.root.glob(f"production/aliases/{MODEL}*"))
    assert checkout.alias("production", OTHER).sequence == 1


def test_what_was_brought_before_a_failure_is_not_brought_again(checkout: Checkout) -> None:
    """The remote is mended; only what was missing is asked of it."""
    lost = object_of(checkout, f"{MODEL}-Q4_K_M")
    kept = lost.read_bytes()
    lost.unlink()
    checkout.fleet("publish", MODEL, "--to", "production", "--pull")
    lost.write_bytes(kept)
    object_of(checkout, f"{MODEL}-Q8_0").unlink()

    ran = checkout.fleet("publish", MODEL, "--to", "production", "--pull")

    assert ran.code == 0, ran.err


def test_a_lock_of_another_measurement_is_refused_before_anything_is_brought(
    checkout: Checkout,
) -> None:
    """dvc.lock and results/ have to be of one commit."""
    lock = checkout.root / "dvc.lock"
    record = json.loads(checkout.at.quant_record("quantize", MODEL, "Q8_0").read_text())
    lock.write_text(lock.read_text().replace(record["gguf"]["md5"], "0" * 32))

    ran = checkout.fleet("publish", MODEL, "--to", "production", "--pull")

    assert ran.code == 6
    assert "two measurements" in ran.err
    assert not (checkout.root / "work").exists() or not list(
        (checkout.root / "work").rglob("*.gguf")
    )


def test_bytes_that_are_not_those_of_the_record_are_not_published(checkout: Checkout) -> None:
    """DVC names files by md5; what counts is the sha256 of the record."""
    path = checkout.at.quant_record("quantize", MODEL, "Q8_0")
    text = path.read_text()
    sha256 = json.loads(text)["gguf"]["sha256"]
    wrong = hashlib.sha256(b"other").hexdigest()
    for each in checkout.at.release(MODEL).parent.rglob("*.json"):
        each.write_text(each.read_text().replace(sha256, wrong))

    ran = checkout.fleet("publish", MODEL, "--to", "production", "--pull")

    assert ran.code == 6
    assert "not the bytes that were measured" in ran.err
    assert not (checkout.root / "production/releases").exists()


def test_a_remote_with_ggufs_and_matrix_is_enough(checkout: Checkout) -> None:
    """No file of upstream's is there, nor their list: licences come from the pinned source."""
    lock = (checkout.root / "dvc.lock").read_text()
    lists = re.findall(
        rf"path: work/{MODEL}/source\n +hash: md5\n +md5: ([0-9a-f]{{32}}\.dir)", lock
    )
    assert len(lists) == 1
    for path in objects(checkout.root.parent / "storage"):
        is_list = path.parent.name + path.name == lists[0]
        if is_list or path.read_bytes().startswith(b"Apache"):
            path.unlink()

    ran = checkout.fleet("publish", MODEL, "--to", "production", "--pull")

    assert ran.code == 0, ran.err
    assert checkout.fleet("verify-registry", "production").code == 0


def test_a_source_without_the_licence_that_was_fetched_is_refused(checkout: Checkout) -> None:
    """Another text under its name is not published for the one that was read."""
    for path in objects(checkout.root.parent / "storage"):
        if path.read_bytes().startswith(b"Apache"):
            path.unlink()
    (checkout.root / "examples" / MODEL / "LICENSE").write_text("Another licence.\n")

    ran = checkout.fleet("publish", MODEL, "--to", "production", "--pull")

    assert ran.code == 8
    assert f"DVC's remote does not have work/{MODEL}/source/LICENSE" in ran.err
    assert not (checkout.root / "production/releases").exists()


def test_the_licence_of_a_model_of_the_hub_comes_from_its_pinned_revision(
    checkout: Checkout,
) -> None:
    """The remote has no file of upstream's; one small text is asked of the Hub, and verified."""
    at = checkout.at
    change(at.model_record("fetch", MODEL), FetchRecord, source="hf:acme/Tiny")
    text = at.params.read_text().replace(f"path:examples/{MODEL}", "hf:acme/Tiny")
    at.params.write_text(text)
    pinned = declaration.load(at.params).models[MODEL].revision
    for path in objects(checkout.root.parent / "storage"):
        if path.read_bytes().startswith(b"Apache"):
            path.unlink()
    argv = ["publish", MODEL, "--to", "production", "--pull"]

    with Hub() as hub:
        repo = hub.create("acme/Tiny", {"LICENSE": LICENSE.encode()})
        repo.commits[pinned] = replace(repo.commits[repo.head], id=pinned)
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", *argv],
            cwd=checkout.root,
            env={**os.environ, **hub.env(), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

        assert done.returncode == 0, done.stderr
        assert [each.sent_bytes for each in hub.asked("*/LICENSE")] == [len(LICENSE)]
    assert checkout.fleet("verify-registry", "production").code == 0


def test_a_dry_run_brings_nothing(checkout: Checkout) -> None:
    """It says how much it would bring."""
    ran = checkout.fleet("publish", MODEL, "--to", "production", "--pull", "--dry-run")

    assert ran.code == 0, ran.err
    assert "Would bring 4 files" in ran.out
    assert not (checkout.root / "work").exists()
    assert not (checkout.root / "production").exists()


def test_a_verdict_that_is_no_promote_is_refused_and_nothing_is_brought(
    checkout: Checkout,
) -> None:
    """HOLD, REJECT and INVALID keep a model out; the remote is not asked."""
    path = checkout.at.model_record("fetch", MODEL)
    record = records.read(path, FetchRecord)
    records.write(path, record.model_copy(update={"license": None}))

    ran = checkout.fleet("publish", MODEL, "--to", "production", "--pull")

    assert ran.code == 5
    assert f"{MODEL} is not published" in ran.err
    assert not (checkout.root / "production/releases").exists()
    assert not (checkout.root / "work" / MODEL / "gguf").exists()


def test_a_host_that_measured_for_itself_has_its_own_word(
    tmp_path: Path, stocked: Checkout
) -> None:
    """Its own records are PROMOTE: published. They are not: refused, and not asked for."""
    hosts = {"local": {"memory_mib": 2048}, "big": {"memory_mib": 4096}}
    root = tmp_path / "two-hosts"
    at = finished(root, hosts=hosts)
    declared = {name: {**spec, "runs_on": ["self-hosted", name]} for name, spec in hosts.items()}
    text = re.sub(r"hosts: .*", f"hosts: {json.dumps(declared)}", params_of(MODEL))
    at.params.write_text(text + REGISTRIES)
    below = at.release(MODEL).parent
    shutil.copytree(below, root / "kept")
    shutil.copytree(root / "kept", below / "on/big")
    other = stocked.of(root)
    assert other.fleet("publish", "--to", "production").code == 0

    (below / "on/big/load-test.json").unlink()
    ran = other.fleet("publish", "--to", "production")
    assert ran.code == 5
    assert "Host big, by its own measurement" in ran.err
    assert other.fleet("publish", "--plan", "--json").json["matrix"] == {"include": []}


# --- environments, checksums ------------------------------------------------------------------


def test_an_environment_means_every_registry_that_declares_it(stocked: Checkout) -> None:
    """Both are published to, the local one is not."""
    told = stocked.fleet("publish", MODEL, "--environment", "production", "--json").json

    assert set(told["registries"]) == {"production", "backup"}
    assert stocked.alias("production").release == stocked.alias("backup").release
    assert not (stocked.root / "registry").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--environment", "productoin"), 'did you mean "production"'),
        (("--environment", "production", "--to", "mirror"), "not both"),
        (("--pull",), "--to NAME"),
        (("--to", "", "--environment", ""), "--to NAME"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_can(
    checkout: Checkout, argv: tuple[str, ...], says: str
) -> None:
    """Exit 2, nothing is asked."""
    ran = checkout.fleet("publish", *argv)

    assert ran.code == 2
    assert says in ran.err


def test_checksums_name_every_published_file_once(stocked: Checkout) -> None:
    """As sha256sum writes them, release.json first; they are the bytes in the registry."""
    path = stocked.root / "checksums.txt"

    stocked.fleet("publish", "--to", "production", "--checksums", str(path))

    lines = [line.split("  ", 1) for line in path.read_text().splitlines()]
    found = {name: sha256 for sha256, name in lines}
    assert len({sha256 for sha256, _ in lines}) == len(lines)
    for model in (MODEL, OTHER):
        id_ = stocked.alias("production", model).release
        assert found[f"{model}/release.json"] == id_
        release = Release.model_validate_json(stocked.at.release(model).read_bytes())
        assert {file.sha256 for file in release.files} <= {sha256 for sha256, _ in lines}
    assert lines[0][1].endswith("/release.json")
    for sha256, name in lines:
        if not name.endswith("/release.json"):
            data = stocked.blob_path(sha256, "production").read_bytes()
            assert hashlib.sha256(data).hexdigest() == sha256


def test_more_subjects_than_an_attestation_takes_make_several_files(
    stocked: Checkout, tmp_path: Path
) -> None:
    """1,024 in each; those of an earlier run are gone."""
    stocked.fleet("publish", MODEL, "--to", "production")
    first = Release.model_validate_json(stocked.at.release(MODEL).read_bytes())
    many = [
        release_bytes(
            first.model_copy(
                update={
                    "model": f"model-{number}",
                    "files": tuple(
                        file.model_copy(
                            update={"sha256": hashlib.sha256(f"{number} {i}".encode()).hexdigest()}
                        )
                        for i, file in enumerate(first.files)
                    ),
                }
            )
        )
        for number in range(100)
    ]
    path = tmp_path / "sums.txt"

    written = checksums.write(path, many)

    counts = [len(each.read_text().splitlines()) for each in written]
    assert counts[:-1] == [checksums.MAX_SUBJECTS] * (len(counts) - 1)
    assert sum(counts) == 100 * (len(first.files) + 1)
    assert checksums.write(path, many[:1]) == (path,)
    assert sorted(tmp_path.glob("sums*")) == [path]


# --- a job of GitHub Actions ------------------------------------------------------------------


def publish(hosted: Hosted, *argv: str) -> Any:
    """Type what the workflow types."""
    return hosted.checkout.fleet(
        "publish", "--environment", "production", "--pull", "--propose", *argv
    )


def test_a_job_publishes_and_the_ledger_comes_by_one_pull_request(hosted: Hosted) -> None:
    """Outputs, a summary, one commit with ledger and release; a second run changes nothing."""
    ran = publish(hosted)

    assert ran.code == 0, ran.err
    outputs = hosted.outputs()
    assert outputs["published"] == outputs["moved"] == f"{MODEL} {OTHER}"
    (pull,) = hosted.open_pulls()
    assert pull["head"] == "fleet/ledger"
    assert outputs["pull_request"].startswith("https://")
    summary = hosted.summary()
    assert "4 moved" in summary
    files = hosted.api.git.files("fleet/ledger")
    for model in (MODEL, OTHER):
        assert files[f"results/{model}/release.json"] == (
            hosted.checkout.at.release(model).read_bytes()
        )
    head = hosted.api.git.head("fleet/ledger")

    hosted.clone()
    ran = publish(hosted)

    assert ran.code == 0, ran.err
    assert hosted.outputs()["moved"] == ""
    assert "0 moved, 4 unchanged" in hosted.summary()
    assert hosted.api.git.head("fleet/ledger") == head
    assert len(hosted.open_pulls()) == 1

    hosted.merge()
    hosted.clone()
    hosted.api.forget()
    assert publish(hosted).code == 0
    assert not [seen for seen in hosted.api.requests if seen.is_write]


def test_a_run_before_the_ledger_was_merged_is_not_refused_and_loses_no_move(
    hosted: Hosted,
) -> None:
    """Forward to another release, then back by a revert on main: the waiting ledger is known."""
    publish(hosted, MODEL)
    first = hosted.checkout.alias("production").release
    hosted.clone()
    change_load_test(hosted.checkout.at, MODEL, wall_s=123.0)
    newer = hosted.push()
    hosted.clone()

    assert publish(hosted, MODEL).code == 0
    second = hosted.checkout.alias("production").release
    assert second != first
    # The commit is reverted; the ledger of both moves still waits.
    before = hosted.api.git.files(f"{newer}~1")
    hosted.api.git.commit("main", dict(before))
    hosted.clone()
    ran = publish(hosted, MODEL)

    assert ran.code == 0, ran.err
    assert [move.release for move in hosted.checkout.alias("production").moves] == [
        first, second, first,
    ]  # fmt: skip
    hosted.merge()
    hosted.clone()
    for registry in ("production", "backup"):
        assert hosted.checkout.ledger().moves(registry, "stable") == (
            hosted.checkout.alias(registry).moves
        )


def test_what_waits_of_another_model_stays_in_the_pull_request(hosted: Hosted) -> None:
    """One model now, the other later: one pull request with both, from two clones."""
    publish(hosted, MODEL)
    hosted.clone()

    publish(hosted, OTHER)

    assert len(hosted.open_pulls()) == 1
    files = hosted.api.git.files("fleet/ledger")
    for model in (MODEL, OTHER):
        assert files[f"results/{model}/ledger.jsonl"].count(b"\n") == 2


def test_lines_that_only_the_branch_tells_make_no_move(hosted: Hosted) -> None:
    """Whoever pushes to the branch has nothing served: a move has to be the registry's, too."""
    publish(hosted, MODEL)
    files = hosted.api.git.files("fleet/ledger")
    name = f"results/{MODEL}/ledger.jsonl"
    elsewhere = Path(hosted.files / "ledger.jsonl")
    elsewhere.write_bytes(files[name])
    ledger = Ledger.load(elsewhere, MODEL)
    last = ledger.last("production", "stable")
    assert last is not None
    forged = last.model_copy(update={"sequence": 2, "release": "f" * 64, "previous": last.release})
    ledger.append("production", "stable", forged)
    hosted.api.git.commit("fleet/ledger", {name: elsewhere.read_bytes()})
    before = hosted.checkout.alias("production")
    hosted.clone()

    publish(hosted, MODEL)

    assert hosted.checkout.alias("production") == before


def test_an_old_run_that_is_started_again_stops_with_a_notice(hosted: Hosted) -> None:
    """It never published; main has moved on: green, nothing is sent, the summary says so."""
    hosted.checkout.at.params.write_text(hosted.checkout.at.params.read_text() + "# later\n")
    hosted.push()
    hosted.clone("main~1")

    ran = publish(hosted)

    assert ran.code == 0
    assert "says something else than this run in params.yaml" in ran.err
    assert not (hosted.checkout.root / "production").exists()
    assert hosted.outputs()["published"] == ""
    assert "params.yaml" in hosted.summary()


def test_main_with_a_merged_ledger_is_not_another_main(hosted: Hosted) -> None:
    """Ledger and release are what publishing itself wrote: a run that waited goes on."""
    publish(hosted, MODEL)
    hosted.merge()
    hosted.clone("main~1")

    assert publish(hosted).code == 0
    assert hosted.outputs()["published"] == f"{MODEL} {OTHER}"


def test_a_release_takes_back_no_rollback_that_git_does_not_know(hosted: Hosted) -> None:
    """Rolled back at night, merged in the morning by somebody who does not know: it stays."""
    publish(hosted, MODEL)
    change_load_test(hosted.checkout.at, MODEL, wall_s=123.0)
    hosted.push()
    hosted.clone()
    publish(hosted, MODEL)
    hosted.merge()
    hosted.clone()
    hosted.checkout.fleet(
        "rollback", MODEL, "--to", "previous", "--registry", "production", "--reason", "at night"
    )
    held = hosted.checkout.alias("production")
    hosted.clone()
    change_load_test(hosted.checkout.at, MODEL, wall_s=456.0)
    hosted.push()

    ran = publish(hosted, MODEL)

    assert ran.code == 5
    assert "was rolled back to" in ran.err
    assert f"fleet/rollback-{MODEL}" in ran.err
    assert hosted.checkout.alias("production") == held
    assert "was rolled back to" in hosted.summary()


def test_nobody_is_asked_to_approve_what_a_rollback_that_waits_will_refuse(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan knows of the pull request that is to be merged first; a run by hand asks anyway."""
    publish(hosted, MODEL)
    change_load_test(hosted.checkout.at, MODEL, wall_s=123.0)
    hosted.push()
    hosted.clone()
    publish(hosted, MODEL)
    hosted.merge()
    hosted.clone()
    ran = hosted.checkout.fleet(
        "rollback", MODEL, "--to", "previous", "--environment", "production", "--reason", "bad",
        "--pr",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    hosted.clone()
    change_load_test(hosted.checkout.at, MODEL, wall_s=456.0)
    hosted.push()
    hosted.outputs()

    told = hosted.checkout.fleet("publish", MODEL, "--plan", "--json").json

    assert [each["is_due"] for each in told["models"]] == [False, False]
    assert f"merge fleet/rollback-{MODEL} first" in told["models"][0]["why"]
    monkeypatch.setenv("GITHUB_EVENT_NAME", "workflow_dispatch")
    told = hosted.checkout.fleet("publish", MODEL, "--plan", "--json").json
    assert [each["is_due"] for each in told["models"]] == [True, True]
    monkeypatch.delenv("GITHUB_EVENT_NAME")
    hosted.merge()
    hosted.clone()
    told = hosted.checkout.fleet("publish", MODEL, "--plan", "--json").json
    assert all("rolled back" not in each["why"] for each in told["models"])


def test_what_a_run_cannot_attest_is_an_error_and_not_a_silence(
    hosted: Hosted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """publish.yml takes two files of digests; a third one would be published without a word."""
    monkeypatch.setattr(checksums, "MAX_SUBJECTS", 5)

    ran = publish(hosted, "--checksums", str(tmp_path / "sums.txt"))

    assert ran.code == 8
    assert "will not be attested: a run attests 10 of them" in ran.err
    assert hosted.outputs()["published"] == f"{MODEL} {OTHER}"
    assert "will not be attested" in hosted.summary()
    assert publish(hosted, MODEL).code == 0


def test_a_refusal_of_github_takes_back_nothing_and_the_next_run_proposes_it(
    hosted: Hosted,
) -> None:
    """403 at any call: the moves stand, the exit code tells, the next run ends it."""
    publish(hosted, MODEL)
    asked = [str(seen) for seen in hosted.api.requests]
    for what in asked:
        if "POST" not in what:
            continue
        hosted.api.close_pull(hosted.open_pulls()[0]["number"])
        hosted.api.git.git("update-ref", "-d", "refs/heads/fleet/ledger")
        hosted.clone()
        hosted.api.forget()
        hosted.api.strike(Fault(kind="status", status=403, body={"message": "no"}), matches=what)

        ran = publish(hosted, MODEL)

        assert ran.code == 8, what
        assert "no" in ran.err
        hosted.clone()
        assert publish(hosted, MODEL).code == 0
        assert len(hosted.open_pulls()) == 1
        assert f"results/{MODEL}/ledger.jsonl" in hosted.api.git.files("fleet/ledger")


def test_without_a_token_a_job_publishes_nothing(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody could tell whether it is outdated."""
    monkeypatch.delenv("GITHUB_TOKEN")

    ran = publish(hosted)

    assert ran.code == 2
    assert "GITHUB_TOKEN" in ran.err
    assert not (hosted.checkout.root / "production").exists()


# --- the plan ---------------------------------------------------------------------------------


def plan(hosted: Hosted) -> list[dict[str, str]]:
    """Return the matrix that the workflow reads."""
    ran = hosted.checkout.fleet("publish", "--plan")
    assert ran.code == 0, ran.err
    outputs = hosted.outputs()
    include: list[dict[str, str]] = json.loads(outputs["matrix"])["include"]
    assert outputs["any"] == ("true" if include else "false")
    return include


def test_nobody_is_asked_to_approve_where_nothing_changes(hosted: Hosted) -> None:
    """Due, then not: also while the ledger waits, and by hand always."""
    both = {"environment": "production", "registries": "production backup"}
    assert plan(hosted) == [{**both, "models": f"{MODEL} {OTHER}"}]
    publish(hosted, MODEL)
    hosted.outputs()
    hosted.clone()

    assert plan(hosted) == [{**both, "models": OTHER}]
    publish(hosted, OTHER)
    hosted.outputs()
    hosted.merge()
    hosted.clone()
    assert plan(hosted) == []


def test_a_run_by_hand_looks_after_every_registry(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry that lost something is repaired so: git does not know of the loss."""
    publish(hosted)
    hosted.merge()
    hosted.clone()
    hosted.outputs()
    shutil.rmtree(hosted.checkout.root / "backup")
    assert plan(hosted) == []

    monkeypatch.setenv("GITHUB_EVENT_NAME", "workflow_dispatch")
    assert len(plan(hosted)) == 1
    assert publish(hosted).code == 0
    assert hosted.checkout.fleet("verify-registry", "backup").code == 0


def test_a_plan_asks_no_registry_and_needs_no_token(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From git alone; what is refused is said and asks for nobody's approval."""
    path = checkout.at.model_record("fetch", MODEL)
    record = records.read(path, FetchRecord)
    records.write(path, record.model_copy(update={"license": None}))
    from pipelines.stores.local import LocalStore  # noqa: PLC0415 - to forbid it

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a plan asks no registry")

    for name in ("read_alias", "read_release", "blob_size", "list_releases"):
        monkeypatch.setattr(LocalStore, name, forbidden)

    told = checkout.fleet("publish", "--plan", "--json").json

    assert [each["models"] for each in told["matrix"]["include"]] == [OTHER]
    assert "may not be published" in next(
        each["why"] for each in told["models"] if each["model"] == MODEL
    )
